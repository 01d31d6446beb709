"""What of annotations does not arrive in a data set as meant, to warn about."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Lost:
    """Areas and slides of which nothing is left, and areas that lie in part outside their slide."""

    beyond: list[str] = field(default_factory=list)
    """Areas that reach far beyond their slide."""
    hidden: list[str] = field(default_factory=list)
    """Areas that others cover."""
    tiny: list[str] = field(default_factory=list)
    """Areas that cover the centre of no pixel."""
    slides: list[str] = field(default_factory=list)
    """Slides that give no tile."""
    other_mpp: list[str] = field(default_factory=list)
    """Slides that state another um per pixel than was given for those that state none."""
    has_region: bool = False
    """Whether the slide at work gives a tile."""
    _names: set[str] = field(default_factory=set)
    _reached: set[str] = field(default_factory=set)
    _left: set[str] = field(default_factory=set)

    def begin_slide(self) -> None:
        """Forget the areas of the slide before."""
        self.has_region = False
        self._names, self._reached, self._left = set(), set(), set()

    def add_chunk(self, names: set[str], reached: set[str], gone: set[str]) -> None:
        """Note the areas of a chunk: all, those that reach a pixel, and those that are covered."""
        self._names |= names
        self._reached |= reached
        self._left |= reached - gone

    def end_slide(self, name: str) -> None:
        """Note what is missing of a slide."""
        self.hidden += sorted(self._reached - self._left)
        self.tiny += sorted(self._names - self._reached)
        if not self.has_region:
            self.slides.append(name)

    def warnings(self) -> list[str]:
        """One sentence per kind of loss."""
        kinds = [
            (
                self.other_mpp,
                "slides, {}, state another um per pixel than --source-mpp. Theirs counts.",
            ),
            (
                self.beyond,
                "areas, {}, reach far beyond their slide. Are they of another slide, or drawn at "
                "another scale?",
            ),
            (
                self.hidden,
                "areas, {}, are completely covered by later ones. To draw smaller areas on top, "
                "use --overlap area.",
            ),
            (
                self.tiny,
                "areas, {}, are smaller than a pixel of the tiles, so nothing is left of them. "
                "Remove them, or choose a smaller --mpp.",
            ),
            (
                self.slides,
                "slides, {}, give no tile: nothing of them is labelled. Draw areas, or set "
                "uncovered in the mapping.",
            ),
        ]
        return [f"{len(names)} {text.format(_first(names))}" for names, text in kinds if names]


def _first(names: Sequence[str]) -> str:
    return f"such as {names[0]}"
