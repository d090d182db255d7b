"""Writes golden/resample.json: a small picture and what Pillow makes of it.

    python tests/parity/make_image_golden.py
"""

import json
import pathlib

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 13, 9
pixels = np.random.default_rng(5).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
picture = Image.fromarray(pixels)
FILTERS = {"box": Image.BOX, "bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC, "lanczos": Image.LANCZOS}
SIZES = [(5, 4), (13, 3), (17, 20)]

golden = {
    "width": WIDTH,
    "height": HEIGHT,
    "pixels": pixels.flatten().tolist(),
    "resized": [
        {"filter": name, "width": w, "height": h, "pixels": list(picture.resize((w, h), number).tobytes())}
        for name, number in FILTERS.items()
        for w, h in SIZES
    ],
}
folder = pathlib.Path(__file__).resolve().parent.parent / "golden"
(folder / "resample.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")
