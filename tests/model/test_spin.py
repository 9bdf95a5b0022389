"""docs/model/cbw.pml under spin: no violation in any of its cases, and one as soon as an ordering is taken away."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[2] / "docs" / "model" / "cbw.pml"
POLICIES = {"break-guest-write": [], "break-snapshot": ["-DPOLICY_S"]}
G, S = POLICIES

CASES = [
    *((case, policy) for case in ("protocol", "readers", "patient", "discard", "close", "two") for policy in POLICIES),
    *((case, G) for case in ("job", "status", "arm", "group", "freeze", "freeze_armed")),
]

READ = "assertion violated (r==t0["  # a snapshot read, or block status, is not as at T0
COPY = "]==t0["  # R2: done is set where the disk does not hold T0 any more
USED = ("!(freed[", "!(gone[")  # after close

# number of the ordering, what is taken away, a case that shows it, what spin says
MUTATIONS = [
    (1, "R1: need cleared before the copy", "patient", G, COPY),
    (2, "R1: no wait for frozen reads", "patient", G, READ),
    (3, "R7: no second look at the state after a read", "patient", S, READ),
    (4, "R6: reads do not freeze", "patient", G, READ),
    (5, "R1: done set before the target is written", "patient", G, COPY),
    (6, "R2: the claim given up before done is set", "patient", G, COPY),
    (7, "R1: need cleared before the wait for frozen reads", "patient", G, READ),
    (8, "R1: frozen reads waited for before done is set", "patient", G, READ),
    (9, "R1: disk written before the wait for frozen reads", "patient", G, READ),
    (10, "R7: the state before the cause", "patient", S, "assertion violated caused["),
    (11, "R7: waiters not told of the break", "patient", S, "assertion violated (asleep["),
    (12, "a read that ends wakes nobody", "patient", G, "invalid end state"),
    (13, "R7: the write let go before the break", "patient", S, COPY),
    (14, "discard: need cleared before those under way have ended", "discard", G, COPY),
    (15, "discard: copies not waited for", "discard", G, COPY),
    (16, "discard: reads of the target not waited for", "discard", G, READ),
    (26, "discard: reads refused only at the end", "discard", G, READ),
    (17, "R10: no drain", "arm", G, COPY),
    (18, "R10: the gate read before the writer is counted", "arm", G, COPY),
    (19, "R10: no second look for snapshots after the copies", "arm", G, COPY),
    (20, "R10: the gates of a group shut one after the other", "group", G, COPY),
    (21, "R15: old data kept for a snapshot that is armed later", "arm", G, READ),
    (22, "R20: no second look at the maps", "status", G, READ),
    (23, "close: unlinked under writers in flight", "close", G, USED[0]),
    (24, "close: those inside not waited for", "close", G, USED[0]),
    (25, "close: the disk not drained", "close", G, USED[1]),
    (27, "freeze: bitmaps switched before the gate is shut", "freeze", G, "at_t0["),
    (28, "freeze: the successor stops before the bitmap records", "freeze", G, "b_bit["),
    (29, "R7: a write after the break still asks what is needed", "patient", S, "!(in)"),
]

# Those that nobody could tell, see docs/model/README.md; each in the cases that would show it.
SILENT = [(30, "R1: disk written before need is cleared", ("patient", "readers", "discard"), G)]


@pytest.fixture
def check(tmp_path):
    """Run spin exhaustively with these definitions; its report. 2 GB at most."""
    if not (shutil.which("spin") and shutil.which("gcc")):
        pytest.skip("spin or gcc is not installed")

    def run(*definitions, optimise="-O1"):
        for command in (
            ["spin", "-a", *definitions, MODEL],
            ["gcc", optimise, "-w", "-DSAFETY", "-DMEMLIM=2000", "-o", "pan", "pan.c"],
        ):
            subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        return subprocess.run(["./pan", "-m20000"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    return run


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("case", "policy"), CASES)
def test_the_protocol_has_no_violation_and_no_deadlock(check, case, policy):
    report = check(f"-DCASE_{case}", *POLICIES[policy])
    assert "errors: 0" in report
    assert "Search not completed" not in report
    assert "max search depth too small" not in report


@pytest.mark.parametrize(
    ("mutation", "case", "policy", "found"), [pytest.param(n, *rest, id=what) for n, what, *rest in MUTATIONS]
)
def test_spin_finds_what_comes_of_one_ordering_less(check, mutation, case, policy, found):
    report = check(f"-DCASE_{case}", f"-DMUT={mutation}", *POLICIES[policy], optimise="-O0")
    assert found in report
    assert "errors: 1" in report


@pytest.mark.parametrize(
    ("mutation", "case", "policy"),
    [pytest.param(n, case, policy, id=f"{what}: {case}") for n, what, cases, policy in SILENT for case in cases],
)
def test_nobody_can_tell_these_orderings(check, mutation, case, policy):
    report = check(f"-DCASE_{case}", f"-DMUT={mutation}", *POLICIES[policy])
    assert "errors: 0" in report
    assert "Search not completed" not in report


def test_every_ordering_that_the_model_can_do_without_is_tried():
    numbers = {int(number) for number in re.findall(r"MUT [!=]= (\d+)", MODEL.read_text())}
    assert numbers == {number for number, *_ in [*MUTATIONS, *SILENT]}
