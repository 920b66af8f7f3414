"""Mask voting as a plain loop over classes and boxes, every mask drawn at the image's size."""

import cv2
import numpy as np


def drawn(mask, box, size, corner_aligned):
    """Draw one mask; MNC's rule takes the nearest value wherever one index is that of the last."""
    value, m = np.zeros(size, np.float32), len(mask)
    if not corner_aligned:
        x1, y1 = np.round(box[:2]).astype(int)
        x2, y2 = np.round(box[2:] - 1).astype(int)
        if x2 < x1 or y2 < y1:
            return value
        resized = cv2.resize(mask, (int(x2 - x1 + 1), int(y2 - y1 + 1)))
        ys, xs = slice(max(y1, 0), min(y2 + 1, size[0])), slice(max(x1, 0), min(x2 + 1, size[1]))
        value[ys, xs] = resized[ys.start - y1 : ys.stop - y1, xs.start - x1 : xs.stop - x1]
        return value
    padded = np.pad(mask, ((0, 1), (0, 1)))
    y, x = (np.arange(length, dtype=np.float64) for length in size)
    y, x = y[(y >= box[1]) & (y <= box[3] - 1)], x[(x >= box[0]) & (x <= box[2] - 1)]
    if not len(y) or not len(x):
        return value
    v, u = (y - box[1]) * m / (box[3] - box[1]), (x - box[0]) * m / (box[2] - box[0])
    i, j = v.astype(int), u.astype(int)
    f, g = (v - i)[:, None], (u - j)[None]
    upper = padded[i][:, j] * (1 - g) + padded[i][:, j + 1] * g
    lower = padded[i + 1][:, j] * (1 - g) + padded[i + 1][:, j + 1] * g
    last = (i == m - 1)[:, None] | (j == m - 1)[None]
    picture = np.where(last, mask[i][:, j], upper * (1 - f) + lower * f)
    value[np.ix_(y.astype(int), x.astype(int))] = picture
    return value


def overlaps(boxes, box):
    """IoU of (n, 4) boxes with one, float64."""
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    common = np.prod(np.clip(high - low, 0, None), axis=1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return common / (areas + np.prod(box[2:] - box[:2]) - common)


def suppressed(boxes, scores, threshold):
    """Rows that survive, by falling score."""
    kept, order = [], np.argsort(-scores, kind="stable")
    while len(order):
        kept.append(order[0])
        order = order[1:][overlaps(boxes[order[1:]], boxes[order[0]]) <= threshold]
    return np.array(kept, dtype=int)


def resampled(picture, box, m, corner_aligned):
    """Read m x m cells of a box of whole pixels from a picture, where the rule draws them."""
    (height, width), (x1, y1, x2, y2) = picture.shape, box
    shift = 0.0 if corner_aligned else 0.5
    cells = np.zeros((m, m), np.float32)
    for row in range(m):
        for col in range(m):
            y = np.clip(y1 + (row + shift) * (y2 - y1) / m - shift, 0, height - 1)
            x = np.clip(x1 + (col + shift) * (x2 - x1) / m - shift, 0, width - 1)
            i, j = int(y), int(x)
            below, right = min(i + 1, height - 1), min(j + 1, width - 1)
            upper = picture[i, j] * (1 - (x - j)) + picture[i, right] * (x - j)
            lower = picture[below, j] * (1 - (x - j)) + picture[below, right] * (x - j)
            cells[row, col] = upper * (1 - (y - i)) + lower * (y - i)
    return cells


def vote_by_loop(boxes, masks, scores, size, rule):
    """Return a list of (score, class, box, average), by falling score, and drop nothing.

    Args:
        boxes: (C, 4), masks (C, m, m) and scores (C, K), as for ``vote_masks``.
        masks: see ``boxes``.
        scores: see ``boxes``.
        size: (H, W).
        rule: a ``VotingRule`` without re-encoding.
    """
    boxes, masks, scores = boxes.double().numpy(), masks.numpy(), scores.numpy()
    kept = []
    for c in range(scores.shape[1]):
        rows = suppressed(boxes, scores[:, c], rule.nms_threshold)
        kept += [(scores[i, c], c, i) for i in rows[: rule.max_detections]]
    kept.sort(key=lambda entry: -entry[0])
    lowest = max(kept[: rule.max_detections][-1][0], rule.min_score)
    pictures = [
        drawn(mask, box, size, rule.corner_aligned) for mask, box in zip(masks, boxes, strict=True)
    ]
    if rule.binarize:
        pictures = [(picture >= rule.mask_threshold).astype(np.float32) for picture in pictures]
    found = []
    for score, c, row in (entry for entry in kept if entry[0] >= lowest):
        voters = np.flatnonzero(overlaps(boxes, boxes[row]) >= rule.voter_iou)
        weights = scores[voters, c] / scores[voters, c].sum(dtype=np.float64)
        average = np.zeros(size)
        for voter, weight in zip(voters, weights, strict=True):
            average += weight * pictures[voter]
        found.append((score, c, boxes[row], average))
    return found
