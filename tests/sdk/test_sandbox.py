"""The blocking client against the real daemon and real sandboxes."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from tartarus import Sandbox, TartarusError
from tartarus.model.errors import (
    CommandNotFound,
    FileFailed,
    InvalidRequest,
    InvalidState,
    NameTaken,
    NotExecutable,
    SandboxNotFound,
    TemplateNotFound,
    TimeLimit,
)
from tartarus.model.sandbox import Reason
from tartarus.model.states import State
from tartarus.sdk import Client, CodeFailed, CommandFailed, CommandTimedOut
from tartarus.sdk.copying import Observer, copy_in, copy_out


class TestRun:
    def test_result(self, sandbox):
        result = sandbox.run(["sh", "-c", "echo out; echo err >&2; exit 3"])
        assert (result.stdout, result.stderr, result.exit_code, result.ok) == ("out\n", "err\n", 3, False)
        assert result.duration_ms > 0

    def test_bytes_are_kept(self, sandbox):
        data = bytes(range(256)) * 5000
        assert sandbox.run(["cat"], input=data).stdout_bytes == data

    def test_input_larger_than_every_buffer_while_output_flows(self, sandbox):
        result = sandbox.run(["sh", "-c", "tee /dev/stderr | wc -c"], input=bytes(20_000_000))
        assert result.stdout.strip() == "20000000"
        assert len(result.stderr_bytes) == 20_000_000

    def test_input_that_nobody_reads(self, sandbox):
        assert sandbox.run(["true"], input=bytes(20_000_000)).ok

    def test_a_flood_is_cut(self, sandbox):
        result = sandbox.run(["head", "-c", "50000000", "/dev/zero"], max_output_bytes=1000)
        assert len(result.stdout_bytes) == 1000
        assert result.truncated
        assert result.ok

    def test_environment_and_directory(self, sandbox):
        sandbox.files.mkdir("/tmp/there")
        result = sandbox.run(["sh", "-c", "echo $A; pwd"], env={"A": "b"}, workdir="/tmp/there")
        assert result.stdout.splitlines() == ["b", "/tmp/there"]

    def test_signal(self, sandbox):
        result = sandbox.run(["sh", "-c", "kill -9 $$"])
        assert (result.exit_code, result.signal) == (137, 9)

    def test_check(self, sandbox):
        with pytest.raises(CommandFailed, match="sh exited with status 3: no good") as caught:
            sandbox.run(["sh", "-c", "echo no good >&2; exit 3"], check=True)
        assert caught.value.result is not None
        assert caught.value.result.exit_code == 3
        assert sandbox.run(["true"], check=True).ok

    def test_time_limit(self, sandbox):
        with pytest.raises(CommandTimedOut, match=r"longer than 0\.3 s") as caught:
            sandbox.run(["sh", "-c", "echo before; sleep 60"], timeout_s="300ms")
        assert caught.value.result is not None
        assert caught.value.result.stdout == "before\n"

    def test_what_can_not_be_run(self, sandbox):
        with pytest.raises(CommandNotFound):
            sandbox.run(["no-such-command"])
        with pytest.raises(NotExecutable):
            sandbox.run(["/etc/passwd"])
        with pytest.raises(InvalidRequest, match="can't be entered"):
            sandbox.run(["true"], workdir="/nowhere")
        with pytest.raises(InvalidRequest, match="not UTF-8"):
            sandbox.run(["echo", "\udcff"])
        assert sandbox.run(["true"]).ok


class TestStart:
    def test_conversation(self, sandbox):
        with sandbox.start(["cat"], stdin=True) as process:
            assert process.pid > 0
            chunks = iter(process)
            for text in ("one\n", "two\n"):
                process.write(text)
                assert next(chunks).text == text
            process.close_stdin()
            assert getattr(process, "exit_code") is None  # noqa: B009 - mypy would keep the answer
            assert process.wait().exit_code == 0
            assert process.exit_code == 0
            with pytest.raises(InvalidState):
                process.write("too late")

    def test_both_streams_in_order(self, sandbox):
        with sandbox.start(["sh", "-c", "echo a; sleep 0.1; echo b >&2; sleep 0.1; echo c"]) as process:
            assert [(chunk.stream, chunk.text) for chunk in process] == [
                ("stdout", "a\n"), ("stderr", "b\n"), ("stdout", "c\n"),
            ]  # fmt: skip

    def test_signals(self, sandbox):
        with sandbox.start(
            ["sh", "-c", "trap 'echo caught' USR1; echo ready; while :; do sleep 0.05; done"]
        ) as process:
            chunks = iter(process)
            assert next(chunks).text == "ready\n"
            process.signal(signal.SIGUSR1)
            assert next(chunks).text == "caught\n"
            process.kill()
            assert process.wait().signal == signal.SIGKILL

    def test_closing_kills(self, sandbox):
        with sandbox.start(["sh", "-c", "echo $$ > /tmp/pid; echo ready; exec sleep 1000"]) as process:
            next(iter(process))
        script = "while kill -0 $(cat /tmp/pid) 2>/dev/null; do sleep 0.05; done"
        assert sandbox.run(["sh", "-c", script], timeout_s=20).ok

    def test_a_terminal(self, sandbox):
        script = "tty >/dev/null && stty size; read x; stty size"
        with sandbox.start(["sh", "-c", script], stdin=True, tty=True, rows=30, cols=90) as process:
            chunks = iter(process)
            assert next(chunks).text.strip() == "30 90"
            process.resize(31, 91)
            process.write("\n")
            assert process.wait().stdout.split() == ["31", "91"]

    def test_one_thread_reads_while_another_writes(self, sandbox):
        got: list[bytes] = []
        with sandbox.start(["cat"], stdin=True) as process:
            reader = threading.Thread(target=lambda: got.extend(chunk.data for chunk in process))
            reader.start()
            for number in range(200):
                process.write(f"{number}".encode() * 100_000)
            process.close_stdin()
            reader.join(60)
        assert len(b"".join(got)) == sum(len(str(number)) * 100_000 for number in range(200))

    def test_closing_wakes_the_thread_that_reads(self, sandbox):
        failures: list[BaseException] = []
        process = sandbox.start(["sleep", "1000"])

        def read() -> None:
            try:
                list(process)
            except TartarusError as error:
                failures.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        process.close()
        reader.join(30)
        assert not reader.is_alive()
        assert len(failures) == 1


class TestCode:
    def test_variables_last(self, sandbox):
        assert sandbox.run_code("x = 41").text is None
        result = sandbox.run_code("print('hi'); x + 1")
        assert (result.stdout, result.text, result.ok) == ("hi\n", "42", True)

    def test_errors(self, sandbox):
        result = sandbox.run_code("1/0")
        assert result.error is not None
        assert result.error.name == "ZeroDivisionError"
        assert "1/0" in result.error.traceback
        with pytest.raises(CodeFailed, match="ZeroDivisionError: division by zero"):
            sandbox.run_code("1/0", check=True)

    def test_output_while_it_runs(self, sandbox):
        seen: list[str] = []
        sandbox.run_code(
            "import sys\nprint('a'); print('b', file=sys.stderr)", on_stdout=seen.append, on_stderr=seen.append
        )
        assert "".join(sorted("".join(seen).split())) == "ab"

    def test_rich_results(self, sandbox):
        code = "class H:\n def _repr_html_(self): return '<b>'\n def _repr_png_(self): return b'png'\nH()"
        result = sandbox.run_code(code)
        assert (result.html, result.png) == ("<b>", b"png")

    def test_time_limit_keeps_the_variables(self, sandbox):
        sandbox.run_code("y = 1")
        assert sandbox.run_code("while True: pass", timeout_s=0.5).error is not None
        assert sandbox.run_code("y").text == "1"

    def test_contexts_are_apart(self, sandbox):
        sandbox.run_code("z = 1")
        with sandbox.open_context() as context:
            assert not context.run("z").ok
            context.run("z = 2")
            assert context.run("z").text == "2"
        assert sandbox.run_code("z").text == "1"
        with pytest.raises(TartarusError):
            context.run("z")

    def test_interrupt(self, sandbox):
        with sandbox.open_context() as context:
            running = threading.Event()
            results = []
            code = "print('on', flush=True)\nimport time\nwhile True: time.sleep(0.01)"
            thread = threading.Thread(
                target=lambda: results.append(context.run(code, on_stdout=lambda _: running.set())), daemon=True
            )
            thread.start()
            assert running.wait(30)
            context.interrupt()
            thread.join(30)
            assert results[0].error.name == "KeyboardInterrupt"


class TestFiles:
    def test_round_trip(self, sandbox):
        data = os.urandom(3_000_000)
        sandbox.files.write("/work/deep/er/file", data, mode=0o751)
        assert sandbox.files.read("/work/deep/er/file") == data
        info = sandbox.files.stat("/work/deep/er/file")
        assert (info.kind, info.size, info.mode) == ("file", len(data), 0o751)
        sandbox.files.write("/work/deep/er/file", "tëxt")
        assert sandbox.files.read_text("/work/deep/er/file") == "tëxt"
        assert sandbox.files.stat("/work/deep/er/file").mode == 0o751

    def test_pieces_and_files(self, sandbox, tmp_path):
        sandbox.files.write("/work/p", iter([b"a", b"", b"b" * 600_000]))
        with sandbox.files.open("/work/p") as parts:
            assert b"".join(parts) == b"a" + b"b" * 600_000
        (tmp_path / "f").write_bytes(b"from a file")
        with (tmp_path / "f").open("rb") as file:
            sandbox.files.write("/work/q", file)
        assert sandbox.files.read("/work/q") == b"from a file"

    def test_a_write_that_breaks_off_leaves_what_was_there(self, sandbox):
        def broken():
            yield b"half"
            raise RuntimeError("the source failed")

        sandbox.files.write("/work/x", b"whole")
        with pytest.raises(RuntimeError):
            sandbox.files.write("/work/x", broken())
        assert sandbox.files.read("/work/x") == b"whole"
        assert [entry.path for entry in sandbox.files.list("/work")] == ["/work/x"]

    def test_names(self, sandbox):
        odd = "/work/ä ? & % #+\n'\"\\"
        sandbox.files.write(odd, b"1")
        assert sandbox.files.exists(odd)
        sandbox.files.move(odd, "/work/plain")
        assert not sandbox.files.exists(odd)
        assert sandbox.files.read("/work/plain") == b"1"
        sandbox.files.mkdir("/work/d/e")
        sandbox.files.write("/work/d/e/f", b"")
        with pytest.raises(FileFailed, match="not empty"):
            sandbox.files.remove("/work/d")
        sandbox.files.remove("/work/d", recursive=True)
        assert not sandbox.files.exists("/work/d")

    def test_refusals(self, sandbox):
        with pytest.raises(FileFailed, match="No such file"):
            sandbox.files.read("/nowhere")
        with pytest.raises(FileFailed, match="Is a directory"), sandbox.files.open("/work"):
            pass
        for path in ("relative", "", "/with\0nul"):
            with pytest.raises(InvalidRequest):
                sandbox.files.read(path)

    def test_watch_sees_what_happens_after_it_began(self, sandbox):
        sandbox.files.mkdir("/work/w")
        with sandbox.files.watch("/work/w") as events:
            sandbox.run(["touch", "/work/w/new"])
            event = next(events)
            assert (event.kind, event.path) == ("create", "/work/w/new")
        with pytest.raises(FileFailed), sandbox.files.watch("/nowhere"):
            pass

    def test_copying_both_ways(self, sandbox, tmp_path):
        class Seen(Observer):
            def skipped(self, path, why):  # noqa: ARG002 - the base has it
                skipped.append(path)

        skipped: list[str] = []
        source = tmp_path / "tree"
        (source / "sub").mkdir(parents=True)
        (source / "run.sh").write_text("#!/bin/sh\necho copied\n")
        (source / "run.sh").chmod(0o755)
        (source / "sub/data").write_bytes(os.urandom(700_000))
        os.mkfifo(source / "fifo")
        copy_in(sandbox.files, str(source), "/work", Seen())
        assert sandbox.run(["/work/tree/run.sh"]).stdout == "copied\n"
        assert skipped == [str(source / "fifo")]
        sandbox.run(["sh", "-c", "cd /work/tree && ln -s sub/data in && ln -s /etc/passwd out && mkfifo pipe"])
        skipped.clear()
        copy_out(sandbox.files, "/work/tree", str(tmp_path / "back"), Seen())
        assert (tmp_path / "back/sub/data").read_bytes() == (source / "sub/data").read_bytes()
        assert (tmp_path / "back/run.sh").stat().st_mode & 0o777 == 0o755
        assert os.readlink(tmp_path / "back/in") == "sub/data"
        assert sorted(skipped) == ["/work/tree/out", "/work/tree/pipe"]


@pytest.mark.usefixtures("home")
class TestLife:
    def test_the_block_ends_it(self):
        with Sandbox.create() as sandbox:
            assert sandbox.info.state is State.RUNNING
        record = sandbox.wait(30)
        assert (record.state, record.reason) == (State.KILLED, Reason.USER_REQUEST)
        sandbox.kill()
        with pytest.raises(InvalidState):
            sandbox.run(["true"])

    def test_a_connection_leaves_it(self, sandbox):
        with Sandbox.connect(sandbox.id) as other:
            assert other.run(["true"]).ok
        assert sandbox.refresh().state is State.RUNNING

    def test_names_labels_and_lists(self):
        with Sandbox.create(name="first", labels={"team": "red"}) as first, Sandbox.create(labels={"team": "blue"}):
            with pytest.raises(NameTaken):
                Sandbox.create(name="first")
            assert Sandbox.connect("first").id == first.id
            assert [found.id for found in Sandbox.list(labels={"team": "red"})] == [first.id]
            assert len(Sandbox.list()) == 2
            assert len(Sandbox.list(limit=1)) == 1
            Sandbox.kill("first")
            assert first.wait(30).state is State.KILLED
            assert first.id in [found.id for found in Sandbox.list(states=["killed"])]

    def test_what_is_not_there(self):
        with pytest.raises(SandboxNotFound):
            Sandbox.connect("nobody")
        with pytest.raises(SandboxNotFound):
            Sandbox.kill("sbx-nobody")
        with pytest.raises(TemplateNotFound):
            Sandbox.create("no-such-template")

    def test_pause(self, sandbox):
        sandbox.pause()
        assert sandbox.info.state is State.PAUSED
        with pytest.raises(InvalidState):
            sandbox.run(["true"])
        sandbox.resume()
        assert sandbox.run(["true"]).ok

    def test_deadline(self):
        with Sandbox.create(timeout_s=0.5) as sandbox:
            record = sandbox.wait(30)
            assert (record.state, record.reason) == (State.TIMED_OUT, Reason.TIMEOUT)

    def test_waiting_has_a_limit_of_its_own(self, sandbox):
        with pytest.raises(TimeLimit, match=r"did not end within 0\.1 s"):
            sandbox.wait(0.1)

    def test_main_command_and_its_log(self):
        with Sandbox.create(command=["sh", "-c", "echo out; echo err >&2; exit 7"]) as sandbox:
            record = sandbox.wait(30)
            assert (record.state, record.exit_code) == (State.FAILED, 7)
            entries = list(sandbox.logs(follow=True))
            assert {(entry.stream, entry.data) for entry in entries} == {("stdout", b"out\n"), ("stderr", b"err\n")}

    def test_attach(self):
        command = ["sh", "-c", "trap 'echo bye; exit 5' TERM; echo on; while :; do sleep 0.05; done"]
        with Sandbox.create(command=command) as sandbox:
            logs = sandbox.logs(follow=True)
            assert next(logs).data == b"on\n"
            with sandbox.attach() as process:
                sandbox.signal(signal.SIGTERM)
                result = process.wait()
                assert (result.stdout, result.exit_code) == ("bye\n", 5)

    def test_stats(self, sandbox):
        sandbox.run(["sh", "-c", ":"])
        stats = sandbox.stats()
        assert stats.memory_bytes > 0
        assert stats.cpu_usec > 0

    def test_limits_are_in_the_record(self):
        with Sandbox.create(memory="64MiB", cpus=0.5, pids=50, disk="100MiB") as sandbox:
            resources = sandbox.refresh().spec.resources
            assert (resources.memory_bytes, resources.cpu_milli, resources.pids) == (64 * 1024**2, 500, 50)

    def test_a_mount(self, tmp_path):
        (tmp_path / "f").write_text("shown")
        with Sandbox.create(mounts=[f"{tmp_path}:/shown:ro"], isolation="container") as sandbox:
            assert sandbox.files.read("/shown/f") == b"shown"
            assert not sandbox.run(["touch", "/shown/g"]).ok

    def test_a_mount_by_a_link(self, tmp_path):
        """What is kept is where the link led when it was asked for."""
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        with Sandbox.create(mounts=[f"{tmp_path}/link:/shown"], isolation="container") as sandbox:
            assert sandbox.run(["touch", "/shown/f"]).ok
            assert [mount.source for mount in sandbox.info.spec.mounts] == [str(tmp_path / "real")]
        assert (tmp_path / "real" / "f").exists()

    def test_every_level(self, levels):
        for level in [level for level in levels if level != "wasm"]:  # which runs modules, and has tests of its own
            with Sandbox.create(isolation=level) as sandbox:
                assert sandbox.info.isolation == level
                assert sandbox.run(["echo", level]).stdout == f"{level}\n"

    def test_templates(self):
        assert {"host", "python-ds"} <= {template.id for template in Client().templates()}
