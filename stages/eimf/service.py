"""The HTTP application of stage 08: routes, their schemas and limits, and the gate that every request passes.

Every error is {"detail", "code", "request_id"}. Every input is bounded by LIMITS.
"""
import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import logging
import os
import platform
import re
import threading
import time
import uuid
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from fastapi import Query as Parameter
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .artifacts import PACKAGES, _version
from .readers import ID_CHARACTERS
from .recommender import Query
from .server import Batcher, Live, Metrics, Overloaded, resident_bytes, settle_memory

LIMITS = {"body_bytes": 1 << 20, "history": 5000, "exclude_items": 5000, "allow_categories": 100, "k": 500, "per_interest": 100, "batch": 256,
          "id_characters": ID_CHARACTERS, "query_characters": 200, "search_results": 100, "map_points": 20000}
TOKEN_VARIABLE = "EIMF_TOKEN"  # if set, requests need "Authorization: Bearer <its value>"
OPEN = ("/", "/health")  # what answers without the token: the page holds no data, and load balancers have no token
PAGE = Path(__file__).with_name("page.html")
log = logging.getLogger("08_serve")

Name = Annotated[str, StringConstraints(min_length=1, max_length=LIMITS["id_characters"])]


def names(limit):
    return Annotated[list[Name], Field(max_length=LIMITS[limit])]


def whole(value):
    """20.0 as 20: JSON has one kind of number, and its schemas call both integers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class RecommendRequest(BaseModel):
    """One user: either `history` (item ids, oldest first) or `user_id` (a user of the data set with all recorded events)."""
    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={
        "oneOf": [{"required": ["history"]}, {"required": ["user_id"]}]})

    history: names("history") = Field(default_factory=list)  # what counts as given is what the request holds, so null is an error
    user_id: Name = Field(default_factory=str)
    # The limits stand inside: outside of the validator, pydantic does not write them into the OpenAPI document.
    k: Annotated[Annotated[int, Field(ge=1, le=LIMITS["k"])], BeforeValidator(whole), Field(description="items wanted")] = 20
    exclude_seen: Annotated[bool, Field(description="leave out items of the history")] = True
    # Made anew for each request: pydantic would copy a default deeply, which takes as long as all of the rest.
    exclude_items: names("exclude_items") = Field(default_factory=list, json_schema_extra={"default": []})
    allow_categories: names("allow_categories") = Field(default_factory=list, json_schema_extra={"default": []},
                                                        description="only items in one of these; all if empty")
    diversity: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, description=(
        "0 ranks by score; an item loses this share of the scores' range for each item of its category above it"))] = 0.0
    explain: Annotated[bool, Field(description="with interests, their labels and the history items behind them")] = True
    per_interest: Annotated[Annotated[int, Field(ge=0, le=LIMITS["per_interest"])], BeforeValidator(whole), Field(description=(
        "with explain, so many items of each interest too, by its own score alone"))] = 0

    def query(self):
        """As a recommender's Query. Raises Refused unless exactly one of history and user_id is given."""
        if ("history" in self.model_fields_set) == ("user_id" in self.model_fields_set):
            raise Refused(422, "invalid_request", "give either history or user_id")
        return Query(tuple(self.history), self.user_id or None, self.k, self.exclude_seen, tuple(self.exclude_items),
                     tuple(self.allow_categories), self.diversity, self.explain, self.per_interest)


class Error(BaseModel):
    detail: str
    code: str
    request_id: str


class Item(BaseModel):
    id: str
    title: str | None
    position: list[float] | None = Field(None, description="place on the map, if the export has one")
    similarity: float | None = Field(None, description="cosine to what was asked for")


class Label(BaseModel):
    """An explicit interest, read out of the history of some cluster's typical user, not of this user's."""
    text: str
    similarity: float
    of: str
    cluster: int


class Scored(Item):
    rank: int
    score: float
    category: str | None = None


class Interest(BaseModel):
    interest: int
    label: Label | None
    because_of: list[Item]
    position: list[float] | None = None
    items: list[Scored] | None = Field(None, description="if per_interest asks for them, the best by this interest alone")


class Ranked(Scored):
    interest: int | None
    because_of: list[str] | None = None


class Recommendations(BaseModel):
    run: str
    fallback: str | None = Field(description='"popular" if the history holds no known item')
    unknown_items: list[str]
    unknown_categories: list[str]
    label_source: str | None = Field(None, description='who wrote the labels; "offline" is the built-in summariser')
    history: list[Item] | None = None
    interests: list[Interest] | None = None
    items: list[Ranked]


class Failed(BaseModel):
    detail: str
    code: str


class BatchAnswer(BaseModel):
    results: list[Recommendations | Failed]


class Items(BaseModel):
    items: list[Item]


class Refused(Exception):
    """A request that gets no answer: the HTTP status and a code for programs."""

    def __init__(self, status, code, detail):
        super().__init__(detail)
        self.status, self.code = status, code


def explain(errors):
    """pydantic errors as one line: where, and what was expected. The input is not repeated."""
    return "; ".join(f"{'.'.join(str(p) for p in e['loc']) or 'body'}: {e['msg']}" for e in errors[:5])[:900]


def parse(model, body):
    """Validate JSON bytes, or a value that came out of JSON. Raises Refused."""
    try:
        return model.model_validate_json(body) if isinstance(body, bytes) else model.model_validate(body)
    except ValidationError as error:
        raise Refused(422, "invalid_request", explain(error.errors(include_url=False, include_input=False, include_context=False))) from None


async def json_body(request):
    """The body of a JSON request, refused as soon as it is longer than allowed."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "unsupported_media_type", f"content-type is {kind[:80] or 'missing'}, expected application/json")
    body, limit = bytearray(), LIMITS["body_bytes"]
    length = request.headers.get("content-length", "")
    if not length.isdecimal() or int(length[:20]) <= limit:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                break
        else:
            return bytes(body)
    raise Refused(413, "too_large", f"the body is larger than {limit} bytes")


def failed(error):
    """A query's exception as Refused."""
    if isinstance(error, KeyError):
        return Refused(404, "unknown_user", "no such user in the data set; give a history instead")
    return Refused(500, "internal_error", "the server failed; its log has the reason")


class BatchRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    requests: Annotated[list[Any], Field(min_length=1, max_length=LIMITS["batch"])]


def request_body(schema):
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


ONE = RecommendRequest.model_json_schema()
MANY = {"type": "object", "additionalProperties": False, "required": ["requests"], "properties": {
    "requests": {"type": "array", "minItems": 1, "maxItems": LIMITS["batch"], "items": {
        "anyOf": [ONE, {"description": "anything else gets an error of its own"}]}}}}


def errors(*statuses):
    return {status: {"model": Error} for status in (401, *statuses, 500, 503)}


class Service(FastAPI):
    """The application over a Live recommender. Starting it starts the thread that watches for new exports."""

    def __init__(self, live, metrics_folder=None, workers=1, reload_seconds=2.0):
        self.live, self.stop = live, threading.Event()
        super().__init__(title="EIMF", version="0.1.0", description="Recommendations for several interests per user, with reasons.",
                         docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=self.run_background)  # the docs pages would load from the network
        self.add_routes()
        self.metrics = Metrics(dict.fromkeys(r.path for r in self.routes), metrics_folder, workers)
        self.batcher, self.reload_seconds, self.checked = Batcher(live, self.metrics), reload_seconds, (0.0, None)

    @contextlib.asynccontextmanager
    async def run_background(self, app):
        settle_memory()
        self.metrics.set("eimf_resident_memory_bytes", resident_bytes())
        watcher = threading.Thread(target=self.live.watch, args=(self.reload_seconds, self.stop, self.metrics), daemon=True)
        watcher.start()
        yield
        self.stop.set()
        self.batcher.pool.shutdown()

    async def ask(self, queries):
        try:
            return await self.batcher.ask(queries)
        except Overloaded:
            raise Refused(503, "overloaded", "too many requests are waiting; try again in a second") from None

    async def healthy(self):
        """None, or why no recommendations can be made: a query of its own must be answered within 2 seconds."""
        age, reason = self.checked
        if time.monotonic() - age > 1:  # asked more often, the last finding stands
            try:
                answer = (await asyncio.wait_for(self.ask([Query((self.live.current.ids[1],), k=1, explain=False)]), 2))[0]
                reason = None if isinstance(answer, str) else "a test query failed; the log has the reason"
            except asyncio.TimeoutError:
                reason = "a test query got no answer within 2 seconds"
            except Refused as error:
                reason = str(error)
            self.checked = time.monotonic(), reason
        return reason

    def add_routes(self):
        for kind in (Refused, RequestValidationError, HTTPException, ClientDisconnect, Exception):
            self.add_exception_handler(kind, report)

        @self.post("/recommend", responses={200: {"model": Recommendations}} | errors(404, 413, 415, 422), openapi_extra=request_body(ONE))
        async def recommend(request: Request):
            """Ranked items for one user, with reasons."""
            query = parse(RecommendRequest, await json_body(request)).query()
            answer = (await self.ask([query]))[0]
            if not isinstance(answer, str):
                raise failed(answer)
            return Response(answer, media_type="application/json")

        @self.post("/recommend/batch", responses={200: {"model": BatchAnswer}} | errors(413, 415, 422), openapi_extra=request_body(MANY))
        async def recommend_batch(request: Request):
            """Up to 256 users at once. `results` has one element per request, in order: an answer, or {detail, code}."""
            results, queries = [], []
            for element in parse(BatchRequest, await json_body(request)).requests:
                try:
                    queries.append(parse(RecommendRequest, element).query())
                    results.append(None)
                except Refused as error:
                    results.append(error)
            answers = iter(await self.ask(queries) if queries else [])
            for n, result in enumerate(results):
                answer = next(answers) if result is None else result
                if not isinstance(answer, str):
                    error = answer if isinstance(answer, Refused) else failed(answer)
                    answer = json.dumps({"detail": str(error), "code": error.code})
                results[n] = answer
            return Response('{"results": [' + ", ".join(results) + "]}", media_type="application/json")

        # What load is made of. The gate calls these two itself: FastAPI's layers, which describe them in the OpenAPI document
        # and do nothing more for them, would take .2 ms a request, as much as the recommendation.
        self.direct = {"/recommend": recommend, "/recommend/batch": recommend_batch}

        @self.get("/items", response_model=Items, response_model_exclude_unset=True, responses=errors(422))
        async def items(query: Annotated[str, Parameter(max_length=LIMITS["query_characters"])] = "",
                        limit: Annotated[int, Parameter(ge=1, le=LIMITS["search_results"])] = 20):
            """Items whose title has words that begin with the query's, or whose id it is; most popular first."""
            live = self.live.current
            return {"items": [live.item(n) for n in live.titles_index.search(query, limit)]}

        @self.get("/items/{item_id:path}/similar", response_model=Items, response_model_exclude_unset=True, responses=errors(404, 422))
        async def similar(item_id: str, k: Annotated[int, Parameter(ge=1, le=LIMITS["k"])] = 20):
            """The items whose vectors point most nearly the same way, with their cosine."""
            live = self.live.current
            if item_id not in live.number:
                raise Refused(404, "unknown_item", "no such item")
            found = await asyncio.get_running_loop().run_in_executor(self.batcher.pool, live.similar, live.number[item_id], k)
            return {"items": [live.item(n) | {"similarity": round(c, 4)} for n, c in zip(*found)]}

        @self.get("/map", responses=errors(404, 422))
        async def map_points(limit: Annotated[int, Parameter(ge=1, le=LIMITS["map_points"])] = 4000):
            """Places [x, y] of the most popular items on the map that the export made."""
            live = self.live.current
            if live.projection is None:
                raise Refused(404, "no_map", "this export has no map")
            return {"points": live.position[live.popular[:limit]].tolist()}

        @self.head("/health", include_in_schema=False)
        @self.get("/health", responses={503: {"model": Error}})
        async def health():
            """200 while recommendations can be made, else 503. `refused` tells whether a newer export could not be loaded."""
            if reason := await self.healthy():
                raise Refused(503, "degraded", reason)
            return {"status": "ok", "run": self.live.current.run, "refused": self.live.refused is not None}

        @self.get("/version", responses=errors())
        async def version():
            """What is served: the run, when it was trained, its files, and the packages."""
            live = self.live.current
            return {"run": live.run, "dataset": live.dataset, "trained": live.manifest["finished"], "config": live.config,
                    "model_sha256": live.manifest["outputs"]["model.pt2"]["sha256"], "items": len(live.ids) - 1,
                    "retrieval": live.retrieval, "label_source": live.label_source, "limits": LIMITS,
                    "packages": {p: _version(p) for p in (*PACKAGES, "fastapi", "uvicorn")} | {"python": platform.python_version()}}

        @self.get("/metrics", response_class=Response, responses=errors() | {200: {"content": {"text/plain": {}}}})
        async def metrics():
            """Counters in Prometheus' text format."""
            return Response(self.metrics.render(), media_type="text/plain; version=0.0.4")

        page, policy = load_page()

        @self.head("/", include_in_schema=False)
        @self.get("/", include_in_schema=False)
        async def index():
            return Response(page, media_type="text/html", headers={
                "content-security-policy": policy, "referrer-policy": "no-referrer", "cache-control": "no-cache"})


def load_page():
    """The page and the content-security policy that lets it run its own script and style and nothing else."""
    page = PAGE.read_text(encoding="utf-8")

    def hashes(tag):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(f.encode()).digest()).decode()}'" for f in found)

    return page, (f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
                  "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


async def report(request, error):
    """The response to a request that ended in an exception."""
    if isinstance(error, Refused):
        return failure(request.scope, error.status, error.code, str(error))
    if isinstance(error, RequestValidationError):
        return failure(request.scope, 422, "invalid_request", explain(error.errors()))
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        return failure(request.scope, error.status_code, code, str(error.detail), error.headers)
    if isinstance(error, ClientDisconnect):
        return failure(request.scope, 400, "disconnected", "the client went away before the body was complete")
    log.error("request %s failed", request.scope.get("request_id"), exc_info=error)
    return failure(request.scope, 500, "internal_error", "the server failed; its log has the reason under this request id")


def failure(scope, status, code, detail, headers=None):
    body = {"detail": detail, "code": code, "request_id": scope["request_id"]}
    headers = dict(headers or {}) | ({"retry-after": "1"} if status == 503 else {})
    return Response(json.dumps(body), status, headers, media_type="application/json")


class Gate:
    """ASGI wrapper that every request passes: request id, bearer token, security headers, counters."""

    def __init__(self, service, token=None):
        self.service, self.token = service, token.encode() if token else None

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.service(scope, receive, send)
        started, status, route = time.perf_counter(), 500, "other"
        headers = dict(scope["headers"])
        scope["request_id"] = identifier = request_id(headers.get(b"x-request-id", b""))

        async def reply(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", identifier.encode()),
                                      (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            if self.token and scope["path"] not in OPEN and not self.authorised(headers):
                await failure(scope, 401, "unauthorized", "a bearer token is needed", {"www-authenticate": "Bearer"})(scope, receive, reply)
            elif scope["method"] == "POST" and (handler := self.service.direct.get(scope["path"])):
                request, route = Request(scope, receive), scope["path"]
                try:
                    response = await handler(request)
                except Exception as error:
                    response = await report(request, error)
                await response(scope, receive, reply)
            else:
                await self.service(scope, receive, reply)
                route = getattr(scope.get("route"), "path", route)
        except Exception:  # reported by the service's handler, which answered if it still could
            pass
        finally:
            self.service.metrics.request(route, status, time.perf_counter() - started)

    def authorised(self, headers):
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.token)


def request_id(given):
    """The caller's x-request-id if it is a short plain word, else a new one."""
    if 0 < len(given) <= 64 and given.replace(b"-", b"").replace(b"_", b"").isalnum():
        return given.decode("ascii")
    return uuid.uuid4().hex


def create(settings=None):
    """The application that uvicorn runs. settings: data_dir, dataset, run, retrieval, threads, reload_seconds; workers of
    a larger server find them in the environment, with the folder where they count together."""
    import torch
    settings = settings or json.loads(os.environ["EIMF_SERVE"])
    torch.set_num_threads(settings["threads"])
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(logging.INFO)
    service = Service(Live(settings), settings.get("metrics"), settings.get("workers", 1), settings["reload_seconds"])
    gate = Gate(service, os.environ.get(TOKEN_VARIABLE))
    gate.live = service.live
    return gate
