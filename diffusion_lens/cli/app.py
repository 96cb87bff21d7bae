"""The one command and its subcommands."""

from __future__ import annotations

import typer

from diffusion_lens.cli import (
    audit,
    build,
    compare,
    dissect,
    draw,
    fit,
    flip_books,
    judge,
    measure,
    portraits,
    scan,
    serve,
)
from diffusion_lens.cli.output import make_printable

app = typer.Typer(
    name="diffusion-lens",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    help=(
        "Open a diffusion model, see which features decide who appears in its images, turn them, and measure "
        "what happens.\n\nStart with the bundled model:\n\n"
        "  python -m diffusion_lens generate 'a portrait of a firefighter' --turn gender=male:0\n\n"
        "  python -m diffusion_lens sweep 'a portrait of a firefighter' --html sweep.html\n\n"
        "  python -m diffusion_lens serve\n\n"
        "Every command explains itself with --help."
    ),
)
for family in (draw, measure, judge, audit, compare, dissect, fit, flip_books, scan, build, serve):
    family.register(app)
app.add_typer(portraits.app, name="portraits")


def main() -> None:
    """Run the command line; exits with 0, with 1 where a check did not hold, with 2 for a mistake in the call."""
    make_printable()
    app()
