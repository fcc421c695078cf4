"""Weights from elsewhere: ImageNet's, a file's; the head that does not fit; a frozen backbone."""

import argparse
import contextlib
import fnmatch
import re
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import nn

from common.errors import UserError
from common.text import both_sides, counted, did_you_mean, places, some
from models import TIMM, card_of_weights, lookup, parts_of, timm_zoo
from models.hooks import NamesAuxiliaryHeads
from models.own_file import is_own_file
from models.state import beside_state_dict, is_extra, load_whole_state, twin, whole_state

BLOCK = re.compile(r".*?[._]\d+(\.\d+)*(?=\.|$)")  # layer1.0, features.1.0, encoder_layer_0
REACH_SECONDS = 4.0  # name resolution can block for a minute where nothing answers


def imagenet_reach(name: str) -> tuple[bool, str]:
    """Can ImageNet weights of this model be had, and a sentence that says where or why not.

    Of a timm model they are those that timm names, whatever they were trained on. Looks into the
    hub's cache first, then asks the server within four seconds.
    """
    if not lookup(name).pretrained:
        return False, f"there are no ImageNet weights for {name}{_same_net_in_torchvision(name)}"
    url, file = _imagenet_url(name), _imagenet_file(name)
    hub = "the hub's cache" if name.startswith(TIMM) else "torch hub's cache"
    if file.is_file():
        return True, f"ImageNet weights for {name} are in {hub} ({file})"
    # A process of its own: a blocked name resolution cannot be interrupted within ours.
    # urllib honours HTTPS_PROXY and NO_PROXY.
    ask = "import sys, urllib.request as u; u.urlopen(u.Request(sys.argv[1], method='HEAD'))"
    command = [sys.executable, "-c", ask, url]
    try:
        asked = subprocess.run(command, capture_output=True, timeout=REACH_SECONDS, text=True)
    except subprocess.TimeoutExpired:
        reason = f"no answer within {REACH_SECONDS:g} seconds"
    else:
        if asked.returncode == 0:
            return True, f"ImageNet weights for {name} can be downloaded ({url})"
        reason = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
    there = f"put it into {file.parent} and run again"
    if name.startswith(TIMM):
        there = "and type --weights FILE"
    return False, (
        f"ImageNet weights for {name} are not in {hub} and cannot be downloaded "
        f"({reason}); set HTTPS_PROXY if you need one, or fetch {url} elsewhere, {there}"
    )


def load_weights(
    model: nn.Module, name: str, weights: str, num_classes: int, classes: Sequence[str] = (),
    as_they_are: bool = False, image_size: int = 0,
) -> str:  # fmt: skip
    """Loads "imagenet" or a .pth / .safetensors file into the model; a sentence about what came.

    Where both sides name their classes, the rows of the head are matched by name, and those of
    classes that the file does not know stay as initialised; so does a head for another number of
    classes. Any other difference is a UserError and leaves the model as it was, and so is a head
    with new rows if the weights are to be used `as_they_are`. Never executes code from a file.
    Processes that share a torch hub cache should not download together: let one go first.
    """
    file, origin = Path(weights).expanduser(), f"weights from {weights}"
    if weights == "imagenet":
        file, origin = _fetch_imagenet(name), f"ImageNet weights of {name}"
    beside = beside_state_dict(model)  # a run's file may have them
    own = {k: v for k, v in whole_state(model).items() if k not in beside}
    loaded = {_key(key, own): value for key, value in _read(file).items()}
    loaded, wrapped = _out_of_a_wrapper(loaded, own)
    if lookup(name).pretrained.startswith("densenet"):  # published under their names of 2017
        loaded = {re.sub(r"\.(norm|conv)\.([12])\.", r".\1\2.", k): v for k, v in loaded.items()}
    loaded, summed = _in_grey(loaded, own)
    loaded, resized = _for_this_size(loaded, own, model, name, image_size)
    origin += wrapped + resized + summed

    names = _Names(_classes_of(weights, name), tuple(classes), weights)
    if as_they_are:
        names.refuse_others()
    heads = head_prefixes(model, name, image_size)
    if names.permute:
        _match_rows(loaded, own, heads, names.rows, len(names.known), weights)
    headless = not any(key.startswith(heads) for key in loaded) and name.startswith(TIMM)
    no_row = bool(names.rows and not names.kept)
    fresh = tuple(h for h in heads if _other_classes(h, loaded, own) or headless or no_row)
    theirs = 0 if headless or not fresh else loaded[_head_key(fresh[0], own)].shape[0]
    if fresh and as_they_are:
        raise UserError(
            f"--weights {weights}: they know {counted(theirs, 'class')}, and the data have "
            f"{num_classes}: the head would be a new one, which knows nothing",
            code="other-classes",
        )
    given = {k: v for k, v in loaded.items() if not k.startswith(fresh)}
    extra = {k: given.pop(k) for k in beside & given.keys()}
    wanted = {k: v for k, v in own.items() if k in given or not k.startswith(fresh)}
    if problems := _differences(given, wanted, own):
        raise UserError(
            f"--weights {weights} does not fit --model {name}: {'; '.join(problems)}; "
            + _trained_as(weights),
            code="weights-do-not-fit",
        )
    load_whole_state(model, whole_state(model) | given | extra)
    if names.permute:
        return origin + names.in_words(len(given))
    if not fresh:
        doubt = ""
        if classes and not names.known:
            doubt = "; it names no classes: those of the data are taken to be its own, in order"
        return f"{origin}, all {len(given)} tensors{doubt}"
    parts = ", ".join(head.removesuffix(".") or "all of it" for head in fresh)
    which = counted(theirs, "class")
    if names.rows:
        which = f"{counted(theirs, 'other class')} ({some(names.known, 4)})"
    return f"{origin}; they know {which}, so the head for {num_classes} is new ({parts})"


class _Names:
    """Whose classes a file's head answers for, beside those of the data."""

    def __init__(self, known: Sequence[str], classes: tuple[str, ...], weights: str):
        self.known, self.classes, self.weights = known, classes, weights
        mine = _as_imagenet(classes) if weights == "imagenet" else list(classes)
        self.rows = places(mine, known) if known and mine else []  # of the file, one a class
        self.same = None not in self.rows and len(self.rows) == len(known)
        self.kept = sum(row is not None for row in self.rows)
        self.permute = self.kept > 0 and self.rows != list(range(len(known)))

    def refuse_others(self) -> None:
        """Weights that are used as they are know the classes of the data and no others."""
        if self.rows and not self.same:
            sides = both_sides("the weights know", self.known, "the data have", self.classes)
            raise UserError(
                f"--weights {self.weights}: other classes: {sides}", code="other-classes"
            )

    def in_words(self, tensors: int) -> str:
        """What came of it, where rows were matched by name."""
        if self.same:
            return f", all {tensors} tensors, the head's rows in the order of the data"
        new = [self.classes[place] for place, row in enumerate(self.rows) if row is None]
        gone = [other for place, other in enumerate(self.known) if place not in self.rows]
        dropped = f", those of {some(gone, 4)} are left out" if gone else ""
        which = f", the head's rows of {some(new, 4)} are new" if new else ""
        return f": {self.kept} of {len(self.rows)} classes kept{which}{dropped}"


def _differences(given: dict, wanted: dict, own: dict) -> list[str]:
    """How tensors that are given differ from those that are wanted, a phrase for each kind."""
    shapes = [
        f"{k} ({_shape(v)} in the file, {_shape(own[k])} in the model)"
        for k, v in given.items()
        if k in own and v.shape != own[k].shape and not is_extra(k)
    ]
    return [
        f"{what} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for what, keys in (
            ("missing:", [k for k in wanted if k not in given]),
            ("not in the model:", [k for k in given if k not in own]),
            ("other shapes:", shapes),
        )
        if keys
    ]


def _trained_as(weights: str) -> str:
    """With which flags weights that do not fit were trained, or that these should be given."""
    if not (card := card_of_weights(weights)):
        return "name the model (and --image-size) that these weights were trained with"
    parts = "".join(f" --{part} {value}" for part, value in parts_of(card).items())
    return f"it was trained as --model {card['model']} --image-size {card['image_size']}{parts}"


def imagenet_classes() -> list[str]:
    """The 1,000 class names in the order of the published weights' logits."""
    from torchvision.models import AlexNet_Weights

    return list(AlexNet_Weights.DEFAULT.meta["categories"])


def head_prefixes(model: nn.Module, name: str, image_size: int = 0) -> tuple[str, ...]:
    """Parameter-name prefixes of the classification head(s): the last module with parameters.

    In a learner's own file the last one to run on images of `image_size`, for its __init__ may
    have another order; else the last one registered, as in each auxiliary head. "" means the model
    itself.
    """
    if name.startswith(TIMM):
        return tuple(f"{head}." for head in timm_zoo.heads_of(name.removeprefix(TIMM)))
    tops = ("", *(model.auxiliary_heads if isinstance(model, NamesAuxiliaryHeads) else ()))
    heads = []
    for top in tops:
        prefix = f"{top}." if top else ""
        layers = [
            prefix + path
            for path, module in model.get_submodule(top).named_modules()
            if any(True for _ in module.parameters(recurse=False))
        ]
        if not layers:
            raise UserError(
                f"--model {name}: no layer of it has a parameter, nothing can learn",
                code="nothing-trains",
            )
        last = layers[-1]
        if not top and image_size and is_own_file(name):
            last = _last_to_run(model, layers, image_size)
        heads.append(f"{last}." if last else "")
    return tuple(heads)


def _last_to_run(model: nn.Module, layers: list[str], image_size: int) -> str:
    """Of these layers the last to answer; one that holds another of them which ran is no layer."""
    order = _order(model, layers, image_size)
    ran = [p for p in order if not any(q.startswith(f"{p}." if p else "") for q in order if q != p)]
    return ran[-1] if ran else layers[-1]


def _order(model: nn.Module, layers: list[str], image_size: int) -> list[str]:
    """These layers as they answer to images, a layer that runs twice twice; [] if it fails."""
    device, order = next(model.parameters()).device, []
    try:
        second = twin(model).eval()
        for path in layers:
            second.get_submodule(path).register_forward_hook(
                lambda *_, path=path: order.append(path)
            )
    except Exception:  # the trial step says what is wrong
        return []
    for channels in (3, 1):
        order.clear()
        with contextlib.suppress(Exception), torch.no_grad():
            second(torch.zeros(2, channels, image_size, image_size, device=device))
            return order
    return []


def freeze_backbone(model: nn.Module, name: str, image_size: int = 0) -> None:
    """Leaves only the head trainable. What is frozen stays in eval mode, also after train().

    Otherwise batch norm would go on learning its statistics, and dropout would blur the features.
    """
    heads = head_prefixes(model, name, image_size)
    frozen = [p for key, p in model.named_parameters() if not key.startswith(heads)]
    if not frozen:
        raise UserError(
            f"--freeze backbone: {name} has no layers besides its head, so nothing would be "
            "frozen; leave --freeze out",
            code="nothing-trains",
        )
    for parameter in frozen:
        parameter.requires_grad_(False)
    _hold_in_eval(model, "", heads)


def freeze(model: nn.Module, what: str, name: str, image_size: int = 0) -> None:
    """Leave parts of a model as they are: `backbone`, or names of parameters or modules with *.

    A module all of whose parameters are frozen so stays in eval mode, also after train(): its batch
    norms keep their statistics, its dropout is off. Raises UserError on a pattern that is no name.
    """
    if what == "backbone":
        freeze_backbone(model, name, image_size)
    if what in ("none", "backbone"):
        return
    known = dict(model.named_parameters())
    modules = [path for path, _ in model.named_modules() if path]
    frozen: set[str] = set()
    for pattern in what.split(","):
        found = named(pattern, known)
        if not found:
            tops = [path for path, _ in model.named_children()]
            raise UserError(
                f"--freeze {pattern}: no parameter or module of {name} has such a name"
                f"{did_you_mean(pattern.rstrip('.*'), [*modules, *known])}; its parts are "
                f"{some(tops)}, and backbone is all but the head",
                code="nothing-to-freeze",
            )
        frozen |= found
    if not any(p.requires_grad for key, p in known.items() if key not in frozen):
        raise UserError(
            f"--freeze {what}: nothing of {name} would train; leave its last layer out, or type "
            "--freeze backbone",
            code="nothing-trains",
        )
    for key in frozen:
        known[key].requires_grad_(False)
    hold_frozen(model, "", frozen)


def named(pattern: str, keys: Iterable[str]) -> set[str]:
    """The parameters that a pattern with * means, or the module that they are in."""
    ways = (pattern, f"{pattern}.*")
    return {key for key in keys if any(fnmatch.fnmatchcase(key, way) for way in ways)}


def hold_frozen(module: nn.Module, prefix: str, frozen: set[str]) -> None:
    """Modules below this one, all of whose parameters are frozen, stay in evaluation mode."""
    for child_name, child in module.named_children():
        keys = [f"{prefix}{child_name}.{key}" for key, _ in child.named_parameters()]
        if keys and frozen.issuperset(keys):
            _stay(child)
        elif keys:
            hold_frozen(child, f"{prefix}{child_name}.", frozen)


def _stay(module: nn.Module) -> None:
    module.eval()
    # On the module itself: whatever wraps the model later still asks it through train().
    module.train = MethodType(_stay_in_eval, module)


def let_go(model: nn.Module) -> None:
    """The next train() reaches all modules again."""
    for module in model.modules():
        if getattr(vars(module).get("train"), "__func__", None) is _stay_in_eval:
            del module.train


def depths(model: nn.Module, name: str, image_size: int) -> dict[str, int]:
    """How deep each parameter lies, by name, counted from 0 at the images, in order of running.

    A block (whatever is numbered: layer1.0, features.3) is one depth, a layer outside of blocks
    another; a norm belongs to what runs before it. What belongs to no layer, position embeddings
    and such, lies at 0, what does not run in evaluation (auxiliary heads) as deep as the head.
    """
    parameters = dict(model.named_parameters())
    owners = {key: key.rpartition(".")[0] for key in parameters}
    layers = list(dict.fromkeys(owners.values()))

    def around(path: str) -> bool:  # what holds layers, and parameters of its own beside them
        inner = any(other.startswith(f"{path}.") for other in layers)
        return not path or (inner and not BLOCK.match(path))

    number, last = {}, -1
    for path in _order(model, layers, image_size):
        block = _block(path)
        if around(path) or block in number:
            continue
        inside = [parameters[key] for key, owner in owners.items() if _block(owner) == block]
        last += last < 0 or any(p.ndim > 1 for p in inside)
        number[block] = last
    if not number:
        raise UserError(
            f"--layer-decay: {name} does not run on blank images in evaluation, which tells the "
            "order of its layers; leave --layer-decay out",
            code="no-layer-order",
        )
    return {
        key: number.get(_block(path), 0 if around(path) else last) for key, path in owners.items()
    }


def _block(path: str) -> str:
    """The numbered part of a model that a layer belongs to; itself where it is in none."""
    found = BLOCK.match(path)
    return found[0] if found else path


def _hold_in_eval(module: nn.Module, prefix: str, heads: tuple[str, ...]) -> None:
    for child_name, child in module.named_children():
        path = f"{prefix}{child_name}."
        if path in heads:
            continue
        if any(head.startswith(path) for head in heads):
            _hold_in_eval(child, path, heads)
        else:
            _stay(child)


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def _same_net_in_torchvision(name: str) -> str:
    return "; torchvision:resnet18 has them" if name == "resnet18" else ""


def _in_grey(
    loaded: dict[str, torch.Tensor], own: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], str]:
    """Filters of three colours summed for a model of one channel, and what to tell of that.

    To a grey image they answer what they did to it in three colours.
    """
    colours = {
        k: v.sum(1, keepdim=True)
        for k, v in loaded.items()
        if v.ndim == 4 and v.shape[1] == 3 and k in own
        and own[k].shape == (len(v), 1, *v.shape[2:])
    }  # fmt: skip
    if not colours:
        return loaded, ""
    return loaded | colours, f", the filters of {', '.join(colours)} summed over the colours"


def _for_this_size(
    loaded: dict[str, torch.Tensor], own: dict[str, torch.Tensor], model: nn.Module, name: str,
    image_size: int,
) -> tuple[dict[str, torch.Tensor], str]:  # fmt: skip
    """Weights with the shapes that a model for these images has, and what to tell of that.

    Position embeddings of other sizes are interpolated, as the libraries do it.
    """
    shapes = {k: tuple(v.shape) for k, v in own.items()}
    if name.startswith(TIMM):
        heads = tuple(f"{head}." for head in timm_zoo.heads_of(name.removeprefix(TIMM)))
        fits = all(
            k in loaded and shapes[k] == tuple(loaded[k].shape)
            for k in own if not k.startswith(heads)
        )  # fmt: skip
        if not fits:
            loaded = timm_zoo.as_this_version_has(loaded, own, name.removeprefix(TIMM), image_size)
            return loaded, ", as timm converts them to this version and size"
    places = "encoder.pos_embedding"  # of torchvision's vision transformers
    if lookup(name).pretrained.startswith("vit_") and places in loaded:
        from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

        if isinstance(model, VisionTransformer) and shapes[places] != loaded[places].shape:
            sides = [int((s[1] - 1) ** 0.5) for s in (loaded[places].shape, shapes[places])]
            state = OrderedDict(loaded)
            loaded = interpolate_embeddings(model.image_size, model.patch_size, state)
            then, now = (f"{side} x {side}" for side in sides)
            return loaded, f", position embeddings of {then} patches interpolated to {now}"
    return loaded, ""


def _imagenet_url(name: str) -> str:
    if name.startswith(TIMM):
        return timm_zoo.published(name.removeprefix(TIMM))[0]
    from torchvision.models import get_model_weights

    return get_model_weights(lookup(name).pretrained)["DEFAULT"].url


def _imagenet_file(name: str) -> Path:
    if name.startswith(TIMM):
        return timm_zoo.published(name.removeprefix(TIMM))[1]
    return Path(torch.hub.get_dir(), "checkpoints", _imagenet_url(name).rpartition("/")[2])


def _fetch_imagenet(name: str) -> Path:
    reachable, sentence = imagenet_reach(name)
    if not reachable:
        raise UserError(f"--weights imagenet: {sentence}", code="weights-unreachable")
    file, url = _imagenet_file(name), _imagenet_url(name)
    if not file.is_file() and "/resolve/" in url:
        try:
            return timm_zoo.fetch(name.removeprefix(TIMM))
        except Exception as error:  # of the hub's client, which has many
            raise UserError(
                f"--weights imagenet: {url} did not arrive ({str(error).splitlines()[0]})",
                code="weights-unreachable",
            ) from error
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        checksum = re.search(r"-([0-9a-f]{8,})\.", file.name)  # published names end in it
        try:
            torch.hub.download_url_to_file(
                url, str(file), hash_prefix=checksum and checksum[1], progress=False
            )
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"--weights imagenet: {url} did not arrive ({error})", code="weights-unreachable"
            ) from error
    return file


def _read(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a weights file by name, on the CPU."""
    if file.is_dir():
        raise UserError(
            f"--weights {file} is a folder; type {file / 'model.safetensors'}",
            code="no-weights-file",
        )
    if not file.is_file():
        raise UserError(
            f"--weights {file}: there is no such file (nor is it the word imagenet)",
            code="no-weights-file",
        )
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            # A namespace of arguments, a best accuracy of numpy's lie beside weights; no code.
            kinds = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64")]
            scalar: Any = np.float64(0).__reduce__()[0]
            plain = torch.serialization.safe_globals([argparse.Namespace, np.dtype, *kinds, scalar])
            with plain, warnings.catch_warnings(action="ignore"):  # the error below says it better
                state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has errors of its own, and all mean the same here
        raise UserError(
            f"--weights {file} cannot be read: it is damaged, or holds more than tensors, and code "
            "in a weights file is never run; save torch.save(model.state_dict(), 'weights.pth') "
            "or a .safetensors file",
            code="bad-weights-file",
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not (isinstance(state, dict) and state) or not all(
        isinstance(value, torch.Tensor) for value in state.values()
    ):
        raise UserError(
            f"--weights {file} is no table of tensors by name; save model.state_dict() into it",
            code="bad-weights-file",
        )
    return state


def _key(key: str, own: dict[str, torch.Tensor]) -> str:
    """The key without what DistributedDataParallel, torch.compile and Lightning put before it."""
    while key not in own and (prefix := re.match(r"(module|_orig_mod|model)\.", key)):
        key = key[prefix.end() :]
    return key


def _out_of_a_wrapper(
    loaded: dict[str, torch.Tensor], own: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], str]:
    """Where no name fits: with the one first name less, or more, with which most of them do.

    A LightningModule that holds the network as `self.net` saves `net.conv.weight`; a class that
    holds a published network as `self.net` lacks the name in the published file.
    """
    if not loaded or loaded.keys() & own.keys():
        return loaded, ""
    ways: list[tuple[dict[str, torch.Tensor], str]] = []
    for front in {key.partition(".")[0] + "." for key in loaded}:
        cut = {k.removeprefix(front): v for k, v in loaded.items() if k.startswith(front)}
        others = [key for key in loaded if not key.startswith(front)]
        rest = f"; {some(others, 3)} left out" if others else ""
        ways.append((cut, f", its {front}* as the model{rest}"))
    for front in {key.partition(".")[0] + "." for key in own}:
        ways.append(({front + k: v for k, v in loaded.items()}, f", as the model's {front}*"))
    fit = [len(way.keys() & own.keys()) for way, _ in ways]
    if max(fit) * 2 <= len(own) or fit.count(max(fit)) > 1:  # of two networks neither is meant
        return loaded, ""
    return ways[fit.index(max(fit))]


def _classes_of(weights: str, name: str) -> Sequence[str]:
    """What the rows of the file's head are called; () where it does not say."""
    if weights != "imagenet":
        return card_of_weights(weights).get("classes", ())
    if name.startswith(TIMM):
        count = timm_zoo.config_of(name.removeprefix(TIMM)).num_classes
        return imagenet_classes() if count == 1000 else ()
    return imagenet_classes()


def _as_imagenet(classes: Sequence[str]) -> list[str]:
    """Classes under the names that the published weights have: `tench, Tinca tinca` is tench.

    All thousand folders by their numbers (n01440764) lie in the order of the weights.
    """
    numbers = [re.fullmatch(r"n\d{8}", name) for name in classes]
    names = [name.partition(",")[0] for name in classes]
    known = imagenet_classes()
    if len(classes) != len(known):
        return names
    alike = sum(one == other for one, other in zip(names, known, strict=True))
    return known if all(numbers) or alike > 0.9 * len(known) else names


def _match_rows(
    loaded: dict[str, torch.Tensor], own: dict[str, torch.Tensor], heads: Sequence[str],
    rows: Sequence[int | None], count: int, weights: str,
) -> None:  # fmt: skip
    """Put into `loaded` heads for the model's classes: row n is the file's rows[n], or the own."""
    for head in heads:
        keys = [key for key in own if key.startswith(head)]
        if not all(key in loaded and loaded[key].shape[:1] == (count,) for key in keys) or not all(
            own[key].shape == (len(rows), *loaded[key].shape[1:]) for key in keys
        ):
            raise UserError(
                f"--weights {weights}: its classes are others or in another order, and the layer "
                f"{head.removesuffix('.')} that should answer for them has not {count} rows: "
                "assign the layer that answers last in __init__",
                code="weights-do-not-fit",
            )
        for key in keys:
            theirs, matched = loaded[key], own[key].detach().clone()
            for place, row in enumerate(rows):
                if row is not None:
                    matched[place] = theirs[row]
            loaded[key] = matched


def _head_key(head: str, own: dict[str, torch.Tensor]) -> str:
    return next(key for key in own if key.startswith(head))


def _other_classes(
    head: str, loaded: dict[str, torch.Tensor], own: dict[str, torch.Tensor]
) -> bool:
    """Does the file's head differ in its number of classes, and in nothing else?"""
    if not head:
        return False
    theirs = {k: v.shape for k, v in loaded.items() if k.startswith(head)}
    ours = {k: v.shape for k, v in own.items() if k.startswith(head)}
    return (
        theirs.keys() == ours.keys()
        and theirs != ours
        and all(len(s) and len(ours[k]) and s[1:] == ours[k][1:] for k, s in theirs.items())
    )


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
