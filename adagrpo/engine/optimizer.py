"""AdamW on fp32 weights, whatever precision the model runs in, with gradient clipping, a schedule and a weight EMA."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .ranks import Ranks


def lr_share(step: int, total: int, schedule: str, warmup: int, final_share: float) -> float:
    """Share of the peak learning rate at optimizer step ``step`` (from 0) of ``total``.

    Linear warm-up over ``warmup`` steps, then ``constant``, or ``linear``/``cosine`` down to ``final_share``.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    fall = progress if schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * progress)
    return 1 - (1 - final_share) * fall


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """How a policy is stepped.

    Attributes:
        lr: peak learning rate.
        betas, eps, weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to it.
        total_steps, schedule, warmup, final_share: see ``lr_share``.
        ema_decay: of the weight average; 0 keeps none.
        ema_every: steps between its updates, the first of which comes one step early, as Flow-GRPO counts.
        ema_warmup: its decay is at most (1 + n)/(10 + n) after n steps (Flow-GRPO).
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    total_steps: int = 1
    schedule: str = "constant"
    warmup: int = 0
    final_share: float = 0.0
    ema_decay: float = 0.0
    ema_every: int = 1
    ema_warmup: bool = False

    def lr_at(self, step: int) -> float:
        """Learning rate of optimizer step ``step``, from 0."""
        return self.lr * lr_share(step, self.total_steps, self.schedule, self.warmup, self.final_share)


class PolicyOptimizer:
    """Steps the trainable parameters of a policy.

    Parameters narrower than fp32 get fp32 master weights: at the learning rates of this field nearly every update of a
    bf16 weight would be lost to rounding.

    Several ranks begin with the first one's weights and step by the sum of their gradients, so all keep the same weights.

    Args:
        parameters: trainable parameters.
        settings: how they are stepped.
        ranks: who else trains; None is nobody.

    Attributes:
        unsound: of several ranks, whether this one's gradients were not finite since that was last read, 0-dim; None is no.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], settings: OptimizerSettings, ranks: Ranks | None = None) -> None:
        self.parameters, self.ranks = list(parameters), ranks or Ranks()
        self.unsound: Tensor | None = None
        self.ranks.same(self.parameters)
        wide = (torch.float32, torch.float64)
        self.masters = [p if p.dtype in wide else p.detach().float().requires_grad_() for p in self.parameters]
        self.settings, self.steps = settings, 0
        # On CUDA torch's default works on all parameters at once, with temporaries as large as they are; one kernel needs none.
        fused = all(m.is_cuda for m in self.masters) and bool(self.masters)
        keywords = {"fused": True} if fused else {}
        s = settings
        self.adamw = torch.optim.AdamW(self.masters, lr=s.lr, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay, **keywords)
        self.averages = [m.detach().clone() for m in self.masters] if s.ema_decay else []

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.settings.lr_at(self.steps)

    def step(self) -> Tensor:
        """Sum over ranks, clip, step, write back, average, clear the gradients; returns the gradient norm before clipping
        (0-dim)."""
        self.collect()
        if self.ranks.size > 1:
            self._look_at_own()
        self.ranks.add_up([m.grad for m in self.masters], self.masters)
        norm = nn.utils.clip_grad_norm_(self.masters, self.settings.max_grad_norm)
        for group in self.adamw.param_groups:
            group["lr"] = self.lr
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.steps += 1
        self._write_back(self.masters)
        if (self.steps + 1) % self.settings.ema_every == 0:
            self._average()
        return norm

    def collect(self) -> None:
        """Add the gradients of narrow parameters to their masters' in fp32; call it after each micro-batch."""
        for master, p in zip(self.masters, self.parameters, strict=True):
            if master is not p and p.grad is not None:
                wide = p.grad.to(master.dtype)
                master.grad = wide if master.grad is None else master.grad.add_(wide)
                p.grad = None  # one tensor at a time: both sets at once would not fit

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within it the model runs on the weight EMA, if one is kept."""
        if not self.averages:
            yield
            return
        self._swap_averages()
        try:
            yield
        finally:
            self._swap_averages()
            self._write_back(self.masters)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit: masters, moments, averages, step count."""
        return {
            "steps": self.steps,
            "masters": [m.detach() for m in self.masters],
            "averages": self.averages,
            "adamw": self.adamw.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``; the model's weights follow."""
        self.steps = state["steps"]
        self.adamw.load_state_dict(state["adamw"])
        for moments in self.adamw.state.values():  # what stays on the CPU would keep the file mapped that it came from
            moments |= {k: v.clone() for k, v in moments.items() if isinstance(v, Tensor) and v.device.type == "cpu"}
        for target, value in zip(self.masters + self.averages, state["masters"] + state["averages"], strict=True):
            target.data.copy_(value)
        self._write_back(self.masters)

    def read_unsound(self) -> bool:
        """Whether this rank's own gradients were not finite since the last call: their sum does not tell whose were not."""
        found, self.unsound = self.unsound, None
        return found is not None and bool(found)

    @torch.no_grad()
    def _look_at_own(self) -> None:
        if gradients := [m.grad for m in self.masters if m.grad is not None]:
            now = ~torch.stack(torch._foreach_norm(gradients, math.inf)).isfinite().all()
            self.unsound = now if self.unsound is None else self.unsound | now

    @torch.no_grad()
    def _average(self) -> None:
        s = self.settings
        decay = min(s.ema_decay, (1 + self.steps) / (10 + self.steps)) if s.ema_warmup else s.ema_decay
        for average, master in zip(self.averages, self.masters, strict=bool(self.averages)):
            average.lerp_(master, 1 - decay)

    @torch.no_grad()
    def _swap_averages(self) -> None:
        """Exchange weights and averages in place; parameters with a master of their own just show the average."""
        for p, master, average in zip(self.parameters, self.masters, self.averages, strict=True):
            if master is p:
                kept = p.clone()
                p.copy_(average)
                average.copy_(kept)
            else:
                p.copy_(average)

    @torch.no_grad()
    def _write_back(self, weights: Iterable[Tensor]) -> None:
        for p, value in zip(self.parameters, weights, strict=True):
            if p is not value:
                p.copy_(value)
