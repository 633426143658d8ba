"""A check that a JPEG stream defines the tables that it uses.

Markers: ITU-T T.81, annex B. Which scan needs which table: F.2 (sequential), G.2 (progressive).
"""

from __future__ import annotations

import re

from fastbyol.data.beton_jpeg import FRAMES

# Any marker ends entropy-coded data, but for stuffed zeros, restarts and fill bytes.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
# The progressive one of beton_jpeg's frames.
_SOF2 = 0xC2
_DHT, _EOI, _SOS, _DQT = 0xC4, 0xD9, 0xDA, 0xDB


def brings_its_tables(stream: bytes) -> bool:
    """Return whether ``stream`` (SOI to EOI) defines every table before a scan uses it.

    Decoders keep the tables of the last image: T.81 wants that for abbreviated streams (B.5), and
    FFCV's decoders live as long as their threads. So a stream without a table would be decoded with
    another image's. The result is False for a stream that cannot be followed. The picture's data
    are not decoded.
    """
    tables: dict[int, set[int]] = {_DQT: set(), _DHT: set()}
    components: dict[int, int] = {}  # quantisation table by component identifier
    progressive, at = False, 2
    try:
        while stream[at + 1] != _EOI:
            if stream[at + 1] == 0xFF:  # fill bytes before a marker (B.1.1.2)
                at += 1
                continue
            marker, length = stream[at + 1], stream[at + 2] << 8 | stream[at + 3]
            body = stream[at + 4 : at + 2 + length]
            if stream[at] != 0xFF or length < 2 or len(body) != length - 2:
                return False
            at += 2 + length
            if marker in tables:
                tables[marker] |= _table_numbers(marker, body)
            elif marker in FRAMES:
                progressive = marker == _SOF2
                components = {body[6 + 3 * k]: body[8 + 3 * k] for k in range(body[5])}
                if len(components) != body[5]:  # two of one name (B.2.2)
                    return False
            elif marker == _SOS:
                uses = _uses(body, progressive)
                if not all(
                    components[name] in tables[_DQT] and huffman <= tables[_DHT]
                    for name, huffman in uses
                ):
                    return False
                if not progressive and body[0] == len(components):
                    break  # the only scan that a decoder needs
                marked = _MARKER.search(stream, at)
                if marked is None:
                    return False
                at = marked.start()
    except (IndexError, KeyError):
        return False
    return bool(components)


def _table_numbers(marker: int, body: bytes) -> set[int]:
    """Return the numbers of a segment's tables; Huffman's are class << 4 | number, 0 DC, 1 AC."""
    numbers, at = set(), 0
    while at < len(body):
        if marker == _DQT:  # precision and number, then 64 values of one byte or two (B.2.4.1)
            number, size = body[at] & 15, 128 if body[at] >> 4 else 64
        else:  # class and number, 16 counts of codes, a value for each code (B.2.4.2)
            number, size = body[at], 16 + sum(body[at + 1 : at + 17])
        numbers.add(number)
        at += 1 + size
    return numbers


def _uses(scan: bytes, progressive: bool) -> list[tuple[int, set[int]]]:
    """Return each component of a scan with the Huffman tables that decode it there."""
    count = scan[0]
    first, before = scan[1 + 2 * count], scan[3 + 2 * count] >> 4
    needs_dc, needs_ac = not progressive or first == before == 0, not progressive or first > 0
    uses = []
    for k in range(count):
        name, numbers = scan[1 + 2 * k], scan[2 + 2 * k]
        by_need = ((needs_dc, numbers >> 4), (needs_ac, 16 | numbers & 15))
        uses.append((name, {number for is_needed, number in by_need if is_needed}))
    return uses
