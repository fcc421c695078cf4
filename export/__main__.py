"""`python -m export RUN --to onnx|torch.export|safetensors|hub`: a model for other programs."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import FAILED, FINISHED, USER_ERROR, UserError
from common.parser import Parser, need_packages
from common.streams import exit_told
from common.text import pasted, printable
from config.layers import latest_in_words

if TYPE_CHECKING:
    from torch import nn

    from export.forms import Ask

FORMS = ("onnx", "torch.export", "safetensors", "hub")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; UserError where it makes no sense."""
    parser = Parser("python -m export", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--to", choices=FORMS, required=True, help="the form of the file")
    parser.add_argument("--last", action="store_true", help="the last weights, not the best")
    parser.add_argument("--out", type=Path, help="the file, or hub's folder (default: RUN/export/)")
    parser.add_argument(
        "--check", type=int, default=64, metavar="N",
        help="test pictures on which the file must answer what the model answers (default: 64)",
    )  # fmt: skip
    parser.add_argument("--upload", metavar="REPO", help="hub: send it there too, NAME/MODEL")
    parser.add_argument(
        "--trust-code", action="store_true",
        help="execute the model's own file also for weights that are not of a run of yours",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.upload and arguments.to != "hub":
        parser.error("--upload sends the folder that --to hub writes: type --to hub")
    if arguments.check < 0:
        parser.error(f"--check {arguments.check}: must be 0 (none) or more")
    return arguments


def main(argv: list[str]) -> int:
    """Export what was asked for; returns the exit status."""
    try:
        need_packages()
        return export(parse(argv))
    except (UserError, OSError) as error:
        print(printable(str(error).removeprefix("--run ")), file=sys.stderr)
        return FAILED if getattr(error, "code", "") == "answers-differ" else USER_ERROR


def export(arguments: argparse.Namespace) -> int:
    """Write the file, check it, tell what it is."""
    from export import forms, hub
    from export.service import as_text, channels_of, confidences, describe, exported_card, side_of
    from models.own_file import code_of_weights, is_own_file
    from predict import load_run
    from report.screen import Report

    folder, form = latest_in_words(arguments.run), arguments.to
    arguments.run = folder
    if form == "onnx":
        forms.need("onnx", "onnxscript")
    if folder.is_file():
        raise UserError(f"{folder}: name the run's folder, {folder.parent}", code="no-run")
    weights = folder / ("last.safetensors" if arguments.last else "model.safetensors")
    model, card = load_run(weights if folder.is_dir() else folder, arguments.trust_code)
    built = card["model"]
    if is_own_file(built):
        built = code_of_weights(built, card.get("code", {}), folder, arguments.trust_code)
    graph = form in ("onnx", "torch.export")
    about = describe(folder, card, arguments.last, normalised=graph)
    path = arguments.out or folder / "export" / forms.NAMES[form]
    file = path / forms.NAMES["safetensors"] if form == "hub" else path
    if file.is_dir():
        raise UserError(f"--out {file} is a folder: name a file", code="bad-out")
    text = as_text(about if graph else exported_card(card, about))
    with forms.staged(file) as partly:
        if form == "onnx":
            ask = forms.write_onnx(model, card, text, partly)
        elif form == "torch.export":
            ask = forms.write_program(model, card, text, partly)
        else:
            ask = forms.write_safetensors(model, card, text, partly, built)
        found, doubt = check(arguments, card, built, model, ask)
    side, outside = side_of(card), "" if graph else ", then mean and std"
    averaged = "averaged weights" if about["averaged"] else "weights"
    rows = [
        ("file", str(file)),
        ("weights", f"{about['weights']} {averaged}, of step {about['step']}"),
        (
            "input",
            f"images (n, {len(card['mean'])}, {side}, {side}), float32, "
            f"{channels_of(card)} in 0..1{outside}",
        ),
        ("output", f"logits (n, {len(card['classes'])}); confidences: {confidences(card)}"),
        ("says", "classes, preprocessing, metrics: JSON, as lockstep in its metadata"),
        ("checked", found or f"no, {doubt}"),
    ]
    commands = []
    if form == "hub":
        rows.append(("card", hub.write_folder(path, about, card, built)))
        trust = ["--trust-code"] * is_own_file(built)
        commands.append(("try", pasted("predict.py", "PICTURE.png", "--run", path, *trust)))
        if arguments.upload:
            rows.append(("uploaded", hub.upload(path, arguments.upload)))
    Report().end_panel(f"exported {folder}", rows, good=not doubt, commands=commands)
    return FINISHED


def check(
    arguments: argparse.Namespace, card: dict, built: str, model: "nn.Module", ask: "Ask | None"
) -> tuple[str, str]:
    """(What a check on test pictures found, or why there was none).

    Raises UserError where the file answers otherwise than the model: then it is not kept.
    """
    from export.check import compare, pictures_of_run

    if not arguments.check:
        return "", "as --check 0 asks"
    if ask is None:
        return "", "onnxruntime is not installed: pip install onnxruntime"
    try:
        pictures = pictures_of_run(arguments.run, card, built, arguments.check)
    except (OSError, ValueError) as error:
        return "", f"the run's test pictures are not to be had: {error}"
    found = compare(model, card, ask, pictures)
    if not found.holds:
        raise UserError(
            f"{arguments.run}: the exported file answers otherwise than the model, {found}; it is "
            "not kept (a model that draws numbers when it is evaluated has no one answer)",
            code="answers-differ",
        )
    return str(found), ""


if __name__ == "__main__":
    exit_told(lambda: main(sys.argv[1:]))
