"""Results of the full counts: a JSON line each in the file that VITDS_FAULT_COUNTS names; tests/faults/full.sh sets it.

`python tests/faults/counts.py FILE` prints them as rows for the table in RELIABILITY.md.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version


def record(
    fault: str,
    how: str,
    survived: int,
    of: int,
    detail: str = "",
    within_s: float | None = None,
    deviation: float | None = None,
) -> None:
    """Add one result; without VITDS_FAULT_COUNTS (the short pass) nothing is kept. Call it before the assertion.

    `within_s` is how long it took, `deviation` how far the losses were from the expected ones, relative to them; of
    several results the largest is shown.
    """
    path = os.environ.get("VITDS_FAULT_COUNTS")
    if path is None:
        return
    line = {"fault": fault, "how": how, "survived": survived, "of": of, "detail": detail}
    line |= {"within_s": within_s, "deviation": deviation}
    line |= {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
    line |= {name: version(name) for name in ("torch", "deepspeed")}
    with open(path, "a") as counts:
        counts.write(json.dumps(line) + "\n")


@dataclass
class Result:
    """What `counted` adds beside whether the test passed; `in_time` False is a promise not kept."""

    in_time: bool = True
    within_s: float | None = None


@contextmanager
def counted(fault: str, how: str) -> Iterator[Result]:
    """Add one result: whether what is inside passed, and in time; also a test's decorator."""
    result, passed = Result(), False
    try:
        yield result
        passed = True
    finally:
        record(fault, how, int(passed and result.in_time), 1, within_s=result.within_s)


def rows(lines: list[dict]) -> list[str]:
    """Markdown rows: fault, how injected, result; results of one fault and injection are added up."""
    results: dict[tuple[str, str], list[dict]] = {}
    for line in lines:
        results.setdefault((line["fault"], line["how"]), []).append(line)
    found = []
    for (fault, how), of_row in results.items():
        details = list(dict.fromkeys(line["detail"] for line in of_row if line["detail"]))
        times = [line["within_s"] for line in of_row if line.get("within_s") is not None]
        details += [f"within {max(times):.1f} s"] if times else []
        deviations = [line["deviation"] for line in of_row if line.get("deviation") is not None]
        details += [f"losses within {max(deviations):.1e}"] if deviations else []
        survived, of = (sum(line[key] for line in of_row) for key in ("survived", "of"))
        found.append(f"| {fault} | {how} | **{survived:,} of {of:,}**{''.join(f'; {one}' for one in details)} |")
    return found


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        results = [json.loads(line) for line in file]
    versions = {tuple(line[key] for key in ("date", "python", "torch", "deepspeed")) for line in results}
    for date, python, torch, deepspeed in sorted(versions):
        print(f"{date}: Python {python}, torch {torch}, DeepSpeed {deepspeed}")
    print(*rows(results), sep="\n")
