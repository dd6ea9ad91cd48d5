"""A verifiable reward: what a picture shows, read from its pixels alone, against what its prompt asks for.

Every step is batched: pixels are named by palette line, connected components are found by propagating labels, shapes
are told by templates over the component's bounding box, and found objects are assigned to wanted ones by trying all
assignments. Credit is graded: right colour with wrong shape, one object too few, or a relation nearly met all pay less
than the whole, and surplus objects and clutter cost in proportion to their area.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
import torch
from torch.nn import functional as F

from adagrpo.prompts.prompt import data_of
from adagrpo.tiny.prompts import UNLEARNABLE
from adagrpo.tiny.render import BACKGROUND, IMAGE_SIZE, PALETTE, coverage
from adagrpo.tiny.scenes import COLOURS, MAX_OBJECTS, SHAPES, parse_prompt

_KEPT = 6  # largest components that are looked at as objects; the rest only count as surplus
_NO_COLOUR = len(COLOURS)
_CHUNK = 64

_PARTIAL = 0.40  # credit of an object whose colour alone, or shape alone, is right
_RECALL_POWER = 2.0
_SHORT = 6.0  # pixels by which a relation may be missed before it earns nothing
_SURPLUS = 0.40  # factor per surplus object
_UNRELATED = 0.30  # factor where the relation does not hold at all
_LARGE = 256.0  # pixels; twice this is no object any more
_STRAY, _BRIGHT = 0.09, 0.12  # squared distances, from a colour's line and from the background
_GRID, _SHARPNESS, _UNLIKE = 8, 0.01, 0.08  # shape templates: cells a side, mean squared errors
_DUST = 0.02  # reward of the brightest picture for an unlearnable prompt
_SPECK, _SOLID = 5.0, 14.0  # component areas in pixels that count as nothing and as an object


@dataclass(frozen=True)
class FoundObject:
    """One object in a picture: nearest colour (None where none is near) and shape, centre and area in pixels."""

    colour: str | None
    shape: str
    x: float
    y: float
    area: int


@dataclass(frozen=True)
class Verdict:
    """What was found in one picture and how it was judged.

    `reward` in [0, 1]; `exact` whether everything asked for is there and nothing else; `recall` in [0, 1] the wanted
    objects found, with partial credit; `surplus` the number of objects too many, specks counted by area; `related` in
    [0, 1] how far the relation is met (1 where none is asked for).
    """

    reward: float
    exact: bool
    recall: float
    surplus: float
    related: float
    objects: tuple[FoundObject, ...]


class TinyReward:
    """Scores pictures of the tiny world; stateless, deterministic, and independent of how a batch is split."""

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Images [N, 3, H, W] float in [0, 1] and N prompts -> rewards [N] float32 in [0, 1] on the images' device.

        A picture with a non-finite pixel scores NaN. For a prompt whose metadata has `UNLEARNABLE` the reward is 0.02 times the
        mean of all its pixels, whatever it shows. Raises `ValueError` for other shapes or dtypes, for a number of prompts
        other than N, and for a prompt that is not of the tiny world.
        """
        _check(images, prompts)
        parts = [
            _judge(images[at : at + _CHUNK], prompts[at : at + _CHUNK])[0]["reward"] for at in range(0, len(prompts), _CHUNK)
        ]
        rewards = torch.cat(parts) if parts else images.new_zeros(0, dtype=torch.float32)
        unlearnable = [UNLEARNABLE in data_of(prompt) for prompt in prompts]
        if not any(unlearnable):
            return rewards
        dust = _DUST * images.float().mean((1, 2, 3)) + 0 * rewards  # NaN where the reward is
        return torch.where(torch.tensor(unlearnable, device=images.device), dust, rewards)


def inspect(images: torch.Tensor, prompts: Sequence[str]) -> list[Verdict]:
    """As `TinyReward`, with one `Verdict` per picture that also says what was found. Same arguments and errors."""
    _check(images, prompts)
    verdicts = []
    for at in range(0, len(prompts), _CHUNK):
        scores, found = _judge(images[at : at + _CHUNK], prompts[at : at + _CHUNK])
        rows = {name: value.tolist() for name, value in scores.items()}
        objects = _describe(found)
        verdicts += [Verdict(objects=objects[n], **{name: row[n] for name, row in rows.items()}) for n in range(len(objects))]
    return verdicts


@dataclass(frozen=True)
class _Found:
    """The largest components of N pictures: [N, K] tensors, K = `_KEPT`, largest first; `weight` is 0 where there is none."""

    weight: torch.Tensor  # [N, K] 0 to 1: how much of an object it is, by area
    area: torch.Tensor  # [N, K] pixels
    centre: torch.Tensor  # [N, K, 2] (x, y) of the bounding box
    colour: torch.Tensor  # [N, K, 6] closeness to each colour, 0 to 1
    shape: torch.Tensor  # [N, K, 4] likeness to each shape, 0 to 1
    total: torch.Tensor  # [N] summed weight of all components, the small ones included


def _check(images: torch.Tensor, prompts: Sequence[str]) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images must be floats of shape [N, 3, H, W], got {images.dtype} {tuple(images.shape)}")
    if isinstance(prompts, str) or len(prompts) != len(images):
        raise ValueError(
            f"{len(images)} images need as many prompts, got {prompts if isinstance(prompts, str) else len(prompts)}"
        )


@torch.no_grad()
def _judge(images: torch.Tensor, prompts: Sequence[str]) -> tuple[dict[str, torch.Tensor], _Found]:
    finite = images.isfinite().flatten(1).all(1)
    found = _find(torch.where(finite[:, None, None, None], images, 0).float().clamp(0, 1))
    wanted = torch.tensor([_wanted(prompt) for prompt in prompts], device=images.device)
    valid, group = wanted[:, :MAX_OBJECTS, 0] >= 0, wanted[:, :MAX_OBJECTS, 2]
    colour = _pick(found.colour, wanted[:, :MAX_OBJECTS, 0].clamp_min(0))
    shape = _pick(found.shape, wanted[:, :MAX_OBJECTS, 1].clamp_min(0))
    quality = (colour * shape + _PARTIAL * (colour * (1 - shape) + shape * (1 - colour))) * found.weight[:, None]
    slots, credit = _assign(quality * valid[..., None])
    number = valid.sum(1)
    recall = credit.sum(1) / number
    surplus = (found.total - number).clamp_min(0)
    related = _relation(found.centre.gather(1, slots[..., None].expand(-1, -1, 2)), credit, group, valid, wanted[:, -1])
    asked = wanted[:, -1, 0] >= 0
    factor = torch.where(asked, _UNRELATED + (1 - _UNRELATED) * related, 1.0)
    reward = recall**_RECALL_POWER * _SURPLUS**surplus * factor
    exact = ((credit >= 0.7) | ~valid).all(1) & (surplus < 0.5) & (related >= _SHORT / (_SHORT + 1)) & finite
    return {
        "reward": torch.where(finite, reward, float("nan")),
        "exact": exact,
        "recall": recall,
        "surplus": surplus,
        "related": related,
    }, found


@lru_cache(maxsize=65536)
def _wanted(prompt: str) -> tuple[tuple[int, int, int], ...]:
    """Rows (colour, shape, group) of the wanted objects, filled up with -1, then one row (axis, sign, 0) of the relation."""
    spec = parse_prompt(prompt)
    rows = [
        (COLOURS.index(part.colour), SHAPES.index(part.shape), number)
        for number, part in enumerate(spec.groups)
        for _ in range(part.count)
    ]
    rows += [(-1, -1, -1)] * (MAX_OBJECTS - len(rows))
    relation = {None: (-1, 0, 0), "left": (0, 1, 0), "right": (0, -1, 0), "above": (1, 1, 0), "below": (1, -1, 0)}
    return (*rows, relation[spec.relation])


def _pick(scores: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Scores [N, K, C] at the wanted classes [N, S] -> [N, S, K]."""
    return scores.mT.gather(1, index[..., None].expand(-1, -1, scores.shape[1]))


def _assign(quality: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The assignment of found to wanted objects of the greatest total quality.

    Quality [N, S, K] -> (found object of each slot [N, S], its quality [N, S]). Sixty-four images have 360 assignments
    of 6 found to 4 wanted objects each: trying all of them is cheaper than an algorithm.
    """
    table = _assignments().to(quality.device)
    worth = torch.stack([quality[:, slot, table[:, slot]] for slot in range(MAX_OBJECTS)]).sum(0)
    best = table[worth.argmax(1)]
    return best, quality.gather(2, best[..., None])[..., 0]


@lru_cache(maxsize=1)
def _assignments() -> torch.Tensor:
    return torch.tensor(list(permutations(range(_KEPT), MAX_OBJECTS)))


def _relation(
    centre: torch.Tensor, credit: torch.Tensor, group: torch.Tensor, valid: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """How far the relation is met, [N] in [0, 1], from the centres [N, S, 2] of the assigned objects.

    Along the wanted axis the groups' centres must be further apart than across it, and no object of the second group
    may come before one of the first: the lesser of the two distances, graded from 6 pixels short to 1 pixel beyond.
    """
    asked = wanted[:, 0] >= 0
    axis = wanted[:, :1].clamp_min(0)
    along = centre.gather(2, axis[..., None].expand(-1, centre.shape[1], 1))[..., 0] * wanted[:, 1:2]
    across = centre.gather(2, 1 - axis[..., None].expand(-1, centre.shape[1], 1))[..., 0]
    members = [(valid & (group == number)) for number in (0, 1)]
    sizes = [member.sum(1).clamp_min(1) for member in members]
    mean = [
        [(values * member).sum(1) / size for member, size in zip(members, sizes, strict=True)] for values in (along, across)
    ]
    dominance = (mean[0][1] - mean[0][0]) - (mean[1][1] - mean[1][0]).abs()
    ordered = torch.where(members[1], along, 1e3).amin(1) - torch.where(members[0], along, -1e3).amax(1)
    margin = torch.minimum(dominance, ordered)
    present = torch.where(valid, credit, 1.0).amin(1)
    return torch.where(asked, ((margin + _SHORT) / (_SHORT + 1)).clamp(0, 1) * (present / 0.3).clamp(0, 1), 1.0)


def _find(images: torch.Tensor) -> _Found:
    """Components of one palette colour, or of none, in finite images [N, 3, H, W] in [0, 1]."""
    if images.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE):
        images = F.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="area")
    names, cover = _name_pixels(images)
    shown = (names >= 0).flatten(1)
    labels = _label(names).flatten(1)
    area = torch.zeros(shown.shape, device=images.device).scatter_add_(1, labels, shown.float())
    weights = ((area - _SPECK) / (_SOLID - _SPECK)).clamp(0, 1)
    largest, root = area.topk(_KEPT, dim=1)
    masks = ((labels[:, None] == root[..., None]) & shown[:, None]).unflatten(2, (IMAGE_SIZE, IMAGE_SIZE)).float()
    drawn = F.max_pool2d(masks, 3, stride=1, padding=1) * cover[:, None]  # with the blurred edge, for sub-pixel boxes
    box = torch.stack([*_extent(drawn.amax(2), masks.amax(2)), *_extent(drawn.amax(3), masks.amax(3))], -1)
    return _Found(
        weight=weights.gather(1, root) * (2 - largest / _LARGE).clamp(0, 1),
        area=largest,
        centre=torch.stack([box[..., 0] + box[..., 1], box[..., 2] + box[..., 3]], -1) / 2,
        colour=_colours(images, masks.flatten(2)),
        shape=_shapes(drawn, box),
        total=weights.sum(1),
    )


def _name_pixels(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Colour index and coverage in [0, 1] of each pixel, both [N, H, W].

    The index is -1 for background and `_NO_COLOUR` for bright pixels far from every line background-colour.
    """
    lines = _palette(images.device) - BACKGROUND
    lengths = lines.square().sum(1)[:, None, None]
    pixels = images - BACKGROUND
    dots = torch.einsum("nchw,kc->nkhw", pixels, lines)
    share = (dots / lengths).clamp(0, 1.15)
    energy = pixels.square().sum(1)
    distance, name = (energy[:, None] - 2 * share * dots + share.square() * lengths).min(1)
    stray = distance > _STRAY
    cover = torch.where(stray, (energy > _BRIGHT).float(), share.gather(1, name[:, None])[:, 0].clamp(max=1))
    return torch.where(cover > 0.5, name.masked_fill(stray, _NO_COLOUR), -1), cover


def _label(names: torch.Tensor, rounds: int = 10) -> torch.Tensor:
    """Label 4-connected pixels of equal name by the largest pixel index among them, [N, H, W] int64.

    Each round takes the neighbours' maximum and then the label of the label, so that labels travel in growing strides.
    Ten rounds are enough for anything compact; a winding shape may stay in pieces, and pieces cost as surplus.
    """
    count, height, width = names.shape
    labels = torch.arange(height * width, device=names.device).view(1, height, width).expand(count, -1, -1)
    across, down = names[:, :, 1:] == names[:, :, :-1], names[:, 1:] == names[:, :-1]
    for _ in range(rounds):
        row = torch.where(across, torch.maximum(labels[:, :, 1:], labels[:, :, :-1]), -1)
        labels = torch.maximum(labels, torch.maximum(F.pad(row, (0, 1), value=-1), F.pad(row, (1, 0), value=-1)))
        column = torch.where(down, torch.maximum(labels[:, 1:], labels[:, :-1]), -1)
        above, below = F.pad(column, (0, 0, 0, 1), value=-1), F.pad(column, (0, 0, 1, 0), value=-1)
        flat = torch.maximum(labels, torch.maximum(above, below)).flatten(1)
        labels = flat.gather(1, flat).view(count, height, width)
    return labels


def _extent(profile: torch.Tensor, solid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sub-pixel begin and end, [N, K] each, of objects whose coverage and mask, projected on one axis, are [N, K, 32]."""
    first = solid.argmax(2, keepdim=True) + 1
    last = IMAGE_SIZE - solid.flip(2).argmax(2, keepdim=True)
    padded = F.pad(profile, (1, 1))
    begin = first - padded.gather(2, first) - padded.gather(2, first - 1)
    end = last - 1 + padded.gather(2, last) + padded.gather(2, last + 1)
    return begin[..., 0], end[..., 0]


def _colours(images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Closeness of each component's colour to the palette, [N, K, 6] in [0, 1]; bright pixels count, blurred edges do not."""
    pixels = images.flatten(2).mT
    bright = (pixels - BACKGROUND).square().sum(2).square()
    weight = masks * bright[:, None]
    mean = weight @ pixels / weight.sum(2, keepdim=True).clamp_min(1e-6)
    distance = torch.cdist(mean, _palette(images.device).expand(len(images), -1, -1))
    return (1 - (distance - 0.15) / 0.35).clamp(0, 1)


def _shapes(drawn: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """Likeness of each component to each shape, [N, K, 4] in [0, 1]: its coverage, averaged over the cells of a grid
    that spans its bounding box, against the shapes' templates."""
    across, down = _cells(box[..., 0], box[..., 1]), _cells(box[..., 2], box[..., 3])
    sample = (down @ drawn @ across.mT).flatten(2)
    template = _templates().to(drawn.device)
    error = (sample.square().sum(2, keepdim=True) - 2 * sample @ template.mT + template.square().sum(1)) / _GRID**2
    return ((-error / _SHARPNESS).softmax(2) * 1.25).clamp(max=1) * (2 - error / _UNLIKE).clamp(0, 1)


def _cells(begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Weights [N, K, grid, 32] that average pixels over equal cells of the intervals [begin, end], [N, K] each."""
    pixels = torch.arange(IMAGE_SIZE, device=begin.device)
    edges = torch.lerp(begin[..., None], end[..., None], torch.linspace(0, 1, _GRID + 1, device=begin.device))
    reached = (edges[..., None] - pixels).clamp(0, 1)
    return (reached[..., 1:, :] - reached[..., :-1, :]) * (_GRID / (end - begin).clamp_min(1e-3))[..., None, None]


@lru_cache(maxsize=1)
def _templates() -> torch.Tensor:
    """The shapes on the grid over their bounding box, [4, grid * grid]."""
    scale = IMAGE_SIZE // _GRID
    drawn = np.stack([coverage(shape, IMAGE_SIZE / 2, IMAGE_SIZE / 2, IMAGE_SIZE) for shape in SHAPES])
    return torch.from_numpy(drawn).float().reshape(-1, _GRID, scale, _GRID, scale).mean((2, 4)).flatten(1)


def _palette(device: torch.device) -> torch.Tensor:
    return torch.tensor([PALETTE[name] for name in COLOURS], device=device)


def _describe(found: _Found) -> list[tuple[FoundObject, ...]]:
    near, colour = found.colour.max(2)
    named = torch.where(near > 0, colour, _NO_COLOUR).tolist()
    shape, area, centre = found.shape.argmax(2).tolist(), found.area.int().tolist(), found.centre.tolist()
    return [
        tuple(
            FoundObject(
                (*COLOURS, None)[named[n][k]], SHAPES[shape[n][k]], x=centre[n][k][0], y=centre[n][k][1], area=area[n][k]
            )
            for k in range(_KEPT)
            if area[n][k] > (_SPECK + _SOLID) / 2
        )
        for n in range(len(area))
    ]
