"""Uploads and signed URLs."""

from collections.abc import Sequence

from ekiben.registry.v1 import registry_pb2 as pb
from services.content.blobs import Part
from services.registry.domain import Upload
from services.registry.messages.catalog import to_timestamp
from services.registry.uploads import Signed


def upload(found: Upload, parts: Sequence[Part] = ()) -> pb.Upload:
    """The message of an upload. Part 0, the whole, is not among its parts: those count from 1."""
    return pb.Upload(
        name=f"uploads/{found.upload}",
        resource=found.resource,
        digest=found.digest,
        size_bytes=found.size_bytes or 0,
        state=pb.Upload.State.Value(found.state.value),
        parts=[pb.Upload.Part(part_number=part.number, etag=part.etag, size_bytes=part.size_bytes) for part in parts],
        failure=found.failure,
        create_time=to_timestamp(found.create_time),
        expire_time=to_timestamp(found.expire_time),
        digest_wanted=found.digest_wanted,
    )


def signed_url(signed: Signed, socket_path: str) -> pb.SignedUrl:
    """The message of a signed URL; `socket_path` is where our own are served too."""
    return pb.SignedUrl(
        url=signed.url,
        expire_time=to_timestamp(signed.expire_time),
        digest=signed.digest,
        size_bytes=signed.size_bytes,
        socket_path=socket_path if signed.url.startswith("/") else "",
    )
