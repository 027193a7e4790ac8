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
from importlib.metadata import version


def record(fault: str, how: str, survived: int, of: int, detail: str = "") -> None:
    """Add one result; without VITDS_FAULT_COUNTS (the short pass) nothing is kept. Call it before the assertion."""
    path = os.environ.get("VITDS_FAULT_COUNTS")
    if path is None:
        return
    line = {"fault": fault, "how": how, "survived": survived, "of": of, "detail": detail}
    line |= {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
    line |= {name: version(name) for name in ("torch", "deepspeed")}
    with open(path, "a") as counts:
        counts.write(json.dumps(line) + "\n")


@contextmanager
def counted(fault: str, how: str) -> Iterator[None]:
    """Add one result: whether what is inside passed; also a test's decorator."""
    survived = 0
    try:
        yield
        survived = 1
    finally:
        record(fault, how, survived, 1)


def rows(lines: list[dict]) -> list[str]:
    """Markdown rows: fault, how injected, result; results of one fault and injection are added up."""
    sums: dict[tuple[str, str], list] = {}
    for line in lines:
        survived, of, details = sums.setdefault((line["fault"], line["how"]), [0, 0, []])
        more = [line["detail"]] if line["detail"] and line["detail"] not in details else []
        sums[line["fault"], line["how"]] = [survived + line["survived"], of + line["of"], details + more]
    return [
        f"| {fault} | {how} | **{survived:,} of {of:,}**{''.join(f'; {detail}' for detail in details)} |"
        for (fault, how), (survived, of, details) in sums.items()
    ]


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        results = [json.loads(line) for line in file]
    versions = {tuple(line[key] for key in ("date", "python", "torch", "deepspeed")) for line in results}
    for date, python, torch, deepspeed in sorted(versions):
        print(f"{date}: Python {python}, torch {torch}, DeepSpeed {deepspeed}")
    print(*rows(results), sep="\n")
