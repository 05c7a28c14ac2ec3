"""One call of the chunked form: its sizes, its tables, and the arguments that its kernels share."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from linattn.kernels.common.gpu.architecture import architecture
from linattn.kernels.common.gpu.launch import block_size, strides_bht, with_unit_stride
from linattn.kernels.common.gpu.numerics import TRITON_DTYPE, precision
from linattn.kernels.common.gpu.similarity import Similarity, quadratic
from linattn.kernels.common.gpu.varlen_schedule import max_tiles
from linattn.kernels.common.op.conditioning import DIRECT_KEYS
from linattn.kernels.common.op.varlen import check_sequences
from linattn.kernels.quadratic.gpu import config, state_layout
from linattn.kernels.quadratic.gpu.chunk_schedule import SPARE

if TYPE_CHECKING:
    from linattn.kernels.common.op.stateful import BackwardInputs, ForwardInputs
    from linattn.kernels.quadratic.contract import Options

STATE_DTYPE = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.bfloat16}
"""Features and products of a state: of fp16 inputs they may leave the range of fp16."""

TINY = 1e-20
"""A scale of 0, for scores: kernels divide by the slope of a similarity and multiply with it again."""


def gram_precision(dtype: torch.dtype) -> str:
    """Return how x and Gram matrices are multiplied. bf16 and fp16 are exact in TF32, to which the other factor, an
    fp32 sum, is rounded.
    """
    exact = precision(torch.float32)
    return exact if dtype == torch.float32 or exact == "ieee" else "tf32"


@dataclass(frozen=True)
class ChunkedProblem:
    """One call."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    cu_seqlens: Tensor | None
    options: Options
    tiles: config.KernelConfig
    chunk: int
    all_scores: bool
    n_before: Tensor | None
    total_heads: int
    """Key heads times sequences of the whole call, of which this may be a group (workspace.py)."""

    @staticmethod
    def of(inputs: ForwardInputs | BackwardInputs) -> ChunkedProblem:
        """Choose tiles and the chunk, and make inputs such as kernels take them."""
        options, plan, cu_seqlens = inputs.options, inputs.plan, inputs.cu_seqlens
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.contiguous()
        q, k, v = (with_unit_stride(x) for x in (inputs.q, inputs.k, inputs.v))
        # Beyond the last key, or before the first, all offsets are one.
        q_offset = min(max(options.q_offset, -q.shape[2]), k.shape[2]) if options.is_causal else 0
        head_size = max(block_size(q.shape[3]), block_size(v.shape[3]))
        tiles = config.configuration(architecture(q.device), q.dtype, head_size)
        all_scores = plan.form == "direct"
        chunk = k.shape[2] if all_scores or not options.is_causal else plan.chunk_size or tiles.chunk
        chunk = triton.cdiv(chunk, tiles.chunk_unit) * tiles.chunk_unit
        n_before = inputs.initial_state[0] if inputs.initial_state else None
        total_heads = k.shape[1] * (q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
        options = options._replace(q_offset=q_offset)
        tensors = (q, k, v, inputs.key_mask, cu_seqlens)
        return ChunkedProblem(*tensors, options, tiles, chunk, all_scores, n_before, total_heads)

    def check(self) -> None:
        """Raise if `cu_seqlens` do not partition the tokens."""
        if self.cu_seqlens is not None:
            check_sequences(self.cu_seqlens, self.q.shape[2])

    # Sizes.

    @property
    def num_seqs(self) -> int:
        """Packed sequences, else batch elements."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def kv_heads(self) -> int:
        """Key heads."""
        return self.k.shape[1]

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def block_d(self) -> int:
        """D, rounded up to the side of a tile."""
        return block_size(self.q.shape[3])

    @property
    def block_dv(self) -> int:
        """M, rounded up to the side of a tile."""
        return block_size(self.v.shape[3])

    @property
    def feature_count(self) -> int:
        """Features of degree 2, as they are stored."""
        return state_layout.feature_count(self.block_d)

    @property
    def moments_size(self) -> int:
        """Numbers of the moments of one head."""
        return state_layout.moments_size(self.block_d, self.block_dv)

    @property
    def num_boundaries(self) -> int:
        """Slots of one sequence that is not packed."""
        return triton.cdiv(self.k.shape[2], self.chunk) + 1 if self.options.is_causal else 2

    @property
    def slots(self) -> int:
        """States of all sequences."""
        if self.cu_seqlens is not None and self.options.is_causal:
            return max_tiles(self.k.shape[2], self.chunk, self.num_seqs, SPARE.value)
        return self.num_seqs * self.num_boundaries

    def num_programs(self, per_sequence: int, size: int) -> int:
        """Count programs for all tiles of `size` tokens of all sequences (chunk_schedule.locate_tile)."""
        if self.cu_seqlens is not None:
            return max_tiles(self.k.shape[2], size, self.num_seqs, SPARE.value)
        return per_sequence * self.num_seqs

    def query_tiles(self, size: int) -> tuple[int, int]:
        """Return the position of the first tile of queries and how many there are, of a sequence that is not packed.
        Tiles begin at multiples of their size of positions.
        """
        q_offset = self.options.q_offset
        first = q_offset // size * size
        return first, triton.cdiv(self.q.shape[2] + q_offset - first, size)

    @property
    def check_cancellation(self) -> bool:
        """Whether queries are looked for whose sums cancel (chunk_output.py). Those of a state cannot be helped: its
        keys are gone.
        """
        return self.options.normalize and self.n_before is None and not self.all_scores

    @property
    def weights(self) -> tuple[float, float, float]:
        """The factors of 1, q.k and (q.k)^2."""
        o = self.options
        return o.c0, o.c1 * o.scale, o.c2 * o.scale * o.scale

    @property
    def similarity(self) -> Similarity:
        """Weight of a score, as kernels evaluate it."""
        o = self.options
        return quadratic(o.scale or TINY, (o.c0, o.c1, o.c2), o.normalize)

    @functools.cached_property
    def tables(self) -> tuple[Tensor, Tensor] | None:
        """The tables `state_boundary` and `first_position`, where they are not simply the boundary itself."""
        Tk = self.k.shape[2]
        regular = self.key_mask is None and self.cu_seqlens is None and Tk >= DIRECT_KEYS
        if regular and not self.all_scores:
            return None
        device, num_seqs = self.k.device, self.num_seqs
        slots = torch.arange(self.slots, device=device)
        if self.cu_seqlens is None:
            starts = torch.arange(num_seqs, device=device) * Tk
            ends = starts + Tk
        else:
            starts, ends = self.cu_seqlens[:-1].long(), self.cu_seqlens[1:].long()
        if self.cu_seqlens is not None and self.options.is_causal:
            first = starts // self.chunk + SPARE.value * torch.arange(num_seqs, device=device)
            sequence = torch.searchsorted(first, slots, right=True) - 1
            boundary = slots - first[sequence]
        else:
            sequence, boundary = slots // self.num_boundaries, slots % self.num_boundaries
        return state_layout.boundary_tables(
            starts,
            ends,
            sequence,
            boundary,
            self.key_mask,
            self.n_before,
            self.k.shape[0] * Tk,
            self.chunk,
            self.options.is_causal,
            self.all_scores,
        )

    # Arguments that kernels share.

    def schedule_args(self) -> dict[str, Any]:
        """Where boundaries lie, for every kernel of the chunked form."""
        return {
            "cu_seqlens_ptr": self.cu_seqlens,
            "CHUNK": self.chunk,
            "num_boundaries": self.num_boundaries,
            "CAUSAL": self.options.is_causal,
            "PACKED": self.cu_seqlens is not None,
        }

    def state_boundary_args(self) -> dict[str, Any]:
        """Which state queries multiply with, for kernels with a tile of queries."""
        return {
            "state_boundary_ptr": self.tables[0] if self.tables else None,
            "HAS_TABLES": self.tables is not None,
        }

    def first_position_args(self) -> dict[str, Any]:
        """Which queries multiply with a state, for kernels that sum over queries."""
        return {
            "first_position_ptr": self.tables[1] if self.tables else None,
            "HAS_TABLES": self.tables is not None,
        }

    def size_args(self) -> dict[str, Any]:
        """Head sizes, for every kernel that loads tokens."""
        D, M = self.q.shape[3], self.v.shape[3]
        return {
            "D": D,
            "M": M,
            "BLOCK_D": self.block_d,
            "BLOCK_DV": self.block_dv,
            "EVEN": self.block_d == D and self.block_dv == M,
        }

    def qkv_args(self) -> dict[str, Any]:
        """q, k, v and which keys count, for every kernel that computes scores."""
        return {
            "q_ptr": self.q,
            "k_ptr": self.k,
            "v_ptr": self.v,
            "stride_q": strides_bht(self.q),
            "stride_k": strides_bht(self.k),
            "stride_v": strides_bht(self.v),
            "key_mask_ptr": self.key_mask,
            "stride_mb": 0 if self.key_mask is None else self.key_mask.stride(0),
            "KEY_MASK": self.key_mask is not None,
            "T": self.q.shape[2],
            "Tk": self.k.shape[2],
            "GROUP": self.group,
        }

    def similarity_args(self) -> dict[str, Any]:
        """How a score turns into a weight, for every kernel that computes scores."""
        similarity = self.similarity
        return {
            "a": similarity.a,
            "b": similarity.b,
            "c": similarity.c,
            "SIMILARITY": similarity.kind,
            "IN_DTYPE": TRITON_DTYPE[self.q.dtype],
        }

    def inter_chunk_args(self, tile: config.ChunkTile) -> dict[str, Any]:
        """How a tile is multiplied with a state, and the tile itself."""
        return {
            "moments_size": self.moments_size,
            "BLOCK_T": tile.BLOCK_T,
            "BLOCK_N": tile.BLOCK_N,
            "WIDTH": tile.WIDTH,
            "STATE_DTYPE": TRITON_DTYPE[STATE_DTYPE[self.q.dtype]],
            "PRECISION": precision(STATE_DTYPE[self.q.dtype]),
            "GRAM_PRECISION": gram_precision(self.q.dtype),
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }
