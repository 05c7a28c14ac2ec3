"""From sums within runs of tokens to states from the beginning, the last step of chunk_state.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

from linattn.kernels.common.gpu.launch import launch
from linattn.kernels.common.gpu.numerics import TRITON_DTYPE, round_to
from linattn.kernels.common.gpu.varlen_schedule import bounds_of
from linattn.kernels.quadratic.gpu import config
from linattn.kernels.quadratic.gpu.chunk_schedule import first_run_of, last_boundary, slot_of

if TYPE_CHECKING:
    from torch import Tensor

    from linattn.kernels.quadratic.gpu.kernel_args import ChunkedProblem

SCAN = config.StateTile(1024, 4, 2)


class RunSums(NamedTuple):
    """Sums within runs of `length` tokens, `per_sequence` of them for a sequence that is not packed.

    at_boundaries `[slots, Hkv, ...]`: from the beginning of a run to each boundary in it, and after the scan from the
    beginning of the sequence. totals `[runs, Hkv, ...]`: of whole runs; `at_boundaries` again if each run ends at one
    boundary. scanned: whether a scan has anything to add.
    """

    at_boundaries: Tensor
    totals: Tensor
    length: int
    per_sequence: int
    scanned: bool = True


class ScanEnds(NamedTuple):
    """Hold what is added before all tokens, and where the sum after all of them goes, products and moments."""

    initial: tuple[Tensor, Tensor] | None
    final: tuple[Tensor, Tensor] | None


@triton.jit
def scan_runs(
    state_ptr,
    totals_ptr,
    initial_ptr,
    final_ptr,
    offs,
    size,
    first_position_ptr,
    sequence,
    h,
    Hkv,
    T,
    last,
    slot,
    run_0,
    CHUNK,
    RUN,
    weight,
    EMPTY,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_TABLES: tl.constexpr,
    IN_PLACE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    KEEP_FINAL: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
):
    """Compute S_b = initial + sum of the runs before boundary b (REVERSE: after it), for some elements of one sequence
    and head. What stands after all runs goes to `final`. IN_PLACE: each run is one boundary, and its own total. EMPTY:
    nothing was stored, for want of keys.
    """
    # Over 60 lines: half of them are the signature.
    inside = offs < size
    state_ptr += (tl.cast(slot, tl.int64) * Hkv + h) * size + offs
    totals_ptr += (tl.cast(run_0, tl.int64) * Hkv + h) * size + offs
    step = tl.cast(Hkv, tl.int64) * size
    of_sequence = (tl.cast(sequence, tl.int64) * Hkv + h) * size + offs
    carry = tl.zeros([BLOCK], tl.float32)
    if HAS_INITIAL:
        carry = tl.load(initial_ptr + of_sequence, mask=inside, other=0.0)
    if CAUSAL:
        for i in range(last + 1):
            boundary = last - i if REVERSE else i
            local = tl.load(state_ptr + boundary * step, mask=inside, other=0.0).to(tl.float32)
            total = tl.where(EMPTY, 0.0, local) + carry * weight
            tl.store(state_ptr + boundary * step, round_to(total, STATE_DTYPE), mask=inside)
            if IN_PLACE:
                carry = total
            else:
                done = i + 1 if REVERSE else i
                if (done > 0) & ((done % (RUN // CHUNK) == 0) | (i == last)):
                    carry += tl.load(totals_ptr + (done - 1) // (RUN // CHUNK) * step, mask=inside, other=0.0)
    else:
        before = carry
        for i in range(tl.cdiv(T, RUN)):
            carry += tl.load(totals_ptr + i * step, mask=inside, other=0.0)
        after = carry
        if REVERSE:
            if HAS_TABLES:
                few = tl.load(first_position_ptr + slot + 1) > 0
                after = tl.where(few, before, carry)
            before = carry
        tl.store(state_ptr, round_to(before * weight, STATE_DTYPE), mask=inside)
        tl.store(state_ptr + step, round_to(after * weight, STATE_DTYPE), mask=inside)
    if KEEP_FINAL:
        tl.store(final_ptr + of_sequence, carry, mask=inside)


@triton.jit
def state_scan_kernel(
    products_ptr,
    product_totals_ptr,
    initial_products_ptr,
    final_products_ptr,
    moments_ptr,
    moment_totals_ptr,
    initial_moments_ptr,
    final_moments_ptr,
    cu_seqlens_ptr,
    first_position_ptr,
    T,
    Tk,
    Hkv,
    moments_size,
    CHUNK,
    PRODUCT_RUN,
    num_product_runs,
    MOMENT_RUN,
    num_moment_runs,
    num_boundaries,
    weight,
    PRODUCT_PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    REVERSE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_TABLES: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    KEEP_FINAL: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
):
    """Compute S_b = initial + sum of the runs before boundary b (REVERSE: after it). Of the programs of a sequence and
    head, the first PRODUCT_PROGRAMS scan the products, runs of PRODUCT_RUN tokens, and the others the moments.
    """
    # Long because the accumulators stay in registers for all of one pass.
    # Over 60 lines: half of them are the signature, and the two calls differ in most of their arguments.
    block, sequence, h = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _, T = bounds_of(sequence, cu_seqlens_ptr, T, PACKED)
    Tk = T if PACKED else Tk
    last = last_boundary(Tk, CHUNK, CAUSAL)
    slot = slot_of(sequence, cu_seqlens_ptr, CHUNK, num_boundaries, CAUSAL, PACKED)
    offs = tl.arange(0, BLOCK)
    if block < PRODUCT_PROGRAMS:
        scan_runs(
            products_ptr,
            product_totals_ptr,
            initial_products_ptr,
            final_products_ptr,
            block * BLOCK + offs,
            BLOCK_D * (BLOCK_D + 16) // 2 * BLOCK_DV,
            first_position_ptr,
            sequence,
            h,
            Hkv,
            T,
            last,
            slot,
            first_run_of(sequence, cu_seqlens_ptr, PRODUCT_RUN, num_product_runs, PACKED),
            CHUNK,
            PRODUCT_RUN,
            weight,
            Tk == 0,
            BLOCK=BLOCK,
            REVERSE=REVERSE,
            CAUSAL=CAUSAL,
            HAS_TABLES=HAS_TABLES,
            IN_PLACE=False,
            HAS_INITIAL=HAS_INITIAL,
            KEEP_FINAL=KEEP_FINAL,
            STATE_DTYPE=STATE_DTYPE,
        )
    else:
        scan_runs(
            moments_ptr,
            moment_totals_ptr,
            initial_moments_ptr,
            final_moments_ptr,
            (block - PRODUCT_PROGRAMS) * BLOCK + offs,
            moments_size,
            first_position_ptr,
            sequence,
            h,
            Hkv,
            T,
            last,
            slot,
            first_run_of(sequence, cu_seqlens_ptr, MOMENT_RUN, num_moment_runs, PACKED),
            CHUNK,
            MOMENT_RUN,
            1.0,
            Tk == 0,
            BLOCK=BLOCK,
            REVERSE=REVERSE,
            CAUSAL=CAUSAL,
            HAS_TABLES=HAS_TABLES,
            IN_PLACE=CAUSAL,
            HAS_INITIAL=HAS_INITIAL,
            KEEP_FINAL=KEEP_FINAL,
            STATE_DTYPE=tl.float32,
        )


def launch_scan(
    problem: ChunkedProblem, T: int, products: RunSums, moments: RunSums, ends: ScanEnds, reverse: bool
) -> None:
    """Turn sums within runs into states, in place. T: tokens that were summed over, of a sequence not packed."""
    size = problem.moments_size
    initial, final = ends.initial or (None, None), ends.final or (None, None)
    elements = problem.feature_count * problem.block_dv
    product_programs = triton.cdiv(elements, SCAN.BLOCK_T) if products.scanned else 0
    launch(
        state_scan_kernel,
        (product_programs + triton.cdiv(size, SCAN.BLOCK_T), problem.num_seqs, problem.kv_heads),
        num_warps=SCAN.num_warps,
        num_stages=SCAN.num_stages,
        **problem.schedule_args(),
        **problem.first_position_args(),
        products_ptr=products.at_boundaries,
        product_totals_ptr=products.totals,
        initial_products_ptr=initial[0],
        final_products_ptr=final[0],
        moments_ptr=moments.at_boundaries,
        moment_totals_ptr=moments.totals,
        initial_moments_ptr=initial[1],
        final_moments_ptr=final[1],
        T=T,
        Tk=problem.k.shape[2],
        Hkv=problem.kv_heads,
        moments_size=size,
        PRODUCT_RUN=products.length,
        num_product_runs=products.per_sequence,
        MOMENT_RUN=moments.length,
        num_moment_runs=moments.per_sequence,
        weight=1.0 if reverse else 2 * problem.weights[2],
        PRODUCT_PROGRAMS=product_programs,
        BLOCK=SCAN.BLOCK_T,
        BLOCK_D=problem.block_d,
        BLOCK_DV=problem.block_dv,
        REVERSE=reverse,
        HAS_INITIAL=initial[0] is not None,
        KEEP_FINAL=final[0] is not None,
        STATE_DTYPE=TRITON_DTYPE[products.at_boundaries.dtype],
    )
