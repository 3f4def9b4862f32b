"""The numeric check behind every pass: the same token sequences through the graph before and after, in float32.

A captured graph takes one sequence at a time. A step program gets the sequences packed into one ragged batch and in two
chunks, so that a graph which mixes tokens of different sequences, or forgets earlier ones, is found here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .graph import Program

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_BLOCK_SIZE = 4


class Float32Interpreter(fx.Interpreter):
    """Runs a graph of any dtype in float32. A weight is widened only while an op uses it."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "optc" and target._schema.is_mutable:
            return super().call_function(target, args, kwargs)  # a widened copy would be written instead of the cache
        args, kwargs = torch.utils._pytree.tree_map(self._widen, (args, kwargs))
        return super().call_function(target, args, kwargs)

    @staticmethod
    def _widen(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.float() if value.dtype in _LOW_PRECISION else value
        return torch.float32 if isinstance(value, torch.dtype) and value in _LOW_PRECISION else value


@dataclass(frozen=True)
class Probe:
    """Token sequences to compare programs on: each i64[n], with at least two tokens."""

    sequences: tuple[Tensor, ...]

    @classmethod
    def random(cls, vocab_size: int, max_len: int, seed: int = 0) -> Probe:
        generator = torch.Generator().manual_seed(seed)
        lengths = [min(n, max_len) for n in (9, 3, 6)]
        return cls(tuple(torch.randint(0, vocab_size, (n,), generator=generator) for n in lengths))

    @torch.no_grad()
    def logits(self, program: Program) -> list[Tensor]:
        """f32[n, V] for each sequence."""
        names = [spec.name for spec in program.inputs]
        if "block_table" in names:
            return self._paged_logits(program)
        results = []
        for tokens in self.sequences:
            positions = torch.arange(len(tokens))
            caches = self._caches(program, num_blocks=-(-len(tokens) // _BLOCK_SIZE))
            values = {"input_ids": tokens, "positions": positions, "slot_mapping": positions, **caches}
            inputs = [values[spec.name] for spec in program.inputs]
            inputs = [x[None] if len(spec.shape) == 2 else x for x, spec in zip(inputs, program.inputs, strict=True)]
            output = Float32Interpreter(program.module).run(*inputs)[0]
            results.append(output.float().reshape(len(tokens), -1))
        return results

    @staticmethod
    def error(expected: list[Tensor], found: list[Tensor]) -> float:
        """Largest difference over the largest logit; infinite where either is not finite."""
        worst = 0.0
        for a, b in zip(expected, found, strict=True):
            scale = max(a.abs().max().item(), 1e-6)
            difference = (a - b).abs().max().item() / scale if a.shape == b.shape else float("inf")
            worst = max(worst, difference if difference == difference else float("inf"))
        return worst

    def _caches(self, program: Program, num_blocks: int) -> dict[str, Tensor]:
        sizes = {"N": num_blocks, "S": _BLOCK_SIZE}
        specs = [spec for spec in program.inputs if spec.name.startswith("kv_cache.")]
        return {s.name: torch.zeros([sizes[d] if isinstance(d, str) else d for d in s.shape]) for s in specs}

    def _paged_logits(self, program: Program) -> list[Tensor]:
        lengths = [len(s) for s in self.sequences]
        table, num_blocks = _block_table(lengths)
        caches = self._caches(program, num_blocks)
        done = [0] * len(lengths)
        pieces: list[list[Tensor]] = [[] for _ in lengths]
        for share in (0.4, 1.0):
            upto = [max(1, int(n * share)) for n in lengths]
            counts = [end - start for start, end in zip(done, upto, strict=True)]
            logits = self._step(program, table, caches, done, upto)
            for piece, rows in zip(pieces, torch.split(logits, counts), strict=True):
                piece.append(rows)
            done = upto
        return [torch.cat(piece) for piece in pieces]

    def _step(self, program: Program, table: Tensor, caches: dict[str, Tensor], done: list[int], upto: list[int]) -> Tensor:
        positions = torch.cat([torch.arange(start, end) for start, end in zip(done, upto, strict=True)])
        counts = torch.tensor([end - start for start, end in zip(done, upto, strict=True)])
        owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
        slots = table[owner, positions // _BLOCK_SIZE].long() * _BLOCK_SIZE + positions % _BLOCK_SIZE
        starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        tokens = torch.cat([s[a:b] for s, a, b in zip(self.sequences, done, upto, strict=True)])
        values = {
            "input_ids": tokens,
            "positions": positions,
            "slot_mapping": slots,
            "block_table": table,
            "query_start_loc": starts.to(torch.int32),
            "seq_lens": torch.tensor(upto, dtype=torch.int32),
            "logits_indices": torch.arange(len(tokens)),
            **caches,
        }
        inputs = [values[spec.name] for spec in program.inputs]
        output: Tensor = Float32Interpreter(program.module).run(*inputs)[0]
        return output.float().reshape(len(tokens), -1)


def _block_table(lengths: list[int]) -> tuple[Tensor, int]:
    """i32[B, P] of distinct blocks dealt out in turns, so that no sequence's blocks are neighbours."""
    counts = [-(-n // _BLOCK_SIZE) for n in lengths]
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    free = 0
    for column in range(max(counts)):
        for row, count in enumerate(counts):
            if column < count:
                table[row, column] = free
                free += 1
    return table, free
