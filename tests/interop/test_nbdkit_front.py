"""nbdkit's nbd plugin as a client of ours, with other clients in front of it and its filters between."""

import shlex
import time

import pytest
from interop_support import (
    COMMAND,
    LIMIT,
    MIB,
    ODD,
    assert_same,
    assert_status,
    joined,
    mixed,
    nbd_status,
    pattern,
    status_runs,
    uri_of,
)
from programs_support import run_json


@pytest.fixture(autouse=True)
def _nbdkit(program):
    program("nbdkit", "nbdcopy", "nbdinfo")


@pytest.fixture
def front(background, place):
    """``front(uri, *options)``: nbdkit with its nbd plugin on ``uri``; the socket on which it answers."""
    sockets = []

    def front(uri, *options, plugin=()):
        socket = place / f"front{len(sockets)}"
        sockets.append(socket)
        process = background.start("nbdkit", "-f", "-U", socket, *options, "nbd", f"uri={uri}", *plugin)
        end = time.monotonic() + LIMIT
        while not socket.is_socket():
            assert process.poll() is None, process.log.read_text()
            assert time.monotonic() < end
            time.sleep(0.005)
        return socket

    return front


def nbdkit_run(run, uri, command, *options, parameters=(), status=0):
    """``nbdkit nbd uri=... --run command``; $uri is nbdkit's."""
    return run("nbdkit", "-U", "-", *options, "nbd", f"uri={uri}", *parameters, "--run", command, status=status)


@pytest.mark.parametrize("shared", ["false", "true"])
def test_copy_through(serve, image, run, front, place, shared):
    """In and out, with a connection of ours per client of nbdkit's, and with one for all."""
    t0, new = mixed(ODD, seed=1), mixed(ODD, seed=2)
    path = image(t0)
    server = serve(path)
    disk = uri_of(front(server.uri(), plugin=(f"shared={shared}",)), "")
    snapshot = uri_of(front(server.uri("snapshot"), "-r", plugin=(f"shared={shared}",)), "")
    run("nbdcopy", "--connections=4", disk, place / "before")
    assert_same(place / "before", t0)
    run("nbdcopy", "--connections=4", "--flush", image(new, "new.img"), disk)
    assert_same(path, new)
    run("nbdcopy", "--connections=4", snapshot, place / "after")
    assert_same(place / "after", t0)


def test_facts_pass_through(serve, image, front):
    """What nbdkit offers in front is what ours offers: names, sizes, flags, the map."""
    content = mixed(ODD)
    server = serve(image(content))
    socket = front(server.uri(""), plugin=("dynamic-export=true",))
    for name in ("disk", "snapshot"):
        (ours,) = run_json("nbdinfo", "--json", server.uri(name))["exports"]
        (theirs,) = run_json("nbdinfo", "--json", uri_of(socket, name))["exports"]
        for fact in (
            "export-size",
            "is_read_only",
            "is_rotational",
            "can_cache",
            "can_trim",
            "can_zero",
            "can_multi_conn",
        ):
            assert theirs[fact] == ours[fact], fact
        assert joined(nbd_status(uri_of(socket, name))) == status_runs(content)
    listed = run_json("nbdinfo", "--json", "--list", uri_of(socket, ""))["exports"]
    assert [e["export-name"] for e in listed] == ["disk", "snapshot"]


def test_checkwrite_finds_no_difference(serve, image, run, place):
    """nbdkit's checkwrite filter compares what is written to it, and zeroed, with the snapshot: T0 is its judge."""
    t0 = mixed(ODD)
    original = image(t0, "t0.img")
    server = serve(image(t0))
    run("nbdcopy", image(pattern(ODD), "new.img"), server.uri())
    copy = f'nbdcopy {shlex.quote(original)} "$uri"'
    nbdkit_run(run, server.uri("snapshot"), copy, "--filter=checkwrite")
    nbdkit_run(run, server.uri("disk"), copy, "--filter=checkwrite", status=1)


def test_copy_on_write_over_the_snapshot(serve, image, run, place):
    """A sandbox: nbdkit's cow filter takes the writes, ours serves T0 below it."""
    t0, new = mixed(ODD, seed=3), mixed(ODD, seed=4)
    path = image(t0)
    server = serve(path)
    run("nbdcopy", image(pattern(ODD), "other.img"), server.uri())
    out = place / "out"
    copies = f'nbdcopy {shlex.quote(image(new, "new.img"))} "$uri" && nbdcopy "$uri" {shlex.quote(str(out))}'
    nbdkit_run(run, server.uri("snapshot"), copies, "--filter=cow")
    assert_same(out, new)
    run("nbdcopy", server.uri("snapshot"), out)
    assert_same(out, t0)


def test_nbdkit_starts_the_server(run, image, place):
    """nbdkit runs `cbwcore serve` itself, and hands it a listening socket as systemd does."""
    t0, new = mixed(ODD, seed=8), mixed(ODD, seed=9)
    path = image(t0)
    new_in, disk_out, snapshot_out = image(new, "new.img"), place / "disk.out", place / "snapshot.out"
    first, *arguments = [*COMMAND, path]
    ours = [f"command={first}", *(f"arg={argument}" for argument in arguments), "shared=true"]
    copies = f'nbdcopy --flush {shlex.quote(new_in)} "$uri" && nbdcopy "$uri" {shlex.quote(str(disk_out))}'
    run("nbdkit", "-U", "-", "nbd", *ours, "export=disk", "--run", copies)
    assert_same(disk_out, new)
    assert_same(path, new)
    copy = f'nbdcopy "$uri" {shlex.quote(str(snapshot_out))}'
    run("nbdkit", "-U", "-", "nbd", *ours, "export=snapshot", "--run", copy)
    assert_same(snapshot_out, new)  # of a second server, after the writes


def test_over_tls(serve, image, run, place, certificates):
    """nbdkit has the certificates; what is in front of it needs none."""
    t0 = mixed(ODD, seed=10)
    server = serve(image(t0), "--tls-dir", certificates)
    out = place / "out"
    options = ["nbd", f"socket={server.socket}", "export=snapshot", "tls=require", f"tls-certificates={certificates}"]
    run("nbdkit", "-U", "-", *options, "--run", f'nbdcopy "$uri" {shlex.quote(str(out))}')
    assert_same(out, t0)


READING = {"readahead": (), "cache": (), "blocksize": ("maxdata=8k", "maxlen=64k"), "cacheextents": (), "noextents": ()}
WRITING = {
    "cache": ("cache=writethrough",),
    "blocksize": ("maxdata=8k", "maxlen=64k"),
    "nozero": ("zeromode=emulate",),
    "fua": ("fuamode=force",),
    "multi-conn": ("multi-conn-mode=plugin",),
}


def test_filters_in_front_of_the_snapshot(serve, image, run, place):
    """What other programs put between: they read ahead, cut requests, ask for no extents."""
    t0 = mixed(ODD, seed=5)
    server = serve(image(t0))
    run("nbdcopy", image(pattern(ODD), "new.img"), server.uri())
    for name, parameters in READING.items():
        out = place / name
        copy = f'nbdcopy "$uri" {shlex.quote(str(out))}'
        nbdkit_run(run, server.uri("snapshot"), copy, f"--filter={name}", parameters=parameters)
        assert_same(out, t0)


@pytest.mark.parametrize("name", WRITING)
def test_filters_in_front_of_the_disk(serve, image, run, place, name):
    """Requests cut to pieces, zeroes written as data, FUA on every write."""
    t0, new = mixed(ODD, seed=5), mixed(ODD, seed=6)
    path = image(t0)
    server = serve(path)
    new_in, new_out = image(new, "new.img"), place / "new.out"
    copies = f'nbdcopy --flush {shlex.quote(new_in)} "$uri" && nbdcopy "$uri" {shlex.quote(str(new_out))}'
    nbdkit_run(run, server.uri(), copies, f"--filter={name}", parameters=WRITING[name])
    assert_same(new_out, new)
    assert_same(path, new)
    run("nbdcopy", server.uri("snapshot"), place / "t0.out")
    assert_same(place / "t0.out", t0)


def test_guests_behind_nbdkit(serve, image, run, program, front, background, place):
    """A verified fio through nbdkit, while the snapshot is pulled directly and through nbdkit."""
    program("fio")
    t0 = mixed(24 * MIB, seed=7)
    server = serve(image(t0))
    uri = uri_of(front(server.uri()), "")
    snapshot = uri_of(front(server.uri("snapshot")), "")
    fio = background.start(
        *(
            "fio",
            "--name=guest",
            "--ioengine=nbd",
            f"--uri={uri}",
            "--thread",
            "--rw=randrw",
            "--bs=8k",
            "--iodepth=16",
        ),
        *(
            "--numjobs=2",
            "--size=12M",
            "--offset_increment=12M",
            "--verify=crc32c",
            "--verify_state_save=0",
            "--rate_iops=800",
        ),
    )
    pulls = 0
    while fio.poll() is None or pulls < 2:
        for source in (server.uri("snapshot"), snapshot):
            run("nbdcopy", "--connections=2", source, place / "pulled")
            assert_same(place / "pulled", t0)
        pulls += 1
    background.finish(fio)
    assert_status(nbd_status(snapshot), t0)
