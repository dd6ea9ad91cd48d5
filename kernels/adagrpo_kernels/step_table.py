"""Every one-step sampler of a flow model is one affine step: a row of five numbers.

With ``s = sigma_k``, ``s' = sigma_{k+1}``, ``dt = s' - s``, velocity ``v`` (noise minus clean) and latent ``x``::

    mean = a*x + b*v                  a = 1 - s' + c1,  b = c1*(1 - s) - (1 - s')*s
    next = mean + w*eps               eps ~ N(0, I)
    log p(next) = -logp_scale * mean_D((next - mean)**2) + logp_const

====== ================================ ================= ============ =======================
scheme c1                               w                 logp_scale   logp_const
====== ================================ ================= ============ =======================
ode    s'                               0                 0            0
flow   s' - g^2*|dt|/(2s)               g*sqrt(|dt|)      1/(2w^2)     -log(w) - log(2*pi)/2
dance  the same with g = eta            g*sqrt(|dt|)      1/(2w^2)     -log(w) - log(2*pi)/2
flash  the same with g = eta*s          g*sqrt(|dt|)      1/(2w^2)     -log(w) - log(2*pi)/2
cps    s'*cos(eta*pi/2)                 s'*sin(eta*pi/2)  1            0
====== ================================ ================= ============ =======================

``flow``: ``g = eta*sqrt(s/(1-s))``; where ``s = 1`` the denominator uses ``sigma_1`` (Flow-GRPO, AdaGRPO section 3).
``flash``: Flash-GRPO's, whose ``eta`` is the grid's second level.
A row whose ``w`` is 0 is deterministic and carries no log-probability: its scale and constant are 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

SCHEMES = ("ode", "flow", "dance", "flash", "cps")


@dataclasses.dataclass(frozen=True)
class StepTable:
    """Rows of affine steps; all tensors have shape [T] and one dtype and device.

    Attributes:
        a, b, w: coefficients of latent, velocity and noise.
        logp_scale, logp_const: log-probability of the step, see the module's table.
        sigma, sigma_next: noise level before and after the step.
    """

    a: Tensor
    b: Tensor
    w: Tensor
    logp_scale: Tensor
    logp_const: Tensor
    sigma: Tensor
    sigma_next: Tensor

    def __len__(self) -> int:
        return self.a.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> StepTable:
        """The same table on another device or in another dtype."""
        return StepTable(**{name: t.to(device=device, dtype=dtype) for name, t in self._tensors().items()})

    def rows(self, index: Tensor) -> StepTable:
        """The rows ``index`` (int64 [R]), on the device, without a host round trip."""
        return StepTable(**{name: t.index_select(0, index) for name, t in self._tensors().items()})

    @staticmethod
    def concat(tables: Sequence[StepTable]) -> StepTable:
        """One table holding all rows of ``tables``, in order."""
        return StepTable(**{name: torch.cat([getattr(t, name) for t in tables]) for name in tables[0]._tensors()})

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def sigma_schedule(num_steps: int, shift: float) -> Tensor:
    """Shifted noise levels ``shift*u/(1 + (shift-1)*u)``, ``u_k = 1 - k/T`` (AdaGRPO section 3, Esser et al. 2024).

    Args:
        num_steps: T, at least 1.
        shift: time shift, above 0; 1 leaves the grid uniform.

    Returns:
        float64 [T + 1], falling from 1 to 0.
    """
    if num_steps < 1 or not shift > 0:
        raise ValueError(f"sigma_schedule needs num_steps >= 1 and shift > 0, got {num_steps} and {shift}")
    u = 1 - torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    return shift * u / (1 + (shift - 1) * u)


def step_table(scheme: str, sigmas: Tensor, eta: float = 0.0) -> StepTable:
    """The rows of ``scheme`` on a grid of noise levels; formulas in the module docstring.

    Args:
        scheme: one of ``SCHEMES``.
        sigmas: [T + 1], strictly falling, within [0, 1]; computed in float64.
        eta: noise strength, at least 0; ignored by ``ode``. For ``cps`` at most 1.

    Returns:
        A float64 StepTable of length T.

    Raises:
        ValueError: unknown scheme, bad grid, eta out of range.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}: one of {', '.join(SCHEMES)}")
    sigmas = sigmas.to(torch.float64)
    if sigmas.ndim != 1 or len(sigmas) < 2 or not bool((sigmas[1:] < sigmas[:-1]).all()):
        raise ValueError("sigmas must be a strictly falling vector of at least two noise levels")
    if sigmas[0] > 1 or sigmas[-1] < 0:
        raise ValueError("sigmas must lie within [0, 1]")
    if not eta >= 0 or (scheme == "cps" and eta > 1):
        raise ValueError(f"eta = {eta} is out of range for scheme {scheme!r}")
    s, s_next = sigmas[:-1], sigmas[1:]
    dt = (s_next - s).abs()
    if scheme == "ode" or eta == 0:
        c1, w = s_next, torch.zeros_like(s)
    elif scheme == "cps":
        c1, w = s_next * math.cos(eta * math.pi / 2), s_next * math.sin(eta * math.pi / 2)
    else:
        g = eta * s if scheme == "flash" else torch.full_like(s, eta)
        if scheme == "flow":
            g = eta * (s / (1 - torch.where(s == 1, sigmas[1], s))).sqrt()
        c1, w = s_next - g**2 * dt / (2 * s), g * dt.sqrt()
    noisy = w > 0
    safe_w = torch.where(noisy, w, torch.ones_like(w))
    if scheme == "cps":
        scale, const = torch.ones_like(w), torch.zeros_like(w)
    else:
        scale, const = 0.5 / safe_w**2, -safe_w.log() - 0.5 * math.log(2 * math.pi)
    zero = torch.zeros_like(w)
    return StepTable(
        a=1 - s_next + c1,
        b=c1 * (1 - s) - (1 - s_next) * s,
        w=w,
        logp_scale=torch.where(noisy, scale, zero),
        logp_const=torch.where(noisy, const, zero),
        sigma=s.clone(),
        sigma_next=s_next.clone(),
    )
