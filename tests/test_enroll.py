"""Certificates over real connections of gRPC on the loopback, and their files."""

import contextlib
import datetime
import shutil
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from hsee_jax import cli
from hsee_jax.core import UserError
from hsee_jax.deployment import enroll as enrolment
from hsee_jax.deployment.certificates import Validity
from hsee_jax.deployment.credentials import (
    channel_credentials,
    client_id,
    server_credentials,
)
from hsee_jax.deployment.enroll import enroll

WHO = "/test/Who"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    enroll(folder, clients=3)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The keys of another CA, with the same names."""
    folder = tmp_path_factory.mktemp("other")
    enroll(folder, clients=3)
    return folder


def who(request, context):
    """Answer a message that claims an id with the id of the certificate."""
    try:
        i = client_id(context.auth_context())
    except PermissionError as error:
        context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
    if int(request) != i:
        context.abort(grpc.StatusCode.PERMISSION_DENIED, f"the certificate says {i}")
    return str(i).encode()


@contextlib.contextmanager
def serve(folder):
    """Serve with the keys of a folder, and yield the address."""
    server = grpc.server(ThreadPoolExecutor(2))
    handler = grpc.unary_unary_rpc_method_handler(who)
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("test", {"Who": handler})]
    )
    port = server.add_secure_port("127.0.0.1:0", server_credentials(folder))
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.fixture(scope="module")
def address(keys):
    with serve(keys / "server") as address:
        yield address


def call(address, credentials, claim):
    with grpc.secure_channel(address, credentials) as channel:
        return channel.unary_unary(WHO)(str(claim).encode(), timeout=20)


def refusal(address, credentials, claim=0):
    with pytest.raises(grpc.RpcError) as caught:
        call(address, credentials, claim)
    return caught.value.code().name


@pytest.mark.parametrize("i", [0, 2])
def test_the_server_learns_the_id_from_the_certificate(keys, address, i):
    assert call(address, channel_credentials(keys / f"client-{i}"), i) == b"%d" % i


def test_a_client_cannot_claim_the_id_of_another(keys, address):
    credentials = channel_credentials(keys / "client-2")
    assert refusal(address, credentials, 1) == "PERMISSION_DENIED"


def mixed(folder, *, ca, own):
    """Write a folder with the CA of one enrolment and the certificate of another."""
    shutil.copytree(own, folder)
    shutil.copy(ca / "ca.pem", folder)
    return folder


def test_another_ca_is_refused_by_both_sides(keys, other, address, tmp_path):
    assert refusal(address, channel_credentials(other / "client-0")) == "UNAVAILABLE"
    trusting = mixed(tmp_path / "a", ca=keys, own=other / "client-0")
    assert refusal(address, channel_credentials(trusting)) == "UNAVAILABLE"
    doubting = mixed(tmp_path / "b", ca=other, own=keys / "client-0")
    assert refusal(address, channel_credentials(doubting)) == "UNAVAILABLE"


@pytest.mark.parametrize("side", [server_credentials, channel_credentials])
@pytest.mark.parametrize("damaged", ["another", "cut off"])
def test_a_key_of_another_certificate_is_refused(keys, tmp_path, side, damaged):
    folder = tmp_path / "own"
    shutil.copytree(keys / "client-0", folder)
    key = (keys / "client-1" / "key.pem").read_bytes()
    (folder / "key.pem").write_bytes(key if damaged == "another" else key[:120])
    with pytest.raises(UserError, match="key.pem is not the key of certificate") as one:
        side(folder)
    assert "\n" not in str(one.value)


def test_a_client_without_a_certificate_is_refused(keys, address):
    bare = grpc.ssl_channel_credentials((keys / "ca.pem").read_bytes())
    assert refusal(address, bare) == "UNAVAILABLE"


def test_certificates_serve_one_side_only(keys, address):
    """A client cannot pose as the server, and the server is no client."""
    assert refusal(address, channel_credentials(keys / "server")) == "UNAVAILABLE"
    with serve(keys / "client-1") as false:
        credentials = channel_credentials(keys / "client-0")
        assert refusal(false, credentials) == "UNAVAILABLE"


def test_expired_certificates_are_refused(keys, address, tmp_path, monkeypatch):
    late = tmp_path / "keys"
    shutil.copytree(keys, late)
    end = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=1)
    over = Validity(end - datetime.timedelta(days=9), end)
    monkeypatch.setattr(enrolment, "validity", lambda days: over)
    enroll(late, clients=1, renew=True)
    assert refusal(address, channel_credentials(late / "client-0")) == "UNAVAILABLE"
    with serve(late / "server") as expired:
        credentials = channel_credentials(keys / "client-0")
        assert refusal(expired, credentials) == "UNAVAILABLE"


def test_a_server_is_known_by_its_names_only(keys, tmp_path):
    shutil.copytree(keys, tmp_path / "keys")
    enroll(tmp_path / "keys", clients=1, hosts=["server.example.org"], renew=True)
    with serve(tmp_path / "keys/server") as elsewhere:
        credentials = channel_credentials(keys / "client-0")
        assert refusal(elsewhere, credentials) == "UNAVAILABLE"


@pytest.mark.parametrize(
    "names",
    [(), (b"server",), (b"client-01",), (b"client-1 ",), (b"client-1", b"client-2")],
)
def test_other_names_are_no_clients(names):
    with pytest.raises(PermissionError, match="names no client"):
        client_id({"x509_common_name": names})


def load(folder):
    return x509.load_pem_x509_certificate((folder / "certificate.pem").read_bytes())


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_command_writes_what_is_missing(tmp_path, capsys):
    keys = tmp_path / "keys"
    assert cli.main(["enroll", str(keys), "--clients", "2", "--days", "30"]) == 0
    lines = [str(keys / name) for name in ("server", "client-0", "client-1")]
    assert capsys.readouterr().out.splitlines() == lines
    before = contents(keys)
    assert len(before) == 2 + 3 * 3
    for path in before:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    left = load(keys / "client-1").not_valid_after_utc - datetime.datetime.now(
        datetime.UTC
    )
    assert 29 <= left.days <= 30

    assert cli.main(["enroll", str(keys), "--clients", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(keys / "client-2")]
    after = contents(keys)
    assert {path: after[path] for path in before} == before
    with serve(keys / "server") as address:
        assert call(address, channel_credentials(keys / "client-2"), 2) == b"2"

    words = ["--clients", "3", "--host", "127.0.0.1", "localhost"]  # in any order
    assert cli.main(["enroll", str(keys), *words]) == 0
    assert capsys.readouterr().out == f"{keys} lacks nothing\n"
    assert contents(keys) == after


def test_renewal_keeps_the_ca_and_the_hosts(tmp_path, capsys):
    keys = tmp_path / "keys"
    hosts = ["server.example.org", "192.0.2.7", "::1"]
    enroll(keys, clients=1, hosts=hosts)
    before = contents(keys)
    assert cli.main(["enroll", str(keys), "--clients", "1", "--renew"]) == 0
    after = contents(keys)
    same = {path.relative_to(keys) for path in before if before[path] == after[path]}
    assert {str(path) for path in same} == {
        "ca.pem",
        "ca-key.pem",
        "server/ca.pem",
        "client-0/ca.pem",
    }
    names = load(keys / "server").extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert [str(name.value) for name in names.value] == hosts
    enroll(keys, clients=3)
    before = contents(keys)
    enroll(keys, clients=1, renew=True)  # replaces those of more clients, too
    after = contents(keys)
    key = keys / "client-2" / "key.pem"
    assert before.keys() == after.keys() and before[key] != after[key]


def test_renewal_leaves_what_is_no_client(tmp_path):
    enroll(tmp_path, clients=1)
    (tmp_path / "client-0.tar.gz").write_text("an archive")
    (tmp_path / "client-0.bak").mkdir()
    (tmp_path / "client-7").write_text("a file")
    (tmp_path / "client-01").mkdir()
    written = enroll(tmp_path, clients=1, renew=True)
    assert [path.name for path in written] == ["server", "client-0"]
    assert (tmp_path / "client-0.tar.gz").read_text() == "an archive"
    assert not any((tmp_path / "client-0.bak").iterdir())


def test_a_certificate_names_its_subject_and_purpose(keys):
    purposes = {"server": "SERVER_AUTH", "client-1": "CLIENT_AUTH"}
    for name, purpose in purposes.items():
        certificate = load(keys / name)
        assert certificate.subject.rfc4514_string() == f"CN={name}"
        use = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
        assert list(use.value) == [getattr(ExtendedKeyUsageOID, purpose)]


def test_an_interrupted_enrolment_goes_on(tmp_path, monkeypatch):
    """A kill before any folder leaves no half of it, and the key of the CA stays."""
    keys = tmp_path / "keys"
    monkeypatch.setattr(Path, "rename", fail_at("ca.pem", Path.rename))
    with pytest.raises(KeyboardInterrupt):
        enroll(keys, clients=1)
    monkeypatch.undo()
    key = (keys / "ca-key.pem").read_bytes()
    monkeypatch.setattr(Path, "rename", fail_at("client-0", Path.rename))
    with pytest.raises(KeyboardInterrupt):
        enroll(keys, clients=1)
    monkeypatch.undo()
    assert (keys / "ca-key.pem").read_bytes() == key
    assert not (keys / "client-0").exists()
    assert enroll(keys, clients=1) == [keys / "client-0"]
    with serve(keys / "server") as address:
        assert call(address, channel_credentials(keys / "client-0"), 0) == b"0"


def fail_at(name, rename):
    def rename_or_stop(source, target):
        if Path(target).name == name and Path(target).parent.name == "keys":
            raise KeyboardInterrupt
        return rename(source, target)

    return rename_or_stop


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--clients 0", "clients: 0 is not allowed; allowed is 1 or more"),
        ("--clients 1 --days 0", "days: 0 is not allowed; allowed is 1 or more"),
        ("--clients 1 --days 4000", "days: 4000 is not allowed, as the CA expires on"),
        ("--clients 1 --host a:7443", "host: 'a:7443' is not allowed"),
        ("--clients 1 --host a.example", "localhost 127.0.0.1; allowed are these, or"),
    ],
)
def test_what_is_not_allowed_is_one_line(keys, capsys, flags, line):
    before = contents(keys)
    assert cli.main(["enroll", str(keys), *flags.split()]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and line in err
    assert contents(keys) == before


def test_days_beyond_a_new_ca_leave_nothing(tmp_path, capsys):
    words = ["--clients", "1", "--days", "9999"]
    assert cli.main(["enroll", str(tmp_path / "keys"), *words]) == 2
    assert "days: 9999 is not allowed, as the CA" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def damage(keys, kind, other):
    if kind == "no key":
        (keys / "ca-key.pem").unlink()
    elif kind == "no CA":
        (keys / "ca.pem").unlink()
    elif kind == "another key":
        shutil.copy(other / "ca-key.pem", keys)
    elif kind == "no host":
        shutil.copy(keys / "client-0" / "certificate.pem", keys / "server")
    else:
        (keys / f"{kind}.pem").write_text("nothing")


@pytest.mark.parametrize(
    "kind, line",
    [
        ("no key", "ca-key.pem cannot be read or written: No such file"),
        ("no CA", "ca.pem is missing; allowed is"),
        ("another key", "ca-key.pem is not the key of"),
        ("ca", "ca.pem holds no certificate"),
        ("ca-key", "ca-key.pem holds no private key"),
        ("no host", "certificate.pem names no host, so it is not the"),
    ],
)
def test_a_damaged_ca_signs_nothing(keys, other, tmp_path, kind, line):
    shutil.copytree(keys, tmp_path / "keys")
    damage(tmp_path / "keys", kind, other)
    before = contents(tmp_path / "keys")
    with pytest.raises(UserError, match=line):
        enroll(tmp_path / "keys", clients=5)
    assert contents(tmp_path / "keys") == before


def test_an_expired_ca_signs_nothing(tmp_path, monkeypatch):
    now = datetime.datetime.now(datetime.UTC)
    over = Validity(now - datetime.timedelta(days=9), now)
    monkeypatch.setattr(enrolment, "validity", lambda days: over)
    with pytest.raises(UserError, match="keys: the CA expires on .*a new folder"):
        enroll(tmp_path, clients=1)


@pytest.mark.parametrize("make", [server_credentials, channel_credentials])
def test_credentials_need_the_files(keys, tmp_path, make):
    with pytest.raises(UserError, match=r"keys: .*ca\.pem cannot be read: No such"):
        make(tmp_path)
    shutil.copytree(keys / "client-0", tmp_path / "own")
    shutil.copy(keys / "ca.pem", tmp_path / "own/key.pem")
    with pytest.raises(UserError, match=r"keys: .*key\.pem holds no private key"):
        make(tmp_path / "own")


def test_the_command_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "hsee_jax.deployment.enroll", None)
    assert cli.main(["enroll", "keys", "--clients", "1"]) == 2
    assert "pip install 'hsee-jax[grpc]'" in capsys.readouterr().err
