"""Text in and out: streaming pieces, kinds of tokenizers, chat templates and their sandbox."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from optc.errors import ArtifactError, RequestError
from optc.runtime.manifest import TokenizerRecord
from optc.runtime.tokenizer import Tokenizer

EMOJI = "🎉🚀👩‍👩‍👧🏳️‍🌈é́ñ日本語 ﷽"
TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(EMOJI), max_size=40)
CORPUS = ["the quick brown fox jumps over the lazy dog", "grüße aus münchen", "x = [1, 2, 3]  # code", EMOJI]


def metaspace(decoder: str) -> tokenizers.Tokenizer:
    """A tokenizer as SentencePiece makes them: words begin with `▁`, unknown characters become bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS[:3], trainer)
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    for value in range(256):
        vocabulary[f"<0x{value:02X}>"] = len(vocabulary)
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    if decoder == "llama":
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
    else:
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def make(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tokenizer]:
    """Makes an artifact's tokenizer of a kind, perhaps with a chat template; the kinds are made once."""
    folders: dict[str, Path] = {}

    def make(kind: str = "bytes", template: str | None = None) -> Tokenizer:
        folder = folders.setdefault(kind, tmp_path_factory.mktemp("tokenizer"))
        if not (folder / "tokenizer.json").exists():
            if kind == "bytes":
                (folder / "tokenizer.json").write_bytes((artifact / "tokenizer/tokenizer.json").read_bytes())
            else:
                made = word_piece() if kind == "wordpiece" else metaspace(kind)
                made.save(str(folder / "tokenizer.json"))
        name = None
        if template is not None:
            name = "template.jinja"
            (folder / name).write_text(template, encoding="utf-8")
        return Tokenizer(
            folder, TokenizerRecord(tokenizer="tokenizer.json", chat_template=name, bos_token="<s>", eos_token="</s>")
        )

    return make


def stream(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> list[str]:
    """The pieces of a completion, that of `flush` last."""
    detokenizer = tokenizer.detokenizer(prompt)
    return [*(detokenizer.push(token) for token in output), detokenizer.flush()]


@pytest.mark.parametrize("kind", ["bytes", "llama", "metaspace"])
@given(text=TEXTS, cut=st.floats(0, 1))
def test_pieces_are_whole_characters_and_join_to_the_text(
    kind: str, text: str, cut: float, make: Callable[..., Tokenizer]
) -> None:
    tokenizer = make(kind)
    text = "".join(c for c in text if c != "�")
    ids = tokenizer.encode("a" + text)
    whole = tokenizer.decode(ids)
    at = max(2, round(len(ids) * cut))
    before = tokenizer.decode(ids[:at])
    if before.endswith("�") or not whole.startswith(before):
        return  # the prompt ends inside a character
    pieces = stream(tokenizer, ids[:at], ids[at:])
    assert before + "".join(pieces) == whole
    assert all("�" not in piece for piece in pieces)
    assert pieces[-1] == ""


@pytest.mark.parametrize("kind", ["bytes", "llama", "metaspace", "wordpiece"])
@given(seed=st.integers(0, 2**32), length=st.integers(0, 80), prompt=st.integers(0, 14))
def test_any_tokens_at_all(kind: str, seed: int, length: int, prompt: int, make: Callable[..., Tokenizer]) -> None:
    """A model may say bytes that are no UTF-8, special tokens, anything."""
    tokenizer = make(kind)
    chooser, size = random.Random(seed), tokenizer._tokenizer.get_vocab_size()
    ids = [chooser.randrange(size) for _ in range(prompt + length)]
    pieces = stream(tokenizer, ids[:prompt], ids[prompt:])
    assert len(pieces) == length + 1
    if kind == "bytes":  # elsewhere a wrong byte spoils those before it, which were given out
        before = tokenizer.decode(ids[:prompt]).rstrip("�")
        assert before.rstrip("�") + "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["llama", "metaspace"])
def test_a_character_that_the_prompt_left_unfinished(kind: str, make: Callable[..., Tokenizer]) -> None:
    tokenizer = make(kind)
    ids = tokenizer.encode("a 日日日日日 fox")
    (end,) = (
        i
        for i in range(len(ids))
        if tokenizer.decode(ids[:i]).count("日") == 4 and tokenizer.decode(ids[: i + 1])[-1] == "�"
    )
    assert "".join(stream(tokenizer, ids[: end + 1], ids[end + 1 :])) == "日 fox"


@given(data=st.binary(max_size=60))
def test_every_byte_sequence(data: bytes, make: Callable[..., Tokenizer]) -> None:
    """Bytes one token at a time, valid UTF-8 or not."""
    tokenizer = make("bytes")
    alphabet = dict(zip(_byte_order(), sorted(pre_tokenizers.ByteLevel.alphabet()), strict=True))
    ids = [tokenizer._tokenizer.token_to_id(alphabet[value]) for value in data]
    assert "".join(stream(tokenizer, [], ids)) == data.decode("utf-8", errors="replace")


def _byte_order() -> list[int]:
    """Which byte each character of the sorted byte-level alphabet stands for (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [value for value in range(256) if value not in printable]
    return [*printable, *rest]


@given(text=TEXTS)
def test_byte_level_text_survives(text: str, make: Callable[..., Tokenizer]) -> None:
    tokenizer = make("bytes")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text) == [0, *ids]


def test_special_tokens_are_not_text(make: Callable[..., Tokenizer]) -> None:
    tokenizer = make("bytes")
    hello = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.decode([0, *hello, 1, 2]) == "hello"
    assert stream(tokenizer, [0], [*hello[:2], 1, *hello[2:], 1, 2]) == [
        *stream(tokenizer, [0], hello[:2])[:-1],
        "",
        *(stream(tokenizer, [0, *hello[:2]], hello[2:])[:-1]),
        "",
        "",
        "",
    ]


@pytest.mark.parametrize("kind", ["llama", "metaspace"])
def test_a_completion_that_begins_a_word_begins_with_a_space(kind: str, make: Callable[..., Tokenizer]) -> None:
    tokenizer = make(kind)
    prompt, whole = tokenizer.encode("the quick"), tokenizer.encode("the quick brown fox")
    assert whole[: len(prompt)] == prompt
    assert "".join(stream(tokenizer, prompt, whole[len(prompt) :])) == " brown fox"


def test_an_unfinished_character_is_flushed_as_a_replacement(make: Callable[..., Tokenizer]) -> None:
    tokenizer = make("bytes")
    rare = tokenizer.encode("\U0001f9ff", add_special_tokens=False)
    assert len(rare) > 1
    pieces = stream(tokenizer, [0], [*tokenizer.encode("ab", add_special_tokens=False), *rare[:-1]])
    assert "".join(pieces[:-1]) == "ab"
    assert set(pieces[-1]) == {"�"}


def test_memory_of_a_stream_does_not_grow(make: Callable[..., Tokenizer]) -> None:
    """Ten times as many tokens take about ten times as long, not a hundred."""
    import time

    tokenizer = make("bytes")
    ids = tokenizer.encode("the quick brown fox jumps over the lazy dog. " * 1500, add_special_tokens=False)

    def seconds(count: int) -> float:
        started = time.perf_counter()
        stream(tokenizer, [0], ids[:count])
        return time.perf_counter() - started

    seconds(500)
    short, long = min(seconds(1000) for _ in range(3)), seconds(10_000)
    assert long < 30 * short


def test_text_that_is_no_unicode_is_refused(make: Callable[..., Tokenizer]) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        make("bytes").encode("a\ud800b")


def test_unreadable_tokenizer_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nonsense"}}')
    record = TokenizerRecord(tokenizer="tokenizer.json", chat_template=None, bos_token=None, eos_token=None)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path, record)


HELLO = [{"role": "user", "content": "Hello"}]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    HELLO,
    [
        {"role": "system", "content": "Be <brief> & 'kind'."},
        *HELLO,
        {"role": "assistant", "content": "  Hi! 🎉 \n"},
        *HELLO,
    ],
    [{"role": "user", "content": [{"type": "text", "text": "in parts"}]}],
]
TEMPLATES = {
    "loops": "{% for m in messages %}{% if loop.first and m.role == 'system' %}{% continue %}{% endif %}"
    "[{{ loop.index0 }}|{{ m['role'] }}] {{ m.content if m.content is string else m.content[0].text }}{{ eos_token }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "json": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{{ m | tojson(sort_keys=true) }}"
    "{{ m | tojson(separators=(',', ':')) }}{{ m | tojson(ensure_ascii=true) }}{% endfor %}",
    "tools": "{% if tools is not none %}{{ tools | tojson }}{% else %}no tools{% endif %}"
    "{% if documents is not none %}documents{% endif %}{{ messages | length }}",
    "defined": "{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}{{ date_string is defined }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "blanks": "  {% for m in messages %}\n    {% set role = m.role %}\n{{ role }}\n  {%- endfor %}\n\n{{ bos_token }}\n",
    "namespace": "{% set ns = namespace(count=0) %}{% for m in messages %}{% set ns.count = ns.count + 1 %}{% endfor %}"
    "{{ ns.count }}{% if add_generation_prompt %}<assistant>{% endif %}",
    "macro": "{% macro show(m) %}{{ m.role | upper }}{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
    "date": "{{ strftime_now('%Y') }}{{ dict(a=1)['a'] }}{{ range(3) | list }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_render_as_in_transformers(
    name: str, prompt: bool, make: Callable[..., Tokenizer], checkpoint: Path
) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(checkpoint), make("bytes", TEMPLATES[name])
    for messages in CONVERSATIONS:
        expected = theirs.apply_chat_template(
            messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompt
        )
        assert ours.render_chat(messages, add_generation_prompt=prompt) == expected


def test_the_checkpoints_own_template(make: Callable[..., Tokenizer], checkpoint: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(checkpoint)
    ours = make("bytes", (checkpoint / "chat_template.jinja").read_text(encoding="utf-8"))
    for messages in CONVERSATIONS[:2]:
        text = ours.render_chat(messages)
        assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        expected = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
        assert ours.encode(text, add_special_tokens=False) == expected


def test_tools_reach_the_template(make: Callable[..., Tokenizer]) -> None:
    assert make("bytes", TEMPLATES["tools"]).render_chat(HELLO, tools=[{"name": "add"}]) == '[{"name": "add"}]1'


REFUSING = {
    "raises": ("{{ raise_exception('only two roles') }}", "only two roles"),
    "no syntax": ("{% for %}", "template"),
    "undefined": ("{{ messages[0].nothing.more }}", "nothing"),
    "missing filter": ("{{ messages | no_such_filter }}", "no_such_filter"),
    "wrong type": ("{{ messages + 1 }}", "template"),
    "zero": ("{{ 1 / 0 }}", "zero"),
    "index": ("{{ 'abc'.index('d') }}", "template"),
    "endless recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "huge range": ("{% for i in range(10 ** 9) %}{% endfor %}", "range"),
    "class": ("{{ ().__class__.__mro__ }}", "unsafe|access"),
    "subclasses": ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe|access"),
    "attribute filter": ("{{ ''|attr('__class__')|attr('__mro__')|attr('x') }}", "undefined"),
    "function globals": ("{{ strftime_now.__globals__['os'] }}", "unsafe|access"),
    "cycler": ("{{ cycler.__init__.__globals__ }}", "unsafe|access"),
    "self": ("{{ self.__init__.__globals__ }}", "unsafe|access"),
    "append": ("{{ messages.append(1) }}", "unsafe|safely"),
    "update": ("{{ messages[0].update({'a': 1}) }}", "unsafe|safely"),
    "include": ("{% include 'x' %}", "template"),
}


@pytest.mark.parametrize("case", REFUSING)
def test_templates_that_fail_or_misbehave(case: str, make: Callable[..., Tokenizer]) -> None:
    template, said = REFUSING[case]
    messages = [{"role": "user", "content": "Hello"}]
    with pytest.raises(RequestError, match=rf"(?i){said}"):
        make("bytes", template).render_chat(messages)
    assert messages == HELLO


@pytest.mark.parametrize(
    "template", ["{{ '{0.__class__}'.format(1) }}", "{{ raise_exception.__globals__ }}", "{{ ''|attr('__class__') }}"]
)
def test_what_the_sandbox_hides_is_empty(template: str, make: Callable[..., Tokenizer]) -> None:
    assert make("bytes", template).render_chat(HELLO) == ""


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        5,
        "Hello",
        ["Hello"],
        [{}],
        [{"content": "x"}],
        [{"role": 1, "content": "x"}],
        [{"role": None}],
        [HELLO[0], 3],
        {"role": "user", "content": "x"},
        [{"role": "user", "content": object()}],
        [{"role": "user", "content": {1, 2}}],
    ],
    ids=lambda messages: str(messages).partition(" at 0x")[0],
)
def test_malformed_messages(messages: Any, make: Callable[..., Tokenizer]) -> None:
    with pytest.raises(RequestError, match="messages"):
        make("bytes", "{{ messages[0].content }}").render_chat(messages)


def test_no_chat_template(make: Callable[..., Tokenizer]) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        make("bytes").render_chat(HELLO)
