"""FLUX.1-dev's architecture with random weights: benchmarks and device-free checks need its shapes, not its pictures."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from ..algorithm.sde import philox_normal
from .base import Conditioning
from .flux import FluxModel

TEXT_WIDTH, POOLED_WIDTH = 4096, 768
TRANSFORMER = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": TEXT_WIDTH, "pooled_projection_dim": POOLED_WIDTH,
    "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 16, "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": True,
}  # fmt: skip


class RandomEncoder:
    """Embeddings drawn from the prompt's checksum: the same prompt always gives the same tensors."""

    def __init__(self, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tokens, self.dtype, self.device = tokens, dtype, device

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        seeds = [zlib.crc32(prompt.encode()) for prompt in prompts]
        rows = torch.arange(self.tokens, device=self.device)
        embeds = torch.stack([philox_normal(seed, rows, TEXT_WIDTH, 0, 0) for seed in seeds])
        pooled = torch.cat([philox_normal(seed, rows[:1], POOLED_WIDTH, 1, 0) for seed in seeds])
        return Conditioning({"prompt_embeds": embeds.to(self.dtype), "pooled": pooled.to(self.dtype)})


def random_flux1_dev(
    dtype: torch.dtype, device: torch.device, height: int, width: int, max_text_tokens: int, guidance: float
) -> FluxModel:
    """FLUX.1-dev with random weights on ``device``; on ``meta`` it takes no memory and every host sync raises."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    with torch.device(device):
        transformer = FluxTransformer2DModel(**TRANSFORMER).to(dtype).eval()
        vae = AutoencoderKL(**VAE).to(dtype).requires_grad_(False).eval()
    encoder = RandomEncoder(max_text_tokens, dtype, device)
    return FluxModel(transformer, vae, encoder, height, width, guidance)
