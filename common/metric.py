"""The numbers of an evaluation, which say of themselves how they are written and judged."""

import re
from collections.abc import Callable
from dataclasses import dataclass

# Where a metric may be shown: on an epoch's line, with its best so far, in a chart, at the end.
PLACES = frozenset({"line", "best", "chart", "end"})


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Declared once, in METRICS; screen, page, plots and the choice of the best weights obey.

    `key` is its name in metrics.jsonl, behind the split ("test/loss"). `format` is Python's, of a
    float; one that ends in % is for a share of the images. `higher_is_better` also decides which of
    two weights are better where the task says that this metric chooses.
    """

    key: str
    title: str
    format: str = ".4f"
    higher_is_better: bool = False
    shown: tuple[str, ...] = ("line", "chart")

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError for what no program of ours would declare.

        The page reads declarations from a file.
        """
        if not (re.fullmatch(r",?\.\d[efg%]", self.format) and PLACES.issuperset(self.shown)):
            raise ValueError(f"no declaration of a metric: {self}")

    def has(self, place: str) -> bool:
        """Whether it is shown there, one of PLACES."""
        return place in self.shown

    @property
    def is_share(self) -> bool:
        return self.format.endswith("%")

    def show(self, value: float) -> str:
        """`98.59 %`, `0.0515`, `4,053`, `2e+28`: as every screen and page writes it."""
        if not self.format.endswith("f") or abs(value) < 1000:
            return f"{value:{self.format}}".replace("%", " %")
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.4g}"  # of a loss that explodes

    def named(self, value: float) -> str:
        """`accuracy 98.59 %`."""
        return f"{self.title} {self.show(value)}"

    def about(self, images: str) -> str:
        """What follows the value: `of 355 test images`, `R2 on 355 test images`."""
        return f"of {images}" if self.is_share else f"{self.title} on {images}"

    def on_axis(self, otherwise: Callable[[float], str]) -> Callable[[float], str]:
        """How the marks of a chart's axis are written: shares as percentages."""
        return (lambda value: f"{100 * value:.4g} %") if self.is_share else otherwise

    def better_as_shown(self, new: float, old: float | None) -> bool:
        """Whether it is better as it is printed: what another order of additions cannot change.

        But for a tie in the last digit.
        """
        shown = [v and float(f"{v:{self.format}}".strip("%").replace(",", "")) for v in (new, old)]
        return old is None or self.better(shown[0] or 0.0, shown[1])

    def better(self, new: float, old: float | None) -> bool:
        return old is None or (new > old if self.higher_is_better else new < old)


LOSS = Metric(key="loss", title="loss")

# By task, in the order in which they are shown. The loss is always among them.
METRICS: dict[str, tuple[Metric, ...]] = {
    "classification": (
        LOSS,
        Metric(
            key="accuracy", title="accuracy", format=".2%", higher_is_better=True,
            shown=("line", "best", "chart"),
        ),
        Metric(
            key="top5", title="top 5", format=".2%", higher_is_better=True, shown=("best", "end")
        ),
        Metric(
            key="balanced_accuracy", title="balanced accuracy", format=".2%",
            higher_is_better=True, shown=("best", "end"),
        ),
        Metric(
            key="macro_precision", title="macro precision", higher_is_better=True, shown=("end",)
        ),
        Metric(key="macro_f1", title="macro F1", higher_is_better=True, shown=("best", "end")),
        Metric(key="auroc", title="AUROC", higher_is_better=True, shown=("best", "end")),
        Metric(key="ece", title="calibration error", shown=("best", "end")),
    ),
    "multilabel": (
        LOSS,
        Metric(key="mean_ap", title="mAP", higher_is_better=True, shown=("line", "best", "chart")),
        Metric(key="macro_f1", title="macro F1", higher_is_better=True, shown=("best", "end")),
        Metric(
            key="micro_f1", title="micro F1", higher_is_better=True,
            shown=("line", "best", "end", "chart"),
        ),
        Metric(
            key="exact_match", title="all classes right", format=".2%", higher_is_better=True,
            shown=("best", "end"),
        ),
    ),
    "regression": (
        LOSS,
        Metric(key="r2", title="R2", higher_is_better=True),
    ),
}  # fmt: skip


def selectable(task: str) -> tuple[str, ...]:
    """What --select may name: what an epoch's line or the best so far is shown by."""
    return tuple(m.key for m in METRICS[task] if m.has("line") or m.has("best"))
