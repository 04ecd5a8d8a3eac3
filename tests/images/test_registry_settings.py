"""The administrator's registries.toml: all of it, or an error that names the bad key."""

from __future__ import annotations

from pathlib import Path

import pytest

from tartarus.images.registry import RegistrySettings, read_settings
from tartarus.model.errors import InvalidRequest


def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    assert read_settings(tmp_path / "none.toml") == RegistrySettings()
    (tmp_path / "empty.toml").touch()
    assert read_settings(tmp_path / "empty.toml") == RegistrySettings()


def test_everything_can_be_said(tmp_path: Path) -> None:
    path = tmp_path / "registries.toml"
    path.write_text(
        """
        proxy = "http://proxy.example:3128"
        max_image = "5GiB"
        parallel = 8
        [registry."docker.io"]
        mirrors = ["mirror.example:5000/hub", "127.0.0.1:5000"]
        [registry."registry.example:8443"]
        ca_file = "/etc/ssl/registry-ca.pem"
        """
    )
    assert read_settings(path) == RegistrySettings(
        proxy="http://proxy.example:3128",
        max_image_bytes=5 * 1024**3,
        parallel=8,
        mirrors={"docker.io": ("mirror.example:5000/hub", "127.0.0.1:5000"), "registry.example:8443": ()},
        ca_files={"registry.example:8443": Path("/etc/ssl/registry-ca.pem")},
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("parallel = 4\nx = ]", "line 2"),
        ("mirrors = []", "unknown field `mirrors`"),
        ("insecure = true", "unknown field `insecure`"),
        ('[registry."docker.io"]\nmirror = []', "unknown field `mirror`"),
        ('[registry."docker.io"]\nmirrors = ["https://x"]', "not a mirror's place"),
        ('[registry."docker.io"]\nmirrors = "x"', "Expected `array`"),
        ('[registry."docker"]\n', "not a registry's name"),
        ('[registry."https://docker.io"]\n', "URL"),
        ('[registry."index.docker.io"]\n', "not a registry's name"),
        ('[registry."a.b"]\nca_file = "ca.pem"', "not an absolute path"),
        ('docker_config = "/root/.docker/config.json"', "unknown field `docker_config`"),
        ('proxy = "proxy:3128"', "not an HTTP proxy"),
        ("parallel = 0", "use 1 to 32"),
        ('max_image = "much"', "not a size"),
        ("x = [" + "[" * 5000, "not valid"),
        ("#" * 2_000_000, "too large"),
        ("\0", "not valid"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "registries.toml"
    path.write_text(content)
    with pytest.raises(InvalidRequest, match=reason) as refused:
        read_settings(path)
    assert "registries.toml" in str(refused.value)


def test_a_file_that_can_t_be_read_is_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="can't read"):
        read_settings(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'proxy = "\xff"')
    with pytest.raises(InvalidRequest, match="not valid"):
        read_settings(tmp_path / "latin.toml")
