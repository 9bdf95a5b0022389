"""What the compiled core itself refuses, whatever the Python around it lets through."""

import errno
import os
import socket
import threading
import time

import pytest

import cbwcore
from cbwcore import _cbwcore as core
from cbwcore._cbwcore import FaultPlan, NbdConnectionCore, NbdCore, SnapshotCore, arm_snapshots

FITS = {
    "bytes_in_flight": 64 << 20,
    "connections": 4,
    "max_request": 1 << 20,
    "max_drain": 1 << 20,
    "max_extents": 100,
    "stall_seconds": 1.0,
}


@pytest.fixture
def disk(make_disk):
    return make_disk(1 << 20)


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("max_request", 1 << 40, "max_request"),
        ("max_extents", 0, "max_extents"),
        ("stall_seconds", 0.0, "stall_seconds"),
        ("connections", 0, "connections"),
        ("bytes_in_flight", 4096, "too few"),
        ("bytes_in_flight", -1, "too few"),
    ],
)
def test_a_server_without_room_is_refused(option, value, text):
    with pytest.raises(cbwcore.ConfigError, match=text):
        NbdCore(**FITS | {option: value})


def test_a_connection_is_of_a_disk_or_snapshot_with_bitmaps_of_its_size(disk):
    server = NbdCore(**FITS)
    how = {"read_only": False, "discard": False, "structured": True}
    with pytest.raises(cbwcore.ConfigError, match="a disk or snapshot is exported, not str"):
        NbdConnectionCore(server, "disk", contexts=(), **how)
    with pytest.raises(cbwcore.ConfigError, match="contexts, more than"):
        NbdConnectionCore(server, disk, contexts=[None] * 1000, **how)
    with pytest.raises(cbwcore.ConfigError, match="a bitmap of 4096 bytes, not 1048576"):
        NbdConnectionCore(server, disk, contexts=[cbwcore.DirtyBitmap(4096)], **how)


def test_a_connection_is_served_once(disk):
    server = NbdCore(**FITS)
    how = {"contexts": (), "read_only": False, "discard": False, "structured": True}
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs, open("/dev/null") as no_socket:
        connection = NbdConnectionCore(server, disk, **how)
        assert connection.serve(theirs.fileno()) == "gone"
        with pytest.raises(ValueError, match="served once"):
            connection.serve(theirs.fileno())
        with pytest.raises(OSError, match="not permitted"):  # nothing that epoll takes
            NbdConnectionCore(server, disk, **how).serve(no_socket.fileno())


def test_a_snapshot_of_a_closed_disk_is_refused(make_disk):
    disk = make_disk(1 << 20)
    disk.close()
    with pytest.raises(ValueError, match="is closed"):
        SnapshotCore(disk, 16, False)


def test_an_object_is_one_disk_for_good(disk):
    with pytest.raises(ValueError, match="already"):
        disk.__init__(disk.path)


def test_more_bitmaps_than_disks_can_record_switch_none(disk):
    with pytest.raises(cbwcore.ConfigError, match="600 bitmaps that start and 0 that stop"):
        arm_snapshots([], starts=[(disk, None)] * 600)
    with pytest.raises(cbwcore.ConfigError, match="65 snapshots in one group"):
        arm_snapshots([None] * 65)


def test_an_extent_of_nothing_is_refused(disk):
    with disk.snapshot() as snap:
        for start, end in ((5, 5), (6, 5), (0, (1 << 20) + 1)):
            with pytest.raises(cbwcore.ConfigError, match="no range"):
                snap._extent(start, end)


def test_faults_of_a_closed_snapshot_are_refused(disk, plan):
    snap = disk.snapshot()
    snap.close()
    with pytest.raises(ValueError, match="closed"):
        snap._inject(plan)


def test_a_plan_has_room_for_64_rules():
    plan = FaultPlan()
    for _ in range(64):
        plan.error("pread", errno.EIO)
    with pytest.raises(cbwcore.ConfigError, match="at most 64 rules"):
        plan.error("pread", errno.EIO)


def test_what_is_no_file_has_no_alignment_and_no_birth():
    r, w = os.pipe()
    os.close(r)
    os.close(w)
    assert core.dio_alignment(w) is None
    assert core.birth_time(w) is None
    with pytest.raises(OSError, match="descriptor"):
        core.punch_hole(w, 0, 4096)


def test_what_the_target_holds_at_this_moment(disk):
    snap = disk.snapshot()
    disk.pwrite(b"n", 0)
    assert snap._target_bytes == 65536
    snap.close()
    assert snap._target_bytes == 0


def test_a_socket_that_its_owner_has_made_non_blocking_is_served(disk):
    request = bytes.fromhex("25609513 0000 0000 0000000000000001 0000000000000005 00000bb8")
    connection = NbdConnectionCore(NbdCore(**FITS), disk, contexts=(), read_only=True, discard=False, structured=False)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        ends = []
        thread = threading.Thread(target=lambda: ends.append(connection.serve(theirs.fileno())))
        thread.start()
        for _ in range(2):
            time.sleep(0.05)  # it finds nothing to receive
            ours.sendall(request)
            answer = b""
            while len(answer) < 16 + 3000:
                answer += ours.recv(4096)
            assert answer[16:] == disk.pread(3000, 5)
        ours.shutdown(socket.SHUT_WR)
        thread.join(20)
        assert ends == ["gone"]
