"""Preprocessing against Pillow, transformers' image processors and filters written out in fp64."""

import pytest
import torch
from pictures import as_pil, by_pillow, cubic, noise, resized, triangle

from adagrpo.estimate.counting import PeakMemory
from adagrpo.rewards.pixels import (
    Normalise,
    Preprocess,
    center_crop,
    grey_levels,
    middle,
    patches,
    pil_resize,
    shorter_side,
    smart_size,
)

PIXELS = 256 * 28 * 28  # of HPS-v3
SIZES = [(224, 224), (512, 512), (720, 720), (511, 767), (767, 511), (768, 512), (810, 400), (400, 810)]


@pytest.mark.parametrize("size", SIZES)
def test_resizing_is_pillows(size) -> None:
    """Measured: no level differs. Pillow on another processor may round a weight elsewhere: one level, here and there."""
    images = noise(*size)
    for target in (shorter_side(size, 224), smart_size(size, 28, PIXELS, PIXELS)):
        error = (pil_resize(grey_levels(images), target) - by_pillow(images, target)).abs()
        assert error.max() <= 1
        assert (error > 0).float().mean() <= 0.0005


@pytest.mark.parametrize(
    ("size", "target"),
    [((120, 50), (150, 100)), ((120, 50), (110, 100)), ((40, 80), (80, 40)), ((41, 20), (30, 15)), ((1, 5), (3, 2))],
)
def test_growing_and_squashing_are_pillows_too(size, target) -> None:
    images = noise(*size, count=9)
    error = (pil_resize(grey_levels(images), target) - by_pillow(images, target)).abs()
    assert error.max() <= 1
    assert (error > 0).float().mean() <= 0.0005


@pytest.mark.parametrize("size", [(96, 96), (90, 131), (131, 60), (20, 45), (3, 200), (200, 3)])
def test_a_window_is_what_it_shows_of_the_whole(size) -> None:
    levels, target = grey_levels(noise(*size, count=2)), shorter_side(size, 32)
    for rounding in ("down", "even"):
        window = middle(target, (32, 32), rounding)
        assert torch.equal(pil_resize(levels, target, window), center_crop(pil_resize(levels, target), (32, 32), rounding))


def test_the_middle_of_a_strip_costs_no_more_than_that_of_a_square() -> None:
    """As GenEval's thinnest objects are: the whole would be 224 x 458752 pixels."""
    with PeakMemory("cpu") as memory:
        assert Preprocess(224, (224, 224))(noise(1, 2048)).shape == (1, 3, 224, 224)
    assert memory.peak < 50e6


def test_levels_are_rounded_once_and_not_a_number_stays() -> None:
    images = torch.tensor([0.0, 1.0, 100.4 / 255, 100.6 / 255, -0.1, 1.1, torch.nan])
    levels = grey_levels(images)
    assert levels[:6].tolist() == [0, 255, 100, 101, 0, 255] and levels[6].isnan()
    assert torch.equal(grey_levels(torch.tensor([7, 255], dtype=torch.uint8)), torch.tensor([7.0, 255.0]))
    assert grey_levels(images.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("margin", "down", "even"), [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 1, 2), (5, 2, 2), (91, 45, 46)])
def test_odd_margins_of_a_crop(margin: int, down: int, even: int) -> None:
    columns = torch.arange(8 + margin).expand(1, 1, 8, -1)
    for rounding, first in (("down", down), ("even", even)):
        for image in (columns, columns.mT):
            crop = center_crop(image, (8, 8), rounding)
            assert crop.shape == (1, 1, 8, 8) and crop.min() == first and crop.max() == first + 7


@pytest.mark.parametrize("size", [(96, 96), (95, 133), (131, 90), (20, 45)])
def test_clip_preprocessing_is_transformers(size) -> None:
    from transformers import CLIPImageProcessorPil

    images, ours = noise(*size, count=2), Preprocess(32, (32, 32))
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = theirs(as_pil(images), return_tensors="pt").pixel_values
    error = (ours(images) - expected).abs() * ours.std * 255
    assert error.max() < 1.01
    assert (error > 0.01).float().mean() <= 0.002


@pytest.mark.parametrize("size", [(90, 60), (60, 95), (24, 20)])
def test_floating_point_ways_are_their_filters(size) -> None:
    images = noise(*size)
    target, mean, std = shorter_side(size, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    rounded = (images.double() * 255).round() / 255
    cases = {"bicubic": (rounded, cubic, 2.0), "bilinear": (images, triangle, 1.0)}
    for way, (seen, kernel, support) in cases.items():
        expected = resized(seen, target, kernel, support)
        assert way == "bilinear" or (expected.min() < -0.05 and expected.max() > 1.05)  # no bounds
        expected = (expected - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)
        found = Preprocess(32, None, mean, std, way=way)(images)
        assert found.shape == (1, 3, *target) and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)


def test_an_image_of_the_right_size_is_not_resized() -> None:
    images, plain = noise(32, 40), Normalise()
    rounded = (images * 255).round() / 255
    for way, seen in (("pil", rounded), ("bicubic", rounded), ("bilinear", images)):
        assert torch.equal(Preprocess(32, None, way=way)(images), plain(seen))
    assert Preprocess((16, 16), None)(images).shape == (1, 3, 16, 16)


def test_images_are_prepared_alike_alone_and_together() -> None:
    images = noise(50, 70, count=3)
    for way in ("pil", "bicubic", "bilinear"):
        prepare = Preprocess(32, (32, 32), way=way, rounding="even")
        assert torch.equal(prepare(images), torch.cat([prepare(image[None]) for image in images]))


@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((512, 512), (448, 448)),
        ((1024, 1024), (448, 448)),
        ((720, 720), (448, 448)),
        ((512, 768), (364, 532)),
        ((5, 900), (56, 6020)),
    ],
)
def test_sizes_of_qwen2_vl(size, target) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    found = smart_size(size, 28, PIXELS, PIXELS)
    assert found == target == smart_resize(*size, 28, PIXELS, PIXELS)
    for least, most in ((56 * 56, PIXELS), (100 * PIXELS, 200 * PIXELS), (56 * 56, 400 * PIXELS)):
        assert smart_size(size, 28, least, most) == smart_resize(*size, 28, least, most)
    with pytest.raises(ValueError, match="2001 x 10 pixels are too elongated"):
        smart_size((10, 2001), 28, PIXELS, PIXELS)


def test_patches_of_qwen2_vl_are_its_processors() -> None:
    from transformers import Qwen2VLImageProcessorPil

    images, least = noise(70, 120, count=2), 4 * 28 * 28
    theirs = Qwen2VLImageProcessorPil(min_pixels=least, max_pixels=least)(as_pil(images), return_tensors="pt")
    size, normalise = smart_size((70, 120), 28, least, least), Normalise()
    found, grid = patches(normalise(pil_resize(grey_levels(images), size) / 255))
    assert torch.equal(grid, theirs.image_grid_thw) and found.shape == theirs.pixel_values.shape
    assert ((found - theirs.pixel_values).abs() > 1e-5).float().mean() <= 0.002
    exact, _ = patches(normalise(by_pillow(images, size) / 255))
    torch.testing.assert_close(exact, theirs.pixel_values, atol=1e-6, rtol=0)
