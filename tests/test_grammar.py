"""Structured output: what comes out matches, what cannot be enforced is refused by name, and nobody can hold it up."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optc.errors import RequestError
from optc.runtime import LLM, StructuredOutput
from optc.runtime import grammar as grammar_module
from optc.runtime.grammar import GrammarCompiler

from .engine_cases import check_empty

VOCAB = 320
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "mail": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "age", "tags", "mail"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm(artifact: Path) -> Iterator[LLM]:
    with LLM(artifact) as llm:
        yield llm


@pytest.fixture(scope="module")
def compiler(llm: LLM) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(llm.artifact.path / "tokenizer/tokenizer.json", vocab_size=VOCAB, end_ids=[1])
    yield compiler
    compiler.close()


def generate(llm: LLM, count: int, structured: StructuredOutput, **options: Any) -> list[str]:
    """Texts that ended by themselves."""
    found: list[str] = []
    for seed in range(0, count, 64):
        (result,) = llm.generate(
            "x", n=min(64, count - seed), seed=seed, temperature=1.0, max_tokens=200, structured=structured, **options
        )
        for completion in result.completions:
            assert completion.finish_reason == "stop", completion
            assert completion.text is not None
            found.append(completion.text)
    check_empty(llm.engine)
    return found


def is_person(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["name", "age", "tags", "mail"]
        and isinstance(value["name"], str)
        and len(value["name"]) <= 12
        and isinstance(value["age"], int)
        and 0 <= value["age"] <= 150
        and set(value["tags"]) <= {"a", "b"}
        and len(value["tags"]) <= 3
        and value["mail"] in (None, True, False)
    )


def test_a_thousand_outputs_match(llm: LLM) -> None:
    """A random model, hot: all that keeps it in form is the grammar."""
    texts = generate(llm, 400, StructuredOutput(json_schema=PERSON))
    assert all(map(is_person, texts)) and len(set(texts)) > 300
    pattern = r"[A-Z]{2}-[0-9]{3,5}(\.[a-f]+x)?"
    texts = generate(llm, 200, StructuredOutput(regex=pattern), logit_bias={1: 5.0})
    assert [text for text in texts if not re.fullmatch(pattern, text)] == []
    choices = ["yes", "no", 'may"be', "später 🎉"]
    assert set(generate(llm, 200, StructuredOutput(choice=choices))) == set(choices)
    lark = 'start: term (("+" | "-") term)~0..4\nterm: NUMBER | "(" start ")"\nNUMBER: /[0-9]{1,3}/'
    for text in generate(llm, 100, StructuredOutput(grammar=lark), logit_bias={1: 8.0}):
        assert isinstance(eval(re.sub(r"\b0+(?=\d)", "", text), {"__builtins__": {}}), int)
    gbnf = 'root ::= item+ "."\nitem ::= "<" [a-c] ">"'
    texts = generate(llm, 100, StructuredOutput(grammar=gbnf))
    assert all(re.fullmatch(r"(<[a-c]>)+\.", text) for text in texts)


def test_greedy_and_company(llm: LLM) -> None:
    """A constrained request takes the likeliest allowed tokens, whatever runs beside it; the others are free."""
    structured = StructuredOutput(regex="(ab|cd)+e")
    (alone,) = llm.generate("x", max_tokens=20, structured=structured)
    (free,) = llm.generate("y", max_tokens=20, ignore_eos=True)
    engine = llm.engine
    from optc.runtime import SamplingParams

    first = engine.add(llm.encode("x"), SamplingParams(max_tokens=20, structured=structured))
    second = engine.add(llm.encode("y"), SamplingParams(max_tokens=20, ignore_eos=True))
    while engine.has_work():
        engine.step()
    assert first.output_token_ids == alone.token_ids and second.output_token_ids == free.token_ids


def test_preemption_keeps_the_grammar(artifact: Path) -> None:
    with LLM(artifact, kv_cache_memory=8 * 8192) as small:
        texts = []
        for result in small.generate(["a", "b", "c", "d"], max_tokens=80, temperature=1.0, seed=1,
                                     structured=StructuredOutput(regex="[a-z]{60}")):  # fmt: skip
            texts.append(result.text)
        assert small.stats().preemptions > 0
    assert all(text is not None and re.fullmatch("[a-z]{60}", text) for text in texts)


@pytest.mark.parametrize(
    ("structured", "said"),
    [
        ({"json_schema": {"type": "stsring"}}, "stsring"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json_schema": {"not": {"type": "string"}}}, "not"),
        ({"json_schema": {"type": "array", "contains": {"type": "string"}}}, "contains"),
        ({"json_schema": {"type": "object", "propertyNames": {"pattern": "a"}}}, "propertyNames"),
        ({"json_schema": {"$ref": "http://example.com/schema"}}, "example.com"),
        ({"json_schema": {"$ref": "#/$defs/absent"}}, "absent|ref"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "json_schema"),
        ({"json_schema": {"type": "string", "pattern": "("}}, "unclosed|regex"),
        ({"regex": "("}, "unclosed"),
        ({"regex": "(?=x)"}, "look-around"),
        ({"grammar": "start: foo"}, "foo"),
        ({"grammar": "not a grammar"}, "grammar"),
        ({"grammar": "root ::= foo"}, "grammar"),
    ],
    ids=str,
)
def test_what_cannot_be_enforced_is_refused(structured: dict[str, Any], said: str, llm: LLM) -> None:
    started = time.monotonic()
    with pytest.raises(RequestError, match=said):
        llm.generate("x", structured=StructuredOutput(**structured))
    assert time.monotonic() - started < 10
    check_empty(llm.engine)


@pytest.mark.parametrize(
    ("structured", "said"),
    [
        ({}, "got none"),
        ({"regex": "a", "choice": ["a"]}, "regex.*choice"),
        ({"json_schema": "{"}, "json_schema: not JSON"),
        ({"json_schema": "[]"}, "json_schema.*an object"),
        ({"json_schema": {"a": {1, 2}}}, "json_schema: not JSON"),
        ({"choice": []}, "choice.*at least one"),
        ({"choice": "abc"}, "choice"),
        ({"choice": [""]}, "choice"),
        ({"regex": ""}, "regex"),
        ({"grammar": 3}, "grammar"),
    ],
    ids=str,
)
def test_malformed_parameters(structured: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        StructuredOutput(**structured)


def test_deep_and_long_schemas(compiler: GrammarCompiler) -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(70):
        deep = {"type": "object", "properties": {"a": deep}}
    with pytest.raises(RequestError, match="levels deep"):
        compiler.matcher(StructuredOutput(json_schema=deep))
    with pytest.raises(RequestError, match="characters"):
        compiler.matcher(StructuredOutput(json_schema={"enum": ["x" * 2**20]}))


@pytest.mark.parametrize("pattern", ["(a+)+b", "a{1,99999}", "((a{1,300}){1,300}){1,300}"])
def test_expensive_patterns_are_quick_or_refused(pattern: str, compiler: GrammarCompiler) -> None:
    started = time.monotonic()
    with contextlib.suppress(RequestError):
        compiler.matcher(StructuredOutput(regex=pattern)).allowed(VOCAB)
    assert time.monotonic() - started < 2 * grammar_module.DEADLINE


def test_masks_are_of_the_models_vocabulary(compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(StructuredOutput(regex="[0-9]"))
    mask = matcher.allowed(VOCAB + 40)
    assert mask.shape == (VOCAB + 40,) and mask.dtype == np.bool_ and not mask[VOCAB:].any()
    assert 0 < mask.sum() <= 10 and not mask[1], "not empty, so it may not end"
    matcher.consume(int(np.flatnonzero(mask)[0]))
    assert matcher.is_complete
    fresh = compiler.matcher(StructuredOutput(regex="[0-9]"))
    assert (fresh.allowed(VOCAB) == mask[:VOCAB]).all(), "each request has a state of its own"
