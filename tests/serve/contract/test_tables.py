"""Tables as spreadsheets save them."""

from pathlib import Path

import pytest

from serve.contract.tables import TableError, read_table

ROWS = [
    (2, {"name": "Größe, groß", "mpp": "0.25"}),
    (4, {"name": "b", "mpp": ""}),
]


@pytest.mark.parametrize(
    "content",
    [
        'name,mpp\n"Größe, groß",0.25\n\nb\n'.encode(),
        'name , mpp\r\n"Größe, groß", 0.25\r\n,\r\nb,\r\n'.encode("utf-8-sig"),
        "name;mpp;;\r\nGröße, groß;0,25;;\r\n;;;\r\nb;;;\r\n".encode(),  # of a German Excel
        "name\tmpp\nGröße, groß\t0,25\n\t\nb\n".encode("utf-16"),
        ',name,mpp\n0,"Größe, groß",0.25\n,,\n1,b,\n'.encode(),  # with the index of pandas
    ],
)
def test_a_table_is_read_as_spreadsheets_save_it(tmp_path: Path, content: bytes):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    assert list(read_table(path).records()) == ROWS


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"name\nGr\xf6\xdfe\n", "UTF-8"),
        (b'name,mpp\n"a,0.25\nb,0.5\n', "line 3"),
        (b"name,mpp\na, b,0.25\n", "line 2"),
        (b"name,mpp,\na, b,0.25\n", "line 2"),
        (b"name,fold,mpp,fold\na,1,0.5,-1\n", "2 columns called fold"),
        (b"sep=;\nname;mpp\na;b;0,25\n", "line 3"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, content: bytes, named: str):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(TableError, match=named):
        list(read_table(path).records())


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_first_line_may_tell_the_separator(tmp_path: Path, separator: str):
    lines = ["a,b;c", "1,5;2"] if separator == "\t" else ["a\tb"]
    cells = [line.replace(separator, "") for line in lines]
    path = tmp_path / "table.csv"
    path.write_text(f"sep={separator}\r\nname{separator}mpp\r\n{cells[0]}{separator}0.5\r\n")
    assert list(read_table(path).records()) == [(3, {"name": cells[0], "mpp": "0.5"})]


def test_several_columns_in_the_middle_may_have_no_name(tmp_path: Path):
    path = tmp_path / "table.csv"
    path.write_text("name,,,mpp\na,x,y,0.5\n")
    assert read_table(path).columns == ("name", "", "", "mpp")


def test_an_empty_file_has_no_columns(tmp_path: Path):
    (tmp_path / "table.csv").touch()
    table = read_table(tmp_path / "table.csv")
    assert (table.columns, table.rows) == ((), ())
