"""What a model or a bento must have before its bytes are read, and after they were sent."""

from ekiben.errors import Aborted, DataLoss, FailedPrecondition
from ekiben.registry.v1 import registry_pb2 as pb


def check_ready(name: str, content: pb.Content) -> None:
    """Nothing, where the content can be read.

    Raises:
        FailedPrecondition: it cannot (CONTENT_NOT_READY).
    """
    if content.state != pb.Content.READY:
        state = pb.Content.State.Name(content.state)
        raise FailedPrecondition(
            f"{name} has no content to download: it is {state}. Push it first.",
            reason="CONTENT_NOT_READY",
            name=name,
            state=state,
        )


def check_digest(name: str, content: pb.Content, upload: pb.Upload, digest: str) -> None:
    """Nothing, where a finished push left the bytes that were sent.

    Raises:
        DataLoss: it left other bytes, or none (CONTENT_DIFFERS).
        Aborted: it left them, and somebody else replaced them since (CONTENT_REPLACED).
    """
    if content.digest == digest:
        return
    if content.digest and upload.digest == digest:
        raise Aborted(
            f"{name} was pushed, and another push replaced it right after. Push it again with --force to have yours.",
            reason="CONTENT_REPLACED",
            name=name,
            digest=content.digest,
        )
    raise DataLoss(
        f"{name} holds {content.digest or 'nothing'} although {digest} was sent. Push it again with --force.",
        reason="CONTENT_DIFFERS",
        name=name,
        digest=digest,
    )
