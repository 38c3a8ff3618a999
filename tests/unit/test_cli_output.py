"""What a command prints for programs can be read back."""

import json

import pytest
import yaml
from google.rpc.error_details_pb2 import ErrorInfo

from ekiben.builder.v1 import builder_pb2 as pb
from ekiben.cli import output


@pytest.mark.parametrize(("form", "read"), [("json", json.loads), ("yaml", yaml.safe_load)])
def test_a_failed_build_with_details_is_printed(form: str, read) -> None:  # type: ignore[no-untyped-def]
    build = pb.Build(name="builds/b1")
    build.failure.details.add().Pack(ErrorInfo(reason="REQUIREMENT_INVALID", metadata={"requirement": "tabulate=>4"}))
    assert read(output.dump(output.as_data(build), form)) == output.as_data(build)
