"""Hooks read and edit one module, leave nothing behind, and the replay of the up path is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import pixel_unet, text_unet
from torch import Tensor, nn

from diffusion_lens.base.types import LensError
from diffusion_lens.model.hooks import UpPath, capture, edit_output, select_rows
from diffusion_lens.model.sites import as_map

TOKENS = "mid_block.attentions.0.transformer_blocks.0.attn2"


def hooks_in(module: nn.Module) -> int:
    """Hooks left anywhere inside a module."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.fixture(scope="module")
def unet() -> Any:
    """A tiny conditional U-Net."""
    torch.manual_seed(5)
    return text_unet().eval()


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    """Six rows: a guided batch of three."""
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(6, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(300),
        "encoder_hidden_states": torch.randn(6, 12, 8, generator=generator),
        "return_dict": False,
    }


@torch.no_grad()
def run(unet: Any, inputs: dict[str, Any]) -> Tensor:
    """The U-Net's output tensor."""
    return unet(**inputs)[0]


def test_capture_reads_what_the_module_took_and_gave(unet: Any, inputs: dict[str, Any]) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    handle = unet.mid_block.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    with capture(unet.mid_block) as tap:
        plain = run(unet, inputs)
    handle.remove()
    assert tap.calls == 1
    assert tap.h_in is not None and torch.equal(tap.h_in, seen[0][0])
    assert torch.equal(tap.output(), seen[0][1])
    assert torch.equal(plain, run(unet, inputs))
    assert hooks_in(unet) == 0


def test_a_module_that_never_ran_is_named(unet: Any) -> None:
    with capture(unet.mid_block) as tap:
        pass
    with pytest.raises(LensError, match="did not run"):
        tap.output()


def test_hooks_are_removed_after_an_exception(unet: Any, inputs: dict[str, Any]) -> None:
    def explode(h: Tensor) -> Tensor:
        raise KeyError("boom")

    with pytest.raises(KeyError), edit_output(unet.mid_block, explode), UpPath(unet).record():
        assert hooks_in(unet) == 1 + len(unet.up_blocks)
        run(unet, inputs)
    assert hooks_in(unet) == 0


def test_edit_replaces_the_output_and_identity_is_bit_identical(unet: Any, inputs: dict[str, Any]) -> None:
    plain = run(unet, inputs)
    with edit_output(unet.mid_block, lambda h: h.clone()):
        assert torch.equal(run(unet, inputs), plain)
    with edit_output(unet.mid_block, lambda h: h + 1):
        assert not torch.allclose(run(unet, inputs), plain)


def test_tuple_outputs_keep_their_other_items(unet: Any, inputs: dict[str, Any]) -> None:
    block = unet.down_blocks[1]
    results: list[Any] = []
    with edit_output(block, torch.zeros_like):
        handle = block.register_forward_hook(lambda m, args, out: results.append(out))
        run(unet, inputs)
        handle.remove()
    main, skips = results[0]
    assert isinstance(results[0], tuple)
    assert not main.any()
    assert skips[-1].any()


def test_tokens_are_shown_as_a_column_of_positions(unet: Any, inputs: dict[str, Any]) -> None:
    module = unet.get_submodule(TOKENS)
    raw: list[Tensor] = []
    handle = module.register_forward_hook(lambda m, args, out: raw.append(out))
    with capture(module) as tap:
        plain = run(unet, inputs)
    handle.remove()
    n, tokens, channels = raw[0].shape
    assert tap.output().shape == (n, channels, tokens, 1)
    assert torch.equal(tap.output()[2, 5, 7, 0], raw[0][2, 7, 5])
    with edit_output(module, lambda h: h.clone()):
        assert torch.equal(run(unet, inputs), plain)
    with edit_output(module, lambda h: h * 3):
        assert not torch.equal(run(unet, inputs), plain)


def test_edits_that_change_the_shape_are_refused(unet: Any, inputs: dict[str, Any]) -> None:
    with pytest.raises(LensError, match="must keep the shape"), edit_output(unet.mid_block, lambda h: h[:, :2]):
        run(unet, inputs)


def test_outputs_that_are_no_maps_are_refused(unet: Any, inputs: dict[str, Any]) -> None:
    with pytest.raises(LensError, match="3 or 4 dimensions"), capture(unet.time_embedding):
        run(unet, inputs)
    assert hooks_in(unet) == 0
    with pytest.raises(LensError):
        as_map(torch.zeros(2, 3))


def test_select_rows_reaches_nested_tensors_and_leaves_the_rest() -> None:
    per_row, shared = torch.arange(4), torch.arange(3)
    picked = select_rows({"a": (per_row, [shared]), "size": torch.Size([4, 4]), "none": None}, slice(2, None), 4)
    assert picked["a"][0].tolist() == [2, 3]
    assert picked["a"][1][0] is shared
    assert picked["size"] == torch.Size([4, 4]) and picked["none"] is None
    assert select_rows(per_row, torch.tensor([3, 0]), 4).tolist() == [3, 0]


@pytest.mark.parametrize(("kind", "size"), [("text", 8), ("text", 9), ("pixel", 8)])
def test_replay_is_bit_identical_to_a_full_forward(kind: str, size: int, inputs: dict[str, Any]) -> None:
    """An odd size makes the up-blocks take a forced output size, a tuple that is no batch."""
    torch.manual_seed(6)
    net = text_unet().eval() if kind == "text" else pixel_unet().eval()
    given: dict[str, Any] = {**inputs, "sample": torch.randn(6, net.config.in_channels, size, size)}
    if kind == "pixel":
        del given["encoder_hidden_states"]
    path = UpPath(net)
    with capture(net.mid_block) as tap, path.record():
        plain = run(net, given)
    edited = tap.output() * 1.5 + 0.2
    with edit_output(net.mid_block, lambda h: edited):
        full = run(net, given)
    with torch.no_grad():
        assert torch.equal(path.replay(tap.output()), plain)
        assert torch.equal(path.replay(edited), full)
        # A part of the batch: the same up to what the batch size does to the last bits.
        assert torch.allclose(path.replay(edited[3:], slice(3, None)), full[3:], atol=1e-5, rtol=1e-5)
        some = torch.tensor([4, 1])
        assert torch.allclose(path.replay(edited[some], some), full[some], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(full, plain)


def test_replay_needs_a_recording(unet: Any, inputs: dict[str, Any]) -> None:
    path = UpPath(unet)
    with pytest.raises(LensError, match="Record"):
        path.replay(torch.zeros(1, 8, 4, 4))
    with path.record():
        run(unet, inputs)
    path.clear()
    with pytest.raises(LensError, match="Record"):
        path.replay(torch.zeros(1, 8, 4, 4))


def test_replay_says_where_it_is_exact(unet: Any) -> None:
    assert UpPath.supports(unet, "mid_block")
    assert not UpPath.supports(unet, "up_blocks.0")
    assert not UpPath.supports(nn.Linear(1, 1), "mid_block")
    assert not UpPath.supports(pixel_unet(time_embedding_type="fourier"), "mid_block")
    skip = pixel_unet(down_block_types=("SkipDownBlock2D",) * 2, up_block_types=("SkipUpBlock2D",) * 2,
                      block_out_channels=(32, 64), norm_num_groups=32)  # fmt: skip
    assert not UpPath.supports(skip, "mid_block")
