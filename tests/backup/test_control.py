"""What holds a job's workers up."""

import threading
import time

import pytest
from engine_support import until

from cbwcore.backup.control import Control, StopWorking


def in_thread(call):
    done = []

    def run():
        try:
            done.append(call())
        except StopWorking as e:
            done.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, done


def test_no_limit():
    control = Control(0)
    for _ in range(1000):
        control.enter(1 << 40)
        assert control.leave() is False


def test_the_first_span_is_free_and_the_next_waits_for_it():
    control = Control(1000)
    began = time.monotonic()
    for _ in range(3):
        control.enter(100)
        control.leave()
    assert time.monotonic() - began >= 0.2
    assert control.speed == 1000


@pytest.mark.parametrize("speed", [0, 1 << 40])
def test_a_new_speed_holds_for_who_waits(speed):
    control = Control(1)
    control.enter(1 << 40)
    thread, done = in_thread(lambda: control.enter(1))
    assert done == []
    control.speed = speed
    thread.join(20)
    assert done == [None]


def test_a_pause_lets_those_inside_finish():
    control = Control(0)
    control.enter(1)
    control.enter(1)
    control.pause()
    assert not control.paused
    thread, done = in_thread(lambda: control.enter(1))
    assert control.leave() is False
    assert control.leave() is True
    assert control.paused
    assert done == []
    assert control.resume() is True
    assert control.resume() is False
    thread.join(20)
    assert done == [None]


@pytest.mark.parametrize("wait", ["pause", "speed", "sleep"])
def test_stop_ends_every_wait(wait):
    control = Control(1 if wait == "speed" else 0)
    if wait == "pause":
        control.pause()
    elif wait == "speed":
        control.enter(1 << 40)
    thread, done = in_thread(lambda: control.sleep(1000) if wait == "sleep" else control.enter(1))
    until(thread.is_alive, "it waits")
    control.stop()
    thread.join(20)
    assert isinstance(done[0], StopWorking)
    assert control.stopped
    with pytest.raises(StopWorking):
        control.enter(1)
    with pytest.raises(StopWorking):
        control.sleep(0)
