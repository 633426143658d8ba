"""Whether a JPEG stream brings the tables that it is decoded with, so that its pixels depend on its own bytes alone.

A decoder keeps the tables of the image before: T.81 has it so for abbreviated streams (B.5), and FFCV's decoders live as long
as their threads. An image that lacks a table would be decoded with another image's, differently each time, without a word.
Marker layout: ITU-T T.81, annex B. What needs which table: F.2 (sequential) and G.2 (progressive).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# What ends entropy-coded data: any marker but stuffed zeros, restarts and fill bytes.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
# Baseline, extended and progressive Huffman frames: what beton_jpeg accepts.
_SOF0, _SOF1, _SOF2 = 0xC0, 0xC1, 0xC2
_DHT, _EOI, _SOS, _DQT = 0xC4, 0xD9, 0xDA, 0xDB


@dataclass
class _Seen:
    """What the stream has defined so far. Huffman numbers are class << 4 | number, class 0 for DC and 1 for AC."""

    quantisation: set[int] = field(default_factory=set)
    huffman: set[int] = field(default_factory=set)
    # Quantisation table by component identifier.
    components: dict[int, int] = field(default_factory=dict)
    progressive: bool = False


def brings_its_tables(stream: bytes) -> bool:
    """Whether every quantisation and Huffman table is defined before a scan uses it; false for what cannot be followed.

    ``stream``: from SOI to EOI. It is not decoded: a true answer says nothing of the picture's data.
    """
    seen = _Seen()
    try:
        for marker, body in _segments(stream, seen):
            if marker == _SOS and not _has_tables(body, seen):
                return False
            _define(marker, body, seen)
    except (IndexError, ValueError, KeyError):
        return False
    return bool(seen.components)


def _segments(stream: bytes, seen: _Seen) -> Iterator[tuple[int, bytes]]:
    """(marker, parameters) up to the last scan that a decoder needs. ValueError where a segment is not whole."""
    at = 2
    while stream[at + 1] != _EOI:
        if stream[at + 1] == 0xFF:  # any number of fill bytes may stand before a marker (B.1.1.2)
            at += 1
            continue
        marker, length = stream[at + 1], stream[at + 2] << 8 | stream[at + 3]
        body = stream[at + 4 : at + 2 + length]
        if stream[at] != 0xFF or length < 2 or len(body) != length - 2:
            raise ValueError("no whole segment")
        yield marker, body
        at += 2 + length
        if marker == _SOS:
            if not seen.progressive and body[0] == len(seen.components):
                return
            found = _MARKER.search(stream, at)
            if found is None:
                raise ValueError("no end")
            at = found.start()


def _define(marker: int, body: bytes, seen: _Seen) -> None:
    if marker == _DQT:
        seen.quantisation |= _quantisation_numbers(body)
    elif marker == _DHT:
        seen.huffman |= _huffman_numbers(body)
    elif marker in (_SOF0, _SOF1, _SOF2):
        seen.progressive = marker == _SOF2
        seen.components = {body[6 + 3 * k]: body[8 + 3 * k] for k in range(body[5])}
        if len(seen.components) != body[5]:
            raise ValueError("two components of one name (B.2.2)")


def _quantisation_numbers(body: bytes) -> set[int]:
    numbers, at = set(), 0
    while at < len(body):
        numbers.add(body[at] & 15)
        at += 1 + (128 if body[at] >> 4 else 64)
    return numbers


def _huffman_numbers(body: bytes) -> set[int]:
    numbers, at = set(), 0
    while at < len(body):
        numbers.add(body[at])
        at += 17 + sum(body[at + 1 : at + 17])
    return numbers


def _has_tables(scan: bytes, seen: _Seen) -> bool:
    count = scan[0]
    first, before = scan[1 + 2 * count], scan[3 + 2 * count] >> 4
    needs_dc = not seen.progressive or (first == 0 and before == 0)
    needs_ac = not seen.progressive or first > 0
    for k in range(count):
        dc, ac = scan[2 + 2 * k] >> 4, scan[2 + 2 * k] & 15
        if seen.components[scan[1 + 2 * k]] not in seen.quantisation:
            return False
        if (needs_dc and dc not in seen.huffman) or (needs_ac and 16 | ac not in seen.huffman):
            return False
    return True
