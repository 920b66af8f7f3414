"""The released net as the MultiPathNet authors' code writes it: Fast R-CNN, ResNet-18, integral."""

import torch
from checkpoint.torch7_writer import Torch, layer, net, one

HEAD = "roi_heads.box_head.towers.0.blocks"
PREDICTOR = "roi_heads.box_predictor"


class ReleasedNet:
    """Takes apart a state dict of ours.

    Args:
        state: by our names; norms of the stem and of res2 have a scale of 1.
        mean: of the box targets, (4,).
        std: of the box targets, (4,).
        wrapped: trained on one GPU, which puts a container around the parts.
    """

    def __init__(self, state, mean, std, wrapped=True):
        self.state, self.mean, self.std, self.wrapped = state, mean, std, wrapped

    def folded(self, name):
        """A convolution with the norm's shift for a bias."""
        bias = self.state[f"{name}.norm.bias"]
        return layer("SpatialConvolution", weight=self.state[f"{name}.weight"], bias=bias)

    def pair(self, name):
        scale, shift = self.state[f"{name}.norm.weight"], self.state[f"{name}.norm.bias"]
        convolution = layer("SpatialConvolution", weight=self.state[f"{name}.weight"])
        return [convolution, layer("ConstAffine", a=scale, b=shift)]

    def block(self, name, folded=False):
        first, second, beside = f"{name}.conv1", f"{name}.conv2", f"{name}.shortcut"
        if folded:
            path = net(self.folded(first), one("ReLU"), self.folded(second))
        else:
            path = net(*self.pair(first), one("ReLU"), *self.pair(second))
        other = net(*self.pair(beside)) if f"{beside}.weight" in self.state else one("Identity")
        return net(net(path, other, name="nn.ConcatTable"), one("CAddTable"), one("ReLU"))

    def stage(self, name, **options):
        return net(*(self.block(f"{name}.{i}", **options) for i in range(2)))

    def wrap(self, part):
        return net(part) if self.wrapped else part

    def first_row_background(self, name):
        """Classifier with the background, our last class, in front."""
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return layer("Linear", weight=weight.roll(1, 0), bias=bias.roll(1, 0))

    def boxes(self):
        """Layer whose outputs are multiplied by ``std`` and moved by ``mean``; a box for all."""
        name = f"{PREDICTOR}.bbox_pred"
        weight = self.state[f"{name}.weight"].unflatten(0, (-1, 4)) / self.std[:, None]
        bias = (self.state[f"{name}.bias"].unflatten(0, (-1, 4)) - self.mean) / self.std
        weight = torch.cat([torch.full_like(weight[:1], 9.0), weight]).flatten(0, 1)
        return layer("Linear", weight=weight, bias=torch.cat([bias[:1] * 0, bias]).flatten())

    def net(self):
        """Return the net."""
        frozen = net(self.folded("backbone.stem.conv1"), one("ReLU"), one("SpatialMaxPooling"),
                     self.stage("backbone.res2", folded=True))  # fmt: skip
        features = net(net(frozen, name="nn.NoBackprop"), self.stage("backbone.res3"),
                       self.stage("backbone.res4"))  # fmt: skip
        top = net(self.stage(HEAD), one("SpatialAveragePooling"), one("View"))
        count = sum(n.startswith(f"{PREDICTOR}.cls_score") for n in self.state) // 2
        classifiers = [
            self.first_row_background(f"{PREDICTOR}.cls_score.{u}") for u in range(count)
        ]
        predictors = net(net(*classifiers), self.boxes(), name="nn.ConcatTable")
        mode = net(net(one("SelectTable")), net(net(one("SoftMax"))), name="nn.ModeSwitch")
        statistics = Torch("nn.BBoxNorm", {"mean": self.mean[None], "std": self.std[None]})
        return net(
            net(self.wrap(features), one("Identity"), name="nn.ParallelTable"),
            one("ROIPooling"), self.wrap(top), predictors, mode,
            net(one("Identity"), statistics, name="nn.ParallelTable"),
        )  # fmt: skip
