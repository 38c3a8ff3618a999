"""Images of a running platform, pulled by whatever pulls images: `/v2/` of the public port."""

import asyncio
import base64
import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.builder.offline import here
from services.content.images import REF_NAME
from services.content.images.layout import LayoutImageStore
from tests.base_image import base_image
from tests.engines import containerd, needs, podman
from tests.image_content import add_entries, put_image, put_referrer
from tests.oci_conformance import MISSING, conformance, run_conformance
from tests.platform import Platform, run, running, wait_for
from tests.platform import http as ask

CODE = "import json, os; print(json.dumps([6 * 7, os.uname().sysname]))"


def layout(platform: Platform) -> Path:
    """Where the platform keeps its images."""
    return platform.data / "builder" / "images"


def login(token: str) -> dict[str, str]:
    """The header of whoever logged in."""
    return {"Authorization": "Basic " + base64.b64encode(f"somebody:{token}".encode()).decode()}


@dataclass(frozen=True)
class Runnable:
    """An image with a Python, in the platform."""

    name: str
    """`127.0.0.1:PORT/default/…:v1`."""
    digest: str
    path: str
    """`/v2/default/…`."""


@pytest.fixture(scope="module")
def runnable(platform: Platform) -> Runnable:
    """A base image, as if it had been built here."""
    base = Path(base_image().partition(":")[2])
    name = f"default/runnable-{os.urandom(4).hex()}"

    async def put() -> str:
        store, source = LayoutImageStore(layout(platform)), LayoutImageStore(base)
        found = await source.find("")
        manifest = b"".join([chunk async for chunk in source.read(found)])
        for blob in json.loads(manifest)["layers"] + [json.loads(manifest)["config"]]:
            file = f"blobs/sha256/{blob['digest'].partition(':')[2]}"
            (layout(platform) / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base / file, layout(platform) / f"{file}.part")
            (layout(platform) / f"{file}.part").rename(layout(platform) / file)
        return str((await store.tag(f"{name}:v1", manifest, found.media_type, here())).digest)

    digest = asyncio.run(put())
    return Runnable(f"127.0.0.1:{platform.port}/{name}:v1", digest, f"/v2/{name}")


def test_the_specifications_own_suite_passes(platform: Platform, tmp_path: Path) -> None:
    program = conformance()
    if program is None:
        pytest.skip(MISSING)
    name = f"default/conformance-{os.urandom(4).hex()}"

    async def put() -> tuple[str, str]:
        image = await put_image(layout(platform), f"{name}:v1")
        await put_image(layout(platform), f"{name}:v2")
        return str(image.digest), str(
            (await put_referrer(layout(platform), image, "application/vnd.x+json", b"{}")).digest
        )

    image, referrer = asyncio.run(put())
    manifest = ask("GET", f"{platform.url}/v2/{name}/manifests/v1", headers=login(platform.token)).json()
    blobs = [manifest["config"]["digest"], *(each["digest"] for each in manifest["layers"])]
    found = run_conformance(
        program,
        tmp_path,
        {
            "REGISTRY": f"127.0.0.1:{platform.port}",
            "TLS": "disabled",
            "REPO1": name,
            "REPO2": name,
            "USERNAME": "somebody",
            "PASSWORD": platform.token,
            "VERSION": "1.1",
            "API_PUSH": "false",
            "API_BLOBS_DELETE": "false",
            "API_MANIFESTS_DELETE": "false",
            "API_TAGS_DELETE": "false",
            "API_BLOBS_DIGEST_HEADER": "true",
            "RO_DATA_TAGS": "v1 v2",
            "RO_DATA_MANIFESTS": f"{image} {referrer}",
            "RO_DATA_BLOBS": " ".join(blobs),
            "RO_DATA_REFERRERS": image,
        },
    )
    passed = {re.sub(r"^read-only/", "", name) for name, verdict in found if verdict == "Pass"}
    assert passed >= {
        "ping",
        "tag-list",
        "head/manifest-head-by-tag",
        "head/manifest-head-by-digest",
        "head/blob-head",
        "pull/manifest-by-tag",
        "pull/manifest-by-digest",
        "pull/blob-get",
        "referrers",
        "missing-manifest/by-digest",
        "missing-manifest/by-tag",
        "invalid-digest-format/manifest-get",
    }


@pytest.mark.slow
def test_podman_logs_in_pulls_and_runs(platform: Platform, runnable: Runnable) -> None:
    token = platform.ekiben_json("tokens", "create", f"pulls-{os.urandom(4).hex()}", "--role", "viewer")
    host = f"127.0.0.1:{platform.port}"
    with podman() as engine:
        plain = "--tls-verify=false"
        refused = engine("pull", plain, runnable.name, check=False)
        assert refused.returncode and "needs an API token" in refused.stderr
        refused = engine("login", plain, "-u", "me", "-p", "wrong", host, check=False)
        assert refused.returncode
        engine("login", plain, "-u", "me", "-p", token["token"], host)
        engine("pull", "-q", plain, runnable.name)
        shown = json.loads(engine("inspect", runnable.name).stdout)
        assert shown[0]["Digest"] == runnable.digest
        answer = engine("run", "--rm", "--network", "none", runnable.name, "python3", "-c", CODE)
        assert json.loads(answer.stdout) == [42, "Linux"]
        pushed = engine("push", plain, runnable.name, check=False)
        assert pushed.returncode and "builds make them" in pushed.stderr
        # The token is taken away: within five seconds nothing can be pulled with it.
        platform.ekiben("tokens", "delete", token["name"].rpartition("/")[2], "--yes")
        wait_for("the refusal", lambda: engine("pull", plain, runnable.name, check=False).returncode, 20)
    path = f"{runnable.path}/manifests/v1"
    refusals = wait_for("the entry", lambda: platform.ekiben_json("audit", "list", "--refused", "--resource", path), 20)
    assert {entry["method"] for entry in refusals} == {"oci.distribution/Pull"}
    assert token["token"] not in json.dumps(refusals)


@pytest.mark.slow
def test_containerd_pulls_and_runs(platform: Platform, runnable: Runnable) -> None:
    with containerd() as ctr:
        refused = ctr("images", "pull", "--plain-http", runnable.name, check=False)
        assert refused.returncode
        ctr("images", "pull", "--plain-http", "-u", f"me:{platform.token}", runnable.name)
        assert runnable.digest in ctr("images", "list").stdout
        answer = ctr("run", "--rm", runnable.name, f"run-{os.urandom(4).hex()}", "python3", "-c", CODE)
        assert json.loads(answer.stdout) == [42, "Linux"]


def test_skopeo_inspects_lists_and_copies(platform: Platform, runnable: Runnable, tmp_path: Path) -> None:
    needs("skopeo")
    env = os.environ | {"REGISTRY_AUTH_FILE": str(tmp_path / "auth.json")}
    run(
        ["skopeo", "login", "--tls-verify=false", "-u", "me", "-p", platform.token, runnable.name.partition("/")[0]],
        env=env,
    )
    name = f"docker://{runnable.name}"
    shown = json.loads(run(["skopeo", "inspect", "--tls-verify=false", name], env=env).stdout)
    assert (shown["Digest"], shown["RepoTags"]) == (runnable.digest, ["v1"])
    run(["skopeo", "copy", "--src-tls-verify=false", "--preserve-digests", name, f"oci:{tmp_path}/copy:v1"], env=env)
    index = json.loads((tmp_path / "copy" / "index.json").read_text())
    assert [each["digest"] for each in index["manifests"]] == [runnable.digest]


def test_a_thousand_tags(platform: Platform, tmp_path: Path) -> None:
    needs("skopeo")
    name = f"default/thousand-{os.urandom(4).hex()}"

    async def put() -> None:
        for number in range(10):
            image = await put_image(layout(platform), f"{name}:v{number}")
            tags = [f"{name}:v{number}.{minor}" for minor in range(99)]
            add_entries(layout(platform), [{**image.to_json(), "annotations": {REF_NAME: tag}} for tag in tags])

    asyncio.run(put())
    listed = ask("GET", f"{platform.url}/v2/{name}/tags/list", headers=login(platform.token)).json()
    assert len(listed["tags"]) == 1000
    credentials = ["--creds", f"me:{platform.token}", "--tls-verify=false"]
    shown = run(["skopeo", "list-tags", *credentials, f"docker://127.0.0.1:{platform.port}/{name}"], env=os.environ)
    assert len(json.loads(shown.stdout)["Tags"]) == 1000


@pytest.mark.slow
def test_a_pull_goes_on_when_the_platform_was_killed(tmp_path: Path) -> None:
    content = os.urandom(64 << 20)
    with running(tmp_path / "data") as platform:
        image = asyncio.run(put_image(layout(platform), "default/killed:v1", {"weights": content}))
        base = f"{platform.url}/v2/default/killed"
        before = sorted(path.name for path in layout(platform).rglob("*"))
        manifest = ask("GET", f"{base}/manifests/v1", headers=login(platform.token))
        (layer,) = manifest.json()["layers"]
        hashed, got = hashlib.sha256(), 0

        def pull(killed_at: int = 0) -> None:
            nonlocal got
            connection = http.client.HTTPConnection("127.0.0.1", platform.port, timeout=60)
            asked = {**login(platform.token), **({"Range": f"bytes={got}-"} if got else {})}
            connection.request("GET", f"/v2/default/killed/blobs/{layer['digest']}", headers=asked)
            answer = connection.getresponse()
            assert answer.status == (206 if got else 200)
            with contextlib.suppress(ConnectionError):
                while chunk := answer.read(1 << 20):
                    hashed.update(chunk)
                    got += len(chunk)
                    if killed_at and got >= killed_at:
                        platform.kill()
                        killed_at = 0
            connection.close()

        pull(killed_at=8 << 20)
        assert got < layer["size"]
        platform.start()
        pull()
        assert (got, f"sha256:{hashed.hexdigest()}") == (layer["size"], layer["digest"])
        again = ask("GET", f"{base}/manifests/{image.digest}", headers=login(platform.token))
        assert again.body == manifest.body
        assert sorted(path.name for path in layout(platform).rglob("*")) == before
