"""--pretrained starts a run from the exact fp32 weights at any ZeRO stage, world size and precision.

Fine-tuning as Google does it: another number of classes drops pre_logits and starts the head at zero, and position
embeddings are resized to the run's images.
"""

import numpy as np
import pytest
import torch
from data_sets import pixel_source
from run_directory import assert_same_weights, config_file, train_command, weights
from warm_ranks import WarmRanks
from weights.reference import gen_npz

from vitds import create_model
from vitds.data.writer import WriteOptions, write_dataset

# At rate 0 the weights after a step are those that the engine started from.
STILL = {"optimizer": {"type": "SGD", "params": {"lr": 0.0}}, "gradient_clipping": 0.0}
PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 128}},
}
FILES = {  # model, variant, and the size of the run's images, which is not the file's
    "plain": ("tiny", "imagenet21k+imagenet2012", 32),  # 48 px, 10 classes
    "21k": ("tiny", "imagenet21k", 48),  # 32 px, 61 classes, pre_logits
    "hybrid": ("tiny-hybrid", "imagenet21k+imagenet2012", 64),  # 96 px, 10 classes
    "hybrid 21k": ("tiny-hybrid", "imagenet21k", 32),  # 64 px, 61 classes, pre_logits
}
CASES = [  # ZeRO stage, precision, file, read as, classes: 10 keep a head of 10, 11 do not divide by the ranks
    (0, "fp32", "21k", "directory", 10),
    (1, "fp32", "plain", "directory", 10),
    (1, "bf16", "hybrid 21k", "npz", 10),
    (1, "fp16", "21k", "npz", 11),
    (2, "bf16", "21k", "directory", 10),
    (2, "fp16", "hybrid", "npz", 11),
    (3, "bf16", "plain", "npz", 10),
    (3, "bf16", "hybrid 21k", "directory", 11),
    (3, "fp16", "plain", "directory", 11),
    (3, "fp16", "hybrid 21k", "npz", 10),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Sixteen, of ten classes, and none to evaluate on."""
    directory = tmp_path_factory.mktemp("data") / "pixels"
    write_dataset(directory, {"train": pixel_source(16, num_classes=10)}, WriteOptions("pixels"))
    return directory


@pytest.fixture(scope="module")
def ranks():
    """By world size; a process serves its stages in rising order, for stage 3 patches torch in it."""
    with WarmRanks(1) as one, WarmRanks(2) as two:
        yield {1: one, 2: two}


@pytest.fixture(scope="module")
def sources(ranks, tmp_path_factory):
    """Every file, and the directory that tools/npz_to_ds.py makes of it."""
    folder, found = tmp_path_factory.mktemp("weights"), {}
    for name, (model, variant, _) in FILES.items():
        npz, directory = folder / f"{name}.npz", folder / name
        np.savez(npz, **gen_npz.weights(model, variant))
        ranks[1].run(["tools/npz_to_ds.py", npz, directory])
        found[name] = {"npz": npz, "directory": directory}
    return found


@pytest.mark.ranks
@pytest.mark.parametrize(("stage", "precision", "file", "form", "num_classes"), CASES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_arrive_exactly(
    world_size, stage, precision, file, form, num_classes, images, sources, ranks, tmp_path
):
    size = FILES[file][2]
    ours = {"model": None, "image_size": size, "num_steps": 1, "num_classes": num_classes}
    ours |= {"dropout": 0.0, "drop_path": 0.0}
    config = config_file(tmp_path, stage, **STILL, **PRECISIONS[precision], vitds=ours)
    command = train_command(config, images, tmp_path, "run", "--pretrained", sources[file][form], "--warmup-steps", 0)
    ranks[world_size].run(["tests/workers/fp16_on_cpu.py", *command])

    begun = weights(tmp_path / "run", 1)
    npz = np.load(sources[file]["npz"])
    assert_same_weights(begun, create_model("auto", size, num_classes, weights=sources[file]["npz"]).state_dict())
    assert torch.equal(begun["cls_token"], torch.from_numpy(npz["cls"]))
    assert begun["pos_embed"].shape != npz["Transformer/posembed_input/pos_embedding"].shape
    if num_classes == npz["head/bias"].size:
        assert torch.equal(begun["head.weight"], torch.from_numpy(npz["head/kernel"]).T)
    else:
        assert not {name for name in begun if "pre_logits" in name}
        assert not begun["head.weight"].any()
        assert not begun["head.bias"].any()
    for dtype in (torch.bfloat16, torch.float16):
        assert not torch.equal(begun["cls_token"], begun["cls_token"].to(dtype).float()), "as told from rounded ones"
