"""data/records.py: tables that survive editors and damage, an order that is fair, and what a ranking is worth."""

import itertools
import math
import random
from pathlib import Path

import numpy as np
import pytest

from data.records import (
    BASELINE,
    METRICS,
    Scored,
    best_first,
    kendall,
    kendall_interval,
    read_metrics,
    read_rows,
    reliability,
    write_csv,
    write_rows,
)
from utils import UserError


def made(count: int, generation: int = 0) -> list[Scored]:
    """Rows with numbers that need all their digits; no two have the same choice."""
    rng = random.Random(generation)
    choices = [tuple(rng.randrange(4) for _ in range(20)) for _ in range(count)]
    scores = [[rng.uniform(0, 9) for _ in range(6)] for _ in range(count)]
    return [
        Scored(i, choice, *score, generation)
        for i, (choice, score) in enumerate(zip(choices, scores, strict=True))
    ]


@pytest.fixture
def lines(tmp_path: Path) -> list[str]:
    """A table of four rows, line by line."""
    write_rows(tmp_path / "paths.csv", made(4))
    return (tmp_path / "paths.csv").read_text().splitlines()


def test_rows_are_read_as_they_were_written_but_in_order(tmp_path: Path) -> None:
    """To the last bit; a score that is not defined stays so."""
    rows = [*made(3, BASELINE), *made(3), *made(3, 1)]
    write_rows(tmp_path / "paths.csv", random.Random(0).sample(rows, len(rows)))
    assert read_rows(tmp_path / "paths.csv") == rows
    rows[4].loss = rows[4].half_loss = math.nan
    write_rows(tmp_path / "paths.csv", rows)
    again = read_rows(tmp_path / "paths.csv")
    assert (
        math.isnan(again[4].loss)
        and again[4].accuracy == rows[4].accuracy
        and again[5:] == rows[5:]
    )


def test_a_table_is_replaced_only_by_a_whole_one(tmp_path: Path, lines: list[str]) -> None:
    """A write that fails at its third row leaves the old table."""
    with pytest.raises(AttributeError):
        write_csv(tmp_path / "paths.csv", [{"index": 1}, {"index": 2}, None], ["index"])
    assert (tmp_path / "paths.csv").read_text().splitlines() == lines


def test_a_table_that_a_spreadsheet_saved_is_read(tmp_path: Path, lines: list[str]) -> None:
    """A byte-order mark, Windows line ends, a blank line and the columns in another order."""
    swapped = [",".join(line.split(",")[::-1]) for line in lines]
    (tmp_path / "paths.csv").write_bytes(
        ("\r\n".join(["\ufeff" + swapped[0], "", *swapped[1:], ""])).encode()
    )
    assert read_rows(tmp_path / "paths.csv") == made(4)


def test_a_repeated_row_is_refused_with_its_line(tmp_path: Path, lines: list[str]) -> None:
    """By generation and choice: a baseline may be drawn at random too. Blank lines count."""
    cells = lines[2].split(",")
    (tmp_path / "paths.csv").write_text(
        "\n".join([*lines[:3], "", ",".join(["7", *cells[1:]]), ""])
    )
    with pytest.raises(UserError, match=r"paths\.csv, line 5: repeats"):
        read_rows(tmp_path / "paths.csv")
    (tmp_path / "paths.csv").write_text("\n".join([*lines[:3], ",".join([*cells[:-1], "-1"]), ""]))
    assert [row.generation for row in read_rows(tmp_path / "paths.csv")] == [-1, 0, 0]


@pytest.mark.parametrize("damaged", ["3,{c},fifty,5,1,1,9,2,0", "1.5,{c},5,5,1,1,9,2,0", "3,{c}"])
def test_a_damaged_row_is_refused_with_its_line(
    tmp_path: Path, lines: list[str], damaged: str
) -> None:
    damaged = damaged.format(c="-".join("0123" * 5))
    (tmp_path / "paths.csv").write_text("\n".join([*lines[:3], damaged, lines[3]]))
    with pytest.raises(UserError, match=r"paths\.csv, line 4: not a row"):
        read_rows(tmp_path / "paths.csv")


@pytest.mark.parametrize("content", ["epoch,lr\n1,0.1\n", ""])
def test_another_table_is_refused_with_its_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(UserError, match=r"x\.csv is another table: it has no column index"):
        read_rows(tmp_path / "x.csv")


def test_metrics_have_none_where_nothing_was_validated(tmp_path: Path) -> None:
    rows = [
        dict.fromkeys(METRICS, 1.25),
        dict.fromkeys(METRICS, 2.5) | {"val_loss": None, "val_acc": None},
    ]
    write_csv(tmp_path / "metrics.csv", rows, METRICS)
    assert read_metrics(tmp_path / "metrics.csv") == rows


@pytest.mark.parametrize(
    ("by", "order"), [("accuracy", [4, 2, 0, 1, 3]), ("loss", [4, 0, 1, 3, 2])]
)
def test_the_best_come_first_then_by_the_other_score_then_by_age(by: str, order: list[int]) -> None:
    """Neither a baseline nor a score that is not defined comes at all."""
    scores = [(60.0, 1.0, 0), (60.0, 1.0, 1), (60.5, 2.0, 0), (50.0, 1.0, 0), (60.5, 0.5, 2)]
    scores += [(90.0, 0.1, BASELINE), (90.0, math.nan, 0), (90.0, math.inf, 0)]
    rows = [
        Scored(i, (i,), a, loss=loss, generation=generation)
        for i, (a, loss, generation) in enumerate(scores)
    ]
    assert [row.index for row in best_first(rows, by)] == order


@pytest.mark.parametrize("by", ["accuracy", "loss"])
def test_the_reliability_is_that_of_parallel_halves(by: str) -> None:
    """Scores made of a true value and independent noise on each half: the formula finds the share of the truth."""
    rng = np.random.default_rng(0)
    halves = rng.normal(60, 1, 5000) + rng.normal(0, 1.5, (2, 5000))
    rows = [
        Scored(0, (), **{by: a, f"half_{by}": h})
        for a, h in zip(halves.mean(0), halves[0], strict=True)
    ]
    trust, noise = reliability(rows, by)
    assert trust == pytest.approx(1 / (1 + 1.5**2 / 2), abs=0.03)
    assert noise == pytest.approx(1.5 / math.sqrt(2), abs=0.05)


@pytest.mark.parametrize(
    ("count", "accuracy", "half"),
    [(9, 1.0, 1.0), (20, 0.0, 0.0), (20, 0.5, 1.0), (20, 0.0, 1.0)],
    ids=["few", "equal", "a half equal", "contrary"],
)
def test_a_ranking_without_reliability_is_said_to_have_none(
    count: int, accuracy: float, half: float
) -> None:
    rows = [
        Scored(i, (), accuracy=50 + accuracy * i, half_accuracy=50 + half * i) for i in range(count)
    ]
    assert reliability(rows, "accuracy") == (None, None)


def naive_kendall(first: np.ndarray, second: np.ndarray) -> float:
    """Pair by pair: concordant less discordant, over the geometric mean of the pairs that are not tied in each."""
    agree, untied = 0, [0, 0]
    for i, j in itertools.combinations(range(len(first)), 2):
        signs = [np.sign(values[i] - values[j]) for values in (first, second)]
        agree += signs[0] * signs[1]
        untied = [count + abs(sign) for count, sign in zip(untied, signs, strict=True)]
    return agree / math.sqrt(untied[0] * untied[1])


def test_kendalls_tau_is_that_of_a_loop_over_pairs() -> None:
    rng = np.random.default_rng(0)
    for n in (3, 8, 20):
        first, second = rng.integers(6, size=(2, n)).astype(float)
        assert kendall(first, second) == pytest.approx(naive_kendall(first, second))
    assert kendall(np.arange(5), np.arange(5)) == 1 and kendall(np.arange(5), -np.arange(5)) == -1
    assert math.isnan(kendall(np.ones(5), np.arange(5)))


def test_an_interval_of_tau_holds_about_95_of_100_truths() -> None:
    """Pairs of which half of the variance is shared; Kendall's tau is then 2 asin(r) / pi with r = 1/2, so 1/3."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(100):
        shared = rng.normal(size=40)
        low, high = kendall_interval(*(shared + rng.normal(size=40) for _ in range(2)), draws=200)
        hits += low <= 1 / 3 <= high
    assert 86 <= hits <= 100
