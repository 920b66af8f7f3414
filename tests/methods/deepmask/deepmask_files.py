"""Files of DeepMask and SharpMask as their authors' code, and a port to PyTorch, write them."""

import torch
from checkpoint.torch7_writer import Torch, layer, net, one

BLOCKS = {"res2": 3, "res3": 4, "res4": 6}
# Ours and the port's names of the children of a block.
_PORT = {"conv1": "conv1", "conv2": "conv2.1", "conv3": "conv3", "shortcut": "downsample.0"}
_PORT_NORM = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3", "shortcut": "downsample.1"}


class AuthorsModel:
    """Takes apart a state dict of ours.

    Args:
        state: by our names.
        ready: the model was made ready for whole images before it was saved.
    """

    def __init__(self, state, ready=False):
        self.state, self.ready = state, ready

    def conv(self, name):
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        return layer("SpatialConvolution", weight=weight, bias=bias)

    def linear(self, name):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        if not self.ready:
            return layer("Linear", weight=weight.flatten(1), bias=bias)
        as_convolution = weight if weight.dim() == 4 else weight[:, :, None, None]
        return layer("SpatialConvolution", weight=as_convolution, bias=bias)

    def norm(self, name):
        return layer(
            "SpatialConstDiagonal",
            a=self.state[f"{name}.norm.weight"],
            b=self.state[f"{name}.norm.bias"],
        )

    def mirrored(self, name):
        return net(one("SpatialSymmetricPadding"), self.conv(name))

    def block(self, name):
        first, second, third = (f"{name}.conv{i}" for i in (1, 2, 3))
        path = net(
            self.conv(first), self.norm(first), one("ReLU"),
            self.mirrored(second), self.norm(second), one("ReLU"),
            self.conv(third), self.norm(third),
        )  # fmt: skip
        beside, other = f"{name}.shortcut", one("Identity")
        if f"{beside}.weight" in self.state:
            other = net(self.conv(beside), self.norm(beside))
        return net(net(path, other, name="nn.ConcatTable"), one("CAddTable"), one("ReLU"))

    def trunk(self):
        stem = "backbone.stem.conv1"
        stages = [
            net(*(self.block(f"backbone.{stage}.{i}") for i in range(count)))
            for stage, count in BLOCKS.items()
        ]
        return net(
            self.mirrored(stem), self.norm(stem), one("ReLU"), one("SpatialMaxPooling"), *stages,
            one("SpatialZeroPadding"), self.conv("head.reduce"), one("ReLU"), one("View"),
            self.linear("head.encode"),
        )  # fmt: skip

    def branches(self):
        mask = net(self.linear("head.mask.fc"))
        fc1, fc2 = self.linear("head.score.fc1"), self.linear("head.score.fc2")
        return {
            "trunk": self.trunk(),
            "score": net(one("Dropout"), fc1, one("Threshold"), one("Dropout"), fc2),
            "mask": mask if self.ready else net(mask, net(one("Copy"), one("View"))),
        }

    def convolutions(self, name, crop=False):
        layers = [one("SpatialZeroPadding")] if crop else []
        count = sum(f"{name}.{i}.weight" in self.state for i in range(3))
        for i in range(count):
            relu = [one("ReLU")] if i else []
            layers += [*relu, one("SpatialSymmetricPadding"), self.conv(f"{name}.{i}")]
        return net(*layers)

    def deepmask(self):
        parts = self.branches()
        named = {"trunk": parts["trunk"], "maskBranch": parts["mask"]}
        return Torch("nn.DeepMask", {**named, "scoreBranch": parts["score"], "fSz": 2})

    def sharpmask(self):
        parts, refine = self.branches(), "head.refine"
        lateral = [self.convolutions(f"{refine}.lateral.{i}", crop=i > 0) for i in range(4)]
        topdown = [self.convolutions(f"{refine}.topdown.{i}") for i in range(4)]
        encode = AuthorsModel(self.state).linear(f"{refine}.encode")
        first = net(encode, one("View"))
        refs = {0: first}
        for i, (beside, above) in enumerate(zip(lateral, topdown, strict=True), start=1):
            pair = net(one("Identity") if self.ready else beside, above, name="nn.ParallelTable")
            refs[i] = net(pair, one("CAddTable"), one("ReLU"), one("SpatialUpSamplingNearest"))
        refs[4].fields["modules"] += [
            one("SpatialSymmetricPadding"),
            self.conv(f"{refine}.predict"),
        ]
        return Torch(
            "nn.SharpMask",
            {
                "trunk": parts["trunk"],
                "maskBranchDM": parts["mask"],
                "scoreBranch": parts["score"],
                "neths": lateral,
                "netvs": {0: first} | dict(enumerate(topdown, start=1)),
                "refs": refs,
                "inps": {1: [torch.ones(2), torch.ones(3)]},
                "skpos": [8, 6, 5, 3],
            },
        )


def port_state(state):
    """Return DeepMask's state dict under the names of the port, with norms that count batches."""
    found = {}
    for name, value in state.items():
        parts = name.split(".")
        if name.startswith("backbone.stem"):
            new = "trunk.0.1." + parts[-1] if "norm" in parts else "trunk.0.0.1.weight"
        elif parts[0] == "backbone":
            block = f"trunk.0.{int(parts[1][3:]) + 2}.{parts[2]}"
            names = _PORT_NORM if "norm" in parts else _PORT
            new = f"{block}.{names[parts[3]]}.{parts[-1]}"
        else:
            prefix = {
                "head.reduce": "trunk.1.0",
                "head.encode": "trunk.1.2",
                "head.mask.fc": "maskBranch.0.0",
                "head.score.fc1": "scoreBranch.1",
                "head.score.fc2": "scoreBranch.4",
            }[name.rpartition(".")[0]]
            new = f"{prefix}.{parts[-1]}"
        is_linear = value.dim() == 2
        found[new] = value[:, :, None, None] if is_linear else value
        if new.endswith("running_var"):
            found[new.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    return found
