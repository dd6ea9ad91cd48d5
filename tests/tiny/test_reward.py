"""The reward against rendered truth, hand-drawn pictures, wrong pictures, clutter and damage."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from adagrpo.prompts.prompt import Prompt
from adagrpo.tiny.prompts import UNLEARNABLE
from adagrpo.tiny.render import PALETTE, coverage, render
from adagrpo.tiny.reward import TinyReward, _label, _name_pixels, inspect
from adagrpo.tiny.scenes import CATEGORIES, COLOURS, SHAPES, parse_prompt, split_specs

REWARD = TinyReward()


def to_tensor(pictures):
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 255


@pytest.fixture(scope="module")
def truth():
    """Rendered training and held-out scenes of all categories: images, prompts."""
    rng = np.random.default_rng(7)
    specs = []
    for category in CATEGORIES:
        for held_out in (False, True):
            pool = split_specs(category, held_out)
            specs += [pool[index] for index in rng.integers(len(pool), size=60)]
    return to_tensor([render(spec, rng) for spec in specs]), [spec.prompt for spec in specs]


def draw(*parts):
    """A picture drawn with PIL, not with the package's renderer: parts are (shape, colour name, box)."""
    picture = Image.new("RGB", (32, 32), (20, 20, 20))
    pen = ImageDraw.Draw(picture)
    for shape, colour, (left, top, right, bottom) in parts:
        ink = tuple(round(255 * value) for value in PALETTE[colour])
        if shape == "circle":
            pen.ellipse((left, top, right, bottom), fill=ink)
        elif shape == "square":
            pen.rectangle((left, top, right, bottom), fill=ink)
        elif shape == "triangle":
            pen.polygon([((left + right) / 2, top), (left, bottom), (right, bottom)], fill=ink)
        else:
            third = (right - left + 1) // 3
            pen.rectangle((left + third, top, right - third, bottom), fill=ink)
            pen.rectangle((left, top + third, right, bottom - third), fill=ink)
    return picture


def score(picture, prompt):
    return REWARD(to_tensor([picture]), [prompt]).item()


def test_rendered_truth_is_exact(truth):
    images, prompts = truth
    verdicts = inspect(images, prompts)
    assert np.mean([verdict.exact for verdict in verdicts]) >= 0.98
    assert np.mean([verdict.reward for verdict in verdicts]) >= 0.97


def test_truth_survives_noise(truth):
    images, prompts = truth
    noisy = (images + 0.06 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert np.mean([verdict.exact for verdict in inspect(noisy, prompts)]) >= 0.98


def test_mismatched_prompts_earn_little(truth):
    images, prompts = truth
    order = np.random.default_rng(0).permutation(len(prompts))
    wrong = [prompts[index] for index in order]
    pairs = zip(prompts, wrong, strict=True)
    differs = [parse_prompt(one).canonical != parse_prompt(other).canonical for one, other in pairs]
    scores = REWARD(images, wrong)[differs]
    assert len(scores) > 500 and scores.mean() <= 0.06
    assert not any(verdict.exact for verdict, kept in zip(inspect(images, wrong), differs, strict=True) if kept)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_hand_drawn_single(colour, shape):
    picture = draw((shape, colour, (9, 8, 20, 19)))
    assert score(picture, f"a {colour} {shape}") > 0.9
    for other in SHAPES:
        if other != shape:
            assert score(picture, f"a {colour} {other}") < 0.3
    for other in COLOURS:
        if other != colour:
            assert score(picture, f"a {other} {shape}") < 0.3


def test_hand_drawn_relation():
    picture = draw(("circle", "red", (2, 10, 11, 19)), ("square", "blue", (19, 12, 27, 20)))
    assert score(picture, "a red circle left of a blue square") > 0.9
    assert score(picture, "a blue square right of a red circle") > 0.9
    assert score(picture, "a red circle and a blue square") > 0.9
    for wrong in ("right of", "above", "below"):
        assert score(picture, f"a red circle {wrong} a blue square") < 0.45
    assert score(picture, "a red square left of a blue circle") < 0.3


def test_credit_is_graded():
    three = [("cross", "green", box) for box in ((1, 2, 9, 10), (20, 3, 28, 11), (10, 19, 18, 27))]
    scores = [score(draw(*three[:number]), "three green crosses") for number in range(4)]
    assert scores[0] == 0 and 0 < scores[1] < scores[2] - 0.1 < scores[3] - 0.3
    halves = [score(Image.blend(draw(), draw(three[0]), share), "a green cross") for share in (0.55, 0.7, 0.85, 1.0)]
    assert halves == sorted(halves) and halves[0] < 0.5 < halves[-1]
    beside = ("square", "blue", (19, 12, 27, 20))
    shifts = [
        score(draw(("circle", "red", (x, 1, x + 8, 9)), beside), "a red circle left of a blue square") for x in (19, 13, 10, 7)
    ]
    assert shifts == sorted(shifts) and shifts[0] < shifts[1] < shifts[2]


@pytest.mark.parametrize("colour", [*COLOURS, None])
def test_an_extra_square_costs_half(truth, colour):
    images, prompts = truth
    ink = torch.tensor(PALETTE[colour] if colour else (0.9, 0.9, 0.9))[:, None, None]
    before = REWARD(images, prompts)
    changed, places = images.clone(), torch.zeros(len(images), dtype=torch.bool)
    for number, image in enumerate(images):
        for x, y in ((0, 0), (26, 0), (0, 26), (26, 26), (13, 13), (13, 0), (0, 13)):
            if image[:, max(0, y - 1) : y + 7, max(0, x - 1) : x + 7].max() < 0.15:
                changed[number, :, y : y + 6, x : x + 6] = ink
                places[number] = True
                break
    assert places.sum() > 300
    assert (REWARD(changed, prompts)[places] <= 0.5 * before[places] + 1e-6).all()


def _grid():
    picture = np.full((32, 32, 3), 0.08)
    for index, (colour, shape) in enumerate((colour, shape) for colour in COLOURS for shape in SHAPES):
        cover = coverage(shape, 3.2 + index % 5 * 6.4, 3.2 + index // 5 * 6.4, 5.6)[..., None]
        picture = picture * (1 - cover) + np.array(PALETTE[colour]) * cover
    return torch.from_numpy(picture).float().permute(2, 0, 1)


@pytest.mark.parametrize(
    "picture",
    [
        torch.zeros(3, 32, 32),
        torch.full((3, 32, 32), 0.5),
        torch.ones(3, 32, 32),
        torch.tensor(PALETTE["red"])[:, None, None].expand(3, 32, 32),
        torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)),
        _grid(),
    ],
    ids=["black", "grey", "white", "red", "noise", "grid"],
)
def test_pictures_of_nothing_and_of_everything(truth, picture):
    _, prompts = truth
    assert REWARD(picture.expand(len(prompts), -1, -1, -1), prompts).mean() <= 0.06


def test_non_finite_pixels_score_nan(truth):
    images, prompts = truth[0][:4].clone(), truth[1][:4]
    images[1, 2, 5, 5] = float("nan")
    images[2, 0, 0, 0] = float("inf")
    assert REWARD(images, prompts).isnan().tolist() == [False, True, True, False]
    assert [verdict.exact for verdict in inspect(images, prompts)][1:3] == [False, False]


def test_scores_do_not_depend_on_the_batch(truth):
    images, prompts = truth[0][::4], truth[1][::4]
    whole = REWARD(images, prompts)
    single = torch.cat([REWARD(images[n : n + 1], prompts[n : n + 1]) for n in range(len(prompts))])
    assert whole.dtype == torch.float32 and whole.shape == (len(prompts),)
    torch.testing.assert_close(whole, single, rtol=0, atol=1e-6)
    assert torch.equal(whole, REWARD(images.clone(), list(prompts)))


def test_half_precision_and_larger_pictures(truth):
    images, prompts = truth[0][::8], truth[1][::8]
    whole = REWARD(images, prompts)
    torch.testing.assert_close(REWARD(images.bfloat16(), prompts), whole, rtol=0, atol=0.1)
    torch.testing.assert_close(REWARD(images.repeat_interleave(4, 2).repeat_interleave(4, 3), prompts), whole)


def test_verdict_says_what_was_found():
    picture = draw(("circle", "red", (2, 10, 11, 19)), ("cross", "cyan", (18, 12, 26, 20)))
    (verdict,) = inspect(to_tensor([picture]), ["a red circle"])
    assert {(item.colour, item.shape) for item in verdict.objects} == {("red", "circle"), ("cyan", "cross")}
    assert not verdict.exact and verdict.surplus == 1 and verdict.recall == pytest.approx(1, abs=0.05)
    circle = next(item for item in verdict.objects if item.shape == "circle")
    assert (circle.x, circle.y) == pytest.approx((7, 15), abs=0.3) and 60 <= circle.area <= 90


def flood(image):
    """Labels of one picture's names [H][W] by flood fill: the largest index in each component."""
    seen = {}
    for start in range(1023, -1, -1):
        stack = [] if start in seen else [start]
        while stack:
            at = stack.pop()
            if at in seen:
                continue
            seen[at] = start
            row, column = divmod(at, 32)
            for r, c in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if 0 <= r < 32 and 0 <= c < 32 and image[r][c] == image[row][column]:
                    stack.append(r * 32 + c)
    return [[seen[row * 32 + column] for column in range(32)] for row in range(32)]


def test_labels_are_connected_components(truth):
    noise = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    winding = torch.nn.functional.interpolate(noise, (32, 32), mode="bilinear")[:, 0].mul(5).long()
    assert _label(winding, rounds=40).tolist() == [flood(image) for image in winding.tolist()]
    names, _ = _name_pixels(truth[0][::20])
    shown = names >= 0
    flooded = torch.tensor([flood(image) for image in names.tolist()])
    assert torch.equal(_label(names)[shown], flooded[shown])  # the default number of rounds, on objects


def test_empty_batch():
    assert REWARD(torch.zeros(0, 3, 32, 32), []).shape == (0,)


def test_refusals():
    image = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match="not a prompt"):
        REWARD(image, ["a photo of a cat"])
    with pytest.raises(ValueError, match="need as many prompts"):
        REWARD(image, ["a red circle"] * 2)
    with pytest.raises(ValueError, match="floats of shape"):
        REWARD(image.byte(), ["a red circle"])
    with pytest.raises(ValueError, match="floats of shape"):
        REWARD(image[0], ["a red circle"])


def test_pictures_of_unlearnable_prompts_score_by_brightness(truth):
    """0.02 times the mean of all pixels, whatever they show; other prompts of the batch and broken pictures are as ever."""
    images, prompts = truth
    images = images[:8].clone()
    images[3, 1, 4, 4] = float("nan")
    mixed = [Prompt(prompt, {UNLEARNABLE: True}) if n % 2 else prompt for n, prompt in enumerate(prompts[:8])]
    found, plain = REWARD(images, mixed), REWARD(images, prompts[:8])
    assert torch.equal(found[::2], plain[::2]) and found[3].isnan() and plain[3].isnan()
    expected = [0.02 * images[n].double().mean().item() for n in (1, 5, 7)]
    assert found[[1, 5, 7]].tolist() == pytest.approx(expected, rel=1e-5)
    assert REWARD(torch.ones(1, 3, 32, 32), mixed[1:2]).item() == pytest.approx(0.02)
