"""Wordings and specifications are inverse; the split keeps whole scenes, not wordings, from training."""

from itertools import product

import pytest

from adagrpo.tiny.scenes import (
    CATEGORIES,
    COLOURS,
    RELATIONS,
    SHAPES,
    Group,
    SceneSpec,
    all_specs,
    is_held_out,
    parse_prompt,
    split_specs,
    stable_hash,
)

KINDS = len(COLOURS) * len(SHAPES)
PAIRS = KINDS * (KINDS - 1)
SIZES = {"single": KINDS, "count": 3 * KINDS, "pair": PAIRS, "relation": 4 * PAIRS, "combination": 20 * PAIRS}


@pytest.mark.parametrize("category", CATEGORIES)
def test_prompt_and_spec_are_inverse(category):
    specs = all_specs(category)
    prompts = [spec.prompt for spec in specs]
    assert len(specs) == len(set(specs)) == len(set(prompts)) == SIZES[category]
    assert all(parse_prompt(prompt) == spec for prompt, spec in zip(prompts, specs, strict=True))
    assert {spec.category for spec in specs} == {category}


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("a red circle", SceneSpec((Group("red", "circle"),))),
        ("three blue crosses", SceneSpec((Group("blue", "cross", 3),))),
        ("a red circle and a blue square", SceneSpec((Group("red", "circle"), Group("blue", "square")))),
        ("a cyan cross above a cyan circle", SceneSpec((Group("cyan", "cross"), Group("cyan", "circle")), "above")),
        (
            "  Two green triangles LEFT of  a yellow square ",
            SceneSpec((Group("green", "triangle", 2), Group("yellow", "square")), "left"),
        ),
    ],
)
def test_parse_by_hand(text, spec):
    assert parse_prompt(text) == spec


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog",
        "a red",
        "a red circles",
        "two red circle",
        "five red circles",
        "a pink circle",
        "a red circle and",
        "a red circle near a blue square",
        "a red circle left a blue square",
        "a red circle and a red circle",
        "two red circles and a blue square",
        "two red circles above three blue squares",
        "a red circle and a blue square and a green cross",
    ],
)
def test_parse_names_the_prompt_it_refuses(text):
    with pytest.raises(ValueError, match="not a prompt of the tiny world") as caught:
        parse_prompt(text)
    assert repr(text) in str(caught.value)


def test_mirrored_wordings_are_one_scene():
    def same(one, other):
        return parse_prompt(one).canonical == parse_prompt(other).canonical

    assert same("a red circle left of a blue square", "a blue square right of a red circle")
    assert same("two red circles below a blue square", "a blue square above two red circles")
    assert same("a red circle and a blue square", "a blue square and a red circle")
    assert not same("a red circle left of a blue square", "a blue square left of a red circle")
    assert not same("a red circle left of a blue square", "a red circle above a blue square")


@pytest.mark.parametrize("category", CATEGORIES)
def test_split_shares_no_scene_in_any_wording(category):
    def scene(spec):
        """Independent of `canonical`: who is where, as a set of (object, side) facts."""
        sides = {"left": "west", "right": "east", "above": "north", "below": "south", None: "any"}
        other = dict(zip(RELATIONS, ("right", "left", "below", "above"), strict=True))
        facts = [(spec.groups[0], sides[spec.relation])]
        facts += [(group, sides[other.get(spec.relation)]) for group in spec.groups[1:]]
        return frozenset(facts)

    training, held_out = split_specs(category, False), split_specs(category, True)
    assert len(training) + len(held_out) == SIZES[category]
    assert len(held_out) == SIZES[category] // 4
    assert not {scene(spec) for spec in training} & {scene(spec) for spec in held_out}
    assert all(is_held_out(spec) and is_held_out(spec.mirrored) for spec in held_out)


def test_split_never_changes():
    """Weights were trained on one side of it: these are facts about the shipped model."""
    assert stable_hash("a red circle") == 10141913015198003253
    held_out = [spec.prompt for spec in split_specs("single", True)]
    assert held_out == [
        "a red square",
        "a red cross",
        "a green circle",
        "a green square",
        "a magenta circle",
        "a magenta cross",
    ]


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Group("pink", "circle"),
        lambda: Group("red", "star"),
        lambda: Group("red", "circle", 5),
        lambda: Group("red", "circle", 0),
        lambda: SceneSpec(()),
        lambda: SceneSpec((Group("red", "circle"),), "left"),
        lambda: SceneSpec((Group("red", "circle"), Group("red", "cross")), "near"),
        lambda: SceneSpec((Group("red", "circle", 2), Group("red", "circle"))),
        lambda: all_specs("other"),
    ],
)
def test_bad_parts_are_refused(bad):
    with pytest.raises(ValueError, match=r"."):
        bad()


def test_every_kind_is_drawn_in_training():
    drawn = {(g.colour, g.shape) for name in CATEGORIES for spec in split_specs(name, False) for g in spec.groups}
    assert drawn == set(product(COLOURS, SHAPES))
