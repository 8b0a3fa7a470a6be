"""Contact sheets: whole frames of a dialogue with the half that is taken outlined, to check `side` by eye."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepmsi.data.decode import decode_frames
from deepmsi.data.files import replacing
from deepmsi.data.manifest import Row
from deepmsi.errors import UserError

_EDGE = 256
_CAPTION = 18
_COLUMNS = 4
_COLOUR = (255, 210, 0)


def draw_sheet(rows: Sequence[Row], path: Path) -> bool:
    """Draw the middle frame of each row's cut, the row's id below it, its `side` outlined.

    Args:
        rows: rows with a video and a side.
        path: the picture to write (PNG).

    Returns:
        Whether there is a picture: not if no row's video can be decoded.
    """
    from PIL import Image, ImageDraw

    frames = []
    for row in rows:
        if row.video is None or row.side is None:
            raise ValueError(f"{row.id} has no video or no side")
        try:
            frame = decode_frames(row.video, 1, start=row.start, end=row.end, size=_EDGE, resize="pad")[0]
        except UserError:  # the preparation names it, with the reason
            continue
        frames.append((row, frame))
    if not frames:
        return False
    columns = min(_COLUMNS, len(frames))
    height = _EDGE + _CAPTION
    sheet = Image.new("RGB", (columns * _EDGE, -(-len(frames) // columns) * height))
    draw = ImageDraw.Draw(sheet)
    for place, (row, frame) in enumerate(frames):
        x, y = place % columns * _EDGE, place // columns * height
        sheet.paste(Image.fromarray(frame.transpose(1, 2, 0)), (x, y))
        left = x if row.side == "left" else x + _EDGE // 2
        draw.rectangle((left, y, left + _EDGE // 2 - 1, y + _EDGE - 1), outline=_COLOUR, width=3)
        draw.text((x + 4, y + _EDGE + 3), f"{row.id}: {row.side}", fill=_COLOUR)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        sheet.save(file, format="PNG")
    return True
