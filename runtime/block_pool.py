"""The pool of KV-cache blocks: reference counts, and the prefix cache of full blocks."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest of a full block: its tokens and, through its parent's digest, all before them."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


def root_hash(salt: str) -> bytes:
    """What the first block of a sequence has for a parent. Sequences share blocks with those of the same salt only."""
    return hashlib.blake2b(salt.encode(), digest_size=16).digest()


@dataclass
class _Cached:
    """A full block in the prefix cache. The tokens are compared on a hit, so equal digests alone share nothing."""

    digest: bytes
    parent: bytes
    token_ids: tuple[int, ...]


@dataclass
class PoolStats:
    """Counters since the pool was made.

    Attributes:
        queried_tokens, hit_tokens: of prompts that were looked up, and of them those found.
        evictions: cached blocks that were taken for something else.
        copies: blocks that were copied, since several sequences had them and one went its own way.
    """

    queried_tokens: int = 0
    hit_tokens: int = 0
    evictions: int = 0
    copies: int = 0


@dataclass
class BlockPool:
    """`num_blocks` blocks of `block_size` tokens.

    A block is referenced by the sequences that have it, or free. Free ones keep what they hold until they are taken: those
    in the prefix cache in order of their last use, after all that hold nothing of use. So a small load stays on few
    blocks, which stay in the processor's caches.
    """

    num_blocks: int
    block_size: int
    stats: PoolStats = field(default_factory=PoolStats)

    def __post_init__(self) -> None:
        self.num_touched = 0  # blocks up to here have been used
        self._references: list[int] = []
        self._free: OrderedDict[int, None] = OrderedDict()
        self._cached: dict[int, _Cached] = {}
        self._by_digest: dict[bytes, int] = {}
        # Of each prefix, the cached blocks behind it in order of their tokens, to find the one that begins most alike.
        self._children: dict[bytes, list[tuple[tuple[int, ...], int]]] = {}
        self.reset()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks in the prefix cache, whether a sequence has them or not."""
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def take(self) -> int:
        """A free block for a sequence of its own. There must be one."""
        block, _ = self._free.popitem(last=False)
        if block in self._cached:
            self._forget(block)
            self.stats.evictions += 1
        self._references[block] = 1
        if block >= self.num_touched:
            self.num_touched = block + 1
        return block

    def share(self, block: int) -> None:
        """One more sequence has `block`, free or not."""
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1

    def give_back(self, block: int) -> None:
        """A sequence has `block` no longer."""
        assert self._references[block] > 0
        self._references[block] -= 1
        if self._references[block] == 0:
            self._free[block] = None
            if block not in self._cached:
                self._free.move_to_end(block, last=False)

    def is_shared(self, block: int) -> bool:
        return self._references[block] > 1

    def publish(self, block: int, digest: bytes, parent: bytes, token_ids: Sequence[int]) -> None:
        """Let others find a full block whose tokens are computed. Of equal ones the first is found."""
        if digest not in self._by_digest and block not in self._cached:
            self._cached[block] = _Cached(digest, parent, tuple(token_ids))
            self._by_digest[digest] = block
            insort(self._children.setdefault(parent, []), (tuple(token_ids), block))

    def find(self, digest: bytes, parent: bytes, token_ids: Sequence[int]) -> int | None:
        """The cached block of this digest, if it holds these tokens behind the same prefix."""
        block = self._by_digest.get(digest)
        if block is None:
            return None
        found = self._cached[block]
        return block if found.parent == parent and found.token_ids == tuple(token_ids) else None

    def find_beginning(self, parent: bytes, token_ids: Sequence[int]) -> tuple[int, int] | None:
        """A cached block that begins as `token_ids` do, behind the same prefix, and for how many tokens; the longest."""
        siblings = self._children.get(parent, [])
        place = bisect_left(siblings, (tuple(token_ids),))
        neighbours = siblings[max(0, place - 1) : place + 1]  # in this order the most alike are next to each other
        best = max(neighbours, key=lambda each: _common(each[0], token_ids), default=None)
        if best is None or (count := _common(best[0], token_ids)) == 0:
            return None
        return best[1], count

    def reset(self) -> None:
        """All blocks are free, and nothing can be found: whatever broke off in the midst of its bookkeeping."""
        self._references = [0] * self.num_blocks
        self._free = OrderedDict.fromkeys(range(self.num_blocks))
        self._cached, self._by_digest, self._children = {}, {}, {}

    def forget_all(self) -> None:
        """Empty the prefix cache; sequences keep their blocks."""
        for block in list(self._cached):
            self._forget(block)

    def _forget(self, block: int) -> None:
        found = self._cached.pop(block)
        del self._by_digest[found.digest]
        siblings = self._children[found.parent]
        del siblings[bisect_left(siblings, (found.token_ids, block))]
        if not siblings:
            del self._children[found.parent]

    def check(self, tables: Sequence[Sequence[int]]) -> None:
        """Assert the invariants, given the blocks that each sequence has; for tests, which call it after every step."""
        counted = [0] * self.num_blocks
        for table in tables:
            for block in table:
                counted[block] += 1
        assert counted == self._references, "every reference is a sequence's"
        assert {block for block in range(self.num_blocks) if not counted[block]} == set(self._free)
        assert self._by_digest == {found.digest: block for block, found in self._cached.items()}
        children = sorted(block for siblings in self._children.values() for _, block in siblings)
        assert children == sorted(self._cached)
        for siblings in self._children.values():
            assert siblings == sorted(siblings) and all(self._cached[block].token_ids == ids for ids, block in siblings)
        assert all(len(found.token_ids) == self.block_size for found in self._cached.values())


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
