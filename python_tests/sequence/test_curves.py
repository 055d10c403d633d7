from __future__ import annotations

import math
from pathlib import Path

import numpy
import pandas
import pytest

from d4s.errors import ConfigError
from d4s.sequence.curves import few_layers, plot_forgetting, plot_metrics, plot_norms, plot_target_probability


def history(growth: float, points: int = 6) -> pandas.DataFrame:
    rows = []
    for i in range(points):
        row: dict[str, float] = {"step": 10 * i, "l1_norm.3": 0.02 * (1 + growth * i), "l1_norm.12": 0.01}
        for name in ("efficacy", "paraphrase", "specificity", "average"):
            row |= {name: 0.5 + 0.05 * i, f"{name}.low": 0.4, f"{name}.high": 0.9}
        rows.append(row)
    return pandas.DataFrame(rows)


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_metrics_have_a_panel_each_a_line_a_method_and_the_unedited_level(tmp_path, drawn) -> None:
    plot_metrics({"d4s": history(0.1), "rome": history(0.2)}, tmp_path / "deep" / "metrics.png")
    assert is_png(tmp_path / "deep" / "metrics.png")
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["metrics.csv", "metrics.png"]
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes] == ["efficacy", "paraphrase", "specificity", "average"]
    for axes in figure.axes:
        assert axes.get_ylim()[0] < 0 and axes.get_ylim()[1] > 100
        method, other, level = axes.get_lines()
        assert list(method.get_xdata()) == [10, 20, 30, 40, 50]
        assert method.get_ydata() == pytest.approx([55, 60, 65, 70, 75])
        assert set(level.get_ydata()) == {50} and level.get_linestyle() == ":"
        assert method.get_color() != other.get_color() and method.get_marker() != other.get_marker()
    data = pandas.read_csv(tmp_path / "deep" / "metrics.csv")
    assert list(data.columns) == ["panel", "line", "x", "y", "low", "high"]
    assert len(data) == 4 * 2 * 5 and set(data["high"]) == {90}


def test_axes_are_labelled_and_the_legend_covers_no_panel(tmp_path, drawn) -> None:
    plot_metrics({f"method {i}": history(0.1) for i in range(9)}, tmp_path / "metrics.png")
    (figure,) = drawn
    assert figure.axes[2].get_xlabel() == "edits made" and figure.axes[0].get_ylabel() == "share (%)"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *(f"method {i}" for i in range(9)),
        "unedited",
    ]
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    for axes in figure.axes:
        assert box.y1 < axes.get_tightbbox().y0 + 3  # pixels; text is rounded to whole ones
    styles = {
        (line.get_color(), line.get_marker(), line.get_linestyle()) for line in figure.axes[0].get_lines()[:9]
    }
    assert len(styles) == 9


def test_norms_are_growth_of_the_unedited_layer_in_percent(tmp_path, drawn) -> None:
    plot_norms({"d4s": history(0.01)}, tmp_path / "norms.pdf")
    assert (tmp_path / "norms.pdf").read_bytes().startswith(b"%PDF")
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes] == ["layer 3", "layer 12"]
    assert figure.axes[0].get_lines()[0].get_ydata() == pytest.approx([0, 1, 2, 3, 4, 5])
    assert figure.axes[0].get_yscale() == "linear"
    data = pandas.read_csv(tmp_path / "norms.csv")
    assert data.loc[data["panel"] == "layer 3", "y"].to_list() == pytest.approx([0, 1, 2, 3, 4, 5])


def test_growths_decades_apart_get_a_logarithmic_axis(tmp_path, drawn) -> None:
    collapsed = history(100.0)
    collapsed.loc[5, "l1_norm.3"] = math.inf
    plot_norms({"d4s": history(0.001), "rome": collapsed}, tmp_path / "norms.png")
    (figure,) = drawn
    assert figure.axes[0].get_yscale() == "symlog"
    for line in figure.axes[0].get_lines():  # the small growth can be told from none
        heights = figure.axes[0].transData.transform(line.get_xydata()[[0, 4]])[:, 1]
        assert heights[1] - heights[0] > 20


def test_the_unedited_level_is_that_of_the_same_edits(tmp_path, drawn) -> None:
    changing = history(0.1)
    changing["specificity.unedited"] = [math.nan, 0.9, 0.8, 0.7, 0.6, 0.5]
    plot_metrics({"memit": changing.iloc[:3], "d4s": changing}, tmp_path / "metrics.png")
    levels = [axes.get_lines()[-1] for axes in drawn[0].axes]
    assert levels[2].get_ydata() == pytest.approx([90, 80, 70, 60, 50]) and levels[2].get_linestyle() == ":"
    assert list(levels[2].get_xdata()) == [10, 20, 30, 40, 50] and set(levels[0].get_ydata()) == {50}


def test_one_number_of_edits_has_its_interval_as_a_bar(tmp_path, drawn) -> None:
    plot_metrics({"d4s": history(0.1, 2), "rome": history(0.2, 2)}, tmp_path / "metrics.png")
    for axes in drawn[0].axes:
        first, second = axes.containers
        assert list(first[0].get_ydata()) == list(second[0].get_ydata()) == pytest.approx([55])
        assert 9.5 < first[0].get_xdata()[0] < 10 < second[0].get_xdata()[0] < 10.5
        assert first[2][0].get_segments()[0][:, 1] == pytest.approx([40, 90])
        assert list(axes.get_xticks()) == [10]


def test_a_line_that_ends_after_its_first_point_leaves_the_others_their_axis(tmp_path, drawn) -> None:
    plot_metrics({"kn": history(0.1, 2), "d4s": history(0.2)}, tmp_path / "metrics.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert low < 10 and high > 50 and len(axes.get_xticks()) > 2
        assert list(axes.containers[0][0].get_xdata()) == [10] and axes.containers[0].has_yerr
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["kn", "d4s", "unedited"]


def test_many_methods_and_decades_leave_the_panels_their_room(tmp_path, drawn) -> None:
    tables = {f"method {i}": history(10.0**i) for i in range(14)}
    plot_norms(tables, tmp_path / "norms.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    for axes in figure.axes:
        box = axes.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
        assert box.height > 1.6
    shown = [t for t in figure.axes[0].get_yticks() if 0 <= t <= figure.axes[0].get_ylim()[1]]
    assert len(shown) <= 8 and figure.axes[0].get_ylim()[0] == 0


def test_target_probabilities_are_means_over_stretches_of_the_sequence(tmp_path, drawn) -> None:
    table = pandas.DataFrame({"first_probability": [0.0, 0.5] * 75, "last_probability": [0.9] * 150})
    plot_target_probability({"d4s": table}, tmp_path / "probability.svg")
    (figure,) = drawn
    first, last = (axes.get_lines()[0] for axes in figure.axes)
    assert (
        len(first.get_xdata()) == 50
        and list(first.get_xdata())[:2] == [3, 6]
        and first.get_xdata()[-1] == 150
    )
    assert list(first.get_ydata()[:2]) == pytest.approx([0.5 / 3, 1.0 / 3])
    assert list(last.get_ydata()) == pytest.approx([0.9] * 50)
    assert "p(target)" in (tmp_path / "probability.svg").read_text()


@pytest.mark.parametrize("points", [1, 3, 40])
def test_forgetting_is_a_heat_map_of_the_matrix(tmp_path, drawn, points: int) -> None:
    steps = [10 * (i + 1) for i in range(points)]
    values = numpy.triu(numpy.random.default_rng(0).random((points, points)))
    values[numpy.tril_indices(points, -1)] = math.nan
    matrix = pandas.DataFrame(values, index=steps, columns=steps)
    plot_forgetting(matrix, tmp_path / "forgetting.png")
    (figure,) = drawn
    axes, bar = figure.axes
    numpy.testing.assert_allclose(numpy.ma.filled(axes.images[0].get_array(), math.nan), 100 * values)
    assert bar.get_ylabel() == "efficacy (%)"
    assert len(axes.get_xticks()) <= 12 and axes.get_xticklabels()[0].get_text() == "10"
    assert len(axes.texts) == (points * (points + 1) // 2 if points < 12 else 0)
    read = pandas.read_csv(tmp_path / "forgetting.csv", index_col=0)
    numpy.testing.assert_allclose(read.to_numpy(), values)


def test_forgetting_of_what_is_no_share_has_its_own_scale(tmp_path, drawn) -> None:
    matrix = pandas.DataFrame([[3.0, 7.5], [math.nan, 2.25]], index=[10, 20], columns=[10, 20])
    plot_forgetting(matrix, tmp_path / "forgetting.png", metric="nll_new")
    axes, bar = drawn[0].axes
    assert bar.get_ylabel() == "nll_new" and axes.images[0].get_clim() == (2.25, 7.5)
    assert [text.get_text() for text in axes.texts] == ["3", "7.5", "2.25"]
    assert [text.get_color() for text in axes.texts] == ["white", "black", "white"]


def test_methods_of_many_layers_are_left_out_where_others_remain() -> None:
    many = pandas.DataFrame({f"l1_norm.{i}": [1.0] for i in range(9)} | {"l1_growth": [0.0]})
    few = pandas.DataFrame({"l1_norm.0": [1.0], "l1_norm.0.low": [0.5], "l1_norm.0.high": [1.5]})
    assert list(few_layers({"ft": many, "d4s": few})) == ["d4s"] and list(few_layers({"ft": many})) == ["ft"]


def test_bounds_over_seeds_are_no_layers(tmp_path, drawn) -> None:
    frame = history(0.1)
    frame["l1_norm.3.low"] = frame["l1_norm.3.high"] = frame["l1_norm.3"]
    plot_norms({"d4s": frame}, tmp_path / "norms.png")
    assert [axes.get_title() for axes in drawn[0].axes] == ["layer 3", "layer 12"]


def test_errors_say_what_is_missing(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"l1_norm\.<layer>"):
        plot_norms({"d4s": pandas.DataFrame({"step": [0, 1]})}, tmp_path / "norms.png")
    with pytest.raises(ConfigError, match="nothing to draw"):
        plot_metrics({}, tmp_path / "metrics.png")
    with pytest.raises(ConfigError, match=r"\.xyz.*\.png"):
        plot_norms({"d4s": history(0.1)}, tmp_path / "norms.xyz")
    with pytest.raises(ConfigError, match="row"):
        plot_forgetting(pandas.DataFrame(), tmp_path / "forgetting.png")
    assert not list(tmp_path.iterdir())
