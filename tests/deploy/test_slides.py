"""The templates that run slides on many machines."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import tyro
import yaml

from serve.slides.cli import Run
from serve.slides.cohort import SlideTask
from serve.slides.shard import Shard
from tests.support import ROOT
from tests.support.deployed import DEPLOY

KUBERNETES = DEPLOY / "kubernetes/slides"
KUBERNETES_VERSION = "1.34"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
SBATCH = DEPLOY / "slurm/slides.sbatch"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / f"{name}.yaml").read_text()))


def parsed(words: list[str]) -> Run:
    """What `python -m serve slides run` makes of its arguments."""
    assert words[:2] == ["slides", "run"]
    return tyro.cli(Run, args=words[2:])


@pytest.mark.parametrize("name", ["job", "storage", "network-policy"])
def test_manifests_follow_their_schemas(name: str) -> None:
    for document in documents(name):
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)


@pytest.mark.slow
def test_the_pods_of_the_indexed_job_have_all_shards() -> None:
    (job,) = documents("job")
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["metadata"]["labels"][QUEUE_LABEL]
    assert job["spec"]["suspend"] is True
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "serve"]
    count = job["spec"]["completions"]
    names = []
    tasks = [SlideTask(path=Path(f"{n}.svs"), name=str(n)) for n in range(20)]
    for index in range(count):
        words = [word.replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in container["args"]]
        names += [task.name for task in Shard.parse(parsed(words).shard).of(tasks)]
    assert sorted(names) == sorted(task.name for task in tasks)


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"] for group in groups]


def test_the_ray_job_has_the_fields_that_kuberay_knows() -> None:
    """Its schema is not at hand: the names are those of the KubeRay API, as used in its samples."""
    (job,) = documents("ray-job")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(job["spec"]) <= {
        *("suspend", "entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"),
        *("backoffLimit", "activeDeadlineSeconds", "submissionMode", "rayClusterSpec"),
    }
    cluster = job["spec"]["rayClusterSpec"]
    assert set(cluster) == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert cluster["authOptions"] == {"mode": "token"}
    assert set(cluster["headGroupSpec"]) == {"rayStartParams", "template"}
    for group in cluster["workerGroupSpecs"]:
        assert set(group) == {
            *("groupName", "replicas", "minReplicas", "maxReplicas"),
            *("rayStartParams", "template"),
        }
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for template in pods(job):
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        pod["metadata"] = {"name": "ray", **template["metadata"]}
        kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)


def test_the_ray_jobs_workers_have_room_for_what_its_command_asks_for() -> None:
    (job,) = documents("ray-job")
    command = shlex.split(job["spec"]["entrypoint"])
    assert command[:3] == ["python", "-m", "serve"]
    run = parsed(command[3:])
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert run.on.cluster == "auto"
    assert run.on.workers == group["replicas"]
    assert run.on.worker_gpus == limits["nvidia.com/gpu"]
    assert run.on.worker_cpus < int(limits["cpu"])
    mounts = {
        mount["mountPath"]
        for template in pods(job)
        for mount in template["spec"]["containers"][0]["volumeMounts"]
    }
    for path in (*run.slides, run.settings.bundle.parent, run.out):
        assert str(path) in mounts
    assert job["metadata"]["labels"][QUEUE_LABEL]


def test_no_ray_process_reports_what_it_is_used_for() -> None:
    (job,) = documents("ray-job")
    for template in pods(job):
        environment = template["spec"]["containers"][0]["env"]
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in environment
    assert "RAY_USAGE_STATS_ENABLED=0" in (KUBERNETES / "Dockerfile").read_text()


@pytest.mark.parametrize(
    ("dockerfile", "manifests"),
    [
        (
            KUBERNETES / "Dockerfile",
            ["kubernetes/slides/job.yaml", "kubernetes/slides/ray-job.yaml"],
        ),
        (ROOT / "Dockerfile", ["compose.yaml"]),
    ],
)
def test_an_image_is_built_under_the_name_that_manifests_ask_for(
    dockerfile: Path, manifests: list[str]
) -> None:
    (built,) = re.findall(r"--tag (\S+) ", dockerfile.read_text().splitlines()[0])
    name = built.partition(":")[0]
    for manifest in manifests:
        asked = re.findall(rf"image: ({name}\S*)", (DEPLOY / manifest).read_text())
        assert set(asked) == {built}, manifest


def test_claims_and_policies_fit_the_pods() -> None:
    claims = {document["metadata"]["name"] for document in documents("storage")}
    claims |= {"focalpath-models"}
    (job,), (ray,), (policy,) = documents("job"), documents("ray-job"), documents("network-policy")
    templates = [job["spec"]["template"], *pods(ray)]
    for template in templates:
        volumes = [volume.get("persistentVolumeClaim") for volume in template["spec"]["volumes"]]
        assert {volume["claimName"] for volume in volumes if volume} <= claims
        selector = policy["spec"]["podSelector"]["matchLabels"]
        assert selector.items() <= template["metadata"]["labels"].items()


@pytest.mark.slow
def test_the_jobs_of_a_slurm_array_have_all_shards(tmp_path: Path) -> None:
    """Run by bash, with an `srun` that prints its command."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    tasks = [SlideTask(path=Path(f"{n}.svs"), name=str(n)) for n in range(20)]
    names = []
    for index in range(8):
        done = subprocess.run(
            ["bash", SBATCH, "8", "my slides", "bundle", "out", "--mpp", "0.25"],
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
            | {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_CPUS_PER_TASK": "4"},
            capture_output=True,
            text=True,
            check=True,
        )
        words = done.stdout.splitlines()
        assert words[:3] == ["python", "-m", "serve"]
        run = parsed(words[3:])
        assert run.slides == (Path("my slides"),)
        assert (run.options.mpp, run.options.read_threads) == (0.25, 4)
        names += [task.name for task in Shard.parse(run.shard).of(tasks)]
    assert sorted(names) == sorted(task.name for task in tasks)
    options = [line for line in SBATCH.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --array=0-7" in options
