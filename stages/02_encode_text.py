"""Stage 02: item titles -> frozen text vectors, and each user's mean of them (paper 3.2.1, Eq. 1).

Every title is encoded alone, so nothing of a long history is cut and a vector is cached by its text. A user's vector is the mean
over the titled events that training may see; validation and test users keep zero rows. Items without a title are
masked, never encoded as an empty string.

Reads  01_preprocess/   items.jsonl, sequence_items.npy, sequence_offsets.npy, split.npy, stats.json
Writes 02_encode_text/  item_text.npy      float32 (items + 1, d_t), row = item number, row 0 and untitled items zero
                        item_has_text.npy  bool (items + 1,)
                        user_text.npy      float32 (users, d_t), zero without a titled training event
                        item_ids.txt       items + 1 lines, line r names row r of item_text.npy (the first is padding)
                        encoder.json       what determines the vectors; 05_encode_interests uses the same encoder
Also   <cache-dir>/<fingerprint>.sqlite, the vector cache that all data sets share

    python stages/02_encode_text.py --dataset sample
    torchrun --standalone --nproc-per-node 2 -- stages/02_encode_text.py --dataset sample      # the processes share the titles

prints the texts encoded and cached, items and training users with text, and the seconds.
"""
import numpy as np
import scipy.sparse

from eimf import artifacts
from eimf.artifacts import Stage, UserError, save_array, save_json, save_lines
from eimf.data import load_interactions, load_items, range_positions
from eimf.encoder import TextEncoder, add_encoder_arguments, find_model, model_files, pick_device
from eimf.interests import clean_text

FIELDS = ("title", "brand", "categories")


def parse_arguments(argv):
    parser = artifacts.argument_parser(__doc__)
    add_encoder_arguments(parser)
    parser.add_argument("--fields", default="title",
                        help=f"what stands for an item, joined in this order: any of {', '.join(FIELDS)} (paper: title)")
    args = parser.parse_args(argv)
    unknown = [f for f in args.fields.split(",") if f not in FIELDS]
    if unknown:
        parser.error(f"--fields {args.fields}: {unknown[0]!r} is none of {', '.join(FIELDS)}")
    return args


def item_texts(items, fields):
    """Text of every item number, "" when it has none of the fields. `items` as load_items returns it (index 0 is None)."""
    texts = [""]
    for item in items[1:]:
        parts = [" > ".join(item[f] or []) if f == "categories" else item[f] for f in fields]
        texts.append(". ".join(part for part in map(clean_text, parts) if part))
    return texts


def user_means(interactions, item_text, has_text):
    """Mean text vector over each user's titled training events, Eq. (1), else zero.

    Returns (float32 (users, d_t), training users with text, training users).
    """
    users, start, end = interactions.training_ranges()
    items = interactions.items[range_positions(start, end)]
    row_start = np.concatenate([[0], np.cumsum(end - start)])
    # counts[u, i] = how often u's history holds titled item i; the product with it adds up the title vectors
    counts = scipy.sparse.csr_array((has_text[items].astype(np.float32), items, row_start), shape=(len(users), len(item_text)))
    titled = counts.sum(axis=1)
    means = np.zeros((interactions.n_users, item_text.shape[1]), dtype=np.float32)
    means[users] = (counts @ item_text) / np.maximum(titled, 1)[:, None]
    return means, int((titled > 0).sum()), len(users)


def main(argv=None):
    args = parse_arguments(argv)
    stage = Stage("02_encode_text", args)
    source = stage.input("01_preprocess")
    model = find_model(args.encoder, args.allow_download)
    stage.inputs |= {f"encoder/{name}": digest for name, digest in model_files(model).items()}
    if stage.is_done():
        return
    from eimf import parallel  # imports torch, which takes seconds
    device = parallel.start(args, pick_device(args.device))
    encoder = TextEncoder(args.encoder, args.pooling, str(device), args.cache_dir or args.data_dir / "text_cache",
                          args.batch_size, args.max_tokens, args.normalize, args.threads, args.allow_download)
    interactions = load_interactions(source)
    items = load_items(source)
    if len(items) != interactions.n_items + 1:
        raise UserError(f"{source / 'items.jsonl'}: {len(items) - 1} lines, stats.json says {interactions.n_items} items. "
                        "Run stage 01_preprocess again")
    if parallel.rank() == 0:
        stage.begin()

    texts = item_texts(items, args.fields.split(","))
    has_text = np.array([bool(text) for text in texts])
    item_text = np.zeros((len(texts), encoder.dim), dtype=np.float32)
    item_text[has_text] = encoder.encode([text for text in texts if text], progress="titles")
    if not parallel.stop():
        return
    user_text, with_text, n_users = user_means(interactions, item_text, has_text)

    folder = stage.folder
    save_array(folder / "item_text.npy", item_text)
    save_array(folder / "item_has_text.npy", has_text)
    save_array(folder / "user_text.npy", user_text)
    save_lines(folder / "item_ids.txt", ["[padding]", *(item["id"] for item in items[1:])])
    save_json(folder / "encoder.json", {"encoder": args.encoder, "dim": encoder.dim, "fingerprint": encoder.fingerprint,
                                        **encoder.identity})
    counts = encoder.counts
    summary = counts | {"items": len(items) - 1, "items_with_text": int(has_text.sum()), "training_users": n_users,
                        "training_users_with_text": with_text}
    if not has_text.any():
        stage.log.warning(f"no item has text in field(s) {args.fields}: all vectors are zero, the text terms of training have "
                          "nothing to learn from. Other fields may hold text: --fields title,categories")
    elif with_text < n_users:
        stage.log.warning(f"{n_users - with_text} of {n_users} training users have no titled event; their vectors are zero")
    manifest = stage.finish(summary)
    stage.log.info(f"{counts['unique']} texts: {counts['encoded']} encoded, {counts['cached']} from the cache, "
                   f"{counts['truncated']} cut at {encoder.max_tokens} tokens")
    stage.log.info(f"{summary['items_with_text']} of {summary['items']} items and {with_text} of {n_users} training users "
                   f"have text; {encoder.dim} dimensions, {manifest['wall_seconds']:.1f} s")


if __name__ == "__main__":
    artifacts.run(main)
