"""The step program's inputs, from what the scheduler chose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .executor import StepInputs
from .scheduler import Scheduled


def pack(step: Sequence[Scheduled], block_size: int) -> tuple[StepInputs, list[list[int]]]:
    """Pack the step's tokens without padding.

    Returns:
        The inputs, and of each sequence the positions whose logits are computed, one after the other: the last one's if it
        reaches the end of the sequence, and with prompt log-probabilities those of the prompt that were not reported yet.
    """
    width = max(len(scheduled.request.blocks) for scheduled in step)
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    table: list[int] = []
    query_start_loc, seq_lens = [0], []
    logits_indices: list[int] = []
    wanted: list[list[int]] = []
    for scheduled in step:
        request, first = scheduled.request, scheduled.request.num_computed
        blocks, last = request.blocks, first + scheduled.num_new
        begin = len(tokens)
        if scheduled.num_new == 1:
            tokens.append(request.token_ids[first])
            positions.append(first)
            slots.append(blocks[first // block_size] * block_size + first % block_size)
        else:
            tokens += request.token_ids[first:last]
            positions += range(first, last)
            for block in range(first // block_size, -(-last // block_size)):
                start = max(first, block * block_size)
                end = min(last, (block + 1) * block_size)
                shift = (blocks[block] - block) * block_size
                slots += range(start + shift, end + shift)
        table += blocks
        table += [0] * (width - len(blocks))
        query_start_loc.append(len(tokens))
        seq_lens.append(last)
        rows = [last - 1] if scheduled.reaches_end else []
        if request.params.prompt_logprobs is not None:
            reported = max(first, len(request.prompt_logprobs))
            rows = [*range(reported, min(last, len(request.prompt_token_ids) - 1)), *rows]
        logits_indices += [begin + position - first for position in rows]
        wanted.append(rows)
    inputs = StepInputs(
        input_ids=_tensor(tokens, np.int64),
        positions=_tensor(positions, np.int64),
        slot_mapping=_tensor(slots, np.int64),
        block_table=_tensor(table, np.int32).view(len(step), width),
        query_start_loc=_tensor(query_start_loc, np.int32),
        seq_lens=_tensor(seq_lens, np.int32),
        # A step of prompt chunks alone wants no logits; the program computes at least one row.
        logits_indices=_tensor(logits_indices or [0], np.int64),
    )
    return inputs, wanted


def _tensor(values: list[int], dtype: type) -> Tensor:
    return torch.from_numpy(np.array(values, dtype))  # torch.tensor takes twice as long
