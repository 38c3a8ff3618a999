"""The S3 server that other tests run: real, and strict where it matters to us."""

import time
import urllib.error
import urllib.request

import pytest
from botocore.exceptions import ClientError

from tests.s3 import S3Server


def status_of(request: urllib.request.Request) -> int:
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_objects_are_kept_and_found(s3: S3Server) -> None:
    client, bucket = s3.client(), s3.new_bucket()
    client.put_object(Bucket=bucket, Key="a/b", Body=b"hello")
    assert client.get_object(Bucket=bucket, Key="a/b", Range="bytes=1-2")["Body"].read() == b"el"
    assert (s3.folder / bucket / "a" / "b").read_bytes() == b"hello"
    assert [found["Key"] for found in client.list_objects_v2(Bucket=bucket, Prefix="a/")["Contents"]] == ["a/b"]


def test_a_name_is_given_once(s3: S3Server) -> None:
    client, bucket = s3.client(), s3.new_bucket()
    client.put_object(Bucket=bucket, Key="name", Body=b"one", IfNoneMatch="*")
    with pytest.raises(ClientError) as caught:
        client.put_object(Bucket=bucket, Key="name", Body=b"two", IfNoneMatch="*")
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412


def test_signatures_are_verified(s3: S3Server) -> None:
    client, bucket = s3.client(), s3.new_bucket()
    put = lambda url: status_of(urllib.request.Request(url, b"x", method="PUT", headers={"Content-Type": ""}))  # noqa: E731
    url = client.generate_presigned_url("put_object", {"Bucket": bucket, "Key": "k"}, ExpiresIn=60)
    assert put(url) == 200
    assert put(url.replace("/k?", "/l?")) == 403
    short = client.generate_presigned_url("put_object", {"Bucket": bucket, "Key": "k"}, ExpiresIn=1)
    deadline = time.monotonic() + 10
    while put(short) != 403:
        assert time.monotonic() < deadline, "a URL that expired is still taken"
        time.sleep(0.1)
