"""An inventory of a stack of layers."""

from __future__ import annotations

from tartarus.images.sbom.languages import read_language_packages
from tartarus.images.sbom.nouns import Inventory
from tartarus.images.sbom.reading import Limits, Reader
from tartarus.images.sbom.system import owned_records, read_distribution, read_system_packages
from tartarus.images.stackview import StackView

__all__ = ["Limits", "take_inventory"]


def take_inventory(view: StackView, limits: Limits | None = None) -> Inventory:
    """Every package the stack holds. Blocks: call it in a thread.

    What can't be read or makes no sense is named in `gaps`, so that hiding a package that way is seen. Raises
    ImageRefused for a tree or for records beyond `limits`, OSError when a layer can't be read at all.
    """
    reader = Reader(view, limits or Limits())
    distribution = read_distribution(reader)
    read_system_packages(reader, distribution)
    read_language_packages(reader, owned_records(reader))
    return Inventory(distribution, reader.packages(), tuple(sorted(reader.gaps)))
