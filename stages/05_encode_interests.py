"""Stage 05: explicit interests -> vectors, by the encoder of stage 02 (paper 3.2.3, Eq. 4).

Each sub-interest is encoded on its own and the set is kept ragged: cluster c's interests are rows
interest_offsets[c] to interest_offsets[c + 1]. Titles and interests must share one space, so another encoder than the one
stage 02 used is refused.

Reads  02_encode_text/       encoder.json
       04_infer_interests/   interests.jsonl, line c for cluster c: {"user", "interests": [text, ...], ...}
Writes 05_encode_interests/  interest_vectors.npy  float32 (interests of all clusters, d_t)
                             interest_offsets.npy  int64 (clusters + 1)

    python stages/05_encode_interests.py --dataset sample
    torchrun --standalone --nproc-per-node 2 -- stages/05_encode_interests.py --dataset sample      # the processes share the texts

prints the clusters, interests, texts encoded and cached, and the seconds.
"""
import numpy as np

from eimf import artifacts
from eimf.artifacts import Stage, UserError, load_json, load_lines, save_array
from eimf.encoder import TextEncoder, add_encoder_arguments, pick_device


def parse_arguments(argv):
    parser = artifacts.argument_parser(__doc__)
    parser.add_argument("--encoder", metavar="NAME_OR_FOLDER",
                        help="where stage 02's encoder lies now, if it was moved (default: as stage 02 recorded)")
    add_encoder_arguments(parser, choose=False)
    return parser.parse_args(argv)


def load_encoder(args, device, recorded):
    """Stage 02's encoder. Raises UserError if the files found now would give other vectors."""
    encoder = TextEncoder(args.encoder or recorded["encoder"], recorded["pooling"], str(device),
                          args.cache_dir or args.data_dir / "text_cache", args.batch_size, recorded["max_tokens"],
                          recorded["normalize"], args.threads, args.allow_download)
    if encoder.fingerprint != recorded["fingerprint"]:
        differing = sorted(f for f in encoder.identity["files"].keys() | recorded["files"].keys()
                           if encoder.identity["files"].get(f) != recorded["files"].get(f))
        raise UserError(f"this encoder's fingerprint is {encoder.fingerprint}, stage 02 used {recorded['fingerprint']} "
                        f"(differing: {', '.join(differing) or 'version or settings'}). Titles and interests must share one "
                        "encoder: give the same one with --encoder, or run stage 02 again")
    return encoder


def interest_texts(rows, path):
    """(flat list of texts, offsets int64 (clusters + 1)). Raises UserError for a line without interests."""
    texts, lengths = [], []
    for number, row in enumerate(rows, 1):
        interests = row.get("interests")
        if not isinstance(interests, list) or not all(isinstance(t, str) and t.strip() for t in interests):
            raise UserError(f"{path}:{number}: expected a list of non-empty strings under \"interests\", found "
                            f"{str(interests)[:80]}. Run stage 04_infer_interests again")
        texts += interests
        lengths.append(len(interests))
    return texts, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def main(argv=None):
    args = parse_arguments(argv)
    stage = Stage("05_encode_interests", args)
    text, source = stage.input("02_encode_text"), stage.input("04_infer_interests")
    # 04's journal and usage may grow without a change of the interests; only the files that are read count
    stage.inputs = {key: value for key, value in stage.inputs.items() if key.endswith(("encoder.json", "interests.jsonl"))}
    if stage.is_done():
        return
    from eimf import parallel  # imports torch, which takes seconds
    device = parallel.start(args, pick_device(args.device))
    encoder = load_encoder(args, device, load_json(text / "encoder.json"))
    texts, offsets = interest_texts(load_lines(source / "interests.jsonl"), source / "interests.jsonl")
    if parallel.rank() == 0:
        stage.begin()
    vectors = encoder.encode(texts, progress="interests")
    if not parallel.stop():
        return
    save_array(stage.folder / "interest_vectors.npy", vectors)
    save_array(stage.folder / "interest_offsets.npy", offsets)

    lengths = np.diff(offsets)
    empty = int((lengths == 0).sum())
    if empty:
        stage.log.warning(f"{empty} of {len(lengths)} clusters have no interest at all (no title in the typical user's history)")
    manifest = stage.finish(encoder.counts | {"clusters": len(lengths), "interests": len(texts),
                                              "clusters_without_interests": empty})
    stage.log.info(f"{len(lengths)} clusters, {len(texts)} interests ({lengths.mean() if len(lengths) else 0:.1f} a cluster): "
                   f"{encoder.counts['encoded']} texts encoded, {encoder.counts['cached']} from the cache, "
                   f"{manifest['wall_seconds']:.1f} s")


if __name__ == "__main__":
    artifacts.run(main)
