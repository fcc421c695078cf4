"""The pictures a run leaves: curves, confusion matrix, mistakes, samples, a fitted line."""

import math
from pathlib import Path

MOST_NAMES = 30  # classes whose names still fit beside a confusion matrix


def plain(text: object) -> str:
    """A name from outside as matplotlib may draw it: no math markup, no control characters."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in str(text)).replace(
        "$", r"\$"
    )


def figure(*arguments, **options):
    """A matplotlib figure that needs no screen and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(*arguments, layout="constrained", **options)
    FigureCanvasAgg(made)
    return made


def curves(rows: list[dict], path: Path) -> None:
    """Loss, accuracy (or R2) and learning rate over the steps, from the rows of metrics.jsonl."""
    score = "r2" if any("test/r2" in row for row in rows) else "accuracy"
    panels = [("loss", ["train/loss", "val/loss", "test/loss"])]
    panels.append((score, [f"val/{score}", f"test/{score}"]))
    panels.append(("learning rate", ["lr"]))
    drawn = figure(figsize=(12, 3.6))
    for place, (title, keys) in enumerate(panels, 1):
        axes = drawn.add_subplot(1, 3, place)
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                marker = "o" if len(points) < 40 and key != "train/loss" else ""
                axes.plot(*zip(*points, strict=True), label=key, marker=marker, markersize=3)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend()
    drawn.savefig(path, dpi=110)


def confusion(matrix: list[list[int]], classes: list[str], path: Path) -> None:
    """Rows: the true class; columns: what it was taken for; colour: part of the row."""
    count = len(classes)
    shares = [[cell / max(1, sum(row)) for cell in row] for row in matrix]
    side = min(12, 3.5 + 0.45 * min(count, MOST_NAMES))
    drawn = figure(figsize=(side + 1, side))
    axes = drawn.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    drawn.colorbar(image, label="part of the true class", shrink=0.8)
    axes.set(xlabel="taken for", ylabel="true class")
    if count <= MOST_NAMES:
        names = [plain(name) for name in classes]
        axes.set_xticks(range(count), names, rotation=90)
        axes.set_yticks(range(count), names)
        for y, row in enumerate(matrix):
            for x, cell in enumerate(row):
                if cell:
                    colour = "white" if shares[y][x] > 0.5 else "black"
                    axes.text(x, y, cell, ha="center", va="center", color=colour, fontsize=8)
    drawn.savefig(path, dpi=110)


def sheet(images, titles: list[str], path: Path, colours: list[str] | None = None) -> None:
    """Pictures, uint8 (n, 3, H, W), in rows of eight, each with a title."""
    columns = min(8, max(1, len(images)))
    lines = math.ceil(len(images) / columns)
    drawn = figure(figsize=(1.6 * columns, 1.9 * max(1, lines)))
    for place, (image, title) in enumerate(zip(images, titles, strict=True), 1):
        axes = drawn.add_subplot(lines, columns, place)
        axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(plain(title), fontsize=8, color=colours[place - 1] if colours else "black")
        axes.set_axis_off()
    drawn.savefig(path, dpi=110)


def line_fit(inputs, targets, predictions, path: Path) -> None:
    """The points of a regression and the line that was learned; flat tensors."""
    drawn = figure(figsize=(6, 4.5))
    axes = drawn.add_subplot()
    axes.scatter(inputs.tolist(), targets.tolist(), label="points", color="tab:blue")
    order = inputs.argsort()
    axes.plot(inputs[order].tolist(), predictions[order].tolist(), color="tab:red", label="learned")
    axes.set(xlabel="x", ylabel="y")
    axes.grid(alpha=0.3)
    axes.legend()
    drawn.savefig(path, dpi=110)


def lr_curve(rates: list[float], losses: list[float], suggestion: float, path: Path) -> None:
    """Smoothed loss against the learning rate, and the rate that is suggested."""
    drawn = figure(figsize=(7, 4.5))
    axes = drawn.add_subplot()
    axes.plot(rates, losses)
    axes.axvline(suggestion, color="tab:red", linestyle="--", label=f"suggested: {suggestion:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss (smoothed)")
    axes.grid(alpha=0.3)
    axes.legend()
    drawn.savefig(path, dpi=110)
