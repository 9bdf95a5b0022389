"""fio's NBD engine as guests that verify what they wrote: many in flight, several jobs, flushes and trims between."""

import json

import pytest
from interop_support import MIB, ODD, assert_same, assert_status, mixed, nbd_status, pattern


@pytest.fixture(autouse=True)
def _fio(program):
    program("fio", "nbdcopy")


def fio(uri, name, *options):
    """The command line."""
    return [
        *("fio", f"--name={name}", "--ioengine=nbd", f"--uri={uri}", "--thread"),
        *("--output-format=json", "--group_reporting", "--randseed=11", "--allrandrepeat=1", *options),
    ]


def job_of(output):
    """fio's only (grouped) job; it must have had no error."""
    (job,) = json.loads(output[output.index("{") :])["jobs"]
    assert job["error"] == 0
    return job


VERIFY = ("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0")
FOUR_JOBS = ("--numjobs=4", "--size=6M", "--offset_increment=6M")

WORKLOADS = {
    "mixed-deep": ("--rw=randrw", "--bs=4k", "--iodepth=32", *FOUR_JOBS),
    "mixed-sizes": ("--rw=randrw", "--bsrange=512-256k", "--blockalign=512", "--iodepth=32", *FOUR_JOBS),
    "unaligned": ("--rw=randwrite", "--bs=3000", "--iodepth=16", "--size=24000000"),
    "sequential": ("--rw=write", "--bs=1M", "--iodepth=8", "--size=24M"),
    "with-flushes": ("--rw=randwrite", "--bs=8k", "--iodepth=32", "--fsync=16", *FOUR_JOBS),
    "one-at-a-time": ("--rw=randrw", "--bs=16k", "--iodepth=1", *FOUR_JOBS),
}


@pytest.mark.parametrize("workload", WORKLOADS)
def test_verified_guests(serve, image, run, place, workload):
    """What they write is there in the same run and for the next; the snapshot is T0."""
    t0 = mixed(24 * MIB + 1000)
    path = image(t0)
    server = serve(path)
    job = job_of(run(*fio(server.uri(), workload, *WORKLOADS[workload], *VERIFY)).stdout)
    assert job["write"]["total_ios"] > 20
    if "mixed" in workload:
        assert job["read"]["total_ios"] > 20
    run("nbdcopy", "--no-extents", server.uri(), place / "disk")
    with open(path, "rb") as f:
        now = f.read()
    assert now != t0
    assert_same(place / "disk", now)
    run("nbdcopy", server.uri("snapshot"), place / "snapshot")
    assert_same(place / "snapshot", t0)


def test_what_was_written_survives_the_server(serve, image, run, place):
    """Verified again by another fio, through another server."""
    path = image(pattern(ODD))
    workload = ("--rw=randwrite", "--bs=4k", "--iodepth=32", "--size=8M", *VERIFY)
    server = serve(path)
    run(*fio(server.uri(), "again", *workload, "--do_verify=0"))
    server.stop()
    again = serve(path, target=place / "second-target")
    job_of(run(*fio(again.uri(), "again", *workload, "--verify_only=1")).stdout)
    job_of(run(*fio(again.uri("snapshot"), "again", *workload, "--verify_only=1")).stdout)


def test_trims(serve, image, run, place):
    """Random trims and writes, then the maps: the disk's agrees with the disk, the snapshot's with T0."""
    t0 = mixed(16 * MIB)
    path = image(t0)
    server = serve(path)
    options = ("--rw=randtrimwrite", "--bs=16k", "--iodepth=16", "--size=16M")
    job = job_of(run(*fio(server.uri(), "trims", *options)).stdout)
    assert job["trim"]["total_ios"] > 100
    assert job["write"]["total_ios"] > 100
    run("nbdcopy", "--no-extents", server.uri(), place / "disk")
    now = (place / "disk").read_bytes()
    assert_same(path, now)
    assert_status(nbd_status(server.uri()), now)
    run("nbdcopy", server.uri("snapshot"), place / "snapshot")
    assert_same(place / "snapshot", t0)
    assert_status(nbd_status(server.uri("snapshot")), t0)


def test_reads_of_the_snapshot_beside_writes_of_the_disk(serve, image, run, background, place):
    """A random reader of the snapshot finds what an earlier fio wrote before T0, whatever the guest writes."""
    path = image(bytes(24 * MIB))
    before = ("--rw=randwrite", "--bs=8k", "--iodepth=32", "--size=24M", *VERIFY)
    first = serve(path)
    run(*fio(first.uri(), "before", *before, "--do_verify=0"))
    first.stop()
    server = serve(path, target=place / "second-target")
    guest = background.start(
        *fio(server.uri(), "guest", "--rw=randrw", "--bs=4k", "--iodepth=32", "--numjobs=4", "--size=6M"),
        *("--offset_increment=6M", "--randseed=5", "--rate_iops=700", *VERIFY),
    )
    while guest.poll() is None:
        job_of(run(*fio(server.uri("snapshot"), "before", *before, "--verify_only=1")).stdout)
    job_of(background.finish(guest))
    job_of(run(*fio(server.uri("snapshot"), "before", *before, "--verify_only=1")).stdout)
