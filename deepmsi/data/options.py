"""The choices of a preparation; they are recorded in its index and in every checkpoint trained on it."""

from pydantic import ConfigDict, Field, field_validator

from deepmsi.models.config import OFFLINE_AUDIO, OFFLINE_TEXT, Resize, Section, fixed_place


class PrepareOptions(Section):
    """How clips become arrays. Equal options and equal input give equal bytes, of features on the same device."""

    model_config = ConfigDict(frozen=True)

    frames: int = Field(15, ge=1, le=4096, description="frames per utterance, T")
    size: int = Field(256, ge=8, le=4096, description="edge of a stored frame in pixels")
    resize: Resize = Field(
        "crop", description="short edge to size and centre crop, or squash to a square, or pad to one"
    )
    face: bool = Field(False, description="crop to the face first (needs the extra deepmsi[face])")
    face_model: str | None = Field(
        None, description="path of a YuNet .onnx file for the face crop; otherwise OpenCV's Haar cascade"
    )
    sample_rate: int = Field(16000, ge=4000, le=192000, description="samples per second of the stored waveforms")
    text_encoder: str | None = Field(
        None, min_length=1, description="hub name or folder of a frozen encoder whose text features are stored"
    )
    audio_encoder: str | None = Field(
        None, min_length=1, description="hub name or folder of a frozen encoder whose audio features are stored"
    )

    @field_validator("text_encoder", "audio_encoder")
    @classmethod
    def _pretrained(cls, name: str | None) -> str | None:
        if name in (OFFLINE_TEXT, OFFLINE_AUDIO):
            raise ValueError(f"{name!r} has no pretrained weights to compute features with; train it end to end")
        return fixed_place(name)
