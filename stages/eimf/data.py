"""Reading `01_preprocess/`: who may see which events, and histories as padded arrays.

Events of all users lie in flat arrays, user after user, oldest first (`sequence_items.npy`, `sequence_offsets.npy`).
Every split rule of PAPER 3 is answered here and nowhere else, as ranges [start, end) into the flat arrays.
"""
from dataclasses import dataclass

import numpy as np

from .artifacts import load_array, load_json, load_lines

TRAIN, VALID, TEST = 0, 1, 2
PARTS = {"train": TRAIN, "valid": VALID, "test": TEST}
HISTORY_FRACTION = 0.8  # a validation or test user's first 80 % are history, the rest the targets (paper, 4.1)


@dataclass(frozen=True)
class Interactions:
    """All events of a data set.

    items int32 (events,), offsets int64 (users + 1,), split uint8 (users,), n_items without the padding row,
    kind "random", "file-order" or "leave-one-out".
    """
    items: np.ndarray
    offsets: np.ndarray
    split: np.ndarray
    n_items: int
    kind: str

    @property
    def n_users(self):
        return len(self.split)

    def training_ranges(self):
        """(users, start, end), each int64: what clustering, prompts and training may see, and nothing else.

        User-level splits give training users whole; leave-one-out gives every user without the last two events,
        which are the validation and the test target.
        """
        if self.kind == "leave-one-out":
            users = np.arange(self.n_users)
            start, end = self.offsets[:-1], np.maximum(self.offsets[1:] - 2, self.offsets[:-1])
        else:
            users = np.flatnonzero(self.split == TRAIN)
            start, end = self.offsets[users], self.offsets[users + 1]
        keep = end > start
        return users[keep], start[keep], end[keep]

    def evaluation_ranges(self, part):
        """(users, start, middle, end) for part "valid" or "test": history [start, middle), targets [middle, end).

        Neither is empty: users with too few events for that are left out.
        """
        if self.kind == "leave-one-out":
            back = 2 if part == "valid" else 1
            users = np.flatnonzero(np.diff(self.offsets) > back)
            start, middle = self.offsets[users], self.offsets[users + 1] - back
            return users, start, middle, middle + 1
        users = np.flatnonzero((self.split == PARTS[part]) & (np.diff(self.offsets) > 1))
        start, end = self.offsets[users], self.offsets[users + 1]
        middle = start + ((end - start) * HISTORY_FRACTION).astype(np.int64)
        return users, start, middle, end

    def training_counts(self):
        """Interactions per item number in what training may see, int64 (items + 1,)."""
        return np.bincount(self.items[range_positions(*self.training_ranges()[1:])], minlength=self.n_items + 1)


def range_positions(start, end):
    """Positions of all ranges [start, end), concatenated: int64 (sum of lengths,)."""
    lengths = end - start
    first = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(start - first, lengths)


def padded(items, start, end, max_len):
    """The newest `max_len` events of each range, oldest first, right-padded with 0: int64 (ranges, max_len)."""
    start = np.maximum(start, end - max_len)
    column = np.arange(max_len)
    position = start[:, None] + column
    inside = position < end[:, None]
    return np.where(inside, items[np.where(inside, position, 0)], 0).astype(np.int64)


def load_interactions(folder):
    """Read a finished `01_preprocess/` folder."""
    stats = load_json(folder / "stats.json")
    return Interactions(items=load_array(folder / "sequence_items.npy"), offsets=load_array(folder / "sequence_offsets.npy"),
                        split=load_array(folder / "split.npy"), n_items=stats["items"], kind=stats["split"])


def load_items(folder):
    """Item table as a list of dicts; index 0 is None, so that item number i is at index i."""
    return [None, *load_lines(folder / "items.jsonl")]


def load_user_ids(folder):
    """User ids as strings; index u is user u."""
    return (folder / "users.txt").read_text(encoding="utf-8").split("\n")[:-1]
