"""A stand-in for CUDA where there is no GPU: a torch device whose work the CPU does, and which refuses what CUDA refuses.

An operation on tensors of both devices is an error, unless CUDA allows it (numbers, copies, an index of the CPU), and so is `.numpy()`. It says
nothing of CUDA's own kernels, speed or memory.
"""

import contextlib
import json
import sys
import traceback
from pathlib import Path
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from tiny import call_stage
from eimf.artifacts import UserError, load_lines
from eimf.encoder import TextEncoder

torch.utils.backend_registration._setup_privateuseone_for_python_backend("standin")
DEVICE = torch.device("standin:0")
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
READING = {aten._local_scalar_dense.default, aten.equal.default}  # what they return is no tensor


class FarTensor(torch.Tensor):
    """A tensor of the second device around one of the CPU, `near`."""

    @staticmethod
    def __new__(cls, near):
        layout = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        far = torch.Tensor._make_wrapper_subclass(cls, near.shape, device=DEVICE, **layout)
        far.near = near
        return far

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _call(function, args, kwargs or {})

    def tolist(self):
        return self.near.tolist()


class _Dispatch(TorchDispatchMode):
    """Sees the operations that make tensors from nothing, which only name the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _call(function, args, kwargs or {})


def _is_far(device):
    return isinstance(device, torch.device) and device.type == DEVICE.type


def _near(x):
    return x.near if isinstance(x, FarTensor) else torch.device("cpu") if _is_far(x) else x


def _call(function, args, kwargs):
    leaves, _ = tree_flatten((args, kwargs))
    far = [x for x in leaves if isinstance(x, FarTensor)]
    near = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, FarTensor) and x.dim()]
    near_args, near_kwargs = tree_map(_near, (args, kwargs))
    if function.overloadpacket in (aten._to_copy, aten.to):
        device = next((x for x in leaves if isinstance(x, torch.device)), None)
        out = function(*near_args, **near_kwargs)
        if _is_far(device) if device else far:
            return args[0] if far and out is args[0].near else FarTensor(out)
        return out
    if function is aten.copy_.default:
        function(*near_args, **near_kwargs)
        return args[0]
    if function is aten._thnn_fused_gru_cell.default:
        return tree_map(FarTensor, _gru_cell(*near_args))
    if function is aten._thnn_fused_gru_cell_backward.default:
        return tree_map(FarTensor, _gru_cell_backward(*near_args))
    if far and near and not (function in INDEXING and isinstance(args[0], FarTensor)):
        raise RuntimeError(f"{function}: expected all tensors on one device, found {[(tuple(x.shape), str(x.device)) for x in far + near]}")
    out = function(*near_args, **near_kwargs)
    if function in READING or not (far or any(map(_is_far, leaves))):
        return out
    out = tree_map(lambda x: FarTensor(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(function, args, kwargs, out) if far else out


def _gru_cell(from_input, from_state, state, input_bias, state_bias):
    """torch's fused GRU cell, which only GPUs have: the new state, and what the gradient needs."""
    (r, z, n), (r_state, z_state, n_state) = (from_input + input_bias).chunk(3, 1), (from_state + state_bias).chunk(3, 1)
    r, z = torch.sigmoid(r + r_state), torch.sigmoid(z + z_state)
    n = torch.tanh(n + r * n_state)
    return n + z * (state - n), torch.stack([r, z, n, state, n_state])


def _gru_cell_backward(grad, saved, has_bias):
    r, z, n, state, n_state = saved
    grad_n = grad * (1 - z) * (1 - n * n)
    grad_r, grad_z = grad_n * n_state * r * (1 - r), grad * (state - n) * z * (1 - z)
    by_input, by_state = torch.cat([grad_r, grad_z, grad_n], 1), torch.cat([grad_r, grad_z, grad_n * r], 1)
    return by_input, by_state, grad * z, by_input.sum(0), by_state.sum(0)


@contextlib.contextmanager
def second_device():
    """Within it `pick_device` returns the second device, whose random numbers are the CPU's."""
    generator = torch.Generator

    class CpuGenerator(generator):
        def __new__(cls, device="cpu"):
            return generator.__new__(cls, "cpu" if _is_far(torch.device(device)) else device)

    with _Dispatch(), mock.patch.object(torch, "Generator", CpuGenerator), mock.patch("eimf.encoder.pick_device", lambda name: DEVICE):
        yield


def train(*arguments):
    """Stage 06 in this process: the losses and metrics of each validation, and the files it wrote."""
    with contextlib.ExitStack() as stack:
        if "--eimf" in arguments:  # the export, of the CPU in any case, takes longer than so short a training
            stack.enter_context(mock.patch("eimf.export.save_export", lambda model, max_len, path: path.touch()))
        call_stage("06_train.py", *arguments)
    folder = Path(arguments[arguments.index("--data-dir") + 1], "tiny", "06_train", arguments[arguments.index("--run") + 1])
    lines = [{**line["loss"], **line["valid"]} for line in load_lines(folder / "log.jsonl")]
    return {"log": lines, "files": sorted(p.name for p in folder.iterdir())}


def encode(folder):
    """Vectors of three texts. Inference mode takes no wrapped tensors, and fused attention has code of its own for each device."""
    with mock.patch.object(torch, "inference_mode", torch.no_grad), sdpa_kernel(SDPBackend.MATH):
        return TextEncoder(folder, batch_size=2).encode(["gel pen", "a desk lamp", "pen"]).tolist()


def main():
    """Read [[function, argument, ...], ...] as JSON, print a line of JSON for each: what it returned on the CPU and on the second device,
    or instead of the latter the traceback."""
    for name, *arguments in json.load(sys.stdin):
        function, out = {"train": train, "encode": encode}[name], {}
        with contextlib.redirect_stdout(sys.stderr):
            out["cpu"] = function(*arguments)
            try:
                with second_device():
                    out["second"] = function(*arguments)
            except (RuntimeError, TypeError, UserError):  # what a tensor on the wrong device leads to; anything else ends all
                out["error"] = traceback.format_exc()
        print(json.dumps(out), flush=True)


if __name__ == "__main__":
    main()
