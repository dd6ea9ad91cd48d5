"""GenEval as a reward (arXiv 2310.11513): objects found by Mask2Former, their colours told by CLIP, scored by a formula.

Images stay on their device. The objects found are read from it once per call, and their colours once more: their number is not
known before.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..models.loading import check_component, check_finite, load_component, read_json_object, refuse_differences
from ..models.registry import Component
from .base import matched
from .geneval_rules import CLASSES, COLOURS, COUNTING, MAX_OBJECTS, Found, Record, coloured, flow_grpo, official, record_of
from .host import no_score
from .pixels import Normalise, Preprocess, grey_levels, middle, pil_resize, shorter_side
from .similarity import Similarity, check_clip, check_vocabulary, load_clip, read_processor
from .towers import place, shared
from .weights import load_tokenizer, refuse_form

FORMULAS = ("official", "flow-grpo", "flow-grpo-strict")
_DETECTOR = Component(
    "detector",
    "transformers",
    "Mask2FormerForUniversalSegmentation",
    spare=r"\.relative_position_index$",  # worked out from the window's size
    unread=r"\.encoder\.swin\.layernorm\.",  # behind the last stage, whose own norm is read
)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for the detector
_DIVISOR, _ELONGATED = 32, 1333 / 800
_ROWS, _MASKS, _CROPS = 8, 16, 32  # images, masks at full size, and crops that are worked on at once
_GREY = 153.0  # #999, where an object is not
_TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
# How other lists of COCO's classes call them; GenEval's own names are first of all.
_ALIASES = {
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "hair dryer": "hair drier",
    "doughnut": "donut",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """A detection.

    Attributes:
        box: x0, y0, x1, y1 in pixels, the last two exclusive.
        mask: float [h, w], the detector's logits for it, at the detector's own size.
    """

    score: float
    box: tuple[int, int, int, int]
    mask: Tensor


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Heights and widths: of the images, as the detector sees them, and with its padding below and to the right."""

    outer: tuple[int, int]
    inner: tuple[int, int]
    padded: tuple[int, int]

    @classmethod
    def of(cls, levels: Tensor, side: int) -> Sizes:
        """Of images [N, 3, H, W]: the shorter side becomes ``side``, but the longer one 5/3 of it at most; as mmdetection."""
        height, width = levels.shape[2:]
        scale = min(side / min(height, width), _ELONGATED * side / max(height, width))
        inner = (int(height * scale + 0.5), int(width * scale + 0.5))
        return cls((height, width), inner, (-(-inner[0] // _DIVISOR) * _DIVISOR, -(-inner[1] // _DIVISOR) * _DIVISOR))

    def grown(self, masks: Tensor) -> Tensor:
        """The detector's masks [P, h, w] at the images' size, the padding cut off."""
        masks = F.interpolate(masks[:, None], self.padded, mode="bilinear")[:, :, : self.inner[0], : self.inner[1]]
        return F.interpolate(masks, self.outer, mode="bilinear")[:, 0]


class GenEval:
    """How well a picture shows the objects, counts, colours and places of its prompt's GenEval record, [N].

    The record travels with the prompt, as a line of GenEval's ``evaluation_metadata.jsonl`` or of Flow-GRPO's has it.

    Thresholds, colours and formulas are those of the released code; the detector is not. It is Mask2Former with Swin-S, trained
    on COCO, too, but by its authors, where GenEval takes mmdetection's own training run: figures are not comparable with
    published ones.

    Args:
        path: folder or Hub id (downloaded unless ``HF_HUB_OFFLINE`` is set) of a ``Mask2FormerForUniversalSegmentation``
            that tells the instances of COCO's 80 classes.
        clip: folder or Hub id of the ``CLIPModel`` that tells colours, with its tokenizer.
        formula: ``official``, 1 or 0; ``flow-grpo``, the mean over parts, which is negative for many objects too many; or
            ``flow-grpo-strict``, 1 or 0 for exact counts.
        threshold: an object counts if its score is above it.
        counting_threshold: the same, for prompts of the task ``counting``.
        side: pixels that the shorter side has for the detector.

    Attributes:
        failures: images without a score so far, by reason.

    Raises:
        InputError: a checkpoint that is missing or not complete, or a value that cannot be.
    """

    def __init__(
        self,
        path: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "openai/clip-vit-large-patch14",
        formula: str = "official",
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        side: int = 800,
    ) -> None:
        _check_values(formula, threshold, counting_threshold, side)
        self.detector = shared((_DETECTOR.kind, place(path)), lambda: _load_detector(path))
        self.names = class_names(self.detector.config.id2label, path)
        self.colours = Colours(clip)
        self.clip = self.colours.model
        self.normalise = Normalise(_MEAN, _STD)
        self.formula, self.side = formula, side
        self.threshold, self.counting_threshold = threshold, counting_threshold
        self.failures: Counter[str] = Counter()

    @staticmethod
    def check(path: str, clip: str, formula: str, threshold: float, counting_threshold: float, side: int) -> None:
        """Raise what the constructor can find without reading weights; Hub ids are only checked for their form."""
        _check_values(formula, threshold, counting_threshold, side)
        refuse_form(path, f"rewards: {path}")
        check_clip(clip)
        if Path(path).is_dir():
            check_component(_DETECTOR, Path(path), f"rewards: {path}")
            class_names(read_json_object(Path(path) / "config.json", f"rewards: {path}").get("id2label", {}), path)

    @staticmethod
    def check_prompts(prompts: Sequence[str]) -> None:
        """Refuse prompts without a record that can be scored, see ``record_of``."""
        for prompt in prompts:
            record_of(prompt)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images [N, 3, H, W] in [0, 1] and N prompts -> scores [N] float32; NaN where not all pixels are finite, and, with a
        warning that says why, where a prompt has no record."""
        records = [self._asked(prompt) for prompt in matched(images, prompts)]
        if self.detector.device != images.device:
            self.detector.to(images.device)
        found: list[float] = []
        for start in range(0, len(records), _ROWS):
            found += self._scores(grey_levels(images[start : start + _ROWS]), records[start : start + _ROWS])
        scores = torch.tensor(found, dtype=torch.float32).to(images.device, non_blocking=True)
        return torch.where(images.isfinite().flatten(1).all(1), scores, torch.nan)

    def _scores(self, levels: Tensor, records: Sequence[Record | None]) -> list[float]:
        """Scores of a chunk's grey levels [N, 3, H, W]."""
        seen = self.detect(levels, [self._least(record) for record in records])
        asked = [
            (image, name, i)
            for image, record in enumerate(records)
            if record is not None
            for name, i in coloured(record, {name: len(ones) for name, ones in seen[image].items()}, self.formula != "official")
        ]
        sizes = Sizes.of(levels, self.side)
        crops = [_crop(levels[image], seen[image][name][i], sizes) for image, name, i in asked]
        told = dict(zip(asked, self.colours(crops, [name for _, name, _ in asked]), strict=True))
        scores = []
        for image, record in enumerate(records):
            objects = {
                name: [Found(one.box, told.get((image, name, i))) for i, one in enumerate(ones)]
                for name, ones in seen[image].items()
            }
            scores.append(float("nan") if record is None else self._score(record, objects))
        return scores

    def _score(self, record: Record, objects: Mapping[str, Sequence[Found]]) -> float:
        if self.formula == "official":
            return official(record, objects)
        return flow_grpo(record, objects)[self.formula == "flow-grpo-strict"]

    def _asked(self, prompt: str) -> Record | None:
        try:
            return record_of(prompt)
        except InputError as error:
            self.failures[no_score("geneval", error)[1]] += 1
            return None

    def _least(self, record: Record | None) -> float:
        return self.counting_threshold if record is not None and record.tag == COUNTING else self.threshold

    def detect(self, levels: Tensor, thresholds: Sequence[float]) -> list[dict[str, list[Seen]]]:
        """Objects by class in grey levels [N, 3, H, W], the surest first, at most 16 of a class.

        An object's score is its class's probability times the mean probability of its mask's pixels; as many are looked at as
        the detector has queries, the most probable first.
        """
        sizes = Sizes.of(levels, self.side)
        pixels = self.normalise(F.interpolate(levels, sizes.inner, mode="bilinear", antialias=True) / 255)
        pixels = F.pad(pixels, (0, sizes.padded[1] - sizes.inner[1], 0, sizes.padded[0] - sizes.inner[0]))
        output = self.detector(pixel_values=pixels.to(self.detector.dtype))
        likely = output.class_queries_logits.float().softmax(-1)[..., :-1]  # the last class is no object
        queries, classes = likely.shape[1:]
        best, where = likely.flatten(1).topk(queries)
        image, rank = (best > min(thresholds)).nonzero(as_tuple=True)
        where = where[image, rank]
        masks = output.masks_queries_logits[image, where // classes].float()
        sure, boxes = [best.new_zeros(0)], [where.new_zeros(0, 4)]
        for part in masks.split(_MASKS):
            grown = sizes.grown(part)
            inside = grown > 0
            sure.append((grown.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6))
            boxes.append(_boxes(inside))
        scores = (best[image, rank] * torch.cat(sure)).double()
        table = torch.cat([scores[:, None], image[:, None], (where % classes)[:, None], torch.cat(boxes)], 1).tolist()
        found: list[dict[str, list[Seen]]] = [defaultdict(list) for _ in thresholds]
        for row, (score, of, label, *box) in sorted(enumerate(table), key=lambda entry: -entry[1][0]):
            ones = found[int(of)][self.names[int(label)]]
            if score > thresholds[int(of)] and len(ones) < MAX_OBJECTS:
                x0, y0, x1, y1 = map(int, box)
                ones.append(Seen(score, (x0, y0, x1, y1), masks[row]))
        return [{name: ones for name, ones in by_class.items() if ones} for by_class in found]


class Colours(Similarity):
    """The colours of crops, by zero-shot classification with a ``CLIPModel`` and three templates."""

    def __init__(self, path: str) -> None:
        model, tokenizer = load_clip(path, "fp32"), load_tokenizer(path, f"rewards: {path}")
        check_vocabulary(tokenizer, path, model.config, path)
        side = model.config.vision_config.image_size
        super().__init__(model, tokenizer, Preprocess(side, (side, side)))
        self._tables: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, crops: Sequence[Tensor], names: Sequence[str]) -> list[str]:  # type: ignore[override]
        """One of ``COLOURS`` for each crop of grey levels [3, h, w] of an object of that class."""
        side = self.preprocess.crop
        assert side is not None
        told: list[Tensor] = []
        for start in range(0, len(crops), _CROPS):
            part = range(start, min(start + _CROPS, len(crops)))
            sizes = [shorter_side((crops[i].shape[1], crops[i].shape[2]), side[0]) for i in part]
            shown = [pil_resize(crops[i][None], s, middle(s, side, "even")) for i, s in zip(part, sizes, strict=True)]
            features = self._image_features(torch.cat(shown) / 255)
            tables = torch.stack([self._table(names[i], features.device) for i in part])
            told.append(torch.einsum("nd,ncd->nc", features, tables).argmax(1))
        return [COLOURS[i] for i in torch.cat(told).tolist()] if told else []

    def _table(self, name: str, device: torch.device) -> Tensor:
        """Unit vectors [10, D] of the colours of objects of a class: the mean over the templates' own."""
        if name not in self._tables or self._tables[name].device != device:
            texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in _TEMPLATES]
            each = torch.stack([self._one(text, device) for text in texts]).unflatten(0, (len(COLOURS), -1))
            self._tables[name] = F.normalize(each.mean(1), dim=1)
        return self._tables[name]


def class_names(id2label: Mapping[Any, str], path: str) -> list[str]:
    """GenEval's name of each class of a detector, in its order.

    Raises:
        InputError: it does not know all of COCO's classes.
    """
    known = [id2label[key].lower() for key in sorted(id2label, key=int)]
    names = [_ALIASES.get(name, name) for name in known]
    if missing := [name for name in CLASSES if name not in names]:
        raise InputError(
            f"rewards: {path}: {len(missing)} of GenEval's {len(CLASSES)} classes are not in id2label, such as {missing[0]}; "
            "name a detector of COCO's instances"
        )
    return names


def _boxes(inside: Tensor) -> Tensor:
    """Boxes int64 [P, 4] (x0, y0, x1, y1), the last two exclusive, of masks [P, H, W]; the whole image where one is empty."""
    sides = []
    for along in (inside.any(1), inside.any(2)):
        at = along.byte()
        sides.append((at.argmax(1), along.shape[1] - at.flip(1).argmax(1)))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], 1)


def _crop(levels: Tensor, seen: Seen, sizes: Sizes) -> Tensor:
    """An object's box out of grey levels [3, H, W], grey where the object is not."""
    x0, y0, x1, y1 = seen.box
    inside = sizes.grown(seen.mask[None])[0] > 0
    return torch.where(inside, levels, _GREY)[:, y0:y1, x0:x1]


def _check_values(formula: str, threshold: float, counting_threshold: float, side: int) -> None:
    if formula not in FORMULAS:
        raise InputError(f"rewards: geneval: formula = {formula}: one of {', '.join(FORMULAS)}")
    for name, value in (("threshold", threshold), ("counting_threshold", counting_threshold)):
        if not 0 <= value < 1:
            raise InputError(f"rewards: geneval: {name} = {value}: a probability, from 0 up to 1")
    if side < _DIVISOR:
        raise InputError(f"rewards: geneval: side = {side}: at least {_DIVISOR} pixels")


def _load_detector(path: str) -> Any:
    """A frozen fp32 detector on the CPU, every tensor of it from its files."""
    where = f"rewards: {path}"
    if Path(path).is_dir():
        model = load_component(_DETECTOR, Path(path), check_component(_DETECTOR, Path(path), where), torch.float32, where)
    else:
        load = partial(_DETECTOR.cls.from_pretrained, dtype=torch.float32, output_loading_info=True)
        model, info = read_processor(path, load)
        misshaped = {name: (tuple(found), tuple(wanted)) for name, found, wanted in info["mismatched_keys"]}
        refuse_differences(_DETECTOR, where, info["missing_keys"], info["unexpected_keys"], misshaped)
    check_finite({_DETECTOR.name: model}, where)
    return model.requires_grad_(False).eval()
