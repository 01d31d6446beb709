"""Errors that only a cluster can have."""

from serve.contract.errors import FocalPathError


class ClusterError(FocalPathError):
    """The cluster cannot be reached, or no machine has room for a worker."""

    code = "cluster_unusable"


class WorkerDiedError(ClusterError):
    """The processes that computed a slide died each time."""

    code = "worker_died"


class WorkerFailedError(ClusterError):
    """A worker raised an unexpected error."""

    code = "worker_failed"
