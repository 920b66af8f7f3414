"""Regions and a small model for the tests of SDS."""

import torch

import instseg_ext
from instseg_ext.structures.region_proposals import RegionProposals

TINY = (
    "MODEL.DEVICE", "cpu",
    # Of 50 layers, because detectron2 fixes the widths of the shallow ones.
    "MODEL.RESNETS.DEPTH", 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 4,
    "MODEL.SDS.WINDOW", 32,
    "MODEL.SDS.CONTEXT", 4,
)  # fmt: skip


def tiny_cfg(*opts):
    return instseg_ext.get_config("SDS/nuclei_sds_R_18", [*TINY, *opts])


def tiles(side, count, members):
    """Return regions of an image of count x count square superpixels, by the lists of each."""
    line = torch.arange(count).repeat_interleave(side)
    superpixels = (line[:, None] * count + line).int()
    table = torch.zeros(count * count, len(members), dtype=torch.bool)
    for column, ids in enumerate(members):
        table[list(ids), column] = True
    return RegionProposals(superpixels, table, torch.ones(len(members)))
