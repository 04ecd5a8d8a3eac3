"""Files through the agent: attributes, listings, transfers, removal, and paths that change underneath."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import stat
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tartarus.guest.channel import GuestChannel
from tartarus.model.errors import FileFailed
from tartarus.model.sandbox import FileEvent

from .conftest import Agent, shell

pytestmark = pytest.mark.anyio


async def read(guest: GuestChannel, path: Path | str, **options: int) -> bytes:
    return b"".join([piece async for piece in guest.read(str(path), **options)])


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


class TestStat:
    async def test_a_file(self, guest: GuestChannel, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_bytes(b"12345")
        file.chmod(0o640)
        info = await guest.stat(str(file))
        real = file.stat()
        assert (info.path, info.kind, info.size, info.mode) == (str(file), "file", 5, 0o640)
        assert (info.uid, info.gid) == (real.st_uid, real.st_gid)
        assert info.mtime == pytest.approx(real.st_mtime)

    async def test_kinds(self, guest: GuestChannel, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "link").symlink_to("nowhere")
        assert (await guest.stat(str(tmp_path))).kind == "dir"
        assert (await guest.stat("/")).kind == "dir"
        assert (await guest.stat("/dev/null")).kind == "char"
        assert (await guest.stat(str(tmp_path / "fifo"))).kind == "fifo"
        link = await guest.stat(str(tmp_path / "link"))
        assert (link.kind, link.link_target) == ("symlink", "nowhere")

    async def test_what_is_not_there(self, guest: GuestChannel, tmp_path: Path) -> None:
        with pytest.raises(FileFailed, match="No such file"):
            await guest.stat(str(tmp_path / "missing"))

    @pytest.mark.parametrize("path", ["", "relative", "nul\0byte", "/" + "x" * 5000, "/" + "x" * 300])
    async def test_paths_that_name_nothing(self, guest: GuestChannel, path: str) -> None:
        with pytest.raises(FileFailed):
            await guest.stat(path)

    async def test_names_that_are_not_text(self, guest: GuestChannel, tmp_path: Path) -> None:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff")).write_bytes(b"")
        assert [entry.path for entry in await guest.list(str(tmp_path))] == [f"{tmp_path}/a\\xff"]


class TestList:
    async def test_entries_by_name(self, guest: GuestChannel, tmp_path: Path) -> None:
        for name in ("b", "a", "c"):
            (tmp_path / name).write_text(name)
        (tmp_path / "sub").mkdir()
        (tmp_path / "z").symlink_to("a")
        found = [(entry.path, entry.kind) for entry in await guest.list(str(tmp_path))]
        kinds = {"a": "file", "b": "file", "c": "file", "sub": "dir", "z": "symlink"}
        assert found == [(f"{tmp_path}/{name}", kind) for name, kind in kinds.items()]

    async def test_an_empty_directory(self, guest: GuestChannel, tmp_path: Path) -> None:
        assert await guest.list(str(tmp_path)) == []

    async def test_the_root(self, guest: GuestChannel) -> None:
        assert "/usr" in [entry.path for entry in await guest.list("/")]

    async def test_many(self, guest: GuestChannel, tmp_path: Path) -> None:
        names = {f"{number:04}-{'x' * 200}" for number in range(2000)}
        for name in names:
            (tmp_path / name).touch()
        assert {Path(entry.path).name for entry in await guest.list(str(tmp_path))} == names

    async def test_not_a_directory(self, guest: GuestChannel) -> None:
        with pytest.raises(FileFailed, match="Not a directory"):
            await guest.list("/etc/passwd")


class TestRead:
    async def test_whole_and_in_part(self, guest: GuestChannel, tmp_path: Path) -> None:
        data = os.urandom(3_000_000)
        file = tmp_path / "file"
        file.write_bytes(data)
        assert await read(guest, file) == data
        assert await read(guest, file, offset=1_000_000, limit=5) == data[1_000_000:1_000_005]
        assert await read(guest, file, limit=0) == b""
        assert await read(guest, file, offset=10**12) == b""

    async def test_files_without_a_size(self, guest: GuestChannel) -> None:
        assert b"Name:" in await read(guest, "/proc/self/status")

    async def test_links_are_followed(self, guest: GuestChannel, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"content")
        (tmp_path / "link").symlink_to("file")
        assert await read(guest, tmp_path / "link") == b"content"

    async def test_what_is_no_file(self, guest: GuestChannel, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        for path in ("/dev/zero", "/dev/null", str(tmp_path), str(tmp_path / "fifo"), str(tmp_path / "missing")):
            with pytest.raises(FileFailed):
                await read(guest, path)

    async def test_the_agents_own_descriptors_are_out_of_reach(
        self, guest: GuestChannel, tmp_path: Path, agent: Agent
    ) -> None:
        """What has no name has none through /proc either: links there are followed by their text."""
        await guest.ping()
        (tmp_path / "trap").symlink_to("/proc/self/fd")
        nameless = [fd for fd in Path(f"/proc/{agent.pid}/fd").iterdir() if not str(fd.readlink()).startswith("/")]
        assert len(nameless) >= 3
        for fd in nameless:
            with pytest.raises(FileFailed, match="No such file"):
                await read(guest, f"/proc/self/fd/{fd.name}")
            with pytest.raises(FileFailed):
                await guest.write(f"{tmp_path}/trap/{fd.name}", b"x", append=True)

    async def test_links_of_every_sort(self, guest: GuestChannel, tmp_path: Path) -> None:
        (tmp_path / "dir").mkdir()
        (tmp_path / "dir" / "file").write_bytes(b"found")
        (tmp_path / "relative").symlink_to("dir")
        (tmp_path / "absolute").symlink_to(tmp_path / "relative")
        (tmp_path / "up").symlink_to("absolute/../dir/./file")
        (tmp_path / "loop").symlink_to("loop")
        (tmp_path / "far").symlink_to("x/" * 2040 + "x")
        for path in (
            "relative/file",
            "absolute//file",
            "up",
            "relative/../relative/./file",
            "../../../../../../" + str(tmp_path) + "/up",
        ):
            assert await read(guest, f"{tmp_path}/{path}") == b"found"
        for path in ("loop", "loop/x", "far", "dir/file/x", "dir/file/", "up/x"):
            with pytest.raises(FileFailed):
                await read(guest, f"{tmp_path}/{path}")
        assert [entry.path for entry in await guest.list(f"{tmp_path}/absolute/")] == [f"{tmp_path}/absolute/file"]
        await guest.write(f"{tmp_path}/absolute/new", b"x")
        assert (tmp_path / "dir" / "new").exists()
        await guest.write(f"{tmp_path}/up", b"+", append=True)
        assert (tmp_path / "dir" / "file").read_bytes() == b"found+"
        (tmp_path / "dangling").symlink_to("dir/made")
        await guest.write(f"{tmp_path}/dangling", b"x", append=True)
        assert (tmp_path / "dir" / "made").exists()

    async def test_leaving_early(self, guest: GuestChannel, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_bytes(bytes(20_000_000))
        reading = guest.read(str(file))
        assert await anext(reading)
        await reading.aclose()  # type: ignore[attr-defined]
        assert await read(guest, file, limit=3) == b"\0\0\0"


class TestWrite:
    async def test_a_new_file(self, guest: GuestChannel, tmp_path: Path) -> None:
        file = tmp_path / "file"
        assert await guest.write(str(file), b"hello", mode=0o600) == 5
        assert file.read_bytes() == b"hello"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600

    async def test_from_a_stream(self, guest: GuestChannel, tmp_path: Path) -> None:
        data = os.urandom(2_000_000)
        await guest.write(str(tmp_path / "file"), pieces(b"", data, b"end"))
        assert (tmp_path / "file").read_bytes() == data + b"end"

    async def test_replacing_keeps_the_mode(self, guest: GuestChannel, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_text("a much longer old content")
        file.chmod(0o755)
        await guest.write(str(file), b"new")
        assert file.read_bytes() == b"new"
        assert stat.S_IMODE(file.stat().st_mode) == 0o755

    async def test_readers_never_see_half_a_file(self, guest: GuestChannel, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_bytes(b"old")
        seen = []

        async def slowly() -> AsyncIterator[bytes]:
            yield b"ne"
            await guest.ping()
            seen.append(file.read_bytes())
            yield b"w"

        await guest.write(str(file), slowly())
        assert seen == [b"old"]
        assert file.read_bytes() == b"new"

    async def test_a_writer_that_fails_leaves_nothing(self, guest: GuestChannel, tmp_path: Path) -> None:
        async def broken() -> AsyncIterator[bytes]:
            yield b"half"
            raise RuntimeError("the client went away")

        with pytest.raises(RuntimeError):
            await guest.write(str(tmp_path / "file"), broken())
        await guest.ping()
        assert list(tmp_path.iterdir()) == []

    async def test_an_agent_that_ends_leaves_nothing(self, guest: GuestChannel, tmp_path: Path, agent: Agent) -> None:
        async def endless() -> AsyncIterator[bytes]:
            yield b"half"
            await guest.ping()
            guest.close()
            yield b"more"

        with pytest.raises(Exception, match="closed"):
            await guest.write(str(tmp_path / "file"), endless())
        agent.process.wait(timeout=30)
        assert list(tmp_path.iterdir()) == []

    async def test_append(self, guest: GuestChannel, tmp_path: Path) -> None:
        for part in (b"one", b"two"):
            await guest.write(str(tmp_path / "file"), part, append=True)
        assert (tmp_path / "file").read_bytes() == b"onetwo"

    async def test_exclusive(self, guest: GuestChannel, tmp_path: Path) -> None:
        await guest.write(str(tmp_path / "file"), b"first", exclusive=True)
        with pytest.raises(FileFailed, match="exists"):
            await guest.write(str(tmp_path / "file"), b"second", exclusive=True)

        async def raced() -> AsyncIterator[bytes]:
            yield b"x"
            await guest.ping()
            (tmp_path / "other").write_bytes(b"was faster")

        with pytest.raises(FileFailed, match="exists"):
            await guest.write(str(tmp_path / "other"), raced(), exclusive=True)
        assert (tmp_path / "other").read_bytes() == b"was faster"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]

    async def test_missing_directories(self, guest: GuestChannel, tmp_path: Path) -> None:
        target = tmp_path / "a" / "b" / "file"
        with pytest.raises(FileFailed):
            await guest.write(str(target), b"x")
        await guest.write(str(target), b"x", parents=True)
        assert target.read_bytes() == b"x"

    async def test_a_link_is_replaced_not_followed(self, guest: GuestChannel, tmp_path: Path) -> None:
        victim = tmp_path / "victim"
        victim.write_bytes(b"untouched")
        (tmp_path / "link").symlink_to(victim)
        await guest.write(str(tmp_path / "link"), b"new")
        assert victim.read_bytes() == b"untouched"
        assert not (tmp_path / "link").is_symlink()

    async def test_what_can_not_be_replaced(self, guest: GuestChannel, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        for path in (tmp_path, tmp_path / "fifo", Path("/dev/null"), Path("/proc/version"), tmp_path / ".."):
            with pytest.raises(FileFailed):
                await guest.write(str(path), b"x")
            with pytest.raises(FileFailed):
                await guest.write(str(path), b"x", append=True)
        assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)

    async def test_no_room(self, guest: GuestChannel, tmp_path: Path, agent: Agent) -> None:
        resource.prlimit(agent.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(FileFailed, match="too large"):
            await guest.write(str(tmp_path / "file"), pieces(*[bytes(60_000)] * 1000))
        assert list(tmp_path.iterdir()) == []


class TestDirectories:
    async def test_make(self, guest: GuestChannel, tmp_path: Path) -> None:
        await guest.mkdir(str(tmp_path / "new"), mode=0o700)
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
        with pytest.raises(FileFailed, match="exists"):
            await guest.mkdir(str(tmp_path / "new"))
        await guest.mkdir(str(tmp_path / "new"), parents=True)
        await guest.mkdir(str(tmp_path / "x" / "y" / "z/"), parents=True)
        assert (tmp_path / "x" / "y" / "z").is_dir()
        (tmp_path / "file").touch()
        with pytest.raises(FileFailed):
            await guest.mkdir(str(tmp_path / "file"), parents=True)
        with pytest.raises(FileFailed):
            await guest.mkdir(str(tmp_path / "file" / "below"), parents=True)

    async def test_move(self, guest: GuestChannel, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("a")
        (tmp_path / "b").write_text("b")
        await guest.move(str(tmp_path / "a"), str(tmp_path / "b"))
        assert [path.read_text() for path in tmp_path.iterdir()] == ["a"]
        with pytest.raises(FileFailed):
            await guest.move(str(tmp_path / "a"), str(tmp_path / "c"))
        with pytest.raises(FileFailed):
            await guest.move("/", str(tmp_path / "c"))


def make_tree(top: Path, outside: Path) -> None:
    for name in ("a", "b/c", "b/d/e", "f"):
        (top / name).mkdir(parents=True)
        for number in range(20):
            (top / name / str(number)).write_text("x")
    (top / "b" / "out").symlink_to(outside)
    (top / "dangling").symlink_to("nowhere")
    os.mkfifo(top / "fifo")


class TestRemove:
    async def test_files_links_and_empty_directories(self, guest: GuestChannel, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "dir").mkdir()
        (tmp_path / "link").symlink_to("/usr")
        for name in ("file", "dir", "link"):
            await guest.remove(str(tmp_path / name))
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(FileFailed, match="No such file"):
            await guest.remove(str(tmp_path / "file"))

    async def test_a_tree_only_when_asked(self, guest: GuestChannel, tmp_path: Path) -> None:
        top, outside = tmp_path / "top", tmp_path / "outside"
        outside.mkdir()
        (outside / "precious").touch()
        make_tree(top, outside)
        with pytest.raises(FileFailed, match="not empty"):
            await guest.remove(str(top))
        await guest.remove(str(top), recursive=True)
        assert not top.exists()
        assert (outside / "precious").exists()

    async def test_a_link_to_a_directory_is_only_a_link(self, guest: GuestChannel, tmp_path: Path) -> None:
        (tmp_path / "dir").mkdir()
        (tmp_path / "dir" / "file").touch()
        (tmp_path / "link").symlink_to("dir")
        await guest.remove(str(tmp_path / "link"), recursive=True)
        assert (tmp_path / "dir" / "file").exists()

    async def test_deeper_than_any_path(self, guest: GuestChannel, tmp_path: Path) -> None:
        fd = os.open(tmp_path, os.O_RDONLY)
        for _ in range(3000):
            os.mkdir("deep", dir_fd=fd)
            below = os.open("deep", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        os.close(fd)
        await guest.remove(str(tmp_path / "deep"), recursive=True)
        assert list(tmp_path.iterdir()) == []

    async def test_others_are_served_meanwhile(self, guest: GuestChannel, tmp_path: Path) -> None:
        top = tmp_path / "top"
        for number in range(40):
            (top / str(number)).mkdir(parents=True)
            for file in range(100):
                (top / str(number) / str(file)).touch()
        removal = asyncio.create_task(guest.remove(str(top), recursive=True))
        await asyncio.sleep(0)
        await guest.ping()
        assert not removal.done()
        await removal

    async def test_what_can_not_be_removed(self, guest: GuestChannel) -> None:
        for path in ("/", "/..", "/usr/..", "/proc/self"):
            with pytest.raises(FileFailed):
                await guest.remove(path, recursive=True)

    async def test_links_swapped_in_meanwhile_lead_nowhere(self, guest: GuestChannel, tmp_path: Path) -> None:
        """A hostile program replaces directories by links to a treasure while the tree is removed."""
        treasure = tmp_path / "treasure"
        (treasure / "0").mkdir(parents=True)
        (treasure / "gold").touch()
        (treasure / "0" / "gold").touch()
        stop = threading.Event()

        def swap() -> None:
            while not stop.is_set():
                for number in range(10):
                    here = tmp_path / "top" / str(number)
                    try:
                        here.rename(tmp_path / f"aside-{number}")
                        here.symlink_to(treasure)
                        here.unlink()
                        (tmp_path / f"aside-{number}").rename(here)
                    except OSError:
                        continue

        racer = threading.Thread(target=swap)
        racer.start()
        try:
            for _ in range(30):
                for number in range(10):
                    (tmp_path / "top" / str(number) / "x" / "y").mkdir(parents=True, exist_ok=True)
                try:
                    await guest.remove(str(tmp_path / "top"), recursive=True)
                except FileFailed:
                    continue
        except OSError:
            pass  # our own mkdir lost the race
        finally:
            stop.set()
            racer.join()
        assert (treasure / "gold").exists()
        assert (treasure / "0" / "gold").exists()


class TestWatch:
    async def test_changes_in_a_directory(self, guest: GuestChannel, tmp_path: Path) -> None:
        watch = guest.watch(str(tmp_path))
        await watch.ready()
        (tmp_path / "file").touch()
        assert await anext(watch) == FileEvent("create", f"{tmp_path}/file")
        await watch.aclose()
        assert all([isinstance(event, FileEvent) async for event in watch])

    async def test_each_kind(self, guest: GuestChannel, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        watch = guest.watch(str(tmp_path) + "/")
        await watch.ready()
        file = tmp_path / "file"
        file.write_text("x")
        file.chmod(0o600)
        file.rename(tmp_path / "moved")
        (tmp_path / "moved").unlink()
        (tmp_path / "sub" / "unseen").touch()
        (tmp_path / "end").touch()
        seen = []
        async for event in watch:
            if event.path.endswith("/end"):
                break
            seen.append((event.kind, Path(event.path).name))
        await watch.aclose()
        assert seen == [
            ("create", "file"), ("write", "file"), ("attrib", "file"), ("rename", "file"), ("create", "moved"),
            ("remove", "moved"),
        ]  # fmt: skip

    async def test_a_whole_tree(self, guest: GuestChannel, tmp_path: Path) -> None:
        (tmp_path / "old" / "deep").mkdir(parents=True)
        watch = guest.watch(str(tmp_path), recursive=True)
        await watch.ready()
        (tmp_path / "old" / "deep" / "one").touch()
        (tmp_path / "new" / "deep").mkdir(parents=True)
        (tmp_path / "new" / "deep" / "two").touch()
        wanted = {"old/deep/one", "new", "new/deep", "new/deep/two"}
        async for event in watch:
            wanted.discard(str(Path(event.path).relative_to(tmp_path)))
            if not wanted:
                break
        (tmp_path / "new").rename(tmp_path / "renamed")
        while await anext(watch) != FileEvent("create", f"{tmp_path}/renamed/deep/two"):
            pass
        (tmp_path / "renamed" / "deep" / "three").touch()
        async for event in watch:
            if event.path == f"{tmp_path}/renamed/deep/three":
                break
        await watch.aclose()

    async def test_writes_through_the_api_show_no_temporary_names(self, guest: GuestChannel, tmp_path: Path) -> None:
        watch = guest.watch(str(tmp_path))
        await guest.write(str(tmp_path / "file"), b"x")
        event = await anext(watch)
        assert (event.kind, event.path) == ("create", str(tmp_path / "file"))
        await watch.aclose()

    async def test_it_ends_with_what_it_watches(self, guest: GuestChannel, tmp_path: Path) -> None:
        top = tmp_path / "top"
        top.mkdir()
        watch = guest.watch(str(top), recursive=True)
        await watch.ready()
        top.rmdir()
        assert [(event.kind, event.path) async for event in watch] == [("remove", str(top))]

    async def test_what_is_not_there(self, guest: GuestChannel, tmp_path: Path) -> None:
        watch = guest.watch(str(tmp_path / "missing"))
        with pytest.raises(FileFailed):
            await watch.ready()
        with pytest.raises(FileFailed):
            await anext(watch)

    async def test_a_reader_that_falls_behind_learns_so(self, guest: GuestChannel, tmp_path: Path) -> None:
        watch = guest.watch(str(tmp_path))
        await watch.ready()
        flood = guest.exec(
            shell(f"cd {tmp_path}; i=0; while [ $i -lt 3000 ]; do : >$i; : >>$i; rm $i; i=$((i+1)); done")
        )
        await flood.wait()
        await guest.ping()
        seen = [await anext(watch)]
        while len(watch._events):
            seen.append(await anext(watch))
        assert "overflow" in {event.kind for event in seen}
        assert len(seen) <= 4096
        await watch.aclose()

    async def test_a_flood_of_events_stalls_nothing(self, guest: GuestChannel, tmp_path: Path) -> None:
        watch = guest.watch(str(tmp_path), recursive=True)
        flood = guest.exec(shell(f"cd {tmp_path}; while :; do mkdir -p a/b/c; rm -r a; done"))
        for _ in range(50):
            await guest.ping()
        flood.signal(signal.SIGKILL, group=True)
        await flood.wait()
        await watch.aclose()
        await guest.ping()
