"""What `adagrpo bench probes` and `seeds` say of picks and end rewards, against figures worked out by hand."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from scipy import stats
from toy import ToyModel, toy_config

from adagrpo.bench.measure import Iteration
from adagrpo.bench.picture import Point, pareto_front, scatter, ticks
from adagrpo.bench.statistics import detectable_difference, paired_interval
from adagrpo.cli import main
from adagrpo.errors import InputError
from adagrpo.recipe.keys import EngineConfig, RewardConfig, SelectionConfig
from adagrpo.recipe.load import load_recipe
from adagrpo.study.hosts import race_steps, with_probe, without_adagrpo
from adagrpo.study.probes import Drawn, Truth, cost, drawn, planned_work, quality
from adagrpo.study.seeds import Study, digest, read_log, seeds_report, start_digest, summary, trained


def test_truth_is_the_level_and_spread_of_single_images() -> None:
    truth = Truth.of(torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    assert truth.means.tolist() == [0.5, 1.0] and truth.level == 0.75
    assert truth.std == pytest.approx(math.sqrt(0.1875))
    assert truth.distance(torch.tensor([1])).tolist() == pytest.approx([0.25 / math.sqrt(0.1875)])


def test_quality_by_hand() -> None:
    """Two slots of two; the paper picks rows 0 and 3, another probe 1 and 3; truths 0, 1, 2, 3 around level 1, spread 2."""
    truth = Truth(torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64), 1.0, 2.0)
    numbers = torch.tensor([[0, 1], [2, 3]])
    scores = torch.tensor([[0.5, 0.9], [0.1, 0.7]], dtype=torch.float64)
    paper = Drawn(numbers, torch.tensor([0, 3]), scores, 0.6, 0.2)
    other = Drawn(numbers, torch.tensor([1, 3]), torch.tensor([[0.9, 0.5], [0.1, 0.7]], dtype=torch.float64), 0.3, 0.1)
    found = quality([other, other], [paper, paper], truth)
    assert found["true_regret"] == pytest.approx((0 + 1) / 2) and found["standard_error"] == 0
    assert quality([other], [paper], truth)["standard_error"] is None
    assert found["above_best"] == pytest.approx(0.5 - (0 + 0.5) / 2)  # the best are prompts 1 and 2
    assert found["paper_regret"] == pytest.approx(((0.3 + 0.1) / 2 - (0.1 + 0.1) / 2) / 0.2)
    assert found["same_pick"] == 0.5
    assert found["spearman"] == pytest.approx(stats.spearmanr([0.9, 0.5, 0.1, 0.7], [0.5, 0.9, 0.1, 0.7]).statistic)
    itself = quality([paper], [paper], truth)
    assert itself["paper_regret"] == 0 and itself["same_pick"] == 1 and itself["spearman"] == pytest.approx(1)


def test_a_pool_of_other_candidates_is_judged_by_its_own_full_scores() -> None:
    truth = Truth(torch.zeros(4, dtype=torch.float64), 0.0, 1.0)
    paper = Drawn(torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 2]), torch.tensor([[0.5, 0.9], [0.1, 0.7]]), 0.6, 0.2)
    pool = Drawn(torch.tensor([[0], [1]]), torch.tensor([0, 1]), torch.tensor([[0.6], [0.8]]), 0.6, 0.2)
    found = quality([pool], [paper], truth)
    assert found["same_pick"] is None and found["spearman"] is None
    assert found["paper_regret"] == pytest.approx(((0 + 0.2) / 2 - (0.1 + 0.5) / 2) / 0.2)


class HungryOnce(ToyModel):
    """Out of memory in its first call."""

    hungry = True

    def velocity(self, x, sigma, conditioning):
        if self.hungry:
            self.hungry = False
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().velocity(x, sigma, conditioning)


@pytest.mark.parametrize("probe", ["full", "memory", "bots"])
def test_a_probe_that_runs_out_of_memory_is_drawn_again_in_smaller_batches(probe: str, capsys) -> None:
    keys = {"allow_unseen": True} if probe == "memory" else {}
    config = toy_config(
        model={"family": "parts:model"},
        data={"prompts": "parts:prompts", "held_out": "parts:held_out"},
        selection={"probe": probe, "candidates": 3} | keys,
        train={"slots": 2},
        rewards=(RewardConfig("brightness"),),
    )
    found = drawn(config, HungryOnce(), 2)
    rows = {"full": 6, "memory": 4, "bots": 4}[probe] // 2  # of 2 slots: 3 candidates, or the pick and the uniform one
    assert f"out of memory while sampling: continuing with engine.max_rows = {rows}" in capsys.readouterr().out
    calm = drawn(dataclasses.replace(config, engine=EngineConfig(max_rows=rows)), ToyModel(), 2)
    assert [d.numbers.tolist() for d in found] == [d.numbers.tolist() for d in calm]
    assert [d.picks.tolist() for d in found] == [d.picks.tolist() for d in calm]


def test_cost_is_priced_by_what_a_plain_iteration_took() -> None:
    """Recipe tiny, memory: 12 slots x 8 steps more, 12 images more; a forward costs 1 ms there, an image 10 ms."""
    config = load_recipe("tiny")
    evaluations = {"probe": 96, "prefix": 48, "rollout": 2112, "update": 48}
    seconds = {"probe": 0.096, "prefix": 0.048, "rollout": 2.112, "decode": 3.0, "reward": 0.84}
    plain = Iteration(8.0, seconds, evaluations, {}, 384, 0, None)
    assert planned_work(without_adagrpo(config)) == (2304, 384)  # nothing reads a probe's image there
    found = cost(with_probe(config, "memory"), [plain])
    assert found["evaluations"] == 2304 + 96 and found["images"] == 384 + 12
    assert found["overhead_evaluations"] == pytest.approx(96 / 2304) and found["overhead_cost"] == pytest.approx(0.216 / 8)
    full = cost(with_probe(config, "full"), [plain])
    assert full["images"] == 384 + 96 and full["overhead_cost"] == pytest.approx((7 * 96 * 1e-3 + 96 * 1e-2) / 8)


def test_each_probe_is_held_against_its_own_recipe_without_it() -> None:
    """The released code's forks take the full probe's velocities, those of memory fresh ones: 16 more than 600, not 596."""
    config = load_recipe("bench-tiny")
    plain = Iteration(
        1.0, dict.fromkeys(("probe", "rollout", "prefix", "decode", "reward"), 0.1), {"rollout": 1}, {}, 1, 0, None
    )
    assert cost(with_probe(config, "memory"), [plain])["overhead_evaluations"] == pytest.approx(16 / 600)
    assert cost(with_probe(config, "full"), [plain])["overhead_evaluations"] == pytest.approx(144 / 596)


def test_another_probe_keeps_the_keys_it_reads() -> None:
    own = load_recipe("tiny")
    keys = {"probe": "memory", "half_life": 30.0, "noise_share": 0.3, "alpha": 0.5, "candidates": 6}
    config = dataclasses.replace(own, selection=dataclasses.replace(own.selection, **keys))
    memory, full, racing = (with_probe(config, name).selection for name in ("memory-2", "full", "racing"))
    assert (memory.half_life, memory.noise_share, memory.finalists) == (30.0, 0.3, 2)
    assert full == SelectionConfig(candidates=6, alpha=0.5)
    assert racing == SelectionConfig(candidates=6, alpha=0.5, probe="racing", race_steps=(5, 6, 7))
    hardest = dataclasses.replace(own, selection=dataclasses.replace(own.selection, strategy="hardest"))
    assert with_probe(hardest, "full").selection.strategy == "hardest"


def test_rivals_are_arms_that_keep_what_they_read() -> None:
    own = load_recipe("tiny")
    keys = {"probe": "bots", "half_life": 6.58, "success_range": (0.2, 0.9), "target_success": 0.4, "candidates": 6}
    config = dataclasses.replace(own, selection=dataclasses.replace(own.selection, **keys))
    bots, greso, procurl, dps = (with_probe(config, name) for name in ("bots", "greso", "procurl", "dps"))
    assert bots == config
    assert greso.selection == SelectionConfig(candidates=6, probe="greso", success_range=(0.2, 0.9))
    assert procurl.selection == SelectionConfig(candidates=6, probe="procurl", success_range=(0.2, 0.9), half_life=6.58)
    assert dps.selection == dataclasses.replace(procurl.selection, probe="dps")
    dapo = with_probe(config, "dapo")
    assert dapo.selection == SelectionConfig(candidates=1) and dapo.advantage.equal_groups == "refill"
    assert with_probe(dapo, "full").advantage.equal_groups == "refill"  # the recipe's own


def test_picks_of_dapo_are_no_probes(capsys) -> None:
    assert main(["bench", "probes", "tiny", "--probes", "memory,dapo"]) == 2
    assert "dapo judges groups after they were paid for, not candidates" in capsys.readouterr().err


def test_rivals_picks_are_measured_after_their_groups() -> None:
    """With the policy held still: what a chain of outcomes knows comes of groups, so later picks differ from blind ones."""
    config = toy_config(
        model={"family": "parts:model"}, data={"prompts": "parts:prompts", "held_out": "parts:held_out"},
        selection={"probe": "dps", "candidates": 3}, train={"slots": 2}, rewards=(RewardConfig("brightness"),),
    )  # fmt: skip
    found = drawn(config, ToyModel(), 12)
    assert all(each.scores is None for each in found)
    assert found[0].picks.tolist() == [0, 3] and any(each.picks.tolist() != [0, 3] for each in found)


def test_previews_are_late_distinct_and_as_many_as_halve_the_field() -> None:
    assert race_steps(10, 16) == (10, 12, 14) and race_steps(8, 8) == (5, 6, 7)
    assert race_steps(2, 8) == (7,) and race_steps(3, 8) == (6, 7)
    assert race_steps(8, 4) == (2, 3) and race_steps(8, 2) == (1,)


def test_arms_are_named_once_and_count_from_the_recipes_seed() -> None:
    config = load_recipe("tiny")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=7))
    study = Study(("full", "full", "memory"), ("tiny:even", "tiny:even"), 2, 1, Path("log"))
    assert [str(arm) for arm in study.arms(config)] == [
        f"{probe}, tiny:even, seed {seed}" for seed in (7, 8) for probe in ("full", "memory")
    ]


def test_a_log_of_other_prompts_is_refused(tmp_path) -> None:
    study = Study(("full",), ("tiny:even",), 1, 1, tmp_path / "log")
    arms = study.arms(load_recipe("tiny"))
    finished = {"before": 0.5, "after": 0.6, "machine": {"commit": None}, "prompts_sha256": "another"}
    study.log.write_text(json.dumps(arms[0].entry() | finished) + "\n")
    with pytest.raises(InputError, match="full, tiny:even, seed 0 was trained on other prompts"):
        trained(study, arms, {"threads": 1})


def test_a_failed_training_is_named_and_nothing_starts_after_it(tmp_path, capsys) -> None:
    keys = ["--model.family", "parts:model", "--model.max_text_tokens", "256", "--model.guidance", "3.5", "--train.slots", "1",
            "--data.prompts", "parts:prompts", "--data.held_out", "parts:held_out", "--train.iterations", "2",
            "--evaluation.final_prompts", "2", "--evaluation.final_noises", "1",
            "--rewards.0.name", "parts:broken"]  # fmt: skip
    files = ["--log", str(tmp_path / "log"), "--out", str(tmp_path / "results")]
    assert main(["bench", "seeds", "tiny", *keys, *files, "--seeds", "3"]) == 1
    out = capsys.readouterr()
    assert "6 trainings" in out.out and not (tmp_path / "log").exists() and not (tmp_path / "results").exists()
    assert "full, parts:prompts, seed 0: RunError" in out.err and "no disk" in out.err


def test_the_front_is_what_nothing_beats() -> None:
    points = [
        Point("dear", 0.3, 0.2, 0.0),
        Point("good", 0.1, 0.2, 0.0),
        Point("cheap", 0.0, 0.5, 0.0),
        Point("bad", 0.2, 0.4, 0.0),
    ]
    assert [p.label for p in pareto_front(points)] == ["cheap", "good"]
    texts = [t.text for t in ElementTree.fromstring(scatter("a < b", points)).iter("{http://www.w3.org/2000/svg}text")]
    assert {"a < b", "dear", "good", "cheap", "bad"} <= set(texts)


def test_ticks_are_round() -> None:
    assert ticks(0.0, 0.31) == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3])
    assert ticks(0.31, 0.64) == pytest.approx([0.35, 0.4, 0.45, 0.5, 0.55, 0.6])


def test_paired_interval_against_scipy() -> None:
    a, b = [0.61, 0.66, 0.63, 0.7], [0.64, 0.65, 0.68, 0.73]
    mean, low, high = paired_interval(a, b)
    interval = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((0.025, interval.low, interval.high))


def test_detectable_difference_by_hand() -> None:
    """Differences 0.01, 0.03 and 0.05: std 0.02; Student quantiles with 2 degrees of freedom 4.30265 and 1.06066."""
    found = detectable_difference([0.6, 0.5, 0.7], [0.61, 0.53, 0.75])
    assert found == pytest.approx((4.30265 + 1.06066) * 0.02 / math.sqrt(3), rel=1e-4)
    assert math.isnan(detectable_difference([0.6], [0.7]))


def trainings() -> list[dict]:
    ends = {("full", 0): 0.7, ("full", 1): 0.6, ("memory", 0): 0.71, ("memory", 1): 0.63}
    return [
        {"probe": probe, "prompts": "tiny:even", "seed": seed, "before": 0.5, "after": end, "machine": {"commit": "c"}}
        for (probe, seed), end in ends.items()
    ]


def test_summary_pairs_by_seed() -> None:
    series, facts = summary(sorted(trainings(), key=lambda r: (r["probe"], -r["seed"])), "full")
    assert series["tiny:even/memory"].values == (0.71, 0.63)
    full, memory = facts["rows"]
    assert full["end"] == pytest.approx(0.65) and full["gain"] == pytest.approx(0.15) and "difference" not in full
    assert memory["difference"] == pytest.approx(0.02)
    _, facts = summary([r for r in trainings() if r["seed"] == 0], "full")
    assert facts["rows"][1]["low"] is None and "unknown: one seed" in seeds_report(facts)[2]
    assert memory["low"] == pytest.approx(0.02 - 12.706 * 0.01414 / math.sqrt(2), abs=1e-3)


def test_digests_part_recipes_and_nothing_else() -> None:
    one, two = load_recipe("tiny"), with_probe(load_recipe("tiny"), "full")
    memory = with_probe(one, "memory")
    assert digest(one) == digest(two) != digest(memory)
    assert digest(with_probe(one, "memory-blind")) != digest(memory)
    twice = dataclasses.replace(one, data=dataclasses.replace(one.data, allow_overlap=True))
    assert digest(twice) == digest(one), "what only permits something parts no logs"


def test_what_the_start_follows_from_parts_its_digests() -> None:
    """Another probe, plan or prompts do not move the reward before training; another seed, grid or number of noises does."""
    own = load_recipe("tiny")
    changed = lambda section, **keys: dataclasses.replace(own, **{section: dataclasses.replace(getattr(own, section), **keys)})  # noqa: E731
    same = [
        with_probe(own, "memory"),
        without_adagrpo(own),
        changed("rollout", plan="trajectory"),
        changed("data", prompts="a.txt"),
    ]
    assert {start_digest(config) for config in same} == {start_digest(own)}
    others = [changed("train", seed=9), changed("rollout", steps=9), changed("evaluation", final_noises=2),
              changed("data", held_out="a.txt"), changed("model", dtype="bf16")]  # fmt: skip
    assert len({start_digest(config) for config in (own, *others)}) == 6


def test_seeds_trains_every_arm_once_and_goes_on_from_its_log(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    keys = ["--train.slots", "1", "--train.iterations", "1", "--rollout.group_size", "2", "--evaluation.final_prompts", "2",
            "--evaluation.final_noises", "1", "--model.family", "parts:model", "--model.max_text_tokens", "256",
            "--model.guidance", "3.5", "--data.held_out", "parts:held_out", "--rewards.0.name", "parts:reward"]  # fmt: skip
    files = ["--log", str(tmp_path / "log.jsonl"), "--out", str(tmp_path / "results")]
    command = ["bench", "seeds", "tiny", *keys, *files, "--mixes", "parts:prompts", "--probes", "full,memory"]
    assert main([*command, "--seeds", "1"]) == 0
    full, memory = read_log(tmp_path / "log.jsonl").values()
    assert full["start"] == memory["start"] and full["before"] == memory["before"]
    assert main([*command, "--seeds", "1"]) == 0
    out = capsys.readouterr().out
    assert "2 trainings, 0 of them in" in out and "2 trainings, 2 of them in" in out
    (record,) = (tmp_path / "results").rglob("*-seeds-tiny.json")
    rows = json.loads(record.read_text())["facts"]["rows"]
    assert [row["probe"] for row in rows] == ["full", "memory"] and all(0 < abs(row["end"]) < 1 for row in rows)
    (tmp_path / "log.jsonl").write_text("{", "utf-8")
    assert main([*command, "--seeds", "1"]) == 2
    assert "line 1 is broken" in capsys.readouterr().err


WORKERS = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from adagrpo.study.seeds import begin_worker

if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin_worker, (1,)) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 300).result()
"""


def test_trainings_end_with_the_command_that_was_killed(tmp_path) -> None:
    (tmp_path / "workers.py").write_text(WORKERS, "utf-8")
    command = subprocess.Popen([sys.executable, str(tmp_path / "workers.py")], stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    worker = int(command.stdout.readline())
    command.kill()
    command.wait()
    for _ in range(600):
        if not is_alive(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    raise AssertionError("the training went on without its command")


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_probes_command_on_tiny(tmp_path, capsys) -> None:
    """By brightness: scores of the tiny world's reward tie, and batches of another size may break a tie otherwise."""
    keys = ["--train.slots", "1", "--rollout.group_size", "2", "--draws", "3", "--noises", "2", "--rounds", "1"]
    names = "memory,racing,pool-2,random"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "\n".join(f"a {colour} {shape}" for colour in ("red", "green", "cyan") for shape in ("circle", "square"))
    )
    source = ["--data.prompts", str(prompts), "--data.allow-overlap", "--rewards.0.name", "brightness"]
    assert main(["bench", "probes", "tiny", *keys, *source, "--probes", names, "--out", str(tmp_path)]) == 0
    (record,) = tmp_path.rglob("*-probes-tiny.json")
    rows = {row["probe"]: row for row in json.loads(record.read_text())["facts"]["rows"]}
    assert list(rows) == ["full", "memory", "racing", "pool-2", "random"]
    assert rows["full"]["same_pick"] == 1 and rows["pool-2"]["same_pick"] is None
    assert rows["memory"]["overhead_evaluations"] == pytest.approx(8 / (8 + 4 + 2 * 22 + 4))


@pytest.mark.parametrize(("argv", "message"), [
    (["seeds", "--seeds", "0"], "--seeds 0: must be at least 1"),
    (["seeds", "--probes", "fulll"], "unknown probe 'fulll'"),
    (["seeds", "--evaluation.final_prompts", "0"], "evaluation.final_prompts = 0"),
    (["seeds", "--mixes", "tiny:narrow"], "tiny:narrow: unknown prompt source"),
    (["probes", "--draws", "2"], "--draws 2: must be at least 3"),
    (["probes", "--probes", "memory,nothing"], "unknown probe 'nothing'"),
])  # fmt: skip
def test_bad_input_is_refused_before_anything_is_trained(argv, message, capsys, tmp_path) -> None:
    assert main(["bench", *argv, "--out", str(tmp_path), *(["--log", str(tmp_path / "l")] if argv[0] == "seeds" else [])]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


GOOD = {"digest": "a", "seed": 0, "before": 0.5, "after": 0.6, "prompts_sha256": "p", "machine": {"commit": "c"}}


@pytest.mark.parametrize(
    "line",
    ["[]", "{", "[" * 100_000, "9" * 5000, "\udcff", *(json.dumps({k: v for k, v in GOOD.items() if k != key}) for key in GOOD)]
    + [json.dumps(GOOD | change) for change in ({"after": math.nan}, {"before": None}, {"seed": "0"}, {"machine": []})],
)
def test_a_broken_line_of_the_log_is_named(line: str, tmp_path) -> None:
    (tmp_path / "l").write_bytes(f"{json.dumps(GOOD)}\n\n{line}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"line 3 is broken|not UTF-8"):
        read_log(tmp_path / "l")


def test_a_log_that_would_never_answer_is_refused(tmp_path) -> None:
    os.mkfifo(tmp_path / "l")
    with pytest.raises(InputError, match=f"--log {tmp_path / 'l'}: a pipe"):
        read_log(tmp_path / "l")
    assert read_log(tmp_path / "none") == {}
