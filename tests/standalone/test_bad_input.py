"""Bad input at every door: a clear error, and nothing changed."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.platform import Answer, BentoMl, Platform, http


def yatai(platform: Platform, method: str, path: str, body: object = None, token: str | None = None) -> Answer:
    """One call of BentoML's wire protocol."""
    return http(
        method,
        platform.url + path,
        None if body is None else json.dumps(body).encode(),
        {"X-YATAI-API-TOKEN": token or platform.token, "content-type": "application/json"},
    )


MANIFEST: dict[str, Any] = {
    "module": "",
    "api_version": "v1",
    "bentoml_version": "1.4.39",
    "size_bytes": 10,
    "metadata": {},
    "context": {"framework_name": "", "framework_versions": {}, "bentoml_version": "1.4.39", "python_version": "3.11"},
    "options": {},
}


def new_model(platform: Platform, name: str, manifest: dict[str, Any] | None = None) -> Answer:
    """Create repository and model as the client does; the answer to the second."""
    yatai(platform, "POST", "/api/v1/model_repositories", {"name": name, "description": ""})
    return yatai(
        platform,
        "POST",
        f"/api/v1/model_repositories/{name}/models",
        {
            "description": "",
            "version": "v1",
            "manifest": manifest or MANIFEST,
            "build_at": "2026-01-01 00:00:00.000000",
            "labels": [],
        },
    )


def push_tar(platform: Platform, name: str, data: bytes) -> Answer:
    """Push an archive through a presigned URL as the client does; the answer to the PUT."""
    base = f"/api/v1/model_repositories/{name}/models/v1"
    yatai(platform, "PATCH", f"{base}/start_upload")
    url = yatai(platform, "PATCH", f"{base}/presign_upload_url").json()["presigned_upload_url"]
    put = http("PUT", url, data)
    status = "success" if put.status == 200 else "failed"
    yatai(platform, "PATCH", f"{base}/finish_upload", {"status": status, "reason": put.body.decode(errors="replace")})
    return put


def archive(*members: tarfile.TarInfo) -> bytes:
    """A tar with a good model.yaml and `members`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("./model.yaml")
        info.size = 9
        tar.addfile(info, io.BytesIO(b"name: bad\n"[:9]))
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    """One entry of an archive."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    ("case", "entry"),
    [
        ("dotdot", member("../outside")),
        ("deep-dotdot", member("./a/../../outside")),
        ("absolute", member("/etc/outside")),
        ("symlink", member("./link", tarfile.SYMTYPE, "/etc/passwd")),
        ("hardlink", member("./hard", tarfile.LNKTYPE, "../../etc/passwd")),
        ("device", member("./dev", tarfile.CHRTYPE)),
        ("fifo", member("./fifo", tarfile.FIFOTYPE)),
    ],
)
def test_a_dangerous_archive_is_refused(platform: Platform, case: str, entry: tarfile.TarInfo) -> None:
    assert new_model(platform, f"bad-{case}").status == 200
    put = push_tar(platform, f"bad-{case}", archive(entry))
    assert put.status in (400, 422), put
    assert entry.name.strip("./").split("/")[-1].encode() in put.body, put.body
    got = yatai(platform, "GET", f"/api/v1/model_repositories/bad-{case}/models/v1").json()
    assert got["upload_status"] != "success"


def test_a_truncated_archive_is_refused(platform: Platform) -> None:
    big = member("./weights.bin")
    big.size = 100_000
    assert new_model(platform, "truncated").status == 200
    put = push_tar(platform, "truncated", archive(big)[:50_000])
    assert put.status in (400, 422), put


def test_a_truncated_body_is_never_visible(platform: Platform) -> None:
    import http.client

    assert new_model(platform, "cut").status == 200
    base = "/api/v1/model_repositories/cut/models/v1"
    yatai(platform, "PATCH", f"{base}/start_upload")
    url = yatai(platform, "PATCH", f"{base}/presign_upload_url").json()["presigned_upload_url"]
    connection = http.client.HTTPConnection("127.0.0.1", platform.port, timeout=10)
    connection.putrequest("PUT", url.split(str(platform.port), 1)[1])
    connection.putheader("content-length", "100000")
    connection.endheaders(b"x" * 5000)
    connection.close()
    finish = yatai(platform, "PATCH", f"{base}/finish_upload", {"status": "success", "reason": ""})
    assert finish.status != 200, "a client that claims success does not make it so"
    assert yatai(platform, "GET", base).json()["upload_status"] != "success"


def test_a_wrong_digest_is_refused_and_nothing_changes(platform: Platform) -> None:
    assert new_model(platform, "digest").status == 200
    upload = platform.api(
        "POST",
        "/v1/uploads",
        {"resource": "modelRepositories/digest/models/v1", "digest": "sha256:" + "0" * 64},
    )
    assert upload.status == 200, upload
    signed = platform.api("POST", f"/v1/{upload.json()['name']}:sign", {}).json()
    put = http("PUT", platform.url + signed["url"], archive())
    done = platform.api("POST", f"/v1/{upload.json()['name']}:complete", {})
    assert put.status >= 400 and done.status in (400, 409), (put, done)
    assert "digest" in put.body.decode().lower() + done.body.decode().lower()
    assert platform.api("GET", "/v1/modelRepositories/digest/models/v1").json()["content"]["state"] != "READY"


def test_an_unknown_token_is_401_everywhere(platform: Platform) -> None:
    assert platform.api("GET", "/v1/deployments", token="ekb_unknown").status == 401
    assert yatai(platform, "GET", "/api/v1/auth/current", token="ekb_unknown").status == 401
    done = platform.ekiben("models", "list", check=True)
    assert done.returncode == 0


def test_a_viewer_who_deploys_is_403_and_audited(platform: Platform) -> None:
    token = platform.ekiben_json("tokens", "create", "only-looks", "--role", "viewer")["token"]
    assert platform.api("GET", "/v1/deployments", token=token).status == 200
    refused = platform.api(
        "POST",
        "/v1/deployments",
        {"name": "deployments/no", "template": {"bento": "bentoRepositories/x/bentos/y"}},
        token=token,
    )
    assert refused.status == 403
    assert refused.json()["reason"] == "ROLE_TOO_LOW"
    assert refused.headers["content-type"].startswith("application/problem+json")
    entries = platform.api("GET", "/v1/auditEntries?refused=true").json()["auditEntries"]
    assert any(
        entry["method"].endswith("CreateDeployment") and entry["outcome"] == "PERMISSION_DENIED" for entry in entries
    )
    assert platform.api("GET", "/v1/deployments/no").status == 404


@pytest.mark.parametrize("name", ["x" * 300, "UPPER", "a b", "a/b", "", "..", "é"])
def test_a_bad_name_is_400(platform: Platform, name: str) -> None:
    made = platform.api("POST", "/v1/modelRepositories", {"name": f"modelRepositories/{name}"})
    assert made.status == 400, made
    if "/" not in name and name.isprintable():
        assert yatai(platform, "POST", "/api/v1/model_repositories", {"name": name, "description": ""}).status == 400


def test_a_manifest_of_20_mb_is_refused(platform: Platform) -> None:
    answer = new_model(platform, "fat", MANIFEST | {"metadata": {"blob": "x" * (20 << 20)}})
    assert answer.status in (400, 413), answer.status
    assert b"MiB" in answer.body
    assert platform.api("GET", "/v1/modelRepositories/fat/models/v1").status == 404


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff\xfe", b'{"name": 1e999}', b'{"nope": 1}', b"null", b'"x"'])
def test_malformed_json_is_400(platform: Platform, body: bytes) -> None:
    for path in ("/v1/modelRepositories", "/api/v1/model_repositories", "/api/v2/deployments"):
        answer = http(
            "POST",
            platform.url + path,
            body,
            {
                "authorization": f"Bearer {platform.token}",
                "X-YATAI-API-TOKEN": platform.token,
                "content-type": "application/json",
            },
        )
        assert answer.status == 400, (path, answer)


def test_malformed_protobuf_is_invalid_argument(platform: Platform) -> None:
    import grpc

    with grpc.insecure_channel(f"127.0.0.1:{platform.port}") as channel:
        call = channel.unary_unary(
            "/ekiben.registry.v1.Models/GetModel",
            request_serializer=lambda raw: raw,
            response_deserializer=lambda raw: raw,
        )
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\xff\xff\xff", metadata=[("authorization", f"Bearer {platform.token}")], timeout=10)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_internal_methods_are_not_reached_from_outside(platform: Platform) -> None:
    import grpc

    with grpc.insecure_channel(f"127.0.0.1:{platform.port}") as channel:
        for method in (
            "/ekiben.identity.v1.Secrets/RevealSecrets",
            "/ekiben.recorder.v1.Predictions/RecordPredictions",
            "/ekiben.deployer.v1.Routes/WatchRoutes",
            "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
        ):
            call = channel.unary_unary(
                method, request_serializer=lambda raw: raw, response_deserializer=lambda raw: raw
            )
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", metadata=[("authorization", f"Bearer {platform.token}")], timeout=10)
            assert caught.value.code() in (
                grpc.StatusCode.PERMISSION_DENIED,
                grpc.StatusCode.UNIMPLEMENTED,
                grpc.StatusCode.UNAUTHENTICATED,
            ), method


def test_secrets_cannot_be_read_back(platform: Platform, tmp_path: Path) -> None:
    platform.ekiben("secrets", "create", "hush", "--literal", "PASSWORD=not-to-be-seen")
    for text in (
        platform.ekiben("secrets", "get", "hush", "-o", "json").stdout,
        platform.api("GET", "/v1/secrets/hush").body.decode(),
        yatai(platform, "GET", "/api/v1/org_secrets/hush").body.decode(),
    ):
        assert "hush" in text and "not-to-be-seen" not in text
    for path in platform.data.rglob("*"):
        if path.is_file() and path.stat().st_size < 64 << 20:
            assert b"not-to-be-seen" not in path.read_bytes(), path


def test_codespaces_are_501_with_a_sentence(platform: Platform, bentoml: BentoMl) -> None:
    answer = yatai(platform, "GET", "/api/v2/deployments/any/files")
    assert answer.status == 501
    assert b"odespace" in answer.body
