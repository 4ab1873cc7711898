"""Rows read ahead come in their order, none twice and none lost, and what fails in the thread fails in the run."""

from __future__ import annotations

import threading

import pytest

from imagine_opd.lookahead import Lookahead


class Loader:
    """Micro-batches of two rows; knows, as accelerate's does, when it has given its last."""

    def __init__(self, count):
        self.batches = [[2 * index, 2 * index + 1] for index in range(count)]
        self.given = 0

    def __iter__(self):
        for given, batch in enumerate(self.batches, 1):
            self.given = given
            yield batch

    def is_last(self):
        return self.given == len(self.batches)


def take_all(loader, count, steps, is_on=True, make=lambda rows: [-row for row in rows]):
    ahead = Lookahead(make, loader.is_last, is_on)
    source = iter(loader)
    taken = [ahead.take(source, count, more=step + 1 < steps) for step in range(steps)]
    found = [(rows.batches, rows.is_last, rows.made.result()[0] if rows.made else None) for rows in taken]
    ahead.close()
    return found


@pytest.mark.parametrize(("batches", "count", "steps"), [(6, 2, 3), (5, 2, 3), (4, 1, 4), (1, 4, 1)])
def test_rows_are_those_of_reading_when_asked(batches, count, steps):
    ahead, plain = (take_all(Loader(batches), count, steps, is_on) for is_on in (True, False))
    assert [item[:2] for item in ahead] == [item[:2] for item in plain]
    assert [row for step, _, _ in ahead for batch in step for row in batch] == list(range(2 * batches))
    assert [is_last for _, is_last, _ in ahead] == [False] * (steps - 1) + [True]
    for step, _, made in ahead:
        assert made == [-row for batch in step for row in batch]
    assert all(made is None for _, _, made in plain)


def test_next_step_is_made_while_this_one_runs():
    begun = threading.Event()

    def make(rows):
        if 2 in rows:
            begun.set()
        return list(rows)

    loader = Loader(3)
    ahead = Lookahead(make, loader.is_last)
    source = iter(loader)
    ahead.take(source, 1, more=True)
    assert begun.wait(10.0)
    assert ahead.take(source, 1, more=True).batches == [[2, 3]]
    ahead.close()


def test_nothing_is_read_behind_the_last_step():
    loader = Loader(5)
    take_all(loader, 1, 2)
    assert loader.given == 2


def test_an_error_of_the_thread_is_raised_where_its_rows_are_due():
    def make(rows):
        if 2 in rows:
            raise ValueError("row 2 has no image")
        return list(rows)

    loader = Loader(3)
    ahead = Lookahead(make, loader.is_last)
    source = iter(loader)
    assert ahead.take(source, 1, more=True).made.result()[0] == [0, 1]
    with pytest.raises(ValueError, match="row 2 has no image"):
        ahead.take(source, 1, more=True).made.result()
    ahead.close()


def test_rows_of_a_former_loader_are_dropped():
    first, second = Loader(4), Loader(4)
    ahead = Lookahead(list, second.is_last)
    ahead.take(iter(first), 1, more=True)
    assert ahead.take(iter(second), 1, more=True).batches == [[0, 1]]
    ahead.close()


def test_thread_begins_again_after_it_was_closed():
    loader = Loader(2)
    ahead = Lookahead(list, loader.is_last)
    source = iter(loader)
    ahead.take(source, 1, more=True)
    ahead.close()
    assert ahead.take(iter(Loader(2)), 1, more=False).made.result()[0] == [0, 1]
    ahead.close()


def test_an_error_of_reading_ahead_waits_until_its_rows_are_due():
    def read():
        yield [0, 1]
        raise OSError("the disk is gone")

    ahead = Lookahead(list, lambda: False)
    source = read()
    assert ahead.take(source, 1, more=True).batches == [[0, 1]]
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.take(source, 1, more=True)
    ahead.close()
