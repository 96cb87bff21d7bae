"""Images of a tiny autoencoder, shown before the full decode and never measured (fidelity class E3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion_lens.base.types import GenerationRequest
    from diffusion_lens.model.generate import OnLatents
    from diffusion_lens.model.pipelines import DiffusionModel
    from diffusion_lens.studio.state import View

R = TypeVar("R")


@dataclass(frozen=True)
class Preview(Generic[R]):
    """What a view is about to look like; nothing was read in its previews.

    Attributes:
        name: of the tiny autoencoder.
        before: previews ``uint8 [n, H, W, 3]``, or the row of full images with its readings where that is there.
        after: previews ``uint8 [n, H, W, 3]``; ``None`` until the edited images are drawn.
    """

    view: View
    name: str
    before: np.ndarray | R
    after: np.ndarray | None


@dataclass
class Sight(Generic[R]):
    """The previews of one drawing: each row is shown once, and kept to be compared with its full images.

    Attributes:
        turned: whether the view differs from the unedited run.
        go_on: called after every batch; may raise to end the drawing before the full decode.
    """

    model: DiffusionModel
    view: View
    turned: bool
    show: Callable[[Preview[R]], None]
    go_on: Callable[[], None]
    before: np.ndarray | None = field(default=None, init=False)
    after: np.ndarray | None = field(default=None, init=False)

    def unedited(self) -> OnLatents:
        """Shows the unedited row, which is the edited one too where nothing is turned."""

        def show(images: np.ndarray) -> None:
            self.before = images
            self.show(Preview(self.view, self._name, images, None if self.turned else images))

        return self._once(show)

    def edited(self, before: R) -> OnLatents:
        """Shows the edited row beside the full unedited one."""

        def show(images: np.ndarray) -> None:
            self.after = images
            self.show(Preview(self.view, self._name, before, images))

        return self._once(show)

    def error(self, before: np.ndarray, after: np.ndarray) -> float | None:
        """Mean absolute difference, in levels of 255, of the previews shown from these full images."""
        pairs = ((self.before, before), (self.after, after))
        off = [np.abs(seen.astype(np.int16) - full).mean() for seen, full in pairs if seen is not None]
        return float(np.mean(off)) if off else None

    @property
    def _name(self) -> str:
        return "" if self.model.preview is None else self.model.preview.name

    def _once(self, show: Callable[[np.ndarray], None]) -> OnLatents:
        """Calls ``show`` when the latents of all seeds are there; a batch that was halved comes a second time."""
        seen: dict[int, np.ndarray] = {}
        shown = False

        def on_latents(request: GenerationRequest, latents: Tensor) -> None:
            nonlocal shown
            if not shown:
                seen.update(zip(request.seeds, self.model.decode_preview(latents), strict=True))
            if not shown and len(seen) == len(self.view.seeds):
                shown = True
                show(np.stack([seen[seed] for seed in self.view.seeds]))
            self.go_on()

        return on_latents
