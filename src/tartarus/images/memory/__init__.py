"""Memory snapshots on disk (Nyx): sets of a guest's memory, device state and files, whole and verified or refused."""

from tartarus.images.memory.manifest import Facts
from tartarus.images.memory.sets import KeptSet, MemorySets, Taken

__all__ = ["Facts", "KeptSet", "MemorySets", "Taken"]
