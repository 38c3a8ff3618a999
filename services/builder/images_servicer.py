"""The Images service: parse, call one use case, format."""

from datetime import datetime, timedelta
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from ekiben import names
from ekiben.builder.v1 import images_pb2 as pb
from ekiben.builder.v1 import images_pb2_grpc
from services.builder import messages
from services.builder.collection import Collection
from services.builder.domain import Image
from services.builder.gallery import Gallery
from services.builder.pull_tokens import USUAL, PullTokens
from services.builder.tally import TALLY
from services.kernel import pages
from services.kernel.identity import current_principal

Context = grpc.aio.ServicerContext[Any, Any]


class Images(images_pb2_grpc.ImagesServicer):
    """ekiben.builder.v1.Images."""

    def __init__(self, gallery: Gallery, collection: Collection, tokens: PullTokens) -> None:
        self._gallery = gallery
        self._tokens = tokens
        self._collection = collection

    async def GetImage(self, request: pb.GetImageRequest, context: Context) -> pb.Image:
        """See the proto."""
        return self._message(await self._gallery.get(current_principal(), names.Image.parse(request.name)))

    async def ListImages(self, request: pb.ListImagesRequest, context: Context) -> pb.ListImagesResponse:
        """See the proto."""
        size = pages.page_size(request.page_size)
        bento = str(names.Bento.parse(request.bento)) if request.bento else ""
        before = pages.decode(request, datetime, str)
        found = await self._gallery.list(current_principal(), bento, before, size + 1)
        response = pb.ListImagesResponse(images=map(self._message, found[:size]))
        if len(found) > size:
            last = found[size - 1]
            response.next_page_token = pages.encode(request, last.create_time, last.id)
        return response

    async def DeleteImage(self, request: pb.DeleteImageRequest, context: Context) -> Empty:
        """See the proto."""
        await self._gallery.delete(current_principal(), names.Image.parse(request.name), force=request.force)
        return Empty()

    async def GetImageStats(self, request: pb.GetImageStatsRequest, context: Context) -> pb.ImageStats:
        """See the proto."""
        count, found = await self._collection.contents()
        return pb.ImageStats(
            image_count=count,
            blob_count=found.blobs,
            size_bytes=found.size_bytes,
            shared_bytes=found.shared_bytes,
            garbage_count=found.garbage_blobs,
            garbage_bytes=found.garbage_bytes,
            layers_made=TALLY.made,
            made_bytes=TALLY.made_bytes,
            layers_reused=TALLY.reused,
            reused_bytes=TALLY.reused_bytes,
            location=self._gallery.place,
        )

    async def CollectImages(self, request: pb.CollectImagesRequest, context: Context) -> pb.CollectImagesResponse:
        """See the proto."""
        found = await self._collection.collect(dry_run=request.dry_run)
        return pb.CollectImagesResponse(
            images=map(self._message, found.images),
            blob_count=len(found.blobs),
            blob_bytes=sum(blob.size_bytes for blob in found.blobs),
        )

    async def CreatePullToken(self, request: pb.CreatePullTokenRequest, context: Context) -> pb.PullToken:
        """See the proto."""
        lifetime: timedelta = request.lifetime.ToTimedelta() if request.HasField("lifetime") else USUAL
        token, ends = self._tokens.give(current_principal().organization, lifetime)
        made = pb.PullToken(token=token)
        made.expire_time.FromDatetime(ends)
        return made

    def _message(self, image: Image) -> pb.Image:
        return messages.image_to_proto(image, self._gallery.location(image))
