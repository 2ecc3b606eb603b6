"""Context parallelism: each rank has a part of every text, and needs the others' keys and values.

$ torchrun --standalone --nproc-per-node=2 beyond/context_parallel.py           # gathers them
$ torchrun --standalone --nproc-per-node=2 beyond/context_parallel.py --ring    # one part at a time

It saves no snapshots: a run that is interrupted starts again from the beginning.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, where `common` is

from beyond.decoder import Decoder
from beyond.flags import check_heads, make_text_parser
from beyond.ring import ring_attention
from beyond.shards import check_output, save_weights
from beyond.text import IGNORED, LENGTH, load_text
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


class GatherSequence(torch.autograd.Function):
    """The ranks' parts of each text in a row: (…, L / ranks, head size) to (…, L, head size).

    Each rank uses all of it. So the gradient of a part is the sum of all ranks' gradients of it: a
    reduce-scatter.
    """

    @staticmethod
    def forward(ctx, part):
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part)
        return torch.cat(parts, dim=-2)

    @staticmethod
    def backward(ctx, grad):
        grads = [part.contiguous() for part in grad.chunk(dist.get_world_size(), dim=-2)]
        total = torch.empty_like(grads[0])
        dist.reduce_scatter(total, grads)
        return total


def gathered_attention(query, key, value):
    """Attention of this rank's positions to all before them: (B, heads, L / ranks, head size)."""
    key, value = GatherSequence.apply(torch.stack([key, value]))  # one collective for both
    positions = torch.arange(key.shape[-2], device=key.device)
    query_positions = positions.chunk(dist.get_world_size())[dist.get_rank()]
    # Not is_causal=True: it would count the positions of this rank's queries from 0.
    is_visible = positions <= query_positions.unsqueeze(1)  # (L / ranks, L)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=is_visible)


class Trainer:
    def __init__(self, args, device, model, optimizer, train_data, test_data, report):
        self.args = args
        self.device = device
        self.model = model
        # Averages the ranks' gradients: each rank has those of its part of the texts.
        self.ddp_model = DDP(model, gradient_as_bucket_view=True)
        self.optimizer = optimizer
        self.report = report
        flags = vars(args)
        self.report.start(train_data, args.epochs, args.batch_size, flags, data_parallel_size=1)
        self.world_size = dist.get_world_size()
        self.part_length = LENGTH // self.world_size
        self.start = dist.get_rank() * self.part_length  # this rank's first position
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
            if self.report.is_due(self.global_step):
                means = torch.stack(losses) / self.world_size
                dist.all_reduce(means)  # each rank has seen its own part of the texts only
                self.report.train(self.epoch, self.global_step, means.tolist())
                losses = []
        self.epoch += 1
        self.samples_seen = 0

    def run_batch(self, batch):
        # The ranks' gradients are averaged. Each rank divides by the mean number of targets, not by
        # its own: then the average is the gradient of the mean loss over all ranks' targets. The
        # last ranks have fewer targets, because texts are padded at the end.
        targets_per_rank = max(1, self.count_targets(batch)) / self.world_size
        batch = to_device(self.part_of(batch), self.device)
        seen = self.samples_seen / len(self.train_loader.dataset)
        self.schedule.set_progress((self.epoch + seen) / self.args.epochs)
        self.optimizer.zero_grad()
        with self.autocast:
            loss = self.loss(batch) / targets_per_rank
        loss.backward()  # in here, DDP averages the gradients of all ranks
        if self.args.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_norm)
        self.optimizer.step()
        return loss.detach()  # a tensor: .item() would make the CPU wait for the GPU in every step

    def part_of(self, batch):
        """This rank's part of each text and of its labels: (B, L) to (B, L / ranks)."""
        return [tensor[:, self.start : self.start + self.part_length] for tensor in batch]

    def count_targets(self, batch):
        """How many answers of the batch count in the loss."""
        _, labels = batch
        return (labels != IGNORED).sum().item()

    def loss(self, batch):
        """The sum, not the mean, of the losses of these answers."""
        text, labels = batch
        logits = self.ddp_model(text, self.start).mT  # cross_entropy wants the classes second
        return F.cross_entropy(logits, labels, reduction="sum")

    def per_sample_metrics(self, batch):
        """Loss, correct answers and counted answers: three tensors whose first dimension is B."""
        text, labels = batch
        logits = self.model(text, self.start).mT
        losses = F.cross_entropy(logits, labels, reduction="none")
        correct = logits.argmax(dim=1) == labels
        return losses, correct, labels != IGNORED

    @torch.no_grad()
    def evaluate(self):
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, correct, targets
        self.model.eval()
        for batch in self.test_loader:
            batch = to_device(self.part_of(batch), self.device)
            with self.autocast:
                metrics = self.per_sample_metrics(batch)
            totals += torch.stack([metric.double().sum() for metric in metrics])
        dist.all_reduce(totals)
        self.report.evaluation(self.epoch, self.global_step, *totals.tolist())


def main(args, device):
    check_heads(args.width, args.heads)
    world_size = dist.get_world_size()
    if world_size == 1:
        fail("one rank cannot divide a text: start two or more with --nproc-per-node")
    if LENGTH % world_size != 0:
        fail(f"{LENGTH} characters do not divide by {world_size} ranks: start another number")
    check_output(args.output)
    train_data, test_data = load_text(args.data_dir, args.num_samples)
    # Nodes that differ would wait for each other until the timeout, or train on different data.
    check_ranks_agree(__file__, flags=vars(args), data=fingerprint(train_data))
    torch.manual_seed(args.seed)
    model = Decoder(args.width, args.depth, args.heads, args.tie_weights)
    if args.precision == "float64":
        model.double()
    for block in model.blocks:
        block.attention.attend = ring_attention if args.ring else gathered_attention
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=device.type != "cpu")
    run = Run(args.step, name_of(model), name_of(train_data), args.precision, args.seed, vars(args))
    report = Reporter(run, device, args.metrics, args.profile, args.verbose)
    Trainer(args, device, model, optimizer, train_data, test_data, report).train()
    save_weights(model, args.output)


def parse_args():
    parser = make_text_parser(__file__, __doc__)
    parser.add_argument("--ring", action="store_true", help="pass keys and values around a ring")
    return parser.parse_args()


if __name__ == "__main__":
    worker(parse_args())
