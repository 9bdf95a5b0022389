"""A backup job: workers that copy a snapshot into an image while the guest writes on.

What the job has read the snapshot need not preserve any more, so it gives that up, and the space of a sequential backup
stays small. Guests come first: the job's reads take no copy buffer and no lock that a copy waits for, and hold up only
writes to the clusters that one span is read from.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from cbwcore._cbwcore import zero_units
from cbwcore.backup.control import Control, StopWorking
from cbwcore.backup.events import EventLog, JobEvent, JobStatus
from cbwcore.backup.options import MAX_SPEED, UNIT, BackupOptions, BitmapMode, OnError, Sync, check_number
from cbwcore.backup.plan import Plan, Span
from cbwcore.bitmaps import DirtyBitmap
from cbwcore.errors import CbwError, ConfigError, JobCancelledError
from cbwcore.freeze import Freeze
from cbwcore.images.chain import check_stored
from cbwcore.images.digest import Piece
from cbwcore.images.manifest import BackupFacts, Manifest
from cbwcore.images.output import Output
from cbwcore.policy import SnapshotState
from cbwcore.snapshot import Snapshot

if TYPE_CHECKING:
    from cbwcore.disk import Disk

__all__ = ["BackupJob", "BackupResult"]

logger = logging.getLogger(__name__)

PROGRESS_EVERY = 0.1  # seconds
FIRST_RETRY = 0.05  # seconds, doubled each time, up to
LAST_RETRY = 2.0


class BackupResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a backup that succeeded did. Sizes in bytes.

    ``sync``: as it was done; ``reason``: why it is not what was asked for. ``manifest``: None for sync none.
    ``bitmap_error``: why the bitmap still has what is in this backup, too. ``fleece_peak``: the most that the
    snapshot's target took. ``cbw_bytes``: what guests' writes had to copy."""

    id: str
    sync: Sync
    reason: str | None
    seconds: float
    fleece_peak: int
    cbw_bytes: int
    retries: int
    bitmap_error: str | None
    manifest: Manifest | None


class Work(NamedTuple):
    """A span, its place in the image's order, and how often it has failed."""

    span: Span
    ticket: Piece
    failures: int = 0


class SpanError(Exception):
    """A read or a write of a span has failed."""

    def __init__(self, operation: str, error: Exception) -> None:
        super().__init__(operation)
        self.operation = operation
        self.error = error


@contextlib.contextmanager
def failing(operation: str) -> Iterator[None]:
    """Name what fails."""
    try:
        yield
    except (OSError, CbwError, ValueError) as e:
        raise SpanError(operation, e) from e


def action_for(error: BaseException, policy: OnError) -> OnError:
    """Report, ignore or stop. What trying again cannot mend is reported, whatever the policy."""
    if not isinstance(error, OSError) or isinstance(error, CbwError):
        return OnError.REPORT
    if policy == OnError.ENOSPC:
        return OnError.STOP if error.errno == errno.ENOSPC else OnError.REPORT
    return policy


class Making(NamedTuple):
    """What a job is made of, when its snapshot has been taken."""

    options: BackupOptions
    sync: Sync
    reason: str | None
    snapshot: Snapshot
    freeze: Freeze | None
    plan: Plan | None
    output: Output | None
    rest: DirtyBitmap | None  # bitmap_mode always: what is not copied yet, in units
    facts: BackupFacts | None  # of the manifest
    clean_up: contextlib.ExitStack  # the fleecing target


class BackupJob:
    """Made by `Disk.backup` and `backup_group`, and running since. Thread-safe. ``id``: hex; the backup's, too."""

    def __init__(self, disk: Disk, making: Making, job_id: str, progress: Callable[[BackupJob], object] | None) -> None:
        self.id = job_id
        self.disk = disk
        self.options = making.options
        self.sync = making.sync
        self.reason = making.reason
        self.snapshot = making.snapshot
        self._making = making
        self._plan = making.plan
        self._output = making.output
        self._progress = progress
        self._planning = threading.Lock()  # guards the plan, whose questions to the disk may take their time
        self._lock = threading.Lock()  # guards what is to be done again, and the counters; held across nothing
        self._again: deque[Work] = deque()
        self._done_bytes = 0
        self._retries = 0
        self._fleece_peak = 0
        self._cbw_bytes = 0
        self._told_at = 0.0
        self._error: BaseException | None = None
        self._result: BackupResult | None = None
        self._cancelled = False
        self._ending = False  # sync none: complete() or cancel() was called
        self._status = self._told_status = JobStatus.CREATED
        self._log = EventLog()
        self._control = Control(making.options.speed)
        self._began = time.monotonic()
        self._threads: set[threading.Thread] = set()
        self._ended = threading.Event()

    def __repr__(self) -> str:
        return f"<BackupJob {self.id} of {self.disk.path}, {self.status}, {self.offset} of {self.len} bytes>"

    # ---- what it is doing ----

    @property
    def status(self) -> JobStatus:
        """Its state."""
        if self._status == JobStatus.RUNNING and self._control.paused:
            return JobStatus.PAUSED
        return self._status

    @property
    def bitmap(self) -> DirtyBitmap | None:
        """The bitmap as it was at T0, while the job runs; for exports that pull clients read."""
        return None if self._making.freeze is None else self._making.freeze.bitmap

    @property
    def offset(self) -> int:
        """Bytes that are done, holes included."""
        return self._done_bytes

    @property
    def len(self) -> int:
        """Bytes that there are to do."""
        return 0 if self._plan is None else self._plan.total

    @property
    def error(self) -> BaseException | None:
        """What it failed with; None while it has not."""
        return self._error

    def events(self, timeout: float | None = None) -> Iterator[JobEvent]:
        """All its events from the first on, waiting for those to come, until it is concluded; or until none came for
        ``timeout`` seconds."""
        return self._log.read(timeout)

    def wait(self, timeout: float | None = None) -> BackupResult:
        """The result, once it is concluded. Raises what it failed with (OSError, CbwError), JobCancelledError, or
        TimeoutError after ``timeout`` seconds."""
        self.disk._check_forked()  # the job's threads are the parent's
        if not self._ended.wait(timeout):
            raise TimeoutError(f"job {self.id} is not done after {timeout} seconds")
        if self._result is None:
            assert self._error is not None
            raise self._error
        return self._result

    # ---- what others may tell it ----

    @property
    def speed(self) -> int:
        """The limit in bytes a second, 0 for none; may be set at any time (QEMU's block-job-set-speed)."""
        return self._control.speed

    @speed.setter
    def speed(self, value: int) -> None:
        check_number("speed", value, 0, MAX_SPEED)
        self._control.speed = value

    def pause(self) -> None:
        """Finish the spans under way and begin none until resume(). Again does nothing."""
        self._control.pause()
        self._tell_status()

    def resume(self) -> None:
        """Go on, after pause() or after an error with "stop"; what failed is tried again."""
        if self._control.resume():
            self._tell_status()

    def cancel(self) -> None:
        """Give up: the partial image is removed, the bitmap has all that it had and what was written since. Does not
        wait; a job whose image is complete already succeeds."""
        with self._lock:
            self._cancelled = True
            ends_here = self.sync == Sync.NONE and not self._ending
            self._ending = self.sync == Sync.NONE
        self._control.stop()
        if ends_here:
            self._conclude()

    def complete(self) -> BackupResult:
        """Of sync none: the clients have all they want, and the bitmap starts anew from T0. ConfigError for other
        syncs, and if it has ended; SnapshotBrokenError where the snapshot broke: then it fails, for what clients read
        was not all of it."""
        with self._lock:
            if self.sync != Sync.NONE or self._ending:
                raise ConfigError(f"job {self.id} cannot be completed: {self.sync} backup, {self.status}")
            self._ending = True
        self._conclude()
        return self.wait()

    # ---- its threads ----

    def start(self) -> None:
        """Once, by whoever made it. Where it can have no thread it has failed with that."""
        with self._lock:
            if self._ending:  # sync none: who closes the disk has cancelled it already
                return
            self._status = JobStatus.RUNNING
        self._tell_status()
        if self.sync == Sync.NONE:
            return
        try:
            self._start_thread(self._run)
        except RuntimeError as e:
            self._fail(OSError(errno.EAGAIN, f"backup job {self.id} has no thread: {e}"))
            self._conclude()

    def join(self) -> None:
        """Wait for the end; at once if this is one of its threads (a callback)."""
        if threading.current_thread() not in self._threads:
            self._ended.wait()

    def _start_thread(self, run: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=run, name=f"backup {self.id[:8]}", daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:
            self._threads.discard(thread)
            raise
        return thread

    def _run(self) -> None:
        others = []
        with contextlib.suppress(RuntimeError):  # no more threads to be had: fewer do it
            for _ in range(self.options.workers - 1):
                others.append(self._start_thread(self._work))
        self._work()
        for thread in others:
            thread.join()
        self._conclude()

    def _work(self) -> None:
        """Until there is nothing more to do. Raises nothing."""
        try:
            with mmap.mmap(-1, self._span_bytes()) as buffer, memoryview(buffer) as view:
                while (work := self._next()) is not None:
                    self._do(work, view)
        except StopWorking:
            pass
        except BaseException as e:
            self._fail(e)

    def _span_bytes(self) -> int:
        return max(self.options.chunk_size, self.snapshot.cluster_size)

    def _next(self) -> Work | None:
        """What to do next: the plan's next span, and when there is none what has failed before."""
        assert self._plan is not None
        assert self._output is not None
        while True:
            try:
                with self._planning:
                    span = self._plan.next()
                    if span is not None:
                        return Work(span, self._output.begin(span.offset, span.length))
            except (OSError, CbwError, ValueError) as e:
                failed = e
            else:
                with self._lock:
                    return self._again.popleft() if self._again else None
            self._meet(failed, "read", None)

    def _do(self, work: Work, view: memoryview) -> None:
        if work.failures:
            self._control.sleep(min(FIRST_RETRY * 2**work.failures, LAST_RETRY))
        self._control.enter(0 if work.span.zero else work.span.length)
        try:
            self._copy(work, view)
        except SpanError as e:
            self._meet(e.error, e.operation, work)
        else:
            self._count(work.span)
        finally:
            if self._control.leave():
                self._tell_status()

    def _copy(self, work: Work, view: memoryview) -> None:
        """SpanError, and it may be tried again."""
        assert self._output is not None
        offset, length, zero = work.span
        if zero:
            with failing("write"):
                self._output.write_zeroes(work.ticket)
            return
        with view[:length] as part:
            with failing("read"):
                self.snapshot.pread_into(part, offset)
            with failing("write"):
                self._output.write(work.ticket, part, zero_units(part, UNIT))
        with contextlib.suppress(OSError, ValueError):  # it is read: whatever became of the snapshot
            self._fleece_peak = max(self._fleece_peak, self.snapshot._target_bytes)
            self.snapshot.discard(offset, length)

    def _count(self, span: Span) -> None:
        with self._lock:
            self._done_bytes += span.length
            if self._making.rest is not None:
                self._making.rest._put(span.offset // UNIT, -(-(span.offset + span.length) // UNIT), False)
            now = time.monotonic()
            tell = self._progress is not None and now - self._told_at >= PROGRESS_EVERY
            if tell:
                self._told_at = now
        if tell:
            self._tell_progress()

    # ---- errors ----

    def _meet(self, error: BaseException, operation: str, work: Work | None) -> None:
        """A span, or the plan (``work`` None), has met an error. StopWorking, or it is to be tried again."""
        policy = self.options.on_source_error if operation == "read" else self.options.on_target_error
        action = action_for(error, policy)
        self._tell("BLOCK_JOB_ERROR", error=str(error), operation=operation, action=str(action))
        if action == OnError.REPORT:
            self._fail(error)
            raise StopWorking
        with self._lock:
            self._retries += 1
            if work is not None:
                self._again.append(work._replace(failures=work.failures + 1 if action == OnError.IGNORE else 0))
        if action == OnError.STOP:
            self.pause()
        if work is None:  # the plan is asked again at once, by this thread
            self._control.sleep(FIRST_RETRY)
            self._control.enter(0)
            self._control.leave()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self._error is None and not self._cancelled:  # what comes after is of its own making
                self._error = error
        self._control.stop()

    # ---- the end ----

    def _conclude(self) -> None:
        """Once, when nobody works any more: the image, the bitmap and the snapshot as the job's success or failure has
        them."""
        if self._error is None and self._cancelled and not self._all_done():
            self._error = JobCancelledError(f"job {self.id} was cancelled")
        try:
            if self._error is None:
                self._succeed()
        except BaseException as e:
            self._error = e
        if self._error is not None:
            self._set_status(JobStatus.ABORTING)
            self._give_up()
        with contextlib.suppress(Exception):
            self._making.clean_up.close()
        self.disk._jobs.pop(self, None)
        if self._progress is not None:
            self._tell_progress()
        name = "BLOCK_JOB_CANCELLED" if isinstance(self._error, JobCancelledError) else "BLOCK_JOB_COMPLETED"
        self._set_status(JobStatus.CONCLUDED)
        self._tell(name, error=None if self._error is None else str(self._error), last=True)
        self._ended.set()

    def _all_done(self) -> bool:
        return self.sync != Sync.NONE and self._done_bytes == self.len

    def _succeed(self) -> None:
        """The image first, durably, then the bitmap: if the process dies in between the bitmap has too much, never too
        little."""
        state, cause = self.snapshot.state, self.snapshot.error
        if self.sync == Sync.NONE and state != SnapshotState.ARMED:
            self.snapshot.pread(0, 0)  # raises what became of it
            raise ConfigError(f"the snapshot of job {self.id} is {state}: {cause}")
        self._close_snapshot()
        manifest = None
        if self._output is not None and self._making.facts is not None:
            check = check_stored if self.options.verify else None
            manifest = self._output.finish(self._making.facts, check=check)
        bitmap_error = self._settle_bitmap()
        self._result = BackupResult(
            id=self.id,
            sync=self.sync,
            reason=self.reason,
            seconds=time.monotonic() - self._began,
            fleece_peak=self._fleece_peak,
            cbw_bytes=self._cbw_bytes,
            retries=self._retries,
            bitmap_error=bitmap_error,
            manifest=manifest,
        )

    def _settle_bitmap(self) -> str | None:
        """After success. Where its file cannot be told, the bitmap has what it had and what was written since, which is
        enough on top of this backup, too (`cbwcore.backup.epoch`): so the backup counts. What was wrong, or None."""
        freeze = self._making.freeze
        if freeze is None:
            return None
        try:
            if self.options.mode != BitmapMode.NEVER:
                freeze.commit(self.id)
                return None
        except (OSError, CbwError) as e:
            logger.error("%s: bitmap %r after backup %s: %s", self.disk.path, freeze.bitmap.name, self.id, e)
            freeze.merge()
            return str(e)
        freeze.merge()
        return None

    def _give_up(self) -> None:
        """All of it, whatever fails; that is logged, for the job's own error is what its user is to hear of."""
        freeze, output, rest = self._making.freeze, self._output, self._making.rest
        steps: list[Callable[[], object]] = [self._close_snapshot]
        if freeze is not None:
            steps.append(freeze.merge if rest is None else lambda: freeze.replace(rest))
        if output is not None:
            steps.append(lambda: output.abort(keep=rest is not None))
        for step in steps:
            try:
                step()
            except Exception:
                logger.exception("%s: the end of backup job %s", self.disk.path, self.id)

    def _close_snapshot(self) -> None:
        with contextlib.suppress(ValueError):  # somebody has closed it
            stats = self.snapshot.stats()
            self._cbw_bytes = stats.cbw_bytes
            self._fleece_peak = max(self._fleece_peak, stats.target_bytes)
        try:
            self.snapshot.close()
        except OSError as e:
            logger.warning("%s: closing the fleecing target: %s", self.disk.path, e)

    # ---- telling ----

    def _set_status(self, status: JobStatus) -> None:
        self._status = status
        self._tell_status()

    def _tell_status(self) -> None:
        """If it has changed since it was told."""
        with self._lock:
            status, before = self.status, self._told_status
            self._told_status = status
        if status != before:
            self._tell("JOB_STATUS_CHANGE")

    def _tell(self, event: str, *, last: bool = False, **facts: Any) -> None:
        self._log.add(
            JobEvent(
                event=event,
                device=self.id,
                time=time.time(),
                status=self.status,
                offset=self.offset,
                len=self.len,
                speed=self.speed,
                **facts,
            ),
            last=last,
        )

    def _tell_progress(self) -> None:
        assert self._progress is not None
        try:
            self._progress(self)
        except Exception:
            logger.exception("%s: the progress callback of backup job %s", self.disk.path, self.id)
