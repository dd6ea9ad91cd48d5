"""How rewards are asked for over HTTP: the request for a few images, and the scores in its answer."""

from __future__ import annotations

import base64
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..text.strict_json import to_json
from ..text.user_text import shown
from .client import NoAnswer, read_json
from .pickled import restricted_loads

NAN = float("nan")


class Batch(NamedTuple):
    """Images of one request, as files, their prompts, and the metadata that travels with each.

    What of the metadata JSON does not have, as the dates of a data set, is sent as text.
    """

    images: list[bytes]
    prompts: list[str]
    data: list[dict[str, Any]]


class Protocol(NamedTuple):
    """One way to ask.

    Attributes:
        path: that requests are posted to, behind the server's address.
        alive: path that answers while the server is well; empty if there is none.
        image: kind of image files it expects.
        kind: content type of requests.
        request: body for a batch and the reward's name.
        scores: of an answer, for so many images and the reward's name; NaN for images that failed at the server. Raises
            ``NoAnswer`` where none can be had.
        most: images of a request; 0 is any number.
        pickled: answers are pickles.
    """

    path: str
    alive: str
    image: str
    kind: str
    request: Callable[[Batch, str], bytes]
    scores: Callable[[bytes, int, str], list[float]]
    most: int = 0
    pickled: bool = False


def numbers(values: Any, count: int) -> list[float]:
    """``count`` scores; NaN for what is no finite number.

    Raises:
        NoAnswer: not a list of that length: nobody knows which score belongs to which image.
    """
    if not isinstance(values, list) or len(values) != count:
        raise NoAnswer(f"{count} images were sent, and the answer is {shown(values, 200)}")
    return [number(value) for value in values]


def number(value: Any) -> float:
    """A score; NaN for what is no finite number."""
    sound = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if sound and math.isfinite(value) else NAN
    except OverflowError:
        return NAN


def _table(answer: Any) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise NoAnswer(f"the answer is no table: {shown(answer, 200)}")
    if error := answer.get("error"):
        raise NoAnswer(f"the server says: {shown(error, 200)}", "broken")
    return answer


def _base64(images: Sequence[bytes]) -> list[str]:
    return [base64.b64encode(image).decode() for image in images]


def _flow_factory_request(batch: Batch, name: str) -> bytes:
    body: dict[str, Any] = {"prompt": batch.prompts, "image": _base64(batch.images)}
    body |= dict.fromkeys(("video", "condition_images", "condition_videos", "kwargs"))
    if any(batch.data):
        body["kwargs"] = {"metadata": batch.data}
    return to_json(body, default=str).encode()


def _flow_factory_scores(body: bytes, count: int, name: str) -> list[float]:
    answer = _table(read_json(body))
    return _told(numbers(answer.get("rewards"), count), answer.get("errors"))


def _told(scores: list[float], errors: Any) -> list[float]:
    """The scores, if there are any, else what the server says of the first image."""
    if errors and isinstance(errors, list) and all(map(math.isnan, scores)):
        first = next(iter(errors[0].values()), "") if isinstance(errors[0], dict) else errors[0]
        raise NoAnswer(f"the server says: {shown(first, 200)}", "unscored")
    return scores


def _unirl_request(batch: Batch, name: str) -> bytes:
    wanted = [name.partition("/")[0]]
    turns = zip(batch.prompts, _base64(batch.images), batch.data, strict=True)
    asked = [
        {"history": [{"text": text, "image_b64": image}], "required_rewards": wanted, "metadata": data or None}
        for text, image, data in turns
    ]
    return to_json({"requests": asked}, default=str).encode()


def _unirl_scores(body: bytes, count: int, name: str) -> list[float]:
    answer = _table(read_json(body))
    results = answer.get("results")
    if not isinstance(results, list) or len(results) != count:
        raise NoAnswer(f"{count} images were sent, and the results are {shown(results, 200)}")
    reward, _, metric = name.partition("/")
    found = []
    for result in results:
        metrics = result.get(reward) if isinstance(result, dict) else None
        if not isinstance(metrics, dict):
            found.append(NAN)
        elif metric or len(metrics) == 1:
            found.append(number(metrics.get(metric or next(iter(metrics)))))
        else:
            raise NoAnswer(f"{reward} has the metrics {', '.join(map(str, metrics))}; write reward = {reward}/METRIC")
    return _told(found, answer.get("errors"))


def _flow_grpo_request(batch: Batch, name: str) -> bytes:
    body: dict[str, Any] = {"images": batch.images, "prompts": batch.prompts}
    if any(batch.data):
        body |= {"meta_datas": batch.data, "only_strict": False}
    return pickle.dumps(body)


def _verl_omni_request(batch: Batch, name: str) -> bytes:
    return pickle.dumps({"images": batch.images, "prompts": batch.prompts, "metadata": batch.data[0]})


def _pickled_scores(body: bytes, count: int, name: str) -> list[float]:
    try:
        answer = _table(restricted_loads(body))
    except ValueError as error:
        raise NoAnswer(str(error)) from error
    keys = [name] if name else ["outputs", "scores"]
    found = next((answer[key] for key in keys if key in answer), None)
    if found is None:
        raise NoAnswer(f"no {' or '.join(keys)} in the answer, but {shown(sorted(map(str, answer)), 200)}")
    return numbers(found, count)


JSON, PICKLE = "application/json", "application/octet-stream"
PROTOCOLS = {
    "flow-factory": Protocol("/compute", "/health", "png", JSON, _flow_factory_request, _flow_factory_scores),
    "unirl": Protocol("/score", "/health", "jpeg", JSON, _unirl_request, _unirl_scores),
    "flow-grpo": Protocol("", "", "jpeg", PICKLE, _flow_grpo_request, _pickled_scores, pickled=True),
    "verl-omni": Protocol("", "", "jpeg", PICKLE, _verl_omni_request, _pickled_scores, most=1, pickled=True),
}
