"""Stand-ins for what surrounds a head: pyramids of noise, and masks that lie ready."""

import torch
import torch.nn.functional as F

from instseg_ext.methods.solo.mask_source import MaskSource


class MaskTable(MaskSource):
    """Masks (C, h, w), by cell."""

    def __init__(self, masks):
        super().__init__(tuple(masks.shape[1:]))
        self.masks = masks

    def __call__(self, cells):
        return self.masks[cells]


def pyramid(height, width, dim, num=1):
    sizes = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
    maps = {name: torch.randn(num, dim, height // s, width // s) for name, s in sizes.items()}
    maps["p6"] = F.max_pool2d(maps["p5"], 1, 2)
    return maps
