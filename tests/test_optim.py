"""What trains, with which weight decay, under which optimizer."""

import pytest
import torch

from vitds.model.registry import get_spec
from vitds.model.vit import VisionTransformer
from vitds.optim import build_optimizer, decay_by_layer, parameter_groups, select_trainable

DEPTH = 3


def new_model(extra=""):
    return VisionTransformer(get_spec(f"custom:width=16,depth={DEPTH},heads=2,mlp=32,patch=4{extra}"), (8, 8), 5)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def names_of(model, parameters):
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return [by_id[id(parameter)] for parameter in parameters]


def test_all_trains_every_parameter():
    model = new_model()
    select_trainable(model, "all", DEPTH)
    assert trainable(model) == {name for name, _ in model.named_parameters()}


def test_head_trains_the_head_alone():
    model = new_model()
    select_trainable(model, "head", DEPTH)
    assert trainable(model) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("last", [1, 2, DEPTH])
def test_last_k_trains_the_last_blocks_the_final_norm_and_the_head(last):
    model = new_model()
    select_trainable(model, f"last-{last}", DEPTH)
    blocks = {name.split(".")[1] for name in trainable(model) if name.startswith("blocks.")}
    assert blocks == {str(index) for index in range(DEPTH - last, DEPTH)}
    of_blocks = {name for name, _ in model.named_parameters() if name.startswith("blocks.") and name[7] in blocks}
    assert trainable(model) == of_blocks | {"norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_last_k_trains_an_attention_pool_too():
    model = new_model(",pooling=map")
    select_trainable(model, "last-1", DEPTH)
    pool = {name for name, _ in model.named_parameters() if name.startswith("attn_pool.")}
    assert pool
    assert pool <= trainable(model)


def test_weight_decay_on_matrices_leaves_gains_biases_tokens_and_positions_alone():
    model = new_model(",registers=2,layer_scale=0.1,qk_norm=true")
    decayed, undecayed = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert undecayed["weight_decay"] == 0.0
    kernels = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = ["patch_embed.weight", *(f"blocks.{i}.{k}.weight" for i in range(DEPTH) for k in kernels), "head.weight"]
    assert names_of(model, decayed["params"]) == expected
    assert {"cls_token", "pos_embed", "reg_token", "norm.weight", "head.bias", "blocks.0.ls1.gamma"} <= set(
        names_of(model, undecayed["params"])
    )
    assert len(decayed["params"]) + len(undecayed["params"]) == len(list(model.parameters()))


def test_weight_decay_on_all_is_one_group_and_frozen_parameters_are_in_none():
    model = new_model()
    (group,) = parameter_groups(model, 0.1, "all")
    assert names_of(model, group["params"]) == [name for name, _ in model.named_parameters()]
    select_trainable(model, "head", DEPTH)
    decayed, undecayed = parameter_groups(model, 0.1)
    assert names_of(model, decayed["params"]) == ["head.weight"]
    assert names_of(model, undecayed["params"]) == ["head.bias"]


@pytest.mark.parametrize(
    ("kind", "expected"), [("AdamW", torch.optim.AdamW), ("Adam", torch.optim.Adam), ("SGD", torch.optim.SGD)]
)
def test_names_mean_torchs_optimizers(kind, expected):
    optimizer = build_optimizer(kind, {"lr": 0.5}, parameter_groups(new_model(), 0.1))
    assert type(optimizer) is expected
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(group["lr"] == 0.5 and group["fused"] for group in optimizer.param_groups)


def test_betas_and_momentum_arrive():
    model = new_model()
    adam = build_optimizer("AdamW", {"lr": 1e-3, "betas": (0.8, 0.9), "eps": 1e-6}, parameter_groups(model, 0.0))
    assert adam.param_groups[0]["betas"] == (0.8, 0.9)
    assert adam.param_groups[0]["eps"] == 1e-6
    sgd = build_optimizer("SGD", {"lr": 1e-3, "momentum": 0.9, "nesterov": True}, parameter_groups(model, 0.0))
    assert sgd.param_groups[0]["momentum"] == 0.9
    assert sgd.param_groups[0]["nesterov"]


def rates_of(model, groups):
    """The learning rate of each parameter by name."""
    return {name: group["lr"] for group in groups for name in names_of(model, group["params"])}


@pytest.mark.parametrize("extra", ["", ",registers=2,layer_scale=0.1,pooling=map"])
def test_layer_decay_makes_a_group_of_each_layer_and_weight_decay(extra):
    model = new_model(extra)
    groups = decay_by_layer(parameter_groups(model, 0.1), model, DEPTH, 2.0, 0.5)
    assert len(groups) <= 2 * (DEPTH + 2)
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {
        (2.0 * 0.5**away, decay) for away in range(DEPTH + 2) for decay in (0.0, 0.1)
    }
    rates = rates_of(model, groups)
    assert rates.keys() == {name for name, _ in model.named_parameters()}
    for name, rate in rates.items():
        if name.startswith("blocks."):
            assert rate == 2.0 * 0.5 ** (DEPTH - int(name[7])), name
        else:
            behind = name.startswith(("norm.", "head.", "attn_pool."))
            assert rate == (2.0 if behind else 2.0 * 0.5 ** (DEPTH + 1)), name


def test_layer_decay_of_one_changes_nothing():
    model = new_model()
    groups = parameter_groups(model, 0.1)
    assert decay_by_layer(groups, model, DEPTH, 1.0, 1.0) is groups


def test_layer_decay_leaves_out_what_is_frozen():
    model = new_model()
    select_trainable(model, "last-1", DEPTH)
    groups = decay_by_layer(parameter_groups(model, 0.1, "all"), model, DEPTH, 1.0, 0.5)
    assert [group["lr"] for group in groups] == [0.5, 1.0]
    assert rates_of(model, groups).keys() == trainable(model)


def test_a_hybrids_stem_is_of_the_first_layer():
    with torch.device("meta"):
        model = VisionTransformer(get_spec("R50-ViT-B_16"), (224, 224), 5)
    groups = decay_by_layer(parameter_groups(model, 0.1), model, 12, 1.0, 0.75)
    rates = rates_of(model, groups)
    assert len(groups) == 2 * (12 + 2)
    stem = {rate for name, rate in rates.items() if name.startswith(("stem.", "patch_embed.", "pos_embed"))}
    assert stem == {0.75**13}
    assert rates["blocks.11.norm1.weight"] == 0.75


def test_rates_are_timms_but_for_the_final_norm():
    timm = pytest.importorskip("timm")
    optim = pytest.importorskip("timm.optim")
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    made = optim.param_groups_layer_decay(theirs, weight_decay=0.1, layer_decay=0.7)
    names = {id(parameter): name for name, parameter in theirs.named_parameters()}
    expected = {
        names[id(parameter)].replace("embed.proj.", "embed."): group["lr_scale"]
        for group in made
        for parameter in group["params"]
    }
    expected |= {"norm.weight": 1.0, "norm.bias": 1.0}  # timm's: the last block's
    model = VisionTransformer(get_spec("ViT-Ti_16"), (224, 224), 5)
    assert rates_of(model, decay_by_layer(parameter_groups(model, 0.1), model, 12, 1.0, 0.7)) == pytest.approx(expected)
