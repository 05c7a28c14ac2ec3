"""Words that are gone: each had several meanings, or another word for it is the field's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import sources
from tests.support.sources import ROOT

EVERYWHERE = (".py", ".cpp", ".hpp", ".md", ".toml")
MODULES = (
    "calibration|characters|checks|dispatch|drawing|environment|explain_command|files|fuzz|generate_command|info|"
    "kernel_cases|kernel_report|language|models|options|progress|random_calls|runs|sessions|side_by_side|state|sweeps|"
    "text_table|tracking"
)

OLD: list[tuple[str, str, tuple[str, ...]]] = [
    # Files and folders.
    (rf"(from|import) linattn\.({MODULES})\b", "the rooms of linattn/", (".py", ".md")),
    (rf"from linattn import ({MODULES})\b", "the rooms of linattn/", (".py", ".md")),
    (r"kernels[./]general\b", "kernels.custom_similarity", EVERYWHERE),
    (r"kernels[./]common[./](allocation|backend|registration|stateful|derivative|packed)\b", "common.op", EVERYWHERE),
    (r"kernels[./]common[./](tiles|polynomial|cpu)\b", "common.reference, common.native", EVERYWHERE),
    (r"common[./]gpu[./](sass|amdgcn|machine_code|compiled|reading|gate|pairs)\b", "bench.codegen", EVERYWHERE),
    (r"quadratic[./]gpu[./](call|folded|keys|layout|memory|places|rows|state|step|sums)\b", "see README", EVERYWHERE),
    (r"feature_map[./]gpu[./](launcher|launches|layout|sums)\b", "launch, varlen_schedule", EVERYWHERE),
    (r"direct[./](place|launcher)\b", "varlen_schedule, launch", EVERYWHERE),
    (r"bench[./](sweep|tables|growth|heat_map|plots|calibrate)\b", "bench.crossover", EVERYWHERE),
    (r"bench[./](roofline|scaling|scale_out|decode|hard_inputs)\b", "bench.machine", EVERYWHERE),
    (r"bench[./](proofs|targets|rnn_cases|pytest_plugin|bench_\w+)\b", "bench.suite, bench.peers", EVERYWHERE),
    (r"\b(hard_inputs|heat_map|kernel_report|kernel_cases)\b", "accuracy_study, winner_map, codegen", EVERYWHERE),
    # One word, one thing.
    (r"\bpull_\w+", "chunk_dq_kernel, chunk_dkv_kernel, accumulate_...", (".py", ".cpp", ".hpp")),
    (r"\bshare_rows\b|(?<!std::)\bshared_ptr\b", "bwd_preprocess, dout_scaled_ptr", EVERYWHERE),
    (r"\b(read_pairs|read_record|read_rows|read_row_sums|read_sums)\b", "accumulate_..., chunk_output", EVERYWHERE),
    (r"\b(pair_sums|record_sums|scan_sums)\b", "chunk_products, chunk_moments, state_scan", EVERYWHERE),
    (r"\b(step_state|finish_rows)\b", "decode_state_kernel, decode_output_kernel", EVERYWHERE),
    (
        r"\b(record_of|sums_of|blocks_of|products_of|pulled_blocks_of|pulled_products_of)\b",
        "to_moments, to_blocks, ...",
        (".py",),
    ),
    (r"\bGUARD\b|\bcall\.guarded\b", "CHECK_CANCELLATION", EVERYWHERE),
    (r"\bfolded_\w+|\bkeeps_sums\b", "delta_scaled, inter, keeps_states", EVERYWHERE),
    (r"\b(LOW|FOLD|GRAM)\b", "IN_DTYPE, STATE_DTYPE, GRAM_PRECISION", (".py",)),
    (r"\bBLOCK_M\b", "BLOCK_DV", (".py",)),
    (r"\bHeadRows\b|\bstruct Sums\b", "RowView, ChunkState", (".py", ".cpp", ".hpp")),
    (r"\b(Arriving|Walked)\b", "GradOutputs, Saved", EVERYWHERE),
    (r"\b(ReaderWithH|ReaderWithCell)\b", "RecurrentModule, HiddenStateModule, LSTMStateModule", (".py",)),
    (r"\b(mapped|_given)\(", "run_recurrent, map_features, materialize_grads", (".py",)),
    (r"\b(least|most|take|takes|padded)\(", "min, max, allocate, supports, round_up", (".cpp", ".hpp")),
    (r"\bstruct Rows\b", "TensorView", (".cpp", ".hpp")),
]
"""A pattern, what stands there now, and in which files."""


def old_words(text: str, pattern: str) -> list[int]:
    """Lines of a text that hold an old word."""
    found = re.compile(pattern)
    return [number for number, line in enumerate(text.split("\n"), 1) if found.search(line)]


@pytest.mark.parametrize(("pattern", "now", "suffixes"), OLD, ids=[pattern for pattern, _, _ in OLD])
def test_an_old_word_is_gone(pattern: str, now: str, suffixes: tuple[str, ...]) -> None:
    exempt = {ROOT / "CHANGELOG.md", Path(__file__)}
    found = [
        f"{sources.name(path)}:{number}: now {now}"
        for path in sources.files(*suffixes)
        if path not in exempt
        for number in old_words(path.read_text(encoding="utf-8"), pattern)
    ]
    assert not found, "\n".join(found)


def test_an_old_word_is_found() -> None:
    assert old_words("x = 1\nfrom linattn.checks import y\n", OLD[0][0]) == [2]
    assert old_words("std::shared_ptr<T> x; pull_rows();", r"(?<!std::)\bshared_ptr\b") == []
    assert all(re.compile(pattern) and suffixes for pattern, _, suffixes in OLD)
