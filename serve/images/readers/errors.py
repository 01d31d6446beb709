"""What can go wrong with a slide's file. Each error names the file."""

from serve.contract.errors import ImageError


class SlideError(ImageError):
    """The slide cannot be opened or used."""

    code = "slide_unusable"


class SlideFormatError(SlideError):
    """No reader takes the file: it is damaged, or of another kind."""

    code = "slide_format"


class SlideChannelsError(SlideError):
    """The slide is not brightfield RGB with 8 bits per channel."""

    code = "slide_channels"


class SlideScaleError(SlideError):
    """The slide has no believable um per pixel, and none was given."""

    code = "slide_scale"


class SlideReadError(SlideError):
    """A region of an open slide cannot be read."""

    code = "slide_region"


class ReaderMissingError(SlideError):
    """The named reader is unknown, or what it needs is not installed."""

    code = "slide_reader"
