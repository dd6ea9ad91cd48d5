"""What torch says of the device: whether its memory ran out, whether its stream is being captured."""

from __future__ import annotations

import torch

OUT_OF_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory ran out: the allocator's own, or what the driver or a library that
    allocates by itself (graph instantiation, cuBLAS handles, Triton launches) makes of it."""
    inner = getattr(error, "inner_exception", None)  # of what torch.compile raises
    if isinstance(error, torch.OutOfMemoryError) or isinstance(inner, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)


def capturing() -> bool:
    """Whether the current stream is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
