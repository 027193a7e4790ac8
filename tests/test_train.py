"""A run that diverges ends with its own exit code, and saves nothing of what is lost."""

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupLR
from deepspeed.utils.nvtx import instrument_w_nvtx
from run_directory import config_file, metrics, train_command, weights
from warm_ranks import WarmRanks

from vitds.engine import _naming_the_configuration
from vitds.errors import ConfigError
from vitds.schedule import lr_factor

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def ranks():
    with WarmRanks(1) as ranks:
        yield ranks


@pytest.mark.parametrize("log_every", [1, 100])
def test_weights_that_are_not_finite_are_never_saved(ranks, digits, tmp_path, log_every):
    """At stage 0 in fp32 DeepSpeed alone would apply a gradient that is not finite."""
    steps = {"num_steps": 30, "save_every": 1, "keep_last": 9, "log_every": log_every}
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 1e25}}, "scheduler": {"type": "constant"}}
    config = config_file(tmp_path, 0, **sgd, gradient_clipping=0.0, vitds=steps)
    output = ranks.run(train_command(config, digits, tmp_path, "run"), exit_code=6).output
    assert "diverged  10 steps in a row were skipped" in output
    assert "lower the learning rate" in output
    assert "Traceback" not in output
    saved = sorted((tmp_path / "run/checkpoints").glob("global_step*"))
    assert saved
    for directory in saved:
        found = weights(tmp_path / "run", int(directory.name.removeprefix("global_step")))
        assert all(tensor.isfinite().all() for tensor in found.values()), directory.name
    lines = metrics(tmp_path / "run")
    assert [line["split"] for line in lines].count("train") == (len(saved) + 9 if log_every == 1 else 0)
    assert [line["split"] for line in lines].count("event") == 10


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_in_which_every_step_is_skipped_ends(ranks, digits, tmp_path, stage):
    """At stages 1 and 2 such steps are skipped; a run that does nothing else would go on for ever."""
    steps = {"num_steps": 80, "log_every": 1}
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 1e38}}, "scheduler": {"type": "constant"}}
    config = config_file(tmp_path, stage, **sgd, gradient_clipping=0.0, vitds=steps)
    output = ranks.run(train_command(config, digits, tmp_path, "run"), exit_code=6).output
    assert "10 steps in a row were skipped" in output
    steps = [line["step"] for line in metrics(tmp_path / "run") if line["split"] == "event"][-10:]
    assert steps == list(range(steps[0], steps[0] + 10))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has DeepSpeed's Lamb")
def test_an_optimizer_that_deepspeed_cannot_build_here_is_the_configurations_fault(ranks, digits, tmp_path):
    lamb = {"optimizer": {"type": "Lamb", "params": {"lr": 1e-3}}}
    output = ranks.run(train_command(config_file(tmp_path, 1, **lamb), digits, tmp_path, "run"), exit_code=2).output
    assert "DeepSpeed cannot build Lamb here" in output and "AdamW" in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 1e-4}}}, "cycle_max_lr"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}, "reduce_bucket_size\n  Input should be"),
    ],
)
def test_a_value_that_deepspeed_refuses_is_the_configurations_fault(ranks, digits, tmp_path, changes, told):
    config = config_file(tmp_path, 1, **changes)
    output = ranks.run(train_command(config, digits, tmp_path, "run"), exit_code=2).output
    assert "DeepSpeed refuses this configuration" in output and told in output and "Traceback" not in output


def test_what_vitds_or_the_model_raises_below_deepspeed_is_no_fault_of_the_configuration():
    parameter = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ConfigError, match="DeepSpeed refuses this configuration: warmup_num_steps"):
        with _naming_the_configuration({}):
            WarmupLR(torch.optim.SGD([parameter], lr=0.1), warmup_num_steps=0)
    called_by_deepspeed = instrument_w_nvtx(lr_factor("cosine", 3, 10))
    for bug in (lambda: called_by_deepspeed("a step"), lambda: parameter.to("cpu", "no such argument")):
        with pytest.raises(TypeError), _naming_the_configuration({}):
            bug()
