"""Fixtures of the training tests: small prepared sets."""

import sys
from pathlib import Path

import pytest

# The suite imports test files by path, so a helper module beside them has to be made findable.
sys.path.insert(0, str(Path(__file__).parent))

from small_corpus import prepared_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 rows without splits, text and audio features, prepared."""
    return prepared_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def split_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows: three fifths train, one dev, one test."""
    splits = ("train", "train", "train", "dev", "test")
    return prepared_corpus(tmp_path_factory.mktemp("split"), rows=60, splits=splits)


@pytest.fixture(scope="session")
def video_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 rows, two thirds of them with frames [2, 3, 64, 64]."""
    return prepared_corpus(tmp_path_factory.mktemp("video"), rows=12, video=True)
