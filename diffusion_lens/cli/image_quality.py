"""The flags that ask for image quality, and what is opened for them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import LensError

if TYPE_CHECKING:
    from diffusion_lens.judging.readers import ClipReader
    from diffusion_lens.lens.lens import DiffusionLens
    from diffusion_lens.measuring.quality import FeatureSource
    from diffusion_lens.studies.audit.rows import Measures

UNEDITED = "unedited"
FEATURES = ("inception", "classifier", "clip")


@dataclass(frozen=True)
class QualityFlags:
    """Which image qualities are asked for; nothing is measured, opened or fetched that no flag names."""

    fid: str = ""
    fid_features: str = FEATURES[0]
    keep_statistics: str = ""
    inception: str = ""
    inception_score: bool = False
    clip: str = ""
    offline: bool = False

    def __post_init__(self) -> None:
        if self.fid_features not in FEATURES:
            raise LensError(f"--fid-features is {', '.join(FEATURES)}; '{self.fid_features}' is none of them.")
        if self.fid_features != FEATURES[0] and not self.fid:
            raise LensError("--fid-features says whose features --fid is of; add --fid.")
        if self.keep_statistics and not (self.fid and Path(self.fid).is_dir()):
            raise LensError("--keep-statistics keeps those of the folder that --fid names; name a folder of images.")
        if self.keep_statistics and Path(self.keep_statistics).suffix != ".safetensors":
            raise LensError(f"Statistics are kept as .safetensors; '{self.keep_statistics}' is another kind of file.")
        if self.inception and not self.wants_inception:
            raise LensError("--inception gives the weights for --fid or --inception-score; add one of them.")
        if self.fid_features == "clip" and not self.clip:
            raise LensError("--fid-features clip needs a CLIP model; name one with --clip.")

    @property
    def wants_inception(self) -> bool:
        """Whether Inception v3 is needed."""
        return self.inception_score or bool(self.fid and self.fid_features == "inception")

    def words(self) -> list[str]:
        """The flags as they are typed; those at their defaults are left out."""
        found: list[str] = []
        for name, value in asdict(self).items():
            if value != getattr(QualityFlags, name):
                flag = f"--{name.replace('_', '-')}"
                found += [flag] if value is True else [flag, str(value)]
        return found

    def open(self, lens: DiffusionLens, progress: Progress | None = None) -> Measures | None:
        """Load what the flags name; ``None`` without any. ``progress``: of the images of a reference folder."""
        if not (self.fid or self.inception_score or self.clip):
            return None
        from diffusion_lens.measuring.quality import inception_source, load_reference
        from diffusion_lens.studies.audit.rows import UNEDITED as SAME_SEEDS
        from diffusion_lens.studies.audit.rows import Measures

        device = str(lens.device)
        inception = inception_source(self.inception or None, device=device) if self.wants_inception else None
        clip = self._clip(device) if self.clip else None
        fid = self._features(lens, inception, clip) if self.fid else None
        known = None
        if fid is not None and self.fid != UNEDITED:
            known = load_reference(self.fid, fid, progress=progress)
            if self.keep_statistics:
                known.save(Path(self.keep_statistics))
        return Measures(
            fid=fid,
            reference=known,
            reference_name=SAME_SEEDS if known is None else self.fid,
            inception=inception if self.inception_score else None,
            clip=clip,
        )

    def _clip(self, device: str) -> ClipReader:
        from diffusion_lens.judging.readers import ClipConfig, ClipReader

        # Nothing is classified here, so that no prompts are embedded.
        config = ClipConfig(model_id=self.clip, prompts={}, face_prompts={})
        return ClipReader.load(config, device=device, offline=self.offline)

    def _features(self, lens: DiffusionLens, inception: FeatureSource | None, clip: ClipReader | None) -> FeatureSource:
        from diffusion_lens.measuring.quality import classifier_source, clip_source

        if inception is not None and self.fid_features == "inception":
            return inception
        if clip is not None and self.fid_features == "clip":
            return clip_source(clip)
        return classifier_source(lens.classifier, f"classifier {lens.classifier.classifier_id}")


QUALITY_FLAGS: dict[str, tuple[Any, Any]] = {
    "fid": (
        Annotated[
            str,
            typer.Option(
                help="Also measure the FID from: 'unedited' (needs --turn), a folder of images, or a statistics file "
                "(.npz of pytorch-fid or clean-fid, .safetensors).",
                metavar="unedited|FOLDER|FILE",
            ),
        ],
        "",
    ),
    "fid_features": (
        Annotated[str, typer.Option(help=f"Whose features --fid compares, always named: {', '.join(FEATURES)}.")],
        FEATURES[0],
    ),
    "keep_statistics": (
        Annotated[
            str,
            typer.Option(help="Also keep what was read of --fid's folder, for --fid next time.", metavar="FILE"),
        ],
        "",
    ),
    "inception": (
        Annotated[
            str,
            typer.Option(help="Inception v3's weights; looked for in the weights folder by default.", metavar="FILE"),
        ],
        "",
    ),
    "inception_score": (
        Annotated[bool, typer.Option("--inception-score", help="Also measure the Inception score.")],
        False,
    ),
    "clip": (
        Annotated[
            str,
            typer.Option(
                help="Also measure CLIP-T, and with --turn CLIP-I, with this CLIP; a hub id is fetched once. "
                "The paper's is openai/clip-vit-large-patch14.",
                metavar="FOLDER|ID",
            ),
        ],
        "",
    ),
    "offline": (Annotated[bool, typer.Option("--offline", help="Fetch no CLIP; take what this machine has.")], False),
}
