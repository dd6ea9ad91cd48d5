"""Run by `test_launch_everything.py` without TRITON_INTERPRET: many shapes of every operator, launched on the stub driver.

Among them rows, groups, strides and lengths of 1, which Triton compiles as constants, and sizes that nothing divides.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator

import torch
from adagrpo_kernels import cases, gelu_join, launch_counts, layer_norm_modulate, philox_normal, quantize_rowwise, stub
from adagrpo_kernels._dispatch import observed
from adagrpo_kernels.aot import check_names
from adagrpo_kernels.cases import DTYPES, STORAGES

LATENTS = ((1, 1), (1, 16), (7, 9), (4, 64), (33, 64), (1024, 64))
WIDTHS = (1, 16, 63, 3072, 16384)


def steps() -> Iterator[Callable[[], object]]:
    """A twelfth of all combinations of ``sde_step``, drawn by a fixed seed."""
    noises, extras = ("none", "given", "drawn", "drawn per row"), ("plain", "guided", "forks")
    every = list(itertools.product(STORAGES, ("", "fp32", "bf16"), LATENTS, (1, 2, 12), noises, extras))
    for storage, v, latent, rows, noise, extra in random.Random(0).sample(every, len(every) // 12):
        forks = {"source": torch.zeros(rows, dtype=torch.int64), "with_mean": True}
        guided = cases.guided(rows, latent, DTYPES[storage])
        keywords = {"plain": {}, "guided": guided, "forks": forks}[extra]
        yield lambda a=(storage, latent, rows, noise, v), k=keywords: cases.step(*a, **k)


def noises() -> Iterator[Callable[[], object]]:
    for storage, numel, rows in itertools.product(STORAGES, (1, 4, 63, 2048, 65537), (1, 2, 12)):
        yield lambda s=storage, n=numel, r=rows: philox_normal(1, torch.arange(r), n, 2, 3, 4, DTYPES[s], "triton")


def log_probs() -> Iterator[Callable[[], object]]:
    every = list(itertools.product(STORAGES, LATENTS, (1, 4), (1, 2, 12), (False, True)))
    for arguments in random.Random(0).sample(every, len(every) // 3):
        yield lambda a=arguments: cases.log_prob(*a)


def groups() -> Iterator[Callable[[], object]]:
    every = itertools.product(("fp32", "fp64"), cases.CALIBRATIONS, (1, 2, 12, 64), (0.0, 1.0), (1, 16), (1, 3))
    for arguments in random.Random(0).sample(list(every), 80):
        yield lambda a=arguments: cases.advantage(*a)
    every = itertools.product(cases.STRATEGIES, (1, 3), (1, 2, 48), (1, 2, 10, 17), ("fp32", "fp64"), ("fp32", "fp64"))
    for arguments in random.Random(0).sample(list(every), 100):
        yield lambda a=arguments: cases.capability(*a)


def token_rows() -> Iterator[Callable[[], object]]:
    for storage, width, (images, length), fp8 in itertools.product(STORAGES, WIDTHS, ((1, 1), (2, 5)), (False, True)):
        x = torch.zeros(images, length, width, dtype=DTYPES[storage])
        yield lambda x=x, q=fp8: layer_norm_modulate(x, x[:, 0], x[:, 0], quantized=q, impl="triton")
        yield lambda x=x, q=fp8: gelu_join(x, quantized=q, impl="triton")
        if width < 16384:
            yield lambda x=x, q=fp8: gelu_join(x, x, quantized=q, impl="triton")
        if fp8:
            yield lambda x=x: quantize_rowwise(x, "triton")


def main() -> None:
    refused, number = [], 0
    with stub.installed() as driver, observed(check_names):
        for call in itertools.chain(steps(), noises(), log_probs(), groups(), token_rows()):
            number += 1
            try:
                call()
            except Exception as error:
                refused.append(f"{number}: {type(error).__name__}: {error}")
        compiled = len({launch.metadata.hash for launch in driver.launches})
    print(json.dumps({"calls": number, "compiled": compiled, "launches": launch_counts(), "refused": refused}))


if __name__ == "__main__":
    main()
