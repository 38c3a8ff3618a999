"""Kubeconfigs that somebody gives: what is kept of them, and what is refused."""

from typing import Any

import pytest
import yaml

from ekiben.errors import InvalidArgument
from services.deployer.kubeconfigs import MAX_BYTES, read


def kubeconfig(user: dict[str, Any], **cluster: Any) -> str:
    return yaml.safe_dump(
        {
            "current-context": "there",
            "contexts": [{"name": "there", "context": {"cluster": "c", "user": "u"}}, {"name": "other", "context": {}}],
            "clusters": [{"name": "c", "cluster": {"server": "https://10.0.0.1:6443", **cluster}}],
            "users": [{"name": "u", "user": user}, {"name": "somebody else", "user": {"token": "not kept"}}],
        }
    )


def test_one_context_is_kept_and_nothing_else() -> None:
    found = read(kubeconfig({"token": "t0ken"}, **{"certificate-authority-data": "Q0E="}), "")
    assert found.server == "https://10.0.0.1:6443"
    kept = yaml.safe_load(found.text)
    assert kept["users"] == [{"name": "ekiben", "user": {"token": "t0ken"}}]
    assert kept["clusters"][0]["cluster"] == {
        "server": "https://10.0.0.1:6443",
        "certificate-authority-data": "Q0E=",
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
