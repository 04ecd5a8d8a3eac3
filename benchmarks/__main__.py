"""Run every bench, print the table, write the JSON."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import tempfile
from pathlib import Path

import structlog

from benchmarks import (
    egress_benches,
    furies_benches,
    image_benches,
    machine_benches,
    memory_benches,
    network_benches,
    node_benches,
    peers,
    policy_benches,
    sleep_benches,
    wasm_benches,
)
from benchmarks.measure import Row, machine, table

BENCHES = {
    **node_benches.BENCHES,
    **wasm_benches.BENCHES,
    "sleep": sleep_benches.pause_and_sleep,
    "images": image_benches.pull_and_unpack,
    "image-warm": image_benches.warm_from_image,
    "machines": machine_benches.machines,
    "memory": memory_benches.memory,
    "memory-sets": memory_benches.memory_sets,
    "rules": policy_benches.rules,
    "admission": policy_benches.admission,
    "audit": policy_benches.audit,
    "egress": egress_benches.egress,
    **furies_benches.BENCHES,
    **network_benches.BENCHES,
}


async def _all(names: list[str], home: Path) -> list[Row]:
    rows: list[Row] = []
    missing = [*peers.absent(), *image_benches.absent(), *wasm_benches.absent(), *policy_benches.absent()]
    if missing:
        print(f"not installed here, so absent below: {', '.join(missing)}", file=sys.stderr)
    for name, bench in BENCHES.items():
        if names and name not in names:
            continue
        print(f"… {name}", file=sys.stderr, flush=True)
        rows += await bench(home)
    return rows


def run(names: list[str], json_file: Path | None) -> None:
    """Run the benches of these names (all when there are none), print the table, write the JSON."""
    with tempfile.TemporaryDirectory(prefix="tartarus-bench-") as home:
        rows = asyncio.run(_all(names, Path(home)))
    print(table(rows))
    if json_file is not None:
        document = {
            "machine": machine(),
            "absent": [*peers.absent(), *image_benches.absent(), *wasm_benches.absent(), *policy_benches.absent()],
            "rows": [row.as_json() for row in rows],
        }
        json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("bench", nargs="*", help=f"of: {', '.join(BENCHES)} (default: all)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    run(arguments.bench, arguments.json)


if __name__ == "__main__":
    main()
