"""Benchmarks of whole processes: the app's start, and peak memory."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from timing import Result

ROOT = Path(__file__).resolve().parents[1]
FIRST_VIEW_SECONDS = 5.0
FLIP_MILLISECONDS = 50
MEMORY_BYTES = 2e9
PATIENCE = 180.0


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def app(lens: str) -> Iterator[tuple[subprocess.Popen[bytes], str, float]]:
    """``python app.py`` as a child: the process, its address, and when it was started."""
    port = free_port()
    settings = {
        **os.environ, "GRADIO_SERVER_PORT": str(port), "DIFFUSION_LENS": lens, "GRADIO_ANALYTICS_ENABLED": "False",
    }  # fmt: skip
    begun = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "app.py"], cwd=ROOT, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield child, f"http://127.0.0.1:{port}/", begun
    finally:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def wait_for(child: subprocess.Popen[bytes], address: str) -> None:
    """Return when the page is served; raises ``RuntimeError`` if the app ends or takes minutes."""
    limit = time.perf_counter() + PATIENCE
    while time.perf_counter() < limit:
        if child.poll() is not None:
            raise RuntimeError(f"The app ended with status {child.returncode}.")
        try:
            with urllib.request.urlopen(address, timeout=5) as page:
                page.read()
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.02)
    raise RuntimeError("The app did not come up.")


def peak_bytes(pid: int) -> float:
    """The most memory a process ever held, in bytes (Linux)."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return 1024.0 * int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmHWM")))


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used so far, its threads included (Linux): what a busy machine leaves alone."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(lens: str, repeats: int) -> Iterator[Result]:
    """From the command to the served page, and to the first pictures in a real browser where there is one."""
    served, seen, peaks, used = [], [], [], []
    for _ in range(repeats):
        with browser_page() as page, app(lens) as (child, address, begun):
            wait_for(child, address)
            served.append(time.perf_counter() - begun)
            used.append(cpu_seconds(child.pid))
            if page is not None:
                page.goto(address)
                page.locator("[data-part=after] img[src]").first.wait_for(timeout=60_000)
                seen.append(time.perf_counter() - begun)
            time.sleep(15)  # the model loads behind the first page
            peaks.append(peak_bytes(child.pid))
    yield Result("cold start to the served page", sorted(served)[len(served) // 2], "s", note=f"{repeats} starts")
    work = sorted(used)[len(used) // 2]
    yield Result("processor time to the served page", work, "s", note="the app's own, browser left out")
    if seen:
        value = sorted(seen)[len(seen) // 2]
        yield Result(
            "cold start to pictures in the browser", value, "s", bar=f"≤ {FIRST_VIEW_SECONDS:.0f} s",
            holds=value <= FIRST_VIEW_SECONDS, note="headless chromium, open before the app starts",
        )  # fmt: skip
    yield _memory("peak memory: the app, model loaded", max(peaks))


FLIPS = """async () => {
  const [slider, took] = [document.querySelector('#dl-slider'), []];
  const key = (name) => slider.dispatchEvent(new KeyboardEvent('keydown', { key: name, bubbles: true }));
  key('Home');
  for (let i = 0; i < 40; i++) {
    await new Promise(requestAnimationFrame);
    const begun = performance.now();
    key('ArrowRight');
    took.push(performance.now() - begun);
  }
  return took;
}"""


def flips(lens: str) -> Iterator[Result]:
    """Forty strengths of the recommended set along its flip-book in a real browser: what one of them takes to show."""
    with browser_page() as page, app(lens) as (child, address, _):
        if page is None:
            return
        wait_for(child, address)
        page.goto(address)
        page.wait_for_function("() => document.querySelector('.dx')?.dataset.frame", timeout=60_000)
        took = np.asarray(page.evaluate(FLIPS))
        p50, p95 = np.quantile(took, [0.5, 0.95]).tolist()
        yield Result(
            "flip-book, 8 frames shown, p50 (p50 to p95)", p50, "ms", (p50, p95), f"< {FLIP_MILLISECONDS} ms",
            p50 < FLIP_MILLISECONDS, "headless chromium, no request", {"p50": p50, "p95": p95},
        )  # fmt: skip


@contextmanager
def browser_page() -> Iterator[Any]:
    """An empty page of headless chromium; ``None`` where there is no browser or no playwright."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        browser = None
    if browser is None:
        yield None
        return
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        try:
            yield opened.new_page()
        finally:
            opened.close()


def working_memory(lens: str) -> Iterator[Result]:
    """A process that draws, turns, reads, sweeps and attributes: its peak."""
    code = (
        "import sys, resource; sys.path.insert(0, 'benchmarks');"
        "from diffusion_lens.lens.lens import DiffusionLens; import inside;"
        f"lens = DiffusionLens.from_pretrained({lens!r});"
        "list(inside.slider(lens, 3));"
        "name = lens.attributes[0].name;"
        "lens.sweep(inside.request_of(lens, 64), name);"
        "lens.attribute(lens.generate(inside.request_of(lens, 64), capture=True), name);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    kib = int(done.stdout.strip().splitlines()[-1])
    yield _memory("peak memory: slider, sweep of 64 seeds, attribution", 1024.0 * kib)


def _memory(name: str, peak: float) -> Result:
    return Result(name, peak / 1e9, "GB", bar=f"≤ {MEMORY_BYTES / 1e9:.0f} GB", holds=peak <= MEMORY_BYTES)
