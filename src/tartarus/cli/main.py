"""The entry of the `tartarus` command: the short way for `run` and `exec`, click for everything else."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def main() -> None:
    """Run the command line of this process; does not return."""
    try:
        status = _main(sys.argv[1:])
    except KeyboardInterrupt:
        status = 130
    except Exception as error:  # noqa: BLE001 - whatever it is, one line says it
        status = _unexpected(error)
    _flush()
    # Skips the interpreter's own end, 3 ms; nothing is buffered any more.
    os._exit(status)


def _unexpected(error: Exception) -> int:
    if sys.flags.dev_mode:
        raise error
    from tartarus.cli import output
    from tartarus.model.errors import TartarusError

    what = f"this is a bug of ours: {type(error).__name__}"
    fix = "run it again with PYTHONDEVMODE=1 in the environment, and report what it prints"
    return output.report(TartarusError(what, why=str(error), fix=fix))


def _main(arguments: Sequence[str]) -> int:
    command = arguments[0] if arguments else ""
    if command not in {"run", "exec"} or "_TARTARUS_COMPLETE" in os.environ:
        from tartarus.cli.app import main as everything

        return everything(arguments)
    from tartarus.cli.options import EXEC, RUN
    from tartarus.cli.quick import parse

    parsed = parse(arguments[1:], RUN if command == "run" else EXEC)
    if parsed is None:
        from tartarus.cli.app import main as everything

        return everything(arguments)
    return launch(command, *parsed)


def launch(command: str, values: dict[str, object], words: Sequence[str]) -> int:
    """`run` or `exec` with parsed options; errors are printed, and their exit status returned."""
    from tartarus.cli import launch, output
    from tartarus.model.errors import TartarusError

    try:
        return launch.run(values, words) if command == "run" else launch.execute(values, words)
    except TartarusError as error:
        return output.report(error)
    except output.Closed:
        return output.SIGPIPE_STATUS


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            continue  # closed, or its reader has gone


if __name__ == "__main__":
    main()
