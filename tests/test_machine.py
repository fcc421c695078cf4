"""What a GPU machine decides, refuses and tells; torch.cuda is played, so no GPU is needed."""

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from launches import CLEAN, REPOSITORY, SMALL, Command, finish, start, train
from refusals import refused
from torch import nn
from torch.nn import functional

import predict
from config import Settings, parse
from data.loaders import Resident
from distributed import accelerator, generators, watch
from distributed.accelerator import (
    choose_precision,
    describe_gpu,
    look_at_the_machine,
    refuse_unknown_gpu,
    unseen_gpu,
)
from distributed.watch import Watch, device_failed, out_of_memory
from report import panels
from training import trial
from training.plan import Plan

CLASSIFIER = ["--model", "resnet18", "--dataset", "digits"]
LINE = ["--model", "linear_regression", "--dataset", "line"]
BUILDS = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.fixture
def gpu(monkeypatch):
    """One H100, as torch would describe it; what look_at_the_machine switches is put back."""

    def play(capability=(9, 0), builds=BUILDS):
        for name, value in {
            "is_available": True, "device_count": 1, "is_bf16_supported": True,
            "get_device_capability": capability, "get_arch_list": builds,
            "get_device_name": "NVIDIA H100",
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)

    for name in ("ACCELERATE_USE_CPU", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")  # so that both are put back, whatever sets them
        monkeypatch.delenv(name)
    benchmark, products = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    play()
    yield play
    torch.backends.cudnn.benchmark = benchmark
    torch.set_float32_matmul_precision(products)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def precision(words) -> str:
    return look_at_the_machine(parse(words))[0]["mixed_precision"]


def test_bf16_is_for_classification_on_a_gpu_and_not_for_regression(gpu):
    assert precision(CLASSIFIER) == "bf16"
    assert precision(LINE) == "no"
    assert choose_precision("bf16", False, classifies=False)[0] == "bf16"  # asked for


def test_a_saved_run_in_bf16_that_nobody_asked_for_is_told_where_the_device_has_none(monkeypatch):
    settings = Settings({"saved run": {"mixed_precision": "bf16", "model": "resnet18"}})
    source, sampler = SimpleNamespace(skipped=[], notes=()), SimpleNamespace(balance=None)
    data = SimpleNamespace(source=source, sampler=sampler, cut_off=list)
    started = SimpleNamespace(trial=trial.Trial(0.0))

    def warned(device: str, **changed) -> bool:
        plan = Plan(replace(settings, **changed), settings.config, None, False)
        here = SimpleNamespace(device=torch.device(device))
        return any("emulates" in note for note in panels._notes(plan, data, started, here))

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)  # a T4
    assert warned("cuda")
    monkeypatch.setattr(accelerator, "cpu_has_bf16", lambda: False)
    assert warned("cpu")
    assert not warned("cpu", typed={"mixed_precision": "bf16"})
    monkeypatch.setattr(accelerator, "cpu_has_bf16", lambda: True)
    assert not warned("cpu")


@pytest.mark.parametrize("word", ["true", "True", "1", "yes"])
def test_the_launchers_cpu_is_obeyed_on_a_gpu_machine(gpu, monkeypatch, word):
    monkeypatch.setenv("ACCELERATE_USE_CPU", word)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1")
    torch.backends.cudnn.benchmark = False
    decided, _, cpu = look_at_the_machine(parse(CLASSIFIER))
    assert cpu and decided["mixed_precision"] == "no" and not torch.backends.cudnn.benchmark
    assert look_at_the_machine(parse([*CLASSIFIER, "--bitwise"]))[2]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    with refused("too-few-gpus", match=r"torch sees 1 GPUs.*ACCELERATE_USE_CPU=1"):
        look_at_the_machine(parse(CLASSIFIER))


def test_gpus_that_slurm_gave_and_torch_does_not_see_name_the_way_to_the_cpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with refused("gpu-unseen", match=r"8 GPUs but torch sees none.*ACCELERATE_USE_CPU=1"):
        look_at_the_machine(parse(CLASSIFIER))


@pytest.mark.parametrize(
    "capability, builds, known",
    [
        ((9, 0), BUILDS, True),
        ((8, 9), BUILDS, True),  # by sm_86
        ((7, 0), BUILDS, False),  # V100
        ((6, 0), BUILDS, False),  # P100
        ((11, 0), BUILDS, False),
        ((12, 1), [*BUILDS, "compute_120"], True),
        ((13, 0), [*BUILDS, "compute_120"], True),  # compiled at its start
        ((10, 3), ["sm_80", "sm_100a"], True),
        ((7, 0), ["gfx90a"], True),  # ROCm
        ((7, 0), [], True),
    ],
)
def test_a_gpu_without_kernels_is_named_before_anything_else(gpu, capability, builds, known):
    gpu(capability, builds)
    if known:
        return refuse_unknown_gpu(0)
    with refused(
        "gpu-too-new-or-old", match=r"H100 has compute capability .* has no kernels.*install"
    ):
        look_at_the_machine(parse(CLASSIFIER))


def test_a_gpu_that_torch_cannot_use_is_told_with_the_remedy(gpu, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(accelerator, "nvidia_files", lambda: True)
    monkeypatch.setattr(accelerator, "driver_version", lambda: "535.104.05")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert unseen_gpu() == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA 13.0" in unseen_gpu() and "driver (535.104.05) is too old" in unseen_gpu()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "a build without CUDA" in unseen_gpu()
    for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("ACCELERATE_USE_CPU", "true")):
        with monkeypatch.context() as inner:
            inner.setenv(name, value)
            assert unseen_gpu() == ""
    monkeypatch.setattr(accelerator, "nvidia_files", lambda: False)
    assert unseen_gpu() == ""


def test_debug_blocks_launches_and_deterministic_fills_no_memory(gpu):
    look_at_the_machine(parse([*CLASSIFIER, "--debug"]))
    assert os.environ["CUDA_LAUNCH_BLOCKING"] == "1"
    del os.environ["CUDA_LAUNCH_BLOCKING"]
    look_at_the_machine(parse([*CLASSIFIER, "--deterministic"]))
    assert "CUDA_LAUNCH_BLOCKING" not in os.environ
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_the_facts_of_a_gpu_are_kept_and_a_cpu_has_none(monkeypatch):
    class Properties:
        name, major, minor, total_memory = "NVIDIA H100", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    facts = describe_gpu(torch.device("cuda", 0))["gpu"]
    assert facts["capability"] == "9.0" and facts["memory_bytes"] == 80 * 2**30
    wanted = {"driver", "cuda", "cudnn", "nccl", "tf32_matmul", "tf32_cudnn", "cudnn_benchmark"}
    assert wanted | {"deterministic"} < facts.keys()
    assert describe_gpu(torch.device("cpu")) == {}


@pytest.mark.parametrize(
    "text",
    ["CUDA error: no kernel image is available", "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
     "CUBLAS_STATUS_NOT_INITIALIZED", "NCCL error in: x"],
)  # fmt: skip
def test_a_gpus_fault_is_not_the_models(text):
    assert device_failed(RuntimeError(text))
    assert not device_failed(RuntimeError("found at least two devices, cuda:0 and cpu!"))
    assert device_failed(torch.AcceleratorError("device-side assert"))


@pytest.mark.parametrize(
    "text", ["CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED", "Failed to CUDA calloc 8"]
)
def test_memory_that_is_gone_has_many_names(text):
    assert out_of_memory(RuntimeError(f"error: {text} bytes"))


class Played(nn.Module):
    """A learner's model that remembers how many images it was given, or fails as it is told."""

    def __init__(self, error: str = ""):
        super().__init__()
        self.pool, self.head, self.error = nn.AdaptiveAvgPool2d(2), nn.Linear(12, 10), error
        self.seen = []

    def forward(self, images):
        self.seen.append(len(images))
        if self.error:
            raise RuntimeError(self.error)
        return self.head(self.pool(images).flatten(1))

    def __deepcopy__(self, memo):
        return self


@pytest.fixture
def trial_of(monkeypatch):
    """Tries a model as on such a device; its tensors lie on the CPU all the same."""
    monkeypatch.setattr(trial, "inputs", lambda images, device, channels_last: images)
    monkeypatch.setattr(generators, "seed_dropout", lambda seed, device: None)

    def tried(model: nn.Module, device: str) -> trial.Trial:
        images = Resident(torch.rand(100, 3, 8, 8), torch.zeros(100, dtype=torch.long))
        data = SimpleNamespace(
            train=images, batch=SimpleNamespace(micro_batch_size=40), classes=range(10),
            augment=SimpleNamespace(train=lambda x, *_: x, evaluate=lambda x: x),
            source=SimpleNamespace(task="classification", name="x"),
        )  # fmt: skip
        world = SimpleNamespace(
            device=torch.device(device),
            accelerator=SimpleNamespace(autocast=contextlib.nullcontext),
        )
        task = SimpleNamespace(loss=functional.cross_entropy)
        config = SimpleNamespace(model="my_cnn", image_size=8, mixed_precision="no")
        return trial.try_model(model, task, data, config, world, debug=False)

    return tried


def test_a_gpus_time_is_taken_from_a_whole_micro_batch_and_a_cpus_from_few_images(trial_of):
    for device, images in (("cuda", 40), ("cpu", 16)):
        model = Played()
        assert trial_of(model, device).unused == () and set(model.seen) == {images, 4, 1}


def test_the_layer_that_deterministic_refuses_is_named_and_debug_warns_of_it(trial_of):
    message = "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but"
    with refused(
        "not-deterministic", match=r"--deterministic: adaptive.*pool \(AdaptiveAvgPool2d\)"
    ):
        trial_of(Played(message), "cuda")
    assert "pool (AdaptiveAvgPool2d)" in trial_of(Played(), "cpu").nondeterministic


def test_a_prediction_goes_on_on_the_cpu_where_the_gpu_refuses(monkeypatch, capsys):
    def refuse(self, device):
        if device == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried 2 MiB\nmore")
        return self

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nn.Module, "to", refuse)
    model = Played()
    assert predict.on_gpu(model) is model
    told = capsys.readouterr().err
    assert told == "on the CPU, because the GPU refuses: CUDA out of memory. Tried 2 MiB\n"
    there = nn.Linear(1, 1, device="meta")
    assert predict.gpu_refuses(there, RuntimeError("CUDA error: busy"))
    assert not predict.gpu_refuses(there, RuntimeError("a picture without pixels"))
    assert not predict.gpu_refuses(model, RuntimeError("CUDA error: busy"))


FAULTY = """
import os
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, num_classes)
    def forward(self, x):
        if os.environ.get("RANK", "0") == "1":
            raise {error}
        return self.head(x.flatten(1))
"""


@pytest.mark.parametrize(
    "error, words, status",
    [
        ("RuntimeError('CUDA error: unspecified launch failure')",
         ["rank 1 on", "failed at step 0", "CUDA error: unspecified launch failure"], "failed"),
        pytest.param("ValueError('only here')", ["rank 1 on", "fails on", "only here"], "",
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_what_only_one_rank_meets_is_told_with_rank_and_host(tmp_path, error, words, status):
    (tmp_path / "net.py").write_text(FAULTY.format(error=error))
    done = train(["--model", "net.py:Net", *SMALL, "--run-dir", "faulty"], tmp_path, 2)
    assert done.status != 0 and all(word in done.out for word in words), done.out
    assert ("--model net.py:Net" in done.out) == (not status), done.out
    assert (tmp_path / "faulty").exists() == bool(status)


# --- a peer that is dead, a compiler that is slow -------------------------------------------------

WAITING = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from distributed import watch
from distributed.watch import Watch

rank, folder = int(sys.argv[2]), Path(sys.argv[3])
watch.BEAT_SECONDS, watch.PEER_SECONDS = 0.1, 1.0
mine = Watch(rank, 2)
mine.on_stall = lambda told: (folder / "status").write_text(told)
mine.start(folder)
mine.at("step", 7)
time.sleep(600)  # as in a collective of NCCL whose peer is gone
"""


def test_who_waits_for_a_dead_process_notices_dumps_and_ends(tmp_path):
    (tmp_path / "wait.py").write_text(WAITING)
    words = [tmp_path / "wait.py", REPOSITORY]
    ranks, logs = zip(
        *(start(Command([*words, rank, tmp_path]), tmp_path) for rank in range(2)), strict=True
    )
    try:
        end = time.monotonic() + 120
        beats = [tmp_path / "crash" / f"heartbeat-{rank}.json" for rank in range(2)]
        while not all(beat.exists() and '"step": 7' in beat.read_text() for beat in beats):
            assert time.monotonic() < end
            time.sleep(0.1)
        time.sleep(2)
        assert ranks[0].poll() is None  # standing still is no crime while the other lives
        ranks[1].kill()
        ranks[1].wait()
        said = finish(ranks[0], logs[0], 120).out
    finally:
        for process in ranks:
            process.kill()
    told = f"rank 0 ends too, because rank 1 on {watch.socket.gethostname()} (pid {ranks[1].pid})"
    assert ranks[0].returncode == 1 and f"{told} died without a word" in said, said
    assert told in (tmp_path / "status").read_text()
    assert (
        "time.sleep(600)" not in said
        and "wait.py" in (tmp_path / "crash" / "rank-0.txt").read_text()
    )


def test_what_a_life_of_more_processes_left_is_nobody_that_this_one_waits_for(tmp_path):
    """Rank 2 of three was lost with its node; the next life has two, and starts slowly."""
    lost = subprocess.Popen([sys.executable, "-c", ""])
    lost.wait()
    place = {"host": watch.socket.gethostname(), "pid": lost.pid, "step": 4, "phase": "step"}
    for rank, dead in ((2, False), (1, True)):
        text = json.dumps({"rank": rank, "time": 0.0, **place})
        (tmp_path / f"heartbeat-{rank}.json").write_text(text)
        mine = Watch(0, 2)
        mine.folder = tmp_path
        assert ("died without a word" in mine.dead_peer()) == dead == bool(mine.blame())


@pytest.mark.parametrize(
    "phase, still, ends", [("step", 2, True), ("step", 0, False), ("start", 2, False),
                           ("end", 2, False), ("evaluate", 2, False), ("end", 7, True)],
)  # fmt: skip
def test_patience_is_six_times_as_long_where_a_phase_has_no_beats(monkeypatch, phase, still, ends):
    stalled = []
    one = Watch(0, 1)
    one.patient |= {"evaluate"}
    one.limit = 100.0
    monkeypatch.setattr(one, "_beat", lambda: None)
    monkeypatch.setattr(one, "_stalled", lambda: stalled.append(one.phase))
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.01)
    one.on_beat = one._stop.set
    one.at(phase, 3)
    one._since -= 100.0 * still + 1
    one._run()
    assert bool(stalled) == ends


def test_a_process_that_stands_still_ends_whatever_fails_on_the_way(monkeypatch, tmp_path, capsys):
    """Without memory its last words may fail, and its heartbeat: a hang must not last."""

    def ends(status: int):
        raise SystemExit(status)

    def failing(error: type[BaseException]):
        def fails(*_):
            raise error

        return fails

    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(watch.os, "_exit", ends)
    ways = [(name, MemoryError) for name in ("before_the_end", "on_stall", "_beat", "on_beat")]
    for broken, error in [*ways, ("before_the_end", GeneratorExit), ("on_stall", GeneratorExit)]:
        one = Watch(0, 1)
        one.folder, one.limit = tmp_path, 0.05
        setattr(one, broken, failing(error))
        with pytest.raises(SystemExit, match="1"):
            one._run()
        assert f"stacks of all processes: {one.folder}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_compiled_run_is_patient_until_its_second_step_and_first_evaluation(tmp_path, nets):
    """By the Watch of a real run, whose compiler is played."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch; from torch import nn\n"
        "nn.Module.compile = lambda *_, **__: None\n"
        "import train\n"
        "from config import parse\n"
        "from report.ending import run_to_exit\n"
        "from training.observer import Observer\n"
        "class Look(Observer):\n"
        "    def started(self, learner, data, schedule, progress):\n"
        "        self.say('started')\n"
        "    def phase(self, name):\n"
        "        self.say(name)\n"
        "        return super().phase(name)\n"
        "    def say(self, name):\n"
        "        print('patient', name, sorted(self.world.watch.patient))\n"
        "look = Look()\n"
        "def main(world, observer):\n"
        "    observer.world = world\n"
        "    status = train.main(world, observer)\n"
        "    look.say('end')\n"
        "    return status\n"
        "raise SystemExit(run_to_exit(main, parse(sys.argv[2:]), look))\n"
    )
    words = ["--model", "plain.py:Net", *SMALL, "--limit", "256", "--epochs", "1", "--compile"]
    env = {k: v for k, v in os.environ.items() if k not in CLEAN}
    done = subprocess.run(
        [sys.executable, "-c", script, str(REPOSITORY), *words, "--run-dir", str(tmp_path / "r")],
        cwd=nets, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("patient")]
    assert said[0] == "patient started ['data', 'end', 'evaluate', 'start', 'step']"
    assert said[1] == "patient row ['data', 'end', 'evaluate', 'start', 'step']"  # of step 1
    assert said[2] == "patient row ['end', 'evaluate', 'start']"
    assert said[-1] == "patient end ['end', 'start']"


# --- one control group ----------------------------------------------------------------------------

COUNTED = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
made, new_group = [], dist.new_group
def counted(*words, **named):
    limit = named.get("timeout")
    made.append([named.get("backend"), limit and limit.total_seconds()])
    return new_group(*words, **named)
dist.new_group = counted
dist.get_backend = lambda *_: "nccl"
import train
from config import parse
from report.ending import run_to_exit
status = run_to_exit(train.main, parse(sys.argv[3:]))
with open(f"{sys.argv[2]}-{os.environ['RANK']}.json", "w") as file:
    json.dump({"made": made, "left": not dist.is_initialized(), "status": status}, file)
"""


@pytest.mark.parametrize(
    "words, status",
    [([], 0), pytest.param(["--batch-size", "63"], 2, marks=pytest.mark.slow)],
)
def test_a_run_makes_one_control_group_with_the_limit_and_leaves_all(nets, tmp_path, words, status):
    (tmp_path / "counted.py").write_text(COUNTED)
    arguments = ["--model", str(nets / "plain.py:Net"), *SMALL, "--limit", "256", "--epochs", "1"]
    counted = [tmp_path / "counted.py", REPOSITORY, tmp_path / "told", *arguments]
    counted += ["--run-dir", tmp_path / "run", *words]
    done = finish(*start(Command(counted, 2), tmp_path, LOCKSTEP_TIMEOUT="77"))
    for rank in range(2):
        path = tmp_path / f"told-{rank}.json"
        assert path.exists(), done.out[-3000:]
        told = json.loads(path.read_text())
        assert told == {"made": [["gloo", 77.0]], "left": True, "status": status}, told
