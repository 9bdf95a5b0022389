"""A process that serves a disk to its guest over NBD and, when told to, backs it up meanwhile.

``python -m cbwcore.bench.backup_host DISK FLEECE SOCKET``: says "ready"; for each line of its standard input, the path
of an image, it makes a backup there and prints the seconds that it took, in all."""

from __future__ import annotations

import sys
import time

from cbwcore.disk import Disk
from cbwcore.nbd import NbdServer


def host(path: str, fleece: str, socket: str) -> None:
    """Until its standard input ends."""
    with Disk(path) as disk, NbdServer(socket=socket) as server:
        server.add_export("disk", disk, writable=True)
        print("ready", flush=True)
        for line in sys.stdin:
            began = time.perf_counter()
            disk.backup(line.rstrip("\n"), fleece=fleece).wait()
            print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    host(*sys.argv[1:])
