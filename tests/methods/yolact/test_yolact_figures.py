"""``instseg visualize prototypes``: the files, and that the sheet shows the mask as it is made."""

import cv2
import numpy as np
import pytest
import torch

import instseg_ext
from instseg_ext.engine.predictor import Predictor
from instseg_ext.method import FigurePicture
from instseg_ext.visualization.maps import draw_map, draw_signed_map
from instseg_ext.zoo import method_of

TINY = [
    "MODEL.DEVICE", "cpu",
    "MODEL.WEIGHTS", "",
    "MODEL.FPN.OUT_CHANNELS", 16,
    "MODEL.YOLACT.WIDTH", 16,
    "MODEL.YOLACT.NUM_PROTOS", 5,
    "INSTSEG.STRETCH", [64, 64],
]  # fmt: skip


@pytest.mark.parametrize(("threshold", "kinds"), [(0.0, 2), (0.999, 1)])
def test_files(tmp_path, threshold, kinds):
    cfg = instseg_ext.get_config("YOLACT/nuclei_yolact_R_18", TINY)
    method = method_of(cfg)
    predictor = Predictor(cfg, method, threshold=threshold if threshold == 0 else None)
    if threshold:
        with torch.no_grad():
            predictor.model.head.class_pred.bias.view(-1, 2)[:, 1] = 30  # all is background
    picture = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    pictures = [FigurePicture(name, picture, None) for name in "ab"]
    files = method.figures["prototypes"](cfg, lambda: predictor, pictures, tmp_path)
    expected = ["prototypes", "assembly"][:kinds]
    assert [f.name for f in files] == [f"{n}_{k}.png" for n in "ab" for k in expected]
    for file in files:
        sheet = cv2.imread(str(file))
        assert len(np.unique(sheet @ np.array([1, 256, 65536]))) > 20


def test_signed_map_is_blue_below_white_at_and_red_above_zero():
    values = np.array([[-2.0, 0.0, 2.0]])
    blue, white, red = draw_signed_map(values, (1, 3))[0].astype(int)
    assert blue[0] > blue[2] + 100
    assert red[2] > red[0] + 100
    assert white.min() > 240
    half = draw_signed_map(values, (1, 3), limit=4.0)[0, 2].astype(int)
    assert half.tolist() == pytest.approx(((white + red) / 2).tolist(), abs=1)


def test_map_is_dark_at_zero_and_lightest_at_its_limit():
    values = np.array([[0.0, 1.0, 3.0]])
    dark, middle, light = draw_map(values, (1, 3)).astype(int).sum(axis=2)[0]
    assert dark < middle < light
    clipped = draw_map(values, (1, 3), limit=1.0)
    assert np.array_equal(clipped[0, 1], clipped[0, 2])
    assert np.array_equal(draw_map(np.zeros((1, 3)), (1, 3))[0, 0], draw_map(values, (1, 3))[0, 0])
