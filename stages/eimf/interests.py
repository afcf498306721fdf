"""What an LLM is asked and how its answer is read: pure functions, no files, no network."""
import html
import re
import unicodedata


def clean_text(text):
    """One line of readable text from a raw title: entities unescaped, control characters and runs of space become one space.

    >>> clean_text("Pens &amp; Pencils\\n ")
    'Pens & Pencils'
    """
    text = html.unescape(text or "")
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in text)
    return re.sub(r"\s+", " ", text).strip()
