"""Hybrids train: every ZeRO stage, precision and mode of activation checkpointing, against a textbook in float64."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from rank_processes import last_json, run_ranks
from run_directory import assert_same_weights, config_file, metrics, train_command, weights
from warm_ranks import WarmRanks

from vitds.model.registry import get_spec
from vitds.model.resnet_stem import StdConv
from vitds.model.vit import VisionTransformer

MODELS = {
    "hybrid": "custom:width=32,depth=2,heads=4,mlp=64,patch=1,resnet=1x2,resnet_width=32",
    "root alone": "custom:width=32,depth=2,heads=4,mlp=64,patch=2,resnet=0,resnet_width=32",
}
STAGES = (0, 1, 2, 3)  # in this order: stage 3 patches torch in its process
PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 128}},
}
CASES = [(stage, precision) for stage in STAGES for precision in PRECISIONS if stage or precision == "fp32"]
# How far a parameter's gradient is from the textbook's, and a loss from the plain loop's, relative to their size.
# Measured: 2e-6 and 2e-7 in fp32, 0.25 and 1e-3 in bf16, 0.06 and 2e-4 in fp16.
GRADIENT_ERROR = {"fp32": 1e-5, "bf16": 0.4, "fp16": 0.1}
LOSS_ERROR = {"fp32": 1e-5, "bf16": 3e-3, "fp16": 1e-3}


def recomputing(stage, precision):
    """Modes of activation checkpointing beside none; stage 3, where weights come and go, has them all."""
    if precision == "fp16":
        return ()
    return ("full", "selective", 2) if stage == 3 else ("full",)


def runs_of(cases):
    runs = {f"plain {name}": {"stage": "plain", "model": model, "steps": 6} for name, model in MODELS.items()}
    for stage, precision in cases:
        for name, model in MODELS.items():
            run = {"stage": stage, "model": model, "config": PRECISIONS[precision]}
            runs[f"{stage} {precision} {name}"] = run | {"steps": 6}
            for mode in recomputing(stage, precision):
                runs[f"{stage} {precision} {name} {mode}"] = run | {"steps": 2, "activation_checkpointing": mode}
    return {name: run | {"image_size": 16} for name, run in runs.items()}


def trained(directory, world_size, cases):
    """Losses and first gradients of every run."""
    out = directory / "gradients.pt"
    command = ["tests/workers/fp16_on_cpu.py", "tests/workers/engine_losses.py", json.dumps(runs_of(cases)), str(out)]
    return last_json(run_ranks(command, world_size)[0]), torch.load(out)


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("hybrid"), 2, CASES)


# The textbook: numbers in float64, formulas written out, no code of the model.


def same(x, kernel, stride, value=0.0):
    """XLA's SAME: ceil(size / stride) come out, the odd pixel is added at the end."""
    for axis in (3, 2):
        size = x.shape[axis]
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        sides = [0, 0] * (3 - axis) + [total // 2, total - total // 2]
        x = F.pad(x, sides, value=value)
    return x


def convolve(x, kernel, stride=1):
    """A standardised kernel, as a sum over its window."""
    mean = kernel.mean(dim=(1, 2, 3), keepdim=True)
    deviation = ((kernel - mean) ** 2).mean(dim=(1, 2, 3), keepdim=True).sqrt()
    kernel = (kernel - mean) / (deviation + 1e-5)
    side = kernel.shape[-1]
    windows = same(x, side, stride).unfold(2, side, stride).unfold(3, side, stride)
    return torch.einsum("bchwij,ocij->bohw", windows, kernel)


def group_norm(x, gain, bias):
    groups = x.unflatten(1, (32, -1))
    mean = groups.mean(dim=(2, 3, 4), keepdim=True)
    variance = ((groups - mean) ** 2).mean(dim=(2, 3, 4), keepdim=True)
    normal = ((groups - mean) / (variance + 1e-6).sqrt()).flatten(1, 2)
    return normal * gain[:, None, None] + bias[:, None, None]


def textbook_stem(p, images):
    def normed(x, conv, norm, stride=1):
        x = convolve(x, p[f"stem.{conv}.weight"], stride)
        return group_norm(x, p[f"stem.{norm}.weight"], p[f"stem.{norm}.bias"])

    x = normed(images, "conv_root", "gn_root", 2).clamp(min=0)
    x = same(x, 3, 2, -math.inf).unfold(2, 3, 2).unfold(3, 3, 2).amax(dim=(4, 5))
    for unit in sorted({name.rsplit(".", 2)[0].removeprefix("stem.") for name in p if name.startswith("stem.block")}):
        stride = 2 if unit.endswith("unit1") and not unit.startswith("block1") else 1
        residual = x
        if f"stem.{unit}.conv_proj.weight" in p:
            residual = normed(x, f"{unit}.conv_proj", f"{unit}.gn_proj", stride)
        x = normed(x, f"{unit}.conv1", f"{unit}.gn1").clamp(min=0)
        x = normed(x, f"{unit}.conv2", f"{unit}.gn2", stride).clamp(min=0)
        x = (residual + normed(x, f"{unit}.conv3", f"{unit}.gn3")).clamp(min=0)
    return x


def textbook_logits(p, images, heads=4):
    def norm(x, name):
        centred = x - x.mean(dim=-1, keepdim=True)
        return (
            centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * p[f"{name}.weight"]
            + p[f"{name}.bias"]
        )

    def dense(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    x = textbook_stem(p, images)
    kernel = p["patch_embed.weight"]
    side = kernel.shape[-1]
    x = torch.einsum("bchwij,ocij->bhwo", x.unfold(2, side, side).unfold(3, side, side), kernel).flatten(1, 2)
    x = torch.cat([p["cls_token"].expand(len(x), -1, -1), x + p["patch_embed.bias"]], dim=1) + p["pos_embed"]
    depth = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("blocks."))
    for block in (f"blocks.{index}" for index in range(depth)):
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in dense(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, dim=-1)
        )
        attention = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        x = x + dense((attention @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        h = dense(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + dense(h, f"{block}.mlp.fc2")
    return dense(norm(x, "norm")[:, 0], "head")


@pytest.fixture(scope="module")
def textbook():
    """The gradients of the worker's first global batch."""
    sklearn = pytest.importorskip("sklearn.datasets")
    digits = sklearn.load_digits()
    images = torch.tensor(digits.images[:16]).sub(8).div(8)[:, None].expand(-1, 3, -1, -1)
    images = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    found = {}
    for name, model_name in MODELS.items():
        p = {key: value.double().requires_grad_() for key, value in worker_model(model_name).state_dict().items()}
        logits = textbook_logits(p, images)
        logits.logsumexp(dim=1).sub(logits[range(16), digits.target[:16]]).mean().backward()
        found[name] = {key: value.grad for key, value in p.items()}
    return found


def worker_model(name):
    """As tests/workers/engine_losses.py builds it."""
    torch.manual_seed(0)
    model = VisionTransformer(get_spec(name), (16, 16), 10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def check_gradients(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error <= tolerance, f"{name}: {error:.1e}"


def check_losses(found, expected, tolerance):
    assert found[-1] < found[0]
    assert found == pytest.approx(expected, rel=tolerance)


def recomputed_pairs(case):
    """Names of runs that differ in nothing but activation checkpointing: without it, and with it."""
    for name in MODELS:
        run = " ".join(map(str, [*case, name]))
        yield from ((run, f"{run} {mode}") for mode in recomputing(*case))


@pytest.mark.ranks
@pytest.mark.parametrize("name", MODELS)
def test_the_gradients_of_a_plain_loop_are_the_textbooks(name, on_two_ranks, textbook):
    check_gradients(on_two_ranks[1][f"plain {name}"], textbook[name], 1e-5)


@pytest.mark.ranks
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_every_stage_and_precision_trains(stage, precision, name, on_two_ranks, textbook):
    losses, gradients = on_two_ranks
    check_gradients(gradients[f"{stage} {precision} {name}"], textbook[name], GRADIENT_ERROR[precision])
    check_losses(losses[f"{stage} {precision} {name}"], losses[f"plain {name}"], LOSS_ERROR[precision])


@pytest.mark.ranks
@pytest.mark.parametrize("case", [case for case in CASES if recomputing(*case)])
def test_activation_checkpointing_changes_no_bit(case, on_two_ranks):
    losses, gradients = on_two_ranks
    for run, recomputed in recomputed_pairs(case):
        assert losses[recomputed] == losses[run][:2], recomputed
        assert_same_weights(gradients[recomputed], gradients[run])


@pytest.mark.gpu
@pytest.mark.ranks
def test_every_stage_and_precision_trains_on_a_gpu(tmp_path, textbook):
    losses, gradients = trained(tmp_path, 1, CASES)
    for case in CASES:
        for name in MODELS:
            run = " ".join(map(str, [*case, name]))
            tolerance = max(GRADIENT_ERROR[case[1]], 1e-3)  # cuDNN's convolutions take shortcuts in float32
            check_gradients(gradients[run], textbook[name], tolerance)
            check_losses(losses[run], losses[f"plain {name}"], max(LOSS_ERROR[case[1]], 1e-4))
        for run, recomputed in recomputed_pairs(case):
            # The gradients of convolutions may be summed in any order there.
            assert losses[recomputed] == pytest.approx(losses[run][:2], rel=1e-3), recomputed


@pytest.mark.ranks
def test_a_resumed_run_ends_with_the_same_bits(digits, tmp_path):
    ours = {"model": MODELS["hybrid"], "num_steps": 6, "save_every": 6, "activation_checkpointing": "full"}
    config = config_file(tmp_path, 3, bf16={"enabled": True}, vitds=ours)
    unbroken, stopped = (train_command(config, digits, tmp_path, name) for name in ("unbroken", "stopped"))
    with WarmRanks(2) as ranks:
        ranks.run(unbroken)
        ranks.run([*stopped, "--stop-at-step", "3"], exit_code=75)
        assert "resumed at step 3 of 6" in ranks.run(stopped).output
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "unbroken")
    assert_same_weights(weights(tmp_path / "stopped", 6), weights(tmp_path / "unbroken", 6))


def test_of_the_stem_full_keeps_the_inputs_of_its_blocks_alone():
    model = VisionTransformer(get_spec(MODELS["hybrid"]), (32, 32), 10)
    parameters = {parameter.data_ptr() for parameter in model.parameters()}

    def kept_bytes(mode):
        model.set_activation_checkpointing(mode)
        kept = {}

        def keep(tensor):
            if tensor.data_ptr() not in parameters:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            tokens = model.tokens(torch.zeros(4, 3, 32, 32))
        assert tokens.requires_grad
        return sum(storage.nbytes() for storage in kept.values())

    # The images, the root's map, and what the three units give, the last being the input of the patch projection.
    inputs = 3 * 32**2 + 32 * 8**2 + 128 * 8**2 + 2 * 256 * 4**2
    assert kept_bytes("full") == 4 * 4 * inputs
    assert kept_bytes("none") > 4 * kept_bytes("full")


def test_a_constant_kernel_has_a_finite_gradient():
    """Its deviation is 0, where the derivative of a square root is not."""
    conv = StdConv(2, 3, 3)
    torch.nn.init.constant_(conv.weight[0].detach(), 0.5)
    assert torch.equal(conv(torch.ones(1, 2, 4, 4))[:, 0], torch.zeros(1, 4, 4))
    conv(torch.randn(1, 2, 4, 4)).square().sum().backward()
    assert conv.weight.grad.isfinite().all()
    assert conv.weight.grad[1:].abs().sum() > 0
