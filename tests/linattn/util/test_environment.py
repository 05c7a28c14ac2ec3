from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import linattn
from linattn._util.environment import describe, device_slug, pick_device
from linattn.errors import DeviceError


def test_description_names_versions_and_machine() -> None:
    found = asdict(describe(torch.device("cpu")))
    assert json.loads(json.dumps(found)) == found
    assert (found["linattn"], found["torch"]) == (linattn.__version__, torch.__version__)
    assert type(found["torch"]) is str
    assert (found["python"], found["threads"]) == (platform.python_version(), torch.get_num_threads())
    assert found["slug"] == device_slug(torch.device("cpu"))


def test_a_cpu_goes_by_its_model_name() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "model name" not in cpuinfo.read_text():
        pytest.skip("this system does not tell a model name")
    name = describe(torch.device("cpu")).device
    assert f": {name}\n" in cpuinfo.read_text()


@pytest.mark.parametrize("name", [None, "auto"])
@pytest.mark.parametrize(("there", "expected"), [(True, "cuda"), (False, "cpu")])
def test_the_gpu_is_picked_where_there_is_one(
    name: str | None, there: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert pick_device(name) == torch.device(expected)


@pytest.mark.parametrize("name", ["abacus", "meta", "cuda", "cuda:0", "cuda:7", "cuda:-1"])
def test_a_device_that_is_not_there_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=f"given: device='{name}'; accepted: 'auto', 'cpu', 'cuda', .* here: 0"):
        pick_device(name)
    assert pick_device("cpu") == torch.device("cpu")
