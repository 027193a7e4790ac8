"""Linear layers in 8 bits: how far they are from fp32, what they refuse, and what the rest of the model notices."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vitds.errors import ConfigError
from vitds.model import fp8
from vitds.model.fp8 import check_fp8, deviation_of, fp8_linear
from vitds.model.registry import get_spec
from vitds.model.vit import VisionTransformer

CPU = torch.device("cpu")
DEPTH = 3


def build(mode="none", backend=None, in_8_bits=True):
    """9 samples of 17 tokens: rows are no multiple of 16."""
    torch.manual_seed(0)
    spec = get_spec(f"custom:width=32,depth={DEPTH},heads=4,mlp=64,patch=4")
    model = VisionTransformer(spec, (16, 16), 10, dropout=0.1)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.set_activation_checkpointing(mode)
    if in_8_bits:
        model.use_fp8()
    if backend is not None:
        torch.compiler.reset()
        model.compile_blocks(backend=backend)
    return model.bfloat16()


def loss_and_gradients(model):
    torch.manual_seed(1)
    loss = F.cross_entropy(model(torch.randn(9, 3, 16, 16).bfloat16()).float(), torch.arange(9))
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}


def unlike(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("num_rows", [1, 13, 16, 197])
def test_result_and_gradients_are_off_by_the_rounding_alone_at_any_number_of_rows(num_rows):
    assert 0.02 < deviation_of(fp8_linear, num_rows, 64, 48, CPU) < 0.08


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, weight, bias: fp8_linear(2 * x, weight, bias),
        lambda x, weight, bias: fp8_linear(x, weight, 0 * bias),
        lambda x, weight, bias: fp8_linear(x, weight.detach(), bias) + 0 * weight.sum(),
        lambda x, weight, bias: fp8_linear(x, weight, bias) + (0 * x.sum()).sqrt(),
    ],
    ids=["scale", "bias", "gradient", "gradient that is NaN"],
)
def test_another_result_or_gradient_is_seen(wrong):
    assert not deviation_of(wrong, 32, 64, 48, CPU) <= 2 * fp8._TOLERANCE


def test_the_size_of_the_numbers_changes_nothing():
    """Scales are powers of two: an input of another size gives the same bits of another size."""
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 64).bfloat16(), torch.zeros(48).bfloat16()

    def result_and_gradients(size):
        inputs = [(size * torch.ones(13, 64).cumsum(1).sin()).bfloat16(), weight.clone()]
        result = fp8_linear(*[tensor.requires_grad_() for tensor in inputs], bias)
        return [result.detach(), *torch.autograd.grad(result, inputs, result.detach())]

    expected = result_and_gradients(1.0)
    for size in (2.0**-40, 2.0**20):
        for found, one, power in zip(result_and_gradients(size), expected, (1, 1, 2), strict=True):
            assert torch.equal(found, one * size**power)


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so_and_zeros_stay_zeros(number):
    x, weight, bias = torch.zeros(13, 64).bfloat16(), torch.ones(48, 64).bfloat16(), torch.zeros(48).bfloat16()
    assert not fp8_linear(x, weight, bias).any()
    x[3, 5] = number
    assert not fp8_linear(x, weight, bias)[3].isfinite().any()
    spoilt = torch.zeros(13, 48).bfloat16()
    spoilt[3, 5] = number
    inputs = [torch.ones(13, 64).bfloat16().requires_grad_(), weight.requires_grad_()]
    of_x, of_weight = torch.autograd.grad(fp8_linear(*inputs, bias), inputs, spoilt)
    assert not of_x[3].isfinite().any() and not of_weight[5].isfinite().any()


def test_a_models_shapes_are_checked_and_what_is_off_is_refused(monkeypatch):
    spec, state = get_spec("ViT-Ti_16"), torch.get_rng_state()
    check_fp8(spec, (32, 32), CPU)
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(fp8, "_TOLERANCE", 0.01)
    with pytest.raises(ConfigError, match=r"in 8 bits are off by 0\.0\d+ of their norm; 10 rows") as error:
        check_fp8(spec, (32, 32), CPU)
    assert '"vitds.fp8"' in str(error.value)


def test_training_alone_is_in_8_bits_and_names_stay():
    model, other = build(), build(in_8_bits=False)
    assert model.state_dict().keys() == other.state_dict().keys()
    assert len(unlike(loss_and_gradients(model), loss_and_gradients(other))) > DEPTH
    images = torch.randn(2, 3, 16, 16).bfloat16()
    assert torch.equal(model.eval()(images), other.eval()(images))


def test_what_is_frozen_has_no_gradient():
    model = build()
    model.blocks[1].requires_grad_(False)
    expected, found = loss_and_gradients(build()), loss_and_gradients(model)
    assert unlike(expected, found | {name: expected[name] for name in found if name.startswith("blocks.1.")}) == []
    assert all(parameter.grad is None for parameter in model.blocks[1].parameters())


class CountProducts(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten._scaled_mm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "forwards"), [("none", 1), ("selective", 1), ("full", 2)])
def test_recomputation_changes_nothing_and_selective_keeps_the_products(mode, forwards):
    with CountProducts() as count:
        found = loss_and_gradients(build(mode))
    assert count.number == 4 * DEPTH * (forwards + 2)
    assert unlike(found, loss_and_gradients(build())) == []


def test_a_compiled_layer_gives_the_same_bits():
    """With torch's own kernels, from one graph."""
    torch.compiler.reset()
    compiled = torch.compile(fp8_linear, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.manual_seed(0)
    inputs = [torch.randn(shape).bfloat16().requires_grad_() for shape in ((13, 32), (64, 32), (64,))]
    result, expected = compiled(*inputs), fp8_linear(*inputs)
    assert torch.equal(result, expected)
    gradient = torch.randn_like(result)
    pairs = zip(
        torch.autograd.grad(result, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    )
    assert all(torch.equal(found, one) for found, one in pairs)


def test_compiled_blocks_are_as_exact_and_recompute_to_the_bit():
    """What stands between the layers is rounded otherwise there, in bfloat16 without 8 bits too."""

    def gradients_of(found):
        return torch.cat([gradient.float().flatten() for name, gradient in found.items() if name != "loss"])

    compiled = {mode: loss_and_gradients(build(mode, "aot_eager")) for mode in ("none", "selective")}
    assert unlike(compiled["selective"], compiled["none"]) == []
    exact = gradients_of(loss_and_gradients(build(in_8_bits=False)))
    deviations = [gradients_of(found) - exact for found in (compiled["none"], loss_and_gradients(build()))]
    assert 0 < deviations[0].norm() < 1.3 * deviations[1].norm() < 0.4 * exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["ViT-B_16", "ViT-H_14"])
def test_a_gpu_computes_at_the_models_shapes_or_is_refused(model):
    device = torch.device("cuda")
    if torch.cuda.get_device_capability() >= (8, 9):
        check_fp8(get_spec(model), (224, 224), device)
    else:
        with pytest.raises(ConfigError, match="do not run on this device"):
            check_fp8(get_spec(model), (224, 224), device)
