"""Pass signals on, leave no process behind, restart: python launch/supervise.py [--restarts N] deepspeed ..."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from vitds.supervise import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
