"""A policy's weights in the layouts that others load, and the call that does it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .loading import first_line, not_finite
from .pipeline import Source
from .registry import Family

LORA_FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"


def save_lora(family: Family, transformer: Any, folder: Path) -> None:
    """Write the adapters as the pipeline does, so that they mean the same with and without their metadata: B is multiplied by
    alpha / rank in fp32, and alpha is the rank."""
    from peft import get_peft_model_state_dict

    adapter = transformer.peft_config["default"]
    scale = adapter.lora_alpha / adapter.r
    weights = dict(get_peft_model_state_dict(transformer))
    if scale != 1:
        weights |= {name: t.float() * scale for name, t in weights.items() if ".lora_B." in name}
    family.pipeline_class.save_lora_weights(
        folder,
        transformer_lora_layers=weights,
        transformer_lora_adapter_metadata=adapter.to_dict() | {"lora_alpha": adapter.r},
    )


def load_lora(transformer: Any, folder: Path) -> None:
    """Inverse of ``save_lora``, in place; exact where alpha / rank is a power of two, else to one rounding of fp32. Takes files
    whose metadata hold another alpha too, as earlier versions wrote them.

    Raises:
        InputError: missing or damaged file, or adapters of another shape.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import safe_open

    file = existing(folder / LORA_FILE)
    try:
        with safe_open(file, "pt") as opened:
            weights = {name.removeprefix("transformer."): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            settings = json.loads((opened.metadata() or {}).get(METADATA, "{}"))
    except Exception as error:  # safetensors' error derives from nothing narrower
        raise InputError(f"{file}: cannot be read ({first_line(error)})") from error
    wanted = dict(get_peft_model_state_dict(transformer))
    refuse_other_weights(weights, wanted, file)
    adapter = transformer.peft_config["default"]
    scale = adapter.lora_alpha / settings.get("transformer.lora_alpha", adapter.r)
    if scale != 1:
        weights |= {name: (t.double() / scale).to(wanted[name].dtype) for name, t in weights.items() if ".lora_B." in name}
    set_peft_model_state_dict(transformer, weights)


def refuse_other_weights(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: Path) -> None:
    """Raise unless names and shapes are the same and every value is finite.

    Raises:
        InputError: naming source and tensor.
    """
    differing = sorted(found.keys() ^ wanted.keys())
    if differing:
        count = f"{len(differing)} names differ, e.g. {differing[0]}"
        raise InputError(f"{source}: weights of another model ({count}); model.path and model.lora_* must be those of the run")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{name} is {list(tensor.shape)}, the model's {list(wanted[name].shape)}"
            raise InputError(
                f"{source}: weights of another model ({shapes}); model.path and model.lora_* must be those of the run"
            )
    if bad := not_finite(found):
        raise InputError(f"{source}: {bad[0]} holds values that are not finite; use an earlier checkpoint")


def existing(path: Path) -> Path:
    """``path``, if it exists.

    Raises:
        InputError: it does not.
    """
    if not path.exists():
        raise InputError(f"{path}: missing; name a checkpoint of this kind of training (full or LoRA)")
    return path


def scheduler_options(shift: float) -> dict[str, Any]:
    """Every option of the ``FlowMatchEulerDiscreteScheduler`` whose noise levels are those of the training; nothing is left
    to a base folder's options or a library's defaults."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    off = ("use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")
    fixed = {"num_train_timesteps": 1000, "shift": shift, "shift_terminal": None, "stochastic_sampling": False}
    scheduler = FlowMatchEulerDiscreteScheduler(**fixed, **dict.fromkeys(off, False))
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def stock_call(
    family: Family,
    base: Source,
    lora: Path | None,
    dtype: torch.dtype,
    device: torch.device,
    shift: float | str,
    arguments: Mapping[str, Any],
    note: str = "",
    absent: Iterable[str] = (),
) -> str:
    """Python that samples with stock diffusers what the training sampled.

    Args:
        base: the pipeline to load.
        lora: folder of a LoRA file for it.
        shift: of the noise levels; ``model`` leaves a LoRA's base its own scheduler.
        arguments: of the pipeline's call.
        note: a comment on what that call cannot be told.
        absent: parts that the pipeline does without; diffusers wants to be told.
    """
    place = str(Path(base.path).absolute()) if base.is_local else base.path
    chosen = {name: value for name, value in (("variant", base.variant), ("revision", base.revision)) if value}
    options: dict[str, Any] = {"torch_dtype": dtype, **chosen, **dict.fromkeys(absent)}
    names = [*["FlowMatchEulerDiscreteScheduler"] * (not isinstance(shift, str)), family.pipeline]
    lines = ["import torch", f"from diffusers import {', '.join(names)}", ""]
    lines.append(f"pipe = {family.pipeline}.from_pretrained({place!r}, {_keywords(options)})")
    if lora is not None:
        lines.append(f"pipe.load_lora_weights({str(lora.absolute())!r}, weight_name={LORA_FILE!r})")
    if lora is not None and not isinstance(shift, str):
        lines.append(f"pipe.scheduler = FlowMatchEulerDiscreteScheduler({_keywords(scheduler_options(shift))})")
    if device.type != "cpu":
        lines.append(f"pipe.to({device.type!r})")
    if note:
        lines.append(note)
    lines.append(f"image = pipe('a lighthouse in a storm', {_keywords(arguments)}).images[0]")
    return "\n".join(lines)


def _keywords(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
