"""A registry in a process of its own that kills itself at a step: `python -m tests.registry_process FOLDER RUN BLOBS STEP`.

STEP is `before:` or `after:` and a name of STEPS, or nothing. FOLDER keeps the data, RUN the sockets, so that the next
process is the same registry at the same place.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.content.blobs.filesystem import FileAssembly
from services.content.blobs.s3.store import S3Assembly
from services.kernel.app import serve
from services.kernel.settings import ServerSettings
from services.registry.app import open_registry
from services.registry.settings import Settings
from services.registry.store import uploads as upload_rows
from services.registry.uploads import Uploads

STEPS: dict[str, list[tuple[Any, str]]] = {
    "receiving": [(Uploads, "receive")],
    "committing": [(FileAssembly, "commit"), (S3Assembly, "commit")],
    "naming": [(upload_rows, "set_content")],
    "answering": [(Uploads, "complete")],
}


def arm(step: str) -> None:
    """Let the process die at the step."""
    when, _, name = step.partition(":")
    for owner, method in STEPS[name]:
        setattr(owner, method, _deadly(getattr(owner, method), before=when == "before"))


def _deadly(real: Callable[..., Any], *, before: bool) -> Callable[..., Any]:
    async def deadly(*args: Any, **kwargs: Any) -> None:
        if not before:
            await real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    return deadly


async def main(folder: Path, run: Path, blobs_url: str, step: str) -> None:
    """Serve until killed."""
    if step:
        arm(step)
    settings = Settings(
        database_url=f"sqlite:///{folder}/registry.db",
        blobs_url=blobs_url,
        secrets_key_file=folder / "secrets-key",
        admin_token_file=folder / "admin-token",
        blobs_listen=f"unix:{run}/blobs",
        garbage_grace_s=0,
    )
    (folder / "service-token").write_text("eks_for-tests")
    server = ServerSettings(listen=f"unix:{run}/grpc", service_token_file=folder / "service-token", log_level="WARNING")
    await serve([open_registry(settings)], server)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]))
