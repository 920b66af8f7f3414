import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util
from scipy import ndimage

from instseg_ext.data import dataset_classes, ensure_files, make_shapes, register_bundled
from instseg_ext.data.check import check_dataset
from instseg_ext.data.registration import dataset_files
from instseg_ext.data.segmentation import decode_masks
from instseg_ext.data.shapes import SHAPE_SPLITS, cached_shapes, generate_cached


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), num_images=36, size=64, seed=5)


def test_has_what_real_files_have(shapes):
    content = json.loads(shapes[0].read_text())
    report = check_dataset(*shapes)
    assert not report.errors
    assert not report.of("warning")
    assert report.counts["crowd"] > 0
    assert report.counts["uncompressed-rle"] == report.counts["crowd"]
    assert report.counts["image-without-objects"] >= 3
    kinds = {type(a["segmentation"]) for a in content["annotations"] if not a["iscrowd"]}
    assert kinds == {list, dict}
    assert [c["id"] for c in content["categories"]] == [2, 5, 9]
    assert {a["category_id"] for a in content["annotations"]} == {2, 5, 9}
    parts = [
        ndimage.label(decode_masks([a["segmentation"]], (64, 64))[0])[1]
        for a in content["annotations"]
        if not a["iscrowd"]
    ]
    assert max(parts) >= 2  # an object in several parts


def test_masks_do_not_overlap_and_match_the_picture(shapes):
    content = json.loads(shapes[0].read_text())
    for image in content["images"]:
        own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        masks = decode_masks([a["segmentation"] for a in own], (64, 64))
        assert masks.sum(axis=0).max(initial=0) <= 1
        pixels = np.asarray(Image.open(shapes[1] / image["file_name"])).astype(float)
        for annotation, mask in zip(own, masks, strict=True):
            if not annotation["iscrowd"]:
                # One flat colour plus noise of 6 grey levels.
                assert pixels[mask].std(axis=0).max() < 12


def test_the_seed_decides(tmp_path):
    first = make_shapes(tmp_path / "a", 3, 64, seed=1)[0].read_text()
    again = make_shapes(tmp_path / "b", 3, 64, seed=1)[0].read_text()
    other = make_shapes(tmp_path / "c", 3, 64, seed=2)[0].read_text()
    assert first == again != other
    with pytest.raises(ValueError, match="size >= 48"):
        make_shapes(tmp_path / "d", 3, 32, seed=1)


def test_cache_is_filled_once_and_only_when_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("INSTSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(SHAPE_SPLITS, "shapes_val", (3, 64, 2))
    json_file, images = cached_shapes("shapes_val")
    assert not (tmp_path / "cache").exists()
    generate_cached("shapes_val", json_file)
    stamp = json_file.stat().st_mtime_ns
    generate_cached("shapes_val", json_file)
    assert json_file.stat().st_mtime_ns == stamp
    assert len(list(images.iterdir())) == 3
    assert [f.name for f in (tmp_path / "cache").iterdir()] == [json_file.parent.name]


def test_registered_by_name():
    register_bundled()
    assert dataset_classes("shapes_val") == ["circle", "square", "triangle"]
    ensure_files("shapes_val")
    json_file, images = dataset_files("shapes_val")
    content = json.loads(json_file.read_text())
    assert len(content["images"]) == len(list(images.iterdir())) == 32
    assert all(mask_util.area(mask_util.frPyObjects(a["segmentation"], 96, 96)) > 0
               for a in content["annotations"] if a["iscrowd"])  # fmt: skip
