"""The device of a process: one of this machine's GPUs, or its share of the CPU's cores."""

import os

import torch
import torch.distributed as dist

from common.cores import count_cores
from common.options import fail, warn


def count_gpus() -> int:
    """How many of this machine's GPUs have a library for collectives, such as NCCL. Apple's have none."""
    gpu = torch.accelerator.current_accelerator(check_available=True)
    if gpu is None or dist.Backend.default_device_backend_map.get(gpu.type, "gloo") == "gloo":
        return 0
    return torch.accelerator.device_count()


def setup_device(use_gpu: int | None, local_rank: int = 0, local_world_size: int = 0) -> torch.device:
    """The device for process number `local_rank` of the `local_world_size` processes on this machine.

    Without `local_world_size`, torchrun's variable of that name counts. The processes divide the cores
    between them, unless OMP_NUM_THREADS is set: torchrun sets it to 1. On a GPU, float32 matrices are
    multiplied in TF32.

    `use_gpu` 0 asks for the CPU, 1 for a GPU, and None for a GPU if there is one. If 1 is asked for and there
    is no GPU, a warning says so. `fail`s if there are more processes than GPUs.
    """
    os.environ["LOCAL_RANK"] = str(local_rank)  # for `warn` and `fail`, also in step 02's ranks
    if local_world_size == 0:
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = count_cores()
    if "OMP_NUM_THREADS" not in os.environ:
        if local_world_size > 1:
            torch.set_num_threads(max(1, cores // local_world_size))
        else:  # torch's own number may be larger: it does not know a container's limit
            torch.set_num_threads(min(cores, torch.get_num_threads()))
    gpus = 0 if use_gpu == 0 else count_gpus()
    if gpus == 0:
        if use_gpu == 1:
            warn("--use-gpu 1, but there is no GPU here that ranks can use: training on the CPU instead")
        return torch.device("cpu")
    if local_world_size > gpus:
        fail(f"{local_world_size} processes, but {gpus} GPU(s): start one per GPU, or add --use-gpu 0")
    torch.set_float32_matmul_precision("high")  # TF32, which cuDNN's convolutions use by default
    return torch.device(f"{torch.accelerator.current_accelerator()}:{local_rank}")
