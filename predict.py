"""A run folder (or ImageNet weights) and pictures -> class names with confidences.

`python predict.py dog.png photos/ --run runs/latest`. Pictures are predicted in evaluation mode,
without random crops: the same answer every time, whatever else is with them. On a CPU each is asked
alone; on a GPU in batches of one size, for the last bits of an answer depend on that size.
"""

import argparse
import contextlib
import glob
import itertools
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from common.cpus import cpus
from common.disk import digest
from common.errors import FAILED, FINISHED, USER_ERROR, Left, UserError
from common.parser import Parser, need_packages
from common.streams import lost_words, steady_streams
from common.text import printable
from config.layers import LATEST, latest_in_words
from models import lookup
from models.own_file import code_of_weights, is_own_file
from report.answers import Answer, Answers

if TYPE_CHECKING:
    import torch
    from torch import nn

TOP, ALL = 5, 10**9  # classes shown of each picture
BATCH = 32  # pictures at once on a GPU


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; UserError where it makes no sense."""
    parser = Parser(
        "predict.py", description=__doc__ and __doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("paths", nargs="+", help="pictures, or folders of pictures")
    parser.add_argument("--run", type=Path, help="a run folder, or its weights")
    parser.add_argument("--model", help="instead of a run: a model of `python -m models`, with ...")
    parser.add_argument("--weights", help="... imagenet, or a file with ImageNet's 1,000 classes")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "--top", type=int, help="classes shown for each picture (5; with many labels: all it has)"
    )
    shown.add_argument("--all", action="store_true", help="every class of each picture")
    parser.add_argument(
        "--threshold", type=float, help="confidence from which a picture has a class (the run's)"
    )
    parser.add_argument(
        "--tta", type=int, choices=(0, 1, 2), default=0,
        help="average over views: 1 mirrored, 2 shifted too (digits are never mirrored)",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=int, default=0,
        help=f"pictures asked at once, always so many (default: 1, on a GPU {BATCH})",
    )  # fmt: skip
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print CSV")
    form.add_argument(
        "--out", type=Path, metavar="FILE.csv|FILE.jsonl",
        help="write there; the same command goes on with the pictures that are not in it",
    )  # fmt: skip
    parser.add_argument(
        "--trust-code", action="store_true",
        help="execute the model's own file also for weights that are not of a run of yours",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if bool(arguments.model) != bool(arguments.weights):
        parser.error("--model and --weights go together; without them a --run is used")
    if arguments.model and arguments.run:
        parser.error("--run brings its own model: drop it, or --model and --weights")
    if arguments.top is not None and arguments.top < 1:
        parser.error(f"--top {arguments.top}: must be at least 1")
    if arguments.threshold is not None and not 0 < arguments.threshold < 1:
        parser.error(f"--threshold {arguments.threshold}: must lie between 0 and 1")
    if arguments.batch_size < 0:
        parser.error(f"--batch-size {arguments.batch_size}: must be at least 1")
    if arguments.out and arguments.out.suffix not in (".csv", ".jsonl"):
        parser.error(f"--out {arguments.out}: name a file that ends in .csv or .jsonl")
    arguments.top = ALL if arguments.all else arguments.top
    return arguments


def load_run(folder: Path, trust_code: bool = False) -> tuple["nn.Module", dict]:
    """(model in evaluation mode, what its weights say of themselves) of a run."""
    from safetensors import SafetensorError, safe_open

    from models import build_from
    from models.state import load_whole_state

    path = folder if folder.is_file() else folder / "model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            card = json.loads(file.metadata()["lockstep"])
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
    name = card["model"]
    if is_own_file(name):
        name = code_of_weights(name, card.get("code", {}), path.parent, trust_code)
        if name != card["model"]:
            print(f"the model is executed from {printable(name)}", file=sys.stderr)
    if lookup(name).task != "classification":
        raise UserError(
            f"--run {folder}: {name} predicts a number, not a class", code="not-a-classifier"
        )
    model = build_from(card, len(card["classes"]), name)
    if wrong := load_whole_state(model, tensors):
        raise UserError(
            f"--run {folder}: its weights no longer fit {name} ({', '.join(wrong[:3])}); did its "
            "file change?",
            code="weights-do-not-fit",
        )
    return model.eval(), card


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


def pictures(paths: list[str]) -> Iterator[Path]:
    """The files named, and those in the folders named, in order of their names, as they come."""
    for path in map(Path, itertools.chain(*map(meant, paths))):
        inside = inside_of(path)
        first = next(inside, path)  # a folder without pictures is named like a failure
        yield from itertools.chain([first], inside)


def meant(path: str) -> list[str]:
    """A path as it was typed, or those that fit its pattern: not every shell knows what * means."""
    if os.path.lexists(path):
        return [path]
    return sorted(glob.glob(path, recursive=True)) or [path]  # noqa: PTH207 - may be absolute


def inside_of(folder: Path) -> Iterator[Path]:
    """The pictures below a folder; no more names are held than those of one folder at a time."""
    from data.files import SUFFIXES

    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # a picture; a folder that may not be read is named as one without any
        return
    for entry in entries:
        path = folder / entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from inside_of(path) if os.access(path, os.R_OK | os.X_OK) else [path]
        elif path.suffix.lower() in SUFFIXES and entry.name[0] != "." and entry.is_file():
            yield path


def prepare(path: Path, card: dict) -> "torch.Tensor":
    """A picture as the run's evaluation saw its own: uint8 (1, 3, S, S), not yet normalised."""
    import torch

    from data.files import SUFFIXES, decode
    from data.photographs import as_evaluated, reduced_as_evaluated

    if path.is_dir():
        next(path.iterdir(), None)  # one that may not be read says so
        raise ValueError(f"a folder without pictures ({', '.join(sorted(SUFFIXES))})")
    with warnings.catch_warnings(action="ignore"):  # what is too large is an error below
        if card.get("decode") == "scaled":
            seen = reduced_as_evaluated(path.read_bytes(), card)
        else:
            seen = as_evaluated(decode(path, levels=card.get("levels")), card)
    return torch.from_numpy(seen).permute(2, 0, 1)[None]


def with_threshold(card: dict, threshold: float | None) -> dict:
    """What the weights say of themselves, with the threshold that was typed; it may make no sense.

    Older weights say nothing of a task: they classify.
    """
    card = {"task": "classification", **card}
    if threshold is None:
        return card
    if card["task"] != "multilabel":
        raise UserError(
            "--threshold: this model answers the likeliest class; it is for --task multilabel",
            code="contradiction",
        )
    return {**card, "threshold": threshold}


def predict(model: "nn.Module", card: dict, path: Path, top: int | None) -> list[Answer]:
    """The most likely classes of one picture with their probabilities; see Task.surest."""
    return ask(model, card, [prepare(path, card)], top)[0]


def ask(
    model: "nn.Module", card: dict, prepared: list["torch.Tensor"], top: int | None, tta: int = 0,
    size: int = 1,
) -> list[list[Answer]]:  # fmt: skip
    """The most likely classes of each picture, asked together, filled up to `size` of them."""
    import torch

    from data.augment import Augment
    from distributed.generators import Generators
    from tasks import build_task, split_outputs

    device = next(model.parameters()).device
    Generators(device, [model]).seed(0)  # a model that draws even now answers the same each time
    augment = Augment(
        "none", card["image_size"], card["mean"], card["std"], seed=0, tta=tta,
        no_flip=bool(card.get("no_flip")) or card.get("dataset") == "digits",
        cut=bool(card.get("photographs")),  # they come in the size that evaluation saw
    )  # fmt: skip
    with torch.no_grad():
        images = torch.cat([augment.evaluate(one.to(device)) for one in prepared])
        fill = images[-1:].expand(max(0, size - len(images)), -1, -1, -1)
        images = torch.cat([images, fill]) if len(fill) else images
        logits = augment.vote(lambda view: split_outputs(model(view))[0], images).float()
    name, threshold = card.get("task", "classification"), card.get("threshold", 0.5)
    task = build_task(name, logits.shape[1], 0.0, model, threshold=threshold)
    return [
        [Answer(card["classes"][index], index, value) for index, value in task.surest(row, top)]
        for row in logits[: len(prepared)]
    ]


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
            model, card = load_imagenet(arguments.model, arguments.weights)
        else:
            arguments.run = latest_in_words(arguments.run or Path(LATEST))
            model, card = load_run(arguments.run, arguments.trust_code)
        card = with_threshold(card, arguments.threshold)
    except UserError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    import torch

    torch.backends.cudnn.allow_tf32 = False  # a GPU's answer is a CPU's, to float32's rounding
    asker = Asker(on_gpu(model), card, arguments)
    total = sum(1 for _ in pictures(arguments.paths))
    try:
        answers = Answers(arguments, total, made_by(arguments, card) if arguments.out else {})
        with stop_signals() as came, warnings.catch_warnings(action="ignore"):
            # Here, for a filter of a decoding thread would be everybody's.
            asker.leaves = lambda: bool(came)
            for path, answer in asker.answers(pictures(arguments.paths), answers.lacks):
                if isinstance(answer, Exception):
                    why = getattr(answer, "strerror", None) or answer
                    print(f"{printable(path)}: {printable(why)}", file=sys.stderr)
                else:
                    answers.add(str(path), answer)
                if came or lost_words():
                    break
        answers.close()
    except UserError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        if error.filename is not None or not arguments.out:
            raise
        print(f"{arguments.out} cannot be written ({error.strerror}): {answers.count} of {total} "
              "pictures are in it, and the same command goes on", file=sys.stderr)  # fmt: skip
        return FAILED
    done = f"{answers.count} of {total} pictures were predicted"
    if lost := lost_words():
        print(f"stdout cannot be written ({lost}): {done}", file=sys.stderr)
        return FAILED
    if came and answers.count < total:
        print(f"stopped by {came[0].name}: {done}", file=sys.stderr)
        return 128 + came[0]
    return FAILED if asker.failed else FINISHED


class Asker:
    """Decodes on threads, a few pictures ahead, and asks the model; a GPU that fails is left."""

    def __init__(self, model: "nn.Module", card: dict, arguments: argparse.Namespace) -> None:
        self.model, self.card, self.top, self.tta = model, card, arguments.top, arguments.tta
        on_cpu = next(model.parameters()).device.type == "cpu"
        self.size = arguments.batch_size or (1 if on_cpu else BATCH)
        self.failed = False
        self.leaves: Callable[[], bool] = lambda: False  # see data.ahead.Ahead

    def answers(
        self, paths: Iterator[Path], lacks: Callable[[str], bool]
    ) -> Iterator[tuple[Path, list[Answer] | Exception]]:
        """What each picture is, or why it could not be told, in their order."""
        from data.ahead import Ahead, Threads, Work

        threads = Threads(max(1, min(8, cpus())))

        def begin(
            path: Path,
        ) -> tuple[Work, Callable[[], tuple[Path, "torch.Tensor | Exception"]]]:
            found: list[torch.Tensor | Exception] = []

            def piece() -> None:
                try:
                    found.append(prepare(path, self.card))
                except Exception as error:  # Pillow raises many kinds on damaged files
                    found.append(error)

            return threads.do([piece]), lambda: (path, found[0])

        wanted = (path for path in paths if lacks(str(path)))
        ahead = Ahead(self.size + threads.count)
        ahead.leaves = self.leaves
        come = ahead.over(wanted, begin)
        with threads, contextlib.suppress(Left):
            while batch := list(itertools.islice(come, self.size)):
                yield from self._batch(batch)

    def _batch(
        self, batch: list[tuple[Path, "torch.Tensor | Exception"]]
    ) -> Iterator[tuple[Path, list[Answer] | Exception]]:
        good = [found for _, found in batch if not isinstance(found, Exception)]
        problem: Exception | None = None
        rows: Iterator[list[Answer]] = iter(())
        try:
            rows = iter(self._ask(good) if good else [])
        except Exception as error:  # whatever a model of one's own raises
            problem = error
        for path, found in batch:
            failed = found if isinstance(found, Exception) else problem
            self.failed |= failed is not None
            yield path, failed if failed is not None else next(rows)

    def _ask(self, prepared: list["torch.Tensor"]) -> list[list[Answer]]:
        words = self.card, prepared, self.top, self.tta, self.size
        try:
            return ask(self.model, *words)
        except RuntimeError as error:
            if not gpu_refuses(self.model, error):
                raise
            self.model = back_on_cpu(self.model, error)
            return ask(self.model, *words)


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


def made_by(arguments: argparse.Namespace, card: dict) -> dict:
    """What decides the rows of a file that is gone on with."""
    path = arguments.run
    weights = path if path.is_file() else path / "model.safetensors"
    if arguments.model:
        weights = Path(arguments.weights)
    known = digest(weights.read_bytes()) if weights.is_file() else str(arguments.weights)
    found = {"weights": known, "tta": arguments.tta}
    shown = min(arguments.top or TOP, len(card["classes"]))
    if card["task"] == "multilabel":
        if arguments.out.suffix == ".csv":
            raise UserError(
                f"--out {arguments.out}: with many labels a picture has any number of rows, and "
                "none tells that it is whole; name a file that ends in .jsonl",
                code="contradiction",
            )
        most = 0 if arguments.top is None else shown
        return {**found, "classes": most, "threshold": card["threshold"]}
    return {**found, "classes": shown}


if __name__ == "__main__":
    steady_streams()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback
    sys.exit(main(sys.argv[1:]))
