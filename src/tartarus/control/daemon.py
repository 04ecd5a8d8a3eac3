"""The daemon's main: lock, listen, then import and start everything, serve, stop gracefully.

    python -m tartarus.control.daemon --state-dir DIR --socket PATH [--foreground]

The socket listens before the slow imports, so that a client's first request is already on its way
while they run; it is answered once the node has started.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tartarus.control.configuring import read_configuration
from tartarus.control.instance import AlreadyRunning, Background, InstanceLock
from tartarus.model.errors import TartarusError
from tartarus.model.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tartarus.control.peers import PeerListener
    from tartarus.secrets.redaction import Redactor

MAX_FILES = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon; returns the process' exit status."""
    parser = argparse.ArgumentParser(prog="tartarus-daemon", description="The Tartarus daemon of one host.")
    parser.add_argument("--state-dir", type=Path, help="where sandboxes, templates and records are kept")
    parser.add_argument("--socket", type=Path, help="the Unix socket to serve")
    parser.add_argument("--foreground", action="store_true", help="stay in the foreground and log to standard error")
    options = parser.parse_args(arguments)
    background = Background()
    try:
        settings = Settings.from_environment(os.environ, os.geteuid())
        if options.state_dir is not None or options.socket is not None:
            asked = Settings.at(options.state_dir or settings.state_dir, options.socket)
            # The file goes with the state directory: somebody else's must not govern this one.
            same = asked.state_dir == settings.state_dir
            settings = msgspec.structs.replace(asked, config_file=settings.config_file) if same else asked
        settings = read_configuration(settings)
        if not options.foreground:
            background.enter()
        lock = InstanceLock(settings)
        lock.acquire()
    except AlreadyRunning as error:
        # What the caller wanted is there.
        background.ready()
        sys.stderr.write(f"tartarus: {error}\n")
        return 0
    except TartarusError as error:
        return _report(background, error)
    try:
        return _run(settings, lock, background, foreground=options.foreground)
    except TartarusError as error:
        return _report(background, error)
    except Exception as error:
        _report(background, TartarusError("the daemon could not start", why=f"{type(error).__name__}: {error}"))
        raise
    finally:
        lock.release()


def _run(settings: Settings, lock: InstanceLock, background: Background, *, foreground: bool) -> int:
    from tartarus.control.peers import listen

    # What is private is made with its own mode; what sandboxes see must not depend on who started us.
    os.umask(0o022)
    _raise_file_limit()
    # Not 0: a core dump that goes to a program is only left out for 1; see core(5) and rlimits.py.
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    started_at = time.time()
    listener = listen(settings.socket, frozenset({0, os.geteuid()}))
    try:
        lock.record_pid()

        import structlog

        from tartarus.secrets.redaction import Redactor
        from tartarus.telemetry import logs

        redactor = Redactor()
        log_file = None if foreground else settings.log_file
        logs.configure(log_file, max_bytes=settings.log_bytes, files=settings.log_files, redact=redactor.text)
        try:
            asyncio.run(_serve(settings, listener, background, started_at, redactor))
        except Exception:
            structlog.get_logger("tartarus.daemon").exception("failed")
            raise
    finally:
        listener.close()
        settings.socket.unlink(missing_ok=True)
    return 0


async def _serve(
    settings: Settings, listener: PeerListener, background: Background, started_at: float, redactor: Redactor
) -> None:
    import structlog

    from tartarus.control.api import Api
    from tartarus.control.app import make_app
    from tartarus.control.hangups import HangupWatcher
    from tartarus.control.server import Server
    from tartarus.model.sandbox import Reason
    from tartarus.node.service import Node
    from tartarus.store import SandboxStore
    from tartarus.telemetry.metrics import Metrics

    log = structlog.get_logger("tartarus.daemon")
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        store = await SandboxStore.open(settings.database)
        stack.push_async_callback(store.close)
        metrics = Metrics(settings.node_name)
        node = Node(settings, store, metrics, redactor)
        await node.start()

        async def drain() -> None:
            log.info("stopping")
            await node.stop(Reason.NODE_DRAIN)

        def ready() -> None:
            # What start-up made stays: later collections need not look at it.
            gc.collect()
            gc.freeze()
            log.info("serving", socket=str(settings.socket), seconds=round(time.time() - started_at, 3))
            background.ready()

        hangups = HangupWatcher()
        stack.callback(hangups.close)
        api = Api(
            settings, store, node, metrics, hangups, uploads=node.library.uploads, modules=node.modules,
            templates=node.library.templates,
            snapshots=node.library.snapshots, policies=node.policies, audit=node.audit, started_at=started_at,
            shut_down=stop.set,
        )  # fmt: skip
        server = Server(make_app(api), stop=stop, drain=drain, grace_s=settings.stop_grace_s)
        await server.run_on(listener, ready)
        log.info("stopped")


def _raise_file_limit() -> None:
    """A thousand sandboxes hold several descriptors each; the usual soft limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _report(background: Background, error: TartarusError) -> int:
    line = f"tartarus: {error} [{error.code}]"
    background.failed(line)
    sys.stderr.write(line + "\n")
    return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
