"""Add to the pages in this folder: derivations, the API, the changelog, and formulas as MathML.

Formulas are written as GitHub shows them, $`...`$ and blocks ```math. Browsers draw MathML themselves, so pages need no
script and fetch nothing. Links to what is not on the site become paths in the repository.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
FORMULA = re.compile(r"^```math\n(?P<block>.+?)^```|\$`(?P<inline>.+?)`\$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>(?!https?:|#)[^)\s]+)\)")

# Figures that lie beside the results they are drawn from.
FIGURE = re.compile(r"(?<=\]\()\.\./(bench/results/[^)\s]+\.png)(?=\))")

# Markdown must not touch MathML: it gets a name until the page is HTML.
_formulas: dict[str, str] = {}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are kept elsewhere, and one for each module that the navigation lists as api/NAME.md."""
    for source in sorted((ROOT / "kernels").glob("*/README.md")):
        page = f"derivations/{source.parent.name}.md"
        if page not in repr(config["nav"]):
            continue  # a room without a derivation of its own
        files.append(File.generated(config, page, content=source.read_text(encoding="utf-8")))
    files.append(File.generated(config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text(encoding="utf-8")))
    pages = [file.content_string for file in files.documentation_pages()]
    for figure in sorted({path for page in pages for path in FIGURE.findall(page)}):
        files.append(File.generated(config, figure, abs_src_path=str(ROOT / figure)))
    for name in re.findall(r"'api/([\w.]+)\.md'", repr(config["nav"])):
        files.append(File.generated(config, f"api/{name}.md", content=f"# linattn.{name}\n\n::: linattn.{name}\n"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Set formulas aside and rewrite links that lead out of the site."""
    here = PurePosixPath(page.file.src_uri)
    markdown = FORMULA.sub(_named_formula, FIGURE.sub(r"\1", markdown))
    return LINK.sub(lambda link: _link(link["text"], link["target"], here, files), markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Put the formulas back, as MathML."""
    return re.sub(r"FORMULA\d+END", lambda name: _formulas[name[0]], html)


def _named_formula(found: re.Match[str]) -> str:
    name = f"FORMULA{len(_formulas)}END"
    display = "inline" if found["block"] is None else "block"
    _formulas[name] = convert(" ".join((found["block"] or found["inline"]).split()), display=display)
    return name


def _link(text: str, target: str, here: PurePosixPath, files: Files) -> str:
    """Return a link to a page of the site, or the path of what is only in the repository."""
    in_repository = f"kernels/{here.stem}" if here.parts[0] == "derivations" else f"docs/{here.parent}"
    path = normpath(f"{in_repository}/{target.partition('#')[0]}")
    derivation = re.fullmatch(r"kernels/(\w+)/README\.md", path)
    page = f"derivations/{derivation[1]}.md" if derivation else path.removeprefix("docs/")
    if files.get_file_from_path(page):
        return f"[{text}]({relpath(page, str(here.parent))})"
    return text if text.strip("`") == path else f"{text} (`{path}`)"


class Examples(griffe.Extension):
    """Examples as code: griffe knows the section by its plural only, and not those that stand without a heading.

    "Complexity: ..." with a second, indented line is a paragraph here and not a box, for which griffe takes it.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the examples of one docstring before it is parsed."""
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            text = re.sub(r"^>>> .+?(?=\n\n|\Z)", r"```pycon\n\g<0>\n```", text, flags=re.MULTILINE | re.DOTALL)
            while (joined := re.sub(r"^([A-Z][\w ]*: .+)\n {4}(?=\S)", r"\1 ", text, flags=re.MULTILINE)) != text:
                text = joined
            obj.docstring.value = text
