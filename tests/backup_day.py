"""A process that has a disk for a day: its guests write, a backup is made of it meanwhile, and it may end badly.

``python backup_day.py PLAN``, PLAN a JSON object: disk, image, t0, seed, kind and the options of `Disk.backup`. It
writes the disk of T0 to the file ``t0`` before the job begins to copy, and prints how the day ended."""

import json
import os
import random
import signal
import sys
import threading

import cbwcore
from cbwcore import CbwError

UNIT = 65536


class Guests:
    """Two threads that write at random; who holds ``lock`` keeps the disk still."""

    def __init__(self, disk, seed):
        self.lock = threading.Lock()
        self.writes = 0
        self._disk, self._end = disk, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(seed + i,), daemon=True) for i in range(2)]
        for thread in self._threads:
            thread.start()

    def _run(self, seed):
        rng = random.Random(seed)
        while not self._end.is_set():
            with self.lock:
                write(self._disk, rng)
                self.writes += 1
            self._end.wait(0.0005)

    def stop(self):
        self._end.set()
        for thread in self._threads:
            thread.join()


def write(disk, rng):
    """Something, somewhere, most of it in a few places."""
    center = rng.choice([0, disk.size // 3, disk.size - 1, rng.randrange(disk.size)])
    offset = max(0, min(disk.size - 1, center + rng.randrange(-2 * UNIT, 2 * UNIT)))
    length = min(rng.choice([1, 512, 4096, 70_000]), disk.size - offset)
    what = rng.randrange(6)
    if what == 0:
        disk.pwrite_zeroes(offset, length)
    elif what == 1:
        disk.discard(offset, length)
    else:
        disk.pwrite(rng.randbytes(length), offset)


def spend_day(plan):
    """How it ended: "success", or the error's class."""
    rng = random.Random(plan["seed"])
    with cbwcore.Disk(plan["disk"]) as disk:
        for _ in range(20):
            write(disk, rng)
        guests = Guests(disk, plan["seed"])
        try:
            with guests.lock:
                with open(plan["t0"], "wb") as f:
                    f.write(disk.pread(disk.size, 0))
                if plan["kind"] == "kill":
                    threading.Timer(plan["after"], os.kill, (os.getpid(), signal.SIGKILL)).start()
                job = disk.backup(plan["image"], bitmap="daily", **plan["options"])
            if plan["kind"] == "cancel":
                job.cancel()
            elif plan["kind"] == "break":
                while job.snapshot.state == "armed":
                    threading.Event().wait(0.001)
                job.speed = 0
            result = job.wait(60)
            return result.sync
        except (OSError, CbwError) as e:
            return type(e).__name__
        finally:
            guests.stop()


if __name__ == "__main__":
    print(spend_day(json.loads(sys.argv[1])))
