"""Small DeepMasks and SharpMasks, patches and maps for the tests."""

import torch
from detectron2.modeling import build_model

import instseg_ext
from instseg_ext.methods.deepmask.heads import WindowMaps

# Windows of 32 pixels: two by two cells of a narrow ResNet-50.
TINY = [
    "MODEL.DEVICE", "cpu",
    "MODEL.WEIGHTS", "",
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 8,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 4,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 16,
    "MODEL.DEEPMASK.INPUT_SIZE", 32,
    "MODEL.DEEPMASK.OUT_SIZE", 12,
    "MODEL.DEEPMASK.GT_SIZE", 24,
    "MODEL.DEEPMASK.REDUCE_DIM", 8,
    "MODEL.DEEPMASK.CODE_DIM", 16,
    "MODEL.DEEPMASK.SCORE_DIM", 16,
    "MODEL.DEEPMASK.TEST_SCALES", [0.5, 1.0],
    "TEST.DETECTIONS_PER_IMAGE", 20,
]  # fmt: skip
SHARP = ["MODEL.DEEPMASK.GT_SIZE", 32, "MODEL.SHARPMASK.DIM", 16, "MODEL.SHARPMASK.CHUNK", 7]
PATCH, SHARP_SIZE = 64, 32


def config(*opts, name="deepmask_R_50"):
    sharp = SHARP if "sharpmask" in name else []
    return instseg_ext.get_config(f"DeepMask/{name}", [*TINY, *sharp, *opts])


def model_of(*opts, name="deepmask_R_50"):
    torch.manual_seed(0)
    return build_model(config(*opts, name=name))


def sharp_model_of(*opts):
    return model_of(*opts, name="sharpmask_R_50")


def picture(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    return {"image": image, "height": height, "width": width}


def patches(masks, scores=0, gt_size=24):
    """Return ``masks`` mask patches, then ``scores`` score patches with alternating labels."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(masks + scores):
        image = torch.rand(3, PATCH, PATCH, generator=generator) * 255
        sample = {"image": image, "is_mask": i < masks, "file_name": f"{i}.png"}
        if i < masks:
            sample["target"] = torch.rand(gt_size, gt_size, generator=generator) > 0.5
        else:
            sample["label"] = 1.0 if i % 2 else -1.0
        found.append(sample)
    return found


def planted_maps(sizes, hot=(), code_dim=16):
    """Return maps whose scores are -5 but at ``hot``: (scale, row, column, score).

    The code of a window holds its scale, row and column.
    """
    maps = []
    for scale, (height, width) in enumerate(sizes):
        scores = torch.full((1, height, width), -5.0)
        codes = torch.zeros(1, code_dim, height, width)
        codes[0, 0] = scale
        codes[0, 1] = torch.arange(height)[:, None]
        codes[0, 2] = torch.arange(width)
        for at, row, col, score in hot:
            if at == scale:
                scores[0, row, col] = score
        maps.append(WindowMaps(codes, scores))
    return maps
