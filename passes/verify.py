"""The numeric check behind every pass: the same token sequences through the graph before and after, in float32.

A captured graph takes one sequence at a time. A step program gets the sequences packed into one ragged batch and in two
chunks, so that a graph which mixes tokens of different sequences, or forgets earlier ones, is found here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from ..runtime.manifest import TensorSpec
from ..runtime.ops.attention import LARGEST_CODE
from .graph import Program, get_weight

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_BLOCK_SIZE = 4
_NOTHING: Mapping[str, Tensor] = MappingProxyType({})


def run_float32(
    module: fx.GraphModule, runs: Sequence[Sequence[Tensor]], replaced: Mapping[str, Tensor] = _NOTHING
) -> list[Tensor]:
    """The first output of a graph of any dtype, computed in float32, for each list of inputs.

    Ops that round activations take them as they are: rounding them would turn the last bit of a
    sum into a whole step, and the check could not tell a wrong graph from another order of additions. `replaced` are
    weights to compute with in place of those of the same name.

    The runs go through the graph side by side, node by node, so that a weight is widened once for all of them and only
    while an op uses it. A later run may depend on what an earlier one wrote into a cache, as two chunks of a prompt do.
    """
    environments: list[dict[fx.Node, Any]] = [{} for _ in runs]
    inputs = [iter(run) for run in runs]
    last_use = {used: node for node in module.graph.nodes for used in node.all_input_nodes}
    for node in module.graph.nodes:
        if node.op == "output":
            break
        weights = {
            used: widen(replaced[used.target] if used.target in replaced else get_weight(module, used.target))
            for used in node.all_input_nodes
            if used.op == "get_attr"
        }
        for environment, given in zip(environments, inputs, strict=True):
            if node.op == "placeholder":
                environment[node] = next(given)
            elif node.op == "call_function":
                known = {**environment, **weights} if weights else environment
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
                if rounds_activations(node.target):
                    args = (*args[:-1], "none")
                environment[node] = node.target(*float32_arguments(args), **float32_arguments(kwargs))
            for used in node.all_input_nodes:
                if last_use[used] is node:
                    environment.pop(used, None)
    result = module.graph.output_node().args[0][0]  # type: ignore[index]
    return [environment[result].float() for environment in environments]  # type: ignore[index]


def rounds_activations(target: Any) -> bool:
    """Whether an op rounds activations as its last argument says, such as `int8-token`; none says that it does not."""
    return (
        isinstance(target, torch._ops.OpOverload)
        and target._schema.arguments[-1:] != []
        and (target._schema.arguments[-1].name == "activation")
    )


def widen(value: Tensor) -> Tensor:
    return value.float() if value.dtype in _LOW_PRECISION else value


def float32_arguments(arguments: Any) -> Any:
    """The same arguments, with float32 where an op is told to make a narrower dtype."""
    return tree_map(lambda x: torch.float32 if isinstance(x, torch.dtype) and x in _LOW_PRECISION else x, arguments)


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
    def logits(self, program: Program, replaced: Mapping[str, Tensor] = _NOTHING) -> list[Tensor]:
        """f32[n, V] for each sequence, computed with the weights `replaced` in place of those of the same name."""
        names = [spec.name for spec in program.inputs]
        if "block_table" in names:
            return self._paged_logits(program, replaced)
        runs = [self._whole_sequence(program, tokens) for tokens in self.sequences]
        results = run_float32(program.module, runs, replaced)
        return [rows.reshape(len(tokens), -1) for rows, tokens in zip(results, self.sequences, strict=True)]

    def _whole_sequence(self, program: Program, tokens: Tensor) -> list[Tensor]:
        positions = torch.arange(len(tokens))
        caches = self._caches(program, num_blocks=-(-len(tokens) // _BLOCK_SIZE))
        values = {"input_ids": tokens, "positions": positions, "slot_mapping": positions, **caches}
        return [values[s.name][None] if s.shape[0] == 1 else values[s.name] for s in program.inputs]

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
        return {
            s.name: torch.zeros([sizes[d] if isinstance(d, str) else d for d in s.shape], dtype=_cache_dtype(s))
            for s in specs
        }

    def _paged_logits(self, program: Program, replaced: Mapping[str, Tensor]) -> list[Tensor]:
        lengths = [len(s) for s in self.sequences]
        table, num_blocks = _block_table(lengths)
        caches = self._caches(program, num_blocks)
        half = [max(1, int(n * 0.4)) for n in lengths]
        spans = [([0] * len(lengths), half), (half, lengths)]
        runs = [self._step_inputs(program, table, caches, start, end) for start, end in spans]
        chunks = run_float32(program.module, runs, replaced)
        pieces = [
            rows.reshape(sum(end) - sum(start), -1).split([e - s for s, e in zip(start, end, strict=True)])
            for rows, (start, end) in zip(chunks, spans, strict=True)
        ]
        return [torch.cat(parts) for parts in zip(*pieces, strict=True)]

    def _step_inputs(
        self, program: Program, table: Tensor, caches: dict[str, Tensor], start: list[int], end: list[int]
    ) -> list[Tensor]:
        """Inputs of the step that computes tokens start .. end of every sequence."""
        positions = torch.cat([torch.arange(a, b) for a, b in zip(start, end, strict=True)])
        counts = torch.tensor(end) - torch.tensor(start)
        owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
        tokens = torch.cat([s[a:b] for s, a, b in zip(self.sequences, start, end, strict=True)])
        values = {
            "input_ids": tokens,
            "positions": positions,
            "slot_mapping": table[owner, positions // _BLOCK_SIZE].long() * _BLOCK_SIZE + positions % _BLOCK_SIZE,
            "block_table": table,
            "query_start_loc": torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).to(torch.int32),
            "seq_lens": torch.tensor(end, dtype=torch.int32),
            "logits_indices": torch.arange(len(tokens)),
            **caches,
        }
        return [values[spec.name] for spec in program.inputs]


def _cache_dtype(spec: TensorSpec) -> torch.dtype:
    """Float32 like the keys and values of the check; a quantized cache keeps its dtype."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype if dtype in LARGEST_CODE else torch.float32


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
