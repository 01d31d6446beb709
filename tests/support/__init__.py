"""What several tests share: toy data, bundles and models, servers, fakes."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""
