"""Calls of the chunked quadratic form in Triton and their truth, for the tests of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import linattn
from linattn.states import QuadraticState
from linattn.testing import make_inputs, make_key_mask, truth_quadratic, truth_quadratic_state
from tests.support.triton_device import DEVICE

Function = Callable[..., Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def chunked(**options: Any) -> Function:
    return lambda q, k, v: linattn.quadratic_attention(q, k, v, **{"form": "chunked", **options}, backend="triton")


def inputs(**how: Any) -> tuple[Tensor, Tensor, Tensor]:
    """One head of 70 keys unless said otherwise: three chunks in the interpreter."""
    return make_inputs(**{"batch": 1, "heads": 1, "keys": 70, "head_size": 16, "device": DEVICE, **how})


def truth(**options: Any) -> Function:
    return lambda q, k, v: truth_quadratic(q, k, v, **options)


def masked(keep: str, keys: int) -> Tensor:
    """[2, keys]. One element has 20 keys or more, so that queries of both kinds, with and without a state, exist."""
    mask = make_key_mask(2, keys)
    if keep == "left padding":
        mask[0, :40], mask[1, :3] = False, False
    elif keep == "few keys":
        mask[0] = False
        mask[0, 35:60:3] = True
    elif keep == "none":
        mask[0] = False
    return mask.to(DEVICE)


def state_of(k: Tensor, v: Tensor) -> QuadraticState:
    return QuadraticState(*(x.float() if x.is_floating_point() else x for x in truth_quadratic_state(k, v)))


def parts_of_state(state: QuadraticState) -> list[Tensor]:
    return [x for x in state if x.is_floating_point()]
