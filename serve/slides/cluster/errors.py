"""What can go wrong on a cluster, beside what can on one machine."""

from serve.contract.errors import FocalPathError


class ClusterError(FocalPathError):
    """The cluster cannot be reached, or has no machine that could work."""

    code = "cluster_unusable"


class WorkerDiedError(ClusterError):
    """The processes that worked on a slide died each time."""

    code = "worker_died"


class WorkerFailedError(ClusterError):
    """A worker failed in a way that nobody expected."""

    code = "worker_failed"
