"""What OCR reads of drawn text by size and colours, and images a second of OCR, NSFW and GenEval beside one image a call.

Each case writes its part of ``bench/results/cpu/host-rewards.json``. Reading is judged, no time is.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, median

import pytest
import torch
from drawing import drawn
from small_geneval import write_geneval
from torch import Tensor

from adagrpo.bench.measure import interleaved
from adagrpo.prompts.prompt import Prompt
from adagrpo.rewards import build_reward
from adagrpo.rewards.ocr import legibility
from adagrpo.run.machine import describe_machine

RECORD = Path(__file__).resolve().parents[2] / "bench" / "results" / "cpu" / "host-rewards.json"
SIDES, ROUNDS = (32, 48, 64, 96, 128, 256, 512, 1024), 5
TEXTS = ("Hello World", "NASA 2049", "OPEN", "Grand Hotel", "No Parking", "Exit 42", "Happy Birthday Anna")
PAINTS = (("black", "white"), ("white", "black"), ("white", "navy"), ("#ffdd00", "#aa0000"), ("#808080", "#d0d0d0"))
SURE = TEXTS[:2]


def record(case: str, found: Mapping[str, object]) -> None:
    whole = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {"case": "rewards on the host, and GenEval"}
    whole[case] = dict(found)
    whole["cores"], whole["machine"] = os.cpu_count(), describe_machine(torch.device("cpu"))
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")


@pytest.mark.proof
def test_drawn_text_by_size() -> None:
    reward = build_reward("ocr", {})
    by_side = {}
    for side in SIDES:
        cases = [(text, ink, paper) for text in TEXTS for ink, paper in PAINTS]
        images = torch.stack([drawn(text, side, ink, paper) for text, ink, paper in cases])
        scores = reward(images, [f'a sign "{text}"' for text, _, _ in cases]).tolist()
        by_side[side] = {"exact": round(mean(score == 1 for score in scores), 3), "mean": round(mean(scores), 3)}
        plain = [score for score, (text, ink, paper) in zip(scores, cases, strict=True) if text in SURE and ink == "black"]
        assert side < 64 or plain == [1, 1]
    assert all(a["mean"] <= b["mean"] + 0.05 for a, b in zip(by_side.values(), list(by_side.values())[1:], strict=False))
    record(
        "text over 0.9 of the width, by pixels of the picture", {"texts": len(TEXTS), "paints": len(PAINTS), "by_side": by_side}
    )


@pytest.mark.proof
@pytest.mark.parametrize("limit", [256, 512, 960])
def test_small_text_in_large_pictures_by_limit(limit: int) -> None:
    """At 1024 pixels; the share of its width that the text takes. 960 is what PaddleOCR looks at."""
    reward = build_reward("ocr", {"det_limit_side_len": limit})
    by_width = {}
    for width in (0.9, 0.5, 0.25, 0.12):
        cases = [(text, ink, paper) for text in TEXTS for ink, paper in PAINTS[:3]]
        images = torch.stack([drawn(text, 1024, ink, paper, width) for text, ink, paper in cases])
        started = time.process_time()
        scores = reward(images, [f'a sign "{text}"' for text, _, _ in cases])
        spent = (time.process_time() - started) / len(cases)
        exact = float((scores == 1).double().mean())
        by_width[width] = {
            "exact": round(exact, 3),
            "mean": round(float(scores.mean()), 3),
            "cpu_seconds_an_image": round(spent, 3),
        }
        assert limit == 960 or width < 0.25 or exact > 0.9
    record(f"1024 pixels, det_limit_side_len = {limit}, by share of the width", by_width)


def throughput(case: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor], close: float | None) -> None:
    """Record images a second of two ways, whose scores agree to ``close``; None: they read differently."""

    def timed(score: Callable[[], Tensor]) -> Callable[[], tuple[float, Tensor]]:
        def run() -> tuple[float, Tensor]:
            started = time.perf_counter()
            scores = score()
            return time.perf_counter() - started, scores

        return run

    load = os.getloadavg()[0]
    rounds = interleaved(timed(ours), timed(theirs), ROUNDS)
    first, second = (each[0][1] for each in rounds)
    if close is not None:
        torch.testing.assert_close(first, second, atol=close, rtol=0)
    rates = [len(first) / median([took for took, _ in each]) for each in rounds]
    found = {"images_per_second": round(rates[0], 2), "one_image_a_call": round(rates[1], 2)}
    record(case, found | {"times_faster": round(rates[0] / rates[1], 2), "load_before": round(load, 2)})


@pytest.mark.proof
def test_ocr_against_its_package_one_image_a_call() -> None:
    """Theirs: rapidocr's own settings, which look for text at 736 pixels and use every core for each picture."""
    from rapidocr import RapidOCR

    reward, engine = build_reward("ocr", {}), RapidOCR(params={"Global.log_level": "critical", "Global.use_cls": False})
    images = torch.stack([drawn(TEXTS[i % len(TEXTS)], 512) for i in range(16)])
    prompts = [f'a sign "{TEXTS[i % len(TEXTS)]}"' for i in range(16)]

    def theirs() -> Tensor:
        read = ["".join(engine(image.permute(1, 2, 0).numpy()[..., ::-1]).txts or ()) for image in images]
        return torch.tensor([legibility(text, prompt.split('"')[1]) for text, prompt in zip(read, prompts, strict=True)])

    throughput("ocr, 512 pixels, package's own way", lambda: reward(images, prompts), theirs, None)


@pytest.mark.proof
@pytest.mark.parametrize("name", ["ocr", "nsfw"])
def test_threads_against_one_image_a_call(name: str) -> None:
    """On a machine with nothing else to do the ratio nears the number of cores."""
    reward, alone = build_reward(name, {}), build_reward(name, {"workers": 1})
    images = torch.stack([drawn(TEXTS[i % len(TEXTS)], 512) for i in range(16)])
    prompts = [f'a sign "{TEXTS[i % len(TEXTS)]}"' for i in range(16)]

    def one_by_one() -> Tensor:
        return torch.cat([alone(image[None], [prompt]) for image, prompt in zip(images, prompts, strict=True)])

    throughput(f"{name}, 512 pixels, one thread", lambda: reward(images, prompts), one_by_one, 1e-6)


@pytest.mark.proof
def test_geneval_in_batches_against_one_image_a_call(tmp_path: Path) -> None:
    reward = build_reward("geneval", write_geneval(tmp_path, scale=4) | {"side": 256, "formula": "flow-grpo"})
    images = torch.rand(16, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    data = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    prompts = [Prompt("a photo of a red dog", data)] * 16

    def one_by_one() -> Tensor:
        return torch.cat([reward(image[None], [prompt]) for image, prompt in zip(images, prompts, strict=True)])

    throughput("geneval, reduced, 256 pixels", lambda: reward(images, prompts), one_by_one, None)
