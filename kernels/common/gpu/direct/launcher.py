"""Launches of the direct form: one kernel forward (two for few queries of many keys), two backward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from linattn.kernels.common.gpu.architecture import architecture
from linattn.kernels.common.gpu.direct.backward import keys_kernel, queries_kernel
from linattn.kernels.common.gpu.direct.config import MOST_SPLITS, PROGRAMS, Row, Tile, configuration
from linattn.kernels.common.gpu.direct.decode import decode_kernel, merge_kernel
from linattn.kernels.common.gpu.direct.forward import forward_kernel
from linattn.kernels.common.gpu.launch import block, launch, readable, strides
from linattn.kernels.common.gpu.numerics import LOW, precision
from linattn.kernels.common.op.allocation import empty_in_storage_order, empty_row_sums
from linattn.kernels.common.op.varlen import check_sequences

if TYPE_CHECKING:
    from linattn.kernels.common.gpu.similarity import Similarity

MOST_QUERIES, MOST_ROWS = 16, 64
"""Beyond either the forward kernel's tiles are filled well enough."""
LEAST_STEPS = 4
"""Tiles of keys that are worth a program of their own."""


@dataclass(frozen=True)
class Problem:
    """One call: q `[B, H, T, D]`, k `[B, Hkv, Tk, D]`, v `[B, Hkv, Tk, M]` of any strides. normalize: divide by l."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    cu_seqlens: Tensor | None
    is_causal: bool
    q_offset: int
    similarity: Similarity
    normalize: bool

    @cached_property
    def row(self) -> Row:
        return configuration(architecture(self.q.device), self.q.dtype, max(self.block_d, self.block_m))

    @property
    def block_d(self) -> int:
        return block(self.q.shape[3])

    @property
    def block_m(self) -> int:
        return block(self.v.shape[3])

    def tiles(self, length: int, size: int) -> int:
        """Programs for one head. Of packed sequences only the total length is known here: an upper bound."""
        if self.cu_seqlens is None:
            return triton.cdiv(length, size)
        return length // size + self.cu_seqlens.shape[0] - 1

    @property
    def few_queries(self) -> bool:
        """Whether the queries of all heads that share a key head fit one tile, as in decoding."""
        T, groups = self.q.shape[2], self.q.shape[1] // self.k.shape[1]
        return T <= MOST_QUERIES and T * groups <= MOST_ROWS and self.cu_seqlens is None

    def splits(self, tile: Tile) -> tuple[int, int]:
        """Among how many programs the keys of a head are split, and how many each gets. By shape alone: the order of
        sums, and so their rounding, must not depend on anything else.
        """
        B, Hkv, Tk = self.k.shape[:3]
        steps = triton.cdiv(Tk, tile.BLOCK_K)
        idle = PROGRAMS[architecture(self.q.device)] // (B * Hkv)
        length = triton.cdiv(steps, max(1, min(idle, MOST_SPLITS, steps // LEAST_STEPS)))
        return triton.cdiv(steps, length), length * tile.BLOCK_K

    def arguments(self, tile: Tile) -> dict[str, Any]:
        """What all kernels of the direct form take."""
        q, k, v, kind = self.q, self.k, self.v, self.similarity
        D, M = q.shape[3], v.shape[3]
        # A view as bytes, since Triton's masks are not stored as bits.
        key_mask = None if self.key_mask is None else self.key_mask.contiguous().view(torch.uint8)
        return {
            **strides("q", q),
            **strides("k", k),
            **strides("v", v),
            "mask_ptr": key_mask,
            "stride_mask": 0 if key_mask is None else key_mask.stride(0),
            "cu_ptr": None if self.cu_seqlens is None else self.cu_seqlens.contiguous(),
            "T": q.shape[2],
            "Tk": k.shape[2],
            "D": D,
            "M": M,
            "q_offset": self.q_offset,
            "S": 1 if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1,
            "a": kind.a,
            "b": kind.b,
            "c": kind.c,
            "SIMILARITY": kind.kind,
            "NORMALIZE": self.normalize,
            "CAUSAL": self.is_causal,
            "KEY_MASK": key_mask is not None,
            "PACKED": self.cu_seqlens is not None,
            "BLOCK_Q": tile.BLOCK_Q,
            "BLOCK_K": tile.BLOCK_K,
            "BLOCK_D": self.block_d,
            "BLOCK_M": self.block_m,
            "EVEN_D": self.block_d == D,
            "EVEN_M": self.block_m == M,
            "LOW": LOW[q.dtype],
            "PRECISION": precision(q.dtype),
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """out, and of each row l, or the log-sum-exp for softmax."""
    if problem.cu_seqlens is not None:
        check_sequences(problem.cu_seqlens, problem.q.shape[2])
    problem = _readable(problem)
    q, k, tile = problem.q, problem.k, problem.row.forward
    B, H, T, _ = q.shape
    out, l = empty_in_storage_order(q, problem.v.shape[3]), empty_row_sums(q)
    if problem.few_queries:
        _decode(problem, out, l)
        return out, l
    tiles = problem.tiles(T, tile.BLOCK_Q)
    launch(
        forward_kernel,
        (tiles * B * H,),
        **problem.arguments(tile),
        **strides("out", out, "o"),
        l_ptr=l,
        H=H,
        G=H // k.shape[1],
        tiles=tiles,
    )
    return out, l


def _decode(problem: Problem, out: Tensor, l: Tensor) -> None:
    """Fill out and l in one kernel, or two if the keys are split."""
    q, k, v, tile = problem.q, problem.k, problem.v, problem.row.decode
    B, H, T, _ = q.shape
    Hkv, M = k.shape[1], v.shape[3]
    splits, length = problem.splits(tile)
    split = splits > 1
    acc = q.new_empty((splits, B, H, T, M), dtype=torch.float32) if split else None
    sums, m = (q.new_empty((splits, B, H, T), dtype=torch.float32) if split else l for _ in range(2))
    arguments = problem.arguments(replace(tile, BLOCK_Q=max(tile.BLOCK_Q, block(H // Hkv * T))))
    launch(
        decode_kernel,
        (splits * B * Hkv,),
        **arguments,
        **strides("out", out, "o"),
        l_ptr=sums,
        acc_ptr=acc,
        m_ptr=m,
        Hkv=Hkv,
        G=H // Hkv,
        splits=splits,
        length=length,
        SPLIT=split,
    )
    if split:
        launch(
            merge_kernel,
            (B * H * T,),
            **strides("out", out, "o"),
            acc_ptr=acc,
            sums_ptr=sums,
            m_ptr=m,
            l_ptr=l,
            H=H,
            T=T,
            M=M,
            splits=splits,
            BLOCK_S=triton.next_power_of_2(splits),
            **{name: arguments[name] for name in ("SIMILARITY", "NORMALIZE", "LOW", "BLOCK_M")},
            num_warps=4,
            num_stages=1,
        )


def backward(
    problem: Problem, dout: Tensor, out: Tensor, l: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; those that are not wanted hold anything."""
    problem = _readable(problem)
    q, k, v, dout = problem.q, problem.k, problem.v, readable(dout)
    B, H, T, _ = q.shape
    Hkv, Tk = k.shape[1:3]
    dq, dk, dv = (empty_in_storage_order(x, x.shape[3]) for x in (q, k, v))
    norm, delta = (empty_row_sums(q), empty_row_sums(q)) if problem.normalize else (None, None)
    rows = strides("dout", dout, "do")
    rows |= {"norm_ptr": norm, "delta_ptr": delta, "slope": problem.similarity.slope}

    if wanted[0] or problem.normalize:
        tile = problem.row.queries
        tiles = problem.tiles(T, tile.BLOCK_Q)
        launch(
            queries_kernel,
            (tiles * B * H,),
            **problem.arguments(tile),
            **rows,
            **strides("out", out, "o"),
            **strides("dq", dq),
            l_ptr=l,
            H=H,
            G=H // Hkv,
            tiles=tiles,
            WANT_DQ=wanted[0],
        )
    if wanted[1] or wanted[2]:
        tile = problem.row.keys
        tiles = problem.tiles(Tk, tile.BLOCK_K)
        launch(
            keys_kernel,
            (tiles * B * Hkv,),
            **problem.arguments(tile),
            **rows,
            **strides("dk", dk),
            **strides("dv", dv),
            Hkv=Hkv,
            G=H // Hkv,
            tiles=tiles,
            WANT_DK=wanted[1],
            WANT_DV=wanted[2],
            RAGGED=problem.cu_seqlens is not None or T % tile.BLOCK_Q != 0,
        )
    return dq, dk, dv


def describe(q: Tensor, v: Tensor, kind: str) -> str:
    """The kernels that run for a similarity, and their configuration."""
    name = architecture(q.device)
    row = configuration(name, q.dtype, max(block(q.shape[3]), block(v.shape[3])))
    tiles = f"forward {row.forward}, dq {row.queries}, dk and dv {row.keys}"
    return f"Triton ({name}): direct tiles of queries x keys, {kind}: {tiles}"


def _readable(problem: Problem) -> Problem:
    q, k, v = (readable(x) for x in (problem.q, problem.k, problem.v))
    return replace(problem, q=q, k=k, v=v)
