import pkgutil
import subprocess
import sys

import pytest

import serve

TRAINING_PACKAGES = ("torch", "torchvision", "lightning", "timm", "segment_anything", "train")


def _loaded_after(statements: str) -> set[str]:
    script = f"{statements}\nimport sys\nprint(*sys.modules)"
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(finished.stdout.split())


@pytest.mark.slow
def test_no_module_of_serve_loads_torch_or_the_training_code() -> None:
    modules = [module.name for module in pkgutil.walk_packages(serve.__path__, "serve.")]
    assert "serve.service.server" in modules
    loaded = _loaded_after("\n".join(f"import {module}" for module in modules))
    assert set(modules) <= loaded
    assert not loaded.intersection(TRAINING_PACKAGES)


def test_this_check_would_notice_torch() -> None:
    assert "torch" in _loaded_after("import sys; sys.modules['torch'] = sys")
