"""The samplers as a whole, on a world whose velocity is known in closed form."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from adagrpo.algorithm import sde

TARGET_MEAN, TARGET_STD, SAMPLES = 1.5, 0.5, 20_000


def gaussian_velocity(x: torch.Tensor, s: float) -> torch.Tensor:
    """E[noise - clean | x] for clean ~ N(mean, std**2) and x = (1-s)*clean + s*noise."""
    variance = (1 - s) ** 2 * TARGET_STD**2 + s**2
    surprise = (x - (1 - s) * TARGET_MEAN) / variance
    return s * surprise - (TARGET_MEAN + (1 - s) * TARGET_STD**2 * surprise)


@pytest.mark.parametrize(("scheme", "eta"), [("ode", 0.0), ("flow", 0.7), ("dance", 0.3)])
def test_sampling_reaches_the_target(scheme: str, eta: float) -> None:
    """With the exact velocity, any noise strength ends in the data distribution, up to the error of 100 steps.

    Not for CPS: its noise per step does not shrink with the step, so it has no such limit.
    """
    steps, row = 100, torch.tensor([3])
    table = sde.step_table(scheme, sde.sigma_schedule(steps, 2.0), eta)
    x = sde.philox_normal(7, row, SAMPLES, 0, sde.Stream.SAMPLE).reshape(1, SAMPLES, 1)
    for k in range(steps):
        noise = sde.philox_normal(7, row, SAMPLES, 0, sde.Stream.TRAJECTORY_STEP, k).reshape(1, SAMPLES, 1)
        x = sde.sde_step(x, gaussian_velocity(x, float(table.sigma[k])), table, torch.tensor([k]), noise).next
    z = (x.flatten().double() - TARGET_MEAN) / TARGET_STD
    assert float(z.mean()) == pytest.approx(0, abs=0.03)
    assert float(z.std()) == pytest.approx(1, abs=0.03)
    assert stats.kstest(((z - z.mean()) / z.std()).numpy(), "norm").statistic < 0.015


def test_public_names_resolve() -> None:
    assert all(getattr(sde, name) is not None for name in sde.__all__)
