"""Software bills of materials: which packages a template holds, without running anything of it.

The node takes an inventory when a template is made and shows it as CycloneDX; the scanner looks the packages up.
Read are the databases of dpkg, apk and rpm, and what pip, npm and R leave beside installed packages. Programs that
carry their libraries inside, such as those of Go and Rust, are not looked into.
"""

from __future__ import annotations

from tartarus.images.sbom.cyclonedx import cyclonedx
from tartarus.images.sbom.inventory import Limits, take_inventory
from tartarus.images.sbom.nouns import Distribution, Inventory, Package

__all__ = ["Distribution", "Inventory", "Limits", "Package", "cyclonedx", "take_inventory"]
