"""Counters and the peak of memory against cases worked out by hand."""

import pytest
import torch
from torch import nn

from adagrpo.build import build_architecture, build_model
from adagrpo.estimate.counting import OpCounter, PeakMemory
from adagrpo.estimate.rehearsal import NotRehearsable, Rehearsal, fused_attention
from adagrpo.models.base import Conditioning
from adagrpo.recipe.load import load_recipe


@pytest.fixture(scope="module")
def tiny():
    return build_model(load_recipe("tiny").model)


def test_views_rewraps_and_allocations_are_no_work() -> None:
    x = torch.ones(4, 6)
    with OpCounter() as counter:
        y = x.reshape(2, 12).transpose(0, 1)[1:].detach().unsqueeze(0).expand(3, -1, -1)
        torch.empty(5)
        y = y.contiguous().contiguous()  # the first copies, the second has nothing to do
        (y + 1).mul_(2)
    assert counter.ops == {"aten.clone": 1, "aten.add": 1, "aten.mul_": 1}


def test_traffic_is_operands_and_results() -> None:
    a, b = torch.ones(8, 16), torch.ones(16, 4)
    with OpCounter() as counter:
        a @ b
        torch.ones(1, 16).expand(8, 16) + a  # 1 x 16 are touched of the expanded operand
    assert counter.traffic["aten.mm"] == 4 * (8 * 16 + 16 * 4 + 8 * 4)
    assert counter.traffic["aten.add"] == 4 * (16 + 8 * 16 + 8 * 16)


def test_copies_to_a_device_are_counted() -> None:
    host, device = torch.arange(3), torch.empty(5, 3, device="meta")
    with OpCounter() as counter:
        host.to("meta")
        device[0].copy_(host)
        torch.tensor([1, 2], device="meta")
        torch.as_tensor([1.0], device="meta")
        torch.full((2,), 3.0, device="meta")  # a fill: nothing travels
        torch.arange(4, device="meta")
        device * torch.tensor(2.0)  # a 0-dim host tensor is a kernel argument
        host.to(torch.float64)  # stays on the host
        torch.tensor([1, 2])
        device.to("meta")
    assert counter.transfers == {"aten._to_copy": 1, "aten.copy_": 1, "torch.tensor": 1, "torch.as_tensor": 1}
    with pytest.raises(RuntimeError, match="meta"), OpCounter():
        device.sum().item()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_peak_of_temporaries(device: str) -> None:
    x = torch.empty(100, device=device)
    with PeakMemory(device) as memory:
        y = x + 1  # 400 bytes
        z = y.double()  # + 800
        del y
        z = z[:10] * 2  # + 80, a view keeps all of its storage until here
        x.add_(1)  # what existed before does not count
        w = z.view(2, 5)
        del z
    assert memory.peak == 400 + 800 and memory.live == 80
    del w
    assert memory.live == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_peak_of_a_backward_pass(device: str) -> None:
    """x [4, 10] -> 20 -> tanh -> 5 -> sum, in float32."""
    first, second = (nn.Parameter(torch.empty(shape, device=device)) for shape in ((10, 20), (20, 5)))
    x = torch.empty(4, 10, device=device)
    hidden, out = 4 * 20 * 4, 4 * 5 * 4
    with PeakMemory(device) as memory:
        h = torch.tanh(x @ first)  # the product goes once tanh has its result, which the graph keeps
        y = h @ second
        del h
        assert memory.peak == 2 * hidden and memory.live == hidden + out
        y.sum().backward()
    # The gradient of y is one number, expanded. The pass ends with the gradients of both weights, that of the first product,
    # and y with its sum: more than at any time before, when h and its gradient lived but not yet the larger weight gradient.
    before = hidden + out + 8 + 20 * 5 * 4 + 2 * hidden
    last = out + 8 + 20 * 5 * 4 + hidden + 10 * 20 * 4
    assert memory.peak == max(before, last) == 1608
    assert memory.live == out + (20 * 5 + 10 * 20) * 4


def test_meta_measures_what_the_cpu_holds(tiny) -> None:
    """The forward pass of tiny-flux at 3 rows: both devices see the same tensors, but for attention's by-products."""
    rehearsal = Rehearsal(tiny, "a red circle")
    x, sigma = torch.randn(3, *tiny.latent_shape), torch.full((3,), 0.5)
    conditioning = tiny.encode(["a red circle"])
    with torch.no_grad(), PeakMemory("cpu") as real:
        text = Conditioning(conditioning.tensors).rows(torch.zeros(3, dtype=torch.int64))
        tiny.velocity(x.clone(), sigma.clone(), text)
    assert rehearsal.forward_peak(3) == pytest.approx(real.peak, rel=0.01)
    with PeakMemory("cpu") as real:
        tiny.decode(x.clone())
    assert rehearsal.decode_peak(3) == pytest.approx(real.peak, rel=0.01)
    with PeakMemory("cpu") as real:
        text = Conditioning(conditioning.tensors).rows(torch.zeros(3, dtype=torch.int64))
        tiny.velocity(x.clone(), sigma.clone(), text).sum().backward()
    for _, p in tiny.trainable():
        p.grad = None
    assert rehearsal.update_peak(3) == pytest.approx(real.peak, rel=0.01)


def test_fused_attention_never_holds_the_matrix() -> None:
    q = torch.empty(1, 2, 512, 16, device="meta", dtype=torch.bfloat16)
    attend = torch.nn.functional.scaled_dot_product_attention
    with PeakMemory("meta") as plain:
        attend(q, q, q)
    with fused_attention(), PeakMemory("meta") as fused:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        torch.nn.functional.scaled_dot_product_attention(query=q, key=q, value=q, attn_mask=torch.ones(512, 512, device="meta"))
    assert torch.nn.functional.scaled_dot_product_attention is attend
    assert plain.peak > 2 * 512 * 512 * 4
    result, log_sum = q.numel() * 2, 2 * 512 * 4
    mask = 512 * 512 * (4 + 2)
    assert fused.peak <= mask + result + 2 * log_sum


def test_the_rehearsal_leaves_the_model_alone(tiny) -> None:
    before = {name: (p.data_ptr(), p.device.type, p.grad) for name, p in tiny.transformer.named_parameters()}
    rehearsal = Rehearsal(tiny, "a red circle")
    rehearsal.update_peak(2)
    rehearsal.step_peak()
    assert {t.device.type for t in rehearsal.transformer.parameters()} == {"meta"}
    assert {name: (p.data_ptr(), p.device.type, p.grad) for name, p in tiny.transformer.named_parameters()} == before


def test_the_architecture_is_that_of_the_loaded_model(tiny) -> None:
    built = build_architecture(load_recipe("tiny").model)
    shapes = lambda module: {name: (p.shape, p.dtype) for name, p in module.named_parameters()}  # noqa: E731
    assert shapes(built.transformer) == shapes(tiny.transformer) and shapes(built.vae) == shapes(tiny.vae)
    for name in ("text_encoder", "text_encoder_2"):
        assert shapes(built.pipeline.components[name]) == shapes(getattr(tiny.pipeline, name))
    assert {n: t.shape for n, t in built.encode(["a"]).tensors.items()} == {
        n: t.shape for n, t in tiny.encode(["a red circle"]).tensors.items()
    }


def test_what_cannot_be_rehearsed_says_why() -> None:
    with pytest.raises(NotRehearsable, match="encode"):
        Rehearsal(object(), "a")
