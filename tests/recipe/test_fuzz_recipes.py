"""Mutated recipes: every one runs --dry-run or gives one clear error, never a traceback."""

import contextlib
import copy
import io
import re
import tomllib
from pathlib import Path
from typing import Any

import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adagrpo.cli import main
from adagrpo.recipe.load import load_recipe, recipe_names, to_toml

BASES = {name: tomllib.loads(to_toml(load_recipe(name))) for name in ("tiny", "tiny-grpo", "flux1-dev-official")}
VALUES = st.one_of(
    st.sampled_from(
        [
            0,
            1,
            -1,
            2,
            3,
            7,
            16,
            10**12,
            10**15,
            2**63,
            -(2**64),
            10**400,
            True,
            False,
            "",
            "fork",
            "closest",
            "tiny",
            "a:b",
            "a.b:c",
            "../x",
            "\u0000",
            "\x1b[2J",
            "\u2028",
            "\ufeff",
            "x" * 5000,
            "/dev/zero",
            "/",
            ".",
        ]
    ),
    st.sampled_from([0.0, -0.5, 0.5, 1.0, 1.5, 1e-30, 1e300, float("nan"), float("inf"), float("-inf")]),
    st.sampled_from([[], [0], [0, 2], [2, 0], [0, 0], ["x"], [[0]], {}, {"x": 1}, {"limit": -1}, [{"name": "tiny"}]]),
    st.text(max_size=6),
)
TURNS = [
    "model.family = 'parts:model'", "selection.candidates = 1", "selection.probe = 'memory'", "evaluation.every = 0",
    "rollout = {plan = 'window', window_size = 2}\nloss.old_logp = 'recompute'", "model.tuning = 'full'",
    "selection.strategy = 'random'",
    "data = {prompts = 'tiny:even', held_out = 'tiny:held_out'}", "rollout.fork_velocity = 'fresh'", "model.path = 'tiny-flux'",
    "optimizer.schedule = 'constant'", "train.steps_per_iteration = 1", "selection.probe = 'full'",
]  # fmt: skip
BASE_NAMES = [
    *["below.toml"] * 6, *["tiny", "flux1-dev-fast"] * 2, "fuzz.toml", "nowhere", "", ".", "/dev/zero", "x\0", "\u2028",
    "x" * 5000, 3, {}, [],
]  # fmt: skip
FULL = tomllib.loads("""
name = "full"
output.keep_best = true
optimizer = {schedule = "linear", final_share = 0.5}
train.steps_per_iteration = 2
loss = {average = "iteration", old_logp = "recompute", kl_weight = 0.1, kl_variance = "diffusion"}
model = {tuning = "lora", lora_rank = 4, guidance = 2.0}
rollout.tail_steps = 3
selection = {probe = "memory", finalists = 2, half_life = 9.0}
data = {prompts = "parts:prompts", held_out = "parts:held_out"}
""")
MARKS = [
    b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\xff", b"[" * 5000, b"9" * 5000, b"{a=" * 2000, b'"', b"\\ud800", b"\r", b"\x1a",
    b"\n[[rewards]]\n", b"1e400", b"nan", b"0x" + b"f" * 4000,
]  # fmt: skip


@st.composite
def mutated(draw) -> dict[str, Any]:
    recipe = copy.deepcopy(BASES[draw(st.sampled_from(sorted(BASES)))])
    for _ in range(draw(st.integers(1, 3))):
        table, key = recipe, draw(st.sampled_from(sorted(recipe)))
        while isinstance(table[key], dict) and table[key] and draw(st.integers(0, 9)):
            table = table[key]
            key = draw(st.sampled_from(sorted(table)))
        kind = draw(st.sampled_from(["set", "set", "set", "delete", "rename", "add"]))
        if kind == "set":
            table[key] = copy.deepcopy(draw(VALUES))
        elif kind == "add":
            table[draw(st.text(min_size=1, max_size=5))] = copy.deepcopy(draw(VALUES))
        else:
            value = table.pop(key)
            if kind == "rename":
                table[key + "x"] = value
        if not recipe:
            break
    return recipe


@settings(max_examples=500, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(recipe=mutated())
def test_dry_run_or_one_clear_error(recipe: dict[str, Any], tmp_path_factory) -> None:
    judge(tomli_w.dumps(recipe).encode(), tmp_path_factory.getbasetemp())


@settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    turns=st.lists(st.sampled_from(TURNS), max_size=3),
    own=st.one_of(st.just({}), st.just({}), mutated()),
    kept=st.sets(st.sampled_from(sorted(BASES["tiny"]))),
    base=st.sampled_from(BASE_NAMES),
    below=st.one_of(st.sampled_from([*BASES.values(), FULL]), mutated()),
    lowest=st.sampled_from([None, None, None, *recipe_names(), "./fuzz.toml", 3]),
)
def test_bases_work_or_one_clear_error(
    turns: list[str], own: dict[str, Any], kept: set[str], base: Any, below: dict[str, Any], lowest: Any, tmp_path_factory
) -> None:
    """A few keys, or some sections of a mutated recipe, over another one that may have a base itself."""
    folder = tmp_path_factory.getbasetemp()
    (folder / "below.toml").write_bytes(tomli_w.dumps(({} if lowest is None else {"base": lowest}) | below).encode())
    recipe = {"base": base} | {key: own[key] for key in kept & own.keys()}
    for turn in turns:
        for section, keys in tomllib.loads(turn).items():
            recipe[section] = (recipe[section] if isinstance(recipe.get(section), dict) else {}) | keys
    judge(tomli_w.dumps(recipe).encode(), folder)


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    name=st.sampled_from(sorted(BASES)),
    cuts=st.lists(st.tuples(st.floats(0, 1), st.sampled_from(MARKS), st.integers(0, 9)), max_size=3),
)
def test_bytes_are_read_or_refused_in_one_line(name: str, cuts: list[tuple[float, bytes, int]], tmp_path_factory) -> None:
    """Bytes put anywhere into a recipe, in place of up to nine of its own."""
    content = to_toml(load_recipe(name)).encode()
    for where, mark, lost in cuts:
        at = int(where * len(content))
        content = content[:at] + mark + content[at + lost :]
    judge(content, tmp_path_factory.getbasetemp())


def judge(content: bytes, folder: Path) -> None:
    """Dry run a recipe: it works, or says why not in one line of bearable length."""
    file = folder / "fuzz.toml"
    file.write_bytes(content)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["train", str(file), "--dry-run"])
    notice, error = re.fullmatch(r"(note: inherited keys [^\n]*\n)?(.*)", err.getvalue(), re.DOTALL).groups()
    assert notice is None or (b"base = " in content and len(notice) < 2000)
    if code == 0:
        assert "evaluations per iteration" in out.getvalue() and error == ""
    else:
        assert code == 2
        assert error.startswith("adagrpo: ") and len(error.strip("\n").splitlines()) == 1, error
        assert len(error) < 2000, error
