"""Fixtures that several test files use."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared():
    """The folder with the real data, beside the repository."""
    folder = ROOT.parent / "shared"
    if not (folder / "data" / "raw").is_dir():
        pytest.skip(f"no real data: {folder / 'data' / 'raw'} is not there")
    return folder
