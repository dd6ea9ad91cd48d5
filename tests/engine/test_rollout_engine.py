"""The rollout engine inside whole iterations: on-policy ratio under FP8, capture's contract, chunks, tails, sizes."""

import dataclasses
import itertools
import math
from collections.abc import Hashable

import pytest
import torch
from torch import Tensor
from toy import ToyModel, recorded, toy_config, toy_trainer

from adagrpo.algorithm.sde import sigma_schedule
from adagrpo.algorithm.tables import Granularity, multistep_table, rollout_table
from adagrpo.build import assemble, build_model
from adagrpo.engine.executor import RolloutExecutor
from adagrpo.engine.graphs import StepGraphs
from adagrpo.engine.overlap import Overlap
from adagrpo.engine.plans import branch_plan, probe_plan, trajectory_plan
from adagrpo.engine.sampling import ForkSampler, GroupShape, StepSchedule
from adagrpo.errors import InputError
from adagrpo.estimate.counting import OpCounter
from adagrpo.forecast import planned_evaluations
from adagrpo.models.flux import FLUX1_DEV
from adagrpo.models.making import random_policy
from adagrpo.models.policy import Settings
from adagrpo.models.registry import FLUX
from adagrpo.recipe.keys import Config, EngineConfig, ModelConfig
from adagrpo.recipe.rules import check
from adagrpo.rewards import PromptRows, build_reward
from adagrpo.run.metrics import read_metrics
from adagrpo.train import Trainer

WORDS = [f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("circle", "square", "cross", "ring")]


def engine(**keys) -> EngineConfig:
    return dataclasses.replace(EngineConfig(), **keys)


def tiny_trainer(config: Config) -> Trainer:
    check(config)
    return assemble(config, build_model(config.model), [build_reward("brightness", {})], WORDS)


def small(plan: str = "fork", **sections) -> Config:
    rollout = {"plan": plan, "steps": 6, "sde_steps": (0, 2), "group_size": 3} | sections.pop("rollout", {})
    loss = {"old_logp": "rollout" if plan == "fork" else "recompute"}
    return toy_config(rollout=rollout, loss=loss, train={"iterations": 3, "slots": 1}, **sections)


def iteration(trainer: Trainer) -> dict[str, float]:
    metrics = trainer.iteration()
    return read_metrics(metrics)[0]


@pytest.mark.parametrize("forward", ["eager", "fused"])
@pytest.mark.parametrize("plan", ["fork", "trajectory"])
def test_the_ratio_is_one_under_fp8(plan: str, forward: str) -> None:
    trainer = tiny_trainer(small(plan, engine=engine(forward=forward, precision="fp8")))
    for _ in range(2):
        assert iteration(trainer)["policy/ratio_deviation"] <= 1e-6


def test_steps_that_are_reinforced_run_on_the_policy_under_fp8() -> None:
    """A trajectory's stochastic steps draw from a Gaussian whose mean is the policy's, or the ratio would hide a bias."""
    config = small("trajectory", rollout={"sde_steps": (0, 2, 3)}, engine=engine(forward="fused", precision="fp8"))
    trainer = tiny_trainer(config)
    calls: list[tuple[str, int]] = []
    for name, forward in (("policy", trainer.executor.policy), ("copy", trainer.executor.rollout)):
        velocity = forward.velocity
        forward.velocity = lambda x, *rest, name=name, velocity=velocity: calls.append((name, len(x))) or velocity(x, *rest)
    model, plan = trainer.model, trajectory_plan(1, 3, 6, (0, 2, 3), (0, 2, 3))
    x = trainer.executor.initial_noise(plan.noise_row, 0, 1)
    found = trainer.executor.run(plan, x, model.encode(WORDS[:1]), 0, "rollout").transitions
    assert [name for name, _ in calls] == ["policy", "copy", "policy", "policy", "copy", "copy"]
    fresh = trainer.executor.recompute(found, model.encode(WORDS[:1]), [torch.arange(9)])
    torch.testing.assert_close(fresh.logp, found.logp, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fresh.mean, found.mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("keys", [{"precision": "fp8"}, {"precision": "bf16"}, {"forward": "fused", "precision": "fp8"}])
def test_a_lossy_probe_never_gives_the_forks_velocity(keys: dict) -> None:
    config = small(rollout={"fork_velocity": "probe"}, engine=engine(**keys))
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, old_logp="detached"))
    with pytest.raises(InputError, match=r"rollout.fork_velocity = probe: the probe runs in another precision"):
        check(config)


def runs(config: Config, iterations: int = 3) -> tuple[list[Tensor], list[Tensor], Trainer]:
    trainer = toy_trainer(config)
    picks, rewards = recorded(trainer)
    for _ in range(iterations):
        trainer.iteration()
    return picks, rewards, trainer


@pytest.mark.parametrize("plan", ["fork", "trajectory"])
def test_captured_steps_compute_the_same_and_their_tensors_never_move(plan: str) -> None:
    config = small(plan)
    picks, rewards, _ = runs(config)
    captured_picks, captured_rewards, trainer = runs(dataclasses.replace(config, engine=engine(cuda_graphs=True)))
    assert all(map(torch.equal, picks, captured_picks)) and all(map(torch.equal, rewards, captured_rewards))
    graphs = trainer.executor.graphs
    known = graphs.captured
    rows = {key[2] for key in known if key[1] == "rollout"}
    assert rows == ({3, 6} if plan == "fork" else {3})
    assert [key[0] for key in known].count("prefix") == (plan == "fork")
    trainer.iteration()
    assert graphs.captured == known


def test_a_static_tensor_that_moves_is_an_error() -> None:
    graphs, x = StepGraphs(torch.device("cpu")), torch.zeros(4)
    assert graphs("a", lambda: 1, [x]) == 1 and graphs("a", lambda: 2, [x]) == 2
    for moved in (x.clone(), x[:2], x.reshape(2, 2)):
        with pytest.raises(RuntimeError, match="moved or changed shape"):
            graphs("a", lambda: 3, [moved])
    assert graphs("b", lambda: 4, [x.clone()]) == 4


@pytest.mark.parametrize("plan", ["fork", "trajectory"])
def test_a_captured_fused_fp8_iteration_reads_and_feeds_nothing(plan: str) -> None:
    """On the meta device every read by the host raises; copies to it are counted, and after the first iteration there is none.

    Widths are FLUX.1-dev's, one block of each kind.
    """
    config = small(plan, engine=engine(forward="fused", precision="fp8", cuda_graphs=True))
    config = dataclasses.replace(config, model=ModelConfig(dtype="bf16", device="meta", height=64, width=64))
    blocks = FLUX1_DEV["transformer"] | {"num_layers": 1, "num_single_layers": 1}
    model = random_policy(FLUX, FLUX1_DEV | {"transformer": blocks}, Settings(torch.bfloat16, torch.device("meta"), 64, 64, 8))
    trainer = assemble(config, model, [build_reward("brightness", {})], WORDS)
    trainer.iteration()
    with OpCounter() as second:
        metrics = trainer.iteration()
    assert metrics["policy/ratio_deviation"].device.type == "meta"
    assert not second.transfers and trainer.executor.graphs.captured


def test_chunks_are_scored_one_late_and_in_the_rollouts_order() -> None:
    events = []

    def work(latents: Tensor, rows: Tensor) -> Tensor:
        events.append(("scored", rows.tolist()))
        return torch.stack([rows.double(), 10 * rows.double()])

    overlap = Overlap(work)
    for rows in ([3, 1], [0, 4], [2]):
        events.append(("sampled", rows))
        overlap(torch.zeros(len(rows), 1), torch.tensor(rows))
    assert overlap.result().tolist() == [[0, 1, 2, 3, 4], [0, 10, 20, 30, 40]]
    assert events == [
        ("sampled", [3, 1]), ("sampled", [0, 4]), ("scored", [3, 1]), ("sampled", [2]), ("scored", [0, 4]), ("scored", [2]),
    ]  # fmt: skip


def test_equal_plans_are_one_object_and_reach_the_device_once() -> None:
    assert probe_plan([0, 1], 4) is probe_plan(range(2), 4)
    trainer = toy_trainer(small())
    plan = branch_plan(1, (0, 2), 3, 6)
    first = trainer.executor.lanes.chunks(plan)
    assert trainer.executor.lanes.chunks(branch_plan(1, (0, 2), 3, 6)) is first


# Shortened tails


def test_a_shortened_tail_costs_what_it_says_and_merges_every_branch() -> None:
    official = {"steps": 16, "sde_steps": (0, 2, 4, 6), "group_size": 12, "tail_steps": 8}
    config = toy_config(rollout=official, train={"slots": 1}, selection={"candidates": 10})
    model = ToyModel()
    trainer = toy_trainer(config, model)
    assert trainer.iteration()["policy/ratio_deviation"] <= 1e-6
    counts = {phase: (count.evaluations, count.calls) for phase, count in trainer.executor.counts.items()}
    assert counts == {"probe": (160, 16), "prefix": (4, 1), "rollout": (8 * 48, 8), "update": (4, 1)}
    assert planned_evaluations(config) == {phase: evaluations for phase, (evaluations, _) in counts.items()}


def test_tails_end_together_and_touch_only_noise_levels_of_the_grid() -> None:
    table = rollout_table(sigma_schedule(16, 3.0), "flow", 0.7, (0, 6), tail_steps=10)
    assert {k: len(rows) for k, (rows,) in table.tails.items()} == {0: 10, 6: 9}
    for k, (rows,) in table.tails.items():
        steps = table.steps.rows(torch.tensor(rows))
        assert steps.sigma[0] == table.sigmas[k + 1] and steps.sigma_next[-1] == 0
        assert torch.equal(steps.sigma[1:], steps.sigma_next[:-1])
        assert torch.equal(steps.sigma, table.sigmas[table.position[list(rows)]])
    plan = branch_plan(1, (0, 6), 2, 16, tails=table.tails)
    assert plan.start.tolist() == [0, 0, 1, 1] and plan.evaluations() == 2 * 19


def test_the_tails_solver_is_diffusers_dpm_solver() -> None:
    from diffusers import DPMSolverMultistepScheduler

    sigmas = sigma_schedule(9, 3.0)[2:]
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, algorithm_type="dpmsolver++",
        lower_order_final=True, final_sigmas_type="zero",
    )  # fmt: skip
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas, scheduler.timesteps = sigmas, (sigmas[:-1] * 1000)
    table, weight = multistep_table(sigmas, 2)
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(1, 4, 3, generator=generator, dtype=torch.float64)
    theirs, clean = x.clone(), torch.zeros_like(x)
    for i in range(len(table)):
        v = torch.sin(3 * x + i)
        theirs = scheduler.step(torch.sin(3 * theirs + i), scheduler.timesteps[i], theirs, return_dict=False)[0]
        x, clean = table.a[i] * x + table.b[i] * v + weight[i] * clean, x - table.sigma[i] * v
        torch.testing.assert_close(x, theirs, rtol=1e-6, atol=1e-6)


def test_every_tail_of_every_seed_is_that_of_its_sample() -> None:
    """2 slots x 2 anchors x 2 forks x 2 tails x 3 members: each final latent by a plain Euler loop from its sample, under its
    slot's prompt; anchors start from noises of their own; advantages count samples, not images."""
    model, sigmas = ToyModel(torch.float64), sigma_schedule(6, 3.0)
    grains = (Granularity(1), Granularity(2))
    table = rollout_table(sigmas, "flow", 0.7, (0, 2), granularities=grains)
    executor, text = RolloutExecutor(model, table, 0, torch.float64), model.encode(["a", "b"])
    anchor = probe_plan((0, 1), 6, keep=(0, 2))
    anchors = executor.run(anchor, executor.initial_noise(anchor.noise_row, 0, 1), text, 0, "probe")
    sampler = ForkSampler(StepSchedule(6, (0, 2), None, 2, 0), GroupShape(3), seeds=2, tails=2)
    samples = sampler(executor, anchors, torch.arange(2), text, iteration=0, draw=0)
    t = samples.transitions
    assert t.slot.tolist() == [0] * 4 + [1] * 4 and samples.groups == 8
    assert torch.equal(t.latent[::4], anchors.latents[0]) and len(torch.unique(t.latent[::2, 0, 0])) == 4
    assert t.sample.flatten().tolist() == list(range(24))
    scores = samples.by_group(torch.arange(48).unsqueeze(0))
    assert scores.shape == (2, 8, 3)
    for n, (k, slot) in enumerate(zip((t.index - 6).tolist(), t.slot.tolist(), strict=True)):
        for tail, grain in enumerate(grains):
            points = grain.points(k, 6)
            x, of_slot = t.successors[n], text.rows(torch.full((3,), slot))
            for here, there in itertools.pairwise(sigmas[points].tolist()):
                with torch.no_grad():
                    x = x + (there - here) * model.velocity(x, torch.full((3,), here, dtype=torch.float64), of_slot)
            torch.testing.assert_close(samples.final[scores[tail, n]], x, rtol=1e-9, atol=1e-9)


def test_a_trajectorys_tail_is_second_order_from_its_first_step_on() -> None:
    """Behind the window latents are those of a plain loop whose past is the last stochastic step's clean image."""
    model, sigmas = ToyModel(torch.float64), sigma_schedule(8, 3.0)
    table = rollout_table(sigmas, "flow", 0.7, (2,), tail_steps=3, tail_past=True)
    executor, text = RolloutExecutor(model, table, 0, torch.float64), model.encode(["a"])
    plan = trajectory_plan(1, 2, 8, (1, 2), (1, 2), tail=table.tails[2][0])
    rollout = executor.run(plan, executor.initial_noise(plan.noise_row, 0, 1), text, 0, "rollout")
    stored = rollout.transitions
    last = stored.index == 8 + 2
    both = text.rows(torch.zeros(2, dtype=torch.int64))

    def velocity(x: Tensor, s: float) -> Tensor:
        return model.velocity(x, torch.full((2,), s, dtype=torch.float64), both)

    levels = [float(sigmas[k]) for k in (2, 3, 5, 6, 8)]  # the tail's noise levels, and the one before
    with torch.no_grad():
        before = stored.latent[last]
        clean, x = before - levels[0] * velocity(before, levels[0]), stored.successors[last, 0]
        level = [math.log((1 - s) / s) if s else math.inf for s in levels]
        for i in range(1, 4):
            s, after, past = levels[i], levels[i + 1], clean
            clean = x - s * velocity(x, s)
            h, h_past = level[i + 1] - level[i], level[i] - level[i - 1]
            data = clean if after == 0 else clean + h / (2 * h_past) * (clean - past)  # D of Lu et al. 2022, algorithm 2
            x = after / s * x + (1 - after - (1 - s) * after / s) * data
    torch.testing.assert_close(rollout.final, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("order", "expected"), [(1, 2.0), (2, 4.0)])
def test_the_tails_error_falls_with_the_solvers_order(order: int, expected: float) -> None:
    """A flow whose clean image drifts with the noise level, D = sin(2 sigma): the exact path by quadrature."""

    def solve(steps: int, order: int) -> float:
        sigmas = torch.linspace(0.9, 0.3, steps + 1, dtype=torch.float64)
        table, weight = multistep_table(torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)]), order)
        x, clean = 1.0, 0.0
        for i in range(steps):
            v = (x - float(torch.sin(2 * sigmas[i]))) / float(sigmas[i])
            x, clean = float(table.a[i]) * x + float(table.b[i]) * v + float(weight[i]) * clean, x - float(sigmas[i]) * v
        return x

    exact = solve(200_00, 1) if order == 1 else solve(5_000, 2)
    coarse, fine = abs(solve(40, order) - exact), abs(solve(80, order) - exact)
    assert coarse / fine == pytest.approx(expected, rel=0.15)


# Mixed sizes


def test_an_iteration_takes_one_of_the_recipes_sizes_and_evaluation_its_own() -> None:
    model = ModelConfig(height=32, width=32, buckets=("32x48", "48x32", "32x32"))
    trainer = tiny_trainer(dataclasses.replace(small(engine=engine(forward="fused", cuda_graphs=True)), model=model))
    seen = []
    update = trainer.update
    trainer.update = lambda draw, advantage: seen.append(draw.samples.final.shape[1]) or update(draw, advantage)
    for _ in range(8):
        assert iteration(trainer)["policy/ratio_deviation"] <= 1e-6
    assert set(seen) == {24, 16} and trainer.model.latent_shape == (16, 16)
    assert len(trainer.executor.rollout._rotary) == 3
    again = tiny_trainer(dataclasses.replace(small(), model=model))
    again.update = lambda draw, advantage: (_ for _ in ()).throw(AssertionError(draw.samples.final.shape[1]))
    with pytest.raises(AssertionError, match=str(seen[0])):
        again.iteration()


def test_a_step_captured_for_one_size_is_not_replayed_for_another_of_as_many_latents() -> None:
    """Where a latent lies in the picture is no tensor of the rollout's: a graph of 32 x 48 means 32 x 48."""
    model = ModelConfig(height=32, width=48, buckets=("32x48", "48x32"))
    trainer = tiny_trainer(dataclasses.replace(small(engine=engine(cuda_graphs=True)), model=model))
    sizes: dict[Hashable, set[tuple[int, int]]] = {}
    ask = StepGraphs.__call__

    class Watched(StepGraphs):
        def __call__(self, key, step, statics):
            sizes.setdefault(key, set()).add(trainer.model.grid)
            return ask(self, key, step, statics)

    trainer.executor.graphs.__class__ = Watched
    for _ in range(6):
        trainer.iteration()
    assert {len(each) for each in sizes.values()} == {1}
    assert set.union(*sizes.values()) == {(4, 6), (6, 4)}


@pytest.mark.parametrize("bucket", ["32", "0x32", "32x", "axb", "32x32x3"])
def test_a_size_in_another_form_is_refused(bucket: str) -> None:
    with pytest.raises(InputError, match=r"model.buckets.0 = .*: must be HEIGHTxWIDTH"):
        check(dataclasses.replace(Config(), model=ModelConfig(buckets=(bucket,))))


def test_a_size_the_model_cannot_take_is_refused_before_training() -> None:
    from adagrpo.build import build_trainer
    from adagrpo.recipe.load import load_recipe

    config = load_recipe("tiny")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, buckets=("32x36",)))
    with pytest.raises(InputError, match=r"model.buckets.*multiples of 8"):
        build_trainer(config)


def test_prompts_of_rows_need_no_read() -> None:
    prompts = PromptRows(["a", "b", "c"], torch.tensor([2, 0, 1], device="meta"))
    assert len(prompts.rows(torch.tensor([1, 2], device="meta"))) == 2


def test_a_failed_sample_leaves_nothing_in_the_buffers_of_the_next_iteration() -> None:
    config = small(rollout={"tail_steps": 3}, engine=engine(cuda_graphs=True))
    trainer = toy_trainer(config)
    weight = trainer.model.transformer.out
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    trainer.draw()
    with torch.no_grad():
        weight.copy_(kept)
    assert trainer.draw().rewards.isfinite().all()


def test_running_out_of_memory_drops_the_buffers_of_larger_batches() -> None:
    trainer = toy_trainer(small(engine=engine(cuda_graphs=True)))
    trainer.iteration()
    executor = trainer.executor
    assert len(executor.lanes) and executor.graphs.captured
    executor.halve_rows(torch.OutOfMemoryError())
    assert not len(executor.lanes) and not executor.graphs.captured
    trainer.iteration()


def test_a_capture_that_fails_is_told_and_the_rollout_goes_on() -> None:
    told: list[str] = []
    graphs = StepGraphs(torch.device("cuda"), told.append)  # never touches the device: the capture itself is replaced

    def refuse(key, step):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graphs._capture = refuse  # type: ignore[method-assign]
    x, runs = torch.zeros(2), []
    for i in range(3):
        assert graphs("step", lambda i=i: runs.append(i) or i, [x]) == i
    assert runs == [0, 1, 2] and not graphs.enabled
    assert told == ["CUDA graphs are off: the step step cannot be captured: operation not permitted when stream is capturing"]


def test_a_captured_step_is_replayed_and_its_memory_told() -> None:
    graphs = StepGraphs(torch.device("cuda"))

    class Graph:
        replays = 0

        def replay(self) -> None:
            Graph.replays += 1

    def capture(key, step) -> None:
        graphs._graphs[key] = (Graph(), step())

    graphs._capture = capture  # type: ignore[method-assign]
    x, runs = torch.zeros(2), []
    results = [graphs("step", lambda: runs.append(1) or len(runs), [x]) for _ in range(4)]
    # The first call runs directly, the second is recorded and replayed, later ones are replayed only.
    assert results == [1, 2, 2, 2] and Graph.replays == 3


def test_the_official_schedule_is_captured_by_its_numbers_of_rows() -> None:
    official = {"steps": 16, "sde_steps": (0, 2, 4, 6), "group_size": 12}
    config = toy_config(rollout=official, train={"slots": 1}, selection={"candidates": 10}, engine=engine(cuda_graphs=True))
    trainer = toy_trainer(config)
    for _ in range(2):
        assert iteration(trainer)["policy/ratio_deviation"] <= 1e-6
    rows = [key[2] if key[0] != "prefix" else key[2][0][0][0] for key in trainer.executor.graphs.captured]
    assert sorted(rows) == [4, 10, 12, 24, 36, 48]
    counts = {phase: (count.evaluations, count.calls) for phase, count in trainer.executor.counts.items()}
    assert counts == {"probe": (160, 16), "prefix": (4, 1), "rollout": (576, 15), "update": (4, 1)}
