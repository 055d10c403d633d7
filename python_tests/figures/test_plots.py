"""Lines in panels and heat maps, of data that know nothing of editing."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pandas
import pytest

import d4s.figures
from d4s.errors import ConfigError
from d4s.figures.plots import lines_of, plot_heat_map, plot_lines, plot_points


def test_a_level_has_the_name_it_is_given_and_the_data_lie_beside(tmp_path, drawn) -> None:
    parts = [
        {
            "panel": panel,
            "line": "rain",
            "x": [1, 2, 3],
            "y": [0.5, 2.0, 1.0],
            "low": [0, 1, 0],
            "high": [1, 3, 2],
        }
        for panel in ("north", "south")
    ]
    data = lines_of([*parts, {"panel": "west", "line": "rain", "x": [], "y": []}], "days")
    plot_lines(
        data, tmp_path / "rain.png", x_label="day", y_label="mm", levels={"north": 1.5}, level_name="usual"
    )
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes] == ["north", "south"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["rain", "usual"]
    assert set(figure.axes[0].get_lines()[-1].get_ydata()) == {1.5} and len(figure.axes[1].get_lines()) == 1
    pandas.testing.assert_frame_equal(pandas.read_csv(tmp_path / "rain.csv"), data, check_dtype=False)


def test_a_heat_map_draws_its_cells_and_saves_them_as_they_are(tmp_path, drawn) -> None:
    matrix = pandas.DataFrame([[0.25, math.nan], [1.0, 0.5]], index=["a", "b"], columns=["c", "d"])
    given = dict(x_label="to", y_label="from", label="moved (%)")
    plot_heat_map(matrix, tmp_path / "map.png", **given, value_range=(0, 100), scale=100)
    axes, bar = drawn[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel(), bar.get_ylabel()) == ("to", "from", "moved (%)")
    assert [text.get_text() for text in axes.texts] == ["25", "100", "50"]
    assert axes.images[0].get_clim() == (0, 100)
    assert float(pandas.read_csv(tmp_path / "map.csv", index_col=0).loc["b", "d"]) == 0.5


def test_points_carry_their_labels_and_the_chosen_one_a_ring(tmp_path, drawn) -> None:
    data = pandas.DataFrame(
        {
            "panel": ["north"] * 3 + ["south"],
            "line": ["rain", "rain", "snow", "rain"],
            "label": ["a", "b", "c", "b"],
            "x": [1.0, 2.0, math.nan, 4.0],
            "y": [3.0, 1.0, 2.0, 5.0],
        }
    )
    plot_points(data, tmp_path / "p.png", x_label="mm", y_label="days", chosen="b")
    north, south = drawn[0].axes
    assert [text.get_text() for text in north.texts] == ["a", "b"] and len(south.texts) == 1
    assert [text.xy for text in north.texts] == [(1.0, 3.0), (2.0, 1.0)]
    line, ring = north.get_lines()
    assert list(line.get_xdata()) == [1.0, 2.0] and line.get_linestyle() != "None"
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([2.0], [1.0])
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["rain"]
    pandas.testing.assert_frame_equal(pandas.read_csv(tmp_path / "p.csv"), data)
    plot_points(data, tmp_path / "q.png", x_label="mm", y_label="days", joined=False)
    assert [one.get_linestyle() for one in drawn[1].axes[0].get_lines()] == ["None"]
    for wrong, words in ((data.drop(columns="label"), "'label'"), (data[2:3], "nothing to draw")):
        with pytest.raises(ConfigError, match=words):
            plot_points(wrong, tmp_path / "r.png", x_label="", y_label="")


def test_errors_say_what_is_missing(tmp_path) -> None:
    with pytest.raises(ConfigError, match="'line'"):
        plot_lines(pandas.DataFrame({"panel": ["a"]}), tmp_path / "a.png", x_label="", y_label="")
    with pytest.raises(ConfigError, match="two columns; there is nothing to draw"):
        lines_of([], "two columns")
    with pytest.raises(ConfigError, match="row"):
        plot_heat_map(pandas.DataFrame(), tmp_path / "a.png", x_label="", y_label="", label="")
    assert not list(tmp_path.iterdir())


def test_figures_know_nothing_of_editing() -> None:
    known = {"d4s.errors", "d4s.files", "d4s.figures"}
    for path in Path(d4s.figures.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("d4s"):
                assert ".".join((node.module or "").split(".")[:2]) in known, f"{path.name}: {node.module}"
