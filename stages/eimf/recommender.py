"""Recommendations from an exported model: histories in, ranked items with reasons out. No text model, no training code.

Shapes: B queries, L history length, K interests, D dimension, N items.
"""
import html
from dataclasses import dataclass, field

import hnswlib
import numpy as np

from .artifacts import UserError, load_array, load_json, sha256
from .data import load_interactions, load_items, load_user_ids
from .export import load_export
from .ranking import interests_of, rank

BECAUSE = 3  # history items named as the reason of an interest


@dataclass(frozen=True)
class Query:
    """What one user is asked for. Items are named by their ids, oldest first in `history`; repeats count.

    Only the newest max_len known items are read by the model, but `exclude_seen` leaves out all of them.
    """
    history: tuple = ()
    k: int = 20
    exclude_seen: bool = True
    exclude_items: tuple = ()


@dataclass
class Answer:
    """Ranked items of one query: item numbers int64 (n,), scores float32 (n,), winning interest int32 (n,).

    `history` holds the known items as numbers, oldest first; `unknown` the ids that the model does not know. With
    `fallback` "popular" the scores are training counts and the interests -1, as there was no known history.
    """
    query: Query
    history: np.ndarray
    unknown: list
    items: np.ndarray = None
    scores: np.ndarray = None
    winner: np.ndarray = None
    interests: np.ndarray = None  # (K, D)
    routing: np.ndarray = None  # (K, L)
    fallback: str = None
    excluded: np.ndarray = field(default=None, repr=False)


class Recommender:
    """One finished run, loaded: the exported model, its item vectors, the item table, and optionally the HNSW index.

    `stage` is the artifacts.Stage of the caller; its manifests say whether the folders are complete. Raises UserError if
    a file is missing, damaged, or of another run than the others.
    """

    def __init__(self, stage, run, retrieval="exact", threads=0):
        self.run, self.retrieval, self.threads = run, retrieval, threads
        source, trained = stage.input("01_preprocess"), stage.input("06_train", run=run)
        self.config = load_json(trained / "config.json")
        self.max_len = self.config["max_len"]
        items = load_items(source)
        self.ids = [None, *(item["id"] for item in items[1:])]
        # Titles of the public data sets hold HTML entities; they are text here, and whoever shows them escapes them.
        self.titles = [None, *(html.unescape(item["title"]) if item.get("title") else None for item in items[1:])]
        self.number = {item_id: n for n, item_id in enumerate(self.ids) if n}
        self.vectors = load_array(trained / "item_vectors.npy")
        trained_ids = (trained / "item_ids.txt").read_text(encoding="utf-8").split("\n")[1:-1]
        if trained_ids != self.ids[1:] or self.vectors.shape != (len(self.ids), self.config["dim"]):
            raise UserError(f"{trained} was trained on other items than {source} holds now ({len(trained_ids)} and "
                            f"{len(self.ids) - 1} items). Run stage 06 again.")
        if not np.isfinite(self.vectors).all():
            raise UserError(f"{trained / 'item_vectors.npy'} holds NaN or infinite values. Run stage 06 again.")
        self.interactions = load_interactions(source)
        self.users = {user_id: u for u, user_id in enumerate(load_user_ids(source))}
        self.counts = self.interactions.training_counts()
        self.popular = np.argsort(-self.counts[1:], kind="stable") + 1  # item numbers, ties by lower number
        self.model = load_export(trained / "model.pt2")
        self.index = self._load_index(stage) if retrieval == "hnsw" else None

    def _load_index(self, stage):
        """07's index, checked against its sidecar and against the vectors it was built from."""
        folder = stage.input("07_evaluate", run=self.run)
        path = folder / "index.hnsw"
        again = f"Run: python stages/07_evaluate.py --dataset {stage.args.dataset} --run {self.run}"
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
        index = hnswlib.Index(space="ip", dim=facts["dim"])
        index.load_index(str(path))
        self.ef = facts["ef"]
        return index

    def query_of_user(self, user_id, **settings):
        """A Query with the whole recorded history of a user of the data set. Raises KeyError for an unknown id."""
        u = self.users[user_id]
        events = self.interactions.items[self.interactions.offsets[u]:self.interactions.offsets[u + 1]]
        return Query(history=tuple(self.ids[n] for n in events.tolist()), **settings)

    def recommend(self, queries):
        """Answer a list of queries together: one model call and one kernel call for all of them."""
        answers = [self._prepare(query) for query in queries]
        known = [a for a in answers if a.history.size]
        if known:
            history = np.zeros((len(known), self.max_len), dtype=np.int64)
            for row, answer in zip(history, known):
                newest = answer.history[-self.max_len:]
                row[:len(newest)] = newest
            interests, routing = interests_of(self.model, history)  # (B, K, D), (B, K, L)
            for answer, answer.interests, answer.routing in zip(known, interests, routing):
                pass
            self._retrieve(known)
        for answer in answers:
            if not answer.history.size:
                self._popular(answer)
        return answers

    def _prepare(self, query):
        """Item numbers of the history, ids that are unknown, and sorted item numbers that must not be returned."""
        numbers = [self.number.get(item_id, 0) for item_id in query.history]
        unknown = list(dict.fromkeys(i for i, n in zip(query.history, numbers) if not n))
        unknown += [i for i in dict.fromkeys(query.exclude_items) if i not in self.number and i not in unknown]
        history = np.array([n for n in numbers if n], dtype=np.int64)
        excluded = [self.number[i] for i in query.exclude_items if i in self.number]
        excluded = np.unique(np.concatenate([history if query.exclude_seen else history[:0],
                                             np.array(excluded, dtype=np.int64)]))
        return Answer(query, history, unknown, excluded=excluded)

    def _retrieve(self, answers):
        """Fill in items, scores and winning interests."""
        if self.index is not None:
            answers = [a for a in answers if not self._search_index(a)]
            if not answers:
                return
        wanted = [min(a.query.k, len(self.vectors) - 1 - len(a.excluded)) for a in answers]
        indptr = np.concatenate([[0], np.cumsum([len(a.excluded) for a in answers])])
        exclude = indptr, np.concatenate([a.excluded for a in answers])
        ids, scores, winner = rank(np.stack([a.interests for a in answers]), self.vectors, max(max(wanted), 1), exclude,
                                   self.threads)
        for row, (answer, n) in enumerate(zip(answers, wanted)):
            answer.items, answer.scores, answer.winner = ids[row, :n], scores[row, :n], winner[row, :n]

    def _search_index(self, answer):
        """Answer from the HNSW index; False if it yields fewer items than there are, so that exact search must decide.

        As many candidates more are fetched as may have to be left out, then the exact kernel ranks the candidates.
        """
        available = len(self.vectors) - 1
        wanted = min(answer.query.k, available - len(answer.excluded))
        fetch = min(answer.query.k + len(answer.excluded), available)
        self.index.set_ef(max(self.ef, fetch))
        try:
            labels, _ = self.index.knn_query(answer.interests, k=fetch, num_threads=1)
        except RuntimeError:  # hnswlib's way of saying that the graph search reached fewer than `fetch` items
            return False
        candidates = np.setdiff1d(labels.astype(np.int64), answer.excluded)  # ascending, so ties rank as in exact search
        if len(candidates) < wanted:
            return False
        table = self.vectors[np.concatenate([[0], candidates])]
        ids, scores, winner = rank(answer.interests[None], table, max(wanted, 1), n_threads=1)
        answer.items = candidates[ids[0, :wanted] - 1]
        answer.scores, answer.winner = scores[0, :wanted], winner[0, :wanted]
        return True

    def _popular(self, answer):
        """Most popular items in training, for a query without any known item."""
        items = self.popular[~np.isin(self.popular, answer.excluded)][:answer.query.k]
        answer.fallback, answer.items = "popular", items
        answer.scores = self.counts[items].astype(np.float32)
        answer.winner = np.full(len(items), -1, dtype=np.int32)

    def item(self, number):
        """{"id", "title"} of an item number; the title is null where the data has none."""
        return {"id": self.ids[number], "title": self.titles[number]}

    def because_of(self, answer, interest):
        """The history items closest to an interest, by cosine, best first, newer first among equals: item numbers."""
        newest = np.unique(answer.history[-self.max_len:][::-1], return_index=True)
        numbers = newest[0][np.argsort(newest[1], kind="stable")]  # distinct, newest first
        vectors, interest_vector = self.vectors[numbers], answer.interests[interest]
        length = np.linalg.norm(vectors, axis=1) * np.linalg.norm(interest_vector)
        cosine = vectors @ interest_vector / np.maximum(length, 1e-12)
        return numbers[np.argsort(-cosine, kind="stable")[:BECAUSE]].tolist()

    def describe(self, answer):
        """An answer as a JSON object: run, fallback, unknown_items, interests and ranked items."""
        interests = []
        for n in sorted(set(answer.winner.tolist()) - {-1}):
            interests.append({"interest": n, "because_of": [self.item(i) for i in self.because_of(answer, n)]})
        items = [self.item(n) | {"rank": r, "score": s, "interest": w if w >= 0 else None}
                 for r, (n, s, w) in enumerate(zip(answer.items.tolist(), answer.scores.tolist(), answer.winner.tolist()), 1)]
        return {"run": self.run, "fallback": answer.fallback, "unknown_items": answer.unknown, "interests": interests,
                "items": items}
