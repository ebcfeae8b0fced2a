"""Planning how tables are sharded in training, and where packed tables go afterwards."""

from torchrec_mpe.planner.packed_placement import PackedPlacement, PackedShard
from torchrec_mpe.planner.perf_estimator import MPEPerfEstimator
from torchrec_mpe.planner.planner import MPEShardingPlanner
from torchrec_mpe.planner.storage_estimator import MPEStorageEstimator
from torchrec_mpe.planner.storage_reservation import MPEStorageReservation

__all__ = [
    "MPEPerfEstimator",
    "MPEShardingPlanner",
    "MPEStorageEstimator",
    "MPEStorageReservation",
    "PackedPlacement",
    "PackedShard",
]
