"""Throughput and data wait between two readings, on a clock that the test moves."""

import pytest

from vitds import meter
from vitds.meter import Meter


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now_s = 100.0

        def wait(self, seconds):
            self.now_s += seconds

    clock = Clock()
    monkeypatch.setattr(meter.time, "monotonic", lambda: clock.now_s)
    return clock


def test_images_per_second_and_share_of_data_wait(clock):
    reading = Meter()
    with reading.waiting_for_data():
        clock.wait(1.0)
    clock.wait(3.0)
    reading.count(80)
    assert reading.read() == {"images_per_s": pytest.approx(20.0), "data_wait_frac": pytest.approx(0.25)}


def test_evaluation_and_saving_do_not_count_as_training_time(clock):
    reading = Meter()
    clock.wait(2.0)
    with reading.paused():
        clock.wait(50.0)
    reading.count(10)
    assert reading.read()["images_per_s"] == pytest.approx(5.0)


def test_each_reading_starts_anew(clock):
    reading = Meter()
    with reading.waiting_for_data():
        clock.wait(4.0)
    reading.count(100)
    reading.read()
    clock.wait(2.0)
    reading.count(6)
    assert reading.read() == {"images_per_s": pytest.approx(3.0), "data_wait_frac": 0.0}


def test_a_reading_without_time_in_between_is_finite(clock):
    reading = Meter()
    assert reading.read() == {"images_per_s": 0.0, "data_wait_frac": 0.0}
