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
from torch import nn

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.methods.ddm import (
    DDM,
    DDMOptions,
    ddm_loss,
    draw_batch,
    make_indicator,
    row_weights,
    set_shares,
    shuffled,
    training_sets,
)
from diffusion_lens.methods.draws import Draws
from diffusion_lens.methods.fine_tuning import FineTuning, FineTuningOptions, aligned_targets
from diffusion_lens.methods.lora import LoraShape, adapters, encode, read_adapter, targets_of
from diffusion_lens.methods.noise import add_noise
from diffusion_lens.methods.protocol import Task
from diffusion_lens.methods.registry import METHODS
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


def test_the_target_set_shows_the_shares_it_should() -> None:
    labels = np.array([0] * 30 + [1] * 50 + [2] * 4)
    told = set_shares(labels, (0.2, 0.3, 0.5), DDMOptions())
    np.testing.assert_allclose(told, [0.2, 0.3, 0.5])
    biased = set_shares(labels, (0.2, 0.3, 0.5), DDMOptions(target_set="majority"))
    np.testing.assert_allclose(biased, [0.2 * 30 / 34, 0.8, 0.2 * 4 / 34])
    weights = row_weights(labels, told)
    assert weights.sum() == pytest.approx(1)
    for label, share in enumerate(told):
        own = weights[labels == label]
        assert own.sum() == pytest.approx(share) and np.ptp(own) < 1e-12  # every image of a class alike, none left out


class Nothing(nn.Module):
    """An indicator that says nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), 2)


def ddm_task(lens: DiffusionLens, **options: Any) -> Task:
    """A fit of DDM on both prompts."""
    draws = Draws(lens.model, PROMPTS, SEEDS, 4, 2.0)
    told = DDMOptions(**{"rank": 2, "n_other": 12, **options})
    return Task(lens, lens.probes["gender"].attribute, (0.5, 0.5), told, draws, Progress())


def test_ddms_batches_are_whole_and_of_both_sets(tiny_lens: DiffusionLens) -> None:
    """0.4 cut a batch of 8 down to the images of one prompt, and gave non-target images the target's prompt."""
    task = ddm_task(tiny_lens)
    sets = training_sets(task, Progress())
    assert set(sets.prompts) == set(PROMPTS) == set(sets.other_prompts) and len(sets.target) == len(SEEDS)
    generator = torch.Generator().manual_seed(0)
    mixed = 0
    for n in (1, 2, 7, 8, 8, 8):
        batch = draw_batch(sets, n, generator)
        assert len(batch.clean) == len(batch.prompts) == len(batch.told) == n
        assert int(batch.told.sum()) == (n + 1) // 2
        mixed += len(set(batch.prompts)) > 1
        for row, (prompt, told) in enumerate(zip(batch.prompts, batch.told.tolist(), strict=True)):
            pool, names = (sets.target, sets.prompts) if told else (sets.other, sets.other_prompts)
            found = [names[i] for i in range(len(pool)) if torch.equal(pool[i], batch.clean[row])]
            assert prompt in found
    assert mixed >= 4


def test_ddms_loss_is_the_mse_of_both_sets_and_the_indicators(tiny_lens: DiffusionLens) -> None:
    model, task = tiny_lens.model, ddm_task(tiny_lens, alpha=0.3, mse_weight=0.7, batch_size=6)
    sets = training_sets(task, Progress())
    scheduler, shape = model.scheduler(4), LoraShape(2, 4.0, ("to_q",), ("q_proj",))
    with model.lock, adapters(model, shape, seed=1) as adapted, torch.no_grad():
        for parameter in adapted.parameters:
            parameter.data.normal_(generator=torch.Generator().manual_seed(4)).mul_(0.1)
        loss = ddm_loss(task, sets, adapted, Nothing(), scheduler, torch.Generator().manual_seed(3))
        generator = torch.Generator().manual_seed(3)
        batch = draw_batch(sets, 6, generator)
        noised = add_noise(scheduler, batch.clean, generator)
        errors = []
        for row, prompt in enumerate(batch.prompts):
            one = slice(row, row + 1)
            guess = model.predict(noised.x[one], noised.t[one], encode(model, prompt, 1, adapted))
            errors.append(float((guess - noised.target[one]).square().mean()))
    assert float(loss) == pytest.approx(0.7 * np.mean(errors) + 0.3 * np.log(2), rel=1e-4)
    only_target = 0.7 * np.mean([e for e, told in zip(errors, batch.told, strict=True) if told]) + 0.3 * np.log(2)
    assert abs(float(loss) - only_target) > 1e-4  # the fault of 0.4: the MSE saw the target set alone


def test_ddm_clips_values_and_not_norms(tiny_lens: DiffusionLens, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    real = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(
            max(float(p.grad.abs().max()) for g in self.param_groups for p in g["params"] if p.grad is not None)
        )
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    options = DDMOptions(iterations=2, rank=2, n_other=6, clip=1e-6)
    DDM().fit(tiny_lens, "gender", {"female": 0.5, "male": 0.5}, options, prompts=PROMPTS, seeds=SEEDS)
    assert seen == pytest.approx([1e-6] * 2)


def test_presets_are_options_and_say_what_differs() -> None:
    for method in METHODS.values():
        for name, preset in method.presets.items():
            method.options.parse(dict(preset.options), where=name)
            assert preset.differs.endswith(".") and len(preset.differs) > 40
    code = DDMOptions.parse(dict(DDM.presets["as the authors' code"].options))
    assert (code.mse_weight, code.alpha, code.lr, code.clip) == (0.95, 0.05, 1e-5, 1.0)
    assert (code.rank, code.lora_alpha, code.iterations * code.batch_size) == (8, 32.0, 4000)


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
