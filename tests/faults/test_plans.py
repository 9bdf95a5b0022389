"""Fault plans as text: what a failing test prints can be read back, and does the same again."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from engine_support import CLUSTER, assert_refused, assert_t0, ranges

import cbwcore
from cbwcore._cbwcore import FaultPlan

RULES = [
    "pread error EIO",
    "pwrite error ENOSPC start=65536 end=131072 skip=3 times=2",
    "pwrite short 512 times=1",
    "flush delay 0.25 skip=1",
    "zero error EPERM",
    "discard stall end=4096",
    "seek error EINTR times=7",
]


def test_a_plan_is_what_its_text_says():
    plan = FaultPlan()
    plan.error("pread")
    plan.error("pwrite", errno.ENOSPC, start=65536, end=131072, skip=3, times=2)
    plan.short("pwrite", 512, times=1)
    plan.delay("flush", 0.25, skip=1)
    plan.error("zero", errno.EPERM)
    plan.stall("discard", end=4096)
    plan.error("seek", errno.EINTR, times=7)
    assert str(plan) == "; ".join(RULES)
    again = eval(repr(plan), {"FaultPlan": FaultPlan})
    assert repr(again) == repr(plan) == f"FaultPlan({'; '.join(RULES)!r})"


def test_what_was_released_is_remembered():
    plan = FaultPlan("pread error EIO times=1")
    plan.release()
    assert str(plan) == ""
    plan.short("pread", 1)
    plan.release()
    assert plan.history == ["pread error EIO times=1", "pread short 1"]


@pytest.mark.parametrize(
    "text",
    [
        "pread",
        "pread fail EIO",
        "read error EIO",
        "pread error EWHAT",
        "pread short",
        "pread short x",
        "pread error EIO nth=1",
        "pread error EIO times=x",
        "pread error EIO 5",
        "flush delay soon",
        "pread stall 5",
    ],
)
def test_what_is_no_rule_is_refused(text):
    with pytest.raises(cbwcore.ConfigError, match="no rule"):
        FaultPlan(f"pwrite error EIO; {text}")


def test_a_plan_that_was_read_back_does_the_same(rig):
    seen = []
    for text in (None, "again"):
        disk = rig.disk()
        snap = rig.snapshot(disk)
        if text is None:
            plan = FaultPlan()
            plan.error("pwrite", errno.EDQUOT, skip=3, times=1)  # after three parts of the first copy
            plan.short("pwrite", 8192, times=2)
            text = str(plan)
        else:
            plan = FaultPlan(seen[0][0])
        snap._inject(plan)
        disk.pwrite(b"n", 0)
        assert_refused(lambda d=disk: d.pwrite(b"n", CLUSTER), errno.EDQUOT, "target-write", CLUSTER, CLUSTER)
        disk.pwrite(b"n", CLUSTER)
        assert_t0(snap, disk.t0)
        seen.append((str(plan), ranges(plan, "pwrite")))
    assert seen[0] == seen[1]


FAILING = """
from engine_support import rig


def test_with_a_plan(plan):
    plan.error("pwrite", 28, skip=3)
    plan.release()
    plan.short("pread", 512)
    raise AssertionError


def test_with_a_rig(rig):
    plan = rig.plan(rig.disk())
    plan.error("pwrite", 28, skip=3)
    plan.release()
    plan.short("pread", 512)
    raise AssertionError


def test_that_passes(plan):
    plan.delay("flush", 0.25)
"""


def test_a_test_that_fails_prints_its_plan(tmp_path):
    (tmp_path / "test_failing.py").write_text(FAILING)
    tests = str(Path(__file__).parents[1])
    options = ["-q", "-p", "conftest", "-p", "no:cacheprovider", "--rootdir", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, tmp_path],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH"))))},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "2 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    printed = re.findall(r"to replay, release\(\) by release\(\): (.*)", done.stdout)
    expected = [FaultPlan("pwrite error ENOSPC skip=3"), FaultPlan("pread short 512")]
    assert printed == [repr(expected)] * 2, "of the two that failed, and of no other"
    assert repr(eval(printed[0], {"FaultPlan": FaultPlan})) == repr(expected)
