"""Shared config keys, and safe, typed loading of config files and overrides."""

from instseg_ext.config.defaults import add_missing, add_shared_config
from instseg_ext.config.loading import (
    config_names,
    display_name,
    find_config,
    merge_file,
    merge_overrides,
)
from instseg_ext.config.resolve import (
    PRECISIONS,
    check_choice,
    check_range,
    resolve_device,
    resolve_precision,
)

__all__ = [
    "PRECISIONS",
    "add_missing",
    "add_shared_config",
    "check_choice",
    "check_range",
    "config_names",
    "display_name",
    "find_config",
    "merge_file",
    "merge_overrides",
    "resolve_device",
    "resolve_precision",
]
