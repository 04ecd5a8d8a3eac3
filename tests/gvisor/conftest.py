"""The gVisor level is tried on a real node, as the others are."""

from tests.node.conftest import node, run, state_dir, store

__all__ = ["node", "run", "state_dir", "store"]
