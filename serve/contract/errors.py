"""What can go wrong while serving: one class, and one stable code, for each kind.

A program tells errors apart by `code`, which stays the same between versions. The message is for
people, and its words may change. The service answers the HTTP status in brackets.

FocalPathError                   failed               [503]
├── BundleError                  bundle_unusable      [503]
├── SettingsError                setting_invalid
├── AccessError                  key_refused          [401]
├── FormError                    form_invalid         [400]
├── OptionError                  option_invalid       [400]
├── ImageError                   image_unusable       [400]
│   └── ImageTooLargeError       image_too_large      [413]
├── UploadTooLargeError          upload_too_large     [413]
├── UploadTooSlowError           upload_too_slow      [408]
├── NotFoundError                not_found            [404]
├── BusyError                    busy                 [429]
├── TookTooLongError             took_too_long        [504]
└── BackendUnavailableError      backend_unavailable  [503]
    ├── BackendUnreachableError  backend_unavailable  [503]
    └── ModelChangedError        model_changed        [503]
"""


class FocalPathError(Exception):
    """An error that the user can fix: it says what was found, what was expected, what to do.

    It is not a ValueError, which pydantic and tyro catch.

    Args:
        message: for people.
        code: a more precise code than the class's own.
    """

    code = "failed"
    """Names the kind of error for programs."""

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class BundleError(FocalPathError):
    """The bundle is damaged, incomplete or written for another version."""

    code = "bundle_unusable"


class SettingsError(FocalPathError):
    """A setting is of the wrong type or out of range."""

    code = "setting_invalid"


class AccessError(FocalPathError):
    """The request has no API key, or one that the service does not know."""

    code = "key_refused"


class FormError(FocalPathError):
    """The body of a request is not the form that the endpoint takes."""

    code = "form_invalid"


class OptionError(FocalPathError):
    """An option of a request is unknown, of the wrong type or out of range."""

    code = "option_invalid"


class ImageError(FocalPathError):
    """The image of a request cannot be decoded or used."""

    code = "image_unusable"


class ImageTooLargeError(ImageError):
    """The image of a request is over the limit of bytes or pixels."""

    code = "image_too_large"


class UploadTooLargeError(FocalPathError):
    """The body of a request is over the limit of bytes."""

    code = "upload_too_large"


class UploadTooSlowError(FocalPathError):
    """The body of a request stopped arriving."""

    code = "upload_too_slow"


class NotFoundError(FocalPathError):
    """What a request names does not exist."""

    code = "not_found"


class BusyError(FocalPathError):
    """Too many requests are waiting already.

    Args:
        message: for people.
        code: a more precise code than the class's own.
        retry_after_s: seconds after which it is worth to try again.
    """

    code = "busy"

    def __init__(self, message: str, *, code: str | None = None, retry_after_s: int = 1) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class TookTooLongError(FocalPathError):
    """The work on a request took longer than the service allows."""

    code = "took_too_long"


class BackendUnavailableError(FocalPathError):
    """The inference backend does not answer."""

    code = "backend_unavailable"


class BackendUnreachableError(BackendUnavailableError):
    """There is no connection to the inference backend: it is not running, or it restarts."""


class ModelChangedError(BackendUnavailableError):
    """The inference backend serves another model, or another version of it, than it did before."""

    code = "model_changed"


def message_of(error: FocalPathError | OSError | MemoryError) -> str:
    """What to tell a user: our own words, or the file that the system refused, and why."""
    if isinstance(error, OSError) and error.filename is not None:
        return (
            f"{error.filename} cannot be used: {error.strerror}. Check the path, its permissions "
            "and the space on its disk."
        )
    return str(error)
