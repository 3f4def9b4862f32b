"""Complete a file of prompts, as fast as the machine can: all of them in one continuously batched run.

    optc compile examples/tiny-llama -o build/tiny.optc
    python examples/batch_offline.py build/tiny.optc prompts.txt -o answers.jsonl

Each line of the input is a prompt; each line of the output is JSON, with the prompt, the completion, why it ended and the
log-probability of the completion.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from optc import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("answers.jsonl"))
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()

    prompts = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    params = SamplingParams(max_tokens=args.max_tokens, temperature=0.7, top_p=0.95, seed=0, stop=["\n\n"], logprobs=0)
    with LLM(args.artifact) as llm:
        results = llm.generate(prompts, params)
        stats = llm.stats()
    with args.output.open("w", encoding="utf-8") as file:
        for prompt, result in zip(prompts, results, strict=True):
            chosen = [entry[token] for entry, token in zip(result.logprobs or [], result.token_ids, strict=True)]
            record = {
                "prompt": prompt,
                "completion": result.text,
                "finish_reason": result.finish_reason,
                "error": result.error,
                "logprob": sum(chosen),
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    print(
        f"{len(results)} completions, {stats.generated_tokens} tokens, {stats.generated_tokens / stats.step_seconds:.0f} a "
        f"second; {stats.prefix_hit_rate:.0%} of the prompt tokens came from the prefix cache"
    )


if __name__ == "__main__":
    main()
