"""`tartarus run` and `tartarus exec`: from parsed options to a request, one stream, and an exit status.

Both start here on the hot path, so nothing slow is imported unless an option needs it; requests are built as plain
JSON.
"""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

from tartarus.cli import output, relay, requests, terminal
from tartarus.model.errors import InvalidRequest, Quarantined, ResourceLimit, SandboxLost, TartarusError, TimeLimit
from tartarus.sdk import daemon
from tartarus.sdk.places import Places
from tartarus.sdk.streams import STDOUT, StreamProtocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tartarus.cli.quick import Values

_SIGKILL = 9
_MAX_CAPTURED_BYTES = 64 * 1024**2


def run(values: Values, words: Sequence[str]) -> int:
    """Run a command in a fresh sandbox; returns the exit status."""
    spec = requests.run_spec(values, words)
    program = spec["command"]["argv"][0] if spec["command"] is not None else ""
    if program.endswith(".wasm") and spec["isolation"] in {"auto", "wasm"}:
        _send_module(spec, program)
    if values["detach"]:
        return _detached(values, spec)
    command = spec["command"] or {"stdin": requests.forwards_stdin(bool(values["interactive"])), "tty": values["tty"]}
    return _Launch(values, "/v1/run", {"spec": spec}, command).go()


def execute(values: Values, words: Sequence[str]) -> int:
    """Run a command in a live sandbox; returns the exit status."""
    sandbox, *command = words or [""]
    if command[:1] == ["--"]:
        del command[0]
    if not sandbox:
        raise InvalidRequest("no sandbox given", fix="as in: tartarus exec sbx-… -- ls")
    spec = requests.exec_spec(values, sandbox, command)
    from urllib.parse import quote

    return _Launch(values, f"/v1/sandboxes/{quote(sandbox, safe='')}/exec", spec, spec).go()


def _send_module(spec: dict[str, Any], path: str) -> None:
    """Have the daemon take the module that the command names, if it is a file here; else it is one in the sandbox."""
    if not os.path.isfile(path):
        return
    from tartarus.sdk import modules
    from tartarus.sdk.client import Client

    data = modules.read(path)
    modules.ensure(Client().transport, data)
    spec["command"]["argv"][0] = os.path.basename(path)  # a path would be one in the sandbox
    spec["wasm"] = {**(spec.get("wasm") or {}), "module": modules.digest_of(data)}


def _detached(values: Values, spec: dict[str, Any]) -> int:
    from tartarus.sdk.detached import create

    if spec["command"] is not None:
        spec["command"]["stdin"] = False
    record = create(spec)
    if values["json"]:
        output.write(1, json.dumps(record).encode() + b"\n")
    else:
        output.write(1, f"{record['id']}\n".encode())
    return 0


class _Launch:
    """One `run` or `exec`: the stream, the status lines, the result."""

    def __init__(self, values: Values, path: str, request: dict[str, Any], command: dict[str, Any]) -> None:
        self._path = path
        self._request = request
        self._command = command
        self._is_run = path == "/v1/run"
        self._json = bool(values.get("json"))
        self._status_lines = not values.get("quiet") and (bool(values.get("verbose")) or os.isatty(2))
        self._template = str(values.get("template", ""))
        self._record: dict[str, Any] = {}
        self._captured: dict[int, list[bytes]] = {1: [], 2: []}
        self._room = _MAX_CAPTURED_BYTES
        self._truncated = False
        self._slow_said = False
        self._started_event: dict[str, Any] = {}
        self._places = Places.from_environment(os.environ, os.geteuid())

    def go(self) -> int:
        """Run to the end; returns the exit status."""
        opening = requests.encode(self._request)
        began = time.monotonic()
        with daemon.connect(self._places) as connection, terminal.RawTerminal(0) as raw:
            stream = relay.Relay(
                connection, StreamProtocol(self._path, opening), write=self._capture if self._json else output.write,
                on_event=self._on_event, on_slow=self._on_slow, forward_stdin=self._command["stdin"],
                raw=raw if self._command["tty"] and os.isatty(0) else None, signal_aside=self._signal_aside,
            )  # fmt: skip
            try:
                ended = stream.run()
            except output.Closed:
                return output.SIGPIPE_STATUS
            except relay.Interrupted as interrupted:
                return interrupted.status
        stream.release_signals()
        return self._finish(ended, (time.monotonic() - began) * 1e3)

    def _finish(self, ended: dict[str, Any], elapsed_ms: float) -> int:
        record: dict[str, Any] = ended.get("sandbox") or {}
        exit_status = ended.get("exit")
        trouble = self._trouble(record, exit_status, elapsed_ms)
        # A limit ends the command with a signal: that is its own status.
        if trouble is None or isinstance(trouble, ResourceLimit):
            status = shell_status(exit_status)
        else:
            status = trouble.exit_status
        if record.get("ended_at"):
            elapsed_ms = (record["ended_at"] - record["created_at"]) * 1e3
        if self._json:
            self._print_json(record, exit_status, status, elapsed_ms, trouble)
        if trouble is not None:
            output.report(trouble)
        if self._status_lines and self._is_run:
            output.say(f"Sandbox completed (exit code: {status}, duration: {elapsed_ms:.0f}ms)")
        return status

    def _trouble(
        self, record: dict[str, Any], exit_status: dict[str, Any] | None, elapsed_ms: float
    ) -> TartarusError | None:
        """Why the command did not come to an end of its own, if it did not."""
        if not self._is_run:
            limit_s = self._command.get("timeout_s")
            killed = exit_status is not None and exit_status["signal"] == _SIGKILL
            if limit_s is not None and killed and elapsed_ms >= limit_s * 1e3:
                return TimeLimit(f"{self._command['argv'][0]} ran longer than {limit_s:g} s and was killed")
            return None if exit_status is not None else SandboxLost("the sandbox went away before the command ended")
        if record.get("state") == "timed_out":
            limit_s = record["spec"]["timeout_s"]
            what = f"sandbox {record['id']} was ended at its time limit of {limit_s:g} s"
            return TimeLimit(what, fix="give more with --timeout")
        if record.get("state") == "lost":
            return SandboxLost(f"sandbox {record['id']} was lost", why=str(record.get("message", "")))
        if record.get("reason") == "resource_limit":
            what = f"sandbox {record['id']} was ended"
            return ResourceLimit(what, why=str(record.get("message", "")), fix="give more, as with --memory")
        if record.get("state") == "quarantined":
            why = str(record.get("message", "")).removeprefix("quarantined: ")
            return Quarantined(f"sandbox {record['id']} was quarantined: {why}",
                               fix="the daemon's owner decides what becomes of it")  # fmt: skip
        if record.get("reason") == "node_drain":
            return SandboxLost(f"sandbox {record['id']} was ended", why="the daemon stopped")
        return None

    def _on_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "created":
            self._record = event["sandbox"]
            if self._status_lines:
                output.say(f"Sandbox launched (ID: {self._record['id']})")
        elif event["event"] == "started":
            self._started_event = event

    def _on_slow(self) -> None:
        if self._status_lines and self._is_run and not self._slow_said and not self._record:
            self._slow_said = True
            how_long = "it can take a minute"
            if self._request["spec"]["isolation"] == "microvm":
                how_long = "its files are packed and a machine is booted, which can take two minutes"
            output.say(f"Preparing template '{self._template}' (done once; {how_long})…")

    def _signal_aside(self, number: int) -> bool:
        """Deliver a signal by another connection; only a run's own sandbox can be reached so."""
        if not self._record:
            return False
        from tartarus.sdk.detached import send_signal

        try:
            send_signal(self._record["id"], number)
        except TartarusError:
            return False
        return True

    def _capture(self, kind: int, payload: memoryview) -> None:
        if len(payload) > self._room:
            self._truncated = True
            payload = payload[: self._room]
        self._room -= len(payload)
        self._captured[kind].append(bytes(payload))

    def _print_json(
        self, record: dict[str, Any], exit_status: dict[str, Any] | None, status: int, elapsed_ms: float,
        trouble: TartarusError | None,
    ) -> None:  # fmt: skip
        result: dict[str, Any] = {
            "id": record.get("id", self._record.get("id")),
            "exit_code": status,
            "signal": exit_status["signal"] if exit_status else 0,
            "duration_ms": round(elapsed_ms, 3),
            "start_ms": self._started_event.get("start_ms"),
            "warm": self._started_event.get("warm", False),
            "isolation": record.get("isolation"),
            "state": record.get("state"),
            "reason": record.get("reason"),
            "truncated": self._truncated,
            **self._text(STDOUT, "stdout"),
            **self._text(STDOUT + 1, "stderr"),
        }
        if exit_status:
            result |= {name: exit_status.get(name) for name in ("user_ms", "system_ms", "peak_memory_bytes")}
        if trouble is not None:
            result["error"] = {"code": trouble.code, "what": trouble.what, "why": trouble.why, "fix": trouble.fix}
        output.write(1, json.dumps(result).encode() + b"\n")

    def _text(self, kind: int, name: str) -> dict[str, str]:
        data = b"".join(self._captured[kind])
        try:
            return {name: data.decode(), f"{name}_encoding": "utf-8"}
        except UnicodeDecodeError:
            from base64 import b64encode

            return {name: b64encode(data).decode(), f"{name}_encoding": "base64"}


def shell_status(exit_status: dict[str, Any] | None) -> int:
    """The status a shell would show for an exit event's status; killed together with its sandbox is 137."""
    if exit_status is None:
        return 128 + _SIGKILL
    signal = int(exit_status["signal"])
    return 128 + signal if signal else int(exit_status["code"])
