"""Is it right? Inputs, the truth of every operation in float64, error budgets, random calls and a fuzzer.

The truths are written from the definition `out_i = sum_j sim(q_i, k_j) v_j / sum_j sim(q_i, k_j)`: they build the whole
N x N matrix, cost O(N^2 (D + M)) time and O(N^2) memory, and share no code with the operations they judge.

    >>> import torch
    >>> from linattn.testing import make_inputs, relative_error, truth_quadratic
    >>> q, k, v = make_inputs(keys=5, head_size=4)
    >>> relative_error(truth_quadratic(q, k, v, is_causal=True)[:, :, 0], v[:, :, 0]) < 1e-12
    True
"""

from __future__ import annotations

from linattn.testing.budgets import (
    BUDGETS,
    Budget,
    assert_close_to_truth,
    assert_matches_truth,
    condition_number,
    evaluate,
    poisoned_memory,
    relative_error,
    row_errors,
)
from linattn.testing.inputs import LAYOUTS, Layout, make_inputs, make_key_mask
from linattn.testing.truth import (
    TRUE_FEATURE_MAPS,
    Past,
    SeenKeys,
    Similarity,
    truth_argmax,
    truth_attention,
    truth_feature_state,
    truth_linear,
    truth_quadratic,
    truth_quadratic_state,
    truth_softmax,
    visible_keys,
)

__all__ = [
    "BUDGETS",
    "LAYOUTS",
    "TRUE_FEATURE_MAPS",
    "Budget",
    "Layout",
    "Past",
    "SeenKeys",
    "Similarity",
    "assert_close_to_truth",
    "assert_matches_truth",
    "condition_number",
    "evaluate",
    "make_inputs",
    "make_key_mask",
    "poisoned_memory",
    "relative_error",
    "row_errors",
    "truth_argmax",
    "truth_attention",
    "truth_feature_state",
    "truth_linear",
    "truth_quadratic",
    "truth_quadratic_state",
    "truth_softmax",
    "visible_keys",
]
