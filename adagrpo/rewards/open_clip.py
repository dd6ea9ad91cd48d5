"""Checkpoints of open_clip, without it: their layout as a ``transformers.CLIPModel``, their configuration, how they clean text.

A file tells widths, layers, patch and vocabulary by its shapes. Heads, activation and image size it does not; they are those of
``open_clip_config.json`` beside it, of the recipe's ``architecture``, or of ViT-H/14, which the published rewards are.
"""

from __future__ import annotations

import dataclasses
import html
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..models.loading import not_finite, read_json_object
from ..models.registry import Component
from .pixels import CLIP_MEAN, CLIP_STD, Preprocess
from .similarity import CLIP, in_dtype
from .towers import place, shared
from .weights import check_state, load_state, read_state, unfilled

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_pytorch_model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")

_DESCRIBED = "its own shapes"
_OPEN_CLIP = Component("open_clip's CLIP", "transformers", "CLIPModel")
_VIT_H = {"vision": (1280, 16), "text": (1024, 16)}  # width, heads
_ACTIVATIONS = ("gelu", "quick_gelu")
_PREFIX = {"vision": "visual.", "text": ""}
# transformers' names in open_clip's words, the longer ones first; q, k and v are one tensor there.
_WORDS = (
    ("vision_model.embeddings.patch_embedding", "visual.conv1"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.embeddings.", "visual."),
    ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.post_layernorm", "visual.ln_post"),
    ("vision_model.encoder.layers", "visual.transformer.resblocks"),
    ("visual_projection.weight", "visual.proj"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.embeddings.", ""),
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_projection.weight", "text_projection"),
    (".layer_norm", ".ln_"),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    (".self_attn.", ".attn."),
)
_QKV = re.compile(r"(.*\.attn\.)([qkv])_proj\.(weight|bias)")
_TRANSPOSED = ("visual.proj", "text_projection")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a file of weights does not tell; None is not known.

    Attributes:
        vision_heads, text_heads: of each attention.
        activation: ``gelu`` or ``quick_gelu``.
        image_size: pixels a side; None is what the positions cover.
    """

    vision_heads: int | None = None
    text_heads: int | None = None
    activation: str = "gelu"
    image_size: int | None = None

    def given(self, values: Mapping[str, Any] | None, where: str) -> Architecture:
        """With a recipe's ``architecture`` over it.

        Raises:
            InputError: an unknown key, or a value that its key does not take.
        """
        known = {field.name for field in dataclasses.fields(self)}
        for name, value in (values or {}).items():
            if name not in known:
                raise InputError(f"{where}: architecture has no {name}; it takes {', '.join(sorted(known))}")
            if name == "activation" and value not in _ACTIVATIONS:
                raise InputError(f"{where}: architecture.activation = {value}: one of {', '.join(_ACTIVATIONS)}")
            if name != "activation" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(f"{where}: architecture.{name} = {value}: a whole number above 0")
        return dataclasses.replace(self, **(values or {}))


def clean_text(text: str) -> str:
    """A prompt as open_clip's tokenizers see it: ftfy's repairs, HTML's entities twice, single spaces, lower case."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def check_cleaning() -> None:
    """Raise an InputError where ``clean_text`` cannot work."""
    try:
        import ftfy  # noqa: F401
    except ImportError as error:
        raise InputError("rewards: cleaning text as open_clip does needs ftfy: pip install 'adagrpo[rewards]'") from error


def read_config(file: Path, where: str) -> dict[str, Any]:
    """``open_clip_config.json`` beside a file of weights; {} where there is none.

    Raises:
        InputError: it is damaged, or of a model with another text or vision tower than CLIP's own.
    """
    path = file.parent / CONFIG
    if not path.is_file():
        return {}
    config = read_json_object(path, where)
    model = config.get("model_cfg")
    found = [model.get(f"{name}_cfg") for name in _PREFIX] if isinstance(model, dict) else []
    towers = [tower for tower in found if isinstance(tower, dict)]
    if len(towers) < len(_PREFIX):
        raise InputError(f"{where}: {path} names no vision_cfg and text_cfg; download it again")
    if other := [
        key for tower in towers for key in ("timm_model_name", "hf_model_name", "hf_tokenizer_name") if tower.get(key)
    ]:
        raise InputError(f"{where}: {path} names a {other[0]}: not a CLIP of open_clip's own towers")
    return config


def configured(config: Mapping[str, Any], otherwise: Architecture) -> Architecture:
    """The architecture that ``read_config`` found; ``otherwise`` where it found none."""
    if not config:
        return otherwise
    model = config["model_cfg"]
    vision, text = model["vision_cfg"], model["text_cfg"]
    heads = vision.get("width", 768) // vision.get("head_width", 64)
    activation = "quick_gelu" if model.get("quick_gelu", False) else "gelu"
    return Architecture(heads, text.get("heads", 8), activation, vision.get("image_size", 224))


def configured_preprocess(config: Mapping[str, Any], side: int, where: str) -> Preprocess:
    """Preprocessing of ``read_config``'s ``preprocess_cfg``; squashed to a square where there is none, as DFN's models want it.

    Raises:
        InputError: it resizes in a way that is not redone here.
    """
    found = config.get("preprocess_cfg", {})
    mode, filter_ = found.get("resize_mode", "shortest" if config else "squash"), found.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or filter_ != "bicubic":
        raise InputError(f"{where}: {CONFIG} resizes by {mode} and {filter_}; only shortest or squash and bicubic are known")
    stats = found.get("mean", CLIP_MEAN), found.get("std", CLIP_STD)
    if mode == "squash":
        return Preprocess((side, side), None, *stats)
    return Preprocess(side, (side, side), *stats, rounding="even")


def check_open_clip(file: Path, architecture: Architecture, where: str) -> None:
    """Compare names and shapes of a file with the CLIP that they and ``architecture`` make; no value is read.

    Raises:
        InputError: see ``weights.check_state``, or what ``architecture`` does not fit.
    """
    unfilled_clip(read_state(file, where, "meta"), architecture, f"{where}: {file}")


def unfilled_clip(state: Mapping[str, Tensor], architecture: Architecture, where: str) -> Any:
    """The ``CLIPModel`` of a state dict, which holds its tensors and no others, still without them.

    Raises:
        InputError: see ``check_open_clip``.
    """
    config = _config(state, architecture, where)
    model = unfilled(lambda: CLIP.cls(config))
    wanted: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        theirs = _theirs(name)
        shape = tensor.shape[::-1] if theirs in _TRANSPOSED else tensor.shape
        if _QKV.fullmatch(_worded(name)):
            shape = torch.Size((3 * shape[0], *shape[1:]))
        wanted[theirs] = torch.empty(shape, device="meta")
    check_state(wanted, state, _OPEN_CLIP, where, _DESCRIBED)
    return model


def load_open_clip(file: Path, architecture: Architecture, where: str, dtype: torch.dtype) -> Any:
    """The frozen ``CLIPModel`` of a file in open_clip's layout; shared, ``logit_scale`` always fp32.

    A text is read at the highest token of its vocabulary, its end.

    Raises:
        InputError: see ``check_open_clip``, or values that are not finite.
    """

    def load() -> Any:
        state = read_state(file, where)
        model = unfilled_clip(state, architecture, f"{where}: {file}")
        if bad := not_finite(state):  # by the file's own name
            raise InputError(f"{where}: {file}: {bad[0]} holds values that are not finite; download it again")
        parts = {name: _part(state, name) for name in model.state_dict()}
        return in_dtype(load_state(model, parts, CLIP, f"{where}: {file}", _DESCRIBED, torch.float32), dtype)

    return shared(("open_clip", place(file), architecture, dtype), load)


def _config(state: Mapping[str, Tensor], architecture: Architecture, where: str) -> Any:
    """The ``CLIPConfig`` that the shapes of a state dict and ``architecture`` make."""

    def shape(name: str, dimensions: int) -> torch.Size:
        if name not in state or state[name].ndim != dimensions:
            what = f"has shape {list(state[name].shape)}" if name in state else "is missing"
            raise InputError(f"{where}: {name} {what}: no CLIP in open_clip's layout")
        return state[name].shape

    def tower(kind: str, width: int, heads: int | None) -> dict[str, Any]:
        block = re.compile(rf"{re.escape(_PREFIX[kind])}transformer\.resblocks\.(\d+)\.")
        layers = {int(found[1]) for name in state if (found := block.match(name))}
        published = _VIT_H[kind]
        heads = heads or (published[1] if width == published[0] else None)
        if heads is None:
            raise InputError(
                f"{where}: heads are in no file, and known for towers of {published[0]} channels only; the {kind} tower has "
                f"{width}; set kwargs.architecture = {{ {kind}_heads = … }}"
            )
        if width % heads:
            raise InputError(f"{where}: {kind}_heads = {heads} do not share {width} channels; correct kwargs.architecture")
        inner = shape(f"{_PREFIX[kind]}transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
        sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": len(layers)}
        return sizes | {"num_attention_heads": heads, "hidden_act": architecture.activation}

    (vocabulary, text_width), context = shape("token_embedding.weight", 2), shape("positional_embedding", 2)[0]
    vision_width, _, patch, _ = shape("visual.conv1.weight", 4)
    covered = math.isqrt(shape("visual.positional_embedding", 2)[0] - 1) * patch
    text = {"vocab_size": vocabulary, "max_position_embeddings": context, "bos_token_id": vocabulary - 2}
    return CLIP.cls.config_class(
        text_config=tower("text", text_width, architecture.text_heads) | text | {"eos_token_id": vocabulary - 1},
        vision_config=tower("vision", vision_width, architecture.vision_heads)
        | {"image_size": architecture.image_size or covered, "patch_size": patch},
        projection_dim=shape("text_projection", 2)[1],
    )


def _worded(name: str) -> str:
    """A transformers name in open_clip's words, q, k and v still apart."""
    for ours, theirs in _WORDS:
        name = name.replace(ours, theirs)
    return name


def _theirs(name: str) -> str:
    """The tensor of open_clip's that holds a parameter of transformers'."""
    worded = _worded(name)
    found = _QKV.fullmatch(worded)
    return f"{found[1]}in_proj_{found[3]}" if found else worded


def _part(state: Mapping[str, Tensor], name: str) -> Tensor:
    """A parameter of transformers' out of open_clip's tensors."""
    tensor, found = state[_theirs(name)], _QKV.fullmatch(_worded(name))
    if found:
        return tensor.chunk(3)["qkv".index(found[2])]
    return tensor.T.contiguous() if _theirs(name) in _TRANSPOSED else tensor
