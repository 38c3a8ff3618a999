"""A service whose image runs commands before and after its environment is there, a script, and one with a secret."""

import os
import shutil
from pathlib import Path

import bentoml

image = (
    # No distribution: else every such image would first install a compiler.
    bentoml.images.Image(python_version="3.11", base_image="python:3.11-slim", distro="none")
    .run("apt-get update && apt-get install -y --no-install-recommends sl")
    .python_packages("numpy")
    .run('python -c "import numpy; print(numpy.__version__)" > /opt/after')
)


@bentoml.service(
    image=image, envs=[{"name": "SETTING", "value": 'a "b" $c'}, {"name": "BUILD_TOKEN", "stage": "build"}]
)
class Commanded:
    @bentoml.api
    def look(self) -> dict[str, str]:
        found = {name: Path(f"/opt/{name}").read_text().strip() for name in ("setting", "token", "after")}
        return {
            **found,
            "program": shutil.which("sl", path="/usr/games") or "",
            "known": os.environ.get("BUILD_TOKEN", "nothing"),
        }
