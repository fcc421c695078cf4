"""The model as others ask it: pictures in 0..1 in, logits out; and what a file says of itself."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from common.disk import Json, read_json
from data.augment import resize
from data.cuts import default_resize
from data.files import SMALL
from data.grey import grey, mean_colour
from models.own_file import CODE, is_own_file
from tasks import split_outputs

INPUT, OUTPUT = "images", "logits"  # of an exported graph


class Service(nn.Module):
    """A classifier whose normalisation is inside: (n, C, S, S) in 0..1 -> logits (n, classes).

    C is 3, RGB, or 1, the brightness.

    Pixels in 0..1 are what every image library gives after a division by 255, so that nobody can
    forget a mean; cutting and scaling, which no graph does as well, stay outside and are described.
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        scale = [1 / value for value in std]
        shift = [-m / s for m, s in zip(mean, std, strict=True)]
        for name, values in (("scale", scale), ("shift", shift)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        scale, shift = cast(Tensor, self.scale), cast(Tensor, self.shift)
        return split_outputs(self.model(images * scale + shift))[0].float()


def side_of(card: dict) -> int:
    """Pixels a side of what the model is given when it is evaluated."""
    return int((card.get("photographs") and card.get("eval_size")) or card["image_size"])


def in_unit(pixels: Tensor, card: dict) -> Tensor:
    """uint8 (n, 3, H, W) as evaluation sees it -> what an exported file takes."""
    seen = grey(pixels.float()) if len(card["mean"]) == 1 else pixels.float()
    return resize(seen / 255, side_of(card))


def channels_of(card: dict) -> str:
    """What a model's images are made of."""
    return "RGB" if len(card["mean"]) == 3 else "L"


def plain_name(name: str) -> str:
    """A model or data set without the folder it lies in, which is nobody else's business."""
    return Path(name).name if is_own_file(name) or "/" in name else name


def preprocessing(card: dict) -> dict[str, Json]:
    """From a picture file to the input, in words that another program can follow."""
    size = side_of(card)
    scaled = " (a JPEG far larger than what is seen at 1/2, 1/4 or 1/8 of its sides, by libjpeg)"
    decode = "decode" + scaled * (card.get("decode") == "scaled")
    steps: list[Json] = [f"{decode}, turn as EXIF says, convert to RGB, 8 bits"]
    fill = "rgb({}, {}, {})".format(*mean_colour(card["mean"]))
    small = not card.get("photographs")
    margin = size if small else card.get("eval_resize", default_resize(size))
    how = card.get("resize", "crop")
    if card.get("levels"):
        low, high = card["levels"]
        steps.append(f"16 bits: {low} becomes 0, {high} becomes 255, what lies outside is clipped")
    fitted = {
        "crop": f"scale the shorter side to {margin}, cut the middle {size} x {size}",
        "squash": f"scale to {size} x {size}, whatever the shape",
        "pad": f"scale the longer side to {size}, fill up to a square with {fill}",
    }[how]
    way = card.get("interpolation", "bilinear")
    fitted += f" ({way}, antialiased)"
    if small and (shape := card.get("picture_size")):
        steps.append(f"a picture of {shape[1]} x {shape[0]} pixels stays whole")
    if small:
        steps.append(f"of at most {SMALL} pixels a side: its middle square to {size} x {size}, "
                     "bicubic (Pillow's ImageOps.fit)")  # fmt: skip
        fitted = f"a larger one: {fitted}"
    brightness = "one channel: 0.299 of red, 0.587 of green, 0.114 of blue (ITU-R 601-2)"
    steps += [fitted, *[brightness] * (len(card["mean"]) == 1), "divide by 255"]
    if small and card.get("picture_size", [size, size]) != [size, size]:
        steps.append(f"scale to {size} x {size} (bilinear, antialiased)")
    return {
        "size": size, "shorter_side": margin if how == "crop" else None, "resize": how,
        "crop": "center", "interpolation": way, "antialias": True, "mean": card["mean"],
        "std": card["std"], "steps": steps,
    }  # fmt: skip


def confidences(card: dict) -> str:
    """What makes confidences of the logits."""
    many = card.get("task") == "multilabel"
    return "sigmoid of each class" if many else "softmax over the classes"


def threshold(card: dict) -> dict[str, Json]:
    """From which confidence a picture has a class, where it may have several."""
    return {"threshold": card["threshold"]} if card.get("task") == "multilabel" else {}


def describe(folder: Path, card: dict, last: bool, normalised: bool) -> dict[str, Json]:
    """All that a program needs to know of an exported file.

    normalised: whether mean and std are in the graph; else they are to be applied after all steps.
    """
    config = read_json(folder / "config.json", {}).get("config", {})
    summary = read_json(folder / "summary.json", {})
    start = "test/" if last else "best/test/"
    size, classes = side_of(card), card["classes"]
    return {
        "made_by": "Lockstep", "run": folder.resolve().name, "model": plain_name(card["model"]),
        "dataset": plain_name(str(card.get("dataset", ""))), "weights": "last" if last else "best",
        "step": card.get("step"), "averaged": bool(config.get("ema")), "classes": classes,
        "input": {
            "name": INPUT, "shape": ["batch", len(card["mean"]), size, size], "type": "float32",
            "range": [0, 1], "channels": channels_of(card), "normalised_inside": normalised,
        },
        "output": {
            "name": OUTPUT, "shape": ["batch", len(classes)], "type": "float32",
            "confidences": confidences(card), **threshold(card),
        },
        "preprocessing": preprocessing(card),
        "metrics": {k.removeprefix(start): v for k, v in summary.items() if k.startswith(start)
                    and isinstance(v, int | float) and k.removeprefix(start) != "images"},
    }  # fmt: skip


def exported_card(card: dict, about: dict[str, Json]) -> dict[str, Json]:
    """The description, with what predict.py asks weights for and no folder of this machine."""
    kept = {k: v for k, v in card.items() if k not in ("facts", "progress")}
    if is_own_file(card["model"]):
        kept["model"] = f"{CODE}/{about['model']}"
    return {**about, **kept, "dataset": about["dataset"]}


def as_text(description: dict[str, Json]) -> str:
    """The description as it lies in the head of a file."""
    return json.dumps(description, ensure_ascii=False)
