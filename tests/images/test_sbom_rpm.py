"""rpm's databases: those that rpm makes, read as rpm reads them; SQLite files as SQLite reads them; and hostile ones."""

from __future__ import annotations

import functools
import itertools
import random
import sqlite3
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tartarus.images.sbom import Inventory, take_inventory
from tartarus.images.sbom.sqlitefile import NotReadable, Table
from tartarus.images.stackview import StackView

DATABASE = "usr/lib/sysimage/rpm/rpmdb.sqlite"
SPEC = """\
Name: {name}
Version: {version}
Release: 3.el9
{epoch}
Summary: one
License: MIT and GPLv2+
%description
words
%package libs
Summary: two
%description libs
words
%files
%files libs
"""

_number = itertools.count()


def inventory(layer: Path) -> Inventory:
    with StackView([layer]) as view:
        return take_inventory(view)


def header(tags: dict[int, tuple[int, bytes]], **wrong: Any) -> bytes:
    """A package's header as rpm stores it; types 6 are texts, 4 are numbers."""
    index, data = b"", b""
    for tag, (kind, content) in tags.items():
        index += struct.pack(">IIII", tag, kind, wrong.get("offset", len(data)), wrong.get("number", 1))
        data += content
    return struct.pack(">II", wrong.get("count", len(tags)), wrong.get("length", len(data))) + index + data


GOOD = {
    1000: (6, b"bash\0"),
    1001: (6, b"5.1\0"),
    1002: (6, b"1.el9\0"),
    1022: (6, b"x86_64\0"),
    1044: (6, b"bash-5.1-1.el9.src.rpm\0"),
}


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    place = tmp_path / "layer"
    (place / DATABASE).parent.mkdir(parents=True)
    (place / "etc").mkdir()
    (place / "etc/os-release").write_text("ID=rocky\nVERSION_ID=9.4\n")
    return place


@pytest.fixture
def packages(layer: Path) -> Callable[..., Inventory]:
    """Writes a database with these headers as rpm lays it out, and takes the inventory."""

    def write(*blobs: Any) -> Inventory:
        (layer / DATABASE).unlink(missing_ok=True)
        with closing(sqlite3.connect(layer / DATABASE)) as database:
            database.execute("CREATE TABLE Packages (hnum INTEGER PRIMARY KEY AUTOINCREMENT, blob BLOB NOT NULL)")
            database.execute("CREATE TABLE Name (key TEXT NOT NULL, hnum INTEGER NOT NULL)")
            database.executemany("INSERT INTO Packages (blob) VALUES (?)", [(blob,) for blob in blobs])
            database.commit()
        return inventory(layer)

    return write


@pytest.mark.needs("rpm")
def test_what_rpm_wrote_as_rpm_reads_it(layer: Path, tmp_path: Path) -> None:
    for name, version, epoch in (("alpha", "1.2", "Epoch: 2"), ("beta", "0.9~rc1", "")):
        (tmp_path / f"{name}.spec").write_text(SPEC.format(name=name, version=version, epoch=epoch))
        subprocess.run(
            ["rpmbuild", "-bb", "--define", f"_topdir {tmp_path}/top", "--define", "_build_id_links none", tmp_path / f"{name}.spec"],
            capture_output=True, timeout=120, check=True,
        )  # fmt: skip
    options = ["--root", str(layer), "--dbpath", "/usr/lib/sysimage/rpm"]
    built = [str(path) for path in (tmp_path / "top/RPMS").rglob("*.rpm")]
    subprocess.run(["rpm", *options, "-i", "--justdb", "--nodeps", *built], capture_output=True, timeout=60, check=True)
    form = "%{NAME}|%|EPOCH?{%{EPOCH}:}|%{VERSION}-%{RELEASE}|%{ARCH}|%{LICENSE}\\n"
    told = subprocess.run(
        ["rpm", *options, "-qa", "--qf", form], capture_output=True, text=True, timeout=60, check=True
    ).stdout  # fmt: skip
    found = inventory(layer)
    assert found.gaps == ()
    assert sorted(f"{p.name}|{p.version}|{p.architecture}|{p.license}" for p in found.packages) == sorted(
        told.splitlines()
    )
    assert found.packages[1].purl == (
        "pkg:rpm/rocky/alpha-libs@1.2-3.el9?arch=x86_64&distro=rocky-9.4&epoch=2&upstream=alpha-1.2-3.el9.src.rpm"
    )
    assert {(p.source, p.source_version) for p in found.packages} == {
        ("alpha", "2:1.2-3.el9"),
        ("beta", "0.9~rc1-3.el9"),
    }


def test_keys_are_no_packages(packages: Callable[..., Inventory]) -> None:
    found = packages(header(GOOD), header(GOOD | {1000: (6, b"gpg-pubkey\0")}))
    assert [p.purl for p in found.packages] == [
        "pkg:rpm/rocky/bash@5.1-1.el9?arch=x86_64&distro=rocky-9.4&upstream=bash-5.1-1.el9.src.rpm"
    ]


@pytest.mark.parametrize(
    "blob",
    [
        b"", b"\0" * 7, header(GOOD, count=0xFFFFFFFF), header(GOOD, length=0xFFFFFFFF), header(GOOD, offset=10_000), header(GOOD, number=0),
        header(GOOD | {1000: (4, b"\0\0\0\1")}), header(GOOD | {1000: (6, b"a\x1b[2J\0")}), header(GOOD | {1000: (8, b"a\0")}), header({1000: (6, b"endless")}),
        header(GOOD | {1003: (6, b"text\0")}), header({}),
    ],
)  # fmt: skip
def test_a_header_that_is_none_is_a_gap_and_the_others_are_read(
    packages: Callable[..., Inventory], blob: bytes
) -> None:
    found = packages(header(GOOD), blob)
    assert [p.name for p in found.packages][-1:] == ["bash"]
    assert len(found.gaps) + len(found.packages) == 2
    assert all(gap.isprintable() for gap in found.gaps)


def test_rows_that_are_no_packages_are_a_gap(packages: Callable[..., Inventory]) -> None:
    assert "a row is no package" in packages(5).gaps[0]


def test_old_formats_and_unwritten_changes_are_gaps(layer: Path) -> None:
    for name in ("Packages", "Packages.db", "rpmdb.sqlite-wal"):
        (layer / DATABASE).with_name(name).write_bytes(b"x")
    (layer / "var/lib").mkdir(parents=True)
    (layer / "var/lib/rpm").symlink_to("../../usr/lib/sysimage/rpm")
    gaps = inventory(layer).gaps
    assert [gap.partition(":")[0].rpartition("/")[2] for gap in gaps] == ["Packages.db", "Packages", "rpmdb.sqlite-wal"]


def test_a_schema_runs_nothing(layer: Path) -> None:
    """What SQLite would run when it is asked for Packages: a view that counts for ever."""
    with closing(sqlite3.connect(layer / DATABASE)) as database:
        database.execute(
            "CREATE VIEW Packages AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x, zeroblob(9) FROM n"
        )
    assert "it has no table Packages" in inventory(layer).gaps[0]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    page=st.sampled_from([512, 1024, 4096, 65536]),
    sizes=st.lists(
        st.one_of(st.integers(0, 300), st.sampled_from([477, 478, 479, 4060, 4061, 5000, 70_000])), max_size=60
    ),
    deleted=st.sets(st.integers(1, 60)),
)
def test_sqlite_files_as_sqlite_reads_them(
    tmp_path_factory: pytest.TempPathFactory, page: int, sizes: list[int], deleted: set[int]
) -> None:
    path = tmp_path_factory.getbasetemp() / f"sqlite{next(_number)}"
    source = random.Random(0)
    rows = [
        (source.randbytes(size), source.choice([None, 0, 1, -1, 300, -70_000, 1 << 40, -(1 << 62)]), "t" * (size % 7))
        for size in sizes
    ]
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA page_size = {page}")
        database.execute("CREATE TABLE other (x)")
        database.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, a BLOB, b INTEGER, c TEXT)")
        database.executemany("INSERT INTO t (a, b, c) VALUES (?, ?, ?)", rows)
        database.executemany("DELETE FROM t WHERE id = ?", [(each,) for each in deleted])
        database.commit()
        expected = [(None, a, b, c.encode()) for a, b, c in database.execute("SELECT a, b, c FROM t ORDER BY id")]
    table = Table(path.read_bytes())
    assert list(table.rows("t")) == expected
    assert list(table.rows("other")) == []
    with pytest.raises(NotReadable, match="no table"):
        list(table.rows("missing"))


@functools.cache
def good() -> bytes:
    """A database with pages of every kind in a few hundred of them."""
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("PRAGMA page_size = 512")
        database.execute("CREATE TABLE Packages (hnum INTEGER PRIMARY KEY, blob BLOB NOT NULL)")
        database.executemany("INSERT INTO Packages (blob) VALUES (?)", [(bytes([n]) * (n * 40),) for n in range(60)])
        database.commit()
        return database.serialize()


class TestHostileFiles:
    def read(self, content: bytes) -> Iterator[tuple[Any, ...]]:
        return Table(content).rows("Packages")

    @settings(max_examples=300, deadline=None)
    @given(data=st.data())
    def test_damaged_anywhere(self, data: st.DataObject) -> None:
        content = bytearray(good())
        for _ in range(data.draw(st.integers(1, 6))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        cut = data.draw(st.integers(0, len(content))) if data.draw(st.booleans()) else len(content)
        rows: list[tuple[Any, ...]] = []
        with suppress(NotReadable):
            rows.extend(self.read(bytes(content[:cut])))
        sizes = [len(value) for row in rows for value in row if isinstance(value, bytes)]
        assert sum(sizes) <= len(good())

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"SQLite format 3\0",
            b"x" * 4096,
            b"SQLite format 3\0" + b"\0" * 4096,
            b"SQLite format 3\0" + b"\xff" * 4096,
        ],
    )
    def test_what_is_none(self, content: bytes) -> None:
        with pytest.raises(NotReadable):
            list(self.read(content))

    def test_pages_in_a_circle(self) -> None:
        """Every interior page's last child is made to be the page itself."""
        content = bytearray(good())
        for start in range(512, len(content), 512):
            if content[start] == 5:
                content[start + 8 : start + 12] = (start // 512 + 1).to_bytes(4)
        with pytest.raises(NotReadable, match="in two places"):
            list(self.read(bytes(content)))

    def test_many_rows_in_one_place(self) -> None:
        """A page whose cells are all the same one: a bomb of rows."""
        with closing(sqlite3.connect(":memory:")) as database:
            database.execute("PRAGMA page_size = 65536")
            database.execute("CREATE TABLE Packages (hnum INTEGER PRIMARY KEY, blob BLOB NOT NULL)")
            database.execute("INSERT INTO Packages (blob) VALUES (zeroblob(60000))")
            database.commit()
            content = bytearray(database.serialize())
        content[65536 + 3 : 65536 + 5] = (2000).to_bytes(2)
        content[65536 + 8 : 65536 + 4008] = content[65536 + 8 : 65536 + 10] * 2000
        with pytest.raises(NotReadable, match="more than it can hold"):
            list(self.read(bytes(content)))
