"""All that a run reads: the data set, the batch that is possible, loaders, augmentation."""

import itertools
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from common.disk import Json
from common.errors import UserError
from common.text import counted
from config import HINTS, BatchPlan, Settings, TrainConfig, mean_and_std, plan_batch, task_of
from data.augment import Augment
from data.cache import Entry, forget_looks, read_entry
from data.cuts import Cuts, default_resize, lost
from data.files import SMALL, clipped_in_words
from data.grey import of_one
from data.image_set import Levels, numbered_as
from data.loaders import (
    Decoding,
    Photographs,
    Resident,
    build_test_loader,
    build_train_loader,
    decoding_of,
    evaluation_batch,
)  # fmt: skip
from data.order import GlobalBatchSampler
from data.pack import levels_in
from data.photographs import Photos, PhotoSet, decoder, sizes_in_words
from data.policy import parse_policy
from data.sources import Source, limited, load_source
from data.sources.describe import grey_levels
from data.sources.many import multi_hot
from data.splits import SPLIT_FILE, divided, folded
from distributed import faults
from distributed.stop import DAMAGED
from distributed.world import World
from models import lookup
from models.looks import Look, look_of, published_look
from training.elsewhere import as_the_run_sees, card_of_run
from training.plan import Plan, classes_of_run
from training.run_dir import PICTURES

Batch = dict[str, Tensor]
MOST_CUT_OFF = 0.7  # of a side, in the mean: a photograph of 3 x 2 loses 0.4


def pictures_of(loader: DataLoader) -> Resident | Photographs:
    """What a loader hands out, also after Accelerate prepared it."""
    return cast(Resident | Photographs, loader.dataset)


@dataclass(frozen=True)
class Data:
    """Training and evaluation batches; knows nothing of the model. `note`: what is to be told.

    `test_loaders` are by split: "val", where a part of the training images is held out, and "test".
    `places` are those of each split's images in the source, "val" among its training images.
    """

    source: Source
    batch: BatchPlan
    augment: Augment
    sampler: GlobalBatchSampler
    train_loader: DataLoader
    test_loaders: dict[str, DataLoader]
    places: dict[str, Tensor]
    note: str = ""
    row_heads: dict[str, list[str]] = field(default_factory=dict)  # of predictions.csv, by split

    @property
    def train(self) -> Resident | Photographs:
        return pictures_of(self.train_loader)

    @property
    def test(self) -> Resident | Photographs:
        return pictures_of(self.test_loaders["test"])

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
        yield from self.train.in_flight(self.train_loader, epoch)

    def evaluation(self, split: str) -> Iterator[Batch]:
        """This process's slice of each batch of a split."""
        loader = self.test_loaders[split]
        yield from pictures_of(loader).in_flight(loader, None)

    def photographs(self) -> list[str]:
        """How large photographs are, what is seen of them and who decodes them, if these are."""
        if isinstance(self.train, Resident):
            return []
        pictures, decoding = self.train.pictures, self.train.decoding
        cuts, store, count = decoding.cuts, pictures.photos.store, decoding.threads.count
        seen = f"{cuts.eval_size} pixels of {cuts.eval_resize}"
        if cuts.resize != "crop":
            seen = f"{cuts.eval_size} pixels ({cuts.resize})"
        return [
            f"{sizes_in_words(pictures.sizes)}; evaluated at {seen}; {store.words} by "
            f"{counted(count, 'thread')} ({decoder()}{', scaled' * decoding.scaled})"
        ]

    def cut_as(self) -> dict[str, Json]:
        """How predict.py comes from a picture to what evaluation saw (photographs.as_evaluated)."""
        levels: dict[str, Json] = {"levels": self.source.levels} if self.source.levels else {}
        if isinstance(self.test, Resident):
            images = self.test.images
            return {"picture_size": list(images.shape[2:]), **levels} if images.ndim == 4 else {}
        cuts = self.test.decoding.cuts
        levels |= {"decode": "scaled"} if self.test.decoding.scaled else {}
        return levels | {
            "photographs": True, "eval_size": cuts.eval_size, "eval_resize": cuts.eval_resize,
            "resize": cuts.resize,
            **({"interpolation": cuts.interpolation} if cuts.interpolation != "bilinear" else {}),
        }  # fmt: skip

    def cut_off(self) -> list[str]:
        """What to tell where most of each photograph is never seen."""
        if isinstance(self.test, Resident):
            return []
        gone = lost(self.test.sizes, self.test.decoding.cuts)
        if gone < MOST_CUT_OFF:
            return []
        return [
            f"{100 * gone:.0f} % of the longer side of these wide or high images is cut off when "
            "they are evaluated; --resize squash or --resize pad keeps all of it"
        ]

    def waits(self) -> dict[str, float]:
        """The share of the training time that waited for photographs, for a row."""
        train = self.train
        return {} if isinstance(train, Resident) else {"data/wait": train.ahead.take_wait()}

    def damaged(self, world: World) -> dict[str, str]:
        """Names and reasons of photographs that could not be decoded so far, on any process."""
        if isinstance(self.train, Resident):
            return {}
        photos = self.train.pictures.photos
        found = {photos.names[place]: why for place, why in sorted(photos.damage.found.items())}
        return {name: why for part in world.everyones(found) for name, why in part.items()}

    def excluded_by_hand(self) -> dict[str, str]:
        """Names of photographs that the user left out, and that word for it."""
        if isinstance(self.train, Resident):
            return {}
        photos = self.train.pictures.photos
        return {photos.names[place]: "excluded" for place in sorted(photos.damage.excluded)}

    def excluded_from_evaluation(self) -> list[str]:
        """Names of photographs that the user left out of what is evaluated."""
        names: list[str] = []
        for loader in self.test_loaders.values():
            pictures = pictures_of(loader)
            if isinstance(pictures, Photographs):
                photos = pictures.pictures.photos
                there = photos.damage.excluded & {*pictures.pictures.places.tolist()}
                names += [photos.names[place] for place in sorted(there)]
        return names

    def clipped(self, world: World) -> list[str]:
        """What to tell of values of 16-bit photographs that no training image of a sample had."""
        if isinstance(self.train, Resident) or self.source.levels is None:
            return []
        parts = world.everyones(dict(self.train.pictures.photos.clipped))
        met = {place: count for part in parts for place, count in part.items()}
        return [f"16-bit images: {clipped_in_words(list(met.values()))}"] if met else []

    def amount(self, split: str) -> int:
        """How many images a split has."""
        return len(pictures_of(self.test_loaders[split]))

    def counted(self, split: str, world: World) -> int:
        """How many images of a split count: all but those that could not be decoded just now."""
        pictures = pictures_of(self.test_loaders[split])
        if isinstance(pictures, Resident):
            return len(pictures)
        return len(pictures) - sum(world.everyones(pictures.left_out))

    def endless(self) -> Iterator[Batch]:
        """Epoch after epoch, for trials that are no run."""
        for epoch in itertools.count():
            yield from self.rest_of_epoch(epoch, 0)

    def indices(self, epoch: int, step: int) -> list[int]:
        """Which training images the global batch of a step of an epoch holds."""
        self.sampler.start(epoch, step)
        batch = next(iter(self.sampler))
        return (batch[batch >= 0] % len(self.train)).tolist()


def source_named(
    config: TrainConfig, split: str | None, levels: Levels | None, stage: str | None = None,
    keep_decoded: bool = False, say: Callable[[str], None] = lambda _: None,
    before: Entry | None = None, excluded: Collection[str] = (), start: str = "",
) -> Source:  # fmt: skip
    """The data set that a configuration names, in its fold, with a yes or no for each class.

    All but `config` is as load_source has it.
    """
    many = config.task == "multilabel"
    source = folded(load_source(
        config.dataset, data_dir=config.data_dir, image_size=config.image_size,
        skip_bad_images=config.skip_bad_images, seed=config.seed, split=split,
        group_by=config.group_by, stage=stage, keep_decoded=keep_decoded, levels=levels, many=many,
        say=say, before=before, excluded=excluded, start=start,
    ), config.fold)  # fmt: skip
    return multi_hot(source) if many and source.classes else source


def split_of(config: TrainConfig, run: str | Path | None) -> str | None:
    """What tells which picture trains: a run's own list, where --split named one at its birth.

    That list may have changed since, or be gone.
    """
    if config.split and run and (Path(run) / SPLIT_FILE).exists():
        return str(run)
    return config.split


def load_data(plan: Plan, world: World, say: Callable[[str], None] = print) -> tuple[Plan, Data]:
    """The data set of a plan, the same on every process, with its loaders and augmentation.

    The plan comes back with the batch that the data allow. `say` hears of work that takes long.

    Raises UserError where it cannot be had, and where batch, shards and processes do not fit.
    """
    faults.hit("data")
    config = plan.config
    split = split_of(config, config.run_dir if plan.goes_on else None)
    card = world.main_decides(lambda: card_of_run(plan))
    start = world.main_decides(lambda: uuid.uuid4().hex) if world.num_processes > 1 else ""
    source = world.all_or_none(world.stop.interruptible(lambda: source_named(
        config, split, levels_in(card), stage=config.stage,
        keep_decoded=not card and config.decode == "full", say=say if world.is_main else print,
        before=_index_of_run(plan), excluded=excluded_names(config.exclude), start=start,
    )))  # fmt: skip
    forget_looks(start)  # each process has what it needs
    if card:
        source = as_the_run_sees(source, card)
        plan = _cut_as_the_run(plan, source, card)
        config = plan.config
    plan, source = as_the_weights_saw(plan, source, world)
    config = plan.config
    if config.channels == 1 and len(source.mean) == 3:
        source = world.all_or_none(lambda: in_grey(source, config))
    # Before anything is built from it: another number of classes would die inside DDP.
    world.refuse_disagreement({"data": source.fingerprint})
    known = world.main_decides(lambda: classes_of_run(plan))
    numbered = numbered_as(source, known)
    if isinstance(source.train, PhotoSet):
        watch_damage(source.train.photos, config, world)
    data = build_data(
        plan.settings, numbered, world.device, world.num_processes, world.process_index
    )
    notes = ["the data name the run's classes in another order: by name"]
    notes = (numbered is not source) * notes + without_effect(config, source)
    if card.get("photographs") and not isinstance(source.train, PhotoSet):
        notes.append(
            "the run saw photographs, of which evaluation cuts a margin; these are seen whole"
        )
    data = replace(data, note="; ".join(notes))
    if isinstance(data.train, Photographs):
        world.enter(data.train.decoding.threads)  # the one that all of these share
    for pictures in map(pictures_of, data.loaders):
        if isinstance(pictures, Photographs):
            pictures.ahead.leaves = world.stop.leaves
    return plan.with_batch(data.batch), data


def _cut_as_the_run(plan: Plan, source: Source, card: dict) -> Plan:
    """Photographs, for a run that saw small pictures whole, lose no margin: as in predict.py."""
    if not isinstance(source.train, PhotoSet) or card.get("photographs"):
        return plan
    side = plan.config.eval_size or plan.config.image_size
    settings = plan.settings.with_layer("the run's images", {"eval_resize": side})
    return replace(plan, settings=settings, config=settings.config)


def as_the_weights_saw(plan: Plan, source: Source, world: World) -> tuple[Plan, Source]:
    """The plan with the look that starting weights ask for, and the data normalised as it says.

    What the user typed wins; a run that goes on has it all in its config already.
    """
    config = plan.config
    if source.task != "classification" or lookup(config.model).task != source.task:
        return plan, source
    begins = config.weights not in ("none", "auto") and not plan.goes_on

    def look() -> Look | None:
        found = look_of(config.model, config.weights) if begins else None
        if found is None and config.normalize == "weights":
            found = published_look(config.model)
        return found

    found, decided = world.main_decides(look), {}
    if found is not None:
        if config.normalize in ("auto", "weights"):
            numbers = (",".join(map(repr, part)) for part in (found.mean, found.std))
            decided["normalize"] = "/".join(numbers)
        if config.interpolation == "auto":
            decided["interpolation"] = found.interpolation
        size = config.eval_size or config.image_size
        margin = int(size / found.crop + 1e-6)
        if isinstance(source.train, PhotoSet) and not config.eval_resize and begins:
            decided |= {"eval_resize": margin} if margin != default_resize(size) else {}
    elif config.normalize == "weights":
        raise UserError(
            f"--normalize weights: {config.weights} does not say what its pictures were "
            "normalised by, and nothing is published of this model; type --normalize MEAN/STD",
            code="weights-do-not-say",
        )
    settings = plan.settings.with_layer("weights", decided) if decided else plan.settings
    plan = replace(plan, settings=settings, config=settings.config)
    if (text := plan.config.normalize) not in ("auto", "data"):
        mean, std = mean_and_std(text)
        source = replace(source, mean=mean, std=std)
    return plan, source


def in_grey(source: Source, config: TrainConfig) -> Source:
    """The data with mean and deviation of their brightness, or of what --normalize says."""
    given = config.normalize not in ("auto", "data")
    alike = len(set(source.mean)) == len(set(source.std)) == 1
    if given or alike:
        return replace(source, mean=of_one(source.mean), std=of_one(source.std))
    mean, std = grey_levels(source.train, config.image_size)
    return replace(source, mean=(mean,), std=(std,))


def _index_of_run(plan: Plan) -> Entry | None:
    """What the run to go on with found of its photographs, where some are excluded since."""
    config = plan.config
    if not (config.exclude and plan.goes_on and config.run_dir):
        return None
    return read_entry(Path(config.run_dir) / PICTURES)


def without_effect(config: TrainConfig, source: Source) -> list[str]:
    """What to tell of settings that change nothing for these data, or more than is meant."""
    names = ("resize", "eval_size", "eval_resize", "exclude", "decode", "decode_threads")
    asked = [n for n in names if getattr(config, n) != HINTS[n].default]
    flags, notes = ", ".join(f"--{name.replace('_', '-')}" for name in asked), []
    if asked and not isinstance(source.train, PhotoSet):
        why = f"no picture has more than {SMALL} pixels a side, so none is cut"
        notes.append(f"no effect: {flags}; {why}")
    elif config.decode == "scaled" and source.decoder:
        notes.append("no effect: --decode scaled; the pictures of this pack lie decoded")
    if source.no_flip and "flip" in config.augment and config.augment != TrainConfig.augment:
        notes.append(f"no effect: flips; mirrored images of {source.name} are other things")
    if config.plain_epochs >= config.epochs and not config.max_steps:
        notes.append(f"--plain-epochs {config.plain_epochs}: images are only cut and mirrored")
    return notes


def watch_damage(photos: Photos, config: TrainConfig, world: World) -> None:
    """Leave out what the user excludes; a picture that turns out damaged stops the run, or not."""
    photos.damage.excluded = excluded(photos, config.exclude)
    if not config.skip_bad_images:
        photos.damage.notice = lambda: world.stop.request(DAMAGED)


def excluded_names(names: str | None) -> set[str]:
    """The names that --exclude gives, itself or line by line in a text file."""
    if not names or not names.endswith(".txt"):
        return {names} if names else set()
    try:
        text = Path(names).expanduser().read_text("utf-8", "surrogateescape")
    except OSError as error:
        raise UserError(
            f"--exclude {names}: {error.strerror}; give a picture's name in the data set, or "
            "a text file with a name on each line",
            code="exclude-unreadable",
        ) from None
    return set(filter(None, text.split("\n")))


def excluded(photos: Photos, names: str | None) -> frozenset[int]:
    """Places of the pictures that --exclude names."""
    if not names:
        return frozenset()
    wanted = excluded_names(names)
    if not names.endswith(".txt"):
        wanted.add(photos.store.name_of(Path(names).expanduser()))
    found = {place for place, name in enumerate(photos.names) if name in wanted}
    if not found:
        raise UserError(
            f"--exclude {names}: the data have no picture of that name; python -m data list "
            "prints the names, and the damaged.txt of a run has some",
            code="exclude-unknown",
        )
    return frozenset(found)


def build_data(
    settings: Settings, source: Source, device: torch.device, num_processes: int,
    process_index: int,
) -> Data:  # fmt: skip
    """Loaders and augmentation of a loaded source for one of so many processes.

    Raises UserError where the batch, the shards and the processes do not fit together.
    """
    config = settings.config
    decoding = cutting(config, source, device)
    entry = lookup(config.model)
    if task_of(config) != source.task:
        fits = "--dataset line" if entry.task == "regression" else "an image data set"
        raise UserError(
            f"--model {config.model} is for {entry.task}, the data set {source.name} is for "
            f"{source.task}; give it {fits}",
            code="data-of-another-task",
        )
    places = divided(source, config.limit, config.val_fraction, config.seed)
    sets = {
        split: images if len(chosen) == len(images) else images.part(chosen)
        for split, chosen in places.items()
        for images in [source.test if split == "test" else source.train]
    }
    train, test = sets.pop("train"), sets["test"]
    seen = config.image_size if decoding is None else decoding.cuts.eval_size
    test_batch = evaluation_batch(len(test), seen, device) * num_processes
    if settings.actions.dry_run:
        test = limited(test, 2 * test_batch)
    tests = {**sets, "test": test}
    batch = plan_batch(settings, num_processes, len(train))
    train_loader, sampler = build_train_loader(
        train, batch.batch_size, config.seed, device, decoding, config.sampler == "balanced",
        [count * batch.micro_batch_size for count in batch.shares], process_index,
    )  # fmt: skip
    augment = Augment(
        config.augment, config.image_size, source.mean, source.std, config.seed,
        cutout=config.cutout, mixup=config.mixup, cutmix=config.cutmix,
        alternating_flip=config.alternating_flip, no_flip=source.no_flip or not config.flip,
        tta=config.tta, samples=len(train) if device.type != "cpu" and not sampler.balance else 0,
        cut=decoding is not None,
    )  # fmt: skip
    test_loaders = {
        split: build_test_loader(images, test_batch, device, decoding)
        for split, images in tests.items()
    }
    return Data(source, batch, augment, sampler, train_loader, test_loaders, places)


def cutting(config: TrainConfig, source: Source, device: torch.device) -> Decoding | None:
    """How the photographs of a source become batches; None for pictures in memory."""
    if not isinstance(source.train, PhotoSet):
        return None
    eval_size = config.eval_size or config.image_size
    policy = parse_policy(config.augment)
    cuts = Cuts(
        policy.kind, config.image_size, eval_size,
        config.eval_resize or default_resize(eval_size), config.resize, config.seed,
        policy.flip, source.no_flip or not config.flip, config.alternating_flip,
        "bicubic" if config.interpolation == "bicubic" else "bilinear",
    )  # fmt: skip
    threads = config.decode_threads or torch.get_num_threads()
    return decoding_of(cuts, source.mean, threads, device, config.decode == "scaled")
