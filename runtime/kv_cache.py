"""The pool of KV-cache blocks, and the tables of those a sequence holds."""

from __future__ import annotations

from .request import Request


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens. A block is free or belongs to one sequence."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        # Last in, first out: a small load stays on few blocks, which stay in the processor's caches.
        self._free = list(reversed(range(num_blocks)))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Give `request` the blocks it lacks for `num_tokens` tokens; False, and none given, if there are not enough."""
        lacking = self.blocks_for(num_tokens) - len(request.blocks)
        if lacking > len(self._free):
            return False
        request.blocks += [self._free.pop() for _ in range(lacking)]
        return True

    def release(self, request: Request) -> None:
        """Take back all blocks of `request`."""
        self._free.extend(reversed(request.blocks))
        request.blocks.clear()
