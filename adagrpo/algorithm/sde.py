"""Samplers: step tables, noise, the affine step and its log-probability (see ``adagrpo_kernels.step_table``)."""

from adagrpo_kernels import SCHEMES, Draw, SdeStep, StepTable, Stream, sigma_schedule, step_table
from adagrpo_kernels import affine_mean as affine_mean
from adagrpo_kernels import group_log_prob as group_log_prob
from adagrpo_kernels import philox_normal as philox_normal
from adagrpo_kernels import philox_uniform_reference as philox_uniform
from adagrpo_kernels import round_to_storage as round_to_storage
from adagrpo_kernels import sde_step as sde_step

__all__ = [
    "SCHEMES",
    "Draw",
    "SdeStep",
    "StepTable",
    "Stream",
    "affine_mean",
    "group_log_prob",
    "philox_normal",
    "philox_uniform",
    "round_to_storage",
    "sde_step",
    "sigma_schedule",
    "step_table",
]
