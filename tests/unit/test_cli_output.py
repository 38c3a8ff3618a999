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


def test_long_columns_give_way_to_short_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "_is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    output.table(
        ["DEPLOYMENT", "STATE", "READY", "BENTO", "URL", "AGE"],
        [["demo", "TERMINATED", "12/12", "summarizer:pfpma2hjlgfk4ax4", "http://127.0.0.1:7500/x", "16m"]],
    )
    headings, row = capsys.readouterr().out.splitlines()
    assert all(word in headings for word in ("DEPLOYMENT", "STATE", "READY", "AGE"))
    assert all(word in row for word in ("demo", "TERMINATED", "12/12", "16m", "summ"))
