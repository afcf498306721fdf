"""The state of a training run in one safetensors file, from which a killed run goes on with the same result."""
import json

import torch
from safetensors import safe_open
from safetensors.torch import save

from .artifacts import UserError, atomic


def save_checkpoint(path, identity, state, groups, optimizer):
    """Write `state` (JSON), `groups` {name: {name: tensor}} and the optimizer's state of groups["parameter"], atomically."""
    tensors = {f"{group}/{name}": tensor.detach() for group, members in groups.items() for name, tensor in members.items()}
    for name, p in groups["parameter"].items():
        tensors |= {f"optimizer/{name}/{key}": value for key, value in optimizer.state[p].items()}
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    path.parent.mkdir(exist_ok=True)
    with atomic(path, "wb") as file:
        file.write(save(tensors, metadata={"identity": identity, "state": json.dumps(state)}))


def load_checkpoint(path, identity, groups, optimizer):
    """Restore `groups` in place, but for names that a group lacks, which are added. Returns the state.

    None, with nothing changed, if the checkpoint is of other settings or inputs. Raises UserError for a damaged file.
    """
    parameters = groups["parameter"]
    device = next(iter(parameters.values())).device
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata()["identity"] != identity:
                return None
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}
            state = json.loads(file.metadata()["state"])
    except Exception as error:  # safetensors raises its own, undocumented types for a damaged file
        raise UserError(f"{path} cannot be read ({error}); delete it to train from the start") from None
    with torch.no_grad():
        for name, tensor in tensors.items():
            group, rest = name.split("/", 1)
            if group == "optimizer":
                owner, key = rest.rsplit("/", 1)
                optimizer.state[parameters[owner]][key] = tensor.cpu() if key == "step" and device.type == "cpu" else tensor
            elif rest in groups[group]:
                groups[group][rest].copy_(tensor)
            else:
                groups[group][rest] = tensor
    return state
