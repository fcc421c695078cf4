"""Any classifier of torchvision, untrained, with torchvision's own state_dict keys."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from common.errors import UserError
from models import no_drop_path
from models.pooling import AdaptivePool

Outputs = torch.Tensor | tuple[torch.Tensor, ...]

# The auxiliary heads: their share of the loss (as in the papers) and their modules.
AUXILIARY = {"googlenet": (0.3, ("aux1", "aux2")), "inception_v3": (0.4, ("AuxLogits",))}


def build(
    name: str, num_classes: int, image_size: int, drop_path: float | None = None,
    in_channels: int = 3,
) -> nn.Module:  # fmt: skip
    """torchvision's model; with auxiliary heads it returns (logits, aux, ...) in training mode."""
    from torchvision.models import get_model

    if in_channels != 3 and name in AUXILIARY:
        raise UserError(
            f"--channels {in_channels}: {name} begins with a rule for three colours",
            code="contradiction",
        )
    options: dict[str, int | list | tuple] = {}
    if name in AUXILIARY:
        # transform_input maps ImageNet's normalisation to the one that the published weights
        # expect; always on, so that the same weights mean the same wherever they come from.
        options = {"aux_logits": True, "init_weights": True, "transform_input": True}
    elif name.startswith("vit_"):
        options = {"image_size": image_size}  # a position embedding for each patch
    elif name == "maxvit_t":
        options = {"input_size": (image_size, image_size)}
    if name == "googlenet":
        options["blocks"] = googlenet_blocks()
    model: Any = get_model(name, weights=None, num_classes=num_classes, **options)
    for layer in list(model.modules()):
        for child_name, child in layer.named_children():
            if type(child) is nn.AdaptiveAvgPool2d and child.output_size in ((6, 6), (7, 7)):
                setattr(layer, child_name, ZooPool(6 if child.output_size == (6, 6) else 7))
    if in_channels != 3:
        _see_grey(model)
    if drop_path is not None:
        _set_drop_path(model, name, drop_path)
    if name in AUXILIARY:
        model.auxiliary_weight, model.auxiliary_heads = AUXILIARY[name]
        model.register_forward_hook(_plain_tuple)
    # torchvision draws these heads so wide that with ten classes the first loss is 5 to 6, not 2.3.
    if name == "inception_v3":
        model.fc.reset_parameters()
        model.AuxLogits.register_forward_pre_hook(_at_least_17_wide)
    elif name.startswith("efficientnet"):
        model.classifier[-1].reset_parameters()
    return model


def _see_grey(model: nn.Module) -> None:
    """One channel in: the first layer answers to a grey image what it did to it in three colours.

    Its filters are summed over the colours.
    """
    layer = next(m for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3)
    layer.in_channels = 1
    layer.weight = nn.Parameter(layer.weight.detach().sum(1, keepdim=True))


def _set_drop_path(model: nn.Module, name: str, rate: float) -> None:
    """Stochastic depth up to `rate`, which the last block has; it grows over them as it did."""
    from torchvision.ops import StochasticDepth

    layers = [layer for layer in model.modules() if isinstance(layer, StochasticDepth)]
    most = max((layer.p for layer in layers), default=0.0)
    if not most:
        raise no_drop_path(f"torchvision:{name}")
    for layer in layers:
        layer.p *= rate / most


class ZooPool(AdaptivePool):
    """AdaptivePool, but on a CPU torch's own kernel: deterministic there, and with its bits."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        if maps.device.type == "cpu":
            return F.adaptive_avg_pool2d(maps, self.size)
        return super().forward(maps)


def googlenet_blocks() -> list:
    """The blocks of torchvision's GoogLeNet, with auxiliary heads that pool through ZooPool."""
    from torchvision.models.googlenet import BasicConv2d, Inception, InceptionAux

    class AuxiliaryHead(InceptionAux):
        def __init__(self, in_channels: int, num_classes: int, dropout: float = 0.7) -> None:
            super().__init__(in_channels, num_classes, dropout=dropout)
            self.pool = ZooPool(4)

        def forward(self, maps: torch.Tensor) -> torch.Tensor:
            hidden = self.conv(self.pool(maps)).flatten(1)  # (N, 2048)
            return self.fc2(self.dropout(F.relu(self.fc1(hidden), inplace=True)))

    return [BasicConv2d, Inception, AuxiliaryHead]


def _plain_tuple(model: nn.Module, inputs: tuple, outputs: Outputs) -> Outputs:
    return tuple(outputs) if isinstance(outputs, tuple) else outputs


def _at_least_17_wide(head: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """The auxiliary head of Inception fits maps of 299-pixel images; smaller ones are stretched."""
    (maps,) = inputs
    return (AdaptivePool(17)(maps),) if min(maps.shape[-2:]) < 17 else inputs
