"""Between this process's terminal, pipes and signals, and one process stream: until the command inside ends.

One poll loop, no threads. Output is written the moment it comes, in the order it came. Input is read only while the
daemon takes it. Signals are sent from their handlers, so that they get through even while a
write to a slow standard output blocks.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tartarus.cli import terminal
from tartarus.cli.output import Closed
from tartarus.model.errors import SandboxLost, TartarusError, from_code
from tartarus.sdk.streams import EVENT, STDERR, STDOUT, Refused, StreamProtocol
from tartarus.sdk.websocket import broken

if TYPE_CHECKING:
    import socket

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_CHUNK = 256 * 1024
_STDIN_CHUNK = 64 * 1024
_TWICE_S = 2.0


class Interrupted(Exception):
    """A signal came before there was a command to pass it on to, or the user insisted."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.status = 128 + number


class Relay:
    """One stream's way through. `write(fd, data)` takes output; `on_event` is told of created and started."""

    def __init__(
        self,
        connection: socket.socket,
        protocol: StreamProtocol,
        *,
        write: Callable[[int, memoryview], None],
        on_event: Callable[[dict[str, Any]], None],
        on_slow: Callable[[], None],
        forward_stdin: bool,
        raw: terminal.RawTerminal | None,
        signal_aside: Callable[[int], bool],
    ) -> None:
        self._socket = connection
        self._socket.setblocking(False)
        self._protocol = protocol
        self._write = write
        self._on_event = on_event
        self._on_slow = on_slow
        self._stdin = forward_stdin
        self._raw = raw
        self._signal_aside = signal_aside
        self._unsent = bytearray()
        self._pushing = False
        self._signals: list[int] = []
        self._interrupts: list[float] = []
        self._started = False
        self._over = False
        self._exit: dict[str, Any] | None = None
        self._stderr_open = True

    def run(self) -> dict[str, Any]:
        """Relay until the command has ended; returns the exit event.

        Raises the error that the daemon reported, SandboxLost when it went away, Interrupted, or Closed.
        """
        wake_reader, wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
        for number in FORWARDED:
            # Keep ignoring what our parent told us to ignore, as nohup does with SIGHUP.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        signal.signal(signal.SIGWINCH, self._on_resize)
        try:
            while self._exit is None:
                self._turn(wake_reader)
        finally:
            # From here on signals change nothing: whatever comes must not keep the terminal from being restored.
            self._over = True
            signal.set_wakeup_fd(-1)
            os.close(wake_reader)
            os.close(wake_writer)
        return self._exit

    def _turn(self, wake: int) -> None:
        """Wait for something to happen, and deal with it."""
        self._push()
        self._pass_signals()
        poller = select.poll()
        poller.register(self._socket, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        poller.register(wake, select.POLLIN)
        if self._stdin and self._started and not self._unsent:
            poller.register(0, select.POLLIN)
        ready = dict(poller.poll(None if self._started else 1000))
        if not ready and not self._started:
            self._on_slow()
        if wake in ready:
            os.read(wake, 4096)
        if self._socket.fileno() in ready:
            self._receive()
        if 0 in ready and self._exit is None:
            self._read_stdin()

    def _receive(self) -> None:
        try:
            data = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        try:
            messages = self._protocol.receive(data)
        except Refused as refused:
            raise _refusal(refused) from None
        for kind, payload in messages:
            if kind == EVENT:
                self._event(payload)
            elif kind == STDOUT or (kind == STDERR and self._stderr_open):
                self._output(kind, payload)
        if self._protocol.closed and self._exit is None:
            raise SandboxLost("the daemon went away while the command ran", fix="see its log, daemon.log")

    def _output(self, kind: int, payload: memoryview) -> None:
        try:
            self._write(kind, payload)
        except Closed:
            if kind == STDOUT:
                raise
            self._stderr_open = False

    def _event(self, payload: memoryview) -> None:
        try:
            event = json.loads(bytes(payload))
            name = event["event"]
        except (ValueError, KeyError, TypeError) as error:
            raise broken("an event is not JSON") from error
        if name == "error":
            raise problem(event.get("error"))
        if name == "exit":
            self._exit = event
            return
        if name == "started":
            self._started = True
            if self._raw is not None:
                self._raw.begin()
                self._protocol.send_resize(*terminal.size())
        self._on_event(event)

    def _read_stdin(self) -> None:
        try:
            data = os.read(0, _STDIN_CHUNK)
        except BlockingIOError:
            return
        except OSError:  # a terminal that is gone reads as an error
            data = b""
        if data:
            self._protocol.send_stdin(data)
        else:
            self._stdin = False
            self._protocol.send_stdin_eof()

    def _push(self) -> None:
        """Send what is queued, as far as the daemon takes it. May be interrupted by a handler that wants the same."""
        if self._pushing:
            return
        self._pushing = True
        try:
            while True:
                self._unsent += self._protocol.outgoing()
                if not self._unsent:
                    return
                sent = self._socket.send(self._unsent)
                del self._unsent[:sent]
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            self._unsent.clear()  # it hung up: what it said last is still to be read
        finally:
            self._pushing = False

    def release_signals(self) -> None:
        """Let signals end this process again; to be called once the terminal is as it was."""
        for number in (*FORWARDED, signal.SIGWINCH):
            if signal.getsignal(number) in (self._on_signal, self._on_resize):
                signal.signal(number, signal.SIG_DFL)

    def _on_signal(self, number: int, _frame: object) -> None:
        if self._over:
            return
        if not self._started:
            raise Interrupted(number)
        if number == signal.SIGINT:
            now = time.monotonic()
            self._interrupts = [moment for moment in self._interrupts if now - moment < _TWICE_S] + [now]
            if len(self._interrupts) > 2:
                raise Interrupted(number)
            if len(self._interrupts) == 2:
                number = signal.SIGKILL
        self._signals.append(number)
        if not self._unsent and not self._pushing:
            self._send_signals()

    def _on_resize(self, _number: int, _frame: object) -> None:
        if self._started and not self._over and self._raw is not None:
            self._protocol.send_resize(*terminal.size())
            self._push()

    def _send_signals(self) -> None:
        while self._signals:
            self._protocol.send_signal(self._signals.pop(0))
        self._push()

    def _pass_signals(self) -> None:
        """Signals that came while input was stuck on its way must not wait behind it."""
        if not self._unsent:
            self._send_signals()
            return
        while self._signals:
            number = self._signals.pop(0)
            if not self._signal_aside(number) and number == signal.SIGKILL:
                raise Interrupted(signal.SIGINT)


def problem(document: object) -> TartarusError:
    """The error that a problem document stands for."""
    if not isinstance(document, dict):
        return broken("an error has no document")
    code, what = str(document.get("code", "")), str(document.get("detail", ""))
    return from_code(code, what, why=str(document.get("why", "")), fix=str(document.get("fix", "")))


def _refusal(refused: Refused) -> TartarusError:
    try:
        return problem(json.loads(refused.body))
    except ValueError:
        return broken(f"HTTP status {refused.status}")
