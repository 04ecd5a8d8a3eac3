"""The host's certificates, and nothing else of their files."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import pytest

from tartarus.network import certificates
from tartarus.network.certificates import ca_bundle


@pytest.fixture(name="pair")
def _pair(tmp_path: Path) -> tuple[str, str]:
    """A certificate and its private key."""
    made = [tmp_path / "key.pem", tmp_path / "certificate.pem"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-subj", "/CN=test authority", "-days", "30", "-keyout", made[0], "-out", made[1]],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return made[1].read_text(), made[0].read_text()


@pytest.fixture(name="nowhere_else", autouse=True)
def _nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "_PLACES", ())


pytestmark = pytest.mark.needs("openssl")


def test_certificates_are_taken_and_keys_are_not(tmp_path: Path, pair: tuple[str, str]) -> None:
    certificate, key = pair
    bundle = tmp_path / "bundle.pem"
    bundle.write_text(f"# our authorities\n{key}\n{certificate}\n{key}{certificate}\nsecret notes\n")
    found = ca_bundle({"SSL_CERT_FILE": str(bundle)})
    assert found is not None
    assert found.count(b"BEGIN CERTIFICATE") == 2
    for word in (b"PRIVATE", b"secret", b"authorities", key.splitlines()[1].encode()):
        assert word not in found
    assert ssl.create_default_context(cadata=found.decode()).cert_store_stats()["x509_ca"] >= 1


@pytest.mark.parametrize("content", ["", "nothing", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_what_is_no_bundle_is_passed_over(tmp_path: Path, content: str) -> None:
    (tmp_path / "bundle.pem").write_text(content)
    assert ca_bundle({"SSL_CERT_FILE": str(tmp_path / "bundle.pem")}) is None
    assert ca_bundle({"SSL_CERT_FILE": str(tmp_path)}) is None
    assert ca_bundle({"SSL_CERT_FILE": str(tmp_path / "absent")}) is None
    assert ca_bundle({}) is None


def test_one_without_an_end_is_passed_over(tmp_path: Path, pair: tuple[str, str]) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.write_text(pair[0])
    with bundle.open("r+b") as file:
        file.truncate(5 * 1024**2)
    assert ca_bundle({"SSL_CERT_FILE": str(bundle)}) is None


def test_the_distribution_s_place_serves_when_none_is_named(
    tmp_path: Path, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bundle.pem").write_text(pair[0])
    monkeypatch.setattr(certificates, "_PLACES", (str(tmp_path / "absent"), str(tmp_path / "bundle.pem")))
    assert ca_bundle({}) == ca_bundle({"SSL_CERT_FILE": str(tmp_path / "other")}) is not None
