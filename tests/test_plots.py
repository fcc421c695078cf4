"""Pictures are whole or not there, and no name from outside breaks one."""

import warnings

import numpy
import pytest
import torch
from matplotlib import font_manager
from PIL import Image

from common.metric import Metric
from report import pictures as plots
from report.samples import of_each_class


@pytest.fixture(autouse=True)
def every_warning_is_an_error():
    plots.font_with.cache_clear()
    with warnings.catch_warnings(action="error"):
        yield
    plots.font_with.cache_clear()


def only_fonts(monkeypatch, *names: str) -> None:
    kept = [font for font in font_manager.fontManager.ttflist if font.name in names]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", kept)


def test_names_from_outside_cannot_break_a_picture(tmp_path):
    classes = ["$\\frac{1}{0", "[red]", "\x1b[31m", "a\nb", "x" * 300]
    matrix = torch.eye(5, dtype=torch.int64).tolist()
    plots.confusion(matrix, classes, tmp_path / "c.png")
    plots.sheet(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), classes, tmp_path / "s.png")
    assert len(list(tmp_path.iterdir())) == 2
    assert plots.drawable(classes)[4] == "x" * 23 + "…"


def test_a_class_that_no_font_can_write_is_its_number(tmp_path, monkeypatch):
    only_fonts(monkeypatch, "DejaVu Sans", "Last Resort High-Efficiency")
    assert plots.drawable(["cat", "猫", "chat é"]) == ["cat", "class 1", "chat é"]
    plots.confusion([[1, 0], [1, 1]], ["猫", "狗"], tmp_path / "c.png")
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    plots.sheet(images, ["猫\nas 狗 93 %"], tmp_path / "s.png")


def test_a_font_that_can_write_a_class_is_found(tmp_path, monkeypatch):
    usual, other = (
        set(font_manager.get_font(font_manager.findfont(name)).get_charmap())
        for name in ("DejaVu Sans", "STIXGeneral")
    )
    only_there = "".join(filter(str.isprintable, map(chr, sorted(other - usual))))[:3]
    only_fonts(monkeypatch, "DejaVu Sans", "STIXGeneral")
    assert plots.drawable([only_there]) == [only_there]
    assert plots.fonts_for([only_there])[-1] == "STIXGeneral"
    plots.confusion([[1, 0], [1, 1]], [only_there, "dog"], tmp_path / "c.png")


def test_beside_a_thousand_classes_stand_the_most_frequent_mistakes(tmp_path, monkeypatch):
    matrix = numpy.eye(1000, dtype=int) * 40
    matrix[7, 9], matrix[3, 2] = 10, 60
    told = []
    list_mistakes = plots.list_mistakes

    def listening(axes, *rest):
        list_mistakes(axes, *rest)
        told.append(axes.texts[0].get_text())

    monkeypatch.setattr(plots, "list_mistakes", listening)
    names = [f"class-{number}" for number in range(1000)]
    plots.confusion(matrix.tolist(), names, tmp_path / "c.png")
    title, _, *lines = told[0].splitlines()
    assert title == "most frequent of 70 mistakes in 40070 images"
    assert lines == ["60 of 100  class-3 as class-2", "10 of 50  class-7 as class-9"]
    with Image.open(tmp_path / "c.png") as picture:
        assert min(picture.size) > 800


def test_a_picture_that_fails_half_way_leaves_the_old_one(tmp_path):
    class Failing:
        def savefig(self, path, **options):
            path.write_bytes(b"half")
            raise OSError("no space left")

    (tmp_path / "c.png").write_bytes(b"whole")
    with pytest.raises(OSError, match="no space"):
        plots.save(Failing(), tmp_path / "c.png")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("c.png", b"whole")]


def test_samples_are_of_every_class_before_any_has_two():
    labels = torch.tensor([2] * 50 + [0] * 3 + [5] * 2)
    assert of_each_class(labels, 7).tolist() == [50, 0, 53, 51, 1, 54, 52]
    assert len(of_each_class(labels, 99)) == 55
    assert of_each_class(labels[:0], 4).tolist() == []


def test_few_and_odd_rows_make_curves(tmp_path):
    metrics = (Metric(key="loss", title="$loss"),)
    plots.curves([{"step": 1, "train/loss": 2.0, "lr": 0.1}], metrics, tmp_path / "one.png")
    plots.curves([{"step": 1, "epoch": 1}], (), tmp_path / "none.png")
    assert len(list(tmp_path.iterdir())) == 2
