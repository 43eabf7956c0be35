"""What a hub's server says, looked at before huggingface_hub acts on it.

That library takes a server for one that it can trust: it makes paths of commits and ETags, waits for as long as it is told
to, reads as many pages as there are, and each to its end. A mirror, which HF_ENDPOINT may name, can be wrong, or somebody
else's.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from oss_model.errors import Incomplete, InputError

COMMIT = re.compile(r"[0-9a-f]{40}")
LIST_BYTES = 16 << 20  # of one answer about a repository; a page of the hub's has a thousand files, and 200 kB
PAGES = 100
WAIT_MOST = 600  # seconds; the hub counts requests for 300
_API, _ABOUT = "/api/models/", "about a repository"
# A header -> what its value must be.
_HEADERS = {
    "content-range": re.compile(r"bytes ([0-9]{1,18}-[0-9]{1,18}|\*)/[0-9]{1,18}"),
    "x-repo-commit": COMMIT,
}
_ETAG = re.compile(r'(W/)?"?[\w:+=~-][\w.:+=~-]{0,200}"?', re.ASCII)  # without its quotation marks, a file's name
_PATHS = {"etag": _ETAG, "x-linked-etag": _ETAG, "x-linked-size": re.compile(r"[0-9]{1,18}")}


def no_hub(repository: str, found: str) -> InputError:
    said = "expected the answers of a hub, found something else"
    return InputError(f"{repository}: {said} ({found}); is HF_ENDPOINT that of one?")


@contextlib.contextmanager
def looked_at(repository: str) -> Iterator[None]:
    """Meanwhile huggingface_hub raises, of what is no answer of a hub:

    Raises:
      InputError: if it is something else, or would lead out of the cache.
      Incomplete: if the hub asks to come back later than anybody waits.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    made = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)  # which somebody may have set

    def make() -> Any:
        client, pages = made(), []

        def ask(request: Any) -> None:
            if _is_about(str(request.url)):
                request.extensions[_ABOUT] = True  # which it keeps where it is redirected
                request.headers["Accept-Encoding"] = "identity"  # a little that is packed can be much

        def look(response: Any) -> None:
            _look(repository, response, pages)

        hooks = client.event_hooks
        client.event_hooks = {"request": [*hooks["request"], ask], "response": [look, *hooks["response"]]}
        return client

    set_client_factory(make)
    try:
        yield
    finally:
        set_client_factory(made)


def _is_about(url: str) -> bool:
    """Whether that asks about a repository, and not for a file."""
    return _API in url.partition("?")[0]


def _look(repository: str, response: Any, pages: list[int]) -> None:
    def wrong(expected: str, found: object) -> InputError:
        return no_hub(repository, f"expected {expected}, found {str(found)[:80]!r}")

    headers, request = response.headers, response.request
    for name, form in ((_PATHS if request.method == "HEAD" else {}) | _HEADERS).items():
        if (found := headers.get(name)) is not None and not form.fullmatch(found):
            raise wrong(f"another {name}", found)
    asked = re.search(r"/resolve/([0-9a-f]{40})/", request.url.path)
    if asked and headers.get("x-repo-commit", asked[1]) != asked[1]:
        raise wrong(f"a file of the commit {asked[1]}", headers["x-repo-commit"])
    waits = [headers.get("retry-after", ""), *re.findall(r"\bt\s*=\s*(\d+)", headers.get("ratelimit", ""))]
    if any(wait.isdecimal() and (len(wait) > 9 or int(wait) > WAIT_MOST) for wait in map(str.strip, waits)):
        minutes = WAIT_MOST // 60
        raise Incomplete(f"{repository}: the hub lets nobody in for more than {minutes} minutes; run the same command later")
    if not request.extensions.get(_ABOUT):
        return
    if headers.get("content-encoding", "identity") != "identity":
        raise wrong("no content-encoding", headers["content-encoding"])
    following = response.links.get("next", {}).get("url")
    if following is not None:
        pages.append(1)
        if len(pages) > PAGES or not _is_about(following):
            raise wrong(f"at most {PAGES} pages, of {_API}", following)
    response.stream = _limited(response.stream, wrong)


def _limited(stream: Any, wrong: Callable[[str, object], InputError]) -> Any:
    """The same, which ends at LIST_BYTES."""
    (kind,) = [kind for kind in type(stream).__mro__ if kind.__name__ == "SyncByteStream"]  # of the library that is used

    class Limited(kind):
        def __iter__(self) -> Iterator[bytes]:
            count = 0
            for part in stream:
                count += len(part)
                if count > LIST_BYTES:
                    raise wrong(f"at most {LIST_BYTES:,} bytes about a repository", "more")
                yield part

        def close(self) -> None:
            stream.close()

    return Limited()
