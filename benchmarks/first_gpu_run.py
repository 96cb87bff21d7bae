"""Everything that only a GPU can tell, in at most eight minutes: ``python benchmarks/first_gpu_run.py``.

The tests marked ``gpu``; images of every number format against the CPU's, with their validity; slider moves and drafts
on every bundled lens; models of full size with random weights, edited against unedited and against two full passes a
step; SAE tokens a second; peak memory; two visitors at once. The table is written anew after every part, so that a run
that is cut off leaves what it measured. Without a GPU it runs on small shapes and says so.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import diffusers
import numpy as np
import torch
from architectures import ARCHITECTURES, stable_diffusion_3
from real_models import FULL, PROMPT, TINY, Bench, dictionary, drawing
from timing import interleaved, seconds

from diffusion_lens.base.types import FeatureSet, Generation, Intervention, LensError
from diffusion_lens.features.sae import SparseAutoencoder
from diffusion_lens.features.sae_config import SAEConfig
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.model.denoise import Edit
from diffusion_lens.model.generate import generate, request
from diffusion_lens.model.memory import is_out_of_memory
from diffusion_lens.model.pipelines import DiffusionModel, wrap_pipeline
from diffusion_lens.model.run_options import Dtype, RunOptions
from diffusion_lens.steering.intervene import make_edit
from diffusion_lens.studio.state import View, default_view
from diffusion_lens.studio.studio import Studio

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 480.0
"""Seconds for all of it."""
TESTS_LIMIT = 150.0
N = 8
COLUMNS = ("part", "what", "measured", "note")
Row = tuple[str, str, str, str]


@dataclass(frozen=True)
class Run:
    """What is run and where.

    Attributes:
        device: of the models. gpu: whether it is one. lenses: folders. repeats: runs of each thing timed.
        until: the moment (``time.monotonic``) after which no part begins.
    """

    device: str
    gpu: bool
    lenses: tuple[Path, ...]
    repeats: int
    until: float
    rows: list[Row] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.until - time.monotonic()

    def synchronise(self) -> None:
        """Wait until the device has done what it was given."""
        if self.gpu:
            torch.cuda.synchronize()

    def opened(self, folder: Path, dtype: Dtype = "fp32", device: str | None = None) -> DiffusionLens:
        """A lens with its model on the device."""
        return DiffusionLens.from_pretrained(folder, options=RunOptions(device=device or self.device, dtype=dtype))


def gpu_tests(run: Run) -> Iterator[Row]:
    """The tests marked ``gpu``."""
    if not run.gpu:
        yield "tests", "marked gpu", "not run", "there is no GPU"
        return
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--ignore=tests/browser",
               str(ROOT / "tests" / "model")]  # fmt: skip
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=min(TESTS_LIMIT, run.left))
        told = (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"])[-1]
    except subprocess.TimeoutExpired:
        told = "not finished in time"
    yield "tests", "marked gpu", told, ""


def formats(run: Run) -> Iterator[Row]:
    """Images of every number format against the CPU's in fp32: levels, classes, validity."""
    dtypes: tuple[Dtype, ...] = ("fp32", "bf16", "fp16") if run.gpu else ("fp32",)
    for folder in run.lenses:
        reference = _drawn(run.opened(folder, device="cpu"))
        for dtype in dtypes:
            try:
                found = _drawn(run.opened(folder, dtype))
            except LensError as error:
                yield "formats", f"{folder.name}, {dtype}", "refused", str(error)
                continue
            for what, ours, theirs in zip(("unedited", "edited"), found, reference, strict=True):
                yield "formats", f"{folder.name}, {what}, {dtype}", *_compared(ours, theirs)


Seen = tuple[Generation, np.ndarray]


def _drawn(lens: DiffusionLens) -> tuple[Seen, Seen]:
    """Unedited and edited images of the same seeds, with the class read in each of the first attribute."""
    setting = next(iter(lens.settings.values()))
    turn = lens.intervention(setting.attribute, setting.target, setting.betas[-1])
    request = lens.request(lens.prompts[0], range(N))
    both = (lens.generate(request, batch_size=N), lens.generate(request, turn, batch_size=N))
    plain, edited = ((one, lens.classify(one.images)[setting.attribute].labels) for one in both)
    return plain, edited


def _compared(ours: Seen, theirs: Seen) -> tuple[str, str]:
    off = np.abs(ours[0].images.astype(int) - theirs[0].images)
    same = int((ours[1] == theirs[1]).sum())
    faults = [fault for fault in ours[0].faults if fault is not None]
    told = "all valid" if not faults else f"{len(faults)} invalid: {', '.join(sorted(set(faults)))}"
    return f"{off.mean():.3f} levels apart, at most {off.max()}", f"{same} of {N} read alike; {told}"


def moves(run: Run) -> Iterator[Row]:
    """A slider is let go: 8 images drawn and read, the unedited ones kept; and the drafts while it is dragged."""
    for folder in run.lenses:
        studio = Studio(run.opened(folder, "bf16" if run.gpu else "fp32"))
        view = default_view(studio.lens)
        ends = studio.lens.settings[view.attribute].betas
        studio.draw(view, "one")
        betas = iter(np.linspace(ends[0], ends[-1], 2 * run.repeats + 6).round(3).tolist())

        def move(studio: Studio = studio, view: View = view, betas: Iterator[float] = betas) -> None:
            studio.draw(replace(view, beta=next(betas)), "one")

        p50, p95 = 1e3 * np.quantile(interleaved([move], run.repeats)[:, 0], [0.5, 0.95])
        yield "slider", f"{folder.name}: release to 8 images, p50 (p95)", f"{p50:.0f} ms ({p95:.0f})", "drawn and read"
        if hasattr(studio, "draft"):

            def drag(studio: Studio = studio, view: View = view, betas: Iterator[float] = betas) -> None:
                studio.draft(replace(view, beta=next(betas)), "one")

            p50, p95 = 1e3 * np.quantile(interleaved([drag], run.repeats)[:, 0], [0.5, 0.95])
            yield "slider", f"{folder.name}: draft while dragging, p50 (p95)", f"{p50:.0f} ms ({p95:.0f})", "few steps"


def visitors(run: Run) -> Iterator[Row]:
    """Two visitors move their sliders at once: nobody's images change, and how much longer each waits."""
    lens = run.opened(run.lenses[0], "bf16" if run.gpu else "fp32")
    first = default_view(lens)
    views = [replace(first, first_seed=100 * i, beta=lens.settings[first.attribute].betas[-1]) for i in (1, 2)]
    alone: list[np.ndarray] = []
    studio = Studio(lens)
    studio.draw(replace(first, first_seed=500), "warm")
    single = np.median([seconds(lambda v=v: alone.append(studio.draw(v, "one").after.images)) for v in views])
    shared, together = Studio(lens), dict[int, np.ndarray]()

    def visit(i: int) -> None:
        together[i] = shared.draw(views[i], f"visitor {i}").after.images

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(len(views))]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    both = time.perf_counter() - began
    same = all(np.array_equal(together[i], alone[i]) for i in range(len(views)))
    told = "the same images as alone" if same else "OTHER IMAGES THAN ALONE"
    yield "visitors", "two at once, both served", f"{1e3 * both:.0f} ms ({1e3 * single:.0f} alone, each)", told


def full_size(run: Run) -> Iterator[Row]:
    """Models of published size with random weights: edited, unedited, and by two full passes a step."""
    size = FULL if run.gpu else TINY
    for name, make in ARCHITECTURES.items():
        if run.left < 45 and run.gpu:
            yield "full size", name, "not run", "no time was left"
            continue
        options = RunOptions(device=run.device, dtype="bf16" if run.gpu else "fp32")
        try:
            _reset_peak(run)
            bench = Bench(name, wrap_pipeline(make(run.gpu), name, options=options), size, max(2, run.repeats // 2))
            for part in (drawing, dictionary):
                for _, what, measured, against, fidelity in part(bench):
                    yield "full size", f"{name}: {what}", measured, ", ".join(filter(None, (against, fidelity)))
            yield "full size", f"{name}: peak memory", _peak(run), ""
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            yield "full size", name, "memory ran out", ""


def flow(run: Run) -> Iterator[Row]:
    """Stable Diffusion 3.5 medium by its shape: the stock call, unedited, edited in its middle block, and both runs."""
    name, steps, batch = ("Stable Diffusion 3.5 medium", 28, 2) if run.gpu else ("Stable Diffusion 3.5, tiny", 3, 2)
    if run.left < 60 and run.gpu:
        yield "flow", name, "not run", "no time was left"
        return
    _reset_peak(run)
    options = RunOptions(device=run.device, dtype="bf16" if run.gpu else "fp32")
    model = wrap_pipeline(stable_diffusion_3(run.gpu), name, options=options)
    asked = request(model, PROMPT, range(batch), steps, 5.0)
    edit = _random_edit(model)
    made: dict[str, np.ndarray] = {}

    def draw(key: str, edit: Edit | None) -> None:
        made[key] = generate(model, asked, edit=edit, batch_size=batch).images
        run.synchronise()

    def stock() -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in asked.seeds]
        found = model.pipeline(
            [PROMPT] * batch, guidance_scale=5.0, num_inference_steps=steps, generator=generators, output_type="pil",
            height=made["plain"].shape[1], width=made["plain"].shape[2],
        ).images  # fmt: skip
        made["stock"] = np.stack([np.array(image) for image in found])

    works = [lambda: draw("plain", None), stock, lambda: draw("edited", edit)]
    plain, theirs, edited = interleaved(works, 2).T
    gap = int(np.abs(made["plain"].astype(int) - made["stock"]).max())
    same = "bit-identical to the stock call" if not gap else f"at most {gap} of 255 from the stock call"
    moved = np.abs(made["edited"].astype(int) - made["plain"]).mean()
    rate = f"{batch / float(np.median(plain)):.3g} images/s"
    what = f"{name}: batch {batch}, {steps} steps"
    yield "flow", f"{what}, unedited", rate, f"{np.median(plain / theirs):.2f} × the stock call's time; {same}"
    yield (
        "flow",
        f"{what}, edited at {model.hook_name}",
        f"{batch / float(np.median(edited)):.3g} images/s",
        (
            f"{np.median(edited / plain):.2f} × unedited (two passes a step: {1 + np.median(edited / plain):.2f} ×); "
            f"moves pixels by {moved:.1f} levels"
        ),
    )
    yield "flow", f"{name}: peak memory", _peak(run), ""


def _random_edit(model: DiffusionModel) -> Edit:
    """Thirty features of an SAE of random weights, four times the width, added at every step."""
    d_in = model.d_in
    config = SAEConfig(
        d_in=d_in, d_sae=4 * d_in, k=min(32, d_in), layout="position", hook_name=model.hook_name,
        model_id=model.model_id, spatial=model.spatial,
    )  # fmt: skip
    sae = SparseAutoencoder(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for weight in sae.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) / d_in**0.5)
    sae = sae.to(model.device)
    ids = tuple(range(min(30, config.d_sae)))
    features = FeatureSet(ids, (1.0,) * len(ids), "gender", "male", sae.sae_id)
    return make_edit([Intervention.at_beta(features, "scale", 2.0, sampler="symmetric")], sae)


def _reset_peak(run: Run) -> None:
    if run.gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(run: Run) -> str:
    return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the device" if run.gpu else "not told on a CPU"


PARTS: tuple[Callable[[Run], Iterator[Row]], ...] = (formats, moves, visitors, full_size, flow, gpu_tests)


def measure(run: Run, write: Callable[[list[Row]], None]) -> None:
    """Every part in turn; what fails is a row that says so, and the table is written after each row."""
    for part in PARTS:
        if run.left <= 0:
            run.rows.append((part.__name__, "", "not run", "no time was left"))
            write(run.rows)
            continue
        print(f"{part.__name__} … ({run.left:.0f} s left)", file=sys.stderr, flush=True)
        began = time.monotonic()
        try:
            for row in part(run):
                run.rows.append(row)
                write(run.rows)
        except Exception as error:
            run.rows.append((part.__name__, "", "FAILED", f"{type(error).__name__}: {error}".splitlines()[0][:200]))
            if not run.gpu:
                raise
        run.rows.append((part.__name__, "took", f"{time.monotonic() - began:.0f} s", ""))
        write(run.rows)


def page(rows: list[Row], run: Run) -> str:
    """The table as a Markdown page that says what it was measured on."""
    machine = torch.cuda.get_device_name() if run.gpu else f"a CPU ({platform.machine()}, {os.cpu_count()} cores)"
    intro = [] if run.gpu else [
        "**Small shapes on a CPU, for there was no GPU: this shows that the script runs. No figure here says how fast "
        "anything is on a GPU.**", "",
    ]  # fmt: skip
    return "\n".join([
        "# First run on a GPU", "", *intro,
        f"`python benchmarks/first_gpu_run.py` on {machine}; torch {torch.__version__}, diffusers "
        f"{diffusers.__version__}, {run.repeats} runs of each thing.", "",
        "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows), "",
    ])  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the page after every row, and print it; exit status 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=LIMIT, help="no part begins after so many")
    parser.add_argument("--repeats", type=int, default=20, help="runs of each thing that is timed")
    parser.add_argument("--lens", type=Path, action="append", help="lens folder; the bundled ones by default")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "FIRST_GPU_RUN.md", help="file to write")
    given = parser.parse_args(arguments)
    lenses = given.lens or sorted(path.parent for path in (ROOT / "assets").glob("*/lens.json"))
    gpu = torch.cuda.is_available()
    if not gpu:
        print("There is no GPU: small shapes, which say nothing of one.", file=sys.stderr)
    until = time.monotonic() + given.seconds
    run = Run("cuda" if gpu else "cpu", gpu, tuple(lenses), max(2, given.repeats), until)
    measure(run, lambda rows: given.out.write_text(page(rows, run), encoding="utf-8", newline="\n"))
    print(page(run.rows, run))
    return int(any("FAILED" in row or "OTHER IMAGES" in row[3] for row in run.rows))


if __name__ == "__main__":
    sys.exit(main())
