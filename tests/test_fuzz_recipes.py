"""Mutated recipes: every one runs --dry-run or gives one clear error, never a traceback."""

import contextlib
import copy
import io
import tomllib
from typing import Any

import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adagrpo.cli import main
from adagrpo.recipe import load_recipe, to_toml

BASES = {name: tomllib.loads(to_toml(load_recipe(name))) for name in ("tiny", "tiny-grpo", "flux1-dev-official")}
VALUES = st.one_of(
    st.sampled_from(
        [0, 1, -1, 2, 3, 7, 16, 10**12, 10**15, True, False, "", "fork", "closest", "tiny", "a:b", "a.b:c", "../x", "\u0000"]
    ),
    st.sampled_from([0.0, -0.5, 0.5, 1.0, 1.5, 1e-30, 1e300, float("nan"), float("inf"), float("-inf")]),
    st.sampled_from([[], [0], [0, 2], [2, 0], [0, 0], ["x"], [[0]], {}, {"x": 1}, {"limit": -1}, [{"name": "tiny"}]]),
    st.text(max_size=6),
)


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
    file = tmp_path_factory.getbasetemp() / "fuzz.toml"
    file.write_text(tomli_w.dumps(recipe), "utf-8")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["train", str(file), "--dry-run"])
    if code == 0:
        assert "evaluations per iteration" in out.getvalue() and err.getvalue() == ""
    else:
        assert code == 2
        assert err.getvalue().startswith("adagrpo: ") and len(err.getvalue().strip("\n").splitlines()) == 1, err.getvalue()
