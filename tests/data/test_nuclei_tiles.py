import importlib.util
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util

from instseg_ext import resources
from instseg_ext.data.check import check_dataset

FOLDER = resources.root() / "datasets" / "nuclei"
NAMES = ("nuclei_train", "nuclei_val", "nuclei_fold1_train", "nuclei_fold1_val")


@pytest.fixture(scope="module")
def make_tiles():
    spec = importlib.util.spec_from_file_location("make_tiles", FOLDER / "make_tiles.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def synthetic():
    """Build a label map: 1 in the left half, 2 across the fold border, 3 across a tile border."""
    labels = np.zeros((16, 32), dtype=np.uint16)
    labels[1:4, 1:4] = 1
    labels[1:8, 14:19] = 2
    labels[3:12, 24:28] = 3  # rows 3-7 in the upper, 8-11 in the lower tile
    labels[5:9, 2:5] = 4  # 9 pixels above the tile border at row 8, 3 below: a sliver
    image = np.where(labels > 0, 200, 10).astype(np.uint8)
    return image, labels


def test_tiles_and_crowds_of_a_synthetic_image(make_tiles):
    image, labels = synthetic()
    tiles, files = make_tiles.build(image, labels, tile=8, stride=(4, 4))
    assert set(files) == set(NAMES)
    val = files["nuclei_val"]  # right half, tiles of 8 without overlap
    assert [i["file_name"] for i in val["images"]] == [
        "y000_x016.png",
        "y000_x024.png",
        "y008_x016.png",
        "y008_x024.png",
    ]
    found = {(a["image_id"], a["iscrowd"], a["area"]) for a in val["annotations"]}
    # The border nucleus shows 7 x 3 pixels as a crowd; nucleus 3 is cut into two ordinary parts.
    assert found == {(1, 1, 21), (2, 0, 20), (4, 0, 16)}
    left = files["nuclei_fold1_val"]
    found = {(a["image_id"], a["iscrowd"], a["area"]) for a in left["annotations"]}
    assert found == {(1, 0, 9), (1, 1, 9), (2, 1, 14), (3, 1, 3)}
    assert len(files["nuclei_train"]["images"]) == 3 * 3
    for name, pixels in tiles.items():
        y, x = int(name[1:4]), int(name[6:9])
        np.testing.assert_array_equal(pixels == 255, labels[y : y + 8, x : x + 8] > 0)


def test_masks_equal_the_label_map(make_tiles):
    image, labels = synthetic()
    _, files = make_tiles.build(image, labels, tile=8, stride=(4, 4))
    for content in files.values():
        names = {i["id"]: i["file_name"] for i in content["images"]}
        for annotation in content["annotations"]:
            name = names[annotation["image_id"]]
            y, x = int(name[1:4]), int(name[6:9])
            mask = mask_util.decode(annotation["segmentation"]).astype(bool)
            values = np.unique(labels[y : y + 8, x : x + 8][mask])
            assert len(values) == 1
            np.testing.assert_array_equal(mask, labels[y : y + 8, x : x + 8] == values[0])
            assert annotation["area"] == mask.sum()


def test_build_is_deterministic_and_refuses_what_does_not_fit(make_tiles):
    image, labels = synthetic()
    first, second = (make_tiles.build(image, labels, tile=8, stride=(4, 4)) for _ in range(2))
    assert first[1] == second[1]
    with pytest.raises(ValueError, match="does not fit"):
        make_tiles.build(image, labels, tile=17)
    with pytest.raises(ValueError, match="differ in size"):
        make_tiles.build(image, labels[:8])


@pytest.mark.parametrize("name", NAMES)
def test_bundled_files_are_sound(name):
    report = check_dataset(FOLDER / "annotations" / f"{name}.json", FOLDER / "images")
    assert not report.errors
    assert not report.of("warning")
    assert report.num_images == (8 if name.endswith("val") else 45)


def test_folds_do_not_share_pixels_and_the_package_stays_small():
    sides = {}
    for name in NAMES:
        content = json.loads((FOLDER / "annotations" / f"{name}.json").read_text())
        assert content["licenses"]
        assert content["info"]["description"]
        columns = [int(i["file_name"][6:9]) for i in content["images"]]
        sides[name] = (min(columns), max(columns) + 128)
    assert sides["nuclei_train"] == sides["nuclei_fold1_val"] == (0, 256)
    assert sides["nuclei_val"] == sides["nuclei_fold1_train"] == (256, 512)
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) < 1.5e6
    with Image.open(next((FOLDER / "images").iterdir())) as tile:
        assert tile.size == (128, 128)
        assert tile.mode == "L"
