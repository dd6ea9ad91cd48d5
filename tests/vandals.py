"""Parts that do everything a part should not, and honest ones beside them; named by import path in tests."""

import os
import random
import signal
import sys
import threading

import numpy
import torch
from toy import PROMPTS, ToyModel, half_bright, toy_config

from adagrpo.build import assemble, build_model, load_data, load_plugins
from adagrpo.recipe.keys import RewardConfig
from adagrpo.rewards import build_reward
from adagrpo.train import Trainer

CALLS, KEPT = [], []


def vandalise(*tensors):
    CALLS.append(torch.is_grad_enabled())
    for tensor in tensors:
        tensor.copy_(torch.full_like(tensor, 3))
    torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
    torch.rand(3), random.random(), numpy.random.rand()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.autograd.set_detect_anomaly(True)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    KEPT.append(torch.autocast("cpu", torch.bfloat16))
    KEPT[-1].__enter__()
    torch.set_grad_enabled(bool(len(CALLS) % 2))
    KEPT.append(torch.inference_mode())
    KEPT[-1].__enter__()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.chdir("/")


def honest_reward():
    return half_bright


def vandal_reward():
    vandalise()

    def score(images, prompts):
        found = half_bright(images, prompts)
        vandalise(images, prompts.text_index)
        return found

    return score


WEIGHT = torch.nn.Parameter(torch.tensor(1.0))


def learning_reward():
    return lambda images, prompts: half_bright(images, prompts) * WEIGHT


def inferring_reward():
    return torch.inference_mode()(half_bright)


def honest_selection(scores, capability):
    return scores[0].argmax(1)


PICKS = torch.zeros(2, dtype=torch.int64)


def vandal_selection(scores, capability):
    PICKS.copy_(honest_selection(scores, capability))  # the same buffer in every call
    vandalise(scores, capability.mean, capability.var, capability.count)
    return PICKS


def honest_advantage(rewards, capability, weights):
    return (rewards - rewards.mean(-1, keepdim=True))[0]


def vandal_advantage(rewards, capability, weights):
    found = honest_advantage(rewards, capability, weights)
    vandalise(rewards, capability.mean, capability.var, capability.count, weights)
    return found


RELEASED = threading.Event()


def hanging_selection(scores, capability):
    RELEASED.wait()


def hanging_advantage(rewards, capability, weights):
    RELEASED.wait()


def hanging_prompts():
    yield "a"
    RELEASED.wait()


def honest_model(path, dtype, device, height, width):
    return ToyModel(torch.float32)


class Vandal(ToyModel):
    def encode(self, prompts):
        found = super().encode(prompts)
        vandalise()
        return found

    def velocity(self, x, sigma, conditioning):
        found = super().velocity(x, sigma, conditioning)
        vandalise(*[] if found.requires_grad else [x, sigma, *conditioning.tensors.values()])  # no backward without
        return found

    def decode(self, x):
        found = super().decode(x)
        vandalise(x)
        return found


def vandal_model(path, dtype, device, height, width):
    made = Vandal(torch.float32)
    vandalise()
    return made


def held_out():
    return ["a", "b"]


def honest_prompts():
    return PROMPTS


def vandal_prompts():
    def some():
        vandalise()
        yield from PROMPTS

    return some()


def leaving_prompts():
    sys.exit(0)


def leaving_selection(scores, capability):
    sys.exit(0)


def leaving_advantage(rewards, capability, weights):
    raise KeyboardInterrupt


def leaving_model(path, dtype, device, height, width):
    sys.exit(0)


class Leaving(ToyModel):
    def velocity(self, x, sigma, conditioning):
        raise GeneratorExit


def model_that_leaves(path, dtype, device, height, width):
    return Leaving(torch.float32)


def leaving_factory():
    sys.exit(0)


def leaving_reward():
    return lambda images, prompts: sys.exit(0)


def interrupting_reward():
    def score(images, prompts):
        raise KeyboardInterrupt

    return score


def outside_selection(scores, capability):
    return torch.full((scores.shape[1],), scores.shape[2])


def broken_selection(scores, capability):
    return torch.full((scores.shape[1],), 0.5)


def complex_reward():
    return lambda images, prompts: torch.zeros(len(images), dtype=torch.complex64)


def sparse_reward():
    return lambda images, prompts: torch.zeros(len(images)).to_sparse()


TIMEOUTS = "timeout" in RewardConfig.__dataclass_fields__  # not before there were time limits


def trained(
    who: str, reward: str = "honest_reward", iterations: int = 2, timeout: float = 0, **names: str
) -> tuple[list, Trainer]:
    """Metrics' rewards and the weights after a short run whose parts are ``who``'s, but for those named."""
    config = toy_config(
        model={"family": f"vandals:{names.get('model', 'honest_model')}"},
        data={"prompts": f"vandals:{names.get('prompts', 'honest_prompts')}", "held_out": "vandals:held_out"},
        selection={"strategy": f"vandals:{names.get('selection', 'honest_selection')}", "candidates": 3},
        advantage={"function": f"vandals:{names.get('advantage', 'honest_advantage')}"},
        train={"slots": 2} | ({"part_timeout": timeout} if TIMEOUTS else {}),
        rewards=(RewardConfig("tiny", **({"timeout": timeout} if TIMEOUTS else {})),),
    )
    rewards = [build_reward(f"vandals:{reward}", {}, "rewards.0")]
    trainer = assemble(config, build_model(config.model), rewards, load_data(config)[0], load_plugins(config))
    seen = []
    for _ in range(iterations):
        metrics = trainer.iteration()
        seen.append([float(metrics["reward/train"]), *metrics["selection/picked"]])
    return seen, trainer


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach() for _, p in trainer.model.trainable()]
