"""A rank that reads a stream in step with the others: prints what each step's global batch was, once all agree.

python tests/workers/stream_labels.py PATTERN WORKERS STEPS
"""

import json
import sys

import torch

from vitds import collectives
from vitds.data.stream import StreamLoader, TarStream
from vitds.ds_config import Batch
from vitds.engine import start_ranks
from vitds.run_config import DataConfig
from vitds.stream_facts import shard_urls
from vitds.world import world_from_env

world = world_from_env()
device = start_ranks(world)
pattern, workers, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
stream = TarStream(shard_urls(pattern), samples_per_epoch=38, num_classes=8, shuffle_buffer=16)
batch = Batch(4 * world.world_size, 2, 2, world.world_size)
loader = StreamLoader(stream, DataConfig(), (8, 8), batch, world, 0, steps, workers, device, torch.float32)
taken = []
for micro_batch in loader:
    levels = (micro_batch.images.mean(dim=(1, 2, 3)) * 0.5 + 0.5) * 255 / 16  # as tests/tar_shards.py paints labels
    assert levels.round().int().tolist() == micro_batch.targets.tolist()
    taken.append(collectives.gather(micro_batch.ids.tolist()))  # a rank with a step too few would hang the others
if world.is_main:
    print(
        json.dumps({"micro_batches": len(taken), "keys": len({key for part in taken for ids in part for key in ids})})
    )
