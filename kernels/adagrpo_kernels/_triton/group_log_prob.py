"""Kernels of ``adagrpo_kernels.group_log_prob``: forward and backward read every input once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._dispatch import attempt, launch
from ..group_log_prob import group_log_prob_gradient_reference
from ..step_table import StepTable
from .common import BLOCK, MIN_BLOCK, WARPS, arrival_counter, as_rows, finite


@triton.jit
def mean_block(x_ptr, v_ptr, a_ptr, b_ptr, k, x_at, v_at, mask):
    """float32 ``a*x + b*v`` at table row ``k``."""
    x = tl.load(x_ptr + x_at, mask=mask, other=0).to(tl.float32)
    v = tl.load(v_ptr + v_at, mask=mask, other=0).to(tl.float32)
    return tl.load(a_ptr + k).to(tl.float32) * x + tl.load(b_ptr + k).to(tl.float32) * v


@triton.jit
def gap_block(ptr, mean, mask):
    """float32 ``successor - mean``; elements of failed samples, which are not finite, are left out."""
    successor = tl.load(ptr, mask=mask, other=0).to(tl.float32)
    return tl.where(finite(successor), successor, mean) - mean


@triton.jit
def group_log_prob_kernel(
    x_ptr, v_ptr, successor_ptr, index_ptr, a_ptr, b_ptr, scale_ptr, const_ptr, logp_ptr, partial_ptr, arrived_ptr,
    group, numel, splits, x_stride, v_stride, latent_stride, member_stride, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    d = split * BLOCK + tl.arange(0, BLOCK)
    mask = d < numel
    k = tl.load(index_ptr + n)
    mean = mean_block(x_ptr, v_ptr, a_ptr, b_ptr, k, n * x_stride + d, n * v_stride + d, mask)
    scale = tl.load(scale_ptr + k).to(tl.float32)
    const = tl.load(const_ptr + k).to(tl.float32)
    for g in range(group):
        at = n * latent_stride + g * member_stride + d
        gap = tl.where(mask, gap_block(successor_ptr + at, mean, mask), 0.0)
        square = tl.sum(gap * gap)
        if partial_ptr is None:
            tl.store(logp_ptr + n * group + g, const - scale * (square / numel))
        else:
            tl.store(partial_ptr + (n * splits + split) * group + g, square)
    if partial_ptr is not None:
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + n, 1, sem="acq_rel") == splits - 1:
            member = tl.arange(0, GROUP)
            total = tl.zeros([GROUP], tl.float32)
            for s in range(splits):
                from_s = partial_ptr + (n * splits + s) * group + member
                total += tl.load(from_s, mask=member < group, other=0, cache_modifier=".cg")
            tl.store(logp_ptr + n * group + member, const - scale * (total / numel), mask=member < group)


@triton.jit
def group_log_prob_backward_kernel(
    x_ptr, v_ptr, successor_ptr, index_ptr, a_ptr, b_ptr, scale_ptr, upstream_ptr, grad_ptr,
    group, numel, x_stride, v_stride, latent_stride, member_stride, upstream_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = d < numel
    k = tl.load(index_ptr + n)
    mean = mean_block(x_ptr, v_ptr, a_ptr, b_ptr, k, n * x_stride + d, n * v_stride + d, mask)
    total = tl.zeros([BLOCK], tl.float32)
    for g in range(group):
        at = n * latent_stride + g * member_stride + d
        total += tl.load(upstream_ptr + n * upstream_stride + g).to(tl.float32) * gap_block(successor_ptr + at, mean, mask)
    factor = 2.0 * tl.load(b_ptr + k).to(tl.float32) * tl.load(scale_ptr + k).to(tl.float32) / numel
    tl.store(grad_ptr + n * numel + d, factor * total, mask=mask)


def _inputs(x: Tensor, v: Tensor, successors: Tensor, index: Tensor, table: StepTable) -> dict[str, Any]:
    flat_x, flat_v = as_rows(x), as_rows(v)
    numel = flat_x.shape[1]
    flat = successors.reshape(*successors.shape[:2], numel)
    flat = flat if flat.stride(2) == 1 or numel == 1 else flat.contiguous()
    return {
        "x_ptr": flat_x, "v_ptr": flat_v, "successor_ptr": flat, "index_ptr": index.contiguous(), "a_ptr": table.a,
        "b_ptr": table.b, "scale_ptr": table.logp_scale, "group": successors.shape[1], "numel": numel,
        "x_stride": flat_x.stride(0), "v_stride": flat_v.stride(0), "latent_stride": flat.stride(0),
        "member_stride": flat.stride(1), "BLOCK": min(BLOCK, max(MIN_BLOCK, triton.next_power_of_2(numel))),
    }  # fmt: skip


class GroupLogProb(torch.autograd.Function):
    """Log-probabilities [N, G], differentiable once, in ``v``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, successors: Tensor, index: Tensor, table: StepTable, fall_back: bool) -> Tensor:
        latents, group = successors.shape[:2]
        inputs = _inputs(x, v, successors, index, table)
        splits = triton.cdiv(inputs["numel"], inputs["BLOCK"])
        logp = torch.empty(latents, group, dtype=torch.float32, device=x.device)
        partial, arrived = arrival_counter(latents, splits * group if splits > 1 else 1, x)
        arguments = inputs | {
            "const_ptr": table.logp_const, "logp_ptr": logp, "partial_ptr": partial, "arrived_ptr": arrived,
            "splits": splits, "GROUP": triton.next_power_of_2(max(group, 1)),
        }  # fmt: skip
        launch("group_log_prob", group_log_prob_kernel, (latents if group else 0, splits), arguments, WARPS)
        ctx.save_for_backward(x, v, successors, index)
        ctx.table, ctx.fall_back = table, fall_back
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None, None, None, None]:
        x, v, successors, index = ctx.saved_tensors
        arguments = (x, v, successors, ctx.table, index, upstream)
        grad = attempt(
            "group_log_prob",
            ctx.fall_back,
            lambda: _gradient(*arguments),
            lambda: group_log_prob_gradient_reference(*arguments),
        )
        return None, grad, None, None, None, None


def _gradient(x: Tensor, v: Tensor, successors: Tensor, table: StepTable, index: Tensor, upstream: Tensor) -> Tensor:
    """Launch of the backward kernel: gradient in ``v``, float32."""
    inputs = _inputs(x, v, successors, index, table)
    upstream = upstream if upstream.stride(1) == 1 else upstream.contiguous()
    grad = torch.empty(v.shape, dtype=torch.float32, device=v.device)
    arguments = inputs | {"upstream_ptr": upstream, "upstream_stride": upstream.stride(0), "grad_ptr": grad}
    grid = (x.shape[0], triton.cdiv(inputs["numel"], inputs["BLOCK"]))
    launch("group_log_prob_backward", group_log_prob_backward_kernel, grid, arguments, WARPS)
    return grad


def group_log_prob(
    x: Tensor, v: Tensor, successors: Tensor, table: StepTable, index: Tensor, fall_back: bool = False
) -> Tensor:
    """Launch; arguments as in ``adagrpo_kernels.group_log_prob``. ``fall_back``: the gradient may be the reference's."""
    return GroupLogProb.apply(x, v, successors, index, table, fall_back)
