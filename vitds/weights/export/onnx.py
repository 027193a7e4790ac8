"""The model as an ONNX graph, for any batch size; a second file holds the arrays where one would exceed 2 GiB.

The graph is traced without weights; they are read when something asks for them, and written array by array.
Source: https://github.com/onnx/onnx, onnx/onnx.proto; https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from vitds.errors import UsageError
from vitds.run_config import DataConfig
from vitds.weights.export.program import BATCH, program_properties, traceable
from vitds.weights.export.stream import OnBytes, check_held, num_bytes
from vitds.weights.open import OpenWeights

OPSET = 20  # the first with Gelu
_PROTOBUF_LIMIT = 2**31 - 2**24  # bytes of one message, less what the graph itself may take
_ALIGNMENT = 4096  # of arrays in the second file, so that it can be mapped
_NEEDED = ("onnx", "onnx_ir", "onnxscript")


def write_onnx(
    path: Path,
    weights: OpenWeights,
    description: Mapping[str, object],
    data: DataConfig,
    on_bytes: OnBytes,
    largest: int = _PROTOBUF_LIMIT,
) -> None:
    """Write an .onnx file, and beside it an .onnx.data file when the arrays take more than `largest` bytes.

    Raises: UsageError when the packages that it needs are not installed.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise UsageError(f"ONNX needs {', '.join(missing)}", fix="pip install -e '.[onnx]'")
    import onnx
    import onnx_ir as ir
    import onnxscript.optimizer

    model, images = traceable(weights.header)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    with torch.no_grad():
        graph_program = torch.onnx.export(
            model,
            (images,),
            input_names=["images"],
            output_names=["logits" if weights.header.num_classes else "features"],
            dynamic_shapes=(BATCH,),
            opset_version=OPSET,
            dynamo=True,
            optimize=False,  # it would fold the memory that nothing has filled
            verbose=False,
        )
    assert graph_program is not None
    program = graph_program.model

    def read(name: str) -> ir.Tensor:
        return ir.Tensor(weights.arrays[name], name=name)

    for name, shape in shapes.items():
        lazy = ir.LazyTensor(partial(read, name), ir.DataType.FLOAT, ir.Shape(shape), name=name)
        program.graph.initializers[name].const_value = lazy
    onnxscript.optimizer.optimize(program)
    program.metadata_props.update(program_properties(description, data))

    names = [name for name, value in program.graph.initializers.items() if isinstance(value.const_value, ir.LazyTensor)]
    for name in names:
        del program.graph.initializers[name]
    message = ir.to_proto(program)
    tensors = [onnx.TensorProto(name=name, dims=shapes[name], data_type=onnx.TensorProto.FLOAT) for name in names]
    if sum(num_bytes(shape) for shape in shapes.values()) > largest:
        _write_beside(path, message, tensors, weights.arrays, on_bytes)
        held = _held_beside(path)
    else:
        _write_whole(path, message, tensors, weights.arrays, on_bytes)
        held = _held_whole(path)
    check_held(path, held, {name: shapes[name] for name in names})


def _write_whole(
    path: Path, message: Any, tensors: list[Any], arrays: Mapping[str, np.ndarray], on_bytes: OnBytes
) -> None:
    """One file: the message by hand, so that its arrays are never in memory together."""
    graph = message.graph.SerializeToString()
    message.ClearField("graph")
    heads = []
    for tensor in tensors:
        length = num_bytes(tensor.dims)
        head = tensor.SerializeToString() + _RAW_DATA + _varint(length)
        heads.append(_INITIALIZER + _varint(len(head) + length) + head)
    total = len(graph) + sum(len(head) + num_bytes(tensor.dims) for head, tensor in zip(heads, tensors, strict=True))
    with open(path, "wb") as stream:
        stream.write(message.SerializeToString() + _GRAPH + _varint(total) + graph)
        for head, tensor in zip(heads, tensors, strict=True):
            array = arrays[tensor.name]
            stream.write(head)
            stream.write(array.data)
            on_bytes(array.nbytes)


# Tags of length-delimited fields: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data and .name.
_GRAPH, _INITIALIZER, _RAW_DATA, _NAME = (bytes([number << 3 | 2]) for number in (7, 5, 9, 8))


def _varint(number: int) -> bytes:
    """A whole number as protobuf writes it: seven bits a byte, the lowest first."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def _held_whole(path: Path) -> dict[str, int]:
    """Bytes of every array's data, which are passed over: onnx.load would have all of them in memory."""
    held = {}
    with open(path, "rb") as stream:
        for graph_end in _fields(stream, path.stat().st_size, _GRAPH):
            for end in _fields(stream, graph_end, _INITIALIZER):
                start = stream.tell()
                name = b"".join(stream.read(name_end - stream.tell()) for name_end in _fields(stream, end, _NAME))
                stream.seek(start)
                held[name.decode()] = sum(data_end - stream.tell() for data_end in _fields(stream, end, _RAW_DATA))
    return held


def _fields(stream: BinaryIO, end: int, tag: bytes) -> Iterator[int]:
    """Stand at the content of each field with this tag in a message that ends at `end`; say where the content ends."""
    while stream.tell() < end:
        found, number = _read_varint(stream), _read_varint(stream)
        field_end = min(stream.tell() + number, end) if found & 7 == 2 else stream.tell()
        if found == tag[0]:
            yield field_end
        stream.seek(field_end)


def _read_varint(stream: BinaryIO) -> int:
    digits = [0x80]
    while digits[-1] > 0x7F:
        digits.append(int.from_bytes(stream.read(1), "big"))
    return sum((digit & 0x7F) << 7 * place for place, digit in enumerate(digits[1:]))


def _held_beside(path: Path) -> dict[str, int]:
    """Bytes of every array that lies within the second file."""
    import onnx

    held = {}
    size = path.with_name(f"{path.name}.data").stat().st_size
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place and int(place["offset"]) + int(place["length"]) <= size:
            held[tensor.name] = int(place["length"])
    return held


def _write_beside(
    path: Path, message: Any, tensors: list[Any], arrays: Mapping[str, np.ndarray], on_bytes: OnBytes
) -> None:
    """Two files: the graph, and the arrays as ONNX's external data."""
    beside = path.with_name(f"{path.name}.data")
    with open(beside, "wb") as stream:
        for tensor in tensors:
            array = arrays[tensor.name]
            stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
            tensor.data_location = 1  # EXTERNAL
            place = {"location": beside.name, "offset": stream.tell(), "length": array.nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            stream.write(array.data)
            on_bytes(array.nbytes)
    message.graph.initializer.extend(tensors)
    path.write_bytes(message.SerializeToString())
