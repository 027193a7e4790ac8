"""Loads a run's checkpoint into an engine and saves it again before any step: what the engine holds right after a load.

load_and_save.py OUT TRAIN_ARGUMENTS...   ->  OUT/global_stepN/ with its manifest
"""

import dataclasses
import sys
from pathlib import Path

import torch.distributed as dist

from vitds import train
from vitds.checkpoint import CheckpointStore
from vitds.engine import start_ranks
from vitds.manifest import Manifest, hash_file, write_manifest
from vitds.preflight import plan_run
from vitds.resume import Progress, choose_checkpoint

out, plan = Path(sys.argv[1]), plan_run(sys.argv[2:])
device = start_ranks(plan.world)
choice = choose_checkpoint(plan, CheckpointStore(plan.run_dir / "checkpoints", plan.world))
engine = train._build_engine(plan, device, None)
progress = Progress.restore(engine, choice)
if plan.world.is_main:
    out.mkdir()
dist.barrier()
engine.snapshot({"vitds": dataclasses.asdict(progress)}).write(out, choice.directory.name)
dist.barrier()
if plan.world.is_main:
    directory = out / choice.directory.name
    write_manifest(directory, Manifest({path.name: hash_file(path) for path in directory.glob("*.pt")}, {}))
dist.barrier()
