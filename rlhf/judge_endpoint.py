"""A judge behind an OpenAI-compatible endpoint, asked with Python's own HTTP client.

The decision to know: the reply has to be one label and nothing else (a final full stop is
forgiven); a number inside a sentence is not looked for, because which one was meant is a guess.
What may pass (429, 5xx, a lost connection) is tried again with growing pauses; anything else that
is not a reply ends the run in one sentence, after the questions under way have had theirs: what was
paid for is handed on. The key is read from the environment, sent to the named address only
(redirects are not followed), and written nowhere.
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from moe.errors import UserError
from rlhf.judge import Verdict

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
LONGEST_PAUSE = 60.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: following it would take the key along to another address."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class EndpointJudge:
    """`model` at `base_url` (such as http://localhost:8000/v1), asked at temperature 0.

    key_env: the environment variable that holds the key (white space around it is not part of it);
    None sends none. timeout: seconds of one try. retries: after the first try, with pauses of
    `pause` * 2^n seconds, or what Retry-After says, at most a minute. max_tokens: of a reply; 0
    leaves it to the endpoint. workers: questions at a time.
    """

    base_url: str
    model: str
    key_env: str | None = None
    timeout: float = 60.0
    retries: int = 4
    pause: float = 1.0
    max_tokens: int = 16
    workers: int = 4
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.base_url)
            parts.port  # noqa: B018 - it raises
        except ValueError as error:
            raise UserError(f"The judge's address {self.base_url!r}: {error}.") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"The judge's address {self.base_url!r} is not http://HOST/... or https://HOST/..."
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UserError(
                "The judge's address holds a user, a query or a fragment, which would end up in "
                "files: give the plain address, and a key by --judge-key-env."
            )
        if self.key_env is not None:
            if not self._key:
                raise UserError(
                    f"The environment variable {self.key_env} (--judge-key-env) is not set or "
                    "empty: put the endpoint's key there."
                )
            # Python's client would refuse it as a header, and print it.
            if not (self._key.isascii() and self._key.isprintable()):
                raise UserError(
                    f"The key in the environment variable {self.key_env} (--judge-key-env) holds "
                    "characters other than printable ASCII: put the plain key there."
                )

    @property
    def _key(self) -> str:
        return "" if self.key_env is None else os.environ.get(self.key_env, "").strip()

    @property
    def address(self) -> str:
        return self.base_url.rstrip("/") + "/chat/completions"

    @property
    def identity(self) -> str:
        return f"{self.address} {self.model} max_tokens {self.max_tokens}"

    def ask(
        self, questions: Sequence[str], *, labels: Sequence[str]
    ) -> Iterator[tuple[int, Verdict]]:
        with ThreadPoolExecutor(max_workers=self.workers) as pool:
            left = {pool.submit(self._reply, text): n for n, text in enumerate(questions)}
            try:
                for future in as_completed(left):
                    reply = future.result()
                    yield left.pop(future), verdict_of(reply, labels)
            except (Exception, KeyboardInterrupt):
                pool.shutdown(cancel_futures=True)
                for future, number in left.items():
                    if not future.cancelled() and future.exception() is None:
                        yield number, verdict_of(future.result(), labels)
                raise
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _reply(self, question: str) -> str | None:
        """The text of the reply; None where the model declined to give one."""
        problem = ""
        for attempt in range(self.retries + 1):
            try:
                return _content(self._post(question), self.address)
            except urllib.error.HTTPError as error:
                problem = self._without_key(f"{error.code} {error.reason}: {_said(error)}")
                if error.code not in PASSING:
                    raise UserError(self._refusal(error.code, problem)) from error
                wait = error.headers.get("Retry-After", "") if error.headers else ""
            except (OSError, HTTPException) as error:
                problem, wait = self._without_key(f"{type(error).__name__}: {error}"), ""
            if attempt < self.retries:
                asked = float(wait) if wait.isdecimal() else self.pause * 2.0**attempt
                self.sleep(min(asked, LONGEST_PAUSE))
        raise UserError(
            f"The judge at {self.address} did not answer in {self.retries + 1} tries (the last: "
            f"{problem.strip()}): see that it runs, or go on later by the same command."
        )

    def _post(self, question: str) -> Any:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
        }
        if self.max_tokens:
            body["max_tokens"] = self.max_tokens
        headers = {"Content-Type": "application/json"}
        if self.key_env is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(
            self.address, data=json.dumps(body).encode("ascii"), headers=headers, method="POST"
        )
        opener = urllib.request.build_opener(_NoRedirect)
        with opener.open(request, timeout=self.timeout) as response:
            content: bytes = response.read()
        try:
            return json.loads(content)
        except ValueError as error:
            raise UserError(
                f"{self.address} answered with something that is not JSON: is it an "
                "OpenAI-compatible endpoint? Its address often ends in /v1."
            ) from error

    def _refusal(self, code: int, problem: str) -> str:
        remedy = "look at the address, the model's name and what it says."
        if code in (401, 403):
            remedy = "give the key's environment variable by --judge-key-env."
            if self.key_env is not None:
                remedy = f"look at the key in {self.key_env}."
        elif code == 404:
            remedy = "look at the address (it often ends in /v1) and at --judge-model."
        elif 300 <= code < 400:
            remedy = "redirects are not followed: give the address it leads to."
        return f"The judge at {self.address} refuses ({problem.strip()}): {remedy}"

    def _without_key(self, said: str) -> str:
        """What the endpoint said, on one line, without control characters or the key."""
        if self._key:
            said = said.replace(self._key, "<key>")
        return " ".join("".join(c if c.isprintable() else " " for c in said).split())[:200]


def _said(error: urllib.error.HTTPError) -> str:
    """The beginning of what came with the error; a connection may be lost while it is read."""
    try:
        return error.read(2000).decode("utf-8", "replace")
    except (OSError, HTTPException):
        return "what it said could not be read"


def _content(reply: Any, address: str) -> str | None:
    """The first choice's text, as the chat completions format has it."""
    try:
        message: Mapping[str, Any] = reply["choices"][0]["message"]
        content = message.get("content")
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(
            f"{address} answered with JSON that is no chat completion (no choices[0].message): is "
            "it an OpenAI-compatible endpoint?"
        ) from error
    return content if isinstance(content, str) else None


def verdict_of(reply: str | None, labels: Sequence[str]) -> Verdict:
    """All on the label that the reply is; None for any other reply."""
    word = "" if reply is None else reply.strip().removesuffix(".")
    if word not in labels:
        return None
    return tuple(float(label == word) for label in labels)
