"""The smallest complete SD3 pipeline, random weights, written by diffusers: two blocks, the first with its second attention."""

import dataclasses
from pathlib import Path

import torch

from adagrpo.models.making import load_policy
from adagrpo.models.pipeline import Source
from adagrpo.models.policy import Settings
from adagrpo.models.registry import SD3
from adagrpo.models.sd3 import CLIP_TOKENS, Sd3Model
from adagrpo.recipe.keys import Config
from adagrpo.recipe.load import load_recipe
from adagrpo.tiny.architecture import make_t5, make_tokenizers

HEIGHT, WIDTH, T5_TOKENS, STEPS = 32, 48, 6, 4
PROMPTS = ["a red circle", "two blue squares"]


def small_pipeline(t5: bool = True):
    """Pictures of 4 pixels to a latent and 2 latents to a patch; texts of 64, pooled to 2 x 24."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(7)
    clip, words = make_tokenizers()
    clip.model_max_length = CLIP_TOKENS

    def encoder(width: int) -> CLIPTextModelWithProjection:
        settings = {"hidden_size": width, "intermediate_size": 32, "projection_dim": 24, "num_attention_heads": 2}
        ends = {"bos_token_id": clip.bos_token_id, "eos_token_id": clip.eos_token_id, "pad_token_id": clip.pad_token_id}
        return CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=len(clip), num_hidden_layers=2, **settings, **ends))

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False, force_upcast=False,
        scaling_factor=1.5, shift_factor=0.06, **blocks,
    )  # fmt: skip
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=48,
        pos_embed_max_size=12, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    with torch.no_grad():
        for p in transformer.parameters():  # far from the start of a training: text and noise level are to matter
            p.add_(0.08 * torch.randn_like(p))
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoder(16),
        tokenizer=clip,
        text_encoder_2=encoder(32),
        tokenizer_2=clip,
        text_encoder_3=make_t5(words).eval() if t5 else None,
        tokenizer_3=words if t5 else None,
    )


def saved(folder: Path, t5: bool = True) -> Path:
    """The pipeline's folder."""
    small_pipeline(t5).save_pretrained(folder)
    return folder


def settings(guidance: float = 4.5, negative_prompt: str = "", dtype: torch.dtype = torch.float32) -> Settings:
    return Settings(dtype, torch.device("cpu"), HEIGHT, WIDTH, T5_TOKENS, guidance, negative_prompt)


def loaded(folder: Path, guidance: float = 4.5, negative_prompt: str = "", dtype: torch.dtype = torch.float32) -> Sd3Model:
    model = load_policy(SD3, Source(str(folder)), settings(guidance, negative_prompt, dtype))
    assert isinstance(model, Sd3Model)
    return model


def recipe(folder: Path, **sections) -> Config:
    """`tiny` on the small SD3, cut down to two quick iterations; keyword ``model={...}`` changes single keys."""
    small = {
        "model": {
            "family": "sd3", "path": str(folder), "height": HEIGHT, "width": WIDTH, "max_text_tokens": T5_TOKENS,
            "guidance": 4.5,
        },
        "train": {"iterations": 2, "slots": 2},
        "rollout": {"steps": STEPS, "sde_steps": (0, 1), "group_size": 3},
        "selection": {"candidates": 2},
        "optimizer": {"lr": 1e-3},
        "evaluation": {"every": 0, "final_prompts": 0},
        "output": {"grid_every": 0, "checkpoint_every": 0},
    }  # fmt: skip
    config = load_recipe("tiny")
    for section in {**small, **sections}:
        changes = {**small.get(section, {}), **sections.get(section, {})}
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})
    rewards = tuple(dataclasses.replace(r, name="brightness", kwargs={}) for r in config.rewards[:1])
    return dataclasses.replace(config, rewards=rewards)
