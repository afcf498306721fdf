"""Recommendations from an exported model: histories in, ranked items with reasons out. No text model, no training code.

Shapes: B queries, L history length, K interests, D dimension, N items, M labels.
"""
import argparse
import hashlib
import html
import json
import math
import re
import unicodedata
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path

import hnswlib
import numpy as np

import eimf_core

from .artifacts import Stage, UserError, command, load_array, load_json, load_lines, sha256
from .data import load_interactions, load_items, load_user_ids
from .export import load_export
from .ranking import interests_of, rank

encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode  # json.dumps makes a new encoder in every call
BECAUSE = 3  # history items named as the reason of an interest
# Items above which `auto` may take the HNSW index. At 300,000, for a single user and a recall of .99, exact search was still more than
# twice as fast, at a million more than three times (`csrc/bench/bench.py`); vectors that are easier to search may differ.
CROSSOVER_ITEMS = 300_000
MODEL_BATCH = 64  # histories in one model call: with more, what it computes no longer stays in the processor's cache


@dataclass(frozen=True)
class Query:
    """What one user is asked for. Items are named by their ids, oldest first in `history`; repeats count.

    `user` names a user of the data set instead of a history; all its recorded events are then the history. Only the
    newest max_len known items are read by the model, but `exclude_seen` leaves out all of them. `allow_categories`: if
    any are given, only items in one of them. `diversity`: see diversify(). `explain`: describe the reasons too, with
    the `per_interest` best items of each interest by its own score alone.
    """
    history: tuple = ()
    user: str | None = None
    k: int = 20
    exclude_seen: bool = True
    exclude_items: tuple = ()
    allow_categories: tuple = ()
    diversity: float = 0.0
    explain: bool = True
    per_interest: int = 0


@dataclass
class Answer:
    """Ranked items of one query: item numbers, scores and winning interests, lists of one length.

    `history` holds the known items as numbers, oldest first; `unknown` the ids that the model does not know. With
    `fallback` "popular" there was no known history: scores are training counts, interests -1.
    """
    query: Query
    history: list
    unknown: list
    unknown_categories: list
    excluded: set
    items: list = field(default_factory=list)
    scores: list = field(default_factory=list)
    winner: list = field(default_factory=list)
    interests: np.ndarray = None  # (K, D)
    fallback: str = None


class Recommender:
    """One finished run, loaded and checked: the exported model, its item vectors, the item table, optionally the index.

    `retrieval` is "exact", "hnsw", or "auto": exact below CROSSOVER_ITEMS; above, the index if stage 07 measured it at least
    twice as fast as exact search on these items, with a recall of 0.99. Raises UserError if a file is missing, differs from what its manifest records, or belongs to
    other items or vectors than the rest.
    """

    def __init__(self, data_dir, dataset, run, retrieval="auto", threads=0):
        self.run, self.threads, self.dataset = run, threads, dataset
        stage = Stage("08_serve", argparse.Namespace(data_dir=Path(data_dir), dataset=dataset))
        self.fingerprint = fingerprint(stage.root, run)
        source, trained = stage.input("01_preprocess"), stage.input("06_train", run=run)
        self.config, self.manifest = load_json(trained / "config.json"), load_json(trained / "manifest.json")
        for folder, files in ((source, ("items.jsonl", "users.txt", "sequence_items.npy", "sequence_offsets.npy", "split.npy",
                                        "stats.json")),
                              (trained, self.manifest["outputs"])):
            check_hashes(folder, files)
        self.max_len = self.config["max_len"]
        self._load_items(source, trained)
        self.interactions = load_interactions(source)
        self.users = {user_id: u for u, user_id in enumerate(load_user_ids(source))}
        self.counts = self.interactions.training_counts()
        self.popular = (np.argsort(-self.counts[1:], kind="stable") + 1).tolist()  # ties by lower number
        self.titles_index = TitleIndex(self.titles, self.ids, self.popular)
        self._load_labels(trained)
        self.model = load_export(trained / "model.pt2", bare=True)
        self.n_interests = interests_of(self.model, np.zeros((1, self.max_len), dtype=np.int64))[0].shape[1]
        self.retrieval, self.index = self._choose_retrieval(stage, retrieval), None
        if self.retrieval == "hnsw":
            self._load_index(stage)
        if fingerprint(stage.root, run) != self.fingerprint:
            raise UserError(f"{stage.root} changed while it was being read; try again when the stages have finished")

    def _load_items(self, source, trained):
        items = load_items(source)
        self.ids = [None, *(item["id"] for item in items[1:])]
        # Titles of the public data sets hold HTML entities; they are text here, and whoever shows them escapes them.
        self.titles = [None, *(html.unescape(item["title"]) if item.get("title") else None for item in items[1:])]
        self.number = {item_id: n for n, item_id in enumerate(self.ids) if n}
        self.id_texts = list(map(encode, self.ids))
        self.vectors = load_array(trained / "item_vectors.npy")
        trained_ids = (trained / "item_ids.txt").read_text(encoding="utf-8").split("\n")[1:-1]
        if trained_ids != self.ids[1:] or self.vectors.shape != (len(self.ids), self.config["dim"]):
            raise UserError(f"{trained} was trained on other items than {source} holds now ({len(trained_ids)} and "
                            f"{len(self.ids) - 1} items). Run stage 06 again.")
        if not np.isfinite(self.vectors).all():
            raise UserError(f"{trained / 'item_vectors.npy'} holds NaN or infinite values. Run stage 06 again.")
        self.unit_vectors, self.pieces = unit(self.vectors), {}
        self.table = eimf_core.Items(self.vectors[1:])  # checked and laid out once, not for each of the small calls
        self.category = [None, *((html.unescape(item["categories"][-1]) if item["categories"] else None) for item in items[1:])]
        if len(set(self.category)) <= 2:  # padding's None and one name: it tells no item from another
            self.category = [None] * len(self.ids)
        self.in_category = {}
        for n, item in enumerate(items[1:], 1):
            for name in item["categories"]:
                self.in_category.setdefault(html.unescape(name), set()).add(n)

    def _load_labels(self, trained):
        """Texts and vectors of explicit interests and the 2-D projection, where the export has them."""
        self.labels, self.label_vectors, self.label_table, self.label_source, self.projection = [], None, None, None, None
        if "label_vectors.npy" in self.manifest["outputs"]:
            vectors, self.labels = load_array(trained / "label_vectors.npy"), load_lines(trained / "labels.jsonl")
            self.label_source = load_json(trained / "labels.json")["source"]
            if vectors.shape != (len(self.labels), self.vectors.shape[1]):
                raise UserError(f"{trained}: label vectors {vectors.shape} for {len(self.labels)} labels of "
                                f"{self.vectors.shape[1]} dimensions. Run stage 06 again.")
            self.label_vectors = unit(vectors)
            self.label_table = eimf_core.Items(self.label_vectors) if self.labels else None
        if "map_projection.npy" in self.manifest["outputs"]:
            self.projection = load_array(trained / "map_projection.npy")  # (D + 1, 2), the last row is the shift
            self.position = self.project(self.vectors).astype(np.float64).round(4)  # (N + 1, 2)
        for name, array in (("label_vectors.npy", self.label_vectors), ("map_projection.npy", self.projection)):
            if array is not None and not np.isfinite(array).all():
                raise UserError(f"{trained / name} holds NaN or infinite values. Run stage 06 again.")

    def project(self, vectors):
        """Place of vectors (n, D) on the map: (n, 2). Lengths do not matter, only directions."""
        return unit(vectors) @ self.projection[:-1] + self.projection[-1]

    def _choose_retrieval(self, stage, retrieval):
        if retrieval != "auto":
            return retrieval
        if len(self.ids) <= CROSSOVER_ITEMS or not (stage.root / "07_evaluate" / self.run / "manifest.json").is_file():
            return "exact"
        measured = load_json(stage.input("07_evaluate", run=self.run) / "metrics.json").get("ann")
        better = measured and (measured["users_per_second_hnsw"] >= 2 * measured["users_per_second_exact"]
                               and measured["recall@50"] >= .99)
        return "hnsw" if better else "exact"

    def _load_index(self, stage):
        """07's index, checked against its sidecar and against the vectors it was built from."""
        folder = stage.input("07_evaluate", run=self.run)
        path = folder / "index.hnsw"
        again = f"Run: {command('07_evaluate', stage.args.dataset, stage.args.data_dir, self.run)}"
        if not (folder / "index.json").is_file():
            raise UserError(f"{folder} has no index: a graph search over these vectors was found useless. Use --retrieval exact.")
        facts = load_json(folder / "index.json")
        expected = {"space": "ip", "dim": self.vectors.shape[1], "items": len(self.vectors) - 1, "sha256": sha256(path)}
        for key, value in expected.items():
            if facts.get(key) != value:
                raise UserError(f"{folder / 'index.json'}: {key} is {facts.get(key)!r}, expected {value!r}. {again}")
        key = f"06_train/{self.run}/item_vectors.npy"
        if load_json(folder / "manifest.json")["inputs"].get(key) != stage.inputs[key]:
            raise UserError(f"{path} was built from other item vectors than {key} holds now. {again}")
        self.index = hnswlib.Index(space="ip", dim=facts["dim"])
        self.index.load_index(str(path))
        self.index.set_ef(facts["ef"])  # the least; hnswlib itself raises it to the number of items that is asked for

    # ---- ranking ----

    def recommend(self, queries):
        """Answer a list of queries together, with one model call and, mostly, one kernel call for all of them.

        Raises KeyError for a query about a user that the data set does not have.
        """
        answers = [self._prepare(query) for query in queries]
        known = [a for a in answers if a.history]
        if known:
            for answer, interests in zip(known, self._interests(known)):
                answer.interests = interests
            self._retrieve(known)
        for answer in answers:
            if not answer.history:
                self._popular(answer)
            if answer.query.diversity > 0:
                self._diversify(answer)
        return answers

    def _interests(self, answers):
        history = np.zeros((len(answers), self.max_len), dtype=np.int64)
        for row, answer in enumerate(answers):
            newest = answer.history[-self.max_len:]
            history[row, :len(newest)] = newest
        return interests_of(self.model, history, batch=MODEL_BATCH)[0]  # (B, K, D)

    def _prepare(self, query):
        """Item numbers of the history, ids that are unknown, and item numbers that must not be returned."""
        number = self.number
        if query.user is not None:
            u = self.users[query.user]
            history, unknown = self.interactions.items[self.interactions.offsets[u]:self.interactions.offsets[u + 1]].tolist(), []
        else:
            history = [number[i] for i in query.history if i in number]
            unknown = [i for i in query.history if i not in number]
        unknown += [i for i in query.exclude_items if i not in number]
        excluded = set(history) if query.exclude_seen else set()
        excluded.update(number[i] for i in query.exclude_items if i in number)
        if query.allow_categories:
            allowed = set().union(*(self.in_category.get(c, ()) for c in query.allow_categories))
            excluded |= set(range(1, len(self.ids))) - allowed
        unknown_categories = [c for c in query.allow_categories if c not in self.in_category]
        return Answer(query, history, list(dict.fromkeys(unknown)), list(dict.fromkeys(unknown_categories)), excluded)

    def _wanted(self, answer):
        """How many items to rank: k, or a pool to choose k diverse ones from, but no more than there are."""
        k = answer.query.k
        return min(k if answer.query.diversity == 0 else 2 * k + 100, len(self.ids) - 1 - len(answer.excluded))

    def _retrieve(self, answers):
        """Fill in items, scores and winning interests."""
        groups = {}  # by the size of the list, so that one long list does not make all lists long
        for answer in answers:
            if self.index is None or not self._search_index(answer):
                groups.setdefault(self._wanted(answer).bit_length(), []).append(answer)
        for group in groups.values():
            indptr = np.cumsum([0, *(len(a.excluded) for a in group)])
            excluded = np.fromiter((n for a in group for n in a.excluded), dtype=np.int64, count=indptr[-1])
            wanted = [self._wanted(a) for a in group]
            ranked = rank(np.stack([a.interests for a in group]), self.table, max(1, *wanted), (indptr, excluded), self.threads)
            for answer, n, items, scores, winner in zip(group, wanted, *(x.tolist() for x in ranked)):
                answer.items, answer.scores, answer.winner = items[:n], scores[:n], winner[:n]

    def _search_index(self, answer):
        """Answer from the HNSW index; False if it yields fewer items than there are, so that exact search must decide.

        As many candidates more are fetched as may have to be left out, then the exact kernel ranks the candidates.
        """
        wanted = self._wanted(answer)
        fetch = wanted + len(answer.excluded)
        if fetch > (len(self.ids) - 1) // 2:  # the graph would be walked nearly whole
            return False
        try:
            labels, _ = self.index.knn_query(answer.interests, k=fetch, num_threads=1)
        except RuntimeError:  # hnswlib's way of saying that the graph search reached fewer than `fetch` items
            return False
        candidates = np.unique(labels.astype(np.int64))  # ascending, so ties rank as in exact search
        candidates = candidates[[n not in answer.excluded for n in candidates.tolist()]]
        if len(candidates) < wanted:
            return False
        table = self.vectors[np.concatenate([[0], candidates])]
        ids, scores, winner = rank(answer.interests[None], table, max(wanted, 1), n_threads=1)
        answer.items = candidates[ids[0, :wanted] - 1].tolist()
        answer.scores, answer.winner = scores[0, :wanted].tolist(), winner[0, :wanted].tolist()
        return True

    def _popular(self, answer):
        """Most popular items in training, for a query without any known item."""
        wanted = self._wanted(answer)
        answer.items = []
        for n in self.popular:
            if len(answer.items) == wanted:
                break
            if n not in answer.excluded:
                answer.items.append(n)
        answer.fallback = "popular"
        answer.scores = self.counts[answer.items].astype(float).tolist()
        answer.winner = [-1] * len(answer.items)

    def _diversify(self, answer):
        groups = [self.category[n] or w for n, w in zip(answer.items, answer.winner)]
        chosen = diversify(answer.scores, groups, answer.query.k, answer.query.diversity)
        answer.items, answer.scores, answer.winner = ([x[c] for c in chosen] for x in (answer.items, answer.scores, answer.winner))

    def similar(self, number, k):
        """The k items whose vectors point most nearly the same way: item numbers and cosines, without the item itself."""
        exclude = np.array([0, 1]), np.array([number])
        k = min(k, len(self.ids) - 2)
        ids, cosine, _ = rank(self.unit_vectors[None, None, number], self.unit_vectors, max(k, 1), exclude, self.threads)
        return ids[0, :k].tolist(), cosine[0, :k].tolist()

    def own_lists(self, answer):
        """Best items of each interest by its own score alone, exact: item numbers and scores, K lists of lists, see Query.per_interest.

        Interests that point nearly the same way win few items of the ranked list or none; this shows what they stand for.
        """
        k, n = len(answer.interests), min(answer.query.per_interest, len(self.ids) - 1 - len(answer.excluded))
        excluded = np.fromiter(answer.excluded, dtype=np.int64, count=len(answer.excluded))
        exclude = np.arange(k + 1) * len(excluded), np.tile(excluded, k)
        ids, scores, _ = rank(answer.interests[:, None], self.table, max(n, 1), exclude, self.threads)
        return ids[:, :n].tolist(), scores[:, :n].tolist()

    # ---- answers as JSON ----

    def item(self, number):
        """{"id", "title"} of an item number, and its place on the map; the title is null where the data has none."""
        return json.loads(f"{{{self._piece(number)[1]}}}")

    def _piece(self, number):
        """The JSON of an item without the braces, made once: its id and title; with its place on the map; with its category."""
        piece = self.pieces.get(number)
        if piece is None:
            brief = f'"id": {self.id_texts[number]}, "title": {encode(self.titles[number])}'
            place = "" if self.projection is None else f', "position": {encode(self.position[number].tolist())}'
            piece = self.pieces[number] = brief, brief + place, f'{brief}{place}, "category": {encode(self.category[number])}'
        return piece

    def rows(self, query):
        """How many items an answer may name, which is what writing it takes time for."""
        return query.k + (query.per_interest * self.n_interests if query.explain else 0)

    def describe(self, answers):
        """Answers as JSON objects, see to_json."""
        return [json.loads(text) for text in self.to_json(answers)]

    def to_json(self, answers):
        """JSON texts of answers. Where the query asks to explain, with each interest's label and nearest history items.

        A label is the explicit interest text nearest to the interest by cosine in the aligned space. It was read out of
        the history of some cluster's typical user, not of this user's, and says so. Texts are put together from pieces
        that were encoded before: encoding whole objects would take longer than ranking all items.
        """
        explained = [a for a in answers if a.query.explain and a.history]
        reasons = iter(self._reasons(explained) if explained else [])
        return [self._to_json(a, next(reasons) if a.query.explain and a.history else ([], {-1: "[]"})) for a in answers]

    def _labels(self, interests):
        """JSON of the label of each interest, unit vectors (n, D); null where the export has no labels."""
        if self.label_table is None:
            return ["null"] * len(interests)
        nearest, cosine, _ = eimf_core.top_n(interests[:, None], self.label_table, 1, n_threads=self.threads)
        return [f'{{"text": {encode(self.labels[n]["text"])}, "similarity": {c:.4f}, "of": "typical user", '
                f'"cluster": {self.labels[n]["cluster"]}}}' for n, c in zip(nearest[:, 0].tolist(), cosine[:, 0].tolist())]

    def _to_json(self, answer, reasons):
        if not math.isfinite(sum(answer.scores)):
            raise ValueError("a score is not finite")
        explain, piece = answer.query.explain, self._piece
        parts = [f'"run": {encode(self.run)}, "fallback": {encode(answer.fallback)}, "unknown_items": {encode_list(answer.unknown)}, '
                 f'"unknown_categories": {encode_list(answer.unknown_categories)}']
        rows = zip(range(1, len(answer.items) + 1), answer.items, answer.scores, answer.winner)
        if explain:
            interests, because = reasons
            history = ", ".join(f"{{{piece(n)[1]}}}" for n in answer.history)
            parts.append(f'"label_source": {encode(self.label_source)}, "history": [{history}], "interests": [{", ".join(interests)}]')
            items = [f'{{"rank": {rank}, {piece(n)[2]}, "score": {score:.6f}, "interest": {winner if winner >= 0 else "null"}, '
                     f'"because_of": {because[winner]}}}' for rank, n, score, winner in rows]
        else:
            items = [f'{{"rank": {rank}, {piece(n)[0]}, "score": {score:.6f}, "interest": {winner if winner >= 0 else "null"}}}'
                     for rank, n, score, winner in rows]
        parts.append(f'"items": [{", ".join(items)}]')
        return f"{{{', '.join(parts)}}}"

    def _reasons(self, answers):
        """Of each answer, JSON texts of its interests, and of the ids of the history items closest to each; newer first if equal."""
        interests = unit(np.concatenate([a.interests for a in answers]))  # (n, D), K of each answer
        labels = self._labels(interests)
        places = [""] * len(labels) if self.projection is None else [
            f', "position": [{x:.4f}, {y:.4f}]' for x, y in self.project(interests).tolist()]
        at = 0
        for answer in answers:
            k = len(answer.interests)
            numbers = list(dict.fromkeys(answer.history[:-self.max_len - 1:-1]))  # distinct, newest first
            cosine = interests[at:at + k] @ self.unit_vectors[numbers].T  # (K, distinct)
            nearest = np.argsort(-cosine, 1, kind="stable")[:, :BECAUSE].tolist()
            own = self._own_texts(answer) if answer.query.per_interest else [""] * k
            texts, because = [], []
            for i, (row, values) in enumerate(zip(nearest, cosine.tolist())):
                items = ", ".join(f'{{{self._piece(numbers[n])[1]}, "similarity": {values[n]:.4f}}}' for n in row)
                texts.append(f'{{"interest": {i}, "label": {labels[at + i]}, "because_of": [{items}]{places[at + i]}{own[i]}}}')
                because.append(f"[{', '.join([self.id_texts[numbers[n]] for n in row])}]")
            at += k
            yield texts, because

    def _own_texts(self, answer):
        """JSON of own_lists, one text for each interest."""
        texts = []
        for numbers, scores in zip(*self.own_lists(answer)):
            items = [f'{{"rank": {rank}, {self._piece(n)[2]}, "score": {score:.6f}}}' for rank, (n, score) in enumerate(zip(numbers, scores), 1)]
            texts.append(f', "items": [{", ".join(items)}]')
        return texts


def encode_list(names):
    """JSON text of a list of strings."""
    return f"[{', '.join(map(encode, names))}]"


def diversify(scores, groups, k, strength):
    """ComiRec's controllable diversity (arXiv 2005.09347, 3.4), greedily: positions of k items, in the order chosen.

    Maximises sum of f(i) + strength * sum over pairs of [group(i) != group(j)]. A step's gain is f(i) + strength * (number
    chosen - number chosen of i's group), so an item loses `strength` for every chosen one of its group. `scores` are
    ordered best first and scaled to 0..1 over the pool, which makes `strength` mean the same for every model.
    """
    span = (scores[0] - scores[-1]) or 1.0 if scores else 1.0
    queues = {}
    for position, group in enumerate(groups):
        queues.setdefault(group, []).append(position)
    heads, taken, chosen = dict.fromkeys(queues, 0), dict.fromkeys(queues, 0), []
    while queues and len(chosen) < k:
        # Within a group the best-scored item is always the better choice, so only the groups' heads compete.
        group = max(queues, key=lambda g: ((scores[queues[g][heads[g]]] - scores[-1]) / span - strength * taken[g], -queues[g][heads[g]]))
        chosen.append(queues[group][heads[group]])
        heads[group] += 1
        taken[group] += 1
        if heads[group] == len(queues[group]):
            del queues[group]
    return chosen


class TitleIndex:
    """Search of titles by the beginnings of words, without regard to case and accents; most popular first."""

    def __init__(self, titles, ids, popular):
        self.number = {item_id.casefold(): n for n, item_id in enumerate(ids) if n}
        postings = {}
        for n in popular:
            for word in set(words(titles[n] or "")):
                postings.setdefault(word, []).append(n)
        self.words = sorted(postings)
        self.postings = [postings[word] for word in self.words]
        self.popular = popular
        self.place = {n: place for place, n in enumerate(popular)}

    def search(self, query, limit):
        """Item numbers whose title has, for each word of the query, a word that begins with it; an item's id finds it."""
        found = None
        for prefix in words(query):
            at = bisect_left(self.words, prefix)
            matches = set()
            while at < len(self.words) and self.words[at].startswith(prefix):
                matches.update(self.postings[at])
                at += 1
            found = matches if found is None else found & matches
            if not found:
                break
        exact = self.number.get(query.strip().casefold())
        ranked = self.popular if found is None and exact is None else sorted(found or (), key=self.place.__getitem__)
        return ([exact] if exact else []) + [n for n in ranked[:limit + 1] if n != exact][:limit - bool(exact)]


def words(text):
    """Words of a text, folded: lower case, no accents."""
    folded = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return re.findall(r"\w+", folded.casefold())


def unit(vectors):
    """Vectors (n, D) scaled to length 1; a zero vector stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def check_hashes(folder, files):
    """Raise UserError unless the files' contents are those that the folder's manifest records."""
    manifest = load_json(folder / "manifest.json")
    for file in files:
        if file not in manifest["outputs"] or sha256(folder / file) != manifest["outputs"][file]["sha256"]:
            raise UserError(f"{folder / file} is not the file that manifest.json records (its SHA-256 differs). "
                            f"Run stage {manifest['stage']} again, or copy its folder anew.")


def fingerprint(root, run):
    """Digest of the manifests a run is served from, or None while one that is needed is missing.

    A stage removes its manifest before it writes and writes it last, so an equal digest before and after reading means
    that nothing was written in between.
    """
    digest = hashlib.sha256()
    for folder in served_folders(root, run):
        try:
            digest.update((folder / "manifest.json").read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            if folder.parent.name != "07_evaluate":
                return None
    return digest.hexdigest()


def served_folders(root, run):
    """Folders that a run is served from; the last one need not be there."""
    return root / "01_preprocess", root / "06_train" / run, root / "07_evaluate" / run


def file_times(root, run):
    """Path, size and time of change of each file that a run is served from, a list."""
    found = []
    for path in (path for folder in served_folders(root, run) if folder.is_dir() for path in sorted(folder.iterdir())):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        found.append((path, status.st_size, status.st_mtime_ns))
    return found


def choose_run(data_dir, dataset):
    """(name, reason) of the newest finished run that EIMF taught, else of the newest. Raises UserError if there is none.

    A folder whose manifest or config cannot be read holds no finished run.
    """
    folder = Path(data_dir) / dataset / "06_train"
    found = []
    for path in folder.glob("*/manifest.json"):
        try:
            config, manifest = load_json(path.parent / "config.json"), load_json(path)
            found.append((bool(config["eimf"] and not config["control"]), manifest["finished"], path.parent.name))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    if not found:
        raise UserError(f"no finished run in {folder}. Run: {command('06_train', dataset, data_dir)}")
    taught, _, name = max(found)
    return name, "the newest finished one" + (" that EIMF taught" if taught else "")
