"""Runs train.py many times from one interpreter that has imported the packages once.

Importing torch and scikit-learn costs a tiny run most of its time; a fork of an interpreter that
has them costs nothing. Of the program itself nothing is imported before the fork: each process runs
its tree's train.py as `python train.py` would, in the environment that torchrun would give it.

`python bench/preloaded.py` prints what of this machine decides bits, as one line of JSON; then it
reads one job a line (tree, folder, flags, processes) until its input ends, runs them on as many
processes as there are cores, and prints one line (job, status, CPU seconds) as each of them ends.
"""

import atexit
import contextlib
import gc
import hashlib
import importlib
import json
import os
import platform
import runpy
import signal
import socket
import sys
import threading
import traceback
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "torch._dynamo", "torch.distributed", "accelerate", "sklearn.datasets", "rich")
PACKAGES += ("datasets",)  # Accelerate asks for it where it is installed
DECIDING = ("torch", "numpy", "accelerate", "scikit-learn")  # whose versions may move a bit
SWITCHES = ("ATEN_", "DNNL_", "GLIBC_", "KMP_", "MKL_", "OMP_", "ONEDNN_", "OPENBLAS_", "TORCH_")


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    return ""


def kind() -> dict[str, str]:
    """What decides the bits of a run beside the program; where one differs, they may differ."""
    import torch

    facts = {name: metadata.version(name) for name in DECIDING}
    facts |= {"python": "{}.{}".format(*sys.version_info), "libc": " ".join(platform.libc_ver())}
    facts |= {"system": platform.system(), "machine": platform.machine(), "threads": "1"}
    facts["instructions"] = torch.backends.cpu.get_cpu_capability()
    # The versions of oneDNN and MKL, the compiler and its options.
    facts["build"] = digest(torch.__config__.show())
    first = read("/proc/cpuinfo").partition("\n\n")[0].splitlines()
    cpu = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)}
    facts["cpu"] = cpu.get("model name", platform.processor())
    names = ("vendor_id", "cpu family", "model", "stepping")
    facts["cpu number"] = " ".join(cpu.get(name, "") for name in names)
    facts["cpu flags"] = digest(cpu.get("flags", cpu.get("Features", "")))
    facts["cpus"] = str(os.cpu_count())
    # By the size of the caches libraries cut their products, and so their sums, into blocks.
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    facts["caches"] = " ".join(read(str(path)) for path in caches)
    for name in sorted(os.environ):
        if name.startswith(SWITCHES):
            facts[name] = os.environ[name]
    return facts


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def become(job: dict, rank: int, port: int) -> None:
    """Turn this process into `python train.py FLAGS`, and end it as Python would."""
    folder, count = Path(job["folder"]), job["processes"]
    null = os.open(os.devnull, os.O_RDONLY)
    log = os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    if count > 1:
        ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        ours |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in ours.items()})
    os.chdir(folder)
    script = str(Path(job["tree"]) / "train.py")
    sys.argv, sys.path[0] = [script, *job["flags"]], job["tree"]
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code
        if not isinstance(status, int | None):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    # Then nothing but taking all packages apart, which costs more than a tiny run.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def serve() -> None:
    for name in PACKAGES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    print(json.dumps(kind()), flush=True)
    gc.freeze()  # else each process walks all that was imported, again and again
    waiting = [json.loads(line) for line in sys.stdin]
    cores = os.cpu_count() or 1
    running: dict[int, int] = {}  # process -> its job
    results: dict[int, dict] = {}
    following = 0
    while following < len(waiting) or running:
        job = waiting[following] if following < len(waiting) else None
        if job and (not running or len(running) + job["processes"] <= cores):
            port = free_port() if job["processes"] > 1 else 0
            for rank in range(job["processes"]):
                process = os.fork()
                if process == 0:
                    become(job, rank, port)
                running[process] = following
            results[following] = {"job": following, "status": 0, "seconds": 0.0}
            following += 1
            continue
        process, status, usage = os.wait4(-1, 0)
        number = running.pop(process)
        result = results[number]
        result["seconds"] += usage.ru_utime + usage.ru_stime
        others = [other for other, its in running.items() if its == number]
        if status and not result["status"]:
            result["status"] = os.waitstatus_to_exitcode(status)
            for other in others:  # they would wait for the one that failed
                os.kill(other, signal.SIGKILL)
        if not others:
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    serve()
