"""Names, shapes and types of the tensors in a PyTorch file (.pth, .pt, .bin), by its pickle alone. No torch.

A pickle is a program. It runs here with every name that it may call replaced by a stand-in that only takes notes: the
list of names is closed, and shorter than the one of `torch.load(weights_only=True)`, by which the data is read later.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import IO, Any, ClassVar, NamedTuple

from vitds.errors import WeightError

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began before 1.6, as one pickle
_NO_CHECKSUMS = "an old format without checksums: damage of its numbers is not seen"
_PICKLE_LIMIT = 100_000_000  # bytes; the pickle of a ViT has some hundred thousand
_ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "bool": 1,
}  # fmt: skip
_STORAGES = {
    f"{module}.{name}Storage": dtype
    for module in ("torch", "torch.cuda")
    for name, dtype in {
        "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
        "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
    }.items()
} | {"torch.storage.UntypedStorage": "uint8"}  # fmt: skip
_REBUILD = "torch._utils._rebuild_"
ALLOWED_GLOBALS = frozenset(
    {"collections.OrderedDict", "collections.Counter", "builtins.set", "torch.Size", "torch.device"}
    | {_REBUILD + kind for kind in ("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state")}
    | {f"torch.{dtype}" for dtype in _ITEM_BYTES}
    | _STORAGES.keys()
)
"""The names that a pickle may hold, each with an inert stand-in; `torch.load(weights_only=True)` knows all of them."""

# Where the state dict is, when a file holds more than one thing; an average of the weights comes before the weights.
_SECTIONS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "module", "teacher", "student")
_MAX_DEPTH = 4  # of sections; a pickle can make a dict that holds itself


class Tensor(NamedTuple):
    """What a pickle says of one tensor: in the file's storage of that key it has this offset and these strides.

    Units: offset and strides in values.
    """

    dtype: str
    shape: tuple[int, ...]
    storage: str
    offset: int
    strides: tuple[int, ...]


class TorchFile(NamedTuple):
    """The state dict of a file: its tensors, the keys that lead to it (`("model",)`), and what else could be meant."""

    tensors: dict[str, Tensor]
    section: tuple[str, ...]
    notes: tuple[str, ...]


def read_torch_file(path: Path) -> TorchFile:
    """What tensors a file holds that torch.save wrote.

    Raises: WeightError when it is damaged, holds no state dict, or any object that is not inert.
    """
    with _damage_named(path):
        with open(path, "rb") as stream:
            is_legacy = stream.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC
        tree = _read_legacy(path) if is_legacy else _read_zip(path, {})
    file = _state_dict(tree, path)
    return file._replace(notes=(*file.notes, _NO_CHECKSUMS)) if is_legacy else file


def read_torch_zip(path: Path, stand_ins: Mapping[str, Any]) -> Any:
    """The whole object in a file of torch.save's zip format, with a Tensor in the place of every tensor.

    `stand_ins` says what takes the place of further names, beyond ALLOWED_GLOBALS.

    Raises: WeightError when it is damaged, or holds any other object.
    """
    with _damage_named(path):
        return _read_zip(path, stand_ins)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except WeightError as error:
        raise WeightError(error.what, where=str(path), fix=error.fix) from None
    except OSError as error:
        raise WeightError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise WeightError(f"its pickle is damaged: {error or type(error).__name__}", where=str(path)) from None


def is_torch_archive(archive: zipfile.ZipFile) -> bool:
    """True for the zip format of torch.save, in which one member is the pickle."""
    return any(name.rpartition("/")[2] == "data.pkl" for name in archive.namelist())


def without_absent_checksum(member: zipfile.ZipInfo) -> zipfile.ZipInfo:
    """The member, of which no checksum is compared when torch was told to write none (they are all 0 then)."""
    if not member.CRC:
        del member.CRC
    return member


def _read_zip(path: Path, stand_ins: Mapping[str, Any]) -> Any:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
        root = pickles[0].removesuffix("data.pkl")
        if len(pickles) > 1 or root + "constants.pkl" in members:
            raise WeightError("a TorchScript archive, which holds code", fix="save the model's state_dict() instead")
        if compressed := [name for name, info in members.items() if info.compress_type != zipfile.ZIP_STORED]:
            raise WeightError(f"member {compressed[0]} is compressed: torch.save did not write this")
        if members[pickles[0]].file_size > _PICKLE_LIMIT:
            raise WeightError(f"its pickle has {members[pickles[0]].file_size} bytes, {_PICKLE_LIMIT} are read at most")
        with archive.open(without_absent_checksum(members[pickles[0]])) as stream:
            reader = _NotesOnly(stream, stand_ins)
            tree = reader.load()
    for storage in reader.storages:
        member = members.get(f"{root}data/{storage.key}")
        if member is None or member.file_size != storage.num_bytes:
            there = "is missing" if member is None else f"has {member.file_size} bytes"
            raise WeightError(f"{root}data/{storage.key} {there}, the pickle claims {storage.num_bytes} bytes")
    return tree


def _read_legacy(path: Path) -> Any:
    """Three small pickles (magic, version, platform), then the one that matters, then raw data."""
    with open(path, "rb") as stream:
        for _ in range(3):
            _NotesOnly(stream, {}).load()
        return _NotesOnly(stream, {}).load()


def _state_dict(tree: Any, path: Path) -> TorchFile:
    section: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    while isinstance(tree, dict) and len(section) < _MAX_DEPTH:
        found = [key for key in _SECTIONS if isinstance(tree.get(key), dict)]
        found.sort(key=lambda key: not _holds_tensors(tree[key]))
        tensors = {str(key): value for key, value in tree.items() if isinstance(value, Tensor)}
        averages = [str(key) for key, value in tree.items() if key not in _SECTIONS and _is_average(key, value)]
        if tensors and not (found and _holds_tensors(tree[found[0]])):  # else they are a step, a best accuracy
            plain = f"the tensors of the file itself are read; it also holds {', '.join(averages)}"
            return TorchFile(tensors, section, (*notes, plain) if averages else notes)
        if not found:
            break
        if others := found[1:] + averages:
            notes = (
                *notes,
                f'"{".".join((*section, found[0]))}" of the file is read; it also holds {", ".join(others)}',
            )
        section, tree = (*section, found[0]), tree[found[0]]
    holds = f"a dict with {', '.join(map(str, tree)) or 'nothing'}" if isinstance(tree, dict) else type(tree).__name__
    raise WeightError(
        "holds no state dict",
        where=str(path),
        fix=f"it holds {holds[:200]}\nexpected tensors by name, plain or under one of: {', '.join(_SECTIONS)}",
    )


def _is_average(key: Any, value: Any) -> bool:
    """True for what can only be an average of the weights by its name, in whatever form it is kept."""
    return isinstance(value, dict) and bool(value) and "ema" in str(key).lower().split("_")


def _holds_tensors(tree: dict[Any, Any], depth: int = _MAX_DEPTH) -> bool:
    """True when a tensor is in the dict, or below one of its sections."""
    below = (tree[key] for key in _SECTIONS if depth > 1 and isinstance(tree.get(key), dict))
    has_tensors = any(isinstance(value, Tensor) for value in tree.values())
    return has_tensors or any(_holds_tensors(section, depth - 1) for section in below)


class _Storage(NamedTuple):
    dtype: str
    key: str
    num_items: int

    @property
    def num_bytes(self) -> int:
        return self.num_items * _ITEM_BYTES[self.dtype]


class _Container(dict):
    """Stands for an OrderedDict, and for every object that is never looked at."""


class _Global:
    """Stands for a name of the closed list; a pickle can neither change nor look into it."""

    __slots__ = ("_name",)
    _name: str

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{self._name} cannot be changed")

    def __str__(self) -> str:
        return self._name

    def __call__(self, *arguments: Any) -> Any:
        match self._name.removeprefix(_REBUILD):
            case "tensor" | "tensor_v2":
                return _tensor(arguments[0].dtype, *arguments[:4])
            case "tensor_v3":  # a storage of bytes, and the type apart
                return _tensor(str(arguments[6]).removeprefix("torch."), *arguments[:4])
            case "parameter" | "parameter_with_state":
                return arguments[0]
            case "torch.Size":
                return tuple(arguments[0])
            case _:
                return _Container()


def _check_keys(keys: Iterable[Any]) -> None:
    """Raises: ValueError for what takes longer to hash than it is long, as a tuple of a tuple of a tuple twice."""
    for key in keys:
        for part in key if type(key) is tuple else (key,):
            if not isinstance(part, str | int | float | bytes | None | _Global):
                raise ValueError(f"a {type(part).__name__} is the key of something")


def _check_built(stack: list[Any]) -> None:
    """Raises: ValueError when attributes are set of a class or a function, where they would outlive the file."""
    if isinstance(stack[-2], type | FunctionType):
        raise ValueError("it changes a name of the closed list")


def _refuse(_: list[Any]) -> None:
    """Raises: ValueError."""
    raise ValueError("it holds an instruction that torch.save never writes")


# What is looked at before an instruction runs, of the stack of what was read since the last mark.
_CHECKS: dict[bytes, Callable[[list[Any]], None]] = {
    pickle.BUILD: _check_built,
    pickle.SETITEM: lambda stack: _check_keys(stack[-2:-1]),
    **dict.fromkeys([pickle.SETITEMS, pickle.DICT], lambda stack: _check_keys(stack[::2])),
    **dict.fromkeys([pickle.ADDITEMS, pickle.FROZENSET], lambda stack: _check_keys(stack)),
    **dict.fromkeys([pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID], _refuse),
    **dict.fromkeys([pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER], _refuse),
}


def _checked(instruction: int, check: Callable[[list[Any]], None]) -> Callable[[Any], None]:
    plain = pickle._Unpickler.dispatch[instruction]

    def load(reader: Any) -> None:
        check(reader.stack)
        plain(reader)

    return load


class _NotesOnly(pickle._Unpickler):
    """Reads a pickle without importing or running anything.

    It is the unpickler written in Python: the one in C makes its memo as large as any index that a file names.
    Instructions that torch.save does not write, and by which a pickle reaches further or grows without end, are errors.
    """

    dispatch: ClassVar[dict[int, Any]] = pickle._Unpickler.dispatch | {
        instruction[0]: _checked(instruction[0], check) for instruction, check in _CHECKS.items()
    }

    def __init__(self, stream: IO[bytes], stand_ins: Mapping[str, Any]) -> None:
        super().__init__(stream, encoding="utf-8")
        self._stand_ins = stand_ins
        self.storages: list[_Storage] = []

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in; raises: WeightError for a name that is not on the closed list."""
        full_name = f"{module.replace('__builtin__', 'builtins')}.{name}"  # protocol 2 names it as Python 2 did
        if full_name in self._stand_ins:
            return self._stand_ins[full_name]
        if full_name not in ALLOWED_GLOBALS:
            raise WeightError(
                f"holds {full_name:.200}, an object that only code can restore: nothing was run, nothing was loaded",
                fix="if you trust the file, save its state dict alone, in an environment of its own: "
                'torch.save(torch.load(FILE, weights_only=False)["model"], NEW_FILE)\n'
                'where "model" is the key of its state dict: "model", "state_dict", ...',
            )
        return _Global(full_name)

    def persistent_load(self, pid: Any) -> _Storage:
        """Note a storage: its type, key and size."""
        kind, storage_type, key, _, num_items = pid[:5]
        kinds = (type(kind), type(storage_type), type(key), type(num_items))
        if kinds != (str, _Global, str, int) or kind != "storage" or num_items < 0:
            raise ValueError("a storage without a type, a name or a size")  # unfolding it in words may have no end
        self.storages.append(_Storage(_STORAGES[str(storage_type)], key, num_items))
        return self.storages[-1]


def _tensor(dtype: str, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Raises: ValueError when the tensor would reach beyond its storage."""
    if not all(isinstance(number, int) and number >= 0 for number in (offset, *shape, *strides)):
        raise ValueError("a tensor whose shape or strides are no sizes")
    if len(shape) != len(strides):
        raise ValueError(f"a tensor with {len(shape)} axes and {len(strides)} strides")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 not in shape and (last + 1) * _ITEM_BYTES[dtype] > storage.num_bytes:
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage of {storage.num_bytes} bytes")
    return Tensor(dtype, tuple(shape), storage.key, offset, tuple(strides))
