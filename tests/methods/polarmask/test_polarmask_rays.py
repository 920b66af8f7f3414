"""Target lengths of rays: worked cases, and the rule point by point as oracle."""

import math

import cv2
import numpy as np
import pytest
import torch
from structures.random_masks import HEIGHT, WIDTH, random_masks

from instseg_ext.methods.polarmask import rays as rays_module
from instseg_ext.methods.polarmask.centerness import polar_centerness
from instseg_ext.methods.polarmask.polygons import decode_polygons, ray_directions
from instseg_ext.methods.polarmask.rays import ray_targets
from instseg_ext.structures.contours import Contours, trace_contours

WINDOW = (0, 1, -1, 2, -2, 3, -3)
MISSING = torch.tensor(1e-6)


def contour_of(*offsets):
    """One contour whose points lie so around (200, 200)."""
    points = torch.tensor(offsets, dtype=torch.int16).reshape(-1, 2) + 200
    return Contours(points, torch.tensor([len(points)]))


def rays_of(contour, point=(200, 200), **options):
    """The rays of one location."""
    options = {"num_rays": 36, **options}
    points = torch.tensor([point], dtype=torch.float32)
    return ray_targets(points, contour, torch.zeros(1, dtype=torch.int64), **options)[0]


def disk(radius, center=50, size=101):
    y, x = np.mgrid[:size, :size]
    return (x - center) ** 2 + (y - center) ** 2 <= radius**2


def rectangle(size, x0, y0, x1, y1):
    mask = np.zeros(size, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def contour_of_mask(mask):
    return trace_contours(mask[None])[0]


def filled(polygons, size):
    """Fill one (R, 2) polygon."""
    canvas = np.zeros(size, dtype=np.uint8)
    cv2.fillPoly(canvas, [polygons.numpy().astype(np.int32)], 1)
    return canvas.astype(bool)


def iou(one, other):
    return (one & other).sum() / (one | other).sum()


@pytest.fixture(scope="module")
def many():
    """1000 masks with locations inside, outside and on the contour of each."""
    contours, centers, found = trace_contours(random_masks(1000, seed=1))
    generator = torch.Generator().manual_seed(0)
    on_contour = contours.points[(contours.starts + contours.lengths // 3)[found]].float()
    anywhere = torch.rand(len(on_contour), 2, generator=generator)
    anywhere = (anywhere * torch.tensor([WIDTH, HEIGHT])).floor()
    instance = found.nonzero().squeeze(1)
    points = torch.cat([centers[found].float(), on_contour, anywhere])
    return points, contours, instance.repeat(3)


def some(many, step):
    points, contours, instance = many
    return points[::step], contours, instance[::step]


def offsets_of(points, contours, instance):
    """For each location the float32 offsets to its contour's points, one tensor per axis."""
    for point, part in zip(
        points, contours[instance].points.split(contours.lengths[instance].tolist()), strict=True
    ):
        x, y = (part - point).T.float().contiguous()
        yield x, y


def plain_bins(points, contours, instance, num_rays):
    """Rule of bins for one location after the other, with 36 rays in the authors' float32."""
    rays = torch.full((len(points), num_rays), 1e-6)
    for row, (x, y) in zip(rays, offsets_of(points, contours, instance), strict=True):
        if num_rays != 36:
            x, y = x.double(), y.double()
        angle = torch.atan2(x, y) * 180 / math.pi
        angle[angle < 0] += 360
        angle += 0 if num_rays == 36 else 1e-9
        longest = {}
        lengths = torch.sqrt((x**2 + y**2).float()).tolist()
        for degree, length in zip(angle.int().tolist(), lengths, strict=True):
            longest[degree] = max(longest.get(degree, 0.0), length)
        for ray in range(num_rays):
            for offset in WINDOW:
                degree = ray * 360 // num_rays + offset
                if degree in longest:
                    row[ray] = longest[degree]
                    break
    return rays


def ranked_bins(points, contours, instance):
    """The rule for 36 rays, whose windows do not overlap: each pair serves one ray at most."""
    ray_of, rank_of = torch.full((361,), -1), torch.zeros(361, dtype=torch.int64)
    for ray in range(36):
        for rank, offset in zip(range(7, 0, -1), WINDOW, strict=True):
            if 10 * ray + offset >= 0:
                ray_of[10 * ray + offset], rank_of[10 * ray + offset] = ray, rank
    lengths = contours.lengths[instance]
    owner = torch.arange(len(points)).repeat_interleave(lengths)
    x, y = (contours[instance].points - points[owner]).T.float().contiguous()
    angle = torch.atan2(x, y) * 180 / math.pi
    degree = torch.where(angle < 0, angle + 360, angle).long()
    value = (rank_of[degree] << 32) + (x * x + y * y).long() + 1
    used = ray_of[degree] >= 0
    best = torch.zeros(len(points) * 36, dtype=torch.int64)
    best.scatter_reduce_(0, (owner * 36 + ray_of[degree])[used], value[used], "amax")
    best = best.reshape(-1, 36)
    squared = ((best & 0xFFFFFFFF) - 1).clamp(min=0)
    return torch.where(best > 0, squared.float().sqrt(), MISSING)


def plain_exact(points, contours, instance, num_rays):
    """Farthest crossing, every ray with every edge."""
    angles = torch.arange(num_rays, dtype=torch.float64) * (2 * math.pi / num_rays)
    ray = torch.stack([angles.sin(), angles.cos()], dim=1)[:, None]
    rays = torch.full((len(points), num_rays), 1e-6)
    for row, (x, y) in zip(rays, offsets_of(points, contours, instance), strict=True):
        start = torch.stack([x, y], dim=1).double()
        end = start.roll(-1, dims=0)

        def cross(one, other):
            return one[..., 0] * other[..., 1] - one[..., 1] * other[..., 0]

        edge = end - start
        turn = cross(ray, edge)
        length = cross(start, edge) / turn
        share = cross(start, ray) / turn
        hit = (turn.abs() > 1e-9) & (share > -1e-7) & (share < 1 + 1e-7)
        along = (turn.abs() <= 1e-9) & (cross(ray, start).abs() < 1e-7)
        farther = torch.maximum((start * ray).sum(2), (end * ray).sum(2))
        length = torch.where(hit, length, torch.where(along, farther, 0.0)).amax(dim=1)
        row[:] = length.clamp(min=1e-6)
    return rays


# --- worked cases -------------------------------------------------------------------------------


def test_worked_case():
    contour = contour_of_mask(rectangle((768, 1280), 200, 100, 500, 300))
    rays = rays_of(contour, (348, 196))
    squared = [103**2 + 1, 151**2 + 2**2, 96**2 + 1, 148**2 + 2**2]
    assert torch.equal(rays[::9], torch.tensor(squared).float().sqrt())
    assert polar_centerness(rays[None]).item() == pytest.approx(0.73902, abs=1e-5)
    exact = rays_of(contour, (348, 196), mode="exact")
    assert exact[::9].tolist() == pytest.approx([103, 151, 96, 148])


def test_ray_9_points_to_the_right():
    mask = rectangle((60, 300), 40, 20, 290, 41)
    for mode in ("bins", "exact"):
        rays = rays_of(contour_of_mask(mask), (50, 30), mode=mode)
        assert rays.argmax() == 9
        polygon = decode_polygons(torch.tensor([[50.0, 30.0]]), rays[None], ray_directions(36))
        assert polygon[0, :, 0].mean() > 60
        assert polygon[0, 9].tolist() == pytest.approx([289, 30], abs=0.1)


def test_origin_left_is_a_turn_by_a_quarter():
    contour = contour_of_mask(rectangle((60, 300), 40, 20, 290, 35))
    down = rays_of(contour, (50, 30), mode="exact")
    left = rays_of(contour, (50, 30), mode="exact", origin="left")
    assert left[::9].tolist() == pytest.approx([10, 4, 239, 10])  # left, down, right, up
    assert torch.equal(torch.roll(left, -9), down)
    point = torch.tensor([[50.0, 30.0]])
    tips = decode_polygons(point, left[None], ray_directions(36, "left"))[0]
    expected = decode_polygons(point, down[None], ray_directions(36, "down"))[0]
    torch.testing.assert_close(torch.roll(tips, -9, dims=0), expected, atol=1e-3, rtol=0)


def test_disk_survives_encoding():
    mask = disk(30)
    rays = rays_of(contour_of_mask(mask), (50, 50))
    polygon = decode_polygons(torch.tensor([[50.0, 50.0]]), rays[None], ray_directions(36))[0]
    assert iou(filled(polygon, mask.shape), mask) == pytest.approx(0.968, abs=5e-4)


def test_ray_0_does_not_look_to_its_left():
    assert rays_of(contour_of((-2, 150)))[0] == MISSING
    assert rays_of(contour_of((2, 150)))[0].item() == pytest.approx(150.0133, abs=1e-4)


def test_no_length_is_not_a_missing_ray():
    rays = rays_of(contour_of((0, 0), (-40, 40)))
    assert rays[0] == 0
    assert (rays[1:27] == MISSING).all()


@pytest.mark.parametrize(("radius", "missing"), [(3, 28), (5, 24), (8, 8), (10, 4), (20, 0)])
def test_small_disks_lack_rays(radius, missing):
    contour = contour_of_mask(disk(radius))
    assert (rays_of(contour, (50, 50)) == MISSING).sum() == missing
    assert (rays_of(contour, (50, 50), mode="exact") > radius - 1).all()


def test_nearest_bin_first():
    rays = rays_of(contour_of((20, 98), (33, 197)))
    assert rays[1].item() == pytest.approx(math.hypot(20, 98))
    rays = rays_of(contour_of((18, 98), (36, 196)))
    assert rays[1].item() == pytest.approx(math.hypot(36, 196))


# --- oracles ------------------------------------------------------------------------------------


def test_36_rays_equal_the_plain_loop(many):
    rays = ray_targets(*many, num_rays=36)
    assert torch.equal(rays, plain_bins(*many, 36))
    assert torch.equal(rays, ranked_bins(*many))
    assert 0.1 < (rays == MISSING).float().mean() < 0.9
    assert (rays == 0).any()


@pytest.mark.parametrize("num_rays", [1, 18, 24, 72, 90, 120, 360])
def test_any_number_of_rays_equals_the_plain_loop(many, num_rays):
    part = some(many, 15)
    assert torch.equal(ray_targets(*part, num_rays=num_rays), plain_bins(*part, num_rays))


@pytest.mark.parametrize("num_rays", [4, 18, 36, 72])
def test_exact_rays_equal_the_plain_loop(many, num_rays):
    part = some(many, 10)
    rays = ray_targets(*part, num_rays=num_rays, mode="exact")
    torch.testing.assert_close(rays, plain_exact(*part, num_rays), atol=1e-5, rtol=1e-5)
    assert 0.1 < (rays == MISSING).float().mean() < 0.9


def test_exact_rays_of_a_polygon_with_long_edges():
    """A triangle, seen from inside, from the middle of a side, and from outside."""
    points = [[100, 100], [140, 180], [100, 160]]
    contour = Contours(torch.tensor(points, dtype=torch.int16), torch.tensor([3]))
    many = (
        torch.tensor([[110.0, 150.0], [100.0, 130.0], [50.0, 150.0], [120.0, 140.0]]),
        contour,
        torch.zeros(4, dtype=torch.int64),
    )
    rays = ray_targets(*many, num_rays=72, mode="exact")
    torch.testing.assert_close(rays, plain_exact(*many, 72), atol=1e-4, rtol=1e-5)
    assert rays[1, [0, 36]].tolist() == [30, 30]


def test_exact_rays_fill_what_bins_miss(many):
    points, contours, instance = many
    bins = ray_targets(points, contours, instance, num_rays=36)
    exact = ray_targets(points, contours, instance, num_rays=36, mode="exact")
    assert (exact == MISSING).sum() < 0.8 * (bins == MISSING).sum()
    assert (exact >= MISSING).all()


def test_double_precision_gives_the_same_rays(many):
    """What other devices compute."""
    (pairs,) = rays_module._parts(*some(many, 2), 2**40)
    single = rays_module._window_lengths(pairs, 36, like_authors=True)
    double = rays_module._window_lengths(pairs, 36, like_authors=False)
    assert torch.equal(single, double)


def test_double_precision_knows_whole_degrees():
    far = torch.arange(1, 1450, dtype=torch.float32)
    zero = torch.zeros_like(far)
    for dx, dy, degree in (
        (zero, far, 0),
        (far, far, 45),
        (far, zero, 90),
        (far, -far, 135),
        (zero, -far, 180),
        (-far, -far, 225),
        (-far, zero, 270),
        (-far, far, 315),
    ):
        assert (rays_module._degree_bins(dx, dy, like_authors=False) == degree).all()
    # The authors' arithmetic puts some of these one bin lower.
    assert set(rays_module._degree_bins(far, far, like_authors=True).tolist()) <= {44, 45}


@pytest.mark.parametrize("mode", ["bins", "exact"])
def test_parts_of_any_size_give_the_same(many, mode, monkeypatch):
    part = some(many, 10)
    expected = ray_targets(*part, num_rays=36, mode=mode)
    for budget in (1, 1000, 10000):
        monkeypatch.setattr(rays_module, "_BUDGET_CPU", budget)
        assert torch.equal(ray_targets(*part, num_rays=36, mode=mode), expected)


@pytest.mark.parametrize("mode", ["bins", "exact"])
def test_same_on_every_device(many, mode, device):
    points, contours, instance = some(many, 3)
    expected = ray_targets(points, contours, instance, num_rays=36, mode=mode)
    moved = points.to(device), contours.to(device), instance.to(device)
    found = ray_targets(*moved, num_rays=36, mode=mode)
    assert found.device.type == device.type
    torch.testing.assert_close(found.cpu(), expected, atol=0, rtol=2e-7)


# --- edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bins", "exact"])
def test_without_locations_or_points(mode):
    nothing = torch.zeros(0, 2), Contours.empty(), torch.zeros(0, dtype=torch.int64)
    rays = ray_targets(*nothing, num_rays=24, mode=mode)
    assert rays.shape == (0, 24)
    assert rays.dtype == torch.float32

    contours = Contours.cat([contour_of(), contour_of_mask(disk(20)), contour_of()])
    points = torch.full((5, 2), 50.0)
    instance = torch.tensor([0, 1, 2, 1, 0])
    rays = ray_targets(points, contours, instance, num_rays=36, mode=mode)
    assert (rays[[0, 2, 4]] == MISSING).all()
    assert (rays[[1, 3]] > 18).all()


@pytest.mark.parametrize("mode", ["bins", "exact"])
def test_contours_of_one_and_two_points(mode):
    for offsets in ([(0, 7)], [(0, 7), (0, 8)]):
        rays = rays_of(contour_of(*offsets), mode=mode)
        assert rays[0] == offsets[-1][1]
        assert (rays[1:] == MISSING).all()
    assert rays_of(contour_of((0, 0)), mode="exact").eq(MISSING).all()


def test_largest_distances_fit():
    corner = torch.tensor([[32767, 32767]], dtype=torch.int16)
    rays = rays_of(Contours(corner, torch.tensor([1])), (0, 0), num_rays=8)
    assert rays.max().item() == pytest.approx(32767 * math.sqrt(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rays": 7}, r"MODEL\.POLARMASK\.NUM_RAYS must divide 360, not 7"),
        ({"num_rays": 0}, r"MODEL\.POLARMASK\.NUM_RAYS must divide 360, not 0"),
        ({"num_rays": 18, "origin": "left"}, "must divide 360 and be divisible by 4, not 18"),
        ({"mode": "nearest"}, r"MODEL\.POLARMASK\.RAY_TARGET must be one of"),
        ({"origin": "up"}, r"MODEL\.POLARMASK\.RAY_ORIGIN must be one of"),
    ],
)
def test_refuses_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        rays_of(contour_of((0, 7)), **options)


# --- what rays can represent --------------------------------------------------------------------


def shapes():
    """Bent, pointed and lopsided shapes, some of them small."""
    bean = disk(30) & ~disk(18, 30)
    wedge = np.tri(101, dtype=bool) & rectangle((101, 101), 10, 10, 90, 90)
    club = disk(12, 30) | rectangle((101, 101), 28, 27, 95, 34)
    return [bean, wedge, club, disk(5), disk(9), rectangle((101, 101), 40, 45, 58, 56)]


def mean_iou(center, **options):
    """Mean IoU of the shapes with their own rays' polygons."""
    values = []
    for mask in shapes():
        contours, mass, _ = trace_contours(mask[None])
        if center == "box":
            y, x = mask.nonzero()
            mass = torch.tensor([[(x.min() + x.max()) // 2, (y.min() + y.max()) // 2]])
        rays = rays_of(contours, mass[0].tolist(), **options)[None]
        directions = ray_directions(rays.shape[1])
        polygon = decode_polygons(mass.float(), rays, directions, mask.shape)[0]
        values.append(iou(filled(polygon.round(), mask.shape), mask))
    return np.mean(values)


def test_exact_rays_and_mass_centres_represent_more():
    exact = mean_iou("mass", num_rays=36, mode="exact")
    assert exact > mean_iou("mass", num_rays=36, mode="bins")
    assert exact > mean_iou("box", num_rays=36, mode="exact")
    assert exact > mean_iou("mass", num_rays=18, mode="exact")
    assert exact > 0.85
