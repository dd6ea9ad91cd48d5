"""FLUX.1: any diffusers ``FluxPipeline`` folder or Hub id, guidance-distilled or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Conditioning
from .policy import Policy
from .registry import FLUX

FLUX1_DEV: dict[str, dict[str, Any]] = {
    "transformer": {
        "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
        "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
    },
    "vae": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 16, "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        "use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": True,
    },
    "text_encoder": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "vocab_size": 49408,
    },
    "text_encoder_2": {
        "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    },
    "scheduler": {
        "use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    },
}  # fmt: skip
FLUX1_SCHNELL: dict[str, dict[str, Any]] = FLUX1_DEV | {
    "transformer": FLUX1_DEV["transformer"] | {"guidance_embeds": False},
    "scheduler": {"use_dynamic_shifting": False, "shift": 1.0},
}


class FluxModel(Policy):
    """A ``FluxTransformer2DModel`` as policy; implements ``FlowModel``.

    Latents are packed: a token is a patch of 2 x 2 latents. Embeddings are T5's ``prompt_embeds`` [N, tokens, D] and CLIP's
    ``pooled`` [N, D']; ``guidance`` is fed to guidance-distilled transformers.
    """

    family = FLUX

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ids: dict[tuple[tuple[int, int], torch.device], Tensor] = {}

    @staticmethod
    def embed(pipeline: Any, prompt: str, max_tokens: int) -> tuple[Tensor, Tensor]:
        """See ``Policy``."""
        embeds, pooled, _ = pipeline.encode_prompt(
            prompt=prompt, prompt_2=None, max_sequence_length=max_tokens, device=pipeline.transformer.device
        )
        return embeds, pooled

    @staticmethod
    def text_shapes(config: Any, max_tokens: int) -> tuple[tuple[int, ...], ...]:
        """See ``Policy``."""
        return (max_tokens, config.joint_attention_dim), (config.pooled_projection_dim,)

    def given_levels(self, steps: int) -> list[float]:
        """See ``Policy``."""
        return [1 - k / steps for k in range(steps)]

    @property
    def multiple(self) -> int:
        return 2 ** len(self.vae.config.block_out_channels)  # of pixels to a latent, and two latents to a patch

    @property
    def latent_shape(self) -> tuple[int, int]:
        return self.grid[0] * self.grid[1], self.transformer.config.in_channels

    def token_ids(self, text_tokens: int) -> Tensor:
        """Positions [text + image tokens, 3] that the rotary embedding takes; those of text are 0."""
        return torch.cat([torch.zeros(text_tokens, 3, device=self.device, dtype=self.dtype), self._image_ids()])

    def _image_ids(self) -> Tensor:
        """Positions [L, 3] of the image's patches, made once per size and device."""
        key = (self.grid, self.device)
        if key not in self._ids:
            rows = torch.arange(self.grid[0]).repeat_interleave(self.grid[1])
            columns = torch.arange(self.grid[1]).repeat(self.grid[0])
            ids = torch.stack([torch.zeros_like(rows), rows, columns], 1)
            self._ids[key] = ids.to(self.device, self.dtype)
        return self._ids[key]

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity [R, L, C], computed as the stock pipeline does; the timestep's rounding is ``timestep_rounding``'s."""
        dtype = self.dtype
        embeds, pooled = (conditioning.tensors[key].to(dtype) for key in self.family.text_keys)
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((x.shape[0],), self.guidance, device=x.device, dtype=torch.float32)
        return self._active(
            hidden_states=x.to(dtype),
            timestep=self.timestep(sigma, dtype),
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x.device, dtype=dtype),
            img_ids=self._image_ids(),
            return_dict=False,
        )[0]

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Images [R, 3, H, W] in [0, 1], in the VAE's dtype."""
        (rows, columns), channels = self.grid, x.shape[2] // 4
        z = x.reshape(-1, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return self.pictures(z.reshape(-1, channels, 2 * rows, 2 * columns))

    def call_arguments(self) -> dict[str, Any]:
        """See ``Policy``."""
        return {"guidance_scale": self.guidance} if self.transformer.config.guidance_embeds else {}
