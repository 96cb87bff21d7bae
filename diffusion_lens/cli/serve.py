"""``serve``."""

from __future__ import annotations

from typing import Annotated

import typer

from diffusion_lens.cli.console import guarded
from diffusion_lens.cli.options import DEFAULT_RUN, LensOption, open_lens, with_run_flags
from diffusion_lens.run_options import RunOptions


def register(app: typer.Typer) -> None:
    """Add this family's command."""
    app.command("serve")(serve)


@guarded
@with_run_flags
def serve(
    lens: LensOption = "",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port; the first free one from 7860.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network card.")] = "127.0.0.1",
    share: Annotated[bool, typer.Option("--share", help="Also open a public link for 72 hours.")] = False,
    running: RunOptions = DEFAULT_RUN,
) -> None:
    """Open the app in the browser: features, sliders, images, ratios, live.

    python -m diffusion_lens serve

    python -m diffusion_lens serve --lens runs/my-lens --port 8000
    """
    from diffusion_lens.ui import launch

    launch(open_lens(lens, running), server_name=host, server_port=port, share=share)
