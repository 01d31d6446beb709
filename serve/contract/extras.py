"""What to tell a user who lacks one of FocalPath's optional parts."""


def how_to_install(extra: str) -> str:
    """The words for installing an extra, such as `slides`, from a clone: no index has FocalPath."""
    return f"run `pip install '.[{extra}]'` in FocalPath's folder"
