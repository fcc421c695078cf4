"""Checks the nodes before a run: one table, a remedy per finding, go (0) or no go (1).

Alone:             python launch/preflight.py -- --model resnet18 --dataset cifar10
In an allocation:  LOCKSTEP_PREFLIGHT=1 sbatch ... launch/slurm.sbatch, or
                   python launch/submit.py --preflight ...
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

HERE = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "accelerate", "datasets", "safetensors", "numpy")
FILES_WANTED = 4096  # open files: sockets to every rank, data files, shared memory
CLOCK_SECONDS = 5.0  # apart by more, locks and heartbeats on a shared disk look stale
REACH_SECONDS = 60.0  # for an answer of the head node, and in each collective
TRY_SECONDS = 600.0  # one step of the command: torch from a slow disk, CUDA's start, the data
GPU_SECONDS = 180.0  # torch and CUDA again, a product, NCCL's connections
TRY_GPU = [sys.executable, str(Path(__file__).resolve()), "--try-gpu"]
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
        "cards": [],
        "kernels": [],
        "cuda": "",
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
        with warnings.catch_warnings(record=True) as caught:  # a driver that is too old, say
            warnings.simplefilter("always")
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        facts["cuda"] = str(caught[0].message).splitlines()[0] if caught and not count else ""
        cards = [torch.cuda.get_device_properties(i) for i in range(count)]
        facts["gpus"] = [str(card.uuid) for card in cards]
        facts["cards"] = [(card.name, card.major, card.minor) for card in cards]
        facts["kernels"] = torch.cuda.get_arch_list() if count else []
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
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TRY_SECONDS)
    except subprocess.TimeoutExpired:
        return False, f"no answer from train.py --dry-run in {TRY_SECONDS:.0f} s", 0
    except OSError as error:
        return False, str(error), 0
    found = re.search(r"([\d,]+) parameters", done.stdout)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    message = lines[-1] if lines else f"exit status {done.returncode}"
    parameters = int(found[1].replace(",", "")) if found else 0
    return done.returncode == 0, message, parameters


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is already there."""
    for place in (folder.absolute(), *folder.absolute().parents):
        with suppress(OSError):  # a folder that may not be looked into
            if place.is_dir():
                return place
    return Path("/")


class Unreachable(Exception):
    """The others cannot be spoken to; holds what was found and the remedy."""


class Peers:
    """The other processes of the launch; alone, everything is its own."""

    def __init__(self, host: str):
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.host = host
        if self.size == 1:
            return
        import torch.distributed as dist

        head, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.reach(head, port)
        limit = timedelta(seconds=TRY_SECONDS + REACH_SECONDS)
        self.store = dist.TCPStore(
            head, port, self.size, self.rank == 0, timeout=limit, wait_for_workers=False
        )
        self.meet("started", TRY_SECONDS + REACH_SECONDS)
        dist.init_process_group(
            "gloo", store=dist.PrefixStore("gloo", self.store), rank=self.rank,
            world_size=self.size, timeout=timedelta(seconds=REACH_SECONDS),
        )  # fmt: skip

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
        began = spoke = time.monotonic()
        while True:
            try:
                socket.create_connection((head, port), timeout=5).close()
                return
            except OSError as error:
                # Refused: the host answers, and rank 0 there may still be loading torch.
                refused = isinstance(error, ConnectionRefusedError)
                now = time.monotonic()
                if now - began > REACH_SECONDS + (TRY_SECONDS if refused else 0):
                    raise Unreachable(
                        f"{self.host} cannot reach the head node at {head}:{port} ({error})",
                        "check that it is the head node's address, that rank 0 runs there, and "
                        "that no firewall stands between",
                    ) from None
                if now - spoke > 60:
                    spoke = now
                    say(f"{self.host} waits for the head node at {head}:{port} ({error})")
                time.sleep(0.5)

    def meet(self, event: str, limit: float) -> None:
        """Wait until this has happened on all ranks; who is missing is told each minute.

        Over the store, since nodes may come minutes apart and a collective's limit is short.
        """
        if self.size == 1:
            return
        self.store.set(f"{event}/{self.rank}", self.host)
        if self.rank == 0:
            problem = self.missing(event, limit)
            self.store.set(event, problem)
        else:
            self.store.wait([event], timedelta(seconds=limit + REACH_SECONDS))
            problem = self.store.get(event).decode()
        if problem:
            time.sleep(1)  # the store ends with rank 0: let the others read it
            raise Unreachable(problem, "look at the log for what these ranks said, and at their "
                              "nodes; --sbatch=--exclude=NODE avoids one")  # fmt: skip

    def missing(self, event: str, limit: float) -> str:
        """Which ranks this has not happened on within the limit, or ''."""
        waiting = [f"{event}/{rank}" for rank in range(self.size)]
        began = spoke = time.monotonic()
        while not self.store.check(waiting):
            now = time.monotonic()
            over = now - began > limit
            if over or now - spoke > 60:
                spoke = now
                ranks = [r for r, key in enumerate(waiting) if not self.store.check([key])]
                lost = f"{len(ranks)} of {self.size} ranks have not {event}: {ranks[:8]}"
                if over:
                    return f"{lost} after {now - began:.0f} s"
                say(f"{self.host} waits: {lost}")
            time.sleep(0.2)
        return ""

    def gather(self, mine: T) -> list[T]:
        if self.size == 1:
            return [mine]
        import torch.distributed as dist

        everyone = [mine] * self.size
        dist.all_gather_object(everyone, mine)
        return everyone

    def sum_known_numbers(self) -> tuple[bool, float]:
        return known_sum(self.rank, self.size, 2**22, "cpu") if self.size > 1 else (True, 0.0)


def known_sum(rank: int, size: int, count: int, device: "torch.device | str") -> tuple[bool, float]:
    """All-reduce so many known integers: (right, megabytes per second)."""
    import torch
    import torch.distributed as dist

    base = torch.arange(count, device=device, dtype=torch.float32) % 1024
    numbers = base + rank
    want = base * size + size * (size - 1) / 2
    dist.all_reduce(first := torch.zeros(1, device=device))  # connects
    first.item()
    began = time.monotonic()
    dist.all_reduce(numbers)
    numbers[:1].item()  # a GPU has it later than the call returns
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
        problem = f"rank {peers.rank} on {peers.host} cannot write {place}: {error.strerror}"
    peers.gather(None)
    lost = list(range(peers.size))
    with suppress(OSError):  # a folder that may not be looked into: all are lost
        lost = [r for r in lost if not (place / f".preflight-{token}-{r}").is_file()]
    peers.gather(None)
    with suppress(OSError):  # a read-only disk refuses even to remove what is not there
        mine.unlink()
    if not problem and lost:
        problem = (
            f"rank {peers.rank} on {peers.host} does not see in {place} what ranks {lost} wrote"
        )
    # Who cannot write knows more than who does not see it.
    problems = sorted(filter(None, peers.gather(problem)), key=lambda text: "cannot" not in text)
    return problems[0] if problems else ""


def try_gpu(backend: str = "nccl", kind: str = "cuda") -> None:
    """One rank's GPU: a product, then one all-reduce with all the others; a line for each.

    In a process of its own: a broken driver or network hangs below Python, or aborts.
    """
    import torch
    import torch.distributed as dist

    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")) if kind == "cuda" else 0)
    store: dist.Store = dist.HashStore()
    try:
        torch.cuda.set_device(device)
        ones = torch.ones(1024, 1024, device=device)
        right = bool((ones @ ones == 1024).all())
        print(json.dumps({"product": right}), flush=True)
        if size > 1:
            place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            limit = timedelta(seconds=GPU_SECONDS)
            store = dist.TCPStore(*place, size, False, timeout=limit, wait_for_workers=False)
        dist.init_process_group(
            backend, store=dist.PrefixStore("gpu", store), rank=rank, world_size=size,
            timeout=timedelta(seconds=REACH_SECONDS),
        )  # fmt: skip
        right, speed = known_sum(rank, size, 2**24, device)
        print(json.dumps({"sum": right, "speed": speed}), flush=True)
        store.set(f"gpu sum/{rank}", "done")  # who leaves early breaks the others' connections
        store.wait([f"gpu sum/{r}" for r in range(size)], timedelta(seconds=REACH_SECONDS))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print(json.dumps({"error": f"{type(error).__name__}: {' '.join(lines[:3])}"}), flush=True)
    os._exit(0)  # what NCCL would still like to tell or to wait for


def gpu_facts() -> dict:
    """What try_gpu() said: product and sum right or not, MB/s, or an error in words."""
    try:
        process = subprocess.Popen(
            TRY_GPU, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
    except OSError as error:
        return {"error": str(error)}
    out, ended = "", "no answer"
    try:
        out, err = process.communicate(timeout=GPU_SECONDS)
        telling = [line for line in err.splitlines() if re.search("error|timeout|NCCL", line, re.I)]
        ended = telling[-1].strip()[:300] if telling else f"exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        ended = f"no answer in {GPU_SECONDS:.0f} s"
        with suppress(subprocess.TimeoutExpired):  # stuck in the driver: not even killed
            out, _ = process.communicate(timeout=5)
    found: dict = {}
    for line in out.splitlines():
        with suppress(ValueError, TypeError):  # not ours
            found |= json.loads(line)
    if "sum" not in found and "error" not in found:
        found["error"] = ended
    return found


def differing(everyone: list[dict], value_of: Callable[[dict], object]) -> str:
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
        message = " beside ".join(f"{k} for {v}" for k, v in mixed[0]["builds"].items())
        problem = f"{mixed[0]['host']}: {mixed[0]['broken'] or message}"
    remedy = "install torch and torchvision together, from one index"
    row("torch's build", first["builds"].get("torch", "?"), problem, remedy)
    row(*gpu_row(everyone))
    if any(f["gpus"] for f in everyone):
        row(*kernels_row(everyone))
        row(*product_row(everyone))
        row(*nccl_row(everyone))
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
        message = next((f[check] for f in everyone if f.get(check)), "")
        row(check, first.get(f"{check} fine", "fine"), message, remedy)
    return rows


def gpu_row(everyone: list[dict]) -> tuple[str, str, str, str]:
    asked, problem = everyone[0]["asked"], ""
    taken: dict[tuple, int] = {}
    for facts in everyone:
        if len(facts["gpus"]) != asked and not problem:
            problem = f"{facts['host']}: {asked} GPUs asked for, torch sees {len(facts['gpus'])}"
            problem += f" ({facts['cuda']})" if facts["cuda"] else ""
        if len(facts["gpus"]) > facts["local_rank"]:
            key = (facts["host"], facts["gpus"][facts["local_rank"]])
            if key in taken:
                problem = f"ranks {taken[key]} and {facts['rank']} share a GPU of {facts['host']}"
            taken[key] = facts["rank"]
    remedy = (
        "ask with --gpus (submit.py) or --gpus-per-node (sbatch); install a CUDA build of torch"
    )
    return "GPUs per node", str(asked), problem, remedy


def has_kernels(major: int, minor: int, kernels: list[str]) -> bool:
    """Whether a torch built for these architectures runs on a GPU of this compute capability."""
    built = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name) for name in kernels]
    if None in built or not built:  # another vendor's names
        return True
    for found in filter(None, built):
        have = int(found[2]), int(found[3])
        if found[4] == "a":
            fits = have == (major, minor)
        elif found[1] == "sm" or found[4]:  # within one major version, upwards
            fits = have[0] == major and have[1] <= minor
        else:  # the driver translates it for whatever is newer
            fits = have <= (major, minor)
        if fits:
            return True
    return False


def kernels_row(everyone: list[dict]) -> tuple[str, str, str, str]:
    kernels, problem = next(f["kernels"] for f in everyone if f["gpus"]), ""
    fine: dict[str, None] = {}
    for facts in everyone:
        for name, major, minor in facts["cards"]:
            fine[f"{name} (sm_{major}{minor})"] = None
            if not problem and not has_kernels(major, minor, facts["kernels"]):
                problem = (
                    f"{facts['host']}: {name} is sm_{major}{minor}, this torch has kernels for "
                    f"{' '.join(facts['kernels'])}"
                )
    remedy = (
        "install a torch build that has it: for an older GPU one of an older CUDA, for a newer "
        f"GPU a newer torch (here {everyone[0]['builds'].get('torch', '?')})"
    )
    return "GPU's kernels", ", ".join(fine) or " ".join(kernels), problem, remedy


def place_of(facts: dict) -> str:
    return f"rank {facts['rank']} on {facts['host']}"


def product_row(everyone: list[dict]) -> tuple[str, str, str, str]:
    """Each rank's GPU computes; where one rank has none, nothing was tried."""
    bad = [f for f in everyone if f.get("gpu") and not f["gpu"].get("product")]
    problem = ""
    if bad:
        message = bad[0]["gpu"].get("error") or "a product of known numbers is wrong"
        problem = f"{place_of(bad[0])}: {message}"
    fine = "each computes" if everyone[0].get("gpu") else "not tried"
    remedy = (
        "nvidia-smi on that node; a GPU that fails there too: name it to the administrator, "
        "--sbatch=--exclude=NODE avoids it"
    )
    return "GPU's product", fine, problem, remedy


def nccl_row(everyone: list[dict]) -> tuple[str, str, str, str]:
    tried = [f for f in everyone if f.get("gpu")]
    if not tried or any(not f["gpu"].get("product") for f in tried):
        return "NCCL", "not tried: first each process needs a GPU that computes", "", ""
    bad = [f for f in tried if not f["gpu"].get("sum")]
    bad.sort(key=lambda f: f["gpu"].get("error", "").startswith("no answer"))  # a victim, mostly
    problem = ""
    if bad:
        message = bad[0]["gpu"].get("error") or "the sum of known numbers is wrong"
        problem = f"{place_of(bad[0])}: {message}"
    speed = min(f["gpu"].get("speed", 0.0) for f in tried)
    remedy = (
        "in LOCKSTEP_ENV: export NCCL_DEBUG=INFO, and NCCL_SOCKET_IFNAME=eth0, the interface "
        f"between the nodes (here {os.environ.get('NCCL_SOCKET_IFNAME', 'not set')}); if "
        "NCCL_IB_DISABLE=1 or NCCL_P2P_DISABLE=1 mends it, InfiniBand or the way between the "
        "GPUs is broken"
    )
    return "NCCL", f"{len(everyone)} processes, {speed:.0f} MB/s", problem, remedy


def say(text: str) -> None:
    print(f"lockstep: {text}", file=sys.stderr, flush=True)


def table(rows: list[tuple[str, str, str]]) -> str:
    width = max(len(row[0]) for row in rows)
    lines = []
    for check, message, remedy in rows:
        lines.append(f"{'NO' if remedy else 'ok':3} {check:{width}}  {message}")
        if remedy:
            lines.append(f"{'':{width + 6}}-> {remedy}")
    return "\n".join(lines)


def trial_facts(arguments: list[str], folder: Path, host: str) -> dict[str, str]:
    """One step of the command on this node, and whether its checkpoints will find room."""
    fine, message, parameters = try_trainer(arguments)
    facts = {
        "model and data": "" if fine else f"{host}: {message}",
        "model and data fine": "one step without network went well",
    }
    place = existing(folder)
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return facts | {"room": f"{host} cannot tell the room in {place}: {error.strerror}"}
    need = parameters * 4 * 2 * CHECKPOINTS  # weights and momentum, 4 bytes each
    room = f"{free / GIGABYTE:.0f} GB free, about {need / GIGABYTE:.1f} GB needed"
    return facts | {"room fine": room, "room": room if free < need else ""}


def alone(facts: dict, message: str, remedy: str) -> int:
    """What one node finds, where the others cannot be asked."""
    rows = [*judge([{**facts, "time": time.time()}]), ("network", message, remedy)]
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
        prog="preflight.py", description=__doc__ and __doc__.splitlines()[0], allow_abbrev=False,
        epilog="What follows -- are train.py's flags; with them, model and data are tried too.",
    )  # fmt: skip
    parser.add_argument("--gpus", type=int, help="GPUs a node should have (default: SLURM's word)")
    parser.add_argument("--run-dir", default="runs", help="where the run will be kept")
    parser.add_argument("--try-gpu", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(own)
    if options.try_gpu:
        try_gpu()
    asked = options.gpus
    facts = own_facts(0)
    if asked is None:
        asked = int(os.environ.get("SLURM_GPUS_ON_NODE") or len(facts["gpus"]))
    facts["asked"] = asked
    folder = Path(options.run_dir)
    facts["model and data fine"] = facts["room fine"] = (
        "not tried" if arguments else ("not tried: no flags after --")
    )
    try:
        if facts["broken"] and "torch" not in facts["builds"]:
            raise Unreachable("not tried: torch cannot be imported", "mend torch first")
        peers = Peers(facts["host"])  # first: what follows may take minutes on one node alone
        if facts["local_rank"] == 0 and arguments and not facts["broken"]:
            facts |= trial_facts(arguments, folder, facts["host"])
        peers.meet("tried the command", TRY_SECONDS + REACH_SECONDS)
        if all(peers.gather(len(facts["gpus"]) > facts["local_rank"])):
            facts["gpu"] = gpu_facts()
            peers.meet("tried their GPUs", GPU_SECONDS + REACH_SECONDS)
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
            "read what the other nodes said; if they said nothing, check the firewall between them "
            f"and GLOO_SOCKET_IFNAME ({os.environ.get('GLOO_SOCKET_IFNAME', 'not set')})",
        )  # fmt: skip
    rows = judge(everyone)
    message = (
        f"{peers.size} processes, {speed:.0f} MB/s over gloo" if peers.size > 1 else "one process"
    )
    wrong = [f["host"] for f in everyone if not f["sum is right"]]
    if wrong:
        message = f"the sum of known numbers is wrong on {', '.join(wrong)}"
    broken = "the network or its driver damages data: name it to the administrator" if wrong else ""
    rows.append(("all-reduce", message, broken))
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
