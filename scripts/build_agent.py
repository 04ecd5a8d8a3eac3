"""Compile the guest agent: one static C program, with the system's compiler or with ziglang's.

The build hook (hatch_build.py), `make agent` and the tests call this; it needs nothing but the
standard library. `python3 scripts/build_agent.py [OUTPUT]` builds it by hand.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src" / "tartarus" / "guest" / "agent"
OUTPUT = ROOT / "src" / "tartarus" / "guest" / "bin" / "tartarus-guest"

_WARNINGS = ["-std=c17", "-Wall", "-Wextra"]
# musl's CMSG_NXTHDR, which ziglang's compiler sees from within its own headers.
_ZIG_WARNINGS = ["-Wno-sign-compare"]
# What the agent's Makefile passes besides, for systems that have a compiler but no make.
_FLAGS = [
    "-O2", "-static", "-no-pie", "-D_GNU_SOURCE=", "-D_FORTIFY_SOURCE=2", "-fstack-protector-strong",
    "-fno-strict-aliasing",
]  # fmt: skip
_COMPILE_TIMEOUT_S = 600


def _links_static(compiler: list[str]) -> bool:
    """Whether `compiler` can make a static program: many systems have a C compiler but no libc.a."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "probe.c"
        source.write_text('#include <stdio.h>\nint main(void) { return puts("") < 0; }\n')
        command = [*compiler, "-static", "-o", str(Path(scratch) / "probe"), str(source)]
        try:
            return subprocess.run(command, capture_output=True, timeout=_COMPILE_TIMEOUT_S, check=False).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            return False


def system_compiler() -> list[str] | None:
    """The system's C compiler ($CC, cc, gcc, clang, musl-gcc) that can link statically, or None."""
    candidates = [shlex.split(os.environ["CC"])] if os.environ.get("CC") else []
    candidates += [[name] for name in ("cc", "gcc", "clang", "musl-gcc")]
    for candidate in candidates:
        if shutil.which(candidate[0]) and _links_static(candidate):
            return candidate
    return None


def zig_compiler() -> list[str] | None:
    """Ziglang's C compiler, aimed at musl so that the program depends on no C library of the host."""
    if importlib.util.find_spec("ziglang") is None:
        return None
    return [sys.executable, "-m", "ziglang", "cc", "-target", f"{platform.machine()}-linux-musl"]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr or done.stdout}")


def build(output: Path = OUTPUT, *, strict: bool = False) -> Path:
    """Compile every C file of the agent into `output`, replacing it in one step.

    `strict`: warnings are errors, as for developers; who installs it may have a compiler that warns of more.
    Raises SystemExit with what to install when no compiler is there, and with the compiler's own words when
    it refuses.
    """
    compiler, warnings = system_compiler(), _WARNINGS
    if compiler is None:
        compiler, warnings = zig_compiler(), [*_WARNINGS, *_ZIG_WARNINGS]
    if compiler is None:
        raise SystemExit(
            "Tartarus's guest agent needs a C compiler that links statically: install gcc and the C library's "
            "static files (Debian: gcc libc6-dev; Fedora: gcc glibc-static), or: pip install ziglang"
        )
    if strict:
        warnings = [*warnings, "-Werror"]
    output.parent.mkdir(parents=True, exist_ok=True)
    if shutil.which("make"):
        variables = [f"CC={shlex.join(compiler)}", f"OUT={output}", f"WARNINGS={' '.join(warnings)}"]
        _run(["make", "--silent", "--always-make", *variables, str(output)])
        return output
    fresh = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        _run([*compiler, *warnings, *_FLAGS, "-o", str(fresh), *sorted(path.name for path in SOURCES.glob("*.c"))])
        fresh.replace(output)
    finally:
        fresh.unlink(missing_ok=True)
    return output


if __name__ == "__main__":
    print(build(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else OUTPUT, strict=True))
