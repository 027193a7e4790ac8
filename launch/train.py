"""Train a Vision Transformer: deepspeed launch/train.py --deepspeed_config ds_configs/NAME.json --data DIR [flags]."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from vitds.stop_signals import listener

if __name__ == "__main__":
    listener().start()  # first of all: the launcher may end, and a signal come, during the imports

from vitds.errors import exit_with
from vitds.flags import help_text
from vitds.preflight import plan_run
from vitds.verdict import verdict


def main() -> int:
    """Check everything that can be checked without torch, then train."""
    if {"-h", "--help"} & set(sys.argv):
        print(help_text())
        return 0
    plan = plan_run(sys.argv[1:])
    from vitds.train import train  # torch and deepspeed are imported here, when the plan stands

    return train(plan)


if __name__ == "__main__":
    exit_with(main, verdict.record)
