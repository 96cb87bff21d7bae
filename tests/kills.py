"""Processes that die at a chosen moment, as a kill or a power cut would end them: no clean-up of Python's runs."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest

KILLED = 77
EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
"""What changes a folder, by the names that ``sys.addaudithook`` gives; opening to write and ``fsync`` count besides."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def die_at(point: int, work: Callable[[], object]) -> bool:
    """Run ``work`` in a process that dies before its ``point``-th change of the disk; False where it has fewer."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, KILLED), f"the process ended with {code}"
        return code == KILLED
    touched = 0

    def touch(*_: Any) -> None:
        nonlocal touched
        if touched == point:
            os._exit(KILLED)
        touched += 1

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in EVENTS or (event == "open" and isinstance(args[2], int) and args[2] & WRITING):
            touch()

    sys.addaudithook(hook)
    os.fsync = touch  # the machine's real one takes milliseconds, and tells nothing here
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def die_by_signal(work: Callable[[], object], least: float, most: float, rng: random.Random) -> None:
    """Repeat ``work`` in a process and kill it after a random time, seconds between ``least`` and ``most``."""
    child = os.fork()
    if not child:
        try:
            while True:
                work()
        finally:
            os._exit(1)
    time.sleep(rng.uniform(least, most))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the process failed before it was killed"


def at_once(works: list[Callable[[], object]]) -> list[int]:
    """Run each in a process of its own at the same time; their exit codes."""
    children = []
    for work in works:
        child = os.fork()
        if not child:
            code = 1
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
