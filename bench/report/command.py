"""`linattn report`: all result files on one page, and what became slower, larger or wrong since the last commit.

    linattn report                                 all of bench/results, into runs/report.html
    linattn report runs/crossover                  what has just been measured, beside the last committed results
    linattn report --update README.md              instead: the tables of a Markdown page, from the files it names

The exit status is 1 if something is worse than it was, or wrong.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from linattn._util.files import write_text
from linattn.bench.crossover import figures, winner_map
from linattn.bench.machine import roofline, scaling
from linattn.bench.measuring.results import Results
from linattn.bench.report import marked_tables, page
from linattn.bench.report.gpu_section import RECORD, gpu_section
from linattn.bench.report.page import Section
from linattn.bench.report.regressions import Flag, compare, load_committed
from linattn.bench.report.summaries import section
from linattn.errors import DataError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Sequence

TITLES = {
    "crossover": "Crossover",
    "scaling": "Growth with the length",
    "roofline": "Roofline",
    "peers": "Peers",
    "benchmark": "Benchmarks and targets",
}
TABLES = {
    "crossover": {
        "nstar-forward": "N*, forward",
        "nstar-training": "N*, forward and backward",
        "exponents": "How N* grows with the head size",
    },
    "scaling": {"scaling": "Exponents, with 95 % intervals"},
    "roofline": {"roofline": "Shares of the ceiling"},
    "peers": {"proofs": "What each peer computes"},
    "benchmark": {"targets": "Targets, as ratios to the rival's time"},
}


@dataclass(frozen=True)
class Finding:
    """One result file: what it holds, what it was compared with, and the flags."""

    path: Path
    results: Results
    source: str | None
    flags: list[Flag]

    @property
    def verdict(self) -> str:
        """In a line."""
        if self.flags:
            return f"{len(self.flags)} flags"
        return "no regressions" if self.source else "every output within its error budget"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `linattn report`."""
    parser.add_argument(
        "paths", type=Path, nargs="*", default=[Path("bench/results")], help="result files, or folders with some"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/report.html"), help="the page (%(default)s)")
    parser.add_argument("--baseline", type=Path, help="compare with this file instead of the last committed one")
    parser.add_argument("--update", type=Path, action="append", metavar="PAGE", help="rewrite the tables of this page")
    parser.add_argument("--no-figures", action="store_true", help="only tables; needs no matplotlib")


def run(args: argparse.Namespace) -> int:
    """Write the page, or update others, and say what is worse."""
    if args.update:
        for path in args.update:
            write_text(path, marked_tables.update_tables(_read(path), path.parent))
            print(f"written: {path}")
        return 0
    if not args.no_figures:
        figures.require_matplotlib()
    files = result_files(args.paths)
    findings = [_look_at(path, args.baseline) for path in files if path.name != RECORD]
    records = [path for path in files if path.name == RECORD]
    if not files:
        raise DataError(f"no result files in {', '.join(map(str, args.paths))}; `linattn crossover` writes some")
    write_text(args.out, as_page(findings, records, figures=not args.no_figures))
    for finding in findings:
        print(f"{finding.path}: {finding.verdict}" + (f", compared with {finding.source}" if finding.source else ""))
        for flag in finding.flags:
            print(f"  {flag}")
    print(f"\nwritten: {args.out}")
    return 1 if any(finding.flags for finding in findings) else 0


def result_files(paths: Iterable[Path]) -> list[Path]:
    """List the files that were named, and those in folders that were; in folders results of another kind are passed
    over.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += [file for file in sorted(path.rglob("results.json")) if _ours(file)]
            found += sorted(path.rglob(RECORD))
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def as_page(findings: Sequence[Finding], records: Sequence[Path] = (), *, figures: bool) -> str:
    """Build the page of some result files, and of records of `make gpu`."""
    flags = [f"{finding.path}: {flag}" for finding in findings for flag in finding.flags]
    compared = [finding for finding in findings if finding.source]
    count = len(findings) + len(records)
    overview = Section("Overview", f"{count} result files, {len(compared)} compared with earlier ones")
    overview.parts.append(
        page.notice(flags or ["Nothing is slower, larger or wrong beyond its noise band."], alarm=bool(flags))
    )
    devices = list(dict.fromkeys(finding.results.environment.device for finding in findings))
    sections = [overview, *(_section(finding, figures=figures) for finding in findings)]
    sections += [gpu_section(path, figures=figures) for path in records]
    return page.page("linattn: measured", ", ".join(devices), sections)


def _section(finding: Finding, *, figures: bool) -> Section:
    results, kind = finding.results, finding.results.kind
    environment = results.environment
    name = f"{TITLES.get(kind, kind)}, {environment.slug}"
    commit = f"commit {environment.commit}{' (modified)' if environment.modified else ''}"
    triton = f", Triton {environment.triton}" if environment.triton else ""
    note = (
        f"{finding.path}: {environment.device}, {environment.cores} cores, {environment.threads} threads, "
        f"{environment.instruction_set}, {environment.system}, Python {environment.python}, torch {environment.torch}"
        f"{triton}, linattn {environment.linattn}, {commit}, {environment.date}, plan {results.settings.get('plan')}"
    )
    found = Section(name, note)
    found.parts.append(page.notice(_comparison(finding), alarm=bool(finding.flags)))
    if kind == "roofline":
        found.parts.append(f"<p>Ceilings: {roofline.describe_ceilings(roofline.ceilings_of(results))}.</p>")
    for key, heading in TABLES.get(kind, {}).items():
        content = section(key, results)
        if content.rows:
            found.parts += [page.heading(heading), page.table(content)]
    if figures:
        found.parts += _pictures(results)
    found.parts.append(
        page.collapsible(f"all {len(results.measurements)} rows", page.table(section("measured", results)))
    )
    return found


def _comparison(finding: Finding) -> list[str]:
    if finding.flags:
        return [str(flag) for flag in finding.flags]
    return [f"{finding.verdict}; compared with {finding.source}" if finding.source else finding.verdict]


def _pictures(results: Results) -> list[str]:
    if results.kind == "scaling":
        return [page.picture(scaling.draw(results), "Time and peak memory against length")]
    if results.kind == "roofline":
        return [page.picture(roofline.draw(results), "Kernels below the measured limits")]
    if results.kind != "crossover":
        return []
    parts = figures.parts_of(results.measurements)
    found = [page.picture(winner_map.draw_winners(parts, results.environment), "The fastest method over N and D")]
    for part, groups in parts.items():
        found.append(page.picture(figures.draw_crossover(groups, results.environment), f"N* against D: {part}"))
        found.append(page.picture(figures.draw_time(groups, results.environment), f"Time against N: {part}"))
        if any(one.peak_mib is not None for members in groups.values() for one in members):
            found.append(page.picture(figures.draw_memory(groups, results.environment), f"Memory against N: {part}"))
    return found


def _look_at(path: Path, baseline: Path | None) -> Finding:
    results = Results.load(path)
    if baseline is not None:
        before = Results.load(baseline)
        found = (before, str(baseline)) if before.kind == results.kind else None
    else:
        found = load_committed(path, results)
    return Finding(path, results, found[1] if found else None, compare(results, found[0] if found else None))


def _ours(path: Path) -> bool:
    """Say whether a file holds results of this kind at all: training runs and studies have files of the same name."""
    try:
        return "environment" in (data := json.loads(path.read_text())) and data.get("kind") in TITLES
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as problem:
        raise DataError(f"cannot read {path}: {problem}") from problem
