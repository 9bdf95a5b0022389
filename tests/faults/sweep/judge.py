"""What a run must have left behind, once the fault is over and the disk is opened again."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

from cases import Case
from workload import (
    CLUSTER,
    FULL,
    INCREMENTAL,
    RESTORED,
    SIZE,
    Journal,
    Run,
    WrongError,
    check,
    covers,
    part_of,
    same,
)

import cbwcore

KNOWN = {"disk", "disk.cbw-bitmaps", "target", "journal", FULL, INCREMENTAL, RESTORED}
KNOWN |= {f"{name}.cbw.json" for name in (FULL, INCREMENTAL)}


class Left:
    """What is known of a run that is over: its backups with their T0, and what its bitmap has every change from."""

    def __init__(self, run: Run) -> None:
        self.home = run.home
        self.case = run.case
        self.backups = dict(run.backups)
        self.unsure: dict[str, bytes] = {}  # they may have succeeded
        self.bases = dict(run.bases)
        self.restored = run.restored
        self.may_be_restored: bytes | None = None
        self.notes: list[str] = run.errors

    @classmethod
    def of_killed(cls, home: Path, case: Case) -> Left:
        """From its journal. The disk has what was acknowledged, and any part of what was not."""
        left = cls(Run(home, case))
        content = (home / "disk").read_bytes()
        last: tuple[bytes, bytes] | None = None
        for event, *facts in Journal.read(home / "journal"):
            if event == "change":
                last = facts[1], facts[2]
            elif event == "changed":
                last = facts[1], facts[1]
            elif event == "backup":
                left.unsure[facts[0]] = facts[1]
            elif event == "backed up":
                left.backups[facts[0]] = left.unsure.pop(facts[0])
            elif event == "begin" and facts[0] == "restore":
                left.may_be_restored = {**left.unsure, **left.backups}[
                    INCREMENTAL if INCREMENTAL in left.backups else FULL
                ]
            elif event == "end" and facts[0] == "restore":
                left.restored = left.may_be_restored
            elif event == "end" and facts[0] == "add bitmap":
                left.bases[None] = content_at_start(home)
        if last is not None:
            part_of(content, *last, "the disk of the killed process")
        return left


def content_at_start(home: Path) -> bytes:
    """The bitmap is added before the first write."""
    from workload import t0_of_disk

    return t0_of_disk()


def judge(left: Left) -> None:
    """WrongError says what is wrong."""
    judge_files(left)
    judge_backups(left)
    judge_restored(left)
    judge_disk(left)


def judge_files(left: Left) -> None:
    """Nothing is left that has no business to be."""
    names = set(os.listdir(left.home)) - KNOWN
    may_stay = left.case.action == "kill" or left.case.kind in ("unlink", "lock", "stat") or not left.case.once
    for name in names:
        check(name.endswith(".partial"), f"{name} is left behind")
        check(may_stay, f"{name} is left behind")


def judge_backups(left: Left) -> None:
    for name in (FULL, INCREMENTAL):
        if name in left.backups:
            restores_to(left.home, name, left.backups[name])
        elif (left.home / name).exists():
            check(name in left.unsure or not left.case.once, f"{name} was never said to be a backup, and is there")
            try:
                t0 = left.unsure.get(name)
                id_of(left.home / name)
                check(t0 is not None, f"{name} failed, and passes for a backup")
                restores_to(left.home, name, t0)
                left.backups[name] = t0
            except cbwcore.StateError as e:
                left.notes.append(f"refused: {e}")


def id_of(image: Path) -> str:
    return cbwcore.verify_backup(image).chain[0].id


def restores_to(home: Path, name: str, content: bytes) -> None:
    cbwcore.restore(home / name, home / "check", overwrite=True)
    same((home / "check").read_bytes(), content, f"{name}, restored")
    os.unlink(home / "check")


def judge_restored(left: Left) -> None:
    path = left.home / RESTORED
    if left.restored is not None:
        same(path.read_bytes(), left.restored, "the restored disk")
    elif path.exists() and left.may_be_restored is not None:
        same(path.read_bytes(), left.may_be_restored, "the restored disk")
    elif left.case.once:
        check(not path.exists(), "a restore that failed has left a file")


def judge_disk(left: Left) -> None:
    """It opens, its bitmap has every change since its base, and everything works."""
    content = (left.home / "disk").read_bytes()
    with cbwcore.Disk(left.home / "disk", io=left.case.config.engine, direct=left.case.config.direct) as disk:
        judge_bitmap(left, disk, content)
        with disk.snapshot() as snapshot:
            disk.pwrite(b"n" * 5000, CLUSTER - 100)
            disk.pwrite(b"n", SIZE - 1)
            same(snapshot.pread(SIZE, 0), content, "the next snapshot")
        disk.flush()
        full_and_incremental_again(left, disk)


def judge_bitmap(left: Left, disk: cbwcore.Disk, content: bytes) -> None:
    if disk.bitmaps.problem is not None:
        left.notes.append(f"problem: {disk.bitmaps.problem}")
        return
    if "b" not in disk.bitmaps:
        check(not left.bases, "the bitmap is gone")
        return
    bitmap = disk.bitmaps["b"]
    if bitmap.inconsistent is not None:
        left.notes.append(f"inconsistent: {bitmap.inconsistent}")
        return
    bases: dict[str | None, bytes] = {None: content_at_start(left.home), **left.bases}
    for name, t0 in left.backups.items():
        with contextlib.suppress(cbwcore.StateError):
            bases.setdefault(id_of(left.home / name), t0)
    check(bitmap.since in bases, f"the bitmap is since {bitmap.since}, which is no backup")
    covers(bitmap, bases[bitmap.since], content)


def full_and_incremental_again(left: Left, disk: cbwcore.Disk) -> None:
    """The next good operation: a chain as if nothing had been."""
    for name, options in (
        ("again.qcow2", {"sync": "full"}),
        ("more.qcow2", {"sync": "incremental", "backing": left.home / "again.qcow2"}),
    ):
        content = (left.home / "disk").read_bytes()
        result = disk.backup(left.home / name, bitmap="b", format="qcow2", **options).wait(10)
        check(result.bitmap_error is None, f"{name}: {result.bitmap_error}")
        restores_to(left.home, name, content)
        disk.pwrite(name.encode(), 2 * CLUSTER + 5)


def judge_process(run: Run, before: Any) -> None:
    """Nothing of the run is left in its process."""
    check(not run.stray, f"{run.stray}")
    threads = [t for t in threading.enumerate() if t is not threading.main_thread()]
    check(not threads, f"threads are left: {threads}")
    leaked = descriptors() - before
    check(not leaked, f"descriptors are left: {leaked}")


def descriptors() -> set[tuple[str, str]]:
    """Those that are open, but for rings, of which some are kept."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            where = os.readlink(f"/proc/self/fd/{fd}")
            if "io_uring" not in where and "/proc/" not in where:
                found.add((fd, where))
    return found


__all__ = ["Left", "WrongError", "descriptors", "judge", "judge_process"]
