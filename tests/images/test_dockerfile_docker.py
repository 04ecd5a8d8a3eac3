"""The same Dockerfile built by Docker's own builder and by ours: the same files, the same configuration."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import stat
import subprocess
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.compat.engine import Engine, dockerd
from tests.images.dockerfiles import UID_BASE, Bench, tree_of

from tartarus.images.dockerfile import Built
from tartarus.images.stackview import StackView

pytestmark = [pytest.mark.anyio, pytest.mark.needs("dockerd", "root")]

COPIES = """
FROM scratch AS one
COPY a /x
COPY a /y/
COPY d /z
COPY d/ /z2/
COPY d b /w/
COPY * /star/
COPY d/[es]* /under/
COPY [ab] /class/
COPY link /followed
COPY folder /followed-folder
COPY ["sp ace", "/sp ace"]
WORKDIR /work/sub
COPY a .
COPY a ../up
COPY a /z/
ADD t.tar /tar
ADD t.tar.gz /targz/
ADD not.tar.gz /not/
ADD d /added
COPY --chown=5 a /own5
COPY --chown=5:6 d /own56
"""
IGNORED = "FROM scratch\nCOPY . /all/\nCOPY d /d/\n"
CONFIGURATION = """
ARG G=global
FROM scratch
ARG G
ARG X=1
ENV A=$X B="a b" C='$A' D=${N:-def} E=\\$X F=a\\ b
ENV A=2 H=$A I=${A:+set}${NONE:+unset}
ENV old form  with blanks
ENV J=${G}x K="${G:-"y"}" L="it's" M='say "x"' N="\\"q\\""
ARG A=3
ENV O=$A PATH=/opt:$PATH
LABEL l=$A "m n"='o p' q="$B"
EXPOSE 80 53/udp 8000-8002
WORKDIR w
WORKDIR $X
SHELL ["/s", "-c"]
CMD echo $A
ENTRYPOINT ["x", "$A"]
HEALTHCHECK --interval=5s CMD foo bar
STOPSIGNAL SIGTERM
USER $X:2
"""


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path)
    bench.write("a", "b", "d/e", "d/sub/g", "d/sub/deep/h", "lib/l", "sp ace", "other/x.log", "other/keep.log")
    os.symlink("a", bench.context / "link")
    os.symlink("lib", bench.context / "folder")
    os.symlink("/nowhere", bench.context / "d/dangling")
    (bench.context / "d/sub").chmod(0o700)
    (bench.context / "d/e").chmod(0o751)
    os.chown(bench.context / "a", 4321, 4321)
    with tarfile.open(bench.context / "t.tar", "w") as archive:
        for name in ("d", "lib", "a", "sp ace"):
            archive.add(bench.context / name, name)
    subprocess.run(["gzip", "-k", bench.context / "t.tar"], check=True)
    (bench.context / "not.tar.gz").write_bytes(gzip.compress(b"no archive" * 100))
    return bench


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with dockerd() as engine:
        yield engine


@pytest.fixture
def docker(bench: Bench, engine: Engine) -> Iterator[Any]:
    """Builds with Docker's own builder, and removes what it made."""
    name = f"tartarus-test-{uuid.uuid4().hex[:12]}"
    environ = {**os.environ, "DOCKER_BUILDKIT": "0", "DOCKER_HOST": f"unix://{engine.socket}"}

    def run(*argv: str) -> bytes:
        done = subprocess.run(["docker", *argv], check=False, capture_output=True, timeout=120, env=environ)
        assert done.returncode == 0, done.stderr
        return bytes(done.stdout)

    def build(text: str) -> tuple[dict[str, str], dict[str, Any]]:
        (bench.context / "Dockerfile").write_text(text)
        run("build", "-q", "-t", name, str(bench.context))
        config = json.loads(run("inspect", name, "--format", "{{json .Config}}"))
        container = run("create", name, "x").decode().strip()
        try:
            exported = run("export", container)
        finally:
            run("rm", container)
        return facts_of(exported), config

    yield build
    run("rmi", name)


# What the engine adds to every container.
_ENGINE = ("dev", "etc", "proc", "sys", ".dockerenv")


def facts_of(exported: bytes) -> dict[str, str]:
    facts: dict[str, str] = {}
    with tarfile.open(fileobj=io.BytesIO(exported)) as archive:
        for member in archive:
            name = member.name.rstrip("/")
            if name.split("/")[0] in _ENGINE:
                continue
            # A hard link in an export is one of two names of a file; ours are copies.
            what = member.linkname if member.issym() else ""
            kind = "l" if member.issym() else "d" if member.isdir() else "f"
            content = archive.extractfile(member) if kind == "f" else None
            data = content.read().hex() if content is not None else ""
            facts[f"/{name}"] = f"{kind} {member.mode & 0o1777:o} {member.uid}:{member.gid} {what}{data}"
    return facts


def ours(built: Built) -> dict[str, str]:
    facts: dict[str, str] = {}
    with StackView(built.layers, UID_BASE) as view:
        for path in tree_of(built.layers):
            entry = view.resolve(path, follow=False)
            assert entry is not None
            data = view.read(path, 1 << 20).hex() if entry.kind == "file" else ""
            kind = {"file": "f", "dir": "d", "symlink": "l"}[entry.kind]
            mode = stat.S_IMODE(entry.mode) & 0o1777
            facts[path] = f"{kind} {mode:o} {entry.uid}:{entry.gid} {entry.target}{data}"
    return facts


async def test_copies_are_docker_s(bench: Bench, docker):
    theirs, _ = docker(COPIES)
    assert ours(await bench.build(COPIES)) == theirs


@pytest.mark.parametrize(
    "ignore",
    ["other\n!other/keep.log\n**/sub/**\n", "*\n!d\n!other/k*\nd/sub\n", "d/*\n!d/sub/deep\no*r\n/a\n**/*.md\n"],
)  # fmt: skip
async def test_what_is_ignored_is_docker_s(bench: Bench, docker, ignore):
    (bench.context / ".dockerignore").write_text(ignore + ".dockerignore\nDockerfile\n")
    # A directory of which only something inside is kept: its mode is lost on the way to Docker's old builder.
    (bench.context / "d/sub").chmod(0o755)
    theirs, _ = docker(IGNORED)
    assert ours(await bench.build(IGNORED)) == theirs


async def test_the_configuration_is_docker_s(bench: Bench, docker):
    shutil.rmtree(bench.context)
    bench.context.mkdir()
    _, theirs = docker(CONFIGURATION)
    config = (await bench.build(CONFIGURATION)).config
    assert {
        "User": config.user,
        "ExposedPorts": {port: {} for port in config.exposed_ports},
        "Env": sorted(f"{name}={value}" for name, value in config.env.items()),
        "Entrypoint": list(config.entrypoint),
        "Cmd": list(config.cmd),
        "WorkingDir": config.workdir,
        "Labels": config.labels,
        "StopSignal": config.stop_signal,
        "Healthcheck": {"Test": list(config.healthcheck), "Interval": 5_000_000_000},
        "Shell": list(config.shell),
    } == {**theirs, "Env": sorted(theirs["Env"])}
