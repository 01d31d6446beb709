from serve.contract.markdown import markdown_table


def test_a_cell_with_a_bar_or_a_line_break_stays_one_cell() -> None:
    table = markdown_table(["Class", "Share"], [["gland | tumor\nlow", "1.0"]], align="lr")
    header, rule, row = table.splitlines()
    assert (header.count("|"), rule.count("|")) == (3, 3)
    assert r"gland \| tumor low" in row


def test_numbers_are_written_as_they_are_given() -> None:
    assert "0.10" in markdown_table(["x"], [["0.10"]])
