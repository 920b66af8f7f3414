"""Small files and a clean registry for the data tests."""

from __future__ import annotations

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from instseg_ext.data import registration


@pytest.fixture
def registry():
    """Forget afterwards what a test registers, and metadata it makes."""
    before, names = dict(registration._REGISTERED), set(MetadataCatalog.list())
    yield
    for name in set(registration._REGISTERED) - set(before):
        DatasetCatalog.remove(name)
        del registration._REGISTERED[name]
    for name in set(MetadataCatalog.list()) - names:
        MetadataCatalog.remove(name)


@pytest.fixture
def write_coco(tmp_path):
    """Write a COCO dictionary and its images; returns the two paths."""

    def write(content, sizes=None, name="annotations.json"):
        images = tmp_path / "images"
        images.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        for image in content["images"]:
            if sizes is None and "height" not in image:
                continue
            size = (sizes or {}).get(image["file_name"], (image.get("height"), image.get("width")))
            if size is not None:
                pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(images / image["file_name"])
        path = tmp_path / name
        path.write_text(json.dumps(content))
        return path, images

    return write


@pytest.fixture
def good_coco():
    """Two images with a polygon, a compressed and an uncompressed RLE; category ids with gaps."""
    return {
        "info": {},
        "licenses": [],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "images": [
            {"id": 20, "file_name": "b.png", "height": 10, "width": 12},
            {"id": 10, "file_name": "a.png", "height": 8, "width": 8},
        ],
        "annotations": [
            {
                "id": 1,
                "image_id": 20,
                "category_id": 7,
                "iscrowd": 0,
                "area": 16,
                "bbox": [2, 3, 4, 4],
                "segmentation": [[2, 3, 6, 3, 6, 7, 2, 7]],
            },
            {
                "id": 2,
                "image_id": 20,
                "category_id": 3,
                "iscrowd": 1,
                "area": 20,
                "bbox": [0, 0, 2, 10],
                "segmentation": {"size": [10, 12], "counts": [0, 20, 100]},
            },
            {
                "id": 3,
                "image_id": 10,
                "category_id": 3,
                "iscrowd": 0,
                "area": 8,
                "bbox": [1, 0, 1, 8],
                "segmentation": {"size": [8, 8], "counts": "88`1"},
            },
        ],
    }
