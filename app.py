"""What a Hugging Face Space runs, and `python app.py`: open the lens, show the app."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a spinning neighbour makes every step tens of times slower

from diffusion_lens import ui
from diffusion_lens.lens import DiffusionLens

if __name__ == "__main__":
    folder = os.environ.get("DIFFUSION_LENS", "assets/portraits")
    ui.launch(DiffusionLens.from_pretrained(folder, device=os.environ.get("DIFFUSION_LENS_DEVICE", "cpu")))
