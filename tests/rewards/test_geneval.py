"""GenEval with small random models: detections against transformers' own post-processing, colours against the released way with
Pillow, scores of pictures whose objects a planted detector tells by their paint."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from small_geneval import SIDE, write_geneval
from torch import Tensor, nn
from torch.nn import functional as F

from adagrpo.errors import InputError
from adagrpo.prompts.prompt import Prompt
from adagrpo.rewards import BUILT_IN, build_reward, check_reward_files
from adagrpo.rewards.geneval import GenEval, Sizes, class_names
from adagrpo.rewards.geneval_rules import CLASSES, COLOURS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_geneval(tmp_path_factory.mktemp("geneval"))


@pytest.fixture(scope="module")
def reward(folders):
    return build_reward("geneval", {**folders, "side": 384})


def noise(count: int, height: int, width: int) -> Tensor:
    coarse = torch.rand(count, 3, height // 16, width // 16, generator=torch.Generator().manual_seed(3))
    return (F.interpolate(coarse, (height, width)) * 255).round()


def test_detections_are_those_of_transformers(reward) -> None:
    """At the size that its post-processing works at: there it is upstream's, and ours has one resize less to differ in."""
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil as Processor

    levels = noise(2, 384, 384)
    with torch.no_grad():
        output = reward.detector(pixel_values=reward.normalise(levels / 255))
    expected = Processor().post_process_instance_segmentation(output, threshold=0.05, return_binary_maps=True)
    for found, theirs in zip(reward.detect(levels, [0.05] * 2), expected, strict=True):
        ours = sorted(((name, one) for name, ones in found.items() for one in ones), key=lambda entry: entry[1].score)
        segments = sorted(theirs["segments_info"], key=lambda segment: segment["score"])
        assert len(ours) == len(segments) > 2
        for (name, one), segment in zip(ours, segments, strict=True):
            ys, xs = theirs["segmentation"][segment["id"]].nonzero(as_tuple=True)
            assert name == CLASSES[segment["label_id"]] and one.score == pytest.approx(segment["score"], abs=1e-5)
            assert one.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def test_a_picture_is_detected_as_in_a_batch(reward) -> None:
    levels = noise(3, 96, 160)
    together = reward.detect(levels, [0.0] * 3)
    for i, found in enumerate(together):
        alone = reward.detect(levels[i : i + 1], [0.0])[0]
        assert {n: len(ones) for n, ones in alone.items()} == {n: len(ones) for n, ones in found.items()}
        for name, ones in found.items():
            assert [one.score for one in ones] == pytest.approx([one.score for one in alone[name]], abs=1e-4)


@pytest.mark.parametrize(
    ("height", "width", "inner", "padded"),
    [
        (512, 512, (800, 800), (800, 800)),
        (1024, 768, (1067, 800), (1088, 800)),
        (400, 1000, (533, 1333), (544, 1344)),  # the longer side decides
    ],
)
def test_sizes_for_the_detector(height, width, inner, padded) -> None:
    assert Sizes.of(torch.empty(1, 3, height, width), 800) == Sizes((height, width), inner, padded)


def test_padding_is_cut_off_before_masks_grow() -> None:
    mask = -torch.ones(1, 16, 16)
    mask[:, :8] = 1  # the picture; the lower half is padding
    assert (Sizes((16, 32), (32, 64), (64, 64)).grown(mask) > 0).all()
    assert float((Sizes((16, 32), (64, 64), (64, 64)).grown(mask) > 0).float().mean()) == 0.5


PAINT = {"dog": (200, 30, 40), "cat": (30, 60, 200), "clock": (40, 180, 60), "computer mouse": (240, 220, 20)}
FAINT = (140, 20, 140)  # a clock that the detector is not sure of


class Planted(nn.Module):
    """A detector that tells objects by their paint: one per flat colour and quadrant of the picture."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, normalise) -> None:
        super().__init__()
        self.normalise = normalise

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        count, _, height, width = pixel_values.shape
        cells = F.interpolate(pixel_values, (height // 4, width // 4), mode="area")
        masks, classes = [], []
        for name, paint in [*PAINT.items(), ("clock", FAINT)]:
            wanted = self.normalise(torch.tensor(paint).view(1, 3, 1, 1) / 255)
            inside = (cells - wanted).abs().amax(1) < 0.02
            for quadrant in range(4):
                rows, columns = torch.arange(height // 4) * 8 // height, torch.arange(width // 4) * 8 // width
                here = inside & ((rows[:, None] * 2 + columns[None]) == quadrant)
                logits = torch.zeros(count, len(CLASSES) + 1)
                there = here.flatten(1).any(1)
                logits[:, CLASSES.index(name)] = torch.where(there, 4.0 if paint == FAINT else 9.0, 0.0)
                logits[:, -1] = torch.where(there, 0.0, 9.0)
                masks.append(torch.where(here, 10.0, -10.0))
                classes.append(logits)
        return SimpleNamespace(class_queries_logits=torch.stack(classes, 1), masks_queries_logits=torch.stack(masks, 1))


def scene(*objects: tuple[str, int, int]) -> Tensor:
    """[3, 128, 128] in [0, 1], grey but for L-shaped objects of 24 by 16 pixels at (x, y)."""
    picture = torch.full((3, 128, 128), 120.0)
    for name, x, y in objects:
        paint = torch.tensor(PAINT.get(name, FAINT), dtype=torch.float32)[:, None, None]
        picture[:, y : y + 16, x : x + 24] = paint
        picture[:, y : y + 8, x : x + 12] = 120
    return picture / 255


@pytest.fixture
def planted(folders):
    made = GenEval(**folders, side=128)
    made.detector = Planted(made.normalise)
    return made


def asked(tag: str, *include: dict, exclude: tuple[dict, ...] = ()) -> Prompt:
    clauses = [{"count": 1} | clause for clause in include]
    return Prompt(f"{tag} {include}", {"tag": tag, "include": clauses, "exclude": list(exclude)})


CLOCKS = scene(("clock", 8, 8), ("clock", 72, 8), ("faint", 8, 72))
PETS = scene(("cat", 72, 24), ("dog", 8, 24))


@pytest.mark.parametrize(
    ("picture", "prompt", "scores"),
    [  # official, Flow-GRPO, strict
        (CLOCKS, asked("counting", {"class": "clock", "count": 2}, exclude=({"class": "clock", "count": 3},)), (1, 1, 1)),
        (CLOCKS, asked("two_object", {"class": "clock", "count": 2}, exclude=({"class": "clock", "count": 3},)), (0, 1 / 2, 0)),
        (CLOCKS, asked("counting", {"class": "clock", "count": 3}), (0, 2 / 3, 0)),
        (PETS, asked("position", {"class": "cat"}, {"class": "dog", "position": ["left of", 0]}), (1, 1, 1)),
        (PETS, asked("position", {"class": "dog"}, {"class": "cat", "position": ["left of", 0]}), (0, 3 / 4, 0)),
        (PETS, asked("single_object", {"class": "computer mouse"}), (0, 0, 0)),
    ],
)
def test_pictures_score_by_the_formula(planted, picture, prompt, scores) -> None:
    for formula, score in zip(("official", "flow-grpo", "flow-grpo-strict"), scores, strict=True):
        planted.formula = formula
        assert float(planted(picture[None], [prompt])) == pytest.approx(score)


def test_boxes_are_exact_and_the_surest_are_kept(planted, monkeypatch) -> None:
    found = planted.detect((CLOCKS * 255)[None], [0.3])[0]
    assert found["clock"][2].box == (8, 72, 32, 88)
    assert {one.box for one in found["clock"][:2]} == {(8, 8, 32, 24), (72, 8, 96, 24)}
    assert found["clock"][1].score > 0.9 > found["clock"][2].score > 0.3
    monkeypatch.setattr("adagrpo.rewards.geneval.MAX_OBJECTS", 2)
    kept = planted.detect((CLOCKS * 255)[None], [0.3])[0]["clock"]
    assert len(kept) == 2 and min(one.score for one in kept) > 0.9


def released_colours(folder: str, picture: Tensor, name: str, box: tuple[int, ...]) -> Tensor:
    """Cosines with the ten colours as the released code has them: Pillow's composite, crop and resize, torchvision's crop."""
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    image = Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())
    mask = (picture * 255 - torch.tensor(PAINT[name])[:, None, None]).abs().amax(0) < 1
    image = Image.composite(image, Image.new("RGB", image.size, "#999"), Image.fromarray(mask.numpy())).crop(box)
    short = min(image.size)
    image = image.resize((SIDE * image.width // short, SIDE * image.height // short), Image.Resampling.BICUBIC)
    left, top = (round((side - SIDE) / 2) for side in image.size)
    pixels = torch.frombuffer(bytearray(image.crop((left, top, left + SIDE, top + SIDE)).tobytes()), dtype=torch.uint8)
    pixels = pixels.view(1, SIDE, SIDE, 3).permute(0, 3, 1, 2) / 255
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels = (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    tables = []
    with torch.no_grad():
        for c in COLOURS:
            texts = [f"a photo of a {c} {name}", f"a photo of a {c}-colored {name}", f"a photo of a {c} object"]
            each = [
                F.normalize(model.get_text_features(**tokenizer(t, return_tensors="pt")).pooler_output[0], dim=0) for t in texts
            ]
            tables.append(F.normalize(torch.stack(each).mean(0), dim=0))
        return torch.stack(tables) @ F.normalize(model.get_image_features(pixel_values=pixels).pooler_output[0], dim=0)


def test_colours_are_told_as_released(planted, folders) -> None:
    expected = []
    for name, box in (("cat", (72, 24, 96, 40)), ("dog", (8, 24, 32, 40))):
        cosines = released_colours(folders["clip"], PETS, name, box)
        best = cosines.topk(2).values
        assert best[0] - best[1] > 2e-3  # not a tie: the two ways differ by a grey level at most
        expected.append(COLOURS[int(cosines.argmax())])
    prompts = [
        asked("color_attr", {"class": "cat", "color": cat}, {"class": "dog", "color": dog})
        for cat in dict.fromkeys((expected[0], "red", "white"))
        for dog in dict.fromkeys((expected[1], "green", "black"))
    ]
    right = [prompt.data["include"][0]["color"] == expected[0] for prompt in prompts]
    both = [ok and prompt.data["include"][1]["color"] == expected[1] for ok, prompt in zip(right, prompts, strict=True)]
    assert planted(PETS.expand(len(prompts), -1, -1, -1), prompts).tolist() == both and sum(both) == 1


def test_one_by_one_and_in_chunks_agree(planted, monkeypatch) -> None:
    prompts = [
        asked("counting", {"class": "clock", "count": 2}),
        asked("position", {"class": "cat"}, {"class": "dog", "position": ["left of", 0]}),
        asked("colors", {"class": "dog", "color": "red"}),
    ] * 4
    images = torch.stack([CLOCKS, PETS, scene(("dog", 40, 8))] * 4)
    planted.formula = "flow-grpo"
    whole = planted(images, prompts)
    assert torch.equal(whole, torch.cat([planted(image[None], [p]) for image, p in zip(images, prompts, strict=True)]))
    monkeypatch.setattr("adagrpo.rewards.geneval._ROWS", 5)
    monkeypatch.setattr("adagrpo.rewards.geneval._CROPS", 3)
    assert torch.equal(whole, planted(images, prompts))


def test_no_record_and_no_number_are_no_score(planted) -> None:
    prompt = asked("position", {"class": "cat"})
    broken = PETS.clone()
    broken[0, 0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match="geneval: no score: prompt 'a cat'"):
        scores = planted(torch.stack([PETS, broken, PETS]), [prompt, prompt, "a cat"])
    assert scores[0] == 1 and scores[1:].isnan().all() and planted.failures == {"refused prompt": 1}
    with pytest.raises(InputError, match="no GenEval record"):
        GenEval.check_prompts([prompt, "a cat"])
    assert planted(torch.empty(0, 3, 64, 64), []).shape == (0,)


@pytest.mark.parametrize(
    ("kwargs", "key"),
    [
        ({"formula": "strict"}, "formula"),
        ({"threshold": 1.0}, "threshold"),
        ({"side": 8}, "side"),
        ({"path": "/absent"}, "/absent"),
    ],
)
def test_values_that_cannot_be_are_refused_before_loading(kwargs, key, folders) -> None:
    check_reward_files("geneval", folders)
    with pytest.raises(InputError, match=key):
        check_reward_files("geneval", folders | kwargs)


def test_a_detector_of_other_classes_is_refused(folders) -> None:
    config = json.loads(Path(folders["path"], "config.json").read_text("utf-8"))
    assert class_names(config["id2label"], "x") == list(CLASSES)
    with pytest.raises(InputError, match="80 of GenEval's 80 classes"):
        class_names({str(i): f"LABEL_{i}" for i in range(80)}, "x")


def test_the_row_counts_both_models() -> None:
    from transformers import CLIPConfig, CLIPModel, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    stages = [f"stage{i}" for i in range(1, 5)]
    swin = SwinConfig(depths=[2, 2, 18, 2], embed_dim=96, num_heads=[3, 6, 12, 24], window_size=7, out_features=stages)
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    }
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    with torch.device("meta"):
        detector = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, num_labels=80))
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768))
    assert BUILT_IN["geneval"].parameters == sum(p.numel() for m in (detector, clip) for p in m.parameters())
