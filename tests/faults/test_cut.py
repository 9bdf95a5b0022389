"""A disk or target cut short under the engine, that grows again: whoever saw it cut never takes it for whole (R12)."""

import errno
import os

import pytest
from engine_support import CLUSTER, G, S, assert_broken, file_bytes

import cbwcore

NEW = b"n" * 4096


def guest_read(disk, snap):
    disk.pread(4096, 0)


def snapshot_read(disk, snap):
    snap.pread(4096, 0)


def copy(disk, snap):
    disk.pwrite(NEW, 0)


def status(disk, snap):
    list(snap.block_status())


def write_at_the_end(disk, snap):
    disk.pwrite(NEW, disk.size - len(NEW))


def goes_on(disk, snap, offset):
    """A guest write whose copy fails, under break-snapshot: it is done, and the cut is the cause of the break."""
    disk.pwrite(NEW, offset)
    assert file_bytes(disk.path, offset, len(NEW)) == disk.pread(len(NEW), offset) == NEW
    assert_broken(snap, errno.EIO, "source-read", offset, CLUSTER)
    assert counts(snap) == (1, 1)


def counts(snap):
    stats = snap.stats()
    return stats.cbw_copies, stats.cbw_failures


@pytest.mark.parametrize("policy", [G, S])
@pytest.mark.parametrize("seen_by", [guest_read, snapshot_read, copy, status, write_at_the_end])
def test_r12_a_disk_that_was_seen_cut_is_never_whole_again(rig, seen_by, policy):
    disk = rig.disk()
    snap = rig.snapshot(disk, on_cbw_error=policy)
    disk.pwrite(NEW, disk.size - len(NEW))  # so that the guest may write there without a copy
    os.truncate(disk.path, 0)
    if policy == S and seen_by is copy:
        goes_on(disk, snap, 0)
        os.truncate(disk.path, disk.size)
        disk.pwrite(NEW, CLUSTER)
        assert disk.pread(len(NEW), CLUSTER) == NEW
        assert_broken(snap, errno.EIO, "source-read", 0, CLUSTER)
        assert counts(snap) == (1, 1)
        return
    with pytest.raises(OSError, match="Input/output error"):
        seen_by(disk, snap)
    os.truncate(disk.path, disk.size)
    with pytest.raises(OSError, match="Input/output error"):
        snap.pread(4096, CLUSTER)
    with pytest.raises(OSError, match="Input/output error"):
        list(snap.block_status())
    assert (snap.state, snap.error) == ("armed", None)
    assert snap.pread(CLUSTER, disk.size - CLUSTER) == disk.t0[-CLUSTER:], "what was copied before is there"
    if policy == S:
        goes_on(disk, snap, CLUSTER)
        return
    with pytest.raises(cbwcore.CopyBeforeWriteError, match="source-read"):
        disk.pwrite(NEW, CLUSTER)
    assert file_bytes(disk.path, CLUSTER, len(NEW)) == bytes(len(NEW))
    assert (snap.state, snap.error) == ("armed", None)
    assert counts(snap) == (1, 2 if seen_by is copy else 1)


@pytest.mark.parametrize("policy", [G, S])
def test_r12_a_target_that_was_seen_cut_is_never_whole_again(rig, policy):
    """A read of it fails alone, under both policies: it is no copy."""
    disk = rig.disk()
    target = rig.path("target")
    snap = rig.snapshot(disk, target, on_cbw_error=policy)
    disk.pwrite(NEW, 0)
    os.truncate(target, 0)
    with pytest.raises(OSError, match="Input/output error"):
        snap.pread(4096, 0)
    os.truncate(target, disk.size)
    with pytest.raises(OSError, match="Input/output error"):
        snap.pread(4096, 0)
    assert (snap.state, snap.error, counts(snap)) == ("armed", None, (1, 0))
    assert snap.pread(CLUSTER, CLUSTER) == disk.t0[CLUSTER : 2 * CLUSTER], "from the disk"
    disk.pwrite(NEW, 4096)
    assert disk.pread(8192, 0) == file_bytes(disk.path, 0, 8192) == NEW * 2
