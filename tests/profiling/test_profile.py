"""`adagrpo profile`: its files say what the trainer did, and nothing half-written is left when it cannot go on."""

import gzip
import json
import sys
import types
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from adagrpo_kernels._dispatch import launch, observed
from torch.autograd import DeviceType
from toy import CHANNELS, LENGTH, toy_config

from adagrpo.cli import main
from adagrpo.engine.executor import Count
from adagrpo.engine.timing import PHASES
from adagrpo.estimate.roofline import H100, Work
from adagrpo.profiling import power, record
from adagrpo.profiling.figures import memory_curve, phase_bars, roofline
from adagrpo.profiling.memory import AllocatorHistory, MemoryTimeline, Sample
from adagrpo.profiling.points import KernelMeter, Point, moved_bytes
from adagrpo.profiling.power import Energy, PowerMeter
from adagrpo.profiling.record import top_operators
from adagrpo.recipe.keys import RewardConfig
from adagrpo.recipe.load import to_toml

CUDA = torch.device("cuda")
SMALL = [
    "--train.slots", "1", "--rollout.steps", "4", "--rollout.sde-steps", "0", "1", "--rollout.group-size", "2",
    "--selection.candidates", "3", "--model.device", "cpu",
]  # fmt: skip
ALWAYS = {"summary.json", "summary.md", "phases.svg", "roofline.svg", "memory.svg", "trace.json.gz"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The profile of a small tiny recipe."""
    out = tmp_path_factory.mktemp("profile") / "tiny"
    assert main(["profile", "tiny", *SMALL, "--iterations", "2", "--out", str(out)]) == 0
    return out


@pytest.fixture
def toy(tmp_path) -> str:
    model = {"family": "parts:model", "device": "cpu"}
    data = {"prompts": "parts:prompts", "held_out": "parts:held_out"}
    config = toy_config(model=model, data=data, rewards=(RewardConfig("parts:reward"),), name="toy")
    file = tmp_path / "toy.toml"
    file.write_text(to_toml(config), "utf-8")
    return str(file)


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text("utf-8"))


def test_files_and_facts(folder) -> None:
    found, page = summary_of(folder), (folder / "summary.md").read_text("utf-8")
    assert {p.name for p in folder.iterdir()} == ALWAYS
    assert found["machine"]["versions"]["torch"] == torch.__version__ and found["machine"]["device"] == "cpu"
    assert found["changed_keys"]["engine.overlap"] == [True, False] and found["changed_keys"]["train.slots"] == [12, 1]
    assert "rollout.plan" not in found["changed_keys"]
    assert found["iterations"] == {"warmup": 1, "traced": 1, "timed": 2} and len(found["seconds"]["each"]) == 2
    assert 0 < len(found["operators"]) <= 15 and found["operators"][0]["name"].startswith("aten::")
    own = [operator["seconds"] for operator in found["operators"]]
    assert own == sorted(own, reverse=True) and sum(own) < found["seconds"]["traced"] * 1.5
    assert found["power"] == dict.fromkeys(("watts", "joules_per_iteration", "joules_per_image")) | {"reason": "no GPU"}
    assert found["roof"] is None and "no roof" in (folder / "roofline.svg").read_text("utf-8")
    assert found["images"] == 3 + 2 * 2 and "not measured: no GPU" in page
    assert found["memory"]["peak_bytes"] >= max(sample["held"] for sample in found["memory"]["timeline"]) > 2**20


def test_phases_are_the_trainers_and_add_up(folder) -> None:
    found = summary_of(folder)
    phases = {row["phase"]: row for row in found["phases"]}
    assert set(phases) == {*PHASES, "sync", "other"} and list(phases)[-1] == "other"
    assert sum(row["seconds"] for row in found["phases"]) == pytest.approx(found["seconds"]["mean"], rel=0.02)
    assert found["seconds"]["mean"] == pytest.approx(sum(found["seconds"]["each"]) / 2)
    # 3 candidates x 4 steps; a fork at each of 2 steps; 2 samples of each fork through 3 and 2 more steps
    evaluations = {phase: row["evaluations"] for phase, row in phases.items() if row["evaluations"]}
    assert evaluations == {"probe": 12, "prefix": 2, "rollout": 10, "update": 2}


def test_the_trace_names_the_phases(folder) -> None:
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    assert set(PHASES) <= set(names) and names.count("update") == 1  # one traced iteration


def test_pictures_are_xml(folder) -> None:
    for name in ("phases.svg", "roofline.svg", "memory.svg"):
        assert ET.parse(folder / name).getroot().tag.endswith("svg")
    words = (folder / "phases.svg").read_text("utf-8")
    assert all(f">{phase}<" in words for phase in PHASES)


def test_flops_of_a_phase_by_hand(toy, tmp_path, monkeypatch) -> None:
    class Meter:
        problem = None

        def __init__(self, device) -> None: ...

        def __enter__(self):
            return self

        def __exit__(self, *exception) -> None: ...

        def energy(self) -> Energy:
            return Energy(seconds=2.0, joules=300.0, samples=5)

    monkeypatch.setattr(record, "PowerMeter", Meter)
    out = tmp_path / "profile"
    (out / "memory.pickle").parent.mkdir()
    (out / "memory.pickle").write_text("of an earlier profile")
    assert main(["profile", toy, "--iterations", "3", "--out", str(out)]) == 0
    found = summary_of(out)
    assert {p.name for p in out.iterdir()} == ALWAYS
    points = {point["name"]: point for point in found["points"]}
    counts = {row["phase"]: row["evaluations"] for row in found["phases"]}
    forward = 2 * LENGTH * (CHANNELS * 16 + 16 * CHANNELS)  # two matrix products, a multiply-add is two
    for phase in ("probe", "prefix", "rollout"):
        assert points[phase]["flops"] == forward * counts[phase]
    # images: 6 candidates, and 2 slots x 2 forks x 4
    assert found["images"] == 22
    assert found["power"]["watts"] == 150 and found["power"]["joules_per_iteration"] == 100
    assert found["power"]["joules_per_image"] == pytest.approx(100 / 22)


@pytest.mark.parametrize("where", ["train.update_policy", "engine.sampling.branch_plan"])
def test_out_of_memory_leaves_the_snapshot_only(where, toy, tmp_path, capsys, monkeypatch) -> None:
    class History(AllocatorHistory):
        def dump(self, path: Path) -> bool:
            path.write_bytes(b"history")
            return True

    def run_out(*args, **kwargs):
        raise torch.OutOfMemoryError("no room\nfor this")

    monkeypatch.setattr(record, "AllocatorHistory", History)
    monkeypatch.setattr(f"adagrpo.{where}", run_out)
    out = tmp_path / "profile"
    assert main(["profile", toy, "--out", str(out)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "out of memory" in error and "iteration 1" in error and str(out / "memory.pickle") in error
    assert [p.name for p in out.iterdir()] == ["memory.pickle"] and (out / "memory.pickle").read_bytes() == b"history"


def test_out_of_memory_on_a_cpu_promises_no_snapshot(toy, tmp_path, capsys, monkeypatch) -> None:
    def run_out(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("adagrpo.train.update_policy", run_out)
    assert main(["profile", toy, "--out", str(tmp_path / "profile")]) == 1
    assert "phase update: out of memory" in (error := capsys.readouterr().err) and "no allocator history" in error
    assert not (tmp_path / "profile").exists()


def test_another_failure_leaves_nothing(toy, tmp_path, monkeypatch) -> None:
    def fails(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("adagrpo.profiling.summary.memory_curve", fails)
    assert main(["profile", toy, "--iterations", "1", "--out", str(tmp_path / "profile")]) == 1
    assert not (tmp_path / "profile").exists()


def test_the_allocators_history_is_recorded_on_cuda_only(tmp_path, monkeypatch) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **keys: calls.append(tuple(keys.items())))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"history"))
    for device in (torch.device("cpu"), CUDA):
        history = AllocatorHistory(device)
        history.start()
        assert history.dump(tmp_path / "memory.pickle") == (device == CUDA)
        history.stop()
    assert calls == [(("max_entries", 200_000),), (("enabled", None),)]
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("memory.pickle", b"history")]


def test_a_phases_peak_is_read_when_it_ends(monkeypatch) -> None:
    held, peaks = iter([10, 20, 30]), iter([0, 15, 90])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(held))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    timeline = MemoryTimeline(CUDA)
    timeline.begin()
    timeline.listener("probe")
    found = [(sample.phase, sample.held, sample.peak) for sample in timeline.end()]
    assert found == [("begin", 10, 15), ("probe", 20, 90), ("end", 30, None)]


class Nvml(types.ModuleType):
    """A fake pynvml whose board draws the given milliwatts, one reading after the other."""

    class NVMLError(Exception):
        pass

    def __init__(self, milliwatts: list[float]) -> None:
        super().__init__("pynvml")
        self.readings, self.handle, self.closed = iter(milliwatts), "", False

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None:
        self.closed = True

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.handle = uuid
        return uuid

    def nvmlDeviceGetPowerUsage(self, handle: str) -> float:
        assert handle == self.handle == "GPU-7"
        reading = next(self.readings, None)
        if reading is None:
            raise self.NVMLError("GPU is lost")
        return reading


@pytest.fixture
def nvml(monkeypatch):
    def install(*milliwatts: float) -> Nvml:
        fake = Nvml(list(milliwatts))
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        monkeypatch.setattr(power, "gpu_uuid", lambda device: "GPU-7")
        return fake

    return install


def test_joules_are_the_trapezoids_under_the_samples(nvml) -> None:
    fake, times = nvml(100_000, 200_000, 300_000), iter([10.0, 11.0, 13.0])
    with PowerMeter(CUDA, interval=1000, clock=lambda: next(times)) as meter:
        meter.sample()
    # 1 s x 150 W + 2 s x 250 W
    found = meter.energy()
    assert found == Energy(seconds=3.0, joules=650.0, samples=3) and found.watts == pytest.approx(650 / 3)
    assert fake.closed


def test_power_is_sampled_in_a_thread(nvml) -> None:
    nvml(*[50_000] * 1_000_000)
    with PowerMeter(CUDA, interval=0.001) as meter:
        while len(meter._samples) < 5:
            pass
    found = meter.energy()
    assert found is not None and found.samples >= 6 and found.watts == pytest.approx(50)


def test_without_power_there_is_a_reason(nvml, monkeypatch) -> None:
    with PowerMeter(torch.device("cpu")) as meter:
        assert meter.energy() is None and meter.problem == "no GPU"
    nvml(100_000)
    with PowerMeter(CUDA, interval=1000) as meter:
        pass
    assert meter.energy() is None and meter.problem == "NVML: GPU is lost"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "adagrpo[cuda]" in str(PowerMeter(CUDA).problem)


def test_bytes_of_a_phase_are_those_of_its_calls_and_rows() -> None:
    each = Work(flops=0, fp8_flops=0, fixed_bytes=10, row_bytes=3, small_fixed_bytes=5, small_row_bytes=2)
    assert moved_bytes(each, Count(evaluations=7, calls=2)) == 2 * 15 + 7 * 5


def test_kernels_are_observed_as_they_launch() -> None:
    def sde_step_kernel() -> None: ...

    meter = KernelMeter()
    rows = {name: torch.empty(4, 1000, dtype=torch.bfloat16, device="meta") for name in ("x_ptr", "v_ptr", "next_ptr")}
    with observed(meter):
        launch("sde_step", sde_step_kernel, (4, 1), {**rows, "rows": 4}, 4)
        launch("capability_step", sde_step_kernel, (1,), {"x": rows["x_ptr"]}, 4)
        launch("sde_step", sde_step_kernel, (0,), rows, 4)
    launch("sde_step", sde_step_kernel, (4, 1), rows, 4)
    assert meter.launches == {"sde_step": 1, "capability_step": 1}
    (point,) = meter.points({"sde_step_kernel": 2e-6})
    # R·D·3s bytes, 8 float operations per element
    assert point == Point("sde_step", "kernel", 32_000, 4 * 1000 * 3 * 2, 2e-6)
    assert point.intensity == pytest.approx(4 / 3) and point.tflops == pytest.approx(0.016)
    assert point.gigabytes == pytest.approx(12.0)


def test_operators_of_a_device_are_its_kernels() -> None:
    def event(key: str, device: DeviceType, microseconds: float, annotation: bool = False) -> types.SimpleNamespace:
        times = {"self_cpu_time_total": microseconds, "self_device_time_total": microseconds}
        return types.SimpleNamespace(key=key, device_type=device, count=2, is_user_annotation=annotation, **times)

    events = [
        event("aten::addmm", DeviceType.CPU, 900), event("gemm", DeviceType.CUDA, 300), event("sde", DeviceType.CUDA, 100),
        event("probe", DeviceType.CUDA, 9000), event("range", DeviceType.CUDA, 5000, True),
    ]  # fmt: skip
    found = top_operators(events, {"probe"}, on_device=True)
    assert [(o.name, o.seconds, round(o.share, 9)) for o in found] == [("gemm", 3e-4, 0.75), ("sde", 1e-4, 0.25)]
    assert [o.name for o in top_operators(events, {"probe"}, on_device=False)] == ["aten::addmm"]


def test_a_point_at_the_ridge_lies_on_the_corner_of_the_roof() -> None:
    flops, seconds = H100.bf16.value * 1e12, 1.0
    ridge = Point("ridge <&>", "phase", flops, H100.bandwidth.value * 1e12, seconds)
    root = ET.fromstring(roofline([ridge, Point("k", "kernel", 1e9, 1e9, 1e-3)], H100, "t"))
    marks = [circle for circle in root.iter("{http://www.w3.org/2000/svg}circle") if circle.get("r") == "5"]
    roofs = [path.get("d") or "" for path in root.iter("{http://www.w3.org/2000/svg}path") if path.get("class") == "roof"]
    assert f"L{marks[0].get('cx')},{marks[0].get('cy')}H" in roofs[0] and len(roofs) == 2


def test_pictures_of_nothing_are_pictures() -> None:
    for text in (
        phase_bars({"other": 0.0}, "t"),
        roofline([], None, "t"),
        memory_curve([Sample("begin", 0.0, 0), Sample("probe", 0.0, 2, peak=9), Sample("end", 0.0, 0)], "<t>", "n"),
    ):
        ET.fromstring(text)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("tiny", "--iterations", "0"), ["--iterations 0"]),
        (("tiny", "--out", "/dev/null/profile"), ["--out /dev/null/profile"]),
        (("tinny",), ["did you mean tiny"]),
        (("tiny", "--train.slotz", "3"), ["--train.slots"]),
        (("tiny", "--rollout.group-size", "1"), ["rollout.group_size = 1"]),
        (("tiny", "--model.device", "cuda:0"), ["model.device = cuda:0"]),
    ],
)
def test_bad_arguments_are_one_message_with_code_two(args, words, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["profile", *args])
    except SystemExit as stop:
        code = int(stop.code or 0)
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error and all(word in error for word in words), error
    assert list(tmp_path.iterdir()) == []
