"""A DataFrame as lines of text."""

from __future__ import annotations

import math

import pandas

from d4s.study.text_tables import frame_lines


def test_tables_in_text_leave_out_empty_columns_and_name_the_infinite():
    frame = pandas.DataFrame(
        {
            "a": ["x", "y"],
            "b": [0.5, math.inf],
            "b.low": [0.25, 1.0],
            "b.high": [0.75, math.inf],
            "c": ["", ""],
        }
    )
    lines = frame_lines(frame)
    assert lines[0].split() == ["a", "b"]
    assert "0.5 [0.25, 0.75]" in lines[1] and "never [1, never]" in lines[2]
