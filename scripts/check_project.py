"""Checks that no general tool makes: nothing of one machine in the repository, no module out of hand.

Part of `make lint`. Prints one line for each finding and exits with 1 when there is any.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# C says its error paths out loud, so it may be longer.
LONGEST_LINES = {".py": 400, ".c": 500, ".h": 200}
# One file by design: it is copied into templates and runs there by itself.
_ONE_FILE = {"src/tartarus/guest/runner.py"}

# Written in parts, so that this file does not find itself.
_HOSTS = [
    "".join(parts)
    for parts in (
        ("pypi", ".org"), ("python", "hosted"), ("deb.", "debian.org"), ("registry.", "npmjs"), ("snapshot.", "debian"),
        ("archive.", "ubuntu"), ("index.", "crates.io"), ("proxy.", "golang"),
    )
]  # fmt: skip
_FINDINGS = (
    # A checkout, or an interpreter of whoever wrote the line. `/work` and `/root` alone are the sandbox's own.
    (re.compile(r"/work/(main|shared|\.library)\b|/root/\.(pyenv|cache|local)\b|/Users/\w"), "a machine's path"),
    (re.compile("|".join(map(re.escape, _HOSTS))), "a registry's host"),
    (re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b"), "unfinished work"),
    (re.compile(r"raise NotImplemented" r"Error"), "a stub"),
)  # fmt: skip
# Text that must say such words: the licence, and these rules themselves.
_EXEMPT = {"LICENSE", "scripts/check_project.py", "tests/project/test_project.py"}


def committed() -> list[Path]:
    """Every file that git tracks or would track."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    names = {name for name in listing.stdout.decode().split("\0") if name}
    return [ROOT / name for name in sorted(names) if (ROOT / name).is_file()]


def findings_in(name: str, text: str) -> Iterator[str]:
    """Findings in one file's text, as ``path:line: what``."""
    if name not in _EXEMPT:
        for number, line in enumerate(text.splitlines(), 1):
            for pattern, what in _FINDINGS:
                found = pattern.search(line)
                if found:
                    allowed = what == "unfinished work" and name in {"CONTRIBUTING.md", "pyproject.toml"}
                    if not allowed:
                        yield f"{name}:{number}: {what}: {found.group()}"
    longest = LONGEST_LINES.get(Path(name).suffix) if name.startswith("src/") and name not in _ONE_FILE else None
    if longest is not None and text.count("\n") > longest:
        yield f"{name}: {text.count(chr(10))} lines; split it ({longest} at most)"


def main() -> int:
    """Check every file; the exit status."""
    count = 0
    for path in committed():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for finding in findings_in(str(path.relative_to(ROOT)), text):
            print(finding)
            count += 1
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
