"""The keys of a recipe and their defaults, as frozen dataclasses: ``recipe.load`` reads and ``recipe.rules`` checks them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..models.registry import FAMILIES, FLUX

KwargValue = bool | int | float | str
BUILT_IN_MODEL = "tiny-flux"
RANDOM_MODELS = {n: family.name for family in FAMILIES.values() for n in family.architectures if n.startswith("random:")}
BUILT_IN_MODELS = {BUILT_IN_MODEL: FLUX.name} | RANDOM_MODELS
"""Values of model.path that are no folder or Hub id, and their families."""
Probe = Literal["full", "short", "racing", "pool", "memory", "short+pool", "racing+pool", "memory+pool"]
JUDGES = {"full": "full:Full", "short": "short:Short", "racing": "racing:Racing", "memory": "memory:Memory"}
"""Class of each judge, in ``curriculum/``."""
POOLED = {"pool": "full"} | {f"{judge}+pool": judge for judge in JUDGES if judge != "full"}
"""Probes whose candidates compete over all slots, and how these are judged."""


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
    timestep: Literal["pipeline", "bf16"] = "pipeline"
    """How the transformer's timestep is rounded. pipeline: as diffusers' pipelines do it, 1000 sigma in the model's dtype.
    bf16: sigma itself in bf16 (the released code; of the official 16 noise levels 5 then differ, by 2 to 4 of 1000)."""
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
    scheme: Literal["flow", "dance", "cps"] = "flow"
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
    group_size: int = 12
    """Samples per group, at least 2."""
    trained_share: float = 1.0
    """Share of the stochastic steps trained in each iteration, drawn anew each time (DanceGRPO: 0.6)."""
    shared_noise: bool = False
    """Trajectories of a group start from one initial noise (DanceGRPO)."""
    fork_velocity: Literal["fresh", "probe"] = "fresh"
    """fresh: one extra batched call in the geometry of the update, which makes the on-policy ratio exactly 1. probe: the
    velocities of the probe (the released code)."""
    storage: Literal["bf16", "fp16", "fp32", "fp64"] = "fp32"
    """Precision of stored latents; log-probabilities are of the rounded values."""
    tail_steps: int = 0
    """Evaluations after a fork, at most (lossy, plan fork): longer steps to the image; 0 takes every step of the grid."""
    tail_solver: Literal["dpmpp2m", "euler"] = "dpmpp2m"
    """Solver of those longer steps: DPM-Solver++ 2M (second order) or Euler."""


@dataclass(frozen=True)
class SelectionConfig:
    """The online curriculum filter."""

    candidates: int = 10
    """Candidate prompts B per slot; 1 turns the filter off."""
    strategy: str = "closest"
    """closest, random, easiest, hardest, medium, or package.module:attribute of a callable
    (scores [M, P, B], capability, **kwargs) -> index [P]."""
    kwargs: dict[str, KwargValue] = field(default_factory=dict)
    """Arguments of a strategy named by import path."""
    alpha: float = 0.8
    """Memory of the capability EMA."""
    probe: Probe = "full"
    """How candidates are judged. full: each is sampled to the end and scored (the paper). short: each by an ODE of
    `probe_steps`, against an EMA of such scores. racing: previews of the image at `race_steps` halve the field, and who is left
    goes on. memory: by a posterior of what earlier rewards said of each prompt, without sampling. pool, and +pool behind
    another: candidates of all slots compete for all slots (full: needs fewer candidates). With short, racing and memory the
    pick and one uniformly drawn candidate are finished; the latter, in full length, feeds the capability EMA that advantages
    are measured against."""
    probe_steps: int = 4
    """Steps of a short probe."""
    race_steps: tuple[int, ...] = (10, 12, 14)
    """Steps sampled before each preview of a race, of `rollout.steps`; each preview halves the field, the last leaves one."""
    finalists: int = 1
    """Candidates per slot that memory samples to the end; more than one are scored, and the posterior decides anew (memory)."""
    allow_unseen: bool = False
    """Accept a memory that will observe each prompt fewer than twice, and with one finalist: it then picks blindly (memory)."""
    half_life: float = 100.0
    """Draws after which evidence on a prompt counts half (memory)."""
    noise_share: float = 0.56
    """Share of an image's reward variance that is the noise draw, not the prompt (memory)."""
    group_evidence: float = 2.0
    """How many independent images a slot's groups are worth as evidence; they share an anchor (memory)."""

    @property
    def judge(self) -> str:
        """How candidates are judged, a key of ``JUDGES``."""
        return POOLED.get(self.probe, self.probe)

    @property
    def pooled(self) -> bool:
        """Whether candidates of all slots compete for all slots."""
        return self.probe in POOLED


@dataclass(frozen=True)
class AdvantageConfig:
    """Cross-level advantage fusion."""

    function: str = "fused"
    """fused, or package.module:attribute of a callable (rewards [M, groups, G], capability, reward weights [M], **kwargs)
    -> advantages [groups, G]."""
    kwargs: dict[str, KwargValue] = field(default_factory=dict)
    """Arguments of a function named by import path."""
    weight: float = 1.0
    """Weight of the advantage against the capability EMA; 0 leaves plain group-relative advantages."""
    calibration: Literal["mass", "zscore", "zscore_centred", "none"] = "mass"
    clip: float = 5.0
    equal_groups: Literal["keep", "skip", "refill"] = "keep"
    """Groups whose rewards are all equal carry no signal. keep: they count in the loss average; skip: they do not; refill:
    slots without any spread are drawn once more from new prompts."""


@dataclass(frozen=True)
class LossConfig:
    """The policy-gradient objective."""

    clip_range: float = 0.0
    """Half width of the ratio's trust region; 0 is no clipping (the released code)."""
    old_logp: Literal["rollout", "recompute", "detached"] = "rollout"
    """Where the ratio's denominator comes from: stored while sampling, recomputed before the first update in its own
    geometry, or the current value without gradient (the released code: the ratio is then 1 by construction)."""
    kl_weight: float = 0.0
    """Weight of the KL divergence to the initial model, in mean space."""
    kl_variance: Literal["step", "diffusion"] = "step"
    """step divides by 2w² (the Gaussian KL), diffusion by 2g² (Flow-GRPO's code)."""
    step_weights: Literal["uniform", "equal_gradient"] = "uniform"
    average: Literal["update", "iteration"] = "update"
    """What the loss of an optimizer step is the mean over: its own trained steps, or all of the iteration's, so that each of
    four steps has a quarter of the loss (the released code); the gradient clip and Adam's eps see the difference."""


@dataclass(frozen=True)
class TrainConfig:
    """Length and shape of the run."""

    iterations: int = 300
    seed: int = 0
    slots: int = 1
    """Prompts trained at once."""
    accumulation: int = 1
    """Micro-batches of `slots` prompts per iteration; the iteration trains slots × accumulation prompts."""
    steps_per_iteration: int = 1
    """Optimizer steps per iteration; the trained steps are dealt to them in order (the released code: one per step)."""
    shuffle_advantages: bool = False
    """Control experiment: deal the advantages of each group to the wrong samples."""
    part_timeout: float = 600.0
    """Seconds that a selection, advantage or prompt source named by import path may take, per call; 0 waits for ever, and calls
    it in the trainer's own thread. A part that takes longer ends the run, after saving it."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW on fp32 weights."""

    lr: float = 2e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or falling to `final_share` of lr at the last iteration."""
    warmup_steps: int = 0
    final_share: float = 0.0
    ema_decay: float = 0.0
    """Average of the weights, used for evaluation and export; 0 is off."""


@dataclass(frozen=True)
class EngineConfig:
    """How it runs. Only `precision` and `attention` change what rollouts compute, and log-probabilities never: those belong to
    the training weights in training precision."""

    max_rows: int = 0
    """Largest batch of the transformer, in images (of two rows under classifier-free guidance); 0 is unlimited."""
    decode_rows: int = 0
    """Largest batch of decoder and rewards, in images, where it is less than max_rows; 0 is max_rows."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """Implementation of the algorithm's operators: auto (the environment variable ADAGRPO_IMPL, else Triton on CUDA), triton
    (or an error), reference (plain PyTorch). The manifest records what ran."""
    forward: Literal["auto", "eager", "compile", "fused"] = "auto"
    """The rollouts' forward. eager: the library's. compile: the same under torch.compile, block by block. fused: our own over
    the same weights. auto: compile on CUDA, eager elsewhere. `adagrpo doctor` tells what runs here."""
    precision: Literal["auto", "bf16", "fp8"] = "auto"
    """Precision of the rollouts: auto is that of the model (lossless); fp8 (lossy) multiplies in e4m3, from Hopper on."""
    fp8_scaling: Literal["rowwise", "tensorwise"] = "rowwise"
    """One FP8 scale per token and output channel, or one per tensor; tensorwise is refused with forward = fused."""
    attention: Literal["auto", "native", "cudnn", "flash", "flash3"] = "auto"
    """Attention of rollouts and training: auto is torch's choice, native torch's kernels, cudnn cuDNN's, flash and flash3 those
    of the flash-attn packages."""
    fp8_attention: bool = False
    """Rollouts attend in FP8: refused until Q, K and V are quantised by the kernel that writes them."""
    cuda_graphs: bool = False
    """Capture the rollout's steps as CUDA graphs, one per number of rows. On the CPU: run under the capture's contract."""
    overlap: bool = True
    """Decode and score on a second CUDA stream while the next chunk of `max_rows` is sampled."""


@dataclass(frozen=True)
class DataConfig:
    """Prompts. Sources: `tiny:even`, `tiny:wide`, `tiny:held_out`, a UTF-8 text file with one prompt per line, or
    package.module:attribute of a callable (**kwargs) -> sequence of prompts."""

    prompts: str = "tiny:wide"
    held_out: str = "tiny:held_out"
    allow_duplicates: bool = False
    """Accept repeated lines in prompt files."""
    allow_overlap: bool = False
    """Accept held-out prompts that also train: the held-out reward is then not one on unseen prompts."""
    kwargs: dict[str, KwargValue] = field(default_factory=dict)
    """Arguments of prompt sources named by import path."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation by the deterministic sampler."""

    every: int = 20
    """Iterations between evaluations with fixed noise; 0 is never."""
    prompts: int = 50
    noises: int = 1
    final_prompts: int = 150
    """Prompts of the paired comparison before → after; 0 skips it."""
    final_noises: int = 3
    """Noises per prompt of that comparison, seen nowhere else in the run."""
    guidance: float = 0.0
    """Classifier-free guidance of all evaluation, of sample grids and of `adagrpo sample` and `export`, apart from that of the
    training: 0 is model.guidance, 1 is none."""


@dataclass(frozen=True)
class OutputConfig:
    """What the run folder receives, and how often (in iterations)."""

    grid_every: int = 20
    grid_prompts: int = 10
    checkpoint_every: int = 50
    keep_last: int = 2
    keep_every: int = 0
    """Checkpoints at multiples of this iteration number are never removed; 0 is none."""
    keep_best: bool = False
    """Keep the checkpoint with the highest held-out reward."""
    trace_at: int = 0
    """Record a profiler trace of this iteration into `traces/`, for Perfetto; 0 records none."""
    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also send the metrics there; needs `adagrpo[log]`."""


@dataclass(frozen=True)
class GuardConfig:
    """One guard: trips when its value exceeds `limit` in `patience` observations in a row; limit 0 is off."""

    limit: float = 0.0
    action: Literal["warn", "stop", "rollback"] = "warn"
    patience: int = 1


@dataclass(frozen=True)
class GuardsConfig:
    """Guards that act: warn, stop with exit code 3, or roll back to the last good checkpoint and go on with new prompts
    and noise."""

    reward_hacking: GuardConfig = GuardConfig(limit=0.05, patience=2)
    """Fall of the held-out reward below its best so far, while the trained reward is above its value at that time."""
    kl: GuardConfig = GuardConfig()
    """KL divergence to the initial policy; needs loss.kl_weight."""
    grad_norm: GuardConfig = GuardConfig()
    """Gradient norm before clipping."""
    ratio: GuardConfig = GuardConfig(limit=1e-3)
    """Largest deviation of the on-policy ratio from 1."""
    failed_rewards: GuardConfig = GuardConfig(limit=0.5, patience=3)
    """Share of samples without a finite reward."""
    equal_groups: GuardConfig = GuardConfig(limit=0.9, patience=5)
    """Share of groups whose rewards are all equal: the policy's samples no longer differ."""
    non_finite: GuardConfig = GuardConfig(limit=0.5, action="stop")
    """1 when loss or gradient norm is not finite; the weights of such an iteration are never saved."""
    max_rollbacks: int = 3
    """After this many rollbacks the next one stops the run."""


@dataclass(frozen=True)
class BudgetConfig:
    """What selection and fusion may cost per iteration, as shares of the identical recipe without them; `adagrpo bench budget`
    measures it and fails above."""

    evaluations: float = 0.25
    """Additional transformer evaluations, counted, with `selection.probe = full`."""
    time: float = 0.25
    """Additional seconds with `selection.probe = full`; held against a GPU's clock only."""
    cheap_evaluations: float = 0.05
    """As `evaluations`, with every other probe."""
    cheap_time: float = 0.05
    """As `time`, with every other probe."""


@dataclass(frozen=True)
class RewardConfig:
    """One reward: a built-in name, its weight, its arguments, and its time."""

    name: str = "tiny"
    weight: float = 1.0
    kwargs: dict[str, KwargValue] = field(default_factory=dict)
    timeout: float = 600.0
    """Seconds that it may take for one batch of images; 0 waits for ever, and calls it in the trainer's own thread. A reward
    that takes longer ends the run, after saving it."""


@dataclass(frozen=True)
class Config:
    """A recipe."""

    name: str = "unnamed"
    """The name of a folder; without --out a run goes into runs/<name>-001, or the first number not taken."""
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    rewards: tuple[RewardConfig, ...] = (RewardConfig(),)


def bucket_size(bucket: str) -> tuple[int, int]:
    """Height and width of ``HEIGHTxWIDTH``.

    Raises:
        ValueError: another form.
    """
    height, width = bucket.split("x")
    return int(height), int(width)
