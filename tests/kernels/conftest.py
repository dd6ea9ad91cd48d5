"""Where a kernel runs: Triton's interpreter (chosen in ``tests/conftest.py``), or a CUDA device."""

from __future__ import annotations

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:(invalid value|divide by zero|overflow):RuntimeWarning")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the kernel runs: the interpreter, or with `-m gpu` a CUDA device."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: not measured")
    return request.param


@pytest.fixture(autouse=True)
def one_thread():
    """The interpreter is Python; torch's threads would only take turns with it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
