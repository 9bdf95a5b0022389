"""The NBD server beside nbdkit serving a plain file and QEMU's storage daemon with the same snapshot; see nbd_peers.py.

In the table nbdkit is the floor, QEMU the peer; "≥ 2 × peer" is of operations a second.
"""

import contextlib
import shutil
import tempfile
from pathlib import Path

import pytest
from harness import QUICK, ROUNDS, Bound, Row, ratio, show_size, show_time, spread
from nbd_peers import IDLE, LOADS, PROGRAMS, cases, show_rate

NBD_ROUNDS = min(ROUNDS, 2 if QUICK else 5)
MOST_IDLE = 20 << 20
DEPTHS = {"1": "depth 1", "32": "depth 32", "4x16": "4 jobs × depth 16"}
MISSING = [program for program in PROGRAMS if shutil.which(program) is None]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def own_place(place):
    """The disks of all servers, gone before other benchmarks need the room."""
    with tempfile.TemporaryDirectory(dir=place) as name:
        yield Path(name)


@pytest.fixture
def measured(rounds, benchmark, own_place):
    """What each server of a load took in every round."""

    def run(name):
        with contextlib.ExitStack() as held:
            seconds = rounds(cases(LOADS[name], own_place, LOADS[name].servers, held), NBD_ROUNDS)
        benchmark.extra_info |= {"load": name, "seconds": seconds}
        return seconds

    return run


def at_least(seconds, other, limit):
    """The bound of our speed against the other's."""
    column = {"nbdkit": "floor", "qemu": "peer"}[other]
    return Bound(ratio(seconds[other], seconds["cbwcore"]), limit, f"≥ {limit} × {column}", at_least=True)


def row(case, seconds, show, bound):
    """Ours, nbdkit's and QEMU's."""

    def beside(other):
        if other not in seconds:
            return "–", "–"
        return spread(seconds[other], show), f"{ratio(seconds['cbwcore'], seconds[other]):.2f}"

    return Row(case, spread(seconds["cbwcore"], show), *beside("nbdkit"), *beside("qemu"), (bound,))


@pytest.mark.parametrize("shape", DEPTHS)
def test_writes_of_copied_clusters(measured, rows, shape):
    seconds = measured(f"copied-{shape}")
    case = f"NBD random 4 KiB writes, copied clusters, {DEPTHS[shape]}"
    ceiling = Row(f"{case}: nbdkit null, the most that fio can do", "–", spread(seconds["null"], show_rate))
    rows += [row(case, seconds, show_rate, at_least(seconds, "nbdkit", 1)), ceiling]


@pytest.mark.parametrize("shape", DEPTHS)
def test_first_writes(measured, rows, shape):
    seconds = measured(f"first-{shape}")
    bound = at_least(seconds, "qemu", 2)
    rows.append(row(f"NBD 4 KiB writes, the first of each cluster, {DEPTHS[shape]}", seconds, show_rate, bound))


@pytest.mark.parametrize("shape", DEPTHS)
def test_reads(measured, rows, shape):
    seconds = measured(f"read-{shape}")
    bound = at_least(seconds, "nbdkit", 1)
    rows.append(row(f"NBD random 4 KiB reads of the disk, {DEPTHS[shape]}", seconds, show_rate, bound))


@pytest.mark.parametrize("load", ["nbdcopy", "nbdcopy-copied"])
def test_nbdcopy(measured, rows, load):
    seconds = measured(load)
    state = "copied" if load.endswith("copied") else "uncopied"
    bound = Bound(ratio(seconds["cbwcore"], seconds["nbdkit"]), 1, "≤ 1 × floor")
    rows.append(row(f"nbdcopy of the snapshot to null, {state}", seconds, show_time, bound))


def test_idle_connections(measured, rows):
    memory = {kind: [one.memory for one in values] for kind, values in measured("idle").items()}
    bound = Bound(max(memory["cbwcore"]), MOST_IDLE, f"< {show_size(MOST_IDLE)}")
    ours, floor, peer = (spread(memory[kind], show_size) for kind in ("cbwcore", "nbdkit", "qemu"))
    rows.append(Row(f"NBD, memory of {IDLE} idle connections", ours, floor, peer=peer, bounds=(bound,)))
