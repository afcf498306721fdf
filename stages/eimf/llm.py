"""Where answers come from (back ends) and where they are kept (the journal).

A request is one chat completion. Its key is the SHA-256 of its body (model, messages, parameters), so an answer is used
again exactly when model, prompt and parameters are the same, whatever the run, split or preference. Records have the shape of
OpenAI's Batch output lines, with `key` and `source` added.

A back end has a `model` name that goes into the request bodies, a `source` stamp, and two methods:

    answers(requests) -> iterator of records, in any order; raises Stopped when it must not or cannot go on
    close()

`Offline` below shows that adding one takes ten lines.
"""
import errno
import gzip
import hashlib
import json
import os
import re
import sqlite3
import threading
from dataclasses import dataclass
from functools import cached_property

from .artifacts import UserError

ENDPOINT = "/v1/chat/completions"
TOKENS = ("prompt_tokens", "completion_tokens")


class Stopped(Exception):
    """Work ended early for a reason the user can act on; what was answered is in the journal."""


@dataclass(frozen=True)
class Request:
    """One prompt. `user_id` and `history` (item dicts, oldest first) are for back ends that need no prompt."""
    custom_id: str
    body: dict
    user_id: str = ""
    history: tuple = ()

    @cached_property
    def key(self):
        return hashlib.sha256(json.dumps(self.body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def batch_line(self):
        """The request as a line of OpenAI's Batch input."""
        return {"custom_id": self.custom_id, "method": "POST", "url": ENDPOINT, "body": self.body}


def record(request, body, source, error=None, status=200):
    """A journal line: an answer (`body` is a chat completion) or a failure (`error` a dict with code and message)."""
    response = {"status_code": status, "request_id": (body or {}).get("id"), "body": body} if body is not None else None
    return {"id": request.key[:16], "custom_id": request.custom_id, "key": request.key, "source": source, "response": response,
            "error": error}


def completion(content, model, finish_reason="stop", usage=None):
    """A chat completion that holds one text."""
    return {"object": "chat.completion", "model": model, "usage": usage,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish_reason}]}


def answer_text(answer):
    """(text, finish_reason, model) of a record's chat completion; a refusal field counts as finish_reason content_filter."""
    choice = answer["response"]["body"]["choices"][0]
    content = choice["message"].get("content")
    if isinstance(content, list):  # content parts
        content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    reason = "content_filter" if choice["message"].get("refusal") else choice.get("finish_reason")
    return content, reason, answer["response"]["body"].get("model")


def malformed(body):
    """What is wrong with a chat completion, or None."""
    try:
        choice = body["choices"][0]
        content, reason = choice["message"].get("content"), choice.get("finish_reason")
        usage = body.get("usage") or {}
        if not isinstance(content, (str, list, type(None))) or not isinstance(reason, (str, type(None))):
            return "content or finish_reason has an unexpected type"
        if not isinstance(usage, dict) or not all(isinstance(usage.get(k), (int, type(None))) for k in TOKENS):
            return "usage has an unexpected type"
    except (KeyError, IndexError, TypeError, AttributeError):
        return "no choices[0].message"
    return None


def usage_of(answer):
    """{"prompt_tokens": n, "completion_tokens": n} as the server counted them, 0 where it did not."""
    usage = ((answer.get("response") or {}).get("body") or {}).get("usage") or {}
    return {kind: usage.get(kind) or 0 for kind in TOKENS}


class DiskTable:
    """A mapping from text to text in a private temporary file, for what grows with the number of requests. Thread-safe.

    Memory stays at 2 MiB, sqlite's page cache; the file is removed with the process, however that ends.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._table = sqlite3.connect("", isolation_level=None, check_same_thread=False)  # "" asks for such a file
        self._run("PRAGMA journal_mode = OFF")
        self._run("CREATE TABLE entries (key BLOB PRIMARY KEY, value TEXT) WITHOUT ROWID")
        self._run("BEGIN")

    def _run(self, statement, values=()):
        try:
            with self._lock:
                return self._table.execute(statement, values).fetchone()
        except sqlite3.OperationalError as error:
            raise UserError(f"the temporary file of the answers' places: {error}. Make room in the temporary folder, or set "
                            "SQLITE_TMPDIR to another one") from None

    def __setitem__(self, key, value):
        self._run("INSERT OR REPLACE INTO entries VALUES (?, ?)", (key.encode(errors="surrogatepass"), value))

    def get(self, key):
        """The value, or None."""
        row = self._run("SELECT value FROM entries WHERE key = ?", (key.encode(errors="surrogatepass"),))
        return row and row[0]

    def __len__(self):
        return self._run("SELECT count(*) FROM entries")[0]

    def close(self):
        self._table.close()


class Journal:
    """Append-only file of records, one JSON line each, indexed by key.

    A line is one write of an append-only file, so a kill can only leave a last line without its end; it is closed and
    skipped at the next start. `others` are further journals to read from (other shards'). The length is the number of keys.
    """

    def __init__(self, path, others=(), writable=True):
        self._index = DiskTable()  # key -> [file number, offset, bytes, number of answers] of the record to use
        self._writer, self._readers, self.unreadable = None, {}, 0
        if writable:
            self._writer = open(path, "ab+", buffering=0)
            if end := self._writer.seek(0, os.SEEK_END):
                self._writer.seek(end - 1)
                if self._writer.read(1) != b"\n":
                    self._writer.write(b"\n")
        for number, file in enumerate([path, *others]):
            if os.path.exists(file):
                self._readers[number], offset = open(file, "rb"), 0
                for line in self._readers[number]:
                    if line.strip():
                        self._note(line, number, offset)
                    offset += len(line)

    def __len__(self):
        return len(self._index)

    def __contains__(self, key):
        return self._index.get(key) is not None

    def _find(self, key):
        return json.loads(self._index.get(key) or "[0, 0, 0, 0]")

    def _note(self, line, number, offset):
        try:
            entry = json.loads(line)
            key, answered = entry["key"], entry["response"] is not None
            count = self._find(key)[3]
        except (ValueError, KeyError, TypeError, AttributeError):
            self.unreadable += 1
            return
        if answered or not count:  # an answer is never replaced by a later failure
            self._index[key] = json.dumps([number, offset, len(line), count + answered])

    def add(self, entry):
        """Append a record; it is in the file's page cache when this returns."""
        try:
            line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
        except UnicodeEncodeError:  # half a surrogate pair, as a cut-off answer may end with
            line = (json.dumps(entry) + "\n").encode()
        offset = self._writer.seek(0, os.SEEK_END)
        if self._writer.write(line) != len(line):  # the next start closes what was written of it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._writer.name)
        self._note(line, 0, offset)

    def get(self, key):
        """The newest answer for `key`, else its newest failure, else None."""
        number, offset, length, _ = self._find(key)
        return json.loads(os.pread(self._readers[number].fileno(), length, offset)) if length else None

    def answers(self, key):
        """Number of answers (not failures) stored for `key`."""
        return self._find(key)[3]

    def answered(self, keys):
        """The newest answer of each of `keys` that has one."""
        return (self.get(key) for key in keys if self.answers(key))

    def close(self):
        for file in [*self._readers.values(), self._writer]:
            if file is not None:
                file.close()
        self._index.close()


def read_batch(path):
    """Yield (line number, record) of a Batch output file, gz or plain. Raises UserError for a line that is none."""
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                    response = entry["response"]
                    complete = isinstance(entry["custom_id"], str) and (
                        response is None or response.keys() >= {"status_code", "body"})
                    if not complete:
                        raise KeyError
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise UserError(f"{path}:{number}: no line of OpenAI's Batch output (custom_id, response with status_code "
                                    f"and body), found {line[:80]!r}") from None
                yield number, entry
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read to its end: {error}") from None


class Responses:
    """Answers of a Batch output file, by request key or by user.

    match "hash": the record's `key`, or the hash after the last "#" of custom_id. match "user": what follows the first
    "/" in custom_id, without such a hash. Failed lines are counted in `failed`, not kept.
    """
    HASH = re.compile(r"#([0-9a-f]{16})$")

    def __init__(self, path, match):
        self.match, self.failed, self.found = match, 0, DiskTable()
        for _, entry in read_batch(path):
            response = entry["response"]
            if response is None or response["status_code"] != 200 or malformed(response["body"]):
                self.failed += 1
                continue
            if match == "user":
                name = self.HASH.sub("", entry["custom_id"]).split("/", 1)[-1]
            else:
                suffix = self.HASH.search(entry["custom_id"])
                name = str(entry.get("key") or (suffix and suffix[1]))[:16]
            self.found[name] = json.dumps(response["body"])

    def body(self, request):
        """The chat completion recorded for a request, or None."""
        text = self.found.get(request.user_id if self.match == "user" else request.key[:16])
        return json.loads(text) if text else None


class Offline:
    """The deterministic summariser of `eimf.offline`; stamped `offline`, never an LLM's. It depends on the item table too,
    which no key covers, so its answers are made anew each time."""
    source = model = "offline"
    reusable = False

    def __init__(self, summarizer, task):
        self.summarizer, self.task = summarizer, task

    def answers(self, requests):
        for request in requests:
            if self.task == "partition":
                value = {name: [p + 1 for p in positions] for name, positions in self.summarizer.groups(request.history)}
            else:
                value = {str(i): text for i, text in enumerate(self.summarizer.interests(request.history), 1)}
            yield record(request, completion(json.dumps(value, ensure_ascii=False), self.model), self.source)

    def close(self):
        pass


class Recorded:
    """Answers from a responses file; a request without one is a failure with the code `no_recording`."""
    source = "recorded"

    def __init__(self, responses, model):
        self.responses, self.model = responses, model

    def answers(self, requests):
        for request in requests:
            body = self.responses.body(request)
            error = {"code": "no_recording", "message": f"no recorded answer, matched by {self.responses.match}"}
            yield record(request, body, self.source, None if body else error)

    def close(self):
        pass


class Local:
    """A causal language model in a transformers folder with a chat template, generated in batches on CPU or CUDA."""
    source = "local"

    def __init__(self, folder, device="auto", batch_size=8, threads=0):
        import torch
        import transformers

        from .encoder import pick_device
        if not os.path.isfile(os.path.join(folder, "config.json")):
            raise UserError(f"--model {folder}: no config.json there; --llm local needs a transformers model folder")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        if threads:
            torch.set_num_threads(threads)
        self.device, self.batch_size = pick_device(device), batch_size
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
            self.network = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True,
                                                                             dtype="auto").eval().to(self.device)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"--model {folder}: transformers cannot load it: {str(error).splitlines()[0]}") from None
        if self.tokenizer.chat_template is None:
            raise UserError(f"--model {folder}: its tokenizer has no chat template; use an instruction-tuned model")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        digest = hashlib.sha256()
        for name in sorted(os.listdir(folder)):  # sizes and beginnings tell models apart without reading gigabytes
            path = os.path.join(folder, name)
            if name.endswith((".json", ".safetensors", ".jinja")) and os.path.isfile(path):
                with open(path, "rb") as file:
                    digest.update(f"{name}:{os.path.getsize(path)}:".encode() + file.read(1 << 20))
        self.model = f"{os.path.basename(os.path.abspath(folder))}@{digest.hexdigest()[:12]}"
        self.positions = getattr(self.network.config, "max_position_embeddings", None)

    def answers(self, requests):
        batch = []
        for request in requests:
            length = self.count(self._prompt(request)) + request.body["max_tokens"]
            if self.positions and length > self.positions:
                yield record(request, None, self.source, {"code": "rejected", "message": f"prompt and --max-tokens together are "
                                                          f"{length} tokens, the model has {self.positions} positions"})
                continue
            batch.append(request)
            if len(batch) == self.batch_size:
                yield from self._generate(batch)
                batch = []
        if batch:
            yield from self._generate(batch)

    def count(self, text):
        """Tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _prompt(self, request):
        return self.tokenizer.apply_chat_template(request.body["messages"], tokenize=False, add_generation_prompt=True)

    def _generate(self, batch):
        import torch
        body = batch[0].body
        texts = [self._prompt(request) for request in batch]
        tokens = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False,
                                return_token_type_ids=False).to(self.device)
        settings = {"do_sample": False} if not body["temperature"] else {"do_sample": True, "temperature": body["temperature"]}
        torch.manual_seed(int(batch[0].key[:8], 16))
        try:
            with torch.inference_mode():
                output = self.network.generate(**tokens, max_new_tokens=body["max_tokens"],
                                               pad_token_id=self.tokenizer.pad_token_id, **settings)
        except torch.cuda.OutOfMemoryError:
            output = None  # tried again outside: here the exception still holds what was allocated
        if output is None:
            torch.cuda.empty_cache()
            if len(batch) == 1:
                yield record(batch[0], None, self.source, {"code": "out_of_memory", "message": f"{len(texts[0])} characters"})
                return
            self.batch_size = max(1, len(batch) // 2)
            for half in (batch[:len(batch) // 2], batch[len(batch) // 2:]):
                yield from self._generate(half)
            return
        ends = self.network.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}
        for request, row, mask in zip(batch, output[:, tokens["input_ids"].shape[1]:].tolist(), tokens["attention_mask"]):
            length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            reason = "stop" if row[length - 1:length] and row[length - 1] in ends else "length"
            text = self.tokenizer.decode(row[:length], skip_special_tokens=True)
            usage = {"prompt_tokens": int(mask.sum()), "completion_tokens": length}
            yield record(request, completion(text, self.model, reason, usage), self.source)

    def close(self):
        pass
