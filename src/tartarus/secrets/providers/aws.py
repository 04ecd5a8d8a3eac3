"""Values in AWS Secrets Manager, or in a file whose values AWS KMS decrypts. Needs the extra `aws` (boto3, Amazon's).

Credentials are the daemon's own, as boto3 finds them: its role, or its user's files.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

import msgspec

from tartarus.model.errors import InvalidRequest, SecretUnavailable
from tartarus.model.secrets import Reference
from tartarus.secrets.providers import take
from tartarus.secrets.providers.envfile import EnvFile, absolute
from tartarus.secrets.providers.hashicorp import server_address

CONTEXT = "tartarus:secret"
"""The key of the encryption context: a value's name, so that none can be put in another's place."""


def client(service: str, region: str, endpoint: str) -> Any:
    """A client that gives up soon, and asks once. Raises InvalidRequest without boto3, or for an unsafe address."""
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise InvalidRequest("it needs boto3, which is not installed", fix="pip install 'tartarus[aws]'") from None
    config = Config(connect_timeout=3, read_timeout=4, retries={"total_max_attempts": 1}, proxies={})
    place = server_address(endpoint) if endpoint else None
    return boto3.session.Session(region_name=region).client(service, endpoint_url=place, config=config)


def _asked(service: str, call: Any, **request: Any) -> dict[str, Any]:
    """An answer. Of an error only its code is told: its text may have anything in it."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        answer: dict[str, Any] = call(**request)
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        raise SecretUnavailable(f"{service} refused", why=code if code.isalnum() else "") from None
    except BotoCoreError as error:
        raise SecretUnavailable(f"{service} can't be reached", why=type(error).__name__) from None
    return answer


class SecretsManager:
    """``aws:NAME``, or ``aws:NAME#KEY`` of a value that is a JSON object."""

    def __init__(self, options: dict[str, str]) -> None:
        region, endpoint = take(options, "region", optional=("endpoint",))
        self._client = client("secretsmanager", region, endpoint)

    def fetch(self, reference: Reference) -> bytes:
        """The current version. Raises SecretUnavailable."""
        answer = _asked("AWS Secrets Manager", self._client.get_secret_value, SecretId=reference.path)
        text, binary = answer.get("SecretString"), answer.get("SecretBinary")
        if not reference.field:
            return text.encode() if isinstance(text, str) else bytes(binary or b"")
        try:
            found = msgspec.json.decode(text or "", type=dict[str, Any]).get(reference.field)
        except (msgspec.MsgspecError, RecursionError):
            found = None
        if not isinstance(found, str):
            raise SecretUnavailable(f"the secret {reference.path} has no text in {reference.field!r}")
        return found.encode()


class KmsFile:
    """``kms:NAME``: a line ``NAME=BASE64`` of an env-file, a ciphertext of KMS with the name as its context."""

    def __init__(self, options: dict[str, str]) -> None:
        path, region, endpoint = take(options, "path", "region", optional=("endpoint",))
        self._file = EnvFile(Path(absolute(path)))
        self._client = client("kms", region, endpoint)

    def fetch(self, reference: Reference) -> bytes:
        """Decrypted by KMS; the key that it was encrypted with never leaves there. Raises SecretUnavailable."""
        try:
            ciphertext = base64.b64decode(self._file.fetch(reference), validate=True)
        except binascii.Error:
            raise SecretUnavailable(f"the value of {reference.path} is not base64") from None
        context = {CONTEXT: reference.path}
        answer = _asked("AWS KMS", self._client.decrypt, CiphertextBlob=ciphertext, EncryptionContext=context)
        return bytes(answer.get("Plaintext") or b"")
