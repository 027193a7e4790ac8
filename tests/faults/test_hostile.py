"""No file that vitds is given runs code: hostile inputs of every kind, and no other way for a pickle or a shell."""

import ast
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from counts import record
from rank_processes import ROOT

FEWEST = 200
# Where code may call what reads pickles or starts programs, by file; each is guarded there.
ALLOWED = {
    "vitds/weights/ds_file.py": {"torch.load"},  # weights_only, after our own reader of names
    "vitds/weights/torch_files.py": {"torch.load"},  # weights_only, after our own reader of names
}
FORBIDDEN = {
    *("torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "np.load", "numpy.load"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "dill.load"),
    *("joblib.load", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen", "subprocess.getoutput", "eval", "exec"),
    *("tarfile.TarFile.extractall", "shutil.unpack_archive", "pandas.read_pickle"),
}


def test_hostile_inputs_are_refused_in_bounded_memory_and_none_runs(tmp_path):
    command = [sys.executable, "tests/faults/hostile_inputs.py", str(tmp_path / "place")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, env=os.environ)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and "peak_rss_mib" in lines[-1], done.stderr[-3000:]
    *results, last = lines
    kinds = Counter(result["input"].partition(":")[0] for result in results)
    refused = sum(result["said"] == "refused" for result in results)
    how = "pickles, archives, images, names, JSON and addresses, each to what reads it, under an audit hook"
    peak = f"{', '.join(f'{kind} {num}' for kind, num in kinds.items())}; peak {last['peak_rss_mib']} MiB"
    record("hostile input", how, refused, len(results), peak)
    assert [result for result in results if result["said"] != "refused"] == []
    assert len(results) >= FEWEST


def called(node):
    """The dotted name that a call names, as far as it is one."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ".".join(["", *reversed(parts)])


FILES = sorted(path for folder in ("vitds", "launch", "tools") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_there_is_no_other_way_for_a_pickle_or_a_shell(path):
    name = str(path.relative_to(ROOT))
    for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
        function, options = called(call.func), {option.arg: option.value for option in call.keywords}
        where = f"{name}:{call.lineno} {function}"
        assert function not in FORBIDDEN - ALLOWED.get(name, set()), where
        assert function.rpartition(".")[2] not in ("extractall", "unsafe_load"), where
        assert not isinstance(options.get("shell"), ast.Constant) or not options["shell"].value, where
        if function == "torch.load":
            assert ast.literal_eval(options["weights_only"]) is True, where
        if "allow_pickle" in options:
            assert ast.literal_eval(options["allow_pickle"]) is False, where


VARIABLES = "NAME MODEL_TYPE PRETRAINED_DIR RESUME_PATH CONFIG IMG_SIZE NUM_STEPS DECAY_TYPE TRAIN_BATCH_SIZE".split()


def test_shell_text_in_the_variables_of_the_launch_scripts_is_text(tmp_path):
    """`deepspeed` is a program here that prints its arguments: what reaches it is what was given, and nothing ran."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/deepspeed"
    program.write_text('#!/bin/sh\nfor one in "$@"; do printf "%s\\n" "$one"; done\n')
    program.chmod(0o755)
    value = "$(touch it-ran) `touch it-ran`; touch it-ran & * ~ \"' x"
    (tmp_path / value).touch()  # weights that are not there are refused
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix}
    environment |= {"DATASET": str(tmp_path)} | dict.fromkeys(VARIABLES, value)
    done = subprocess.run(
        ["bash", ROOT / "launch/train.sh", "--set", value],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not (tmp_path / "it-ran").exists()
    assert done.stdout.splitlines().count(value) == len(VARIABLES) + 1, done.stdout + done.stderr
