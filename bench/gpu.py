"""`make gpu`: prove the kernels on a CUDA device, then time them, in parts that can each be run alone.

``python bench/gpu.py`` runs all parts, ``--part NAME`` one of them, ``--list`` names them. A part is stopped after 8 minutes.
Its result is in ``bench/results/<device>/``: a record of `adagrpo bench kernels` (benches, written row by row), or
``<part>.txt`` (tests), as it goes. Benches run only if every test before them passed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 480
TESTS = {
    "correctness-step": ["tests/kernels/test_triton_sde_step.py", "tests/kernels/test_triton_philox.py"],
    "correctness-replay": ["tests/kernels/test_triton_group_log_prob.py"],
    "correctness-groups": ["tests/kernels/test_triton_fused_advantage.py", "tests/kernels/test_triton_capability_step.py"],
    "correctness-rows": ["tests/kernels/test_rows.py"],
    "on-device": ["tests/gpu"],
}
BENCHES = (
    "sde_step", "philox", "group_log_prob", "fused_advantage", "capability_step", "quantize_rowwise", "layer_norm_modulate",
    "gelu_join",
)  # fmt: skip
PARTS = (*TESTS, *(f"kernels-{op}" for op in BENCHES))


def run(part: str, folder: Path) -> int:
    """Run one part with its time limit; returns its exit code, 124 when it was stopped."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    if part in TESTS:
        log = folder / f"{part}.txt"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", *TESTS[part]]
    else:
        log = None
        op = part.removeprefix("kernels-")
        command = [sys.executable, "-m", "adagrpo", "bench", "kernels", "--op", op, "--out", str(folder.parent)]
    try:
        if log is None:
            return subprocess.run(command, cwd=ROOT, env=environment, timeout=LIMIT).returncode
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(command, cwd=ROOT, env=environment, timeout=LIMIT, stdout=file, stderr=file).returncode
        print(log.read_text("utf-8").strip().splitlines()[-1])
        return code
    except subprocess.TimeoutExpired:
        print(f"{part}: stopped after {LIMIT} s")
        return 124


def main() -> int:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="run this part only; may be repeated")
    parser.add_argument("--list", action="store_true", help="name the parts")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(PARTS))
        return 0
    import torch

    if not torch.cuda.is_available():
        print("make gpu: no CUDA device here, nothing was run; on such a machine the GPU's figures are not measured")
        return 2
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    from adagrpo.bench.records import device_slug

    folder = ROOT / "bench" / "results" / device_slug(torch.device("cuda"))
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in arguments.part or PARTS:
        if failed and part not in TESTS:
            print(f"{part}: not run, because {', '.join(failed)} failed")
            continue
        print(f"== {part}", flush=True)
        if run(part, folder):
            failed.append(part)
    print(f"results in {folder.relative_to(ROOT)}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
