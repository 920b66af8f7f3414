"""Label maps: reading, augmentation, data sets."""

from __future__ import annotations

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from PIL import Image

import instseg_ext
from instseg_ext import data
from instseg_ext.data.semantic import read_labels, semantic_augmentations

CONFIG = "PointRend/pointrend_semantic_R_101_FPN_1x_cityscapes"
CLASSES = ["ground", "left", "right"]
HEIGHT, WIDTH = 40, 60


def config(*opts):
    numbers = ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3, "MODEL.POINT_HEAD.NUM_CLASSES", 3)
    return instseg_ext.get_config(CONFIG, ["MODEL.DEVICE", "cpu", *numbers, *opts])


def plain(*opts):
    """Without random changes."""
    off = ("INPUT.CROP.ENABLED", False, "INPUT.COLOR_AUG_SSD", False, "INPUT.RANDOM_FLIP", "none")
    return config("INPUT.MIN_SIZE_TRAIN", (0,), *off, *opts)


def label_map():
    labels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    labels[:, :20], labels[10:30, 40:] = 1, 2
    labels[-3:] = 255
    return labels


def entry(folder, labels=None, image_size=(HEIGHT, WIDTH), mode=None):
    """Write an image whose colours follow its labels, and return its dictionary."""
    labels = label_map() if labels is None else labels
    image = np.zeros((*image_size, 3), dtype=np.uint8)
    image[..., 0] = 20
    if labels.shape == image_size:
        image[labels == 1], image[labels == 2] = 100, 200
    Image.fromarray(image).save(folder / "image.png")
    stored = Image.fromarray(labels)
    if mode == "P":
        stored.putpalette([200, 10, 10, 10, 200, 10] * 128)
    stored.save(folder / "labels.png")
    return {
        "file_name": str(folder / "image.png"),
        "sem_seg_file_name": str(folder / "labels.png"),
        "image_id": 7,
    }


def read(record, num_classes=3, ignore_value=255):
    sized = {"height": HEIGHT, "width": WIDTH, **record}
    return read_labels(sized, num_classes, ignore_value)


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, "P"])
def test_labels_are_the_stored_numbers(tmp_path, mode):
    """Those of a palette image too, which shows them as colours."""
    labels = read(entry(tmp_path, mode=mode))
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, label_map())


def test_many_classes(tmp_path):
    labels = np.full((HEIGHT, WIDTH), 700, dtype=np.uint16)
    read_back = read(entry(tmp_path, labels), num_classes=800)
    assert read_back.dtype == np.float32
    assert (read_back == 700).all()


def test_missing_label_map_names_both_files(tmp_path):
    record = entry(tmp_path)
    (tmp_path / "labels.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"labels\.png of image .*image\.png is missing"):
        read(record)


def test_broken_label_map(tmp_path):
    record = entry(tmp_path)
    (tmp_path / "labels.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"labels\.png of image .*image\.png cannot be read"):
        read(record)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": np.zeros((HEIGHT, WIDTH, 3), np.uint8)}, "one whole number per pixel"),
        ({"labels": np.zeros((HEIGHT, 5), np.uint8)}, "5 x 40 pixels, but image .* is 60 x 40"),
        ({"labels": label_map() + (label_map() == 2)}, r"holds \[3\]: labels are 0 to 2, or 255"),
    ],
)
def test_wrong_label_maps_are_named(tmp_path, change, words):
    with pytest.raises(ValueError, match=words) as error:
        read(entry(tmp_path, **change))
    assert "labels.png" in str(error.value)
    assert "image.png" in str(error.value)


def test_ignored_label_is_that_of_the_head(tmp_path):
    with pytest.raises(ValueError, match=r"holds \[255\].*IGNORE_VALUE"):
        read(entry(tmp_path), ignore_value=-1)


def test_image_without_label_map(tmp_path):
    record = entry(tmp_path)
    del record["sem_seg_file_name"]
    with pytest.raises(ValueError, match="needs 'sem_seg_file_name'"):
        data.SemanticDatasetMapper(plain(), True)(record)


# --- mapper -------------------------------------------------------------------------------------


def test_image_and_labels_of_a_sample(tmp_path):
    record = entry(tmp_path)
    before = dict(record)
    sample = data.SemanticDatasetMapper(plain(), True)(record)
    assert record == before
    assert sample["image"].shape == (3, HEIGHT, WIDTH)
    assert sample["sem_seg"].dtype.is_floating_point is False
    assert np.array_equal(sample["sem_seg"].numpy(), label_map())
    assert (sample["height"], sample["width"]) == (HEIGHT, WIDTH)
    assert "sem_seg_file_name" not in sample


def test_test_samples_have_no_labels(tmp_path):
    record = entry(tmp_path)
    (tmp_path / "labels.png").unlink()
    cfg = config("INPUT.MIN_SIZE_TEST", 20, "INPUT.MAX_SIZE_TEST", 40)
    sample = data.SemanticDatasetMapper(cfg, False)(record)
    assert sample["image"].shape == (3, 20, 30)
    assert "sem_seg" not in sample


@pytest.mark.parametrize("stretch", [(), ("INSTSEG.STRETCH", [32, 48])], ids=["crop", "stretch"])
def test_labels_move_with_the_image(tmp_path, stretch):
    """Red grey levels tell the label; only pixels at borders of labels may have mixed colours."""
    sizes = (0,) if stretch else (80, 96)
    opts = (
        *("INPUT.MIN_SIZE_TRAIN", sizes, "INPUT.CROP.SIZE", (32, 48)),
        *("INPUT.COLOR_AUG_SSD", False, "INSTSEG.AUGMENTATIONS.ROTATE90", not stretch),
        *stretch,
    )
    mapper = data.SemanticDatasetMapper(config(*opts), True)
    record = entry(tmp_path)
    for seed in range(6):
        np.random.seed(seed)  # noqa: NPY002
        sample = mapper(record)
        labels, image = sample["sem_seg"].numpy(), sample["image"].float().numpy()[2]
        assert labels.shape == image.shape
        assert sorted(labels.shape) == [32, 48]
        kept = labels != 255
        told = np.searchsorted([60, 150], image)
        assert (told == labels)[kept].mean() > 0.9


def test_colours_stay_those_of_pictures(tmp_path):
    mapper = data.SemanticDatasetMapper(plain("INPUT.COLOR_AUG_SSD", True), True)
    record, means = entry(tmp_path), set()
    for seed in range(8):
        np.random.seed(seed)  # noqa: NPY002
        image = mapper(record)["image"]
        assert image.min() >= 0
        assert image.max() <= 255
        means.add(round(float(image.mean()), 3))
    assert len(means) > 4


def test_crops_are_drawn_again_while_one_class_fills_them():
    """At most ten times; a class alone can not be helped."""
    crop = semantic_augmentations(config("INPUT.CROP.SIZE", (20, 20)))[1]
    assert isinstance(crop, T.RandomCrop_CategoryAreaConstraint)
    labels = np.zeros((40, 400), dtype=np.uint8)
    labels[:, 200:] = 1
    image = np.zeros((40, 400, 3), dtype=np.uint8)
    mixed = 0
    for seed in range(40):
        np.random.seed(seed)  # noqa: NPY002
        cut = crop.get_transform(image, labels).apply_segmentation(labels)
        mixed += 0.25 < cut.mean() < 0.75
    # One crop has a chance of 10 / 381.
    assert mixed >= 4
    assert crop.get_transform(image, labels * 0).apply_segmentation(labels).shape == (20, 20)


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (("INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", 0.0), "SINGLE_CATEGORY_MAX_AREA is above 0"),
        (("INPUT.FORMAT", "YUV-BT.601"), "COLOR_AUG_SSD needs INPUT.FORMAT RGB or BGR"),
        (("INSTSEG.AUGMENTATIONS.SSD.ENABLED", True), "set INPUT.COLOR_AUG_SSD"),
        (
            ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
            "SAMPLER_TRAIN must be TrainingSampler",
        ),
    ],
)
def test_impossible_values_are_refused(opts, words):
    with pytest.raises(ValueError, match=words):
        data.SemanticDatasetMapper(config(*opts), True)


# --- data sets ----------------------------------------------------------------------------------


@pytest.fixture
def register():
    """Register a data set of label maps for the time of a test."""
    names = []

    def add(name, dicts, **metadata):
        names.append(name)
        known = {"evaluator_type": "sem_seg", "ignore_label": 255, "stuff_classes": CLASSES}
        DatasetCatalog.register(name, lambda: dicts)
        MetadataCatalog.get(name).set(**{**known, **metadata})
        return name

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_classes_of_label_maps(register):
    """Cityscapes has names of instances beside them."""
    name = register("maps", [], thing_classes=["car"], evaluator_type="cityscapes_sem_seg")
    assert data.is_semantic(name)
    assert not data.is_semantic("nuclei_train")
    assert data.dataset_classes(name) == CLASSES
    assert data.dataset_classes("cityscapes_fine_sem_seg_val")[:2] == ["road", "sidewalk"]
    with pytest.raises(KeyError, match=r"get\('nameless'\)\.stuff_classes"):
        data.dataset_classes(register("nameless", [], stuff_classes=[]))


def test_loader_takes_sets_without_sizes(register, tmp_path):
    name = register("maps", [entry(tmp_path)] * 3)
    cfg = plain("DATASETS.TRAIN", (name,), "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0)
    assert cfg.DATALOADER.ASPECT_RATIO_GROUPING
    mapper = data.SemanticDatasetMapper(cfg, True)
    batch = next(iter(data.build_train_loader(cfg, mapper, seed=0)))
    assert [set(np.unique(sample["sem_seg"])) for sample in batch] == [{0, 1, 2, 255}] * 2


def test_sets_trained_together_have_the_same_classes(register, tmp_path):
    register("maps", [entry(tmp_path)])
    register("others", [entry(tmp_path)], stuff_classes=["a", "b", "c"])
    assert len(data.load_training_dicts(["maps", "maps"])) == 2
    with pytest.raises(ValueError, match="need the same classes"):
        data.load_training_dicts(["maps", "others"])
    with pytest.raises(ValueError, match="none of 0 images"):
        data.load_training_dicts([register("empty", [])])


def test_model_and_data_must_fit(register):
    name = register("maps", [])
    semantic = data.SemanticDatasetMapper(plain(), True)
    instances = data.InstSegDatasetMapper(plain(), True)
    data.check_annotation_kind([name], semantic)
    data.check_annotation_kind(["nuclei_train"], instances)
    with pytest.raises(ValueError, match=r"'maps' holds label maps, .* predicts instances"):
        data.check_annotation_kind(["nuclei_train", name], instances)
    with pytest.raises(ValueError, match=r"'nuclei_train' holds instances, .* predicts label maps"):
        data.check_annotation_kind([name, "nuclei_train"], semantic)
