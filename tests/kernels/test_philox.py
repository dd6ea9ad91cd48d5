"""Counter-based noise against the published Philox answers, a pure-integer Philox and a float64 Box-Muller."""

from __future__ import annotations

import math
import random

import pytest
import torch
from adagrpo_kernels import Stream, philox4x32_reference, philox_normal_reference, philox_uniform_reference
from adagrpo_kernels.philox import _box_muller, philox_words_reference
from scipy import stats
from torch import Tensor

WORD = 2**32
Words = tuple[int, int, int, int]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox-4x32-10 (Salmon et al. 2011) on Python's unbounded integers."""
    a, b, c, d = counter
    for turn in range(10):
        k0, k1 = (key[0] + turn * 0x9E3779B9) % WORD, (key[1] + turn * 0xBB67AE85) % WORD
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q // WORD) ^ b ^ k0, q % WORD, (p // WORD) ^ d ^ k1, p % WORD
    return a, b, c, d


def block(seed: int, row: int, element: int, iteration: int, stream: int, step: int) -> Words:
    return philox((element // 4, row, iteration, stream * 2**16 + step), (seed % WORD, seed // WORD % WORD))


def box_muller(radius_word: int, angle_word: int) -> tuple[float, float, float]:
    """Cosine and sine value in float64, and the radius."""
    u, angle = ((word // 256 + 0.5) / 2**24 for word in (radius_word, angle_word))
    radius = math.sqrt(-2 * math.log(u))
    return radius * math.cos(2 * math.pi * angle), radius * math.sin(2 * math.pi * angle), radius


def tolerance(radius: float) -> float:
    """float32 rounds u by up to 2**-25, which the radius feels most where it is small."""
    return 1e-6 + 2.0**-24 / radius


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    """Random123's kat_vectors; the pure-integer Philox of this file has to pass them too."""
    c, k, expected = ([int(word, 16) for word in text.split()] for text in (counter, key, answer))
    assert list(philox((c[0], c[1], c[2], c[3]), (k[0], k[1]))) == expected
    k0, k1, c0, c1, c2, c3 = (torch.tensor(word) for word in (*k, *c))
    words = philox4x32_reference((k0, k1), (c0, c1, c2, c3))
    assert [int(word) for word in words] == expected


@pytest.mark.parametrize("seed", [0, 1, 0xDEADBEEF, WORD - 1, WORD, 5 * WORD + 7, 2**63 - 1, -1, -3 * WORD + 11])
def test_counter_layout(seed: int) -> None:
    draw = random.Random(seed)
    rows = [0, 1, WORD - 1] + [draw.randrange(WORD) for _ in range(5)]
    steps = [0, 1, 2**16 - 1] + [draw.randrange(2**16) for _ in range(5)]
    iteration, stream, blocks = draw.randrange(WORD), draw.randrange(len(Stream)), 5
    words = philox_words_reference(seed, torch.tensor(rows), blocks, iteration, stream, torch.tensor(steps))
    assert len(words) == 4
    assert all(word.shape == (len(rows), blocks) for word in words)
    for r, (row, step) in enumerate(zip(rows, steps, strict=True)):
        for j in range(blocks):
            expected = block(seed, row, 4 * j, iteration, stream, step)
            assert tuple(int(word[r, j]) for word in words) == expected


def test_normal_is_box_muller_of_the_words() -> None:
    seed, rows, iteration, step, numel = 3 * WORD + 17, [0, 5, 123_456_789], 42, 6, 401
    noise = philox_normal_reference(seed, torch.tensor(rows), numel, iteration, Stream.FORK, step)
    assert noise.dtype is torch.float32
    assert noise.shape == (3, numel)
    for r, row in enumerate(rows):
        for element in range(numel):
            words = block(seed, row, element, iteration, 1, step)
            lane = element % 4
            pair = box_muller(words[lane // 2 * 2], words[lane // 2 * 2 + 1])
            assert float(noise[r, element]) == pytest.approx(pair[lane % 2], abs=tolerance(pair[2]))


def test_extreme_words() -> None:
    """Both ends of the uniform and both sides of every quadrant border."""
    quarter = [k * 2**30 + delta for k in range(1, 4) for delta in (-256, 0)]
    radii = [0, 256, WORD // 2 - 256, WORD // 2, 3037000192, WORD - 512, WORD - 256]
    angles = [0, 2**29, *quarter, WORD - 1]
    for radius_word in radii:
        for angle_word in angles:
            actual = [float(t) for t in _box_muller(torch.tensor([radius_word]), torch.tensor([angle_word]))]
            cosine, sine, radius = box_muller(radius_word, angle_word)
            assert actual == pytest.approx([cosine, sine], abs=tolerance(radius)), (radius_word, angle_word)


def test_no_batch_split_changes_a_value() -> None:
    seed, iteration, numel = 11, 3, 30
    rows = torch.tensor([7, 0, 2**31, 12, 3])
    whole = philox_normal_reference(seed, rows, numel, iteration, Stream.PROBE_INIT, 9)
    for part in ([0, 1], [4], [3, 2, 1, 0]):
        alone = philox_normal_reference(seed, rows[part], numel, iteration, Stream.PROBE_INIT, 9)
        assert torch.equal(alone, whole[part])
    for shorter in (1, 4, 7, 29):
        prefix = philox_normal_reference(seed, rows, shorter, iteration, Stream.PROBE_INIT, 9)
        assert torch.equal(prefix, whole[:, :shorter])


def test_tensor_arguments_and_steps_per_row() -> None:
    rows, steps = torch.tensor([4, 4, 9]), torch.tensor([0, 2, 2])
    together = philox_normal_reference(torch.tensor(5 * WORD + 1), rows, 8, torch.tensor(77), Stream.FORK, steps)
    for r in range(3):
        alone = philox_normal_reference(5 * WORD + 1, rows[r : r + 1], 8, 77, Stream.FORK, int(steps[r]))
        assert torch.equal(together[r : r + 1], alone)
    assert not torch.equal(together[0], together[1])


@pytest.fixture(scope="module")
def sample() -> Tensor:
    return philox_normal_reference(1234, torch.arange(256), 1024, 0, Stream.PROBE_INIT).double()


def test_moments_and_distribution(sample: Tensor) -> None:
    flat = sample.flatten()
    n = flat.numel()
    # Standard errors of the first four moments of a standard normal: sqrt(1, 2, 15, 96)/sqrt(n).
    for power, (moment, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], 1):
        assert abs(float(flat.pow(power).mean()) - moment) < 4 * math.sqrt(variance / n), power
    assert stats.kstest(flat.numpy(), "norm").pvalue > 1e-3
    lanes = sample.reshape(256, 256, 4).permute(2, 0, 1).flatten(1)
    for lane in lanes:
        assert stats.kstest(lane.numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("change", ["row", "element", "step", "iteration", "stream", "seed low", "seed high"])
def test_neighbours_are_uncorrelated(sample: Tensor, change: str) -> None:
    rows = torch.arange(256)
    other = {
        "row": lambda: philox_normal_reference(1234, rows + 1, 1024, 0, Stream.PROBE_INIT),
        "element": lambda: sample.roll(1, dims=1),
        "step": lambda: philox_normal_reference(1234, rows, 1024, 0, Stream.PROBE_INIT, 1),
        "iteration": lambda: philox_normal_reference(1234, rows, 1024, 1, Stream.PROBE_INIT),
        "stream": lambda: philox_normal_reference(1234, rows, 1024, 0, Stream.FORK),
        "seed low": lambda: philox_normal_reference(1235, rows, 1024, 0, Stream.PROBE_INIT),
        "seed high": lambda: philox_normal_reference(1234 + WORD, rows, 1024, 0, Stream.PROBE_INIT),
    }[change]().double()
    bound = 4.5 / math.sqrt(sample.numel())
    assert abs(float((sample * other).mean())) < bound
    assert abs(float(((sample.square() - 1) * (other.square() - 1)).mean() / 2)) < bound


def test_uniform() -> None:
    seed, iteration, stream, step = 2 * WORD + 3, 8, Stream.SELECT, 5
    rows = torch.arange(4000)
    u = philox_uniform_reference(seed, rows, iteration, stream, step)
    assert u.dtype is torch.float32
    assert u.shape == (4000,)
    expected = [block(seed, row, 0, iteration, 7, step)[0] // 256 / 2**24 for row in range(4000)]
    assert u.tolist() == expected
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3


def test_streams_have_fixed_numbers() -> None:
    """A stream's number is part of every stored run: it must not move."""
    assert [(stream.name, int(stream)) for stream in Stream] == [
        ("PROBE_INIT", 0),
        ("FORK", 1),
        ("TRAJECTORY_INIT", 2),
        ("TRAJECTORY_STEP", 3),
        ("HELD_OUT", 4),
        ("FINAL_EVALUATION", 5),
        ("SAMPLE", 6),
        ("SELECT", 7),
    ]
