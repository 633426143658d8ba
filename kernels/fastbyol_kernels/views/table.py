"""The parameter table of the two views: its columns, their meaning and their constants."""

from __future__ import annotations

import itertools
from enum import IntEnum


class Column(IntEnum):
    """Columns of the parameter table. An operation that is not applied has its identity value."""

    TOP = 0  # the crop box, in whole pixels of the image
    LEFT = 1
    HEIGHT = 2
    WIDTH = 3
    FLIP = 4  # 0 or 1: mirror left and right
    ORDER = 5  # index into JITTER_ORDERS, 0..23
    BRIGHTNESS = 6  # factor, identity 1
    CONTRAST = 7  # factor, identity 1
    SATURATION = 8  # factor, identity 1
    HUE = 9  # shift in turns, -0.5..0.5, identity 0
    GRAYSCALE = 10  # 0 or 1
    BLUR_SIGMA = 11  # standard deviation in pixels of the view, 0 is none
    SOLARIZE = 12  # 0 or 1: invert values of at least 1/2 (byol, appendix B)


JITTER_ORDERS = tuple(
    itertools.permutations((Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION, Column.HUE))
)
JITTER_IDENTITY = (1.0, 1.0, 1.0, 0.0)  # of BRIGHTNESS .. HUE
LUMA = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale
