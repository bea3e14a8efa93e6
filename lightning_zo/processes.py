"""One process or several: what Lightning's own strategies do to start them, without their wrapper around the model."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.distributed.constants import default_pg_timeout

from .launcher import Asked


class Devices(list[torch.device]):
    """Devices of one Trainer: false, so that the next Trainer with the strategy sets its own."""

    def __bool__(self) -> bool:
        return False


class Processes(ParallelStrategy, SingleDeviceStrategy):  # Lightning trains compiled modules with known classes only
    """A strategy with one device per process, and as many processes as the Trainer has devices.

    One process is alone, as with `SingleDeviceStrategy`: no process group, and samplers as they are. Several are
    launched and connected as with `DDPStrategy`; the model is not wrapped, since there are no gradients to reduce.
    """

    # These attributes replace the properties with their names.
    launcher: Any = None
    root_device: Any = torch.device("cpu")

    def __init__(self) -> None:
        self._devices = Devices()
        self._nodes = 1
        Strategy.__init__(self)  # those of the two bases set what is computed here
        self.cluster_environment: ClusterEnvironment | None = None
        self._layer_sync = None
        self.launcher = Asked()
        self._timeout = default_pg_timeout
        self._process_group_backend: str | None = None

    # The devices: the connector of the Trainer sets these two

    @property
    def parallel_devices(self) -> list[torch.device]:
        """The devices of the processes of this node."""
        return self._devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        self._devices = Devices(devices or [])
        self._choose()

    @property
    def num_nodes(self) -> int:
        """Number of nodes of the Trainer."""
        return self._nodes

    @num_nodes.setter
    def num_nodes(self, count: int) -> None:
        self._nodes = count

    def _choose(self) -> None:
        if len(self._devices):
            self.root_device = self._devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Number of processes on this node."""
        return max(1, len(self._devices))

    @property
    def is_distributed(self) -> bool:
        """Whether there are several processes, so that each takes its part of the data."""
        return self.num_processes * self.num_nodes > 1

    @property
    def global_rank(self) -> int:  # type: ignore[override]
        return super().global_rank if self.is_distributed else 0

    @property
    def local_rank(self) -> int:  # type: ignore[override]
        return super().local_rank if self.is_distributed else 0

    @property
    def node_rank(self) -> int:
        return super().node_rank if self.is_distributed else 0

    @property
    def world_size(self) -> int:  # type: ignore[override]
        return self.num_processes * self.num_nodes

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    # Their start and end

    def _configure_launcher(self) -> None:
        environment = self.cluster_environment
        several = self.is_distributed and environment is not None
        count = self.num_processes, self.num_nodes
        self.launcher.inner = _SubprocessScriptLauncher(environment, *count) if several else None  # type: ignore[arg-type]

    def setup_environment(self) -> None:
        """Sets up the accelerator, and connects the processes."""
        self._choose()
        super().setup_environment()
        if self.is_distributed:
            DDPStrategy.setup_distributed(self)  # type: ignore[arg-type]

    _get_process_group_backend = DDPStrategy._get_process_group_backend
    determine_ddp_device_ids = DDPStrategy.determine_ddp_device_ids
    barrier = DDPStrategy.barrier
    broadcast = DDPStrategy.broadcast
    reduce = DDPStrategy.reduce

    def set_world_ranks(self) -> None:
        """Tells the cluster environment which processes there are."""
        if self.is_distributed:
            DDPStrategy.set_world_ranks(self)  # type: ignore[arg-type]
            self._choose()

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return super().reduce_boolean_decision(decision, all) if self.is_distributed else decision

    def teardown(self) -> None:
        if self.is_distributed:
            super().teardown()
        else:
            Strategy.teardown(self)
