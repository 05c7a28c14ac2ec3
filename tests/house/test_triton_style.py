"""How Triton kernels are written: shapes above products, constants by keyword, the formatter on."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

from tests.support import sources

SHAPES = re.compile(r"#.*\[[^\]]+\] @ \[[^\]]+\] -> \[[^\]]+\]")
COMMENT_ABOVE = 3
BY_POSITION = 6
FMT_SKIPS = 20


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def jitted(text: str) -> Iterator[ast.FunctionDef]:
    """Functions under a decorator of triton.jit."""
    for node in sources.python_functions(text):
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(each) for each in node.decorator_list):
            yield node


def products_without_shapes(text: str) -> list[str]:
    """Products of tiles without a comment such as `# [BT, BK] @ [BK, BV] -> [BT, BV]` above them or beside them."""
    lines = text.split("\n")
    found = []
    for function in jitted(text):
        for node in ast.walk(function):
            # The one product of a function that is called `dot` itself has the shapes of its callers.
            if isinstance(node, ast.Call) and called(node) == "dot" and function.name != "dot":
                above = lines[max(0, node.lineno - 1 - COMMENT_ABOVE) : node.lineno]
                if not any(SHAPES.search(line) for line in above):
                    found.append(f"{node.lineno}: {lines[node.lineno - 1].strip()}")
    return found


@cache
def constants() -> dict[str, list[bool]]:
    """Of each kernel, by name: which parameters are constants of the compiler."""
    return {
        function.name: [
            "constexpr" in ast.unparse(parameter.annotation) if parameter.annotation else False
            for parameter in function.args.args
        ]
        for path in sources.files(".py")
        for function in jitted(path.read_text(encoding="utf-8"))
    }


def constants_by_position(text: str, kernels: dict[str, list[bool]]) -> list[str]:
    """Launches `kernel[grid](...)` of more than six arguments that pass constants by position."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Subscript):
            continue
        kernel = ast.unparse(node.func.value).rpartition(".")[2]
        if kernel not in kernels or len(node.args) + len(node.keywords) <= BY_POSITION:
            continue
        starred = any(isinstance(argument, ast.Starred) for argument in node.args)
        if (starred and any(kernels[kernel])) or any(kernels[kernel][: len(node.args)]):
            found.append(f"{node.lineno}: {kernel} gets constants by position")
    return found


def test_every_product_of_tiles_has_its_shapes_above_it() -> None:
    found = [
        f"{sources.name(path)}:{fault}"
        for path in sources.files(".py", folders=("kernels",))
        for fault in products_without_shapes(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_launches_pass_constants_by_keyword() -> None:
    assert len(constants()) > 10
    found = [
        f"{sources.name(path)}:{fault}"
        for path in sources.files(".py")
        for fault in constants_by_position(path.read_text(encoding="utf-8"), constants())
    ]
    assert not found, "\n".join(found)


def test_the_formatter_is_hardly_ever_off() -> None:
    mark = re.compile(r"#\s*fmt: *(skip|off)|clang-format off")
    found = [
        f"{sources.name(path)}:{number}: {line.strip()}"
        for path in sources.files(".py", ".cpp", ".hpp")
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
        if mark.search(line) and "re.compile" not in line
    ]
    assert len(found) <= FMT_SKIPS, "\n".join(found)


KERNEL = """
@triton.jit
def kernel(a_ptr, b_ptr, N, M, H, K, BLOCK: tl.constexpr):
    {comment}
    acc = tl.dot(a, b)
"""


def test_a_product_without_shapes_is_found() -> None:
    (found,) = products_without_shapes(KERNEL.format(comment="# The scores."))
    assert found == "5: acc = tl.dot(a, b)"
    assert products_without_shapes(KERNEL.format(comment="# [BT, BK] @ [BK, BV] -> [BT, BV]")) == []
    assert products_without_shapes("def plain(a, b):\n    return torch.dot(a, b)\n") == []


def test_a_constant_by_position_is_found() -> None:
    kernels = {"kernel": [False] * 6 + [True]}
    (found,) = constants_by_position("gpu.kernel[(1,)](a, b, 1, 2, 3, 4, 16)\n", kernels)
    assert found == "1: kernel gets constants by position"
    assert constants_by_position("kernel[(1,)](*everything, x=1, y=2, z=3, u=4, v=5, w=6)\n", kernels) != []
    assert constants_by_position("kernel[(1,)](a, b, 1, 2, 3, 4, BLOCK=16)\n", kernels) == []
    assert constants_by_position("kernel[(1,)](a, b, 16)\n", {"kernel": [False, False, True]}) == []
