from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    cxx_standard: int
    architecture: str
    build_type: str
    stable_abi: bool

_Strided = tuple[int, int, int, int]
_Addresses = tuple[int, ...]

class Problem:
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

def quadratic_forward(
    problem: Problem,
    coefficients: tuple[float, float, float],
    form: int,
    chunk: int,
    out: _Strided,
    l: int,
    before: _Addresses,
    after: _Addresses,
    /,
) -> None: ...
def quadratic_backward(
    problem: Problem,
    coefficients: tuple[float, float, float],
    form: int,
    chunk: int,
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
def feature_map_forward(
    problem: Problem, map: int, chunk: int, out: _Strided, l: int, before: _Addresses, after: _Addresses, /
) -> None: ...
def feature_map_backward(
    problem: Problem,
    map: int,
    chunk: int,
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
    arriving: _Addresses,
    wanted: _Addresses,
    /,
) -> None: ...
def capability() -> str: ...
def capabilities() -> list[str]: ...
def instruction_sets() -> list[str]: ...
def hardware_threads() -> int: ...
def build_info() -> BuildInfo: ...
