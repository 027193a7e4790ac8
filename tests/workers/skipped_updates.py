"""Steps of which one has a gradient that is not finite, under optimizers that DeepSpeed builds; a process a rank.

skipped_updates.py {"NAME": {"stage": 0..3, "zero": {...}, "config": {...}}, ...}

Rank 0's gradients are not finite from the first block down, in the first micro-batch of step `BAD`; those above are.
Each rank prints {"NAME": [{"applied": BOOL, "changed": [...], "lr": LR}, ...]}, an entry a step: which states of this
rank it changed, of "weights", "masters" and "moments". Stage 3 patches torch in its process, so its cases come last.
"""

import copy
import json
import sys

import torch
from torch import Tensor

from vitds.engine import Engine, start_ranks
from vitds.loss import cross_entropy
from vitds.model.registry import get_spec
from vitds.model.vit import VisionTransformer
from vitds.optim import parameter_groups
from vitds.world import world_from_env

NUM_STEPS, BAD, ACCUMULATION = 3, 2, 2


def states(engine: Engine) -> dict[str, list[Tensor | float]]:
    """What an update changes, as this rank has it."""
    masters = [master.detach() for master, _ in engine._masters()]
    moments = [value for state in engine._inner_optimizer.state.values() for _, value in sorted(state.items())]
    weights = [getattr(p, "ds_tensor", p).detach() for p in engine.module.parameters()]
    return copy.deepcopy({"weights": weights, "masters": masters, "moments": moments})


def is_same(one: list[Tensor | float], other: list[Tensor | float]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, map(torch.as_tensor, one), map(torch.as_tensor, other)))


def spoil(_, __, output: Tensor) -> Tensor:
    if is_bad and output.requires_grad:
        output.register_hook(lambda gradient: gradient * float("nan"))
    return output


world = world_from_env()
device = start_ranks(world)
is_bad = False
told = {}
for name, case in json.loads(sys.argv[1]).items():
    torch.manual_seed(0)
    model = VisionTransformer(get_spec("custom:width=32,depth=2,heads=4,mlp=64,patch=4"), (8, 8), 10)
    model.blocks[0].register_forward_hook(spoil)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **case["config"],
        "zero_optimization": {"stage": case["stage"], "reduce_scatter": False} | case["zero"],
    }
    engine = Engine(model, None, parameter_groups(model, 0.1), lambda step: 1 / (step + 1), config, device)
    assert engine._gate is None, "the host decides about these"
    images, labels = torch.randn(4, 3, 8, 8, dtype=engine.dtype), torch.tensor([1, 2, 3, 4])
    steps, before = [], states(engine)
    for step in range(1, NUM_STEPS + 1):
        lr = engine.lr
        for index in range(ACCUMULATION):
            is_bad = world.is_main and (step, index) == (BAD, 0)
            engine.backward(cross_entropy(engine(images), labels))
            engine.step()
        (applied,) = engine.outcomes()
        after = states(engine)
        changed = [kind for kind in after if not is_same(after[kind], before[kind])]
        steps.append({"applied": applied, "changed": changed, "lr": lr})
        before = after
    told[name] = steps
print(json.dumps(told))
