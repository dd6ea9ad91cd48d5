"""Pictures obey the specification's geometry and depend on the generator alone."""

import numpy as np
import pytest

from adagrpo.tiny.render import PALETTE, coverage, place, render
from adagrpo.tiny.scenes import CATEGORIES, all_specs, parse_prompt


def test_same_seed_same_picture():
    spec = parse_prompt("two red circles left of a blue square")
    one, same, other = (render(spec, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert one.shape == (32, 32, 3) and one.dtype == np.uint8
    assert np.array_equal(one, same) and not np.array_equal(one, other)


@pytest.mark.parametrize("category", CATEGORIES)
def test_layouts_fit_stay_apart_and_respect_the_relation(category):
    rng = np.random.default_rng(0)
    specs = all_specs(category)
    for index in rng.integers(len(specs), size=60):
        spec = specs[index]
        x, y, size = place(spec, rng).T
        assert len(x) == spec.total
        assert min((x - size / 2).min(), (y - size / 2).min()) >= 1
        assert max((x + size / 2).max(), (y + size / 2).max()) <= 31
        for a in range(spec.total):
            for b in range(a):
                assert max(abs(x[a] - x[b]), abs(y[a] - y[b])) > (size[a] + size[b]) / 2 + 1.5
        if spec.relation:
            first = spec.groups[0].count
            along = {"left": -x, "right": x, "above": -y, "below": y}[spec.relation]
            assert along[:first].min() > along[first:].max()
            dx, dy = abs(x[:first].mean() - x[first:].mean()), abs(y[:first].mean() - y[first:].mean())
            assert (dx > dy) == (spec.relation in ("left", "right"))


def test_objects_have_their_colour_and_the_rest_is_dark():
    for seed in range(20):
        picture = render(parse_prompt("a yellow square"), np.random.default_rng(seed)) / 255
        bright = picture.max(2) > 0.7
        assert 64 <= bright.sum() <= 225
        assert np.abs(picture[bright].mean(0) - PALETTE["yellow"]).max() < 0.08
        assert np.median(picture[~bright]) < 0.12


@pytest.mark.parametrize(("shape", "share"), [("circle", np.pi / 4), ("square", 1.0), ("triangle", 0.5), ("cross", 5 / 9)])
def test_coverage_has_the_shapes_area(shape, share):
    drawn = coverage(shape, 16.3, 15.8, 12.0)
    assert drawn.min() == 0 and drawn.max() == 1
    assert drawn.sum() == pytest.approx(share * 144, rel=0.04)
