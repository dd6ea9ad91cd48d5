"""Secrets in the kwargs of a recipe are used and shown nowhere."""

import json
import sys
import types

import parts
import pytest
from toy import half_bright, toy_config

from adagrpo.cli import main
from adagrpo.recipe.keys import RewardConfig
from adagrpo.recipe.load import to_toml

SECRET = "sk-very-secret-4711"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe whose reward, prompts and adapter take a secret each; ``seen`` is what they were given."""
    seen: list[object] = []

    def given(function, name):
        def call(*args, **kwargs):
            seen.append(kwargs.pop(name))
            return function(*args)

        return call

    monkeypatch.setattr(parts, "keyed_reward", given(lambda *args: half_bright, "api_key"), raising=False)
    monkeypatch.setattr(parts, "keyed_prompts", given(parts.prompts, "HUB_TOKEN"), raising=False)
    monkeypatch.setattr(parts, "keyed_held_out", given(parts.held_out, "HUB_TOKEN"), raising=False)
    monkeypatch.setattr(parts, "keyed_model", given(parts.model, "password"), raising=False)

    def write(secret: str = SECRET, **sections) -> str:
        kwargs = {"HUB_TOKEN": secret}
        config = toy_config(
            model={"family": "parts:keyed_model", "device": "cpu", "kwargs": {"password": secret}},
            data={"prompts": "parts:keyed_prompts", "held_out": "parts:keyed_held_out", "kwargs": kwargs},
            rewards=(RewardConfig("parts:keyed_reward", kwargs={"api_key": secret}),),
            train={"iterations": 2, "slots": 1},
            name="toy",
            **sections,
        )
        lines = to_toml(config).replace("<redacted>", secret)
        (tmp_path / "toy.toml").write_text(lines, "utf-8")
        return str(tmp_path / "toy.toml")

    write.seen = seen
    return write


def test_secrets_are_used_and_never_written(recipe, tmp_path, capsys, monkeypatch) -> None:
    sent: list[object] = []
    fake = types.ModuleType("trackio")
    fake.init, fake.log, fake.finish = (lambda **keys: sent.append(keys)), (lambda *a, **k: None), (lambda: None)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    file, out = recipe(output={"loggers": ("trackio",)}), tmp_path / "run"
    assert main(["train", file, "--print-config"]) == 0
    assert main(["train", file, "--out", str(out)]) == 0
    assert len(recipe.seen) >= 4 and set(recipe.seen) == {SECRET}
    assert main(["train", file, "--out", str(out), "--resume", "latest"]) == 0
    assert main(["train", recipe("another-secret-1"), "--out", str(out), "--resume", "latest", "--output.loggers"]) == 0
    with pytest.raises(SystemExit):
        main(["train", file, "--help"])
    assert main(["report", str(out)]) == 0
    said = capsys.readouterr()
    shown = [said.out, said.err, json.dumps(sent, default=str)]
    for path in out.rglob("*"):
        if path.is_file():
            shown.append(path.read_bytes().decode("latin-1"))
    assert not any(secret in text for text in shown for secret in (SECRET, "another-secret-1"))
    assert "<redacted>" in shown[0] and "<redacted>" in (out / "config.toml").read_text()


def test_messages_are_scrubbed(recipe, tmp_path, capsys, monkeypatch) -> None:
    def failing(*args, api_key):
        raise RuntimeError(f"401 for {api_key}")

    monkeypatch.setattr(parts, "keyed_reward", failing)
    assert main(["train", recipe(), "--out", str(tmp_path / "run")]) == 2
    assert "401 for <redacted>" in capsys.readouterr().err


def test_references_to_the_environment_are_kept_and_read(recipe, tmp_path, capsys, monkeypatch) -> None:
    file, out = recipe("env:TOY_SECRET"), tmp_path / "run"
    assert main(["train", file, "--dry-run"]) == 2
    assert "no such environment variable; set TOY_SECRET" in capsys.readouterr().err
    monkeypatch.setenv("TOY_SECRET", SECRET)
    assert main(["train", file, "--out", str(out)]) == 0
    assert set(recipe.seen) == {SECRET} and "env:TOY_SECRET" in (out / "config.toml").read_text()
    assert main(["train", str(out / "config.toml"), "--out", str(out), "--resume", "latest"]) == 0
    assert main(["train", recipe(SECRET), "--out", str(out), "--resume", "latest"]) == 0  # the same run
    assert not any(SECRET in p.read_bytes().decode("latin-1") for p in out.rglob("*") if p.is_file())


def test_a_value_that_was_not_recorded_is_asked_for(recipe, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    assert main(["train", recipe(), "--out", str(out)]) == 0
    assert main(["train", str(out / "config.toml"), "--out", str(out), "--resume", "latest"]) == 2
    assert "its value is not recorded; give it, or write env:VARIABLE" in capsys.readouterr().err


def test_what_is_a_secret() -> None:
    from adagrpo.text.redaction import redacted_arguments, redacted_kwargs, redacted_text

    shown = redacted_kwargs({"max_tokens": 77, "use_key": True, "Password": "x", "pin_key": 12345678, "path": "a", "key": ""})
    assert shown == {
        "max_tokens": 77, "use_key": True, "Password": "<redacted>", "pin_key": "<redacted>", "path": "a", "key": "",
    }  # fmt: skip
    assert redacted_text('kwargs = { api_key = "a\\"b", n = 3 }\nmax_text_tokens = 256\nb_token = \'c\'\n') == (
        'kwargs = { api_key = "<redacted>", n = 3 }\nmax_text_tokens = 256\nb_token = "<redacted>"\n'
    )
    given = ["bench", "--data.kwargs", "hub_token", "abc", "--model.max-text-tokens", "256", "--x.api_key=abc"]
    assert redacted_arguments(given) == (*given[:3], "<redacted>", *given[4:6], "--x.api_key=<redacted>")
