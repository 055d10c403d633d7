"""Sequences that were never made, as long as a test asks: what a page tells of one."""

from __future__ import annotations

from random import Random

from d4s.measure.metrics import Evaluation, Metric
from d4s.report.runs import Fact, ToldRun
from d4s.sequence.record import Record

WORDS = (
    "Darrieux",
    "Lyon",
    "Manila",
    "Atlantic",
    "Bordeaux",
    "Oslo",
    "piano",
    "religion",
    "twin",
    "city",
    "born",
    "of",
)


def made_up(count: int, seed: int, points: int = 4, label: str = "d4s") -> ToldRun:
    """`count` edits, scored at as many points, of random figures that are like those of a real run."""
    draw = Random(seed)
    table, facts = [], {}
    for i in range(count):
        first, last = draw.random() / 100, 1 - draw.random() / 20
        table.append(
            {
                "id": f"counterfact-{i}",
                "step": i + 1,
                "first_probability": first,
                "last_probability": last,
                "written_probability": last * draw.random() ** 0.2,
            }
        )
        sentence = " ".join(draw.choice(WORDS) + str(draw.randrange(1000)) for _ in range(8))
        facts[f"counterfact-{i}"] = Fact(
            sentence, draw.choice(WORDS), f"{draw.choice(WORDS)} {draw.randrange(99)}"
        )
    history, evaluations = [], []
    for step in [0, *(count * (k + 1) // points for k in range(points))]:
        rows = [_row(draw, f"counterfact-{i}", unedited=not step) for i in range(step or count)]
        metrics = {
            name: _metric([row[name] for row in rows]) for name in ("efficacy", "paraphrase", "specificity")
        }
        row = {"step": step, "l1_growth": step / 1000, "edit_seconds": float(step), "seconds": 2.0 * step}
        for name, metric in metrics.items():
            row |= {name: metric.mean, f"{name}.low": metric.low, f"{name}.high": metric.high}
            row |= {f"{name}.unedited": 0.25} if step else {}
        row["average"] = sum(metric.mean for metric in metrics.values()) / 3
        row |= {"original_efficacy": 0.99} if step else {}
        row |= {f"l1_norm.{layer}": 0.15 + step / 1e4 for layer in (3, 4)}
        row |= {f"delta_norm.{layer}": step / 10 for layer in (3, 4)}
        history.append(row)
        evaluations.append(Evaluation(rows, metrics))
    return ToldRun(
        label, Record("d4s", {"layers": [3, 4]}, history, table, evaluations), {"method": "d4s"}, facts
    )


def _row(draw: Random, one: str, *, unedited: bool) -> dict[str, object]:
    new, old = (8, 2) if unedited else (0.3, 6)
    return {
        "id": one,
        "kind": "completion",
        "nll_new": new * draw.random(),
        "nll_true": old * draw.random(),
        "efficacy": float(draw.random() < (0.2 if unedited else 0.95)),
        "efficacy_argmax": float(draw.random() < 0.9),
        "paraphrase": draw.choice((0.0, 0.5, 1.0)),
        "specificity": draw.randrange(11) / 10,
        "target_probability": draw.random(),
    }


def _metric(values: list[float]) -> Metric:
    mean = sum(values) / len(values)
    return Metric(mean, max(0.0, mean - 0.02), min(1.0, mean + 0.02), len(values))
