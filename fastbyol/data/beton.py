"""FFCV's container: verify a file (``inspect``), describe it (``info_dict``), ``write`` one."""

from fastbyol.data.beton_layout import BetonInfo, Field, demand_labels, info_dict, inspect
from fastbyol.data.beton_write import Progress, UnreadableItemError, UnreadableItemsError, write

__all__ = [
    "BetonInfo",
    "Field",
    "Progress",
    "UnreadableItemError",
    "UnreadableItemsError",
    "demand_labels",
    "info_dict",
    "inspect",
    "write",
]
