"""The state dict of one published file, and the module that takes it whole.

Scorers are published as a file of a Hub repository without an architecture that a library could read. Here such a file is
found, compared with a module by its header before a value is read, and loaded without a tensor to spare on either side.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..disk.turns import hub_folder, in_turn, once
from ..errors import InputError
from ..models.loading import check_finite, first_line, quiet, read_pickled, reading, refuse_differences
from ..models.registry import Component

M = TypeVar("M", bound=nn.Module)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_NESTS = ("state_dict", "model", "module")  # keys under which a checkpoint keeps its model's tensors
_PARALLEL = "module."  # before every name, where a model was saved inside DataParallel
_WORDS = ("tokenizer.json", "vocab.json", "vocab.txt")  # what a tokenizer cannot do without
_QUANTISED = "name the weights in bf16, fp16 or fp32"


def known_file(path: str, name: str, where: str) -> Path | None:
    """The file that ``path`` means, without the network; None for a Hub id whose file was not downloaded yet.

    Args:
        path: the file itself, a folder that holds it, or a Hub id of the form owner/name.
        name: of the file in a folder or repository.
        where: first words of an error.

    Raises:
        InputError: neither, or a folder that holds no such file.
    """
    place = Path(path)
    if place.is_file():
        return place
    if place.is_dir():
        if not (place / name).is_file():
            held = ", ".join(sorted(file.name for file in place.iterdir())[:5]) or "nothing"
            raise InputError(f"{where}: this folder holds no {name} (but {held}); name the folder or the file itself")
        return place / name
    refuse_form(path, where)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, name)
    return Path(cached) if isinstance(cached, str) else None


def find_file(path: str, name: str, where: str) -> Path:
    """As ``known_file``; a Hub id's file is downloaded unless ``HF_HUB_OFFLINE`` is set.

    Raises:
        InputError: see ``known_file``, or a file that cannot be downloaded.
    """
    if (file := known_file(path, name, where)) is not None:
        return file
    from huggingface_hub import hf_hub_download

    try:
        return Path(once(hub_folder(), f"file {path} {name}", lambda: str(hf_hub_download(path, name))))
    except Exception as error:  # the Hub raises types of its own
        raise InputError(
            f"{where}: {name} cannot be downloaded from here ({first_line(error)}); fetch it where the network is, with "
            f"`hf download {path} {name}`, and name the file"
        ) from error


def is_hub_id(path: str) -> bool:
    """Whether a name has the form of a Hub id, owner/name; one that ends as a file of weights does is a file's."""
    ends = (".safetensors", *_PICKLED)
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None and not path.endswith(ends)


def refuse_form(path: str, where: str) -> None:
    """Refuse what is neither a file or folder here nor has the form of a Hub id.

    Raises:
        InputError: it is neither.
    """
    if not Path(path).exists() and not is_hub_id(path):
        raise InputError(f"{where}: no such file or folder, nor a Hub id of the form owner/name")


def read_dtype(name: str, where: str) -> torch.dtype:
    """The dtype of a reward's weights by its name in recipes.

    Raises:
        InputError: neither ``fp32`` nor ``bf16``.
    """
    if name not in DTYPES:
        raise InputError(f"{where}: dtype = {name}: one of {', '.join(DTYPES)}")
    return DTYPES[name]


def load_tokenizer(source: str, where: str) -> Any:
    """The tokenizer of a folder or Hub id (downloaded unless ``HF_HUB_OFFLINE`` is set).

    Raises:
        InputError: there is none, or it cannot be downloaded.
    """
    refuse_form(source, where)
    if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in _WORDS):
        # transformers would make a tokenizer of few words
        raise InputError(
            f"{where}: {source} holds no tokenizer: none of {', '.join(_WORDS)}; name a folder that holds its files"
        )
    from transformers import AutoTokenizer

    turn = contextlib.nullcontext() if Path(source).is_dir() else in_turn(hub_folder(), f"tokenizer {source}")
    try:
        with quiet(bars=False), turn:
            return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # the tokenizers library raises what derives from nothing narrower
        raise InputError(
            f"{where}: no tokenizer can be loaded from {source} ({first_line(error)}); name a folder that holds its files, or "
            "a Hub id that can be downloaded from here"
        ) from error


def read_state(file: Path, where: str, device: str = "cpu") -> dict[str, Tensor]:
    """Tensors of a file by name, mapped into memory; ``device = "meta"`` reads shapes and dtypes only.

    A state dict that lies under ``state_dict``, ``model`` or ``module`` is taken out of there, and ``module.`` before every
    name is left away.

    Raises:
        InputError: no file of weights, one that cannot be read (see ``models.loading.reading``), or anything but tensors in it.
    """
    with reading(file, where):
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, "pt") as opened:
                content: Any = {name: opened.get_tensor(name).to(device) for name in opened.keys()}  # noqa: SIM118
        elif file.suffix in _PICKLED:
            content = read_pickled(file, device)
        else:
            raise InputError(f"{where}: {file} is no file of weights; name one that ends in .safetensors or {_PICKLED[0]}")
    while isinstance(content, Mapping) and (nest := next((k for k in _NESTS if isinstance(content.get(k), Mapping)), None)):
        content = content[nest]
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{where}: {file} holds no tensors by name; save a state dict")
    if others := [str(name) for name, value in content.items() if not isinstance(value, Tensor)]:
        raise InputError(f"{where}: {file} holds {others[0]}, which is no tensor; save the model's state dict alone")
    parallel = all(name.startswith(_PARALLEL) for name in content)
    return {name.removeprefix(_PARALLEL) if parallel else name: tensor for name, tensor in content.items()}


def check_state(
    module: nn.Module | Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    component: Component,
    where: str,
    described: str = "its config.json",
) -> None:
    """Compare names, shapes and dtypes of a state dict with a module's; no value is read, both may lie on the meta device.

    Args:
        module: or its state dict, where a file calls the tensors by other names.
        component: names the module in errors, and what its file may hold beyond it (``spare``).
        where: first words of an error; name the file there.
        described: what the module's shapes were taken from.

    Raises:
        InputError: naming the first tensor that is missing, unexpected, mis-shaped or quantised.
    """
    where, wanted = f"{where}: {component.name}", module.state_dict() if isinstance(module, nn.Module) else module
    shared = [name for name in wanted if name in state]
    if quantised := [n for n in shared if wanted[n].is_floating_point() and not _is_plain(state[n])]:
        raise InputError(f"{where}: {quantised[0]} is {state[quantised[0]].dtype}: quantised; {_QUANTISED}")
    shapes = {name: (tuple(state[name].shape), tuple(wanted[name].shape)) for name in shared}
    misshaped = {name: (found, meant) for name, (found, meant) in shapes.items() if found != meant}
    missing, unexpected = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    refuse_differences(component, where, missing, unexpected, misshaped, described)


def load_state(
    module: M,
    state: Mapping[str, Tensor],
    component: Component,
    where: str,
    described: str = "its config.json",
    dtype: torch.dtype | None = None,
) -> M:
    """The module with exactly these tensors, frozen, in evaluation mode, on the CPU; spare tensors are left away.

    Args:
        module: its parameters may lie on the meta device (``unfilled``); see ``check_state`` for the others.
        dtype: of the loaded tensors; None keeps the file's. Buffers that the module computes keep their own.

    Raises:
        InputError: see ``check_state``, or values that are not finite.
    """
    check_state(module, state, component, where, described)
    floats = {name: tensor.is_floating_point() for name, tensor in module.state_dict().items()}
    loaded = {name: state[name].to(dtype) if dtype and is_float else state[name] for name, is_float in floats.items()}
    module.load_state_dict(loaded, assign=True)
    check_finite({component.name: module}, where)
    return module.requires_grad_(False).eval()


class _Unfilled(TorchFunctionMode):
    """Puts what ``torch.empty`` makes, as layers do for their parameters, on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **({} if kwargs is None else kwargs) | ({"device": "meta"} if func is torch.empty else {}))


def unfilled(make: Callable[[], M]) -> M:
    """A module whose layers take no memory until ``load_state`` fills them; the buffers that it computes are there."""
    with _Unfilled():
        return make()


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
