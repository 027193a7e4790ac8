import os
import signal
import subprocess
import sys

import pytest
from rank_processes import ROOT

from vitds import errors


def test_every_class_has_the_exit_code_of_the_contract():
    expected = {
        errors.UsageError: 2,
        errors.ConfigError: 2,
        errors.DataError: 3,
        errors.CheckpointError: 4,
        errors.WeightError: 4,
        errors.OutOfMemory: 5,
        errors.Diverged: 6,
        errors.RankLost: 7,
    }
    assert {kind: kind.exit_code for kind in expected} == expected


def test_a_message_says_where_what_and_the_fix():
    error = errors.ConfigError('unknown key "x"', where="my.json:7", fix='did you mean "y"?\nor "z"')
    assert str(error) == 'config error  my.json:7  unknown key "x"\n  did you mean "y"?\n  or "z"'


def test_the_nearest_name_ignores_case_and_hyphens():
    assert errors.nearest("--num_step", ["--num-steps", "--seed"]) == "--num-steps"
    assert errors.nearest("vit-b16", ["ViT-B_16", "ViT-L_16"]) == "ViT-B_16"
    assert errors.nearest("qqq", ["ViT-B_16"]) is None
    assert errors.did_you_mean("qqq", ["a", "b"]) == "valid names: a, b"


def _raise(error):
    raise error


@pytest.mark.parametrize(("rank", "printed"), [("0", True), ("1", False)])
def test_only_rank_0_prints(monkeypatch, capsys, rank, printed):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(errors, "_SILENT_RANK_DELAY_S", 0)
    with pytest.raises(SystemExit) as ended:
        errors.exit_with(lambda: _raise(errors.DataError("empty")))
    assert ended.value.code == 3
    assert ("data error  empty" in capsys.readouterr().err) is printed


def test_the_codes_of_other_ends(monkeypatch):
    for main, code in ((lambda: None, 0), (lambda: 75, 75), (lambda: _raise(KeyboardInterrupt()), 130)):
        with pytest.raises(SystemExit) as ended:
            errors.exit_with(main)
        assert ended.value.code == code
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback, and Python's own exit code 1
        errors.exit_with(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("tool", "package"),
    [("benchmark", "torch"), ("verify_shards", "pyarrow"), ("shard_imagenet", "pyarrow"), ("plan", "vitds.planner")],
)
def test_ctrl_c_while_a_tool_imports_what_it_needs_has_no_traceback(tmp_path, tool, package):
    """It comes when the tool imports this package; another exception there keeps its traceback."""
    importing = f"""
import builtins, runpy, sys
def hooked(name, *rest, ordinary=__import__):
    if name == {package!r}:
        raise {{}}
    return ordinary(name, *rest)
builtins.__import__ = hooked
runpy.run_path("tools/{tool}.py", run_name="__main__")
"""
    for error, ends_with in (("KeyboardInterrupt", (-signal.SIGINT, "")), ("ZeroDivisionError", (1, "Error\n"))):
        (tmp_path / "start.py").write_text(importing.format(error))
        path = os.pathsep.join([str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, tmp_path / "start.py"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert done.returncode == ends_with[0] and done.stderr[-6:] == ends_with[1], done.stderr
