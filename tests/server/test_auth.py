"""Callers from tokens, certificates and addresses; token files that change or are wrong."""

import hashlib
from pathlib import Path

import pytest

from dash_server.auth import Authenticator, CallerLimits, TokenFileError, TokenTable, address_of
from dash_server.fair_queue import Priority
from dash_server.statuses import Unauthenticated

ANN, BOB = "ann's token, quite long", "bob's token, quite long"
FILE = f"""
[ann]
token = "{ANN}"
max_requests = 3
weight = 2

[bob]
token_sha256 = "{hashlib.sha256(BOB.encode()).hexdigest()}"
max_tokens = 500
"""


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.toml"
    path.write_text(FILE)
    return path


def bearer(token: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "x"), ("authorization", f"Bearer {token}")]


def test_a_token_is_its_callers_with_its_limits_and_a_namespace_of_its_own(token_file: Path) -> None:
    callers = Authenticator(token_file, CallerLimits(max_requests=9))
    ann, bob = callers.identify(bearer(ANN), "ipv4:1.2.3.4:5"), callers.identify(bearer(BOB), "ipv4:1.2.3.4:5")
    assert (ann.name, ann.limits) == ("ann", CallerLimits(3, None, 2, Priority.NORMAL))
    assert (bob.name, bob.limits) == ("bob", CallerLimits(9, 500, 1, Priority.NORMAL))
    assert len({"", ann.cache_namespace, bob.cache_namespace}) == 3


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        bearer("nobody's"),
        bearer(""),
        [("authorization", ANN)],
        [("authorization", f"Basic {ANN}")],
        [*bearer(ANN), *bearer(ANN)],
        [("authorization-bin", ANN.encode())],
        bearer("\udcff"),
    ],
)
def test_who_has_no_token_is_nobody(token_file: Path, metadata: list[tuple[str, str | bytes]]) -> None:
    with pytest.raises(Unauthenticated) as refusal:
        Authenticator(token_file).identify(metadata, "ipv4:1.2.3.4:5")
    assert "token, quite long" not in str(refusal.value)


def test_the_scheme_is_not_case_sensitive(token_file: Path) -> None:
    assert Authenticator(token_file).identify([("authorization", f"bearer  {ANN} ")], "").name == "ann"


def test_without_tokens_callers_are_addresses_or_certificates_and_share_prompts_as_addresses() -> None:
    callers = Authenticator()
    one = callers.identify([], "ipv6:%5B::1%5D:50476")
    assert one == callers.identify([], "ipv6:%5B::1%5D:50478")
    assert one.cache_namespace == ""
    assert one != callers.identify([], "ipv4:10.0.0.1:50478")
    certified = callers.identify([], "ipv4:10.0.0.1:1", {"x509_common_name": [b"payments"]})
    assert (certified.name, certified.cache_namespace) == ("certificate:payments", "certificate:payments")


def test_the_addresses_of_one_ipv6_network_are_one_caller() -> None:
    peers = "ipv6:%5B2001:db8:1:2::1%5D:1", "ipv6:%5B2001:db8:1:2:ffff::9%5D:2", "ipv6:%5B2001:db8:1:3::1%5D:1"
    one, same, other = (Authenticator().identify([], peer).name for peer in peers)
    assert one == same != other
    assert address_of("ipv4:10.0.0.1:50478") == "ipv4:10.0.0.1"
    assert address_of("unix:") == "unix:"


@pytest.mark.parametrize(
    ("certificate", "name"),
    [
        ({"x509_subject": [b"CN=payments"], "x509_common_name": [b"payments"]}, "certificate:payments"),
        ({"x509_subject": [b"CN=payments,O=Acme"], "x509_common_name": [b"payments"]},
         "certificate-subject:CN=payments,O=Acme"),
        ({"x509_subject_alternative_name": [b"payments.example", b"spiffe://acme/payments"], "x509_subject": [b""]},
         "certificate-uri:spiffe://acme/payments"),
        ({"x509_pem_cert": [b"pem"], "x509_subject": [b""]},
         f"certificate-sha256:{hashlib.sha256(b'pem').hexdigest()}"),
    ],
)  # fmt: skip
def test_each_certificate_has_a_name_that_is_no_others(certificate: dict[str, list[bytes]], name: str) -> None:
    caller = Authenticator().identify([], "ipv4:10.0.0.1:1", certificate)
    assert (caller.name, caller.cache_namespace) == (name, name)


def test_a_changed_file_counts_and_a_broken_one_does_not(token_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    callers = Authenticator(token_file, clock=lambda: now)
    token_file.write_text(FILE.replace("ann", "zoe"))
    assert callers.identify(bearer(ANN), "").name == "ann"  # the file was looked at a moment ago
    now = 2.0
    with pytest.raises(Unauthenticated):
        callers.identify(bearer(ANN), "")
    assert callers.identify(bearer(ANN.replace("ann", "zoe")), "").name == "zoe"
    for number, content in enumerate(("[zoe", ""), start=2):
        token_file.write_text(content)
        now = 2.0 * number
        assert callers.identify(bearer(BOB), "").name == "bob"
    token_file.unlink()
    now = 20.0
    assert callers.identify(bearer(BOB), "").name == "bob"
    assert caplog.text.count("the tokens stay as they were") == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no entry"),
        ("[ann", "not a TOML file"),
        (b"\xff\xfe", "not UTF-8"),
        ("ann = 3", "ann must be a table"),
        ("[ann]\nweight = 1", "either token or token_sha256"),
        (f'[ann]\ntoken = "{ANN}"\ntoken_sha256 = "{"0" * 64}"', "either token or token_sha256"),
        ('[ann]\ntoken = "short secret"', "ann.token"),
        ('[ann]\ntoken_sha256 = "short secret"', "ann.token_sha256"),
        (f'[ann]\ntoken = "{ANN}"\nmax_requests = 0', "ann.max_requests"),
        (f'[ann]\ntoken = "{ANN}"\nweight = nan', "ann.weight"),
        (f'[ann]\ntoken = "{ANN}"\nwieght = 2', "ann.wieght"),
        (f'[ann]\ntoken = "{ANN}"\n[bob]\ntoken = "{ANN}"', "bob has the token of ann"),
    ],
)
def test_a_wrong_token_file_is_refused_by_entry_and_not_quoted(
    tmp_path: Path, content: str | bytes, words: str
) -> None:
    path = tmp_path / "tokens.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TokenFileError) as refusal:
        TokenTable.load(path)
    assert str(path) in str(refusal.value)
    assert words in str(refusal.value)
    assert "secret" not in str(refusal.value)
    assert "quite long" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_token_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenFileError, match="cannot be read"):
        TokenTable.load(tmp_path)


def test_tokens_are_in_no_representation(token_file: Path) -> None:
    table = TokenTable.load(token_file)
    assert "quite long" not in repr(table) + repr(vars(table)) + repr(table.caller(ANN))
