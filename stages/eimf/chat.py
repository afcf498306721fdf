"""The `openai` back end: any server that speaks the OpenAI chat protocol, through `requests` and threads.

Sent are model, messages, temperature, max_tokens and, where asked for, response_format; the last is dropped when the server
refuses it.

- Concurrency adapts: the first request goes alone, repeated calls included; then half of the maximum, one more for each
  success; halved when the server says it is overloaded (429, 503, 529) or does not answer in time.
- A rate limit is no failure: such calls wait (Retry-After, else exponential back-off with jitter) and use up no attempt.
  Only after `patience` seconds without any success does the run stop.
- Other transient faults (5xx, time-outs, resets, truncated or foreign bodies) are tried `attempts` times.
- The run stops at once when the key is refused, the quota is used up, or the very first request fails after all attempts, and
  later after `give_up_after` failed requests in a row.

The key lives in this object and in the Authorization header only. It is cut out of whatever a server echoes.
"""
import json
import os
import queue
import random
import re
import threading
import time
import urllib.parse

import requests

from .artifacts import UserError
from .llm import Stopped, malformed, record, usage_of
from .transport import fault, open_session, post, retry_after

OPENAI, DASHSCOPE = "https://api.openai.com/v1", "https://dashscope.aliyuncs.com/compatible-mode/v1"
OVERLOADED = {429, 503, 529}
TRANSIENT = {408, 409, 425, 500, 502, 504, 520, 521, 522, 523, 524} | OVERLOADED
NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "arrearage", "insufficient balance", "insufficient_balance")
FILTERED = ("content_filter", "data_inspection_failed", "datainspectionfailed", "content_policy_violation", "responsibleai")
BACK_OFF, MAX_BACK_OFF = 1.0, 60.0  # seconds: first wait without Retry-After, longest


def check_base_url(url):
    """The base URL without a trailing slash. Raises UserError for one that is no http(s) URL or carries a secret."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError("--base-url: expected http://host[:port]/v1 or https://..., such as https://api.openai.com/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError("--base-url must hold no user name, password, query or fragment: it is written to the manifest. "
                        "Give the key in OPENAI_API_KEY or with --api-key-file")
    return url.rstrip("/").removesuffix("/chat/completions")


def find_endpoint(base_url, model, key_file):
    """(base URL, model, key or None) from the arguments, OPENAI_BASE_URL, OPENAI_API_KEY and DASHSCOPE_API_KEY.

    Raises UserError when one is missing.
    """
    openai, dashscope = os.environ.get("OPENAI_API_KEY"), os.environ.get("DASHSCOPE_API_KEY")
    url = check_base_url(base_url or os.environ.get("OPENAI_BASE_URL") or (DASHSCOPE if dashscope and not openai else OPENAI))
    at_dashscope = urllib.parse.urlsplit(url).hostname.endswith("aliyuncs.com")
    key = dashscope or openai if at_dashscope else openai  # DashScope's key goes to no other host
    if key_file:
        if not key_file.is_file():
            raise UserError(f"--api-key-file {key_file}: no such file")
        key = key_file.read_text(encoding="utf-8", errors="replace").strip()
    if not key and url in (OPENAI, DASHSCOPE):
        raise UserError(f"no key for {url}: set OPENAI_API_KEY or DASHSCOPE_API_KEY, give --api-key-file, or --base-url for a "
                        "server of your own")
    model = model or ("qwen-turbo" if at_dashscope else None)
    if not model:
        raise UserError(f"--llm openai at {url} needs --model NAME")
    return url, model, key or None


class Gate:
    """How many calls may run at once. Thread-safe."""

    def __init__(self, maximum):
        self.maximum, self.limit, self.active = maximum, max(1.0, maximum / 2), 0
        self.slow_start = True
        self.paused_until = self.last_cut = 0.0
        self.stopped = False
        self.condition = threading.Condition()

    def enter(self):
        """Wait for a place. Returns the time of entry, or None after `stop`."""
        with self.condition:
            while not self.stopped:
                wait = self.paused_until - time.monotonic()
                if wait <= 0 and self.active < int(self.limit):
                    self.active += 1
                    return time.monotonic()
                self.condition.wait(wait if wait > 0 else None)
            return None

    def leave(self, entered, success=False, overloaded=False, pause=0.0):
        """Give the place back and say how the call went; `pause` holds all new calls for that many seconds."""
        with self.condition:
            self.active -= 1
            now = time.monotonic()
            if success:
                self.limit = min(self.maximum, self.limit + (1 if self.slow_start else 1 / self.limit))
            elif overloaded and entered > self.last_cut:  # calls that started before the last cut say nothing about the new limit
                self.limit, self.slow_start, self.last_cut = max(1.0, self.limit / 2), False, now
            self.paused_until = max(self.paused_until, now + pause)
            self.condition.notify(2)  # the place given back and one that the limit may have gained

    def stop(self):
        with self.condition:
            self.stopped = True
            self.condition.notify_all()


def request_tokens(body, count):
    """Prompt tokens of a request: its texts, by `count` (text -> tokens), and 8 for the chat template of each message."""
    return sum(count(message["content"]) + 8 for message in body["messages"])


class Budget:
    """Stops before `max_cost` (in the prices' currency) or `max_requests` HTTP calls are exceeded. Thread-safe.

    price_in, price_out: per million tokens. count: text -> tokens. What is in flight counts with its largest possible
    cost, and so does a call whose answer was lost, as the server may have billed it.
    """

    def __init__(self, count, price_in=0.0, price_out=0.0, max_cost=None, max_requests=None):
        self.count, self.price_in, self.price_out = count, price_in, price_out
        self.max_cost, self.max_requests = max_cost, max_requests
        self.calls, self.spent, self.reserved, self.lost = 0, 0.0, 0.0, 0.0
        self.lock = threading.Lock()

    def cost(self, tokens_in, tokens_out):
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def reserve(self, body):
        """Largest cost of the call, now reserved. Raises Stopped when it does not fit."""
        amount = 0.0
        if self.price_in or self.price_out:
            amount = self.cost(1.25 * request_tokens(body, self.count), body["max_tokens"])
        with self.lock:
            if self.max_requests is not None and self.calls >= self.max_requests:
                raise Stopped(f"--max-requests {self.max_requests} reached")
            total = self.spent + self.lost + self.reserved + amount
            if self.max_cost is not None and total > self.max_cost:
                raise Stopped(f"--max-cost {self.max_cost:g} would be exceeded: spent {self.spent:.4f}, perhaps billed without "
                              f"an answer {self.lost:.4f}, in flight at most {self.reserved:.4f}, next at most {amount:.4f}")
            self.calls += 1
            self.reserved += amount
        return amount

    def settle(self, amount, answer=None, lost=False):
        """Replace a reservation by what the answer's usage says it cost."""
        with self.lock:
            self.reserved -= amount
            if answer is not None:
                tokens = usage_of(answer)
                self.spent += self.cost(*tokens.values()) if any(tokens.values()) else amount
            elif lost:
                self.lost += amount


class ChatClient:
    """See the module's docstring. key None sends no Authorization header.

    In seconds: connect_timeout, timeout (for a whole answer), patience.
    """
    source = "openai"

    def __init__(self, base_url, model, key=None, concurrency=32, attempts=6, connect_timeout=10.0, timeout=120.0, patience=900.0,
                 give_up_after=5, budget=None, log=print):
        self.url, self.model = check_base_url(base_url) + "/chat/completions", model
        if key is not None and not re.fullmatch(r"[\x21-\x7e]+", key):
            raise UserError("the API key holds spaces, line ends or non-ASCII characters; copy it again (it is not shown here)")
        self.__key = key
        self.concurrency, self.attempts, self.give_up_after = concurrency, attempts, give_up_after
        self.connect_timeout, self.timeout, self.patience = connect_timeout, timeout, patience
        self.budget = budget or Budget(len)
        self.log = log
        self.gate = Gate(concurrency)
        self.counts = {"calls": 0, "retries": 0, "rate_limited": 0, "failed": 0}
        self.lock, self.first = threading.Lock(), threading.Lock()
        self.stopping = threading.Event()
        self.reason, self.failures, self.drop_format = None, 0, False
        self.last_success, self.succeeded = time.monotonic(), False

    # ------------------------------------------------------------ the back end's two methods

    def answers(self, requests_):
        """Yield records as they arrive; memory holds the calls in flight only. Raises Stopped, after what was in flight."""
        source, source_lock = iter(requests_), threading.Lock()
        results = queue.Queue(maxsize=2 * self.concurrency)
        self.last_success = time.monotonic()

        def work():
            session = open_session(self.__key)
            try:
                while not self.stopping.is_set():
                    with source_lock:
                        request = next(source, None)
                    if request is None:
                        break
                    if (answer := self._ask(session, request)) is not None:
                        results.put(answer)
            except BaseException as error:  # handed to the thread that reads the results
                self.stopping.set()
                self.gate.stop()
                results.put(error)
            finally:
                session.close()
                results.put(None)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(self.concurrency)]
        for thread in threads:
            thread.start()
        running = len(threads)
        try:
            while running:
                try:
                    item = results.get()
                except KeyboardInterrupt:
                    if self.stopping.is_set():  # the second time
                        raise
                    self.log("interrupted: waiting for the calls in flight, interrupt again to drop them")
                    self._stop("interrupted")
                    continue
                if item is None:
                    running -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            self.stopping.set()
            self.gate.stop()
        if self.reason:
            raise Stopped(self.reason)
        self.stopping.clear()
        self.gate.stopped = False

    def close(self):
        self._stop("closed")

    # ------------------------------------------------------------ one request

    def _stop(self, reason):
        with self.lock:
            self.reason = self.reason or reason
        self.stopping.set()
        self.gate.stop()

    def _count(self, name):
        with self.lock:
            self.counts[name] += 1

    def _ask(self, session, request):
        """A record, or None when the run stops before this request has an answer."""
        if not self.succeeded:
            with self.first:  # the others wait for the first success, or for the reason to stop
                if not self.succeeded:
                    return self._repeat(session, request)
        return self._repeat(session, request)

    def _repeat(self, session, request):
        attempt = limited = 0
        plain = False  # send this request without response_format, to see whether that was what the server refused
        while True:
            entered = self.gate.enter()
            if entered is None:
                return None
            body = request.body
            if plain or self.drop_format:
                body = {k: v for k, v in body.items() if k != "response_format"}
            try:
                amount = self.budget.reserve(body)
            except Stopped as stop:
                self.gate.leave(entered)
                self._stop(str(stop))
                return None
            self._count("calls")
            status, answer, message, wait, lost = None, None, None, None, False
            try:
                status, headers, payload = post(session, self.url, body, self.connect_timeout, self.timeout)
            except requests.exceptions.InvalidSchema as error:
                raise UserError(f"requests cannot call {self.url}: {type(error).__name__}") from None
            except requests.RequestException as error:  # its text may quote the request; the type says enough
                lost = not isinstance(error, requests.ConnectTimeout)
                message = fault(error)
                timed_out = isinstance(error, requests.Timeout)
            else:
                timed_out = False
                content, message = self._read(payload, headers)
                if status == 200 and message is None:
                    answer = record(request, content, self.source)
                elif status == 200:
                    lost = True
                wait = retry_after(headers)
            self.budget.settle(amount, answer, lost)
            overloaded = status in OVERLOADED or timed_out
            if answer is not None:
                self.gate.leave(entered, success=True)
                with self.lock:
                    self.last_success, self.succeeded, self.failures = time.monotonic(), True, 0
                    if plain and not self.drop_format:
                        self.drop_format = True
                        self.log("the server refuses response_format; going on without it")
                return answer
            self.gate.leave(entered, overloaded=overloaded, pause=min(wait or 0.0, self.patience) if overloaded else 0.0)
            if self.stopping.is_set():
                return None
            lower = message.lower()
            if status in (401, 402) or (status in (403, 404) and not self.succeeded) or any(word in lower for word in NO_MONEY):
                self._stop(f"{self.url} answered {status}: {message}. Check the key, the account, the model and --base-url")
                return None
            if status in (400, 422) and "response_format" in body:
                plain = True
                continue
            if status in (400, 403, 422, 451) and any(word in lower for word in FILTERED):
                return record(request, None, self.source, {"code": "refused", "message": f"{status}: {message}"})
            if status is not None and 300 <= status < 400:
                self._stop(f"{self.url} redirects to another address, which is not followed with a key. Correct --base-url")
                return None
            if status is not None and status != 200 and status not in TRANSIENT and status < 500:
                return self._failed(request, "rejected", f"{status}: {message}", transport=False)
            if status in OVERLOADED:
                limited += 1
                self._count("rate_limited")
                idle = time.monotonic() - self.last_success
                if idle + (wait or 0) > self.patience:
                    asks = f" and asks to wait {wait:.0f} s" if wait else ""
                    self._stop(f"{self.url} answered {status} ({message[:120]}){asks}; no answer for {idle:.0f} s, and "
                               f"--patience is {self.patience:g}. Run again later")
                    return None
            else:
                attempt += 1
                if attempt >= self.attempts:
                    return self._failed(request, "transport", message if status in (None, 200) else f"{status}: {message}")
                self._count("retries")
            delay = wait
            if wait is None:
                delay = min(MAX_BACK_OFF, BACK_OFF * 2 ** min(attempt + limited - 1, 30)) * random.uniform(0.5, 1)
            self.stopping.wait(min(delay, self.patience))

    def _failed(self, request, code, message, transport=True):
        with self.lock:
            self.failures += 1
            self.counts["failed"] += 1
            failures, never = self.failures, not self.succeeded
        if transport and never:
            self._stop(f"{self.url} gave no answer to the first request in {self.attempts} attempts: {message}. Is the server up "
                       "and --base-url right (it usually ends in /v1)?")
        elif failures >= self.give_up_after:
            self._stop(f"{failures} requests in a row failed, the last with: {message}")
        return record(request, None, self.source, {"code": code, "message": message})

    def _read(self, payload, headers):
        """(chat completion, None), or (None, what came instead). The key is cut out of both."""
        text = payload.decode("utf-8", errors="replace")
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            kind = headers.get("Content-Type", "no content type")
            shown = re.sub(r"\s+", " ", re.sub(r"<[^>]{0,200}>", " ", text[:2000])).strip()[:160]
            return None, self._hide(f"no JSON but {kind}, beginning {shown!r}")
        whole = json.dumps(body, ensure_ascii=False)
        if self._hide(whole) != whole:
            body = json.loads(self._hide(whole))
        wrong = malformed(body)
        if wrong is None:
            return body, None
        error = body.get("error", body) if isinstance(body, dict) else body
        if isinstance(error, dict):
            parts = [str(error[k]) for k in ("code", "type", "message") if error.get(k)]
            error = " ".join(parts) or f"{wrong} in {json.dumps(error)[:160]}"
        return None, str(error)[:300]

    def _hide(self, text):
        key = self.__key
        return text.replace(key, "[key]") if key is not None and len(key) >= 8 else text
