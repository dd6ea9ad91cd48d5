"""Pictures of a scene: random placement, sizes and shades, drawn with smooth edges by signed distances."""

from __future__ import annotations

import numpy as np

from adagrpo.tiny.scenes import SceneSpec

IMAGE_SIZE = 32
BACKGROUND = 0.08
PALETTE = {
    "red": (0.92, 0.14, 0.14),
    "green": (0.14, 0.80, 0.24),
    "blue": (0.18, 0.32, 0.96),
    "yellow": (0.95, 0.86, 0.16),
    "magenta": (0.88, 0.22, 0.86),
    "cyan": (0.16, 0.84, 0.90),
}

_SIZES = {1: (9.0, 14.0), 2: (8.5, 12.0), 3: (7.5, 10.5), 4: (7.5, 9.5)}
_GAP, _MARGIN, _RELATION_SLACK, _SHADE = 1.6, 1.0, 1.5, 0.03
_CANDIDATES, _ATTEMPTS = 128, 400


def render(spec: SceneSpec, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene: uint8 RGB of shape [32, 32, 3], a function of the specification and the generator's state.

    Objects keep a gap, lie inside the picture and respect the relation: along its axis every object of the first
    group lies before every object of the second, and the groups' centres are further apart along the axis than across.
    """
    boxes = place(spec, rng)
    pixels = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), BACKGROUND) + rng.uniform(-_SHADE, _SHADE) * 0.7
    kinds = [(group.colour, group.shape) for group in spec.groups for _ in range(group.count)]
    for (colour, shape), (x, y, size) in zip(kinds, boxes, strict=True):
        shade = np.asarray(PALETTE[colour]) + rng.uniform(-_SHADE, _SHADE, 3)
        cover = coverage(shape, x, y, size)[..., None]
        pixels = pixels * (1 - cover) + shade * cover
    return np.round(pixels.clip(0, 1) * 255).astype(np.uint8)


def place(spec: SceneSpec, rng: np.random.Generator) -> np.ndarray:
    """Centres and sizes in pixels, [objects, 3] as (x, y, size), in the order of the specification's groups.

    Raises `RuntimeError` where no layout is found, which does not happen for the world's specifications.
    """
    low, high = _SIZES[spec.total]
    first = spec.groups[0].count
    for _ in range(_ATTEMPTS):
        size = rng.uniform(low, high, (_CANDIDATES, spec.total))
        inset = size[..., None] / 2 + _MARGIN
        centre = inset + rng.random((_CANDIDATES, spec.total, 2)) * (IMAGE_SIZE - 2 * inset)
        fits = _apart(centre, size)
        if spec.relation:
            fits &= _related(centre, first, spec.relation)
        if fits.any():
            chosen = int(fits.argmax())
            return np.concatenate([centre[chosen], size[chosen, :, None]], axis=1)
    raise RuntimeError(f"no layout found for {spec.prompt!r}")


def coverage(shape: str, x: float, y: float, size: float) -> np.ndarray:
    """Share of each pixel that a shape covers, [32, 32] in [0, 1]; (x, y) is the centre of its bounding box in pixels."""
    axis = np.arange(IMAGE_SIZE) + 0.5
    dx, dy, half = np.abs(axis - x)[None, :], (axis - y)[:, None], size / 2
    if shape == "circle":
        distance = np.hypot(dx, dy) - half
    elif shape == "square":
        distance = np.maximum(dx, np.abs(dy)) - half
    elif shape == "triangle":  # apex up: the slanted sides meet at the top of the box
        distance = np.maximum(dy - half, (2 * dx - dy - half) / 5**0.5)
    else:
        arm, dy = size / 6, np.abs(dy)
        distance = np.minimum(np.maximum(dx - half, dy - arm), np.maximum(dx - arm, dy - half))
    return np.clip(0.5 - distance, 0, 1)


def _apart(centre: np.ndarray, size: np.ndarray) -> np.ndarray:
    """[candidates] bool: no two bounding boxes come closer than the gap."""
    between = np.abs(centre[:, :, None] - centre[:, None]).max(-1)
    reach = (size[:, :, None] + size[:, None]) / 2 + _GAP
    a, b = np.triu_indices(size.shape[1], 1)
    return (between[:, a, b] >= reach[:, a, b]).all(-1)


def _related(centre: np.ndarray, first: int, relation: str) -> np.ndarray:
    """[candidates] bool: the first objects stand in the relation to the others, with some slack."""
    along = 0 if relation in ("left", "right") else 1
    ahead, behind = centre[:, :first], centre[:, first:]
    if relation in ("right", "below"):
        ahead, behind = behind, ahead
    gap = behind[..., along].min(1) - ahead[..., along].max(1)
    means = behind.mean(1) - ahead.mean(1)
    return (gap >= _RELATION_SLACK) & (means[:, along] - np.abs(means[:, 1 - along]) >= _RELATION_SLACK)
