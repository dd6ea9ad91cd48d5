"""The kernel's noise is the reference's, bit for bit; so are its statistics, which test_philox.py checks."""

from __future__ import annotations

import pytest
import torch
from adagrpo_kernels import philox_normal
from adagrpo_kernels.philox import Draw
from hypothesis import given, settings
from hypothesis import strategies as st

ROWS = torch.tensor([0, 5, 2**31 + 7, 2**32 - 1])
STEPS = torch.tensor([0, 3, 65535, 1])
# First words of Philox-4x32-10 for counter and key of all zeros and all ones (Random123, kat_vectors).
KNOWN = {0: (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8), 2**32 - 1: (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)}


def both(device: str, seed: int, rows: torch.Tensor, numel: int, iteration: int, stream: int, step, dtype=torch.float32):
    on = lambda t: t.to(device) if isinstance(t, torch.Tensor) else t  # noqa: E731
    found = philox_normal(seed, on(rows), numel, iteration, stream, on(step), dtype, "triton")
    return found.cpu(), philox_normal(seed, rows, numel, iteration, stream, step, dtype, "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [1, 2, 63, 65, 4096])
def test_bitwise(device: str, numel: int, dtype: torch.dtype) -> None:
    found, expected = both(device, (123 << 32) + 77, ROWS, numel, 9, 3, STEPS, dtype)
    assert found.shape == (4, numel) and found.dtype is dtype
    assert torch.equal(found, expected)


@pytest.mark.proof
def test_bitwise_long_rows(device: str) -> None:
    assert torch.equal(*both(device, 2**64 - 1, ROWS, 65537, 2**32 - 1, 7, STEPS))


@pytest.mark.parametrize("rows", [0, 1, 33])
def test_number_of_rows(device: str, rows: int) -> None:
    found, expected = both(device, 3, torch.arange(rows) * 7, 100, 1, 0, 5)
    assert found.shape == (rows, 100) and torch.equal(found, expected)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 7), st.integers(0, 65535)
)
def test_every_part_of_the_counter(seed: int, row: int, iteration: int, stream: int, step: int) -> None:
    assert torch.equal(*both("cpu", seed, torch.tensor([row]), 9, iteration, stream, step))


def test_numbers_on_the_device_are_numbers() -> None:
    draw = Draw(2**63 + 5, torch.arange(3), 4, 2, 6)
    words = draw.on_device()
    assert all(isinstance(t, torch.Tensor) and t.dtype is torch.int64 for t in (words.seed, words.iteration, words.step))
    plain = philox_normal(draw.seed, draw.rows, 5, draw.iteration, draw.stream, draw.step, impl="reference")
    again = philox_normal(words.seed, words.rows, 5, words.iteration, words.stream, words.step, impl="triton")
    assert torch.equal(plain, again)


@pytest.mark.parametrize("word", KNOWN)
def test_known_answers(word: int) -> None:
    """The device function's words, through the kernel the noise uses."""
    import triton
    import triton.language as tl

    @triton.jit
    def words(out_ptr, seed_ptr, counter_ptr):
        zero = tl.zeros([1], tl.int32) + tl.load(counter_ptr).to(tl.int32)
        w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), zero, zero, zero, zero)
        at = tl.arange(0, 1)
        tl.store(out_ptr + at, w0.to(tl.int64))
        tl.store(out_ptr + 1 + at, w1.to(tl.int64))
        tl.store(out_ptr + 2 + at, w2.to(tl.int64))
        tl.store(out_ptr + 3 + at, w3.to(tl.int64))

    out = torch.zeros(4, dtype=torch.int64)
    words[(1,)](out, torch.tensor(-1 if word else 0), torch.tensor(word))
    assert tuple(out.tolist()) == KNOWN[word]
