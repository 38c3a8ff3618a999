"""`ekiben images sign|verify|attestations|sbom|provenance|keygen`, over a layout on disk."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from services.builder import image_signing
from services.content.attestations import attachments, envelopes
from services.content.images.layout import LayoutImageStore
from tests.image_content import put_image


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    asyncio.run(put_image(tmp_path / "layout", "acme/x:1"))
    return tmp_path / "layout"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    (tmp_path / "password").write_text("secret\n")
    run("keygen", tmp_path / "our.key", "--password-file", tmp_path / "password")
    return tmp_path / "our.key"


def run(*arguments: object) -> int:
    return image_signing.main([str(each) for each in arguments])


def test_sign_and_verify(layout: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = f"oci:{layout}:acme/x:1"
    assert run("verify", image, "--key", key.with_suffix(".pub")) == 1
    assert "has no signature" in capsys.readouterr().err
    assert run("sign", image, "--key", key, "--password-file", key.with_name("password")) == 0
    digest = capsys.readouterr().out.strip()
    assert run("verify", image, "--key", key.with_suffix(".pub"), "--whole") == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == digest and "Signed by our.pub" in shown.err
    assert key.stat().st_mode & 0o777 == 0o600


def test_verify_reads_whole_images_where_it_is_told_to(
    layout: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = f"oci:{layout}:acme/x:1"
    run("sign", image, "--key", key, "--password-file", key.with_name("password"))

    async def layer() -> Path:
        store = LayoutImageStore(layout)
        _, content = await store.resolve("acme/x:1", image_signing.here())
        return layout / "blobs" / "sha256" / content.layers[0].digest.hex

    path = asyncio.run(layer())
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert run("verify", image, "--key", key.with_suffix(".pub")) == 0
    assert run("verify", image, "--key", key.with_suffix(".pub"), "--whole") == 1
    assert "damaged" in capsys.readouterr().err


def test_a_key_for_some_repositories_verifies_images_of_these(
    layout: Path, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = f"oci:{layout}:acme/x:1"
    run("sign", image, "--key", key, "--password-file", key.with_name("password"))
    public = key.with_suffix(".pub").read_text()
    (tmp_path / "ours.pub").write_text(f"images: acme/*\n{public}")
    (tmp_path / "others.pub").write_text(f"images: other/*\n{public}")
    assert run("verify", image, "--key", tmp_path / "ours.pub") == 0
    assert run("verify", image, "--key", tmp_path / "others.pub") == 1
    assert "trusted for other/*, not for acme/x" in capsys.readouterr().err
    for name, signed in (("ours.pub", True), ("others.pub", False)):
        assert run("attestations", image, "--key", tmp_path / name, "--format", "json") == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert bool(found["signers"]) is signed


def test_wrong_use_says_what_to_do(
    layout: Path, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115
    image = f"oci:{layout}:acme/x:1"
    (tmp_path / "wrong").write_text("another")
    cases = [
        (("verify", image), "Name whom you trust"),
        (("sign", image), "Name the key"),
        (("sign", image, "--key", key), "give its password"),
        (("sign", image, "--key", key, "--password-file", tmp_path / "wrong"), "does not open with this password"),
        (("sign", image, "--key", tmp_path / "none"), "cannot be read"),
        (("sign", image, "--key", key.with_suffix(".pub")), "no private key"),
        (("keygen", key, "--no-password"), "exists"),
        (("keygen", tmp_path / "new.key"), "nobody to ask"),
        (("keygen", tmp_path / "new.pub", "--no-password"), "no name for a private key"),
        (("keygen", "/", "--no-password"), "no name for a private key"),
        (("keygen", tmp_path / "none" / "new.key", "--no-password"), "No such file or directory"),
        (("keygen", tmp_path / "new.key", "--password-file", tmp_path / "none"), "No such file or directory"),
        (("sign", image, "--keyless", "--identity-token-file", tmp_path / "none"), "No such file or directory"),
        (("attestations", f"oci:{tmp_path}/wrong:v1"), "no image layout"),
        (("sbom", image), "has no sbom attached"),
        (("verify", f"oci:{layout}:acme/x:2", "--key", key.with_suffix(".pub")), "has no image 'acme/x:2'"),
        (("verify", image, "--identity", "me"), "not of the form"),
    ]
    for arguments, words in cases:
        capsys.readouterr()
        assert run(*arguments) == 1, arguments
        assert words in capsys.readouterr().err, arguments
    assert not (tmp_path / "new.pub").exists()


def test_what_is_said_of_an_image_is_listed_and_shown(
    layout: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = f"oci:{layout}:acme/x:1"

    async def attach() -> None:
        store = LayoutImageStore(layout)
        subject = await store.find("acme/x:1")
        await attachments.attach(store, subject, envelopes.CYCLONEDX, b'{"bomFormat": "CycloneDX"}')
        await attachments.attach_statement(store, subject, envelopes.PROVENANCE, {"buildDefinition": {"a": 1}})

    asyncio.run(attach())
    run("sign", image, "--key", key, "--password-file", key.with_name("password"))
    capsys.readouterr()
    assert run("sbom", image) == 0
    assert json.loads(capsys.readouterr().out) == {"bomFormat": "CycloneDX"}
    assert run("provenance", image) == 0
    assert json.loads(capsys.readouterr().out) == {"buildDefinition": {"a": 1}}
    assert run("sbom", image, "--key", key.with_suffix(".pub")) == 1
    assert "no signature that is trusted" in capsys.readouterr().err
    assert run("attestations", image, "--key", key.with_suffix(".pub"), "--format", "json") == 0
    found = {each["kind"]: each["signers"] for each in json.loads(capsys.readouterr().out)}
    assert found["sbom"] == [] and found["provenance"] == [] and found["signature"][0].startswith("our.pub")
    assert run("attestations", image) == 0
    assert "not trusted" in capsys.readouterr().out


def test_the_command_itself(layout: Path, tmp_path: Path) -> None:
    ekiben = [str(Path(sys.executable).with_name("ekiben")), "images"]

    def call(*arguments: object) -> str:
        done = subprocess.run([*ekiben, *map(str, arguments)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    public = call("keygen", tmp_path / "a.key", "--no-password", "--kind", "ed25519")
    digest = call("sign", f"oci:{layout}:acme/x:1", "--key", tmp_path / "a.key", "--older-clients")
    assert call("verify", f"oci:{layout}:acme/x:1", "--key", public) == digest
    assert len(json.loads(call("attestations", f"oci:{layout}:acme/x:1", "-o", "json"))) == 1
