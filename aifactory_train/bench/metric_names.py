"""The quantities that a record may hold: name -> base unit, which way is better, meaning.

Names follow Prometheus: base units, the unit as suffix, ratios from 0 to 1; what tells cells apart stands in the cell.
"""

from __future__ import annotations

from typing import NamedTuple

from aifactory_train.bench.statistics import Better


class MetricName(NamedTuple):
    unit: str
    better: Better
    help: str


NAMES: dict[str, MetricName] = {
    "aifactory_gemm_flops_per_second": MetricName("FLOP/s", "higher", "matrix multiplication, 2 m n k per call"),
    "aifactory_memory_bandwidth_bytes_per_second": MetricName("B/s", "higher", "bytes read and written by a kernel"),
    "aifactory_hostlink_bandwidth_bytes_per_second": MetricName("B/s", "higher", "copy between host and device"),
    "aifactory_p2p_bandwidth_bytes_per_second": MetricName("B/s", "higher", "copy from one device to another"),
    "aifactory_p2p_latency_seconds": MetricName("s", "lower", "one way, for the smallest message"),
    "aifactory_collective_duration_seconds": MetricName(
        "s", "lower", "one call, until the slowest rank has its result"
    ),
    "aifactory_collective_init_seconds": MetricName("s", "lower", "first call of a size, which sets up connections"),
    "aifactory_collective_algorithm_bandwidth_bytes_per_second": MetricName(
        "B/s", "higher", "bytes of the op / duration"
    ),
    "aifactory_collective_bus_bandwidth_bytes_per_second": MetricName(
        "B/s", "higher", "algorithm bandwidth times the share that a ring sends over each link, as nccl-tests"
    ),
    "aifactory_collective_nic_rate_bytes_per_second": MetricName("B/s", "higher", "sent by each NIC; forced ring only"),
    "aifactory_loader_tokens_per_second": MetricName("tokens/s", "higher", "rows of prepared shards, by one rank"),
    "aifactory_loader_batch_duration_seconds": MetricName("s", "lower", "from asking for a batch to having it"),
    "aifactory_tokenization_tokens_per_second": MetricName("tokens/s", "higher", "text to tokens, by one node"),
    "aifactory_tokenization_text_bytes_per_second": MetricName("B/s", "higher", "UTF-8 text to tokens, by one node"),
    "aifactory_checkpoint_save_duration_seconds": MetricName("s", "lower", "from the call to the commit on disk"),
    "aifactory_checkpoint_load_duration_seconds": MetricName("s", "lower", "from the call to the restored state"),
    "aifactory_checkpoint_save_bandwidth_bytes_per_second": MetricName("B/s", "higher", "of all ranks together"),
    "aifactory_checkpoint_load_bandwidth_bytes_per_second": MetricName("B/s", "higher", "of all ranks together"),
    "aifactory_checkpoint_stall_seconds": MetricName("s", "lower", "that an asynchronous save keeps training waiting"),
    "aifactory_train_step_duration_seconds": MetricName("s", "lower", "one optimizer step, of the slowest rank"),
    "aifactory_train_tokens_per_second": MetricName("tokens/s", "higher", "of the whole job"),
    "aifactory_train_tokens_per_second_per_gpu": MetricName("tokens/s", "higher", "of the job, over its devices"),
    "aifactory_train_model_flops_per_second_per_gpu": MetricName("FLOP/s", "higher", "by a named convention"),
    "aifactory_train_mfu_ratio": MetricName("1", "higher", "model FLOP/s / published peak of the device"),
    "aifactory_train_mamfu_ratio": MetricName("1", "higher", "model FLOP/s / GEMM FLOP/s measured in the same job"),
    "aifactory_train_hfu_ratio": MetricName("1", "higher", "with the FLOPs of recomputation / published peak"),
    "aifactory_train_scaling_efficiency_ratio": MetricName(
        "1", "higher", "beside the smallest size of the same layout"
    ),
    "aifactory_train_data_wait_ratio": MetricName("1", "lower", "share of the time that a rank waits for its batch"),
    "aifactory_train_accelerator_utilization_ratio": MetricName("1", "higher", "share of the time that is no waiting"),
    "aifactory_train_peak_memory_bytes": MetricName("B", "lower", "most memory reserved, of the rank with most"),
    "aifactory_train_energy_joules_total": MetricName("J", "lower", "in the timed window, of one scope"),
    "aifactory_train_energy_per_token_joules": MetricName("J/token", "lower", "of one scope, in the timed window"),
    "aifactory_startup_duration_seconds": MetricName(
        "s", "lower", "from the start of the command to the end of step 1"
    ),
    "aifactory_startup_phase_seconds": MetricName("s", "lower", "one phase of the start, named in the cell"),
    "aifactory_gpu_temperature_celsius": MetricName("degC", "lower", "in the timed window, at 1 Hz"),
    "aifactory_gpu_power_watts": MetricName("W", "lower", "in the timed window, at 1 Hz"),
    "aifactory_gpu_sm_clock_hertz": MetricName("Hz", "higher", "in the timed window, at 1 Hz"),
    "aifactory_gpu_throttle_active": MetricName("1", "lower", "1 where heat, power or hardware slowed the clock"),
}
