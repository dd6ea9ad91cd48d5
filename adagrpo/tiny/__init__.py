"""The built-in world: prompts about coloured shapes, a reward that checks pixels, and a small FLUX model that draws them."""

from __future__ import annotations

from pathlib import Path

__all__ = ["tiny_flux_path"]


def tiny_flux_path() -> Path:
    """Folder of the shipped model, in the layout that `diffusers.FluxPipeline.from_pretrained` reads.

    Raises `FileNotFoundError` where the installation lacks it.
    """
    from importlib.resources import files

    folder = Path(str(files(__name__) / "tiny-flux"))
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"no model in {folder}: reinstall adagrpo, or make one with adagrpo.tiny.build.build")
    return folder
