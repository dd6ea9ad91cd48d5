"""The seeded recipe that makes tiny-flux: a complete FLUX pipeline folder, trained from nothing on two CPU cores.

Scenes are rendered, an autoencoder learns them, and text encoders and transformer learn its latents by flow matching.
Same seed, same software, same number of threads: same weights.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adagrpo.disk.files import write_json
from adagrpo.disk.whole import written_whole
from adagrpo.text.strict_json import from_json, to_json
from adagrpo.tiny import architecture
from adagrpo.tiny.evaluate import evaluate, quiet
from adagrpo.tiny.reward import inspect
from adagrpo.tiny.training import Recipe, encode, psnr, reconstruct, render_scenes, train_flow, train_vae

if TYPE_CHECKING:
    from diffusers import FluxPipeline

_CHECKED = 1000


def build(out: Path, seed: int = 0, recipe: Recipe | None = None, threads: int = 2) -> dict[str, Any]:
    """Train tiny-flux and write it to the folder `out` (made if missing) with its log, `build.json`.

    The folder holds bfloat16 weights in upstream's layout; `diffusers.FluxPipeline.from_pretrained` loads it. Every
    stage counts iterations, not time. Returns the log: recipe, sizes, seconds, losses, reconstruction quality, and
    reward on held-out prompts. Raises `FileExistsError` where `out` already holds a pipeline.
    """
    out, recipe = Path(out), recipe or Recipe()
    if (out / "model_index.json").exists():
        raise FileExistsError(f"{out} already holds a pipeline: remove it or name another folder")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            log = _train(out, seed, recipe)
        log["evaluation"] = [evaluate(out, recipe.evaluated, steps, seed) for steps in (8, 16)]
    finally:
        torch.set_num_threads(before)
    software = {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")}
    log = {"seed": seed, "threads": threads, "software": software, "recipe": asdict(recipe), "bytes": folder_bytes(out)} | log
    write_json(out / "build.json", log)
    return log


def folder_bytes(folder: Path) -> int:
    """Size of all files under a folder, in bytes."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _train(out: Path, seed: int, recipe: Recipe) -> dict[str, Any]:
    clock, seconds = time.perf_counter(), {}

    def lap(stage: str) -> None:
        nonlocal clock
        seconds[stage] = round(time.perf_counter() - clock, 1)
        clock = time.perf_counter()

    pipe = _assemble()
    scenes = render_scenes(recipe, seed)
    lap("render")
    vae_loss = train_vae(pipe.vae, scenes.images, recipe, seed)
    lap("vae")
    images, prompts = scenes.images[:_CHECKED], scenes.prompts[:_CHECKED]
    outputs = reconstruct(pipe.vae, images)
    kept = sum(verdict.exact for verdict in inspect(outputs, prompts)) / len(prompts)
    latents = encode(pipe.vae, scenes.images)
    lap("encode")
    flow_loss = train_flow(pipe, scenes.prompts, latents, recipe, seed)
    lap("flow")
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    _save(pipe, out)
    return {
        "seconds": seconds,
        "parameters": {name: architecture.count_parameters(part) for name, part in parts.items()},
        "vae": {"psnr": round(psnr(outputs, images), 2), "exact": round(kept, 4)},
        "loss": {"vae": vae_loss, "flow": flow_loss},
        "max_sequence_length": architecture.TEXT_LENGTH,
    }


def _assemble() -> FluxPipeline:
    from diffusers import FluxPipeline

    clip, t5 = architecture.make_tokenizers()
    return FluxPipeline(
        scheduler=architecture.make_scheduler(),
        vae=architecture.make_vae(),
        text_encoder=architecture.make_clip(clip),
        tokenizer=clip,
        text_encoder_2=architecture.make_t5(t5),
        tokenizer_2=t5,
        transformer=architecture.make_transformer(),
    )


def _save(pipe: FluxPipeline, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with written_whole(out) as draft:
        with quiet():
            pipe.to(torch.bfloat16).save_pretrained(draft)
        pipe.tokenizer.backend_tokenizer.model.save(str(draft / "tokenizer"))  # vocab.json and merges.txt, as upstream
        index = draft / "model_index.json"
        entries = from_json(index.read_text())
        entries.pop("_name_or_path", None)
        entries["tokenizer_2"] = ["transformers", "T5TokenizerFast"]  # the name that every transformers version knows
        index.write_text(to_json(entries, indent=2) + "\n")
