"""Write a pass of your own: one file, one test, one line in `optimizer/pipeline.py`.

    python examples/write_a_pass.py

The pass here merges two activations that a graph computes from the same input: `silu(x)` twice becomes once. The runner
does the rest: dead code, shapes, the count, and the numeric check against the graph before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from optc.errors import PassError, VerificationError
from optc.optimizer.capture import capture_module
from optc.passes.base import Pass, Result, run_passes
from optc.passes.canonicalize import Canonicalize
from optc.passes.graph import Program
from optc.passes.verify import Probe

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class MergeSilu(Pass):
    """a = silu(x); b = silu(x)  ->  a = silu(x); b = a"""

    def apply(self, program: Program) -> Result:
        """Rewrite, and say for every candidate that was left alone why."""
        result = Result()
        first: dict[fx.Node, fx.Node] = {}
        for node in program.graph.find_nodes(op="call_function", target=aten.silu.default):
            kept = first.setdefault(node.args[0], node)
            if kept is node:
                result.decline(node, "the first silu of its input")
            else:
                node.replace_all_uses_with(kept)
                result.matches += 1
        return result


@dataclass(frozen=True, kw_only=True)
class DropSilu(Pass):
    """silu(x)  ->  x: wrong on purpose, to see the runner catch it."""

    def apply(self, program: Program) -> Result:
        """Rewrite every silu."""
        result = Result()
        for node in program.graph.find_nodes(op="call_function", target=aten.silu.default):
            node.replace_all_uses_with(node.args[0])
            result.matches += 1
        return result

    def expected_matches(self, program: Program) -> int:
        """Every silu there is: zero where some were expected is an error, never silence."""
        return len(program.graph.find_nodes(op="call_function", target=aten.silu.default))


class TinyModel(nn.Module):
    """One attention layer and a gated MLP that computes its activation twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(64, 32), nn.Embedding(128, 32)
        self.qkv, self.up, self.head = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 64)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """input_ids, positions i64[1, T] -> logits [1, T, 64]."""
        x = self.embed(input_ids) + self.positions(positions)
        q, k, v = (part.view(1, -1, 2, 16).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        return self.head(F.silu(x) * self.up(F.silu(x)))


def main() -> None:
    """Run both passes on a small module."""
    torch.manual_seed(0)
    example = (torch.arange(7)[None], torch.arange(7)[None])
    program = capture_module(TinyModel(), example, max_model_len=128)
    probe = Probe.random(vocab_size=64, max_len=128)
    for record in run_passes(program, [Canonicalize(), MergeSilu()], probe=probe):
        print(
            f"{record.name}: {record.matches} rewrites, declined {list(record.declined)}, max error {record.max_error:.1e}"
        )
    try:
        run_passes(program, [DropSilu()], probe=probe)
    except VerificationError as error:
        assert isinstance(error, PassError)
        print(f"caught: {error}")


if __name__ == "__main__":
    main()
