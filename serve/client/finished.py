"""Which images are finished already: their files exist, made by the same model in the same way.

The JSON of an image records how its files were made. It is written last, so that it also says that
the other files are complete.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.answers.registry import FORMATS
from serve.contract.errors import SettingsError
from serve.contract.manifest import Manifest, sha256_of
from serve.contract.tables import is_other_file
from serve.inference.summary import Summary

SUMMARY_FILE = "summary.csv"
RECORD_FORMAT = "json"
"""The format that is always written, last."""
_MAX_NAME_BYTES = 255
"""Of a file, on the usual file systems."""
_CHECKPOINT = "checkpoint_sha256"
_MADE_WITH = "made_with"
"""Field of an image's JSON, besides those of the service's answer."""


@dataclass(frozen=True)
class Recipe:
    """How the files of an image are made, besides the model."""

    formats: Sequence[str]
    """Names of the formats; the last is `RECORD_FORMAT`."""
    options: Mapping[str, Any]
    """All options that the files depend on, as JSON values."""

    def outputs(self, image: Path, out: Path) -> list[Path]:
        """The files of an image in the folder of outputs, in the order of `formats`."""
        return [out / f"{image.stem}{FORMATS[name].suffix}" for name in self.formats]

    def refuse_overwriting(self, images: Sequence[Path], out: Path, *, again: bool) -> None:
        """Raise SettingsError where an output cannot be, or would replace what is not its own.

        That is a file of the user's, an image, or the output of another image.

        Args:
            images: all image files.
            out: the folder of the outputs.
            again: files in it may be replaced, the images themselves still not.
        """
        if not again and is_other_file(out / SUMMARY_FILE, ("image", "label")):
            raise SettingsError(
                f"{out / SUMMARY_FILE} exists, and was not made by this command. Give --out "
                "another folder, or --again to replace it; nothing was segmented."
            )
        out = out.resolve()
        places = {image.parent.resolve() / image.name: image for image in images}
        # A run that was killed may have left files of an image without its record.
        made = {image: _is_ours(self.outputs(image, out)[-1]) for image in images}
        is_our_folder = any(made.values())
        writers: dict[Path, Path] = {}
        for image in images:
            outputs = self.outputs(image, out)
            for output in outputs:
                if len(output.name.encode()) > _MAX_NAME_BYTES:
                    raise SettingsError(
                        f"{image} has too long a name: its output {output.name} would have more "
                        f"than {_MAX_NAME_BYTES} bytes. Rename it; nothing was segmented."
                    )
                if output in places:
                    raise SettingsError(
                        f"{places[output]} is an image to segment, and would be overwritten by the "
                        f"output of {image}. Give --out another folder; nothing was segmented."
                    )
                if output in writers:
                    raise SettingsError(
                        f"{writers[output]} and {image} would both have the output {output.name}. "
                        "Rename one, or segment them into different folders with --out; nothing "
                        "was segmented."
                    )
                writers[output] = image
            if not again and not made[image]:
                for output in filter(Path.exists, outputs[-1:] if is_our_folder else outputs):
                    raise SettingsError(
                        f"{output} exists, and nothing here tells that this command made it. Give "
                        "--out another folder, or --again to replace it; nothing was segmented."
                    )

    def record(self, image_sha256: str, document: bytes, manifest: Manifest) -> bytes:
        """Add to the JSON of an image how its files were made.

        Args:
            image_sha256: of the image file.
            document: the JSON.
            manifest: of the model that made them. Its version is a name that may be given twice.
        """
        made_with = {**self._of(image_sha256), _CHECKPOINT: manifest.checkpoint_sha256}
        fields = json.loads(document) | {_MADE_WITH: made_with}
        return json.dumps(fields, indent=2, ensure_ascii=False).encode()

    def finished(self, image: Path, out: Path, manifest: Manifest) -> Summary | None:
        """The summary of a finished image; None if any of its files must be made.

        Args:
            image: the image file.
            out: the folder of the outputs.
            manifest: of the model that would make them.
        """
        outputs = self.outputs(image, out)
        if not all(output.is_file() for output in outputs):
            return None
        try:
            wanted = self._of(sha256_of(image))
            content = json.loads(outputs[-1].read_bytes())
            found = content.pop(_MADE_WITH)
            summary = Summary.model_validate(content)
            formats = set(found.pop("formats"))
            checkpoint = found.pop(_CHECKPOINT, manifest.checkpoint_sha256)  # older ones lack it
        except (ValueError, LookupError, TypeError, AttributeError):  # not ours, or older
            return None
        except OSError:  # removed meanwhile: told of the image alone
            return None
        is_same = formats.issuperset(wanted.pop("formats")) and found == wanted
        model = summary.model
        is_same_model = (model.name, model.version, checkpoint) == (
            manifest.name,
            manifest.version,
            manifest.checkpoint_sha256,
        )
        return summary if is_same and is_same_model else None

    def _of(self, image_sha256: str) -> dict[str, Any]:
        return {
            "image_sha256": image_sha256,
            **self.options,
            "formats": list(self.formats),
        }


def _is_ours(record: Path) -> bool:
    """Whether a JSON is that of an image, also of an older version, or damaged."""
    try:
        content = json.loads(record.read_bytes())
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    return isinstance(content, dict) and content.keys() >= {"model", "image", "classes"}
