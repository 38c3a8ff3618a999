"""Two services that tell what they may do where they run; tests rewrite the version to make the next one."""

import os
from pathlib import Path

import bentoml

VERSION = "1"


@bentoml.service
class Words:
    @bentoml.api
    def count(self, text: str) -> int:
        return len(text.split())


@bentoml.service
class Contained:
    words = bentoml.depends(Words)

    @bentoml.api
    def version(self) -> str:
        return VERSION

    @bentoml.api
    async def describe(self, text: str) -> dict[str, int]:
        with bentoml.monitor("inputs") as monitor:
            monitor.log(len(text), name="letters", role="feature", data_type="numerical")
        return {"words": await self.words.to_async.count(text), "letters": len(text)}

    @bentoml.api
    def about(self) -> dict[str, str]:
        """Who it is, which folders it may write to, what it sees of others."""
        found = {
            "uid": str(os.getuid()),
            "processes": str(sum(path.name.isdigit() for path in Path("/proc").iterdir())),
        }
        for folder in ("/etc", "/home/bentoml/bento", "/app/.venv", "/tmp", "~", "$BENTOML_HOME"):
            try:
                file = Path(os.path.expandvars(folder)).expanduser() / "written"
                file.write_text("x")
                file.unlink()
                found[folder] = "writable"
            except OSError:
                found[folder] = "refused"
        found["sockets"] = " ".join(sorted(path.name for path in Path("/run/ekiben/d").iterdir()))
        found["capabilities"] = next(
            line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapBnd")
        )
        return found
