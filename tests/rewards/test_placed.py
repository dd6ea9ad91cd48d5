"""A reward as an entry of a recipe has it: batches, devices, 8-bit images for the host, threads, what becomes of its scores."""

import functools
import math
import os
import random
import signal
import threading
import time

import pytest
import torch
from torch import Tensor, nn

from adagrpo.errors import RunError
from adagrpo.parts.isolation import Job, Part, PartHung, wait_for
from adagrpo.rewards import PromptRows
from adagrpo.rewards.holdings import Offloaded, placed_on, reachable, weights_of
from adagrpo.rewards.placed import Entry, PlacedReward
from adagrpo.rewards.transfer import HostImages

TEXTS = ["a", "b", "c"]


def rows(*index: int, groups: list[int] | None = None) -> PromptRows:
    return PromptRows(TEXTS, torch.tensor(index), None if groups is None else torch.tensor(groups))


def images_of(*values: float) -> Tensor:
    """An image of one value each, [N, 3, 2, 2]."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).clone()


class OnHost:
    """Grey level plus ten times the prompt's place; keeps what it was called with."""

    host = True

    def __init__(self, threads: int = 1) -> None:
        self.threads, self.seen, self.names = threads, [], []

    def __call__(self, images: Tensor, prompts) -> Tensor:
        self.seen.append((images.clone(), list(prompts)))
        self.names.append(threading.current_thread().name)
        scores = images[:, 0, 0, 0].float() + torch.tensor([10.0 * TEXTS.index(p) for p in prompts])
        images.zero_()
        return scores


def test_scores_are_scaled_and_shifted_and_infinity_is_no_score() -> None:
    told = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    placed = PlacedReward(lambda images, prompts: told, Entry(scale=-2.0, shift=3.0))
    scores = placed(images_of(0, 0, 0, 0), rows(0, 0, 0, 0))
    assert scores.dtype is torch.float64 and scores[0] == 1.0 and scores[1:].isnan().all()


def test_a_call_has_at_most_so_many_images_and_their_prompts() -> None:
    calls = []

    def reward(images, prompts):
        calls.append(list(prompts))
        return images.mean((1, 2, 3))

    scores = PlacedReward(reward, Entry(rows=2))(images_of(0.1, 0.2, 0.3, 0.4, 0.5), rows(0, 1, 2, 1, 0))
    torch.testing.assert_close(scores, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64), rtol=0, atol=1e-7)
    assert calls == [["a", "b"], ["c", "b"], ["a"]]
    assert PlacedReward(reward)(images_of(), rows()).shape == (0,)


def test_images_that_need_not_move_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those on cuda:0 for ``device = "cuda"``, which is another name of it."""
    images = images_of(0.4)
    monkeypatch.setattr(Tensor, "to", lambda tensor, *given, **more: tensor)
    PlacedReward(lambda images, prompts: images.zero_().sum((1, 2, 3)), Entry(device="cpu:0"))(images, rows(0))
    assert images.max() > 0


def test_the_models_device_by_another_name_is_no_other_device() -> None:
    cuda = [("", "cuda:1"), ("cuda", "cuda:1"), ("cuda:1", "cuda:1"), ("cuda", "cuda"), ("cuda:0", "cuda")]
    assert all(placed_on(name, torch.device(home)) == torch.device(home) for name, home in cuda)
    other = [("cuda:1", "cuda"), ("cuda:0", "cuda:1"), ("cpu", "cuda")]
    assert all(placed_on(name, torch.device(home)) == torch.device(name) for name, home in other)


def test_a_host_reward_gets_rounded_8_bit_copies_in_a_thread() -> None:
    reward = OnHost()
    images = images_of(0.0, 0.5 / 255, 1.5 / 255, 0.4, 1.3, -0.2, math.nan)
    kept = images.clone()
    scores = PlacedReward(reward)(images, rows(0, 1, 2, 0, 0, 0, 0))
    # half to even; 102 is 0.4; outside of [0, 1] is clipped; an image that is not finite has no score
    assert scores[:6].tolist() == [0, 10, 22, 102, 255, 0] and scores[6].isnan()
    seen, prompts = reward.seen[0]
    assert seen.dtype is torch.uint8 and seen.device.type == "cpu" and prompts == ["a", "b", "c", "a", "a", "a", "a"]
    assert reward.names == ["adagrpo-part"] and torch.equal(images.nan_to_num(9), kept.nan_to_num(9))


def test_host_images_travel_with_prompts_and_groups() -> None:
    images = images_of(0.0, 0.2, 0.4, 1.0)
    sent = HostImages(images, rows(2, 1, 0, 1, groups=[5, 5, 2**40, 7]))
    pixels, prompts, finite = sent.read(slice(1, 3))
    assert pixels.shape == (2, 3, 2, 2) and pixels[:, 0, 0, 0].tolist() == [51, 102] and finite.tolist() == [True, True]
    assert list(prompts) == ["b", "a"] and prompts.group_index.tolist() == [5, 2**40]
    assert HostImages(images, rows(2, 1, 0, 1)).read()[1].group_index is None


def test_calls_run_at_once_and_are_told_in_order() -> None:
    meeting = threading.Barrier(2, timeout=60)

    class Meets(OnHost):
        def __call__(self, images: Tensor, prompts) -> Tensor:
            meeting.wait()
            return super().__call__(images, prompts)

    placed = PlacedReward(Meets(threads=2), Entry(rows=1))
    scores = placed(images_of(0.0, 0.2, 0.4, 1.0), rows(0, 0, 0, 1))
    assert scores.tolist() == [0, 51, 102, 265] and placed.seconds > 0


def test_what_a_host_reward_does_to_the_process_ends_with_it(tmp_path) -> None:
    class Vandal(OnHost):
        def __call__(self, images: Tensor, prompts) -> Tensor:
            torch.set_default_dtype(torch.float64)
            torch.manual_seed(1)
            random.seed(1)
            os.chdir(tmp_path)
            assert not torch.is_grad_enabled()
            return super().__call__(images, prompts)

    before = torch.get_rng_state(), random.getstate(), os.getcwd(), torch.get_default_dtype()
    PlacedReward(Vandal(threads=3), Entry(rows=1))(images_of(0, 1, 1, 1, 0), rows(0, 0, 0, 0, 0))
    after = torch.get_rng_state(), random.getstate(), os.getcwd(), torch.get_default_dtype()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


@pytest.mark.parametrize("first", [True, False], ids=["ends meanwhile", "begins meanwhile"])
def test_what_a_part_switches_while_a_host_reward_begins_or_ends_is_neither_kept_nor_lost(first: bool) -> None:
    begun, may_begin, may_end = threading.Event(), threading.Event(), threading.Event()

    class Copied(HostImages):
        def read(self, part: slice = slice(None)):
            assert may_begin.wait(60)
            return super().read(part)

    class Waits(OnHost):
        def __call__(self, images: Tensor, prompts) -> Tensor:
            begun.set()
            assert may_end.wait(60)
            return super().__call__(images, prompts)

    def switches(images, prompts):
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(7)
        may_begin.set()
        assert begun.wait(60)
        if first:
            may_end.set()
            ended()
        assert torch.get_default_dtype() is torch.float64
        drawn.append(torch.rand(3))
        return images.mean((1, 2, 3))

    host, drawn, before = PlacedReward(Waits()), [], torch.get_rng_state()
    pending = host.begun(Copied(images_of(0.2), rows(0)))
    ended = pending.calls[0][1]._job.done.wait
    if first:
        may_begin.set()
        assert begun.wait(60)
    PlacedReward(switches)(images_of(0.5), rows(0))
    may_end.set()
    assert host.collected(pending).tolist() == [51]
    assert torch.get_default_dtype() is torch.float32 and torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn[0], torch.rand(3, generator=torch.Generator().manual_seed(7), dtype=torch.float64))


def test_autocast_that_a_call_leaves_on_is_off_in_the_next_of_its_thread() -> None:
    class Switches(OnHost):
        def __call__(self, images: Tensor, prompts) -> Tensor:
            assert not torch.is_autocast_enabled("cpu")
            torch.set_autocast_enabled("cpu", True)
            return super().__call__(images, prompts)

    assert PlacedReward(Switches(), Entry(rows=1))(images_of(0, 1), rows(0, 0)).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda images: 1 / 0, r"rewards\.3 \(odd\) failed: ZeroDivisionError"),
        (lambda images: torch.zeros(1), r"rewards\.3 \(odd\) returned \(1,\); it must return a tensor of shape \(2,\)"),
        (lambda images: [1.0, 2.0], r"rewards\.3 \(odd\) returned list"),
        (lambda images: exit(3), r"rewards\.3 \(odd\) failed: SystemExit: 3"),
    ],
)
def test_an_error_in_a_thread_is_the_rewards(wrong, words: str) -> None:
    class Odd(OnHost):
        def __call__(self, images: Tensor, prompts) -> Tensor:
            return wrong(images)

    with pytest.raises(RunError, match=words):
        PlacedReward(Odd(), Entry("odd", 3))(images_of(0, 1), rows(0, 1))


def test_a_host_reward_that_hangs_is_left_behind_and_what_waits_behind_it_is_not_begun() -> None:
    released, calls = threading.Event(), []

    class Hangs(OnHost):
        def __call__(self, images: Tensor, prompts) -> Tensor:
            calls.append(len(images))
            torch.set_default_dtype(torch.float64)
            released.wait(60)
            return super().__call__(images, prompts)

    placed = PlacedReward(Hangs(), Entry("slow", 1, rows=1, timeout=0.2))
    with pytest.raises(PartHung, match=r"rewards\.1 \(slow\) did not return within 0\.2 s; raise rewards\.1\.timeout"):
        placed(images_of(0, 1), rows(0, 1))
    assert torch.get_default_dtype() is torch.float32
    released.set()
    assert placed(images_of(1.0), rows(0)).tolist() == [255] and calls == [1, 1]


def test_ctrl_c_ends_the_wait_and_what_waits_behind_it_is_not_begun() -> None:
    released, calls = threading.Event(), []

    class Interrupted(OnHost):
        def __call__(self, images: Tensor, prompts) -> Tensor:
            calls.append(len(images))
            if len(calls) == 1:
                os.kill(os.getpid(), signal.SIGINT)
                released.wait(60)
            return super().__call__(images, prompts)

    placed = PlacedReward(Interrupted(), Entry(rows=1))
    with pytest.raises(KeyboardInterrupt):
        placed(images_of(0, 1), rows(0, 1))
    released.set()
    assert placed(images_of(1.0), rows(0)).tolist() == [255] and calls == [1, 1]


def test_a_call_has_its_time_from_its_beginning() -> None:
    """One that waits for a thread, or for the device, has not begun."""
    job, found = Job(lambda: None), []

    def wait() -> None:
        try:
            wait_for(job, Part("p", timeout=0.01))
        except PartHung as error:
            found.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive() and not found
    job.began = time.monotonic()
    waiting.join(60)
    assert len(found) == 1


def test_calls_that_were_given_up_are_not_made() -> None:
    begun, released = threading.Event(), threading.Event()

    class Waits(OnHost):
        def __call__(self, images: Tensor, prompts) -> Tensor:
            begun.set()
            released.wait(60)
            return super().__call__(images, prompts)

    reward = Waits()
    placed = PlacedReward(reward, Entry(rows=1))
    placed.begun(HostImages(images_of(0.2, 0.4, 0.6), rows(0, 0, 0)))
    begun.wait(60)
    placed.cancel()
    released.set()
    assert placed(images_of(1.0), rows(0)).tolist() == [255]
    assert [int(images[0, 0, 0, 0]) for images, _ in reward.seen] == [51, 255]


class Ranks:
    """Place of each image in its group by grey level, from 0."""

    groupwise = True

    def __init__(self, host: bool) -> None:
        self.host, self.sizes = host, []

    def __call__(self, images: Tensor, prompts) -> Tensor:
        self.sizes.append(len(images))
        assert images.dtype is (torch.uint8 if self.host else torch.float32)
        level, group = images[:, 0, 0, 0].float(), prompts.group_index
        return torch.stack([(level[group == g] < value).sum() for g, value in zip(group, level, strict=True)])


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize(("limit", "sizes"), [(0, [7]), (4, [3, 4]), (1, [3, 2, 2])])
def test_a_groupwise_reward_sees_whole_groups(host: bool, limit: int, sizes: list[int]) -> None:
    """Chunks cut through groups and come in another order; the ranks are worked out by hand."""
    placed = PlacedReward(Ranks(host), Entry(rows=limit, scale=2.0))
    chunks = [
        HostImages(images_of(0.9, 0.1), rows(0, 1, groups=[3, 0])),
        HostImages(images_of(0.8, 0.2, 0.6), rows(0, 1, 2, groups=[0, 3, 1])),
        HostImages(images_of(0.3, 0.5), rows(2, 1, groups=[1, 0])),
    ]
    # group 0: 0.1 0.8 0.5; group 1: 0.6 0.3; group 3: 0.9 0.2
    assert placed.of_groups(chunks, torch.device("cpu")).tolist() == [2, 0, 4, 0, 2, 0, 2]
    assert placed.reward.sizes == sizes


def test_a_group_with_an_image_that_is_not_finite_has_no_scores() -> None:
    placed = PlacedReward(Ranks(host=True))
    chunk = HostImages(images_of(0.9, math.nan, 0.8, 0.2), rows(0, 0, 0, 0, groups=[0, 0, 1, 1]))
    scores = placed.of_groups([chunk], torch.device("cpu"))
    assert scores[:2].isnan().all() and scores[2:].tolist() == [1, 0]


class Holder:
    def __init__(self, tower: nn.Module) -> None:
        self.towers = {"one": [tower, tower]}
        self.inner = functools.partial(self.call, nn.Linear(2, 1, bias=False))
        self.table = torch.zeros(5)
        self.name = "x"

    def call(self, head: nn.Module, images: Tensor, prompts) -> Tensor:
        return images


def test_weights_are_found_wherever_they_are_each_once() -> None:
    tower = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    holder = Holder(tower)
    holder.me = holder

    def made():
        return lambda images, prompts: (holder, tower[0])

    for owner in (holder, made(), holder.call, nn.ModuleList([tower, holder.inner.args[0], nn.ParameterList([holder.table])])):
        assert sum(t.numel() for t in weights_of(owner)) == 9 + 9 + 2 + 5
    assert len(reachable(holder)[0]) == 2
    assert sum(t.numel() for t in weights_of(names_a_global)) == 4


LAYER = nn.Linear(4, 1, bias=False)


def names_a_global(images: Tensor, prompts) -> Tensor:
    return LAYER(images)


def test_offloaded_weights_come_and_leave_without_being_copied_back() -> None:
    """Here both places are the CPU: what is brought is the same numbers, and what is left are the first tensors."""
    tower = nn.Linear(2, 2)
    first = tower.weight.data_ptr()
    weights = Offloaded(lambda: tower)
    weights.bring(torch.device("cpu"))
    assert weights.here == torch.device("cpu")
    weights.leave()
    assert tower.weight.data_ptr() == first and weights.here is None


def test_weights_that_find_no_room_leave_the_device_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = nn.Linear(2, 2)
    weights, homes = Offloaded(lambda: tower), [p.data_ptr() for p in tower.parameters()]
    left = [1]

    def to(self, *args, **kwargs) -> Tensor:
        if not left:
            raise torch.OutOfMemoryError("CUDA out of memory")
        left.pop()
        return self.clone()

    with monkeypatch.context() as full:
        full.setattr(Tensor, "to", to)
        with pytest.raises(torch.OutOfMemoryError):
            weights.bring(torch.device("cpu"))
    assert not left and [p.data_ptr() for p in tower.parameters()] == homes and weights.here is None
