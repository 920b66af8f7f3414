"""The order of a model's rays, told by its own boxes."""

from __future__ import annotations

import re

import cv2
import numpy as np
import pytest
import torch
from detectron2.utils import logger
from methods.foreign import tensors
from methods.polarmask import foreign_files as files

import instseg_ext
from instseg_ext import zoo
from instseg_ext.cli import main as cli
from instseg_ext.methods.polarmask.polygons import decode_polygons, ray_directions
from instseg_ext.methods.polarmask.ray_order import check_ray_order


def rectangles(count, *, rays=36, ratio=(0.2, 0.5), noise=0.02):
    """Rectangles seen from a place inside: sides, and rays in the order "down".

    A ray ends where it meets the nearest side; ``noise`` is that of both branches.
    """
    width = 20 + 200 * torch.rand(count)
    height = width * (ratio[0] + (ratio[1] - ratio[0]) * torch.rand(count))
    place = 0.4 + 0.2 * torch.rand(2, count)
    x, y = width * place[0], height * place[1]
    sides = torch.stack([x, y, width - x, height - y], dim=1)
    directions = ray_directions(rays)
    along_x = torch.where(directions[:, 0] < 0, sides[:, :1], sides[:, 2:3])
    along_y = torch.where(directions[:, 1] < 0, sides[:, 1:2], sides[:, 3:])
    lengths = torch.minimum(along_x / directions[:, 0].abs(), along_y / directions[:, 1].abs())

    def jitter(x):
        return x * (1 + noise * torch.randn_like(x))

    return jitter(sides), jitter(lengths)


@pytest.mark.parametrize("rays", [8, 24, 36, 72])
def test_decoding_in_one_order_is_decoding_turned_rays_in_the_other(rays):
    """Vertices are the same, but for where the polygon begins (check 14 of the method's sheet)."""
    distances = 1 + 99 * torch.rand(20, rays)
    points = 200 * torch.rand(20, 2)
    old = decode_polygons(points, distances, ray_directions(rays, "left"))
    turned = distances.roll(-(rays // 4), dims=1)
    new = decode_polygons(points, turned, ray_directions(rays, "down"))
    torch.testing.assert_close(new, old.roll(-(rays // 4), dims=1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rays", [24, 36, 72])
def test_either_order_is_found(rays):
    sides, down = rectangles(50, rays=rays)
    order = check_ray_order(sides, down)
    assert order.origin == "down"
    assert order.down < 0.05
    assert order.left > 0.4
    left = down.roll(rays // 4, dims=1)
    turned = check_ray_order(sides, left)
    assert turned.origin == "left"
    assert (turned.down, turned.left) == pytest.approx((order.left, order.down), abs=1e-5)
    assert turned.detections == order.detections == 50


def test_the_error_is_the_difference_of_all_sides_as_a_share_of_the_box():
    rays = torch.full((6, 4), 10.0)  # a square of 20 x 20 between the tips
    sides = torch.tensor([[20.0, 10.0, 20.0, 10.0]]).expand(6, 4)
    with pytest.raises(ValueError, match=r"down, .* by 33%, read as left by 33%"):
        check_ray_order(sides, rays)
    rays = torch.tensor([[10.0, 19.0, 10.0, 19.0]]).expand(6, 4)
    order = check_ray_order(sides, rays)
    assert order.down == pytest.approx(2 / 60)
    assert order.left == pytest.approx((10 + 9) * 2 / 60)


def test_outliers_do_not_matter():
    sides, rays = rectangles(41)
    rays[:20] = 1e6 * torch.rand(20, 36)
    assert check_ray_order(sides, rays).origin == "down"


def test_square_objects_do_not_take_part():
    sides, rays = rectangles(10)
    squares, square_rays = rectangles(200, ratio=(0.95, 1.05))
    order = check_ray_order(torch.cat([squares, sides]), torch.cat([square_rays, rays]))
    assert order.detections == 10
    assert order.origin == "down"


@pytest.mark.parametrize("count", [0, 4])
def test_too_few_detections_decide_nothing_and_it_says_what_to_do(count):
    squares, square_rays = rectangles(20, ratio=(0.95, 1.05))
    sides, rays = rectangles(count)
    message = f"{count} of {20 + count} detections with a score .* give more pictures"
    with pytest.raises(ValueError, match=message):
        check_ray_order(torch.cat([squares, sides]), torch.cat([square_rays, rays]))


def test_no_detections_at_all():
    with pytest.raises(ValueError, match=r"0 of 0 detections with a score of 0\.3"):
        check_ray_order(torch.zeros(0, 4), torch.zeros(0, 36))


def test_rays_that_belong_to_other_boxes_are_refused_with_both_figures():
    sides, rays = rectangles(50)
    with pytest.raises(ValueError, match="hardly trained") as error:
        check_ray_order(sides, 3 * rays)
    down, left = map(float, re.findall(r"by (\d+)%", str(error.value)))
    assert down == pytest.approx(200, abs=10)
    assert left > 100


def test_rays_that_were_turned_for_nothing_are_recognised():
    """A file with old names whose rays have the new order, after conversion."""
    sides, rays = rectangles(50)
    with pytest.raises(ValueError, match=r"back by a quarter: .* Rename fcos_ to polar_"):
        check_ray_order(sides, rays.roll(-9, dims=1))


def test_the_limit_is_15_percent():
    sides, rays = rectangles(50, noise=0)
    reached = check_ray_order(sides, rays).down
    grown = 1.14 / (1 - reached)
    assert check_ray_order(sides, rays * grown).down == pytest.approx(0.14, abs=0.01)
    with pytest.raises(ValueError, match="Neither is below 15%"):
        check_ray_order(sides, rays * grown * 1.16 / 1.14)


# --- models --------------------------------------------------------------------------------------

CONFIG = "PolarMask/polarmask_R_50_768_1x"


@pytest.fixture(autouse=True)
def no_logger(monkeypatch):
    """detectron2's set-up ties the logger to the output of one test, for good."""
    monkeypatch.setattr(logger, "setup_logger", lambda **kwargs: None)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    cv2.imwrite(str(path), np.full((40, 90, 3), 128, dtype=np.uint8))
    return str(path)


def file_that_finds_rectangles(path, names, *, turned=0, confidence=2.0):
    """A file of the authors whose model predicts one wide rectangle at every location.

    Args:
        names: of the predictors.
        turned: quarters by which the rays are turned from the order "down"; that of "left" is 1.
        confidence: logit of a class at every location.
    """
    state = tensors(files.small(names), device="cpu")
    sides, rays = rectangles(1)
    biases = {
        "cls": torch.tensor([confidence, -9.0, -9.0]),
        "centerness": torch.tensor([2.0]),
        "reg": (sides[0] / 10).log(),
        "mask": (rays[0] / 10).log().roll(9 * turned),
    }
    for kind, bias in biases.items():
        state[f"bbox_head.{names}_{kind}.weight"].zero_()
        state[f"bbox_head.{names}_{kind}.bias"] = bias
    for name, tensor in state.items():
        if name.endswith((".scale", ".running_var")):
            state[name] = torch.ones_like(tensor, dtype=torch.float32)
    torch.save({"state_dict": state}, path)


@pytest.fixture
def check(tmp_path, picture):
    """Convert a file and return what checks it, with typed keys, and returns the status."""

    def convert(names, **options):
        source, out = str(tmp_path / "in.pth"), str(tmp_path / "out.pth")
        file_that_finds_rectangles(source, names, **options)
        small = [str(word) for word in (*files.SMALL_OPTS, "INSTSEG.STRETCH", [128, 256])]
        words = ["--from", "polarmask", source, out, "--config", CONFIG, *small]
        assert cli.main(["convert", *words]) == 0
        command = ["check-model", "--weights", out, "--input", picture]
        return lambda *opts: cli.main([*command, *opts])

    return convert


@pytest.mark.parametrize(("names", "right"), [(files.OLD, "down"), (files.NEW, "left")])
def test_the_command_knows_whether_the_order_is_right(check, capsys, names, right):
    """Rays that begin at the left are turned by the converter if the names are old."""
    run = check(names, turned=1)
    wrong = {"down": "left", "left": "down"}[right]
    assert run("MODEL.POLARMASK.RAY_ORIGIN", right) == 0
    assert run("MODEL.POLARMASK.RAY_ORIGIN", wrong) == 1
    ok, not_ok = capsys.readouterr().out.splitlines()[-2:]
    assert ok.startswith("ray order: ok. Read as RAY_ORIGIN down, polygons differ")
    advice = f"MODEL.POLARMASK.RAY_ORIGIN must be {right}, not {wrong}."
    assert not_ok.startswith(f"ray order: WRONG. {advice} Read as")


def test_old_names_with_new_rays_are_found_out(check, capsys):
    assert check(files.OLD, turned=0)() == 2
    assert "Rename fcos_ to polar_" in capsys.readouterr().err


def test_detections_of_low_score_are_not_asked(check, capsys):
    assert check(files.NEW, confidence=-1.5)() == 2
    assert "0 of 0 detections with a score of 0.3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "opts", "names"),
    [
        (CONFIG, [], ["ray order"]),
        (CONFIG, ["MODEL.POLARMASK.WITH_BOX", False, "MODEL.POLARMASK.NMS_ON", "mask"], []),
        ("PolarMask/fcos_R_50_FPN_1x", [], []),
    ],
)
def test_models_with_boxes_and_rays_have_the_check(config, opts, names):
    cfg = instseg_ext.get_config(config, opts)
    assert list(zoo.method_of(cfg).checks(cfg)) == names
