"""The roofline against arithmetic on layers small enough to count by hand."""

import pytest
import torch
from torch import nn

from adagrpo.build import build_architecture
from adagrpo.estimate.rehearsal import Rehearsal
from adagrpo.estimate.roofline import H100, H200, TIERS, Device, Figure, Work, predict, work
from adagrpo.forecast import iteration_prediction, planned_calls
from adagrpo.recipe.load import load_recipe

ROUND = Device("round numbers", *(Figure(value, "est", "a test") for value in (1, 2, 4, 1)))


class Blocks(nn.Module):
    """5 tokens of 8 features per image: an embedder, two blocks with modulation, an output layer."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.embedder = nn.Linear(3, 8, bias=False)
            self.blocks = nn.ModuleList(
                nn.ModuleDict({"modulation": nn.Linear(8, 16), "mlp": nn.Linear(8, 32), "lora_A": nn.Linear(8, 2)})
                for _ in range(2)
            )
            self.out = nn.Linear(32, 3)

    def forward(self, rows: int) -> None:
        tokens, image = torch.empty(rows, 5, 3, device="meta"), torch.empty(rows, 8, device="meta")
        hidden = self.embedder(tokens)
        for block in self.blocks:
            block["modulation"](image)
            block["lora_A"](hidden)
            wide = block["mlp"](hidden)
        self.out(wide)


def test_flops_are_two_m_n_k() -> None:
    net = Blocks()
    found = work(net, net)
    mlp = 2 * (2 * 5 * 8 * 32)
    others = 2 * 5 * 3 * 8 + 2 * (2 * 1 * 8 * 16 + 2 * 5 * 8 * 2) + 2 * 5 * 32 * 3
    assert found.flops == mlp + others
    assert found.fp8_flops == mlp  # neither embedder, modulation, adapter nor output


def test_bytes_are_weights_once_and_operands_per_row() -> None:
    layer = nn.Linear(64, 32, device="meta")
    found = work(lambda rows: torch.relu(layer(torch.empty(rows * 2, 64, device="meta"))))
    assert found.fixed_bytes == 4 * (64 * 32 + 32) and found.row_bytes == 2 * 4 * (64 + 32)
    assert found.small_fixed_bytes == 0 and found.small_row_bytes == 2 * 4 * (32 + 32)


def test_a_call_takes_the_longer_of_computing_and_moving() -> None:
    done = Work(flops=4e12, fp8_flops=3e12, fixed_bytes=6e12, row_bytes=1e12, small_fixed_bytes=0, small_row_bytes=2e12)
    assert done.products(1, 2, 2, 1) == 7  # 6 + 1 TB moved; computed in 2 s
    assert done.products(12, 2, 2, 1) == 24  # 18 TB moved; computed in 24 s
    assert done.products(12, 2, 4, 1) == 18  # FP8 computes it in 15 s
    assert done.small(3, 2) == 3


@pytest.fixture(scope="module")
def rehearsal() -> Rehearsal:
    return Rehearsal(build_architecture(load_recipe("tiny").model), "a")


def test_an_iteration_is_the_sum_of_its_calls(rehearsal: Rehearsal) -> None:
    calls = {"probe": [8, 8], "rollout": [4], "decode": [3], "update": [2]}
    found = predict(rehearsal, calls, ROUND, optimizer_steps=2)
    done = work(rehearsal.forward, rehearsal.transformer)
    phases = {phase.phase: phase for phase in found.phases}
    assert phases["probe"].calls == 2 and phases["probe"].rows == 16
    assert phases["probe"].petaflop == pytest.approx(16 * done.flops / 1e15)
    assert phases["probe"].seconds["eager bf16"] == 2 * done.products(8, 1, 1, 1)
    assert phases["probe"].seconds["fp8 ceiling"] == 2 * done.products(8, 2, 4, 1)
    assert phases["rollout"].seconds["op by op"] == done.products(4, 2, 2, 1) + done.small(4, 1)
    assert phases["update"].seconds["fp8 ceiling"] == phases["update"].seconds["bf16 ceiling"]
    for tier in TIERS:
        assert found.total(tier) == sum(phase.seconds[tier] for phase in found.phases)


def test_a_backward_pass_costs_twice_the_forward(rehearsal: Rehearsal) -> None:
    forward, update = work(rehearsal.forward, rehearsal.transformer), work(rehearsal.update)
    assert update.flops == pytest.approx(3 * forward.flops, rel=0.05)  # attention's backward pass has five products for two


def test_the_page_says_what_it_is(rehearsal: Rehearsal) -> None:
    config = load_recipe("tiny")
    table = iteration_prediction(config, rehearsal, H100).table()
    assert "predicted, not measured" in table and "[est:" in table and "[pub:" in table and "[calc]" in table
    assert all(phase in table for phase in planned_calls(config))
    assert H200.bandwidth.value > H100.bandwidth.value and H200.bf16 == H100.bf16
