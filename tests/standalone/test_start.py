"""How `ekiben up` starts, and what it says when it cannot."""

import os
import socket
from pathlib import Path

import pytest

from tests.platform import BIN, Platform, http, run, running, wait_for


def test_a_data_folder_may_have_any_name(tmp_path: Path) -> None:
    """Spaces, what means something else in a URL or in an address of gRPC's, and letters that the locale has not."""
    data = tmp_path / "my 100% ödd?data#1" / ".." / "my 100% ödd?data#1"
    data.parent.parent.mkdir()
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with running(data, env=locale) as platform:
        assert platform.ekiben_json("users", "list")[0]["name"] == "users/admin"
        assert str(data.resolve()) in platform.output
        assert ".." not in platform.output
    inside = {path.name for path in data.iterdir()}
    assert {"registry", "builder", "deployer", "recorder", "gateway", "admin-token"} <= inside
    assert (data / "registry" / "registry.db").exists()
    assert (data / "registry" / "blobs").is_dir()
    assert not list(tmp_path.glob("my 100% ödd")), "nothing lands where the name was cut"


@pytest.mark.parametrize(
    ("arguments", "env", "code", "said"),
    [
        ((), {"EKIBEN_REGISTRY_DATABASE_URL": "mysql://x"}, 2, "mysql://x is neither a SQLite nor a PostgreSQL URL."),
        ((), {"EKIBEN_REGISTRY_DATABASE_URL": "secret"}, 2, "database_url: it is no URL of a database."),
        (
            (),
            {"EKIBEN_REGISTRY_DATABASE_URL": "postgresql://me:pw@127.0.0.1:1/x"},
            1,
            "me:***@127.0.0.1:1/x does not answer",
        ),
        (
            ("--database", "postgresql://me:pw@127.0.0.1:1/x"),
            {},
            1,
            "me:***@127.0.0.1:1/x?schema=ekiben_registry does not answer: Connect call failed",
        ),
        (("--database", "sqlite:////x.db"), {}, 2, "--database takes the URL of a PostgreSQL database"),
        (("--database", "postgresql://h/x?schema=No"), {}, 2, "schema=No_registry cannot be used"),
        (("--blobs", "ftp://x"), {}, 1, "it begins with 'ftp'. Its form is file:///"),
        ((), {"EKIBEN_REGISTRY_BLOBS_URL": "ftp://x"}, 1, "it begins with 'ftp'. Its form is file:///"),
        ((), {"EKIBEN_DEPLOYER_PORT_RANGE": "9-x", "EKIBEN_GATEWAY_PORT": "zz"}, 2, "EKIBEN_GATEWAY_PORT: 'zz'"),
        (("--host", "203.0.113.7"), {}, 2, "cannot listen on 203.0.113.7"),
        (("--host", "203.0.113.7", "--port", "0"), {}, 2, "Name an address of this machine"),
        (
            ("--port", "{used}"),
            {},
            2,
            "cannot listen on 127.0.0.1:{used}: Address already in use. End what listens there",
        ),
        (
            ("--data", "/proc/nowhere"),
            {},
            2,
            "/proc/nowhere cannot be used: No such file or directory. Name another with --data",
        ),
    ],
)
def test_what_stops_the_start_is_told_in_a_sentence(
    tmp_path: Path, arguments: tuple[str, ...], env: dict[str, str], code: int, said: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = str(used.getsockname()[1])
        done = run(
            [
                str(BIN / "ekiben"),
                *("up", "--data", str(tmp_path / "data"), "--port", str(Platform(tmp_path).port)),
                *(argument.format(used=port) for argument in arguments),
            ],
            env=os.environ | env,
            check=False,
        )
    assert done.returncode == code, done.stderr
    assert said.format(used=port) in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3
    assert "pw" not in done.stderr


def test_port_0_is_kept_by_later_starts(tmp_path: Path) -> None:
    platform = Platform(tmp_path / "data", port=0)
    seen = []
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Platform, "url", property(lambda self: _announced(self)))
            try:
                platform.start()
                seen.append(platform.url)
                assert http("GET", f"{platform.url}/readyz").json()["ready"]
            finally:
                platform.close()
    assert seen[0] == seen[1]


def _announced(platform: Platform) -> str:
    lines = [line for line in platform.output.splitlines() if line.startswith("Ekiben is ready at ")]
    return lines[-1].split()[-1] if lines else "http://127.0.0.1:1"


def test_a_log_tells_where_the_admins_token_is_and_not_what_it_is(tmp_path: Path) -> None:
    """And it is told that all is ready where nobody here reaches the public URL, as behind an Ingress, nor what
    `http_proxy` names."""
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:1")
    env = {
        "EKIBEN_DEPLOYER_PUBLIC_URL": "https://ekiben.invalid",
        "KUBERNETES_SERVICE_HOST": "",
        "no_proxy": "",
    } | proxies
    platform = Platform(tmp_path / "data", env=env)
    try:
        platform.start()
        wait_for("the announcement", lambda: "Ekiben is ready at https://ekiben.invalid" in platform.output)
        assert f"$(cat {platform.data}/admin-token)" in platform.output
        assert f"ekiben login https://ekiben.invalid --token-file {platform.data}/admin-token" in platform.output
        assert platform.token not in platform.output
    finally:
        platform.close()
