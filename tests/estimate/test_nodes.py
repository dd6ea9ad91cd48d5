"""Several ranks on paper: collectives, dealt work and memory against numbers worked out by hand, and against real ranks."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from ranks_pool import Pool
from toy import CHANNELS, LENGTH, PROMPTS, ToyModel, half_bright, toy_config

from adagrpo.build import assemble, build_architecture
from adagrpo.cli import main
from adagrpo.engine.collectives import CollectiveLog
from adagrpo.engine.ranks import Ranks
from adagrpo.errors import InputError
from adagrpo.estimate.memory import MemoryPlan
from adagrpo.estimate.nodes import Collective, Fabric, Figure, host_table
from adagrpo.estimate.rehearsal import rehearse
from adagrpo.forecast import evaluated, planned_collectives, planned_evaluations, planned_memory
from adagrpo.recipe.keys import Config, RewardConfig
from adagrpo.recipe.load import load_recipe, recipe_names

WEIGHTS = CHANNELS * 16 + 16 * CHANNELS + 16


def with_slots(config: Config, slots: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, slots=slots))


def toy_plan(ranks: int, dtype: torch.dtype = torch.float32) -> MemoryPlan:
    model = ToyModel(dtype)
    return planned_memory(toy_config(), model, rehearse(model, "a"), [half_bright], 40, 4, ranks)


def sizes(plan: MemoryPlan) -> dict[str, int]:
    return {f"{entry.phase} {entry.name}".strip(): entry.bytes for entry in plan.entries}


def test_what_a_ring_sends() -> None:
    """Four ranks, a quarter of the result each: three steps gather it, three more sum it up before."""
    assert Collective("x", "all-gather", 400).sent(4) == 300
    assert Collective("x", "all-reduce", 400).sent(4) == 600
    assert Collective("x", "all-reduce", 400).sent(1) == 0


def test_seconds_are_steps_and_bytes_over_the_slowest_link() -> None:
    moved = Collective("x", "all-reduce", 8 * 10**9, calls=3)
    inside = Fabric(8, 1, inside=Figure(100, "est", "a test"))
    assert inside.seconds(moved) == pytest.approx(3 * (14 * 5e-6 + 14 / 100))
    between = Fabric(4, 2, Figure(100, "est", "a test"), Figure(10, "est", "a test"))
    assert between.ranks == 8 and between.seconds(moved) == pytest.approx(3 * (14 * 15e-6 + 14 / 10))
    one_each = Fabric(1, 8, Figure(1, "est", "a test"), Figure(10, "est", "a test"))  # no link inside a node is used
    assert one_each.seconds(moved) == pytest.approx(3 * (14 * 15e-6 + 14 / 10))
    assert Fabric().seconds(moved) == 0
    agreed = Collective("x", "all-reduce", 0, host=True)
    assert inside.seconds(agreed) == pytest.approx(14 * 50e-6) and between.seconds(agreed) == pytest.approx(14 * 50e-6)


def test_collectives_of_flux_on_eight_gpus() -> None:
    """8 slots of 10 candidates; groups of 12 at 4 forks; rank 64 at 8 layers of 19 blocks and 3 of 38, all 3072 x 3072."""
    config = with_slots(load_recipe("flux1-dev-lora"), 8)
    scores, rewards, gradients, *few = planned_collectives(config, build_architecture(config.model), 8)
    assert scores == Collective("scores", "all-gather", 8 * 10 * 8)
    assert rewards == Collective("rewards", "all-gather", 8 * 4 * 12 * 8)
    adapters = (19 * 8 + 38 * 3) * 64 * (3072 + 3072)
    assert gradients == Collective("gradients", "all-reduce", 4 * adapters) and gradients.bytes == 418_381_824
    assert [(c.what, c.bytes, c.calls) for c in few] == [("metrics", 8 * 8 * 8, 1), ("failures", 8, 1), ("agreements", 8, 3)]
    assert Fabric(8).seconds(gradients) == pytest.approx(14 * 5e-6 + 14 / 8 * 418_381_824 / 450e9)
    assert planned_evaluations(config, ranks=8) == {"probe": 160, "prefix": 4, "rollout": 576, "update": 4}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(2)
    yield made
    made.close()


def called(ranks: Ranks, config: Config) -> list[tuple[str, int, bool]]:
    """Operation, bytes of the result and whether it was an agreement of every collective of a second iteration."""
    rewards = [half_bright, half_bright][: len(config.rewards)]
    one, log = assemble(config, ToyModel(), rewards, PROMPTS, ranks=ranks), CollectiveLog()
    one.iteration()
    with log:
        one.iteration()
    result = lambda call: call.bytes * (ranks.size if call.op == "allgather_" else 1)  # noqa: E731
    return [(call.op, result(call), call.op == "allreduce_" and call.shape == ()) for call in log.calls]


FOUR = {"slots": 4}
RACING = {"candidates": 4, "probe": "racing", "race_steps": (2, 4)}
TAILS = {"seeds": 2, "granularities": (1, 2)}
CASES = {
    "fork": toy_config(train=FOUR),
    "racing": toy_config(train={**FOUR, "steps_per_iteration": 2}, selection=RACING),
    "finalists": toy_config(
        selection={"probe": "memory", "finalists": 2, "allow_unseen": True}, advantage={"equal_groups": "skip"}
    ),
    "short": toy_config(train=FOUR, selection={"probe": "short", "probe_steps": 2}, rollout=TAILS),
    "one candidate": toy_config(
        selection={"candidates": 1}, advantage={"weight": 0.0}, rollout={"plan": "trajectory"}, loss={"old_logp": "recompute"}
    ),
    "bots": toy_config(selection={"probe": "bots"}),
    "weights": toy_config(loss={"step_weights": "noise"}),
    "anchors": toy_config(selection={"probe": "greso"}, advantage={"weight": 0.0}),
    "rewards": dataclasses.replace(toy_config(), rewards=(RewardConfig("a"), RewardConfig("b"))),
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_two_ranks_call_the_planned_collectives(config: Config, pool: Pool) -> None:
    ops = {"all-reduce": "allreduce_", "all-gather": "allgather_"}
    planned = [(ops[c.op], c.bytes, c.host) for c in planned_collectives(config, ToyModel(), 2) for _ in range(c.calls)]
    for found in pool(called, config):
        assert sorted(found) == sorted(planned)


@pytest.mark.parametrize("name", recipe_names())
def test_ranks_do_together_what_one_process_does(name: str) -> None:
    config = load_recipe(name)
    config = with_slots(config, 4 * config.train.slots)
    whole = planned_evaluations(config)
    for ranks in (2, 4):
        assert {phase: ranks * n for phase, n in planned_evaluations(config, ranks=ranks).items()} == whole


def test_slots_that_cannot_be_dealt_are_refused_with_the_number_to_set() -> None:
    config = load_recipe("flux1-dev-lora")
    with pytest.raises(InputError, match=r"train\.slots = 1:.* 8 ranks.*--train\.slots 8,"):
        planned_evaluations(config, ranks=8)
    with pytest.raises(InputError, match=r"train\.slots = 10:.* 8 ranks.*--train\.slots 16,"):
        planned_evaluations(with_slots(config, 10), ranks=8)


def test_memory_of_a_rank() -> None:
    """The toy has 2 slots of 3 candidates, 2 forks and 4 members: one slot each, and the gradients laid end to end."""
    one, each = sizes(toy_plan(1, torch.bfloat16)), sizes(toy_plan(2, torch.bfloat16))
    latent = 4 * LENGTH * CHANNELS
    assert each["stored latents"] * 2 == one["stored latents"]
    assert sizes(toy_plan(2))["stored latents"] == latent * (3 * (1 + 2 * 2) + 2 * (1 + 1 + 4) + 8)
    assert each["optimizer gradients end to end"] == each["optimizer gradients"] == 4 * WEIGHTS
    assert not any("end to end" in name for name in one)
    for name in ("transformer", "fp32 master weights", "optimizer moments", "update gradients"):
        assert each[name] == one[name], name  # replicated


def test_evaluations_are_dealt_by_pictures() -> None:
    """9 pictures of 3 prompts over 4 ranks: 3 each, of as many prompts at most; 2 held-out prompts are 6 pictures."""
    config = toy_config(evaluation={"every": 1, "prompts": 3, "noises": 3, "final_prompts": 0}, output={"grid_every": 0})
    config = dataclasses.replace(config, output=dataclasses.replace(config.output, grid_prompts=1))
    assert evaluated(config) == (9, 3) and evaluated(config, 4) == (3, 3) and evaluated(config, 5) == (2, 2)
    assert evaluated(config, 4, known=2) == (2, 2)


def test_mapped_weights_do_not_multiply_and_offloaded_ones_do() -> None:
    page = host_table(read=10 * 2**30, offloaded=2**30, per_node=8)
    assert "10.00 GiB  mapped: once" in page and "8.00 GiB  8 x 1.00 GiB" in page
    assert "offloaded" not in host_table(2**30, 0, 8)


def test_plan_command_of_several_ranks(capsys) -> None:
    assert main(["plan", "tiny", "--train.slots", "4", "--ranks", "2", "--nodes", "2", "--network", "25"]) == 0
    out = capsys.readouterr().out
    assert "tiny: memory plan of each of 4 ranks, 2 on each of 2 nodes: 1 of the 4 slots of an iteration" in out
    assert "full fine-tuning is not sharded" in out
    each = sum(planned_evaluations(with_slots(load_recipe("tiny"), 4), ranks=4).values())
    assert f"on each rank, 4 x {each} = {4 * each} in all" in out
    assert "held-out evaluations: 13 of 50 pictures on each rank" in out
    assert "collectives of an iteration, 4 ranks, 2 on each of 2 nodes: predicted, not measured" in out
    assert "between nodes, GB/s a node sends: 25 [est: --network]" in out and "450 [pub: NVLink 4" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if "all-reduce  " in line or "all-gather  " in line}
    weights = sum(p.numel() for _, p in build_architecture(load_recipe("tiny").model).trainable())
    op, calls, megabytes, sent, seconds = rows["gradients"]
    assert (op, calls) == ("all-reduce", "1") and float(megabytes) == pytest.approx(4 * weights / 1e6, rel=1e-5)
    assert float(sent) == pytest.approx(1.5 * 4 * weights / 1e6, rel=1e-5)
    assert float(seconds) == pytest.approx(6 * 15e-6 + 1.5 * 4 * weights / 25e9, rel=1e-2)


@pytest.mark.parametrize(("words", "told"), [
    (["--ranks", "3"], "train.slots = 8: cannot be dealt to 3 ranks"), (["--ranks", "0"], "--ranks"),
    (["--nodes", "x"], "whole number"), (["--ranks", "2", "--network", "0"], "--network"),
])  # fmt: skip
def test_plan_command_refuses(words: list[str], told: str, capsys) -> None:
    code = 0
    try:
        code = main(["plan", "flux1-dev-lora", "--train.slots", "8", *words])
    except SystemExit as left:  # of argparse
        code = int(left.code or 0)
    assert code == 2 and told in capsys.readouterr().err
