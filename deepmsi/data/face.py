"""The optional face crop (extra ``deepmsi[face]``): one square for a whole clip, around its largest face."""

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from deepmsi.data.geometry import Box
from deepmsi.errors import UserError

_MARGIN = 1.4  # the square's edge over the face's longer edge: chin and brow stay inside while the head moves
_DETECT_EDGE = 640  # pictures are searched at this long edge at most


class FaceDetector:
    """Finds the largest face of a picture: YuNet where its .onnx file is given, else OpenCV's Haar cascade.

    Attributes:
        misses: clips so far in which no face was found.

    Raises:
        UserError: OpenCV is not installed, carries no cascade (version 5), or the model cannot be read.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None) -> None:
        self.misses = 0
        self._cv2 = _opencv()
        self._yunet = None if model is None else _load_yunet(self._cv2, Path(model))
        self._haar = None if self._yunet is not None else _load_haar(self._cv2)

    def box(self, pictures: Sequence[np.ndarray]) -> Box | None:
        """Return one box for all ``pictures`` ``[H, W, 3]`` uint8 RGB of a clip, or None without any face.

        The box is the square of the median centre and edge over the pictures in which a face is found, moved
        inside the picture.
        """
        found = [box for box in (self._largest(picture) for picture in pictures) if box is not None]
        if not found:
            self.misses += 1
            return None
        boxes = np.array(found, np.float64)
        centre_x, centre_y = np.median(boxes[:, :2] + boxes[:, 2:] / 2, axis=0)
        height, width = pictures[0].shape[:2]
        edge = round(min(_MARGIN * float(np.median(boxes[:, 2:].max(axis=1))), width, height))
        x = round(min(max(float(centre_x) - edge / 2, 0.0), width - edge))
        y = round(min(max(float(centre_y) - edge / 2, 0.0), height - edge))
        return x, y, edge, edge

    def _largest(self, picture: np.ndarray) -> tuple[float, float, float, float] | None:
        height, width = picture.shape[:2]
        scale = min(1.0, _DETECT_EDGE / max(height, width))
        small = picture
        if scale < 1:
            shape = (max(1, round(width * scale)), max(1, round(height * scale)))
            small = self._cv2.resize(picture, shape, interpolation=self._cv2.INTER_AREA)
        if self._yunet is not None:
            self._yunet.setInputSize((small.shape[1], small.shape[0]))
            _, faces = self._yunet.detect(np.ascontiguousarray(small[:, :, ::-1]))
            boxes = [] if faces is None else [tuple(face[:4]) for face in faces]
        else:
            assert self._haar is not None
            grey = self._cv2.cvtColor(small, self._cv2.COLOR_RGB2GRAY)
            least = max(20, min(grey.shape) // 10)
            boxes = list(self._haar.detectMultiScale(grey, 1.1, 5, minSize=(least, least)))
        if not boxes:
            return None
        x, y, w, h = max(boxes, key=lambda b: (b[2] * b[3], -b[0], -b[1]))
        return float(x) / scale, float(y) / scale, float(w) / scale, float(h) / scale


@lru_cache(maxsize=4)
def shared_detector(model: str | None = None) -> FaceDetector:
    """Return a detector that is loaded once per process."""
    return FaceDetector(model)


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            "the face crop needs OpenCV, which is not installed; install deepmsi[face] or leave face off"
        ) from error
    cv2.setNumThreads(1)  # the order of sums, and so the boxes, must not depend on the machine
    return cv2


def _load_yunet(cv2: Any, model: Path) -> Any:
    if not model.is_file():
        raise UserError(f"{model}: there is no such face model; give the path of YuNet's .onnx file")
    try:
        return cv2.FaceDetectorYN.create(str(model), "", (320, 320), score_threshold=0.7)
    except cv2.error as error:
        raise UserError(f"{model}: OpenCV cannot read this as YuNet's .onnx file") from error


def _load_haar(cv2: Any) -> Any:
    file = Path(cv2.data.haarcascades) / "haarcascade_frontalface_default.xml"
    if not hasattr(cv2, "CascadeClassifier") or not file.is_file():
        raise UserError(
            f"OpenCV {cv2.__version__} carries no face detector of its own; give YuNet's .onnx file "
            "(face_model), or install opencv-python-headless<5"
        )
    return cv2.CascadeClassifier(str(file))
