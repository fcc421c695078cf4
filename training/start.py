"""From a plan to what the loop needs: the data set, a model with its starting weights, facts."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import nn

from common.disk import Json, digest
from common.errors import UserError
from config import Settings, to_json, unfreezing
from data.keyed_random import hash_integers
from distributed.accelerator import code_fingerprint, model_fingerprint
from distributed.checkpoint import Progress
from distributed.generators import Generators
from distributed.shards import packed, unpack
from distributed.world import World
from models import build_from, lookup, parts_of
from models.freezing import Frozen
from models.hooks import StartsFromData
from models.own_file import digests_of, is_own_file
from models.state import load_whole_state, separate_views, whole_state
from models.weights import load_weights
from tasks import TASKS, Task, build_task
from tasks.losses import Criterion, build_criterion, class_weights
from training.data import Data
from training.learner import Learner
from training.plan import Plan
from training.schedule import Schedule, build_schedule
from training.trial import Trial, try_model

WEIGHTS = 102  # a stream of `hash_integers`, beside those of data/keyed_random.py


@dataclass(frozen=True)
class Started:
    """A model on its device, tried; `weights` says where they come from, "" for from scratch."""

    model: nn.Module
    task: Task
    weights: str
    trial: Trial
    frozen: Frozen


def start_model(plan: Plan, data: Data, world: World) -> Started:
    """The model with its starting weights, tried before anything is written, on the device."""
    config = plan.config
    entry = lookup(config.model)
    _seed_weights(config.seed)
    num_classes = data.num_outputs
    build = partial(build_from, vars(config), num_classes)
    model = build()
    separate_views(model)
    weights = ""
    if config.weights not in ("none", "auto") and not plan.goes_on:
        weights = _load_weights(model, plan, data, world)
    frozen = Frozen(
        model, config.freeze, unfreezing(config.unfreeze), config.model, config.image_size
    )
    if isinstance(model, StartsFromData) and not weights:
        _start_from_data(model, data, world)
    criterion = _build_criterion(plan, data).to(world.device)
    task = build_task(
        data.source.task, num_classes, config.label_smoothing, model, criterion, config.threshold
    )
    if config.select != "auto":
        if config.select not in (known := [m.key for m in task.metrics]):
            raise UserError(
                f"--select {config.select}: not counted of {num_classes} classes; these are: "
                f"{', '.join(known)}",
                code="select-not-counted",
            )
        task.best_is = config.select
    layout = torch.channels_last if entry.channels_last else torch.contiguous_format
    model = model.to(world.device).to(memory_format=layout)

    def again() -> nn.Module:
        _seed_weights(config.seed)
        second = build()
        load_whole_state(second, whole_state(model))
        frozen.hold(second, frozen.last_epoch)
        return second.to(world.device).to(memory_format=layout)

    if frozen.stages:  # tried is what trains in the end
        frozen.hold(model, frozen.last_epoch)
    trial = world.broadcast(  # what was measured decides who waits for whom: one process's counts
        world.all_or_none(
            lambda: try_model(model, task, data, config, world, plan.actions.debug, again)
        )
    )
    if frozen.stages:
        frozen.hold(model, 0)
    if plan.actions.debug:
        torch.autograd.set_detect_anomaly(True)
    if config.compile:
        model.compile(dynamic=False)
        world.watch.patient |= {"data", "step", "evaluate"}
    return Started(model, task, weights, trial, frozen)


def _build_criterion(plan: Plan, data: Data) -> Criterion:
    """The training loss; to evaluate, none of one's own is needed."""
    config, kind = plan.config, TASKS[data.source.task].criterion_kind
    if not data.classes or plan.actions.eval_only:
        return kind(smoothing=config.label_smoothing)
    weights = class_weights(config.class_weights, data.train.labels, data.classes)
    mixes = bool(config.mixup or config.cutmix)
    return build_criterion(
        config.loss, config.label_smoothing, data.num_outputs, weights, mixes, kind,
        config.focal_gamma,
    )  # fmt: skip


def _seed_weights(seed: int) -> None:
    """Everything that __init__ may draw from."""
    Generators(torch.device("cpu"), ()).seed(hash_integers(seed, WEIGHTS))


def _load_weights(model: nn.Module, plan: Plan, data: Data, world: World) -> str:
    """One process of each node first, which may have to download them, then the others."""
    message, config = "", plan.config
    load = partial(
        load_weights, model, config.model, config.weights, data.num_outputs, data.classes,
        as_they_are=plan.actions.eval_only, image_size=config.image_size,
    )  # fmt: skip
    for turn in (True, False):
        work = load if world.accelerator.is_local_main_process == turn else str
        message = world.all_or_none(work) or message
    return message


def _start_from_data(model: nn.Module, data: Data, world: World) -> None:
    """Weights that a model takes from the images: made by the main process, sent to all.

    A resumed run overwrites them with those of its checkpoint.
    """
    if world.is_main:
        images = data.train.seen(torch.arange(min(2000, len(data.train)))).cpu()
        cast(StartsFromData, model).start_from_data(data.augment.evaluate(images))
    load_whole_state(model, world.broadcast(whole_state(model) if world.is_main else {}))


def settle_buckets(learner: Learner, data: Data) -> None:
    """One backward for nothing, so that the first step of a life adds up like all others.

    DDP's first backward has one bucket in the order of registration; from the second on there are
    several, in the order in which gradients arrive. A ring of three and more processes adds in an
    order that depends on a number's place in its bucket: without this, the first step after a start
    has other bits than the same step of a run that was not interrupted.
    """
    shards = learner.shards
    if not shards.by_ddp:
        return
    before = packed(shards.buffers)
    shards.generators.seed(shards.seed_of(0, 0))  # which layers run may be left to chance
    indices = torch.arange(data.batch.micro_batch_size, device=data.train.labels.device)
    batch = data.train.batch(indices)
    images = learner.inputs(data.augment.train(batch["images"], batch["indices"], 0))
    loss = learner.task.loss(learner.model.train()(images), batch["labels"].to(images.device))
    shards.weighed(loss).backward()  # not the accelerator's: under fp16 it would need a scale
    learner.optimizer.zero_grad()
    unpack(before, shards.buffers)


def plan_schedule(plan: Plan, data: Data, progress: Progress, world: World) -> Schedule:
    """How long the run is from where it stands, in the steps of its present batch."""
    steps, actions = data.sampler.steps_per_epoch, plan.actions
    progress.settle(data.batch.batch_size, steps)
    schedule = build_schedule(
        plan.config, steps, actions.dry_run, world.stop.row_every is not None,
        ahead=progress.ahead, stop_after=actions.stop_after, epochs_bind=plan.both_lengths,
    )  # fmt: skip
    if plan.config.plain_epochs:
        data.augment.until = schedule.epochs - plan.config.plain_epochs
    return schedule


def agreed_facts(settings: Settings, data: Data, started: Started, world: World) -> dict[str, str]:
    """Fingerprints of what decides a run's numbers, which all processes must share.

    State that a model hides makes the number of processes one of them: `hidden_state` names it.
    """
    names = filter(is_own_file, settings.config.may_be_files)
    own = [Path(name.partition(".py:")[0] + ".py") for name in names]
    own_files = digests_of(*settings.config.may_be_files)
    facts = {
        "data": data.source.fingerprint,
        "model": model_fingerprint(started.model),
        "order": data.sampler.fingerprint(),
        "code": code_fingerprint(*own),
        "hidden_state": ", ".join(started.trial.hidden),
        "processes": str(world.num_processes),
        "own code": digest(json.dumps(own_files)) if own_files else "",
    }
    world.refuse_disagreement({**facts, "settings": digest(to_json(settings))})
    return facts


def weights_card(plan: Plan, data: Data) -> dict[str, Json]:
    """What a file of weights says of itself, so that predict.py needs nothing else."""
    source = data.source
    return {
        "model": plan.config.model, "image_size": plan.config.image_size,
        "classes": source.classes, "mean": source.mean, "std": source.std,
        "dataset": plan.config.dataset, "code": digests_of(plan.config.model), **data.cut_as(),
        "task": source.task, "threshold": plan.config.threshold, **parts_of(vars(plan.config)),
        **({"no_flip": True} if source.no_flip or not plan.config.flip else {}),
    }  # fmt: skip
