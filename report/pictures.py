"""The pictures a run leaves: curves, confusion matrix, mistakes, samples, a fitted line."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.disk import whole
from common.metric import Metric
from common.text import printable
from report.chart import in_decades

if TYPE_CHECKING:
    import numpy
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

MOST_NAMES = 30  # classes whose names still fit beside a confusion matrix
MOST_MISTAKES = 30  # lines of text beside a larger one
LONGEST_NAME = 24  # characters, of a class beside a picture
SHEET_SIDE, SHEET_TITLE = 1.5, 0.17  # inches: a picture of a sheet, a line of its title


def plain(text: object) -> str:
    """A name from outside as matplotlib may draw it: no math markup, nothing without a glyph."""
    lines = "\n".join(map(printable, str(text).split("\n")))
    shown = (c if has_glyph(c) else f"<{ord(c):X}>" for c in lines)
    return "".join(shown).replace("$", r"\$")


def drawable(classes: list[str]) -> list[str]:
    """Class names for a picture, shortened; one that no installed font can write is its number."""
    return [
        (name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…")
        if all(map(has_glyph, name))
        else f"class {number}"
        for number, name in enumerate(classes)
    ]


def has_glyph(character: str) -> bool:
    """Whether an installed font can draw this character."""
    return character.isspace() or character in "…?" or bool(font_with(character))


@functools.cache
def font_with(character: str) -> str:
    """A font that has this character, matplotlib's own before others; "" if there is none."""
    from matplotlib import font_manager

    def has(path: str) -> bool:
        try:
            return bool(font_manager.get_font(path).get_char_index(ord(character)))
        except (OSError, RuntimeError):
            return False

    usual = font_manager.FontProperties()
    if has(font_manager.findfont(usual)):
        return usual.get_name()
    skip = ("Last Resort", "Emoji")  # boxes for everything; pictures, which cannot be scaled
    for font in font_manager.fontManager.ttflist:
        if not font.name.startswith(skip[0]) and skip[1] not in font.name and has(font.fname):
            return font.name
    return ""


def fonts_for(texts: list[str]) -> list[str]:
    """The usual font and those that write what it lacks, in matplotlib's order of falling back."""
    from matplotlib import rcParams

    found = [font_with(c) for text in texts for c in text if not c.isspace()]
    return [*rcParams["font.family"], *dict.fromkeys(filter(None, found))]


def figure(width: float, height: float) -> "Figure":
    """A matplotlib figure that needs no screen and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def save(drawn: "Figure", path: Path) -> None:
    """Write a figure under its name only when it is whole."""
    with whole(path, sync=False) as partial:
        drawn.savefig(partial, dpi=110, format="png")


def curves(rows: list[dict], metrics: Sequence[Metric], path: Path) -> None:
    """The metrics that want a chart, and the learning rate, over the steps of metrics.jsonl."""
    panels: list[tuple[str, list[str], Metric | None]] = [
        (metric.title, [f"{split}/{metric.key}" for split in ("train", "val", "test")], metric)
        for metric in metrics
        if metric.has("chart")
    ]
    panels.append(("learning rate", ["lr"], None))
    drawn = figure(4 * len(panels), 3.6)
    for place, (title, keys, metric) in enumerate(panels, 1):
        axes = drawn.add_subplot(1, len(panels), place)
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                marker = "o" if len(points) < 40 and key.startswith(("val", "test")) else ""
                axes.plot(*zip(*points, strict=True), label=key, marker=marker, markersize=3)
        axes.set(title=title, xlabel="step")
        if metric is not None and metric.is_share:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
        elif metric is not None and in_decades(row[k] for row in rows for k in keys if k in row):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        if axes.lines and metric is not None:
            axes.legend()
    save(drawn, path)


def confusion(matrix: list[list[int]], classes: list[str], path: Path) -> None:
    """Rows: the true class; columns: what it was taken for; colour: part of the row.

    Beside more classes than have room for their names the most frequent mistakes are listed.
    """
    import numpy

    count, names = len(classes), drawable(classes)
    counts = numpy.asarray(matrix).reshape(count, count)
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    side = min(12, 3.5 + 0.45 * min(count, MOST_NAMES))
    listed = count > MOST_NAMES
    drawn = figure(*((14, 8.5) if listed else (side + 1, side)))
    places = drawn.add_gridspec(1, 1 + listed, width_ratios=[3, 2][: 1 + listed])
    axes = drawn.add_subplot(places[0])
    power = 0.5 if listed else 1  # a small share of one class among many is still to be seen
    image = axes.imshow(shares**power, cmap="Blues", vmin=0, vmax=1)
    bar = drawn.colorbar(image, label="part of the true class", shrink=0.8)
    ticks = [0, 0.01, 0.1, 0.25, 0.5, 1] if listed else [0, 0.25, 0.5, 0.75, 1]
    bar.set_ticks([tick**power for tick in ticks], labels=[f"{tick:g}" for tick in ticks])
    axes.set(xlabel="taken for", ylabel="true class")
    if listed:
        list_mistakes(drawn.add_subplot(places[1]), counts, names)
    else:
        shown, fonts = [plain(name) for name in names], fonts_for(names)
        axes.set_xticks(range(count), shown, rotation=90, family=fonts)
        axes.set_yticks(range(count), shown, family=fonts)
        for y, x in zip(*counts.nonzero(), strict=True):
            colour = "white" if shares[y, x] > 0.5 else "black"
            axes.text(x, y, str(counts[y, x]), ha="center", va="center", color=colour, fontsize=8)
    save(drawn, path)


def list_mistakes(axes: "Axes", counts: "numpy.ndarray", names: list[str]) -> None:
    """The pairs of classes confused most often, from a matrix (n, n), as text."""
    import numpy

    wrong = counts.copy()
    numpy.fill_diagonal(wrong, 0)
    order = numpy.argsort(-wrong, axis=None, kind="stable")[:MOST_MISTAKES]
    pairs = [divmod(int(place), len(names)) for place in order if wrong.flat[place]]
    lines = [f"{counts[y, x]} of {counts[y].sum()}  {names[y]} as {names[x]}" for y, x in pairs]
    title = f"most frequent of {wrong.sum()} mistakes in {counts.sum()} images"
    axes.set_axis_off()
    message = plain("\n".join([title, "", *lines]))
    axes.text(0, 0.5, message, va="center", fontsize=9, family=fonts_for(lines))


def sheet(images: "Tensor", titles: list[str], path: Path) -> None:
    """Pictures, uint8 (n, 3, H, W), in rows of eight, each with a title.

    All stand on one pair of axes, in inches: with axes of their own, 32 of them took seconds.
    """
    columns = min(8, max(1, len(images)))
    lines = max(1, math.ceil(len(images) / columns))
    high = SHEET_TITLE * max((title.count("\n") + 1 for title in titles), default=1)
    wide, high = SHEET_SIDE + 0.12, SHEET_SIDE + high + 0.12
    drawn = figure(wide * columns, high * lines)
    drawn.set_layout_engine("none")
    axes = drawn.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for place, (image, title) in enumerate(zip(images, titles, strict=True)):
        y, x = divmod(place, columns)
        height, width = (SHEET_SIDE * side / max(image.shape[1:]) for side in image.shape[1:])
        middle, bottom = wide * (x + 0.5), high * (y + 1) - 0.06
        box = (middle - width / 2, middle + width / 2, bottom, bottom - height)
        pixels = image.permute(1, 2, 0).numpy()
        axes.imshow(pixels, interpolation="nearest", extent=box, aspect="auto")
        family = fonts_for([title])
        axes.text(middle, bottom - height - 0.04, plain(title), fontsize=8, family=family,
                  ha="center", va="bottom")  # fmt: skip
    axes.set(xlim=(0, wide * columns), ylim=(high * lines, 0))
    save(drawn, path)


def line_fit(inputs: "Tensor", targets: "Tensor", predictions: "Tensor", path: Path) -> None:
    """The points of a regression and the line that was learned; flat tensors."""
    drawn = figure(6, 4.5)
    axes = drawn.add_subplot()
    axes.scatter(inputs.tolist(), targets.tolist(), label="points", color="tab:blue")
    order = inputs.argsort()
    axes.plot(inputs[order].tolist(), predictions[order].tolist(), color="tab:red", label="learned")
    axes.set(xlabel="x", ylabel="y")
    axes.grid(alpha=0.3)
    axes.legend()
    save(drawn, path)


def lr_curve(rates: list[float], losses: list[float], suggestion: float, path: Path) -> None:
    """Smoothed loss against the learning rate, and the rate that is suggested."""
    drawn = figure(7, 4.5)
    axes = drawn.add_subplot()
    axes.plot(rates, losses)
    axes.axvline(suggestion, color="tab:red", linestyle="--", label=f"suggested: {suggestion:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss (smoothed)")
    axes.grid(alpha=0.3)
    axes.legend()
    save(drawn, path)
