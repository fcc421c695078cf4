"""What the pictures looked like that weights were trained on, as far as the weights say it."""

import json
from dataclasses import dataclass
from pathlib import Path

from models import TIMM, card_of_weights, lookup


@dataclass(frozen=True)
class Look:
    """By what pictures were normalised (in 0..1), how they were scaled, how much of them was seen.

    `crop` is the seen part of the side that photographs were scaled to, 224 / 256; `origin` says
    in a few words who says all this.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float
    interpolation: str  # "bilinear" or "bicubic"
    origin: str


def look_of(model: str, weights: str) -> Look | None:
    """What weights (a file, or "imagenet") say; None where they do not.

    A file says it of itself, if a run wrote it, or by the config.json beside it, as the hub has it.
    """
    if weights == "imagenet":
        return published_look(model)
    if card := card_of_weights(weights):
        return _of_card(card)
    beside = Path(weights).expanduser().parent / "config.json"
    try:
        said = json.loads(beside.read_text(encoding="utf-8"))["pretrained_cfg"]
        return Look(
            _three(said["mean"]), _three(said["std"]), float(said.get("crop_pct") or 0.875),
            _way(said.get("interpolation", "")), str(beside),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return None


def published_look(model: str) -> Look | None:
    """What is said of the weights that torchvision or timm publish for a model."""
    published = lookup(model).pretrained
    if not published:
        return None
    if published.startswith(TIMM):
        from models import timm_zoo

        cfg = timm_zoo.config_of(published.removeprefix(TIMM))
        mean, std = _three(cfg.mean), _three(cfg.std)
        return Look(
            mean, std, cfg.crop_pct, _way(cfg.interpolation), f"timm's weights of {cfg.tag}"
        )
    from torchvision.models import get_model_weights

    said = get_model_weights(published)["DEFAULT"].transforms()
    crop, way = said.crop_size[0] / said.resize_size[0], _way(said.interpolation.value)
    return Look(_three(said.mean), _three(said.std), crop, way, "torchvision's weights")


def _of_card(card: dict) -> Look | None:
    try:
        crop = card["eval_size"] / card["eval_resize"] if card.get("eval_resize") else 0.875
        way = _way(card.get("interpolation", ""))
        return Look(_three(card["mean"]), _three(card["std"]), crop, way, "the run's own")
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _way(name: str) -> str:
    return "bicubic" if name == "bicubic" else "bilinear"


def _three(numbers: list | tuple) -> tuple[float, ...]:
    """A number for each colour."""
    found = tuple(float(number) for number in numbers)
    if len(found) == 1:
        found *= 3
    if len(found) != 3:
        raise ValueError(numbers)
    return found
