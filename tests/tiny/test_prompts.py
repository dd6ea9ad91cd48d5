"""Mixes have the promised shares, held-out prompts are balanced and unseen, and none of it moves."""

import re
import subprocess
import sys
from collections import Counter

import pytest

from adagrpo.prompts.prompt import data_of
from adagrpo.tiny.prompts import UNLEARNABLE, category, held_out_prompts, training_prompts
from adagrpo.tiny.scenes import CATEGORIES, is_held_out, parse_prompt


def test_even_mix():
    prompts = training_prompts("even")
    assert Counter(map(category, prompts)) == dict.fromkeys(CATEGORIES, 80)
    assert Counter(map(category, prompts[:100])) == dict.fromkeys(CATEGORIES, 20)


def test_wide_mix():
    prompts = training_prompts("wide")
    assert len(prompts) == 400
    counts = Counter(map(category, prompts))
    assert 0.5 <= counts["single"] / 400 <= 0.6
    assert {counts[name] for name in CATEGORIES[1:]} == {45}
    repeats = Counter(prompt for prompt in prompts if category(prompt) == "single").values()
    assert len(repeats) == 18 and max(repeats) - min(repeats) <= 1
    others = [prompt for prompt in prompts if category(prompt) != "single"]
    assert len(others) == len(set(others))


def test_dusty_mix():
    """A prompt is unlearnable or not wherever it stands, and so is the share of the different prompts of each category."""
    prompts = training_prompts("dusty(0.6)")
    assert Counter(map(category, prompts)) == dict.fromkeys(CATEGORIES, 200)
    assert Counter(map(category, prompts[:50])) == dict.fromkeys(CATEGORIES, 10)
    marked = {(str(prompt), UNLEARNABLE in data_of(prompt)) for prompt in prompts}
    assert len(marked) == len(set(prompts)) == 18 + 54 + 3 * 200
    unlearnable = Counter(category(prompt) for prompt, is_unlearnable in marked if is_unlearnable)
    assert unlearnable == {"single": 11, "count": 32, "pair": 120, "relation": 120, "combination": 120}
    assert not any(data_of(prompt) for mix in ("even", "wide") for prompt in training_prompts(mix))


@pytest.mark.parametrize("mix", ["even", "wide", "dusty(.25)"])
def test_training_prompts_are_no_held_out_scenes(mix):
    assert not any(is_held_out(parse_prompt(prompt)) for prompt in training_prompts(mix))


def test_held_out_prompts():
    prompts = held_out_prompts()
    assert len(prompts) == 600
    assert all(is_held_out(parse_prompt(prompt)) for prompt in prompts)
    for size in (5, 23, 200, 600):
        counts = Counter(map(category, held_out_prompts(size)))
        assert set(counts) == set(CATEGORIES)
        assert max(counts.values()) - min(counts.values()) <= 1
        assert held_out_prompts(size) == prompts[:size]
    assert all(len(set(prompts[i::5])) == size for i, size in enumerate((6, 18, 120, 120, 120)))
    scenes = [parse_prompt(prompt).canonical for prompt in prompts[3::5]]
    assert len(set(scenes)) == 120  # as many different scenes as possible, not two wordings of each


def test_refusals():
    for mix in ("odd", "dusty", "dusty()", "dusty(0.0)", "dusty(1.0)", "dusty(60)", "dusty(nan)", "dusty(0.6) "):
        with pytest.raises(ValueError, match=re.escape(f"unknown mix {mix!r}")):
            training_prompts(mix)
    for count in (0, -1, 601):
        with pytest.raises(ValueError, match="600"):
            held_out_prompts(count)


def test_lists_are_the_same_in_another_process():
    code = "from adagrpo.tiny.prompts import *; print(training_prompts('wide') + training_prompts('even') + held_out_prompts())"
    env = {"PYTHONHASHSEED": "12345", "PYTHONPATH": ":".join(path or "." for path in sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == str(training_prompts("wide") + training_prompts("even") + held_out_prompts())
