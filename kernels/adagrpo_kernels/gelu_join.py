"""The input of a transformer block's last product: ``[first | gelu(mlp)]``, written once, optionally straight to FP8."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import run
from .quantize import Quantized, empty_quantized, kernel_problem, quantize_rowwise_reference


@overload
def gelu_join(mlp: Tensor, first: Tensor | None = ..., quantized: Literal[False] = ..., impl: str | None = ...) -> Tensor: ...
@overload
def gelu_join(mlp: Tensor, first: Tensor | None = ..., *, quantized: Literal[True], impl: str | None = ...) -> Quantized: ...
def gelu_join(mlp: Tensor, first: Tensor | None = None, quantized: bool = False, impl: str | None = None) -> Tensor | Quantized:
    """``gelu_join_reference`` by the chosen implementation.

    Args:
        impl: see ``adagrpo_kernels._dispatch``. The kernel takes float32, bfloat16 and float16, F + K up to 16384, and reads
            each input once.
    """
    columns = mlp.shape[-1] + (0 if first is None else first.shape[-1])

    def kernel() -> Tensor | Quantized:
        from ._triton import gelu_join

        shape = (*mlp.shape[:-1], columns)
        out = empty_quantized(mlp, columns) if quantized else torch.empty(shape, dtype=mlp.dtype, device=mlp.device)
        gelu_join.gelu_join(mlp, first, out)
        return out

    reference = lambda: gelu_join_reference(mlp, first, quantized)  # noqa: E731
    return run("gelu_join", impl, [mlp, first], kernel, reference, kernel_problem(mlp, columns))


def gelu_join_reference(mlp: Tensor, first: Tensor | None = None, quantized: bool = False) -> Tensor | Quantized:
    """``first`` beside the tanh GELU of ``mlp`` (Hendrycks and Gimpel 2016); one rounding at the end.

    Args:
        mlp: [B, L, K], adjacent in K.
        first: [B, L, F], adjacent in F, in the dtype of ``mlp``; None for F = 0.
        quantized: return e4m3 rows of the float32 result instead of rounding to the dtype of ``mlp``.

    Returns:
        [B, L, F + K] in the dtype of ``mlp``, computed in float32 (float64 for float64); or its rowwise quantisation.
    """
    wide = torch.float64 if mlp.dtype is torch.float64 else torch.float32
    y = F.gelu(mlp.to(wide), approximate="tanh")
    if first is not None:
        y = torch.cat([first.to(wide), y], -1)
    return quantize_rowwise_reference(y) if quantized else y.to(mlp.dtype)
