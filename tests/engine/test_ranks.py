"""Training on several ranks is training on one: the same picks, rewards, levels, gradients and weights, whatever the recipe."""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import other_rounding
import pytest
import torch
import torch.distributed as dist
from ranks_pool import Pool
from torch import Tensor
from toy import PROMPTS, ToyModel, toy_config

from adagrpo.build import assemble
from adagrpo.engine.collectives import Call, CollectiveLog
from adagrpo.engine.ranks import Ranks, RanksApart
from adagrpo.engine.retry import attempts
from adagrpo.errors import InputError, RunError
from adagrpo.recipe.keys import Config, EngineConfig, RewardConfig
from adagrpo.train import Trainer

TWO = tuple(RewardConfig(name=name, weight=weight) for name, weight in (("tiny", 1.0), ("brightness", 0.5)))


def brightness(images: Tensor, prompts) -> Tensor:
    """Of the left half less that of the right, in the images' precision."""
    return images[..., :2].mean((1, 2, 3)) - images[..., 2:].mean((1, 2, 3))


def contrast(images: Tensor, prompts) -> Tensor:
    return images.flatten(1).std(1)


def stepped(images: Tensor, prompts) -> Tensor:
    """Few values, so that some groups have one only: which, no rounding decides."""
    return torch.tensor([float(sum(map(ord, prompt)) % 3 == 0) for prompt in prompts]) * brightness(images, prompts)


def trainer(config: Config, ranks: Ranks | None = None) -> Trainer:
    dtype = torch.float64 if config.model.dtype == "fp64" else torch.float32
    first = stepped if config.advantage.equal_groups != "keep" else brightness
    return assemble(config, ToyModel(dtype), [first, contrast][: len(config.rewards)], PROMPTS, ranks=ranks)


def trained(ranks: Ranks | None, config: Config, iterations: int) -> dict[str, Any]:
    """What a trainer draws and becomes, as plain values, and its state."""
    one, found = trainer(config, ranks), {"picks": [], "rewards": [], "metrics": []}
    one.model.keep_reference()
    update = one.update

    def kept(groups, advantage):
        found["picks"].append(groups.picks)
        found["rewards"].append(groups.rewards)
        return update(groups, advantage)

    one.update = kept  # type: ignore[method-assign]
    for _ in range(iterations):
        metrics = one.iteration()
        found["metrics"].append({name: float(v) for name, v in metrics.items() if isinstance(v, Tensor | float)})
    found["texts"] = list(metrics["selection/picked"])
    found["weights"] = [p.detach().clone() for _, p in one.model.trainable()]
    found["state"] = one.state_dict()
    return found


def case(**sections) -> Config:
    plan = sections.get("rollout", {}).get("plan", "fork")
    sections = {"loss": {}, "train": {}, **sections}
    sections["loss"] = {"old_logp": "rollout" if plan == "fork" else "recompute", **sections["loss"]}
    return toy_config(**{**sections, "train": {"slots": 4, **sections["train"]}})


MEMORY = {"probe": "memory", "allow_unseen": True}
CASES = {
    "fork": case(),
    "trajectory": case(rollout={"plan": "trajectory", "shared_noise": True}),
    "window": case(rollout={"plan": "window", "window_size": 2, "window_every": 1}),
    "steps of samples": case(
        rollout={"plan": "trajectory", "sde_steps": (0, 1, 2, 3), "trained_share": 0.5, "trained_of": "sample"}
    ),
    "guard": case(rollout={"plan": "trajectory"}, loss={"ratio": "guard", "clip_range": 1e-3}),
    "own steps": case(rollout={"plan": "trajectory", "step_per_prompt": True}, loss={"step_weights": "equal_gradient"}),
    "seeds and tails": case(rollout={"seeds": 2, "granularities": (1, 2)}),
    "released": case(rollout={"fork_velocity": "probe"}, loss={"old_logp": "detached"}, train={"steps_per_iteration": 2}),
    "short": case(selection={"probe": "short", "probe_steps": 2}),
    "racing": case(selection={"probe": "racing", "race_steps": (2, 4)}),
    "memory": case(selection=MEMORY),
    "finalists": case(selection={"probe": "memory", "finalists": 2}),
    "pool": case(selection={"probe": "pool"}),
    "pool of velocities": case(selection={"probe": "pool"}, rollout={"fork_velocity": "probe"}, loss={"old_logp": "detached"}),
    "short+pool": case(selection={"probe": "short+pool", "probe_steps": 2}),
    "racing+pool": case(selection={"probe": "racing+pool", "race_steps": (2, 4)}),
    "memory+pool": case(selection={**MEMORY, "probe": "memory+pool", "finalists": 2, "allow_unseen": False}),
    "bots": case(selection={"probe": "bots"}),
    "greso": case(selection={"probe": "greso"}, advantage={"weight": 0.0}),
    "procurl": case(selection={"probe": "procurl"}, advantage={"weight": 0.0}, rollout={"plan": "trajectory"}),
    "dps": case(selection={"probe": "dps"}, rollout={"plan": "trajectory"}),
    "own levels": case(selection={"capability": "per_slot"}),
    "random": case(selection={"strategy": "random"}, train={"shuffle_advantages": True}),
    "one candidate": case(selection={"candidates": 1}, advantage={"weight": 0.0}),
    "refill": case(advantage={"equal_groups": "refill"}),
    "skip": case(advantage={"equal_groups": "skip"}),
    "by slots": case(train={"slots": 4, "accumulation": 2, "update_by": "slots", "steps_per_iteration": 2}),
    "by samples": case(rollout={"plan": "trajectory"}, train={"update_by": "samples", "steps_per_iteration": 2}),
    "one average": case(train={"steps_per_iteration": 2, "accumulation": 2}, loss={"average": "iteration"}),
    "kl, average, chunks": dataclasses.replace(
        case(loss={"kl_weight": 0.1}, optimizer={"lr": 1e-2, "eps": 1e-3, "ema_decay": 0.5}), engine=EngineConfig(max_rows=4)
    ),
    "graphs": dataclasses.replace(case(), engine=EngineConfig(cuda_graphs=True)),
    "rewards": dataclasses.replace(case(advantage={"std": "floored"}), rewards=TWO),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(2)
    yield made
    made.close()


def agree(one: dict[str, Any], other: dict[str, Any], relative: float) -> None:
    close = {"rtol": relative, "atol": relative, "equal_nan": True}
    for key in ("picks", "rewards", "weights"):
        for a, b in zip(one[key], other[key], strict=True):
            torch.testing.assert_close(a, b, **close)
    for a, b in zip(one["metrics"], other["metrics"], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name != "policy/ratio_deviation":  # a difference of roundings
                torch.testing.assert_close(a[name], b[name], msg=lambda m, name=name: f"{name}: {m}", **close)
    assert one["texts"] == other["texts"]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process(name: str, pool: Pool) -> None:
    alone, together = trained(None, CASES[name], 3), pool(trained, CASES[name], 3)
    assert max(metrics["policy/grad_norm"] for metrics in alone["metrics"]) > 0
    assert name != "refill" or alone["state"]["draws"] > 3
    for rank in together:
        agree(alone, rank, 2e-4)
        assert same(rank["state"], together[0]["state"]) and same(rank["weights"], together[0]["weights"])


@pytest.mark.skipif(other_rounding.VARIABLE in os.environ, reason="calls of other sizes differ by 1e-6 there")
@pytest.mark.parametrize("name", ["fork", "trajectory", "memory+pool", "rewards"])
def test_in_fp64_the_difference_is_one_of_roundings(name: str, pool: Pool) -> None:
    config = CASES[name]
    changed = {"model": {"dtype": "fp64"}, "rollout": {"storage": "fp64"}}
    config = dataclasses.replace(config, **{k: dataclasses.replace(getattr(config, k), **v) for k, v in changed.items()})
    alone, (first, _) = trained(None, config, 10), pool(trained, config, 10)
    assert all(torch.equal(a, b) for a, b in zip(alone["picks"], first["picks"], strict=True))
    agree(alone, first, 1e-12)


def logged(ranks: Ranks, config: Config) -> tuple[list[Call], int, int]:
    """The collectives of the second iteration, and how many of all lie inside the executor's ``run`` or a velocity."""
    one, log, inside = trainer(config, ranks), CollectiveLog(), []
    run = one.executor.run

    def watched(*args, **kwargs):
        before = len(log.calls)
        try:
            return run(*args, **kwargs)
        finally:
            inside.append(len(log.calls) - before)

    one.executor.run = watched  # type: ignore[method-assign]
    with log:
        one.iteration()
        begun = len(log.calls)
        one.iteration()
    return log.calls[begun:], sum(inside), len(inside)


def test_an_iteration_calls_these_collectives_and_none_while_it_samples(pool: Pool) -> None:
    one, other = pool(logged, CASES["fork"])
    assert one == other and one[1] == 0 and one[2] == 4  # a probe and a rollout in each iteration
    weights = sum(p.numel() for _, p in ToyModel().trainable())
    assert [(call.op, call.shape, call.dtype, call.place.partition(":")[0]) for call in one[0]] == [
        ("allreduce_", (), "int64", "curriculum/full.py"),
        ("allgather_", (1, 2, 3), "float64", "curriculum/full.py"),  # [M, slots, B]
        ("allreduce_", (), "int64", "train.py"),
        ("allgather_", (1, 4, 4), "float64", "train.py"),  # [M, groups, G]
        ("allreduce_", (), "int64", "engine/retry.py"),
        ("allreduce_", (weights,), "float32", "engine/optimizer.py"),
        ("allgather_", (1, 8), "float64", "engine/update.py"),
        ("allreduce_", (1,), "int64", "engine/scoring.py"),
    ]
    assert sum(call.bytes for call in one[0]) == 4 * weights + 8 * (6 + 16 + 8 + 4)


def left_alone(ranks: Ranks) -> str:
    """What a rank is told that waits for another one in vain."""
    side = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=1))
    if ranks.rank:
        time.sleep(2)
        return ""
    alone = dataclasses.replace(ranks, side=side, timeout=1.0)
    try:
        for attempt in attempts(trainer(CASES["fork"]).executor, print, alone):
            with attempt:
                pass
    except RunError as error:
        return str(error)
    return "nothing"


def test_a_rank_that_waits_in_vain_says_where(pool: Pool) -> None:
    told = r"rank 0 of 2: the others did not come to the end of sampling \(engine/retry\.py:\d+, train\.ranks_timeout = 1 s\): "
    assert re.match(told, pool(left_alone)[0])


def missed(ranks: Ranks) -> str:
    """What the first rank is told of one that does not come to where all meet, in less than the group's own time."""
    side, began = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=60)), time.monotonic()
    if ranks.rank:
        time.sleep(1.5)
        return ""
    try:
        dataclasses.replace(ranks, side=side, timeout=0.5).meet("the end of an iteration")
    except RanksApart as error:
        return str(error) if time.monotonic() - began < 30 else "late"
    return "nothing"


def test_where_all_meet_the_one_that_is_missing_is_named_in_the_set_time(pool: Pool) -> None:
    told = pool(missed)[0]
    assert "the others did not come to the end of an iteration (" in told and "Ranks 1 failed to pass monitoredBarrier" in told


def sharded(ranks: Ranks) -> list[Call]:
    """The collectives of FSDP in a forward and a backward pass."""
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Tanh())
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (ranks.size,)))
    with CollectiveLog() as log:
        model(torch.ones(2, 4)).sum().backward()
    return log.calls


def test_the_log_has_the_collectives_of_libraries_too(pool: Pool) -> None:
    one, other = pool(sharded)
    assert one == other
    ops = [(call.op.strip("_"), call.bytes) for call in one]
    assert ("allgather_base", 32) in ops and ("reduce_scatter_base", 64) in ops  # half of 16 weights in, all gradients out


def same(one: Any, other: Any) -> bool:
    """In every bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_a_ratio_of_the_micro_batch_is_refused() -> None:
    with pytest.raises(InputError, match=r"loss\.ratio = guard_batch: .* use guard"):
        trainer(case(rollout={"plan": "trajectory"}, loss={"ratio": "guard_batch"}), Ranks(1, 2))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"slots": 1}, "train.slots = 1: cannot be dealt to 2 ranks, .*; .*--train.slots 2,"),
        ({"slots": 3, "accumulation": 2}, "train.slots = 3: .*--train.slots 4,"),
        ({"slots": 2, "update_by": "slots", "steps_per_iteration": 2}, "in each of the 2 optimizer steps; .*--train.slots 4,"),
    ],
)
def test_slots_that_cannot_be_dealt_are_refused_with_the_call_that_works(train: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trainer(case(train=train), Ranks(1, 2))
