"""One call: its tensors, its sizes, and the arguments that its kernels share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from linattn.kernels.common.gpu.architecture import architecture
from linattn.kernels.common.gpu.launch import with_unit_stride
from linattn.kernels.common.gpu.numerics import TRITON_DTYPE, precision
from linattn.kernels.common.gpu.varlen_schedule import max_tiles
from linattn.kernels.common.op.backend import INTERPRETED
from linattn.kernels.feature_map.gpu.config import configuration

if TYPE_CHECKING:
    from linattn.kernels.feature_map.contract import Options

State = list[Tensor]


class FeatureMapCall:
    """One call. q, k and v have unit stride (common/gpu/launch.py)."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None, options: Options
    ) -> None:
        self.q, self.k, self.v = with_unit_stride(q), with_unit_stride(k), with_unit_stride(v)
        self.key_mask, self.cu_seqlens = key_mask, cu_seqlens
        dense_mask = None if key_mask is None else key_mask.contiguous()
        self.D, self.M, self.Hkv = q.shape[3], v.shape[3], k.shape[1]
        self.is_causal = options.is_causal
        self.num_seqs = q.shape[0]
        if cu_seqlens is not None:
            self.cu_seqlens, self.num_seqs = cu_seqlens.contiguous(), cu_seqlens.shape[0] - 1
        self.q_offset = min(max(options.q_offset, -q.shape[2]), k.shape[2]) if options.is_causal else 0
        self.config = configuration(architecture(q.device), q.dtype, self.D, self.M)
        self.shared: dict[str, Any] = {
            # A view as bytes, since Triton's masks are not stored as bits.
            "key_mask_ptr": None if dense_mask is None else dense_mask.view(torch.uint8),
            "cu_seqlens_ptr": self.cu_seqlens,
            "stride_mb": 0 if dense_mask is None else dense_mask.stride(0),
            "Hkv": self.Hkv,
            "Tq": q.shape[2],
            "Tk": k.shape[2],
            "q_offset": self.q_offset,
            "scale": options.scale,
            "GROUP": q.shape[1] // self.Hkv,
            "D": self.D,
            "M": self.M,
            "MAP": options.feature_map,
            "NORMALIZE": options.normalize,
            "PACKED": cu_seqlens is not None,
            "MASKED": key_mask is not None,
        }
        """Arguments of every kernel."""
        # fp16 is multiplied as TF32: as many digits, and sums and their gradients stay in range.
        is_half = q.dtype == torch.float16
        self.product_dtype = torch.float32 if is_half else q.dtype
        in_tf32 = is_half and not INTERPRETED and not torch.version.hip
        self.products: dict[str, Any] = {
            "IS_CAUSAL": options.is_causal,
            "PRODUCT_DTYPE": TRITON_DTYPE[self.product_dtype],
            "PRECISION": "tf32" if in_tf32 else precision(q.dtype),
        }
        """Arguments of every kernel of the chunked form beside those."""

    def num_tiles(self, chunk: int, from_keys: bool) -> tuple[int, int]:
        """Return how many tiles of queries (and keys) a grid holds for each batch element, and how many of them share
        a tile number of the varlen schedule (chunk_schedule.py).
        """
        Tq, Tk = self.q.shape[2], self.k.shape[2]
        if self.cu_seqlens is not None:
            tiles_per_number = 1 if self.q_offset == 0 else 2
            return tiles_per_number * max_tiles(Tk, chunk, self.num_seqs), tiles_per_number
        first, end = self.q_offset // chunk, triton.cdiv(Tq + self.q_offset, chunk)
        if from_keys:
            first, end = min(first, 0), max(end, triton.cdiv(Tk, chunk))
        return end - first, 1

    def num_states(self, chunk: int, splits: int) -> int:
        """Return how many states a scan stores for each head: of every chunk, if causal, and of every split
        (chunk_schedule.py).
        """
        if not self.is_causal:
            return self.num_seqs * splits
        if self.cu_seqlens is not None:
            return max_tiles(self.k.shape[2], chunk, self.num_seqs, spare=1 + splits)
        return self.num_seqs * (triton.cdiv(self.k.shape[2], chunk) + splits)

    def empty_state(self, *leading: int) -> State:
        """Allocate z and S, for every key head of `leading`."""
        sizes = ((self.D,), (self.D, self.M))
        return [self.k.new_empty(*leading, self.Hkv, *size, dtype=torch.float32) for size in sizes]

    def count_keys(self, initial_state: State) -> Tensor:
        """Return n of the state after this call."""
        if self.cu_seqlens is not None:
            ends = self.cu_seqlens.long()
            if self.key_mask is not None:
                counted = torch.nn.functional.pad(self.key_mask[0].cumsum(0), (1, 0))
                ends = counted[ends]
            n = ends[1:] - ends[:-1]
        elif self.key_mask is not None:
            n = self.key_mask.sum(1)
        else:
            n = torch.full((self.num_seqs,), self.k.shape[2], dtype=torch.int64, device=self.k.device)
        return n + initial_state[0] if initial_state else n
