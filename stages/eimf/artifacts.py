"""Stage folders: atomic files, manifests, clear errors.

A stage reads earlier stages' folders and writes only its own, `<data-dir>/<dataset>/<NN_stage>[/<run>]/`.
Every file is written under a temporary name and renamed; `manifest.json` is removed first and written last, so
a folder with a manifest is complete and one without is not, wherever the stage was killed.
"""
import argparse
import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

# Flags that say where or how fast to compute, not what; they are recorded but do not make a result stale.
# Input files are compared by content, so the folder they lie in does not matter either.
VOLATILE = {"data_dir", "raw_dir", "threads", "device", "skip_done", "api_key", "base_url", "download", "quiet"}
SECRET = {"api_key"}
# What the machine refuses for a reason its user can remove: no permission, no space, a file where a folder should be.
USER_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
               errno.ENAMETOOLONG}
DATA = Path(__file__).resolve().parents[2] / "data"  # where data sets lie, unless --data-dir says otherwise
PACKAGES = ("numpy", "torch", "transformers", "scikit-learn", "hnswlib", "eimf_core")


class UserError(Exception):
    """A mistake in the input or the arguments. The message says what was found, what was expected, what to do."""


def run(main):
    """Call `main()`; a `UserError`, too little memory or a file system that refuses becomes one line on stderr and exit code 1, Ctrl-C
    exit code 130. Any other exception is a bug and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # as all files are, whatever the environment asks for: a title in another script ends no program
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        code = main()
    except UserError as error:
        _report(f"error: {error}")
        code = 1
    except KeyboardInterrupt:
        _report("interrupted; what was finished is kept, the same command goes on from there")
        code = 130
    except BrokenPipeError:  # the reader of our output went away, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        if error.errno not in USER_ERRNOS:
            raise
        _report(f"error: {error.filename or 'writing'}: {error.strerror}")
        code = 1
    except (MemoryError, RuntimeError) as error:  # torch has its own kinds of the first
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        _report(f"error: out of memory ({str(error).partition(chr(10))[0] or 'no size is known'}); a smaller "
                "--batch-size needs less, and --device cpu nothing of a GPU's")
        code = 1
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        # A thread of torch.distributed may still let go of a tensor, and for that ask for an interpreter that has begun to end: the
        # process then aborts although its work is done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


def _report(line):
    """Print a line on stderr; of several processes that torchrun started, only the first that has something to report."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        from .parallel import report
        report(line)
    else:
        print(line, file=sys.stderr, flush=True)


def argument_parser(doc, **kwargs):
    """An argparse parser with the arguments every stage has; `doc` is the script's docstring."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):  # "(default: None)" would say nothing
            return action.help if action.default is None else super()._get_help_string(action)

    parser = argparse.ArgumentParser(description=doc, formatter_class=Formatter, allow_abbrev=False, **kwargs)
    parser.add_argument("--dataset", default="sample", help="folder under --data-dir that holds this data set's files")
    here = Path.cwd()
    parser.add_argument("--data-dir", type=Path, default=DATA.relative_to(here) if DATA.is_relative_to(here) else DATA,
                        help="folder that holds all data sets")
    parser.add_argument("--skip-done", action="store_true",
                        help="do nothing if the manifest matches these arguments and inputs")
    return parser


def command(stage, dataset, data_dir, run=None):
    """How a stage is called for a data set, as advice: the flags that are not at their defaults."""
    elsewhere = "" if Path(data_dir).resolve() == DATA else f" --data-dir {shlex.quote(str(data_dir))}"
    return f"python stages/{stage}.py --dataset {dataset}{elsewhere}" + (f" --run {run}" if run else "")


def check_ranges(parser, args, **bounds):
    """Exit with usage (code 2) unless each named argument lies in its bounds: `dim=1` for at least, `port=(0, 65535)` for a range."""
    for name, bound in bounds.items():
        low, high = bound if isinstance(bound, tuple) else (bound, None)
        value = getattr(args, name)
        if not (low <= value and (high is None or value <= high)):  # NaN lies in no range
            expected = f"at least {low}" if high is None else f"{low} to {high}"
            parser.error(f"--{name.replace('_', '-')} must be {expected}, got {value}")


def sha256(path, block=1 << 22):
    """Hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(block):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic(path, mode="w", **kwargs):
    """Open a temporary neighbour of `path` for writing and rename it to `path` when the block ends without error."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    if "b" not in mode:
        kwargs = {"encoding": "utf-8", "newline": "\n"} | kwargs
    try:
        with open(temporary, mode, **kwargs) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path, value):
    with atomic(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def load_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def save_array(path, array):
    with atomic(path, "wb") as file:
        np.save(file, array, allow_pickle=False)


def load_array(path, **kwargs):
    return np.load(path, allow_pickle=False, **kwargs)


def save_lines(path, rows):
    """Write dicts as JSON lines, or strings as plain lines."""
    with atomic(path) as file:
        for row in rows:
            file.write((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n")


def load_lines(path):
    """Parse a JSON-lines file into a list."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class Stage:
    """One run of one stage.

    >>> stage = Stage("02_encode_text", args)
    >>> source = stage.input("01_preprocess")           # an earlier stage's folder, checked to be complete
    >>> if stage.is_done(): return                      # --skip-done and nothing changed
    >>> stage.begin()                                   # locks the folder, removes the old manifest
    >>> save_array(stage.folder / "item_text.npy", x)
    >>> stage.finish({"items": n})                      # hashes the outputs, writes the manifest
    """

    def __init__(self, name, args, run=None):
        self.name, self.args, self.run = name, args, run
        for flag, value in (("--dataset", args.dataset), ("--run", run)):
            if value is not None and (value in ("", ".", "..") or Path(value).name != value):
                raise UserError(f"{flag} is {value!r}; expected the name of one folder, without /")
        self.root = Path(args.data_dir) / args.dataset
        self.folder = self.root / name / run if run else self.root / name
        self.inputs, self._made_from = {}, {}  # file -> SHA-256; earlier stage -> the inputs that its manifest records
        self.commit = commit()
        self.started = time.perf_counter()
        self.log = logging.getLogger(name)
        self._lock = None

    def input(self, name, run=None, optional=False):
        """Folder of an earlier stage. Its manifest must be there and its files must have the recorded sizes.

        Returns None for an `optional` stage that has not been run. Raises UserError naming the command to run.
        """
        folder = self.root / name / run if run else self.root / name
        key = f"{name}/{run}" if run else name
        if not (folder / "manifest.json").is_file():
            if optional and not folder.is_dir():
                return None
            raise UserError(f"{folder} has no manifest.json, so stage {name} has not finished there. "
                            f"Run: {command(name, self.args.dataset, self.args.data_dir, run if name != '06_train' else None)}")
        manifest = _load_manifest(folder)
        if manifest is None:
            raise UserError(f"{folder / 'manifest.json'} is damaged. Run stage {name} again.")
        self._made_from[key] = manifest["inputs"]
        for file, entry in manifest["outputs"].items():
            found = (folder / file).stat().st_size if (folder / file).is_file() else None
            if found != entry["bytes"]:
                raise UserError(f"{folder / file}: expected {entry['bytes']} bytes as recorded in manifest.json, found "
                                f"{'no file' if found is None else found}. Run stage {name} again.")
            self.inputs[f"{key}/{file}"] = entry["sha256"]
        return folder

    def mismatch(self):
        """None if each stage that was taken as an input was made from the very files of the others, else what does not fit."""
        for key, recorded in self._made_from.items():
            for file, digest in recorded.items():
                if self.inputs.get(file, digest) != digest:
                    return f"{key} was made from another {file} than the present one; run stage {key.split('/')[0]} again, and those after it"
        return None

    def input_file(self, path, key=None):
        """Record a file from outside the data folder as an input, by content. `key` names it in the manifest."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        self.inputs[key or path.name] = sha256(path)
        return path

    def is_done(self):
        """True if --skip-done was given and the manifest matches arguments, inputs and outputs. Prints why (not)."""
        if not getattr(self.args, "skip_done", False):
            return False
        reason = self._stale()
        if os.environ.get("RANK", "0") == "0":  # of several processes that torchrun started, one says so
            print(f"{self._label()}: " + (f"running, {reason}" if reason else "skipped, arguments and inputs are unchanged"))
        return reason is None

    def _label(self):
        return f"{self.name}/{self.run}" if self.run else self.name

    def _stale(self):
        if not (self.folder / "manifest.json").is_file():
            return "no finished result yet"
        manifest = _load_manifest(self.folder)
        if manifest is None:
            return "manifest.json is damaged"
        if changed := self._changed_setting(manifest):
            return changed
        for key in sorted(manifest["inputs"].keys() | self.inputs.keys()):
            if manifest["inputs"].get(key) != self.inputs.get(key):
                return f"input {key} changed"
        for file, entry in manifest["outputs"].items():
            if not (self.folder / file).is_file() or (self.folder / file).stat().st_size != entry["bytes"]:
                return f"output {file} is missing or has another size"
        return None

    def _changed_setting(self, manifest):
        old, new = {k: v for k, v in manifest["arguments"].items() if k not in VOLATILE}, self.settings()
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return f"--{key.replace('_', '-')} was {old.get(key)!r} and is {new.get(key)!r}"
        return None

    def replaces(self):
        """Which setting differs from those of the finished result that `begin` would remove; None if none does, or there is no result."""
        manifest = _load_manifest(self.folder)
        return manifest and self._changed_setting(manifest)

    def settings(self):
        """The arguments that decide the result, as JSON values."""
        return {k: v for k, v in self._arguments().items() if k not in VOLATILE}

    def _arguments(self):
        text = json.dumps({k: v for k, v in vars(self.args).items() if k not in SECRET}, default=str)
        return json.loads(re.sub(r"://[^/@\"\\\\]*@", "://***@", text))  # a URL may carry a password

    def begin(self):
        """Create and lock the folder, remove the manifest and left-over temporary files, start the log file.

        Raises UserError, with nothing changed, if the inputs do not fit together.
        """
        if reason := self.mismatch():
            raise UserError(reason)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / ".lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.folder} is being written by another process; wait for it or stop it first") from None
        (self.folder / "manifest.json").unlink(missing_ok=True)
        for path in [p for p in self.folder.rglob("*.tmp-*") if p.is_file()]:
            path.unlink()
        for handler in self.log.handlers:  # of an earlier run in this process
            handler.close()
        handler = logging.FileHandler(self.folder / "stage.log", mode="a", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        console = logging.StreamHandler()
        console.setFormatter(logging.Formatter(f"{self._label()}: %(message)s"))
        self.log.handlers = [handler, console]
        self.log.propagate = False
        self.log.setLevel(logging.INFO)
        return self.folder

    def finish(self, summary=None, outputs=None):
        """Write manifest.json: arguments, inputs, outputs with hashes, versions, commit, machine, wall time, peak memory.

        `outputs` lists the files later stages may rely on; by default every file of the folder but the log.
        """
        if outputs is None:
            outputs = sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*")
                             if p.is_file() and p.name not in ("stage.log", ".lock"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        manifest = {
            "stage": self.name, "run": self.run, "arguments": self._arguments(), "inputs": self.inputs,
            "seed": getattr(self.args, "seed", None),
            "outputs": {f: {"bytes": (self.folder / f).stat().st_size, "sha256": sha256(self.folder / f)} for f in outputs},
            "summary": summary or {},
            "packages": {p: _version(p) for p in PACKAGES} | {"python": platform.python_version()},
            "commit": self.commit, "machine": machine(),
            "wall_seconds": round(time.perf_counter() - self.started, 3),
            "peak_memory_mib": round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        save_json(self.folder / "manifest.json", manifest)
        self._lock.close()
        return manifest


def commit():
    """The code's git commit, with "-dirty" if tracked files were changed; None outside a git checkout."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"], capture_output=True, text=True,
                              timeout=30, cwd=Path(__file__).resolve().parent)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def machine():
    """What this process runs on: {"cpu", "cores", "gpu"}; gpu is None unless this process has used one."""
    try:
        with open("/proc/cpuinfo") as file:
            cpu = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    torch = sys.modules.get("torch")
    used = torch is not None and torch.cuda.is_initialized()
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": torch.cuda.get_device_name() if used else None}


def _load_manifest(folder):
    """A folder's manifest, None if it is not one, or no longer there: another rank may just begin."""
    try:
        manifest = load_json(folder / "manifest.json")
    except (ValueError, FileNotFoundError):
        return None
    whole = isinstance(manifest, dict) and all(isinstance(manifest.get(k), dict) for k in ("arguments", "inputs", "outputs"))
    return manifest if whole else None


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
