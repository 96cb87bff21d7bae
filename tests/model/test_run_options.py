"""Where and how a model runs: options, their refusals, what they change, and batches that shrink."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_latent_pipeline, make_pixel_pipeline, make_text_pipeline
from diffusers import AutoencoderKL
from edits import Turn, ask, bend, nothing, stock
from torch import Tensor
from typer.testing import CliRunner

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import LensError, Sampler
from diffusion_lens.cli.app import app
from diffusion_lens.cli.options import RUN_FLAGS
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.model import run_options
from diffusion_lens.model.activations import SampleSpec, collect_to
from diffusion_lens.model.generate import Capture, StepContext, generate, record_trajectory, request
from diffusion_lens.model.hooks import intercept
from diffusion_lens.model.memory import Room, is_out_of_memory
from diffusion_lens.model.pipelines import DiffusionModel, load_model, wrap_pipeline
from diffusion_lens.model.placement import offload_parts, slice_work
from diffusion_lens.model.run_options import RunOptions
from diffusion_lens.ui import gpu

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def lending(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Callable[..., Any]]]:
    """A stand-in for the ``spaces`` package; notes every handler it was given, with its seconds."""
    noted: list[tuple[int, Callable[..., Any]]] = []

    def lend(duration: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(handler: Callable[..., Any]) -> Callable[..., Any]:
            noted.append((duration, handler))
            return lambda *args: [*handler(*args), "lent"]

        return wrap

    fake = ModuleType("spaces")
    fake.GPU = lend  # type: ignore[attr-defined]
    fake.__spec__ = sys.__spec__  # found by find_spec
    monkeypatch.setitem(sys.modules, "spaces", fake)
    return noted


# --- options and refusals


def test_defaults_run_anywhere() -> None:
    found = RunOptions().resolved()
    assert found.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert (found.torch_dtype, found.compile, found.slicing, found.offload) == (torch.float32, False, False, False)
    assert RunOptions(dtype="bf16").torch_dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dtype": "fp16"}, "fp16 needs a GPU"),
        ({"offload": True}, "there is none"),
        ({"device": "tpu9"}, "no device 'tpu9'"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(LensError, match=words):
        RunOptions(**{"device": "cpu", **values}).resolved()


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_is_for_cpus_that_have_it(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion_lens.base.precision.fast_bf16", lambda device: fast)
    if fast:
        assert RunOptions(device="cpu", dtype="bf16").resolved().dtype == "bf16"
    else:
        with pytest.raises(LensError, match="hundred times slower"):
            RunOptions(device="cpu", dtype="bf16").resolved()


def test_compiling_and_offloading_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_options, "pick_device", lambda name: "cuda")
    with pytest.raises(LensError, match="choose one"):
        RunOptions(compile=True, offload=True).resolved()
    assert RunOptions(dtype="fp16", offload=True).resolved().device == "cuda"


def test_never_compiled_where_a_gpu_is_lent(lending: list[Any]) -> None:
    with pytest.raises(LensError, match="lent for each call"):
        RunOptions(device="cpu", compile=True).resolved()


def test_the_environment_says_how_the_app_runs(lending: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"DIFFUSION_LENS_DTYPE": "bf16", "DIFFUSION_LENS_SLICING": "1", "DIFFUSION_LENS_OFFLOAD": "no"}
    assert RunOptions.from_environment(told) == RunOptions(device="cuda", dtype="bf16", slicing=True)
    monkeypatch.delitem(sys.modules, "spaces")
    assert RunOptions.from_environment({}) == RunOptions(device="cpu")
    assert RunOptions.from_environment({"DIFFUSION_LENS_DEVICE": "auto"}).device == "auto"
    with pytest.raises(LensError, match="DIFFUSION_LENS_COMPILE is 1 or 0; 'maybe'"):
        RunOptions.from_environment({"DIFFUSION_LENS_COMPILE": "maybe"})
    with pytest.raises(LensError, match="DIFFUSION_LENS_DTYPE is fp32, fp16, bf16; 'int8'"):
        RunOptions.from_environment({"DIFFUSION_LENS_DTYPE": "int8"})


def test_a_lens_opens_on_the_cpu_without_torch(tiny_lens_folder: Path) -> None:
    code = (
        "import sys; from diffusion_lens.lens.lens import DiffusionLens;"
        "from diffusion_lens.model.run_options import RunOptions;"
        f"DiffusionLens.from_pretrained({str(tiny_lens_folder)!r}, options=RunOptions.from_environment({{}}));"
        "print(sorted({'torch', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "command", ["generate", "attribute", "sweep", "balance", "check", "audit", "serve", "dissect", "together"]
)
def test_commands_take_the_flags(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
    assert all(f"--{flag.replace('_', '-')}" in shown for flag in RUN_FLAGS)
    assert {*RUN_FLAGS, "preview"} == set(RunOptions.model_fields) and ("--preview" in shown) == (command == "serve")
    assert "running" not in shown


def test_the_flags_reach_the_model(monkeypatch: pytest.MonkeyPatch, tiny_lens_folder: Path) -> None:
    opened: list[DiffusionLens] = []
    monkeypatch.setattr("diffusion_lens.ui.launch", lambda lens, **options: opened.append(lens))
    words = ["serve", "--lens", str(tiny_lens_folder), "--device", "cpu", "--slicing"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert opened[0].options == RunOptions(device="cpu", slicing=True)
    assert type(next(iter(opened[0].model.denoiser.attn_processors.values()))).__name__ == "SlicedAttnProcessor"
    for flags, words in ((["--dtype", "fp16"], "fp16 needs a GPU"), (["--dtype", "fp8"], "'fp8' is none of them")):
        refused = CliRunner().invoke(app, ["serve", "--lens", str(tiny_lens_folder), "--device", "cpu", *flags])
        assert refused.exit_code == 2 and words in refused.stderr


# --- what they change


def test_half_precision_is_the_stock_pipeline_and_an_identity_edit_is_nothing() -> None:
    model = wrap_pipeline(make_text_pipeline(), "half", dtype=torch.bfloat16)
    plain = generate(model, ask(model), capture=Capture(dtype=np.float32))
    assert np.array_equal(plain.images, stock(model.pipeline, ask(model)))
    assert np.array_equal(generate(model, ask(model), edit=Turn(nothing, "asymmetric")).images, plain.images)
    assert plain.activations is not None and np.isfinite(plain.activations.h).all()


def test_a_lens_turns_and_attributes_in_half_precision(tiny_lens_folder: Path, tiny_lens: DiffusionLens) -> None:
    half = DiffusionLens.from_pretrained(tiny_lens_folder, dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16 and half.sae.W_dec.dtype == torch.float32
    prompt = half.prompts[0]
    base = half.generate(prompt, seeds=range(4), capture=True)
    turned = half.generate(base.request, half.intervention("gender", "male", 6.0))
    assert not np.array_equal(turned.images, base.images)
    found = half.attribute(base, "gender").scores
    full = tiny_lens.attribute(tiny_lens.generate(prompt, seeds=range(4), capture=True), "gender").scores
    assert np.abs(found - full).max() < 0.2 * np.abs(full).max()


def test_slicing_changes_last_bits_alone() -> None:
    pipe = make_text_pipeline()
    torch.manual_seed(0)
    pipe.vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=4, sample_size=8)
    plain = wrap_pipeline(pipe, "x")
    asked = ask(plain)
    before = generate(plain, asked, edit=Turn(bend, "asymmetric")).images
    rows: list[int] = []
    hook = pipe.vae.decoder.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    slice_work(pipe, pipe.unet)
    after = generate(plain, asked, edit=Turn(bend, "asymmetric")).images
    hook.remove()
    assert rows == [1, 1, 1]
    assert np.abs(after.astype(int) - before).max() <= 1


def test_slicing_leaves_what_cannot_be_sliced() -> None:
    model = wrap_pipeline(make_pixel_pipeline(), "x", options=RunOptions(device="cpu", slicing=True))
    assert np.array_equal(generate(model, ask(model)).images, stock(model.pipeline, ask(model)))


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiling that traces and guards as ever, and runs what it traced as it is (no C++ compiler needed)."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("hook_name", "sampler"), [("mid_block", "asymmetric"), ("up_blocks.1.resnets.0", "symmetric")]
)
def test_compiled_blocks_still_show_every_hook(hook_name: str, sampler: Sampler, eager_compiler: None) -> None:
    plain, made = (
        wrap_pipeline(make_text_pipeline(), "x", hook_name=hook_name, options=RunOptions(device="cpu", compile=c))
        for c in (False, True)
    )
    compiled = {n for n, m in made.denoiser.named_modules() if "forward" in vars(m)}
    inside = {hook_name[:11]} if hook_name.count(".") > 1 else set()
    assert compiled == {"down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1"} - inside
    asked = ask(plain)
    for edit in (None, Turn(bend, sampler)):
        assert np.array_equal(generate(made, asked, edit=edit).images, generate(plain, asked, edit=edit).images)
    images = []
    for model in (plain, made):  # a hook placed later, inside a compiled block
        with intercept(model.denoiser.down_blocks[1].resnets[0], lambda h, _: h * 0):
            images.append(generate(model, asked).images)
    assert np.array_equal(*images)
    assert not np.array_equal(images[0], generate(made, asked).images)


def test_offloaded_parts_still_show_every_hook() -> None:
    plain = wrap_pipeline(make_text_pipeline(), "x")
    asked = ask(plain)
    pipe = make_text_pipeline()
    model = wrap_pipeline(pipe, "x")
    offload_parts(model.pipeline, torch.device("cpu"))
    model = DiffusionModel("x", model.pipeline, model.denoiser, "text", "mid_block", model.device, model.dtype, True)
    moves: list[str] = []
    for name in ("text_encoder", "unet", "vae"):
        hook = getattr(model.pipeline, name)._hf_hook
        before = hook.pre_forward

        def moved(*args: Any, name: str = name, before: Any = before, **kwargs: Any) -> Any:
            moves.append(name)
            return before(*args, **kwargs)

        hook.pre_forward = moved
    images = [generate(model, asked, edit=e).images for e in (Turn(bend, "asymmetric"), None)]
    assert list(dict.fromkeys(moves)) == ["text_encoder", "unet", "vae"]
    assert np.array_equal(images[0], generate(plain, asked, edit=Turn(bend, "asymmetric")).images)
    assert np.array_equal(images[1], generate(plain, asked).images)


def test_pipelines_without_an_order_cannot_be_offloaded() -> None:
    with pytest.raises(LensError, match="LDMPipeline does not say"):
        offload_parts(make_latent_pipeline(), torch.device("cpu"))


# --- batches that shrink


def full_beyond(n: int) -> Callable[[Tensor, StepContext], Tensor]:
    """An edit that runs out of memory in the second step of more than ``n`` images."""

    def turn(h: Tensor, context: StepContext) -> Tensor:
        if len(context.seeds) > n and context.index == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return bend(h, context)

    return turn


def test_a_full_memory_halves_the_batch_once_says_so_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    model = wrap_pipeline(make_text_pipeline(), "x")
    asked = ask(model, range(10))
    steps: list[tuple[int, int]] = []
    with caplog.at_level(logging.WARNING):
        drawn = generate(
            model, asked, edit=Turn(full_beyond(4), "asymmetric"), batch_size=8, capture=Capture(),
            progress=Progress(lambda s: steps.append((s.done, s.total))),
        )  # fmt: skip
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("Memory ran out with 8 images at once; going on with 4.")
    want = generate(model, asked, edit=Turn(bend, "asymmetric"), batch_size=4, capture=Capture())
    assert np.array_equal(drawn.images, want.images)
    assert drawn.activations is not None and want.activations is not None
    assert np.array_equal(drawn.activations.h, want.activations.h) and drawn.activations.seeds == asked.seeds
    assert steps[0] == (1, 8) and steps[1:] == [(i, 12) for i in range(1, 13)]
    assert model.room.limit == 4
    later = generate(model, asked, edit=Turn(full_beyond(4), "asymmetric"), batch_size=8)
    assert np.array_equal(later.images, want.images) and len(caplog.records) == 1


def test_a_second_time_the_error_is_raised() -> None:
    model = wrap_pipeline(make_text_pipeline(), "x")
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, ask(model, range(8)), edit=Turn(full_beyond(2)), batch_size=8)
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, ask(model, [1]), edit=Turn(full_beyond(0)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.denoiser.modules())


def test_trajectories_and_collections_shrink_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def opened() -> DiffusionModel:
        return wrap_pipeline(make_pixel_pipeline(), "x")

    asked = request(opened(), None, range(6), 4)
    start = record_trajectory(opened(), asked, batch_size=3)
    samples = collect_to(tmp_path / "few", opened(), [asked], SampleSpec(layout="map"), batch_size=3).load()
    real = DiffusionModel.predict

    def full(self: DiffusionModel, latents: Tensor, t: Tensor, *others: Any) -> Tensor:
        if len(latents) > 3 and int(t) < 600:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, latents, t, *others)

    monkeypatch.setattr(DiffusionModel, "predict", full)
    small = record_trajectory(opened(), asked, batch_size=6)
    assert np.array_equal(small.generation.images, start.generation.images)
    assert all(torch.equal(small.latents[i], start.latents[i]) for i in range(4))
    again = collect_to(tmp_path / "h", opened(), [asked], SampleSpec(layout="map"), batch_size=6).load()
    assert np.array_equal(again.h, samples.h) and np.array_equal(again.seed, samples.seed)


def test_what_counts_as_a_full_memory() -> None:
    full = (
        torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    )  # fmt: skip
    assert all(map(is_out_of_memory, full))
    assert not any(map(is_out_of_memory, (RuntimeError("shapes differ"), KeyError("out of memory"))))
    room = Room()
    assert (room.fits(9), room.halve(9), room.fits(9), room.fits(3), room.halve(1)) == (9, 4, 4, 3, 1)


# --- a GPU lent per call


def test_handlers_are_lent_a_gpu_where_there_is_one_to_lend(lending: list[Any]) -> None:
    def draw(studio: str, beta: float) -> Iterator[Any]:
        yield studio, beta

    wrapped = gpu.lent(30)(partial(draw, "studio"))
    assert list(wrapped(2.0)) == [("studio", 2.0), "lent"]
    assert [seconds for seconds, _ in lending] == [30]


def test_without_the_package_handlers_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "gpu_is_lent", lambda: False)

    def draw() -> None: ...

    assert gpu.lent(30)(draw) is draw


def test_every_handler_that_draws_is_lent_one(lending: list[Any], tiny_lens: DiffusionLens) -> None:
    from diffusion_lens.ui import build

    build(tiny_lens)
    assert sorted({seconds for seconds, _ in lending}) == [30, 60, 120]
    named = [getattr(handler, "func", handler).__name__ for _, handler in lending]
    assert {"draw", "measure", "alone", "strip", "run"} <= set(named)


def test_models_are_placed_before_the_launch_where_a_gpu_is_lent(lending: list[Any], tiny_lens_folder: Path) -> None:
    lens = DiffusionLens.from_pretrained(tiny_lens_folder)
    gpu.load_before_lending(lens)
    assert lens.is_ready
    del sys.modules["spaces"]
    other = DiffusionLens.from_pretrained(tiny_lens_folder)
    gpu.load_before_lending(other)
    assert not other.is_ready


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{"dtype": "fp16"}, {"dtype": "bf16", "compile": True}, {"offload": True}])
def test_the_options_run_on_a_gpu(options: dict[str, Any], tmp_path: Path) -> None:
    make_text_pipeline().save_pretrained(tmp_path / "m")
    model = load_model(tmp_path / "m", options=RunOptions(device="cuda", **options))
    plain = generate(model, ask(model), capture=Capture())
    same = generate(model, ask(model), edit=Turn(nothing, "asymmetric"))
    assert np.array_equal(same.images, plain.images)
    assert model.denoiser.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
