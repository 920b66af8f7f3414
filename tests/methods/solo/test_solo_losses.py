"""Normalisers of the two losses, locally and over processes."""

import pytest
import torch

from instseg_ext.layers.losses import dice_loss, sigmoid_focal_loss_sum
from instseg_ext.methods.solo import losses
from instseg_ext.methods.solo.losses import category_loss, mask_loss


def masks(count):
    return torch.rand(count, 6, 5), (torch.rand(count, 6, 5) > 0.5).to(torch.uint8)


def test_category_loss_divides_by_positives_plus_one():
    logits, labels = torch.randn(20, 3), torch.tensor([0, 2, 1] + [3] * 17)
    expected = sigmoid_focal_loss_sum(logits, labels) / 4
    torch.testing.assert_close(category_loss(logits, labels), expected)


def test_mask_loss_is_the_mean_over_all_masks_of_the_batch():
    first, second = masks(3), masks(1)
    expected = torch.cat([dice_loss(*first), dice_loss(*second)]).mean()
    found = mask_loss([first[0], second[0]], [first[1], second[1]], branch=[torch.zeros(1)])
    torch.testing.assert_close(found, expected)


def test_mask_loss_without_positives_is_zero_and_connected():
    branch = [torch.randn(2, 3, requires_grad=True), torch.randn(4, requires_grad=True)]
    found = mask_loss([torch.zeros(0, 6, 5)], [torch.zeros(0, 6, 5)], branch=branch)
    assert found.item() == 0
    found.backward()
    assert all(torch.equal(b.grad, torch.zeros_like(b)) for b in branch)


def test_half_precision_inputs_are_summed_in_float():
    logits, labels = torch.randn(50, 3), torch.randint(0, 4, (50,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = category_loss(logits.bfloat16(), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, category_loss(logits.bfloat16().float(), labels))


@pytest.mark.parametrize("counts", [(3, 1), (2, 0)])
def test_global_losses_average_to_those_of_one_process(monkeypatch, counts):
    """Two processes, one image each, against one process that holds both."""
    logits = [torch.randn(20, 3) for _ in counts]
    labels = [torch.tensor([0] * n + [3] * (20 - n)) for n in counts]
    pairs = [masks(n) for n in counts]
    branch = [torch.zeros(1)]
    category, mask = [], []
    for rank in (0, 1):
        monkeypatch.setattr(losses, "_rank", lambda rank=rank: rank)
        monkeypatch.setattr(
            losses, "mean_over_processes", lambda _: torch.tensor((sum(counts) + 1) / 2)
        )
        category.append(category_loss(logits[rank], labels[rank], across_processes=True))
        monkeypatch.setattr(losses, "mean_over_processes", lambda _: torch.tensor(sum(counts) / 2))
        mask.append(
            mask_loss([pairs[rank][0]], [pairs[rank][1]], branch=branch, across_processes=True)
        )
    torch.testing.assert_close(
        torch.stack(category).mean(), category_loss(torch.cat(logits), torch.cat(labels))
    )
    torch.testing.assert_close(
        torch.stack(mask).mean(),
        mask_loss([p for p, _ in pairs], [t for _, t in pairs], branch=branch),
    )


def test_global_equals_local_in_one_process():
    logits, labels = torch.randn(20, 3), torch.tensor([0, 2, 1] + [3] * 17)
    one = category_loss(logits, labels, across_processes=True)
    torch.testing.assert_close(one, category_loss(logits, labels))
    probs, targets = masks(3)
    one = mask_loss([probs], [targets], branch=[probs], across_processes=True)
    torch.testing.assert_close(one, mask_loss([probs], [targets], branch=[probs]))


def test_parameters_of_idle_levels_join_without_a_share():
    probs, targets = masks(3)
    idle = torch.randn(4, requires_grad=True)
    loss = mask_loss([probs], [targets], branch=[probs], level_parameters=[idle])
    assert torch.equal(loss, mask_loss([probs], [targets], branch=[probs]))
    loss.backward()
    assert idle.grad.tolist() == [0.0] * 4
