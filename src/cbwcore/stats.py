"""The figures that stats() returns."""

from __future__ import annotations

import msgspec

__all__ = ["DiskStats", "SnapshotStats"]


class DiskStats(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest did since the disk was opened."""

    guest_writes: int
    """Writes, write-zeroes and discards that reached the disk."""
    guest_write_bytes: int
    guest_reads: int
    guest_read_bytes: int
    snapshots: int
    """Snapshots that are not closed."""


class SnapshotStats(msgspec.Struct, frozen=True, kw_only=True):
    """What a snapshot cost since T0; bytes and seconds. CBW is copy-before-write."""

    guest_writes: int
    """Guest writes of the disk since T0, whether CBW held them up or not."""
    cbw_copies: int
    """Runs of clusters copied."""
    cbw_bytes: int
    """Bytes of T0 data preserved."""
    cbw_zero_bytes: int
    """Of these, zeroes, for which the target holds nothing (R11)."""
    cbw_failures: int
    """Copies that failed, late ones included."""
    timeouts: int
    """Guest writes that ran out of ``cbw_timeout``."""
    waits: int
    """Guest writes that CBW held up at all, with their own copy or with another's."""
    wait_seconds: float
    longest_wait: float
    wait_histogram: tuple[tuple[float, int], ...]
    """(upper bound in seconds, guest writes held up for less than that, down to half of it), where there are any."""
    copy_waits: int
    """Of these, those that waited for the copy of another."""
    frozen_waits: int
    """Of these, those that waited for a snapshot read (R6)."""
    target_bytes: int
    """Bytes of the target that copies take; what ``target_limit`` limits."""
    target_allocated: int
    """Bytes that the target's file system has allocated to it."""
    arm_pause: float
    """Seconds that guest writes were held back to take the snapshot (R10)."""
