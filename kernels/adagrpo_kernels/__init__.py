"""Operators of flow-based GRPO: one module per operator, each with its specification in plain PyTorch.

The functions named ``*_reference`` are the specification, the CPU path and the oracle of every test. This package knows
torch only; it can be used without the rest of AdaGRPO.
"""

from .capability_step import capability_update_reference, select_reference
from .fused_advantage import (
    CALIBRATIONS,
    fused_advantage_reference,
    global_advantage_reference,
    local_advantage_reference,
)
from .group_log_prob import group_log_prob_reference
from .philox import MAX_STEP, Stream, philox4x32_reference, philox_normal_reference, philox_uniform_reference
from .rounding import round_to_storage
from .sde_step import SdeStep, affine_mean, sde_step_reference
from .step_table import SCHEMES, StepTable, sigma_schedule, step_table

__all__ = [
    "CALIBRATIONS",
    "MAX_STEP",
    "SCHEMES",
    "SdeStep",
    "StepTable",
    "Stream",
    "affine_mean",
    "capability_update_reference",
    "fused_advantage_reference",
    "global_advantage_reference",
    "group_log_prob_reference",
    "local_advantage_reference",
    "philox4x32_reference",
    "philox_normal_reference",
    "philox_uniform_reference",
    "round_to_storage",
    "sde_step_reference",
    "select_reference",
    "sigma_schedule",
    "step_table",
]
