"""Files."""

from ekiben.registry.v1 import files_pb2 as pb
from services.registry.domain import File
from services.registry.messages.uploads import signed_url
from services.registry.uploads import Signed


def file(found: File) -> pb.File:
    """The message of a file."""
    return pb.File(
        path=found.path, size_bytes=found.size_bytes, digest=found.digest, offset=found.offset, mode=found.mode
    )


def signed_file(signed: Signed, found: File, socket_path: str) -> pb.SignedFile:
    """The message of a file's place in a signed content."""
    end = found.offset + found.size_bytes - 1
    return pb.SignedFile(
        content=signed_url(signed, socket_path),
        file=file(found),
        range=f"bytes={found.offset}-{end}" if found.size_bytes else "",
    )
