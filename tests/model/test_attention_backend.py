"""A back end for attention is taken only when it computes attention here."""

import typing

import pytest
import torch
import torch.nn.functional as F

from vitds.errors import ConfigError
from vitds.model.attention_backend import BACK_ENDS, choose_attention, deviation_of
from vitds.model.registry import get_spec
from vitds.run_config import entries

MODEL = get_spec("custom:width=48,depth=1,heads=3,mlp=48,patch=4"), (28, 28)
SHAPE = 2, 3, 50, 16
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def any_back_end_afterwards():
    yield
    choose_attention("auto", *MODEL, torch.float32, CPU)


def chosen_by_torch():
    """0 is the formula, 1 flash attention, as torch numbers them."""
    return torch._fused_sdp_choice(*torch.randn(3, *SHAPE))


def test_the_configuration_names_all_of_them():
    assert typing.get_args(entries()["attention"][0]) == BACK_ENDS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "number"), [("math", 0), ("flash", 1)])
def test_the_chosen_one_computes(name, number, dtype):
    before = torch.get_rng_state()
    choose_attention(name, *MODEL, dtype, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert chosen_by_torch() == number


@pytest.mark.parametrize("name", ["cudnn", "efficient"])
def test_one_that_does_not_run_here_is_refused_and_leaves_no_trace(name):
    with pytest.raises(ConfigError, match=f"{name} attention does not run") as error:
        choose_attention(name, *MODEL, torch.float32, CPU)
    assert "(2, 3, 50, 16), float32" in str(error.value)
    assert chosen_by_torch() == 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.2),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v.detach()) + 0 * v,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v) + (0 * v).sqrt(),
    ],
    ids=["scale", "mask", "gradient", "gradient that is NaN"],
)
def test_another_result_or_gradient_is_seen(wrong):
    assert deviation_of(F.scaled_dot_product_attention, SHAPE, torch.bfloat16, CPU) < 2e-2
    assert not deviation_of(wrong, SHAPE, torch.bfloat16, CPU) <= 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", BACK_ENDS)
@pytest.mark.parametrize("model", ["ViT-B_16", "ViT-H_14"])
def test_every_back_end_of_a_gpu_computes_at_the_models_shapes(name, model, dtype):
    choose_attention(name, get_spec(model), (224, 224), dtype, torch.device("cuda"))
