"""Uploads and downloads over gRPC; the bytes themselves pass through `bytes.py`."""

from ekiben import names
from ekiben.registry.v1 import registry_pb2 as pb
from ekiben.registry.v1 import registry_pb2_grpc
from services.kernel.identity import current_principal
from services.registry import uploads as use_cases
from services.registry.messages import uploads as messages
from services.registry.servicer.context import Context


class Uploads(registry_pb2_grpc.UploadsServicer):
    """Serves ekiben.registry.v1.Uploads."""

    def __init__(self, uploads: use_cases.Uploads, blobs_listen: str) -> None:
        self._uploads = uploads
        self._socket_path = blobs_listen.removeprefix("unix:") if blobs_listen.startswith("unix:") else ""

    async def CreateUpload(self, request: pb.CreateUploadRequest, context: Context) -> pb.Upload:
        """See the proto."""
        sent = request.upload
        # In proto3 a size of 0 and none at all look the same; no archive has no bytes.
        created = await self._uploads.create(
            current_principal(), sent.resource, sent.digest, sent.size_bytes if sent.size_bytes else None
        )
        return messages.upload(created)

    async def GetUpload(self, request: pb.GetUploadRequest, context: Context) -> pb.Upload:
        """See the proto."""
        found, parts = await self._uploads.get(current_principal(), names.Upload.parse(request.name).upload)
        return messages.upload(found, [part for part in parts if part.number])

    async def SignUpload(self, request: pb.SignUploadRequest, context: Context) -> pb.SignedUrl:
        """See the proto."""
        name = names.Upload.parse(request.name)
        signed = await self._uploads.sign_upload(current_principal(), name.upload, request.part_number)
        return messages.signed_url(signed, self._socket_path)

    async def CompleteUpload(self, request: pb.CompleteUploadRequest, context: Context) -> pb.Upload:
        """See the proto."""
        name = names.Upload.parse(request.name)
        parts = [(part.part_number, part.etag) for part in request.parts]
        return messages.upload(await self._uploads.complete(current_principal(), name.upload, parts))

    async def AbortUpload(self, request: pb.AbortUploadRequest, context: Context) -> pb.Upload:
        """See the proto."""
        name = names.Upload.parse(request.name)
        return messages.upload(await self._uploads.abort(current_principal(), name.upload, request.failure))

    async def SignDownload(self, request: pb.SignDownloadRequest, context: Context) -> pb.SignedUrl:
        """See the proto."""
        signed = await self._uploads.sign_download(current_principal(), request.resource)
        return messages.signed_url(signed, self._socket_path)
