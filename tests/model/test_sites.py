"""A site as data; what a U-Net's blocks offer; edits of several sites in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_text_pipeline
from edits import STEPS, Turn, ask, bend, nothing
from tiny_transformers import make_sd3
from torch import Tensor

from diffusion_lens.base.types import EditSpec, LensError, Sampler
from diffusion_lens.model.generate import Capture, StepContext, generate
from diffusion_lens.model.hooks import capture, edit_output
from diffusion_lens.model.pipelines import DiffusionModel, at_site, candidate_sites, wrap_pipeline
from diffusion_lens.model.sites import Layout, Port, Site


def test_a_site_is_its_name_and_its_json() -> None:
    for name, site in {
        "mid_block": Site("mid_block"),
        "transformer_blocks.2:update": Site("transformer_blocks.2", "update"),
        "layers.0:output:text": Site("layers.0", "output", "text"),
        "down_blocks.1:output:across": Site("down_blocks.1", "output", "across"),
    }.items():
        assert Site.parse(name) == site == Site(**site.as_json()) and site.name == name
    assert Site.parse("mid_block:output:image").name == "mid_block"
    for wrong in ("", ":update", "a:b", "a:output:sound", "a:output:image:more"):
        with pytest.raises(LensError, match="is no site"):
            Site.parse(wrong)


def test_streams_and_joined_sequences_are_taken_apart_and_put_together() -> None:
    image, text = torch.randn(2, 6, 4), torch.randn(2, 3, 4)

    def grid(_: int) -> tuple[int, int]:
        return 2, 3

    whole = {
        Layout(("text", "image")): (text, image),
        Layout(("image", "text")): (image, text),
        Layout(("image", "text"), joined=True): torch.cat([image, text], 1),
        Layout(("text", "image"), joined=True): torch.cat([text, image], 1),
    }
    for layout, output in whole.items():
        for stream, tokens in (("image", image), ("text", text)):
            port = Port(torch.nn.Identity(), Site("x", "output", stream), layout, grid)  # type: ignore[arg-type]
            h, _ = port.read(output, (), {})
            assert torch.equal(h.flatten(2).transpose(1, 2), tokens)
            assert h.shape[2:] == ((2, 3) if stream == "image" else (3, 1))
            changed = port.write(output, h, h + 1)
            assert torch.equal(port.read(changed, (), {})[0], h + 1)
            same = port.write(output, h, h.clone())
            parts = zip(
                (same,) if isinstance(same, Tensor) else same,
                (output,) if isinstance(output, Tensor) else output,
                strict=True,
            )
            assert all(torch.equal(a, b) for a, b in parts)


def test_an_update_is_what_a_block_adds() -> None:
    port = Port(torch.nn.Identity(), Site("x", "update"), Layout(updates=True), lambda _: (2, 3))
    given, output = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    h, h_in = port.read(output, (given,), {})
    assert h_in is not None and torch.equal(h.flatten(2).transpose(1, 2), output - given)
    assert torch.equal(port.write(output, h, h.clone()), output)
    torch.testing.assert_close(port.write(output, h, 3 * h), given + 3 * (output - given))
    with pytest.raises(LensError, match="has no update"):
        port.read(output[..., :3], (given,), {})


def test_a_down_blocks_output_goes_across_too() -> None:
    model = wrap_pipeline(make_text_pipeline(), "x")
    names = [site.name for site in candidate_sites(model)]
    assert {"mid_block", "down_blocks.0:output:across", "up_blocks.1"} <= set(names)
    assert "mid_block.attentions.0" in names
    asked = ask(model)
    plain = generate(model, asked).images
    drawn = {}
    for name in ("down_blocks.1", "down_blocks.1:output:across"):
        site = at_site(model, name)
        assert np.array_equal(generate(site, asked, edit=Turn(nothing)).images, plain)
        drawn[name] = generate(site, asked, edit=Turn(bend)).images
    assert not np.array_equal(*drawn.values())
    seen: list[Any] = []
    with edit_output(at_site(model, "down_blocks.0:output:across").port, lambda h: h * 0):
        handle = model.denoiser.down_blocks[0].register_forward_hook(lambda m, a, out: seen.append(out))
        model.predict(model.noise([1]), torch.tensor(3), model.condition("a man", 1, 1.0))
        handle.remove()
    main, skips = seen[0]
    assert float(main.abs().sum()) == 0 and skips[-1] is main and float(skips[0].abs().sum()) > 0


def test_every_candidate_of_a_unet_can_be_read() -> None:
    model = wrap_pipeline(make_text_pipeline(), "x")
    for site in candidate_sites(model):
        y, x = at_site(model, site).spatial
        assert y == x


@dataclass
class Both:
    """Plain edits at several sites."""

    parts: Mapping[str, Turn]
    sampler: Sampler = "symmetric"
    window: tuple[int, int] | None = None
    spec: EditSpec = field(default_factory=lambda: EditSpec.of_custom("both"))

    def apply(self, h: Tensor, context: StepContext) -> Tensor:
        raise AssertionError("each part acts at its site")


def both(model: DiffusionModel, sites: tuple[str, str], sampler: Sampler, fn: Any = bend) -> Both:
    """The same edit at two sites."""
    return Both({site: Turn(fn, sampler) for site in sites}, sampler)


PAIRS = {
    "U-Net": (make_text_pipeline, ("mid_block", "up_blocks.0")),
    "two streams": (make_sd3, ("transformer_blocks.0", "transformer_blocks.1:update:text")),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_edits_of_two_sites_equal_two_hooks(kind: str) -> None:
    make, sites = PAIRS[kind]
    model = wrap_pipeline(make(), "x", hook_name=sites[0])
    asked, n = ask(model), 3
    plain = generate(model, asked).images
    conditioning = model.condition(asked.prompt, n, asked.guidance_scale)
    ports = [at_site(model, site).port for site in sites]

    def slow(asymmetric: bool) -> np.ndarray:
        scheduler = model.scheduler(STEPS)
        x = model.noise(asked.seeds)
        for index, t in enumerate(scheduler.timesteps):

            def turn(h: Tensor, index: int = index) -> Tensor:
                context = StepContext(index, STEPS, 0, asked.seeds, None, 0.0, h)
                return torch.cat([h[:-n], bend(h[-n:], context)])

            with torch.no_grad():
                unedited = model.guide(model.predict(x, t, conditioning), conditioning, asked.guidance_scale)
                with edit_output(ports[0], turn), edit_output(ports[1], turn):
                    edited = model.guide(model.predict(x, t, conditioning), conditioning, asked.guidance_scale)
            if not asymmetric:
                x = scheduler.step(edited, t, x).prev_sample
            elif model.is_flow:
                s, later = scheduler.sigmas[index], scheduler.sigmas[index + 1]
                x = (1 - later) * (x - s * edited) + later * (x + (1 - s) * unedited)
            else:
                clean = scheduler.step(edited, t, x).pred_original_sample
                own = scheduler.step(unedited, t, x)
                before = int(t) - 1000 // STEPS
                share = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
                x = own.prev_sample + share**0.5 * (clean - own.pred_original_sample)
        return model.decode(x)

    for sampler in ("symmetric", "asymmetric"):
        edited = generate(model, asked, edit=both(model, sites, sampler)).images
        assert np.abs(edited.astype(int) - slow(sampler == "asymmetric")).max() <= 1
        assert all((a != b).any() for a, b in zip(edited, plain, strict=True))
        alone = generate(model, asked, edit=Turn(bend, sampler)).images
        assert not np.array_equal(edited, alone)
        same = generate(model, asked, edit=both(model, sites, sampler, nothing), capture=Capture(dtype=np.float32))
        assert np.array_equal(same.images, plain) and same.activations is not None
        assert same.activations.h.shape[2:] == model.hook_shape


def test_a_site_of_an_edit_that_is_not_there_is_refused(text_model: DiffusionModel) -> None:
    with pytest.raises(LensError, match="no module"):
        generate(text_model, ask(text_model), edit=both(text_model, ("mid_block", "nowhere"), "symmetric"))
    with capture(text_model.port) as tap:
        pass
    assert tap.calls == 0
