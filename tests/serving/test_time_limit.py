"""What keeps a test from waiting without end for an engine that has died."""

from __future__ import annotations

import multiprocessing
import queue
import time

import pytest
from served import no_longer_than

SHOWS = r"took longer than 0\.2 seconds"


def test_a_wait_without_end_fails(capfd: pytest.CaptureFixture[str]) -> None:
    nothing = queue.Queue[None]()
    with pytest.raises(AssertionError, match=SHOWS), no_longer_than(0.2):
        nothing.get()
    assert "test_a_wait_without_end_fails" in capfd.readouterr().err, "where it waited"


def test_what_is_quick_is_left_alone() -> None:
    with no_longer_than(0.2):
        pass
    time.sleep(0.3)


def test_a_limit_inside_another_leaves_the_other_its_time() -> None:
    def wait() -> None:
        with no_longer_than(30):
            pass
        queue.Queue[None]().get()

    with pytest.raises(AssertionError, match=SHOWS), no_longer_than(0.2):
        wait()


def test_processes_that_it_started_are_killed() -> None:
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    process.start()
    with pytest.raises(AssertionError, match=SHOWS), no_longer_than(0.2):
        process.join()
    process.join(10)
    assert process.exitcode == -9
