"""The Accelerator of a run: devices, precision, threads; and the tripwires around a launch."""

import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import accelerate
import numpy
import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch.cuda import nccl

from common.cpus import cpus
from common.disk import digest
from common.errors import UserError
from config import Settings, host_name, several_nodes, tell
from models import lookup

T = TypeVar("T")

FILLING: Any = torch.utils.deterministic  # its switch is made at run time: stubs lack it

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


def wait_limit() -> float:
    """Seconds a collective may wait for a process that does not come (LOCKSTEP_TIMEOUT)."""
    return float(os.environ.get("LOCKSTEP_TIMEOUT", "600"))


def build_accelerator(settings: Settings, tune_malloc: bool = True) -> tuple[Accelerator, Settings]:
    """The Accelerator, and the settings with what only the machine could decide filled in.

    `tune_malloc` changes the process for good, and is for one that has nothing else to do.
    """
    problem = settings.refused
    try:
        decided, origin, cpu = look_at_the_machine(settings) if problem is None else ({}, "", True)
    except UserError as error:
        problem = error
        tell_what_others_do_not_see(error)
    met = refuse_together(problem)
    if cpu and tune_malloc:
        keep_freed_memory()
    limit = timedelta(seconds=wait_limit())
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=str(decided.get("mixed_precision", settings.config.mixed_precision)),
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=limit),
            # Buffers are broadcast by shards.py, where a model needs it; see there.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
        ],
    )
    del met  # the Accelerator's own store listens on its port from here on
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != accelerator.num_processes:
        raise UserError(
            f"the launcher started {world} processes but each of them believes to be one of "
            f"{accelerator.num_processes}; they would all train the same thing",
            code="launch-incomplete",
        )
    refuse_shared_gpu(accelerator)
    if "threads" in decided:  # nodes may have different numbers of CPUs; a run has one
        decided["threads"] = min(everyones(accelerator, decided["threads"]))
    # After the Accelerator, which sets a number of its own on several CPU processes.
    torch.set_num_threads(decided.get("threads", settings.config.threads))
    settings = settings.with_layer(origin, decided)
    refuse_disagreement(accelerator, what_must_agree(settings))
    return accelerator, settings


def tell_what_others_do_not_see(error: UserError) -> None:
    """The main process tells its mistakes at the end, as all do; the others' it does not see."""
    if os.environ.get("RANK", "0") != "0" or several_nodes():
        tell(error)


def refuse_together(problem: UserError | None) -> dist.Store | None:
    """What a process finds wrong before the group is there ends all nodes' processes alike.

    They meet at the store that the group will be made from, since groups need a device. On one
    node the launcher ends the others.
    """
    if not several_nodes():
        if problem is not None:
            raise problem
        return None
    limit = timedelta(seconds=wait_limit())
    met: dist.Store
    met, rank, size = next(dist.rendezvous("env://", timeout=limit))
    host = host_name()
    met.set(f"start/{rank}", json.dumps([host, str(problem or "")]))
    everyone = [json.loads(text) for text in met.multi_get([f"start/{r}" for r in range(size)])]
    found = [(r, host, text) for r, (host, text) in enumerate(everyone) if text]
    if not found:
        return met
    met.set(f"read/{rank}", "")
    if rank == 0:  # the store ends with this process
        with contextlib.suppress(RuntimeError):
            met.wait([f"read/{r}" for r in range(size)], timedelta(seconds=30))
    if problem is not None and problem.printed:
        raise problem
    first, host, text = found[0]
    raise UserError(
        f"rank {first} on {host}: {text}\n(the head node finds nothing wrong: do all nodes see the "
        "same disk, and the same GPUs?)"
        if first
        else text,
        code="refused-elsewhere",
    )


@contextlib.contextmanager
def not_installed(package: str) -> Iterator[None]:
    """Where a package is not installed, an import of it fails at once instead of a search each.

    Accelerate looks for lomo_optim twice in every step: 0.1 to 0.5 ms of the host.
    """
    absent = package not in sys.modules and importlib.util.find_spec(package) is None
    if absent:
        sys.modules[package] = None  # pyright: ignore[reportArgumentType] - imports know it
    try:
        yield
    finally:
        if absent:
            del sys.modules[package]


def look_at_the_machine(settings: Settings) -> tuple[dict[str, Any], str, bool]:
    """What this process decides alone, before it meets the others: (values, origin, on the CPU)."""
    refuse_foreign_switches()
    refuse_lonely_tasks()
    config = settings.config
    decided: dict[str, Any] = {}
    if settings.actions.debug:  # a fault shows at the line that launched it; read when CUDA starts
        os.environ.setdefault("CUDA_LAUNCH_BLOCKING", "1")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        FILLING.fill_uninitialized_memory = False  # nobody reads it here
        torch.backends.cudnn.benchmark = False
    cuda = torch.cuda.is_available() and not cpu_asked()
    if cuda and not config.deterministic:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if cuda and here > (seen := torch.cuda.device_count()):
        raise UserError(
            f"{here} processes on this node, but torch sees {seen} GPUs: start one process per GPU "
            "(--nproc of torchrun.sh, --gpus of submit.py); look at CUDA_VISIBLE_DEVICES; "
            "ACCELERATE_USE_CPU=1 trains on the CPU",
            code="too-few-gpus",
        )
    if cuda:
        refuse_unknown_gpu(int(os.environ.get("LOCAL_RANK", "0")))
    cpu = not cuda and (cpu_asked() or not torch.backends.mps.is_available())
    gpus = os.environ.get("SLURM_GPUS_ON_NODE") or "0"
    if cpu and not cpu_asked() and int(gpus) > 0:
        raise UserError(
            f"SLURM gave this node {gpus} GPUs but torch sees none, and would train on the CPU; "
            "python launch/preflight.py tells why; ACCELERATE_USE_CPU=1 means the CPU",
            code="gpu-unseen",
        )
    if settings.actions.debug and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "--debug is one process: start it as python train.py --debug", code="one-process"
        )

    if config.threads == 0:
        decided["threads"] = 1 if config.bitwise and cpu else cpu_share()
    classifies = lookup(config.model).task == "classification"
    precision, origin = choose_precision(config.mixed_precision, cpu, classifies)
    if config.mixed_precision == "auto":
        decided["mixed_precision"] = precision
    backend = os.environ.pop("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in ("no", "inductor"):
        raise UserError(
            f"--dynamo_backend {backend}: only inductor is supported; drop it and type --compile",
            code="unknown-backend",
        )
    if backend == "inductor" and not config.compile:
        decided["compile"] = True
    if config.bitwise and not (cpu or torch.cuda.is_available()):
        raise UserError(
            "--bitwise is for CPUs and CUDA GPUs: other devices lack its integer sums",
            code="bitwise-device",
        )
    if config.bitwise and not (cpu or config.deterministic):
        raise UserError(
            "--bitwise on a GPU needs equal bits of each shard too: add --deterministic",
            code="bitwise-needs-deterministic",
        )
    return decided, origin, cpu


def cpu_asked() -> bool:
    """Whether the launcher asks for the CPU: `accelerate launch --cpu`, use_cpu: true."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "")
    return asked.lower() in ("1", "true", "yes", "y", "t", "on")


def refuse_unknown_gpu(index: int) -> None:
    """A GPU for which this build of torch has no kernels fails at its first operation."""
    known = torch.cuda.get_arch_list()  # sm_90: for 9.0 and later 9.x; compute_90: any from 9.0 on
    builds = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name) for name in known]
    if not known or None in builds:  # ROCm has names of another kind
        return
    major, minor = torch.cuda.get_device_capability(index)
    for kind, of_major, of_minor in (build.groups() for build in filter(None, builds)):
        exact, oldest = int(of_major) == major, (int(of_major), int(of_minor))
        if oldest <= (major, minor) and (exact or kind == "compute"):
            return
    raise UserError(
        f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, for which "
        f"this torch ({torch.__version__}: {', '.join(known)}) has no kernels; install a torch "
        "that has (pytorch.org/get-started, an index of another CUDA), or type "
        "ACCELERATE_USE_CPU=1 before the command to train on the CPU",
        code="gpu-too-new-or-old",
    )


def unseen_gpu() -> str:
    """What to do where this machine has an NVIDIA GPU that torch cannot use; '' if all is well."""
    if torch.cuda.is_available() or cpu_asked() or not nvidia_files():
        return ""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        return ""  # hidden on purpose
    if torch.version.cuda is None:
        why = f"this torch ({torch.__version__}) is a build without CUDA; install one with it"
    else:
        why = (
            f"this torch is made for CUDA {torch.version.cuda}, and the driver"
            f"{f' ({found})' if (found := driver_version()) else ''} is too old for it or does not "
            "answer (nvidia-smi tells): install a newer driver, or a torch for an older CUDA"
        )
    return (
        f"this machine has an NVIDIA GPU, but torch cannot use it: {why} (pytorch.org/get-started "
        "names the command). ACCELERATE_USE_CPU=1 before the command means the CPU, unasked"
    )


def nvidia_files() -> bool:
    """Whether the NVIDIA driver shows a device."""
    return any(Path(name).exists() for name in ("/dev/nvidia0", "/proc/driver/nvidia/version"))


def driver_version() -> str:
    """Of the NVIDIA driver, as Linux tells it; '' elsewhere."""
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        if found := re.search(r"\d+\.\d+(\.\d+)?", text):
            return found[0]
    return ""


def choose_precision(wanted: str, cpu: bool, classifies: bool = True) -> tuple[str, str]:
    """(precision, origin): an explicit flag, the launcher's fp16/bf16, or what the GPU has.

    `accelerate launch` always exports "no" as its own default, which therefore does not count.
    A regression's numbers are wanted to more digits than bf16 has.
    """
    origin = "machine"
    if wanted == "auto":
        launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launcher in ("fp16", "bf16"):
            wanted, origin = launcher, "accelerate launch"
        else:
            bf16 = classifies and not cpu and torch.cuda.is_available()
            bf16 = bf16 and torch.cuda.is_bf16_supported(including_emulation=False)
            wanted = "bf16" if bf16 else "no"
    if wanted == "fp16" and cpu:
        raise UserError(
            "--mixed-precision fp16 needs a GPU; on a CPU use bf16 or no", code="fp16-needs-gpu"
        )
    return wanted, origin


def cpu_share() -> int:
    """CPUs this process may use, shared with the node's other processes."""
    return max(1, cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16 numbers."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def lacks_bf16(device: torch.device) -> bool:
    """Whether this device computes in bf16 only by way of float32, which is slow."""
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and not cpu_has_bf16()


def keep_freed_memory() -> None:
    """Let malloc (glibc's) keep what a step frees, for the next step to use again.

    By default it gives each large tensor back to the system and asks for new, empty pages in the
    next step: 6 to 60 % of a step on a CPU. The peak may grow by a third (bench/README.md).
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)  # no tensor as a mapping of its own
        mallopt(M_TRIM_THRESHOLD, -1)  # never shrink
        mallopt(M_TOP_PAD, 64 * 2**20)  # bytes more than needed at each growth


def refuse_foreign_switches() -> None:
    """Accelerate's environment may switch things on behind the config's back: not here."""
    steps = os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise UserError(
            f"--gradient_accumulation_steps {steps} of accelerate launch is not used here; "
            f"type --accumulate {steps} after train.py",
            code="foreign-accumulation",
        )
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"):
        if os.environ.get(name, "false").lower() == "true":
            raise UserError(
                f"{name} is set: this trainer shares work by DDP only; unset it",
                code="foreign-sharding",
            )


def refuse_lonely_tasks() -> None:
    """Several SLURM tasks or nodes that do not know of each other would train the same thing."""
    env = os.environ
    if "WORLD_SIZE" in env:
        return
    tasks = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1")
    if int(tasks) > 1 and "SLURM_STEP_ID" in env:
        raise UserError(
            f"srun started {tasks} tasks that do not know of each other; "
            "submit with launch/slurm.sbatch, which tells each its place",
            code="lonely-tasks",
        )
    if int(env.get("SLURM_JOB_NUM_NODES", "1")) > 1 and "SLURM_STEP_ID" not in env:
        raise UserError(
            f"this job has {env['SLURM_JOB_NUM_NODES']} nodes but train.py was started without "
            "srun, on one of them; submit with launch/slurm.sbatch",
            code="lonely-nodes",
        )


def refuse_shared_gpu(accelerator: Accelerator) -> None:
    """Two ranks on one GPU would share its time and memory: no speed, and NCCL refuses it."""
    if accelerator.device.type != "cuda" or accelerator.num_processes == 1:
        return
    mine = (socket.gethostname(), torch.cuda.get_device_properties(accelerator.device).uuid)
    places = everyones(accelerator, tuple(map(str, mine)))
    for place in places:
        ranks = [rank for rank, other in enumerate(places) if other == place]
        if len(ranks) > 1:
            raise UserError(
                f"ranks {ranks} are on the same GPU of {place[0]}; start one process per GPU",
                code="shared-gpu",
            )


@functools.cache
def control_group() -> dist.ProcessGroup:
    """The one group for everything but gradients, sums and buffers: votes, values, decisions.

    Gloo's, with the limit of every wait: NCCL hangs or dies where a process is at a wrong place.
    """
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=wait_limit()))
    return cast(dist.ProcessGroup, group)  # every process is a member


def broadcast(accelerator: Accelerator, value: T) -> T:
    """The main process's value, on every process."""
    if accelerator.num_processes == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=control_group())
    return values[0]


def main_decides(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """What decide() returns on the main process; its UserError is raised on every process."""
    result: tuple[T | None, tuple[str, str] | None] = None, None
    if accelerator.is_main_process:
        try:
            result = decide(), None
        except UserError as error:
            result = None, (str(error), error.code)
    value, problem = broadcast(accelerator, result)
    if problem is not None:
        raise UserError(problem[0], code=problem[1])
    return cast(T, value)


def everyones(accelerator: Accelerator, mine: T) -> list[T]:
    """The value of every process, by rank."""
    if accelerator.num_processes == 1:
        return [mine]
    values: list[T] = [mine] * accelerator.num_processes
    dist.all_gather_object(values, mine, group=control_group())
    return values


def all_or_none(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What work() returns here; a UserError of any process is raised on all, naming that process.

    What the main process meets too is nobody's own trouble: told without a name.
    """
    result: T | None = None
    problem: tuple[str, str] | None = None
    try:
        result = work()
    except UserError as error:
        problem = str(error), error.code
    everyone = everyones(accelerator, (socket.gethostname(), problem))
    for rank, (host, found) in enumerate(everyone):
        if found is not None:
            message, code = found
            raise UserError(f"rank {rank} on {host}: {message}" if rank else message, code=code)
    return cast(T, result)


REMEDIES = {
    "--": "give every process the same command and the same files; what the machines decide "
    "differently can be given as a flag",
    "data": "on each node: python -m data prepare, or let --data-dir name a disk that all share",
    "version of": "activate the same environment on every node, on a disk that all share",
}


def refuse_disagreement(accelerator: Accelerator, facts: dict[str, str]) -> None:
    """All processes must hold the same settings, code and data; the odd ones are named."""
    host = host_name()
    everyone = everyones(accelerator, (host, facts))
    names = dict.fromkeys(name for _, held in everyone for name in held)
    for name in names:
        values = [held.get(name, "nothing") for _, held in everyone]
        common = max(values, key=values.count)  # of equal counts, what the main process has
        odd = [rank for rank, value in enumerate(values) if value != common]
        if odd:
            who = ", ".join(f"rank {rank} on {everyone[rank][0]}" for rank in odd[:4])
            who += f" and {len(odd) - 4} more" if len(odd) > 4 else ""
            remedy = next((r for start, r in REMEDIES.items() if name.startswith(start)), "")
            raise UserError(
                f"the processes disagree about the {name}: {who} with {values[odd[0]]}, the others "
                f"with {common}; {remedy or 'start from a disk that every node sees'}",
                code="processes-disagree",
            )


def what_must_agree(settings: Settings) -> dict[str, str]:
    """Name -> value of what decides the numbers and can be known before the data are read."""
    values = asdict(settings.config)
    facts = {f"--{name.replace('_', '-')}": str(value) for name, value in values.items()}
    facts |= {f"version of {m.__name__}": m.__version__ for m in (torch, accelerate, numpy)}
    facts["version of python"] = sys.version.split()[0]
    own = Path(settings.config.model.partition(".py:")[0] + ".py")
    return facts | {f"code in {name}": digest for name, digest in code_digests(own).items()}


# What decides the numbers of a run: folders, or files of that name.
ROOMS = (
    "train", "tasks", "optim", "common", "config", "data", "distributed", "models", "training",
)  # fmt: skip


def code_digests(*extra: Path) -> dict[str, str]:
    """File -> hash of the sources of ROOMS, and of a learner's own model file."""
    here = Path(__file__).resolve().parent.parent
    files = [path for room in ROOMS for path in (here / f"{room}.py",) if path.is_file()]
    for room in ROOMS:
        files += sorted((here / room).rglob("*.py"))
    named = {path.relative_to(here).as_posix(): path for path in files}
    named |= {str(path): path for path in (p.expanduser() for p in extra) if path.is_file()}

    return {name: digest(path.read_bytes()) for name, path in named.items()}


def code_fingerprint(*extra: Path) -> str:
    """One hash of all that code_digests names; a file's name does not count, its bytes do."""
    digests = "".join(code_digests(*extra).values())
    return digest(digests)


def model_fingerprint(model: torch.nn.Module) -> str:
    """A hash of the names and shapes of a model's state and of its printed layers."""
    shapes = [(k, tuple(getattr(v, "shape", ()))) for k, v in model.state_dict().items()]
    text = repr(model) + repr(shapes)
    return digest(text)


def describe(accelerator: Accelerator) -> str:
    """`2 x NVIDIA A100`, `CPU (2 threads)`: the devices in words."""
    if accelerator.device.type == "cuda":
        name = torch.cuda.get_device_name(accelerator.device)
    elif accelerator.device.type == "cpu":
        threads = torch.get_num_threads()
        name = f"CPU ({threads} thread{'s' if threads > 1 else ''})"
    else:
        name = accelerator.device.type.upper()
    count = accelerator.num_processes
    return name if count == 1 else f"{count} x {name}"


def describe_gpu(device: torch.device) -> dict[str, dict]:
    """What decides numbers and speed on this GPU beside the versions of packages; {} on a CPU."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    of_nccl = nccl.version() if dist.is_nccl_available() else ()
    facts = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, of_nccl)),
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    return {"gpu": facts}


def end(accelerator: Accelerator) -> None:
    """Leave the process group, so that no process dies in another's last collective."""
    if accelerator.num_processes > 1 and dist.is_initialized():
        accelerator.wait_for_everyone()
    leave()


def leave(seconds: float = 10.0) -> bool:
    """Leave the process group without waiting for anyone; whether that was done in time.

    On a thread: NCCL may wait for the others of its node, who may not come.
    """
    if not dist.is_initialized():
        return True
    control_group.cache_clear()
    thread = threading.Thread(target=dist.destroy_process_group, name="leave", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
