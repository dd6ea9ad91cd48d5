"""The tables of ``docs/hosts.md``: what the recipe of every host says, and what its iterations cost.

They are written by ``adagrpo bench readme`` from the recipes themselves, and from a record of what is predicted of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..forecast import planned_evaluations
from ..recipe.derived import Derived
from ..recipe.keys import Config
from ..recipe.load import load_recipe, recipe_names
from ..text.user_text import read_text
from .records import LARGEST

PREDICTED = Path("meta") / "hosts.json"
"""The record of predictions, below the folder of results."""
STUDY = Path("cpu") / "host-study.json"
"""The record of the study of prompts that cannot be learnt (``tests/proof/host_study.py``)."""
MARK = re.compile(r"(<!-- (keys|cost|study): written by `adagrpo bench readme` -->\n).*?(<!-- end -->)", re.DOTALL)
H200_GIB = 141e9 / 2**30


def host_recipes() -> list[str]:
    """The recipes of other hosts that ship for published models: each has a twin with AdaGRPO."""
    names = recipe_names()
    return [name for name in names if f"{name}-ada" in names and not name.startswith("tiny")]


def hosts_page(page: str, results: Path) -> str:
    """``docs/hosts.md`` with its tables as they should be.

    Args:
        results: folder of the records, of which ``PREDICTED`` and ``STUDY`` may be two.
    """

    def read(path: Path) -> Any:
        return json.loads(read_text(path, str(path), LARGEST)) if path.is_file() else {"recipes": {}, "rows": [], "pairs": []}

    predicted, studied = read(results / PREDICTED)["recipes"], read(results / STUDY)
    study = f"{study_table(studied['rows'])}\n{pairs_table(studied['pairs'])}"
    tables = {"keys": keys_table(), "cost": cost_table(predicted), "study": study}
    return MARK.sub(lambda found: f"{found[1]}\n{tables[found[2]]}\n{found[3]}", page)


def keys_table() -> str:
    """One row for each recipe: its values, by section of its keys."""
    head = ["recipe", "`model`", "`rollout`", "prompts × group", "`advantage`", "`loss`", "`optimizer`, `train`", "`rewards`"]
    return _table(head, ([f"`{name}`", *_said(load_recipe(name))] for name in host_recipes()))


def cost_table(predicted: dict[str, Any]) -> str:
    """One row for each recipe: evaluations of an iteration, without AdaGRPO and with it, and what is predicted."""
    head = ["recipe", "evaluations", "with AdaGRPO", "more", "memory, GiB", "seconds", "seconds with AdaGRPO"]
    rows = []
    for name in host_recipes():
        plain, ada = (evaluations(load_recipe(name + end)) for end in ("", "-ada"))
        both = [predicted.get(name + end) for end in ("", "-ada")]
        peak = max((each["peak_gib"] for each in both if each), default=0.0)
        fits = "" if peak <= H200_GIB else ": does not fit"
        seconds = [f"{each['bf16_ceiling_s']:.0f} … {each['eager_bf16_s']:.0f}" if each else "not predicted" for each in both]
        memory = f"{peak:.0f}{fits}" if peak else "not predicted"
        rows.append([f"`{name}`", f"{plain:,.0f}", f"{ada:,.0f}", f"{ada / plain - 1:+.1%}", memory, *seconds])
    return _table(head, rows)


def study_table(rows: Iterable[dict[str, Any]]) -> str:
    """One row for each arm of the study: its gain, and its difference to its host's plain arm, with 95 % t intervals."""
    head = ["prompts", "host", "arm", "seeds", "end", "gain", "more than plain", "detectable", "evaluations"]
    lines = []
    for row in rows:
        against = [_interval(row, "difference"), f"{row['detectable']:.3f}"] if "difference" in row else ["", ""]
        names = [f"`{row['prompts']}`", row["host"], row["arm"], str(row["seeds"])]
        lines.append([*names, f"{row['after']:.3f}", _interval(row, "gain", "gain_"), *against, f"{row['evaluations']:,.0f}"])
    return _table(head, lines)


def pairs_table(rows: Iterable[dict[str, Any]]) -> str:
    """One row for each two arms of the study that are held against each other."""
    head = ["prompts", "host", "arm", "seeds", "more than", "difference", "detectable"]
    names = ("prompts", "host", "arm", "seeds", "reference")
    return _table(
        head, ([*(str(row[n]) for n in names), _interval(row, "difference"), f"{row['detectable']:.3f}"] for row in rows)
    )


def _interval(row: dict[str, Any], key: str, limits: str = "") -> str:
    return f"{row[key]:+.3f} ({row[f'{limits}low']:+.3f} … {row[f'{limits}high']:+.3f})"


def evaluations(config: Config) -> float:
    """Evaluations of an iteration; where tails are shorter the later a window lies, their mean over the run."""
    r = config.rollout
    if r.plan != "window" or r.window_order == "random" or not (r.tail_steps or r.tail_share):
        return sum(planned_evaluations(config).values())
    places = range(0, config.train.iterations, r.window_every)
    return sum(sum(planned_evaluations(config, i).values()) for i in places) / len(places)


def _said(config: Config) -> list[str]:
    d = Derived(config)
    return [
        _model(config),
        _rollout(config, d),
        f"{d.slots} × {config.rollout.group_size}",
        _advantage(config),
        _loss(config),
        _training(config),
        ", ".join(reward.name + (f" × {reward.weight:.3g}" if reward.weight != 1 else "") for reward in config.rewards),
    ]


def _model(config: Config) -> str:
    m = config.model
    fed = len([target for target in m.lora_targets if target.startswith("ff")])
    layers = f"{len(m.lora_targets)} layers{', feed-forward among them' if fed else ''}"
    found = [f"{m.width} px, guidance {m.guidance:g}, {m.max_text_tokens} tokens"]
    found.append("full" if m.tuning == "full" else f"LoRA {m.lora_rank}/{m.lora_alpha:g} on {layers}")
    return "; ".join(found + ([f"timestep {m.timestep}"] if m.timestep != "pipeline" else []))


def _rollout(config: Config, d: Derived) -> str:
    r = config.rollout
    shift = "the model's own" if r.shift == "model" else f"{r.shift:g}"
    found = [f"{r.plan}, {r.steps} steps, shift {shift}; {r.scheme} {r.eta:g}"]
    if r.plan == "window":
        first, end = d.window_range
        moves = "at random" if r.window_order == "random" else f"moves by {r.window_stride} every {r.window_every}"
        found.append(f"window of {r.window_size} in {first} – {end - 1}, {moves}")
    else:
        found.append(f"at {r.sde_steps[0]} – {r.sde_steps[-1]}")
    if r.trained_share < 1:
        found.append(f"{d.trained_steps} trained, drawn by each {r.trained_of}")
    said = {
        "one step per prompt": r.step_per_prompt, "one initial noise per group": r.shared_noise,
        f"{r.seeds} seeds": r.seeds > 1, f"tail share {r.tail_share:g}, {r.tail_solver}": r.tail_share,
        f"granularities {', '.join(map(str, r.granularities))}": r.granularities != (1,),
    }  # fmt: skip
    return "; ".join([*found, *(text for text, is_so in said.items() if is_so)])


def _advantage(config: Config) -> str:
    a = config.advantage
    found = [f"std {a.std}, ddof {a.ddof}, eps {a.eps:g}; clip {a.clip:g} of {a.clip_of}"]
    return "; ".join(found + ([f"equal groups: {a.equal_groups}"] if a.equal_groups != "keep" else []))


def _loss(config: Config) -> str:
    x = config.loss
    found = [f"clip {x.clip_range:g}"]
    if x.kl_weight:
        found.append(f"KL {x.kl_weight:g}, of {x.kl_space}s by {x.kl_variance}")
    said = {f"ratio {x.ratio}": x.ratio != "plain", f"step weights {x.step_weights}": x.step_weights != "uniform"}
    return "; ".join([*found, *(text for text, is_so in said.items() if is_so)])


def _training(config: Config) -> str:
    t, o = config.train, config.optimizer
    found = [f"lr {o.lr:g}, decay {o.weight_decay:g}, gradient {o.max_grad_norm:g}"]
    found.append(f"{t.steps_per_iteration} updates by {t.update_by}" if t.steps_per_iteration > 1 else "1 update")
    if o.ema_decay:
        found.append(f"average {o.ema_decay:g} every {o.ema_every}{', warmed up' if o.ema_warmup else ''}")
    return "; ".join([*found, f"{t.iterations} iterations"])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(line) + " |\n" for line in [head, ["---"] * len(head), *rows])
