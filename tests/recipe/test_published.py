"""The recipes of other hosts hold what their authors published, evaluate as many images as that takes, and can be planned."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from adagrpo.assembly import build_table, sampled_sizes
from adagrpo.build import build_architecture
from adagrpo.forecast import planned_evaluations, planned_memory
from adagrpo.models.base import FlowModel
from adagrpo.recipe.derived import Derived
from adagrpo.recipe.dotted import lookup
from adagrpo.recipe.keys import ModelConfig
from adagrpo.recipe.load import load_recipe, recipe_names
from adagrpo.recipe.rules import check

CANDIDATES = 10


@dataclasses.dataclass(frozen=True)
class Published:
    """What the released scripts and configurations say.

    Attributes:
        prompts, group, steps: P, G and T. trained: steps of each sample. updates: optimizer steps of an iteration.
        keys: values of other keys.
        reference: whether a KL divergence to the initial model is in the loss.
        forks: fork steps, of plan fork. seeds: anchors of each prompt. tails: evaluations of a sample's tails, of all forks.
        most: evaluations of a trajectory whose tail is shortened, at most; 0 is ``steps``.
    """

    prompts: int
    group: int
    steps: int
    trained: int
    updates: int
    keys: dict[str, Any]
    reference: bool = False
    forks: int = 0
    seeds: int = 1
    tails: int = 0
    most: int = 0

    def evaluations(self, candidates: int) -> dict[str, int]:
        """Of an iteration by phase, from the numbers above alone."""
        judged = candidates * self.steps if self.forks else candidates * (self.steps // 2) + self.steps  # and one to the end
        probe = {"probe": self.prompts * judged} if self.forks or candidates > 1 else {}
        if self.forks:
            learnt = self.prompts * self.seeds * self.forks
            anchors = self.prompts * (self.seeds - 1) * self.steps
            rollout = {"prefix": learnt, "rollout": anchors + self.prompts * self.seeds * self.group * self.tails}
        else:
            learnt = self.prompts * self.group * self.trained
            rollout = {"rollout": self.prompts * self.group * (self.most or self.steps), "recompute": learnt}
        return probe | rollout | {"update": learnt} | ({"reference": learnt} if self.reference else {})


def keys(eta: float, clip: float, lr: float, **others: Any) -> dict[str, Any]:
    """Those that all have, and others by ``section__key``."""
    named = {"rollout.eta": eta, "loss.clip_range": clip, "optimizer.lr": lr, "advantage.clip": 5.0}
    return named | {"optimizer.weight_decay": 1e-4} | {name.replace("__", "."): value for name, value in others.items()}


SHIFT_3 = {"rollout__shift": 3.0, "model__height": 720, "model__width": 720, "advantage__ddof": 1, "advantage__eps": 1e-8}
MIX = {**SHIFT_3, **{f"rewards__{i}__weight": pytest.approx(1 / 3) for i in range(3)}, "advantage__clip_of": "sum"}
AVERAGED = {"optimizer__ema_decay": 0.9, "optimizer__ema_every": 8, "advantage__ddof": 0, "advantage__eps": 1e-4}
FLOW = {"rollout__shift": "model", "model__height": 512, "model__lora_rank": 64, "model__lora_alpha": 128.0, **AVERAGED}
SD35 = {**FLOW, "model__lora_rank": 32, "model__lora_alpha": 64.0, "model__guidance": 4.5}
BRANCHES = sum(range(1, 10))  # after forks at the first nine of ten steps
EVERY_STEP = sum(range(8, 16))  # after forks at the first eight of sixteen
EVERY_OTHER = 8 + 8 + 7 + 7 + 6 + 6 + 5 + 5  # the same tails by two places at once, from the second on, to the end

PUBLISHED = {
    "flux1-dev-flow-grpo": Published(48, 24, 6, 5, 2, keys(0.9, 1e-4, 3e-4, **FLOW, advantage__std="global")),
    "flux1-dev-flow-grpo-fast": Published(48, 24, 6, 3, 2, keys(0.8, 1e-5, 3e-4, **FLOW, advantage__std="group")),
    "flux1-dev-flow-cps": Published(48, 24, 6, 5, 2, keys(0.9, 1e-4, 3e-4, **FLOW, advantage__std="global")),
    "flux1-dev-grpo-guard": Published(48, 24, 6, 5, 2, keys(0.9, 4e-6, 1e-4, **FLOW, advantage__std="group")),
    "flux1-dev-dance-grpo": Published(16, 12, 16, 9, 3, keys(0.3, 1e-4, 1e-5, **SHIFT_3, train__iterations=300)),
    "flux1-dev-dance-grpo-lora": Published(
        16, 12, 12, 6, 2, keys(0.3, 1e-4, 3e-4, **SHIFT_3, train__iterations=301, model__lora_rank=128, model__lora_alpha=256.0)
    ),
    "flux1-dev-mix-grpo": Published(32, 12, 25, 4, 4, keys(0.7, 1e-4, 1e-5, **MIX, rollout__window_every=25)),
    "flux1-dev-mix-grpo-flash": Published(
        32, 12, 25, 4, 4, keys(0.7, 1e-4, 1e-5, **MIX, rollout__window_every=20, rollout__tail_share=0.4), most=19 + 4 + 1
    ),
    "flux1-dev-g2rpo": Published(
        16, 12, 16, 8, 8, keys(0.7, 1e-4, 2e-6, **SHIFT_3, train__iterations=301), forks=8, tails=EVERY_STEP + EVERY_OTHER
    ),
    "flux1-dev-tempflow": Published(
        48,
        6,
        10,
        9,
        2,
        keys(0.9, 1e-4, 3e-4, **{**FLOW, "model__height": 1024, "model__lora_rank": 32, "model__lora_alpha": 64.0})
        | {"loss.kl_weight": 0.004, "train.iterations": 250},
        reference=True,
        forks=9,
        seeds=4,
        tails=BRANCHES,
    ),
    "flux1-dev-flash-grpo": Published(
        48, 8, 20, 1, 2, keys(0.98242, 1e-3, 1e-4, **AVERAGED, rollout__shift=3.0, model__lora_rank=16, train__iterations=300)
    ),
    "sd35-medium-flow-grpo": Published(48, 24, 10, 9, 2, keys(0.7, 1e-4, 3e-4, **SD35, loss__kl_weight=0.01), True),
    "sd35-medium-flow-grpo-fast": Published(64, 18, 10, 3, 2, keys(0.8, 1e-5, 3e-4, **{**SD35, "model__guidance": 1.0})),
    "sd35-medium-flow-cps": Published(48, 24, 10, 9, 2, keys(0.7, 1e-4, 3e-4, **SD35, loss__kl_weight=0.01), True),
    "sd35-medium-grpo-guard": Published(48, 24, 10, 9, 2, keys(0.7, 4e-6, 1e-4, **SD35, advantage__std="group")),
    "sd35-medium-tempflow": Published(
        48, 6, 10, 9, 2, keys(0.7, 1e-4, 3e-4, **SD35, loss__kl_weight=0.001), True, 9, 4, BRANCHES
    ),
}
BOTH = [name + end for name in PUBLISHED for end in ("", "-ada")]


def test_every_host_is_here() -> None:
    """Each recipe that ships with a twin is that of a host, or of the built-in world."""
    twins = {name for name in recipe_names() if f"{name}-ada" in recipe_names() and not name.startswith("tiny")}
    assert twins == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str) -> None:
    config, published = load_recipe(name), PUBLISHED[name]
    d = Derived(config)
    found = (d.slots, config.rollout.group_size, config.rollout.steps, d.trained_steps, config.train.steps_per_iteration)
    assert found == (published.prompts, published.group, published.steps, published.trained, published.updates)
    assert (len(d.forks), config.rollout.seeds) == (published.forks, published.seeds)
    assert {key: lookup(config, key) for key in published.keys} == published.keys


TWINS = {
    "flow-grpo": "sd35-medium", "flow-grpo-fast": "sd35-medium", "grpo-guard": "sd35-medium", "flow-cps": "flux1-dev",
    "dance-grpo": "flux1-dev", "mix-grpo": "flux1-dev", "mix-grpo-flash": "flux1-dev", "g2rpo": "flux1-dev",
    "tempflow": "flux1-dev", "flash-grpo": "flux1-dev",
}  # fmt: skip
OF_ITS_SIZE = {
    "rollout": "eta steps shift sde_steps window_range tail_share group_size seeds storage", "loss": "clip_range kl_weight",
    "train": "iterations slots steps_per_iteration", "optimizer": "lr schedule final_share", "advantage": "",
}  # fmt: skip


@pytest.mark.parametrize("host", TWINS)
def test_a_host_on_the_built_in_world_is_that_on_its_model(host: str) -> None:
    """But for numbers of a smaller world."""
    tiny, large = load_recipe(f"tiny-{host}"), load_recipe(f"{TWINS[host]}-{host}")
    assert tiny.model.timestep == large.model.timestep
    for section, numbers in OF_ITS_SIZE.items():
        own, others = (dataclasses.asdict(getattr(config, section)) for config in (tiny, large))
        differ = {key for key in own if own[key] != others[key]}
        assert differ <= set(numbers.split()), section


@pytest.mark.parametrize("name", PUBLISHED)
def test_adagrpo_changes_nothing_else(name: str) -> None:
    plain, ada = load_recipe(name), load_recipe(f"{name}-ada")
    published = PUBLISHED[name]
    probe = {} if published.forks else {"probe": "short", "probe_steps": published.steps // 2}
    selection = dataclasses.replace(plain.selection, candidates=CANDIDATES, **probe)
    added = {"name": f"{name}-ada", "selection": selection, "advantage": dataclasses.replace(plain.advantage, weight=1.0)}
    assert ada == dataclasses.replace(plain, **added)
    assert (plain.selection.candidates, plain.advantage.weight) == (1, 0.0)


@pytest.mark.parametrize("name", BOTH)
def test_evaluations(name: str) -> None:
    config = load_recipe(name)
    check(config)
    published = PUBLISHED[name.removesuffix("-ada")]
    assert planned_evaluations(config) == published.evaluations(config.selection.candidates)


@pytest.mark.parametrize("start", range(15))
def test_tails_of_mix_grpo_flash(start: int) -> None:
    """In 300 iterations its window begins at one of these; then come as many levels as 0.4 of the rest, the image's too."""
    config = load_recipe("flux1-dev-mix-grpo-flash")
    assert config.train.iterations == 300
    tail = int((25 - (start + 3)) * 0.4) - 1
    for iteration in (20 * start, 20 * start + 19):
        assert planned_evaluations(config, iteration)["rollout"] == 32 * 12 * (start + 4 + tail)


MODELS: dict[str, FlowModel] = {}


def architecture(config: ModelConfig) -> FlowModel:
    """The model without weights, made once for all recipes that agree on it."""
    if repr(config) not in MODELS:
        MODELS[repr(config)] = build_architecture(config)
    return MODELS[repr(config)]


@pytest.mark.parametrize("name", BOTH)
def test_memory_can_be_planned(name: str) -> None:
    """As `adagrpo plan` does, but for activations, which take a minute of rehearsal."""
    config = load_recipe(name)
    model = architecture(config.model)
    for size in sampled_sizes(config):
        build_table(config, model, size)
    plan = planned_memory(config, model, "not rehearsed here")
    weights = 18 if config.model.tuning == "full" else 2.2  # bytes of each: model, master, moments, gradient; adapters are few
    assert plan.peak > weights * sum(p.numel() for p in model.transformer.parameters()) * 0.9
