"""A service that says its version; tests rewrite the line below to make the next one."""

import bentoml

VERSION = "1"


@bentoml.service
class Versions:
    @bentoml.api
    def version(self) -> str:
        return VERSION
