"""A fixed list of faults, planted in reference and kernel alike, all caught by a compact suite of independent checks."""

from __future__ import annotations

import importlib.util
import math
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

PACKAGE = Path(__file__).resolve().parents[2] / "kernels" / "adagrpo_kernels"
SEED, ITERATION, STREAM = (77 << 32) + 5, 9, 3

# name: {implementation: (file, source, fault)}; one file under both keys is shared by the two.
MUTANTS: dict[str, dict[str, tuple[str, str, str]]] = {
    "a and b swapped": {
        "reference": (
            "sde_step.py", "per_row(rows.a, x) * x.to(dtype) + per_row(rows.b, x)",
            "per_row(rows.b, x) * x.to(dtype) + per_row(rows.a, x)",
        ),
        "triton": (
            "_triton/sde_step.py", "column(a_ptr, k, inside) * x + column(b_ptr", "column(b_ptr, k, inside) * x + column(a_ptr",
        ),
    },
    "a and b swapped in the replay": {
        "reference": ("group_log_prob.py", "affine_mean(x, v, table, index)", "affine_mean(v, x, table, index)"),
        "triton": ("_triton/group_log_prob.py", "+ tl.load(b_ptr + k).to(tl.float32) * v", "+ tl.load(a_ptr + k) * v"),
    },
    "sign of dt": dict.fromkeys(("reference", "triton"), ("step_table.py", "s_next - g**2 * dt", "s_next + g**2 * dt")),
    "ddof": {
        "reference": ("fused_advantage.py", "(count - ddof).clamp_min(1)", "count.clamp_min(1)"),
        "triton": ("_triton/fused_advantage.py", "tl.maximum(count - DDOF, 1.0)", "tl.maximum(count, 1.0)"),
    },
    "eps outside": {
        "reference": ("fused_advantage.py", "deviation / (std + floor + scale.eps)", "deviation / (std + floor) + scale.eps"),
        "triton": (
            "_triton/fused_advantage.py", "/ (spread(rewards, valid, mean, count, DDOF) + eps)",
            "/ spread(rewards, valid, mean, count, DDOF) + eps",
        ),
    },
    "mask inverted": {
        "reference": ("fused_advantage.py", "is None else valid & mask).expand_as", "is None else valid & ~mask).expand_as"),
        "triton": ("_triton/fused_advantage.py", "mask=inside, other=0) != 0)", "mask=inside, other=0) == 0)"),
    },
    "rounding after the log-prob": {
        "reference": ("sde_step.py", "square = (rounded - mean)", "square = (sample - mean)"),
        "triton": ("_triton/sde_step.py", "(rounded - mean) * (rounded - mean)", "(sample - mean) * (sample - mean)"),
    },
    "table row + 1": {
        "reference": ("sde_step.py", "index = index.clamp_min(0)", "index = index.clamp_min(0) + 1"),
        "triton": ("_triton/sde_step.py", "k = tl.maximum(index, 0)", "k = tl.maximum(index, 0) + 1"),
    },
    "table row - 1": {
        "reference": ("sde_step.py", "index = index.clamp_min(0)", "index = (index - 1).clamp_min(0)"),
        "triton": ("_triton/sde_step.py", "k = tl.maximum(index, 0)", "k = tl.maximum(index - 1, 0)"),
    },
    "step of the counter + 1": {
        "reference": ("philox.py", "| device_word(step, rows)", "| (1 + device_word(step, rows))"),
        "triton": ("_triton/sde_step.py", "tag = (noise_stream << 16) | tl.load", "tag = (noise_stream << 16) | 1 + tl.load"),
    },
    "row missing from the counter": {
        "reference": ("philox.py", "rows.unsqueeze(1) & _WORD", "rows.unsqueeze(1) & 0"),
        "triton": ("_triton/philox.py", "c1 = zero + row.to(tl.int32)[:, None]", "c1 = zero"),
    },
    "iteration missing from the counter": {
        "reference": ("philox.py", "device_word(iteration, rows) & _WORD", "device_word(iteration, rows) & 0"),
        "triton": ("_triton/philox.py", "c2 = zero + iteration.to(tl.int32)", "c2 = zero"),
    },
    "EMA folded in after selecting": {
        "reference": ("capability_step.py", "select_reference(scores[0], new_mean[0]", "select_reference(scores[0], mean[0]"),
        "triton": (
            "_triton/capability_step.py", "score_ptr, new_mean_ptr, new_var_ptr, weight_ptr, at, inside",
            "score_ptr, mean_ptr, var_ptr, weight_ptr, at, inside",
        ),
    },
    "mean over the wrong axis": {
        "reference": (
            "fused_advantage.py", "total = values.masked_fill(~valid, 0).sum(-1, keepdim=True)",
            "total = values.masked_fill(~valid, 0).sum(-2, keepdim=True)",
        ),
        "triton": (
            "_triton/fused_advantage.py", "tl.sum(tl.where(valid, values, 0.0), 1)[:, None]",
            "tl.sum(tl.where(valid, values, 0.0), 0)[None, :]",
        ),
    },
    "log-prob summed over the group": {
        "reference": ("group_log_prob.py", ".square().flatten(2).mean(2)", ".square().flatten(2).mean(2).cumsum(1)"),
        "triton": (
            "_triton/group_log_prob.py", "const - scale * (square / numel))", "const - scale * (square * (g + 1) / numel))",
        ),
    },
    "scale of the row halved": {
        "reference": ("quantize.py", "keepdim=True).clamp_min(TINY)", "keepdim=True).clamp_min(TINY) / 2"),
        "triton": ("_triton/rows.py", "tl.div_rn(amax, 448.0)", "tl.div_rn(amax, 896.0)"),
    },
    "broken rows pass for sound ones": {
        "reference": ("quantize.py", "all(-1, keepdim=True), amax, torch.nan)", "all(-1, keepdim=True), amax, 1.0)"),
        "triton": ("_triton/rows.py", "tl.where(bad > 0,", "tl.where(bad > 1,"),
    },
    "variance around zero": {
        "reference": ("layer_norm_modulate.py", "centred.square().mean", "values.square().mean"),
        "triton": ("_triton/layer_norm_modulate.py", "tl.sum(centred * centred)", "tl.sum(x * x)"),
    },
    "scale without its one": {
        "reference": ("layer_norm_modulate.py", "* (1 + scale.to(wide)", "* (scale.to(wide)"),
        "triton": ("_triton/layer_norm_modulate.py", "* (1.0 + scale)", "* scale"),
    },
    "the other GELU": {
        "reference": ("gelu_join.py", 'approximate="tanh"', 'approximate="none"'),
        "triton": ("_triton/gelu_join.py", "0.044715", "0.0"),
    },
    "parts in the other order": {
        "reference": ("gelu_join.py", "torch.cat([first.to(wide), y], -1)", "torch.cat([y, first.to(wide)], -1)"),
        "triton": ("_triton/gelu_join.py", "y = tl.where(column < FIRST, first, y)", "y = tl.where(column < FIRST, 0.0, y)"),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("mutants")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in [n for n in sys.modules if n.startswith("mutant_")]:
        del sys.modules[name]


def load(folder: Path, name: str, change: tuple[str, str, str] | None) -> ModuleType:
    """A copy of the package under another name, with one substitution."""
    shutil.copytree(PACKAGE, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    if change is not None:
        file, source, fault = change
        path = folder / name / file
        text = path.read_text("utf-8")
        assert source in text, f"{file} no longer holds {source!r}: update the mutant"
        path.write_text(text.replace(source, fault), "utf-8")
    importlib.invalidate_caches()
    return importlib.import_module(name)


def philox(counter: list[int]) -> list[int]:
    """Philox-4x32-10 on Python integers."""
    k0, k1 = SEED & 0xFFFFFFFF, SEED >> 32
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def normal(row: int, element: int, step: int) -> float:
    words = philox([element // 4, row, ITERATION, STREAM << 16 | step])
    pair = words[:2] if element % 4 < 2 else words[2:]
    u, angle = (((w >> 8) + 0.5) * 2.0**-24 for w in pair)
    return math.sqrt(-2 * math.log(u)) * (math.cos, math.sin)[element % 2](2 * math.pi * angle)


def values(*shape: int) -> torch.Tensor:
    return torch.sin(torch.arange(1.0, math.prod(shape) + 1) * 1.7).reshape(shape)


def check_table(package: ModuleType, impl: str) -> None:
    """Published check values of the official schedule."""
    table = package.step_table("flow", package.sigma_schedule(16, 3.0), 0.7)
    assert [round(float(table.w[k]), 3) for k in (0, 2, 4, 6)] == [0.7, 0.517, 0.373, 0.31]
    assert float(table.a[0]) == pytest.approx(0.755)


def step_arguments(package: ModuleType):
    table = package.StepTable(*(torch.tensor(c) for c in (
        [0.5, 0.9, 0.7], [-0.2, -0.3, 0.4], [0.1, 0.4, 0.3], [1.0, 2.0, 3.0], [0.1, -0.5, 0.2], [0.9, 0.6, 0.4], [0.6, 0.4, 0.1]
    )))  # fmt: skip
    return table, values(2, 3, 3), values(2, 3, 3).flip(0) + 0.25, torch.tensor([1, 1])


def check_step(package: ModuleType, impl: str) -> None:
    """Mean, drawn noise, bfloat16 rounding and the log-prob of the rounded value, element by element."""
    table, x, v, index = step_arguments(package)
    x = x.bfloat16()
    draw = package.Draw(SEED, torch.tensor([4, 11]), ITERATION, STREAM, torch.tensor([6, 2]))
    found = package.sde_step(x, v, table, index, draw, impl=impl)
    for r, (row, step) in enumerate([(4, 6), (11, 2)]):
        gaps = []
        for d in range(9):
            mean = 0.9 * float(x[r].flatten()[d]) - 0.3 * float(v[r].flatten()[d])
            sample = mean + 0.4 * normal(row, d, step)
            rounded = float(found.next[r].flatten()[d])
            assert abs(rounded - sample) <= 2.0**-8 * abs(sample) + 1e-6
            gaps.append(rounded - mean)
        assert float(found.logp[r]) == pytest.approx(-0.5 - 2.0 * statistics.fmean(g * g for g in gaps), abs=2e-6)


def check_replay(package: ModuleType, impl: str) -> None:
    table, x, v, index = step_arguments(package)
    successors, leaf = values(2, 3, 3, 3).flip(-1), v.clone().requires_grad_()
    logp = package.group_log_prob(x, leaf, successors, table, index, impl)
    mean = 0.9 * x - 0.3 * v
    gap = successors - mean.unsqueeze(1)
    torch.testing.assert_close(logp.detach(), -0.5 - 2.0 * gap.square().mean((2, 3)), rtol=1e-5, atol=1e-6)
    logp[:, 1].sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, 2 * -0.3 * 2.0 / 9 * gap[:, 1], rtol=1e-5, atol=1e-6)


def check_advantage(package: ModuleType, impl: str) -> None:
    """Local plus centred z, sample by sample; the last sample of each group is masked; one group is nearly equal."""
    groups = [[0.3, 0.9, 0.1, 0.5], [1e-5, 3e-5, 2e-5, 7.0], [0.8, 0.2, 0.6, 0.9]]
    rewards = torch.tensor([[groups]], dtype=torch.float64).reshape(1, 3, 1, 4)
    state = (torch.tensor([0.4]).double(), torch.tensor([0.2]).double(), torch.tensor([2]), torch.tensor([1.0]))
    mask = torch.tensor([True, True, True, False]).expand(3, 1, 4)
    found = package.multi_reward_advantage(rewards, *state, 5.0, 1.0, "zscore_centred", mask, impl)
    for g, group in enumerate(groups):
        kept = group[:3]
        mean, std = statistics.fmean(kept), statistics.stdev(kept)
        expected = [(r - mean) / (std + 1e-8) + (r - mean) / (0.2 + 1e-8) for r in kept] + [0.0]
        assert found.advantage[g, 0].tolist() == pytest.approx(expected, abs=1e-7)


def check_capability(package: ModuleType, impl: str) -> None:
    """EMA 0.8 * 1 + 0.2 * 5 = 1.8: 2 is closest to it, 1.2 to the EMA before."""
    scores = torch.tensor([[[1.2, 11.0, 2.8 - 0.8, 5.8]]], dtype=torch.float64)
    state = (torch.tensor([1.0]).double(), torch.tensor([4.0]).double(), torch.tensor([3]))
    found = package.capability_step(scores, *state, 0.8, "closest", impl=impl)
    assert float(found.mean) == pytest.approx(1.8) and found.picks.tolist() == [2]
    assert float(found.distance) == pytest.approx(0.2)
    assert float(found.var) == pytest.approx(0.8 * 4 + 0.2 * statistics.pvariance([1.2, 11.0, 2.0, 5.8]))


def check_rows(package: ModuleType, impl: str) -> None:
    """Quantisation, adaptive norm and GELU beside another part, value by value."""
    x = values(2, 5) * torch.tensor([[1.0], [30.0]]) + 2
    q = package.quantize_rowwise(x, impl)
    for r in range(2):
        row = x[r].tolist()
        scale = max(map(abs, row)) / 448
        assert float(q.scale[r]) == pytest.approx(scale)
        assert (q.values[r].float() * q.scale[r]).tolist() == pytest.approx(row, rel=1 / 15)
    broken = package.quantize_rowwise(torch.tensor([[1.0, math.inf, 2.0]]), impl)
    assert math.isnan(float(broken.scale))
    shift, scale = values(1, 5), values(1, 5).flip(1)
    found = package.layer_norm_modulate(x[:1].unsqueeze(0), shift, scale, impl=impl).flatten().tolist()
    row = x[0].tolist()
    mean, deviation = statistics.fmean(row), math.sqrt(statistics.pvariance(row) + 1e-6)
    for d in range(5):
        assert found[d] == pytest.approx((row[d] - mean) / deviation * (1 + float(scale[0, d])) + float(shift[0, d]), abs=1e-5)
    joined = package.gelu_join(x.unsqueeze(0), values(1, 2, 3) + 4, impl=impl)[0, 0].tolist()
    inner = [math.sqrt(2 / math.pi) * (v + 0.044715 * v**3) for v in row]
    expected = [v / 2 * (1 + math.tanh(u)) for v, u in zip(row, inner, strict=True)]
    assert joined == pytest.approx([*(values(1, 2, 3)[0, 0] + 4).tolist(), *expected], abs=1e-5)


def check(package: ModuleType, impl: str) -> None:
    """The compact suite."""
    for part in (check_table, check_step, check_replay, check_advantage, check_capability, check_rows):
        part(package, impl)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_suite_accepts_the_real_package(packages: Path, impl: str) -> None:
    check(load(packages, f"mutant_none_{impl}", None), impl)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught(packages: Path, name: str, impl: str) -> None:
    package = load(packages, f"mutant_{list(MUTANTS).index(name)}_{impl}", MUTANTS[name][impl])
    with pytest.raises(AssertionError):
        check(package, impl)
