"""Any classifier of timm, an optional package: its architecture, its head, its published weights.

timm is imported where it is needed, and torch with it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from common.errors import UserError
from common.text import did_you_mean, some
from models import no_drop_path

if TYPE_CHECKING:
    from timm.models import PretrainedCfg
    from torch import Tensor, nn

FILES = ("model.safetensors", "pytorch_model.bin")  # of a hub repository, the best one first


def config_of(name: str) -> PretrainedCfg:
    """What timm says of ARCHITECTURE or ARCHITECTURE.TAG; UserError if it knows no such model."""
    timm = imported(name)
    from timm.models import get_pretrained_cfg, list_pretrained

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = timm.list_models()
        raise UserError(
            f"--model timm:{name}: timm {timm.__version__} has no model of that name"
            f"{did_you_mean(architecture, known)}; python -m models 'timm:*{architecture[:4]}*' "
            "lists some",
            code="unknown-model",
        )
    try:
        found = get_pretrained_cfg(name)
    except RuntimeError:
        tags = [n.partition(".")[2] for n in list_pretrained(f"{architecture}.*")]
        raise UserError(
            f"--model timm:{name}: timm has no weights {tag} of {architecture}"
            f"{did_you_mean(tag, tags)}; it has {', '.join(tags)}",
            code="unknown-model",
        ) from None
    if found is None or not found.classifier:
        raise UserError(
            f"--model timm:{name}: it answers features, and has no layer that classifies",
            code="not-a-classifier",
        )
    return found


def imported(name: str) -> ModuleType:
    """The package; UserError with what to type where it is not installed."""
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"--model timm:{name} needs the package timm ({error}); type: pip install timm",
            code="needs-timm",
        ) from None
    return timm


def names_like(pattern: str) -> list[str]:
    """Names of timm's models that a pattern with * describes, in their order."""
    return imported(pattern).list_models(pattern or "*")


def build(
    name: str, num_classes: int, image_size: int, drop_path: float | None = None,
    in_channels: int = 3,
) -> nn.Module:  # fmt: skip
    """timm's model, untrained; given the size of the images where its shape depends on it."""
    own = config_of(name).input_size[1]
    more: dict[str, float] = {} if drop_path is None else {"drop_path_rate": drop_path}
    more |= {"in_chans": in_channels} if in_channels != 3 else {}
    try:
        return _create(name, num_classes, image_size, **more)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        if "in_chans" in str(error):
            raise UserError(
                f"--channels {in_channels}: timm:{name} takes three colours", code="contradiction"
            ) from error
        if more and "drop_path_rate" in str(error):
            raise no_drop_path(f"timm:{name}") from error
        if image_size == own:
            raise
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--model timm:{name} cannot be built for images of {image_size} pixels ({why}); "
            f"type --image-size {own}",
            code="image-size",
        ) from error


def _create(
    name: str, num_classes: int, image_size: int, **more: bool | dict | float | None
) -> nn.Module:
    timm, cfg = imported(name), config_of(name)
    options = {"num_classes": num_classes, **more}
    with warnings.catch_warnings(action="ignore"):  # of names that timm itself renamed
        if cfg.fixed_input_size:
            try:
                return timm.create_model(name, img_size=image_size, **options)
            except TypeError as error:
                if "img_size" not in str(error) or image_size != cfg.input_size[1]:
                    raise
        return timm.create_model(name, **options)


def heads_of(name: str) -> tuple[str, ...]:
    """The layers that classify, as timm names them."""
    named = config_of(name).classifier or ()  # a tuple, where a model has two
    return (named,) if isinstance(named, str) else tuple(named)


def can_be_had(cfg: PretrainedCfg) -> bool:
    """Whether weights of it were published in a form that is tensors by name."""
    return bool(cfg.hf_hub_id or (cfg.url and not str(cfg.url).endswith(".npz")))


def _files_of(cfg: PretrainedCfg) -> tuple[str, ...]:
    return (cfg.hf_hub_filename,) if cfg.hf_hub_filename else FILES


def published(name: str) -> tuple[str, Path]:
    """Where the weights of a model are, and where a cache has or would have them."""
    cfg = config_of(name)
    if not cfg.hf_hub_id:
        import torch

        url = str(cfg.url)
        return url, Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache

    files = _files_of(cfg)
    for file in files:
        found = try_to_load_from_cache(cfg.hf_hub_id, file)
        if isinstance(found, str):
            return hf_hub_url(cfg.hf_hub_id, file), Path(found)
    folder = "models--" + cfg.hf_hub_id.replace("/", "--")
    return hf_hub_url(cfg.hf_hub_id, files[0]), Path(constants.HF_HUB_CACHE, folder, files[0])


def fetch(name: str) -> Path:
    """The file of published weights, from the hub's cache or the hub. Raises OSError."""
    cfg = config_of(name)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for file in _files_of(cfg):
        try:
            return Path(hf_hub_download(str(cfg.hf_hub_id), file))
        except EntryNotFoundError:
            continue
    raise OSError(f"{cfg.hf_hub_id} has none of {', '.join(FILES)}")


def as_this_version_has(
    state: dict[str, Tensor], own: dict[str, Tensor], name: str, image_size: int
) -> dict[str, Tensor]:
    """Weights of any format that timm reads, with the names and shapes of a model of this size.

    timm's own filters rename old tensors and resize position embeddings; a second model takes what
    they make. Raises UserError where that does not fit.
    """
    import torch

    cfg = config_of(name)
    head = f"{heads_of(name)[0]}.weight"
    count = cfg.num_classes  # of what somebody else published, under other names
    if head in state:
        count = len(state[head])
    elif state.keys() & own.keys():
        count = 0  # without a head
    first = own.get(f"{cfg.first_conv}.weight")
    channels = {} if first is None or first.ndim != 4 else {"in_chans": first.shape[1]}
    overlay = {"state_dict": state, "num_classes": count, "custom_load": False}
    try:
        with torch.random.fork_rng(devices=[]):
            donor = _create(
                name, count, image_size, pretrained=True, pretrained_cfg_overlay=overlay,
                **channels,
            )  # fmt: skip
    except Exception as error:  # a filter that expects other tensors may raise anything
        lines = [line.strip() for line in str(error).splitlines()]
        raise UserError(
            f"the weights do not fit --model timm:{name}: {some(lines[1:] or lines, 3)}; name the "
            "model that they were trained with",
            code="weights-do-not-fit",
        ) from error
    return donor.state_dict()
