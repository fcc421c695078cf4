"""What a run shows at its start, at each evaluation and at its end; what it sums up on disk."""

import json
import math
from dataclasses import fields
from pathlib import Path

import torch

import page
import plots
from config import TrainConfig, recipe_of
from data.loaders import EVALUATION_BATCH
from distributed.accelerator import cpu_has_bf16, describe, end, lacks_bf16
from errors import FAILED, FINISHED, STOPPED
from report import clean, duration, percent
from run_dir import SKIPPED, write_json, write_text
from tracking import FINISH_SECONDS, STOP_SECONDS

PATIENCE = 3  # epochs: AlexNet and VGG may answer one class for everything before they get going


def show_start(run) -> None:
    """The start panel: what will run, and every setting that is not the default."""
    config, plan, accelerator = run.config, run.plan, run.accelerator
    total = sum(p.numel() for p in run.bare.parameters())
    trainable = sum(p.numel() for p in run.parameters)
    held = "" if trainable == total else f", {trainable:,} of them train"
    batch = (
        f"{plan.batch_size} = {plan.num_processes} process{'es' * (plan.num_processes > 1)} x "
        f"{plan.shards_per_process} shard{'s' * (plan.shards_per_process > 1)} x "
        f"{plan.micro_batch_size} images"
    )
    data = f"{config.dataset}: {run.num_train:,} training, {run.num_test:,} test images"
    if accelerator.device.type == "cuda":
        there = run.train_loader.dataset.images.device.type == "cuda"
        data += f", in {'GPU' if there else 'host'} memory"
    resumed = run.progress.step > 0
    left = run.last_step - run.progress.step
    per_step = run.seconds_per_image * plan.batch_size / plan.num_processes
    per_test = run.seconds_per_image * run.num_test / 3 / plan.num_processes
    epochs = left / run.steps_per_epoch
    expected = left * per_step + math.ceil(epochs / config.eval_every) * per_test
    rows = [
        ("model", f"{config.model}, {total:,} parameters{held}"),
        ("weights", run.weights_told or "from scratch"),
        ("data", data),
        ("devices", f"{describe(accelerator)}, precision {config.mixed_precision}"),
        ("batch", batch),
        ("steps", f"{run.last_step} ({run.steps_per_epoch} an epoch, {config.epochs} epochs)"),
        ("time", f"about {duration(expected)}"),
        ("folder", config.run_dir or "none (dry run)"),
    ]
    if run.progress.step >= run.last_step and not run.evaluation_is_due():
        longer = "--epochs N trains longer, --fresh starts over"
        rows.insert(0, ("finished", f"this run is finished at step {run.progress.step}; {longer}"))
    elif resumed:
        best = run.progress.best
        told = f", best {percent(best)}" if best and run.task.best_is == "accuracy" else ""
        rows.insert(0, ("resumed", f"at step {run.progress.step}, epoch {run.epoch}{told}"))
    hidden = {"run_dir", "model", "dataset", "weights", "shards", "threads"}
    changed = [
        (f.name, str(getattr(config, f.name)), run.settings.origin(f.name))
        for f in fields(TrainConfig)
        if f.name not in hidden and getattr(config, f.name) != f.default
    ]
    run.report.start_panel("lockstep", rows, changed)
    for note in filter(None, (plan.note, *_notes(run))):
        run.report.warn(note)
    if expected > 1800 and accelerator.device.type == "cpu":
        run.report.show(
            f"this takes long on a CPU; a smaller run: python train.py --model {config.model} "
            f"--dataset {config.dataset} --limit 2000 --epochs 2"
        )
        chosen = run.settings.origin("mixed_precision") != "machine"
        if config.mixed_precision == "no" and not chosen and cpu_has_bf16() and not resumed:
            run.report.show("this CPU multiplies bf16 faster: try --mixed-precision bf16")


def _notes(run) -> list[str]:
    config, settings, notes = run.config, run.settings, []
    if config.num_workers:
        notes.append(
            "--num-workers is ignored: the images are in memory and augmented on the device"
        )
    if run.source.skipped:
        where = f", see {run.folder.folder / SKIPPED}" if run.folder else ""
        notes.append(f"{len(run.source.skipped)} images cannot be read and are left out{where}")
    saved = settings.origin("mixed_precision") == "saved run"
    decided = saved and "mixed_precision" not in settings.typed  # by the machine of its birth
    if config.mixed_precision == "bf16" and decided and lacks_bf16(run.accelerator.device):
        notes.append(
            "this run began in bf16, which its first device had and this one emulates slowly; "
            "--mixed-precision no --allow-change mixed_precision goes on in float32"
        )
    usual = recipe_of(config.model, config.weights).get("optimizer", TrainConfig.optimizer)
    if config.optimizer != usual and settings.origin("lr") in ("recipe", "default"):
        notes.append(
            f"the learning rate {config.lr:g} is meant for {usual}; one for {config.optimizer} is "
            "found by --find-lr, and given with --lr"
        )
    return notes


def show_epoch(run, row: dict, epoch: float, better: bool) -> None:
    """One line that can be read from across the room; long runs show one in so many."""
    words = [f"epoch {epoch}/{run.config.epochs}"]
    for split in ("val", "test"):
        if f"{split}/loss" in row:
            words.append(f"{split} loss {row[f'{split}/loss']:.4f}")
        if f"{split}/accuracy" in row:
            words.append(f"accuracy {percent(row[f'{split}/accuracy'])}")
        if f"{split}/r2" in row:
            words.append(f"R2 {row[f'{split}/r2']:.4f}")
    best = run.progress.best
    words.append(f"best {percent(best)}" if run.task.best_is == "accuracy" else "")
    left = run.chrono.left(run.last_step - run.progress.step)
    words.append(f"ETA {duration(left)}" if left else "")
    quiet = run.config.epochs > 40 and epoch % max(1, run.config.epochs // 20)
    if not (quiet and not run.is_over()):
        run.report.epoch_line("  ".join(filter(None, words)), better)
    if not (run.actions.dry_run or run.actions.debug):  # a few steps teach no model anything
        doubts = run.task.doubts(run.progress.last, list(run.source.classes))
        if epoch < PATIENCE and run.progress.step < run.last_step:
            doubts = {word: told for word, told in doubts.items() if word == "explodes"}
        run.report.warn_once(doubts)


def show_evaluation(run, results: dict[str, dict] | None) -> int:
    """What --eval-only prints; nothing is written."""
    if results is None:
        return STOPPED
    rows = []
    for split, metrics in results.items():
        numbers = (f"{k} {v:.6g}" for k, v in metrics.items() if isinstance(v, float))
        rows.append((split, f"{metrics['images']} images: {', '.join(numbers)}"))
    if "confusion" in results["test"]:
        run.report.class_table(list(run.source.classes), results["test"]["confusion"])
    run.report.end_panel(f"evaluated {run.weights_told}", rows, good=True)
    run.report.warn_once(run.task.doubts(results["test"], list(run.source.classes)))
    end(run.accelerator)
    return FINISHED


def write_ending(run, code: int, failed: str) -> None:
    """Main process: summary.json, the last weights, the table and the panel of the end."""
    progress, folder = run.progress, run.folder.folder
    why = failed or (run.stop.why(run.stop_reason) if run.stop_reason else "")
    status = {FINISHED: "finished", STOPPED: "stopped", FAILED: "failed"}[code]
    run.save_weights("last.safetensors")
    best, last = progress.best_metrics, progress.last
    summary = {
        "status": status, "reason": why, "dataset": run.config.dataset,
        "model": run.config.model, "step": progress.step,
        "epoch": progress.step / run.steps_per_epoch, "seconds": progress.seconds,
        "best_chosen_on": "validation" if run.validation_loader else "test",
        "best/epoch": progress.best_epoch, "best/step": progress.best_step,
        "life": run.life, "skipped_images": len(run.source.skipped),
        "skipped_updates": run.guard.report()["skipped"],
    }  # fmt: skip
    summary |= {f"test/{k}": v for k, v in last.items() if isinstance(v, float)}
    summary["test/images"] = last.get("images")
    summary |= {f"best/test/{k}": v for k, v in best.items() if isinstance(v, float)}
    try:
        write_json(folder / "summary.json", summary)
        if "confusion" in best:  # a file of its own: a thousand classes are a million numbers
            told = {"split": "test", "step": progress.best_step, "epoch": progress.best_epoch}
            matrix = json.dumps({**told, "matrix": best["confusion"]}, separators=(",", ":"))
            write_text(folder / "confusion.json", matrix + "\n")
    except OSError as error:
        run.report.warn(f"the run's summary cannot be written ({error})")
    seconds = FINISH_SECONDS if code == FINISHED else STOP_SECONDS
    run.left_behind = [t for t in run.trackers if not t.finish(seconds)]
    try:
        if run.config.plots and code == FINISHED:
            draw_pictures(run, folder)
    except Exception as error:  # pictures are worth no failed run
        run.report.warn(f"not all pictures could be drawn: {type(error).__name__}: {error}")
    rows = []
    if "accuracy" in best:
        run.report.class_table(list(run.source.classes), best["confusion"])
        split = "validation part" if run.validation_loader else "test split"
        rows.append(("last", f"{percent(last['accuracy'])} of {last['images']} test images"))
        told = f"{percent(best['accuracy'])} at epoch {progress.best_epoch}"
        rows.append(("best", f"{told} (best epoch chosen on the {split})"))
    elif best:
        rows.append(("test", f"loss {last['loss']:.4f}, R2 {last['r2']:.4f}"))
        learned = {k: v.flatten().tolist() for k, v in run.bare.state_dict().items()}
        rows += [(k, f"{v[0]:.4f}") for k, v in learned.items() if len(v) == 1]
    rows.append(("time", f"{duration(progress.seconds)}, {progress.step} steps"))
    rows.append(("folder", str(folder)))
    try:
        rows.append(("page", str(page.write_page(folder))))
    except Exception as error:  # nor is its page
        run.report.warn(f"report.html cannot be written: {type(error).__name__}: {error}")
    title = "finished"
    if code == STOPPED:
        title = f"stopped at step {progress.step}: {why}"
        rows.append(("go on", f"python train.py --resume {folder}"))
    elif code == FAILED:
        title = f"ended without its last checkpoint: {failed}"
    else:
        if run.source.task == "classification":
            rows.append(("predict", f"python predict.py PICTURE.png --run {folder}"))
        rows.append(("repeat", f"sh {folder / 'command.sh'}"))
    run.report.end_panel(title, rows, good=code == FINISHED)
    run.tell_status(status=status, reason=why, step=progress.step)
    run.folder.close()


@torch.no_grad()
def draw_pictures(run, folder: Path) -> None:
    """curves.png, confusion.png, mistakes.png and samples.png, or line.png for a regression."""
    rows = run.folder.read_metrics()
    if not rows:
        return
    plots.curves(rows, folder / "curves.png")
    # The main process alone is here: no call in which it would wait for the others.
    model = (run.average.model if run.average else run.bare).eval()
    test = run.test_loader.dataset
    if run.source.task == "regression":
        inputs = test.images.to(run.accelerator.device)
        lines = inputs.flatten().cpu(), test.labels.flatten().cpu(), model(inputs).flatten().cpu()
        plots.line_fit(*lines, folder / "line.png")
        return
    classes = [clean(name) for name in run.source.classes]
    if "confusion" in run.progress.best_metrics:
        plots.confusion(run.progress.best_metrics["confusion"], classes, folder / "confusion.png")
    first = torch.arange(min(32, run.num_train))
    train = run.train_loader.dataset
    images = run.augment.train(train.images[first], first, 0).float().cpu()
    mean, std = (torch.tensor(v)[:, None, None] for v in (run.source.mean, run.source.std))
    shown = ((images * std + mean) * 255).clamp(0, 255).byte()
    names = [classes[label] for label in train.labels[first].tolist()]
    plots.sheet(shown, names, folder / "samples.png")
    draw_mistakes(run, model, classes, folder / "mistakes.png")


def draw_mistakes(run, model, classes: list[str], path: Path) -> None:
    """The test images (of the first thousand) that the model is most wrongly sure of."""
    test, wrong = run.test_loader.dataset, []
    for indices in torch.arange(min(1000, run.num_test)).split(EVALUATION_BATCH):
        batch = test.__getitems__(indices)
        images = run.inputs(run.augment.evaluate(batch["images"]))
        with run.accelerator.autocast():
            logits = model(images)
        sure, guess = logits.float().softmax(1).cpu().max(1)
        labels = batch["labels"].cpu()
        for place in (guess != labels).nonzero().flatten().tolist():
            told = f"{classes[labels[place]]}\nas {classes[guess[place]]} {percent(sure[place])}"
            wrong.append((float(sure[place]), int(indices[place]), told))
    worst = sorted(wrong, reverse=True)[:32]
    if worst:
        pictures = test.images[torch.tensor([index for _, index, _ in worst])].cpu()
        plots.sheet(pictures, [told for _, _, told in worst], path)
