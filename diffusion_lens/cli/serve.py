"""``serve``."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from diffusion_lens.base.assets import assets_folder
from diffusion_lens.cli.console import guarded
from diffusion_lens.cli.options import DEFAULT_RUN, open_lens, with_flags
from diffusion_lens.lens.bundled import lenses_to_open
from diffusion_lens.model.run_options import RunOptions


def register(app: typer.Typer) -> None:
    """Add this family's command."""
    app.command("serve")(serve)


@guarded
@with_flags
def serve(
    lens: Annotated[
        list[str] | None,
        typer.Option("--lens", "-l", help="Lens folder or hub id, once per page; by default the bundled ones."),
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port; the first free one from 7860.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network card.")] = "127.0.0.1",
    share: Annotated[bool, typer.Option("--share", help="Also open a public link for 72 hours.")] = False,
    preview: Annotated[
        str,
        typer.Option(
            metavar="MODEL_OR_FOLDER",
            help="A tiny autoencoder, e.g. madebyollin/taesd, that shows images of a latent model before they are "
            "decoded in full: marked as a preview and never measured. Off by default.",
        ),
    ] = "",
    running: RunOptions = DEFAULT_RUN,
) -> None:
    """Open the app in the browser: features, sliders, images, ratios, live.

    python -m diffusion_lens serve

    python -m diffusion_lens serve --lens runs/my-lens --port 8000

    python -m diffusion_lens serve --lens runs/my-lens --lens runs/another
    """
    from diffusion_lens.ui import launch

    names = lenses_to_open(lens or (), os.environ.get("DIFFUSION_LENS", ""), assets_folder())
    running = running.model_copy(update={"preview": preview})
    launch(*(open_lens(name, running) for name in names), server_name=host, server_port=port, share=share)
