"""How well masks and scores of single patches fit."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import instseg_ext
from instseg_ext.cli.main import main
from instseg_ext.data import load_training_dicts
from instseg_ext.methods.deepmask.arch import PatchOutputs
from instseg_ext.methods.deepmask.patch_metric import evaluate_patches, mask_iou, summary

CONFIG = "DeepMask/nuclei_sharpmask_R_18"


@pytest.fixture(scope="module")
def cfg():
    return instseg_ext.get_config(CONFIG, ["MODEL.DEVICE", "cpu"])


@pytest.fixture(scope="module")
def dicts():
    return load_training_dicts(["nuclei_val"])


class Oracle(nn.Module):
    """Knows the masks; predicts them whole, without their left half where they are coarse."""

    device = torch.device("cpu")

    def __init__(self, refined):
        super().__init__()
        self.refined, self.calls = refined, []

    def patch_outputs(self, samples):
        assert not self.training
        self.calls.append(len(samples))
        masks = [s.get("target", torch.zeros(8, 8, dtype=torch.bool)) for s in samples]
        logits = torch.stack(masks).float() - 0.5
        coarse = logits.clone()
        coarse[..., : coarse.shape[-1] // 2] = -1
        # Scores are right, but negative ones lie exactly on the border.
        scores = torch.tensor([max(s.get("label", 0.0), 0.0) for s in samples])
        return PatchOutputs(coarse, scores, logits if self.refined else None)


def test_overlap_of_masks():
    targets = torch.zeros(4, 8, 8, dtype=torch.bool)
    targets[0, :4], targets[1, :4] = True, True
    logits = torch.full((4, 8, 8), -0.1)
    logits[0, :4], logits[1, 2:6], logits[2, 0] = 0.0, 1.0, 1.0
    np.testing.assert_allclose(mask_iou(logits, targets), [1, 1 / 3, 0, 1])


def test_summary_counts_every_object():
    """Section 5.5: bounds are inclusive, and an IoU of zero is part of the mean."""
    assert summary(np.array([0, 0.5, 0.7, 1])) == {
        "mean_iou": pytest.approx(55),
        "median_iou": pytest.approx(60),
        "at_least_50": 75,
        "at_least_70": 50,
    }


@pytest.mark.parametrize("refined", [False, True])
def test_figures_of_known_masks(cfg, dicts, refined):
    model = Oracle(refined).train()
    figures = evaluate_patches(cfg, model, dicts, "nuclei_val", batch=20)
    assert model.training
    sizes = [a["area"] >= 30 and min(a["bbox"][2:]) >= 5 for d in dicts for a in d["annotations"]]
    crowds = [a["iscrowd"] for d in dicts for a in d["annotations"]]
    objects = sum(large and not crowd for large, crowd in zip(sizes, crowds, strict=True))
    assert (figures["objects"], figures["left_out"]) == (objects, len(sizes) - objects)
    # Masks first, then as many scores.
    assert sum(model.calls) == 2 * objects
    assert figures["mask"]["mean_iou"] == pytest.approx(50, abs=4)
    assert figures["score"] == {"accuracy": 100, "positive": 100, "negative": 100}
    if not refined:
        assert "refined_mask" not in figures
        return
    assert figures["refined_mask"]["mean_iou"] == 100
    gain = figures["refined_minus_mask"]
    assert gain["mean_iou"] == pytest.approx(100 - figures["mask"]["mean_iou"])
    assert gain["better"] == 100


def test_sets_without_large_objects_are_refused(cfg, dicts):
    empty = [{**record, "annotations": []} for record in dicts]
    with pytest.raises(ValueError, match="Data set nothing: none of 0 objects is large enough"):
        evaluate_patches(cfg, Oracle(False), empty, "nothing")


@pytest.mark.parametrize("config", ["nuclei_deepmask_R_18", "nuclei_sharpmask_R_18"])
def test_the_command_prints_and_writes(config, tmp_path, capsys):
    file = tmp_path / "figures.json"
    words = ["evaluate-patches", "--config-file", f"DeepMask/{config}", "--output", str(file)]
    small = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.DEEPMASK.MIN_AREA", "600.0"]
    assert main([*words, *small]) == 0
    figures = json.loads(file.read_text())["datasets"]["nuclei_val"]
    assert ("refined_mask" in figures) == ("sharpmask" in config)
    assert 0 <= figures["mask"]["mean_iou"] <= 100
    assert main([*words, *small]) == 2
    assert "exists; choose another --output" in capsys.readouterr().err


def test_methods_that_see_whole_images_are_refused(capsys):
    assert main(["evaluate-patches", "--config-file", "SOLO/nuclei_solov2_R_18_FPN"]) == 2
    assert "SOLO is not trained on patches" in capsys.readouterr().err
