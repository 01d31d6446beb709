"""What can go wrong while serving, one class for each answer that a caller can act on.

FocalPathError
├── BundleError          the bundle is damaged, incomplete or of another version
├── SettingsError        a setting cannot be read or is out of range
├── OptionError          an option of a request cannot be used (HTTP 400)
├── ImageError           the image of a request cannot be used (HTTP 400)
│   └── ImageTooLargeError   it is over the stated limit (HTTP 413)
└── BackendUnavailableError  the inference backend does not answer (HTTP 503)
    └── ModelChangedError    it answers, but with another model than the bundle's
"""


class FocalPathError(ValueError):
    """What the user can mend: the message says what was found, expected, and what to do."""


class BundleError(FocalPathError):
    """The bundle is damaged, incomplete or written for another version."""


class SettingsError(FocalPathError):
    """A setting is of the wrong type or out of range."""


class OptionError(FocalPathError):
    """An option of a request is unknown, absurd or out of range."""


class ImageError(FocalPathError):
    """The image of a request cannot be decoded or used."""


class ImageTooLargeError(ImageError):
    """The image of a request is over the stated limit of bytes or pixels."""


class BackendUnavailableError(FocalPathError):
    """The inference backend does not answer."""


class ModelChangedError(BackendUnavailableError):
    """The inference backend serves another model, or version of it, than when it was opened."""
