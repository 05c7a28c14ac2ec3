"""Let `pytest` find the package in a checkout that was never installed, and add the option `--benchmark`.

Plain `pytest` runs the tests and never measures a time; `pytest --benchmark` runs `bench/suite/bench_*.py` and nothing
else.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
BENCH = ROOT / "bench"
SUITE = BENCH / "suite"
# An installed linattn comes first.
sys.path.append(str(ROOT))

# Workers of `-n` share the cores. Threads that wait by spinning take them from another worker's: with two workers of
# two threads on two busy cores, some tests took 108 s of CPU time, and 40 s once they slept. Two threads, since that
# is what teams are tested with. It stands here because OpenMP reads it when a worker loads torch.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Count the workers of `-n auto`: one a core, but two at least, so that every run shows what runs side by side."""
    return max(2, len(os.sched_getaffinity(0)))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the benchmarks."""
    group = parser.getgroup("linattn benchmarks")
    group.addoption("--benchmark", action="store_true", help="measure bench/suite/ instead of running the tests")
    group.addoption(
        "--benchmark-quick", action="store_true", help="the same in under 2 minutes: shorter, fewer repeats"
    )
    group.addoption(
        "--benchmark-out",
        metavar="DIR",
        default=str(ROOT / "runs" / "benchmark"),
        help="folder for results.json and results.csv, written with the equals sign (%(default)s)",
    )


def _measuring(config: pytest.Config) -> bool:
    return bool(config.getoption("--benchmark") or config.getoption("--benchmark-quick"))


def pytest_configure(config: pytest.Config) -> None:
    """Let the benchmark plugin in when something is to be measured."""
    if not _measuring(config):
        return
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("--benchmark got -n: processes side by side disturb each other's times; drop -n")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(SUITE)]
    from linattn.bench.suite.pytest_plugin import BenchmarkPlugin

    plugin = BenchmarkPlugin(Path(config.getoption("--benchmark-out")), quick=config.getoption("--benchmark-quick"))
    config.pluginmanager.register(plugin, "linattn-benchmark")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out bench/ for tests, and tests/ for benchmarks."""
    if _measuring(config):
        return True if collection_path == ROOT / "tests" else None
    return True if collection_path == BENCH or BENCH in collection_path.parents else None


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Collect the files of the suite, whose names are not those of tests."""
    # A file that was named on the command line is collected by pytest itself.
    named = parent.session.isinitpath(file_path)
    if _measuring(parent.config) and not named and file_path.parent == SUITE and file_path.match("bench_*.py"):
        module: pytest.Module = pytest.Module.from_parent(parent, path=file_path)
        return module
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip benchmarks that were named on the command line without the option."""
    if _measuring(config):
        return
    for item in items:
        if BENCH in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="benchmarks run only with --benchmark"))
