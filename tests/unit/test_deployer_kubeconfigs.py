"""Kubeconfigs that somebody gives: what is kept of them, and what is refused."""

import base64
from pathlib import Path
from typing import Any

import pytest
import yaml

from ekiben.errors import InvalidArgument
from services.deployer.kubeconfigs import MAX_BYTES, read
from tests.certificates import certificates

NO_PEM = base64.b64encode(b"no certificate").decode()


def kubeconfig(user: dict[str, Any], **cluster: Any) -> str:
    return yaml.safe_dump(
        {
            "current-context": "there",
            "contexts": [{"name": "there", "context": {"cluster": "c", "user": "u"}}, {"name": "other", "context": {}}],
            "clusters": [{"name": "c", "cluster": {"server": "https://10.0.0.1:6443", **cluster}}],
            "users": [{"name": "u", "user": user}, {"name": "somebody else", "user": {"token": "not kept"}}],
        }
    )


@pytest.fixture
def pems(tmp_path: Path) -> dict[str, str]:
    """ca, cert and key, as a kubeconfig has them."""
    certificates(tmp_path)
    return {name: base64.b64encode((tmp_path / f"{name}.pem").read_bytes()).decode() for name in ("ca", "cert", "key")}


def test_one_context_is_kept_and_nothing_else(pems: dict[str, str]) -> None:
    found = read(kubeconfig({"token": "t0ken\n"}, **{"certificate-authority-data": pems["ca"]}), "")
    assert found.server == "https://10.0.0.1:6443"
    kept = yaml.safe_load(found.text)
    assert kept["users"] == [{"name": "ekiben", "user": {"token": "t0ken"}}]
    assert kept["clusters"][0]["cluster"] == {
        "server": "https://10.0.0.1:6443",
        "certificate-authority-data": pems["ca"],
    }
    assert "not kept" not in found.text and "t0ken" not in repr(found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no kubeconfig"),
        ("[1, 2]", "no kubeconfig"),
        ("{", "no YAML"),
        ("a: !!python/object/apply:os.system [true]", "no YAML"),
        ("x" * (MAX_BYTES + 1), "at most"),
        ("{}", "no current-context"),
        (kubeconfig({"exec": {"command": "sh"}}), "run a program"),
        (kubeconfig({"auth-provider": {"name": "gcp"}, "token": "t"}), "run a program"),
        (kubeconfig({"tokenFile": "/etc/shadow"}), "names a file"),
        (kubeconfig({"client-certificate": "/a", "client-key": "/b"}), "names a file"),
        (kubeconfig({"token": "t"}, **{"certificate-authority": "/ca"}), "names a file"),
        (kubeconfig({}), "neither a token"),
        (kubeconfig({"client-certificate-data": "QQ=="}), "neither a token"),
        (kubeconfig({"token": "t"}, server="file:///etc"), "no URL"),
        (kubeconfig({"token": "t"}, server="https://[::1"), "no URL"),
        (kubeconfig({"token": "t"}, server="https://a:port"), "no URL"),
        (kubeconfig({"token": "t"}, server="https://user:password@a"), "no URL"),
        (kubeconfig({"token": "t"}, server="https://a b"), "no URL"),
        ("current-context: 2020-13-45", "no YAML"),
        ("[" * 5000, "no YAML"),
        (kubeconfig({"token": "t"}, **{"proxy-url": "socks5://a"}), "proxy-url is not followed"),
        (kubeconfig({"token": "t"}, **{"insecure-skip-tls-verify": "false"}), "must be true or false"),
        (kubeconfig({"token": 12}), "must be a text"),
        (kubeconfig({"token": "a\nb: c"}), "line breaks"),
        (kubeconfig({"token": "t"}, **{"certificate-authority-data": "!"}), "no certificate in PEM"),
        (kubeconfig({"token": "t"}, **{"certificate-authority-data": NO_PEM}), "no certificate in PEM"),
        (kubeconfig({"client-certificate-data": NO_PEM, "client-key-data": NO_PEM}), "is no PEM"),
        (kubeconfig({"token": "t"}).replace("name: c", "name: d"), "no cluster 'c'"),
    ],
)
def test_what_cannot_be_kept_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said) as refused:
        read(text, "")
    assert refused.value.reason == "KUBECONFIG_REFUSED"


def test_a_context_that_is_not_there_is_named() -> None:
    with pytest.raises(InvalidArgument, match="no context 'elsewhere'"):
        read(kubeconfig({"token": "t"}), "elsewhere")


def test_a_client_certificate_is_kept_with_its_own_key_only(pems: dict[str, str], tmp_path: Path) -> None:
    mine = {"client-certificate-data": pems["cert"], "client-key-data": pems["key"]}
    assert yaml.safe_load(read(kubeconfig(mine), "").text)["users"][0]["user"] == mine
    certificates(tmp_path)
    another = base64.b64encode((tmp_path / "key.pem").read_bytes()).decode()
    with pytest.raises(InvalidArgument, match="not the key of"):
        read(kubeconfig(mine | {"client-key-data": another}), "")


@pytest.mark.parametrize("field", ["client-certificate-data", "client-key-data"])
def test_a_client_certificate_on_a_curve_that_nobody_here_knows_is_refused_in_words(
    pems: dict[str, str], field: str
) -> None:
    mine = {"client-certificate-data": pems["cert"], "client-key-data": pems["key"]}
    first, *lines, last = base64.b64decode(mine[field]).decode().splitlines()
    p256, prime239v1 = (bytes.fromhex(f"06082a8648ce3d0301{end}") for end in ("07", "04"))
    der = base64.b64decode("".join(lines))
    assert p256 in der
    other = "\n".join([first, base64.b64encode(der.replace(p256, prime239v1)).decode(), last])
    with pytest.raises(InvalidArgument, match="of a kind that cannot be used") as refused:
        read(kubeconfig(mine | {field: base64.b64encode(other.encode()).decode()}), "")
    assert refused.value.reason == "KUBECONFIG_REFUSED"


@pytest.mark.parametrize("server", ["https://ann:pass@host:1", "ann:pass@host:1", "https://ann:pa/ss@host:1"])
def test_a_password_in_the_address_is_not_said_again(server: str) -> None:
    with pytest.raises(InvalidArgument, match="'…@host:1' is no URL") as refused:
        read(kubeconfig({"token": "t"}, server=server), "")
    assert "ann:" not in f"{refused.value} {refused.value.violations}"
