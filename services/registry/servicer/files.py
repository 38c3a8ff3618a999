"""Files of a content over gRPC."""

from ekiben.registry.v1 import files_pb2 as pb
from ekiben.registry.v1 import files_pb2_grpc
from services.kernel import pages
from services.kernel.identity import current_principal
from services.registry import files as use_cases
from services.registry.messages import files as messages
from services.registry.servicer.context import Context


class Files(files_pb2_grpc.FilesServicer):
    """Serves ekiben.registry.v1.Files."""

    def __init__(self, files: use_cases.Files, blobs_listen: str) -> None:
        self._files = files
        self._socket_path = blobs_listen.removeprefix("unix:") if blobs_listen.startswith("unix:") else ""

    async def ListFiles(self, request: pb.ListFilesRequest, context: Context) -> pb.ListFilesResponse:
        """See the proto."""
        size, after = pages.page_size(request.page_size), pages.decode(request, int, str)
        page = await self._files.list(current_principal(), request.parent, size, after)
        return pb.ListFilesResponse(
            files=[messages.file(found) for found in page.items],
            next_page_token=pages.encode(request, *page.next) if page.next else "",
            total_size=page.total,
        )

    async def SignFile(self, request: pb.SignFileRequest, context: Context) -> pb.SignedFile:
        """See the proto."""
        signed, found = await self._files.sign(current_principal(), request.parent, request.path)
        return messages.signed_file(signed, found, self._socket_path)
