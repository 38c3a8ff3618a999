"""A service as BentoML 1.0 and 1.1 had them: a runner behind an API server."""

import bentoml
from bentoml.io import JSON, Text


class Doubling(bentoml.Runnable):
    SUPPORTED_RESOURCES = ("cpu",)
    SUPPORTS_CPU_MULTI_THREADING = True

    @bentoml.Runnable.method(batchable=False)
    def double(self, text):
        return text + text


runner = bentoml.Runner(Doubling, name="doubling")
svc = bentoml.Service("legacy", runners=[runner])


@svc.api(input=Text(), output=Text())
async def double(text):
    return await runner.double.async_run(text)


@svc.api(input=JSON(), output=JSON())
def keys(payload):
    return sorted(payload)
