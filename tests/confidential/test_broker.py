"""Providers are not believed: one that hangs, lies, breaks or never ends harms only who asked it."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tartarus.model.errors import InvalidRequest, SecretUnavailable
from tartarus.model.secrets import MAX_SECRET_BYTES, Reference, SecretGrant, SecretProvider, SecretsSection, SecretUse
from tartarus.secrets import broker as broker_module
from tartarus.secrets.broker import Broker
from tartarus.secrets.held import Secret
from tartarus.secrets.providers import make
from tartarus.secrets.providers.envfile import EnvFile
from tartarus.secrets.redaction import MARK, Redactor

pytestmark = pytest.mark.anyio
VALUE = b's3cr3t-V4lue "quoted" \\ +/='


class Says:
    """A provider that does as it was told."""

    def __init__(self, does: Any) -> None:
        self.does = does

    def fetch(self, reference: Reference) -> Any:  # noqa: ARG002 - as providers are asked
        return self.does() if callable(self.does) else self.does


def broker(provider: object) -> Broker:
    made = Broker(SecretsSection(allow=(SecretGrant("token", "p:x"),)))
    made._providers["p"] = provider  # type: ignore[assignment]
    return made


async def fetched(provider: object, *, as_: Any = "file") -> Secret:
    made = broker(provider)
    (granted,) = made.grant("t", "host", [SecretUse("token", as_)])
    return await made.fetch(granted)


async def test_a_value_arrives() -> None:
    found = await fetched(Says(VALUE))
    assert found.reveal() == VALUE
    assert found.is_locked


def breaks() -> bytes:
    raise RuntimeError(f"the value is {VALUE!r}")


def refuses() -> bytes:
    raise SecretUnavailable("no such secret")


@pytest.mark.parametrize(
    ("does", "says"),
    [
        (b"x" * (MAX_SECRET_BYTES + 1), "larger than"), (b"", "empty"), ("text", "no text"), (None, "no text"), (7, "no text"),
        ({"value": "x"}, "no text"), (breaks, "broke: RuntimeError"), (refuses, "no such secret"),
    ],
)  # fmt: skip
async def test_lies_are_refused_without_a_word_of_the_value(does: object, says: str) -> None:
    with pytest.raises(SecretUnavailable) as caught:
        await fetched(Says(does))
    assert says in str(caught.value)
    assert "s3cr3t" not in f"{caught.value!r} {caught.value.__cause__!r}"


async def test_a_variable_takes_no_nul() -> None:
    assert len(await fetched(Says(b"a\0b"))) == 3
    with pytest.raises(SecretUnavailable, match="NUL"):
        await fetched(Says(b"a\0b"), as_="env")


async def test_one_that_hangs_is_waited_for_no_longer_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_module, "FETCH_LIMIT_S", 0.05)
    go_on = threading.Event()
    made = broker(Says(lambda: go_on.wait(30) and VALUE))
    made._providers["q"] = Says(VALUE)
    (granted,) = made.grant("t", "host", [SecretUse("token")])
    for _ in range(broker_module._MOST_WAITING):
        with pytest.raises(SecretUnavailable, match="did not answer within"):
            await made.fetch(granted)
    before = threading.active_count()
    with pytest.raises(SecretUnavailable, match="does not answer: earlier requests still wait"):
        await made.fetch(granted)
    assert threading.active_count() == before
    other = Broker(SecretsSection(allow=(SecretGrant("token", "q:x"),)))
    assert (await fetched(Says(VALUE))).reveal() == VALUE
    assert not other._waiting
    go_on.set()
    for _ in range(200):
        await asyncio.sleep(0.01)
        if not made._waiting["p"]:
            break
    assert (await made.fetch(granted)).reveal() == VALUE


async def test_whoever_stops_waiting_leaves_nothing() -> None:
    go_on = threading.Event()
    made = broker(Says(lambda: go_on.wait(30) and VALUE))
    (granted,) = made.grant("t", "host", [SecretUse("token")])
    task = asyncio.create_task(made.fetch(granted))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()


def test_a_value_is_shown_written_and_forked_nowhere() -> None:
    held = Secret(VALUE)
    assert "s3cr3t" not in f"{held} {held!r} {[held]}"
    with pytest.raises(TypeError):
        pickle.dumps(held)
    flags = ""
    view = ctypes.c_char.from_buffer(held._pages)
    address = ctypes.addressof(view)
    del view
    section = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            section = start <= address < end
        elif section and line.startswith("VmFlags"):
            flags = line
    assert {"lo", "dd", "dc"} <= set(flags.split())  # locked, left out of dumps, not copied by fork
    held.close()
    held.close()
    assert len(held) == 0


def test_known_values_are_taken_out_in_every_spelling() -> None:
    redactor = Redactor()
    held = Secret(VALUE)
    spellings = redactor.add(held)
    text = VALUE.decode()
    for spelling in (
        text, json.dumps(text), repr(VALUE), repr(text), base64.b64encode(VALUE).decode(), quote(VALUE, safe=""),
        json.dumps({"event": f"it said {text}"}),
    ):  # fmt: skip
        cleaned = redactor.text(f"before {spelling} after")
        assert MARK in cleaned
        assert "s3cr3t" not in cleaned
        assert "czNjcjN0" not in cleaned
        assert cleaned.startswith("before ")
        assert cleaned.endswith(" after")
    assert redactor.text("nothing of it \udc80") == "nothing of it \udc80"
    short = redactor.add(Secret(b"1"))
    assert redactor.text("1 and 1") == "1 and 1"
    redactor.remove(spellings)
    redactor.remove(spellings)
    redactor.remove(short)
    assert redactor.text(text) == text


@pytest.mark.parametrize("kind", ["link", "open to all", "fifo", "directory", "missing", "too large", "another's"])
def test_files_that_others_could_have_written_are_not_used(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "env"
    path.write_bytes(b"TOKEN=x\n" if kind != "too large" else b"#" * (1024**2 + 1))
    path.chmod(0o644 if kind == "open to all" else 0o600)
    if kind == "link":
        path.rename(tmp_path / "real")
        path.symlink_to(tmp_path / "real")
    elif kind in {"fifo", "directory", "missing"}:
        path.unlink()
        if kind == "fifo":
            os.mkfifo(path, 0o600)
        elif kind == "directory":
            path.mkdir(0o700)
    elif kind == "another's":
        if os.geteuid():
            return
        os.chown(path, 4711, 4711)
    with pytest.raises(SecretUnavailable):
        EnvFile(path).fetch(Reference("env", "TOKEN"))


def test_the_last_line_of_an_env_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.write_bytes(b'TOKEN=first\n# TOKEN=no\nexport TOKEN= "kept as=it is" \r\nNOEQUALS\n')
    path.chmod(0o600)
    assert EnvFile(path).fetch(Reference("env", "TOKEN")) == b' "kept as=it is" '
    for reference in (Reference("env", "NOEQUALS"), Reference("env", "# TOKEN"), Reference("env", "TOKEN", "field")):
        with pytest.raises(SecretUnavailable):
            EnvFile(path).fetch(reference)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("nothing", {}), ("env-file", {}), ("env-file", {"path": "relative"}), ("env-file", {"path": "/x", "pth": "/y"})],
)
def test_providers_that_can_not_be_are_refused_at_the_start(kind: str, options: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest, match="secrets provider 'p'"):
        make(SecretProvider("p", kind, options))
