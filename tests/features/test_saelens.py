"""SAELens itself opens our SAEs and we open its own; skipped where it is not installed.

It is not among the development requirements, for it brings a language-model stack (some 45 packages, a third of a
gigabyte): ``pip install sae-lens``. Without it, ``test_sae_files.py`` checks the same against a twin of its formulas
and a recorded SAE.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_helpers import random_maps, random_sae

from diffusion_lens.features.sae import SparseAutoencoder

REASON = "SAELens is not installed: pip install sae-lens"
sae_lens: Any = pytest.importorskip("sae_lens", reason=REASON)

SHIPPED = Path(__file__).parents[2] / "assets"
EXACT = {"atol": 1e-5, "rtol": 0.0}


@pytest.mark.parametrize("lens", ["portraits", "portraits-unconditional"])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_saelens_opens_the_shipped_saes(lens: str, dtype: str | None) -> None:
    folder = SHIPPED / lens / "sae"
    theirs, ours = sae_lens.SAE.load_from_disk(folder, dtype=dtype), SparseAutoencoder.load(folder)
    assert isinstance(theirs, sae_lens.TopKSAE) and theirs.cfg.k == ours.cfg.k
    assert theirs.cfg.metadata.hook_name == ours.cfg.hook_name
    assert theirs.cfg.metadata.model_name == ours.cfg.model_id
    assert tuple(theirs.cfg.metadata.spatial) == ours.cfg.spatial and theirs.cfg.metadata.layout == ours.cfg.layout
    x = 5 * torch.randn(500, ours.cfg.d_in, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), ours.encode(x), **EXACT)
        torch.testing.assert_close(theirs(x), ours(x), **EXACT)
        assert (theirs.encode(x) > 0).sum(1).float().mean() <= ours.cfg.k


@pytest.mark.parametrize("layout", ["position", "map"])
@pytest.mark.parametrize("apply", [True, False])
def test_there_and_back(layout: str, apply: bool, tmp_path: Path) -> None:
    sae = random_sae(layout, apply_b_dec_to_input=apply)
    sae.save(tmp_path / "ours")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    x = sae.to_samples(random_maps(9))
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), sae.encode(x), **EXACT)
        torch.testing.assert_close(theirs(x), sae(x), **EXACT)
    theirs.save_model(tmp_path / "theirs")
    back = SparseAutoencoder.load(tmp_path / "theirs")
    assert back.cfg == sae.cfg and back.sae_id == sae.sae_id


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("apply", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_saes_that_saelens_made_are_opened(rescale: bool, apply: bool, trained: bool, tmp_path: Path) -> None:
    kind = "TopKTrainingSAE" if trained else "TopKSAE"
    cfg = getattr(sae_lens, f"{kind}Config")(
        d_in=16, d_sae=64, k=5, rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=apply
    )
    theirs = getattr(sae_lens, kind)(cfg)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    theirs.save_model(tmp_path)
    if trained:
        theirs.save_inference_model(str(tmp_path / "inference"))
    x = torch.randn(200, 16, generator=generator)
    for folder in (tmp_path, tmp_path / "inference") if trained else (tmp_path,):
        ours = SparseAutoencoder.load(folder)
        with torch.no_grad():
            torch.testing.assert_close(ours.encode(x), theirs.encode(x), **EXACT)
            torch.testing.assert_close(ours(x), theirs(x), **EXACT)
        # Ours again, without what SAELens leaves to the reader.
        ours.save(tmp_path / "again")
        assert not json.loads((tmp_path / "again" / "cfg.json").read_text())["rescale_acts_by_decoder_norm"]
        with torch.no_grad():
            torch.testing.assert_close(sae_lens.SAE.load_from_disk(tmp_path / "again").encode(x), ours.encode(x))
