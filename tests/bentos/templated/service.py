"""A service as BentoML 1.1 had them, with everything that its docker options know but a distribution."""

import os
from pathlib import Path

import bentoml
from bentoml.io import JSON, Text

svc = bentoml.Service("templated")


@svc.api(input=Text(), output=JSON())
def look(text):
    found = {name: Path(f"/opt/{name}").read_text().strip() for name in ("before", "seen", "after")}
    return {**found, "greeting": os.environ["GREETING"], "late": os.environ["LATE"], "user": os.getuid()}
