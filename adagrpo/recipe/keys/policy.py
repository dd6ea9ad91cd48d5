"""The policy and how it samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ...models.registry import FAMILIES, FLUX
from .kwargs import KwargValue

BUILT_IN_MODEL = "tiny-flux"
RANDOM_MODELS = {n: family.name for family in FAMILIES.values() for n in family.architectures if n.startswith("random:")}
BUILT_IN_MODELS = {BUILT_IN_MODEL: FLUX.name} | RANDOM_MODELS
"""Values of model.path that are no folder or Hub id, and their families."""


@dataclass(frozen=True)
class ModelConfig:
    """The policy: a diffusers pipeline folder or Hub id, and how it is trained."""

    family: str = "flux"
    """Adapter: flux (any diffusers FLUX pipeline, guidance-distilled or not), sd3 (any Stable Diffusion 3 or 3.5 pipeline, with
    or without its T5), or package.module:attribute of a callable
    (path, dtype, device, height, width, **kwargs) -> FlowModel."""
    kwargs: dict[str, KwargValue] = field(default_factory=dict)
    """Arguments of an adapter named by import path."""
    path: str = "tiny-flux"
    """Pipeline folder or Hub id; `tiny-flux` is the model that ships with AdaGRPO."""
    variant: str = ""
    """Variant of the weights' files, such as fp16 for model.fp16.safetensors; components without it load their plain files."""
    revision: str = ""
    """Branch, tag or commit of a Hub id; empty is the newest."""
    dtype: Literal["bf16", "fp32", "fp64"] = "fp32"
    """Precision of weights and activations. bf16 trains on fp32 master weights."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:N."""
    height: int = 32
    """Image height in pixels; a multiple of the VAE's scale times the patch size."""
    width: int = 32
    """Image width in pixels."""
    buckets: tuple[str, ...] = ()
    """Image sizes to train on, as HEIGHTxWIDTH; each iteration draws one of them. Empty: height x width. Evaluation and sample
    grids always use height x width."""
    max_text_tokens: int = 256
    """Length of the T5 prompt, in tokens; sd3 adds the 77 of its CLIPs."""
    guidance: float = FLUX.guidance
    """Guidance of training; a recipe without it has the family's default, 3.5 of flux and 4.5 of sd3. flux: fed to the
    transformer, ignored by models without a guidance embedding. sd3: classifier-free, each image being two rows of the
    transformer, and gradients flow through both; 0 or 1 is none, and one row."""
    negative_prompt: str = ""
    """What classifier-free guidance leads away from; empty is the empty prompt."""
    timestep: Literal["pipeline", "bf16", "truncated"] = "pipeline"
    """How the transformer's timestep is rounded. pipeline: as diffusers' pipelines do it, 1000 sigma in the model's dtype.
    bf16: sigma itself in bf16 (the released code; of the official 16 noise levels 5 then differ, by 2 to 4 of 1000).
    truncated: the whole number below 1000 sigma (DanceGRPO, G2RPO)."""
    tuning: Literal["full", "lora"] = "full"
    """Train all transformer weights, or low-rank adapters."""
    lora_rank: int = 64
    lora_alpha: float = 128.0
    lora_targets: tuple[str, ...] = FLUX.lora_targets
    """Modules that get an adapter, by the end of their name."""
    lora_from: str = ""
    """LoRA file (diffusers, PEFT, kohya) that the adapters begin as, or its folder; empty: they begin at zero."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time for the update."""
    prompt_cache: int = 512
    """Prompt embeddings kept on the device (2.1 MB each for FLUX.1 at 256 tokens)."""


@dataclass(frozen=True)
class RolloutConfig:
    """How samples are drawn: the grid, the stochastic steps, the groups."""

    plan: Literal["fork", "trajectory", "window"] = "fork"
    """fork: groups branch off an ODE anchor at each stochastic step (AdaGRPO). trajectory: whole stochastic trajectories
    (Flow-GRPO, DanceGRPO, Flow-CPS). window: trajectories, stochastic only in a window that moves (MixGRPO)."""
    scheme: Literal["flow", "dance", "flash", "cps"] = "flow"
    """Diffusion coefficient g of a stochastic step at noise level s: flow eta·sqrt(s/(1 - s)) (Flow-GRPO, AdaGRPO), dance eta
    (DanceGRPO), flash eta·s (Flash-GRPO); cps keeps the level of noise (Flow-CPS)."""
    eta: float = 0.7
    """Noise strength of the scheme."""
    steps: int = 16
    """Denoising steps T."""
    shift: float | Literal["model"] = 3.0
    """Time shift of the noise levels; `model`: those that the model's own pipeline takes, which may depend on the picture's
    size."""
    sde_steps: tuple[int, ...] = (0, 2, 4, 6)
    """Stochastic steps, each in [0, steps - 1); plans fork and trajectory."""
    window_size: int = 4
    window_stride: int = 1
    window_every: int = 25
    """Plan window: its length, how far it moves, and after how many iterations."""
    window_order: Literal["sliding", "random"] = "sliding"
    """sliding: the window moves by `window_stride` and wraps (MixGRPO). random: its place is drawn (Flow-GRPO-Fast)."""
    window_range: tuple[int, ...] = ()
    """Steps that the window stays within: the first, and the one behind the last; empty is all but the last step."""
    group_size: int = 12
    """Samples per group, at least 2."""
    trained_share: float = 1.0
    """Share of the stochastic steps trained in each iteration, drawn anew each time (DanceGRPO: 0.6)."""
    trained_of: Literal["iteration", "sample"] = "iteration"
    """Who draws them: the iteration, for all that it samples, or each sample for itself (DanceGRPO; not of forks)."""
    step_per_prompt: bool = False
    """Each prompt draws one of the stochastic steps in each iteration; it alone is stochastic, and trained, in that prompt's
    trajectories (Flash-GRPO; plan trajectory)."""
    shared_noise: bool = False
    """Trajectories of a group start from one initial noise (DanceGRPO)."""
    fork_velocity: Literal["fresh", "probe"] = "fresh"
    """fresh: one extra batched call in the geometry of the update, which makes the on-policy ratio exactly 1. probe: the
    velocities of the probe (the released code)."""
    storage: Literal["bf16", "fp16", "fp32", "fp64"] = "fp32"
    """Precision of stored latents; log-probabilities are of the rounded values."""
    tail_steps: int = 0
    """Evaluations after a fork, or after a trajectory's last stochastic step (MixGRPO-Flash), at most (lossy): longer steps to
    the image; 0 takes every step of the grid."""
    tail_share: float = 0.0
    """Instead of `tail_steps`: after step k of T such tails have this share of T - k for levels, the image's included, at even
    distances in unshifted time, which need not be levels of the grid (lossy; MixGRPO-Flash: 0.4); 0 is off."""
    granularities: tuple[int, ...] = (1,)
    """Each sample of a fork is finished once for each of these: by tails that take so many steps of the grid at once, from the
    second on. Its advantages under all of them are summed (G2RPO: 1 and 2; plan fork)."""
    granular_end: Literal["zero", "released"] = "zero"
    """Tails that do not meet the grid's end go on to it from their last place (zero), or leave that place out, as the released
    code of G2RPO does in effect."""
    seeds: int = 1
    """Anchors of each prompt: the pick's own, and others from noise of their own, each with groups of its own (TempFlow-GRPO:
    4; plan fork)."""
    tail_solver: Literal["dpmpp2m", "euler"] = "dpmpp2m"
    """Solver of those longer steps: DPM-Solver++ 2M (second order) or Euler."""
