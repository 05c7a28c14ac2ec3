from typing import Protocol, TypedDict, TypeVar

_Options = TypeVar("_Options", contravariant=True)

class BuildInfo(TypedDict):
    version: str
    compiler: str
    cxx_standard: int
    architecture: str
    build_type: str
    stable_abi: bool

_Strided = tuple[int, ...]
_Addresses = list[int]

class AttentionProblem:
    def __init__(
        self,
        dtype: int,
        sizes: tuple[int, int, int, int, int, int, int],
        q: _Strided,
        k: _Strided,
        v: _Strided,
        key_mask: int,
        cu_seqlens: int,
        sequences: int,
        is_causal: bool,
        q_offset: int,
        scale: float,
        normalize: bool,
        threads: int,
        /,
    ) -> None: ...

class QuadraticOptions:
    def __init__(self, c0: float, c1: float, c2: float, form: int, chunk: int, /) -> None: ...

class FeatureMapOptions:
    def __init__(self, map: int, chunk: int, /) -> None: ...

class _Forward(Protocol[_Options]):
    def __call__(
        self,
        problem: AttentionProblem,
        options: _Options,
        out: _Strided,
        l: int,
        before: _Addresses,
        after: _Addresses,
        /,
    ) -> None: ...

class _Backward(Protocol[_Options]):
    def __call__(
        self,
        problem: AttentionProblem,
        options: _Options,
        out: _Strided,
        l: int,
        before: _Addresses,
        dout: _Strided,
        dq: _Strided,
        dk: _Strided,
        dv: _Strided,
        dafter: _Addresses,
        dbefore: _Addresses,
        /,
    ) -> None: ...

quadratic_forward: _Forward[QuadraticOptions]
quadratic_backward: _Backward[QuadraticOptions]
feature_map_forward: _Forward[FeatureMapOptions]
feature_map_backward: _Backward[FeatureMapOptions]

def recurrent_forward(
    cell: int,
    sizes: tuple[int, ...],
    shared: _Addresses,
    threads: int,
    projected: tuple[int, int, int],
    last: _Addresses,
    /,
) -> None: ...
def recurrent_backward(
    cell: int,
    sizes: tuple[int, ...],
    shared: _Addresses,
    threads: int,
    grad_outputs: _Addresses,
    grad_inputs: _Addresses,
    /,
) -> None: ...
def capability() -> str: ...
def capabilities() -> list[str]: ...
def instruction_sets() -> list[str]: ...
def hardware_threads() -> int: ...
def build_info() -> BuildInfo: ...
