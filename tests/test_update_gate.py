"""Updates that the device decides: one that is shut changes nothing, and clipping is torch's."""

import copy

import pytest
import torch

from vitds.ema import WeightAverage
from vitds.update_gate import UpdateGate

KINDS = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    "Adam": (torch.optim.Adam, {"lr": 0.1, "amsgrad": True}),
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD with momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
}
MAX_NORM = 0.5
NOT_FINITE = [float("nan"), float("inf"), -1.0]  # the last is how DeepSpeed marks the others


class Training:
    """A few vectors with a textbook's gradients, gated or not."""

    def __init__(self, kind, is_gated):
        torch.manual_seed(0)
        self.vectors = [torch.nn.Parameter(torch.randn(size)) for size in (7, 1, 300)]
        cls, options = KINDS[kind]
        self.optimizer = cls(self.vectors, fused=True, **options)
        self.gate = UpdateGate(self.optimizer, MAX_NORM) if is_gated else None
        WeightAverage(self.optimizer, 0.5)

    def step(self, seed, norm=None):
        generator = torch.Generator().manual_seed(seed)
        for vector in self.vectors:
            vector.grad = torch.randn(vector.shape, generator=generator)
        if self.gate is None:
            torch.nn.utils.clip_grad_norm_(self.vectors, MAX_NORM)
        else:
            true_norm = torch.nn.utils.get_total_norm([vector.grad for vector in self.vectors])
            if norm is not None:
                self.vectors[1].grad.fill_(float("nan"))
            assert self.gate.judge(true_norm if norm is None else torch.tensor(norm)) is False
        self.optimizer.step()

    def state(self):
        kept = [vector.detach() for vector in self.vectors]
        for vector in self.vectors:
            kept += [value for _, value in sorted(self.optimizer.state[vector].items()) if value is not None]
        return copy.deepcopy(kept)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_let_through_is_clipped_as_torch_does_it(kind):
    gated, plain = Training(kind, True), Training(kind, False)
    for step in range(5):
        gated.step(step)
        plain.step(step)
    for one, other in zip(gated.state(), plain.state(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert gated.gate.outcomes() == [True] * 5


@pytest.mark.parametrize("norm", NOT_FINITE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_shut_update_leaves_weights_moments_counts_and_average_as_they_are(kind, norm):
    training = Training(kind, True)
    training.step(0)
    training.step(1)
    before = training.state()
    training.step(2, norm)
    assert all(map(torch.equal, training.state(), before))
    training.step(3)
    assert not any(map(torch.equal, training.state()[:3], before[:3]))
    assert training.gate.outcomes() == [True, True, False, True]
    assert training.gate.outcomes() == [], "each is told once"


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_update_may_be_shut(kind):
    """torch allocates moments in the first step, and in a shut one would leave SGD's as the memory was."""
    shut_first, never_shut = Training(kind, True), Training(kind, True)
    shut_first.step(9, norm=float("nan"))
    for step in range(3):
        shut_first.step(step)
        never_shut.step(step)
    assert all(map(torch.equal, shut_first.state(), never_shut.state()))
    assert shut_first.gate.outcomes() == [False, True, True, True]


@pytest.mark.parametrize(
    ("options", "expected"), [({"fused": True}, True), ({}, False), ({"fused": True, "dampening": 0.1}, False)]
)
def test_it_stands_only_before_optimizers_that_can_be_told(options, expected):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9, **options)
    assert UpdateGate.stands_before(optimizer) is expected
