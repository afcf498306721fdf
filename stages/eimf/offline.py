"""The deterministic summariser behind `--llm offline`: interests read off titles and category paths, no model at all.

Its phrases are no LLM's answers; whatever stores them stamps them `offline`.
"""
import functools
import math
import re
from collections import Counter

from .interests import clean_text as uncached_clean_text

MAX_WORDS = 6   # distinguishing title words in a phrase
MIN_TITLES = 3  # a word of fewer titles names one product, not a taste
STOP_WORDS = set("a an and are as at by for from in into is it its of on or per the this to with without you your new pack set "
                 "of count inch inches tm pk package bottle bottles feet oz ounce ounces ml pcs piece pieces size x".split())

clean_text = functools.lru_cache(maxsize=1 << 18)(uncached_clean_text)  # the same titles come in many histories


@functools.lru_cache(maxsize=1 << 18)
def words(text):
    """Lower-case words of a text, without numbers, units and stop words, in order: a tuple."""
    return tuple(w for w in re.findall(r"[^\W_]+(?:['-][^\W_]+)*", text.lower())
            if len(w) > 1 and w not in STOP_WORDS and not any(c.isdigit() for c in w))


class Summarizer:
    """Phrases for a history, such as "Gel Ink Pens: Pilot retractable fine".

    items: the whole item table (index 0 is None); it gives each word's document frequency, so that frequent words such as
    "black" weigh less than distinguishing ones.
    """

    def __init__(self, items):
        self.n_titles = 0
        self.frequency = Counter()
        for item in items[1:]:
            if title := set(words(clean_text(item["title"]))):
                self.n_titles += 1
                self.frequency.update(title)

    def weight(self, word):
        """Inverse document frequency of a title word."""
        return math.log((1 + self.n_titles) / (1 + self.frequency[word]))

    def groups(self, history):
        """Positions of a history's items by what they are: [(name, [position, ...]), ...], largest first, then most recent.

        history: item dicts, oldest first. An item belongs to its leaf category. Those without categories are grouped by the
        pair of neighbouring title words that most of them share, again and again; without title and categories an item is in
        no group.
        """
        members, names, loose = {}, {}, []
        for position, item in enumerate(history):
            path = [clean_text(c) for c in item["categories"] or [] if clean_text(c)]
            if path:
                name = names.setdefault(path[-1].casefold(), path[-1])
                members.setdefault(name, []).append(position)
            else:
                loose.append(position)
        grams = {p: self._grams(history[p]) for p in loose}
        loose = [p for p in loose if grams[p]]
        while loose:
            counts = Counter(gram for p in loose for gram in grams[p])
            gram = max(counts, key=lambda g: (counts[g], sum(map(self.weight, g)), g))
            name = names.setdefault(" ".join(gram), " ".join(gram))
            members.setdefault(name, []).extend(p for p in loose if gram in grams[p])
            loose = [p for p in loose if gram not in grams[p]]
        groups = ((name, sorted(positions)) for name, positions in members.items())
        return sorted(groups, key=lambda group: (-len(group[1]), -max(group[1]), group[0]))

    def _grams(self, item):
        tokens = words(clean_text(item["title"]))
        return set(zip(tokens, tokens[1:])) or {(w,) for w in tokens}

    def phrase(self, name, items):
        """`name` and what distinguishes the titles of `items` (newest last): their brand and most telling words."""
        known = set(words(name))
        score, spelling = Counter(), {}
        for item in items:
            title = clean_text(item["title"])
            for word in re.findall(r"[^\W_]+(?:['-][^\W_]+)*", title):
                spelling[word.lower()] = word
            for word in set(words(title)):
                if self.frequency[word] >= MIN_TITLES and known.isdisjoint((word, word.rstrip("s"), word + "s")):
                    score[word] += self.weight(word)
        best = sorted(score, key=lambda w: (-score[w], w))[:MAX_WORDS]
        order = dict.fromkeys(w for item in reversed(items) for w in words(clean_text(item["title"])))
        details = " ".join(spelling.get(w, w) for w in order if w in best)
        return f"{name}: {details}" if details else name

    def interests(self, history, limit=20):
        """At most `limit` distinct phrases, those with most items behind them first, then the most recent."""
        phrases = [self.phrase(name, [history[p] for p in positions]) for name, positions in self.groups(history)]
        return list(dict.fromkeys(phrases))[:limit]
