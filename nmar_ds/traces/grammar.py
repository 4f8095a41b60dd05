"""Which segment may follow which: one table for records and for assembled traces (SPEC 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from nmar_ds.traces.schema import Role

# What may follow what (SPEC 1); None stands for the start and the end of a record.
NEXT_ROLES: Mapping[int | None, tuple[Role | None, ...]] = {
    None: (Role.PROMPT, Role.PREFIX, Role.DEVIATION),
    Role.PROMPT: (Role.PREFIX, Role.DEVIATION),
    Role.PREFIX: (Role.DEVIATION, Role.PROMPT, None),
    Role.DEVIATION: (Role.UNDO,),
    Role.UNDO: (Role.DEVIATION, Role.CORRECTION, Role.PROMPT, None),
    Role.CORRECTION: (Role.DEVIATION, Role.PROMPT, None),
}

# Under `reset` an undo takes the whole response back: no deviation comes after right tokens.
RESET_NEXT_ROLES = {
    **NEXT_ROLES,
    Role.PREFIX: (Role.PROMPT, None),
    Role.CORRECTION: (Role.PROMPT, None),
}


def require_grammar(
    roles: Iterable[int],
    with_undos: bool,
    error: Callable[[str, str, str], Exception],
    *,
    semantics: str = "token",
) -> None:
    """Check `prompt? turn (prompt turn)*` with `turn = prefix? (deviation undo correction?)*`.

    Under `reset`, `turn = prefix | (deviation undo)+ correction`.

    Args:
        roles: of the segments, in order.
        with_undos: whether undos are written; without them each deviation is taken to be
            followed by one.
        error: makes the exception to raise from (field, problem, expected).
        semantics: of written traces. Records of text say what is wrong where, whatever the
            semantics; their deviations are moved afterwards.

    Raises:
        The exception made by `error`: a segment out of place, or a turn that reduces to nothing.
    """
    next_roles = RESET_NEXT_ROLES if semantics == "reset" else NEXT_ROLES
    under = f" under {semantics!r}" if next_roles is RESET_NEXT_ROLES else ""
    before: int | None = None
    says_something = True
    number = -1
    for number, role in enumerate(roles):
        if role not in next_roles[before]:
            after = "at the start" if before is None else f"after {Role(before).label}"
            found = f"{Role(role).label} {after}"
            raise error(f"segments[{number}].role", found, _named(next_roles[before]) + under)
        if role == Role.PROMPT and not says_something:
            raise error(
                f"segments[{number}]", "the turn before it reduces to nothing", "a response"
            )
        if role == Role.PROMPT or before is None:
            says_something = False
        says_something = says_something or role in (Role.PREFIX, Role.CORRECTION)
        before = Role.UNDO if role == Role.DEVIATION and not with_undos else role
    if before is None:
        raise error("segments", "empty", "at least one segment")
    if None not in next_roles[before]:
        expected = f"{_named(next_roles[before])} after it"
        raise error(f"segments[{number}].role", f"{Role(before).label} at the end", expected)
    if not says_something:
        raise error(f"segments[{number}]", "the last turn reduces to nothing", "a response")


def _named(roles: Iterable[Role | None]) -> str:
    return " or ".join("the end" if role is None else role.label for role in roles)
