"""A policy of a few hundred weights that implements ``FlowModel``: fast, differentiable, and with planted faults."""

from __future__ import annotations

import contextlib
import copy
import zlib

import torch
from other_rounding import rounded_elsewhere
from torch import Tensor, nn

from adagrpo.build import assemble
from adagrpo.models.base import Conditioning
from adagrpo.recipe.keys import (
    AdvantageConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    RolloutConfig,
    SelectionConfig,
    TrainConfig,
)
from adagrpo.train import Trainer

LENGTH, CHANNELS = 6, 8
PROMPTS = [f"prompt {i}" for i in range(40)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        draw = lambda *shape: nn.Parameter(0.3 * torch.randn(*shape, generator=generator))  # noqa: E731
        self.mix, self.out, self.bias = draw(CHANNELS, 16), draw(16, CHANNELS), draw(16)

    def forward(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        hidden = torch.tanh(x @ self.mix + self.bias + text.unsqueeze(1) + sigma.to(x.dtype)[:, None, None])
        return x - hidden @ self.out


@rounded_elsewhere
class ToyModel:
    """``row_noise`` adds velocity noise that depends on the number of rows, as GPU kernels do when the batch changes."""

    latent_shape = (LENGTH, CHANNELS)

    def __init__(self, dtype: torch.dtype = torch.float32, row_noise: float = 0.0, device: str = "cpu") -> None:
        self.transformer = Net().to(dtype=dtype, device=device)
        self.dtype, self.device, self.row_noise = dtype, torch.device(device), row_noise
        self._active, self._reference = self.transformer, None
        self.calls: list[int] = []

    def encode(self, prompts: list[str]) -> Conditioning:
        seeds = [zlib.crc32(p.encode()) % 1000 for p in prompts]
        text = torch.stack([torch.sin(torch.arange(16) * (1 + s / 100)) for s in seeds])
        return Conditioning({"text": text.to(self.device, self.dtype)})

    def resize(self, height: int, width: int) -> None:
        """One size only."""

    def around(self, transformer: nn.Module) -> ToyModel:
        sibling = copy.copy(self)
        sibling.transformer = sibling._active = transformer
        return sibling

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        rows = x.shape[0]
        self.calls.append(rows)
        v = self._active(x.to(self.dtype), sigma, conditioning.tensors["text"])
        if self.row_noise:
            pattern = torch.sin(torch.arange(v.numel(), dtype=torch.float64).reshape(v.shape) * (1.7 + rows))
            v = v + self.row_noise * pattern.to(v.dtype)
        return v

    def decode(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x.to(self.dtype)).reshape(-1, 3, 4, 4)

    def keep_reference(self) -> None:
        self._reference = copy.deepcopy(self.transformer)

    @contextlib.contextmanager
    def reference(self):
        self._active = self._reference
        try:
            yield
        finally:
            self._active = self.transformer

    def trainable(self):
        return self.transformer.named_parameters()

    def save_portable(self, folder) -> None:
        torch.save(self.transformer.state_dict(), folder / "toy.pt")

    def load_portable(self, folder) -> None:
        self.transformer.load_state_dict(torch.load(folder / "toy.pt"))

    def export(self, folder, shift, steps) -> str:
        self.save_portable(folder)
        return "toy"


def half_bright(images: Tensor, prompts) -> Tensor:
    """Prefers a bright left and a dark right half; differs from image to image."""
    return (images[..., :2].double().mean((1, 2, 3)) - images[..., 2:].double().mean((1, 2, 3))).float()


def toy_config(**sections) -> Config:
    """A small AdaGRPO recipe; keyword ``rollout={...}`` and so on change single keys.

    Adam's ``eps`` is a typical gradient: with a tiny one the smallest gradients step by their sign, which is one processor's.
    """
    defaults = {
        "model": (ModelConfig, {}),
        "data": (DataConfig, {"prompts": "toy.txt", "held_out": "toy.txt"}),
        "rollout": (RolloutConfig, {"steps": 6, "sde_steps": (0, 2), "group_size": 4, "eta": 0.7}),
        "selection": (SelectionConfig, {"candidates": 3}),
        "advantage": (AdvantageConfig, {}),
        "loss": (LossConfig, {}),
        "train": (TrainConfig, {"iterations": 4, "slots": 2}),
        "optimizer": (OptimizerConfig, {"lr": 1e-2, "eps": 1e-3}),
        "evaluation": (EvaluationConfig, {"every": 2, "prompts": 4, "final_prompts": 4, "final_noises": 2}),
        "output": (OutputConfig, {"grid_every": 0, "checkpoint_every": 2}),
    }
    built = {name: cls(**{**keys, **sections.pop(name, {})}) for name, (cls, keys) in defaults.items()}
    return Config(**built, **sections)


def recorded(trainer: Trainer) -> tuple[list[Tensor], list[Tensor]]:
    """Lists that receive the picks [P] and the group rewards [M, groups, G] of every draw from now on."""
    picks: list[Tensor] = []
    rewards: list[Tensor] = []
    groups_of = trainer.groups_of

    def kept(*args):
        groups, knowledge = groups_of(*args)
        picks.append(groups.picks)
        rewards.append(groups.rewards)
        return groups, knowledge

    trainer.groups_of = kept  # type: ignore[method-assign]
    return picks, rewards


def toy_trainer(config: Config, model: ToyModel | None = None, reward=half_bright):
    """A trainer of the toy; its ``config`` is for tests that make a run of it."""
    trainer = assemble(config, model or ToyModel(), [reward] * len(config.rewards), PROMPTS)
    trainer.config = config
    return trainer


def run_out_of_memory_once(trainer) -> list[int]:
    """Memory runs out in the trainer's next rollout only, which it does not print; a list that is empty until then."""
    rollout, failed = trainer.rollout, []

    def once(*args):
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError
        return rollout(*args)

    trainer.rollout, trainer.notices.say = once, lambda message: None
    return failed
