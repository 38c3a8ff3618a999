"""Loop: brings captured predictions from Envoy's log to the recorder; what the recorder has not kept stays on disk.

Envoy appends lines to `current.jsonl`. When that is large it is *sealed*: renamed to the next number, whereupon Envoy
is told to open the log anew. The position (file and offset up to which the recorder has kept everything) is a file of
its own, written after each answer, so a crash at any point sends some predictions twice, which the recorder knows by
their names, and none never.
"""

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from prometheus_client import Counter, Gauge

from ekiben.errors import EkibenError, InvalidArgument, ResourceExhausted
from ekiben.recorder.v1 import recorder_pb2 as pb
from services.content.files import write_whole
from services.gateway.records import prediction_from_line
from services.kernel import telemetry
from services.kernel.clock import Clock

if TYPE_CHECKING:
    from ekiben.recorder.v1.recorder_pb2_grpc import PredictionsAsyncStub

log = logging.getLogger(__name__)

POLL_S = 0.2
"""With Envoy's flush every 0.2 s a prediction is readable after half a second."""
BATCH_BYTES = 2 << 20
"""gRPC takes messages up to 4 MiB; a prediction with two bodies of 1 MiB fits in one more."""
BATCH_LINES = 500
_READ_BYTES = 3 << 20
_LONGEST_LINE = 8 << 20

recorded = Counter("ekiben_captures_recorded_total", "Captured predictions that the recorder has kept.")
dropped = Counter("ekiben_captures_dropped_total", "Captured predictions that were lost, by why.", ["reason"])
backlog = Gauge("ekiben_captures_backlog_bytes", "Captures on disk that the recorder does not have yet.")
for _reason in ("backlog", "torn", "refused"):
    dropped.labels(_reason)


@dataclass(frozen=True, order=True)
class Position:
    """Everything before it is kept by the recorder."""

    segment: int = 0
    offset: int = 0


class CaptureLog:
    """The files of the log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.current = folder / "current.jsonl"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.position = self._read_position()

    @property
    def number(self) -> int:
        """The number that the current file will have."""
        return max([self.position.segment - 1, *self.sealed()]) + 1

    def sealed(self) -> list[int]:
        """Numbers of the sealed files, oldest first."""
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.jsonl"))

    def path(self, segment: int) -> Path:
        """A file by its number."""
        sealed = self.folder / f"{segment:08d}.jsonl"
        return self.current if segment == self.number and not sealed.exists() else sealed

    def seal(self) -> None:
        """Close the current file to new lines; who writes must open the log anew."""
        with contextlib.suppress(FileNotFoundError):
            if self.current.stat().st_size:
                self.current.rename(self.folder / f"{self.number:08d}.jsonl")

    def commit(self, position: Position) -> None:
        """Move the position and delete the files before it.

        On a full disk the position may not be written; the files go all the same, which makes room, and a
        position in a file that is gone means the next one.
        """
        self.position = position
        for segment in self.sealed():
            if segment < position.segment:
                self.path(segment).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            content = json.dumps([position.segment, position.offset]).encode()
            write_whole(self.folder / "position.json", content, durable=False)

    def size(self) -> int:
        """Bytes that wait."""
        total = 0
        for segment in {*self.sealed(), self.number}:
            with contextlib.suppress(FileNotFoundError):
                total += self.path(segment).stat().st_size
        return max(0, total - self.position.offset)

    def drop_oldest(self) -> int:
        """Delete the oldest sealed file. Gives how many predictions it still held."""
        sealed = self.sealed()
        if not sealed:
            return 0
        oldest = sealed[0]
        offset = self.position.offset if self.position.segment == oldest else 0
        with self.path(oldest).open("rb") as file:
            file.seek(offset)
            lines = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
        self.path(oldest).unlink()
        self.commit(max(self.position, Position(oldest + 1)))
        return lines

    def _read_position(self) -> Position:
        try:
            segment, offset = json.loads((self.folder / "position.json").read_text())
            return Position(int(segment), int(offset))
        except (OSError, ValueError):
            return Position(min(self.sealed(), default=0))


class Captures:
    """Sends the log, and keeps its house."""

    def __init__(
        self,
        captures: CaptureLog,
        recorder: "PredictionsAsyncStub",
        reopen: Callable[[], Awaitable[None]],
        clock: Clock,
        *,
        segment_bytes: int,
        backlog_bytes: int,
    ) -> None:
        """`reopen` has Envoy open the log anew; it raises EkibenError where Envoy does not answer."""
        self._log = captures
        self._recorder = recorder
        self._reopen = reopen
        self._clock = clock
        self._segment_bytes = min(segment_bytes, max(backlog_bytes // 4, 1))
        self._backlog_bytes = backlog_bytes
        self._batch_lines = BATCH_LINES

    async def run(self) -> None:
        """Work, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._send())
            group.create_task(self._keep_house())

    async def _send(self) -> None:
        pause_s = POLL_S
        while True:
            began = self._clock.monotonic()
            try:
                more = await self.send_some()
                pause_s = POLL_S
            except EkibenError as exc:
                log.warning("the recorder does not take captures", extra={"error": str(exc)})
                more, pause_s = False, min(pause_s * 2, 5.0)
            except OSError as exc:
                log.error("the capture log cannot be read", extra={"error": str(exc)})
                more, pause_s = False, min(pause_s * 2, 5.0)
            await self._clock.sleep(self.rest_s(self._clock.monotonic() - began) if more else pause_s)

    def rest_s(self, took_s: float) -> float:
        """How long to rest after a batch when there is more. A rush of predictions has the cores to itself, but for a
        third of one; when a quarter of the room on disk is taken, for a half: captures are not to be dropped."""
        roomy = self._log.size() * 4 < self._backlog_bytes
        return min(took_s * (2 if roomy else 1), 0.5)

    async def send_some(self) -> bool:
        """Send one batch and commit it. Gives whether there may be more.

        Raises:
            EkibenError: the recorder did not keep it; nothing is committed.
        """
        at = self._log.position
        try:
            file = self._log.path(at.segment).open("rb")
        except FileNotFoundError:
            return self._next_segment(at)
        # Whether Envoy may still write to it: it may until it has opened the log anew.
        growing = at.segment >= self._log.number or not self._log.current.exists()
        with file:
            if os.fstat(file.fileno()).st_size < at.offset:  # Another file than the one that was read so far.
                self._log.commit(Position(at.segment))
                return True
            lines, taken = await asyncio.to_thread(_read_lines, file, at.offset, self._batch_lines)
        if not lines:
            rest = 0 if growing else self._log.path(at.segment).stat().st_size - at.offset - taken
            if growing and not taken:
                return False
            if taken or rest > 0:
                dropped.labels("torn").inc()
            return self._next_segment(at) if not growing else self._advance(at, taken)
        predictions, torn = await asyncio.to_thread(_parse, lines)
        await self._record(predictions)
        dropped.labels("torn").inc(torn)
        self._advance(at, taken)
        return True

    def _advance(self, at: Position, taken: int) -> bool:
        if self._log.position == at:  # Else the file was dropped meanwhile.
            self._log.commit(Position(at.segment, at.offset + taken))
        return True

    def _next_segment(self, at: Position) -> bool:
        later = [segment for segment in (*self._log.sealed(), self._log.number) if segment > at.segment]
        if not later or self._log.position != at:
            return False
        self._log.commit(Position(min(later)))
        return True

    async def _record(self, predictions: Sequence[pb.Prediction]) -> None:
        """Have the recorder keep them; one that it refuses for what it is does not hold up the others."""
        if not predictions:
            return
        try:
            with telemetry.untraced():
                await self._recorder.RecordPredictions(pb.RecordPredictionsRequest(predictions=predictions))
        except (InvalidArgument, ResourceExhausted) as exc:
            if len(predictions) > 1:
                half = len(predictions) // 2
                await self._record(predictions[:half])
                await self._record(predictions[half:])
                return
            if isinstance(exc, ResourceExhausted):
                raise
            log.error("the recorder refuses a prediction", extra={"prediction": predictions[0].name, "error": str(exc)})
            dropped.labels("refused").inc()
            return
        recorded.inc(len(predictions))

    async def _keep_house(self) -> None:
        while True:
            try:
                await self.keep_house()
            except (EkibenError, OSError) as exc:
                log.warning("the capture log cannot be cut", extra={"error": str(exc)})
            await self._clock.sleep(1.0)

    async def keep_house(self) -> None:
        """Seal a large file, and drop the oldest when too much waits."""
        size = 0
        with contextlib.suppress(FileNotFoundError):
            size = self._log.current.stat().st_size
        if size >= self._segment_bytes:
            self._log.seal()
        if not self._log.current.exists():  # Sealed just now, or taken away: Envoy would write where nobody reads.
            self._log.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            await self._reopen()
        while self._log.size() > self._backlog_bytes and self._log.sealed():
            lost = await asyncio.to_thread(self._log.drop_oldest)
            dropped.labels("backlog").inc(lost)
            log.error("captures are dropped: the recorder is too far behind", extra={"captures": lost})
        backlog.set(self._log.size())


def _read_lines(file: BinaryIO, offset: int, most: int) -> tuple[list[bytes], int]:
    """Whole lines from an offset, and how many bytes they take. Of a line without end nothing, unless it is absurd."""
    file.seek(offset)
    data = file.read(_READ_BYTES)
    if b"\n" not in data:
        data += file.read(_LONGEST_LINE - len(data))
        if b"\n" not in data:
            return [], len(data) if len(data) >= _LONGEST_LINE else 0
    lines: list[bytes] = []
    start = taken = size = 0
    while len(lines) < most and (end := data.find(b"\n", start)) >= 0 and size < BATCH_BYTES:
        lines.append(data[start:end])
        size += end - start
        start = taken = end + 1
    return lines, taken


def _parse(lines: Sequence[bytes]) -> tuple[list[pb.Prediction], int]:
    """Predictions, and how many lines are torn."""
    predictions, torn = [], 0
    for line in lines:
        try:
            predictions.append(prediction_from_line(line))
        except (ValueError, TypeError, KeyError):
            torn += 1
    return predictions, torn
