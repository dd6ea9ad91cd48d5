"""What torchrun's environment says of this process, and the device that a rank takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adagrpo.build import choose_device
from adagrpo.engine.ranks import joined, local_rank, record_flight, world_size
from adagrpo.errors import InputError

TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_one_process_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (None, "", "0", "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False) if size is None else monkeypatch.setenv("WORLD_SIZE", size)
        assert world_size() == 1 and local_rank() == 0
        with joined(torch.device("cpu")) as ranks:
            assert (ranks.rank, ranks.size) == (0, 1)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_environment_that_is_not_torchruns_is_refused(missing: str, rank: pytest.MonkeyPatch) -> None:
    assert world_size() == 4
    rank.delenv(missing)
    with pytest.raises(InputError, match=rf"WORLD_SIZE = 4: not set by torchrun \({missing} missing\)"):
        world_size()


def test_a_rank_takes_the_device_of_its_number(rank: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    taken: list[torch.device] = []
    rank.setattr(torch.cuda, "is_available", lambda: True)
    rank.setattr(torch.cuda, "device_count", lambda: 2)
    rank.setattr(torch.cuda, "set_device", taken.append)
    for name in ("auto", "cuda"):
        assert choose_device(name) == torch.device("cuda", 1)
    assert taken == [torch.device("cuda", 1)] * 2
    with pytest.raises(InputError, match=r"model\.device = cuda:0: every rank would take it; use auto, or cuda"):
        choose_device("cuda:0")
    rank.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="LOCAL_RANK = cuda:2: this machine has 2 CUDA devices"):
        choose_device("auto")


def test_nccl_writes_what_it_knows_into_the_run_folder_unless_the_user_wants_it_elsewhere() -> None:
    environment = {"TORCH_FR_BUFFER_SIZE": "7"}
    record_flight(Path("/runs/first/ranks"), environment)
    assert environment["TORCH_FR_DUMP_TEMP_FILE"] == "/runs/first/ranks/nccl-rank-"  # NCCL's own code appends the rank
    assert environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1" and environment["TORCH_FR_BUFFER_SIZE"] == "7"
