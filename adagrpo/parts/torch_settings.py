"""The global switches of torch that change what other code computes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

Read = Callable[[], Any]
Write = Callable[[Any], object]
_CUDA: Any = torch.backends.cuda
_CUDNN: Any = torch.backends.cudnn
_MKLDNN: Any = torch.backends.mkldnn


def _attribute(owner: Any, name: str) -> tuple[Read, Write]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def _autocast(device: str) -> tuple[Read, Write]:
    return lambda: torch.is_autocast_enabled(device), lambda value: torch.set_autocast_enabled(device, value)


def _set_default_device(device: torch.device) -> None:
    # Any device but None, the CPU too, costs every later call of torch a detour through Python.
    torch.set_default_device(None if device.type == "cpu" else device)


# The older names of TF32 come before the newer, of which they write several.
SETTINGS: dict[str, tuple[Read, Write]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (torch.get_default_device, _set_default_device),
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "deterministic algorithms": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    "anomaly detection": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "autocast on CUDA": _autocast("cuda"),
    "autocast on CPU": _autocast("cpu"),
    "matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "TF32 of products": _attribute(_CUDA.matmul, "allow_tf32"),
    "TF32 of cuDNN": _attribute(_CUDNN, "allow_tf32"),
    "precision": _attribute(torch.backends, "fp32_precision"),
    "precision of CUDA products": _attribute(_CUDA.matmul, "fp32_precision"),
    "precision of cuDNN": _attribute(_CUDNN, "fp32_precision"),
    "precision of cuDNN convolutions": _attribute(_CUDNN.conv, "fp32_precision"),
    "precision of cuDNN RNNs": _attribute(_CUDNN.rnn, "fp32_precision"),
    "precision of oneDNN": _attribute(_MKLDNN, "fp32_precision"),
    "precision of oneDNN products": _attribute(_MKLDNN.matmul, "fp32_precision"),
    "precision of oneDNN convolutions": _attribute(_MKLDNN.conv, "fp32_precision"),
    "reduced precision of bf16 sums": _attribute(_CUDA.matmul, "allow_bf16_reduced_precision_reduction"),
    "reduced precision of fp16 sums": _attribute(_CUDA.matmul, "allow_fp16_reduced_precision_reduction"),
    "fp16 accumulation": _attribute(_CUDA.matmul, "allow_fp16_accumulation"),
    "cuDNN": _attribute(_CUDNN, "enabled"),
    "cuDNN benchmark": _attribute(_CUDNN, "benchmark"),
    "cuDNN deterministic": _attribute(_CUDNN, "deterministic"),
    "flash attention": (_CUDA.flash_sdp_enabled, _CUDA.enable_flash_sdp),
    "memory-efficient attention": (_CUDA.mem_efficient_sdp_enabled, _CUDA.enable_mem_efficient_sdp),
    "plain attention": (_CUDA.math_sdp_enabled, _CUDA.enable_math_sdp),
    "cuDNN attention": (_CUDA.cudnn_sdp_enabled, _CUDA.enable_cudnn_sdp),
}


OF_THREAD = ("default device", "threads", "autocast on CUDA", "autocast on CPU")
"""Those that each thread has for itself."""


def read_settings(names: Iterable[str] = SETTINGS) -> dict[str, Any]:
    """Switches; None where torch refuses to name one, since it was set by an older and a newer name."""
    return {name: _read(SETTINGS[name][0]) for name in names}


@contextlib.contextmanager
def kept_settings(names: Iterable[str] = SETTINGS) -> Iterator[None]:
    """Whatever was switched inside, of ``names``, is switched back."""
    before = read_settings(names)
    try:
        yield
    finally:
        write_settings(before)


def write_settings(values: dict[str, Any]) -> None:
    """Bring switches back to what ``read_settings`` gave; one that torch refuses keeps no other from it."""
    for name, value in values.items():
        read, write = SETTINGS[name]
        if value is not None and _read(read) != value:
            with contextlib.suppress(RuntimeError):
                write(value)


def _read(read: Read) -> Any:
    try:
        return read()
    except RuntimeError:
        return None
