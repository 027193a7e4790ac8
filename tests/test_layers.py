"""The import graph stays a house: floors, rooms that do not visit each other, no cycles, one door to DeepSpeed.

Every import counts, those inside functions too. A new file fails here until it is given its floor in FLOORS.
"""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What a file may import: files of its own floor (but see ROOMS) and of the floors before it.
FLOORS = (
    (
        "plain facts",
        {"errors", "world", "duration", "durable", "manifest", "arguments", "document", "model.registry"}
        | {"published_weights", "progress", "gpu_memory", "transport", "object_store"}
        | {"process_tree", "launcher", "verdict", "stop_signals", "supervise"},
    ),
    (
        "configuration",
        {"run_config", "ds_keys", "ds_config", "flags", "dataset_facts", "layouts", "weights_header", "preflight"}
        | {"recipes", "download", "class_weights", "stream_facts", "memory_plan"},
    ),
    (
        "rooms",
        {"data", "model", "loss", "optim", "schedule", "log", "meter", "predictions", "report", "faults", "collectives"}
        | {"flops", "attention_map", "ema", "prediction_file", "contact_sheet", "snapshot"}
        | {"step_profile", "grad_norms", "update_gate"},
    ),
    ("engine and weights", {"engine", "weights", "elastic", "step_time", "planner"}),
    (
        "state on disk and evaluation",
        {"checkpoint", "evaluate", "inference", "stop", "feed", "step_view", "replay", "watchdog"},
    ),
    ("the loop", {"resume", "saver", "run_directory", "divergence", "auto_micro_batch", "train"}),
)
TORCH_FREE_FLOORS = (0, 1)
ROOMS_FLOOR = 2
# Inside data/: the stations of a sample's way into a batch. They do not know each other; the loader knows them all.
DATA_ROOMS = {"data.order", "data.reader", "data.decode", "data.crop", "data.augment", "data.mixup", "data.tar_stream"}


def module_files() -> dict[str, Path]:
    """Every module of the package by its name without "vitds."; the package's own face is left out."""
    files = sorted((ROOT / "vitds").rglob("*.py"))
    names = [".".join(path.relative_to(ROOT / "vitds").with_suffix("").parts) for path in files]
    return {name: path for name, path in zip(names, files, strict=True) if not name.endswith("__init__")}


MODULES = module_files()


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere in it, `from a import b` as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports are not used here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def vitds_imports(name: str) -> set[str]:
    """The modules of the package that a module imports."""
    dotted = {item.removeprefix("vitds.") for item in imports_of(MODULES[name]) if item.startswith("vitds.")}
    return {item if item in MODULES else item.rpartition(".")[0] for item in dotted} & MODULES.keys()


def floor_of(name: str) -> int:
    """The floor of a module: its own entry, else its package's."""
    for key in (name, name.split(".")[0]):
        for floor, (_, members) in enumerate(FLOORS):
            if key in members:
                return floor
    pytest.fail(f"vitds/{name.replace('.', '/')}.py has no floor yet: add it to FLOORS in tests/test_layers.py")


def room_of(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_a_file_imports_only_from_its_floor_and_below(name):
    floor = floor_of(name)
    above = {other for other in vitds_imports(name) if floor_of(other) > floor}
    assert not above, f"{name} ({FLOORS[floor][0]}) imports from above: {sorted(above)}"
    if floor == ROOMS_FLOOR:
        visits = {
            other for other in vitds_imports(name) if floor_of(other) == ROOMS_FLOOR and room_of(other) != room_of(name)
        }
        assert not visits, f"{name} visits other rooms: {sorted(visits)}"
    if name in DATA_ROOMS:
        met = vitds_imports(name) & DATA_ROOMS
        assert not met, f"{name} knows {sorted(met)}: these meet in data.loader"


def test_there_is_no_cycle():
    graph = {name: vitds_imports(name) for name in MODULES}
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_only_the_engine_imports_deepspeed():
    scripts = {f"{folder}/{path.name}": path for folder in ("launch", "tools") for path in (ROOT / folder).glob("*.py")}
    importers = {
        name
        for name, path in (MODULES | scripts).items()
        if any(item.split(".")[0] == "deepspeed" for item in imports_of(path))
    }
    assert importers == {"engine"}


@pytest.mark.parametrize("name", [name for name in MODULES if floor_of(name) in TORCH_FREE_FLOORS])
def test_the_two_lowest_floors_run_without_torch(name):
    check = (
        f"import sys, vitds.{name}; print(*({{'torch', 'deepspeed', 'torchvision', 'pyarrow'}} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    heavy = {item for item in imports_of(MODULES[name]) if item.split(".")[0] in ("torch", "deepspeed", "torchvision")}
    assert not heavy, "hidden inside a function"


def test_nothing_in_the_package_imports_the_scripts():
    for name, path in MODULES.items():
        assert not {item for item in imports_of(path) if item.split(".")[0] in ("launch", "tools", "tests")}, name
