"""Raw interaction logs and item metadata, line by line, in every format that stage 01 accepts.

amazon       2014, 2018: JSON or Python-literal lines with reviewerID, asin, unixReviewTime;
             items: asin, title, categories (2018: category), brand
amazon-2023  JSON lines with user_id, parent_asin, timestamp (ms); items: parent_asin, title, categories, store
recbole      atomic files .inter and .item: tabs, never quoted, a typed header such as user_id:token; names as in csv
csv, tsv     a header with user_id, item_id, timestamp; items, beside them or in another file: title, categories, brand

Files are streamed and may be gzipped. A line that cannot be used is counted with its number and the reason, never
silently dropped; more than 1 % of them is an error.
"""
import ast
import csv
import gzip
import html
import io
import json
import re
import warnings
import zlib
from array import array
from contextlib import contextmanager
from datetime import datetime, timezone
from operator import itemgetter

from tqdm import tqdm

from .artifacts import UserError

COLUMNS = ("user", "item", "time", "title", "categories", "brand")
DELIMITED = dict(zip(COLUMNS, ("user_id", "item_id", "timestamp", "title", "categories", "brand")))
FORMATS = {  # names of the fields
    "amazon": dict(zip(COLUMNS, ("reviewerID", "asin", "unixReviewTime", "title", "categories", "brand"))),
    "amazon-2023": dict(zip(COLUMNS, ("user_id", "parent_asin", "timestamp", "title", "categories", "store"))),
    "recbole": DELIMITED, "csv": DELIMITED, "tsv": DELIMITED,
}
BROKEN_LIMIT = 0.01
ID_CHARACTERS = 1024  # of an id at most; the server bounds what it is sent by the same number
INT64_MAX = 2**63 - 1
# An id is one line of users.txt, so no control characters; lone surrogates stand for bytes that are not UTF-8.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
SURROGATE = re.compile("[\ud800-\udfff]")
BINARY = {b"PK\x03\x04": "a zip", b"\xfd7zXZ": "an xz", b"BZh": "a bzip2", b"\x28\xb5\x2f\xfd": "a zstd", b"PAR1": "a parquet"}
# The public 2014 metadata lines begin with the id; reading it alone saves parsing the items that no event names.
LEADING_ID = re.compile(r"""\s*\{\s*(['"])(?:parent_)?asin\1\s*:\s*(['"])([\w-]+)\2\s*[,}]""")


class BadLine(ValueError):
    """One line cannot be used; the message is the reason."""


class Report:
    """What happened to the lines of one file: `lines` read, `broken` ones, the first `examples` of these.

    `span` is the number of lines that the record at hand takes: more than 1 for a quoted field with line breaks in it.
    """

    def __init__(self, path):
        self.path, self.lines, self.broken, self.examples, self.span = path, 0, 0, [], 1

    def bad(self, number, reason):
        """Count the record that begins on line `number` (from 1) as broken, with all its lines."""
        self.broken += self.span
        if len(self.examples) < 5:
            self.examples.append({"file": self.path.name, "line": number, "reason": reason})

    def check(self):
        """Raise UserError when nothing was read or too much of it was broken."""
        if not self.lines:
            raise UserError(f"{self.path}: no lines of data; expected one interaction or item per line")
        if self.broken > BROKEN_LIMIT * self.lines:
            examples = "; ".join(f"line {e['line']}: {e['reason']}" for e in self.examples)
            raise UserError(f"{self.path}: {self.broken:,} of {self.lines:,} lines are broken, at most "
                            f"{BROKEN_LIMIT:.0%} may be ({examples}). Is --format right, and is the file complete?")

    def as_dict(self):
        return {"file": self.path.name, "lines": self.lines, "broken": self.broken, "examples": self.examples}


class Index(dict):
    """Numbers 0, 1, ... for ids in order of first appearance; looking up a new id gives it the next number."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def __missing__(self, key):
        if type(key) is int:  # a JSON number
            return self[str(key)]
        self[key] = number = len(self)
        try:
            check_id(key, self.what)
        except BadLine:
            del self[key]
            raise
        return number


def check_id(key, what):
    """Raise BadLine unless `key` can stand on a line of its own."""
    if type(key) is not str:
        raise BadLine(f"the {what} is {key!r:.40}, not a string")
    if not key.strip():
        raise BadLine(f"the {what} is empty")
    if len(key) > ID_CHARACTERS:
        raise BadLine(f"the {what} {key[:40]!r}... has {len(key):,} characters, at most {ID_CHARACTERS:,} are allowed")
    if CONTROL.search(key):
        raise BadLine(f"control character in the {what} {key!r:.60}")
    if SURROGATE.search(key):
        raise BadLine(f"bytes that are not UTF-8 in the {what} {key!r:.60}")


@contextmanager
def open_text(path):
    """Open a plain or gzipped UTF-8 file (told by its first bytes) for reading; yields (text file, raw file)."""
    try:
        with open(path, "rb") as raw:
            start = raw.read(1 << 12)
            raw.seek(0)
            if start.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise UserError(f"{path}: UTF-16 text; expected UTF-8. Convert it: iconv -f utf-16 -t utf-8")
            zipped = start.startswith(b"\x1f\x8b")
            kind = next((kind for magic, kind in BINARY.items() if start.startswith(magic)), "a binary" if b"\0" in start else None)
            if kind and not zipped:
                raise UserError(f"{path}: {kind} file; expected UTF-8 text, plain or gzipped")
            data = gzip.GzipFile(fileobj=raw) if zipped else raw
            yield io.TextIOWrapper(io.BufferedReader(data, 1 << 18), encoding="utf-8-sig", errors="surrogateescape",
                                   newline="\n"), raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged or incomplete gzip file ({error}); fetch or copy it again") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def parse_line(line):
    """One JSON object or Python dict literal. Raises BadLine."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = str(error)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # '\d' in a title is no business of ours
                record = ast.literal_eval(line.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise BadLine(f"neither JSON ({reason}) nor a Python literal: {line.strip()[:40]!r}...") from None
    if not isinstance(record, dict):
        raise BadLine(f"expected an object with named fields, found {line.strip()[:40]!r}")
    return record


def detect(path, names=()):
    """The format's name, from the file's name and its first lines; JSON lines with a field in `names` are "amazon".

    Raises UserError that says what was found.
    """
    if re.search(r"\.(inter|item)(\.gz)?$", path.name):
        return "recbole"
    with open_text(path) as (file, _):
        lines = [line for _, line in zip(range(100), file) if not line.isspace()]
    if not lines:
        raise UserError(f"{path}: the file is empty; expected one interaction or item per line")
    if lines[0].lstrip().startswith("["):
        raise UserError(f"{path}: a JSON array; expected one JSON object per line (jq -c '.[]' makes them)")
    if not lines[0].lstrip().startswith("{"):
        return "tsv" if lines[0].count("\t") > lines[0].count(",") else "csv"
    for line in lines:
        try:
            record = parse_line(line)
        except BadLine:
            continue
        if "parent_asin" in record:
            return "amazon-2023"
        if "asin" in record or any(name in record for name in names):
            return "amazon"
        raise UserError(f"{path}: JSON lines with the fields {', '.join(map(str, record))}; expected "
                        f"{_expected('amazon')} or {_expected('amazon-2023')}. "
                        "Name yours with --user-column, --item-column, --time-column")
    raise UserError(f"{path}: none of the first {len(lines)} lines is a JSON object or Python literal")


def _expected(name):
    return ", ".join(FORMATS[name][c] for c in ("user", "item", "time"))


def _json_records(file, report, wanted):
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        report.lines += 1
        if wanted is not None and (match := LEADING_ID.match(line)) and match[3] not in wanted:
            continue
        try:
            yield number, parse_line(line)
        except BadLine as error:
            report.bad(number, str(error))


def _rows(reader, width, report):
    number = reader.line_num + 1  # the line on which the next row begins
    while True:
        try:
            for row in reader:
                report.span = reader.line_num + 1 - number
                if len(row) == width:
                    yield number, row
                elif row:
                    report.bad(number, f"{len(row)} fields where the header has {width}")
                number = reader.line_num + 1
            report.lines = reader.line_num - 1  # without the header
            return
        except csv.Error as error:
            report.span = reader.line_num + 1 - number
            report.bad(number, str(error))
            number = reader.line_num + 1


def records(path, form, report, wanted=None):
    """Stream a file as (line number, record); with names -> keys of a record as the first value.

    JSON records are dicts, delimited ones lists; `keys` maps a field's name to its key or position in the record.
    `wanted` (ids) lets a metadata line of another item be passed over unparsed. Broken lines go to `report`.
    """
    with open_text(path) as (file, raw), tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name,
                                              disable=None) as bar:
        if form.startswith("amazon"):
            yield None
            source = _json_records(file, report, wanted)
        else:
            # RecBole never quotes; a CSV quote that is not closed must not swallow lines unseen, hence strict.
            reader = csv.reader(file, delimiter="," if form == "csv" else "\t", strict=True,
                                quoting=csv.QUOTE_NONE if form == "recbole" else csv.QUOTE_MINIMAL)
            try:
                header = next(reader, [])
            except csv.Error as error:
                reason = "its lines end with a carriage return alone; convert them: tr '\\r' '\\n'" if "new-line" in str(error) else error
                raise UserError(f"{path}: the header cannot be read ({reason})") from None
            names = [name.split(":")[0] if form == "recbole" else name.strip() for name in header]
            yield names
            source = _rows(reader, len(names), report)
        for number, record in source:
            if not number & 0xffff:
                bar.update(raw.tell() - bar.n)
            yield number, record
        bar.update(raw.tell() - bar.n)
    report.check()


def field_keys(names, fields, columns, required, path):
    """Keys into a record for each of `columns`: the field's name for JSON, its position for a header of `names`.

    A column that the header lacks is left out, or a UserError if it is in `required`.
    """
    if names is None:
        return {c: fields[c] for c in columns}
    missing = [fields[c] for c in required if fields[c] not in names]
    if missing:
        found = ", ".join(name[:40] if name[:40].isprintable() else repr(name[:40]) for name in names[:20]) or "none"
        raise UserError(f"{path}: no column {', '.join(missing)}; columns found: {found}{', ...' * (len(names) > 20)}. "
                        "Name yours with --user-column, --item-column, --time-column, --title-column, --category-column")
    return {c: names.index(fields[c]) for c in columns if fields[c] in names}


def milliseconds(value, scale):
    """Whole milliseconds from a number (x `scale`), its text, or an ISO 8601 date (UTC if it names no zone)."""
    try:
        result = int(value) * scale if type(value) in (int, str) else round(float(value) * scale)
    except (ValueError, TypeError, OverflowError):  # "1.5", a date, NaN, infinity, null, a list
        result = _milliseconds_of_text(value, scale)
    if not -INT64_MAX <= result <= INT64_MAX:
        raise BadLine(f"the time {value!r:.40} is out of range")
    return result


def _milliseconds_of_text(value, scale):
    try:
        return round(float(value) * scale)
    except (ValueError, TypeError, OverflowError):
        pass
    try:
        moment = datetime.fromisoformat(value.replace("Z", "+00:00"))
        return round((moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp() * 1000)
    except (ValueError, AttributeError, OverflowError):
        raise BadLine(f"the time is {value!r:.40}, expected a number or an ISO date") from None


def read_events(path, form, fields, scale, report):
    """All interactions of a file in its order.

    Returns (users, items, times, user index, item index): int32, int32 and int64 arrays, one entry per event, times in
    milliseconds (raw time x `scale`), and the `Index` of the ids. Memory: 16 bytes an event, and one entry per id.
    """
    users, items = Index("user id"), Index("item id")
    columns = array("i"), array("i"), array("q")
    add_user, add_item, add_time = (column.append for column in columns)
    source = records(path, form, report)
    needed = ("user", "item", "time")
    keys = field_keys(next(source), fields, needed, needed, path)
    pick = itemgetter(*(keys[column] for column in needed))
    for number, record in source:
        try:
            user, item, time = pick(record)
            time = milliseconds(time, scale)
            user, item = users[user], items[item]
        except KeyError as error:
            report.bad(number, f"no field {error}; fields found: {', '.join(map(str, record))[:200]}")
        except BadLine as error:
            report.bad(number, str(error))
        except TypeError:  # an id that is a list or an object cannot be looked up
            report.bad(number, "an id is neither a string nor a number")
        else:
            add_user(user)
            add_item(item)
            add_time(time)
    return *columns, users, items


def clean(text):
    """A title or name as people read it: HTML entities unescaped once, control characters and runs of blanks -> one
    blank. None for anything but text with something in it. Raises BadLine for bytes that are not UTF-8."""
    if not isinstance(text, str):
        return None
    if SURROGATE.search(text):
        raise BadLine(f"bytes that are not UTF-8 in {text!r:.60}")
    return " ".join(CONTROL.sub(" ", html.unescape(text)).split()) or None


def category_names(value):
    """A list of names, root first. Of Amazon 2014's list of paths the longest one (the first among equals) is taken;
    text is split at the first of `|`, ` > ` and `, ` that occurs in it."""
    if isinstance(value, str):
        separator = next((s for s in ("|", ">", ", ") if s in value), "|")
        value = [name.strip().strip("'\"") for name in value.strip().strip("[]").split(separator)]
    if not isinstance(value, (list, tuple)):
        return []
    paths = [path for path in value if isinstance(path, (list, tuple))]
    names = [clean(name) for name in (max(paths, key=len) if paths else value)]
    return [name for name in names if name]


def read_items(path, form, fields, wanted, report, required=()):
    """Yield (id, title or None, category names, brand or None) for the lines whose id is in `wanted`.

    `required`: columns beside the id that a header must have.
    """
    source = records(path, form, report, wanted)
    keys = field_keys(next(source), fields, ("item", "title", "categories", "brand"), ("item", *required), path)
    if len(keys) == 1:
        return  # a header with no column but the id
    for number, record in source:
        try:
            if isinstance(record, dict):
                key = record.get(keys["item"])
                if key is None:
                    raise BadLine(f"no field {keys['item']!r}; fields found: {', '.join(map(str, record))[:200]}")
                title, brand = record.get(keys["title"]), record.get(keys["brand"])
                categories = record.get(keys["categories"], record.get("category"))  # 2014, 2018
            else:
                key = record[keys["item"]]
                title, categories, brand = (record[keys[c]] if c in keys else None
                                            for c in ("title", "categories", "brand"))
            key = str(key)
            if key in wanted:
                yield key, clean(title), category_names(categories), clean(brand)
        except BadLine as error:
            report.bad(number, str(error))
