"""Recipes with claims: settings that belong together, what comes of them, and who says so.

This file imports no torch, so that the command line can read the table at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CIFAR10 = (50_000, 10_000, 10)
CIFAR100 = (50_000, 10_000, 100)
DIGITS = (1442, 355, 10)
IMAGENET = (1_281_167, 50_000, 1000)
_CPU = "2 shared x86_64 cores"
_FFCV = "github.com/libffcv/ffcv-imagenet, README and configurations"


@dataclass(frozen=True, kw_only=True)
class NamedRecipe:
    """Values of TrainConfig fields, and what is claimed of the accuracy they come to.

    accuracy: of the last epoch on all test images, 0 to 1; None where nothing is claimed. `metric`
    is its key among those of an evaluation.
    sd: over so many `runs` of other seeds; 0 where there was one, or the source tells none.
    ran: whether the number was measured with this program; else it is its source's, "not run here".
    on: training images, test images and classes of the data that the claim is about.
    lacks: what the source's recipe has and this one does not.
    """

    settings: Mapping[str, str | int | float | bool]
    summary: str
    source: str
    on: tuple[int, int, int]
    accuracy: float | None = None
    metric: str = "accuracy"
    sd: float = 0.0
    runs: int = 0
    time: str = ""
    hardware: str = ""
    ran: bool = False
    lacks: str = ""

    @property
    def claim(self) -> str:
        """`90.55 % +- 0.17 (3 runs)`, and whose number it is."""
        if self.accuracy is None:
            return "none; not run here"
        words = f"{100 * self.accuracy:.4g} %"
        if self.sd:
            words += f" +- {100 * self.sd:.2g}"
        if not self.ran:
            return f"{words}, its source says; not run here"
        return f"{words} ({self.runs} {'run' if self.runs == 1 else 'runs'})"

    @property
    def cost(self) -> str:
        """How long it took, and on what."""
        return f"{self.time}, {self.hardware}" if self.time else ""


_IMAGENET_SGD = {
    "augment": "resized_crop", "image_size": 176, "eval_size": 256, "epochs": 16, "warmup": 2.0,
    "schedule": "linear", "optimizer": "sgd", "momentum": 0.9, "label_smoothing": 0.1, "tta": 1,
    "blurpool": "conv",
}  # fmt: skip
_FFCV_LACKS = "images that grow from 160 to 192 pixels in epochs 11 to 13: here they have 176"

RECIPES: dict[str, NamedRecipe] = {
    "digits-my_cnn": NamedRecipe(
        settings={
            "model": "my_cnn", "dataset": "digits", "image_size": 8, "batch_size": 64,
            "epochs": 20, "optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.01,
            "schedule": "cosine", "warmup": 1.0, "augment": "none",
        },
        summary="the homework's net on scikit-learn's digits",
        source="this repository", on=DIGITS, accuracy=0.9775, sd=0.0020, runs=5,
        time="34 s to 1m21s", hardware=_CPU, ran=True,
    ),
    "cifar10-my_cnn": NamedRecipe(
        settings={
            "model": "my_cnn", "dataset": "cifar10", "image_size": 32, "batch_size": 64,
            "epochs": 5, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01,
            "schedule": "cosine", "warmup": 0.5, "augment": "flip",
        },
        summary="one convolution and one linear layer, at CIFAR-10's own size",
        source="this repository; on a JPEG copy of the images", on=CIFAR10, accuracy=0.6034, runs=1,
        time="15m42s (1 thread)", hardware=_CPU, ran=True,
    ),
    "cifar10-speednet": NamedRecipe(
        settings={
            "model": "speednet", "dataset": "cifar10", "image_size": 32, "batch_size": 2000,
            "epochs": 8, "optimizer": "muon", "lr": 0.24, "momentum": 0.6,
            "weight_decay": 2e-6 * 2000 / 0.24, "schedule": "linear", "warmup": 0.0,
            "augment": "translate", "alternating_flip": True, "label_smoothing": 0.2, "tta": 2,
        },
        summary="the small net of the CIFAR-10 speed records, votes of six views",
        source="bench/results/gpu-h200.md, on a JPEG copy of the images; after Jordan, 2024 "
        "(airbench94_muon), who has 94 % on the images as they were published",
        on=CIFAR10, accuracy=0.9055, sd=0.0017, runs=3, time="3 s of training",
        hardware="an NVIDIA H200, bf16", ran=True,
    ),
    "cifar10-resnet18": NamedRecipe(
        settings={
            "model": "resnet18", "dataset": "cifar10", "image_size": 32, "batch_size": 128,
            "epochs": 60, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4,
            "schedule": "cosine", "warmup": 1.0, "augment": "crop", "cutout": 8,
            "label_smoothing": 0.1,
        },
        summary="ResNet-18 with the 3x3 first layer",
        source="github.com/kuangliu/pytorch-cifar, README: 93.02 % of a ResNet-18 that was trained "
        "otherwise (350 epochs, the rate by hand)", on=CIFAR10,
    ),
    "cifar100-resnet18": NamedRecipe(
        settings={
            "model": "resnet18", "dataset": "uoft-cs/cifar100", "image_size": 32,
            "batch_size": 128, "epochs": 200, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9,
            "nesterov": True, "weight_decay": 5e-4, "decay_all": True, "schedule": "cosine",
            "warmup": 1.0, "augment": "crop", "label_smoothing": 0.0,
        },
        summary="ResNet-18 with the 3x3 first layer, 100 classes",
        source="github.com/weiaicunzai/pytorch-cifar100, README: resnet18", on=CIFAR100,
        accuracy=0.7561, lacks="a rate divided by 5 at epochs 60, 120 and 160: here it is a cosine",
    ),
    "finetune-resnet50": NamedRecipe(
        settings={
            "model": "torchvision:resnet50", "weights": "imagenet", "image_size": 224,
            "batch_size": 32, "epochs": 5, "optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.01,
            "schedule": "cosine", "warmup": 0.5, "augment": "resized_crop",
            "label_smoothing": 0.0,
        },
        summary="torchvision's ResNet-50 from its ImageNet weights, on photographs of yours",
        source="this repository: what comes of it depends on the photographs", on=(0, 0, 0),
    ),
    "imagenet-resnet18-ffcv16": NamedRecipe(
        settings=_IMAGENET_SGD | {
            "model": "torchvision:resnet18", "batch_size": 1024, "lr": 0.5, "weight_decay": 5e-5,
        },
        summary="ResNet-18 in 16 epochs",
        source=f"{_FFCV} (rn18_16_epochs)", on=IMAGENET, accuracy=0.669, time="35 min",
        hardware="an NVIDIA A100", lacks=_FFCV_LACKS,
    ),
    "imagenet-resnet50-ffcv16": NamedRecipe(
        settings=_IMAGENET_SGD | {
            "model": "torchvision:resnet50", "batch_size": 4096, "lr": 1.7, "weight_decay": 1e-4,
        },
        summary="ResNet-50 in 16 epochs",
        source=f"{_FFCV} (rn50_16_epochs, 512 images on each of 8 GPUs)", on=IMAGENET,
        accuracy=0.738, time="15 min", hardware="8 NVIDIA A100", lacks=_FFCV_LACKS,
    ),
    "imagenet-resnet50-a3": NamedRecipe(
        settings={
            "model": "torchvision:resnet50", "image_size": 160, "eval_size": 224,
            "eval_resize": 236, "batch_size": 2048, "epochs": 100, "optimizer": "lamb",
            "lr": 8e-3, "weight_decay": 0.02, "schedule": "cosine", "warmup": 5.0, "loss": "bce",
            "augment": "resized_crop|randaugment(2,18,1.5)", "mixup": 0.1, "cutmix": 1.0,
            "label_smoothing": 0.0,
        },
        summary="ResNet-50 in 100 epochs at 160 pixels: procedure A3",
        source="Wightman, Touvron, Jegou, 2021: ResNet strikes back (arXiv:2110.00476)",
        on=IMAGENET, accuracy=0.781, time="15 h", hardware="4 NVIDIA V100",
        lacks="timm's operators (its strength 6 of 10 is 18 of 30 here); the loss is summed "
        "over the classes where timm takes their mean",
    ),
    "imagenet-vit_s16-90": NamedRecipe(
        settings={
            "model": "timm:vit_small_patch16_224", "image_size": 224, "batch_size": 1024,
            "epochs": 90, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1,
            "schedule": "cosine", "warmup": 8.0, "grad_clip": 1.0, "mixup": 0.2,
            "augment": "resized_crop|randaugment(2,30)", "label_smoothing": 0.0,
        },
        summary="ViT-S/16 in 90 epochs (takes the package timm)",
        source="github.com/google-research/big_vision, configs/vit_s16_i1k.py; Beyer, Zhai, "
        "Kolesnikov, 2022 (arXiv:2205.01580)", on=IMAGENET, accuracy=0.765,
        time="6 to 7 h", hardware="a TPU v3-8",
        lacks="its net (positions of sines, the mean over the patches: timm's learns positions and "
        "has a class token) and its operators (strength 10 of 10 is 30 of 30 here)",
    ),
}  # fmt: skip


def in_markdown() -> str:
    """The table of docs/recipes.md."""
    rows = ["| `--recipe` | what it is | test accuracy claimed | time | source | lacks |"]
    rows.append("|" + "---|" * 6)
    for name, recipe in RECIPES.items():
        cells = (recipe.summary, recipe.claim, recipe.cost or "-", recipe.source)
        rows.append(f"| `{name}` | {' | '.join(cells)} | {recipe.lacks or '-'} |")
    return "\n".join(rows)
