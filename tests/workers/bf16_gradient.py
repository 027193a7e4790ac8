"""The gradient that one bf16 step applies, for 1 micro-batch of 16 and for 16 of 1: prints the relative differences.

bf16_gradient.py [[STAGE, GRAD_ACCUM_DTYPE], ...]  ->  {"STAGE GRAD_ACCUM_DTYPE": difference, ...}
"""

import json
import sys

import torch
from deepspeed.utils import safe_get_full_fp32_param
from sklearn.datasets import load_digits

from vitds.engine import Engine, start_ranks
from vitds.loss import cross_entropy
from vitds.model.registry import get_spec
from vitds.model.vit import VisionTransformer
from vitds.optim import build_optimizer, parameter_groups
from vitds.world import world_from_env

device = start_ranks(world_from_env())
digits = load_digits()
images_BCHW = torch.tensor(digits.images[:16], dtype=torch.bfloat16).sub(8).div(8)[:, None].expand(-1, 3, -1, -1)
labels = torch.tensor(digits.target[:16])


def masters(engine):
    return torch.cat([safe_get_full_fp32_param(p).flatten().clone() for p in engine.module.parameters()])


def gradient(stage, accumulation_dtype, accumulation):
    torch.manual_seed(0)
    model = VisionTransformer(get_spec("custom:width=64,depth=4,heads=4,mlp=128,patch=2"), (8, 8), 10)
    torch.nn.init.normal_(model.head.weight, std=0.02)
    groups = parameter_groups(model, 0.0)
    config = {
        "train_batch_size": 16,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": accumulation_dtype},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    engine = Engine(model, build_optimizer("SGD", {"lr": 1.0}, groups), groups, None, config, device)
    before = masters(engine)
    for images, targets in zip(images_BCHW.chunk(accumulation), labels.chunk(accumulation), strict=True):
        engine.backward(cross_entropy(engine(images), targets))
        engine.step()
    return before - masters(engine)


differences = {}
for stage, dtype in json.loads(sys.argv[1]):
    whole, pieces = gradient(stage, dtype, 1), gradient(stage, dtype, 16)
    differences[f"{stage} {dtype}"] = float((whole - pieces).norm() / whole.norm())
print(json.dumps(differences))
