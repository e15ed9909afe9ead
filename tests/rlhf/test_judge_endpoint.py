"""A judge behind an endpoint, against a server of our own on a port that the system chose."""

import json
import socketserver
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from moe.errors import UserError
from rlhf.judge import CHOICES, SCALE, Judge, Referee, Verdict
from rlhf.judge_cache import CachedJudge
from rlhf.judge_endpoint import EndpointJudge, verdict_of

Reply = tuple[int, Any, dict[str, str]]
KEY = "sesame-1234"


class Endpoint:
    """What came in, and a function that says what goes out."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.answer: Callable[[int, dict[str, Any]], Reply] = lambda number, body: said("1")
        self.lock = threading.Lock()
        self.url = ""

    def take(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Reply:
        with self.lock:
            self.seen.append((path, body, headers))
            number = len(self.seen)
        return self.answer(number, body)


def said(text: str | None) -> Reply:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}, {}


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    found = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            code, reply, headers = found.take(self.path, body, dict(self.headers))
            content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(code)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            found.take(self.path, {}, dict(self.headers))
            self.send_error(404)

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        server.shutdown()
        thread.join()


def judge(endpoint: Endpoint, **changes: Any) -> EndpointJudge:
    pauses: list[float] = []
    given = {"base_url": endpoint.url, "model": "m", "sleep": pauses.append, **changes}
    return EndpointJudge(**given)


def verdicts_of(found: Judge, questions: Sequence[str], labels: Sequence[str]) -> list[Verdict]:
    """In the order of the questions."""
    return [verdict for _, verdict in sorted(found.ask(questions, labels=labels))]


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("1", (1.0, 0.0)),
        (" 2.\n", (0.0, 1.0)),
        ("3", None),
        ("1 or 2", None),
        ("Answer 1", None),
        ("", None),
        (None, None),
        ("\uff11", None),
    ],
)
def test_a_reply_is_one_label_or_nothing(
    reply: str | None, verdict: tuple[float, float] | None
) -> None:
    assert verdict_of(reply, CHOICES) == verdict


def test_a_question_goes_out_as_a_chat_completion_and_its_verdict_has_its_number(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    endpoint.answer = lambda number, body: said(body["messages"][0]["content"][-1])
    found = judge(endpoint, key_env="JUDGE_KEY")
    labels = [f"question {n % 5 + 1}" for n in range(12)]
    verdicts = verdicts_of(found, labels, SCALE)
    assert [verdict.index(1.0) for verdict in verdicts if verdict] == [n % 5 for n in range(12)]
    path, body, headers = endpoint.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "m" and body["temperature"] == 0 and body["max_tokens"] == 16
    assert KEY not in found.identity and KEY not in repr(found)


def test_without_a_key_none_is_sent_and_zero_tokens_leave_the_length_open(
    endpoint: Endpoint,
) -> None:
    list(judge(endpoint, max_tokens=0).ask(["x"], labels=CHOICES))
    (_, body, headers) = endpoint.seen[0]
    assert "Authorization" not in headers and "max_tokens" not in body


def test_what_passes_is_tried_again_with_growing_pauses(endpoint: Endpoint) -> None:
    codes = {1: (503, {}, {}), 2: (429, {}, {"Retry-After": "7"}), 3: (500, {}, {})}
    endpoint.answer = lambda number, body: codes.get(number, said("2"))  # type: ignore[arg-type]
    pauses: list[float] = []
    found = judge(endpoint, sleep=pauses.append)
    assert verdicts_of(found, ["x"], CHOICES) == [(0.0, 1.0)]
    assert pauses == [1.0, 7.0, 4.0]


def test_an_error_whose_body_cannot_be_read_is_tried_again_like_any_other(
    endpoint: Endpoint,
) -> None:
    torn: Reply = (503, b"no chunk", {"Transfer-Encoding": "chunked"})
    endpoint.answer = lambda number, body: torn if number == 1 else said("2")
    assert verdicts_of(judge(endpoint), ["x"], CHOICES) == [(0.0, 1.0)]
    endpoint.answer = lambda number, body: torn
    with pytest.raises(UserError, match=r"2 tries \(the last: 503 .*could not be read"):
        verdicts_of(judge(endpoint, retries=1), ["x"], CHOICES)


def test_a_pause_that_is_no_number_of_seconds_is_our_own(endpoint: Endpoint) -> None:
    waits = {1: "soon", 2: "\xb2", 3: "-1"}
    endpoint.answer = lambda number, body: (
        (503, {}, {"Retry-After": waits[number]}) if number in waits else said("1")
    )
    pauses: list[float] = []
    verdicts_of(judge(endpoint, sleep=pauses.append), ["x"], CHOICES)
    assert pauses == [1.0, 2.0, 4.0]


def test_an_endpoint_that_stays_away_is_told_after_the_last_try(endpoint: Endpoint) -> None:
    endpoint.answer = lambda number, body: (503, b"overloaded\x1b[2J", {})
    with pytest.raises(UserError, match=r"did not answer in 3 tries \(the last: 503") as error:
        list(judge(endpoint, retries=2).ask(["x"], labels=CHOICES))
    assert len(endpoint.seen) == 3 and "overloaded" in str(error.value)
    assert "\x1b" not in str(error.value)


def test_a_lost_connection_is_tried_again_too(endpoint: Endpoint) -> None:
    endpoint.answer = lambda number, body: (200, b"", {"Content-Length": "9"})
    pauses: list[float] = []
    with pytest.raises(UserError, match="did not answer in 2 tries"):
        slow = judge(endpoint, retries=1, sleep=pauses.append, timeout=0.2)
        list(slow.ask(["x"], labels=CHOICES))
    assert pauses == [1.0]


@pytest.mark.parametrize(
    ("code", "told"),
    [(401, "--judge-key-env"), (404, "ends in /v1"), (400, "what it says"), (307, "redirects")],
)
def test_a_refusal_is_one_sentence_at_once(endpoint: Endpoint, code: int, told: str) -> None:
    endpoint.answer = lambda number, body: (code, {"error": "no"}, {"Location": "/elsewhere"})
    with pytest.raises(UserError, match=told) as error:
        list(judge(endpoint).ask(["x"], labels=CHOICES))
    assert "\n" not in str(error.value) and len(endpoint.seen) == 1


def test_a_redirect_does_not_take_the_key_along(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    endpoint.answer = lambda number, body: (302, {}, {"Location": f"{endpoint.url}/thief"})
    with pytest.raises(UserError, match="redirects are not followed"):
        list(judge(endpoint, key_env="JUDGE_KEY").ask(["x"], labels=CHOICES))
    assert [path for path, _, _ in endpoint.seen] == ["/v1/chat/completions"]


def test_a_key_that_the_endpoint_repeats_is_not_told(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    endpoint.answer = lambda number, body: (401, f"bad key {KEY}".encode(), {})
    with pytest.raises(UserError, match="look at the key in JUDGE_KEY") as error:
        list(judge(endpoint, key_env="JUDGE_KEY").ask(["x"], labels=CHOICES))
    assert KEY not in str(error.value) and "bad key" in str(error.value)


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (b"<html>", "not JSON"),
        ({"text": "1"}, "no chat completion"),
        ({"choices": []}, "no chat completion"),
        ([1], "no chat completion"),
        ({"choices": [{"message": "1"}]}, "no chat completion"),
    ],
)
def test_what_is_no_chat_completion_is_refused(endpoint: Endpoint, reply: Any, told: str) -> None:
    endpoint.answer = lambda number, body: (200, reply, {})
    with pytest.raises(UserError, match=told):
        list(judge(endpoint).ask(["x"], labels=CHOICES))


def test_a_chatty_model_is_refused_by_its_share(endpoint: Endpoint) -> None:
    endpoint.answer = lambda number, body: said("I would say 4 out of 5")
    with pytest.raises(UserError, match="3 of 3 replies of the judge are none of 1, 2, 3, 4, 5"):
        Referee(judge=judge(endpoint))(["p"] * 3, ["x", "y", "z"])


def test_what_was_paid_for_before_a_failure_is_not_asked_again(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    broken = {"on": True}
    endpoint.answer = lambda number, body: (
        (400, {}, {}) if broken["on"] and "third" in str(body) else said("1")
    )
    one_by_one = judge(endpoint, workers=1)
    cache = CachedJudge(judge=one_by_one, file=tmp_path / "cache.jsonl")
    questions = ["first", "second", "third"]
    with pytest.raises(UserError, match="refuses"):
        list(cache.ask(questions, labels=CHOICES))
    broken["on"] = False
    endpoint.seen.clear()
    again = CachedJudge(judge=one_by_one, file=tmp_path / "cache.jsonl")
    assert verdicts_of(again, questions, CHOICES) == [(1.0, 0.0)] * 3
    assert [body["messages"][0]["content"] for _, body, _ in endpoint.seen] == ["third"]


def test_replies_that_came_behind_a_slow_question_are_kept_when_it_fails(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    others = [f"question {n}" for n in range(5)]
    file = tmp_path / "cache.jsonl"
    all_said = threading.Event()

    def answer(number: int, body: dict[str, Any]) -> Reply:
        if body["messages"][0]["content"] != "slow":
            if number == 6:
                all_said.set()
            return said("2")
        assert all_said.wait(10)
        return 400, {}, {}

    endpoint.answer = answer
    with pytest.raises(UserError, match="refuses"):
        list(CachedJudge(judge=judge(endpoint), file=file).ask(["slow", *others], labels=CHOICES))
    endpoint.seen.clear()
    kept = CachedJudge(judge=judge(endpoint), file=file)
    assert verdicts_of(kept, others, CHOICES) == [(0.0, 1.0)] * 5
    assert endpoint.seen == [] and len(file.read_text(encoding="utf-8").splitlines()) == 5


def test_what_is_under_way_when_a_question_fails_is_kept_too(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    under_way, failed = threading.Event(), threading.Event()

    def answer(number: int, body: dict[str, Any]) -> Reply:
        if body["messages"][0]["content"] == "bad":
            assert under_way.wait(10)
            failed.set()
            return 400, {}, {}
        under_way.set()
        assert failed.wait(10)
        return said("1")

    endpoint.answer = answer
    found, file = judge(endpoint, workers=2), tmp_path / "cache.jsonl"
    questions = ["bad", "good", *(f"later {n}" for n in range(20))]
    with pytest.raises(UserError, match="refuses"):
        list(CachedJudge(judge=found, file=file).ask(questions, labels=CHOICES))
    # Whatever reached the endpoint was paid for, and is here.
    assert len(file.read_text(encoding="utf-8").splitlines()) == len(endpoint.seen) - 1
    endpoint.seen.clear()
    again = CachedJudge(judge=found, file=file)
    assert verdicts_of(again, ["good"], CHOICES) == [(1.0, 0.0)] and endpoint.seen == []


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("ftp://host/v1", "http://HOST"),
        ("http:///v1", "http://HOST"),
        ("http://me:secret@host/v1", "holds a user"),
        ("http://host/v1?key=secret", "holds a user, a query"),
        ("http://host:port/v1", "judge's address"),
    ],
)
def test_addresses_that_cannot_be_or_hold_secrets_are_refused(url: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        EndpointJudge(base_url=url, model="m")


def test_a_key_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(UserError, match="NO_SUCH_KEY .*is not set"):
        EndpointJudge(base_url="http://host/v1", model="m", key_env="NO_SUCH_KEY")


def test_white_space_around_a_key_is_not_part_of_it(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\r\n")
    endpoint.answer = lambda number, body: (401, f"bad key {KEY}".encode(), {})
    with pytest.raises(UserError, match="bad key <key>"):
        verdicts_of(judge(endpoint, key_env="JUDGE_KEY"), ["x"], CHOICES)
    assert endpoint.seen[0][2]["Authorization"] == f"Bearer {KEY}"


def test_a_key_repeated_in_a_broken_reply_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("JUDGE_KEY", KEY)

    class Broken(socketserver.StreamRequestHandler):
        """Reads a request and replies with a line that is no HTTP."""

        def handle(self) -> None:
            length = 0
            while (line := self.rfile.readline()) not in (b"\r\n", b""):
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            self.rfile.read(length)
            self.wfile.write(f"{KEY}\x1b[2J\r\n".encode())

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Broken) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        found = EndpointJudge(base_url=url, model="m", key_env="JUDGE_KEY", retries=0)
        with pytest.raises(UserError, match="BadStatusLine: <key>") as error:
            verdicts_of(found, ["x"], CHOICES)
        server.shutdown()
        thread.join()
    assert KEY not in str(error.value) and "\x1b" not in str(error.value)


@pytest.mark.parametrize("key", ["sesame\n1234", "sesame\x1b1234", "sesam\xe91234", "\u20ac1234"])
def test_a_key_that_cannot_be_a_header_is_refused_without_telling_it(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(UserError, match="JUDGE_KEY .*other than printable ASCII") as error:
        EndpointJudge(base_url="http://host/v1", model="m", key_env="JUDGE_KEY")
    assert "1234" not in str(error.value) and "\n" not in str(error.value)


def test_a_key_of_white_space_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", " \n")
    with pytest.raises(UserError, match="JUDGE_KEY .*is not set or empty"):
        EndpointJudge(base_url="http://host/v1", model="m", key_env="JUDGE_KEY")
