"""Log-probabilities of G successors that share one mean: the replay of the policy update.

``logp_g = -logp_scale * mean_D((next_g - (a*x + b*v))**2) + logp_const``, hence
``dL/dv = (2*b*logp_scale/D) * sum_g dL/dlogp_g * (next_g - mean)``: one reduction over the group (AdaGRPO section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import named, run
from .rounding import STORAGE_DTYPES
from .sde_step import affine_mean
from .step_table import StepTable


def group_log_prob(
    x: Tensor, v: Tensor, successors: Tensor, table: StepTable, index: Tensor, impl: str | None = None
) -> Tensor:
    """``group_log_prob_reference`` by the chosen implementation.

    Args:
        impl: see ``adagrpo_kernels._dispatch``. The kernel takes float32, bfloat16 and float16 latents, and its gradient
            flows into ``v`` only, computed in float32, once.
    """
    problem = None
    if x.dtype not in STORAGE_DTYPES[1:]:
        problem = f"it does not take {x.dtype} latents"
    elif torch.is_grad_enabled() and (x.requires_grad or successors.requires_grad):
        problem = "its gradient flows into v only, and x or successors require one"

    def kernel() -> Tensor:
        from ._triton import group_log_prob

        return group_log_prob.group_log_prob(x, v, successors, table, index, named(impl) == "auto")

    reference = lambda: group_log_prob_reference(x, v, successors, table, index)  # noqa: E731
    return run("group_log_prob", impl, [x, v, successors, index], kernel, reference, problem)


def group_log_prob_reference(x: Tensor, v: Tensor, successors: Tensor, table: StepTable, index: Tensor) -> Tensor:
    """Log-probability of each successor under the step's Gaussian, differentiable in ``v``.

    Args:
        x: latents [N, L, C] in their storage dtype.
        v: velocities [N, L, C], any float dtype; gradients flow into it.
        successors: stored next latents [N, G, L, C]; G = 1 replays a full trajectory. Elements that are not finite are
            left out: they belong to failed samples, which the loss masks.
        table: step table on the same device.
        index: int64 [N], table row of each latent.

    Returns:
        [N, G], float32 (float64 for float64 latents).
    """
    rows = table.rows(index)
    mean = affine_mean(x, v, table, index)
    successors = successors.to(mean.dtype)
    # A failed sample may hold NaN, and masking its log-probability later would still give 0 * NaN in the backward pass.
    successors = torch.where(successors.isfinite(), successors, mean.detach().unsqueeze(1))
    square = (successors - mean.unsqueeze(1)).square().flatten(2).mean(2)
    scale, const = rows.logp_scale.to(mean.dtype), rows.logp_const.to(mean.dtype)
    return const.unsqueeze(1) - scale.unsqueeze(1) * square


def group_log_prob_gradient_reference(
    x: Tensor, v: Tensor, successors: Tensor, table: StepTable, index: Tensor, upstream: Tensor
) -> Tensor:
    """Gradient of ``group_log_prob_reference`` in ``v`` for the gradient ``upstream`` [N, G]: [N, L, C], at least float32."""
    with torch.enable_grad():
        wide = v.detach().to(torch.promote_types(v.dtype, torch.float32)).requires_grad_()
        logp = group_log_prob_reference(x, wide, successors, table, index)
        return torch.autograd.grad(logp, wide, upstream.to(logp.dtype))[0]
