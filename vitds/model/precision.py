"""The precisions that a model runs in, by the names that configuration, flags and manifests give them."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
