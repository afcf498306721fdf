"""Stage 01: raw interactions and item metadata -> filtered sequences, item table, split (paper, section 4.1).

Reads, from --raw-dir by the name --source or named one by one with --interactions and --items:
    Amazon 2014/2018/2023 reviews and metadata (JSON or Python-literal lines), RecBole .inter/.item files, CSV or TSV;
    plain or gzipped. `eimf/readers.py` lists the field names.
Writes to <data-dir>/<dataset>/01_preprocess/ (items are numbered from 1, users from 0):
    items.jsonl            line i is item i: item, id, title (or null), categories (list), brand (or null)
    users.txt              line u is user u's id
    sequence_items.npy     int32 (interactions,)  all users' item numbers, user after user, oldest first
    sequence_times.npy     int64 (interactions,)  Unix time of each, seconds
    sequence_offsets.npy   int64 (users + 1,)     user u's events are [offsets[u], offsets[u + 1])
    split.npy              uint8 (users,)         0 train, 1 valid, 2 test; all 0 with --split leave-one-out
    stats.json             the table printed at the end, and every broken line's count, first examples and reasons

    python stages/01_preprocess.py --dataset Office_Products --raw-dir DIR --split file-order

prints, among others (they are the published counts):
    users                         4,905
    items                         2,420
    interactions                 53,258

Exact copies of an event (same user, item and time) are dropped first. Then items, then users with fewer than
--min-interactions events are dropped, one pass each as in the paper (--k-core repeats until nothing changes). Items are
numbered by descending number of events, ties by first appearance in the file; users by first appearance. Events of
the same time keep the order of the file.
"""
import time
from pathlib import Path

import numpy as np
from eimf.artifacts import Stage, UserError, argument_parser, run, save_array, save_json, save_lines
from eimf.data import TEST, TRAIN, VALID
from eimf.readers import FORMATS, Report, detect, read_events, read_items
from numpy.dtypes import StringDType

INTERACTION_NAMES = ("reviews_{}_5.json", "reviews_{}.json", "{}_5.json", "{}.jsonl", "{}.json", "{}.inter",
                     "{}/{}.inter", "{}.csv", "{}.tsv")
ITEM_NAMES = ("meta_{}.json", "meta_{}.jsonl", "{}.item", "{}/{}.item", "{}_items.csv", "{}_items.tsv")
BLOCK = 1 << 18  # events; NumPy widens int32 indices to int64, which for all events at once would take as much as the columns


def parse_arguments(argv):
    parser = argument_parser(__doc__)
    parser.add_argument("--raw-dir", type=Path, help="folder of the raw files (default: <data-dir>/raw)")
    parser.add_argument("--source", help="name in the raw files' names (default: the data set's)")
    parser.add_argument("--interactions", type=Path, help="the interactions' file, whatever its name")
    parser.add_argument("--items", type=Path, help="the item metadata's file, whatever its name")
    parser.add_argument("--download", action="store_true", help="fetch the public Amazon 2014 files into --raw-dir first")
    parser.add_argument("--base-url", help="where --download finds them (default: the server of the public files)")
    parser.add_argument("--format", default="auto", choices=["auto", *FORMATS], help="format of the interactions")
    for name in ("user", "item", "time", "title", "category", "brand"):
        parser.add_argument(f"--{name}-column", help=f"field of the {name} (default: the format's own name)")
    parser.add_argument("--time-unit", choices=["s", "ms"],
                        help="unit of numeric times (default: ms in amazon-2023, else s)")
    parser.add_argument("--min-interactions", type=int, default=5,
                        help="fewest events of an item and of a user (paper: 5)")
    parser.add_argument("--k-core", action="store_true", help="repeat the filter until all that is left satisfies it")
    parser.add_argument("--split", default="random", choices=["random", "file-order", "leave-one-out"],
                        help="users 8:1:1 at random or in order of first appearance, or each user's last two events")
    parser.add_argument("--seed", type=int, default=0, help="seed of --split random")
    return parser.parse_args(argv)


def find(folder, names, source):
    """The first of `names` (also with .gz) that exists in `folder`, or None; and the list of all that were tried."""
    tried = [folder / (name.replace("{}", source) + suffix) for name in names for suffix in (".gz", "")]
    return next((path for path in tried if path.is_file()), None), tried


def locate(args):
    """(interactions file, items file or None). Raises UserError that lists what was looked for."""
    for path in filter(None, (args.interactions, args.items)):
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    if args.interactions:
        if args.download:
            raise UserError("--download fetches files by --source; it does not go with --interactions")
        return args.interactions, args.items
    folder, source = args.raw_dir or args.data_dir / "raw", args.source or args.dataset
    if args.download:
        from eimf.download import BASE_URL, download  # not above: `requests` takes 7 MiB that few runs need
        download(source, folder, args.base_url or BASE_URL)
    interactions, tried = find(folder, INTERACTION_NAMES, source)
    if interactions is None:
        advice = ("python data/make_sample.py makes the sample's files" if source == "sample" else
                  "Give --raw-dir DIR and --source NAME, or --interactions FILE, or --download for a public 2014 data set")
        raise UserError(f"no interactions in {folder}; looked for {', '.join(str(t.relative_to(folder)) for t in tried)}. "
                        f"{advice}.")
    items, tried = (args.items, []) if args.items else find(folder, ITEM_NAMES, source)
    if items is None and ".json" in interactions.name:
        raise UserError(f"no item metadata in {folder}; looked for {', '.join(str(t.relative_to(folder)) for t in tried)}. "
                        f"Give --items FILE, or --interactions {interactions} alone to go without titles.")
    return interactions, items


def given_columns(args):
    """The field names that were named by flags."""
    given = {"user": args.user_column, "item": args.item_column, "time": args.time_column, "title": args.title_column,
             "categories": args.category_column, "brand": args.brand_column}
    return {column: name for column, name in given.items() if name is not None}


def ordered(columns):
    """(users, items, times) sorted by user, then time, ties in the given order, exact copies dropped; and how many.

    Empties the list `columns`, so that each raw column is freed as soon as it has been sorted.
    """
    users, items, times = (np.frombuffer(column, dtype=column.typecode) for column in columns)
    columns.clear()
    order = np.lexsort((times, users))  # stable
    users = users[order]
    items = items[order]
    times = times[order]
    del order
    same = np.zeros(len(users) + 1, bool)  # event j has the user and time of event j - 1
    same[1:-1] = (users[1:] == users[:-1]) & (times[1:] == times[:-1])
    tied = np.flatnonzero(same[1:] | same[:-1])
    group = np.cumsum(~same[tied])
    inner = np.argsort(items[tied], kind="stable")  # groups stay ascending within an item
    again = (np.diff(group[inner]) == 0) & (np.diff(items[tied][inner]) == 0)
    copies = tied[inner[1:][again]]
    if len(copies):
        keep = np.ones(len(users), bool)
        keep[copies] = False
        users = users[keep]
        items = items[keep]
        times = times[keep]
    return users, items, times, len(copies)


def frequent(users, items, minimum, repeat):
    """Mask of the events whose item, then user, has at least `minimum` events (paper, 4.1); until stable on `repeat`."""
    keep = np.ones(len(users), bool)
    blocks = [slice(start, start + BLOCK) for start in range(0, len(users), BLOCK)]
    while True:
        before = np.count_nonzero(keep)
        for ids in (items, users):
            count = np.zeros(ids.max() + 1, np.int64)
            for block in blocks:
                count += np.bincount(ids[block][keep[block]], minlength=len(count))
            enough = count >= minimum
            for block in blocks:
                keep[block] &= enough[ids[block]]
        if not repeat or np.count_nonzero(keep) == before:
            return keep


def renumbered(users, items):
    """Final numbers for sorted events with raw numbers in order of first appearance.

    Returns (raw number of each final user, ascending; offsets int64 (users + 1,); raw number of each final item, by
    descending number of events, ties by first appearance; the events' final item numbers, int32, from 1).
    """
    popularity, activity = np.bincount(items), np.bincount(users)
    kept_items = np.argsort(-popularity, kind="stable")[:np.count_nonzero(popularity)]
    kept_users = np.flatnonzero(activity)
    number = np.zeros(len(popularity), np.int32)
    number[kept_items] = np.arange(1, len(kept_items) + 1)
    offsets = np.zeros(len(kept_users) + 1, np.int64)
    np.cumsum(activity[kept_users], out=offsets[1:])
    return kept_users, offsets, kept_items, number[items]


def doubtful(first, last, scale):
    """What speaks against the unit of the times, milliseconds of the first and last event; None if nothing does."""
    if 19_000_101 * scale <= first and last <= 21_001_231 * scale:
        return "times such as {} are read as numbers, not as dates; if they are dates, write them as 2023-01-13".format(first // scale)
    if last > (time.time() + 366 * 86400) * 1000:
        unit = "s" if scale == 1000 else "ms"
        return f"the last event lies more than a year ahead; times are read as {unit}, see --time-unit"
    return None


def split_users(n, kind, seed):
    """uint8 (n,): the first int(0.8 n) users of the order train, the next int(0.1 n) valid, the rest test."""
    split = np.full(n, TRAIN, np.uint8)
    if kind != "leave-one-out":
        if n < 10:
            raise UserError(f"{n} users are left; an 8:1:1 split needs at least 10. Lower --min-interactions, or use more "
                            "data")
        order = np.random.default_rng(seed).permutation(n) if kind == "random" else np.arange(n)
        train, valid = int(0.8 * n), int(0.1 * n)
        split[order[train:train + valid]] = VALID
        split[order[train + valid:]] = TEST
    return split


def add_metadata(rows, path, form, given, report):
    """Fill in `rows` (id -> title, categories, brand) from the metadata; each comes from the first line that has it.

    Returns whether there was any line about one of them.
    """
    required = [column for column in ("title", "categories", "brand") if column in given]
    found = False
    for key, *fields in read_items(path, form, FORMATS[form] | given, rows, report, required):
        rows[key], found = tuple(old or new for old, new in zip(rows[key], fields)), True
    return found


def main(argv=None):
    args = parse_arguments(argv)
    if args.min_interactions < 1:
        raise UserError(f"--min-interactions is {args.min_interactions}; expected 1 or more")
    stage = Stage("01_preprocess", args)
    interactions, metadata = locate(args)
    stage.input_file(interactions, f"interactions/{interactions.name}")
    if metadata:
        stage.input_file(metadata, f"items/{metadata.name}")
    if stage.is_done():
        return
    folder = stage.begin()

    given = given_columns(args)
    form = detect(interactions, given.values()) if args.format == "auto" else args.format
    stage.log.info("reading %s as %s", interactions, form)
    scale = 1 if (args.time_unit or ("ms" if form == "amazon-2023" else "s")) == "ms" else 1000
    report = Report(interactions)
    *columns, user_index, item_index = read_events(interactions, form, FORMATS[form] | given, scale, report)
    user_ids, item_ids = (np.array(list(index), StringDType()) for index in (user_index, item_index))  # a third of Python's str
    user_index.clear()
    item_index.clear()
    read = len(columns[0])
    if not read:
        raise UserError(f"{interactions}: no interactions, only blank lines")
    users, items, times, copies = ordered(columns)
    keep = frequent(users, items, args.min_interactions, args.k_core)
    users = users[keep]  # one after the other, so that only one column is there twice
    items = items[keep]
    times = times[keep]
    if not len(users):
        raise UserError(f"{interactions}: nothing is left of {read:,} interactions by {len(user_ids):,} users with "
                        f"{len(item_ids):,} items when each needs {args.min_interactions}; lower --min-interactions")

    if doubt := doubtful(int(times.min()), int(times.max()), scale):
        stage.log.warning("%s: %s", interactions, doubt)
    for what, ids in (("user", user_ids), ("item", item_ids)):
        if len(padded := ids[np.strings.strip(ids) != ids]):
            stage.log.warning("%s: %d %s ids begin or end with a blank, such as %r; it is taken as a part of the id",
                              interactions, len(padded), what, padded[0])
    kept_users, offsets, kept_items, items = renumbered(users, items)
    del users, keep
    split = split_users(len(kept_users), args.split, args.seed)

    rows = dict.fromkeys(item_ids[kept_items].tolist(), (None, [], None))
    reports = [report]
    if metadata is not None:
        item_form = detect(metadata, given.values())
        same_kind = item_form.startswith("amazon") == form.startswith("amazon")  # else the flags are not about this file
        reports.append(Report(metadata))
        if not add_metadata(rows, metadata, item_form, given if same_kind else {}, reports[1]):
            stage.log.warning("%s: no line is about any of the %d items that are kept, such as %r; are the ids of both files the same?",
                              metadata, len(rows), next(iter(rows)))
    elif not form.startswith("amazon"):  # titles may stand beside the interactions
        add_metadata(rows, interactions, form, given, Report(interactions))

    for r in reports:
        if r.broken:
            stage.log.warning("%s: %d of %d lines are broken and left out; the first is line %d: %s (more in stats.json)",
                              r.path, r.broken, r.lines, r.examples[0]["line"], r.examples[0]["reason"])
    save_lines(folder / "items.jsonl", ({"item": n, "id": key, "title": title, "categories": categories, "brand": brand}
                                        for n, (key, (title, categories, brand)) in enumerate(rows.items(), 1)))
    save_lines(folder / "users.txt", user_ids[kept_users])
    save_array(folder / "sequence_items.npy", items)
    times //= 1000
    save_array(folder / "sequence_times.npy", times)
    save_array(folder / "sequence_offsets.npy", offsets)
    save_array(folder / "split.npy", split)
    train, valid, test = np.bincount(split, minlength=3).tolist()
    stats = {
        "users": len(kept_users), "items": len(kept_items), "interactions": len(items),
        "mean_length": round(len(items) / len(kept_users), 3), "split": args.split,
        "train_users": train, "valid_users": valid, "test_users": test,
        "items_with_title": sum(title is not None for title, _, _ in rows.values()),
        "items_with_categories": sum(bool(categories) for _, categories, _ in rows.values()),
        "events_read": read, "duplicates_dropped": copies, "filtered_out": read - copies - len(items),
        "broken_lines": sum(r.broken for r in reports), "files": [r.as_dict() for r in reports],
    }
    save_json(folder / "stats.json", stats)
    summary = {key: value for key, value in stats.items() if key != "files"}
    for key, value in summary.items():
        print(f"{key.replace('_', ' '):22} {value if isinstance(value, str) else format(value, ','):>12}")
    stage.finish(summary)


if __name__ == "__main__":
    run(main)
