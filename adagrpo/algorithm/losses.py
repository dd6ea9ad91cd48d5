"""Policy-gradient losses on log-probabilities of whole latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from adagrpo_kernels import StepTable
from torch import Tensor

STEP_WEIGHTS = ("uniform", "equal_gradient", "noise")
KL_VARIANCES = ("step", "diffusion", "none")


class SurrogateLoss(NamedTuple):
    """Loss of each group, [N], and the ratio and clip flag of each sample, [N, G]."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def clipped_surrogate(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, clip_range: float | None, mask: Tensor | None = None
) -> SurrogateLoss:
    """``-mean_valid(min(ratio*A, clip(ratio, 1±clip_range)*A))`` per group (PPO; Flow-GRPO eq. 5).

    Args:
        logp, old_logp, advantage: [N, G].
        clip_range: half width of the trust region around 1, or None for no clipping (AdaGRPO's released code).
        mask: bool [N, G], False for failed samples: they neither contribute nor count.

    Returns:
        ``SurrogateLoss``; a group without a valid sample has loss 0.
    """
    valid = torch.ones_like(advantage, dtype=torch.bool) if mask is None else mask
    # Masked before the product: 0 * NaN in the backward pass would spoil the whole group.
    advantage = torch.where(valid, advantage, 0)
    ratio = torch.exp(torch.where(valid, logp - old_logp.detach(), 0))
    objective, clipped = ratio * advantage, torch.zeros_like(valid)
    if clip_range is not None:
        limited = ratio.clamp(1 - clip_range, 1 + clip_range) * advantage
        clipped = valid & (limited < objective)
        objective = torch.minimum(objective, limited)
    count = valid.sum(-1).clamp_min(1)
    loss = -objective.masked_fill(~valid, 0).sum(-1) / count
    return SurrogateLoss(loss, ratio, clipped)


def guarded(
    logp: Tensor, old_logp: Tensor, mean: Tensor, old_mean: Tensor, table: StepTable, index: Tensor, pooled: bool = False
) -> tuple[Tensor, Tensor]:
    """What takes the place of the log-probabilities in GRPO-Guard's ratio, both [N, G]: their difference is
    ``w*(logp - old_logp) + mean_D((mean - old_mean)^2)/(2w)``, which has the same spread at every step and no bias.

    Args:
        logp, old_logp: [N, G] of Gaussian steps (``logp_scale`` 1/(2w^2)).
        mean, old_mean: [N, L, C]; the old one belongs to ``old_logp``.
        table, index: the step table and int64 [N].
        pooled: the square is the mean over all that take the same step, as in the released code.
    """
    w = table.rows(index).w.to(logp.dtype).unsqueeze(1)
    square = (mean - old_mean.detach()).square().flatten(1).mean(1, keepdim=True)
    if pooled:
        alike = (index.unsqueeze(0) == index.unsqueeze(1)).to(square.dtype)
        square = alike @ square / alike.sum(1, keepdim=True)
    bias = torch.where(w > 0, square / torch.where(w > 0, 2 * w, torch.ones_like(w)), 0)
    return w * logp + bias, w * old_logp.detach()


def log_prob_divergence(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """``mean_valid((logp - old_logp)^2)/2`` of each group of [N, G]: the policy's move since it sampled (MixGRPO)."""
    square = torch.where(mask, logp - old_logp.detach(), 0).square()
    return square.sum(-1) / (2 * mask.sum(-1).clamp_min(1))


def velocity_distance(v: Tensor, reference_v: Tensor, dtype: torch.dtype) -> Tensor:
    """``mean_D((v - reference_v)^2)`` of velocities [N, L, C], in ``dtype``: [N]."""
    return (v.to(dtype) - reference_v.detach().to(dtype)).square().flatten(1).mean(1)


def mean_space_kl(mean: Tensor, reference_mean: Tensor, table: StepTable, index: Tensor, variance: str = "step") -> Tensor:
    """KL divergence between the steps of policy and reference, averaged over elements: [N].

    Args:
        mean, reference_mean: [N, L, C], compute dtype; gradients flow into ``mean``.
        table, index: the step table and int64 [N]; deterministic rows give 0.
        variance: ``step`` divides by 2w² (the exact Gaussian KL), ``diffusion`` by 2g² = 2w²/|dt| (Flow-GRPO's code),
            ``none`` does not (Flow-CPS's code).
    """
    if variance not in KL_VARIANCES:
        raise ValueError(f"unknown KL variance {variance!r}: one of {', '.join(KL_VARIANCES)}")
    rows = table.rows(index)
    square = (mean - reference_mean.detach()).square().flatten(1).mean(1)
    if variance == "none":
        return torch.where(rows.w > 0, square, 0)
    spread = 2 * rows.w.square()
    if variance == "diffusion":
        spread = spread / (rows.sigma - rows.sigma_next)
    noisy = rows.w > 0
    return torch.where(noisy, square / torch.where(noisy, spread, torch.ones_like(spread)).to(square.dtype), 0)


def step_weights(
    table: StepTable, index: Tensor, mode: str = "uniform", average: Callable[[Tensor], Tensor] = torch.mean
) -> Tensor:
    """Weight of each trained step, averaging 1 over ``index`` (int64 [N]), in the table's dtype.

    ``uniform``: 1. ``equal_gradient``: inverse to ``|b*logp_scale*w|``, so that every step pulls equally on the velocity
    (uniform weights give step 6 of the official schedule five times the velocity gradient of step 0); Flash-GRPO's weights.
    ``noise``: proportional to ``w`` (TempFlow-GRPO, whose 1.73 is the inverse mean on its own grid).

    Args:
        average: from [N] to 0-dim; where others train steps too, over theirs as well.
    """
    if mode not in STEP_WEIGHTS:
        raise ValueError(f"unknown step weight {mode!r}: one of {', '.join(STEP_WEIGHTS)}")
    rows = table.rows(index)
    if mode == "uniform":
        return torch.ones_like(rows.w)
    if mode == "noise":
        return rows.w / average(rows.w).clamp_min(torch.finfo(rows.w.dtype).tiny)
    # d logp / d v is proportional to b * logp_scale * w for a successor drawn from the step itself.
    pull = (rows.b * rows.logp_scale * rows.w).abs()
    weight = torch.where(pull > 0, 1 / torch.where(pull > 0, pull, torch.ones_like(pull)), torch.zeros_like(pull))
    return weight / average(weight).clamp_min(torch.finfo(weight.dtype).tiny)
