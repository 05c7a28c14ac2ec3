"""`linattn info`: what is installed, what this machine can do and which backends are ready.

Made for bug reports and for a first look. Every probe is guarded: where one fails, the report says so and goes on.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import platform
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

import linattn

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

OPERATIONS = ("softmax", "quadratic", "feature_map", "recurrent")

# The modules that each extra of pyproject.toml brings to users.
EXTRAS = {
    "bench": ("pytest", "matplotlib", "tqdm"),
    "train": ("tqdm", "matplotlib"),
    "studies": ("matplotlib", "sklearn"),
    "tracking": ("tensorboard", "wandb", "matplotlib"),
    "triton": ("triton",),
    "hf": ("transformers",),
}

Report = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --json."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    report = collect()
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 0


def collect() -> Report:
    """Return the whole report, ready for JSON. A probe that failed has `{"error": message}` in its place."""
    probes: dict[str, Callable[[], Any]] = {
        "versions": _versions,
        "platform": platform.platform,
        "native": _native,
        "machine": _machine,
        "cuda": _cuda,
        "backends": _backends,
        "extras": _extras,
    }
    return {name: _guarded(probe) for name, probe in probes.items()}


def render(report: Report) -> str:
    """Lay the report out for people: one line a fact, indented under its heading."""
    lines: list[str] = []
    for heading, facts in report.items():
        _render_fact(lines, heading, facts, depth=0)
    return "\n".join(lines)


def _guarded(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _versions() -> Report:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "linattn": linattn.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "numpy": version("numpy"),
    }


def _load_native() -> Any:
    return importlib.import_module("linattn._native")


def _native() -> Report:
    try:
        native = _load_native()
    except ImportError as error:
        return {"present": False, "reason": _why_not_native(error)}
    build = native.build_info()
    if build["version"] != linattn.__version__:
        reason = f"built for linattn {build['version']}, this is {linattn.__version__}: install again"
        return {"present": False, "reason": reason, "build": build}
    return {"present": True, "build": build}


def _why_not_native(error: ImportError) -> str:
    if importlib.util.find_spec("linattn._native") is not None:
        return f"built, but it cannot be loaded: {error}"
    try:
        importlib.metadata.distribution("linattn")
    except importlib.metadata.PackageNotFoundError:
        return "not built: this is a checkout that was never installed (pip install -e .)"
    return "not built: no working C++20 compiler was found when linattn was installed; get one and install again"


def _machine() -> Report:
    facts: Report = {"torch_threads": torch.get_num_threads()}
    if _native()["present"]:
        native = _load_native()
        facts["hardware_threads"] = native.hardware_threads()
        facts["instruction_sets"] = native.instruction_sets()
    else:
        facts["instruction_sets"] = {"error": "needs the native module"}
    facts["torch_cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    return facts


def _cuda() -> Report:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = "no usable device" if built else "this torch was built without CUDA"
        return {"available": False, "reason": reason, "built_for": built}
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return {"available": True, "built_for": torch.version.cuda, "devices": devices}


def _backends() -> Report:
    dispatch = importlib.import_module("linattn._dispatch.plan")
    return {operation: _guarded(partial(dispatch.backends, operation)) for operation in OPERATIONS}


def _extras() -> Report:
    def state(modules: tuple[str, ...]) -> str:
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        return f"missing: {', '.join(missing)}" if missing else "present"

    return {extra: state(modules) for extra, modules in EXTRAS.items()}


def _render_fact(lines: list[str], name: str, fact: Any, depth: int) -> None:
    indent = "  " * depth
    if isinstance(fact, dict) and set(fact) == {"error"}:
        lines.append(f"{indent}{name}: not known ({fact['error']})")
    elif isinstance(fact, dict):
        lines.append(f"{indent}{name}:")
        for key, value in fact.items():
            _render_fact(lines, key, value, depth + 1)
    elif isinstance(fact, list) and any(isinstance(item, dict) for item in fact):
        for index, item in enumerate(fact):
            _render_fact(lines, f"{name}[{index}]", item, depth)
    elif isinstance(fact, list):
        lines.append(f"{indent}{name}: {' '.join(map(str, fact)) or 'none'}")
    else:
        lines.append(f"{indent}{name}: {_in_words(fact)}")


def _in_words(fact: Any) -> str:
    if isinstance(fact, bool):
        return "yes" if fact else "no"
    return "none" if fact is None else str(fact)
