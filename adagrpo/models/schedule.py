"""The noise levels that a model's own pipeline samples at, by the scheduler that lies beside its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..text.strict_json import to_json
from .base import FlowModel
from .loading import first_line

_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_KEY = 'rollout.shift = "model"'
_TIMESTEPS = 1000  # what every family's velocity multiplies a noise level by


def make_scheduler(config: Mapping[str, Any] | None) -> Any:
    """diffusers' scheduler of a ``scheduler_config.json``.

    Raises:
        InputError: there is none, it is of another class, or its options cannot be meant.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if config is None:
        raise InputError(f"{_KEY}: a model of random weights has no scheduler of its own; name a number")
    if (kind := config.get("_class_name", _SCHEDULER)) != _SCHEDULER:
        raise InputError(f"{_KEY}: the noise levels of the model's {kind} are not known here, only those of {_SCHEDULER}")
    for option, meant, why in (
        ("stochastic_sampling", False, "its pipeline draws noise at every step, evaluations and exports here draw none"),
        ("invert_sigmas", False, "its levels rise, those of this trainer fall from noise to pictures"),
        ("num_train_timesteps", _TIMESTEPS, f"timesteps here are {_TIMESTEPS} times the noise level"),
    ):
        if (value := config.get(option, meant)) != meant:
            told = f"{option} = {to_json(value, default=str)} in the model's scheduler_config.json: {why}"
            raise InputError(f"{_KEY}: {told}; set it to {to_json(meant)} there, or name a number")
    try:
        return FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(f"{_KEY}: the model's scheduler cannot be made: {first_line(error)}") from error


def scheduler_levels(scheduler: Any, steps: int, given: Sequence[float] | None, tokens: int) -> Tensor:
    """The scheduler's levels [steps + 1] for pictures of so many tokens, float64 on the CPU.

    Args:
        given: levels that the pipeline hands to it; None leaves them to it.

    Raises:
        InputError: its options are too few for that, or cannot be meant.
    """
    options = scheduler.config
    asked: dict[str, Any] = {"num_inference_steps": steps} if given is None else {"sigmas": list(given)}
    try:
        if options.use_dynamic_shifting:
            low, high = options.base_image_seq_len, options.max_image_seq_len
            slope = (options.max_shift - options.base_shift) / (high - low)
            asked["mu"] = tokens * slope + (options.base_shift - slope * low)
        scheduler.set_timesteps(**asked)
    except Exception as error:  # options of any type and value
        raise InputError(f"{_KEY}: the model's scheduler cannot be set up: {first_line(error)}") from error
    found: Tensor = scheduler.sigmas
    return found.double()


def own_levels(model: FlowModel, steps: int, height: int, width: int) -> Tensor:
    """The model's own noise levels, float64 [steps + 1] on the CPU.

    Raises:
        InputError: it has none, or they are not levels from at most 1 that fall to 0.
    """
    if not callable(getattr(model, "schedule", None)):
        raise InputError(f"{_KEY}: the model ({type(model).__name__}) has no method schedule; name a number")
    found = torch.as_tensor(model.schedule(steps, height, width)).detach().to("cpu", torch.float64)
    sound = found.shape == (steps + 1,) and found[-1] == 0 and bool((found[1:] < found[:-1]).all())
    if not sound or found[0] > 1 + 1e-6:
        shape = f"{list(found.shape)} from {float(found[0]):.4g} to {float(found[-1]):.4g}" if found.numel() else "nothing"
        raise InputError(
            f"{_KEY}: the model's {steps} steps must have {steps + 1} levels that fall from at most 1 to 0, not {shape}"
        )
    return found.clamp(max=1.0)
