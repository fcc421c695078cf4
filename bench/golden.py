"""Did a number move? `python -m bench.golden` runs small trainings and compares every bit.

The golden runs guard changes of structure: they drive `python train.py FLAGS` from outside and
read metrics.jsonl and safetensors files, so they outlive every module. Where values of this kind of
machine are stored (tests/golden), those are compared; elsewhere, or with --beside, the golden
commit itself is taken from the clone's history and run beside this tree, on the same machine. Bits,
never a tolerance: another instruction set alone moves a loss by 5e-3 after 13 steps.

A change that means to move numbers says so and renews them, once it is committed:
`python -m bench.golden --renew` prints what changed. Exit status 0: equal; 1: something differs;
2: nothing could be compared.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common.disk import Json
from launch.preloaded import Interpreter, Launched

REPOSITORY = Path(__file__).resolve().parent.parent
VALUES = REPOSITORY / "tests" / "golden"
ALWAYS = "--threads 1 --seed 0 --weights none --log-every 1 --no-plots --checkpoint-every 100"
DIGITS = "--dataset digits --limit 12 --epochs 2"
# Name -> flags, and the numbers of processes. Recipes are left alone: they are numbers, too.
RUNS = {
    "alexnet": (f"--model alexnet {DIGITS} --batch-size 6 --stop-after 2 --image-size 64", (1, 2)),
    "resnet18": (
        f"--model resnet18 {DIGITS} --batch-size 6 --stop-after 3 --image-size 16 --shards 6 "
        "--ema 0.9", (1, 3),
    ),
    "speednet": (
        f"--model speednet {DIGITS} --batch-size 12 --stop-after 2 --image-size 16 "
        "--optimizer muon", (1, 2),
    ),
    "line": ("--model linear_regression --dataset line --epochs 4 --stop-after 8", (1, 2, 3)),
    "mixup": (
        "--model my_cnn --dataset synthetic --limit 48 --epochs 2 --stop-after 8 --image-size 16 "
        "--batch-size 12 --augment crop --mixup 0.4 --label-smoothing 0.1", (1, 3),
    ),
    "bitwise": (
        f"--model my_cnn --bitwise {DIGITS} --batch-size 6 --image-size 16 --shards 6", (1, 2, 3),
    ),
}  # fmt: skip
CLOCKS = ("speed/", "system/", "time")  # keys of a row that clock or machine decide
# What the caller's launcher or shell may have set and would make it another run.
LAUNCHERS = ("ACCELERATE_", "LOCKSTEP_", "SLURM_", "TORCHELASTIC_", "MASTER_")
RANKS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK"}
SHOWN = 3  # tensors named per run

Values = dict[str, dict]  # run -> {"rows": [...], "tensors": {name: [digest, norm, sum]}}


def names(only: list[str] | None = None) -> dict[str, tuple[str, int]]:
    """Name of each run -> its flags and its number of processes."""
    return {
        f"{name} on {count}": (flags, count)
        for name, (flags, counts) in RUNS.items()
        for count in counts
        if not only or name in only or f"{name} on {count}" in only
    }


# --- running -------------------------------------------------------------------------------------


class Runner:
    """Runs trees side by side; with `with`, so that nothing it started outlives an interruption."""

    def __init__(self) -> None:
        env = {
            name: value for name, value in os.environ.items()
            if name not in RANKS and not name.startswith(LAUNCHERS)
        }  # fmt: skip
        env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        env |= {"ACCELERATE_USE_CPU": "true", "LOCKSTEP_TIMEOUT": "300"}
        self.interpreter = Interpreter(env)
        self.kind = self.interpreter.kind

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *exception: object) -> None:
        self.interpreter.close()

    def measure(self, trees: list[Path], runs: dict[str, tuple[str, int]]) -> list[Values]:
        """The values of the runs in each tree, as many side by side as there are cores."""
        found: list[Values] = [{} for _ in trees]
        waiting = [(tree, name) for name in runs for tree in range(len(trees))]
        waiting.reverse()
        running: dict[tuple[int, str], tuple[Launched, Path]] = {}
        cores = os.cpu_count() or 1
        with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
            while waiting or running:
                busy = sum(runs[name][1] for _, name in running)
                if waiting and (not running or busy + runs[waiting[-1][1]][1] <= cores):
                    tree, name = waiting.pop()
                    folder = Path(temporary, f"{tree}-{name.replace(' ', '-')}")
                    folder.mkdir()
                    flags, processes = runs[name]
                    words = [str(trees[tree].resolve() / "train.py"), *flags.split()]
                    words += [*ALWAYS.split(), "--run-dir", "run"]
                    output = folder / "output.txt"
                    launched = self.interpreter.start(words, folder, output, processes)
                    running[tree, name] = launched, folder
                    continue
                ended = [key for key, (one, _) in running.items() if one.poll() is not None]
                if not ended:
                    self.interpreter.listen(None)
                for tree, name in ended:
                    launched, folder = running.pop((tree, name))
                    if launched.returncode:
                        said = (folder / "output.txt").read_text()[-6000:]
                        raise SystemExit(f"{name} failed in {trees[tree]}:\n{said}")
                    found[tree][name] = values_of(folder / "run")
                    shutil.rmtree(folder)  # alexnet's is a gigabyte
                    where = f" in {trees[tree]}" if tree else ""
                    print(f"{name}{where}: {launched.seconds:.1f} CPU seconds", file=sys.stderr)
        # They end in any order.
        return [{name: values[name] for name in runs} for values in found]


def values_of(run: Path) -> dict:
    """Rows in full but for clocks, and of each tensor of the end a digest, its norm and its sum."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [
        {key: value for key, value in json.loads(line).items() if not key.startswith(CLOCKS)}
        for line in lines
    ]
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    tensors = {}
    for file in [*sorted(last.glob("*.safetensors")), run / "model.safetensors"]:
        where = f"{last.name}/{file.name}" if file.parent == last else file.name
        tensors |= {f"{where} {name}": facts for name, facts in tensors_of(file)}
    return {"rows": rows, "tensors": tensors}


def tensors_of(file: Path) -> Iterator[tuple[str, list]]:
    import numpy as np
    from safetensors import safe_open

    with safe_open(file, framework="np") as tensors:
        for name in sorted(tensors.keys()):
            value = np.ascontiguousarray(tensors.get_tensor(name))
            state = hashlib.blake2b(f"{value.dtype} {value.shape}".encode(), digest_size=12)
            state.update(value.reshape(-1).view(np.uint8).data)
            norm = np.sqrt(np.square(value, dtype=np.float64).sum())
            yield name, [state.hexdigest(), float(norm), float(value.sum(dtype=np.float64))]


# --- comparing -----------------------------------------------------------------------------------


def differences(was: Values, now: Values) -> list[str]:
    """A line for each thing that differs: per run the first row and key, and the tensors."""
    found = []
    for name in [*was, *(name for name in now if name not in was)]:
        if name not in was or name not in now:
            found.append(f"{name}: {'a new run' if name in now else 'a run that is no more'}")
            continue
        for word in (first_row(was[name], now[name]), changed_tensors(was[name], now[name])):
            if word:
                found.append(f"{name}: {word}")
    return found


def first_row(was: dict, now: dict) -> str:
    old, new = was["rows"], now["rows"]
    for number, (one, two) in enumerate(zip(old, new, strict=False), 1):
        for key in [*one, *(key for key in two if key not in one)]:
            if text(one, key) != text(two, key):
                step = one.get("step", "?")
                said = f"row {number} (step {step}), {key}: {text(one, key)} -> {text(two, key)}"
                return said + apart(one.get(key), two.get(key))
    return "" if len(old) == len(new) else f"{len(old)} rows -> {len(new)} rows"


def text(row: dict, key: str) -> str:
    """A value as JSON writes it: every bit of a float, and NaN equals NaN."""
    return json.dumps(row[key]) if key in row else "nothing"


def apart(one: Json, two: Json) -> str:
    if not (isinstance(one, float) and isinstance(two, float)):
        return ""
    return f" (by {two - one:.2e})"


def changed_tensors(was: dict, now: dict) -> str:
    old, new = was["tensors"], now["tensors"]
    names = [*old, *(name for name in new if name not in old)]
    changed = [n for n in names if old.get(n, [""])[0] != new.get(n, [""])[0]]
    said = []
    for name in changed[:SHOWN]:
        if name not in old or name not in new:
            said.append(f"{name} {'is new' if name in new else 'is no more'}")
            continue
        (_, norm, total), (_, other_norm, other_total) = old[name], new[name]
        moved = f"norm {norm} by {other_norm - norm:.2e}, sum {total} by {other_total - total:.2e}"
        said.append(f"{name} ({moved})")
    if len(changed) > SHOWN:
        said.append("...")
    return f"{len(changed)} of {len(names)} tensors: {'; '.join(said)}" if changed else ""


# --- storing -------------------------------------------------------------------------------------


def file_of(kind: dict[str, str]) -> str:
    known_by = hashlib.blake2b(json.dumps(kind, sort_keys=True).encode(), digest_size=4).hexdigest()
    return f"{kind['machine']}-{kind['instructions']}-torch-{kind['torch']}-{known_by}.json".lower()


def write(path: Path, commit: str, kind: dict[str, str], values: Values) -> None:
    """One row and one tensor a line, so that a diff shows what moved."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f'{{"commit": {json.dumps(commit)}, "kind": {json.dumps(kind, indent=1)}, "runs": {{']
    for number, (name, run) in enumerate(values.items()):
        rows = ",\n".join(json.dumps(row) for row in run["rows"])
        pairs = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in run["tensors"].items())
        comma = "," if number < len(values) - 1 else ""
        lines.append(f'{json.dumps(name)}: {{"rows": [\n{rows}\n], "tensors": {{')
        lines.append(",\n".join(pairs) + f"\n}}}}{comma}")
    path.write_text("\n".join(lines) + "\n}}\n", encoding="utf-8")


def read(folder: Path) -> list[dict]:
    """What is stored: one object per kind of machine, all of one commit."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]
    commits = {one["commit"] for one in found}
    if len(commits) > 1:
        raise SystemExit(f"the values in {folder} are of several commits: {', '.join(commits)}")
    return found


def git(*words: str) -> str:
    """What git says; a refusal is a sentence."""
    try:
        done = subprocess.run(["git", "-C", str(REPOSITORY), *words], capture_output=True)
    except OSError:
        raise NotComparable("git is not installed here.") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise NotComparable(f"git {words[0]} failed here ({said}).")
    return done.stdout.decode().strip()


class NotComparable(Exception):
    """Why nothing can be compared, in a sentence."""


def take(commit: str, folder: Path) -> None:
    """The tree of a commit of this clone's history; leaves no trace in .git."""
    try:
        git("cat-file", "-e", commit + "^{commit}")
    except NotComparable as error:
        why = str(error)
        with contextlib.suppress(NotComparable):
            if git("rev-parse", "--is-shallow-repository") == "true":
                why = "this clone is shallow: git fetch --unshallow."
        raise NotComparable(f"the golden commit {commit} is not at hand: {why}") from None
    done = subprocess.run(
        ["git", "-C", str(REPOSITORY), "archive", commit], capture_output=True, check=True
    )
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")


def clean_commit() -> str:
    """HEAD, of which the values will be: nothing but stored values may differ from it."""
    where = VALUES.relative_to(REPOSITORY).as_posix()
    changed = git("status", "--porcelain", "--", ".", f":(exclude){where}")
    if changed:
        raise NotComparable(f"commit first, the values are to be those of a commit:\n{changed}")
    return git("rev-parse", "HEAD")


# --- the command ---------------------------------------------------------------------------------


def golden(arguments: argparse.Namespace) -> int:
    runs = names(arguments.only)
    if not runs:
        raise NotComparable(f"no such run: {' '.join(arguments.only)}; one of {', '.join(names())}")
    stored = read(arguments.values)
    head = clean_commit() if arguments.renew else ""
    if not stored and not arguments.renew:
        raise NotComparable(f"{arguments.values} holds no values: python -m bench.golden --renew")
    with Runner() as runner, tempfile.TemporaryDirectory(prefix="golden-commit-") as temporary:
        known = next((one for one in stored if one["kind"] == runner.kind), None)
        trees = [arguments.tree]
        if stored and (known is None or arguments.beside):
            take(stored[0]["commit"], Path(temporary))
            trees.append(Path(temporary))
            why = "asked for" if known else "this kind of machine is not in the stored values"
            print(f"beside the golden commit {stored[0]['commit'][:12]} ({why})")
        elif known:
            print(f"against the stored values of {file_of(runner.kind)}")
        now, *others = runner.measure(trees, runs)
        was = others[0] if others else known["runs"] if known else {}
        if arguments.only:
            was = {name: values for name, values in was.items() if name in runs}
        found = differences(was, now)
        for line in found:
            print(line)
        if not arguments.renew:
            print(f"{len(found)} differences" if found else f"equal: {len(now)} runs, every bit")
            return int(bool(found))
        renew(arguments.values, stored, runner.kind, now, head, bool(found))
    return 0


def renew(
    folder: Path, stored: list[dict], kind: dict[str, str], now: Values, head: str, moved: bool
) -> None:
    """Store what was measured; values of other kinds of machine stay if no number moved."""
    if moved:
        for path in folder.glob("*.json"):
            path.unlink()
            if path.name != file_of(kind):
                print(f"removed {path.name}: of the numbers that were; renew there, too")
    commit = head if moved or not stored else stored[0]["commit"]
    write(folder / file_of(kind), commit, kind, now)
    print(f"{'stored' if moved else 'nothing moved'}: {file_of(kind)}, of commit {commit[:12]}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.golden", description=__doc__ and __doc__.splitlines()[0]
    )
    parser.add_argument("--renew", action="store_true", help="store this tree's values instead")
    parser.add_argument("--beside", action="store_true", help="compare with the golden commit")
    parser.add_argument("--only", nargs="+", metavar="RUN", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--tree", type=Path, default=REPOSITORY, help="whose train.py to run")
    parser.add_argument("--values", type=Path, default=VALUES, help="folder of the stored values")
    arguments = parser.parse_args(argv)
    if arguments.renew and (arguments.only or arguments.tree != REPOSITORY):
        parser.error("--renew stores all runs of this tree: leave --only and --tree out")
    try:
        return golden(arguments)
    except NotComparable as error:
        print(f"nothing compared: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
