"""A frozen backbone answers the same for the same image: its features are computed once."""

import contextlib
from collections.abc import Callable
from types import MethodType

import torch
from torch import Tensor, nn

from data.loaders import EVALUATION_BATCH, Resident, evaluation_batch
from distributed.world import World
from models.weights import head_prefixes
from tasks import split_outputs
from training.data import Data, pictures_of
from training.learner import Learner
from training.plan import Plan


def cache_features(learner: Learner, data: Data, plan: Plan, world: World) -> str:
    """Give the data sets the features that the model's head sees; the head alone then runs.

    For --freeze backbone without anything random before the head. A model whose answer is not its
    head's, or whose features do not fit the device, is left as it is. Parameters and their names
    stay, so checkpoints and saved weights are those of the whole model. Returns what to tell.
    """
    config, model = plan.config, learner.bare
    changing = (config.cutout, config.mixup, config.cutmix, config.tta, config.compile)
    fixed = config.freeze == "backbone" and config.augment == "none" and not learner.draws
    fixed = fixed and config.unfreeze is None
    if not fixed or any(changing):
        return ""
    names = [
        prefix.removesuffix(".") for prefix in head_prefixes(model, config.model, config.image_size)
    ]
    if len(names) > 1:  # auxiliary heads hang on other features
        return ""
    parts = [pictures_of(loader) for loader in data.loaders]
    resident = [part for part in parts if isinstance(part, Resident)]
    if len(resident) < len(parts):  # photographs may turn out to be damaged
        return ""
    model.eval()
    device = learner.accelerator.device
    size = min(EVALUATION_BATCH, evaluation_batch(EVALUATION_BATCH, config.image_size, device))
    given, answer = features_of(learner, data, names[0], resident[0].images[:size])
    with torch.no_grad(), learner.accelerator.autocast():
        alone = model.get_submodule(names[0])(given)
    if given.ndim != 2 or not torch.equal(alone.float(), answer.float()):
        return ""
    if not all(world.everyones(fits(resident, given))):
        return ""
    for part in resident:
        chunks = part.images.split(size)
        part.features = torch.cat(
            [
                features_of(learner, data, names[0], chunk)[0].to(part.images.device)
                for chunk in chunks
            ]
        )
    for each in filter(None, (model, learner.averaged_model)):
        head_only(each, names[0], learner.accelerator.autocast)
    return "the backbone is frozen: its features are computed once, and only the head runs"


def features_of(learner: Learner, data: Data, head: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the head is given for uint8 (n, C, H, W), and what the model answers."""
    given: list[Tensor] = []
    hook = learner.bare.get_submodule(head).register_forward_pre_hook(
        lambda _, inputs: given.append(inputs[0])
    )
    images = learner.inputs(
        data.augment.evaluate(images)
    )  # resized in full precision, as evaluate()
    with torch.no_grad(), learner.accelerator.autocast():
        answer = learner.bare(images)
    hook.remove()
    return given[-1].float(), split_outputs(answer)[0]


def head_only(
    model: nn.Module, head: str, autocast: Callable[..., contextlib.AbstractContextManager]
) -> None:
    """From now on the model's forward takes features, and runs its head alone."""

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
