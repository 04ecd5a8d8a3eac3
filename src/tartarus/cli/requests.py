"""What the options of `run` and `exec` ask for, as the JSON of the API. The daemon checks it as strictly as the SDK."""

from __future__ import annotations

import json
import os
import stat
from typing import TYPE_CHECKING, Any

from tartarus.cli import terminal
from tartarus.model.errors import InvalidRequest
from tartarus.sdk.shorthand import environment, labels, mount_fields, secret_fields

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tartarus.cli.quick import Values


def run_spec(values: Values, words: Sequence[str]) -> dict[str, Any]:
    """The SandboxSpec that the options of `run` ask for, as JSON."""
    if values["request"]:
        from tartarus.cli.saved_request import over

        return over(str(values["request"]), values, words)
    return given_spec(values, words)


def given_spec(values: Values, words: Sequence[str]) -> dict[str, Any]:
    """The same from the options alone, without a saved request."""
    goes_on = bool(values["snapshot"]) and not words  # with the command that was running when it was taken
    spec: dict[str, Any] = {
        "template": values["template"],
        "isolation": values["isolation"],
        "command": None if goes_on else _command(values, words, "tartarus run -- echo hello"),
        "env": environment(_texts(values["env"]), os.environ),
        "workdir": values["workdir"] or "",
        "name": values["name"] or "",
        "labels": labels(_texts(values["label"])),
    }
    if values["snapshot"]:
        spec["snapshot"] = values["snapshot"]
    resources = _resources(values)
    if resources:
        spec["resources"] = resources
    if values["timeout"]:
        spec["timeout_s"] = _duration(values["timeout"])
    if values["fuel"] is not None:
        spec["wasm"] = {"fuel": values["fuel"]}
    if values["idle"]:
        spec["idle_s"] = _duration(values["idle"])
    if values["stop_signal"]:
        spec["stop_signal"] = values["stop_signal"]
    if values["stop_grace"]:
        spec["stop_grace_s"] = 0.0 if values["stop_grace"] == "0" else _duration(values["stop_grace"])
    network = str(values["network"])
    if values["allow"] or network not in {"none", "open"}:
        spec |= _contract(network, _texts(values["allow"]))
    elif network != "none":
        spec["network"] = network
    if values["publish"]:
        from tartarus.sdk.networks import publish_fields

        spec["publish"] = [publish_fields(text) for text in _texts(values["publish"])]
    if values["mount"]:
        spec["mounts"] = [mount_fields(text) for text in _texts(values["mount"])]
    if values["security"]:
        from tartarus.sdk.shorthand import security_fields

        spec["security"] = security_fields(_texts(values["security"]))
    if values["secret"]:
        spec["secrets"] = [secret_fields(text) for text in _texts(values["secret"])]
    return spec


def _contract(network: str, allow: Sequence[str]) -> dict[str, Any]:
    import msgspec

    from tartarus.sdk.networks import network_words

    mode, contract = network_words(network, allow)
    return {"network": mode.value, "contract": None if contract is None else msgspec.to_builtins(contract)}


def _resources(values: Values) -> dict[str, Any]:
    resources: dict[str, Any] = {}
    if values["memory"] or values["disk"] or values["cpus"]:
        from tartarus.model.units import parse_cpus, parse_size

        if values["memory"]:
            resources["memory_bytes"] = parse_size(str(values["memory"]))
        if values["disk"]:
            resources["disk_bytes"] = parse_size(str(values["disk"]))
        if values["cpus"]:
            resources["cpu_milli"] = parse_cpus(str(values["cpus"]))
    if values["pids"] is not None:
        resources["pids"] = values["pids"]
    return resources


def exec_spec(values: Values, sandbox: str, words: Sequence[str]) -> dict[str, Any]:
    """The ExecSpec that the options of `exec` ask for, as JSON."""
    spec = _command(values, words, f"tartarus exec {sandbox} -- ls")
    spec["env"] = environment(_texts(values["env"]), os.environ)
    spec["workdir"] = values["workdir"] or ""
    if values["timeout"]:
        spec["timeout_s"] = _duration(values["timeout"])
    return spec


def _command(values: Values, words: Sequence[str], example: str) -> dict[str, Any]:
    if not words or not words[0]:
        raise InvalidRequest("no command given", fix=f"put one after --, as in: {example}")
    rows, cols = terminal.size() if values["tty"] else (24, 80)
    return {
        "argv": list(words), "stdin": forwards_stdin(bool(values["interactive"])), "tty": values["tty"], "rows": rows,
        "cols": cols,
    }  # fmt: skip


def _texts(value: object) -> Sequence[str]:
    assert isinstance(value, tuple)
    return value


def _duration(value: object) -> float:
    from tartarus.model.units import parse_duration

    return parse_duration(str(value))


def forwards_stdin(interactive: bool) -> bool:
    """Whether our standard input goes to the command: a pipe, file or socket does, a terminal only with -i.

    Nothing is forwarded from /dev/null or a closed standard input: the command then reads an empty one.
    """
    try:
        mode = os.fstat(0)
    except OSError:
        return False
    if interactive and os.isatty(0):
        return True
    if stat.S_ISCHR(mode.st_mode):
        return interactive and mode.st_rdev != os.makedev(1, 3)
    return True


def encode(request: object) -> bytes:
    """JSON for the opening message. Raises InvalidRequest for bytes that are no text."""
    try:
        return json.dumps(request, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            "an argument, variable or path is not UTF-8 text",
            why=f"it holds the byte {ord(error.object[error.start]) & 0xFF:#04x}",
            fix="pass such data in a file or on standard input",
        ) from error
