"""Running an artifact's step program: native code bound to its weights, or the portable program."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArtifactError, RequestError
from . import huge_pages
from .artifact import MANIFEST, Artifact
from .compiled_step import load_step
from .manifest import NativeCode
from .ops.kernels import cpu_flags, load_kernels
from .pages_ahead import PagesAhead

logger = logging.getLogger("optc")


@dataclass(frozen=True)
class StepInputs:
    """T packed tokens of B sequences; shapes and meanings as in the step program's contract (docs/artifact.md)."""

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    logits_indices: Tensor


class Executor:
    """The step program of an artifact over its own KV cache.

    Args:
        artifact: opened and checked.
        num_blocks: blocks of the KV cache.
        native: use native code if the artifact has it; off, only data is loaded.

    Raises:
        ArtifactError: the native code does not fit this machine or this torch, or does not match the weights.
    """

    def __init__(self, artifact: Artifact, *, num_blocks: int, native: bool = True) -> None:
        manifest = artifact.manifest
        self._names = [spec.name for spec in manifest.step.inputs]
        self.constants = artifact.constants()
        code = usable_code(artifact) if native else None
        self.device = _device(manifest.target) if code is None else torch.device("cpu")
        self.is_native = code is not None
        self._run = self._load_native(artifact, code) if code else self._load_portable(artifact)
        try:
            self.caches = {
                spec.input_name: self._zeros(
                    (num_blocks, spec.kv_heads, manifest.block_size, spec.row_size), _dtype(artifact, spec.dtype)
                )
                for spec in manifest.kv_cache
            }
        except (MemoryError, OSError, RuntimeError, OverflowError) as error:
            size = num_blocks * manifest.block_size * manifest.memory.kv_bytes_per_token
            raise RequestError(f"no memory for a KV cache of {size / 1e9:.1f} GB; lower kv_cache_memory") from error
        self.pages = PagesAhead(list(self.caches.values()) if self.is_native else [])
        self.pages.use(0)

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return huge_pages.zeros(shape, dtype) if self.is_native else torch.zeros(shape, dtype=dtype, device=self.device)

    def _load_native(self, artifact: Artifact, code: NativeCode) -> Callable[[list[Tensor]], Sequence[Tensor]]:
        if code.step is None or code.kernels is None:
            lacking = "step program" if code.step is None else "kernels library"
            raise ArtifactError(f"{artifact.file(MANIFEST)}: ready code without a {lacking}; compile the model again")
        load_kernels(artifact.file(code.kernels), code.shims)
        path = artifact.file(code.step)
        step = load_step(path)
        wanted = step.constants
        if unknown := sorted(set(code.constants.values()) - self.constants.keys()):
            raise ArtifactError(f"{path}: wants the constant {unknown[0]!r}, which the artifact does not hold")
        try:
            self.constants = huge_pages.copies(self.constants)
        except OSError as error:
            size = sum(tensor.nbytes for tensor in self.constants.values())
            raise ArtifactError(
                f"{artifact.path}: no memory for {size / 1e9:.1f} GB of weights ({error.strerror}); free some, or run the "
                "portable program, which reads them from the file, with native=False (--no-native)"
            ) from error
        bound = {name: self.constants[source] for name, source in code.constants.items() if name in wanted}
        if missing := sorted(wanted - bound.keys()):
            raise ArtifactError(
                f"{path}: wants the constant {missing[0]!r}, which the manifest does not map; compile the model again"
            )
        step.bind(bound)
        return step.run

    def _load_portable(self, artifact: Artifact) -> Callable[[list[Tensor]], Sequence[Tensor]]:
        constants = {name: value.to(self.device) for name, value in self.constants.items()}
        step, names = artifact.load_program(artifact.manifest.step.file, constants, self.device)
        if names != self._names:
            raise ArtifactError(f"{artifact.path}: the step program takes {names}, the manifest says {self._names}")

        def run(inputs: list[Tensor]) -> list[Tensor]:
            with torch.inference_mode():
                return [value.cpu() for value in step(*(value.to(self.device) for value in inputs))]

        return run

    def run(self, inputs: StepInputs) -> Tensor:
        """Run one step: writes the new tokens' keys and values, returns logits f32[L, V] on the CPU."""
        given = vars(inputs) | self.caches
        return self._run([given[name] for name in self._names])[0]

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks of every layer's cache, (source, destination) one after the other."""
        for cache in self.caches.values():
            for source, destination in copies:
                cache[destination].copy_(cache[source])


def usable_code(artifact: Artifact) -> NativeCode | None:
    """The artifact's native code; None, with the reason logged, where it has none that this processor can run.

    Raises:
        ArtifactError: there is code for another torch.
    """
    manifest = artifact.manifest
    if manifest.backend == "eager":
        return None
    ready = [code for code in manifest.native if code.status == "ready"]
    if not ready:
        reason = "; ".join(code.reason or "pending" for code in manifest.native)
        logger.warning(
            "%s has no native code yet (%s); running the portable program, which is slow", artifact.path, reason
        )
        return None
    code = ready[0]
    way_out = "compile the model again for this machine, or run the portable program with native=False (--no-native)"
    if lacking := sorted(set(code.cpu_features) - cpu_flags()):
        logger.warning(
            "%s: the code for %s needs %s, which this processor lacks; running the portable program, which is slow; compile "
            "the model again for this machine",
            artifact.path,
            code.target,
            ", ".join(lacking),
        )
        return None
    version = ".".join(torch.__version__.split(".")[:2])
    if code.torch_version != version:
        raise ArtifactError(
            f"{artifact.path}: the code was made for torch {code.torch_version}, this is torch {version}; {way_out}"
        )
    return code


def _dtype(artifact: Artifact, name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ArtifactError(
            f"{artifact.file(MANIFEST)}: a KV cache of the unknown dtype {name!r}; compile the model again"
        )
    return found


def _device(target: str) -> torch.device:
    on_gpu = not target.startswith("cpu") and target != "native" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")
