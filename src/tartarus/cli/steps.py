"""How work on a template shows: a tick for each part that is done, and on a terminal how far the current one is."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from types import TracebackType

from tartarus.cli import output
from tartarus.model.errors import TartarusError
from tartarus.model.library import BuildOutput, Step, StepProgress, StepState
from tartarus.model.units import format_size

_TICKS = {
    Step.PULL: "Pulled image",
    Step.IMPORT: "Imported image",
    Step.BUILD: "Built image",
    Step.ROOTFS: "Built rootfs",
    Step.SNAPSHOT: "Created snapshot",
    Step.PUSH: "Pushed image",
}
_GOING_ON = {
    Step.UPLOAD: "Uploading",
    Step.PULL: "Pulling image",
    Step.IMPORT: "Importing image",
    Step.BUILD: "Building image",
    Step.ROOTFS: "Building rootfs",
    Step.SCAN: "Scanning packages",
    Step.SNAPSHOT: "Creating snapshot",
    Step.PUSH: "Pushing image",
}
_PATIENCE_S = 1.0
_EVERY_S = 0.25
_BAR = 24
_MAX_LINE = 4096


def _tells(event: StepProgress) -> bool:
    """Whether a build's event is worth a line: each step as it begins, and notes."""
    begins = event.item and event.state in {StepState.STARTED, StepState.CACHED}
    return bool(begins) or event.state is StepState.UPDATED


class Steps:
    """Called with each event; a context manager around the work. With `quiet`, no ticks on standard output."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._shown = os.isatty(2)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        self._step: Step | None = None
        self._began = time.monotonic()
        self._sizes: dict[str, tuple[int, int | None]] = {}
        self._drawn = False
        self._partial = ""

    def __call__(self, event: StepProgress | BuildOutput) -> None:
        """Show an event."""
        with self._lock:
            if isinstance(event, BuildOutput):
                self._write(event.text)
                return
            if event.step is not self._step:
                self._step, self._began, self._sizes = event.step, time.monotonic(), {}
            if event.bytes_done is not None:
                known = self._sizes.get(event.item, (0, None))[1]
                self._sizes[event.item] = (event.bytes_done, event.bytes_total or known)
            over = event.state in {StepState.DONE, StepState.CACHED}
            if not event.item and over:
                self._finished(event)
            elif event.step is Step.BUILD and event.text and _tells(event):
                self._say(f"[{event.item}] {event.text}" if event.item else event.text, event.state)

    def _finished(self, event: StepProgress) -> None:
        self._flush()
        self._wipe()
        self._step = None
        text = _TICKS.get(event.step, event.text if event.step is Step.SCAN else "")
        if text and not self._quiet:
            output.write(1, f"✓ {output.one_line(text)}\n".encode())

    def _say(self, text: str, state: StepState) -> None:
        self._flush()
        self._wipe()
        output.say(output.one_line(text) + (" (cached)" if state is StepState.CACHED else ""))

    def _write(self, text: str) -> None:
        """Whole lines, without what a build's step would do to the terminal."""
        *lines, self._partial = (self._partial + text).split("\n")
        if len(self._partial) > _MAX_LINE:
            lines.append(self._partial)
            self._partial = ""
        if lines:
            self._wipe()
        for line in lines:
            output.say("  " + output.one_line(line.rpartition("\r")[2] or line.rstrip("\r")))

    def _flush(self) -> None:
        if self._partial:
            self._write("\n")

    def __enter__(self) -> Steps:
        if self._shown:
            self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._shown:
            self._ticker.join()
        self._flush()
        self._wipe()

    def _tick(self) -> None:
        while not self._over.wait(_EVERY_S):
            with self._lock:
                if self._step is not None and time.monotonic() - self._began >= _PATIENCE_S:
                    self._drawn = True
                    self._draw(f"\r{self._bar(self._step)}\x1b[K")

    def _bar(self, step: Step) -> str:
        done = sum(size for size, _ in self._sizes.values())
        totals = [total for _, total in self._sizes.values() if total]
        total = sum(totals)
        elapsed = f"{time.monotonic() - self._began:.0f}s"
        if total and len(totals) == len(self._sizes):
            filled = round(_BAR * min(done / total, 1.0))
            bar = "#" * filled + "." * (_BAR - filled)
            return f"{_GOING_ON[step]} [{bar}] {format_size(done)} of {format_size(total)}, {elapsed}"
        return f"{_GOING_ON[step]}… {f'{format_size(done)}, ' if done else ''}{elapsed}"

    def _wipe(self) -> None:
        if self._drawn:
            self._drawn = False
            self._draw("\r\x1b[K")

    @staticmethod
    def _draw(text: str) -> None:
        # A terminal that has gone is no reason to end the work.
        with contextlib.suppress(output.Closed, TartarusError):
            output.write(2, text.encode())
