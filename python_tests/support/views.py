"""What editing with different data did, written by hand."""

from __future__ import annotations

import pandas

from d4s.sequence.comparison import Comparison
from d4s.sequence.record import Record
from d4s.study.data_view import DataView


def view_of(answers, perplexities=None, **failures):
    """group → method → right answers (a string of 0 and 1) after 0, 1, … edits."""

    def record(method, points):
        rows = [
            {"step": step, "efficacy": 1.0, "retained": right.count("1") / len(right), "text_perplexity": 2.0}
            | {"l1_growth": 0.0, "edit_seconds": 0.0}
            | {f"right.{i}": float(one) for i, one in enumerate(right)}
            for step, right in enumerate(points)
        ]
        return Record(method, history=rows, failure=failures.get(method))

    comparisons = {
        group: Comparison({method: {0: record(method, points)} for method, points in methods.items()})
        for group, methods in answers.items()
    }
    surprise = perplexities or [2.0] * len(answers)
    return DataView(pandas.DataFrame({"group": list(answers), "perplexity": surprise}), comparisons)
