"""Safe reading and atomic writing of weights and training checkpoints."""

from instseg_ext.checkpoint.atomic import atomic_write, remove_leftovers
from instseg_ext.checkpoint.checkpointer import InstSegCheckpointer
from instseg_ext.checkpoint.plain import to_plain
from instseg_ext.checkpoint.readers import fetch_weights, read_metadata, read_weights

__all__ = [
    "InstSegCheckpointer",
    "atomic_write",
    "fetch_weights",
    "read_metadata",
    "read_weights",
    "remove_leftovers",
    "to_plain",
]
