"""No edit is the stock pipeline; an edit equals its slow twin; an identity edit is nothing at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import latent_scheduler, make_pixel_pipeline, make_text_pipeline
from diffusers import DDIMScheduler
from edits import SAMPLERS, STEPS, Turn, ask, bend, hooks_in, nothing, stock
from torch import Tensor
from watching import steps

from diffusion_lens.base.progress import Cancelled
from diffusion_lens.base.types import GenerationRequest, LensError, Sampler
from diffusion_lens.model.generate import (
    Capture,
    StepContext,
    generate,
    generate_batches,
    record_trajectory,
    request,
)
from diffusion_lens.model.hooks import capture, edit_output
from diffusion_lens.model.pipelines import DiffusionModel, wrap_pipeline

KINDS = ("text", "pixel", "latent", "xl", "lcm")
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn2"
KEEP = Capture(dtype=np.float32)


@contextmanager
def guided_edit(model: DiffusionModel, asked: GenerationRequest, edit: Turn) -> Iterator[None]:
    """The edit hooked into the stock pipeline by hand, on the last ``n`` rows of every forward."""
    index, n = [-1], len(asked.seeds)

    def turn(h: Tensor) -> Tensor:
        index[0] += 1
        context = StepContext(index[0], asked.n_steps, 0, asked.seeds, None, 0.0, h)
        return torch.cat([h[:-n], edit.fn(h[-n:], context)])

    with edit_output(model.port, turn):
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_symmetric_edits_equal_a_hook_in_the_stock_pipeline(kind: str, tiny_models: dict[str, DiffusionModel]) -> None:
    model = tiny_models[kind]
    asked, edit = ask(model), Turn(bend)
    edited = generate(model, asked, edit=edit)
    with guided_edit(model, asked, edit):
        assert np.array_equal(edited.images, stock(model.pipeline, asked))
    assert not np.array_equal(edited.images, generate(model, asked).images)
    assert edited.edit == edit.spec


def slow_asymmetric(model: DiffusionModel, asked: GenerationRequest, edit: Turn) -> tuple[np.ndarray, np.ndarray]:
    """Asyrp as the paper writes it: two full passes per step, everything spelt out. Images and h at every step."""
    scheduler = model.scheduler(asked.n_steps)
    n, config = len(asked.seeds), scheduler.config
    conditioning = model.condition(asked.prompt, n, asked.guidance_scale)
    x, read = model.noise(asked.seeds), []

    def guided(output: Tensor) -> Tensor:
        if not conditioning.guided:
            return output
        return output[:n] + asked.guidance_scale * (output[n:] - output[:n])

    def x0_and_eps(output: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        if config.prediction_type == "epsilon":
            x0, eps = (x - (1 - a).sqrt() * output) / a.sqrt(), output
        elif config.prediction_type == "sample":
            x0, eps = output, (x - a.sqrt() * output) / (1 - a).sqrt()
        else:
            x0, eps = a.sqrt() * x - (1 - a).sqrt() * output, a.sqrt() * output + (1 - a).sqrt() * x
        if config.thresholding:
            x0 = scheduler._threshold_sample(x0)
        return (x0.clamp(-1, 1) if config.clip_sample and not config.thresholding else x0), eps

    for index, t in enumerate(scheduler.timesteps):

        def turn(h: Tensor, index: int = index) -> Tensor:
            context = StepContext(index, asked.n_steps, 0, asked.seeds, None, 0.0, h)
            return torch.cat([h[:-n], edit.fn(h[-n:], context)])

        with torch.no_grad():
            with capture(model.port) as tap:
                plain = guided(model.predict(x, t, conditioning))
            read.append(tap.output()[-n:])
            with edit_output(model.port, turn):
                edited = guided(model.predict(x, t, conditioning))
            before = int(t) - 1000 // asked.n_steps
            a = scheduler.alphas_cumprod[t]
            a_before = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
            x = a_before.sqrt() * x0_and_eps(edited, a)[0] + (1 - a_before).sqrt() * x0_and_eps(plain, a)[1]
    return model.decode(x), torch.stack(read, 1).numpy()


def predicting(prediction: str, kind: str, **changes: Any) -> DiffusionModel:
    """A model whose output means epsilon, sample or v_prediction."""
    if kind == "text":
        pipe: Any = make_text_pipeline()
        pipe.scheduler = latent_scheduler(prediction_type=prediction, **changes)
    else:
        pipe = make_pixel_pipeline()
        pipe.scheduler = DDIMScheduler(prediction_type=prediction, **changes)
    return wrap_pipeline(pipe, prediction)


@pytest.mark.parametrize(
    "model",
    [
        *(pytest.param((p, "text"), id=f"text {p}") for p in ("epsilon", "sample", "v_prediction")),
        *(pytest.param((p, "pixel"), id=f"clipped {p}") for p in ("epsilon", "v_prediction")),
        pytest.param(("epsilon", "pixel", True), id="thresholded"),
    ],
)
def test_asymmetric_edits_equal_two_full_passes(model: tuple[Any, ...]) -> None:
    prediction, kind, *thresholding = model
    opened = predicting(prediction, kind, **({"thresholding": True} if thresholding else {}))
    asked, edit = ask(opened), Turn(bend, "asymmetric")
    fast = generate(opened, asked, edit=edit, capture=KEEP)
    images, h = slow_asymmetric(opened, asked, edit)
    assert fast.activations is not None
    assert np.allclose(fast.activations.h, h, rtol=1e-3, atol=1e-4 * np.abs(h).max())
    assert np.abs(fast.images.astype(int) - images).max() <= 1
    symmetric = generate(opened, asked, edit=replace(edit, sampler="symmetric"), capture=KEEP)
    assert symmetric.activations is not None
    assert not np.allclose(fast.activations.h, symmetric.activations.h, rtol=1e-2)


@pytest.mark.parametrize("hook_name", ["mid_block", "down_blocks.1", "up_blocks.0", ATTENTION])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_module_can_be_edited(hook_name: str, sampler: Sampler, tiny_text_pipeline: Any) -> None:
    model = wrap_pipeline(tiny_text_pipeline, "x", hook_name=hook_name)
    asked, edit = ask(model), Turn(bend, sampler)
    plain = generate(model, asked)
    assert np.array_equal(generate(model, asked, edit=Turn(nothing, sampler)).images, plain.images)
    edited = generate(model, asked, edit=edit)
    assert not np.array_equal(edited.images, plain.images)
    if sampler == "asymmetric":
        images, _ = slow_asymmetric(model, asked, edit)
        assert np.abs(edited.images.astype(int) - images).max() <= 1
    else:
        with guided_edit(model, asked, edit):
            assert np.array_equal(edited.images, stock(model.pipeline, asked))


def test_the_unconditional_half_and_the_down_path_run_once(text_model: DiffusionModel) -> None:
    rows: dict[str, list[int]] = {"down": [], "up": []}
    unet = text_model.denoiser
    with ExitStack() as stack:
        for name, block in (("down", unet.down_blocks[0]), ("up", unet.up_blocks[0])):
            counter = rows[name]
            hook = block.register_forward_hook(
                lambda m, a, out, counter=counter: counter.append(len(out[0] if isinstance(out, tuple) else out))
            )
            stack.callback(hook.remove)
        generate(text_model, ask(text_model), edit=Turn(bend, "asymmetric", window=(1, 2)))
    assert rows["down"] == [6] * STEPS
    assert rows["up"] == [6, 6, 3, 6, 6]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["text", "pixel"])
def test_images_that_are_not_edited_stay_bit_identical(
    kind: str, sampler: Sampler, tiny_models: dict[str, DiffusionModel]
) -> None:
    model = tiny_models[kind]

    def only_seed_one(h: Tensor, context: StepContext) -> Tensor:
        mask = torch.tensor([s == 1 for s in context.seeds]).view(-1, 1, 1, 1)
        return torch.where(mask, h * 2, h)

    plain, edited = (generate(model, ask(model), edit=e) for e in (None, Turn(only_seed_one, sampler)))
    assert np.array_equal(edited.images[[0, 2]], plain.images[[0, 2]])
    assert not np.array_equal(edited.images[1], plain.images[1])
    assert edited.activation_ratio == pytest.approx(2.0, rel=1e-6)


def test_the_window_and_what_an_edit_is_told(text_model: DiffusionModel) -> None:
    edit = Turn(bend, "symmetric", window=(1, 3))
    asked = ask(text_model)
    taps: list[Any] = []
    handle = text_model.hook_module.register_forward_hook(lambda m, args, out: taps.append(args[0][-3:]))
    generate(text_model, asked, edit=edit)
    handle.remove()
    scheduler = text_model.scheduler(STEPS)
    assert [c.index for c in edit.seen] == [1, 2]
    assert [c.timestep for c in edit.seen] == scheduler.timesteps[1:3].tolist()
    assert [c.alpha_bar for c in edit.seen] == [float(scheduler.alphas_cumprod[c.timestep]) for c in edit.seen]
    for context in edit.seen:
        assert (context.n_steps, context.seeds) == (STEPS, (3, 1, 2))
        assert context.h_in is not None and torch.equal(context.h_in, taps[context.index])
        assert context.latents.shape == (3, 4, 8, 8)


def test_an_image_depends_on_its_own_seed_alone(tiny_models: dict[str, DiffusionModel]) -> None:
    for kind in KINDS:
        model = tiny_models[kind]
        seeds = (7, 8, 9, 10, 11)
        edit = Turn(bend, "asymmetric" if model.is_ddim else "symmetric")
        whole = generate(model, ask(model, seeds), edit=edit, capture=KEEP)
        parts = generate(model, ask(model, seeds), edit=edit, capture=KEEP, batch_size=2)
        turned = generate(model, ask(model, seeds[::-1]), edit=edit, capture=KEEP)
        assert whole.activations is not None and parts.activations is not None and turned.activations is not None
        scale = np.abs(whole.activations.h).max()
        assert np.allclose(parts.activations.h, whole.activations.h, atol=1e-4 * scale)
        assert np.allclose(turned.activations.h[::-1], whole.activations.h, atol=1e-4 * scale)
        assert np.abs(parts.images.astype(int) - whole.images).max() <= 1
        assert parts.activations.seeds == seeds


def test_cancelling_at_every_step_leaves_nothing_behind(text_model: DiffusionModel) -> None:
    asked = ask(text_model, (1, 2))
    plain = generate(text_model, asked).images
    for sampler in SAMPLERS:
        for stop in range(1, 2 * STEPS + 1):
            done: list[int] = []

            def on_step(i: int, total: int, stop: int = stop, done: list[int] = done) -> None:
                assert total == 2 * STEPS
                done.append(i)
                if i == stop:
                    raise Cancelled

            with pytest.raises(Cancelled):
                generate(text_model, asked, edit=Turn(bend, sampler), batch_size=1, progress=steps(on_step))
            assert done == list(range(1, stop + 1))
            assert hooks_in(text_model) == 0
    assert np.array_equal(generate(text_model, asked).images, plain)


def test_a_failing_edit_leaves_nothing_behind(text_model: DiffusionModel) -> None:
    def explode(h: Tensor, context: StepContext) -> Tensor:
        raise KeyError("boom")

    for sampler in SAMPLERS:
        with pytest.raises(KeyError):
            generate(text_model, ask(text_model), edit=Turn(explode, sampler))
        assert hooks_in(text_model) == 0
    with pytest.raises(LensError, match="must keep the shape"):
        generate(text_model, ask(text_model), edit=Turn(lambda h, c: h[:1], "asymmetric"))


def test_activations_are_the_conditional_half_before_the_edit(text_model: DiffusionModel) -> None:
    asked = ask(text_model)
    raw: list[Tensor] = []
    handle = text_model.hook_module.register_forward_hook(lambda m, args, out: raw.append(out[3:]))
    got = generate(text_model, asked, edit=Turn(bend), capture=Capture((3, 1), np.float32)).activations
    handle.remove()
    assert got is not None
    assert got.h.shape == (3, 2, 8, 4, 4) and got.h.dtype == np.float32
    assert np.array_equal(got.h[:, 1], raw[3].numpy())
    times = text_model.scheduler(STEPS).timesteps
    assert got.timesteps == (int(times[1]), int(times[3]))
    assert (got.seeds, got.hook_name, got.guidance_branch) == (asked.seeds, "mid_block", "conditional")
    half = generate(text_model, asked, capture=Capture()).activations
    assert half is not None and half.h.dtype == np.float16


def test_batches_come_one_by_one_and_join_to_the_whole(text_model: DiffusionModel) -> None:
    asked = ask(text_model, (1, 2, 3, 4, 5))
    edit = Turn(lambda h, c: h * 1.5)
    parts = list(generate_batches(text_model, asked, edit=edit, capture=KEEP, batch_size=2))
    whole = generate(text_model, asked, edit=edit, capture=KEEP, batch_size=2)
    assert [p.request.seeds for p in parts] == [(1, 2), (3, 4), (5,)]
    assert np.array_equal(np.concatenate([p.images for p in parts]), whole.images)
    assert whole.activations is not None and whole.activations.seeds == asked.seeds
    assert whole.activation_ratio == pytest.approx(1.5, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_restarting_from_a_trajectory_is_bit_identical(kind: str, tiny_models: dict[str, DiffusionModel]) -> None:
    model = tiny_models[kind]
    asked = ask(model)
    start = record_trajectory(model, asked, batch_size=2)
    assert np.array_equal(start.generation.images, generate(model, asked, batch_size=2).images)
    assert sorted(start.latents) == list(range(STEPS))
    sampler: Sampler = "asymmetric" if model.is_ddim else "symmetric"
    for first in range(STEPS):
        edit = Turn(bend, sampler, window=(first, STEPS))
        calls: list[tuple[int, int]] = []
        restarted = generate(
            model,
            asked,
            edit=edit,
            batch_size=2,
            start=start,
            progress=steps(lambda i, n, calls=calls: calls.append((i, n))),
        )
        assert np.array_equal(restarted.images, generate(model, asked, edit=edit, batch_size=2).images)
        assert len(calls) == 2 * (STEPS - first) and calls[-1] == (len(calls), len(calls))


def test_a_trajectory_serves_fewer_seeds_and_unedited_images(text_model: DiffusionModel) -> None:
    start = record_trajectory(text_model, ask(text_model), steps=[2])
    some = ask(text_model, (2, 3))
    assert np.array_equal(generate(text_model, some, start=start).images, start.generation.images[[2, 0]])
    edit = Turn(bend, "asymmetric", window=(3, 4))
    apart, fresh = generate(text_model, some, edit=edit, start=start), generate(text_model, some, edit=edit)
    assert np.abs(apart.images.astype(int) - fresh.images).max() <= 1
    early = Turn(bend, "asymmetric", window=(1, 4))
    assert np.array_equal(
        generate(text_model, some, edit=early, start=start).images, generate(text_model, some, edit=early).images
    )


def test_foreign_trajectories_are_refused(text_model: DiffusionModel) -> None:
    start = record_trajectory(text_model, ask(text_model))
    for other in (ask(text_model, (3, 4)), replace(ask(text_model), prompt="a man"), ask(text_model, scale=2.0)):
        with pytest.raises(LensError, match="another request"):
            generate(text_model, other, edit=Turn(bend), start=start)


def test_trajectories_keep_to_their_budget(text_model: DiffusionModel) -> None:
    asked = ask(text_model)
    per_step = 3 * 4 * 8 * 8 * 4
    start = record_trajectory(text_model, asked, max_bytes=2 * per_step + 1)
    assert sorted(start.latents) == [0, 2]
    assert [start.before(s) for s in range(STEPS)] == [0, 0, 2, 2]


def test_weight_edits_are_entered_once_per_batch_and_re_encode_prompts() -> None:
    model = wrap_pipeline(make_text_pipeline(), "x")
    asked = request(model, "a man", [1, 2, 3], 2)
    plain = generate(model, asked).images
    entered: list[str] = []

    @contextmanager
    def other_text_encoder(opened: DiffusionModel) -> Iterator[None]:
        weight = opened.pipeline.text_encoder.get_input_embeddings().weight
        kept = weight.detach().clone()
        entered.append("in")
        with torch.no_grad():
            weight.mul_(-3)
        try:
            yield
        finally:
            with torch.no_grad():
                weight.copy_(kept)
            entered.append("out")

    edit = Turn(nothing, window=(1, 2))
    edit.model_context = other_text_encoder  # type: ignore[attr-defined]
    start = record_trajectory(model, asked)
    turned = generate(model, asked, edit=edit, batch_size=2, start=start)
    assert entered == ["in", "out", "in", "out"]
    assert not np.array_equal(turned.images, plain)
    assert np.array_equal(turned.images, generate(model, asked, edit=edit, batch_size=2).images)
    assert np.array_equal(generate(model, asked).images, plain)


def test_threads_do_not_see_each_others_edits(text_model: DiffusionModel) -> None:
    asked = ask(text_model)
    edits = [None, Turn(bend, "asymmetric"), Turn(lambda h, c: -h), None]
    alone = [generate(text_model, asked, edit=e).images for e in edits]
    together: list[Any] = [None] * len(edits)

    def work(i: int) -> None:
        together[i] = generate(text_model, asked, edit=edits[i]).images

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(edits))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_impossible_requests_are_refused(tiny_models: dict[str, DiffusionModel]) -> None:
    text, pixel, lcm = tiny_models["text"], tiny_models["pixel"], tiny_models["lcm"]
    with pytest.raises(LensError, match="is for the model"):
        generate(text, ask(pixel))
    with pytest.raises(LensError, match="needs a prompt"):
        generate(text, request(text, None, [1], 2))
    with pytest.raises(LensError, match="takes no prompt"):
        generate(pixel, request(pixel, "a man", [1], 2))
    with pytest.raises(LensError, match="needs DDIM"):
        generate(lcm, ask(lcm), edit=Turn(bend, "asymmetric"))
    with pytest.raises(LensError, match="step window"):
        generate(text, ask(text), edit=Turn(bend, window=(2, STEPS + 1)))
    with pytest.raises(LensError, match="batch_size"):
        generate(text, ask(text), batch_size=0)
    with pytest.raises(LensError, match="Captured steps"):
        generate(text, ask(text), capture=Capture((STEPS,)))
    with pytest.raises(LensError, match="float16 or float32"):
        generate(text, ask(text), capture=Capture(dtype=np.int32))


def test_edits_may_use_gradients(text_model: DiffusionModel) -> None:
    def descend(h: Tensor, context: StepContext) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = h.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(leaf.square().sum(), leaf)
        return h - 0.25 * gradient

    by_gradient = generate(text_model, ask(text_model), edit=Turn(descend))
    by_hand = generate(text_model, ask(text_model), edit=Turn(lambda h, c: h * 0.5))
    assert np.array_equal(by_gradient.images, by_hand.images)
