"""One pre-trained model, and what a plain loop makes of it: what every framework's loop is held against."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integrations.vlm_data import plain_loop, save_pretrained


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_pretrained(tmp_path_factory.mktemp("pretrained")))


@pytest.fixture(scope="package")
def expected(folder: str) -> dict[str, Any]:
    return plain_loop(folder)
