"""PUT and GET at signed URLs, with the standard library, in whatever thread calls.

The server behind a URL is the registry, or the object store that keeps its bytes: both are spoken to alike.
Nothing here knows gRPC or asyncio; `transfer.py` does.
"""

import contextlib
import json
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from urllib.parse import unquote, urlsplit

from ekiben import errors
from ekiben.archives import Archive, FileRange
from ekiben.endpoints import UNIX

_IDLE_S = 120.0
"""How long a server may say nothing: it hashes and checks a whole archive before it answers."""
_SENDFILE_BYTES = 8 << 20
"""Sent by the kernel at once; more would make progress jumpy and stopping slow."""

_TRY_AGAIN = (500, 502, 503, 504)
_TRY_AGAIN_CODES = ("RequestTimeout", "SlowDown", "InternalError", "OperationAborted", "ServiceUnavailable")
"""What S3 says of a request that deserves another try, whatever its status."""

_BY_STATUS: dict[int, type[errors.EkibenError]] = {
    400: errors.InvalidArgument,
    401: errors.Unauthenticated,
    403: errors.PermissionDenied,
    404: errors.NotFound,
    409: errors.Aborted,
    411: errors.InvalidArgument,
    413: errors.InvalidArgument,
    416: errors.InvalidArgument,
    429: errors.ResourceExhausted,
    507: errors.ResourceExhausted,
}


class Stopped(Exception):
    """The caller asked to stop."""


class Stop:
    """Ends transfers from another thread, also those that wait for a server which says nothing."""

    def __init__(self) -> None:
        self._set = False
        self._lock = threading.Lock()
        self._ends: set[Callable[[], None]] = set()

    def is_set(self) -> bool:
        """Whether to stop."""
        return self._set

    def set(self) -> None:
        """Stop all that goes on, and what begins from now on."""
        with self._lock:
            self._set = True
            ends = list(self._ends)
        for end in ends:
            end()

    @contextlib.contextmanager
    def ending(self, end: Callable[[], None]) -> Iterator[None]:
        """Call `end` on `set` while inside. Raises Stopped where that has been."""
        with self._lock:
            if self._set:
                raise Stopped
            self._ends.add(end)
        try:
            yield
        finally:
            with self._lock:
                self._ends.discard(end)


def put(
    url: str,
    archive: Archive,
    start: int,
    end: int,
    *,
    progress: Callable[[int], None],
    stop: Stop,
    headers: dict[str, str] | None = None,
) -> str:
    """PUT the bytes from `start` to `end` of an archive; returns the entity tag of the answer, quotes included.

    Files go out by `sendfile` where there is no TLS. `progress` is told the size of each piece that went out.

    Raises:
        Unavailable: the connection broke, or the server answered 5xx; may be tried again.
        EkibenError: the server refused the bytes, as the class of its status.
        Stopped: by `stop`.
    """
    with _connection(url, stop) as (connection, path):
        try:
            connection.putrequest("PUT", path, skip_accept_encoding=True)
            connection.putheader("Content-Length", str(end - start))
            for name, value in (headers or {}).items():
                connection.putheader(name, value)
            connection.endheaders()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a refusal may come before the last byte
                _send(connection, archive, start, end, progress, stop)
            response = connection.getresponse()
            body = response.read(1 << 16)
        except (OSError, HTTPException) as error:
            raise _broken(url, error) from error
        if response.status != 200:
            raise _refusal(url, response, body)
        return response.headers.get("ETag", "")


@contextlib.contextmanager
def get(url: str, offset: int = 0, *, stop: Stop) -> Iterator[Callable[[memoryview], int]]:
    """GET a URL from `offset` on; gives a function that fills a buffer, to be used inside.

    It returns how many bytes it put there, none at the end, and raises the same errors.

    Raises:
        Unavailable: the connection broke or the server answered 5xx; may be tried again from where it broke.
        EkibenError: the server refused, as the class of its status.
    """
    with _connection(url, stop) as (connection, path):
        response = _ask(connection, path, url, {"Range": f"bytes={offset}-"} if offset else {})
        left = int(response.headers.get("Content-Length") or -1)

        def readinto(buffer: memoryview) -> int:
            nonlocal left
            try:
                got = response.readinto(buffer)
            except (OSError, HTTPException) as error:
                raise _broken(url, error) from error
            left -= got
            if not got and left > 0:
                raise _broken(url, ConnectionError("the answer ended early"))
            return got

        yield readinto


class Getter:
    """GETs of ranges, one after another over one connection as long as it holds. `close` may come from any thread."""

    def __init__(self) -> None:
        self._connection: HTTPConnection | None = None
        self._server = ""

    def fill(self, url: str, offset: int, buffer: memoryview, passed: Callable[[int], None]) -> None:
        """Fill the buffer with what begins at `offset`; `passed` is told of each piece. Raises as `get` does."""
        parts = urlsplit(url)
        if self._connection is None or self._server != f"{parts.scheme}://{parts.netloc}":
            self.close()
            self._connection, self._server = _connect(url), f"{parts.scheme}://{parts.netloc}"
        try:
            wanted = f"bytes={offset}-{offset + len(buffer) - 1}"
            response = _ask(self._connection, _path(url), url, {"Range": wanted})
            while buffer:
                try:
                    got = response.readinto(buffer)
                except (OSError, HTTPException) as error:
                    raise _broken(url, error) from error
                if not got:
                    raise _broken(url, ConnectionError("the answer ended early"))
                buffer = buffer[got:]
                passed(got)
            if response.read(1) or response.will_close:
                self.close()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the connection; a `fill` under way raises Unavailable."""
        connection, self._connection = self._connection, None
        if connection is not None:
            _shut_down(connection)
            connection.close()


def _ask(connection: HTTPConnection, path: str, url: str, headers: dict[str, str]) -> HTTPResponse:
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        if response.status not in (200, 206) or (response.status == 200 and headers):
            raise _refusal(url, response, response.read(1 << 16))
    except (OSError, HTTPException) as error:
        raise _broken(url, error) from error
    return response


def _path(url: str) -> str:
    parts = urlsplit(url)
    return parts.path + (f"?{parts.query}" if parts.query else "")


@contextlib.contextmanager
def _connection(url: str, stop: Stop) -> Iterator[tuple[HTTPConnection, str]]:
    connection = _connect(url)
    try:
        with stop.ending(lambda: _shut_down(connection)):
            yield connection, _path(url)
    finally:
        connection.close()


def _shut_down(connection: HTTPConnection) -> None:
    """Wake whoever reads or writes there. The socket itself is closed by its owner."""
    with contextlib.suppress(OSError, AttributeError):
        connection.sock.shutdown(socket.SHUT_RDWR)


def _connect(url: str) -> HTTPConnection:
    parts = urlsplit(url)
    connection: HTTPConnection
    if url.startswith(UNIX):
        connection = _UnixConnection(unquote(parts.netloc))
    elif parts.scheme == "https":
        context = ssl.create_default_context()
        connection = HTTPSConnection(parts.hostname or "", parts.port, timeout=_IDLE_S, context=context)
    else:
        connection = HTTPConnection(parts.hostname or "", parts.port, timeout=_IDLE_S)
    try:
        connection.connect()
    except OSError as error:
        connection.close()
        raise _broken(url, error) from error
    return connection


class _UnixConnection(HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_IDLE_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _send(
    connection: HTTPConnection,
    archive: Archive,
    start: int,
    end: int,
    progress: Callable[[int], None],
    stop: Stop,
) -> None:
    plain = not isinstance(connection, HTTPSConnection)
    for part in archive.ranges(start, end):
        if isinstance(part, bytes):
            connection.send(part)
            progress(len(part))
        elif plain:
            _sendfile(connection.sock, part, progress, stop)
        else:
            for chunk in part.chunks():
                connection.send(chunk)
                progress(len(chunk))
                if stop.is_set():
                    raise Stopped


def _sendfile(sock: socket.socket, part: FileRange, progress: Callable[[int], None], stop: Stop) -> None:
    offset, left = part.offset, part.size_bytes
    with part.path.open("rb", buffering=0) as file:
        while left:
            if stop.is_set():
                raise Stopped
            sent = sock.sendfile(file, offset, min(left, _SENDFILE_BYTES))
            if not sent:
                raise ConnectionAbortedError(f"{part.path} became shorter while it was sent")
            offset, left = offset + sent, left - sent
            progress(sent)


def _broken(url: str, error: Exception) -> errors.Unavailable:
    parts = urlsplit(url)
    where, said = f"{parts.scheme}://{unquote(parts.netloc)}", str(error) or type(error).__name__
    return errors.Unavailable(f"The connection to {where} broke: {said}.", reason="CONNECTION_BROKEN")


def _refusal(url: str, response: HTTPResponse, body: bytes) -> errors.EkibenError:
    """What a status and a problem document (RFC 9457) say, as our error."""
    if url.startswith(UNIX) and response.status in (403, 404):
        # Through a tunnel the registry is elsewhere, and the socket of that name another's, who knows no such URL.
        return errors.Unavailable("The socket is another registry's.", reason="SOCKET_REFUSED")
    detail, reason = _problem(body)
    if not detail:
        text = body.decode("utf-8", "replace").strip()
        detail = text[:500] if text and "<" not in text else f"The server answered {response.status} {response.reason}."
    again = response.status in _TRY_AGAIN or reason in _TRY_AGAIN_CODES
    kind = errors.Unavailable if again else _BY_STATUS.get(response.status)
    return (kind or errors.FailedPrecondition)(detail, reason=reason or f"HTTP_{response.status}")


def _problem(body: bytes) -> tuple[str, str]:
    """Sentence and reason of a problem document (RFC 9457), or of S3's error document; empty where it is neither."""
    with contextlib.suppress(ValueError):
        problem = json.loads(body)
        if isinstance(problem, dict):
            return str(problem.get("detail") or ""), str(problem.get("reason") or "")
    code, message = re.search(rb"<Code>([^<]+)</Code>", body), re.search(rb"<Message>([^<]+)</Message>", body)
    if code is None:
        return "", ""
    name = code[1].decode("utf-8", "replace")
    said = message[1].decode("utf-8", "replace") if message else "no message"
    return f"The object store refused: {said} ({name}).", name
