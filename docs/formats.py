"""Writes docs/formats.md from the registry of answer formats: `python docs/formats.py`."""

from pathlib import Path

from serve.answers.registry import FORMATS

DOCUMENT = Path(__file__).with_suffix(".md")
_HEAD = """# Answer formats

What the service, `focalpath-segment` and the page answer for one image, and the options of each
answer. What comes out of whole slides is in [slides.md](slides.md#what-comes-out); what the numbers
mean is in [viewing.md](viewing.md#what-the-numbers-mean).

`POST /segment?mpp=0.25` states the um per pixel, as on all routes. `/batch` takes many images, or
zips of them, and answers one line of JSON for each, in their order; without `outputs` as `/segment`
does, and PNGs in base64:

```sh
curl -F images=@a.png -F images=@b.zip "http://127.0.0.1:3000/batch?outputs=json&outputs=labels"
```

`GET /model` has the classes, `GET /runtime` what the model runs on, and `POST /image` gives a
file's image as a PNG, for browsers that cannot show a TIFF. `/openapi.json` describes every route.

`python docs/formats.py` writes this page from the registry (`serve/answers/registry.py`). Routes,
OpenAPI, the command line and the page's downloads derive from it, too.

| `--format` | route | file | in `/batch` | options | |
|---|---|---|---|---|---|
"""
_OPTIONS = """
Options are parts of the address, such as `/overlay?alpha=0.4`, or flags, such as `--alpha 0.4`:

| option | meaning |
|---|---|
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
    options = {
        name: field.description
        for entry in FORMATS.values()
        for name, field in entry.options.model_fields.items()
    }
    meanings = [f"| `{name}` | {description} |" for name, description in options.items()]
    return _HEAD + "\n".join(rows) + "\n" + _OPTIONS + "\n".join(meanings) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(text(), encoding="utf-8")
