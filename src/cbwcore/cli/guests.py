"""The demo's guest: threads that use a disk at random, each seeded and in its own slice of the disk."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from cbwcore.disk import Disk

__all__ = ["GUESTS", "Guest", "guests_at_work"]

GUESTS = 4
PAUSE = 0.001  # the longest pause between two requests, seconds
LENGTHS = (512, 4096, 4096, 16384, 65536, 262144)
NOISE = 1 << 20


class Guest:
    """One thread's requests. It knows what its last change left, and reads it back now and then."""

    def __init__(self, disk: Disk, number: int, seed: int) -> None:
        self.disk = disk
        self.start = disk.size * number // GUESTS
        self.end = disk.size * (number + 1) // GUESTS
        self.rng = random.Random(f"{seed}/{number}")
        self.noise = self.rng.randbytes(NOISE)
        self.last: tuple[int, bytes] | None = None
        self.requests = 0
        self.wrong_reads = 0
        self.longest = 0.0

    def run(self, stop: threading.Event) -> None:
        """Use the disk until ``stop``, and once at least. OSError: what the disk answered."""
        actions = (self.write, self.read, self.zero, self.discard)
        while True:
            offset, length = self.pick_range()
            began = time.monotonic()
            self.rng.choices(actions, (70, 15, 10, 5))[0](offset, length)
            self.longest = max(self.longest, time.monotonic() - began)
            self.requests += 1
            if stop.wait(self.rng.uniform(0, PAUSE)):
                return

    def pick_range(self) -> tuple[int, int]:
        """Mixed sizes; three in four are aligned to 512 bytes, the others to nothing."""
        length = min(self.rng.choice(LENGTHS), (self.end - self.start) // 4)
        if self.rng.random() < 0.25:
            length = self.rng.randint(1, length)
            return self.rng.randint(self.start, self.end - length), length
        offset = self.rng.randint(self.start, self.end - length)
        return max(self.start, offset - offset % 512), length

    def write(self, offset: int, length: int) -> None:
        """Overwrite with noise."""
        at = self.rng.randrange(NOISE - length)
        data = self.noise[at : at + length]
        self.disk.pwrite(data, offset)
        self.last = offset, data

    def zero(self, offset: int, length: int) -> None:
        """Write zeroes."""
        self.disk.pwrite_zeroes(offset, length)
        self.last = offset, bytes(length)

    def discard(self, offset: int, length: int) -> None:
        """Discard; what is read afterwards is the storage's choice."""
        self.disk.discard(offset, length)
        self.last = None

    def read(self, offset: int, length: int) -> None:
        """Read back the last change, or anything at all."""
        if self.last is None:
            self.disk.pread(length, offset)
            return
        offset, data = self.last
        self.wrong_reads += self.disk.pread(len(data), offset) != data


@contextlib.contextmanager
def guests_at_work(disk: Disk, seed: int) -> Iterator[list[Guest]]:
    """The guests, running for as long as the block does; afterwards, the first error that one of them got."""
    guests = [Guest(disk, number, seed) for number in range(GUESTS)]
    stop = threading.Event()
    with ThreadPoolExecutor(GUESTS, "guest") as pool:
        try:
            running = [pool.submit(guest.run, stop) for guest in guests]
            yield guests
        finally:
            stop.set()
        for future in running:
            future.result()
