"""Thin adapters that send the metrics of ``metrics.jsonl`` to a dashboard as well."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import InputError


class Logger(Protocol):
    """Receives the numbers of each iteration."""

    def log(self, numbers: Mapping[str, float], iteration: int) -> None: ...
    def close(self) -> None: ...


class TensorBoardLogger:
    """Event files under ``<run>/tensorboard``."""

    def __init__(self, name: str, folder: Path, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, numbers: Mapping[str, float], iteration: int) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, iteration)

    def close(self) -> None:
        self._writer.close()


class ModuleLogger:
    """Weights & Biases, or trackio, which speaks the same calls."""

    def __init__(self, module: Any, name: str, folder: Path, config: dict[str, Any]) -> None:
        self._module = module
        where = {"dir": str(folder), "resume": "allow", "id": name} if module.__name__ == "wandb" else {}
        module.init(project="adagrpo", name=name, config=config, **where)

    def log(self, numbers: Mapping[str, float], iteration: int) -> None:
        self._module.log(dict(numbers), step=iteration)

    def close(self) -> None:
        self._module.finish()


def check_loggers(names: Sequence[str]) -> None:
    """Refuse a dashboard whose package is missing.

    Raises:
        InputError: naming the package and how to install it.
    """
    for name in names:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise InputError(f"output.loggers: {name} is not installed; pip install 'adagrpo[log]'")


def open_loggers(names: Sequence[str], run_name: str, folder: Path, config: dict[str, Any]) -> list[Logger]:
    """The loggers of ``output.loggers``.

    Raises:
        InputError: a package is missing.
    """
    loggers: list[Logger] = []
    for name in names:
        try:
            if name == "tensorboard":
                loggers.append(TensorBoardLogger(run_name, folder, config))
            else:
                loggers.append(ModuleLogger(importlib.import_module(name), run_name, folder, config))
        except ImportError as error:
            raise InputError(f"output.loggers: {name} is not installed; pip install 'adagrpo[log]'") from error
    return loggers
