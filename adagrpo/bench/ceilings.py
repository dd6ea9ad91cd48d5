"""What the library's own kernels reach at FLUX.1's shapes: matrix products in bf16 and FP8, attention of cuDNN and flash."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from adagrpo_kernels import Quantized, quantize_rowwise_reference, quantize_tensorwise
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .findings import Findings, Row
from .kernels import Bench

ROWS = (10, 12, 48)
# Tokens of one image by stream, with the (K, N) of its products: both streams of double blocks, single blocks.
DOUBLE = ((3072, 9216), (3072, 3072), (3072, 12288), (12288, 3072))
PRODUCTS = {"image": (1024, DOUBLE), "text": (256, DOUBLE), "single": (1280, ((3072, 21504), (15360, 3072)))}
HEADS, HEAD = 24, 128
TOKENS = ((1, 1280), (10, 1280), (12, 1280), (48, 1280), (1, 4608))
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
FP8_BOUND, ATTENTION_BOUND = 0.05, 0.02  # relative distance from float32: e4m3 keeps 3 bits, bf16 products 8


def products(x: Tensor, w: Tensor) -> dict[str, Callable[[], Tensor]]:
    """``x @ w.t()`` of x [M, K] and w [N, K], both bf16, by precision: the operands are quantised beforehand."""
    rowwise, tensorwise = ((quantise(x), quantise(w)) for quantise in (quantize_rowwise_reference, quantize_tensorwise))
    return {
        "bf16": lambda: x @ w.t(),
        "fp8 rowwise": functools.partial(_scaled, *rowwise),
        "fp8 tensorwise": functools.partial(_scaled, *tensorwise),
    }


def _scaled(a: Quantized, b: Quantized) -> Tensor:
    """As a rollout's projection calls it."""
    return torch._scaled_mm(
        a.values, b.values.t(), scale_a=a.scale, scale_b=b.scale.t() if b.scale.ndim else b.scale,
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip


def gemm_part(
    findings: Findings,
    bench: Bench,
    rows: Sequence[int] = ROWS,
    shapes: Mapping[str, tuple[int, Sequence[tuple[int, int]]]] = PRODUCTS,
) -> None:
    """Check each precision, then its rate at every shape."""
    x, w = (bench.randn(64, 256, dtype=torch.bfloat16) for _ in range(2))
    truth = x.float() @ w.float().t()
    for precision in ("bf16", "fp8 rowwise", "fp8 tensorwise"):
        call = products(x, w)[precision]
        findings.check(f"product, {precision}", functools.partial(_checked, call, truth, FP8_BOUND))
    for stream, (tokens, sizes) in shapes.items():
        for images in rows:
            for k, n in sizes:
                _products_of(findings, bench, stream, images * tokens, k, n)


def _products_of(findings: Findings, bench: Bench, stream: str, m: int, k: int, n: int) -> None:
    if findings.deadline.passed:
        findings.not_measured.append(f"products, {stream}, {m}x{k}x{n}")
        return
    x, w = bench.randn(m, k, dtype=torch.bfloat16), bench.randn(n, k, dtype=torch.bfloat16)
    for precision in ("bf16", "fp8 rowwise", "fp8 tensorwise"):

        def measure(precision: str = precision) -> Row:
            return rate(bench.seconds(products(x, w)[precision]), 2 * m * k * n)

        name = {"case": stream, "shape": f"{m}x{k}x{n}", "dtype": precision}
        findings.row("products", name, measure, findings.flags([f"product, {precision}"]))


def attention_part(findings: Findings, bench: Bench, tokens: Sequence[tuple[int, int]] = TOKENS, heads: int = HEADS) -> None:
    """Both backends on bf16 queries, keys and values [images, heads, tokens, 128]."""

    def call(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v)

    qkv = [bench.randn(1, 2, 96, HEAD, dtype=torch.bfloat16) for _ in range(3)]
    q, k, v = (t.float() for t in qkv)
    truth = torch.softmax(q @ k.transpose(-1, -2) / HEAD**0.5, -1) @ v
    for name, backend in BACKENDS.items():
        check = functools.partial(_checked, functools.partial(call, backend, *qkv), truth, ATTENTION_BOUND)
        findings.check(f"attention, {name}", check)
    for images, length in tokens:
        given = [bench.randn(images, heads, length, HEAD, dtype=torch.bfloat16) for _ in range(3)]
        for name, backend in BACKENDS.items():

            def measure(backend: SDPBackend = backend, given: list[Tensor] = given) -> Row:
                work = 4 * given[0].shape[0] * heads * given[0].shape[2] ** 2 * HEAD
                return rate(bench.seconds(functools.partial(call, backend, *given)), work)

            shape = f"{images}x{heads}x{length}x{HEAD}"
            findings.row(
                "attention", {"case": name, "shape": shape, "dtype": "bf16"}, measure, findings.flags([f"attention, {name}"])
            )


def rate(seconds: list[float], flops: int) -> Row:
    """Microseconds and TFLOP/s."""
    return {"us": [round(t * 1e6, 3) for t in seconds], "TFLOP/s": round(flops / seconds[0] / 1e12, 2)}


def _checked(call: Callable[[], Tensor], truth: Tensor, bound: float) -> str:
    return too_far(call(), truth, bound)


def too_far(found: Tensor, truth: Tensor, bound: float) -> str:
    """What is wrong with ``found``: '' while its relative distance from ``truth`` is within ``bound``."""
    distance = float((found.float() - truth.float()).norm() / truth.float().norm())
    return "" if distance <= bound else f"off by {distance:.1e}, at most {bound:.0e}"
