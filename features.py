"""A frozen backbone answers the same for the same image: its features are computed once."""

from types import MethodType

import torch
from torch import Tensor, nn

from data.loaders import EVALUATION_BATCH, Resident
from distributed.accelerator import everyones
from models.weights import head_prefixes


def cache_features(run) -> str:
    """Give the run's data sets the features that the model's head sees; the head alone then runs.

    For --freeze backbone without anything random before the head. A model whose answer is not its
    head's, or whose features do not fit the device, is left as it is. Parameters and their names
    stay, so checkpoints and saved weights are those of the whole model. Returns what to tell.
    """
    config, model = run.config, run.bare
    changing = (config.cutout, config.mixup, config.cutmix, config.tta, config.compile)
    if config.freeze != "backbone" or config.augment != "none" or any(changing):
        return ""
    names = [prefix.removesuffix(".") for prefix in head_prefixes(model, config.model)]
    if len(names) > 1:  # auxiliary heads hang on other features
        return ""
    loaders = (run.train_loader, run.test_loader, run.validation_loader)
    data = [loader.dataset for loader in loaders if loader is not None]
    model.eval()
    given, answer = features_of(run, names[0], data[0].images[:EVALUATION_BATCH])
    with torch.no_grad(), run.accelerator.autocast():
        alone = model.get_submodule(names[0])(given)
    if given.ndim != 2 or not torch.equal(alone.float(), answer.float()):
        return ""
    if not all(everyones(run.accelerator, fits(data, given))):
        return ""
    for part in data:
        chunks = part.images.split(EVALUATION_BATCH)
        part.features = torch.cat(
            [features_of(run, names[0], chunk)[0].to(part.images.device) for chunk in chunks]
        )
    for each in filter(None, (model, run.average and run.average.model)):
        head_only(each, names[0], run.accelerator.autocast)
    return "the backbone is frozen: its features are computed once, and only the head runs"


def features_of(run, head: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the head is given for uint8 (n, C, H, W), and what the model answers."""
    given: list[Tensor] = []
    hook = run.bare.get_submodule(head).register_forward_pre_hook(
        lambda _, inputs: given.append(inputs[0])
    )
    images = run.inputs(run.augment.evaluate(images))  # resized in full precision, as evaluate()
    with torch.no_grad(), run.accelerator.autocast():
        answer = run.bare(images)
    hook.remove()
    return given[-1].float(), answer


def head_only(model: nn.Module, head: str, autocast) -> None:
    def forward(self: nn.Module, features: Tensor) -> Tensor:
        with autocast():
            return self.get_submodule(head)(features).float()

    model.forward = MethodType(forward, model)


def fits(data: list[Resident], given: Tensor) -> bool:
    """Whether the features of all images take less than a third of the device's free memory."""
    home = data[0].images.device
    if home.type != "cuda":
        return True
    needed = 4 * given.shape[1] * sum(map(len, data))
    return needed < torch.cuda.mem_get_info(home)[0] / 3
