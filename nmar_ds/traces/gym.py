"""Records from the task families of reasoning-gym, an optional library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nmar_ds.errors import ConfigError


def family(
    name: str, *, num: int, seed: int, settings: Mapping[str, Any]
) -> tuple[str, Callable[[int], dict[str, Any]]]:
    """One family's problems: the question is the prompt, its answer reference and answer.

    Args:
        name: as reasoning-gym calls it, such as "chain_sum".
        num: problems.
        seed: of the family; with the number of a problem it decides the problem.
        settings: the family's own, such as {"max_terms": 4}.

    Returns:
        The library's version, and a function from 0-based number to record.

    Raises:
        ConfigError: the library is missing, or knows no such family or setting.
    """
    try:
        import reasoning_gym
    except ImportError:
        raise ConfigError(f"{name}: needs reasoning-gym; pip install 'nmar_ds[problems]'") from None
    from importlib.metadata import version

    try:
        dataset = reasoning_gym.create_dataset(name, size=num, seed=seed, **settings)
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"{name}: reasoning-gym refuses it: {error}") from None

    def make(number: int) -> dict[str, Any]:
        entry = dataset[number]
        answer = str(entry["answer"])
        return {
            "id": f"{name}-{seed}-{number}", "group": name, "prompt": f"{entry['question']}\n",
            "reference": answer, "answer": answer,
        }  # fmt: skip

    return version("reasoning-gym"), make
