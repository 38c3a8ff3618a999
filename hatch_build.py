"""Builds Envoy's capture filter from C with the package, where there is a compiler; without one Envoy runs the script.

Setting EKIBEN_BUILD_WITHOUT_C to anything leaves it out.
"""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("services/gateway/capture.c")
BUILT = Path("services/gateway/libekiben_capture.so")


class Hook(BuildHookInterface):  # type: ignore[type-arg]
    """Puts `libekiben_capture.so` beside its source, and into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a wheel, an editable one too, is built."""
        root = Path(self.root)
        compiler = shutil.which(os.environ.get("CC", "cc"))
        (root / BUILT).unlink(missing_ok=True)
        if compiler is None or os.environ.get("EKIBEN_BUILD_WITHOUT_C"):
            self.app.display_warning("No C compiler: Envoy will capture with the script, which costs more.")
            return
        fresh = root / BUILT.with_suffix(".new")  # An Envoy that runs has the old file mapped; it must not change.
        command = [compiler, "-O2", "-Wall", "-fPIC", "-shared", "-o", str(fresh), str(root / SOURCE)]
        if os.uname().sysname == "Darwin":
            command.insert(1, "-Wl,-undefined,dynamic_lookup")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            fresh.unlink(missing_ok=True)
            self.app.display_warning(f"{SOURCE} does not compile; Envoy will capture with the script.\n{done.stderr}")
            return
        fresh.replace(root / BUILT)
        build_data["artifacts"].append(str(BUILT))
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
