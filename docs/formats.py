"""Writes docs/formats.md from the registry of answer formats: `python docs/formats.py`."""

from pathlib import Path

from serve.answers.registry import FORMATS

DOCUMENT = Path(__file__).with_suffix(".md")
_HEAD = """# Answer formats

One registry (`serve/answers/registry.py`) holds them all. Routes, OpenAPI, `/batch`,
`focalpath-segment --format` and the page's downloads derive from it, and so does this table, which
`python docs/formats.py` writes.

| `--format` | route | file | in `/batch` | options | |
|---|---|---|---|---|---|
"""


def text() -> str:
    """The document."""
    rows = [
        " | ".join(
            (
                f"| `{entry.name}`" if entry.as_file else "| ",
                f"`POST {entry.path}`",
                f"`NAME{entry.suffix}`" if entry.as_file else "",
                "yes" if entry.in_batch else "",
                ", ".join(f"`{name}`" for name in entry.options.model_fields),
                f"{entry.description} |",
            )
        )
        for entry in FORMATS.values()
    ]
    return _HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(text(), encoding="utf-8")
