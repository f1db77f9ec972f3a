"""How often the pixels of a JPEG file have to be gone through."""

import re

MAX_SCANS = 100  # encoders write about ten
# Of those with a length: not what stands for the byte 255, TEM, restarts and the beginning. Of fill
# bytes before it the last is enough.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
_END, _SCAN = 0xD9, 0xDA


def has_too_many_scans(encoded: bytes) -> bool:
    """Tell whether a picture has more than `MAX_SCANS`.

    Each may take a few bytes, and as long as all pixels: a small file could keep a decoder busy
    for days.
    """
    scans, place = 0, 2  # behind the mark of the beginning
    while scans <= MAX_SCANS and (found := _MARKER.search(encoded, place)):
        marker, place = found[0][1], found.end()
        if marker == _END:  # what follows may be a film
            return False
        scans += marker == _SCAN
        place += int.from_bytes(encoded[place : place + 2])
    return scans > MAX_SCANS
