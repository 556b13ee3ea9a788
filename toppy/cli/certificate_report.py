"""What ``toppy-gw cert show`` and ``cert check`` say."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toppy.cli.gateway_tables import show
from toppy.config.gateway import resolve_path
from toppy.control.certificates import read_passphrase
from toppy.control.settings import config_path, load_config
from toppy.errors import ConfigError
from toppy.system.certificate_check import Finding, check_certificate
from toppy.system.certificate_files import (
    CertificateFacts,
    days_left,
    describe_certificate,
    is_encrypted,
    parse_certificates,
)
from toppy.system.files import is_open_to_others, read_file


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be checked; without ``certificate`` what the gateway's configuration names."""

    certificate: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    names: tuple[str, ...] = ()
    is_client: bool = False
    passphrase_file: Path | None = None
    config: str | None = None


def show_files(files: Sequence[Path], *, as_json: bool) -> str:
    """Every certificate of the files. Raises ``ConfigError``."""
    found: list[tuple[str, CertificateFacts, int]] = []
    now = time.time()
    for path in files:
        pem = read_file(path, "certificate")
        try:
            for certificate in parse_certificates(pem, str(path)):
                facts = describe_certificate(certificate)
                found.append((str(path), facts, days_left(certificate, now)))
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from None
    if as_json:
        shown = [_as_json(*each) for each in found]
        return json.dumps({"certificates": shown}, indent=2)
    return "\n\n".join(_as_text(*each) for each in found)


def _as_json(path: str, facts: CertificateFacts, left: int) -> dict[str, Any]:
    return {
        "file": path,
        **asdict(facts),
        "not_before": facts.not_before.isoformat(),
        "not_after": facts.not_after.isoformat(),
        "days_left": left,
    }


def _as_text(path: str, facts: CertificateFacts, left: int) -> str:
    kind = "CA" if facts.is_ca else " and ".join(facts.usages) or "any use"
    issuer = "itself" if facts.is_self_signed else facts.issuer
    until = f"{left} days left" if left >= 0 else "EXPIRED"
    pairs = [f"{facts.sha256[i : i + 2]}".upper() for i in range(0, len(facts.sha256), 2)]
    lines = [
        ("file", path),
        ("subject", facts.subject),
        ("names", ", ".join(facts.names) or "none"),
        ("issued by", issuer),
        ("for", kind),
        ("key", facts.key_type),
        ("valid", f"{facts.not_before:%Y-%m-%d} to {facts.not_after:%Y-%m-%d} UTC, {until}"),
        ("serial", facts.serial),
        ("SHA-256", ":".join(pairs)),
    ]
    return "\n".join(f"{name:<10} {show(value)}" for name, value in lines)


def check_files(
    question: Question,
    environ: Mapping[str, str],
    *,
    ask: Callable[[str], bytes],
    as_json: bool,
) -> tuple[str, bool]:
    """What was found, and whether all is good. ``ask`` gets a passphrase from a person; it and this
    raise ``ConfigError``.
    """
    certificate, key, passphrase_file, passphrase = _files_of(question, environ)
    key_pem = read_file(key, "--key") if key is not None else None
    if key_pem is not None and is_encrypted(key_pem) and passphrase is None:
        if passphrase_file is not None:
            passphrase = read_passphrase(passphrase_file)
        else:
            passphrase = ask(f"passphrase of {key}")
    findings = check_certificate(
        read_file(certificate, "certificate"),
        now=time.time(),
        purpose="client" if question.is_client else "server",
        key_pem=key_pem,
        passphrase=passphrase,
        ca_pem=read_file(question.ca, "--ca") if question.ca is not None else None,
        names=question.names,
    )
    if key is not None:
        findings.append(_key_mode(key))
    is_good = all(finding.status != "fail" for finding in findings)
    if as_json:
        facts = {
            "file": str(certificate),
            "ok": is_good,
            "findings": [asdict(finding) for finding in findings],
        }
        return json.dumps(facts, indent=2), is_good
    return "\n".join(_line(finding) for finding in findings), is_good


def _key_mode(key: Path) -> Finding:
    if is_open_to_others(key, stat.S_IRGRP | stat.S_IROTH):
        return Finding("key-mode", "warn", f"others can read {key}", f"chmod 600 {key}")
    return Finding("key-mode", "pass", "nobody else can read the key")


def _line(finding: Finding) -> str:
    text = f"- [{finding.status}] {finding.id}: {show(finding.summary)}"
    return f"{text}\n    {finding.remedy}" if finding.remedy else text


def _files_of(
    question: Question, environ: Mapping[str, str]
) -> tuple[Path, Path | None, Path | None, bytes | None]:
    """Certificate, key, file with the key's passphrase, the passphrase itself."""
    if question.certificate is not None:
        return question.certificate, question.key, question.passphrase_file, None
    path = config_path(question.config, environ)
    tls = load_config(path, environ).config.tls
    if not tls.certificate:
        raise ConfigError(
            "the configuration names no certificate (tls.certificate); name the file to check: "
            "toppy-gw cert check FILE"
        )
    base = str(path.absolute().parent if path is not None else Path.cwd())
    where = [
        Path(resolve_path(base, value)) if value else None
        for value in (tls.certificate, tls.private_key, tls.private_key_passphrase_file)
    ]
    assert where[0] is not None
    passphrase = tls.private_key_passphrase
    return (
        where[0],
        question.key or where[1],
        question.passphrase_file or where[2],
        passphrase.get_secret_value().encode() if passphrase is not None else None,
    )
