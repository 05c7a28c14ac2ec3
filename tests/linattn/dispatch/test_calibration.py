"""The table of lengths from which the chunked form pays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from linattn import cost
from linattn._dispatch import calibration
from linattn.errors import DataError


def test_the_shipped_table_is_readable_and_plausible() -> None:
    table = calibration.load(calibration.SHIPPED)
    assert table
    for key, entry in table.items():
        backend, _, dtype = key.split("/")
        assert backend in ("native", "triton", "reference")
        assert dtype in calibration.DTYPES.values()
        for mask, lengths in entry.items():
            for D, N in lengths.items():
                flops = cost.crossover(D, is_causal=mask == "causal")
                assert flops / 10 < N < flops * 10, (key, mask, D)


def test_a_measured_length_is_returned_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"native/avx2/fp32": {"causal": {64: 3000.0, 32: 1000.0}}}
    monkeypatch.setattr(calibration, "MEASURED", calibration.factors(table))
    length = calibration.chunked_from("native/avx2/fp32", 32, 32, is_causal=True)
    assert length == pytest.approx(1000.0)
    between = calibration.chunked_from("native/avx2/fp32", 48, 48, is_causal=True)
    assert 1000.0 < between < 3000.0
    beyond = calibration.chunked_from("native/avx2/fp32", 128, 128, is_causal=True)
    assert beyond / cost.crossover(128, is_causal=True) == pytest.approx(3000.0 / cost.crossover(64, is_causal=True))


def test_an_unmeasured_dtype_takes_the_machines_fp32_and_an_unmeasured_machine_counts_flops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = {"native/avx2/fp32": {"causal": {64: 3000.0}}}
    monkeypatch.setattr(calibration, "MEASURED", calibration.factors(table))
    assert calibration.chunked_from("native/avx2/fp16", 64, 64, is_causal=True) == pytest.approx(3000.0)
    assert "avx2" in calibration.source("native/avx2/fp16")
    for key, mask in (("native/sve/fp32", True), ("native/avx2/fp32", False)):
        assert calibration.chunked_from(key, 64, 64, is_causal=mask) == cost.crossover(64, is_causal=mask)
    assert "not measured" in calibration.source("native/sve/fp32")


def test_predicted_lengths_are_used_where_nothing_was_measured_and_said_to_be_predicted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = "triton/sm_90/bf16"
    predicted = calibration.load(calibration.PREDICTED)[key]["causal"]
    monkeypatch.setattr(calibration, "MEASURED", {})
    assert calibration.chunked_from(key, 64, 64, is_causal=True) == pytest.approx(predicted[64])
    assert calibration.source(key) == "predicted for sm_90 from flops, not measured"
    monkeypatch.setattr(calibration, "MEASURED", calibration.factors({key: {"causal": {64: 3000.0}}}))
    assert calibration.chunked_from(key, 64, 64, is_causal=True) == pytest.approx(3000.0)
    assert calibration.source(key) == "as measured on sm_90"


def test_the_predicted_table_is_what_the_kernels_flops_say() -> None:
    """Nobody has edited it, and the kernels' chunks are still those that it counted."""
    pytest.importorskip("triton")
    from linattn.bench.crossover.calibrate import predict_lengths

    assert calibration.load(calibration.PREDICTED) == predict_lengths()
    assert predict_lengths()["triton/sm_90/bf16"]["causal"][64] == (4 * 2560 * 64 + 12 * 64**2) / 128 + 512


def test_a_table_survives_saving_and_wins_over_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deeper" / "mine.json"
    monkeypatch.setenv("LINATTN_CALIBRATION", str(path))
    assert calibration.user_file() == path
    table = {"reference/cpu/fp32": {"causal": {64: 4321.0}}}
    calibration.save(path, table)
    assert calibration.load(path) == table
    in_force = calibration._in_force()
    assert in_force["reference/cpu/fp32"] == table["reference/cpu/fp32"]


@pytest.mark.parametrize("text", ["", "[1]", '{"native/avx2/fp32": {"causal": {"D": 1}}}', '{"a": 3}'])
def test_a_damaged_table_says_which_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"table\.json"):
        calibration.load(path)


def test_the_key_names_backend_machine_and_dtype() -> None:
    assert calibration.key_of("reference", "cpu", torch.bfloat16) == "reference/cpu/bf16"
