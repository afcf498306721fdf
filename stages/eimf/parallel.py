"""Several processes that do one stage's work together, and the identities that a plain run gets instead.

    torchrun --standalone --nproc-per-node 2 -- stages/06_train.py --dataset sample --eimf

torchrun starts the same script several times and tells each process its rank, 0 to world - 1 (without the --, it would take a
stage's --run for its own --run-path). Each process computes its share of the rows, rank 0 alone writes. Nothing passes between
them but sums of tensors; gloo adds up those of a CPU, nccl those of CUDA. All must see one data folder.
"""
import os
import signal
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist

from .artifacts import UserError

LOST = ("another process of this run ended, or the run was told to stop; what was saved is kept, and the same command goes on from "
        "there, with any number of processes")

_rank, _world, _store = 0, 1, None
_reporting = threading.Lock()


def start(args, device=None):
    """Join the other ranks if torchrun started this process. Returns the torch.device to use, of CUDA each rank's own; None is the CPU.

    Sets torch's threads to args.threads; where that is 0, ranks share the cores, and args.threads becomes the share.
    Raises UserError if torchrun's variables are incomplete or there are fewer GPUs than ranks.
    """
    global _rank, _world
    device = device or torch.device("cpu")
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        missing = [name for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {missing[0]} is not set; start several processes with "
                            "torchrun --standalone --nproc-per-node N, or one after: unset WORLD_SIZE")
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        if device.type == "cuda":
            if device.index is not None or local > torch.cuda.device_count():
                raise UserError(f"--device {args.device} with {local} processes: expected --device cuda and a GPU for each, found "
                                f"{torch.cuda.device_count()}; use --nproc-per-node {torch.cuda.device_count()} or --device cpu")
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)  # before nccl starts
        args.threads = args.threads or max(1, (os.cpu_count() or 1) // local)
        _connect()
        _watch()
        # torchrun ends the others when a process dies; a rank that only waits, while rank 0 builds an index, is no error.
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", store=_store, timeout=timedelta(days=1),
                                rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
        _rank, _world = dist.get_rank(), dist.get_world_size()
    elif device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # generators and new tensors are of the current one
    if args.threads:
        torch.set_num_threads(args.threads)
    return device


def stop():
    """End the common work: true on rank 0, which goes on alone."""
    global _world
    if _world > 1:
        dist.destroy_process_group()
    _world = 1
    return _rank == 0


def rank():
    return _rank


def world():
    return _world


def share(rows):
    """This rank's part of rows that all ranks have: consecutive, sizes differ by one at most.

    Raises UserError if that would leave a rank without a row.
    """
    if len(rows) < _world > 1:
        raise UserError(f"{len(rows)} users cannot be shared by {_world} processes; start fewer with --nproc-per-node")
    return rows[_part(len(rows))]


def _part(n):
    return slice(n * _rank // _world, n * (_rank + 1) // _world)


def total(x):
    """Sum of x over all ranks, without a gradient; the same bits on each."""
    if _world == 1:
        return x
    x = x.detach().clone()
    _reduced(dist.all_reduce(x, async_op=True))
    return x


def gather(x, n=None):
    """All ranks' rows in the order of ranks: (rows of this rank, ...) -> (n, ...), with a gradient.

    n is what `share` divided; by default every rank has the same number of rows.
    """
    if _world == 1:
        return x
    if x.dtype == torch.bool:  # has no sum
        return gather(x.byte(), n).bool()
    return _Gather.apply(x, n or len(x) * _world)


class _Gather(torch.autograd.Function):
    """Each rank adds its rows to zeros. Backward: every rank's loss depends on these rows, so its gradients are added up."""

    @staticmethod
    def forward(ctx, x, n):
        rows = x.new_zeros(n, *x.shape[1:])
        rows[_part(n)] = x
        return total(rows)

    @staticmethod
    def backward(ctx, grad):
        return total(grad)[_part(len(grad))], None


def sum_gradients(parameters):
    """Replace each gradient by its sum over all ranks, whose losses are parts of one sum."""
    if _world == 1:
        return
    pending = []
    for p in parameters:
        if p.grad is not None:
            p.grad = p.grad.contiguous()
            pending.append(dist.all_reduce(p.grad, async_op=True))
    for work in pending:
        _reduced(work)


def _reduced(work):
    try:
        work.wait()
    except RuntimeError as error:
        raise UserError(f"{LOST} ({str(error).splitlines()[0]})") from error


def _connect():
    global _store
    if _store is None:
        _store = next(dist.rendezvous("env://"))[0]  # of torchrun's own process, so it outlives any rank


def report(line):
    """Print a line on stderr, in the process that asks first: of ranks that stop for one reason, a single one reports it.

    When this returns, a line that another thread of the process had begun to report is printed too, so the process may end.
    """
    with _reporting:
        try:
            _connect()
            first = _store.add("reported", 1) == 1
        except (RuntimeError, ValueError):  # no store, no one to agree with
            first = True
        if first:
            print(line, file=sys.stderr, flush=True)


def _watch():
    """Report the SIGTERM that torchrun sends to all ranks when one has ended, and stop.

    A rank may be waiting for the others inside the library, where Python runs no signal handler; this thread runs all the same.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait():
        while os.read(reader, 1)[0] != signal.SIGTERM:
            pass
        report(f"error: {LOST}")
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
