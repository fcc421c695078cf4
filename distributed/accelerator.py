"""The Accelerator of a run: devices, precision, threads; and the tripwires around a launch."""

import hashlib
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)

from config import Settings
from errors import UserError


def wait_limit() -> float:
    """Seconds a collective may wait for a process that does not come (LOCKSTEP_TIMEOUT)."""
    return float(os.environ.get("LOCKSTEP_TIMEOUT", "600"))


def build_accelerator(settings: Settings) -> tuple[Accelerator, Settings]:
    """The Accelerator, and the settings with what only the machine could decide filled in."""
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
        decided["threads"] = 1 if config.bitwise else cpu_share()
    torch.set_num_threads(int(decided.get("threads", config.threads)))
    precision, why = choose_precision(config.mixed_precision, cpu)
    if config.mixed_precision == "auto":
        decided["mixed_precision"] = precision
    backend = os.environ.pop("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in ("no", "inductor"):
        raise UserError(
            f"--dynamo_backend {backend}: only inductor is supported; drop it and type --compile"
        )
    if backend == "inductor" and not config.compile:
        decided["compile"] = True
    if config.bitwise and not cpu:
        raise UserError("--bitwise is for CPUs; on a GPU use --deterministic")

    limit = timedelta(seconds=wait_limit())
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
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
    return accelerator, settings.with_layer(why or "machine", decided)


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
            bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
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
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in env:
        raise UserError(
            f"srun started {env['SLURM_NTASKS']} tasks that do not know of each other; "
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
    import socket

    mine = (socket.gethostname(), torch.cuda.get_device_properties(accelerator.device).uuid)
    places = gather_object([tuple(map(str, mine))])
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


def refuse_disagreement(accelerator: Accelerator, facts: dict[str, str]) -> None:
    """All processes must hold the same config, code and data; the odd ones are named."""
    everyone = gather_object([facts]) if accelerator.num_processes > 1 else [facts]
    for name in facts:
        values = [other[name] for other in everyone]
        common = max(set(values), key=values.count)
        odd = [rank for rank, value in enumerate(values) if value != common]
        if odd:
            raise UserError(
                f"the processes disagree about the {name}: ranks {odd} have {values[odd[0]]}, "
                f"the others {common}; check that every node sees the same files"
            )


def code_fingerprint(*extra: Path) -> str:
    """A hash of the sources that decide the numbers, and of a learner's own model file."""
    here = Path(__file__).resolve().parent.parent
    files = [here / name for name in ("train.py", "tasks.py", "optim.py")]
    for room in ("data", "distributed", "models"):
        files += sorted((here / room).glob("*.py"))
    digest = hashlib.blake2b(digest_size=8)
    for path in (*files, *extra):
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


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
