"""What trains, with which weight decay, under which optimizer."""

import pytest
import torch

from vitds.model.registry import get_spec
from vitds.model.vit import VisionTransformer
from vitds.optim import build_optimizer, parameter_groups, select_trainable

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
