"""Thin adapters that send the metrics of ``metrics.jsonl`` to a dashboard as well."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..disk.files import told, write_error
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


class Dashboard:
    """A logger whose failures do not end the run: it is told once and left out from then on; a full disk ends it.

    As a context it closes the logger; a failure to do so hides no error that is on its way already.
    """

    def __init__(self, name: str, logger: Logger, folder: Path, say: Callable[[str], object]) -> None:
        self.name, self._logger, self._folder, self._say = name, logger, folder, say
        self._failed = False

    def log(self, numbers: Mapping[str, float], iteration: int) -> None:
        """Pass on the numbers of an iteration.

        Raises:
            WriteError: the disk is full.
        """
        if not self._failed:
            self._try(lambda: self._logger.log(numbers, iteration))

    def __enter__(self) -> Dashboard:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._try(self._logger.close)
        else:
            told(self._logger.close, self._say)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self._failed = True
            if (failure := write_error(self._folder / self.name, error)).disk:
                raise failure from error
            self._say(f"output.loggers: {self.name} failed and is left out: {type(error).__name__}: {error}")


def open_loggers(
    names: Sequence[str], run_name: str, folder: Path, config: dict[str, Any], say: Callable[[str], object]
) -> list[Dashboard]:
    """The loggers of ``output.loggers``.

    Raises:
        InputError: a package is missing, or a dashboard cannot be opened.
        WriteError: the disk is full.
    """
    loggers: list[Dashboard] = []
    for name in names:
        try:
            if name == "tensorboard":
                logger: Logger = TensorBoardLogger(run_name, folder, config)
            else:
                logger = ModuleLogger(importlib.import_module(name), run_name, folder, config)
        except ImportError as error:
            raise InputError(f"output.loggers: {name} is not installed; pip install 'adagrpo[log]'") from error
        except Exception as error:
            if (failure := write_error(folder / name, error)).disk:
                raise failure from error
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"output.loggers: {name} cannot be opened: {reason}; or drop it") from error
        loggers.append(Dashboard(name, logger, folder, say))
    return loggers
