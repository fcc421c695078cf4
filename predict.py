"""A run folder (or ImageNet weights) and pictures -> class names with confidences.

`python predict.py dog.png photos/ --run runs/latest`. Pictures are predicted one by one in
evaluation mode, without random crops: the same answer every time, whatever else is with them.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

from errors import FAILED, FINISHED, USER_ERROR, UserError
from models import lookup

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "image_size": 224}
CROP = 224 / 256  # ImageNet evaluates the middle 224 of 256 pixels


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("paths", nargs="+", help="pictures, or folders of pictures")
    parser.add_argument("--run", type=Path, default=Path("runs/latest"), help="a run folder")
    parser.add_argument("--model", help="instead of a run: a model of `python -m models`, with ...")
    parser.add_argument("--weights", help="... imagenet, or a file with ImageNet's 1,000 classes")
    parser.add_argument("--top", type=int, default=5, help="classes shown for each picture")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--csv", action="store_true", help="print CSV")
    arguments = parser.parse_args(argv)
    if bool(arguments.model) != bool(arguments.weights):
        parser.error("--model and --weights go together; without them a --run is used")
    if arguments.top < 1:
        parser.error(f"--top {arguments.top}: must be at least 1")
    return arguments


def load_run(folder: Path):
    """(model in evaluation mode, what its weights say of themselves) of a run."""
    from safetensors import SafetensorError, safe_open

    from models import build_model

    path = folder / "model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads(file.metadata()["lockstep"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        raise UserError(
            f"--run {folder}: there are no weights in it that can be read ({path.name}); a run "
            "writes them after its first evaluation. Runs: python train.py makes them in runs/"
        ) from None
    if lookup(told["model"]).task != "classification":
        raise UserError(f"--run {folder}: {told['model']} predicts a number, not a class")
    size = told["image_size"]
    model = build_model(told["model"], num_classes=len(told["classes"]), image_size=size)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"--run {folder}: its weights no longer fit {told['model']} "
            f"({str(error).splitlines()[-1].strip()}); did its file change?"
        ) from None
    return model.eval(), told


def load_imagenet(name: str, weights: str):
    """(model, what it was trained on) for ImageNet's classes."""
    from models import build_model
    from models.weights import imagenet_classes, imagenet_reach, load_weights

    if weights == "imagenet":
        reached, why = imagenet_reach(name)
        if not reached:
            raise UserError(f"--weights imagenet: {why}")
    model = build_model(name, num_classes=1000, image_size=IMAGENET["image_size"])
    told = load_weights(model, name, weights, 1000)
    if "the head for" in told:
        raise UserError(f"--weights {weights}: {told}; for a run of yours type --run FOLDER")
    return model.eval(), {**IMAGENET, "model": name, "classes": imagenet_classes(), "crop": CROP}


def pictures(paths: list[str]) -> list[Path]:
    """The files named, and those in the folders named, in order of their names."""
    from data.files import SUFFIXES

    found = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        found += inside or [path]  # a folder without pictures is named like any other failure
    return found


def predict(model, told: dict, path: Path, top: int) -> list[tuple[str, float]]:
    """The most likely classes of one picture with their probabilities."""
    import torch

    from data.augment import Augment
    from data.files import SMALL, decode
    from tasks import split_outputs

    device = next(model.parameters()).device
    size, crop = told["image_size"], told.get("crop", 1.0)
    pixels = decode(path, round(size / crop))  # small squares stay as they are, as in training
    height, width, _ = pixels.shape
    side = round(min(height, width) * (crop if max(height, width) > SMALL else 1))
    top_edge, left = (height - side) // 2, (width - side) // 2
    pixels = pixels[top_edge : top_edge + side, left : left + side]
    augment = Augment("none", size, told["mean"], told["std"], seed=0)
    images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(device)
    with torch.no_grad():
        logits = split_outputs(model(augment.evaluate(images)))[0][0].float()
    best = logits.softmax(0).topk(min(top, len(logits)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [(told["classes"][index], value) for index, value in pairs]


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    try:
        if arguments.model:
            model, told = load_imagenet(arguments.model, arguments.weights)
        else:
            model, told = load_run(arguments.run)
    except UserError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    import torch

    model.to("cuda" if torch.cuda.is_available() else "cpu")
    results, status = {}, FINISHED
    for path in pictures(arguments.paths):
        try:
            results[str(path)] = predict(model, told, path, arguments.top)
        except Exception as error:  # Pillow raises many kinds on damaged files
            print(f"{path}: {error}" if str(path) not in str(error) else error, file=sys.stderr)
            status = FAILED
    show(results, arguments)
    return status


def show(results: dict[str, list], arguments: argparse.Namespace) -> None:
    if arguments.json:
        rows = [
            {"path": p, "predictions": [{"class": c, "confidence": v} for c, v in found]}
            for p, found in results.items()
        ]
        print(json.dumps(rows, indent=2))
    elif arguments.csv:
        writer = csv.writer(sys.stdout)
        writer.writerow(["path", "rank", "class", "confidence"])
        for path, found in results.items():
            writer.writerows([path, rank, *pair] for rank, pair in enumerate(found, 1))
    else:
        from report import Report

        Report().predictions(results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
