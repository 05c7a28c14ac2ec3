"""`linattn info`: true where it can look, and never a crash."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import re
import types
from pathlib import Path

import pytest
import torch

import linattn
from linattn.cli import info
from linattn.cli.main import main

native = importlib.import_module("linattn._native") if importlib.util.find_spec("linattn._native") else None
needs_native = pytest.mark.skipif(native is None, reason="the native module is not built here")


def fake_native(version: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        build_info=lambda: {"version": version}, hardware_threads=lambda: 3, instruction_sets=lambda: ["avx2"]
    )


def test_json_is_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["linattn"] == linattn.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["machine"]["torch_threads"] == torch.get_num_threads()
    assert report["cuda"]["available"] == torch.cuda.is_available()


def test_text_names_every_heading(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    headings = [line.partition(":")[0] for line in out.splitlines() if not line.startswith(" ")]
    assert headings == list(info.collect())


def test_every_operation_lists_the_reference_backend() -> None:
    backends = info.collect()["backends"]
    assert set(backends) == set(info.OPERATIONS)
    assert all(backends[operation]["reference"] == "available" for operation in info.OPERATIONS)


def test_a_failing_probe_is_reported_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    report = info.collect()
    assert report["cuda"] == {"error": "RuntimeError: driver too old"}
    assert "cuda: not known (RuntimeError: driver too old)" in info.render(report)
    assert report["versions"]["torch"] == torch.__version__


def test_present_native_module_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "_load_native", lambda: fake_native(linattn.__version__))
    report = info.collect()
    assert report["native"]["present"] is True
    assert report["machine"]["hardware_threads"] == 3
    assert report["machine"]["instruction_sets"] == ["avx2"]


def test_native_module_of_another_version_is_not_taken_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "_load_native", lambda: fake_native("0.0.9"))
    report = info.collect()["native"]
    assert report["present"] is False
    assert "0.0.9" in report["reason"]
    assert linattn.__version__ in report["reason"]


def test_missing_native_module_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> types.SimpleNamespace:
        raise ModuleNotFoundError("No module named 'linattn._native'")

    monkeypatch.setattr(info, "_load_native", missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report = info.collect()
    assert report["native"]["present"] is False
    assert report["native"]["reason"].startswith("not built: ")
    assert "instruction_sets: not known" in info.render(report)


@needs_native
def test_instruction_sets_agree_with_the_system() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        pytest.skip("no /proc/cpuinfo to compare with")
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    assert line is not None
    system = set(line[1].split())
    found = set(native.instruction_sets())
    assert found <= system
    known = {"sse4_1", "sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512_bf16", "asimd", "sve"}
    assert found & known == system & known


@needs_native
def test_hardware_threads_are_those_this_process_may_use() -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("no processor affinity on this system")
    assert native.hardware_threads() == len(os.sched_getaffinity(0))


@needs_native
def test_build_info_names_this_machine_and_version() -> None:
    build = native.build_info()
    assert build["version"] == linattn.__version__
    assert build["architecture"] == {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    assert build["cxx_standard"] >= 202002
