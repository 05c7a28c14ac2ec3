"""Keep the tables of Markdown pages equal to the result files that they are made from.

A table stands between two marks:

    <!-- linattn report: nstar-forward bench/results/cpu-2core-avx512/results.json -->
    | D | ...
    <!-- end of table -->

The mark names a section (`summaries.SECTIONS`) and the file, relative to the page. `linattn report --update PAGE`
writes what stands between; a test holds the pages of this repository against their files.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from linattn.bench.measuring.results import Results
from linattn.bench.report.summaries import section
from linattn.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

END = "<!-- end of table -->"
MARK = re.compile(r"<!-- linattn report: (?P<section>\S+) (?P<file>\S+) -->\n")


def update_tables(page: str, folder: Path) -> str:
    """Return a page with every marked table as its file has it now; files are looked for from `folder`.

    Raises:
        DataError: a table has no end, or its file cannot be read.
        ArgumentError: a section of that name does not exist.
    """
    pieces: list[str] = []
    at = 0
    for mark in MARK.finditer(page):
        end = page.find(END, mark.end())
        following = MARK.search(page, mark.end())
        if end < 0 or (following and following.start() < end):
            raise DataError(f"the table after {mark.group().strip()} has no end; accepted: a line {END}")
        text = section(mark["section"], Results.load(folder / mark["file"])).markdown()
        pieces += [page[at : mark.end()], text, "\n"]
        at = end
    return "".join(pieces) + page[at:]


def replace_table(page: str, begin: str, table: str) -> str:
    """Return a page with another table after the mark `begin`, up to the next `END`.

    Raises:
        DataError: a mark is missing.
    """
    before, begun, rest = page.partition(begin)
    _, ended, after = rest.partition(END)
    if not (begun and ended):
        raise DataError(f"the page has lost the marks around its table: {begin} and {END}")
    return f"{before}{begin}\n{table}\n{END}{after}"
