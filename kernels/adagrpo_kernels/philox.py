"""Counter-based Gaussian noise: Philox-4x32-10 (Salmon et al. 2011) and Box-Muller.

A value is a function of (seed, iteration, stream, step, row, element) and of nothing else: no batch split, chunk size, rank
count or generator state can change it, and a resumed run draws what the uninterrupted one would have drawn.

- key = (seed low, seed high), counter = (element // 4, row, iteration, stream << 16 | step)
- each word r gives ``u = (r >> 8) * 2**-24 + 2**-25``; words (0, 1) and (2, 3) give one cosine/sine pair each

Logarithm, sine and cosine are float32 polynomials of fixed operation order (absolute error below 2e-7), so that eager,
compiled and kernel code agree bit for bit; the angle's quadrant comes from the integer word, exactly.
"""

from __future__ import annotations

import enum
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import device_word, run
from .rounding import STORAGE_DTYPES, round_to_storage

MAX_STEP = 1 << 16
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

SQRT_HALF_BITS = 0x3F3504F3
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
# log(1 + f) = f + f^2 * P(f) on [sqrt(1/2) - 1, sqrt(2) - 1]; sin, cos on [-pi/4, pi/4]; Chebyshev fits, lowest first.
LOG_COEFFICIENTS = (
    -0.4999999701976776, 0.33333322405815125, -0.2500077486038208, 0.20001976191997528, -0.1662754863500595,
    0.14188799262046814, -0.13101987540721893, 0.1282343566417694, -0.0786779373884201,
)  # fmt: skip
SIN_COEFFICIENTS = (-0.166666641831398, 0.008332745172083378, -0.00019587540009524673)
COS_COEFFICIENTS = (0.0416666641831398, -0.0013888300163671374, 2.454757850500755e-05)


class Stream(enum.IntEnum):
    """What a draw is for; a part of the counter, so that no two uses share noise."""

    PROBE_INIT = 0
    FORK = 1
    TRAJECTORY_INIT = 2
    TRAJECTORY_STEP = 3
    HELD_OUT = 4
    FINAL_EVALUATION = 5
    SAMPLE = 6
    SELECT = 7


class Draw(NamedTuple):
    """Which noise: everything a value depends on but its position in the row.

    Attributes:
        seed: 64-bit seed, number or 0-dim int64 tensor.
        rows: int64 [R], global row numbers, below 2**32.
        iteration: below 2**32; number or 0-dim int64 tensor.
        stream: a ``Stream``.
        step: below 2**16; number, 0-dim int64 tensor, or int64 [R].
    """

    seed: int | Tensor
    rows: Tensor
    iteration: int | Tensor
    stream: int
    step: int | Tensor = 0

    def on_device(self) -> Draw:
        """The same draw with all numbers as int64 tensors on the device of ``rows``, without a host round trip."""
        seed, iteration, step = (device_word(value, self.rows) for value in (self.seed, self.iteration, self.step))
        return Draw(seed, self.rows, iteration, self.stream, step)


def philox4x32_reference(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Philox-4x32 with ten rounds.

    Args:
        key: two int64 tensors holding 32-bit words.
        counter: four int64 tensors holding 32-bit words; all six broadcast against each other.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return [c0, c1, c2, c3]


def philox_words_reference(
    seed: int | Tensor, rows: Tensor, blocks: int, iteration: int | Tensor, stream: int, step: int | Tensor = 0
) -> list[Tensor]:
    """The four words of every counter block: int64 [R, blocks] each; arguments as in ``philox_normal_reference``."""
    if isinstance(step, int) and not 0 <= step < MAX_STEP:
        raise ValueError(f"step {step} does not fit the counter: 0 … {MAX_STEP - 1}")
    seed_word = device_word(seed, rows)
    key = (seed_word & _WORD, (seed_word >> 32) & _WORD)
    element = torch.arange(blocks, device=rows.device).unsqueeze(0)
    tag = (int(stream) << 16) | device_word(step, rows).reshape(-1, 1)
    return philox4x32_reference(key, (element, rows.unsqueeze(1) & _WORD, device_word(iteration, rows) & _WORD, tag))


def philox_normal(
    seed: int | Tensor,
    rows: Tensor,
    numel: int,
    iteration: int | Tensor,
    stream: int,
    step: int | Tensor = 0,
    dtype: torch.dtype = torch.float32,
    impl: str | None = None,
) -> Tensor:
    """``philox_normal_reference`` by the chosen implementation, bit for bit the same.

    Args:
        impl: see ``adagrpo_kernels._dispatch``. The kernel writes float32, bfloat16 and float16.
    """
    words = [t for t in (seed, rows, iteration, step) if isinstance(t, Tensor)]
    problem = None if dtype in STORAGE_DTYPES[1:] else f"it does not write {dtype}"

    def kernel() -> Tensor:
        from ._triton import philox

        return philox.philox_normal(Draw(seed, rows, iteration, stream, step).on_device(), numel, dtype)

    reference = lambda: philox_normal_reference(seed, rows, numel, iteration, stream, step, dtype)  # noqa: E731
    return run("philox_normal", impl, words, kernel, reference, problem)


def philox_normal_reference(
    seed: int | Tensor,
    rows: Tensor,
    numel: int,
    iteration: int | Tensor,
    stream: int,
    step: int | Tensor = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise.

    Args:
        seed: 64-bit seed, number or 0-dim int64 tensor.
        rows: int64 [R], global row numbers, below 2**32.
        numel: values per row.
        iteration: below 2**32; number or 0-dim tensor.
        stream: a ``Stream``.
        step: below 2**16; one number, or int64 [R].
        dtype: of the result: float32 noise, rounded.

    Returns:
        [R, numel] in ``dtype``.

    Raises:
        ValueError: a step that does not fit the counter.
    """
    words = philox_words_reference(seed, rows, math.ceil(numel / 4), iteration, stream, step)
    pairs = [_box_muller(words[0], words[1]), _box_muller(words[2], words[3])]
    noise = torch.stack([value for pair in pairs for value in pair], -1).flatten(1)[:, :numel]
    return noise.to(dtype) if dtype is torch.float64 else round_to_storage(noise, dtype).to(dtype)


def philox_uniform_reference(
    seed: int | Tensor, rows: Tensor, iteration: int | Tensor, stream: int, step: int | Tensor = 0
) -> Tensor:
    """One float32 in [0, 1) per row, [R]: ``(r >> 8) * 2**-24`` of the first word; arguments as for the normal noise."""
    word = philox_words_reference(seed, rows, 1, iteration, stream, step)[0]
    return (word.flatten() >> 8).float() * 2.0**-24


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32x32-bit product, in 16-bit halves so that int64 does not overflow."""
    low, high = constant * (word & 0xFFFF), constant * (word >> 16)
    return ((low >> 16) + high) >> 16, (low + ((high & 0xFFFF) << 16)) & _WORD


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def _log(u: Tensor) -> Tensor:
    bits = u.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    e = exponent.float()
    return (e * LN2_LOW + f * f * _horner(f, LOG_COEFFICIENTS)) + f + e * LN2_HIGH


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    u = (radius_word >> 8).float() * 2.0**-24 + 2.0**-25
    # float32 sqrt of PyTorch on a CPU is not correctly rounded (MKL); through float64 it is, exactly as on a GPU.
    radius = (-2.0 * _log(u)).double().sqrt().float()
    turn = angle_word >> 8
    quadrant = turn >> 22
    # Offset from the quadrant's middle, in [-pi/4, pi/4]; the angle is quadrant*pi/2 + pi/4 + t.
    t = ((turn & 0x3FFFFF).float() + (0.5 - 2.0**21)) * (math.pi / 2 * 2.0**-22)
    y = t * t
    sin = t + t * y * _horner(y, SIN_COEFFICIENTS)
    cos = 1.0 - 0.5 * y + y * y * _horner(y, COS_COEFFICIENTS)
    scaled = radius * math.sqrt(0.5)
    first, second = scaled * (cos - sin), scaled * (cos + sin)
    swap, flip_cos, flip_sin = (quadrant & 1) == 1, (quadrant == 1) | (quadrant == 2), quadrant >= 2
    c, s = torch.where(swap, second, first), torch.where(swap, first, second)
    return torch.where(flip_cos, -c, c), torch.where(flip_sin, -s, s)
