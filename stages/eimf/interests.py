"""What an LLM is asked about a history, and how its answer is read. Pure functions: no files, no network, no clock.

Two tasks: `interests`, the explicit interests of a history (paper 3.2.2, Eq. 3), and `partition`, its numbered items in named
interest groups. Titles come from strangers. They enter a prompt as one cleaned line each and are never searched for
placeholders, and whatever an answer holds can only become the text of an interest or the name of a group.
"""
import html
import json
import re
import unicodedata
from dataclasses import dataclass, field

MAX_INTERESTS = 20  # paper, 3.2.2
MAX_CHARACTERS = 300  # of one interest; a longer one is cut at a word

INTERESTS_PROMPT = """The user's historical click sequence is as follows:
{history}
Infer the interests behind this sequence. Describe each one with a short phrase that says what kind of product the user looks \
for; merge duplicates; give at most {max_interests}, the strongest first. Answer with one JSON object and nothing else, \
in this form:
{"1": "first interest", "2": "second interest"}"""

PARTITION_PROMPT = """The user's historical click sequence is as follows, one numbered item a line:
{history}
Divide these items into groups, one group for each interest of the user. Put every number into exactly one group and name \
each group with a short phrase that says what kind of product it is. Answer with one JSON object and nothing else, in this form:
{"name of an interest": [1, 3], "name of another interest": [2]}"""

PROMPTS = {"interests": INTERESTS_PROMPT, "partition": PARTITION_PROMPT}
PLACEHOLDERS = {"history": "the items, newest last", "max_interests": "the largest number of interests",
                "dataset": "the data set's name"}
PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")


def clean_text(text):
    """One line of readable text from a raw title: entities unescaped, control characters and runs of space become one space.

    >>> clean_text("Pens &amp; Pencils\\n ")
    'Pens & Pencils'
    """
    text = html.unescape(text or "")
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in text)
    return re.sub(r"\s+", " ", text).strip()


# ---------------------------------------------------------------- prompts

def check_template(template):
    """Raise ValueError unless the template's placeholders are known and {history} is there exactly once."""
    names = PLACEHOLDER.findall(template)
    unknown = sorted(set(names) - PLACEHOLDERS.keys())
    if unknown:
        raise ValueError(f"unknown placeholder {{{unknown[0]}}}; known are "
                         + ", ".join(f"{{{name}}} ({meaning})" for name, meaning in PLACEHOLDERS.items()))
    if names.count("history") != 1:
        raise ValueError(f"{{history}} occurs {names.count('history')} times, expected once")


def describe(item, fields):
    """An item as a prompt shows it, "title [category > path] (id)", or "" when it has neither."""
    title = clean_text(item["title"])
    path = " > ".join(filter(None, map(clean_text, item["categories"] or []))) if "categories" in fields else ""
    text = " ".join(filter(None, [title, f"[{path}]" if path else ""]))
    return f"{text} ({clean_text(item['id'])})" if text else ""


def build_prompt(template, task, lines, dataset):
    """The user message. `lines` are described items, oldest first. Titles are inserted once and not expanded again."""
    if task == "partition":
        history = "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))
    else:
        history = "[" + ", ".join(lines) + "]"
    values = {"history": history, "max_interests": str(MAX_INTERESTS), "dataset": clean_text(dataset)}
    return PLACEHOLDER.sub(lambda match: values[match[1]], template)


# ---------------------------------------------------------------- answers

@dataclass
class Parsed:
    """What was read from one answer.

    outcome: ok (exactly what was asked for), repaired (something else that could be read), truncated (cut off; what
    is complete is kept), refused, unparsable. value: list of interests, or of (name, [number, ...]) groups; it may be empty
    unless the outcome is ok or repaired. notes: what was repaired, for the report.
    """
    outcome: str
    value: list = field(default_factory=list)
    notes: list = field(default_factory=list)

    @property
    def usable(self):
        return bool(self.value)


THOUGHT = re.compile(r"<(think|thinking|reasoning)>.*?(</\1>|\Z)", re.S | re.I)
REFUSAL = re.compile(
    r"\b(i(['’]m| am) (sorry|unable|not able)|i (can(['’]t|not| ?not)|won['’]t|must decline)|as an ai\b|"
    r"unable to (assist|help|comply)|cannot (assist|help|fulfil|provide|comply)|against (my|our) (guidelines|policy|policies))"
    r"|抱歉|对不起|无法(提供|回答|协助|满足)|不能(提供|回答|协助)|申し訳|お答えでき|죄송|"
    r"lo siento|no puedo (ayudar|proporcionar)|d[ée]sol[ée]|je ne peux pas|tut mir leid|kann ich (leider )?nicht|"
    r"leider (kann|nicht)|desculpe|mi dispiace|извините|не могу", re.I)
EMPTY = {"", "none", "null", "n a", "na", "nan", "unknown", "undefined", "no interest", "no interests", "interest", "string",
         "text", "first interest", "second interest", "无", "暂无", "なし"}
CONTAINERS = {"interests", "interest", "userinterests", "userinterest", "explicitinterests", "subinterests", "results", "result",
              "answer", "answers", "output", "data", "response", "items", "list", "groups", "categories", "topics",
              "preferences", "json"}
FIELDS = ("interest", "name", "title", "label", "topic", "phrase", "text", "value", "description", "summary", "category",
          "preference")
NUMBERED_KEY = re.compile(
    r"\W*(?:(?:interests?|items?|topics?|groups?|no|number|兴趣|興趣|興味|nr|interés|intérêt)\W*)?\d+\W*", re.I)
ERROR_KEYS = {"error", "refusal", "errormessage"}
PAIR_LINE = re.compile(r'^[ \t]*["“]?(\d{1,3})["”]?[ \t]*[:：][ \t]*["“](.+?)["”][ \t]*,?[ \t]*$', re.M)
LIST_LINE = re.compile(r"^\s*(?:\(?\d{1,3}\s*[.):：、．）]|[-*•‣–—·]|[一二三四五六七八九十]+、)\s*(\S.*)$")


def parse_interests(text, finish_reason=None, limit=MAX_INTERESTS):
    """Read the interests out of an answer, whatever its form. Never raises; linear in the length of `text`.

    text: the message's content, or None. finish_reason: as the chat protocol gives it ("stop", "length", "content_filter").
    """
    text = text if isinstance(text, str) else ""
    notes = []
    strict, values, cut = _values(text, notes)
    found, refusal = [], finish_reason == "content_filter"
    for value in values:  # the candidate with most interests; of equals the last, as an answer follows its example
        errors = []
        candidate = _tidy(_flatten(value, errors), limit, own_notes := [])
        refusal |= bool(errors)
        if candidate and len(candidate) >= len(found):
            found, best_notes = candidate, own_notes
    if found:
        notes += best_notes
        strict &= not best_notes and isinstance(values[-1], dict) and all(isinstance(v, str) for v in values[-1].values()) \
            and all(k.isdigit() for k in values[-1])
    elif not refusal:
        lines = [m[1] for m in map(LIST_LINE.match, _body(text).splitlines()) if m]
        if lines and finish_reason == "length":
            lines.pop()  # it may be cut in the middle
        found = _tidy((re.sub(r"\*\*|__|`", "", line) for line in lines), limit, notes)
        if found:
            notes.append("list")
            strict = False
    outcome = _outcome(text, finish_reason, bool(found), strict, cut, refusal)
    return Parsed(outcome, found if outcome != "refused" else [], notes)


def parse_partition(text, n_items, finish_reason=None):
    """Read {"name": [numbers]} and make it a partition of 1..n_items: [(name, [number, ...]), ...].

    A number named twice stays in its first group, unknown numbers go, forgotten ones form a last group named "other"; each is
    noted and makes the outcome `repaired` at best. Fewer than half of the items placed is unparsable.
    """
    text = text if isinstance(text, str) else ""
    notes = []
    strict, values, cut = _values(text, notes)
    best, refusal = [], finish_reason == "content_filter"
    for value in values:
        groups = _groups(value)
        if sum(len(numbers) for _, numbers in groups) >= sum(len(numbers) for _, numbers in best):
            best = groups
    placed, counts, merged = set(), {"duplicate": 0, "unknown": 0}, {}
    for name, numbers in best:
        own = []
        for number in numbers:
            if not 1 <= number <= n_items:
                counts["unknown"] += 1
            elif number in placed:
                counts["duplicate"] += 1
            else:
                placed.add(number)
                own.append(number)
        name = _cut(clean_text(name)) or "unnamed"
        if own:
            merged.setdefault(name, []).extend(own)
    missing = [number for number in range(1, n_items + 1) if number not in placed]
    usable = len(placed) * 2 >= n_items and bool(placed)
    if usable and missing:
        merged.setdefault("other", []).extend(missing)
    notes += [f"{n} {kind}" for kind, n in [*counts.items(), ("missing", len(missing))] if n and best]
    strict = strict and bool(values) and all(isinstance(v, list) and all(isinstance(n, int) for n in v)
                                             for v in values[-1].values())
    strict &= not (missing or counts["duplicate"] or counts["unknown"]) and len(merged) == len(best)
    outcome = _outcome(text, finish_reason, usable, strict, cut, refusal)
    return Parsed(outcome, [(name, sorted(numbers)) for name, numbers in merged.items()] if usable else [], notes)


def _outcome(text, finish_reason, found, strict, cut, refusal):
    if refusal and not found:
        return "refused"
    if cut or finish_reason == "length":
        return "truncated"
    if found:
        return "ok" if strict else "repaired"
    return "refused" if REFUSAL.search(text[:2000]) else "unparsable"


def _body(text):
    """The answer without a reasoning model's thoughts."""
    return THOUGHT.sub("", text).replace("\ufeff", "")


def _values(text, notes):
    """(strict, values, cut): all JSON values of an answer; strict if the text is one JSON object and nothing else, cut if its
    last value ends before it is closed."""
    body = _body(text).strip()
    if body != text.strip():
        notes.append("thoughts")
    try:
        value = json.loads(body)
        if isinstance(value, str):  # JSON inside a JSON string
            notes.append("nested JSON")
            return False, _values(value, [])[1], False
        return isinstance(value, dict) and not notes, [value] if isinstance(value, (dict, list)) else [], False
    except (ValueError, RecursionError):
        pass
    values, cut, position = [], False, 0
    while match := re.compile(r"[{\[]").search(body, position):
        reader = _Reader(body, match.start())
        value = reader.value(0)
        whole = match.start() == 0 and reader.position == len(body)
        if value and (whole or not reader.bare):  # words in brackets within prose are no list of interests
            values.append(value)
            cut = reader.cut
        position = max(reader.position, match.start() + 1)
    if not values and (pairs := PAIR_LINE.findall(body)):
        values = [dict(pairs)]  # an object without its braces
    if values:
        notes.append("not strict JSON")
    return False, values, cut


class _Reader:
    """A lenient JSON reader: single, curly or missing quotes, missing or trailing commas, comments, Python's None, and a tail
    that is cut off (what is complete is kept, `cut` is set). Reads one value from `position`; never raises, never goes
    back."""
    QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "„": "“", "「": "」", "«": "»", "`": "`"}
    SPACE = re.compile(r"(?:\s|//[^\n]*)*")
    BARE = re.compile(r"[^,:：，{}\[\]\n]+")
    NEXT_KEY = re.compile(r"""["'“][^"'”:：]{0,40}["'”]\s{0,9}[:：]""")
    DEPTH = 40

    def __init__(self, text, position):
        self.text, self.position, self.cut = text, position, False
        self.bare = False  # an element of an array or set has no quotes

    def _skip(self):
        self.position = self.SPACE.match(self.text, self.position).end()
        return self.text[self.position:self.position + 1]

    def value(self, depth):
        """The value here, or None for an incomplete or null one."""
        start = self._skip()
        if start in ("{", "["):
            if depth >= self.DEPTH:
                self.position += 1
                return None
            return self._container(depth)
        if start in self.QUOTES and start:
            return self._string(self.QUOTES[start])
        match = self.BARE.match(self.text, self.position)
        if not match:
            return None
        self.position = match.end()
        bare = match[0].strip()
        if self.position >= len(self.text):
            self.cut = True
            return None
        if bare.lower() in ("null", "none", "true", "false"):
            return None
        return int(bare) if re.fullmatch(r"-?\d{1,9}", bare) else bare

    def _container(self, depth):
        """The object or array that opens here. A set such as {"a", "b"} is an object with the keys "1", "2"."""
        keyed = self.text[self.position] == "{"
        result = {} if keyed else []
        self.position += 1
        while True:
            here = self._skip()
            if here == "":
                self.cut = True
                return result
            if here in "}]":
                self.position += 1
                return result
            if here in ",;，、":
                self.position += 1
                continue
            before = self.position
            value = self.value(depth + 1)
            if keyed and self._skip() in (":", "：") and self.position < len(self.text):
                self.position += 1
                key, value = value, self.value(depth + 1)
                if value is not None and key is not None:
                    key = key if isinstance(key, str) else json.dumps(key, ensure_ascii=False)
                    result[key if key not in result else f"{key}#{len(result)}"] = value
            elif value is not None:
                self.bare |= here not in self.QUOTES and (keyed or isinstance(value, str))
                if keyed:
                    result[str(len(result) + 1)] = value
                else:
                    result.append(value)
            if self.position == before:
                self.position += 1

    def _string(self, closing):
        """Up to the closing quote; one inside, as in 24" monitor or kid's, is told by what follows: it does not end the value."""
        self.position += 1
        start, parts = self.position, []
        for match in re.compile(r"\\(.)|" + re.escape(closing), re.S).finditer(self.text, start):
            if match[1] is not None:
                parts.append(self.text[start:match.start()])
                if match[1] == "u" and re.fullmatch(r"[0-9a-fA-F]{4}", code := self.text[match.end():match.end() + 4]):
                    parts.append(chr(int(code, 16)))
                    start = match.end() + 4
                else:
                    parts.append({"n": "\n", "t": " ", "r": " ", "b": " ", "f": " "}.get(match[1], match[1]))
                    start = match.end()
                continue
            if match.start() < start:
                continue
            after = self.SPACE.match(self.text, match.end()).end()
            following = self.text[after:after + 1]
            if following == "" or following in ",:：，}];、" or (following in self.QUOTES and (
                    "\n" in self.text[match.end():after] or self.NEXT_KEY.match(self.text, after))):
                parts.append(self.text[start:match.start()])
                self.position = match.end()  # escaped surrogate pairs are joined
                return "".join(parts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        self.position, self.cut = len(self.text), True
        return None


def _plain(key):
    return re.sub(r"[\W_\d]+", "", key).lower()


def _flatten(value, errors, name=""):
    """The strings of a parsed value that are interests, in order. `name` is the key that holds the value."""
    if isinstance(value, str):
        inner = value.strip()
        if inner[:1] in "{[" and inner[-1:] in "}]" and len(inner) > 1:  # JSON as a string inside JSON
            _, values, _ = _values(inner, [])
            if values:
                yield from _flatten(values[-1], errors, name)
                return
        yield f"{name}: {value}" if name else value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if name:  # {"gel pens": 0.8}: the key is the interest, the number its strength
            yield name
    elif isinstance(value, list):
        for part in value:
            yield from _flatten(part, errors)
    elif isinstance(value, dict):
        plain = {re.sub(r"[\W_]+", "", key).lower(): key for key in value}
        if errors_here := [key for key in plain if key in ERROR_KEYS]:
            errors.extend(errors_here)
            return
        chosen = next((plain[f] for f in FIELDS if f in plain and isinstance(value[plain[f]], str)), None)
        if chosen is not None and not any(isinstance(v, (list, dict)) and _plain(k) in CONTAINERS for k, v in value.items()):
            yield from _flatten(value[chosen], errors)
            return
        for key, part in value.items():
            generic = NUMBERED_KEY.fullmatch(key) or _plain(key) in CONTAINERS or not _plain(key)
            if isinstance(part, (int, float)) and (generic or _plain(key) in ("id", "userid", "user", "count", "total", "score",
                                                                                                        "confidence")):
                continue
            yield from _flatten(part, errors, "" if generic else clean_text(re.sub(r"#\d+$", "", key)))


def _tidy(strings, limit, notes):
    """Cleaned, distinct, non-empty interests; at most `limit`."""
    kept = {}
    dropped = cut = 0
    for raw in strings:
        text = clean_text(raw)
        text = re.sub(r"^(?:[-*•]\s+|\(?\d{1,2}[.)]\s+)+", "", text).strip(" \t\"'“”‘’`*,;")
        key = re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
        if key in EMPTY or not any(c.isalpha() for c in text):
            dropped += 1
        elif key in kept:
            cut += 1
        else:
            kept[key] = _cut(text)
    interests = list(kept.values())
    notes += [note for note, n in ((f"{dropped} empty", dropped), (f"{cut} duplicate", cut),
                                   (f"{len(interests) - limit} over the limit", len(interests) > limit)) if n]
    return interests[:limit]


def _cut(text):
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS].rsplit(" ", 1)[0]


def _groups(value, depth=0):
    """[(name, [number, ...])] from {"name": [1, 2]}, {"groups": [{"name": .., "items": [..]}]} and the like."""
    groups = []
    if isinstance(value, list):
        for part in value:
            groups += _groups(part, depth + 1) if isinstance(part, dict) and depth < 5 else []
    elif isinstance(value, dict):
        name = next((value[k] for k in value if _plain(k) in FIELDS and isinstance(value[k], str)), None)
        for key, part in value.items():
            if isinstance(part, str) and re.fullmatch(r"[\s\d,;#]+", part):
                part = [int(n) for n in re.findall(r"\d{1,9}", part)]
            elif isinstance(part, int) and not isinstance(part, bool) and name is None:
                part = [part]
            numbers = [_number(p) for p in part] if isinstance(part, list) else []
            if numbers and all(n is not None for n in numbers):
                groups.append((name or key, numbers))
            elif isinstance(part, (dict, list)) and depth < 5:
                groups += _groups(part, depth + 1)
    return groups


def _number(value):
    """The item number in 3, "3" or "3. title", else None."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.match(r"\s*#?(\d{1,9})\b", value) if isinstance(value, str) else None
    return int(match[1]) if match else None
