"""Print how much faster DeepMask slides over an image than it looks at single windows.

The released model with random weights on 480 x 640 pixels, one scale: 1271 windows. The cost of a
window does not depend on its place: 16 are timed, in one batch, which is faster than one by one.

    python tools/deepmask_speed.py [--repeats 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from detectron2.modeling import build_model

import instseg_ext

_HEIGHT, _WIDTH, _WINDOWS = 480, 640, 16


def main() -> None:
    """Time both in turn and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    options = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.DEEPMASK.TEST_SCALES", [1.0]]
    model = build_model(instseg_ext.get_config("DeepMask/deepmask_R_50", options)).eval()
    image = torch.randint(0, 256, (3, _HEIGHT, _WIDTH), dtype=torch.uint8)
    side = model.window_size + 2 * model.context
    patches = [{"image": torch.rand(3, side, side) * 255} for _ in range(_WINDOWS)]
    with torch.no_grad():
        (maps,) = model.pyramid_maps(image)
        of_image, of_window = [], []
        for _ in range(args.repeats):
            of_image.append(_seconds(lambda: model.pyramid_maps(image)))
            of_window.append(_seconds(lambda: model.patch_outputs(patches)) / _WINDOWS)
    windows = maps.scores.numel()
    for name, pick in (("median", statistics.median), ("best", min)):
        whole, single = pick(of_image), pick(of_window)
        print(
            f"{name}: {windows} windows at once {whole:.3f} s, one {single:.4f} s, "
            f"{windows * single / whole:.1f}x"
        )


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
