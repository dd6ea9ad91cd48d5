"""A model's computations at full size on the meta device: shapes without data, to be counted and measured."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..engine.optimizer import OptimizerSettings, PolicyOptimizer
from ..models.base import Conditioning, FlowModel
from .counting import PeakMemory, module_tensors

T = TypeVar("T")


class NotRehearsable(Exception):
    """The model cannot run on the meta device; the message says why."""


class Rehearsal:
    """A copy of ``model`` whose tensors are all on the meta device; the model itself is left alone and nothing is copied.

    Modules and tensors that are attributes of the model are replaced, everything else is shared.

    Args:
        prompt: any prompt of the run; encoded once for its shapes.

    Attributes:
        transformer: the copy's.
        prompt_bytes: size of one prompt's embeddings.

    Raises:
        NotRehearsable: the model cannot be copied, or does not run there.
    """

    def __init__(self, model: FlowModel, prompt: str) -> None:
        self._known: dict[tuple[str, int, int], Any] = {}
        try:
            conditioning = model.encode([prompt]).tensors
            self._conditioning = {name: torch.empty_like(t, device="meta") for name, t in conditioning.items()}
            self.model = _on_meta(model)
            self._shape, self.transformer = model.latent_shape, self.model.transformer
            self.forward(1)
        except Exception as error:
            raise NotRehearsable(f"{type(error).__name__}: {error}") from error
        self.prompt_bytes = sum(t.numel() * t.element_size() for t in self._conditioning.values())

    @property
    def rows_per_image(self) -> int:
        """Rows of the transformer that one of ``forward`` is."""
        return getattr(self.model, "rows_per_image", 1)

    def conditioning(self, prompts: int) -> Conditioning:
        """Embeddings of ``prompts`` prompts, without content."""
        return Conditioning({n: t.expand(prompts, *t.shape[1:]) for n, t in self._conditioning.items()})

    def forward(self, rows: int) -> None:
        """One transformer call without gradient."""
        with torch.no_grad(), fused_attention():
            self._velocity(rows)

    def update(self, rows: int) -> None:
        """One transformer call with its backward pass, which leaves no gradients behind."""
        try:
            with torch.enable_grad(), fused_attention():
                self._velocity(rows).float().sum().backward()
        finally:
            for p in self._trainable():
                p.grad = None

    def decode(self, rows: int) -> None:
        """Pictures of ``rows`` latents."""
        with torch.no_grad(), fused_attention():
            self.model.decode(torch.empty(rows, *self._shape, device="meta", dtype=self.model.dtype))

    def step(self, optimizer: PolicyOptimizer) -> None:
        """One optimizer step, its gradients included."""
        for p in optimizer.parameters:
            p.grad = torch.empty_like(p)
        optimizer.step()

    def optimizer(self, averages: bool = False) -> PolicyOptimizer:
        """An optimizer of the copy after its first step, so that the moments exist."""
        optimizer = PolicyOptimizer(self._trainable(), OptimizerSettings(lr=0.0, ema_decay=0.5 if averages else 0.0))
        for group in optimizer.adamw.param_groups:
            group["foreach"] = False  # nearest to the fused kernel that runs on CUDA, which meta tensors do not have
        self.step(optimizer)
        return optimizer

    def once(self, name: str, find: Callable[[], T], rows: int = 0) -> T:
        """What ``find()`` returned when it was first asked for by this name: a rehearsal does the same each time."""
        key = name, rows, self.rows_per_image
        if key not in self._known:
            self._known[key] = find()
        return self._known[key]

    def forward_peak(self, rows: int) -> int:
        """Bytes ``forward`` needs at most, beyond the weights."""
        return self.once("forward peak", lambda: _peak(self.forward, rows), rows)

    def update_peak(self, rows: int) -> int:
        """Bytes of activations and gradients ``update`` needs at most at a time, beyond the weights."""
        return self.once("update peak", lambda: _peak(self.update, rows), rows)

    def decode_peak(self, rows: int) -> int:
        """Bytes ``decode`` needs at most, the pictures included."""
        return self.once("decode peak", lambda: _peak(self.decode, rows), rows)

    def step_peak(self, averages: bool = False) -> int:
        """Bytes of gradients and temporaries of an optimizer step at most, beyond weights, masters and moments."""
        return self.once("step peak", lambda: _peak(self.step, self.optimizer(averages)), int(averages))

    def _velocity(self, rows: int) -> Tensor:
        x = torch.empty(rows, *self._shape, device="meta", dtype=self.model.dtype)
        sigma, index = torch.empty(rows, device="meta"), torch.zeros(rows, device="meta", dtype=torch.int64)
        return self.model.velocity(x, sigma, Conditioning(self._conditioning).rows(index))

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self.transformer.parameters() if p.requires_grad]


def rehearse(model: FlowModel, prompt: str) -> Rehearsal | str:
    """The model's rehearsal, or why there is none."""
    try:
        return Rehearsal(model, prompt)
    except NotRehearsable as error:
        return str(error)


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Within it, attention on meta tensors is the fused operator that CUDA and CPU run.

    ``scaled_dot_product_attention`` has no fused kernel for the meta device and falls back to two products around a softmax
    whose [L, L] matrix exists, in float32 for bf16 inputs: neither the memory nor the operators of a real run. The function
    is replaced by name, because a torch function mode is off while a backward pass recomputes a checkpoint.
    """
    functional = torch.nn.functional
    usual = functional.scaled_dot_product_attention

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        query = args[0] if args else kwargs["query"]
        return (_attention if query.device.type == "meta" else usual)(*args, **kwargs)

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = usual


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    aten = torch.ops.aten
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    bias = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    saved = query.requires_grad or key.requires_grad or value.requires_grad
    return aten._scaled_dot_product_efficient_attention(query, key, value, bias, saved, dropout_p, is_causal, scale=scale)[0]


def _on_meta(model: FlowModel) -> FlowModel:
    """A shallow copy with every module and tensor among its attributes on the meta device."""
    modules = [value for value in vars(model).values() if isinstance(value, nn.Module)]
    memo: dict[int, Any] = {}
    for t in (t for module in modules for t in module_tensors(module)):
        shadow = torch.empty_like(t, device="meta")
        memo[id(t)] = nn.Parameter(shadow, t.requires_grad) if isinstance(t, nn.Parameter) else shadow
    found = copy.copy(model)
    for name, value in vars(model).items():
        if isinstance(value, nn.Module):
            setattr(found, name, copy.deepcopy(value, memo))
        elif isinstance(value, Tensor):
            setattr(found, name, value.to("meta"))
    return found


def _peak(run: Callable[[Any], None], given: Any) -> int:
    with PeakMemory("meta") as memory:
        run(given)
    return memory.peak
