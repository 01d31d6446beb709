from serve.contract.markdown import markdown_table


def test_a_cell_with_a_bar_or_a_line_break_stays_one_cell() -> None:
    table = markdown_table(["Class", "Share"], [["gland | tumor\nlow", "0.10"]], align="lr")
    header, rule, row = table.splitlines()
    assert (header.count("|"), rule.count("|")) == (3, 3)
    assert r"gland \| tumor low" in row
    assert "0.10" in row  # as it was given
