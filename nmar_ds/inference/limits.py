"""Numbers that decoding can compute with in float32; imports no torch."""

from __future__ import annotations

from nmar_ds.errors import ConfigError

# Logits are divided by the temperature: beyond these, float32 has only infinities and zeros left,
# and what is drawn of them is arbitrary, banned tokens among it.
MIN_TEMPERATURE = 1e-4
MAX_TEMPERATURE = 1e4
MAX_UNDO_BIAS = 1e6  # in either direction; forces or forbids the undo, whatever the logits

TEMPERATURES = f"0 (greedy) or {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"


def fits_temperature(value: float) -> bool:
    """Whether a temperature is greedy, or one that can be drawn at; not a number does not fit."""
    return value == 0 or MIN_TEMPERATURE <= value <= MAX_TEMPERATURE


def check_draws(place: str, *, temperature: float, top_p: float) -> None:
    """Check how responses are drawn.

    Args:
        place: what the message begins with.
        temperature: 0 is greedy.
        top_p: mass of the nucleus.

    Raises:
        ConfigError: names the value and what was expected.
    """
    if not fits_temperature(temperature):
        raise ConfigError(f"{place}temperature: {temperature!r}, expected {TEMPERATURES}")
    if not 0 < top_p <= 1:
        raise ConfigError(f"{place}top_p: {top_p!r}, expected in (0, 1]")
