"""Scores out of a pickle, for servers that answer in nothing else. Unpickling runs what the sender names: nothing is here.

Numbers, text, bytes, lists, tuples, sets and dictionaries are built as pickle builds them. Scalars and arrays of numpy become
lists of numbers, read here from their raw bytes: neither numpy nor any other module is imported or called for them.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
from collections.abc import Callable
from typing import Any

_FORMATS = {"f2": "e", "f4": "f", "f8": "d", "b1": "?", "i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I"}
_FORMATS |= {"i8": "q", "u8": "Q"}
_MOST = 10**6
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
# They look up what no answer of plain values needs.
_REFUSED = {"PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEWOBJ_EX", "NEXT_BUFFER", "READONLY_BUFFER"}


def restricted_loads(content: bytes) -> Any:
    """The value of a pickle of plain values; arrays and scalars of numpy as lists and numbers.

    Raises:
        ValueError: not a pickle, or one that holds anything else, which is named.
    """
    try:
        for operation, argument, _ in pickletools.genops(content):  # finds lengths that are not there, too
            if operation.name in _REFUSED:
                raise pickle.UnpicklingError(f"the operation {operation.name} is refused")
            if operation.name.endswith("PUT") and int(argument or 0) > len(content):  # reserves so many places
                raise pickle.UnpicklingError(f"it numbers a value {argument}")
        unpickler = _Unpickler(io.BytesIO(content))
        return _Plain(unpickler.array)(unpickler.load())
    except pickle.UnpicklingError as error:
        raise ValueError(f"not a pickle of plain values: {error}") from error
    except Exception as error:  # a broken pickle raises whatever its operations do
        raise ValueError(f"a broken pickle: {type(error).__name__}: {error}") from error


class _Plain:
    """A value with numbers in the place of ``array``s; what names the same list again and again ends at a million items."""

    def __init__(self, array: type) -> None:
        self.array, self.left = array, _MOST

    def __call__(self, value: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError(f"it holds more than {_MOST} values")
        if isinstance(value, self.array):
            return value.numbers()  # type: ignore[attr-defined]
        if isinstance(value, list | tuple):
            return [self(item) for item in value]
        if isinstance(value, dict):
            return {key: self(item) for key, item in value.items()}
        return value


class _Unpickler(pickle.Unpickler):
    """Looks nothing up: what numpy's pickles name has stand-ins, made for this pickle alone, since it could change them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.array, self._known = _stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is refused")
        return self._known[module, name]


def _stand_ins() -> tuple[type, dict[tuple[str, str], Callable[..., Any]]]:
    """The class of arrays and scalars, and what stands for each thing that numpy's pickles name."""

    class DType:
        def __init__(self, code: str, *_: Any) -> None:
            self.code, self.order = code, "<"

        def __setstate__(self, state: tuple[Any, ...]) -> None:
            self.order = ">" if state[1] == ">" else "<"

    class Array:
        def __init__(self, *_: Any) -> None:
            self.shape: tuple[int, ...] | None = None
            self.dtype, self.fortran, self.raw = DType("f8"), False, b""

        def __setstate__(self, state: tuple[Any, ...]) -> None:
            _, self.shape, self.dtype, self.fortran, self.raw = state

        def numbers(self) -> Any:
            code = _FORMATS.get(self.dtype.code)
            if code is None:
                raise pickle.UnpicklingError(f"it holds an array of {self.dtype.code}, not of numbers")
            shape = self.shape or ()
            count = math.prod(shape)
            if len(shape) > 8 or not 0 <= count <= _MOST or (self.fortran and len(shape) > 1):
                raise pickle.UnpicklingError("it holds an array of another layout or size than scores have")
            values = struct.unpack(f"{self.dtype.order}{count}{code}", self.raw)
            return _shaped(values, shape)

    def scalar(dtype: Any, raw: bytes) -> Array:
        one = Array()
        one.dtype, one.raw = dtype, raw
        return one

    def from_buffer(raw: Any, dtype: Any, shape: tuple[int, ...], order: str) -> Array:
        one = Array()
        one.__setstate__((1, shape, dtype, order == "F", bytes(raw)))
        return one

    def latin1(text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"it holds text in {encoding}")
        return text.encode("latin-1")

    known: dict[tuple[str, str], Callable[..., Any]] = {("numpy", "dtype"): DType, ("numpy", "ndarray"): Array}
    known |= {(module, "scalar"): scalar for module in _MULTIARRAY}
    known |= {(module, "_reconstruct"): lambda *_: Array() for module in _MULTIARRAY}
    known |= {(module, "_frombuffer"): from_buffer for module in _NUMERIC}
    known |= {("_codecs", "encode"): latin1, ("__builtin__", "bytes"): lambda: b""}
    return Array, known


def _shaped(values: tuple[Any, ...], shape: tuple[int, ...]) -> Any:
    if not shape:
        return values[0]
    step = len(values) // shape[0] if shape[0] else 0
    return [_shaped(values[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]
