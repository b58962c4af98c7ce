"""Handwritten digits, and printed letters that no model of digits has met.

The digits are scikit-learn's: 1,797 images of 8 x 8 pixels from 0 to 16, which 43 people wrote (Alpaydin and Kaynak,
1998). The letters are drawn with matplotlib's DejaVu fonts, turned, stretched and shifted at random, and made as small
in the same way: the number of black pixels in each block of 4 x 4. Their strokes are about as thick as those of the
digits. Letters that look like digits (B, G, I, O, Q, S, Z) are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sklearn.datasets import load_digits
from torch import Tensor

LETTERS = "ACDEFHJKLMNPRTUVWXY"
FACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono")


class Digits(NamedTuple):
    """Images ``(n, 64)`` from 0 to 1 with their labels 0 to 9, and letters, which have none."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    letters: Tensor


def read_digits(seed: int = 0, *, training: int = 600, letters: int = 600) -> Digits:
    """Read the digits, split at random, and draw letters."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(images / 16, dtype=torch.float32)[order]
    y = torch.tensor(labels)[order]
    return Digits(x[:training], y[:training], x[training:], y[training:], draw_letters(letters, seed))


def draw_letters(count: int, seed: int = 0) -> Tensor:
    """Draw letters ``(count, 64)``, each with a face, a size, an angle and a place of its own."""
    draw = np.random.default_rng(seed)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(str(folder / f"{face}.ttf"), 80) for face in FACES]
    images = np.zeros((count, 64), np.float32)
    for row in range(count):
        image = Image.new("L", (160, 160))
        letter, font = str(draw.choice(list(LETTERS))), fonts[draw.integers(len(fonts))]
        ImageDraw.Draw(image).text((80, 80), letter, fill=255, font=font, anchor="mm")
        image = image.rotate(draw.uniform(-12, 12), Image.Resampling.BILINEAR)
        image = image.crop(image.getbbox())
        height, width = draw.integers(29, 33), draw.integers(17, 26)
        image = image.resize((int(width), int(height)), Image.Resampling.BILINEAR).filter(ImageFilter.MaxFilter(3))
        ink = Image.new("L", (32, 32))
        ink.paste(image, (int(draw.integers(0, 33 - width)) // 2 + 2, int(draw.integers(0, 33 - height))))
        blocks = (np.asarray(ink) > 127).reshape(8, 4, 8, 4).sum((1, 3))
        images[row] = blocks.reshape(-1) / 16
    return torch.from_numpy(images)
