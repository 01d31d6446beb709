import ast

import pytest

from tests.support import ROOT
from train import errors as train_errors


def _makes_plain_error(node: ast.AST) -> bool:
    """Whether the node makes the base class itself, which says nothing about the kind."""
    made = (
        node.func
        if isinstance(node, ast.Call)
        else node.exc
        if isinstance(node, ast.Raise)
        else None
    )
    return isinstance(made, ast.Name | ast.Attribute) and ast.unparse(made).split(".")[-1] == (
        "FocalPathError"
    )


@pytest.mark.parametrize("package", ["train", "export"])
def test_every_error_is_of_a_kind(package: str):
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 30
    plain = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call | ast.Raise) and _makes_plain_error(node)
    ]
    assert not plain


@pytest.mark.parametrize(
    ("source", "is_plain"),
    [
        ("raise FocalPathError('text')", True),
        ("raise errors.FocalPathError('text')", True),
        ("raise FocalPathError", True),
        ("error = FocalPathError('text')", True),
        ("raise SettingsError('text')", False),
        ("try: pass\nexcept FocalPathError: raise", False),
    ],
)
def test_the_search_for_plain_errors_finds_them(source: str, is_plain: bool):
    assert any(map(_makes_plain_error, ast.walk(ast.parse(source)))) == is_plain


def test_each_kind_has_a_code_of_its_own_and_the_module_lists_it():
    kinds = [
        kind
        for kind in vars(train_errors).values()
        if isinstance(kind, type) and issubclass(kind, train_errors.FocalPathError)
    ]
    assert len({kind.code for kind in kinds}) == len(kinds) > 12
    listed = [line.split() for line in str(train_errors.__doc__).splitlines()]
    for kind in kinds:
        assert any({kind.__name__, kind.code} <= set(words) for words in listed), kind
