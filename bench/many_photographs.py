"""Many photographs under little memory: trained, killed, resumed on two processes, compared.

Makes so many small photographs in class folders, trains on them on one process, then once more
with kill -9 in the middle and two processes afterwards. Sampled the whole time is the anonymous
memory (RssAnon) of all processes of a run together; more than the limit ends it. The two runs must
have the same rows and weights, bit for bit.
"""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from bench.golden import CLOCKS
from bench.measure import REPOSITORY, arguments_of, finish, table

WIDTH, HEIGHT, CLASSES, TESTED = 300, 225, 100, 128
BASES = 400  # different pictures; each file beyond has a comment of its own, so other bytes
RUN = [
    "--image-size", "224", "--augment", "resized_crop", "--bitwise", "--shards", "2", "--threads",
    "1", "--log-every", "1", "--no-plots", "--lr", "0.02",
]  # fmt: skip


def make(folder: Path, count: int) -> int:
    """So many JPEGs of 300 x 225, of which 128 test; their bytes."""
    draw, bases, total = np.random.default_rng(0), [], 0
    for _ in range(BASES):
        coarse = draw.integers(0, 256, (HEIGHT // 12, WIDTH // 12, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        grain = draw.normal(0, 8, (HEIGHT, WIDTH, 1))
        pixels = (np.asarray(image) + grain).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "jpeg", quality=82)
        bases.append(buffer.getvalue())
    for side in ("train", "test"):
        for label in range(CLASSES):
            (folder / side / f"class{label:03}").mkdir(parents=True)
    for number in range(count):
        base = bases[number % BASES]
        comment = f"{number:08}".encode() + b" " * int(draw.integers(0, 4000))
        segment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
        side = "test" if number >= count - TESTED else "train"
        path = folder / side / f"class{number % CLASSES:03}" / f"{number:08}.jpg"
        path.write_bytes(base[:2] + segment + base[2:])
        total += len(base) + len(segment)
    return total


def anonymous(pid: int) -> int:
    """RssAnon in bytes of a process and all its descendants."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                total += 1024 * int(line.split()[1])
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                total += anonymous(int(child))
    except OSError:  # it has ended since
        pass
    return total


def rows(run: Path) -> list[dict]:
    """The rows of a run's metrics."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def step_of(run: Path) -> int:
    """The last step that a run has told of."""
    return max((row.get("step", 0) for row in rows(run)), default=0)


def life(
    words: list[str], run: Path, folder: Path, limit: float, processes: int = 1, kill_at: int = 0
) -> dict[str, float]:
    """One life of a run: its seconds, to the first row and in all, and the most memory it took.

    SystemExit where it fails, or takes more than the limit.
    """
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    log, before, began = folder / f"{run.name}.log", step_of(run), time.monotonic()
    most, first = 0, 0.0
    with log.open("a") as file:
        process = subprocess.Popen(
            [*launcher, str(REPOSITORY / "train.py"), *words], stdout=file, stderr=file,
            cwd=folder, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            while process.poll() is None:
                most = max(most, anonymous(process.pid))
                step = step_of(run)
                if not first and step > before:
                    first = time.monotonic() - began
                if most > limit:
                    raise SystemExit(f"{run.name}: {most / 2**30:.2f} GiB of memory")
                if kill_at and step >= kill_at:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    break
                time.sleep(0.25)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode and not kill_at:
        raise SystemExit(f"{shlex.join(words)} failed:\n{log.read_text()[-3000:]}")
    return {
        "seconds": time.monotonic() - began, "first row after": first, "MiB": most / 2**20,
        "processes": processes, "to step": step_of(run),
    }  # fmt: skip


def numbers(run: Path) -> list[dict]:
    """Rows without what depends on the clock."""
    clocks = (*CLOCKS, "data/wait")
    return [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in rows(run)]


def told_apart(one: Path, other: Path) -> Iterator[str]:
    """What differs between two runs that should be the same."""
    from safetensors.torch import load_file

    for mine, theirs in zip(numbers(one), numbers(other), strict=False):
        if mine != theirs:
            yield f"row {mine} is {theirs}"
            break
    if len(rows(one)) != len(rows(other)):
        yield f"{len(rows(one))} and {len(rows(other))} rows"
    weights, others = (load_file(run / "model.safetensors") for run in (one, other))
    yield from (name for name in weights if not weights[name].equal(others[name]))


def markdown(results: dict) -> str:
    """A table of the lives, and whether the runs are the same."""
    head = ["life", "processes", "to step", "seconds", "first row after", "MiB of all processes"]
    keys = ("processes", "to step", "seconds", "first row after", "MiB")
    lives = [[name, *(f"{of[key]:,.0f}" for key in keys)] for name, of in results["lives"].items()]
    same = "are the same, bit for bit" if results["same"] else "differ"
    return (
        f"{results['images']:,} photographs of {WIDTH} x {HEIGHT}, {results['GB']:.1f} GB, "
        f"{results['model']} at 224, batch {results['batch']}, {results['steps']} steps:\n\n"
        f"{table(head, lives)}\n\nRows and weights of the two runs {same}."
    )


def main() -> int:
    parser = arguments_of(__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--model", default="torchvision:resnet18")
    parser.add_argument("--limit-gb", type=float, default=3.0, help="GiB")
    parser.add_argument("--folder", type=Path, help="where the photographs shall lie meanwhile")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lockstep-many-", dir=options.folder))
    os.environ["LOCKSTEP_CACHE"] = str(folder / "cache")
    os.environ["LOCKSTEP_CACHE_SIZE"] = "1GB"  # no room for their pixels: they stay files
    limit = options.limit_gb * 2**30
    try:
        size = make(folder / "photographs", options.images)
        print(f"{options.images:,} photographs, {size / 1e9:.1f} GB", flush=True)
        words = [*RUN, "--model", options.model, "--batch-size", str(options.batch)]
        words += ["--dataset", "photographs", "--max-steps", str(options.steps)]
        words += ["--checkpoint-every", str(max(1, options.steps // 6))]
        results: dict = {
            "images": options.images, "GB": size / 1e9, "model": options.model,
            "batch": options.batch, "steps": options.steps, "lives": {},
        }  # fmt: skip
        whole, killed = folder / "whole", folder / "killed"
        half = options.steps // 2
        for name, run, processes, at, extra in (
            ("undisturbed", whole, 1, 0, ["--run-dir", "whole"]),
            ("killed", killed, 1, half, ["--run-dir", "killed"]),
            ("resumed", killed, 2, 0, []),
        ):
            said = [*words, *extra] if extra else ["--resume", "killed"]
            found = life(said, run, folder, limit, processes, at)
            results["lives"][name] = found
            print(name, json.dumps(found), flush=True)
        apart = list(told_apart(whole, killed))
        results["same"] = not apart
        print(*apart[:5], sep="\n")
        print(markdown(results))
        finish(options, results)
        return int(bool(apart))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
