"""Two services: the entry asks the other."""

import os

import bentoml


@bentoml.service
class Words:
    @bentoml.api
    def count(self, text: str) -> int:
        return len(text.split())

    @bentoml.api
    def pid(self) -> int:
        return os.getpid()


@bentoml.service
class Chain:
    words = bentoml.depends(Words)

    @bentoml.api
    async def describe(self, text: str) -> dict[str, int]:
        return {"words": await self.words.to_async.count(text), "letters": len(text)}

    @bentoml.api
    async def pids(self) -> dict[str, int]:
        return {"own": os.getpid(), "words": await self.words.to_async.pid()}
