"""``convert-p2`` and ``import-difflens``: what others published, in this project's form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from diffusion_lens.base.types import Attribute, LensError
from diffusion_lens.cli.console import guarded, say


def register(app: typer.Typer) -> None:
    """Add this family's commands."""
    app.command("convert-p2")(convert_p2)
    app.command("import-difflens")(import_difflens)


@guarded
def convert_p2(
    checkpoint: Annotated[Path, typer.Argument(help="A guided-diffusion checkpoint, .pt or .safetensors.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the diffusers pipeline.")],
    config: Annotated[
        Path | None,
        typer.Option(
            help="JSON with what the checkpoint cannot say: at least num_heads or num_head_channels; or p2, for the "
            "published P2 models."
        ),
    ] = None,
    keep_variance: Annotated[
        bool, typer.Option("--keep-variance", help="Keep the learned variance, for ancestral sampling.")
    ] = False,
) -> None:
    """Turn a P2 or guided-diffusion U-Net into a folder that stock diffusers opens.

    python -m diffusion_lens convert-p2 celebahq_p2.pt runs/p2 --config p2
    """
    from diffusion_lens.interop.convert_p2 import convert
    from diffusion_lens.interop.p2_format import PUBLISHED, P2Config, untold

    if not checkpoint.is_file():
        raise LensError(f"There is no file {checkpoint}.")
    settings: dict[str, Any] = {}
    if config is not None:
        published = str(config) == PUBLISHED
        settings = P2Config().model_dump() if published else P2Config.load(config).model_dump(exclude_unset=True)
    say("Converting…")
    convert(checkpoint, out, settings, keep_variance=keep_variance)
    for name, value in untold(settings).items():
        say(f"Assumed, since neither the checkpoint nor --config says it: {name} is {value}.")
    say(f"Wrote {out}; open it with diffusers, or name it as the model of a fit.")


@guarded
def import_difflens(
    sae: Annotated[Path, typer.Argument(help="Published SAE folder: cfg.json and sae.safetensors.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the lens.")],
    model_id: Annotated[str, typer.Option(help="Name of the diffusion model, e.g. its hub id.")],
    attribute: Annotated[list[str], typer.Option(help="name=class,class; may be repeated.")],
    features: Annotated[list[str], typer.Option(help="name=folder of its feature lists, <class>.pt each.")],
    probe: Annotated[list[str] | None, typer.Option(help="name=file of its h-classifier.")] = None,
    temperature: Annotated[list[str] | None, typer.Option(help="name=softmax temperature; 1 by default.")] = None,
    source: Annotated[str | None, typer.Option(help="Folder or hub id of the model; model-id by default.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 1.0,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to suggest; may be repeated.")] = None,
) -> None:
    """Make a lens from DiffLens' published SAE, feature lists and h-classifiers.

      python -m diffusion_lens import-difflens sae/ runs/p2-lens --model-id p2-celebahq --source runs/p2 \\
        --attribute gender=male,female --features gender=lists/gender --probe gender=h_gender.pt
    """
    from diffusion_lens.interop.import_difflens import PublishedAttribute
    from diffusion_lens.interop.import_difflens import import_difflens as run

    folders, probes, temperatures = _pairs(features), _pairs(probe), _pairs(temperature)
    parts = []
    for name, classes in _pairs(attribute).items():
        if name not in folders:
            raise LensError(f"Say where the feature lists of {name} lie, with --features {name}=FOLDER.")
        labels = tuple(label.strip() for label in classes.split(","))
        heat = _number(temperatures.get(name, "1"))
        file = Path(probes[name]) if name in probes else None
        parts.append(PublishedAttribute(Attribute(name, labels), Path(folders[name]), file, heat))
    manifest = run(
        sae, parts, model_id, out, source=source, n_steps=steps, guidance_scale=guidance, prompts=tuple(prompt or ())
    )
    say(f"Wrote {out}, lens {manifest.lens_id}.")


def _pairs(values: list[str] | None) -> dict[str, str]:
    pairs = [value.partition("=") for value in values or ()]
    wrong = next((name for name, equals, rest in pairs if not (name and equals and rest)), None)
    if wrong is not None:
        raise LensError(f"Write it as name=value; got '{wrong}'.")
    return {name: rest for name, _, rest in pairs}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise LensError(f"A temperature is a number; got '{text}'.") from None
