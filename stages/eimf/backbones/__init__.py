"""Behavioural models: item vectors of a history in, K interests out (paper, Eq. 5). Their interface is `base.Backbone`.

`--backbone FILE.py:ClassName` of stage 06 takes a model of one's own: a subclass of `eimf.backbones.Backbone`.
"""
import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F

from ..artifacts import UserError
from .attentive import REMI, SINE, ComiRecSA
from .base import Backbone, even_share, newest
from .capsule import MIND, ComiRecDR
from .pooling import YouTubeDNN
from .recurrent import GRU4Rec
from .transformer import BERT4Rec, BERT4RecCloze, LLM2BERT4Rec, SASRec

__all__ = ["BACKBONES", "Backbone", "backbone_class", "build", "even_share", "newest", "source_file"]

BACKBONES = {
    "dnn": YouTubeDNN, "gru4rec": GRU4Rec, "sasrec": SASRec, "bert4rec": BERT4Rec, "bert4rec-cloze": BERT4RecCloze,
    "llm2bert4rec": LLM2BERT4Rec, "mind": MIND, "comirec-sa": ComiRecSA, "comirec-dr": ComiRecDR, "remi": REMI, "sine": SINE,
}


def source_file(name):
    """The file of a user's own backbone, None for a built-in one: "FILE.py:ClassName" -> Path."""
    return Path(name.rpartition(":")[0]) if ":" in name else None


def backbone_class(name):
    """The class that a --backbone names. Raises UserError for a file that is missing or fails, or a class that is no Backbone."""
    path, class_name = source_file(name), name.rpartition(":")[2]
    if path is None:
        return BACKBONES[name]
    if not path.is_file():
        raise UserError(f"--backbone {name}: there is no file {path}; expected FILE.py:ClassName")
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.suffix == ".py" else None
    if spec is None:
        raise UserError(f"--backbone {name}: {path} is not a .py file; expected FILE.py:ClassName")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file does wrong
        raise UserError(f"--backbone {name}: running {path} failed with {type(error).__name__}: {error}") from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Backbone) and found is not Backbone):
        classes = [k for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, Backbone) and v is not Backbone]
        raise UserError(f"--backbone {name}: {path} has no class {class_name} that is a subclass of eimf.backbones.Backbone; "
                        f"it has {', '.join(classes) or 'none'}")
    return found


def build(name, dim, interests, max_len, dropout=0.0):
    """The named backbone. A user's own is first run on two histories; raises UserError if that fails or has a wrong form."""
    cls = backbone_class(name)
    if source_file(name) is not None:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                probe = cls(dim, interests, max_len, dropout)
                mask = torch.arange(max_len) < torch.tensor([[min(3, max_len)], [0]])  # the second history is empty
                vectors, table = torch.randn(2, max_len, dim), torch.randn(3, dim)
                outputs = [probe.train(training)(vectors, mask) for training in (True, False)]
            except Exception as error:  # whatever the user's class does wrong
                raise UserError(f"--backbone {name}: {cls.__name__}(dim={dim}, interests={interests}, max_len={max_len}, dropout={dropout}) "
                                f"called with vectors (2, {max_len}, {dim}) and mask (2, {max_len}) failed with "
                                f"{type(error).__name__}: {error}") from error
            for output in outputs:
                check(name, output, (2, max_len, dim))
            try:
                regulariser = probe.regulariser(outputs[0][1])
                examples = probe.train().examples(torch.randn(2, dim), torch.tensor([1, 2]), mask.long(),
                                                  lambda number: F.embedding(number, table))
            except Exception as error:
                raise UserError(f"--backbone {name}: regulariser or examples of {cls.__name__} failed with {type(error).__name__}: {error}") from error
            check_extras(name, regulariser, examples, dim)
            try:
                batch = torch.export.Dim("batch", min=1, max=1 << 20)
                torch.export.export(probe.eval(), (vectors, mask), dynamic_shapes=({0: batch}, {0: batch}))
            except Exception as error:  # its messages are pages long
                reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                raise UserError(f"--backbone {name}: torch.export cannot write {cls.__name__}.forward for histories of any number ({reason:.300}). "
                                "Its Python must not depend on the tensors' values, nor on how many histories there are") from error
    return cls(dim, interests, max_len, dropout)


def check_extras(name, regulariser, examples, dim):
    """Raise UserError unless `regulariser` is a scalar tensor and `examples` vectors (Q, D) with item numbers (Q,)."""
    if not (isinstance(regulariser, torch.Tensor) and regulariser.dim() == 0):
        found = f"shape {tuple(regulariser.shape)}" if isinstance(regulariser, torch.Tensor) else type(regulariser).__name__
        raise UserError(f"--backbone {name}: regulariser returned {found}; expected a tensor of one number, shape ()")
    whole = isinstance(examples, tuple) and len(examples) == 2 and all(isinstance(x, torch.Tensor) for x in examples)
    if not (whole and examples[0].dim() == 2 and examples[0].shape[1] == dim and examples[1].shape == examples[0].shape[:1]
            and examples[1].dtype == torch.int64):
        found = " and ".join(f"{x.dtype} {tuple(x.shape)}" for x in examples) if whole else type(examples).__name__
        raise UserError(f"--backbone {name}: examples returned {found}; expected vectors (Q, {dim}) and their items' numbers (Q,) int64, a tuple")


def check(name, output, shape):
    """Raise UserError unless `output` is (interests (B, K, D), routing (B, K, L)), finite."""
    batch, length, dim = shape
    expected = f"expected interests (B, K, D) = ({batch}, K, {dim}) and routing (B, K, L) = ({batch}, K, {length})"
    if not (isinstance(output, tuple) and len(output) == 2 and all(isinstance(x, torch.Tensor) for x in output)):
        raise UserError(f"--backbone {name}: forward returned {type(output).__name__}; {expected}, a tuple of two tensors")
    interests, routing = output
    found = f"interests {tuple(interests.shape)} and routing {tuple(routing.shape)}"
    if interests.dim() != 3 or interests.shape[::2] != (batch, dim) or routing.shape != (batch, interests.shape[1], length):
        raise UserError(f"--backbone {name}: forward returned {found}; {expected}")
    if not (torch.isfinite(interests).all() and torch.isfinite(routing).all()):
        raise UserError(f"--backbone {name}: forward returned NaN or infinite values for a history of 3 events or for an empty one")
