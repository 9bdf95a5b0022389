"""Running programs that nobody here wrote."""

import json
import shutil
import subprocess

import pytest


def need(*names):
    """Skip the test where one of these programs is missing (CI makes a failure of it)."""
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        pytest.skip(f"there is no {', '.join(missing)}")


def run(*command, status=0, timeout=60, stdin=None, text=True, cwd=None):
    """Run a program to its end: it must exit with ``status`` (None: any) in time; what it was, with its output."""
    command = [str(c) for c in command]
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=text, timeout=timeout, cwd=cwd)
    except subprocess.TimeoutExpired as e:
        pytest.fail(f"hangs for {timeout} s: {command}\n{e.stdout!r}\n{e.stderr!r}")
    assert status is None or done.returncode == status, (
        f"exit {done.returncode}: {command}\n{done.stdout}\n{done.stderr}"
    )
    return done


def run_json(*command, **options):
    """What a program prints as JSON."""
    return json.loads(run(*command, **options).stdout)
