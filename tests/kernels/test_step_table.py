"""Step tables against the samplers' published update rules, evaluated in plain Python floats."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from adagrpo_kernels import SCHEMES, StepTable, sigma_schedule, step_table

FIELDS = ("a", "b", "w", "logp_scale", "logp_const", "sigma", "sigma_next")
ETA = {"ode": 0.0, "flow": 0.7, "dance": 0.3, "flash": 0.9, "cps": 0.8}


def shifted_grid(steps: int, shift: float) -> list[float]:
    return [shift * (1 - k / steps) / (1 + (shift - 1) * (1 - k / steps)) for k in range(steps + 1)]


def published_row(scheme: str, grid: list[float], k: int, eta: float) -> dict[str, float]:
    """The row in the form in which each sampler was published: drift, diffusion and time step."""
    s, s_next = grid[k], grid[k + 1]
    dt = s_next - s
    if scheme == "ode":
        a, b, w = 1.0, dt, 0.0
    elif scheme == "cps":
        keep = s_next * math.cos(eta * math.pi / 2)
        a, b, w = (1 - s_next) + keep, keep * (1 - s) - (1 - s_next) * s, s_next * math.sin(eta * math.pi / 2)
    else:
        published = {"flow": eta * math.sqrt(s / (1 - (grid[1] if s == 1 else s))), "dance": eta, "flash": eta * s}
        diffusion = published[scheme]
        a = 1 + diffusion**2 / (2 * s) * dt
        b = (1 + diffusion**2 * (1 - s) / (2 * s)) * dt
        w = diffusion * math.sqrt(-dt)
    if w == 0:
        scale = const = 0.0
    elif scheme == "cps":
        scale, const = 1.0, 0.0
    else:
        scale, const = 1 / (2 * w * w), -math.log(w) - math.log(math.sqrt(2 * math.pi))
    return {"a": a, "b": b, "w": w, "logp_scale": scale, "logp_const": const, "sigma": s, "sigma_next": s_next}


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (4, 1.0), (6, 0.5), (16, 3.0), (28, 3.0)])
def test_schedule(steps: int, shift: float) -> None:
    sigmas = sigma_schedule(steps, shift)
    assert sigmas.dtype is torch.float64
    assert sigmas.tolist() == pytest.approx(shifted_grid(steps, shift), abs=1e-15)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0


def test_schedule_known_values() -> None:
    # Shift 3, four steps: u = 1, 3/4, 1/2, 1/4, 0.
    assert sigma_schedule(4, 3.0).tolist() == pytest.approx([1, 9 / 10, 3 / 4, 1 / 2, 0], abs=1e-15)


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (5, 1.0), (16, 3.0)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_equal_the_published_update_rules(scheme: str, steps: int, shift: float) -> None:
    grid = shifted_grid(steps, shift)
    table = step_table(scheme, sigma_schedule(steps, shift), ETA[scheme])
    assert len(table) == steps
    for k in range(steps):
        expected = published_row(scheme, grid, k, ETA[scheme])
        for name in FIELDS:
            value = getattr(table, name)
            assert value.dtype is torch.float64
            assert value.shape == (steps,)
            assert float(value[k]) == pytest.approx(expected[name], rel=1e-9, abs=1e-12), (name, k)


def test_official_check_values() -> None:
    table = step_table("flow", sigma_schedule(16, 3.0), 0.7)
    steps = [0, 2, 4, 6]
    assert table.w[steps].tolist() == pytest.approx([0.700, 0.517, 0.373, 0.310], abs=5e-4)
    pull = (table.b.abs() / table.w)[steps]
    assert pull.tolist() == pytest.approx([0.031, 0.063, 0.105, 0.158], abs=5e-4)
    # At s = 1 the step's variance is eta**2 whatever the grid: a = 1 - eta**2/2.
    assert float(table.a[0]) == pytest.approx(0.755, abs=1e-12)
    assert float(table.w[0]) == pytest.approx(0.7, abs=1e-12)


@pytest.mark.parametrize(
    ("scheme", "eta", "a", "b", "w", "scale", "const"),
    [
        # s = 3/4, s' = 1/2; by hand:
        ("ode", 0.9, 1.0, -0.25, 0.0, 0.0, 0.0),
        # g**2 = 0.64*3 = 1.92, g**2*|dt|/(2s) = 0.32, w**2 = 0.48
        ("flow", 0.8, 0.68, -0.25 - 0.32 / 4, math.sqrt(0.48), 1 / 0.96, -0.5 * math.log(0.48 * 2 * math.pi)),
        # g**2 = 0.36, g**2*|dt|/(2s) = 0.06, w**2 = 0.09
        ("dance", 0.6, 0.94, -0.25 - 0.06 / 4, 0.3, 1 / 0.18, -0.5 * math.log(0.09 * 2 * math.pi)),
        # g = 0.8*s = 0.6, and the rest as for dance
        ("flash", 0.8, 0.94, -0.25 - 0.06 / 4, 0.3, 1 / 0.18, -0.5 * math.log(0.09 * 2 * math.pi)),
        # cos(pi/3) = 1/2: c1 = 1/4, w = sqrt(3)/4
        ("cps", 2 / 3, 0.75, 0.25 / 4 - 0.5 * 0.75, math.sqrt(3) / 4, 1.0, 0.0),
    ],
)
def test_one_row_by_hand(scheme: str, eta: float, a: float, b: float, w: float, scale: float, const: float) -> None:
    table = step_table(scheme, torch.tensor([0.75, 0.5], dtype=torch.float64), eta)
    row = [float(getattr(table, name)[0]) for name in FIELDS[:5]]
    assert row == pytest.approx([a, b, w, scale, const], abs=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_row_mixes_clean_and_noise_prediction(scheme: str) -> None:
    """With x = (1-s)*x0 + s*x1 and v = x1 - x0 the mean is (1-s')*x0 + c1*x1, so the noise level falls to s'."""
    clean, noise, eta = 1.7, -0.6, ETA[scheme]
    grid = shifted_grid(8, 3.0)
    table = step_table(scheme, sigma_schedule(8, 3.0), eta)
    for k, (s, s_next) in enumerate(itertools.pairwise(grid)):
        step = s - s_next
        c1 = {
            "ode": s_next,
            "flow": s_next - eta**2 / (1 - (grid[1] if k == 0 else s)) * step / 2,
            "dance": s_next - eta**2 * step / (2 * s),
            "flash": s_next - eta**2 * step * s / 2,
            "cps": s_next * math.cos(eta * math.pi / 2),
        }[scheme]
        mean = float(table.a[k]) * ((1 - s) * clean + s * noise) + float(table.b[k]) * (noise - clean)
        assert mean == pytest.approx((1 - s_next) * clean + c1 * noise, abs=1e-12)
    if scheme == "cps":
        # Coefficient preserving: the noise left in the mean and the fresh noise together have the level s'.
        kept = table.a - 1 + table.sigma_next
        assert (kept.square() + table.w.square()).sqrt().tolist() == pytest.approx(grid[1:], abs=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_last_row_reaches_the_clean_prediction(scheme: str) -> None:
    """s' = 0: the SDE schemes keep noise; cps and ode end deterministically on x0, without a log-probability."""
    table = step_table(scheme, sigma_schedule(16, 3.0), ETA[scheme])
    last = {name: float(getattr(table, name)[-1]) for name in FIELDS}
    assert last["sigma_next"] == 0
    if scheme in ("ode", "cps"):
        assert (last["a"], last["w"], last["logp_scale"], last["logp_const"]) == (1, 0, 0, 0)
        assert last["b"] == pytest.approx(-last["sigma"], abs=1e-15)
    else:
        assert last["w"] > 0
        assert math.isfinite(last["logp_scale"])
        assert math.isfinite(last["logp_const"])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_noise_every_scheme_is_the_ode(scheme: str) -> None:
    table = step_table(scheme, sigma_schedule(7, 2.0), 0.0)
    grid = shifted_grid(7, 2.0)
    assert table.a.tolist() == pytest.approx([1.0] * 7, abs=1e-15)
    assert table.b.tolist() == pytest.approx([n - s for s, n in itertools.pairwise(grid)], abs=1e-15)
    for name in ("w", "logp_scale", "logp_const"):
        assert getattr(table, name).tolist() == [0.0] * 7


def test_ode_ignores_eta() -> None:
    table = step_table("ode", sigma_schedule(4, 3.0), 0.9)
    assert table.w.tolist() == [0.0] * 4
    assert table.a.tolist() == pytest.approx([1.0] * 4, abs=1e-15)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_float32_grid_and_float32_table(scheme: str) -> None:
    """A float32 grid is computed in float64, and a table moved to float32 keeps 1e-5."""
    grid = shifted_grid(16, 3.0)
    tables = [
        step_table(scheme, torch.tensor(grid, dtype=torch.float32), ETA[scheme]),
        step_table(scheme, sigma_schedule(16, 3.0), ETA[scheme]).to(dtype=torch.float32),
    ]
    assert tables[0].a.dtype is torch.float64
    assert tables[1].a.dtype is torch.float32
    for table in tables:
        for k in range(16):
            expected = published_row(scheme, grid, k, ETA[scheme])
            for name in FIELDS:
                value = float(getattr(table, name)[k])
                assert value == pytest.approx(expected[name], rel=1e-5, abs=1e-6), (name, k)


def test_concat_rows_and_to() -> None:
    flow = step_table("flow", sigma_schedule(16, 3.0), 0.7)
    ode = step_table("ode", sigma_schedule(4, 1.0))
    table = StepTable.concat([flow, ode])
    assert len(table) == 20
    picked = table.rows(torch.tensor([18, 2, 2, 0]))
    assert len(picked) == 4
    assert picked.sigma.tolist() == pytest.approx([0.5, 21 / 22, 21 / 22, 1.0], abs=1e-15)
    for name in FIELDS:
        first, second = getattr(flow, name), getattr(ode, name)
        expected = [float(second[2]), float(first[2]), float(first[2]), float(first[0])]
        assert getattr(picked, name).tolist() == expected
    moved = table.to("cpu", torch.float32)
    assert {getattr(moved, name).dtype for name in FIELDS} == {torch.float32}
    assert {getattr(table, name).dtype for name in FIELDS} == {torch.float64}


def test_tables_share_no_memory_with_the_grid() -> None:
    sigmas = sigma_schedule(3, 1.0)
    table = step_table("ode", sigmas)
    sigmas.fill_(0.5)
    assert table.sigma.tolist() == pytest.approx([1, 2 / 3, 1 / 3])
    assert table.sigma_next.tolist() == pytest.approx([2 / 3, 1 / 3, 0])


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (-3, 1.0), (4, 0.0), (4, -1.0), (4, math.nan)])
def test_schedule_errors(steps: int, shift: float) -> None:
    with pytest.raises(ValueError, match="sigma_schedule"):
        sigma_schedule(steps, shift)


@pytest.mark.parametrize(
    ("scheme", "sigmas", "eta", "message"),
    [
        ("euler", [1.0, 0.0], 0.0, "unknown scheme"),
        ("ode", [1.0], 0.0, "falling"),
        ("ode", [[1.0, 0.0]], 0.0, "falling"),
        ("ode", [0.0, 1.0], 0.0, "falling"),
        ("ode", [1.0, 0.5, 0.5, 0.0], 0.0, "falling"),
        ("ode", [1.0, math.nan, 0.0], 0.0, "falling"),
        ("ode", [1.1, 0.5], 0.0, "within"),
        ("ode", [0.5, -0.1], 0.0, "within"),
        ("flow", [1.0, 0.0], -0.1, "eta"),
        ("flow", [1.0, 0.0], math.nan, "eta"),
        ("cps", [1.0, 0.0], 1.1, "eta"),
    ],
)
def test_table_errors(scheme: str, sigmas: list, eta: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step_table(scheme, torch.tensor(sigmas), eta)
