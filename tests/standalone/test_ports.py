"""What a deployment says when another program has taken its own port."""

import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

from tests.bentoml_clients import client
from tests.platform import BentoMl, http, running, wait_for


def test_a_port_that_was_taken_meanwhile_is_told_and_taken_back(tmp_path: Path, bentos: Path) -> None:
    with running(tmp_path / "data") as platform:
        bentoml = BentoMl(client("1.4"), tmp_path / "client").login(platform)
        bentoml("deploy", ".", "--name", "ported", cwd=bentos / "chain", timeout_s=400)
        (url,) = platform.ekiben_json("deployments", "get", "ported", "-o", "json")["urls"]
        port = urlsplit(url).port
        assert port

        def told() -> list[str]:
            found = platform.ekiben_json("deployments", "get", "ported", "-o", "json")
            assert found["state"] in ("RUNNING", "DEPLOYING", "UNHEALTHY")
            return [each["message"] for each in found["conditions"] if each["type"] == "Reachable"]

        platform.stop()
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", port))
            other.listen()
            platform.start()
            (message,) = wait_for("the condition", told, 60)
            assert str(port) in message
            (by_name,) = re.findall(r"https?://\S+[^;. ]", message)
            host = {"Host": urlsplit(by_name).netloc}
            wait_for(by_name, lambda: http("GET", f"{platform.url}/readyz", headers=host).status == 200, 60)
        wait_for("the port to be taken back", lambda: not told(), 60)
        wait_for("its URL", lambda: http("GET", f"{url}/readyz").status == 200, 30)
