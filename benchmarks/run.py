"""Measure speed and memory on this machine: ``python benchmarks/run.py`` prints a table, ``--json`` prints JSON.

Ratios are taken between interleaved runs in one process; absolute times hold for this machine alone.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import inside
import outside
import torch
from rich.console import Console
from rich.table import Table
from timing import Result

from diffusion_lens.lens.lens import DiffusionLens

NAMES = ("start", "flips", "draft", "slider", "sweep", "overhead", "attribution", "memory")


def benchmarks(lens: str, repeats: int) -> dict[str, Callable[[], Iterator[Result]]]:
    """Every benchmark by name, not yet run; processes of their own come first."""
    opened: list[DiffusionLens] = []

    def the_lens() -> DiffusionLens:
        if not opened:
            opened.append(DiffusionLens.from_pretrained(lens))
        return opened[0]

    return {
        "start": lambda: outside.start(lens, min(3, repeats)),
        "memory": lambda: outside.working_memory(lens),
        "flips": lambda: outside.flips(lens),
        "draft": lambda: inside.draft(the_lens(), max(10, repeats)),
        "slider": lambda: inside.slider(the_lens(), max(10, repeats)),
        "overhead": lambda: inside.overhead(the_lens(), repeats),
        "sweep": lambda: inside.sweep(the_lens(), min(5, repeats)),
        "attribution": lambda: inside.attribution(the_lens(), min(3, repeats)),
    }


def main() -> None:
    """Run what was asked for and print it; exit status 1 where a bar is not met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"some of: {', '.join(NAMES)} (all by default)")
    parser.add_argument("--lens", default="assets/portraits", help="lens folder")
    parser.add_argument("--repeats", type=int, default=20, help="runs of each thing")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    known = benchmarks(str(Path(options.lens).resolve()), max(2, options.repeats))
    strange = [name for name in options.names if name not in known]
    if strange:
        parser.error(f"there is no benchmark '{strange[0]}'; choose among {', '.join(NAMES)}")
    results: list[Result] = []
    for name in options.names or known:
        print(f"{name} …", file=sys.stderr)
        results.extend(known[name]())
    machine: dict[str, object] = {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
    }
    if options.json:
        print(json.dumps({"machine": machine, "results": [asdict(result) for result in results]}, indent=1))
    else:
        show(results, machine)
    sys.exit(any(result.holds is False for result in results))


def show(results: list[Result], machine: dict[str, object]) -> None:
    """Print the table."""
    table = Table(title=", ".join(f"{key} {value}" for key, value in machine.items()), title_justify="left")
    for name in ("what", "value", "interval", "bar", "holds", "note"):
        table.add_column(name, overflow="fold")
    for r in results:
        interval = "" if r.interval is None else f"{r.interval[0]:.2f} to {r.interval[1]:.2f}"
        holds = "" if r.holds is None else "yes" if r.holds else "no"
        table.add_row(r.name, f"{r.value:.2f} {r.unit}", interval, r.bar, holds, r.note)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


if __name__ == "__main__":
    main()
