"""The rows of bench.gpu that say right or wrong; on a CPU their code is rehearsed, in small."""

import concurrent.futures
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; for `exact`

import torch
from torch.cuda import nccl

from bench.gpu import REPOSITORY, Found, Place
from bench.gpu_trainer import Ended, Watch, Windows, losses, rows, state, trained
from data.augment import Augment
from data.keyed_random import AUGMENT, uniforms
from data.policy import KINDS

CUDA = torch.cuda.is_available()
TRAIN = str(REPOSITORY / "train.py")
SYNTHETIC = ["--dataset", "synthetic", "--weights", "none", "--no-plots", "--epochs", "1"]
LEARNERS = f"{REPOSITORY / 'bench' / 'learners.py'}:"
SIZES = {  # pixels, batch
    "alexnet": (224, 64), "resnet18": (32, 64), "speednet": (32, 64), "googlenet": (96, 32),
}  # fmt: skip


def small_run(place: Place, model: str, steps: int, name: str = "run") -> list[str]:
    """Flags of a run on synthetic images in a folder of its own, `steps` long."""
    flags = [*SYNTHETIC, "--stop-after", str(steps), "--run-dir", str(place.folder / name)]
    size, batch = SIZES[model]
    if place.small:
        model, size, batch = f"{LEARNERS}Tiny", 16, 8
        flags += ["--limit", "64"]
    return [*flags, "--model", model, "--image-size", str(size), "--batch-size", str(batch)]


def rehearsed(text: str) -> str:
    return text if CUDA else f"{text} (rehearsed)"


def seen(ended: Ended, wanted: int = 0) -> str:
    """Why a run that should have ended otherwise did not; "" where all is well."""
    if ended.status == wanted:
        return ""
    return f"status {ended.status}: {(ended.words.splitlines() or ['no word'])[-1]}"


# --- the card ------------------------------------------------------------------------------------


def card(place: Place) -> Iterator[Found]:
    """What is measured on, and whether this torch has kernels for it."""
    import accelerate
    import torchvision

    facts = {"python": platform.python_version(), "torch": torch.__version__}
    facts |= {"torchvision": torchvision.__version__, "accelerate": accelerate.__version__}
    if not CUDA:
        device = f"{os.cpu_count()} {platform.machine()} cores"
        yield Found("device", rehearsed(device), None, {"device": device, **facts})
        return
    facts |= {"device": torch.cuda.get_device_name(), "CUDA": torch.version.cuda}
    facts |= {"cuDNN": torch.backends.cudnn.version()}
    facts |= {"NCCL": ".".join(map(str, nccl.version()))}
    if shutil.which("nvidia-smi"):
        words = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
        answer = done.stdout.partition("\n")[0].partition(",")
        facts |= {"driver": answer[0].strip(), "memory": answer[2].strip()}
    yield Found("device", f"{facts['device']}, driver {facts.get('driver', '?')}", None, facts)
    major, minor = torch.cuda.get_device_capability()
    known = torch.cuda.get_arch_list()
    # Kernels of one major number run on its later minor ones; compute_ is compiled on the spot.
    fits = any(name in known for name in (f"sm_{major}{m}" for m in range(minor + 1)))
    yield Found("kernels", f"capability {major}.{minor}, this torch has {' '.join(known)}", fits)
    x = torch.randn(256, 256, device="cuda")
    close = torch.allclose((x @ x).cpu(), x.cpu() @ x.cpu(), rtol=1e-2, atol=1e-1)
    yield Found("a product of matrices", "as on the CPU" if close else "wrong", close)


def keyed(place: Place) -> Iterator[Found]:
    """Uniform numbers equal bit for bit, augmented images to rounding."""
    device = "cuda" if CUDA else "cpu"
    samples = torch.arange(50_000)
    here, there = (uniforms(7, 3, at, 8, AUGMENT) for at in (samples, samples.to(device)))
    differ = int((here != there.cpu()).sum())
    yield Found("keyed numbers", rehearsed(f"{differ} of 400,000 differ"), differ == 0)
    images = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8)
    for kind in KINDS:
        augment = Augment(kind, 48, (0.5,) * 3, (0.25,) * 3, seed=1, cutout=8)
        one = augment.train(images, samples[:256], 2)
        other = augment.train(images.to(device), samples[:256].to(device), 2).cpu()
        largest = float((one - other).abs().max())  # TF32 in the matrix products of a resize
        yield Found(kind, rehearsed(f"pixels differ by at most {largest:.1e}"), largest <= 0.02)


# --- repeats and resumes -------------------------------------------------------------------------

EXACT = {  # case -> model, flags
    "alexnet": ("alexnet", []),  # dropout, AdamW
    "resnet18": ("resnet18", []),  # batch norm, SGD
    "fp16": ("resnet18", ["--mixed-precision", "fp16" if CUDA else "bf16"]),
    "bitwise": ("resnet18", ["--bitwise", "--accumulate", "2"]),
    "compile": ("alexnet", ["--compile"]),
}


def exact(place: Place, case: str) -> Iterator[Found]:
    """Under --deterministic two runs, and a run killed and taken up again, leave the same bits."""
    if case == "compile" and not CUDA and not (shutil.which("g++") or shutil.which("clang++")):
        yield Found("compiled", "rehearsed: not here, there is no C++ compiler", None)
        return
    model, flags = EXACT[case]
    steps, every, kill = (4, 2, 3) if place.small else (12, 6, 9)

    def words(name: str) -> list[str]:
        own = ["--deterministic", "--ema", "0.9", "--grad-clip", "1", "--log-every", "1"]
        own += ["--checkpoint-every", str(every), *flags]
        return [*small_run(place, model, steps, name), *own]

    killed = start([sys.executable, TRAIN, *words("killed")], place.folder / "killed.txt",
                   LOCKSTEP_FAULT=f"kill@step={kill}")  # fmt: skip
    with killed:
        for name in ("one", "two"):
            if problem := seen(trained(words(name))):
                killed.kill()
                yield Found("a run", problem, False)
                return
        yield same("repeat", place.folder / "one", place.folder / "two")
        killed.wait()
    if killed.returncode != -signal.SIGKILL:
        last = (place.folder / "killed.txt").read_text().strip().splitlines()[-1:]
        yield Found("a killed run", f"ended with {killed.returncode}: {last}", False)
        return
    if problem := seen(trained(words("killed"))):
        yield Found("resume", problem, False)
        return
    yield same(f"killed at step {kill} and resumed", place.folder / "one", place.folder / "killed")


def same(what: str, one: Path, other: Path) -> Found:
    """Whether two runs wrote the same rows and left the same state, bit for bit."""
    states = state(one), state(other)
    differ = sorted(name for name in states[0] | states[1] if states[0].get(name) !=
                    states[1].get(name))  # fmt: skip
    written = rows(one), rows(other)
    if written[0] != written[1]:
        differ.append("rows of metrics.jsonl")
    if differ:
        return Found(what, f"other bits in {', '.join(differ)}", False)
    count = len(losses(one))
    return Found(what, rehearsed(f"{count} losses and {len(states[0])} files equal"), True)


def start(words: list[str], log: Path, **environment: str) -> subprocess.Popen:
    """A process of its own; what it says goes into `log`."""
    env = {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"} | environment
    with log.open("w") as file:
        return subprocess.Popen(
            words, cwd=log.parent, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )


def no_room(place: Place) -> Iterator[Found]:
    """Images that do not fit the GPU stay in host memory: the same losses, some speed less."""
    asked, speeds = torch.cuda.mem_get_info, {}
    steps, batch = (4, 8) if place.small else (20, SIZES["resnet18"][1])
    for name in ("room", "no room"):
        if name == "no room":
            torch.cuda.mem_get_info = lambda device=None: (0, 2**40)
        windows = Windows(warm=1, steps=steps - 2, count=1, stop=False)
        flags = [*small_run(place, "resnet18", steps, name), "--deterministic", "--log-every", "1"]
        try:
            if problem := seen(trained(flags, windows)):
                yield Found(name, problem, False)
                return
        finally:
            torch.cuda.mem_get_info = asked
        speeds[name] = (steps - 2) * batch / windows.seconds[0]
    yield same("images in host memory", place.folder / "room", place.folder / "no room")
    figure = " against ".join(f"{speeds[name]:.0f}" for name in ("no room", "room"))
    yield Found("images/s, a row each step", rehearsed(figure), None, speeds)


def googlenet(place: Place) -> Iterator[Found]:
    """A model of the table whose auxiliary heads pool to 4x4 trains under --deterministic."""
    problem = seen(trained([*small_run(place, "googlenet", 2), "--deterministic"]))
    yield Found("--deterministic", problem or rehearsed("status 0"), not problem)


# --- waits ---------------------------------------------------------------------------------------

WAIT = "called a synchronizing CUDA operation"  # torch's words


class Waits(Watch):
    """Counts where torch says that the host waits for the device, by phase of the run."""

    def __init__(self, caught: list[warnings.WarningMessage]):
        self.caught, self.inside, self.counted = caught, [], 0
        self.phases: dict[str, list[int]] = {}

    def settle(self) -> None:
        """Give what came since the last look to the phase we are in."""
        new = sum(WAIT in str(warning.message) for warning in self.caught[self.counted :])
        self.counted = len(self.caught)
        if self.inside:
            self.phases[self.inside[-1]][-1] += new

    def enter(self, name: str) -> None:
        self.settle()
        self.inside.append(name)
        self.phases.setdefault(name, []).append(0)

    def step(self, number: int) -> None:
        self.settle()
        if self.inside[-1:] == ["step"]:
            self.inside.pop()
        self.enter("step")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if name in ("augment", "optimizer"):  # parts of the step
            yield
            return
        self.enter(name)
        if name == "row" and not CUDA:
            warnings.warn(WAIT, stacklevel=2)  # a CPU never waits: only the counting is rehearsed
        yield
        self.settle()
        self.inside.pop()


def waits(place: Place, model: str) -> Iterator[Found]:
    """How often the host waits for the device: in a step, a row, an evaluation, a save."""
    steps = 6 if place.small else 16
    flags = [*small_run(place, model, steps), "--log-every", str(steps // 2)]
    flags += ["--checkpoint-every", str(steps - 1)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch = Waits(caught)
        if CUDA:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            ended = trained(flags, watch)
        finally:
            if CUDA:
                torch.cuda.set_sync_debug_mode("default")
    if problem := seen(ended):
        yield Found("a run", problem, False)
        return
    quiet = watch.phases["step"][2:-2]  # the first ones warm up; the last but one asks for the save
    yield Found("a step", rehearsed(f"{max(quiet)} at most, of {len(quiet)} steps"), not any(quiet))
    row = max(watch.phases["row"])
    counted = any(map(any, watch.phases.values()))  # or torch's words are no longer these
    yield Found("a row", rehearsed(str(row)), row <= 2 and counted)
    evaluation, batches = sum(watch.phases["evaluate"]), ended.evaluation_batches
    figure = rehearsed(f"{evaluation} with {batches} batches; 1 is needed, at its end")
    yield Found("an evaluation", figure, evaluation <= 1)
    saves = watch.phases.get("save", [0])
    yield Found("a save", rehearsed(f"{max(saves)}: a copy each"), None, {"saves": saves})


# --- other processes -----------------------------------------------------------------------------

ALL_REDUCE = """
import torch, torch.distributed as dist
device = "cuda" if torch.cuda.is_available() else "cpu"
backend = "nccl" if device == "cuda" else "gloo"
dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
for kind in (torch.float32, torch.int64):
    x = torch.arange(10**6, device=device).to(kind)
    dist.all_reduce(y := x.clone())
    assert torch.equal(x, y)
dist.destroy_process_group()
print("all-reduced over", backend)
"""


@dataclass(frozen=True)
class Child:
    """A process with words, and what must be true of its status and what it said."""

    what: str
    words: list[str]
    holds: Callable[[int, str], bool]


def children(place: Place) -> Iterator[Found]:
    """What can only be seen from outside a process: launchers, refusals, a broken device."""
    flags = [TRAIN, *small_run(place, "resnet18", 2, "cpu")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    cpu_run, foreign = place.folder / "cpu", place.folder / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    broken = [*SYNTHETIC, "--model", f"{LEARNERS}Broken", "--image-size", "32"]

    def on_the_cpu(status: int, text: str) -> bool:
        if status:
            return False
        config = json.loads((cpu_run / "config.json").read_text())["config"]
        facts = json.loads((cpu_run / "environment.json").read_text())
        return config["mixed_precision"] == "no" and facts["devices"].startswith("CPU")

    one_gpu = torch.cuda.device_count() == 1
    asked = [
        Child("accelerate launch --cpu trains on the CPU, precision no",
              [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *flags], on_the_cpu),
        Child("2 processes on 1 GPU are refused",
              [*torchrun, "2", TRAIN, *small_run(place, "resnet18", 2, "two")],
              lambda status, text: status != 0 and "torch sees 1 GPUs" in text if one_gpu
              else status == 0),
        Child("a world of one over NCCL",
              [*torchrun, "1", TRAIN, *small_run(place, "resnet18", 2, "nccl")],
              lambda status, text: status == 0 and "ProcessGroupNCCL" not in text),
        Child("a refusal after the start leaves no noise of NCCL",
              [*torchrun, "1", TRAIN, *small_run(place, "resnet18", 2, "foreign")],
              lambda status, text: status != 0 and "foreign" in text
              and "destroy_process_group" not in text and "ProcessGroupNCCL" not in text),
        Child("all-reduce of float32 and int64", [sys.executable, "-c", ALL_REDUCE],
              lambda status, text: status == 0 and "all-reduced over" in text),
        Child("a device-side assert is told as the device's",
              [sys.executable, TRAIN, *broken, "--run-dir", str(place.folder / "broken")],
              lambda status, text: "CUDA" in text and "fails on" not in text and status == 1
              if CUDA else status == 2 and "fails on" in text),
    ]  # fmt: skip

    def run(number: int, child: Child) -> Found:
        log = place.folder / f"child-{number}.txt"
        # Not this user's saved answers to Accelerate's questions.
        process = start(child.words, log, HF_HOME=str(place.folder), OMP_NUM_THREADS="1")
        limit = 300 if place.small else 45
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(limit)
        if process.poll() is None:
            process.terminate()  # a launcher takes its processes along
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()
            return Found(child.what, f"still running after {limit} s", False)
        text = log.read_text(errors="replace")
        print(f"--- {child.what}\n{text[-4000:]}", flush=True)
        held = child.holds(process.returncode, text)
        figure = f"status {process.returncode}"
        if not held:
            lines = [line.strip(" │╭╰─╮╯") for line in text.splitlines()]
            lines = [line for line in lines if not re.match("[=-]*$", line)]
            figure += f": {' / '.join(lines[-3:])[-300:]}"
        return Found(child.what, rehearsed(figure), held)

    with concurrent.futures.ThreadPoolExecutor(6 if CUDA else 2) as pool:
        waiting = [pool.submit(run, number, child) for number, child in enumerate(asked)]
        for done in concurrent.futures.as_completed(waiting):
            yield done.result()
