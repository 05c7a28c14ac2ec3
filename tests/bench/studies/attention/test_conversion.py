"""The parts of the conversion study; the whole is run by its command, whose result is committed."""

from __future__ import annotations

import torch

from linattn import softmax_attention
from linattn.bench.studies.attention.conversion import distilling_loss, queries_keys, swap_kernel
from linattn.lm.model import CausalLM, CausalLMConfig


def make_teacher() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(CausalLMConfig(vocabulary=11, layers=2, dim=16, heads=2)).eval()


def test_swapping_keeps_every_weight() -> None:
    teacher = make_teacher()
    student = swap_kernel(teacher, "hedgehog")
    kept = dict(student.named_parameters())
    assert all(torch.equal(kept.pop(name), weight) for name, weight in teacher.named_parameters())
    assert len(kept) == 2
    assert all(torch.equal(weight, torch.eye(8)) for weight in kept.values())


def test_queries_and_keys_are_those_of_the_layer() -> None:
    layer, x = make_teacher().transformer.layers[0].attention, torch.randn(2, 7, 16)
    q, k = queries_keys(layer, x)
    v = layer.qkv(x)[..., -16:].unflatten(-1, (2, 8)).transpose(1, 2)
    out = layer.out(softmax_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
    assert torch.allclose(out, layer(x), atol=1e-6)


def test_distilling_trains_the_maps_and_brings_the_rows_nearer() -> None:
    teacher, tokens = make_teacher(), torch.randint(11, (2, 20))
    student = swap_kernel(teacher, "hedgehog")
    maps = [weight for name, weight in student.named_parameters() if ".kernel." in name]
    optimizer = torch.optim.Adam(maps, lr=0.05)
    losses = []
    for _ in range(15):
        loss = distilling_loss(teacher, student, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(weight.grad is None for weight in teacher.parameters())
