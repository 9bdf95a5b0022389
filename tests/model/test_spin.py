"""docs/model/cbw.pml under spin: no violation as it stands, and one as soon as an ordering is taken away."""

import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[2] / "docs" / "model" / "cbw.pml"
POLICIES = {"break-guest-write": [], "break-snapshot": ["-DPOLICY_S"]}


@pytest.fixture
def check(tmp_path):
    """Run spin exhaustively with these definitions; its report."""
    if not (shutil.which("spin") and shutil.which("gcc")):
        pytest.skip("spin or gcc is not installed")

    def run(*definitions):
        for command in (["spin", "-a", *definitions, MODEL], ["gcc", "-O2", "-w", "-DSAFETY", "-o", "pan", "pan.c"]):
            subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        return subprocess.run(["./pan", "-m200000"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    return run


@pytest.mark.parametrize("policy", POLICIES)
def test_the_protocol_has_no_violation_and_no_deadlock(check, policy):
    report = check(*POLICIES[policy])
    assert "errors: 0" in report
    assert "Search not completed" not in report


@pytest.mark.parametrize(
    ("mutation", "policy"),
    [
        pytest.param(1, "break-guest-write", id="need cleared before the copy"),
        pytest.param(2, "break-guest-write", id="no wait for frozen reads"),
        pytest.param(3, "break-snapshot", id="no second look at the state after a read"),
        pytest.param(4, "break-guest-write", id="reads do not freeze"),
    ],
)
def test_spin_finds_a_read_of_newer_data_without_one_ordering(check, mutation, policy):
    report = check(f"-DMUT={mutation}", *POLICIES[policy])
    assert "assertion violated (r==0)" in report
