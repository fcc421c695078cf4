"""The tables of models and recipes; of one its layers; with torchvision: or 'timm:vit_*' names."""

import argparse
import fnmatch
import math
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.parser import need_packages_or_exit
from common.streams import exit_told
from common.text import counted
from models import MODELS, build_model, lookup
from models.looks import published_look
from models.own_file import is_own_file
from models.recipes import RECIPES

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from torch import nn


def main() -> int:
    """Print the table that was asked for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m models", description=__doc__)
    parser.add_argument(
        "model", nargs="?", help="a name of the table, torchvision:NAME, timm:NAME, FILE.py:Class"
    )
    parser.add_argument("--image-size", type=int, help="pixels; default: that of the recipe")
    parser.add_argument("--classes", type=int, default=10)
    arguments = parser.parse_args()
    if arguments.classes < 1:
        parser.error(f"--classes {arguments.classes}: must be at least 1")
    need_packages_or_exit()
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 140  # a file or a pipe has no width; cut nothing
    try:
        if arguments.model is None:
            console.print(table_of_models(arguments.classes))
            console.print(table_of_recipes())
        elif arguments.model.endswith(":") or "*" in arguments.model:
            console.print("\n".join(names_like(arguments.model)), highlight=False, markup=False)
        else:
            named = (arguments.model, arguments.image_size, arguments.classes)
            table, failure = table_of_layers(*named)
            console.print(table)
            if failure:
                print(failure, file=sys.stderr)
                return 2
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def table_of_models(num_classes: int) -> "Table":
    """All models in lesson order, with their recipes from scratch."""
    import torch
    from rich.table import Column, Table

    title = f"Models for {num_classes} classes, in lesson order"
    table = Table(Column("model", no_wrap=True), title=title)  # to be typed: never cut
    for heading in ("parameters", "from size"):
        table.add_column(heading, justify="right")
    table.add_column("recipe from scratch")
    table.add_column("what it is")
    for name, entry in MODELS.items():
        image_size = int(entry.recipe.get("image_size", 1))
        with torch.device("meta"):  # shapes without numbers: no memory, no time
            model = build_model(name, num_classes=num_classes, image_size=image_size)
        recipe = entry.recipe
        images = f"{image_size} px, " if entry.task == "classification" else ""
        table.add_row(
            name,
            f"{count(model.parameters()):,}",
            f"{entry.min_image_size} px" if entry.task == "classification" else "-",
            f"{images}{recipe['optimizer']} {recipe['lr']:g}, "
            f"batch {recipe['batch_size']}, {counted(int(recipe['epochs']), 'epoch')}",
            entry.summary,
        )
    return table


def table_of_recipes() -> "Table":
    """The recipes that --recipe names, with what is claimed of each and by whom."""
    from rich.table import Column, Table

    title = "Recipes: train.py --recipe NAME; more in docs/recipes.md"
    table = Table(Column("recipe", no_wrap=True), title=title)
    for heading in ("what it is", "test accuracy claimed", "time"):
        table.add_column(heading)
    for name, recipe in RECIPES.items():
        table.add_row(name, recipe.summary, recipe.claim, recipe.cost)
    return table


def names_like(pattern: str) -> list[str]:
    """The names of a zoo's classifiers that `zoo:PATTERN` describes."""
    zoo, _, wanted = pattern.partition(":")
    if zoo == "timm":
        from models import timm_zoo

        found = timm_zoo.names_like(wanted)
    elif zoo == "torchvision":
        from torchvision import models

        found = fnmatch.filter(models.list_models(module=models), wanted or "*")
    else:
        raise UserError(f"{pattern}: type torchvision:*NAME* or timm:*NAME*", code="unknown-model")
    return [f"{zoo}:{name}" for name in found]


def table_of_layers(
    name: str, image_size: int | None, num_classes: int, parts: Mapping[str, Any] | None = None
) -> tuple["Table", str]:
    """Layers in the order in which they run in training, auxiliary heads included.

    parts: what else the model is made of, as `models.parts_of` tells it. Where the model fails,
    the layers before that, and a sentence.
    """
    from rich.table import Column, Table

    if image_size is None:
        image_size = int(lookup(name).recipe.get("image_size", 1))
    model, inputs = _to_look_at(name, image_size, num_classes, parts or {})
    title = f"{name} at {image_size} px, {num_classes} classes"
    path = Column("layer", no_wrap=True)
    table = Table(path, "kind", title=title, caption=said_of_weights(name))
    for heading in ("output", "parameters", "multiply-adds"):
        table.add_column(heading, justify="right")
    total = 0
    layers, failure = _as_they_run(model, inputs)
    for path, layer, shape in layers:
        work = math.prod(shape) * _weights_per_output(layer)
        total += work
        sides = " x ".join(map(str, shape))
        kind, held = type(layer).__name__, count(layer.parameters())
        table.add_row(path, kind, sides, f"{held:,}", f"{work:,}")
    table.add_section()
    work = "" if failure else f"{total:,}"
    table.add_row("total", "", "", f"{count(model.parameters()):,}", work)
    return table, failure and f"{name} fails at --image-size {image_size} {failure}"


def _to_look_at(
    name: str, image_size: int, num_classes: int, parts: Mapping[str, Any]
) -> tuple["nn.Module", "torch.Tensor"]:
    """The model and two blank samples; without numbers, where its forward runs without."""
    import torch

    entry = lookup(name)
    images = (2, parts.get("channels", 3), image_size, image_size)
    own = is_own_file(entry.target)
    # A forward of others may make tensors of its own, which must then hold numbers.
    for device in ("cpu",) if own else ("meta", "cpu"):
        try:
            with torch.device(device), torch.no_grad():
                model = build_model(name, num_classes=num_classes, image_size=image_size, **parts)
                inputs = torch.zeros(images if entry.task == "classification" else (2, 1))
                if not own:
                    model(inputs)
            return model, inputs
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            if device == "cpu":
                its_own = entry.recipe.get("image_size")
                raise UserError(
                    f"{name} fails at --image-size {image_size} ({str(error).splitlines()[0]}); "
                    f"its own is {its_own}",
                    code="model-fails",
                ) from error
    raise AssertionError("the last device answers or raises")


def _as_they_run(
    model: "nn.Module", inputs: "torch.Tensor"
) -> tuple[list[tuple[str, "nn.Module", tuple[int, ...]]], str]:
    """Path, layer and the shape of its output for one sample, each time that a layer runs.

    And what ended it, "" if nothing did.
    """
    import torch

    found: list[tuple[str, nn.Module, tuple[int, ...]]] = []
    begun: list[str] = []  # and not done

    def note(path: str, layer: "nn.Module", output: "torch.Tensor | tuple | list") -> None:
        while isinstance(output, tuple | list) and output:  # nn.GRU, nn.MultiheadAttention
            output = output[0]
        if isinstance(output, torch.Tensor):
            found.append((path, layer, tuple(output.shape[1:])))

    for path, layer in model.named_modules():
        if not any(True for _ in layer.children()):
            layer.register_forward_pre_hook(lambda *_, path=path: begun.append(path))
            layer.register_forward_hook(
                lambda layer, _, output, path=path: (begun.pop(), note(path, layer, output))[1]
            )
    try:
        with torch.no_grad():
            model(inputs)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        where = f"in layer {begun[-1]}" if begun else "between its layers, in forward()"
        why = (str(error).splitlines() or [type(error).__name__])[0]
        return found, f"{where}: {why}"
    return found, ""


def _weights_per_output(layer: "nn.Module") -> int:
    """How many products a number of its output sums up; 0 of layers that are not counted."""
    from torch import nn

    if isinstance(layer, nn.Conv2d):
        return layer.weight[0].numel()
    return layer.in_features if isinstance(layer, nn.Linear) else 0


def said_of_weights(name: str) -> str | None:
    """What `--weights imagenet` would bring, and the pictures that it expects."""
    look = published_look(name)
    if look is None:
        return None
    mean, std = (", ".join(f"{number:g}" for number in part) for part in (look.mean, look.std))
    return (
        f"--weights imagenet: {look.origin}; pictures normalised by {mean} / {std}, scaled "
        f"{look.interpolation}, {100 * look.crop:.1f} % of a side seen"
    )


def count(parameters: Iterable["torch.Tensor"]) -> int:
    """How many numbers the parameters hold."""
    return sum(parameter.numel() for parameter in parameters)


if __name__ == "__main__":
    exit_told(main)
