"""Compile every kernel and shape class for sm_90 without a GPU and read what it costs: the numbers of ``budget.json``.

``python -m adagrpo_kernels.aot`` prints the table; ``--json`` prints it for machines; ``--write FILE`` makes it the budget.
Runs in a process without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TARGET = ("cuda", 90, 32)
LONG = 65536  # elements of a FLUX.1 latent at 1024x1024 and half of them at 512x512: a multiple of 16, split
POINTERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32", "fp64": "*fp64"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel and shape class.

    Attributes:
        kernel, shape: names in the budget.
        function: the jitted function.
        types: Triton type of every argument passed; arguments left out are None.
        constants: compile-time arguments.
        warps: warps per program.
    """

    kernel: str
    shape: str
    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int


def cases() -> Iterator[Case]:
    """Every kernel and shape class of the budget."""
    yield from _sde_step_cases()
    yield from _philox_cases()
    yield from _group_log_prob_cases()
    yield from _advantage_cases()
    yield from _capability_cases()
    yield from _row_cases()


def _sde_step_cases() -> Iterator[Case]:
    from ._triton.common import BLOCK, WARPS, tile
    from ._triton.sde_step import sde_step_kernel

    table = {f"{name}_ptr": "*fp32" for name in ("a", "b", "w", "scale", "const", "sigma")}
    sizes = {"rows": "i32", "numel": "i32", "splits": "i32", "x_stride": "i32", "v_stride": "i32"}
    zero = {f"{name}_stride": "i32" for name in ("unconditional", "guidance", "noise", "previous", "step")} | {"stream": "i32"}
    split = {"partial_ptr": "*fp32", "arrived_ptr": "*i32"}
    draw = {"seed_ptr": "*i64", "row_ptr": "*i64", "iteration_ptr": "*i64", "step_ptr": "*i64"}
    extra = {"unconditional_ptr": "*bf16", "guidance_ptr": "*fp32", "previous_ptr": "*fp32", "history_ptr": "*fp32"}

    def case(shape: str, storage: str, numel: int, **more: str) -> Case:
        tile_rows, block, splits = tile(numel)
        x = POINTERS[storage]
        types = {"x_ptr": x, "v_ptr": x, "index_ptr": "*i64", "next_ptr": x, "logp_ptr": "*fp32"}
        types |= table | sizes | zero | more | (split if splits > 1 else {})
        return Case("sde_step", shape, sde_step_kernel, types, {"ROWS": tile_rows, "BLOCK": block}, WARPS)

    for storage in ("bf16", "fp32"):
        yield case(f"{storage}, long rows, deterministic", storage, LONG)
        yield case(f"{storage}, long rows, given noise", storage, LONG, noise_ptr="*fp32")
        yield case(f"{storage}, long rows, drawn noise", storage, LONG, **draw)
    yield case("bf16, long rows, drawn noise, forks, mean", "bf16", LONG, **draw, source_ptr="*i64", mean_ptr="*fp32")
    yield case("bf16, long rows, guidance, history, preview", "bf16", LONG, **draw, **extra, clean_ptr="*fp32")
    yield case("fp16, long rows, drawn noise", "fp16", LONG, **draw)
    yield case("fp32, short rows, drawn noise, mean", "fp32", BLOCK // 8, **draw, mean_ptr="*fp32")


def _philox_cases() -> Iterator[Case]:
    from ._triton.common import BLOCK, WARPS, tile
    from ._triton.philox import philox_normal_kernel

    words = {f"{name}_ptr": "*i64" for name in ("seed", "row", "iteration", "step")}
    sizes = dict.fromkeys(("rows", "numel", "step_stride", "stream"), "i32")
    for shape, storage, numel in (("bf16, long rows", "bf16", LONG), ("fp32, long rows", "fp32", LONG),
                                  ("fp32, short rows", "fp32", BLOCK // 8)):  # fmt: skip
        rows, block, _ = tile(numel)
        types = {"out_ptr": POINTERS[storage]} | words | sizes
        yield Case("philox", shape, philox_normal_kernel, types, {"ROWS": rows, "BLOCK": block}, WARPS)


def _group_log_prob_cases() -> Iterator[Case]:
    from ._triton.common import BLOCK, WARPS
    from ._triton.group_log_prob import group_log_prob_backward_kernel, group_log_prob_kernel

    strides = dict.fromkeys(("group", "numel", "x_stride", "v_stride", "latent_stride", "member_stride"), "i32")
    for storage in ("bf16", "fp32"):
        x = POINTERS[storage]
        shared = {"x_ptr": x, "v_ptr": x, "successor_ptr": x, "index_ptr": "*i64"} | strides
        shared |= {f"{name}_ptr": "*fp32" for name in ("a", "b", "scale")}
        forward = shared | {"const_ptr": "*fp32", "logp_ptr": "*fp32", "splits": "i32"}
        split = {"partial_ptr": "*fp32", "arrived_ptr": "*i32"}
        for shape, more, block in (("long rows", split, BLOCK), ("short rows", {}, 256)):
            constants = {"GROUP": 16, "BLOCK": block}
            yield Case("group_log_prob", f"{storage}, {shape}", group_log_prob_kernel, forward | more, constants, WARPS)
        types = shared | {"upstream_ptr": "*fp32", "upstream_stride": "i32", "grad_ptr": "*fp32"}
        yield Case(
            "group_log_prob", f"{storage}, long rows, backward", group_log_prob_backward_kernel, types, {"BLOCK": BLOCK}, WARPS
        )


def _advantage_cases() -> Iterator[Case]:
    from ._triton.fused_advantage import TILE, WARPS, fused_advantage_kernel

    for storage, calibration, size, weight in (
        ("fp64", "mass", 16, 1.0), ("fp64", "zscore", 16, 1.0), ("fp64", "zscore_centred", 16, 1.0),
        ("fp64", "none", 16, 0.3), ("fp64", "mass", 16, 0.0), ("fp64", "mass", 64, 1.0), ("fp32", "mass", 32, 1.0),
    ):  # fmt: skip
        rewards = POINTERS[storage]
        types = {"reward_ptr": rewards, "mean_ptr": "*fp64", "std_ptr": "*fp64", "count_ptr": "*i64", "mask_ptr": "*i1"}
        types |= {"weight_ptr": "*fp32", "advantage_ptr": rewards, "statistics_ptr": rewards}
        types |= dict.fromkeys(("number", "groups", "size", "reward_stride"), "i32")
        constants = {
            "CLIP": 5.0, "WEIGHT": weight, "CALIBRATION": calibration, "GROUPS": TILE // size, "SIZE": size,
        }  # fmt: skip
        shape = f"{storage}, {calibration}, groups of {size}, weight {weight}"
        yield Case("fused_advantage", shape, fused_advantage_kernel, types, constants, WARPS)


def _capability_cases() -> Iterator[Case]:
    from ._triton.capability_step import WARPS, capability_step_kernel
    from .capability_step import STRATEGIES

    results = {"new_mean_ptr": "*fp64", "new_var_ptr": "*fp64", "new_count_ptr": "*i64", "pick_ptr": "*i64"}
    results |= {"distance_ptr": "*fp64", "status_ptr": "*i64"}
    state = {"score_ptr": "*fp64", "mean_ptr": "*fp64", "var_ptr": "*fp64", "count_ptr": "*i64"}
    sizes = dict.fromkeys(("number", "slots", "candidates", "score_stride", "step_stride", "stream"), "i32")
    draw = {"seed_ptr": "*i64", "row_ptr": "*i64", "iteration_ptr": "*i64", "step_ptr": "*i64"}
    for strategy in STRATEGIES:
        for weights in ({}, {"weight_ptr": "*fp32"}):
            types = state | results | sizes | weights | (draw if strategy == "random" else {})
            constants = {"ALPHA": 0.8, "STRATEGY": strategy, "CANDIDATES": 16, "TILE": 128}
            shape = f"{strategy}, {'several rewards' if weights else 'one reward'}"
            yield Case("capability_step", shape, capability_step_kernel, types, constants, WARPS)


def _row_cases() -> Iterator[Case]:
    """Token rows of FLUX.1: width 3072, MLP 12288, single block's last product 15360."""
    from ._triton.gelu_join import gelu_join_kernel
    from ._triton.layer_norm_modulate import layer_norm_modulate_kernel
    from ._triton.quantize import quantize_rowwise_kernel
    from ._triton.rows import blocks

    def case(
        name: str, function: Any, columns: int, storage: str, fp8: bool, inputs: str, strides: str, **constants: Any
    ) -> Case:
        block, warps = blocks(columns)
        types = {f"{n}_ptr": POINTERS[storage] for n in inputs.split()} | {f"{n}_stride": "i32" for n in strides.split()}
        types |= {"out_ptr": "*fp8e4nv", "scale_ptr": "*fp32"} if fp8 else {"out_ptr": POINTERS[storage]}
        types |= {"length": "i32", "numel": "i32"}
        shape = f"{storage} to {'fp8' if fp8 else storage}, long rows, {columns}"
        return Case(name, shape, function, types, constants | {"BLOCK": block, "ROUND_E4M3": False}, warps)

    for storage in ("bf16", "fp32"):
        for columns in (3072, 12288, 15360):
            yield case("quantize_rowwise", quantize_rowwise_kernel, columns, storage, True, "x", "x_batch x_row")
        for fp8 in (True, False):
            yield case(
                "layer_norm_modulate", layer_norm_modulate_kernel, 3072, storage, fp8, "x shift mod_scale",
                "x_batch x_row shift mod_scale", EPS=1e-6,
            )  # fmt: skip
            for columns, first in ((12288, 0), (15360, 3072)):
                yield case(
                    "gelu_join", gelu_join_kernel, columns, storage, fp8, "mlp first" if first else "mlp",
                    "mlp_batch mlp_row first_batch first_row", FIRST=first,
                )  # fmt: skip


def measure(case: Case) -> dict[str, int]:
    """Compile one case.

    Returns:
        ``registers`` per thread; ``shared``, ``stack``, ``local`` bytes; ``load_bits``, ``store_bits``, the widest global
        accesses of the PTX; ``fma``, contracted float32 products, which would round unlike eager PyTorch.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.function.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    constants = {(names.index(n),): case.constants.get(n) for n in names if signature[n] == "constexpr"}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or (signature[name] == "i32" and (name == "numel" or name.endswith("_stride")))
    }
    source = ASTSource(case.function, signature, constants, divisible)
    options = {"num_warps": case.warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget(*TARGET), options=options)
    ptx = compiled.asm["ptx"]
    fused = len(re.findall(r"\bfma\.rn\.f32\b", ptx))
    return {**resources(compiled.asm["cubin"]), "shared": compiled.metadata.shared, **widths(ptx), "fma": fused}


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
    """All cases by kernel and shape class, with the version of Triton that made them."""
    import triton

    kernels: dict[str, dict[str, dict[str, int]]] = {}
    for case in cases():
        kernels.setdefault(case.kernel, {})[case.shape] = measure(case)
    return {"target": "sm_90", "triton": triton.__version__, "kernels": kernels}


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
    text = json.dumps(found, indent=1)
    if arguments.write:
        arguments.write.write_text(text + "\n", "utf-8")
    elif arguments.json:
        print(text)
    else:
        columns = ("registers", "shared", "stack", "local", "load_bits", "store_bits", "fma")
        print(f"{'kernel, shape class':66}" + "".join(f"{c:>11}" for c in columns) + f"   triton {found['triton']}")
        for kernel, shapes in found["kernels"].items():
            for shape, row in shapes.items():
                print(f"{kernel + ': ' + shape:66}" + "".join(f"{row[c]:>11}" for c in columns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
