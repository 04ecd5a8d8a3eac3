"""Dockerfiles: read, planned, and built step by step into layers that overlayfs can stack.

The node calls `build` with a `StepRunner`, which runs a RUN in one of our own sandboxes; every other instruction is
done here, without running anything of the image. No Docker is needed.
"""

from __future__ import annotations

from tartarus.images.dockerfile.build import BuildRequest, build
from tartarus.images.dockerfile.context import read_dockerfile
from tartarus.images.dockerfile.limits import CopyLimits
from tartarus.images.dockerfile.parser import parse
from tartarus.images.dockerfile.steps import Base, Built, Event, Output, RunStep, StepRunner, Watcher

__all__ = [
    "Base",
    "BuildRequest",
    "Built",
    "CopyLimits",
    "Event",
    "Output",
    "RunStep",
    "StepRunner",
    "Watcher",
    "build",
    "parse",
    "read_dockerfile",
]
