"""Build hook: every wheel, and every editable install, carries the compiled guest agent."""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

if TYPE_CHECKING:
    from types import ModuleType


def _agent_builder(root: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_agent", Path(root) / "scripts" / "build_agent.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError("scripts/build_agent.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class AgentBuildHook(BuildHookInterface[Any]):
    """Compiles `src/tartarus/guest/agent` and marks the wheel as belonging to this architecture."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """Ask for ziglang's compiler only where the system has none that links statically."""
        return [] if _agent_builder(self.root).system_compiler() else ["ziglang"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the agent, then tag the wheel: any Python 3, this machine, any C library.

        The program is static, so the wheel fits glibc and musl systems alike.
        """
        del version
        _agent_builder(self.root).build()
        machine = platform.machine()
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-manylinux2014_{machine}.musllinux_1_1_{machine}"
