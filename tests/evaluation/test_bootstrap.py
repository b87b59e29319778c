"""Block-bootstrap intervals: nominal coverage under 27-day correlation, where the i.i.d. one fails."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from solarchip_hf.evaluation.bootstrap import BootstrapInterval, block_bootstrap
from solarchip_hf.evaluation.flare_skill.skill_scores import contingency_table, table_scores


def tss(warned, observed):
    return table_scores(*contingency_table(warned, observed))["tss"]


def simulate(days, rng):
    """Daily warnings and flares whose odds share an effect within each solar rotation of 27 days, phase at random."""
    rotation = ((np.arange(days) + rng.uniform(0, 27)) // 27).astype(int)
    activity, error = rng.normal(size=(2, rotation[-1] + 1))[:, rotation]
    observed = rng.random(days) < 1 / (1 + np.exp(1.5 - 1.5 * activity))
    return activity + error > 0.7, observed


def test_coverage_is_nominal_where_the_independent_one_fails():
    rng = np.random.default_rng(1)
    days, trials = 1500, 150
    times = pd.date_range("2010-01-01", periods=days, freq="D")
    samples = [simulate(days, rng) for _ in range(trials)]
    many = [simulate(days, rng) for _ in range(1500)]
    truth = tss(np.concatenate([w for w, _ in many]), np.concatenate([y for _, y in many]))
    covered = {"27D": 0, None: 0}
    for trial, (warned, observed) in enumerate(samples):
        for block in covered:
            interval = block_bootstrap(
                tss, warned, observed, times=times, block=block, num_resamples=150, level=0.9, seed=trial
            )
            covered[block] += interval.low <= truth <= interval.high
    rates = {block: count / trials for block, count in covered.items()}
    assert 0.9 - 0.07 <= rates["27D"] <= 0.97  # nominal .9; three standard errors of 150 trials are .07
    assert rates[None] < 0.7


def test_independent_rows_agree_with_the_textbook():
    rng = np.random.default_rng(0)
    values = rng.normal(size=2000)
    times = pd.date_range("2012-01-01", periods=2000, freq="D")
    interval = block_bootstrap(np.mean, values, times=times, block=None, num_resamples=500)
    assert interval.standard_error == pytest.approx(values.std() / np.sqrt(2000), rel=0.1)
    assert interval.low < interval.estimate == values.mean() < interval.high
    blocks = block_bootstrap(np.mean, values, times=times, num_resamples=500, widen=False)
    assert blocks.standard_error == pytest.approx(interval.standard_error, rel=0.25)
    assert blocks.num_blocks == pytest.approx(2000 / 27, abs=0.01)


def test_resamples_keep_stretches_of_time_and_weigh_rows_alike():
    times = pd.date_range("2012-01-01", periods=270, freq="D")
    seen = np.zeros(270)
    lengths = []

    def watch(rows):
        lengths.append(len(rows))
        np.add.at(seen, rows, 1)
        steps = np.diff(rows)
        assert ((steps != 1) & (steps != -269)).sum() <= 9  # ten stretches of 27 days
        return float(rows.mean())

    block_bootstrap(watch, np.arange(270), times=times, num_resamples=400, widen=False)
    assert set(lengths[1:]) <= set(range(260, 281))  # a stretch between two midnights may lose or gain a row
    assert seen.min() > 0.75 * seen.mean()
    assert seen.max() < 1.25 * seen.mean()


def test_gaps_do_not_make_empty_resamples():
    # The first quarter of each of four years: nine months of nothing in between.
    times = pd.DatetimeIndex(np.concatenate([pd.date_range(f"{y}-01-01", f"{y}-03-31") for y in range(2011, 2015)]))
    sizes = []

    def size(values):
        sizes.append(len(values))
        return float(values.mean())

    interval = block_bootstrap(size, np.arange(len(times)) % 7, times=times, num_resamples=100, widen=False)
    assert min(sizes) > 0.9 * len(times)
    assert interval.num_blocks == pytest.approx(len(times) / 27, rel=0.02)


def test_order_of_rows_does_not_matter_and_seed_does():
    rng = np.random.default_rng(0)
    times = pd.date_range("2012-01-01", periods=600, freq="D")
    warned, observed = rng.random((2, 600)) < 0.3
    shuffle = rng.permutation(600)
    first = block_bootstrap(tss, warned, observed, times=times, num_resamples=50)
    again = block_bootstrap(tss, warned[shuffle], observed[shuffle], times=times[shuffle], num_resamples=50)
    assert first == again
    assert first != block_bootstrap(tss, warned, observed, times=times, num_resamples=50, seed=3)


def test_several_scores_and_a_paired_difference():
    rng = np.random.default_rng(0)
    times = pd.date_range("2012-01-01", periods=1000, freq="D")
    observed = rng.random(1000) < 0.3
    good = np.where(rng.random(1000) < 0.8, observed, ~observed)
    worse = np.where(rng.random(1000) < 0.1, ~good, good)

    def both(a, b, y):
        return {"good": tss(a, y), "worse": tss(b, y), "difference": tss(a, y) - tss(b, y)}

    intervals = block_bootstrap(both, good, worse, observed, times=times, num_resamples=200)
    assert set(intervals) == {"good", "worse", "difference"}
    assert intervals["difference"].low > 0
    assert intervals["difference"].width < intervals["good"].width + intervals["worse"].width
    alone = block_bootstrap(tss, good, observed, times=times, num_resamples=200)
    assert alone == intervals["good"]
    assert json.loads(json.dumps(alone.to_dict()))["block"] == "27D"
    assert str(alone).count(",") == 1


def test_undefined_resamples_are_counted():
    times = pd.date_range("2012-01-01", periods=540, freq="D")
    observed = np.zeros(540, dtype=bool)
    observed[100] = True  # one event: absent from about a third of the resamples
    interval = block_bootstrap(tss, observed, observed, times=times, num_resamples=300, widen=False)
    assert 50 < interval.undefined < 150
    assert interval.estimate == interval.low == interval.high == 1.0
    never = block_bootstrap(tss, observed, np.zeros(540, dtype=bool), times=times, num_resamples=20)
    assert np.isnan([never.estimate, never.low, never.high]).all()
    assert never.undefined == 20


def test_few_blocks_are_warned_about(caplog):
    times = pd.date_range("2012-01-01", periods=60, freq="D")
    assert isinstance(block_bootstrap(np.mean, np.arange(60), times=times, num_resamples=10), BootstrapInterval)
    assert "2.2 blocks" in caplog.text


def near_the_top(days=200):
    """A forecast that misses two events of many: of few blocks, so that the interval is stretched far."""
    times = pd.date_range("2012-01-01", periods=days, freq="D")
    observed = np.arange(days) % 3 == 0
    warned = observed.copy()
    warned[[30, 150]] = False
    return warned, observed, times


def test_an_interval_ends_at_the_bounds_of_its_score():
    warned, observed, times = near_the_top()

    def scores(warned, observed):
        pod = table_scores(*contingency_table(warned, observed))["pod"]
        return {"pod": pod, "miss": 1 - pod, "bare": pod}

    free = block_bootstrap(scores, warned, observed, times=times, num_resamples=200)
    assert free["pod"].high > 1.0
    assert free["miss"].low < 0.0
    bounds = {"pod": (0.0, 1.0), "miss": (0.0, np.inf)}
    ended = block_bootstrap(scores, warned, observed, times=times, num_resamples=200, bounds=bounds)
    assert ended["pod"] == replace(free["pod"], high=1.0)
    assert ended["miss"] == replace(free["miss"], low=0.0)
    assert ended["bare"] == free["bare"]
    one = block_bootstrap(tss, warned, observed, times=times, num_resamples=200, bounds=(-1, 1))
    assert (one.low, one.high) == (block_bootstrap(tss, warned, observed, times=times, num_resamples=200).low, 1.0)


def test_bounds_change_nothing_of_an_interval_within_them():
    rng = np.random.default_rng(0)
    times = pd.date_range("2012-01-01", periods=600, freq="D")
    warned, observed = rng.random((2, 600)) < 0.3
    free = block_bootstrap(tss, warned, observed, times=times, num_resamples=50)
    assert free == block_bootstrap(tss, warned, observed, times=times, num_resamples=50, bounds=(-1, 1))


def test_bad_arguments():
    times = pd.date_range("2012-01-01", periods=3, freq="D")
    with pytest.raises(ValueError, match="as many rows as times"):
        block_bootstrap(np.mean, [1, 2], times=times)
    with pytest.raises(ValueError, match="level"):
        block_bootstrap(np.mean, [1, 2, 3], times=times, level=95)
    for block in ("0D", 27, "foo"):  # a bare number would count nanoseconds
        with pytest.raises(ValueError, match="block: expected a positive time"):
            block_bootstrap(np.mean, [1, 2, 3], times=times, block=block)
