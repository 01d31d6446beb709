import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from export.triton import publish
from serve.cli import main
from serve.contract.manifest import MANIFEST_FILE, sha256_of
from serve.doctor import checks
from serve.doctor.checks import Report
from serve.inference.probe import PROVIDERS, Probe
from serve.settings import ServeSettings
from tests.support.ports import free_port
from tests.support.toy_bundle import write_toy_bundle
from tests.support.triton_server import TritonServer


@pytest.fixture(autouse=True)
def _probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each provider's process takes a second: `test_probe.py` runs them, the CPU works here."""

    def probe(provider: str, precision: str = "fp32") -> Probe:
        problem = None if provider == "cpu" else f"{provider} is not there."
        seconds = None if problem else 0.5
        return Probe(provider=provider, runtime="ONNX Runtime", seconds=seconds, problem=problem)

    monkeypatch.setattr(checks, "probe", probe)
    monkeypatch.setattr("serve.inference.probe.probe", probe)
    monkeypatch.setenv("FOCALPATH_PORT", str(free_port()))


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))


def _report(capsys: pytest.CaptureFixture[str], *flags: object) -> tuple[int, Report]:
    status = main(["doctor", "--json", *map(str, flags)])
    return status, Report.model_validate_json(capsys.readouterr().out)


def _of(report: Report, section: str, name: str) -> tuple[str, str]:
    (finding,) = [f for f in report.findings if (f.section, f.name) == (section, name)]
    return finding.status, finding.detail


def test_a_machine_that_can_serve_gets_status_0(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = _report(capsys, "--bundle", bundle)
    assert [f for f in report.findings if f.status == "failed"] == []
    assert status == 0
    sections = {finding.section for finding in report.findings}
    assert sections == {
        "Machine", "Packages", "Providers", "Slides", "Places", "Bundle", "Triton", "Start",
    }  # fmt: skip
    assert {f.name for f in report.findings if f.section == "Providers"} == set(PROVIDERS)
    assert _of(report, "Providers", "cuda")[0] == "absent"
    assert "one tile takes" in _of(report, "Bundle", "warm-up")[1]
    assert report.machine.processor.kind in _of(report, "Machine", "processor")[1]


def test_the_table_has_every_finding_and_the_verdict(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--bundle", str(bundle)]) == 0
    table = capsys.readouterr().out
    for section in ("Machine", "Packages", "Providers", "Slides", "Places", "Bundle", "Start"):
        assert section in table
    assert "This machine can serve this bundle." in table


def test_a_damaged_bundle_is_named_with_its_file(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle / "model.onnx").write_bytes(b"damaged")
    status, report = _report(capsys, "--bundle", bundle)
    assert status == 1
    found, detail = _of(report, "Bundle", "files")
    assert found == "failed"
    assert "model.onnx" in detail
    assert _of(report, "Start", "bundle")[0] == "failed"


def test_a_bundle_that_does_not_give_its_own_labels_fails_the_warm_up(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    side = json.loads((bundle / MANIFEST_FILE).read_text())["tile_size_px"]
    image = np.zeros((side, side, 3), np.uint8)
    np.savez(bundle / "warm_up.npz", image=image, labels=np.full((side, side), 9, np.uint8))
    content = json.loads((bundle / MANIFEST_FILE).read_text())
    sha256 = sha256_of(bundle / "warm_up.npz")
    content["warm_up"] = {"file": "warm_up.npz", "sha256": sha256, "min_agreement": 0.98}
    (bundle / MANIFEST_FILE).write_text(json.dumps(content))
    status, report = _report(capsys, "--bundle", bundle)
    assert status == 1
    assert _of(report, "Bundle", "warm-up")[0] == "failed"
    assert "0.000%" in _of(report, "Bundle", "warm-up")[1]


def test_a_provider_that_the_settings_name_has_to_be_there(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = _report(capsys, "--bundle", bundle, "--provider", "cuda")
    assert status == 1
    assert _of(report, "Providers", "cuda")[0] == "failed"
    assert _of(report, "Start", "provider")[0] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (("--host", "0.0.0.0"), "access"),
        (("--host", "localhost"), "address"),
        (("--precision", "int8"), "precision"),
        (("--api-keys-file", "/nowhere"), "access"),
    ],
)
def test_what_the_start_would_be_refused_for_is_found(
    flags: tuple[str, ...], name: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = _report(capsys, "--bundle", bundle, *flags)
    assert status == 1
    assert _of(report, "Start", name)[0] == "failed"


def test_a_triton_that_does_not_answer_fails_only_where_it_is_the_backend(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"127.0.0.1:{free_port()}"
    flags = ("--bundle", bundle, "--triton-url", url)
    status, report = _report(capsys, *flags)
    assert (status, _of(report, "Triton", "model")[0]) == (0, "warning")
    status, report = _report(capsys, *flags, "--backend", "triton")
    assert (status, _of(report, "Triton", "model")[0]) == (1, "failed")
    assert url in _of(report, "Triton", "model")[1]


def test_a_folder_that_cannot_be_written_to_is_found(
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "nowhere"))
    status, report = _report(capsys, "--bundle", bundle)
    assert status == 1
    assert _of(report, "Places", "temporary files")[0] == "failed"


def test_where_results_of_slides_would_go_is_a_place_to_be_written_to(
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "slides").mkdir()
    flags = ("--bundle", bundle, "--slides", tmp_path / "slides", "--slides-out")
    _, report = _report(capsys, *flags, tmp_path / "new" / "out")
    assert _of(report, "Places", "results of slides")[0] == "ok"
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**29))
    _, report = _report(capsys, *flags, tmp_path / "new" / "out")
    state, told = _of(report, "Places", "results of slides")
    assert (state, "512 MiB free" in told) == ("warning", True)
    (tmp_path / "file").touch()
    status, report = _report(capsys, *flags, tmp_path / "file")
    assert status == 1
    assert _of(report, "Places", "results of slides")[0] == "failed"
    assert _of(report, "Start", "slides")[0] == "failed"


def test_an_openslide_that_the_readers_refuse_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openslide")
    old = SimpleNamespace(__library_version__="3.4.1")
    monkeypatch.setattr(checks, "import_module", lambda _: old)
    found = {one.name: one for one in checks.look_at_slides(ServeSettings())}
    assert found["openslide"].status == "warning"
    assert "3.4.1" in found["openslide"].detail


def test_the_start_is_checked_although_there_is_no_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--bundle", tmp_path / "none", "--host", "0.0.0.0", "--slides", tmp_path / "none")
    status, report = _report(capsys, *flags)
    assert status == 1
    failed = {finding.name for finding in report.failed if finding.section == "Start"}
    assert failed == {"bundle", "access", "slides"}


def test_a_library_that_does_not_load_is_told_from_one_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(module: str) -> object:
        if module == "openslide":
            raise OSError("libopenslide.so.1: cannot open shared object file")
        raise ModuleNotFoundError(module)

    monkeypatch.setattr(checks, "import_module", load)
    monkeypatch.setattr(checks, "LIBRARY_FILE", tmp_path / "openseadragon.min.js")

    def looked(settings: ServeSettings) -> dict[str, str]:
        return {one.name: one.status for one in checks.look_at_slides(settings)}

    found = looked(ServeSettings())
    assert found["openslide"] == "warning"
    assert set(found.values()) == {"warning", "absent"}
    assert found["OpenSeadragon"] == "absent"
    assert looked(ServeSettings(slides=tmp_path))["OpenSeadragon"] == "warning"


@pytest.mark.triton
def test_the_doctor_looks_at_a_real_triton(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(bundle, tmp_path / "repository")
    flags: tuple[object, ...] = ("--bundle", bundle, "--backend", "triton")
    with TritonServer(tmp_path / "repository") as server:
        status, report = _report(capsys, *flags, "--triton-url", server.grpc_url)
        assert status == 0, report.findings
        assert _of(report, "Triton", "model") == (
            "ok",
            f"{server.grpc_url} serves segmenter, Triton's version 1",
        )
        assert "triton" in _of(report, "Bundle", "runs on")[1]
        assert "one tile takes" in _of(report, "Bundle", "warm-up")[1]
        other = write_toy_bundle(tmp_path / "other", tile_size_px=128)
        flags = ("--bundle", other, "--backend", "triton", "--triton-url", server.grpc_url)
        status, report = _report(capsys, *flags)
        assert (status, _of(report, "Triton", "model")[0]) == (1, "failed")
