"""Hides OpenVINO: with this folder first in PYTHONPATH, no process can import it.

`make test-masked` runs the tests so, as on a machine without the extra `openvino`.
"""

raise ModuleNotFoundError("OpenVINO is hidden from this run", name="openvino")
