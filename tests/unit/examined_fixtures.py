"""The toy task's tokenizer and export as fixtures, for the conftest of each folder that examines."""

from __future__ import annotations

from pathlib import Path

import pytest

from nmar_ds.traces.encoding import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Of the toy task."""
    import examined  # it imports torch, which most tests of a folder do without

    return examined.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A random model's exported folder with that tokenizer."""
    import examined

    return examined.make_export(tmp_path_factory.mktemp("export"), tokenizer)
