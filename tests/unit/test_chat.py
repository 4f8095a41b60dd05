"""Chat templates around prompts, and `<UNDO>` in a reserved token's place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_stores import prepare_store
from tiny_tokenizers import corpus, write_bpe
from tokenizers import decoders, models, normalizers, trainers

from nmar_ds.data.store import Store
from nmar_ds.errors import ConfigError, TraceError, VocabularyError
from nmar_ds.inference.exported import ExportSettings, chat_of
from nmar_ds.inference.generation import encode_prompt
from nmar_ds.traces.chat import ChatTemplate, TemplateError
from nmar_ds.traces.encoding import Tokenizer, add_undo, load_tokenizer
from nmar_ds.traces.records import parse_line
from nmar_ds.traces.schema import Role
from nmar_ds.traces.turns import encode_record

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = CHATML.replace(
    "+ message['content'] + '<|im_end|>' + '\n' }}",
    "}}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
)
TRIMMING = CHATML.replace("message['content'] +", "(message['content'] | trim) +")
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    + CHATML
)
OTHER_STOP = CHATML.replace("+ '<|im_end|>' +", "+ '<|im_start|>' +")
SPECIALS = ["<s>", "<|im_start|>", "<|im_end|>", "<spare>", "<|im"]


def write_chat_folder(folder: Path, template: str = CHATML, *, prefix_space: bool = False) -> Path:
    """A tokenizer folder with a chat template and special tokens, one the start of another."""
    write_bpe(folder, add_prefix_space=prefix_space)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIALS]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {
        "bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>",
        "additional_special_tokens": ["<spare>", "<|im_start|>"], "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    (folder / "chat_template.jinja").write_text(template)
    return folder


def write_metaspace_folder(folder: Path) -> Path:
    """As older Llama and Mistral folders are: a space is put before every stretch of text."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", *SPECIALS, "<pad>"], show_progress=False
    )
    tokenizer.train_from_iterator([*corpus(), "system user assistant Help. Add up.\n"], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {
        "eos_token": "<|im_end|>",
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("chat")
    return add_undo(write_chat_folder(folder / "plain"), folder / "undo", reserved="<spare>")


def expected_ids(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """What plain transformers makes of a conversation."""
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer.path.parent)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert all(isinstance(token, int) for token in ids)
    return list(ids)


def conversation(turns: list[tuple[str, str]], system: str | None) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for user, assistant in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return messages[:-1]


@pytest.mark.parametrize("system", [None, "Add up."])
@pytest.mark.parametrize("folder", ["bytes", "bytes-with-space", "metaspace", "generation"])
def test_the_ids_are_those_of_transformers(folder: str, system: str | None, tmp_path: Path) -> None:
    plain = {
        "bytes": lambda: write_chat_folder(tmp_path / "p"),
        "bytes-with-space": lambda: write_chat_folder(tmp_path / "p", prefix_space=True),
        "metaspace": lambda: write_metaspace_folder(tmp_path / "p"),
        "generation": lambda: write_chat_folder(tmp_path / "p", GENERATION),
    }[folder]()
    tokenizer = add_undo(plain, tmp_path / "undo")
    turns = [("12 + 7 =", "19 so"), ("the answer is one", "yes")]
    chat = ChatTemplate(tokenizer, system=system)
    first, second = chat.prompts(turns)
    assert first.tolist() == expected_ids(tokenizer, conversation(turns[:1], system))
    answer = tokenizer.encode(turns[0][1], continuation=True)
    whole = [*first.tolist(), *answer.tolist(), tokenizer.eos_id, *second.tolist()]
    if folder != "bytes-with-space":  # there the joint of prompt and answer has a space of its own
        assert whole == expected_ids(tokenizer, conversation(turns, system))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    turns=st.lists(
        st.tuples(*[st.lists(st.sampled_from([*SPECIALS, "<UNDO>", "a", " ", "\n", "im_end|>", "<|", "7", "日"]), min_size=1).map("".join)] * 2),
        min_size=1, max_size=3,
    ),
    system=st.sampled_from([None, "x", "<|im_end|>"]),
)  # fmt: skip
def test_only_the_template_itself_makes_special_tokens(
    chat_tokenizer: Tokenizer, turns: list[tuple[str, str]], system: str | None
) -> None:
    prompts = ChatTemplate(chat_tokenizer, system=system).prompts(turns)
    start, stop = chat_tokenizer.special_texts()["<|im_start|>"], chat_tokenizer.eos_id  # type: ignore[attr-defined]
    spelled = ""
    for number, ids in enumerate(prompts):
        specials = [token for token in ids.tolist() if chat_tokenizer.is_special[token]]
        assert specials == ([start, stop] if number == 0 else []) + [start, stop, start]
        spelled += chat_tokenizer.decode(ids, continuation=True) + turns[number][1]
    texts = "".join(f"user\n{user}\nassistant\n{answer}\n" for user, answer in turns)
    assert spelled + "\n" == f"system\n{'Help.' if system is None else system}\n{texts}"


@pytest.mark.parametrize("own", [None, "Add up."])
def test_messages_are_the_conversation_transformers_would_render(
    own: str | None, chat_tokenizer: Tokenizer
) -> None:
    turns = [("1+2?", "3"), ("and 4?", "7 in all")]
    messages = [*conversation(turns, own), {"role": "assistant", "content": turns[-1][1]}]
    record = parse_line(json.dumps({"messages": messages}).encode(), path="f", line=1)
    chat = ChatTemplate(chat_tokenizer, system="Help.")
    encoded = encode_record(record, chat_tokenizer, chat).turns
    said = [i for t in encoded for part in (t.prompt_ids, t.reference_ids) for i in part.tolist()]
    # A system message of its own takes the place of the configured one.
    expected = expected_ids(chat_tokenizer, conversation(turns, own or "Help."))
    answer = chat_tokenizer.encode("7 in all", continuation=True).tolist()
    assert said == [*expected, *answer, chat_tokenizer.eos_id]
    with pytest.raises(TraceError, match="messages: no chat template is put around them"):
        encode_record(record, chat_tokenizer)


def test_a_record_gets_the_template_and_keeps_its_response(chat_tokenizer: Tokenizer) -> None:
    fields = {"prompt": "1+2?", "reference": " 3, so.", "deviations": [{"at": 1, "text": "4"}]}
    record = parse_line(json.dumps(fields).encode(), path="r.jsonl", line=4)
    chat = ChatTemplate(chat_tokenizer)
    plain, chatty = (
        encode_record(record, chat_tokenizer),
        encode_record(record, chat_tokenizer, chat),
    )
    assert chatty.turns[0].prompt_ids.tolist() == chat.prompts([("1+2?", "")])[0].tolist()
    assert chatty.turns[0].reference_ids.tolist() == plain.turns[0].reference_ids.tolist()
    assert chatty.turns[0].deviations[0].ids.tolist() == plain.turns[0].deviations[0].ids.tolist()
    assert (
        encode_prompt("1+2?", chat_tokenizer, chat).tolist() == chatty.turns[0].prompt_ids.tolist()
    )


def test_a_store_of_two_turns(
    chat_tokenizer: Tokenizer, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    source = write_jsonl([{"segments": [
        {"role": "prompt", "text": "1+2?"}, {"role": "prefix", "text": " 3."},
        {"role": "prompt", "text": "and?"}, {"role": "deviation", "text": "5"}, {"role": "correction", "text": "4"},
    ]}])  # fmt: skip
    chat = ChatTemplate(chat_tokenizer, system="Add.")
    manifest = prepare_store(
        [source], tmp_path / "s", chat_tokenizer, builder="given", max_length=99, chat=chat
    )
    assert manifest["builder"]["chat"] == {"system": "Add.", "template_sha256": chat.fingerprint}
    store = Store(tmp_path / "s")
    segments = list(store.trace(0).segments())
    assert [s.role.label for s in segments] == [
        "prompt",
        "prefix",
        "prompt",
        "deviation",
        "undo",
        "correction",
    ]
    assert segments[1].ids[-1] == chat_tokenizer.eos_id  # the stop token is the response's
    assert chat_tokenizer.decode(segments[2].ids, continuation=True) == "\nuser\nand?\nassistant\n"
    # The store's own copy of the tokenizer brings the template along.
    assert ChatTemplate(store.tokenizer(), system="Add.").facts == chat.facts
    assert (store.roles(0)[segments[2].start :] != Role.PREFIX).all()


@pytest.mark.parametrize(
    ("template", "system", "turns", "message"),
    [
        (TRIMMING, None, [(" 1+2?", "3")], "changes or inspects the text"),
        (NO_SYSTEM, "x", [("1", "2")], "refuses the conversation: no system here"),
        (OTHER_STOP, None, [("1", "2")], "does not close an answer with the stop token '<|im_end|>'"),
        ("{{ messages[0].nothing.nothing }}", None, [("1", "2")], "refuses the conversation"),
    ],
)  # fmt: skip
def test_conversations_a_template_cannot_keep_apart_are_refused(
    template: str, system: str | None, turns: list[tuple[str, str]], message: str, tmp_path: Path
) -> None:
    tokenizer = add_undo(write_chat_folder(tmp_path / "p", template), tmp_path / "undo")
    chat = ChatTemplate(tokenizer, system=system)
    with pytest.raises(TemplateError) as caught:
        chat.prompts(turns)
    assert message in str(caught.value)
    user, reference = turns[0]
    record = parse_line(
        json.dumps({"prompt": user, "reference": reference}).encode(), path="r.jsonl", line=4
    )
    with pytest.raises(TraceError, match=r"^r\.jsonl:4: prompt: the chat template "):
        encode_record(record, tokenizer, chat)


def test_an_empty_prompt_is_refused(chat_tokenizer: Tokenizer) -> None:
    record = parse_line(b'{"reference": "3"}', path="r.jsonl", line=2)
    with pytest.raises(TraceError, match=r"^r\.jsonl:2: prompt: empty, but a chat template"):
        encode_record(record, chat_tokenizer, ChatTemplate(chat_tokenizer))
    with pytest.raises(ConfigError, match="prompt: empty"):
        encode_prompt("", chat_tokenizer, ChatTemplate(chat_tokenizer))


def test_no_template_is_an_error(
    sp_tokenizer: Tokenizer, bpe_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for tokenizer in (sp_tokenizer, bpe_tokenizer):
        with pytest.raises(ConfigError, match=r"data\.chat: .* has no chat template"):
            ChatTemplate(tokenizer)
    folder = write_chat_folder(tmp_path / "p", "{% for %}")
    with pytest.raises(ConfigError, match=r"data\.chat: .*its chat template"):
        ChatTemplate(add_undo(folder, tmp_path / "undo"))


def test_an_export_with_another_template_is_refused(
    chat_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    chat = ChatTemplate(chat_tokenizer)
    facts = dict(
        undo_id=chat_tokenizer.undo_id, undo_token="<UNDO>", semantics="token", context="linear",
        eos_id=chat_tokenizer.eos_id, bos_id=None, pad_id=None, tokenizer_fingerprint="f",
    )  # fmt: skip
    assert chat_of(ExportSettings(**facts), chat_tokenizer) is None  # type: ignore[arg-type]
    found = chat_of(ExportSettings(**facts, chat=chat.facts), chat_tokenizer)  # type: ignore[arg-type]
    assert found is not None and found.facts == chat.facts
    chat_tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML.replace("Help.", "Obey."))
    with pytest.raises(VocabularyError, match="not the one the model was trained"):
        chat_of(ExportSettings(**facts, chat=chat.facts), load_tokenizer(tmp_path))  # type: ignore[arg-type]


def test_undo_takes_a_reserved_tokens_place(tmp_path: Path) -> None:
    plain = write_chat_folder(tmp_path / "plain")
    before = tokenizers.Tokenizer.from_file(str(plain / "tokenizer.json")).get_vocab()
    tokenizer = add_undo(plain, tmp_path / "undo", reserved="<spare>")
    assert tokenizer.undo_id == before["<spare>"] and tokenizer.size == len(before)
    after = {tokenizer.piece(n): n for n in range(tokenizer.size)}
    assert after == {("<UNDO>" if piece == "<spare>" else piece): n for piece, n in before.items()}
    for text in ("<UNDO>", "<spare>"):
        assert not tokenizer.is_special[tokenizer.encode(text, continuation=True)].any()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "undo")
    assert theirs.convert_tokens_to_ids("<UNDO>") == tokenizer.undo_id
    assert len(theirs) == tokenizer.size  # the old text was not added again
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "undo")
    again.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").undo_id == tokenizer.undo_id


@pytest.mark.parametrize("name", ["<|im_start|>", "<|im_end|>", "<pad>", "<s>", "the", "<nothing>"])
def test_a_token_in_use_is_not_taken(name: str, tmp_path: Path) -> None:
    plain = write_chat_folder(tmp_path / "plain")
    with pytest.raises(
        VocabularyError, match=r"undo\.reserved_token: .*no special token to spare"
    ) as caught:
        add_undo(plain, tmp_path / "undo", reserved=name)
    assert "'<spare>'" in str(caught.value)
    assert not (tmp_path / "undo").exists()


def test_templates_in_the_settings_are_found(tmp_path: Path) -> None:
    plain = write_chat_folder(tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    facts = json.loads((plain / "tokenizer_config.json").read_text())
    for template in (
        CHATML,
        [{"name": "tool", "template": "x"}, {"name": "default", "template": CHATML}],
    ):
        (plain / "tokenizer_config.json").write_text(
            json.dumps({**facts, "chat_template": template})
        )
        (ids,) = ChatTemplate(add_undo(plain, tmp_path / "undo")).prompts([("1", "2")])
        assert isinstance(ids, np.ndarray) and ids.dtype == np.int32 and len(ids) > 9
