"""Region proposals of a data set: their folder, their sources, and what they find."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from methods.sds.sds_pictures import SIZE, shapes_image
from PIL import Image
from scipy import io

from instseg_ext.cli.main import main
from instseg_ext.data import write_proposals
from instseg_ext.methods.sds import region_files, region_source, write_regions
from instseg_ext.methods.sds.region_files import read_regions, region_file
from instseg_ext.structures.region_proposals import RegionProposals
from instseg_ext.structures.rle import encode_masks, rle_boxes


@pytest.fixture
def images(tmp_path):
    """Three dictionaries; the last has no object, the second a crowd beside two."""
    (tmp_path / "images").mkdir()
    dicts = []
    for number, image_id in enumerate((7, 8, 9)):
        image, masks = shapes_image(number)
        path = tmp_path / "images" / f"picture{number}.png"
        Image.fromarray(image).save(path)
        annotations = [
            {"segmentation": rle, "iscrowd": int(number == 1 and row == 2), "category_id": 0}
            for row, rle in enumerate(encode_masks(masks) if number < 2 else [])
        ]
        dicts.append(
            {
                "file_name": str(path),
                "image_id": image_id,
                "height": SIZE[0],
                "width": SIZE[1],
                "annotations": annotations,
            }
        )
    return dicts


def boxes_of(masks):
    return torch.from_numpy(rle_boxes(encode_masks(masks))).float()


class Masks:
    """Proposes an image's own shapes; refuses to do it twice, or at another size."""

    def __init__(self, shift=0):
        self.shift = shift
        self.made = []

    def __call__(self, record):
        assert record["image_id"] not in self.made
        self.made.append(record["image_id"])
        masks = shapes_image()[1][:, self.shift :]
        return RegionProposals.from_masks(masks[:2], torch.tensor([0.5, 0.25]))


def test_a_folder_is_written_and_read(tmp_path, images):
    folder = tmp_path / "new" / "regions"
    summary = write_regions(images, folder, Masks(), {"kind": "own"})
    assert summary["images"] == 3
    assert summary["regions_per_image"] == 2
    assert summary["objects"] == 5  # without the crowd
    # four of the five are proposed, the third shape of the first image is not
    assert summary["recall"]["100"] == {
        "0.5": 0.8,
        "0.7": 0.8,
        "mean_best_iou": pytest.approx(0.8),
    }
    assert json.loads((folder / "regions.json").read_text()) == summary
    found = read_regions(folder, 8, SIZE)
    np.testing.assert_array_equal(found.masks().numpy(), shapes_image()[1][:2])
    assert found.scores.tolist() == [0.5, 0.25]
    assert sorted(path.name for path in folder.iterdir()) == [
        *("7.npz", "8.npz", "9.npz", "regions.json")
    ]


def test_recall_counts_the_first_regions(tmp_path, images, monkeypatch):
    monkeypatch.setattr(region_files, "RECALL_AT", (1, 2))
    summary = write_regions(images, tmp_path / "r", Masks(), {})
    assert summary["recall"]["1"]["0.5"] == 0.4
    assert summary["recall"]["2"]["0.5"] == 0.8
    nothing = [{**record, "annotations": []} for record in images]
    summary = write_regions(nothing, tmp_path / "r", Masks(), {})
    assert summary["objects"] == 0
    assert "recall" not in summary


def test_it_goes_on_where_it_stopped(tmp_path, images):
    class Breaks(Masks):
        def __call__(self, record):
            if record["image_id"] == 9:
                raise KeyboardInterrupt
            return super().__call__(record)

    with pytest.raises(KeyboardInterrupt):
        write_regions(images, tmp_path / "r", Breaks(), {"kind": 1})
    (tmp_path / "r" / ".9.npz.1234.part").write_bytes(b"half")
    rest = Masks()
    summary = write_regions(images, tmp_path / "r", rest, {"kind": 1})
    assert rest.made == [9]
    assert summary["recall"]["100"]["0.5"] == 0.8
    assert not (tmp_path / "r" / ".9.npz.1234.part").exists()
    with pytest.raises(FileExistsError, match=r"made with \{'kind': 1\}, not with \{'kind': 2\}"):
        write_regions(images, tmp_path / "r", Masks(), {"kind": 2})
    again = Masks()
    write_regions(images[:2], tmp_path / "r", again, {"kind": 2}, force=True)
    assert again.made == [7, 8]
    assert not region_file(tmp_path / "r", 9).exists()


def test_folders_of_others_stay_as_they_are(tmp_path, images):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("Dear")
    with pytest.raises(FileExistsError, match="holds other files"):
        write_regions(images, tmp_path / "mine", Masks(), {}, force=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "regions.json").write_text("[]")
    with pytest.raises(FileExistsError, match="made with None"):
        write_regions(images, tmp_path / "other", Masks(), {})
    with pytest.raises(ValueError, match="no image"):
        write_regions([], tmp_path / "none", Masks(), {})


def test_what_is_missing_or_does_not_fit_is_named(tmp_path, images):
    with pytest.raises(FileNotFoundError, match=r"no regions of image 7.*propose-regions"):
        read_regions(tmp_path, 7)
    with pytest.raises(ValueError, match="image 7 are of an image of size"):
        write_regions(images, tmp_path / "r", Masks(shift=1), {})
    write_regions(images, tmp_path / "s", Masks(), {})
    with pytest.raises(ValueError, match="made for other data"):
        read_regions(tmp_path / "s", 7, (5, 5))
    # an id is not a path
    assert region_file("r", "a/../b").name == "a%2F..%2Fb.npz"


def test_regions_of_a_proposal_file(tmp_path, images):
    masks, boxes, path = shapes_image()[1], boxes_of(shapes_image()[1]), tmp_path / "file.pt"
    logits = torch.tensor([0.0, 2.0, 1.0])
    write_proposals(path, [(str(k), boxes, logits, encode_masks(masks)) for k in (7, 8)])
    source = region_source(path, "builtin", 2, 0)
    for copy in (source, pickle.loads(pickle.dumps(source))):
        found = copy(images[0])
        np.testing.assert_array_equal(found.masks().numpy(), masks[[1, 2]])
        torch.testing.assert_close(found.scores, torch.tensor([2.0, 1.0]).sigmoid())
    with pytest.raises(ValueError, match=r"file\.pt lacks image 9"):
        source(images[2])
    write_proposals(path, [("7", boxes, logits)])
    found = region_source(path, "builtin", 2, 0)(images[0])
    assert len(found) == 2
    # crude: what else is in the box belongs to it
    assert found.iou(masks[[1, 2]]).diagonal().tolist() == pytest.approx([1, 0.5], abs=0.1)


def test_regions_of_results(tmp_path, images):
    masks, path = shapes_image()[1], tmp_path / "results.json"
    results = [
        {"image_id": 7, "category_id": 1, "score": score, "segmentation": rle}
        for score, rle in zip((0.2, 0.9, 0.5), encode_masks(masks), strict=True)
    ]
    results[0]["segmentation"] = [[1, 1, 9, 1, 9, 9, 1, 9]]
    path.write_text(json.dumps(results))
    found = region_source(path, "builtin", 3, 0)(images[0])
    np.testing.assert_array_equal(found.masks().numpy()[:2], masks[[1, 2]])
    assert found.boxes[2].tolist() == [1, 1, 9, 9]
    assert len(region_source(path, "builtin", 1, 0)(images[0])) == 1
    assert len(region_source(path, "builtin", 1, 0)(images[1])) == 0
    results[1]["segmentation"] = {"size": [3, 3], "counts": "09"}
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"results\.json, image 7: bad mask"):
        region_source(path, "builtin", 3, 0)(images[0])
    for content in ("{", '{"a": 1}', '[{"image_id": 1}]'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"results\.json is no COCO result file"):
            region_source(path, "builtin", 3, 0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        region_source(Path("nowhere"), "builtin", 3, 0)


def test_regions_of_mcg(tmp_path, images):
    masks = RegionProposals.from_masks(shapes_image()[1])
    labels = np.empty(3, dtype=object)
    labels[:] = [np.flatnonzero(column) + 1 for column in masks.members.numpy().T]
    content = {"superpixels": masks.superpixels.numpy() + 1, "labels": labels}
    io.savemat(tmp_path / "picture0.mat", {"candidates": content})
    source = region_source(tmp_path, "builtin", 2, 0)
    np.testing.assert_array_equal(source(images[0]).masks().numpy(), shapes_image()[1][:2])
    with pytest.raises(FileNotFoundError, match=r"picture1\.mat"):
        source(images[1])


def register_flag(tmp_path, images):
    content = {
        "images": [
            {"id": d["image_id"], "file_name": Path(d["file_name"]).name, "height": SIZE[0],
             "width": SIZE[1]}
            for d in images
        ],
        "categories": [{"id": 1, "name": "shape"}],
        "annotations": [
            {"id": 10 * d["image_id"] + row, "image_id": d["image_id"], "category_id": 1,
             "iscrowd": a["iscrowd"], "segmentation": a["segmentation"], "area": 200,
             "bbox": [0, 0, 20, 20]}
            for d in images for row, a in enumerate(d["annotations"])
        ],
    }  # fmt: skip
    (tmp_path / "shapes.json").write_text(json.dumps(content))
    return f"region_shapes={tmp_path / 'shapes.json'}:{tmp_path / 'images'}"


def test_the_command(tmp_path, images, capsys):
    command = ["propose-regions", "--register", register_flag(tmp_path, images)]
    command += ["--dataset", "region_shapes", "--output", str(tmp_path / "out")]
    assert main([*command, "--max-regions", "150", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "3 images, " in out
    assert "5 objects" in out
    assert "1.000       1.000" in out
    settings = json.loads((tmp_path / "out" / "regions.json").read_text())["settings"]
    assert settings == {
        "dataset": "region_shapes", "source": "builtin", "seed": 0, "max_regions": 150,
    }  # fmt: skip
    assert len(read_regions(tmp_path / "out", 7, SIZE)) <= 150
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--max-regions", "0"]) == 2
    assert "--max-regions must be at least 1" in capsys.readouterr().err
    assert main([*command, "--from", str(tmp_path / "no.json")]) == 2
    assert "no.json" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_share_the_images(tmp_path, images):
    source = region_source(None, "builtin", 150, 0)
    alone = write_regions(images, tmp_path / "a", source, {})
    together = write_regions(images, tmp_path / "b", source, {}, workers=2)
    assert alone == together
    for record in images:
        one, other = (read_regions(tmp_path / name, record["image_id"]) for name in "ab")
        assert torch.equal(one.members, other.members)
    Path(images[1]["file_name"]).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"picture1\.png \(image id 8\) cannot be read"):
        write_regions(images, tmp_path / "c", source, {}, workers=2)
