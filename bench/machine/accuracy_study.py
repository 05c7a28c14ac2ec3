"""Errors of the chunked quadratic form on inputs that are hard for it, against float64.

    TRITON_INTERPRET=1 python bench/machine/accuracy_study.py --out bench/results/interpreter/hard-inputs.json

measures the Triton kernels without a GPU, with bf16 and fp16 rounded as a device rounds them, in the tiles of sm_90
(three TF32 products of fp32 inputs are one exact product there); without the variable it measures those of the GPU.
`--no-rescue` leaves rows whose sums cancel as the sums give them. `--backend native` and `--backend reference` measure
the other ones. Causal, one head. Beside each error stands the condition of the rows it was taken from: kappa, and how
many times larger than a row's sum the terms c0 n, c1 q.sum(k) and c2 q.(sum k k^T) q are together.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import linattn
from linattn._util.files import write_json
from linattn._util.tables import text_table
from linattn.bench.measuring.cases import DTYPES
from linattn.bench.measuring.environment import describe
from linattn.kernels.common.op.backend import INTERPRETED
from linattn.kernels.quadratic.gpu import config

if TYPE_CHECKING:
    from collections.abc import Sequence

JUDGED = 64
"""Rows of long sequences, the last of them; gradients are judged where all rows are."""
ALL_ROWS_UP_TO = 1024
CANCELLING = ("near -1", "orthogonal")


@dataclass(frozen=True)
class HardCase:
    """kind: "normal", "positive" (scores > 0, values about 3), "large" (scores beyond the square root of fp16's range),
    "near -1" (all scores within `spread`, standard deviation) or "orthogonal" (queries to keys, but for `spread` of
    their length, in directions that no axis shows; coefficients (0, 0, 1)).
    """

    kind: str
    N: int
    D: int = 32
    spread: float = 0.0

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v `[1, 1, N, D]` in float64, for scale 1."""
        generator = torch.Generator().manual_seed(1)
        q, k, v = (torch.randn(1, 1, self.N, self.D, generator=generator, dtype=torch.float64) for _ in range(3))
        if self.kind == "positive":
            return q.abs() / self.D, k.abs(), v + 3
        if self.kind == "large":
            return 8 * q, 8 * k, v
        if self.kind == "near -1":
            direction, noise = normalize(q[:, :, :1], dim=-1), self.spread / 2**0.5
            return noise * q - direction, noise * k + direction, v
        if self.kind == "orthogonal":
            half, rotation = self.D // 2, torch.linalg.qr(k[0, 0, : self.D])[0]
            q[..., :half], k[..., half:] = self.spread * q[..., :half], 0
            q, k = q @ rotation, k @ rotation
        return q / self.D**0.5, k, v

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """Return the kernel of the case: s^2 of orthogonal inputs, else (1 + s)^2."""
        return (0, 0, 1) if self.kind == "orthogonal" else (1, 2, 1)


CASES = (
    *(HardCase("near -1", 512, D=16, spread=spread) for spread in (0.6, 0.4, 0.15, 0.03)),
    *(HardCase("normal", N) for N in (256, 1024, 4096)),
    *(HardCase("normal", N, D=16) for N in (16384, 65536)),
    HardCase("positive", 1024),
    HardCase("positive", 65536, D=16),
    HardCase("large", 256),
    *(HardCase("near -1", 1024, spread=spread) for spread in (0.5, 0.3, 0.15, 0.03)),
    HardCase("near -1", 16384, D=16, spread=0.15),
    *(HardCase("orthogonal", 1024, spread=spread) for spread in (0.3, 0.03)),
)


def measure(case: HardCase, dtype: str, backend: str, device: str) -> dict[str, Any]:
    """Measure relative errors, by norm, of the output and the worst gradient, and the condition of the queries."""
    low = [x.to(device, DTYPES[dtype]) for x in case.inputs()]
    rows = torch.arange(16, case.N) if case.N <= ALL_ROWS_UP_TO else torch.arange(case.N - JUDGED, case.N)
    training = case.N <= ALL_ROWS_UP_TO
    leaves = [x.requires_grad_(training) for x in low]
    how: dict[str, Any] = {"is_causal": True, "coefficients": case.coefficients, "form": "chunked"}
    with _tiles():
        out = linattn.quadratic_attention(*leaves, **how, backend=backend)
    exact = [x.detach().cpu().double().requires_grad_(training) for x in low]
    q, k, v = exact
    true, kappa, cancellation = _truth(case, q, k, v, rows)
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(true.shape, generator=generator, dtype=torch.float64).to(DTYPES[dtype])
    found = {"case": case.kind, "N": case.N, "D": case.D, "spread": case.spread, "dtype": dtype, "rows": len(rows)}
    found |= {"kappa": kappa, "cancellation": cancellation}
    found |= {"error": _error(out[:, :, rows].detach(), true.detach()), "gradient_error": None}
    if training:
        with _tiles():
            ours = torch.autograd.grad(out[:, :, rows], leaves, upstream.to(device))
        theirs = torch.autograd.grad(true, exact, upstream.double())
        found["gradient_error"] = max(_error(a, b) for a, b in zip(ours, theirs, strict=True))
    return found


def _truth(case: HardCase, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, float, float]:
    """Return queries of the result, and their median kappa and cancellation."""
    c0, c1, c2 = case.coefficients
    q = q[:, :, rows]
    seen = torch.arange(case.N) <= rows[:, None]
    s = (q @ k.mT).where(seen, 0.0)
    p = (c0 + c1 * s + c2 * s.square()).where(seen, 0.0)
    total = p.sum(-1, keepdim=True)
    bound = (q.abs() @ k.abs().mT).where(seen, 0.0)
    largest = (c0 * seen + c1 * bound + c2 * bound.square()).sum(-1)
    terms = c0 * seen.sum(-1) + c1 * s.sum(-1).abs() + c2 * s.square().sum(-1)
    return p @ v / total, (largest / total[..., 0]).median().item(), (terms / total[..., 0]).median().item()


def _tiles() -> contextlib.AbstractContextManager[None]:
    """Choose the architecture whose tiles are used: the interpreter's own are small, for tests."""
    if not INTERPRETED:
        return contextlib.nullcontext()
    from linattn.kernels.common.gpu.architecture import as_architecture

    return as_architecture("sm_90")


def _error(actual: Tensor, true: Tensor) -> float:
    return float((actual.cpu().double() - true).norm() / true.norm())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every case and form, print the table, save every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="triton", help="triton, native or reference (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--longest", type=int, default=65536, metavar="N", help="leave out longer cases (%(default)s)")
    parser.add_argument(
        "--no-rescue", action="store_true", help="only the cases whose sums cancel, not computed from scores"
    )
    parser.add_argument("--out", type=Path, help="write a JSON file")
    args = parser.parse_args(argv)
    cases = [case for case in CASES if args.longest >= case.N]
    if args.no_rescue:
        config.MAX_CANCELLATION = dict.fromkeys(config.MAX_CANCELLATION, math.inf)
        cases = [case for case in cases if case.kind in CANCELLING]
    found = []
    for case in cases:
        for dtype in ("fp32", "bf16", "fp16"):
            found.append(measure(case, dtype, args.backend, args.device))
            print({name: found[-1][name] for name in ("case", "N", "dtype", "error")}, file=sys.stderr, flush=True)
        if args.out:
            _write(
                args.out,
                {"backend": args.backend, "interpreted": INTERPRETED, "rescue": not args.no_rescue, "rows": found},
                args.device,
            )
    header = ("case", "spread", "N", "D", "dtype", "kappa", "cancellation", "error", "gradient error")
    print(text_table(header, [_cells(row) for row in found]))
    return 0


def _write(path: Path, content: dict[str, Any], device: str) -> None:
    content |= {"environment": asdict(describe(torch.device(device)))}
    write_json(path, content)


def _cells(row: dict[str, Any]) -> list[str]:
    error = row["gradient_error"]
    numbers = [f"{row['kappa']:.0f}", f"{row['cancellation']:.1f}", f"{row['error']:.1e}"]
    about = [row["case"], f"{row['spread']:g}" if row["spread"] else "", str(row["N"]), str(row["D"]), row["dtype"]]
    return [*about, *numbers, "" if error is None else f"{error:.1e}"]


if __name__ == "__main__":
    raise SystemExit(main())
