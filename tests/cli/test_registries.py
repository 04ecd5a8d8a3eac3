"""What the administrator's registries.toml says holds for the daemon's pulls."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.kit import tartarus
from tests.images.registries import docker_registry, make_image, upload

from tartarus.sdk.places import Places

pytestmark = [pytest.mark.usefixtures("clean"), pytest.mark.needs("root", "docker-registry")]


def test_mirrors_are_asked_and_mistakes_are_named(home: Places, tmp_path: Path) -> None:
    file = Path(home.state_dir, "registries.toml")
    with docker_registry(tmp_path / "registry") as registry:
        upload(registry.host, "hub/library/app", "1", make_image({"etc/os-release": b"ID=test\n"}))
        file.write_text(f'[registry."docker.io"]\nmirrors = ["{registry.host}/hub"]\n')
        done = tartarus("template", "pull", "app:1", "--name", "mirrored")
        assert "✓ Pulled image" in (done.stdout + done.stderr).decode()
        file.write_text('[registry."docker.io"]\ninsecure = true\n')
        said = tartarus("template", "pull", "app:1", "--name", "again").stderr.decode()
        assert "error[invalid_request]" in said
        assert "registries.toml is not valid: Object contains unknown field `insecure`" in said
