from __future__ import annotations

import math

import pandas

from d4s.figures.tables import aligned, cell, frame_lines


def test_columns_line_up_the_first_to_the_left() -> None:
    lines = aligned([("name", ["a", "long name"]), ("n", ["1", "12"]), ("note", ["", "x"])])
    assert lines == ["name        n  note", "a           1", "long name  12     x"]
    assert aligned([("name", []), ("n", [])]) == ["name  n"]


def test_words_all_stand_to_the_left() -> None:
    assert aligned([("a", ["b"]), ("word", ["c"]), ("d", ["e"])], numbers=False) == [
        "a  word  d",
        "b  c     e",
    ]


def test_a_frame_has_its_bounds_behind_their_value_and_no_empty_column() -> None:
    frame = pandas.DataFrame(
        {
            "method": ["d4s", "memit"],
            "edits_until": [123.456, math.inf],
            "edits_until.low": [100.0, 50.0],
            "edits_until.high": [150.0, math.inf],
            "empty": [math.nan, None],
        }
    )
    assert frame_lines(frame) == [
        "method        edits until",
        "d4s      123.5 [100, 150]",
        "memit   never [50, never]",
    ]


def test_a_cell_has_four_digits() -> None:
    values = (None, math.nan, 3, 0.123456, -math.inf, "x")
    assert [cell(value) for value in values] == ["", "", "3", "0.1235", "-inf", "x"]
