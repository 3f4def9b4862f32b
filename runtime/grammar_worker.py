"""Compiles grammars in a process of its own, which can be killed when one takes too long. Run by `grammar_process.py`.

Reads a JSON object a line, {"kind": ..., "text": ...}, and answers with {"error": ...}, null if the grammar can be used.
Imports nothing of optc, so that it starts at once.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import llguidance

_MEMORY = 4 * 2**30


def grammar_of(kind: str, text: str) -> str:
    """A structured output in the form that llguidance takes.

    Raises:
        ValueError: it is none.
    """
    if kind == "json_schema":
        # Spaces as json.dumps writes them, and no others: a model could go on with spaces for ever.
        strict: Any = {
            "lenient": False,
            "whitespace_flexible": False,
            "item_separator": ", ",
            "key_separator": ": ",
        }
        return llguidance.LLMatcher.grammar_from_json_schema(text, overrides=strict)
    if kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(text)
    if kind == "choice":
        choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
        return llguidance.LLMatcher.grammar_from_lark(f"start: {choices}")
    if "::=" in text:
        from llguidance.gbnf_to_lark import gbnf_to_lark

        text = gbnf_to_lark(text)
    return llguidance.LLMatcher.grammar_from_lark(text)


def check(tokenizer: llguidance.LLTokenizer, kind: str, text: str) -> str | None:
    """Why a grammar cannot be used; None if it can. Its first mask is computed too, which takes most of the time."""
    try:
        matcher = llguidance.LLMatcher(tokenizer, grammar_of(kind, text), log_level=0)
    except Exception as error:
        return f"{error}" or type(error).__name__
    if not matcher.is_error():
        matcher.compute_bitmask()
    return str(matcher.get_error()) if matcher.is_error() else None


def main() -> None:
    """Answer until standard input ends. Arguments: tokenizer file, vocabulary size, end token ids."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    file, vocab_size, *ends = sys.argv[1:]
    tokenizer = make_tokenizer(file, int(vocab_size), [int(end) for end in ends])
    print(json.dumps({"error": None}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps({"error": check(tokenizer, request["kind"], request["text"])}), flush=True)


def make_tokenizer(file: str, vocab_size: int, ends: list[int]) -> llguidance.LLTokenizer:
    """A tokenizer.json as the tokenizer of llguidance."""
    return llguidance.LLTokenizer(file, n_vocab=vocab_size, eos_token=ends or None)


if __name__ == "__main__":
    main()
