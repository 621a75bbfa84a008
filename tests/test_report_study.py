"""What a study shows: curves through its numbers, files that open, a page that needs no network."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from pyramiddrop.evaluation.samples import Sample
from pyramiddrop.evaluation.studies.attention import AttentionExample
from pyramiddrop.planning import Profile
from pyramiddrop.report.studies.paper_figure import depth_colors, save
from pyramiddrop.report.studies.redundancy_plot import AttentionMaps, draw_attention, draw_redundancy, spread
from pyramiddrop.report.studies.redundancy_report import attention_maps, show_redundancy, write_profiles
from pyramiddrop.report.studies.study import bounds, small, write_study
from pyramiddrop.report.tables.evaluation import score_cell
from pyramiddrop.report.token_layout.geometry import Box, View, reading_order
from pyramiddrop.report.token_layout.views import PlacedView


def scored(mean: float, error: float | None = 0.02) -> dict[str, Any]:
    return {"mean": mean, "error": error, "count": 50}


def cell(layer: int, keep: float, accuracy: float | None) -> dict[str, Any]:
    return {
        "layer": layer,
        "keep": keep,
        "accuracy": None if accuracy is None else scored(accuracy),
        "agreement": scored(0.9),
        "top1": scored(0.95),
        "kl": scored(0.003, 0.001),
        "by_kind": {} if accuracy is None else {"colour": scored(accuracy, None)},
        "flops_ratio": 0.6,
    }


def model(name: str = "mine & <yours>", answers: bool = True) -> dict[str, Any]:
    """A study of layers 2 and 6 and two shares."""
    scores = {(2, 0.5): 0.8, (2, 0.25): 0.6, (6, 0.5): 0.9, (6, 0.25): 0.85}
    return {
        "name": name,
        "source": "somewhere",
        "num_layers": 8,
        "samples": 50,
        "visual_tokens": 64.0,
        "vanilla": {
            "accuracy": scored(0.95) if answers else None,
            "by_kind": {"colour": scored(1.0)} if answers else {},
        },
        "cells": [cell(*place, score if answers else None) for place, score in scores.items()],
        "attention": [{"layer": layer, "picture": scored(0.5), "crowd": scored(0.1)} for layer in (2, 6)],
    }


def record(*models: dict[str, Any]) -> dict[str, Any]:
    setting = {"data": "digits", "layers": [2, 6], "models": {"mine": "somewhere"}, "limit": None}
    return {"setting": setting, "machine": {"architecture": "x86_64"}, "models": list(models or [model()])}


def looks() -> AttentionMaps:
    """A picture of 4 x 4 tokens, whose token 5 gets nearly everything in layer 2, and nothing is seen in layer 6."""
    picture = Image.fromarray(np.full((40, 40, 3), 90, np.uint8))
    seen = PlacedView(picture, View("picture", 4, 4, Box(0, 0, 40, 40)))
    peak = np.full(16, 0.01)
    peak[5] = 0.64
    return AttentionMaps("What costs $5 and $6? → <nothing>", [seen], {2: peak, 6: np.full(16, 1e-6)})


def test_a_line_goes_through_the_numbers_of_its_layer() -> None:
    axis = draw_redundancy([model()], "accuracy").axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}
    assert lines["2"] == [[0.25, 60.0], [0.5, 80.0], [1.0, 95.0]]
    assert lines["6"] == [[0.25, 85.0], [0.5, 90.0], [1.0, 95.0]]
    low, high = (end(axis.collections[0].get_paths()[0].vertices[:, 1]) for end in (min, max))
    assert (low, high) == (pytest.approx(58.0), pytest.approx(97.0))
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["25", "50", "100"]
    assert axis.get_xlabel() == "visual tokens kept (%)"
    assert axis.get_ylabel() == "accuracy (%)"


def test_several_models_have_a_panel_a_layer() -> None:
    figure = draw_redundancy([model("vanilla-trained"), model("PyramidDrop-trained")], "agreement")
    assert [axis.get_title("left") for axis in figure.axes] == ["drop before layer 2", "drop before layer 6"]
    for axis in figure.axes:
        assert [line.get_label() for line in axis.get_lines()] == ["vanilla-trained", "PyramidDrop-trained"]
        assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axis.get_lines()}) == 2
        assert axis.get_lines()[0].get_ydata().tolist() == [90.0, 90.0, 100.0]


def test_names_are_no_formulas() -> None:
    figure = draw_redundancy([model("$7B$"), model("other")], "accuracy")
    figure.draw_without_rendering()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [r"\$7B\$", "other"]


def test_a_divergence_is_drawn_logarithmically_without_its_zero() -> None:
    axis = draw_redundancy([model()], "kl").axes[0]
    assert axis.get_yscale() == "log"
    assert axis.get_lines()[0].get_xydata().tolist() == [[0.25, 0.003], [0.5, 0.003]]


def test_layers_get_lighter_with_depth() -> None:
    light = [np.dot(to_rgb(color), (0.299, 0.587, 0.114)) for color in depth_colors(8)]
    assert all(np.diff(light) > 0.03)


def test_bounds_stay_within_what_can_be() -> None:
    assert bounds([scored(0.99), scored(0.01), scored(0.5, None)]) == (
        pytest.approx([97, 0, 50]),
        pytest.approx([99, 1, 50]),
        pytest.approx([100, 3, 50]),
    )
    assert bounds([scored(0.001, 0.01)], part=False) == (pytest.approx([1e-4]), [0.001], pytest.approx([0.011]))


def test_scores_are_written_with_their_error() -> None:
    assert score_cell(scored(0.8834, 0.0123)) == "88.3 ± 1.2"
    assert score_cell(scored(0.8834, None)) == "88.3"
    assert score_cell(None) == ""
    assert small(scored(0.00214, 0.000123)) == "0.0021 ± 0.00012"


def test_a_map_is_bright_where_the_attention_is() -> None:
    figure = draw_attention([looks()])
    axes = [axis for row in figure.subfigs for axis in row.axes]
    assert [axis.get_title() for axis in axes] == ["picture", "layer 2: 79 %", "layer 6: 0 %"]
    maps = [axis.images[1].get_array() for axis in axes[1:]]
    assert np.unravel_index(maps[0].argmax(), maps[0].shape) == (1, 1)
    assert (maps[0].max(), maps[1].max()) == (1.0, pytest.approx(0.0, abs=0.01))


def test_tokens_without_a_place_are_not_drawn() -> None:
    view = View("picture", 2, 2, Box(0, 0, 9, 9), reading_order(2, 2, leading=1, newline=True))
    heat = spread(np.arange(7, dtype=float), view)
    assert heat.tolist() == [[1.0, 2.0], [4.0, 5.0]]


def test_pictures_of_families_that_cannot_be_placed_are_left_out_with_a_reason() -> None:
    asked = Sample((Image.new("RGB", (8, 8)),), "What?")
    unknown = AttentionExample(
        asked, "that", {1: torch.ones(4) / 4}, SimpleNamespace(model_type="no-such-family"), None
    )
    found, reason = attention_maps([unknown])
    assert found == []
    assert "no-such-family" in reason


class Addresses(HTMLParser):
    """Collects what a page would fetch, its tags that are open at the end, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study of two models."""
    folder = tmp_path_factory.mktemp("study")
    found = record(model(), model("other"))
    write_study(folder, "redundancy", {**found, "command": "pyramiddrop study a&b"}, show_redundancy(found, [looks()]))
    return folder


def test_every_file_opens(written: Path) -> None:
    names = [f"redundancy-{metric}" for metric in ("accuracy", "agreement", "top1", "kl")] + ["attention"]
    for name in names:
        pixels = np.asarray(Image.open(written / f"{name}.png").convert("RGB"))
        assert pixels.std() > 5
        assert pixels.shape[1] >= 900  # 3.4 inches at 300 dots an inch
        root = ElementTree.parse(written / f"{name}.svg").getroot()
        assert root.tag.endswith("svg")
        assert "".join(root.itertext()).strip()  # letters are letters
    assert json.loads((written / "redundancy.json").read_text())["models"][1]["name"] == "other"


def test_the_table_of_numbers_has_every_cell(written: Path) -> None:
    rows = list(csv.DictReader((written / "redundancy.csv").open()))
    chosen = [row for row in rows if row["model"] == "other" and row["layer"] == "2" and row["keep"] == "0.25"]
    assert [(row["metric"], row["kind"], float(row["mean"])) for row in chosen] == [
        ("accuracy", "all", 0.6),
        ("agreement", "all", 0.9),
        ("top1", "all", 0.95),
        ("kl", "all", 0.003),
        ("accuracy", "colour", 0.6),
    ]
    assert len(rows) == 2 * (2 + 4 * 5)


def test_the_page_needs_no_network(written: Path) -> None:
    text = (written / "index.html").read_text()
    page = Addresses(text)
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.fetched)
    assert text.count("<svg") == 5
    assert "url(http" not in text
    assert "@import" not in text
    for word in ("60.0 ± 2.0", "pyramiddrop study a&b", "mine & <yours>", "mine: somewhere", "x86_64", "$5 and $6"):
        assert word in page.text


def test_the_page_begins_with_the_conclusion(written: Path) -> None:
    text = Addresses((written / "index.html").read_text()).text
    said = "Of the visual tokens of mine & <yours> 50 % are enough at no layer and 25 % are enough at no layer, if"
    assert (
        text.index("Where are visual tokens redundant?") < text.index(said) < text.index("One drop of visual tokens,")
    )


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({2: 0.02, 4: 0.009, 6: 0.0}, "50 % are enough from layer 4 on"),
        ({2: 0.0, 4: 0.02, 6: 0.0}, "50 % are enough from layer 6 on"),
        ({2: 0.0, 4: 0.0, 6: 0.02}, "50 % are enough at no layer"),
    ],
)
def test_tokens_are_redundant_where_no_deeper_layer_loses_more(losses: dict[int, float], said: str) -> None:
    cells = [cell(layer, 0.5, 0.95 - loss) for layer, loss in losses.items()]
    found = show_redundancy(record({**model("m"), "cells": cells})).conclusion
    assert found == f"Of the visual tokens of m {said}, if a loss of up to 1 point of accuracy counts as none."


def test_without_answers_agreement_concludes() -> None:
    found = show_redundancy(record(model("m", answers=False))).conclusion
    assert found.endswith("if a loss of up to 1 point of agreement with the full model counts as none.")


def test_without_answers_only_what_needs_none_is_shown() -> None:
    shown = show_redundancy(record(model(answers=False)))
    assert [plot.name for plot in shown.plots] == ["redundancy-agreement", "redundancy-top1", "redundancy-kl"]
    assert "no right answers are known" in shown.remarks[0]
    assert {row["metric"] for row in shown.numbers} == {"agreement", "top1", "kl"}


def test_profiles_are_named_after_their_models(tmp_path: Path) -> None:
    assert [path.name for path in write_profiles(record(), tmp_path)] == ["profile.json"]
    several = write_profiles(record(model("a/b"), model("c")), tmp_path)
    assert [path.name for path in several] == ["profile-a-b.json", "profile-c.json"]
    alike = write_profiles(record(model("a b"), model("a/b")), tmp_path)
    assert [path.name for path in alike] == ["profile-a-b-1.json", "profile-a-b-2.json"]
    assert Profile.read(several[1]).losses[2, 0.25] == pytest.approx(0.95 - 0.6)


def test_the_same_study_gives_the_same_files(tmp_path: Path) -> None:
    texts = {save(draw_redundancy([model()], "accuracy"), tmp_path, name).read_bytes() for name in ("a", "b")}
    assert len(texts) == 1
