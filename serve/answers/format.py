"""What an answer format is: one entry from which every door derives how it offers the format.

The HTTP route and its query, OpenAPI, the outputs of /batch, `focalpath-segment --format` and its
options, the page's downloads and `docs/formats.md` all come from the entries in
`serve.answers.registry`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from serve.answers.frame import Frame
from serve.contract.errors import OptionError
from serve.contract.manifest import Manifest, TissueClass
from serve.contract.refusal import first_problem
from serve.contract.strict import Strict
from serve.inference.segmenter import Segmentation


@dataclass(frozen=True)
class Source:
    """What an answer is written from."""

    image: NDArray[np.uint8]
    """(H, W, 3) uint8, RGB in [0, 255], as it was segmented."""
    result: Segmentation
    manifest: Manifest
    """Of the model that made the result."""
    name: str = ""
    """Of the image's file; it may say where the image lies in its slide."""
    frame: Frame | None = None
    """Where the image lies in its slide, if that is known; it comes before the name."""


class Options(Strict):
    """The options of a format: each field is a query parameter and a flag.

    Every field has a default, a description, an example and, where it is a number, its bounds. A
    name that several formats use means the same in all of them.
    """

    @classmethod
    def of(cls, values: Mapping[str, object]) -> Self:
        """Take the options of this format out of the values of all options.

        Raises:
            OptionError: a value is of the wrong type or out of range.
        """
        try:
            return cls.model_validate({k: v for k, v in values.items() if k in cls.model_fields})
        except ValidationError as error:
            raise OptionError(f"{first_problem(error)}.") from error

    def check(self, manifest: Manifest) -> None:
        """Raise OptionError if the model cannot do what the options ask for."""


class ClassOptions(Options):
    """Which classes are shown."""

    classes: list[str] = Field(
        default_factory=list,
        description="names of the classes to show; by default all",
        examples=[["Tumor", "Stroma"]],
    )

    def check(self, manifest: Manifest) -> None:
        """Raise OptionError if a class is not one of the model's."""
        labels_of(self.classes, manifest.classes)

    def shown(self, manifest: Manifest) -> list[int] | None:
        """The labels of the classes to show; None: all.

        Raises:
            OptionError: a class is not one of the model's.
        """
        return labels_of(self.classes, manifest.classes) if self.classes else None


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """One way to hand out a segmentation."""

    name: str
    """For the command line, /batch and, with a slash before it, the HTTP route."""
    title: str
    """On the page's button."""
    kind: str
    """Of file, behind the title."""
    description: str
    """What the answer is; for people who read the OpenAPI document."""
    media_type: str
    suffix: str
    """Takes the place of the image's own, with its dot."""
    write: Callable[[Source, Any], bytes | Iterator[bytes]]
    """Writes the answer; block by block, where it may become too large to be held. What it refuses,
    it refuses before the first block. Its second argument is of the type `options`."""
    options: type[Options] = Options
    needs_probabilities: Callable[[Any], bool] = lambda _: False
    """Whether the result has to have the probabilities of all classes, for these options."""
    document: Any = None
    """The type of a JSON answer, for its schema; None where the answer is binary."""
    content: str = "OK"
    """What a binary answer holds."""
    route: str = ""
    """The path of the HTTP route, where it is not the name."""
    in_batch: bool = True
    """Whether /batch offers it; there a binary answer is in base64."""
    as_file: bool = True
    """Whether the page and the command line offer it to people as a file."""

    @property
    def path(self) -> str:
        """The path of the HTTP route."""
        return self.route or f"/{self.name}"

    def render(self, source: Source, values: Mapping[str, object]) -> bytes:
        """Write the answer as a whole; see `blocks`."""
        return b"".join(self.blocks(source, values))

    def blocks(self, source: Source, values: Mapping[str, object]) -> Iterator[bytes]:
        """Write the answer, block by block where it may be large.

        Args:
            source: what to write.
            values: of all options by name; those that the format does not have are ignored.

        Raises:
            OptionError: an option cannot be used.
            ImageTooLargeError: the result is too large for this format.
        """
        found = self.write(source, self.options.of(values))
        return iter((found,)) if isinstance(found, bytes) else found


def labels_of(names: Sequence[str], classes: Sequence[TissueClass]) -> list[int]:
    """The labels of classes by name.

    Raises:
        OptionError: a class is not one of the model's.
    """
    labels = {tissue.name: label for label, tissue in enumerate(classes, start=1)}
    for name in names:
        if name not in labels:
            raise OptionError(
                f"The model has no class {name!r}, only {', '.join(labels)}. Choose one of these."
            )
    return [labels[name] for name in names]
