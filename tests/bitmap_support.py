"""What the tests of persistent bitmaps share: processes that die at a given point, and the bytes of the file."""

import json
import os
import signal
import struct
import traceback

import google_crc32c

import cbwcore
from cbwcore import bitmap_file
from cbwcore.options import SnapshotOptions
from cbwcore.snapshot import Wanted, take_snapshots

UNIT = 65536
SIZE = 100 * UNIT + 1000
SLOT = 512 << 10
HEADER = struct.Struct("<8sIIQI4x")


def die():
    """As by kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed(action):
    """Run ``action`` in a child process that is killed at its end, or by `die` before."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            die()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(3)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), f"the child failed: {status}"
    assert os.WTERMSIG(status) == signal.SIGKILL


def die_at(number):
    """In a child: let the step of that number, from 0, be the last one; None: no step is."""
    left = [number]

    def step(what):
        if left[0] is not None:
            if left[0] == 0:
                die()
            left[0] -= 1

    bitmap_file.step = step


def freeze(disk, name):
    """A job's beginning: (snapshot, freeze)."""
    taken = take_snapshots([Wanted(disk, SnapshotOptions(), freeze=disk.bitmaps[name])])[0]
    return taken.snapshot, taken.freeze


def sidecar(path):
    return f"{path}.cbw-bitmaps"


def granules(bitmap):
    """The numbers of those that are marked."""
    unit = bitmap.granularity
    return {i for start, length in bitmap.ranges() for i in range(start // unit, -(-(start + length) // unit))}


def directories(path):
    """Both copies, as anybody can read them."""
    found = []
    with open(sidecar(path), "rb") as f:
        data = f.read(2 * SLOT)
    for at in (0, SLOT):
        magic, version, length, generation, crc = HEADER.unpack_from(data, at)
        text = data[at + HEADER.size : at + HEADER.size + length]
        assert (magic, version) == (b"CBWBITS\n", 1)
        assert crc == google_crc32c.value(data[at : at + 24] + text)
        found.append((generation, json.loads(text)))
    return found


def content(path):
    with open(path, "rb") as f:
        return f.read()


def entries(path):
    return {entry["name"]: entry for entry in directories(path)[0][1]["bitmaps"]}


def poke(path, offset, data):
    with open(path, "r+b") as f:
        f.seek(offset)
        f.write(data)


def flip(path, offset):
    with open(path, "r+b") as f:
        f.seek(offset)
        byte = f.read(1)
        f.seek(offset)
        f.write(bytes([byte[0] ^ 0x55]))


def assert_all_there(path):
    with cbwcore.Disk(path) as disk:
        assert disk.bitmaps.problem is None
        daily, odd = disk.bitmaps["daily"], disk.bitmaps["ödd"]
        assert (granules(daily), daily.since, daily.enabled, daily.granularity) == ({2, 3}, "monday", True, UNIT)
        assert (granules(odd), odd.since, odd.enabled, odd.granularity) == ({SIZE // 4096}, None, False, 4096)
        assert all(b.persistent and b.inconsistent is None and not b.frozen for b in (daily, odd))
