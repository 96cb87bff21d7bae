"""``flip-books``: frames for instant dragging in the app, drawn ahead of time and kept in the lens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffusion_lens.base.files import check_writable
from diffusion_lens.base.types import LensError
from diffusion_lens.cli.compare import WorkOption
from diffusion_lens.cli.console import guarded, progress, say, show_json, show_table
from diffusion_lens.cli.options import JsonOption, Opening, checked_prompt, with_flags


def register(app: typer.Typer) -> None:
    """Add this family's command."""
    app.command("flip-books")(flip_books)


@guarded
@with_flags
def flip_books(
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="May be repeated; the lens's suggested ones by default.")
    ] = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option("--attribute", "-a", help="May be repeated; all that the lens steers by default."),
    ] = None,
    first_seed: Annotated[int, typer.Option(min=0, help="The seeds drawn are eight from here on.")] = 0,
    work: WorkOption = Path("runs/flip-books"),
    opening: Opening = Opening(),
    as_json: JsonOption = False,
) -> None:
    """Draw the recommended turns at some 40 strengths, so that dragging in the app shows stored frames at once.

    Every book is stored in the lens as soon as it is drawn; stopped, the same command goes on.

    python -m diffusion_lens flip-books --prompt 'a portrait of a nurse' --attribute gender

    python -m diffusion_lens flip-books --lens my-lens
    """
    from diffusion_lens.fit import flip_books as drawing
    from diffusion_lens.results.flip_book import MAX_BOOKS

    lens = opening.open()
    check_writable(lens.folder / "lens.json")
    prompts = [checked_prompt(lens, text) for text in prompt or ()]
    plan = drawing.plan_of(lens, prompts, attribute or ())
    if len(plan) > MAX_BOOKS:
        raise LensError(f"That makes {len(plan)} flip-books, and a lens holds {MAX_BOOKS}; name fewer with --prompt.")
    books = []
    with progress("drawing") as bar:
        for book in drawing.flip_books(lens, plan, work=work, first_seed=first_seed, progress=bar.work):
            lens.store(book)
            books.append(book)
    if as_json:
        show_json([
            {"prompt": b.request.prompt, "attribute": b.attribute.name, "betas": list(b.betas), "bytes": len(b.sprite),
             "error": b.error} for b in books
        ])  # fmt: skip
        return
    columns = ("prompt", "attribute", "strengths", "kB", "off by, of 255")
    rows = [
        (b.request.prompt or "–", b.attribute.name, str(len(b.betas)), f"{len(b.sprite) / 1000:.0f}", f"{b.error:.2f}")
        for b in books
    ]
    show_table(f"Flip-books in {lens.folder}", columns, rows)
    say("Look at them with: python -m diffusion_lens serve --lens " + str(lens.folder))
