"""The machine and the versions that a result came from; every result file carries them."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from linattn._util.version import __version__
from linattn.errors import DeviceError, refusal


@dataclass(frozen=True)
class Environment:
    """Everything needed to judge a result, or to repeat it.

    Clocks are in MHz, None where the system hides them. `commit` and `modified` are the checkout that ran and whether
    its sources differed from that commit; None for an installed package.
    """

    device: str
    slug: str
    instruction_set: str
    cores: int
    threads: int
    clock_mhz: float | None
    max_clock_mhz: float | None
    memory_clock_mhz: float | None
    load_average: float | None
    system: str
    python: str
    torch: str
    triton: str | None
    cuda: str | None
    driver: str | None
    linattn: str
    commit: str | None
    modified: bool | None
    date: str


def describe(device: torch.device) -> Environment:
    """Look at the machine now. Nothing here fails: what cannot be found out is None."""
    gpu = _gpu(device) if device.type == "cuda" else {}
    cpu = _cpuinfo()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu.get("model name", platform.processor())
    commit, modified = _commit()
    return Environment(
        device=name or device.type,
        slug=device_slug(device),
        instruction_set=_instruction_set(),
        cores=_cores(),
        threads=torch.get_num_threads(),
        clock_mhz=gpu.get("clocks.sm") if gpu else _number(cpu.get("cpu MHz")),
        max_clock_mhz=gpu.get("clocks.max.sm") if gpu else _max_cpu_clock(),
        memory_clock_mhz=gpu.get("clocks.mem"),
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        torch=str(torch.__version__),  # it is of a class of its own, which a checkpoint would refuse
        triton=_version("triton"),
        cuda=torch.version.cuda,
        driver=_nvidia_smi("driver_version"),
        linattn=__version__,
        commit=commit,
        modified=modified,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def pick_device(name: str | None = None) -> torch.device:
    """Return the device of this name; for None and "auto" the GPU if there is one, else the CPU.

    Raises:
        DeviceError: it is not there, or is neither cpu nor cuda.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    accepted = f"'auto', 'cpu', 'cuda', 'cuda:0', ...; CUDA devices here: {seen}"
    unusable = refusal(DeviceError, "the device cannot be used", given=f"device={name!r}", accepted=accepted)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise unusable from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= seen):
        raise unusable
    return device


def device_slug(device: torch.device) -> str:
    """Return the folder name of a device: `cpu-2core-avx512`, `nvidia-h200`.

    Example:
        >>> import re, torch
        >>> bool(re.fullmatch(r"cpu-[0-9]+core-[a-z0-9]+", device_slug(torch.device("cpu"))))
        True
    """
    if device.type == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return f"cpu-{_cores()}core-{_instruction_set()}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _instruction_set() -> str:
    """Return the widest vector instructions torch itself uses here."""
    capability = torch.backends.cpu.get_cpu_capability().lower().replace("_", "")
    return re.sub(r"[^a-z0-9]", "", platform.machine().lower()) if capability == "default" else capability


def _cpuinfo() -> dict[str, str]:
    """Read the first processor of /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _max_cpu_clock() -> float | None:
    try:
        return float(Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").read_text()) / 1e3
    except (OSError, ValueError):
        return None


def _gpu(device: torch.device) -> dict[str, float | None]:
    fields = ("clocks.sm", "clocks.max.sm", "clocks.mem")
    index = device.index if device.index is not None else torch.cuda.current_device()
    return {field: _number(_nvidia_smi(field, index)) for field in fields}


def _nvidia_smi(field: str, index: int = 0) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", f"--id={index}"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return found.stdout.strip() or None if found.returncode == 0 else None


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> tuple[str | None, bool | None]:
    """Return the commit of the running checkout and whether its tracked sources differ; (None, None) elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None, None

    def git(*arguments: str) -> str | None:
        found = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return found.stdout.strip() if found.returncode == 0 else None

    commit = git("rev-parse", "--short=12", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no", "--", "linattn", "kernels", "bench")
    return commit, None if changes is None else bool(changes)
