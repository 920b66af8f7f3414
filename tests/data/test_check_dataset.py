import argparse
import json
import logging
import re

import pytest
from PIL import Image

from instseg_ext.cli import check_dataset as command
from instseg_ext.data import build_mapper, cheap_check, register
from instseg_ext.data.check import MAX_KEPT, Report, check_dataset, iter_lines
from instseg_ext.data.coco import load_coco
from instseg_ext.data.repair import repair, write_repaired

pytestmark = pytest.mark.usefixtures("registry")


def found(report):
    return {(f.kind, f.image_id, f.annotation_id) for f in report.findings if f.severity != "note"}


def test_sound_data_has_no_errors(write_coco, good_coco):
    report = check_dataset(*write_coco(good_coco))
    assert found(report) == set()
    assert report.counts == {"crowd": 1, "uncompressed-rle": 1}
    assert (report.num_images, report.num_annotations, report.num_classes) == (2, 3, 2)


def _annotation(number, **changes):
    def change(content):
        annotation = next(a for a in content["annotations"] if a["id"] == number)
        for key, value in changes.items():
            if value is None:
                del annotation[key]
            else:
                annotation[key] = value

    return change


# what is done to a sound file -> the kinds found, where, and whether decoding is needed to find it
DAMAGE = {
    "no info": (lambda c: c.pop("info"), ("missing-section", None, None), False),
    "few points": (_annotation(1, segmentation=[[2, 3, 6, 3]]), ("bad-polygon", 20, 1), False),
    "odd polygon": (
        _annotation(1, segmentation=[[2, 3, 6, 3, 6, 7, 2]]),
        ("bad-polygon", 20, 1),
        False,
    ),
    "NaN": (
        _annotation(1, segmentation=[[2, 3, 6, 3, 6, float("nan")]]),
        ("bad-polygon", 20, 1),
        False,
    ),
    "no segmentation": (_annotation(1, segmentation=None), ("no-segmentation", 20, 1), False),
    "RLE of another size": (
        _annotation(3, segmentation={"size": [8, 9], "counts": "88`1"}),
        ("bad-rle", 10, 3),
        False,
    ),
    "RLE that is too short": (
        _annotation(3, segmentation={"size": [8, 8], "counts": "88"}),
        ("bad-rle", 10, 3),
        False,
    ),
    "RLE that is no string": (
        _annotation(3, segmentation={"size": [8, 8], "counts": "\u1234"}),
        ("bad-rle", 10, 3),
        False,
    ),
    "box outside": (_annotation(1, bbox=[9, 3, 6, 4]), ("box-outside-image", 20, 1), False),
    "box left of it": (_annotation(1, bbox=[-3, 3, 6, 4]), ("box-outside-image", 20, 1), False),
    "box without width": (_annotation(1, bbox=[2, 3, 0, 4]), ("bad-box", 20, 1), False),
    "box of three": (_annotation(1, bbox=[2, 3, 4]), ("bad-box", 20, 1), False),
    "box that is text": (_annotation(1, bbox="2344"), ("bad-box", 20, 1), False),
    "unknown category": (_annotation(1, category_id=99), ("unknown-category", 20, 1), False),
    "unknown image": (_annotation(1, image_id=99), ("unknown-image", 99, 1), False),
    "repeated annotation id": (_annotation(1, id=3), ("duplicate-id", 10, 3), False),
    "no area": (_annotation(1, area=None), ("missing-key", 20, 1), False),
    "no iscrowd": (_annotation(1, iscrowd=None), ("missing-key", 20, 1), False),
    "no id": (_annotation(1, id=None), ("missing-key", 20, "?"), False),
    "no box": (_annotation(1, bbox=None), ("missing-key", 20, 1), False),
    "no image id": (_annotation(1, image_id=None), ("missing-essential", None, 1), False),
    "repeated image id": (
        lambda c: c["images"][1].update(id=20),
        ("duplicate-image-id", 20, None),
        False,
    ),
    "same file twice": (
        lambda c: c["images"].append({**c["images"][0], "id": 30}),
        ("repeated-file", 30, None),
        False,
    ),
    "image without a size": (
        lambda c: c["images"][1].pop("width"),
        ("missing-essential", 10, None),
        False,
    ),
    "missing image": (
        lambda c: c["images"][1].update(file_name="gone.png"),
        ("missing-image", 10, None),
        False,
    ),
    "a category without name": (
        lambda c: c["categories"].append({"id": 1}),
        ("bad-category", None, None),
        False,
    ),
    "repeated category": (
        lambda c: c["categories"].append({"id": 7, "name": "x"}),
        ("bad-category", None, None),
        False,
    ),
    "one name for two": (
        lambda c: c["categories"].append({"id": 8, "name": "cat"}),
        ("repeated-name", None, None),
        False,
    ),
    "class without instances": (
        lambda c: c["categories"].append({"id": 8, "name": "cow"}),
        ("class-without-instances", None, None),
        False,
    ),
    "an annotation that is a list": (
        lambda c: c["annotations"].append([]),
        ("bad-entry", None, None),
        False,
    ),
    "an image that is a list": (lambda c: c["images"].append([]), ("bad-entry", None, None), False),
    "empty RLE": (
        _annotation(3, segmentation={"size": [8, 8], "counts": [64]}),
        ("empty-mask", 10, 3),
        True,
    ),
    "polygon outside the image": (
        _annotation(1, segmentation=[[50, 50, 60, 50, 60, 60]]),
        ("empty-mask", 20, 1),
        True,
    ),
    "box of something else": (
        _annotation(1, bbox=[7, 6, 4, 4]),
        ("box-differs-from-mask", 20, 1),
        True,
    ),
    "image of another size": (
        lambda c: c["images"][1].update(height=9, width=8),
        ("size-mismatch", 10, None),
        True,
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_every_kind_of_damage_is_found_and_mended(name, write_coco, good_coco):
    damage, expected, needs_decoding = DAMAGE[name]
    json_file, images = write_coco(good_coco)
    damage(good_coco)
    json_file.write_text(json.dumps(good_coco))
    before = json_file.read_bytes()
    report = check_dataset(json_file, images)
    assert expected in found(report)
    line = str(next(f for f in report.findings if f.kind == expected[0]))
    for piece in (expected[1], expected[2]):
        assert piece is None or str(piece) in line
    assert (expected in found(check_dataset(json_file, images, decode=False))) != needs_decoding
    assert json_file.read_bytes() == before
    fixed, changes = repair(json.loads(before), images)
    json_file.write_text(json.dumps(fixed))
    after = check_dataset(json_file, images)
    assert not after.errors
    if expected[0] not in ("repeated-file", "repeated-name", "class-without-instances"):
        assert changes
        assert expected[0] not in after.counts
    for record in load_coco(json_file, images)[0]:
        assert all(a["segmentation"] for a in record["annotations"])


POINTS = ["top", "left_side", "right_side"]


@pytest.fixture
def posed(good_coco):
    """The sound file with keypoints on the first dog."""
    good_coco["categories"][0]["keypoints"] = list(POINTS)
    good_coco["annotations"][0] |= {"keypoints": [4, 3, 2, 2, 5, 1, 0, 0, 0], "num_keypoints": 2}
    return good_coco


def test_sound_keypoints(write_coco, posed):
    posed["annotations"][2]["keypoints"] = [0] * 9  # of a category without any
    report = check_dataset(*write_coco(posed))
    assert found(report) == set()
    note = next(str(f) for f in report.findings if f.kind == "keypoint-pairs")
    assert note.endswith("in a mirrored image: left_side/right_side")


def _points(*values, count=2):
    return _annotation(1, keypoints=list(values), num_keypoints=count)


# what is done to a sound file with keypoints -> the kind found, where, and what is said
KEYPOINT_DAMAGE = {
    "too few numbers": (_points(4, 3, 2), "bad-keypoints", 1, "3 numbers for 3 keypoints"),
    "text": (_points(*"431251000"), "bad-keypoints", 1, "no list of finite numbers"),
    "not finite": (_points(*[float("nan")] * 9), "bad-keypoints", 1, "no list of finite numbers"),
    "visibility": (_points(4, 3, 3, 2, 5, 1, 0, 0, 0), "bad-visibility", 1, "visibility 3 is not"),
    "count": (
        _points(4, 3, 2, 2, 5, 1, 0, 0, 0, count=3),
        "wrong-num-keypoints",
        1,
        "num_keypoints is 3, labelled are 2",
    ),
    "no count": (_annotation(1, num_keypoints=None), "wrong-num-keypoints", 1, "is None"),
    "outside": (
        _points(4, 3, 2, 11.6, 5, 1, 0, 0, 0),
        "keypoint-outside-image",
        1,
        r"left_side at \(11.6, 5\) is outside the 12 x 10 image",
    ),
    "no such keypoints": (
        lambda c: c["categories"][0].pop("keypoints"),
        "bad-keypoints",
        1,
        "9 numbers for 0 keypoints",
    ),
    "one side": (
        lambda c: c["categories"][0].update(keypoints=["top", "left_side", "tail"]),
        "keypoint-without-mirror",
        None,
        "'left_side' says a side and there is no 'right_side'",
    ),
    "twice": (
        lambda c: c["categories"][0].update(keypoints=["top", "top", "tail"]),
        "repeated-name",
        None,
        "2 keypoints of a category are called 'top'",
    ),
    "two lists": (
        lambda c: c["categories"][1].update(keypoints=["nose"]),
        "mixed-keypoints",
        None,
        "have different keypoints",
    ),
}


@pytest.mark.parametrize("name", KEYPOINT_DAMAGE)
def test_damaged_keypoints_are_found_and_mended(name, write_coco, posed):
    damage, kind, annotation_id, message = KEYPOINT_DAMAGE[name]
    json_file, images = write_coco(posed)
    damage(posed)
    json_file.write_text(json.dumps(posed))
    report = check_dataset(json_file, images, decode=False)
    (finding,) = (f for f in report.findings if f.kind == kind)
    assert finding.annotation_id == annotation_id
    assert re.search(message, finding.message)
    fixed, _ = repair(json.loads(json_file.read_text()), images)
    json_file.write_text(json.dumps(fixed))
    assert not check_dataset(json_file, images).errors
    assert len(fixed["annotations"]) == 3


def test_lvis_files_are_not_mended(write_coco, good_coco, tmp_path):
    for image in good_coco["images"]:
        image |= {"neg_category_ids": [], "coco_url": f"http://x/images/{image['file_name']}"}
    json_file, _ = write_coco(good_coco)
    with pytest.raises(ValueError, match="is an LVIS file; --fix mends COCO files"):
        write_repaired(json_file, tmp_path, tmp_path / "out.json")
    # the folder in coco_url counts
    report = check_dataset(json_file, tmp_path)
    assert {f.kind for f in report.errors} == {"missing-key"}  # no frequency


def test_unreadable_image_is_named(write_coco, good_coco):
    json_file, images = write_coco(good_coco)
    (images / "a.png").write_bytes((images / "a.png").read_bytes()[:60])
    report = check_dataset(json_file, images)
    assert ("unreadable-image", 10, None) in found(report)
    assert str(images / "a.png") in str(report.errors[0])
    fixed, _ = repair(good_coco, images)
    assert [i["id"] for i in fixed["images"]] == [20]
    assert {a["image_id"] for a in fixed["annotations"]} == {20}


def test_a_folder_too_many_is_hinted_at(write_coco, good_coco):
    json_file, images = write_coco(good_coco)
    good_coco["images"][0]["file_name"] = "images/b.png"
    json_file.write_text(json.dumps(good_coco))
    assert "folder too many" in str(check_dataset(json_file, images).errors[0])
    assert "does not exist" in str(check_dataset(json_file, images / "x").errors[0])


def test_rotated_photographs_are_no_mismatch(write_coco, good_coco):
    json_file, images = write_coco(good_coco)
    exif = Image.Exif()
    exif[274] = 6  # lie on their side, to be shown upright
    Image.new("RGB", (10, 12)).save(images / "b.jpg", exif=exif)
    good_coco["images"][0]["file_name"] = "b.jpg"
    json_file.write_text(json.dumps(good_coco))
    assert not check_dataset(json_file, images).errors


def test_mended_file_leaves_sound_entries_alone(write_coco, good_coco):
    good_coco["annotations"][0].pop("area")
    good_coco["annotations"][2]["note"] = "mine"
    _, images = write_coco(good_coco)
    fixed, changes = repair(good_coco, images)
    assert changes == {"area added": 1}
    assert fixed["annotations"][0] == {**good_coco["annotations"][0], "area": 16.0}
    assert fixed["annotations"][1:] == good_coco["annotations"][1:]
    assert "area" not in good_coco["annotations"][0]


def test_nothing_is_overwritten(write_coco, good_coco, tmp_path):
    json_file, images = write_coco(good_coco)
    out = tmp_path / "out.json"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="--force"):
        write_repaired(json_file, images, out)
    assert out.read_text() == "mine"
    write_repaired(json_file, images, out, force=True)
    assert json.loads(out.read_text()) == good_coco
    with pytest.raises(ValueError, match="annotation file itself"):
        write_repaired(json_file, images, json_file, force=True)
    good_coco["annotations"] = good_coco["annotations"][:1]
    good_coco["annotations"][0]["segmentation"] = []
    json_file.write_text(json.dumps(good_coco))
    with pytest.raises(ValueError, match="nothing to write"):
        write_repaired(json_file, images, tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()


def test_long_lists_are_counted_but_not_kept():
    report = Report("a.json", "images")
    for i in range(MAX_KEPT + 5):
        report.add("bad-box", "error", "x", image_id=1, annotation_id=i)
    assert len(report.errors) == MAX_KEPT
    assert report.counts["bad-box"] == MAX_KEPT + 5
    lines = list(iter_lines(report, 10))
    assert len(lines) == 12
    assert lines[10].endswith(f"and {MAX_KEPT - 5} more")
    assert len(list(iter_lines(report, None))) == MAX_KEPT + 1


def test_start_of_a_run_stops_where_it_must(write_coco, good_coco, caplog):
    json_file, images = write_coco(good_coco)
    register("mine", json_file, images)
    assert cheap_check("mine").num_images == 2
    del good_coco["annotations"][0]["area"]
    good_coco["annotations"][2]["segmentation"] = []
    json_file.write_text(json.dumps(good_coco))
    with caplog.at_level(logging.WARNING, logger="instseg_ext"):
        cheap_check("mine")  # training gets by
    assert "no-segmentation" in caplog.text
    with pytest.raises(ValueError, match=r"missing-key.*annotation 1.*area.*check-dataset"):
        cheap_check("mine", training=False)
    (images / "a.png").unlink()
    with pytest.raises(ValueError, match=r"missing-image.*a\.png"):
        cheap_check("mine")


def run(*words):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["check-dataset", *map(str, words)])
    return args.run(args)


def test_command(write_coco, good_coco, tmp_path, capsys):
    json_file, images = write_coco(good_coco)
    assert run(json_file, images) == 0
    good_coco["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]
    json_file.write_text(json.dumps(good_coco))
    assert run(json_file, images) == 1
    out = capsys.readouterr().out
    assert f"error: bad-polygon: {json_file}, image 20, annotation 1: polygon with fewer" in out
    assert run("--register", f"mine={json_file}:{images}") == 1
    assert run(json_file, images, "--cheap") == 1
    fixed = tmp_path / "fixed.json"
    assert run(json_file, images, "--fix", fixed) == 0
    assert "without a usable mask dropped (1)" in capsys.readouterr().out
    assert run(fixed, images) == 0
    assert run("--dataset", "nuclei_val") == 0
    with pytest.raises(FileNotFoundError, match=r"'lvis_v1_val' needs .*DETECTRON2_DATASETS"):
        run("--dataset", "lvis_v1_val")
    for words, message in (
        ([], "Name a data set"),
        ([json_file], "image folder is missing"),
        (["--dataset", "nuclei_val", "--dataset", "nuclei_train", "--fix", fixed], "exactly one"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*words)


def test_mended_file_can_be_mapped(write_coco, good_coco):
    from detectron2.config import get_cfg

    from instseg_ext.config import add_shared_config
    from instseg_ext.data import add_data_config

    for change in (
        lambda c: c.pop("info"),
        *(_annotation(1, **{k: None}) for k in ("area", "iscrowd")),
    ):
        change(good_coco)
    good_coco["annotations"][0].pop("id")
    json_file, images = write_coco(good_coco)
    write_repaired(json_file, images, json_file.with_name("fixed.json"))
    cfg = get_cfg()
    add_shared_config(cfg)
    add_data_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN = (16,)
    mapper = build_mapper(cfg, True)
    dicts, _, _ = load_coco(json_file.with_name("fixed.json"), images)
    assert [len(mapper(d)["instances"]) for d in dicts] == [1, 1]
