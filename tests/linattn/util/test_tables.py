from __future__ import annotations

from linattn._util.tables import text_table


def test_words_to_the_left_numbers_to_the_right() -> None:
    assert text_table(("name", "loss"), [("a", 1234.5678), ("longer", 2)]) == "\n".join(
        ("name    loss", "a       1235", "longer     2")
    )


def test_a_column_of_words_and_numbers_is_to_the_right() -> None:
    assert text_table(("a", "b"), [("x", "y"), ("x", 0.5)]) == "a    b\nx    y\nx  0.5"


def test_a_table_may_be_empty() -> None:
    assert text_table(("a", "b"), []) == "a  b"
