"""``instseg visualize``: worst first, from results or from the model; figures of a method."""

import argparse
import dataclasses
import json

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from instseg_ext import data
from instseg_ext.cli import common, visualize
from instseg_ext.structures.rle import encode_masks


def run(*words):
    parser = argparse.ArgumentParser()
    visualize.add_parser(parser.add_subparsers())
    args, rest = parser.parse_known_args(["visualize", *map(str, words)])
    args.opts = rest
    return args.run(args)


@pytest.fixture
def blob_data(tmp_path, use_blobs, picture):
    """Three pictures; the annotations of the second lie elsewhere than what the model finds."""
    images, annotations = [], []
    for index in range(3):
        drawn = picture()
        cv2.imwrite(str(tmp_path / f"im{index}.png"), drawn)
        images.append({"id": index + 1, "file_name": f"im{index}.png", "height": 60, "width": 90})
        grey = np.roll(drawn[:, :, 0] > 60, 20 if index == 1 else 0, axis=0)
        for part, category in ((grey[:, :50], 9), (grey[:, 50:], 4)):
            mask = np.zeros((60, 90), dtype=bool)
            mask[:, slice(0, 50) if category == 9 else slice(50, 90)] = part
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": category,
                    "iscrowd": 0,
                    "segmentation": encode_masks(mask[None])[0],
                }
            )
    categories = [{"id": 4, "name": "tall"}, {"id": 9, "name": "wide"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    name = f"blobs_{tmp_path.name}"
    data.register(name, tmp_path / "truth.json", tmp_path)
    use_blobs.DATASETS.TEST = (name,)
    yield content
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
    data.registration._REGISTERED.pop(name)


def test_predictions_of_the_model_worst_first(blob_data, tmp_path, caplog):
    out = tmp_path / "pictures"
    with caplog.at_level("INFO"):
        assert run("predictions", "--output", out, "--confidence-threshold", 0.3) == 0
    names = [p.name for p in sorted(out.iterdir())]
    assert names == ["001_im1.png", "002_im0.png", "003_im2.png", "contact_sheet.png"]
    assert "Mean quality of 3 images: 0.667" in caplog.text
    pair = cv2.imread(str(out / "002_im0.png"))
    assert pair.shape[1] > 1.9 * pair.shape[0]
    sheet = cv2.imread(str(out / "contact_sheet.png"))
    assert sheet.shape[1] > 800
    with pytest.raises(FileExistsError, match="--overwrite"):
        run("predictions", "--output", out)


def test_predictions_from_a_result_file(blob_data, tmp_path):
    results = tmp_path / "results.json"
    found = [
        {k: a[k] for k in ("image_id", "category_id", "segmentation")} | {"score": 0.9}
        for a in blob_data["annotations"]
        if a["image_id"] != 3
    ]
    results.write_text(json.dumps(found))
    words = ["predictions", "--results", results, "--output"]
    assert run(*words, tmp_path / "a", "--count", 2) == 0
    assert sorted(p.name for p in (tmp_path / "a").glob("0*")) == ["001_im2.png", "002_im0.png"]
    assert run(*words, tmp_path / "b", "--order", "best", "--limit", 1) == 0
    assert [p.name for p in (tmp_path / "b").glob("0*")] == ["001_im0.png"]


def test_bad_requests_are_named(blob_data, use_blobs, tmp_path):
    with pytest.raises(ValueError, match=r"no figure 'rays'; known are data, predictions"):
        run("rays")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        run("predictions", "--results", tmp_path / "nowhere.json")
    strange = tmp_path / "strange.json"
    for content, message in (
        ("{", "not valid JSON"),
        ('{"a": 1}', "no list of COCO results"),
        ('[{"image_id": 77, "category_id": 1, "score": 1}]', "another data set"),
        ('[{"image_id": 1, "category_id": 1, "score": 1, "bbox": [0, 0, 2, 2]}]', "boxes only"),
    ):
        strange.write_text(content)
        with pytest.raises(ValueError, match=message):
            run("predictions", "--results", strange)
    use_blobs.MODEL.WEIGHTS = ""
    with pytest.raises(ValueError, match="--weights"):
        run("predictions")
    use_blobs.DATASETS.TEST = ()
    with pytest.raises(ValueError, match="--dataset is missing"):
        run("predictions")


def test_figures_of_a_method(blob_data, blob_method, use_blobs, monkeypatch, tmp_path):
    calls = []

    def figure(cfg, make_predictor, pictures, folder):
        assert make_predictor() is make_predictor()
        found = [len(make_predictor()(entry.picture)) for entry in pictures]
        objects = [entry.annotations and len(entry.annotations) for entry in pictures]
        calls.append(([entry.name for entry in pictures], found, objects, cfg, folder))
        return [folder / f"{entry.name}.png" for entry in pictures]

    method = dataclasses.replace(blob_method, figures={"rays": figure})
    monkeypatch.setattr(common, "config_from_args", lambda args: (use_blobs, method))
    assert run("rays", "--count", 2) == 0
    assert run("rays", "--input", tmp_path / "im1.png", "--output", tmp_path / "r") == 0
    assert run("rays", "--count", 0, "--output", tmp_path / "all") == 0
    assert calls[0] == (["im0", "im1"], [1, 1], [2, 2], use_blobs, calls[0][-1])
    assert calls[1] == (["im1"], [1], [None], use_blobs, tmp_path / "r")
    assert len(calls[2][0]) == 3
    with pytest.raises(ValueError, match=r"--count .* not -1"):
        run("rays", "--count", -1, "--output", tmp_path / "none")


def test_a_figure_without_a_model_needs_no_weights_and_reads_one_picture_at_a_time(
    blob_data, blob_method, use_blobs, monkeypatch, tmp_path
):
    (tmp_path / "im2.png").unlink()
    use_blobs.MODEL.WEIGHTS = str(tmp_path / "nowhere.pth")
    seen = []

    def figure(cfg, make_predictor, pictures, folder):
        seen.extend(next(iter(pictures)).annotations)
        return []

    method = dataclasses.replace(blob_method, figures={"bound": figure})
    monkeypatch.setattr(common, "config_from_args", lambda args: (use_blobs, method))
    assert run("bound") == 0
    assert [annotation["category_id"] for annotation in seen] == [1, 0]
    assert {"bbox", "bbox_mode", "segmentation", "iscrowd"} <= set(seen[0])
