"""Which prompts a run asks, over which events, and the proof that they saw nothing else. Used by 04_infer_interests."""
import threading

import numpy as np

from .artifacts import UserError
from .data import HISTORY_FRACTION, TRAIN
from .interests import MAX_INTERESTS, build_prompt, clean_text, describe, parse_interests, parse_partition
from .llm import Request, answer_text

FINAL = {"refused", "rejected", "no_recording"}  # failures that asking again does not change


def token_counter(folder):
    """text -> tokens, by a tokenizer, or estimated: four ASCII characters or one other character a token."""
    if folder is None:
        return lambda text: -(-(n := len(text.encode("ascii", "ignore"))) // 4) + len(text) - n
    import transformers
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer {folder}: {str(error).splitlines()[0]}") from None
    lock = threading.Lock()  # a tokenizer is not made for several threads

    def count(text):
        with lock:
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return count


class Prompts:
    """The requests, rebuilt whenever they are needed: memory holds 32 bytes of key and a few numbers for each.

    `users`, `start`, `end` int64 (prompts,): whose events, and which of the flat arrays a prompt may see. Known after
    `first_pass`: `shown_start` int64 and `truncated` bool (prompts,), where the events shown begin and whether that is later
    than `start`.
    """

    def __init__(self, args, interactions, items, user_ids, typical, model, template, count):
        users, start, end = interactions.training_ranges()
        if typical is not None:
            place = np.full(interactions.n_users, -1)
            place[users] = np.arange(len(users))
            inside = len(typical) == 0 or 0 <= typical.min() <= typical.max() < len(place)
            if typical.ndim != 1 or typical.dtype != np.int64 or not inside:
                raise UserError(f"typical_users.npy: expected int64 user numbers below {len(place)}, found {typical.dtype} "
                                f"{typical.shape}. Run stage 03_cluster_users again")
            place = place[typical]
            if (place < 0).any():
                raise UserError(f"typical_users.npy: user {typical[place < 0][0]} is no training user, so its history must not "
                                "be seen. Run stage 03_cluster_users again on this split")
            users, start, end = typical, start[place], end[place]
        if args.prefix_only:
            end = start + np.maximum(1, ((end - start) * HISTORY_FRACTION).astype(np.int64))
        self.users, self.start, self.end = users, start, end
        self.args, self.items, self.user_ids, self.model, self.count = args, items, user_ids, model, count
        self.events, self.template, self.template_tokens = interactions.items, template, count(template)
        self.fields = (args.item_text or ("title,categories" if args.llm == "offline" else "title")).split(",")
        self.shown_start, self.truncated = end.copy(), np.zeros(len(users), bool)
        self.digests = np.zeros((len(users), 32), np.uint8)  # the requests' keys; zero for a history without text
        self.first = np.zeros(0, np.int64)  # ascending: the first prompt of each key
        self.described = {}  # item number -> (line, tokens)

    def history(self, index):
        """(item numbers, lines) of a prompt, oldest first: the newest items that fit into --max-prompt-tokens."""
        budget = self.args.max_prompt_tokens - self.template_tokens
        numbers, lines = [], []
        for position in range(self.end[index] - 1, self.start[index] - 1, -1):
            number = int(self.events[position])
            if number not in self.described:
                line = describe(self.items[number], self.fields)
                self.described[number] = line, self.count(line) + 2
            line, tokens = self.described[number]
            if line and numbers and tokens > budget:
                self.truncated[index] = True
                break
            self.shown_start[index] = position
            if line:
                if tokens > budget:  # one title longer than everything: its beginning
                    line = line[:max(1, int(len(line) * budget / tokens))]
                    self.truncated[index] = True
                budget -= tokens
                numbers.append(number)
                lines.append(line)
        return numbers[::-1], lines[::-1]

    def request(self, index):
        """The Request of a prompt, or None if no item of the history has text."""
        numbers, lines = self.history(index)
        if not lines:
            return None
        args = self.args
        content = build_prompt(self.template, args.task, lines, args.dataset)
        body = {"model": self.model, "messages": [{"role": "user", "content": content}],
                "temperature": args.temperature, "max_tokens": args.max_tokens}
        if args.llm == "recorded" and args.match == "user":
            body["user"] = self.user_ids[self.users[index]]  # another user's answer is another answer, even to the same prompt
        if args.json_mode:
            body["response_format"] = {"type": "json_object"}
        user_id = self.user_ids[self.users[index]]
        request = Request("", body, user_id, tuple(self.items[i] for i in numbers))
        return Request(f"{args.dataset}/{user_id}#{request.key[:16]}", body, user_id, request.history)

    def first_pass(self):
        """Build every request once, remember its key, and yield it; histories without text have none."""
        for index in range(len(self)):
            if request := self.request(index):
                self.digests[index] = np.frombuffer(bytes.fromhex(request.key), np.uint8)
                yield request
        _, first = np.unique(self.digests.view("V32").ravel(), return_index=True)
        self.first = np.sort(first[self.digests[first].any(axis=1)])

    def __len__(self):
        return len(self.users)

    def key(self, index):
        """The request's key, None without text."""
        return self.digests[index].tobytes().hex() if self.digests[index].any() else None

    def distinct(self):
        """All keys, each once."""
        return map(self.key, self.first)

    def pending(self, journal, shard, again=None, reuse=True):
        """Numbers of this shard's prompts without an answer, each key once; in a later round those whose answers
        `again(entry, index)` rejects; all of them without `reuse`."""
        number, of = map(int, shard.split("/")) if shard else (1, 1)
        for index in self.first[number - 1::of].tolist():
            key = self.key(index)
            if again is None and reuse:
                if journal.answers(key) or (not self.args.retry_failed and key in journal
                                            and journal.get(key)["error"]["code"] in FINAL):
                    continue
            elif again and not (0 < journal.answers(key) < self.args.answer_attempts and again(journal.get(key), index)):
                continue
            yield index

    def parse(self, entry, index):
        text, reason, _ = answer_text(entry)
        if self.args.task == "partition":
            return parse_partition(text, len(self.history(index)[0]), reason)
        return parse_interests(text, reason)

    def titles(self, index):
        """The fallback: the newest distinct titles of the history."""
        texts = (clean_text(self.items[self.events[p]]["title"]) for p in range(self.end[index] - 1, self.start[index] - 1, -1))
        return list(dict.fromkeys(filter(None, texts)))[:MAX_INTERESTS]

    def row(self, index, journal):
        """The result line of a prompt."""
        key = self.key(index)
        entry = key and journal.get(key)
        row = {"user": int(self.users[index]), "id": self.user_ids[self.users[index]]}
        if entry and entry["response"]:
            parsed, source, model = self.parse(entry, index), entry["source"], answer_text(entry)[2]
            outcome, value, notes = parsed.outcome, parsed.value, parsed.notes
        else:
            error = {"code": "not_asked", "message": "no answer was asked for"}
            if entry:
                error = entry["error"]
            elif key is None:
                error = {"code": "no_text", "message": "no item of the history has text"}
            outcome = "refused" if error["code"] == "refused" else "failed"
            value, notes = [], [f"{error['code']}: {error['message']}"]
        if not value:
            source, model = "titles", None
        if self.args.task == "partition":
            numbers = self.history(index)[0]
            groups = value or ([("all", list(range(1, len(numbers) + 1)))] if numbers else [])
            row |= {"items": numbers, "groups": [{"name": name, "items": members} for name, members in groups]}
        else:
            row["interests"] = value or self.titles(index)
        return row | {"outcome": outcome, "source": source, "model": model, "key": key, "notes": notes}


def leakage(prompts, interactions, args):
    """Count forbidden events in what the prompts saw, from the split itself. Raises UserError if there is one."""
    offsets, n = interactions.offsets, len(interactions.items)
    user = np.repeat(np.arange(interactions.n_users), np.diff(offsets))
    user_level = interactions.kind != "leave-one-out"
    checks = {"events_of_validation_and_test_users": (interactions.split[user] != TRAIN) & user_level,
              "held_out_positions": (np.arange(n) >= offsets[user + 1] - 2) & (not user_level)}
    if args.prefix_only:
        length = np.diff(offsets) - (0 if user_level else 2)
        checks["events_after_80_percent"] = np.arange(n) - offsets[user] >= np.maximum(1, length * HISTORY_FRACTION)[user]
    first = prompts.shown_start
    found = {}
    for name, forbidden in checks.items():
        total = np.concatenate([[0], np.cumsum(forbidden)])
        found[name] = int((total[prompts.end] - total[first]).sum())
    own = (first >= offsets[prompts.users]) & (prompts.end <= offsets[prompts.users + 1])
    found["events_of_other_users"] = int((~own).sum())
    if any(found.values()):
        raise UserError(f"prompts have seen events they must not: {found}; nothing was written")
    return found | {"split": interactions.kind, "prefix_only": args.prefix_only, "prompts": len(first),
                    "events_seen": int((prompts.end - first).sum()), "truncated_histories": int(prompts.truncated.sum()),
                    "answers_saw_more_than_the_prompt": "perhaps: recorded answers matched by user" if args.llm == "recorded"
                    and args.match == "user" else "no"}
