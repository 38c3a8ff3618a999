"""Saves the model `weights` into the local store."""

import json
import sys
from pathlib import Path

import bentoml

with bentoml.models.create("weights", labels={"stage": "test"}) as model:
    (Path(model.path) / "weights.json").write_text(json.dumps({"factor": float(sys.argv[1])}))
print(model.tag)
