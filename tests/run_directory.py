"""Starting runs in tests and reading what they leave behind."""

import json
from pathlib import Path

import torch

from vitds.weights.zero import open_checkpoint

TINY = "custom:width=32,depth=3,heads=4,mlp=64,patch=4"
TIMINGS = ("images_per_s", "mfu", "data_wait_frac", "eta_s", "mem_gib")


def config_file(directory: Path, stage: int, **changes) -> Path:
    """A small experiment: dropout, drop-path and random crops on, two accumulation steps."""
    config = {
        "train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.05}},
        "scheduler": {"type": "cosine", "params": {"warmup_num_steps": 5}},
        "zero_optimization": {"stage": stage},
        "vitds": {
            "model": TINY,
            "image_size": 16,
            "num_steps": 20,
            "dropout": 0.1,
            "drop_path": 0.1,
            "log_every": 1,
            "save_every": 10,
            "workers": 1,
            "keep_last": 3,
        },
    }
    ours = changes.pop("vitds", {})
    config = config | changes
    config["vitds"] = config["vitds"] | ours
    path = directory / f"stage{stage}.json"
    path.write_text(json.dumps(config))
    return path


def train_command(config: Path, data: Path, output: Path, name: str, *flags: str) -> list[str]:
    command = ["launch/train.py", "--deepspeed_config", config, "--data", data, "--output-dir", output, "--name", name]
    return [str(part) for part in [*command, *flags]]


def metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what a clock or another machine changes."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def weights(run_dir: Path, step: int, state: str = "master") -> dict[str, torch.Tensor]:
    return consolidated_state_dict(run_dir / "checkpoints" / f"global_step{step}", state)


def consolidated_state_dict(directory: Path, state: str = "master") -> dict[str, torch.Tensor]:
    """Whole fp32 parameters and buffers of one committed global_stepN directory, or another state of them."""
    return {name: torch.from_numpy(array) for name, array in open_checkpoint(directory, state).items()}


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different
