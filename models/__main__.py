"""The tables of models and recipes; of one its layers; with torchvision: or 'timm:vit_*' names."""

import argparse
import fnmatch
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from common.text import counted
from errors import UserError
from models import MODELS, build_model, lookup
from models.looks import published_look
from models.own_file import is_own_file
from models.recipes import RECIPES

if TYPE_CHECKING:
    import torch
    from rich.table import Table


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
            console.print(table_of_layers(arguments.model, arguments.image_size, arguments.classes))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def table_of_models(num_classes: int) -> "Table":
    """All models in lesson order, with their recipes from scratch."""
    import torch
    from rich.table import Table

    table = Table("model", title=f"Models for {num_classes} classes, in lesson order")
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
    from rich.table import Table

    table = Table("recipe", title="Recipes: train.py --recipe NAME; more in docs/recipes.md")
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
    name: str, image_size: int | None, num_classes: int, channels: int = 3, blurpool: str = "none"
) -> "Table":
    """Layers in the order in which they run in training, auxiliary heads included."""
    import torch
    from rich.table import Table
    from torch import nn

    entry = lookup(name)
    if image_size is None:
        image_size = int(entry.recipe.get("image_size", 1))
    shape = (2, channels, image_size, image_size) if entry.task == "classification" else (2, 1)
    # A forward of others may make tensors of its own, which must then hold numbers.
    for device in ("cpu",) if is_own_file(entry.target) else ("meta", "cpu"):
        try:
            with torch.device(device), torch.no_grad():
                model = build_model(
                    name, num_classes=num_classes, image_size=image_size, channels=channels,
                    blurpool=blurpool,
                )  # fmt: skip
                inputs = torch.zeros(shape)
                if not is_own_file(entry.target):
                    model(inputs)
            break
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            if device == "cpu":
                own = entry.recipe.get("image_size")
                raise UserError(
                    f"{name} fails at --image-size {image_size} ({str(error).splitlines()[0]}); "
                    f"its own is {own}",
                    code="model-fails",
                ) from error

    title = f"{name} at {image_size} px, {num_classes} classes"
    table = Table("layer", "kind", title=title, caption=said_of_weights(name))
    for heading in ("output", "parameters", "multiply-adds"):
        table.add_column(heading, justify="right")
    total = 0

    def add_row(path: str, layer: nn.Module, output: "torch.Tensor | tuple | list") -> None:
        nonlocal total
        while isinstance(output, tuple | list) and output:  # nn.GRU, nn.MultiheadAttention
            output = output[0]
        if not isinstance(output, torch.Tensor):
            return
        size = output[0].numel()  # of one image
        weights_per_output = 0
        if isinstance(layer, nn.Conv2d):
            weights_per_output = layer.weight[0].numel()
        elif isinstance(layer, nn.Linear):
            weights_per_output = layer.in_features
        total += size * weights_per_output
        table.add_row(
            path,
            type(layer).__name__,
            " x ".join(map(str, output.shape[1:])),
            f"{count(layer.parameters()):,}",
            f"{size * weights_per_output:,}",
        )

    for path, layer in model.named_modules():
        if not any(True for _ in layer.children()):
            layer.register_forward_hook(
                lambda layer, _, output, path=path: add_row(path, layer, output)
            )
    with torch.no_grad():
        model(inputs)
    table.add_section()
    table.add_row("total", "", "", f"{count(model.parameters()):,}", f"{total:,}")
    return table


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
    sys.exit(main())
