"""Peak memory of one call, beyond its inputs: results, saved tensors and working memory.

On CUDA: `torch.cuda.max_memory_allocated` less what was allocated before. On CPU: growth of the peak resident set
(VmHWM) of a separate process that does nothing else, so that the thread pool and allocator of the timed process do not
blur it and memory taken outside torch's allocator counts too. That needs Linux; elsewhere it is not measured.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

import linattn
from linattn.bench.measuring.cases import DTYPES, Method, Problem, prepare

if TYPE_CHECKING:
    from types import TracebackType

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
MIB = 2**20


class MemoryProbe:
    """Measures peaks; on CPU it keeps one child process, started at the first question and ended with the context."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._worker: subprocess.Popen[str] | None = None

    @property
    def how(self) -> str:
        """Say how peaks are measured here."""
        if self._device.type == "cuda":
            return "torch.cuda.max_memory_allocated beyond the inputs"
        if _can_measure_cpu():
            return "growth of the peak resident set of a process of its own beyond the inputs"
        return "not measured: this system cannot reset the peak resident set"

    def __enter__(self) -> MemoryProbe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def peak_mib(self, method: Method, problem: Problem) -> float | None:
        """Measure the peak MiB of one call; None where it cannot be measured, or where the call did not fit into
        memory.
        """
        if self._device.type == "cuda":
            return _peak_on_cuda(method, problem, self._device)
        if not _can_measure_cpu():
            return None
        stdin, stdout = self._pipes()
        question = json.dumps({"method": asdict(method), "problem": asdict(problem)})
        try:
            stdin.write(question + "\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.close()
            return None
        peak: float | None = json.loads(answer)
        return peak

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        if self._worker is None:
            folder = str(Path(linattn.__file__).resolve().parents[1])
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")])),
                # Otherwise glibc keeps freed blocks, and a second call finds its memory already resident.
                "MALLOC_MMAP_THRESHOLD_": "65536",
                "MALLOC_TRIM_THRESHOLD_": "65536",
            }
            self._worker = subprocess.Popen(
                [sys.executable, "-m", "linattn.bench.measuring.memory", str(torch.get_num_threads())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=folder,
                env=environment,
                # Ctrl-C is for the process that asks; this one ends when its stdin closes.
                start_new_session=True,
            )
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        return self._worker.stdin, self._worker.stdout

    def close(self) -> None:
        """End the child process; the next question starts another."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None


def _can_measure_cpu() -> bool:
    return _STATUS.is_file() and os.access(_CLEAR_REFS, os.W_OK)


def _peak_on_cuda(method: Method, problem: Problem, device: torch.device) -> float:
    tensors, upstream = _draw(problem, device)
    call = prepare(method, problem, tensors, upstream)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def _peak_on_cpu(method: Method, problem: Problem) -> float:
    device = torch.device("cpu")
    tensors, upstream = _draw(problem, device)
    call = prepare(method, problem, tensors, upstream)
    gc.collect()
    _CLEAR_REFS.write_text(_RESET_PEAK)
    before = _status_kib("VmRSS")
    call()
    return (_status_kib("VmHWM") - before) / 1024


def _draw(problem: Problem, device: torch.device) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    tensors = problem.inputs(device)
    if problem.direction == "forward":
        return tensors, None
    shape = (problem.B, problem.H, problem.N, problem.M)
    return tensors, torch.ones(shape, dtype=DTYPES[problem.dtype], device=device)


def _status_kib(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"{_STATUS} has no field {field}")


def _serve(threads: int) -> None:
    """Answer one peak a line until stdin closes, each in a fork: kernels keep scratch memory, which a second call would
    find resident, and a call that the system kills for its memory takes only its fork along.
    """
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            torch.set_num_threads(threads)
            print(json.dumps(_peak_of(json.loads(line))), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            print("null", flush=True)


def _peak_of(question: dict[str, dict[str, Any]]) -> float | None:
    method, problem = Method(**question["method"]), Problem(**question["problem"])
    try:
        # A tiny call of the same kind first: thread pools and code that is loaded once are not the call's memory.
        _peak_on_cpu(method, replace(problem, N=32))
        return max(0.0, _peak_on_cpu(method, problem))
    except (MemoryError, RuntimeError):  # does not fit into memory
        return None


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
