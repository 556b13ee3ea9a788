"""A user with a browser, reduced to what a provider's pages need: cookies, redirects, forms."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from urllib.parse import urljoin

import httpx

_MOST_PAGES = 20


@dataclass
class Form:
    action: str = ""
    method: str = "get"
    fields: dict[str, str] = field(default_factory=dict)


class _Forms(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.forms: list[Form] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if tag == "form":
            self.forms.append(Form(found.get("action", ""), found.get("method", "get").lower()))
        elif tag in {"input", "button"} and self.forms and found.get("name", "abort") != "abort":
            self.forms[-1].fields[found["name"]] = found.get("value", "")


class Browser:
    """Follows where it is led, and fills in every form on the way."""

    def __init__(self, login: str) -> None:
        self._login = login
        self._http = httpx.Client(timeout=10, trust_env=False, follow_redirects=True)

    def close(self) -> None:
        self._http.close()

    def visit(self, url: str) -> httpx.Response:
        """Open ``url`` and go on until a page has no form; that page."""
        page = self._http.get(url)
        for _ in range(_MOST_PAGES):
            parser = _Forms()
            parser.feed(page.text)
            if not parser.forms or page.status_code >= 400:
                return page
            form = parser.forms[0]
            if "login" in form.fields:
                form.fields |= {"login": self._login, "password": "any"}
            target = urljoin(str(page.url), form.action) if form.action else str(page.url)
            page = self._http.request(form.method, target, data=form.fields)
        raise AssertionError(f"still a form after {_MOST_PAGES} pages: {page.url}")

    def deny(self, url: str) -> httpx.Response:
        """Open the device page at ``url``, and say no."""
        page = self._http.get(url)
        parser = _Forms()
        parser.feed(page.text)
        form = parser.forms[0]
        page = self._http.post(urljoin(str(page.url), form.action), data=form.fields)
        parser = _Forms()
        parser.feed(page.text)
        form = parser.forms[0]
        fields = {k: v for k, v in form.fields.items() if k != "confirm"} | {"abort": "yes"}
        return self._http.post(urljoin(str(page.url), form.action), data=fields)
