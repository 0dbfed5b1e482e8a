"""Tables that survive editors and damage, a fair order, and the reliability of a ranking."""

import itertools
import math
import random

import numpy as np
import pytest

from data import records
from data.records import BASELINE, METRICS, Scored, read_rows, write_csv, write_rows
from utils import UserError


def made(count, generation=0):
    """Rows with numbers that need all their digits; no two have the same choice."""
    rng, rows = random.Random(generation), []
    for i in range(count):
        choice = tuple(rng.randrange(4) for _ in range(20))
        rows.append(Scored(i, choice, *(rng.uniform(0, 9) for _ in range(6)), generation))
    return rows


@pytest.fixture
def table(tmp_path):
    """A table of four rows."""
    write_rows(tmp_path / "paths.csv", made(4))
    return tmp_path / "paths.csv"


def test_rows_are_read_as_written_but_in_order(table):
    """To the last bit; a score that is not defined stays undefined."""
    rows = [*made(3, BASELINE), *made(3), *made(3, 1)]
    write_rows(table, random.Random(0).sample(rows, len(rows)))
    assert read_rows(table) == rows
    rows[4].loss = rows[4].half_loss = math.nan
    write_rows(table, rows)
    again = read_rows(table)
    assert math.isnan(again[4].loss) and again[4].accuracy == rows[4].accuracy
    assert again[5:] == rows[5:]


def test_a_failed_write_leaves_the_old_table(table):
    before = table.read_text()
    with pytest.raises(AttributeError):
        write_csv(table, [{"index": 1}, {"index": 2}, None], ["index"])
    assert table.read_text() == before


def test_a_table_saved_by_a_spreadsheet_is_read(table):
    """Byte-order mark, CRLF, a blank line, columns in reverse (timeseer-ai/kukur#279)."""
    header, *rows = [",".join(line.split(",")[::-1]) for line in table.read_text().splitlines()]
    table.write_bytes("\r\n".join(["\ufeff" + header, "", *rows, ""]).encode())
    assert read_rows(table) == made(4)


def test_a_repeated_row_is_refused_with_its_line(table):
    """A choice may repeat in another generation; blank lines count."""
    *first, row, _, _ = table.read_text().splitlines()
    _, *rest = row.split(",")
    table.write_text("\n".join([*first, row, "", ",".join(["7", *rest]), ""]))
    with pytest.raises(UserError, match=r"paths\.csv, line 5: repeats"):
        read_rows(table)
    table.write_text("\n".join([*first, row, ",".join(["7", *rest[:-1], "-1"]), ""]))
    assert [row.generation for row in read_rows(table)] == [-1, 0, 0]


@pytest.mark.parametrize("damaged", ["3,{c},fifty,5,1,1,9,2,0", "1.5,{c},5,5,1,1,9,2,0", "3,{c}"])
def test_a_damaged_row_is_refused_with_its_line(table, damaged):
    lines = table.read_text().splitlines()
    lines.insert(3, damaged.format(c="-".join("0123" * 5)))
    table.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"paths\.csv, line 4: not a row"):
        read_rows(table)


@pytest.mark.parametrize("content", ["epoch,lr\n1,0.1\n", ""])
def test_another_table_is_refused_with_its_name(tmp_path, content):
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(UserError, match=r"x\.csv is another table: it has no column index"):
        read_rows(tmp_path / "x.csv")


def test_metrics_have_none_where_nothing_was_validated(tmp_path):
    rows = [dict.fromkeys(METRICS, 1.25), dict.fromkeys(METRICS, 2.5)]
    rows[1] |= {"val_loss": None, "val_acc": None}
    write_csv(tmp_path / "metrics.csv", rows, METRICS)
    assert records.read_metrics(tmp_path / "metrics.csv") == rows


ORDERS = [("accuracy", [4, 2, 0, 1, 3]), ("loss", [4, 0, 1, 3, 2])]


@pytest.mark.parametrize(("by", "order"), ORDERS)
def test_the_best_come_first_then_by_the_other_score_then_by_age(by, order):
    """Baselines and scores that are not finite are left out."""
    scores = [(60.0, 1.0, 0), (60.0, 1.0, 1), (60.5, 2.0, 0), (50.0, 1.0, 0), (60.5, 0.5, 2)]
    scores += [(90.0, 0.1, BASELINE), (90.0, math.nan, 0), (90.0, math.inf, 0)]
    rows = []
    for i, (accuracy, loss, generation) in enumerate(scores):
        rows.append(Scored(i, (i,), accuracy, loss=loss, generation=generation))
    assert [row.index for row in records.best_first(rows, by)] == order


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


UNRELIABLE = {"few": (9, 1, 1), "equal": (20, 0, 0), "a half equal": (20, 0.5, 1)}
UNRELIABLE |= {"contrary": (20, 0, 1)}


@pytest.mark.parametrize(("count", "whole", "half"), UNRELIABLE.values(), ids=UNRELIABLE)
def test_the_reliability_may_be_undefined(count, whole, half):
    rows = [Scored(i, (), 50 + whole * i, 50 + half * i) for i in range(count)]
    assert records.reliability(rows, "accuracy") == (None, None)


def test_kendalls_tau_agrees_with_a_loop_over_pairs():
    """Concordant less discordant pairs, over the geometric mean of the pairs untied in each."""
    rng, five = np.random.default_rng(0), np.arange(5)
    for n in (3, 8, 20):
        points = rng.integers(6, size=(2, n)).astype(float)
        signs = np.sign([p - q for p, q in itertools.combinations(points.T, 2)])
        untied = np.abs(signs).sum(0)
        expected = signs.prod(1).sum() / math.sqrt(untied.prod())
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
