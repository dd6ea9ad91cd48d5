"""Keys of ``[[rewards]]``, and arguments that are lists and tables: read, overridden, written, redacted, refused."""

import dataclasses
from pathlib import Path

import pytest

from adagrpo.arguments import configured, new_arguments
from adagrpo.errors import InputError
from adagrpo.recipe.keys import Config, RewardConfig
from adagrpo.recipe.load import annotated, load_recipe, read_recipe, to_toml
from adagrpo.rewards import build_reward
from adagrpo.run.changes import changed_keys
from adagrpo.text.redaction import comparable, redacted, resolved, restored

RECIPE = """
base = "tiny"
[[rewards]]
name = "parts:judge"
scale = -2.0
shift = 1.5
device = "cuda:1"
dtype = "bf16"
rows = 4
offload = true
kwargs.files = ["a", "b"]
kwargs.architecture = {vision_heads = 16, names = ["x"], api_token = "sk-secret-4711"}
kwargs.depth = 3
"""
KWARGS = {
    "files": ("a", "b"),
    "architecture": {"vision_heads": 16, "names": ("x",), "api_token": "sk-secret-4711"},
    "depth": 3,
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(RECIPE, "utf-8")
    return path


def test_lists_and_tables_are_read_and_written(recipe: Path, tmp_path: Path) -> None:
    config = load_recipe(recipe)
    wanted = RewardConfig("parts:judge", 1.0, -2.0, 1.5, "cuda:1", "bf16", 4, True, kwargs=KWARGS)
    assert config.rewards == (wanted,)
    for text in (to_toml(config), annotated(read_recipe(recipe))):
        assert "sk-secret" not in text
        again = tmp_path / "again.toml"
        again.write_text(text, "utf-8")
        assert load_recipe(again) == redacted(config) != config
        assert restored(load_recipe(again), config) == config
        assert not changed_keys(load_recipe(again), config)


def test_secrets_in_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "sk-other")
    config = Config(rewards=(RewardConfig(kwargs={"server": {"token": "env:JUDGE_TOKEN", "port": 1}, "keys": ("a", "b")}),))
    assert redacted(config).rewards[0].kwargs == {"server": {"token": "env:JUDGE_TOKEN", "port": 1}, "keys": "<redacted>"}
    assert comparable(config).rewards[0].kwargs["server"] == {"token": "<redacted>", "port": 1}
    assert resolved(config.rewards[0].kwargs, "rewards.0")["server"] == {"token": "sk-other", "port": 1}
    with pytest.raises(InputError, match=r"kwargs.token = <redacted>: its value is not recorded"):
        resolved({"server": {"token": "<redacted>"}}, "rewards.0")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("kwargs.a = {b = {c = 1}}", "rewards.0.kwargs.a.b = {'c': 1}: expected a string, a number, true or false, a list of"),
        ("kwargs.a = [[1]]", "rewards.0.kwargs.a.0 = [1]: expected a string"),
        ("kwargs.tokens = [4711]", "rewards.0.kwargs.tokens.0 = <redacted>: expected a string"),
        ('dtype = "fp16"', "rewards.0.dtype = 'fp16'"),
    ],
)
def test_what_arguments_cannot_be(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(f"[[rewards]]\n{line}\n", "utf-8")
    with pytest.raises(InputError) as error:
        load_recipe(tmp_path / "r.toml")
    assert words in str(error.value)


def test_dotted_arguments_of_the_command_line(recipe: Path) -> None:
    words = ["--rewards.0.kwargs.architecture.text-heads", "12", "--rewards.0.kwargs.more", "x", "y", "--train.seed", "3"]
    words += ["--rewards.0.kwargs.files", "c", '--rewards.0.kwargs.one=["z"]', "--rewards.0.kwargs.new.part", "1.5"]
    found = configured(read_recipe(recipe), words, "train")
    architecture = KWARGS["architecture"] | {"text_heads": 12}
    added = {"architecture": architecture, "files": ("c",), "more": ("x", "y"), "one": ("z",), "new": {"part": 1.5}}
    assert found.config.rewards[0].kwargs == KWARGS | added and found.config.train.seed == 3
    assert found.origin("rewards.0.kwargs") == "command line" and found.origin("rewards.0.rows") == "this recipe"


def test_words_that_are_no_new_arguments_are_left_to_the_parser() -> None:
    config = Config(rewards=(RewardConfig(kwargs={"path": "p"}),))
    for words in (["--rewards.0.kwargs.path", "q"], ["--rewards.7.kwargs.path", "q"], ["--rewards.0.kwargs.path.x", "q"]):
        assert new_arguments(config, words) == (config, words)
    with pytest.raises(InputError, match=r"--rewards.0.kwargs.new: expected a value"):
        new_arguments(config, ["--rewards.0.kwargs.new", "--train.seed", "1"])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("scale", 0.0, "must be a number other than 0"),
        ("shift", float("nan"), "must be a finite number"),
        ("rows", -1, "must be at least 0"),
        ("device", "tpu", "must be cpu, cuda, cuda:N or empty"),
        ("kwargs", {"dtype": "bf16"}, "rewards.0.dtype is given too; remove one of them"),
    ],
)
def test_ranges(recipe: Path, key: str, value: object, words: str) -> None:
    read = read_recipe(recipe)
    rewards = (dataclasses.replace(read.config.rewards[0], **{key: value}),)
    with pytest.raises(InputError, match=words):
        dataclasses.replace(read, config=dataclasses.replace(read.config, rewards=rewards)).check()


class Precise:
    def __init__(self, dtype: str = "odd") -> None:
        self.dtype = dtype

    def __call__(self, images, prompts): ...


def test_dtype_goes_to_those_that_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{__name__}:Precise"
    monkeypatch.setitem(__import__("sys").modules, __name__, __import__("types").SimpleNamespace(Precise=Precise))
    assert build_reward(name, {}).dtype == "odd"  # a plug-in's default is its own
    assert build_reward(name, {}, dtype="bf16").dtype == build_reward(name, {"dtype": "bf16"}).dtype == "bf16"
    with pytest.raises(InputError, match=r"rewards.0.dtype = bf16: brightness has no weights"):
        build_reward("brightness", {}, "rewards.0", "bf16")
