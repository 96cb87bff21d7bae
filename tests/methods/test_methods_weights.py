"""Methods that change weights: adapters in and out without a trace, optimal assignment, DDM's sets and indicator."""

from __future__ import annotations

import builtins
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lens_fixtures import PROMPTS
from safetensors.torch import save_file

from diffusion_lens.base.types import LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.methods.ddm import DDM, DDMOptions, make_indicator, shuffled, target_rows
from diffusion_lens.methods.draws import Draws
from diffusion_lens.methods.fine_tuning import FineTuning, FineTuningOptions, aligned_targets
from diffusion_lens.methods.lora import LoraShape, adapters, read_adapter, targets_of
from diffusion_lens.model.pipelines import DiffusionModel

SEEDS = tuple(range(500, 524))
SHAPE = LoraShape(2, 4.0, text=("q_proj", "v_proj"))


def predict(model: DiffusionModel) -> torch.Tensor:
    """One prediction with a freshly encoded prompt."""
    model.forget_prompts()
    with torch.no_grad():
        conditioning = model.condition(PROMPTS[0] if model.is_text else None, 2, 1.0)
        found = model.predict(model.noise([1, 2]), model.scheduler(4).timesteps[1], conditioning)
    model.forget_prompts()
    return found


def state(model: DiffusionModel) -> list[tuple[str, int, bool, torch.Tensor]]:
    """Names, identity, flags and values of everything trainable in the pipeline."""
    modules = [model.denoiser, getattr(model.pipeline, "text_encoder", None)]
    return [(n, id(p), p.requires_grad, p.clone()) for m in modules if m is not None for n, p in m.named_parameters()]


@pytest.mark.parametrize("kind", ["text", "pixel", "xl"])
def test_adapters_leave_no_trace(kind: str, tiny_models: dict[str, DiffusionModel]) -> None:
    model = tiny_models[kind]
    before, plain, globally = state(model), predict(model), torch.get_rng_state()
    with adapters(model, SHAPE, seed=1) as fresh:
        assert set(fresh.parts) == ({"unet", "text"} if kind == "text" else {"unet"})
        torch.testing.assert_close(predict(model), plain)  # B = 0
        for parameter in fresh.parameters:
            parameter.data.add_(0.3)
        tensors = fresh.tensors()
        changed = predict(model)
        with fresh.off():
            torch.testing.assert_close(predict(model), plain)
    assert not torch.allclose(changed, plain)
    assert torch.equal(torch.get_rng_state(), globally)
    for (name, identity, flag, value), (name2, identity2, flag2, value2) in zip(before, state(model), strict=True):
        assert (name, identity, flag) == (name2, identity2, flag2) and torch.equal(value, value2)
    assert torch.equal(predict(model), plain) and not hasattr(model.denoiser, "peft_config")
    shape = LoraShape(2, 4.0, targets_of(tensors, "unet"), targets_of(tensors, "text"))
    with adapters(model, shape, tensors=tensors):
        torch.testing.assert_close(predict(model), changed)
    with adapters(model, shape, tensors=tensors, scale=0.0):
        torch.testing.assert_close(predict(model), plain)


def test_one_layer_by_hand(tiny_models: dict[str, DiffusionModel]) -> None:
    model = tiny_models["text"]
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer, x = model.denoiser.get_submodule(name), torch.randn(3, 8)
    with adapters(model, LoraShape(2, 6.0, (name,)), seed=2, scale=0.5) as made:
        for parameter in made.parameters:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
        tensors = made.tensors()
        got = model.denoiser.get_submodule(name)(x)
    a, b = tensors[f"unet.{name}.lora_A.weight"], tensors[f"unet.{name}.lora_B.weight"]
    torch.testing.assert_close(got, layer(x) + 0.5 * (6.0 / 2) * (x @ a.T @ b.T))


def test_adapters_come_out_after_an_error(text_model: DiffusionModel) -> None:
    with pytest.raises(ZeroDivisionError), adapters(text_model, SHAPE):
        raise ZeroDivisionError
    with pytest.raises(LensError, match="none of the layers"), adapters(text_model, LoraShape(2, 2.0, ("nonsense",))):
        pass
    with pytest.raises(LensError, match="does not fit"), adapters(text_model, SHAPE, tensors={"unet.x": torch.ones(1)}):
        pass
    assert not any("lora" in name for name, _ in text_model.denoiser.named_modules())


def test_missing_peft_is_said(text_model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "peft":
            raise ImportError
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(LensError, match="pip install peft"), adapters(text_model, SHAPE):
        pass


def test_an_adapter_file_is_read_in_both_namings(tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    with adapters(tiny_lens.model, LoraShape(2, 2.0), seed=3) as made:
        for parameter in made.parameters:
            parameter.data.normal_(generator=torch.Generator().manual_seed(5))
        tensors = made.tensors()
    save_file(tensors, tmp_path / "peft.safetensors")
    old = {n.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): t.clone() for n, t in tensors.items()}
    save_file(old, tmp_path / "diffusers.safetensors")
    for file in ("peft.safetensors", "diffusers.safetensors"):
        read, rank, alpha = read_adapter(tmp_path / file)
        assert (rank, alpha) == (2, 2.0) and set(read) == set(tensors)
        assert all(torch.equal(read[name], value) for name, value in tensors.items())
    options = FineTuningOptions(adapter=str(tmp_path / "peft.safetensors"))
    fitted = FineTuning().fit(tiny_lens, "gender", "male", options, prompts=PROMPTS, seeds=[0])
    strong = tiny_lens.generate(PROMPTS[0], fitted.edit(1.0), seeds=[0]).images
    assert not np.array_equal(strong, tiny_lens.generate(PROMPTS[0], seeds=[0]).images)
    save_file({"weights": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(LensError, match="no LoRA"):
        read_adapter(tmp_path / "other.safetensors")


def test_assignment_is_the_cheapest_one() -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet([1, 1, 1], size=5)
    for seed in range(20):
        drawn = np.random.default_rng(seed).choice(3, size=5, p=[0.2, 0.3, 0.5])
        asked, agreement = aligned_targets(probs, np.array([0.2, 0.3, 0.5]), 1, np.random.default_rng(seed))
        assert sorted(asked) == sorted(drawn) and (agreement == 1).all()

        def cost(classes: Any) -> float:
            return sum(float(np.linalg.norm(p - np.eye(3)[c])) for p, c in zip(probs, classes, strict=True))

        assert cost(asked) == pytest.approx(min(cost(order) for order in permutations(drawn)))


def test_targets_follow_the_readings_and_the_shares() -> None:
    probs = np.array([[0.99, 0.01]] * 12 + [[0.6, 0.4]] * 4 + [[0.01, 0.99]] * 4)
    asked, agreement = aligned_targets(probs, np.array([0.5, 0.5]), 200, np.random.default_rng(0))
    assert (asked[16:] == 1).all() and (asked[12:16] == 1).all()  # the nearest ones are asked to change
    assert agreement[16:].min() > 0.9 and agreement.max() <= 1


def test_fine_tuning_moves_readings_towards_the_target(tiny_lens: DiffusionLens) -> None:
    draws = Draws(tiny_lens.model, PROMPTS, SEEDS, 4, 2.0)
    options = FineTuningOptions(iterations=25, rank=4, lr=0.02, batch_size=8, jump=1, confidence=0.0, keep=0.0)
    fitted = FineTuning().fit(tiny_lens, "gender", "male", options, prompts=PROMPTS, seeds=SEEDS, draws=draws)
    loss = fitted.record.notes["loss"]
    assert np.mean(loss[-8:]) < np.mean(loss[:8])
    assert all(name.startswith("unet.") for name in fitted.tensors)


@pytest.mark.parametrize("parts", ["text encoder", "both"])
def test_the_text_encoder_can_be_adapted(parts: str, tiny_lens: DiffusionLens) -> None:
    options = FineTuningOptions(iterations=2, rank=2, batch_size=4, parts=parts, jump=1, confidence=0.0)  # type: ignore[arg-type]
    fitted = FineTuning().fit(tiny_lens, "gender", "male", options, prompts=PROMPTS, seeds=SEEDS[:8])
    kinds = {name.split(".")[0] for name in fitted.tensors}
    assert kinds == ({"text"} if parts == "text encoder" else {"text", "unet"})
    assert any(float(t.abs().max()) > 0 for n, t in fitted.tensors.items() if n.startswith("text.") and "lora_B" in n)
    plain = tiny_lens.generate(PROMPTS[0], seeds=[0]).images
    tiny_lens.generate(PROMPTS[0], fitted.edit(1.0), seeds=[0])
    np.testing.assert_array_equal(tiny_lens.generate(PROMPTS[0], seeds=[0]).images, plain)  # no stale prompt is kept


def test_target_set_is_eighty_to_twenty() -> None:
    labels = np.array([0] * 30 + [1] * 50 + [2] * 4)
    rows = target_rows(labels, 1, 0.8, np.random.default_rng(0))
    assert len(rows) == len(set(rows.tolist())) and np.mean(labels[rows] == 1) == pytest.approx(0.8, abs=0.02)
    assert len(rows) == 62  # 50 / 0.8, of which 12 others
    assert (labels[target_rows(labels, 1, 1.0, np.random.default_rng(0))] == 1).all()


def test_shuffled_latents_hold_the_same_patches() -> None:
    latents = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4).float()
    mixed = shuffled(latents, torch.Generator().manual_seed(0))
    assert not torch.equal(mixed, latents)
    for own, new in zip(latents, mixed, strict=True):
        corners = [(i, j) for i in (0, 2) for j in (0, 2)]
        before, after = (sorted(x[:, i : i + 2, j : j + 2].flatten().tolist() for i, j in corners) for x in (own, new))
        assert before == after
    with pytest.raises(LensError, match="cannot be cut"):
        shuffled(torch.zeros(1, 1, 3, 3), torch.Generator())


@pytest.mark.parametrize("read", ["denoised latent", "predicted noise"])
def test_ddm_learns_and_reports_entropy_per_group(read: str, tiny_lens: DiffusionLens) -> None:
    options = DDMOptions(iterations=30, rank=2, batch_size=6, n_other=12, lr=1e-3, alpha=1.0, indicator_on=read)  # type: ignore[arg-type]
    fitted = DDM().fit(tiny_lens, "gender", {"female": 0.5, "male": 0.5}, options, prompts=PROMPTS, seeds=SEEDS)
    notes = fitted.record.notes
    assert np.mean(notes["loss"][-6:]) < np.mean(notes["loss"][:6])
    assert set(notes["indicator entropy"]) <= {"female", "male"} and notes["indicator entropy"]
    assert all(0 <= value <= np.log(2) + 1e-6 for value in notes["indicator entropy"].values())
    assert any(name.startswith("text.") for name in fitted.tensors)


def test_the_indicator_is_the_papers() -> None:
    state = torch.get_rng_state()
    made = make_indicator(48, 0)
    assert [tuple(p.shape) for p in made.parameters() if p.ndim == 2] == [(1024, 48), (512, 1024), (2, 512)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), make_indicator(48, 0).parameters(), strict=True))
