"""How a picture on disk is read, for training and for evaluation alike."""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


def read_image(path: Path) -> Pixels:
    """RGB `[H, W, 3]`; raises FileNotFoundError where it is not readable."""
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if bgr is None:
        raise FileNotFoundError(f"{path}: not a readable image")
    return np.ascontiguousarray(bgr[..., ::-1]).astype(np.uint8)
