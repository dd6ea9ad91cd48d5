"""FLUX.1-dev's architecture with random weights: benchmarks and device-free checks need its shapes, not its pictures."""

from __future__ import annotations

import types
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..algorithm.sde import philox_normal
from ..errors import InputError
from .base import Conditioning
from .flux import FluxModel

TRANSFORMER = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
    "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 16, "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": True,
}  # fmt: skip
CLIP_TEXT = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "vocab_size": 49408,
}  # fmt: skip
T5 = {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
FLUX1_DEV = ("black-forest-labs/FLUX.1-dev", "random:flux1-dev")


class RandomEncoder:
    """Embeddings drawn from the prompt's checksum: the same prompt always gives the same tensors."""

    def __init__(self, tokens: int, width: int, pooled: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tokens, self.width, self.pooled, self.dtype, self.device = tokens, width, pooled, dtype, device

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        seeds = [zlib.crc32(prompt.encode()) for prompt in prompts]
        rows = torch.arange(self.tokens, device=self.device)
        embeds = torch.stack([philox_normal(seed, rows, self.width, 0, 0) for seed in seeds])
        pooled = torch.cat([philox_normal(seed, rows[:1], self.pooled, 1, 0) for seed in seeds])
        return Conditioning({"prompt_embeds": embeds.to(self.dtype), "pooled": pooled.to(self.dtype)})


def random_flux1_dev(
    dtype: torch.dtype, device: torch.device, height: int, width: int, max_text_tokens: int, guidance: float
) -> FluxModel:
    """FLUX.1-dev with random weights on ``device``; on ``meta`` it takes no memory and every host sync raises."""
    return random_flux(TRANSFORMER, dtype, device, height, width, max_text_tokens, guidance)


def random_flux(
    architecture: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    height: int,
    width: int,
    max_text_tokens: int,
    guidance: float,
) -> FluxModel:
    """A FLUX transformer of ``architecture`` (arguments of ``FluxTransformer2DModel``) with random weights; the VAE is
    FLUX.1's."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    with torch.device(device):
        transformer = FluxTransformer2DModel(**architecture).to(dtype).eval()
        vae = AutoencoderKL(**VAE).to(dtype).requires_grad_(False).eval()
    text_width, pooled = architecture["joint_attention_dim"], architecture["pooled_projection_dim"]
    return FluxModel(
        transformer, vae, RandomEncoder(max_text_tokens, text_width, pooled, dtype, device), height, width, guidance
    )


class ShapeEncoder:
    """Embeddings without content, on the meta device.

    Attributes:
        capacity: prompts the real encoder's cache holds.
    """

    def __init__(self, tokens: int, width: int, pooled: int, dtype: torch.dtype, capacity: int) -> None:
        self.shape, self.pooled, self.dtype, self.capacity = (tokens, width), pooled, dtype, capacity

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        shapes = {"prompt_embeds": self.shape, "pooled": (self.pooled,)}
        make = lambda shape: torch.empty(len(prompts), *shape, dtype=self.dtype, device="meta")  # noqa: E731
        return Conditioning({name: make(shape) for name, shape in shapes.items()})


def flux_architecture(
    path: str, dtype: torch.dtype, height: int, width: int, max_text_tokens: int, guidance: float, prompt_cache: int
) -> FluxModel:
    """A FLUX pipeline on the meta device, text encoders included, without reading or downloading its weights.

    Args:
        path: a pipeline folder, or FLUX.1-dev by its Hub id.

    Raises:
        InputError: another Hub id, or a folder whose configurations cannot be read.
    """
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    folder = Path(path)
    try:
        if path in FLUX1_DEV:
            settings = {"transformer": TRANSFORMER, "vae": VAE}
            clip, t5 = CLIPTextConfig(**CLIP_TEXT), T5Config(**T5)
        elif folder.is_dir():
            settings = {
                "transformer": FluxTransformer2DModel.load_config(folder / "transformer"),
                "vae": AutoencoderKL.load_config(folder / "vae"),
            }
            clip, t5 = (
                kind.from_pretrained(folder / name)
                for kind, name in ((CLIPTextConfig, "text_encoder"), (T5Config, "text_encoder_2"))
            )
        else:
            raise InputError(f"model.path = {path}: its architecture is not known here; download it and name its folder")
        with torch.device("meta"):
            transformer = FluxTransformer2DModel.from_config(settings["transformer"])
            vae = AutoencoderKL.from_config(settings["vae"])
            encoders = {"text_encoder": CLIPTextModel(clip), "text_encoder_2": T5EncoderModel(t5)}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"model.path = {path}: its configurations cannot be read: {error}") from error
    parts = {"transformer": transformer, "vae": vae, **encoders}
    for name, part in parts.items():
        torch.nn.Module.to(part, dtype)  # diffusers' own would warn of float32 modules that it does not have
        part.requires_grad_(name == "transformer").eval()
    encoder = ShapeEncoder(
        max_text_tokens, transformer.config.joint_attention_dim, transformer.config.pooled_projection_dim, dtype, prompt_cache
    )
    pipeline = types.SimpleNamespace(components=encoders)
    return FluxModel(transformer, vae, encoder, height, width, guidance, pipeline)
