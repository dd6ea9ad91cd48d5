"""Files of published scorers: found, compared by header, loaded whole, and named clearly when they are something else."""

import functools
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adagrpo.errors import InputError
from adagrpo.models.registry import Component
from adagrpo.rewards.weights import check_state, find_file, known_file, load_state, read_state, unfilled

KIND = Component("MLP", "torch", "MLP", r"^unused\.")
STATE = {"0.weight": torch.arange(6.0).view(3, 2), "0.bias": torch.ones(3), "1.weight": torch.ones(1, 3)}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1, bias=False))


def write(file: Path, state: dict) -> Path:
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)
    return file


SAVED = {
    "weights.safetensors": STATE,
    "weights.pt": STATE,
    "nested.pth": {"epoch": 3, "state_dict": STATE},
    "twice.bin": {"model": {"state_dict": STATE}},
    "parallel.ckpt": {f"module.{name}": tensor for name, tensor in STATE.items()},
}


@pytest.mark.parametrize("name", SAVED)
def test_every_layout_loads_alike(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / name, SAVED[name])
    assert known_file(str(file), "other", "here") == known_file(str(tmp_path), name, "here") == file
    on_meta = read_state(file, "here", "meta")
    assert {n: (t.is_meta, t.shape, t.dtype) for n, t in on_meta.items()} == {
        n: (True, t.shape, t.dtype) for n, t in STATE.items()
    }
    check_state(unfilled(mlp), on_meta, KIND, "here")
    found = load_state(unfilled(mlp), read_state(file, "here") | {"unused.x": torch.zeros(1)}, KIND, "here")
    assert found(torch.tensor([1.0, 2.0])).tolist() == [2 + 8 + 14 + 3]  # rows (0, 1), (2, 3), (4, 5), each with bias 1
    assert not found.training and not any(p.requires_grad for p in found.parameters())


def test_pickles_of_before_zip_files_load_too(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_state(tmp_path / "old.pt", "here")["0.weight"], STATE["0.weight"])


class WithBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("thirds", torch.arange(4) / 3, persistent=False)


def test_buffers_that_a_module_computes_stay_as_they_are() -> None:
    made = unfilled(WithBuffer)
    assert made.layer.weight.is_meta and made.thirds.tolist() == (torch.arange(4) / 3).tolist()
    state = {"layer.weight": torch.eye(2), "layer.bias": torch.zeros(2)}
    found = load_state(made, state, KIND, "here", dtype=torch.bfloat16)
    assert found.layer.weight.dtype == torch.bfloat16 and found.thirds.dtype == torch.float32


def changed(**tensors: Tensor | None) -> dict[str, Tensor]:
    given = {name.replace("_", "."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in (STATE | given).items() if tensor is not None}


DIFFERENT = {
    r"MLP: lacks 0\.bias, which would be random numbers: not the weights of ViT-0": changed(**{"0_bias": None}),
    r"MLP: holds 2\.weight, which a MLP of ViT-0 does not have": changed(**{"2_weight": torch.ones(1)}),
    r"MLP: 0\.bias has shape \[2\], ViT-0 means \[3\]": changed(**{"0_bias": torch.ones(2)}),
    r"MLP: 0\.bias is torch.int8: quantised": changed(**{"0_bias": torch.ones(3, dtype=torch.int8)}),
    r"MLP: 0\.bias holds values that are not finite": changed(**{"0_bias": torch.tensor([1, torch.nan, 1])}),
}


@pytest.mark.parametrize("words", DIFFERENT)
def test_tensors_that_do_not_fit_are_named(words: str) -> None:
    with pytest.raises(InputError, match=f"^file.pt: {words}"):
        load_state(unfilled(mlp), DIFFERENT[words], KIND, "file.pt", "ViT-0")


WRONG = {
    "is a git-lfs pointer": lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "is a web page": lambda f: f.write_text("\n<!DOCTYPE html><html>"),
    r"holds pickled objects of functools\.partial: reading": lambda f: torch.save({"a": functools.partial(print)}, f),
    "is truncated or damaged": lambda f: f.write_bytes(write(f, STATE).read_bytes()[:900]),
    "is truncated or damaged ": lambda f: f.write_bytes(b""),
    "holds epoch, which is no tensor": lambda f: torch.save({"epoch": 3, "weights": STATE}, f),
    "holds no tensors by name": lambda f: torch.save({"state_dict": {}}, f),
    "holds no tensors by name; ": lambda f: torch.save([1.0], f),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("words", WRONG)
def test_what_holds_no_state_dict_is_named(words: str, device: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    WRONG[words](file)
    with pytest.raises(InputError, match=f"^here: {re.escape(str(file))} {words}"):
        read_state(file, "here", device)


def test_a_truncated_safetensors_file_and_another_kind_of_file_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", STATE)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"a\.safetensors is truncated or damaged"):
        read_state(file, "here", "meta")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"a\.gguf is no file of weights"):
        read_state(tmp_path / "a.gguf", "here")


def test_places_without_the_file_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "readme.md").touch()
    for place, words in (
        (str(tmp_path), r"this folder holds no w\.pt \(but readme\.md\)"),
        (str(tmp_path / "absent"), "no such file or folder, nor a Hub id"),
        ("weights/absent.pt", "no such file or folder, nor a Hub id"),
        ("nobody/nothing", r"w\.pt cannot be downloaded from here .*hf download nobody/nothing w\.pt"),
    ):
        with pytest.raises(InputError, match=f"^here: {words}"):
            find_file(place, "w.pt", "here")
    assert known_file("nobody/nothing", "w.pt", "here") is None
