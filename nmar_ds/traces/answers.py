"""Whether a response is right, where a record says what its answer is."""

from __future__ import annotations


def answered(text: str, *, stopped: bool, reference: str, answer: str | None) -> bool:
    """Whether a response is right.

    A response that was cut off is never right. Without `answer` it must equal the reference, to
    the character. With one, its end, without surrounding white space, must be the answer, and
    the answer must not begin inside a longer word or number: "x = 116", "-16" and "1.16" do not
    end with the answer "16".
    """
    if not stopped:
        return False
    if answer is None:
        return text == reference
    text, answer = text.strip(), answer.strip()
    if not answer or not text.endswith(answer):
        return False
    before = text[: -len(answer)]
    if not before or not (answer[0].isalnum() or answer[0] in "-+."):
        return True
    if before[-1].isalnum() or before[-1] == "_":
        return False
    # A sign or point that is glued to the answer belongs to it, unless it joins two operands
    # ("20-4" ends with the answer "4" no more than "-4" does).
    return not (before[-1] in "-+.," and answer[0].isdigit())
