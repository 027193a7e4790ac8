"""Python runs this first wherever PYTHONPATH names its folder: two things that a test machine does not have.

- fp16 on a CPU: DeepSpeed refuses it for its speed; the loss scaler is the same code everywhere.
- CIFAR-10 itself: torchvision compares md5 sums, and VITDS_TEST_CIFAR names a JSON file with those of a tiny archive.
"""

import json
import os
import sys

_command = " ".join(sys.orig_argv)

if "launch/train.py" in _command and "deepspeed.launcher" not in _command:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True

if "shard_imagenet.py" in _command and "VITDS_TEST_CIFAR" in os.environ:
    from torchvision.datasets import CIFAR10

    with open(os.environ["VITDS_TEST_CIFAR"]) as _sums:
        for _name, _value in json.load(_sums).items():
            setattr(CIFAR10, _name, _value)
