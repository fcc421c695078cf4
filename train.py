"""The run, told in order: main(), train_one_epoch(), train_step(), evaluate()."""

import signal
import sys

if __name__ == "__main__":  # before torch is imported: --help and a typo cost no more than a blink
    from config import parse_or_exit

    SETTINGS = parse_or_exit(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import torch

from distributed import faults
from lr_finder import find_lr
from optim import build_optimizer
from panels import show_evaluation, show_start
from run import Run, guarded
from trial import settle_buckets


def main(run: Run) -> int:
    """One life of a run, from the data to the exit status."""
    run.open()
    run.load_data()
    model = run.build_model()
    optimizer = build_optimizer(model, run.config)
    run.ready(*run.accelerator.prepare(model, optimizer, run.train_loader, run.test_loader))
    run.resume()
    show_start(run)
    if run.actions.eval_only:
        return show_evaluation(run, evaluate(run))
    settle_buckets(run)
    if run.actions.find_lr:
        return find_lr(run, train_step)

    while not run.is_over():
        if not run.evaluation_is_due():
            train_one_epoch(run)
        if run.evaluation_is_due() and not run.stop_reason:
            run.keep(evaluate(run))
    return run.finish()


def train_one_epoch(run: Run) -> None:
    """Train on what is left of the epoch; stops early when all processes agreed to stop."""
    run.model.train()
    for batch in run.batches():  # this process's slice of the global batch
        run.set_lr()
        train_step(run, batch)
        run.step_done()


def train_step(run: Run, batch: dict) -> None:
    """One update of the weights: forward and backward for each shard, then the optimizer."""
    model, optimizer, augment, task = run.model, run.optimizer, run.augment, run.task
    for shard, part in enumerate(run.shards(batch, run.progress.step), run.shards.first):
        images = run.inputs(augment.train(part["images"], part["indices"], run.epoch))
        labels = part["labels"].to(images.device, non_blocking=True)
        images, labels = run.mix(images, labels, part["indices"])
        logits = model(images)
        loss = task.loss(logits, labels)  # summed over the shard
        run.accelerator.backward(loss * run.shards.scale)
        run.sums[shard] += loss.detach()  # on the device: reading it each step would wait
    skipped = run.gradients_are_bad()
    optimizer.step()
    optimizer.zero_grad()
    if run.average is not None:
        run.average.update(run.bare, skipped)


@torch.no_grad()
def evaluate(run: Run) -> dict[str, dict] | None:
    """Metrics of each split, every image counted once; None if the run was told to stop."""
    model = run.evaluated_model().eval()
    results = {}
    for split, loader in run.evaluation_loaders():
        counts = run.task.new_counts(run.accelerator.device)
        for batch in loader:
            faults.hit("evaluate", run.progress.step)
            images = run.augment.evaluate(batch["images"])
            with run.accelerator.autocast():
                logits = run.augment.vote(lambda view: model(run.inputs(view)), images)
            labels, weights = (batch[name].to(logits.device) for name in ("labels", "weights"))
            run.task.count(counts, logits, labels, weights)
            if run.beat():
                return None
        counts = run.accelerator.reduce(counts, reduction="sum").cpu()
        results[split] = run.task.metrics(counts)
        assert results[split]["images"] == len(loader.dataset), "an image was lost or counted twice"
    return results


if __name__ == "__main__":
    raise SystemExit(guarded(main, SETTINGS))
