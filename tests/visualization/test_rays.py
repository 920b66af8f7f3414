"""Where points land on an enlarged part of a picture, and what is drawn there."""

import numpy as np
import pytest

from instseg_ext.visualization.plot import Curve, plot_curves
from instseg_ext.visualization.rays import close_up, legend, whole_picture

BLUE = (255, 0, 0)


@pytest.mark.parametrize("pixel", [(0, 0), (40, 17), (63, 47)])
def test_a_pixel_of_the_picture_lies_where_it_is_placed(pixel):
    picture = np.zeros((48, 64, 3), dtype=np.uint8)
    picture[pixel[1], pixel[0]] = 255
    view = close_up(picture, np.array([pixel, (30, 20)]), 800)
    assert view.canvas.shape == (640, 800, 3)
    # Its centre of mass; the paper beyond the border has no black, so only what is inside counts.
    x, y = np.rint(view.place(np.array(pixel))).astype(int)
    reach = int(view.factor_xy[0] / 2)
    inside = view.canvas[max(0, y - reach) : y + reach, max(0, x - reach) : x + reach, 0]
    assert inside.mean() > 128
    assert view.factor_xy[0] == view.factor_xy[1]


def test_everything_asked_for_is_seen_even_beyond_the_picture():
    picture = np.full((40, 40, 3), 90, dtype=np.uint8)
    points = np.array([[-3.0, 10.0], [200.0, 15.0], [50.0, 80.0]])
    view = close_up(picture, points, 250)
    places = view.place(points)
    assert places.min() > 0
    assert (places < [250, 200]).all()
    x, y = np.rint(view.place(np.array([20, 20]))).astype(int)
    assert (view.canvas[y, x] == 90).all()
    assert (view.canvas[-1, -1] > 240).all()


def test_rays_and_outline_are_drawn_in_their_colour():
    view = close_up(np.full((50, 50, 3), 255, np.uint8), np.array([[10, 10], [39, 33]]), 500)
    tips = np.array([[10, 10], [39, 10], [39, 33], [10, 33]])
    view.outline(tips, BLUE)
    view.rays(np.array([25, 20]), tips, BLUE)
    view.centre(np.array([25, 20]), BLUE)

    def colour(x, y):
        column, row = np.rint(view.place(np.array([x, y]))).astype(int)
        return view.canvas[row, column].tolist()

    assert colour(25, 10) == list(BLUE)  # border
    assert colour(25, 20) == list(BLUE)  # centre
    assert colour(17.5, 15) != [255, 255, 255]  # half of a ray
    assert colour(25, 15) == [255, 255, 255]


def test_points_of_another_size_of_the_picture():
    picture = np.zeros((60, 90, 3), dtype=np.uint8)
    view = whole_picture(picture, (30, 180), min_side=100)
    assert view.canvas.shape == (120, 180, 3)
    assert view.place(np.array([0, 0])).tolist() == [0, 1.5]
    assert view.place(np.array([179, 29])).tolist() == [179, 117.5]
    view.canvas[:] = 1
    assert not picture.any()


def test_a_legend_breaks_lines_and_shows_its_colours():
    entries = [(BLUE, "first"), ((0, 0, 255), "second with more words")]
    wide, narrow = legend(entries, 600), legend(entries, 120)
    assert wide.shape[1] == 600
    assert narrow.shape[0] == 2 * wide.shape[0]
    for strip in (wide, narrow):
        colours = {tuple(c) for c in strip.reshape(-1, 3).tolist()}
        assert {BLUE, (0, 0, 255)} <= colours


def test_a_plot_leaves_no_figure_behind(tmp_path):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    curves = [Curve("a", [1, 2, 4], [0.1, 0.2, 0.3], "tab:blue"), Curve("b", [1], [2], "r", True)]
    plot_curves(tmp_path / "p.png", curves, title="t", x_label="x", y_label="y")
    assert (tmp_path / "p.png").stat().st_size > 5000
    assert plt.get_fignums() == before
    with pytest.raises(ValueError, match="supported"):
        plot_curves(tmp_path / "p.xyz", curves, title="t", x_label="x", y_label="y")
