"""The demo's first run: a snapshot of a disk that its guests overwrite, backed up meanwhile, and proved by SHA-256."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from cbwcore.cli.guests import Guest, guests_at_work
from cbwcore.cli.image import copy_out, sha256
from cbwcore.cli.report import Cost, GuestGot, Hashes, Proof, Run, SnapshotReads, cost_of
from cbwcore.disk import Disk
from cbwcore.snapshot import Snapshot

__all__ = ["run_under_load"]


def run_under_load(work: Path, image: Path, *, seed: int, seconds: float, out: Console) -> tuple[Run, Hashes]:
    """Snapshot ``image``, let the guests at it, and back the snapshot up in about ``seconds``."""
    backup = work / "backup.img"
    t0 = sha256(image)
    out.print(f"T0 sha256     {t0}")
    with Disk(image) as disk, disk.snapshot(work / "fleece.img") as snapshot:
        with guests_at_work(disk, seed) as guests, progress(snapshot, seconds, out) as step:
            copy_out(snapshot, backup, step)
        state, cost = snapshot.state, cost_of(snapshot)
        with snapshot.open() as f:
            read_again = hashlib.file_digest(f, "sha256").hexdigest()
    hashes = Hashes(t0=t0, backup=sha256(backup), snapshot=read_again, disk=sha256(image))
    out.print(f"backup sha256 {hashes.backup}")
    out.print(f"disk now      {hashes.disk}")
    backup.unlink()
    return make_run(guests, SnapshotReads(state=state, reads="T0 data"), cost, hashes), hashes


def make_run(guests: list[Guest], reads: SnapshotReads, cost: Cost, hashes: Hashes) -> Run:
    """The row of this run."""
    return Run(
        name="backup under load",
        policy="break-guest-write",
        fault=None,
        guest=GuestGot(requests=sum(g.requests for g in guests), longest=max(g.longest for g in guests)),
        snapshot=reads,
        cost=cost,
        proofs=[
            Proof("the backup equals the disk at T0", hashes.backup == hashes.t0),
            Proof("the snapshot still reads as the disk at T0", hashes.snapshot == hashes.t0),
            Proof("the disk has moved on", hashes.disk != hashes.t0),
            Proof("the guests read back what they wrote", not any(g.wrong_reads for g in guests)),
        ],
    )


@contextmanager
def progress(snapshot: Snapshot, seconds: float, out: Console) -> Iterator[Callable[[int], None]]:
    """A progress bar, as a function of the bytes done, that also holds a backup back so that it takes ``seconds``."""
    columns = (
        TextColumn("backup       "),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[writes]} guest writes"),
    )
    began = time.monotonic()
    with Progress(*columns, console=out) as bar:
        task = bar.add_task("", total=snapshot.size, writes=0)

        def step(done: int) -> None:
            bar.update(task, completed=done, writes=snapshot.stats().guest_writes)
            time.sleep(max(0.0, began + seconds * done / snapshot.size - time.monotonic()))

        yield step
