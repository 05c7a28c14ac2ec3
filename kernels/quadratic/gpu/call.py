"""One call of the chunked form: its sizes, its tables, and the arguments that its kernels share."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from linattn.kernels.common.gpu.architecture import architecture
from linattn.kernels.common.gpu.launch import block_size, launch, strides, with_unit_stride
from linattn.kernels.common.gpu.numerics import TRITON_DTYPE, precision
from linattn.kernels.common.gpu.similarity import quadratic
from linattn.kernels.quadratic.gpu import config, layout

if TYPE_CHECKING:
    from linattn.kernels.common.op.stateful import Plan
    from linattn.kernels.quadratic.contract import Options
    from linattn.kernels.quadratic.gpu.layout import State

FOLD = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.bfloat16}
"""Features and sums of products: of fp16 inputs they may leave the range of fp16."""

TINY = 1e-20
"""A scale of 0, for scores: kernels divide by the slope of a similarity and multiply with it again."""


def gram_precision(dtype: torch.dtype) -> str:
    """bf16 and fp16 are exact in TF32, to which the other factor, an fp32 sum, is rounded."""
    exact = precision(torch.float32)
    return exact if dtype == torch.float32 or exact == "ieee" else "tf32"


def run_kernel(kernel: Any, grid: tuple[int, ...], tile: Any, arguments: dict[str, Any]) -> None:
    """Launch with those of the arguments that the kernel has."""
    mine = {name: arguments[name] for name in kernel.arg_names}
    launch(kernel, grid, num_warps=tile.num_warps, num_stages=tile.num_stages, **mine)


@dataclass(frozen=True)
class Call:
    """One call."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    cu_seqlens: Tensor | None
    options: Options
    row: config.Row
    chunk: int
    all_scores: bool
    n_before: Tensor | None
    heads: int
    """Key heads times sequences of the whole call, of which this may be a part (memory.py)."""

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        initial_state: State,
        options: Options,
        plan: Plan,
    ) -> Call:
        q, k, v = (with_unit_stride(x) for x in (q, k, v))
        # Beyond the last key, or before the first, all offsets are one.
        offset = min(max(options.q_offset, -q.shape[2]), k.shape[2]) if options.is_causal else 0
        row = config.row(architecture(q.device), q.dtype, max(block_size(q.shape[3]), block_size(v.shape[3])))
        whole = plan.form == "direct"
        chunk = k.shape[2] if whole or not options.is_causal else plan.chunk_size or row.chunk
        step = max(row.read.rows, row.pull_rows.rows, row.pull_keys.rows, row.pull_values.rows, row.lost.BLOCK_T)
        chunk = triton.cdiv(chunk, step) * step
        n_before = initial_state[0] if initial_state else None
        heads = k.shape[1] * (q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
        options = options._replace(q_offset=offset)
        return Call(q, k, v, key_mask, cu_seqlens, options, row, chunk, whole, n_before, heads)

    # Sizes.

    @property
    def sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def Hkv(self) -> int:
        return self.k.shape[1]

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def BLOCK_D(self) -> int:
        return block_size(self.q.shape[3])

    @property
    def BLOCK_M(self) -> int:
        return block_size(self.v.shape[3])

    @property
    def boundaries(self) -> int:
        """Slots of one sequence that is not packed."""
        return triton.cdiv(self.k.shape[2], self.chunk) + 1 if self.options.is_causal else 2

    @property
    def slots(self) -> int:
        if self.cu_seqlens is not None and self.options.is_causal:
            return self.k.shape[2] // self.chunk + 2 * self.sequences
        return self.sequences * self.boundaries

    def pieces(self, per_sequence: int, size: int) -> int:
        """How many programs take all pieces of `size` rows of all sequences (places.sequence_of)."""
        if self.cu_seqlens is not None:
            return self.k.shape[2] // size + 2 * self.sequences
        return per_sequence * self.sequences

    @property
    def guarded(self) -> bool:
        """Whether rows are watched whose sums cancel (rows.py). Those of a state cannot be helped: its keys are
        gone.
        """
        return self.options.normalize and self.n_before is None and not self.all_scores

    @property
    def weights(self) -> tuple[float, float, float]:
        """Of 1, q.k and (q.k)^2."""
        o = self.options
        return o.c0, o.c1 * o.scale, o.c2 * o.scale * o.scale

    @functools.cached_property
    def tables(self) -> tuple[Tensor, Tensor] | None:
        """Reads and rows_from, where they are not simply the boundary itself."""
        Tk = self.k.shape[2]
        regular = self.key_mask is None and self.cu_seqlens is None and Tk >= layout.FEW_KEYS
        if regular and not self.all_scores:
            return None
        device, S = self.k.device, self.sequences
        slots = torch.arange(self.slots, device=device)
        if self.cu_seqlens is None:
            starts = torch.arange(S, device=device) * Tk
            ends = starts + Tk
        else:
            starts, ends = self.cu_seqlens[:-1].long(), self.cu_seqlens[1:].long()
        if self.cu_seqlens is not None and self.options.is_causal:
            first = starts // self.chunk + 2 * torch.arange(S, device=device)
            sequence = torch.searchsorted(first, slots, right=True) - 1
            boundary = slots - first[sequence]
        else:
            sequence, boundary = slots // self.boundaries, slots % self.boundaries
        rows = self.k.shape[0] * Tk
        edges = (starts, ends, sequence, boundary)
        causal = self.options.is_causal
        return layout.tables(*edges, self.key_mask, self.n_before, rows, self.chunk, causal, self.all_scores)

    # Arguments that kernels share.

    def constants(self) -> dict[str, Any]:
        D, M = self.q.shape[3], self.v.shape[3]
        reads, rows_from = self.tables or (None, None)
        return {
            "cu_seqlens_ptr": self.cu_seqlens, "S": self.sequences, "q_offset": self.options.q_offset, "CHUNK": self.chunk,
            "slots": self.boundaries, "D": D, "M": M, "BLOCK_D": self.BLOCK_D, "BLOCK_M": self.BLOCK_M,
            "reads_ptr": reads, "rows_from_ptr": rows_from, "TABLE": reads is not None,
            "CAUSAL": self.options.is_causal, "PACKED": self.cu_seqlens is not None,
            "EVEN": D == self.BLOCK_D and M == self.BLOCK_M, "PRECISION": precision(FOLD[self.q.dtype]), "GUARD": self.guarded,
            "GRAM": gram_precision(self.q.dtype), "size": layout.record_size(self.BLOCK_D, self.BLOCK_M),
        }  # fmt: skip

    def pairs(self) -> dict[str, Any]:
        """Rows, keys and what their scores weigh."""
        o, mask = self.options, self.key_mask
        similarity = quadratic(o.scale or TINY, (o.c0, o.c1, o.c2), o.normalize)
        return dict(
            **strides("q", self.q), **strides("k", self.k), **strides("v", self.v),
            key_mask_ptr=mask, stride_mb=0 if mask is None else mask.stride(0), KEY_MASK=mask is not None,
            T=self.q.shape[2], Tk=self.k.shape[2], a=similarity.a, b=similarity.b, c=similarity.c,
            slope=similarity.slope, SIMILARITY=similarity.kind, NORMALIZE=o.normalize, GROUP=self.group,
            LOW=TRITON_DTYPE[self.q.dtype],
        )  # fmt: skip

    def scores(self, read: config.Read) -> dict[str, Any]:
        """What kernels that compute scores and read sums take."""
        return self.constants() | self.pairs() | {"WIDTH": read.WIDTH, "FOLD": TRITON_DTYPE[FOLD[self.q.dtype]]}
