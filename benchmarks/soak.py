"""Visitors come, act and leave, and the app's memory is looked at: ``python benchmarks/soak.py --visitors 30``.

The app runs as a process of its own; visitors speak to it as the page in a browser does (over HTTP, with a heartbeat
that ends when they leave), several at once. Printed are the app's resident memory before anybody came, with the model
loaded and one visitor served, at most, and when all have left; the exit status is 1 where the last is more than a
fifth above the second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from outside import free_port, wait_for

ROOT = Path(__file__).resolve().parents[1]
LEAVING = 3.0
"""Seconds after which the app of this script lets go of who left, in place of its quarter of an hour."""
SERVER = """
import os, sys
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
from diffusion_lens.ui import launch, sessions
from diffusion_lens.lens.lens import DiffusionLens
sessions.GRACE, sessions.EVERY = float(sys.argv[2]), 1.0
launch(DiffusionLens.from_pretrained(sys.argv[1]), server_name="127.0.0.1", server_port=int(sys.argv[3]), quiet=True)
"""
ALLOWED = 1.2
"""Memory when all have left, against that with one visitor served."""


@contextmanager
def app(lens: str) -> Iterator[str]:
    """The app on one lens as a child; its address."""
    port = free_port()
    child = subprocess.Popen(
        [sys.executable, "-c", SERVER, lens, str(LEAVING), str(port)], cwd=ROOT, stdout=subprocess.DEVNULL,
        env={**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"},
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(child, address)
        yield address
    finally:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def status(address: str) -> dict[str, Any]:
    """What ``/status`` tells."""
    with urllib.request.urlopen(f"{address}/status", timeout=60) as answer:
        told: dict[str, Any] = json.load(answer)
    return told


@dataclass
class Visitor:
    """Somebody with the page open: knows its components' values and calls its functions as the page does."""

    address: str
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:11])

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.address, timeout=300)
        config = self.client.get("/config").json()
        self.components = {c["id"]: c for c in config["components"]}
        self.values = {i: c.get("props", {}).get("value") for i, c in self.components.items()}
        self.functions = {d["id"]: d for d in config["dependencies"]}
        self.answered = self.failed = self.alerts = 0
        self._gone = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def _beat(self) -> None:
        try:
            with httpx.stream("GET", f"{self.address}/gradio_api/heartbeat/{self.name}", timeout=None) as stream:
                for _ in stream.iter_raw():
                    if self._gone.is_set():
                        return
        except httpx.HTTPError:
            return

    def triggered(self, event: str, component: int | None = None) -> list[int]:
        """The functions that an event calls."""
        return [
            i for i, d in self.functions.items()
            if any(e == event and component in (None, c) for c, e in d["targets"]) and d["backend_fn"]
        ]  # fmt: skip

    def call(self, function: int) -> None:
        """Call a function and those that follow it, and take up what they show."""
        told = self.functions[function]
        data = [None if self._is_state(i) else self.values.get(i) for i in told["inputs"]]
        body = {"fn_index": function, "data": data, "session_hash": self.name, "trigger_id": None, "event_data": None}
        self.client.post("/gradio_api/queue/join", json=body).raise_for_status()
        with self.client.stream("GET", f"/gradio_api/queue/data?session_hash={self.name}") as stream:
            for line in stream.iter_lines():
                news = json.loads(line[5:]) if line.startswith("data:") else {}
                if news.get("msg") == "process_completed":
                    self.answered += 1
                    self.failed += not news.get("success", False)
                    self._take_up(told["outputs"], news.get("output", {}).get("data", []))
                if news.get("msg") in ("process_completed", "close_stream"):
                    break
        for i, d in self.functions.items():
            if d.get("trigger_after") == function and d["backend_fn"]:
                self.call(i)

    def _is_state(self, component: int) -> bool:
        return self.components.get(component, {}).get("type") == "state"

    def _take_up(self, outputs: list[int], data: list[Any]) -> None:
        for component, value in zip(outputs, data, strict=False):
            if isinstance(value, dict) and value.get("__type__") == "update":
                self.alerts += bool((value.get("scene") or {}).get("alert"))
                if "value" in value:
                    self.values[component] = value["value"]
            elif value is not None:
                self.values[component] = value

    def move(self, rng: random.Random) -> None:
        """Let the slider of Explore go at another strength, on seeds of one's own."""
        pane = next(i for i, c in self.components.items() if c["props"].get("elem_id") == "dl-explore")
        asked = self.values[pane]
        view = {**asked["view"], "beta": rng.choice((-2.0, -1.0, 0.0, 2.0, 3.0)), "first_seed": rng.randrange(10**6)}
        self.values[pane] = {"view": view, "serial": asked.get("serial", 0) + 1, "from": "page"}
        for function in self.triggered("draw", pane):
            self.call(function)

    def leave(self) -> None:
        """Close the page."""
        self._gone.set()
        self.client.close()


def visit(address: str, moves: int, seed: int) -> tuple[int, int]:
    """One visitor: the page, some slider moves, away again; how many calls were answered, and how many failed.

    The heartbeat comes every quarter of a minute, so that closing it is noticed as late as that.
    """
    rng = random.Random(seed)
    visitor = Visitor(address)
    try:
        for function in visitor.triggered("load"):
            visitor.call(function)
        for _ in range(moves):
            visitor.move(rng)
        return visitor.answered, visitor.failed + visitor.alerts
    finally:
        visitor.leave()


def settled(address: str, patience: float) -> float:
    """Resident MB once it has not fallen for a while."""
    least, since = status(address)["memory_mb"], time.monotonic()
    while time.monotonic() - since < patience:
        time.sleep(1)
        now = status(address)["memory_mb"]
        if now < least - 1:
            least, since = now, time.monotonic()
    return least


def main(arguments: list[str] | None = None) -> int:
    """Run the visitors and print what the memory did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--visitors", type=int, default=30)
    parser.add_argument("--at-once", type=int, default=6)
    parser.add_argument("--moves", type=int, default=3, help="slider moves of each")
    parser.add_argument("--rounds", type=int, default=2, help="how often as many visitors come")
    parser.add_argument("--patience", type=float, default=25.0, help="seconds without a change that end the waiting")
    parser.add_argument("--lens", default=str(ROOT / "assets" / "portraits"))
    given = parser.parse_args(arguments)
    with app(given.lens) as address:
        start = status(address)["memory_mb"]
        visit(address, 1, 0)
        warm = settled(address, given.patience)
        print(f"before anybody came: {start:.0f} MB; model loaded, one visitor served: {warm:.0f} MB", flush=True)
        left = warm
        for turn in range(given.rounds):
            with ThreadPoolExecutor(given.at_once) as pool:
                seeds = range(1 + turn * given.visitors, 1 + (turn + 1) * given.visitors)
                found = list(pool.map(lambda seed: visit(address, given.moves, seed), seeds))
            here = status(address)
            left = settled(address, given.patience)
            answered, failed = (sum(column) for column in zip(*found, strict=True))
            told = f"{len(found)} visitors, {answered} calls answered, {failed} of them failed"
            memory = f"with all of them {here['memory_mb']:.0f} MB, at most {here['peak_mb']:.0f} MB"
            print(f"round {turn + 1}: {told}; {memory}, when all had left {left:.0f} MB", flush=True)
        held = status(address)["lenses"]
        print(f"kept for the next: {json.dumps(held)}")
    return int(left > ALLOWED * warm)


if __name__ == "__main__":
    sys.exit(main())
