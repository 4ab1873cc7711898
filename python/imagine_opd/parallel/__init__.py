"""Several processes: figures over all of them, launches made right, weights made whole."""

from imagine_opd.parallel.processes import (
    count_own_rows,
    gather_figures,
    get_place,
    keep_fp32_results,
    name_parallelism,
    settle_launch,
    sum_over_ranks,
    sum_tensor_over_ranks,
)
from imagine_opd.parallel.sharding import (
    building_whole,
    gather_full_tensor,
    gather_parameters,
    is_fsdp2,
    is_gathered,
    is_sharded,
    is_zero3,
    shard_like,
    strip_wrappers,
    unwrap_parallel,
)

__all__ = [
    "building_whole",
    "count_own_rows",
    "gather_figures",
    "gather_full_tensor",
    "gather_parameters",
    "get_place",
    "is_fsdp2",
    "is_gathered",
    "is_sharded",
    "is_zero3",
    "keep_fp32_results",
    "name_parallelism",
    "settle_launch",
    "shard_like",
    "strip_wrappers",
    "sum_over_ranks",
    "sum_tensor_over_ranks",
    "unwrap_parallel",
]
