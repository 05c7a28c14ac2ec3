"""The page and the tables in Markdown: whole, from the files alone, and the ones in this repository up to date."""

from __future__ import annotations

import html.parser
import re
from pathlib import Path

import pytest

from linattn._util.environment import pick_device
from linattn.bench.gpu.stages import Record
from linattn.bench.machine import roofline
from linattn.bench.measuring.cases import ELU_CHUNKED, QUADRATIC_CHUNKED, QUADRATIC_DIRECT, SDPA, Problem
from linattn.bench.measuring.ceilings import Extent
from linattn.bench.measuring.environment import describe
from linattn.bench.measuring.results import Measurement, Results
from linattn.bench.peers.verify import Proof
from linattn.bench.report import command as report
from linattn.bench.report import marked_tables, page, summaries
from linattn.cli.main import main
from linattn.errors import ArgumentError, DataError

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", ROOT / "docs" / "results.md"]


def crossover_results(star: float = 600.0) -> Results:
    """D = 16, 32, 64, crossings at star D^2 / 1024 against both rivals."""
    rows = []
    for D in (16, 32, 64):
        for N in (2**p for p in range(5, 15)):
            for method, ms in ((SDPA, N * N), (QUADRATIC_DIRECT, N * N), (QUADRATIC_CHUNKED, N * star * D * D / 1024)):
                problem = Problem(N, D, D)
                rows.append(
                    Measurement(
                        method, problem, "x", [ms] * 3, ms, ms, ms, gflops=1.0, error=1e-7, judged_rows=N, peak_mib=2.0
                    )
                )
    return Results("crossover", describe(pick_device("cpu")), {"plan": "full"}, rows)


def other_results() -> list[Results]:
    environment, problem = describe(pick_device("cpu")), Problem(2048, 64, 64, is_causal=True)
    rows = [
        Measurement(m, problem, "x", [2.0] * 3, 2.0, 2.0, 2.0, gflops=0.5, error=1e-7, peak_mib=3.0)
        for m in (SDPA, QUADRATIC_DIRECT, QUADRATIC_CHUNKED, ELU_CHUNKED)
    ]
    ceilings = {"copy_gb_s": 10.0, "matmul_gflops": {"fp32": 400.0, "bf16": 4000.0}}
    proof = Proof("retention", "retention", "power", "missing", detail="pip install <retention>")
    return [
        Results("roofline", environment, {"ceilings": ceilings}, rows),
        Results("peers", environment, {"proofs": [vars(proof)]}, rows),
        Results("scaling", environment, {}, rows),
        Results("benchmark", environment, {}, rows),
    ]


class Reader(html.parser.HTMLParser):
    """Collects what a page refers to and whether its elements are closed in order."""

    VOID = frozenset({"meta", "img", "br", "link", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def whole_page(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("results")
    for found in (crossover_results(), *other_results()):
        found.save(folder / found.kind / "results.json")
    (folder / "training").mkdir()
    (folder / "training" / "results.json").write_text('{"settings": {}}')
    assert main(["report", str(folder), "--out", str(folder / "page.html")]) == 0
    return (folder / "page.html").read_text()


def test_the_page_needs_nothing_else(whole_page: str) -> None:
    reader = Reader()
    reader.feed(whole_page)
    assert reader.open == []
    assert "script" not in reader.tags
    assert "link" not in reader.tags
    assert all(source.startswith(("data:image/svg+xml;base64,", "#")) for source in reader.sources)
    # Winners, N*, time and memory; scaling; roofline.
    assert sum(source.startswith("data:") for source in reader.sources) == 6


def test_the_page_says_where_its_numbers_are_from(whole_page: str) -> None:
    environment = describe(pick_device("cpu"))
    for word in (environment.torch, environment.python, environment.system, environment.slug):
        assert word in whole_page
    for heading in report.TITLES.values():
        assert f"{heading}, {environment.slug}</h2>" in whole_page
    assert "pip install &lt;retention&gt;" in whole_page


def test_the_same_results_give_the_same_page() -> None:
    finding = report.Finding(Path("results.json"), crossover_results(), None, [])
    assert report.as_page([finding], figures=False) == report.as_page([finding], figures=False)


def test_numbers_are_told_from_words() -> None:
    numbers = ("12", "-", "0.59 [0.57, 0.62]", "921 [875, 1024] (not bracketed)", "< 128", "1.50x", "63 %", "1e-07")
    content = summaries.Table(("n", "word"), tuple((number, "elu+1 chunked") for number in numbers))
    html_text = page.table(content)
    assert html_text.count('<td class="number">') == len(numbers)
    assert html_text.count('<td class="short">elu+1') == len(numbers)
    assert '<th class="number">n</th>' in html_text


def test_n_star_stands_beside_theory() -> None:
    table = summaries.section("nstar-forward", crossover_results())
    D, mask, dtype, direct, per_square, sdpa, sdpa_square, flops, flops_square, speed = table.rows[1]
    assert (D, mask, dtype) == ("32", "non-causal", "fp32")
    assert direct == sdpa == "600 [600, 600]"
    assert per_square == sdpa_square == "0.59 [0.59, 0.59]"
    assert (flops, flops_square) == ("561", "0.55")
    assert speed == f"{16384 / 600:.1f}"
    assert summaries.section("nstar-training", crossover_results()).rows == ()


def test_exponents_say_whether_they_exclude_2() -> None:
    (sdpa, direct) = summaries.section("exponents", crossover_results()).rows
    assert sdpa[3] == "SDPA"
    assert direct[3] == "our direct form"
    assert sdpa[4].startswith("2.00 [")
    assert sdpa[6] == "no"
    assert sdpa[7] == "16, 32, 64"


def test_targets_are_those_of_the_instruction_set() -> None:
    (found,) = [r for r in other_results() if r.kind == "benchmark"]
    rows = summaries.section("targets", found).rows
    assert [row[0] for row in rows] == ["quadratic direct, D = 64, N = 2,048"]
    assert rows[0][1:3] == ("1.40", "1.00")


def test_a_page_is_updated_between_its_marks_only(tmp_path: Path) -> None:
    crossover_results().save(tmp_path / "r.json")
    mark = "<!-- linattn report: nstar-forward r.json -->"
    text = f"# Title\n\n{mark}\nold\n{marked_tables.END}\n\nbetween\n\n{mark}\n{marked_tables.END}\nend\n"
    (tmp_path / "page.md").write_text(text)
    assert main(["report", "--update", str(tmp_path / "page.md")]) == 0
    found = (tmp_path / "page.md").read_text()
    assert "old" not in found
    assert found.count("| 32 | non-causal | fp32 | 600 [600, 600] |") == 2
    assert re.sub(r"\|.*\|\n", "", found) == text.replace("old\n", "")
    assert marked_tables.update_tables(found, tmp_path) == found


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("<!-- linattn report: exponents r.json -->\n| table |\n", DataError, "has no end"),
        (
            2 * "<!-- linattn report: exponents r.json -->\n" + "<!-- end of table -->",
            DataError,
            "has no end",
        ),
        ("<!-- linattn report: nstars r.json -->\n<!-- end of table -->", ArgumentError, "'nstar-forward'"),
        ("<!-- linattn report: exponents absent.json -->\n<!-- end of table -->", DataError, "cannot read"),
        ("<!-- linattn report: roofline r.json -->\n<!-- end of table -->", DataError, "no ceilings"),
    ],
)
def test_bad_marks_are_named(text: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    crossover_results().save(tmp_path / "r.json")
    with pytest.raises(error, match=message):
        marked_tables.update_tables(text, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_tables_of_this_repository_equal_the_files(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert marked_tables.update_tables(text, path.parent) == text, (
        f"run: linattn report --update {path.relative_to(ROOT)}"
    )


def test_there_are_tables_to_hold_against_the_files() -> None:
    assert sum(len(marked_tables.MARK.findall(path.read_text())) for path in PAGES) >= 3


def test_a_record_of_a_gpu_has_its_section(tmp_path: Path) -> None:
    record = Record(tmp_path / "nvidia-h200" / "gpu.json")
    record.put("environment", "cuda", vars(describe(pick_device("cpu"))))
    record.put("stages", "direct", {"state": "cut off after 75 s", "seconds": 75.0})
    goal = {"goal": 1.0, "stretch": None, "at_most": False, "measured": 1.5, "met": True}
    record.put("goals", "direct/speedup", goal)
    record.put("rows", "direct/a", {"ms": 0.5, "TFLOP/s": 400.0})
    record.put("rows", "direct/b", {"skipped": "no kernel <here>"})
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "GPU, nvidia-h200</h2>" in text
    assert "stage direct: cut off after 75 s" in text
    assert "<b>1.5</b>" in text
    assert "no kernel &lt;here&gt;" in text
    assert "400" in text
    assert text.count("data:image/svg+xml") == 1


def test_nothing_to_report_is_one_line(tmp_path: Path, capsys) -> None:
    assert main(["report", str(tmp_path), "--no-figures"]) == 2
    assert "no result files in" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "absent.json"), "--no-figures"]) == 2
    assert "cannot read" in capsys.readouterr().err


# ---- roofline --------------------------------------------------------------------------------------------------------


def test_a_place_is_below_the_lower_of_two_ceilings() -> None:
    ceilings = roofline.Ceilings(10.0, {"fp32": 400.0})
    assert ceilings.at(20.0, "fp32") == 200.0
    assert ceilings.at(100.0, "fp32") == 400.0
    (found,) = [results for results in other_results() if results.kind == "roofline"]
    place = roofline.places(found.measurements, ceilings)[0]
    # 0.5 GFLOP over q, k, v and out: 4 heads, 2048 tokens, 4 x 64 numbers of 4 bytes.
    assert place.intensity == pytest.approx(0.5e9 / (4 * 2048 * 4 * 64 * 4))
    assert place.rate == pytest.approx(250.0)
    assert place.bound == "products"
    assert place.ceiling == 400.0
    assert roofline.table(found)[0][-2] == "62 %"


def test_the_higher_ceiling_counts() -> None:
    a, b = roofline.Ceilings(10.0, {"fp32": 400.0}), roofline.Ceilings(12.0, {"fp32": 300.0})
    assert roofline.higher(a, b) == roofline.Ceilings(12.0, {"fp32": 400.0})


def test_ceilings_and_kernels_are_measured_in_one_run(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(roofline, "EXTENTS", {"cpu": Extent(2**16, 32)})
    monkeypatch.setattr(roofline, "CEILINGS_S", 0.0)
    monkeypatch.setattr("linattn.bench.measuring.timing.WARM_UP_MS", 0.0)
    options = ["--length", "64", "--head-size", "16", "--heads", "1", "--budget", "0", "--device", "cpu"]
    assert main(["roofline", *options, "--out", str(tmp_path)]) == 0
    found = Results.load(tmp_path / "results.json")
    assert len(found.measurements) == 2 * 2 * len(roofline.METHODS)
    ceilings = roofline.ceilings_of(found)
    assert ceilings.copy_gb_s > 0
    assert set(ceilings.matmul_gflops) == {"fp32", "bf16"}
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
    assert "forward and backward" in capsys.readouterr().out
