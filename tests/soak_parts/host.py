"""The soak's server: a disk and an NBD server in a process of its own, told by lines of JSON on stdin what to do.

{"do": "take", "name": ..., "options": {...}}, {"do": "drop", "name": ...}, {"do": "state", "name": ...}; end of file
ends it. Each is answered by one line."""

import contextlib
import json
import os
import signal
import sys

import cbwcore
from cbwcore.nbd import NbdServer


class Host:
    def __init__(self, disk, server, folder):
        self.disk = disk
        self.server = server
        self.folder = folder
        self.snapshots = {}

    def take(self, name, options):
        snapshot = self.disk.snapshot(f"{self.folder}/target-{name}", name=name, **options)
        self.snapshots[name] = snapshot
        self.server.add_export(name, snapshot)
        return self.state(name)

    def state(self, name):
        snapshot = self.snapshots[name]
        stats = snapshot.stats()
        return {
            "state": str(snapshot.state),
            "errno": snapshot.error and snapshot.error.errno,
            "copies": stats.cbw_copies,
            "bytes": stats.target_bytes,
            "longest_wait": stats.longest_wait,
        }

    def drop(self, name):
        answer = self.state(name)
        snapshot = self.snapshots.pop(name)
        self.server.remove_export(name)
        target = snapshot.target
        snapshot.close()
        os.unlink(target)
        return answer


def main():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    path, socket, folder, io = sys.argv[1:]
    with cbwcore.Disk(path, io=io) as disk, NbdServer(socket=socket) as server, contextlib.ExitStack() as undo:
        host = Host(disk, server, folder)
        server.add_export("disk", disk, writable=True)
        undo.callback(lambda: [host.drop(name) for name in list(host.snapshots)])
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = getattr(host, request.pop("do"))(**request)
            except (OSError, cbwcore.CbwError) as e:
                answer = {"error": f"{type(e).__name__}: {e}"}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
