"""Beam search: the most probable continuations, as far as a few at a time can see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linattn.errors import ArgumentError, ShapeError, refusal
from linattn.rnn.checks import check_size

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]
NOTHING = -1
"""Stands behind the end of a shorter continuation, and everywhere in one that does not exist."""


class BeamResult(NamedTuple):
    """The best continuations of each sequence, best first.

    Attributes:
        tokens: int64 `[B, n_best, T]`, T the longest of them; the end token is included, -1 stands behind it.
        lengths: int64 `[B, n_best]`; 0 where fewer than `n_best` were found.
        log_probs: `[B, n_best]`, of the whole continuation; -inf where there is none.
        scores: `[B, n_best]`, log_probs / lengths^length_penalty, by which they are ranked.
    """

    tokens: Tensor
    lengths: Tensor
    log_probs: Tensor
    scores: Tensor


class _Ended(NamedTuple):
    """Complete continuations, best first, `[B, n]` each: what stood in `beam` at step length - 1, and then `token`."""

    scores: Tensor
    log_probs: Tensor
    lengths: Tensor
    beam: Tensor
    token: Tensor

    @staticmethod
    def none(like: Tensor, B: int, n: int) -> _Ended:
        """Make an empty set of continuations, in the dtype and on the device of these log-probabilities."""
        worst = like.new_full((B, n), -torch.inf)
        nowhere = torch.zeros(B, n, dtype=torch.int64, device=like.device)
        return _Ended(worst, worst, nowhere, nowhere, nowhere)

    def with_new(self, new: _Ended) -> _Ended:
        """Merge both and keep the best, as many as there are now."""
        both = _Ended(*(torch.cat(pair, 1) for pair in zip(self, new, strict=True)))
        scores, kept = both.scores.topk(self.scores.shape[1], dim=1)
        return _Ended(scores, *(x.gather(1, kept) for x in both[1:]))


class _Extensions(NamedTuple):
    """Beams that have grown by one token, best first, `[B, n]` each: `beam` of the step before, and then `token`."""

    log_probs: Tensor
    beam: Tensor
    token: Tensor

    @staticmethod
    def best(n: int, alive: Tensor, log_probs: Tensor) -> _Extensions:
        """Select the n best of all K M extensions of alive `[B, K]` by log_probs `[B, K, M]`."""
        M = log_probs.shape[2]
        extended = (alive[:, :, None] + log_probs).flatten(1)
        ranked, index = extended.topk(min(n, extended.shape[1]), dim=1)
        return _Extensions(ranked, index // M, index % M)

    def ending_in(self, end_token: int | None) -> Tensor:
        """Mark those that end in this token."""
        return torch.zeros_like(self.token, dtype=torch.bool) if end_token is None else self.token == end_token

    def among_first(self, n: int) -> Tensor:
        """Mark the n best."""
        return torch.arange(self.token.shape[1], device=self.token.device) < n

    def best_of(self, n: int, chosen: Tensor) -> _Extensions:
        """Select the n best of those chosen; -inf where there are fewer."""
        log_probs, kept = self.log_probs.masked_fill(~chosen, -torch.inf).topk(min(n, self.token.shape[1]), dim=1)
        return _Extensions(log_probs, self.beam.gather(1, kept), self.token.gather(1, kept))

    def ended(self, chosen: Tensor, length: int, length_penalty: float) -> _Ended:
        """Turn those chosen into complete continuations of this length; the others score -inf."""
        log_probs = self.log_probs.masked_fill(~chosen, -torch.inf)
        lengths = torch.full_like(self.beam, length)
        return _Ended(log_probs / length**length_penalty, log_probs, lengths, self.beam, self.token)


@torch.no_grad()
def beam_search(
    step_fn: Step,
    state: Any,
    first_token: Tensor,
    *,
    beams: int,
    max_length: int,
    end_token: int | None = None,
    length_penalty: float = 0.0,
    n_best: int = 1,
    batch_dim: int = 0,
    early_stop: bool = True,
) -> BeamResult:
    """Extend the `beams` most probable beginnings of every sequence by one token at a time.

    A step ranks all K M extensions. Of the best K, those that end in `end_token` are complete and set aside; the best K
    that do not end go on. What is left after `max_length` tokens is complete too. Complete ones are ranked by
    log p / length^length_penalty.

    With `early_stop` a search ends when nothing can change its result any more: log p only falls and no continuation is
    longer than `max_length`, so what is alive never scores above log p / max_length^length_penalty. Once the n-th best
    complete one of every sequence does, the rest is left out. The result is that without it.

    K = 1 is greedy search. K at least the number of beginnings of every length is exhaustive, and only then is the
    result certainly the most probable one.

    Args:
        step_fn: `(tokens int64 [R], state) -> (log_probs [R, M], state)`, R = B at the first step and B K later; a
            row's log_probs are those of the token after the one given, at most 0.
        state: before `first_token`: None, a tensor, or tuples (named ones too), lists and dictionaries of them, with
            the batch in dimension `batch_dim` of every tensor. It is reordered on its device.
        first_token: int64 `[B]`, given to the first step; not part of the result.
        beams: K, at least 1.
        max_length: T, tokens of a continuation at most, at least 1.
        end_token: 0 to M - 1; None: all continuations have `max_length` tokens.
        length_penalty: 0 ranks by log p, which favours short ones; 1 by its mean over tokens.
        n_best: continuations to return, at most K.
        batch_dim: 0 for states `[B, ...]`, 1 for those of stacks, `[L, B, H]`.
        early_stop: False runs to `max_length` always.

    Cost: T calls of step_fn on B K rows, O(B T K M log M) for ranking, O(B T K) memory besides the state.

    Raises: ArgumentError, ShapeError (what step_fn returns).

    >>> table = torch.tensor([[0.5, 0.4, 0.1], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]]).log()
    >>> result = beam_search(lambda tokens, state: (table[tokens], state), None, torch.tensor([0]),
    ...                      beams=2, max_length=4, end_token=2)
    >>> result.tokens[0, 0].tolist(), round(result.log_probs[0, 0].exp().item(), 2)
    ([1, 2], 0.32)
    """
    # Over 60 lines because it documents ten arguments: the search itself is 25.
    _check_options(first_token, beams, max_length, length_penalty, n_best)
    B, K = first_token.shape[0], beams
    log_probs, state = _stepped(step_fn, first_token, state, B, end_token)
    M = log_probs.shape[1]
    alive = log_probs.new_zeros(B, 1)
    history: list[tuple[Tensor, Tensor]] = []  # of every step: the beam that each beam came from, its token
    ended = _Ended.none(log_probs, B, n_best)

    for length in range(1, max_length + 1):
        best = _Extensions.best(2 * K, alive, log_probs.view(B, -1, M))
        is_end = best.ending_in(end_token)
        complete = is_end if length < max_length else torch.ones_like(is_end)
        ended = ended.with_new(best.ended(complete & best.among_first(K), length, length_penalty))
        alive, beam, token = best.best_of(K, ~is_end)
        history.append((beam, token))
        if length == max_length or (early_stop and _nothing_can_change(ended, alive, max_length, length_penalty)):
            break
        rows = (torch.arange(B, device=beam.device)[:, None] * (len(log_probs) // B) + beam).flatten()
        state = reorder(state, rows, batch_dim)
        log_probs, state = _stepped(step_fn, token.flatten(), state, token.numel(), end_token, M)
    return _traced(ended, history)


def _nothing_can_change(ended: _Ended, alive: Tensor, max_length: int, length_penalty: float) -> bool:
    """Say whether no living beam can still score above the last complete continuation that will be returned."""
    return bool((ended.scores[:, -1] >= alive[:, 0] / max_length**length_penalty).all())


def _traced(ended: _Ended, history: list[tuple[Tensor, Tensor]]) -> BeamResult:
    """Follow each complete continuation from its end back to its beginning."""
    exists = ended.scores > -torch.inf
    lengths = ended.lengths * exists
    longest = int(lengths.max()) if lengths.numel() else 0
    tokens = torch.full((*lengths.shape, longest), NOTHING, device=lengths.device)
    beam = ended.beam
    for t in reversed(range(longest)):
        parent, token = history[t]
        last, inside = lengths == t + 1, lengths > t + 1
        here = beam.clamp(max=parent.shape[1] - 1)  # of rows that have not begun yet, whatever it is
        tokens[..., t] = torch.where(last, ended.token, torch.where(inside, token.gather(1, here), NOTHING))
        beam = torch.where(inside, parent.gather(1, here), beam)
    return BeamResult(tokens, lengths, ended.log_probs, ended.scores)


def reorder(state: Any, rows: Tensor, batch_dim: int = 0) -> Any:
    """Select these rows of a state: every tensor in tuples, lists and dictionaries, along its batch dimension.

    >>> reorder({"h": torch.tensor([[1.0, 2.0, 3.0]]), "c": None}, torch.tensor([2, 2, 0]), batch_dim=1)
    {'h': tensor([[3., 3., 1.]]), 'c': None}
    """
    if state is None:
        return None
    if isinstance(state, Tensor):
        return state.index_select(batch_dim, rows)
    if isinstance(state, dict):
        return {name: reorder(part, rows, batch_dim) for name, part in state.items()}
    if isinstance(state, (tuple, list)):
        parts = [reorder(part, rows, batch_dim) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    raise ArgumentError(f"a state holds a {type(state).__name__}; accepted: None, tensors, tuples, lists, dictionaries")


def _stepped(
    step_fn: Step, tokens: Tensor, state: Any, rows: int, end_token: int | None, width: int | None = None
) -> tuple[Tensor, Any]:
    """Call step_fn and check its log-probabilities."""
    log_probs, state = step_fn(tokens, state)
    accepted = f"accepted: a floating tensor [{rows}, {width or 'M'}]"
    if not isinstance(log_probs, Tensor) or not log_probs.is_floating_point():
        given = log_probs.dtype if isinstance(log_probs, Tensor) else type(log_probs).__name__
        raise ShapeError(f"step_fn returned log_probs of {given}; {accepted}")
    if log_probs.dim() != 2 or log_probs.shape[0] != rows or log_probs.shape[1] != (width or log_probs.shape[1]):
        raise ShapeError(f"step_fn returned log_probs of shape {list(log_probs.shape)}; {accepted}")
    if end_token is not None and not 0 <= end_token < log_probs.shape[1]:
        raise refusal(
            ArgumentError,
            "end_token is no token",
            given=f"end_token={end_token}",
            accepted=f"0 to {log_probs.shape[1] - 1}, or None",
        )
    highest = log_probs.max()
    if not highest <= 1e-3:
        raise ArgumentError(
            f"step_fn returned a value of {highest.item():.3g}; accepted: log-probabilities, at most 0 "
            "(logits become some by log_softmax)"
        )
    return log_probs, state


def _check_options(first_token: Tensor, beams: int, max_length: int, length_penalty: float, n_best: int) -> None:
    if not isinstance(first_token, Tensor) or first_token.dtype != torch.int64 or first_token.dim() != 1:
        given = f"{first_token.dtype} {list(first_token.shape)}" if isinstance(first_token, Tensor) else first_token
        raise refusal(
            ShapeError, "first_token has the wrong type or shape", given=given, accepted="an int64 tensor [B]"
        )
    for name, value in (("beams", beams), ("max_length", max_length), ("n_best", n_best)):
        check_size(name, value)
    if n_best > beams:
        raise refusal(
            ArgumentError,
            "more continuations than beams",
            given=f"n_best={n_best} and beams={beams}",
            accepted="n_best of at most beams",
        )
    if not length_penalty >= 0:
        raise refusal(
            ArgumentError, "length_penalty is negative", given=f"length_penalty={length_penalty}", accepted="0 or more"
        )
