"""Chat templates: prompts as a pretrained chat model expects them, without transformers (SPEC 2.6).

Only the template's own literal parts may become special tokens. So the template is rendered with
marks in the place of the messages' texts; between the marks stands what the template wrote
itself, and its special tokens are looked for there and nowhere else. A literal `<|im_end|>` in a
message stays text.

For texts without such literals the ids are those of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from nmar_ds.errors import ConfigError, VocabularyError
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.schema import IdArray

if TYPE_CHECKING:
    from nmar_ds.traces.json_vocabulary import JsonVocabulary

# Private-use characters around a number: no template writes them.
_MARK = "\ue0f0{}\ue0f1"
_MARKS = re.compile("\ue0f0(\\d+)\ue0f1")


class TemplateError(Exception):
    """A conversation that the template cannot render so that its parts stay apart."""


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: a tokenizer.json whose folder holds a chat template.
        system: the system message; None leaves it to the template (which may write a default).

    Attributes:
        system: as given.
        fingerprint: sha256 (hex) of the template's source.

    Raises:
        ConfigError: there is no template, or it is no Jinja template.
    """

    def __init__(self, tokenizer: Tokenizer, *, system: str | None = None) -> None:
        self.system = system
        self._tokenizer = tokenizer
        vocabulary, source = _source_of(tokenizer)
        self.fingerprint = hashlib.sha256(source.encode()).hexdigest()
        self._template = _compile(source, vocabulary.path)
        self._variables = vocabulary.named_specials()
        specials = vocabulary.special_texts()
        longest_first = sorted(specials, key=len, reverse=True)
        self._id_of = specials
        self._specials = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self._continues = vocabulary.continues_after_special()
        self._stop = tokenizer.piece(tokenizer.eos_id)

    @property
    def facts(self) -> dict[str, Any]:
        """What has to agree between stores, runs and decoders."""
        return {"system": self.system, "template_sha256": self.fingerprint}

    def prompts(
        self, turns: Sequence[tuple[str, str]], *, system: str | None = None
    ) -> list[IdArray]:
        """Ids of each turn's prompt: everything from the turn before to where the answer begins.

        Args:
            turns: (user's text, assistant's text) of each turn; the last assistant text is not
                looked at. Texts are taken to the letter.
            system: a system message in the place of the template's `system`.

        Returns:
            One int32[n] per turn. The stop token before a later turn's prompt is not in it: it
            belongs to the response before (SPEC 1).

        Raises:
            TemplateError: the template refuses the conversation, changes a message's text, or
                does not close an answer with the tokenizer's stop token.
            VocabularyError: a text the tokenizer cannot give back exactly.
        """
        messages: list[dict[str, str]] = []
        system = self.system if system is None else system
        if system is not None:
            messages.append({"role": "system", "content": system})
        before, prompts = "", []
        for user, assistant in turns:
            messages.append({"role": "user", "content": user})
            marked = self._render(messages, True)
            if not marked.startswith(before):
                raise TemplateError("renders the turns before otherwise once another one follows")
            contents = [message["content"] for message in messages]
            prompts.append(self._encode(marked[len(before) :], contents))
            messages.append({"role": "assistant", "content": assistant})
            before = marked + _MARK.format(len(messages) - 1) + self._stop
            if not self._render(messages, False).startswith(before):
                raise TemplateError(
                    f"does not close an answer with the stop token {self._stop!r}; set eos_token "
                    "in tokenizer_config.json to the token that ends the model's answers"
                )
        return prompts

    def _render(self, messages: list[dict[str, str]], open_answer: bool) -> str:
        """The conversation with marks for its texts, after a check that these are left alone."""
        marked = [{**m, "content": _MARK.format(n)} for n, m in enumerate(messages)]
        text, plain = self._fill(marked, open_answer), self._fill(messages, open_answer)
        if _MARKS.sub(lambda mark: messages[int(mark[1])]["content"], text) != plain:
            raise TemplateError(
                "changes or inspects the text of a message (white space at its end?)"
            )
        return text

    def _fill(self, messages: list[dict[str, str]], open_answer: bool) -> str:
        import jinja2

        try:
            filled: str = self._template.render(
                messages=messages, add_generation_prompt=open_answer, tools=None, documents=None,
                **self._variables,
            )  # fmt: skip
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise TemplateError(f"refuses the conversation: {error}") from None
        return filled

    def _encode(self, marked: str, contents: Sequence[str]) -> IdArray:
        """Special tokens of the literal parts as ids; all text between two of them in one piece."""
        parts: list[str | int] = [""]
        for place, piece in enumerate(_MARKS.split(marked)):
            if place % 2:  # a mark's number
                texts: list[str | int] = [contents[int(piece)]]
            else:
                texts = [self._id_of.get(part, part) for part in self._specials.split(piece)]
            for text in texts:
                if isinstance(text, str) and isinstance(parts[-1], str):
                    parts[-1] += text
                else:
                    parts.append(text)
        ids: list[IdArray] = []
        for number, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(np.array([part], dtype=np.int32))
            elif part:
                continues = number > 0 and self._continues
                encoded = self._tokenizer.encode(part, continuation=continues)
                spelled = self._tokenizer.decode(encoded, continuation=continues)
                if spelled != part:
                    raise VocabularyError(self._tokenizer.difference(part, spelled))
                ids.append(encoded)
        return np.concatenate(ids) if ids else np.empty(0, dtype=np.int32)


def _source_of(tokenizer: Tokenizer) -> tuple[JsonVocabulary, str]:
    from nmar_ds.traces.json_vocabulary import JsonVocabulary  # slow: a library of its own

    if not isinstance(tokenizer, JsonVocabulary):
        raise ConfigError(
            f"data.chat: {tokenizer.path}: a SentencePiece model has no chat template, expected a "
            "folder with tokenizer.json and a chat template; or leave data.chat out"
        )
    source = tokenizer.chat_template()
    if source is None:
        raise ConfigError(
            f"data.chat: {tokenizer.path.parent}: has no chat template, expected "
            "chat_template.jinja or chat_template in tokenizer_config.json; or leave data.chat out"
        )
    return tokenizer, source


def _compile(source: str, path: Path) -> Any:
    """Compile as transformers does: sandboxed, blocks trimmed, loop controls, `generation`."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Marks an answer for transformers' masks; here its body is simply rendered."""

        tags = {"generation"}  # noqa: RUF012 (as the base class has it)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **kwargs: json.dumps(
        value, ensure_ascii=False, indent=kwargs.get("indent")
    )
    # No `strftime_now`: a prompt that holds today's date would make every preparation another.
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ConfigError(f"data.chat: {path.parent}: its chat template: {error}") from None
