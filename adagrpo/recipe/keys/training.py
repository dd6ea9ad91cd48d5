"""Length and shape of the run, its optimizer and its engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
    """Optimizer steps per iteration; what `update_by` names is dealt to them in order."""
    update_by: Literal["steps", "slots", "samples"] = "steps"
    """What the optimizer steps of an iteration divide among them in equal parts: the trained steps (the released code: one per
    step), the prompts (Flow-GRPO), or the samples of each prompt (DanceGRPO; not of forks, whose members share a transition).
    Advantages are those of whole groups in any case."""
    shuffle_advantages: bool = False
    """Control experiment: deal the advantages of each group to the wrong samples."""
    part_timeout: float = 600.0
    """Seconds that a selection, advantage or prompt source named by import path may take, per call; 0 waits for ever, and calls
    it in the trainer's own thread. A part that takes longer ends the run, after saving it."""
    ranks_timeout: float = 600.0
    """Seconds that a rank waits for the others, where torchrun started several, before it ends with an error."""


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
    ema_every: int = 1
    """Optimizer steps between updates of the average; the first comes one step early (Flow-GRPO: 8, after 7, 15, 23 …)."""
    ema_warmup: bool = False
    """Let the average forget faster at first: after n optimizer steps its decay is at most (1 + n)/(10 + n) (Flow-GRPO)."""


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
