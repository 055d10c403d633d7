"""What changes inside a model as it is edited, from what a sequence measured.

After the second half of the D4S paper's investigation (arXiv 2410.23843, section 4).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d4s.edits.edit import AGAIN
from d4s.errors import ConfigError
from d4s.figures.plots import plot_lines
from d4s.figures.tables import frame_lines
from d4s.files import finite_or_none, write_table, write_text
from d4s.measure.columns import layers
from d4s.measure.statistics import correlation
from d4s.sequence.comparison import Comparison, file_name
from d4s.sequence.curves import few_layers, plot_forgetting, plot_metrics, plot_norms, plot_target_probability
from d4s.sequence.record import Record
from d4s.study.decline import estimate_remaining

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class ModelView:
    """What changed inside the model, from what was measured; label → the sequence.

    bounds: metric → share whose crossing is estimated; None: 90 % of the first level
    """

    records: dict[str, Record]
    bounds: Mapping[str, float | None]
    seed: int = 0

    def bottleneck(self) -> DataFrame:
        """Label, first and last fifth of the edits: mean p(target) before and after its optimisation (Fig. 5a), and
        the standard error of the latter."""
        import pandas

        rows = []
        for label, record in self.records.items():
            table = pandas.DataFrame([row for row in record.edits_table if AGAIN not in row])
            if "last_probability" not in table or table["last_probability"].isna().all():
                continue
            fifth = max(1, len(table) // 5)
            parts = {"first fifth": table.iloc[:fifth], "last fifth": table.iloc[-fifth:]}
            for part, edits in parts.items():
                means = edits[["first_probability", "last_probability"]].mean().to_dict()
                means["standard_error"] = float(edits["last_probability"].sem())  # NaN for a single edit
                rows.append({"method": label, "of the edits": part, "count": fifth} | means)
        return pandas.DataFrame(rows)

    def norms(self) -> DataFrame:
        """Long form: label, step, layer, mean |w|, its growth, ‖W − W0‖_F (Fig. 5b, c and 6a, b)."""
        import pandas

        rows = []
        for label, record in self.records.items():
            first = record.history[0]
            for row in record.history:
                changes = layers(row, "delta_norm.<layer>")
                for layer, name in layers(row).items():
                    rows.append(
                        {
                            "method": label,
                            "step": row["step"],
                            "layer": layer,
                            "mean_absolute": row[name],
                            "growth": None if row[name] is None else row[name] / first[name] - 1,
                            "delta_norm": row[changes[layer]],
                        }
                    )
        return pandas.DataFrame(rows)

    def forgetting(self) -> DataFrame:
        """A row a label and metric at the last point: tested right after its step (original), now (current), and
        the difference (Fig. 7). The matrices are `Record.forgetting()`."""
        import pandas

        rows = []
        for label, record in self.records.items():
            last = record.history[-1]
            for metric in ("efficacy", "paraphrase"):
                original, current = last.get(f"original_{metric}"), last.get(metric)
                if original is not None and current is not None:
                    rows.append(
                        {
                            "method": label,
                            "edits": last["step"],
                            "metric": metric,
                            "original": original,
                            "current": current,
                            "forgotten": original - current,
                        }
                    )
        return pandas.DataFrame(rows)

    def correlations(self) -> DataFrame:
        """Of the norm's growth with each metric over evaluation points; negative: the larger, the lower.

        Both go with the number of edits, so that nearly everything correlates; `pearson_changes` is of their
        changes from point to point, where that is taken out.
        """
        import pandas

        rows = []
        for label, record in self.records.items():
            frame = record.to_frame()
            frame = frame[frame["step"] > 0]
            for metric in ("efficacy", "paraphrase", "specificity", "average", "retained"):
                if metric in frame:
                    pair = frame[["l1_growth", metric]].astype(float).dropna()
                    found = correlation(pair["l1_growth"], pair[metric])
                    changes = pair.diff().dropna()
                    found["pearson_changes"] = correlation(changes["l1_growth"], changes[metric])["pearson"]
                    rows.append({"method": label, "metric": metric} | found)
        return pandas.DataFrame(rows)

    def estimates(self) -> DataFrame:
        """`estimate_remaining` of every label and bounded metric that has enough points."""
        import pandas

        rows = []
        for label, record in self.records.items():
            for metric, bound in self.bounds.items():
                try:
                    found = estimate_remaining(record, metric, bound, seed=self.seed)
                except ConfigError:
                    continue
                rows.append({"method": label} | found)
        return pandas.DataFrame(rows)

    def tables(self) -> dict[str, DataFrame]:
        return {
            "bottleneck": self.bottleneck(),
            "remembered": self.forgetting(),
            "correlations": self.correlations(),
            "estimates": self.estimates(),
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON values of the tables; figures that are not finite are None."""
        return {name: finite_or_none(frame.to_dict("records")) for name, frame in self.tables().items()}

    def summary(self) -> str:
        titles = {
            "bottleneck": "p(target) before and after its optimisation:",
            "remembered": "Forgetting, right after the step and now:",
            "correlations": "Correlation of the growth of mean |w| with:",
            "estimates": "Edits until the bound (by the whole run; then by its first half, and how wrong):",
        }
        lines: list[str] = []
        for name, frame in self.tables().items():
            lines += [titles[name], *(frame_lines(frame) if len(frame) else ["  too few points"]), ""]
        return "\n".join(lines[:-1])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """A CSV each of the tables, analysis.json, and the figures with their data:
        target_probability, norms, change, metrics, forgetting and forgetting-<method>, estimate."""
        import pandas

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tables = self.tables()
        for name, frame in tables.items():
            write_table(frame, folder / f"{name}.csv")
        write_text(json.dumps(self.to_dict(), indent=1), folder / "analysis.json")
        histories = {label: record.to_frame() for label, record in self.records.items()}
        plot_metrics(histories, folder / "metrics.png")
        plot_norms(few_layers(histories), folder / "norms.png")
        plot_change(histories, folder / "change.png")
        searched = {
            label: pandas.DataFrame(record.edits_table)
            for label, record in self.records.items()
            if any(row.get("last_probability") is not None for row in record.edits_table)
        }
        if searched:
            plot_target_probability(searched, folder / "target_probability.png")
        if len(tables["remembered"]):
            plot_original_and_current(histories, folder / "forgetting.png")
        for label, record in self.records.items():
            if any(row["step"] for row in record.history):
                plot_forgetting(record.forgetting(), folder / f"forgetting-{file_name(label)}.png")


def plot_change(histories: Mapping[str, DataFrame], path: str | os.PathLike[str]) -> None:
    """‖W − W0‖_F over all edited layers against edits made."""
    import pandas

    parts = []
    for label, frame in histories.items():
        columns = list(layers(frame.columns, "delta_norm.<layer>").values())
        size = (frame[columns].astype(float) ** 2).sum(axis=1, skipna=False) ** 0.5
        parts.append(
            pandas.DataFrame({"panel": "edited layers", "line": label, "x": frame["step"], "y": size})
        )
    plot_lines(pandas.concat(parts), path, x_label="edits made", y_label="‖W − W0‖ (Frobenius)")


def plot_original_and_current(histories: Mapping[str, DataFrame], path: str | os.PathLike[str]) -> None:
    """Efficacy tested right after each step and now, against edits made: a panel a method (Fig. 7)."""
    import pandas

    parts = []
    for label, frame in histories.items():
        frame = frame[frame["step"] > 0]
        for line, column in (("right after its step", "original_efficacy"), ("now", "efficacy")):
            if column in frame:
                values = {
                    "panel": label,
                    "line": line,
                    "x": frame["step"],
                    "y": 100 * frame[column].astype(float),
                }
                parts.append(pandas.DataFrame(values))
    plot_lines(pandas.concat(parts), path, x_label="edits made", y_label="efficacy (%)", y_range=(0, 100))


def analyze_model(
    results: Record | Comparison | Mapping[str, Record],
    *,
    bounds: Mapping[str, float | None] | None = None,
    seed: int = 0,
) -> ModelView:
    """The inside of a sequence, from what `edit_sequence` measured: no second run is needed.

    results: one sequence, several by name, or a comparison (its first seed)
    bounds: metric → the share under which it must not fall; None: efficacy and specificity, 90 % of the first level
    """
    if isinstance(results, Comparison):
        records = {label: next(iter(by_seed.values())) for label, by_seed in results.results.items()}
    elif isinstance(results, Record):
        records = {results.method: results}
    else:
        records = dict(results)
    records = {label: record for label, record in records.items() if len(record.history) > 1}
    if not records:
        raise ConfigError(
            "no sequence with an evaluation after its first edit, so nothing to analyze; give evaluate_every"
        )
    return ModelView(records, {"efficacy": None, "specificity": None} | dict(bounds or {}), seed)
