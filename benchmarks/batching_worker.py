"""Workers of `benchmarks/batching.py`: an engine that completes a list of requests as fast as it can, greedy.

python batching_worker.py optc ARTIFACT            in optc's environment
python batching_worker.py openvino FOLDER          in that of the peers

A workload is `prompts`, token ids, and `counts`, how many tokens to generate for each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from cpu_worker import serve

THREADS = int(os.environ.get("BENCH_THREADS", "2"))


class Optc:
    """Continuous batching by the engine; and static batching by the same engine and kernels."""

    def __init__(self, path: Path) -> None:
        from optc.runtime import LLM

        self._llm = LLM(path)
        self._engine = self._llm.engine

    def details(self) -> dict[str, Any]:
        return {"versions": {name: version(name) for name in ("optc", "torch")}}

    def continuous(self, prompts: list[list[int]], counts: list[int]) -> dict[str, Any]:
        """All requests at once; beside the time, how the engine spent it."""
        engine, before = self._engine, self._llm.stats()
        engine.reset_prefix_cache()
        wastes = []
        started = time.perf_counter()
        requests = [self._add(*pair) for pair in zip(prompts, counts, strict=True)]
        while engine.has_work():
            engine.step()
            wasted, slots = engine.kv.num_wasted_slots(engine.scheduler.running)
            wastes += [wasted / slots] if slots else []
        seconds = time.perf_counter() - started
        if [request.num_output_tokens for request in requests] != counts:
            raise RuntimeError("not all tokens came")
        after = self._llm.stats()
        inside = (after.model_seconds - before.model_seconds) / (after.step_seconds - before.step_seconds)
        return {"seconds": seconds, "kv_waste": statistics.fmean(wastes), "engine_overhead": 1 - inside}

    def static(self, prompts: list[list[int]], counts: list[int], batch: int) -> dict[str, Any]:
        """Groups of `batch` requests, prompts padded to the group's longest, which decodes until its last is done."""
        engine = self._engine
        engine.reset_prefix_cache()
        numbers = np.random.default_rng(1)
        started = time.perf_counter()
        for first in range(0, len(prompts), batch):
            group, longest = prompts[first : first + batch], max(counts[first : first + batch])
            width = max(map(len, group))
            for prompt in group:
                padding = numbers.integers(2, 1000, width - len(prompt)).tolist()
                self._add([*padding, *prompt], longest)
            while engine.has_work():
                engine.step()
        return {"seconds": time.perf_counter() - started}

    def few_shot(self, prompts: list[list[int]], counts: list[int]) -> dict[str, Any]:
        """All requests at once: which share of the prompt tokens was found, and which could have been, in whole blocks.

        A block can be found if an earlier prompt begins with the same tokens up to its end.
        """
        engine, size, before = self._engine, self._engine.pool.block_size, self._llm.stats()
        engine.reset_prefix_cache()
        seen: set[tuple[int, ...]] = set()
        most = 0
        for prompt in prompts:
            known = [at for at in range(size, len(prompt), size) if tuple(prompt[:at]) in seen]
            most += max(known, default=0)
            seen |= {tuple(prompt[:at]) for at in range(size, len(prompt) + 1, size)}
        started = time.perf_counter()
        for pair in zip(prompts, counts, strict=True):
            self._add(*pair)
        while engine.has_work():
            engine.step()
        seconds = time.perf_counter() - started
        hits = self._llm.stats().prefix_hit_tokens - before.prefix_hit_tokens
        total = sum(map(len, prompts))
        return {"seconds": seconds, "hit_rate": hits / total, "block_maximum": most / total}

    def _add(self, prompt: list[int], count: int) -> Any:
        from optc.runtime import SamplingParams

        return self._engine.add(prompt, SamplingParams(max_tokens=count, ignore_eos=True))


class OpenVino:
    """OpenVINO GenAI's ContinuousBatchingPipeline."""

    def __init__(self, path: Path) -> None:
        import openvino
        import openvino_genai

        self._openvino, self._genai, self._path = openvino, openvino_genai, path
        self._pipelines: dict[int, Any] = {}
        self._count = 0

    def details(self) -> dict[str, Any]:
        return {"versions": {name: version(name) for name in ("openvino", "openvino-genai")}}

    def continuous(self, prompts: list[list[int]], counts: list[int], budget: int) -> dict[str, Any]:
        """All requests at once, with at most `budget` tokens in a step."""
        if budget not in self._pipelines:
            scheduler = self._genai.SchedulerConfig()
            scheduler.max_num_batched_tokens, scheduler.max_num_seqs = budget, 256
            scheduler.enable_prefix_caching = False  # prompts never repeat
            options = {"INFERENCE_NUM_THREADS": THREADS}
            self._pipelines = {budget: self._genai.ContinuousBatchingPipeline(self._path, scheduler, "CPU", options)}
        pipeline = self._pipelines[budget]
        started = time.perf_counter()
        handles = []
        for prompt, count in zip(prompts, counts, strict=True):
            config = self._genai.GenerationConfig()
            config.max_new_tokens = config.min_new_tokens = count
            config.ignore_eos, config.do_sample = True, False
            ids = self._openvino.Tensor(np.array([prompt], np.int64))
            handles.append(pipeline.add_request(self._count, ids, config))
            self._count += 1
        while pipeline.has_non_finished_requests():
            pipeline.step()
        seconds = time.perf_counter() - started
        if [len(handle.read_all()[0].generated_ids) for handle in handles] != counts:
            raise RuntimeError("not all tokens came")
        return {"seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("engine", choices=["optc", "openvino"])
    parser.add_argument("path", type=Path)
    args = parser.parse_args()
    engine = Optc(args.path) if args.engine == "optc" else OpenVino(args.path)
    serve(engine, engine)


if __name__ == "__main__":
    main()
