"""Tensors that claim to be on another device and compute on the CPU, with a count of the copies."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# The only one that torch hands over everywhere without asking for its library.
DEVICE = torch.device("meta")
# Their results have a size or a value that the host waits for.
READS = ("_local_scalar_dense", "is_nonzero", "masked_select", "nonzero", "unique_dim")


class FarTensor(torch.Tensor):
    """A tensor on the device."""

    @staticmethod
    def __new__(cls, near):
        layout = {"strides": near.stride(), "storage_offset": near.storage_offset()}
        found = torch.Tensor._make_wrapper_subclass(
            cls, near.shape, **layout, dtype=near.dtype, device=DEVICE
        )
        found.near = near
        return found

    def tolist(self):
        """Copy to the host first, as the method of a plain tensor does where it must."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of FarDevice")


class FarDevice(TorchDispatchMode):
    """Stands for the device; tensors of it and of the host do not mix, as on a GPU.

    Attributes:
        reads: operations whose result the host has to wait for.
        copies: number of tensors that were brought to the device.
    """

    def __init__(self):
        super().__init__()
        self.reads, self.copies = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        far = any(isinstance(x, FarTensor) for x in given)
        if any(x.device == DEVICE and not isinstance(x, FarTensor) for x in given):
            raise RuntimeError(f"{func} of a tensor that torch made past this mode")
        if kwargs.get("device") is not None:
            to_far = torch.device(kwargs["device"]) == DEVICE
            self.copies += bool(given) and to_far and not far
            if far and not to_far:
                self.reads.append(str(func))
            far, kwargs["device"] = to_far, "cpu"
        elif far:
            self._check(func, given)
        near_args, near_kwargs = tree_map_only(FarTensor, lambda x: x.near, (args, kwargs))
        found = func(*near_args, **near_kwargs)
        if not far:
            return found
        # What was written on keeps its wrapper.
        known = {id(x.near): x for x in given if isinstance(x, FarTensor)}
        wrap = lambda x: known[id(x)] if id(x) in known else FarTensor(x)  # noqa: E731
        return tree_map_only(torch.Tensor, wrap, found)

    def _check(self, func, given):
        name = func.overloadpacket.__name__
        mask = name == "index" and any(x.dtype == torch.bool for x in given[1:])
        if name in READS or mask:
            self.reads.append(str(func))
        if name in ("copy_", "index"):  # a GPU takes these from the host
            self.copies += sum(not isinstance(x, FarTensor) for x in given)
        elif any(x.ndim and not isinstance(x, FarTensor) for x in given):
            raise RuntimeError(f"{func} of tensors on two devices")
