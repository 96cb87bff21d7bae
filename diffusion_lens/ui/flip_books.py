"""Flip-books in the page: the sprites' addresses, which a browser fetches once and keeps."""

from __future__ import annotations

from typing import Any

from diffusion_lens.studio import flip_books
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui.quick_start import gr


def serve(studio: Studio) -> None:
    """Let pages fetch the sprites of this lens; once, when the app is built."""
    gr.set_static_paths(flip_books.sprites(studio))


def page_values(studio: Studio, view: View) -> dict[str, Any] | None:
    """What a page needs to flip through a view's book, with ``src``, the sprite's address; ``None`` without a book."""
    book = flip_books.book_for(studio, view)
    if book is None:
        return None
    # Relative, so that it works wherever the app is mounted; another drawing has another address.
    return {**book.described(), "src": f"gradio_api/file={book.file.as_posix()}?v={book.stored.digest}"}
