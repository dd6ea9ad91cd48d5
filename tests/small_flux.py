"""The smallest FLUX transformer with every kind of tensor: one double and one single block, 32 wide, guidance-distilled."""

import types
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adagrpo.algorithm.sde import sigma_schedule
from adagrpo.algorithm.tables import RolloutTable, rollout_table
from adagrpo.forward.forwards import Forward
from adagrpo.models.flux import FluxModel
from adagrpo.models.policy import add_lora
from adagrpo.models.text import RandomEncoder

ARCHITECTURE = {
    "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 16, "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
PROMPTS = ["a red circle", "two blue squares"]


def small_flux(targets: Sequence[str] = (), tokens: int = 3, dtype: torch.dtype = torch.float32, **architecture) -> FluxModel:
    """Pictures of 2 x 3 patches; ``targets`` get adapters of rank 4 that are zero, everything else is trained without them."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(11)
    transformer = FluxTransformer2DModel(**(ARCHITECTURE | architecture)).to(dtype).eval()
    if targets:
        add_lora(transformer, 4, 8.0, targets)
    vae = types.SimpleNamespace(config=types.SimpleNamespace(block_out_channels=(1, 1, 1, 1)))
    encoder = RandomEncoder({"prompt_embeds": (tokens, 32), "pooled": (16,)}, dtype, torch.device("cpu"))
    return FluxModel(transformer, vae, encoder, 32, 48, 3.5)


def linear_names(model: FluxModel) -> list[str]:
    return [name for name, module in model.transformer.named_modules() if isinstance(module, nn.Linear)]


def table_of(model: FluxModel, steps: int = 4) -> RolloutTable:
    return rollout_table(sigma_schedule(steps, 3.0), "flow", 0.7).to(model.device, torch.float32)


def latents(model: FluxModel, rows: int) -> Tensor:
    return torch.randn(rows, *model.latent_shape, generator=torch.Generator().manual_seed(1)).to(model.dtype)


@torch.no_grad()
def velocity(forward: Forward, model: FluxModel, rows: int = 3) -> Tensor:
    """[rows, L, C] in float64 at different noise levels and prompts."""
    order = torch.arange(rows)
    prepared = forward.prepare(model.encode(PROMPTS))
    return forward.velocity(latents(model, rows), order % 4, prepared, order % len(PROMPTS)).double()
