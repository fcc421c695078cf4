"""`python -m data`: look at a data set, count it, or cache it before a job needs it."""

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from common.parser import Parser, need_packages_or_exit

if __name__ == "__main__":
    need_packages_or_exit()

import torch

from common.errors import UserError
from common.streams import exit_told
from common.text import counted, in_bytes, printable
from data.augment import Augment
from data.cache import cache_dir, kept, size_limit, trim
from data.corrected import read_changes, write_corrected
from data.cuts import Cuts, default_resize
from data.image_set import class_counts
from data.loaders import decoding_of, place
from data.pack import Form, check, is_pack, pack
from data.photographs import PHOTOGRAPH, FileStore, PhotoSet, sizes_in_words
from data.policy import parse_policy
from data.sources import NAMES, Source, choose_dataset, load_source, save_source
from data.sources.many import multi_hot
from data.splits import divided, rows_of, split_text, write_split

CACHE = "show what the cache of decoded data sets holds, or empty it"
Command = Callable[[Source, argparse.Namespace], None]

if TYPE_CHECKING:
    from PIL import Image

ROWS, COLUMNS = 8, 8  # of the sheet: a picture per row, an epoch per column
LEAST_WIDTH = 512  # pixels of the sheet: digits of 8 pixels are shown larger
PREVIEW_WIDTH = 96  # characters, at most


def main(arguments: list[str] | None = None) -> int:
    """Run one of the commands; exit status 2 after an error the user can mend."""
    try:
        options = build_parser().parse_args(arguments)
        if options.run in (_check, _cache, _correct):
            return options.run(options)
        name, sentence = choose_dataset(options.dataset, options.data_dir)
        say = functools.partial(print, file=sys.stderr if options.run is _list else sys.stdout)
        say(sentence)
        source = load_source(
            name,
            data_dir=options.data_dir,
            image_size=options.image_size,
            skip_bad_images=options.skip_bad_images,
            seed=options.seed,
            split=options.split,
            group_by=options.group_by,
            say=say,
            many=options.task == "multilabel",
        )
        if options.task == "multilabel" and options.run is not _prepare:
            source = multi_hot(source)
        options.run(source, options)
    except KeyboardInterrupt:
        print("\nstopped. What is finished stays: the same command goes on.", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    common = Parser(add_help=False, allow_abbrev=False)
    names = ", ".join(NAMES)
    common.add_argument(
        "--dataset", default="auto", help=f"{names}, a folder, a file or a hub name (default auto)"
    )
    common.add_argument("--data-dir", metavar="FOLDER", help="where a local copy lies")
    common.add_argument("--image-size", type=_whole(1), metavar="PIXELS", help="side of the images")
    common.add_argument("--skip-bad-images", action="store_true", help="leave damaged ones out")
    common.add_argument(
        "--task", choices=("classification", "multilabel"), default="classification",
        help="multilabel: pictures have any number of classes",
    )  # fmt: skip
    common.add_argument("--seed", type=_whole(0), default=0)
    common.add_argument("--split", metavar="FILE|RUN", help="splits as in a list or in a run")
    common.add_argument("--group-by", metavar="COLUMN|REGEX", help="what stays on one side")
    parser = Parser("python -m data", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(
        required=True, metavar="show|stats|list|correct|prepare|check|cache"
    )

    def add(name: str, run: Command, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, parents=[common], help=summary, description=summary, allow_abbrev=False
        )
        command.set_defaults(run=run)
        return command

    show = add("show", _show, "write a sheet of augmented pictures: one per row, epochs as columns")
    show.add_argument("--augment", default="crop", help="as of train.py (default crop)")
    show.add_argument("--no-flip", action="store_true", help="leave mirroring out")
    show.add_argument("--epoch", type=_whole(0), default=0, help="the first column (default 0)")
    show.add_argument("--out", type=Path, default=Path("sheet.png"), metavar="FILE")
    add("stats", _stats, "count images per class; print mean, std, shape and fingerprint")
    prepare = add("prepare", _prepare, "decode the data set into the cache, or pack photographs")
    prepare.add_argument(
        "--out", type=Path, metavar="FILE.safetensors|FOLDER",
        help="also into this file, photographs into a pack in this folder, to carry elsewhere: "
        "--dataset FILE or FOLDER, or CIFAR10_DIR=FILE",
    )  # fmt: skip
    prepare.add_argument(
        "--store", choices=("jpeg", "raw"), default="jpeg",
        help="photographs: encoded, or decoded: larger and faster (default jpeg)",
    )  # fmt: skip
    prepare.add_argument(
        "--short-side", type=_side, default=256, metavar="PIXELS|keep",
        help="photographs: scale the shorter side to this where it is longer (default 256); keep: "
        "all of their pixels, and with jpeg the bytes of their files",
    )  # fmt: skip
    summary = "compare every byte of a pack with its hashes"
    checks = commands.add_parser("check", help=summary, description=summary, allow_abbrev=False)
    checks.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="the pack")
    checks.add_argument("--dataset", type=Path, metavar="FOLDER", help="the same")
    checks.set_defaults(run=_check)
    which = add("list", _list, "print which picture is in which split and class, as csv")
    which.add_argument("--out", type=Path, metavar="FILE", help="write it there instead")
    summary = "a folder with labels changed as a list of suspects says; the old one stays"
    correct = commands.add_parser("correct", help=summary, description=summary, allow_abbrev=False)
    correct.add_argument("list", type=Path, metavar="SUSPECTS.csv", help="name,given,suggested")
    correct.add_argument(
        "--rows", metavar="3,12-15,7=bird,9=",
        help="these rows only, counted from 1; =CLASS: it is of another class, = alone: leave out",
    )  # fmt: skip
    correct.add_argument("--dataset", type=Path, required=True, metavar="FOLDER")
    correct.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new one")
    correct.set_defaults(run=_correct)
    cache = commands.add_parser("cache", help=CACHE, description=CACHE, allow_abbrev=False)
    cache.add_argument("--empty", action="store_true", help="remove all that no process uses")
    cache.set_defaults(run=_cache)
    return parser


def _side(word: str) -> int:
    return 0 if word == "keep" else _whole(1)(word)


def _whole(low: int) -> Callable[[str], int]:
    """What argparse calls on a word to get a whole number from `low` up."""

    def convert(word: str) -> int:
        if not word.strip().isdecimal() or int(word) < low:
            raise argparse.ArgumentTypeError(f"{word}: must be a whole number from {low}")
        return int(word)

    return convert


def _show(source: Source, options: argparse.Namespace) -> None:
    from PIL import Image

    if not source.classes:
        raise UserError(
            f"{source.name} has no pictures to show: try --dataset digits.", code="no-pictures"
        )
    total = len(source.train)
    indices = torch.arange(min(ROWS, total)) * total // min(ROWS, total)  # folders lie by class
    photographs = isinstance(source.train, PhotoSet)
    size = options.image_size or (
        PHOTOGRAPH if isinstance(source.train, PhotoSet) else source.train.images.shape[-1]
    )
    policy, no_flip = parse_policy(options.augment), source.no_flip or options.no_flip
    cuts = Cuts(
        policy.kind, size, size, default_resize(size), "crop", options.seed, policy.flip, no_flip
    )
    cpu = torch.device("cpu")
    pictures, _ = place(source.train, cpu, decoding_of(cuts, source.mean, 2, cpu))
    augment = Augment(
        options.augment,
        image_size=size,
        mean=source.mean,
        std=source.std,
        seed=options.seed,
        no_flip=no_flip,
        cut=photographs,
    )
    mean, std = (torch.tensor(values)[:, None, None] for values in (source.mean, source.std))
    columns = []
    for epoch in range(options.epoch, options.epoch + COLUMNS):
        (batch,) = pictures.in_flight([pictures.__getitems__(indices)], epoch)
        normalised = augment.train(batch["images"], indices, epoch)
        columns.append(torch.cat(list(normalised * std + mean), dim=1))
    pixels = (torch.cat(columns, dim=2) * 255).round().clamp(0, 255).to(torch.uint8)
    sheet = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    times = max(1, LEAST_WIDTH // sheet.width)
    sheet = sheet.resize((sheet.width * times, sheet.height * times), Image.Resampling.NEAREST)
    try:
        sheet.save(options.out)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot write {printable(options.out)}: {error}; try --out sheet.png",
            code="output-unwritable",
        ) from None
    if sys.stdout.isatty() and "utf" in (sys.stdout.encoding or "").lower():
        print(half_blocks(sheet))
    print(f"{printable(options.out)}: {sheet.width}x{sheet.height} pixels")


def half_blocks(image: "Image.Image") -> str:
    """A Pillow image as coloured text: each character shows two pixels, one above the other."""
    width = min(image.width, PREVIEW_WIDTH)
    height = max(2, round(image.height * width / image.width) // 2 * 2)
    small = image.convert("RGB").resize((width, height))
    pixels = [small.crop((0, y, width, y + 1)).tobytes() for y in range(height)]
    lines = []
    for y in range(0, height, 2):
        cells = (
            "\x1b[38;2;{};{};{};48;2;{};{};{}m▀".format(
                *pixels[y][3 * x : 3 * x + 3], *pixels[y + 1][3 * x : 3 * x + 3]
            )
            for x in range(width)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


def _correct(options: argparse.Namespace) -> int:
    changes = read_changes(options.list, options.rows)
    print(write_corrected(options.dataset, changes, options.out))
    return 0


def _stats(source: Source, options: argparse.Namespace) -> None:
    held = 0 if source.held_out is None else len(source.held_out)
    validation = f"validation {held}, " if held else ""
    print(f"train {len(source.train) - held}, {validation}test {len(source.test)}, ", end="")
    if isinstance(source.train, PhotoSet):
        print(sizes_in_words(source.train.sizes))
    else:
        print(f"each {tuple(source.train.images.shape[1:])} {source.train.images.dtype}")
    if source.classes:
        places = divided(source, 0, 0.0, 0)
        counts = [
            class_counts(
                (source.test if split == "test" else source.train).labels[chosen], source.classes
            )
            for split, chosen in places.items()
        ]
        names = [printable(name) for name in source.classes]
        width = max(map(len, names))
        for name, *numbers in zip(names, *counts, strict=True):
            print(f"  {name:<{width}}", *(f"{number:>8}" for number in numbers))
        print("mean", *(f"{value:.4f}" for value in source.mean))
        print("std ", *(f"{value:.4f}" for value in source.std))
    print(f"fingerprint {source.fingerprint}")
    _tell(source)


def _list(source: Source, options: argparse.Namespace) -> None:
    rows = rows_of(source, divided(source, 0, 0.0, 0))
    if not rows:
        raise UserError(
            f"the pictures of {source.name} have no names to list: they are made, or lie in one "
            "file.",
            code="no-names",
        )
    if options.out:
        try:
            write_split(options.out, rows)
        except OSError as error:
            raise UserError(
                f"cannot write {printable(options.out)}: {error.strerror or error}; try --out "
                "split.csv",
                code="output-unwritable",
            ) from None
        return print(f"{printable(options.out)}: {len(rows):,} pictures", file=sys.stderr)
    if sys.stdout.isatty():
        rows = [(printable(name), split, printable(of)) for name, split, of in rows]
    sys.stdout.flush()
    sys.stdout.buffer.write(split_text(rows).encode("utf-8", "surrogateescape"))
    return None


def _cache(options: argparse.Namespace) -> int:
    entries, most = kept(), size_limit()
    total = sum(one.size for one in entries)
    print(f"{printable(cache_dir())}: {in_bytes(total)} of at most {in_bytes(most)}")
    if options.empty:
        freed = trim(0)
        stay = f", {in_bytes(total - freed)} in use stay" if freed < total else ""
        print(f"removed {in_bytes(freed)}{stay}")
        return 0
    for one in reversed(entries):
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.used))
        print(f"  {in_bytes(one.size):>9}  used {used}  {printable(one.about or one.path.name)}")
    print("LOCKSTEP_CACHE=FOLDER puts it elsewhere, LOCKSTEP_CACHE_SIZE=50GB limits it")
    return 0


def _prepare(source: Source, options: argparse.Namespace) -> None:
    count = f"{len(source.train)} + {len(source.test)} images"
    if options.out and isinstance(source.train, PhotoSet) and options.out.suffix != ".safetensors":
        _pack(source, options)
        print(f"{count} in a pack: --dataset {printable(options.out)}")
        return _tell(source)
    print(f"{count} ready; cache: {printable(cache_dir())}")
    if options.out:
        why = ""
        if options.out.suffix != ".safetensors":
            why = "small pictures make one file, .safetensors (a pack is for photographs)"
        elif not options.out.parent.is_dir():
            why = "cannot be written"
        if why:
            raise UserError(
                f"{printable(options.out)}: {why}; try --out data.safetensors",
                code="output-unwritable",
            )
        save_source(source, options.out, options.image_size)
        print(f"{printable(options.out)}: {in_bytes(options.out.stat().st_size)}")
    _tell(source)


def _pack(source: Source, options: argparse.Namespace) -> None:
    dataset = str(Path(options.dataset).absolute()) if Path(options.dataset).exists() else ""
    photos = source.train.photos if isinstance(source.train, PhotoSet) else None
    if photos and isinstance(photos.store, FileStore):
        root = photos.store.root.resolve()
        if options.out.resolve().is_relative_to(root):
            raise UserError(
                f"--out {printable(options.out)} lies in the data set, of which each folder is a "
                f"class: give a folder outside of {printable(root)}",
                code="output-in-data",
            )
    given = {
        "--dataset": dataset or options.dataset, "--data-dir": options.data_dir,
        "--split": options.split and str(Path(options.split).absolute()),
        "--group-by": options.group_by,
        "--task": options.task if options.task != "classification" else None,
        "--image-size": options.image_size, "--store": options.store,
        "--short-side": options.short_side or "keep",
    }  # fmt: skip
    command = [str(word) for flag in given.items() if flag[1] for word in flag]
    command += ["--skip-bad-images"] * options.skip_bad_images
    pack(
        source, Form(options.store, options.short_side), options.out, command=command,
        image_size=options.image_size or PHOTOGRAPH, skip_bad=options.skip_bad_images, say=print,
    )  # fmt: skip


def _check(options: argparse.Namespace) -> int:
    folder = options.folder or options.dataset
    if folder is None:
        raise UserError("which pack? type python -m data check FOLDER", code="no-pack")
    if not is_pack(folder):
        raise UserError(f"{printable(folder)} is no pack", code="no-pack")
    files = check(folder)
    print(f"{printable(folder)}: {counted(files, 'file')}, all bytes as written")
    return 0


def _tell(source: Source) -> None:
    if source.tally:
        print(f"files {source.tally}")
    if source.skipped:
        left_out = counted(len(source.skipped), "image")
        print(f"{left_out} cannot be read:", *source.skipped[:10], sep="\n  ")
    for note in source.notes:
        print(f"warning: {printable(note)}")


if __name__ == "__main__":
    exit_told(main)
