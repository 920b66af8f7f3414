"""Seeded weights, a patch and an image for the golden file.

The file holds what the authors' networks and inference, written down in PyTorch from their Lua
code, made of these: ``docs/parity.md`` says how. numpy's generator makes the numbers, because its
stream is guaranteed to stay the same.
"""

import numpy as np
import torch

SEED = 5
SCALES = [0.3535534, 0.5, 1.0]
PATCH, IMAGE_HW = 64, (41, 70)
PROPOSALS = 24


def weights(state):
    """Return seeded values for a state dict, by its names."""
    rng = np.random.default_rng(SEED)
    found = {}
    for name in sorted(state):
        shape = tuple(state[name].shape)
        noise = rng.standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            fan_in = int(np.prod(shape[1:]))
            value = noise * np.sqrt((2 if len(shape) == 4 else 1) / fan_in)
        elif name.endswith("running_var"):
            value = 0.75 + 0.1 * np.abs(noise)
        elif name.endswith("norm.weight"):
            value = 0.6 + 0.05 * noise
        else:
            value = 0.1 * noise
        found[name] = torch.from_numpy(np.asarray(value, np.float32))
    # Masks that end inside of their windows.
    found["head.mask.fc.weight"] *= 3
    found["head.mask.fc.bias"] -= 2
    return found


def picture(height, width):
    """Return (3, height, width) float32 of whole numbers from 0 to 255, smooth in parts."""
    rng = np.random.default_rng([SEED, height])
    coarse = rng.integers(0, 256, (3, -(-height // 8), -(-width // 8)))
    fine = rng.integers(-20, 21, (3, height, width))
    image = coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width] + fine
    return torch.from_numpy(image.clip(0, 255).astype(np.float32))
