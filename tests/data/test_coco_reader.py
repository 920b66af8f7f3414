import json
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as mask_util

from instseg_ext.data.coco import CocoFormatError, load_coco, read_categories, read_json
from instseg_ext.data.segmentation import (
    clean_segmentation,
    decode_compressed_counts,
    decode_masks,
    rle_problem,
)


@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 9])
)
def test_run_length_strings_decode_as_pycocotools_does(height, width, seed, block):
    rng = np.random.default_rng(seed)
    coarse = rng.random((height // block + 1, width // block + 1)) < 0.5
    mask = np.kron(coarse, np.ones((block, block), bool))[:height, :width]
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    runs = decode_compressed_counts(rle["counts"])
    flat, value, oracle = mask.reshape(-1, order="F"), False, [0]
    for pixel in flat:
        if pixel != value:
            oracle.append(0)
            value = pixel
        oracle[-1] += 1
    assert runs.tolist() == oracle
    assert rle_problem(rle, (height, width)) is None


def test_long_runs_decode():
    rle = mask_util.frPyObjects(
        {"size": [5000, 4000], "counts": [7_000_000, 13_000_000]}, 5000, 4000
    )
    assert decode_compressed_counts(rle["counts"]).tolist() == [7_000_000, 13_000_000]


@pytest.mark.parametrize(
    ("rle", "what"),
    [
        ({"counts": "88`1"}, "without counts and size"),
        ({"size": [8, 9], "counts": "88`1"}, "size"),
        ({"size": [8, 8], "counts": "88"}, "add up to"),
        ({"size": [8, 8], "counts": "88`1~~~"}, "undecodable"),
        ({"size": [8, 8], "counts": "88P"}, "undecodable"),
        ({"size": [8, 8], "counts": ""}, "undecodable"),
        ({"size": [8, 8], "counts": "o" * 40}, "undecodable"),
        ({"size": [8, 8], "counts": [8, -8, 64]}, "negative"),
        ({"size": [8, 8], "counts": [8, 8]}, "add up to 16"),
        ({"size": [8, 8], "counts": ["a"]}, "not integers"),
        ({"size": [8, 8], "counts": []}, "without counts"),
        ({"size": 8, "counts": []}, "size"),
        ([], "without counts"),
    ],
)
def test_bad_run_lengths(rle, what):
    assert what in rle_problem(rle, (8, 8))


def test_clean_segmentation_keeps_the_good_parts():
    good = [0, 0, 4, 0, 4, 4]
    parts, problems = clean_segmentation([good, [1, 1, 2, 2], [1, 2, 3, 4, 5, 6, 7]], (8, 8))
    assert parts == [good]
    assert problems == [
        "polygon with fewer than 3 points",
        "polygon with an odd number of coordinates",
    ]
    for bad in ([[0, 0, 1, 1, float("nan"), 2]], [[0, 0, 1, 1, float("inf"), 2]]):
        assert clean_segmentation(bad, (8, 8)) == (
            None,
            ["polygon with NaN or infinite coordinates"],
        )
    assert clean_segmentation([[0, 0, 1, 1, "a", 2]], (8, 8))[1] == [
        "polygon with coordinates that are not numbers"
    ]
    assert clean_segmentation([{"size": 3}], (8, 8))[1] == ["polygon that is a dict"]
    assert clean_segmentation(good, (8, 8)) == ([good], [])
    for nothing in (None, [], "x", 3):
        assert clean_segmentation(nothing, (8, 8)) == (None, ["no segmentation"])


def test_reads_polygons_and_both_run_lengths(write_coco, good_coco):
    for key in ("info", "licenses"):
        del good_coco[key]
    for annotation in good_coco["annotations"]:
        del annotation["id"], annotation["area"]
    del good_coco["annotations"][0]["iscrowd"]
    json_file, images = write_coco(good_coco)
    dicts, classes, contiguous = load_coco(json_file, images)
    assert (classes, contiguous) == (["cat", "dog"], {3: 0, 7: 1})
    assert [d["file_name"] for d in dicts] == [str(images / "a.png"), str(images / "b.png")]
    cat, (dog, crowd) = dicts[0]["annotations"][0], dicts[1]["annotations"]
    assert (cat["category_id"], dog["category_id"], crowd["category_id"]) == (0, 1, 0)
    assert (dog["iscrowd"], crowd["iscrowd"]) == (0, 1)
    np.testing.assert_array_equal(
        np.flatnonzero(decode_masks([cat["segmentation"]], (8, 8))[0].any(0)), [1]
    )
    assert isinstance(crowd["segmentation"]["counts"], str)
    assert decode_masks([crowd["segmentation"]], (10, 12))[0].sum() == 20


def test_what_the_file_says_of_an_object_is_kept(write_coco, good_coco):
    for annotation in good_coco["annotations"]:
        annotation["area"], annotation["ignore"] = 19.8, int(annotation["category_id"] == 3)
    dicts, _, _ = load_coco(*write_coco(good_coco))
    kept = [annotation for record in dicts for annotation in record["annotations"]]
    assert {a["area"] for a in kept} == {19.8}
    assert [bool(a.get("ignore")) for a in kept] == [a["category_id"] == 0 for a in kept]


def test_unusable_annotations_are_skipped_and_counted(write_coco, good_coco, caplog):
    annotations = good_coco["annotations"]
    annotations[0]["segmentation"].append([1, 1, 2, 2])  # a bad part beside a good one
    annotations[2]["segmentation"]["counts"] = "88"
    annotations.append({**annotations[0], "id": 4, "image_id": 99})
    annotations.append({**annotations[0], "id": 5, "segmentation": []})
    annotations.append(
        {**annotations[0], "id": 6, "bbox": [1, 1, 0, 0], "segmentation": [[2, 3, 6, 3, 6, 7]]}
    )
    json_file, images = write_coco(good_coco)
    with caplog.at_level(logging.WARNING, logger="instseg_ext"):
        dicts, _, _ = load_coco(json_file, images)
    assert [len(d["annotations"]) for d in dicts] == [0, 3]
    assert dicts[1]["annotations"][2]["bbox"] == [3, 3, 3, 3]  # taken from the mask
    text = caplog.text
    assert "skipped 4" in text
    for piece in (
        "annotation 3 of image 10",
        "annotation 4 of image 99",
        "annotation 5",
        "other parts kept",
    ):
        assert piece in text


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda c: c.pop("categories"), "lacks the list 'categories'"),
        (lambda c: c["categories"].clear(), "declares no categories"),
        (lambda c: c["categories"][0].pop("name"), "lacks an id or a name"),
        (lambda c: c["categories"].append({"id": 3, "name": "x"}), "category id 3 is used twice"),
        (lambda c: c["images"][0].pop("height"), "image 20 lacks 'height'"),
        (lambda c: c["images"][0].update(id=10), "image id 10 is used twice"),
        (
            lambda c: c["annotations"][0].update(category_id=4),
            "annotation 1 of image 20 has category 4",
        ),
        (lambda c: c["annotations"][1].pop("image_id"), "annotation 2 lacks 'image_id'"),
    ],
)
def test_what_cannot_be_guessed_is_an_error(write_coco, good_coco, change, what):
    json_file, images = write_coco(good_coco)
    change(good_coco)
    json_file.write_text(json.dumps(good_coco))
    with pytest.raises(CocoFormatError, match=what) as error:
        load_coco(json_file, images)
    assert str(json_file) in str(error.value)


def test_files_that_are_no_annotations(tmp_path):
    with pytest.raises(FileNotFoundError, match="no annotation file"):
        read_json(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match="no annotation file"):
        read_categories(tmp_path / "x.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(CocoFormatError, match="not valid JSON"):
        read_json(broken)
    broken.write_text("[]")
    with pytest.raises(CocoFormatError, match="holds a list"):
        read_json(broken)


def test_categories_are_read_alone_where_that_is_safe(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(
        '{"categories" : [{"id": 2, "name": "b"}, {"id": 1, "name": "a"}], "annotations": [}'
    )
    assert [c["name"] for c in read_categories(path)] == ["a", "b"]  # the rest is not parsed
    tricky = {"info": {"categories": ["x"]}, "images": [], "annotations": []}
    path.write_text(json.dumps({**tricky, "categories": [{"id": 1, "name": "a"}]}))
    assert [c["name"] for c in read_categories(path)] == ["a"]
