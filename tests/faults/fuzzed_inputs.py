"""Valid inputs changed at random, each given to what reads its kind:  python tests/faults/fuzzed_inputs.py PLACE COUNT

Bytes are flipped, cut, inserted, repeated and swapped; values of JSON are exchanged for others. A reader may give what
the unchanged input gives, or another result where nothing in the format could tell; else it must refuse in its own
words.
Runs as tests/faults/hostile_inputs.py does: bounded memory, an audit hook, an alarm. Prints a JSON line a reader.
"""

import json
import resource
import signal
import sys
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hostile_inputs import HANG_S, PLACE, ROOM, hangs, watch
from weights.reference import gen_npz

from vitds.data.index import read_index
from vitds.dataset_facts import read_dataset_facts
from vitds.errors import VitdsError
from vitds.manifest import FileEntry, Manifest, read_manifest, write_manifest
from vitds.preflight import plan_run
from vitds.weights.npz import load_npz
from vitds.weights_header import read_header

VALUES = (None, True, 0, -1, 1.5, 2**63, 1e308, float("nan"), "", "\0", "a" * 10_000, [], {}, [[[[]]]], {"a": None})


def changed_bytes(random, content):
    """One to four changes of bytes, anywhere."""
    content = bytearray(content)
    for _ in range(random.randint(1, 4)):
        at, length = random.randrange(len(content) + 1), random.randint(1, 64)
        match random.choice(("flip", "flip", "cut", "insert", "repeat", "swap", "end")):
            case "flip" if at < len(content):
                content[at] ^= 1 << random.randrange(8)
            case "cut":
                del content[at : at + length]
            case "insert":
                content[at:at] = random.randbytes(length)
            case "repeat":
                content[at:at] = content[at : at + length]
            case "swap":
                other = random.randrange(len(content) + 1)
                content[at : at + length], content[other : other + length] = (
                    content[other : other + length],
                    content[at : at + length],
                )
            case "end":
                del content[at:]
    return bytes(content)


def changed_values(random, content):
    """JSON with one to three values, anywhere, exchanged, removed or named otherwise."""
    document = json.loads(content)
    for _ in range(random.randint(1, 3)):
        parents = [document] if isinstance(document, (dict, list)) and document else []
        for parent in parents:  # grows while it is walked through
            inside = parent.values() if isinstance(parent, dict) else parent
            parents += [value for value in inside if isinstance(value, (dict, list)) and value]
        if not parents:
            break
        parent = random.choice(parents)
        key = random.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        match random.choice(("exchange", "exchange", "remove", "rename")):
            case "rename" if isinstance(parent, dict):
                parent[random.choice([key[:-1], key + "x", key.upper(), ""])] = parent.pop(key)
            case "remove":
                del parent[key]
            case _:
                parent[key] = random.choice(VALUES)
    return json.dumps(document).encode()


def changed_json(random, content):
    """A JSON text, by its values or by its bytes."""
    return changed_values(random, content) if random.random() < 0.5 else changed_bytes(random, content)


class Npz:
    """Weights: every array that is read has the values that were written, for an .npz has checksums."""

    mutate = staticmethod(changed_bytes)

    def __init__(self, place):
        self.path = place / "weights.npz"
        self.arrays = gen_npz.weights("tiny", "imagenet21k")
        np.savez(self.path, **self.arrays)

    def read(self):
        read_header(self.path)
        return dict(load_npz(self.path))

    def is_right(self, found):
        return all(np.array_equal(array, self.arrays[key]) for key, array in found.items() if key in self.arrays)


class IndexFile:
    """An index.parquet; Parquet's pages have no checksum, so that other numbers may come back."""

    mutate = staticmethod(changed_bytes)

    def __init__(self, place):
        self.path = place / "index.parquet"
        rows = range(40)
        columns = {"sample_id": rows, "shard": [f"s-{row % 3}.tar" for row in rows], "key": [f"k{row}" for row in rows]}
        columns |= {name: rows for name in ("offset", "size", "label", "width", "height", "crc32")}
        pq.write_table(pa.table({name: list(column) for name, column in columns.items()}), self.path)

    def read(self):
        return read_index(self.path)

    def is_right(self, found):
        return len(found.shards) > 0 and all("/" not in shard for shard in found.shards)


class DatasetJson:
    """_info.json of a dataset directory."""

    mutate = staticmethod(changed_json)

    def __init__(self, place):
        self.path = place / "_info.json"
        (place / "classes.json").write_text('["cat", "dog"]')
        splits = {
            "train": {"class_counts": [3, 4], "num_samples": 7},
            "val": {"class_counts": [1, 1], "num_samples": 2},
        }
        self.path.write_text(json.dumps({"format": 1, "splits": splits}))

    def read(self):
        return read_dataset_facts(str(self.path.parent))

    def is_right(self, found):
        return found.classes == ["cat", "dog"]


class Configuration:
    """A DeepSpeed configuration with our section, through all checks before torch is imported."""

    mutate = staticmethod(changed_json)

    def __init__(self, place):
        self.path = place / "config.json"
        DatasetJson(place)
        self.path.write_text(
            json.dumps(
                {
                    "train_batch_size": 16,
                    "train_micro_batch_size_per_gpu": 8,
                    "gradient_accumulation_steps": 2,
                    "gradient_clipping": 1.0,
                    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.05}},
                    "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 5, "total_num_steps": 50}},
                    "bf16": {"enabled": True},
                    "zero_optimization": {"stage": 2, "overlap_comm": True},
                    "vitds": {
                        "model": "ViT-Ti_16",
                        "num_steps": 50,
                        "eval_every": 10,
                        "data": {"recipe": "vit-finetune", "mean": [0.5, 0.5, 0.5]},
                    },
                }
            )
        )

    def read(self):
        return plan_run(["--deepspeed_config", str(self.path), "--data", str(self.path.parent)], {})

    def is_right(self, found):
        return found.batch.global_batch > 0 and found.num_steps > 0


class ManifestFile:
    """A checkpoint's manifest, which proves itself: as it was committed, or refused."""

    mutate = staticmethod(changed_json)

    def __init__(self, place):
        self.path = place / "MANIFEST.json"
        files = {
            f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt": FileEntry(99 + rank, "ab" * 32) for rank in range(3)
        }
        self.manifest = Manifest(files, {"step": 7, "model": "ViT-B_16", "config": {"train_batch_size": 8}})
        write_manifest(place, self.manifest)

    def read(self):
        return read_manifest(self.path.parent)

    def is_right(self, found):
        return found == self.manifest


READERS = {
    ".npz weights": Npz,
    "index.parquet": IndexFile,
    "_info.json": DatasetJson,
    "configuration": Configuration,
    "MANIFEST.json": ManifestFile,
}


def main():
    count = int(sys.argv[2])
    readers = {}
    for number, (name, kind) in enumerate(READERS.items()):
        (PLACE / str(number)).mkdir(parents=True)
        readers[name] = kind(PLACE / str(number))
        assert readers[name].is_right(readers[name].read()), name
    signal.signal(signal.SIGALRM, hangs)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + ROOM, in_use + ROOM))
    noted = []
    watch(noted)
    for name, reader in readers.items():
        random, valid = Random(name), reader.path.read_bytes()
        ends, wrong = Counter(), []
        for number in range(count):
            content = reader.mutate(random, valid)
            reader.path.write_bytes(content)
            noted.clear()
            signal.alarm(HANG_S)
            try:
                end = "read" if reader.is_right(reader.read()) else "another result"
            except VitdsError as error:
                end = (
                    "refused" if error.what and "Traceback" not in error.what else f"refused without a word: {error!r}"
                )
            except BaseException as error:
                end = f"{type(error).__name__}: {error!s:.200}"
            if noted:
                end = noted[0]
            ends[end if end in ("read", "refused") else "wrong"] += 1
            if end not in ("read", "refused") and len(wrong) < 5:
                (PLACE / f"{reader.path.name}-{number}").write_bytes(content)
                wrong.append(f"{number}: {end}")
        signal.alarm(0)
        print(json.dumps({"reader": name, **ends, "examples": wrong}), flush=True)


if __name__ == "__main__":
    main()
