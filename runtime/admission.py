"""Who may come in: requests are checked and made here, and those that wait are counted."""

from __future__ import annotations

import numbers
import os
import threading
import time
from collections.abc import Sequence

from ..errors import OverloadedError, RequestError
from .constrain import Constrainer
from .engine_config import EngineConfig
from .kv_cache import KVCacheManager
from .manifest import Manifest
from .params import RequestOptions, SamplingParams
from .request import Request
from .sampler import derived_seed


class Admission:
    """Checks and makes an engine's requests, and counts those that wait. Threads may share it.

    Args:
        manifest, config, kv, constrainer: of the engine.
    """

    def __init__(self, manifest: Manifest, config: EngineConfig, kv: KVCacheManager, constrainer: Constrainer) -> None:
        self._manifest, self._config, self._kv, self._constrainer = manifest, config, kv, constrainer
        self._lock = threading.Lock()  # held for microseconds
        self._waiting: set[Request] = set()

    def make(self, prompt_token_ids: Sequence[int], params: SamplingParams, options: RequestOptions) -> list[Request]:
        """The completions of a prompt as requests without ids; the first computes the prompt, the rest are its forks.

        Raises:
            RequestError: the prompt is empty, holds ids out of range, or can never fit; or a parameter is wrong.
            OverloadedError: the queue is full, or too many grammars wait to be compiled.
        """
        ids = self._checked(prompt_token_ids, params)
        with self._lock:
            self._refuse_if_full(len(ids), params.n)  # before its grammar is compiled
        seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "little") >> 1
        # Forks get a list of their own when they part.
        arrived = time.monotonic()
        first, *forks = group = [
            Request(
                request_id=0,
                prompt_token_ids=ids,
                params=params,
                seed=derived_seed(seed, number),
                token_ids=ids if number else list(ids),
                options=options,
                arrived=arrived,
            )
            for number in range(params.n)
        ]
        self._constrainer.prepare(group)
        first.forks = forks
        for request in group:
            request.group = group
        return group

    def enter(self, request: Request) -> None:
        """`request` waits from now on, with its forks.

        Raises:
            OverloadedError: the queue is full.
        """
        with self._lock:
            self._refuse_if_full(len(request.prompt_token_ids), request.params.n)
            self._waiting.add(request)

    def leave(self, request: Request, heir: Request | None = None) -> None:
        """`request` waits no longer, or `heir` instead of it. Leaving twice does no harm."""
        with self._lock:
            if request in self._waiting:
                if heir is not None:
                    self._waiting.add(heir)
                self._waiting.remove(request)

    def _checked(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> list[int]:
        config, pool = self._config, self._kv.pool
        limit = self._manifest.model.max_model_len
        if not prompt_token_ids:
            raise RequestError("empty prompt: it has no tokens")
        if len(prompt_token_ids) + bool(params.max_tokens) > limit:
            raise RequestError(
                f"the prompt has {len(prompt_token_ids)} tokens; the context length is {limit}, "
                "prompt and completion together"
            )
        ids = self.check_token_ids(prompt_token_ids)
        longest = min(len(ids) + params.max_tokens, limit)
        if self._kv.most_blocks(longest, config.max_num_batched_tokens) > pool.num_blocks:
            held = pool.num_blocks * pool.block_size
            raise RequestError(
                f"the request needs {longest} tokens of KV cache, which holds {held}; raise kv_cache_memory or lower max_tokens"
            )
        if params.n > config.max_num_seqs:
            raise RequestError(f"n={params.n}: expected at most {config.max_num_seqs}, the engine's max_num_seqs")
        return ids

    def check_token_ids(self, ids: Sequence[int]) -> list[int]:
        """The ids as plain integers; those the model does not have are refused.

        Raises:
            RequestError: one is out of range, or not an integer.
        """
        size = self._manifest.model.vocab_size
        if wrong := [t for t in ids if isinstance(t, bool) or not isinstance(t, numbers.Integral) or not 0 <= t < size]:
            raise RequestError(f"token id {wrong[0]!r} in the prompt: expected 0 to {size - 1}")
        return [int(t) for t in ids]

    def _refuse_if_full(self, num_tokens: int, n: int) -> None:
        """An empty queue takes any request."""
        waiting = self._waiting if self._config.max_queued_requests or self._config.max_queued_tokens else ()
        for unit, most, more, there in (
            ("requests", self._config.max_queued_requests, n, sum(1 + len(each.forks) for each in waiting)),
            ("tokens", self._config.max_queued_tokens, num_tokens, sum(len(r.prompt_token_ids) for r in waiting)),
        ):
            if most is not None and waiting and there + more > most:
                raise OverloadedError(
                    f"the queue is full: {there} {unit} wait, {more} more would exceed {most}; try again later"
                )
