"""The oracle run in the test suite; oracle.py beside this says what it proves, and is a command for longer runs.

CBWCORE_SEED replays a run, CBWCORE_ORACLE_SECONDS makes all of them together that long (default 24)."""

from __future__ import annotations

import faulthandler
import importlib.util
import os
import random
import sys
from pathlib import Path

import pytest

SECONDS = float(os.environ.get("CBWCORE_ORACLE_SECONDS") or 24)

spec = importlib.util.spec_from_file_location("cbwcore_oracle", Path(__file__).with_name("oracle.py"))
oracle = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = oracle
spec.loader.exec_module(oracle)

RUNS = [(False, 512), (False, 487), (True, 512), (True, 487)]


@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.parametrize(("direct", "unit"), RUNS, ids=lambda v: {True: "direct", False: "buffered"}.get(v, v))
def test_every_byte_is_t0_or_fails_and_no_write_is_lost(
    direct: bool, unit: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL")  # breaks are logged, and there are many
    seed = int(os.environ.get("CBWCORE_SEED") or random.SystemRandom().randrange(2**32))
    print(f"replay with CBWCORE_SEED={seed}")
    faulthandler.dump_traceback_later(SECONDS + 240, file=sys.__stderr__)
    try:
        run = oracle.Oracle(seed, SECONDS / len(RUNS), direct=direct, unit=unit)
        run.run()
    finally:
        faulthandler.cancel_dump_traceback_later()
    print(run.replay())
    assert run.count["write"] > 0
    assert run.count["units proven"] > 0
