"""Operators of flow-based GRPO, and of the FP8 transformer it samples with: one module per operator, each with its
specification in plain PyTorch.

The functions named ``*_reference`` are the specification, the CPU path and the oracle of every test; those without the
suffix run them or a Triton kernel (``impl``, see ``_dispatch``). This package knows torch only, and triton once a kernel is
about to run; it can be used without the rest of AdaGRPO.
"""

from ._dispatch import IMPLS, KernelError, implementations, launch_counts, reset_counts, telling
from .capability_step import (
    CapabilityStep,
    capability_step,
    capability_step_reference,
    capability_update_reference,
    select_reference,
)
from .fused_advantage import (
    CALIBRATIONS,
    PAPER_SCALE,
    STATISTICS,
    STD_MODES,
    MultiRewardAdvantage,
    Scale,
    advantage_statistics_reference,
    fused_advantage,
    fused_advantage_reference,
    global_advantage_reference,
    local_advantage_reference,
    multi_reward_advantage,
    multi_reward_advantage_reference,
    reward_statistics_reference,
)
from .gelu_join import gelu_join, gelu_join_reference
from .group_log_prob import group_log_prob, group_log_prob_reference
from .layer_norm_modulate import layer_norm_modulate, layer_norm_modulate_reference
from .philox import (
    MAX_STEP,
    Draw,
    Stream,
    philox4x32_reference,
    philox_normal,
    philox_normal_reference,
    philox_uniform_reference,
)
from .quantize import Quantized, quantize_rowwise, quantize_rowwise_reference, quantize_tensorwise
from .rounding import round_to_storage
from .sde_step import Guidance, History, SdeStep, affine_mean, sde_step, sde_step_reference
from .step_table import SCHEMES, StepTable, sigma_schedule, step_table

__all__ = [
    "CALIBRATIONS",
    "IMPLS",
    "MAX_STEP",
    "PAPER_SCALE",
    "SCHEMES",
    "STATISTICS",
    "STD_MODES",
    "CapabilityStep",
    "Draw",
    "Guidance",
    "History",
    "KernelError",
    "MultiRewardAdvantage",
    "Quantized",
    "Scale",
    "SdeStep",
    "StepTable",
    "Stream",
    "advantage_statistics_reference",
    "affine_mean",
    "capability_step",
    "capability_step_reference",
    "capability_update_reference",
    "fused_advantage",
    "fused_advantage_reference",
    "gelu_join",
    "gelu_join_reference",
    "global_advantage_reference",
    "group_log_prob",
    "group_log_prob_reference",
    "implementations",
    "launch_counts",
    "layer_norm_modulate",
    "layer_norm_modulate_reference",
    "local_advantage_reference",
    "multi_reward_advantage",
    "multi_reward_advantage_reference",
    "philox4x32_reference",
    "philox_normal",
    "philox_normal_reference",
    "philox_uniform_reference",
    "quantize_rowwise",
    "quantize_rowwise_reference",
    "quantize_tensorwise",
    "reset_counts",
    "reward_statistics_reference",
    "round_to_storage",
    "sde_step",
    "sde_step_reference",
    "select_reference",
    "sigma_schedule",
    "step_table",
    "telling",
]
