"""Files for the tests of data: a folder with real data where there is one, and small images made on the spot."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def real_data() -> Path:
    """The folder with mnist/ and cifar10/; tests that need it are skipped where it is absent."""
    default = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("WIDEBERTH_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}: set WIDEBERTH_DATA to a folder with mnist/ and cifar10/")
    return folder


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    """Makes a random picture: `picture(seed, height, width)`."""

    def make(seed: int, height: int = 6, width: int = 6) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return make
