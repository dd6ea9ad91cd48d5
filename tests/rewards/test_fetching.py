"""What built-in rewards would download, against a cache that holds nothing or some of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from adagrpo.rewards import BUILT_IN
from adagrpo.rewards.fetching import wanted_files

REMOTE = ("judge", "unifiedreward", "remote")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """(repository, file) of all that was downloaded: nothing yet."""
    there: set[tuple[str, str]] = set()
    find = lambda repository, name, **more: f"/cache/{name}" if (repository, name) in there else None  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", find)
    return there


def commands(name: str, **kwargs: Any) -> list[str]:
    return [wanted.command for wanted in wanted_files(name, kwargs, "rewards.0")]


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in REMOTE])
def test_by_default_a_reward_wants_its_row_and_nothing_once_it_is_there(name: str, cache: set[tuple[str, str]]) -> None:
    asked = {repository.partition(":")[0] for repository in BUILT_IN[name].files}
    assert {wanted.repository for wanted in wanted_files(name, {}, "rewards.0")} == asked
    for source in BUILT_IN[name].files:
        repository, _, file = source.partition(":")
        cache.add((repository, file or "config.json"))
    assert commands(name) == []


def test_the_command_names_the_file_of_the_version_that_is_asked_for(cache: set[tuple[str, str]]) -> None:
    assert commands("hpsv2")[0] == "hf download xswu/HPSv2 HPS_v2.1_compressed.pt"
    assert commands("hpsv2", version="v2.0")[0] == "hf download xswu/HPSv2 HPS_v2_compressed.pt"
    assert commands("clip", variant="mixgrpo") == ["hf download apple/DFN5B-CLIP-ViT-H-14-384"]
    assert commands("hpsv3")[0] == "hf download MizzenAI/HPSv3 HPSv3.safetensors"


def test_files_of_ones_own_replace_the_published_ones(cache: set[tuple[str, str]], tmp_path: Path) -> None:
    assert commands("clip", path=str(tmp_path)) == []
    assert commands("clip", path="owner/model") == ["hf download owner/model"]
    left = commands("hpsv3", path=str(tmp_path))
    assert left == ["hf download Qwen/Qwen2-VL-7B-Instruct config.json tokenizer.json tokenizer_config.json"]


def test_a_copy_of_a_repository_holds_the_same_files_and_what_names_a_file_is_no_repository(cache) -> None:
    assert commands("hpsv3", path="owner/copy")[0] == "hf download owner/copy HPSv3.safetensors"
    assert commands("imagereward", tokenizer="owner/words")[1].startswith("hf download owner/words config.json tokenizer.json")
    assert commands("aesthetic", path="owner/head") == ["hf download openai/clip-vit-large-patch14"]
    assert not any("owner" in command for command in commands("hpsv3", path="owner/HPSv3.safetensors"))


def test_half_of_the_files_are_not_all_of_them(cache: set[tuple[str, str]]) -> None:
    cache.update((repository, file) for repository, _, file in (s.partition(":") for s in BUILT_IN["hpsv3"].files[:-1]))
    assert len(commands("hpsv3")) == 1


def test_size_and_licence_are_told_where_they_are_known(cache: set[tuple[str, str]]) -> None:
    told = {name: str(wanted_files(name, {}, "rewards.3")[0]) for name in ("imagereward", "hpsv3")}
    assert told["imagereward"].startswith(
        "rewards.3 (imagereward): ImageReward.pt of THUDM/ImageReward (1.8 GB; licence: Apache"
    )
    assert "licence: see the model card" in told["hpsv3"] and " GB" not in told["hpsv3"]
    cache.add(("THUDM/ImageReward", "ImageReward.pt"))
    words = str(wanted_files("imagereward", {}, "rewards.3")[0])  # of BERT, whose size and licence are others
    assert "google-bert" in words and " GB" not in words and "licence: see the model card" in words


def test_a_reward_by_import_path_wants_nothing_that_is_known() -> None:
    kwargs: Mapping[str, Any] = {}
    assert wanted_files("adagrpo.rewards.brightness:Brightness", kwargs, "rewards.0") == []
