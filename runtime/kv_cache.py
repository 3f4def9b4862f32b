"""Which blocks of the KV cache a sequence has: found, taken, shared, copied and given back."""

from __future__ import annotations

from collections.abc import Iterable

from .block_pool import BlockPool, block_hash, root_hash
from .request import Request


class KVCacheManager:
    """Block tables over a pool.

    Blocks are written by a sequence that has them alone, and never once they are in the prefix cache: what several
    sequences have is copied before one of them writes (`pending_copies`, to be done before the step runs).

    Args:
        pool: the blocks.
        prefix_caching: whether requests find blocks of others. A request always finds its own again after preemption.
        window: how many last tokens a query sees in every layer, itself included; 0 if some layer sees all. Blocks that
            have slid out of it are given back.
    """

    def __init__(self, pool: BlockPool, *, prefix_caching: bool = True, window: int = 0) -> None:
        self.pool, self.prefix_caching, self.window = pool, prefix_caching, window
        self.pending_copies: list[tuple[int, int]] = []

    def most_blocks(self, num_tokens: int, chunk: int) -> int:
        """The most blocks that a sequence of so many tokens ever has at once, if at most `chunk` of them run in a step."""
        whole = self.pool.blocks_for(num_tokens)
        return min(whole, self.pool.blocks_for(self.window + chunk) + 1) if self.window else whole

    def admit(self, request: Request, *, chunk: int, spare: int) -> bool:
        """Give a request without blocks those in the prefix cache that hold its first tokens, all but the last at most.

        Behind the full blocks it may begin with a copy of a block that has some tokens in common with it. False, and
        nothing given, unless there are free blocks for all the rest of its tokens and `spare` more: half-admitted
        prompts would preempt each other. At most `chunk` tokens run in a step.
        """
        assert not request.blocks and request.num_computed == 0
        if not request.prefix_root:
            salt = request.options.cache_salt
            request.prefix_root = root_hash(salt if self.prefix_caching else f"{request.request_id}\n{salt}")
        parent = self._share_prefix(request)
        needed = self.most_blocks(request.num_tokens, chunk) - (len(request.blocks) - request.num_freed)
        if needed + spare > self.pool.num_free:
            self.release(request)
            return False
        self._copy_beginning(request, parent)
        if request.admitted is None and request.params.prompt_logprobs is None:
            self.pool.stats.queried_tokens += request.num_tokens
            self.pool.stats.hit_tokens += request.num_computed
            request.num_cached = request.num_computed
        return True

    def _share_prefix(self, request: Request) -> bytes:
        """Give `request` the cached blocks that hold its first tokens; the digest of the last of them.

        With a window, only those that it reaches from there on must be cached: the most blocks are looked for of which
        those are.
        """
        found = self._find_with_window(request) if self.window else self._find_from_first(request)
        for block in found:
            if block is not None:
                self.pool.share(block)
        request.blocks = [0 if block is None else block for block in found]
        request.num_freed = sum(block is None for block in found)
        request.num_computed = len(found) * self.pool.block_size
        return self._parent(request, len(found))

    def _find_from_first(self, request: Request) -> list[int | None]:
        found: list[int | None] = []
        for number in range(_findable(request) // self.pool.block_size):
            if (block := self._find(request, number)) is None:
                break
            found.append(block)
        return found

    def _find_with_window(self, request: Request) -> list[int | None]:
        """The longest run of blocks that goes on from token `n` with all that this sees; None for those before it."""
        run: list[int | None] = []  # last block first
        for number in reversed(range(_findable(request) // self.pool.block_size)):
            block = self._find(request, number)
            if block is None:
                run.clear()
                continue
            run.append(block)
            if number <= self._num_unseen((number + len(run)) * self.pool.block_size):
                return [None] * number + run[::-1]
        return run[::-1]

    def _find(self, request: Request, number: int) -> int | None:
        """The cached block that holds the tokens of the request's block `number`."""
        size = self.pool.block_size
        tokens = request.token_ids[number * size : (number + 1) * size]
        return self.pool.find(self._digest(request, number), self._parent(request, number), tokens)

    def _copy_beginning(self, request: Request, parent: bytes) -> None:
        size, start = self.pool.block_size, request.num_computed
        found = self.pool.find_beginning(parent, request.token_ids[start : min(start + size, _findable(request))])
        if found is None or self.pool.num_free == 0:
            return
        source, count = found
        self.pool.share(source)  # or it might be taken as its own copy
        if self.pool.num_free:
            block = self.pool.take()
            self._copy(source, block)
            request.blocks.append(block)
            request.num_computed += count
        self.pool.give_back(source)

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Give `request` the blocks it lacks to write up to `num_tokens`; False, and none given, if there are not enough."""
        if len(request.blocks) * self.pool.block_size >= num_tokens and not self._must_copy(request):
            return True  # nearly always
        lacking = self.pool.blocks_for(num_tokens) - len(request.blocks)
        if lacking + self._must_copy(request) > self.pool.num_free:
            return False
        if self._must_copy(request):
            source, block = request.blocks[-1], self.pool.take()
            self._copy(source, block)
            self.pool.give_back(source)
            request.blocks[-1] = block
        while len(request.blocks) * self.pool.block_size < num_tokens:
            request.blocks.append(self.pool.take())
        return True

    def _must_copy(self, request: Request) -> bool:
        """Whether the next token goes into a block that others have as well, which only the last one can be."""
        return request.num_computed % self.pool.block_size != 0 and self.pool.is_shared(request.blocks[-1])

    def _copy(self, source: int, block: int) -> None:
        self.pending_copies.append((source, block))
        self.pool.stats.copies += 1

    def fork(self, parent: Request, child: Request) -> None:
        """Let `child`, of the same tokens, have all blocks of `parent`."""
        for block in parent.blocks[parent.num_freed :]:
            self.pool.share(block)
        child.blocks, child.num_freed = list(parent.blocks), parent.num_freed
        child.num_computed, child.num_cached = parent.num_computed, parent.num_cached
        child.block_hashes, child.prefix_root = list(parent.block_hashes), parent.prefix_root

    def commit(self, request: Request, num_computed: int) -> None:
        """The tokens up to `num_computed` have run: publish the blocks they fill, give back those behind the window."""
        size, before = self.pool.block_size, request.num_computed
        request.num_computed = num_computed
        if before // size == num_computed // size:
            return
        for number in range(before // size, num_computed // size):
            tokens = request.token_ids[number * size : (number + 1) * size]
            self.pool.publish(
                request.blocks[number], self._digest(request, number), self._parent(request, number), tokens
            )
        if self.window:
            self._give_back_unseen(request)

    def _give_back_unseen(self, request: Request) -> None:
        """Give back the blocks that the next query does not see."""
        unseen = self._num_unseen(request.num_computed)
        for block in request.blocks[request.num_freed : unseen]:
            self.pool.give_back(block)
        request.num_freed = max(request.num_freed, unseen)

    def _num_unseen(self, num_computed: int) -> int:
        """Blocks behind the window: the next query is token `num_computed`, and sees `window` tokens, itself the last."""
        return max(0, num_computed + 1 - self.window) // self.pool.block_size

    def release(self, request: Request) -> None:
        """Take back all blocks of `request`; the last ones are the first to be taken for others."""
        for block in reversed(request.blocks[request.num_freed :]):
            self.pool.give_back(block)
        request.blocks.clear()
        request.num_freed = request.num_computed = 0

    def num_wasted_slots(self, requests: Iterable[Request]) -> tuple[int, int]:
        """Slots of the blocks that `requests` have which hold no token yet, and all their slots."""
        size = self.pool.block_size
        filled: dict[int, int] = {}
        for request in requests:
            for number in range(request.num_computed // size, len(request.blocks)):  # those before are full
                tokens = max(0, request.num_computed - number * size)
                block = request.blocks[number]
                filled[block] = max(tokens, filled.get(block, 0))
        return len(filled) * size - sum(filled.values()), (self.pool.num_blocks - self.pool.num_free) * size

    def _parent(self, request: Request, number: int) -> bytes:
        """The digest of all before the request's block `number`."""
        return self._digest(request, number - 1) if number else request.prefix_root

    def _digest(self, request: Request, number: int) -> bytes:
        """Of the request's full block `number`."""
        hashes, size = request.block_hashes, self.pool.block_size
        while len(hashes) <= number:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else request.prefix_root
            hashes.append(block_hash(parent, request.token_ids[start : start + size]))
        return hashes[number]


def _findable(request: Request) -> int:
    """How many first tokens may come from the cache: those whose logits nobody wants. The last token's are wanted always."""
    reported, prompt = len(request.prompt_logprobs), len(request.prompt_token_ids)
    if request.params.prompt_logprobs is not None and reported < prompt - 1:
        return reported
    return request.num_tokens - 1
