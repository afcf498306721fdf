"""Writing and reading the exported model: what stages 07 and 08 use instead of the model's class."""
import io
import pickle
import zipfile

import torch

from .artifacts import UserError, atomic


def save_export(model, max_len, path):
    """Export `model` (history -> interests, routing) for any batch size and write it to `path` (.pt2) atomically.

    history (B, max_len) int64 item numbers, oldest first, right-padded with 0 -> interests (B, K, D) float32 and
    routing (B, K, max_len) float32, the share of each event in each interest.
    """
    model = model.eval().cpu()
    example = torch.zeros(2, max_len, dtype=torch.int64)
    example[:, 0] = 1
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1 << 20)},))
    buffer = io.BytesIO()  # to a file, torch would name the archive's folder after the temporary name
    torch.export.save(program, buffer)
    with atomic(path, "wb") as file:
        file.write(buffer.getbuffer())


def load_export(path, bare=False):
    """Load an exported model as a callable. Raises UserError for a file that is no export or that carries a pickle.

    A `bare` one does not check and repack its arguments, nor run the module's hooks, which takes longer than the model itself for a
    single history; the caller answers for dtype and shape.

    torch.export archives may hold pickled parts, and torch would unpickle them, even after a failed safe attempt; ours
    never need that, so anything that does is refused before torch opens the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if "/custom_obj" in name or name.endswith(".pkl") or (
                        name.endswith("_config.json") and '"use_pickle": true' in archive.read(name).decode()):
                    raise UserError(f"{path} holds a pickled part ({name}); refusing to load it. Run stage 06 again.")
                if "/sample_inputs/" in name:
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True)
        module = torch.export.load(path).module()
    except (zipfile.BadZipFile, OSError, UnicodeDecodeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is not a readable exported model ({error}). Run stage 06 again.") from None
    if bare:
        for node in [n for n in module.graph.nodes if n.op == "call_module" and not n.users]:  # the checks
            module.graph.erase_node(node)
        module.graph.set_codegen(torch.fx.graph.CodeGen())
        module.recompile()
        return module.forward
    return module
