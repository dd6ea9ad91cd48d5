"""A resumed run may change what cannot change its result, and nothing else."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from toy import toy_config, toy_trainer

import adagrpo
from adagrpo.cli import main
from adagrpo.errors import InputError
from adagrpo.recipe.keys import Config, GuardConfig, GuardsConfig, RewardConfig
from adagrpo.recipe.load import load_recipe, to_toml
from adagrpo.run.changes import RULES, changed_keys, permitted, rule_of
from adagrpo.run.fit import Fit
from adagrpo.run.folder import RunFolder

HELD_OUT = ["a", "b", "c", "d"]


def every_key(cls: type = Config, prefix: str = "") -> list[str]:
    """Every key of a recipe, as the rules name it."""
    found = []
    for field in dataclasses.fields(cls):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        if field.name == "rewards":
            found += every_key(RewardConfig, "rewards.*.")
        elif dataclasses.is_dataclass(default):
            found += every_key(type(default), f"{prefix}{field.name}.")
        else:
            found.append(prefix + field.name)
    return found


def test_every_key_has_a_rule_and_every_rule_a_key() -> None:
    assert sorted(every_key()) == sorted(RULES)


def changed(config: Config, key: str, value: object) -> Config:
    section, _, rest = key.partition(".")
    if not rest:
        return dataclasses.replace(config, **{section: value})
    return dataclasses.replace(config, **{section: changed(getattr(config, section), rest, value)})


def verdict(before: Config, now: Config) -> str:
    try:
        found = permitted(before, now, changed_keys(before, now), "--out run")
    except InputError as error:
        return str(error)
    return "bitwise" if found.bitwise else "rounding"


BASE = toy_config(guards=GuardsConfig(non_finite=GuardConfig(limit=0.5, action="stop")))
ROLLBACK = dataclasses.replace(BASE, guards=GuardsConfig(kl=GuardConfig(limit=1.0, action="rollback")))
HACKING = dataclasses.replace(BASE, guards=GuardsConfig(reward_hacking=GuardConfig(limit=0.1, action="stop")))
REMOTE = dataclasses.replace(BASE, rewards=(RewardConfig("remote", kwargs={"url": "http://a", "token": "<redacted>"}),))
LINEAR = changed(BASE, "optimizer.schedule", "linear")


@pytest.mark.parametrize(
    ("before", "key", "value", "expected"),
    [
        (BASE, "name", "other", "bitwise"),
        (BASE, "output.loggers", ("tensorboard",), "bitwise"),
        (BASE, "output.grid_every", 7, "bitwise"),
        (BASE, "output.trace_at", 3, "bitwise"),
        (BASE, "model.prompt_cache", 5, "bitwise"),
        (BASE, "budget.time", 0.5, "bitwise"),
        (BASE, "data.allow_overlap", True, "bitwise"),
        (BASE, "guards.ratio.limit", 0.5, "bitwise"),
        (BASE, "guards.ratio.action", "stop", "guards.ratio does more than warn"),
        (BASE, "guards.non_finite.action", "warn", "guards.non_finite does more than warn"),
        (BASE, "guards.max_rollbacks", 9, "bitwise"),
        (ROLLBACK, "guards.max_rollbacks", 9, "guards.kl rolls back"),
        (BASE, "evaluation.every", 7, "bitwise"),
        (BASE, "evaluation.noises", 7, "bitwise"),
        (ROLLBACK, "evaluation.prompts", 7, "bitwise"),
        (changed(ROLLBACK, "output.keep_best", True), "evaluation.prompts", 7, "guards.kl rolls back"),
        (HACKING, "evaluation.prompts", 7, "guards.reward_hacking judges by it"),
        (BASE, "evaluation.final_prompts", 3, "evaluation.final_prompts = 4 there, 3 here"),
        (BASE, "output.checkpoint_every", 7, "bitwise"),
        (HACKING, "output.checkpoint_every", 7, "bitwise"),
        (ROLLBACK, "output.checkpoint_every", 7, "guards.kl rolls back"),
        (ROLLBACK, "output.keep_last", 1, "bitwise"),
        (BASE, "engine.max_rows", 3, "rounding"),
        (BASE, "engine.precision", "fp8", "rounding"),
        (BASE, "model.device", "cpu", "rounding"),
        (BASE, "model.gradient_checkpointing", True, "rounding"),
        (BASE, "train.iterations", 9, "bitwise"),
        (BASE, "train.iterations", 3, "a run can only grow"),
        (LINEAR, "train.iterations", 9, "optimizer.schedule = linear: every learning rate depends on the length"),
        (BASE, "train.slots", 1, "must stay the same"),
        (BASE, "train.seed", 3, "train.seed = 0 there, 3 here"),
        (BASE, "data.prompts", "x.txt", "data.prompts = toy.txt there, x.txt here"),
        (BASE, "selection.kwargs", {"a": 1}, "selection.kwargs"),
        (BASE, "rewards", (RewardConfig(weight=2.0),), "rewards.0.weight = 1.0 there, 2.0 here"),
        (BASE, "rewards", (RewardConfig(), RewardConfig()), "rewards.1.name"),
        (BASE, "rewards", (dataclasses.replace(BASE.rewards[0], kwargs={"url": "http://a"}),), "rewards.0.kwargs"),
        (REMOTE, "rewards", (RewardConfig("remote", kwargs={"url": "http://b", "token": "env:A"}),), "rounding"),
        (REMOTE, "rewards", (RewardConfig("remote", kwargs={"url": "http://b", "reward": "x"}),), "rewards.0.kwargs"),
    ],
)  # fmt: skip
def test_what_may_change(before: Config, key: str, value: object, expected: str) -> None:
    now = changed(before, key, value)
    found = [verdict(before, now), verdict(now, before)]
    if key in ("train.iterations",):
        found.pop()
    for each in found[:1] if "there" in expected else found:
        assert expected == each or (expected not in ("bitwise", "rounding") and expected in each), each


def test_the_same_prompts_in_other_micro_batches() -> None:
    now = changed(changed(BASE, "train.slots", 1), "train.accumulation", 2)
    assert verdict(BASE, now) == "rounding"


def start(config: Config, path: Path) -> Fit:
    trainer, run = toy_trainer(config), RunFolder.fresh(path)
    run.write_start(config, trainer.model.device, {})
    return Fit(trainer.config, trainer, run, HELD_OUT, say=lambda line: None)


def resume(config: Config, path: Path) -> Fit:
    fit = Fit(config, toy_trainer(config), RunFolder.existing(path, config), HELD_OUT, say=lambda line: None)
    fit.resume(fit.run.latest_checkpoint())
    fit.note_opening()
    return fit


def halfway(config: Config, path: Path, after: int = 4) -> None:
    """A run interrupted after ``after`` iterations."""
    fit = start(config, path)
    iteration, left = fit.trainer.iteration, iter(range(after))

    def interrupted():
        if next(left, None) is None:
            raise KeyboardInterrupt
        return iteration()

    fit.trainer.iteration = interrupted
    with pytest.raises(KeyboardInterrupt):
        fit()


def weights(fit: Fit) -> list[torch.Tensor]:
    return [p.detach().clone() for _, p in fit.trainer.model.trainable()]


def trained(fit: Fit) -> list[dict]:
    """The records without what evaluation and clocks add."""
    lines = [json.loads(line) for line in fit.run.metrics_file.read_text().splitlines()]
    return [{k: v for k, v in line.items() if "held_out" not in k and not k.endswith("seconds")} for line in lines]


LONG = toy_config(train={"iterations": 6, "slots": 2}, optimizer={"lr": 1e-2, "ema_decay": 0.5})


def test_free_changes_leave_the_result_bit_for_bit(tmp_path) -> None:
    whole = start(LONG, tmp_path / "whole")
    gain = whole().gain
    halfway(LONG, tmp_path / "run")
    now = dataclasses.replace(
        LONG,
        name="other",
        evaluation=dataclasses.replace(LONG.evaluation, every=1, prompts=2, noises=2),
        output=dataclasses.replace(LONG.output, grid_every=1, checkpoint_every=1, keep_last=1, keep_every=3, trace_at=6),
        guards=GuardsConfig(ratio=GuardConfig(limit=0.5), grad_norm=GuardConfig(limit=1e-9)),
        budget=dataclasses.replace(LONG.budget, time=0.9),
        model=dataclasses.replace(LONG.model, prompt_cache=3),
        data=dataclasses.replace(LONG.data, allow_overlap=True),
    )
    fit = resume(now, tmp_path / "run")
    assert fit().gain == gain
    assert trained(fit) == trained(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(fit), weights(whole), strict=True))
    assert load_recipe(tmp_path / "run" / "config.toml") == now
    (entry,) = fit.run.read_json("manifest.json")["changes"]
    assert entry["after_iteration"] == 4 and entry["keys"]["evaluation.every"] == [2, 1]
    assert "bitwise" in entry["meaning"] and "rounding" not in entry["meaning"]
    assert "evaluation.every = 2 there, 1 here" in (tmp_path / "run" / "events.jsonl").read_text()


@pytest.mark.parametrize(
    "keys", [{"engine.max_rows": 3}, {"engine.kernels": "reference"}, {"train.slots": 1, "train.accumulation": 2}]
)
def test_changes_by_rounding_are_told_and_recorded(keys: dict, tmp_path) -> None:
    whole = start(LONG, tmp_path / "whole")
    whole()
    halfway(LONG, tmp_path / "run")
    now = LONG
    for key, value in keys.items():
        now = changed(now, key, value)
    fit = resume(now, tmp_path / "run")
    fit()
    torch.testing.assert_close(weights(fit), weights(whole), rtol=1e-3, atol=1e-5)
    (entry,) = fit.run.read_json("manifest.json")["changes"]
    assert entry["meaning"] == "equal to rounding from iteration 5 on, not bitwise" and set(entry["keys"]) == set(keys)
    assert "equal to rounding from iteration 5 on" in (tmp_path / "run" / "events.jsonl").read_text()
    again = resume(now, tmp_path / "run")  # nothing changes any more
    assert len(again.run.read_json("manifest.json")["changes"]) == 1


def test_a_finished_run_grows_into_the_longer_one(tmp_path) -> None:
    short = changed(LONG, "train.iterations", 4)
    whole = start(LONG, tmp_path / "whole")
    gain = whole().gain
    first = start(short, tmp_path / "run")()
    longer = resume(LONG, tmp_path / "run")
    assert longer.trainer.iterations_done == 4
    assert longer().gain == gain != first.gain
    assert trained(longer) == trained(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(longer), weights(whole), strict=True))
    assert longer.run.read_json("result.json") == whole.run.read_json("result.json")


@pytest.mark.parametrize(
    ("before", "why"),
    [
        (BASE, "bitwise"),
        (HACKING, "iteration 4 is evaluated only as the last one, and guards.reward_hacking judges by that"),
        (changed(BASE, "output.keep_best", True), "evaluated only as the last one, and output.keep_best judges by that"),
        (changed(ROLLBACK, "output.checkpoint_every", 3), "has a checkpoint only as the last one: guards.kl rolls back"),
        (changed(ROLLBACK, "output.checkpoint_every", 0), "iteration 4 has a checkpoint only as the last one"),
        (ROLLBACK, "bitwise"),
    ],
)  # fmt: skip
def test_a_former_end_that_decides_something_does_not_grow(before: Config, why: str) -> None:
    odd = changed(before, "evaluation.every", 3)
    assert why in verdict(odd, changed(odd, "train.iterations", 6))
    if before.output.checkpoint_every == 2:  # iteration 4 is due in any run
        even = changed(before, "evaluation.every", 2)
        assert verdict(even, changed(even, "train.iterations", 6)) == "bitwise"


def test_the_point_at_the_former_end_is_told(tmp_path) -> None:
    long = changed(LONG, "evaluation.every", 3)
    whole = start(long, tmp_path / "whole")
    whole()
    start(changed(long, "train.iterations", 4), tmp_path / "run")()
    longer = resume(long, tmp_path / "run")
    longer()
    points = [
        {line["iteration"] for text in fit.run.metrics_file.open() if "reward/held_out" in (line := json.loads(text))}
        for fit in (whole, longer)
    ]
    assert points == [{3, 6}, {3, 4, 6}]
    assert trained(longer) == trained(whole)
    (entry,) = longer.run.read_json("manifest.json")["changes"]
    assert "one more point, at the former end, iteration 4" in entry["meaning"] and "result is bitwise" not in entry["meaning"]
    assert "one more point, at the former end, iteration 4" in (tmp_path / "run" / "events.jsonl").read_text()


def test_a_lower_limit_of_rows_wins_over_the_halved_one(tmp_path) -> None:
    fit = start(LONG, tmp_path / "run")
    fit.trainer.iteration()
    fit.trainer.executor.limit.state = (12, True)  # memory ran out
    fit.state.save()
    for wanted, limit in ((0, (12, True)), (24, (12, True)), (5, (5, False))):
        resumed = resume(changed(LONG, "engine.max_rows", wanted), tmp_path / "run")
        assert resumed.trainer.executor.limit.state == limit


def test_a_best_of_other_prompts_is_forgotten(tmp_path) -> None:
    fit = start(LONG, tmp_path / "run")
    fit.trainer.iteration()
    fit.state.best, fit.state.guards.best, fit.state.guards.rows["ratio"] = 0.75, (0.75, 0.5), 3
    fit.state.save()
    same = resume(changed(LONG, "evaluation.every", 3), tmp_path / "run")
    assert same.state.best == 0.75 and same.state.guards.best == (0.75, 0.5) and same.state.guards.rows["ratio"] == 3
    other = resume(changed(LONG, "evaluation.noises", 3), tmp_path / "run")
    assert other.state.best == -float("inf") and other.state.guards.best is None
    limits = dataclasses.replace(LONG, guards=GuardsConfig(ratio=GuardConfig(limit=0.5)))
    assert resume(changed(limits, "evaluation.noises", 3), tmp_path / "run").state.guards.rows["ratio"] == 0


def test_a_refused_change_touches_nothing(tmp_path) -> None:
    start(LONG, tmp_path / "run")()
    (tmp_path / "run" / "checkpoints" / ".step-000009.partial").mkdir()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    with pytest.raises(InputError, match="drop the change"):
        RunFolder.existing(tmp_path / "run", changed(LONG, "rollout.eta", 0.5))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def errors_of_runs() -> list[tuple[str, str]]:
    """Where a run ends with an error, and the constant words of its message."""
    found = []
    for path in sorted(Path(adagrpo.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) == "RunError":
                words = [n.value for n in ast.walk(node.exc) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                found.append((f"{path.name}:{node.lineno}", "".join(words)))
    return found


def test_remedies_that_errors_of_a_run_name_work_on_resume() -> None:
    """Keys that decide the result may be named for a new run only, and then by these words."""
    keys, named = set(every_key()), 0
    assert len(errors_of_runs()) > 5
    for place, message in errors_of_runs():
        here, _, _ = message.partition("in a new run")
        for key in re.findall(r"\b[a-z]+\.[a-z_]+\b", here):
            if key in keys and not message.startswith(key):  # whose part failed is no remedy
                named += 1
                assert rule_of(key) is not rule_of("train.seed"), f"{place}: {key} cannot be changed on resume"
    assert named >= 4


@pytest.fixture
def recipe(tmp_path):
    config = toy_config(
        model={"family": "parts:model", "device": "cpu"},
        data={"prompts": "parts:prompts", "held_out": "parts:held_out"},
        output={"grid_every": 0, "checkpoint_every": 2},
        rewards=(RewardConfig("parts:reward"),),
        name="toy",
    )
    file = tmp_path / "toy.toml"
    file.write_text(to_toml(config), "utf-8")
    return str(file)


def test_the_command_resumes_with_other_keys(recipe, tmp_path, capsys) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert main(["train", recipe, *out]) == 0
    longer = ["--train.iterations", "6", "--name", "longer", "--engine.max-rows", "5"]
    assert main(["train", recipe, *out, "--resume", "latest", *longer]) == 0
    assert "equal to rounding from iteration 5 on, not bitwise" in capsys.readouterr().out
    assert main(["train", recipe, *out, "--resume", "latest", "--name", "longer"]) == 2
    assert "train.iterations = 6 there, 4 here" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "run" / "config.toml"), *out, "--resume", "latest"]) == 0


def test_a_dry_run_tells_what_resuming_would_refuse(recipe, tmp_path, capsys) -> None:
    out = ["--out", str(tmp_path / "run")]
    dry = [*out, "--dry-run", "--resume"]
    assert main(["train", recipe, *dry, "auto"]) == 0 and not (tmp_path / "run").exists()
    assert main(["train", recipe, *dry, "latest"]) == 2
    assert "no run to resume there" in capsys.readouterr().err
    assert main(["train", recipe, *out]) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    for mode in ("latest", "auto"):
        assert main(["train", recipe, *dry, mode, "--train.iterations", "9"]) == 0
        assert main(["train", recipe, *dry, mode, "--optimizer.lr", "9"]) == 2
        assert "optimizer.lr = 0.01 there, 9.0 here" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_a_start_without_a_checkpoint_gives_way_to_the_corrected_command(recipe, tmp_path, capsys, monkeypatch) -> None:
    out = ["--out", str(tmp_path / "run")]
    original = Fit.__call__

    def fails(self):
        self.run.log({"iteration": 1})
        raise InputError("checkpoints do not fit: lower output.keep_last")

    for corrected in ([], ["--resume", "auto"]):
        monkeypatch.setattr(Fit, "__call__", fails)
        assert main(["train", recipe, *out, "--optimizer.lr", "9"]) == 2
        monkeypatch.setattr(Fit, "__call__", original)
        assert main(["train", recipe, *out, "--optimizer.lr", "9", "--resume", "latest"]) == 2
        assert "--resume auto, or without --resume" in capsys.readouterr().err
        assert main(["train", recipe, *out, "--output.keep-last", "1", *corrected]) == 0
        assert "an earlier start that came to no checkpoint was moved to" in capsys.readouterr().out
        earlier = tmp_path / "run" / "earlier-start-001"
        assert json.loads((earlier / "metrics.jsonl").read_text()) == {"iteration": 1}
        assert load_recipe(earlier / "config.toml").optimizer.lr == 9
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3, 4]
        assert main(["train", recipe, *out]) == 2
        assert "holds a run already" in capsys.readouterr().err
        (tmp_path / "run").rename(tmp_path / f"used{len(corrected)}")


@pytest.mark.parametrize("left", ["nothing", "folders", "half a recipe", "no manifest", "first checkpoint", "moving"])
@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]])
def test_a_start_killed_anywhere_leaves_a_folder_that_can_be_used(left: str, resume, recipe, tmp_path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "samples").mkdir()
    (run / ".owner.lock").touch()
    (run / ".owner.json").write_text("{")
    (run / ".config.toml.partial").write_text("name")
    if left == "nothing":
        (run / "checkpoints").rmdir()
    if left in ("half a recipe", "moving"):
        (run / "config.toml").write_text("[mod" if left == "half a recipe" else Path(recipe).read_text())
    if left in ("no manifest", "first checkpoint"):
        (run / "config.toml").write_text(Path(recipe).read_text())
    if left == "first checkpoint":
        (run / "checkpoints" / ".step-000002.partial" / "state").mkdir(parents=True)
    if left == "moving":
        (run / "earlier-start-001").mkdir()
        (run / "earlier-start-001" / "metrics.jsonl").write_text("")
    assert main(["train", recipe, "--out", str(run), *resume]) == 0
    assert (run / "result.json").exists() and (run / "manifest.json").exists()
