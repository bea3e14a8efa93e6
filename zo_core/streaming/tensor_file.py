"""Safetensors files with the position of each tensor's bytes, which the safetensors library does not expose."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import StateError

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Piece:
    """Where the bytes of a tensor are.

    Attributes:
        shape: shape of the tensor.
        dtype: dtype of the tensor and of the bytes.
        path: a safetensors file; None for zeros that were never written.
        key: the tensor's name in the file.
        begin: offset of its first byte in the file.
    """

    shape: torch.Size
    dtype: torch.dtype
    path: Path | None = None
    key: str = ""
    begin: int = 0


#: The names in safetensors of the dtypes that weights and codes have.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def write_file(tensors: Tensors, path: str | os.PathLike[str]) -> None:
    """Writes a safetensors file.

    ``safetensors.torch.save_file`` copies all tensors first; here their bytes are written from their own memory.

    Raises:
        OSError: it could not be written.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {}, 0
    # Wide types first, so that the bytes of each are aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in order:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        shape, dtype = list(tensors[name].shape), names[tensors[name].dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb", buffering=0) as file:
        _write(file, memoryview(len(head).to_bytes(8, "little") + head))
        for name in order:
            _write(file, bytes_of(tensors[name].detach().to("cpu").contiguous()))


def _write(file: io.FileIO, data: memoryview) -> None:
    """Writes all of ``data``; the system accepts at most 2 GB at a time."""
    while len(data):
        data = data[file.write(data) :]


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    view: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return view


def read_header(path: str | os.PathLike[str]) -> dict[str, Piece]:
    """The tensors in a safetensors file, by name.

    Raises:
        StateError: the file is missing, damaged, or shorter than its header says.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, size)))
        header.pop("__metadata__", None)
        if max((entry["data_offsets"][1] for entry in header.values()), default=0) > size - 8 - length:
            raise ValueError("it ends too early")
        return {
            name: Piece(
                torch.Size(entry["shape"]),
                DTYPES[entry["dtype"]],
                Path(path),
                name,
                8 + length + entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"{path} is not a whole safetensors file: {error}") from error
