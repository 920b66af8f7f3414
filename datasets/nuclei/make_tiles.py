"""Cut the nuclei micrograph into the bundled tiles and COCO files.

The source is one 512 x 512 image with one label map (0 = background, any other value one nucleus).
The image is split in a left and a right half: fold 0 trains on the left half and validates on the
right one, fold 1 the other way round. Nothing is random: the same input gives the same files.

    python make_tiles.py --image img2d.tif --mask mask2d.tif --out .
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

TILE = 128  # side of a tile in pixels
TRAIN_STRIDE = (
    48,
    32,
)  # (y, x) step of the overlapping training tiles; validation tiles step by TILE
MIN_VISIBLE_AREA = (
    10  # a piece left by a tile border below this many pixels is a crowd, not an object
)
PERCENTILES = (1.0, 99.8)  # grey levels of the whole image that become 0 and 255
GAMMA = 0.7  # nuclei differ tenfold in brightness; this lifts dim ones without lifting the noise

INFO = {
    "description": "Nuclei in a fluorescence micrograph of BBBC038v1 (2018 Data Science Bowl)",
    "url": "https://bbbc.broadinstitute.org/BBBC038",
    "version": "1.0",
    "year": 2018,
    "contributor": "Broad Bioimage Benchmark Collection; Caicedo et al., Nature Methods 16 (2019)",
}
LICENSES = [
    {
        "id": 1,
        "name": "CC0 1.0 Universal (public domain)",
        "url": "https://creativecommons.org/publicdomain/zero/1.0/",
    }
]
CATEGORIES = [{"id": 1, "name": "nucleus", "supercategory": "cell"}]


def normalise(
    image: np.ndarray, percentiles: tuple[float, float] = PERCENTILES, gamma: float = GAMMA
) -> np.ndarray:
    """Map grey levels so that the two percentiles of the whole image become 0 and 255.

    Args:
        image: (H, W) unsigned integers or floats.
        percentiles: lower and upper percentile in [0, 100].
        gamma: exponent applied between the two; 1 is a linear map.

    Returns:
        (H, W) uint8; levels beyond the percentiles are clipped. The mapping is one for the whole
        image, so brightness stays comparable between tiles.
    """
    low, high = np.percentile(image, percentiles)
    scaled = (image.astype(np.float64) - low) / max(float(high - low), 1e-6)
    return (np.clip(scaled, 0.0, 1.0) ** gamma * 255.0 + 0.5).astype(np.uint8)


def halves(width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the column ranges [start, stop) of the left and the right half."""
    middle = width // 2
    return (0, middle), (middle, width)


def tile_origins(
    height: int, columns: tuple[int, int], tile: int, stride: tuple[int, int]
) -> list[tuple[int, int]]:
    """List the (y, x) of the tiles that lie inside a column range, row by row."""
    start, stop = columns
    return [
        (y, x)
        for y in range(0, height - tile + 1, stride[0])
        for x in range(start, stop - tile + 1, stride[1])
    ]


def cut_by_fold_border(labels: np.ndarray) -> set[int]:
    """Return the labels of the nuclei that have pixels in both halves."""
    (a0, a1), (b0, b1) = halves(labels.shape[1])
    left = np.unique(labels[:, a0:a1])
    right = np.unique(labels[:, b0:b1])
    return {int(v) for v in np.intersect1d(left, right) if v != 0}


def annotate_tile(
    labels: np.ndarray,
    origin: tuple[int, int],
    tile: int,
    border_labels: set[int],
    min_visible_area: int = MIN_VISIBLE_AREA,
) -> list[dict]:
    """Describe the nuclei of one tile.

    Crowds (``iscrowd`` 1) are the nuclei cut by the border between the folds, because their other
    part lies in the other fold, and the slivers that a tile border left of a larger nucleus. All
    others are ordinary objects with the part that is visible in the tile.

    Args:
        labels: (H, W) label map of the whole image.
        origin: (y, x) of the tile.
        tile: side of the tile in pixels.
        border_labels: labels cut by the fold border.
        min_visible_area: pixels below which a cut piece is a sliver.

    Returns:
        annotations without ``id`` and ``image_id``, in the order of the labels.
    """
    y, x = origin
    window = labels[y : y + tile, x : x + tile]
    annotations = []
    for value in np.unique(window):
        if value == 0:
            continue
        mask = window == value
        visible = int(mask.sum())
        whole = int((labels == value).sum())
        sliver = visible < min_visible_area and visible < whole
        rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
        annotations.append(
            {
                "category_id": 1,
                "iscrowd": int(int(value) in border_labels or sliver),
                "area": visible,
                "bbox": [float(v) for v in mask_util.toBbox(rle)],
                "segmentation": {
                    "size": [int(v) for v in rle["size"]],
                    "counts": rle["counts"].decode("ascii"),
                },
            }
        )
    return annotations


def coco_dict(
    labels: np.ndarray, origins: list[tuple[int, int]], tile: int, description: str
) -> dict:
    """Build the COCO dictionary of a list of tiles of one label map."""
    border_labels = cut_by_fold_border(labels)
    images, annotations = [], []
    for image_id, origin in enumerate(origins, start=1):
        images.append(
            {
                "id": image_id,
                "file_name": tile_name(origin),
                "height": tile,
                "width": tile,
                "license": 1,
            }
        )
        for annotation in annotate_tile(labels, origin, tile, border_labels):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, **annotation},
            )
    return {
        "info": {**INFO, "description": f"{INFO['description']}; {description}"},
        "licenses": LICENSES,
        "categories": CATEGORIES,
        "images": images,
        "annotations": annotations,
    }


def tile_name(origin: tuple[int, int]) -> str:
    """Return the file name of the tile at (y, x)."""
    return f"y{origin[0]:03d}_x{origin[1]:03d}.png"


def build(
    image: np.ndarray,
    labels: np.ndarray,
    tile: int = TILE,
    stride: tuple[int, int] = TRAIN_STRIDE,
) -> tuple[dict[str, np.ndarray], dict[str, dict]]:
    """Make all tiles and annotation files in memory.

    Args:
        image: (H, W) grey image.
        labels: (H, W) integer label map of the same size.
        tile: side of a tile; must fit into a half of the image.
        stride: (y, x) step between training tiles.

    Returns:
        tiles by file name ((tile, tile) uint8) and COCO dictionaries by data set name.

    Raises:
        ValueError: if the sizes differ or a tile does not fit.
    """
    if image.shape != labels.shape:
        raise ValueError(f"image {image.shape} and label map {labels.shape} differ in size")
    height, width = image.shape
    if tile > height or tile > width // 2:
        raise ValueError(f"a tile of {tile} pixels does not fit into a half of {image.shape}")
    grey = normalise(image)
    sides = dict(zip(("left", "right"), halves(width), strict=True))
    tiles: dict[str, np.ndarray] = {}
    files: dict[str, dict] = {}
    for train_name, val_name, train_side, val_side in (
        ("nuclei_train", "nuclei_val", "left", "right"),
        ("nuclei_fold1_train", "nuclei_fold1_val", "right", "left"),
    ):
        train = tile_origins(height, sides[train_side], tile, stride)
        val = tile_origins(height, sides[val_side], tile, (tile, tile))
        for y, x in train + val:
            tiles[tile_name((y, x))] = grey[y : y + tile, x : x + tile]
        files[train_name] = coco_dict(
            labels, train, tile, f"overlapping tiles of the {train_side} half, for training"
        )
        files[val_name] = coco_dict(
            labels, val, tile, f"non-overlapping tiles of the {val_side} half, for validation"
        )
    return tiles, files


def main(argv: list[str] | None = None) -> int:
    """Write ``images/*.png`` and ``annotations/*.json`` under the output folder."""
    parser = argparse.ArgumentParser(description="Make the bundled nuclei tiles.")
    parser.add_argument("--image", required=True, help="grey image, e.g. img2d.tif")
    parser.add_argument("--mask", required=True, help="label map, e.g. mask2d.tif")
    parser.add_argument("--out", required=True, help="folder to write images/ and annotations/ to")
    args = parser.parse_args(argv)
    tiles, files = build(np.asarray(Image.open(args.image)), np.asarray(Image.open(args.mask)))
    out = Path(args.out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    for name, pixels in tiles.items():
        Image.fromarray(pixels).save(out / "images" / name, optimize=True)
    for name, content in files.items():
        text = json.dumps(content, separators=(",", ":"))
        (out / "annotations" / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        crowds = sum(a["iscrowd"] for a in content["annotations"])
        sys.stdout.write(
            f"{name}: {len(content['images'])} tiles, "
            f"{len(content['annotations']) - crowds} objects, {crowds} crowds\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
