"""--pretrained starts a run from the exact fp32 weights at any ZeRO stage, world size and precision."""

import numpy as np
import pytest
from run_directory import assert_same_weights, config_file, train_command, weights
from warm_ranks import WarmRanks
from weights.reference import gen_npz

from vitds import create_model
from vitds.checkpoint import save_weights
from vitds.weights.load import load_weights

# At rate 0 the weights after a step are those that the engine started from.
STILL = {"optimizer": {"type": "SGD", "params": {"lr": 0.0}}, "gradient_clipping": 0.0}
TINY = {"model": None, "image_size": 32, "num_steps": 1, "num_classes": 10, "dropout": 0.0, "drop_path": 0.0}


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """Tiny, 10 classes at 48 px."""
    path = tmp_path_factory.mktemp("weights") / "tiny.npz"
    np.savez(path, **gen_npz.weights("tiny", "imagenet21k+imagenet2012"))
    return path


@pytest.fixture(scope="module")
def directory(npz, tmp_path_factory):
    """The same weights as tools/npz_to_ds.py writes them."""
    found = load_weights(npz)
    info = {"model": found.header.spec.name, "image_size": [48, 48], "num_classes": 10, "pre_logits": None}
    path = tmp_path_factory.mktemp("weights") / "tiny"
    save_weights(path, found.state_dict, info)
    return path


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_arrive_exactly(digits, npz, directory, tmp_path, world_size):
    cases = [(0, "fp32", 10), (1, "fp32", 10), (1, "bf16", 10), (2, "bf16", 10), (3, "bf16", 10), (3, "bf16", 11)]
    with WarmRanks(world_size) as ranks:
        for stage, precision, num_classes in cases:  # 11 does not divide by the ranks: stage 3 pads
            expected = create_model("auto", weights=npz, image_size=32, num_classes=num_classes).state_dict()
            changes = STILL | ({"bf16": {"enabled": True}} if precision == "bf16" else {})
            config = config_file(tmp_path, stage, **changes, vitds=TINY | {"num_classes": num_classes})
            source = npz if stage == 2 else directory
            name = f"{stage}-{precision}-{num_classes}"
            ranks.run(train_command(config, digits, tmp_path, name, "--pretrained", source, "--warmup-steps", 0))
            assert_same_weights(weights(tmp_path / name, 1), expected)
