"""RoI max pooling of Torch's inn, one output at a time, as its CUDA kernel goes."""

import math

import torch


def c_round(value):
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def pooled_by_loop(maps, rois, size, scale):
    """The kernel, one output at a time; ``rois`` begin at 0 here and at 1 there."""
    height, width = maps.shape[2:]
    out = torch.zeros(len(rois), maps.shape[1], size, size)
    for r, (index, *box) in enumerate(rois.tolist()):
        start_w, start_h, end_w, end_h = (c_round(v * scale) for v in box)
        end_w, end_h = end_w - 1, end_h - 1
        bin_w = torch.tensor(max(end_w - start_w + 1, 1) / size)
        bin_h = torch.tensor(max(end_h - start_h + 1, 1) / size)
        for p in range(size):
            for q in range(size):
                y = [c_round(float((p + k) * bin_h)) + start_h for k in (0, 1)]
                x = [c_round(float((q + k) * bin_w)) + start_w for k in (0, 1)]
                y = [min(max(v, 0), height) for v in y]
                x = [min(max(v, 0), width) for v in x]
                cells = maps[int(index), :, y[0] : y[1], x[0] : x[1]]
                if cells.numel():
                    out[r, :, p, q] = cells.amax(dim=(1, 2))
    return out
