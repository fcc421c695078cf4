"""The forms a model leaves in, a function each: writes a file and returns how to ask it again."""

import contextlib
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from common.errors import UserError
from distributed.checkpoint import save_tensors
from export.service import INPUT, OUTPUT, Service, side_of
from models import build_from
from models.state import is_extra
from tasks import split_outputs

if TYPE_CHECKING:
    from onnx import GraphProto
    from torch.export import ExportedProgram

Ask = Callable[[Tensor], Tensor]  # images in 0..1 -> logits
MOST_ONNX = 1_900_000_000  # bytes of weights: protobuf ends at two gigabytes
OPSET = 20
NAMES = {
    "onnx": "model.onnx", "torch.export": "model.pt2", "safetensors": "model.safetensors",
    "hub": "hub",
}  # fmt: skip


def need(*packages: str) -> None:
    """UserError where packages of the extra `export` are missing."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise UserError(
            f"--to onnx needs {', '.join(missing)}: type pip install onnx onnxruntime onnxscript "
            "(or pip install -e '.[export]')",
            code="not-installed",
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within, what torch's exporters say of themselves is not heard."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch._export")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings(action="ignore"):
        for name in names:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A path of the same name to write to, which takes its place when the block ends well."""
    folder = path.with_name(f".{path.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder / path.name
        (folder / path.name).replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def program_of(model: nn.Module, card: dict) -> "ExportedProgram":
    """The model with its normalisation as torch's graph, for any number of pictures.

    Raises UserError where torch cannot follow its forward.
    """
    side = side_of(card)
    shape = (2, len(card["mean"]), side, side)
    example = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch", min=1)
    service = Service(model, card["mean"], card["std"]).eval()
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(service, (example,), dynamic_shapes={INPUT: {0: batch}})
    except Exception as error:  # whatever a forward does that no graph can
        raise cannot(card["model"], error) from error


def cannot(name: str, error: Exception) -> UserError:
    """The sentence for a model that an exporter refuses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = f"{type(error).__name__}: {lines[0][:200] if lines else 'no reason is given'}"
    return UserError(
        f"{name} cannot be exported as a graph ({why}): its forward does what depends on the "
        "numbers or the count of pictures it is given; --to safetensors keeps its weights alone",
        code="cannot-export",
    )


def write_program(model: nn.Module, card: dict, text: str, path: Path) -> Ask:
    """torch.export's file, which torch alone runs; the description is `lockstep.json` in it."""
    program = program_of(model, card)
    with quiet():
        torch.export.save(program, path, extra_files={"lockstep.json": text})
        return torch.export.load(path).module()


def write_onnx(model: nn.Module, card: dict, text: str, path: Path) -> Ask | None:
    """An ONNX file with the description in its metadata; None where nothing here can run it."""
    need("onnx", "onnxscript")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size > MOST_ONNX:
        raise UserError(
            f"{card['model']} has {size / 1e9:.1f} GB of weights, and an ONNX file holds 2: "
            "--to torch.export has no such limit",
            code="too-large",
        )
    import onnx

    program = program_of(model, card)
    try:
        with quiet():
            made = torch.onnx.export(
                program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT],
                opset_version=OPSET, verbose=False,
            )  # fmt: skip
            assert made is not None
            graph = made.model_proto
    except Exception as error:  # an operator that ONNX has not
        raise cannot(card["model"], error) from error
    name_batch(graph.graph)
    onnx.helper.set_model_props(graph, {"lockstep": text})
    onnx.checker.check_model(graph)
    onnx.save(graph, path)
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def ask(images: Tensor) -> Tensor:
        (logits,) = session.run([OUTPUT], {INPUT: images.numpy()})
        return torch.from_numpy(logits)

    return ask


def name_batch(graph: "GraphProto") -> None:
    """Call the first axis `batch`, for which torch invents a symbol."""
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in [*graph.input, *graph.output, *graph.value_info]:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param == symbol:
                axis.dim_param = "batch"


def plain_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What load_state_dict of the plain architecture takes, each tensor in memory of its own."""
    state = model.state_dict()
    if extra := [key for key in state if is_extra(key)]:
        raise UserError(
            f"{name} keeps more than tensors in its state ({extra[0]}), which safetensors cannot "
            "hold for load_state_dict: --to torch.export",
            code="extra-state",
        )
    return {key: value.detach().clone().contiguous() for key, value in state.items()}


def write_safetensors(model: nn.Module, card: dict, text: str, path: Path, built: str) -> Ask:
    """The weights under the architecture's own names; `built` is what build_from knows it by."""
    tensors = plain_state(model, card["model"])
    save_tensors(path, tensors, {"format": "pt", "lockstep": text})
    fresh = build_from(card, len(card["classes"]), built)
    fresh.load_state_dict(load_file(path), strict=True)
    return Service(fresh, card["mean"], card["std"]).eval()


def answer(model: nn.Module, images: Tensor) -> Tensor:
    """The logits of a model for normalised images."""
    return split_outputs(model(images))[0].float()
