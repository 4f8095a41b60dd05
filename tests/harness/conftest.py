"""A random exported model with `<UNDO>`, and no network; helpers come from the unit tests."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported

from examined_fixtures import export, tokenizer

__all__ = ["export", "tokenizer"]  # fixtures of the tests here


@pytest.fixture(scope="session", autouse=True)
def nothing_from_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty cache of data sets, and no address of another machine can be reached."""
    import datasets

    def refuse(*address: object) -> NoReturn:
        raise AssertionError(f"the network is used: {address}")

    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        yield
