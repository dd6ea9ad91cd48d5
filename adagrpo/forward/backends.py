"""Which forwards, precisions and attentions this machine can run, and the one a recipe asks for."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import torch

from ..algorithm.tables import RolloutTable
from ..errors import InputError
from ..models.base import FlowModel
from ..models.registry import FAMILIES, attribute, family_of
from ..text.refusals import TENSORWISE_FUSED
from .compiling import Say, disabled
from .forwards import Attend, CopyForward, Forward

ATTENTION = {"native": "native", "cudnn": "_native_cudnn", "flash": "flash", "flash3": "_flash_3"}
FP8_CAPABILITY = (8, 9)


def forward_problem(name: str, device: torch.device) -> str | None:
    """Why ``engine.forward = name`` cannot run on ``device``; None when it can."""
    if name == "compile" and (variable := disabled()):
        return f"the environment variable {variable} turns torch.compile off: unset it"
    if name == "compile" and device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton on CUDA: pip install 'adagrpo[cuda]'"
    if name == "compile" and not any(shutil.which(compiler) for compiler in ("cc", "gcc", "g++", "clang")):
        return "torch.compile needs a C compiler: install gcc"
    return None


def precision_problem(name: str, device: torch.device) -> str | None:
    """Why ``engine.precision = name`` cannot run on ``device``; None when it can."""
    if name == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        return "FP8 products need compute capability 8.9 (Ada) or 9.0 (Hopper): use bf16"
    return None


def attention_problem(name: str, device: torch.device) -> str | None:
    """Why ``engine.attention = name`` cannot run on ``device``; None when it can."""
    if name in ("auto", "native"):
        return None
    if device.type != "cuda":
        return "needs a CUDA device: use auto or native"
    if name == "flash3" and torch.cuda.get_device_capability(device)[0] != 9:
        return "FlashAttention 3 needs Hopper: use auto or flash"
    package = {"flash": "flash_attn", "flash3": "flash_attn_interface"}.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        how = "pip install 'adagrpo[flash]'" if name == "flash" else "build it from hopper/ of the flash-attention repository"
        return f"the package {package} is not installed: {how}"
    return None


def resolve_forward(name: str, model: FlowModel, planned: bool = False) -> str:
    """``auto`` becomes ``auto_forward`` where the model's family has it, else eager.

    Args:
        planned: a model on the meta device stands for one on a GPU that can compile.
    """
    if name != "auto":
        return name
    family = family_of(model)
    if family is None or "compile" not in family.forwards:
        return "eager"
    return "compile" if planned and model.device.type == "meta" else auto_forward(model.device)


def auto_forward(device: torch.device) -> str:
    """What ``engine.forward = auto`` is for a family that has it: compile on CUDA where it can run, else eager."""
    return "compile" if device.type == "cuda" and forward_problem("compile", device) is None else "eager"


def require_backends(device: torch.device, forward: str, fp8: bool, attention: str) -> None:
    """Refuse what cannot run on ``device``, without loading anything.

    Raises:
        InputError: naming the key and the reason.
    """
    for key, value, problem in (
        ("forward", forward, forward_problem(forward, device)),
        ("precision", "fp8", precision_problem("fp8", device) if fp8 else None),
        ("attention", attention, attention_problem(attention, device)),
    ):
        if problem:
            raise InputError(f"engine.{key} = {value}: {problem}; `adagrpo doctor` tells what runs here")


def build_forward(
    model: FlowModel,
    table: RolloutTable,
    forward: str = "auto",
    precision: torch.dtype | str | None = None,
    scaling: str = "rowwise",
    attention: str = "auto",
    impl: str | None = None,
    say: Say = print,
) -> Forward | None:
    """What computes the rollouts; None is the policy itself.

    Args:
        model: the policy; anything but the default needs one of a built-in family.
        table: on the model's device.
        precision: ``fp8``, or the dtype of the copy; None is the model's.
        forward, scaling, attention: as the recipe's ``engine`` keys.
        say: told when something runs uncompiled that was to be compiled; where the recipe names ``compile`` that is an error.

    Raises:
        InputError: what was asked for cannot run here, with the reason.
    """
    name, fp8 = resolve_forward(forward, model), precision == "fp8"
    cuda, uncompiled = model.device.type == "cuda", forward_problem("compile", model.device)
    family = family_of(model)
    if cuda and uncompiled and family:
        if forward == "auto":
            say(f"engine.forward = auto is eager here: {uncompiled}")
        if name == "fused":
            say(f"engine.forward = fused: norm and rotary embedding of Q and K run uncompiled, slower: {uncompiled}")
    if is_policy(model, name, precision) and attention == "auto":
        return None
    if family is None:
        titles = " and ".join(family.title for family in FAMILIES.values())
        raise InputError(f"engine.forward, precision and attention act on {titles} models only; remove these keys")
    require_backends(model.device, name, fp8, attention)
    if attention != "auto":
        transformer: Any = model.transformer
        transformer.set_attention_backend(ATTENTION[attention])
    if is_policy(model, name, precision):
        return None
    compiled = name == "compile" or (cuda and uncompiled is None)
    told = None if forward == "compile" else say
    return make_copy(model, table, name, precision, scaling, compiled, _attend(attention), impl, told)


def is_policy(model: FlowModel, forward: str, precision: torch.dtype | str | None) -> bool:
    """Whether the policy's own forward is what was asked for."""
    return forward == "eager" and precision in (None, model.dtype)


def make_copy(
    model: FlowModel,
    table: RolloutTable,
    forward: str,
    precision: torch.dtype | str | None,
    scaling: str = "rowwise",
    compiled: bool = False,
    attend: Attend | None = None,
    impl: str | None = None,
    say: Say | None = None,
) -> Forward:
    """The rollout copy and its forward, whether or not this machine can run it; on the meta device it takes no memory.

    Raises:
        InputError: the model holds something of which there is no such copy.
    """
    dtype = precision if isinstance(precision, torch.dtype) else model.dtype
    fp8 = scaling if precision == "fp8" else None
    if forward == "fused" and fp8 == "tensorwise":
        raise InputError(f"engine.fp8_scaling = tensorwise: {TENSORWISE_FUSED}")
    try:
        if forward == "fused":
            if (family := family_of(model)) is None or not family.fused:
                raise ValueError("there is none for this model")
            fused: Callable[..., Forward] = attribute(family.fused)
            return fused(model, table, dtype, fp8 is not None, attend, compiled, impl, say=say)
        return CopyForward(model, table, dtype, fp8, forward == "compile" and compiled, impl=impl, say=say)
    except ValueError as error:
        key = "engine.precision = fp8" if fp8 else f"engine.forward = {forward}"
        raise InputError(f"{key}: {error}; use engine.forward = eager with engine.precision = auto") from error


def _attend(attention: str) -> Attend | None:
    """diffusers' dispatcher for a backend named by the recipe; None is torch's own attention."""
    if attention == "auto":
        return None
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    backend = AttentionBackendName(ATTENTION[attention])
    return lambda q, k, v: dispatch_attention_fn(q, k, v, backend=backend)
