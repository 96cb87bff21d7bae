"""``serve``."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import urllib.request
from typing import TYPE_CHECKING, Annotated

import typer

from diffusion_lens.base.assets import assets_folder
from diffusion_lens.base.types import LensError
from diffusion_lens.cli.console import guarded
from diffusion_lens.cli.options import DEFAULT_RUN, open_lens, with_flags
from diffusion_lens.lens.bundled import lenses_to_open
from diffusion_lens.model.run_options import RunOptions

if TYPE_CHECKING:
    from diffusion_lens.studio.status import Status

FIRST_PORT = 7860
"""Gradio's own."""
MAX_STATUS = 2**20


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
    mcp: Annotated[
        bool, typer.Option("--mcp", help="Also answer as an MCP server, at /gradio_api/mcp/; needs the extra 'mcp'.")
    ] = False,
    status: Annotated[
        bool, typer.Option("--status", help="Say how the app that runs at this host and port is doing, and end.")
    ] = False,
    running: RunOptions = DEFAULT_RUN,
) -> None:
    """Open the app in the browser: features, sliders, images, ratios, live.

    python -m diffusion_lens serve

    python -m diffusion_lens serve --lens runs/my-lens --port 8000

    python -m diffusion_lens serve --lens runs/my-lens --lens runs/another

    python -m diffusion_lens serve --mcp

    python -m diffusion_lens serve --status --port 8000
    """
    if status:
        typer.echo("\n".join(running_app(host, port or FIRST_PORT).lines))
        return
    if mcp and importlib.util.find_spec("mcp") is None:
        raise LensError("Serving MCP needs one more package; install it with: pip install 'diffusion-lens[mcp]'.")
    from diffusion_lens.ui import launch

    names = lenses_to_open(lens or (), os.environ.get("DIFFUSION_LENS", ""), assets_folder())
    running = running.model_copy(update={"preview": preview})
    launch(*(open_lens(name, running) for name in names), server_name=host, server_port=port, share=share,
           mcp_server=mcp)  # fmt: skip


def running_app(host: str, port: int) -> Status:
    """How the app at an address is doing; raises ``LensError`` where none answers."""
    from diffusion_lens.base.plain import from_plain
    from diffusion_lens.studio.status import Status

    address = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    try:
        with urllib.request.urlopen(f"{address}/status", timeout=10) as answer:
            return from_plain(Status, json.loads(answer.read(MAX_STATUS)))
    except (OSError, ValueError, http.client.HTTPException):
        raise LensError(f"No app of this program answers at {address}; say --port, and --host where it is.") from None
