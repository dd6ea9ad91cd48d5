"""What is loaded is what was meant: FLUX pipelines in the layouts that are published, whole and damaged, in small."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adagrpo.build import build_model
from adagrpo.cli import main
from adagrpo.errors import InputError
from adagrpo.recipe.load import load_recipe
from adagrpo.tiny import tiny_flux_path

TRANSFORMER = "diffusion_pytorch_model"
KINDS = {"transformer": TRANSFORMER, "vae": TRANSFORMER, "text_encoder": "model", "text_encoder_2": "model"}


@pytest.fixture
def folder(tmp_path) -> Path:
    return shutil.copytree(tiny_flux_path(), tmp_path / "pipeline")


def weights(folder: Path, component: str) -> Path:
    return folder / component / f"{KINDS[component]}.safetensors"


def rewrite(folder: Path, component: str, change) -> None:
    """Let ``change`` edit the dict of a component's tensors."""
    tensors = load_file(weights(folder, component))
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, weights(folder, component), {"format": "pt"})


def edit(path: Path, **changes) -> None:
    """Change keys of a JSON file; None drops one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def shard(folder: Path, component: str, parts: int = 3) -> list[Path]:
    """Split a component's weights as its library does."""
    file = weights(folder, component)
    tensors, names, weight_map = load_file(file), [], {}
    for i in range(parts):
        names.append(file.with_name(f"{file.stem}-{i + 1:05d}-of-{parts:05d}.safetensors"))
        part = {name: tensors[name] for name in list(tensors)[i::parts]}
        save_file(part, names[-1], {"format": "pt"})
        weight_map |= dict.fromkeys(part, names[-1].name)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    file.unlink()
    return names


def as_variant(folder: Path, component: str, variant: str = "fp16") -> None:
    file = weights(folder, component)
    file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))


def pickled(folder: Path, component: str) -> Path:
    file = weights(folder, component)
    stem = {"model": "pytorch_model"}.get(file.stem, file.stem)
    torch.save(load_file(file), file.with_name(f"{stem}.bin"))
    file.unlink()
    return file.with_name(f"{stem}.bin")


def dry_run(folder: Path, capsys, *options: str) -> tuple[int, str]:
    """Exit code and error of ``adagrpo train tiny --dry-run`` with this model."""
    capsys.readouterr()
    code = main(["train", "tiny", "--model.path", str(folder), *options, "--dry-run"])
    return code, capsys.readouterr().err


def config_with(folder: Path, **changes):
    import dataclasses

    return dataclasses.replace(load_recipe("tiny").model, path=str(folder), **changes)


def pop(name: str):
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: torch.Tensor):
    return lambda tensors: tensors.update({name: tensor})


HALF = torch.zeros(1, dtype=torch.bfloat16)
DAMAGED = {  # component, change of its tensors, what the message must name
    "transformer lacks": ("transformer", pop("proj_out.weight"), r"transformer: lacks proj_out\.weight"),
    "vae lacks": ("vae", pop("decoder.conv_out.bias"), r"vae: lacks decoder\.conv_out\.bias"),
    "clip lacks": ("text_encoder", pop("final_layer_norm.weight"), r"text_encoder: lacks final_layer_norm\.weight"),
    "t5 lacks": ("text_encoder_2", pop("shared.weight"), r"text_encoder_2: lacks (shared|encoder\.embed_tokens)\.weight"),
    "transformer holds": ("transformer", put("extra.weight", HALF), r"transformer: holds extra\.weight"),
    "vae holds": ("vae", put("decoder.extra", HALF), r"vae: holds decoder\.extra"),
    "clip holds": ("text_encoder", put("logit_scale", HALF), r"text_encoder: holds logit_scale"),
    "t5 holds": ("text_encoder_2", put("encoder.extra", HALF), r"text_encoder_2: holds encoder\.extra"),
    "transformer shape": ("transformer", put("proj_out.weight", HALF), r"transformer: proj_out\.weight has shape \[1\]"),
    "vae shape": ("vae", put("decoder.conv_out.bias", HALF), r"vae: decoder\.conv_out\.bias has shape \[1\]"),
    "clip shape": ("text_encoder", put("final_layer_norm.weight", HALF), r"text_encoder: final_layer_norm\.weight has shape"),
    "t5 shape": ("text_encoder_2", put("shared.weight", HALF), r"text_encoder_2: shared\.weight has shape \[1\]"),
    "float8": (
        "transformer",
        put("proj_out.weight", torch.zeros(16, 128).to(torch.float8_e4m3fn)),
        r"transformer: its weights are quantised: proj_out\.weight \(F8_E4M3\)",
    ),
    "nf4": (
        "text_encoder_2",
        put("encoder.block.0.layer.0.SelfAttention.q.weight.absmax", torch.zeros(64, dtype=torch.uint8)),
        r"text_encoder_2: its weights are quantised: .*absmax \(U8\)",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_dry_run_names_component_and_tensor(case: str, folder, capsys) -> None:
    component, change, words = DAMAGED[case]
    rewrite(folder, component, change)
    code, message = dry_run(folder, capsys)
    assert code == 2 and re.search(words, message), message
    with pytest.raises(InputError, match=words):
        build_model(config_with(folder))


@pytest.mark.parametrize(("component", "value"), zip(KINDS, map(float, ("nan", "inf", "-inf", "nan")), strict=True))
def test_values_that_are_not_finite_are_named(component: str, value: float, folder) -> None:
    def poison(tensors) -> None:
        name = min(name for name in tensors if name.endswith(("bias", "norm.weight")))
        tensors[name][-1] = value

    rewrite(folder, component, poison)
    with pytest.raises(InputError, match=rf"{component}: \S+ holds values that are not finite"):
        build_model(config_with(folder))


def cut(folder: Path) -> None:
    file = weights(folder, "vae")
    file.write_bytes(file.read_bytes()[:-100])


def cut_pickle(folder: Path) -> None:
    file = pickled(folder, "text_encoder")
    file.write_bytes(file.read_bytes()[:-1000])


def lfs_pointer(folder: Path) -> None:
    weights(folder, "transformer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def shard_twice(folder: Path) -> None:
    first, second, _ = shard(folder, "transformer")
    tensors = load_file(second) | dict(list(load_file(first).items())[:1])
    save_file(tensors, second, {"format": "pt"})


def reindexed(folder: Path, drop: str = "", add: str = "") -> None:
    """Take a tensor out of a sharded VAE's index, or name one more."""
    first, _ = shard(folder, "vae", 2)
    file = folder / "vae" / f"{TRANSFORMER}.safetensors.index.json"
    weight_map = json.loads(file.read_text())["weight_map"]
    weight_map.pop(drop, None)
    edit(file, weight_map=weight_map | ({add: first.name} if add else {}))


def stray_shard(folder: Path) -> None:
    first, *_ = shard(folder, "text_encoder_2", 2)
    shutil.copy(first, first.with_name("model-00001-of-00004.safetensors"))


def both_layouts(folder: Path) -> None:
    shutil.copy(weights(folder, "vae"), folder / "kept")
    shard(folder, "vae", 2)
    (folder / "kept").rename(weights(folder, "vae"))


def other_tokenizer(folder: Path) -> None:
    words = json.loads((folder / "tokenizer_2" / "tokenizer.json").read_text())
    words["model"]["vocab"] += [[f"more{i}", -5.0] for i in range(40)]
    (folder / "tokenizer_2" / "tokenizer.json").write_text(json.dumps(words))


def no_vocabulary(folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.json"):
        (folder / "tokenizer" / name).unlink()


def index_entry(name: str, value) -> None:
    return lambda folder: edit(folder / "model_index.json", **{name: value})


def config_entry(component: str, **changes):
    return lambda folder: edit(folder / component / "config.json", **changes)


QUANTISED = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
BROKEN = {
    "truncated": (cut, r"vae: .*diffusion_pytorch_model\.safetensors is truncated or damaged"),
    "truncated pickle": (cut_pickle, r"text_encoder: .*pytorch_model\.bin is truncated or damaged"),
    "lfs": (lfs_pointer, r"transformer: .* is a git-lfs pointer"),
    "shard missing": (
        lambda f: shard(f, "transformer")[1].unlink(),
        r"transformer: .*names .*-00002-of-00003\.safetensors, which",
    ),
    "tensor in two shards": (shard_twice, r"transformer: \S+ is in .*-00002-of-00003\.safetensors and in another file too"),
    "not in the index": (
        lambda f: reindexed(f, drop="decoder.conv_out.bias"),
        r"vae: .*safetensors holds, unknown to its index, decoder\.conv_out\.bias",
    ),
    "not in the shard": (
        lambda f: reindexed(f, add="decoder.ghost"),
        r"vae: .*-00001-of-00002\.safetensors lacks decoder\.ghost",
    ),
    "shard of others": (stray_shard, r"text_encoder_2: model-00001-of-00004\.safetensors is not in model\.safetensors\.index"),
    "two sets": (both_layouts, r"vae: .*two sets of weights"),
    "no weights": (lambda f: weights(f, "vae").unlink(), r"vae: .* holds no diffusion_pytorch_model\.safetensors"),
    "only a variant": (lambda f: as_variant(f, "text_encoder"), r"text_encoder: .*variant fp16; set model\.variant = fp16"),
    "no folder": (lambda f: shutil.rmtree(f / "text_encoder_2"), r"text_encoder_2: there is no folder"),
    "no encoder": (index_entry("text_encoder_2", [None, None]), r"was saved without its text_encoder_2"),
    "other encoder": (index_entry("text_encoder_2", ["transformers", "UMT5EncoderModel"]), r"its text_encoder_2 is a UMT5Enc"),
    "other model type": (config_entry("text_encoder_2", model_type="umt5"), r"text_encoder_2: its config\.json is of a umt5"),
    "other class": (config_entry("transformer", _class_name="SD3Transformer2DModel"), r"transformer: .* of a SD3Transformer2D"),
    "nf4 config": (
        config_entry("transformer", quantization_config=QUANTISED),
        r"transformer: its weights are quantised: quant",
    ),
    "broken config": (lambda f: (f / "vae" / "config.json").write_text("[" * 5000), r"vae: .*config\.json cannot be read"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), r"scheduler: lacks"),
    "schnell's weights": (
        config_entry("transformer", guidance_embeds=False),
        r"transformer: holds time_text_embed\.guidance_emb",
    ),
    "more tokens": (other_tokenizer, r"tokenizer_2: has \d+ tokens, text_encoder_2 only 54"),
    "other end": (config_entry("text_encoder", eos_token_id=5), r"tokenizer: ends a text with token 130, text_encoder with 5"),
    "no vocabulary": (no_vocabulary, r"tokenizer: .* holds neither tokenizer\.json nor merges\.txt and vocab\.json"),
    "broken tokenizer": (lambda f: (f / "tokenizer_2" / "tokenizer.json").write_text("{"), r"tokenizer_2: cannot be loaded"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_dry_run_refuses_folders_that_mean_something_else(case: str, folder, capsys) -> None:
    damage, words = BROKEN[case]
    damage(folder)
    code, message = dry_run(folder, capsys)
    assert code == 2 and re.search(words, message) and "Traceback" not in message, message


def upstream(folder: Path) -> None:
    """The names and files of the published pipelines: sharded transformer and T5, CLIP of an older library, a whole T5."""

    def older_clip(tensors) -> None:
        for name in list(tensors):
            tensors[f"text_model.{name}"] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = torch.arange(12)[None]

    def whole_t5(tensors) -> None:
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
        tensors["decoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
        tensors["decoder.block.0.layer.0.SelfAttention.q.weight"] = torch.zeros(64, 64)
        tensors["lm_head.weight"] = torch.zeros(54, 64)

    rewrite(folder, "text_encoder", older_clip)
    rewrite(folder, "text_encoder_2", whole_t5)
    shard(folder, "text_encoder_2", 2)
    shard(folder, "transformer", 3)


def pickles(folder: Path) -> None:
    for component in KINDS:
        pickled(folder, component)


def variants(folder: Path) -> None:
    as_variant(folder, "transformer")
    as_variant(folder, "text_encoder")
    for component in ("vae", "text_encoder_2"):
        file = shard(folder, component, 2)[0]
        index = file.with_name(f"{KINDS[component]}.safetensors.index.json")
        if component == "vae":
            index.rename(file.with_name(f"{KINDS[component]}.safetensors.index.fp16.json"))


@pytest.mark.parametrize("layout", [upstream, pickles, variants])
def test_published_layouts_load_every_tensor(layout, folder, capsys) -> None:
    plain = build_model(load_recipe("tiny").model)
    layout(folder)
    variant = "fp16" if layout is variants else ""
    code, message = dry_run(folder, capsys, *(["--model.variant", variant] if variant else []))
    assert code == 0, message
    model = build_model(config_with(folder, variant=variant))
    for part in KINDS:
        expected, found = (m.pipeline.components[part].state_dict() for m in (plain, model))
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], t) for name, t in expected.items())


def test_paths_that_are_no_folder_of_a_pipeline_get_one_message(folder, capsys) -> None:
    code, message = dry_run(weights(folder, "transformer"), capsys)
    assert code == 2 and "a single file; name a diffusers pipeline folder" in message
    code, message = dry_run(folder / "transformer", capsys)
    assert code == 2 and "one of its components?" in message
    code, message = dry_run(folder, capsys, "--model.revision", "main")
    assert code == 2 and "only Hub ids have revisions" in message
    code, message = dry_run(folder, capsys, "--model.variant", "fp16")
    assert code == 2 and "model.variant = fp16: no component" in message
    code, message = dry_run(Path("tiny-flux"), capsys, "--model.variant", "fp16")
    assert code == 2 and "model.variant" in message


def test_what_the_hub_gives_is_checked_like_a_folder(folder, monkeypatch, capsys) -> None:
    from diffusers import FluxPipeline

    asked = []

    def download(name: str, **options) -> str:
        asked.append((name, options))
        if options["revision"] == "gone":
            raise OSError("gone is not a valid git identifier")
        return str(folder)

    monkeypatch.setattr(FluxPipeline, "download", download)
    model = build_model(config_with(Path("owner/name"), variant="", revision="abc"))
    assert asked == [("owner/name", {"variant": None, "revision": "abc"})] and model.pipeline is not None
    rewrite(folder, "vae", pop("decoder.conv_out.bias"))
    with pytest.raises(InputError, match=r"model\.path = owner/name: vae: lacks decoder\.conv_out\.bias"):
        build_model(config_with(Path("owner/name")))
    with pytest.raises(InputError, match="no FLUX pipeline of revision gone in variant fp16 can be had: gone is not"):
        build_model(config_with(Path("owner/name"), variant="fp16", revision="gone"))
    capsys.readouterr()
    assert main(["train", "tiny", "--model.path", "owner/name", "--dry-run"]) == 0
    assert "note: model.path = owner/name: its files are checked once they are downloaded" in capsys.readouterr().out
