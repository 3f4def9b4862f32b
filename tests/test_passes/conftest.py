"""Programs for the tests of passes: small graphs by hand, and a small model as capture gives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from optc.optimizer.capture import capture_module
from optc.passes.canonicalize import Canonicalize
from optc.passes.graph import Program, propagate
from optc.passes.verify import Probe
from optc.runtime.manifest import TensorSpec

VOCAB, WIDTH, HEADS, KV_HEADS, HEAD = 50, 16, 4, 2, 8


@pytest.fixture(scope="session")
def program_of() -> Callable[..., Program]:
    """Makes a program of one output, `build(graph, *inputs, **weights)`.

    The default inputs are `input_ids` and `positions`, i64[1, T].
    """

    def make(
        build: Callable[..., fx.Node], weights: dict[str, Tensor] | None = None, inputs: list[TensorSpec] | None = None
    ) -> Program:
        specs = inputs or [TensorSpec(name=name, dtype="int64", shape=(1, "T")) for name in ("input_ids", "positions")]
        root, graph = nn.Module(), fx.Graph()
        nodes = [graph.placeholder(spec.name) for spec in specs]
        for name, value in (weights or {}).items():
            root.register_buffer(name, value)
        attributes = {name: graph.get_attr(name) for name in weights or {}}
        graph.output((build(graph, *nodes, **attributes),))
        program = Program(fx.GraphModule(root, graph), specs, {"T": (1, 64)}, ("logits",))
        program.sources = {name: name for name in weights or {}}
        propagate(program)
        return program

    return make


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, HEADS * HEAD, bias=False)
        self.k_proj = nn.Linear(WIDTH, KV_HEADS * HEAD, bias=False)
        self.v_proj = nn.Linear(WIDTH, KV_HEADS * HEAD, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD, WIDTH, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = q * angles.cos()[:, None], k * angles.cos()[:, None]
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Model(nn.Module):
    """Two layers of attention, something that does nothing, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(input_ids)
        angles = positions[..., None] * torch.arange(HEAD) * 0.1
        for layer in self.layers:
            x = x + self.drop(layer(x, angles)) * 1.0
        return self.head(x)  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(scope="session")
def _captured(model: Model) -> Program:
    return capture_module(model, (torch.zeros(1, 7, dtype=torch.long), torch.arange(7)[None]), 64)


@pytest.fixture
def captured(_captured: Program) -> Program:
    """The model as captured, in a graph of its own."""
    return _captured.copy()


@pytest.fixture
def canonical(captured: Program) -> Program:
    """The model after the first pass, so that the next can run."""
    from optc.passes.base import run_passes

    run_passes(captured, [Canonicalize()])
    return captured


@pytest.fixture(scope="session")
def probe() -> Probe:
    return Probe.random(VOCAB, 64)


@pytest.fixture(scope="session")
def count() -> Callable[[Program, Any], int]:
    """How many nodes of a program call an op."""
    return lambda program, op: len(program.graph.find_nodes(op="call_function", target=op))
