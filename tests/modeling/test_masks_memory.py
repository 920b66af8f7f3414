"""Peak memory of 100 masks on a 5000 x 4000 image, measured in a process of its own.

"one" and "two" are a dense model's masks after one and two resizes, "boxes" those of a two-stage
model, "polygons" those of PolarMask.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SCRIPT = """
import resource, sys, torch
from detectron2.structures import Boxes, Instances
from instseg_ext.modeling.masks import Crop, Resize, masks_to_instances, polygons_to_instances
from instseg_ext.modeling.rcnn import paste_instances

kind, way, num, scale, budget_mb = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
if way == "plain":
    torch.set_float32_matmul_precision("medium")
size = (4 * scale, 5 * scale)

def peak_kb():
    # pages of the libraries count as resident too, and come and go with the machine's file cache
    with open("/proc/self/status") as status:
        files = [int(line.split()[1]) for line in status if line.startswith("RssFile")]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - files[0]

def dense(num, size, low, steps):
    y, x = torch.arange(low[0])[:, None] - low[0] / 2, torch.arange(low[1])[None] - low[1] / 2
    # ellipses of growing size, the last ones filling the image
    radius = (torch.arange(num) * 100 / num + 4)[:, None, None]
    probs = torch.sigmoid(3 - 3 * (y**2 + x**2)[None] / radius**2)
    return lambda: masks_to_instances(
        probs, steps, torch.ones(num), torch.zeros(num), image_size=size, output="rle",
        budget_mb=budget_mb,
    )

def boxes(num, size):
    share = torch.arange(1, num + 1)[:, None] / num
    xyxy = torch.cat([0 * share, 0 * share, share * size[1], share * size[0]], dim=1)
    fields = {"pred_boxes": Boxes(xyxy), "pred_masks": torch.rand(num, 1, 28, 28) * 0.2 + 0.4}
    results = Instances(size, **fields)
    return lambda: paste_instances(results, size, output="rle", budget_mb=budget_mb)

def polygons(num, size):
    angle = torch.arange(36) * torch.pi / 18
    # spikes through the whole image, which meet the most lines
    length = 0.1 + torch.rand(num, 36, 1, generator=torch.Generator().manual_seed(0))
    side = torch.tensor([size[1], size[0]])
    tips = side / 2 * (1 + length * torch.stack([angle.sin(), angle.cos()], dim=1))
    xyxy = torch.cat([tips.amin(1), tips.amax(1)], dim=1)
    return lambda: polygons_to_instances(
        tips, xyxy, torch.ones(num), torch.zeros(num), image_size=size, output="rle"
    )

steps = [Resize(size)]
if kind == "two":
    steps = [Resize((800, 1008)), Crop((800, 1000)), *steps]
if kind == "boxes":
    boxes(4, (20, 20))()
    make = boxes(num, size)
elif kind == "polygons":
    polygons(4, (20, 20))()
    make = polygons(num, size)
else:
    dense(4, (8, 8), (4, 4), [Resize((8, 8))])()
    make = dense(num, size, (200, 252), steps)
before = peak_kb()
result = make()
after = peak_kb()
assert len(result.pred_masks_rle) == num
assert result.pred_boxes.tensor[:, 2:].gt(result.pred_boxes.tensor[:, :2]).all()
sys.stdout.write(f"rise_mb={(after - before) / 1024:.1f}")
"""


def rise_mb(*args):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split("rise_mb=")[1])


@pytest.mark.parametrize("kind", ["two", pytest.param("boxes", marks=pytest.mark.slow)])
def test_small_budget(kind):
    # one mask of 2400 x 3000 is 29 MB of floats and 7 MB of bool: all at once would take 430 MB
    assert rise_mb(kind, "windowed", 12, 600, 64) < 130


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "way"),
    [
        *[("one", "windowed"), ("two", "windowed"), ("one", "plain"), ("two", "plain")],
        *[("boxes", ""), ("polygons", "")],
    ],
)
def test_hundred_detections_at_5000x4000(kind, way):
    rise = rise_mb(kind, way, 100, 1000, 256)
    sys.stdout.write(f"{kind} {way}: {rise:.0f} MB\n")
    assert rise < 400
