"""Mutated recipes: every one runs --dry-run or gives one clear error, never a traceback."""

import contextlib
import copy
import io
import tomllib
from pathlib import Path
from typing import Any

import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adagrpo.cli import main
from adagrpo.recipe.load import load_recipe, to_toml

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
    if code == 0:
        assert "evaluations per iteration" in out.getvalue() and err.getvalue() == ""
    else:
        assert code == 2
        assert err.getvalue().startswith("adagrpo: ") and len(err.getvalue().strip("\n").splitlines()) == 1, err.getvalue()
        assert len(err.getvalue()) < 2000, err.getvalue()
