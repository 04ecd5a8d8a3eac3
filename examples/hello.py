"""`make hello`: a first command in a sandbox, then a computation with numpy and pandas, cold and warm.

Runs the `tartarus` command as a person would; asks the SDK only how each sandbox was started.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tartarus import Sandbox, TartarusError

HERE = Path(__file__).parent
TARTARUS = shutil.which("tartarus", path=str(Path(sys.executable).parent)) or "tartarus"
STATE_MARK = f"hello-{time.time_ns()}"


def run(title: str, label: str, arguments: list[str], stdin: Path | None = None) -> None:
    """Run `tartarus run …`, with what it prints; then say how long it took and how it was held."""
    shown = [argument if "\n" not in argument else "…" for argument in arguments]
    source = f" < {stdin.relative_to(HERE.parent)}" if stdin else ""
    print(f"\n{title}\n$ tartarus run {shlex.join(shown)}{source}", flush=True)
    began = time.perf_counter()
    with (stdin or Path("/dev/null")).open("rb") as data:
        command = [TARTARUS, "run", "--label", f"{STATE_MARK}={label}", *arguments]
        done = subprocess.run(command, stdin=data, check=False)
    took_ms = (time.perf_counter() - began) * 1000
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    (sandbox,) = Sandbox.list(states=["succeeded"], labels={STATE_MARK: label})
    record = sandbox.info
    how = (
        "warm: cloned from an interpreter that stood ready"
        if record.warm
        else "cold: had to make that interpreter first"
    )
    print(f"  isolation {record.isolation.value} ({record.isolation_reason})")
    print(f"  sandbox started in {record.start_ms or 0:.1f} ms ({how}); the whole command took {took_ms:.0f} ms")


def main() -> None:
    """The three runs."""
    run("A first command:", "first", ["--", "python3", "-c", 'print("Hello from Tartarus")'])
    script = (HERE / "daylight.py").read_text()
    data = HERE / "data" / "daylight.csv"
    arguments = ["-i", "--template", "python-ds", "--", "python3", "-c", script]
    print("\nNow the template python-ds. On its first use ever, its packages are installed; give it a moment.", end="")
    run("A year of daylight, with numpy and pandas, for the first time:", "first-time", arguments, data)
    run("The same again:", "again", arguments, data)
    print("\nNext: tartarus doctor, tartarus --help, docs/quick-start.md")


if __name__ == "__main__":
    try:
        main()
    except TartarusError as error:
        raise SystemExit(f"{error.code}: {error}") from None
