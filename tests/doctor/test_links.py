"""What doctor tells of NCCL, peers and networks, from fakes of torch, NVML and the kernel's files."""

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch

from adagrpo.doctor import links as subject
from adagrpo.doctor.links import adapters, interfaces, links, peers, variables

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Nvml(types.ModuleType):
    """A fake pynvml: GPUs 0 and 1, and 2 and 3, are joined by NVLink; the pairs lie on two sockets."""

    NVML_P2P_CAPS_INDEX_NVLINK, NVML_P2P_STATUS_OK, NVML_NVLINK_MAX_LINKS = 2, 0, 18

    class NVMLError(Exception):
        pass

    def __init__(self, joined: set[frozenset[int]], failing: bool = False) -> None:
        super().__init__("pynvml")
        self.joined, self.failing, self.open = joined, failing, 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if self.failing:
            raise self.NVMLError("GPU is lost")
        return int(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetP2PStatus(self, one: int, other: int, index: int) -> int:
        assert index == 2
        return 0 if frozenset((one, other)) in self.joined else 5

    def nvmlDeviceGetTopologyCommonAncestor(self, one: int, other: int) -> int:
        return 50 if one // 2 != other // 2 else 10

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        if link >= 12:
            raise self.NVMLError("Invalid Argument")
        return int(link < 12 - handle)


@pytest.fixture
def machine(monkeypatch):
    def install(count: int, joined: list[tuple[int, int]], refused: list[tuple[int, int]] = (), failing: bool = False) -> Nvml:
        fake = Nvml(set(map(frozenset, joined)), failing)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        monkeypatch.setattr(subject, "gpu_uuid", lambda device: f"GPU-{device.index}")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: (one, other) not in refused)
        monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
        return fake

    return install


def test_without_cuda_nothing_is_told() -> None:
    assert list(links(CPU)) == ["not measured: no CUDA device"]


def test_all_joined_by_nvlink(machine) -> None:
    fake = machine(3, [(0, 1), (0, 2), (1, 2)])
    assert list(peers(3)) == [
        "peer access: between all",
        "NVLink: between all",
        "NVLink, links that are up: GPU 0: 12, GPU 1: 11, GPU 2: 10",
    ]
    assert fake.open == 0


def test_two_pairs_on_two_sockets(machine) -> None:
    machine(4, [(0, 1), (2, 3)], refused=[(2, 0), (0, 3)])
    found = list(peers(4))
    assert found[:3] == [
        "peer access: not between 0-2, 0-3",
        "NVLink: between 0-1, 2-3",
        "PCIe (SYS, between NUMA nodes): between 0-2, 0-3, 1-2, 1-3",
    ]
    machine(2, [], refused=[(0, 1)])
    assert list(peers(2)) == ["peer access: between no two", "PCIe (PIX, one PCIe switch): between all"]


def test_what_cannot_be_read_has_a_reason(machine, monkeypatch) -> None:
    fake = machine(2, [], failing=True)
    assert list(peers(2))[-1] == "what joins GPUs: not known: NVML: GPU is lost" and fake.open == 0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install 'adagrpo[cuda]'" in list(peers(2))[-1]
    assert list(peers(1)) == ["one GPU: no peers"]
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: torch._C._no_such_function())
    assert "several GPUs cannot train" in subject.nccl_version()


def port(folder: Path, name: str, **files: str) -> None:
    place = folder / name / "ports" / "1"
    place.mkdir(parents=True)
    for file, text in files.items():
        (place / file).write_text(text + "\n", "ascii")


def test_adapters_and_interfaces(tmp_path: Path) -> None:
    assert "over sockets" in next(adapters(tmp_path / "infiniband"))
    port(tmp_path, "mlx5_0", state="4: ACTIVE", rate="400 Gb/sec (4X NDR)", link_layer="InfiniBand")
    port(tmp_path, "mlx5_1", state="1: DOWN", rate="100 Gb/sec (4X EDR)", link_layer="Ethernet")
    port(tmp_path, "odd")
    assert list(adapters(tmp_path)) == [
        "mlx5_0 port 1: InfiniBand, ACTIVE, 400 Gb/sec (4X NDR)",
        "mlx5_1 port 1: RoCE, DOWN, 100 Gb/sec (4X EDR)",
        "odd port 1: unknown kind, unknown state, rate not told",
    ]
    for name, state, speed in (("lo", "unknown", ""), ("eth0", "up", "25000"), ("eth1", "down", ""), ("veth", "up", "-1")):
        (tmp_path / "net" / name).mkdir(parents=True)
        (tmp_path / "net" / name / "operstate").write_text(state, "ascii")
        (tmp_path / "net" / name / "speed").write_text(speed, "ascii")
    assert list(interfaces(tmp_path / "net")) == ["interfaces: eth0 (25 Gb/s), veth"]
    assert list(interfaces(tmp_path / "absent")) == ["interfaces: none"]


def test_variables_that_slow_or_hang_are_explained() -> None:
    found = list(variables({
        "NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "0", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "PATH": "/bin",
        "NCCL_SOCKET_IFNAME": "eth0",
    }))  # fmt: skip
    assert found == [
        "NCCL_IB_DISABLE=0",
        "NCCL_P2P_DISABLE=1: GPUs of a node talk by way of the host",
        "NCCL_SOCKET_IFNAME=eth0",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING=0: a rank that waits in vain waits for ever",
    ]


def test_the_page_of_a_cuda_machine(machine, tmp_path: Path) -> None:
    machine(2, [(0, 1)])
    found = list(links(CUDA, tmp_path, {"NCCL_DEBUG": "INFO"}))
    assert found[0] == "NCCL 2.27.5" and "NVLink: between all" in found and "NCCL_DEBUG=INFO" in found
    assert found[-1].endswith("not measured")


def test_names_are_those_of_the_library() -> None:
    """Where it is installed."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        pytest.skip("nvidia-ml-py is not installed")
    for name in vars(Nvml):
        if name.startswith(("nvml", "NVML_")):
            assert hasattr(nvml, name), name
    assert nvml.NVML_P2P_CAPS_INDEX_NVLINK == 2 and nvml.NVML_P2P_STATUS_OK == 0
    assert (nvml.NVML_TOPOLOGY_INTERNAL, nvml.NVML_TOPOLOGY_SINGLE, nvml.NVML_TOPOLOGY_SYSTEM) == (0, 10, 50)
