"""Where a model looked: Grad-CAM (Selvaraju et al., ICCV 2017) of its surest mistakes.

Each place counts with its own slope (HiResCAM, Draelos and Carin 2020): the same where a mean over
the places leads to the classes, and right also where a layer reads each place apart.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from common.disk import write_text
from common.text import percent, printable
from data.splits import names_of
from distributed.checkpoint import Progress, card_of
from models import build_from
from models.state import load_whole_state
from report import pictures
from tasks import split_outputs
from training.data import Data

MOST_LOOKED = 8  # mistakes; each costs a forward and a backward, on the CPU


def keep_mistakes(data: Data, progress: Progress, folder: Path, name: str) -> str:
    """mistakes.json, by name, and gradcam.png of the surest; what to tell where that cannot be.

    The main process alone is here: the best weights are built anew beside those that trained.
    """
    examples = progress.best_metrics.get("examples", [])
    if not examples or data.source.task != "classification":
        return ""
    names, places = names_of(data.source, "test"), data.places["test"].tolist()
    named = [{**e, "name": names[places[e["index"]]] if names else ""} for e in examples]
    content = {"epoch": progress.best_epoch, "mistakes": named}
    write_text(folder / "mistakes.json", json.dumps(content) + "\n")
    best = folder / "model.safetensors"
    model = build_from(card_of(best), data.num_outputs, name).eval()
    if load_whole_state(model, load_file(best)):
        return "no gradcam.png: the best weights do not fit the model any more"
    surest = sorted(examples, key=lambda e: -e["confidence"])[:MOST_LOOKED]
    seen = data.test.seen(torch.tensor([e["index"] for e in surest])).cpu()
    looked = gradcam(model, data.augment.evaluate(seen), [e["answer"] for e in surest])
    if looked is None:
        return "no gradcam.png: the model has no map of places, as those of convolutions"
    sheet, words, classes = [], [], [printable(c) for c in data.classes]
    for image, heat, e in zip(seen, looked, surest, strict=True):
        sheet += [image, heated(image, heat)]
        words += [f"{classes[e['label']]}\nas {classes[e['answer']]}, {percent(e['confidence'])}"]
        words += [f"what spoke for\n{classes[e['answer']]}"]
    pictures.sheet(torch.stack(sheet), words, folder / "gradcam.png")
    return ""


def gradcam(model: nn.Module, images: Tensor, answers: list[int]) -> Tensor | None:
    """How much each place spoke for an answer, 0 to 1, (n, h, w); None without a map of places.

    images (n, C, S, S) as the model is given them. The map is the last one in the order of the run
    that has several places: (channels, h, w) of one image.
    """
    maps: list[Tensor] = []

    def keep(module: nn.Module, given: tuple, made: Tensor | tuple | dict) -> None:
        if isinstance(made, Tensor) and made.ndim == 4 and made.shape[2] * made.shape[3] > 1:
            maps.append(made)

    hooks = [m.register_forward_hook(keep) for m in model.modules()]
    found = []
    try:
        for image, answer in zip(images, answers, strict=True):
            maps.clear()
            with torch.enable_grad():
                logits = split_outputs(model(image[None].requires_grad_()))[0]
                chosen = next((m for m in reversed(maps) if m.requires_grad), None)
                if chosen is None:
                    return None
                (slopes,) = torch.autograd.grad(logits[0, answer], chosen, allow_unused=True)
            if slopes is None:  # of an auxiliary head
                return None
            heat = (slopes * chosen.detach()).sum(1).relu()[0]
            found.append(heat / heat.max().clamp(min=1e-12))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


def heated(image: Tensor, heat: Tensor) -> Tensor:
    """A uint8 image (3, H, W) in grey, with red where it is hot, and yellow where it is hottest."""
    shape = tuple(image.shape[1:])
    heat = F.interpolate(heat[None, None], shape, mode="bilinear")[0, 0]
    grey = image.float().mean(0) * 0.6
    red, green = 255 * heat.clamp(max=0.5) * 2, 255 * (heat - 0.5).clamp(min=0) * 2
    layers = [grey + (255 - grey) * red / 255, grey * (1 - heat) + green, grey * (1 - heat)]
    return torch.stack(layers).clamp(0, 255).byte()
