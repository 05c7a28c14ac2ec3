from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    cxx_standard: int
    architecture: str
    build_type: str
    stable_abi: bool

def instruction_sets() -> list[str]: ...
def hardware_threads() -> int: ...
def build_info() -> BuildInfo: ...
