"""The formats: the name of each one's file, the library that reads it, and its bytes."""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor, nn

from fastbyol.errors import UsageError
from fastbyol.model.ordinary import Encoder

# Traced at one size, an ONNX file would be of maps that have one pixel in the last stage, whose
# size then is a constant.
ONNX_SIZE = 64
# The least number that protobuf cannot have as the size of a message.
PROTOBUF_BYTES = 1 << 31


@dataclass(frozen=True)
class Format:
    """A format: what ``--out`` is by default, and what makes the content from encoder and size.

    ``suffix`` is one that the library insists on. ``library`` is the name for Hugging Face.
    ``modules`` are imported first, of the extra ``extra``. Only a state dict ``is_state``, and only
    there a classifier can be added.
    """

    file: str
    library: str
    content: Callable[[nn.Module, int], bytes]
    modules: tuple[str, ...] = ()
    extra: str = ""
    is_state: bool = True
    is_folder: bool = False
    suffix: str = ""


def _state_dict(encoder: nn.Module, _: int) -> bytes:
    file = io.BytesIO()
    torch.save(encoder.state_dict(), file)
    return file.getvalue()


def _safetensors(encoder: nn.Module, _: int) -> bytes:
    tensors: dict[str, Tensor] = encoder.state_dict()
    # Readers of the hub look for the word.
    content: bytes = safetensors.torch.save(tensors, {"format": "pt"})
    return content


def _torch_export(encoder: nn.Module, size: int) -> bytes:
    file = io.BytesIO()
    batch = torch.export.Dim("batch", min=1)
    images = torch.zeros(2, 3, size, size)
    program = torch.export.export(encoder, (images,), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # which names folders of this machine
    torch.export.save(program, file)
    return file.getvalue()


def _onnx(encoder: nn.Module, size: int) -> bytes:
    """Trace with batch, height and width free; other libraries' networks may have one size."""
    import onnx

    num_bytes = sum(t.nbytes for t in encoder.state_dict().values())
    if num_bytes >= PROTOBUF_BYTES:
        raise UsageError(
            "--format onnx: the weights take 2 GB or more, which one ONNX file cannot hold: take "
            "--format torch-export, safetensors or torchvision"
        )
    is_own = isinstance(encoder, Encoder)
    side = max(size, ONNX_SIZE) if is_own else size
    free = {0: "batch", 2: "height", 3: "width"} if is_own else {0: "batch"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of how it exports
        program = torch.onnx.export(
            encoder,
            (torch.zeros(2, 3, side, side),),
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["images"],
            output_names=["embeddings"],
            dynamic_shapes=(free,),
        )
    assert program is not None  # as with dynamo=True
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # how it was traced, with folders of this machine
    content: bytes = model.SerializeToString()
    onnx.checker.check_model(content, full_check=True)
    return content


FORMATS = {
    "torchvision": Format("torchvision.pth", "torchvision", _state_dict),
    "timm": Format("timm.pth", "timm", _state_dict, ("timm",), "timm"),
    "safetensors": Format("safetensors", "torchvision", _safetensors, is_folder=True),
    "onnx": Format(
        "encoder.onnx", "onnx", _onnx, ("onnx", "onnxscript", "onnxruntime"), "onnx", is_state=False
    ),
    "torch-export": Format("encoder.pt2", "pytorch", _torch_export, is_state=False, suffix=".pt2"),
}


def demand_libraries(name: str) -> None:
    """Raise UsageError if a library is missing by which ``name`` is made or checked."""
    for module in FORMATS[name].modules:
        try:
            importlib.import_module(module)
        except ImportError:
            raise UsageError(
                f"--format {name}: {module} is not installed: pip install "
                f"'fastbyol[{FORMATS[name].extra}]'"
            ) from None
