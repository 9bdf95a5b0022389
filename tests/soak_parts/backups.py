"""The soak's backups: a disk with a persistent bitmap, guests that write, and chains of backups that must restore to
their T0, also after this process was killed. It prints a line for each thing done; end of file on stdin ends it.

At each start it takes over the disk, its bitmap and the chain that it finds: `state.json` names the backups that were
acknowledged; the copy of the disk at the T0 of the last of them, or of one that was begun, is `t0`."""

import contextlib
import filecmp
import json
import os
import random
import select
import shutil
import signal
import sys
import threading
from pathlib import Path

import cbwcore

CLUSTER = 65536
SIZE = 24 * 1024 * 1024 + 1000
LONGEST = 5  # backups in a chain


class Guests:
    """Threads that write at random; they can be held for a moment."""

    def __init__(self, disk, seed):
        self._disk = disk
        self._held = threading.Lock()
        self._stop = threading.Event()
        self.failed = None
        self._threads = [threading.Thread(target=self._write, args=(seed + i,)) for i in range(2)]
        for thread in self._threads:
            thread.start()

    def _write(self, seed):
        rng = random.Random(seed)
        try:
            while not self._stop.wait(rng.random() * 0.02):
                offset = rng.randrange(SIZE - 1)
                length = min(rng.choice([1, 512, 4096, 70000, 300000]), SIZE - offset)
                what = rng.randrange(10)
                with self._held:
                    if what == 0:
                        self._disk.pwrite_zeroes(offset, length)
                    elif what == 1:
                        self._disk.discard(offset, length)
                    else:
                        self._disk.pwrite(rng.randbytes(length), offset)
        except BaseException as e:
            self.failed = e

    def hold(self):
        return self._held

    def end(self):
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self.failed is not None:
            raise self.failed


class Chain:
    """The backups so far, in a file that is replaced when one is acknowledged."""

    def __init__(self, folder):
        self.folder = folder
        self.names = []
        with contextlib.suppress(FileNotFoundError):
            self.names = json.loads((folder / "state.json").read_text())

    def add(self, name):
        self.names.append(name)
        new = self.folder / "state.json.new"
        new.write_text(json.dumps(self.names))
        os.replace(new, self.folder / "state.json")

    def take_over(self, since):
        """What was made, and not noted, when the process was killed. The one that the bitmap records since succeeded:
        it must be whole, with the last T0. The others go."""
        for path in self.folder.glob("backup-*.qcow2"):
            if path.name not in self.names and self.is_whole(path, since):
                cbwcore.restore(path, self.folder / "restored", overwrite=True, verify=True)
                compare(self.folder / "restored", self.folder / "t0")
                self.add(path.name)
                say("taken over")
        for path in self.folder.glob("backup-*"):
            if path.name.removesuffix(".cbw.json") not in self.names:
                path.unlink()

    @staticmethod
    def is_whole(path, backup):
        """Whether there is that backup."""
        try:
            return cbwcore.verify_backup(path).chain[0].id == backup
        except cbwcore.StateError:
            return False

    def clear(self):
        """A new chain begins when its full backup is acknowledged; the old one is not needed any more."""
        for name in self.names:
            for path in (self.folder / name, self.folder / f"{name}.cbw.json"):
                path.unlink(missing_ok=True)
        self.names = []


def say(what, **facts):
    print(json.dumps({"did": what, **facts}), flush=True)


def backup(disk, guests, chain, rng):
    """One backup; it must restore to the disk's content at T0."""
    folder = chain.folder
    name = f"backup-{rng.getrandbits(48):012x}.qcow2"
    layered = 0 < len(chain.names) < LONGEST
    options = {"sync": "incremental", "backing": folder / chain.names[-1], "fallback": "full"} if layered else {}
    options["compress"] = rng.choice([None, "zstd"])
    with guests.hold():
        job = disk.backup(folder / name, bitmap="b", format="qcow2", **options)
        shutil.copyfile(disk.path, folder / "t0")
    result = job.wait(120)
    if result.bitmap_error is not None:
        raise AssertionError(result.bitmap_error)
    if result.sync == "full":
        chain.clear()
    chain.add(name)
    say(str(result.sync), reason=result.reason)
    if rng.random() < 0.5:
        cbwcore.restore(folder / name, folder / "restored", overwrite=True, verify=True)
        compare(folder / "restored", folder / "t0")
        say("restored")


def compare(found, wanted):
    """In pieces: the soak watches this process's memory. What filecmp has kept goes by size and time alone."""
    filecmp.clear_cache()
    if not filecmp.cmp(found, wanted, shallow=False):
        raise AssertionError(f"{found} differs from {wanted}")


def main():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    rng = random.Random(seed)
    path = folder / "disk"
    if not path.exists():
        path.write_bytes(b"")
        os.truncate(path, SIZE)
    chain = Chain(folder)
    while True:
        with cbwcore.Disk(path) as disk:
            if disk.bitmaps.problem is not None:
                raise AssertionError(disk.bitmaps.problem)
            if "b" not in disk.bitmaps:
                disk.bitmaps.add("b", persistent=True)
            if disk.bitmaps["b"].inconsistent is not None:
                raise AssertionError(disk.bitmaps["b"].inconsistent)
            chain.take_over(disk.bitmaps["b"].since)
            guests = Guests(disk, rng.random())
            try:
                for _ in range(rng.randrange(1, 6)):
                    backup(disk, guests, chain, rng)
                    if select.select([0], [], [], rng.random())[0]:
                        return
            finally:
                guests.end()
        say("closed")


if __name__ == "__main__":
    main()
