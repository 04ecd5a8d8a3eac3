"""Providers that ask somebody else: our vault, HashiCorp Vault's API, AWS by a local mock server."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from tests.aws import aws

from tartarus.model.errors import InvalidRequest, SecretNotFound, SecretUnavailable
from tartarus.model.secrets import Reference, SecretProvider
from tartarus.secrets.providers import Provider, hashicorp, make
from tartarus.secrets.providers.aws import CONTEXT
from tartarus.secrets.vault import IdentityKey, PassphraseKey, Vault

__all__ = ["aws"]
VALUE = b"s3cr3t-V4lue\n\xff\x00 not text"


def private(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def provider(kind: str, **options: object) -> Provider:
    return make(SecretProvider("p", kind, {name: str(value) for name, value in options.items()}))


# Our vault.


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    made = Vault(tmp_path / "v.age", IdentityKey(tmp_path / "v.key"))
    with pytest.raises(SecretUnavailable, match="there is no vault at"):
        made.names()
    made.create()
    return made


def test_a_vault_keeps_values_and_shows_none(vault: Vault, tmp_path: Path) -> None:
    assert (vault.set("a", VALUE), vault.set("b", b"2"), vault.set("a", VALUE)) == (1, 1, 2)
    assert vault.get("a") == VALUE
    assert [(name, entry.revision, entry.value) for name, entry in vault.names().items()] == [
        ("a", 2, ""),
        ("b", 1, ""),
    ]
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
        assert b"s3cr3t" not in path.read_bytes()
        assert base64.b64encode(VALUE) not in path.read_bytes()
    by_provider = provider("age", path=tmp_path / "v.age", identity_file=tmp_path / "v.key")
    assert by_provider.fetch(Reference("p", "a")) == VALUE
    vault.remove("a")
    with pytest.raises(SecretUnavailable, match="no secret 'a'"):
        by_provider.fetch(Reference("p", "a"))
    for wrong in (lambda: vault.get("a"), lambda: vault.remove("a")):
        with pytest.raises(SecretNotFound):
            wrong()
    for name, value in (("../x", b"1"), ("c", b""), ("c", b"x" * 70_000)):
        with pytest.raises(InvalidRequest):
            vault.set(name, value)
    with pytest.raises(InvalidRequest, match="there already"):
        vault.create()


def test_after_a_rotation_the_old_key_opens_nothing(vault: Vault, tmp_path: Path) -> None:
    vault.set("a", VALUE)
    old = private(tmp_path / "old.key", (tmp_path / "v.key").read_text())
    vault.rotate()
    assert vault.get("a") == VALUE
    assert (tmp_path / "v.key").read_text().count("AGE-SECRET-KEY") == 1
    with pytest.raises(SecretUnavailable, match="can't be opened"):
        Vault(tmp_path / "v.age", IdentityKey(old)).get("a")


@pytest.mark.parametrize("writes", [1, 2, 3])
def test_a_rotation_that_is_killed_leaves_a_vault_that_opens(
    vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    vault.set("a", VALUE)
    script = f"""
import os, sys
from pathlib import Path
from tartarus.secrets import files, vault
write, left = files.write_private, {writes}
def dies(*arguments, **options):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), 9)
    write(*arguments, **options)
vault.write_private = dies
vault.Vault(Path(sys.argv[1]), vault.IdentityKey(Path(sys.argv[2]))).rotate()
"""
    died = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "v.age"), str(tmp_path / "v.key")], env=os.environ, check=False
    )
    assert died.returncode == -9
    assert vault.get("a") == VALUE
    vault.rotate()
    assert vault.get("a") == VALUE


def test_a_vault_may_have_a_passphrase(tmp_path: Path) -> None:
    """Once each way: age makes each take long, on purpose."""
    vault = Vault(tmp_path / "v.age", PassphraseKey.in_file(private(tmp_path / "pass", "first\nsecond\n")))
    vault.create()
    assert vault.names() == {}
    with pytest.raises(SecretUnavailable, match="has no passphrase"):
        PassphraseKey.in_file(private(tmp_path / "pass", "\n"))


def test_a_file_that_is_no_vault_of_ours_says_so(vault: Vault, tmp_path: Path) -> None:
    key = IdentityKey(tmp_path / "v.key")
    private(tmp_path / "v.age", "nonsense")
    with pytest.raises(SecretUnavailable, match="can't be opened"):
        vault.get("a")
    (tmp_path / "v.age").write_bytes(key.encrypt(b'{"values": 7, "s3cr3t": 1}'))
    with pytest.raises(SecretUnavailable, match="no vault") as caught:
        vault.get("a")
    assert "s3cr3t" not in str(caught.value)
    private(tmp_path / "v.key", "AGE-SECRET-KEY-1NONSENSE")
    with pytest.raises(SecretUnavailable, match="no age identity"):
        vault.get("a")
    (tmp_path / "v.key").chmod(0o640)
    with pytest.raises(SecretUnavailable, match="not used"):
        vault.get("a")


@pytest.mark.parametrize("options", [{}, {"passphrase_file": "/p"}, {"identity_file": "relative"}])
def test_the_daemon_opens_a_vault_by_an_identity(options: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest, match="secrets provider 'p'"):
        provider("age", path="/v", **options)


# HashiCorp Vault and OpenBao. Their server is in no package registry: this one answers as its documentation says.


class VaultStandIn:
    """What of the KV version 2 and AppRole APIs is asked for; `answer` puts something else in its place."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {"/v1/kv/data/team/app": {"token": "v4lue", "number": 7}}
        self.tokens = {"root-token"}
        self.logins = 0
        self.asked: list[tuple[str, str, str]] = []
        self.answer: Callable[[BaseHTTPRequestHandler], None] | None = None
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                """Nothing."""

            def _serve(self) -> None:
                size = int(self.headers.get("content-length") or 0)
                body = self.rfile.read(size)
                token = self.headers.get("X-Vault-Token", "")
                stand_in.asked.append((self.path, token, self.headers.get("X-Vault-Namespace", "")))
                if stand_in.answer is not None:
                    stand_in.answer(self)
                elif self.path == "/v1/auth/approle/login":
                    login = json.loads(body)
                    stand_in.logins += 1
                    if login != {"role_id": "role", "secret_id": "secret-id"}:
                        self.say(400, {"errors": ["invalid role or secret ID"]})
                        return
                    issued = f"issued-{stand_in.logins}"
                    stand_in.tokens.add(issued)
                    self.say(200, {"auth": {"client_token": issued}})
                elif token not in stand_in.tokens:
                    self.say(403, {"errors": ["permission denied"]})
                elif self.path not in stand_in.values:
                    self.say(404, {"errors": []})
                else:
                    self.say(200, {"data": {"data": stand_in.values[self.path], "metadata": {"version": 3}}})

            do_GET = do_POST = _serve  # noqa: N815 - as the server looks for them

            def say(self, status: int, answer: object) -> None:
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=lambda: self.server.serve_forever(0.02), daemon=True)
        self.thread.start()


@pytest.fixture
def server() -> Iterator[VaultStandIn]:
    made = VaultStandIn()
    yield made
    made.server.shutdown()
    made.thread.join()
    made.server.server_close()


@pytest.fixture
def by_token(server: VaultStandIn, tmp_path: Path) -> Provider:
    token = private(tmp_path / "token", "root-token\n")
    return provider("vault", address=server.address, token_file=token, namespace="team-a")


TOKEN = Reference("p", "kv/team/app", "token")


def test_vault_gives_a_field_of_the_newest_version(server: VaultStandIn, by_token: Provider) -> None:
    assert by_token.fetch(TOKEN) == b"v4lue"
    assert server.asked == [("/v1/kv/data/team/app", "root-token", "team-a")]


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        (Reference("p", "kv/team/none", "token"), "has no kv/team/none"),
        (Reference("p", "kv/team/app", "none"), "no text in 'none'"),
        (Reference("p", "kv/team/app", "number"), "no text in 'number'"),
        (Reference("p", "kv/team/app"), "a mount, a path and a field"),
        (Reference("p", "kv", "token"), "a mount, a path and a field"),
    ],
)
def test_what_vault_has_not_is_said(by_token: Provider, reference: Reference, says: str) -> None:
    with pytest.raises(SecretUnavailable, match=says):
        by_token.fetch(reference)


def test_an_approle_logs_in_once_and_again_when_its_token_is_over(server: VaultStandIn, tmp_path: Path) -> None:
    secret = private(tmp_path / "id", "secret-id\n")
    by_role = provider("vault", address=server.address, role_id="role", secret_id_file=secret)
    assert (by_role.fetch(TOKEN), by_role.fetch(TOKEN), server.logins) == (b"v4lue", b"v4lue", 1)
    server.tokens.clear()
    assert (by_role.fetch(TOKEN), server.logins) == (b"v4lue", 2)
    private(secret, "another-id")
    server.tokens.clear()
    with pytest.raises(SecretUnavailable, match="did not take the AppRole"):
        by_role.fetch(TOKEN)


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b'{"data": "' + b"s3cr3t" * 10_000)
    except OSError:
        return


def slow(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b" ")
            threading.Event().wait(0.02)
    except OSError:
        return


def elsewhere(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(307)
    handler.send_header("location", "/v1/kv/data/team/app")
    handler.send_header("content-length", "0")
    handler.end_headers()


def says(text: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)

    return answer


def breaks_off(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


@pytest.mark.parametrize(
    "answer",
    [
        endless, slow, elsewhere, breaks_off, says(b"s3cr3t no JSON"), says(b"[]"), says(b'{"data": {"data": "s3cr3t"}}'),
        says(b'{"data": {"data": {"token": {"s3cr3t": 1}}}}'), says(b"[" * 100_000), says(b'{"data": null}'),
    ],
)  # fmt: skip
def test_a_server_that_lies_hangs_or_never_ends_is_given_up(
    server: VaultStandIn, by_token: Provider, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashicorp, "LIMIT_S", 0.4)
    server.answer = answer
    with pytest.raises(SecretUnavailable) as caught:
        by_token.fetch(TOKEN)
    assert "s3cr3t" not in repr(caught.value)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"address": "http://vault.example.org", "token_file": "/t"}, {"address": "https://u:p@v.example.org", "token_file": "/t"},
        {"address": "ftp://v", "token_file": "/t"}, {"address": "https://v/path", "token_file": "/t"}, {"address": "https://v"},
        {"address": "https://v", "token_file": "/t", "role_id": "r", "secret_id_file": "/s"}, {"address": "https://v", "role_id": "r"},
        {"address": "https://v", "token_file": "/t", "verify": "no"}, {"token_file": "/t"},
    ],
)  # fmt: skip
def test_vault_is_asked_with_tls_and_one_login_only(options: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest):
        provider("vault", **options)


# AWS.


def test_secrets_manager_gives_texts_keys_and_bytes(aws: str) -> None:
    client = boto3.client("secretsmanager", region_name="eu-central-1", endpoint_url=aws)
    client.create_secret(Name="team/text", SecretString="v4lue")
    client.create_secret(Name="team/json", SecretString='{"password": "p4ss", "port": 7}')
    client.create_secret(Name="team/bytes", SecretBinary=VALUE)
    manager = provider("aws-secrets-manager", region="eu-central-1", endpoint=aws)
    assert manager.fetch(Reference("p", "team/text")) == b"v4lue"
    assert manager.fetch(Reference("p", "team/json", "password")) == b"p4ss"
    assert manager.fetch(Reference("p", "team/bytes")) == VALUE
    for path, field in (("team/json", "port"), ("team/json", "none"), ("team/text", "x"), ("team/bytes", "x")):
        with pytest.raises(SecretUnavailable, match="no text in"):
            manager.fetch(Reference("p", path, field))
    with pytest.raises(SecretUnavailable, match="refused: ResourceNotFoundException"):
        manager.fetch(Reference("p", "team/none"))


def test_kms_decrypts_a_value_under_its_own_name_only(aws: str, tmp_path: Path) -> None:
    client = boto3.client("kms", region_name="eu-central-1", endpoint_url=aws)
    key = client.create_key()["KeyMetadata"]["KeyId"]
    sealed = client.encrypt(KeyId=key, Plaintext=VALUE, EncryptionContext={CONTEXT: "TOKEN"})["CiphertextBlob"]
    line = base64.b64encode(sealed).decode()
    path = private(tmp_path / "kms.env", f"TOKEN={line}\nOTHER={line}\nBROKEN=***\n")
    kms = provider("aws-kms", path=path, region="eu-central-1", endpoint=aws)
    assert kms.fetch(Reference("p", "TOKEN")) == VALUE
    with pytest.raises(SecretUnavailable, match="refused: InvalidCiphertextException"):
        kms.fetch(Reference("p", "OTHER"))
    with pytest.raises(SecretUnavailable, match="not base64"):
        kms.fetch(Reference("p", "BROKEN"))


def test_aws_that_is_not_there_is_said_without_a_long_wait(tmp_path: Path) -> None:
    manager = provider("aws-secrets-manager", region="eu-central-1", endpoint="http://127.0.0.1:9")
    with pytest.raises(SecretUnavailable, match="can't be reached"):
        manager.fetch(Reference("p", "x"))
    with pytest.raises(InvalidRequest, match="without TLS"):
        provider("aws-secrets-manager", region="eu-central-1", endpoint="http://aws.example.org")
