"""The architectures: one table in lesson order, name -> where it is, minimum image size, recipe.

This file imports no torch, so that the command line can read the table at once.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.text import class_name, did_you_mean
from models.own_file import (
    call_with_known_arguments,
    check_own_file,
    is_own_file,
    load_own_class,
    size_lazy_layers,
)

if TYPE_CHECKING:
    from torch import nn

TORCHVISION, TIMM = "torchvision:", "timm:"
PARTS = {"channels": 3, "blurpool": "none"}  # what else decides what a model is made of
Recipe = dict[str, str | int | float]  # fields of TrainConfig -> values
# How torchvision's names begin: only then it is worth the two seconds to look them up.
ZOO = (
    "convnext", "densenet", "efficientnet_", "maxvit", "mnasnet", "mobilenet", "regnet", "resne",
    "shufflenet", "squeezenet", "swin", "vgg", "vit_", "wide_resnet",
)  # fmt: skip


@dataclass(frozen=True)
class ModelEntry:
    """What the trainer knows about a model before it is built.

    target: "module:Class" in this folder, "torchvision:name", "timm:name" or
        "path/to/file.py:Class".
    multiple_of: what an image size must be a multiple of.
    recipe: values of TrainConfig fields when training starts from scratch.
    finetune: values that replace those of the recipe when it starts from weights of any origin.
    pretrained: torchvision's name of the ImageNet weights, or "timm:name"; "" where there are none.
    channels_last: whether images and weights lie so in memory. Not where a forward may use .view,
        nor where it flattens large maps: my_cnn takes 15 % less CPU time in the plain layout.
    """

    target: str
    min_image_size: int
    summary: str
    recipe: Recipe
    finetune: Recipe = field(default_factory=dict)
    pretrained: str = ""
    task: str = "classification"
    channels_last: bool = True
    multiple_of: int = 1


# Learning rates belong to the batch size beside them; warmup is in epochs.
_ADAMW: Recipe = {
    "image_size": 32,
    "batch_size": 64,
    "epochs": 10,
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.01,
    "schedule": "cosine",
    "warmup": 0.5,
    "augment": "crop",
}
_FINETUNE: Recipe = {
    "image_size": 224,
    "batch_size": 32,
    "epochs": 5,
    "optimizer": "adamw",
    "lr": 1e-4,
    "augment": "resized_crop",
    "label_smoothing": 0.0,
}
# AlexNet and VGG have no batch norm: SGD, small steps, as in their papers.
_FINETUNE_SGD: Recipe = _FINETUNE | {
    "optimizer": "sgd",
    "lr": 0.005,
    "momentum": 0.9,
    "weight_decay": 5e-4,
}

MODELS: dict[str, ModelEntry] = {
    "linear_regression": ModelEntry(
        target="linear_regression:LinearRegression",
        min_image_size=1,
        summary="the first lesson: y = wx + b, on points of a line",
        recipe={
            "batch_size": 30,
            "epochs": 300,
            "optimizer": "sgd",
            "lr": 0.01,
            "momentum": 0.0,
            "weight_decay": 0.0,
            "schedule": "constant",
            "warmup": 0.0,
            "augment": "none",
        },
        task="regression",
        channels_last=False,
    ),
    "my_cnn": ModelEntry(
        target="my_cnn:MyCNN",
        min_image_size=1,
        summary="the homework: one convolution, one linear layer over the whole map",
        # A step of Adam moves every weight by lr, and a logit sums 800,000 of them at 224.
        recipe=_ADAMW | {"image_size": 224, "epochs": 5, "lr": 1e-5, "augment": "flip"},
        channels_last=False,
    ),
    "alexnet": ModelEntry(
        target="alexnet:AlexNet",
        min_image_size=63,
        summary="2012, Krizhevsky et al. (one-column form of 2014): deep nets win ImageNet",
        recipe=_ADAMW | {"image_size": 64, "epochs": 12, "lr": 5e-4},
        finetune=_FINETUNE_SGD,
        pretrained="alexnet",
    ),
    "vgg11": ModelEntry(
        target="vgg:vgg11",
        min_image_size=32,
        summary="2014, Simonyan & Zisserman (column A): only 3x3 convolutions",
        recipe=_ADAMW | {"epochs": 30, "lr": 3e-4, "warmup": 1.0},
        finetune=_FINETUNE_SGD,
        pretrained="vgg11",
    ),
    "vgg16": ModelEntry(
        target="vgg:vgg16",
        min_image_size=32,
        summary="2014, Simonyan & Zisserman (column D): deeper, still only 3x3",
        recipe=_ADAMW | {"epochs": 30, "lr": 3e-4, "warmup": 1.0},
        finetune=_FINETUNE_SGD,
        pretrained="vgg16",
    ),
    "resnet18": ModelEntry(
        target="resnet:resnet18",
        min_image_size=8,
        summary="2015, He et al.: shortcuts; with the 3x3 first layer for small images",
        recipe={
            "image_size": 32,
            "batch_size": 128,
            "epochs": 30,
            "optimizer": "sgd",
            "lr": 0.1,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "schedule": "cosine",
            "warmup": 1.0,
            "augment": "crop",
            "label_smoothing": 0.1,
        },
        finetune={"batch_size": 32, "epochs": 10, "lr": 0.01, "warmup": 0.0},
    ),
    "googlenet": ModelEntry(
        target="torchvision:googlenet",
        min_image_size=32,
        summary="2014, Szegedy et al.: parallel branches, two auxiliary heads (0.3)",
        recipe=_ADAMW | {"image_size": 96, "epochs": 30, "warmup": 1.0},
        finetune=_FINETUNE,
        pretrained="googlenet",
    ),
    "inception_v3": ModelEntry(
        target="torchvision:inception_v3",
        min_image_size=75,
        summary="2015, Szegedy et al.: factorised convolutions, an auxiliary head (0.4)",
        recipe=_ADAMW | {"image_size": 96, "epochs": 30, "warmup": 1.0, "label_smoothing": 0.1},
        finetune=_FINETUNE | {"image_size": 299},
        pretrained="inception_v3",
    ),
    "efficientnet_b0": ModelEntry(
        target="torchvision:efficientnet_b0",
        min_image_size=32,
        summary="2019, Tan & Le: depth, width and resolution scaled together",
        recipe=_ADAMW | {"image_size": 64, "epochs": 30, "warmup": 1.0, "label_smoothing": 0.1},
        finetune=_FINETUNE,
        pretrained="efficientnet_b0",
    ),
    "speednet": ModelEntry(
        target="speednet:SpeedNet",
        min_image_size=9,
        summary="2024, Jordan: the small net of the CIFAR-10 speed records",
        recipe={
            "image_size": 32,
            "batch_size": 2000,
            "epochs": 8,
            "optimizer": "muon",
            "lr": 0.24,
            "momentum": 0.6,
            "weight_decay": 2e-6 * 2000 / 0.24,
            "schedule": "linear",
            "warmup": 0.0,
            "augment": "translate",
            "alternating_flip": True,
            "label_smoothing": 0.2,
        },
    ),
}


def lookup(name: str) -> ModelEntry:
    """The entry of a model in the table, of torchvision:NAME, timm:NAME or FILE.py:Class."""
    if name in MODELS:
        return MODELS[name]
    if name.startswith(TORCHVISION):
        return _torchvision_entry(name.removeprefix(TORCHVISION))
    if name.startswith(TIMM):
        return _timm_entry(name.removeprefix(TIMM))
    if is_own_file(name):
        check_own_file(name)
        return ModelEntry(
            name, min_image_size=1, summary="your own module", recipe=_ADAMW, channels_last=False
        )
    raise UserError(
        f"--model {name}: no such model{_near(name)}; known: {', '.join(MODELS)}, "
        "any classifier of torchvision as torchvision:<name> or of timm as timm:<name>, your own "
        "as path/to/file.py:ClassName",
        code="unknown-model",
    )


def _near(name: str) -> str:
    """' (did you mean torchvision:resnet34?)': a file, our own models, torchvision's exact name."""
    path, _, made = name.replace(".", "/").replace(":", "/").rpartition("/")
    files = {f"{path}.py": f":{made}", f"{name.replace('.', '/')}.py": ":ClassName"}
    for file, rest in files.items():  # as an import would name it
        if name and Path(file).is_file():
            return f" (did you mean {file}{rest}?)"
    if Path(name).is_dir():
        return f" ({name} is a folder: type {Path(name) / 'FILE.py:ClassName'})"
    stem = name.rpartition(":")[2].rpartition("/")[2].lower().replace("-", "_")
    if stem in MODELS:
        return f" (did you mean {stem}?)"
    if stem.startswith(ZOO):
        try:
            from torchvision import models as zoo

            if stem in zoo.list_models(module=zoo):
                return f" (did you mean {TORCHVISION}{stem}?)"
        except ImportError:
            pass
    return did_you_mean(name, MODELS)


def card_of_weights(weights: str) -> dict:
    """What a run wrote into its weights: model, sizes, classes, code, ...; {} for others."""
    try:
        with Path(weights).expanduser().open("rb") as file:  # safetensors: a length, a JSON header
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), 10**7)))
        card = json.loads(header["__metadata__"]["lockstep"])
        classes = tuple(map(class_name, card.get("classes", ())))
        code = {str(k): str(v) for k, v in dict(card.get("code", {})).items()}
        size = int(card["image_size"])
        facts = {"model": str(card["model"]), "image_size": size, "code": code}
        seen = ("mean", "std", "eval_size", "eval_resize", "interpolation", *PARTS)
        return {**facts, "classes": classes, **{k: card[k] for k in seen if k in card}}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def build_from(facts: Mapping[str, Any], num_classes: int, name: str = "") -> nn.Module:
    """The model of a run: `facts` are its configuration, or what its weights say of themselves.

    name: another one, where the file of a class has moved.
    """
    return build_model(
        name or facts["model"], num_classes=num_classes, image_size=facts["image_size"],
        drop_path=facts.get("drop_path"), **parts_of(facts),
    )  # fmt: skip


def parts_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is made of beside its name, classes and size, where it is not the usual."""
    return {k: facts[k] for k, usual in PARTS.items() if facts.get(k, usual) != usual}


def build_model(
    name: str, *, num_classes: int, image_size: int, drop_path: float | None = None,
    channels: int = 3, blurpool: str = "none",
) -> nn.Module:  # fmt: skip
    """The model, initialised from torch's global generator: seed that for repeatable weights.

    drop_path: the rate of stochastic depth; None: the model's own, in most none. channels: of the
    images. blurpool: "conv" or "all" of what downsamples is anti-aliased (blurpool.py).
    """
    entry = lookup(name)
    if problem := size_problem(name, entry, image_size):
        raise UserError(problem, code="image-too-small")
    module, _, attribute = entry.target.rpartition(":")
    if is_own_file(entry.target):
        make = load_own_class(entry.target)
    elif module in ("torchvision", "timm"):
        zoo = importlib.import_module(f"models.{module}_zoo")
        make = partial(zoo.build, attribute)
    else:
        make = getattr(importlib.import_module(f"models.{module}"), attribute)
    known: dict[str, float] = {"num_classes": num_classes, "image_size": image_size}
    if drop_path is not None:
        if "drop_path" not in inspect.signature(make).parameters:
            raise no_drop_path(name)
        known["drop_path"] = drop_path
    if channels != 3:
        known |= {"in_channels": channels, "in_chans": channels}
        takes = inspect.signature(make).parameters
        if not (is_own_file(entry.target) or "in_channels" in takes):
            raise UserError(f"--channels {channels}: {name} sees no images", code="contradiction")
    model = call_with_known_arguments(make, known, name)
    if is_own_file(entry.target):
        size_lazy_layers(model, image_size, name, channels)
    if blurpool != "none":
        blur = importlib.import_module("models.blurpool")
        if not blur.add_blur(model, pools=blurpool == "all"):
            raise UserError(
                f"--blurpool {blurpool}: {name} has no layer that it is for: a strided nn.Conv2d "
                "of 16 channels and more, or with all an nn.MaxPool2d",
                code="nothing-to-blur",
            )
    if {parameter.requires_grad for parameter in model.parameters()} == {False}:
        raise UserError(
            f"--model {name}: no parameter has requires_grad=True, so nothing can learn; take out "
            "what freezes them (--freeze backbone trains the last layer alone)",
            code="nothing-trains",
        )
    return model


def size_problem(name: str, entry: ModelEntry, size: int) -> str:
    """Why a model cannot see images of this size, and which one it can; "" if it can."""
    if entry.task != "classification":
        return ""
    least, step = entry.min_image_size, entry.multiple_of
    if size < least:
        usual = max(least, int(entry.recipe["image_size"]))
        return f"--image-size {size}: {name} needs at least {least}; type --image-size {usual}"
    if size % step:
        near = step * max(1, round(size / step))
        return f"--image-size {size}: {name} sees multiples of {step}; type --image-size {near}"
    return ""


def no_drop_path(name: str) -> UserError:
    """The sentence for --drop-path where a model has nothing that could be left out."""
    return UserError(
        f"--drop-path: {name} has no stochastic depth; resnet18, torchvision's convnext, "
        "efficientnet, maxvit and swin have, most residual models of timm, and a class of your own "
        "whose __init__ takes drop_path",
        code="no-drop-path",
    )


def _torchvision_entry(name: str) -> ModelEntry:
    for entry in MODELS.values():
        if entry.target == TORCHVISION + name:
            return entry
    from torchvision import models as zoo

    known = zoo.list_models(module=zoo)  # this module alone: the classifiers
    if name not in known:
        raise UserError(
            f"--model {TORCHVISION}{name}: torchvision has no classifier of that name"
            f"{did_you_mean(name, known)}; it has {', '.join(known)}",
            code="unknown-model",
        )
    least, step = max(zoo.get_model_weights(name)["DEFAULT"].meta["min_size"]), 1
    if name.startswith("vit_"):
        least = step = int(name.rpartition("_")[2])  # a patch
    elif name.startswith("maxvit"):
        step = least  # its windows divide each map
    elif name.startswith(("swin", "efficientnet_v2")):
        least = 4 if name.startswith("swin") else 1  # smaller than what they were trained on
    return ModelEntry(
        target=TORCHVISION + name,
        min_image_size=least,
        multiple_of=step,
        summary="from torchvision",
        recipe=_ADAMW | {"image_size": 224},
        finetune=_FINETUNE,
        pretrained=name,
    )


@functools.cache
def _timm_entry(name: str) -> ModelEntry:
    zoo = importlib.import_module("models.timm_zoo")
    cfg = zoo.config_of(name)
    size = {"image_size": cfg.input_size[1]}
    return ModelEntry(
        target=TIMM + name,
        min_image_size=min(cfg.min_input_size[1:]) if cfg.min_input_size else 1,
        summary="from timm",
        recipe=_ADAMW | size,
        finetune=_FINETUNE | size,
        pretrained=TIMM + name if zoo.can_be_had(cfg) else "",
    )
