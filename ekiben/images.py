"""Images of bentos in the platform: look at them, delete them."""

from collections.abc import AsyncIterator

import grpc.aio

from ekiben import pages
from ekiben.builder.v1 import images_pb2 as pb
from ekiben.builder.v1.images_pb2_grpc import ImagesStub


class Images:
    """What builds with output IMAGE made."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = ImagesStub(channel)

    async def get(self, name: str) -> pb.Image:
        """One image, with its layers."""
        return await self._stub.GetImage(pb.GetImageRequest(name=name))

    def list(self, *, bento: str = "", limit: int = 0) -> AsyncIterator[pb.Image]:
        """Images without their layers, newest first; of one bento when it is named."""
        return pages.items(self._stub.ListImages, pb.ListImagesRequest(bento=bento), "images", limit=limit)

    async def delete(self, name: str, *, force: bool = False) -> None:
        """Delete an image; with `force` even one that a deployment uses."""
        await self._stub.DeleteImage(pb.DeleteImageRequest(name=name, force=force))

    async def stats(self) -> pb.ImageStats:
        """How much there is, and how much did not have to be made again."""
        return await self._stub.GetImageStats(pb.GetImageStatsRequest())

    async def collect(self, *, dry_run: bool = False) -> pb.CollectImagesResponse:
        """Delete images that are kept no longer and blobs that no image has; with `dry_run` say which."""
        return await self._stub.CollectImages(pb.CollectImagesRequest(dry_run=dry_run))
