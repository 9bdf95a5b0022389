"""`cbwcore serve` in a process of its own, and its clients."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

import pytest
from engine_support import CLUSTER, LIMIT
from nbd_support import Client

import cbwcore

SIZE = 16 * CLUSTER + 1000
MAIN = "import sys; from cbwcore.cli import main; sys.exit(main())"
WRITTEN = b"by NBD" * 100


class Serving:
    """`cbwcore serve` in a process of its own."""

    def __init__(self, *arguments, code=MAIN, stdout=subprocess.PIPE, **options):
        command = [sys.executable, "-c", code, "serve", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, **options)
        self.lines = []

    def line(self):
        """The next line on stdout."""
        data = b""
        end = time.monotonic() + LIMIT
        while not data.endswith(b"\n"):
            left = end - time.monotonic()
            assert left > 0 and select.select([self.process.stdout], [], [], left)[0], f"no line after {data!r}"  # noqa: PT018
            byte = os.read(self.process.stdout.fileno(), 1)
            assert byte, f"it ended: {self.process.communicate()[1]!r}"
            data += byte
        self.lines.append(data.decode().rstrip("\n"))
        return self.lines[-1]

    def ready(self):
        """Wait until clients can come."""
        while not self.line().startswith("ready"):
            pass
        return self

    def end(self, number=signal.SIGTERM):
        """Its exit code, what else it said on stdout, and stderr, after a signal, if any."""
        if number is not None:
            self.process.send_signal(number)
        try:
            out, err = self.process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            pytest.fail(f"it does not end; stderr: {err!r}")
        return self.process.returncode, (out or b"").decode(), err.decode()

    def close(self):
        self.process.kill()  # does nothing where it has ended
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


@contextlib.contextmanager
def connected(where, name="disk"):
    """A client that is served."""
    with Client(where) as client:
        assert client.hello().go(name).error == 0
        yield client


def one_line(err):
    """The one line on stderr."""
    assert err.startswith("cbwcore")
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert "Traceback" not in err
    return err.rstrip("\n")


def is_free(image):
    """Whether nobody has the disk locked."""
    try:
        cbwcore.Disk(image).close()
    except cbwcore.ConfigError:
        return False
    return True
