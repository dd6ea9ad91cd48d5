"""Numbers as other people's trainers hold them: tensors of any real dtype, numpy arrays, lists."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor


def real_tensor(value: Any, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """``value`` as a dense tensor without a gradient.

    Args:
        value: a tensor, which stays on its device, or anything numpy makes a numeric array of. Truth values are 0 and 1; masked
            entries of a numpy array are NaN.
        name: for messages.
        dtype: of the result; None keeps float64 arrays and tensors, and makes float32 of everything else.

    Raises:
        TypeError: not real numbers, or a sparse or quantised tensor.
        ValueError: rows of different lengths.
    """
    if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
        if len({getattr(item, "shape", None) for item in value}) > 1 or not all(isinstance(item, Tensor) for item in value):
            raise ValueError(f"{name}: a list of tensors must hold tensors of one shape only")
        value = torch.stack([item.detach() for item in value])
    if isinstance(value, Tensor):
        if value.is_complex() or value.layout is not torch.strided or value.is_quantized:
            raise TypeError(f"{name} must be a dense tensor of real numbers; it is {value.layout}, {value.dtype}")
        found = value.detach()
        double = found.dtype is torch.float64
    else:
        array = _array(value, name)
        double = array.dtype == numpy.float64 and not isinstance(value, list | tuple | float)
        found = torch.from_numpy(array.astype(numpy.float64))
    return found.to(dtype or (torch.float64 if double else torch.float32))


def _array(value: Any, name: str) -> Any:
    try:
        array = numpy.asanyarray(value)
    except ValueError as error:
        raise ValueError(f"{name} must be a rectangle of numbers: {error}") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be real numbers; it is {type(value).__name__} of {array.dtype}")
    if isinstance(array, numpy.ma.MaskedArray):
        return numpy.ma.filled(array.astype(numpy.float64), numpy.nan)
    return array
