"""A block of raw lines becomes usable rows, and rejected ones with their reasons and places."""

import polars as pl
import pytest
from fleetcast.traces.raw import Table, parse

TABLE = Table(
    name="usage",
    columns={"machine": pl.String, "time": pl.Int64, "cpu": pl.Float32, "status": pl.String},
    rejects={"machine is empty": pl.col("machine").is_null(), "time is negative": pl.col("time") < 0},
    invalid={"cpu": ~pl.col("cpu").is_between(0, 100)},
    products=lambda frame, binning: {},
)


def rejects(block: bytes) -> list[tuple[int, str, str]]:
    return parse(block, TABLE).rejected.select("offset", "reason", "line").rows()


def test_clean_lines_become_typed_rows_and_empty_fields_null():
    parsed = parse(b"m_1,10,1.5,up\nm_2,20,,\n", TABLE)
    assert parsed.frame.rows() == [("m_1", 10, 1.5, "up"), ("m_2", 20, None, None)]
    assert parsed.frame.schema == pl.Schema(TABLE.columns)
    assert (parsed.rows, parsed.invalid, parsed.rejected.height) == (2, {}, 0)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"m_1,10,1", "3 columns, expected 4"),
        (b"m_1,10,1,up,more", "5 columns, expected 4"),
        (b"", "1 columns, expected 4"),
        (b"m_1,ten,1,up", "time is not a whole number"),
        (b"m_1,1.5,1,up", "time is not a whole number"),
        (b"m_1,99999999999999999999,1,up", "time is not a whole number"),
        (b'm_1,10,"1",up', "cpu is not a number"),
        (b"m_1,10,much,up", "cpu is not a number"),
        (b"m_\xff,10,1,up", "not UTF-8"),
        (b",10,1,up", "machine is empty"),
        (b"m_1,-1,1,up", "time is negative"),
        (b",-1,1,up", "machine is empty"),
    ],
)
def test_a_row_that_cannot_be_used_is_kept_with_its_reason_place_and_text(line, reason):
    before, after = b"m_1,10,1,up\n", b"m_3,30,3,up\n"
    parsed = parse(before + line + b"\n" + after, TABLE)
    text = line.decode(errors="backslashreplace")
    assert parsed.rejected.rows() == [(len(before), reason, text)]
    assert parsed.frame["machine"].to_list() == ["m_1", "m_3"]
    assert parsed.rows == 3


def test_rows_of_both_kinds_of_fault_come_in_the_order_of_the_file():
    block = b",1,1,up\nm_1,x,1,up\nm_1,-5,1,up\nm_1,1,1,up\nm_1\n"
    assert rejects(block) == [
        (0, "machine is empty", ",1,1,up"),
        (8, "time is not a whole number", "m_1,x,1,up"),
        (19, "time is negative", "m_1,-5,1,up"),
        (42, "1 columns, expected 4", "m_1"),
    ]


def test_too_many_and_too_few_commas_do_not_cancel_out():
    parsed = parse(b"m_1,10,1\nm_2,20,2,up,x\n", TABLE)
    assert parsed.frame.is_empty()
    assert parsed.rejected["reason"].to_list() == ["3 columns, expected 4", "5 columns, expected 4"]


@pytest.mark.parametrize("bad", [b"", b"broken\n"])
def test_windows_line_ends_a_missing_last_line_end_and_quotes_are_read(bad):
    """Quotes are text: the sources have none, and one in a name must not swallow the lines after it."""
    parsed = parse(bad + b'm_1,10,1,up\r\n"m_2,20,,\r\nm_3,30,3,dow"n', TABLE)
    assert parsed.frame.rows() == [("m_1", 10, 1, "up"), ('"m_2', 20, None, None), ("m_3", 30, 3, 'dow"n')]


@pytest.mark.parametrize(
    "field", ["1", " 1", "\t1", "1 ", "+1", "-1", "1.0", ".5", "1e2", "nan", "-inf", "", "\r", "0x1", "1_0"]
)
@pytest.mark.parametrize("column", range(4))
def test_a_row_means_the_same_whatever_its_neighbours(field, column):
    """A fault elsewhere in the block sends it through the other parser; what a row is must not change."""
    fields = ["m_1", "10", "1", "up"]
    fields[column] = field
    row = ",".join(fields).encode() + b"\n"
    alone, beside = parse(row, TABLE), parse(row + b"broken\n", TABLE)
    assert beside.frame.equals(alone.frame)
    assert beside.rejected.rows()[:-1] == alone.rejected.rows()
    assert beside.invalid == alone.invalid


def test_impossible_values_are_counted_by_column_and_only_in_usable_rows():
    parsed = parse(b"m_1,1,101,up\nm_1,2,-1,up\nm_1,3,nan,up\nm_1,4,100,up\nm_1,5,,up\n,6,101,up\n", TABLE)
    assert parsed.invalid == {"cpu": 3}
    assert parsed.rows == 6
    assert parsed.rejected.height == 1
