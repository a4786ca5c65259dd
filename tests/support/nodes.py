"""Ray's test cluster on a machine that has other things to do as well."""

from __future__ import annotations

from typing import Any

from ray.cluster_utils import Cluster as RayCluster

from sdft_ray.stages.session import retry_start


class Cluster(RayCluster):
    """A node whose processes are too slow for Ray's fixed limits gets another try, as a local Ray of ours does."""

    def add_node(self, wait: bool = True, **options: Any) -> Any:
        return retry_start(lambda: super(Cluster, self).add_node(wait, **options))
