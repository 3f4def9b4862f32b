"""Blocks: counted, shared, found again, copied before they are written, given back behind the window."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optc.runtime import SamplingParams
from optc.runtime.block_pool import BlockPool, block_hash, root_hash
from optc.runtime.kv_cache import KVCacheManager
from optc.runtime.params import RequestOptions
from optc.runtime.request import Request

SIZE = 4


def request(tokens: list[int], number: int = 0, **options: str) -> Request:
    return Request(number, tokens, SamplingParams(), 0, list(tokens), RequestOptions(**options))  # type: ignore[arg-type]


def manager(blocks: int = 8, *, window: int = 0, prefix_caching: bool = True) -> KVCacheManager:
    return KVCacheManager(BlockPool(blocks, SIZE), window=window, prefix_caching=prefix_caching)


def compute(kv: KVCacheManager, item: Request, upto: int | None = None) -> None:
    """Run the request's tokens up to `upto`, all by default."""
    upto = item.num_tokens if upto is None else upto
    assert kv.grow(item, upto)
    kv.commit(item, upto)


def admitted(kv: KVCacheManager, item: Request) -> Request:
    assert kv.admit(item, chunk=512, spare=0)
    return item


def test_blocks_are_taken_and_given_back() -> None:
    kv = manager(3)
    a = admitted(kv, request([1] * 6))
    compute(kv, a)
    assert len(a.blocks) == 2 and kv.pool.num_free == 1
    kv.pool.check([a.blocks])
    assert not kv.grow(a, 13) and len(a.blocks) == 2, "all or none"
    assert kv.grow(a, 12) and len(a.blocks) == 3
    kv.release(a)
    assert kv.pool.num_free == 3 and a.blocks == [] and a.num_computed == 0
    kv.pool.check([])


def test_a_prompt_that_was_computed_is_found() -> None:
    kv = manager()
    a = admitted(kv, request(list(range(10))))
    compute(kv, a)
    b = admitted(kv, request([*list(range(9)), 77], 1))
    assert b.blocks[:2] == a.blocks[:2] and b.num_cached == b.num_computed == 8
    kv.pool.check([a.blocks, b.blocks])
    kv.release(a)
    kv.release(b)
    c = admitted(kv, request(list(range(10)), 2))
    assert c.num_computed == 8, "found after both have gone"
    assert (kv.pool.stats.queried_tokens, kv.pool.stats.hit_tokens) == (30, 16)


def test_the_last_token_always_runs() -> None:
    """Its logits are wanted: a prompt that is cached as a whole is found but for its last token."""
    kv = manager()
    compute(kv, admitted(kv, request([1, 2, 3, 4, 5, 6, 7, 8])))
    again = admitted(kv, request([1, 2, 3, 4, 5, 6, 7, 8], 1))
    assert again.num_computed == 7
    assert kv.pending_copies == [(1, again.blocks[1])] and again.blocks[1] != 1, "the block is written, so it is copied"


def test_a_beginning_of_a_block_is_copied() -> None:
    kv = manager()
    compute(kv, admitted(kv, request([1, 2, 3, 4, 5, 6, 7, 8])))
    b = admitted(kv, request([1, 2, 3, 4, 5, 6, 99, 98, 97], 1))
    assert b.num_computed == 6 and b.blocks[0] == 0
    assert kv.pending_copies == [(1, b.blocks[1])]
    stranger = admitted(kv, request([5, 6, 7, 8], 2))
    assert stranger.num_computed == 0, "the same tokens behind another prefix"


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_other_salts_and_private_caches_share_nothing(prefix_caching: bool) -> None:
    kv = manager(16, prefix_caching=prefix_caching)
    compute(kv, admitted(kv, request([1] * 9, 0, cache_salt="a")))
    assert admitted(kv, request([1] * 9, 1, cache_salt="b")).num_computed == 0
    same = admitted(kv, request([1] * 9, 2, cache_salt="a"))
    assert same.num_computed == (8 if prefix_caching else 0)


def test_a_preempted_request_finds_its_own_blocks_even_without_prefix_caching() -> None:
    kv = manager(prefix_caching=False)
    a = admitted(kv, request(list(range(10))))
    compute(kv, a)
    kv.release(a)
    a.num_preemptions = 1
    assert admitted(kv, a).num_computed == 8


def test_equal_digests_of_other_tokens_are_no_hit() -> None:
    pool = BlockPool(4, SIZE)
    root = root_hash("")
    digest = block_hash(root, [1, 2, 3, 4])
    pool.publish(pool.take(), digest, root, [1, 2, 3, 4])
    assert pool.find(digest, root, [1, 2, 3, 4]) == 0
    assert pool.find(digest, root, [1, 2, 3, 5]) is None
    assert pool.find(digest, root_hash("x"), [1, 2, 3, 4]) is None


def test_the_longest_unused_is_evicted_first_and_last_blocks_before_first_ones() -> None:
    kv = manager(4)
    old, new = admitted(kv, request([1] * 9)), request([2] * 9, 1)
    compute(kv, old, 8)
    kv.release(old)
    compute(kv, admitted(kv, new), 8)
    kv.release(new)
    compute(kv, admitted(kv, request([3] * 5, 2)), 4)
    assert kv.pool.stats.evictions == 1
    assert admitted(kv, request([1] * 9, 3)).num_computed in (4, 7), "its last block went, its first is there"
    kv.pool.check([r.blocks for r in ()] + [[b] for b in range(4) if kv.pool._references[b]])


def test_forks_share_blocks_and_copy_the_last_before_writing() -> None:
    kv = manager()
    parent = admitted(kv, request([1, 2, 3, 4, 5, 6]))
    compute(kv, parent)
    children = [request([1, 2, 3, 4, 5, 6], number) for number in (1, 2)]
    for child in children:
        kv.fork(parent, child)
    kv.pool.check([parent.blocks, *[child.blocks for child in children]])
    assert kv.pool.num_free == 6
    for item in (parent, *children):
        item.token_ids.append(9)
        assert kv.grow(item, 7)
    assert [item.blocks[0] for item in (parent, *children)] == [0, 0, 0]
    assert len({item.blocks[1] for item in (parent, *children)}) == 3
    assert kv.pending_copies == [(1, parent.blocks[1]), (1, children[0].blocks[1])], "the last owner writes in place"
    assert children[1].blocks[1] == 1
    kv.pool.check([parent.blocks, *[child.blocks for child in children]])


def test_without_a_free_block_nothing_is_copied() -> None:
    kv = manager(2)
    parent = admitted(kv, request([1, 2, 3, 4, 5, 6]))
    compute(kv, parent)
    child = request([1, 2, 3, 4, 5, 6], 1)
    kv.fork(parent, child)
    child.token_ids.append(9)
    assert not kv.grow(child, 7) and not kv.pending_copies


def test_admission_wants_room_for_the_whole_prompt() -> None:
    kv = manager(4)
    compute(kv, admitted(kv, request([1] * 8)), 8)
    assert not kv.admit(request([2] * 12, 1), chunk=4, spare=0)
    assert not kv.admit(request([2] * 8, 1), chunk=4, spare=1)
    item = request([1] * 4 + [3] * 8, 2)
    assert not kv.admit(item, chunk=4, spare=1)
    assert kv.admit(item, chunk=4, spare=0), "a block of it is there already"
    refused = request([2] * 12, 3)
    assert not kv.admit(refused, chunk=4, spare=0) and refused.blocks == [] and kv.pool.num_free == 2


def test_blocks_behind_the_window_are_given_back() -> None:
    kv = manager(8, window=5)
    item = admitted(kv, request(list(range(30))))
    for upto in range(1, 31):
        assert kv.grow(item, upto)
        kv.commit(item, upto)
        held = item.blocks[item.num_freed :]
        kv.pool.check([held])
        first_seen = max(0, upto + 1 - 5)
        if upto % SIZE == 0:
            assert item.num_freed == first_seen // SIZE, "all that the next token does not see"
        assert item.num_freed <= first_seen // SIZE, "nothing that it sees"
        assert len(held) <= kv.most_blocks(30, 1)
    kv.release(item)
    kv.pool.check([])
    assert kv.most_blocks(30, 1) < kv.pool.blocks_for(30)


def test_a_prefix_longer_than_the_pool_allows_leaves_room_for_what_follows() -> None:
    """All blocks of a small pool hold the prefix; only those that the window reaches are taken."""
    kv = manager(6, window=5)
    item = admitted(kv, request(list(range(24))))
    for upto in range(4, 25, 4):
        assert kv.grow(item, upto)
        kv.commit(item, upto)
    kv.release(item)
    assert kv.pool.num_cached == 6
    longer = request(list(range(24)) + [30] * 6, 1)
    assert kv.admit(longer, chunk=4, spare=0)
    assert longer.num_computed == 24 and longer.num_freed == 5
    kv.pool.check([longer.blocks[longer.num_freed :]])
    assert kv.grow(longer, 30)


def test_waste_is_what_blocks_hold_nothing_in() -> None:
    kv = manager()
    a = admitted(kv, request([1, 2, 3, 4, 5]))
    compute(kv, a)
    child = request([1, 2, 3, 4, 5], 1)
    kv.fork(a, child)
    assert kv.num_wasted_slots([a, child]) == (3, 8), "shared blocks count once"


def test_the_cache_can_be_forgotten() -> None:
    kv = manager()
    a = admitted(kv, request([1] * 9))
    compute(kv, a)
    kv.pool.forget_all()
    kv.pool.check([a.blocks])
    assert kv.pool.num_cached == 0 and admitted(kv, request([1] * 9, 1)).num_computed == 0


def test_with_a_window_the_last_blocks_are_enough() -> None:
    """Those before the window were taken for others, which hides nothing."""
    kv = manager(12, window=6)
    item = admitted(kv, request(list(range(32))))
    for upto in range(4, 33, 4):
        compute(kv, item, upto)
    kv.release(item)
    for block in [
        kv.pool.find(item.block_hashes[n], kv._parent(item, n), list(range(n * 4, n * 4 + 4))) for n in (0, 4)
    ]:
        assert block is not None
        kv.pool._forget(block)
    again = admitted(kv, request([*range(32), 50], 1))
    assert again.num_computed == 32 and again.num_freed == 6 and len(again.blocks) == 8
    kv.pool.check([again.blocks[6:]])
    # Tokens part in block 5, which needs block 4, so those up to block 3 are found; of them the last ones.
    other = admitted(kv, request([*range(18), 60, 61, 62, 63, 64, 65], 2))
    assert other.num_computed == 16 and other.num_freed == 2
    kv.pool.check([again.blocks[6:], other.blocks[2:]])


@given(
    cached=st.lists(st.lists(st.integers(0, 2), min_size=SIZE, max_size=SIZE), max_size=12, unique_by=tuple),
    wanted=st.lists(st.integers(0, 2), min_size=0, max_size=SIZE),
    forgotten=st.lists(st.integers(0, 11), max_size=4),
)
def test_the_block_that_begins_most_alike(cached: list[list[int]], wanted: list[int], forgotten: list[int]) -> None:
    pool, root = BlockPool(12, SIZE), root_hash("")
    held = {pool.take(): ids for ids in cached}
    for block, ids in held.items():
        pool.publish(block, block_hash(root, ids), root, ids)
    for block in set(forgotten) & held.keys():
        pool._forget(block)
        del held[block]
    pool.check([[block] for block in range(len(cached))])
    lengths = [
        next((n for n, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b), len(wanted))
        for ids in held.values()
    ]
    longest = max(lengths, default=0)
    found = pool.find_beginning(root, wanted)
    if longest == 0:
        assert found is None
    else:
        assert found is not None and found[1] == longest and held[found[0]][:longest] == wanted[:longest]
