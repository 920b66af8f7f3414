"""Convolution and batch norm in one step against the two steps."""

import copy
import io

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn

from instseg_ext.layers.folded_conv import FoldedConv2d, fold_norms


def fill(norm, seed=0):
    gen = torch.Generator().manual_seed(seed)
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=gen) + 0.5)


def layers(norm, *, bias=False, groups=1):
    """Return a plain layer and a folding one with the same parameters, both in eval mode."""
    torch.manual_seed(0)
    plain = Conv2d(
        4, 6, 3, stride=2, padding=1, bias=bias, groups=groups, norm=norm, activation=nn.ReLU()
    )
    fill(plain.norm)
    folding = copy.deepcopy(plain)
    fold_norms(folding)
    assert type(folding) is FoldedConv2d
    assert folding.state_dict().keys() == plain.state_dict().keys()
    return plain.eval(), folding.eval()


NORMS = {
    "frozen": lambda: FrozenBatchNorm2d(6),
    "batch norm": lambda: nn.BatchNorm2d(6),
    "not affine": lambda: nn.BatchNorm2d(6, affine=False),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"groups": 2}], ids=str)
def test_equals_the_two_steps(norm, options):
    plain, folding = layers(norm(), **options)
    x = torch.randn(2, 4, 9, 7)
    with torch.no_grad():
        torch.testing.assert_close(folding(x), plain(x), rtol=1e-5, atol=1e-5)
        assert folding._folded is not None
        assert not torch.equal(folding._folded[1], folding.weight)


def test_follows_every_change_of_its_tensors():
    plain, folding = layers(nn.BatchNorm2d(6))
    x = torch.randn(2, 4, 9, 7)

    def in_place(layer):
        layer.norm.running_var.mul_(3)

    def loaded(layer):
        other, _ = layers(nn.BatchNorm2d(6))
        fill(other.norm, seed=5)
        layer.load_state_dict(other.state_dict())

    def replaced(layer):
        layer.weight = nn.Parameter(layer.weight.flip(0))

    def trained(layer):
        layer.train()
        layer(x)
        layer.eval()

    def trained_in_eval_mode(layer):
        with torch.enable_grad():
            layer(x).sum().backward()
        torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()

    def norm_alone_trained(layer):
        layer.norm.train()
        layer(x)
        layer.norm.eval()

    def behind_the_back(layer):
        layer.weight.data.mul_(2)
        layer.eval()

    def widened(layer):
        layer.double()

    changes = (in_place, loaded, replaced, trained, trained_in_eval_mode, norm_alone_trained)
    with torch.no_grad():
        for change in (*changes, behind_the_back, widened):
            before = folding(x.to(folding.weight.dtype))
            change(plain), change(folding)
            y = x.to(folding.weight.dtype)
            torch.testing.assert_close(folding(y), plain(y), rtol=1e-5, atol=1e-5, msg=str(change))
            if change is not widened:
                assert not torch.allclose(folding(y), before), change


def test_training_and_gradients_take_the_two_steps():
    plain, folding = layers(nn.BatchNorm2d(6))
    x = torch.randn(2, 4, 9, 7)
    assert torch.equal(folding(x), plain(x))
    for layer in (plain, folding):
        layer.train()(x).sum().backward()
    assert folding._folded is None
    assert torch.equal(folding.weight.grad, plain.weight.grad)
    assert torch.equal(folding.norm.running_mean, plain.norm.running_mean)


def test_folded_weights_are_not_copied_saved_or_left_behind():
    def bytes_of(layer):
        file = io.BytesIO()
        torch.save(layer, file)
        return len(file.getvalue())

    _, folding = layers(nn.BatchNorm2d(6))
    before = bytes_of(folding)
    x = torch.randn(1, 4, 5, 5)
    with torch.inference_mode():
        expected = folding(x)
    assert folding._folded is not None
    assert bytes_of(folding) == before
    copied = copy.deepcopy(folding)
    assert copied._folded is None
    with torch.no_grad():
        assert torch.equal(copied(x), expected)
    assert folding.to("meta")._folded is None


def test_a_hook_on_the_norm_is_called():
    _, folding = layers(nn.BatchNorm2d(6))
    seen = []
    folding.norm.register_forward_hook(lambda *args: seen.append(args))
    with torch.no_grad():
        folding(torch.randn(1, 4, 5, 5))
    assert len(seen) == 1


def test_inference_mode_and_tracing():
    plain, folding = layers(nn.BatchNorm2d(6))
    x = torch.randn(2, 4, 9, 7)
    with torch.inference_mode():
        torch.testing.assert_close(folding(x), plain(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        traced = torch.jit.trace(folding, x)
        assert torch.equal(traced(x), plain(x))


def test_another_norm_may_take_the_place():
    _, folding = layers(nn.BatchNorm2d(6))
    folding.norm = nn.Identity()
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        expected = nn.functional.conv2d(x, folding.weight, None, 2, 1).relu()
        assert torch.equal(folding(x), expected)


def test_other_layers_are_left_alone():
    class Own(Conv2d):
        pass

    kept = [
        Own(4, 6, 1, norm=nn.BatchNorm2d(6)),
        Conv2d(4, 6, 1, norm=nn.GroupNorm(2, 6)),
        Conv2d(4, 6, 1),
        nn.Conv2d(4, 6, 1),
    ]
    before = [type(layer) for layer in kept]
    fold_norms(nn.Sequential(*kept))
    assert [type(layer) for layer in kept] == before
