"""What only a CUDA device can show of rewards: the copy to the host waits for nobody, and offloaded weights leave."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adagrpo.rewards import PromptRows
from adagrpo.rewards.placed import Entry, PlacedReward
from adagrpo.rewards.transfer import HostImages

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: not measured")


def rows(count: int) -> PromptRows:
    return PromptRows(["a", "b"], torch.arange(count, device="cuda") % 2, torch.arange(count, device="cuda") // 2)


def test_images_reach_the_host_in_one_copy_that_the_host_does_not_wait_for() -> None:
    images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)).cuda()
    expected = HostImages(images.cpu(), rows(6).to("cpu")).read()
    HostImages(images, rows(6)).read()  # pinned memory is there from now on
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        torch.cuda._sleep(10**9)
        sent = HostImages(images, rows(6))
        waited = torch.cuda.current_stream().query()
        pixels, prompts, finite = sent.read()
    assert not waited, "the device was done before the host went on"
    assert sum("Memcpy DtoH" in event.name for event in seen.events()) == 1
    assert torch.equal(pixels, expected[0]) and finite.all()
    assert list(prompts) == list(expected[1]) and prompts.group_index.tolist() == [0, 0, 1, 1, 2, 2]


def test_offloaded_weights_leave_the_device_and_come_back_the_same() -> None:
    class Reward:
        def __init__(self) -> None:
            self.layers = [nn.Linear(3 * 8 * 8, 1024), nn.Linear(1024, 1)]

        def __call__(self, images: Tensor, prompts) -> Tensor:
            return self.layers[1](self.layers[0](images.flatten(1)))[:, 0]

    torch.manual_seed(0)
    placed = PlacedReward(Reward(), Entry(offload=True))
    images = torch.rand(4, 3, 8, 8, device="cuda")
    before = torch.cuda.memory_allocated()
    scores = []
    for _ in range(2):
        scores.append(placed(images, rows(4)))
        assert torch.cuda.memory_allocated() >= before + 4 * 192 * 1024
        placed.rest()
        assert placed.reward.layers[0].weight.device.type == "cpu"
        assert torch.cuda.memory_allocated() < before + 4 * 192 * 1024
    assert torch.equal(*scores)
