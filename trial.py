"""Steps that train nothing: the trial of a model, and one for the order of DDP's sums."""

import math
import time
from copy import deepcopy

import torch

from distributed.shards import packed, unpack
from distributed.watch import out_of_memory
from errors import UserError

MOST_IMAGES = 16  # enough to see a mistake and to guess a step's time


def try_model(run, model: torch.nn.Module) -> float:
    """One forward and backward of a copy: seconds per image.

    Errors of a learner's model become sentences (UserError); parameters that never get a gradient
    are named and frozen in `model`.
    """
    train = run.train_loader.dataset
    trial, size = deepcopy(model).train(), min(run.plan.micro_batch_size, MOST_IMAGES)
    seconds_per_image = math.inf
    indices = torch.arange(size) % len(train)
    batch = train.__getitems__(indices.to(train.labels.device))
    try:
        for _ in range(1 if run.actions.debug else 2):  # the first one also warms up
            began = time.monotonic()
            images = run.inputs(run.augment.train(batch["images"], batch["indices"], 0))
            labels = batch["labels"].to(images.device)
            with run.accelerator.autocast():
                answer = trial(images)
                refuse_other_shape(run, answer, size)
                loss = run.task.loss(answer, labels)
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
        if run.actions.debug or out_of_memory(error):
            raise
        shape = tuple(batch["images"].shape)
        raise UserError(
            f"--model {run.config.model}: fails on {size} images {shape} at --image-size "
            f"{run.config.image_size}: {str(error).splitlines()[0]}; "
            "python train.py --debug with the same flags but --run-dir shows where"
        ) from None
    unused = [n for n, p in trial.named_parameters() if p.requires_grad and p.grad is None]
    if unused and len(unused) == sum(p.requires_grad for p in trial.parameters()):
        raise UserError(
            f"--model {run.config.model}: no parameter gets a gradient; does forward use "
            "its layers, without .detach() or torch.no_grad()?"
        )
    if unused:
        run.report.warn(
            f"{', '.join(unused[:5])} of {run.config.model} never get a gradient and stay "
            "as they are: does forward use them?"
        )
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and name not in unused)
    return seconds_per_image


def refuse_other_shape(run, answer, size: int) -> None:
    """A classifier answers (size, classes) logits: other classes would be counted as these."""
    logits = answer[0] if isinstance(answer, tuple) else answer
    wanted = (size, len(run.source.classes))
    if run.source.task == "classification" and tuple(logits.shape) != wanted:
        raise UserError(
            f"--model {run.config.model}: answers {tuple(logits.shape)} to {size} images, but "
            f"{run.source.name} has {wanted[1]} classes: it must be {wanted}; a class whose "
            "__init__ takes num_classes is given the number"
        )


def settle_buckets(run) -> None:
    """One backward for nothing, so that the first step of a life adds up like all others.

    DDP's first backward has one bucket in the order of registration; from the second on there are
    several, in the order in which gradients arrive. A ring of three and more processes adds in an
    order that depends on a number's place in its bucket: without this, the first step after a start
    has other bits than the same step of a run that was not interrupted.
    """
    if run.accelerator.num_processes == 1 or run.config.bitwise:  # bitwise: no sum of DDP's
        return
    data, before = run.train_loader.dataset, packed(run.shards.buffers)
    indices = torch.arange(run.plan.micro_batch_size, device=data.labels.device)
    batch = data.__getitems__(indices)
    images = run.inputs(run.augment.train(batch["images"], batch["indices"], 0))
    loss = run.task.loss(run.model.train()(images), batch["labels"].to(images.device))
    loss.backward()  # not the accelerator's: under fp16 it would need a scale
    run.optimizer.zero_grad()
    unpack(before, run.shards.buffers)
