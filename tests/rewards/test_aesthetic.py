"""LAION's aesthetic predictor against its formula in fp64, and the tower that it shares with CLIP scores."""

import dataclasses
import gc
import threading
import weakref

import pytest
import torch
from pictures import by_pillow, noise
from small_clip import SIDE, write_clip
from torch import Tensor, nn

from adagrpo.assembly import load_reward
from adagrpo.errors import InputError
from adagrpo.recipe.keys import RewardConfig
from adagrpo.recipe.load import load_recipe
from adagrpo.rewards import PromptRows, build_reward, check_reward_files
from adagrpo.rewards.aesthetic import FILE
from adagrpo.rewards.pixels import CLIP_MEAN, CLIP_STD
from adagrpo.rewards.towers import place, shared

WIDTHS = {0: (24, 12), 2: (12, 9), 4: (9, 7), 6: (7, 5), 7: (5, 1)}


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> str:
    return str(write_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = {f"layers.{i}.weight": torch.randn(out, into, generator=generator) for i, (into, out) in WIDTHS.items()}
    return draw | {f"layers.{i}.bias": torch.randn(out, generator=generator) for i, (_, out) in WIDTHS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, state) -> str:
    folder = tmp_path_factory.mktemp("aesthetic")
    torch.save(state, folder / FILE)
    return str(folder)


@pytest.fixture(scope="module")
def reward(folder: str, tower: str):
    check_reward_files("aesthetic", {"path": folder, "tower": tower})
    return build_reward("aesthetic", {"path": folder, "tower": tower})


def by_hand(tower: str, state: dict[str, Tensor], images: Tensor) -> Tensor:
    """Scores [N] in fp64: Pillow's resizing, torchvision's middle, the stock model, its unit features through the layers."""
    from transformers import CLIPModel

    height, width = images.shape[2:]
    short = min(height, width)
    small = by_pillow(images, (SIDE * height // short, SIDE * width // short)).double() / 255
    top, left = (round((side - SIDE) / 2) for side in small.shape[2:])
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    pixels = (small[:, :, top : top + SIDE, left : left + SIDE] - mean) / std
    with torch.no_grad():
        x = CLIPModel.from_pretrained(tower).double().get_image_features(pixels).pooler_output
    x = x / x.square().sum(1, keepdim=True).sqrt()
    for number in WIDTHS:
        x = x @ state[f"layers.{number}.weight"].double().T + state[f"layers.{number}.bias"].double()
    return x[:, 0]


@pytest.mark.parametrize("size", [(40, 44), (44, 40), (96, 96)])
def test_scores_are_the_formula_by_hand(size, tower: str, state, reward) -> None:
    images = noise(*size, count=4)
    found, expected = reward(images, ["a"] * 4), by_hand(tower, state, images)
    assert expected.std() > 0.1
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
    assert torch.equal(found, reward(images, PromptRows(["another"], torch.zeros(4, dtype=torch.int64))))
    one_by_one = torch.cat([reward(image[None], [""]) for image in images])
    torch.testing.assert_close(found, one_by_one, atol=1e-4, rtol=0)
    images[2, 0, 0, 0] = torch.inf
    assert reward(images, ["a"] * 4).isnan().tolist() == [False, False, True, False]
    assert reward(images[:0], []).shape == (0,)


def test_bf16_rounds_the_tower_only(folder: str, tower: str, reward) -> None:
    rounded = build_reward("aesthetic", {"path": folder, "tower": tower, "dtype": "bf16"})
    assert rounded.model.visual_projection.weight.dtype == torch.bfloat16 and rounded.head is reward.head
    images = noise(40, 40, count=3)
    torch.testing.assert_close(rounded(images, [""] * 3), reward(images, [""] * 3), atol=2.0, rtol=0)


DAMAGED = {
    r"holds no layers\.4\.weight of a head": lambda s: s.pop("layers.4.weight"),
    r"lacks layers\.4\.bias": lambda s: s.pop("layers.4.bias"),
    r"holds layers\.9\.bias": lambda s: s.update({"layers.9.bias": torch.ones(1)}),
    r"layers\.6\.weight has shape \[5, 8\], which does not fit the layers around it": lambda s: s.update(
        {"layers.6.weight": torch.ones(5, 8)}
    ),
    r"layers\.7\.weight has shape \[2, 5\], which does not fit": lambda s: s.update({"layers.7.weight": torch.ones(2, 5)}),
    r"layers\.2\.bias holds values that are not finite": lambda s: s["layers.2.bias"].fill_(torch.nan),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_a_file_that_is_something_else_is_named(message: str, state, tower: str, tmp_path) -> None:
    changed = {name: tensor.clone() for name, tensor in state.items()}
    DAMAGED[message](changed)
    torch.save(changed, tmp_path / "head.pth")
    kwargs = {"path": str(tmp_path / "head.pth"), "tower": tower}
    with pytest.raises(InputError, match=f"head.pth.*{message}"):
        build_reward("aesthetic", kwargs)
    if "finite" not in message:
        with pytest.raises(InputError, match=f"head.pth.*{message}"):
            check_reward_files("aesthetic", kwargs)


def test_missing_files_and_another_tower_are_named(state, folder: str, tower: str, tmp_path) -> None:
    wider = state | {"layers.0.weight": torch.ones(12, 30)}
    torch.save(wider, tmp_path / "wider.pth")
    for use in (check_reward_files, build_reward):
        with pytest.raises(InputError, match=r"ava1-l14-linearMSE\.pth: no such file; fetch it from https://github.com/chr"):
            use("aesthetic", {"tower": tower})
        with pytest.raises(InputError, match="no such file or folder, nor a Hub id"):
            use("aesthetic", {"path": folder, "tower": "./nowhere"})
    with pytest.raises(InputError, match=r"wider\.pth takes 30 features of an image, .* makes 24"):
        build_reward("aesthetic", {"path": str(tmp_path / "wider.pth"), "tower": tower})


def test_rewards_of_one_checkpoint_hold_it_once(folder: str, tower: str, reward, monkeypatch) -> None:
    clip = build_reward("clip", {"path": tower})
    assert clip.model is reward.model
    monkeypatch.chdir(tower)
    assert build_reward("clip", {"path": ".", "processor": tower}).model is clip.model
    assert build_reward("clip", {"path": tower, "dtype": "bf16"}).model is not clip.model
    entries = [RewardConfig(name="clip", kwargs={"path": tower}, device=device) for device in ("", "cpu", "cpu")]
    at_home, *elsewhere = [load_reward(dataclasses.replace(load_recipe("tiny"), rewards=entries), i) for i in range(3)]
    assert at_home.model is not elsewhere[0].model is elsewhere[1].model  # it would travel between two calls
    images = noise(40, 40, count=2)
    alone = reward(images, ["", ""]), clip(images, ["a cat", "a dog"])
    assert torch.equal(reward(images, ["", ""]), alone[0]) and torch.equal(clip(images, ["a cat", "a dog"]), alone[1])


def test_a_shared_module_is_made_once_and_gone_with_its_last_holder() -> None:
    made: list[int] = []

    def load() -> nn.Module:
        made.append(1)
        return nn.Linear(1, 1)

    held: list[nn.Module] = []
    threads = [threading.Thread(target=lambda: held.append(shared("a key of its own", load))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1] and all(module is held[0] for module in held)
    gone = weakref.ref(held[0])
    held.clear()
    gc.collect()
    assert gone() is None
    shared("a key of its own", load)
    assert made == [1, 1]
    assert place("owner/name") == "owner/name"
