"""``python -m diffusion_lens``: everything the app does, and the making of a lens, from the command line."""

from __future__ import annotations

import os

# Read by OpenMP when torch loads: waiting threads that spin make every run slow beside a busy neighbour.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Libraries' remarks about parts that nothing here uses would bury what a command says.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

from diffusion_lens.cli.app import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
