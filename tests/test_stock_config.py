"""A DeepSpeed configuration that knows nothing of vitds trains as it is, at the learning rates of DeepSpeed itself."""

import json
import math

import pytest
from rank_processes import last_json, run_ranks
from run_directory import TINY, metrics, train_command
from warm_ranks import WarmRanks

pytestmark = pytest.mark.ranks

STEPS = 12
ADAMW = {"type": "AdamW", "params": {"lr": 0.003, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.05}}
STOCK = {
    "bf16, accumulation, ZeRO-2, WarmupDecayLR": {
        "train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "steps_per_print": 100,
        "optimizer": ADAMW,
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.003, "warmup_num_steps": 4, "total_num_steps": STEPS},
        },
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 2,
            "allgather_bucket_size": 5e8,
            "reduce_bucket_size": 5e8,
            "overlap_comm": True,
            "contiguous_gradients": True,
        },
    },
    "fp32, WarmupCosineLR": {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": ADAMW,
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": STEPS, "warmup_num_steps": 3, "warmup_type": "linear"},
        },
    },
    "fp32, WarmupLR with log warmup": {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.002, "warmup_num_steps": 5}},
        "zero_optimization": {"stage": 1},
    },
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stock")
    for name, config in STOCK.items():
        (directory / f"{name}.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def trained(configs, digits):
    flags = ["--model", TINY, "--image-size", "16", "--num-steps", STEPS, "--log-every", "1", "--workers", "0"]
    with WarmRanks(1) as ranks:
        commands = {name: train_command(configs / f"{name}.json", digits, configs, name, *flags) for name in STOCK}
        return {name: ranks.run(command).output for name, command in commands.items()}


@pytest.fixture(scope="module")
def traces(configs):
    paths = [str(configs / f"{name}.json") for name in STOCK]
    return last_json(run_ranks(["tests/workers/deepspeed_lr_trace.py", str(STEPS), *paths], 1)[0])


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_file_trains_at_deepspeeds_own_rates(name, configs, trained, traces):
    lines = [line for line in metrics(configs / name) if line["split"] == "train"]
    trace = traces[str(configs / f"{name}.json")]
    assert [line["lr"] for line in lines] == pytest.approx(trace, rel=1e-12)
    assert trace[:2] == [0.0, 0.0], "DeepSpeed's own schedulers begin with two steps at their lowest rate"
    assert max(trace) > 1e-3
    losses = [line["loss"] for line in lines]
    assert losses[:3] == pytest.approx([math.log(10)] * 3), "the head starts at zero and two steps leave it there"
    assert losses[3:] != pytest.approx([math.log(10)] * (STEPS - 3), abs=1e-3)
    assert f"scheduler {STOCK[name]['scheduler']['type']} is DeepSpeed's own: two steps at its lowest" in trained[name]


def test_precision_and_stage_are_the_files_own(trained):
    output = trained["bf16, accumulation, ZeRO-2, WarmupDecayLR"]
    assert "bf16  ZeRO stage 2" in output and output.count("\ndecoder  ") == 1
    assert "global batch 16 = 8 a micro-batch x 2 accumulated x 1 rank" in output
    assert "fp32  ZeRO stage 0" in trained["fp32, WarmupCosineLR"]
