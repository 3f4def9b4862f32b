"""The pass that makes one op of what happens to queries, keys and values between projection and attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from optc.optimizer.captured import capture_checkpoint
from optc.optimizer.config import CompileConfig
from optc.optimizer.progress import Progress
from optc.optimizer.targets import find_target
from optc.passes.base import Pass, run_passes
from optc.passes.canonicalize import Canonicalize
from optc.passes.fuse_rms_norm import FuseRmsNorm
from optc.passes.fuse_rope import FuseRope
from optc.passes.fuse_rope_kv_write import FuseRopeKVWrite
from optc.passes.graph import Program, call, value_of
from optc.passes.kv_cache import KVCache
from optc.passes.merge_linears import MergeLinears
from optc.passes.paged_attention import PagedAttention
from optc.passes.quantize_kv_cache import QuantizeKVCache
from optc.passes.verify import Probe
from optc.runtime.manifest import PassRecord

from ..families import VOCAB_SIZE, save_model

aten, optc = torch.ops.aten, torch.ops.optc


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Program]:
    """The captured program of a small model of a family."""
    programs: dict[str, Program] = {}

    def make(name: str) -> Program:
        if name not in programs:
            folder: Path = tmp_path_factory.mktemp(name)
            config = CompileConfig(
                source=str(save_model(name, folder / "model")), output=folder / "x", target=find_target("native")
            )
            programs[name] = capture_checkpoint(config, Progress()).program
            run_passes(programs[name], [Canonicalize()])
        return programs[name].copy()

    return make


def step(program: Program, *more: Pass, norms: bool = True) -> None:
    """The step program as it is before the pass."""
    before: list[Pass] = [MergeLinears(), *([FuseRmsNorm()] if norms else []), FuseRope(), KVCache(), PagedAttention()]
    run_passes(program, [*before, *more], facts={"canonical"})


def fuse(program: Program) -> PassRecord:
    """The pass, checked on a ragged batch."""
    (record,) = run_passes(program, [FuseRopeKVWrite()], facts={"paged"}, probe=Probe.random(VOCAB_SIZE, 64))
    return record


def count(program: Program, op: Any) -> int:
    return len(program.graph.find_nodes(op="call_function", target=op.default))


@pytest.mark.parametrize(
    ("name", "norms"), [("llama", False), ("qwen3", True), ("gemma3_text", True), ("olmo2", False), ("gpt_neox", False)]
)
def test_families(captured: Callable[[str], Program], name: str, norms: bool) -> None:
    """Norms of heads go in (Qwen3 before the transposition, Gemma 3 after it), norms of all heads together stay."""
    program = captured(name)
    step(program)
    norms_before = count(program, optc.rms_norm)
    assert fuse(program).matches == 2
    assert count(program, optc.rope) == count(program, optc.kv_cache_write) == 0
    assert norms_before - count(program, optc.rms_norm) == (4 if norms else 0)
    for node in program.graph.find_nodes(op="call_function", target=optc.rope_kv_write.default):
        assert (node.args[5] is not None) == (node.args[6] is not None) == norms
        assert node.args[8] == (1.0 if name == "gemma3_text" else 0.0)
    assert (
        len([n for n in program.graph.nodes if n.target is aten.squeeze.dim and n.args[0].name in ("cos", "sin")]) <= 2
    )


def test_without_fused_norms(captured: Callable[[str], Program]) -> None:
    """Norms that are spelled out stay where they are."""
    program = captured("qwen3")
    step(program, norms=False)
    assert fuse(program).matches == 2
    assert all(
        n.args[5] is None for n in program.graph.find_nodes(op="call_function", target=optc.rope_kv_write.default)
    )


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_quantized_cache(captured: Callable[[str], Program], dtype: Any) -> None:
    program = captured("qwen3")
    step(program, QuantizeKVCache(dtype=dtype))
    assert fuse(program).matches == 2


def test_layers_without_positions(captured: Callable[[str], Program]) -> None:
    """SmolLM3 has layers that rotate nothing: no candidates."""
    program = captured("smollm3")
    step(program)
    record = fuse(program)
    assert record.matches == 1 and not record.declined
    assert count(program, optc.kv_cache_write) == 1


def rope_nodes(program: Program) -> tuple[fx.Node, fx.Node]:
    """The rotated queries and keys of the first layer."""
    rope = program.graph.find_nodes(op="call_function", target=optc.rope.default)[0]
    queries, keys = sorted(rope.users, key=lambda user: user.args[1])
    return queries, keys


@pytest.mark.parametrize("which", [0, 1])
def test_what_is_used_elsewhere_too(captured: Callable[[str], Program], which: int) -> None:
    program = captured("llama")
    step(program)
    node = rope_nodes(program)[which]
    logits = program.graph.output_node().args[0][0]  # type: ignore[index]
    with program.graph.inserting_before(program.graph.output_node()):
        total = call(program.graph, aten.sum.default, node)
        program.graph.output_node().args = ((call(program.graph, aten.add.Tensor, logits, total),),)
    record = fuse(program)
    assert record.matches == 1 and len(record.declined) == 1
    assert "elsewhere too" in record.declined[0] or "alone" in record.declined[0]


def test_norms_of_different_kinds_stay(captured: Callable[[str], Program]) -> None:
    program = captured("qwen3")
    step(program)
    norms = program.graph.find_nodes(op="call_function", target=optc.rms_norm.default)
    next(node for node in norms if value_of(node).dim() == 4).update_arg(2, 1e-3)
    assert fuse(program).matches == 2
    kinds = [n.args[5] is None for n in program.graph.find_nodes(op="call_function", target=optc.rope_kv_write.default)]
    assert sorted(kinds) == [False, True]
