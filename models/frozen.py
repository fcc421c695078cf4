"""A frozen backbone answers the same for the same image: its features are computed once."""

from types import MethodType

import torch
from torch import Tensor, nn

from models.weights import head_prefixes

CHUNK = 128  # images per forward


def cache_features(run, model: nn.Module) -> str:
    """Replace the run's images by their features, and the model's forward by that of its head.

    Parameters and their names stay, so checkpoints and saved models are those of the whole model.
    For --freeze backbone without random augmentation or votes; anything else, and a model with
    more than a linear path from its head to its answer, is left as it is. Returns what to tell.
    """
    config, augment = run.config, run.augment
    changing = (config.cutout, config.mixup, config.cutmix, config.tta, run.actions.eval_only)
    if config.freeze != "backbone" or config.augment != "none" or any(changing):
        return ""
    heads = head_prefixes(model, config.model)
    if len(heads) > 1:  # auxiliary heads hang on other features
        return ""
    head = model.get_submodule(heads[0].removesuffix("."))
    loaders = [run.train_loader, run.test_loader, run.validation_loader]
    resident = [loader.dataset for loader in loaders if loader is not None]

    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        """What the head is given, and what the model answers."""
        given: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
        with torch.no_grad(), run.accelerator.autocast():
            answer = model(run.inputs(augment.evaluate(images)))
        hook.remove()
        return given[-1].float(), answer

    training = model.training
    model.eval()
    try:
        given, answer = features(resident[0].images[:CHUNK])
        with torch.no_grad(), run.accelerator.autocast():
            alone = head(given)
        if given.ndim != 2 or not torch.equal(alone, answer):
            return ""
        for data in resident:
            parts = [features(part)[0].to(part.device) for part in data.images.split(CHUNK)]
            data.images = torch.cat(parts)
    finally:
        model.train(training)
    model.head_name = heads[0].removesuffix(".")
    model.forward = MethodType(_head_alone, model)  # a bound method: it survives deepcopy
    run.channels_last = False
    return "the backbone is frozen: its features are computed once, and only the head runs"


def _head_alone(model: nn.Module, features: Tensor) -> Tensor:
    return model.get_submodule(model.head_name)(features)
