"""The number tables agree with the kernel's headers on this machine, and with themselves."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tartarus.guest.syscalls import AARCH64, TABLES, X86_64, machine, number, table

_HEADERS = {
    "x86_64": "#include <asm/unistd_64.h>\n",
    # What arch/arm64/include/uapi/asm/unistd.h defines before it includes the generic table.
    "aarch64": "".join(
        f"#define __ARCH_WANT_{what}\n"
        for what in ("RENAMEAT", "NEW_STAT", "SET_GET_RLIMIT", "TIME32_SYSCALLS", "SYS_CLONE3", "MEMFD_SECRET")
    )
    + "#define __BITS_PER_LONG 64\n#include <asm-generic/unistd.h>\n",
}


def _from_headers(source: str) -> dict[str, int]:
    macros = subprocess.run(
        ["cc", "-E", "-dM", "-x", "c", "-"], input=source, capture_output=True, text=True, check=True
    ).stdout
    names = sorted(set(re.findall(r"#define __NR_(\w+) ", macros)) - {"syscalls", "arch_specific_syscall"})
    source += "".join(f"@ {name} __NR_{name}\n" for name in names)
    expanded = subprocess.run(
        ["cc", "-E", "-P", "-x", "c", "-"], input=source, capture_output=True, text=True, check=True
    ).stdout
    return {name: int(value) for name, value in re.findall(r"^@ (\w+) (\d+)$", expanded, re.MULTILINE)}


@pytest.mark.needs("cc")
@pytest.mark.parametrize("arch", TABLES)
def test_numbers_are_the_headers(arch: str) -> None:
    if arch == "x86_64" and not Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h").exists():
        arch = "aarch64"  # the generic header is on every machine, the x86 one is not
    theirs = _from_headers(_HEADERS[arch])
    assert len(theirs) > 290
    ours = table(arch)
    assert {name: ours.get(name) for name in theirs} == theirs


@pytest.mark.parametrize("arch", TABLES)
def test_no_number_is_used_twice(arch: str) -> None:
    numbers = list(table(arch).values())
    assert len(set(numbers)) == len(numbers)


def test_calls_from_424_on_are_the_same_everywhere() -> None:
    new = {name: nr for name, nr in X86_64.items() if 424 <= nr < 512}
    assert new == {name: nr for name, nr in AARCH64.items() if nr >= 424}


def test_number_takes_an_architecture() -> None:
    assert (number("openat", "x86_64"), number("openat", "aarch64")) == (257, 56)
    assert number("getpid") == TABLES[machine()]["getpid"]


def test_a_call_that_an_architecture_lacks_is_named() -> None:
    with pytest.raises(LookupError, match="aarch64 has no system call fork"):
        number("fork", "aarch64")


def test_an_architecture_without_a_table_is_named() -> None:
    with pytest.raises(LookupError, match="no system call table for riscv64"):
        table("riscv64")
