"""What all pictures share: matplotlib asked for late, and the same bytes for the same figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nmar_ds.errors import ConfigError


def new_figure(file: Path, size: tuple[float, float]) -> Any:
    """An empty matplotlib figure, drawn without a display.

    Args:
        file: where it will go, for the message.
        size: inches.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(f"{file}: needs matplotlib; pip install 'nmar_ds[plots]'") from None
    return Figure(figsize=size)


def save_figure(figure: Any, file: Path) -> None:
    """Write a figure as PNG.

    Raises:
        ConfigError: the place cannot be written.
    """
    try:
        # No version and date inside: the same figures give the same picture.
        figure.savefig(file, dpi=100, format="png", metadata={"Software": None})
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}, expected a writable place") from None
