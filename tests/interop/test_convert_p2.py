"""The guided-diffusion converter against recorded outputs of the original and a slow twin of the format."""

from __future__ import annotations

import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDPMPipeline
from p2_states import SMALL, build_state
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from diffusion_lens.base.types import LensError
from diffusion_lens.cli.app import app
from diffusion_lens.interop.convert_p2 import convert, convert_unet, drop_variance
from diffusion_lens.interop.p2_format import P2Config, infer_config, untold

DATA = Path(__file__).parents[1] / "data"


def recorded(case: str) -> tuple[P2Config, dict[str, Tensor], dict[str, Tensor]]:
    """A recorded case: its settings, its checkpoint, its input and outputs."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(DATA.glob(f"p2_{case}.*.safetensors")):
        with safe_open(shard, "pt") as file:
            settings = json.loads(file.metadata()["settings"])
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
    return P2Config.parse(settings), state, {k: t for k, t in tensors.items() if not k.startswith("weights/")}


def relative(got: Tensor, want: Tensor) -> float:
    """Largest deviation relative to the largest value."""
    return float((got - want).abs().max() / want.abs().max())


def run(unet: torch.nn.Module, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """The converted U-Net's output and its mid-block's."""
    seen: list[Tensor] = []
    handle = unet.mid_block.register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        output = unet(x, timesteps).sample
    handle.remove()
    return output, seen[0]


# --- the slow twin: builds and runs a state dict by walking the format's own order, one block at a time


def twin(state: dict[str, Tensor], config: P2Config, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Run the checkpoint as the format defines it; returns the output and ``middle_block``'s."""

    def at(name: str) -> tuple[Tensor, Tensor]:
        return state[f"{name}.weight"], state[f"{name}.bias"]

    def norm(name: str, h: Tensor) -> Tensor:
        return F.group_norm(h, 32, *at(name), eps=1e-5)

    def res(name: str, h: Tensor, resample: str = "") -> Tensor:
        inner = F.silu(norm(f"{name}.in_layers.0", h))
        if resample == "down":
            h, inner = F.avg_pool2d(h, 2), F.avg_pool2d(inner, 2)
        if resample == "up":
            h, inner = (v.repeat_interleave(2, 2).repeat_interleave(2, 3) for v in (h, inner))
        inner = F.conv2d(inner, *at(f"{name}.in_layers.2"), padding=1)
        time = F.linear(F.silu(embedding), *at(f"{name}.emb_layers.1"))[:, :, None, None]
        if config.use_scale_shift_norm:
            scale, shift = time.chunk(2, dim=1)
            inner = norm(f"{name}.out_layers.0", inner) * (1 + scale) + shift
        else:
            inner = norm(f"{name}.out_layers.0", inner + time)
        inner = F.conv2d(F.silu(inner), *at(f"{name}.out_layers.3"), padding=1)
        skip = f"{name}.skip_connection"
        return (F.conv2d(h, *at(skip)) if f"{skip}.weight" in state else h) + inner

    def attention(name: str, h: Tensor) -> Tensor:
        n, c, side, _ = h.shape
        qkv = F.conv1d(norm(f"{name}.norm", h).flatten(2), *at(f"{name}.qkv"))
        heads = config.num_heads if config.num_head_channels == -1 else c // config.num_head_channels
        size, parts = c // heads, []
        for head in range(heads):
            starts = (
                [part * c + head * size for part in range(3)]
                if config.use_new_attention_order
                else [(3 * head + part) * size for part in range(3)]
            )
            q, k, v = (qkv[:, s : s + size] for s in starts)
            weights = torch.softmax(torch.einsum("ncs,nct->nst", q, k) / math.sqrt(size), dim=-1)
            parts.append(torch.einsum("nst,nct->ncs", weights, v))
        return h + F.conv1d(torch.cat(parts, dim=1), *at(f"{name}.proj_out")).reshape(n, c, side, side)

    def block(name: str, h: Tensor, resample: str) -> Tensor:
        if f"{name}.0.op.weight" in state:
            return F.conv2d(h, *at(f"{name}.0.op"), stride=2, padding=1)
        for place in range(3):
            part = f"{name}.{place}"
            if f"{part}.qkv.weight" in state:
                h = attention(part, h)
            elif f"{part}.in_layers.0.weight" in state:
                h = res(part, h, resample if place or resample == "down" else "")
            elif f"{part}.conv.weight" in state:
                h = F.conv2d(h.repeat_interleave(2, 2).repeat_interleave(2, 3), *at(f"{part}.conv"), padding=1)
        return h

    half = config.num_channels // 2
    angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
    embedding = F.linear(torch.cat([angles.cos(), angles.sin()], dim=1), *at("time_embed.0"))
    embedding = F.linear(F.silu(embedding), *at("time_embed.2"))
    h = F.conv2d(x, *at("input_blocks.0.0"), padding=1)
    stack, per_level = [h], config.num_res_blocks + 1
    for index in range(1, per_level * len(config.channel_mult)):
        h = block(f"input_blocks.{index}", h, "down" if index % per_level == 0 else "")
        stack.append(h)
    middle = h = res("middle_block.2", attention("middle_block.1", res("middle_block.0", h)))
    for index in range(per_level * len(config.channel_mult)):
        h = block(f"output_blocks.{index}", torch.cat([h, stack.pop()], dim=1), "up")
    return F.conv2d(F.silu(norm("out.0", h)), *at("out.2"), padding=1), middle


# --- parity


@pytest.mark.parametrize("case", ["a", "b"])
def test_recorded_outputs_of_the_original(case: str) -> None:
    config, state, record = recorded(case)
    output, middle = run(convert_unet(state, config), record["x"], record["timesteps"])
    assert output.shape == record["output"].shape
    assert relative(output, record["output"]) < 1e-5
    assert relative(middle, record["middle_block_output"]) < 1e-5


@pytest.mark.parametrize("case", ["a", "b"])
def test_the_twin_agrees_with_the_original(case: str) -> None:
    config, state, record = recorded(case)
    output, middle = twin(state, config, record["x"], record["timesteps"])
    assert relative(output, record["output"]) < 1e-5
    assert relative(middle, record["middle_block_output"]) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_new_attention_order": True},
        {"resblock_updown": False},
        {"use_scale_shift_norm": False},
        {"learn_sigma": False},
        {"num_head_channels": -1, "num_heads": 2},
        {"attention_resolutions": (16,), "num_head_channels": 16},
        {"channel_mult": (1, 1, 2), "num_res_blocks": 2, "image_size": 32},
    ],
    ids=lambda changes: ",".join(changes) or "default",
)
def test_every_layer_kind_against_the_twin(changes: dict[str, object]) -> None:
    config = SMALL.model_copy(update=changes)
    state = build_state(config)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, config.image_size, config.image_size, generator=generator)
    timesteps = torch.tensor([3, 870])
    got, want = run(convert_unet(state, config), x, timesteps), twin(state, config, x, timesteps)
    assert relative(got[0], want[0]) < 1e-5
    assert relative(got[1], want[1]) < 1e-5


def test_a_wrong_attention_order_is_noticed() -> None:
    config = SMALL.model_copy(update={"num_head_channels": 16})
    state = build_state(config)
    x, timesteps = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)), torch.tensor([500])
    other = config.model_copy(update={"use_new_attention_order": True})
    assert relative(run(convert_unet(state, other), x, timesteps)[1], twin(state, config, x, timesteps)[1]) > 1e-2


def test_full_size_celebahq_by_shape() -> None:
    state = build_state(P2Config(), device="meta")
    config = infer_config(state, {"num_head_channels": 64})
    assert config == P2Config()
    unet = convert_unet(state, config)
    assert sum(p.numel() for p in unet.parameters()) == sum(t.numel() for t in state.values())
    assert unet.mid_block.resnets[1].conv2.out_channels == 512
    assert unet.mid_block.attentions[0].heads == 8


# --- folders


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_folder_runs_in_the_stock_pipeline(tmp_path: Path, suffix: str) -> None:
    config, state, record = recorded("b")
    checkpoint = tmp_path / f"weights{suffix}"
    torch.save(state, checkpoint) if suffix == ".pt" else save_file(state, checkpoint)
    folder = convert(checkpoint, tmp_path / "pipeline", config)
    pipeline = DDIMPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    output, middle = run(pipeline.unet, record["x"], record["timesteps"])
    assert relative(output, record["output"][:, :3]) < 1e-5
    assert relative(middle, record["middle_block_output"]) < 1e-5
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3) and np.isfinite(images).all()
    assert not list(folder.rglob("*.bin")) and P2Config.load(folder / "p2_config.json") == config


def test_schedule_is_the_linear_one(tmp_path: Path) -> None:
    save_file(build_state(SMALL), tmp_path / "c.safetensors")
    folder = convert(tmp_path / "c.safetensors", tmp_path / "out", SMALL)
    scheduler = DDIMPipeline.from_pretrained(folder, local_files_only=True).scheduler
    cumulative = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), cumulative, rtol=1e-3)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == list(range(980, -1, -20))


def test_kept_variance_runs_in_the_stock_ddpm_pipeline(tmp_path: Path) -> None:
    config, state, record = recorded("b")
    save_file(state, tmp_path / "c.safetensors")
    pipeline = DDPMPipeline.from_pretrained(
        convert(tmp_path / "c.safetensors", tmp_path / "out", config, keep_variance=True), local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    assert relative(run(pipeline.unet, record["x"], record["timesteps"])[0], record["output"]) < 1e-5
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert pipeline(batch_size=1, num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


def test_drop_variance_leaves_the_noise_and_the_original_alone() -> None:
    unet = convert_unet(build_state(SMALL), SMALL)
    x, timesteps = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([9])
    full, noise = run(unet, x, timesteps)[0], run(drop_variance(unet), x, timesteps)[0]
    assert full.shape[1] == 6 and noise.shape[1] == 3
    assert relative(noise, full[:, :3]) < 1e-6


def test_conversion_leaves_the_global_random_state_alone() -> None:
    state = build_state(SMALL)
    before = torch.get_rng_state()
    drop_variance(convert_unet(state, SMALL))
    assert torch.equal(before, torch.get_rng_state())


# --- configurations


@pytest.mark.parametrize(
    "changes",
    [
        {"channel_mult": (1, 2, 3, 4), "image_size": 64, "num_channels": 64},
        {"channel_mult": (1, 1, 2, 3, 4), "image_size": 128, "num_res_blocks": 2, "attention_resolutions": (32, 8)},
        {"num_res_blocks": 3, "attention_resolutions": (256, 16), "resblock_updown": False},
        {"use_scale_shift_norm": False, "learn_sigma": False, "attention_resolutions": ()},
    ],
)
def test_inference_inverts_construction(changes: dict[str, object]) -> None:
    config = P2Config().model_copy(update=changes)
    assert infer_config(build_state(config, device="meta"), {"num_head_channels": 64}) == config


@pytest.mark.parametrize("told", [None, {}, {"noise_schedule": "linear"}])
def test_heads_are_never_guessed(told: dict[str, object] | None, tmp_path: Path) -> None:
    state = build_state(P2Config(num_channels=32, channel_mult=(1, 2, 3, 4), image_size=64, num_head_channels=32))
    with pytest.raises(LensError, match=r"attention heads.*--config p2"):
        infer_config(state, told)
    save_file(state, tmp_path / "c.safetensors")
    with pytest.raises(LensError, match="num_heads or num_head_channels"):
        convert(tmp_path / "c.safetensors", tmp_path / "out", told)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("told", [{"num_heads": 4}, {"num_heads": 2}, {"num_head_channels": 32}])
def test_heads_that_are_told_make_the_model_that_was_trained(told: dict[str, int]) -> None:
    shape = P2Config(
        image_size=64, num_channels=32, channel_mult=(1, 2, 3, 4), attention_resolutions=(), resblock_updown=False
    )
    heads = {"num_head_channels": -1, **told}
    trained, state = shape.model_copy(update=heads), build_state(shape)
    config = infer_config(state, told)
    assert config == trained
    x, timesteps = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3)), torch.tensor([500])
    assert relative(run(convert_unet(state, config), x, timesteps)[0], twin(state, trained, x, timesteps)[0]) < 1e-5


def test_what_is_told_comes_first_and_the_rest_is_said() -> None:
    state = build_state(SMALL)
    with pytest.raises(LensError, match="image size cannot be told"):
        infer_config(state, {"num_head_channels": 32})
    assert infer_config(state, {"num_head_channels": 32, "image_size": 16}) == SMALL
    with pytest.raises(LensError, match="'num_headz' is wrong"):
        infer_config(state, {"num_heads": 1, "image_size": 16, "num_headz": 1})
    assert set(untold({"num_heads": 1})) == {"use_new_attention_order", "noise_schedule", "diffusion_steps"}
    assert untold({"noise_schedule": "cosine"}).keys() == {"use_new_attention_order", "diffusion_steps"}


def test_the_command_asks_and_says_what_it_assumes(tmp_path: Path) -> None:
    save_file(build_state(SMALL), tmp_path / "c.safetensors")
    words = ["convert-p2", str(tmp_path / "c.safetensors"), str(tmp_path / "out")]
    asked = CliRunner().invoke(app, words)
    assert asked.exit_code == 2 and "attention heads" in asked.stderr
    (tmp_path / "told.json").write_text('{"num_head_channels": 32, "image_size": 16, "diffusion_steps": 500}')
    done = CliRunner().invoke(app, [*words, "--config", str(tmp_path / "told.json")])
    assert done.exit_code == 0, done.stderr
    said = done.stdout + done.stderr
    assert "noise_schedule is linear" in said and "diffusion_steps is" not in said
    assert P2Config.load(tmp_path / "out" / "p2_config.json") == SMALL.model_copy(update={"diffusion_steps": 500})
    published = CliRunner().invoke(app, [*words[:2], str(tmp_path / "other"), "--config", "p2"])
    assert published.exit_code == 2 and "check that the config fits" in published.stderr


def test_config_takes_comma_lists_and_refuses_unknown_keys() -> None:
    config = P2Config.parse({"channel_mult": "1,2", "attention_resolutions": "16,8"})
    assert config.channel_mult == (1, 2) and config.attention_resolutions == (16, 8)
    assert P2Config.parse({"attention_resolutions": 16}) == P2Config()
    with pytest.raises(LensError, match="num_chanels"):
        P2Config.parse({"num_chanels": 128})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class_cond": True}, "class-conditional"),
        ({"channel_mult": (2, 2)}, "begin with 1"),
        ({"num_channels": 24}, "multiple of 32"),
        ({"num_head_channels": 48}, "do not divide 64"),
        ({"num_head_channels": -1, "num_heads": 4, "attention_resolutions": (16,)}, "differ in size"),
    ],
)
def test_settings_without_a_counterpart_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(LensError, match=words):
        convert_unet(build_state(SMALL), SMALL.model_copy(update=changes))


# --- refusals


def test_missing_unexpected_and_misshapen_tensors_are_named() -> None:
    state = build_state(SMALL)
    with pytest.raises(LensError, match=re.escape("lacks 'middle_block.1.qkv.bias' (1 missing)")):
        convert_unet({k: t for k, t in state.items() if k != "middle_block.1.qkv.bias"}, SMALL)
    with pytest.raises(LensError, match=r"unexpected 'label_emb\.weight'"):
        convert_unet(state | {"label_emb.weight": torch.zeros(2, 128)}, SMALL)
    with pytest.raises(LensError, match=r"shape \(6, 32, 1, 1\).*\(6, 32, 3, 3\)"):
        convert_unet(state | {"out.2.weight": torch.zeros(6, 32, 1, 1)}, SMALL)
    with pytest.raises(LensError, match="cannot be split"):
        convert_unet(state | {"middle_block.1.qkv.weight": torch.zeros(64, 64, 1)}, SMALL)


def test_foreign_checkpoints_are_refused() -> None:
    with pytest.raises(LensError, match="other names"):
        infer_config({"conv_in.weight": torch.zeros(1)})


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "ran"

    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(witness),)

    torch.save({"input_blocks.0.0.weight": Malicious()}, tmp_path / "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Malicious()))
    for name in ("zip.pt", "raw.pt"):
        with pytest.raises(LensError, match="would run code"):
            convert(tmp_path / name, tmp_path / "out")
    assert not witness.exists() and not (tmp_path / "out").exists()


def test_damaged_and_odd_files_are_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.pt"
    torch.save({"w": torch.zeros(1000)}, good)
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:2000])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "noise.safetensors").write_bytes(b"\x00" * 40)
    torch.save({"state_dict": {"w": torch.zeros(1)}}, tmp_path / "nested.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    for name in ("cut.pt", "empty.pt", "noise.safetensors", "nested.pt", "tensor.pt", "none.pt", "none.safetensors"):
        with pytest.raises(LensError):
            convert(tmp_path / name, tmp_path / "out")
    with pytest.raises(LensError, match="neither"):
        convert(tmp_path / "weights.bin", tmp_path / "out")


def test_a_folder_in_use_is_not_overwritten(tmp_path: Path) -> None:
    save_file(build_state(SMALL), tmp_path / "c.safetensors")
    with pytest.raises(LensError, match="is not empty"):
        convert(tmp_path / "c.safetensors", tmp_path, SMALL)
