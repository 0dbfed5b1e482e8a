"""Tables that survive editors and damage, a fair order, and the reliability of a ranking."""

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from data import records
from data.records import BASELINE, Scored, read_rows, write_csv
from utils import UserError


def made(count, generation=0):
    """Rows with numbers that need all their digits; each generation has the same choices."""
    rng, rows = random.Random(0), []
    for i in range(count):
        choice = tuple(rng.randrange(4) for _ in range(20))
        rows.append(Scored(i, choice, *(rng.uniform(0, 9) for _ in range(6)), generation))
    return rows


def write_rows(path, rows):
    write_csv(path, [row.as_json() for row in rows])


def test_rows_are_read_as_written_but_in_order(tmp_path):
    """To the last bit; an undefined score stays undefined. A failed write leaves the old table."""
    table, rows = tmp_path / "paths.csv", [*made(3, BASELINE), *made(3), *made(3, 1)]
    write_rows(table, random.Random(0).sample(rows, len(rows)))
    with pytest.raises(AttributeError):
        write_csv(table, [{"index": 1}, {"index": 2}, None])
    assert read_rows(table) == rows
    rows[4].loss = math.nan
    write_rows(table, rows)
    assert math.isnan(read_rows(table)[4].loss)


def test_a_table_saved_by_a_spreadsheet_is_read(tmp_path):
    """Byte-order mark, CRLF, a blank line, columns in reverse (timeseer-ai/kukur#279)."""
    table = tmp_path / "paths.csv"
    write_rows(table, made(4))
    header, *rows = [",".join(line.split(",")[::-1]) for line in table.read_text().splitlines()]
    table.write_bytes("\r\n".join(["\ufeff" + header, "", *rows, ""]).encode())
    assert read_rows(table) == made(4)


HEADER = "index,choice,accuracy,half_accuracy,loss,half_loss,flops_m,params_m,generation\n"
ROW = "3,0-1-2-3,5,5,1,1,9,2,0\n"
REFUSED = {
    "": " is another table: it has no column index",
    "epoch,lr\n1,0.1\n": " is another table: it has no column index",
    HEADER + ROW + ROW.replace("5,5", "fifty,5"): ", line 3: not a row",
    HEADER + "3,0-1-2-3\n": ", line 2: not a row",
    HEADER + ROW + "\n" + ROW.replace("3,0", "7,0"): ", line 4: repeats",  # blank lines count
}


@pytest.mark.parametrize(("content", "message"), REFUSED.items())
def test_a_damaged_or_another_table_is_refused_with_its_line(tmp_path, content, message):
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(UserError, match=rf"x\.csv{message}"):
        read_rows(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("by", "order"), [("accuracy", [4, 2, 0, 1, 3]), ("loss", [4, 0, 1, 3, 2])]
)
def test_the_best_come_first_then_by_the_other_score_then_by_age(by, order):
    """Baselines, scores that are not finite and a child that was also drawn are left out."""
    scores = [(60.0, 1.0, 0), (60.0, 1.0, 1), (60.5, 2.0, 0), (50.0, 1.0, 0), (60.5, 0.5, 2)]
    scores += [(90.0, 0.1, BASELINE), (90.0, math.nan, 0), (90.0, math.inf, 0)]
    rows = [Scored(i, (i,), a, loss=loss, generation=g) for i, (a, loss, g) in enumerate(scores)]
    again = [replace(row, generation=3) for row in rows[:3]]
    assert [row.index for row in records.best_first(again + rows, by)] == order


def test_a_smaller_search_leaves_out_the_rest_of_its_record():
    rows = [*made(2, BASELINE), *made(4), *made(2, 1), *made(2, 2)]
    kept = [*made(2, BASELINE), *made(3), *made(2, 1)]
    assert records.asked_for(rows, num_paths=3, generations=1) == kept


@pytest.mark.parametrize("by", ["accuracy", "loss"])
def test_the_reliability_is_the_share_of_the_true_variance(by):
    """Scores are a true value with independent noise on each half of the images."""
    rng = np.random.default_rng(0)
    halves = rng.normal(60, 1, 5000) + rng.normal(0, 1.5, (2, 5000))
    scores = zip(halves.mean(0), halves[0], strict=True)
    rows = [Scored(0, (), **{by: whole, f"half_{by}": half}) for whole, half in scores]
    trust, noise = records.reliability(rows, by)
    assert trust == pytest.approx(1 / (1 + 1.5**2 / 2), abs=0.03)
    assert noise == pytest.approx(1.5 / math.sqrt(2), abs=0.05)


@pytest.mark.parametrize(("count", "whole", "half"), [(9, 1, 1), (20, 0.5, 1), (20, 0.1, 1)])
def test_few_scores_or_halves_without_agreement_have_no_reliability(count, whole, half):
    """In the last two cases the second half is constant, or contrary to the first."""
    rows = [Scored(i, (), 50 + whole * i, 50 + half * i) for i in range(count)]
    assert records.reliability(rows, "accuracy") == (None, None)


def test_kendalls_tau_agrees_with_a_loop_over_pairs():
    """Concordant less discordant pairs, over the geometric mean of the pairs untied in each."""
    rng, five = np.random.default_rng(0), np.arange(5)
    for n in (3, 8, 20):
        points = rng.integers(6, size=(2, n)).astype(float)
        signs = np.sign([p - q for p, q in itertools.combinations(points.T, 2)])
        expected = signs.prod(1).sum() / math.sqrt(np.abs(signs).sum(0).prod())
        assert records.kendall(*points) == pytest.approx(expected)
    assert records.kendall(five, five) == 1 and records.kendall(five, -five) == -1
    assert math.isnan(records.kendall(np.ones(5), five))


def test_an_interval_of_tau_holds_about_95_of_100_truths():
    """Pairs with a correlation r of 1/2, for which tau is 2 asin(r) / pi = 1/3."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(100):
        pair = rng.normal(size=40) + rng.normal(size=(2, 40))
        low, high = records.kendall_interval(*pair, draws=200)
        hits += low <= 1 / 3 <= high
    assert 86 <= hits <= 100
