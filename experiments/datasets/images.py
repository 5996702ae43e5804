"""Crops and flips of uint8 images [height, width, channels], in NumPy and Pillow."""

import numpy as np


def center(pixels: np.ndarray, size: int) -> np.ndarray:
    """Shorter side to `size` (to 8/7 of it first for photographs), then the middle square."""
    height, width, _ = pixels.shape
    if (height, width) == (size, size):
        return pixels
    scale = round(size * 8 / 7) / min(height, width)
    pixels = _resize(pixels, max(size, round(height * scale)), max(size, round(width * scale)))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def augment(pixels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Shift by up to an eighth and flip (small images); random area, aspect and flip (photographs).

    Digits are not flipped: images with one channel are only shifted.
    """
    height, width, channels = pixels.shape
    if (height, width) == (size, size):
        pad = size // 8
        top, left = rng.integers(0, 2 * pad + 1, 2)
        padded = np.pad(pixels, ((pad, pad), (pad, pad), (0, 0)))
        crop = padded[top : top + size, left : left + size]
    else:
        crop = _resize(_random_area(pixels, rng), size, size)
    return crop[:, ::-1] if channels == 3 and rng.random() < 0.5 else crop


def _random_area(pixels, rng):
    height, width, _ = pixels.shape
    for _attempt in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        h, w = round(np.sqrt(area / aspect)), round(np.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            return pixels[top : top + h, left : left + w]
    return pixels


def _resize(pixels, height, width):
    from PIL import Image

    channels = pixels.shape[-1]
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return resized[..., None] if channels == 1 else resized
