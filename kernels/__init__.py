"""Hand-written kernels, one folder an operation. Imported as `linattn.kernels`."""

from __future__ import annotations

if __name__ != "linattn.kernels":
    raise ImportError(
        f"this folder was imported as {__name__!r}; it is part of linattn: import linattn.kernels. "
        "(Another package named 'kernels' is installed? Then keep linattn's repository off sys.path: python -P.)"
    )
