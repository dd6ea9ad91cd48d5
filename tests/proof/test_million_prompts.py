"""A million prompts as text, CSV, JSON lines and one JSON list: in a fresh process: seconds and peak memory until they are
known to be sound, apart from the held-out ones, and the first is drawn.

Writes ``bench/results/cpu/million-prompts.json``.
"""

import csv
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adagrpo.run.machine import describe_machine, processor

RECORD = Path(__file__).resolve().parents[2] / "bench" / "results" / "cpu" / "million-prompts.json"
COUNT = 1_000_000
WORDS = ["a", "red", "large", "cat", "sitting", "under", "tree,", "with", "light", "detailed", "portrait", "of", "sharp", "oil"]
# Seconds of work (those of the clock are recorded too), and MB at the peak of the process, of which torch alone takes 230.
LIMITS = {"txt": (2, 300), "csv": (8, 500), "jsonl": (8, 500), "json": (8, 500), "txt#train": (8, 500)}

LOAD = """
import json, pathlib, re, sys, time
from adagrpo.prompts.digest import prompts_digest
from adagrpo.prompts.reading import Reading
from adagrpo.prompts.sources import load_prompts, require_disjoint
from adagrpo.prompts.stream import PromptStream

status = pathlib.Path("/proc/self/status")  # getrusage counts what the parent had when it forked
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1]) * 1024 / 1e6
found, before, worked = {"mb_before": peak()}, time.perf_counter(), time.process_time()
prompts = load_prompts(sys.argv[1])
require_disjoint(prompts, load_prompts(sys.argv[2]), "", "")
stream = PromptStream(prompts, 0)
drawn = stream.take(1)
found |= {"seconds": time.perf_counter() - before, "cpu_seconds": time.process_time() - worked}
found |= {"mb": peak(), "prompts": len(prompts)}
before = time.perf_counter()
drawn += stream.take(1000)
found |= {"microseconds_per_drawn_prompt": 1e3 * (time.perf_counter() - before)}
before = time.perf_counter()
prompts_digest(prompts)
found |= {"seconds_digest": time.perf_counter() - before, "mb_after_all": peak()}
print(json.dumps([found, drawn, prompts[-1]]))
"""


def texts() -> Iterator[str]:
    """Different prompts of 18 words, some of them twice blank, every tenth beyond ASCII."""
    draw = random.Random(0)
    for i in range(COUNT):
        yield f"{' '.join(draw.choices(WORDS, k=18))}{'  ' if i % 7 == 0 else ' '}{i}{' à la carte' if i % 10 == 0 else ''}"


def write_all(folder: Path) -> None:
    """The same prompts in every layout."""
    with (
        (folder / "p.txt").open("w", encoding="utf-8") as text,
        (folder / "p.csv").open("w", encoding="utf-8", newline="") as table,
        (folder / "p.jsonl").open("w", encoding="utf-8") as lines,
        (folder / "p.json").open("w", encoding="utf-8") as whole,
    ):
        rows = csv.writer(table)
        rows.writerow(("id", "prompt", "category"))
        for i, prompt in enumerate(texts()):
            text.write(f"{prompt}\n")
            rows.writerow((i, prompt, WORDS[i % 7]))
            record = {"tag": WORDS[i % 7], "include": [{"class": "cat", "count": i % 3}], "prompt": prompt}
            lines.write(json.dumps(record) + "\n")
            whole.write(("[" if i == 0 else ",\n") + json.dumps(prompt))
        whole.write("]")
    (folder / "held_out.txt").write_text("\n".join(f"held out {i}" for i in range(10_000)))


@pytest.mark.proof
def test_a_million_prompts(tmp_path: Path) -> None:
    write_all(tmp_path)
    record: dict = {"case": f"{COUNT} prompts of 18 words loaded by a fresh process, by layout"}
    known = set(texts())
    for layout, (seconds, megabytes) in LIMITS.items():
        source = f"{tmp_path}/p.{layout}"
        command = [sys.executable, "-c", LOAD, source, str(tmp_path / "held_out.txt")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found, drawn, last = json.loads(done.stdout)
        size = (tmp_path / f"p.{layout.partition('#')[0]}").stat().st_size
        record[layout] = {"file_mb": round(size / 1e6)} | {name: round(value, 2) for name, value in found.items()}
        assert len(set(drawn)) == 1001 and set(drawn) <= known and last in known
        if "#" not in layout:
            assert found["prompts"] == COUNT
        record[layout]["limits"] = {"cpu_seconds": seconds, "mb": megabytes}
    record["machine"] = describe_machine(torch.device("cpu")) | {"processor": processor()}
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    for layout, (seconds, megabytes) in LIMITS.items():
        assert record[layout]["cpu_seconds"] <= seconds and record[layout]["mb"] <= megabytes, (layout, record[layout])
