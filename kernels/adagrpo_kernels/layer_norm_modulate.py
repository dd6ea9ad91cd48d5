"""Adaptive layer norm of diffusion transformers: ``norm(x) * (1 + scale) + shift``, optionally straight to FP8."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ._dispatch import run
from .quantize import Quantized, empty_quantized, kernel_problem, quantize_rowwise_reference


@overload
def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = ..., quantized: Literal[False] = ..., impl: str | None = ...
) -> Tensor: ...
@overload
def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = ..., *, quantized: Literal[True], impl: str | None = ...
) -> Quantized: ...
def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, quantized: bool = False, impl: str | None = None
) -> Tensor | Quantized:
    """``layer_norm_modulate_reference`` by the chosen implementation.

    Args:
        impl: see ``adagrpo_kernels._dispatch``. The kernel takes float32, bfloat16 and float16 ``x`` of up to 16384 channels
            and reads it once.
    """

    def kernel() -> Tensor | Quantized:
        from ._triton import layer_norm_modulate

        out = empty_quantized(x, x.shape[-1]) if quantized else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        layer_norm_modulate.layer_norm_modulate(x, shift, scale, eps, out)
        return out

    reference = lambda: layer_norm_modulate_reference(x, shift, scale, eps, quantized)  # noqa: E731
    return run("layer_norm_modulate", impl, [x, shift, scale], kernel, reference, kernel_problem(x, x.shape[-1]))


def layer_norm_modulate_reference(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, quantized: bool = False
) -> Tensor | Quantized:
    """Normalise each token over its channels, then modulate (Peebles and Xie 2023, adaLN); one rounding at the end.

    Args:
        x: [B, L, D], adjacent in D.
        shift, scale: [B, D], adjacent in D.
        quantized: return e4m3 rows of the float32 result instead of rounding to the dtype of ``x``.

    Returns:
        [B, L, D] in the dtype of ``x``, computed in float32 (float64 for float64); or its rowwise quantisation.
    """
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    values = x.to(wide)
    centred = values - values.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    y = centred / deviation * (1 + scale.to(wide).unsqueeze(1)) + shift.to(wide).unsqueeze(1)
    return quantize_rowwise_reference(y) if quantized else y.to(x.dtype)
