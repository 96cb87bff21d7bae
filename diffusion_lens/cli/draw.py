"""``generate`` and ``attribute``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from diffusion_lens.base.edits import describe
from diffusion_lens.base.files import atomic_path
from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.types import Generation, LensError
from diffusion_lens.base.where import parse_where
from diffusion_lens.cli.console import (
    SHARE_COLUMNS,
    guarded,
    kept,
    progress,
    save_html,
    say,
    share_row,
    show_json,
    show_table,
)
from diffusion_lens.cli.options import (
    AttributeOption,
    HtmlOption,
    JsonOption,
    Opening,
    PromptArgument,
    Series,
    TargetOption,
    batch_of,
    parse_turn,
    with_flags,
)
from diffusion_lens.results.as_json import figures_json
from diffusion_lens.results.measurement import Figures

if TYPE_CHECKING:
    from diffusion_lens.lens.lens import DiffusionLens

PICTURES = (".png", ".webp", ".jpg", ".jpeg")


def register(app: typer.Typer) -> None:
    """Add this family's commands."""
    app.command("generate")(generate)
    app.command("attribute")(attribute)


@guarded
@with_flags
def generate(
    prompt: PromptArgument = None,
    turn: Annotated[
        list[str] | None,
        typer.Option("--turn", help="Turn features, as attribute=class:β (1 changes nothing); may be repeated."),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(help="Turn features only there on the site's map: rows=0-1,cols=2-3, or a picture '..##/..##'."),
    ] = None,
    series: Series = Series(8),
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the lens's own by default.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the lens's own by default.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="A picture file for a sheet, or a folder.")] = Path(
        "images.png"
    ),
    opening: Opening = Opening(),
    as_json: JsonOption = False,
) -> None:
    """Draw images and read them; with --turn, draw the same seeds unedited and edited.

    The sheet shows unedited images above the edited ones of the same seeds.

      python -m diffusion_lens generate 'a portrait of a nurse' -n 16

      python -m diffusion_lens generate '' --turn gender=male:2 --turn age=old:1.5 --out pair.png --json

      python -m diffusion_lens generate 'a portrait of a nurse' --turn gender=male:2 --where rows=0-1
    """
    if out.suffix and out.suffix.lower() not in PICTURES:
        raise LensError(f"Pictures are written as {', '.join(PICTURES)}, or into a folder; '{out.name}' is neither.")
    opened = opening.open()
    request = series.request(opened, prompt, n_steps=steps, guidance_scale=guidance)
    size = batch_of(opened, series.batch_size)
    turns = [parse_turn(opened, text) for text in turn or ()]
    if where is not None:
        if not turns:
            raise LensError("--where says where to turn features; say what to turn with --turn.")
        place = parse_where(where, opened.sae.cfg.spatial)
        turns = [replace(own, where=place) for own in turns]
    with progress("drawing") as bar:
        base = opened.generate(request, batch_size=size, progress=bar.work)
    drawn = [base]
    if turns:
        with progress("drawing with the turn") as bar:
            drawn.append(opened.generate(request, *turns, batch_size=size, progress=bar.work))
    written = save_images(drawn, out)
    measured = opened.measure(drawn[-1], reference=base if turns else None)
    found = {a.name: measured[a.name] for a in opened.attributes}
    say(f"Wrote {written[0]}" + (f" and {len(written) - 1} more" if len(written) > 1 else ""))
    in_words = describe(drawn[-1].edit) if drawn[-1].edit else None
    read = {name: figures_json(own) for name, own in found.items()}
    plain = {"request": to_plain(request), "edit": in_words, "files": written, "read": read}
    with kept("generate", lambda: plain):
        if as_json:
            show_json(plain)
            return
        for name, figures in found.items():
            show_figures(name, figures)


def save_images(drawn: list[Generation], out: Path) -> list[str]:
    """Write a sheet (rows of unedited above edited), or one PNG per image into a folder; returns the paths."""
    from PIL import Image

    from diffusion_lens.portraits.draw import sheet

    if out.suffix.lower() in PICTURES:
        columns = min(8, len(drawn[0].images))
        starts = range(0, len(drawn[0].images), columns)
        rows = [_padded(g.images[start : start + columns], columns) for start in starts for g in drawn]
        with atomic_path(out) as partial:
            sheet(np.concatenate(rows), columns).save(partial)
        return [str(out)]
    written = []
    for generation, kind in zip(drawn, ("", "-edited"), strict=False):
        for seed, image in zip(generation.request.seeds, generation.images, strict=True):
            path = out / f"{seed}{kind}.png"
            with atomic_path(path) as partial:
                Image.fromarray(image).save(partial)
            written.append(str(path))
    return written


def _padded(images: np.ndarray, n: int) -> np.ndarray:
    missing = np.full((n - len(images), *images.shape[1:]), 255, np.uint8)
    return np.concatenate([images, missing])


def show_figures(name: str, found: Figures) -> None:
    """Print the shares of one attribute, and what moved against the unedited images."""
    show_table(f"{name}, {found.n_uncertain} undecided", SHARE_COLUMNS, map(share_row, found.shares))
    if found.measurement.invalid_note:
        say(found.measurement.invalid_note)
    ratio = found.log_ratio_corrected
    if ratio is not None:
        say(f"ln({ratio.numerator} / {ratio.denominator}) = {ratio.text}")
        if ratio.note:
            say(ratio.note)
    say(f"FD {found.fd:.3f}; a balanced model shows up to {found.fd_floor:.3f} at this n.")
    if found.agreement:
        kept = ", ".join(f"{key} {value:.0%}" for key, value in found.agreement.items())
        say(f"Images that kept their class: {kept}")


@guarded
@with_flags
def attribute(
    prompt: PromptArgument = None,
    attribute: AttributeOption = "gender",
    target: TargetOption = None,
    series: Series = Series(64),
    top: Annotated[int, typer.Option(help="How many features to show.")] = 15,
    method: Annotated[
        str, typer.Option(help="integrated_gradients, gradient_x_activation or activation_difference.")
    ] = "integrated_gradients",
    opening: Opening = Opening(),
    as_json: JsonOption = False,
    html: HtmlOption = None,
) -> None:
    """Find the features that speak for a class in these images.

    python -m diffusion_lens attribute 'a portrait of a doctor' --attribute gender --target male

    python -m diffusion_lens attribute '' -a age -t old --top 30 --html age.html
    """
    opened = opening.open()
    wanted = opened.attribute_named(attribute)
    target = target or opened.setting(attribute).target
    wanted.index(target)
    opened.attributions[attribute].top_k(top, target=target)  # refuses a number of features that there is not
    request, size = series.request(opened, prompt), batch_of(opened, series.batch_size)
    with progress("drawing") as bar:
        drawn = opened.generate(request, capture=True, batch_size=size, progress=bar.work)
    found = opened.attribute(drawn, attribute, method=method)
    features = found.top_k(top, target=target)
    if html is not None:
        from diffusion_lens.plots import attribution_figure, describe_attribution

        figure = attribution_figure(found, target, k=top)
        save_html(html, f"Features for {attribute} = {target}", [(figure, describe_attribution(found, target, k=top))])
    rows = _feature_rows(opened, features.ids, features.scores)
    told = to_plain(found, without="scores")
    plain = {"request": to_plain(drawn.request), "attribution": told, "target": target, "features": rows}
    with kept("attribute", lambda: plain):
        if as_json:
            show_json(plain)
            return
        show_table(
            f"Features for {attribute} = {target}, {found.method} over {found.n_images} images",
            ("feature", "score", "fires on", "label"),
            [(str(r["id"]), f"{r['score']:+.4f}", f"{r['density']:.2%}", r["label"]) for r in rows],
        )
    say(f"Completeness gap {found.completeness_gap:.1e}; scores are changes of the probe's probability.")


def _feature_rows(lens: DiffusionLens, ids: tuple[int, ...], scores: tuple[float, ...]) -> list[dict[str, Any]]:
    atlas = lens.atlas
    return [
        {"id": i, "score": score, "density": float(atlas.density[i]), "label": atlas.labels[i]}
        for i, score in zip(ids, scores, strict=True)
    ]
