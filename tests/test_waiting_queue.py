"""Who is next, under each policy; and what steps cost."""

from __future__ import annotations

import pytest

from optc.runtime import SamplingParams
from optc.runtime.params import RequestOptions
from optc.runtime.request import Request
from optc.runtime.step_costs import StepCosts
from optc.runtime.waiting_queue import WaitingQueue


def request(number: int, priority: int = 0, client: str = "") -> Request:
    return Request(number, [1], SamplingParams(), 0, [1], RequestOptions(priority=priority, client=client))


def fill(queue: WaitingQueue, *requests: Request) -> None:
    for each in requests:
        queue.enter(each)
        queue.push(each)


def take_all(queue: WaitingQueue) -> list[int]:
    order = []
    while (each := queue.peek()) is not None:
        order.append(each.request_id)
        queue.remove(each)
    return order


def test_first_come_first_served_whatever_the_priority() -> None:
    queue = WaitingQueue("fcfs")
    fill(queue, request(0, 5), request(1, -1), request(2, 0))
    assert take_all(queue) == [0, 1, 2]


def test_priority() -> None:
    queue = WaitingQueue("priority")
    fill(queue, request(0, 5), request(1, -1), request(2, 0), request(3, 0))
    assert take_all(queue) == [1, 2, 3, 0]


def test_one_that_comes_back_keeps_its_place() -> None:
    queue = WaitingQueue("fcfs")
    fill(queue, *(request(number) for number in range(3)))
    first = queue.peek()
    assert first is not None
    queue.remove(first)
    assert len(queue) == 2 and first not in queue
    queue.push(first)
    assert take_all(queue) == [0, 1, 2]


def test_fair_takes_turns_by_tokens_served() -> None:
    """One client queues ten requests before another's three: they take turns, weighted by what was served."""
    queue = WaitingQueue("fair")
    fill(queue, *(request(number, client="a") for number in range(10)))
    fill(queue, *(request(number, client="b") for number in range(10, 13)))
    order = []
    while (each := queue.peek()) is not None:
        order.append(each.request_id)
        queue.remove(each)
        queue.charge(each, inputs=10, outputs=0)
    assert order == [0, 10, 1, 11, 2, 12, 3, 4, 5, 6, 7, 8, 9]


def test_outputs_weigh_twice_as_much_as_inputs() -> None:
    queue = WaitingQueue("fair")
    fill(queue, request(0, client="a"), request(1, client="b"))
    queue.charge(request(0, client="a"), inputs=5, outputs=0)
    queue.charge(request(1, client="b"), inputs=0, outputs=3)
    found = queue.peek()
    assert found is not None and found.request_id == 0


def test_a_client_that_was_away_saves_nothing_up() -> None:
    queue = WaitingQueue("fair")
    fill(queue, request(0, client="a"))
    queue.charge(request(0, client="a"), inputs=1000, outputs=0)
    fill(queue, request(1, client="late"))
    assert queue.rank(request(1, client="late"))[0] == 1000
    for number, client in ((0, "a"), (1, "late")):
        queue.leave(request(number, client=client))
    assert not queue._served and not queue._present


def test_priorities_count_within_a_client() -> None:
    queue = WaitingQueue("fair")
    fill(queue, request(0, 5, "a"), request(1, 1, "a"), request(2, 9, "b"))
    queue.charge(request(2, client="b"), inputs=1, outputs=0)
    assert take_all(queue) == [1, 0, 2]


def test_costs_by_straight_lines() -> None:
    costs = StepCosts()
    assert costs.seconds(5) is None and costs.most_tokens(1, 512, 2.0) == 512
    costs.add(1, 0.006)
    costs.add(512, 0.518)
    assert costs.seconds(1) == pytest.approx(0.006)
    assert costs.seconds(512) == pytest.approx(0.518)
    assert costs.seconds(257) == pytest.approx((0.006 + 0.518) / 2, rel=1e-2)
    assert costs.seconds(1024) == pytest.approx(2 * 0.518)
    assert costs.most_tokens(1, 512, 2.0) == 6
    costs.add(8, 0.010)  # a size in between corrects the line
    assert costs.most_tokens(1, 512, 2.0) == 9


def test_costs_follow_what_is_measured() -> None:
    costs = StepCosts()
    for _ in range(40):
        costs.add(16, 0.020)
    for _ in range(40):
        costs.add(16, 0.040)
    assert costs.seconds(16) == pytest.approx(0.040, rel=1e-3)


def test_requests_taken_out_of_the_middle_are_let_go() -> None:
    queue = WaitingQueue("priority")
    fill(queue, request(0, -1))
    for number in range(1, 500):
        each = request(number, 5)
        fill(queue, each)
        queue.remove(each)
        queue.leave(each)
    assert sum(map(len, queue._heaps.values())) < 30
    assert take_all(queue) == [0]
