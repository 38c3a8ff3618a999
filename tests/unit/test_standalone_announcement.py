"""How a start says where the admin's token is."""

import shlex
import socket
import subprocess
from pathlib import Path

import pytest

from services.standalone import app
from services.standalone.settings import Settings, expand


def words_of(said: str) -> list[str]:
    """The command inside of what is printed, as a shell reads it."""
    assert said.startswith('"$(') and said.endswith(')"')
    return shlex.split(said[3:-2])


def test_a_log_names_the_file_as_a_shell_takes_it(tmp_path: Path) -> None:
    file = tmp_path / "my data; 'x'" / "admin-token"
    file.parent.mkdir()
    file.write_text("ekb_x\n")
    done = subprocess.run(["sh", "-c", f"printf %s {app._token(file, {})}"], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("ekb_x", "")


def test_a_pods_log_says_how_the_token_is_had_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    namespace, file = tmp_path / "namespace", Path("/var/lib/ekiben/admin-token")
    monkeypatch.setattr(app, "_NAMESPACE", namespace)
    monkeypatch.setattr(socket, "gethostname", lambda: "ekiben-0")
    pod = {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}
    assert words_of(app._token(file, pod)) == ["kubectl", "exec", "ekiben-0", "--", "cat", str(file)]
    namespace.write_text("own\n")
    assert words_of(app._token(file, pod)) == ["kubectl", "exec", "-n", "own", "ekiben-0", "--", "cat", str(file)]


@pytest.mark.parametrize(("host", "url"), [("::1", "http://[::1]:7400"), ("0.0.0.0", "http://127.0.0.1:7400")])
def test_the_address_is_a_url_also_where_it_is_of_version_6(tmp_path: Path, host: str, url: str) -> None:
    assert expand(Settings(data=tmp_path, host=host, port=7400), {}).deployer.public_url == url
