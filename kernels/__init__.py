"""Hand-written kernels, one folder an operation. Imported as `linattn.kernels`."""

from __future__ import annotations

if __name__ != "linattn.kernels":
    # With the repository on sys.path, as in an editable install, this folder answers to the name of another package.
    # Those who look for that one (transformers does) are told of a version too old for anything, and nothing is inside.
    __version__ = "0"
    __path__ = []

    def __getattr__(name: str) -> object:
        raise ImportError(
            f"this folder was imported as {__name__!r}; it is part of linattn: import linattn.kernels. "
            "(Another package named 'kernels' is installed? Then keep linattn's repository off sys.path: python -P.)"
        )
