"""Ordinary programs do their work under each level's filter, limits and empty capabilities.

Which files they see is the levels' own matter and not tried here.
"""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.confine.child import in_child

from tartarus.model.sandbox import Isolation, Resources
from tartarus.runtimes.confine.caps import add_capability_drop
from tartarus.runtimes.confine.keyring import add_keyring
from tartarus.runtimes.confine.rlimits import add_rlimits
from tartarus.runtimes.confine.seccomp import add_seccomp

if TYPE_CHECKING:
    from pathlib import Path

    from tartarus.guest.program import Program

LEVELS = pytest.mark.parametrize("level", [Isolation.CONTAINER, Isolation.PROCESS], ids=lambda level: level.value)


def run(level: Isolation, argv: list[str], home: Path) -> tuple[int, str]:
    """Exit code and all output of a program that works in `home`."""

    def setup(program: Program) -> None:
        add_rlimits(program, Resources(pids=4096), level)
        add_keyring(program)
        add_capability_drop(program)
        if level is Isolation.PROCESS:
            add_seccomp(program, level, own_uid=True, landlock_abi=7)
        else:
            add_seccomp(program, level)

    def work() -> tuple[int, str]:
        environment = {"HOME": str(home), "TMPDIR": str(home), "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        done = subprocess.run(
            argv, cwd=home, env=environment, check=False, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done.returncode, done.stdout

    found: tuple[int, str] = in_child(work, setup=setup)
    return found


PYTHON = """
import asyncio, concurrent.futures as pools, hashlib, mmap, os, pathlib, shutil, sqlite3, ssl, subprocess, tempfile, threading
with pools.ThreadPoolExecutor(4) as pool:
    assert sum(pool.map(int, "1234")) == 10
async def main():
    child = await asyncio.create_subprocess_exec("cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return (await child.communicate(b"x"))[0]
assert asyncio.run(main()) == b"x"
with tempfile.TemporaryDirectory() as place:
    path = pathlib.Path(place, "f"); path.touch(); path.write_bytes(b"x" * 4096); path.chmod(0o640)
    shutil.copy2(path, path.with_name("g")); os.sendfile
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as area: area[0] = 1; area.flush()
    base = sqlite3.connect(f"{place}/db"); base.execute("create table t(a)"); base.commit(); base.close()
ssl.create_default_context()
pid = os.fork()
if not pid: os._exit(0)
os.waitpid(pid, 0)
print("fine")
"""

POOL = """
import concurrent.futures as pools
if __name__ == "__main__":
    with pools.ProcessPoolExecutor(2) as pool: print(sum(pool.map(int, "1234")))
"""

SERVER = """
import http.server, threading, urllib.request
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/").status)
"""

NODE = """
const fs = require("fs"), child = require("child_process"), { Worker } = require("worker_threads");
fs.writeFileSync("a", "x"); fs.copyFileSync("a", "b"); fs.chmodSync("b", 0o700); fs.watch(".").close();
if (process.memoryUsage().rss < 1 || require("crypto").randomBytes(8).length !== 8) throw "odd";
new Worker("require('worker_threads').parentPort.postMessage(6 * 7)", { eval: true }).on("message", (n) =>
  console.log(child.execSync("echo " + n).toString().trim()));
"""

JAVA = """
import java.nio.file.*; import java.util.stream.*;
class A { public static void main(String[] a) throws Exception {
  Files.writeString(Path.of("f"), "x"); Process p = new ProcessBuilder("true").start();
  System.out.println(IntStream.range(0, 1000).parallel().sum() + p.waitFor()); } }
"""


@pytest.mark.needs("system-python")
@LEVELS
def test_python(level: Isolation, tmp_path: Path) -> None:
    assert run(level, [_python(), "-c", PYTHON], tmp_path) == (0, "fine\n")


@pytest.mark.needs("system-python")
def test_python_pools_and_servers(tmp_path: Path) -> None:
    """Named semaphores and sockets: only where there are namespaces for the names."""
    assert run(Isolation.CONTAINER, [_python(), "-c", POOL], tmp_path) == (0, "10\n")
    code, output = run(Isolation.CONTAINER, [_python(), "-c", SERVER], tmp_path)
    assert (code, output.splitlines()[-1]) == (0, "200")


def _python() -> str:
    return next(path for path in ("/usr/bin/python3", "/usr/local/bin/python3") if os.path.exists(path))


@pytest.mark.needs("cc", "make")
@LEVELS
def test_building(level: Isolation, tmp_path: Path) -> None:
    (tmp_path / "a.c").write_text('#include <stdio.h>\nint main(void) { puts("built"); return 3; }\n')
    (tmp_path / "Makefile").write_text("all: a b\na: a.c\n\tcc -O2 -o a a.c\nb: a.c\n\tcc -pipe -static -o b a.c\n")
    code, output = run(level, ["sh", "-c", "make -j2 >/dev/null && ./a && exit 1; ./b"], tmp_path)
    assert (code, output) == (3, "built\nbuilt\n")


@pytest.mark.needs("git")
@LEVELS
def test_git(level: Isolation, tmp_path: Path) -> None:
    script = """
        set -e; git init -q r; cd r; git config user.email a@b.c; git config user.name n
        echo x > f; git add f; git commit -qm first; git branch other; git gc -q
        git clone -q . ../copy; cd ../copy; git log --format=%s
    """
    assert run(level, ["sh", "-c", script], tmp_path) == (0, "first\n")


@pytest.mark.needs("busybox")
@LEVELS
def test_busybox(level: Isolation, tmp_path: Path) -> None:
    script = """
        mkdir d; echo x > d/f; touch -d @5 d/f; chmod 700 d/f; tar czf t.tgz d; rm -r d; tar xzf t.tgz
        find d -type f | xargs wc -c; (sleep 0.01 & wait); mkfifo p; (echo through > p &) ; cat p; date +%Y >/dev/null; ls -l d | wc -l
    """
    code, output = run(level, ["busybox", "sh", "-ec", script], tmp_path)
    assert (code, output.split()) == (0, ["2", "d/f", "through", "2"])


@pytest.mark.needs("perl")
@LEVELS
def test_perl_and_bash(level: Isolation, tmp_path: Path) -> None:
    script = (
        "cat <(echo sub); perl -e 'print fork ? wait > 0 : exit'; echo; kill -0 $$; ulimit -n; time true 2>/dev/null"
    )
    code, output = run(level, ["bash", "-c", script], tmp_path)
    assert (code, output.split()[:3]) == (0, ["sub", "1", "1024"])


@pytest.mark.needs("node")
@LEVELS
def test_node(level: Isolation, tmp_path: Path) -> None:
    assert run(level, ["node", "-e", NODE], tmp_path) == (0, "42\n")


@pytest.mark.needs("java")
@LEVELS
def test_java(level: Isolation, tmp_path: Path) -> None:
    (tmp_path / "A.java").write_text(JAVA)
    assert run(level, ["java", "A.java"], tmp_path) == (0, "499500\n")


@LEVELS
def test_core_dumps_are_off_and_stay_off(level: Isolation, tmp_path: Path) -> None:
    code, output = run(level, ["sh", "-c", "ulimit -c 0; ulimit -c unlimited; kill -SEGV $$"], tmp_path)
    assert code == -11, output
    assert list(tmp_path.iterdir()) == []
