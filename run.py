"""One life of a run: what stands around the loop. Start, resume, record, save, stop, end."""

import contextlib
import hashlib
import itertools
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from config import Settings, TrainConfig, plan_batch, recipe_of, restarted, seconds, to_json
from data.augment import Augment
from data.keyed_random import mix
from data.loaders import EVALUATION_BATCH, build_test_loader, build_train_loader
from data.order import split_validation
from data.sources import ImageSet, Source, choose_dataset, limited, load_source
from distributed import faults
from distributed.accelerator import (
    broadcast,
    build_accelerator,
    code_fingerprint,
    describe,
    end,
    everyones,
    main_decides,
    model_fingerprint,
    refuse_disagreement,
    wait_limit,
)
from distributed.checkpoint import (
    Progress,
    Writer,
    capture,
    copy_state,
    newest_valid,
    read_checkpoint,
    restore,
    save_tensors,
    sweep,
    visible,
)
from distributed.shards import Guard, Shards, seed_dropout
from distributed.stop import SAVE_FAILED, StopVote
from distributed.watch import Watch
from errors import FAILED, FINISHED, STOPPED, USER_ERROR, UserError
from features import cache_features
from models import build_model, lookup
from models.__main__ import table_of_layers
from models.weights import freeze_backbone, imagenet_reach, load_weights
from optim import WeightAverage, lr_at, set_lr
from panels import show_epoch, write_ending
from report import Chrono, Report, duration, quiet_libraries
from run_dir import (
    RunDir,
    describe_environment,
    fresh_name,
    launch_command,
    set_aside,
    write_json,
)
from tasks import build_task
from tracking import build_trackers
from trial import try_model

DROPOUT, WEIGHTS = 101, 102  # streams of `mix`, beside those of data/keyed_random.py
LIVES_WITHOUT_PROGRESS = 3
SKIPS_IN_A_ROW = 10  # updates left out for numbers that are not finite


class Run:
    """Everything one process holds while it trains, and what is done around the loop."""

    def __init__(self, settings: Settings):
        quiet_libraries()
        self.began = time.monotonic()
        self.stop = StopVote().install()
        self.accelerator, settings = build_accelerator(settings)
        accelerator = self.accelerator
        self.is_main = accelerator.is_main_process
        self.report = Report(enabled=self.is_main)
        self.stop.connect(accelerator.num_processes, self.is_main, wait_limit())
        self.watch = Watch(accelerator.process_index, accelerator.num_processes)
        self.folder: RunDir | None = None
        self.writer: Writer | None = None
        self.life = 0
        self.stop_reason = 0
        self.progress = Progress()
        self.trackers, self.left_behind = [], []
        self._row_problem = ""
        self.settings = settings
        self.actions = settings.actions

    @property
    def config(self) -> TrainConfig:
        return self.settings.config

    @property
    def writes_nothing(self) -> bool:
        return self.actions.dry_run or self.actions.find_lr or self.actions.eval_only

    # --- before the loop ------------------------------------------------------------------------

    def open(self) -> None:
        """Decide what depends on disk, network and clock once, and enter the run's folder."""
        decided = main_decides(self.accelerator, self._look_at_the_world)
        self.goes_on = decided["goes_on"]
        self.settings = self.settings.with_layer("recipe", decided["recipe"])
        for origin, values in decided["layers"].items():
            self.settings = self.settings.with_layer(origin, values, before=decided["before"])
        if not self.writes_nothing:
            folder = main_decides(self.accelerator, self._enter_folder)
            self.folder = self.folder or RunDir(Path(folder))
            self.settings = self.settings.with_layer("run folder", {"run_dir": folder})
            self.report.attach(self.folder.folder)
            self.stop.stop_file = self.folder.folder / "STOP"
            self.watch.start(self.folder.folder, limited=not self.actions.debug)
            if self.is_main:
                self.watch.on_beat = self.folder.beat
                self.watch.on_stall = lambda told: self.tell_status(status="failed", reason=told)
        self.life = main_decides(self.accelerator, self._count_life)
        faults.configure(self.accelerator.process_index, self.life)
        faults.hit("start")
        if self.config.max_time:
            self.stop.deadline = self.began + seconds(self.config.max_time)

    def _look_at_the_world(self) -> dict:
        """Main process: which data, which weights; what the user typed always wins."""
        config, layers = self.config, {}
        entry = lookup(config.model)
        asked = config.dataset
        if asked == "auto" and entry.task == "regression":
            asked = "line"
        dataset, told = choose_dataset(asked, config.data_dir)
        if config.dataset == "auto":
            if dataset == "digits":
                self.report.shout("training on digits, not on CIFAR-10", told)
            layers["available"] = {"dataset": dataset}
        weights, why = config.weights, ""
        if weights == "auto":
            weights = "none"
            if config.model == "alexnet" and entry.finetune:
                reached, why = imagenet_reach(config.model)
                weights = "imagenet" if reached else "none"
                if not reached:
                    self.report.warn(f"starting from scratch: {why}")
            layers.setdefault("available", {})["weights"] = weights
        elif weights == "imagenet" and not self._has_weights():
            reached, why = imagenet_reach(config.model)
            if not reached:
                raise UserError(f"--weights imagenet: {why}")
        if dataset == "digits":  # a moved or mirrored digit of 8 pixels is another digit
            layers["data set"] = {"augment": "none"}
        before = next((o for o in ("saved run", "--debug") if o in self.settings.layers), "")
        before = before or next((o for o in self.settings.layers if o.startswith("file")), "flag")
        return {
            "layers": layers,
            "goes_on": self._has_weights(),
            "recipe": recipe_of(config.model, weights),
            "before": before,
        }

    def _has_weights(self) -> bool:
        """Main process: whether the run folder holds what --weights would only begin with."""
        folder = Path(self.config.run_dir or "")
        if self.config.run_dir is None or (self.actions.fresh and not restarted()):
            return False
        return self.actions.eval_only or bool(visible(folder / "checkpoints"))

    def _enter_folder(self) -> str:
        config = self.config
        if config.run_dir is None:
            name = "debug" if self.actions.debug else config.model
            folder = fresh_name(Path("runs"), name, config.dataset)
        else:
            folder = Path(config.run_dir)
            if self.actions.fresh and not restarted():
                aside = set_aside(folder)
                if aside is not None:
                    self.report.show(f"the old run is now {aside}")
        if self.actions.debug and (folder / "config.json").exists():
            raise UserError(
                f"{folder} holds a run, and --debug makes a small one of its own: name another "
                "--run-dir, or none"
            )
        run_dir = RunDir(folder)
        run_dir.open()
        self.folder = run_dir
        (folder / "STOP").unlink(missing_ok=True)
        sweep(run_dir.checkpoints)
        return str(folder)

    def _count_life(self) -> int:
        return int(self.folder.read_status().get("life", -1)) + 1 if self.folder else 0

    def load_data(self) -> Source:
        """The data set, the batch plan, loaders, augmentation."""
        config, accelerator = self.config, self.accelerator
        faults.hit("data")
        source = load_source(
            config.dataset, data_dir=config.data_dir, image_size=config.image_size,
            skip_bad_images=config.skip_bad_images, seed=config.seed,
        )  # fmt: skip
        # Before anything is built from it: another number of classes would die inside DDP.
        refuse_disagreement(accelerator, {"data": source.fingerprint})
        entry = lookup(config.model)
        if entry.task != source.task:
            fits = "--dataset line" if entry.task == "regression" else "an image data set"
            raise UserError(
                f"--model {config.model} is for {entry.task}, the data set {source.name} is for "
                f"{source.task}; give it {fits}"
            )
        train, test = limited(source.train, config.limit), limited(source.test, config.limit)
        if self.actions.dry_run:
            test = limited(test, 2 * EVALUATION_BATCH * accelerator.num_processes)
        self.validation_loader = None
        if config.val_fraction:
            keep, held_out = split_validation(len(train), config.val_fraction, config.seed)
            validation = ImageSet(train.images[held_out], train.labels[held_out])
            train = ImageSet(train.images[keep], train.labels[keep])
            loader = build_test_loader(validation, accelerator.num_processes, accelerator.device)
            self.validation_loader = accelerator.prepare(loader)
        self.plan = plan_batch(self.settings, accelerator.num_processes, len(train))
        self.source, self.num_train, self.num_test = source, len(train), len(test)
        decided = {"batch_size": self.plan.batch_size, "shards": str(self.plan.shards)}
        changed = {k: v for k, v in decided.items() if v != getattr(config, k)}
        self.settings = self.settings.with_layer("batch plan", changed)
        self.train_loader, self.sampler = build_train_loader(
            train, self.plan.batch_size, config.seed, accelerator.device
        )
        self.test_loader = build_test_loader(test, accelerator.num_processes, accelerator.device)
        self.augment = Augment(
            config.augment, config.image_size, source.mean, source.std, config.seed,
            cutout=config.cutout, mixup=config.mixup, cutmix=config.cutmix,
            alternating_flip=config.alternating_flip, no_flip=source.no_flip,
            tta=config.tta,
        )  # fmt: skip
        self.steps_per_epoch = self.sampler.steps_per_epoch
        self.total_steps = config.epochs * self.steps_per_epoch
        self.warmup_steps = round(config.warmup * self.steps_per_epoch)
        self.last_step = min(self.total_steps, config.max_steps or self.total_steps)
        if self.actions.dry_run:
            self.last_step = 1
        self.log_every = config.log_every or max(1, min(50, self.steps_per_epoch // 10))
        every = config.checkpoint_every
        self.save_steps = self.steps_per_epoch if every == "epoch" else 0
        self.save_steps = int(every) if every.isdigit() else self.save_steps
        self.stop.save_every = None if self.save_steps else seconds(every)
        return source

    def build_model(self) -> torch.nn.Module:
        """The model with its starting weights, tried on a few images before anything is written."""
        config, source, device = self.config, self.source, self.accelerator.device
        seed_dropout(mix(config.seed, WEIGHTS), torch.device("cpu"))
        num_classes = max(1, len(source.classes))
        model = build_model(config.model, num_classes=num_classes, image_size=config.image_size)
        self.weights_told = ""
        if config.weights not in ("none", "auto") and not self.goes_on:
            self.weights_told = self._load_weights(model, num_classes)
        if config.freeze == "backbone":
            freeze_backbone(model, config.model)
        self.task = build_task(source.task, num_classes, config.label_smoothing, model)
        self.channels_last = lookup(config.model).channels_last
        if hasattr(model, "start_from_data") and not self.weights_told:
            self._start_from_data(model)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        model = model.to(device, memory_format=layout)
        self.seconds_per_image = try_model(self, model)
        if self.actions.debug:
            torch.autograd.set_detect_anomaly(True)
            layers = table_of_layers(config.model, config.image_size, num_classes)
            self.report.show(layers)
        if config.compile:
            model.compile(dynamic=False)
        self.average = WeightAverage(model, config.ema) if config.ema else None
        return model

    def _load_weights(self, model: torch.nn.Module, num_classes: int) -> str:
        """One process of each node first, which may have to download them, then the others."""
        told, problem = "", None
        for mine in (True, False):
            if self.accelerator.is_local_main_process == mine:
                try:
                    told = load_weights(model, self.config.model, self.config.weights, num_classes)
                except UserError as error:
                    problem = str(error)
            self.accelerator.wait_for_everyone()
        for rank, found in enumerate(everyones(self.accelerator, problem)):
            if found is not None:
                raise UserError(f"rank {rank}: {found}" if rank else found)
        return told

    def _start_from_data(self, model: torch.nn.Module) -> None:
        """Weights that a model takes from the images: made by the main process, sent to all.

        A resumed run overwrites them with those of its checkpoint.
        """
        if self.is_main:
            images = self.train_loader.dataset.images[:2000].cpu()
            model.start_from_data(self.augment.evaluate(images))
        state = broadcast(self.accelerator, model.state_dict() if self.is_main else None)
        model.load_state_dict(state)

    def inputs(self, images: torch.Tensor) -> torch.Tensor:
        """Augmented images on the device, in the memory layout that the model has."""
        images = images.to(self.accelerator.device, non_blocking=True)
        if self.channels_last and images.ndim == 4:  # features have no layout
            images = images.contiguous(memory_format=torch.channels_last)
        return images

    def ready(self, model, optimizer, train_loader, test_loader) -> None:
        """Take what Accelerate prepared; build what needs it."""
        self.model, self.optimizer = model, optimizer
        self.train_loader, self.test_loader = train_loader, test_loader
        self.bare = self.accelerator.unwrap_model(model)
        seed = self.config.seed
        self.shards = Shards(
            self.accelerator, model, self.plan,
            lambda step, shard: mix(seed, DROPOUT, step, shard), self.config.bitwise,
        )  # fmt: skip
        device = self.accelerator.device
        skip, most = self.config.on_nonfinite == "skip", SKIPS_IN_A_ROW
        if self._scaler() is not None:  # fp16 overflows now and then, above all at its start
            skip, most = True, 3 * SKIPS_IN_A_ROW
        self.guard = Guard(device, optimizer.optimizer, skip, most)
        self.shards.undoes = skip
        self.sums = torch.zeros(self.plan.shards, device=device)
        self.parameters = self.shards.parameters
        self.facts = {
            "data": self.source.fingerprint,
            "model": model_fingerprint(self.bare),
            "order": self.sampler.fingerprint(),
            "code": code_fingerprint(Path(self.config.model.partition(".py:")[0] + ".py")),
        }
        settings = hashlib.blake2b(to_json(self.settings).encode(), digest_size=8).hexdigest()
        refuse_disagreement(self.accelerator, {**self.facts, "settings": settings})
        if "LOCKSTEP_RECORD" in os.environ:
            from recorder import attach

            attach(self, os.environ["LOCKSTEP_RECORD"])

    def resume(self) -> None:
        """Go on where the newest whole checkpoint stands, or at step 0."""
        found = None
        if self.actions.eval_only:
            self._load_best()
        if self.folder is not None:
            found = main_decides(
                self.accelerator, lambda: newest_valid(self.folder.checkpoints, self.report.warn)
            )
        if found is not None:
            path, manifest = found
            self._refuse_other_data(manifest["facts"], path)
            files, self.progress = read_checkpoint(path)
            restore(files, self.bare, self.optimizer.optimizer, self._average(), self._scaler())
            if len(self.progress.sums) != self.plan.shards:
                self.progress.summed = 0
            else:  # its own to each process, which adds to them in the order it would have had
                mine = self.shards.mine
                self.sums[mine] = torch.tensor(self.progress.sums[mine], device=self.sums.device)
        if self.folder is not None:
            main_decides(self.accelerator, self._begin_life)
        if not self.actions.eval_only and (told := cache_features(self)):
            self.report.show(told)
        self.stop_reason = self.stop.ask_all()  # a stop may have been asked for while we started
        self.chrono = Chrono()

    def _load_best(self) -> None:
        """For --eval-only: the run's best weights, if a run is named; else those of --weights."""
        path = Path(self.config.run_dir or "") / "model.safetensors"
        if self.config.run_dir is None:
            if not self.weights_told:
                raise UserError(
                    "--eval-only needs what to evaluate: --resume runs/NAME, or --weights FILE"
                )
            return
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError):
            raise UserError(f"--eval-only: {path} is missing or cannot be read") from None
        copy_state(self.bare, tensors, "model")
        self.average = None
        self.weights_told = str(path)

    def _begin_life(self) -> None:
        """Main process: the files that say this run is alive again."""
        self._refuse_crash_loop()
        self.folder.keep_metrics(self.progress.metrics_rows)
        if self.life == 0 or not (self.folder.folder / "config.json").exists():
            gpus = self.accelerator.device.type == "cuda"
            command = launch_command(list(self.settings.argv), self.accelerator.num_processes, gpus)
            facts = describe_environment({"devices": describe(self.accelerator), **self.facts})
            self.folder.write_birth(to_json(self.settings), command, facts)
            self.folder.write_source(self.source)
        else:
            self.folder.write_config(to_json(self.settings))
        self.folder.link_latest()
        self.trackers = build_trackers(
            self.config.track, self.folder.folder, self.folder.folder.name,
            asdict(self.config), self.report.warn,
        )  # fmt: skip
        self.writer = Writer(self.folder.checkpoints, self.config.keep, self._save_told)
        self.folder.begin_life(self.life, self.progress.step)

    def _refuse_other_data(self, facts: dict, path: Path) -> None:
        if facts.get("data") != self.facts["data"] and "dataset" not in self.actions.allow_change:
            raise UserError(
                f"the data are not those this run was trained on (fingerprint {facts.get('data')}, "
                f"now {self.facts['data']}); bring the old data back, start a new run, or add "
                "--allow-change dataset"
            )
        if facts.get("order", self.facts["order"]) != self.facts["order"]:
            self.report.warn("the order of the samples is no longer that of this checkpoint")
        if facts.get("code") != self.facts["code"]:
            self.report.warn(
                "the code changed since this checkpoint: the run goes on, but no longer bit for bit"
            )

    def _refuse_crash_loop(self) -> None:
        """Automatic restarts end where lives die without getting further."""
        old, step = self.folder.read_status(), self.progress.step
        died = old.get("status") in ("running", "failed")
        deaths = int(old.get("deaths", 0)) + 1 if died and old.get("resumed_at") == step else 0
        self.folder.status(
            deaths=deaths, failed_at=old.get("failed_at") if died else None, failed_twice=False
        )
        if not restarted():
            return
        told = ""
        if deaths >= LIVES_WITHOUT_PROGRESS:
            told = f"{deaths} lives in a row died after step {step} without a new checkpoint"
        if old.get("failed_twice"):
            told = f"step {old['failed_at']} failed twice in a row: {old['reason']}"
        if told:
            self.folder.status(status="failed", reason=told)
            raise UserError(f"{told}; see {self.folder.folder / 'crash'} and start it by hand")

    def _average(self):
        return self.average.model if self.average else None

    def _scaler(self):
        return self.accelerator.scaler if self.config.mixed_precision == "fp16" else None

    # --- what the loop asks ---------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch (from 0) that the next step belongs to."""
        return self.progress.step // self.steps_per_epoch

    def is_over(self) -> bool:
        done = self.progress.step >= self.last_step and not self.evaluation_is_due()
        return bool(self.stop_reason) or done

    def evaluation_is_due(self) -> bool:
        step, per_epoch = self.progress.step, self.steps_per_epoch
        at_end = step >= self.last_step
        due = step % (per_epoch * self.config.eval_every) == 0 or at_end
        return due and step > self.progress.evaluated

    def batches(self):
        """The rest of this epoch's global batches, each process's slice of them."""
        first = self.progress.step % self.steps_per_epoch
        self.sampler.start(self.epoch, first)
        self.report.open_bar(
            self.steps_per_epoch, first, f"epoch {self.epoch + 1}/{self.config.epochs}"
        )
        self.watch.at("data", self.progress.step)
        self.stop.new_phase()
        for batch in self.train_loader:
            faults.hit("step", self.progress.step)
            self.watch.at("step", self.progress.step)
            yield batch
            self.watch.at("data", self.progress.step)
            if self.stop_reason or self.progress.step >= self.last_step:
                break

    def endless_batches(self):
        """Epoch after epoch, for trials that are no run."""
        for epoch in itertools.count():
            self.sampler.start(epoch)
            yield from self.train_loader

    def lr(self, step: int | None = None) -> float:
        """The learning rate of a step; without one, of the next."""
        return lr_at(
            self.progress.step if step is None else step, peak=self.config.lr,
            schedule=self.config.schedule, total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
        )  # fmt: skip

    def set_lr(self) -> None:
        set_lr(self.optimizer.optimizer, self.lr())

    def mix(self, images, labels, indices):
        """Mixup and cutmix, within one shard; labels become soft (n, classes) where they are on."""
        if not (self.augment.mixup or self.augment.cutmix):
            return images, labels
        return self.augment.mix(images, labels, indices, self.epoch, self.task.num_classes)

    def gradients_are_bad(self) -> torch.Tensor | None:
        """Clip; tell the optimizer to leave the weights alone if a number is not finite."""
        if faults.hit("backward", self.progress.step):
            self.parameters[0].grad.fill_(math.nan)
        if self._scaler() is not None:
            self.accelerator.unscale_gradients()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.grad_clip, norm)
        found = self.guard.check(norm, self.sums.sum(), self.progress.step)
        return self.shards.undo_buffers(found)

    def step_done(self) -> None:
        """After each update: count it, write a row, save, vote."""
        progress = self.progress
        progress.step += 1
        progress.summed += 1
        self.chrono.step()
        if self.config.compile and self.chrono.steps == 2:
            self.report.show(f"compiling took {duration(self.chrono.leave_out_compiling())}")
        at_end = progress.step % self.steps_per_epoch == 0 or progress.step == self.last_step
        if progress.step % self.log_every == 0 or at_end:
            self._write_row()
        elif self.accelerator.device.type == "cpu":
            self._stop_if_numbers_are_bad()
        self.report.advance((progress.step - 1) % self.steps_per_epoch + 1)
        self.beat()
        due = self.stop.save_agreed or (self.save_steps and progress.step % self.save_steps == 0)
        if due and not self.stop_reason:
            self.save()

    def beat(self) -> bool:
        """One vote beat, in training and in evaluation; whether to leave."""
        self.watch.at(self.watch.phase, self.progress.step)
        self.stop_reason = self.stop_reason or self.stop.poll()
        return bool(self.stop_reason)

    def _write_row(self) -> None:
        sums = self._stop_if_numbers_are_bad(self.window())
        images = self.plan.batch_size * self.progress.summed
        self.sums.zero_()
        self.progress.summed = 0
        row = {
            "step": self.progress.step,
            "epoch": (self.progress.step - 1) // self.steps_per_epoch + 1,
            "train/loss": math.fsum(sums) / images,
            "lr": self.lr(self.progress.step - 1),
            "speed/images_per_second": self.chrono.speed(self.plan.batch_size),
        }  # fmt: skip
        self.record(row)
        if self.is_main:
            left = self.chrono.left(self.last_step - self.progress.step)
            self.report.train_line(row, self.last_step, left)

    def window(self) -> list[float]:
        """Each shard's loss sum since the last row: the same list on every number of processes."""
        sums = self.sums
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.clone(), reduction="sum")
        return sums.tolist()

    def record(self, row: dict) -> None:
        """A row for metrics.jsonl, the truth, and for the trackers, its copies."""
        self.progress.metrics_rows += 1
        if self.is_main and self.folder is not None:
            problem = self.folder.append_metrics(row)
            if problem and not self._row_problem:
                self.report.warn(
                    f"metrics.jsonl cannot be written ({problem}); rows wait in memory"
                )
            self._row_problem = problem
            self.tell_status(step=self.progress.step)
            for tracker in self.trackers:
                tracker.log(row)

    def tell_status(self, **values) -> None:
        """Into status.json, which is worth no crash where the disk is full."""
        if self.is_main and self.folder is not None:
            with contextlib.suppress(OSError):
                self.folder.status(**values)

    def _stop_if_numbers_are_bad(self, passed=None):
        report = self.guard.report()
        if not self.guard.must_stop(report):
            return passed
        step = report["bad_step"]
        everyone = self.accelerator.gather(
            torch.tensor([report["bad_loss"]], device=self.accelerator.device)
        ).tolist()
        ranks = [rank for rank, bad in enumerate(everyone) if bad >= 0]
        self.sampler.start(step // self.steps_per_epoch, step % self.steps_per_epoch)
        indices = next(iter(self.sampler)).tolist()
        where = f"in the loss on rank {ranks}" if ranks else "in the gradient"
        if self.is_main and self.folder is not None:
            found = {"step": step, "ranks": ranks, "indices": indices}
            (self.folder.folder / "crash").mkdir(exist_ok=True)
            write_json(self.folder.folder / "crash" / "nonfinite.json", found)
        raise NumbersGoneBad(
            f"{self.shards.bad_number} appeared {where} at step {step} "
            f"(learning rate {self.lr(step):.3g}, samples {indices[:8]}...); the weights before it "
            "are kept. Try a lower --lr, --grad-clip 1, or --mixed-precision bf16 instead of fp16"
        )

    def evaluated_model(self) -> torch.nn.Module:
        """What is evaluated and kept: the averaged weights if there are any, else the model's."""
        self.shards.broadcast_buffers()
        if self.average is None:
            return self.bare
        self.average.copy_buffers(self.bare)
        return self.average.model

    def evaluation_loaders(self) -> list:
        """(split, loader): the validation part, if there is one, and the test split."""
        self.watch.at("evaluate", self.progress.step)
        self.stop.new_phase()
        self._evaluation_began = time.monotonic()
        loaders = [("test", self.test_loader)]
        if self.validation_loader is not None:
            loaders.insert(0, ("val", self.validation_loader))
        return loaders

    def keep(self, results: dict[str, dict] | None) -> None:
        """Record an evaluation, remember the best, save the best weights; None: it was left."""
        if results is None:
            return
        self.chrono.pause(time.monotonic() - self._evaluation_began)
        progress, task = self.progress, self.task
        progress.evaluated = progress.step
        progress.last = results["test"]
        epoch = progress.step / self.steps_per_epoch
        epoch = int(epoch) if epoch.is_integer() else round(epoch, 3)
        row = {"step": progress.step, "epoch": epoch}
        for split, metrics in results.items():
            row |= {f"{split}/{k}": v for k, v in metrics.items() if isinstance(v, float)}
        chosen = results.get("val", results["test"])[task.best_is]
        better = task.better(chosen, progress.best)
        if better:
            progress.best, progress.best_epoch = chosen, epoch
            progress.best_step, progress.best_metrics = progress.step, results["test"]
        self.record(row)
        show_epoch(self, row, epoch, better)
        if self.is_main and self.folder is not None:
            if better:
                self.save_weights("model.safetensors")
            self.tell_status(step=progress.step, best=progress.best)

    def save_weights(self, name: str) -> None:
        """The evaluated weights with all that prediction needs, readable without this program."""
        model = self.average.model if self.average else self.bare
        tensors = {  # copies: safetensors refuses a layer that the model holds under two names
            k: v.detach().to("cpu", copy=True).contiguous() for k, v in model.state_dict().items()
        }
        told = {
            "model": self.config.model, "image_size": self.config.image_size,
            "classes": self.source.classes, "mean": self.source.mean, "std": self.source.std,
            "dataset": self.config.dataset, "step": self.progress.step,
        }  # fmt: skip
        metadata = {"lockstep": json.dumps(told)}  # one key: safetensors keeps no order of several
        try:
            save_tensors(self.folder.folder / name, tensors, metadata)
        except Exception as error:
            self.report.warn(f"{name} could not be written ({error}); training goes on")

    # --- saving and ending ----------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint of this step: a copy to host memory now, the disk in the background."""
        began = time.monotonic()
        self._stop_if_numbers_are_bad()  # after a bad one, the steps are no longer the weights'
        self.watch.at("save", self.progress.step)
        self.shards.broadcast_buffers()
        self.progress.sums = self.window()
        if self.average is not None:
            self.average.copy_buffers(self.bare)
        if self.writer is not None:
            self.writer.wait()
            self.progress.seconds += time.monotonic() - self.began
            self.began = time.monotonic()
            files = capture(self.bare, self.optimizer.optimizer, self._average(), self._scaler())
            self.writer.start(files, self.progress, self.facts)
        self.stop.saved()
        self.saved_step = (self.progress.step, self.progress.evaluated)
        self.chrono.pause(time.monotonic() - began)

    def _save_told(self, told: str) -> None:
        """From the writer's thread: a failed save is on the screen and in the status at once."""
        failed = self.writer.error
        if failed:
            self.report.warn(failed)
        self.tell_status(last_save_error=failed)

    def finish(self) -> int:
        """The last save, the final report, status and summary; returns the exit status."""
        self.watch.at("end", self.progress.step)
        self.report.close_bar()
        if self.folder is None:
            rows = [("tried", "one step and two evaluation batches; nothing was written")]
            epoch = self.seconds_per_image * self.num_train / self.plan.num_processes
            rows.append(("epoch", f"about {duration(epoch)} of training"))
            self.report.end_panel("dry run: all is well", rows, good=True)
            end(self.accelerator)
            return FINISHED
        if getattr(self, "saved_step", None) != (self.progress.step, self.progress.evaluated):
            self.save()
        failed = main_decides(self.accelerator, self._failed_save)
        if failed:  # once more: the disk may have room again
            self.save()
            failed = main_decides(self.accelerator, self._failed_save)
        code = STOPPED if self.stop_reason else FINISHED
        if failed:
            self.stop_reason, code = SAVE_FAILED, FAILED
        if self.is_main:
            write_ending(self, code, failed)
        end(self.accelerator)
        self.watch.stop()
        self.report.close()
        if code == STOPPED and restarts_left():
            return FINISHED  # an agent would count any other status as a failure, and restart
        return code

    def _failed_save(self) -> str:
        """Main process: why the save under way failed; "" where it did not."""
        self.writer.wait()
        return self.writer.error

    def failed(self, error: BaseException) -> str:
        """Tell what went wrong: into crash/, status.json and the returned last words."""
        self.report.close_bar()
        told = str(error) if isinstance(error, NumbersGoneBad) else self.watch.report(error)
        if self.writer is not None:
            self.writer.wait()
        if self.is_main and self.folder is not None:
            at = self.progress.step
            again = self.folder.read_status().get("failed_at") == at
            reason = told.splitlines()[0]
            self.tell_status(status="failed", reason=reason, failed_at=at, failed_twice=again)
        return told


class NumbersGoneBad(RuntimeError):
    """A loss or gradient that is not finite; every process raises it at the same step."""


def restarts_left() -> bool:
    """Whether an elastic agent stands above us that would restart a process with status 75."""
    most = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) < most


def guarded(main, settings: Settings) -> int:
    """Run main(run); every ending is a sentence, told once, and an exit status."""
    run = None
    try:
        run = Run(settings)
        status = main(run)
        if run.left_behind:  # the interpreter's end would wait for what hangs
            sys.stdout.flush()
            os._exit(status)
        return status
    except UserError as error:
        if run is None or run.is_main:
            if run is None and os.environ.get("RANK", "0") != "0":
                return USER_ERROR
            print(error, file=sys.stderr, flush=True)
            if run is not None and run.folder is not None:
                run.watch.stop()
                run.report.close()  # Windows removes no open file
                run.folder.abandon()
        else:
            run.watch.leave(error)
        return USER_ERROR
    except Exception as error:
        if settings.actions.debug:
            from report import show_tracebacks

            show_tracebacks()
            raise
        told = run.failed(error) if run is not None else f"{type(error).__name__}: {error}"
        tell_agent(error)
        if not isinstance(error, NumbersGoneBad) or run.is_main:
            print(f"\n{told}", file=sys.stderr, flush=True)
        # Not through the interpreter's end: a process group whose peer is gone would wait there.
        sys.stdout.flush()
        os._exit(FAILED)


def tell_agent(error: BaseException) -> None:
    """Leave the error where torchrun looks for it, so that its report names the right process."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)
