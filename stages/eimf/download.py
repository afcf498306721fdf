"""Fetch the public Amazon 2014 files: resumed, retried, checked, and renamed only when complete."""
import gzip
import re
import time
import zlib
from urllib.parse import quote

import requests
from tqdm import tqdm
from urllib3.exceptions import HTTPError

from .artifacts import UserError

BASE_URL = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
FILES = ("reviews_{}_5.json.gz", "meta_{}.json.gz")
NAMES = ("Amazon_Instant_Video", "Apps_for_Android", "Automotive", "Baby", "Beauty", "Books", "CDs_and_Vinyl",
         "Cell_Phones_and_Accessories", "Clothing_Shoes_and_Jewelry", "Digital_Music", "Electronics",
         "Grocery_and_Gourmet_Food", "Health_and_Personal_Care", "Home_and_Kitchen", "Kindle_Store", "Movies_and_TV",
         "Musical_Instruments", "Office_Products", "Patio_Lawn_and_Garden", "Pet_Supplies", "Sports_and_Outdoors",
         "Tools_and_Home_Improvement", "Toys_and_Games", "Video_Games")


class TryAgain(Exception):
    """This attempt failed in a way that another one may not."""


def download(source, folder, base_url=BASE_URL, **options):
    """Fetch reviews and metadata of the data set `source` into `folder`; files already there are kept.

    Returns their paths. Raises UserError when the server has no such file or keeps failing; what was fetched stays in a
    `.part` file, from which the next call goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [fetch(base_url.rstrip("/") + "/" + quote(name.format(source)), folder / name.format(source), **options)
            for name in FILES]


def fetch(url, target, retries=6, wait=1.0, timeout=30.0):
    """Download a gzip file to `target`, by way of `<target>.part`.

    Gives up after `retries` further attempts in a row that bring nothing new, waiting `wait` seconds before the first of
    them and twice as long before each next one (at most 60). `timeout` is the longest silence in seconds.
    """
    part = target.with_name(target.name + ".part")
    failures = most = 0
    while not target.exists():
        try:
            _attempt(url, part, timeout)
            _check_gzip(part)
            part.replace(target)
        except (TryAgain, requests.RequestException, HTTPError) as error:
            size = part.stat().st_size if part.exists() else 0
            failures = 0 if size > most else failures + 1
            most = max(most, size)
            if failures > retries:
                raise UserError(f"{url}: gave up after {failures} attempts that brought nothing new, the last one: {error}. "
                                f"{size:,} bytes are kept; the same command goes on from there") from None
            pause = min(wait * 2 ** max(failures - 1, 0), 60)
            tqdm.write(f"{target.name}: {error}; trying again in {pause:g} s")
            time.sleep(pause)
        except OSError as error:
            raise UserError(f"{part}: cannot be written ({error.strerror or error})") from None
    return target


def _attempt(url, part, timeout):
    """Fetch what `part` lacks. Raises TryAgain, or UserError for an answer that will not change."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        status = response.status_code
        span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
        if status == 416 and span and int(span[2]) == have:
            return  # all of it was there already
        if status == 416 or (status == 206 and not (span and span[1] and int(span[1]) == have)):
            part.unlink(missing_ok=True)
            raise TryAgain(f"the server's file does not fit the {have:,} bytes fetched before, which are discarded")
        if status == 429 or status >= 500:
            raise TryAgain(f"the server answered {status} {response.reason}")
        if status not in (200, 206):
            raise UserError(f"{url}: the server answered {status} {response.reason}. Is the name right? The public data "
                            f"sets are {', '.join(NAMES)}. Another location is given with --base-url")
        if status == 200:
            have = 0  # this server does not resume
        total = int(span[2]) if status == 206 else int(response.headers.get("Content-Length", 0)) or None
        with open(part, "ab" if have else "wb") as file, \
                tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None) as bar:
            for chunk in response.raw.stream(1 << 16, decode_content=False):
                file.write(chunk)
                have += len(chunk)
                bar.update(len(chunk))
    if total is not None and have < total:
        raise TryAgain(f"the connection ended after {have:,} of {total:,} bytes")
    if total is not None and have > total:
        part.unlink()
        raise TryAgain(f"{have:,} bytes came where {total:,} were announced; they are discarded")


def _check_gzip(part):
    """Read all of it; its checksum must hold. A damaged file is removed, so that the next attempt starts afresh."""
    try:
        with gzip.open(part) as file:
            while file.read(1 << 20):
                pass
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        part.unlink()
        raise TryAgain(f"what came is not a whole gzip file ({error}) and is discarded") from None
