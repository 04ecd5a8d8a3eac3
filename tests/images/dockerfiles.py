"""Building Dockerfiles in tests: bases are directories, and a RUN runs for real, in a chroot over a real overlay."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tartarus.images import LayerStore
from tartarus.images.dockerfile import Base, BuildRequest, Built, Event, Output, RunStep, build
from tartarus.images.oci import ImageConfig
from tartarus.images.stackview import Entry, StackView
from tartarus.model.errors import ImageNotFound

UID_BASE = 0x7000_0000 if os.geteuid() == 0 else None


class Runner:
    """A StepRunner. `bases` are what FROM may name; `ran` the steps that were run; `kept` the failed ones."""

    def __init__(self, place: Path, bases: Mapping[str, Base]) -> None:
        self.place = place
        self.bases = bases
        self.asked: list[str] = []
        self.ran: list[RunStep] = []
        self.kept: list[tuple[tuple[Path, ...], ImageConfig]] = []
        self.before: Callable[[RunStep], Any] = lambda step: None

    async def base(self, reference: str, say: Callable[[str], None]) -> Base:
        self.asked.append(reference)
        if reference not in self.bases:
            raise ImageNotFound(f"no image {reference!r}")
        say(f"found {reference}")
        return self.bases[reference]

    async def run(self, step: RunStep, tree: Path, lock: int, output: Output) -> int:
        assert os.fstat(lock)
        self.ran.append(step)
        self.before(step)
        return await asyncio.to_thread(self._run, step, tree, output)

    async def keep_failed(self, layers: tuple[Path, ...], config: ImageConfig) -> str:
        self.kept.append((layers, config))
        return "build-test-failed"

    def _run(self, step: RunStep, tree: Path, output: Output) -> int:
        """Run as root in a mount namespace of its own: unconfined, which tests of our own commands may be."""
        root, work = self.place / "root", self.place / "work"
        for place in (root, work):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
        lower = ":".join(str(layer) for layer in step.layers)
        script = f"""
        set -e
        mount -t overlay overlay -o "userxattr,lowerdir={lower},upperdir={tree},workdir={work}" {root}
        exec chroot {root} /bin/busybox env -i "$@"
        """
        env = [f"{name}={value}" for name, value in {"HOME": "/root", **step.env}.items()]
        inside = ["/bin/busybox", "sh", "-c", 'cd "$0" && exec "$@"', step.workdir, *step.argv]
        argv = ["unshare", "--mount", "--fork", "--kill-child", "sh", "-c", script, "sh", *env, *inside]
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
            check=False,
        )
        output(1, done.stdout)
        return done.returncode


class Bench:
    """A place to build in: `context`, a layer store, a base `base` with a busybox and some accounts."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.context = place / "context"
        self.context.mkdir()
        self.store = LayerStore(place / "layers")
        self.events: list[Event] = []
        self.bases: dict[str, Base] = {}
        self.runner = Runner(place, self.bases)

    def base(self, name: str, fill: Callable[[Path], object], config: ImageConfig | None = None) -> Path:
        """Make a base of one layer, on top of another base's layers when `name` is ``new on old``."""
        name, _, below = name.partition(" on ")
        tree = self.place / f"base-{name}"
        tree.mkdir(mode=0o755)
        fill(tree)
        if UID_BASE is not None:
            for folder, folders, files in os.walk(tree):
                for each in [".", *folders, *files]:
                    path = os.path.join(folder, each)
                    if os.lstat(path).st_uid < UID_BASE:
                        os.chown(path, UID_BASE, UID_BASE, follow_symlinks=False)
        layers = (tree, *(self.bases[below].layers if below else ()))
        self.bases[name] = Base(layers=layers, config=config or ImageConfig(), key=f"key of {name}")
        return tree

    def write(self, *paths: str, content: str | None = None) -> None:
        """Make files in the context that contain their own paths, or `content`."""
        for path in paths:
            (self.context / path).parent.mkdir(parents=True, exist_ok=True)
            (self.context / path).write_text(path if content is None else content)

    async def build(self, dockerfile: str, **options: Any) -> Built:
        """Build, collecting the events."""
        self.events.clear()
        request = BuildRequest(**{"dockerfile": dockerfile, "context": self.context, **options})
        return await build(request, self.runner, self.store, UID_BASE, self.events.append)

    def told(self, kind: str) -> list[str]:
        """The texts of the last build's events of one kind."""
        return [event.text for event in self.events if event.kind == kind]


def with_busybox(tree: Path) -> None:
    """A root file system: busybox, accounts, and the merged /usr of Debian."""
    for name in ("usr/bin", "usr/lib", "etc", "tmp", "root", "dev"):
        (tree / name).mkdir(parents=True)
    (tree / "tmp").chmod(0o1777)
    (tree / "bin").symlink_to("usr/bin")
    (tree / "lib").symlink_to("usr/lib")
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, tree / "usr/bin/busybox")
    for name in ("sh", "cat", "ls", "rm", "stat", "mkdir", "touch", "env", "pwd"):
        (tree / "usr/bin" / name).symlink_to("busybox")
    accounts(tree)


def accounts(tree: Path) -> None:
    """/etc/passwd and /etc/group with a root and an `app` of the group `staff`."""
    (tree / "etc").mkdir(exist_ok=True)
    (tree / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\napp:x:1000:50::/home/app:/bin/sh\n")
    (tree / "etc/group").write_text("root:x:0:\nstaff:x:50:\nwheel:x:10:app\n")


def tree_of(layers: tuple[Path, ...]) -> dict[str, str]:
    """All that the stack shows, by path: ``dir``, ``-> target``, or a file's content."""
    shown: dict[str, str] = {}
    if not layers:
        return shown
    with StackView(layers, UID_BASE) as view:
        for step in view.walk():
            base = step.path.rstrip("/")
            shown.update({f"{base}/{name}": "dir" for name in step.dirs})
            for name in step.links:
                entry = view.resolve(f"{base}/{name}", follow=False)
                assert entry is not None
                shown[f"{base}/{name}"] = f"-> {entry.target}"
            for name in step.files:
                shown[f"{base}/{name}"] = view.read(f"{base}/{name}", 1 << 23).decode("utf-8", "replace")
    return shown


def files_of(layers: tuple[Path, ...]) -> dict[str, str]:
    """The same without directories."""
    return {path: what for path, what in tree_of(layers).items() if what != "dir"}


def entry_of(layers: tuple[Path, ...], path: str) -> Entry:
    """What is at `path`, a link at its end not followed."""
    with StackView(layers, UID_BASE) as view:
        entry = view.resolve(path, follow=False)
    assert entry is not None
    return entry
