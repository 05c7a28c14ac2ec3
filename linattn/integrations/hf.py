"""Hugging Face transformers: this library's kernels as attention implementations, and decoding in constant memory.

    from linattn.integrations import hf

    hf.register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="linattn_quadratic")
    model.generate(tokens, cache=hf.StateCache())  # past_key_values= before transformers 5.24

`register` enters two functions a kernel with transformers: one attends, the other turns the model's mask into what the
kernels take, a bool `[B, Tk]` of keys that count. What the kernels cannot do (sliding windows, packed rows, masks of
one's own, sinks, soft caps, dropout of scores) raises ArgumentError with the reason.

`StateCache` keeps the sums over all earlier keys (`linattn.states`) in place of the keys: a token costs as much memory
and time after a million others as after ten. Needs transformers 4.57 or newer: extra `hf`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from linattn import functional
from linattn.errors import ArgumentError, MissingExtraError, StateError
from linattn.kernels.feature_map.maps import MAPS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from linattn.states import FeatureMapState, QuadraticState

try:
    from transformers import AttentionInterface, masking_utils
    from transformers.cache_utils import Cache, CacheLayerMixin
    from transformers.masking_utils import AttentionMaskInterface
except ModuleNotFoundError as error:
    raise MissingExtraError("transformers", "hf", "the Hugging Face integration") from error

PREFIX = "linattn_"
# With the feature maps that kernels apply themselves. Similarities of "identity" may be negative: no normaliser.
KERNELS = ("softmax", "quadratic", "taylor", *(name for name in MAPS if name != "identity"))
IMPLEMENTATIONS = {PREFIX + kernel: kernel for kernel in KERNELS}
# What models pass to their attention and no kernel here can do, and what to do instead.
UNSUPPORTED = {
    "sliding_window": "windows over the keys; a state cannot forget keys",
    "softcap": "soft caps of the scores",
    "s_aux": "attention sinks",
    "position_bias": "biases of the scores",
    "head_mask": "masks of heads",
    "cu_seq_lens_q": "packed rows; pad them and give an attention_mask",
}


def register() -> tuple[str, ...]:
    """Make every kernel known to transformers and return the names, for `attn_implementation=`.

    The names are `linattn_` and a kernel: `linattn_softmax`, `linattn_quadratic`, `linattn_taylor`, `linattn_elu+1`
    and so on. Scores are scaled as the model asks (1/sqrt(D) in Llama). Calling it again changes nothing.

    Raises (later, in the model's forward pass):
        ArgumentError: a mask or an option that the kernels cannot do.

    Example:
        >>> register()[:3]
        ('linattn_softmax', 'linattn_quadratic', 'linattn_taylor')
    """
    for name, kernel in IMPLEMENTATIONS.items():
        AttentionInterface.register(name, functools.partial(attend, kernel))
        AttentionMaskInterface.register(name, key_mask)
    return tuple(IMPLEMENTATIONS)


def attend(
    kernel: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks: query `[B, H, T, D]`, key and value `[B, Hkv, Tk, D]` -> `[B, T, H, D]`.

    Keys from a `StateCache` are attended to together with its state, and then added to it. Without it Tk >= T, and
    the last query is aligned with the last key.

    Raises:
        ArgumentError: an option that the kernels cannot do, or softmax with a `StateCache`.
    """
    _check_options(dropout, attention_mask, others)
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options: dict[str, Any] = {
        "is_causal": is_causal,
        "scale": query.shape[3] ** -0.5 if scaling is None else scaling,
        "key_mask": attention_mask,
        "enable_gqa": True,
    }
    layer = getattr(key, "state_layer", None)
    if layer is None:
        if is_causal:
            options["q_offset"] = key.shape[2] - query.shape[2]
        out = functional.attention(query, key, value, kernel=kernel, **options)
    else:
        out = layer.attend(query, key, value, kernel, options)
    return out.transpose(1, 2), None


def _check_options(dropout: float, attention_mask: Tensor | None, others: dict[str, Any]) -> None:
    if dropout:
        raise ArgumentError(f"dropout={dropout} of attention scores was asked for, which are never held; accepted: 0")
    if others.get("output_attentions"):
        raise ArgumentError("output_attentions=True asks for the scores, which are never held; accepted: False")
    for name, what in UNSUPPORTED.items():
        if others.get(name) is not None:
            raise ArgumentError(f"the model asks for {name}={others[name]!r}; no kernel has {what}")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ArgumentError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; accepted: padding [B, Tk] or none. A mask for "
            "each query and key would need all scores, which the kernels never hold"
        )


def key_mask(
    *,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    **position: Any,
) -> Tensor | None:
    """Make the mask that the kernels take: bool `[B, Tk]`, True for keys that count, or None if all of them do.

    Args:
        kv_length: number of keys that the layer will get.
        kv_offset: number of keys before them.
        mask_function: transformers' description of the mask: causal or in both directions.
        attention_mask: padding, bool `[B, all keys so far]`.
        position: where the queries stand, `q_offset` and `q_length`, in transformers 4 `cache_position`.

    Raises:
        ArgumentError: any other mask than causal, bidirectional and padding; a cache with unwritten keys.
    """
    plain = [masking_utils.causal_mask_function, getattr(masking_utils, "bidirectional_mask_function", None)]
    if mask_function not in plain:
        raise ArgumentError(
            f"the model asks for the mask {mask_function.__qualname__}; accepted: causal or bidirectional, padded. "
            "Windows, chunks, packed rows and masks of one's own would need all scores, which the kernels never hold"
        )
    if mask_function is plain[0] and _end_of_queries(position) != kv_offset + kv_length:
        raise ArgumentError(
            f"the cache holds keys up to {kv_offset + kv_length} for queries up to {_end_of_queries(position)}; "
            "accepted: caches that end with the last query, DynamicCache or StateCache"
        )
    if attention_mask is None:
        return None
    seen = attention_mask[:, kv_offset : kv_offset + kv_length]
    return None if bool(seen.all()) else seen


def _end_of_queries(position: dict[str, Any]) -> int:
    if "cache_position" in position:  # transformers 4
        return int(position["cache_position"][-1]) + 1
    return int(position["q_offset"]) + int(position["q_length"])


class StateLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """One layer of a `StateCache`: the sums over all keys until now.

    transformers' models put keys into the cache and pass its output to their attention, so the new keys go through
    unchanged and carry this layer with them; `attend` takes the state from it and adds them to the sums.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.state: QuadraticState | FeatureMapState | None = None
        self.tokens = self.tokens_attended = 0
        self.is_initialized = False

    def lazy_initialization(self, *_: Tensor) -> None:
        """Mark the layer as initialized: a state is made when the first keys are attended to."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the new keys and values as they are, for the attention.

        Raises:
            StateError: nothing took in those of the last call, as they reached the attention changed, or another one.
        """
        if self.tokens != self.tokens_attended:
            raise StateError(
                f"{self.tokens - self.tokens_attended} keys were given to a StateCache and never attended to; "
                f"accepted: a model that hands keys on unchanged to one of {', '.join(IMPLEMENTATIONS)}"
            )
        self.is_initialized = True
        self.tokens += key_states.shape[-2]
        key_states.state_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def attend(self, query: Tensor, key: Tensor, value: Tensor, kernel: str, options: dict[str, Any]) -> Tensor:
        """Attend to all keys until now, `[B, H, T, D]`; the state then holds the new ones too."""
        if kernel == "softmax":
            raise ArgumentError("softmax has no state to keep in a StateCache; accepted: a DynamicCache, other kernels")
        options = {**options, "initial_state": self.state, "return_state": True}
        out: Tensor
        out, self.state = functional.attention(query, key, value, kernel=kernel, **options)
        self.tokens_attended = self.tokens
        return out

    def get_seq_length(self, *_: Any) -> int:
        """Return the number of tokens until now."""
        return self.tokens

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Return the number of keys that the attention gets, and the number that came before."""
        return (query if isinstance(query, int) else query.shape[0]), self.tokens  # transformers 4: positions

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    get_max_cache_shape = get_max_length  # transformers 4

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with these rows of the batch, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these sequences of the batch."""
        self._map(lambda x: x.index_select(0, indices.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Go on with every sequence of the batch `repeats` times."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Leave the state where it is: it is small, and it does not grow."""

    prefetch = offload

    def crop(self, tokens: int) -> None:
        """Refuse to forget keys: sums do not tell the last ones from the others.

        Raises:
            StateError: always.
        """
        raise StateError(f"crop({tokens}) asks a StateCache to forget keys; accepted: a DynamicCache, which keeps them")

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = type(self.state)(*map(change, self.state))


class StateCache(Cache):  # type: ignore[misc]  # transformers is not typed
    """A cache for models with a kernel of this library other than softmax, of a size that does not depend on the text.

    Per layer and key head it holds a state (`linattn.cost.state_size` numbers in fp32) in place of T keys and values:
    less than them from about T = D^2/4 on for the quadratic kernel in fp32, from T = D/2 on for feature maps.

    Example:
        >>> cache = StateCache()
        >>> cache.get_seq_length()
        0
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=StateLayer)

    def memory_bytes(self) -> int:
        """Count the bytes of all states."""
        states = (layer.state for layer in self.layers if layer.state is not None)
        return sum(x.numel() * x.element_size() for state in states for x in state)
