"""What a Hugging Face Space runs, and `python app.py`: open the lenses, show the app, a page for each."""

import argparse
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a spinning neighbour makes every step tens of times slower

from diffusion_lens import ui
from diffusion_lens.base.assets import assets_folder
from diffusion_lens.base.types import LensError
from diffusion_lens.lens.bundled import lenses_to_open
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.model.run_options import RunOptions
from diffusion_lens.ui.gpu import load_before_lending


def main() -> None:
    """Open the lenses and serve them until the process is stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lens", action="append", default=[], help="lens folder or hub id; again for another page")
    names = lenses_to_open(parser.parse_args().lens, os.environ.get("DIFFUSION_LENS", ""), assets_folder())
    options = RunOptions.from_environment(os.environ)
    lenses = [DiffusionLens.from_pretrained(name, options=options) for name in names]
    for lens in lenses:
        load_before_lending(lens)
    ui.launch(*lenses)


if __name__ == "__main__":
    try:
        main()
    except LensError as error:
        print(error, file=sys.stderr)
        sys.exit(2)  # as the command line does for what a person can mend
