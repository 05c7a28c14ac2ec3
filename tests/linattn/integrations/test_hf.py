"""The Hugging Face integration: every kernel inside a small Llama, held against attention written out in float64."""

from __future__ import annotations

import copy
import doctest
import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from linattn.errors import ArgumentError, MissingExtraError, StateError
from linattn.functional import TAYLOR

transformers = pytest.importorskip("transformers", minversion="4.57", reason="needs the extra 'hf'")
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM  # noqa: E402

from linattn.integrations import hf  # noqa: E402

NAMES = hf.register()
WITH_STATE = [name for name in NAMES if name != "linattn_softmax"]
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
IS_5 = VERSION >= (5, 0)
# The argument of `generate` that takes a cache: renamed in 5.24, where the old name warns.
CACHE = "cache" if VERSION >= (5, 24) else "past_key_values"
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def make_model(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    # A copy: transformers writes the implementation's name into the configuration that it is given.
    config = copy.deepcopy(LlamaConfig(**{**SIZES, **changes}))
    model = LlamaForCausalLM._from_config(config, attn_implementation=name).to(dtype)
    return model.eval()


def make_tokens(padding: str = "none", length: int = 21) -> tuple[Tensor, Tensor]:
    """Two rows and their mask; the first row is padded by 6."""
    tokens = torch.randint(3, 50, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    if padding != "none":
        mask[0, slice(None, 6) if padding == "left" else slice(-6, None)] = 0
    return tokens.masked_fill(mask == 0, 0), mask


# ---- the truth: the same model with attention written out ------------------------------------------------------------

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "elu+1": lambda x: torch.nn.functional.elu(x) + 1,
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
    "exp": torch.exp,
}


def similarity(kernel: str, scores: Tensor, q: Tensor, k: Tensor) -> Tensor:
    if kernel == "softmax":
        return scores.exp()
    if kernel in FEATURES:
        return FEATURES[kernel](q) @ FEATURES[kernel](k).mT
    c0, c1, c2 = (1, 2, 1) if kernel == "quadratic" else TAYLOR
    return c0 + c1 * scores + c2 * scores**2


def written_out(kernel: str) -> Callable[..., Any]:
    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, **_: Any) -> Any:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        weights = similarity(kernel, scaling * q @ k.mT, q, k) * (mask == 0)  # eager masks are added: 0 for seen keys
        total = weights.sum(-1, keepdim=True)
        out = torch.where(total > 0, weights @ v / total.clamp(min=1e-300), 0.0)
        return out.transpose(1, 2), None

    return attend


def truth_of(name: str) -> str:
    """The name of the written-out attention for this kernel, entered with transformers."""
    truth = f"written_out_{name}"
    transformers.AttentionInterface.register(truth, written_out(hf.IMPLEMENTATIONS[name]))
    transformers.AttentionMaskInterface.register(truth, transformers.masking_utils.eager_mask)
    return truth


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_are_those_of_attention_written_out(name: str, padding: str) -> None:
    tokens, mask = make_tokens(padding)
    gradients = []
    for implementation in (name, truth_of(name)):
        model = make_model(implementation)
        logits = model(input_ids=tokens, attention_mask=mask).logits
        kept = logits[mask.bool()]  # what stands at padding is nobody's
        kept.square().mean().backward()
        gradients.append([kept.detach(), *(parameter.grad for parameter in model.parameters())])
    for actual, expected in zip(*gradients, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.skipif(not IS_5, reason="transformers 4 has no configuration for it")
def test_attention_in_both_directions() -> None:
    tokens, mask = make_tokens("left")
    outputs = []
    for implementation in ("linattn_softmax", "sdpa"):
        model = make_model(implementation, is_causal=False)
        outputs.append(model(input_ids=tokens, attention_mask=mask).logits[mask.bool()])
    assert torch.allclose(*outputs, rtol=1e-7, atol=1e-9)


# ---- generation ------------------------------------------------------------------------------------------------------


def generate(model: LlamaForCausalLM, padding: str, *, cache: hf.StateCache | None = None, **options: Any) -> Tensor:
    tokens, mask = make_tokens(padding)
    options = {"max_new_tokens": 7, "do_sample": False, **options}
    if cache is not None:
        options[CACHE] = cache
    out: Tensor = model.generate(input_ids=tokens, attention_mask=mask, **options)
    return out


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_generates_the_same_with_every_cache(name: str, padding: str) -> None:
    model = make_model(name)
    expected = generate(make_model(truth_of(name)), padding, use_cache=False)
    assert torch.equal(generate(model, padding, use_cache=False), expected)
    assert torch.equal(generate(model, padding), expected)  # keys and values, as transformers keeps them
    if name in WITH_STATE:
        assert torch.equal(generate(model, padding, cache=hf.StateCache()), expected)


def test_beam_search_reorders_the_state() -> None:
    model = make_model("linattn_elu+1")
    expected = generate(model, "left", num_beams=3)
    assert torch.equal(generate(model, "left", num_beams=3, cache=hf.StateCache()), expected)


@pytest.mark.parametrize("name", WITH_STATE)
def test_a_text_in_pieces_gives_the_logits_of_the_whole(name: str) -> None:
    model, (tokens, mask) = make_model(name), make_tokens("left")
    cache, pieces = hf.StateCache(), []
    for start, end in ((0, 9), (9, 10), (10, 21)):
        out = model(input_ids=tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        pieces.append(out.logits)
    # Positions of their own: transformers counts them from the mask only inside `generate`.
    whole = model(input_ids=tokens, attention_mask=mask).logits
    assert torch.allclose(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()], rtol=1e-7, atol=1e-9)


def test_the_cache_does_not_grow() -> None:
    model = make_model("linattn_quadratic", torch.float32)
    sizes = []
    for count in (1, 30):
        cache = hf.StateCache()
        generate(model, "none", max_new_tokens=count, cache=cache)
        sizes.append(cache.memory_bytes())
    C = 9 * 10 // 2
    numbers = 2 * 2 * 2 * (C * 8 + 8 * 8 + 8)  # layers, rows, key heads, and the state of a head of size 8
    assert sizes == [4 * numbers + 2 * 2 * 8] * 2  # and n, int64, for each row


def test_a_cache_is_reset() -> None:
    model, cache = make_model("linattn_elu+1"), hf.StateCache()
    first = generate(model, "none", cache=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.memory_bytes() == 0
    assert torch.equal(generate(model, "none", cache=cache), first)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_sliding_windows_are_refused() -> None:
    config = MistralConfig(**SIZES, sliding_window=4)
    model = MistralForCausalLM._from_config(config, attn_implementation="linattn_quadratic")
    with pytest.raises(ArgumentError, match=r"and_mask|sliding_window"):
        model(input_ids=make_tokens()[0])


def test_a_mask_for_each_query_is_refused() -> None:
    tokens, _ = make_tokens()
    mask = torch.zeros(2, 1, 21, 21, dtype=torch.float64)
    with pytest.raises(ArgumentError, match=r"\(2, 1, 21, 21\); accepted: padding"):
        make_model("linattn_quadratic")(input_ids=tokens, attention_mask=mask)


def test_packed_rows_are_refused() -> None:
    tokens = make_tokens()[0][:1]
    positions = torch.cat([torch.arange(10), torch.arange(11)])[None]
    with pytest.raises(ArgumentError, match="packed rows"):
        make_model("linattn_elu+1")(input_ids=tokens, position_ids=positions, use_cache=False)


def test_dropout_of_scores_is_refused() -> None:
    model = make_model("linattn_taylor", attention_dropout=0.1).train()
    with pytest.raises(ArgumentError, match=r"dropout=0\.1"):
        model(input_ids=make_tokens()[0])


@pytest.mark.parametrize("option", ["output_attentions", *hf.UNSUPPORTED])
def test_options_without_a_kernel_are_refused(option: str) -> None:
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(ArgumentError, match=option):
        hf.attend("quadratic", torch.nn.Module(), q, q, q, None, **{option: 4})


def test_a_cache_with_unwritten_keys_is_refused() -> None:
    model = make_model("linattn_quadratic")
    cache = transformers.StaticCache(config=model.config, max_cache_len=40)
    with pytest.raises(ArgumentError, match="StateCache"):
        model(input_ids=make_tokens()[0], past_key_values=cache)


def test_softmax_has_no_state() -> None:
    with pytest.raises(ArgumentError, match="softmax has no state"):
        generate(make_model("linattn_softmax"), "none", cache=hf.StateCache())


def test_a_state_cache_that_nothing_reads_is_noticed() -> None:
    """Another attention would see the new keys only, and be wrong without a word."""
    with pytest.raises(StateError, match="21 keys were given to a StateCache"):
        generate(make_model("sdpa", torch.float32), "none", cache=hf.StateCache())


def test_a_state_cannot_forget() -> None:
    cache = hf.StateCache()
    generate(make_model("linattn_quadratic"), "none", cache=cache)
    with pytest.raises(StateError, match="forget"):
        cache.crop(-1)


def test_without_transformers_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "linattn.integrations.hf")
    with pytest.raises(MissingExtraError, match=r"linattn\[hf\]"):
        importlib.import_module("linattn.integrations.hf")


def test_docstring_examples() -> None:
    outcome = doctest.testmod(hf)
    assert outcome.attempted > 0
    assert outcome.failed == 0
