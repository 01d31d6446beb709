"""JSON that others wrote."""

import json
from typing import Any


def parse_json(text: str | bytes, **options: Any) -> Any:
    """`json.loads`, whose only errors are ValueErrors.

    Raises:
        json.JSONDecodeError: it is not JSON, or nested so deeply that Python gives up.
        ValueError: its encoding is wrong, or one of its numbers has thousands of digits.
    """
    try:
        return json.loads(text, **options)
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deeply", "", 0) from error
