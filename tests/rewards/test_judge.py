"""A judge's answers: read in one way or not at all, asked for as often as is allowed, never a made-up score."""

from __future__ import annotations

import base64
import hashlib
import io
import math

import numpy
import pytest
import torch
from fault_server import Faulty, faulty
from PIL import Image

from adagrpo.errors import InputError
from adagrpo.prompts.prompt import Prompt
from adagrpo.rewards import check_reward_files, client
from adagrpo.rewards.judge import Judge
from adagrpo.rewards.unifiedreward import UnifiedReward

pytestmark = pytest.mark.filterwarnings("ignore:rewards:RuntimeWarning")
TEMPLATE = 'Rate {image} for "{prompt}" ({category}). Answer {"score": X}.'
POINT = r"Score: (-?[\d.]+)"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "template.txt"
    path.write_text("Rate this for {prompt}", "utf-8")
    return path


def chat(text, **choice):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop", **choice}]}


def judge(server: Faulty, template, **kwargs) -> Judge:
    kwargs = {"pattern": POINT, "low": 0, "high": 10, "limits": {"retries": 1, "tries": 2, "timeout": 5.0}, **kwargs}
    return Judge(server.url, "judge", str(template), **kwargs)


def scored(server: Faulty, template, count: int = 1, **kwargs) -> list[float]:
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, 8, 8)
    return judge(server, template, **kwargs)(images, [f"p{i}" for i in range(count)]).tolist()


def level_in(body) -> int:
    """Grey level of the image in a request."""
    (url,) = [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    head, _, content = url.partition(",")
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    assert head == f"data:image/{picture.format.lower()};base64"
    return round(numpy.array(picture).mean())


def test_each_image_gets_the_number_said_of_it(template) -> None:
    with faulty(lambda number, body: chat(f"Well. Score: {level_in(body) / 4}")) as server:
        assert scored(server, template, 20) == [i / 4 for i in range(20)]
        assert scored(server, template, 20, image="png") == [i / 4 for i in range(20)]
    body = server.seen[-1]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0, 4096)
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "text"]


def test_the_template_says_where_prompt_image_and_metadata_stand(tmp_path) -> None:
    path = tmp_path / "t.txt"
    path.write_text(TEMPLATE, "utf-8")
    with faulty(lambda number, body: chat("Score: 1")) as server:
        one = judge(
            server, path, api_key="secret word", request={"max_tokens": 9, "chat_template_kwargs.enable_thinking": False}
        )
        one(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [Prompt("a {image} of {x}", {"category": "art"})])
        assert one.provenance["template_sha256"] == hashlib.sha256(TEMPLATE.encode()).hexdigest()
        (body,) = server.seen
        content = body["messages"][0]["content"]
        assert [part.get("text") for part in content] == [
            "Rate ", None, ' for "a {image} of {x}" (art). Answer {"score": X}.'
        ]  # fmt: skip
        assert body["chat_template_kwargs"] == {"enable_thinking": False} and body["max_tokens"] == 9
        assert server.headers["Authorization"] == "Bearer secret word"
        with pytest.raises(InputError, match=r"\{category\}.*'plain'"):
            one(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["plain"])


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score: 7", 7),
        ("Score: 7. Again: Score: 7.0", 7),
        ("Score: 7 or Score: 8", None),
        ("Score: 10.5", None),
        ("Score: -1", None),
        ("Score: seven", None),
        ("Score: 1.2.3", None),
        ("Score: .", None),
        ("", None),
        (None, None),
        (7, None),
        ("Score: 7" + "x" * 200_000, None),
    ],
)
def test_an_answer_is_read_strictly(template, reply, score) -> None:
    """Whatever cannot be read in one way is asked for once more, then the image has failed."""
    with faulty(lambda number, body: chat(reply)) as server:
        (found,) = scored(server, template)
    assert (found == score) if score is not None else math.isnan(found)
    assert len(server.seen) == (1 if score is not None else 2)


def test_a_cut_answer_may_lack_digits(template) -> None:
    with faulty(lambda number, body: chat("Score: 4", finish_reason="length")) as server:
        assert math.isnan(scored(server, template)[0])


def test_a_second_answer_may_be_better(template) -> None:
    with faulty(lambda number, body: chat("hm" if number == 0 else "Score: 3")) as server:
        assert scored(server, template) == [3]


@pytest.mark.parametrize("answer", [{"choices": []}, {}, [], {"choices": [{"text": "Score: 1"}]}, b"Score: 1"])
def test_other_servers_are_not_judges(template, answer) -> None:
    with faulty(lambda number, body: (200, answer)) as server:
        assert math.isnan(scored(server, template)[0])
    assert len(server.seen) == 1


def test_several_patterns_are_averaged_and_all_needed(template) -> None:
    patterns = [r"A=(\d+)", r"B=(\d+)"]
    replies = ["A=1 B=4", "A=1", "B=4 A=3"]
    with faulty(lambda number, body: chat(replies[level_in(body)])) as server:
        found = scored(server, template, 3, pattern=patterns)
    assert found[0] == 2.5 and math.isnan(found[1]) and found[2] == 3.5


@pytest.mark.parametrize(
    ("version", "reply", "score"),
    [
        ("v1", "Final Score: 4.5", 4.5),
        ("v1", "Final Score:3 ... Final Score: 3", 3),
        ("v1", "Final Score: 45", None),  # the published expression reads 4
        ("v1", "Final Score: 0", None),
        ("v2", "Alignment Score (1-5): 4\nCoherence Score (1-5): 3.5\nStyle Score (1-5): 3", 0.625),
        ("v2", "Alignment Score (1-5): 9\nCoherence Score (1-5): 9\nStyle Score (1-5): 9", 1.0),
        ("v2", "Alignment Score (1-5): 0\nCoherence Score (1-5): 0.3\nStyle Score (1-5): 0", 0.0),
        ("v2", "Alignment Score (1-5): 4\nCoherence Score (1-5): 3.5", None),
    ],
)
def test_unifiedreward(template, version: str, reply: str, score: float | None) -> None:
    """Worked out by hand: the mean of 4, 3.5 and 3 is 3.5, and (3.5 - 1) / 4 = 0.625."""
    with faulty(lambda number, body: chat(reply)) as server:
        server.models = ["UnifiedReward"]
        one = UnifiedReward(server.url, str(template), version, limits={"tries": 1})
        (found,) = one(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"]).tolist()
    assert (found == pytest.approx(score, abs=1e-12)) if score is not None else math.isnan(found)


def test_a_server_without_the_model_is_found_at_the_start(template) -> None:
    with faulty(lambda number, body: chat("Score: 1")) as server:
        server.models = ["other", "third"]
        with pytest.raises(InputError, match="other, third"):
            judge(server, template)
        for sound in (["org/judge"], ["*"], []):
            server.models = sound
            judge(server, template)
        server.health = 404  # it does not list its models
        judge(server, template)


KWARGS = {"url": "http://localhost:1/v1", "model": "m", "pattern": POINT, "low": 0, "high": 1}


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"pattern": "(a"}, "not a regular expression"),
        ({"pattern": "a"}, "0 groups"),
        ({"pattern": ["(a)", "(a)(b)"]}, "2 groups"),
        ({"pattern": []}, "at least one"),
        ({"low": 1.0}, "low must be the smaller"),
        ({"image": "webp"}, "png, jpeg"),
        ({"template": "missing.txt"}, "missing.txt: this file does not exist"),
        ({"request": {"messages": "x"}}, "request.messages"),
        ({"request": {"a": 1, "a.b": 2}}, "request.a.b"),
        ({"url": "ftp://host"}, "http://host:port"),
    ],
)
def test_arguments_are_refused_before_anybody_is_asked(template, kwargs: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_reward_files("judge", {"template": str(template), **KWARGS, **kwargs})
    check_reward_files("judge", {"template": str(template), **KWARGS})


@pytest.mark.parametrize(
    ("text", "said"), [("Rate it.", "nothing in it says"), ("{image}", "nothing in it"), ("{image}{image}{prompt}", "several")]
)
def test_a_template_without_a_prompt_is_refused(tmp_path, text: str, said: str) -> None:
    (tmp_path / "t").write_text(text, "utf-8")
    with pytest.raises(InputError, match=said):
        check_reward_files("judge", {"template": str(tmp_path / "t"), **KWARGS})


def test_unifiedreward_says_where_its_template_comes_from(template) -> None:
    with pytest.raises(InputError, match="CodeGoat24/UnifiedReward"):
        check_reward_files("unifiedreward", {"url": "http://localhost:1"})
    with pytest.raises(InputError, match="v1, v2"):
        check_reward_files("unifiedreward", {"url": "http://localhost:1", "template": str(template), "version": "v3"})
    check_reward_files("unifiedreward", {"url": "http://localhost:1", "template": str(template)})
