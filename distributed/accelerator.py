"""The Accelerator of a run: devices, precision, threads; and the tripwires around a launch."""

import contextlib
import ctypes
import hashlib
import os
import socket
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import accelerate
import numpy
import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
)

from config import Settings, tell
from errors import UserError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


def wait_limit() -> float:
    """Seconds a collective may wait for a process that does not come (LOCKSTEP_TIMEOUT)."""
    return float(os.environ.get("LOCKSTEP_TIMEOUT", "600"))


def build_accelerator(settings: Settings) -> tuple[Accelerator, Settings]:
    """The Accelerator, and the settings with what only the machine could decide filled in."""
    try:
        decided, origin, cpu = look_at_the_machine(settings)
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":  # the main process cannot tell what it does not see
            tell(error)
        raise
    if "threads" not in decided:
        torch.set_num_threads(settings.config.threads)
    if cpu:
        keep_freed_memory()
    limit = timedelta(seconds=wait_limit())
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=decided.get("mixed_precision", settings.config.mixed_precision),
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=limit),
            # Buffers are broadcast by shards.py, where a model needs it; see there.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
        ],
    )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != accelerator.num_processes:
        raise UserError(
            f"the launcher started {world} processes but each of them believes to be one of "
            f"{accelerator.num_processes}; they would all train the same thing"
        )
    refuse_shared_gpu(accelerator)
    if "threads" in decided:  # nodes may have different numbers of CPUs; a run has one
        decided["threads"] = min(everyones(accelerator, decided["threads"]))
        torch.set_num_threads(decided["threads"])
    settings = settings.with_layer(origin, decided)
    refuse_disagreement(accelerator, what_must_agree(settings))
    return accelerator, settings


def look_at_the_machine(settings: Settings) -> tuple[dict[str, object], str, bool]:
    """What this process decides alone, before it meets the others: (values, origin, on the CPU)."""
    refuse_foreign_switches()
    refuse_lonely_tasks()
    config = settings.config
    decided: dict[str, object] = {}
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    elif torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.is_available() and here > (seen := torch.cuda.device_count()):
        raise UserError(
            f"{here} processes on this node, but torch sees {seen} GPUs: start one process per GPU "
            "(--nproc of torchrun.sh, --gpus of submit.py); look at CUDA_VISIBLE_DEVICES"
        )
    cpu = not torch.cuda.is_available() and not torch.backends.mps.is_available()
    gpus = os.environ.get("SLURM_GPUS_ON_NODE") or "0"
    if cpu and int(gpus) > 0:
        raise UserError(
            f"SLURM gave this node {gpus} GPUs but torch sees none, and would train on the CPU; "
            "python launch/preflight.py tells why"
        )
    if settings.actions.debug and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--debug is one process: start it as python train.py --debug")

    if config.threads == 0:
        decided["threads"] = 1 if config.bitwise and cpu else cpu_share()
    precision, origin = choose_precision(config.mixed_precision, cpu)
    if config.mixed_precision == "auto":
        decided["mixed_precision"] = precision
    backend = os.environ.pop("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in ("no", "inductor"):
        raise UserError(
            f"--dynamo_backend {backend}: only inductor is supported; drop it and type --compile"
        )
    if backend == "inductor" and not config.compile:
        decided["compile"] = True
    if config.bitwise and not (cpu or torch.cuda.is_available()):
        raise UserError("--bitwise is for CPUs and CUDA GPUs: other devices lack its integer sums")
    if config.bitwise and not (cpu or config.deterministic):
        raise UserError(
            "--bitwise on a GPU needs equal bits of each shard too: add --deterministic"
        )
    return decided, origin, cpu


def choose_precision(wanted: str, cpu: bool) -> tuple[str, str]:
    """(precision, origin): an explicit flag, the launcher's fp16/bf16, or what the GPU has.

    `accelerate launch` always exports "no" as its own default, which therefore does not count.
    """
    origin = "machine"
    if wanted == "auto":
        launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launcher in ("fp16", "bf16"):
            wanted, origin = launcher, "accelerate launch"
        else:
            bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(
                including_emulation=False
            )
            wanted = "bf16" if bf16 else "no"
    if wanted == "fp16" and cpu:
        raise UserError("--mixed-precision fp16 needs a GPU; on a CPU use bf16 or no")
    return wanted, origin


def cpu_share() -> int:
    """CPUs this process may use: its affinity and quota, shared with the node's other processes."""
    have = getattr(os, "process_cpu_count", os.cpu_count)() or 1
    if hasattr(os, "sched_getaffinity"):
        have = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        have = min(have, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max(1, have // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16 numbers."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


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
            f"type --accumulate {steps} after train.py"
        )
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"):
        if os.environ.get(name, "false").lower() == "true":
            raise UserError(f"{name} is set: this trainer shares work by DDP only; unset it")


def refuse_lonely_tasks() -> None:
    """Several SLURM tasks or nodes that do not know of each other would train the same thing."""
    env = os.environ
    if "WORLD_SIZE" in env:
        return
    tasks = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1")
    if int(tasks) > 1 and "SLURM_STEP_ID" in env:
        raise UserError(
            f"srun started {tasks} tasks that do not know of each other; "
            "submit with launch/slurm.sbatch, which tells each its place"
        )
    if int(env.get("SLURM_JOB_NUM_NODES", "1")) > 1 and "SLURM_STEP_ID" not in env:
        raise UserError(
            f"this job has {env['SLURM_JOB_NUM_NODES']} nodes but train.py was started without "
            "srun, on one of them; submit with launch/slurm.sbatch"
        )


def refuse_shared_gpu(accelerator: Accelerator) -> None:
    if accelerator.device.type != "cuda" or accelerator.num_processes == 1:
        return
    mine = (socket.gethostname(), torch.cuda.get_device_properties(accelerator.device).uuid)
    places = everyones(accelerator, tuple(map(str, mine)))
    for place in places:
        ranks = [rank for rank, other in enumerate(places) if other == place]
        if len(ranks) > 1:
            raise UserError(
                f"ranks {ranks} are on the same GPU of {place[0]}; start one process per GPU"
            )


def broadcast(accelerator: Accelerator, value):
    """The main process's value, on every process."""
    if accelerator.num_processes == 1:
        return value
    return broadcast_object_list([value])[0]


def main_decides(accelerator: Accelerator, decide):
    """What decide() returns on the main process; its UserError is raised on every process."""
    result = None
    if accelerator.is_main_process:
        try:
            result = ("value", decide())
        except UserError as error:
            result = ("error", str(error))
    kind, value = broadcast(accelerator, result)
    if kind == "error":
        raise UserError(value)
    return value


def everyones(accelerator: Accelerator, mine) -> list:
    """This value of every process, by rank; not over NCCL, which hangs or dies of wrong places."""
    if accelerator.num_processes == 1:
        return [mine]
    values = [None] * accelerator.num_processes
    group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    dist.all_gather_object(values, mine, group=group)
    return values


REMEDIES = {
    "--": "give every process the same command and the same files; what the machines decide "
    "differently can be given as a flag",
    "data": "on each node: python -m data prepare, or let --data-dir name a disk that all share",
    "version of": "activate the same environment on every node, on a disk that all share",
}


def refuse_disagreement(accelerator: Accelerator, facts: dict[str, str]) -> None:
    """All processes must hold the same settings, code and data; the odd ones are named."""
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
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
                f"with {common}; {remedy or 'start from a disk that every node sees'}"
            )


def what_must_agree(settings: Settings) -> dict[str, str]:
    """Name -> value of what decides the numbers and can be known before the data are read."""
    values = asdict(settings.config)
    facts = {f"--{name.replace('_', '-')}": str(value) for name, value in values.items()}
    facts |= {f"version of {m.__name__}": m.__version__ for m in (torch, accelerate, numpy)}
    facts["version of python"] = sys.version.split()[0]
    own = Path(settings.config.model.partition(".py:")[0] + ".py")
    return facts | {f"code in {name}": digest for name, digest in code_digests(own).items()}


def code_digests(*extra: Path) -> dict[str, str]:
    """File -> hash of the sources that decide the numbers, and of a learner's own model file."""
    here = Path(__file__).resolve().parent.parent
    names = ("train.py", "run.py", "trial.py", "features.py", "tasks.py", "optim.py")
    files = [here / name for name in names]
    for room in ("data", "distributed", "models"):
        files += sorted((here / room).glob("*.py"))
    named = {path.relative_to(here).as_posix(): path for path in files}
    named |= {str(path): path for path in (p.expanduser() for p in extra) if path.is_file()}

    def digest(path: Path) -> str:
        return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()

    return {name: digest(path) for name, path in named.items()}


def code_fingerprint(*extra: Path) -> str:
    """One hash of all that code_digests names; a file's name does not count, its bytes do."""
    digests = "".join(code_digests(*extra).values())
    return hashlib.blake2b(digests.encode(), digest_size=8).hexdigest()


def model_fingerprint(model: torch.nn.Module) -> str:
    """A hash of the names and shapes of a model's state and of its printed layers."""
    text = repr(model) + repr([(k, tuple(v.shape)) for k, v in model.state_dict().items()])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


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


def end(accelerator: Accelerator) -> None:
    """Leave the process group, so that no process dies in another's last collective."""
    if accelerator.num_processes > 1 and dist.is_initialized():
        accelerator.wait_for_everyone()
        dist.destroy_process_group()
