"""What families of Lua Torch's files share: names of layers, and norms that were made constant."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from instseg_ext.checkpoint.keymap import Drop, KeyMap, Mapped, Rename, as_tensor
from instseg_ext.checkpoint.report import ConversionError

__all__ = ["Torch7KeyMap", "torch7_layer", "torch7_norm", "torch7_way"]

# Fields of layers that are weights or statistics; what else holds tensors is work space.
_WEIGHTS = frozenset(
    ("weight", "bias", "a", "b", "mean", "std", "running_mean", "running_var", "running_std")
)
# What detectron2's FrozenBatchNorm2d adds to the variance.
_EPSILON = 1e-5


def torch7_way(*numbers: int | str) -> str:
    """Return the name of a layer in containers, ``modules.1.modules.2``; numbers may be holes."""
    return ".".join(f"modules.{number}" for number in numbers)


def torch7_layer(
    source: str, target: str, transform: Callable[[Tensor], Tensor] | None = None
) -> tuple[Rename, Rename]:
    """Return the rules for weight and bias of a layer.

    Args:
        source: name of the layer in the file, with holes.
        target: name of the module here.
        transform: changes both.
    """
    return (
        Rename(f"{source}.weight", f"{target}.weight", transform),
        Rename(f"{source}.bias", f"{target}.bias", transform),
    )


def torch7_norm(source: str, target: str) -> tuple[Rename, Rename]:
    """Return the rules for a norm made constant, ``inn.ConstAffine``: scale ``a``, shift ``b``."""
    return (
        Rename(f"{source}.a", f"{target}.weight"),
        Rename(f"{source}.b", f"{target}.bias"),
    )


class Torch7KeyMap(KeyMap):
    """A key map that leaves out work space and brings norms into the form of detectron2's.

    In these files a norm is a constant scale and shift, or is folded into its convolution, which
    then has a bias. Here it has statistics beside scale and shift, which are set to change nothing.
    """

    def __init__(self, rules: Sequence[Rename | Drop], normed: str = r"(?!)") -> None:
        """Keep the rules.

        Args:
            rules: in order of precedence.
            normed: regular expression for the convolutions, by their names here, that have a norm
                and no bias.
        """
        super().__init__(rules)
        self._normed = re.compile(normed)

    def apply(self, state_dict: Mapping[str, Any]) -> Mapped:
        """Rename a state dict, see ``KeyMap``; weights become float32 and own their memory.

        Raises:
            ConversionError: also if a tensor repeats its elements, or a bias does not fit its norm.
        """
        weights = {n: v for n, v in state_dict.items() if n.rpartition(".")[2] in _WEIGHTS}
        for name, value in weights.items():
            tensor = as_tensor(name, value)
            if tensor.nbytes > tensor.untyped_storage().nbytes():
                raise ConversionError(f"{name} repeats its elements, which weights do not do.")
        mapped = super().apply(weights)
        mapped.dropped.update(
            {name: "work space of layers" for name in state_dict if name not in weights}
        )
        for name, tensor in mapped.weights.items():
            # Torch keeps all parameters of a net in one storage, which must not be saved for each.
            mapped.weights[name] = tensor.float().clone(memory_format=torch.contiguous_format)
        self._complete_norms(mapped)
        return mapped

    def _complete_norms(self, mapped: Mapped) -> None:
        """Move biases of convolutions into their norms, and add the norms' statistics."""
        weights = mapped.weights
        for name in [n for n in weights if n.endswith(".bias")]:
            convolution = name.removesuffix(".bias")
            norm = f"{convolution}.norm"
            if convolution.endswith(".norm") or not self._normed.fullmatch(convolution):
                continue
            bias = weights.pop(name)
            scale = weights.setdefault(f"{norm}.weight", torch.ones_like(bias))
            shift = weights.get(f"{norm}.bias", torch.zeros_like(bias))
            if not bias.shape == scale.shape == shift.shape:
                raise ConversionError(
                    f"{name} is {list(bias.shape)} and its norm {list(scale.shape)}."
                )
            weights[f"{norm}.bias"] = shift + scale * bias
            for old in [o for o, new in mapped.renamed.items() if new == name]:
                mapped.renamed[old] = f"{norm}.bias"
        for name in [n for n in weights if n.endswith(".norm.weight")]:
            norm = name.removesuffix(".weight")
            weights[f"{norm}.running_mean"] = torch.zeros_like(weights[name])
            weights[f"{norm}.running_var"] = torch.full_like(weights[name], 1 - _EPSILON)
