"""The HTTP side of stage 08: a FastAPI application over a Recommender."""
import logging
import uuid
from typing import Annotated

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from starlette.exceptions import HTTPException

from .recommender import Query

LIMITS = {"body_bytes": 1 << 20, "history": 5000, "exclude_items": 5000, "k": 500, "id_characters": 256}

ItemId = Annotated[str, StringConstraints(min_length=1, max_length=LIMITS["id_characters"])]
log = logging.getLogger("08_serve")


class RecommendRequest(BaseModel):
    """One user: either `history` (item ids, oldest first) or `user_id` (a user of the data set, all recorded events)."""
    model_config = ConfigDict(extra="forbid", strict=True)

    history: Annotated[list[ItemId], Field(max_length=LIMITS["history"])] | None = None
    user_id: ItemId | None = None
    k: Annotated[int, Field(ge=1, le=LIMITS["k"])] = 20
    exclude_seen: bool = True
    exclude_items: Annotated[list[ItemId], Field(max_length=LIMITS["exclude_items"])] = []


class Error(BaseModel):
    """Every error looks like this."""
    detail: str
    code: str
    request_id: str


class Refused(Exception):
    """A request that cannot be answered, with the HTTP status and a code for programs."""

    def __init__(self, status, code, detail):
        super().__init__(detail)
        self.status, self.code = status, code


def explain(error):
    """A pydantic error as one line: where, and what was expected. The input itself is not repeated."""
    return "; ".join(f"{'.'.join(str(p) for p in e['loc']) or 'body'}: {e['msg']}" for e in error.errors(
        include_url=False, include_input=False, include_context=False)[:5])


def query_of(recommender, request):
    """The Query that a RecommendRequest asks for. Raises Refused."""
    if (request.history is None) == (request.user_id is None):
        raise Refused(422, "invalid_request", "give either history or user_id")
    settings = {"k": request.k, "exclude_seen": request.exclude_seen, "exclude_items": tuple(request.exclude_items)}
    if request.history is not None:
        return Query(history=tuple(request.history), **settings)
    try:
        return recommender.query_of_user(request.user_id, **settings)
    except KeyError:
        raise Refused(404, "unknown_user", "no such user in the data set; give a history instead") from None


async def body_of(request):
    """The request's body, refused as soon as it is longer than allowed."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LIMITS["body_bytes"]:
            raise Refused(413, "too_large", f"the body is larger than {LIMITS['body_bytes']} bytes")
    return bytes(body)


def application(recommender):
    """The FastAPI application."""
    app = FastAPI(title="EIMF recommendations", responses={422: {"model": Error}, 500: {"model": Error}})

    def failure(request, status, code, detail):
        body = {"detail": detail, "code": code, "request_id": request_id(request)}
        return JSONResponse(body, status, headers={"x-request-id": body["request_id"]})

    @app.exception_handler(Refused)
    async def refused(request, error):
        return failure(request, error.status, error.code, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        return failure(request, 422, "invalid_request", "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(request, error):
        return failure(request, error.status_code, "http_error", str(error.detail))

    @app.exception_handler(Exception)
    async def crashed(request, error):
        return failure(request, 500, "internal_error", "the server failed; its log has the reason under this request id")

    @app.post("/recommend", openapi_extra={"requestBody": {"required": True, "content": {
        "application/json": {"schema": RecommendRequest.model_json_schema()}}}})
    async def recommend(request: Request):
        """Ranked items for a history or a user of the data set."""
        try:
            asked = RecommendRequest.model_validate_json(await body_of(request))
        except ValidationError as error:
            raise Refused(422, "invalid_request", explain(error)) from None
        return JSONResponse(recommender.describe(recommender.recommend([query_of(recommender, asked)])[0]))

    @app.get("/health")
    async def health():
        """200 while recommendations can be made."""
        return {"status": "ok", "run": recommender.run}

    return app


def request_id(request):
    """The caller's x-request-id if it is a short plain word, else a new one."""
    given = request.headers.get("x-request-id", "")
    if 0 < len(given) <= 64 and given.isascii() and given.replace("-", "").replace("_", "").isalnum():
        return given
    return uuid.uuid4().hex


def serve(recommender, host, port):
    """Answer until interrupted."""
    uvicorn.run(application(recommender), host=host, port=port, log_level="info")
