"""Chromium through ``toppy proxy``: a page with its style sheet, script, pictures and data."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from integration.programs.servers import Sites
from integration.programs.through import in_one_process, need, ran
from integration.programs.web import PICTURES

pytestmark = in_one_process

_OPTIONS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--no-first-run",
    "--no-default-browser-check",
    "--password-store=basic",
    "--virtual-time-budget=30000",
    "--dump-dom",
)
"""Virtual time stands still while anything is being loaded."""


def load(url: str, directory: Path, sites: Sites, proxy: str) -> dict[str, str]:
    """Load a page; what its script saw."""
    certificate = x509.load_pem_x509_certificate((sites.ca.parent / "site.pem").read_bytes())
    key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    pin = base64.b64encode(hashlib.sha256(key).digest()).decode()
    command = [
        *(need("chromium", "chromium"), *_OPTIONS, proxy),
        *(() if os.geteuid() else ("--no-sandbox",)),  # it refuses to be root with one
        f"--ignore-certificate-errors-spki-list={pin}",
        f"--user-data-dir={directory}",
        url,
    ]
    dom = ran(command, environ={"DBUS_SESSION_BUS_ADDRESS": "disabled:"})
    body = re.search("<body([^>]*)>", dom)
    assert body is not None, dom
    return dict(re.findall(r'data-(\w+)="([^"]*)"', body[1]))


@pytest.mark.parametrize(
    ("option", "is_https"),
    [
        pytest.param("--proxy-server=socks5://127.0.0.1:{}", True, id="socks5-https"),
        pytest.param("--proxy-server=http://127.0.0.1:{}", True, id="connect-https"),
        pytest.param("--proxy-server=http://127.0.0.1:{}", False, id="forwarded-http"),
        pytest.param("--proxy-pac-url=http://127.0.0.1:{}/proxy.pac", True, id="pac-https"),
    ],
)
def test_a_page_with_all_its_parts(
    proxy_port: int,
    sites: Sites,
    tmp_path: Path,
    option: str,
    *,
    is_https: bool,
) -> None:
    url = sites.https_url if is_https else sites.http_url
    seen = load(f"{url}/", tmp_path / "profile", sites, option.format(proxy_port))
    assert seen == {
        "pictures": str(PICTURES),
        "style": "rgb(1, 2, 3)",
        "data": "all of it came",
    }
