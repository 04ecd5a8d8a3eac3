"""Run every bench, print the table, write the JSON."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

from benchmarks import node_benches
from benchmarks.measure import Row, machine, table


async def _all(names: list[str], home: Path) -> list[Row]:
    rows: list[Row] = []
    for name, bench in node_benches.BENCHES.items():
        if names and name not in names:
            continue
        print(f"… {name}", file=sys.stderr, flush=True)
        rows += await bench(home)
    return rows


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("bench", nargs="*", help=f"of: {', '.join(node_benches.BENCHES)} (default: all)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tartarus-bench-") as home:
        rows = asyncio.run(_all(arguments.bench, Path(home)))
    print(table(rows))
    if arguments.json:
        document = {"machine": machine(), "rows": [row.as_json() for row in rows]}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
