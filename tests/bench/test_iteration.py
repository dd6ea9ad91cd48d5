"""One iteration under measurement: phases that add up, counted work, FLOPs worked out by hand, the command."""

import dataclasses
import json

import pytest
import torch
from toy import toy_config, toy_trainer

from adagrpo.bench.flops import ForwardFlops, count_flops, stated_peak
from adagrpo.bench.iteration import iteration_report, measure_iterations, rate_series
from adagrpo.bench.measure import PHASES, EnergyMeter, Iteration, host_syncs, interleaved, measure, phase_series, rows_seen
from adagrpo.bench.options import Options
from adagrpo.build import build_trainer
from adagrpo.cli import main
from adagrpo.recipe.load import load_recipe


def test_phases_add_up_and_work_is_counted() -> None:
    """2 slots x 3 candidates x 6 steps; 4 forks; 2 x 4 x (5 + 3) branches; 6 probes and 16 branches are scored."""
    trainer = toy_trainer(toy_config())
    found = measure(trainer)
    assert set(found.seconds) == set(PHASES)
    assert sum(found.seconds.values()) == pytest.approx(found.total) and found.seconds["other"] > 0
    assert found.evaluations == {"probe": 36, "prefix": 4, "rollout": 64, "update": 4}
    assert found.images == 22 and found.launches == 0 and found.joules is None
    assert rows_seen(trainer) == 108


def test_order_is_a_b_b_a() -> None:
    order: list[str] = []
    first, second = interleaved(lambda: order.append("A") or "A", lambda: order.append("B") or "B", rounds=4)
    assert "".join(order) == "AB" + "ABBAABBA"
    assert first == ["A"] * 4 and second == ["B"] * 4


def test_flops_of_tiny_flux_by_hand() -> None:
    """28 tokens of width 128; a product of m x k by k x n counts 2mkn, attention 4 L² D a block."""
    d, image, text = 128, 16, 12
    tokens = image + text
    double = 2 * (12 * d * d * tokens + 12 * d * d) + 4 * tokens**2 * d  # q k v, out, MLP of 4 d; two modulations of 6 d
    single = 2 * (12 * d * d * tokens + 3 * d * d) + 4 * tokens**2 * d
    embedders = 2 * (16 * d * image + 64 * d * text) + 2 * 2 * (256 * d + d * d) + 2 * (64 * d + d * d)
    out = 2 * (d * 2 * d + d * 16 * image)
    trainer = build_trainer(load_recipe("bench-tiny"))[0]
    found = count_flops(trainer.executor)
    assert found.forward == 2 * double + 4 * single + embedders + out == 70_287_360
    assert 2.9 < found.update / found.forward <= 3.0
    assert found.iteration({"probe": 160, "rollout": 576, "update": 4}) == 736 * found.forward + 4 * found.update
    assert all(p.grad is None for _, p in trainer.model.trainable())
    assert stated_peak(torch.device("cpu")) is None and stated_peak(torch.device("cpu"), 5.0) == 5.0


def test_rates_by_hand() -> None:
    seconds = dict.fromkeys(PHASES, 0.2)
    found = [
        Iteration(2.0, seconds, {"probe": 10, "update": 2}, {"probe": 1, "update": 1}, 20, 3, joules) for joules in (40.0, 60.0)
    ]
    series = rate_series(found, ForwardFlops(10**12, 3 * 10**12), peak=16.0)
    assert series["tflops"].values == (8.0, 8.0)  # (10 x 1 + 2 x 3) TFLOP in 2 s
    assert series["flop_utilisation"].median == 0.5
    assert series["images_per_second"].median == 10 and series["evaluations_per_second"].median == 6
    assert series["joules_per_image"].values == (2.0, 3.0) and series["launches"].median == 3
    assert "flop_utilisation" not in rate_series(found, ForwardFlops(1, 1), None)
    unknown = [Iteration(2.0, seconds, {"probe": 10}, {}, 20, 0, None)]
    assert "joules_per_image" not in rate_series(unknown, ForwardFlops(1, 1), None)
    phases = phase_series(found)
    assert phases["evaluations"].values == (12.0, 12.0) and phases["evaluations"].exact
    assert phases["seconds/probe"].values == (0.2, 0.2)


def test_what_a_cpu_cannot_tell_is_null() -> None:
    assert EnergyMeter(torch.device("cpu")).read() is None
    assert host_syncs(toy_trainer(toy_config())) is None


def test_the_command_measures_prints_and_records(tmp_path, capsys) -> None:
    quick = ["--train.slots", "1", "--rollout.steps", "4", "--rollout.sde-steps", "0", "1", "--rollout.group-size", "2"]
    args = ["bench", "iteration", "tiny", "--iterations", "2", "--out", str(tmp_path), "--note", "a test", *quick]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "FLOP utilisation: not stated" in out and "not known on this device" in out and "record: " in out
    (path,) = tmp_path.rglob("*-iteration-tiny.json")
    data = json.loads(path.read_text())
    assert data["argv"] == args and data["note"] == "a test" and data["facts"]["host_syncs"] is None
    # 8 candidates x 4 steps, 2 forks, 2 x (3 + 2) branches, 2 replays
    assert data["series"]["evaluations"]["values"] == [46.0, 46.0]
    assert "steps = 4" in data["recipe"] and len(data["series"]["seconds"]["values"]) == 2


def test_report_with_a_stated_peak() -> None:
    config = load_recipe("tiny")
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, slots=1),
        rollout=dataclasses.replace(config.rollout, steps=3, sde_steps=(0,), group_size=2),
    )
    record = measure_iterations(config, Options(1, None, peak=2.0))  # type: ignore[arg-type]
    assert "of 2 TFLOP/s" in "\n".join(iteration_report(record))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("iteration", "tinny"), ["tinny", "did you mean tiny"]),
        (("budget", "missing.toml"), ["missing.toml"]),
        (("iteration", "tiny", "--iterations", "0"), ["--iterations 0"]),
        (("budget", "tiny", "--budget.evaluations", "-1"), ["budget.evaluations = -1"]),
        (("compare", "a.json", "b.json"), ["a.json", "no such record"]),
        (("kernels", "--op", "sde"), ["--op sde", "sde_step"]),
        (("readme", "--results", "nowhere"), ["nowhere", "no such folder"]),
    ],
)
def test_errors_are_one_line_with_code_two(args, words, capsys) -> None:
    assert main(["bench", *args]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.count("\n") == 1 and all(word in err for word in words), err
