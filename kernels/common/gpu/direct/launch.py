"""Launches of the direct form: one kernel forward (two for few queries of many keys), two backward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from linattn.kernels.common.gpu.architecture import architecture
from linattn.kernels.common.gpu.direct.backward import dkv_kernel, dq_kernel
from linattn.kernels.common.gpu.direct.config import MOST_SPLITS, PROGRAMS, DirectConfig, configuration
from linattn.kernels.common.gpu.direct.decode import decode_kernel, merge_kernel
from linattn.kernels.common.gpu.direct.forward import forward_kernel
from linattn.kernels.common.gpu.launch import block_size, launch, strides_bht, with_unit_stride
from linattn.kernels.common.gpu.numerics import TRITON_DTYPE, precision
from linattn.kernels.common.gpu.varlen_schedule import max_tiles
from linattn.kernels.common.op.allocation import empty_in_storage_order, empty_row_sums
from linattn.kernels.common.op.varlen import check_sequences

if TYPE_CHECKING:
    from linattn.kernels.common.gpu.config import KernelConfig
    from linattn.kernels.common.gpu.similarity import Similarity

MOST_QUERIES, MOST_GROUPED_QUERIES = 16, 64
"""Queries of a head, and of all heads that share a key head: beyond either, forward tiles are full enough."""
LEAST_STEPS = 4
"""Tiles of keys that are worth a program of their own."""


@dataclass(frozen=True)
class DirectProblem:
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
    def config(self) -> DirectConfig:
        """The tiles of all kernels."""
        return configuration(architecture(self.q.device), self.q.dtype, max(self.block_d, self.block_dv))

    @property
    def block_d(self) -> int:
        """Columns of q and k in a tile."""
        return block_size(self.q.shape[3])

    @property
    def block_dv(self) -> int:
        """Columns of v in a tile."""
        return block_size(self.v.shape[3])

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def num_seqs(self) -> int:
        """Packed sequences; 1 if they are not packed."""
        return 1 if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def num_tiles(self, length: int, size: int) -> int:
        """Programs for one head. Of packed sequences only the total length is known here: an upper bound."""
        if self.cu_seqlens is None:
            return triton.cdiv(length, size)
        return max_tiles(length, size, self.num_seqs)

    @property
    def has_few_queries(self) -> bool:
        """Whether the queries of all heads that share a key head fit one tile, as in decoding."""
        T = self.q.shape[2]
        return T <= MOST_QUERIES and T * self.group <= MOST_GROUPED_QUERIES and self.cu_seqlens is None

    def splits(self, tile: KernelConfig) -> tuple[int, int]:
        """Return among how many programs the keys of a head are split, and how many each gets. By shape alone: the
        order of sums, and so their rounding, must not depend on anything else.
        """
        B, Hkv, Tk = self.k.shape[:3]
        steps = triton.cdiv(Tk, tile.BLOCK_N)
        idle = PROGRAMS[architecture(self.q.device)] // (B * Hkv)
        length = triton.cdiv(steps, max(1, min(idle, MOST_SPLITS, steps // LEAST_STEPS)))
        return triton.cdiv(steps, length), length * tile.BLOCK_N

    def qkv_arguments(self, tile: KernelConfig) -> dict[str, Any]:
        """Return what all kernels take that compute scores: q, k, v, what is visible, the similarity, the tile."""
        q, k, v, similarity = self.q, self.k, self.v, self.similarity
        D, M = q.shape[3], v.shape[3]
        # A view as bytes, since Triton's masks are not stored as bits.
        key_mask = None if self.key_mask is None else self.key_mask.contiguous().view(torch.uint8)
        return {
            "q_ptr": q,
            "k_ptr": k,
            "v_ptr": v,
            "key_mask_ptr": key_mask,
            "stride_q": strides_bht(q),
            "stride_k": strides_bht(k),
            "stride_v": strides_bht(v),
            "stride_mb": 0 if key_mask is None else key_mask.stride(0),
            "GROUP": self.group,
            "T": q.shape[2],
            "Tk": k.shape[2],
            "D": D,
            "M": M,
            "q_offset": self.q_offset,
            "a": similarity.a,
            "b": similarity.b,
            "c": similarity.c,
            "SIMILARITY": similarity.kind,
            "NORMALIZE": self.normalize,
            "CAUSAL": self.is_causal,
            "KEY_MASK": key_mask is not None,
            "BLOCK_T": tile.BLOCK_T,
            "BLOCK_N": tile.BLOCK_N,
            "BLOCK_D": self.block_d,
            "BLOCK_DV": self.block_dv,
            "EVEN_D": self.block_d == D,
            "EVEN_DV": self.block_dv == M,
            "IN_DTYPE": TRITON_DTYPE[q.dtype],
            "PRECISION": precision(q.dtype),
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }


def forward(problem: DirectProblem) -> tuple[Tensor, Tensor]:
    """Return out, and of each query l, or the log-sum-exp for softmax."""
    if problem.cu_seqlens is not None:
        check_sequences(problem.cu_seqlens, problem.q.shape[2])
    problem = _with_unit_strides(problem)
    q, tile = problem.q, problem.config.forward
    B, H, T, _ = q.shape
    out, l = empty_in_storage_order(q, problem.v.shape[3]), empty_row_sums(q)
    if problem.has_few_queries:
        _decode(problem, out, l)
        return out, l
    num_tiles = problem.num_tiles(T, tile.BLOCK_T)
    launch(
        forward_kernel,
        (num_tiles * B * H,),
        **problem.qkv_arguments(tile),
        cu_seqlens_ptr=problem.cu_seqlens,
        o_ptr=out,
        stride_o=strides_bht(out),
        l_ptr=l,
        H=H,
        NUM_SEQS=problem.num_seqs,
        num_tiles=num_tiles,
        PACKED=problem.cu_seqlens is not None,
    )
    return out, l


def _decode(problem: DirectProblem, out: Tensor, l: Tensor) -> None:
    """Fill out and l in one kernel, or two if the keys are split."""
    q, tile = problem.q, problem.config.decode
    B, H, T, _ = q.shape
    Hkv, M = problem.k.shape[1], problem.v.shape[3]
    num_splits, split_length = problem.splits(tile)
    is_split = num_splits > 1
    acc = q.new_empty((num_splits, B, H, T, M), dtype=torch.float32) if is_split else None
    split_l, m = (q.new_empty((num_splits, B, H, T), dtype=torch.float32) if is_split else l for _ in range(2))
    launch(
        decode_kernel,
        (num_splits * B * Hkv,),
        **problem.qkv_arguments(replace(tile, BLOCK_T=max(tile.BLOCK_T, block_size(H // Hkv * T)))),
        o_ptr=out,
        stride_o=strides_bht(out),
        l_ptr=split_l,
        acc_ptr=acc,
        m_ptr=m,
        Hkv=Hkv,
        num_splits=num_splits,
        split_length=split_length,
        SPLIT=is_split,
    )
    if is_split:
        launch(
            merge_kernel,
            (B * H * T,),
            num_warps=4,
            num_stages=1,
            acc_ptr=acc,
            split_l_ptr=split_l,
            m_ptr=m,
            o_ptr=out,
            l_ptr=l,
            stride_o=strides_bht(out),
            H=H,
            T=T,
            M=M,
            num_splits=num_splits,
            SIMILARITY=problem.similarity.kind,
            NORMALIZE=problem.normalize,
            IN_DTYPE=TRITON_DTYPE[q.dtype],
            BLOCK_SPLITS=triton.next_power_of_2(num_splits),
            BLOCK_DV=problem.block_dv,
        )


def backward(
    problem: DirectProblem, dout: Tensor, out: Tensor, l: Tensor, needs_grad: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv; those that are not needed hold anything."""
    # Over 60 lines: two launches, written out.
    problem = _with_unit_strides(problem)
    q, k, v, dout = problem.q, problem.k, problem.v, with_unit_stride(dout)
    B, H, T, _ = q.shape
    Hkv, Tk = k.shape[1:3]
    dq, dk, dv = (empty_in_storage_order(x, x.shape[3]) for x in (q, k, v))
    norm, delta = (empty_row_sums(q), empty_row_sums(q)) if problem.normalize else (None, None)
    if needs_grad[0] or problem.normalize:
        tile = problem.config.dq
        num_tiles = problem.num_tiles(T, tile.BLOCK_T)
        launch(
            dq_kernel,
            (num_tiles * B * H,),
            **problem.qkv_arguments(tile),
            cu_seqlens_ptr=problem.cu_seqlens,
            o_ptr=out,
            dout_ptr=dout,
            l_ptr=l,
            norm_ptr=norm,
            delta_ptr=delta,
            dq_ptr=dq,
            stride_o=strides_bht(out),
            stride_do=strides_bht(dout),
            stride_dq=strides_bht(dq),
            H=H,
            NUM_SEQS=problem.num_seqs,
            num_tiles=num_tiles,
            slope=problem.similarity.slope,
            PACKED=problem.cu_seqlens is not None,
            NEEDS_DQ=needs_grad[0],
        )
    if needs_grad[1] or needs_grad[2]:
        tile = problem.config.dkv
        num_tiles = problem.num_tiles(Tk, tile.BLOCK_N)
        launch(
            dkv_kernel,
            (num_tiles * B * Hkv,),
            **problem.qkv_arguments(tile),
            cu_seqlens_ptr=problem.cu_seqlens,
            dout_ptr=dout,
            norm_ptr=norm,
            delta_ptr=delta,
            dk_ptr=dk,
            dv_ptr=dv,
            stride_do=strides_bht(dout),
            stride_dk=strides_bht(dk),
            stride_dv=strides_bht(dv),
            Hkv=Hkv,
            NUM_SEQS=problem.num_seqs,
            num_tiles=num_tiles,
            slope=problem.similarity.slope,
            PACKED=problem.cu_seqlens is not None,
            NEEDS_DK=needs_grad[1],
            NEEDS_DV=needs_grad[2],
            RAGGED=problem.cu_seqlens is not None or T % tile.BLOCK_T != 0,
        )
    return dq, dk, dv


def describe(q: Tensor, v: Tensor, kind: str) -> str:
    """Describe the kernels that run for a similarity, and their configuration."""
    name = architecture(q.device)
    config = configuration(name, q.dtype, max(block_size(q.shape[3]), block_size(v.shape[3])))
    tiles = f"forward {config.forward}, dq {config.dq}, dk and dv {config.dkv}"
    return f"Triton ({name}): direct tiles of queries x keys, {kind}: {tiles}"


def _with_unit_strides(problem: DirectProblem) -> DirectProblem:
    """Return the problem as kernels read it, sequence bounds included."""
    q, k, v = (with_unit_stride(x) for x in (problem.q, problem.k, problem.v))
    cu_seqlens = None if problem.cu_seqlens is None else problem.cu_seqlens.contiguous()
    return replace(problem, q=q, k=k, v=v, cu_seqlens=cu_seqlens)
