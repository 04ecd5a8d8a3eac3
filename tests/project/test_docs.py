"""The documentation says what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.project.test_project import ROOT, load

DOCS = ROOT / "docs"


@pytest.mark.parametrize("name", ["errors.md", "cli.md", "template.schema.json"])
def test_generated_pages_are_current(name: str) -> None:
    generator = load("scripts/generate_docs.py")
    assert (DOCS / name).read_text() == generator.PAGES[name](), "run scripts/generate_docs.py"


def test_every_error_says_what_it_means() -> None:
    from tartarus.model.errors import registry

    for code, error in registry().items():
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", code)
        assert error.__doc__, code
        assert error.exit_status in {124, 125, 126, 127}
        assert 400 <= error.http_status <= 599


def test_every_route_of_the_api_is_described_and_no_other() -> None:
    from litestar.handlers import HTTPRouteHandler, WebsocketRouteHandler

    from tartarus.control.routes import ROUTES

    served = set()
    for handler in ROUTES:
        methods = {"WS"} if isinstance(handler, WebsocketRouteHandler) else set()
        if isinstance(handler, HTTPRouteHandler):
            methods = {str(method) for method in handler.http_methods} - {"OPTIONS", "HEAD"}
        if handler.opt.get("is_forwarded"):
            methods = {"ANY"}
        for path in handler.paths:
            plain = re.sub(r"\{(\w+?)(?:_id:str|:int)\}", r"{\1}", path.removesuffix("/{rest:path}")).replace(
                "{sandbox}", "{id}"
            )
            served |= {f"{method} {plain}" for method in methods}
    described = set(re.findall(r"`((?:GET|POST|PUT|DELETE|WS|ANY) /[^`]*)`", (DOCS / "api.md").read_text()))
    assert described == served


def test_the_api_pages_spec_is_a_spec() -> None:
    import msgspec

    from tartarus.model.sandbox import SandboxSpec

    (body,) = re.findall(r"```json\n(.*?)```", (DOCS / "api.md").read_text(), re.DOTALL)
    spec = msgspec.json.decode(body.encode(), type=SandboxSpec)
    assert set(json.loads(body)) == set(SandboxSpec.__struct_fields__)
    assert spec.command is not None


def test_every_page_is_reachable() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert set(re.findall(r"([\w-]+\.md)", nav)) == {path.name for path in DOCS.glob("*.md")}


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")) + sorted(ROOT.glob("*.md")), ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} → {target}"


def test_modules_that_the_pages_name_exist() -> None:
    from tartarus.policy.judges import ENTRY_POINTS

    for page in DOCS.glob("*.md"):
        for name in re.findall(r"`(tartarus(?:\.(?!io/)[a-z_]+)+)[`.(]?", page.read_text()):
            if name == ENTRY_POINTS:  # a group of entry points, not a module
                continue
            parts = name.split(".")[1:]
            place = ROOT / "src" / "tartarus" / Path(*parts)
            # `tartarus.model.errors`, or a name in it.
            found = place.is_dir() or place.with_suffix(".py").is_file() or place.parent.with_suffix(".py").is_file()
            assert found, f"{page.name}: {name}"


def test_commands_that_the_pages_name_exist() -> None:
    from tartarus.cli.app import COMMANDS

    known = set(COMMANDS)
    for page in [*DOCS.glob("*.md"), ROOT / "README.md"]:
        if page.name == "cli.md":
            continue
        for line in page.read_text().splitlines():
            # What is planned may be named where it is said to be planned.
            if "planned" in line:
                continue
            for name in re.findall(r"(?:`|\$ )tartarus ([a-z]+)", line):
                assert name in known, f"{page.name}: tartarus {name}"


def test_every_deity_of_the_roadmap_has_its_place() -> None:
    named = set(re.findall(r"^\| \*\*(\w+)\*\*", (DOCS / "pantheon.md").read_text(), re.MULTILINE))
    roadmap = (
        "Olympus Themis Moirai Hermes Judges Hades Acheron Styx Cocytus Phlegethon Hecatoncheires Nyx Erebus Lethe "
        "Erinyes Tartarus Typhon Kampe Hypnos Thanatos Charon Cerberus Persephone Chaos Kronos Hyperion Prometheus "
        "Atlas Zeus"
    )
    assert named == set(roadmap.split())
