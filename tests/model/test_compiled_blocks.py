"""Blocks that are compiled compute what they did, share their code, and keep their names.

`aot_eager` traces and partitions as inductor does, and leaves the kernels to torch: what it computes is the same to the
bit. Inductor's own kernels sum in another order.
"""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from vitds.errors import ConfigError
from vitds.faults import faults_named
from vitds.model.registry import get_spec
from vitds.model.vit import VisionTransformer

MODES = ("none", "selective", "full")
BY_SUBSET = {"drop_path": 0.5, "drop_path_subset": True}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet():
    torch.compiler.reset()
    counters.clear()


def build(backend, mode="none", depth=3, name="custom:width=32,depth={},heads=4,mlp=64,patch=4", **options):
    torch.manual_seed(0)
    model = VisionTransformer(get_spec(name.format(depth)), (16, 16), 10, **options)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.set_activation_checkpointing(mode)
    if backend is not None:
        model.compile_blocks(backend=backend)
    return model


def losses_and_gradients(model, num_steps=2):
    losses = []
    for step in range(num_steps):
        torch.manual_seed(step)
        images = torch.randn(6, 3, 16, 16)
        loss = F.cross_entropy(model(images), torch.arange(6))
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses), {name: p.grad for name, p in model.named_parameters()}


def num_compiled():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("mode", MODES)
def test_losses_and_gradients_are_those_of_blocks_that_are_not_compiled(mode):
    """Other options, at every ZeRO stage, are in test_compiled_training.py."""
    expected, expected_gradients = losses_and_gradients(build(None, mode, **BY_SUBSET))
    losses, gradients = losses_and_gradients(build("aot_eager", mode, **BY_SUBSET))
    assert num_compiled() > 0
    assert torch.equal(losses, expected)
    assert not [name for name, gradient in gradients.items() if not torch.equal(gradient, expected_gradients[name])]


@pytest.mark.parametrize(
    ("mode", "options", "expected"),
    [("selective", {}, 1), ("none", {"drop_path": 0.5}, 2), ("none", BY_SUBSET, 3)],
    ids=["alike", "rates", "subset"],
)
def test_all_blocks_share_code_that_the_first_step_compiles(mode, options, expected):
    """The first block drops nothing; by subset, blocks of a low rate draw masks, and the others some samples."""
    counts = []
    for depth in (6, 12):
        torch.compiler.reset()
        model = build("aot_eager", mode, depth, **options)
        for num_steps in (1, 2):
            counters.clear()
            losses_and_gradients(model, num_steps)
            counts.append(num_compiled())
    assert counts == [expected, 0, expected, 0]


def test_frozen_blocks_have_code_of_their_own_and_no_more():
    model = build("aot_eager", depth=12)
    model.requires_grad_(False)
    for block in model.blocks[6:]:
        block.requires_grad_()
    losses_and_gradients(model)
    assert num_compiled() == 3  # frozen, the first that is not, and the rest, whose input has a gradient too


def test_names_and_state_stay():
    plain, compiled = build(None), build("aot_eager")
    losses_and_gradients(compiled)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in compiled.named_modules()] == [name for name, _ in plain.named_modules()]


def test_evaluation_is_not_compiled():
    plain, compiled, images = build(None).eval(), build("aot_eager").eval(), torch.randn(5, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(compiled(images), plain(images))
    assert num_compiled() == 0


def test_selective_recomputation_is_compiled_too_and_keeps_what_it_says():
    units = {}  # of the blocks' inputs, 6 samples of 17 tokens of 32 numbers
    for mode in MODES:
        torch.compiler.reset()
        model, x = build("aot_eager", mode), torch.randn(6, 17, 32, requires_grad=True)
        parameters = {p.data_ptr() for p in model.parameters()}
        kept = {}

        def keep(tensor, parameters=parameters, kept=kept):
            if tensor.data_ptr() not in parameters:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = model.encode(x)  # holds what is kept
        units[mode] = sum(kept.values()) / (6 * 17 * 32 * 4)
        del y
    assert units["full"] < units["selective"] < units["none"]
    # Of each of the three blocks both norms (a unit each) and the GELU (two) are computed again.
    assert units["none"] - units["selective"] == pytest.approx(3 * 4, abs=1)


@needs_compiler
def test_inductor_computes_the_same_and_draws_dropout_from_torchs_generator():
    options = {"dropout": 0.1, "drop_path": 0.3}
    expected, expected_gradients = losses_and_gradients(build(None, **options))
    runs = [losses_and_gradients(build("inductor", **options)) for _ in range(2)]
    assert num_compiled() > 0
    for losses, gradients in runs:
        torch.testing.assert_close(losses, expected, atol=0, rtol=1e-5)
        for name, gradient in gradients.items():
            scale = expected_gradients[name].abs().max().item()
            torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-5 * scale, rtol=0, msg=name)
            assert torch.equal(gradient, runs[0][1][name]), name  # and two compiled ones to the bit


@needs_compiler
def test_inductor_takes_any_number_of_samples_in_16_bits():
    """Three of six; in 16 bits inductor decides more by numbers that it does not know."""
    plain, compiled = (build(backend, **BY_SUBSET).bfloat16() for backend in (None, "inductor"))
    outputs = []
    for model in (plain, compiled):
        torch.manual_seed(0)
        outputs.append(model(torch.randn(6, 3, 16, 16, dtype=torch.bfloat16)))
        outputs[-1].sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0], atol=0.03 * outputs[0].abs().max().item(), rtol=0)
    assert all(torch.isfinite(parameter.grad).all() for parameter in compiled.parameters())


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("options", [{}, {"dropout": 0.1, "drop_path": 0.3}, BY_SUBSET], ids=["", "dropout", "subset"])
@pytest.mark.parametrize("mode", [*MODES, 2])
def test_inductor_agrees_in_every_mode(mode, options):
    expected, expected_gradients = losses_and_gradients(build(None, mode, **options))
    losses, gradients = losses_and_gradients(build("inductor", mode, **options))
    torch.testing.assert_close(losses, expected, atol=0, rtol=1e-5)
    for name, gradient in gradients.items():
        scale = expected_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-5 * scale, rtol=0, msg=name)


def test_without_a_compiler_the_message_is_ours():
    model = build("inductor")
    missing = {"cpp.cxx": (None, "/nowhere/g++"), "fx_graph_cache": False}
    with torch._inductor.config.patch(missing), pytest.raises(ConfigError) as error, faults_named(rank=0):
        losses_and_gradients(model)
    assert "torch.compile failed: InvalidCxxCompiler: No working C++ compiler" in str(error.value)
    assert "--compile false" in error.value.fix and len(str(error.value).splitlines()) <= 3
