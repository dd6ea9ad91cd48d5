"""SD3 and SD3.5: any diffusers ``StableDiffusion3Pipeline`` folder or Hub id, with or without its T5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .base import Conditioning
from .policy import Policy
from .registry import SD3

CLIP_TOKENS = 77
_T5_XXL: dict[str, Any] = {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip

# Of transformer and VAE as others quote the Hub's configurations; the text encoders' are those of the published CLIP-L,
# CLIP-G and T5 v1.1 XXL.
SD35_MEDIUM: dict[str, dict[str, Any]] = {
    "transformer": {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
        "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    "vae": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 16, "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        "use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": True,
    },
    "text_encoder": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "projection_dim": 768, "vocab_size": 49408,
    },
    "text_encoder_2": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
        "projection_dim": 1280, "vocab_size": 49408, "hidden_act": "gelu",
    },
    "text_encoder_3": _T5_XXL,
    "scheduler": {"use_dynamic_shifting": False, "shift": 3.0},
}  # fmt: skip


class Sd3Model(Policy):
    """An ``SD3Transformer2DModel`` as policy; implements ``FlowModel``.

    A token of ours is one latent, seen through a view; the transformer makes its patches itself. Embeddings are
    ``prompt_embeds`` [N, 77 + tokens, D], those of both CLIPs beside each other and padded, then T5's (zeros without a T5), and
    ``pooled`` [N, D'] of both CLIPs.

    Guidance is classifier-free: above 1, a call is of two rows per image, those of the negative prompt first, and the velocity
    is theirs plus ``guidance`` times the difference.
    """

    family = SD3

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        negative = self.encode([self.negative_prompt]).tensors
        self._negative_embeds, self._negative_pooled = (negative[key] for key in self.family.text_keys)

    @staticmethod
    def embed(pipeline: Any, prompt: str, max_tokens: int) -> tuple[Tensor, Tensor]:
        """See ``Policy``."""
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt=prompt,
            prompt_2=None,
            prompt_3=None,
            device=pipeline.transformer.device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_tokens,
        )
        return embeds, pooled

    @staticmethod
    def text_shapes(config: Any, max_tokens: int) -> tuple[tuple[int, ...], ...]:
        """See ``Policy``."""
        return (CLIP_TOKENS + max_tokens, config.joint_attention_dim), (config.pooled_projection_dim,)

    @property
    def multiple(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1) * self.transformer.config.patch_size

    def resize(self, height: int, width: int) -> None:
        """See ``Policy``.

        Raises:
            InputError: sizes that do not divide into patches, or that have more of them than learned positions.
        """
        most = self.transformer.config.pos_embed_max_size * self.multiple
        if max(height, width) > most:
            raise InputError(
                f"model.height x model.width = {height} x {width}: this model has positions for {most} pixels at most"
            )
        super().resize(height, width)

    @property
    def _latents(self) -> tuple[int, int]:
        """Rows and columns of latents."""
        patch = self.transformer.config.patch_size
        return self.grid[0] * patch, self.grid[1] * patch

    @property
    def latent_shape(self) -> tuple[int, int]:
        rows, columns = self._latents
        return rows * columns, self.transformer.config.in_channels

    def spatial(self, x: Tensor) -> Tensor:
        """Latents [R, L, C] as the transformer and the pipeline have them, [R, C, h, w]: a view."""
        return x.transpose(1, 2).unflatten(2, self._latents)

    def timestep(self, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        """1000 sigma of noise levels [R], which the stock pipeline does not round to ``dtype``."""
        if self.timestep_rounding == "bf16":
            sigma = sigma.to(torch.bfloat16).to(sigma.dtype)
        return (sigma * 1000).floor() if self.timestep_rounding == "truncated" else sigma * 1000

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity [R, L, C], computed as the stock pipeline does."""
        dtype = self.dtype
        embeds, pooled = (conditioning.tensors[key].to(dtype) for key in self.family.text_keys)
        latents, timestep = self.spatial(x.to(dtype)), self.timestep(sigma, dtype)
        guided = self.rows_per_image == 2
        if guided:
            latents, timestep = torch.cat([latents] * 2), torch.cat([timestep] * 2)
            embeds, pooled = _below(self._negative_embeds, embeds), _below(self._negative_pooled, pooled)
        v = self._active(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        if guided:
            unconditional, conditional = v.chunk(2)
            v = unconditional + self.guidance * (conditional - unconditional)
        return v.flatten(2).transpose(1, 2).contiguous()

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Images [R, 3, H, W] in [0, 1], in the VAE's dtype."""
        return self.pictures(self.spatial(x))

    def call_arguments(self) -> dict[str, Any]:
        """See ``Policy``."""
        negative = {"negative_prompt": self.negative_prompt} if self.negative_prompt else {}
        return {"guidance_scale": self.guidance if self.rows_per_image == 2 else 1.0, **negative}


def _below(one: Tensor, rows: Tensor) -> Tensor:
    """``one`` [1, ...] for each of ``rows`` [R, ...], then these, on their device and in their dtype."""
    return torch.cat([one.to(rows).expand_as(rows), rows])
