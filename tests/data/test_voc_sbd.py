"""SBD and VOC 2012 in miniature: every layout, what is read from it, and the commands on it."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import logger
from PIL import Image

from instseg_ext.cli import main, train
from instseg_ext.config import add_shared_config
from instseg_ext.data import (
    add_data_config,
    cheap_check,
    dataset_classes,
    dataset_files,
    ensure_files,
    registration,
    voc,
)
from instseg_ext.data.voc import VOC_CLASSES
from instseg_ext.engine import defaults
from instseg_ext.structures.rle import decode_masks

# An extra of its own (`voc`): without it, only the error that names it could be tested.
scipy_io = pytest.importorskip("scipy.io")
csc_array = pytest.importorskip("scipy.sparse").csc_array

HEIGHT, WIDTH = 48, 64
NAMES = list(registration._CONVERTED)
TINY = shlex.split("""MODEL.DEVICE cpu MODEL.WEIGHTS "" OUTPUT_DIR out
MODEL.PIXEL_STD [58.0,57.0,57.0] MODEL.RESNETS.WIDTH_PER_GROUP 8
MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16 MODEL.FPN.OUT_CHANNELS 8
MODEL.ROI_BOX_HEAD.FC_DIM 16 MODEL.ROI_MASK_HEAD.CONV_DIM 8 MODEL.BACKBONE.FREEZE_AT 0
MODEL.RESNETS.NORM BN SOLVER.MAX_ITER 2 TEST.DETECTIONS_PER_IMAGE 5 INPUT.MIN_SIZE_TRAIN (64,)
INPUT.MIN_SIZE_TEST 64 MODEL.RPN.POST_NMS_TOPK_TEST 8 DATALOADER.NUM_WORKERS 0
SOLVER.IMS_PER_BATCH 2""")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty folder of data sets, which the names stand for during the test."""
    before = {name: registration._REGISTERED.get(name) for name in NAMES}

    def forget():
        for name in NAMES:
            if registration._REGISTERED.pop(name, None):
                DatasetCatalog.remove(name)
                MetadataCatalog.remove(name)

    forget()
    monkeypatch.setenv("INSTSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "sets"))
    registration.register_bundled()
    (tmp_path / "sets").mkdir()
    yield tmp_path / "sets"
    forget()
    for name, files in before.items():
        if files:
            registration.register(name, *files, evaluator_type="sbd")
            MetadataCatalog.get(name).thing_classes = list(VOC_CLASSES)


def maps(seed):
    """Objects 1 (dog) and 2 (person), which share a corner of the image with void pixels."""
    objects = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    objects[4 + seed : 24, 6:30] = 1
    objects[20:40, 26:56] = 2
    objects[40:42, 26:56] = 255
    labels = np.array([0, 12, 15] + [0] * 252 + [255], dtype=np.uint8)[objects]
    return objects, labels


def write_list(root, path, names):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text("".join(f"{name}\n" for name in names))


def write_picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_sbd(folder, names, *, categories=True):
    """The folders img, inst and cls."""
    for seed, name in enumerate(names):
        objects, labels = maps(seed)
        write_picture(folder / "img" / f"{name}.jpg", seed)
        outlines = np.empty((2, 1), dtype=object)
        outlines[:, 0] = [csc_array(objects == number) for number in (1, 2)]
        inst = {"Segmentation": objects, "Boundaries": outlines}
        if categories:
            inst["Categories"] = np.array([[12], [15]], dtype=np.uint8)
        for part, variable, content in (
            ("inst", "GTinst", inst),
            ("cls", "GTcls", {"Segmentation": labels}),
        ):
            (folder / part).mkdir(exist_ok=True)
            scipy_io.savemat(folder / part / f"{name}.mat", {variable: content})


def write_voc(folder, names):
    for seed, name in enumerate(names):
        write_picture(folder / "JPEGImages" / f"{name}.jpg", seed)
        for part, content in zip(("Object", "Class"), maps(seed), strict=True):
            write_indices(folder / f"Segmentation{part}" / f"{name}.png", content)


def write_indices(path, content):
    path.parent.mkdir(exist_ok=True)
    picture = Image.fromarray(content)
    picture.putpalette(list(range(256)) * 3)
    picture.save(path)


def assert_images(name, images):
    """Compare a loaded data set with what was written."""
    dicts = DatasetCatalog.get(name)
    assert [d["file_name"].rpartition("/")[2] for d in dicts] == [
        f"{image}.jpg" for image in images
    ]
    for record in dicts:
        seed = int(record["file_name"][-5])
        objects, _ = maps(seed)
        assert (record["height"], record["width"]) == (HEIGHT, WIDTH)
        dog, person = record["annotations"]
        assert (dog["category_id"], person["category_id"]) == (11, 14)
        masks = decode_masks([dog["segmentation"], person["segmentation"]])
        np.testing.assert_array_equal(masks, objects == np.array([1, 2])[:, None, None])
        assert dog["bbox"] == [6, 4 + seed, 24, 20 - seed]
        assert person["bbox"] == [26, 20, 30, 20]
    assert set(cheap_check(name).counts) == {"class-without-instances"}
    assert MetadataCatalog.get(name).evaluator_type == "sbd"
    return dicts


@pytest.mark.parametrize("folder", ["sbd", "benchmark_RELEASE/dataset"])
def test_release_of_sbd(root, folder):
    """Classes come from the list in the file, or without it from the pixels' labels."""
    (root / folder).mkdir(parents=True)
    write_sbd(root / folder, ["2008_0", "2008_1"], categories=folder == "sbd")
    write_list(root, f"{folder}/train.txt", ["2008_1"])
    write_list(root, f"{folder}/val.txt", ["2008_0"])
    assert_images("sbd_train", ["2008_1"])
    assert_images("sbd_val", ["2008_0"])
    assert dataset_classes("sbd_val") == list(VOC_CLASSES) == sorted(VOC_CLASSES)


@pytest.mark.parametrize(
    ("folder", "lists"),
    [("VOCdevkitSDS", "{}.txt"), ("VOCdevkit/VOCSDS", "ImageSets/Main/{}.txt")],
)
def test_split_of_the_papers_in_their_layouts(root, folder, lists):
    (root / folder).mkdir(parents=True)
    write_sbd(root / folder, ["2008_0", "2008_1"])
    write_list(root, f"{folder}/{lists.format('train')}", ["2008_0", "2008_1"])
    assert_images("sbd_sds_train", ["2008_0", "2008_1"])


def test_split_of_the_papers_from_the_list_of_voc(root, caplog):
    (root / "sbd").mkdir()
    write_sbd(root / "sbd", ["2008_0", "2008_1", "2008_2"])
    write_list(root, "sbd/train.txt", ["2008_0", "2008_2"])
    write_list(root, "VOCdevkit/VOC2012/ImageSets/Main/val.txt", ["2011_7", "2008_2", "2008_1"])
    with pytest.raises(FileNotFoundError, match=r"(?s)VOCdevkitSDS/.*or the release of SBD"):
        ensure_files("sbd_sds_val")
    write_list(root, "sbd/val.txt", ["2008_1"])
    with caplog.at_level(logging.INFO):
        assert_images("sbd_sds_val", ["2008_2", "2008_1"])
    assert "sbd_sds_val: SBD has 2 of the 3 images that" in caplog.text
    write_list(root, "VOCdevkit/VOC2012/ImageSets/Main/train.txt", ["2011_7"])
    with pytest.raises(ValueError, match=r"train\.txt and val\.txt have no image of .*train\.txt"):
        ensure_files("sbd_sds_train")


def test_an_incomplete_copy_of_sbd_is_no_smaller_split(root):
    (root / "sbd").mkdir()
    write_sbd(root / "sbd", ["2008_0"])
    write_list(root, "sbd/train.txt", ["2008_0"])
    write_list(root, "sbd/val.txt", ["2008_9"])
    write_list(root, "VOC2012/ImageSets/Main/val.txt", ["2008_0", "2008_9"])
    with pytest.raises(FileNotFoundError, match=r"2008_9\.mat is missing, but the list of images"):
        ensure_files("sbd_sds_val")


@pytest.mark.parametrize("folder", ["VOC2012", "VOCdevkit/VOC2012"])
def test_voc(root, folder):
    write_voc(root / folder, ["2007_0", "2007_1"])
    write_list(root, f"{folder}/ImageSets/Segmentation/val.txt", ["2007_0", "2007_1"])
    assert_images("voc_2012_inst_val", ["2007_0", "2007_1"])


def test_objects_without_a_class_are_left_out(root, caplog):
    write_voc(root / "VOC2012", ["2007_0"])
    labels = np.where(maps(0)[1] == 12, 0, maps(0)[1])
    write_indices(root / "VOC2012/SegmentationClass/2007_0.png", labels)
    write_list(root, "VOC2012/ImageSets/Segmentation/train.txt", ["2007_0"])
    (record,) = DatasetCatalog.get("voc_2012_inst_train")
    assert [a["category_id"] for a in record["annotations"]] == [14]
    assert "1 objects without a class left out; the first is object 1 of 2007_0" in caplog.text


def test_what_is_missing_is_shown(root):
    with pytest.raises(FileNotFoundError) as caught:
        ensure_files("sbd_train")
    text = str(caught.value)
    assert f"'sbd_train' is not in {root}" in text
    assert "  sbd/\n    train.txt\n    img/NAME.jpg\n    inst/NAME.mat\n    cls/NAME.mat" in text
    assert "benchmark_RELEASE/dataset/\n" in text
    (root / "VOC2012" / "JPEGImages").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"VOC2012 lacks ImageSets/Segmentation/val\.txt, "):
        ensure_files("voc_2012_inst_val")


def test_broken_files_are_named(root, monkeypatch):
    (root / "sbd").mkdir()
    write_sbd(root / "sbd", ["2008_0"])
    write_list(root, "sbd/train.txt", ["2008_0", "2008_9"])
    with pytest.raises(FileNotFoundError, match=r"inst/2008_9\.mat is missing"):
        ensure_files("sbd_train")
    write_list(root, "sbd/val.txt", ["2008_0"])
    (root / "sbd/inst/2008_0.mat").write_bytes(b"no MATLAB file")
    with pytest.raises(ValueError, match=r"inst/2008_0\.mat is no MATLAB file with .* GTinst"):
        ensure_files("sbd_val")
    scipy_io.savemat(root / "sbd/inst/2008_0.mat", {"GTinst": {"Segmentation": np.ones((1, 3))}})
    with pytest.raises(ValueError, match=r"not of the size"):
        ensure_files("sbd_val")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r"scipy: pip install 'instseg_ext\[voc\]'"):
        ensure_files("sbd_val")


def test_files_are_read_once_and_again_when_they_change(root, monkeypatch):
    (root / "sbd").mkdir()
    write_sbd(root / "sbd", ["2008_0", "2008_1"])
    write_list(root, "sbd/train.txt", ["2008_0"])
    assert_images("sbd_train", ["2008_0"])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "scipy.io", None)  # nothing is read
        assert_images("sbd_train", ["2008_0"])
    write_list(root, "sbd/train.txt", ["2008_0", "2008_1"])
    assert_images("sbd_train", ["2008_0", "2008_1"])
    # only the cache was written to, and nothing is left beside the files
    assert sorted(path.name for path in (root / "sbd").iterdir()) == [
        "cls", "img", "inst", "train.txt"
    ]  # fmt: skip
    (folder,) = (root.parent / "cache").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["annotations.json", "source.json"]


def test_a_file_written_in_place_is_read_again(root):
    """Also one that is older than the newest of the folder."""
    (root / "sbd").mkdir()
    write_sbd(root / "sbd", ["2008_0", "2008_1"])
    write_list(root, "sbd/train.txt", ["2008_0"])
    os.utime(root / "sbd/inst/2008_0.mat", (1, 1))
    assert_images("sbd_train", ["2008_0"])
    content = {"Segmentation": maps(5)[0], "Categories": np.array([[12], [15]], dtype=np.uint8)}
    with open(root / "sbd/inst/2008_0.mat", "wb") as file:
        scipy_io.savemat(file, {"GTinst": content})
    os.utime(root / "sbd/inst/2008_0.mat", (2, 2))
    (record,) = DatasetCatalog.get("sbd_train")
    assert record["annotations"][0]["bbox"] == [6, 9, 24, 15]


def test_an_interrupted_conversion_is_made_again(root, monkeypatch):
    """The annotations are written, but not yet what says that they are those of the files."""
    (root / "sbd").mkdir()
    write_sbd(root / "sbd", ["2008_0", "2008_1"])
    write_list(root, "sbd/train.txt", ["2008_0"])
    assert_images("sbd_train", ["2008_0"])
    write_list(root, "sbd/train.txt", ["2008_0", "2008_1"])
    write, convert = voc._write, voc._convert
    written, converted = [], []

    def interrupted(path, content):
        if written:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, content)

    def counted(name, source):
        converted.append(name)
        return convert(name, source)

    monkeypatch.setattr(voc, "_convert", counted)
    monkeypatch.setattr(voc, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_files("sbd_train")
    monkeypatch.setattr(voc, "_write", write)
    assert written == ["annotations.json"]
    for _ in range(2):
        assert_images("sbd_train", ["2008_0", "2008_1"])
    assert len(converted) == 2  # the interrupted one, and one of the two after it


def test_names_of_others_are_left_to_them(root, tmp_path):
    """Whoever gives a name to own files has it, once; nobody's own file is written over."""
    own = tmp_path / "own.json"
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "own"}]}
    own.write_text(json.dumps(content))
    cfg = get_cfg()
    add_shared_config(cfg)
    add_data_config(cfg)
    cfg.INSTSEG.DATASETS = [{"NAME": "sbd_train", "JSON": str(own), "IMAGES": str(tmp_path)}]
    for _ in range(2):
        registration.register_from_config(cfg)
        ensure_files("sbd_train")
    assert json.loads(own.read_text()) == content
    assert dataset_classes("sbd_train") == ["own"]
    assert MetadataCatalog.get("sbd_train").evaluator_type == "coco"
    with pytest.raises(ValueError, match=r"own\.json.* cannot also mean .*other\.json"):
        registration.register("sbd_train", tmp_path / "other.json", tmp_path)


@pytest.fixture
def free_name(root):
    """A name of SBD before anybody has registered it."""

    def forget(name):
        registration._REGISTERED.pop(name, None)
        for catalog in (DatasetCatalog, MetadataCatalog):
            if name in catalog.list():
                catalog.remove(name)

    forget("sbd_val")
    yield "sbd_val"
    forget("sbd_val")


def test_a_name_that_another_package_registered_is_left_to_it(free_name):
    DatasetCatalog.register(free_name, lambda: ["theirs"])
    registration.register_bundled()
    assert DatasetCatalog.get(free_name) == ["theirs"]
    assert dataset_files(free_name) is None


@pytest.mark.parametrize("known", [{"thing_classes": ["own"]}, {"json_file": "own.json"}])
def test_a_name_that_others_only_described_is_left_to_them(free_name, known):
    MetadataCatalog.get(free_name).set(**known)
    registration.register_bundled()
    assert MetadataCatalog.get(free_name).as_dict() == {"name": free_name, **known}
    assert free_name not in DatasetCatalog.list()


@pytest.fixture
def sets(root, tmp_path, monkeypatch):
    """What a run on the papers' split needs; it leaves the loggers as they are."""
    for module in (defaults, logger):
        monkeypatch.setattr(module, "setup_logger", lambda *args, **kwargs: None)
    monkeypatch.chdir(tmp_path)
    (root / "VOCdevkitSDS").mkdir()
    write_sbd(root / "VOCdevkitSDS", ["2008_0", "2008_1"])
    write_list(root, "VOCdevkitSDS/train.txt", ["2008_0", "2008_1"])
    write_list(root, "VOCdevkitSDS/val.txt", ["2008_1"])
    return ["DATASETS.TRAIN", "('sbd_sds_train',)", "DATASETS.TEST", "('sbd_sds_val',)"]


CONFIG = "MaskRCNN/mask_rcnn_R_50_FPN_1x"


def test_a_dry_run(sets, tmp_path):
    """``train_net.py --dry-run`` trains, evaluates by AP^r and writes the figures."""
    assert train.main(["--config-file", CONFIG, "--dry-run", *sets, *TINY]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = results["datasets"]["sbd_sds_val"]["map_r"]
    assert found["mAP50"] == found["voc_mAP50"]
    assert found["AP-aeroplane"] is None  # no such object


def test_commands_read_them(sets, tmp_path, capsys):
    assert main.main(["check-dataset", "--dataset", "sbd_sds_train"]) == 0
    assert (
        "2 images, 4 annotations, 20 classes: 18 class-without-instances" in capsys.readouterr().out
    )
    words = ["visualize", "data", "--config-file", CONFIG, "--count", "2", *sets, *TINY]
    assert main.main(words) == 0
    assert (tmp_path / "out" / "visualize" / "data" / "samples.png").is_file()


def test_missing_data_end_a_run_at_once(root, capsys):
    words = ["DATASETS.TRAIN", "('nuclei_train',)", "DATASETS.TEST", "('sbd_val',)", *TINY]
    assert train.main(["--config-file", CONFIG, "--eval-only", *words]) == 2
    error = capsys.readouterr().err
    assert "error: Data set 'sbd_val' is not in" in error
