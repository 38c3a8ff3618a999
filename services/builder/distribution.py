"""Images over HTTP, as container engines pull them: the OCI distribution API, read only, on a listener of its own.

    GET  /v2/                                   whether the credentials work
    GET  /v2/{name}/manifests/{tag or digest}   a manifest; HEAD too
    GET  /v2/{name}/blobs/{digest}              a blob, ranges included; HEAD too
    GET  /v2/{name}/tags/list?n=&last=          tags, in pages
    GET  /v2/{name}/referrers/{digest}          what refers to a manifest; ?artifactType= chooses
    GET  /v2/_catalog?n=&last=                  repositories, in pages

`{name}` is `ORGANIZATION/REPOSITORY`; of another organization than the caller's there is none. Writes are 405: images
come here by builds. Errors are the specification's JSON. Source: OCI distribution-spec 1.1; `_catalog` is Docker's.
"""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any
from urllib.parse import urlencode

from aiohttp import web
from prometheus_client import Counter

from ekiben.errors import InvalidArgument
from services.builder.access import Access
from services.builder.answering import MIDDLEWARES, PRINCIPAL, Handler, Refusal, as_json
from services.builder.places import is_unfinished
from services.builder.repositories import tag_order
from services.builder.shelves import Shelf, Shown
from services.content.digest import Digest
from services.content.images import INDEX
from services.kernel.sites import serve_app

_NAME = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_MEDIA_TYPE = re.compile(r"[a-zA-Z0-9!#$&^_.+-]{1,127}/[a-zA-Z0-9!#$&^_.+-]{1,127}")
_OTHER_DIGEST = re.compile(r"(?!sha256:)[a-z0-9]+(?:[.+_-][a-z0-9]+)*:[a-zA-Z0-9=_-]{32,}")
_MOST_AT_ONCE = 10_000
_IMMUTABLE = {"Cache-Control": "private, max-age=31536000, immutable"}

_transferred = Counter("ekiben_image_bytes", "Bytes of blobs of images that were served.")


class Distribution:
    """The handlers."""

    def __init__(
        self, shelf: Shelf, access: Access, pulled: Callable[[str, Digest], None] = lambda name, digest: None
    ) -> None:
        """`pulled` is told of each manifest that somebody was given."""
        self._shelf = shelf
        self._access = access
        self._pulled = pulled

    def app(self) -> web.Application:
        """The application."""
        app = web.Application(middlewares=[*MIDDLEWARES, self._admitted])
        for path, handler in (
            ("/v2", self.ping),
            ("/v2/", self.ping),
            ("/v2/_catalog", self.catalog),
            ("/v2/{name:.+}/manifests/{reference}", self.manifest),
            ("/v2/{name:.+}/blobs/{digest}", self.blob),
            ("/v2/{name:.+}/tags/list", self.tags),
            ("/v2/{name:.+}/referrers/{digest}", self.referrers),
        ):
            app.router.add_get(path, handler)
        return app

    async def ping(self, request: web.Request) -> web.Response:
        """The credentials work, and this is what an engine takes it for."""
        return as_json({})

    async def manifest(self, request: web.Request) -> web.Response:
        """A manifest by tag or digest, as it was stored: nothing is translated, since its digest would change."""
        name, repository = await self._repository(request)
        reference = _reference(request.match_info["reference"])
        found = await repository.manifest(reference) if reference else None
        if found is None:
            raise Refusal(404, "MANIFEST_UNKNOWN", f"{name} has no manifest {request.match_info['reference'][:140]!r}.")
        self._pulled(name, found.digest)
        known = _MEDIA_TYPE.fullmatch(found.media_type)
        headers = {
            "Content-Type": found.media_type if known else "application/octet-stream",
            "Docker-Content-Digest": str(found.digest),
            "ETag": f'"{found.digest}"',
            **(_IMMUTABLE if isinstance(reference, Digest) else {"Cache-Control": "private, no-cache"}),
        }
        if _is_known(request, found.digest):
            return web.Response(status=304, headers=headers)
        return web.Response(body=found.content, headers=headers)

    async def blob(self, request: web.Request) -> web.StreamResponse:
        """A blob, or a range of it."""
        name, repository = await self._repository(request)
        digest = _digest(request.match_info["digest"])
        headers = {
            "Content-Type": "application/octet-stream",
            "Docker-Content-Digest": str(digest),
            "ETag": f'"{digest}"',
            "Accept-Ranges": "bytes",
            **_IMMUTABLE,
        }
        sent = await repository.send(request, digest, headers, _transferred.inc) if digest else None
        if sent is None:
            raise Refusal(404, "BLOB_UNKNOWN", f"{name} has no blob {request.match_info['digest'][:140]!r}.")
        return sent

    async def tags(self, request: web.Request) -> web.Response:
        """The tags of a repository."""
        name, repository = await self._repository(request)
        return _page(
            request,
            {"name": name},
            "tags",
            [tag for tag in await repository.tags() if not is_unfinished(tag)],
            tag_order,
        )

    async def catalog(self, request: web.Request) -> web.Response:
        """The repositories of the caller's organization."""
        names = await self._shelf.names(_organization(request))
        if names is None:
            raise Refusal(501, "UNSUPPORTED", "The registry where the images are lists no repositories.")
        return _page(request, {}, "repositories", names, str)

    async def referrers(self, request: web.Request) -> web.Response:
        """What refers to a manifest, be that here or not."""
        _, repository = await self._repository(request)
        digest = _digest(request.match_info["digest"])
        found = await repository.referrers(digest) if digest else ()
        headers = {"Content-Type": INDEX}
        if wanted := request.query.get("artifactType"):
            found = [each for each in found if each.artifact_type == wanted]
            headers["OCI-Filters-Applied"] = "artifactType"
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [each.to_json() for each in found]}
        return web.Response(body=json.dumps(index).encode(), headers=headers)

    async def _repository(self, request: web.Request) -> tuple[str, Shown]:
        name = request.match_info["name"]
        if len(name) > 255 or _NAME.fullmatch(name) is None:
            raise Refusal(400, "NAME_INVALID", "A repository's name is ORGANIZATION/REPOSITORY in lower case.")
        # Of another organization's nothing is told, not even that it is there.
        found = await self._shelf.find(name) if name.partition("/")[0] == _organization(request) else None
        if found is None:
            raise Refusal(404, "NAME_UNKNOWN", f"Your organization has no repository {name!r}.")
        return name, found

    @web.middleware
    async def _admitted(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        request[PRINCIPAL] = await self._access.admit(request)
        if request.method not in ("GET", "HEAD"):
            raise Refusal(405, "UNSUPPORTED", "Images are not pushed here: builds make them. GET and HEAD are allowed.")
        return await handler(request)


def _organization(request: web.Request) -> str:
    return request[PRINCIPAL].organization.partition("/")[2]


def _digest(text: str) -> Digest | None:
    """The digest; None for one of another algorithm, which nothing here has."""
    if _OTHER_DIGEST.fullmatch(text):
        return None
    try:
        return Digest.parse(text)
    except InvalidArgument as exc:
        raise Refusal(400, "DIGEST_INVALID", exc.message) from exc


def _reference(text: str) -> str | Digest | None:
    """A tag or a digest; None for what can name nothing."""
    if ":" in text:
        return _digest(text)
    return text if _TAG.fullmatch(text) and not is_unfinished(text) else None


def _is_known(request: web.Request, digest: Digest) -> bool:
    return any(each.value in ("*", str(digest)) for each in request.if_none_match or ())


def _page(
    request: web.Request, head: dict[str, Any], member: str, values: Sequence[str], order: Callable[[str], Any]
) -> web.Response:
    """A page of a list: at most `n` after `last`, and a link to the next."""
    asked = request.query.get("n", str(_MOST_AT_ONCE))
    if not (asked.isascii() and asked.isdigit() and len(asked) < 10):
        raise Refusal(400, "PAGINATION_NUMBER_INVALID", "n is the most values of a page: a number from 0.")
    values = sorted(values, key=order)
    if last := request.query.get("last", ""):
        values = [value for value in values if order(value) > order(last)]
    most = min(int(asked), _MOST_AT_ONCE)
    page = values[:most]
    answer = as_json({**head, member: page})
    if page and len(values) > most:
        answer.headers["Link"] = f'<{request.path}?{urlencode({"n": most, "last": page[-1]})}>; rel="next"'
    return answer


def listen(app: web.Application, address: str) -> AbstractAsyncContextManager[str]:
    """Serve the application at `address` while inside; see `sites.serve_app`."""
    return serve_app(app, address, setting="images_listen", shutdown_timeout=5.0, handler_cancellation=True)
