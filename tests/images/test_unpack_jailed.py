"""The host's side of the jail: a child that was taken over says what it likes, and is not believed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tests.escape.images.archives import END, blob
from tests.escape.images.ground import UID_BASE, holders

from tartarus.images.store import LayerStore
from tartarus.images.unpack import idmap, jailed
from tartarus.images.unpack.capture import copy_tree, pack_layer
from tartarus.images.unpack.jailed import JailPlace, run_jailed
from tartarus.images.unpack.layers import _COUNTS, layer_name, unpack_layer
from tartarus.images.unpack.limits import Limits
from tartarus.model.errors import ImageRefused, IsolationUnavailable, TemplateFailed

pytestmark = pytest.mark.anyio


def instead(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every child runs this program instead of ours."""
    argv = [sys.executable, "-I", "-S", "-c", f"import os, sys, time\n{program}"]
    monkeypatch.setattr(jailed, "_command", lambda: argv)


async def said(program: str, monkeypatch: pytest.MonkeyPatch, limits: Limits | None = None) -> object:
    """What comes of a child that runs this program instead of ours."""
    instead(program, monkeypatch)
    return await run_jailed("unpack", "the layer", [], UID_BASE, limits or Limits())


@pytest.mark.parametrize(
    "program",
    [
        "",
        "sys.exit(3)",
        "os.kill(os.getpid(), 9)",
        "os.write(1, b'x' * 200000)",
        "os.write(1, b'not json\\n')",
        "os.write(1, b'{}\\n')",
        'os.write(1, b\'{"type":"unheard"}\\n\')',
        'os.write(1, b\'{"type":"done"}\\n\')',
        'os.write(1, b\'{"type":"done","facts":{"a":[1]}}\\n\')',
        'os.write(1, b\'{"type":"progress","bytes":"many"}\\n\')',
        'os.write(1, b\'{"type":"done","facts":{},"more":1}\\n\')',
        'os.write(1, b\'{"type":"progress","bytes":-1}\\n\')',
        'os.write(1, b\'{"type":"progress","bytes":8388608}\\n\' * 2)',
        'os.write(1, b\'{"type":"progress","bytes":99999999999999}\\n\')',
        "os.write(1, b'\\xff\\xfe\\n')",
        "os.write(2, b'x' * 300000)",
        "os.close(0); os.close(1)",
    ],
)
async def test_nonsense_is_an_error(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageRefused, match="could not be handled"):
        await said(program, monkeypatch)


async def test_ids_are_mapped_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: list[int] = []
    monkeypatch.setattr(idmap, "apply", lambda pid, _base: mapped.append(pid))
    with pytest.raises(ImageRefused):
        await said('os.write(1, b\'{"type":"map"}\\n\' * 5)', monkeypatch)
    assert len(mapped) == 1


async def test_a_child_that_never_ends_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stubborn = f"open({str(tmp_path / 'x')!r}, 'w'); import signal; signal.signal(15, signal.SIG_IGN)\n"
    stubborn += "f = os.open('/dev/null', 0); os.fork(); time.sleep(1000)"
    with pytest.raises(ImageRefused, match="takes too long"):
        await said(stubborn, monkeypatch, Limits(timeout_s=0.3))
    assert holders(tmp_path) == []


async def test_a_flood_of_complaints_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageRefused, match="takes too long"):
        await said("while True: os.write(2, b'x' * 65536)", monkeypatch, Limits(timeout_s=1))


async def test_words_are_made_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    escape = '{"type":"refused","what":"\\\\u001b[2J\\\\u202e","why":"' + "x" * 3000 + '","fix":"a\\\\nb"}'
    with pytest.raises(ImageRefused) as caught:
        await said(f"os.write(1, b'{escape}\\n')", monkeypatch)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1500


async def test_failures_have_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TemplateFailed, match="user attributes"):
        await said('os.write(1, b\'{"type":"failed","number":95,"why":"no"}\\n\')', monkeypatch)
    with pytest.raises(IsolationUnavailable, match="unshare"):
        await said('os.write(1, b\'{"type":"unjailed","number":1,"step":"unshare","why":"no"}\\n\')', monkeypatch)


@pytest.mark.needs("user-namespaces")
async def test_a_place_that_is_not_there_is_an_error() -> None:
    with pytest.raises(IsolationUnavailable, match="open_tree"):
        await run_jailed("digest", "x", [JailPlace("/nowhere/at/all", "/target")], UID_BASE, Limits(), times=False)


_LIES = [
    {},
    {"digest": "sha256:../../../etc"},
    {"digest": 7},
    {"digest": "sha256:" + "0" * 64, "bytes": "many", "entries": 1},
    {"digest": "sha256:" + "0" * 64, "bytes": -1, "entries": 1},
]


@pytest.mark.parametrize("facts", _LIES)
async def test_facts_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, object]) -> None:
    answer = json.dumps({"type": "done", "facts": facts}) + "\n"
    instead(f"os.write(1, {answer.encode()!r})", monkeypatch)
    store = LayerStore(tmp_path / "store")
    with pytest.raises(ImageRefused, match="nonsense"):
        await copy_tree(store, tmp_path, UID_BASE)
    layer = blob(END)
    (tmp_path / "blob").write_bytes(layer.data)
    with pytest.raises(ImageRefused, match="nonsense"):
        await unpack_layer(store, tmp_path / "blob", layer.descriptor, layer.diff_id, UID_BASE)
    with pytest.raises(ImageRefused, match="nonsense"), (tmp_path / "out").open("wb") as out:
        await pack_layer(tmp_path, UID_BASE, out.fileno())
    assert list((tmp_path / "store").iterdir()) == []


async def test_a_layers_record_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = dict.fromkeys(_COUNTS, 1) | {"diff_id": "another", "blob": "another", "more": "x"}
    answer = json.dumps({"type": "done", "facts": facts}) + "\n"
    instead(f"os.write(1, {answer.encode()!r})", monkeypatch)
    store, layer = LayerStore(tmp_path / "store"), blob(END)
    (tmp_path / "blob").write_bytes(layer.data)
    await unpack_layer(store, tmp_path / "blob", layer.descriptor, layer.diff_id, UID_BASE)
    record = store.manifest(layer_name(layer.descriptor, layer.diff_id, UID_BASE))
    assert record == dict.fromkeys(_COUNTS, 1) | {"diff_id": layer.diff_id, "blob": layer.descriptor.digest}
