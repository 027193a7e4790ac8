"""Run a command of launch/ with numbers that go wrong on purpose: poisoned.py '{"how": ...}' SCRIPT [ARGUMENT ...]

{"how": "output" | "gradient" | "parameter", "module": NAME, "at": [[STEP, MICRO_BATCH_OF_THE_GLOBAL_BATCH], ...]} makes
what a module gives, or its gradient, infinite there; "parameter" spoils the first parameter of the module for good.
{"how": "output", "module": NAME, "sums": [...]} does so wherever the pixels of a micro-batch have such a sum.
"also" holds a second of these; "blind": true leaves out the search for what was first not finite.
"""

import json
import runpy
import sys
from unittest import mock

import torch

import vitds.divergence
import vitds.train
from vitds.data.counter import Stream, random_bits

order = json.loads(sys.argv[1])
is_blind = order.pop("blind", False)
orders = [order, also] if (also := order.pop("also", None)) else [order]
sys.argv = sys.argv[2:]
SEED = 42  # of the run; the dropout seed says which step and micro-batch a forward is for
create_model = vitds.train.create_model


def poison(model, how, module, at=(), sums=()):
    module = model.get_submodule(module)
    seeds = {int(random_bits(Stream.DROPOUT, SEED, step - 1, index)) for step, index in at}
    is_due = False

    def look(_, inputs):
        nonlocal is_due
        pixels = float(inputs[0].detach().double().sum())
        is_due = torch.initial_seed() in seeds or any(abs(pixels - one) < 1e-3 for one in sums)

    def spoil_parameter(_, __):
        if is_due:
            next(module.parameters()).data.fill_(float("nan"))

    def spoil(_, __, output):
        if is_due and how == "output":
            return output * float("inf")
        if is_due and how == "gradient" and output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))
        return output

    model.register_forward_pre_hook(look)
    if how == "parameter":
        module.register_forward_pre_hook(spoil_parameter)
    module.register_forward_hook(spoil)


def poisoned_model(*args, **options):
    model = create_model(*args, **options)
    for one in orders:
        poison(model, **one)
    return model


search = (lambda *_: None) if is_blind else vitds.divergence.first_non_finite
with (
    mock.patch.object(vitds.train, "create_model", poisoned_model),
    mock.patch.object(vitds.divergence, "first_non_finite", search),
):
    runpy.run_path(sys.argv[0], run_name="__main__")
