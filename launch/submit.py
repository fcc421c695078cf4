"""Submits a training job to SLURM, after checking its flags: all that needs no data and no node.

python launch/submit.py --nodes 2 --gpus 8 --time 4h -- --model vgg16 --dataset cifar10
python launch/submit.py --status 4711
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from submitted import HERE, Problem, as_it_was, keep, name_job, snapshot, status_of, tell
from sweep import read_rows

LEAD_SECONDS = 180  # of --signal in slurm.sbatch: the job saves that long before its limit
LEAD = re.compile(r"--signal=B:USR1@([1-9][0-9]{0,5})")  # another lead: the only such flag allowed
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+,-]*")
NODES = re.compile(r"([0-9]+)(?::([0-9]+))?")  # 4, or 1:4
GPUS = re.compile(r"(?:([A-Za-z0-9_.-]+):)?([0-9]+)")  # 8, or a100:8
ARRAY = re.compile(r"[0-9]+(-[0-9]+(:[1-9][0-9]*)?)?(,[0-9]+(-[0-9]+)?)*(%[1-9][0-9]*)?")
MANY = ("--sweep", "--seeds", "--folds")  # of train.py: several runs
OWN_FILES = ("--model", "--loss", "--optimizer")  # of train.py: FILE.py:Class, or a name
PATHS = ("--dataset", "--data-dir", "--weights", "--split", "--exclude", "--config", "--sweep",
         "--resume", *OWN_FILES)  # fmt: skip
NAMES = {"auto", "none", "imagenet", "folder", "cifar10", "digits", "synthetic", "line"}  # no paths
ONE_LOG = "--follow shows one log: follow an array's task with tail -F"
FEW = 4  # images a process, which keep no GPU busy
WAITING = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED"}
OWNED = (
    "--export",
    "--wrap",
    "--signal",
    "--requeue",
    "--no-requeue",
    "--open-mode",
    "--chdir",
    "--parsable",
)


def seconds(text: str, lead: int = LEAD_SECONDS) -> int:
    """`4h`, `3h50m`, `1d`, `240` (minutes), `4:00:00` or `1-12:00:00` as seconds."""
    if re.fullmatch(r"(\d+d)?(\d+h)?(\d+m)?(\d+s)?", text) and text:
        units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
        total = sum(int(n) * units[u] for n, u in re.findall(r"(\d+)([dhms])", text))
    elif found := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text):
        days, hours, minutes, rest = (int(part or 0) for part in found.groups())
        total = days * 86400 + hours * 3600 + minutes * 60 + rest
    else:
        total = 60 * int(text) if text.isdecimal() else 0
    if total <= lead:
        raise Problem(
            f"--time {text}: write 4h, 3h50m, 240 (minutes) or 1-12:00:00, and more than the "
            f"{lead} s the job keeps to save in"
        )
    return total


def lead_of(options: argparse.Namespace) -> int:
    """Seconds before its limit at which the job is told to save."""
    found = [LEAD.fullmatch(flag) for flag in options.sbatch]
    return next((int(match[1]) for match in found if match), LEAD_SECONDS)


def slurm_time(total: int) -> str:
    minutes = -(-total // 60)  # SLURM counts minutes
    return f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:00"


class Parser(argparse.ArgumentParser):
    """argparse whose help goes to stderr where stdout takes none."""

    def print_help(self, file: TextIO | None = None) -> None:
        if not tell(self.format_help().rstrip()):
            raise SystemExit(1)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="submit.py", description=__doc__ and __doc__.splitlines()[0], allow_abbrev=False,
        epilog="What follows -- are train.py's flags: python train.py --help",
    )  # fmt: skip
    parser.add_argument("--nodes", default="1", help="4; or 1:4, on what there is of four, and on "
                        "what is left where one is lost")  # fmt: skip
    parser.add_argument("--gpus", default="0", help="GPUs per node, one process each: 8, or a100:8")
    parser.add_argument("--tasks", type=int, default=1, help="processes per node without GPUs")
    parser.add_argument("--cpus", type=int, help="CPUs per process")
    parser.add_argument("--time", help="time limit: 4h, 3h50m, 1-12:00:00")
    parser.add_argument("--mem", help="memory per node: 64G")
    parser.add_argument("--name", default="lockstep")
    for name in ("partition", "account", "qos"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--constraint", help="as sbatch wants it: 'a100|h100'")
    parser.add_argument("--array", help="0-4: five seeds, or five rows of --sweep")
    parser.add_argument(
        "--sweep",
        help="rows or a grid (.yaml), as train.py "
        "--sweep takes them; or a file with one line of further flags per task",
    )
    parser.add_argument("--env", help="file the job sources first (module load, activate)")
    parser.add_argument("--python", help="the Python of the training environment")
    parser.add_argument("--snapshot", action="store_true", help="train the code as it is now, "
                        "whatever is edited while the job waits")  # fmt: skip
    parser.add_argument("--preflight", action="store_true", help="check the nodes before training")
    parser.add_argument("--sbatch", action="append", default=[], metavar="FLAG", help="a further "
                        "flag of sbatch, as --sbatch=--exclusive; may be repeated")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the command, submit nothing")
    parser.add_argument("--follow", action="store_true", help="show the log until the job ends")
    parser.add_argument("--status", metavar="JOB", help="which rows of a job ran, failed, wait")
    return parser


def read_counts(options: argparse.Namespace) -> list[str]:
    """--nodes and --gpus as numbers: `nodes` at most, `least`, `gpus` and their `gpu_type`."""
    problems = []
    if (found := NODES.fullmatch(options.nodes)) is None:
        problems.append(f"--nodes {options.nodes}: write 4, or 1:4 for one to four")
    least, most = (int(part or found[1]) for part in found.groups()) if found else (1, 1)
    if most < least:
        problems.append(f"--nodes {options.nodes}: the smaller number first, {most}:{least}")
    options.least, options.nodes = least, most
    if (found := GPUS.fullmatch(options.gpus)) is None:
        problems.append(f"--gpus {options.gpus}: write 8, or a100:8 for 8 of a kind (the names: "
                        "sinfo -o %G)")  # fmt: skip
    options.gpu_type, options.gpus = (found[1], int(found[2])) if found else (None, 0)
    return problems


def check(options: argparse.Namespace) -> None:
    """Every value that sbatch would take wrongly, or not at all."""
    problems = read_counts(options)
    for name in ("least", "tasks", "cpus"):
        value = getattr(options, name)
        if value is not None and value < 1:
            name = "nodes" if name == "least" else name
            problems.append(f"--{name} {value}: must be at least 1")
    if options.gpus and options.tasks not in (1, options.gpus):
        problems.append(f"--tasks {options.tasks}: with --gpus there is one process per GPU")
    for name in ("name", "partition", "account", "qos", "mem"):
        value = getattr(options, name)
        if value is not None and not NAME.fullmatch(value):
            problems.append(f"--{name} {value!r}: use letters, digits and . _ @ + , -")
    if options.constraint and not re.fullmatch(r"[\w.,&|*()\[\]:-]+", options.constraint, re.ASCII):
        problems.append(
            f"--constraint {options.constraint!r}: use letters, digits and . , & | * ( )"
        )
    if options.array and not ARRAY.fullmatch(options.array):
        problems.append(f"--array {options.array!r}: write 0-4, 0,2,5 or 0-9%2")
    if options.follow and (options.array or options.sweep):
        problems.append(ONE_LOG)
    for name in ("sweep", "env"):
        value = getattr(options, name)
        if value and not Path(value).is_file():
            problems.append(f"--{name} {value}: no such file")
    for flag in options.sbatch:
        if not flag.startswith("--") or any(c < " " for c in flag):
            problems.append(f"--sbatch {flag!r}: one flag of sbatch, as --sbatch=--exclusive")
        elif flag.partition("=")[0] in OWNED and not LEAD.fullmatch(flag):
            lead = "; to save earlier: --sbatch=--signal=B:USR1@600" if "signal" in flag else ""
            problems.append(f"--sbatch {flag}: launch/slurm.sbatch needs its own{lead}")
    if problems:
        raise Problem("\n".join(problems))


def check_python(python: str) -> None:
    """The job's Python has what training needs; looked up, not imported."""
    names = ("torch", "torchvision", "accelerate", "safetensors")
    look = f"from importlib.util import find_spec as f; print(*[n for n in {names} if not f(n)])"
    try:
        done = subprocess.run([python, "-c", look], capture_output=True, text=True)
    except OSError as error:
        raise Problem(f"--python {python}: {error.strerror}") from None
    if missing := done.stdout.split():
        raise Problem(
            f"{python} has no {', '.join(missing)}: activate the training environment and type the "
            "same again, or name its Python, --python /shared/venv/bin/python"
        )


def check_cpus(options: argparse.Namespace) -> None:
    """No node has so many CPUs: SLURM would only say that this is not available."""
    parts = options.gpus or options.tasks
    asked = (options.cpus or 1) * parts
    look = ["sinfo", "--noheader", "--Node", "--format=%c"]
    look += [f"--partition={options.partition}"] if options.partition else []
    try:
        done = subprocess.run(look, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return  # sbatch will say what it finds
    have = [int(word) for word in done.stdout.split() if word.isdecimal()]
    if have and asked > max(have):
        where = f" in partition {options.partition}" if options.partition else ""
        raise Problem(
            f"{parts} processes x --cpus {options.cpus or 1} are {asked} CPUs per node, and no "
            f"node{where} has more than {max(have)}"
        )


def warn_of_nodes(options: argparse.Namespace) -> str:
    """SLURM takes a job for more nodes than there are, and lets it wait; "" where there are."""
    if options.least == 1 or any(flag.startswith("--clusters") for flag in options.sbatch):
        return ""
    look = ["sinfo", "--noheader", "--summarize", "--format=%D"]
    look += [f"--partition={options.partition}"] if options.partition else []
    try:
        done = subprocess.run(look, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    have = max((int(word) for word in done.stdout.split() if word.isdecimal()), default=0)
    if not 0 < have < options.least:
        return ""
    where = "no partition has more than"
    if options.partition:
        where = f"partition {options.partition} has"
    return (
        f"warning: --nodes {options.least}, and {where} {have} nodes: the job waits until there "
        "are so many"
    )


def trainer_settings(arguments: list[str], python: str) -> dict[str, tuple[str, str]]:
    """name -> (value, origin) of one run."""
    found = resolved(arguments, python)
    return {name: (str(v), found["origins"][name]) for name, v in found["config"].items()}


def resolved(arguments: list[str], python: str) -> dict:
    """What `python -m config` makes of the flags; its errors are ours."""
    if any("\0" in word or "\n" in word or "\r" in word for word in arguments):
        raise Problem("a line break in train.py's flags: SLURM's tools do not all keep it; drop it")
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    command = [python, "-m", "config", "--json", *arguments]
    try:
        done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
    except OSError as error:
        raise Problem(f"--python {python}: {error.strerror}") from None
    if done.returncode:
        raise Problem(done.stderr.strip() or f"{shlex.join(command)} failed")
    return json.loads(done.stdout)


def check_settings(settings: dict, options: argparse.Namespace) -> None:
    """What only a job makes wrong: data or weights left to chance, a batch that does not divide."""
    if settings["dataset"][0] == "auto":
        raise Problem("name the data set, e.g. --dataset cifar10: a job does not take what it "
                      "happens to reach")  # fmt: skip
    if settings["model"][0] == "alexnet" and settings["weights"][0] == "auto":
        raise Problem("name alexnet's start, --weights none or --weights imagenet: a job does not "
                      "take what it happens to reach")  # fmt: skip
    if options.array and not options.sweep and settings["seed"][1] == "flag":
        raise Problem("--seed with --array would train the same run in every task: drop it (the "
                      "task's number is the seed), or use --sweep")  # fmt: skip
    if options.least < options.nodes and settings["shards"][0] == "auto":
        most = processes(options)
        raise Problem(f"--nodes {options.least}:{options.nodes} needs --shards, which a run keeps "
                      f"for life: at least {most} (as many processes as it may have), better a "
                      f"number that others divide, as {-(-most // 12) * 12}")  # fmt: skip
    threads = settings["threads"][0]
    if options.cpus and threads.isdigit() and int(threads) > options.cpus:
        raise Problem(f"--threads {threads} would take turns on --cpus {options.cpus} CPUs of each "
                      f"process: ask for --cpus {threads}, or use fewer threads")  # fmt: skip
    batch = settings["batch_size"][0]
    parts = processes(options) * int(settings["accumulate"][0])
    if typed("batch_size", settings) and settings["shards"][0] == "auto" and int(batch) % parts:
        low = int(batch) // parts * parts
        near = f"{low} and {low + parts} do" if low else f"{parts} does"
        raise Problem(f"--batch-size {batch} does not divide over {processes(options)} processes "
                      f"x --accumulate {settings['accumulate'][0]}; {near}")  # fmt: skip


def typed(name: str, settings: dict) -> bool:
    """Whether a person gave this setting, as a flag or in a file."""
    origin = settings[name][1]
    return origin == "flag" or origin.startswith("file")


def tasks_of(array: str) -> list[int]:
    """`0-9:3,12%2` as the numbers of its tasks."""
    numbers = []
    for part in array.partition("%")[0].split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        numbers += range(int(first), int(last or first) + 1, int(step or 1))
    return numbers


def check_rows(options: argparse.Namespace, many: dict, python: str) -> dict[int | None, dict]:
    """The settings of each row that is asked for, as far as a job makes them wrong."""
    options.array = options.array or f"0-{len(many['rows']) - 1}"
    options.sweep = options.sweep or many["folder"]  # for the job: there are rows
    found: dict[int | None, dict] = {}
    for task in tasks_of(options.array):
        if task >= len(many["rows"]):
            raise Problem(f"--array {options.array}: the rows are 0 to {len(many['rows']) - 1}, "
                          f"none for task {task}")  # fmt: skip
        row = many["rows"][task]
        found[task] = trainer_settings(row["words"], python)
        try:
            check_settings(found[task], options)
        except Problem as problem:
            raise Problem(f"row {task} ({row['name']}): {problem}") from None
    return found


def write(path: Path, text: str) -> None:
    """A file that a job will read, whole or not at all; its folder is made."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise Problem(f"{path} cannot be written: {error.strerror}") from None


def rehearsed(options: argparse.Namespace, settings: dict, runs: int) -> list[str]:
    """What --dry-run says of the job that it does not submit."""
    count, batch = processes(options), int(settings["batch_size"][0])
    kind, kinds = ("GPU", "GPUs") if options.gpus else ("process", "processes")
    each_node, share = options.gpus or options.tasks, batch / count
    each = f"{share:.0f}" if share.is_integer() else f"about {share:.1f}"
    limit = f"{options.time}, told {lead_of(options)} s before" if options.time else "the cluster's"
    nodes = f"{options.nodes} node{'s' * (options.nodes > 1)}"
    if options.least < options.nodes:
        nodes = f"{options.least} to {nodes}"
    lines = [
        "nothing was submitted (--dry-run)",
        f"runs       {runs}",
        f"processes  {count}: {nodes} x {each_node} {kind if each_node == 1 else kinds}",
        f"batch      {batch} = {count} x {each} images",
        f"limit      {limit}",
    ]
    if share <= FEW:
        lines.append(f"warning: {each} images are left for each {kind}: a larger --batch-size (and "
                     "--lr) or fewer of them")  # fmt: skip
    return lines


def check_array(
    options: argparse.Namespace, arguments: list[str], python: str
) -> dict[int | None, dict]:
    """The settings of each of an array's tasks, by number; every row's mistake is told."""
    for word in arguments:
        flag = word.replace("_", "-").partition("=")[0]
        if flag in ("--run-dir", "--resume"):
            raise Problem(f"{flag} with --array would give every task the same folder: drop it, "
                          "each task gets its own")  # fmt: skip
    if not options.sweep:
        settings = trainer_settings(arguments, python)
        check_settings(settings, options)
        return dict.fromkeys(tasks_of(options.array), settings)
    try:
        lines = read_rows(Path(options.sweep))
    except (OSError, ValueError) as error:
        raise Problem(f"--sweep: {error}") from None
    if not lines:
        raise Problem(f"--sweep {options.sweep}: holds no row")
    numbers, rows = list(lines), list(lines.values())
    options.array = options.array or f"0-{len(rows) - 1}"
    beyond = [task for task in tasks_of(options.array) if task >= len(rows)]
    if beyond:
        raise Problem(f"--array {options.array}: {options.sweep} has rows 0 to {len(rows) - 1}, "
                      f"none for task {beyond[0]}")  # fmt: skip
    found: dict[int | None, dict] = {}
    problems: list[str] = []
    folders: dict[str, int] = {}
    for task in tasks_of(options.array):
        place = f"{options.sweep}, line {numbers[task]} (row {task})"
        try:
            found[task] = trainer_settings([*arguments, *rows[task]], python)
            check_settings(found[task], options)
        except Problem as problem:
            problems.append(f"{place}: {problem}")
            continue
        folder = found[task].get("run_dir", ("None", ""))[0]
        if folder != "None":
            folder = str((HERE / folder).resolve())
            first = folders.setdefault(folder, task)
            if first != task:
                problems.append(
                    f"{options.sweep}, lines {numbers[first]} and {numbers[task]} (rows {first} "
                    f"and {task}) would train in one folder, {folder}; give each its own "
                    "--run-dir, or none"
                )
    if problems:
        more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise Problem("\n".join([*problems[:10], *more]))
    return found


def rows_asked_for(options: argparse.Namespace, arguments: list[str], python: str) -> dict | None:
    """What train.py's --sweep, --seeds and --folds make of the flags; None: they are one run.

    A sweep file of lines of flags is not theirs.
    """
    words = [word.replace("_", "-").partition("=")[0] for word in arguments]
    asked = any(flag in words for flag in MANY)
    if options.sweep and Path(options.sweep).suffix in (".yaml", ".yml"):
        if "--sweep" in words:
            raise Problem("--sweep stands before and after the --: drop one")
        arguments = [*arguments, "--sweep", str(Path(options.sweep).resolve())]
    elif not asked:
        return None
    elif options.sweep:
        raise Problem(f"--sweep {options.sweep} holds lines of flags, and {', '.join(MANY)} after "
                      "the -- make rows of their own: drop one, or write a .yaml file")  # fmt: skip
    rows = resolved(arguments, python)
    old = HERE / rows["folder"] / "sweep.json"
    if old.is_file():
        try:
            kept = json.loads(old.read_text(encoding="utf-8"))
            own, now = ([(row["name"], row["values"]) for row in of["rows"]] for of in (kept, rows))
            same = kept["base"] == rows["base"] and own == now[: len(own)]  # new ones are the last
        except (OSError, ValueError, KeyError, TypeError):
            raise Problem(f"{old} cannot be read; name another folder with --run-dir after the "
                          "--") from None  # fmt: skip
        if not same:
            raise Problem(f"{rows['folder']} holds other runs; name another folder with --run-dir "
                          "after the --")  # fmt: skip
    return rows


def seen_from_here(arguments: list[str]) -> list[str]:
    """train.py's flags for a job that starts in the repository: a path is meant as it is typed.

    What is not there where it is typed may be the repository's, as the runs are: it stays.
    """
    if Path.cwd() == HERE:
        return arguments
    words, flag = [], ""
    for word in arguments:
        before, value = "", word
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            before = flag + equals
        meant = path_of(flag.replace("_", "-"), value) if value else ""
        if meant != value:
            print(f"{flag} {value}: {meant}", file=sys.stderr)
        words.append(before + meant)
    return words


def path_of(flag: str, value: str) -> str:
    """A flag's value, as an absolute path where it names something by a relative one."""
    file, class_name = value, ""
    if flag in OWN_FILES:
        file, colon, name = value.partition(":")
        file, class_name = (file, colon + name) if file.endswith(".py") else ("", "")
    there = flag in PATHS and file and file not in NAMES and os.access(file, os.F_OK)
    if there or (flag == "--run-dir" and not file.startswith("~")):  # a new one is made there
        return str(Path(file).absolute()) + class_name
    return value


def from_here(path: str) -> str:
    """A path below the repository, to be typed where this was typed."""
    return path if Path.cwd() == HERE else str(HERE / path)


def processes(options: argparse.Namespace) -> int:
    return options.nodes * (options.gpus or options.tasks)


def warn_of_time(settings: dict, options: argparse.Namespace, runs: Path) -> str:
    """Whether an earlier run of the same kind says that the time limit is too short; '' if not."""
    if not options.time:
        return ""
    limit = seconds(options.time, lead_of(options)) - lead_of(options)
    like = {name: settings[name][0] for name in ("model", "dataset", "image_size")}
    summaries = sorted(runs.glob("*/summary.json"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in summaries:
        if path.parent.is_symlink():  # runs/latest: it has a name of its own
            continue
        try:
            config = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))["config"]
            if any(str(config[name]) != value for name, value in like.items()):
                continue
            need = seconds_needed(path.parent, int(config["batch_size"]), settings)
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
            continue
        if need > limit:
            return (
                f"warning: at the speed of {path.parent} (which may have had other devices), "
                f"this run takes about {need / 3600:.1f} h, more than --time "
                f"{options.time}; the job will save and requeue itself about "
                f"{int(need // limit)} times"
            )
        return ""
    return ""


def warn_of_disks(options: argparse.Namespace, arguments: list[str], python: str) -> list[str]:
    """What the other nodes of a job may not see."""
    if options.nodes == 1:
        return []
    return [f"warning: {text}" for text in resolved(arguments, python)["own_disks"]]


def seconds_needed(run: Path, batch: int, settings: dict) -> float:
    """What these settings would take at that run's speed.

    Its start-up and what else was no step count once, as it did there: a run of two steps is
    nearly all start-up. The evaluations of further epochs are left out.
    """
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    rows = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    speeds = [json.loads(row).get("speed/images_per_second") for row in rows]
    speeds = sorted(speed for speed in speeds if speed)
    step = batch / speeds[len(speeds) // 2] if speeds else 0.0
    if not step:
        raise ValueError("no row tells a speed")
    trained = min(step * summary["step"], summary["seconds"])
    steps = summary["step"] / summary["epoch"] * float(settings["epochs"][0])
    if settings["max_steps"][0] != "None":
        asked = int(settings["max_steps"][0])  # the length, unless --epochs was typed too
        steps = min(steps, asked) if typed("epochs", settings) else asked
    return step * steps + (summary["seconds"] - trained)


def sbatch_command(options: argparse.Namespace, arguments: list[str]) -> list[str]:
    log = "runs/slurm-%A_%a.log" if options.array else "runs/slurm-%j.log"
    nodes = str(options.nodes)
    if options.least < options.nodes:
        nodes = f"{options.least}-{options.nodes}"
    command = ["sbatch", "--parsable", f"--job-name={options.name}", f"--nodes={nodes}"]
    command += [f"--ntasks-per-node={options.gpus or options.tasks}", f"--output={log}"]
    command.append("--export=ALL")  # some sites set SBATCH_EXPORT=NONE: no Python would be found
    if options.gpus:
        kind = f"{options.gpu_type}:" if options.gpu_type else ""
        command.append(f"--gpus-per-node={kind}{options.gpus}")
    if options.cpus:
        command.append(f"--cpus-per-task={options.cpus}")
    if options.time:
        command.append(f"--time={slurm_time(seconds(options.time, lead_of(options)))}")
    for name in ("mem", "partition", "account", "qos", "constraint", "array"):
        if getattr(options, name):
            command.append(f"--{name}={getattr(options, name)}")
    return [*command, *options.sbatch, "launch/slurm.sbatch", *arguments]


def job_environment(options: argparse.Namespace, kept: Path | None) -> dict[str, str]:
    """What slurm.sbatch reads from the environment, which sbatch carries along.

    `kept` holds what the job shall find as it is now, however long it waits.
    """
    sweep = options.sweep and (kept / "sweep.txt" if kept else Path(options.sweep).resolve())
    given = {
        "LOCKSTEP_ENV": options.env and str(Path(options.env).resolve()),
        "LOCKSTEP_ENV_KEPT": options.env and kept and str(kept / "env.sh"),
        "LOCKSTEP_SWEEP": sweep and str(sweep),
        "LOCKSTEP_CODE": str(kept / "code") if kept and options.snapshot else "",
        "LOCKSTEP_PYTHON": options.python or ("" if options.env else sys.executable),
        "LOCKSTEP_PREFLIGHT": "1" if options.preflight else "",
        "LOCKSTEP_LEAST": str(options.least) if options.least < options.nodes else "",
    }
    return {name: value for name, value in given.items() if value}


def without(own: list[str], names: tuple[str, ...] = ("--array", "--sweep")) -> list[str]:
    """submit.py's own words without these options and their values: one task goes on alone."""
    kept, skip = [], False
    for word in own:
        if not skip and word.partition("=")[0] not in names:
            kept.append(word)
        skip = not skip and word in names
    return kept


def follow(job: str, log: Path, run: Path) -> int:
    """Print the log as it grows, until the job has ended: 0 if it did so well. Ctrl-C leaves it.

    SLURM forgets a job minutes after its end: then the run's own status decides.
    """
    shown = 0
    while True:
        asked = ["squeue", "--noheader", "--jobs", job, "--states=all", "--format=%T"]
        queue = subprocess.run(asked, capture_output=True, text=True)
        states = set(queue.stdout.split())
        silent = queue.returncode and "Invalid job id" not in queue.stderr  # a busy controller
        over = not silent and not states & WAITING
        if log.is_file():
            with log.open("rb") as file:
                file.seek(shown)
                new = file.read()
            shown += len(new)
            sys.stdout.buffer.write(new)
            sys.stdout.flush()
        if over:
            if states:
                print(f"job {job}: {', '.join(sorted(states))}")
                return 0 if states == {"COMPLETED"} else 1
            try:
                status = json.loads((run / "status.json").read_text(encoding="utf-8"))["status"]
            except (OSError, ValueError, KeyError, TypeError):
                status = "no status"
            print(f"job {job}: has left the queue; {run / 'status.json'} says: {status}")
            return 0 if status == "finished" else 1
        time.sleep(2)


@dataclass(frozen=True)
class Job:
    """What is asked for, checked: submit.py's own words, train.py's, and the settings of each task.

    A job that is one run has one task, None. `many` holds the rows of a sweep, seeds or folds.
    """

    own: list[str]
    options: argparse.Namespace
    python: str
    arguments: list[str]
    each: dict[int | None, dict]
    many: dict | None

    @property
    def folders(self) -> dict[int | None, str]:
        """The run folders that the flags name."""
        return {
            task: found["run_dir"][0] for task, found in self.each.items()
            if found.get("run_dir", ("None", ""))[0] != "None"
        }  # fmt: skip

    @property
    def rows(self) -> list[str]:
        """The flags of each row, as a line."""
        first = len(self.arguments)
        return [shlex.join(row["words"][first:]) for row in self.many["rows"]] if self.many else []


def asked(own: list[str], arguments: list[str], options: argparse.Namespace) -> Job:
    """The job of these words. Raises Problem for the first mistake."""
    if not arguments:
        raise Problem("train.py's flags are missing: submit.py --nodes 1 --gpus 8 -- --model "
                      "resnet18 --dataset cifar10")  # fmt: skip
    arguments = seen_from_here(arguments)
    check(options)
    python = options.python or sys.executable
    if not options.env:  # else it is that file that finds the job's Python
        check_python(python)
    many = rows_asked_for(options, arguments, python)
    each: dict[int | None, dict]
    if many is not None:
        if options.follow:
            raise Problem(ONE_LOG)
        arguments = many["base"]
        each = check_rows(options, many, python)
    elif options.array or options.sweep:
        each = check_array(options, arguments, python)
    else:
        each = {None: trainer_settings(arguments, python)}
        check_settings(each[None], options)
    return Job(own, options, python, arguments, each, many)


def kept_for(job: Job, undo: contextlib.ExitStack) -> Path:
    """What the job shall find as it is now, however long it waits; `undo` leaves nothing of it."""
    options, many = job.options, job.many
    check_cpus(options)
    kept = keep(options.sweep if many is None else None, options.env, undo)
    if many is not None:
        write(kept / "sweep.txt", "\n".join(job.rows) + "\n")
        sweep = as_it_was(undo, HERE / many["folder"] / "sweep.json")
        write(sweep, json.dumps(many, indent=2) + "\n")
    if options.snapshot:
        snapshot(kept / "code", list(job.folders.values()), undo)
    return kept


def submitted(job: Job, number: str) -> int:
    """Say what is to be known of a job that the cluster has taken; follow it, where asked."""
    options, own, task = job.options, job.own, next(iter(job.each))
    name = number if task is None else f"{number}_{task}"  # an array's first: it can be pasted
    log, program = from_here(f"runs/slurm-{name}.log"), from_here("launch/submit.py")
    run = from_here(job.folders.get(task, f"runs/slurm-{name}"))
    others = "" if len(job.each) == 1 else f"     task {task}; the last is _{list(job.each)[-1]}"
    again = shlex.join(["python", program, *without(own), "--", "--resume", run])
    code = "as it is now" if options.snapshot else "as it will be when the job starts (--snapshot "
    code += "" if options.snapshot else "keeps it as it is now)"
    tell(f"job     {number}")
    tell(f"code    {code}")
    tell(f"log     {log}{others}")
    tell(f"follow  tail -F {shlex.quote(log)}")
    tell(f"status  {shlex.join(['python', program, '--status', number])}")
    tell(f"stop    scancel {number}     saves, and does not requeue")
    tell(f"go on   {again}")
    if options.follow:
        try:
            return follow(number, HERE / log, HERE / run)
        except (KeyboardInterrupt, BrokenPipeError):  # a person, or the reader of our output
            tell(f"\nthe job runs on; scancel {number} stops it")
    return 0


def submit(argv: list[str]) -> int:
    """From the words to the job: check, keep, tell, hand over."""
    cut = argv.index("--") if "--" in argv else len(argv)
    own, arguments = argv[:cut], argv[cut + 1 :]
    options, other = build_parser().parse_known_args(own)
    if other:
        raise Problem(f"{shlex.join(other)}: not submit.py's; what is train.py's stands after --, "
                      "as in launch/submit.py --time 4h -- --model alexnet --dataset cifar10; "
                      "launch/submit.py --help lists the others")  # fmt: skip
    if options.status is not None:
        return status_of(options.status)
    job = asked(own, arguments, options)
    with contextlib.ExitStack() as undo:
        return hand_over(job, None if options.dry_run else kept_for(job, undo), undo)


def hand_over(job: Job, kept: Path | None, undo: contextlib.ExitStack) -> int:
    """Give the job to SLURM, tell of it; where nothing is kept, only tell."""
    options = job.options
    command, env = sbatch_command(options, job.arguments), job_environment(options, kept)
    settings = next(iter(job.each.values()))
    warnings = [warn_of_time(settings, options, HERE / "runs"), warn_of_nodes(options)]
    for text in filter(None, (*warnings, *warn_of_disks(options, job.arguments, job.python))):
        print(text, file=sys.stderr)
    if kept is None:
        if job.many:
            env.pop("LOCKSTEP_SWEEP")  # written where it is submitted
        for row, line in zip(job.many["rows"] if job.many else (), job.rows, strict=True):
            tell(f"row {row['row']:<4}   {line}")
        for line in rehearsed(options, settings, len(job.each)):
            tell(line)
    shown = " ".join(f"{name}={shlex.quote(value)}" for name, value in env.items())
    tell(f"{shown} {shlex.join(command)}".strip())  # last, for what reads it
    if kept is None:
        return 0
    undo = undo.pop_all()  # an interrupt may come when the job is in the queue
    try:
        done = subprocess.run(
            command, cwd=HERE, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True
        )
    except FileNotFoundError:
        undo.close()
        raise Problem("sbatch is not here: submit from a login node of the cluster") from None
    if done.returncode:
        undo.close()
        return 1
    number = done.stdout.strip().partition(";")[0]
    name_job(kept, number, [task for task in job.each if task is not None], job.folders)
    return submitted(job, number)


def main(argv: list[str]) -> int:
    try:
        return submit(argv)
    except Problem as problem:
        print(problem, file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
