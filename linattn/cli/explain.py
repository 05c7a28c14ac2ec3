"""`linattn explain`: ask, for a call described on the command line, what `linattn.explain` says of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import linattn
from linattn.errors import ArgumentError, DeviceError, refusal

if TYPE_CHECKING:
    import argparse

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the call to explain."""
    parser.add_argument("--kernel", default="quadratic", help="softmax, quadratic, taylor or a feature map's name")
    parser.add_argument(
        "--shape",
        type=int,
        nargs="+",
        required=True,
        metavar="SIZE",
        help="B H N D [M]: batch, heads, length, head size, and the values' head size where it differs",
    )
    parser.add_argument("--causal", action="store_true", help="each position sees itself and earlier ones only")
    parser.add_argument("--dtype", default="float32", choices=sorted(DTYPES))
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--backend", default="auto", help="a backend by name, or auto")
    parser.add_argument("--form", help="direct, chunked, recurrent or auto, for kernels that have a choice")


def run(args: argparse.Namespace) -> int:
    """Print the explanation."""
    q, k, v = _inputs(args.shape, DTYPES[args.dtype], args.device)
    # Only some kernels have a choice of forms.
    options: dict[str, Any] = {} if args.form is None else {"form": args.form}
    print(linattn.explain(q, k, v, kernel=args.kernel, is_causal=args.causal, backend=args.backend, **options))
    return 0


def _inputs(shape: list[int], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if len(shape) not in (4, 5):
        raise refusal(
            ArgumentError,
            "--shape has the wrong number of sizes",
            given=f"{len(shape)} sizes: {shape}",
            accepted="B H N D or B H N D M",
        )
    if min(shape) < 1:
        raise refusal(ArgumentError, "--shape has a size below 1", given=shape, accepted="sizes of at least 1")
    batch, heads, length, size = shape[:4]
    try:
        # One element seen from every position: a question about a million tokens must not need their memory.
        element = torch.zeros((), dtype=dtype, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"--device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    keys = element.expand(batch, heads, length, size)
    return keys, keys, element.expand(batch, heads, length, shape[-1])
