"""launch/environment.sh, in virtual environments of its own whose pip only writes down what it is asked for."""

import json
import os
import socket
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from rank_processes import ROOT

PIP = """import os, sys
from pathlib import Path
(Path(sys.prefix) / "asked").write_text(" ".join(sys.argv[1:]))
"""


@pytest.fixture
def environment(tmp_path) -> Path:
    """One that sees the packages of this one, but for vitds and pip."""
    venv.create(tmp_path / "env", symlinks=True)
    site = Path(f"{tmp_path}/env/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages")
    (site / "pip").mkdir()
    (site / "pip/__init__.py").touch()  # else the other packages' pip would win
    (site / "pip/__main__.py").write_text(PIP)
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return site


def installed_from(site: Path, directory: Path) -> None:
    info = site / "vitds-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vitds\nVersion: 0.1.0\n")
    (info / "direct_url.json").write_text(json.dumps({"url": directory.as_uri(), "dir_info": {"editable": True}}))


def source(site: Path, then: str = ":") -> tuple[str, str]:
    """What sourcing the file prints, and what follows, and what its pip was asked for."""
    root = site.parents[2]
    inherited = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    output = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'. launch/environment.sh ""; {then}; echo "in $VIRTUAL_ENV"'],
        cwd=ROOT,
        env=inherited | {"VIRTUAL_ENV": str(root), "PATH": f"{root}/bin:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.endswith(f"in {root}\n")
    asked = root / "asked"
    return output.removesuffix(f"in {root}\n"), asked.read_text() if asked.exists() else ""


def test_what_is_installed_from_here_is_left_alone(environment):
    installed_from(environment, ROOT)
    assert source(environment) == ("", "")


def test_an_environment_that_has_vitds_from_another_checkout_says_which_and_is_given_this_one(environment, tmp_path):
    other = tmp_path / "the other"
    installed_from(environment, other)
    said, asked = source(environment)
    assert said == f"installing vitds in {tmp_path}/env, which had it from {other}\n"
    assert asked.endswith(f"-e {ROOT}")


def test_a_port_is_free_and_none_that_the_kernel_hands_out(environment):
    installed_from(environment, ROOT)  # nothing is to be installed in the environment that runs this
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    one, other = map(int, source(environment, "vitds_free_port; vitds_free_port")[0].split())
    assert one != other
    if first > 11_000:  # else the kernel hands out nearly all there are
        assert not (first <= one <= last or first <= other <= last)
    with socket.socket() as listener:
        listener.bind(("", one))
