"""Write the tables of docs/hostile-images.md from the catalogue of crafted layers in tests/escape/images.

python3 scripts/hostile_images_page.py          write it
python3 scripts/hostile_images_page.py --check  exit with 1 when it is out of date
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

PAGE = ROOT / "docs" / "hostile-images.md"
_MARK = "<!-- From here on written by scripts/hostile_images_page.py; change tests/escape/images instead. -->\n"
_LIMITS = """
## Limits

For one layer: {limits}.
"""
_REFUSED = """
## Refused ({count})

"""
_CONTAINED = """
## Harmless ({count})

These unpack, and the test says exactly to what: d is a directory, f a file, l a symbolic link, p a named pipe, w the
mark of a deletion.

| layer | becomes |
|---|---|
"""
_GROUPS = {
    "traversal": "Ways out of the layer",
    "overlay": "Forgeries of what steers an overlay",
    "numbers": "Sizes, ids and times",
    "pax": "Extended headers",
    "sparse": "Sparse files",
    "names": "Names",
    "shape": "The archive as a whole",
    "bombs": "Bombs",
    "labels": "What the image says of its layer",
}


def page() -> str:
    """The whole page."""
    from tests.escape.images.contained import contained
    from tests.escape.images.refused import refused

    from tartarus.images.unpack.limits import Limits

    limits = Limits()
    said = (
        f"{limits.bytes >> 30} GiB uncompressed, {limits.entries:,} entries, {limits.depth} directories deep, "
        f"{limits.header_bytes >> 10} KiB of extended header and {limits.xattr_bytes >> 10} KiB of attributes for an "
        f"entry, growth by {limits.ratio} times beyond the first {limits.ratio_free_bytes >> 30} GiB, "
        f"{limits.memory_bytes >> 30} GiB of memory and {limits.cpu_s // 60} minutes of CPU"
    )
    attacks = refused(b"/outside")
    prose = PAGE.read_text(encoding="utf-8").partition(_MARK)[0]
    parts = [prose, _MARK, _LIMITS.format(limits=said), _REFUSED.format(count=len(attacks))]
    parts.append("| layers | crafted with |\n|---|---|\n")
    for group, names in groupby(attacks, key=lambda name: name.partition("/")[0]):
        parts.append(f"| {_GROUPS[group]} | {'; '.join(name.partition('/')[2] for name in names)} |\n")
    parts.append(_CONTAINED.format(count=len(contained())))
    for name, (_, kinds) in contained().items():
        made = ", ".join(f"`{_short(path)}` {kind}" for path, kind in kinds.items()) or "nothing"
        parts.append(f"| {name} | {made} |\n")
    return "".join(parts)


def _short(path: str) -> str:
    return path if len(path) < 40 else f"{path[:20]}…"


def main() -> int:
    """Write or check; the exit status."""
    text = page()
    same = PAGE.read_text(encoding="utf-8") == text
    if "--check" in sys.argv[1:]:
        if not same:
            print(f"docs/{PAGE.name} is out of date: run scripts/hostile_images_page.py")
        return 0 if same else 1
    if not same:
        PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
