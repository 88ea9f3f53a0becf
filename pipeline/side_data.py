"""Owns what a picture carries besides its planes, of the kinds that PyAV has a name for."""

from typing import Any

from av.sidedata.sidedata import Type


def _named_later(cls: type[Type], value: object) -> Any:
    # PyAV 18 refuses every side data of a picture, with a ValueError, where one is of a kind that
    # came to FFmpeg after its list: EXIF (TIFF in MOV), the view of stereoscopic HEVC.
    # https://github.com/PyAV-Org/PyAV/blob/main/av/sidedata/sidedata.py
    kind: Any = object.__new__(cls)
    kind._name_, kind._value_ = f"UNKNOWN_{value}", value
    return kind


Type._missing_ = classmethod(_named_later)  # type: ignore[method-assign, assignment]


def side_data_of(picture: Any) -> dict[Type, Any]:
    """What the picture carries, by its kind, as buffers; the last of a kind that comes several
    times."""
    return {data.type: data for data in picture.side_data}
