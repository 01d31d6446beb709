"""How warnings are shown."""

from rich.console import Console
from rich.markup import escape


def warn(text: str) -> None:
    """Print a warning on one line, whatever brackets it has."""
    Console().print(f"[yellow]warning:[/yellow] {escape(text)}", soft_wrap=True)
