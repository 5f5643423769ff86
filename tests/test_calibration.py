"""Curves, thresholds, targets and calibration against counting and exact fractions."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from hsee_jax.inference.calibration import (
    Judgement,
    OffloadCurve,
    Scores,
    all_thresholds,
    calibration_error,
    judge,
    offload_curve,
    point_at_accuracy,
    point_in_budget,
)


def scores(uncertainty, exit_correct, server_correct):
    def judgement(correct):
        return Judgement(np.array(correct, bool), np.ones(len(correct)))

    doubts = np.array(uncertainty, np.float32)
    return Scores(doubts, judgement(exit_correct), judgement(server_correct))


FIVE = scores([0.3, 0.1, 0.5, 0.2, 0.4], [0, 1, 0, 1, 1], [1, 0, 1, 1, 1])


def test_the_curve_of_five_samples():
    """By uncertainty the exit is right 1 1 0 1 0, the server 0 1 1 1 1.

    So with the k surest at the exit: 0+4, 1+4, 2+3, 2+2, 3+1, 3+0 of 5 are right.
    """
    thresholds = all_thresholds(FIVE.uncertainty, 1.0)
    np.testing.assert_allclose(thresholds, [0, 0.2, 0.3, 0.4, 0.5, 1.01])
    points = offload_curve(FIVE, thresholds)
    np.testing.assert_array_equal(points.accuracy, [0.8, 1, 1, 0.8, 0.8, 0.6])
    np.testing.assert_array_equal(points.offload, [1, 0.8, 0.6, 0.4, 0.2, 0])
    # Any other threshold gives what the next one that occurs gives.
    between = offload_curve(FIVE, np.array([0.05, 0.15, 0.35, 0.45, 0.6]))
    np.testing.assert_array_equal(between.accuracy, [0.8, 1, 0.8, 0.8, 0.6])

    for accuracies, point in (((1, 0.9), 2), ((0.8, 0.7), 4), ((0.6, 0), 5)):
        assert {point_at_accuracy(points, a) for a in accuracies} == {point}
    for offloads, point in (((1,), 0), ((0.99, 0.8), 1), ((0.5, 0.4), 3), ((0.19,), 5)):
        assert {point_in_budget(points, offload) for offload in offloads} == {point}
    # At 100 bytes each, 60 bytes a sample are three samples of five.
    for budget, point in ((1000, 0), (60, 2), (59.9, 3), (0, 5)):
        assert point_in_budget(points, budget, 100) == point


@pytest.mark.parametrize("count", [40, 50, 128, 1000])
def test_a_target_that_is_met_exactly_is_met(count):
    """Every number of samples becomes a target, as the decimal that a user types.

    So does a decimal a millionth smaller: its budget allows one sample less, its
    accuracy needs the same number. Exact fractions give the expected numbers.
    """
    numbers = np.arange(count, -1, -1)
    curve = OffloadCurve(numbers * 0.0, numbers, numbers, count)
    step = Decimal("1e-6")
    for cost in (1, 3, 32, 588, 6272, 262144):
        for number in range(1, count + 1):
            exact = Decimal(number * cost) / count
            for text in (str(exact), str(exact - step)):
                expected = math.floor(Fraction(text) * count / cost)
                point = point_in_budget(curve, float(text), cost)
                assert curve.num_offloads[point] == expected, (text, cost)
    for number in range(1, count + 1):
        exact = Decimal(number) / count
        for text in (str(exact), str(exact - step)):
            point = point_at_accuracy(curve, float(text))
            assert (
                curve.num_correct[point] == math.ceil(Fraction(text) * count) == number
            )


def test_a_target_copied_from_a_curve_is_met():
    """Thirds and sevenths are no decimals; the floats of a curve stand for them."""
    numbers = np.arange(21, -1, -1)
    curve = OffloadCurve(numbers * 0.0, numbers, numbers, 21)
    for point, offload in enumerate(curve.offload.tolist()):
        assert point_in_budget(curve, offload) == point
        assert point_at_accuracy(curve, offload) == point
        assert point_in_budget(curve, int(numbers[point]) * 588 / 21, 588) == point


def test_an_uncertainty_that_is_not_finite_is_no_threshold():
    """Two of five samples always go to the server, whatever the budget."""
    some = scores([0.1, np.nan, 0.5, np.nan, 0.3], [1, 0, 1, 0, 0], [0, 1, 1, 1, 1])
    thresholds = all_thresholds(some.uncertainty, 1.0)
    np.testing.assert_allclose(thresholds, [0, 0.3, 0.5, 1.01])
    points = offload_curve(some, thresholds)
    np.testing.assert_array_equal(points.num_offloads, [5, 4, 3, 2])
    np.testing.assert_array_equal(points.num_correct, [4, 5, 4, 4])
    for budget, point in ((1, 0), (0.8, 1), (0.6, 2), (0.4, 3), (0.3, 3), (0, 3)):
        assert point_in_budget(points, budget) == point
    assert point_at_accuracy(points, 1.0) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_exit_that_is_never_finite_leaves_all_to_the_server(value):
    none = scores([value] * 3, [0, 0, 0], [1, 0, 1])
    thresholds = all_thresholds(none.uncertainty, 1.0)
    np.testing.assert_array_equal(thresholds, [0])
    points = offload_curve(none, np.array([0, 0.5, 1.01]))
    np.testing.assert_array_equal(points.num_offloads, [3, 3, 3])
    np.testing.assert_array_equal(points.num_correct, [2, 2, 2])
    only = offload_curve(none, thresholds)
    assert point_in_budget(only, 0.1) == point_at_accuracy(only, 0.9) == 0


def test_curves_with_ties_equal_counting():
    rng = np.random.default_rng(0)
    for count in (1, 2, 30):
        drawn = scores(
            rng.integers(0, 6, count) / 8,
            rng.integers(0, 2, count),
            rng.integers(0, 2, count),
        )
        thresholds = all_thresholds(drawn.uncertainty, 1.0)
        assert (np.diff(thresholds) > 0).all()
        for values in (thresholds, np.linspace(0, 1, 41)):
            points = offload_curve(drawn, values)
            for p, threshold in enumerate(values):
                exits = drawn.uncertainty < threshold
                right = np.where(exits, drawn.exit.correct, drawn.server.correct)
                assert points.accuracy[p] == right.sum() / count
                assert points.offload[p] == (~exits).sum() / count
        ways = {
            tuple(drawn.uncertainty < threshold) for threshold in np.arange(0, 1, 0.01)
        }
        assert len(thresholds) == len(ways)


def test_calibration_error_of_four_samples():
    """Bins of width 1/15: 0.95 0.95 (one right), 0.3 (wrong), 0.5 (right).

    (|1 - 1.9| + |0 - 0.3| + |1 - 0.5|) / 4 = 0.425.
    """
    judgement = Judgement(
        np.array([True, False, True, False]), np.array([0.95, 0.95, 0.5, 0.3])
    )
    assert calibration_error(judgement) == pytest.approx(0.425)
    sure = Judgement(np.array([True, False]), np.array([1.0, 1.0]))
    assert calibration_error(sure) == pytest.approx(0.5)


def test_confidence_is_the_highest_probability():
    logits = np.log(np.array([[0.2, 0.7, 0.1], [0.5, 0.1, 0.4]], np.float32)) + 3
    judgement = judge(logits, np.array([1, 2], np.int32))
    np.testing.assert_allclose(judgement.confidence, [0.7, 0.5], rtol=1e-6)
    assert judgement.correct.tolist() == [True, False]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_wrong(value):
    """The arg max of NaN is class 0, and the broken value may stand anywhere."""
    logits = np.array([[value] * 3, [9, value, 0], [9, 0, 0]], np.float32)
    judgement = judge(logits, np.zeros(3, np.int32))
    assert judgement.correct.tolist() == [False, False, True]
    assert np.isnan(judgement.confidence).tolist() == [True, True, False]
    assert calibration_error(judgement) is None
