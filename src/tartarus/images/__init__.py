"""Templates and their root file systems (Erebus).

The node calls `prepare` before the first sandbox of a template: it turns the template's description into
directories that overlayfs can stack, made once per content and shared by every sandbox.
"""

from __future__ import annotations

from tartarus.images.catalogue import catalogue
from tartarus.images.preparing import PreparedTemplate, prepare
from tartarus.images.store import LayerStore

__all__ = ["LayerStore", "PreparedTemplate", "catalogue", "prepare"]
