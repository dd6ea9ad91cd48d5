"""A small random detector and a small random CLIP for GenEval, in folders as the published ones are."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from small_clip import MERGES, TOKENS, write_tokenizer
from torch import nn

from adagrpo.rewards.geneval_rules import CLASSES

SIDE = 32  # of the CLIP's images
DARKNET = {
    "motorcycle": "motorbike",
    "airplane": "aeroplane",
    "couch": "sofa",
    "potted plant": "pottedplant",
    "dining table": "diningtable",
    "tv": "tvmonitor",
    "computer mouse": "mouse",
    "tv remote": "remote",
    "computer keyboard": "keyboard",
}


def write_geneval(root: Path, scale: int = 1) -> dict[str, str]:
    """Arguments ``path`` and ``clip``: the tensors and names of classes of the published detector, and 77 tokens.

    Args:
        scale: factor on all widths, and on the CLIP's image.
    """
    write_detector(root / "detector", scale)
    write_clip(root / "clip", scale)
    return {"path": str(root / "detector"), "clip": str(root / "clip")}


def write_detector(folder: Path, scale: int) -> None:
    """Mask2Former with Swin, sure of some of the noise it sees."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    stages = [f"stage{i}" for i in range(1, 5)]
    swin = SwinConfig(depths=[1] * 4, embed_dim=8 * scale, num_heads=[1, 1, 2, 2], window_size=4, out_features=stages)
    names = ("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward")
    sizes = dict.fromkeys(names, 32 * scale)
    layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 12}
    labels = {i: DARKNET.get(name, name) for i, name in enumerate(CLASSES)}
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, id2label=labels, **sizes, **layers))
    model.class_predictor.weight.data.normal_(std=3)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"  # the published file has no norm behind the backbone, and indices that are worked out
    tensors = {name: tensor for name, tensor in load_file(file).items() if ".swin.layernorm." not in name}
    tables = [name for name in tensors if name.endswith("relative_position_bias_table")]
    tensors |= {name.replace("bias_table", "index"): torch.zeros(16, 16, dtype=torch.int64) for name in tables}
    save_file(tensors, file, {"format": "pt"})


def write_clip(folder: Path, scale: int) -> None:
    """A CLIP that splits words into letters."""
    from transformers import CLIPConfig, CLIPModel

    width = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32 * scale, "intermediate_size": 64 * scale}
    text = width | {"vocab_size": len(TOKENS), "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2}
    vision = width | {"image_size": SIDE * scale, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3 / scale) if weight.ndim > 1 else None
    model.save_pretrained(folder)
    write_tokenizer(folder, TOKENS, MERGES, 77)
