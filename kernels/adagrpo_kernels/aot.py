"""Launch every kernel and shape class on a stub driver for sm_90 and read what it costs: the numbers of ``budget.json``.

``python -m adagrpo_kernels.aot`` prints the table; ``--json`` prints it for machines; ``--write FILE`` makes it the budget.
A launch that Triton refuses is listed, and the exit code is then 1. Runs in a process without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ._dispatch import observed
from .cases import Case, cases


def measure(case: Case) -> dict[str, int]:
    """Launch one case on the stub driver.

    Returns:
        ``registers`` per thread; ``shared``, ``stack``, ``local`` bytes; ``load_bits``, ``store_bits``, the widest global
        accesses of the PTX; ``fma``, contracted float32 products, which would round unlike eager PyTorch.

    Raises:
        ValueError: ``check_names``.
        RuntimeError: nothing was launched.
    """
    from triton.runtime.cache import get_cache_manager

    from . import stub

    with stub.installed() as driver, observed(check_names):
        case.run()
    if not driver.launches:
        raise RuntimeError("nothing was launched")
    last = driver.launches[-1]
    ptx = Path(get_cache_manager(last.metadata.hash).get_file(f"{last.metadata.name}.ptx")).read_text("utf-8")
    fused = len(re.findall(r"\bfma\.rn\.f32\b", ptx))
    return {**resources(last.cubin), "shared": last.metadata.shared, **widths(ptx), "fma": fused}


def check_names(name: str, kernel: Any, arguments: dict[str, Any]) -> None:
    """Refuse a kernel with an argument that is a compile option too: unlike ``stream``, Triton lets it pass and acts on it.

    Raises:
        ValueError: naming kernel and arguments.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    options = make_backend(GPUTarget("cuda", 90, 32)).parse_options({}).__dict__
    if clash := sorted(set(options) & set(kernel.arg_names)):
        raise ValueError(f"{name}: Triton takes arguments of these names for compile options: {', '.join(clash)}")


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread and bytes of stack and local memory."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: max(int(n) for n in re.findall(rf"\b{name}:(\d+)", text)) for name in ("REG", "STACK", "LOCAL")}
    return {"registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"]}


def widths(ptx: str) -> dict[str, int]:
    """Widest global load and store of the PTX, in bits per thread."""
    found = {}
    for name, op in (("load_bits", "ld"), ("store_bits", "st")):
        hits = re.findall(rf"\b{op}\.global(?:\.[a-zA-Z_]\w*)*?(?:\.v(\d))?\.[a-z](\d+)\b", ptx)
        found[name] = max((int(count or 1) * int(bits) for count, bits in hits), default=0)
    return found


def table() -> dict[str, Any]:
    """The budget: all cases by kernel and shape class, with the version of Triton that made them. Beside it ``refused``, why
    the others could not be launched, and ``launched``, the functions that were."""
    import triton

    kernels: dict[str, dict[str, dict[str, int]]] = {}
    refused: dict[str, str] = {}
    launched: set[str] = set()
    with observed(lambda name, kernel, arguments: launched.add(kernel.fn.__name__)):
        for case in cases():
            try:
                kernels.setdefault(case.kernel, {})[case.shape] = measure(case)
            except Exception as error:
                refused[f"{case.kernel}, {case.shape}"] = f"{type(error).__name__}: {error}"
    version = {"target": "sm_90", "triton": triton.__version__}
    return {**version, "kernels": kernels, "refused": refused, "launched": sorted(launched)}


def main() -> int:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--write", type=Path, help="write the budget to this file")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 is set: the interpreter compiles nothing; unset it", file=sys.stderr)
        return 2
    found = table()
    for launch, reason in found["refused"].items():
        print(f"refused: {launch}: {reason}", file=sys.stderr)
    if arguments.write and not found["refused"]:
        budget = {name: found[name] for name in ("target", "triton", "kernels")}
        arguments.write.write_text(json.dumps(budget, indent=1) + "\n", "utf-8")
    elif arguments.json:
        print(json.dumps(found, indent=1))
    elif not arguments.write:
        columns = ("registers", "shared", "stack", "local", "load_bits", "store_bits", "fma")
        print(f"{'kernel, shape class':66}" + "".join(f"{c:>11}" for c in columns) + f"   triton {found['triton']}")
        for kernel, shapes in found["kernels"].items():
            for shape, row in shapes.items():
                print(f"{kernel + ': ' + shape:66}" + "".join(f"{row[c]:>11}" for c in columns))
    number = sum(len(shapes) for shapes in found["kernels"].values())
    print(f"{number} kernels x shape classes compiled, {len(found['refused'])} refused", file=sys.stderr)
    return 1 if found["refused"] else 0


if __name__ == "__main__":
    sys.exit(main())
