"""Derived numbers, against values worked out by hand."""

import pytest
import torch
from toy import toy_config

from adagrpo.recipe.derived import DTYPES, Derived
from adagrpo.recipe.keys import EngineConfig
from adagrpo.recipe.load import load_recipe


def derived(**sections: dict) -> Derived:
    """2 slots, 3 candidates each, groups of 4 at the steps 0 and 2 of 6."""
    return Derived(toy_config(**sections))


def test_an_iteration_of_forks() -> None:
    found = derived()
    assert (found.slots, found.candidates, found.forks) == (2, 6, (0, 2))
    assert (found.stochastic_steps, found.trained_steps) == (2, 2)
    assert (found.groups, found.samples_per_slot, found.transitions) == (4, 8, 4)  # a group at each fork step of each slot


def test_slots_are_trained_in_micro_batches() -> None:
    found = derived(train={"slots": 2, "accumulation": 3})
    assert (found.slots, found.candidates, found.groups) == (6, 18, 12)


def test_an_iteration_of_trajectories() -> None:
    found = derived(rollout={"plan": "trajectory"})
    assert found.forks == () and (found.groups, found.samples_per_slot) == (2, 4)
    assert found.transitions == 2 * 4 * 2  # slots, members, trained steps


@pytest.mark.parametrize(("size", "share", "trained"), [(5, 1.0, 5), (5, 0.6, 3), (3, 0.1, 1), (4, 0.5, 2)])
def test_a_window_and_a_share_of_it(size: int, share: float, trained: int) -> None:
    found = derived(rollout={"plan": "window", "window_size": size, "trained_share": share})
    assert (found.stochastic_steps, found.trained_steps) == (size, trained)
    assert found.transitions == 2 * 4 * trained and found.groups == 2


def test_a_share_of_the_forks() -> None:
    found = derived(rollout={"steps": 16, "sde_steps": (0, 2, 4, 6, 8), "trained_share": 0.6})
    assert (found.trained_steps, found.groups, found.transitions) == (3, 6, 6)
    assert found.samples_per_slot == 20  # whatever the share: the rollout's bound


@pytest.mark.parametrize(
    ("candidates", "strategy", "weight", "needed"),
    [(3, "closest", 0.0, True), (3, "random", 0.0, False), (1, "closest", 0.0, False), (1, "closest", 0.5, True),
     (3, "random", 1.0, True)],
)  # fmt: skip
def test_scores_are_needed_by_selection_or_by_the_advantage(
    candidates: int, strategy: str, weight: float, needed: bool
) -> None:
    selection = {"candidates": candidates, "strategy": strategy}
    assert derived(selection=selection, advantage={"weight": weight}).scores_needed is needed


def test_what_scores_are_folded_by_where_the_user_picks() -> None:
    named = [derived(selection={"strategy": name}).built_in_strategy for name in ("hardest", "random", "mine:select")]
    assert named == ["hardest", "random", "closest"]


def test_lengths_of_a_run() -> None:
    found = derived(
        train={"iterations": 30, "slots": 2, "steps_per_iteration": 2}, selection={"probe": "memory", "finalists": 2}
    )
    assert found.optimizer_steps == 60
    assert found.observed == 30 * 2 * 3  # per slot two finalists and the uniform candidate


@pytest.mark.parametrize(
    ("output", "kept"),
    [({}, 2), ({"keep_last": 1}, 1), ({"keep_best": True}, 3), ({"keep_every": 10}, 5), ({"keep_every": 40}, 2)],
)
def test_checkpoints_kept(output: dict, kept: int) -> None:
    assert derived(train={"iterations": 30}, output=output).checkpoints_kept == kept


def test_types() -> None:
    found = derived()
    assert (found.storage, found.wide, found.precision, found.kernels) == (torch.float32, torch.float32, None, None)
    assert (
        derived(rollout={"storage": "bf16"}).wide is torch.float32
        and derived(rollout={"storage": "fp64"}).wide is torch.float64
    )
    engine = EngineConfig(precision="bf16", kernels="reference")
    found = derived(engine=engine)
    assert found.precision is torch.bfloat16 and found.kernels == "reference"
    assert derived(engine=EngineConfig(precision="fp8")).precision == "fp8"
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


def test_tables() -> None:
    """T deterministic and T stochastic rows, then those of shortened tails, or of a short probe's own grid."""
    table = derived().table
    assert (table.num_steps, len(table.steps), table.tails, table.probe) == (6, 12, {}, ())
    assert table.sigmas.dtype is torch.float64
    tails = derived(rollout={"tail_steps": 2}).table.tails
    assert tails == {0: ((12, 13),), 2: ((14, 15),)}
    assert derived(selection={"probe": "short", "probe_steps": 3}).table.probe == (12, 13, 14)
    flux = Derived(load_recipe("flux1-dev")).table
    assert flux.num_steps == 16 and float(flux.sigmas[1]) == pytest.approx(3 * 0.9375 / (1 + 2 * 0.9375))
