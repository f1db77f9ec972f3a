"""A frame as it comes over a connection, in one piece."""

import io

from paris_ray.errors import ProtocolError
from paris_ray.zklora.parties.frames import ANSWERS, Message, Sizes, read_message


def decode(frame: bytes, sizes: Sizes = ANSWERS) -> tuple[int, Message]:
    """Return the number and message of exactly one frame.

    Raises:
        ProtocolError: if it is none.
    """
    stream = io.BytesIO(frame)

    def read(size: int) -> bytearray:
        piece = bytearray(stream.read(size))
        if len(piece) != size:
            raise ProtocolError(f"the frame ends {size - len(piece)} bytes too early")
        return piece

    n, message = read_message(read(4), read, sizes)
    if trailing := len(stream.read()):
        raise ProtocolError(f"{trailing} bytes follow the frame")
    return n, message
