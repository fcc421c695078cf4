"""Checks the nodes before a run: one table, a remedy per finding, go (0) or no go (1).

Alone:             python launch/preflight.py -- --model resnet18 --dataset cifar10
In an allocation:  LOCKSTEP_PREFLIGHT=1 sbatch ... launch/slurm.sbatch, or
                   python launch/submit.py --preflight ...
"""

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from datetime import timedelta
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "accelerate", "datasets", "safetensors", "numpy")
FILES_WANTED = 4096  # open files: sockets to every rank, data files, shared memory
CLOCK_SECONDS = 5.0  # apart by more, locks and heartbeats on a shared disk look stale
REACH_SECONDS = 60.0
CHECKPOINTS = 6  # three kept, one being written, the best and the last weights
GIGABYTE = 1e9


def own_facts(gpus_asked: int) -> dict:
    """What this process sees of itself: versions, builds, GPUs, limits."""
    facts = {
        "rank": int(os.environ.get("RANK", "0")),
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "local_rank": int(os.environ.get("LOCAL_RANK", "0")),
        "python": sys.version.split()[0],
        "versions": {},
        "builds": {},
        "asked": gpus_asked,
        "gpus": [],
        "files": 0,
        "broken": "",
    }
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            facts["versions"][name] = metadata.version(name)
    with suppress(ImportError):
        import resource

        facts["files"] = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        import torch

        facts["builds"]["torch"] = build_of(torch.__version__, torch.version.cuda)
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        facts["gpus"] = [str(torch.cuda.get_device_properties(i).uuid) for i in range(count)]
        import torchvision

        cuda = getattr(torchvision.version, "cuda", None)
        facts["builds"]["torchvision"] = build_of(torchvision.__version__, cuda)
    except Exception as error:
        facts["broken"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return facts


def build_of(version: str, cuda: str | None) -> str:
    """`cpu`, `cu128`: what a package was compiled for."""
    local = version.partition("+")[2]
    return local or (f"cu{cuda.replace('.', '')}" if cuda else "cpu")


def try_trainer(arguments: list[str]) -> tuple[bool, str, int]:
    """One step of the very command, alone and without network: (fine, last words, parameters)."""
    places = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    hidden = ("SLURM_", "GROUP_", "TORCHELASTIC_")
    env = {k: v for k, v in os.environ.items() if k not in places and not k.startswith(hidden)}
    env |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, str(HERE / "train.py"), *arguments, "--dry-run"]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return False, "no answer from train.py --dry-run in ten minutes", 0
    found = re.search(r"([\d,]+) parameters", done.stdout)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    told = lines[-1] if lines else f"exit status {done.returncode}"
    parameters = int(found[1].replace(",", "")) if found else 0
    return done.returncode == 0, told, parameters


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is already there."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


class Unreachable(Exception):
    """The others cannot be spoken to; holds what was found and the remedy."""


class Peers:
    """The other processes of the launch; alone, everything is its own."""

    def __init__(self):
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.size == 1:
            return
        import torch.distributed as dist

        head, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.reach(head, port)
        limit = timedelta(seconds=REACH_SECONDS)
        store = dist.TCPStore(head, port, self.size, self.rank == 0, timeout=limit)
        dist.init_process_group(
            "gloo", store=store, rank=self.rank, world_size=self.size, timeout=limit
        )

    def reach(self, head: str, port: int) -> None:
        """Wait for the head node's port in words, before a library waits for it in silence."""
        if self.rank == 0:
            from network import is_free

            if "TORCHELASTIC_RUN_ID" not in os.environ and not is_free(port):
                raise Unreachable(
                    f"port {port} is taken on {socket.gethostname()}",
                    "another run there? choose another port in --head; a SLURM job takes a free "
                    "one when it is submitted again",
                )
            return
        deadline = time.monotonic() + REACH_SECONDS
        while True:
            try:
                socket.create_connection((head, port), timeout=5).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise Unreachable(
                        f"{socket.gethostname()} cannot reach the head node at {head}:{port} "
                        f"({error})",
                        "check that it is the head node's address, that rank 0 runs there, and "
                        "that no firewall stands between",
                    ) from None
                time.sleep(0.5)

    def gather(self, mine) -> list:
        if self.size == 1:
            return [mine]
        import torch.distributed as dist

        everyone = [None] * self.size
        dist.all_gather_object(everyone, mine)
        return everyone

    def sum_known_numbers(self) -> tuple[bool, float]:
        """All-reduce 2^22 known integers: (right, megabytes per second)."""
        if self.size == 1:
            return True, 0.0
        import torch
        import torch.distributed as dist

        numbers = torch.arange(2**22, dtype=torch.float32) % 1024 + self.rank
        want = (torch.arange(2**22, dtype=torch.float32) % 1024) * self.size
        want += self.size * (self.size - 1) / 2
        dist.all_reduce(torch.zeros(1))  # connects
        began = time.monotonic()
        dist.all_reduce(numbers)
        seconds = time.monotonic() - began
        return bool(torch.equal(numbers, want)), numbers.nbytes / 1e6 / seconds


def shared_folder(peers: Peers, folder: Path) -> str:
    """Why not all processes can write near the run's folder and see each other's files, or ''."""
    place = existing(folder)
    token = peers.gather(uuid.uuid4().hex)[0]
    mine = place / f".preflight-{token}-{peers.rank}"
    problem = ""
    try:
        mine.write_text(token, encoding="utf-8")
    except OSError as error:
        problem = f"rank {peers.rank} cannot write {place}: {error.strerror}"
    peers.gather(None)
    seen = [r for r in range(peers.size) if (place / f".preflight-{token}-{r}").is_file()]
    peers.gather(None)
    mine.unlink(missing_ok=True)
    if not problem and len(seen) < peers.size:
        lost = sorted(set(range(peers.size)) - set(seen))
        problem = f"rank {peers.rank} does not see in {place} what ranks {lost} wrote"
    return next(filter(None, peers.gather(problem)), "")


def differing(everyone: list[dict], value_of) -> str:
    """'n1 has a; n2 has b' where a value is not the same everywhere, else ''."""
    holders: dict[str, list[str]] = {}
    for facts in everyone:
        hosts = holders.setdefault(str(value_of(facts)), [])
        if facts["host"] not in hosts:
            hosts.append(facts["host"])
    if len(holders) == 1:
        return ""
    return "; ".join(f"{', '.join(hosts)}: {value}" for value, hosts in holders.items())


def judge(everyone: list[dict]) -> list[tuple[str, str, str]]:
    """(check, what was found, remedy) of what the gathered facts show; an empty remedy is fine."""
    rows = []

    def row(check: str, fine: str, problem: str, remedy: str) -> None:
        rows.append((check, problem or fine, remedy if problem else ""))

    first = everyone[0]
    same = "activate the same environment on every node, on a disk they share"
    row("python", first["python"], differing(everyone, lambda f: f["python"]), same)
    for name in PACKAGES:
        problem = differing(everyone, lambda f, name=name: f["versions"].get(name, "missing"))
        row(name, first["versions"].get(name, "missing"), problem, same)
    mixed = [f for f in everyone if len(set(f["builds"].values())) > 1 or f["broken"]]
    problem = ""
    if mixed:
        told = " beside ".join(f"{k} for {v}" for k, v in mixed[0]["builds"].items())
        problem = f"{mixed[0]['host']}: {mixed[0]['broken'] or told}"
    remedy = "install torch and torchvision together, from one index"
    row("torch's build", first["builds"].get("torch", "?"), problem, remedy)
    row(*gpu_row(everyone))
    low = [f for f in everyone if 0 < f["files"] < FILES_WANTED]
    problem = f"{low[0]['host']}: {low[0]['files']} open files" if low else ""
    row("file limit", str(first["files"]), problem, f"ulimit -n {FILES_WANTED} in LOCKSTEP_ENV")
    moments = [f["time"] for f in everyone]
    apart = max(moments) - min(moments)
    problem = f"{apart:.1f} s apart" if apart > CLOCK_SECONDS else ""
    row("clocks", f"within {apart:.1f} s", problem, "ask the administrator about chrony or ntp")
    for check, remedy in (
        ("run folder", "choose a --run-dir on a disk that all nodes share"),
        ("room", "free some space, or choose another --run-dir"),
        ("model and data", "on the login node: python -m data prepare --dataset NAME fetches it"),
    ):
        told = next((f[check] for f in everyone if f.get(check)), "")
        row(check, first.get(f"{check} fine", "fine"), told, remedy)
    return rows


def gpu_row(everyone: list[dict]) -> tuple[str, str, str, str]:
    asked, problem = everyone[0]["asked"], ""
    taken: dict[tuple, int] = {}
    for facts in everyone:
        if len(facts["gpus"]) != asked and not problem:
            problem = f"{facts['host']}: {asked} GPUs asked for, torch sees {len(facts['gpus'])}"
        if len(facts["gpus"]) > facts["local_rank"]:
            key = (facts["host"], facts["gpus"][facts["local_rank"]])
            if key in taken:
                problem = f"ranks {taken[key]} and {facts['rank']} share a GPU of {facts['host']}"
            taken[key] = facts["rank"]
    remedy = (
        "ask with --gpus (submit.py) or --gpus-per-node (sbatch); install a CUDA build of torch"
    )
    return "GPUs per node", str(asked), problem, remedy


def table(rows: list[tuple[str, str, str]]) -> str:
    width = max(len(row[0]) for row in rows)
    lines = []
    for check, told, remedy in rows:
        lines.append(f"{'NO' if remedy else 'ok':3} {check:{width}}  {told}")
        if remedy:
            lines.append(f"{'':{width + 6}}-> {remedy}")
    return "\n".join(lines)


def alone(facts: dict, told: str, remedy: str) -> int:
    """What one node finds, where the others cannot be asked."""
    rows = [*judge([{**facts, "time": time.time()}]), ("network", told, remedy)]
    findings = sum(bool(row[2]) for row in rows)
    print(
        f"preflight of {facts['host']} alone\n{table(rows)}\nNO GO: {findings} findings", flush=True
    )
    return 1


def main(argv: list[str]) -> int:
    own, arguments = argv, []
    if "--" in argv:
        own, arguments = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        prog="preflight.py", description=__doc__.splitlines()[0], allow_abbrev=False,
        epilog="What follows -- are train.py's flags; with them, model and data are tried too.",
    )  # fmt: skip
    parser.add_argument("--gpus", type=int, help="GPUs a node should have (default: SLURM's word)")
    parser.add_argument("--run-dir", default="runs", help="where the run will be kept")
    options = parser.parse_args(own)
    asked = options.gpus
    facts = own_facts(0)
    if asked is None:
        asked = int(os.environ.get("SLURM_GPUS_ON_NODE") or len(facts["gpus"]))
    facts["asked"] = asked
    folder = Path(options.run_dir)
    if facts["local_rank"] == 0 and arguments and not facts["broken"]:
        fine, told, parameters = try_trainer(arguments)
        facts["model and data"] = "" if fine else f"{facts['host']}: {told}"
        facts["model and data fine"] = "one step without network went well"
        free = shutil.disk_usage(existing(folder)).free
        need = parameters * 4 * 2 * CHECKPOINTS  # weights and momentum, 4 bytes each
        facts["room fine"] = f"{free / GIGABYTE:.0f} GB free, about {need / GIGABYTE:.1f} GB needed"
        facts["room"] = facts["room fine"] if free < need else ""
    elif not arguments:
        facts["model and data fine"] = facts["room fine"] = "not tried: no flags after --"
    try:
        if facts["broken"] and "torch" not in facts["builds"]:
            raise Unreachable("not tried: torch cannot be imported", "mend torch first")
        peers = Peers()
        facts["run folder"] = shared_folder(peers, folder)
        facts["run folder fine"] = f"{existing(folder)} is writable from all"
        facts["sum is right"], speed = peers.sum_known_numbers()
        peers.gather(None)  # so that all look at the clock together
        facts["time"] = time.time()
        everyone = peers.gather(facts)
    except Unreachable as error:
        return alone(facts, *error.args)
    except RuntimeError as error:
        return alone(
            facts, f"rank {facts['rank']} cannot talk to the others: {str(error).splitlines()[0]}",
            "check the firewall between the nodes, and GLOO_SOCKET_IFNAME "
            f"({os.environ.get('GLOO_SOCKET_IFNAME', 'not set')})",
        )  # fmt: skip
    rows = judge(everyone)
    told = (
        f"{peers.size} processes, {speed:.0f} MB/s over gloo" if peers.size > 1 else "one process"
    )
    wrong = [f["host"] for f in everyone if not f["sum is right"]]
    if wrong:
        told = f"the sum of known numbers is wrong on {', '.join(wrong)}"
    broken = "the network or its driver damages data: name it to the administrator" if wrong else ""
    rows.append(("all-reduce", told, broken))
    findings = sum(bool(row[2]) for row in rows)
    if peers.rank == 0:
        hosts = list(dict.fromkeys(f["host"] for f in everyone))
        print(f"preflight of {', '.join(hosts)}\n{table(rows)}")
        print(f"NO GO: {findings} findings" if findings else "GO", flush=True)
    if peers.size > 1:
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()
    return 1 if findings else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
