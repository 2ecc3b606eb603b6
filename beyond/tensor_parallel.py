"""Tensor parallelism: each rank computes a part of every block, and all work on the same batch.

$ torchrun --standalone --nproc-per-node=2 beyond/tensor_parallel.py            # by hand
$ torchrun --standalone --nproc-per-node=2 beyond/tensor_parallel.py --library  # with DTensor

It saves no snapshots: a run that is interrupted starts again from the beginning.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, where `common` is

from beyond.decoder import Decoder
from beyond.flags import check_heads, make_text_parser
from beyond.parallel_layers import ColumnParallelLinear, RowParallelLinear, copy_to_ranks
from beyond.shards import check_output, clip_grad_norm, report_memory, save_weights
from beyond.text import IGNORED, load_text
from common.device import setup_device
from common.loading import fingerprint, loader_options, to_device
from common.nodes import check_ranks_agree
from common.options import fail
from common.process_group import backends, release_process_group, rendezvous
from common.reporting import Reporter
from common.run import Run, name_of
from common.sampler import ShuffledSampler
from common.schedule import Schedule


@record  # so that torchrun shows the error of a rank that fails
def worker(args):
    device = setup_device(args.use_gpu, int(os.environ["LOCAL_RANK"]))
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)  # from here on "cuda" is this rank's GPU
    with rendezvous():  # one line if some of the ranks do not come
        dist.init_process_group(  # torchrun's environment variables have address and rank
            backend=backends(device),  # NCCL for CUDA, and gloo for the CPU
            timeout=timedelta(seconds=args.timeout),  # a rank that is silent for longer is lost
            device_id=device if device.type == "cuda" else None,  # NCCL connects now, not later
        )
    try:
        main(args, device)
    finally:
        release_process_group()  # frees the model, which holds the group; aborts after an error
        if dist.is_initialized():
            dist.destroy_process_group()


def split_by_hand(model):
    """Leave some heads of each attention on this rank, and some of the numbers inside each MLP."""
    for block in model.blocks:
        block.attention.register_forward_pre_hook(copy_to_ranks)
        block.attention.query = ColumnParallelLinear(block.attention.query)
        block.attention.key = ColumnParallelLinear(block.attention.key)
        block.attention.value = ColumnParallelLinear(block.attention.value)
        block.attention.output = RowParallelLinear(block.attention.output)
        block.mlp.register_forward_pre_hook(copy_to_ranks)
        block.mlp.up = ColumnParallelLinear(block.mlp.up)
        block.mlp.down = RowParallelLinear(block.mlp.down)


def split_by_library(model, mesh):
    """The same. Parameters become DTensors, which know what to sum in forward and in backward."""
    copied = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate())
    plan = {
        "attention": copied,
        "attention.query": ColwiseParallel(),
        "attention.key": ColwiseParallel(),
        "attention.value": ColwiseParallel(),
        "attention.output": RowwiseParallel(),
        "mlp": copied,
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(),
    }
    for block in model.blocks:
        parallelize_module(block, mesh, plan)


class Trainer:
    def __init__(self, args, device, model, optimizer, train_data, test_data, report):
        self.args = args
        self.device = device
        self.model = model
        self.optimizer = optimizer
        self.report = report
        flags = vars(args)
        self.report.start(train_data, args.epochs, args.batch_size, flags, data_parallel_size=1)
        options = loader_options(args.num_workers, device)
        self.sampler = ShuffledSampler(train_data, args.seed)  # the same batches on all ranks
        self.train_loader = DataLoader(
            train_data, args.batch_size, sampler=self.sampler, drop_last=True, **options
        )
        self.test_loader = DataLoader(test_data, args.eval_batch_size, **options)
        use_bf16 = args.precision == "bf16"
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=use_bf16)
        self.schedule = Schedule(optimizer, args.schedule)
        self.epoch = 0
        self.samples_seen = 0  # in this epoch
        self.global_step = 0

    def train(self):
        while self.epoch < self.args.epochs:
            self.run_epoch()
            self.evaluate()
        self.report.end(self.global_step)

    def run_epoch(self):
        self.sampler.set_epoch(self.epoch)
        losses = []
        self.model.train()
        for batch in self.report.progress(self.train_loader, self.epoch, self.samples_seen):
            losses.append(self.run_batch(batch))
            self.samples_seen += self.args.batch_size
            self.global_step += 1
            if self.global_step == 1:
                report_memory(self.model, self.optimizer, self.report)
            if self.report.is_due(self.global_step):
                means = torch.stack(losses)  # no all-reduce: all ranks have the same losses
                self.report.train(self.epoch, self.global_step, means.tolist())
                losses = []
        self.epoch += 1
        self.samples_seen = 0

    def run_batch(self, batch):
        num_targets = max(1, self.count_targets(batch))
        batch = to_device(batch, self.device)
        seen = self.samples_seen / len(self.train_loader.dataset)
        self.schedule.set_progress((self.epoch + seen) / self.args.epochs)
        self.optimizer.zero_grad()
        with self.autocast:
            loss = self.loss(batch) / num_targets
        # Each rank gets the gradients of its shards. Of what is whole on all ranks, such as the
        # norms, all ranks get the same gradient: there is nothing to average.
        loss.backward()
        if self.args.clip_norm:
            clip_grad_norm(self.model, self.args.clip_norm)
        self.optimizer.step()
        return loss.detach()  # a tensor: .item() would make the CPU wait for the GPU in every step

    def count_targets(self, batch):
        """How many answers of the batch count in the loss."""
        _, labels = batch
        return (labels != IGNORED).sum().item()

    def loss(self, batch):
        """The sum, not the mean, of the losses of these answers."""
        text, labels = batch
        logits = self.model(text).mT  # cross_entropy wants the classes second
        return F.cross_entropy(logits, labels, reduction="sum")

    def per_sample_metrics(self, batch):
        """Loss, correct answers and counted answers: three tensors whose first dimension is B."""
        text, labels = batch
        logits = self.model(text).mT
        losses = F.cross_entropy(logits, labels, reduction="none")
        correct = logits.argmax(dim=1) == labels
        return losses, correct, labels != IGNORED

    @torch.no_grad()
    def evaluate(self):
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, correct, targets
        self.model.eval()
        for batch in self.test_loader:
            batch = to_device(batch, self.device)
            with self.autocast:
                metrics = self.per_sample_metrics(batch)
            totals += torch.stack([metric.double().sum() for metric in metrics])
        self.report.evaluation(self.epoch, self.global_step, *totals.tolist())


def main(args, device):
    check_heads(args.width, args.heads)
    world_size = dist.get_world_size()
    if world_size == 1:
        fail("one rank cannot divide a model: start two or more with --nproc-per-node")
    if args.heads % world_size != 0:
        fail(f"--heads {args.heads} is not a multiple of {world_size}, the number of ranks")
    check_output(args.output)
    train_data, test_data = load_text(args.data_dir, args.num_samples)
    # Nodes that differ would wait for each other until the timeout, or train on different data.
    check_ranks_agree(__file__, flags=vars(args), data=fingerprint(train_data))
    torch.manual_seed(args.seed)  # all ranks build the same model, and keep different parts of it
    model = Decoder(args.width, args.depth, args.heads, args.tie_weights)
    if args.precision == "float64":
        model.double()
    if args.library:
        split_by_library(model, init_device_mesh(device.type, (world_size,)))
    else:
        split_by_hand(model)
    model.to(device)  # only now: the whole model may not fit on one GPU
    # Two groups, because the fused AdamW does not take DTensors and other tensors together.
    dtensors = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    others = [parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)]
    groups = [{"params": dtensors}, {"params": others}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=device.type != "cpu")
    run = Run(args.step, name_of(model), name_of(train_data), args.precision, args.seed, vars(args))
    report = Reporter(run, device, args.metrics, args.profile, args.verbose)
    Trainer(args, device, model, optimizer, train_data, test_data, report).train()
    save_weights(model, args.output)


def parse_args():
    parser = make_text_parser(__file__, __doc__)
    parser.add_argument("--library", action="store_true", help="divide with torch's DTensor")
    return parser.parse_args()


if __name__ == "__main__":
    worker(parse_args())
