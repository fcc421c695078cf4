"""A run folder (or ImageNet weights) and pictures -> class names with confidences.

`python predict.py dog.png photos/ --run runs/latest`. Pictures are predicted one by one in
evaluation mode, without random crops: the same answer every time, whatever else is with them.
"""

import argparse
import contextlib
import csv
import io
import json
import signal
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from common.parser import Parser, need_packages
from common.streams import lost_words, steady_streams
from common.text import printable
from errors import FAILED, FINISHED, USER_ERROR, UserError
from models import lookup
from models.own_file import code_of_weights, is_own_file

if TYPE_CHECKING:
    import torch
    from torch import nn

LATEST = Path("runs/latest")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; UserError where it makes no sense."""
    parser = Parser(
        "predict.py", description=__doc__ and __doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("paths", nargs="+", help="pictures, or folders of pictures")
    parser.add_argument("--run", type=Path, default=LATEST, help="a run folder, or its weights")
    parser.add_argument("--model", help="instead of a run: a model of `python -m models`, with ...")
    parser.add_argument("--weights", help="... imagenet, or a file with ImageNet's 1,000 classes")
    parser.add_argument(
        "--top", type=int, help="classes shown for each picture (5; with many labels: all it has)"
    )
    parser.add_argument(
        "--threshold", type=float, help="confidence from which a picture has a class (the run's)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--csv", action="store_true", help="print CSV")
    parser.add_argument(
        "--trust-code", action="store_true",
        help="execute the model's own file also for weights that are not of a run of yours",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if bool(arguments.model) != bool(arguments.weights):
        parser.error("--model and --weights go together; without them a --run is used")
    if arguments.top is not None and arguments.top < 1:
        parser.error(f"--top {arguments.top}: must be at least 1")
    if arguments.threshold is not None and not 0 < arguments.threshold < 1:
        parser.error(f"--threshold {arguments.threshold}: must lie between 0 and 1")
    return arguments


def load_run(folder: Path, trust_code: bool = False) -> tuple["nn.Module", dict]:
    """(model in evaluation mode, what its weights say of themselves) of a run."""
    from safetensors import SafetensorError, safe_open

    from models import build_model
    from models.state import load_whole_state

    path = folder if folder.is_file() else folder / "model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads(file.metadata()["lockstep"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        if not folder.exists():
            raise UserError(
                f"--run {folder}: there is no such folder; python train.py makes runs in runs/",
                code="no-run",
            ) from None
        raise UserError(
            f"--run {folder}: there are no weights in it that can be read ({path.name}); a run "
            "writes them after its first evaluation, other weights need --model and --weights",
            code="weights-unreadable",
        ) from None
    name = told["model"]
    if is_own_file(name):
        name = code_of_weights(name, told.get("code", {}), path.parent, trust_code)
        if name != told["model"]:
            print(f"the model is executed from {printable(name)}", file=sys.stderr)
    if lookup(name).task != "classification":
        raise UserError(
            f"--run {folder}: {name} predicts a number, not a class", code="not-a-classifier"
        )
    size = told["image_size"]
    model = build_model(name, num_classes=len(told["classes"]), image_size=size)
    if wrong := load_whole_state(model, tensors):
        raise UserError(
            f"--run {folder}: its weights no longer fit {name} ({', '.join(wrong[:3])}); did its "
            "file change?",
            code="weights-do-not-fit",
        )
    return model.eval(), told


def load_imagenet(name: str, weights: str) -> tuple["nn.Module", dict]:
    """(model, what it was trained on) for ImageNet's classes."""
    from models import build_model
    from models.looks import look_of, published_look
    from models.weights import imagenet_classes, imagenet_reach, load_weights

    if weights == "imagenet":
        reached, why = imagenet_reach(name)
        if not reached:
            raise UserError(f"--weights imagenet: {why}", code="weights-not-reached")
    entry = lookup(name)
    if entry.task != "classification":
        raise UserError(
            f"--model {name}: it predicts a number, not a class", code="not-a-classifier"
        )
    size = int(entry.finetune.get("image_size", 224))  # inception_v3 was trained on 299
    model = build_model(name, num_classes=1000, image_size=size)
    classes = imagenet_classes()
    try:
        load_weights(model, name, weights, 1000, classes, as_they_are=True, image_size=size)
    except UserError as error:
        if error.code != "other-classes":
            raise
        raise UserError(
            f"--weights {weights}: these are not ImageNet's 1,000 classes "
            f"({str(error).partition(': ')[2]}); for a run of yours type --run FOLDER",
            code="weights-of-other-classes",
        ) from None
    look = look_of(name, weights) or published_look(name)
    if look is None:
        raise UserError(
            f"--weights {weights}: nothing says what its pictures were normalised by; train with "
            "it (--epochs 1), and predict with the run",
            code="weights-do-not-say",
        )
    return model.eval(), {
        "mean": look.mean, "std": look.std, "image_size": size, "classes": classes,
        "photographs": True, "eval_resize": int(size / look.crop + 1e-6),
        "interpolation": look.interpolation,
    }  # fmt: skip


def pictures(paths: list[str]) -> list[Path]:
    """The files named, and those in the folders named, in order of their names."""
    from data.files import SUFFIXES

    found = []
    for path in map(Path, paths):
        inside = (
            p for p in path.rglob("*")
            if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()
        )  # fmt: skip
        found += sorted(inside) or [path]  # a folder without pictures is named like a failure
    return found


def prepare(path: Path, told: dict) -> "torch.Tensor":
    """A picture as the run's evaluation saw its own: uint8 (1, 3, S, S), not yet normalised."""
    import torch

    from data.files import SUFFIXES, decode
    from data.photographs import as_evaluated, reduced_as_evaluated

    if path.is_dir():
        raise ValueError(f"a folder without pictures ({', '.join(sorted(SUFFIXES))})")
    with warnings.catch_warnings(action="ignore"):  # what is too large is an error below
        if told.get("decode") == "scaled":
            seen = reduced_as_evaluated(path.read_bytes(), told)
        else:
            seen = as_evaluated(decode(path, levels=told.get("levels")), told)
    return torch.from_numpy(seen).permute(2, 0, 1)[None]


def with_threshold(told: dict, threshold: float | None) -> dict:
    """What the weights say of themselves, with the threshold that was typed; it may make no sense.

    Older weights say nothing of a task: they classify.
    """
    told = {"task": "classification", **told}
    if threshold is None:
        return told
    if told["task"] != "multilabel":
        raise UserError(
            "--threshold: this model answers the likeliest class; it is for --task multilabel",
            code="contradiction",
        )
    return {**told, "threshold": threshold}


def predict(model: "nn.Module", told: dict, path: Path, top: int | None) -> list[tuple[str, float]]:
    """The most likely classes of one picture with their probabilities; see Task.told."""
    import torch

    from data.augment import Augment
    from distributed.generators import Generators
    from tasks import build_task, split_outputs

    device = next(model.parameters()).device
    Generators(device, [model]).seed(0)  # a model that draws even now answers the same each time
    augment = Augment(
        "none", told["image_size"], told["mean"], told["std"], seed=0,
        cut=bool(told.get("photographs")),  # they come in the size that evaluation saw
    )  # fmt: skip
    with torch.no_grad():
        images = augment.evaluate(prepare(path, told).to(device))
        logits = split_outputs(model(images))[0][0].float()
    name, threshold = told.get("task", "classification"), told.get("threshold", 0.5)
    task = build_task(name, len(logits), 0.0, model, threshold=threshold)
    return [(told["classes"][index], value) for index, value in task.told(logits, top)]


def on_gpu(model: "nn.Module") -> "nn.Module":
    """The model on the GPU, where there is one with room for it."""
    import torch

    try:
        return model.to("cuda") if torch.cuda.is_available() else model
    except RuntimeError as error:  # full, or another process has it for itself alone
        return back_on_cpu(model, error)


def gpu_refuses(model: "nn.Module", error: RuntimeError) -> bool:
    """Whether it is the GPU that fails, not the picture."""
    from distributed.watch import device_failed, out_of_memory

    on_cpu = next(model.parameters()).device.type == "cpu"
    return not on_cpu and (device_failed(error) or out_of_memory(error))


def back_on_cpu(model: "nn.Module", error: RuntimeError) -> "nn.Module":
    """A picture takes a CPU a fraction of a second: go on there, and say so."""
    print(f"on the CPU, because the GPU refuses: {str(error).splitlines()[0]}", file=sys.stderr)
    return model.to("cpu")


def main(argv: list[str]) -> int:
    """Predict what was asked for; returns the exit status."""
    try:
        need_packages()
        arguments = parse(argv)
        if arguments.model:
            model, told = load_imagenet(arguments.model, arguments.weights)
        else:
            model, told = load_run(arguments.run, arguments.trust_code)
        told = with_threshold(told, arguments.threshold)
    except UserError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    import torch

    torch.backends.cudnn.allow_tf32 = False  # a GPU's answer is a CPU's, to float32's rounding
    status, model, paths = FINISHED, on_gpu(model), pictures(arguments.paths)
    answers = Answers(arguments)
    with stop_signals() as came:
        for path in paths:
            if came or lost_words():
                break
            try:
                try:
                    found = predict(model, told, path, arguments.top)
                except RuntimeError as error:
                    if not gpu_refuses(model, error):
                        raise
                    model = back_on_cpu(model, error)
                    found = predict(model, told, path, arguments.top)
                answers.add(str(path), found)
            except Exception as error:  # Pillow raises many kinds on damaged files
                why = error.strerror if isinstance(error, OSError) and error.strerror else error
                print(f"{printable(path)}: {printable(why)}", file=sys.stderr)
                status = FAILED
        answers.close()
        done = f"{answers.count} of {len(paths)} pictures were predicted"
        if lost := lost_words():
            print(f"stdout cannot be written ({lost}): {done}", file=sys.stderr)
            return FAILED
        if came and answers.count < len(paths):
            print(f"stopped by {came[0].name}: {done}", file=sys.stderr)
            return 128 + came[0]
    return status


@contextlib.contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """The stop signals that came so far; a second one of its kind ends the process at once."""
    came: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(signal.Signals(number))
        signal.signal(number, signal.SIG_DFL)

    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup goes on
            before[number] = signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Answers:
    """Writes each answer to stdout as it comes; a table, whose columns need all, at the end."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.json, self.count = arguments.json, 0
        self.table: dict[str, list[tuple[str, float]]] = {}
        self.rows = None
        if self.json:
            print("[", end="", flush=True)
        elif arguments.csv:
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
            self.rows = csv.writer(sys.stdout, lineterminator="\n")
            self.rows.writerow(["path", "rank", "class", "confidence"])
            sys.stdout.flush()

    def add(self, path: str, found: list[tuple[str, float]]) -> None:
        """What was found for one picture, the likeliest class first."""
        self.count += 1
        if self.json:
            row = {
                "path": path, "predictions": [{"class": c, "confidence": v} for c, v in found]
            }  # fmt: skip
            text = textwrap.indent(json.dumps(row, indent=2), "  ")
            print(",\n" if self.count > 1 else "\n", text, sep="", end="", flush=True)
        elif self.rows is not None:
            rows = [[path, rank, *pair] for rank, pair in enumerate(found, 1)]
            self.rows.writerows(rows or [[path, "", "", ""]])  # many labels, of which it has none
            sys.stdout.flush()
        else:
            self.table[path] = found

    def close(self) -> None:
        """The answers are complete, or all that there will be."""
        if self.json:
            print("\n]" if self.count else "]", flush=True)
        elif self.rows is None:
            from report.screen import Report

            Report().predictions(self.table)


if __name__ == "__main__":
    steady_streams()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback
    sys.exit(main(sys.argv[1:]))
