"""The online curriculum (AdaGRPO section 3): an EMA of the policy's own rewards, and the prompt closest to it.

``mean <- alpha*mean + (1-alpha)*m``, ``var <- alpha*var + (1-alpha)*v`` with ``m, v`` (ddof 0) of the iteration's finite
scores; the first iteration initialises. Folded in BEFORE selecting. Everything stays on the device: no value decides a
Python branch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import run
from .philox import Draw, philox_uniform_reference

STRATEGIES = ("random", "easiest", "hardest", "medium", "closest")
MIN_VAR = 1e-8
NO_CANDIDATE, NO_UPDATE = 1, 2


class CapabilityStep(NamedTuple):
    """Result of ``capability_step``; nothing is read on the host.

    Attributes:
        mean, var: [M], the EMA with this iteration folded in.
        folded: int64 [M], iterations folded in.
        picks: int64 [P], the candidate of each slot; -1 where none has a finite score.
        distance: [P], of the pick from the EMA, as ``closest`` measures it; NaN where there is no pick.
        status: int64 0-dim, 0 if all is well; bit ``NO_CANDIDATE``: some slot has no pick, bit ``NO_UPDATE``: some reward
            had no finite score, so its EMA did not move.
    """

    mean: Tensor
    var: Tensor
    folded: Tensor
    picks: Tensor
    distance: Tensor
    status: Tensor


def capability_step(
    scores: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    alpha: float,
    strategy: str = "closest",
    reward_weights: Tensor | None = None,
    draw: Draw | None = None,
    impl: str | None = None,
) -> CapabilityStep:
    """``capability_step_reference`` by the chosen implementation; the kernel is one launch.

    Args:
        impl: see ``adagrpo_kernels._dispatch``. The kernel adds in another order than the reference, so candidates whose
            distances differ by rounding only may be told apart differently; equal scores never are.
    """
    _check(scores, strategy, reward_weights, draw)
    tensors = [scores, mean, var, count, reward_weights, draw.rows if draw else None]
    problem = None if mean.dtype in (torch.float32, torch.float64) else f"it does not keep the EMA in {mean.dtype}"
    arguments = (scores, mean, var, count, alpha, strategy, reward_weights, draw)

    def kernel() -> CapabilityStep:
        from ._triton import capability_step

        return CapabilityStep(*capability_step.capability_step(*arguments))

    return run("capability_step", impl, tensors, kernel, lambda: capability_step_reference(*arguments), problem)


def capability_step_reference(
    scores: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    alpha: float,
    strategy: str = "closest",
    reward_weights: Tensor | None = None,
    draw: Draw | None = None,
) -> CapabilityStep:
    """Fold an iteration's scores into the EMA, then pick one candidate per slot.

    Args:
        scores: [M, P, B] for M rewards, P slots and B candidates; computed in the dtype of ``mean``.
        mean, var, count: [M], the EMA before; ``capability_update_reference``.
        alpha: memory of the EMA, in [0, 1).
        strategy: ``select_reference``.
        reward_weights: [M]; None for a single reward.
        draw: one row per slot; needed by ``random`` only.

    Returns:
        ``CapabilityStep``.

    Raises:
        ValueError: unknown strategy, ``random`` without a draw, several rewards without weights.
    """
    _check(scores, strategy, reward_weights, draw)
    scores = scores.to(mean.dtype)
    new_mean, new_var, new_count = capability_update_reference(mean, var, count, scores, alpha)
    std = new_var.clamp_min(MIN_VAR).sqrt()
    uniform = None
    if strategy == "random":
        assert draw is not None
        uniform = philox_uniform_reference(*draw)
    if reward_weights is None:
        picks = select_reference(scores[0], new_mean[0], std[0], strategy, None, uniform)
        distances = (scores[0] - new_mean[0]).abs()
    else:
        picks = select_reference(scores, new_mean, std, strategy, reward_weights, uniform)
        each = (scores - new_mean.reshape(-1, 1, 1)) / std.reshape(-1, 1, 1)
        distances = (reward_weights.reshape(-1, 1, 1) * each.abs()).sum(0)
    distance = distances.gather(1, picks.clamp_min(0).unsqueeze(1)).squeeze(1)
    status = NO_CANDIDATE * (picks < 0).any().long() + NO_UPDATE * (new_count == count).any().long()
    return CapabilityStep(
        new_mean, new_var, new_count, picks, distance.masked_fill(picks < 0, torch.nan).to(mean.dtype), status
    )


def _check(scores: Tensor, strategy: str, reward_weights: Tensor | None, draw: Draw | None) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown selection strategy {strategy!r}: one of {', '.join(STRATEGIES)}")
    if strategy == "random" and draw is None:
        raise ValueError("strategy 'random' needs a draw")
    if reward_weights is None and scores.shape[0] != 1:
        raise ValueError(f"{scores.shape[0]} rewards need reward_weights")


def capability_update_reference(
    mean: Tensor, var: Tensor, count: Tensor, scores: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Fold one iteration's scores into the EMA.

    Args:
        mean, var: EMA of the reward and of its variance, shape [] or [M] for M rewards.
        count: iterations folded in so far, int64, same shape; 0 means empty.
        scores: [...] or [M, ...]; non-finite scores are ignored.
        alpha: memory of the EMA, in [0, 1).

    Returns:
        The new ``mean, var, count``. Without a finite score the state is returned unchanged.

    Raises:
        ValueError: ``scores`` are not those of M rewards.
    """
    if mean.ndim and scores.shape[0] != mean.shape[0]:
        raise ValueError(f"scores of {scores.shape[0]} rewards for an EMA of {mean.shape[0]}")
    flat = scores.to(mean.dtype).reshape(*mean.shape, -1)
    valid = flat.isfinite()
    number = valid.sum(-1)
    some = number > 0
    batch_mean = flat.masked_fill(~valid, 0).sum(-1) / number.clamp_min(1)
    deviation = (flat - batch_mean.unsqueeze(-1)).masked_fill(~valid, 0)
    batch_var = deviation.square().sum(-1) / number.clamp_min(1)
    memory = torch.full_like(mean, alpha).masked_fill(count == 0, 0)
    new_mean = torch.where(some, memory * mean + (1 - memory) * batch_mean, mean)
    new_var = torch.where(some, memory * var + (1 - memory) * batch_var, var)
    return new_mean, new_var, count + some.to(count.dtype)


def select_reference(
    scores: Tensor,
    mean: Tensor,
    std: Tensor,
    strategy: str,
    weights: Tensor | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """The candidate to train on, per slot.

    Args:
        scores: [..., B], or [M, ..., B] with ``weights`` for M rewards.
        mean, std: EMA, shape [] or [M].
        strategy: ``closest`` (to the EMA; several rewards: the weighted sum of distances in each EMA's std), ``easiest``
            (highest), ``hardest`` (lowest), ``medium`` (lower median) or ``random``.
        weights: [M]; None for a single reward.
        uniform: one draw in [0, 1) per slot, [...]; needed by ``random`` only.

    Returns:
        int64 [...]: the first best index on ties; -1 where no candidate has a finite score.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown selection strategy {strategy!r}: one of {', '.join(STRATEGIES)}")
    if weights is None:
        level, distance = scores, (scores - mean).abs()
    else:
        shape = [-1] + [1] * (scores.ndim - 1)
        z = (scores - mean.reshape(shape)) / std.reshape(shape)
        level, distance = ((weights.reshape(shape) * t).sum(0) for t in (z, z.abs()))
    valid = level.isfinite()
    number = valid.sum(-1)
    if strategy == "random":
        if uniform is None:
            raise ValueError("strategy 'random' needs the draws `uniform`")
        rank = (uniform * number).long().clamp_max((number - 1).clamp_min(0))
        order = valid.long().cumsum(-1) - 1
        key = torch.where(order == rank.unsqueeze(-1), 0.0, 1.0)
    elif strategy == "medium":
        ordered = level.masked_fill(~valid, torch.inf).sort(-1).values
        middle = ((number - 1) // 2).clamp_min(0).unsqueeze(-1)
        key = torch.where(level == ordered.gather(-1, middle), 0.0, 1.0)
    else:
        key = {"closest": distance, "easiest": -level, "hardest": level}[strategy]
    # argmin leaves ties to the backend; the first index is part of the specification.
    key = torch.where(valid, key, torch.inf)
    positions = torch.arange(key.shape[-1], device=key.device)
    first = torch.where(key == key.amin(-1, keepdim=True), positions, key.shape[-1]).amin(-1)
    return torch.where(number > 0, first, -1)
