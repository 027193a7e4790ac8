"""fp32 weights out of checkpoints that DeepSpeed itself wrote, and none out of anything unsafe or damaged."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from rank_processes import run_ranks
from run_directory import consolidated_state_dict

from vitds import engine
from vitds.errors import CheckpointError
from vitds.manifest import Manifest, hash_file, write_manifest
from vitds.weights.ds_file import safe_load
from vitds.weights.stored import read_stored
from vitds.weights.zero import CHECKPOINT_STAND_INS, open_checkpoint, read_checkpoint

CASES = [
    "stage0-fp32",
    *("stage1-fp32", "stage1-bf16", "stage1-bf16-accumulating-fp32"),
    *("stage2-fp32", "stage2-bf16", "stage2-fp16"),
    *("stage3-fp32", "stage3-bf16", "stage3-fp16"),
]


@pytest.fixture(scope="module", params=[1, 2, 3], ids=["1 rank", "2 ranks", "3 ranks"])
def checkpoints(request, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("checkpoints")
    run_ranks(["tests/workers/zero_checkpoints.py", str(out_dir)], request.param)
    for directory in out_dir.glob("*/global_step2"):
        commit(directory)
    return out_dir


def commit(directory):
    write_manifest(directory, Manifest({path.name: hash_file(path) for path in directory.glob("*.pt")}, {}))


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES)
def test_weights_are_the_fp32_masters_bit_for_bit(case, checkpoints):
    weights = consolidated_state_dict(checkpoints / case / "global_step2")
    live = torch.load(checkpoints / case / "live.pt")
    assert weights.keys() == live.keys()
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, live[name]), name


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES)
def test_optimizer_states_are_those_of_the_live_engines_bit_for_bit(case, checkpoints):
    directory = checkpoints / case / "global_step2"
    live = torch.load(checkpoints / case / "states.pt")
    trainable = {"first.weight", "first.bias", "second.weight", "second.bias"}
    saved, masters = read_checkpoint(directory), open_checkpoint(directory)
    for key, expected in live.items():
        arrays = open_checkpoint(directory, key)
        assert expected.keys() == trainable
        assert arrays.keys() == (masters.keys() if key == "ema" else trainable)
        for name in trainable:
            assert torch.equal(torch.from_numpy(arrays[name]), expected[name]), (key, name)
            assert expected[name].any()
            run = saved.run(key, name, 1, expected[name].numel() - 2)
            assert torch.equal(torch.from_numpy(run), expected[name].flatten()[1:-1]), (key, name)
    average = open_checkpoint(directory, "ema")
    for name in masters.keys() - trainable:
        assert (average[name] == masters[name]).all(), name
    assert {name: float(step) for name, step in open_checkpoint(directory, "step").items()} == dict.fromkeys(
        trainable, 2
    )
    assert sorted(name for names in saved.names_by_group for name in names) == sorted(trainable)
    assert saved.zero_stage == int(case[5])
    with pytest.raises(CheckpointError, match="holds no momentum of its parameters"):
        open_checkpoint(directory, "momentum")
    with pytest.raises(CheckpointError, match="the run kept no average of its weights\n  leave out --ema"):
        replace(saved, states={"master": saved.states["master"]}).arrays("ema")


@pytest.mark.ranks
@pytest.mark.parametrize("case", [case for case in CASES if "stage0" not in case and "accumulating" not in case])
def test_weights_are_those_of_zero_to_fp32(case, checkpoints):
    weights = consolidated_state_dict(checkpoints / case / "global_step2")
    expected = torch.load(checkpoints / case / "zero_to_fp32.pt")
    assert {"first.weight", "first.bias", "second.weight", "second.bias"} <= expected.keys()
    for name, tensor in expected.items():  # DeepSpeed's script leaves frozen parameters out at stage 1
        assert torch.equal(weights[name], tensor.float()), name


@pytest.mark.ranks
def test_a_missing_rank_and_a_flipped_bit_are_refused(checkpoints, tmp_path):
    whole = checkpoints / "stage3-bf16" / "global_step2"
    directory = shutil.copytree(whole, tmp_path / "global_step2")
    victim = sorted(directory.glob("*_optim_states.pt"))[-1]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(CheckpointError, match=victim.name):
        consolidated_state_dict(directory)
    victim.unlink()
    with pytest.raises(CheckpointError, match=victim.name):
        consolidated_state_dict(directory)
    if len(list(whole.glob("*_optim_states.pt"))) == 2:
        commit(directory)  # a manifest that never knew the rank
        with pytest.raises(CheckpointError, match="1 optimizer files where 2"):
            consolidated_state_dict(directory)
    (directory / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match="never committed"):
        consolidated_state_dict(directory)


class Attribute:
    """Pickled as the older interpreters of Python 3.11 pickle a member of an enumeration."""

    def __init__(self, kind, name):
        self.found = (kind, name)

    def __reduce__(self):
        return getattr, self.found


def test_members_of_enumerations_are_read_as_any_python_writes_them(tmp_path):
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"zero_stage": Attribute(engine.ZeroStageEnum, "gradients")}, path)
    assert safe_load(path, "cpu", engine._SAFE_GLOBALS) == {"zero_stage": engine.ZeroStageEnum.gradients}
    assert safe_load(path) == read_stored(path, CHECKPOINT_STAND_INS) == {"zero_stage": 2}
    torch.save({"zero_stage": Attribute(engine.LossScaler, "backward")}, path)
    with pytest.raises(CheckpointError, match="getattr of something else"):
        safe_load(path, "cpu", engine._SAFE_GLOBALS)


class Bomb:
    def __reduce__(self):
        return (exec, ("import os; os.environ['VITDS_TEST_BOMB'] = 'went off'",))


def test_a_file_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("VITDS_TEST_BOMB", raising=False)
    torch.save({"module": {}, "vitds": Bomb()}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="only code can restore"):
        safe_load(tmp_path / "mp_rank_00_model_states.pt")
    commit(tmp_path)
    with pytest.raises(CheckpointError, match="only code can restore"):
        consolidated_state_dict(tmp_path)
    assert "VITDS_TEST_BOMB" not in os.environ


def test_files_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": {"a": torch.zeros(1000)}}, path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="mp_rank_00"):
            safe_load(path)
    with pytest.raises(CheckpointError, match="none"):
        safe_load(tmp_path / "none.pt")


def test_content_that_is_no_checkpoint_is_refused(tmp_path):
    torch.save({"something": 1}, tmp_path / "mp_rank_00_model_states.pt")
    commit(tmp_path)
    with pytest.raises(CheckpointError, match="unexpected content"):
        consolidated_state_dict(tmp_path)


def test_a_pickle_that_is_its_own_content_and_a_tensor_larger_than_its_file_are_refused(tmp_path):
    looped = {"module": {}}
    looped["module"]["again"] = looped
    stretched = {"module": {"a": torch.zeros(1).expand(10**12)}}  # four terabytes of one number
    for content, told in ((looped, "nested without end"), (stretched, "1000000000000 values is said to lie in 1")):
        torch.save(content, tmp_path / "mp_rank_00_model_states.pt")
        commit(tmp_path)
        with pytest.raises(CheckpointError, match=told):
            consolidated_state_dict(tmp_path)
