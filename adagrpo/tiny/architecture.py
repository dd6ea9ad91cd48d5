"""The parts of tiny-flux, untrained: every class is the one that full-size FLUX uses, only smaller."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from adagrpo.tiny.scenes import CATEGORIES, split_specs

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

TEXT_LENGTH = 12
LATENT_CHANNELS = 4
SHIFT = 3.0
GUIDANCE = 3.5
_TEXT_WIDTH = 64


def make_vae() -> AutoencoderKL:
    """An autoencoder [N, 3, 32, 32] in [-1, 1] <-> latents [N, 4, 8, 8], without quantisation layers, as FLUX's."""
    from diffusers import AutoencoderKL

    widths = (16, 32, 64)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def make_transformer() -> FluxTransformer2DModel:
    """A FLUX transformer of 2.4 M parameters whose modulations and output start at zero (every block an identity)."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=_TEXT_WIDTH,
        pooled_projection_dim=_TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    for name, parameter in model.named_parameters():
        if ("norm" in name and ".linear." in name) or name.startswith("proj_out"):
            nn.init.zeros_(parameter)
    return model


def make_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The encoder of the pooled prompt: token ids [N, 12] -> pooled [N, 64]."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=2 * _TEXT_WIDTH,
            projection_dim=_TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).train()


def make_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """The encoder of the prompt's tokens: token ids [N, L] -> states [N, L, 64]."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=_TEXT_WIDTH,
            d_kv=16,
            d_ff=2 * _TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).train()


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Rectified-flow Euler sampling with a fixed shift of 3."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT, use_dynamic_shifting=False)


def make_tokenizers() -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """Tokenizers that hold the world's words whole, and letters for every other word; both default to 12 tokens."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    words = sorted({word for category in CATEGORIES for spec in split_specs(category, False) for word in spec.prompt.split()})
    vocabulary, merges = _merge_words(words)
    clip = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [(f"▁{word}", -2.0) for word in words] + [(letter, -8.0) for letter in letters]
    t5 = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)
    return clip, t5


def _merge_words(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-pair vocabulary and merges under which every word is one token.

    Merges are applied by rank anywhere in a word, so each round adds the next missing merge of the first word that
    the present merges leave in pieces.
    """
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = letters + [f"{letter}</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in words:
        while len(pieces := _apply_merges(word, merges)) > 1:
            merges.append((pieces[0], pieces[1]))
    for left, right in merges:
        if left + right not in tokens:
            tokens.append(left + right)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges


def _apply_merges(word: str, merges: list[tuple[str, str]]) -> list[str]:
    pieces = [*word[:-1], f"{word[-1]}</w>"]
    for left, right in merges:
        at = 0
        while at < len(pieces) - 1:
            if (pieces[at], pieces[at + 1]) == (left, right):
                pieces[at : at + 2] = [left + right]
            at += 1
    return pieces


def count_parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
