"""GenEval's and Flow-GRPO's formulas on objects placed by hand, against values worked out by hand."""

import pytest

from adagrpo.errors import InputError
from adagrpo.prompts.prompt import Prompt
from adagrpo.rewards.geneval_rules import CLASSES, Clause, Found, Record, coloured, flow_grpo, official, record_of, relations


def at(x: float, y: float, colour: str | None = None) -> Found:
    """An object of 10 by 10 pixels around (x, y)."""
    return Found((x - 5, y - 5, x + 5, y + 5), colour)


MIDDLE = at(50, 50)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (20, 50, {"left of"}),  # (30 - 0.1 * 20) / 30 = 0.93
        (80, 50, {"right of"}),
        (50, 20, {"above"}),
        (50, 80, {"below"}),
        (20, 20, {"left of", "above"}),  # 28 / 42.4 = 0.66 on both axes
        (80, 80, {"right of", "below"}),
        (20, 62, {"left of"}),  # 28 / 32.3 = 0.87, and (12 - 2) / 32.3 = 0.31
        (56, 50, {"right of"}),  # 4 / 6
        (53, 50, set()),  # 1 / 3: they overlap
        (51, 50, set()),
        (50, 50, set()),
    ],
)
def test_relations_by_hand(x, y, expected) -> None:
    assert relations(at(x, y), MIDDLE) == expected


def test_a_relation_counts_the_sizes_of_both() -> None:
    wide = Found((0, 0, 100, 10))  # centre (50, 5); 0.1 * (100 + 10) = 11 is taken off 20 and leaves 9 / 20
    assert relations(at(70, 5), wide) == set() and relations(at(70, 5), at(50, 5)) == {"right of"}


CLOCKS = Record("counting", (Clause("clock", 3),), (Clause("clock", 4),))
RED_CARS = Record("colors", (Clause("car", 2, "red"),))
DOG_LEFT = Record("position", (Clause("cat", 1), Clause("dog", 1, None, "left of", 0)))
PAIR = Record("color_attr", (Clause("cup", 1, "red"), Clause("bowl", 1, "blue")))
RED_DOG_ABOVE = Record("mixed", (Clause("cat", 1, "black"), Clause("dog", 1, "red", "above", 0)))
TWO_DOGS_LEFT = Record("mixed", (Clause("cat", 1), Clause("dog", 2, None, "left of", 0)))

CASES = {
    # name: record, objects, official, Flow-GRPO, strict
    "none of three": (CLOCKS, {}, 0, 0, 0),
    "two of three": (CLOCKS, {"clock": [MIDDLE] * 2}, 0, 2 / 3, 0),
    "three of three": (CLOCKS, {"clock": [MIDDLE] * 3, "cat": [MIDDLE]}, 1, 1, 1),
    "four of three": (CLOCKS, {"clock": [MIDDLE] * 4}, 0, 2 / 3, 0),
    "eight of three": (CLOCKS, {"clock": [MIDDLE] * 8}, 0, -2 / 3, 0),
    "one more is correct where nothing is excluded": (RED_CARS, {"car": [at(1, 1, "red")] * 3}, 1, (1 / 2 + 0) / 2, 0),
    "both red": (RED_CARS, {"car": [at(1, 1, "red")] * 2}, 1, 1, 1),
    "one red": (RED_CARS, {"car": [at(1, 1, "red"), at(9, 9, "blue")]}, 0, (1 + 1 / 2) / 2, 0),
    "none red": (RED_CARS, {"car": [at(1, 1, "pink"), at(9, 9, "blue")]}, 0, 1 / 2, 0),
    "one car": (RED_CARS, {"car": [at(1, 1, "red")]}, 0, (1 / 2 + 0) / 2, 0),
    "the surest two are red": (RED_CARS, {"car": [at(1, 1, "red")] * 2 + [at(9, 9, "blue")]}, 1, 1 / 4, 0),
    "one of the surest two is not": (RED_CARS, {"car": [at(1, 1, "red"), at(9, 9, "blue"), at(1, 1, "red")]}, 0, 1 / 4, 0),
    "left": (DOG_LEFT, {"cat": [MIDDLE], "dog": [at(20, 50)]}, 1, 1, 1),
    "right": (DOG_LEFT, {"cat": [MIDDLE], "dog": [at(80, 50)]}, 0, (1 + 1 + 0 + 1) / 4, 0),
    "no cat": (DOG_LEFT, {"dog": [at(20, 50)]}, 0, (0 + 1 + 0) / 3, 0),
    "no dog": (DOG_LEFT, {"cat": [MIDDLE]}, 0, (1 + 0 + 0) / 3, 0),
    "two cats, the surer one right of the dog": (DOG_LEFT, {"cat": [MIDDLE, at(0, 50)], "dog": [at(20, 50)]}, 1, 1 / 3, 0),
    "one of two dogs": (TWO_DOGS_LEFT, {"cat": [MIDDLE], "dog": [at(20, 50), at(80, 50)]}, 0, 3 / 4, 0),
    "two dogs": (TWO_DOGS_LEFT, {"cat": [MIDDLE], "dog": [at(20, 50), at(10, 40)]}, 1, 1, 1),
    "red cup, blue bowl": (PAIR, {"cup": [at(1, 1, "red")], "bowl": [at(9, 9, "blue")]}, 1, 1, 1),
    "blue cup, red bowl": (PAIR, {"cup": [at(1, 1, "blue")], "bowl": [at(9, 9, "red")]}, 0, 1 / 2, 0),
    "red cup, red bowl": (PAIR, {"cup": [at(1, 1, "red")], "bowl": [at(9, 9, "red")]}, 0, 3 / 4, 0),
    "red cup, no bowl": (PAIR, {"cup": [at(1, 1, "red")]}, 0, (1 + 1 + 0 + 0) / 4, 0),
    "all of it": (RED_DOG_ABOVE, {"cat": [at(50, 50, "black")], "dog": [at(50, 20, "red")]}, 1, 1, 1),
    "wrong place": (RED_DOG_ABOVE, {"cat": [at(50, 50, "black")], "dog": [at(50, 80, "red")]}, 0, 5 / 6, 0),
    "wrong colour, place not judged": (RED_DOG_ABOVE, {"cat": [at(50, 50, "black")], "dog": [at(50, 20, "blue")]}, 0, 3 / 4, 0),
    "wrong target": (RED_DOG_ABOVE, {"cat": [at(50, 50, "white")], "dog": [at(50, 20, "red")]}, 0, 3 / 5, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_by_hand(case) -> None:
    record, objects, correct, score, strict = CASES[case]
    assert official(record, objects) == correct
    assert flow_grpo(record, objects) == (pytest.approx(score, abs=1e-12), strict)


def test_colours_are_asked_of_the_objects_they_decide() -> None:
    assert coloured(RED_CARS, {"car": 3, "cup": 1}, exact=False) == [("car", 0), ("car", 1)]
    assert coloured(RED_CARS, {"car": 3}, exact=True) == []
    assert coloured(RED_CARS, {"car": 1}, exact=False) == []
    assert coloured(PAIR, {"cup": 1, "bowl": 1}, exact=True) == [("cup", 0), ("bowl", 0)]
    assert coloured(CLOCKS, {"clock": 3}, exact=False) == []
    twice = Record("color_attr", (Clause("cup", 1, "red"), Clause("cup", 2, "blue")))
    assert coloured(twice, {"cup": 2}, exact=False) == [("cup", 0), ("cup", 1)]


def line(**changes) -> Prompt:
    """A prompt with a record as GenEval's file has it."""
    include = [
        {"class": "bench", "count": 1},
        {"class": "computer mouse", "count": 2, "color": "red", "position": ["above", 0]},
    ]
    data = {"tag": "position", "include": include, "exclude": [{"class": "bench", "count": 2}]} | changes
    return Prompt("a photo", {key: value for key, value in data.items() if value is not None})


def test_records_are_read_as_published() -> None:
    bench, mouse = Clause("bench", 1), Clause("computer mouse", 2, "red", "above", 0)
    assert record_of(line()) == Record("position", (bench, mouse), (Clause("bench", 2),))
    assert record_of(line(exclude=None)).exclude == ()
    assert len(set(CLASSES)) == 80


MOUSE = {"class": "computer mouse", "count": 1}


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a photo", "no GenEval record"),
        (line(tag=None), "no GenEval record"),
        (line(include=[]), "no GenEval record"),
        (line(exclude="bench"), "exclude"),
        (line(include=["bench"]), r"include\.0"),
        (line(include=[{"class": "unicorn", "count": 1}]), "'unicorn'"),
        (line(include=[{"class": "mouse", "count": 1}]), "'mouse'"),
        (line(include=[{"class": "bench", "count": 0}]), "count 0"),
        (line(include=[{"class": "bench", "count": 17}]), "count 17"),
        (line(include=[{"class": "bench", "count": True}]), "count True"),
        (line(include=[{"class": "bench"}]), "count None"),
        (line(include=[{"class": "bench", "count": 1, "colour": "red"}]), "colour is not known"),
        (line(include=[{"class": "bench", "count": 1, "color": "teal"}]), "'teal'"),
        (line(include=[MOUSE, MOUSE | {"position": ["beside", 0]}]), "'beside'"),
        (line(include=[MOUSE, MOUSE | {"position": ["above", 1]}]), r"include\.1"),
        (line(include=[MOUSE, MOUSE | {"position": "above"}]), "position 'above'"),
        (line(exclude=[{"class": "bench", "count": "2"}]), r"exclude\.0: count '2'"),
    ],
)
def test_records_that_cannot_be_scored_are_refused_by_name(prompt, named) -> None:
    with pytest.raises(InputError, match=f"prompt 'a photo'.*{named}"):
        record_of(prompt)
