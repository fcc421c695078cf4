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


def side_of(told: dict) -> int:
    """Pixels a side of what the model is given when it is evaluated."""
    return int((told.get("photographs") and told.get("eval_size")) or told["image_size"])


def in_unit(pixels: Tensor, told: dict) -> Tensor:
    """uint8 (n, 3, H, W) as evaluation sees it -> what an exported file takes."""
    seen = grey(pixels.float()) if len(told["mean"]) == 1 else pixels.float()
    return resize(seen / 255, side_of(told))


def channels_of(told: dict) -> str:
    """What a model's images are made of."""
    return "RGB" if len(told["mean"]) == 3 else "L"


def plain_name(name: str) -> str:
    """A model or data set without the folder it lies in, which is nobody else's business."""
    return Path(name).name if is_own_file(name) or "/" in name else name


def preprocessing(told: dict) -> dict[str, Json]:
    """From a picture file to the input, in words that another program can follow."""
    size = side_of(told)
    scaled = " (a JPEG far larger than what is seen at 1/2, 1/4 or 1/8 of its sides, by libjpeg)"
    decode = "decode" + scaled * (told.get("decode") == "scaled")
    steps: list[Json] = [f"{decode}, turn as EXIF says, convert to RGB, 8 bits"]
    fill = "rgb({}, {}, {})".format(*mean_colour(told["mean"]))
    small = not told.get("photographs")
    margin = size if small else told.get("eval_resize", default_resize(size))
    how = told.get("resize", "crop")
    if told.get("levels"):
        low, high = told["levels"]
        steps.append(f"16 bits: {low} becomes 0, {high} becomes 255, what lies outside is clipped")
    fitted = {
        "crop": f"scale the shorter side to {margin}, cut the middle {size} x {size}",
        "squash": f"scale to {size} x {size}, whatever the shape",
        "pad": f"scale the longer side to {size}, fill up to a square with {fill}",
    }[how]
    way = told.get("interpolation", "bilinear")
    fitted += f" ({way}, antialiased)"
    if small and (shape := told.get("picture_size")):
        steps.append(f"a picture of {shape[1]} x {shape[0]} pixels stays whole")
    if small:
        steps.append(f"of at most {SMALL} pixels a side: its middle square to {size} x {size}, "
                     "bicubic (Pillow's ImageOps.fit)")  # fmt: skip
        fitted = f"a larger one: {fitted}"
    brightness = "one channel: 0.299 of red, 0.587 of green, 0.114 of blue (ITU-R 601-2)"
    steps += [fitted, *[brightness] * (len(told["mean"]) == 1), "divide by 255"]
    if small and told.get("picture_size", [size, size]) != [size, size]:
        steps.append(f"scale to {size} x {size} (bilinear, antialiased)")
    return {
        "size": size, "shorter_side": margin if how == "crop" else None, "resize": how,
        "crop": "center", "interpolation": way, "antialias": True, "mean": told["mean"],
        "std": told["std"], "steps": steps,
    }  # fmt: skip


def confidences(told: dict) -> str:
    """What makes confidences of the logits."""
    many = told.get("task") == "multilabel"
    return "sigmoid of each class" if many else "softmax over the classes"


def threshold(told: dict) -> dict[str, Json]:
    """From which confidence a picture has a class, where it may have several."""
    return {"threshold": told["threshold"]} if told.get("task") == "multilabel" else {}


def describe(folder: Path, told: dict, last: bool, normalised: bool) -> dict[str, Json]:
    """All that a program needs to know of an exported file.

    normalised: whether mean and std are in the graph; else they are to be applied after all steps.
    """
    config = read_json(folder / "config.json", {}).get("config", {})
    summary = read_json(folder / "summary.json", {})
    start = "test/" if last else "best/test/"
    size, classes = side_of(told), told["classes"]
    return {
        "made_by": "Lockstep", "run": folder.resolve().name, "model": plain_name(told["model"]),
        "dataset": plain_name(str(told.get("dataset", ""))), "weights": "last" if last else "best",
        "step": told.get("step"), "averaged": bool(config.get("ema")), "classes": classes,
        "input": {
            "name": INPUT, "shape": ["batch", len(told["mean"]), size, size], "type": "float32",
            "range": [0, 1], "channels": channels_of(told), "normalised_inside": normalised,
        },
        "output": {
            "name": OUTPUT, "shape": ["batch", len(classes)], "type": "float32",
            "confidences": confidences(told), **threshold(told),
        },
        "preprocessing": preprocessing(told),
        "metrics": {k.removeprefix(start): v for k, v in summary.items() if k.startswith(start)
                    and isinstance(v, int | float) and k.removeprefix(start) != "images"},
    }  # fmt: skip


def card_of(told: dict, about: dict[str, Json]) -> dict[str, Json]:
    """The description, with what predict.py asks weights for and no folder of this machine."""
    card = {k: v for k, v in told.items() if k not in ("facts", "progress")}
    if is_own_file(told["model"]):
        card["model"] = f"{CODE}/{about['model']}"
    return {**about, **card, "dataset": about["dataset"]}


def as_text(description: dict[str, Json]) -> str:
    """The description as it lies in the head of a file."""
    return json.dumps(description, ensure_ascii=False)
