"""What the tests of persistent bitmaps share: processes that die at a given point, and another boot."""

import os
import signal
import traceback

from cbwcore import bitmap_file
from cbwcore.options import SnapshotOptions
from cbwcore.snapshot import Wanted, take_snapshots

UNIT = 65536


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
