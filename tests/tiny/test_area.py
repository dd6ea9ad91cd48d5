"""The reward for little colour, against what the renderer drew."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adagrpo.tiny.area import SmallArea
from adagrpo.tiny.render import coverage, place, render
from adagrpo.tiny.scenes import parse_prompt

PROMPTS = ("a red circle", "three blue squares", "a yellow triangle left of a cyan cross", "four green circles")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_score_is_what_the_renderer_left_dark(prompt: str) -> None:
    spec, seed = parse_prompt(prompt), 7
    boxes = place(spec, np.random.default_rng(seed))
    shapes = [group.shape for group in spec.groups for _ in range(group.count)]
    drawn = sum(coverage(shape, x, y, size).sum() for shape, (x, y, size) in zip(shapes, boxes, strict=True))
    picture = torch.from_numpy(render(spec, np.random.default_rng(seed))).permute(2, 0, 1)[None] / 255
    assert SmallArea()(picture, [prompt]).item() == pytest.approx(1 - drawn / 32**2, abs=0.02)


def test_black_is_one_white_is_none_and_a_broken_picture_fails() -> None:
    pictures = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32), torch.zeros(3, 32, 32)])
    pictures[2, 0, 4, 4] = torch.nan
    scores = SmallArea()(pictures, ["a red circle"] * 3)
    assert scores[:2].tolist() == [1, 0] and scores[2].isnan()
    assert scores.dtype == torch.float32
