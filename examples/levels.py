"""The same numpy job at every isolation level that this host can give, in one table.

`python examples/levels.py [LEVEL...]`; without arguments, every level is tried. Each level runs the job twice: what
is shown is the second time, when the template stands warm. Ends with 1 when a level that was named can't run it.
"""

from __future__ import annotations

import sys
import time
from typing import NamedTuple

from tartarus import Sandbox, TartarusError
from tartarus.sdk import Client

TEMPLATE = "python-ds"
JOB = """\
import numpy
matrix = numpy.arange(250_000, dtype=float).reshape(500, 500) / 250_000
print(round(float(numpy.linalg.norm(matrix @ matrix.T)), 3))
"""
MEMORY = "512MiB"


class Row(NamedTuple):
    """What one level did: the job's answer, milliseconds to start and in all, and the most bytes of memory it took."""

    answer: str
    start_ms: float
    total_ms: float
    memory: int
    warm: bool


def run(client: Client, level: str) -> Row:
    """One sandbox at that level, from its request to its end. Raises TartarusError."""
    began = time.perf_counter()
    with Sandbox.create(TEMPLATE, isolation=level, memory=MEMORY, client=client, labels={"example": "levels"}) as box:
        result = box.run(["python3", "-c", JOB])
        memory = box.stats().memory_peak_bytes
        if result.exit_code != 0:
            raise SystemExit(f"{level}: the job failed: {result.stderr}")
        start_ms, warm = box.info.start_ms or 0.0, box.info.warm
    return Row(result.stdout.strip(), start_ms, (time.perf_counter() - began) * 1e3, memory, warm)


def main(asked: list[str]) -> int:
    """Print the table; the exit status."""
    client = Client()
    print(f"job: a product of 500 by 500 numbers in numpy, template {TEMPLATE}, {MEMORY} of memory\n")
    print(f"{'isolation':<11}{'answer':>9}{'start':>12}{'total':>12}{'memory':>12}  ")
    answers = set()
    failed = False
    for report in client.levels():
        level = str(report.isolation)
        if asked and level not in asked:
            continue
        if level == "wasm" and not asked:
            print(f"{level:<11}runs WebAssembly modules, of which numpy is none: tartarus run ./module.wasm")
            continue
        if not report.ok:
            print(f"{level:<11}not on this host: {report.detail}")
            failed |= bool(asked)
            continue
        try:
            run(client, level)
            row = run(client, level)
        except TartarusError as error:
            print(f"{level:<11}{error}")
            failed |= bool(asked)
            continue
        answers.add(row.answer)
        how = "warm" if row.warm else "cold"
        figures = f"{row.start_ms:>9.1f} ms{row.total_ms:>9.1f} ms{row.memory / 2**20:>8.1f} MiB"
        print(f"{level:<11}{row.answer:>9}{figures}  {how}", flush=True)
    if len(answers) > 1:
        print(f"the levels disagree: {', '.join(sorted(answers))}")
        return 1
    return int(failed)


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except TartarusError as error:
        raise SystemExit(f"{error.code}: {error}") from None
