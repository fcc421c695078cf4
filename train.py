"""The run, told in order: main(), train_one_epoch(), train_step(), evaluate(); fit()."""

import sys

if __name__ == "__main__":  # before torch is imported: --help and a typo cost no more than a blink
    from config import parse_to_train
    from many import hand_over

    SETTINGS = parse_to_train(sys.argv[1:])
    hand_over(SETTINGS)  # --sweep, --seeds, --folds: many runs, each as it is alone

import torch

from distributed.checkpoint import Progress
from distributed.world import World
from optim import build_average, build_optimizer, set_lr
from report import panels
from report.ending import finish, run_to_exit
from report.logbook import Logbook
from report.notebook import Flag, Model, Result, run_as_guest
from tasks.evaluation import Evaluation
from training.best import keep_best_comparable
from training.checkpoints import Checkpoints
from training.data import Batch, Data, load_data
from training.features import cache_features
from training.learner import Learner
from training.lr_finder import find_lr
from training.not_finite import refuse_not_finite
from training.observer import Observer
from training.plan import decide
from training.schedule import Schedule
from training.start import agreed_facts, plan_schedule, settle_buckets, start_model, weights_card
from training.unfreezing import unfreeze


def main(world: World, observer: Observer) -> int:
    """One life of a run, from the plan to the exit status."""
    plan = decide(world)
    log = world.enter(Logbook(plan, world))
    plan, data = load_data(plan, world, log.screen.note)
    config, actions = plan.config, plan.actions
    started = start_model(plan, data, world)
    average = build_average(started.model, config)
    optimizer = build_optimizer(started.model, config)
    model, optimizer, *loaders = world.accelerator.prepare(started.model, optimizer, *data.loaders)
    data = data.prepared(loaders)
    learner = Learner(model, optimizer, average, started, config, data.batch, world)

    facts = agreed_facts(plan.settings, data, started, world)
    checkpoints = world.enter(Checkpoints(plan, facts, weights_card(plan, data), world, log.saved))
    progress = checkpoints.resume(learner, log.screen.warn, log.screen.note)
    schedule = plan_schedule(plan, data, progress, world)
    checkpoints.refuse_lost_state(schedule, progress)
    log.begin(plan, data, started.task, facts, progress)
    panels.show_start(log.screen, checkpoints, data, started, learner, schedule, progress, world)
    if actions.eval_only:
        results = evaluate(learner, data, world, progress)
        return panels.show_evaluation(log.screen, results, plan, started, data, world)
    keep_best_comparable(checkpoints, learner, data, world, progress, evaluate, log.screen.warn)
    log.screen.note(cache_features(learner, data, plan, world))
    settle_buckets(learner, data)
    world.stop.ask_all()  # a stop may have been asked for while we started
    observer.started(learner, data, schedule, progress)
    if actions.find_lr:
        return panels.show_rates(log.screen, find_lr(learner, data, world, train_step), plan, world)

    while not (schedule.over(progress) or world.stop.reason):
        if not schedule.evaluates(progress):
            train_one_epoch(learner, data, schedule, progress, checkpoints, log, world, observer)
        if schedule.evaluates(progress) and not world.stop.reason:
            with log.pause("evaluation"), observer.phase("evaluate"):
                results = evaluate(learner, data, world, progress)
            if results and log.evaluated(results, learner.task, data, schedule, progress):
                log.kept_best(checkpoints.save_weights("model.safetensors", learner, progress))
    if actions.dry_run:
        return panels.show_trial(log.screen, plan, data, started)
    return finish(log, checkpoints, learner, data, schedule, progress, world)


def train_one_epoch(
    learner: Learner,
    data: Data,
    schedule: Schedule,
    progress: Progress,
    checkpoints: Checkpoints,
    log: Logbook,
    world: World,
    observer: Observer,
) -> None:
    """Train on what is left of an epoch; stops early when all processes agreed to stop."""
    unfreeze(learner, data, schedule, progress, log.screen.note)
    learner.model.train()
    log.open_epoch(schedule, progress)
    batches = world.watched(data.rest_of_epoch(*schedule.place(progress.step)), progress)
    for batch in observer.batches(batches):  # this process's slice of the global batch
        set_lr(learner.optimizer, lr := schedule.lr(progress.step, progress.drops))
        train_step(learner, data, batch, progress.step, schedule.place(progress.step)[0])
        progress.count_step(lr)
        log.step(schedule, progress)
        if schedule.logs(progress.step) or world.stop.row_agreed:
            with observer.phase("row"):
                refuse_not_finite(learner, data, schedule, log.run_folder)
                images = progress.take_summed() * data.batch.batch_size
                log.row(learner.take_row(images), data, schedule, progress)
        elif world.device.type == "cpu":  # where it costs no wait
            refuse_not_finite(learner, data, schedule, log.run_folder)
        world.beat(progress.step)
        where = "" if world.stop.reason else checkpoints.due(progress, schedule)
        if where:  # to disk or memory; after a bad number, steps are no longer the weights'
            refuse_not_finite(learner, data, schedule, log.run_folder)
            with log.pause("saving"), observer.phase("save"):
                checkpoints.save(learner, progress, where)
        if world.stop.reason or not schedule.trains(progress):
            break
    if world.stop.reason:  # also where the next batch did not come: this step is saved
        refuse_not_finite(learner, data, schedule, log.run_folder)


def train_step(learner: Learner, data: Data, batch: Batch, step: int, epoch: int) -> None:
    """One update of the weights: forward and backward for each shard, then the optimizer."""
    model, optimizer, task = learner.model, learner.optimizer, learner.task
    augment, shards = data.augment, learner.shards
    for shard, part in enumerate(shards(batch, step), shards.first):
        images = learner.inputs(augment.train(part["images"], part["indices"], epoch))
        labels = part["labels"].to(images.device, non_blocking=True)
        images, labels = augment.mix(images, labels, part["indices"], epoch, task.num_classes)
        logits = model(images)
        loss = task.loss(logits, labels)  # summed over the shard
        learner.accelerator.backward(shards.weighed(loss))
        learner.add(shard, loss.detach(), task.right(logits, labels))
    skipped = learner.check_gradients(step)
    optimizer.step()
    optimizer.zero_grad()
    if learner.average is not None:
        learner.average.update(learner.bare, step, skipped)


@torch.no_grad()
def evaluate(learner: Learner, data: Data, world: World, progress: Progress) -> dict | None:
    """Metrics of each split, every image counted once; None if the run was told to stop."""
    world.phase("evaluate", progress.step, new_beats=True)
    model, augment, results = learner.evaluated_model(data).eval(), data.augment, {}
    for split in data.test_loaders:
        found = Evaluation(learner.task, data.amount(split), world.device)
        for batch in learner.seeded(world.beating(data.evaluation(split), progress)):
            images = augment.evaluate(batch["images"])
            with world.accelerator.autocast():
                logits = augment.vote(lambda view: learner.logits(model, view), images)
            found.add(logits, batch)
        if world.stop.reason:
            return None
        results[split] = found.results(world.together)
        assert results[split]["images"] == data.counted(split, world), "an image lost or doubled"
    return results


def fit(model: Model = None, **flags: Flag) -> Result:
    """Train from a notebook: a class, a name or "FILE.py:Class", and any flag as a keyword.

    `fit(model=MyNet, dataset="digits", epochs=3)`. Raises UserError where the command line would
    end. The first interrupt stops and saves, the second raises KeyboardInterrupt.
    """
    return run_as_guest(main, model, flags)


if __name__ == "__main__":
    raise SystemExit(run_to_exit(main, SETTINGS))
