"""A rank that keeps a record of what its steps see: lines {step, index, ids} in RECORDS/RUN.WORLD_SIZE.RANK.jsonl.

With flags it is launch/train.py, without a warm rank that waits for commands. Only what the loader gives is written
down, on its way to the training loop; nothing of it is changed.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import vitds.feed
from vitds.data.loader import TrainLoader


class RecordingLoader(TrainLoader):
    def _micro_batches(self, batches):
        run = sys.argv[sys.argv.index("--name") + 1]
        path = Path(os.environ["RECORDS"]) / f"{run}.{self.world.world_size}.{self.world.rank}.jsonl"
        with open(path, "a", buffering=1) as record:
            for number, micro_batch in enumerate(super()._micro_batches(batches)):
                step = self.first_step + number // self.batch.accumulation_steps + 1
                line = {"step": step, "index": micro_batch.index, "ids": micro_batch.ids.tolist()}
                record.write(json.dumps(line) + "\n")
                yield micro_batch


vitds.feed.TrainLoader = RecordingLoader
runpy.run_path("launch/train.py" if sys.argv[1:] else "tests/workers/warm_ranks.py", run_name="__main__")
