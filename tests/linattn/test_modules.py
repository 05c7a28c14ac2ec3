from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linattn import functional
from linattn.errors import ArgumentError, ShapeError
from linattn.modules import Attention, CourseLayer, PreNormLayer, Transformer, rotate


def split_heads(layer: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, T, D], written out head by head, keys and values repeated for grouped queries."""
    D, H, G = layer.head_dim, layer.heads, layer.kv_heads
    weights = layer.qkv.weight
    q = [x @ weights[h * D : (h + 1) * D].T for h in range(H)]
    k = [x @ weights[(H + h) * D : (H + h + 1) * D].T for h in range(G) for _ in range(H // G)]
    v = [x @ weights[(H + G + h) * D : (H + G + h + 1) * D].T for h in range(G) for _ in range(H // G)]
    return torch.stack(q, 1), torch.stack(k, 1), torch.stack(v, 1)


def naive(layer: Attention, x: Tensor, similarity: dict[str, object]) -> Tensor:
    q, k, v = split_heads(layer, x)
    scores = q @ k.mT / math.sqrt(layer.head_dim)
    weights = similarity[layer.kernel](scores)
    if layer.is_causal:
        weights = weights.tril()
    out = (weights / weights.sum(-1, keepdim=True)) @ v
    return torch.cat(out.unbind(1), dim=-1) @ layer.out.weight.T


SIMILARITY = {"softmax": torch.exp, "quadratic": lambda s: (1 + s) ** 2, "taylor": lambda s: 1 + s + s * s / 2}


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kernel", list(SIMILARITY))
def test_attention_is_its_formula(kernel: str, is_causal: bool, kv_heads: int | None) -> None:
    torch.manual_seed(0)
    layer = Attention(12, 4, kernel=kernel, is_causal=is_causal, kv_heads=kv_heads, head_dim=5).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), naive(layer, x, SIMILARITY), rtol=1e-9, atol=1e-9)


def test_feature_map_attention_by_name_and_by_callable() -> None:
    torch.manual_seed(0)
    named = Attention(8, 2, kernel="elu+1", is_causal=True).double()
    called = Attention(8, 2, kernel=lambda x: F.elu(x) + 1, is_causal=True).double()
    called.load_state_dict(named.state_dict())
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    q, k, v = split_heads(named, x)
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    expected = torch.cat((weights / weights.sum(-1, keepdim=True) @ v).unbind(1), dim=-1) @ named.out.weight.T
    torch.testing.assert_close(named(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(called(x), expected, rtol=1e-9, atol=1e-9)


def test_a_feature_map_that_learns_belongs_to_the_layer() -> None:
    layer = Attention(8, 2, kernel=nn.Sequential(nn.Linear(4, 6), nn.Softplus()))
    assert "kernel.0.weight" in dict(layer.named_parameters())
    layer(torch.randn(1, 5, 8)).square().sum().backward()
    assert layer.kernel[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kernel", ["softmax", "quadratic", "elu+1"])
def test_padding_changes_nothing(kernel: str) -> None:
    torch.manual_seed(0)
    model = Transformer(2, 8, 2, kernel=kernel).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    padded = model(x, key_mask=mask)
    torch.testing.assert_close(padded[1, :6], model(x[1:, :6])[0], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(padded[1, :6], model(x)[1, :6])


def test_kernels_get_views_of_the_fused_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    real = functional.attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        seen.extend((q, k, v))
        return real(q, k, v, **options)

    monkeypatch.setattr(functional, "attention", spy)
    Attention(8, 2, kernel="softmax")(torch.randn(1, 5, 8))
    q, k, v = seen
    assert q.shape == k.shape == v.shape == (1, 2, 5, 4)
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert q.stride() == (5 * 24, 4, 24, 1)


@pytest.mark.parametrize(
    ("kernel", "given", "pinned"),
    [
        ("quadratic", None, "direct"),
        ("taylor", None, "direct"),
        ("elu+1", None, "chunked"),
        ("quadratic", "chunked", "chunked"),
    ],
)
def test_form_is_pinned(monkeypatch: pytest.MonkeyPatch, kernel: str, given: str | None, pinned: str) -> None:
    seen: dict[str, object] = {}

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        seen.update(options)
        return v

    monkeypatch.setattr(functional, "attention", spy)
    Attention(8, 2, kernel=kernel, form=given, normalize=True)(torch.randn(1, 3, 8))
    assert (seen["form"], seen["scale"], seen["normalize"]) == (pinned, 0.5, True)


def test_chunked_form_agrees_with_direct() -> None:
    torch.manual_seed(0)
    direct = Attention(8, 2, kernel="quadratic", is_causal=True, form="direct").double()
    chunked = Attention(8, 2, kernel="quadratic", is_causal=True, form="chunked").double()
    chunked.load_state_dict(direct.state_dict())
    x = torch.randn(1, 40, 8, dtype=torch.float64)
    torch.testing.assert_close(direct(x), chunked(x), rtol=1e-8, atol=1e-8)


def test_qk_norm_takes_out_the_size_of_queries_and_keys() -> None:
    torch.manual_seed(0)
    layer = Attention(8, 2, kernel="quadratic", qk_norm=True).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        layer.qkv.weight[:16] *= 7.0  # queries and keys, not values
    torch.testing.assert_close(layer(x), before, rtol=1e-9, atol=1e-9)


def test_rotary_scores_depend_on_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, dtype=torch.float64)
    rotated_q = rotate(q.expand(1, 9, 1, 6), base=100.0)[0, :, 0]
    rotated_k = rotate(k.expand(1, 9, 1, 6), base=100.0)[0, :, 0]
    scores = rotated_q @ rotated_k.T
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-6, atol=1e-6)
    assert scores[0].std() > 0.1
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm().expand(9), rtol=1e-6, atol=1e-6)


def test_rotary_turns_by_the_stated_angles() -> None:
    x = torch.zeros(1, 4, 1, 4)
    x[..., 1] = 1.0
    expected = 3 * 50.0 ** (-2 / 4)
    torch.testing.assert_close(
        rotate(x, base=50.0)[0, 3, 0], torch.tensor([0.0, math.cos(expected), 0.0, math.sin(expected)])
    )


def test_without_positions_the_order_of_keys_does_not_matter() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 6, 8)
    order = torch.tensor([0, 4, 2, 5, 1, 3])
    plain, placed = Attention(8, 2), Attention(8, 2, rotary=10_000.0)
    torch.testing.assert_close(plain(x[:, order]), plain(x)[:, order])
    assert not torch.allclose(placed(x[:, order]), placed(x)[:, order], atol=1e-4)


def test_course_layer_is_its_formula() -> None:
    torch.manual_seed(0)
    layer = CourseLayer(8, 2, kernel="quadratic", hidden=10)
    x = torch.randn(2, 5, 8)
    mixed = layer.attention(x) + x
    first, second = layer.feed_forward.first, layer.feed_forward.second
    expected = F.gelu(mixed @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(layer(x), expected)
    assert first.weight.shape == (10, 8)


def test_prenorm_layer_is_its_formula() -> None:
    torch.manual_seed(0)
    layer = PreNormLayer(8, 2)

    def norm(x: Tensor) -> Tensor:
        return x / x.square().mean(-1, keepdim=True).sqrt()

    x = torch.randn(2, 5, 8)
    mixed = x + layer.attention(norm(x))
    torch.testing.assert_close(layer(x), mixed + layer.feed_forward(norm(mixed)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "layer"), [("course", CourseLayer), ("prenorm", PreNormLayer)])
def test_transformer_is_its_layers_in_order(kind: str, layer: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = Transformer(3, 8, 2, layer=kind)
    assert [type(each) for each in model.layers] == [layer] * 3
    x = torch.randn(1, 4, 8)
    out = model.layers[2](model.layers[1](model.layers[0](x)))
    torch.testing.assert_close(model(x), model.norm(out))


@pytest.mark.parametrize("kind", ["course", "prenorm"])
@pytest.mark.parametrize("kernel", ["softmax", "quadratic", "taylor", "elu+1"])
def test_causal_transformer_sees_no_future_and_all_parameters_learn(kernel: str, kind: str) -> None:
    torch.manual_seed(0)
    model = Transformer(2, 8, 2, layer=kind, kernel=kernel, is_causal=True, rotary=10_000.0, qk_norm=True, kv_heads=1)
    x = torch.randn(1, 6, 8)
    changed = x.clone()
    changed[:, 4:] += 1.0
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])
    before.square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model = Transformer(1, 8, 2, dropout=0.5)
    x = torch.randn(1, 4, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 3}, "dim=8 and heads=3"),
        ({"heads": 0}, "heads=0"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads=3"),
        ({"heads": 2, "head_dim": 3, "rotary": 10_000.0}, "even head_dim; got 3"),
        ({"heads": 2, "form": "chunked"}, "form='chunked' was given for kernel 'softmax'"),
    ],
)
def test_bad_sizes_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Attention(8, **arguments)


def test_bad_input_and_unknown_layer_are_named() -> None:
    with pytest.raises(ShapeError, match=r"\(5, 8\); accepted: \[B, T, 8\]"):
        Attention(8, 2)(torch.randn(5, 8))
    with pytest.raises(ArgumentError, match="Did you mean 'prenorm'"):
        Transformer(1, 8, 2, layer="pre-norm")
    with pytest.raises(ArgumentError, match="layers=0"):
        Transformer(0, 8, 2)


def test_unknown_kernel_is_named() -> None:
    with pytest.raises(ArgumentError, match="Did you mean 'quadratic'"):
        Attention(8, 2, kernel="quadratc")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "quadratic", "form": "chunkd"}, "unknown form 'chunkd'; accepted: .*Did you mean 'chunked'"),
        ({"kernel": "quadratic", "form": "auto"}, "unknown form 'auto'"),
        ({"kernel": "quadratic", "form": "recurrent"}, "form='recurrent' was given without is_causal=True"),
        ({"kernel": "identity"}, "kernel='identity' was given, .* accepted with normalize=True: 'softmax'"),
    ],
)
def test_names_are_checked_when_the_layer_is_made(options: dict[str, str], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Attention(8, 2, **options)


def test_identity_is_accepted_without_normalisation() -> None:
    layer = Attention(8, 2, kernel="identity", normalize=False, is_causal=True)
    assert layer(torch.randn(1, 5, 8)).shape == (1, 5, 8)
