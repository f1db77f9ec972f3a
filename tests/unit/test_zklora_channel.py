"""The channel over real sockets and TLS: who may speak, what a frame is, what a bad one does."""

import contextlib
import json
import pickle
import random
import re
import socket
import ssl
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from paris_ray.artifacts import canonical_json
from paris_ray.errors import (
    ArtifactError,
    BudgetError,
    ConfigError,
    ParisError,
    ProtocolError,
    SignatureError,
    TradeError,
    VerificationError,
)
from paris_ray.identity import Identity
from paris_ray.zklora.calls import Request
from paris_ray.zklora.parties import connection as connections
from paris_ray.zklora.parties.channel import Channel
from paris_ray.zklora.parties.connection import WIRE
from paris_ray.zklora.parties.frames import (
    ConnectionLost,
    Limits,
    Message,
    Sizes,
    encode,
    read_message,
)
from paris_ray.zklora.parties.server import Server
from paris_ray.zklora.sessions import SessionJournal
from tests.frames import decode

SMALL = Sizes(header_bytes=2000, frame_bytes=5000)
HASTY = Limits(handshake_s=0.5, idle_s=0.5, frame_s=0.5)
TENSORS = {
    "x": np.arange(-6, 6, dtype=np.int16).reshape(3, 4),
    "y": np.array([[2**62, -(2**63)]]),
    "proof": np.frombuffer(b"\x00\xff\x07", np.uint8),
    "loss": np.array(0.25, np.float32),
    "none": np.zeros((0, 5), np.int64),
}
MESSAGE = Message("call", {"seq": 3, "module": "blocks.0.attn", "scale": 0.5}, TENSORS)


def frame(header: object, payload: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else canonical_json(header)
    return len(raw).to_bytes(4, "big") + raw + payload


def header(**change: object) -> dict:
    return {"kind": "k", "n": 1, "fields": {}, "tensors": []} | change


def tensor(**change: object) -> dict:
    return {"name": "x", "dtype": "int16", "shape": [2]} | change


def assert_equal(one: Message, other: Message) -> None:
    assert (one.kind, one.fields) == (other.kind, other.fields)
    assert list(one.tensors) == list(other.tensors)
    for name, values in one.tensors.items():
        assert values.dtype == other.tensors[name].dtype
        np.testing.assert_array_equal(values, other.tensors[name], strict=True)


def test_a_frame_is_what_it_was_made_of():
    encoded = encode(MESSAGE, 7)
    n, message = decode(encoded)
    assert n == 7
    assert_equal(message, MESSAGE)
    message.tensors["x"][0, 0] = 1  # the receiver's own memory
    size = int.from_bytes(encoded[:4], "big")
    assert json.loads(encoded[4 : 4 + size])["tensors"][0] == {
        "name": "x",
        "dtype": "int16",
        "shape": [3, 4],
    }
    assert encoded[4 + size :][:24] == struct.pack("<12h", *range(-6, 6))


def test_layout_in_memory_is_not_seen_in_a_frame():
    x = TENSORS["x"]
    for same in (x.astype(">i2"), np.asfortranarray(x), np.repeat(x, 2, axis=0)[::2]):
        assert encode(Message("k", {}, {"x": same}), 1) == encode(Message("k", {}, {"x": x}), 1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"", "4 bytes too early"),
        (b"\0\0", "2 bytes too early"),
        (frame(header())[:-1], "1 bytes too early"),
        (frame(header()) + b"x", "1 bytes follow"),
        (frame(header(tensors=[tensor()]), b"123"), "1 bytes too early"),
        (frame(header(tensors=[tensor()]), b"12345"), "1 bytes follow"),
        (pickle.dumps({"kind": "k"}), "a header of"),
        (frame(pickle.dumps({"kind": "k"})), "is not JSON"),
        (b"\xff\xff\xff\xff" + b"0" * 9, "a header of 4294967295 bytes is not allowed"),
        (frame(b""), "is not JSON"),
        (frame(b"\xff\xfe"), "is not JSON"),
        (frame(b"[" * 1900), "is not JSON"),
        (frame(b'{"kind":"k","fields":{},"n":1,"tensors":[]}'), "not canonical"),
        (frame(b'{"fields":{},"fields":{},"kind":"k","n":1,"tensors":[]}'), "not canonical"),
        (frame(b'{"fields":{"a":NaN},"kind":"k","n":1,"tensors":[]}'), "is not JSON"),
        (frame(b'{"fields":{"a":1e999},"kind":"k","n":1,"tensors":[]}'), "is not JSON"),
        (frame(b'{"fields":{"a":' + b"9" * 1900 + b'},"kind":"k","n":1}'), "keys"),
        (frame([]), "keys"),
        (frame(header(more=1)), "keys"),
        (frame({"kind": "k"}), "keys"),
        (frame(header(kind=1)), "kind"),
        (frame(header(n=0)), "the n in"),
        (frame(header(n=-1)), "the n in"),
        (frame(header(n=True)), "the n in"),
        (frame(header(n=1.0)), "the n in"),
        (frame(header(n=2**63)), "the n in"),
        (frame(header(fields=[])), "fields"),
        (frame(header(tensors={})), "tensors"),
        (frame(header(tensors=[1])), "tensors"),
        (frame(header(tensors=[tensor(more=1)])), "tensors"),
        (frame(header(tensors=[tensor(name=1)])), "name of a tensor"),
        (frame(header(tensors=[tensor(), tensor()]), b"12341234"), "names of tensors"),
        (frame(header(tensors=[tensor(dtype="object")])), "dtype of tensor 'x'"),
        (frame(header(tensors=[tensor(dtype="float64")])), "dtype of tensor 'x'"),
        (frame(header(tensors=[tensor(dtype="<i2")])), "dtype of tensor 'x'"),
        (frame(header(tensors=[tensor(dtype=["int16"])])), "dtype of tensor 'x'"),
        (frame(header(tensors=[tensor(shape=2)])), "shape of tensor 'x'"),
        (frame(header(tensors=[tensor(shape=[-1])])), "shape of tensor 'x'"),
        (frame(header(tensors=[tensor(shape=[True])])), "shape of tensor 'x'"),
        (frame(header(tensors=[tensor(shape=[2.0])])), "shape of tensor 'x'"),
        (frame(header(tensors=[tensor(shape=[1] * 5)])), "shape of tensor 'x'"),
        (frame(header(tensors=[tensor(shape=[2**62, 2**62])])), "shape of tensor 'x'"),
        (frame(header(tensors=[tensor(shape=[0, 2**62, 2**62])])), "shape of tensor 'x'"),
        (frame(header(tensors=[tensor(shape=[3000])]), b"0" * 6000), "a frame of 60"),
        (frame(header(fields={"a": "a" * 2000})), "a header of 20"),
    ],
)
def test_what_is_no_frame_is_refused(bad: bytes, message: str):
    with pytest.raises(ProtocolError, match=message):
        decode(bad, SMALL)


def test_no_memory_is_taken_for_what_is_too_large():
    asked = []

    def read(size: int) -> bytearray:
        asked.append(size)
        return bytearray(canonical_json(header(tensors=[tensor(name="y", shape=[2**27])])))

    small = Sizes(of_kinds={"other": 2**30}, frame_bytes=1000)
    length = len(read(0)).to_bytes(4, "big")
    with pytest.raises(ProtocolError, match="shape of tensor 'y'"):
        read_message(length, read, small)
    with pytest.raises(ProtocolError, match="a frame of 268"):
        read_message(length, read)
    with pytest.raises(ProtocolError, match="a header of"):
        read_message(b"\x00\x10\x00\x01", read)
    assert max(asked) < 100


@pytest.mark.parametrize(
    "message",
    [
        Message("k", {}, {"x": np.zeros(2)}),
        Message("k", {}, {"x": np.array([object()])}),
        Message("k", {}, {"x": np.zeros(3000, np.int16)}),
        Message("k", {"a": "a" * 2000}),
        Message("k", {}, {"x": np.zeros((1,) * 5, np.int16)}),
    ],
)
def test_what_no_peer_would_take_is_not_sent(message: Message):
    with pytest.raises(ProtocolError, match="is not allowed"):
        encode(message, 1, SMALL)


def test_kinds_may_have_sizes_of_their_own():
    sizes = Sizes(frame_bytes=1000, of_kinds={"large": 5000})
    large = Message("large", {}, {"x": np.zeros(2000, np.int16)})
    n, message = decode(encode(large, 3, sizes), sizes)
    assert n == 3
    assert_equal(message, large)
    small = Message("small", {}, {"x": np.zeros(490, np.int16)})
    with pytest.raises(ProtocolError, match=r"a frame of 10\d\d bytes .* at most 1000"):
        decode(encode(small, 3), sizes)
    with pytest.raises(ProtocolError, match="shape of tensor 'x'"):
        encode(Message("small", {}, large.tensors), 1, sizes)


def test_mutated_frames_are_refused_or_mean_exactly_what_they_say():
    good = encode(MESSAGE, 7)
    draw = random.Random(0)
    accepted = 0
    for _ in range(3000):
        mutated = bytearray(good)
        mutated[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        if draw.random() < 0.2:
            del mutated[draw.randrange(len(mutated)) :]
        with contextlib.suppress(ProtocolError):
            n, message = decode(bytes(mutated))
            assert encode(message, n) == mutated != good
            accepted += 1
    assert 0 < accepted < 3000


# --- over sockets ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    folder = tmp_path_factory.mktemp("parties")
    return {name: Identity.create(folder / name) for name in ("server", "client", "stranger")}


def echo(caller: str, message: Message) -> Message:
    return Message(message.kind, {**message.fields, "who": caller}, message.tensors)


@contextlib.contextmanager
def running(
    parties: dict[str, Identity],
    handler: Callable[[str, Message], Message] = echo,
    port: int = 0,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    clients: tuple[str, ...] = ("client",),
) -> Iterator[Server]:
    pinned = [parties[name].certificate for name in clients]
    with Server(parties["server"], "127.0.0.1", port, pinned, handler, limits) as server:
        yield server


def channel(parties: dict[str, Identity], server: Server, **options: object) -> Channel:
    return Channel(parties["client"], server.address, parties["server"].certificate, 20, **options)


def raw(identity: Identity | None, server: Server, **options: object) -> ssl.SSLSocket:
    """Return a connection that trusts anybody and speaks as we tell it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([WIRE])
    for name, value in options.items():
        setattr(context, name, value)
    if identity is not None:
        context.load_cert_chain(identity.folder / "certificate.pem", identity.folder / "key.pem")
    return context.wrap_socket(socket.create_connection(server.address, 20))


def is_closed(connection: socket.socket) -> bool:
    """Wait for the other side; whether it closes without a word."""
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        raise
    except OSError:
        return True


def test_requests_are_answered_with_the_identity_of_who_asked(parties: dict):
    with running(parties) as server, channel(parties, server) as client:
        for _ in range(3):
            answer = client.request("call", MESSAGE.fields, TENSORS)
            who = {"who": parties["client"].public_key}
            assert_equal(answer, Message("call", {**MESSAGE.fields, **who}, TENSORS))
        assert client.request("empty").tensors == {}
        assert client.traffic.bytes_sent > 3 * 64
        assert client.traffic.bytes_received > client.traffic.bytes_sent


@pytest.mark.parametrize("theirs", ["paris_ray-zklora/1", "paris_ray-zklora/999", "h2"])
def test_who_speaks_otherwise_is_refused_before_anything_is_asked(
    parties: dict, monkeypatch: pytest.MonkeyPatch, theirs: str
):
    heard: list[str] = []

    def answer(caller: str, message: Message) -> Message:
        heard.append(message.kind)
        return Message("k")

    with running(parties, answer) as server:
        monkeypatch.setattr(connections, "WIRE", theirs)
        with (
            channel(parties, server, attempts=1) as other,
            pytest.raises(ParisError, match=f"does not speak {theirs}: both need"),
        ):
            other.request("k")
        monkeypatch.undo()
        assert heard == []
        with channel(parties, server) as ours:
            assert ours.request("k").kind == "k"


def test_who_says_nothing_of_how_it_speaks_is_refused(parties: dict):
    """As a release does that knows of no such thing."""
    with running(parties) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        folder = parties["client"].folder
        context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
        with context.wrap_socket(socket.create_connection(server.address, 20)) as connection:
            connection.sendall(frame(header()))
            assert is_closed(connection)


def test_words_that_an_error_quotes_can_be_sent(parties: dict):
    """Half a surrogate pair is no UTF-8, and an escape would steer a terminal."""

    def answer(caller: str, message: Message) -> Message:
        raise ProtocolError(f"no module {message.fields['modules'][0]}")

    with (
        running(parties, answer) as server,
        channel(parties, server) as client,
        pytest.raises(ProtocolError, match=r"^no module \?\?\[2J$"),
    ):
        client.request("call", {"modules": ["\ud800\x1b[2J"]})


def test_large_tensors_pass(parties: dict):
    x = np.arange(2**20, dtype=np.int64).reshape(2**10, -1)
    with running(parties) as server, channel(parties, server) as client:
        np.testing.assert_array_equal(client.request("k", {}, {"x": x}).tensors["x"], x)


def test_a_request_may_be_smaller_than_an_answer(parties: dict):
    limits = Limits(requests=Sizes(frame_bytes=1000))
    y, heard = np.zeros(5000, np.uint8), []

    def answer(caller: str, message: Message) -> Message:
        heard.append(message.kind)
        return Message("k", {}, {"y": y})

    with running(parties, answer, limits=limits) as server:
        with channel(parties, server, limits=limits) as client:
            assert client.request("fine").tensors["y"].shape == (5000,)
            with pytest.raises(ProtocolError, match=r"a frame of 10\d\d bytes .* at most 1000"):
                client.request("large", {}, {"x": y[:950]})
            assert client.request("again").kind == "k"
        with (  # who does not keep to it is not heard
            channel(parties, server, attempts=1) as rude,
            pytest.raises(ConnectionLost),
        ):
            rude.request("large", {}, {"x": y[:950]})
    assert heard == ["fine", "again"]


def test_memory_is_taken_as_bytes_arrive(parties: dict):
    announced = frame(header(tensors=[tensor(dtype="uint8", shape=[2**24 - 1000])]))
    with running(parties) as server, raw(parties["client"], server) as connection:
        tracemalloc.start()
        try:
            connection.sendall(announced + bytes(1000))
            socket.socket.shutdown(connection, socket.SHUT_WR)
            assert is_closed(connection)
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert most < 2**20


@pytest.mark.parametrize(
    "error", [ParisError, ProtocolError, BudgetError, SignatureError, VerificationError, TradeError]
)
def test_errors_of_the_protocol_travel(parties: dict, error: type[ParisError]):
    def fail(caller: str, message: Message) -> Message:
        raise error("blocks.0 has 3 rows left\x1b[2J")

    with running(parties, fail) as server, channel(parties, server) as client:
        for _ in range(2):
            with pytest.raises(ParisError, match=r"^blocks.0 has 3 rows left\?\[2J$") as caught:
                client.request("call")
            assert type(caught.value) is error


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("secret"),
        ArtifactError("/home/secret is missing"),
        KeyError("secret"),
        type("BudgetError", (Exception,), {})("secret"),
    ],
)
def test_errors_of_our_own_do_not_travel(
    parties: dict, error: Exception, caplog: pytest.LogCaptureFixture
):
    def fail(caller: str, message: Message) -> Message:
        if message.kind == "fail":
            raise error
        return message

    with running(parties, fail) as server, channel(parties, server) as client:
        with pytest.raises(ProtocolError, match=r"^internal error$"):
            client.request("fail")
        assert client.request("fine").kind == "fine"
    assert "secret" in caplog.text and "Traceback" in caplog.text


def test_an_answer_that_cannot_be_sent_is_an_internal_error(parties: dict):
    with (
        running(parties, lambda *_: Message("k", {"a": object()})) as server,
        channel(parties, server) as client,
        pytest.raises(ProtocolError, match=r"^internal error$"),
    ):
        client.request("k")


def certify(
    folder: Path,
    key: Ed25519PrivateKey,
    name: str,
    issuer: tuple[str, Ed25519PrivateKey],
    *,
    authority: bool = False,
) -> Identity:
    """Return who has a certificate that somebody else issued."""

    def common_name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(common_name(name))
        .issuer_name(common_name(issuer[0]))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .sign(issuer[1], None)
    )
    folder.mkdir()
    pem = certificate.public_bytes(Encoding.PEM)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "certificate.pem").write_bytes(pem)
    (folder / "key.pem").write_bytes(private)
    return Identity(folder, pem.decode(), key)


def name_and_key(identity: Identity) -> tuple[str, Ed25519PrivateKey]:
    certificate = x509.load_pem_x509_certificate(identity.certificate.encode())
    key = load_pem_private_key((identity.folder / "key.pem").read_bytes(), None)
    assert isinstance(key, Ed25519PrivateKey)
    common_name = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(common_name[0].value), key


def test_only_pinned_clients_are_heard(parties: dict, tmp_path: Path):
    heard = []

    def listen(caller: str, message: Message) -> Message:
        heard.append(caller)
        return message

    client, new_key = parties["client"], Ed25519PrivateKey.generate()
    name, client_key = issuer = name_and_key(client)
    impostors = [
        None,
        parties["stranger"],
        parties["server"],
        certify(tmp_path / "child", new_key, "child", issuer),
        certify(tmp_path / "namesake", new_key, name, issuer),
        certify(tmp_path / "self", new_key, name, (name, new_key)),
        certify(tmp_path / "renewed", client_key, name, issuer),  # the key, but nobody pinned this
    ]
    with running(parties, listen) as server:
        for impostor in impostors:
            with contextlib.suppress(OSError), raw(impostor, server) as connection:
                connection.sendall(frame(header()))
                assert is_closed(connection)
        with channel(parties, server) as client_channel:
            client_channel.request("k")
        assert heard == [client.public_key]
        with (
            Channel(parties["stranger"], server.address, parties["server"].certificate) as stranger,
            pytest.raises(ConnectionLost),
        ):
            stranger.request("k")
    assert len(heard) == 1


def test_what_openssl_would_accept_is_compared_with_the_pinned_bytes(parties: dict, tmp_path: Path):
    key, authority_key = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    issuer = ("authority", authority_key)
    authority = certify(tmp_path / "root", authority_key, "authority", issuer, authority=True)
    child = certify(tmp_path / "child", key, "child", issuer)
    with pytest.raises(SignatureError, match="authority"):
        Server(parties["server"], "127.0.0.1", 0, [authority.certificate], echo)
    root = str(authority.folder / "certificate.pem")
    with running(parties) as server:
        server._context.load_verify_locations(root)
        with raw(child, server) as connection:
            connection.sendall(frame(header()))
            assert is_closed(connection)
    # `channel` pins the server's usual certificate.
    with running({**parties, "server": child}) as server, channel(parties, server) as client:
        client._context.load_verify_locations(root)
        with pytest.raises(ProtocolError, match="another certificate than the pinned one"):
            client.request("k")


def test_only_the_pinned_server_is_spoken_to(parties: dict):
    wrong = parties["stranger"].certificate
    with running(parties) as server:
        with (
            Channel(parties["client"], server.address, wrong) as misled,
            pytest.raises(ProtocolError, match="is not the pinned server") as caught,
        ):
            misled.request("k")
        assert not isinstance(caught.value, ConnectionLost)
    with (
        channel(parties, server, attempts=1) as client,
        pytest.raises(ConnectionLost, match="cannot be reached"),
    ):
        client.request("k")


def refusal(address: tuple[str, int]) -> str:
    question = "does it have your certificate.pem among its clients?"
    return re.escape(f"{address[0]}:{address[1]} ended the connection: {question}") + "$"


def test_who_is_not_among_the_clients_is_told(parties: dict):
    with running(parties) as server:
        address, pinned = server.address, parties["server"].certificate
        for _ in range(5):  # whatever TLS sees first: the alert, the end, a broken pipe
            with (
                Channel(parties["stranger"], address, pinned, attempts=1) as stranger,
                pytest.raises(ConnectionLost, match=refusal(address)),
            ):
                stranger.request("k")
    with socket.create_server(("127.0.0.1", 0)) as listener:  # ends the handshake
        closing = threading.Thread(target=lambda: listener.accept()[0].close())
        closing.start()
        with (
            Channel(parties["client"], listener.getsockname(), pinned, attempts=1) as client,
            pytest.raises(ConnectionLost, match=refusal(listener.getsockname())),
        ):
            client.request("k")
        closing.join()


def test_who_was_answered_is_not_told_to_show_a_certificate(parties: dict):
    with running(parties) as server, channel(parties, server, attempts=1) as client:
        client.request("k")
        server.close()
        with pytest.raises(ConnectionLost, match=r"the other side closed|connection broke"):
            client.request("k")


def test_a_slow_answer_is_no_refusal(parties: dict):
    asked = threading.Event()
    pinned = parties["server"].certificate
    with (
        running(parties, lambda _, message: (asked.wait(20), message)[1]) as server,
        Channel(parties["client"], server.address, pinned, 0.2, attempts=1) as client,
        pytest.raises(ConnectionLost, match=r"^the other side was too slow$"),
    ):
        client.request("k")
    asked.set()


def test_a_server_needs_clients_and_a_free_port(parties: dict):
    with pytest.raises(ConfigError, match="nobody could connect"):
        Server(parties["server"], "127.0.0.1", 0, [], echo)
    with (
        running(parties) as server,
        pytest.raises(ConfigError, match="cannot be listened on"),
        running(parties, port=server.address[1]),
    ):
        pass


def test_older_tls_is_refused(parties: dict):
    with running(parties) as server, pytest.raises(OSError, match=r"(?i)protocol|version|alert"):
        raw(parties["client"], server, maximum_version=ssl.TLSVersion.TLSv1_2)


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        pickle.dumps(Path("/")),
        b"\xff" * 100,
        frame(header(tensors=[tensor(shape=[2**27])])),
        frame(header(n=0)),
        b"",
        frame(header())[:-1],
    ],
)
def test_noise_closes_its_connection_and_nothing_else(parties: dict, noise: bytes):
    with running(parties) as server, channel(parties, server) as bystander:
        bystander.request("k")
        with raw(parties["client"], server) as connection:
            connection.sendall(noise)
            socket.socket.shutdown(connection, socket.SHUT_WR)
            while not is_closed(connection):  # the answers to good frames before the noise
                pass
        with socket.create_connection(server.address, 20) as plain:
            plain.sendall(noise)
        assert bystander.request("k").kind == "k"
        with channel(parties, server) as another:
            assert another.request("k").kind == "k"


@pytest.mark.parametrize("replayed", [1, 2])
def test_a_replayed_frame_is_not_answered(parties: dict, replayed: int):
    heard = []

    def listen(caller: str, message: Message) -> Message:
        heard.append(message.kind)
        return Message("k")

    with running(parties, listen) as server, raw(parties["client"], server) as connection:
        connection.sendall(frame(header(n=2)) + frame(header(n=replayed, kind="replay")))
        answer = frame(header(n=2))
        assert connection.recv(len(answer)) == answer
        assert is_closed(connection)
    assert heard == ["k"]


@pytest.mark.parametrize("beginning", [b"", b"\0", frame(header())[:20]])
def test_who_is_slow_is_not_waited_for(parties: dict, beginning: bytes):
    with running(parties, limits=HASTY) as server:
        with raw(parties["client"], server) as connection:
            connection.sendall(beginning)
            assert is_closed(connection)
        with socket.create_connection(server.address, 20) as silent:
            assert is_closed(silent)
        with channel(parties, server) as client:
            assert client.request("k").kind == "k"


def test_dripping_bytes_does_not_prolong_a_frame(parties: dict):
    with running(parties, limits=HASTY) as server, raw(parties["client"], server) as connection:
        stop = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                for byte in frame(header(fields={"a": "a" * 1500})):
                    connection.send(bytes([byte]))
                    if stop.wait(0.05):
                        return

        dripping = threading.Thread(target=drip)
        dripping.start()
        assert is_closed(connection)  # 1500 drips would take over a minute, past our time-out
        stop.set()
        dripping.join()


def test_connections_are_counted(parties: dict):
    with running(parties, limits=Limits(connections=2)) as server:
        with channel(parties, server) as first, channel(parties, server) as second:
            first.request("k")
            second.request("k")
            with (
                channel(parties, server, attempts=1) as third,
                pytest.raises(ConnectionLost),
            ):
                third.request("k")
            assert first.request("k").kind == "k"
        with channel(parties, server, attempts=9) as fourth:
            assert fourth.request("k").kind == "k"


def test_strangers_take_no_place_of_who_is_known(parties: dict):
    limits = Limits(strangers=4, connections=2, handshake_s=600)
    with (
        running(parties, limits=limits) as server,
        channel(parties, server) as bystander,
        contextlib.ExitStack() as flood,
    ):
        bystander.request("k")
        strangers = [
            flood.enter_context(socket.create_connection(server.address, 20)) for _ in range(12)
        ]
        for _ in range(3):
            with channel(parties, server) as client:
                assert client.request("k").kind == "k"
        assert bystander.request("k").kind == "k"
        for oldest in strangers[:8]:
            assert is_closed(oldest)


def test_one_client_takes_no_place_of_another(parties: dict):
    limits = Limits(connections_a_peer=2)
    with (
        running(parties, limits=limits, clients=("client", "stranger")) as server,
        channel(parties, server) as first,
        channel(parties, server) as second,
    ):
        first.request("k")
        second.request("k")
        for _ in range(3):
            with channel(parties, server, attempts=1) as third, pytest.raises(ConnectionLost):
                third.request("k")
        with Channel(parties["stranger"], server.address, parties["server"].certificate) as other:
            assert other.request("k").fields["who"] == parties["stranger"].public_key
        assert first.request("k").kind == second.request("k").kind == "k"


def test_a_lost_connection_is_opened_again_and_the_request_repeated(parties: dict):
    calls = []

    def handler(caller: str, message: Message) -> Message:
        calls.append(message.fields["seq"])
        if len(calls) == 2:  # a restart, while this request is being answered
            server.close()
            servers.enter_context(running(parties, handler, server.address[1]))
        return message

    with contextlib.ExitStack() as servers:
        server = servers.enter_context(running(parties, handler))
        client = servers.enter_context(channel(parties, server, attempts=5))
        for seq in (0, 1, 2):
            assert client.request("call", {"seq": seq}).fields == {"seq": seq}
    assert calls == [0, 1, 1, 2]


def test_rows_whose_answer_was_lost_are_paid_once(parties: dict, tmp_path: Path):
    adapter_id, sid, user = "ad" * 32, "51" * 32, parties["client"].public_key
    journal = SessionJournal(tmp_path / "sessions.sqlite")
    journal.budget.add_adapter(adapter_id, ["m"], 10)
    journal.open_session(sid, adapter_id, user, "0a" * 32, "0c" * 32)
    requests = []

    def handler(caller: str, message: Message) -> Message:
        x, seq = message.tensors["x"], message.fields["seq"]
        (y,) = journal.record_calls(
            sid,
            caller,
            seq,
            [Request("m", 11, x)],
            lambda: [x.astype(np.int64) + len(requests)],
        )
        requests.append(seq)
        if len(requests) == 1:
            server.close()
            servers.enter_context(running(parties, handler, server.address[1]))
        return Message("answer", {}, {"y": y})

    with contextlib.ExitStack() as servers:
        server = servers.enter_context(running(parties, handler))
        client = servers.enter_context(channel(parties, server, attempts=5))
        x = np.ones((3, 2), np.int16)
        answer = client.request("call", {"seq": 0}, {"x": x})
    np.testing.assert_array_equal(answer.tensors["y"], x)  # computed at the first request
    assert requests == [0, 0] and journal.budget.rows_left(adapter_id) == {"m": 7}


def test_a_lost_connection_is_an_error_in_the_end(parties: dict):
    with running(parties) as server:
        client = channel(parties, server, attempts=2)
        client.request("k")
    with pytest.raises(ConnectionLost):
        client.request("k")


def test_an_answer_with_another_number_is_not_taken(parties: dict):
    server_identity = parties["server"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols([WIRE])
    context.load_cert_chain(
        server_identity.folder / "certificate.pem", server_identity.folder / "key.pem"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_wrongly() -> None:
            with context.wrap_socket(listener.accept()[0], server_side=True) as connection:
                connection.recv(1000)
                connection.sendall(frame(header(n=2)))
                is_closed(connection)

        thread = threading.Thread(target=answer_wrongly)
        thread.start()
        address = listener.getsockname()
        with (
            Channel(parties["client"], address, server_identity.certificate) as client,
            pytest.raises(ProtocolError, match="request 1 was answered with number 2"),
        ):
            client.request("k")
        thread.join()


def test_many_clients_and_threads_at_once(parties: dict):
    limits = Limits(connections_a_peer=13)
    with running(parties, limits=limits) as server, channel(parties, server) as shared:

        def ask(i: int) -> None:
            with channel(parties, server) as own:
                for client in (own, shared, own):
                    assert client.request("k", {"i": i}).fields["i"] == i
            done.append(i)

        done: list[int] = []
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(done) == list(range(12))
