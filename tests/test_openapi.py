"""The OpenAPI document against the application: schemathesis sends what the document allows and what it forbids."""
import pytest
from hypothesis import HealthCheck, given, settings
from serving import make_data, running

from eimf import service

schemathesis = pytest.importorskip("schemathesis", reason="the fuzzing tests need the package schemathesis")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory)


@pytest.fixture(scope="module")
def document(data):
    with running(data) as (_, port):
        yield schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")


OPERATIONS = [("/recommend", "POST"), ("/recommend/batch", "POST"), ("/items", "GET"), ("/items/{item_id}/similar", "GET"),
              ("/map", "GET"), ("/health", "GET"), ("/version", "GET"), ("/metrics", "GET")]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("path, method", OPERATIONS)
def test_every_answer_is_one_that_the_document_promises(document, path, method, mode):
    operation = document[path][method]
    if mode == "negative" and not (operation.body or operation.query or operation.path_parameters):
        return  # there is nothing that could be wrong

    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    def check(case):
        case.call_and_validate()

    check()


def test_the_document_describes_the_requests(document):
    paths = document.raw_schema["paths"]
    assert {(path, method.upper()) for path, methods in paths.items() for method in methods} == set(OPERATIONS)
    body = paths["/recommend"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == {"history", "user_id", "k", "exclude_seen", "exclude_items", "allow_categories", "diversity", "explain", "per_interest"}
    assert body["properties"]["k"]["maximum"] == service.LIMITS["k"] and body["additionalProperties"] is False
