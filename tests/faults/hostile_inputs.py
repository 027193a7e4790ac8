"""Hostile inputs, each given to what reads its kind:  python tests/faults/hostile_inputs.py PLACE

Runs with bounded memory under an audit hook, which notes every program started, every connection, and every file opened
for writing outside of PLACE. Prints a JSON line an input: its name, and "refused" or what happened instead.
"""

import io
import json
import os
import pickle
import resource
import signal
import struct
import sys
import tarfile
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from vitds import engine
from vitds.checkpoint import CheckpointStore
from vitds.class_weights import class_weights
from vitds.data.decode import BadImage, decode
from vitds.data.index import read_index
from vitds.data.reader import read_classes
from vitds.data.scan import scan_shard
from vitds.dataset_facts import read_dataset_facts
from vitds.document import read_document
from vitds.errors import VitdsError
from vitds.manifest import FileEntry, Manifest, hash_file, write_manifest
from vitds.preflight import plan_run
from vitds.report import read_metrics
from vitds.weights.load import load_weights
from vitds.weights.zero import open_checkpoint
from vitds.world import World

PLACE = Path(sys.argv[1]).absolute()
MARKER = PLACE / "it-ran"
TOUCH = f"touch {MARKER}"
ROOM = 3 * 2**30  # bytes beyond what the imports take
HANG_S = 240  # by the clock, of which a busy machine takes many times what an input needs
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pty.spawn", "subprocess.Popen")
REACHES = ("socket.connect", "webbrowser.open", "shutil.rmtree", "ctypes.dlopen")
CASES = {}


def case(name, kind):
    """Register an input: a function that writes it, or its bytes; `kind` is a reader of the table below."""

    def add(make):
        assert name not in CASES, name
        CASES[name] = (kind, make)
        return make

    return add


# --- pickles, assembled by hand -----------------------------------------------------------------------------------
def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def arguments(*parts):
    return b"(" + b"".join(part if isinstance(part, bytes) else text(part) for part in parts) + b"t"


def call(module, attribute, *parts):
    return name(module, attribute) + arguments(*parts) + b"R"


def holding(payload, protocol=2):
    """A dict with the payload where the state dict would be."""
    return b"\x80" + bytes([protocol]) + b"}" + text("module") + payload + b"s."


STAGE = name("deepspeed.runtime.zero.config", "ZeroStageEnum")
SCALER = name("deepspeed.runtime.fp16.loss_scaler", "LossScaler")
SYSTEM = name("posix", "system")
CODE = f"__import__('os').system('{TOUCH}')"
TENSOR_TYPE = name("torch", "Tensor")
DAG = b"]" + b"q\0" + b"".join(b"(h" + bytes([n]) + b"h" + bytes([n]) + b"tq" + bytes([n + 1]) for n in range(60))
LISTS = b"]q\0" + b"".join(b"]q" + bytes([n + 1]) + b"(h" + bytes([n]) + b"h" + bytes([n]) + b"e" for n in range(60))

PICKLES = {
    "posix.system": call("posix", "system", TOUCH),
    "os.system": call("os", "system", TOUCH),
    "nt.system": call("nt", "system", TOUCH),
    "builtins.eval": call("builtins", "eval", CODE),
    "builtins.exec": call("builtins", "exec", CODE),
    "__builtin__.eval, as of Python 2": call("__builtin__", "eval", CODE),
    "builtins.__import__": call("builtins", "__import__", "antigravity"),
    "builtins.open for writing": call("builtins", "open", str(MARKER), "w"),
    "subprocess.Popen": call("subprocess", "Popen", TOUCH),
    "subprocess.check_output": call("subprocess", "check_output", TOUCH),
    "os.popen": call("os", "popen", TOUCH),
    "pty.spawn": call("pty", "spawn", TOUCH),
    "runpy.run_path": call("runpy", "run_path", str(MARKER)),
    "timeit.timeit": call("timeit", "timeit", CODE),
    "webbrowser.open": call("webbrowser", "open", "http://127.0.0.1:9"),
    "shutil.rmtree": call("shutil", "rmtree", str(PLACE)),
    "ctypes.CDLL": call("ctypes", "CDLL", "libc.so.6"),
    "socket.create_connection": call("socket", "create_connection", arguments("127.0.0.1", b"K\x09")),
    "pickle.loads": call("pickle", "loads", CODE),
    "numpy.load": call("numpy", "load", str(MARKER)),
    "torch.load": call("torch", "load", str(MARKER)),
    "torch.hub.load": call("torch.hub", "load", "someone/something", "model"),
    "torch.jit.load": call("torch.jit", "load", str(MARKER)),
    "torch.ops.load_library": call("torch.ops", "load_library", str(MARKER)),
    "torch.utils.cpp_extension.load": call("torch.utils.cpp_extension", "load", "x", str(MARKER)),
    "functools.partial": call("functools", "partial", SYSTEM, TOUCH) + b")R",
    "functools.partial by __setstate__": name("functools", "partial")
    + b"("
    + SYSTEM
    + b"t\x81"
    + arguments(SYSTEM, arguments(TOUCH), b"}", b"N")
    + b"b",
    "operator.attrgetter": call("operator", "attrgetter", "system") + arguments(name("builtins", "str")) + b"R",
    "operator.methodcaller": call("operator", "methodcaller", "system", TOUCH),
    "types.FunctionType": call("types", "FunctionType", "x"),
    "types.CodeType": call("types", "CodeType", "x"),
    "getattr of a module": call("builtins", "getattr", call("importlib", "import_module", "os"), "system"),
    "getattr of a name": call("builtins", "getattr", SYSTEM, "__call__"),
    "getattr of a string": call("builtins", "getattr", "text", "format"),
    "getattr of the loss scaler": call("builtins", "getattr", SCALER, "__init__"),
    "getattr of the stages' class": call("builtins", "getattr", STAGE, "__class__"),
    "getattr of the stages' modules": call("builtins", "getattr", call("builtins", "getattr", STAGE, "mro"), "x"),
    "getattr of itself": call("builtins", "getattr", name("builtins", "getattr"), "__globals__"),
    "getattr with a name that is none": call("builtins", "getattr", STAGE, b"K\x01"),
    "a class is changed": SCALER + arguments(b"N", b"}" + text("backward") + SCALER + b"s") + b"b",
    "a class gets a __setstate__": SCALER + b"}" + text("__setstate__") + name("builtins", "getattr") + b"sb",
    "a function is changed": name("builtins", "getattr")
    + arguments(b"N", b"}" + text("__defaults__") + arguments("x") + b"s")
    + b"b",
    "INST": b"(" + text(TOUCH) + b"iposix\nsystem\n",
    "OBJ": b"(" + SYSTEM + text(TOUCH) + b"o",
    "EXT1": b"\x82\x01",
    "EXT4": b"\x84\x01\0\0\0",
    "NEWOBJ": SYSTEM + arguments(TOUCH) + b"\x81",
    "NEWOBJ_EX": SYSTEM + arguments(TOUCH) + b"}\x92",
    "STACK_GLOBAL": text("posix") + text("system") + b"\x93" + arguments(TOUCH) + b"R",
    "STACK_GLOBAL with dots": text("torch") + text("serialization.os.system") + b"\x93" + arguments(TOUCH) + b"R",
    "a name with dots": call("torch.serialization", "os.system", TOUCH),
    "PERSID": b"Pstorage\n",
    "a storage whose type is a call": arguments("storage", call("posix", "system", TOUCH), "0", "cpu", b"K\x01") + b"Q",
    "a storage without a type": arguments("storage", DAG, "0", "cpu", b"K\x01") + b"Q",
    "a storage that is not there": call(
        "torch._utils",
        "_rebuild_tensor_v2",
        arguments("storage", name("torch", "FloatStorage"), "7", "cpu", b"K\x04") + b"Q",
        b"K\0",
        arguments(b"K\x04"),
        arguments(b"K\x01"),
        b"\x89",
        b"}",
    ),
    "rebuild_from_type_v2 of a call": call(
        "torch._tensor", "_rebuild_from_type_v2", SYSTEM, TENSOR_TYPE, arguments(TOUCH), b"}"
    ),
    "rebuild_wrapper_subclass": call("torch._utils", "_rebuild_wrapper_subclass", SYSTEM, b"N", b"N"),
    "rebuild_device_tensor_from_numpy": call(
        "torch._utils", "_rebuild_device_tensor_from_numpy", call("numpy", "load", str(MARKER)), b"N", "cpu", b"\x89"
    ),
    "rebuild_qtensor": call("torch._utils", "_rebuild_qtensor", b"N"),
    "torch.serialization._get_layout": call("torch.serialization", "_get_layout", "torch.sparse_coo"),
    "_codecs.encode": call("_codecs", "encode", "x", "rot13"),
    "a bytearray of a terabyte": call("builtins", "bytearray", b"\x8a\x06\0\0\0\0\0\x01"),
    "BYTEARRAY8 of a terabyte": b"\x96" + struct.pack("<Q", 2**40),
    "a string of a terabyte": b"\x8d" + struct.pack("<Q", 2**40),
    "a memo of four billion": b"]r\xff\xff\xff\xff" + call("posix", "system", TOUCH),
    "a key that takes for ever to hash": b"}" + DAG + b"Ns",
    "a set that takes for ever to hash": b"\x8f(" + DAG + b"\x90",
    "lists that unfold without end": LISTS,
    "a hundred thousand tuples in each other": b")" + b"\x85" * 100_000,
    "a list that is its own item": b"]q\0h\0a",
    "a name of a megabyte": call("x" * 2**20, "y"),
    "numpy's arrays": call("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), arguments(b"K\0"), "b"),
    "a ModuleList": call("torch.nn.modules.container", "ModuleList"),
    "argparse.Namespace": call("argparse", "Namespace"),
    "pathlib.PosixPath": call("pathlib", "PosixPath", "/etc/passwd"),
    "DeepSpeed's own config class": call("deepspeed.runtime.config", "DeepSpeedConfig", str(MARKER)),
}


def torch_zip(path, content, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for member, data in {"data.pkl": content, "byteorder": b"little", "version": b"3\n", **members}.items():
            archive.writestr(f"archive/{member}", data)


MODEL_FILE = "mp_rank_00_model_states.pt"


def checkpoint(place, write):
    """A checkpoint of one such file, under a manifest that fits."""
    directory = place / "global_step5"
    directory.mkdir()
    write(directory / MODEL_FILE)
    write_manifest(directory, Manifest({MODEL_FILE: hash_file(directory / MODEL_FILE)}, {"step": 5}))
    return directory


def refused_checkpoint(place, write):
    """Choosing, resuming through the checkpoint engine, and exporting: all refuse."""
    directory = checkpoint(place, write)
    refuses(lambda: CheckpointStore(place, World()).newest_whole())
    refuses(lambda: engine._SafeCheckpointEngine().load(str(directory / MODEL_FILE)))
    refuses(lambda: open_checkpoint(directory))


def refused_weights(place, write, file="w.pth"):
    write(place / file)
    refuses(lambda: load_weights(place / file))


def refuses(read):
    """Raises: AssertionError when it reads."""
    try:
        read()
    except (VitdsError, BadImage) as error:
        assert len(str(error)) < 5_000, "an endless message"
        return
    raise AssertionError("was read")


def pickles():
    for what, payload in PICKLES.items():
        protocol = 4 if payload[:1] in b"\x93\x96\x8d\x8f" or "STACK" in what or "NEWOBJ_EX" in what else 2
        write = partial(torch_zip, content=holding(payload, protocol))
        CASES[f"checkpoint: {what}"] = (refused_checkpoint, write)
        CASES[f"weights: {what}"] = (refused_weights, write)


class Bomb:
    """Unpickling it would make a file."""

    def __reduce__(self):
        return os.system, (TOUCH,)


@case("checkpoint: before torch 1.6", refused_checkpoint)
def _(path):
    torch.save({"module": Bomb()}, path, _use_new_zipfile_serialization=False)


@case("checkpoint: a bare pickle", refused_checkpoint)
def _(path):
    path.write_bytes(pickle.dumps({"module": Bomb()}))


@case("checkpoint: TorchScript", refused_checkpoint)
def _(path):
    torch_zip(path, holding(b"N"), **{"constants.pkl": b"\x80\x02).", "code/__torch__.py": b"import os"})


@case("checkpoint: two pickles", refused_checkpoint)
def _(path):
    torch_zip(path, holding(b"N"), **{"sub/data.pkl": holding(PICKLES["posix.system"])})


@case("checkpoint: a gigabyte of zeros, compressed", refused_checkpoint)
def _(path):
    torch_zip(path, holding(b"N"), zipfile.ZIP_DEFLATED, **{"data/0": bytes(2**28)})


@case("checkpoint: members elsewhere", refused_checkpoint)
def _(path):
    torch_zip(path, holding(PICKLES["a storage that is not there"]), **{"../../../data/7": bytes(16)})


def refused_manifest(place, write):
    directory = checkpoint(place, lambda path: torch.save({"module": {}}, path))
    write(directory)
    refuses(lambda: CheckpointStore(place, World()).newest_whole())
    refuses(lambda: open_checkpoint(directory))


def names_file(path):
    return lambda directory: write_manifest(directory, Manifest({path: FileEntry(5, "0" * 64)}, {"step": 5}))


for _path in ("../../x_states.pt", "/etc/passwd", "sub/../../x.pt", "a\0b.pt", "\ud800.pt", "..", "x" * 1000 + "/"):
    CASES[f"manifest: names {_path[:40]!r}"] = (refused_manifest, names_file(_path))


@case("manifest: a file that is a device", refused_manifest)
def _(directory):
    (directory / MODEL_FILE).unlink()
    (directory / MODEL_FILE).symlink_to("/dev/zero")
    write_manifest(directory, Manifest({MODEL_FILE: FileEntry(0, "0" * 64)}, {"step": 5}))


@case("manifest: a file that is a pipe", refused_manifest)
def _(directory):
    (directory / MODEL_FILE).unlink()
    os.mkfifo(directory / MODEL_FILE)


@case("manifest: a file that is a link to another", refused_manifest)
def _(directory):
    (directory / MODEL_FILE).unlink()
    (directory / MODEL_FILE).symlink_to("/etc/passwd")


@case("manifest: nested without end", refused_manifest)
def _(directory):
    (directory / "MANIFEST.json").write_text('{"format": 1, "files": ' + "[" * 10**6)


@case("manifest: a gigabyte", refused_manifest)
def _(directory):
    with open(directory / "MANIFEST.json", "wb") as stream:
        stream.truncate(2**30)


# --- npz and safetensors -----------------------------------------------------------------------------------------
def refused_npz(place, write):
    refused_weights(place, write, "w.npz")


def npz(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for member, content in members.items():
            archive.writestr(member, content)


def npy(header, data=b"", length=None):
    text = header.encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text) if length is None else length) + text + data


def saved(array):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


NPZ = {
    "objects": {"cls.npy": saved(np.array([Bomb()], dtype=object))},
    "a record with objects": {"cls.npy": saved(np.array([(1, Bomb())], dtype=[("a", int), ("b", object)]))},
    "a header that is code": {"cls.npy": npy(CODE)},
    "a type that is code": {"cls.npy": npy(f"{{'descr': {CODE!r}, 'fortran_order': False, 'shape': (1,), }}")},
    "a pickle for a member": {"cls.npy": pickle.dumps(Bomb())},
    "a member named .pkl": {"cls.pkl": pickle.dumps(Bomb())},
    "a member elsewhere": {"../../../cls.npy": saved(np.zeros(3, np.float32))},
    "a member at the root": {"/etc/cls.npy": saved(np.zeros(3, np.float32))},
    "a shape of a terabyte": {"cls.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }")},
    "a shape below zero": {"cls.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }")},
    "a shape without end": {"cls.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': " + "(" * 5000)},
    "shell text for a name": {f"$({TOUCH}).npy": saved(np.zeros(3, np.float32))},
}
for _what, _members in NPZ.items():
    CASES[f"npz: {_what}"] = (refused_npz, lambda path, members=_members: npz(path, members))


@case("npz: a zip bomb", refused_npz)
def _(path):
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (67108864,), }"
    npz(path, {"cls.npy": npy(header, bytes(2**28))}, zipfile.ZIP_DEFLATED)


@case("npz: a hundred thousand members", refused_npz)
def _(path):
    npz(path, dict.fromkeys(map("a{}.npy".format, range(100_000)), b""))


def refused_safetensors(place, write):
    refused_weights(place, write, "model.safetensors")


def header_of(content, length=None):
    def write(path):
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text)

    return write


TENSOR = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
SAFETENSORS = {
    "a header of 2^62 bytes": header_of({}, 2**62),
    "a tensor of four terabytes": header_of({"cls_token": TENSOR}),
    "nested without end": header_of(b'{"a":' * 200_000),
    "offsets that overlap": header_of({name: TENSOR | {"shape": [0], "data_offsets": [0, 0]} for name in "ab"}),
    "numbers of 5,000 digits": header_of(b'{"a": ' + b"9" * 5000 + b"}"),
}
for _what, _write in SAFETENSORS.items():
    CASES[f"safetensors: {_what}"] = (refused_safetensors, _write)


@case("safetensors: a pipe", refused_safetensors)
def _(path):
    os.mkfifo(path)


@case("safetensors: a device", refused_safetensors)
def _(path):
    path.symlink_to("/dev/zero")


def refused_weight_map(place, file):
    body = {"weight_map": {"cls_token": file}}
    (place / "model.safetensors.index.json").write_text(json.dumps(body))
    refuses(lambda: load_weights(place / "model.safetensors.index.json"))


for _path in ("../../x.safetensors", "/etc/passwd", "..", "sub/x", f"$({TOUCH})", "", "a\0b", ["x"]):
    CASES[f"weight_map: {_path!r}"] = (refused_weight_map, _path)


# --- tar, index, images ------------------------------------------------------------------------------------------
def inert_tar(place, members):
    """Its names are names: nothing is written by them, and nothing is run."""
    written(place, members)


def harmless_tar(place, members):
    """No member is a sample, or the shard is said to be damaged."""
    found = written(place, members)
    assert found.bad or not found.samples


def written(place, members):
    path = place / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for info, content in members():
            archive.addfile(info, io.BytesIO(content))
    return scan_shard(path)


def member(name, content=b"", kind=tarfile.REGTYPE, **more):
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    for key, value in more.items():
        setattr(info, key, value)
    return info, content


for _extension in ("pyd", "pkl", "pickle", "pth", "pt"):
    CASES[f"tar: a member .{_extension}"] = (
        harmless_tar,
        lambda extension=_extension: [member(f"a.{extension}", pickle.dumps(Bomb())), member("a.cls", b"0")],
    )
TARS = {
    "a symbolic link": lambda: [member("a.jpg", kind=tarfile.SYMTYPE, linkname="/etc/passwd"), member("a.cls", b"0")],
    "a hard link": lambda: [member("a.jpg", kind=tarfile.LNKTYPE, linkname="../../x"), member("a.cls", b"0")],
    "a device": lambda: [member("a.jpg", kind=tarfile.CHRTYPE, devmajor=1, devminor=5), member("a.cls", b"0")],
    "a pipe": lambda: [member("a.jpg", kind=tarfile.FIFOTYPE), member("a.cls", b"0")],
    "members elsewhere": lambda: [member("../../../a.jpg", b"x"), member("../../../a.cls", b"0")],
    "a member at the root": lambda: [member("/etc/a.jpg", b"x"), member("/etc/a.cls", b"0")],
    "shell text for a name": lambda: [member(f"$({TOUCH}).jpg", b"x"), member(f"$({TOUCH}).cls", b"0")],
    "a label of a megabyte": lambda: [member("a.jpg", b"x"), member("a.cls", b"9" * 2**20)],
    "a label that is code": lambda: [member("a.jpg", b"x"), member("a.cls", CODE.encode())],
    "a pax header of ten megabytes": lambda: [member("a.jpg", b"x", pax_headers={"path": "x" * 10**7})],
    "a pax size of a hundred digits": lambda: [member("a.jpg", b"x", pax_headers={"size": "9" * 100})],
    "labels nested without end": lambda: [member("a.jpg", b"x"), member("a.json", b"[" * 10**6)],
}
for _what, _members in TARS.items():
    are_names = any(word in _what for word in ("name", "root", "elsewhere"))
    CASES[f"tar: {_what}"] = (inert_tar if are_names else harmless_tar, _members)


def refused_index(place, change):
    columns = {"sample_id": [0], "shard": ["s.tar"], "key": ["a"], "offset": [0], "size": [1024], "label": [0]}
    columns |= {"width": [1], "height": [1], "crc32": [0]}
    pq.write_table(pa.table(columns | change), place / "index.parquet")
    refuses(lambda: read_index(place / "index.parquet"))


for _shard in ("../../x.tar", "/etc/passwd", "..", "a\0b", ""):
    CASES[f"index: the shard {_shard!r}"] = (refused_index, {"shard": [_shard]})
CASES["index: text for an offset"] = (refused_index, {"offset": [f"$({TOUCH})"]})
CASES["index: no size"] = (refused_index, {"size": [None]})
CASES["index: a label that is a record"] = (refused_index, {"label": [{"a": 1}]})


def refused_image(place, content):
    refuses(lambda: decode(content))


def png(width, height, chunks=b""):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunks + chunk(b"IDAT", zlib.compress(bytes(2**20))) + chunk(b"IEND", b"")


IMAGES = {
    "a png of 2^62 pixels": png(2**31 - 1, 2**31 - 1),
    "a png of 400 million pixels": png(20_000, 20_000),
    "a jpeg of 4 billion pixels": bytes.fromhex("ffd8ffc00011 08 fff0 fff0 03 011100021100031100".replace(" ", ""))
    + b"\xff\xd9",
    "a webp of 268 million pixels": b"RIFF\x1e\0\0\0WEBPVP8L\x12\0\0\0\x2f\xff\xff\xff\x0f" + bytes(13),
    "a gif of 4 billion pixels": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;",
    "an svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>',
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch it-ran) (w) file\n%%EOF\n",
}
for _what, _content in IMAGES.items():
    CASES[f"image: {_what}"] = (refused_image, _content)


# --- JSON, flags, addresses --------------------------------------------------------------------------------------
def refused_config(place, content):
    (place / "config.json").write_text(content)
    refuses(lambda: plan_run(["--deepspeed_config", str(place / "config.json"), "--data", str(place)], {}))


CONFIGS = {
    "nested without end": "[" * 100_000,
    "objects without end": '{"a":' * 100_000,
    "a number of 5,000 digits": '{"train_batch_size": ' + "9" * 5000 + "}",
    "a name that is a way out": '{"train_batch_size": 8, "vitds": {"name": "../../x", "num_steps": 3}}',
    "a name of shell text": json.dumps({"train_batch_size": 8, "vitds": {"name": f"$({TOUCH})/x", "num_steps": 3}}),
    "a model of shell text": json.dumps({"train_batch_size": 8, "vitds": {"model": f"$({TOUCH})", "num_steps": 3}}),
    "a model that is code": json.dumps({"train_batch_size": 8, "vitds": {"model": f"custom:width={CODE}"}}),
}
for _what, _content in CONFIGS.items():
    CASES[f"config: {_what}"] = (refused_config, _content)


def refused_data(place, address):
    config = {"train_batch_size": 8, "vitds": {"model": "ViT-Ti_16", "num_steps": 3}}
    (place / "config.json").write_text(json.dumps(config))
    refuses(lambda: plan_run(["--deepspeed_config", str(place / "config.json"), "--data", address], {}))


for _address in (f"pipe:{TOUCH}", f"x.tar::pipe:{TOUCH}", "file:///etc/passwd", "ssh://a/b.tar", "hdfs://a/b.tar"):
    CASES[f"data: {_address[:30]}"] = (refused_data, _address)
CASES["data: shell text"] = (refused_data, f"$({TOUCH}); {TOUCH}")
CASES["data: braces without end"] = (refused_data, "{" * 100_000 + ".tar")
CASES["data: braces of 10^18 shards"] = (refused_data, "x{000000000000000000..999999999999999999}.tar")


def refused_json(place, files):
    for file, content in files.items():
        (place / file).write_text(content)
    refuses(lambda: read_dataset_facts(str(place)))
    if "classes.json" in files:
        refuses(lambda: read_classes(place))


INFO = json.dumps({"splits": {"train": {"class_counts": [1], "num_samples": 1}}})
CASES["classes.json: nested without end"] = (refused_json, {"classes.json": "[" * 10**6, "_info.json": INFO})
CASES["classes.json: a number"] = (refused_json, {"classes.json": "5", "_info.json": INFO})
CASES["classes.json: names that are none"] = (refused_json, {"classes.json": '[{"a": 1}]', "_info.json": INFO})
for _what, _content in {
    "counts without end": '{"splits": {"train": {"class_counts": [1e999], "num_samples": 1}}}',
    "nested without end": '{"splits":' * 10**5,
    "splits that are a list": '{"splits": [1]}',
}.items():
    CASES[f"_info.json: {_what}"] = (
        lambda place, content: (
            (place / "classes.json").write_text('["a"]'),
            refused_json(place, {"_info.json": content}),
        ),
        _content,
    )


def refused_lines(place, content):
    (place / "metrics.jsonl").write_text(content)
    refuses(lambda: read_metrics(place))


CASES["metrics.jsonl: nested without end"] = (refused_lines, "[" * 10**6)


def refused_class_weights(place, content):
    (place / "weights.json").write_text(content)
    facts = type("Facts", (), {"classes": ["a"], "train_counts": [1], "multi_label": False})()
    refuses(lambda: class_weights(str(place / "weights.json"), facts, 1, "here"))


CASES["class weights: nested without end"] = (refused_class_weights, "[" * 10**6)
CASES["class weights: code"] = (refused_class_weights, json.dumps([CODE]))
assert read_document  # through plan_run


def watch(noted):
    """Note what no reader may do."""

    def hook(event, details):
        if event in STARTS or event in REACHES:
            noted.append(f"{event} {details!r:.200}")
        elif event == "open" and isinstance(details[0], str) and isinstance(details[2], int):
            writes = details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not Path(details[0]).absolute().is_relative_to(PLACE) and details[0] != os.devnull:
                noted.append(f"{event} {details!r:.200}")

    sys.addaudithook(hook)


def hangs(*_):
    raise TimeoutError("it hangs")


def main():
    pickles()
    signal.signal(signal.SIGALRM, hangs)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + ROOM, in_use + ROOM))
    noted = []
    watch(noted)
    for number, (what, (read, argument)) in enumerate(CASES.items()):
        place = PLACE / str(number)
        place.mkdir(parents=True)
        noted.clear()
        signal.alarm(HANG_S)  # ends a hang, here and in the report
        try:
            read(place, argument)
            said = "refused"
        except BaseException as error:
            said = f"{type(error).__name__}: {error!s:.300}"
        if noted:
            said = noted[0]
        if MARKER.exists():
            said, _ = "it ran", MARKER.unlink()
        print(json.dumps({"input": what, "said": said}), flush=True)
    print(json.dumps({"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}), flush=True)


if __name__ == "__main__":
    main()
