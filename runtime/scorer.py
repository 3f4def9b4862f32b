"""The logits of given tokens, by an artifact's step program: what evaluation reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .artifact import Artifact
from .executor import Executor, StepInputs


@dataclass(frozen=True)
class Scored:
    """Tokens whose logits are wanted, from those of token `first` on."""

    token_ids: Sequence[int]
    first: int = 0


class Scorer:
    """Runs whole sequences through the step program, packed or in chunks as the engine does, over a KV cache of its own.

    Args:
        artifact: opened and checked.
        native: use the artifact's native code.
        max_length: most tokens of a sequence.
        max_num_seqs, max_num_batched_tokens: most sequences and tokens in a step; by default the engine's, so that what
            is measured is what serves.

    Raises:
        ArtifactError: the native code does not fit this machine.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        native: bool = True,
        max_length: int,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
    ) -> None:
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self._block_size = artifact.manifest.block_size
        packed = self._num_blocks(max_num_batched_tokens) + max_num_seqs  # each sequence may leave a block half empty
        self.executor = Executor(artifact, num_blocks=max(packed, self._num_blocks(max_length)), native=native)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Logits f32[n, V] of a sequence i64[n]: row i is of the token after token i."""
        (logits,) = self.score([Scored(token_ids.tolist())])
        return logits

    def score(self, sequences: Sequence[Scored]) -> Iterator[Tensor]:
        """Logits f32[n - first, V] of each sequence, in order; short sequences share steps."""
        batch: list[Scored] = []
        for sequence in sequences:
            tokens = sum(len(other.token_ids) for other in batch) + len(sequence.token_ids)
            if batch and (tokens > self.max_num_batched_tokens or len(batch) == self.max_num_seqs):
                yield from self._run(batch)
                batch = []
            batch.append(sequence)
        if batch:
            yield from self._run(batch)

    def _run(self, batch: list[Scored]) -> Sequence[Tensor]:
        """Sequences that fit into one step together, or a longer one alone."""
        if len(batch) > 1:
            return self._step(batch, start=0, stop=None)
        (sequence,) = batch
        ends = range(0, len(sequence.token_ids), self.max_num_batched_tokens)
        chunks = [self._step(batch, start=start, stop=start + self.max_num_batched_tokens)[0] for start in ends]
        return [torch.cat(chunks)] if len(chunks) > 1 else chunks

    def _step(self, batch: list[Scored], *, start: int, stop: int | None) -> Sequence[Tensor]:
        """Run the tokens from `start` to `stop` of each; the wanted ones' logits."""
        ids = [list(sequence.token_ids[start:stop]) for sequence in batch]
        lengths = [start + len(tokens) for tokens in ids]
        num_blocks = [self._num_blocks(length) for length in lengths]
        table = torch.zeros(len(batch), max(num_blocks), dtype=torch.int32)
        slots: list[int] = []
        wanted: list[int] = []
        counts: list[int] = []
        used = begin = 0
        for row, (sequence, tokens) in enumerate(zip(batch, ids, strict=True)):
            table[row, : num_blocks[row]] = torch.arange(used, used + num_blocks[row])
            slots += range(used * self._block_size + start, used * self._block_size + lengths[row])
            skipped = min(max(0, sequence.first - start), len(tokens))
            wanted += range(begin + skipped, begin + len(tokens))
            counts.append(len(tokens) - skipped)
            used += num_blocks[row]
            begin += len(tokens)
        starts = torch.tensor([0] + [len(tokens) for tokens in ids], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        inputs = StepInputs(
            input_ids=torch.tensor([token for tokens in ids for token in tokens], dtype=torch.int64),
            positions=torch.tensor([p for length in lengths for p in range(start, length)], dtype=torch.int64),
            slot_mapping=torch.tensor(slots, dtype=torch.int64),
            block_table=table,
            query_start_loc=starts,
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            # The program computes at least one row.
            logits_indices=torch.tensor(wanted or [0], dtype=torch.int64),
        )
        logits = self.executor.run(inputs)
        return list(torch.split(logits[: len(wanted)], counts))

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
