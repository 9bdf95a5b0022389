import itertools
import os
from pathlib import Path

import interop_support
import programs_support
import pytest

import cbwcore
from cbwcore.nbd import NbdServer

NO_TARGET = object()
ENGINE = os.environ.get("CBWCORE_TEST_IO")  # as in tests/conftest.py


@pytest.fixture
def program():
    """``program(*names)`` skips where one of them is missing."""
    return programs_support.need


@pytest.fixture
def run():
    """``run(*command, status=0, timeout=60, stdin=None)``: a program that must end in time with that exit status."""
    return programs_support.run


@pytest.fixture
def background(place):
    """``background.start(*command)`` and ``background.finish(process)``; none of them outlives the test."""
    programs = interop_support.Background(place)
    yield programs
    programs.close()


@pytest.fixture
def serve(place):
    """``serve(image, *options)``: `cbwcore serve` of that disk and its snapshot in its own process, once it is ready.

    It gets ``--target`` (default: beside the image; None: not given) and ``--socket``. At the end of the test SIGTERM
    must end it with 0 and an empty stderr; a test that expects other things calls ``stop(status=..., stderr=...)``."""
    servers = []
    count = itertools.count()

    def serve(image, *options, target=NO_TARGET, socket=None):
        target = f"{image}.fleece" if target is NO_TARGET else target
        socket = socket or place / f"s{next(count)}"
        command = [*interop_support.COMMAND, image, "--socket", socket]
        command += [] if target is None else ["--target", target]
        command += [] if ENGINE is None else ["--io", ENGINE]
        server = interop_support.Server([*command, *options], socket, place)
        servers.append(server)
        server.wait_ready()
        return server

    try:
        yield serve
        for server in servers:
            server.stop()
            assert not os.path.lexists(server.socket)
    finally:
        for server in servers:
            server.kill()


class InProcess:
    """An `cbwcore.nbd.NbdServer` of this process and its disk."""

    def __init__(self, path, socket, options):
        self.disk = cbwcore.Disk(path)
        self.socket = str(socket)
        self.server = NbdServer(socket=socket, **options)

    def uri(self, name="disk"):
        return interop_support.uri_of(self.socket, name)

    def close(self):
        try:
            self.server.close()
        finally:
            self.disk.close()


@pytest.fixture
def host(place):
    """``host(image, **options)``: an open `Disk` (``.disk``) and an `NbdServer` without exports (``.server``)."""
    hosts = []

    def host(image, **options):
        hosts.append(InProcess(image, place / f"h{len(hosts)}", options))
        return hosts[-1]

    try:
        yield host
    finally:
        for one in reversed(hosts):
            one.close()


@pytest.fixture
def image(place):
    """``image(content, name="disk.img")``: a disk image with those bytes, pages of zeroes as holes; its path."""

    def image(content, name="disk.img"):
        return interop_support.write_sparse(Path(place) / name, content)

    return image
