"""Full-size Stable Diffusion 1.5 and P2, random weights, on a GPU: ``python benchmarks/real_models.py``.

Against the plain diffusers pipeline, and against two full passes per step, as DiffLens' published code edits.
Without a GPU it runs on small shapes and says so. Prints a Markdown table and writes it beside this file.
"""

from __future__ import annotations

import os

from diffusion_lens.base.progress import Progress

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import diffusers
import numpy as np
import torch
from architectures import ARCHITECTURES
from timing import interleaved, ratio
from torch import Tensor

from diffusion_lens.base.types import Attribute, FeatureSet, GenerationRequest, Intervention, Sampler
from diffusion_lens.features.attribute import integrated_gradients
from diffusion_lens.features.probes import Probe
from diffusion_lens.features.reference import autograd_scores
from diffusion_lens.features.sae import SparseAutoencoder
from diffusion_lens.features.train_sae import SAETrainConfig, train_sae
from diffusion_lens.model.denoise import Edit, StepContext
from diffusion_lens.model.generate import Capture, generate, record_trajectory, request
from diffusion_lens.model.hooks import intercept
from diffusion_lens.model.memory import is_out_of_memory
from diffusion_lens.model.pipelines import DiffusionModel, wrap_pipeline
from diffusion_lens.model.run_options import RunOptions
from diffusion_lens.steering.intervene import make_edit

HERE = Path(__file__).resolve().parent
GENDER = Attribute("gender", ("female", "male"))
PROMPT = "a photo of a doctor"
GUIDANCE = 7.5
NODES = 10
WARM, TIMED = 5, 20
"""Training steps of an SAE that are left out, and that are timed."""
COLUMNS = ("model", "what", "measured", "against", "fidelity")


@dataclass(frozen=True)
class Size:
    """How much is run: full-size shapes on a GPU, or a token amount."""

    batch: int
    steps: dict[str, int]
    widen: int
    k: int
    tokens: int
    attributed: int


FULL = Size(8, {"Stable Diffusion 1.5": 20, "P2, CelebA-HQ": 50}, widen=4, k=32, tokens=4096, attributed=8)
TINY = Size(4, {"Stable Diffusion 1.5": 4, "P2, CelebA-HQ": 4}, widen=4, k=4, tokens=512, attributed=4)


@dataclass(frozen=True)
class Bench:
    """One architecture, opened, and how much of it to run."""

    name: str
    model: DiffusionModel
    size: Size
    repeats: int

    @cached_property
    def request(self) -> GenerationRequest:
        """One batch."""
        prompt = PROMPT if self.model.is_text else None
        return request(self.model, prompt, range(self.size.batch), self.size.steps[self.name], GUIDANCE)

    @cached_property
    def h(self) -> np.ndarray:
        """Activations of one batch, ``[n, step, c, y, x]``."""
        found = generate(self.model, self.request, capture=Capture(dtype=np.float32)).activations
        assert found is not None
        return found.h

    @cached_property
    def samples(self) -> Tensor:
        """The same as SAE samples ``[N, c]``."""
        return torch.from_numpy(self.h).flatten(0, 1).flatten(2).transpose(1, 2).flatten(0, 1).contiguous()

    def train(self, steps: int, progress: Progress | None = None) -> SparseAutoencoder:
        """An SAE of four times the width, trained for ``steps``."""
        config = SAETrainConfig(
            d_sae=self.size.widen * self.model.d_in, k=self.size.k, n_steps=steps, batch_size=self.size.tokens
        )
        where = {"model_id": self.name, "hook_name": "mid_block", "spatial": self.model.spatial}
        return train_sae(self.samples, config, device=self.model.device, progress=progress, **where)[0]

    @cached_property
    def sae(self) -> SparseAutoencoder:
        """The SAE that edits and attribution use."""
        return self.train(20)

    def edit(self, sampler: Sampler, beta: float = 2.0) -> Edit:
        """Thirty features, or as many as there are, scaled by β at every step."""
        ids = tuple(range(min(30, self.sae.cfg.d_sae)))
        features = FeatureSet(ids, (1.0,) * len(ids), "gender", "male", self.sae.sae_id)
        return make_edit([Intervention.at_beta(features, "scale", beta, sampler=sampler)], self.sae)

    def stock(self) -> np.ndarray:
        """The plain diffusers pipeline's own call for the same images."""
        generators = [torch.Generator().manual_seed(seed) for seed in self.request.seeds]
        shared = {"generator": generators, "num_inference_steps": self.request.n_steps, "output_type": "pil"}
        if self.model.is_text:
            own = {"prompt": [PROMPT] * self.size.batch, "guidance_scale": GUIDANCE}
        else:
            own = {"batch_size": self.size.batch}
        images = self.model.pipeline(**own, **shared).images
        return np.stack([np.array(image) for image in images])

    def two_passes(self, edit: Edit) -> np.ndarray:
        """The asymmetric edit by two full passes per step: an edited one for x0, an unedited one for the direction."""
        model, asked, n = self.model, self.request, self.size.batch
        scheduler, x = model.scheduler(asked.n_steps), model.noise(asked.seeds)
        conditioning = model.condition(asked.prompt, n, GUIDANCE)
        with torch.inference_mode():
            for index, t in enumerate(scheduler.timesteps):
                alpha = float(scheduler.alphas_cumprod[t])
                context = StepContext(index, asked.n_steps, int(t), asked.seeds, None, alpha, x)

                def turn(h: Tensor, _: Tensor | None, context: StepContext = context) -> Tensor:
                    return torch.cat([h[:-n], edit.apply(h[-n:], context).to(h.dtype)])

                plain = self._guided(model.predict(x, t, conditioning))
                with intercept(model.hook_module, turn):
                    edited = self._guided(model.predict(x, t, conditioning))
                before = int(t) - scheduler.config.num_train_timesteps // asked.n_steps
                last = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
                x0 = scheduler.step(edited, t, x).pred_original_sample
                step = scheduler.step(plain, t, x)
                x = step.prev_sample + last**0.5 * (x0 - step.pred_original_sample)
            return model.decode(x)

    def _guided(self, prediction: Tensor) -> Tensor:
        if not self.model.is_text:
            return prediction
        unconditional, conditional = prediction.chunk(2)
        return unconditional + GUIDANCE * (conditional - unconditional)


Row = tuple[str, str, str, str, str]


def drawing(bench: Bench) -> Iterator[Row]:
    """Unedited images a second, and what an edit adds, against the stock call and against two full passes."""
    model, asked = bench.model, bench.request
    late, all_in = bench.edit("asymmetric"), bench.edit("symmetric")
    made: dict[str, np.ndarray] = {}

    def run(key: str, edit: Edit | None) -> None:
        made[key] = generate(model, asked, edit=edit, batch_size=len(asked.seeds)).images

    works: list[Any] = [
        lambda: run("plain", None), lambda: made.update(stock=bench.stock()), lambda: run("symmetric", all_in),
        lambda: run("asymmetric", late), lambda: made.update(two=bench.two_passes(late)),
    ]  # fmt: skip
    times = interleaved(works, bench.repeats)
    plain, stock, symmetric, asymmetric, two = times.T

    def rate(column: np.ndarray) -> str:
        return f"{len(asked.seeds) / float(np.median(column)):.3g} images/s"

    same = "E0, bit-identical here" if np.array_equal(made["plain"], made["stock"]) else "differs from the stock call"
    gap = int(np.abs(made["asymmetric"].astype(int) - made["two"]).max())
    steps = f"batch {len(asked.seeds)}, {asked.n_steps} steps"
    yield bench.name, f"unedited, {steps}", rate(plain), f"{_times(plain, stock)} the stock call's time", same
    yield bench.name, "edited, symmetric", rate(symmetric), f"{_times(symmetric, plain)} unedited", "E0 (tests)"
    yield bench.name, "edited, asymmetric", rate(asymmetric), f"{_times(asymmetric, plain)} unedited", "E1"
    against = f"{_times(two, asymmetric)} the asymmetric edit's time"
    yield bench.name, "two full passes per step", rate(two), against, f"E1: at most {gap} of 255 apart here"


def slider(bench: Bench) -> Iterator[Row]:
    """One image after a slider moves, its unedited run kept: from the window's first step on."""
    one = request(bench.model, bench.request.prompt, [0], bench.request.n_steps, GUIDANCE)
    start, first = record_trajectory(bench.model, one), one.n_steps // 2
    turn = bench.edit("asymmetric")
    late = make_edit([replace(turn.interventions[0], window=(first, one.n_steps))], bench.sae)
    made: dict[str, np.ndarray] = {}
    works: list[Any] = [
        lambda: made.update(kept=generate(bench.model, one, edit=late, start=start).images),
        lambda: made.update(anew=generate(bench.model, one, edit=late).images),
    ]
    kept, anew = interleaved(works, bench.repeats).T
    p50, p95 = 1e3 * np.quantile(kept, [0.5, 0.95])
    same = "E0, bit-identical here" if np.array_equal(made["kept"], made["anew"]) else "differs from noise on"
    what = f"slider to image, steps {first} to {one.n_steps - 1} edited, p50 (p95)"
    yield bench.name, what, f"{p50:.4g} ms ({p95:.4g})", f"{_times(anew, kept)} as long from noise", same


def dictionary(bench: Bench) -> Iterator[Row]:
    """SAE tokens a second, trained and encoded."""
    clock: dict[int, float] = {}

    class Noted(Progress):
        def step(self, done: int, total: int, note: str = "") -> None:
            """Note the time after the steps that warm up, and at the end."""
            if done in (WARM, WARM + TIMED):
                if bench.model.device.type == "cuda":
                    torch.cuda.synchronize()
                clock[done] = time.perf_counter()

    spans = []
    for _ in range(bench.repeats):
        bench.train(WARM + TIMED, Noted())
        spans.append(clock[WARM + TIMED] - clock[WARM])
    trained = TIMED * bench.size.tokens / float(np.median(spans))
    rows = bench.samples[: bench.size.tokens].to(bench.model.device)

    def encode() -> None:
        with torch.inference_mode():
            bench.sae.encode_sparse(rows)[0].sum().item()

    encoded = len(rows) / float(np.median(interleaved([encode], bench.repeats)))
    shape = f"{bench.model.d_in} → {bench.sae.cfg.d_sae}, k = {bench.sae.cfg.k}"
    yield bench.name, f"SAE {shape}, trained", f"{trained:,.0f} tokens/s", "", ""
    yield bench.name, f"SAE {shape}, encoded", f"{encoded:,.0f} tokens/s", "", ""


def attribution(bench: Bench) -> Iterator[Row]:
    """The closed form against a loop of backward passes, with the few nodes that the published code takes."""
    h = bench.h[: bench.size.attributed]
    steps, numbers = h.shape[1], int(np.prod(h.shape[2:]))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(steps, 2, numbers, generator=generator) / numbers**0.5
    probe = Probe(GENDER, weight, torch.zeros(steps, 2), torch.ones(steps)).to(bench.model.device)
    found: dict[str, np.ndarray] = {}
    works: list[Any] = [
        lambda: found.update(ours=np.asarray(integrated_gradients(bench.sae, probe, h).scores)),
        lambda: found.update(
            loop=autograd_scores(bench.sae, probe, h, steps=range(steps), nodes=NODES, dtype=torch.float32)
        ),
    ]
    closed, loop = interleaved(works, min(3, bench.repeats)).T
    gap = float(np.abs(found["ours"] - found["loop"]).max() / np.abs(found["loop"]).max())
    what = f"attribution of {len(h)} images, {steps} steps, closed form"
    against = f"{_times(loop, closed)} by {NODES}-node autograd"
    yield bench.name, what, f"{float(np.median(closed)):.3g} s", against, f"E1: {gap:.0e} relative here"


def _times(slow: np.ndarray, fast: np.ndarray) -> str:
    value, (low, high) = ratio(slow, fast)
    return f"{value:.2f} × ({low:.2f} to {high:.2f})"


PARTS = (drawing, slider, dictionary, attribution)


def measure(name: str, options: RunOptions, size: Size, repeats: int) -> Iterator[Row]:
    """Every part for one architecture; a part that does not fit into memory is a row that says so."""
    full = size is FULL
    model = wrap_pipeline(ARCHITECTURES[name](full), name, options=options)
    bench = Bench(name, model, size, repeats)
    for part in PARTS:
        print(f"{name}: {part.__name__} …", file=sys.stderr)
        try:
            yield from part(bench)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            yield name, part.__name__, "memory ran out", "", ""


def page(rows: list[Row], options: RunOptions, size: Size, repeats: int) -> str:
    """The table as a Markdown page that says what it was measured on."""
    if size is FULL:
        machine = f"{torch.cuda.get_device_name()}, {options.dtype}, channels_last" + ", compiled" * options.compile
        intro = "Full-size architectures with random weights: the arithmetic is the real one, the pictures are noise."
    else:
        machine = (
            f"a CPU ({platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} of them used), fp32, "
            f"load average {os.getloadavg()[0]:.0f}"
        )
        intro = (
            "**Small shapes on a CPU, for there was no GPU: this shows that the script runs and what is bit-identical. "
            "No figure here says how fast a full-size model is.**"
        )
    lines = [
        "# Real models: measured", "", intro, "",
        f"`python benchmarks/real_models.py` on {machine}; torch {torch.__version__}, diffusers "
        f"{diffusers.__version__}, {repeats} interleaved runs of each thing, medians of paired ratios with 95 % "
        "intervals.", "",
        "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(row) + " |" for row in rows), "",
        "Fidelity: E0 bit-identical to the plain way; E1 the same arithmetic in another order, with the largest "
        "difference seen.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10, help="runs of each thing")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16", help="on a GPU")
    parser.add_argument("--compile", action="store_true", help="compile the U-Net's blocks (GPU)")
    parser.add_argument("--out", type=Path, default=HERE / "REAL_MODELS.md", help="Markdown file to write")
    given = parser.parse_args()
    if torch.cuda.is_available():
        options, size = RunOptions(device="cuda", dtype=given.dtype, compile=given.compile), FULL
    else:
        print("There is no GPU: small shapes, which say nothing about full-size models.", file=sys.stderr)
        options, size = RunOptions(device="cpu"), TINY
    repeats = max(2, given.repeats)
    rows = [row for name in ARCHITECTURES for row in measure(name, options, size, repeats)]
    text = page(rows, options, size, repeats)
    given.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
