"""A disk or target cut short under the engine, that grows again: whoever saw it cut never takes it for whole (R12)."""

import os

import pytest
from engine_support import CLUSTER

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


@pytest.mark.parametrize("seen_by", [guest_read, snapshot_read, copy, status, write_at_the_end])
def test_r12_a_disk_that_was_seen_cut_is_never_whole_again(rig, seen_by):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    disk.pwrite(NEW, disk.size - len(NEW))  # so that the guest may write there without a copy
    os.truncate(disk.path, 0)
    with pytest.raises(OSError, match="Input/output error"):
        seen_by(disk, snap)
    os.truncate(disk.path, disk.size)
    with pytest.raises(OSError, match="Input/output error"):
        snap.pread(4096, CLUSTER)
    with pytest.raises(OSError, match="Input/output error"):
        list(snap.block_status())
    with pytest.raises(cbwcore.CopyBeforeWriteError, match="source-read"):
        disk.pwrite(NEW, CLUSTER)


def test_r12_a_target_that_was_seen_cut_is_never_whole_again(rig):
    disk = rig.disk()
    target = rig.path("target")
    snap = rig.snapshot(disk, target)
    disk.pwrite(NEW, 0)
    os.truncate(target, 0)
    with pytest.raises(OSError, match="Input/output error"):
        snap.pread(4096, 0)
    os.truncate(target, disk.size)
    with pytest.raises(OSError, match="Input/output error"):
        snap.pread(4096, 0)
