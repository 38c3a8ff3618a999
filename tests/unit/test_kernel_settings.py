"""Settings come from the environment, and every fault is told at once."""

import dataclasses
import logging
from pathlib import Path

import pytest

from services.kernel.settings import PeerSettings, ServerSettings, SettingsError, describe, load


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """For the test."""

    database_url: str
    """Where."""
    workers: int = 1
    ratio: float = 0.5
    fast: bool = False
    folder: Path | None = None
    names: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()


def test_each_type_is_read_from_its_variable() -> None:
    env = {
        "EKIBEN_X_DATABASE_URL": "sqlite:///x",
        "EKIBEN_X_WORKERS": "3",
        "EKIBEN_X_RATIO": "0.25",
        "EKIBEN_X_FAST": "Yes",
        "EKIBEN_X_FOLDER": "/tmp/x",
        "EKIBEN_X_NAMES": "a, b,",
        "EKIBEN_X_FOLDERS": "/a,/b",
    }
    assert load(Example, "EKIBEN_X", env) == Example(
        database_url="sqlite:///x",
        workers=3,
        ratio=0.25,
        fast=True,
        folder=Path("/tmp/x"),
        names=("a", "b"),
        folders=(Path("/a"), Path("/b")),
    )


def test_every_fault_is_told_at_once() -> None:
    env = {"EKIBEN_X_WORKERS": "many", "EKIBEN_X_FAST": "maybe", "EKIBEN_X_RATIO": ""}
    with pytest.raises(SettingsError) as caught:
        load(Example, "EKIBEN_X_", env)
    assert len(caught.value.faults) == 3
    for variable in ("DATABASE_URL", "WORKERS", "FAST"):
        assert f"EKIBEN_X_{variable}" in str(caught.value)


def test_an_unknown_variable_is_logged_and_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    # Kubernetes gives every container EKIBEN_REGISTRY_PORT and its kin for a Service named ekiben-registry.
    env = {"EKIBEN_X_DATABASE_URL": "x", "EKIBEN_X_PORT": "tcp://10.0.0.1:80"}
    with caplog.at_level(logging.WARNING):
        load(Example, "EKIBEN_X", env)
    assert caplog.messages == ["EKIBEN_X_PORT is not a setting, and is passed over. docs/settings.md lists them."]


def test_a_misspelt_variable_is_told_as_what_was_meant(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(Example, "EKIBEN_X", {"EKIBEN_X_DATABASE_URL": "x", "EKIBEN_X_WOKRERS": "3"})
    assert caplog.messages == ["EKIBEN_X_WOKRERS is not a setting, and is passed over. Did you mean EKIBEN_X_WORKERS?"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"tls_cert_file": Path("c")},
        {"tls_client_ca_file": Path("c")},
        {"trace_sample_percent": 101.0},
        {"log_format": "xml"},
        {"log_level": "LOUD"},
        {"grace_s": -1.0},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_settings_that_cannot_hold_together_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        ServerSettings(service_token_file=Path("t"), **wrong)  # type: ignore[arg-type]


def test_peers_certificate_needs_roots() -> None:
    with pytest.raises(SettingsError):
        PeerSettings(service_token_file=Path("t"), tls_cert_file=Path("c"), tls_key_file=Path("k"))


def test_settings_describe_themselves() -> None:
    first, *rest = describe(Example, "EKIBEN_X")
    assert (first.variable, first.default, first.text) == ("EKIBEN_X_DATABASE_URL", "required", "Where.")
    assert len(rest) == 6
    assert all(setting.text for setting in describe(ServerSettings, "EKIBEN_SERVER"))
    assert all(setting.text for setting in describe(PeerSettings, "EKIBEN_PEERS"))
