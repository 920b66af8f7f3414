"""``instseg predict``: inputs of all kinds, thresholds, files, failures."""

import argparse
import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from pycocotools.coco import COCO

from instseg_ext import compat
from instseg_ext.cli import predict


def run(*words):
    parser = argparse.ArgumentParser()
    predict.add_parser(parser.add_subparsers())
    args, rest = parser.parse_known_args(["predict", *map(str, words)])
    args.opts = rest
    return args.run(args)


@pytest.fixture
def pictures(tmp_path, picture):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, name in enumerate(("a.png", "b.jpg", "c.bmp")):
        cv2.imwrite(str(folder / name), picture(shift=5 * index))
    (folder / "notes.txt").write_text("no picture")
    return folder


def results_of(folder):
    return json.loads((folder / "predictions.json").read_text())


def test_a_folder_of_pictures(use_blobs, pictures, tmp_path):
    out = tmp_path / "drawn"
    status = run("--input", pictures, "--output", out, "--confidence-threshold", 0.3)
    assert status == 0
    drawings = sorted(p.name for p in out.iterdir())
    assert drawings == ["a.png", "b.jpg", "c.png", "images.json", "predictions.json"]
    drawn = cv2.imread(str(out / "a.png"))
    assert drawn.shape == (360, 540, 3)  # enlarged to be legible
    assert len(np.unique(drawn @ np.array([1, 256, 65536]))) > 20
    results = results_of(out)
    assert len(results) == 6
    assert {tuple(sorted(r)) for r in results} == {
        ("bbox", "category_id", "image_id", "score", "segmentation")
    }
    truth = COCO(str(out / "images.json"))  # both files together are what COCO tools expect
    found = truth.loadRes(str(out / "predictions.json"))
    assert [truth.imgs[i]["file_name"].rsplit("/")[-1] for i in (1, 2, 3)] == [
        "a.png",
        "b.jpg",
        "c.bmp",
    ]
    first = found.loadAnns(found.getAnnIds(imgIds=[1]))
    assert {truth.cats[a["category_id"]]["name"] for a in first} == {"tall", "wide"}
    wide = next(a for a in first if truth.cats[a["category_id"]]["name"] == "wide")
    assert found.annToMask(wide).sum() == 400
    assert wide["bbox"] == [5, 10, 40, 10]


@pytest.mark.parametrize(("threshold", "count"), [(0.0, 2), (0.3, 2), (0.6, 1), (2.0, 0)])
def test_threshold_lowers_the_models_own_and_filters(
    use_blobs, pictures, tmp_path, threshold, count
):
    out = tmp_path / "drawn"
    run("--input", pictures / "a.png", "--output", out, "--confidence-threshold", threshold)
    assert len(results_of(out)) == count
    assert use_blobs.MODEL.RETINANET.SCORE_THRESH_TEST == 0.5


def test_unreadable_files_are_named_and_skipped(use_blobs, pictures, tmp_path, caplog):
    (pictures / "broken.png").write_bytes(b"\x89PNG nonsense")
    (pictures / "broken.avi").write_bytes(b"nonsense")
    with caplog.at_level("ERROR"):
        status = run("--input", pictures, "--output", tmp_path / "drawn")
    assert status == 1
    assert "2 inputs could not be read" in caplog.text
    assert "broken.png" in caplog.text
    assert "broken.avi" in caplog.text
    assert len(results_of(tmp_path / "drawn")) == 3


def test_missing_inputs_and_weights_stop_before_any_work(use_blobs, pictures, tmp_path):
    for what in ("nothing.png", "no/*.jpg"):
        with pytest.raises(FileNotFoundError, match="matches nothing"):
            run("--input", pictures / "a.png", what, "--output", tmp_path / "drawn")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no pictures"):
        run("--input", tmp_path / "empty", "--output", tmp_path / "drawn")
    with pytest.raises(ValueError, match="--output is missing"):
        run("--input", pictures)
    use_blobs.MODEL.WEIGHTS = ""
    with pytest.raises(ValueError, match="--weights is missing"):
        run("--input", pictures, "--output", tmp_path / "drawn")


def test_weights_of_others_without_a_config_name_the_converter(pictures, tmp_path):
    weights = tmp_path / "fcis_coco-0000.params"
    weights.write_bytes(b"\x12\x01" + bytes(6))
    with pytest.raises(ValueError, match=r"0000\.params carries no config .* `instseg convert`"):
        run("--weights", weights, "--input", pictures, "--output", tmp_path / "drawn")


def test_outputs_are_not_replaced_unasked(use_blobs, pictures, tmp_path):
    out = tmp_path / "drawn"
    assert run("--input", pictures / "a.png", "--output", out) == 0
    before = (out / "a.png").read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        run("--input", pictures / "a.png", "--output", out, "--confidence-threshold", 0.1)
    assert (out / "a.png").read_bytes() == before
    words = ["--input", pictures / "a.png", "--output", out, "--overwrite"]
    assert run(*words, "--confidence-threshold", 0.1) == 0
    assert (out / "a.png").read_bytes() != before
    with pytest.raises(FileExistsError, match="is an input"):
        run("--input", pictures / "a.png", "--output", pictures, "--overwrite")


def test_glob_equal_names_and_overrides_after_the_input(
    use_blobs, pictures, tmp_path, picture, monkeypatch
):
    (pictures / "sub").mkdir()
    cv2.imwrite(str(pictures / "sub" / "a.png"), picture())
    seen = []
    cfg, method = predict.common.config_from_args(None)
    monkeypatch.setattr(
        predict.common, "config_from_args", lambda args: (seen.append(args.opts), (cfg, method))[1]
    )
    out = tmp_path / "drawn"
    words = ["--output", out, "--input", f"{pictures}/**/a.png", "MODEL.DEVICE", "cpu"]
    assert run(*words) == 0
    assert seen == [["MODEL.DEVICE", "cpu"]]
    assert {p.name for p in out.glob("*.png")} == {"a.png", "a_2.png"}


def test_no_drawings(use_blobs, pictures, tmp_path):
    out = tmp_path / "drawn"
    assert run("--input", pictures, "--output", out, "--no-drawings") == 0
    assert sorted(p.name for p in out.iterdir()) == ["images.json", "predictions.json"]


@pytest.mark.parametrize("suffix", [".avi", ".mp4"])
def test_video_round_trip(use_blobs, tmp_path, picture, suffix):
    path = tmp_path / f"clip{suffix}"
    code = cv2.VideoWriter_fourcc(*{".avi": "MJPG", ".mp4": "mp4v"}[suffix])
    writer = cv2.VideoWriter(str(path), code, 12.5, (128, 96))
    for shift in range(8):
        frame = np.zeros((96, 128, 3), dtype=np.uint8)
        frame[:60, :90] = picture(shift=shift)
        writer.write(frame)
    writer.release()
    out = tmp_path / "drawn"
    assert run("--input", path, "--output", out, "--max-frames", 6) == 0
    capture = cv2.VideoCapture(str(out / f"clip{suffix}"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(12.5, rel=0.01)
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1])
    assert len(frames) == 6
    assert frames[0].shape == (96, 128, 3)
    assert frames[0].std(axis=2).max() > 20  # colour on grey
    images = json.loads((out / "images.json").read_text())["images"]
    assert [i["file_name"].split("#")[1] for i in images] == [str(n) for n in range(6)]
    assert len(results_of(out)) == 6


def test_window_only_where_there_is_a_display(use_blobs, pictures, monkeypatch):
    monkeypatch.setattr(compat, "has_gui", lambda: False)
    with pytest.raises(ValueError, match="--show needs a display"):
        run("--input", pictures, "--show")
    monkeypatch.setattr(compat, "has_gui", lambda: True)
    shown = []
    monkeypatch.setattr(cv2, "imshow", lambda title, image: shown.append(image))
    monkeypatch.setattr(cv2, "waitKey", lambda ms: ord("q") if len(shown) == 2 else 0)
    assert run("--input", pictures, "--show") == 0
    assert len(shown) == 2


def test_camera_is_asked_by_number(use_blobs, tmp_path, picture, monkeypatch):
    class Camera:
        def __init__(self, number):
            assert number == 0
            self.left = 3

        def isOpened(self):
            return True

        def get(self, what):
            return 0.0

        def read(self):
            self.left -= 1
            return self.left >= 0, picture()

        def release(self):
            pass

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    monkeypatch.chdir(tmp_path)
    assert run("--input", "0", "--output", tmp_path / "drawn", "--confidence-threshold", 0.6) == 0
    assert (tmp_path / "drawn" / "camera0.mp4").stat().st_size > 0
    assert len(results_of(tmp_path / "drawn")) == 3


def test_weights_that_hold_objects_need_the_flag(use_blobs, pictures, tmp_path):
    """A checkpoint of another tool with its argparse namespace inside, as mmdet's and yolact's."""
    model = META_ARCH_REGISTRY.get("TestBlobModel")(use_blobs)
    weights = tmp_path / "foreign.pth"
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=1)}, weights)
    use_blobs.MODEL.WEIGHTS = str(weights)
    words = ("--input", pictures / "a.png", "--output", tmp_path / "drawn")
    with pytest.raises(ValueError, match="--unsafe"):
        run(*words)
    assert run(*words, "--unsafe") == 0
