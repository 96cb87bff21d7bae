"""What a Hugging Face Space runs, and `python app.py`: open the lens, show the app."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a spinning neighbour makes every step tens of times slower

from diffusion_lens import ui
from diffusion_lens.lens import DiffusionLens
from diffusion_lens.run_options import RunOptions
from diffusion_lens.ui.gpu import load_before_lending

if __name__ == "__main__":
    folder = os.environ.get("DIFFUSION_LENS", "assets/portraits")
    lens = DiffusionLens.from_pretrained(folder, options=RunOptions.from_environment(os.environ))
    load_before_lending(lens)
    ui.launch(lens)
