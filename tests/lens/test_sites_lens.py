"""Lenses at two sites of one model, used as one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fits import quick
from lens_fixtures import PROMPTS

from diffusion_lens.base.types import Intervention, LensError
from diffusion_lens.fit.run import Models, fit
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.lens.sites import SitesLens
from diffusion_lens.model.pipelines import at_site

SITES = ("mid_block", "up_blocks.0")


@pytest.fixture(scope="module")
def lenses(tiny_fit_models: Models, tmp_path_factory: pytest.TempPathFactory) -> list[DiffusionLens]:
    """The same model at its bottleneck and behind its first up-block."""
    folder = tmp_path_factory.mktemp("sites")
    made = []
    for site in SITES:
        models = replace(tiny_fit_models, model=at_site(tiny_fit_models.model, site))
        fit(quick(hook_name=site), folder / site, work=folder / "work", models=models)
        made.append(DiffusionLens.from_pretrained(Path(folder / site)))
    return made


def test_features_of_two_sites_are_attributed_and_turned_together(lenses: list[DiffusionLens]) -> None:
    both = SitesLens.join(*lenses)
    assert both.sites == SITES
    found = both.attribute("gender", PROMPTS[0], range(6))
    best = both.top(found, "male", 6)
    assert len(best) <= 6 and all(name.rpartition(":")[0] in SITES for name, _ in best)
    assert [score for _, score in best] == sorted((score for _, score in best), reverse=True)
    plain = both.generate(PROMPTS[0], seeds=range(3))
    for sampler in ("symmetric", "asymmetric"):
        turned = both.generate(
            PROMPTS[0], *both.interventions(found, "male", 6.0, n_features=20, sampler=sampler), seeds=range(3)
        )  # type: ignore[arg-type]
        assert not np.array_equal(turned.images, plain.images) and turned.edit is not None
        still = both.generate(
            PROMPTS[0], *both.interventions(found, "male", 1.0, n_features=20, sampler=sampler), seeds=range(3)
        )  # type: ignore[arg-type]
        assert np.array_equal(still.images, plain.images)
    # Features of one site alone: what that site's own lens draws.
    alone = lenses[1].feature_set("gender", "male")
    one = Intervention.at_beta(alone, "scale", 4.0, sampler="symmetric")
    assert np.array_equal(
        both.generate(PROMPTS[0], one, seeds=range(3)).images,
        lenses[1].generate(PROMPTS[0], one, seeds=range(3)).images,
    )


def test_edits_of_two_sites_are_told_apart(lenses: list[DiffusionLens]) -> None:
    both = SitesLens.join(*lenses)
    own = [Intervention.at_beta(lens.feature_set("gender", "male"), "scale", 2.0) for lens in lenses]
    assert both.edit(*own).spec != both.edit(own[0]).spec
    assert both.edit(own[0]).spec == lenses[0].edit(own[0]).spec
    foreign = replace(own[0], features=replace(own[0].features, sae_id="0" * 16), opposite=None)
    with pytest.raises(LensError, match="none of the sites"):
        both.edit(foreign)


def test_lenses_that_do_not_belong_together_are_refused(lenses: list[DiffusionLens], tiny_lens: DiffusionLens) -> None:
    with pytest.raises(LensError, match="two lenses"):
        SitesLens.join(lenses[0])
    with pytest.raises(LensError, match="same site"):
        SitesLens.join(lenses[0], lenses[0])
