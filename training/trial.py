"""The trial step: a model is tried on a copy before anything is written."""

import math
import re
import time
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn

from config import TrainConfig
from distributed.watch import device_failed, out_of_memory
from distributed.world import World
from errors import UserError
from models import lookup
from models.own_file import place_in
from models.pooling import without_deterministic_backward
from tasks import Classification, Regression
from training.data import Data
from training.learner import inputs

MOST_IMAGES = 16  # enough to see a mistake and, on a CPU, to guess a step's time


@dataclass(frozen=True)
class Trial:
    """What a forward and backward of a copy showed. `unused` parameters never got a gradient."""

    seconds_per_image: float
    unused: tuple[str, ...] = ()
    nondeterministic: tuple[str, ...] = ()  # layers that --deterministic refuses on a GPU


def try_model(
    model: nn.Module, task: Classification | Regression, data: Data, config: TrainConfig,
    world: World, debug: bool,
) -> Trial:  # fmt: skip
    """One forward and backward of a copy: seconds per image.

    Errors of a learner's model become sentences (UserError); parameters that never get a gradient
    are frozen in `model`.
    """
    channels_last = lookup(config.model).channels_last
    trial, size = deepcopy(model).train(), data.batch.micro_batch_size
    if world.device.type != "cuda":  # a GPU takes as long for few images as for many
        size = min(size, MOST_IMAGES)
    refused = without_deterministic_backward(model)
    seconds_per_image = math.inf
    indices = torch.arange(size) % len(data.train)
    batch = data.train.__getitems__(indices.to(data.train.labels.device))
    try:
        for _ in range(1 if debug else 2):  # the first one also warms up
            began = time.monotonic()
            images = data.augment.train(batch["images"], batch["indices"], 0)
            images = inputs(images, world.device, channels_last)
            labels = batch["labels"].to(images.device)
            with world.accelerator.autocast():
                answer = trial(images)
                refuse_other_shape(answer, size, data, config.model)
                loss = task.loss(answer, labels)
            loss.backward()
            if images.device.type == "cuda":
                torch.cuda.synchronize()
            took = (time.monotonic() - began) / size
            seconds_per_image = min(took, seconds_per_image)
            if took * size > 5:
                break
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        if debug or out_of_memory(error) or device_failed(error):
            raise
        if re.search("not have a deterministic implementation", str(error)):
            raise UserError(
                f"--model {config.model} --deterministic: {str(error).split()[0]} adds in an "
                f"order that changes ({', '.join(refused[:5]) or 'in its forward'}); AdaptivePool "
                "of models/pooling.py does not, or train without --deterministic",
                code="not-deterministic",
            ) from None
        shape = tuple(batch["images"].shape)
        raise UserError(
            f"--model {config.model}: fails on {size} images {shape} at --image-size "
            f"{config.image_size}: {place_in(config.model, error)}{str(error).splitlines()[0]}; "
            "python train.py --debug with the same flags but --run-dir shows where"
        ) from None
    unused = [n for n, p in trial.named_parameters() if p.requires_grad and p.grad is None]
    if unused and len(unused) == sum(p.requires_grad for p in trial.parameters()):
        raise UserError(
            f"--model {config.model}: no parameter gets a gradient; does forward use "
            "its layers, without .detach() or torch.no_grad()?"
        )
    if unused:
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and name not in unused)
    return Trial(seconds_per_image, tuple(unused), tuple(refused))


def refuse_other_shape(answer: object, size: int, data: Data, name: str) -> None:
    """A classifier answers (size, classes) logits: other classes would be counted as these."""
    logits = answer[0] if isinstance(answer, tuple) else answer
    wanted = (size, len(data.classes))
    if data.source.task == "classification" and tuple(logits.shape) != wanted:
        raise UserError(
            f"--model {name}: answers {tuple(logits.shape)} to {size} images, but "
            f"{data.source.name} has {wanted[1]} classes: it must be {wanted}; a class whose "
            "__init__ takes num_classes is given the number"
        )
