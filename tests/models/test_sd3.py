"""The SD3 adapter against the stock diffusers pipeline, with and without guidance, negative prompt and T5."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from small_sd3 import HEIGHT, PROMPTS, STEPS, T5_TOKENS, WIDTH, loaded, recipe, saved, settings
from torch.utils.flop_counter import FlopCounterMode

from adagrpo.algorithm.sde import Stream, sigma_schedule
from adagrpo.algorithm.tables import rollout_table
from adagrpo.build import build_trainer
from adagrpo.cli import main
from adagrpo.engine.executor import RolloutExecutor
from adagrpo.engine.plans import probe_plan
from adagrpo.errors import InputError
from adagrpo.estimate.rehearsal import rehearse
from adagrpo.evaluate.held_out import sample_images
from adagrpo.forecast import planned_evaluations, planned_memory
from adagrpo.forward.forwards import CopyForward, PolicyForward
from adagrpo.models.making import meta_policy
from adagrpo.models.policy import Policy, Settings
from adagrpo.models.registry import SD3
from adagrpo.models.sd3 import Sd3Model
from adagrpo.recipe.derived import Derived
from adagrpo.recipe.load import load_recipe, to_toml
from adagrpo.recipe.rules import check
from adagrpo.run.fit import Fit
from adagrpo.run.folder import RunFolder
from adagrpo.study.seeds import train_arm
from adagrpo.train import Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("sd3") / "pipeline")


@pytest.fixture(scope="module")
def without_t5(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("sd3") / "without-t5", t5=False)


@pytest.fixture
def rows_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of every call of an SD3 transformer."""
    from diffusers import SD3Transformer2DModel

    seen: list[int] = []
    forward = SD3Transformer2DModel.forward

    def counted(self, *args, **kwargs):
        seen.append(kwargs["hidden_states"].shape[0])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", counted)
    yield seen


def stock(path: Path, t5: bool):
    from diffusers import StableDiffusion3Pipeline

    absent = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(path, torch_dtype=torch.float32, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def by_stock(pipeline, latents: torch.Tensor, **arguments) -> torch.Tensor:
    """Final latents [N, C, h, w] of the stock pipeline from ours."""
    common = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "max_sequence_length": T5_TOKENS}
    return pipeline(PROMPTS, latents=latents, output_type="latent", **common, **arguments).images


def sampled(model: Policy, sigmas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Initial and final latents [N, L, C] of our deterministic sampler at these noise levels."""
    executor = RolloutExecutor(model, rollout_table(sigmas.double(), "flow", 0.7), 0, torch.float32)
    plan = probe_plan(range(len(PROMPTS)), executor.num_steps)
    start = executor.initial_noise(plan.noise_row, 0, Stream.SAMPLE)
    return start, executor.run(plan, start, model.encode(PROMPTS), 0, "test").final


CASES = {"plain": (1.0, ""), "guided": (4.5, ""), "led away": (4.5, PROMPTS[1])}


@pytest.mark.parametrize("t5", [True, False], ids=["t5", "without"])
def test_sampling_is_the_stock_pipelines_to_float_rounding(t5: bool, folder: Path, without_t5: Path) -> None:
    path = folder if t5 else without_t5
    pipeline, finals = stock(path, t5), {}
    for case, (guidance, negative) in CASES.items():
        model = loaded(path, guidance, negative)
        start, final = sampled(model, model.schedule(STEPS, HEIGHT, WIDTH))
        theirs = by_stock(pipeline, model.spatial(start), guidance_scale=guidance, negative_prompt=negative or None)
        finals[case] = model.spatial(final)
        assert float((finals[case] - theirs).norm() / theirs.norm()) < 1e-5
        pictures = model.decode(final)
        assert pictures.is_contiguous(), "a reward may view them flat"
        ours = (pictures * 255).round().permute(0, 2, 3, 1)
        decoded = pipeline.vae.decode(theirs / 1.5 + 0.06).sample
        images = pipeline.image_processor.postprocess(decoded.detach(), output_type="np") * 255
        assert abs(ours.numpy() - images.round()).max() <= 1
    assert float(pipeline.scheduler.sigmas[-2]) < 1 / STEPS / 4  # the levels are no time shift of ours
    for one, other in (("plain", "guided"), ("guided", "led away")):
        assert float((finals[one] - finals[other]).norm() / finals[one].norm()) > 1e-3


def test_a_call_is_of_two_rows_an_image_only_where_guidance_acts(folder: Path, rows_seen: list[int]) -> None:
    for guidance, rows in ((0.0, 1), (1.0, 1), (4.5, 2)):
        model = loaded(folder, guidance)
        rows_seen.clear()
        x, text = torch.zeros(2, *model.latent_shape), model.encode(PROMPTS)
        assert model.velocity(x, torch.tensor([0.9, 0.5]), text).shape == x.shape
        assert rows_seen == [2 * rows] and model.rows_per_image == rows


def test_the_negative_prompt_follows_device_and_precision(folder: Path) -> None:
    model = loaded(folder)
    model.transformer.to(torch.float64)
    x = torch.zeros(1, *model.latent_shape)
    assert model.velocity(x, torch.tensor([0.9]), model.encode(PROMPTS[:1])).dtype is torch.float64
    rehearsal = rehearse(model, PROMPTS[0])
    assert not isinstance(rehearsal, str), rehearsal
    assert rehearsal.rows_per_image == 2 and rehearsal.model._negative_embeds.is_meta


PLANS = {
    "forks": {},
    "trajectories": {"rollout": {"plan": "trajectory"}, "loss": {"old_logp": "recompute"}},
    "window": {"rollout": {"plan": "window", "window_size": 2}, "loss": {"old_logp": "recompute"}},
}


@pytest.mark.parametrize(
    ("plan", "guidance", "tuning"),
    [("forks", 4.5, "full"), ("forks", 1.0, "lora"), ("trajectories", 4.5, "lora"), ("window", 4.5, "full")],
)
def test_trains_on_policy_and_counts_images(
    plan: str, guidance: float, tuning: str, folder: Path, rows_seen: list[int]
) -> None:
    config = recipe(folder, model={"guidance": guidance, "tuning": tuning}, **PLANS[plan])
    trainer, _ = build_trainer(config)
    before = [p.detach().clone() for _, p in trainer.model.trainable()]
    for _ in range(2):
        rows_seen.clear()
        trainer.executor.reset_counts()
        assert float(trainer.iteration()["policy/ratio_deviation"]) <= 1e-6
        counts = {phase: count.evaluations for phase, count in trainer.executor.counts.items()}
        assert counts == planned_evaluations(config)
        assert sum(rows_seen) == sum(counts.values()) * trainer.model.rows_per_image
    assert any(not torch.equal(a, p) for a, (_, p) in zip(before, trainer.model.trainable(), strict=True))


def as_printed(text: str, latents: torch.Tensor) -> np.ndarray:
    """Pictures of the printed program, its prompt and noise apart."""
    text = text.replace("'a lighthouse in a storm', ", "PROMPTS, latents=LATENTS, ").replace(".images[0]", ".images")
    scope = {"PROMPTS": PROMPTS, "LATENTS": latents}
    exec(text, scope)
    return np.stack([np.asarray(image) for image in scope["image"]]).astype(int)


@pytest.mark.parametrize("case", ["full", "full at its own levels", "lora", "lora without T5"])
def test_stock_diffusers_draws_our_pictures_by_the_exported_program(case: str, folder, without_t5, tmp_path) -> None:
    model = {"tuning": case[:4], "negative_prompt": PROMPTS[1], "guidance": 3.25}
    shift = "model" if case.endswith("levels") else 1.7
    path = without_t5 if case.endswith("T5") else folder
    config = recipe(path, model=model, optimizer={"lr": 3e-2}, rollout={"shift": shift})
    trainer, _ = build_trainer(config)
    untrained = pictures(trainer)
    trainer.iteration()
    trainer.model.save_portable(tmp_path / "saved")
    printed = trainer.model.export(tmp_path / "out", config.rollout.shift, STEPS)
    ours = pictures(trainer)
    assert abs(ours - untrained).max() > 8
    rows = torch.arange(len(PROMPTS))
    latents = trainer.model.spatial(trainer.executor.initial_noise(rows, 0, Stream.SAMPLE))
    assert abs(ours - as_printed(printed, latents)).max() <= 1
    again, _ = build_trainer(config)
    again.model.load_portable(tmp_path / "saved")
    assert abs(pictures(again) - ours).max() <= 1


def pictures(trainer: Trainer) -> np.ndarray:
    images = sample_images(trainer.executor, PROMPTS, 1, Stream.SAMPLE)
    return (images * 255).round().permute(0, 2, 3, 1).numpy().astype(int)


def test_evaluation_has_a_guidance_of_its_own(folder: Path, tmp_path: Path, rows_seen: list[int]) -> None:
    """Trained without guidance, looked at with it."""
    evaluation = {"guidance": 4.5, "prompts": 2, "final_prompts": 2, "final_noises": 1}
    config = recipe(folder, model={"guidance": 1.0}, evaluation=evaluation, output={"grid_every": 1, "grid_prompts": 1})
    trainer, held_out = build_trainer(config)
    model = trainer.model
    assert isinstance(model, Sd3Model)
    run = RunFolder.fresh(tmp_path / "run")
    run.write_start(config, model.device, {})
    measured = Fit(config, trainer, run, held_out, say=lambda line: None).held_out
    measured.curve()
    assert rows_seen == [4] * STEPS and model.rows_per_image == 1
    rows_seen.clear()
    trainer.iteration()
    assert sum(rows_seen) == sum(planned_evaluations(config).values())
    plan = planned_memory(config, model, rehearse(model, PROMPTS[0]))
    found = {entry.phase: entry for entry in plan.entries if entry.name == "activations"}
    assert "2 images of 2 rows" in found["evaluation"].why and "rows, run" in found["rollout"].why
    unguided = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, guidance=1.0))
    same = planned_memory(unguided, model, rehearse(model, PROMPTS[0]))
    once = next(entry.bytes for entry in same.entries if entry.phase == "evaluation")
    assert found["evaluation"].bytes > 1.5 * once


def test_a_study_of_seeds_judges_as_a_run_does(folder: Path, rows_seen: list[int]) -> None:
    evaluation = {"guidance": 4.5, "final_prompts": 2, "final_noises": 1}
    train_arm(recipe(folder, model={"guidance": 1.0}, evaluation=evaluation, train={"iterations": 1, "slots": 2}))
    assert rows_seen[:STEPS] == rows_seen[-STEPS:] == [4] * STEPS


def test_blocks_are_compiled_and_take_fp8(folder: Path) -> None:
    model = loaded(folder)
    table = rollout_table(sigma_schedule(STEPS, 3.0), "flow", 0.7).to(model.device, torch.float32)
    graphs = []
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    at, slot = torch.tensor([0, 2]), torch.tensor([0, 1])

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph

    def velocity(forward) -> torch.Tensor:
        with torch.no_grad():
            return forward.velocity(x, at, forward.prepare(model.encode(PROMPTS)), slot)

    plain = velocity(PolicyForward(model, table))
    torch._dynamo.reset()
    compiled = CopyForward(model, table, torch.float32, compiled=True, compiler=compiler)
    for _ in range(2):
        torch.testing.assert_close(velocity(compiled), plain, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2  # the blocks differ, in their second attention and in what they give back
    fp8 = CopyForward(model, table, torch.float32, "rowwise")
    assert len(fp8.copy.projections) == (8 + 4 + 2 + 2) + (
        7 + 2
    )  # attentions and feed-forwards; the last text stream ends early
    assert 0 < float((velocity(fp8) - plain).norm() / plain.norm()) < 0.2


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"engine": {"forward": "fused"}}, r"engine\.forward = fused: SD3 models have auto, eager, compile"),
        ({"engine": {"attention": "flash"}}, r"engine\.attention = flash: .* SD3 models"),
        ({"model": {"guidance": 0.5}}, r"model\.guidance = 0\.5: must be above 1, or 1 for no guidance"),
        ({"evaluation": {"guidance": 0.5}}, r"evaluation\.guidance = 0\.5: must be above 1"),
        ({"model": {"path": "tiny-flux"}}, r"model\.path = tiny-flux: is no SD3 model"),
        ({"model": {"path": "random:flux1-dev"}}, r"model\.path = random:flux1-dev: is no SD3 model"),
        ({"model": {"path": "black-forest-labs/FLUX.1-dev"}}, r"FLUX\.1-dev: is no SD3 model: set model\.family = flux"),
        ({"model": {"guidance": 1.0, "negative_prompt": "x"}}, r"negative_prompt = x: .*needs model\.guidance or evaluation"),
        ({"model": {"family": "flux", "path": "tiny-flux", "negative_prompt": "x"}}, r"negative_prompt = x:.*family = sd3"),
        ({"model": {"family": "flux", "path": "tiny-flux"}, "evaluation": {"guidance": 2.0}}, r"evaluation\.guidance = 2.*sd3"),
    ],
)  # fmt: skip
def test_what_does_not_apply_is_refused_by_name(sections: dict, words: str, folder: Path) -> None:
    with pytest.raises(InputError, match=words):
        check(recipe(folder, **sections))


def test_what_the_model_cannot_be_is_refused(folder: Path, without_t5: Path, tmp_path: Path) -> None:
    model = loaded(without_t5)
    assert set(model.components) == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    with pytest.raises(InputError, match="multiples of 8"):
        model.resize(HEIGHT, WIDTH + 4)
    with pytest.raises(InputError, match="has positions for 96 pixels"):
        model.resize(HEIGHT, 104)
    assert model.grid == (HEIGHT // 8, WIDTH // 8)
    with pytest.raises(InputError, match=r"a StableDiffusion3Pipeline; model\.family = flux needs a FluxPipeline"):
        build_trainer(recipe(folder, model={"family": "flux"}))


@pytest.mark.parametrize("command", [["plan"], ["train", "--dry-run"]], ids=str)
def test_sizes_that_it_cannot_be_are_refused_without_its_weights(command: list[str], folder: Path, tmp_path, capsys) -> None:
    file = tmp_path / "recipe.toml"
    for model, words in (({"buckets": ("32x36",)}, "model.buckets: "), ({"width": 104}, "has positions for 96 pixels")):
        file.write_text(to_toml(recipe(folder, model=model)))
        assert main([command[0], str(file), *command[1:]]) == 2
        assert words in capsys.readouterr().err


def test_the_default_guidance_is_the_familys(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    for words, guidance in (("", 4.5), ("guidance = 7.0", 7.0), ("guidance = 3.5", 3.5)):
        file.write_text(f"[model]\nfamily = 'sd3'\npath = '{folder}'\n{words}\n")
        config = load_recipe(file)
        assert config.model.guidance == guidance
        file.write_text(to_toml(config))
        assert load_recipe(file) == config
    file.write_text("[model]\nfamily = 'flux'\n")
    assert load_recipe(file).model.guidance == 3.5
    file.write_text(f"base = 'flux1-dev-lora'\n[model]\nfamily = 'sd3'\npath = '{folder}'\n")
    assert load_recipe(file).model.guidance == 4.5, "FLUX.1-dev's 3.5 is a distilled one"


def test_an_absent_encoder_may_be_null_itself(without_t5: Path, tmp_path: Path) -> None:
    for part in without_t5.iterdir():
        (tmp_path / part.name).symlink_to(part)
    index = json.loads((without_t5 / "model_index.json").read_text())
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"text_encoder_3": None, "tokenizer_3": None}))
    assert "text_encoder_3" not in loaded(tmp_path).components


def test_a_plan_of_the_folder_needs_no_weights(folder: Path, without_t5: Path) -> None:
    for path in (folder, without_t5):
        real, planned = loaded(path), meta_policy(SD3, str(path), dataclasses.replace(settings(), device=torch.device("meta")))
        text = planned.encode(PROMPTS).tensors
        assert {name: t.shape for name, t in real.encode(PROMPTS).tensors.items()} == {n: t.shape for n, t in text.items()}
        sizes = [
            {name: sum(p.numel() for p in part.parameters()) for name, part in model.components.items()}
            for model in (real, planned)
        ]
        assert sizes[0] == sizes[1]


def test_the_published_medium_model_is_known_without_files() -> None:
    config = load_recipe("sd35-medium-lora")
    check(config)
    assert config.model.path in SD3.architectures and Derived(config).rows_per_image == 2
    flops = {}
    for guidance in (1.0, 4.5):
        given = Settings(torch.bfloat16, torch.device("meta"), 512, 512, 256, guidance)
        model = meta_policy(SD3, config.model.path, given)
        rehearsal = rehearse(model, PROMPTS[0])
        assert not isinstance(rehearsal, str), rehearsal
        with FlopCounterMode(display=False) as counter:
            rehearsal.forward(1)
        flops[guidance] = counter.get_total_flops()
    assert sum(p.numel() for p in model.transformer.parameters()) == 2_243_171_520
    assert flops[4.5] == 2 * flops[1.0]
