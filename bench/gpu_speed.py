"""The rows of bench.gpu that say how fast; on a CPU their code is rehearsed, in small."""

import argparse
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from statistics import fmean, median

import torch

from bench.checkpoint import measure
from bench.gpu import Found, Place
from bench.gpu_checks import CUDA, LEARNERS, rehearsed, seen
from bench.gpu_trainer import Windows, losses, summary, trained

CASES = {  # model, image size, batch size
    "resnet18": ("resnet18", 32, 128),
    "resnet18 512": ("resnet18", 32, 512),
    "speednet": ("speednet", 32, 2000),
    "alexnet": ("alexnet", 224, 256),
    "my_cnn": ("my_cnn", 224, 256),
}
SHARE = 0.95  # of the compute limit
MORE_IDLE = 0.05  # of a step's time, that the GPU may stand still beyond what it does at the limit
TAGGED = re.compile("^(Optimizer|ProfilerStep|## )")  # spans on the device's line, not kernels


def images() -> str:
    return "cifar10" if os.environ.get("CIFAR10_DIR") else "synthetic"


def flags_of(place: Place, case: str, name: str, *more: str) -> list[str]:
    """A run of the case that goes on until enough is seen."""
    model, size, batch = CASES[case]
    if place.small:
        model, size, batch = f"{LEARNERS}Tiny", 16, 8
    if images() == "synthetic":
        batch = min(batch, 1024)  # there are 2,048: a step or two an epoch
    flags = ["--model", model, "--dataset", images(), "--weights", "none", "--no-plots"]
    flags += ["--image-size", str(size), "--batch-size", str(batch), "--log-every", "50"]
    flags += ["--epochs", "100000", "--eval-every", "100000", "--checkpoint-every", "100000"]
    flags += ["--limit", "64"] if place.small else []
    return [*flags, "--run-dir", str(place.folder / name), *more]


def batch_of(flags: list[str]) -> int:
    return int(flags[flags.index("--batch-size") + 1])


def windows(place: Place, stop: bool = True) -> Windows:
    return Windows(*lengths(place), stop)


def lengths(place: Place) -> tuple[int, int, int]:
    """Steps that warm up, steps a window, windows: the host of a GPU can be a noisy machine."""
    return (1, 2, 2) if place.small else (10, 20, 6)


def speeds(seen: Windows, flags: list[str]) -> list[float]:
    return [seen.steps * batch_of(flags) / seconds for seconds in seen.seconds]


def data(place: Place) -> Iterator[Found]:
    """The images of the rows below, read without the package `datasets`, and decoded once."""
    from data.image_set import in_memory
    from data.sources import load_source

    began = time.perf_counter()
    source = load_source(images())
    took = time.perf_counter() - began
    parts = (in_memory(source.train), in_memory(source.test))
    count, size = sum(map(len, parts)), sum(part.images.numel() for part in parts) / 2**20
    found = f"{count:,} images, {size:.0f} MB, in {took:.1f} s, fingerprint {source.fingerprint}"
    yield Found(images(), found, None, {"seconds": took, "fingerprint": source.fingerprint})
    if images() == "cifar10":
        yield Found("without the package datasets", "", "datasets" not in sys.modules)


class Profiled(Windows):
    """Windows, and after them one more under torch.profiler: what the device did in it."""

    launches = 0.0  # kernels, copies and fills a step
    busy = 0.0  # seconds of a step in which the device was at work

    def complete(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        kind = ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU
        self.profiler = profile(activities=[kind])
        self.profiler.start()

    def step(self, number: int) -> None:
        super().step(number)
        if number == self.warm + (self.count + 1) * self.steps:
            if CUDA:
                torch.cuda.synchronize()
            self.profiler.stop()
            self.read()
            super().complete()

    def read(self) -> None:
        device = torch.autograd.DeviceType.CUDA if CUDA else torch.autograd.DeviceType.CPU
        spans = sorted(
            (event.time_range.start, event.time_range.end)
            for event in self.profiler.events() or []
            if event.device_type == device
            and not (getattr(event, "is_user_annotation", False) or TAGGED.match(event.name))
        )
        covered, end = 0.0, 0.0  # microseconds, of streams that overlap once
        for start, stop in spans:
            covered += max(0.0, stop - max(start, end))
            end = max(end, stop)
        self.launches, self.busy = len(spans) / self.steps, covered / 1e6 / self.steps

    @property
    def step_seconds(self) -> float:
        return median(self.seconds) / self.steps

    @property
    def idle(self) -> float:
        """The share of a step in which the device stands still."""
        return max(0.0, 1 - self.busy / self.step_seconds)


def speed(place: Place, case: str) -> Iterator[Found]:
    """The ordinary trainer against its compute limit; how much the GPU idles, what it launches."""
    ours, limit = Profiled(*lengths(place)), Profiled(*lengths(place))
    flags = flags_of(place, case, "ours")
    if problem := seen(trained(flags, ours)):
        yield Found("a run", problem, False)
        return
    fast, step = median(speeds(ours, flags)), 1e3 * ours.step_seconds
    host = {name: round(ms, 2) for name, ms in ours.host.items()}
    numbers = {"images_per_second": speeds(ours, flags), "step_ms": step, "host_ms": host}
    numbers |= {"launches": ours.launches, "busy_ms": 1e3 * ours.busy, "peak_mb": ours.peak / 2**20}
    figure = f"{fast:.0f} images/s, {step:.2f} ms a step, batch {batch_of(flags)}, {images()}"
    yield Found("trainer", rehearsed(figure), None, numbers)
    figure = ", ".join(f"{name} {ms} ms" for name, ms in host.items())
    yield Found("host time of a step", rehearsed(figure), None)
    if problem := seen(trained(flags_of(place, case, "limit"), limit, bare=True)):
        yield Found("the limit", problem, False)
        return
    bound = median(speeds(limit, flags))
    figure = rehearsed(f"{fast / bound:.3f} of {bound:.0f} images/s")
    yield Found("trainer / limit", figure, fast / bound >= SHARE if CUDA else None,
                {"limit": speeds(limit, flags)})  # fmt: skip
    figure = f"{100 * ours.idle:.1f} % idle, {ours.launches:.0f} launches a step"
    figure += f"; the limit {100 * limit.idle:.1f} %, {limit.launches:.0f}"
    waits_no_more = ours.idle <= limit.idle + MORE_IDLE if CUDA else None
    if not (ours.launches and limit.launches):
        figure, waits_no_more = "torch.profiler saw nothing of the device", False
    yield Found("device", rehearsed(figure), waits_no_more)
    peaks = [peak / 2**20 for peak in (ours.peak, limit.peak)]
    figure = rehearsed(f"{peaks[0]:.0f} MB, the limit {peaks[1]:.0f} MB")
    yield Found("peak memory", figure, peaks[0] <= 1.1 * peaks[1] if CUDA else None)


def fp16(place: Place, model: str) -> Iterator[Found]:
    """Fifty steps with a scaler: the loss falls, few updates are skipped; its speed."""
    found = {}
    for kind in ("fp16", "bf16"):
        seen_windows = Windows(1, 1, 1, False) if place.small else Windows(9, 20, 2, False)
        steps = 4 if place.small else 50
        name = "no" if kind == "fp16" and not CUDA else kind  # a CPU has no fp16
        flags = flags_of(place, model, kind, "--mixed-precision", name)
        flags += ["--stop-after", str(steps), "--log-every", str(max(1, steps // 10))]
        ended = trained(flags, seen_windows)
        if problem := seen(ended):
            yield Found(kind, problem, False)
            return
        values = losses(place.folder / kind)
        falls = values[-1] < values[0]
        figure = f"loss {values[0]:.3f} to {values[-1]:.3f} in {steps} steps"
        found[kind] = median(speeds(seen_windows, flags))
        if kind == "fp16":
            figure += f", {ended.skipped} updates skipped"
        few = kind == "bf16" or ended.skipped <= 5
        yield Found(kind, rehearsed(figure), falls and few if CUDA else None)
    figure = f"{found['fp16']:.0f} against {found['bf16']:.0f}"
    yield Found("images/s, fp16 against bf16", rehearsed(figure), None, found)


def compiled(place: Place) -> Iterator[Found]:
    """resnet18 with --compile: seconds, graphs, breaks, speed against eager."""
    from torch._dynamo.utils import counters

    if not CUDA and not (shutil.which("g++") or shutil.which("clang++")):
        yield Found("compiled", "rehearsed: not here, there is no C++ compiler", None)
        return
    case = "resnet18"
    counters.clear()
    watch = windows(place, stop=False)
    flags = flags_of(place, case, "compiled")
    steps = watch.warm + watch.count * watch.steps + 1
    ended = trained([*flags, "--compile", "--stop-after", str(steps)], watch)  # an evaluation too
    if problem := seen(ended):
        yield Found("a run", problem, False)
        return
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    yield Found("compiling", rehearsed(f"{watch.first:.1f} s for the first two steps"), None)
    yield Found("graphs", f"{graphs} graphs, {breaks} breaks", graphs == 2 and breaks == 0)
    eager = windows(place)
    if problem := seen(trained(flags_of(place, case, "eager"), eager)):
        yield Found("eager", problem, False)
        return
    fast, slow = median(speeds(watch, flags)), median(speeds(eager, flags))
    figure = rehearsed(f"{fast:.0f} against {slow:.0f}: {fast / slow:.2f} times")
    yield Found("images/s, compiled against eager", figure, None, {"ratio": fast / slow})


def checkpoint(place: Place) -> Iterator[Found]:
    """What a save of 61 million parameters with AdamW costs."""
    chosen = {"model": "alexnet", "image_size": 224, "batch_size": 256, "rounds": 3}
    if place.small:
        chosen |= {"model": "my_cnn", "image_size": 32, "batch_size": 4, "rounds": 1}
    results = measure(argparse.Namespace(**chosen, every=300.0, folder=str(place.folder)))
    stall, write = results["stall"], results["write"]
    figure = (
        f"{stall['median']:.2f} s, at most {stall['high']:.2f}, of {results['megabytes']:.0f} MB"
    )
    yield Found("a step waits", rehearsed(figure), stall["high"] < 1 if CUDA else None, results)
    yield Found("written beside the steps", rehearsed(f"{write['median']:.2f} s"), None)


# Of speednet with the votes of --tta 2 (bench/README.md): canonical images 0.94, a JPEG copy 0.908.
LEAST_ACCURACY = 0.905
SEEDS = (("bf16", 0), ("no", 0), ("bf16", 1), ("bf16", 2))


def seeds(place: Place) -> Iterator[Found]:
    """Seconds to an accuracy: speednet's recipe, as many seeds as there is time for."""
    found: dict[str, list[float]] = {"bf16": [], "no": []}
    slowest = 0.0
    for precision, seed in SEEDS[: 2 if place.small else None]:
        if time.monotonic() + 1.3 * slowest > place.until:
            yield Found(f"{precision}, seed {seed}", "no time left", None)
            continue
        folder, began = place.folder / f"{precision}-{seed}", time.monotonic()
        model = f"{LEARNERS}Tiny" if place.small else "speednet"
        flags = ["--model", model, "--dataset", images(), "--no-plots", "--tta", "2"]
        flags += ["--eval-every", "1000", "--seed", str(seed), "--run-dir", str(folder)]
        flags += ["--mixed-precision", precision, "--checkpoint-every", "1000000"]
        if place.small:
            flags += ["--limit", "64", "--batch-size", "32", "--epochs", "1"]
        if problem := seen(trained(flags)):
            yield Found(f"{precision}, seed {seed}", problem, False)
            return
        slowest = max(slowest, time.monotonic() - began)
        ended = summary(folder)
        found[precision].append(ended["test/accuracy"])
        figure = f"{100 * ended['test/accuracy']:.2f} % in {ended['seconds']:.1f} s"
        yield Found(f"{precision}, seed {seed}", rehearsed(figure), None, ended)
    judged = CUDA and images() == "cifar10"
    mean = fmean(found["bf16"])
    figure = f"{100 * mean:.2f} % of {len(found['bf16'])} seeds (canonical images: 93.8 % at least)"
    yield Found("bf16", rehearsed(figure), mean >= LEAST_ACCURACY if judged else None)
    if found["no"]:
        apart = 100 * (mean - found["no"][0])
        figure = rehearsed(f"{apart:+.2f} points")
        yield Found("bf16 - fp32", figure, abs(apart) <= 0.3 if judged else None)
