"""What rewards share that score picture by picture on the host, with a model that their package ships."""

from __future__ import annotations

import importlib.util
import os
import threading
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError

if TYPE_CHECKING:
    from numpy import ndarray

_MOST_WORKERS = 8


class HostReward:
    """Scores pictures one by one, several at once, in threads that all calls share. Subclasses say ``one``.

    Args:
        name: of the reward, for messages.
        workers: threads; 0 is one per core, 8 at most.

    Attributes:
        failures: images without a score so far, by reason.

    Raises:
        InputError: ``workers`` is negative.
    """

    host = True
    threads = 2  # a call's last pictures leave workers idle: the next call's take them

    def __init__(self, name: str, workers: int) -> None:
        check_workers(name, workers)
        self.name = name
        self.failures: Counter[str] = Counter()
        self._counting = threading.Lock()
        count = workers or min(os.cpu_count() or 1, _MOST_WORKERS)
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=f"adagrpo-{name}")

    def one(self, picture: ndarray[Any, Any], prompt: str) -> float:
        """The score of an RGB picture uint8 [H, W, 3]; called in several threads at once. Whatever it raises makes it NaN."""
        raise NotImplementedError

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images uint8 [N, 3, H, W] on the CPU and N prompts -> scores [N] float32; NaN, and a warning that says why, where
        one could not be told."""
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8 or images.device.type != "cpu":
            found = f"{images.dtype} {tuple(images.shape)} on {images.device}"
            raise ValueError(f"images must be uint8 of shape [N, 3, H, W] on the CPU, got {found}")
        if len(prompts) != len(images):
            raise ValueError(f"{len(images)} images need as many prompts, got {len(prompts)}")
        pictures = images.permute(0, 2, 3, 1).contiguous().numpy()
        scored = list(self._pool.map(self._tried, pictures, prompts))
        failed = Counter(reason for _, reason in scored if reason)
        with self._counting:
            self.failures = self.failures + failed
        return torch.tensor([score for score, _ in scored], dtype=torch.float32)

    def _tried(self, picture: ndarray[Any, Any], prompt: str) -> tuple[float, str]:
        """The score, and why there is none."""
        try:
            return self.one(picture, prompt), ""
        except Exception as error:  # whatever an engine raises: the picture has no score, and the guard counts it
            return no_score(self.name, error)


def no_score(name: str, error: Exception) -> tuple[float, str]:
    """NaN and the reason, in a word or two, after a warning that says all of it."""
    said = str(error).strip() or type(error).__name__
    warnings.warn(f"rewards: {name}: no score: {said.splitlines()[-1]}", RuntimeWarning, stacklevel=2)
    return float("nan"), "refused prompt" if isinstance(error, InputError) else type(error).__name__


def check_workers(name: str, workers: int) -> None:
    """Refuse a number of threads that cannot be.

    Raises:
        InputError: it is negative.
    """
    if workers < 0:
        raise InputError(f"rewards: {name}: workers = {workers}: a number of threads, or 0 for one per core")


def package_folder(package: str, name: str, needs: Sequence[str] = ()) -> Path:
    """Folder of the package that ships a reward's model; nothing is imported.

    Args:
        name: of the reward.
        needs: other packages that it runs on.

    Raises:
        InputError: one of them is not installed.
    """
    for module in (package, *needs):
        if importlib.util.find_spec(module) is None:
            raise InputError(f"rewards: {name}: {module} is not installed; pip install 'adagrpo[rewards]'")
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def shipped(folder: Path, pattern: str, name: str) -> Path:
    """The one file of that pattern in a package's folder: it is handed over by path, so that nothing is ever downloaded.

    Raises:
        InputError: there is none, or more than one.
    """
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise InputError(
            f"rewards: {name}: {folder} holds {len(found)} files {pattern}, not one: the package is damaged, or its version "
            "is not known here; pip install --force-reinstall 'adagrpo[rewards]'"
        )
    return found[0]
