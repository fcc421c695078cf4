"""All that a run reads: the data set, the batch that is possible, loaders, augmentation."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from config import BatchPlan, Settings, plan_batch
from data.augment import Augment
from data.image_set import numbered_as
from data.loaders import Resident, build_test_loader, build_train_loader, evaluation_batch
from data.order import GlobalBatchSampler, split_validation
from data.sources import ImageSet, Source, limited, load_source
from distributed import faults
from distributed.world import World
from errors import UserError
from models import lookup
from training.plan import Plan, classes_of_run

Batch = dict[str, Tensor]


def resident(loader: DataLoader) -> Resident:
    """The images that a loader hands out, also after Accelerate prepared it."""
    return cast(Resident, loader.dataset)


@dataclass(frozen=True)
class Data:
    """Training and evaluation batches; knows nothing of the model. `note`: what is to be told.

    `test_loaders` are by split: "val", where a part of the training images is held out, and "test".
    """

    source: Source
    batch: BatchPlan
    augment: Augment
    sampler: GlobalBatchSampler
    train_loader: DataLoader
    test_loaders: dict[str, DataLoader]
    note: str = ""

    @property
    def train(self) -> Resident:
        return resident(self.train_loader)

    @property
    def test(self) -> Resident:
        return resident(self.test_loaders["test"])

    @property
    def classes(self) -> list[str]:
        return list(self.source.classes)

    @property
    def num_outputs(self) -> int:
        """What the head of a model answers: a number for each class, one for a regression."""
        return max(1, len(self.source.classes))

    @property
    def chosen_on(self) -> str:
        """The split that decides which weights are the best."""
        return "val" if "val" in self.test_loaders else "test"

    @property
    def loaders(self) -> list[DataLoader]:
        """What Accelerate prepares."""
        return [self.train_loader, *self.test_loaders.values()]

    def prepared(self, loaders: list[DataLoader]) -> Self:
        """The same with the loaders that Accelerate made of `loaders`."""
        tests = dict(zip(self.test_loaders, loaders[1:], strict=True))
        return replace(self, train_loader=loaders[0], test_loaders=tests)

    def rest_of_epoch(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """This process's slice of each global batch of an epoch, from one of its steps on."""
        self.sampler.start(epoch, first_step)
        yield from self.train_loader

    def endless(self) -> Iterator[Batch]:
        """Epoch after epoch, for trials that are no run."""
        for epoch in itertools.count():
            yield from self.rest_of_epoch(epoch, 0)

    def indices(self, epoch: int, step: int) -> list[int]:
        """Which training images the global batch of a step of an epoch holds."""
        self.sampler.start(epoch, step)
        return next(iter(self.sampler)).tolist()


def load_data(plan: Plan, world: World) -> tuple[Plan, Data]:
    """The data set of a plan, the same on every process, with its loaders and augmentation.

    The plan comes back with the batch that the data allow.

    Raises UserError where it cannot be had, and where batch, shards and processes do not fit.
    """
    faults.hit("data")
    config = plan.config
    source = world.all_or_none(lambda: load_source(
        config.dataset, data_dir=config.data_dir, image_size=config.image_size,
        skip_bad_images=config.skip_bad_images, seed=config.seed,
    ))  # fmt: skip
    # Before anything is built from it: another number of classes would die inside DDP.
    world.refuse_disagreement({"data": source.fingerprint})
    known = world.main_decides(lambda: classes_of_run(plan))
    numbered = numbered_as(source, known)
    data = build_data(plan.settings, numbered, world.num_processes, world.device)
    if numbered is not source:
        data = replace(data, note="the data name the run's classes in another order: by name")
    return plan.with_batch(data.batch), data


def build_data(
    settings: Settings, source: Source, num_processes: int, device: torch.device
) -> Data:
    """Loaders and augmentation of a loaded source for so many processes.

    Raises UserError where the batch, the shards and the processes do not fit together.
    """
    config = settings.config
    entry = lookup(config.model)
    if entry.task != source.task:
        fits = "--dataset line" if entry.task == "regression" else "an image data set"
        raise UserError(
            f"--model {config.model} is for {entry.task}, the data set {source.name} is for "
            f"{source.task}; give it {fits}",
            code="data-of-another-task",
        )
    train, test = limited(source.train, config.limit), limited(source.test, config.limit)
    test_batch = evaluation_batch(len(test), config.image_size, device) * num_processes
    if settings.actions.dry_run:
        test = limited(test, 2 * test_batch)
    tests = {"test": test}
    if config.val_fraction:
        kept, held_out = split_validation(len(train), config.val_fraction, config.seed)
        validation = ImageSet(train.images[held_out], train.labels[held_out])
        train = ImageSet(train.images[kept], train.labels[kept])
        tests = {"val": validation, "test": test}
    batch = plan_batch(settings, num_processes, len(train))
    train_loader, sampler = build_train_loader(train, batch.batch_size, config.seed, device)
    augment = Augment(
        config.augment, config.image_size, source.mean, source.std, config.seed,
        cutout=config.cutout, mixup=config.mixup, cutmix=config.cutmix,
        alternating_flip=config.alternating_flip, no_flip=source.no_flip,
        tta=config.tta, samples=0 if device.type == "cpu" else len(train),
    )  # fmt: skip
    test_loaders = {
        split: build_test_loader(images, test_batch, device) for split, images in tests.items()
    }
    return Data(source, batch, augment, sampler, train_loader, test_loaders)
