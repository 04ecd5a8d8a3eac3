"""An inventory, and what is known of it, as CycloneDX 1.6 JSON.

Written here rather than with cyclonedx-python-lib: that brings six distributions into the daemon to print one
dictionary. The tests check the dictionary against that library's copy of the official schema.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import msgspec

from tartarus.images.sbom.nouns import Inventory, Package

_SPACE = uuid.UUID("6f0c5a0e-52c5-5d2f-9a0c-6c1d6a0f7f53")  # ours, so that serial numbers are nobody else's


class Affected(msgspec.Struct, frozen=True):
    """A vulnerability for the document: its id and words, ratings as CycloneDX has them, and the purls it is in."""

    id: str
    source_url: str
    severity: str
    score: float | None
    vector: str
    description: str
    recommendation: str
    purls: tuple[str, ...]


def cyclonedx(
    inventory: Inventory,
    *,
    name: str,
    digest: str = "",
    timestamp: str | None = None,
    vulnerabilities: Sequence[Affected] = (),
) -> dict[str, Any]:
    """The document of the template `name` with the image digest `digest` (``sha256:…``).

    The same inventory gives the same document, byte for byte; a time is in it only if one is given (RFC 3339).
    """
    subject: dict[str, Any] = {"type": "container", "bom-ref": "template", "name": name}
    if digest:
        subject["version"] = digest
    metadata: dict[str, Any] = {
        "tools": {"components": [{"type": "application", "name": "tartarus", "version": version("tartarus")}]},
        "component": subject,
    }
    if timestamp is not None:
        metadata["timestamp"] = timestamp
    if inventory.gaps:
        metadata["properties"] = [{"name": "tartarus:gap", "value": gap} for gap in inventory.gaps]
    document: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": metadata,
        "components": _components(inventory),
        # What compiled programs carry inside is never listed, so no inventory of ours claims to be complete.
        "compositions": [{"aggregate": "incomplete", "assemblies": ["template"]}],
    }
    if vulnerabilities:
        document["vulnerabilities"] = [_vulnerability(found) for found in vulnerabilities]
    content = msgspec.json.encode(document, order="sorted")
    document["serialNumber"] = f"urn:uuid:{uuid.uuid5(_SPACE, hashlib.sha256(content).hexdigest())}"
    return document


def _components(inventory: Inventory) -> list[dict[str, Any]]:
    components: list[dict[str, Any]] = []
    if inventory.distribution is not None:
        system = {"type": "operating-system", "bom-ref": "os", "name": inventory.distribution.id}
        if inventory.distribution.release:
            system["version"] = inventory.distribution.release
        if inventory.distribution.title:
            system["description"] = inventory.distribution.title
        components.append(system)
    # Two records of one package may differ in what a purl does not say (their owner), and a reference must be unique.
    merged: dict[str, list[Package]] = {}
    for package in inventory.packages:
        merged.setdefault(package.purl, []).append(package)
    return components + [_component(purl, packages) for purl, packages in sorted(merged.items())]


def _component(purl: str, packages: Sequence[Package]) -> dict[str, Any]:
    package = packages[0]
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": purl,
        "name": package.name,
        "version": package.version,
        "purl": purl,
        "evidence": {
            "occurrences": [{"location": path} for path in sorted({path for each in packages for path in each.paths})]
        },
    }
    if package.namespace.startswith("@"):
        component["group"] = package.namespace
    if package.license:
        component["licenses"] = [{"license": {"name": package.license}}]
    properties = [
        {"name": "tartarus:owner", "value": owner} for owner in sorted({p.owner for p in packages if p.owner})
    ]
    if properties:
        component["properties"] = properties
    return component


def _vulnerability(found: Affected) -> dict[str, Any]:
    rating: dict[str, Any] = {"severity": found.severity}
    if found.score is not None:
        rating["score"] = found.score
    if found.vector:
        rating["vector"] = found.vector
        methods = {"CVSS:4.0": "CVSSv4", "CVSS:3.1": "CVSSv31", "CVSS:3.0": "CVSSv3"}
        rating["method"] = methods.get(found.vector[:8], "CVSSv2")
    entry: dict[str, Any] = {
        "bom-ref": f"{found.id}#{hashlib.sha256(' '.join(found.purls).encode()).hexdigest()[:16]}",
        "id": found.id,
        "source": {"name": "OSV", "url": found.source_url},
        "ratings": [rating],
        "affects": [{"ref": purl} for purl in found.purls],
    }
    if found.description:
        entry["description"] = found.description
    if found.recommendation:
        entry["recommendation"] = found.recommendation
    return entry
