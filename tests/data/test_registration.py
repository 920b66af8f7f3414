import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from instseg_ext.config import add_shared_config
from instseg_ext.data import (
    add_data_config,
    add_registrations,
    dataset_classes,
    dataset_files,
    parse_register_flag,
    register,
    register_bundled,
    register_from_config,
)

pytestmark = pytest.mark.usefixtures("registry")


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_shared_config(cfg)
    add_data_config(cfg)
    return cfg


def test_register_flag():
    assert parse_register_flag("mine=a/b.json:c/d") == {
        "NAME": "mine",
        "JSON": "a/b.json",
        "IMAGES": "c/d",
    }
    windows = parse_register_flag(r"mine=C:\a.json:images")
    assert windows == {"NAME": "mine", "JSON": r"C:\a.json", "IMAGES": "images"}


@pytest.mark.parametrize(
    "text", ["mine", "mine=a.json", "=a.json:d", "mine=:d", "mine=a.json:", r"m=C:\a"]
)
def test_bad_register_flag(text):
    with pytest.raises(ValueError, match="NAME=ANNOTATIONS"):
        parse_register_flag(text)


def test_names_are_taken_once(tmp_path):
    register("mine", tmp_path / "a.json", tmp_path)
    register("mine", tmp_path / "a.json", tmp_path)
    with pytest.raises(ValueError, match=r"'mine'.*a\.json.*b\.json"):
        register("mine", tmp_path / "b.json", tmp_path)
    with pytest.raises(ValueError, match="taken by detectron2"):
        register("coco_2017_val", tmp_path / "a.json", tmp_path)


def test_bundled_may_be_registered_again_and_touch_no_file():
    register_bundled()
    register_bundled()
    for name in ("nuclei_train", "nuclei_val", "shapes_train"):
        assert name in DatasetCatalog.list()
    assert dataset_classes("nuclei_fold1_val") == ["nucleus"]


def test_loading_a_file_maps_categories(write_coco, good_coco):
    json_file, images = write_coco(good_coco)
    register("mine", json_file, images)
    assert dataset_classes("mine") == ["cat", "dog"]
    assert not hasattr(MetadataCatalog.get("mine"), "thing_classes")
    dicts = DatasetCatalog.get("mine")
    metadata = MetadataCatalog.get("mine")
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1}
    assert metadata.evaluator_type == "coco"
    assert metadata.json_file == str(json_file)
    assert [d["image_id"] for d in dicts] == [10, 20]


def test_unknown_name_lists_the_known_ones():
    register_bundled()
    with pytest.raises(KeyError, match="nuclei_val"):
        dataset_classes("nucleus_val")


def test_registration_travels_in_the_config(cfg, write_coco, good_coco, monkeypatch):
    json_file, images = write_coco(good_coco)
    monkeypatch.chdir(json_file.parent)
    entry = {"NAME": "mine", "JSON": json_file.name, "IMAGES": "images"}
    add_registrations(cfg, [entry, entry])
    assert [{"NAME": "mine", "JSON": str(json_file), "IMAGES": str(images)}] == cfg.INSTSEG.DATASETS
    monkeypatch.chdir("/")
    again = type(cfg).load_cfg(cfg.dump())
    register_from_config(again)
    assert dataset_files("mine") == (json_file, images)
    assert len(DatasetCatalog.get("mine")) == 2


def test_config_entry_without_images(cfg):
    cfg.INSTSEG.DATASETS = [{"NAME": "x", "JSON": "y"}]
    with pytest.raises(ValueError, match=r"INSTSEG\.DATASETS.*IMAGES"):
        register_from_config(cfg)


def test_class_names_of_the_config_stand_in_for_absent_files(cfg, tmp_path, write_coco, good_coco):
    present, images = write_coco(good_coco)
    cfg.INSTSEG.DATASETS = [
        {"NAME": "gone", "JSON": str(tmp_path / "gone.json"), "IMAGES": str(tmp_path)},
        {"NAME": "there", "JSON": str(present), "IMAGES": str(images)},
    ]
    cfg.INSTSEG.CLASS_NAMES = ["cat", "dog"]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("gone",), ("there", "never_registered")
    register_from_config(cfg)
    assert MetadataCatalog.get("gone").thing_classes == ["cat", "dog"]
    assert MetadataCatalog.get("never_registered").thing_classes == ["cat", "dog"]
    assert not hasattr(MetadataCatalog.get("there"), "thing_classes")


def test_the_file_knows_its_names_better_than_the_config(cfg, write_coco, good_coco, tmp_path):
    path = tmp_path / "annotations.json"
    cfg.INSTSEG.DATASETS = [{"NAME": "late", "JSON": str(path), "IMAGES": str(tmp_path / "images")}]
    cfg.INSTSEG.CLASS_NAMES, cfg.DATASETS.TRAIN = ["other"], ("late",)
    register_from_config(cfg)
    write_coco(good_coco)
    DatasetCatalog.get("late")
    assert MetadataCatalog.get("late").thing_classes == ["cat", "dog"]
    assert MetadataCatalog.get("late").json_file == str(path)
