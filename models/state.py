"""All that a model holds, as named tensors: also what torch's state_dict leaves out or pickles."""

import copy
import json

import torch
from torch import Tensor, nn

from common.errors import UserError

EXTRA = "_extra_state"  # torch's name for what get_extra_state returns
Plain = Tensor | dict | list | tuple | str | float | int | bool | None


def as_real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs, in the same memory; any other tensor as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """state_dict with extra state as JSON in bytes, and the buffers that are not persistent."""
    found = {}
    for name, value in model.state_dict().items():
        found[name] = _as_bytes(name, value) if is_extra(name) else value
    return found | {k: b for k, b in model.named_buffers() if k not in found}


def beside_state_dict(model: nn.Module) -> set[str]:
    """The names of buffers that are not persistent, also of those that are None for now."""
    return {
        full_name(path, name)
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }


def full_name(path: str, name: str) -> str:
    """As torch names what the submodule at `path` holds; "" is the model itself."""
    return f"{path}.{name}" if path else name


@torch.no_grad()
def load_whole_state(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Put `whole_state` back into its tensors; the names that do not fit, and then nothing is done.

    A buffer that is not persistent may be missing, as in the files of other programs.
    """
    separate_views(model)
    mine, beside = whole_state(model), beside_state_dict(model)
    empty = {
        full_name(path, name): module
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is None
    }
    wrong = [k for k in mine if k not in tensors and k not in beside]
    wrong += [
        k for k, v in tensors.items()
        if not (is_extra(k) or k in empty) and (k not in mine or v.shape != mine[k].shape)
    ]  # fmt: skip
    if wrong:
        return wrong
    for name, value in tensors.items():
        if is_extra(name):
            module = model.get_submodule(name.removesuffix(EXTRA).removesuffix("."))
            module.set_extra_state(_from_bytes(value))
        elif name in empty:  # a buffer that training made
            device = next(model.parameters()).device
            empty[name]._buffers[name.rpartition(".")[2]] = value.clone().to(device)
        else:
            mine[name].copy_(value)
    return []


def twin(model: nn.Module) -> nn.Module:
    """A second instance; UserError where Python cannot copy what a module holds.

    A weight that a hook computes from others (torch's old weight_norm) is no leaf, and copied as a
    number: the next forward computes it anew.
    """
    memo: dict[int, Tensor] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever an attribute of theirs raises
        raise UserError(
            f"the model cannot be copied ({type(error).__name__}: {str(error).splitlines()[0]}): "
            "keep what cannot be out of its attributes, or give it a __deepcopy__",
            code="no-second-instance",
        ) from error


def separate_views(model: nn.Module) -> None:
    """Give each buffer numbers of its own: an expanded view cannot be written to."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and _overlaps(buffer):
                module._buffers[name] = buffer.clone(memory_format=torch.contiguous_format)


def _overlaps(tensor: Tensor) -> bool:
    return any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def has_extra_state(module: nn.Module) -> bool:
    """Whether its class defines get_extra_state."""
    return type(module).get_extra_state is not nn.Module.get_extra_state


def is_extra(name: str) -> bool:
    """Whether a state_dict gives this name to what get_extra_state answers."""
    return name.rpartition(".")[2] == EXTRA


def _as_bytes(name: str, value: Plain) -> Tensor:
    def plain(value: Tensor) -> dict:
        if not isinstance(value, Tensor) or value.is_complex():
            raise TypeError(type(value).__name__)
        kind = str(value.dtype).removeprefix("torch.")
        return {"a tensor of": kind, "values": value.tolist(), "shape": list(value.shape)}

    try:
        text = json.dumps(value, default=plain)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{name.removesuffix(EXTRA)}get_extra_state answers what cannot be saved without "
            f"pickle ({error}): tensors, numbers, text, None, lists and dicts of them can",
            code="extra-state",
        ) from None
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _from_bytes(tensor: Tensor) -> Plain:
    def as_given(found: dict) -> Plain:
        if "a tensor of" not in found:
            return found
        kind = getattr(torch, found["a tensor of"])
        return torch.tensor(found["values"], dtype=kind).reshape(found["shape"])

    return json.loads(bytes(tensor.tolist()), object_hook=as_given)
