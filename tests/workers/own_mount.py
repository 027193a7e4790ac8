"""Run a command with a small file system of its own at a directory; other processes see it through /proc/PID/root.

own_mount.py DIRECTORY OPTIONS SCRIPT [ARGUMENT ...]
OPTIONS are those of `mount -t tmpfs`; with "remount" what is there stays.
"""

import ctypes
import os
import runpy
import subprocess
import sys

CLONE_NEWNS = 0x00020000
directory, options, sys.argv = sys.argv[1], sys.argv[2], sys.argv[3:]
if "OWN_MOUNTS" not in os.environ:
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "no mount namespace")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    os.environ["OWN_MOUNTS"] = "1"
os.makedirs(directory, exist_ok=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", options, "vitds-test", directory], check=True)
if sys.argv:
    runpy.run_path(sys.argv[0], run_name="__main__")
