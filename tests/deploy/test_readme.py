"""What deploy/README.md says of the service is so."""

import re

from serve.contract.errors import FocalPathError
from serve.service import error_answers
from serve.service.telemetry import Telemetry
from tests.support import ROOT
from tests.support.deployed import DEPLOY, metrics_in, metrics_of

README = (DEPLOY / "README.md").read_text(encoding="utf-8")


def test_every_code_that_the_service_answers_is_in_its_table() -> None:
    table = set(re.findall(r"`([a-z_]+)`", README.partition("## Errors")[2].partition("\n## ")[0]))
    answered = {error_answers.INTERNAL_CODE, "http_invalid", *error_answers._CODES.values()}
    answered |= {kind.code for kind in _kinds(FocalPathError)}
    for room in ("contract", "images", "inference", "service"):
        for path in (ROOT / "serve" / room).rglob("*.py"):
            if path.name == "start.py":  # its errors end the command line
                continue
            answered |= set(re.findall(r'\bcode="([a-z_]+)"', path.read_text(encoding="utf-8")))
    never = {"failed", "setting_invalid"}  # the command line's
    assert answered - never <= table


def test_its_table_of_metrics_has_every_one_of_the_service_and_no_other() -> None:
    table = README.partition("## Metrics")[2].partition("\nWatch at least")[0]
    assert metrics_in([table], "focalpath_") == metrics_of(Telemetry().render().decode())


def _kinds(kind: type[FocalPathError]) -> set[type[FocalPathError]]:
    own = {one for one in kind.__subclasses__() if one.__module__ == "serve.contract.errors"}
    return own.union(*(_kinds(one) for one in own))
