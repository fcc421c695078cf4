"""What a run shows at its start, at each evaluation and at its end; what it sums up on disk."""

import json
import math
import os
import shlex
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.confusion import dense
from common.disk import read_json, write_json, write_text
from common.errors import FAILED, FINISHED, STOPPED
from common.metric import Metric
from common.text import counted, duration, pasted, printable
from config import Actions, TrainConfig, flag_of, own_disks, recipe_of
from distributed.accelerator import cpu_has_bf16, lacks_bf16
from distributed.checkpoint import Progress, card_of
from distributed.stop import DAMAGED, SIGNAL, TIME_LIMIT
from distributed.world import World
from models import parts_of
from models.__main__ import table_of_layers
from models.own_file import is_own_file
from report import pictures
from report.claim import far_from_claim, told_claim
from report.screen import Report
from tasks import Task
from training.checkpoints import Checkpoints
from training.data import Data
from training.elsewhere import write_evaluation
from training.learner import Learner
from training.lr_finder import Rates
from training.plan import Plan
from training.predictions import take_answers, write_predictions
from training.run_dir import DAMAGED as DAMAGED_LIST
from training.run_dir import SKIPPED, go_on, job, without
from training.schedule import Schedule
from training.schedule import doubts as schedule_doubts
from training.start import Started
from training.trial import PICTURES

Rows = list[tuple[str, str]]  # of a panel: what, and its words
LONG = 1800.0  # seconds
FEW = 4  # images of a step for one process, which keep no GPU busy
STOP_AFTER = "--stop-after"  # how the reason of such an end begins
PATIENCE = 3  # epochs: AlexNet and VGG may answer one class for everything before they get going


def show_start(
    screen: Report, checkpoints: Checkpoints, data: Data, started: Started, learner: Learner,
    schedule: Schedule, progress: Progress, world: World,
) -> None:  # fmt: skip
    """The start panel: what will run, and every setting that is not the default."""
    plan, config, settings = checkpoints.plan, checkpoints.plan.config, checkpoints.plan.settings
    rows = [
        *_standing(checkpoints, learner, schedule, progress),
        *_what_runs(checkpoints, data, started, learner, schedule, progress, world),
        *_rates_and_stages(learner),
    ]
    hidden = {"run_dir", "model", "dataset", "weights", "shards", "threads", "recipe"}
    if config.normalize not in ("auto", "data"):
        hidden.add("normalize")
        mean, std = (
            ", ".join(f"{number:.3g}" for number in part)
            for part in (data.source.mean, data.source.std)
        )
        rows.append(("normalised", f"by {mean} / {std} ({settings.origin('normalize')})"))
    changed = [
        (f.name, str(getattr(config, f.name)), settings.origin(f.name))
        for f in fields(TrainConfig)
        if f.name not in hidden and getattr(config, f.name) != f.default
    ]
    if number := job():
        start = int(os.environ.get("SLURM_RESTART_COUNT") or 0) + 1
        log = os.environ.get("LOCKSTEP_LOG", "")
        rows.append(("job", f"{number}, start {start}" + (f", log {log}" if log else "")))
    if plan.actions.debug:
        parts = parts_of(vars(config))
        layers, _ = table_of_layers(config.model, config.image_size, data.num_outputs, parts)
        layers.caption = None  # of weights that could be had; the panel names this run's
        screen.show(layers)
    screen.start_panel("lockstep", rows, changed)
    odd = schedule_doubts(config, schedule, progress, plan.both_lengths)
    notes = (data.batch.note, data.note, *_notes(plan, data, started, world), *odd)
    for note in filter(None, notes):
        screen.warn(note)


def _standing(
    checkpoints: Checkpoints, learner: Learner, schedule: Schedule, progress: Progress
) -> Rows:
    """What a run is or comes from: its recipe, how far it was, whether it is at its end."""
    recipe, rows = checkpoints.plan.config.recipe, []
    if recipe != "none":
        rows.append(("recipe", told_claim(recipe)))
    if schedule.over(progress):
        flag = "--patience" if schedule.gave_up(progress) else "--epochs"
        longer = f"{flag} N trains longer, --fresh starts over"
        rows.append(("finished", f"this run is finished at step {progress.step}; {longer}"))
    elif progress.step > 0:
        best, metric = progress.best, learner.task.best
        shown = f", best {metric.show(best)}" if best is not None and metric.has("best") else ""
        epoch = f"in epoch {schedule.place(progress.step)[0] + 1} of {schedule.epochs}"
        ahead = f" ({counted(progress.images, 'image')} seen)" if schedule.ahead else ""
        source = f", {checkpoints.snapshots.source}" if checkpoints.snapshots.source else ""
        where = f"at step {progress.step}, {epoch}{ahead}{shown}{source}"
        rows.append(("resumed", where))
    return rows


def _what_runs(
    checkpoints: Checkpoints, data: Data, started: Started, learner: Learner, schedule: Schedule,
    progress: Progress, world: World,
) -> Rows:  # fmt: skip
    """Model, pictures, devices, batch, length and folder."""
    plan, config, snapshots = checkpoints.plan, checkpoints.plan.config, checkpoints.snapshots
    total = sum(p.numel() for p in learner.bare.parameters())
    trainable = sum(p.numel() for p in learner.parameters)
    held = "" if trainable == total else f", {trainable:,} of them train"
    validation = f"{len(data.places['val']):,} validation, " if "val" in data.places else ""
    amount = f"{config.dataset}: {len(data.train):,} training, {validation}"
    there, tried = len(data.places["test"]), len(data.test)
    amount += f"{there:,} test images" + f" ({tried:,} are tried)" * (tried < there)
    if world.device.type == "cuda":
        on_gpu = data.train.labels.device.type == "cuda"
        amount += f", in {'GPU' if on_gpu else 'host'} memory"
    return [
        ("model", f"{config.model}, {total:,} parameters{held}"),
        ("weights", weights_shown(plan, started) or "from scratch"),
        ("data", amount),
        *([("files", str(data.source.tally))] if data.source.tally else []),
        *(("images", words) for words in data.photographs()),
        *started.task.criterion.in_words(data.classes),
        *(("sampler", b.in_words(data.classes)) for b in (data.sampler.balance,) if b),
        ("devices", f"{world.describe()}, precision {config.mixed_precision}"),
        ("batch", data.batch.in_words()),
        ("steps", steps_shown(schedule)),
        ("folder", config.run_dir or f"none ({_why_none(plan.actions)})"),
        *([("snapshots", snapshots.in_words)] if snapshots.in_words else []),
    ]


def _why_none(actions: Actions) -> str:
    """What a command does that leaves no run folder."""
    if actions.eval_only:
        return "--eval-only"
    return "--find-lr" if actions.find_lr else "dry run"


def _rates_and_stages(learner: Learner) -> Rows:
    """What learns at another rate, and what trains later."""
    rows = []
    if learner.config.layer_decay != 1:
        scales = sorted({g["lr_scale"] for g in learner.optimizer.param_groups})
        rows.append(("layer rates", f"{len(scales)} depths, {scales[0]:.3g} to 1 of the rate"))
    if learner.frozen.stages:
        sizes = {name: p.numel() for name, p in learner.bare.named_parameters()}
        later = [
            f"epoch {s.epoch + 1} {s.what} ({sum(sizes[n] for n in s.names):,} parameters)"
            for s in learner.frozen.stages
        ]
        rows.append(("unfreezes", ", ".join(later)))
    return rows


def advise_on_time(screen: Report, plan: Plan, data: Data, world: World, left: float) -> None:
    """Once, where the speed of rows says that a CPU will be at it for long: what is faster."""
    config = plan.config
    if left < LONG or world.device.type != "cpu":
        return
    smaller = ["--model", config.model, "--dataset", config.dataset]
    for name in ("data_dir", "task", "image_size"):
        if plan.settings.asked(name):
            smaller += [flag_of(name), getattr(config, name)]
    smaller += ["--limit", min(2000, max(1, len(data.train) // 2)), "--epochs", 2]
    words = f"this takes {duration(left)} on a CPU; a smaller run: "
    words += pasted("train.py", *smaller)
    chosen = plan.settings.origin("mixed_precision") != "machine"
    if config.mixed_precision == "no" and not chosen and cpu_has_bf16():
        words += "; this CPU multiplies bf16 faster: --mixed-precision bf16 for a new run"
    screen.warn_once({"long": words})


def steps_shown(schedule: Schedule) -> str:
    """The length of the run in steps and epochs, and where --stop-after ends this command."""
    total, epochs = schedule.total_steps - schedule.ahead, schedule.epochs
    words = f"{total} ({schedule.steps_per_epoch} an epoch, {counted(epochs, 'epoch')})"
    return f"{words}, stops after {schedule.last_step}" if schedule.stops_early else words


def weights_shown(plan: Plan, started: Started) -> str:
    """Where the weights come from, before any checkpoint; "" for from scratch."""
    if plan.actions.eval_only and plan.config.run_dir is not None:
        return str(Path(plan.config.run_dir) / "model.safetensors")
    return started.weights


def _notes(plan: Plan, data: Data, started: Started, world: World) -> list[str]:
    left_out = []
    if data.source.skipped:
        where = f", see {plan.folder / SKIPPED}" if plan.folder else ""
        images = counted(len(data.source.skipped), "image")
        left_out.append(f"left out, as it cannot be read: {images}{where}")
    return [
        *_tried(plan, started),
        *_emulated(plan, world),
        *data.cut_off(),
        *_at_odds(plan.config, data, world),
        *left_out,
        *data.source.notes,
        *_rate_of_another(plan),
    ]


def _tried(plan: Plan, started: Started) -> list[str]:
    """What the trial step found in the model that would surprise later."""
    model, trial, notes = plan.config.model, started.trial, []
    if unused := trial.unused:
        notes.append(
            f"{', '.join(unused[:5])} of {model} got no gradient when it was tried: does "
            "forward use them? What never gets one changes by weight decay alone"
        )
    if trial.hidden:
        notes.append(
            f"{model} answers a shard otherwise after another one: it keeps state of its "
            f"own ({', '.join(trial.hidden[:3])}), which is in no checkpoint. The run is the same "
            "run on this number of processes only, and not after a stop; register_buffer keeps it"
        )
    if trial.random:
        notes.append(
            f"{model} draws random numbers when it is evaluated, too (F.dropout without "
            "training=self.training?); the same ones each time, on any number of processes"
        )
    if trial.neighbours:
        notes.append(
            f"{model} answers a picture alone otherwise than in a batch of {PICTURES}, in "
            "evaluation: test numbers depend on the batches, and predict.py answers otherwise "
            "(batch norm without running statistics?)"
        )
    if trial.probabilities:
        notes.append(
            f"{model} answers rows that sum to 1: the loss takes logits and does softmax "
            "itself; a second softmax learns little and slowly, so leave it out of forward"
        )
    if plan.actions.debug and (refused := trial.nondeterministic):
        notes.append(
            f"{', '.join(refused[:5])} of {model}: no deterministic backward on a GPU, "
            "where --deterministic will refuse the model; models/pooling.py has an AdaptivePool"
        )
    return notes


def _emulated(plan: Plan, world: World) -> list[str]:
    """Whether a run that began in bf16 goes on where that is slow."""
    saved = plan.settings.origin("mixed_precision") == "saved run"
    decided = saved and "mixed_precision" not in plan.settings.typed  # by its birth's machine
    if plan.config.mixed_precision == "bf16" and decided and lacks_bf16(world.device):
        return [
            "this run began in bf16, which its first device had and this one emulates slowly; "
            "--mixed-precision no --allow-change mixed_precision goes on in float32"
        ]
    return []


def _at_odds(config: TrainConfig, data: Data, world: World) -> list[str]:
    """Settings that are allowed together and seldom meant so."""
    notes = []
    if config.optimizer == "schedule_free" and config.schedule != "constant":
        notes.append(
            "schedule_free averages where others let the rate fall: --schedule constant is its own"
        )
    if is_own_file(config.optimizer) and world.device.type != "cpu":
        notes.append(
            f"{config.optimizer}: the host waits for the device in each step, to leave out what is "
            "not finite; a class with _step_supports_amp_scaling = True reads self.found_inf itself"
        )
    if data.sampler.balance and config.class_weights != "none":
        notes.append(
            "--sampler balanced and --class-weights even the classes out twice: one is enough"
        )
    return notes


def _rate_of_another(plan: Plan) -> list[str]:
    """Whether nobody chose the learning rate for this optimizer."""
    config = plan.config
    usual = recipe_of(config.model, config.weights).get("optimizer", TrainConfig.optimizer)
    if config.optimizer != usual and plan.settings.origin("lr") in ("recipe", "default"):
        return [
            f"the learning rate {config.lr:g} is meant for {usual}; one for {config.optimizer} is "
            "found by --find-lr, and given with --lr"
        ]
    return []


def on_line(task: Task) -> list[Metric]:
    """The metrics that an epoch's line shows."""
    return [metric for metric in task.metrics if metric.has("line")]


def show_epoch(
    screen: Report, plan: Plan, task: Task, data: Data,
    schedule: Schedule, progress: Progress, row: dict, better: bool, left: float, stopping: bool,
    trained: dict[str, float],
) -> None:  # fmt: skip
    """One line that can be read from across the room; long runs show one in so many."""
    epochs, epoch = schedule.epochs, row["epoch"]
    words = [f"epoch {epoch}/{epochs}"]
    row = row | trained
    for split in ("train", "val", "test"):
        numbers = [
            m.named(row[f"{split}/{m.key}"]) for m in on_line(task) if f"{split}/{m.key}" in row
        ]
        words += [f"{split} {word}" if number == 0 else word for number, word in enumerate(numbers)]
    if task.best.has("best"):  # one that is not on the line is named, or it passed for one that is
        write = task.best.show if task.best.has("line") else task.best.named
        words.append(f"best {write(progress.best or 0.0)}")
    words.append(f"ETA {duration(left)}" if left else "")
    quiet = epochs > 40 and epoch % max(1, epochs // 20)
    if not quiet or stopping or schedule.over(progress):
        screen.epoch_line("  ".join(filter(None, words)), better)
    if not (plan.actions.dry_run or plan.actions.debug):  # a few steps teach no model anything
        doubts = task.doubts(progress.last, data.classes)
        if epoch < PATIENCE and schedule.trains(progress):
            doubts = {word: text for word, text in doubts.items() if word == "explodes"}
        if plan.config.augment == "none" or data.augment.no_flip:
            doubts.pop("mirror", None)
        screen.warn_once({word: f"at epoch {epoch}, {text}" for word, text in doubts.items()})


def in_full(found: dict, metrics: list[Metric]) -> str:
    """`loss 0.35, accuracy 0.9`: in full, for who compares."""
    return ", ".join(f"{metric.key} {found[metric.key]:.6g}" for metric in metrics)


def show_evaluation(
    screen: Report, results: dict[str, dict] | None, plan: Plan, started: Started, data: Data,
    world: World,
) -> int:  # fmt: skip
    """What --eval-only prints, and writes into the run folder. The exit status."""
    if results is None:
        return STOPPED
    rows, answers = [], take_answers(results)
    for split, found in results.items():
        shown = on_line(started.task)
        more = [metric for metric in started.task.metrics if metric not in shown]
        if more:  # what counts is last, and on a line of its own
            rows.append((f"more of {split}", in_full(found, more)))
        rows.append((split, f"{counted(found['images'], 'image')}: {in_full(found, shown)}"))
    if "confusion" in results["test"]:
        screen.class_table(data.classes, dense(results["test"]["confusion"]))
    if by_class := results["test"].get("by_class"):
        screen.class_numbers(data.classes, started.task.class_metrics, by_class)
    if world.is_main and plan.config.run_dir:
        try:
            path = write_evaluation(plan, data.source, results)
            write_predictions(path.with_suffix(".csv"), answers, started.task, data)
            rows.append(("written", f"{path}, and {path.stem}.csv with the answer to each image"))
        except OSError as error:
            screen.warn(f"the evaluation cannot be written ({error})")
    screen.end_panel(f"evaluated {weights_shown(plan, started)}", rows, good=True)
    screen.warn_once(started.task.doubts(results["test"], data.classes))
    return FINISHED


def show_trial(screen: Report, plan: Plan, data: Data, started: Started) -> int:
    """What --dry-run ends with. The exit status."""
    rows = [("tried", "one step and two evaluation batches; nothing was written")]
    commands, count, share, several = [], plan.actions.as_processes, FEW + 1, False
    if count:
        batch = replace(data.batch, num_processes=count)
        size, share = batch.micro_batch_size, batch.micro_batch_size * min(batch.shares)
        norms = any(isinstance(m, _BatchNorm) for m in started.model.modules())
        epoch = started.trial.seconds_per_image * len(data.train) / (count * batch.used)
        steps = counted(data.sampler.steps_per_epoch, "step")
        rows += [
            ("as", f"{counted(count, 'process')}, whose shards were computed here in turn"),
            ("batch", batch.in_words()),
            ("batch norm", f"sees {counted(size, 'image')} at a time" if norms else "none"),
            ("an epoch", f"{steps}; an estimate: {duration(epoch)}, if each of {count} devices is "
             "as fast in forward and backward as this one, and waits for nothing"),
        ]  # fmt: skip
        flags = without(list(plan.settings.argv), "--as", "--dry-run")
        node = next(n for n in (8, 4, 2, 1) if count % n == 0)
        several = count > node
        typed = ("--nodes", count // node, "--gpus", node, "--", *flags)
        commands.append(("launch", pasted("launch/submit.py", *typed)))
    screen.end_panel("dry run: all is well", rows, good=True, commands=commands)
    for text in own_disks(plan.config) if several else ():
        screen.warn(text)
    if share <= FEW:
        screen.warn(
            f"{counted(share, 'image')} a step are left for a process: no GPU is busy with so few; "
            "take a larger --batch-size (and --lr), or fewer processes"
        )
    return FINISHED


def write_summary(
    folder: Path, plan: Plan, task: Task, data: Data, schedule: Schedule, progress: Progress,
    status: str, reason: str, life: int, skipped_updates: int, spent: dict[str, float],
    left_out: int = 0,
) -> None:  # fmt: skip
    """summary.json and confusion.json. Raises OSError.

    left_out: images that are in the data, and count for nothing.
    """
    best, last = progress.best_metrics, progress.last
    summary = {
        "status": status, "reason": reason, "dataset": plan.config.dataset,
        "model": plan.config.model, "step": progress.step,
        "epoch": schedule.seen(progress.step), "seconds": progress.seconds,
        "best_chosen_on": "validation" if data.chosen_on == "val" else "test",
        "best/epoch": progress.best_epoch, "best/step": progress.best_step,
        "life": life, "skipped_images": len(data.source.skipped) + left_out,
        "skipped_updates": skipped_updates,
        "goodput": {cause: round(seconds, 3) for cause, seconds in spent.items()},
    }  # fmt: skip
    for prefix, found in (("test", last), ("best/test", best)):
        summary |= {f"{prefix}/{m.key}": found[m.key] for m in task.metrics if m.key in found}
    summary["test/images"] = last.get("images")
    if "calibration" in best:
        summary["calibration"] = best["calibration"]
    if "by_class" in best:
        declared = [asdict(metric) for metric in task.class_metrics]
        summary["by_class"] = {"metrics": declared, "values": best["by_class"]}
    write_json(folder / "summary.json", summary)
    if "confusion" in best:  # a file of its own: a thousand classes are a million numbers
        about = {"split": "test", "step": progress.best_step, "epoch": progress.best_epoch}
        matrix = json.dumps({**about, "matrix": best["confusion"]}, separators=(",", ":"))
        write_text(folder / "confusion.json", matrix + "\n")


def cannot_decode(damaged: dict[str, str]) -> str:
    """Why a run stopped in front of photographs that are damaged: names and reasons."""
    (name, why), *more = damaged.items()
    others = f" (and {len(more)} more)" if more else ""
    return f"cannot decode {printable(name)}: {why}{others}"


def show_ending(
    screen: Report, plan: Plan, folder: Path, page: Path | None, task: Task, data: Data,
    progress: Progress, model: nn.Module, code: int, reason: str, world: World,
) -> None:  # fmt: skip
    """The tables and the panel of the end."""
    best, when = progress.best_metrics, f"at epoch {progress.best_epoch}, the best"
    if "confusion" in best:
        screen.class_table(data.classes, dense(best["confusion"]), when)
    if "by_class" in best:
        screen.class_numbers(data.classes, task.class_metrics, best["by_class"], when)
    if best and task.best.has("best"):
        if not plan.actions.debug and (missed := task.never_found(best, data.classes)):
            screen.warn(missed)
        last = progress.last
        if code == FINISHED and not reason and (far := far_from_claim(plan.config, data, last)):
            screen.warn(far)
    rows = [
        *_scores(task, data, progress),
        *_learned(model),
        *_weights_missing(folder, progress),
        ("time", f"{duration(progress.seconds)}, {counted(progress.step, 'step')}"),
        ("folder", str(folder)),
        *([("page", str(page))] if page is not None else []),
    ]
    title, more, commands = _how_it_ended(folder, data, progress, code, reason, world)
    good = code == FINISHED or (code == STOPPED and world.stop.goes_on_by_itself())
    screen.end_panel(title, [*rows, *more], good, commands)


def _scores(task: Task, data: Data, progress: Progress) -> Rows:
    """What the last and the best weights reached."""
    best, last, metric, rows = progress.best_metrics, progress.last, task.best, []
    if best and metric.has("best"):
        split = "validation part" if data.chosen_on == "val" else "test split"
        images = metric.about(counted(last["images"], "test image"))
        rows.append(("last", f"{metric.show(last[metric.key])} {images}"))
        words = f"{metric.show(best[metric.key])} at epoch {progress.best_epoch}"
        rows.append(("best", f"{words} (best epoch chosen on the {split})"))
        also = [m.named(best[m.key]) for m in task.metrics if m.has("end") and m.key in best]
        if also:
            rows.append(("also", ", ".join(also)))
    elif best:
        rows.append(("test", ", ".join(m.named(last[m.key]) for m in on_line(task))))
    return rows


def _learned(model: nn.Module) -> Rows:
    """The weights themselves where each is one number: the line of the first lesson."""
    state = model.state_dict()  # what get_extra_state answers may be anything
    single = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.numel() == 1}
    if len(single) < len(state):
        return []
    return [(k, f"{v.flatten().tolist()[0]:.4f}") for k, v in single.items()]


def _weights_missing(folder: Path, progress: Progress) -> Rows:
    """Whether model.safetensors is not that of the best epoch."""
    kept = card_of(folder / "model.safetensors").get("step") if progress.best_metrics else None
    if not progress.best_metrics or kept == progress.best_step:
        return []
    what = f"those of step {kept}" if kept else "none"
    lack = f"model.safetensors holds {what}: the best, of step {progress.best_step}, are not on"
    return [("WEIGHTS", f"{lack} the disk")]


def _how_it_ended(
    folder: Path, data: Data, progress: Progress, code: int, reason: str, world: World
) -> tuple[str, Rows, Rows]:
    """The panel's title, further rows of it, and what to type now."""
    rows, commands = [], []
    title = f"finished: {reason}" if reason else "finished"
    if code == STOPPED or reason.startswith(STOP_AFTER):
        title = f"stopped at step {progress.step}: {reason}"
        gpus = world.device.type == "cuda"
        began_at = read_json(folder / "status.json", {}).get("resumed_at")
        typed = go_on(folder, world.num_processes, gpus)
        if world.stop.goes_on_by_itself():
            title = f"saved at step {progress.step}, before the time limit or a preemption"
            typed = f"by itself: job {job()} asks SLURM to requeue it"
        elif world.stop.rest_goes_on(world.num_processes):
            typed = "by itself, on the nodes whose launcher is there; where none is: " + typed
        elif job() and world.stop.reason == SIGNAL:
            typed += f"     unless SLURM requeues job {job()} itself (squeue shows it)"
        elif world.stop.reason == TIME_LIMIT and began_at == progress.step:
            took = time.monotonic() - world.began  # the same command would end here again
            rows.append(("no step", f"the start alone took {duration(took)}: give it more time"))
            typed += f" --max-time {max(1, math.ceil(took / 6))}m"
        if code == STOPPED and world.stop.launcher_is_interrupted():
            words = "a traceback above or below is its own: Ctrl-C ends it, not the saving"
            rows.append(("launcher", words))
        commands.append(("go on", typed))
    elif code == FAILED and world.stop.reason == DAMAGED:
        title = f"saved at step {progress.step}: {reason}"
        typed = go_on(folder, world.num_processes, world.device.type == "cuda")
        commands.append(("go on", f"{typed} --exclude {shlex.quote(str(folder / DAMAGED_LIST))}"))
        rows.append(("or", "--skip-bad-images leaves out all that cannot be read"))
    elif code == FAILED:
        title = f"ended without its last checkpoint: {reason}"
    else:
        if data.classes:
            commands.append(("predict", pasted("predict.py", "PICTURE.png", "--run", folder)))
        commands.append(("repeat", shlex.join(["sh", str(folder / "command.sh")])))
    return title, rows, commands


def show_rates(screen: Report, found: Rates | None, plan: Plan, world: World) -> int:
    """What --find-lr prints: the table, the picture and what to type. The exit status."""
    if found is None:
        screen.show(f"--find-lr: {world.stop.why(world.stop.reason)}; nothing is suggested")
        return STOPPED
    if not world.is_main:
        return FINISHED
    config = plan.config
    path = Path("runs") / f"find-lr-{Path(config.model.replace(':', '-')).name}.png"
    try:
        path.parent.mkdir(exist_ok=True)
        pictures.lr_curve(found.rates, found.losses, found.suggestion, path)
        picture = str(path)
    except OSError as error:
        screen.warn(f"--find-lr: {path} cannot be written ({error}); type it in another folder")
        picture = "none"
    every = max(1, len(found.rates) // 12)
    shown = list(zip(found.rates, found.losses, strict=True))[::every]
    rows = [(f"{rate:.2e}", f"loss {loss:.4f}") for rate, loss in shown]
    rows += [("picture", picture), ("suggested", f"--lr {found.suggestion:.2g}")]
    rows.append(("optimizer", f"{config.optimizer}, batch {config.batch_size}; no run was made"))
    screen.end_panel("learning rate", rows, good=True)
    return FINISHED
