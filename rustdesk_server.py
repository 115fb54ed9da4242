#!/usr/bin/env python3
# Copyright (c) 2026 the authors of rustdesk_server.py
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this
# software and associated documentation files (the "Software"), to deal in the Software
# without restriction, including without limitation the rights to use, copy, modify,
# merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
# permit persons to whom the Software is furnished to do so, subject to the following
# conditions:
#
# The above copyright notice and this permission notice shall be included in all copies
# or substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED,
# INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A
# PARTICULAR PURPOSE AND NONINFRINGEMENT.  IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT
# HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF
# CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE
# OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""A RustDesk-compatible ID (rendezvous) server and relay in one file.

    python3 rustdesk_server.py          both roles, on the standard ports
    python3 rustdesk_server.py hbbs     the ID server alone
    python3 rustdesk_server.py hbbr     the relay alone

It needs Python 3.9 and nothing else; PyNaCl, where it is installed, signs faster.

The life of one connection, in ten lines:

 1. A `StreamListener` accepts it; a `Connection` waits for its first bytes.
 2. They tell the transport: a proxy's header, TLS, HTTP that becomes a
    WebSocket, RustDesk frames, or (from this machine, on two of the ports) an
    operator's text command.  Behind a header or TLS it begins again.
 3. A framing cuts the bytes into frames; the server decodes each into a message.
 4. `ACCEPTS` names the handler of that message on that listener, or there is none.
 5. The handler, a pure generator of `Rendezvous` or `Relay`, checks, changes its
    state, and yields actions: send this, close that, store this record.
 6. `Server.perform` carries the actions out once the handler has finished.
 7. Records to be stored are written before the answers that depend on them leave.
 8. An ID server's link is answered and ends; a relay's link waits for its partner.
 9. Two paired links become a `Pipe` or a `Translation` each way, which move bytes and
    know nothing of messages any more.
10. Every ending is one word, one log line and one counter.

The sections, each using only those above it (its last banner line says which):

     1 Constants             8 Configuration        15 Status
     2 Refusals              9 Limits               16 Event loop
     3 Wire format          10 Peer store           17 Connections
     4 Messages             11 Attempts             18 Server
     5 Frames and addresses 12 Actions              19 Maintenance
     6 WebSocket and HTTP   13 Rendezvous           20 Doctor
     7 Keys                 14 Relay                21 Command line

Sections 3 to 15 do no input or output but reading and writing their own files (7, 8,
10): no sockets, no clock, no randomness.  `grep -n '^# ==' rustdesk_server.py` prints
the map.
"""

import os
import sys

#: Where a file without a name can be run from.
DESCRIPTORS = "/proc/self/fd/"


def start_again(code):
    """Start this program again from its own byte code.

    Compiling a file of this size leaves 20 MB behind that nothing gives back.
    The code is put into a file without a name, so nothing is written to the
    disk, and nobody can change what is run.  Where that cannot be (it takes
    Linux, and /proc) the program goes on as it is.
    """
    import importlib.util
    import marshal

    try:
        with open("/proc/self/cmdline", "rb") as file:
            words = file.read().split(b"\0")[:-1]
        descriptor = os.memfd_create("rustdesk_server", 0)
        header = importlib.util.MAGIC_NUMBER + bytes(12)
        with open(descriptor, "wb", closefd=False) as file:
            file.write(header + marshal.dumps(code))
        ours = words.index(os.fsencode(sys.argv[0]))
        if {b"-c", b"-m"}.intersection(words[1:ours]):
            return  # a profiler or the like runs us
        words[ours] = f"{DESCRIPTORS}{descriptor}".encode()
        words[1:1] = b"-X", b"rustdesk_server.py"  # for who looks for it with ps
        os.execv(sys.executable, words)
    except (OSError, AttributeError, ValueError, TypeError):
        pass


if __name__ == "__main__":  # before anything of the file is run, and so run twice
    if sys.argv[0].startswith(DESCRIPTORS):
        os.close(int(sys.argv[0][len(DESCRIPTORS):]))
    elif sys.implementation.name == "cpython" and (
            sys.argv[1:2] in ([], ["hbbs"], ["hbbr"]) or sys.argv[1].startswith("-")):
        start_again(sys._getframe().f_code)

import argparse
import base64
import binascii
import collections
import contextlib
import enum
import errno
import functools
import gc
import ipaddress
import itertools
import heapq
import json
import re
import select
import selectors
import signal
import socket
import struct
import threading
import time

# OpenSSL would cost 3.5 MB of memory here, only for hashes that CPython has by
# itself; both modules do without it where it is missing, so for them it is.
if sys.implementation.name == "cpython":
    sys.modules.setdefault("_hashlib", None)
import hashlib
import hmac

if sys.modules.get("_hashlib", "") is None:
    del sys.modules["_hashlib"]

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None
try:
    import nacl.bindings as nacl_bindings
    from nacl.exceptions import CryptoError
except ImportError:  # the built-in Ed25519 of section 7 does its work
    nacl_bindings = None

# == 1. Constants ==============================================================
#
# Ports, times and sizes, each with its unit in the name and its reason beside
# it.  "Clients" are RustDesk's own programs, as released up to version 1.5.
#
# Uses: nothing.

VERSION = "0.1.0"

#: The ID server's main port, UDP and TCP; clients derive the others from it:
#: one below for the NAT test and online queries, one above for the relay, two
#: above for WebSocket, two below for the web API that we don't have.
RENDEZVOUS_PORT = 21116
RELAY_PORT = 21117
STATUS_PORT = 21120
API_OFFSET = -2
NAT_TEST_OFFSET = -1
RELAY_OFFSET = 1
WEBSOCKET_OFFSET = 2

#: A peer not heard of for this long is offline.  Clients register every 15 s
#: and then retry every 3 s, so four lost datagrams still leave it online.
REGISTRATION_TTL_SECONDS = 30.0

#: A client waits at most 36 s for the other side's answer (versions 1.1.8 to
#: 1.4.0; later ones 18 s), asking again meanwhile.
AWAITED_TTL_SECONDS = 40.0

#: The target of a hole punch listens only when its connection to us has ended,
#: so ours is half-closed and the initiator told this long after its end was
#: seen. Of 60 sessions without wire delay 60 went direct so, 56 when told at
#: once.
HANG_UP_SECONDS = 0.2
PUNCH_GRACE_SECONDS = 0.01

#: A link that has registered is asked for a sign of life this often: clients
#: and the usual proxies hang up after 60 s without one.
HEARTBEAT_SECONDS = 22.0
#: Three heartbeats without an answer: the link is dead.
HEARTBEAT_TTL_SECONDS = 75.0
#: What clients are told: they give a link up after one and a half times this.
KEEP_ALIVE_SECONDS = 60

#: Clients that want a secured connection say nothing and wait for our key; all
#: others speak at once, but for a target that first spends up to 30 ms (300 ms
#: in old versions) on opening its NAT: while one is called we wait longer.
KEY_EXCHANGE_DELAY_SECONDS = 0.2
KEY_EXCHANGE_CALLED_SECONDS = 1.0
#: An empty frame answers a heartbeat, which only registered links are asked
#: for; from others so many of them are like one strange message.
EMPTY_FRAME_STRANGENESS = 1 / 64
#: How long a target takes to answer a call at most.
CALL_SECONDS = 3.0
#: One key pair serves all key exchanges of a minute: signing it costs the
#: most.
EXCHANGE_KEY_SECONDS = 60.0

#: A client's UDP port for hole punching, as it was tested, is good for this
#: long.
UDP_PORT_TTL_SECONDS = 60.0

#: How long a phone's old route may answer before its id moves to a new
#: address.
ROUTE_CHECK_SECONDS = 1.0

#: A request for a relay carries no key.  Who was let in to ask for that very
#: peer so lately, with the key, needs none at the relay either.
ACCEPTED_SECONDS = 120.0

#: A text command has ended when nothing more has come for this long.
CONSOLE_QUIET_SECONDS = 0.25
#: How long the other side may take to end a connection that we have ended, and
#: how long the survivor of a session, who still has to read what was sent
#: last.
LINGER_SECONDS = 2.0
SURVIVOR_SECONDS = 30.0

#: The largest frames that clients send to the ID server are whole address
#: books in an OnlineRequest (12 bytes an id); everything else is far below 64
#: KiB.
MAX_FRAME_BYTES = 64 * 1024
MAX_ONLINE_REQUEST_BYTES = 1024 * 1024
#: A secured frame may hold a request to a web API, which cannot be seen
#: before.
MAX_SECURED_FRAME_BYTES = 1024 * 1024
#: A RequestRelay is some 150 bytes; a login token may add a few KiB.
MAX_RELAY_REQUEST_BYTES = 16 * 1024
#: What a session may carry as one message where messages are counted, and the
#: largest WebSocket frame that the usual libraries take.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
MAX_WEBSOCKET_FRAME_BYTES = 16 * 1024 * 1024
#: Requests above 1.5 KiB do not come by datagram; what we send stays in one
#: packet on any path.
MAX_DATAGRAM_BYTES = 2048
MAX_SENT_DATAGRAM_BYTES = 1200
#: WebRTC candidates: their size, and how many a connection may have passed on.
MAX_CANDIDATE_BYTES, MAX_CANDIDATES = 1024, 64
#: A browser's request head is below 1 KiB; cookies and proxies add to it.
MAX_HTTP_HEAD_BYTES = 8192
#: WebSocket frames, of fragments and texts and pings, before a message must
#: come: browsers make fragments of 128 KiB, and ping now and then.
MAX_IDLE_FRAMES = 256
#: The official console reads one command of up to this size.
MAX_COMMAND_BYTES = 1024
#: Bytes a waiting relay link may have sent before its partner comes.
MAX_EARLY_BYTES = 64 * 1024
#: Answers that a connection has not taken yet; then it is cut.
MAX_UNSENT_BYTES = 1024 * 1024

#: An id's size in bytes: clients make 6 to 16 characters, host names may be
#: longer.
MIN_ID_BYTES, MAX_ID_BYTES = 6, 100
MAX_DEVICE_UUID_BYTES = 256
#: Exactly the Ed25519 key: a key of any other size could make a signed id look
#: like another message that the same key signs.
PUBLIC_KEY_BYTES = 32
MAX_SESSION_UUID_BYTES = 512
#: What is kept of a client's version for the operator.
MAX_VERSION_CHARACTERS = 40
#: A host name (RFC 1035 2.3.4) with a port.
MAX_HOST_BYTES = 262

#: Raw sessions are moved by one buffer of this size; WebSocket ones in pieces
#: that stay in the processor's cache, since every byte of them is worked on.
PIPE_BUFFER_BYTES = 1024 * 1024
#: However slow a session shall be, a packet is read at once.
MIN_READ_BYTES = 1500
TRANSLATION_BYTES = 64 * 1024

#: Accepts and datagrams taken per readiness, so that neither starves the
#: other.
ACCEPT_BATCH = 16
DATAGRAM_BATCH = 64
#: Connections that the system keeps for us: it drops what is more, and who
#: was dropped knocks again after a second.  Linux takes 4096 by default.
LISTEN_BACKLOG = 4096

#: TCP keepalive of relayed sessions: a dead end is noticed within 2.5 minutes.
KEEPALIVE_IDLE_SECONDS, KEEPALIVE_INTERVAL_SECONDS, KEEPALIVE_PROBES = 60, 15, 6

#: So many ids at one private address are not one device but a NAT in front of
#: us.
GATEWAY_PEERS = 5

#: The route of a peer that has been offline so long is forgotten.
FORGET_ROUTE_SECONDS = 600.0
#: When a peer was seen last is stored to the hour, for so many peers a second.
SEEN_SECONDS, SEEN_SLICE = 3600, 200

#: When the store could not be written anew, for a full disk say, it is left so
#: long.
COMPACT_AGAIN_SECONDS = 600.0

#: How often the certificate's files are looked at for a new one.
CERTIFICATE_CHECK_SECONDS = 30.0

#: How often bandwidth is shared out, where there is a cap.
SHARE_SECONDS = 0.05
#: More than one process can move; people set so much to lift the caps that the
#: official server has by default.
UNREACHABLE_MEGABITS = 100_000

#: How often ids are looked for that never came back, and at how many a second.
TIDY_SECONDS, TIDY_SLICE = 3600, 1000

#: How often it is looked who has come online or gone, where somebody wants to
#: know.
PRESENCE_SECONDS = 5

#: How often the relays of a list of two or more are tried, and for how long.
RELAY_CHECK_SECONDS = 5.0
RELAY_CHECK_TIMEOUT_SECONDS = 3.0

#: What clients present that have no key of their own: the public service's.
PUBLIC_SERVICE_KEY = "OeVuKk5nlHiXp+APNn0Y3pC1Iwpwn44JGqrQCsWqmBw="

KEY_FILE, PUBLIC_KEY_FILE = "id_ed25519", "id_ed25519.pub"
STORE_FILE, OFFICIAL_STORE_FILE = "peers.jsonl", "db_v2.sqlite3"
SLOWED_FILE, REFUSED_FILE = "blacklist.txt", "blocklist.txt"
#: What an operator has changed while the server ran, the last layer of its
#: configuration.
CHANGES_FILE = "changes.conf"

# == 2. Refusals ===============================================================
#
# Every "no" of this program, in one closed list.  The word is what stands in
# the log and in the counters.  `Refused` is raised for what the other side got
# wrong; it is caught in one place, counted and logged there.  `Trouble` is for
# what the operator has to mend, and its text tells how.
#
# Uses: nothing.


class Refusal(enum.Enum):
    """Why something was not done."""

    # Bytes that are no message.
    MALFORMED = "malformed"  # not the wire format, or cut short
    TOO_LARGE = "too-large"  # a frame, message or head beyond its limit
    BAD_HTTP = "bad-http"  # not a request that can become a WebSocket
    BAD_WEBSOCKET = "bad-websocket"  # a frame that RFC 6455 forbids
    BAD_PROXY_HEADER = "bad-proxy-header"  # of the PROXY protocol
    TLS_FAILED = "tls-failed"  # the handshake did not come about
    SECURE_FAILED = "secure-failed"  # a key exchange or an encrypted frame
    # Messages in the wrong place.
    NOT_ACCEPTED_HERE = "not-accepted-here"  # this listener does not take it
    STRANGE = "strange"  # no kind of message that we know
    NOT_AWAITED = "not-awaited"  # an answer that nobody asked for
    # Registration.
    NO_DEVICE_UUID = "no-device-uuid"  # registers without its uuid or key
    ID_TOO_SHORT = "id-too-short"  # below six bytes: the client makes another
    BAD_ID = "bad-id"  # too long, or with blanks or control characters
    BAD_PUBLIC_KEY = "bad-public-key"  # not 32 bytes, or a device uuid too long
    DEVICE_MISMATCH = "device-mismatch"  # the id belongs to another device
    KEY_CHANGED = "key-changed"  # new key from a new address: who is it?
    TOO_FREQUENT = "too-frequent"  # more registrations than a client makes
    TOO_MANY_NEW_IDS = "too-many-new-ids"  # new peers in all, or peers in all
    REFUSED_ID = "refused-id"  # the operator refuses this id
    DISABLED = "disabled"  # the operator has disabled this peer
    AWAITS_APPROVAL = "awaits-approval"  # a new peer that nobody approved yet
    NOT_ENROLLED = "not-enrolled"  # a new peer, and enrolment is closed
    OLD_ROUTE_LIVES = "old-route-lives"  # moves while its old route answers
    STORE_FAILED = "store-failed"  # the disk did not take the record
    NOT_OWNER = "not-owner"  # changes an id that it does not hold right now
    ID_TAKEN = "id-taken"  # changes to an id of another device
    LINK_DEAD = "link-dead"  # a registered link that answers no heartbeat
    # Connection attempts.
    WRONG_KEY = "wrong-key"  # the key of some other server
    NO_KEY = "no-key"  # none at all
    PUBLIC_SERVICE_KEY = "public-service-key"  # what clients send that have none
    UNKNOWN_ID = "unknown-id"  # nobody registered it
    OFFLINE = "offline"  # its registration is older than 30 s
    TOO_MANY_TARGETS = "too-many-targets"  # one connection asks for many ids
    TOO_MANY_REQUESTS = "too-many-requests"  # for connections, from or to one place
    TOO_MANY_QUERIES = "too-many-queries"  # for who is online, from one place
    NO_ANSWER = "no-answer"  # the target was called and did not answer
    INITIATOR_LEFT = "initiator-left"  # before the target could answer
    DEVICE_REFUSED = "device-refused"  # the target answers that it will not
    # The relay.
    NO_SESSION_UUID = "no-session-uuid"  # a request without its uuid
    NO_TICKET = "no-ticket"  # a session that the ID server knows nothing of
    TICKET_USED = "ticket-used"  # a ticket is good for one session
    BAD_TICKETS = "bad-tickets"  # announced without the secret of --relay-secret
    TOO_MANY_RELAY_LINKS = "too-many-relay-links"  # that wait, from one place or in all
    TOO_MANY_SESSIONS = "too-many-sessions"  # relayed for one place or in all
    NO_RELAY_REQUEST = "no-relay-request"  # the first frame was something else
    LONELY = "lonely"  # its partner did not come
    # Connections.
    REFUSED_ADDRESS = "refused-address"  # the operator refuses its network
    TOO_MANY_CONNECTIONS = "too-many-connections"  # from one place or in all
    TOO_MANY_STRANGERS = "too-many-strangers"  # connections that said nothing yet
    SILENT = "silent"  # nothing came in time
    SLOW_READER = "slow-reader"  # does not take its answers
    NO_ROOM = "no-room"  # more bytes wait for slow ends than there is room for
    READ_ONLY = "read-only"  # the console answers, it changes nothing


class Refused(Exception):
    """What the other side sent cannot be served; the connection ends."""

    def __init__(self, refusal, detail=""):
        super().__init__(refusal, detail)
        self.refusal = refusal
        self.detail = detail
        self.passed = b""  # what a translator had for the reader before it


class Trouble(Exception):
    """Something cannot be done; the text tells the operator why, and what to
    do."""


# == 3. Wire format ============================================================
#
# As much of protobuf's wire format as the messages need.  A field is a tag,
# made of its number and its wire type, and a value: a varint, or a length and
# that many bytes.  The messages use these two wire types only.  Whatever else
# a stranger sends is stepped over here or refused here, so that decoding
# raises nothing but Refused.
#
# Uses: Refusals.

#: No message has groups, but a stranger may nest them.  Protobuf's own limit.
GROUP_DEPTH_MAX = 100

#: 64 bits, 7 in each byte, take ten bytes: a longer varint is malformed.
VARINT_BYTES_MAX = 10

#: Tags are 32-bit numbers: 29 bits of field number, 3 of wire type.
TAG_MAX = 0xFFFFFFFF

VARINT, FIXED64, LENGTH_DELIMITED, GROUP_START, GROUP_END, FIXED32 = range(6)

ONE_BYTE = [bytes((number,)) for number in range(128)]


def malformed(detail):
    """The refusal of bytes that are not a message."""
    return Refused(Refusal.MALFORMED, detail)


def varint(number):
    """Write a number; a negative one takes ten bytes, as protobuf has it."""
    number &= 0xFFFFFFFFFFFFFFFF
    if number < 128:
        return ONE_BYTE[number]
    written = bytearray()
    while number > 127:
        written.append(number & 127 | 128)
        number >>= 7
    written.append(number)
    return bytes(written)


def sized(tag, data):
    """Write a length-delimited field: its tag, its length, its bytes."""
    return tag + varint(len(data)) + data


def read_varint(data, position):
    """Return (number, position after it), the number cut to 64 bits.

    A varint that is cut short raises IndexError, which `read_fields` answers.
    """
    number = 0
    for shift in range(0, 7 * VARINT_BYTES_MAX, 7):
        byte = data[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number & 0xFFFFFFFFFFFFFFFF, position
    raise malformed("a varint of more than ten bytes")


def read_tag(data, position):
    """Return (tag, position after it); field number 0 does not exist."""
    tag, position = read_varint(data, position)
    if not 7 < tag <= TAG_MAX:
        raise malformed("a field number out of range")
    return tag, position


def skip_field(data, position, tag):
    """Return the position after a field that no message knows.

    A group ends where its end tag is, so groups are walked, but not
    recursively.
    """
    groups = []
    while True:
        wire_type = tag & 7
        if wire_type == VARINT:
            position = read_varint(data, position)[1]
        elif wire_type == LENGTH_DELIMITED:
            size, position = read_varint(data, position)
            position += size
        elif wire_type == FIXED64:
            position += 8
        elif wire_type == FIXED32:
            position += 4
        else:
            follow_group(groups, tag)
        if position > len(data):
            raise malformed("a field beyond the end")
        if not groups:
            return position
        tag, position = read_tag(data, position)


def follow_group(groups, tag):
    """Open or close a group; `groups` has the end tags of the open ones."""
    if tag & 7 == GROUP_START and len(groups) < GROUP_DEPTH_MAX:
        groups.append(tag - GROUP_START + GROUP_END)
    elif tag & 7 == GROUP_START:
        raise malformed("groups nested too deep")
    elif tag & 7 != GROUP_END:
        raise malformed("an unknown wire type")
    elif not groups or groups.pop() != tag:
        raise malformed("the end of a group that was not open")


def read_fields(data):
    """Yield (tag, value) of each field; the value is a number or bytes.

    Readers compare whole tags, so that a number they know is unknown to them
    when it comes with another wire type.  Tags of two bytes and numbers of one,
    which most are, are read in line: a call for each would double the cost of a
    message.
    """
    position, end = 0, len(data)
    try:
        while position < end:
            tag = data[position]
            position += 1
            if tag > 127 and 0 < data[position] < 128:
                tag += data[position] - 1 << 7
                position += 1
            elif not 7 < tag < 128:
                tag, position = read_tag(data, position - 1)
            if tag & 5:                         # neither VARINT nor LENGTH_DELIMITED
                position = skip_field(data, position, tag)
                continue
            value = data[position]
            position += 1
            if value > 127:
                value, position = read_varint(data, position - 1)
            if tag & 2:
                start, position = position, position + value
                if position > end:
                    raise malformed("a length beyond the end")
                value = data[start:position]
            yield tag, value
    except IndexError:
        raise malformed("a field cut short") from None


def int32(number):
    """The signed number in a varint's low 32 bits: an int32 or an enum."""
    return ((number & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def utf8(value):
    """The text of a `string` field, which has to be UTF-8."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise malformed("text that is not UTF-8") from None


def name_of(enumeration, number):
    """What an enumeration calls a number, or its digits if it has no name."""
    for name, value in vars(enumeration).items():
        if value == number and not name.startswith("__"):
            return name
    return str(number)


class Message:
    """A message: its slots are its fields.  Its `repr` is made for the log."""

    __slots__ = ()

    #: Who reads these may act as somebody else: the log gets their sizes only.
    SECRET = frozenset(("licence_key", "token", "switch_code", "session_key",
                        "headers", "body"))

    def __eq__(self, other):
        if type(self) is not type(other):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name)
                   for name in self.__slots__)

    def __repr__(self):
        plain = type(self)()
        shown = ", ".join("%s=%s" % (name, self.shown(name)) for name in self.__slots__
                          if getattr(self, name) != getattr(plain, name))
        return "%s(%s)" % (type(self).__name__, shown)

    def shown(self, name):
        """A field as the log may have it."""
        value = getattr(self, name)
        return "<%d hidden>" % len(value) if name in self.SECRET else repr(value)


# == 4. Messages ===============================================================
#
# The enumerations and messages of the rendezvous protocol, a class for each,
# with fields named as on the wire.  Of a oneof, the members not chosen are
# None; if several are set, the last one is written.  proto_gen.py writes this.
#
# Uses: Wire format.

# -- generated by proto_gen.py from its SCHEMA: edit that, then run it --


class ConnType:
    DEFAULT_CONN = 0
    FILE_TRANSFER = 1
    PORT_FORWARD = 2
    RDP = 3
    VIEW_CAMERA = 4
    TERMINAL = 5


class NatType:
    UNKNOWN_NAT = 0
    ASYMMETRIC = 1
    SYMMETRIC = 2


class RegisterPeer(Message):
    # id 1, serial 2
    __slots__ = ("id", "serial")

    def __init__(self, id="", serial=0):
        self.id = id
        self.serial = serial

    def encode(self):
        out = b""
        if self.id:
            out += sized(b"\x0a", self.id.encode())
        if self.serial:
            out += b"\x10" + varint(self.serial)
        return out

    @staticmethod
    def decode(data):
        message = RegisterPeer()
        for tag, value in read_fields(data):
            if tag == 10:
                message.id = utf8(value)
            elif tag == 16:
                message.serial = int32(value)
        return message


class RegisterPeerResponse(Message):
    # request_pk 2
    __slots__ = ("request_pk",)

    def __init__(self, request_pk=False):
        self.request_pk = request_pk

    def encode(self):
        out = b""
        if self.request_pk:
            out += b"\x10" + varint(self.request_pk)
        return out

    @staticmethod
    def decode(data):
        message = RegisterPeerResponse()
        for tag, value in read_fields(data):
            if tag == 16:
                message.request_pk = value != 0
        return message


class RegisterPk(Message):
    # id 1, uuid 2, pk 3, old_id 4, no_register_device 5
    __slots__ = ("id", "uuid", "pk", "old_id", "no_register_device")

    def __init__(self, id="", uuid=b"", pk=b"", old_id="", no_register_device=False):
        self.id = id
        self.uuid = uuid
        self.pk = pk
        self.old_id = old_id
        self.no_register_device = no_register_device

    def encode(self):
        out = b""
        if self.id:
            out += sized(b"\x0a", self.id.encode())
        if self.uuid:
            out += sized(b"\x12", self.uuid)
        if self.pk:
            out += sized(b"\x1a", self.pk)
        if self.old_id:
            out += sized(b"\x22", self.old_id.encode())
        if self.no_register_device:
            out += b"\x28" + varint(self.no_register_device)
        return out

    @staticmethod
    def decode(data):
        message = RegisterPk()
        for tag, value in read_fields(data):
            if tag == 10:
                message.id = utf8(value)
            elif tag == 18:
                message.uuid = value
            elif tag == 26:
                message.pk = value
            elif tag == 34:
                message.old_id = utf8(value)
            elif tag == 40:
                message.no_register_device = value != 0
        return message


class RegisterPkResponse(Message):
    # result 1, keep_alive 2
    class Result:
        OK = 0
        UUID_MISMATCH = 2
        ID_EXISTS = 3
        TOO_FREQUENT = 4
        INVALID_ID_FORMAT = 5
        NOT_SUPPORT = 6
        SERVER_ERROR = 7
        NOT_DEPLOYED = 8

    __slots__ = ("result", "keep_alive")

    def __init__(self, result=0, keep_alive=0):
        self.result = result
        self.keep_alive = keep_alive

    def encode(self):
        out = b""
        if self.result:
            out += b"\x08" + varint(self.result)
        if self.keep_alive:
            out += b"\x10" + varint(self.keep_alive)
        return out

    @staticmethod
    def decode(data):
        message = RegisterPkResponse()
        for tag, value in read_fields(data):
            if tag == 8:
                message.result = int32(value)
            elif tag == 16:
                message.keep_alive = int32(value)
        return message


class PunchHoleRequest(Message):
    # id 1, nat_type 2, licence_key 3, conn_type 4, token 5, version 6,
    # udp_port 7, force_relay 8, upnp_port 9, socket_addr_v6 10, switch_code
    # 11, webrtc_sdp_offer 12
    __slots__ = ("id", "nat_type", "licence_key", "conn_type", "token", "version",
                 "udp_port", "force_relay", "upnp_port", "socket_addr_v6",
                 "switch_code", "webrtc_sdp_offer")

    def __init__(self, id="", nat_type=0, licence_key="", conn_type=0, token="",
                 version="", udp_port=0, force_relay=False, upnp_port=0,
                 socket_addr_v6=b"", switch_code="", webrtc_sdp_offer=""):
        self.id = id
        self.nat_type = nat_type
        self.licence_key = licence_key
        self.conn_type = conn_type
        self.token = token
        self.version = version
        self.udp_port = udp_port
        self.force_relay = force_relay
        self.upnp_port = upnp_port
        self.socket_addr_v6 = socket_addr_v6
        self.switch_code = switch_code
        self.webrtc_sdp_offer = webrtc_sdp_offer

    def encode(self):
        out = b""
        if self.id:
            out += sized(b"\x0a", self.id.encode())
        if self.nat_type:
            out += b"\x10" + varint(self.nat_type)
        if self.licence_key:
            out += sized(b"\x1a", self.licence_key.encode())
        if self.conn_type:
            out += b"\x20" + varint(self.conn_type)
        if self.token:
            out += sized(b"\x2a", self.token.encode())
        if self.version:
            out += sized(b"\x32", self.version.encode())
        if self.udp_port:
            out += b"\x38" + varint(self.udp_port)
        if self.force_relay:
            out += b"\x40" + varint(self.force_relay)
        if self.upnp_port:
            out += b"\x48" + varint(self.upnp_port)
        if self.socket_addr_v6:
            out += sized(b"\x52", self.socket_addr_v6)
        if self.switch_code:
            out += sized(b"\x5a", self.switch_code.encode())
        if self.webrtc_sdp_offer:
            out += sized(b"\x62", self.webrtc_sdp_offer.encode())
        return out

    @staticmethod
    def decode(data):
        message = PunchHoleRequest()
        for tag, value in read_fields(data):
            if tag == 10:
                message.id = utf8(value)
            elif tag == 16:
                message.nat_type = int32(value)
            elif tag == 26:
                message.licence_key = utf8(value)
            elif tag == 32:
                message.conn_type = int32(value)
            elif tag == 42:
                message.token = utf8(value)
            elif tag == 50:
                message.version = utf8(value)
            elif tag == 56:
                message.udp_port = int32(value)
            elif tag == 64:
                message.force_relay = value != 0
            elif tag == 72:
                message.upnp_port = int32(value)
            elif tag == 82:
                message.socket_addr_v6 = value
            elif tag == 90:
                message.switch_code = utf8(value)
            elif tag == 98:
                message.webrtc_sdp_offer = utf8(value)
        return message


class ControlPermissions(Message):
    # permissions 1
    class Permission:
        keyboard = 0
        remote_printer = 1
        clipboard = 2
        file = 3
        audio = 4
        camera = 5
        terminal = 6
        tunnel = 7
        restart = 8
        recording = 9
        block_input = 10
        remote_modify = 11
        privacy_mode = 12

    __slots__ = ("permissions",)

    def __init__(self, permissions=0):
        self.permissions = permissions

    def encode(self):
        out = b""
        if self.permissions:
            out += b"\x08" + varint(self.permissions)
        return out

    @staticmethod
    def decode(data):
        message = ControlPermissions()
        for tag, value in read_fields(data):
            if tag == 8:
                message.permissions = value
        return message


class ControlledContext(Message):
    # conn_audit_ref 1
    __slots__ = ("conn_audit_ref",)

    def __init__(self, conn_audit_ref=""):
        self.conn_audit_ref = conn_audit_ref

    def encode(self):
        out = b""
        if self.conn_audit_ref:
            out += sized(b"\x0a", self.conn_audit_ref.encode())
        return out

    @staticmethod
    def decode(data):
        message = ControlledContext()
        for tag, value in read_fields(data):
            if tag == 10:
                message.conn_audit_ref = utf8(value)
        return message


class PunchHole(Message):
    # socket_addr 1, relay_server 2, nat_type 3, udp_port 4, force_relay 5,
    # upnp_port 6, socket_addr_v6 7, control_permissions 8, controlled_context
    # 9, webrtc_sdp_offer 10
    __slots__ = ("socket_addr", "relay_server", "nat_type", "udp_port", "force_relay",
                 "upnp_port", "socket_addr_v6", "control_permissions",
                 "controlled_context", "webrtc_sdp_offer")

    def __init__(self, socket_addr=b"", relay_server="", nat_type=0, udp_port=0,
                 force_relay=False, upnp_port=0, socket_addr_v6=b"",
                 control_permissions=None, controlled_context=None,
                 webrtc_sdp_offer=""):
        self.socket_addr = socket_addr
        self.relay_server = relay_server
        self.nat_type = nat_type
        self.udp_port = udp_port
        self.force_relay = force_relay
        self.upnp_port = upnp_port
        self.socket_addr_v6 = socket_addr_v6
        self.control_permissions = control_permissions
        self.controlled_context = controlled_context
        self.webrtc_sdp_offer = webrtc_sdp_offer

    def encode(self):
        out = b""
        if self.socket_addr:
            out += sized(b"\x0a", self.socket_addr)
        if self.relay_server:
            out += sized(b"\x12", self.relay_server.encode())
        if self.nat_type:
            out += b"\x18" + varint(self.nat_type)
        if self.udp_port:
            out += b"\x20" + varint(self.udp_port)
        if self.force_relay:
            out += b"\x28" + varint(self.force_relay)
        if self.upnp_port:
            out += b"\x30" + varint(self.upnp_port)
        if self.socket_addr_v6:
            out += sized(b"\x3a", self.socket_addr_v6)
        if self.control_permissions is not None:
            out += sized(b"\x42", self.control_permissions.encode())
        if self.controlled_context is not None:
            out += sized(b"\x4a", self.controlled_context.encode())
        if self.webrtc_sdp_offer:
            out += sized(b"\x52", self.webrtc_sdp_offer.encode())
        return out

    @staticmethod
    def decode(data):
        message = PunchHole()
        for tag, value in read_fields(data):
            if tag == 10:
                message.socket_addr = value
            elif tag == 18:
                message.relay_server = utf8(value)
            elif tag == 24:
                message.nat_type = int32(value)
            elif tag == 32:
                message.udp_port = int32(value)
            elif tag == 40:
                message.force_relay = value != 0
            elif tag == 48:
                message.upnp_port = int32(value)
            elif tag == 58:
                message.socket_addr_v6 = value
            elif tag == 66:
                message.control_permissions = ControlPermissions.decode(value)
            elif tag == 74:
                message.controlled_context = ControlledContext.decode(value)
            elif tag == 82:
                message.webrtc_sdp_offer = utf8(value)
        return message


class PunchHoleSent(Message):
    # socket_addr 1, id 2, relay_server 3, nat_type 4, version 5, upnp_port 6,
    # socket_addr_v6 7, webrtc_sdp_answer 8
    __slots__ = ("socket_addr", "id", "relay_server", "nat_type", "version",
                 "upnp_port", "socket_addr_v6", "webrtc_sdp_answer")

    def __init__(self, socket_addr=b"", id="", relay_server="", nat_type=0, version="",
                 upnp_port=0, socket_addr_v6=b"", webrtc_sdp_answer=""):
        self.socket_addr = socket_addr
        self.id = id
        self.relay_server = relay_server
        self.nat_type = nat_type
        self.version = version
        self.upnp_port = upnp_port
        self.socket_addr_v6 = socket_addr_v6
        self.webrtc_sdp_answer = webrtc_sdp_answer

    def encode(self):
        out = b""
        if self.socket_addr:
            out += sized(b"\x0a", self.socket_addr)
        if self.id:
            out += sized(b"\x12", self.id.encode())
        if self.relay_server:
            out += sized(b"\x1a", self.relay_server.encode())
        if self.nat_type:
            out += b"\x20" + varint(self.nat_type)
        if self.version:
            out += sized(b"\x2a", self.version.encode())
        if self.upnp_port:
            out += b"\x30" + varint(self.upnp_port)
        if self.socket_addr_v6:
            out += sized(b"\x3a", self.socket_addr_v6)
        if self.webrtc_sdp_answer:
            out += sized(b"\x42", self.webrtc_sdp_answer.encode())
        return out

    @staticmethod
    def decode(data):
        message = PunchHoleSent()
        for tag, value in read_fields(data):
            if tag == 10:
                message.socket_addr = value
            elif tag == 18:
                message.id = utf8(value)
            elif tag == 26:
                message.relay_server = utf8(value)
            elif tag == 32:
                message.nat_type = int32(value)
            elif tag == 42:
                message.version = utf8(value)
            elif tag == 48:
                message.upnp_port = int32(value)
            elif tag == 58:
                message.socket_addr_v6 = value
            elif tag == 66:
                message.webrtc_sdp_answer = utf8(value)
        return message


class PunchHoleResponse(Message):
    # socket_addr 1, pk 2, failure 3, relay_server 4, nat_type 5, is_local 6,
    # other_failure 7, feedback 8, is_udp 9, upnp_port 10, socket_addr_v6 11,
    # webrtc_sdp_answer 12
    class Failure:
        ID_NOT_EXIST = 0
        OFFLINE = 2
        LICENSE_MISMATCH = 3
        LICENSE_OVERUSE = 4

    __slots__ = ("socket_addr", "pk", "failure", "relay_server", "nat_type", "is_local",
                 "other_failure", "feedback", "is_udp", "upnp_port", "socket_addr_v6",
                 "webrtc_sdp_answer")

    def __init__(self, socket_addr=b"", pk=b"", failure=0, relay_server="",
                 nat_type=None, is_local=None, other_failure="", feedback=0,
                 is_udp=False, upnp_port=0, socket_addr_v6=b"", webrtc_sdp_answer=""):
        self.socket_addr = socket_addr
        self.pk = pk
        self.failure = failure
        self.relay_server = relay_server
        self.nat_type = nat_type
        self.is_local = is_local
        self.other_failure = other_failure
        self.feedback = feedback
        self.is_udp = is_udp
        self.upnp_port = upnp_port
        self.socket_addr_v6 = socket_addr_v6
        self.webrtc_sdp_answer = webrtc_sdp_answer

    def encode(self):
        out = b""
        if self.socket_addr:
            out += sized(b"\x0a", self.socket_addr)
        if self.pk:
            out += sized(b"\x12", self.pk)
        if self.failure:
            out += b"\x18" + varint(self.failure)
        if self.relay_server:
            out += sized(b"\x22", self.relay_server.encode())
        if self.nat_type is not None and self.is_local is None:
            out += b"\x28" + varint(self.nat_type)
        if self.is_local is not None:
            out += b"\x30" + varint(self.is_local)
        if self.other_failure:
            out += sized(b"\x3a", self.other_failure.encode())
        if self.feedback:
            out += b"\x40" + varint(self.feedback)
        if self.is_udp:
            out += b"\x48" + varint(self.is_udp)
        if self.upnp_port:
            out += b"\x50" + varint(self.upnp_port)
        if self.socket_addr_v6:
            out += sized(b"\x5a", self.socket_addr_v6)
        if self.webrtc_sdp_answer:
            out += sized(b"\x62", self.webrtc_sdp_answer.encode())
        return out

    @staticmethod
    def decode(data):
        message = PunchHoleResponse()
        for tag, value in read_fields(data):
            if tag == 10:
                message.socket_addr = value
            elif tag == 18:
                message.pk = value
            elif tag == 24:
                message.failure = int32(value)
            elif tag == 34:
                message.relay_server = utf8(value)
            elif tag == 40:
                message.nat_type, message.is_local = int32(value), None
            elif tag == 48:
                message.is_local, message.nat_type = value != 0, None
            elif tag == 58:
                message.other_failure = utf8(value)
            elif tag == 64:
                message.feedback = int32(value)
            elif tag == 72:
                message.is_udp = value != 0
            elif tag == 80:
                message.upnp_port = int32(value)
            elif tag == 90:
                message.socket_addr_v6 = value
            elif tag == 98:
                message.webrtc_sdp_answer = utf8(value)
        return message


class FetchLocalAddr(Message):
    # socket_addr 1, relay_server 2, socket_addr_v6 3, control_permissions 4,
    # controlled_context 5
    __slots__ = ("socket_addr", "relay_server", "socket_addr_v6", "control_permissions",
                 "controlled_context")

    def __init__(self, socket_addr=b"", relay_server="", socket_addr_v6=b"",
                 control_permissions=None, controlled_context=None):
        self.socket_addr = socket_addr
        self.relay_server = relay_server
        self.socket_addr_v6 = socket_addr_v6
        self.control_permissions = control_permissions
        self.controlled_context = controlled_context

    def encode(self):
        out = b""
        if self.socket_addr:
            out += sized(b"\x0a", self.socket_addr)
        if self.relay_server:
            out += sized(b"\x12", self.relay_server.encode())
        if self.socket_addr_v6:
            out += sized(b"\x1a", self.socket_addr_v6)
        if self.control_permissions is not None:
            out += sized(b"\x22", self.control_permissions.encode())
        if self.controlled_context is not None:
            out += sized(b"\x2a", self.controlled_context.encode())
        return out

    @staticmethod
    def decode(data):
        message = FetchLocalAddr()
        for tag, value in read_fields(data):
            if tag == 10:
                message.socket_addr = value
            elif tag == 18:
                message.relay_server = utf8(value)
            elif tag == 26:
                message.socket_addr_v6 = value
            elif tag == 34:
                message.control_permissions = ControlPermissions.decode(value)
            elif tag == 42:
                message.controlled_context = ControlledContext.decode(value)
        return message


class LocalAddr(Message):
    # socket_addr 1, local_addr 2, relay_server 3, id 4, version 5,
    # socket_addr_v6 6
    __slots__ = ("socket_addr", "local_addr", "relay_server", "id", "version",
                 "socket_addr_v6")

    def __init__(self, socket_addr=b"", local_addr=b"", relay_server="", id="",
                 version="", socket_addr_v6=b""):
        self.socket_addr = socket_addr
        self.local_addr = local_addr
        self.relay_server = relay_server
        self.id = id
        self.version = version
        self.socket_addr_v6 = socket_addr_v6

    def encode(self):
        out = b""
        if self.socket_addr:
            out += sized(b"\x0a", self.socket_addr)
        if self.local_addr:
            out += sized(b"\x12", self.local_addr)
        if self.relay_server:
            out += sized(b"\x1a", self.relay_server.encode())
        if self.id:
            out += sized(b"\x22", self.id.encode())
        if self.version:
            out += sized(b"\x2a", self.version.encode())
        if self.socket_addr_v6:
            out += sized(b"\x32", self.socket_addr_v6)
        return out

    @staticmethod
    def decode(data):
        message = LocalAddr()
        for tag, value in read_fields(data):
            if tag == 10:
                message.socket_addr = value
            elif tag == 18:
                message.local_addr = value
            elif tag == 26:
                message.relay_server = utf8(value)
            elif tag == 34:
                message.id = utf8(value)
            elif tag == 42:
                message.version = utf8(value)
            elif tag == 50:
                message.socket_addr_v6 = value
        return message


class IceCandidate(Message):
    # id 1, socket_addr 2, session_key 3, candidate 4
    __slots__ = ("id", "socket_addr", "session_key", "candidate")

    def __init__(self, id="", socket_addr=b"", session_key="", candidate=""):
        self.id = id
        self.socket_addr = socket_addr
        self.session_key = session_key
        self.candidate = candidate

    def encode(self):
        out = b""
        if self.id:
            out += sized(b"\x0a", self.id.encode())
        if self.socket_addr:
            out += sized(b"\x12", self.socket_addr)
        if self.session_key:
            out += sized(b"\x1a", self.session_key.encode())
        if self.candidate:
            out += sized(b"\x22", self.candidate.encode())
        return out

    @staticmethod
    def decode(data):
        message = IceCandidate()
        for tag, value in read_fields(data):
            if tag == 10:
                message.id = utf8(value)
            elif tag == 18:
                message.socket_addr = value
            elif tag == 26:
                message.session_key = utf8(value)
            elif tag == 34:
                message.candidate = utf8(value)
        return message


class RequestRelay(Message):
    # id 1, uuid 2, socket_addr 3, relay_server 4, secure 5, licence_key 6,
    # conn_type 7, token 8, control_permissions 9, controlled_context 10,
    # switch_code 11
    __slots__ = ("id", "uuid", "socket_addr", "relay_server", "secure", "licence_key",
                 "conn_type", "token", "control_permissions", "controlled_context",
                 "switch_code")

    def __init__(self, id="", uuid="", socket_addr=b"", relay_server="", secure=False,
                 licence_key="", conn_type=0, token="", control_permissions=None,
                 controlled_context=None, switch_code=""):
        self.id = id
        self.uuid = uuid
        self.socket_addr = socket_addr
        self.relay_server = relay_server
        self.secure = secure
        self.licence_key = licence_key
        self.conn_type = conn_type
        self.token = token
        self.control_permissions = control_permissions
        self.controlled_context = controlled_context
        self.switch_code = switch_code

    def encode(self):
        out = b""
        if self.id:
            out += sized(b"\x0a", self.id.encode())
        if self.uuid:
            out += sized(b"\x12", self.uuid.encode())
        if self.socket_addr:
            out += sized(b"\x1a", self.socket_addr)
        if self.relay_server:
            out += sized(b"\x22", self.relay_server.encode())
        if self.secure:
            out += b"\x28" + varint(self.secure)
        if self.licence_key:
            out += sized(b"\x32", self.licence_key.encode())
        if self.conn_type:
            out += b"\x38" + varint(self.conn_type)
        if self.token:
            out += sized(b"\x42", self.token.encode())
        if self.control_permissions is not None:
            out += sized(b"\x4a", self.control_permissions.encode())
        if self.controlled_context is not None:
            out += sized(b"\x52", self.controlled_context.encode())
        if self.switch_code:
            out += sized(b"\x5a", self.switch_code.encode())
        return out

    @staticmethod
    def decode(data):
        message = RequestRelay()
        for tag, value in read_fields(data):
            if tag == 10:
                message.id = utf8(value)
            elif tag == 18:
                message.uuid = utf8(value)
            elif tag == 26:
                message.socket_addr = value
            elif tag == 34:
                message.relay_server = utf8(value)
            elif tag == 40:
                message.secure = value != 0
            elif tag == 50:
                message.licence_key = utf8(value)
            elif tag == 56:
                message.conn_type = int32(value)
            elif tag == 66:
                message.token = utf8(value)
            elif tag == 74:
                message.control_permissions = ControlPermissions.decode(value)
            elif tag == 82:
                message.controlled_context = ControlledContext.decode(value)
            elif tag == 90:
                message.switch_code = utf8(value)
        return message


class RelayResponse(Message):
    # socket_addr 1, uuid 2, relay_server 3, id 4, pk 5, refuse_reason 6,
    # version 7, feedback 9, socket_addr_v6 10, upnp_port 11, webrtc_sdp_answer
    # 12
    __slots__ = ("socket_addr", "uuid", "relay_server", "id", "pk", "refuse_reason",
                 "version", "feedback", "socket_addr_v6", "upnp_port",
                 "webrtc_sdp_answer")

    def __init__(self, socket_addr=b"", uuid="", relay_server="", id=None, pk=None,
                 refuse_reason="", version="", feedback=0, socket_addr_v6=b"",
                 upnp_port=0, webrtc_sdp_answer=""):
        self.socket_addr = socket_addr
        self.uuid = uuid
        self.relay_server = relay_server
        self.id = id
        self.pk = pk
        self.refuse_reason = refuse_reason
        self.version = version
        self.feedback = feedback
        self.socket_addr_v6 = socket_addr_v6
        self.upnp_port = upnp_port
        self.webrtc_sdp_answer = webrtc_sdp_answer

    def encode(self):
        out = b""
        if self.socket_addr:
            out += sized(b"\x0a", self.socket_addr)
        if self.uuid:
            out += sized(b"\x12", self.uuid.encode())
        if self.relay_server:
            out += sized(b"\x1a", self.relay_server.encode())
        if self.id is not None and self.pk is None:
            out += sized(b"\x22", self.id.encode())
        if self.pk is not None:
            out += sized(b"\x2a", self.pk)
        if self.refuse_reason:
            out += sized(b"\x32", self.refuse_reason.encode())
        if self.version:
            out += sized(b"\x3a", self.version.encode())
        if self.feedback:
            out += b"\x48" + varint(self.feedback)
        if self.socket_addr_v6:
            out += sized(b"\x52", self.socket_addr_v6)
        if self.upnp_port:
            out += b"\x58" + varint(self.upnp_port)
        if self.webrtc_sdp_answer:
            out += sized(b"\x62", self.webrtc_sdp_answer.encode())
        return out

    @staticmethod
    def decode(data):
        message = RelayResponse()
        for tag, value in read_fields(data):
            if tag == 10:
                message.socket_addr = value
            elif tag == 18:
                message.uuid = utf8(value)
            elif tag == 26:
                message.relay_server = utf8(value)
            elif tag == 34:
                message.id, message.pk = utf8(value), None
            elif tag == 42:
                message.pk, message.id = value, None
            elif tag == 50:
                message.refuse_reason = utf8(value)
            elif tag == 58:
                message.version = utf8(value)
            elif tag == 72:
                message.feedback = int32(value)
            elif tag == 82:
                message.socket_addr_v6 = value
            elif tag == 88:
                message.upnp_port = int32(value)
            elif tag == 98:
                message.webrtc_sdp_answer = utf8(value)
        return message


class TestNatRequest(Message):
    # serial 1
    __slots__ = ("serial",)

    def __init__(self, serial=0):
        self.serial = serial

    def encode(self):
        out = b""
        if self.serial:
            out += b"\x08" + varint(self.serial)
        return out

    @staticmethod
    def decode(data):
        message = TestNatRequest()
        for tag, value in read_fields(data):
            if tag == 8:
                message.serial = int32(value)
        return message


class TestNatResponse(Message):
    # port 1, cu 2
    __slots__ = ("port", "cu")

    def __init__(self, port=0, cu=None):
        self.port = port
        self.cu = cu

    def encode(self):
        out = b""
        if self.port:
            out += b"\x08" + varint(self.port)
        if self.cu is not None:
            out += sized(b"\x12", self.cu.encode())
        return out

    @staticmethod
    def decode(data):
        message = TestNatResponse()
        for tag, value in read_fields(data):
            if tag == 8:
                message.port = int32(value)
            elif tag == 18:
                message.cu = ConfigUpdate.decode(value)
        return message


class ConfigUpdate(Message):
    # serial 1, rendezvous_servers 2
    __slots__ = ("serial", "rendezvous_servers")

    def __init__(self, serial=0, rendezvous_servers=()):
        self.serial = serial
        self.rendezvous_servers = list(rendezvous_servers)

    def encode(self):
        out = b""
        if self.serial:
            out += b"\x08" + varint(self.serial)
        for item in self.rendezvous_servers:
            out += sized(b"\x12", item.encode())
        return out

    @staticmethod
    def decode(data):
        message = ConfigUpdate()
        for tag, value in read_fields(data):
            if tag == 8:
                message.serial = int32(value)
            elif tag == 18:
                message.rendezvous_servers.append(utf8(value))
        return message


class SoftwareUpdate(Message):
    # url 1
    __slots__ = ("url",)

    def __init__(self, url=""):
        self.url = url

    def encode(self):
        out = b""
        if self.url:
            out += sized(b"\x0a", self.url.encode())
        return out

    @staticmethod
    def decode(data):
        message = SoftwareUpdate()
        for tag, value in read_fields(data):
            if tag == 10:
                message.url = utf8(value)
        return message


class OnlineRequest(Message):
    # id 1, peers 2
    __slots__ = ("id", "peers")

    def __init__(self, id="", peers=()):
        self.id = id
        self.peers = list(peers)

    def encode(self):
        out = b""
        if self.id:
            out += sized(b"\x0a", self.id.encode())
        for item in self.peers:
            out += sized(b"\x12", item.encode())
        return out

    @staticmethod
    def decode(data):
        message = OnlineRequest()
        for tag, value in read_fields(data):
            if tag == 10:
                message.id = utf8(value)
            elif tag == 18:
                message.peers.append(utf8(value))
        return message


class OnlineResponse(Message):
    # states 1
    __slots__ = ("states",)

    def __init__(self, states=b""):
        self.states = states

    def encode(self):
        out = b""
        if self.states:
            out += sized(b"\x0a", self.states)
        return out

    @staticmethod
    def decode(data):
        message = OnlineResponse()
        for tag, value in read_fields(data):
            if tag == 10:
                message.states = value
        return message


class KeyExchange(Message):
    # keys 1
    __slots__ = ("keys",)

    def __init__(self, keys=()):
        self.keys = list(keys)

    def encode(self):
        out = b""
        for item in self.keys:
            out += sized(b"\x0a", item)
        return out

    @staticmethod
    def decode(data):
        message = KeyExchange()
        for tag, value in read_fields(data):
            if tag == 10:
                message.keys.append(value)
        return message


class HealthCheck(Message):
    # token 1
    __slots__ = ("token",)

    def __init__(self, token=""):
        self.token = token

    def encode(self):
        out = b""
        if self.token:
            out += sized(b"\x0a", self.token.encode())
        return out

    @staticmethod
    def decode(data):
        message = HealthCheck()
        for tag, value in read_fields(data):
            if tag == 10:
                message.token = utf8(value)
        return message


class HeaderEntry(Message):
    # name 1, value 2
    __slots__ = ("name", "value")

    def __init__(self, name="", value=""):
        self.name = name
        self.value = value

    def encode(self):
        out = b""
        if self.name:
            out += sized(b"\x0a", self.name.encode())
        if self.value:
            out += sized(b"\x12", self.value.encode())
        return out

    @staticmethod
    def decode(data):
        message = HeaderEntry()
        for tag, value in read_fields(data):
            if tag == 10:
                message.name = utf8(value)
            elif tag == 18:
                message.value = utf8(value)
        return message


class HttpProxyRequest(Message):
    # method 1, path 2, headers 3, body 4
    __slots__ = ("method", "path", "headers", "body")

    def __init__(self, method="", path="", headers=(), body=b""):
        self.method = method
        self.path = path
        self.headers = list(headers)
        self.body = body

    def encode(self):
        out = b""
        if self.method:
            out += sized(b"\x0a", self.method.encode())
        if self.path:
            out += sized(b"\x12", self.path.encode())
        for item in self.headers:
            out += sized(b"\x1a", item.encode())
        if self.body:
            out += sized(b"\x22", self.body)
        return out

    @staticmethod
    def decode(data):
        message = HttpProxyRequest()
        for tag, value in read_fields(data):
            if tag == 10:
                message.method = utf8(value)
            elif tag == 18:
                message.path = utf8(value)
            elif tag == 26:
                message.headers.append(HeaderEntry.decode(value))
            elif tag == 34:
                message.body = value
        return message


class HttpProxyResponse(Message):
    # status 1, headers 2, body 3, error 4
    __slots__ = ("status", "headers", "body", "error")

    def __init__(self, status=0, headers=(), body=b"", error=""):
        self.status = status
        self.headers = list(headers)
        self.body = body
        self.error = error

    def encode(self):
        out = b""
        if self.status:
            out += b"\x08" + varint(self.status)
        for item in self.headers:
            out += sized(b"\x12", item.encode())
        if self.body:
            out += sized(b"\x1a", self.body)
        if self.error:
            out += sized(b"\x22", self.error.encode())
        return out

    @staticmethod
    def decode(data):
        message = HttpProxyResponse()
        for tag, value in read_fields(data):
            if tag == 8:
                message.status = int32(value)
            elif tag == 18:
                message.headers.append(HeaderEntry.decode(value))
            elif tag == 26:
                message.body = value
            elif tag == 34:
                message.error = utf8(value)
        return message


class PeerDiscovery(Message):
    # cmd 1, mac 2, id 3, username 4, hostname 5, platform 6, misc 7
    __slots__ = ("cmd", "mac", "id", "username", "hostname", "platform", "misc")

    def __init__(self, cmd="", mac="", id="", username="", hostname="", platform="",
                 misc=""):
        self.cmd = cmd
        self.mac = mac
        self.id = id
        self.username = username
        self.hostname = hostname
        self.platform = platform
        self.misc = misc

    def encode(self):
        out = b""
        if self.cmd:
            out += sized(b"\x0a", self.cmd.encode())
        if self.mac:
            out += sized(b"\x12", self.mac.encode())
        if self.id:
            out += sized(b"\x1a", self.id.encode())
        if self.username:
            out += sized(b"\x22", self.username.encode())
        if self.hostname:
            out += sized(b"\x2a", self.hostname.encode())
        if self.platform:
            out += sized(b"\x32", self.platform.encode())
        if self.misc:
            out += sized(b"\x3a", self.misc.encode())
        return out

    @staticmethod
    def decode(data):
        message = PeerDiscovery()
        for tag, value in read_fields(data):
            if tag == 10:
                message.cmd = utf8(value)
            elif tag == 18:
                message.mac = utf8(value)
            elif tag == 26:
                message.id = utf8(value)
            elif tag == 34:
                message.username = utf8(value)
            elif tag == 42:
                message.hostname = utf8(value)
            elif tag == 50:
                message.platform = utf8(value)
            elif tag == 58:
                message.misc = utf8(value)
        return message


class IdPk(Message):
    # id 1, pk 2, dtls_fingerprint 3
    __slots__ = ("id", "pk", "dtls_fingerprint")

    def __init__(self, id="", pk=b"", dtls_fingerprint=""):
        self.id = id
        self.pk = pk
        self.dtls_fingerprint = dtls_fingerprint

    def encode(self):
        out = b""
        if self.id:
            out += sized(b"\x0a", self.id.encode())
        if self.pk:
            out += sized(b"\x12", self.pk)
        if self.dtls_fingerprint:
            out += sized(b"\x1a", self.dtls_fingerprint.encode())
        return out

    @staticmethod
    def decode(data):
        message = IdPk()
        for tag, value in read_fields(data):
            if tag == 10:
                message.id = utf8(value)
            elif tag == 18:
                message.pk = value
            elif tag == 26:
                message.dtls_fingerprint = utf8(value)
        return message


#: What a payload may hold: the members of RendezvousMessage by field number.
UNION = {
    6: RegisterPeer,
    7: RegisterPeerResponse,
    8: PunchHoleRequest,
    9: PunchHole,
    10: PunchHoleSent,
    11: PunchHoleResponse,
    12: FetchLocalAddr,
    13: LocalAddr,
    14: ConfigUpdate,
    15: RegisterPk,
    16: RegisterPkResponse,
    17: SoftwareUpdate,
    18: RequestRelay,
    19: RelayResponse,
    20: TestNatRequest,
    21: TestNatResponse,
    22: PeerDiscovery,
    23: OnlineRequest,
    24: OnlineResponse,
    25: KeyExchange,
    26: HealthCheck,
    27: HttpProxyRequest,
    28: HttpProxyResponse,
    29: IceCandidate,
}

#: The tag that a message has in a payload, by class.
UNION_TAGS = {member: varint(number << 3 | 2) for number, member in UNION.items()}


def encode_message(message):
    """The payload that holds this message; an empty message is written too."""
    return sized(UNION_TAGS[type(message)], message.encode())


def decode_message(data):
    """The message in a payload; None if it is empty or of a later protocol."""
    message = None
    for tag, value in read_fields(data):
        member = UNION.get(tag >> 3)
        if member and tag & 2:
            message = member.decode(value)
    return message


# -- end of generated code, sha256 115c0d030bb62e92 --


# == 5. Frames and addresses ===================================================
#
# Addresses are normalised once, where they enter: an IPv4 address in IPv6
# dress becomes IPv4.  On the wire they are mangled, so that NAT gateways do
# not find and rewrite them.  Frames are cut from a TCP stream by a length
# header of one to four bytes.  And texts of strangers are made fit to be shown.
#
# Uses: Constants, Refusals.


#: Networks that the internet does not route, carriers' NAT included (RFC
#: 6890).
PRIVATE_NETWORKS = tuple(map(ipaddress.ip_network, (
    "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
    "192.168.0.0/16", "::1/128", "fc00::/7", "fe80::/10")))


class Address(collections.namedtuple("Address", "ip port")):
    """Where something is: a normalised IP address as text, and a port."""

    __slots__ = ()

    def __str__(self):
        ip = f"[{self.ip}]" if ":" in self.ip else self.ip
        return f"{ip}:{self.port}"

    @property
    def is_ipv6(self):
        return ":" in self.ip

    @property
    def is_loopback(self):
        return is_loopback(self.ip)


def printable(text):
    """A text in which what would not be seen, or would be obeyed by a terminal, is
    named."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@functools.lru_cache(maxsize=4096)
def normalise_ip(text):
    """Undress an IPv4 address that an IPv6 socket shows as ::ffff:a.b.c.d."""
    if not text.startswith("::"):
        return text
    if text.startswith("::ffff:") and text.count(":") == 3 and "." in text:
        return text[7:]
    packed = ipaddress.IPv6Address(text.partition("%")[0]).packed
    dressed = packed[:12] in (bytes(12), bytes(10) + b"\xff\xff")
    if dressed and text not in ("::1", "::"):
        return ".".join(map(str, packed[12:]))
    return text


def address_of(sockaddr):
    """The `Address` of a socket call's result; a link-local one keeps its
    scope."""
    ip = normalise_ip(sockaddr[0])
    if len(sockaddr) == 4 and sockaddr[3] and "%" not in ip:
        ip = f"{ip}%{sockaddr[3]}"
    return Address(ip, sockaddr[1])


@functools.lru_cache(maxsize=4096)
def packed_ip(ip):
    """The 4 or 16 octets of a normalised IP text."""
    if ":" in ip:
        return ipaddress.IPv6Address(ip.partition("%")[0]).packed
    return bytes(map(int, ip.split(".")))


def network_key(ip):
    """What counts as one place: an IPv4 address, or an IPv6 /64."""
    return packed_ip(ip)[:8] if ":" in ip else ip


def is_loopback(ip):
    """Whether a normalised IP address is this machine's own."""
    return ip.startswith("127.") or ip == "::1"


def is_within(ip, networks):
    """Whether a normalised IP address lies in one of these networks."""
    address = ipaddress.ip_address(ip.partition("%")[0])
    return any(address in network for network in networks)


@functools.lru_cache(maxsize=4096)
def is_private(ip):
    """Whether an IP address can only be reached from its own network."""
    return is_within(ip, PRIVATE_NETWORKS)


def is_public_ipv6(address):
    """Whether an address is global unicast IPv6, as peers give theirs."""
    return address.is_ipv6 and packed_ip(address.ip)[0] >> 5 == 1  # 2000::/3


def mangle(address, nonce):
    """Give an address the form that travels in `socket_addr`.

    `nonce` is 32 bits of the caller's choice; receivers return them unread.
    IPv4 gives up to 11 bytes; IPv6 is not mangled, gives 18 and has no room
    for it.
    """
    octets, port = packed_ip(address.ip), address.port
    if len(octets) == 16:
        return octets + port.to_bytes(2, "little")
    ip = int.from_bytes(octets, "little")
    value = (ip + nonce) << 49 | nonce << 17 | port + (nonce & 0xFFFF)
    return value.to_bytes(16, "little").rstrip(b"\0")


def unmangle(data):
    """Decode a mangled address as clients do: wrapping, never failing."""
    if len(data) == 18:
        ip = str(ipaddress.IPv6Address(bytes(data[:16])))
        return Address(ip, int.from_bytes(data[16:], "little"))
    if len(data) > 16:
        return Address("::", 0)
    value = int.from_bytes(data, "little")
    nonce = value >> 17 & 0xFFFFFFFF
    ip = (value >> 49) - nonce & 0xFFFFFFFF
    port = (value & 0xFFFFFF) - (nonce & 0xFFFF) & 0xFFFF
    return Address(".".join(map(str, ip.to_bytes(4, "little"))), port)


def unmangle_strictly(data):
    """Decode a mangled address from a stranger; refuse what no encoder
    makes."""
    value = int.from_bytes(data, "little")
    nonce = value >> 17 & 0xFFFFFFFF
    if len(data) > 16 and len(data) != 18:
        raise Refused(Refusal.MALFORMED, f"an address of {len(data)} bytes")
    if len(data) <= 16 and not (
        0 <= (value >> 49) - nonce < 1 << 32
        and 0 <= (value & 0x1FFFF) - (nonce & 0xFFFF) < 1 << 16
    ):
        raise Refused(Refusal.MALFORMED, "an address that wraps")
    address = unmangle(data)
    if not address.port:
        raise Refused(Refusal.MALFORMED, "an address without a port")
    return Address(normalise_ip(address.ip), address.port)


def frame_header(size):
    """The header of a frame of `size` bytes: its length, shortest form."""
    if size < 1 << 6:
        return bytes((size << 2,))
    length = 2 if size < 1 << 14 else 3 if size < 1 << 22 else 4
    return (size << 2 | length - 1).to_bytes(length, "little")


class LengthFraming:
    """Cuts frames from a byte stream: `receive` bytes, then `take` until None.

    A header of 1 to 4 bytes, little endian: two bits for its own length less
    one, the rest the payload's.  Payloads above `max_size` are `Refused`, but
    for an OnlineRequest, which carries a whole address book, when `books`
    allows it.
    """

    __slots__ = ("max_size", "books", "buffer", "at", "wanted")

    def __init__(self, max_size, books=False):
        self.max_size = max_size
        self.books = books
        self.buffer = b""
        self.at = 0  # where the next frame begins
        self.wanted = 1  # the size of the buffer at which it may be whole

    def receive(self, data):
        """Add bytes from the stream."""
        if self.at == len(self.buffer):
            self.buffer = data
        elif self.at or type(self.buffer) is bytes:
            self.buffer = bytearray(self.buffer[self.at:]) + data
        else:
            self.buffer += data
        self.wanted -= self.at
        self.at = 0

    @property
    def rest(self):
        """What came behind the last frame taken."""
        return bytes(self.buffer[self.at:])

    @property
    def pending(self):
        """How many bytes wait for more."""
        return len(self.buffer) - self.at

    def take(self):
        """The next whole payload as bytes, or None when more has to come."""
        buffer, at = self.buffer, self.at
        if len(buffer) < self.wanted:
            return None
        start = at + (buffer[at] & 3) + 1
        if len(buffer) < start:
            self.wanted = start
            return None
        size = int.from_bytes(buffer[at:start], "little") >> 2
        if size > self.max_size and not self.may_be_book(start, size):
            raise Refused(Refusal.TOO_LARGE, f"a frame of {size} bytes")
        end = start + size
        if len(buffer) < end:
            seen = size <= self.max_size or len(buffer) >= start + 2
            self.wanted = end if seen else start + 2
            return None
        self.at, self.wanted = end, end + 1
        return bytes(buffer[start:end])

    def may_be_book(self, start, size):
        """Whether a frame this long is an OnlineRequest, as far as can be
        seen."""
        tag = b"\xba\x01"
        seen = bytes(self.buffer[start:start + 2])
        return self.books and size <= MAX_ONLINE_REQUEST_BYTES and tag.startswith(seen)

    def wrap(self, payload):
        """A payload with its header, ready to be sent."""
        return frame_header(len(payload)) + payload

    def farewell(self):
        """What is sent before the connection ends: nothing."""
        return b""


# == 6. WebSocket and HTTP =====================================================
#
# RFC 6455 as far as a server without extensions needs it, and as much of HTTP
# as leads there; bytes in, bytes out.  One binary message is one payload.
# Before two ends are paired a `WebSocketFraming` collects whole messages;
# afterwards translators turn the bytes of one end into those of the other as
# they come.
#
# Uses: Constants, Refusals, Frames and addresses.

WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 1.3
#: Header lines: tokens and field values (RFC 9110 5.6.2 and 5.5).
FIELD_LINES = re.compile(
    rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n)*")
NONCE = re.compile(r"[A-Za-z0-9+/]{22}==")  # 16 bytes in base64 (RFC 6455 4.1)
BINARY, TEXT, CONTINUATION, CLOSE, PING, PONG = 2, 1, 0, 8, 9, 10
WHOLE_BINARY = 0x80 | BINARY  # the first byte of a message in one frame

#: Unmasking adds one of these to a quarter of the payload; made when first
#: needed.
XOR_TABLES = {}
#: From this size on four strided translations are faster than one long
#: integer.
STRIDED_BYTES = 4096


class HttpRequest(collections.namedtuple("HttpRequest", "method path headers")):
    """A request head; header names in lower case, repeated ones joined by
    commas."""

    __slots__ = ()

    @property
    def body_size(self):
        """The size of the body that follows, as far as the head tells it."""
        if self.mentions("expect", "100-continue"):
            return 0  # it is sent only if we ask for it
        text = self.headers.get("content-length", "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0

    def mentions(self, name, token):
        """Whether a comma-separated header names `token`, in any case."""
        return token in map(str.strip, self.headers.get(name, "").lower().split(","))


#: The first bytes of a header of the PROXY protocol, versions 1 and 2.
PROXY_V1, PROXY_V2 = b"PROXY ", b"\r\n\r\n\0\r\nQUIT\n"
#: The longest header of version 1, and what we take of version 2.
MAX_PROXY_V1_BYTES, MAX_PROXY_V2_BYTES = 107, 1024
HTTP_METHODS = (b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"OPTIONS ",
                b"PATCH ")


def is_tls(data):
    """Whether a connection begins with a TLS ClientHello; None if that is
    open.

    A record of type 22 and version 3, and in it a handshake message of type 1.
    """
    if not b"\x16\x03".startswith(data[:2]):
        return False
    return data[5] == 1 if len(data) >= 6 else None


def is_proxy_header(data):
    """Whether a connection begins with the PROXY protocol; None if that is
    open."""
    for prefix in PROXY_V1, PROXY_V2:
        if data.startswith(prefix):
            return True
        if prefix.startswith(data):
            return None
    return False


def parse_proxy_header(data):
    """The client's `Address` (None if the proxy speaks for itself) and the
    header's size; None if it goes on."""
    if data.startswith(PROXY_V2):
        return parse_proxy_v2(data)
    end = data.find(b"\r\n", 0, MAX_PROXY_V1_BYTES)
    if end < 0:
        if len(data) >= MAX_PROXY_V1_BYTES:
            raise Refused(Refusal.BAD_PROXY_HEADER, "version 1, without an end")
        return None
    words = data[:end].decode("ascii", "replace").split(" ")
    if words[1] == "UNKNOWN":
        return None, end + 2
    try:
        _, family, client, ours, port, our_port = words
        kind = {"TCP4": ipaddress.IPv4Address, "TCP6": ipaddress.IPv6Address}[family]
        ip, _ = str(kind(client)), kind(ours)
        ports = [p for p in (port, our_port) if p.isascii() and p.isdigit()]
        if len(ports) != 2 or max(map(int, ports)) > 65535:
            raise ValueError("a port")
    except (KeyError, ValueError):
        raise Refused(Refusal.BAD_PROXY_HEADER, ascii(words)) from None
    return Address(normalise_ip(ip), int(port)), end + 2


def parse_proxy_v2(data):
    """The same for the binary version 2."""
    if len(data) < 16:
        return None
    size = 16 + int.from_bytes(data[14:16], "big")
    if size > MAX_PROXY_V2_BYTES or data[12] not in (0x20, 0x21):
        raise Refused(Refusal.BAD_PROXY_HEADER, "version 2, of a size or kind unknown")
    if len(data) < size:
        return None
    width = {0x11: 4, 0x21: 16}.get(data[13])  # TCP over IPv4, over IPv6
    if data[12] == 0x20 or width is None:  # the proxy itself, or no address
        return None, size
    if size < 16 + 2 * width + 4:
        raise Refused(Refusal.BAD_PROXY_HEADER, "version 2, cut short")
    ip = str(ipaddress.ip_address(bytes(data[16:16 + width])))
    port = int.from_bytes(data[16 + 2 * width:18 + 2 * width], "big")
    return Address(normalise_ip(ip), port), size


def header_ip(request, is_trusted):
    """The client's IP as a trusted proxy's headers tell it, or None.

    X-Real-IP is one address.  X-Forwarded-For is a list to which every proxy
    adds whom it heard: the last element that is no proxy of ours is the
    client.  A proxy that sets one may pass a forged other one through: then
    they differ, and neither is believed.
    """
    real = last_stranger(request.headers.get("x-real-ip", ""), is_trusted)
    listed = last_stranger(request.headers.get("x-forwarded-for", ""), is_trusted)
    if real is None or listed is None:
        return real or listed
    if is_trusted(real):  # a proxy behind a proxy sees only that one
        return real if is_trusted(listed) else listed
    return real if listed == real else None


def last_stranger(text, is_trusted):
    """The last address of a list that is none of our proxies'; None if it is
    bad."""
    found = None
    for word in reversed(text.split(",")):
        found = plain_ip(word.strip())
        if found is None or not is_trusted(found):
            break
    return found


def plain_ip(text):
    """The normalised IP of `a.b.c.d`, `a.b.c.d:port`, `v6` or `[v6]:port`, or
    None."""
    if text.startswith("["):
        text, bracket, _ = text[1:].partition("]")
        text = text if bracket else ""
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        return normalise_ip(str(ipaddress.ip_address(text)))
    except ValueError:
        return None


def parse_request_head(data):
    """The `HttpRequest` at the start of `data` and its size, or None if it
    goes on.

    Refuses heads above MAX_HTTP_HEAD_BYTES and what RFC 9112 calls invalid.
    """
    end = data.find(b"\r\n\r\n", 0, MAX_HTTP_HEAD_BYTES)
    if end < 0:
        if len(data) >= MAX_HTTP_HEAD_BYTES:
            raise Refused(Refusal.TOO_LARGE, "an HTTP request head")
        return None
    first, _, lines = bytes(data[:end + 2]).partition(b"\r\n")
    words = first.decode("latin-1").split(" ")
    if len(words) != 3 or words[2] not in ("HTTP/1.1", "HTTP/1.0"):
        raise Refused(Refusal.BAD_HTTP, "not a request line")
    if not FIELD_LINES.fullmatch(lines):
        raise Refused(Refusal.BAD_HTTP, "not a header line")
    headers = {}
    for line in lines.decode("latin-1").split("\r\n")[:-1]:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return HttpRequest(words[0], words[1], headers), end + 4


def http_response(status, text="", *fields, kind="text/plain"):
    """A complete response that ends the connection."""
    body = text.encode() + b"\n" if text else b""
    fields += (f"Content-Type: {kind}; charset=utf-8", "Connection: close")
    fields += (f"Content-Length: {len(body)}",)
    return "\r\n".join((f"HTTP/1.1 {status}", *fields, "", "")).encode("ascii") + body


def wants_websocket(request):
    """Whether a request asks to become a WebSocket at all."""
    return request.mentions("upgrade", "websocket")


def answer_handshake(request):
    """The response that makes a connection a WebSocket (RFC 6455 4.2), or a
    refusal.

    Returns (response, accepted).
    """
    headers = request.headers
    if request.method != "GET" or not request.mentions("connection", "upgrade"):
        return http_response("400 Bad Request", "not a WebSocket handshake"), False
    if headers.get("sec-websocket-version", "").strip() != "13":
        version = "Sec-WebSocket-Version: 13"
        return http_response("426 Upgrade Required", "version 13 only", version), False
    key = headers.get("sec-websocket-key", "")
    if not NONCE.fullmatch(key):
        return http_response("400 Bad Request", "bad Sec-WebSocket-Key"), False
    head = (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Accept: ")
    return head + accept_value(key.encode()) + b"\r\n\r\n", True


def accept_value(key):
    """What proves that a Sec-WebSocket-Key was understood (RFC 6455 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key + WEBSOCKET_GUID).digest())


def unmask(payload, mask):
    """XOR a payload with its 4-byte mask repeated (RFC 6455 5.3)."""
    size = len(payload)
    if size < STRIDED_BYTES:
        repeated = (mask * (size // 4 + 1))[:size]
        plain = int.from_bytes(payload, "little") ^ int.from_bytes(repeated, "little")
        return plain.to_bytes(size, "little")
    plain, payload = bytearray(size), bytes(payload)
    for i in range(4):
        plain[i::4] = payload[i::4].translate(xor_table(mask[i]))
    return plain


def xor_table(key):
    """The translation that adds `key` to every byte."""
    if key not in XOR_TABLES:
        XOR_TABLES[key] = bytes(value ^ key for value in range(256))
    return XOR_TABLES[key]


def websocket_header(size, opcode=BINARY, final=True):
    """The header of an unmasked frame, as servers send it (RFC 6455 5.2)."""
    first = opcode | final << 7
    if size < 126:
        return bytes((first, size))
    if size < 1 << 16:
        return bytes((first, 126)) + size.to_bytes(2, "big")
    return bytes((first, 127)) + size.to_bytes(8, "big")


@functools.lru_cache
def close_frame(code=1000):
    """A Close frame with its status code (RFC 6455 7.4.1)."""
    return websocket_header(2, CLOSE) + code.to_bytes(2, "big")


def close_answer(payload):
    """The Close frame that answers one (RFC 6455 5.5.1): same code, if a legal
    one."""
    code = int.from_bytes(payload[:2], "big") if payload else 1000
    legal = 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999
    return close_frame(code if legal else 1002)


def parse_frame_header(data, at, in_message):
    """The header of a client's frame at `data[at:]`, or None if it goes on.

    Returns (whether it is the last of its message, opcode, payload size, mask, where
    the payload begins): a plain tuple, since a named one costs as much as the rest.
    `in_message` says whether a fragmented message is open.  Refuses what RFC
    6455 5.1 to 5.5 forbids: no mask, reserved bits, unknown opcodes, long or
    fragmented control frames, continuations of nothing.
    """
    if len(data) - at < 2:
        return None
    first, second = data[at], data[at + 1]
    opcode, final, size = first & 15, first > 127, second & 127
    if first & 0x70 or second < 128:
        raise Refused(Refusal.BAD_WEBSOCKET, "an unmasked frame or a reserved bit")
    if opcode >= CLOSE:
        if opcode > PONG or not final or size > 125:
            raise Refused(Refusal.BAD_WEBSOCKET, "a control frame that is none")
    elif opcode > BINARY or (opcode == CONTINUATION) != in_message:
        raise Refused(Refusal.BAD_WEBSOCKET, f"opcode {opcode} out of place")
    start = at + (2 if size < 126 else 4 if size == 126 else 10)
    if len(data) < start + 4:
        return None
    if size > 125:
        size = int.from_bytes(data[at + 2:start], "big")
    return final, opcode, size, bytes(data[start:start + 4]), start + 4


class WebSocketFraming:
    """Collects binary messages: `receive` bytes, then `take` until None.

    Text messages are skipped, pings answered: `outgoing` holds what has to be
    sent for that.  After the other side's Close `closed` is true and nothing
    is taken. Messages above `max_size`, fragments together, are `Refused`.
    """

    __slots__ = ("max_size", "buffer", "at", "wanted", "message", "opcode", "outgoing",
                 "closed", "skimmed", "open", "idle")

    def __init__(self, max_size, books=False):
        self.max_size = max(max_size, MAX_ONLINE_REQUEST_BYTES if books else 0)
        self.buffer, self.at, self.wanted = bytearray(), 0, 1
        self.message, self.opcode = bytearray(), None
        self.outgoing, self.closed = b"", False
        self.skimmed, self.open = 0, False  # where `skim` is, and within a message
        self.idle = 0  # frames since the last message

    def receive(self, data):
        """Add bytes from the stream."""
        if self.at:
            del self.buffer[:self.at]
            self.wanted -= self.at
            self.at = 0
        self.buffer += data

    @property
    def rest(self):
        """What came behind the last message taken."""
        return bytes(self.buffer[self.at:])

    @property
    def pending(self):
        """How many bytes wait for more."""
        return len(self.buffer) - self.at + len(self.message)

    def take(self):
        """The next whole message as bytes, or None when more has to come."""
        while len(self.buffer) >= self.wanted and not self.closed:
            header = parse_frame_header(self.buffer, self.at, self.opcode is not None)
            if header is None:
                self.wanted = len(self.buffer) + 1
                return None
            final, opcode, size, mask, start = header
            if opcode < CLOSE and len(self.message) + size > self.max_size:
                raise Refused(Refusal.TOO_LARGE, (
                    f"a message of {len(self.message) + size} bytes"))
            end = start + size
            if len(self.buffer) < end:
                self.wanted = end
                return None
            payload = bytes(unmask(self.buffer[start:end], mask))
            self.at, self.wanted = end, end + 1
            if final and opcode == BINARY:  # whole in one frame, as nearly all are
                self.idle = 0
                return payload
            message = self.add(final, opcode, payload)
            self.idle += 1
            if message is not None:
                self.idle = 0
                return message
            if self.idle > MAX_IDLE_FRAMES:
                raise Refused(Refusal.BAD_WEBSOCKET, "so many frames and no message")
        return None

    def add(self, final, opcode, payload):
        """Take a frame in; the message that it completes, if it is a binary
        one."""
        if opcode >= CLOSE:
            self.on_control(opcode, payload)
            return None
        if opcode != CONTINUATION:
            self.opcode = opcode
        self.message += payload
        if not final:
            return None
        message, opcode = bytes(self.message), self.opcode
        self.message, self.opcode = bytearray(), None
        return message if opcode == BINARY else None

    def skim(self):
        """Answer control frames and take them out, but leave all messages
        where they are: their time has not come.  Nothing more may be taken
        then."""
        self.receive(b"")
        while not self.closed:
            header = parse_frame_header(self.buffer, self.skimmed, self.open)
            if header is None:
                return
            final, opcode, size, mask, start = header
            end = start + size
            if len(self.buffer) < end:
                return
            if opcode >= CLOSE:
                self.on_control(opcode, bytes(unmask(self.buffer[start:end], mask)))
                del self.buffer[self.skimmed:end]
            else:
                self.skimmed, self.open = end, not final

    def on_control(self, opcode, payload):
        """Answer a ping with a pong, a Close with a Close (RFC 6455 5.5)."""
        if opcode == PING:
            # Only the latest ping needs an answer (RFC 6455 5.5.3).
            self.outgoing = websocket_header(len(payload), PONG) + payload
        elif opcode == CLOSE:
            self.outgoing, self.closed = close_answer(payload), True

    def wrap(self, payload):
        """A payload as one binary message, ready to be sent."""
        return websocket_header(len(payload)) + payload

    def farewell(self):
        """What is sent before we end the connection: a Close, once."""
        return b"" if self.closed else close_frame()


class Translator:
    """Turns what one end of a session sends into what the other end reads.

    `translate` takes bytes as they come and gives bytes at once; headers are
    translated when they are whole, payloads follow in pieces.  `left` is what
    the frame under way to the reader still lacks: only at 0 may a control
    frame be put between (`insert`).
    """

    __slots__ = ("rest", "left", "to_websocket", "more", "continued", "control",
                 "answer", "closed", "collected")

    def __init__(self, to_websocket):
        self.to_websocket = to_websocket
        self.answer = b""  # what the sender must be told: a pong, or its Close
        self.collected = b""  # of a message that must be whole first
        self.closed = False  # whether the sender has said Close
        self.rest = b""  # the start of a header that goes on
        self.left = 0  # bytes of the frame under way that the reader still lacks
        self.more = 0  # bytes of the same message that need a frame of their own
        self.continued = False  # the next frame to the reader continues a message
        self.control = b""  # a control frame that waits for `left` to become 0

    def begin(self, size, final=True):
        """The header(s) that announce `size` more bytes of a message."""
        if not self.to_websocket:
            self.left = size
            return frame_header(size)
        part = min(size, MAX_WEBSOCKET_FRAME_BYTES)
        opcode = CONTINUATION if self.continued else BINARY
        last = final and part == size
        self.left, self.more, self.continued = part, size - part, not last
        return websocket_header(part, opcode, last)

    def translate(self, data):
        """Bytes for the reader; `Refused` for what RFC 6455 or our limits
        forbid, and with it, as `passed`, what came before that."""
        if data and self.is_between_messages():
            message = self.whole_message(data)
            if message is not None:
                return message
        if self.rest:
            data, self.rest = self.rest + bytes(data), b""
        out = []
        try:
            self.translate_into(out, data)
        except Refused as refused:
            refused.passed = b"".join(out)
            raise
        return b"".join(out)

    def is_between_messages(self):
        """Whether nothing has begun that is not complete."""
        return not (self.rest or self.left or self.more or self.control)

    def insert(self, frame):
        """Put a control frame into the stream: what can be sent of it now."""
        if self.left or self.more:
            self.control = frame
            return b""
        return frame

    def at_boundary(self, final):
        """What follows a complete frame: the rest of its message, or a
        control."""
        released, self.control = self.control, b""
        if self.more:
            return released + self.begin(self.more, final)
        return released


class FrameTranslator(Translator):
    """From an end that sends RustDesk frames to one that reads WebSocket
    messages."""

    __slots__ = ()

    def whole_message(self, data):
        """The message that `data` are, whole and alone, as in a quick exchange
        nearly all are; None if they are something else.

        Skips the state between pieces: 0.7 us instead of 1.3 for 100 bytes, 2.2
        instead of 3.3 the other way.
        """
        start = (data[0] & 3) + 1
        size = int.from_bytes(data[:start], "little") >> 2
        if start + size != len(data):
            return None
        return websocket_header(size) + data[start:]

    def translate_into(self, out, data):
        """Append what the reader gets; `Refused` above MAX_MESSAGE_BYTES."""
        at, end = 0, len(data)
        left = self.left
        while at < end:
            if left:
                after = min(at + left, end)
                out.append(data[at:after])
                self.left = left = left - (after - at)
                at = after
                if not left and (self.more or self.control):
                    out.append(self.at_boundary(True))
                    left = self.left
                continue
            start = at + (data[at] & 3) + 1
            if start > end:
                self.rest = bytes(data[at:])
                break
            size = int.from_bytes(data[at:start], "little") >> 2
            if size > MAX_MESSAGE_BYTES:
                raise Refused(Refusal.TOO_LARGE, f"a message of {size} bytes")
            at = start
            out.append(self.begin(size))
            left = self.left


class WebSocketTranslator(Translator):
    """From a WebSocket end to one that reads WebSocket messages or RustDesk
    frames.

    A fragmented message towards a TCP end has to be collected, since its frame
    header comes first; everything else passes at once.  Text messages are
    skipped.
    """

    __slots__ = ("incoming", "mask", "opcode", "final", "size", "collecting")

    def __init__(self, to_websocket):
        super().__init__(to_websocket)
        self.incoming = 0  # bytes of the sender's frame that have not come yet
        self.mask = b""  # its mask, turned to the next byte
        self.opcode = None  # the kind of the open message, control frames aside
        self.final = True  # whether the frame under way is the last of its message
        self.size = 0  # of the open message, as far as its headers have told
        self.collecting = False  # whether the open message waits for its end
        self.collected = bytearray()

    def is_between_messages(self):
        """Whether nothing has begun that is not complete, or ended."""
        return (self.opcode is None and not self.closed
                and super().is_between_messages())

    def whole_message(self, data):
        """The same of a binary message in one frame."""
        header = data[0] == WHOLE_BINARY and parse_frame_header(data, 0, False)
        if not header:
            return None
        _, _, size, mask, start = header
        if start + size != len(data):
            return None
        wrap = websocket_header if self.to_websocket else frame_header
        return wrap(size) + unmask(data[start:], mask)

    def translate_into(self, out, data):
        """Append what the reader gets of frames as they come."""
        at, end = 0, len(data)
        while at < end and not self.closed:
            if self.incoming:
                after = min(at + self.incoming, end)
                self.pass_payload(data[at:after], out)
                at = after
                continue
            header = parse_frame_header(data, at, self.opcode is not None)
            if header is None or header[1] >= CLOSE and end < header[2] + header[4]:
                self.rest = bytes(data[at:])  # a control frame is taken as a whole
                break
            final, opcode, size, mask, at = header
            if opcode >= CLOSE:
                self.on_control(opcode, unmask(data[at:at + size], mask))
                at += size
            else:
                self.mask = mask
                self.begin_frame(final, opcode, size, out)

    def begin_frame(self, final, opcode, size, out):
        """A data frame begins: announce it to the reader, collect it, or skip
        it."""
        self.opcode = opcode or self.opcode
        self.incoming, self.final = size, final
        self.size += size
        if self.size > MAX_MESSAGE_BYTES:
            raise Refused(Refusal.TOO_LARGE, f"a message of {self.size} bytes")
        if not final and not self.to_websocket:
            self.collecting = True
        if self.opcode == BINARY and not self.collecting:
            out.append(self.begin(size, final))
        if not size:
            self.end_frame(out)

    def pass_payload(self, data, out):
        """Unmask a piece of payload, and pass it on, collect it, or skip
        it."""
        size = len(data)
        if self.opcode == BINARY:
            plain = unmask(data, self.mask)
            if self.collecting:
                self.collected += plain
            else:
                self.pass_plain(plain, out)
        turn = size % 4
        self.mask = self.mask[turn:] + self.mask[:turn]
        self.incoming -= size
        if not self.incoming:
            self.end_frame(out)

    def pass_plain(self, plain, out):
        """Payload for the reader, cut where its frames have to end."""
        while len(plain) > self.left:
            out.append(plain[:self.left])
            plain = plain[self.left:]
            self.left = 0
            out.append(self.at_boundary(self.final))
        out.append(plain)
        self.left -= len(plain)
        if self.control and not self.left and not self.more:
            out.append(self.at_boundary(self.final))

    def end_frame(self, out):
        """The sender's frame is complete, and with the last one its
        message."""
        if not self.final:
            return
        if self.collecting and self.opcode == BINARY:
            out.append(self.begin(len(self.collected)))
            out.append(self.collected)
            self.left, self.collected = 0, bytearray()
        self.opcode, self.size, self.collecting = None, 0, False

    def on_control(self, opcode, payload):
        """A ping wants its pong, a Close ends the session; a pong wants
        nothing."""
        if opcode == PING:
            self.answer = websocket_header(len(payload), PONG) + payload
        elif opcode == CLOSE:
            self.answer, self.closed = close_answer(payload), True


# == 7. Keys ===================================================================
#
# One Ed25519 key pair is the server's identity: clients are given its public
# half and believe no peer's key that it has not signed.  The files are those
# of the official server.  They are created exclusively, never overwritten, and
# a key that was asked for and cannot be had stops the start.
#
# Uses: Constants, Refusals, Messages.

ED25519_PRIME = 2**255 - 19
ED25519_ORDER = 2**252 + 27742317777372353535851937790883648493
ED25519_D = -121665 * pow(121666, -1, ED25519_PRIME) % ED25519_PRIME
ED25519_BASE = (
    15112221349535400772501151409588531511454012693041857206046113283949847762202,
    46316835694926478169428394003475163141307993866256225615783033603165251855960,
)
X25519_BASE = (9).to_bytes(32, "little")
SALSA20_CONSTANT = struct.unpack("<4I", b"expand 32-byte k")
#: The quarter rounds of a double round: four columns, then four rows.
SALSA20_QUARTERS = (
    (0, 4, 8, 12), (5, 9, 13, 1), (10, 14, 2, 6), (15, 3, 7, 11),
    (0, 1, 2, 3), (5, 6, 7, 4), (10, 11, 8, 9), (15, 12, 13, 14))
#: Multiples of the base point, 64 rows of 15; made when the first key is
#: needed.
ED25519_ROWS = []


def add_points(p, q):
    """The sum of two points in extended coordinates (RFC 8032 5.1.4)."""
    prime = ED25519_PRIME
    a = (p[1] - p[0]) * (q[1] - q[0]) % prime
    b = (p[1] + p[0]) * (q[1] + q[0]) % prime
    c = 2 * ED25519_D * p[3] * q[3] % prime
    d = 2 * p[2] * q[2] % prime
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % prime, g * h % prime, f * g % prime, e * h % prime


def base_rows():
    """Row i holds 1 to 15 times 16**i times the base point."""
    if not ED25519_ROWS:
        x, y = ED25519_BASE
        point = (x, y, 1, x * y % ED25519_PRIME)
        for _ in range(64):
            row = list(itertools.accumulate(itertools.repeat(point, 15), add_points))
            ED25519_ROWS.append(row)
            point = add_points(row[-1], point)
    return ED25519_ROWS


def encode_point(point):
    """The 32 bytes that stand for a point (RFC 8032 5.1.2)."""
    inverse = pow(point[2], -1, ED25519_PRIME)
    x, y = point[0] * inverse % ED25519_PRIME, point[1] * inverse % ED25519_PRIME
    return (y | (x & 1) << 255).to_bytes(32, "little")


def multiply_base(scalar):
    """`scalar` times the base point, encoded."""
    point = (0, 1, 1, 0)
    for i, row in enumerate(base_rows()):
        digit = scalar >> 4 * i & 15
        if digit:
            point = add_points(point, row[digit - 1])
    return encode_point(point)


def expand_seed(seed):
    """The secret scalar and the prefix of nonces (RFC 8032 5.1.5)."""
    digest = hashlib.sha512(seed).digest()
    scalar = int.from_bytes(digest[:32], "little") & (1 << 254) - 8 | 1 << 254
    return scalar, digest[32:]


def built_in_public_key(seed):
    """The Ed25519 public key of a 32-byte seed (RFC 8032 5.1.5)."""
    return multiply_base(expand_seed(seed)[0])


def built_in_sign(message, secret):
    """64 bytes of Ed25519 signature, then the message (RFC 8032 5.1.6).

    `secret` is seed and public key, 64 bytes.  Not in constant time, as
    nothing in Python is: who can measure our instructions sits on this
    machine.
    """
    scalar, prefix = expand_seed(secret[:32])
    nonce = int.from_bytes(hashlib.sha512(prefix + message).digest(), "little")
    point = multiply_base(nonce % ED25519_ORDER)
    challenge = hashlib.sha512(point + secret[32:] + message).digest()
    product = int.from_bytes(challenge, "little") * scalar
    return point + ((nonce + product) % ED25519_ORDER).to_bytes(32, "little") + message


def multiply_point(scalar, point):
    """`scalar` times any point, by doubling and adding; slow."""
    product = (0, 1, 1, 0)
    for bit in f"{scalar:b}":
        product = add_points(product, product)
        if bit == "1":
            product = add_points(product, point)
    return product


def decode_point(data):
    """The point that 32 bytes stand for (RFC 8032 5.1.3), or ValueError."""
    prime, value = ED25519_PRIME, int.from_bytes(data, "little")
    sign_bit, y = value >> 255, value & (1 << 255) - 1
    square = (y * y - 1) * pow(ED25519_D * y * y + 1, -1, prime) % prime
    x = pow(square, (prime + 3) // 8, prime)
    if x * x % prime != square:
        x = x * pow(2, (prime - 1) // 4, prime) % prime
    if y >= prime or x * x % prime != square or not x and sign_bit:
        raise ValueError("no point of the curve")
    if x & 1 != sign_bit:
        x = prime - x
    return x, y, 1, x * y % prime


def is_signed_by(public, data):
    """Whether 64 bytes of signature before a message are of this key (RFC 8032
    5.1.7)."""
    challenge = hashlib.sha512(data[:32] + public + data[64:]).digest()
    scalar = int.from_bytes(data[32:64], "little")
    if len(data) < 64 or scalar >= ED25519_ORDER:
        return False
    try:
        product = multiply_point(
            int.from_bytes(challenge, "little") % ED25519_ORDER, decode_point(public))
        total = add_points(decode_point(data[:32]), product)
    except ValueError:
        return False
    return multiply_base(scalar) == encode_point(total)


def nacl_public_key(seed):
    """The same by libsodium."""
    return nacl_bindings.crypto_sign_seed_keypair(seed)[0]


def built_in_shared_key(public, secret):
    """The key of a crypto_box: X25519 (RFC 7748 5), then HSalsa20.

    ValueError for a public key of low order, as in libsodium.
    """
    shared = x25519(secret, public)
    if not any(shared):
        raise ValueError("a public key of low order")
    return hsalsa20(shared, bytes(16))


def x25519(secret, public):
    """The Montgomery ladder of RFC 7748 5."""
    prime = ED25519_PRIME
    scalar = int.from_bytes(secret, "little") & (1 << 254) - 8 | 1 << 254
    x1 = int.from_bytes(public, "little") & (1 << 255) - 1
    x2, z2, x3, z3 = 1, 0, x1, 1
    for i in range(254, -1, -1):
        swap = scalar >> i & 1
        if swap:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a, b * b, d * a, c * b
        x3, z3 = (da + cb) ** 2 % prime, x1 * (da - cb) ** 2 % prime
        x2, z2 = aa * bb % prime, (aa - bb) * (aa + 121665 * (aa - bb)) % prime
        if swap:
            x2, z2, x3, z3 = x3, z3, x2, z2
    return (x2 * pow(z2, -1, prime) % prime if z2 else 0).to_bytes(32, "little")


def salsa20_rounds(words):
    """Twenty rounds of Salsa20 over 16 words of 32 bits."""
    x = list(words)
    for _ in range(10):
        for a, b, c, d in SALSA20_QUARTERS:
            for target, one, two, turn in (b, a, d, 7), (c, b, a, 9), (d, c, b, 13), (
                    a, d, c, 18):
                value = x[one] + x[two] & 0xFFFFFFFF
                x[target] ^= (value << turn | value >> 32 - turn) & 0xFFFFFFFF
    return x


def salsa20_input(key, block):
    """The 16 words of a key of 32 bytes and a nonce and counter of 16."""
    c, k, n = SALSA20_CONSTANT, struct.unpack("<8I", key), struct.unpack("<4I", block)
    return (c[0], *k[:4], c[1], *n, c[2], *k[4:], c[3])


def hsalsa20(key, nonce):
    """A key from a key and a nonce of 16 bytes, without the final addition."""
    x = salsa20_rounds(salsa20_input(key, nonce))
    return struct.pack("<8I", *(x[i] for i in (0, 5, 10, 15, 6, 7, 8, 9)))


def xsalsa20(key, nonce, size):
    """`size` bytes of the key stream for a nonce of 24 bytes."""
    key, stream = hsalsa20(key, nonce[:16]), []
    for counter in range((size + 63) // 64):
        words = salsa20_input(key, nonce[16:] + counter.to_bytes(8, "little"))
        mixed = zip(words, salsa20_rounds(words))
        stream.append(struct.pack("<16I", *((a + b) & 0xFFFFFFFF for a, b in mixed)))
    return b"".join(stream)[:size]


def poly1305(key, message):
    """The 16-byte tag of a message under a one-time key (RFC 8439 2.5)."""
    r = int.from_bytes(key[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    total = 0
    for i in range(0, len(message), 16):
        part = int.from_bytes(message[i:i + 16] + b"\1", "little")
        total = (total + part) * r % (2**130 - 5)
    total += int.from_bytes(key[16:], "little")
    return (total & 2**128 - 1).to_bytes(16, "little")


def built_in_seal(message, nonce, key):
    """crypto_secretbox: a tag of 16 bytes, then the message encrypted."""
    stream = xsalsa20(key, nonce, 32 + len(message))
    sealed = xor(message, stream[32:])
    return poly1305(stream[:32], sealed) + sealed


def built_in_open(sealed, nonce, key):
    """The message in a crypto_secretbox; ValueError if it is not ours."""
    tag, sealed = sealed[:16], sealed[16:]
    stream = xsalsa20(key, nonce, 32 + len(sealed))
    if not hmac.compare_digest(poly1305(stream[:32], sealed), tag):
        raise ValueError("the tag does not fit")
    return xor(sealed, stream[32:])


def xor(one, two):
    """Two byte strings of one size, added bit by bit."""
    number = int.from_bytes(one, "little") ^ int.from_bytes(two, "little")
    return number.to_bytes(len(one), "little")


def nacl_shared_key(public, secret):
    """The same by libsodium."""
    try:
        return nacl_bindings.crypto_box_beforenm(public, secret)
    except CryptoError as error:
        raise ValueError(str(error)) from None


def nacl_open(sealed, nonce, key):
    """The same by libsodium."""
    try:
        return nacl_bindings.crypto_secretbox_open(sealed, nonce, key)
    except CryptoError as error:
        raise ValueError(str(error)) from None


if nacl_bindings:
    public_key_of, sign = nacl_public_key, nacl_bindings.crypto_sign
    seal = nacl_bindings.crypto_secretbox
    shared_key, unseal = nacl_shared_key, nacl_open
else:
    public_key_of, sign = built_in_public_key, built_in_sign
    shared_key, seal, unseal = built_in_shared_key, built_in_seal, built_in_open


def decode_base64(text, size):
    """`size` bytes from standard base64 with padding, or ValueError."""
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except ValueError:
        raise ValueError("it is not base64, or cut short") from None
    if len(data) != size:
        raise ValueError(f"it is {len(data)} bytes long instead of {size}")
    return data


def encode_base64(data):
    """Standard base64 with padding, as text."""
    return base64.b64encode(data).decode("ascii")


def check_secret(secret):
    """ValueError unless the public half of a 64-byte secret belongs to its
    seed."""
    if public_key_of(secret[:32]) != secret[32:]:
        raise ValueError("its public half does not belong to its secret half")


def generate_secret(random_bytes):
    """A fresh 64-byte secret: seed and public key.

    Drawn again while the public key's base64 holds a slash, since people paste
    it into file names and addresses, where that hurts.
    """
    while True:
        seed = random_bytes(32)
        public = public_key_of(seed)
        if "/" not in encode_base64(public):
            return seed + public


class ServerKey:
    """What this server signs with, and what it asks of clients.

    `secret` is 64 bytes or None (then nothing is signed and sessions are
    unencrypted); `required` is the key that clients must present, "" for any;
    `accepted` are former keys, which let clients in while they are moved.
    """

    __slots__ = ("secret", "required", "accepted")

    def __init__(self, secret, required, accepted=()):
        self.secret = secret
        self.required = required
        self.accepted = accepted

    @property
    def public_text(self):
        """The public key as clients type it, or "" without one."""
        return encode_base64(self.secret[32:]) if self.secret else ""

    def fault_of(self, licence_key):
        """What is wrong with the key that a client presented: a `Refusal`, or
        None."""
        if not self.required:
            return None
        presented = licence_key.encode()
        for key in (self.required, *self.accepted):
            if hmac.compare_digest(presented, key.encode()):
                return None
        return name_wrong_key(licence_key)

    def vouches(self, licence_key):
        """Whether peers are vouched for to a client: not to one that still has
        a former key, perhaps a leaked one."""
        return licence_key == self.required or licence_key not in self.accepted

    def sign_identity(self, peer_id, public_key):
        """The signed IdPk that lets an initiator verify a peer; b"" without a
        key."""
        if self.secret is None or len(public_key) != PUBLIC_KEY_BYTES:
            return b""
        return sign(IdPk(id=peer_id, pk=public_key).encode(), self.secret)


def name_wrong_key(licence_key):
    """Which wrong key it is that a client presented."""
    if not licence_key:
        return Refusal.NO_KEY
    if licence_key == PUBLIC_SERVICE_KEY:
        return Refusal.PUBLIC_SERVICE_KEY
    return Refusal.WRONG_KEY


class ExchangeKey:
    """An X25519 key pair, and the message that offers it under our
    signature."""

    __slots__ = ("secret", "offer", "made")

    def __init__(self, server_key, random_bytes, now):
        self.secret = random_bytes(32)
        public = x25519(self.secret, X25519_BASE)
        self.offer = KeyExchange(keys=[sign(public, server_key.secret)])
        self.made = now


class SecureChannel:
    """The encryption of one connection: offered, then agreed upon.

    Both directions share the client's key; each counts its messages from 1.
    Payloads of up to one byte are heartbeats: neither encrypted nor counted.
    """

    __slots__ = ("secret", "key", "sent", "received")

    def __init__(self, exchange_key):
        self.secret = exchange_key.secret
        self.key = None  # the client's symmetric key, once it has answered
        self.sent = self.received = 0

    def agree(self, message):
        """Take the client's answer: its X25519 key, and its symmetric key in a
        box."""
        if self.key is not None:
            raise Refused(Refusal.SECURE_FAILED, "a second key exchange")
        if [len(key) for key in message.keys] != [32, 48]:
            raise Refused(Refusal.SECURE_FAILED, "keys of the wrong sizes")
        public, sealed = message.keys
        try:
            self.key = unseal(sealed, bytes(24), shared_key(public, self.secret))
        except ValueError as error:
            raise Refused(Refusal.SECURE_FAILED, f"key exchange: {error}") from None

    def open(self, payload):
        """The payload in an encrypted one."""
        if self.key is None or len(payload) <= 1:
            return payload
        self.received += 1
        if len(payload) < 16:
            raise Refused(Refusal.SECURE_FAILED, "a payload without a tag")
        try:
            return unseal(payload, self.received.to_bytes(24, "little"), self.key)
        except ValueError as error:
            raise Refused(Refusal.SECURE_FAILED, f"payload: {error}") from None

    def seal(self, payload):
        """Encrypt a payload."""
        if self.key is None or len(payload) <= 1:
            return payload
        self.sent += 1
        return seal(payload, self.sent.to_bytes(24, "little"), self.key)


def key_from_setting(text):
    """The `ServerKey` that a -k value other than "", "-" and "_" stands for.

    64 bytes of base64 are a secret key; any other text is only what clients
    must present, and nothing is signed.
    """
    try:
        secret = decode_base64(text, 64)
    except ValueError:  # binascii.Error and UnicodeEncodeError are ValueErrors
        return ServerKey(None, text)
    try:
        check_secret(secret)
    except ValueError as error:
        raise Trouble(
            f"the secret key given by -k or KEY is damaged: {error}; "
            "take it again from where it was kept") from None
    return ServerKey(secret, encode_base64(secret[32:]))


def read_key_file(directory):
    """The 64-byte secret of `id_ed25519`, or None where there is no such
    file."""
    path = os.path.join(directory, KEY_FILE)
    try:
        with open(path, "rb") as file:
            text = file.read(1024).decode("ascii", "replace").strip()
        secret = decode_base64(text, 64)
        check_secret(secret)
    except FileNotFoundError:
        if os.path.islink(path):  # to a disk that is not mounted, perhaps
            raise Trouble(f"{path} is a link to {os.readlink(path)}, which is not "
                          "there: put that back, or remove the link for a new key "
                          "(then every client needs the new key)") from None
        return None
    except OSError as error:
        raise Trouble(f"cannot read {path}: {error.strerror}; it must be readable "
                      "by the user that runs this server") from None
    except ValueError as error:
        raise Trouble(f"{path} holds no usable key: {error}; put the right file "
                      "back, or move it away for a new key (then every client "
                      "needs the new key)") from None
    return secret


def temporary_name(path):
    """A free name beside a file, for what shall take its place."""
    return f"{path}.{os.urandom(4).hex()}.new"


@contextlib.contextmanager
def new_file(path, mode, target=None):
    """A file that does not exist yet, to be written; when all went well it is on
    the disk, in the place of `target` if there is one, or else it is gone."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        if target is not None:
            os.replace(path, target)
    except BaseException:
        os.unlink(path)
        raise


def write_new_file(path, data, mode):
    """Create `path` with all its content, or leave it alone if it exists.

    Returns whether it was created.  A crash in between leaves no half file
    where the file system has hard links.
    """
    temporary = temporary_name(path)
    with new_file(temporary, mode) as file:
        file.write(data)
    try:
        return link_new_file(temporary, path, mode)
    finally:
        os.unlink(temporary)


def link_new_file(temporary, path, mode):
    """Give a finished file its name; False if the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # FAT and some network shares have no hard links
        return copy_new_file(temporary, path, mode)
    return True


def copy_new_file(source, path, mode):
    """Copy a finished file to a name that is free; False if it is taken."""
    try:
        with open(source, "rb") as file, new_file(path, mode) as copy:
            copy.write(file.read())
    except FileExistsError:
        return False
    return True


def write_in_place(path, text):
    """Replace a file of ours in one step, mode 0600; OSError leaves the old
    one."""
    with new_file(temporary_name(path), 0o600, path) as file:
        file.write(text.encode("utf-8"))


def read_ticket_secret(path):
    """The secret that an ID server shares with its relays; b"" without a
    file.

    Trouble if the file holds none.
    """
    if not path:
        return b""
    try:
        with open(path, "rb") as file:
            secret = file.read(4096).strip()
    except OSError as error:
        raise Trouble(f"cannot read {path} (--relay-secret): {error.strerror}"
                      ) from None
    if len(secret) < 16:
        raise Trouble(f"{path} (--relay-secret) must hold a secret of 16 characters "
                      "or more, the same at the ID server and at its relays; "
                      f"make one: head -c 32 /dev/urandom | base64 > {path}")
    return secret


def create_key_files(directory, random_bytes):
    """Make a key pair's files unless there are some by now; returns the
    secret.

    Both roles may be started together in one directory: the first one's key
    wins.
    """
    path = os.path.join(directory, KEY_FILE)
    secret = generate_secret(random_bytes)
    try:
        created = write_new_file(path, encode_base64(secret).encode(), 0o600)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = ("make room on its disk" if is_full else
                  "start in a directory where this user may write")
        raise Trouble(f"cannot create {path}: {error.strerror}; {remedy}") from None
    return secret if created else read_key_file(directory)


def check_public_file(directory, secret):
    """Write a missing `id_ed25519.pub`; returns a warning about a wrong one,
    or ""."""
    path = os.path.join(directory, PUBLIC_KEY_FILE)
    public = encode_base64(secret[32:])
    try:
        if not os.path.exists(path):
            write_new_file(path, public.encode(), 0o644)
        with open(path, "rb") as file:
            if file.read(1024).strip() == public.encode():
                return ""
    except OSError as error:
        return f"cannot write or read {path}: {error.strerror}; the key is {public}"
    return (f"{path} does not belong to {KEY_FILE} and was left as it is; clients "
            f"need the key {public}")


def put_public_file_aside(directory, secret):
    """A new secret came into being beside the public half of a lost one."""
    path = os.path.join(directory, PUBLIC_KEY_FILE)
    if os.path.exists(path) and check_public_file(directory, secret):
        try:
            os.replace(path, path + ".previous")
        except OSError:
            pass  # `check_public_file` warns of it


def readable_by_others(directory):
    """A warning when others on this machine can read the secret key, or ""."""
    path = os.path.join(directory, KEY_FILE)
    if os.name == "posix" and os.stat(path).st_mode & 0o077:
        return f"others on this machine can read {path}; run: chmod 600 {path}"
    return ""


def find_orphaned_store(directory):
    """The name of a state file without its key file, or None."""
    for name in STORE_FILE, OFFICIAL_STORE_FILE:
        path = os.path.join(directory, name)
        if os.path.exists(path) and os.path.getsize(path):
            return path
    return None


def load_key_files(directory, random_bytes):
    """Load the key pair of `directory`, or make one for a new server.

    Returns (secret, warnings); without `random_bytes` nothing is made, and
    secret may be None.  Trouble when it cannot be used, or when peers are
    known here but the key that they trust is gone.
    """
    secret = read_key_file(directory)
    if secret is None:
        orphan = find_orphaned_store(directory)
        if orphan:
            raise Trouble(
                f"{orphan} is here but {KEY_FILE} is not: clients trust this server "
                f"by that key.  Put {KEY_FILE} back from your backup.  If it is lost "
                f"for good, move {orphan} away: a new key is made, and every client "
                "needs it")
        if random_bytes is None:
            return None, ["there is no key yet: the first start makes one"]
        secret = create_key_files(directory, random_bytes)
        put_public_file_aside(directory, secret)
    warnings = [readable_by_others(directory)]
    path = os.path.join(directory, PUBLIC_KEY_FILE)
    if random_bytes is not None or os.path.exists(path):
        warnings.append(check_public_file(directory, secret))
    return secret, [warning for warning in warnings if warning]


def plant_key(directory, private, public):
    """Write a key that came as a setting into files that don't exist yet.

    Trouble if it is none.  Another key that is there already stays.
    """
    secret = key_to_plant(directory, private, public)
    if secret is None:
        return
    try:
        path = os.path.join(directory, KEY_FILE)
        write_new_file(path, encode_base64(secret).encode(), 0o600)
    except OSError as error:
        raise Trouble(f"cannot write the key of KEY_PRIV: {error}") from None


def key_to_plant(directory, private, public):
    """The secret of those settings, or None where nothing is to be written;
    Trouble if it is no key."""
    if not private or os.path.exists(os.path.join(directory, KEY_FILE)):
        return None
    try:
        secret = decode_base64(private.strip(), 64)
        check_secret(secret)
        if public and decode_base64(public.strip(), 32) != secret[32:]:
            raise ValueError("KEY_PUB does not belong to it")
    except ValueError as error:
        raise Trouble(f"KEY_PRIV is no usable key: {error}") from None
    return secret


def load_server_key(setting, is_relay, directory, random_bytes):
    """The `ServerKey` that the -k or KEY value asks for; returns (key,
    warnings).

    "-" or "_": the pair of the key files, required.  "": the ID server signs
    with it and admits anybody, the relay asks nothing.  Anything else: see
    `key_from_setting`.
    """
    if setting == "" and is_relay:
        return ServerKey(None, ""), []
    if setting in ("", "-", "_"):
        secret, warnings = load_key_files(directory, random_bytes)
        required = setting and secret and encode_base64(secret[32:])
        return ServerKey(secret, required), warnings
    key = key_from_setting(setting)
    if key.secret is None and not is_relay:
        return key, ["the key given by -k or KEY is a plain text: clients must present "
                     "it, but nothing is signed with it, so all sessions are "
                     "UNENCRYPTED; use -k - to have both"]
    return key, []


# == 8. Configuration ==========================================================
#
# One table of settings gives the flags, the variables, the lines of the files
# and the README's table.  Later sources win: environment, `.env`, the -c file,
# flags.  A wrong value is refused with the setting, the value, where it stands
# and what is right.
#
# Uses: Constants, Refusals, Frames and addresses, Keys.


class Setting(collections.namedtuple(
        "Setting", "name short parse default metavar text deprecated")):
    """One row of the table: how a setting is called, read and explained."""

    __slots__ = ()

    @property
    def attribute(self):
        """Its name as an attribute and, in upper case, as a variable."""
        return self.name.replace("-", "_")


SETTINGS = {}


def setting(name, short, parse, default, metavar, text, deprecated=""):
    """Add a row to the table of settings."""
    row = Setting(name, short, parse, default, metavar, text, deprecated)
    SETTINGS[row.attribute] = row


def parse_port(text):
    """A port; 0 lets the system choose."""
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise ValueError("a port is a number up to 65535 (0: any that is free)")
    return int(text)


def parse_count(text):
    """A whole number from 0, as system calls take them."""
    if not text.isascii() or not text.isdigit() or int(text) >= 1 << 31:
        raise ValueError("it must be a whole number below 2147483648")
    return int(text)


def parse_positive(text):
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e12:
        raise ValueError("it must be a number above 0")
    return number


def parse_ip(text):
    """An IP address, normalised; empty for none."""
    try:
        return normalise_ip(str(ipaddress.ip_address(text.strip("[]")))) if text else ""
    except ValueError:
        raise ValueError("it must be an IP address") from None


def parse_networks(text):
    """Networks in CIDR form, separated by commas."""
    try:
        return tuple(ipaddress.ip_network(part.strip(), strict=False)
                     for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError("it must be a network such as 192.168.0.0/16") from None


def parse_yes(text):
    """Y for yes; anything else is no, as in the official server."""
    return text.strip().upper() in ("Y", "YES", "TRUE", "1")


def parse_text(text):
    """Any text."""
    return text


def parse_words(text):
    """Texts separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def one_of(*words):
    """The parser of a setting that is one of these words."""
    def parse(text):
        if text.lower() not in words:
            raise ValueError(f"it must be {', '.join(words[:-1])} or {words[-1]}")
        return text.lower()

    return parse


def parse_subjects(text):
    """Ids and networks separated by commas; `*` is every id, `-` nothing."""
    return tuple(parse_subject(word) for word in parse_words(text) if word != "-")


def parse_subject(text):
    """An id as it is, an address or network as such."""
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        # Commas and quotes mean something in the files that keep it.
        if set(text) & set("/ ,\"'") or not text.isprintable():
            raise ValueError(f"{text!r} is neither an id nor a network") from None
        return text


def parse_limits(text):
    """Limits as NAME=NUMBER, separated by commas; see section 9 for the
    names."""
    return tuple((name.strip(), parse_count(number.strip())) for name, _, number in (
        part.partition("=") for part in parse_words(text)))


def parse_host(text):
    """A host name or address, with or without a port, as clients understand
    it."""
    host, port = split_host(text)
    if not host or any(c.isspace() or not c.isprintable() for c in host):
        raise ValueError(f"{text!r} is no host or host:port")
    if port is not None and not 0 < port < 65536:
        raise ValueError(f"{text!r} has no usable port")
    if ":" in host:
        parse_ip(host)
    return text


def split_host(text):
    """(host, port or None) of host, host:port, [v6]:port or a bare IPv6
    address."""
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        if port and not port.startswith(":"):
            return host, -1
        port = port[1:]
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    else:
        return text, None
    if not port:
        return host, None
    return host, int(port) if port.isascii() and port.isdigit() else -1


#: A relay, and the network of the initiators that it is for, or None.
RelayEntry = collections.namedtuple("RelayEntry", "name network")


def parse_relays(text):
    """A list of hosts separated by commas, each perhaps with `NETWORK=` before
    it."""
    return tuple(parse_relay(part.strip()) for part in text.split(",") if part.strip())


def parse_relay(text):
    """One entry of the list of relays."""
    network, equals, host = text.rpartition("=")
    if not equals:
        return RelayEntry(parse_host(text), None)
    networks = parse_networks(network)
    if len(networks) != 1:
        raise ValueError(f"{text!r} has no network before the =")
    return RelayEntry(parse_host(host.strip()), networks[0])


def parse_endpoints(text):
    """Addresses with ports, separated by commas: [(ip or "", port), ...], none
    for `off`."""
    found = []
    if text.lower() == "off":
        return ()
    for part in filter(None, map(str.strip, text.split(","))):
        host, port = split_host(part)
        if part.isdigit():
            host, port = "", int(part)
        if port is None or not 0 <= port < 65536:
            raise ValueError(f"{part!r} is no ADDRESS:PORT")
        found.append((parse_ip(host.replace("*", "")), port))
    return tuple(found)


def parse_api_port(text):
    """A port, or `off`."""
    return -1 if text.lower() == "off" else parse_port(text)


def parse_level(text):
    """A level of the log, also out of a RUST_LOG such as `info,hbbs=debug`."""
    level = text.partition(",")[0].rpartition("=")[2].lower()
    level = {"trace": "debug", "warning": "warn", "off": "error"}.get(level, level)
    if level not in ("debug", "info", "warn", "error"):
        raise ValueError("it must be debug, info, warn or error")
    return level


#: Reverse proxies run on the server's own machine, unless the operator says
#: else.
TRUST_LOOPBACK = parse_networks("127.0.0.0/8,::1")


def is_level(text):
    """Whether a text names a level of the log."""
    try:
        return bool(parse_level(text))
    except ValueError:
        return False


setting("port", "p", parse_port, None, "PORT",
        "The ID server's port (21116), UDP and TCP; one below is used for the NAT "
        "test, two above for WebSocket. With `hbbr`: the relay's port (21117), two "
        "above for WebSocket. The variable PORT always means the ID server's, the "
        "relay takes one above.")
setting("bind", "b", parse_ip, "", "ADDRESS",
        "The address to listen on (all, IPv4 and IPv6).")
setting("key", "k", parse_text, None, "KEY",
        "The key that clients must present. `-` or `_`: the public key of "
        "`id_ed25519`, made when there is none (default of the ID server); empty: "
        "any (default of the relay); 64 bytes in base64: a secret key to use instead "
        "of the file's; anything else: that text, and nothing is signed.")
setting("key-policy", "", one_of("open", "warn", "require"), None, "POLICY",
        "What happens to a client with another key or none: `open` lets it in, `warn` "
        "lets it in and says so in the log, `require` refuses it. The default is "
        "`require`, and `warn` for the links of a relay that asks for tickets.")
setting("accept-key", "", parse_words, (), "KEYS",
        "Former keys, separated by commas: clients that still have one are let in, "
        "but the peers that they reach are not vouched for (see `rotate-key`).")
setting("enroll", "", one_of("open", "approve", "closed"), "open", "MODE",
        "Who may register an id that is not known yet: `open` anybody, `approve` who "
        "the operator approves (`approve ID`), `closed` nobody but ids of `--allow`.")
setting("allow", "", parse_subjects, (), "SUBJECTS",
        "Ids and networks, separated by commas, that are served although a wider entry "
        "of `--refuse` has them: the narrowest entry decides.")
setting("refuse", "", parse_subjects, (), "SUBJECTS",
        "Ids and networks, separated by commas, that are not served; `*` is every id, "
        "`0.0.0.0/0,::/0` everybody.")
setting("relay-tickets", "", one_of("on", "off"), None, "SWITCH",
        "`on`: the relay carries only sessions that the ID server has arranged (on "
        "where both roles run together, or with `--relay-secret`).")
setting("relay-secret", "", parse_text, "", "FILE",
        "A file with a secret of 16 characters or more, the same for an ID server and "
        "the relays of its list on other machines or ports: it tells them by it which "
        "sessions it has arranged.")
setting("limit", "", parse_limits, (), "NAME=NUMBER",
        "Another number for one of the limits that `limits` lists (repeatable).")
setting("exempt", "", parse_networks, (), "NETWORKS",
        "Networks, separated by commas, whose addresses have no limits per address and "
        "may bring any number of new ids.")
setting("console", "", one_of("off", "read", "full"), None, "MODE",
        "The official servers' text consoles, for connections from this machine: "
        "`read` answers questions, `full` takes changes as well (`read`; `off` once "
        "`--trusted-proxy` is given, since strangers then come from this machine).")
setting("user", "", parse_text, "", "NAME",
        "Started as root: the user to run as, once the ports are open. The files of "
        "this server, and its directory, become the user's.")
setting("directory", "", parse_text, "", "DIR",
        "Where key, peers and lists are kept (the working directory); made with mode "
        "0700 if it is missing.")
setting("relay-servers", "r", parse_relays, (), "HOSTS",
        "Relays that clients are sent to, separated by commas (none: they use the ID "
        "server's host). Of several, those that answer are used in turn. An entry "
        "such as `10.0.0.0/8=192.168.1.5:21117` is for initiators in that network.")
setting("always-use-relay", "", parse_yes, False, "Y",
        "Y: no direct connections, everything is relayed.")
setting("mask", "", parse_networks, (), "NETWORK",
        "The local network, such as 192.168.0.0/16: peers inside and outside of it "
        "are relayed to each other, inside ones by `--local-ip`.")
setting("local-ip", "", parse_ip, "", "ADDRESS",
        "This server's address in the network of `--mask` (found by itself).")
setting("listen", "", parse_endpoints, (), "ADDRESS:PORT",
        "One more port (repeatable): `/ws/id` and `/ws/relay` lead to the roles, "
        "anything else to the ID server. With 443 WebSocket clients need no other.")
setting("tls-cert", "", parse_text, "", "FILE",
        "A certificate with its chain, PEM: every TCP port then speaks TLS as well. It "
        "is read again when the file changes and on SIGHUP.")
setting("tls-key", "", parse_text, "", "FILE",
        "The certificate's private key, PEM (in the certificate's file).")
setting("trusted-proxy", "", parse_networks, TRUST_LOOPBACK, "NETWORKS",
        "Where reverse proxies may say who a client is: X-Real-IP, X-Forwarded-For "
        "and the PROXY protocol (this machine), separated by commas.")
setting("api-port", "", parse_api_port, None, "PORT",
        "Where web API requests of clients are answered with 404, so that they stop "
        "(two below `--port`); `off` for nowhere.")
setting("rmem", "M", parse_count, 0, "BYTES",
        "The receive buffer of the UDP socket (the system's default).")
setting("single-bandwidth", "", parse_positive, None, "MBITS",
        "What one relayed session may carry, both directions together, in Mb/s "
        "(1 Mb is 1,048,576 bits; no limit).")
setting("total-bandwidth", "", parse_positive, None, "MBITS",
        "What all relayed sessions together may carry, in Mb/s, shared fairly (no "
        "limit).")
setting("limit-speed", "", parse_positive, 32.0, "MBITS",
        "What a slowed session may carry, in Mb/s: one with an address of "
        "`blacklist.txt`, or one that was downgraded.")
setting("downgrade-threshold", "", parse_positive, 0.66, "SHARE",
        "Where `--single-bandwidth` is given: a session is downgraded when its average "
        "exceeds this share of it...")
setting("downgrade-start-check", "", parse_count, 1800, "SECONDS",
        "...and it is older than this.")
setting("idle-limit", "", parse_count, 7200, "SECONDS",
        "A relayed session that carries nothing for this long is ended (clients keep "
        "idle tunnels for an hour).")
setting("drain", "", parse_count, 5, "SECONDS",
        "How long relayed sessions may go on after SIGTERM.")
setting("status-listen", "", parse_endpoints, None, "ADDRESS:PORT",
        "Where the status page, `/metrics` and `/status.json` are served "
        "(127.0.0.1:21120, with `hbbr` 21121; `off` for nowhere). Any address but this "
        "machine's own needs `--status-token`.")
setting("status-token", "", parse_text, "", "TOKEN",
        "What who asks for the status has to show, as `?token=TOKEN` or as a bearer "
        "token.")
setting("on-event", "", parse_text, "", "COMMAND",
        "A command of the shell that is run for each event, one at a time, with a line "
        "of JSON on its standard input.")
setting("reclaim-after", "", parse_count, 0, "DAYS",
        "An id that was not seen for so long goes to the next device that claims it "
        "(0: never).")
setting("log-format", "", one_of("text", "json"), "text", "FORMAT",
        "`text`, or `json` for one object a line.")
setting("log-file", "", parse_text, "", "FILE",
        "A file for the log instead of standard output; from 10 MiB on it is renamed "
        "to FILE.1 and begun anew.")
setting("encrypted-only", "", parse_yes, False, "1",
        "1: as `--key _`; the official container images know this variable.")
setting("key-priv", "", parse_text, "", "KEY",
        "The content of `id_ed25519`, written when there is no such file; as above.")
setting("key-pub", "", parse_text, "", "KEY",
        "The content of `id_ed25519.pub` that goes with it; as above.")
setting("log-level", "", parse_level, "info", "LEVEL",
        "`debug`, `info`, `warn` or `error`. RUST_LOG is understood as well.")
setting("rendezvous-servers", "R", parse_text, "", "HOSTS", "",
        deprecated="clients of a server of your own do not use such a list")
setting("serial", "s", parse_text, "", "NUMBER", "",
        deprecated="it goes with --rendezvous-servers")
setting("software-url", "u", parse_text, "", "URL", "",
        deprecated="clients after 1.2.2 do not ask for it")
setting("test-hbbs", "", parse_text, "", "ADDRESS", "",
        deprecated="this server does not test itself by exiting")
setting("db-url", "", parse_text, "", "URL", "",
        deprecated=f"peers are kept in {STORE_FILE}")
setting("max-database-connections", "", parse_text, "", "NUMBER", "",
        deprecated=f"peers are kept in {STORE_FILE}")

#: Other names that the official programs or their users know.
ALIASES = {"rust_log": "log_level", "relay": "relay_servers"}


def option_rows():
    """The README's table: flag, variable, meaning of each setting in use."""
    return [(f"`{flag_text(row)}`", variable_text(row), row.text)
            for row in SETTINGS.values() if not row.deprecated]


def variable_text(row):
    """A setting's variable, if it is read from one."""
    variable = row.attribute.upper()
    return f"`{variable}`" if variable not in FOREIGN_VARIABLES else ""


#: Flags that may be given several times; their values are joined by commas.
REPEATABLE = (parse_endpoints, parse_limits, parse_subjects, parse_networks,
              parse_words)


def flag_text(row):
    """How a setting's flag is written, as in `-p, --port PORT`."""
    return f"{f'-{row.short}, ' if row.short else ''}--{row.name} {row.metavar}"


def canonical_name(name):
    """A setting's attribute from its name in any case, with - or _."""
    name = name.strip().lower().replace("-", "_")
    return ALIASES.get(name, name)


def read_config_text(text, origin):
    """The (name, value, where it stands) of an INI text before its first
    section."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line.startswith("["):
            break
        if not line or line[0] in "#;":
            continue
        name, equals, value = line.partition("=")
        if not equals:
            name, equals, value = line.partition(":")
        value = value.strip()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        found.append((name.strip(), value, f"{origin} line {number}"))
    return found


def read_config_file(path, required):
    """The entries of a configuration file; Trouble if it can't be
    read."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return read_config_text(file.read(), path)
    except FileNotFoundError:
        if not required:
            return []
        raise Trouble(f"there is no file {path}, which -c names") from None
    except OSError as error:
        raise Trouble(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise Trouble(f"cannot read {path}: it is no UTF-8 text") from None


class Config:
    """The settings in force, as attributes, and where each came from
    (`origins`)."""

    def __init__(self):
        self.warnings = []
        self.origins = {}
        for attribute, row in SETTINGS.items():
            setattr(self, attribute, row.default)

    def warn(self, text):
        """Keep a warning for the log, once."""
        if text not in self.warnings:
            self.warnings.append(text)

    def apply(self, name, text, origin, strict):
        """Take a value; Trouble if it is wrong, a warning if it is
        unknown."""
        row = SETTINGS.get(canonical_name(name))
        if row is None:
            if strict:
                self.warn(f"{origin}: no setting is called {name!r}; ignored")
            return
        if row.deprecated:
            self.warn(f"{origin}: {name} does nothing here: {row.deprecated}")
            return
        if not text and row.parse is not parse_text:
            return  # a variable that is set to nothing is not set
        try:
            value = row.parse(text)
        except ValueError as error:
            raise Trouble(f"{row.name} = {text!r} ({origin}): {error}") from None
        if row.parse is parse_limits:  # each place adds to those before
            value = getattr(self, row.attribute) + value
        setattr(self, row.attribute, value)
        self.origins[row.attribute] = origin


def load_config(role, flags, environment, directory, changes=None):
    """The `Config` of a start: environment, `.env`, the -c file, flags and what
    was changed at run time, in turn.

    `flags` maps names to texts, `environment` is the process's; `role` is
    "hbbs", "hbbr" or "both".  Trouble with a sentence for the operator.
    """
    config = Config()
    for name, text in environment.items():
        if name == "RUST_LOG" and not is_level(text):
            continue  # other programs understand more than we do
        if name == name.upper() and name not in FOREIGN_VARIABLES:
            config.apply(name, text, f"environment variable {name}", strict=False)
    for entry in read_config_file(os.path.join(directory, ".env"), required=False):
        config.apply(*entry, strict=True)
    if role == "hbbr" and config.port:
        # The variable means the ID server's port.
        config.apply("port", str(config.port + RELAY_OFFSET),
                     f"{config.origins['port']}, plus one for the relay", strict=True)
    if flags.get("config"):
        for entry in read_config_file(flags["config"], required=True):
            config.apply(*entry, strict=True)
    for name, text in flags.items():
        if isinstance(text, list):
            text = ",".join(text)  # of a flag that may be given several times
        if canonical_name(name) in SETTINGS and text is not None:
            flag = f"flag --{name.replace('_', '-')}"
            config.apply(name, text, flag, strict=True)
    for entry in read_changes(directory) if changes is None else changes:
        config.apply(*entry, strict=True)
    if config.encrypted_only and config.key is None:
        config.key = "_"
    if config.relay_tickets is None:
        config.relay_tickets = "on" if role == "both" or config.relay_secret else "off"
    return config


def read_changes(directory):
    """The settings that were changed at run time: (name, text, place)."""
    return read_config_file(os.path.join(directory, CHANGES_FILE), required=False)


def merge_changes(entries, changes):
    """Those settings with others of {name: text}; None for a text returns to
    what was configured."""
    kept = {name: text for name, text, _ in entries}
    kept.update(changes)
    return [(name, text, "changed at run time") for name, text in kept.items()
            if text is not None]


def save_changes(directory, entries):
    """Keep settings that were changed at run time; OSError leaves the file as
    it was."""
    lines = ["# What was changed while the server ran; the last word on each.\n"]
    lines += [f"{name} = {text}\n" for name, text, _ in entries]
    write_in_place(os.path.join(directory, CHANGES_FILE), "".join(lines))


#: Variables that mean something else to the system.
FOREIGN_VARIABLES = ("USER", "DIRECTORY")

#: What takes effect at once when the configuration is read again.
CHANGEABLE = frozenset((
    "key_policy", "accept_key", "enroll", "allow", "refuse", "limit", "exempt",
    "console", "reclaim_after", "relay_servers", "always_use_relay", "mask", "local_ip",
    "single_bandwidth",
    "total_bandwidth", "limit_speed", "downgrade_threshold", "downgrade_start_check",
    "idle_limit", "trusted_proxy", "drain", "log_level"))


# == 9. Limits =================================================================
#
# Every number of "too much", in one table that the operator can read and
# change.  What strangers fill forgets by itself and never grows beyond a cap;
# at the cap the oldest stranger makes room.  Limits per address count an IPv6
# /64 as one address.
#
# Uses: Constants, Refusals, Frames and addresses, Configuration.


#: One row of the table: a number, what it counts, and why it is that.
Limit = collections.namedtuple("Limit", "name default unit reason fixed")
LIMITS = {}


def limit(name, default, unit, reason, fixed=False):
    """Add a row to the table of limits; a fixed one is the protocol's."""
    LIMITS[name.replace("-", "_")] = Limit(name, default, unit, reason, fixed)


limit("connections", 20_000, "connections",
      "In all; never more than the system grants descriptors.")
limit("connections-per-address", 2_000, "connections",
      "A school behind one address keeps three per device at its busiest.")
limit("strangers", 4_000, "connections",
      "That have said nothing valid yet; clients take milliseconds for it.")
limit("strangers-per-address", 500, "connections",
      "As many clients may come back at once behind one address.")
limit("first-frame-seconds", 10, "seconds",
      "To the ID server's first message; clients speak at once.")
limit("next-frame-seconds", 30, "seconds",
      "Between messages; the longest gap that clients leave is 18 s.")
limit("relay-first-frame-seconds", 30, "seconds",
      "To a relay link's request; the official server's number.")
limit("partner-seconds", 30, "seconds",
      "For a relay link's partner; clients give an attempt up after 18 s.")
limit("ticket-seconds", 60, "seconds",
      "Between the arrangement of a session and its links' arrival.")
limit("early-seconds", 5, "seconds",
      "That a relay link may be ahead of its ticket.")
limit("frame-bytes", MAX_FRAME_BYTES, "bytes",
      "A message to the ID server, but for the next two.", fixed=True)
limit("online-request-bytes", MAX_ONLINE_REQUEST_BYTES, "bytes",
      "A whole address book, 12 bytes an id.", fixed=True)
limit("secured-frame-bytes", MAX_SECURED_FRAME_BYTES, "bytes",
      "An encrypted request to a web API; without PyNaCl `frame-bytes` holds.",
      fixed=True)
limit("relay-request-bytes", MAX_RELAY_REQUEST_BYTES, "bytes",
      "A relay link's first message, with a login token.", fixed=True)
limit("datagram-bytes", MAX_DATAGRAM_BYTES, "bytes",
      "What clients send by UDP stays below 1.5 KiB.", fixed=True)
limit("http-head-bytes", MAX_HTTP_HEAD_BYTES, "bytes",
      "A browser's is below 1 KiB; cookies and proxies add to it.", fixed=True)
limit("early-bytes", MAX_EARLY_BYTES, "bytes",
      "Held for a relay link's partner; then the link is not read.", fixed=True)
limit("unsent-bytes", MAX_UNSENT_BYTES, "bytes",
      "Answers that a connection does not take; then it is cut.", fixed=True)
limit("message-bytes", MAX_MESSAGE_BYTES, "bytes",
      "A fragmented message of a session between unlike ends.", fixed=True)
limit("held-bytes", 64 * 1024 * 1024, "bytes",
      "Held for slow ends of sessions, and for their unfinished messages: from half "
      "of it on they are read in small pieces, beyond it who adds to it is cut.")
limit("pending-bytes", 32 * 1024 * 1024, "bytes",
      "Of unfinished messages and waiting relay links, beyond 4 KiB each; who adds to "
      "it is cut.")
limit("strange-messages", 8, "messages",
      "Of unknown kinds on one connection; newer clients may know more than we.")
limit("targets", 4, "peers",
      "That one connection may ask for at a time; clients ask for one.")
limit("registrations-per-address", 30, "a minute",
      "Of peers that are not known with this key; the official server's number.")
limit("ids-per-address", 300, "a day",
      "New ones; the official server's number.")
limit("registrations-per-id", 3, "in 6 s", "The official server's number.")
limit("new-ids", 500, "a minute",
      "From everywhere: sources of datagrams can be forged, so limits per address do "
      "not bind.")
limit("new-ids-per-day", 20_000, "a day", "Likewise: 5 MB of the disk.")
limit("peers", 1_000_000, "peers", "Known in all; 1 KiB of memory each.")
limit("untried-days", 30, "days",
      "After which an id is forgotten that was never seen again after its first "
      "hour, where anybody may register (0: never).")
limit("udp-tests-per-address", 60, "a minute",
      "This answer alone is longer than its question; a client's test is a dozen.")
limit("online-query-bytes", 4 * 1024 * 1024, "bytes a minute",
      "Per address; a client with a hundred contacts asks for 24 KiB a minute.")
limit("requests-per-address", 300, "a minute",
      "For connections; a client sends up to six for one.")
limit("requests-per-pair", 60, "a minute", "From one address for one peer.")
limit("requests-per-target", 600, "a minute",
      "From everywhere for one peer, but for who was let in to ask for it lately.")
limit("relay-links", 10_000, "links", "That wait for their partner, in all.")
limit("relay-links-per-address", 500, "links", "Likewise, from one address.")
limit("early-links", 4_000, "links", "That wait for their ticket, in all.")
limit("early-links-per-address", 500, "links",
      "Likewise, from one address: of 10,000 a second each stays for 50 ms.")
limit("sessions", 10_000, "sessions", "Relayed at a time.")
limit("sessions-per-address", 1_000, "sessions", "Likewise, for either end.")
limit("table-entries", 20_000, "entries",
      "Of every other table that strangers can fill.")
limit("log-lines", 20, "a minute", "For each kind of refusal; the rest is counted.")


def limit_rows():
    """The README's table: name, default, unit and reason of each limit."""
    return [(f"`{row.name}`", f"{row.default:,}", row.unit,
             row.reason + (" Fixed." if row.fixed else "")) for row in LIMITS.values()]


class Limits:
    """The limits in force, as attributes, and who has none per address.

    Tables made here follow when a limit changes.
    """

    def __init__(self, config, descriptors=1 << 30):
        self.descriptors = descriptors  # that connections may take
        self.tables = []  # (table, its seconds, its capacity), by attribute or number
        self.take(config)

    def take(self, config):
        """Let the limits of a configuration be in force; Trouble if it
        has one that is none."""
        numbers = {attribute: row.default for attribute, row in LIMITS.items()}
        for name, number in config.limit:
            row = LIMITS.get(canonical_name(name))
            if row is None or row.fixed:
                why = "there is no such limit" if row is None else "it is fixed"
                where = config.origins.get("limit", "asked for just now")
                raise Trouble(f"limit = {name}={number} ({where}): {why}; the "
                              "subcommand `limits` lists them")
            numbers[canonical_name(name)] = number
        numbers["connections"] = min(numbers["connections"], self.descriptors)
        self.__dict__.update(numbers)
        self.exempt = config.exempt
        self.rules = Rules(config)
        self.places = {}  # ip -> its place, of those seen lately
        for table, seconds, capacity in self.tables:
            table.seconds, table.capacity = self.number(seconds), self.number(capacity)

    def number(self, number):
        """A number as it is, or that of a limit."""
        return getattr(self, number) if isinstance(number, str) else number

    def table(self, seconds, capacity="table_entries"):
        """A table whose seconds and capacity are numbers or limits."""
        table = ExpiringTable(self.number(seconds), self.number(capacity))
        self.tables.append((table, seconds, capacity))
        return table

    def place(self, ip):
        """What counts as one address, or None if it has no limits."""
        if not self.exempt:
            return network_key(ip)
        if ip not in self.places:
            if len(self.places) >= self.table_entries:
                self.places.clear()
            is_exempt = is_within(ip, self.exempt)
            self.places[ip] = None if is_exempt else network_key(ip)
        return self.places[ip]


class Rules:
    """Which ids and networks the operator allows and refuses.

    The narrowest entry that fits decides; of two alike, the one that allows.
    What none fits is allowed.
    """

    __slots__ = ("ids", "networks", "shapes")

    def __init__(self, config):
        self.ids, self.networks = {}, {}  # subject -> whether it is refused
        for subjects, refused in (config.refuse, True), (config.allow, False):
            for subject in subjects:
                table = self.ids if isinstance(subject, str) else self.networks
                table[subject] = refused
        # (version, prefix length) of the networks, the narrowest first: lists
        # of many thousands have few.
        self.shapes = sorted({(network.version, network.prefixlen)
                              for network in self.networks}, reverse=True)

    def refuses_address(self, ip):
        """Whether an IP address is refused."""
        if not self.shapes:
            return False
        address = ipaddress.ip_address(ip.partition("%")[0])
        for version, length in self.shapes:
            if version == address.version:
                network = ipaddress.ip_network((address, length), strict=False)
                refused = self.networks.get(network)
                if refused is not None:
                    return refused
        return False

    def refuses_id(self, peer_id):
        """Whether an id is refused."""
        return self.ids.get(peer_id, self.ids.get("*", False))

    def allows_id(self, peer_id):
        """Whether an id is allowed by name."""
        return self.ids.get(peer_id) is False


class Tally(dict):
    """How many of something each place has; the place None has none."""

    __slots__ = ()

    def add(self, place):
        """One more."""
        if place is not None:
            self[place] = self.get(place, 0) + 1

    def remove(self, place):
        """One less."""
        if place is None:
            return
        left = self.get(place, 0) - 1
        if left > 0:
            self[place] = left
        else:
            self.pop(place, None)


class Crowd:
    """The open connections by place, and the strangers among them, which have
    said nothing valid yet.

    `waiting_rooms` are the tables that hold the strangers, oldest first.
    """

    __slots__ = ("limits", "waiting_rooms", "links", "strangers", "links_at",
                 "strangers_at")

    def __init__(self, limits, waiting_rooms):
        self.limits = limits
        self.waiting_rooms = waiting_rooms
        self.links = set()
        self.strangers = 0
        self.links_at = Tally()
        self.strangers_at = Tally()

    def excess(self, place):
        """What a newcomer would be too much for, and the stranger that should
        make room for it: (refusal, link), either of them perhaps None."""
        limits = self.limits
        if len(self.links) >= limits.connections:
            return Refusal.TOO_MANY_CONNECTIONS, self.oldest()
        if self.strangers >= limits.strangers:
            return Refusal.TOO_MANY_STRANGERS, self.oldest()
        if self.links_at.get(place, 0) >= limits.connections_per_address:
            return Refusal.TOO_MANY_CONNECTIONS, self.oldest_at(place)
        if self.strangers_at.get(place, 0) >= limits.strangers_per_address:
            return Refusal.TOO_MANY_STRANGERS, self.oldest_at(place)
        return None, None

    def oldest(self):
        """The oldest stranger of all, or None."""
        heads = [next(iter(room.entries.items()))
                 for room in self.waiting_rooms if room.entries]
        return min(heads, key=lambda head: head[1][0])[0] if heads else None

    def oldest_at(self, place):
        """The oldest stranger of a place, or None."""
        heads = [next(((since, link) for link, (since, _) in room.entries.items()
                       if link.place == place), None) for room in self.waiting_rooms]
        return min(filter(None, heads), key=lambda head: head[0],
                   default=(0.0, None))[1]

    def enter(self, link):
        """A connection has come, which nearly always is a stranger's."""
        self.links.add(link)
        self.strangers += link.is_stranger
        if link.place is not None:
            self.links_at.add(link.place)
            if link.is_stranger:
                self.strangers_at.add(link.place)

    def leave(self, link):
        """A connection has ended, or is at another place from now on."""
        self.links.discard(link)
        self.links_at.remove(link.place)
        if link.is_stranger:
            self.strangers -= 1
            self.strangers_at.remove(link.place)

    def know(self, link):
        """A connection is no stranger any more."""
        link.is_stranger = False
        self.strangers -= 1
        self.strangers_at.remove(link.place)


class ExpiringTable:
    """A dictionary that forgets what was not touched for `seconds`, oldest
    first.

    Every entry lives equally long, so the order of insertion is the order of
    expiry, and forgetting costs nothing but what is forgotten.
    """

    __slots__ = ("seconds", "capacity", "entries")

    def __init__(self, seconds, capacity):
        self.seconds = seconds
        self.capacity = capacity
        # Not a plain dict: one whose first entries were deleted is slow to
        # begin.
        self.entries = collections.OrderedDict()  # key -> (time of touch, value)

    def __len__(self):
        return len(self.entries)

    def put(self, key, value, now):
        """Insert or replace; at the cap the oldest entry goes and is
        returned."""
        self.entries.pop(key, None)
        self.entries[key] = (now, value)
        if len(self.entries) > self.capacity:
            oldest = next(iter(self.entries))
            return self.entries.pop(oldest)[1]
        return None

    def get(self, key):
        """The value under `key`, or None."""
        entry = self.entries.get(key)
        return entry[1] if entry else None

    def age(self, key, now):
        """Seconds since `key` was put; None if it isn't there."""
        entry = self.entries.get(key)
        return now - entry[0] if entry else None

    def discard(self, key):
        """Forget `key`, if it is there; returns its value or None."""
        entry = self.entries.pop(key, None)
        return entry[1] if entry else None

    def expire(self, now):
        """Forget what is too old; returns the (key, value) pairs."""
        limit = now - self.seconds
        old = list(itertools.takewhile(lambda item: item[1][0] <= limit,
                                       self.entries.items()))
        for key, _ in old:
            del self.entries[key]
        return [(key, value) for key, (_, value) in old]


class Rates:
    """How much of something each key has had in a period, which begins with
    its first."""

    __slots__ = ("table",)

    def __init__(self, table):
        self.table = table  # key -> [amount]

    def admits(self, key, most, now, amount=1):
        """Whether a key may have so much more; counts it if so."""
        self.table.expire(now)
        had = self.table.get(key)
        if had is None:
            had = [0]
            self.table.put(key, had, now)
        if had[0] + amount > most:
            return False
        had[0] += amount
        return True


class RegistrationLimits:
    """How often ids may be registered, and how many from one place."""

    ADDRESS_SECONDS, IDS_SECONDS, ID_SECONDS = 60.0, 86400.0, 6.0

    def __init__(self, limits):
        self.limits = limits
        self.counts = limits.table(self.ADDRESS_SECONDS)  # place -> [requests]
        self.ids = Rates(limits.table(self.IDS_SECONDS))  # new ids, by place
        self.recent = Rates(limits.table(self.ID_SECONDS))  # by id
        self.new = Rates(limits.table(60.0))  # all under one key
        self.new_today = Rates(limits.table(86400.0))

    def admits_address(self, ip, now):
        """Whether an address may register once more; counts it."""
        place = self.limits.place(ip)
        if place is None:
            return True
        self.counts.expire(now)
        count = self.counts.get(place) or [-1]  # the very first is not counted
        if count[0] >= self.limits.registrations_per_address:
            return False
        count[0] += 1
        self.counts.put(place, count, now)
        return True

    def admits_id(self, peer_id, now):
        """Whether an id may register once more; counts it."""
        return self.recent.admits(peer_id, self.limits.registrations_per_id, now)

    def admits_new(self, ip, now):
        """Whether there may be one more new id, and from this address; counts
        it."""
        place = self.limits.place(ip)
        return place is None or (
                self.ids.admits(place, self.limits.ids_per_address, now)
                and self.new_today.admits("", self.limits.new_ids_per_day, now)
                and self.new.admits("", self.limits.new_ids, now))


def fair_shares(amount, wants):
    """Divide an amount among wants, max-min fairly: nobody gets more than it
    wants, and nobody could get more without taking from one that has less."""
    shares, left = [0] * len(wants), len(wants)
    for i in sorted(range(len(wants)), key=wants.__getitem__):
        shares[i] = min(wants[i], -(-amount // left))  # rounded up: not 0 for all
        amount -= shares[i]
        left -= 1
    return shares


class Cap:
    """Bandwidth that may be used: a tenth of a second's worth at most is kept.

    What was used beyond it is a debt, so the rate holds in the long run.
    """

    __slots__ = ("rate", "credit", "filled")

    def __init__(self, megabits, now):
        self.rate = megabits * 1048576 / 8  # bytes a second
        self.credit = self.rate / 10
        self.filled = now

    def use(self, size, now):
        """Account for bytes used; returns those that may be used next."""
        most, passed = self.rate / 10, now - self.filled
        self.credit = min(most, self.credit - size + passed * self.rate)
        self.filled = now
        return max(0, int(self.credit))


def cap_of(megabits, now):
    """The `Cap` that a setting asks for; None without one, or where it never
    holds anybody up."""
    if megabits is None or megabits >= UNREACHABLE_MEGABITS:
        return None
    return Cap(megabits, now)


# == 10. Peer store ============================================================
#
# Which device owns which id, and its key: one JSON object a line, the last
# line of an id wins.  Lines are appended before the answer that promises them
# leaves; when more of the file is out of date than in force, it is written
# anew, in slices, and replaced in one step.
#
# Uses: Constants, Refusals, Frames and addresses, Keys.


#: States of a peer, besides "": it is not served; the next device that claims
#: its id gets it; a line that ends what earlier lines say of an id.
DISABLED, RELEASED, FORGOTTEN = "disabled", "released", "forgotten"
#: Seconds since 1970 that every system can show as a date, until the year
#: 3000.
LATEST_TIME = 32_503_680_000


def is_usable_id(peer_id):
    """Whether an id can be a peer's: some text, not too long, without blanks or
    control characters."""
    return (0 < len(peer_id.encode()) <= MAX_ID_BYTES
            and peer_id.isprintable() and " " not in peer_id)


class Peer:
    """A RustDesk installation: its id, the device that owns it, and its key.

    `ip` is where it last proved its key from; `created` and `seen` are the
    times of its first registration and, to the hour, of its last, in seconds
    since 1970. `signed` keeps the signed identity, which is the same for every
    call.
    """

    __slots__ = ("peer_id", "device_uuid", "public_key", "ip", "created", "seen",
                 "state", "signed")

    def __init__(self, peer_id, device_uuid, public_key, ip="", created=0, seen=0,
                 state=""):
        self.peer_id = peer_id
        self.device_uuid = device_uuid
        self.public_key = public_key
        self.ip = ip
        self.created = created
        self.seen = seen
        self.state = state
        self.signed = None

    def is_same(self, other):
        """Whether another record says the same of device, key and address."""
        return other is not None and (
            self.peer_id, self.device_uuid, self.public_key, self.ip, self.state) == (
            other.peer_id, other.device_uuid, other.public_key, other.ip, other.state)

    def changed(self, **fields):
        """A copy of this peer in which some fields are others."""
        kept = {name: getattr(self, name) for name in self.__slots__[:-1]}
        return Peer(**{**kept, **fields})

    def is_untried(self):
        """Whether it was never seen again after its first hour."""
        return 0 < self.seen < self.created + 3600

    def to_line(self, replaces=None):
        """This peer as a line of the store; `replaces` is the id that it had
        before.

        `check` is the CRC-32 of everything before it, in hexadecimal.
        """
        entry = {"id": self.peer_id, "uuid": encode_base64(self.device_uuid),
                 "pk": encode_base64(self.public_key), "ip": self.ip,
                 "created": self.created, "seen": self.seen}
        if self.state:
            entry["state"] = self.state
        if replaces is not None:
            entry["replaces"] = replaces
        text = json.dumps(entry, ensure_ascii=False, separators=(",", ":"))[:-1]
        return f'{text},"check":"{binascii.crc32(text.encode()):08x}"}}\n'


#: A line as `to_line` writes nearly all of them: plain text, no former id.
PLAIN_LINE = re.compile(
    rb'\{"id":"([^"\\\x00-\x1f]+)","uuid":"([A-Za-z0-9+/]+={0,2})",'
    rb'"pk":"([A-Za-z0-9+/]{43}=)","ip":"([0-9A-Fa-f.:]*)",'
    rb'"created":([1-9]\d{0,11}|0),"seen":([1-9]\d{0,11}|0)'
    rb'(?:,"state":"(disabled|released)")?,"check":"([0-9a-f]{8})"\}\n')


def peer_from_plain_line(line):
    """The `Peer` of such a line, or None if it has to be looked at closely.

    Takes half the time of JSON, 2 s less at the start with a million peers.
    """
    found = PLAIN_LINE.fullmatch(line)
    if found is None:
        return None
    peer_id, device_uuid, public_key, ip, created, seen, state, check = found.groups()
    if binascii.crc32(line[:found.start(8) - len(b',"check":"')]) != int(check, 16):
        return None
    return Peer(peer_id.decode(), binascii.a2b_base64(device_uuid),
                binascii.a2b_base64(public_key), ip.decode(), int(created), int(seen),
                state.decode() if state else "")


def peer_from_line(line):
    """The `Peer` of a line of the store and the id that it had before, or
    None.

    ValueError if the line is none of ours, or was damaged; a line without
    `check` may have been written by hand.
    """
    peer = peer_from_plain_line(line)
    if peer is not None:
        return peer, None
    text, mark, check = line.rpartition(b',"check":"')
    if mark and check.strip() != b'%08x"}' % binascii.crc32(text):
        raise ValueError("damaged: its check sum is wrong")
    try:
        entry = json.loads(line.decode("utf-8"))
    except ValueError:
        raise ValueError("not a line of JSON") from None
    if not isinstance(entry, dict):
        raise ValueError("not an object")
    try:
        peer_id = entry["id"]
        peer_id.encode("utf-8")
        device_uuid = base64.b64decode(entry["uuid"], validate=True)
        public_key = base64.b64decode(entry["pk"], validate=True)
        ip, created = str(entry.get("ip", "")), int(entry.get("created", 0))
        ip.encode("utf-8")
        seen, replaces = int(entry.get("seen", 0)), entry.get("replaces")
        state = entry.get("state", "")
    except (KeyError, TypeError, AttributeError):
        raise ValueError("an entry is missing, or of a wrong kind") from None
    if replaces is not None and not isinstance(replaces, str):
        raise ValueError("an entry of a wrong kind")
    if state not in ("", DISABLED, RELEASED, FORGOTTEN):
        raise ValueError(f"its state {state!r} is unknown")
    if not (0 <= created < LATEST_TIME and 0 <= seen < LATEST_TIME):
        raise ValueError("a time that no calendar has")
    if not peer_id or not device_uuid or len(public_key) != PUBLIC_KEY_BYTES:
        raise ValueError("an id, device uuid or key of the wrong size")
    peer = Peer(peer_id, device_uuid, public_key, ip, created, seen, state)
    return peer, replaces


class PeerStore:
    """All known peers in memory, and their file behind them.

    `append` raises OSError when the disk does not take the records: then
    nothing has changed, in the file or in memory.
    """

    #: Below this size a file is not worth writing anew.
    COMPACT_FROM_BYTES = 256 * 1024
    #: Lines written per step while a file is written anew.
    SLICE_LINES = 500
    #: A page: a disk that takes one takes records.
    TRIAL_BYTES = 4096

    def __init__(self, path):
        self.path = path
        self.peers = {}
        self.descriptor = None
        self.file_bytes = self.file_lines = 0
        self.bad_lines = []  # (line number, why, bytes) of lines passed over
        self.torn = b""  # an unfinished last line
        self.unended = False  # the last line is whole but for its end
        self.unsynced = False
        self.spoiled = False  # a failed write may have left half a line
        self.compaction = None

    def load(self):
        """Read the file, if there is one; bad lines are passed over and
        counted."""
        self.file_bytes = self.file_lines = 0
        self.bad_lines, self.torn, self.unended = [], b"", False
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, 1):
                    self.load_line(number, line)
        except FileNotFoundError:
            pass

    def load_line(self, number, line):
        """Take one line in."""
        if number == 1 and line.startswith(b"\xef\xbb\xbf"):
            self.file_bytes, line = 3, line[3:]  # some editors begin a file so
        try:
            self.enter(*peer_from_line(line))
        except (ValueError, OverflowError, RecursionError) as error:
            if not line.endswith(b"\n"):
                self.torn = line
                return
            self.bad_lines.append((number, str(error), line))
        self.unended = not line.endswith(b"\n")
        self.file_bytes += len(line)
        self.file_lines += 1

    def enter(self, peer, replaces):
        """A record is in the file: let it be in force."""
        if replaces is not None:
            self.peers.pop(replaces, None)
        if peer.state == FORGOTTEN:
            self.peers.pop(peer.peer_id, None)
        else:
            self.peers[peer.peer_id] = peer

    def open(self):
        """Open the file for appending; a torn last line is put aside and cut
        off."""
        if self.torn:
            self.put_aside([self.torn + b"\n"])
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self.descriptor = os.open(self.path, flags, 0o600)
        try:
            if self.torn:
                os.ftruncate(self.descriptor, self.file_bytes)
            if self.unended:
                self.write(b"\n")
                self.unended = False
        except OSError:
            self.close()  # what is appended would become part of that line
            raise

    def keep_bad_lines(self):
        """Put the lines that could not be read aside, before they are left
        out."""
        if self.bad_lines:
            self.put_aside(line for _, _, line in self.bad_lines)

    def put_aside(self, lines):
        """Append lines to the file of those that could not be read."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        descriptor = os.open(self.path + ".bad", flags, 0o600)
        with open(descriptor, "ab") as file:
            file.writelines(lines)

    def append(self, records):
        """Write (peer, replaces) pairs with one call, then let them be in
        force."""
        lines = "".join(itertools.starmap(Peer.to_line, records)).encode("utf-8")
        self.write(lines)
        self.file_lines += len(records)
        for peer, replaces in records:
            self.enter(peer, replaces)
        if self.compaction is not None:
            self.compaction.append(lines, len(records))

    def write(self, data):
        """All of `data` or nothing of it: a half line would spoil the next
        one."""
        if self.descriptor is None:
            raise OSError(errno.EBADF, "the store is not open")
        if self.spoiled:
            self.cut()
        try:
            written = os.write(self.descriptor, data)
            if written < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self.spoiled = True
            self.cut()
            raise
        self.file_bytes += written
        self.unsynced = True

    def try_disk(self):
        """Have the disk take a page, which is cut off at once; OSError if it
        does not."""
        self.write(b" " * self.TRIAL_BYTES)
        self.file_bytes -= self.TRIAL_BYTES
        self.spoiled = True
        self.cut()

    def cut(self):
        """Cut off what a failed write left; nothing is appended before that
        succeeds."""
        os.ftruncate(self.descriptor, self.file_bytes)
        self.spoiled = False

    def sync(self):
        """Make what was appended survive a power cut; may block, for the
        worker."""
        self.unsynced = False
        if self.descriptor is not None:
            getattr(os, "fdatasync", os.fsync)(self.descriptor)

    def is_lost(self):
        """Whether the open file no longer has its name, or all its lines."""
        if self.descriptor is None:
            return False
        try:
            there = os.stat(self.path)
            return there.st_size < self.file_bytes or not os.path.samestat(
                os.fstat(self.descriptor), there)
        except OSError:
            return True

    def needs_compaction(self):
        """Whether more of the file is out of date than in force."""
        worth_it = (self.file_bytes > self.COMPACT_FROM_BYTES
                    and self.file_lines > 2 * len(self.peers))
        return self.compaction is None and (worth_it or bool(self.bad_lines))

    def close(self):
        """Close the file."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


class Compaction:
    """A store being written anew beside its file, a slice at a time.

    `step` until it returns True, then `sync` (which may block), then `finish`.
    Any of them may raise OSError: then `abandon`, and the old file stays in
    force.
    """

    def __init__(self, store):
        self.store = store
        self.path = store.path + ".new"
        self.descriptor = None
        self.remaining = iter(list(store.peers))
        self.bytes = self.lines = 0

    def begin(self):
        """Create the new file; records appended from now on go to both."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        self.descriptor = os.open(self.path, flags, 0o600)
        self.store.compaction = self

    def step(self):
        """Write the next slice; True when there is no more."""
        ids = list(itertools.islice(self.remaining, self.store.SLICE_LINES))
        peers = [self.store.peers[i] for i in ids if i in self.store.peers]
        lines = "".join(peer.to_line() for peer in peers)
        self.write(lines.encode("utf-8"), len(peers))
        return len(ids) < self.store.SLICE_LINES

    def append(self, data, lines):
        """Records that came meanwhile; a full disk ends the rewriting, no
        more."""
        try:
            self.write(data, lines)
        except OSError:
            self.abandon()

    def write(self, data, lines):
        """Write all of `data` to the new file."""
        self.bytes += len(data)
        self.lines += lines
        while data:
            data = data[os.write(self.descriptor, data):]

    def sync(self):
        """Make the new file survive a power cut; may block, for the worker."""
        os.fsync(self.descriptor)

    def finish(self):
        """Replace the old file; returns its descriptor, for the worker to
        close."""
        self.store.keep_bad_lines()
        os.replace(self.path, self.store.path)
        old, self.store.descriptor = self.store.descriptor, self.descriptor
        self.store.file_bytes, self.store.file_lines = self.bytes, self.lines
        self.store.compaction = None
        self.store.bad_lines, self.store.spoiled = [], False
        self.store.unsynced = True  # what came since the new file was synced
        return old

    def abandon(self):
        """Give up: remove the new file."""
        if self.store.compaction is self:
            self.store.compaction = None
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
            try:
                os.unlink(self.path)
            except OSError:
                pass  # it is written over by the next compaction


def lock_directory(directory, role):
    """Keep a second server of a role out of a state directory.

    Returns the open lock files, which hold while they are open.  An ID server
    and a relay go side by side.  Raises Trouble.
    """
    names = ("hbbs", "hbbr") if role == "both" else (role,)
    return [lock_role(directory, name) for name in names]


def lock_role(directory, name):
    """The open lock file of one role, or None where nothing can be written."""
    try:
        file = open(os.path.join(directory, f".{name}.lock"), "a+", encoding="ascii")
    except OSError:
        return None
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    except BlockingIOError:
        file.seek(0)
        holder = file.read(20).strip()
        file.close()
        raise Trouble(
            f"another {name} runs in {os.path.abspath(directory)}: pid {holder}; stop "
            "it first, or use another directory") from None
    except OSError:
        pass  # a file system without locks, or full: the ports keep a second one out
    return file


def unlock(locks):
    """Let another server have the directory."""
    for file in filter(None, locks):
        try:
            file.close()
        except OSError:
            pass  # the disk did not take our process id


def sync_directory(path):
    """Make a new name in a directory survive a power cut, where that can be
    asked."""
    try:
        descriptor = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


# == 11. Attempts ==============================================================
#
# What became of each attempt, in words and numbers: what the roles tell the
# operator.  Everything here is bounded.
#
# Uses: Constants, Refusals, Keys, Limits.


#: One request to reach a peer, as the official console lists them.
PunchRecord = collections.namedtuple("PunchRecord", "at initiator_ip peer_id target_ip")
#: How one attempt to register, or to reach a peer, has ended.
Attempt = collections.namedtuple("Attempt", "at word text")


class Attempts:
    """Counters of every outcome, what became of the last attempts by id, and
    the last requests and address changes."""

    #: Attempts kept for an id, ids, and how long after the last one.
    KEPT_ATTEMPTS, KEPT_IDS, ATTEMPTS_SECONDS = 10, 5000, 86400.0
    #: Ids that nobody registered: who makes them up displaces no others.
    KEPT_STRANGE_IDS = 500
    #: Of an explanation; only ids that nobody has make longer ones.
    KEPT_CHARACTERS = 320

    #: The official server lists a repetition within a minute only once, and
    #: looks for it among its last 30 entries.
    REPEAT_SECONDS, REPEAT_LOOKBACK = 60.0, 30
    KEPT_REQUESTS = 1000
    CHANGES_SECONDS, KEPT_CHANGES, KEPT_ADDRESSES = 360.0, 10_000, 20

    def __init__(self):
        self.counters = collections.Counter()
        self.by_id = ExpiringTable(self.ATTEMPTS_SECONDS, self.KEPT_IDS)
        self.by_strange_id = ExpiringTable(
            self.ATTEMPTS_SECONDS, self.KEPT_STRANGE_IDS)
        self.punch_requests = collections.deque(maxlen=self.KEPT_REQUESTS)
        # Of the last requests, (initiator_ip, peer_id): quicker to be looked through.
        self.recent_pairs = collections.deque(maxlen=self.REPEAT_LOOKBACK)
        self.changes = ExpiringTable(self.CHANGES_SECONDS, self.KEPT_CHANGES)

    def count(self, word):
        """One more of an outcome."""
        self.counters[word] += 1

    def note(self, peer_id, word, text, now, known=True):
        """Remember how an attempt that is about an id has ended; whether the
        id is somebody's."""
        table = self.by_id if known else self.by_strange_id
        last = table.get(peer_id)
        if last is None:
            table.expire(now)
            last = collections.deque(maxlen=self.KEPT_ATTEMPTS)
        last.append(Attempt(now, word, text[:self.KEPT_CHARACTERS]))
        table.put(peer_id, last, now)

    def last(self, peer_id):
        """How the last attempts about an id have ended, the latest last."""
        tables = self.by_strange_id, self.by_id  # it was strange before it was known
        return [attempt for table in tables
                for attempt in table.get(peer_id) or ()][-self.KEPT_ATTEMPTS:]

    def note_punch(self, initiator_ip, peer_id, target_ip, now):
        """Remember who asked for whom."""
        pair = initiator_ip, peer_id
        if pair in self.recent_pairs:
            lately = reversed(self.punch_requests)
            if any(record[1:3] == pair and now - record.at < self.REPEAT_SECONDS
                   for record in itertools.islice(lately, self.REPEAT_LOOKBACK)):
                return
        self.recent_pairs.append(pair)
        self.punch_requests.append(PunchRecord(now, initiator_ip, peer_id, target_ip))

    def note_change(self, peer_id, old_ip, new_ip, now):
        """Remember that a peer came from another address than before."""
        counts = self.changes.get(peer_id) or collections.Counter({old_ip: 1})
        if len(counts) < self.KEPT_ADDRESSES:
            counts[new_ip] += 1
        self.changes.put(peer_id, counts, now)


def usable_session_uuid(session_uuid):
    """Whether a text can name a session."""
    return 0 < len(session_uuid.encode()) <= MAX_SESSION_UUID_BYTES


class Ticket:
    """The ID server has arranged a session: two links may be paired for it,
    once.

    `fault_of` judges the key that the initiator's link presents; None if it
    needs none, since the initiator has shown it before.  `relay` is where the
    target has said that it goes, once it has answered.
    """

    __slots__ = ("peer_id", "fault_of", "relay", "came", "refused", "used")

    def __init__(self, peer_id, fault_of=None, relay=""):
        self.peer_id = peer_id
        self.fault_of = fault_of
        self.relay = relay
        self.came = False  # any link
        self.refused = None  # (which end, why) of the last link that was
        self.used = False


class TicketSender:
    """The ID server's end of the connection by which it announces tickets.

    A line a message.  The relay begins with a challenge, 32 random bytes; each
    line of ours is a JSON text and the HMAC-SHA-256, under the shared secret,
    of the challenge, the line's number and the text.  The number is not sent,
    so no line can be left out, repeated or moved.  The relay answers the first
    one, which is empty, by `ok`.
    """

    def __init__(self, secret, challenge):
        self.secret = secret
        self.challenge = challenge
        self.number = 0

    def line(self, text):
        """A text as the next line."""
        mac = ticket_mac(self.secret, self.challenge, self.number, text)
        self.number += 1
        return f"{text} {mac}\n".encode()

    def announcement(self, ticket, keys):
        """The line that announces a `Arrange` action; `keys` are those that the
        relay may see instead, which travel as codes."""
        codes = [keyed_code(self.secret, key) for key in keys if ticket.needs_key]
        return self.line(json.dumps([ticket.session_uuid, ticket.peer_id, codes],
                                    separators=(",", ":")))


class TicketReceiver:
    """The relay's end of it; `receive` raises Refused for what the secret did
    not make."""

    MAX_LINE_BYTES = 8192

    def __init__(self, secret, challenge):
        self.secret = secret
        self.challenge = challenge
        self.number = 0
        self.pending = b""

    def receive(self, data):
        """The (session uuid, Ticket) pairs of what has come; (None, None) for
        the first line."""
        *lines, self.pending = (self.pending + data).split(b"\n")
        if len(self.pending) > self.MAX_LINE_BYTES:
            raise Refused(Refusal.BAD_TICKETS, "a line without an end")
        return [self.read(line) for line in lines]

    def read(self, line):
        """The session uuid and ticket of one line."""
        text, _, mac = line.decode("utf-8", "replace").rpartition(" ")
        wanted = ticket_mac(self.secret, self.challenge, self.number, text)
        if not hmac.compare_digest(mac.encode(), wanted.encode()):
            raise Refused(Refusal.BAD_TICKETS, "the ID server there has another "
                          "secret (--relay-secret)")
        self.number += 1
        if not text:
            return None, None
        session_uuid, peer_id, codes = json.loads(text)
        return session_uuid, Ticket(peer_id, self.judge(codes) if codes else None)

    def judge(self, codes):
        """The judge of presented keys by the codes of those that are good."""
        def fault_of(licence_key):
            code = keyed_code(self.secret, licence_key)
            return None if code in codes else name_wrong_key(licence_key)

        return fault_of


def ticket_mac(secret, challenge, number, text):
    """What proves a line of tickets, in hexadecimal."""
    data = challenge + number.to_bytes(8, "big") + text.encode()
    return hmac.new(secret, data, "sha256").hexdigest()


def keyed_code(secret, key):
    """A server key as it may be seen on the wire."""
    return hmac.new(secret, b"key " + key.encode(), "sha256").hexdigest()


# == 12. Actions ===============================================================
#
# What a role can ask for.  Its handlers are generators of these;
# `Server.perform` carries them out when a handler has finished.  `then` and
# `otherwise` are called with the time and yield more actions.
#
# Uses: nothing.


class Listener(enum.Enum):
    """Where a message came in."""

    UDP = "udp"  # the ID server's datagrams
    TCP = "tcp"  # the ID server's main port
    NAT_TEST = "nat-test"  # one below it: one question, one answer
    API = "api"  # two below it: HTTP, and the answer is no
    STATUS = "status"  # HTTP, for the operator
    WEBSOCKET = "websocket"  # a WebSocket to the ID server
    RELAY = "relay"  # the relay, either transport

    __hash__ = object.__hash__  # enumerations hash their names, in Python


#: By their own names, as below the states of a connection: to ask its class for a
#: member took 0.1 us up to Python 3.11, which made a twentieth of a session's set-up.
UDP, TCP, NAT_TEST, API, STATUS, WEBSOCKET, RELAY = Listener


class Link:
    """One TCP or WebSocket connection as a role sees it.

    `errand` belongs to the role: what it keeps with this link.
    """

    __slots__ = ("listener", "address", "place", "is_websocket", "errand", "ended")

    def __init__(self, listener, address, is_websocket=False, place=None):
        self.listener = listener
        self.address = address
        self.place = place  # what its address counts as, None without limits
        self.is_websocket = is_websocket
        self.errand = None
        self.ended = False  # nothing can be sent over it any more

    def is_alive(self):
        """Whether its other end has not hung up unnoticed."""
        return True


#: Where a message came from: over a link, or as a datagram from a `sockaddr`.
Origin = collections.namedtuple("Origin", "listener address link sockaddr datagram")

#: Send a message over a link; nothing happens if the link has ended.
Send = collections.namedtuple("Send", "link message")
#: Send an empty frame: the other side answers with one.
Heartbeat = collections.namedtuple("Heartbeat", "link")
#: Let a link be silent from now on; its role looks after it.
Keep = collections.namedtuple("Keep", "link")
#: Send a message as a datagram to what a socket call calls an address.
SendDatagram = collections.namedtuple("SendDatagram", "sockaddr message")
#: End a link; what was sent before still arrives.
Close = collections.namedtuple("Close", "link")
#: End our half of a link, wait for the other's end, then do `then`.
HangUp = collections.namedtuple("HangUp", "link then")
#: Move bytes between two links from now on, charged to a session.
Pair = collections.namedtuple("Pair", "session")
#: Write a peer to the store, and that it is the one formerly called
#: `replaces`, then do `then`; if the disk fails, `otherwise`.
Store = collections.namedtuple("Store", "peer replaces then otherwise")
#: Do `then` in so many seconds.
Later = collections.namedtuple("Later", "seconds then")
#: Count an outcome and log it in a line; `peer_id` is whom it is about, so
#: that it is found among that peer's last attempts.
Report = collections.namedtuple("Report", "word text peer_id", defaults=("",))
#: A session was arranged: let the relay carry it.  Where `needs_key` is true
#: the initiator has yet to show there that it has the key.
Arrange = collections.namedtuple(
    "Arrange", "session_uuid peer_id needs_key relay", defaults=[""])
#: Let the flows of a session move bytes again.
Resume = collections.namedtuple("Resume", "session")
#: Tell the command of `--on-event`, if there is one; `text` may be anything that
#: has a text.
Event = collections.namedtuple("Event", "name peer_id text")
#: Count what was let pass though it could have been refused, and log it.
Tolerate = collections.namedtuple("Tolerate", "refusal text peer_id", defaults=("",))
#: Count a refusal and log it, no more than so often.
Refuse = collections.namedtuple("Refuse", "refusal text peer_id", defaults=("",))


# == 13. Rendezvous ============================================================
#
# The ID server (hbbs): who is where, and the introduction of an initiator (A
# in the comments) to its target (B).  A holds a TCP or WebSocket link, B has
# registered a route.  We call B over its route; B answers over a link of its
# own, naming A by the mangled address that we gave it.  Answers count only for
# a call that is awaited, and nothing a stranger says passes unread: every
# message is built anew.
#
# Uses: Constants, Refusals, Messages, Frames and addresses, Keys,
# Configuration, Limits, Peer store, Attempts, Actions.

ONLINE, UNREGISTERED = RegisterPeerResponse(), RegisterPeerResponse(request_pk=True)
Result, Failure = RegisterPkResponse.Result, PunchHoleResponse.Failure

#: Clients translate these texts, and do not try again by themselves.
UNKNOWN_ID_TEXT = "ID does not exist"
OFFLINE_TEXT = "Remote desktop is offline"
TOO_FREQUENT_TEXT = "Too frequent"


#: An id that a user may choose, as clients check it, but for letters outside
#: ASCII.
NEW_ID = re.compile("[A-Za-z][A-Za-z0-9_-]{5,15}")


def reply(origin, message):
    """The action that answers a message the way it came."""
    if origin.link is not None:
        return Send(origin.link, message)
    return SendDatagram(origin.sockaddr, message)


def show(peer_id):
    """An id that anybody may have made up, as the log may have it."""
    return f"{peer_id[:MAX_ID_BYTES]!a}"


class Call(enum.Enum):
    """What an initiator waits for, and so which answers count."""

    PUNCH = "hole punch"  # PunchHoleSent, or RelayResponse with the peer's id
    INTRANET = "same intranet"  # LocalAddr, or RelayResponse with the peer's id
    RELAY = "relay"  # RelayResponse without an id


class Registration:
    """A peer's fresh route and when it was seen: datagrams, or a link of its
    own."""

    __slots__ = ("address", "sockaddr", "link", "seen", "datagram", "version")

    def __init__(self, origin, seen):
        self.address = origin.address
        self.sockaddr = origin.sockaddr  # where its datagrams come from, or None
        self.link = origin.link  # or the link that it holds
        self.seen = seen
        self.datagram = None  # the RegisterPeer that renews it, byte for byte
        self.version = ""  # of the client, as it last told

    @property
    def transport(self):
        """How the peer is connected, for the operator."""
        if self.link is None:
            return "UDP"
        return "WebSocket" if self.link.is_websocket else "TCP"

    @property
    def way(self):
        """How and from where the peer was heard, for the operator."""
        return f"{self.transport} from {self.address}"

    def is_from(self, origin):
        """Whether a message came by this very route."""
        return self.sockaddr == origin.sockaddr and self.link is origin.link

    def is_online(self, now):
        """Whether the peer was heard of lately enough."""
        limit = REGISTRATION_TTL_SECONDS if self.link is None else HEARTBEAT_TTL_SECONDS
        return now - self.seen < limit

    def send(self, message):
        """The action that sends the peer a message."""
        if self.link is not None:
            return Send(self.link, message)
        return SendDatagram(self.sockaddr, message)


class Errand:
    """What a link is for: the answers it awaits, or the peer that registered
    by it."""

    __slots__ = ("awaited", "peer_id", "heard", "candidates")

    def __init__(self):
        self.awaited = {}  # peer_id -> Awaited
        self.peer_id = None  # of the peer that registered over this link
        self.heard = None  # when, of a link that is kept, the last frame came
        self.candidates = 0  # WebRTC candidates passed on


class Awaited:
    """An initiator's request, until its target has answered.

    `token` is the initiator's mangled address with 32 random bits, which only
    the target learns; an IPv6 address has no room for them.
    """

    __slots__ = ("link", "peer_id", "token", "call", "relay_server", "udp_port",
                 "since", "calls", "answered", "vouched")

    def __init__(self, link, peer_id, token, since):
        self.link = link
        self.peer_id = peer_id
        self.token = token
        self.since = since
        self.call = None
        self.relay_server = ""
        self.udp_port = 0  # of the initiator, when B may punch by UDP
        self.calls = 0
        self.answered = False
        self.vouched = True  # the initiator may be told the peer's signed key


def public_ipv6(mangled):
    """A peer's IPv6 address if it is one that others can reach, else b""."""
    if len(mangled) != 18:
        return b""
    address = unmangle(mangled)
    return mangled if address.port and is_public_ipv6(address) else b""


def judge_form(request):
    """The result and refusal for a RegisterPk's form alone; (OK, None) if
    right."""
    size = len(request.id.encode())
    if size < MIN_ID_BYTES:
        return Result.UUID_MISMATCH, Refusal.ID_TOO_SHORT  # the client makes another id
    if not is_usable_id(request.id):
        return Result.INVALID_ID_FORMAT, Refusal.BAD_ID
    if len(request.pk) != PUBLIC_KEY_BYTES or len(request.uuid) > MAX_DEVICE_UUID_BYTES:
        return Result.NOT_SUPPORT, Refusal.BAD_PUBLIC_KEY
    return Result.OK, None


class RelayServers:
    """The relays that clients are sent to; of several, the healthy ones in
    turn.

    An entry may have a network: then it is for initiators in there.  The
    narrowest network that fits decides; who fits none gets the entries without
    one.
    """

    def __init__(self, entries):
        self.entries = entries
        self.names = tuple(dict.fromkeys(entry.name for entry in entries))
        self.healthy = self.names
        self.answering = None  # those that answered the last check, if there was one
        self.turn = 0

    def candidates(self, ip):
        """The relays for an initiator at `ip` (None: anywhere): the healthy
        ones, or all that are meant for it when none is.

        Who comes from the internet gets no relay that only a local network
        reaches, if there is another.
        """
        if not self.entries:
            return ()
        address = ip and ipaddress.ip_address(ip.partition("%")[0])
        fitting = [entry.network for entry in self.entries
                   if entry.network and address and address in entry.network]
        best = max(fitting, key=lambda network: network.prefixlen, default=None)
        names = [entry.name for entry in self.entries if entry.network == best]
        if ip and not is_private(ip):
            names = [name for name in names if not is_private_host(name)] or names
        return [name for name in names if name in self.healthy] or names

    def next_choice(self, ip=None):
        """The relay whose turn it is, or "" when there is none."""
        names = self.candidates(ip)
        return names[self.turn % len(names)] if names else ""

    def choose(self, ip=None):
        """Take the relay whose turn it is; without one clients use our
        host."""
        choice = self.next_choice(ip)
        self.turn += 1
        return choice

    def on_health(self, healthy):
        """Take the result of a check; when none answers the list stays as it
        was."""
        found = tuple(name for name in self.names if name in healthy)
        self.healthy = found or self.healthy
        self.answering = found

    def state(self, name):
        """Whether a relay answers, as far as it was asked: a single one is
        not."""
        if self.answering is None:
            return "not checked"
        return "answers" if name in self.answering else "silent"


def is_private_host(name):
    """Whether a relay's name is an address of a local network."""
    try:
        return is_private(normalise_ip(split_host(name)[0]))
    except ValueError:
        return False  # a name, not an address


class Rendezvous:
    """The state of the ID server, and what it does with each message."""

    #: New peers that wait for the operator, and how long without a new try.
    MAX_APPLICANTS, APPLICANT_SECONDS = 1000, 86400.0
    #: How long it is known when and how a peer without a route was last heard.
    GONE_SECONDS = 86400.0

    def __init__(self, config, key, store, attempts, limits, random_bytes):
        self.config = config
        self.key = key
        self.store = store
        self.attempts = attempts
        self.limits = limits
        self.random_bytes = random_bytes
        self.registering = RegistrationLimits(limits)
        self.relays = RelayServers(config.relay_servers)
        self.local_relay = config.local_ip  # how local peers reach our relay
        self.registrations = {}  # peer_id -> Registration
        self.gone = limits.table(self.GONE_SECONDS)  # peer_id -> its last (seen, way)
        self.renewals = {}  # a client's RegisterPeer datagram -> Registration
        self.unwritten = {}  # peer_id -> Peer on its way to the disk
        self.moving = {}  # peer_id whose old route is asked -> whether it answered
        self.awaited = limits.table(AWAITED_TTL_SECONDS)  # token -> Awaited
        self.intranet = {}  # address of A -> its link, while it awaits a LocalAddr
        self.called = limits.table(CALL_SECONDS)  # ip of a target -> True
        self.kept = limits.table(HEARTBEAT_SECONDS, "connections")  # registered links
        self.udp_ports = limits.table(UDP_PORT_TTL_SECONDS)  # Address -> True
        self.accepted = limits.table(ACCEPTED_SECONDS)  # (place, peer_id) -> True
        self.applicants = limits.table(self.APPLICANT_SECONDS, self.MAX_APPLICANTS)
        self.udp_tests = Rates(limits.table(60.0))  # by place
        self.queries = Rates(limits.table(60.0))  # bytes, by place
        self.requests = Rates(limits.table(60.0))  # by place, peer and both
        self.were_online = set()  # peer ids, when it was last looked
        self.at_address = collections.Counter()  # private ip -> peers registered there

    # -- registration ----------------------------------------------------------

    def online(self, peer_id, now):
        """The registration of a peer that is online, or None."""
        registration = self.registrations.get(peer_id)
        return registration if registration and registration.is_online(now) else None

    def on_register_peer(self, request, origin, now):
        """A peer says that it is still there.

        It proves nothing, so it renews a route but never moves one: from
        anywhere else the peer is asked for its key.
        """
        if not request.id:
            return
        registration = self.registrations.get(request.id)
        if registration is None or not registration.is_from(origin):
            yield reply(origin, UNREGISTERED)
            return
        registration.seen = now
        if origin.datagram is not None:
            self.remember_renewal(registration, origin.datagram)
        yield reply(origin, ONLINE)

    def remember_renewal(self, registration, datagram):
        """The next datagram like this one needs no parsing."""
        if registration.datagram != datagram:
            self.renewals.pop(registration.datagram, None)
            registration.datagram = datagram
            self.renewals[datagram] = registration

    def on_register_pk(self, request, origin, now):
        """A peer claims its id with its device's uuid and its public key."""
        if request.old_id and not request.pk and origin.link is not None:
            yield from self.on_change_of_id(request, origin, now)
            return
        if not request.uuid or not request.pk:
            text = f"{show(request.id)} from {origin.address}"
            yield Refuse(Refusal.NO_DEVICE_UUID, text, request.id)
            return
        result, refusal = self.judge_claim(request, origin, now)
        if refusal is not None:
            text = f"{show(request.id)} from {origin.address}"
            text += self.rivals(request, refusal)
            yield Refuse(refusal, text, request.id)
            if refusal is Refusal.DEVICE_MISMATCH:
                yield Event("clone-suspected", request.id, text)
            yield reply(origin, RegisterPkResponse(result=result))
            return
        yield from self.accept_claim(request, origin, now)

    def rivals(self, request, refusal):
        """What else is known of an id that two devices claim."""
        known = self.store.peers.get(request.id)
        if refusal is not Refusal.DEVICE_MISMATCH or known is None:
            return ""
        return f": another device, last at {known.ip or 'an unknown address'}, has it"

    def judge_claim(self, request, origin, now):
        """The result and refusal for a RegisterPk; (OK, None) if it may
        register.

        UUID_MISMATCH costs a client its id, so it is said only when the id
        really is another device's, or too short ever to be used.
        """
        known = self.unwritten.get(request.id) or self.store.peers.get(request.id)
        result, refusal = judge_form(request)
        if refusal is not None:
            return result, refusal
        barred = self.bar(request.id, known)
        if barred is not None:
            return Result.NOT_DEPLOYED, barred  # which costs no id
        proven = known is not None and (known.device_uuid, known.public_key) == (
            request.uuid, request.pk)
        ip = origin.address.ip
        if not proven and not self.registering.admits_address(ip, now):
            return Result.TOO_FREQUENT, Refusal.TOO_FREQUENT
        if known is None:
            return self.judge_newcomer(request, ip, now)
        if not proven and known.state != RELEASED:
            result, refusal = self.judge_stranger(request, ip, known)
            if refusal is not None:
                return result, refusal
        if not self.registering.admits_id(request.id, now):
            return Result.TOO_FREQUENT, Refusal.TOO_FREQUENT
        return Result.OK, None

    def bar(self, peer_id, known):
        """The refusal of an id or a peer that shall not be served, or
        None."""
        if self.limits.rules.refuses_id(peer_id):
            return Refusal.REFUSED_ID
        return Refusal.DISABLED if known and known.state == DISABLED else None

    def judge_newcomer(self, request, ip, now):
        """The result and refusal for an id that nobody has."""
        enroll = self.config.enroll
        if enroll != "open" and not self.limits.rules.allows_id(request.id):
            if enroll == "closed":
                return Result.NOT_DEPLOYED, Refusal.NOT_ENROLLED
            self.applicants.put((request.id, request.uuid), Peer(
                request.id, request.uuid, request.pk, ip), now)
            return Result.NOT_DEPLOYED, Refusal.AWAITS_APPROVAL
        if not self.registering.admits_id(request.id, now):
            return Result.TOO_FREQUENT, Refusal.TOO_FREQUENT
        if not self.registering.admits_new(ip, now) or not self.has_room():
            return Result.TOO_FREQUENT, Refusal.TOO_MANY_NEW_IDS
        return Result.OK, None

    def has_room(self):
        """Whether one more peer may be known."""
        return len(self.store.peers) + len(self.unwritten) < self.limits.peers

    def judge_stranger(self, request, ip, known):
        """The result and refusal for a claim with another device or key than
        is known."""
        if known.device_uuid != request.uuid:
            return Result.UUID_MISMATCH, Refusal.DEVICE_MISMATCH
        if known.public_key != request.pk and (
                known.ip != ip or known.device_uuid == known.public_key):
            # A phone's uuid is its public key, which every initiator learns:
            # it proves nothing.  This answer, unlike UUID_MISMATCH, costs no
            # id.
            return Result.SERVER_ERROR, Refusal.KEY_CHANGED
        return Result.OK, None

    def accept_claim(self, request, origin, now):
        """Let a proven claim have its route, after what has to come first."""
        old = self.online(request.id, now)
        if (request.uuid == request.pk and old is not None
                and old.address.ip != origin.address.ip):
            yield from self.ask_old_route(request, origin, old, now)
        else:
            yield from self.record_claim(request, origin, now)

    def ask_old_route(self, request, origin, old, now):
        """A phone appears elsewhere: its uuid is no secret, so ask where it
        was."""
        if request.id in self.moving:
            return
        self.moving[request.id] = False
        yield old.send(UNREGISTERED)

        def decide(later):
            answered = self.moving.pop(request.id) or old.seen > now
            if not answered and self.registrations.get(request.id) in (old, None):
                yield from self.record_claim(request, origin, later)
            else:
                yield Refuse(Refusal.OLD_ROUTE_LIVES, (
                    f"{request.id!a} from {origin.address}: {old.address} answers"),
                    request.id)
                yield reply(origin, RegisterPkResponse(result=Result.TOO_FREQUENT))

        yield Later(ROUTE_CHECK_SECONDS, decide)

    def record_claim(self, request, origin, now):
        """Store what is new in a claim, then register its route."""
        known = self.store.peers.get(request.id)
        peer = Peer(request.id, request.uuid, request.pk, origin.address.ip)
        if known is not None:
            same = (known.device_uuid, known.public_key) == (request.uuid, request.pk)
            peer = peer.changed(created=known.created, seen=known.seen,
                                state=known.state if same else "")
        if peer.is_same(known):
            yield from self.register(known, origin, now)
            return
        self.unwritten[request.id] = peer

        def written(later):
            self.unwritten.pop(request.id, None)
            if known is not None and known.ip != peer.ip:
                self.attempts.note_change(peer.peer_id, known.ip, peer.ip, later)
            if known is None:
                yield Event("new-device", peer.peer_id, f"from {peer.ip}")
            yield from self.register(peer, origin, later)

        def failed(later):
            self.unwritten.pop(request.id, None)
            if known is not None and known.public_key == peer.public_key:
                # Only its address is new: that may be forgotten.
                yield from self.register(known, origin, later)
                return
            text = f"{request.id!a} from {origin.address}"
            yield Refuse(Refusal.STORE_FAILED, text, request.id)
            yield reply(origin, RegisterPkResponse(result=Result.SERVER_ERROR))

        yield Store(peer, None, written, failed)

    def register(self, peer, origin, now):
        """Make this the peer's route, and say so."""
        if origin.link is not None and origin.link.ended:
            return  # while its record was written
        barred = self.bar(peer.peer_id, self.store.peers.get(peer.peer_id))
        if barred is not None:  # meanwhile
            text = f"{peer.peer_id!a} from {origin.address}"
            yield Refuse(barred, text, peer.peer_id)
            yield reply(origin, RegisterPkResponse(result=Result.NOT_DEPLOYED))
            return
        registration = self.registrations.get(peer.peer_id)
        if registration is None or not registration.is_from(origin):
            self.end_route(peer.peer_id)
            registration = Registration(origin, now)
            self.registrations[peer.peer_id] = registration
            by = origin.listener.value
            yield Report("registered", f"{peer.peer_id!a} is at {origin.address}, {by}",
                         peer.peer_id)
            yield from self.watch_gateway(origin.address.ip)
        elif peer.peer_id in self.moving:
            self.moving[peer.peer_id] = True
        registration.seen = now
        response = RegisterPkResponse(result=Result.OK)
        if origin.link is not None:
            yield from self.keep_link(origin.link, now)
            self.bind_link(origin.link, peer.peer_id)
            response.keep_alive = KEEP_ALIVE_SECONDS
        yield reply(origin, response)

    def watch_gateway(self, ip):
        """Count the peers at a private address: many there are behind a NAT
        that we are behind as well, as with Docker's, and not in one place."""
        if is_private(ip) and not is_loopback(ip):
            self.at_address[ip] += 1
            if self.at_address[ip] == GATEWAY_PEERS:
                yield Report("gateway", (
                    f"{GATEWAY_PEERS} peers come from {ip}: a gateway hides their "
                    "addresses, so peers find no direct way (with Docker: use "
                    "network_mode: host)"))

    def is_gateway(self, ip):
        """Whether an address stands for many places."""
        return self.at_address[ip] >= GATEWAY_PEERS

    def end_route(self, peer_id):
        """Forget a peer's route and the datagram that renewed it."""
        registration = self.registrations.pop(peer_id, None)
        if registration is not None:
            self.gone.put(peer_id, (registration.seen, registration.way),
                          registration.seen)
            self.renewals.pop(registration.datagram, None)
            ip = registration.address.ip
            if ip in self.at_address:
                self.at_address[ip] -= 1
                if not self.at_address[ip]:
                    del self.at_address[ip]

    # -- links that are kept ---------------------------------------------------

    def errand(self, link):
        """What a link is for."""
        if link.errand is None:
            link.errand = Errand()
        return link.errand

    def keep_link(self, link, now):
        """From now on a link lives by heartbeats instead of by what it
        asks."""
        errand = self.errand(link)
        if errand.heard is None:
            self.kept.put(link, None, now)
            yield Keep(link)
        errand.heard = now

    def bind_link(self, link, peer_id):
        """A link is the route of one peer at a time."""
        errand = self.errand(link)
        former = self.registrations.get(errand.peer_id)
        if errand.peer_id != peer_id and former is not None and former.link is link:
            self.end_route(errand.peer_id)
        errand.peer_id = peer_id

    def on_empty_frame(self, link, now):
        """The answer to a heartbeat; it is not answered in turn."""
        errand = link.errand
        if errand is not None and errand.heard is not None:
            errand.heard = now
            registration = self.registrations.get(errand.peer_id)
            if registration is not None and registration.link is link:
                registration.seen = now

    def beat(self, link, now):
        """Once in a while: ask a kept link for a sign of life, or give it
        up."""
        silent = now - link.errand.heard
        if silent < HEARTBEAT_TTL_SECONDS:
            self.kept.put(link, None, now)
            yield Heartbeat(link)
        else:
            text = f"{link.address} said nothing for {silent:.0f} s"
            yield Refuse(Refusal.LINK_DEAD, text, link.errand.peer_id or "")
            yield Close(link)

    def on_health_check(self, request, origin, now):
        """A session wants to be known to be alive: nothing to do but to keep
        it."""
        yield from self.keep_link(origin.link, now)

    # -- change of id ----------------------------------------------------------

    def on_change_of_id(self, request, origin, now):
        """A peer wants another id; its device's uuid and its live route prove
        it."""
        result, refusal = self.judge_change(request, origin, now)
        if refusal is not None:
            text = f"{show(request.old_id)} to {show(request.id)} from {origin.address}"
            yield Refuse(refusal, text, request.old_id)
            yield reply(origin, RegisterPkResponse(result=result))
            return
        peer = self.store.peers[request.old_id].changed(peer_id=request.id)
        self.unwritten[request.id] = peer

        def written(later):
            self.unwritten.pop(request.id, None)
            self.end_route(request.old_id)
            text = f"{request.old_id!a} is {request.id!a} now"
            yield Report("renamed", text, request.id)
            yield reply(origin, RegisterPkResponse(result=Result.OK))

        def failed(later):
            self.unwritten.pop(request.id, None)
            yield Refuse(Refusal.STORE_FAILED, f"{request.old_id!a} keeps its id")
            yield reply(origin, RegisterPkResponse(result=Result.SERVER_ERROR))

        yield Store(peer, request.old_id, written, failed)

    def judge_change(self, request, origin, now):
        """The result and refusal for a change of id; (OK, None) if it may
        be."""
        if not NEW_ID.fullmatch(request.id):
            return Result.INVALID_ID_FORMAT, Refusal.BAD_ID
        taken = self.unwritten.get(request.id) or self.store.peers.get(request.id)
        barred = self.bar(request.id, taken)
        if barred is not None:
            return Result.NOT_SUPPORT, barred
        if not self.registering.admits_address(origin.address.ip, now):
            return Result.TOO_FREQUENT, Refusal.TOO_FREQUENT
        old = self.store.peers.get(request.old_id)
        live = self.online(request.old_id, now)
        if old is None or live is None or live.address.ip != origin.address.ip:
            return Result.SERVER_ERROR, Refusal.NOT_OWNER
        if old.device_uuid != request.uuid:
            return Result.UUID_MISMATCH, Refusal.DEVICE_MISMATCH
        if not self.registering.admits_id(request.old_id, now):
            return Result.TOO_FREQUENT, Refusal.TOO_FREQUENT
        if self.config.enroll == "closed" and not self.limits.rules.allows_id(
                request.id):
            return Result.NOT_SUPPORT, Refusal.NOT_ENROLLED
        if (taken is not None and taken.device_uuid != request.uuid
                and taken.state != RELEASED):
            return Result.ID_EXISTS, Refusal.ID_TAKEN
        return Result.OK, None

    # -- questions -------------------------------------------------------------

    def on_test_nat_request(self, request, origin, now):
        """Tell a client the port that it has for us, so that it knows its
        NAT."""
        yield Send(origin.link, TestNatResponse(port=origin.address.port))
        yield Close(origin.link)

    def on_udp_test(self, request, origin, now):
        """The same for its UDP port, which is remembered for a hole punch.

        This answer alone is longer than its question, so it is rationed.
        """
        place = self.limits.place(origin.address.ip)
        if place is not None and not self.udp_tests.admits(
                place, self.limits.udp_tests_per_address, now):
            yield Refuse(Refusal.TOO_FREQUENT, f"UDP tests from {origin.address}")
            return
        self.udp_ports.put(origin.address, True, now)
        yield SendDatagram(origin.sockaddr, TestNatResponse(port=origin.address.port))

    def on_online_request(self, request, origin, now):
        """Which of these peers are online: a bit each, most significant first.

        The answer is never shorter than the question asks for: clients index
        it unchecked.
        """
        place, size = origin.link.place, sum(map(len, request.peers))
        size += 2 * len(request.peers)  # a tag and a length each
        if place is not None and not self.queries.admits(
                place, self.limits.online_query_bytes, now, size):
            yield Refuse(Refusal.TOO_MANY_QUERIES, (
                f"{origin.address} asked who of {len(request.peers)} is online"))
            yield Close(origin.link)
            return
        states = bytearray((len(request.peers) + 7) // 8)
        for i, peer_id in enumerate(request.peers):
            if self.online(peer_id, now):
                states[i >> 3] |= 0x80 >> (i & 7)
        yield Send(origin.link, OnlineResponse(states=bytes(states)))
        if origin.listener is NAT_TEST:
            yield Close(origin.link)

    def on_http_proxy_request(self, request, origin, now):
        """A client looks for a web API: there is none, and 404 makes it stop
        asking."""
        yield Send(origin.link, HttpProxyResponse(status=404))

    # -- introductions ---------------------------------------------------------

    def on_punch_hole_request(self, request, origin, now):
        """A wants B: tell B where A is, and keep A's link for B's answer."""
        text = f"{origin.address} asked for {show(request.id)}"
        fault, policy = self.key.fault_of(request.licence_key), self.config.key_policy
        if fault is not None and policy in (None, "require"):
            yield Refuse(fault, text, request.id)
            mismatch = PunchHoleResponse(failure=Failure.LICENSE_MISMATCH)
            yield Send(origin.link, mismatch)
            return
        if fault is not None and policy == "warn":
            yield Tolerate(fault, text, request.id)
        if not self.admits_request(request.id, origin.link.place, now):
            yield Refuse(Refusal.TOO_MANY_REQUESTS, text, request.id)
            yield Send(origin.link, PunchHoleResponse(other_failure=TOO_FREQUENT_TEXT))
            return
        target = self.online(request.id, now)
        if target is None:
            refusal, failure, _ = self.absence(request.id)
            yield Refuse(refusal, f"{text}{self.last_heard(request.id, refusal, now)}",
                         request.id)
            yield Send(origin.link, PunchHoleResponse(failure=failure))
            return
        yield from self.call(request, origin, target, now)

    def call(self, request, origin, target, now):
        """Tell B where A is."""
        awaited = self.await_answer(origin, request.id, now)
        if awaited is None:
            yield from self.refuse_target(request, origin)
            return
        awaited.vouched = self.key.vouches(request.licence_key)
        self.accepted.put((network_key(origin.address.ip), request.id), True, now)
        self.attempts.note_punch(
            origin.address.ip, request.id, target.address.ip, now)
        self.called.put(target.address.ip, True, now)
        yield target.send(self.call_message(request, awaited, target))

    def refuse_target(self, request, origin):
        """A asks for more peers at a time than it may."""
        text = f"{origin.address} asked for {show(request.id)} as well"
        yield Refuse(Refusal.TOO_MANY_TARGETS, text, request.id)
        yield Close(origin.link)

    def admits_request(self, peer_id, place, now):
        """Whether a place may ask for a connection once more; counts it."""
        if place is None:
            return True
        limits, admits = self.limits, self.requests.admits
        peer_id = peer_id[:MAX_ID_BYTES]
        return (admits(place, limits.requests_per_address, now)
                and admits((place, peer_id), limits.requests_per_pair, now)
                and ((place, peer_id) in self.accepted.entries
                     or admits((None, peer_id), limits.requests_per_target, now)))

    def absence(self, peer_id):
        """Why a peer cannot be reached: (refusal, failure, text for the
        user)."""
        barred = self.bar(peer_id, self.store.peers.get(peer_id))
        if barred is not None:
            return barred, Failure.OFFLINE, OFFLINE_TEXT
        if peer_id in self.store.peers:
            return Refusal.OFFLINE, Failure.OFFLINE, OFFLINE_TEXT
        return Refusal.UNKNOWN_ID, Failure.ID_NOT_EXIST, UNKNOWN_ID_TEXT

    def last_heard(self, peer_id, refusal, now):
        """How long a peer that is offline has been silent."""
        if refusal is not Refusal.OFFLINE:
            return ""
        registration = self.registrations.get(peer_id)
        seen, way = self.gone.get(peer_id) or (None, "")
        if registration is not None:
            seen, way = registration.seen, registration.way
        if seen is None:
            return ", which was not heard of since this server's start, or for a day"
        return f", last heard of {now - seen:.0f} s ago by {way}"

    def await_answer(self, origin, peer_id, now):
        """The `Awaited` of a link for a peer: the one under way, or a new one.

        A repeats its request while it waits, and B must see the same token
        then. None when the link asks for too many peers.
        """
        link, waiting = origin.link, self.errand(origin.link).awaited
        awaited = waiting.get(peer_id)
        if awaited is None or awaited.answered or not self.awaited.get(awaited.token):
            self.forget_answered(waiting)
            # An IPv6 token is the address alone, so it can stand for one peer
            # only.
            if len(waiting) >= (1 if link.address.is_ipv6 else self.limits.targets):
                return None
            token = self.make_token(link.address)
            awaited = Awaited(link, peer_id, token, now)
            waiting[peer_id] = awaited
        evicted = self.awaited.put(awaited.token, awaited, now)
        if evicted is not None:
            self.forget_awaited(evicted)
        awaited.calls += 1
        return awaited

    def forget_answered(self, waiting):
        """What a link has been answered, it awaits no more."""
        for awaited in list(waiting.values()):
            if awaited.answered:
                self.forget_awaited(awaited)

    def make_token(self, address):
        """A mangled address whose free bits nobody can guess."""
        return mangle(address, int.from_bytes(self.random_bytes(4), "little"))

    def forget_awaited(self, awaited):
        """Nobody waits for this any more."""
        link, peer_id = awaited.link, awaited.peer_id
        if self.awaited.get(awaited.token) is awaited:
            self.awaited.discard(awaited.token)
        waiting = self.errand(link).awaited
        if waiting.get(peer_id) is awaited:
            del waiting[peer_id]
        if not waiting and self.intranet.get(link.address) is link:
            del self.intranet[link.address]

    def call_message(self, request, awaited, target):
        """The message that calls B: within its network, by a hole, or to the
        relay."""
        link, target_ip = awaited.link, target.address.ip
        a_is_local = self.is_local(link.address.ip)
        b_is_local = self.is_local(target_ip)
        forced = a_is_local != b_is_local or self.must_relay(request, link, target)
        awaited.relay_server = self.relays.choose(link.address.ip)
        if b_is_local and not a_is_local:
            awaited.relay_server = self.local_relay or awaited.relay_server
        same_place = a_is_local and b_is_local or (
            link.address.ip == target_ip and not self.is_gateway(target_ip))
        ipv6 = b"" if forced else public_ipv6(request.socket_addr_v6)
        if same_place and not forced:
            awaited.call = Call.INTRANET
            self.intranet[link.address] = link
            return FetchLocalAddr(
                socket_addr=awaited.token, relay_server=awaited.relay_server,
                socket_addr_v6=ipv6)
        awaited.call = Call.PUNCH
        awaited.udp_port = self.usable_udp_port(request, link, target, forced)
        return self.with_offer(request.webrtc_sdp_offer, target, PunchHole(
            socket_addr=awaited.token, relay_server=awaited.relay_server,
            nat_type=NatType.SYMMETRIC if forced else request.nat_type,
            udp_port=awaited.udp_port, force_relay=forced,
            upnp_port=request.upnp_port, socket_addr_v6=ipv6))

    def usable_udp_port(self, request, link, target, forced):
        """A's UDP port if B may punch there: as we saw it ourselves, not as A
        says."""
        tested = self.udp_ports.get(Address(link.address.ip, request.udp_port))
        usable = (tested and not forced and target.link is None
                  and not link.address.is_ipv6 and not target.address.is_ipv6)
        return request.udp_port if usable else 0

    def with_offer(self, offer, target, message):
        """Add A's WebRTC offer, to a datagram only if it stays within one
        packet."""
        message.webrtc_sdp_offer = offer
        if (offer and target.link is None
                and len(message.encode()) > MAX_SENT_DATAGRAM_BYTES - 4):
            message.webrtc_sdp_offer = ""
        return message

    def must_relay(self, request, link, target):
        """Whether a direct connection is unwanted or cannot come about."""
        return bool(
            self.config.always_use_relay
            or request.force_relay or request.nat_type == NatType.SYMMETRIC
            or link.is_websocket or target.link is not None and target.link.is_websocket
            or link.address.is_ipv6 != target.address.is_ipv6
            or target.address.is_loopback and not link.address.is_loopback)

    def is_local(self, ip):
        """Whether an address is inside the network of --mask."""
        if not self.config.mask:
            return False
        return is_within(ip, self.config.mask)

    def find_awaited(self, token, peer_id, calls, origin):
        """The request that an answer belongs to, or None.

        Who is called to the relay need not name itself again.  Without random
        bits in the token (IPv6) the answer must come from where the peer is
        registered.
        """
        awaited = self.awaited.get(token)
        if awaited is None or awaited.call not in calls:
            return None
        if peer_id != awaited.peer_id and (peer_id or awaited.call is not Call.RELAY):
            return None
        if len(token) == 18 and not self.is_at_home(awaited.peer_id, origin.address.ip):
            return None
        return awaited

    def is_at_home(self, peer_id, ip):
        """Whether an address is where the peer is registered, or in the same
        /64."""
        registration = self.registrations.get(peer_id)
        return registration is not None and (
            network_key(registration.address.ip) == network_key(ip))

    def refuse_answer(self, message, origin):
        """An answer that nobody asked for, or one more than was asked for."""
        text = f"{type(message).__name__} from {origin.address}"
        yield Refuse(Refusal.NOT_AWAITED, text)
        yield Close(origin.link)

    def on_punch_hole_sent(self, answer, origin, now):
        """B has opened its NAT towards A: tell A where B came from."""
        awaited = self.find_awaited(answer.socket_addr, answer.id, [Call.PUNCH], origin)
        if awaited is None or awaited.answered:
            yield from self.refuse_answer(answer, origin)
            return
        response = self.punch_response(awaited, answer, origin)
        text = f"direct address {origin.address} of {awaited.peer_id!a}"
        yield from self.answer_after_hang_up(awaited, response, origin, text)

    def punch_response(self, awaited, answer, origin):
        """What A is told when B has opened its NAT."""
        return PunchHoleResponse(
            socket_addr=self.make_token(origin.address),
            pk=self.signed_identity(awaited, answer),
            relay_server=self.relay_for(awaited, answer.relay_server),
            nat_type=answer.nat_type, is_udp=origin.link is None,
            upnp_port=answer.upnp_port,
            socket_addr_v6=public_ipv6(answer.socket_addr_v6),
            webrtc_sdp_answer=answer.webrtc_sdp_answer)

    def on_punch_hole_sent_by_udp(self, answer, origin, now):
        """B has opened its NAT for datagrams: it says so three times, A is
        told once.

        A source address is easily forged, so nothing is ever sent back for
        this; A is told over its own link.
        """
        awaited = self.find_awaited(answer.socket_addr, answer.id, [Call.PUNCH], origin)
        if awaited is not None and awaited.answered:
            return
        if (awaited is None or not awaited.udp_port
                or not self.is_at_home(awaited.peer_id, origin.address.ip)):
            yield Refuse(Refusal.NOT_AWAITED, f"{origin.address} by UDP")
            return
        awaited.answered = True
        address = origin.address
        text = f"{awaited.link.address} got the UDP address {address} of {answer.id!a}"
        yield Report("introduced", text, awaited.peer_id)
        yield Send(awaited.link, self.punch_response(awaited, answer, origin))

    def on_local_addr(self, answer, origin, now):
        """B is in A's own network: tell A its address there."""
        address = unmangle_strictly(answer.socket_addr)
        unmangle_strictly(answer.local_addr)
        awaited = self.find_intranet(address, answer.id, origin)
        if awaited is None or awaited.answered:
            yield from self.refuse_answer(answer, origin)
            return
        response = PunchHoleResponse(
            socket_addr=answer.local_addr,
            pk=self.signed_identity(awaited, answer),
            relay_server=self.relay_for(awaited, answer.relay_server),
            is_local=True, socket_addr_v6=public_ipv6(answer.socket_addr_v6))
        text = f"local address of {awaited.peer_id!a}"
        yield from self.answer_after_hang_up(awaited, response, origin, text)

    def find_intranet(self, address, peer_id, origin):
        """The request of the initiator at `address` that a LocalAddr belongs
        to.

        B makes the mangled address anew, so no token proves that it was
        called: the answer must come from where it is registered.
        """
        link = self.intranet.get(address)
        for awaited in list(link.errand.awaited.values()) if link else ():
            if (peer_id in ("", awaited.peer_id) and awaited.call is Call.INTRANET
                    and self.is_at_home(awaited.peer_id, origin.address.ip)):
                return awaited
        return None

    def answer_after_hang_up(self, awaited, response, origin, text):
        """B listens only when its connection to us has ended; A must not be
        earlier."""
        awaited.answered = True

        def answer(later):
            yield Report("introduced", f"{awaited.link.address} got the {text}",
                         awaited.peer_id)
            yield Send(awaited.link, response)

        yield HangUp(origin.link, answer)

    def on_relay_response(self, answer, origin, now):
        """B goes to the relay, by its own choice or at A's request: tell A."""
        awaited = self.find_awaited(answer.socket_addr, answer.id or "", Call, origin)
        if awaited is None or awaited.answered:
            yield from self.refuse_answer(answer, origin)
            return
        awaited.answered = True
        response = RelayResponse(
            uuid=answer.uuid, relay_server=self.relay_for(awaited, answer.relay_server),
            version=answer.version, refuse_reason=answer.refuse_reason,
            socket_addr_v6=public_ipv6(answer.socket_addr_v6),
            upnp_port=answer.upnp_port, webrtc_sdp_answer=answer.webrtc_sdp_answer)
        if answer.id:
            response.pk = self.signed_identity(awaited, answer)
        yield from self.report_meeting(awaited, answer)
        yield Send(awaited.link, response)
        yield Close(origin.link)

    def report_meeting(self, awaited, answer):
        """B has said whether it comes to the relay, which may expect it."""
        meeting_place = answer.relay_server or "this relay"
        if answer.refuse_reason:
            text = (f"{awaited.peer_id!a} to {awaited.link.address}: "
                    f"{answer.refuse_reason[:MAX_ID_BYTES]!a}")
            yield Refuse(Refusal.DEVICE_REFUSED, text, awaited.peer_id)
            meeting_place = ""
        else:
            text = f"{awaited.link.address} meets {awaited.peer_id!a} at the relay"
            yield Report("relay-arranged", text, awaited.peer_id)
        if usable_session_uuid(answer.uuid):
            yield Arrange(answer.uuid, awaited.peer_id, awaited.call is Call.RELAY,
                          meeting_place)

    def on_request_relay(self, request, origin, now):
        """A could not reach B directly: send B to the relay.

        Only what B needs is passed on: A's token, key and permissions stay
        here.
        """
        text = f"{origin.address} wants to relay to {show(request.id)}"
        if not self.admits_request(request.id, origin.link.place, now):
            yield Refuse(Refusal.TOO_MANY_REQUESTS, text, request.id)
            yield Send(origin.link, RelayResponse(refuse_reason=TOO_FREQUENT_TEXT))
            return
        target = self.online(request.id, now)
        if target is None:
            refusal, _, reason = self.absence(request.id)
            yield Refuse(refusal, f"{text}{self.last_heard(request.id, refusal, now)}",
                         request.id)
            yield Send(origin.link, RelayResponse(refuse_reason=reason))
            return
        if not usable_session_uuid(request.uuid):
            yield Refuse(Refusal.NO_SESSION_UUID, text, request.id)
            yield Close(origin.link)
            return
        if len(request.relay_server.encode()) > MAX_HOST_BYTES:
            raise Refused(Refusal.MALFORMED, "a relay's name that is too long")
        awaited = self.await_answer(origin, request.id, now)
        if awaited is None:
            yield from self.refuse_target(request, origin)
            return
        awaited.call = Call.RELAY
        self.called.put(target.address.ip, True, now)
        ip = origin.address.ip
        yield Arrange(request.uuid, request.id, self.needs_key(ip, request.id))
        yield target.send(RequestRelay(
            id=request.id, uuid=request.uuid, socket_addr=awaited.token,
            relay_server=request.relay_server or self.relays.choose(ip),
            secure=request.secure, conn_type=request.conn_type))

    def needs_key(self, ip, peer_id):
        """Whether an initiator has yet to show the key, since it was not let in
        lately to ask for this very peer."""
        return (bool(self.key.required) and self.config.key_policy in (None, "require")
                and self.accepted.get((network_key(ip), peer_id)) is None)

    def on_ice_candidate(self, candidate, origin, now):
        """A WebRTC candidate: from A it names B, from B it carries A's
        token."""
        errand = self.errand(origin.link)
        size = len(candidate.candidate.encode()) + len(candidate.session_key.encode())
        errand.candidates += 1
        if size > MAX_CANDIDATE_BYTES or errand.candidates > MAX_CANDIDATES:
            yield Refuse(Refusal.TOO_LARGE, f"WebRTC candidate of {origin.address}")
            return
        passed = IceCandidate(
            session_key=candidate.session_key, candidate=candidate.candidate)
        awaited = errand.awaited.get(candidate.id)
        target = self.online(candidate.id, now)
        if awaited is not None and target is not None:
            passed.socket_addr = awaited.token
            yield target.send(passed)
            return
        awaited = self.awaited.get(candidate.socket_addr)
        if awaited is None or not self.is_at_home(awaited.peer_id, origin.address.ip):
            yield Refuse(Refusal.NOT_AWAITED, f"WebRTC candidate of {origin.address}")
            return
        passed.id = awaited.peer_id
        yield Send(awaited.link, passed)

    def signed_identity(self, awaited, answer):
        """B's id and key under our signature, or b"".

        A B without a version is too old to encrypt; with a pk A would try.
        """
        peer = self.store.peers.get(answer.id)
        registration = self.registrations.get(answer.id)
        if registration is not None:
            registration.version = answer.version[:MAX_VERSION_CHARACTERS]
        if peer is None or not answer.version or not awaited.vouched:
            return b""
        if peer.signed is None:
            peer.signed = self.key.sign_identity(peer.peer_id, peer.public_key)
        return peer.signed

    def relay_for(self, awaited, relay_server):
        """The relay that A is told: B's choice, as far as A can reach it.

        Old targets name none; then it is the one that we named to them.
        Within the network of --mask it is our local address.  An address of
        B's own network is of no use to an initiator from the internet.
        """
        ip = awaited.link.address.ip
        if not relay_server:
            return awaited.relay_server if awaited.call is not Call.RELAY else ""
        if self.is_local(ip):
            return self.local_relay or relay_server
        if relay_server == self.local_relay or (
                not is_private(ip) and is_private_host(relay_server)):
            return self.relays.choose(ip) or relay_server
        return relay_server

    # -- the passing of time ---------------------------------------------------

    def on_link_closed(self, link, now):
        """A link has ended: nobody waits for its answers any more."""
        errand = self.errand(link)
        for awaited in list(errand.awaited.values()):
            self.forget_awaited(awaited)
            yield from self.report_unanswered(awaited, now)
        self.kept.discard(link)
        registration = self.registrations.get(errand.peer_id)
        if registration is not None and registration.link is link:
            self.end_route(errand.peer_id)
            text = f"{errand.peer_id!a} hung up at {link.address}"
            yield Report("left", text, errand.peer_id)
            yield from self.disappoint(errand.peer_id)
        link.errand = None

    def disappoint(self, peer_id):
        """A peer has gone: who still waits for its answer need not wait in
        vain."""
        for _, awaited in list(self.awaited.entries.values()):
            if awaited.peer_id == peer_id and not awaited.answered:
                self.forget_awaited(awaited)
                if awaited.call is Call.RELAY:
                    message = RelayResponse(refuse_reason=OFFLINE_TEXT)
                else:
                    message = PunchHoleResponse(failure=Failure.OFFLINE)
                text = (f"{awaited.link.address} called {peer_id!a}, whose "
                        "connection ended before it answered")
                yield Refuse(Refusal.OFFLINE, text, peer_id)
                yield Send(awaited.link, message)

    def tick(self, now):
        """Once a second: give up what was awaited too long."""
        for _, awaited in self.awaited.expire(now):
            self.forget_awaited(awaited)
            yield from self.report_unanswered(awaited, now)
        for link, _ in self.kept.expire(now):
            yield from self.beat(link, now)
        for table in (self.udp_ports, self.called, self.accepted, self.applicants,
                      self.gone):
            table.expire(now)

    # -- what the operator does ------------------------------------------------

    def enforce(self):
        """End the routes of ids, peers and addresses that are not served any
        more."""
        for peer_id, registration in list(self.registrations.items()):
            if (self.bar(peer_id, self.store.peers.get(peer_id))
                    or self.limits.rules.refuses_address(registration.address.ip)):
                yield from self.cut(peer_id)

    def cut(self, peer_id):
        """End a peer's route and the link that it holds."""
        registration = self.registrations.get(peer_id)
        if registration is not None:
            self.end_route(peer_id)
            yield Report("cut", f"{peer_id!a} at {registration.address}", peer_id)
            yield from self.disappoint(peer_id)
            if registration.link is not None:
                yield Close(registration.link)

    def set_state(self, peer_id, state, done):
        """Write another state of a known peer and end its route; `done` is
        called with whether it was written."""
        peer = self.store.peers[peer_id].changed(state=state)
        yield from self.rewrite(peer, done)

    def approve(self, peer_id, ip, done):
        """Let a disabled peer register again, or an applicant, of which
        `ip` is the address."""
        peer = self.store.peers.get(peer_id)
        if peer is None:
            (peer,) = [one for one in self.applying(peer_id) if ip in ("", one.ip)]

        def approved(is_written):
            if is_written:
                for one in self.applying(peer_id):
                    self.applicants.discard((peer_id, one.device_uuid))
            done(is_written)

        yield from self.rewrite(peer.changed(state=""), approved)

    def applying(self, peer_id):
        """The devices that wait for approval with an id: whoever claims it."""
        return [one for _, one in self.applicants.entries.values()
                if one.peer_id == peer_id]

    def rewrite(self, peer, done):
        """Write a peer as the operator wants it."""
        self.unwritten[peer.peer_id] = peer

        def written(later):
            self.unwritten.pop(peer.peer_id, None)
            if peer.state:
                yield from self.cut(peer.peer_id)
            done(True)

        def failed(later):
            self.unwritten.pop(peer.peer_id, None)
            done(False)
            yield Refuse(Refusal.STORE_FAILED, f"{peer.peer_id!a} stays as it was")

        yield Store(peer, None, written, failed)

    def presence(self, now):
        """Events of who has come online and who has gone since the last
        time."""
        before, self.were_online = self.were_online, {
            peer_id for peer_id, registration in self.registrations.items()
            if registration.is_online(now)}
        for peer_id in self.were_online - before:
            yield Event("peer-online", peer_id, self.registrations[peer_id].way)
        for peer_id in before - self.were_online:
            yield Event("peer-offline", peer_id, "")

    def tidy(self, peer_ids, wall):
        """Of some peers: forget those that were never seen again after their first
        hour, and that long ago, since a wave of forged ones would fill the store;
        release those that were not seen for as long as the operator says."""
        untried_days = self.limits.untried_days if self.config.enroll == "open" else 0
        for peer_id in peer_ids:
            peer = self.store.peers.get(peer_id)
            if peer is None or peer.state or peer_id in self.registrations:
                continue
            days = (wall - max(peer.seen, peer.created)) / 86400
            if untried_days and peer.is_untried() and days > untried_days:
                yield Report("forgotten", f"{peer_id!a} never came back")
                yield from self.rewrite(peer.changed(state=FORGOTTEN), lambda ok: None)
            elif self.config.reclaim_after and days > self.config.reclaim_after:
                text = f"{peer_id!a} was not seen for {days:.0f} days"
                yield Report("released", text)
                yield from self.rewrite(peer.changed(state=RELEASED), lambda ok: None)

    def report_unanswered(self, awaited, now):
        """The target was called and did not answer: what an operator needs to
        know."""
        if awaited.answered:
            return
        awaited.answered = True
        peer_id, address = awaited.peer_id, awaited.link.address
        if now - awaited.since < CALL_SECONDS:
            yield Refuse(Refusal.INITIATOR_LEFT,
                         f"{address}, which called {peer_id!a}", peer_id)
        else:
            registration = self.registrations.get(peer_id)
            likely = "are its UDP and TCP paths to us open?"
            if registration is not None and registration.link is not None:
                likely = ("it is called by the connection that it keeps, so does it "
                          "sleep, or can it open another one to answer?")
            times = "once" if awaited.calls == 1 else f"{awaited.calls} times"
            text = f"{peer_id!a} was called {times} for {address}; {likely}"
            yield Refuse(Refusal.NO_ANSWER, text, peer_id)

    ACCEPTS = {
        UDP: {
            RegisterPeer: on_register_peer,
            RegisterPk: on_register_pk,
            TestNatRequest: on_udp_test,
            PunchHoleSent: on_punch_hole_sent_by_udp,
        },
        TCP: {
            RegisterPeer: on_register_peer,
            RegisterPk: on_register_pk,
            TestNatRequest: on_test_nat_request,
            OnlineRequest: on_online_request,
            PunchHoleRequest: on_punch_hole_request,
            PunchHoleSent: on_punch_hole_sent,
            LocalAddr: on_local_addr,
            RequestRelay: on_request_relay,
            RelayResponse: on_relay_response,
            HealthCheck: on_health_check,
            HttpProxyRequest: on_http_proxy_request,
            IceCandidate: on_ice_candidate,
        },
        NAT_TEST: {
            TestNatRequest: on_test_nat_request,
            OnlineRequest: on_online_request,
        },
    }
    ACCEPTS[WEBSOCKET] = ACCEPTS[TCP]


# == 14. Relay =================================================================
#
# The relay (hbbr): two links that name the same session uuid are paired, and
# their bytes moved without being looked at.  Looking up and inserting is one
# step, so two links that speak in the same instant find each other.
#
# Uses: Constants, Refusals, Messages, Frames and addresses, Limits, Attempts,
# Actions.


#: More bytes than any session will carry, and more seconds.
UNLIMITED = 1 << 62
#: Kinds of connections whose bytes are no messages, once they are established.
TUNNELS = (ConnType.PORT_FORWARD, ConnType.RDP)


class Flow:
    """One direction of a session: the bytes that it may move before it has to
    ask, and how many at a time.

    Pipes subtract what they move from `allowance`; when it is used up the flow
    is starved until it gets more.
    """

    __slots__ = ("allowance", "granted", "window", "starved")

    #: What a flow that wanted little lately gets all the same.
    LEAST_BYTES = 16 * 1024

    def __init__(self):
        self.allowance = self.granted = UNLIMITED
        self.window = PIPE_BUFFER_BYTES
        self.starved = False

    def grant(self, more):
        """Let so much more be moved."""
        self.allowance = self.granted = max(0, self.allowance) + more
        self.window = max(MIN_READ_BYTES, min(PIPE_BUFFER_BYTES, self.allowance))
        self.starved = False

    def limit(self):
        """Let it ask before it moves much."""
        self.allowance = self.granted = self.LEAST_BYTES
        self.window = self.LEAST_BYTES

    def count(self):
        """The bytes moved since the last count."""
        moved, self.granted = self.granted - self.allowance, self.allowance
        return moved

    def want(self, moved):
        """How much more it would like to be granted, having moved so much."""
        if self.starved:
            return UNLIMITED
        return max(0, max(4 * moved, self.LEAST_BYTES) - self.allowance)


class Session:
    """Two paired links: what they may carry, and what they have carried."""

    __slots__ = ("number", "peer_id", "first", "second", "started", "flows", "cap",
                 "carried", "uncharged", "slowed", "downgraded", "rate", "highest",
                 "ticked", "ticked_bytes", "active")

    def __init__(self, number, peer_id, first, second, cap, capped, now):
        self.number = number
        self.peer_id = peer_id  # whom the initiator has reached, "" if it isn't known
        self.first, self.second = first, second
        self.started = self.ticked = self.active = now
        self.cap = cap  # its own `Cap`, or None
        self.flows = Flow(), Flow()
        if capped:
            self.hold_back()
        self.carried = self.uncharged = self.ticked_bytes = 0
        self.slowed = self.downgraded = False
        self.rate = self.highest = 0.0  # kb/s in the last second, and at most

    def __str__(self):
        return (f"session {self.number} of {self.first.address} and "
                f"{self.second.address}")

    def settle(self):
        """Count what the flows have moved."""
        there, back = self.flows
        moved = there.count() + back.count()
        self.carried += moved
        self.uncharged += moved

    def charge(self, now):
        """Charge what was moved to its own cap; returns (what was moved, what
        it would like to move next, and each of its flows)."""
        self.settle()
        moved, self.uncharged = self.uncharged, 0
        wants = [flow.want(moved) for flow in self.flows]
        wanted = sum(wants)
        if self.cap is not None:
            wanted = min(wanted, self.cap.use(moved, now))
        return moved, wanted, wants

    def grant(self, amount, wants):
        """Share an amount between the two directions; whether a starved one
        gets some."""
        starved = False
        for flow, share in zip(self.flows, fair_shares(amount, wants)):
            if share or not flow.starved:
                starved = starved or flow.starved
                flow.grant(share)
        return starved

    def hold_back(self):
        """Let both directions ask before they move much."""
        for flow in self.flows:
            flow.limit()

    def release(self):
        """Carry whatever comes; whether a flow was starved."""
        starved = any(flow.starved for flow in self.flows)
        for flow in self.flows:
            flow.allowance = 0
            flow.grant(UNLIMITED)
        return starved

    def is_busy(self):
        """Whether it has moved anything since it was charged, or wants to."""
        return self.uncharged > 0 or any(
            flow.starved or flow.allowance != flow.granted for flow in self.flows)

    def measure(self, now):
        """Once a second: count, and the rate since the last time."""
        self.settle()
        passed = now - self.ticked
        moved = self.carried - self.ticked_bytes
        self.ticked, self.ticked_bytes = now, self.carried
        self.rate = moved * 8 / 1000 / passed if passed > 0 else 0.0
        self.highest = max(self.highest, self.rate)
        if moved:
            self.active = now


class WaitingLinks:
    """Relay links that wait, under a key each: so many in all, and so many from one
    place."""

    __slots__ = ("table", "at")

    def __init__(self, table):
        self.table = table  # key -> link
        self.at = Tally()

    def add(self, key, link, now):
        """Let a link wait; returns the one that had to make room for it, or
        None."""
        self.at.add(link.place)
        oldest = self.table.put(key, link, now)
        if oldest is not None:
            self.at.remove(oldest.place)
        return oldest

    def discard(self, key):
        """The link under a key, which does not wait any more, or None."""
        link = self.table.discard(key)
        if link is not None:
            self.at.remove(link.place)
        return link

    def expire(self, now):
        """The links that have waited for too long, and do not any more."""
        expired = [link for _, link in self.table.expire(now)]
        for link in expired:
            self.at.remove(link.place)
        return expired


def towards(request):
    """Whom a relay link is for, if it says so: an initiator's does."""
    return f" to {request.id[:MAX_ID_BYTES]!a}" if request.id else ""


def sides(request):
    """Which end of a session a relay link is for, and which it is not:
    initiators name their peer."""
    ends = "the initiator", "the controlled device"
    return ends if request.id else ends[::-1]


class Relay:
    """The state of the relay, and what it does with each link."""

    def __init__(self, config, key, attempts, limits, slowed, refused, now):
        self.config = config
        self.key = key
        self.attempts = attempts
        self.limits = limits
        self.slowed = slowed  # addresses of blacklist.txt
        self.refused = refused  # addresses of blocklist.txt
        self.asks_tickets = config.relay_tickets == "on"
        self.total = cap_of(config.total_bandwidth, now)  # of all sessions together
        self.tickets = limits.table("ticket_seconds")  # session_uuid -> Ticket
        # Those that ask for the key are a stranger's to make, so they have a
        # table of their own to fill.
        self.strange_tickets = limits.table("ticket_seconds")
        # For their ticket, each under itself, and for their partner, by uuid.
        self.early = WaitingLinks(limits.table("early_seconds", "early_links"))
        self.waiting = WaitingLinks(limits.table("partner_seconds", "relay_links"))
        self.sessions = {}  # number -> Session
        self.sessions_at = Tally()
        self.numbers = itertools.count(1)
        self.rounds = 0  # of sharing bandwidth
        self.carried = 0  # bytes of sessions that have ended

    def admits_address(self, address):
        """Whether links from this address are served at all."""
        return address.ip not in self.refused

    def is_listed(self, first, second):
        """Whether one of two links is at an address of blacklist.txt."""
        return first.address.ip in self.slowed or second.address.ip in self.slowed

    def is_unwanted(self, session):
        """Whether a session's peer, or the address of an end, is refused by
        now."""
        links = session.first, session.second
        return (bool(session.peer_id) and self.limits.rules.refuses_id(session.peer_id)
                or not all(self.admits_address(link.address) for link in links))

    def on_request_relay(self, request, origin, now):
        """One end of a session: wait for the other, or pair with it."""
        link = origin.link
        refusal = None if usable_session_uuid(request.uuid) else Refusal.NO_SESSION_UUID
        if self.policy == "require":
            refusal = self.key.fault_of(request.licence_key) or refusal
        if request.id and self.limits.rules.refuses_id(request.id):
            refusal = Refusal.REFUSED_ID
        link.errand = request
        if refusal is not None:
            return self.turn_away(link, refusal)
        if not self.asks_tickets:
            return self.arrive(link, None, now)
        ticket = self.ticket(request.uuid)
        if ticket is None:
            return self.wait_for_ticket(link, now)
        return self.arrive(link, ticket, now)

    @property
    def policy(self):
        """What happens to a link with another key: its ticket may be proof
        enough."""
        return self.config.key_policy or ("warn" if self.asks_tickets else "require")

    def turn_away(self, link, refusal, detail=""):
        """Refuse a link and end it."""
        request, link.errand = link.errand, None
        ticket = self.ticket(request.uuid)
        if ticket is not None and refusal is not Refusal.LONELY:
            ticket.refused = sides(request)[0], refusal
        where = f"{link.address}{towards(request)}"
        yield Refuse(refusal, f"relay link from {where}{detail}",
                     self.peer_of(request))
        yield Close(link)

    def peer_of(self, request):
        """Whom a relay link is about, as far as is known: its initiator says
        so, or its ticket."""
        ticket = self.ticket(request.uuid)
        return request.id[:MAX_ID_BYTES] or (ticket.peer_id if ticket else "")

    # -- tickets ---------------------------------------------------------------

    def wait_for_ticket(self, link, now):
        """A link may be a little ahead of the ID server's word about it."""
        most = self.limits.early_links_per_address
        if most and self.early.at.get(link.place, 0) >= most:
            oldest = next(early for early in self.early.table.entries
                          if early.place == link.place)
            self.early.discard(oldest)
            yield from self.turn_away(oldest, Refusal.NO_TICKET)
        evicted = self.early.add(link, link, now) if most else link
        if evicted is not None:
            yield from self.turn_away(evicted, Refusal.NO_TICKET)

    def ticket(self, session_uuid):
        """A session's ticket, or None."""
        return self.tickets.get(session_uuid) or self.strange_tickets.get(session_uuid)

    def on_ticket(self, session_uuid, ticket, now):
        """The ID server has arranged a session: its links are welcome."""
        known = self.ticket(session_uuid)
        if known is not None:
            known.relay = known.relay or ticket.relay
            return  # arranged before, and perhaps used
        table = self.tickets if ticket.fault_of is None else self.strange_tickets
        table.put(session_uuid, ticket, now)
        for link in [link for link in self.early.table.entries
                     if link.errand.uuid == session_uuid]:
            self.early.discard(link)
            yield from self.arrive(link, ticket, now)

    def ticket_refusal(self, ticket, request):
        """Why a ticket does not let a link in, or None.

        The initiator's link names the peer that it wants; where a ticket asks
        for the key it is this one that has to show it.
        """
        if ticket is None:
            return None
        if self.limits.rules.refuses_id(ticket.peer_id):
            return Refusal.REFUSED_ID  # since its session was arranged
        if ticket.used:
            return Refusal.TICKET_USED
        if ticket.fault_of is not None and request.id:
            return ticket.fault_of(request.licence_key)
        return None

    # -- pairing ---------------------------------------------------------------

    def arrive(self, link, ticket, now):
        """A link that may be carried: its partner is there, or it waits."""
        request = link.errand
        if ticket is not None:
            ticket.came = True
        refusal = self.ticket_refusal(ticket, request)
        if refusal is not None:
            yield from self.turn_away(link, refusal)
            return
        if self.policy == "warn":
            yield from self.tolerate(link, ticket)
        partner = self.waiting.discard(request.uuid)
        if partner is not None and not partner.is_alive():
            yield Close(partner)  # it left in the very moment that this one came
            partner = None
        if partner is None:
            unwanted = self.wait(link, now)
            if unwanted is not None:
                yield from self.turn_away(unwanted, Refusal.TOO_MANY_RELAY_LINKS)
            return
        refusal = self.pair_refusal(partner, link, ticket)
        if refusal is not None:
            yield from self.turn_away(partner, refusal)
            yield from self.turn_away(link, refusal)
            return
        if ticket is not None:
            ticket.used = True
        yield from self.pair(partner, link, ticket, now)

    def tolerate(self, link, ticket):
        """Report a link that has another key than it should."""
        request = link.errand
        fault = self.key.fault_of(request.licence_key)
        if fault is not None:
            whose = towards(request) or (f" for {ticket.peer_id!a}" if ticket else "")
            yield Tolerate(fault, f"relay link from {link.address}{whose}",
                           self.peer_of(request))

    def pair_refusal(self, first, second, ticket):
        """Why two links are not paired, or None.

        Where a ticket asks for the key and neither link names its peer, both
        have to show it.
        """
        limits, places = self.limits, {first.place, second.place} - {None}
        most = limits.sessions_per_address
        if len(self.sessions) >= limits.sessions or any(
                self.sessions_at.get(place, 0) >= most for place in places):
            return Refusal.TOO_MANY_SESSIONS
        if ticket and ticket.fault_of and not (first.errand.id or second.errand.id):
            return (ticket.fault_of(first.errand.licence_key)
                    or ticket.fault_of(second.errand.licence_key))
        return None

    def wait(self, link, now):
        """Let a link wait for its partner; returns the one that must not, or not any
        more, or None."""
        if self.waiting.at.get(link.place, 0) >= self.limits.relay_links_per_address:
            return link
        return self.waiting.add(link.errand.uuid, link, now)

    def pair(self, first, second, ticket, now):
        """Both ends are there: from now on they belong to a session."""
        requests = first.errand, second.errand
        named = ticket.peer_id if ticket else requests[0].id or requests[1].id
        session = self.open_session(named, first, second, now)
        first.errand = second.errand = session
        if first.is_websocket != second.is_websocket and any(
                request.conn_type in TUNNELS for request in requests):
            text = f"{first.address} and {second.address}: WebSocket at one end only"
            yield Report("tunnel-will-break", text)
        yield Event("session-start", session.peer_id, session)
        yield Pair(session)

    def open_session(self, peer_id, first, second, now):
        """A session of two links, with the bandwidth that it may have."""
        slowed = self.is_listed(first, second)
        cap = self.cap_for(slowed, now)
        session = Session(next(self.numbers), peer_id, first, second, cap,
                          cap is not None or self.total is not None, now)
        session.slowed = slowed
        self.sessions[session.number] = session
        for place in {first.place, second.place}:
            self.sessions_at.add(place)
        return session

    def on_session_ended(self, session, word, now):
        """Both links of a session have ended: one line about it."""
        if self.sessions.pop(session.number, None) is None:
            return
        for place in {session.first.place, session.second.place}:
            self.sessions_at.remove(place)
        session.settle()
        self.carried += session.carried
        text = (f"{session} after {now - session.started:.1f} s, "
                f"{session.carried / 1e6:.2f} MB")
        yield Report(word, text, session.peer_id)
        yield Event("session-end", session.peer_id, f"{word}: {text}")

    def on_link_closed(self, link, now):
        """A link has ended before it was paired."""
        if self.early.discard(link) is not None:
            yield Refuse(Refusal.NO_TICKET, (
                f"relay link from {link.address} left before its session was arranged"),
                link.errand.id[:MAX_ID_BYTES])
        if self.waiting.table.get(link.errand.uuid) is link:
            self.waiting.discard(link.errand.uuid)
            yield Refuse(Refusal.LONELY, (
                f"relay link from {link.address}{towards(link.errand)} left: "
                f"{self.loneliness(link.errand, 'had not come yet')}"),
                self.peer_of(link.errand))

    def loneliness(self, request, otherwise):
        """Which end has come, and what became of the other: unless it was
        refused, what else there is to say."""
        came, missing = sides(request)
        ticket = self.ticket(request.uuid)
        if ticket is not None and ticket.refused and ticket.refused[0] == missing:
            otherwise = f"was refused, {ticket.refused[1].value}"
        return f"it is {came}, and {missing} {otherwise}"

    def lapse(self, ticket):
        """A session was arranged here and nobody came; a list of relays may
        have sent it to another one."""
        if ticket.relay and not ticket.came and not self.config.relay_servers:
            text = (f"neither end of a session with {ticket.peer_id!a} came in "
                    f"{self.tickets.seconds:.0f} s; it was sent to "
                    f"{ticket.relay[:MAX_ID_BYTES]!a}; is that port open?")
            yield Refuse(Refusal.LONELY, text, ticket.peer_id)

    def tick(self, now):
        """Once a second: lonely links end, sessions are measured."""
        for table in self.tickets, self.strange_tickets:
            for _, ticket in table.expire(now):
                yield from self.lapse(ticket)
        for link in self.early.expire(now):
            yield from self.turn_away(link, Refusal.NO_TICKET, (
                ": the ID server has not arranged this session"))
        for link in self.waiting.expire(now):
            why = self.loneliness(link.errand, (
                f"did not come in {self.waiting.table.seconds:.0f} s; is its path to "
                "this port open?"))
            yield from self.turn_away(link, Refusal.LONELY, f": {why}")
        idle_limit = self.config.idle_limit or UNLIMITED
        for session in list(self.sessions.values()):
            session.measure(now)
            if session.cap is not None and not session.slowed:
                yield from self.review(session, now)
            if now - session.active > idle_limit:
                yield from self.on_session_ended(session, "idle", now)
                yield Close(session.first)

    def review(self, session, now):
        """Downgrade a session that has carried too much for too long."""
        config, age = self.config, now - session.started
        if (age > config.downgrade_start_check and session.carried / age
                > session.cap.rate * config.downgrade_threshold):
            session.slowed = session.downgraded = True
            session.cap = self.cap_for(True, now)
            session.hold_back()
            if not self.is_capped(session) and session.release():
                yield Resume(session)
            yield Report("downgraded", f"session {session.number} after {age:.0f} s")

    # -- bandwidth -------------------------------------------------------------

    def cap_for(self, slowed, now):
        """The cap of a session, or None."""
        config = self.config
        return cap_of(config.limit_speed if slowed else config.single_bandwidth, now)

    def set_caps(self, now):
        """Take the caps from a new configuration, or new lists, for the
        sessions that there are."""
        had_total, self.total = self.total, cap_of(self.config.total_bandwidth, now)
        for session in self.sessions.values():
            session.settle()  # before its allowance is another one
            was_capped = had_total is not None or session.cap is not None
            listed = self.is_listed(session.first, session.second)
            session.slowed = session.downgraded or listed
            session.cap = self.cap_for(session.slowed, now)
            if self.is_capped(session) and not was_capped:
                session.hold_back()
            elif not self.is_capped(session) and session.release():
                yield Resume(session)

    def total_carried(self):
        """The bytes of all sessions since the start."""
        return self.carried + sum(
            session.carried for session in self.sessions.values())

    def is_capped(self, session):
        """Whether a session has to ask before it moves more."""
        return self.total is not None or session.cap is not None

    def share_bandwidth(self, now):
        """Many times a second, while something is capped: what every session
        may carry until the next time.

        The total is shared max-min fairly, then each session's share between
        its directions: who wants little gets it, the others get alike.
        """
        sessions = [session for session in self.sessions.values()
                    if self.is_capped(session) and session.is_busy()]
        self.rounds += 1
        at = self.rounds % max(1, len(sessions))
        sessions = sessions[at:] + sessions[:at]  # what is rounded up goes round
        charged = [session.charge(now) for session in sessions]
        shares = [wanted for _, wanted, _ in charged]
        if self.total is not None:
            amount = self.total.use(sum(moved for moved, _, _ in charged), now)
            shares = fair_shares(amount, shares)
        for session, share, (_, _, wants) in zip(sessions, shares, charged):
            if session.grant(share, wants):
                yield Resume(session)

    ACCEPTS = {RELAY: {RequestRelay: on_request_relay}}


# == 15. Status ================================================================
#
# What the running server says about itself: the two text consoles of the
# official programs, reached from this machine over the ports of the NAT test
# and of the relay.  They answer questions, and take changes where the operator
# lets them (`--console full`).  What sets a client up, as text and as a QR
# code.  And the status page.  Text in, text out.
#
# Uses: Constants, Frames and addresses, Configuration, Limits, Attempts,
# Rendezvous, Relay.

#: Entries that the official console shows at a time, and the largest number
#: that it takes for the first of them and not for an id.
CONSOLE_PAGE, CONSOLE_LAST = 10, 10_000_000


def is_number(word):
    """Whether a word says from which entry on to show."""
    return word.isascii() and word.isdigit() and int(word) <= CONSOLE_LAST


def first_number(words, default):
    """The first argument as a number, or `default`."""
    return int(words[1]) if len(words) > 1 and is_number(words[1]) else default


def answer_command(console, words, now):
    """The reply to a command; "" to an unknown one. `ReadOnly` for a
    change."""
    command = console.COMMANDS.get(words[0] if words else "")
    try:
        return command(console, words, now) if command else ""
    except ValueError:  # of a word that is no address
        return ""


class ReadOnly(Exception):
    """A command that would change something."""


def no_change(*change):
    """What a console that only answers does about a change."""
    raise ReadOnly()


class RendezvousConsole:
    """The official ID server's console: a method per command.

    `change(name, text)` changes a setting, or raises ReadOnly; without
    arguments it only asks whether changes are taken.
    """

    def __init__(self, rendezvous, utc, change=no_change):
        self.rendezvous = rendezvous
        self.utc = utc  # formats a time of our clock as UTC
        self.change = change

    def help(self, words, now):
        """The commands, one per line."""
        return ("relay-servers(rs) [<host>,...]\nip-blocker(ib) [<ip>|<number>] [-]\n"
                "ip-changes(ic) [<id>|<number>] [-]\n"
                "punch-requests(pr) [<number>] [<number>] | -\n"
                "always-use-relay(aur) [Y|N]\ntest-geo(tg) <ip1> <ip2>\n")

    def relay_servers(self, words, now):
        """The relays that answer, one per line."""
        if len(words) > 1:
            self.change("relay-servers", words[1])
            return ""
        return "".join(f"{name}\n" for name in self.rendezvous.relays.healthy)

    def ip_blocker(self, words, now):
        """Registrations per address: `ip: requests/age ids/age`."""
        limits = self.rendezvous.registering
        limits.counts.expire(now)
        limits.ids.table.expire(now)
        lines = [f"{len(limits.counts)}"]
        if len(words) > 1 and not is_number(words[1]):
            place = network_key(normalise_ip(words[1]))
            if place in limits.counts.entries:
                lines.append(self.blocker_entry(place, now))
            if "-" in words[2:]:
                self.change()
                limits.counts.discard(place)
                limits.ids.table.discard(place)
            return "\n".join(lines) + "\n"
        start = first_number(words, 0)
        places = itertools.islice(limits.counts.entries, start, start + CONSOLE_PAGE)
        lines += [f"{show_place(place)}: {self.blocker_entry(place, now)}"
                  for place in places]
        return "\n".join(lines) + "\n"

    def blocker_entry(self, place, now):
        """`requests/age ids/age` of a place."""
        limits = self.rendezvous.registering
        requests, ids = limits.counts.get(place) or [0], limits.ids.table
        return (f"{requests[0]}/{limits.counts.age(place, now) or 0:.0f}s "
                f"{(ids.get(place) or [0])[0]}/{ids.age(place, now) or 0:.0f}s")

    def ip_changes(self, words, now):
        """Peers that came from several addresses: `id: age {ip: count,
        ...}`."""
        changes = self.rendezvous.attempts.changes
        changes.expire(now)
        if len(words) > 1 and not is_number(words[1]):
            known = words[1] in changes.entries
            text = self.change_entry(words[1], now) + "\n" if known else ""
            if "-" in words[2:]:
                self.change()
                changes.discard(words[1])
            return text
        start = first_number(words, 0)
        ids = itertools.islice(changes.entries, start, start + CONSOLE_PAGE)
        lines = [f"{len(changes)}"]
        lines += [f"{peer_id}: {self.change_entry(peer_id, now)}" for peer_id in ids]
        return "\n".join(lines) + "\n"

    def change_entry(self, peer_id, now):
        """`age {ip: count, ...}` of a peer."""
        changes = self.rendezvous.attempts.changes
        counts = changes.get(peer_id).items()
        addresses = ", ".join(f"{ip}: {count}" for ip, count in counts)
        return f"{changes.age(peer_id, now):.0f}s {{{addresses}}}"

    def punch_requests(self, words, now):
        """Who asked for whom: `time ip -> id@ip`."""
        if "-" in words[1:]:
            self.change()
            self.rendezvous.attempts.punch_requests.clear()
            return ""
        start = first_number(words, 0)
        size = first_number(words[1:], CONSOLE_PAGE)
        records = itertools.islice(
            self.rendezvous.attempts.punch_requests, start, start + size)
        return "".join(
            f"{self.utc(record.at)} {record.initiator_ip} -> "
            f"{record.peer_id}@{record.target_ip}\n" for record in records)

    def always_use_relay(self, words, now):
        """Whether everything is relayed."""
        if len(words) > 1:
            self.change("always-use-relay", "Y" if words[1].upper() == "Y" else "N")
            return ""
        answer = "true" if self.rendezvous.config.always_use_relay else "false"
        return f"ALWAYS_USE_RELAY: {answer}\n"

    def test_geo(self, words, now):
        """The relay that would be chosen next."""
        return f'"{self.rendezvous.relays.next_choice()}"'

    COMMANDS = {
        "h": help,
        "relay-servers": relay_servers, "rs": relay_servers,
        "ip-blocker": ip_blocker, "ib": ip_blocker,
        "ip-changes": ip_changes, "ic": ip_changes,
        "punch-requests": punch_requests, "pr": punch_requests,
        "always-use-relay": always_use_relay, "aur": always_use_relay,
        "test-geo": test_geo, "tg": test_geo,
    }


def show_place(place):
    """An IPv4 address, or an IPv6 /64 by its first address."""
    if isinstance(place, str):
        return place
    return str(ipaddress.IPv6Address(place + bytes(8)))


class RelayConsole:
    """The official relay's console: a method per command.

    `change` as above; `edit(file name, addresses, add)` edits a list.
    """

    def __init__(self, relay, change=no_change, edit=no_change):
        self.relay = relay
        self.change = change
        self.edit = edit

    def help(self, words, now):
        """The commands, one per line."""
        return ("blacklist-add(ba) <ip>[|<ip>...]\nblacklist-remove(br) <ip>|all\n"
                "blacklist(b) [<ip>]\nblocklist-add(Ba) <ip>[|<ip>...]\n"
                "blocklist-remove(Br) <ip>|all\nblocklist(B) [<ip>]\n"
                "downgrade-threshold(dt) [<value>]\ndowngrade-start-check(t) [<s>]\n"
                "limit-speed(ls) [<Mb/s>]\ntotal-bandwidth(tb) [<Mb/s>]\n"
                "single-bandwidth(sb) [<Mb/s>]\nusage(u)\n")

    def slowed(self, words, now):
        """The slowed addresses, or whether one is."""
        return list_or_member(self.relay.slowed, words)

    def refused(self, words, now):
        """The refused addresses, or whether one is."""
        return list_or_member(self.relay.refused, words)

    def editor(name, add):
        """The command that adds to a list or removes from it."""
        def edit(self, words, now):
            self.edit(name, words[1].split("|") if len(words) > 1 else [], add)
            return ""

        return edit

    def getter(name, unit):
        """The command that shows a setting, or changes it."""
        def get(self, words, now):
            if len(words) > 1:
                self.change(name, words[1])
                return ""
            value = getattr(self.relay.config, name.replace("-", "_"))
            return "unlimited\n" if value is None else f"{value:g}{unit}\n"

        return get

    def usage(self, words, now):
        """Every session, those that carried most first."""
        sessions = sorted(self.relay.sessions.values(), key=lambda s: -s.carried)
        return "".join(self.usage_line(session, now) for session in sessions)

    def usage_line(self, session, now):
        """One session, by its second link: age, MB, highest, average, current
        kb/s."""
        age, megabytes = now - session.started, session.carried / 1048576
        average = session.carried * 8 / 1000 / age if age > 0 else 0.0
        rates = f"{session.highest:.0f}kb/s {average:.0f}kb/s {session.rate:.0f}kb/s"
        return f"{session.second.address}: {age:.0f}s {megabytes:.2f}MB {rates}\n"

    COMMANDS = {"h": help, "usage": usage, "u": usage}
    for word, short, command in (
            ("blacklist-add", "ba", editor(SLOWED_FILE, True)),
            ("blacklist-remove", "br", editor(SLOWED_FILE, False)),
            ("blacklist", "b", slowed),
            ("blocklist-add", "Ba", editor(REFUSED_FILE, True)),
            ("blocklist-remove", "Br", editor(REFUSED_FILE, False)),
            ("blocklist", "B", refused),
            ("downgrade-threshold", "dt", getter("downgrade-threshold", "")),
            ("downgrade-start-check", "t", getter("downgrade-start-check", "s")),
            ("limit-speed", "ls", getter("limit-speed", "Mb/s")),
            ("total-bandwidth", "tb", getter("total-bandwidth", "Mb/s")),
            ("single-bandwidth", "sb", getter("single-bandwidth", "Mb/s"))):
        COMMANDS[word] = COMMANDS[short] = command
    del editor, getter, word, short, command


def list_or_member(addresses, words):
    """All addresses, one per line, or whether the one asked for is among
    them."""
    if len(words) > 1:
        return f"{str(normalise_ip(words[1]) in addresses).lower()}\n"
    return "".join(f"{ip}\n" for ip in sorted(addresses))


# -- facts ---------------------------------------------------------------------
#
# What the status page, `/status.json`, `/metrics` and the tables of `peers`,
# `sessions` and `relay-servers` tell.  `now` and `wall` are the same moment, by our
# clock and as Unix time.


def peer_facts(rendezvous, peer, now, wall):
    """A known peer: its route while it has one, else where it was."""
    facts = {"id": peer.peer_id, "state": peer.state or "offline", "address": peer.ip,
             "transport": "", "seen": peer.seen, "version": ""}
    registration = rendezvous.registrations.get(peer.peer_id)
    if registration is not None:
        facts.update(address=str(registration.address), version=registration.version,
                     transport=registration.transport,
                     seen=round(wall - (now - registration.seen)))
        if registration.is_online(now) and not peer.state:
            facts["state"] = "online"
    return facts


def all_peer_facts(rendezvous, now, wall):
    """Yield the facts of those who are online, of who waits for approval, and of
    all others."""
    known = rendezvous.store.peers
    for peer_id, registration in rendezvous.registrations.items():
        if registration.is_online(now) and peer_id in known:
            yield peer_facts(rendezvous, known[peer_id], now, wall)
    for _, peer in rendezvous.applicants.entries.values():
        yield {"id": peer.peer_id, "state": "waits for approval", "address": peer.ip,
               "transport": "", "seen": 0, "version": ""}
    for peer in known.values():
        if rendezvous.online(peer.peer_id, now) is None:
            yield peer_facts(rendezvous, peer, now, wall)


def session_facts(session, now):
    """A relayed session: who, for how long, and how much."""
    return {"number": session.number, "peer": session.peer_id,
            "first": str(session.first.address), "second": str(session.second.address),
            "seconds": round(now - session.started), "bytes": session.carried,
            "bits_per_second": round(session.rate * 1000)}


def relay_facts(relays):
    """The relays that clients are sent to, for whom, and whether they answer."""
    return [{"name": name, "state": relays.state(name),
             "for": ", ".join(str(entry.network) for entry in relays.entries
                              if entry.name == name and entry.network)}
            for name in relays.names]


def ago(seen, wall):
    """How long ago something was, "" if it never was."""
    return f"{lasted(max(0, wall - seen))} ago" if seen else ""


# -- metrics -------------------------------------------------------------------

#: What `/metrics` tells: name, kind, help, and where it stands in a snapshot.
METRICS = (
    ("rustdesk_up_seconds", "gauge", "Time since the start.", "uptime_seconds"),
    ("rustdesk_peers_known", "gauge", "Known peers.", "peers_known"),
    ("rustdesk_peers_online", "gauge", "Peers that are online.", "peers_online"),
    ("rustdesk_connections", "gauge", "Open TCP connections.", "connections"),
    ("rustdesk_sessions", "gauge", "Relayed sessions.", "sessions_open"),
    ("rustdesk_relayed_bytes_total", "counter", "Bytes relayed.", "relayed_bytes"),
)


def metrics_text(snapshot):
    """A snapshot in Prometheus' text format (version 0.0.4)."""
    lines = []
    for name, kind, text, key in METRICS:
        lines += metric_head(name, kind, text) + [f"{name} {snapshot[key]}"]
    name = "rustdesk_outcomes_total"
    lines += metric_head(name, "counter", "Outcomes and refusals by their word.")
    lines += [f'{name}{{outcome="{word}"}} {count}'
              for word, count in sorted(snapshot["outcomes"].items())]
    name = "rustdesk_relay_up"
    lines += metric_head(name, "gauge", "Whether a relay of the list answers.")
    for relay in snapshot["relays"]:
        label = relay["name"].replace("\\", r"\\").replace('"', r'\"')
        value = {"answers": 1, "silent": 0}.get(relay["state"], "NaN")
        lines.append(f'{name}{{relay="{label}"}} {value}')
    name = "rustdesk_info"
    lines += metric_head(name, "gauge", "The version that runs.")
    lines.append(f'{name}{{version="{snapshot["version"]}"}} 1')
    return "\n".join(lines)


def metric_head(name, kind, text):
    """What stands before the values of a metric."""
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


# -- QR codes ------------------------------------------------------------------
#
# As much of ISO/IEC 18004 as a client's configuration needs: bytes, error
# correction level M, versions 1 to 20.  `qr_code` does what the standard tells, in
# its order.  `qr_blank` draws what all codes of a version share and leaves None
# where data go, which also says how many codewords fit.  `qr_codewords` pads the
# data, cuts them into blocks, gives each its Reed-Solomon remainder, and
# interleaves them all.  `qr_fill` lays their bits along `qr_path` under one of
# eight masks, and the one with the least `qr_penalty` is taken.  A code is a list
# of rows of 0 (light) and 1 (dark).

#: Of each version from 1, at level M: error correction codewords of a block, and
#: the number of blocks (table 9).
QR_CHECKS = (10, 16, 26, 18, 24, 16, 18, 22, 22, 26, 30, 22, 22, 24, 24, 28, 28, 26,
             26, 26)
QR_BLOCKS = (1, 1, 1, 2, 2, 4, 4, 4, 5, 5, 5, 8, 9, 9, 10, 10, 11, 13, 14, 16)

#: Modules of light around a code, without which scanners don't find it.
QR_QUIET_MODULES = 4

#: A mask turns over the modules where its rule is 0 (table 10).
QR_MASKS = (
    lambda row, column: (row + column) % 2,
    lambda row, column: row % 2,
    lambda row, column: column % 3,
    lambda row, column: (row + column) % 3,
    lambda row, column: (row // 2 + column // 3) % 2,
    lambda row, column: row * column % 2 + row * column % 3,
    lambda row, column: (row * column % 2 + row * column % 3) % 2,
    lambda row, column: ((row + column) % 2 + row * column % 3) % 2,
)


def qr_code(data, mask=None):
    """The code of some bytes, with the best mask or a given one.

    ValueError if they don't fit into version 20: more than 666.
    """
    for version, (checks, blocks) in enumerate(zip(QR_CHECKS, QR_BLOCKS), 1):
        blank = qr_blank(version)
        total = sum(row.count(None) for row in blank) // 8
        count_bits = 8 if version < 10 else 16
        if (4 + count_bits + 7) // 8 + len(data) <= total - checks * blocks:
            break
    else:
        raise ValueError(f"{len(data)} bytes are too many for a QR code")
    codewords = qr_codewords(data, count_bits, total, checks, blocks)
    masks = range(len(QR_MASKS)) if mask is None else [mask]
    return min((qr_fill(blank, codewords, mask) for mask in masks), key=qr_penalty)


def qr_blank(version):
    """The patterns that all codes of a version have, None where data go."""
    size = 17 + 4 * version
    blank = [[None] * size for _ in range(size)]
    for at in range(size):
        blank[6][at] = blank[at][6] = 1 - at % 2
    corners = (6, 6), (6, size - 7), (size - 7, 6)
    for place in itertools.product(qr_alignment(version), repeat=2):
        if place not in corners:
            qr_square(blank, *place, 2, light=(1,))
    for row, column in (3, 3), (3, size - 4), (size - 4, 3):
        qr_square(blank, row, column, 4, light=(2, 4))
    qr_format(blank, 0)  # to be written over
    if version >= 7:
        information = with_remainder(version, 0x1F25, 12)
        for i in range(18):
            far, near = size - 11 + i % 3, i // 3
            blank[far][near] = blank[near][far] = information >> i & 1
    return blank


def qr_alignment(version):
    """The rows, and the columns, in which alignment patterns have their
    middle."""
    if version == 1:
        return []
    count, last = version // 7 + 2, 10 + 4 * version
    step = 2 * -(-(last - 6) // (2 * (count - 1)))  # even, rounded up
    return [6, *range(last - step * (count - 2), last + 1, step)]


def qr_square(matrix, row, column, radius, light):
    """Draw squares in one another, those at the distances `light` in light."""
    size = len(matrix)
    for y in range(max(row - radius, 0), min(row + radius + 1, size)):
        for x in range(max(column - radius, 0), min(column + radius + 1, size)):
            distance = max(abs(y - row), abs(x - column))
            matrix[y][x] = int(distance not in light)


def with_remainder(value, divisor, bits):
    """A value followed by its remainder as a polynomial over GF(2)."""
    rest = value << bits
    while rest.bit_length() > bits:
        rest ^= divisor << rest.bit_length() - bits - 1
    return value << bits | rest


def qr_format(matrix, mask):
    """Write level M (00) and the mask, twice, and the module that is always
    dark."""
    information = with_remainder(0b00 << 3 | mask, 0x537, 10) ^ 0x5412
    size, near = len(matrix), (0, 1, 2, 3, 4, 5, 7, 8)
    for i in range(15):
        bit = information >> i & 1
        if i < 8:
            matrix[near[i]][8] = matrix[8][size - 1 - i] = bit
        else:
            matrix[8][near[14 - i]] = matrix[size - 15 + i][8] = bit
    matrix[size - 8][8] = 1


def qr_codewords(data, count_bits, total, checks, blocks):
    """Data and error correction codewords in the order of their drawing."""
    stream = (0b0100 << count_bits | len(data)) << 8 * len(data)  # 0100 means bytes
    stream = (stream | int.from_bytes(data, "big")) << 4  # the terminator
    words = list(stream.to_bytes((count_bits + 8) // 8 + len(data), "big"))
    padding = itertools.cycle((0xEC, 0x11))
    words += itertools.islice(padding, total - checks * blocks - len(words))
    least, longer = divmod(total - checks * blocks, blocks)  # the last ones have 1 more
    sizes = [least] * (blocks - longer) + [least + 1] * longer
    ends = list(itertools.accumulate(sizes))
    parts = [words[end - size:end] for end, size in zip(ends, sizes)]
    return (qr_interleave(parts)
            + qr_interleave([reed_solomon(part, checks) for part in parts]))


def qr_interleave(parts):
    """The first of each part, the second of each, and so on."""
    return [word for words in itertools.zip_longest(*parts) for word in words
            if word is not None]


def gf_multiply(x, y):
    """The product in GF(256) modulo x^8 + x^4 + x^3 + x^2 + 1."""
    product = 0
    for i in range(7, -1, -1):
        product = product << 1 ^ (product >> 7) * 0x11D ^ (y >> i & 1) * x
    return product


def reed_solomon(words, count):
    """The remainder of codewords by the product of (x - 2^i) for i <
    `count`."""
    divisor, root = [1], 1
    for _ in range(count):
        scaled = [gf_multiply(factor, root) for factor in divisor]
        divisor = [a ^ b for a, b in zip([*divisor, 0], [0, *scaled])]
        root = gf_multiply(root, 2)
    rest = [0] * count
    for word in words:
        factor = word ^ rest[0]
        rest = [a ^ gf_multiply(b, factor) for a, b in zip([*rest[1:], 0], divisor[1:])]
    return rest


def qr_path(size):
    """Where the bits go: columns in pairs from the right, up and down in turn,
    past the timing pattern of column 6."""
    for turn, right in enumerate([*range(size - 1, 6, -2), 5, 3, 1]):
        rows = range(size) if turn % 2 else range(size - 1, -1, -1)
        for row in rows:
            yield row, right
            yield row, right - 1


def qr_fill(blank, codewords, mask):
    """A blank with codewords in it, and what of the last byte is free with
    0."""
    matrix, turned_over = [row[:] for row in blank], QR_MASKS[mask]
    bits = (word >> i & 1 for word in codewords for i in range(7, -1, -1))
    for row, column in qr_path(len(matrix)):
        if matrix[row][column] is None:
            matrix[row][column] = next(bits, 0) ^ (turned_over(row, column) == 0)
    qr_format(matrix, mask)
    return matrix


def qr_penalty(matrix):
    """How hard a code is to read: long runs, squares of one colour, what looks
    like a corner, and more of one colour than of the other (7.8.3)."""
    score, area = 0, len(matrix) ** 2
    for row in [*matrix, *zip(*matrix)]:
        line = "".join(map(str, row))
        score += sum(len(run) - 2 for run in re.findall("0{5,}|1{5,}", line))
        for corner in "(?<=0000)(?=10111010)", "(?<=0)(?=10111010000)":
            score += 40 * len(re.findall(corner, f"0000{line}0000"))
    for row, below in zip(matrix, matrix[1:]):
        squares = zip(row, row[1:], below, below[1:])
        score += 3 * sum(sum(square) in (0, 4) for square in squares)
    return score + 10 * (abs(20 * sum(map(sum, matrix)) - 10 * area) // area)


def qr_framed(matrix):
    """A code with the light around it."""
    side, size = [0] * QR_QUIET_MODULES, len(matrix) + 2 * QR_QUIET_MODULES
    above = [[0] * size] * QR_QUIET_MODULES
    return [*above, *([*side, *row, *side] for row in matrix), *above]


def qr_text(matrix, coloured=False):
    """A code for a terminal, two modules to a character.

    Coloured it is black on white on any terminal.  Else what is light is drawn,
    so it is right where letters are lighter than what is behind them.
    """
    rows = [*qr_framed(matrix), [0] * (len(matrix) + 2 * QR_QUIET_MODULES)]
    before, after = ("\x1b[38;5;16;48;5;231m", "\x1b[0m") if coloured else ("", "")
    lines = ("".join(" ▀▄█"[(upper == coloured) + 2 * (lower == coloured)]
                     for upper, lower in zip(*pair))
             for pair in zip(rows[::2], rows[1::2]))
    return "".join(f"{before}{line}{after}\n" for line in lines)


def qr_svg(matrix):
    """A code as an SVG picture."""
    rows = ["".join(map(str, row)) for row in qr_framed(matrix)]
    runs = ((y, *run.span()) for y, row in enumerate(rows)
            for run in re.finditer("1+", row))
    path = "".join(f"M{x} {y}h{end - x}v1h{x - end}z" for y, x, end in runs)
    size = len(rows)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{8 * size}" '
            f'height="{8 * size}" viewBox="0 0 {size} {size}" '
            'shape-rendering="crispEdges"><rect width="100%" height="100%" '
            f'fill="#fff"/><path d="{path}"/></svg>\n')


# -- a client's configuration --------------------------------------------------
#
# How an ID server is written is in the protocol (1.1).  All else here is not: it
# is what released clients are publicly known to take.  An import string is JSON
# with four names, base64 without padding, written backwards; `--config` takes the
# same, as administrator; a Windows client reads its own file name.  That mobile
# clients scan `config=` and JSON has not been tried with one.

#: What names a server in a file name, and can be there on every system; a client
#: ends it at a comma.
PLAIN_SETTING = re.compile(r"[A-Za-z0-9._+=-]*")

#: How each system runs the installed client as administrator.
CLIENT_COMMANDS = {
    "windows": r'"C:\Program Files\RustDesk\rustdesk.exe" --config',
    "macos": "sudo /Applications/RustDesk.app/Contents/MacOS/RustDesk --config",
    "linux": "sudo rustdesk --config",
}


def id_server_text(host, port):
    """What to type as ID server; clients know the usual port by themselves."""
    name, own_port = split_host(host)
    if own_port is not None:
        return host
    return name if port == RENDEZVOUS_PORT else str(Address(name, port))


def client_config(host, port, relay, key, api=""):
    """All that a client can be set up with, as {name: text}."""
    settings = {"host": id_server_text(host, port), "key": key, "relay": relay,
                "api": api}
    packed = base64.urlsafe_b64encode(json.dumps(settings, separators=",:").encode())
    string = packed.decode().rstrip("=")[::-1]  # letters and digits, for usual names
    given = {name: text for name, text in settings.items() if text}
    commands = {system: f"{command} {string}"
                for system, command in CLIENT_COMMANDS.items()}
    return {**settings, "config": string, "file_name": client_file_name(given, string),
            **commands, "qr": "config=" + json.dumps(given, separators=",:")}


def client_file_name(given, string):
    """The name by which a Windows client is set up when it is started.

    The comma at its end keeps the ` (1)` of a second download apart.  What
    cannot be in a file name, such as a port's colon, goes in packed.
    """
    if all(map(PLAIN_SETTING.fullmatch, given.values())):
        return f"rustdesk-{','.join(map('='.join, given.items()))},.exe"
    return f"rustdesk-licensed-{string}.exe"


def client_instructions(config):
    """What to do with a `client_config`, as lines for a person."""
    lines = ["in RustDesk: Settings, Network, ID/Relay server"]
    lines += [f"  {label + ':':11} {config[name]}" for name, label in (
        ("host", "ID server"), ("relay", "Relay"), ("api", "API server"),
        ("key", "Key")) if config[name]]
    lines += ["or copy this and choose there: Import server config",
              f"  {config['config']}", "or let an installed client run, once"]
    for system, name in (("windows", "Windows, as administrator"), ("macos", "macOS"),
                         ("linux", "Linux")):
        lines += [f"  {name}:", f"    {config[system]}"]
    return [*lines, "or give the Windows client this name before it is started",
            f"  {config['file_name']}"]


# -- the status page -----------------------------------------------------------
#
# One HTML document, well-formed XML too: no script, no picture and no font from
# elsewhere, so it asks nothing of anybody and can be kept.  `escape` is around
# every value that comes from outside; what a helper returns is HTML.  A tone (good,
# warn, bad, quiet) is a class that colours a dot or a bar, and never says what the
# words beside it don't.  In the source the order is that of a phone, from the top.

#: Peers and sessions on the page; the command line shows them all.
PAGE_PEERS, PAGE_SESSIONS = 200, 50

#: How the page colours the states of a peer.
PEER_TONES = {"online": "good", "waits for approval": "warn", "disabled": "bad"}

#: How it colours outcomes; endings such as `idle` are neither good nor bad.
OUTCOME_TONES = {**{refusal.value: "warn" for refusal in Refusal},
                 "registered": "good", "introduced": "good", "relay-arranged": "good",
                 "finished": "good"}

#: Browsers fetch nothing for the page but itself, even if a value were not escaped.
PAGE_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
               "base-uri 'none'; form-action 'none'")

PAGE_STYLE = """
:root{color-scheme:light dark;--ground:#f5f6f8;--card:#fff;--line:#e4e7ec;--ink:#16191f;
--soft:#5d6675;--faint:#eef0f4;--good:#0f7b54;--warn:#a85b00;--bad:#c22f24;
--quiet:#8b94a3;--bar:#3a6df0}
@media (prefers-color-scheme:dark){:root{--ground:#0d1014;--card:#161a20;--line:#272c35;
--ink:#e9ebef;--soft:#9aa4b2;--faint:#20252d;--good:#43bd8d;--warn:#eba53a;
--bad:#f5766a;--quiet:#6d7685;--bar:#6d95ff}}
*{box-sizing:border-box;margin:0;padding:0}
html{-webkit-text-size-adjust:100%}
body{background:var(--ground);color:var(--ink);padding:32px 20px 40px;
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
header,main,footer{max-width:1200px;margin:0 auto}
header{display:flex;flex-wrap:wrap;align-items:center;gap:4px 24px;margin-bottom:24px}
h1{font-size:24px;line-height:1.25;letter-spacing:-.015em}
header>div{flex:1 1 260px}
small,.soft{color:var(--soft);font-size:13px;font-weight:400}
.verdict{font-size:17px;font-weight:600}
.dot::before{content:"";display:inline-block;width:.6em;height:.6em;border-radius:50%;
margin-right:.55em;background:var(--tone)}
.good{--tone:var(--good)}.warn{--tone:var(--warn)}.bad{--tone:var(--bad)}
.quiet{--tone:var(--quiet)}
.warnings{grid-column:1/-1;list-style:none;padding:12px 18px;border-radius:12px;
background:var(--card);border:1px solid var(--line);border-left:4px solid var(--warn)}
main{display:grid;grid-template-columns:minmax(0,1fr) 336px;gap:16px;align-items:start}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;
padding:16px 18px 18px;min-width:0}
.wide{grid-column:1/-1}
.side{display:grid;gap:16px;grid-column:2;grid-row:var(--row)}
.peers{grid-column:1;grid-row:var(--row)}
.title{display:flex;flex-wrap:wrap;justify-content:space-between;align-items:baseline;
gap:0 16px;margin-bottom:10px}
h2{font-size:15px;line-height:1.4}
.tiles{display:grid;grid-template-columns:repeat(4,minmax(0,1fr));gap:16px}
.tiles .card{padding:14px 18px}
.tiles p{color:var(--soft);font-size:13px}
.tiles b{display:block;font-size:34px;line-height:1.25;font-weight:650;
letter-spacing:-.025em}
.tiles b small{font-size:17px;letter-spacing:0;margin-left:.25em}
.chart{position:relative;padding-top:18px}
.chart svg{display:block;width:100%;height:120px}
.chart rect{fill:var(--bar)}.chart rect:hover{fill:var(--ink)}
.chart path{stroke:var(--line);vector-effect:non-scaling-stroke}
.chart span{position:absolute;top:0;left:0}
.axis{display:flex;justify-content:space-between;margin-top:6px}
table{width:100%;border-collapse:collapse}
th{font-size:12px;font-weight:500;color:var(--soft);text-align:left;
padding:0 14px 6px 0}
td{padding:7px 14px 7px 0;border-top:1px solid var(--line);vertical-align:baseline}
td:first-child{font-weight:600;min-width:7.2em}
.peers td:nth-child(n+3){color:var(--soft);font-size:13px}
.peers td:nth-child(2){min-width:7em}.peers td:nth-child(4){min-width:7em}
.peers td:nth-child(5){min-width:3.6em}
.sessions td:nth-child(n+2):nth-child(-n+4){white-space:nowrap}
td small{margin-left:.5em}
th:last-child,td:last-child{text-align:right;padding-right:0}
.bars{list-style:none}
.bars li{display:grid;grid-template-columns:1fr auto;gap:0 12px;padding:5px 0}
.bars i{grid-column:1/-1;height:4px;border-radius:2px;background:var(--faint);
margin-top:2px}
.bars u{display:block;height:4px;min-width:4px;border-radius:2px;background:var(--tone)}
.list{list-style:none}
.list li{display:flex;justify-content:space-between;gap:12px;padding:4px 0}
.setup svg{display:block;width:190px;height:auto;border-radius:8px;margin:0 auto 12px}
dt{color:var(--soft);font-size:13px;margin-top:8px}
dd code{font:13px/1.45 ui-monospace,"SF Mono",Menlo,Consolas,monospace;user-select:all;
-webkit-user-select:all}
.more{margin-top:12px}
footer{margin-top:24px;display:flex;flex-wrap:wrap;justify-content:space-between;
gap:0 24px}
@media (max-width:980px){
body{padding:20px 14px 32px}
header{margin-bottom:16px}
main{grid-template-columns:minmax(0,1fr);gap:12px}
.side,.peers,.wide{grid-column:1;grid-row:auto}.side{gap:12px}
.tiles{grid-template-columns:1fr 1fr;gap:12px}.tiles .card{padding:12px 14px}
.tiles b{font-size:28px}.tiles b small{font-size:15px}
.card{padding:14px}
.chart svg{height:96px}
table,tbody{display:block}thead{display:none}
tr{display:grid;grid-template-columns:1fr auto;align-items:baseline;gap:0 12px;
padding:8px 0;border-top:1px solid var(--line)}
tbody tr:first-child{border:0;padding-top:0}
td,td:last-child{border:0;padding:0}.card tr td{min-width:0}
td:nth-child(2n){text-align:right}
td:nth-child(n+3){color:var(--soft);font-size:13px}
td:nth-child(5){grid-column:1/-1;text-align:left}
.peers tr{grid-template-columns:minmax(0,auto) minmax(3.4em,1fr) minmax(0,auto)}
.peers td:nth-child(2){grid-area:1/3}.peers td:nth-child(3){grid-area:2/1/3/3}
.peers td:nth-child(4){grid-area:2/3}.peers td:nth-child(5){grid-area:1/2}
}
"""


def escape(value):
    """A text as HTML; what would not be seen, or turn the text around, is
    named."""
    text = printable(str(value))
    for sign, name in zip("&<>\"'", ("amp", "lt", "gt", "quot", "#39")):
        text = text.replace(sign, f"&{name};")
    return text


def status_page(snapshot):
    """The status page of a snapshot, which is a dictionary of what the server
    knows right now and may be told to who asks."""
    verdict, tone = page_verdict(snapshot)
    name = snapshot["setup"]["host"] if snapshot["setup"] else "RustDesk server"
    title = f"{snapshot['peers_online']:,} online, {verdict.lower()}: {name}"
    parts = (page_warnings, page_tiles, page_traffic, page_sessions, page_side,
             page_peers)
    main = "\n".join(filter(None, (part(snapshot) for part in parts)))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8" />
<meta http-equiv="Content-Security-Policy" content="{PAGE_POLICY}" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<meta name="referrer" content="no-referrer" /><meta name="robots" content="noindex" />
<meta http-equiv="refresh" content="30" /><link rel="icon" href="data:," />
<title>{escape(title)}</title><style>{PAGE_STYLE}</style></head><body>
<header><div><h1>{escape(name)}</h1><p class="soft">up for {
        lasted(snapshot["uptime_seconds"])}</p></div>
<p class="verdict dot {tone}" role="status">{escape(verdict)}</p></header>
<main style="--row:{5 if snapshot["warnings"] else 4}">
{main}
</main>
<footer class="soft"><p>rustdesk_server.py {escape(snapshot["version"])}</p>
<p>as of {clock_text(snapshot["time"])}, renewed every 30 s</p></footer>
</body></html>
"""


def page_verdict(snapshot):
    """How the server is, in a few words, and their tone."""
    if snapshot["health"] != "ok":
        return f"Out of order: {snapshot['health']}", "bad"
    if snapshot["warnings"]:
        return "Works, but needs a look", "warn"
    silent = sum(relay["state"] == "silent" for relay in snapshot["relays"])
    if silent:
        return f"{silent} of {len(snapshot['relays'])} relays silent", "warn"
    return "Everything works", "good"


def page_warnings(snapshot):
    """What is wrong, if anything is."""
    lines = "".join(f"<li>{escape(line)}</li>" for line in snapshot["warnings"])
    return lines and f'<ul class="warnings" role="alert">{lines}</ul>'


def page_tiles(snapshot):
    """The four numbers that say most."""
    tiles = (
        ("Peers online", number_text(snapshot["peers_online"]),
         f"of {snapshot['peers_known']:,} known"),
        ("Relayed sessions", number_text(snapshot["sessions_open"]),
         f"at {scaled(snapshot['bits_per_second'], 'bit/s')} together"),
        ("Relayed", number_text(*scaled(snapshot["relayed_bytes"], "B").split("\xa0")),
         "since the start"),
        ("Connections", number_text(snapshot["connections"]), "open right now"))
    cards = (f'<div class="card"><p>{label}</p><b>{number}</b><p>{more}</p></div>'
             for label, number, more in tiles)
    return f'<div class="tiles wide">{"".join(cards)}</div>'


def number_text(number, unit=""):
    """A number to be read from afar, its unit smaller."""
    text = f"{number:,}" if isinstance(number, int) else number
    return text + (f"<small>{unit}</small>" if unit else "")


def scaled(value, unit):
    """A quantity in the unit that gives it one to three digits before the
    point."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 999.5 or prefix == "P":
            break
        value /= 1000
    return f"{value:,.{int(prefix != '' and value < 99.95)}f}\xa0{prefix}{unit}"


def lasted(seconds):
    """A time span, in its two largest units."""
    rest, parts = int(seconds), []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count or parts or unit == "s":
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def clock_text(moment):
    """The time of day of a Unix time."""
    minutes, seconds = divmod(int(moment), 60)
    return f"{minutes // 60 % 24:02}:{minutes % 60:02}:{seconds:02} UTC"


def page_card(title, aside, body, kind=""):
    """A part of the page under its title; all of it is HTML."""
    return (f'<section class="card {kind}"><div class="title"><h2>{title}</h2>'
            f'<p class="soft">{aside}</p></div>{body}</section>')


def page_none(text):
    """What stands where there is nothing to list."""
    return f'<p class="soft">{text}</p>'


def page_table(columns, rows):
    """Rows of cells, which are HTML."""
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n"
                   for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def page_traffic(snapshot):
    """What was relayed in each minute of the last hour."""
    rates = [count * 8 / 60 for count in snapshot["traffic"][-60:]]
    if not any(rates):
        return page_card("Traffic", "last hour", page_none("Nothing was relayed."),
                         "wide")
    peak = f"peak {scaled(max(rates), 'bit/s')}, now {scaled(rates[-1], 'bit/s')}"
    top = round_up(max(rates))
    return page_card("Traffic", peak, f'<div class="chart"><span class="soft">'
                     f'{scaled(top, "bit/s")}</span>{traffic_svg(rates, top)}</div>'
                     '<p class="axis soft"><span>1 h ago</span><span>30 min ago</span>'
                     '<span>now</span></p>', "wide")


def round_up(value):
    """The next of 1, 2, 5, 10, 20, ..."""
    unit = 10 ** (len(str(int(value))) - 1)
    return next(step * unit for step in (1, 2, 5, 10) if step * unit >= value)


def traffic_svg(rates, top):
    """A bar per minute, the newest at the right; `top` is the full height."""
    bars = []
    for ago, rate in enumerate(reversed(rates)):
        height = max(100 * rate / top, 1 if rate else 0)
        bars.append(f'<rect x="{591 - 10 * ago}" y="{100 - height:.1f}" width="8" '
                    f'height="{height:.1f}"><title>{ago} min ago: '
                    f'{scaled(rate, "bit/s")}</title></rect>')
    return ('<svg viewBox="0 0 600 100" preserveAspectRatio="none" role="img" '
            'aria-label="Traffic of the last hour"><path d="M0 0h600M0 50h600M0 100'
            f'h600" />{"".join(bars)}</svg>')


def page_sessions(snapshot):
    """Who is relayed right now, and how fast."""
    rows = ([f"{escape(session['peer'])}<small>no. {escape(session['number'])}</small>",
             scaled(session["bits_per_second"], "bit/s"),
             f"for {lasted(session['seconds'])}", scaled(session["bytes"], "B"),
             f"{escape(session['first'])} \u21c4 {escape(session['second'])}"]
            for session in snapshot["sessions"][:PAGE_SESSIONS])
    body = page_table(("Peer", "Rate", "Time", "Carried", "Between"), rows)
    if not snapshot["sessions"]:
        body = page_none("Nobody is relayed right now.")
    body += page_more(snapshot["sessions_open"] - PAGE_SESSIONS, "sessions")
    return page_card("Sessions", "relayed right now", body, "wide sessions")


def page_more(count, command):
    """How many are not on the page, and which command shows them."""
    if count <= 0:
        return ""
    return f'<p class="soft more">and {count:,} more: <code>{command}</code></p>'


def page_side(snapshot):
    """What stands beside the peers where there is room."""
    parts = (page_outcomes, page_relays, page_limits, page_setup)
    return f'<div class="side">{"".join(part(snapshot) for part in parts)}</div>'


def page_outcomes(snapshot):
    """How attempts have ended, the most frequent first."""
    body = page_bars(snapshot["hour"], lambda word: OUTCOME_TONES.get(word, "quiet"))
    return page_card("Outcomes", "last hour", body or page_none("Nobody tried."))


def page_limits(snapshot):
    """The limits that somebody has hit."""
    body = page_bars(snapshot["limits_hit"], lambda word: "warn")
    return page_card("Limits hit", "", body or page_none("None."))


def page_bars(counts, tone_of):
    """Words and how often each was said, as bars."""
    most = max(counts.values(), default=0) or 1
    bars = (f'<li class="{tone_of(word)}"><span>{escape(word)}</span><b>{count:,}</b>'
            f'<i><u style="width:{100 * count / most:.1f}%"></u></i></li>'
            for word, count in sorted(counts.items(), key=lambda item: -item[1]))
    body = "".join(bars)
    return body and f'<ul class="bars">{body}</ul>'


def page_relays(snapshot):
    """Whether each relay answers."""
    tones = {"answers": "good", "silent": "bad"}
    lines = "".join(
        f'<li><span class="dot {tones.get(relay["state"], "quiet")}">'
        f'{escape(relay["name"])}</span><span class="soft">{escape(relay["state"])}'
        "</span></li>" for relay in snapshot["relays"])
    body = f'<ul class="list">{lines}</ul>' if lines else page_none("None is named.")
    return page_card("Relays", "", body)


def page_peers(snapshot):
    """Who is known, those online first, as far as the page goes."""
    shown = snapshot["peers"][:PAGE_PEERS]
    known = max(snapshot["peers_known"], len(snapshot["peers"]))
    body = page_table(("Peer", "State", "Address", "Last seen", "Client"),
                      [peer_cells(peer, snapshot["time"]) for peer in shown])
    if not shown:
        body = page_none("No peer has registered yet.")
    body += page_more(known - len(shown), "peers")
    aside = f"{snapshot['peers_online']:,} online of {snapshot['peers_known']:,}"
    return page_card("Peers", aside, body, "peers")


def peer_cells(peer, wall):
    """A peer as a row of the page's table."""
    tone = PEER_TONES.get(peer["state"], "quiet")
    return [escape(peer["id"]),
            f'<span class="dot {tone}">{escape(peer["state"])}</span>',
            f"{escape(peer['address'])}<small>{escape(peer['transport'])}</small>",
            ago(peer["seen"], wall), escape(peer["version"])]


def page_setup(snapshot):
    """What sets a client up, as text and as a picture."""
    setup = snapshot["setup"]
    if not setup:
        return ""
    items = "".join(f"<dt>{label}</dt><dd><code>{escape(setup[name])}</code></dd>"
                    for label, name in (("ID server", "host"), ("Key", "key"),
                                        ("Import server config", "string")))
    body = f"{setup_picture(setup['qr'])}<dl>{items}</dl>"
    return page_card("Set up a client", "", body, "setup")


@functools.lru_cache(maxsize=1)
def setup_picture(text):
    """The code of a text, which takes longer than the rest of the page; "" if
    no code holds it."""
    try:
        return qr_svg(qr_code(text.encode()))
    except ValueError:
        return ""


# == 16. Event loop ============================================================
#
# What turns: a log, timers, the loop and what it waits for sockets by, and one
# worker thread for what blocks (the disk's fdatasync, names).  Nothing here
# knows what the bytes mean.
#
# Uses: Constants, Frames and addresses.

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

#: What epoll is asked for, whose constants only Linux has, and what its answer means:
#: an error or a hang-up is both, since to read or to write tells which.
EPOLLIN, EPOLLOUT = 1, 4
EPOLL_MASKS = {READ: EPOLLIN, WRITE: EPOLLOUT, READ | WRITE: EPOLLIN | EPOLLOUT}
EPOLL_EVENTS = tuple(READ * bool(mask & ~EPOLLOUT) | WRITE * bool(mask & ~EPOLLIN)
                     for mask in range(32))


class Log:
    """Lines for the operator, written once per loop turn."""

    LEVELS = ("debug", "info", "warn", "error")
    #: A log file is renamed and begun anew at this size.
    FILE_BYTES = 10 * 1024 * 1024

    def __init__(self, level="info", style="text", path=""):
        self.set_level(level)
        self.as_json = style == "json"
        self.path = path
        self.descriptor = self.open_file() if path else 1
        self.lines = []
        self.second, self.stamp = 0, ""

    def set_level(self, level):
        """Write no lines below this level."""
        self.threshold = self.LEVELS.index(level)
        self.debugging = self.threshold == 0

    def write(self, level, text):
        """Add a line; control characters are escaped, so that a line stays one
        line."""
        if self.LEVELS.index(level) < self.threshold:
            return
        second = int(time.time())
        if second != self.second:
            self.second = second
            self.stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        if self.as_json:
            entry = {"time": second, "level": level, "text": text}
            self.lines.append(json.dumps(entry) + "\n")
            return
        self.lines.append(f"{self.stamp} {level.upper():5} {printable(text)}\n")

    def debug(self, text):
        """A step inside: `<` in, `>` out, `=` state, `!` fault."""
        self.write("debug", text)

    def info(self, text):
        """An outcome."""
        self.write("info", text)

    def warn(self, text):
        """A refusal, or what an operator should change."""
        self.write("warn", text)

    def error(self, text):
        """What keeps the server from doing its work."""
        self.write("error", text)

    def flush(self):
        """Write the lines out; a full disk or a closed pipe stops nothing.

        A reader that has stopped reading does: its pipe is the operator's
        choice.
        """
        if self.lines:
            data = "".join(self.lines).encode("utf-8", "backslashreplace")
            self.lines = []
            try:
                while data:
                    data = data[os.write(self.descriptor, data):]
                if self.path and os.fstat(self.descriptor).st_size > self.FILE_BYTES:
                    self.rotate()
            except OSError:
                pass  # nobody reads; there is nowhere to say so

    def open_file(self):
        """Open the file of --log-file for appending."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        return os.open(self.path, flags, 0o640)

    def rotate(self):
        """Keep the file under a second name and begin it anew."""
        with contextlib.suppress(FileNotFoundError):  # somebody has moved it
            os.replace(self.path, self.path + ".1")
        self.open_again()

    def open_again(self):
        """Write to the file that has the name now, such as after logrotate; OSError
        leaves the old one."""
        if self.path:
            old, self.descriptor = self.descriptor, self.open_file()
            os.close(old)


class Timer:
    """Something to do later; `cancel` it while it waits."""

    __slots__ = ("action",)

    def __init__(self, action):
        self.action = action

    def cancel(self):
        """Let it not happen."""
        self.action = None


class Timers:
    """What is to be done when, soonest first."""

    def __init__(self):
        self.heap = []
        self.numbers = itertools.count()

    def at(self, when, action):
        """Call `action` at a time of the loop's clock; returns the `Timer`."""
        timer = Timer(action)
        heapq.heappush(self.heap, (when, next(self.numbers), timer))
        return timer

    def due(self, now):
        """What is due, one action after the other; not what they add
        meanwhile."""
        limit = next(self.numbers)
        while self.heap and self.heap[0][0] <= now and self.heap[0][1] < limit:
            action = heapq.heappop(self.heap)[2].action
            if action is not None:
                yield action


class EpollWaiter:
    """Waits for sockets by Linux's epoll.

    The standard library's selector takes longer to find out whose an event is than a
    small message takes to be passed on.
    """

    def __init__(self):
        self.epoll = select.epoll()
        self.handlers = {}  # descriptor -> what is called

    def register(self, sock, events, handler):
        """Begin to wait for a socket."""
        descriptor = sock.fileno()
        self.epoll.register(descriptor, EPOLL_MASKS[events])
        self.handlers[descriptor] = handler

    def modify(self, sock, events, handler):
        """Wait for other events."""
        descriptor = sock.fileno()
        self.epoll.modify(descriptor, EPOLL_MASKS[events])
        self.handlers[descriptor] = handler

    def unregister(self, sock):
        """Wait for it no more."""
        descriptor = sock.fileno()
        self.epoll.unregister(descriptor)
        del self.handlers[descriptor]

    def forget(self, sock):
        """The same for one that is about to be closed, which takes it out of epoll
        without another system call; it need not be waited for."""
        self.handlers.pop(sock.fileno(), None)

    def wait(self, seconds):
        """The (handler, events) of every socket that is ready, after so many seconds at
        the latest; None waits for ever.

        All that are ready, since those who send and those who are sent to would get out
        of step: with 40 at a time, 100 busy sessions cost half as much again.  Handlers
        are found before any is called: a descriptor that one closes may be another
        socket's when its own event is due.
        """
        if seconds is not None and seconds < 0:
            seconds = 0
        ready, find = [], self.handlers.get
        for descriptor, mask in self.epoll.poll(seconds, len(self.handlers) or 1):
            handler = find(descriptor)
            if handler is not None:
                ready.append((handler, EPOLL_EVENTS[mask]))
        return ready


class PortableWaiter:
    """The same by whatever the system has."""

    def __init__(self):
        self.selector = selectors.DefaultSelector()
        self.register = self.selector.register
        self.modify = self.selector.modify
        self.unregister = self.selector.unregister

    def forget(self, sock):
        """Wait no more for a socket that is about to be closed, or was, if it is
        waited for."""
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(sock)

    def wait(self, seconds):
        """The (handler, events) of every socket that is ready."""
        return [(key.data, events) for key, events in self.selector.select(seconds)]


class Loop:
    """Waits for sockets and timers, and calls what was registered for them.

    `on_turn` is called after every turn, `on_fault` with a handler and what it
    raised.  `now` is the time of this turn, in seconds of a clock that only
    runs forward.
    """

    def __init__(self, on_turn, on_fault):
        # PyPy compiles what the standard selector does, so it needs no other.
        quick = hasattr(select, "epoll") and sys.implementation.name == "cpython"
        self.waiter = EpollWaiter() if quick else PortableWaiter()
        self.timers = Timers()
        self.on_turn = on_turn
        self.on_fault = on_fault
        self.now = time.monotonic()
        self.running = False

    def watch(self, sock, events, handler):
        """Call `handler(events)` when `sock` is ready for any of `events`."""
        self.waiter.register(sock, events, handler)

    def change(self, sock, before, events, handler):
        """Watch for other events than before; none means not at all."""
        if not events:
            self.waiter.unregister(sock)
        elif not before:
            self.waiter.register(sock, events, handler)
        else:
            self.waiter.modify(sock, events, handler)

    def close(self, sock):
        """Close a socket, and watch it no more if it was watched."""
        self.waiter.forget(sock)
        sock.close()

    def later(self, seconds, action):
        """Call `action` in so many seconds; returns its `Timer`."""
        return self.timers.at(self.now + seconds, action)

    def run(self):
        """Turn until `stop`.

        With few connections a turn serves one event, so what is called for every
        turn is kept short.
        """
        wait, clock, heap = self.waiter.wait, time.monotonic, self.timers.heap
        on_turn = self.on_turn
        self.running = True
        while self.running:
            ready = wait(heap[0][0] - clock() if heap else None)
            self.now = clock()
            for handler, events in ready:
                try:
                    handler(events)
                except Exception as error:  # ours, not the other side's: see on_fault
                    self.on_fault(handler, error)
            if heap and heap[0][0] <= self.now:
                for action in self.timers.due(self.now):
                    self.attempt(action)
            try:
                on_turn()
            except Exception as error:
                self.on_fault(on_turn, error)

    def attempt(self, action):
        """Do something; what it raises is our fault, and no reason to stop."""
        try:
            action()
        except Exception as error:
            self.on_fault(action, error)

    def stop(self):
        """End after this turn."""
        self.running = False


class Worker:
    """One thread that does, in order, what would block the loop.

    `run(job, done)` calls `job()` in the thread and then, in the loop, `done`
    with its result or with the OSError that it raised.
    """

    def __init__(self, loop):
        self.loop = loop
        self.jobs = collections.deque()
        self.results = collections.deque()
        self.ready = threading.Semaphore(0)
        self.waker, self.sleeper = socket.socketpair()
        self.waker.setblocking(False)
        self.sleeper.setblocking(False)
        loop.watch(self.sleeper, READ, self.on_results)
        self.thread = threading.Thread(target=self.work, name="worker", daemon=True)
        self.thread.start()

    def run(self, job, done):
        """Queue a job."""
        self.jobs.append((job, done))
        self.ready.release()

    def work(self):
        """The thread: one job after the other, for as long as the process
        lives."""
        while True:
            self.ready.acquire()
            job, done = self.jobs.popleft()
            try:
                result = job()
            except Exception as error:  # handed to `done`, in the loop's thread
                result = error
            self.results.append((done, result))
            self.wake()

    def wake(self):
        """Make the loop turn; a full pipe will do that anyway."""
        try:
            self.waker.send(b"\0")
        except BlockingIOError:
            pass

    def on_results(self, events):
        """In the loop: hand the results over."""
        try:
            self.sleeper.recv(4096)
        except BlockingIOError:
            pass
        while self.results:
            done, result = self.results.popleft()
            self.loop.attempt(lambda: done(result))


# == 17. Connections ===========================================================
#
# Sockets.  A `StreamListener` accepts, a `Connection` reads the first bytes,
# then frames; a paired one is read by a `Pipe` or a `Translation`.  Every
# socket call of a connection is here.  A connection that shall not be read is
# not watched: so the kernel's buffers, not ours, hold what nobody takes.
#
# Uses: Constants, Refusals, Messages, Frames and addresses, WebSocket and
# HTTP, Keys, Configuration, Limits, Attempts, Actions, Event loop.

#: Raw bytes of all sessions pass through this buffer; nothing stays in it.
BUFFER = bytearray(PIPE_BUFFER_BYTES)
BUFFER_VIEW = memoryview(BUFFER)
#: What one read takes before a connection is paired.
RECEIVE_BYTES = 16 * 1024
#: Said with every call to a connection's socket, which so need not be told once
#: for all, by a system call more.  Windows has no such flag.
DONT_WAIT = int(getattr(socket, "MSG_DONTWAIT", 0))
PEEK = int(socket.MSG_PEEK) | DONT_WAIT
#: What is sent so leaves together with our end, in one packet; Linux's.
WITH_END = int(getattr(socket, "MSG_MORE", 0)) | DONT_WAIT
#: Python names it from 3.14 on; the number is Linux's.
IP_PKTINFO = getattr(socket, "IP_PKTINFO", 8)
#: How soon bytes that were too few are looked at again, at first; then half as
#: often.
LOOK_AGAIN_SECONDS = 0.02
#: What one read takes when much is held for slow ends.
HELD_READ_BYTES = 16 * 1024
#: What a connection may keep of an unfinished message without being counted.
FREE_PENDING_BYTES = 4096
#: What an ID server says first that wants to announce tickets: as a frame's
#: header it would be 1.4 MB, which no relay takes.
TICKETS_GREETING = b"RUSTDESK-TICKETS 1\n"

#: What a connect without waiting may answer when it has not failed.
CONNECTING = (0, errno.EINPROGRESS, errno.EWOULDBLOCK)

#: Listeners that speak plain HTTP only.
NO_WEBSOCKET = (API, STATUS)

PRINTABLE = bytes(range(32, 127)) + b"\t\r\n"
#: A connection that begins with another byte can only be spoken frames to.
TELLING_BYTES = frozenset(PRINTABLE + b"\x16")
WEBSOCKET_CODES = {Refusal.TOO_LARGE: 1009, Refusal.BAD_WEBSOCKET: 1002}


class State(enum.Enum):
    """What a connection is at."""

    FRESH = "fresh"  # its first bytes have not told the transport yet
    COMMAND = "command"  # an operator types a text command
    SHAKING = "shaking hands"  # of TLS
    HEAD = "head"  # the head of an HTTP request is coming
    BODY = "body"  # of a request that will be answered when it is over
    FRAMED = "framed"  # frames or WebSocket messages
    WAITING = "waiting"  # a relay link without its partner
    TICKETS = "tickets"  # an ID server announces sessions to this relay
    PAIRED = "paired"  # pipes read and write for it
    ENDING = "ending"  # our half has ended; what comes is thrown away
    CLOSED = "closed"  # no socket any more


(FRESH, COMMAND, SHAKING, HEAD, BODY, FRAMED, WAITING, TICKETS, PAIRED, ENDING,
 CLOSED) = State


class ListeningSocket(socket.socket):
    """A socket that knows its family and type by heart: `accept` asks for them
    each time, and to make enumerations of them is a fifth of its 6 us."""

    family = type = None

    def __init__(self, family, kind):
        super().__init__(family, kind)
        self.family, self.type = family, kind


class StreamListener:
    """A listening TCP socket."""

    def __init__(self, server, sock, name, listener):
        self.server = server
        self.socket = sock
        self.name = name
        self.listener = listener
        self.has_console = name in ("nat-test", "relay")
        self.offers_key = name == "rendezvous"
        #: The table of deadlines that a new connection is put into.
        self.patience = (server.relay_patience if listener is RELAY
                         else server.first_patience)
        self.address = address_of(sock.getsockname())
        server.loop.watch(sock, READ, self.on_events)

    def on_events(self, events):
        """Accept what has come, but let other work have its turn."""
        server = self.server
        for _ in range(ACCEPT_BATCH):
            try:
                sock, sockaddr = self.socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                self.rest(error)
                return
            address = address_of(sockaddr)
            place = server.limits.place(address.ip)
            if server.admits(self.listener, address, place):
                if not DONT_WAIT:
                    sock.setblocking(False)
                Connection(server, sock, address, place, self)
            else:
                sock.close()

    def rest(self, error):
        """Out of descriptors or memory: accept nothing for a second."""
        loop = self.server.loop
        if self.server.may_log("no-descriptor"):
            remedy = "; raise the limit of open files (ulimit -n)"
            self.server.log.error(
                f"cannot accept on {self.address}: {error.strerror}"
                f"{remedy if error.errno in (errno.EMFILE, errno.ENFILE) else ''}")
        pause(loop, self)

    def close(self):
        """Stop listening."""
        self.server.loop.close(self.socket)


def pause(loop, listener):
    """Let a listener accept nothing for a second."""
    sock, handler = listener.socket, listener.on_events
    loop.change(sock, READ, 0, handler)
    loop.later(1.0, lambda: sock.fileno() >= 0 and loop.watch(sock, READ, handler))


class DatagramListener:
    """The ID server's UDP socket."""

    def __init__(self, server, sock, name, renewals):
        self.server = server
        self.socket = sock
        self.name = name
        self.renewals = renewals
        self.address = address_of(sock.getsockname())
        server.loop.watch(sock, READ, self.on_events)

    def on_events(self, events):
        """Answer what has come.

        Hot path 1: a client's RegisterPeer is the same bytes every time, so
        the datagram itself finds its registration.  It skips decoding, the
        handler and its actions: 1.3 times the system calls' own cost instead
        of 4 times.
        """
        receive, send = self.socket.recvfrom, self.socket.sendto
        find, now = self.renewals.get, self.server.loop.now
        for _ in range(DATAGRAM_BATCH):
            try:
                datagram, sockaddr = receive(MAX_DATAGRAM_BYTES)
                registration = find(datagram)
                if registration is not None and registration.sockaddr == sockaddr:
                    registration.seen = now
                    send(b"\x3a\x00", sockaddr)  # RegisterPeerResponse{}
                else:
                    self.server.on_datagram(datagram, sockaddr)
            except BlockingIOError:
                return
            except OSError:
                pass  # an error of one datagram, or of its sender, is its own

    def send(self, payload, sockaddr):
        """Send one datagram; if that cannot be, it is lost as datagrams
        are."""
        try:
            self.socket.sendto(payload, sockaddr)
        except OSError:
            pass

    def close(self):
        """Stop listening."""
        self.server.loop.close(self.socket)


class MultihomedListener(DatagramListener):
    """The same on a host with several addresses: an answer leaves from the
    address that its question came to, or the NAT of a client would not let it
    in.

    What the roles get for a socket address is then a pair: the client's, and
    the control message that says ours.  It costs a fifth more.
    """

    def __init__(self, server, sock, name, renewals):
        super().__init__(server, sock, name, renewals)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)

    def on_events(self, events):
        """Answer what has come (see hot path 1)."""
        for _ in range(DATAGRAM_BATCH):
            try:
                received = self.socket.recvmsg(MAX_DATAGRAM_BYTES, 64)
                datagram, control, _, client = received
                sockaddr = client, our_address(control)
                registration = self.renewals.get(datagram)
                if registration is not None and registration.sockaddr == sockaddr:
                    registration.seen = self.server.loop.now
                    self.send(b"\x3a\x00", sockaddr)  # RegisterPeerResponse{}
                else:
                    self.server.on_datagram(datagram, sockaddr, client)
            except BlockingIOError:
                return
            except OSError:
                pass  # an error of one datagram, or of its sender, is its own

    def send(self, payload, sockaddr):
        """Send one datagram from the address that the client knows us by."""
        client, control = sockaddr
        try:
            self.socket.sendmsg([payload], control, 0, client)
        except OSError:
            pass


def our_address(control):
    """The control message that makes an answer leave from where its question
    came to.

    IPv6: address, interface; IPv4: interface, address of ours, address in the
    header.  The interface is left to the routing table.
    """
    for level, kind, data in control:
        if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            return ((level, kind, data[:16] + bytes(4)),)
        if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
            return ((level, kind, bytes(4) + data[4:8] + bytes(4)),)
    return ()


def has_several_addresses():
    """Whether this host can be reached at several addresses, as far as /proc
    tells."""
    try:
        with open("/proc/net/fib_trie", encoding="ascii") as file:
            lines = file.read().split("\n")
    except OSError:
        return False
    ipv4 = {line.split()[1] for line, after in zip(lines, lines[1:])
            if "|--" in line and "/32 host LOCAL" in after}
    try:
        with open("/proc/net/if_inet6", encoding="ascii") as file:
            ipv6 = [line for line in file if line.split()[3] == "00"]  # global scope
    except OSError:
        ipv6 = []
    return len([ip for ip in ipv4 if not ip.startswith("127.")]) > 1 or len(ipv6) > 1


class Tls:
    """The certificate, as it was last read."""

    def __init__(self, certificate, key):
        import ssl  # only here: small systems lack it

        self.ssl = ssl
        self.files = certificate, key or certificate
        self.read_at = self.changed()
        self.context = self.read()

    def read(self):
        """The context of TLS 1.2 and later; OSError or ValueError if it can't
        be."""
        context = self.ssl.SSLContext(self.ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = self.ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(*self.files, password=lambda: "")
        return context

    def changed(self):
        """When each file was written last."""
        return [os.stat(path).st_mtime_ns for path in self.files]

    def reload(self):
        """Read the files again; what raises leaves the old certificate in
        force."""
        self.read_at = self.changed()
        self.context = self.read()

    def wrap(self, sock):
        """A TLS socket that has not shaken hands yet."""
        return TlsSocket(self.ssl, self.context.wrap_socket(
            sock, server_side=True, do_handshake_on_connect=False))


class TlsSocket:
    """A TLS socket that behaves like the others here: it blocks by
    BlockingIOError, and fills what it is given."""

    __slots__ = ("ssl", "socket", "on_more")

    def __init__(self, ssl, sock):
        self.ssl = ssl
        self.socket = sock
        self.on_more = None  # called when more is decrypted than was asked for

    def fileno(self):
        """The descriptor, for the loop."""
        return self.socket.fileno()

    def shake_hands(self):
        """A step of the handshake; which event the next one waits for, 0 at
        the end."""
        try:
            self.socket.do_handshake()
        except self.ssl.SSLWantReadError:
            return READ
        except self.ssl.SSLWantWriteError:
            return WRITE
        return 0

    def recv_into(self, buffer, size, flags=0):
        """Fill a buffer as far as there is something; 0 at the end."""
        view, got = memoryview(buffer), 0
        while got < size:
            try:
                part = self.socket.recv_into(view[got:size])
            except (self.ssl.SSLWantReadError, self.ssl.SSLWantWriteError):
                if not got:
                    raise BlockingIOError() from None
                break
            except self.ssl.SSLError:
                if not got:
                    raise
                break
            if not part:
                break
            got += part
        if got == size and self.socket.pending():
            self.on_more()
        return got

    def recv(self, size, flags=0):
        """What has come, up to `size` bytes."""
        got = self.recv_into(BUFFER, size)
        return bytes(BUFFER_VIEW[:got])

    def send(self, data, flags=0):
        """Send what the socket takes; the number of bytes."""
        view, sent = memoryview(data), 0
        while sent < len(view):
            try:
                sent += self.socket.send(view[sent:])
            except (self.ssl.SSLWantReadError, self.ssl.SSLWantWriteError):
                if not sent:
                    raise BlockingIOError() from None
                break
        return sent

    def shutdown(self, how):
        """Say that we end (close_notify), and end our half."""
        try:
            self.socket.unwrap()
        except (OSError, ValueError):
            pass  # the other side need not have answered yet
        self.socket.shutdown(how)

    def close(self):
        """Close the socket."""
        self.socket.close()


class Connection(Link):
    """An accepted TCP connection, until it is closed."""

    __slots__ = ("server", "socket", "state", "on_readable", "on_writable", "interest",
                 "pending", "unsent", "framing", "entrance", "patience", "strange",
                 "served", "then", "timer", "trusted", "proxied", "tls", "looks",
                 "channel", "body", "held", "tickets", "is_stranger", "taker")

    def __init__(self, server, sock, address, place, entrance):
        super().__init__(entrance.listener, address, place=place)
        self.server = server
        self.socket = sock
        self.entrance = entrance  # the StreamListener that it came in by
        self.pending = b""  # bytes that came but belong to no frame yet
        self.unsent = b""  # bytes that the socket has not taken yet
        self.framing = None
        self.strange = 0  # messages of unknown kinds so far
        self.served = False  # whether any frame has come
        self.then = self.timer = None  # what follows its end, and when at the latest
        self.trusted = server.trusts(address.ip)  # to say who the client is
        self.proxied = False  # whether somebody else's address stands for this one
        self.tls = False
        self.looks = 0  # how often too few bytes were looked at
        self.channel = None  # the `SecureChannel` that was offered, if any
        self.body = 0  # bytes of a request's body that have not come yet
        self.held = 0  # bytes of an unfinished message that are counted
        self.tickets = None  # the `TicketReceiver` of an ID server's connection
        self.is_stranger = True  # until it has said something valid
        server.crowd.enter(self)
        self.patience = entrance.patience  # a table of deadlines
        self.patience.put(self, None, server.loop.now)
        self.on_writable = self.flush
        self.become(FRESH, self.read_first)
        self.interest = READ
        server.loop.watch(sock, READ, self.on_events)
        if entrance.offers_key:
            self.timer = server.loop.later(KEY_EXCHANGE_DELAY_SECONDS, self.offer_key)

    # -- state -----------------------------------------------------------------

    def become(self, state, reader):
        """Enter a state, in which `reader` is called when something has
        come."""
        self.state = state
        self.on_readable = reader
        if self.server.log.debugging:
            self.server.log.debug(f"= {self.address} is {state.name}")

    def be_patient(self, table):
        """Let another table of deadlines count, or none."""
        if self.patience is not None:
            self.patience.discard(self)
        if self.is_stranger:
            self.server.crowd.know(self)
        self.patience = table
        if table is not None:
            table.put(self, None, self.server.loop.now)

    def watch(self, interest):
        """Be called for these events from now on."""
        if interest != self.interest:
            before, self.interest = self.interest, interest
            self.server.loop.change(self.socket, before, interest, self.on_events)
            if self.tls and interest & READ & ~before:
                self.read_again()

    def read_again(self):
        """What TLS has decrypted by now makes no socket readable."""
        self.server.loop.later(0.0, lambda: self.on_events(READ))

    def on_events(self, events):
        """The socket is ready."""
        try:
            if events & self.interest == READ:  # nearly always
                self.on_readable()
                return
            if events & WRITE & self.interest:
                self.on_writable()
            if events & READ & self.interest:  # which may have changed by now
                self.on_readable()
        except Refused as refused:
            self.refuse(refused)

    def attach(self, reader, writer):
        """From now on a session's pipes read and write for this connection."""
        if self.patience is not None:
            self.be_patient(None)
        self.become(PAIRED, reader)
        self.on_writable = writer
        self.pending = b""
        self.framing = self.taker = None
        if self.held:
            self.account()
        self.watch(READ)

    def is_alive(self):
        """Whether its other end has not hung up, as far as the kernel
        knows."""
        if self.state is not WAITING:
            return False
        try:
            return self.tls or self.socket.recv(1, PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def take_early(self):
        """What came behind the first frame."""
        return self.framing.rest

    # -- reading ---------------------------------------------------------------

    def receive(self):
        """What has come: bytes, b"" at the end, None when there was
        nothing."""
        try:
            return self.socket.recv(RECEIVE_BYTES, DONT_WAIT)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            return b""

    def read_first(self):
        """The first bytes tell the transport."""
        if (self.trusted or self.server.tls) and not self.tls and self.look_ahead():
            return
        data = self.receive()
        if not data:
            self.on_nothing(data)
            return
        data = self.pending + data
        if data[0] not in TELLING_BYTES:
            self.start_frames(data)
        elif is_tls(data):
            self.server.refuse(Refusal.TLS_FAILED, (
                f"{self.address} wants TLS, but --tls-cert names no certificate"))
            self.close()
        elif data.startswith(HTTP_METHODS):
            self.start(HEAD, self.on_head_bytes, data)
        elif len(data) < 8 and any(method.startswith(data) for method in HTTP_METHODS):
            self.pending = data
        elif self.listener is RELAY and self.server.ticket_secret and (
                TICKETS_GREETING.startswith(data[:len(TICKETS_GREETING)])):
            self.start(TICKETS, self.on_ticket_bytes, data)
        elif self.may_be_command(data):
            self.start(COMMAND, self.on_command_bytes, data)
        else:
            self.start_frames(data)

    def start_frames(self, data):
        """RustDesk's own frames come."""
        self.framing = LengthFraming(*self.frame_limits)
        self.start(FRAMED, self.on_frame_bytes, data)

    @property
    def frame_limits(self):
        """The largest frame, and whether address books may be larger."""
        if self.listener is RELAY:
            return MAX_RELAY_REQUEST_BYTES, False
        return MAX_FRAME_BYTES, True

    def start(self, state, taker, data=b""):
        """Enter a state, in which `taker` gets the bytes that have come and will
        come; it may raise Refused."""
        self.taker = taker
        self.become(state, self.read)
        self.pending = b""
        if data:
            taker(data)

    def read(self):
        """Something has come: bytes, or the end."""
        data = self.receive()
        if data:
            self.taker(data)
        else:
            self.on_nothing(data)

    def look_ahead(self):
        """Whether what has come is a proxy's header or TLS, and was treated as
        such.

        It is only looked at: TLS has to read its own first bytes.
        """
        try:
            data = self.socket.recv(RECEIVE_BYTES, PEEK)
        except OSError:
            return False
        if self.trusted and data and self.on_proxy_bytes(data):
            return True
        kind = is_tls(data) if self.server.tls and data else False
        if kind:
            self.start_tls()
        elif kind is None:
            self.look_again()
        return kind is not False

    def look_again(self):
        """Too few bytes to tell: they stay where they are until there are
        more."""
        self.watch(self.interest & ~READ)
        delay = LOOK_AGAIN_SECONDS * 2 ** self.looks
        self.looks += 1
        self.server.loop.later(delay, lambda: self.state is FRESH
                               and self.watch(self.interest | READ))

    def on_proxy_bytes(self, data):
        """Whether a trusted proxy's header has come or is coming; take it
        in."""
        kind = is_proxy_header(data)
        found = parse_proxy_header(data) if kind else None
        if kind is not False and found is None:
            self.look_again()
        elif kind:
            self.socket.recv(found[1], DONT_WAIT)
            self.proxied = True
            if found[0] is not None:
                self.trusted = self.server.trusts(found[0].ip)
                if not self.move_to(found[0]):
                    self.close()
        return kind is not False

    def move_to(self, address):
        """The client is somewhere else than its connection; whether it may
        be."""
        crowd, place = self.server.crowd, self.server.limits.place(address.ip)
        crowd.leave(self)
        self.patience.discard(self)  # or it might have to make room for itself
        self.address, self.place, self.proxied = address, place, True
        admitted = self.server.admits(self.listener, address, place)
        crowd.enter(self)
        self.patience.put(self, None, self.server.loop.now)
        return admitted

    def start_tls(self):
        """Shake hands, then begin again with what is inside."""
        self.watch(0)
        try:
            self.socket.setblocking(False)
            self.socket = self.server.tls.wrap(self.socket)
        except OSError:  # it ended in this very moment
            self.close()
            return
        self.socket.on_more = self.read_again
        self.tls = True
        self.become(SHAKING, self.shake_hands)
        self.on_writable = self.shake_hands
        self.shake_hands()

    def shake_hands(self):
        """One step of the TLS handshake."""
        try:
            wanted = self.socket.shake_hands()
        except OSError as error:
            self.server.refuse(Refusal.TLS_FAILED, f"{self.address}: {error}")
            self.close()
            return
        if wanted:
            self.watch(wanted)
            return
        self.on_writable = self.flush
        self.become(FRESH, self.read_first)
        self.watch(0)
        self.watch(READ)

    def offer_key(self, at_last=False):
        """Nothing has come: a client that wants a secured connection waits for
        this.

        While a peer at this address is called it may only be slow to answer.
        """
        if self.state is not FRESH or self.pending or self.listener is not TCP:
            return
        if not at_last and self.server.is_called(self.address.ip):
            more = KEY_EXCHANGE_CALLED_SECONDS - KEY_EXCHANGE_DELAY_SECONDS
            self.timer = self.server.loop.later(more, lambda: self.offer_key(True))
            return
        exchange_key = self.server.exchange_key()
        if exchange_key is not None:
            self.channel = SecureChannel(exchange_key)
            payload = encode_message(exchange_key.offer)
            self.write(frame_header(len(payload)) + payload)

    def agree(self, message):
        """The client's part of the key exchange, which must have been
        offered."""
        if self.channel is None:
            raise Refused(Refusal.SECURE_FAILED, "a key exchange that was not offered")
        self.channel.agree(message)
        if nacl_bindings is not None:  # ours takes a second for a MiB
            self.framing.max_size = MAX_SECURED_FRAME_BYTES

    def on_nothing(self, data):
        """There was nothing to read (None), or the other side has ended (b"") and
        with it the command that it was typing."""
        if data is not None and self.state is COMMAND:
            self.answer_command()
        elif data is not None:
            if self.channel is not None and self.state is FRESH:
                self.server.refuse(Refusal.SECURE_FAILED, (
                    f"{self.address} was shown our signature and hung up: it has the "
                    "key of another server, or looks only whether the port is open"))
            self.close()

    def on_frame_bytes(self, data):
        """Cut frames and let the server treat them, as long as it is us that
        reads."""
        framing = self.framing
        framing.receive(data)
        while self.state is FRAMED:
            payload = framing.take()
            if payload is None:
                break
            if self.listener is RELAY:
                self.start(WAITING, self.on_early_bytes)
            elif self.patience is not None and payload:
                self.be_patient(self.server.next_patience)
            if payload:
                self.served = True
            if self.channel is not None:
                payload = self.channel.open(payload)
            self.server.on_frame(self, payload)
        if self.state is WAITING:
            self.be_patient(None)  # the relay itself counts its time
        if self.is_websocket and self.state in (FRAMED, WAITING):
            if self.state is WAITING:
                framing.skim()
            self.answer_control(framing)
        if self.framing is not None and (self.held or self.framing.pending):
            self.account()

    def account(self):
        """Count the bytes that are kept here, if they are many; a connection
        for which there is no room is cut."""
        pending = self.framing.pending if self.framing is not None else 0
        size = pending + len(self.unsent)
        size = size if size > FREE_PENDING_BYTES else 0
        more, server = size - self.held, self.server
        if more:
            self.held = size
            server.pending_bytes += more
            if more > 0 and server.pending_bytes > server.limits.pending_bytes:
                server.refuse(Refusal.NO_ROOM, f"{self.address} keeps {size} bytes")
                self.close()

    def answer_control(self, framing):
        """Send what the WebSocket itself owes: a pong, or the answer to a
        Close."""
        if framing.outgoing:
            outgoing, framing.outgoing = framing.outgoing, b""
            self.write(outgoing)
        if framing.closed:
            self.end()

    def on_early_bytes(self, data):
        """A relay link that waits: keep what its partner will want."""
        self.framing.receive(data)
        if len(self.framing.buffer) > MAX_EARLY_BYTES:
            self.watch(self.interest & ~READ)
        if self.is_websocket:
            self.framing.skim()
            self.answer_control(self.framing)
        if self.framing is not None:
            self.account()

    def throw_away(self, data):
        """Our half has ended; what comes means nothing until the other side ends
        too."""

    # -- tickets ---------------------------------------------------------------

    def on_ticket_bytes(self, data):
        """Challenge the ID server, then take the tickets that it proves."""
        self.pending += data
        if self.tickets is None:
            greeting, newline, rest = self.pending.partition(b"\n")
            if not TICKETS_GREETING.startswith(greeting):
                raise Refused(Refusal.BAD_TICKETS, "another greeting")
            if not newline:
                return
            challenge = os.urandom(32)
            self.tickets = TicketReceiver(self.server.ticket_secret, challenge)
            self.write(challenge.hex().encode() + b"\n")
            self.pending = rest
        data, self.pending = self.pending, b""
        for session_uuid, ticket in self.tickets.receive(data):
            if ticket is None:
                self.on_announcer()
            else:
                self.server.on_ticket(session_uuid, ticket)

    def on_announcer(self):
        """The ID server has proved the secret: it may be silent from now
        on."""
        self.served = True
        self.be_patient(None)
        self.server.log.info(f"the ID server at {self.address} announces sessions here")
        self.write(b"ok\n")

    # -- HTTP ------------------------------------------------------------------

    def on_head_bytes(self, data):
        """Become a WebSocket when the request head is whole, or say why
        not."""
        self.pending += data
        found = parse_request_head(self.pending)
        if found is None:
            return
        request, size = found
        if self.entrance.listener in NO_WEBSOCKET or not wants_websocket(request):
            rest = self.pending[size:]
            self.start(BODY, self.on_body_bytes)
            self.body, self.pending = request.body_size, self.plain_answer(request)
            if request.method == "HEAD":  # RFC 9110 9.3.2
                self.pending = self.pending.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
            self.on_body_bytes(rest)
            return
        response, accepted = answer_handshake(request)
        if accepted and not self.choose_role(request.path):
            response, accepted = http_response("404 Not Found"), False
        if not accepted:
            self.server.refuse(Refusal.BAD_HTTP, f"{self.address}: bad handshake")
        elif not self.find_client(request):
            response, accepted = http_response("403 Forbidden"), False
        self.write(response)
        if not accepted:
            self.end()
        elif self.state is HEAD:
            self.become_websocket(self.pending[size:])

    def on_body_bytes(self, data):
        """Answer a request that wants no WebSocket when its body is over, which is
        read so that the answer is."""
        self.body -= len(data)
        if self.body <= 0:
            self.write(self.pending)
            self.end()

    def plain_answer(self, request):
        """The response to a request that wants no WebSocket."""
        if request.path == "/healthz":
            return http_response("200 OK", self.server.health())
        if self.entrance.listener is STATUS:
            return self.server.status.respond(request)
        if self.entrance.listener is API:
            return http_response("404 Not Found")
        self.server.refuse(Refusal.BAD_HTTP, f"{self.address} wants no WebSocket")
        text = "this is a RustDesk server: WebSocket and RustDesk clients only"
        return http_response("426 Upgrade Required", text, "Upgrade: websocket")

    def choose_role(self, path):
        """Let the path decide the role; whether there is that role here."""
        path = path.partition("?")[0].rstrip("/")
        if path == "/ws/id":
            self.listener = TCP
        elif path == "/ws/relay":
            self.listener = RELAY
        return self.listener in self.server.accepts

    def find_client(self, request):
        """Behind a reverse proxy the headers say who the client is; whether it
        may be.

        All its clients then come from one address, so each gets a port of its
        own: answers find the right one by it.
        """
        ip = header_ip(request, self.server.trusts) if self.trusted else None
        if ip is not None:
            return self.move_to(self.server.pseudo_address(ip))
        if self.listener is not self.entrance.listener:
            return self.move_to(self.address)
        return True

    def become_websocket(self, rest):
        """The handshake is done: messages follow."""
        self.is_websocket = True
        if self.listener is not RELAY:
            self.listener = WEBSOCKET
        self.framing = WebSocketFraming(*self.frame_limits)
        self.start(FRAMED, self.on_frame_bytes, rest)

    # -- text commands ---------------------------------------------------------

    def may_be_command(self, data):
        """Whether an operator on this machine may be typing.

        A frame's first byte behind its header is no printable character, so
        that clients on this machine are served as well.
        """
        return (self.entrance.has_console and self.address.is_loopback
                and self.server.console_mode != "off"
                and not self.proxied and not data.translate(None, PRINTABLE))

    def on_command_bytes(self, data):
        """A command ends with its line, or when nothing more comes."""
        self.pending += data
        if self.timer is not None:
            self.timer.cancel()
        if not self.may_be_command(self.pending):
            data, self.pending = self.pending, b""
            self.start_frames(data)
        elif b"\n" in data or len(self.pending) >= MAX_COMMAND_BYTES:
            self.answer_command()
        else:
            self.timer = self.server.loop.later(
                CONSOLE_QUIET_SECONDS, self.answer_command)

    def answer_command(self):
        """Reply and end."""
        if self.state is COMMAND:
            words = self.pending.decode("ascii").split()
            self.write(self.server.on_command(self, words).encode("utf-8"))
            self.end()

    # -- writing ---------------------------------------------------------------

    def send_payload(self, payload):
        """Send a payload as one frame or message, while there is a way to do
        it."""
        if self.framing is not None and self.state in (FRAMED, WAITING):
            if self.channel is not None:
                payload = self.channel.seal(payload)
            self.write(self.framing.wrap(payload))

    def write(self, data):
        """Send bytes; what the socket does not take now is sent later."""
        if self.socket is None or not data:
            return
        if not self.unsent:
            try:
                data = data[self.socket.send(data, DONT_WAIT):]
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:
                self.close()
                return
            if not data:
                return
            self.unsent = bytearray()  # grows without being copied
        self.unsent += data
        if len(self.unsent) > MAX_UNSENT_BYTES:
            self.server.refuse(Refusal.SLOW_READER, str(self.address))
            self.close()
        else:
            self.watch(self.interest | WRITE)
            self.account()

    def flush(self):
        """The socket takes more."""
        data, self.unsent = self.unsent, b""
        self.watch(self.interest & ~WRITE)
        self.write(data)
        if self.held and not self.unsent:
            self.account()
        if self.state is ENDING and not self.unsent:
            self.shut_down()

    # -- ending ----------------------------------------------------------------

    def refuse(self, refused):
        """The other side sent what cannot be served: say so if we can, and
        end."""
        self.server.refuse(refused.refusal, f"{self.address}: {refused.detail}")
        if self.state is HEAD:
            self.write(http_response("400 Bad Request", refused.detail))
        elif self.is_websocket and self.framing is not None:
            self.framing.closed = True
            self.write(close_frame(WEBSOCKET_CODES.get(refused.refusal, 1008)))
        self.end()

    def end(self, then=None, survives=False):
        """End our half, let the other side take what was sent and end too,
        then close.

        `then` is called when it has ended, or soon; `survives` gives it more
        time.
        """
        if self.framing is not None and self.state is not ENDING:
            self.write(self.framing.farewell())
        if self.state is CLOSED:
            if then is not None:
                then()
            return
        if self.timer is not None:
            self.timer.cancel()
        self.then, self.timer = then or self.then, None
        if self.then is not None:
            self.timer = self.server.loop.later(HANG_UP_SECONDS, self.close)
        self.be_patient(self.server.survivors if survives else self.server.endings)
        self.start(ENDING, self.throw_away)
        self.on_writable = self.flush
        self.watch(self.interest | READ)
        if not self.unsent:
            self.shut_down()

    def shut_down(self):
        """End our half of the connection."""
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()

    def close(self):
        """End at once; the role forgets the link, and `then` is done."""
        if self.state is CLOSED:
            return
        self.interest = 0
        self.server.loop.close(self.socket)
        self.ended = True
        self.become(CLOSED, None)
        self.be_patient(None)
        self.server.crowd.leave(self)
        if self.timer is not None:
            self.timer.cancel()
        if self.proxied:
            self.server.pseudo_addresses.discard(self.address)
        then, self.then = self.then, None
        # Methods of its own as well, or it would refer to itself.
        self.timer = self.socket = self.framing = self.on_writable = self.taker = None
        self.pending = self.unsent = b""
        if self.held:
            self.account()
        self.server.on_closed(self)
        if then is not None:
            then()


class Pipe:
    """One direction of a session: what its incoming link sends goes to its
    outgoing link at once.

    Hot path 2: no object, no timer and no log line per event; it skips framing
    and accounts only by a subtraction: 1.05 times the bare loop's CPU for a
    small message, no more than it in bulk.  Only what the outgoing link does not
    take is copied and kept, and then the incoming one is not read until it has
    left.
    """

    __slots__ = ("incoming", "outgoing", "session", "server", "flow", "unsent", "ended",
                 "reverse")

    def __init__(self, incoming, outgoing, session, flow):
        self.incoming, self.outgoing = incoming, outgoing
        self.session, self.server = session, incoming.server
        self.flow = flow
        self.unsent = None  # what the outgoing link has not taken
        self.ended = None  # the word of an end that waits until `unsent` has left
        self.reverse = None

    def on_readable(self):
        """Move what has come."""
        flow = self.flow
        try:
            size = self.incoming.socket.recv_into(BUFFER, flow.window, DONT_WAIT)
        except BlockingIOError:
            return
        except OSError:
            self.on_end("broken")
            return
        if not size:
            self.on_end("finished")
            return
        flow.allowance -= size
        try:
            sent = self.outgoing.socket.send(BUFFER_VIEW[:size], DONT_WAIT)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.server.end_session(self.session, "broken", self.outgoing)
            return
        if sent < size:
            self.hold(BUFFER_VIEW[sent:size])
        if flow.allowance <= 0:
            self.starve()

    def feed(self, data):
        """Move bytes that came before the session began."""
        self.write(data)

    def write(self, data):
        """Send bytes, behind what was not taken yet."""
        if self.unsent is not None:
            self.hold(data)
            return
        try:
            sent = self.outgoing.socket.send(data, DONT_WAIT)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.server.end_session(self.session, "broken", self.outgoing)
            return
        if sent < len(data):
            self.hold(memoryview(data)[sent:])

    def hold(self, data):
        """Keep what was not taken, and read no more until it is."""
        server = self.server
        if self.unsent is None:
            self.unsent = bytearray()
        self.unsent += data  # pongs come in many pieces: no copy of all for each
        server.held_bytes += len(data)
        self.incoming.watch(self.incoming.interest & ~READ)
        self.outgoing.watch(self.outgoing.interest | WRITE)
        if server.held_bytes > server.limits.held_bytes // 2:
            self.flow.window = min(self.flow.window, HELD_READ_BYTES)
            self.make_room()

    def make_room(self):
        """Where too much is held for slow ends, who adds to it is cut."""
        server, session = self.server, self.session
        if server.held_bytes > server.limits.held_bytes:
            server.refuse(Refusal.NO_ROOM, (
                f"session {session.number}: {self.outgoing.address} is too slow"))
            server.end_session(session, "refused")

    def on_writable(self):
        """The outgoing link takes more; when it has everything the incoming one
        is read again."""
        try:
            sent = self.outgoing.socket.send(self.unsent, DONT_WAIT)
        except BlockingIOError:
            return
        except OSError:
            self.server.end_session(self.session, "broken", self.outgoing)
            return
        self.server.held_bytes -= sent
        del self.unsent[:sent]
        if self.unsent:
            return
        self.unsent = None
        self.outgoing.watch(self.outgoing.interest & ~WRITE)
        if self.ended:
            self.server.end_session(self.session, self.ended, self.incoming)
        elif not self.flow.starved:
            self.incoming.watch(self.incoming.interest | READ)

    def starve(self):
        """It has moved what it may: the incoming link has to wait for more."""
        self.flow.starved = True
        if self.incoming is not None:
            self.incoming.watch(self.incoming.interest & ~READ)

    def go_on(self):
        """There is bandwidth again."""
        if self.incoming is not None and self.unsent is None and not (
                self.flow.starved or self.ended or self.reverse.ended):
            self.incoming.watch(self.incoming.interest | READ)

    def on_end(self, word):
        """The incoming link has ended: so does the session, once the other has
        everything."""
        if self.unsent is None:
            self.server.end_session(self.session, word, self.incoming)
        else:
            self.ended = word
            self.incoming.watch(0)
            self.outgoing.watch(self.outgoing.interest & ~READ)

    def say_goodbye(self):
        """Raw streams have no last word."""

    def detach(self):
        """The session is over: let go of everything."""
        if self.unsent is not None:
            self.server.held_bytes -= len(self.unsent)
        self.incoming = self.outgoing = self.reverse = self.unsent = None


class Translation(Pipe):
    """A direction in which messages change their dress.

    Hot path 3: payloads are streamed through a translator, not collected; it
    skips the framing's whole messages and every object per message: 1.2 times
    the CPU of a bare loop that translates for a small message, 1.1 in bulk.
    """

    __slots__ = ("translator", "said_goodbye")

    def __init__(self, incoming, outgoing, session, flow):
        super().__init__(incoming, outgoing, session, flow)
        kind = WebSocketTranslator if incoming.is_websocket else FrameTranslator
        self.translator = kind(outgoing.is_websocket)
        self.said_goodbye = False

    def on_readable(self):
        """Translate what has come and pass it on."""
        flow = self.flow
        try:
            size = self.incoming.socket.recv_into(
                BUFFER, min(flow.window, TRANSLATION_BYTES), DONT_WAIT)
        except BlockingIOError:
            return
        except OSError:
            self.on_end("broken")
            return
        if not size:
            self.on_end("finished")
            return
        flow.allowance -= size
        self.feed(BUFFER_VIEW[:size])
        if flow.allowance <= 0 and self.incoming is not None:
            self.starve()

    def feed(self, data):
        """Translate bytes; a message beyond the rules ends the session."""
        translator, before = self.translator, len(self.translator.collected)
        try:
            data = translator.translate(data)
            collected = len(translator.collected) - before
        except Refused as refused:
            self.server.held_bytes += len(translator.collected) - before
            self.server.refuse(refused.refusal, (
                f"session {self.session.number}: {self.incoming.address}: "
                f"{refused.detail}"))
            if refused.passed:
                self.write(refused.passed)
            if self.incoming is None:
                return
            reverse = self.reverse
            reverse.said_goodbye = True
            reverse.insert(close_frame(WEBSOCKET_CODES.get(refused.refusal, 1008)))
            self.server.end_session(reverse.session, "refused")
            return
        if collected:
            self.server.held_bytes += collected
            self.make_room()
        if data and self.incoming is not None:
            self.write(data)
        if translator.answer and self.incoming is not None:
            answer, translator.answer = translator.answer, b""
            self.reverse.said_goodbye = translator.closed
            self.reverse.insert(answer)
        if translator.closed and self.incoming is not None:
            self.on_end("finished")

    def insert(self, frame):
        """Put a control frame between the messages to a WebSocket."""
        if self.translator.to_websocket:
            frame = self.translator.insert(frame)
            if frame:
                self.write(frame)

    def detach(self):
        """The session is over: let go of everything."""
        self.server.held_bytes -= len(self.translator.collected)
        super().detach()

    def say_goodbye(self):
        """A Close for a WebSocket, unless it would stand inside a frame."""
        if not self.said_goodbye and self.unsent is None:
            self.said_goodbye = True
            if self.translator.to_websocket and not self.translator.left:
                try:
                    self.outgoing.socket.send(close_frame(), WITH_END)
                except OSError:
                    pass  # it ends without


def join(session):
    """Replace the framing of two links by what moves their bytes: two pipes."""
    first, second = session.first, session.second
    translated = first.is_websocket or second.is_websocket
    kind = Translation if translated else Pipe
    there = kind(first, second, session, session.flows[0])
    back = kind(second, first, session, session.flows[1])
    there.reverse, back.reverse = back, there
    first.attach(there.on_readable, back.on_writable)
    second.attach(back.on_readable, there.on_writable)
    return there, back


class RelayCheck:
    """One round of trying the relays of the list: a bare connect to each."""

    def __init__(self, loop, targets, done):
        self.loop = loop
        self.done = done
        self.healthy = set()
        self.sockets = {}
        self.timer = loop.later(RELAY_CHECK_TIMEOUT_SECONDS, self.finish)
        for name, family, sockaddr in targets:
            try:
                self.begin(name, family, sockaddr)
            except OSError:
                continue  # no such family, or no descriptor: it counts as silent
        self.finish_if_complete()

    def begin(self, name, family, sockaddr):
        """Start one connect."""
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        if sock.connect_ex(sockaddr) not in CONNECTING:
            sock.close()
            return
        self.sockets[sock] = name
        self.loop.watch(sock, WRITE, lambda events: self.on_connected(sock))

    def on_connected(self, sock):
        """A connect has ended, well or not."""
        name = self.sockets.pop(sock)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
            self.healthy.add(name)
        self.loop.close(sock)
        self.finish_if_complete()

    def finish_if_complete(self):
        """The last one has been tried."""
        if not self.sockets:
            self.finish()

    def finish(self):
        """Tell who answered, once."""
        self.timer.cancel()
        for sock in self.sockets:
            self.loop.close(sock)
        self.sockets = {}
        if self.done is not None:
            done, self.done = self.done, None
            done(self.healthy)


class Announcer:
    """The connection by which this ID server tells one relay of its list which
    sessions it has arranged.

    Without it they are kept for as long as they would be good.
    """

    #: Tickets kept while the relay is away, and what it may leave unread.
    KEPT_TICKETS, MAX_UNSENT = 1000, 1024 * 1024
    #: How long the relay may take to prove to be one of ours, and later to
    #: take in what it is told.
    GREETING_SECONDS, TAKEN_MILLISECONDS = 5.0, 10_000
    #: A line of the relay's: its challenge, or `ok`.
    MAX_LINE_BYTES = 128

    def __init__(self, relays, name, keys):
        self.relays = relays
        self.server = relays.server
        self.name = name
        self.keys = keys  # that initiators may show at the relay
        self.kept = ExpiringTable(
            self.server.limits.ticket_seconds, self.KEPT_TICKETS)
        self.trouble = ""  # what was said last about it
        self.reset()

    def reset(self):
        """Begin without a connection."""
        self.socket = self.sender = self.timer = None
        self.is_ready = False
        self.received = self.unsent = b""
        self.interest = 0

    def announce(self, ticket):
        """Tell the relay of a session, now and, should the connection break,
        again: what was sent last may be lost with it."""
        self.kept.expire(self.server.loop.now)
        self.kept.put(ticket, None, self.server.loop.now)
        if self.is_ready:
            self.write(self.sender.announcement(ticket, self.keys))

    def connect(self, targets):
        """The relay's name has become an address: connect to it."""
        if not self.is_wanted():
            return  # it is not in the list any more
        if not targets or isinstance(targets, Exception):
            self.fail("its name has no address")
            return
        _, family, sockaddr = targets[0]
        try:
            self.socket = socket.socket(family, socket.SOCK_STREAM)
            self.socket.setblocking(False)
            keep_alive(self.socket)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT,
                                       self.TAKEN_MILLISECONDS)
            error = self.socket.connect_ex(sockaddr)
        except OSError as trouble:
            error = trouble.errno
        if error not in CONNECTING:
            self.fail(os.strerror(error))
            return
        self.timer = self.server.loop.later(
            self.GREETING_SECONDS, lambda: self.fail("it takes no tickets: has it the "
                                                     "same --relay-secret?"))
        self.watch(READ)
        self.write(TICKETS_GREETING)

    def watch(self, interest):
        """Be called for these events from now on."""
        before, self.interest = self.interest, interest
        if before != interest:
            self.server.loop.change(self.socket, before, interest, self.on_events)

    def write(self, data):
        """Send, or keep what the socket does not take."""
        self.unsent += data
        if len(self.unsent) > self.MAX_UNSENT:
            self.fail("it does not read what it is told")
            return
        try:
            self.unsent = self.unsent[self.socket.send(self.unsent):]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            if error.errno != errno.ENOTCONN:  # it is still connecting
                self.fail(error.strerror)
                return
        self.watch(READ | WRITE if self.unsent else READ)

    def on_events(self, events):
        """The relay has said something, or takes more."""
        if events & READ & self.interest:  # it may have failed in this very turn
            self.read()
        if events & WRITE & self.interest:
            self.write(b"")

    def read(self):
        """The relay's lines: a challenge, then `ok`."""
        try:
            data = self.socket.recv(RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.fail(error.strerror)
            return
        self.received += data
        if not data or len(self.received) > self.MAX_LINE_BYTES:
            self.fail("it hung up" if self.is_ready else
                      "it takes no tickets: has it the same --relay-secret?")
            return
        while b"\n" in self.received and self.socket is not None:
            line, _, self.received = self.received.partition(b"\n")
            self.on_line(line)

    def on_line(self, line):
        """One line of the relay's."""
        if self.sender is None:
            try:
                challenge = bytes.fromhex(line.decode("ascii"))
            except ValueError:
                self.fail("it speaks something else")
                return
            self.sender = TicketSender(self.server.ticket_secret, challenge)
            self.write(self.sender.line(""))
        elif line == b"ok" and not self.is_ready:
            self.timer.cancel()
            self.is_ready, self.trouble = True, ""
            self.server.log.info(f"relay {self.name} takes our sessions only")
            self.kept.expire(self.server.loop.now)
            self.write(b"".join(self.sender.announcement(ticket, self.keys)
                                for ticket in self.kept.entries))

    def fail(self, why):
        """No connection: say so once, and try again in a while."""
        if why != self.trouble:
            self.trouble = why
            self.server.log.warn(self.complaint)
        self.close()
        if self.is_wanted():
            self.server.loop.later(RELAY_CHECK_SECONDS, self.again)

    @property
    def complaint(self):
        """What the trouble means."""
        return (f"relay {self.name} gets no tickets, so it refuses sessions: "
                f"{self.trouble}")

    def is_wanted(self):
        """Whether the relay is in the list still."""
        return self.relays.announcers.get(self.name) is self

    def again(self):
        """Look its name up, then try to connect."""
        if self.is_wanted():
            self.relays.resolver.run(lambda: resolve_relays([self.name]), self.connect)

    def close(self):
        """End the connection."""
        if self.timer is not None:
            self.timer.cancel()
        if self.socket is not None:
            self.server.loop.close(self.socket)
        self.reset()


def keep_alive(sock):
    """Let a socket, or a listener's connections, notice an end that vanished
    without a word."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", KEEPALIVE_IDLE_SECONDS),
                        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_SECONDS),
                        ("TCP_KEEPCNT", KEEPALIVE_PROBES)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def look_up(host, port):
    """What a name means (getaddrinfo); OSError or UnicodeError if nothing.

    As bytes, since text needs a module that small systems lack.
    """
    return socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)


def resolve_relays(names):
    """(name, family, sockaddr) of each relay that resolves; blocks, for the
    worker."""
    targets = []
    for name in names:
        host, port = split_host(name)
        try:
            found = look_up(host, port or RELAY_PORT)
        except (OSError, UnicodeError):
            continue
        targets.append((name, found[0][0], found[0][4]))
    return targets


def own_address():
    """The address that this machine would reach the internet from, or "".

    Connecting a UDP socket sends nothing.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(("192.0.2.1", 9))
            return sock.getsockname()[0]
    except OSError:
        return ""


# == 18. Server ================================================================
#
# Where everything meets: it opens the listeners, decodes what comes, asks the
# roles, carries out their actions, writes records before the answers that
# promise them, and keeps count of every "no".
#
# Uses: all above.


#: Refusals that are an event, once a minute each.
LIMIT_REFUSALS = frozenset(refusal for refusal in Refusal if refusal.name.startswith(
    ("TOO_MANY_", "TOO_FREQUENT", "NO_ROOM")))

#: Outcomes that an operator should do something about.
WARNINGS = frozenset(("gateway", "tunnel-will-break"))
#: Warnings that the status page shows.
MAX_STANDING = 20

#: Of 65,535 ports one is free with near certainty, however many are taken.
PSEUDO_PORT_TRIES = 1000
#: Values of --bind that mean every address.
ANY_ADDRESS = ("", "0.0.0.0", "::")


def host_for_clients(bind):
    """The address that clients in this network reach us at, or ""."""
    return own_address() if bind in ANY_ADDRESS else bind


class Server:
    """Both roles or one of them, on one event loop."""

    def __init__(self, config, role, directory, log):
        self.config = config
        self.role = role
        self.directory = directory
        self.log = log
        self.limits = Limits(config, free_descriptors())
        self.held_bytes = 0  # of sessions, for slow ends
        self.pending_bytes = 0  # of unfinished messages and waiting links
        self.attempts = Attempts()
        self.supervisor = Supervisor(os.environ)
        self.draining = False
        self.loop = Loop(self.on_turn, self.on_fault)
        self.worker = Worker(self.loop)
        self.ports = Ports(self)
        self.rendezvous = self.relay = self.store = None
        self.consoles = {}  # Listener -> console
        self.accepts = {}  # Listener -> {message class: handler}
        self.pipes = {}  # session number -> the two pipes
        self.keeper = None  # of the store
        self.lines_this_minute = collections.Counter()  # of each refusal
        all_links = 1 << 30  # the crowd is bounded by itself
        self.first_patience = self.limits.table("first_frame_seconds", all_links)
        self.next_patience = self.limits.table("next_frame_seconds", all_links)
        self.relay_patience = self.limits.table("relay_first_frame_seconds", all_links)
        self.crowd = Crowd(self.limits, (self.first_patience, self.relay_patience))
        self.endings = ExpiringTable(LINGER_SECONDS, all_links)
        self.survivors = ExpiringTable(SURVIVOR_SECONDS, all_links)
        self.pseudo_addresses = set()  # of clients behind a reverse proxy
        self.current_exchange_key = None
        self.ticket_secret = read_ticket_secret(config.relay_secret)
        self.events = Events(self, config.on_event) if config.on_event else None
        self.status = StatusService(self)
        self.relay_watch = None  # of the relays that the ID server sends clients to
        self.sharing = False  # whether bandwidth is shared out just now
        self.load = None  # gives the configuration that a start would have now
        self.door = None  # the operator's
        self.standing = []  # warnings of what only the operator can mend
        self.tls = self.load_certificate()
        self.ticks = 0
        if role != "hbbr":
            self.create_rendezvous()
        if role != "hbbs":
            self.create_relay()
        self.loop.later(1.0, self.tick)

    # -- start -----------------------------------------------------------------

    def warn(self, text):
        """Log what stays wrong until the operator mends it, and keep it for the
        status page."""
        self.log.warn(text)
        if text not in self.standing and len(self.standing) < MAX_STANDING:
            self.standing.append(text)

    def standing_warnings(self):
        """All that is wrong now, and only the operator can mend."""
        troubles = self.relay_watch.troubles() if self.relay_watch is not None else []
        return [*self.config.warnings, *self.standing, *troubles]

    def load_key(self, is_relay):
        """The key of a role, with its warnings logged."""
        text = self.config.key
        plant_key(self.directory, self.config.key_priv, self.config.key_pub)
        if text is None:
            warns = self.rendezvous is not None and self.config.relay_tickets == "on"
            policy = self.config.key_policy or (is_relay and warns and "warn")
            text = "" if is_relay and policy not in ("warn", "require") else "-"
        if is_relay and text in ("-", "_"):
            wait_for_key_file(self.directory)
        key, warnings = load_server_key(text, is_relay, self.directory, os.urandom)
        for warning in warnings:
            self.warn(warning)
        key.accepted = self.config.accept_key
        return key

    def load_certificate(self):
        """TLS for every TCP port, if there is a certificate."""
        certificate, key = self.config.tls_cert, self.config.tls_key
        if not certificate:
            return None
        try:
            tls = Tls(certificate, key)
        except ImportError:
            raise Trouble("--tls-cert needs Python's ssl module, which is not "
                          "installed here (OpenWrt: opkg install python3-openssl)"
                          ) from None
        except (OSError, ValueError) as error:
            raise Trouble(f"the certificate of --tls-cert {certificate} cannot be "
                          f"used with --tls-key {key or certificate}: {error}"
                          ) from None
        self.loop.later(CERTIFICATE_CHECK_SECONDS, self.check_certificate)
        return tls

    def check_certificate(self):
        """Now and then: a new certificate is taken without a word from
        anybody."""
        self.loop.later(CERTIFICATE_CHECK_SECONDS, self.check_certificate)
        try:
            changed = self.tls.changed() != self.tls.read_at
        except OSError:
            return  # being replaced just now
        if changed:
            try:
                self.reload_certificate()
            except Trouble as trouble:
                self.log.error(f"{trouble}; the old one stays in force")

    def reload_certificate(self):
        """Read the certificate again; Trouble leaves the old one in
        force."""
        try:
            self.tls.reload()
        except (OSError, ValueError) as error:
            raise Trouble(f"the certificate {self.tls.files[0]} or its key "
                          f"{self.tls.files[1]} cannot be used: {error}") from None
        self.log.info(f"certificate {self.tls.files[0]} read again")

    def create_rendezvous(self):
        """The ID server: its key, its store, its role."""
        key = self.load_key(False)
        self.store = PeerStore(os.path.join(self.directory, STORE_FILE))
        try:
            self.store.load()
        except OSError as error:
            raise Trouble(f"cannot read {self.store.path}: {error.strerror}; it "
                          "holds the known peers") from None
        self.keeper = StoreKeeper(self, self.store)
        self.keeper.open()
        self.rendezvous = Rendezvous(
            self.config, key, self.store, self.attempts, self.limits, os.urandom)
        self.find_local_relay()
        self.consoles[NAT_TEST] = RendezvousConsole(
            self.rendezvous, self.utc, self.change_by_console)
        self.take_handlers(self.rendezvous)
        self.relay_watch = RelayWatch(self)
        self.relay_watch.warn()
        self.relay_watch.check()
        self.relay_watch.announce()

    def find_local_relay(self):
        """How peers in the network of --mask reach our relay."""
        found = self.config.local_ip
        if self.config.mask and not found:
            found = own_address()
            if not found:
                self.warn("--mask is given, but no address of this machine in that "
                          "network is found: name it by --local-ip")
        if found and self.config.port not in (None, 0, RENDEZVOUS_PORT):
            # Without a port clients would go to the standard one (1.1).
            found = str(Address(found, self.config.port + RELAY_OFFSET))
        self.rendezvous.local_relay = found

    def create_relay(self):
        """The relay: its key, its lists of addresses, its role."""
        key = self.load_key(True)
        lists = [self.read_addresses(name) for name in (SLOWED_FILE, REFUSED_FILE)]
        self.relay = Relay(
            self.config, key, self.attempts, self.limits, *lists, self.loop.now)
        self.consoles[RELAY] = RelayConsole(
            self.relay, self.change_by_console, self.edit_by_console)
        self.take_handlers(self.relay)
        check_ticket_secret(self.config, self.role, self.ticket_secret)
        if not self.relay.asks_tickets and not key.required:
            self.warn("the relay has neither tickets nor a key: anybody who finds its "
                      "port can send traffic through it.  --relay-tickets on, "
                      "--relay-secret or -k closes it")

    def read_addresses(self, name):
        """The addresses of one of the official lists, if there is such a
        file."""
        path = os.path.join(self.directory, name)
        words = read_list(path)
        if words is None:
            return set()
        addresses = set()
        for word in words:
            try:
                addresses.add(parse_ip(word))
            except ValueError:
                self.log.warn(f"{path}: {word!a} is no IP address and is passed over")
        self.log.info(f"{len(addresses)} addresses in {name}")
        return addresses

    def take_handlers(self, role):
        """Bind the handlers of a role's table."""
        for listener, table in role.ACCEPTS.items():
            self.accepts[listener] = {
                kind: handler.__get__(role) for kind, handler in table.items()}

    def open(self):
        """Listen on every port, and let the operator in, who may write in the state
        directory."""
        self.ports.open()
        path = os.path.join(self.directory, door_name(self.role))
        try:
            self.door = Door(self, path)
        except (OSError, AttributeError) as error:  # such as on Windows
            self.log.warn(f"no subcommand will reach this server: {path}: {error}")

    # -- what comes ------------------------------------------------------------

    def admits(self, listener, address, place):
        """Whether a connection from this address is taken on at all.

        Where there are too many, the oldest stranger makes room for it.
        """
        if self.limits.rules.refuses_address(address.ip) or (
                listener is RELAY and not self.relay.admits_address(address)):
            self.refuse(Refusal.REFUSED_ADDRESS, str(address))
            return False
        excess, stranger = self.crowd.excess(place)
        if excess is None:
            return True
        self.refuse(excess, str(address if stranger is None else stranger.address))
        if stranger is not None:
            stranger.close()
        return stranger is not None

    @property
    def console_mode(self):
        """What the official consoles do."""
        is_default = self.config.trusted_proxy is TRUST_LOOPBACK
        return self.config.console or ("read" if is_default else "off")

    def trusts(self, ip):
        """Whether an address may say that its clients are at another one."""
        if self.config.trusted_proxy is TRUST_LOOPBACK:
            return is_loopback(ip)
        return is_within(ip, self.config.trusted_proxy)

    def pseudo_address(self, ip):
        """An address for a client behind a proxy that no other one has now."""
        address = Address(ip, 0)
        for _ in range(PSEUDO_PORT_TRIES):
            address = Address(ip, int.from_bytes(os.urandom(2), "big") or 1)
            if address not in self.pseudo_addresses:
                break
        self.pseudo_addresses.add(address)
        return address

    def is_called(self, ip):
        """Whether a peer at this address is expected to answer a call."""
        return self.rendezvous.called.get(ip) is not None

    def exchange_key(self):
        """The key pair for secured connections of this minute; None without a
        key."""
        key, now = self.rendezvous.key, self.loop.now
        if key.secret is None:
            return None
        current = self.current_exchange_key
        if current is None or now - current.made > EXCHANGE_KEY_SECONDS:
            self.current_exchange_key = ExchangeKey(key, os.urandom, now)
        return self.current_exchange_key

    def on_datagram(self, datagram, sockaddr, client=None):
        """A datagram that is no renewal; answers go to `sockaddr`."""
        address = address_of(client or sockaddr)
        if not address.port:
            return  # forged: nobody can be answered there
        if self.limits.rules.refuses_address(address.ip):
            self.refuse(Refusal.REFUSED_ADDRESS, str(address))
            return
        try:
            message = decode_message(datagram)
            handler = self.accepts[UDP].get(type(message))
            if handler is None:
                self.attempts.count(Refusal.NOT_ACCEPTED_HERE.value)
                return
            origin = Origin(UDP, address, None, sockaddr, datagram)
            self.perform(handler(message, origin, self.loop.now))
        except Refused as refused:
            self.refuse(refused.refusal, f"datagram from {address}: {refused.detail}")

    def on_frame(self, link, payload):
        """A frame of a link: decode it and let its role answer; may raise
        Refused."""
        message = decode_message(payload)
        if type(message) is KeyExchange and link.listener is TCP:
            link.agree(message)
            self.attempts.count("secured")
            return
        handler = self.accepts.get(link.listener, {}).get(type(message))
        if self.log.debugging:
            self.log.debug(f"< {link.address} {type(message).__name__}")
        if handler is None:
            self.on_unaccepted(link, message, payload)
            return
        origin = Origin(link.listener, link.address, link, None, None)
        self.perform(handler(message, origin, self.loop.now))

    def on_unaccepted(self, link, message, payload):
        """An empty frame, or a message that this listener does not take."""
        if link.listener is RELAY:
            raise Refused(Refusal.NO_RELAY_REQUEST, "the first frame was another")
        if not payload and link.errand is not None:
            self.rendezvous.on_empty_frame(link, self.loop.now)
        elif not payload:
            link.strange += EMPTY_FRAME_STRANGENESS
            if link.strange >= self.limits.strange_messages:
                self.refuse(Refusal.STRANGE, f"only empty frames from {link.address}")
        elif message is None:
            self.refuse(Refusal.STRANGE, f"a message from {link.address}")
            link.strange += 1
        else:
            text = f"{type(message).__name__} from {link.address}"
            self.refuse(Refusal.NOT_ACCEPTED_HERE, text)
            link.strange += 1
        if (link.strange >= self.limits.strange_messages
                or link.listener in (NAT_TEST, *NO_WEBSOCKET)):
            link.end()

    def on_command(self, link, words):
        """A text command from this machine; returns the reply."""
        console = self.consoles.get(link.listener)
        self.attempts.count("command")
        try:
            return answer_command(console, words, self.loop.now) if console else ""
        except ReadOnly:
            text = f"{' '.join(words)!a} from {link.address} was not done"
            self.refuse(Refusal.READ_ONLY, text)
            return "nothing was changed: this console only answers questions\n"

    def on_ticket(self, session_uuid, ticket):
        """The ID server has arranged a session."""
        self.perform(self.relay.on_ticket(session_uuid, ticket, self.loop.now))

    def on_closed(self, link):
        """A connection has ended: its role forgets it."""
        if isinstance(link.errand, Session):
            self.end_session(link.errand, "broken", link)
        elif link.errand is not None:
            role = self.relay if link.listener is RELAY else self.rendezvous
            self.perform(role.on_link_closed(link, self.loop.now))

    # -- what is done ----------------------------------------------------------

    def perform(self, actions):
        """Carry out a handler's actions once it has finished.

        Closing a link asks its role again, so none may be done before.
        """
        for action in list(actions):
            self.PERFORM[type(action)](self, action)

    def do_send(self, action):
        """Send over a link."""
        if self.log.debugging:
            self.log.debug(f"> {action.link.address} {type(action.message).__name__}")
        action.link.send_payload(encode_message(action.message))

    def do_close(self, action):
        """End a link."""
        if isinstance(action.link.errand, Session):
            self.end_session(action.link.errand, "idle")
        else:
            action.link.end()

    def do_hang_up(self, action):
        """End our half of a link, and go on when the other half has ended."""
        def go_on():
            self.loop.later(PUNCH_GRACE_SECONDS,
                            lambda: self.perform(action.then(self.loop.now)))
        action.link.end(go_on)

    def do_pair(self, action):
        """Let two links of the relay exchange their bytes."""
        session = action.session
        early_bytes = session.first.take_early(), session.second.take_early()
        pipes = self.pipes[session.number] = join(session)
        for pipe in pipes:
            if pipe.outgoing is not None and pipe.outgoing.unsent:  # pongs, say
                unsent, pipe.outgoing.unsent = pipe.outgoing.unsent, b""
                pipe.hold(unsent)
        for pipe, early in zip(pipes, early_bytes):
            if early and pipe.incoming is not None:
                pipe.flow.allowance -= len(early)
                pipe.feed(early)
        if not self.sharing and self.relay.is_capped(session):
            self.share_bandwidth()

    def share_bandwidth(self):
        """While a session is capped: give out what may be carried next."""
        self.sharing = any(map(self.relay.is_capped, self.relay.sessions.values()))
        if self.sharing:
            self.loop.later(SHARE_SECONDS, self.share_bandwidth)
            self.perform(self.relay.share_bandwidth(self.loop.now))

    def do_resume(self, action):
        """Let a session move bytes again."""
        for pipe in self.pipes.get(action.session.number, ()):
            pipe.go_on()

    def do_arrange(self, action):
        """Tell our relay, and those of the list, of an arranged session."""
        fault_of = self.rendezvous.key.fault_of if action.needs_key else None
        if self.relay is not None and self.relay.asks_tickets:
            ticket = Ticket(action.peer_id, fault_of, action.relay)
            self.on_ticket(action.session_uuid, ticket)
        if self.relay_watch is not None:
            self.relay_watch.tell(action)

    def do_later(self, action):
        """Go on in a while."""
        self.loop.later(action.seconds,
                        lambda: self.perform(action.then(self.loop.now)))

    def do_report(self, action):
        """Count an outcome and log it."""
        self.attempts.count(action.word)
        self.note(action.peer_id, action.word, action.text)
        text = f"{action.word}: {action.text}"
        if action.word == "gateway":
            self.warn(text)
        else:
            self.log.write("warn" if action.word in WARNINGS else "info", text)

    def note(self, peer_id, word, text):
        """Let an outcome be found among the last attempts of an id."""
        if peer_id:
            known = self.store is None or peer_id in self.store.peers
            self.attempts.note(
                peer_id[:MAX_ID_BYTES], word, text, self.loop.now, known)

    def do_event(self, action):
        """Tell the operator's command of an event."""
        if self.events is not None:
            self.events.tell(action.name, action.peer_id, str(action.text))

    def do_tolerate(self, action):
        """Count what was let pass, and log it, no more than so often."""
        word = f"tolerated-{action.refusal.value}"
        self.note(action.peer_id, word, action.text)
        if self.may_log(word):
            self.log.warn(f"{word}: {action.text}")

    def do_refuse(self, action):
        """Count a refusal and log it."""
        self.note(action.peer_id, action.refusal.value, action.text)
        self.refuse(action.refusal, action.text)

    PERFORM = {
        Send: do_send, Close: do_close, HangUp: do_hang_up,
        SendDatagram: lambda self, action: self.ports.datagrams.send(
            encode_message(action.message), action.sockaddr),
        Heartbeat: lambda self, action: action.link.send_payload(b""),
        Keep: lambda self, action: action.link.be_patient(None),
        Store: lambda self, action: self.keeper.pending.append(action),
        Pair: do_pair, Resume: do_resume, Arrange: do_arrange, Later: do_later,
        Report: do_report, Event: do_event, Tolerate: do_tolerate, Refuse: do_refuse,
    }

    def refuse(self, refusal, text):
        """The one place where a "no" is counted and logged, no more than so
        often."""
        if self.may_log(refusal.value):
            self.log.warn(f"refused, {refusal.value}: {text}")
        if (refusal in LIMIT_REFUSALS and self.events is not None
                and self.lines_this_minute[refusal.value] == 1):
            self.events.tell("limit-hit", "", f"{refusal.value}: {text}")

    def may_log(self, word):
        """Count one more of a word; whether its lines this minute are not too
        many."""
        self.attempts.count(word)
        lines = self.lines_this_minute[word]
        self.lines_this_minute[word] += 1
        return lines < self.limits.log_lines

    def end_session(self, session, word, gone=None):
        """End both links of a session; `gone` is the one that has ended by
        itself.

        What was read has been sent.
        """
        pipes = self.pipes.pop(session.number, None)
        self.perform(self.relay.on_session_ended(session, word, self.loop.now))
        if pipes is None:
            return
        for pipe in pipes:
            if pipe.outgoing is not gone:
                pipe.say_goodbye()
        for pipe in pipes:
            pipe.detach()
        for link in session.first, session.second:
            link.errand = None
            if link is gone:
                link.close()
            else:
                link.end(survives=True)

    # -- the passing of time ---------------------------------------------------

    def on_turn(self):
        """After every turn: records to the disk, then answers; lines to the
        log."""
        if self.keeper is not None and self.keeper.pending:
            self.keeper.write()
        if self.log.lines:
            self.log.flush()

    def tick(self):
        """Once a second."""
        self.loop.later(1.0, self.tick)
        now = self.loop.now
        for table in self.first_patience, self.next_patience, self.relay_patience:
            for link, _ in table.expire(now):
                self.on_silence(link)
        for table in self.endings, self.survivors:
            for link, _ in table.expire(now):
                link.close()
        for role in self.rendezvous, self.relay:
            if role is not None:
                self.perform(role.tick(now))
        if self.store is not None:
            self.keeper.tend()
            self.keeper.save_some_seen()
            self.keeper.tidy_some()
        if self.draining and not self.relay.sessions:
            self.loop.stop()
        self.supervisor.beat(now, self.summary)
        self.ticks += 1
        if self.ticks % 60 == 0:
            self.report_kept_back()
            self.status.note_minute()
        if (self.store is not None and self.events is not None
                and self.ticks % PRESENCE_SECONDS == 0):
            self.perform(self.rendezvous.presence(now))

    def on_silence(self, link):
        """A link has said nothing for as long as it may."""
        if not link.served:
            self.refuse(Refusal.SILENT, f"{link.address} on {link.entrance.name}")
        link.end()

    def report_kept_back(self):
        """Once a minute, and at the end: how many refusals were not logged."""
        for word, count in self.lines_this_minute.items():
            if count > self.limits.log_lines:
                more = count - self.limits.log_lines
                self.log.warn(f"{word}: {more} more in the last minute")
        self.lines_this_minute.clear()

    def summary(self):
        """What goes on, for the supervisor's status line."""
        parts = []
        if self.rendezvous is not None:
            parts.append(f"{len(self.rendezvous.registrations)} peers registered")
        if self.relay is not None:
            parts.append(f"{len(self.relay.sessions)} sessions relayed")
        return ", ".join(parts)

    def utc(self, moment):
        """A time of the loop's clock as UTC text."""
        seconds = time.time() - (self.loop.now - moment)
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))

    def on_fault(self, handler, error):
        """A fault of ours: log it, end the connection that met it, and live
        on."""
        import traceback

        if self.may_log("fault"):
            trace = traceback.format_exception(type(error), error, error.__traceback__)
            for line in "".join(trace).splitlines():
                self.log.error(line)
        link = getattr(handler, "__self__", None)
        if isinstance(link, Connection) and handler != link.close:
            self.loop.later(0.0, link.close)

    # -- stop ------------------------------------------------------------------

    def run(self):
        """Serve until SIGTERM or SIGINT."""
        if hasattr(gc, "freeze"):  # PyPy's collector is another one
            gc.freeze()  # what is loaded by now is never looked through again
        self.loop.run()

    def reload(self):
        """SIGHUP: read again what can change while we run, all of it or
        nothing; returns what stands in the way, or ""."""
        moment = time.monotonic_ns() // 1000
        self.supervisor.notify("RELOADING=1", f"MONOTONIC_USEC={moment}")
        try:
            self.log.open_again()
        except OSError as error:
            self.log.error(f"cannot write the log file {self.log.path}: "
                           f"{error.strerror}; the old one is written on")
        try:
            config = self.load()
            Limits(config)
            lists = self.relay and [
                self.read_addresses(name) for name in (SLOWED_FILE, REFUSED_FILE)]
            if self.tls is not None:
                self.reload_certificate()
        except Trouble as trouble:
            why = str(trouble)
            self.log.error(f"nothing is changed: {why}")
        else:
            why = ""
            if lists:
                self.relay.slowed, self.relay.refused = lists
            self.take_config(config)
        self.supervisor.notify("READY=1")
        return why

    def take_config(self, config):
        """Let new settings be in force where that can be, and say what
        changed."""
        self.config.warnings = config.warnings
        for warning in config.warnings:
            self.log.warn(warning)
        self.limits.take(config)
        changed = [name for name in SETTINGS
                   if getattr(config, name) != getattr(self.config, name)]
        for name in changed:
            if name in CHANGEABLE:
                setattr(self.config, name, getattr(config, name))
                self.log.info(f"changed: {name.replace('_', '-')}")
            else:
                self.log.warn(f"{name.replace('_', '-')} changes with the next start")
        if self.rendezvous is not None:
            if "relay_servers" in changed:
                self.rendezvous.relays = RelayServers(config.relay_servers)
            if "mask" in changed or "local_ip" in changed:
                self.find_local_relay()
        self.enforce()
        self.log.set_level(self.config.log_level)
        self.log.info(f"configuration read again, {len(changed)} settings changed")

    def enforce(self):
        """Let limits, rules, lists, keys and bandwidth be those of the
        configuration, also for what lives already."""
        config, rules = self.config, self.limits.rules
        if self.rendezvous is not None:
            self.rendezvous.key.accepted = config.accept_key
            self.relay_watch.announce()
            self.perform(self.rendezvous.enforce())
        for link in list(self.crowd.links):
            if rules.refuses_address(link.address.ip):
                self.cut(link)
        if self.relay is not None:
            self.relay.key.accepted = config.accept_key
            self.perform(self.relay.set_caps(self.loop.now))
            for session in list(self.relay.sessions.values()):
                if self.relay.is_unwanted(session):
                    self.end_session(session, "cut")
            if not self.sharing:
                self.share_bandwidth()

    def cut(self, link):
        """End a connection that the operator does not want."""
        if isinstance(link.errand, Session):
            self.end_session(link.errand, "cut")
        link.close()

    # -- changes at run time ---------------------------------------------------

    def change(self, **changes):
        """Change settings now and for good; None for a text returns to what
        was configured.

        Trouble if they cannot be, OSError if the disk does not keep
        them: then nothing has changed.
        """
        for attribute, text in changes.items():
            if text is not None and not text.isprintable():
                raise Trouble(f"{attribute} = {text!a}: it must be one line")
        entries = merge_changes(read_changes(self.directory), {
            SETTINGS[attribute].name: text for attribute, text in changes.items()})
        config = self.load(entries)
        Limits(config)  # Trouble if there is no such limit
        save_changes(self.directory, entries)
        self.take_config(config)

    def change_by_console(self, name=None, text=None):
        """What an official console does with a change."""
        if self.console_mode != "full":
            raise ReadOnly()
        if name is not None:
            try:
                self.change(**{canonical_name(name): text})
            except (Trouble, OSError) as trouble:
                self.log.error(f"nothing is changed: {trouble}")

    def edit_by_console(self, name, words, add):
        """Add addresses to one of the official lists, or remove them, in its
        file as well."""
        self.change_by_console()
        addresses = self.relay.slowed if name == SLOWED_FILE else self.relay.refused
        if not add and words == ["all"]:
            addresses.clear()
        else:
            given = set(map(parse_ip, filter(None, words)))  # all of them, or none
            (addresses.update if add else addresses.difference_update)(given)
        self.enforce()
        try:
            write_in_place(os.path.join(self.directory, name),
                           "".join(f"{ip}\n" for ip in sorted(addresses)))
        except OSError as error:
            self.log.error(f"{name} is changed only until the next start: {error}")

    def health(self):
        """One line for who watches over us; no secrets, since anybody may
        ask."""
        if self.store is not None and self.store.descriptor is None:
            return "degraded: the store cannot be written"
        if self.store is not None and self.keeper.refused:
            return "degraded: the disk takes no new peers"
        return "ok"

    def stop(self, reason):
        """Take no more connections; end when the sessions have, or --drain is
        over."""
        seconds = self.config.drain
        sessions = len(self.relay.sessions) if self.relay is not None else 0
        self.supervisor.notify("STOPPING=1")
        if self.draining or not sessions or not seconds:
            self.log.info(f"stopping: {reason}")
            self.loop.stop()
            return
        self.draining = True
        self.log.info(f"stopping: {reason}; {sessions} sessions may go on for "
                      f"{seconds} s")
        self.ports.close()
        self.loop.later(seconds, self.loop.stop)

    def close(self):
        """End every session and connection, and let the disk have
        everything."""
        self.ports.close()
        if self.door is not None:
            self.door.close()
        if self.relay_watch is not None:
            self.relay_watch.close()
        if self.relay is not None:
            sessions = list(self.relay.sessions.values())
            for session in sessions:
                self.end_session(session, "server-stopped")
            if sessions:
                self.log.warn(f"{len(sessions)} sessions were cut")
        if self.store is not None:
            self.keeper.save_seen(list(self.rendezvous.registrations))
            self.keeper.close()
        self.report_kept_back()
        self.log.info("stopped")
        self.log.flush()


def read_list(path):
    """The first word of each line of a file, or None where there is no such
    file; Trouble if it can't be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return [line.split()[0] for line in file if line.split()]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Trouble(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise Trouble(f"cannot read {path}: it is no UTF-8 text") from None


def check_ticket_secret(config, role, secret):
    """Trouble if tickets are asked for that nobody can announce."""
    if role == "hbbr" and config.relay_tickets == "on" and not secret:
        raise Trouble("--relay-tickets on needs an ID server that announces them: give "
                      "both the same --relay-secret")


def check_status_token(config):
    """Trouble if strangers could look at the status."""
    for ip, port in config.status_listen or ():
        if not config.status_token and not is_loopback(ip):
            raise Trouble(
                f"--status-listen {Address(ip or '0.0.0.0', port)} can be reached "
                "from elsewhere: give a --status-token as well")


class Ports:
    """The sockets that a server listens on."""

    def __init__(self, server):
        self.server = server
        self.config, self.log = server.config, server.log
        self.listeners = []
        self.datagrams = None  # the ID server's UDP port

    def open(self):
        """Listen on every port of the roles."""
        if self.server.rendezvous is not None:
            port = self.config.port
            port = RENDEZVOUS_PORT if port is None else port
            main = self.listen(port, "rendezvous", TCP)
            self.listen_for_datagrams(main.address.port)
            nat_port = port and port + NAT_TEST_OFFSET
            self.listen(nat_port, "nat-test", NAT_TEST)
            web_port = port and port + WEBSOCKET_OFFSET
            self.listen(web_port, "rendezvous-websocket", TCP)
            self.listen_for_api(port)
        if self.server.relay is not None:
            port = self.relay_port()
            self.listen(port, "relay", RELAY)
            web_port = port and port + WEBSOCKET_OFFSET
            self.listen(web_port, "relay-websocket", RELAY)
        default = RELAY if self.server.rendezvous is None else TCP
        for ip, port in self.config.listen:
            self.listen(port, "added", default, ip, "--listen")
        self.listen_for_status()

    def listen_for_status(self):
        """Let the operator look at the status, by default from this machine."""
        config, port = self.config, STATUS_PORT + (self.server.role == "hbbr")
        places = config.status_listen
        if places is None:
            try:
                self.listen(0 if config.port == 0 else port, "status", STATUS,
                            "127.0.0.1", "--status-listen")
            except Trouble as trouble:
                self.server.warn(f"no status page: {trouble}")
        check_status_token(config)
        for ip, port in places or ():
            self.listen(port, "status", STATUS, ip, "--status-listen")

    def listen_for_api(self, port):
        """Answer web API requests with 404, unless an API server is there."""
        api_port = self.config.api_port
        if api_port is None:
            api_port = port and port + API_OFFSET
        if api_port < 0:
            return
        try:
            self.listen(api_port, "api", API, flag="--api-port")
        except Trouble as trouble:
            self.server.warn(f"{trouble}; if that is an API server, --api-port off "
                             "ends this warning")

    def relay_port(self):
        """The relay's own port: beside an ID server one above its port."""
        port = self.config.port
        if port is None:
            return RELAY_PORT
        beside = port and self.server.rendezvous is not None
        return port + RELAY_OFFSET if beside else port

    def listen(self, port, name, listener, ip="", flag="-p"):
        """Open one TCP port, which that flag changes."""
        if not 0 <= port <= 65535:
            raise Trouble(f"there is no port {port} ({name}): choose another {flag}")
        ip = ip or self.config.bind
        sock = self.bind(socket.SOCK_STREAM, port, ip, flag)
        keep_alive(sock)
        try:
            sock.listen(LISTEN_BACKLOG)
        except OSError as error:
            failure = bind_failure(socket.SOCK_STREAM, ip, port, error, flag)
            raise Trouble(failure) from None
        opened = StreamListener(self.server, sock, name, listener)
        self.listeners.append(opened)
        self.log.info(f"listening on tcp {opened.address} ({name})")
        return opened

    def listen_for_datagrams(self, port):
        """Open the UDP port."""
        sock = self.bind(socket.SOCK_DGRAM, port, self.config.bind)
        if self.config.rmem:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.config.rmem)
        several = self.config.bind in ANY_ADDRESS and has_several_addresses()
        kind = MultihomedListener if several else DatagramListener
        renewals = self.server.rendezvous.renewals
        self.datagrams = kind(self.server, sock, "rendezvous", renewals)
        self.listeners.append(self.datagrams)
        self.log.info(f"listening on udp {self.datagrams.address} (rendezvous)")

    def bind(self, kind, port, ip, flag="-p"):
        """A bound, non-blocking socket, for IPv6 and IPv4 where that goes."""
        families = [socket.AF_INET6 if ":" in ip else socket.AF_INET] if ip else [
            socket.AF_INET6, socket.AF_INET]
        for family in families:
            try:
                sock = ListeningSocket(family, kind)
            except OSError:
                continue  # a system without IPv6
            try:
                is_ipv6 = family == socket.AF_INET6
                prepare(sock, kind, dual=not ip and is_ipv6)
                sock.bind((ip or ("::" if is_ipv6 else "0.0.0.0"), port))
                return sock
            except OSError as error:
                sock.close()
                if error.errno != errno.EADDRNOTAVAIL or family is families[-1]:
                    raise Trouble(
                        bind_failure(kind, ip, port, error, flag)) from None
        raise Trouble("this system has neither IPv6 nor IPv4")

    def close(self):
        """Let nobody in any more."""
        for listener in self.listeners:
            listener.close()
        self.listeners = []


class Door:
    """The Unix socket by which the subcommands speak to the running server: a
    line of JSON each way."""

    #: A command, with lists of ids and networks.
    MAX_LINE_BYTES = 1024 * 1024

    def __init__(self, server, path):
        self.server = server
        self.path = path
        self.operator = Operator(server)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # of a server that was killed; the lock keeps others out
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            self.socket.bind(path)
        finally:
            os.umask(before)
        self.socket.listen(8)
        self.socket.setblocking(False)
        server.loop.watch(self.socket, READ, self.on_events)

    def on_events(self, events):
        """A subcommand comes."""
        try:
            sock, _ = self.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:  # no descriptor is left
            pause(self.server.loop, self)
            return
        sock.setblocking(False)
        Visit(self, sock)

    def close(self):
        """Let nobody in any more."""
        self.server.loop.close(self.socket)
        with contextlib.suppress(OSError):
            os.unlink(self.path)


class Visit:
    """One subcommand at the door."""

    def __init__(self, door, sock):
        self.door = door
        self.socket = sock
        self.data = b""
        self.loop = door.server.loop
        self.loop.watch(sock, READ, self.read)

    def read(self, events):
        """More of the command; when it is whole it is done."""
        try:
            data = self.socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.data += data
        if b"\n" in self.data:
            self.loop.change(self.socket, READ, 0, None)
            line, self.data = self.data, b""
            try:
                self.door.operator.obey(line, self.answer)
            except Exception:  # a fault of ours: who asks need not wait for nothing
                self.socket.close()
                raise
        elif not data or len(self.data) > Door.MAX_LINE_BYTES:
            self.loop.close(self.socket)

    def answer(self, reply):
        """Send the reply, as fast as it is taken."""
        self.data = memoryview(json.dumps(reply).encode() + b"\n")
        self.loop.watch(self.socket, WRITE, self.write)

    def write(self, events):
        """The subcommand takes more."""
        try:
            self.data = self.data[self.socket.send(self.data):]
        except BlockingIOError:
            return
        except OSError:
            self.data = b""
        if not self.data:
            self.loop.close(self.socket)


def door_name(role):
    """The file name of the door of a server in this role."""
    return f".{role}.door"


class Operator:
    """What the subcommands ask of the running server, a method each.

    A command gets its words and a function for its reply: {"said": sentence}
    and perhaps "columns" and "rows" of a table.
    """

    def __init__(self, server):
        self.server = server
        self.rendezvous, self.relay = server.rendezvous, server.relay

    def obey(self, line, answer):
        """Do what a line asks for; a mistake is answered as {"fault": why}."""
        try:
            name, *words = read_order(line)
            command = self.COMMANDS.get(name)
            if command is None:
                raise Trouble(f"there is no command {name}")
            if self.rendezvous is None and name in self.OF_RENDEZVOUS:
                answer({})  # the ID server has a door of its own
            else:
                command(self, words, answer)
        except (Trouble, ValueError, RecursionError) as mistake:
            answer({"fault": str(mistake)})
        except OSError as error:
            answer({"fault": f"the disk does not take it: {error.strerror}"})

    # -- looking ---------------------------------------------------------------

    def peers(self, words, answer):
        """Every known peer, or some, and those that wait for approval."""
        wall = int(time.time())
        rows = [peer_row(facts, wall) for facts in all_peer_facts(
                    self.rendezvous, self.server.loop.now, wall)
                if not words or facts["id"] in words]
        answer({"columns": ["id", "state", "address", "transport", "last seen"],
                "rows": rows, "said": f"{len(rows)} peers"})

    def status(self, words, answer):
        """What goes on, or what became of the last attempts about an id."""
        if words:
            (peer_id,) = one_or_more(words, most=1)
            answer(self.status_of(peer_id))
            return
        rows = [[word, count] for word, count in sorted(
            self.server.attempts.counters.items())]
        answer({"columns": ["outcome", "since the start"], "rows": rows,
                "said": f"{self.server.health()}, version {VERSION}, "
                        f"{self.server.summary()}, "
                        f"{len(self.server.crowd.links)} connections"})

    def status_of(self, peer_id):
        """One id: its route and how the last attempts about it ended."""
        now, said = self.server.loop.now, f"nobody registered {show(peer_id)} here"
        if self.rendezvous is None:
            said = ""  # only the ID server knows
        elif peer_id in self.rendezvous.store.peers:
            wall, peer = int(time.time()), self.rendezvous.store.peers[peer_id]
            facts = peer_facts(self.rendezvous, peer, now, wall)
            version = facts["version"] and f"version {facts['version']}"
            said = ", ".join(filter(None, [*peer_row(facts, wall), version]))
        attempts = self.server.attempts.last(peer_id[:MAX_ID_BYTES])
        rows = [[f"{lasted(now - attempt.at)} ago", attempt.word, attempt.text]
                for attempt in reversed(attempts)]
        return {"columns": ["when", "outcome", "how"], "rows": rows, "said": said}

    def sessions(self, words, answer):
        """Every relayed session."""
        if self.relay is None:
            answer({})
            return
        now = self.server.loop.now
        rows = [session_row(session_facts(session, now))
                for session in self.relay.sessions.values()]
        answer({"columns": ["number", "peer", "one end", "other end", "seconds", "MB",
                            "kb/s"],
                "rows": rows, "said": f"{len(rows)} sessions"})

    # -- peers -----------------------------------------------------------------

    def kick(self, words, answer):
        """End what an id or a session has now; it may come back."""
        ended = 0
        for word in one_or_more(words):
            if self.rendezvous is not None and word in self.rendezvous.registrations:
                self.server.perform(self.rendezvous.cut(word))
                ended += 1
            ended += self.end_sessions(
                lambda session: word in (session.peer_id, str(session.number)))
        answer({"said": f"{ended} ended"})

    def end_sessions(self, unwanted):
        """End relayed sessions; how many."""
        sessions = self.relay.sessions.values() if self.relay is not None else ()
        found = [session for session in sessions if unwanted(session)]
        for session in found:
            self.server.end_session(session, "cut")
        return len(found)

    def set_state(self, words, answer, state, said):
        """Write another state of a known peer, and end what it has."""
        (word,) = one_or_more(words, most=1)
        self.end_sessions(lambda session: session.peer_id == word)
        if self.rendezvous is None:
            answer({})
            return
        if word not in self.rendezvous.store.peers:
            raise Trouble(f"no peer has the id {word}")
        self.server.perform(self.rendezvous.set_state(
            word, state, lambda written: answer(outcome(written, f"{word} {said}"))))

    def forget(self, words, answer):
        """Remove an id as if it had never been."""
        self.set_state(words, answer, FORGOTTEN, "is forgotten")

    def reclaim(self, words, answer):
        """Let the next device that claims an id have it."""
        said = "goes to the next device that claims it"
        self.set_state(words, answer, RELEASED, said)

    def disable(self, words, answer):
        """Serve a peer no more, until it is approved again."""
        self.set_state(words, answer, DISABLED, "is disabled; approve ends that")

    def approve(self, words, answer):
        """Let a waiting or disabled peer register; without an id, who
        waits."""
        waiting = self.rendezvous.applicants
        if not words:
            rows = [[peer.peer_id, peer.ip] for _, peer in waiting.entries.values()]
            answer({"columns": ["id", "address"], "rows": rows,
                    "said": f"{len(rows)} devices wait for approval"})
            return
        word, ip = (*one_or_more(words, most=2), "")[:2]
        applying = [one for one in self.rendezvous.applying(word) if ip in ("", one.ip)]
        if word not in self.rendezvous.store.peers and len(applying) != 1:
            addresses = ", ".join(one.ip for one in applying)
            raise Trouble(f"{len(applying)} devices claim {word}: name the address of "
                          f"yours behind it ({addresses})" if applying else
                          f"no peer {word} waits or is known")
        self.server.perform(self.rendezvous.approve(
            word, ip, lambda written: answer(outcome(written, f"{word} is approved"))))

    # -- settings --------------------------------------------------------------

    def allow(self, words, answer):
        """Add to `--allow`, or take away with a - behind."""
        self.change_lists("allow", "refuse", words, answer)

    def refuse(self, words, answer):
        """Add to `--refuse`, or take away with a - behind."""
        self.change_lists("refuse", "allow", words, answer)

    def change_lists(self, name, other, words, answer):
        """Move a subject into one list and out of the other."""
        config, remove = self.server.config, words[1:] == ["-"]
        ours, theirs = list(getattr(config, name)), list(getattr(config, other))
        if words:
            subject = parse_subject(one_or_more(words[:-1] if remove else words, 1)[0])
            ours = [entry for entry in ours if entry != subject]
            if not remove:
                ours.append(subject)
                theirs = [entry for entry in theirs if entry != subject]
            self.server.change(**{name: ",".join(map(str, ours)) or "-",
                                  other: ",".join(map(str, theirs)) or "-"})
        answer({"columns": [name], "rows": [[str(entry)] for entry in ours],
                "said": f"{len(ours)} entries of --{name}"})

    def limits(self, words, answer):
        """The limits and the bandwidth, or another number for one of them."""
        if len(words) > 1:
            self.change_limit(*words[:2])
        limits, config = self.server.limits, self.server.config
        rows = [[row.name, getattr(limits, attribute), row.default, row.unit,
                 row.reason]
                for attribute, row in LIMITS.items()]
        rows += [[SETTINGS[name].name, value if value is not None else "none",
                  SETTINGS[name].default or "none", SETTINGS[name].metavar.lower(), ""]
                 for name in BANDWIDTH for value in [getattr(config, name)]]
        if words:
            rows = [row for row in rows if row[0] == words[0].replace("_", "-")]
            if not rows:
                raise Trouble(f"there is no limit {words[0]}; `limits` lists them")
        answer({"columns": ["limit", "number", "default", "unit", "reason"],
                "rows": rows, "said": ""})

    def change_limit(self, name, number):
        """Another number for a limit; `-` returns to what was configured."""
        attribute = canonical_name(name)
        if attribute in BANDWIDTH:
            self.server.change(**{attribute: None if number == "-" else number})
            return
        changes = [text for name, text, _ in read_changes(self.server.directory)
                   if name == "limit"]
        numbers = {canonical_name(one): value
                   for text in changes for one, value in parse_limits(text)}
        numbers[attribute] = number
        if number == "-":
            del numbers[attribute]
        text = ",".join(f"{one.replace('_', '-')}={value}"
                        for one, value in numbers.items())
        self.server.change(limit=text or None)

    def relay_servers(self, words, answer):
        """The relays that clients are sent to, and whether they answer."""
        if words:
            self.server.change(
                relay_servers=None if words == ["-"] else ",".join(words))
        rows = [[facts["name"], facts["for"], facts["state"]]
                for facts in relay_facts(self.rendezvous.relays)]
        answer({"columns": ["relay", "for", "state"], "rows": rows,
                "said": f"{len(rows)} relays"})

    def always_use_relay(self, words, answer):
        """Whether everything is relayed."""
        if words:
            (word,) = one_or_more(words, most=1)
            self.server.change(always_use_relay=None if word == "-" else word)
        on = self.server.config.always_use_relay
        answer({"said": f"always-use-relay is {'Y' if on else 'N'}"})

    def reload(self, words, answer):
        """Read configuration, lists and certificates again."""
        why = self.server.reload()
        fault = {"fault": f"nothing is changed: {why}"}
        answer(fault if why else {"said": "read again"})

    # -- for the doctor --------------------------------------------------------

    def facts(self, words, answer):
        """Where we listen and what key clients need, as a doctor on this machine
        has to know it."""
        server = self.server
        ports = {listener.name: listener.address.port
                 for listener in server.ports.listeners}
        entries = server.config.relay_servers
        key = server.rendezvous and server.rendezvous.key
        answer({"pid": os.getpid(), "role": server.role, "ports": ports,
                "key": (key.public_text or key.required) if key else "",
                "bind": server.config.bind, "rmem": server.config.rmem,
                "relays": [[entry.name, bool(entry.network)] for entry in entries]})

    def ticket(self, words, answer):
        """Arrange one session of the doctor's with itself."""
        session_uuid = f"doctor-{os.urandom(16).hex()}"
        self.server.perform([Arrange(session_uuid, "", False)])
        answer({"session_uuid": session_uuid})

    COMMANDS = {
        "status": status, "peers": peers, "sessions": sessions, "kick": kick,
        "forget": forget, "reclaim": reclaim, "approve": approve, "disable": disable,
        "allow": allow, "refuse": refuse, "limits": limits,
        "relay-servers": relay_servers, "always-use-relay": always_use_relay,
        "reload": reload, "facts": facts, "ticket": ticket,
    }
    #: What only the ID server can do or tell.
    OF_RENDEZVOUS = frozenset(("peers", "approve", "relay-servers", "always-use-relay"))


def session_row(facts):
    """A session as a row of a table, in MB and kb/s."""
    return [facts["number"], facts["peer"], facts["first"], facts["second"],
            facts["seconds"], round(facts["bytes"] / 1e6, 2),
            round(facts["bits_per_second"] / 1000)]


def peer_row(facts, wall):
    """A peer as a row of a table: id, state, address, transport, last seen."""
    return [facts["id"], facts["state"], facts["address"], facts["transport"],
            ago(facts["seen"], wall)]


def read_order(line):
    """The command and words of a line at the door; Trouble if it has none."""
    try:
        order = json.loads(line)
    except RecursionError:
        order = None
    if not isinstance(order, list) or not order or not all(
            isinstance(word, str) for word in order):
        raise Trouble("a command is a list of words")
    return order


#: Settings that `limits` shows and changes beside the limits.
BANDWIDTH = ("single_bandwidth", "total_bandwidth", "limit_speed",
             "downgrade_threshold", "downgrade_start_check", "idle_limit")


def one_or_more(words, most=None):
    """The words of a command that needs some; Trouble if they are too few or
    too many."""
    if not words or most is not None and len(words) > most:
        raise Trouble("name one" if most == 1 else "name one or more")
    return words


def outcome(written, said):
    """The reply to a change that had to be written."""
    return {"said": said} if written else {
        "fault": "the disk does not take it; nothing is changed"}


def free_descriptors():
    """How many connections may be open beside listeners, store and log."""
    if resource is None:
        return 1 << 30
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 30 if most == resource.RLIM_INFINITY else max(16, most - 64)


class Events:
    """Runs the operator's command for each event, one at a time, in a thread of
    its own, so that nothing here waits for it."""

    #: Events that wait for their turn; more are lost, and said to be.
    MAX_WAITING = 1000
    #: How long the command may take.
    COMMAND_SECONDS = 60.0

    def __init__(self, server, command):
        self.server = server
        self.command = command
        self.worker = Worker(server.loop)
        self.waiting = 0

    def tell(self, name, peer_id, text):
        """Queue an event: {"event", "time", "id", "text"}."""
        if self.waiting >= self.MAX_WAITING:
            if self.server.may_log("event-lost"):
                self.server.log.warn(f"event-lost: {name} {peer_id!a}: the command of "
                                     "--on-event is too slow")
            return
        line = json.dumps({"event": name, "time": int(time.time()), "id": peer_id,
                           "text": text}) + "\n"
        self.waiting += 1
        self.worker.run(lambda: self.run(line), self.on_done)

    def run(self, line):
        """In the thread: the command, and why it failed, if it did."""
        import subprocess  # only here: most servers need none

        with subprocess.Popen(
                self.command, shell=True, stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                start_new_session=True) as process:
            try:
                complaint = process.communicate(line.encode(), self.COMMAND_SECONDS)[1]
            except subprocess.TimeoutExpired:
                kill_session(process)
                return f"not done in {self.COMMAND_SECONDS:.0f} s"
        complaint = ascii(complaint[-200:].decode("utf-8", "replace").strip())[1:-1]
        return process.returncode and f"status {process.returncode}: {complaint}"

    def on_done(self, result):
        """The command has ended, well or not."""
        self.waiting -= 1
        if result and self.server.may_log("event-failed"):
            self.server.log.warn(f"event-failed: the command of --on-event: {result}")


def kill_session(process):
    """End a command of the shell, and what it has started."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


class StatusService:
    """What the operator sees of the running server: a page, JSON, metrics."""

    #: Pages, scripts and pictures of elsewhere have no business here, nor has
    #: this page inside of another.
    FIELDS = ("Cache-Control: no-store", "Referrer-Policy: no-referrer",
              "X-Content-Type-Options: nosniff", "X-Frame-Options: DENY",
              "Cross-Origin-Resource-Policy: same-origin",
              f"Content-Security-Policy: {PAGE_POLICY}")

    def __init__(self, server):
        self.server = server
        self.started = server.loop.now
        self.minutes = collections.deque(maxlen=60)  # (bytes, counters) at their ends
        self.minutes.append((0, {}))

    def note_minute(self):
        """Once a minute: remember what has been carried and counted."""
        relay = self.server.relay
        self.minutes.append((relay.total_carried() if relay else 0,
                             dict(self.server.attempts.counters)))

    def respond(self, request):
        """The response to a request on the status listener."""
        if request.method not in ("GET", "HEAD"):
            return http_response("405 Method Not Allowed", "", "Allow: GET")
        path, _, query = request.path.partition("?")
        if not self.is_admitted(request, query):
            return http_response("401 Unauthorized", "see --status-token",
                                 "WWW-Authenticate: Bearer", *self.FIELDS)
        if not self.server.config.status_token and not is_own_host(request):
            return http_response("403 Forbidden", "ask by address", *self.FIELDS)
        answer = {"/": self.page, "/metrics": self.metrics,
                  "/status.json": self.as_json}.get(path)
        if answer is None:
            return http_response("404 Not Found", "", *self.FIELDS)
        return answer()

    def is_admitted(self, request, query):
        """Whether who asks has shown the token, where there is one."""
        token = self.server.config.status_token.encode()
        shown = dict(part.partition("=")[::2] for part in query.split("&"))
        bearer = request.headers.get("authorization", "").partition(" ")[2]
        return not token or any(
            hmac.compare_digest(text, token)
            for text in (unquote(shown.get("token", "")), bearer.encode()))

    def page(self):
        """For a person."""
        return http_response("200 OK", status_page(self.snapshot()), *self.FIELDS,
                             kind="text/html")

    def metrics(self):
        """For Prometheus."""
        return http_response("200 OK", metrics_text(self.snapshot()), *self.FIELDS,
                             kind="text/plain; version=0.0.4")

    def as_json(self):
        """For programs."""
        return http_response("200 OK", json.dumps(self.snapshot()), *self.FIELDS,
                             kind="application/json")

    def snapshot(self):
        """All that is told, as one dictionary."""
        server, wall = self.server, int(time.time())
        counters = server.attempts.counters
        hour = {word: count - self.minutes[0][1].get(word, 0)
                for word, count in counters.items()}
        hour = {word: count for word, count in sorted(hour.items()) if count}
        carried = [size for size, _ in self.minutes]
        limits = {refusal.value for refusal in LIMIT_REFUSALS}
        return {
            "version": VERSION, "health": server.health(), "time": wall,
            "uptime_seconds": round(server.loop.now - self.started),
            "connections": len(server.crowd.links), "outcomes": dict(counters),
            "hour": hour, "limits_hit": {w: n for w, n in hour.items() if w in limits},
            "traffic": [after - before for before, after in zip(carried, carried[1:])],
            "setup": self.setup(), "warnings": server.standing_warnings(),
            **self.peers(wall), **self.sessions()}

    def setup(self):
        """What clients of this network are set up with, or None."""
        server = self.server
        key = server.rendezvous.key.public_text if server.rendezvous else ""
        host = host_for_clients(server.config.bind)
        if not key or not host:
            return None
        told = client_config(host, server.ports.datagrams.address.port, "", key)
        return {"host": told["host"], "key": key, "string": told["config"],
                "qr": told["qr"]}

    def peers(self, wall):
        """Who is known, those online first."""
        rendezvous, now = self.server.rendezvous, self.server.loop.now
        if rendezvous is None:
            return {"peers_known": 0, "peers_online": 0, "peers": [], "relays": []}
        online = sum(registration.is_online(now)
                     for registration in rendezvous.registrations.values())
        facts = itertools.islice(all_peer_facts(rendezvous, now, wall), SHOWN_PEERS)
        return {"peers_known": len(rendezvous.store.peers), "peers_online": online,
                "peers": list(facts), "relays": relay_facts(rendezvous.relays)}

    def sessions(self):
        """What is relayed now, and was."""
        relay, now = self.server.relay, self.server.loop.now
        sessions = relay.sessions.values() if relay is not None else ()
        shown = itertools.islice(sessions, SHOWN_SESSIONS)
        return {"relayed_bytes": relay.total_carried() if relay is not None else 0,
                "sessions_open": len(sessions),
                "bits_per_second": round(1000 * sum(one.rate for one in sessions)),
                "sessions": [session_facts(session, now) for session in shown]}


def unquote(text):
    """The bytes that a part of a query means, with their %XX in place; a % that
    begins none stands for itself."""
    return re.sub(b"%([0-9A-Fa-f]{2})", lambda found: bytes.fromhex(found[1].decode()),
                  text.encode())


#: Peers and sessions that the status shows; the commands show all.
SHOWN_PEERS, SHOWN_SESSIONS = 2000, 2000


def is_own_host(request):
    """Whether a request names an address or this machine, and not a name that
    somebody's page was made to mean us by (DNS rebinding)."""
    host = split_host(request.headers.get("host", ""))[0].lower()
    try:
        return host == "localhost" or bool(ipaddress.ip_address(host))
    except ValueError:
        return False


class RelayWatch:
    """The relays of the list: whether they answer, and the connections that
    tell them of sessions."""

    def __init__(self, server):
        self.server = server
        self.log, self.loop = server.log, server.loop
        self.resolver = None  # looks names up, which takes long
        self.silent = set()
        self.announcers = {}  # name of a relay -> Announcer

    @property
    def names(self):
        """The relays that clients are sent to."""
        return self.server.rendezvous.relays.names

    def warn(self):
        """Say so where an ID server alone leaves its relays without
        tickets."""
        config, secret = self.server.config, self.server.ticket_secret
        if self.server.role != "hbbs":
            return
        if config.relay_servers and not secret:
            self.server.warn("the relays of --relay-servers carry anybody's sessions, "
                             "as far as this server knows: --relay-secret here and "
                             "there ends that")
        if secret and not config.relay_servers:
            self.server.warn("--relay-secret is given, but --relay-servers names no "
                             "relay that could be told of sessions; a relay with the "
                             "same secret will refuse them")

    def need_resolver(self):
        """Have a thread that looks names up."""
        if self.resolver is None:
            self.resolver = Worker(self.loop)

    def announce(self):
        """Have a connection to every relay of the list that asks for
        tickets."""
        names = self.names if self.server.ticket_secret else ()
        for name in set(self.announcers) - set(names):
            self.announcers.pop(name).close()
        key = self.server.rendezvous.key
        keys = (key.required, *key.accepted)
        for name in names:
            self.need_resolver()
            if name not in self.announcers:
                self.announcers[name] = Announcer(self, name, keys)
                self.announcers[name].again()
            self.announcers[name].keys = keys

    def troubles(self):
        """Which relays get no tickets, and why."""
        return [announcer.complaint for announcer in self.announcers.values()
                if announcer.trouble]

    def tell(self, ticket):
        """Tell every relay of a session."""
        for announcer in self.announcers.values():
            announcer.announce(ticket)

    def check(self):
        """Try the relays of a list of two or more."""
        if len(self.names) < 2:
            self.loop.later(RELAY_CHECK_SECONDS, self.check)
            return
        self.need_resolver()
        names = self.names
        self.resolver.run(lambda: resolve_relays(names),
                          lambda targets: self.on_resolved(names, targets))

    def on_resolved(self, names, targets):
        """Names have become addresses: connect to them."""
        failed = isinstance(targets, Exception)
        RelayCheck(self.loop, () if failed else targets,
                   lambda healthy: self.on_health(names, healthy))

    def on_health(self, names, healthy):
        """Relays have answered or not: say what changed, and try again in a
        while."""
        self.loop.later(RELAY_CHECK_SECONDS, self.check)
        if names != self.names:
            return  # the list is another one by now
        silent, self.silent = self.silent, set(names) - healthy
        self.server.rendezvous.relays.on_health(healthy)
        for name in sorted(self.silent - silent):
            self.log.warn(f"relay {name} does not answer")
        for name in sorted(silent & healthy):
            self.log.info(f"relay {name} answers again")

    def close(self):
        """End the connections to the relays."""
        for announcer in self.announcers.values():
            announcer.close()


class StoreKeeper:
    """Keeps the peer store on the disk: records before the answers that promise
    them, and in spare moments what may wait."""

    def __init__(self, server, store):
        self.server = server
        self.log, self.loop = server.log, server.loop
        self.store = store
        self.pending = []  # `Store` actions of this turn
        self.syncing = False
        self.refused = False  # the disk did not take what it was given last
        self.compact_after = 0.0  # not before, since it failed
        self.unsaved = []  # peer ids whose last-seen time is looked at next
        self.untidied = iter(())  # peer ids that are looked through next

    def open(self):
        """Open the store for writing, and say what was found in it."""
        store = self.store
        if store.torn:
            self.log.warn(f"{store.path}: the last line was not finished and is moved "
                          f"to {store.path}.bad: {store.torn[:80]!a}")
        for number, why, _ in store.bad_lines[:5]:
            self.log.warn(f"{store.path} line {number} is passed over and kept in "
                          f"{store.path}.bad: {why}")
        if len(store.bad_lines) > 5:
            self.log.warn(f"{store.path}: {len(store.bad_lines)} bad lines in all")
        try:
            store.open()
        except OSError as error:
            self.log.error(f"cannot write {store.path}: {error.strerror}; known peers "
                           "are served, new ones are refused until it can be written")
        self.log.info(f"{len(store.peers)} peers known")

    def write(self):
        """Append the records that have come in this turn, then go on as each
        action says, which may bring more."""
        while self.pending:
            actions, self.pending = self.pending, []
            self.write_down(actions)

    def write_down(self, actions):
        """Append records, then go on as their actions say."""
        wall = int(time.time())
        for action in actions:
            if not action.peer.created:
                action.peer.created = action.peer.seen = wall
        try:
            self.append([(action.peer, action.replaces) for action in actions])
        except OSError as error:
            if self.server.may_log("disk"):
                self.log.error(f"cannot write {self.store.path}: {error.strerror}; new "
                               "peers are refused until the disk takes them")
            answers = [action.otherwise for action in actions]
        else:
            answers = [action.then for action in actions]
        for answer in answers:
            self.loop.attempt(lambda: self.server.perform(answer(self.loop.now)))

    def append(self, records):
        """Append records; OSError if the disk does not take them, which is
        remembered until it takes something."""
        self.refused = True
        self.store.append(records)
        self.refused = False

    def try_again(self):
        """Whether the disk takes something by now, though nobody has come."""
        with contextlib.suppress(OSError):
            self.store.try_disk()
            self.refused = False

    def tend(self):
        """Let appended records reach the disk, and write the file anew when it
        pays."""
        store = self.store
        if store.unsynced and not self.syncing:
            self.syncing = True
            self.server.worker.run(store.sync, self.on_synced)
        if self.server.ticks % 10 == 0:
            self.check_file()
            if self.refused:
                self.try_again()
        if store.descriptor is None:
            self.reopen()
        elif store.needs_compaction() and self.loop.now >= self.compact_after:
            self.begin_compaction()

    def save_some_seen(self):
        """Second by second some of the peers: when they were seen last, to the
        hour.

        A peer that stays costs the disk a line an hour, a peer that is gone
        nothing.
        """
        if not self.unsaved:
            self.unsaved = list(self.server.rendezvous.registrations)
        part, self.unsaved = self.unsaved[:SEEN_SLICE], self.unsaved[SEEN_SLICE:]
        self.save_seen(part)

    def tidy_some(self):
        """Second by second, once in an hour, some of the peers: are they to be
        kept?"""
        if self.server.ticks and self.server.ticks % TIDY_SECONDS == 0:
            self.untidied = iter(list(self.store.peers))
        part = list(itertools.islice(self.untidied, TIDY_SLICE))
        if part:
            self.server.perform(self.server.rendezvous.tidy(part, int(time.time())))

    def save_seen(self, peer_ids):
        """Store when peers were seen last, an hour or more after what is
        stored."""
        wall, now, before = int(time.time()), self.loop.now, {}
        for peer_id in peer_ids:
            peer = self.store.peers.get(peer_id)
            registration = self.server.rendezvous.registrations.get(peer_id)
            if peer is None or registration is None:
                continue
            seen = wall - int(now - registration.seen)
            if abs(seen - peer.seen) >= SEEN_SECONDS:
                before[peer], peer.seen = peer.seen, seen
            if now - registration.seen > FORGET_ROUTE_SECONDS:
                self.server.rendezvous.end_route(peer_id)
        try:
            if before:
                self.append([(peer, None) for peer in before])
        except OSError:  # it is tried again; who waits for a record is told
            for peer, seen in before.items():
                peer.seen = seen

    def check_file(self):
        """Somebody has replaced, removed or emptied the file: ours must be
        there again."""
        store = self.store
        if store.compaction is None and store.is_lost():
            self.log.error(f"{store.path} was removed, replaced or cut under the "
                           "running server: it is written anew with what is known "
                           "here.  Stop the server before you change it")
            self.begin_compaction()

    def on_synced(self, result):
        """The disk has it, or cannot take it."""
        self.syncing = False
        if isinstance(result, Exception):
            self.log.error(f"cannot sync {self.store.path}: {result}")

    def reopen(self):
        """The store could not be opened: try again, quietly."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        try:
            os.close(os.open(self.store.path, flags, 0o600))  # or reading it is in vain
            self.store.load()  # it may have come from elsewhere meanwhile
            self.store.open()
            self.log.info(f"{self.store.path} can be written again")
        except OSError:
            pass  # said at the start, and new peers are told

    def begin_compaction(self):
        """Write the store anew, in slices between the turns."""
        compaction = Compaction(self.store)
        try:
            compaction.begin()
        except OSError as error:
            self.give_up_compaction(compaction, error)
            return
        self.loop.later(0.0, lambda: self.go_on_compacting(compaction))

    def go_on_compacting(self, compaction):
        """The next slice; after the last the worker syncs it."""
        if self.store.compaction is not compaction:
            return
        try:
            complete = compaction.step()
        except OSError as error:
            self.give_up_compaction(compaction, error)
            return
        if complete:
            self.server.worker.run(compaction.sync,
                            lambda result: self.end_compaction(compaction, result))
        else:
            self.loop.later(0.0, lambda: self.go_on_compacting(compaction))

    def end_compaction(self, compaction, result):
        """The new file is on the disk: let it replace the old one."""
        if self.store.compaction is not compaction:
            return
        try:
            if isinstance(result, Exception):
                raise result
            old = compaction.finish()
        except OSError as error:
            self.give_up_compaction(compaction, error)
            return
        path = self.store.path
        self.server.worker.run(
            lambda: (os.close(old), sync_directory(path)), self.on_synced)

    def give_up_compaction(self, compaction, error):
        """The disk does not take a new file: the old one stays in force."""
        compaction.abandon()
        self.compact_after = self.loop.now + COMPACT_AGAIN_SECONDS
        self.log.error(f"cannot write {self.store.path} anew: {error.strerror}")

    def close(self):
        """Let the disk have everything; here, since the worker may be at
        something."""
        if self.store.compaction is not None:
            self.store.compaction.abandon()
        try:
            self.store.sync()
        except OSError as error:
            self.on_synced(error)
        self.store.close()


class Supervisor:
    """systemd's side of us (sd_notify(3)), where there is one."""

    #: How often the status line is renewed.
    STATUS_SECONDS = 10.0

    def __init__(self, environment):
        self.path = environment.get("NOTIFY_SOCKET", "")
        if self.path.startswith("@"):
            self.path = "\0" + self.path[1:]
        microseconds = environment.get("WATCHDOG_USEC", "")
        # Twice within the time that the watchdog allows.
        self.pause = int(microseconds) / 2e6 if microseconds.isdigit() else None
        self.beaten = self.told = 0.0

    def notify(self, *lines):
        """Tell the supervisor something; without one nothing happens."""
        if self.path:
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                    sock.settimeout(0.5)  # whoever listens may have stopped reading
                    sock.sendto("\n".join(lines).encode("utf-8"), self.path)
            except OSError:
                pass  # it will notice by itself

    def beat(self, now, status):
        """Once a second: the watchdog's sign of life, now and then the
        status."""
        if self.pause is not None and now - self.beaten >= min(self.pause, 60.0) - 1.0:
            self.beaten = now
            self.notify("WATCHDOG=1")
        if self.path and now - self.told >= self.STATUS_SECONDS:
            self.told = now
            self.notify(f"STATUS={status()}")


def wait_for_key_file(directory):
    """Let an ID server that is starting beside this relay make the key
    first."""
    if not os.path.exists(os.path.join(directory, KEY_FILE)):
        time.sleep(0.3)


def prepare(sock, kind, dual):
    """Options that a listening socket needs, and accepted ones inherit.

    Never SO_REUSEPORT: two servers, or a client's own listener, would silently
    share the port.
    """
    sock.setblocking(False)
    if dual:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    if kind == socket.SOCK_STREAM:
        if os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def bind_failure(kind, ip, port, error, flag):
    """What an operator needs to know when a port cannot be had, and the flag
    that changes it."""
    name = "tcp" if kind == socket.SOCK_STREAM else "udp"
    where = f"{name} {Address(ip or '0.0.0.0', port)}"
    if error.errno == errno.EADDRINUSE:
        return (f"cannot listen on {where}: in use by {port_holder(name, port)}; stop "
                f"that program, or choose another port with {flag}")
    if error.errno == errno.EACCES:
        return (f"cannot listen on {where}: only root may use ports below 1024; choose "
                f"another port with {flag}")
    if error.errno == errno.EADDRNOTAVAIL:
        return (f"cannot listen on {where}: this machine has no such address (see "
                f"{'-b' if flag == '-p' else flag})")
    return f"cannot listen on {where}: {error.strerror}"


def port_holder(kind, port):
    """Who holds a port, as far as /proc tells: "pid 812 (hbbs)"."""
    # TCP: listening sockets only (state 0A).
    inodes = {row[9] for row in socket_rows(kind, port)
              if kind == "udp" or row[3] == "0A"}
    for pid in filter(str.isdigit, os.listdir("/proc") if inodes else []):
        if holds_inode(pid, inodes):
            return f"pid {pid} ({command_of(pid)})"
    return "another program"


def socket_rows(kind, port):
    """What /proc tells of the sockets of a port, "tcp" or "udp": rows of words."""
    found = []
    for name in f"/proc/net/{kind}", f"/proc/net/{kind}6":
        try:
            with open(name, encoding="ascii") as file:
                rows = [line.split() for line in file][1:]
        except OSError:
            continue
        found += [row for row in rows if row[1].endswith(f":{port:04X}")]
    return found


def command_of(pid):
    """What a process is called, if it is still there."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "it has just ended"


def holds_inode(pid, inodes):
    """Whether a process has one of these sockets open."""
    try:
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            target = os.readlink(f"/proc/{pid}/fd/{descriptor}")
            if target.startswith("socket:[") and target[8:-1] in inodes:
                return True
    except OSError:
        pass  # not ours to see, or gone meanwhile
    return False


# == 19. Maintenance ===========================================================
#
# What is done to a state directory while no server runs in it: looking,
# backing up, restoring, moving in from the official server and out again.
# Files are replaced in one step or not at all; a key is never written over.
#
# Uses: Constants, Refusals, Frames and addresses, Keys, Configuration, Peer
# store, Connections, Server.

#: The first line of a backup, and the files that it holds when they are there.
BACKUP_TITLE = "rustdesk_server backup 1"
BACKUP_FILES = (KEY_FILE, PUBLIC_KEY_FILE, STORE_FILE, ".env", CHANGES_FILE,
                SLOWED_FILE, REFUSED_FILE)
COPY_BYTES = 1024 * 1024
#: What is taken over from an official server's directory.
OFFICIAL_FILES = KEY_FILE, OFFICIAL_STORE_FILE, SLOWED_FILE, REFUSED_FILE
#: Rows taken over at a time.
IMPORT_SLICE = 1000

OFFICIAL_SCHEMA = """
CREATE TABLE peer (
    guid BLOB PRIMARY KEY NOT NULL,
    id VARCHAR(100) NOT NULL,
    uuid BLOB NOT NULL,
    pk BLOB NOT NULL,
    created_at DATETIME NOT NULL DEFAULT(current_timestamp),
    user BLOB,
    status TINYINT,
    note VARCHAR(300),
    info TEXT NOT NULL
) WITHOUT ROWID;
CREATE UNIQUE INDEX index_peer_id ON peer (id);
CREATE INDEX index_peer_user ON peer (user);
CREATE INDEX index_peer_created_at ON peer (created_at);
CREATE INDEX index_peer_status ON peer (status);
"""


def open_store(path):
    """The loaded store of a file, open for writing."""
    store = PeerStore(path)
    try:
        store.load()
        store.open()
    except OSError as error:
        text = f"cannot write {store.path}: {error.strerror}"
        raise Trouble(text) from None
    return store


# -- the official server's data ------------------------------------------------


@contextlib.contextmanager
def open_database(path, mode):
    """A connection to a database of the official server; Trouble if
    its statements fail, or if there is no sqlite3 here."""
    try:
        import sqlite3  # only here: small systems lack it
    except ImportError:
        raise Trouble(
            "Python's sqlite3 module is not installed here, so the official database "
            "cannot be used (OpenWrt: opkg install python3-sqlite3)") from None
    # In such an address these three characters have a meaning of their own.
    name = path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    connection = None
    try:
        connection = sqlite3.connect(f"file:{name}?mode={mode}", uri=True)
        connection.text_factory = text_or_bytes
        yield connection
    except sqlite3.Error as error:
        text = f"the database {path} cannot be used: {error}"
        raise Trouble(text) from None
    finally:
        if connection is not None:
            connection.close()


def text_or_bytes(data):
    """A text of the database; bytes if it is none, so that one bad row stops
    nothing."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


def import_database(path, store):
    """Take the peers of the official database over; returns a sentence about
    it.

    Peers that are known here stay as they are, so it may be done again.
    """
    counts, batch = collections.Counter(), []
    mode = "ro&immutable=1" if is_resting(path) else "ro"
    with open_database(path, mode) as connection:
        query = "SELECT id, uuid, pk, created_at, info FROM peer ORDER BY id"
        for row in connection.execute(query):
            peer, why = peer_from_row(row, store)
            counts[why or "imported"] += 1
            if peer is not None:
                batch.append((peer, None))
            if len(batch) >= IMPORT_SLICE:
                store.append(batch)
                batch = []
    store.append(batch)
    store.sync()
    said = [f"{count} {word}" for word, count in sorted(counts.items())]
    return ", ".join(said) or "it is empty"


def is_resting(path):
    """Whether a database has a write-ahead log by its header, but none beside
    it: nobody writes to it.

    To read it as any other SQLite makes that log, which the official server
    may then not open: it is another user's.
    """
    path = os.path.realpath(path)
    if any(os.path.exists(path + end) for end in ("-wal", "-journal")):
        return False
    try:
        with open(path, "rb") as file:
            return file.read(20)[18:] == b"\2\2"
    except OSError:
        return False  # the database will say why


def peer_from_row(row, store):
    """(peer, "") of a row of the official table, or (None, why not)."""
    peer_id, device_uuid, public_key, created, info = row
    if not isinstance(public_key, bytes) or len(public_key) != PUBLIC_KEY_BYTES:
        return None, "skipped for a key that is not 32 bytes"
    if not isinstance(device_uuid, bytes) or not device_uuid:
        return None, "skipped for a missing device uuid"
    if not isinstance(peer_id, str) or not is_usable_id(peer_id):
        return None, "skipped for an unusable id"
    known = store.peers.get(peer_id)
    if known is not None:
        same = (known.device_uuid, known.public_key) == (device_uuid, public_key)
        return None, "known already" if same else "skipped for another device here"
    return Peer(peer_id, device_uuid, public_key, ip_of_info(info),
                seconds_of_utc(created)), ""


def ip_of_info(info):
    """The IP address in the JSON of the official `info` column, or ""."""
    try:
        return parse_ip(json.loads(info)["ip"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""


def seconds_of_utc(text):
    """Seconds since 1970 of "2026-01-31 23:59:59", or 0; also if the store
    would not take such a time."""
    match = re.match(r"(\d{4})-(\d\d)-(\d\d)[ T](\d\d):(\d\d):(\d\d)", str(text))
    if match is None:
        return 0
    year, month, day, hour, minute, second = map(int, match.groups())
    # Days of the Gregorian calendar, with March as the first month of a year.
    year, month = (year, month - 3) if month > 2 else (year - 1, month + 9)
    days = 365 * year + year // 4 - year // 100 + year // 400
    days += (153 * month + 2) // 5 + day
    seconds = (days - 719469) * 86400 + hour * 3600 + minute * 60 + second
    return seconds if 0 <= seconds < LATEST_TIME else 0


def import_directory(source, directory):
    """Take over key, peers and lists of an official server; sentences about
    it."""
    if not any(os.path.lexists(os.path.join(source, name)) for name in OFFICIAL_FILES):
        raise Trouble(f"nothing of an official server is in {source}: name the "
                      f"directory that holds its {KEY_FILE} and {OFFICIAL_STORE_FILE}")
    said = [import_key(source, directory)]
    for name in SLOWED_FILE, REFUSED_FILE:
        said.append(copy_if_missing(os.path.join(source, name),
                                    os.path.join(directory, name)))
    database = os.path.join(source, OFFICIAL_STORE_FILE)
    if os.path.exists(database):
        said.append(import_peers(database, os.path.join(directory, STORE_FILE)))
    return [sentence for sentence in said if sentence]


def import_peers(database, path):
    """Take the peers of an official database over into a store's file; a
    sentence about it."""
    store = open_store(path)
    try:
        return f"{database}: {import_database(database, store)}"
    except OSError as error:
        text = f"cannot write {store.path}: {error.strerror}"
        raise Trouble(text) from None
    finally:
        store.close()


def import_key(source, directory):
    """Take over a key pair unless there is one; a sentence about it."""
    secret, ours = read_key_file(source), read_key_file(directory)
    if secret is None or secret == ours:
        return f"{source}: no key" if secret is None else "the key is here already"
    if ours is not None:
        raise Trouble(
            f"{directory} has another key than {source}: clients trust one of them.  "
            f"To take that one, move {KEY_FILE} and {PUBLIC_KEY_FILE} away first")
    copy_if_missing(os.path.join(source, KEY_FILE), os.path.join(directory, KEY_FILE))
    check_public_file(directory, secret)
    return f"key {encode_base64(secret[32:])}"


def copy_if_missing(source, target):
    """Copy a small file whole unless its target exists; a sentence about it,
    or ""."""
    if os.path.exists(source) and not os.path.exists(target):
        with open(source, "rb") as file:
            mode = 0o644 if target.endswith((".txt", ".pub")) else 0o600
            write_new_file(target, file.read(), mode)
        return f"{os.path.basename(source)} copied"
    return ""


def export_official(directory, target):
    """Write key, peers and lists as the official server keeps them;
    sentences."""
    database = os.path.join(target, OFFICIAL_STORE_FILE)
    if os.path.exists(database):
        raise Trouble(f"{database} exists and was left alone; name an empty "
                      "directory")
    if os.path.exists(target) and not os.path.isdir(target):
        raise Trouble(f"{target} is a file: name an empty directory")
    theirs = read_key_file(target)
    if theirs is not None and theirs != read_key_file(directory):
        raise Trouble(f"{target} has another key: name an empty directory")
    if not any(os.path.exists(os.path.join(directory, name))
               for name in (KEY_FILE, STORE_FILE)):
        raise nothing_here(directory)
    store = PeerStore(os.path.join(directory, STORE_FILE))
    store.load()
    os.makedirs(target, mode=0o700, exist_ok=True)
    temporary = temporary_name(database)
    try:
        fill_database(temporary, store.peers.values())
        os.replace(temporary, database)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    said = [copy_if_missing(os.path.join(directory, name), os.path.join(target, name))
            for name in (KEY_FILE, PUBLIC_KEY_FILE, SLOWED_FILE, REFUSED_FILE)]
    return [sentence for sentence in said if sentence] + [f"{len(store.peers)} peers"]


def fill_database(path, peers):
    """Make a database of the official server's that holds these peers."""
    with open_database(path, "rwc") as connection:
        connection.executescript(OFFICIAL_SCHEMA)
        connection.executemany(
            "INSERT INTO peer (guid, id, uuid, pk, created_at, info) VALUES "
            "(?, ?, ?, ?, datetime(?, 'unixepoch'), ?)", map(official_row, peers))
        connection.commit()


def official_row(peer):
    """A peer as a row of the official table: guid, id, uuid, pk, created_at,
    info."""
    info = json.dumps({"ip": official_ip(peer.ip)}, separators=(",", ":"))
    return (os.urandom(16), peer.peer_id, peer.device_uuid, peer.public_key,
            peer.created, info)


def official_ip(ip):
    """An address as the official server writes it: IPv4 in IPv6 dress."""
    return f"::ffff:{ip}" if ip and ":" not in ip else ip


# -- backup and restore --------------------------------------------------------


def back_up(directory, path, with_key):
    """Write key, store and configuration into one new file, mode 0600; what it
    holds.

    A title, then for each file its name, its size and its content; at the end
    the SHA-256 of all before.
    """
    path = os.path.realpath(path)  # a link, to another disk perhaps, stays one
    left_out = () if with_key else (KEY_FILE, PUBLIC_KEY_FILE)
    names = [name for name in BACKUP_FILES if name not in left_out
             and os.path.exists(os.path.join(directory, name))]
    check_backup_place(directory, path, names)
    digest = hashlib.sha256()
    with new_file(temporary_name(path), 0o600, path) as file:
        put = writer_into(file, digest)
        put(f"{BACKUP_TITLE}\n".encode())
        for name in names:
            put_file(os.path.join(directory, name), name, put)
        file.write(f"sha256 {digest.hexdigest()}\n".encode())
    return names


def check_backup_place(directory, path, names):
    """Trouble rather than a backup of nothing, or one over a file
    that is none."""
    if not names:
        raise nothing_here(directory)
    if os.path.exists(path) and not is_former_backup(path):
        raise Trouble(f"{path} exists, is no backup and was left alone: name another "
                      "file")


def is_former_backup(path):
    """Whether a backup, or an empty file, is there; a device such as /dev/null is
    neither, and replaced by a file it would be gone."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.readline(100).strip() in (b"", BACKUP_TITLE.encode())


def nothing_here(directory):
    """The Trouble of who is in another directory than he thinks."""
    return Trouble(f"nothing of a server is in {os.path.abspath(directory)}: run this "
                   "in its directory")


def writer_into(file, digest):
    """A function that writes bytes to a file and to a digest."""
    def put(data):
        file.write(data)
        digest.update(data)

    return put


def pieces(file, size, path):
    """`size` bytes of an open file, piece by piece; Trouble if it has
    fewer."""
    while size:
        data = file.read(min(size, COPY_BYTES))
        if not data:
            raise Trouble(f"{path} is cut short, damaged, or was written "
                          "meanwhile: try again")
        size -= len(data)
        yield data


def put_file(path, name, put):
    """A file's part of a backup: as much as it holds now, though it may
    grow."""
    with open(path, "rb") as source:
        size = os.fstat(source.fileno()).st_size
        put(f"file {name} {size}\n".encode())
        for data in pieces(source, size, path):
            put(data)
        put(b"\n")


def read_backup(path):
    """{name: (offset, size)} of a backup's files; Trouble if
    damaged."""
    files, digest, whole = {}, hashlib.sha256(), os.path.getsize(path)
    with open(path, "rb") as file:
        line = file.readline(1000)
        if line.strip() != BACKUP_TITLE.encode():
            raise Trouble(what_else_it_is(path, line))
        while line and not line.startswith(b"sha256 "):
            digest.update(line)
            words = line.split()
            if len(words) == 3 and words[0] == b"file" and words[2].isdigit():
                size = int(words[2])
                if size > whole - file.tell():
                    raise Trouble(f"{path} is damaged: it is cut short")
                files[words[1].decode("ascii", "replace")] = file.tell(), size
                for data in pieces(file, size, path):
                    digest.update(data)
                digest.update(file.readline(1))
            line = file.readline(1000)
    if line.split()[1:] != [digest.hexdigest().encode()]:
        raise Trouble(f"{path} is damaged: its check sum is wrong")
    return files


def what_else_it_is(path, line):
    """A sentence about a file that is no backup of ours, by its first line."""
    words = BACKUP_TITLE.encode().split()[:-1]
    if line.split()[:-1] == words and line.split()[-1].isdigit():
        return (f"{path} is a backup of a newer version of this program: restore it "
                "with that one")
    return f"{path} is no backup of this program"


def restore(directory, path, replace_key):
    """Bring the files of a backup back; what was there is kept as
    NAME.previous.

    Returns the names, and a sentence about what has become of others.  Refuses
    to put another key in the place of ours.  All are written before one is put
    in its place, since the disk may be full.
    """
    files = read_backup(path)
    check_restored_key(directory, path, files, replace_key)
    names, written = [name for name in BACKUP_FILES if name in files], []
    try:
        for name in names:
            target = os.path.join(directory, name)
            written.append((temporary_name(target), target))
            unpack(path, files[name], *written[-1])
        kept = [bring_back(temporary, target) for temporary, target in written]
    finally:
        for temporary, _ in written:
            if os.path.exists(temporary):
                os.unlink(temporary)
    sync_directory(os.path.join(directory, KEY_FILE))
    kept = [os.path.basename(previous) for previous in kept if previous]
    if kept:
        names.append(f"what was there is kept as {', '.join(kept)}")
    if not os.path.exists(os.path.join(directory, KEY_FILE)):
        names.append(f"the backup has no key: put {KEY_FILE} here before the start, or "
                     "clients will not trust this server")
    return names


def check_restored_key(directory, path, files, replace_key):
    """Trouble if a backup holds another key than the directory."""
    if replace_key or KEY_FILE not in files:
        return
    ours = read_key_file(directory)
    if ours is None:
        return
    with open(path, "rb") as file:
        file.seek(files[KEY_FILE][0])
        theirs = file.read(files[KEY_FILE][1]).strip()
    if theirs != encode_base64(ours).encode():
        raise Trouble(
            f"{path} holds another key than {os.path.abspath(directory)}; nothing was "
            "restored.  With --replace-key it takes its place, and ours is kept as "
            f"{KEY_FILE}.previous; clients then need the restored key")


def unpack(path, place, temporary, target):
    """Write one file of a backup beside its place."""
    mode = 0o644 if target.endswith((".pub", ".txt")) else 0o600
    offset, size = place
    with open(path, "rb") as backup, new_file(temporary, mode) as file:
        backup.seek(offset)
        file.writelines(pieces(backup, size, path))


def bring_back(temporary, target):
    """Put a file in its place in one step; what was there keeps a second name,
    which is returned, "" without."""
    if has_same_content(target, temporary):  # else ours would lose its second name
        return ""
    previous = keep_previous(target) if os.path.exists(target) else ""
    os.replace(temporary, target)
    return previous


def has_same_content(one, two):
    """Whether two files are the same byte for byte; a missing one is not."""
    try:
        with open(one, "rb") as first, open(two, "rb") as second:
            return os.path.getsize(one) == os.path.getsize(two) and all(
                data == second.read(COPY_BYTES)
                for data in iter(lambda: first.read(COPY_BYTES), b""))
    except FileNotFoundError:
        return False


def keep_previous(path):
    """Give a file that is about to be replaced a second name; returns it.

    A name that a former key has is not taken from it.
    """
    previous, number = path + ".previous", 1
    while os.path.basename(path) == KEY_FILE and os.path.exists(previous):
        if has_same_content(path, previous):
            return previous
        number += 1
        previous = f"{path}.previous{number}"
    if os.path.exists(previous):
        os.unlink(previous)
    try:
        os.link(path, previous)
    except OSError:  # no hard links here
        os.replace(path, previous)
    return previous


def rotate_key(directory, random_bytes):
    """A new key pair in the place of ours, which is kept aside; sentences
    about it."""
    secret = read_key_file(directory)
    if secret is None:
        raise Trouble(f"{directory} has no {KEY_FILE} to replace: the first "
                      "start makes one")
    new, old = generate_secret(random_bytes), encode_base64(secret[32:])
    aside = hashlib.sha256(secret[32:]).hexdigest()[:8]
    for name in KEY_FILE, PUBLIC_KEY_FILE:
        path = os.path.join(directory, name)
        if os.path.exists(path):
            copy_if_missing(path, f"{path}.{aside}")
    write_in_place(os.path.join(directory, KEY_FILE), encode_base64(new))
    write_in_place(os.path.join(directory, PUBLIC_KEY_FILE), encode_base64(new[32:]))
    os.chmod(os.path.join(directory, PUBLIC_KEY_FILE), 0o644)
    sync_directory(os.path.join(directory, KEY_FILE))
    return [f"the new key is {encode_base64(new[32:])}; clients need it once the "
            "server has been started again",
            f"the old pair is kept as {KEY_FILE}.{aside}",
            "until all clients have the new key, the setting",
            f"  accept-key = {old}",
            "lets those with the old one in, whose sessions are then unencrypted; who "
            "has to be kept out, has it too"]


# -- looking -------------------------------------------------------------------


def describe(config, role, directory):
    """What a start would do, as {topic: sentence}, and what is wrong with it.

    Nothing is made or written.
    """
    facts, faults = {}, []
    for is_relay, name in (False, "hbbs"), (True, "hbbr"):
        if role in (name, "both"):
            try:
                facts[f"{name} key"] = describe_key(config, is_relay, directory)
            except Trouble as trouble:
                faults.append(str(trouble))
    checks = [lambda: look_for_places(config), lambda: look_at_ports(config, role),
              lambda: check_status_token(config),
              lambda: check_ticket_secret(
                  config, role, read_ticket_secret(config.relay_secret))]
    if role != "hbbr":
        checks.append(lambda: facts.update(peers=describe_store(directory)))
    if role != "hbbs":
        checks += [functools.partial(read_list, os.path.join(directory, name))
                   for name in (SLOWED_FILE, REFUSED_FILE)]
    for look in checks:
        try:
            look()
        except Trouble as trouble:
            faults.append(str(trouble))
    if config.tls_cert:
        try:
            Tls(config.tls_cert, config.tls_key)
            facts["certificate"] = config.tls_cert
        except (ImportError, OSError, ValueError) as error:
            faults.append(f"the certificate {config.tls_cert} cannot be used: {error}")
    port = config.port if config.port is not None else (
        RELAY_PORT if role == "hbbr" else RENDEZVOUS_PORT)
    facts["port"] = f"{port} and those around it, on {config.bind or 'all addresses'}"
    return facts, list(dict.fromkeys(faults))


def look_for_places(config):
    """Trouble if the log file or the user of the settings can't be had."""
    path = config.log_file
    place = path if os.path.exists(path) else os.path.dirname(path) or "."
    if path and (os.path.isdir(path) or not os.access(place, os.W_OK)):
        raise Trouble(f"cannot write the log file {path} (see --log-file)")
    if config.user:
        find_user(config.user)


def find_user(name):
    """The system's record of a user (getpwnam); Trouble if there is none."""
    import pwd  # only here: not on Windows

    try:
        return pwd.getpwnam(name)
    except KeyError:
        raise Trouble(f"user = {name}: this system has no such user") from None


def look_at_ports(config, role):
    """Trouble if the last of the ports around --port is none."""
    last = (config.port or 0) + WEBSOCKET_OFFSET
    last += RELAY_OFFSET if role == "both" else 0
    if last > 65535:
        raise Trouble(f"there is no port {last}: choose another -p")


def describe_key(config, is_relay, directory):
    """The key of a role, and what it asks of clients."""
    setting = config.key if config.key is not None else "" if is_relay else "-"
    planted = key_to_plant(directory, config.key_priv, config.key_pub)
    key, warnings = load_server_key(setting, is_relay, directory, None)
    if key.secret is None and warnings:
        if planted and setting in ("", "-", "_"):
            return f"{encode_base64(planted[32:])}; the first start writes it"
        return warnings[0]
    asked = "clients must present it" if key.required else "clients need not present it"
    if key.secret is None:
        asked = "a text must be presented" if key.required else "none is asked for"
    return "; ".join([key.public_text or "no key", asked, *warnings])


def describe_store(directory):
    """How many peers are known."""
    store = PeerStore(os.path.join(directory, STORE_FILE))
    try:
        store.load()
    except OSError as error:
        raise Trouble(f"cannot read {store.path}: {error.strerror}; it holds the known "
                      "peers") from None
    bad = ""
    if store.bad_lines:
        number, why, _ = store.bad_lines[0]
        bad = f", {len(store.bad_lines)} bad lines, the first is line {number}: {why}"
    return f"{len(store.peers)} known{bad}{', torn last line' if store.torn else ''}"


def list_settings(config):
    """(name, value as text, where it came from) of every setting in use."""
    rows = []
    for attribute, row in SETTINGS.items():
        if not row.deprecated:
            value = getattr(config, attribute)
            origin = config.origins.get(attribute, "default")
            rows.append((row.name, show_value(attribute, value), origin))
    return rows


def show_value(attribute, value):
    """A setting's value for an operator's eyes; never a secret key or token."""
    if attribute in ("key_priv", "status_token") or (
            attribute == "key" and value and len(value) > 60):
        return "(secret)" if value else ""
    if isinstance(value, tuple):
        return ",".join(map(show_item, value))
    if isinstance(value, bool):
        return "Y" if value else "N"
    return "" if value is None else str(value)


def show_item(item):
    """One element of a list among the settings."""
    if isinstance(item, RelayEntry):
        return f"{item.network}={item.name}" if item.network else item.name
    if isinstance(item, tuple):
        return str(Address(item[0] or "0.0.0.0", item[1]))
    return str(item)


# == 20. Doctor ================================================================
#
# The client that tests a server: from the server's own machine, where it looks
# at the system as well, and from a client's network.  It is a plain blocking
# client.  Each check yields `Finding`s: what was seen, why probably, and what
# to do.  Its id cannot be registered, so nothing of it reaches the store.
#
# Uses: Constants, Refusals, Messages, Frames and addresses, WebSocket and HTTP,
# Keys, Configuration, Peer store, Connections, Server, Maintenance.

GOOD, WARNING, FAULT = "ok", "warning", "fault"

#: No device can have this id, for its blank: the server knows nobody by it.
DOCTORS_ID = "the doctor"
#: How often a datagram is sent before its way counts as blocked.
DATAGRAM_TRIES = 3
#: A relay ends links that nobody has arranged after 5 s (`early-seconds`), and
#: those with a wrong key at once.
AT_ONCE_SECONDS, UNARRANGED_SECONDS = 1.5, 10.0
#: A certificate that is not renewed by now will not be, it seems.
RENEWAL_DAYS = 14
#: The two times of a certificate's validity (RFC 5280 4.1.2.5), in DER.
VALIDITY = re.compile(
    rb"\x30.(?:\x17\x0d|\x18\x0f)\d+Z(?:\x17\x0d|\x18\x0f)(\d+)Z", re.S)
#: What a server should be able to open, and what its disk should have left.
FEW_DESCRIPTORS, LITTLE_ROOM_BYTES = 4096, 16 * 1024 * 1024
#: As much is written to see whether the disk takes it.
TRIAL_BYTES = 64 * 1024


#: What one check has found: GOOD, WARNING or FAULT, and why.
Finding = collections.namedtuple("Finding", "level topic sentence remedy")
#: One test: `find(patient)` yields (level, sentence, remedy); when it gets no answer,
#: that is of this level.
Check = collections.namedtuple("Check", "topic level find")


class NoAnswer(Exception):
    """What was asked for did not come: a sentence why, and the remedy."""


class Patient:
    """The server that is examined, and what is known of it so far."""

    def __init__(self, host, port, key, seconds, ask):
        self.host = host
        self.key = key
        self.seconds = seconds
        self.ask = ask  # a function that asks the running servers of the directory
        self.ips = ()
        self.directory = self.config = None  # where its state is, if that is here
        self.facts = {}  # what the server of that directory says of itself
        self.relays = ()  # (name, whether it is for one network) that clients are told
        self.ports = ports_around(port)
        self.takes_key = None  # the ID server, once it has answered by TCP

    def meet(self, facts, take_ports):
        """Take what a running server says of itself, the ID server first."""
        self.facts = {**facts, **self.facts}
        self.relays = self.relays or facts.get("relays", ())
        if take_ports:
            ports = facts.get("ports", {})
            if "rendezvous" in ports:
                self.ports.update(ports_around(ports["rendezvous"]))
            self.ports.update(ports)

    @property
    def is_here(self):
        """Whether the address under test is one of this machine."""
        return any(map(is_own_address, self.ips))

    def ticket(self):
        """The uuid of a session that the server here has arranged for us, or a
        new one."""
        for reply in self.ask(["ticket"]) if self.facts else ():
            if "session_uuid" in reply:
                return reply["session_uuid"]
        return f"doctor-{os.urandom(16).hex()}"


def ports_around(port):
    """Where clients look for everything that they know one port of (protocol
    1.1)."""
    return {"rendezvous": port, "nat-test": port + NAT_TEST_OFFSET,
            "rendezvous-websocket": port + WEBSOCKET_OFFSET,
            "relay": port + RELAY_OFFSET,
            "relay-websocket": port + RELAY_OFFSET + WEBSOCKET_OFFSET}


def is_own_address(ip):
    """Whether an address is this machine's."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((ip, 0))
    except OSError:
        return False
    return True


# -- connections ---------------------------------------------------------------


def resolve(host, port):
    """The addresses of a name, IPv4 first; NoAnswer if it has none."""
    try:
        found = look_up(host, port)
    except (OSError, UnicodeError) as error:
        raise NoAnswer(
            f"the name {host!a} has no address: {getattr(error, 'strerror', error)}",
            "correct the name, or make a DNS record for it") from None
    return sorted(dict.fromkeys(address_of(one[4]).ip for one in found),
                  key=lambda ip: ":" in ip)


def dial(patient, kind, address):
    """A connected socket; NoAnswer if there is no way."""
    family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
    sock = socket.socket(family, kind)
    sock.settimeout(patient.seconds)
    try:
        sock.connect(tuple(address))
    except OSError as error:
        sock.close()
        raise no_way(patient, kind, address, error) from None
    return sock


def no_way(patient, kind, address, error):
    """Why something cannot be reached, as a `NoAnswer`."""
    transport = "udp" if kind == socket.SOCK_DGRAM else "tcp"
    where, port = f"{transport} {address}", f"{transport.upper()} {address.port}"
    here = is_own_address(address.ip)
    if isinstance(error, socket.timeout) or error.errno == errno.ETIMEDOUT:
        return NoAnswer(
            f"{where} does not answer within {patient.seconds:g} s: "
            + lost_where(patient, here),
            f"let {port} through, and have the router pass it on to the server")
    if error.errno == errno.ECONNREFUSED:
        cause = ("nothing listens there" if here else
                 "nothing listens there, or a firewall rejects it")
        return NoAnswer(f"{where} refuses: {cause}",
                        f"start the server, and let {port} through")
    if error.errno in (errno.EPERM, errno.EACCES):
        return NoAnswer(f"{where} is forbidden by the firewall of this very machine",
                        f"let {port} out")
    return NoAnswer(f"{where} cannot be reached: {error.strerror or error}",
                    "see to the network between here and there")


def lost_where(patient, here):
    """Where what is sent gets lost, probably."""
    if here:
        return "this machine's own firewall drops it"
    cause = "a firewall drops it, or a router does not pass it on"
    if patient.facts:  # the server runs here, so the address is the router's
        cause += ("; or the router does not lead its own public address back inside "
                  "(hairpin NAT), then only a test from outside tells")
    return cause


def console_hint(address):
    """What else a hang-up may mean to who connects from the same machine
    (protocol 1.4, 1.6)."""
    return ("; if it is an official server, which keeps a text console there for its "
            "own machine, name its other address") * address.is_loopback


class Probe:
    """A connection of the doctor's, as a client has one: messages in frames."""

    def __init__(self, patient, address):
        self.address = address
        self.started = time.monotonic()
        self.socket = dial(patient, socket.SOCK_STREAM, address)
        self.framing = LengthFraming(MAX_FRAME_BYTES)
        self.seconds = patient.seconds
        self.until = time.monotonic() + self.seconds

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.socket.close()

    def send(self, data):
        """Send bytes as they are."""
        try:
            self.socket.sendall(data)
        except OSError:
            pass  # it has hung up: reading tells

    def say(self, message):
        """Send a message in a frame."""
        self.send(self.framing.wrap(encode_message(message)))

    def receive(self):
        """More bytes, or b"" at the end; NoAnswer when they take too long."""
        self.socket.settimeout(max(0.001, self.until - time.monotonic()))
        try:
            return self.socket.recv(RECEIVE_BYTES)
        except socket.timeout:
            raise NoAnswer(
                f"tcp {self.address} takes connections and answers nothing within "
                f"{self.seconds:g} s: it is another program, or something on the way "
                "that accepts for it",
                "see what listens there, and where the router leads it") from None
        except OSError:
            return b""

    def take(self):
        """The payload of the next frame, or None at the end."""
        while True:
            try:
                payload = self.framing.take()
            except Refused:
                return None
            data = self.receive() if payload is None else b""
            if payload is not None or not data:
                return payload
            self.framing.receive(data)

    def hear(self, kind):
        """The next message of a kind; NoAnswer if the connection ends
        before."""
        while True:
            payload = self.take()
            if payload is None:
                raise NoAnswer(
                    f"tcp {self.address} hangs up without an answer: it is no RustDesk "
                    "server, or refuses this address", "see what listens there, and "
                    f"its log{console_hint(self.address)}")
            try:
                message = decode_message(payload)
            except Refused:
                continue
            if isinstance(message, kind):
                return message

    def read_until(self, mark, most=MAX_HTTP_HEAD_BYTES):
        """All bytes up to a mark and what came behind it, or to the end."""
        data = b""
        while mark not in data and len(data) < most:
            more = self.receive()
            if not more:
                break
            data += more
        return data

    @property
    def took(self):
        """How long it has taken, for people."""
        return f"{(time.monotonic() - self.started) * 1000:.0f} ms"


def call(patient, name):
    """A `Probe` to one of the ports of the ID server or the relay beside it."""
    return Probe(patient, Address(patient.ips[0], patient.ports[name]))


# -- the ID server -------------------------------------------------------------


def find_host(patient):
    """Does the name have addresses, and can each be reached?"""
    patient.ips = resolve(patient.host, patient.ports["rendezvous"])
    shown = ", ".join(patient.ips)
    if shown != patient.host:
        yield GOOD, f"{patient.host} is {shown}", ""
    for ip in patient.ips[1:]:
        address = Address(ip, patient.ports["rendezvous"])
        try:
            dial(patient, socket.SOCK_STREAM, address).close()
        except NoAnswer as trouble:
            yield (WARNING, f"one address of {patient.host} does not work: "
                   f"{trouble.args[0]}", f"remove {ip} from the DNS, or open it")


def find_id_server(patient):
    """Does the ID server answer who asks for a peer?"""
    with call(patient, "rendezvous") as probe:
        probe.say(PunchHoleRequest(id=DOCTORS_ID, licence_key=patient.key))
        failure = probe.hear(PunchHoleResponse).failure
        patient.takes_key = failure != PunchHoleResponse.Failure.LICENSE_MISMATCH
        yield GOOD, f"tcp {probe.address} answers in {probe.took}", ""


def find_key(patient):
    """Does it take our key?"""
    if patient.takes_key is None:
        return  # it has not answered
    if patient.takes_key:
        yield GOOD, "the server takes the key that was given" if patient.key else (
            "the server asks for no key"), ""
    elif not patient.key:
        yield (WARNING, "the server asks for a key and none was given: the key is not "
               "tested", "--key KEY names the one that your clients have")
    else:
        whose = ("it is the public service's" if patient.key == PUBLIC_SERVICE_KEY
                 else "it is another server's, or mistyped")
        yield (FAULT, f"wrong key: the server does not take {patient.key}; {whose}",
               "give the clients the key that the server prints when it starts "
               f"({PUBLIC_KEY_FILE})")


def find_signature(patient):
    """Is it the server that the key belongs to?  To who is silent, it offers an
    exchange key under its signature."""
    try:
        public = decode_base64(patient.key, PUBLIC_KEY_BYTES)
    except ValueError:
        return
    if patient.takes_key is None:
        return  # it has not answered
    try:
        with call(patient, "rendezvous") as probe:
            offers = probe.hear(KeyExchange).keys
            is_ours = len(offers) == 1 and is_signed_by(public, offers[0])
            if is_ours:  # who hangs up at a signature says that it is another's
                probe.say(TestNatRequest(serial=1))
    except NoAnswer:
        yield (WARNING, "the server offers no secured connection, so its signature was "
               "not tested: it is an official one, or has no key pair",
               "clients that are signed in, or without UDP, need one that does")
        return
    if is_ours:
        yield GOOD, "what the server signs is signed by this key", ""
    else:
        yield (FAULT, f"what the server signs is not signed by {patient.key}: clients "
               "with that key cannot trust it", "give them the key of this server")


def find_registration(patient):
    """Do datagrams reach the ID server, and its answers us?"""
    address = Address(patient.ips[0], patient.ports["rendezvous"])
    request = encode_message(RegisterPeer(id=DOCTORS_ID, serial=1))
    with dial(patient, socket.SOCK_DGRAM, address) as sock:
        sock.settimeout(patient.seconds / DATAGRAM_TRIES)
        for lost in range(DATAGRAM_TRIES):
            started = time.monotonic()
            try:
                sock.send(request)
                answer = sock.recv(MAX_DATAGRAM_BYTES)
            except socket.timeout:
                continue
            except OSError as error:
                raise no_way(patient, socket.SOCK_DGRAM, address, error) from None
            yield from judge_registration(
                answer, address, lost, time.monotonic() - started)
            return
    while_tcp = ", while TCP answers" if patient.takes_key is not None else ""
    raise NoAnswer(
        f"udp {address} is blocked: no answer to {DATAGRAM_TRIES} datagrams"
        f"{while_tcp}; {lost_where(patient, is_own_address(address.ip))}.  Devices "
        "cannot register", f"let UDP {address.port} through as well as TCP")


def judge_registration(answer, address, lost, seconds):
    """Findings about what came back by datagram."""
    try:
        message = decode_message(answer)
    except Refused:
        message = None
    if not isinstance(message, RegisterPeerResponse):
        yield (FAULT, f"udp {address} answers, but is no RustDesk server",
               "see what listens there")
    elif lost:
        yield (WARNING, f"udp {address} answers, but {lost} of {lost + 1} datagrams "
               "were lost", "see to the network, and the receive buffer (--rmem)")
    else:
        yield GOOD, f"udp {address} answers in {seconds * 1000:.0f} ms", ""


def find_nat_test(patient):
    """Does the second port tell us our own?"""
    with call(patient, "nat-test") as probe:
        ours = probe.socket.getsockname()[1]
        probe.say(TestNatRequest(serial=1))
        seen = probe.hear(TestNatResponse).port
        how = ("which is ours, no NAT between" if seen == ours else
               f"which here is {ours}: there is a NAT between")
        yield GOOD, f"tcp {probe.address} sees port {seen}, {how}", ""


def find_online_states(patient):
    """Does it tell who is online?"""
    with call(patient, "nat-test") as probe:
        probe.say(OnlineRequest(id=DOCTORS_ID, peers=[DOCTORS_ID]))
        states = probe.hear(OnlineResponse).states
        if states:
            yield GOOD, f"tcp {probe.address} tells who is online", ""
        else:
            yield (FAULT, f"tcp {probe.address} answers with too few states, which "
                   "clients do not survive", "see what server that is")


def find_health(patient):
    """What does the server say of itself?  An official one says nothing."""
    with call(patient, "rendezvous") as probe:
        probe.send(b"GET /healthz HTTP/1.1\r\nHost: doctor\r\n\r\n")
        head, _, body = probe.read_until(b"\n\r\n").partition(b"\r\n\r\n")
        while head.startswith(b"HTTP/1.1 ") and not body.endswith(b"\n"):
            more = probe.receive()
            body += more or b"\n"
    said = show_bytes(body)
    if said.startswith("degraded"):
        yield FAULT, f"the server says {said}", "see the server's log and its disk"
    elif said == "ok":
        yield GOOD, "the server says ok", ""


def show_bytes(data):
    """A line from a stranger, as a terminal may have it."""
    return ascii(data.strip()[:200].decode("latin-1"))[1:-1]


def find_websocket(patient, name="rendezvous-websocket", ip=None):
    """Does a port turn HTTP into a WebSocket, and is the ID server behind
    it?"""
    address = Address(ip or patient.ips[0], patient.ports[name])
    with Probe(patient, address) as probe:
        key = base64.b64encode(os.urandom(16))
        probe.send(b"GET / HTTP/1.1\r\nHost: doctor\r\nConnection: Upgrade\r\n"
                   b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                   b"Sec-WebSocket-Key: " + key + b"\r\n\r\n")
        head, _, data = probe.read_until(b"\r\n\r\n").partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101") or accept_value(key) not in head:
            line = show_bytes(head.partition(b"\r\n")[0])
            yield (WARNING, f"tcp {address} makes no WebSocket of a connection: "
                   f"{line or 'it hangs up'}", "see what listens there")
            return
        if name == "rendezvous-websocket":
            query = encode_message(OnlineRequest(id=DOCTORS_ID, peers=[DOCTORS_ID]))
            probe.send(bytes((WHOLE_BINARY, 0x80 | len(query))) + bytes(4) + query)
            states = encode_message(OnlineResponse(states=b"\0"))
            wanted = websocket_header(len(states)) + states
            if wanted not in data and wanted not in probe.read_until(wanted, 1):
                yield (WARNING, f"tcp {address} is a WebSocket, but no ID server is "
                       "behind it", "see what listens there")
                return
        yield GOOD, f"tcp {address} upgrades to WebSocket", ""


# -- TLS -----------------------------------------------------------------------


def find_certificate(patient):
    """Is there TLS, and for how long is its certificate good?"""
    try:
        import ssl  # only here: small systems lack it
    except ImportError:
        yield WARNING, "this Python has no ssl module: TLS is not tested", (
            "run the doctor by another Python")
        return
    ports = [patient.ports["rendezvous-websocket"]]
    if patient.ips[0] != patient.host:  # clients with a host name use 443
        ports.append(443)
    for port in ports:
        address = Address(patient.ips[0], port)
        try:
            certificate = fetch_certificate(ssl, patient, address)
        except NoAnswer:
            continue  # the WebSocket's check tells, and who has a name may not need 443
        if certificate:
            yield from judge_certificate(ssl, patient, address, certificate)
        else:
            yield GOOD, f"tcp {address} speaks no TLS; only wss clients need it", ""


def fetch_certificate(ssl, patient, address, context=None):
    """A port's certificate in DER, or b"" if it speaks no TLS.

    With a context that checks it, SSLCertVerificationError if it is not to be
    trusted.
    """
    if context is None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with dial(patient, socket.SOCK_STREAM, address) as sock:
        try:
            with context.wrap_socket(sock, server_hostname=patient.host) as tunnel:
                return tunnel.getpeercert(True)
        except ssl.SSLCertVerificationError:
            raise
        except OSError:
            return b""


def judge_certificate(ssl, patient, address, certificate):
    """How long a certificate is good, and whether it is trusted here."""
    end = last_moment(certificate)
    shown = f"{end[:4]}-{end[4:6]}-{end[6:8]}" if end else "an unknown day"
    if end and end < moment_after(0):
        yield (FAULT, f"tcp {address} has a certificate that expired on {shown}",
               "renew it; the server reads it again by itself")
        return
    if end and end < moment_after(RENEWAL_DAYS):
        yield (WARNING, f"tcp {address} has a certificate that expires on {shown}",
               "renew it; the server reads it again by itself")
    try:
        fetch_certificate(ssl, patient, address, ssl.create_default_context())
    except ssl.SSLCertVerificationError as error:
        yield (WARNING, f"tcp {address} has a certificate that is not trusted here: "
               f"{error.verify_message}",
               "use one from a public authority, for the name that clients use")
    else:
        yield GOOD, f"tcp {address} has a certificate until {shown}", ""


def last_moment(certificate):
    """When a certificate in DER ends: 14 digits, or "" if that is not found."""
    found = VALIDITY.search(certificate)
    if not found:
        return ""
    digits = found.group(1).decode()
    if len(digits) == 12:  # UTCTime (RFC 5280 4.1.2.5.1)
        digits = ("19" if digits >= "5" else "20") + digits
    return digits


def moment_after(days):
    """The time in so many days, as 14 digits."""
    return time.strftime("%Y%m%d%H%M%S", time.gmtime(time.time() + days * 86400))


# -- the relay -----------------------------------------------------------------


def relay_checks(patient):
    """The checks of each relay that clients are sent to."""
    for name, is_local in patient.relays or [("", False)]:
        topic = f"relay {name}".strip()

        def find(patient, name=name, is_local=is_local):
            return find_relay(patient, name, is_local)

        def find_upgrade(patient, name=name):
            ip, port = relay_address(patient, name)
            if name:
                patient.ports["relay-websocket"] = port + WEBSOCKET_OFFSET
            return find_websocket(patient, "relay-websocket", ip)

        yield Check(topic, FAULT, find)
        yield Check(f"{topic} websocket", WARNING, find_upgrade)


def relay_address(patient, name):
    """Where a relay is: one that is named, or beside the ID server."""
    if not name:
        return Address(patient.ips[0], patient.ports["relay"])
    host, port = split_host(name)
    port = port or RELAY_PORT
    return Address(resolve(host, port)[0], port)


def find_relay(patient, name, is_local):
    """Is the relay where clients will look for it, and does it carry?

    Of one that is meant for a single network it may be a private address.
    """
    address = relay_address(patient, name)
    if name and not is_local:
        yield from judge_relay_address(patient, name, address)
    yield from carry(patient, address)


def judge_relay_address(patient, name, address):
    """Can others than we reach the address that the ID server names?"""
    remedy = ("name the relay's public name or address in --relay-servers, or leave "
              "the setting out where it runs beside the ID server")
    if is_loopback(address.ip):
        yield (FAULT, f"the relay {name} is {address.ip}, which for each client is its "
               "own machine", remedy)
    elif is_private(address.ip) and not is_private(patient.ips[0]):
        yield (FAULT, f"the relay {name} is {address.ip}, a private address, but the "
               f"ID server is {patient.ips[0]}, a public one: clients outside of its "
               "network cannot be relayed", remedy)
    elif is_private(address.ip):
        yield (WARNING, f"the relay {name} is {address.ip}, a private address: clients "
               "outside of its network cannot be relayed", remedy)


def carry(patient, address):
    """Send bytes through the relay and back: both ends of a session are
    ours."""
    request = RequestRelay(uuid=patient.ticket(), licence_key=patient.key)
    with Probe(patient, address) as one, Probe(patient, address) as other:
        started = time.monotonic()
        for probe in one, other:
            probe.until = started + max(patient.seconds, UNARRANGED_SECONDS)
            probe.say(request)
        carried = [sends_to(one, other), sends_to(other, one)]
        seconds = time.monotonic() - started
        if all(carried):
            yield GOOD, f"tcp {address} carries a session, {one.took} in all", ""
        elif seconds < AT_ONCE_SECONDS:
            yield (FAULT, f"tcp {address} refuses the session at once: its key is "
                   "another one, or it refuses this address",
                   "see `wrong-key` and `refused-address` in the relay's log"
                   + console_hint(address))
        elif patient.facts:
            yield (FAULT, f"tcp {address} does not know the session that the server "
                   "here has arranged: they have no common secret",
                   "give both the same --relay-secret, and name the relay in "
                   "--relay-servers")
        else:
            yield (GOOD, f"tcp {address} is reached and carries arranged sessions only "
                   "(no-ticket): whether it carries was not shown, the doctor on the "
                   "server shows it", "")


def sends_to(one, other):
    """Whether a frame of one end comes out at the other."""
    payload = os.urandom(100)
    one.send(one.framing.wrap(payload))
    return other.take() == payload


# -- this machine --------------------------------------------------------------


def find_server(patient):
    """Does a server run in the directory, and who has its ports otherwise?"""
    if patient.facts.get("pid"):
        yield (GOOD, f"pid {patient.facts['pid']} runs here "
               f"({patient.facts['role']})", "")
        return
    if patient.facts:
        yield (WARNING, f"a server runs here, but {patient.facts['fault']}",
               "run the doctor as root")
        return
    place = os.path.abspath(patient.directory)
    if os.access(place, os.W_OK):
        yield (FAULT, f"no server runs in {place}",
               "start it; --directory names another place")
    else:
        yield (WARNING, f"whether a server runs in {place} is not known: nothing can "
               "be written there, so it could not make the door by which it is asked",
               "mount it for writing, or see who has the ports")
    for kind, name in [("udp", "rendezvous")] + [("tcp", name) for name in
                                                 patient.ports]:
        holder = find_holder(kind, patient.ports[name])
        if holder:
            yield (WARNING, f"{kind} {patient.ports[name]} is in use by {holder}",
                   "stop that program, or choose another port with -p")


def find_holder(kind, port):
    """Who has a port of this machine, or "" when it is free."""
    how = socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM
    try:
        with socket.socket(socket.AF_INET, how) as sock:
            prepare(sock, how, dual=False)
            sock.bind(("0.0.0.0", port))
    except OSError as error:
        return port_holder(kind, port) if error.errno == errno.EADDRINUSE else ""
    return ""


def find_binding(patient):
    """Can others reach the address that it listens on?"""
    bind = patient.facts.get("bind", patient.config.bind if patient.config else "")
    if bind and is_loopback(bind):
        yield (WARNING, f"it listens on {bind} only, which no other machine reaches",
               "leave --bind out, unless a proxy here passes everything on")


def find_key_files(patient):
    """Are the key's files what they should be?"""
    try:
        secret, warnings = load_key_files(patient.directory, None)
    except Trouble as trouble:
        yield FAULT, str(trouble), "see Files in the README"
        return
    if secret is None and patient.facts.get("role") == "hbbr":
        return  # a relay alone makes no key unless one is asked for
    for warning in warnings:
        yield WARNING, warning, "see Files in the README"
    if secret is not None and not warnings:
        yield GOOD, f"the key is {encode_base64(secret[32:])}", ""


def find_disk(patient):
    """Does the disk take what is written?"""
    path = os.path.join(patient.directory, f".doctor-{os.urandom(4).hex()}")
    place = os.path.abspath(patient.directory)
    try:
        with new_file(path, 0o600) as file:
            file.write(bytes(TRIAL_BYTES))
        os.unlink(path)
    except OSError as error:
        causes = {
            errno.ENOSPC: ("the disk is full", "make room on it"),
            errno.EDQUOT: ("the user's quota is used up", "make room, or raise it"),
            errno.EROFS: ("its file system is read-only", "see dmesg for the reason, "
                          "and mount it for writing"),
            errno.EACCES: ("this user may not write there", "chown it to the user that "
                           "runs the server")}
        cause, remedy = causes.get(error.errno, (error.strerror, "see to the disk"))
        yield FAULT, f"{place} takes nothing new: {cause}", remedy
        return
    yield from judge_room(patient.directory)


def judge_room(directory):
    """How much the disk has left."""
    if not hasattr(os, "statvfs"):  # Windows
        return
    disk = os.statvfs(directory)
    room = disk.f_bavail * disk.f_frsize
    whole = disk.f_blocks * disk.f_frsize
    said = f"{room / 1e6:,.0f} MB of {whole / 1e6:,.0f} are free"
    if room < LITTLE_ROOM_BYTES or disk.f_files and disk.f_favail < 100:
        yield WARNING, f"{said}, and {disk.f_favail} names", "make room on the disk"
    else:
        yield GOOD, said, ""


def find_store(patient):
    """Can the known peers be read, and new ones be written?"""
    path = os.path.join(patient.directory, STORE_FILE)
    if not os.path.exists(path):
        return
    said = describe_store(patient.directory)
    try:
        open(path, "ab").close()
    except OSError as error:
        yield (FAULT, f"{path} cannot be written: {error.strerror}; known peers are "
               "served, new ones refused", "make it writable for the server's user")
        return
    owner = os.stat(path).st_uid
    user = user_of(patient.facts.get("pid"))
    if user not in (None, 0, owner):
        yield (FAULT, f"{path} belongs to user {owner}, but the server runs as {user}",
               f"chown {user} {path}")
    elif "cannot be read" in said or "bad lines" in said:
        yield WARNING, said, f"see {path}.bad; `restore` brings a backup back"
    else:
        yield GOOD, said, ""


def user_of(pid):
    """The user id of a process, or None."""
    try:
        return os.stat(f"/proc/{pid}").st_uid if pid else None
    except OSError:
        return None


def find_descriptors(patient):
    """How many connections may be open?"""
    pid = patient.facts.get("pid", "self")
    try:
        with open(f"/proc/{pid}/limits", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("Max open files"))
        used = len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, StopIteration):
        return
    soft, hard = line.split()[3:5]
    most = hard if pid == "self" else soft  # the server raises it when it starts
    said = f"{used} of {most} descriptors are open" if pid != "self" else (
        f"{most} descriptors may be open")
    remedy = "LimitNOFILE= of systemd, or ulimit -n"
    if most.isdigit() and used > 0.9 * int(most):
        yield FAULT, f"{said}: new connections are refused soon", remedy
    elif most.isdigit() and int(most) < FEW_DESCRIPTORS:
        yield WARNING, f"{said}: one for each connection", remedy
    else:
        yield GOOD, said, ""


def find_clock(patient):
    """Is it later than when our files were written?"""
    paths = [os.path.join(patient.directory, name) for name in (KEY_FILE, STORE_FILE)]
    written = max((os.stat(path).st_mtime for path in paths if os.path.exists(path)),
                  default=0.0)
    now = time.time()
    shown = time.strftime("%Y-%m-%d %H:%M", time.localtime(now))
    if written > now + 3600:
        day = time.strftime("%Y-%m-%d", time.localtime(written))
        yield (WARNING, f"the clock says {shown}, but files here are of {day}: it is "
               "slow, or was fast", "set it by NTP; certificates depend on it")
    else:
        yield GOOD, f"the clock says {shown}", ""


def read_number(path):
    """The number in a file of /proc, or None."""
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def find_conntrack(patient):
    """Does the firewall have room to follow more connections?"""
    count = read_number("/proc/sys/net/netfilter/nf_conntrack_count")
    most = read_number("/proc/sys/net/netfilter/nf_conntrack_max")
    if count is not None and most:
        yield judge_conntrack(count, most)


def judge_conntrack(count, most):
    """What comes of a firewall that follows so many connections."""
    said = f"the firewall follows {count} of {most} connections"
    remedy = "sysctl -w net.netfilter.nf_conntrack_max=262144, or more"
    if count >= most:
        return FAULT, f"{said}: it drops new ones", remedy
    if count > 0.8 * most:
        return WARNING, f"{said}: soon it drops new ones", remedy
    return GOOD, said, ""


def find_receive_buffer(patient):
    """Are datagrams lost since nobody takes them in time?"""
    wanted = patient.facts.get("rmem", 0)
    most = read_number("/proc/sys/net/core/rmem_max")
    if most is not None and wanted > most:
        yield (WARNING, f"--rmem is {wanted}, but this system gives {most} bytes at "
               "most", f"sysctl -w net.core.rmem_max={wanted}")
    dropped = dropped_datagrams(patient.ports["rendezvous"])
    if dropped:
        yield (WARNING, f"{dropped} datagrams came while the receive buffer was full",
               "--rmem 4194304, and sysctl -w net.core.rmem_max=4194304")
    elif dropped is not None:
        yield GOOD, "the receive buffer has lost no datagram", ""


def dropped_datagrams(port):
    """How many datagrams to a UDP port were dropped for want of room; None if
    /proc does not tell."""
    rows = socket_rows("udp", port)
    return sum(int(row[-1]) for row in rows) if rows else None


# -- the examination -----------------------------------------------------------

STATE_CHECKS = (
    Check("server", FAULT, find_server), Check("bind", FAULT, find_binding),
    Check("key files", FAULT, find_key_files), Check("disk", FAULT, find_disk),
    Check("store", FAULT, find_store), Check("clock", FAULT, find_clock))
SYSTEM_CHECKS = (
    Check("descriptors", FAULT, find_descriptors),
    Check("conntrack", FAULT, find_conntrack),
    Check("receive buffer", FAULT, find_receive_buffer))
RENDEZVOUS_CHECKS = (
    Check("id server", FAULT, find_id_server), Check("key", FAULT, find_key),
    Check("signature", WARNING, find_signature),
    Check("registration", FAULT, find_registration),
    Check("nat test", FAULT, find_nat_test),
    Check("online states", FAULT, find_online_states),
    Check("websocket", WARNING, find_websocket),
    Check("tls", WARNING, find_certificate), Check("health", WARNING, find_health))


def examine(patient, tell):
    """Yield the `Finding`s of all checks; `tell` is told what is tried
    next."""
    def run(checks):
        for check in checks:
            tell(check.topic)
            try:
                for level, sentence, remedy in check.find(patient):
                    yield Finding(level, check.topic, sentence, remedy)
            except NoAnswer as trouble:
                yield Finding(check.level, check.topic, *trouble.args)

    yield from run([Check("host", FAULT, find_host)])
    if patient.directory is not None:
        yield from run(STATE_CHECKS)
    if patient.directory is not None or patient.is_here:
        yield from run(SYSTEM_CHECKS)
    if patient.ips:
        if patient.facts.get("role") != "hbbr":
            yield from run(RENDEZVOUS_CHECKS)
        yield from run(relay_checks(patient))


def has_state(directory):
    """Whether a directory is that of a server."""
    doors = map(door_name, ("both", "hbbs", "hbbr"))
    return any(os.path.exists(os.path.join(directory, name))
               for name in (KEY_FILE, STORE_FILE, *doors))


def own_host(config):
    """The address by which a server of this configuration is reached from
    here."""
    if config is None or config.bind in ANY_ADDRESS:
        return "127.0.0.1" if config is None or config.bind != "::" else "::1"
    return config.bind


# == 21. Command line ==========================================================
#
# The subcommands, and the start and the end of a server.
#
# Uses: all above.

DESCRIPTION = """\
A RustDesk-compatible ID server (hbbs) and relay (hbbr) in one file.

Without a subcommand both roles run in one process, on the standard ports.
The working directory holds the key (id_ed25519) and the peers (peers.jsonl).
"""

ROLES = {
    None: "both roles in one process",
    "hbbs": "the ID server",
    "hbbr": "the relay",
}


#: What can be asked of a running server: operands and meaning.
ORDERS = {
    "status": (" [ID]", "what goes on, or how the last attempts about an id ended"),
    "peers": (" [ID...]", "the peers, where they are and when they were seen"),
    "sessions": ("", "the relayed sessions"),
    "kick": (" ID|NUMBER", "end a peer's route and sessions, or one session"),
    "forget": (" ID", "remove a peer"),
    "reclaim": (" ID", "let the next device that claims an id have it"),
    "approve": (" [ID [IP]]", "let a new or disabled peer register"),
    "disable": (" ID", "serve a peer no more"),
    "allow": (" [X [-]]", "ids and networks that are served (- takes one away)"),
    "refuse": (" [X [-]]", "ids and networks that are not"),
    "limits": (" [NAME [N]]", "every limit, or another number for one (- ends that)"),
    "relay-servers": (" [HOSTS]", "the relays that clients are sent to"),
    "always-use-relay": (" [Y|N]", "whether everything is relayed"),
    "reload": ("", "read configuration, lists and certificates again"),
}


def add_settings(parser):
    """A flag for each setting; the texts are read by the configuration."""
    parser.add_argument("-c", "--config", metavar="FILE",
                        help="a file of settings, one `name = value` a line")
    for row in SETTINGS.values():
        flags = ([f"-{row.short}"] if row.short else []) + [f"--{row.name}"]
        text = f"ignored: {row.deprecated}" if row.deprecated else row.text
        action = "append" if row.parse in REPEATABLE else "store"
        parser.add_argument(*flags, dest=row.attribute, metavar=row.metavar,
                            action=action,
                            help=text.replace("`", "").replace("%", "%%"))


def build_parser(command):
    """The parser of a role's command line."""
    name = f"rustdesk_server.py {command}" if command else "rustdesk_server.py"
    epilog = None if command else (
        "subcommands (each has its own --help):\n"
        "  hbbs                  the ID server alone\n"
        "  hbbr                  the relay alone\n"
        "  check                 say what would be started\n"
        "  config                show every setting and where it came from\n"
        "  client-config         show what sets a client up, also as a QR code\n"
        "  doctor [HOST]         test a server from here, and say what is wrong\n"
        "  backup FILE           write key, store and configuration into one file\n"
        "  restore FILE          bring them back\n"
        "  import SOURCE         take over an official server's data\n"
        "  export-official DIR   write them as the official server keeps them\n"
        "  rotate-key            a new key in the place of a leaked one\n"
        "  genkeypair            print a fresh key pair\n"
        "  validatekeypair PUBLIC SECRET\n"
        "                        say whether two keys belong together\n"
        "of a running server:\n"
        + "".join(f"  {name + operands:21} {text}\n"
                  for name, (operands, text) in ORDERS.items()))
    parser = argparse.ArgumentParser(
        prog=name, epilog=epilog, allow_abbrev=False,
        description=DESCRIPTION if not command else f"Run {ROLES[command]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=VERSION)
    add_settings(parser)
    return parser


def collect_seldom():
    """Let the garbage collector look through everything a hundred times less
    often.

    At 200,000 new peers that stopped the server for 0.18 s each time, and it
    found nothing: what is closed here refers to itself no more.
    """
    if hasattr(gc, "freeze"):  # PyPy's collector is another one
        gc.set_threshold(*gc.get_threshold()[:2], 1000)


def run_role(command, arguments):
    """Run a server until it is told to stop; returns the exit status."""
    collect_seldom()
    flags = vars(build_parser(command).parse_args(arguments))
    role = command or "both"
    enter_directory(flags, may_make=True)

    def load(changes=None):
        return load_config(role, flags, os.environ, ".", changes)

    log = None
    try:
        config = load()
        log = open_log(config)
        for warning in config.warnings:
            log.warn(warning)
        raise_descriptor_limit()
        locks = lock_directory(".", role)  # which hold while they are referred to
        if role != "hbbr":
            adopt_official(config, log)
        server = Server(config, role, ".", log)
        server.load = load
        server.open()
        if config.user:
            become(config.user, flags["directory"])
    except Trouble as trouble:
        if log is not None:
            log.flush()
        raise SystemExit(f"rustdesk_server: {trouble}") from None
    catch_signals(server)
    introduce(server)
    server.supervisor.notify("READY=1")
    try:
        server.run()
    finally:
        server.close()
        unlock(locks)
    return 0


def enter_directory(flags, may_make=False):
    """Work in the state directory, made if it is missing and that is asked
    for; a file named by -c stays the same one."""
    directory = flags.get("directory")
    if flags.get("config"):
        flags["config"] = os.path.abspath(flags["config"])
    if directory:
        try:
            if may_make:
                os.makedirs(directory, mode=0o700, exist_ok=True)
            os.chdir(directory)
        except OSError as error:
            raise SystemExit(f"rustdesk_server: cannot use --directory {directory}: "
                             f"{error.strerror}") from None


def become(name, directory):
    """Go on as another user, who gets our files; Trouble if that can't
    be."""
    user = find_user(name)
    if os.geteuid() == user.pw_uid:
        return
    try:
        give_away(user, directory)
        os.initgroups(name, user.pw_gid)
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
    except OSError as error:
        raise Trouble(f"user = {name}: {error.strerror}; only a server started as "
                      "root can change its user") from None
    if not os.access(os.__file__, os.R_OK):
        raise Trouble(f"user = {name}: this user cannot read the Python in "
                      f"{os.path.dirname(os.__file__)}, which is still needed: "
                      "start the server with one that everybody can read")


def give_away(user, directory):
    """Give our own files to a user, and the directory; Trouble if that is
    neither the user's nor named by `--directory`, and has folders in it as no
    state directory has: somebody's home, perhaps."""
    if os.stat(".").st_uid != user.pw_uid and not directory and any(
            entry.is_dir() for entry in os.scandir(".")):
        raise Trouble(
            f"user = {user.pw_name}: {os.getcwd()} belongs to another user and holds "
            "more than this server's files; name a state directory by --directory, or "
            f"run: chown {user.pw_name} {os.getcwd()}")
    os.chown(".", user.pw_uid, user.pw_gid)
    give_files(user.pw_uid, user.pw_gid)


def give_files(uid, gid):
    """Give our own files in the working directory to a user."""
    for name in OWN_FILES:
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(name).st_nlink == 1:  # else it is somewhere else, too
                os.chown(name, uid, gid, follow_symlinks=False)


def give_to_owner():
    """What root has written in a service's state directory becomes the
    service's, which could not read it."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        owner = os.stat(".")
        if owner.st_uid != 0:
            give_files(owner.st_uid, owner.st_gid)


def open_log(config):
    """The log that the configuration asks for."""
    try:
        return Log(config.log_level, config.log_format, config.log_file)
    except OSError as error:
        raise Trouble(f"cannot write the log file {config.log_file}: "
                      f"{error.strerror} (see --log-file)") from None


def raise_descriptor_limit():
    """As many open files as the system allows without asking: one per link."""
    if resource is not None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            except (ValueError, OSError):
                pass  # macOS has a lower limit of its own; then the soft one holds


def introduce(server):
    """Tell the operator what to type into a client."""
    log = server.log
    if server.rendezvous is not None:
        port = server.ports.datagrams.address.port
        name = "the public name or address of this machine"
        host = host_for_clients(server.config.bind)
        if host:
            address = host if port == RENDEZVOUS_PORT else Address(host, port)
            name = f"{address} (or {name})"
        key = server.rendezvous.key
        log.info("in RustDesk: Settings, Network, ID/Relay server")
        log.info(f"  ID server: {name}")
        if key.public_text:
            log.info(f"  Key:       {key.public_text}")
    log.info(f"ready, version {VERSION}, {'PyNaCl' if nacl_bindings else 'built-in'} "
             "signatures")
    log.flush()


def catch_signals(server):
    """Stop cleanly when asked to, and read the configuration again."""
    def soon(action):
        server.loop.later(0.0, action)
        server.worker.wake()

    def stop(number, frame):
        soon(lambda: server.stop(signal.Signals(number).name))

    def reload(number, frame):
        soon(server.reload)

    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, reload)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def generate_keypair(arguments):
    """`genkeypair`: print a fresh pair as the official tool does."""
    argparse.ArgumentParser(
        prog="rustdesk_server.py genkeypair",
        description="Print a fresh key pair.").parse_args(arguments)
    secret = generate_secret(os.urandom)
    print(f"Public Key:  {encode_base64(secret[32:])}")
    print(f"Secret Key:  {encode_base64(secret)}")
    return 0


def validate_keypair(arguments):
    """`validatekeypair`: say whether two keys belong together; status 0 if
    so."""
    parser = argparse.ArgumentParser(
        prog="rustdesk_server.py validatekeypair",
        description="Say whether a public and a secret key belong together.")
    parser.add_argument("public", metavar="PUBLIC", help="44 characters of base64")
    parser.add_argument("secret", metavar="SECRET", help="88 characters of base64")
    keys = parser.parse_args(arguments)
    try:
        public, secret = decode_base64(keys.public, 32), decode_base64(keys.secret, 64)
        check_secret(secret)
        if secret[32:] != public:
            raise ValueError("the public key belongs to another secret key")
    except ValueError as error:
        print(f"Key pair is INVALID: {error}")
        return 1
    print("Key pair is VALID")
    return 0


def adopt_official(config, log):
    """A start in the official server's data directory takes its peers over.

    All of them or none: a store in which nobody is registered yet is replaced
    in one step, so a start that failed or was killed leaves it to the next.
    """
    has_key = (os.path.exists(KEY_FILE) or config.key_priv
               or config.key not in (None, "", "-", "_"))
    is_new = not os.path.exists(STORE_FILE) or not os.path.getsize(STORE_FILE)
    if not (has_key and is_new and os.path.exists(OFFICIAL_STORE_FILE)):
        return
    temporary = STORE_FILE + ".new"
    try:
        if os.path.exists(temporary):
            os.unlink(temporary)
        said = import_peers(OFFICIAL_STORE_FILE, temporary)
        os.replace(temporary, STORE_FILE)
        log.info(f"imported {said}")
    except (Trouble, OSError) as trouble:
        log.warn(f"{OFFICIAL_STORE_FILE} is not imported: {trouble}.  The next start "
                 "tries again if no peer has registered by then; afterwards stop the "
                 f"server and run: rustdesk_server.py import {OFFICIAL_STORE_FILE}")


def parse_settings(command, description, arguments):
    """The arguments of a subcommand that looks at the configuration of a
    role."""
    parser = argparse.ArgumentParser(
        prog=f"rustdesk_server.py {command}", description=description,
        allow_abbrev=False)
    parser.add_argument("role", nargs="?", choices=("both", "hbbs", "hbbr"),
                        default="both", help="of which role (both)")
    parser.add_argument("--json", action="store_true", help="for programs")
    add_settings(parser)
    flags = vars(parser.parse_args(arguments))
    enter_directory(flags)
    return flags.pop("role"), flags.pop("json"), flags


def check(arguments):
    """`check`: say what would be started; status 1 if it could not be."""
    role, as_json, flags = parse_settings(
        "check", "Read configuration, key and store, and say what would be started. "
        "Nothing is opened or written.", arguments)
    try:
        config = load_config(role, flags, os.environ, ".")
        Limits(config)
        facts, faults = describe(config, role, ".")
        warnings = config.warnings
    except Trouble as trouble:
        facts, faults, warnings = {}, [str(trouble)], []
    if as_json:
        print(json.dumps({"facts": facts, "faults": faults, "warnings": warnings}))
    else:
        for topic, sentence in facts.items():
            print(f"{topic:12} {sentence}")
        for word, sentences in ("warning", warnings), ("FAULT", faults):
            for sentence in sentences:
                print(f"{word:12} {sentence}")
    return 1 if faults else 0


def show_config(arguments):
    """`config`: every setting, its value, and where it came from."""
    role, as_json, flags = parse_settings(
        "config", "Show every setting, its value and where it came from.", arguments)
    try:
        rows = list_settings(load_config(role, flags, os.environ, "."))
    except Trouble as trouble:
        raise SystemExit(f"rustdesk_server: {trouble}") from None
    if as_json:
        print(json.dumps([dict(zip(("name", "value", "origin"), row)) for row in rows]))
    else:
        for name, value, origin in rows:
            print(f"{name:22} {value:26} {origin}")
    return 0


def show_client_config(arguments):
    """`client-config`: what to type into a client, or to let it read."""
    given = vars(client_config_parser().parse_args(arguments))
    own = {name: given.pop(name) for name in ("host", "relay", "api", "svg", "json")}
    picture = os.path.abspath(own["svg"]) if own["svg"] else None
    enter_directory(given)
    try:
        config = load_config("hbbs", given, os.environ, ".")
        told = find_client_config(config, own["host"], own["relay"], own["api"])
        if picture:
            write_picture(picture, qr_svg(qr_code(told["qr"].encode())))
    except (Trouble, ValueError) as trouble:
        raise SystemExit(f"rustdesk_server: {trouble}") from None
    if own["json"]:
        print(json.dumps(told))
    else:
        show_client_instructions(told, own["host"])
    return 0


def write_picture(path, text):
    """Write a file, or end with a sentence that says why not."""
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
    except OSError as error:
        raise SystemExit(f"rustdesk_server: cannot write {path}: {error.strerror}"
                         ) from None


def client_config_parser():
    """The parser of `client-config`."""
    parser = argparse.ArgumentParser(
        prog="rustdesk_server.py client-config", allow_abbrev=False,
        description="Show what to type into a client, or to let it read. Nothing is "
        "written but the picture of --svg.")
    parser.add_argument("--host", metavar="NAME",
                        help="the server's public name or address (this machine's own)")
    parser.add_argument("--relay", metavar="HOST", default="",
                        help="a relay for clients to ask (they are told one)")
    parser.add_argument("--api", metavar="URL", default="",
                        help="an API server (none)")
    parser.add_argument("--svg", metavar="FILE", help="write the QR code as a picture")
    parser.add_argument("--json", action="store_true", help="for programs")
    add_settings(parser)
    return parser


def find_client_config(config, host, relay, api):
    """The `client_config` of the server that this configuration starts.

    Trouble if it has no key yet, ValueError for a name that is none.
    """
    running = running_server() if None in (config.port, config.key) else {}
    text = running.get("key") if config.key is None else ""
    text = text or configured_key(config.key)
    host = host or host_for_clients(config.bind)
    if not host:
        raise ValueError("this machine has no address of its own; name it by --host")
    port = config.port
    if port is None:
        port = running["ports"]["rendezvous"] if running else RENDEZVOUS_PORT
    return client_config(parse_host(host), port, relay and parse_host(relay), text, api)


def configured_key(setting):
    """The key that clients need by that setting, or by the files; Trouble if
    there is none yet."""
    setting = "-" if setting is None else setting
    key, warnings = load_server_key(setting, False, ".", None)
    text = key.public_text or key.required
    if not text:
        raise Trouble(f"{warnings[0]} in {os.getcwd()}; --directory names another")
    return text


def running_server():
    """The facts of the ID server that runs here, whose flags say more than the
    configuration does; {} without one."""
    for role in "both", "hbbs":
        for facts in ask_door(role, ["facts"]):
            if "rendezvous" in facts.get("ports", {}):
                return facts
    return {}


def show_client_instructions(told, host):
    """Print them with the QR code, as far as this terminal has the letters."""
    sys.stdout.reconfigure(errors="backslashreplace")
    print("\n".join(client_instructions(told)))
    try:
        code = qr_text(qr_code(told["qr"].encode()), sys.stdout.isatty())
        code.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        print("(a QR code cannot be shown here; --svg FILE writes it as a picture)")
    except ValueError as trouble:
        print(f"({trouble})")
    else:
        print(f"or let a mobile client scan this\n{code}")
    if not host:
        print(f"{told['host']} is this machine's own address; for clients elsewhere "
              "give the public name or address by --host")


def doctor(arguments):
    """`doctor`: test a server, and say what is wrong; status 1 if something
    is."""
    given = parse_doctor(arguments)
    if not os.path.isdir(given.directory):
        raise SystemExit(f"rustdesk_server: there is no directory {given.directory}")
    os.chdir(given.directory)
    try:
        patient = admit(given)
    except Trouble as trouble:
        raise SystemExit(f"rustdesk_server: {trouble}") from None
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # some will hang up on us
    return report(given, patient)


def report(given, patient):
    """Examine, and print what was found as it is found; the exit status."""
    shows = not given.json and sys.stderr.isatty()

    def tell(text):
        if shows:
            print(f"\r{text}\033[K", end="\r", file=sys.stderr, flush=True)

    findings = []
    for finding in examine(patient, lambda topic: tell(f"... {topic}")):
        findings.append(finding)
        tell("")
        if not given.json:
            show_finding(finding)
    tell("")
    levels = collections.Counter(finding.level for finding in findings)
    if given.json:
        print(json.dumps({"host": patient.host,
                          "findings": [finding._asdict() for finding in findings]}))
    else:
        conclude(patient, levels)
    return 1 if levels[FAULT] else 0


def parse_doctor(arguments):
    """The arguments of `doctor`."""
    parser = argparse.ArgumentParser(
        prog="rustdesk_server.py doctor", allow_abbrev=False,
        description="Test a server from here, and say what is wrong, why probably, "
        "and what to do.  Nothing is left behind in its store.  Exit status 1 if "
        "there is a fault.")
    parser.add_argument("host", nargs="?", metavar="HOST[:PORT]",
                        help="the ID server as clients have it (this machine's)")
    parser.add_argument("--key", help="the key that clients have (of the directory)")
    parser.add_argument("--relay", metavar="HOST[:PORT]", default="",
                        help="the relay that clients are sent to (what the server here "
                        "is configured to, or the ID server's host)")
    parser.add_argument("--directory", metavar="DIR", default=".",
                        help="the server's state directory (the working directory)")
    parser.add_argument("--timeout", metavar="SECONDS", type=parse_positive,
                        default=5.0, help="how long an answer may take (5)")
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser.parse_args(arguments)


def admit(given):
    """The `Patient` that the arguments of `doctor` name."""
    config = load_config("both", {}, os.environ, ".") if has_state(".") else None
    replies = ask_doors(["facts"]) if config is not None else ()
    host, port = split_host(given.host or own_host(config))
    take_ports = port is None
    if port is None:
        port = config.port if config and config.port else RENDEZVOUS_PORT
    if not host or not 0 < port < 65532:
        raise Trouble(f"{given.host!a} is no HOST or HOST:PORT")
    key = given.key
    if key is None and config is not None:
        with contextlib.suppress(Trouble):  # the check of the key files tells
            key = load_server_key(config.key or "-", False, ".", None)[0].required
    patient = Patient(host, port, key or "", given.timeout, ask_doors)
    if config is not None:
        patient.directory, patient.config = ".", config
        patient.relays = [(entry.name, bool(entry.network))
                          for entry in config.relay_servers]
    if given.relay:
        patient.relays = [(given.relay, False)]
    for facts in replies:
        patient.meet(facts, take_ports)
    return patient


def show_finding(finding):
    """Print a finding, and below it what to do."""
    level = finding.level.upper() if finding.level == FAULT else finding.level
    print(f"{level:8} {finding.topic:16} {printable(finding.sentence)}", flush=True)
    if finding.remedy:
        print(f"{'':8} {'':16} -> {printable(finding.remedy)}", flush=True)


def conclude(patient, levels):
    """Print the sum of it, and what a test from here cannot show."""
    print(f"{levels[FAULT]} faults, {levels[WARNING]} warnings")
    if patient.is_here:
        print("This was seen from the server's own machine.  From a client's network "
              "run:\n  rustdesk_server.py doctor HOST --key "
              f"{patient.key or 'KEY'}")


def tell_error(error):
    """A sentence about an OSError; what is written beside its place first goes
    by the name of that place."""
    name = re.sub(r"(\.[0-9a-f]{8})?\.new$", "", str(error.filename or ""))
    return ": ".join(filter(None, (name, error.strerror or str(error))))


#: The subcommands that begin a state directory, where others only look.
FURNISHING = "restore", "import"


def maintain(command, description, operands, options, action):
    """A subcommand's function: parse its operands and flags, do it, say it."""
    def run(arguments):
        parser = argparse.ArgumentParser(
            prog=f"rustdesk_server.py {command}", description=description)
        for name, text in operands:
            parser.add_argument(name, metavar=name.upper(), help=text)
        for name, text in options:
            parser.add_argument(name, action="store_true", help=text)
        parser.add_argument("--directory", metavar="DIR",
                            help="the state directory (the working directory)")
        parser.add_argument("--json", action="store_true", help="for programs")
        given = parser.parse_args(arguments)
        for name, _ in operands:
            setattr(given, name, os.path.abspath(getattr(given, name)))
        enter_directory({"directory": given.directory}, command in FURNISHING)
        try:
            said = action(given)
        except Trouble as trouble:
            raise SystemExit(f"rustdesk_server: {trouble}") from None
        except OSError as error:
            raise SystemExit(f"rustdesk_server: {tell_error(error)}") from None
        finally:
            if command in (*FURNISHING, "rotate-key"):
                give_to_owner()
        print(json.dumps(said) if given.json else "\n".join(said))
        return 0

    return run


def take_over(arguments):
    """`import`: a directory or a database of the official server."""
    if os.path.isdir(arguments.source):
        return locked(import_directory, arguments.source, ".")
    if not os.path.exists(arguments.source):
        raise Trouble(f"there is no {arguments.source}")
    return [locked(import_peers, arguments.source, STORE_FILE)]


def locked(action, *arguments):
    """Do something to the working directory while no server runs in it."""
    locks = lock_directory(".", "both")
    try:
        return action(*arguments)
    finally:
        unlock(locks)


def order(command):
    """The function of a subcommand that speaks to the running server."""
    def run(arguments):
        operands, text = ORDERS[command]
        parser = argparse.ArgumentParser(
            prog=f"rustdesk_server.py {command}", allow_abbrev=False,
            usage=f"%(prog)s [--directory DIR] [--json]{operands}",
            description=f"Ask the running server: {text}.")
        parser.add_argument("words", nargs="*", metavar=operands.strip(),
                            help=argparse.SUPPRESS)
        parser.add_argument("--directory", metavar="DIR",
                            help="the server's state directory (the working directory)")
        parser.add_argument("--json", action="store_true", help="for programs")
        given = parser.parse_args(arguments)
        enter_directory({"directory": given.directory})
        replies = ask_doors([command, *given.words])
        if not replies:
            raise SystemExit("rustdesk_server: no server runs in "
                             f"{os.getcwd()}; --directory names another")
        return show_replies(replies, given.json)

    return run


def ask_doors(line):
    """The replies of all servers that run here, the ID server's first."""
    return [reply for role in ("both", "hbbs", "hbbr")
            for reply in ask_door(role, line)]


def ask_door(role, line):
    """[the reply] of a running server to a line; [] if none runs in this
    role."""
    if not hasattr(socket, "AF_UNIX"):  # on Windows it has no door
        return []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(ORDER_SECONDS)
        try:
            sock.connect(f"./{door_name(role)}")
        except (FileNotFoundError, ConnectionRefusedError):
            return []
        except PermissionError:
            return [{"fault": "only the server's user and root may ask it"}]
        except BlockingIOError:  # others wait at the door already
            return [{"fault": "the server does not answer"}]
        try:
            sock.sendall(json.dumps(line).encode() + b"\n")
            with sock.makefile("rb") as file:
                return [json.loads(file.readline())]
        except (OSError, ValueError):
            return [{"fault": "the server does not answer"}]


#: How long a running server may take to answer.
ORDER_SECONDS = 30.0


def show_replies(replies, as_json):
    """Print what servers replied; the exit status."""
    faults = [reply["fault"] for reply in replies if "fault" in reply]
    if as_json:
        print(json.dumps([reply for reply in replies if reply]))
    else:
        for reply in replies:
            show_table(reply.get("columns", []), reply.get("rows", []))
            if reply.get("said"):
                print(reply["said"])
    for fault in faults:
        print(f"rustdesk_server: {fault}", file=sys.stderr)
    return 1 if faults else 0


#: A column of ids is no wider, since strangers choose them: a longer one moves its
#: own row only.
MAX_ID_COLUMN = 24


def show_table(columns, rows):
    """Print rows below their columns' names, each as wide as it must be."""
    if rows:
        rows = [[printable(str(cell)) for cell in row] for row in [columns, *rows]]
        widths = [max(map(len, column)) for column in zip(*rows)]
        widths = [min(width, MAX_ID_COLUMN) if name in ("id", "peer") else width
                  for name, width in zip(columns, widths)]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths)]
            print("  ".join(cells).rstrip())


COMMANDS = {
    **{command: order(command) for command in ORDERS},
    "hbbs": lambda arguments: run_role("hbbs", arguments),
    "hbbr": lambda arguments: run_role("hbbr", arguments),
    "check": check,
    "config": show_config,
    "client-config": show_client_config,
    "doctor": doctor,
    "backup": maintain(
        "backup", "Write key, store and configuration of the working directory into "
        "one file. A server may be running.",
        [("file", "the file to write, mode 0600")],
        [("--no-key", "leave the key out")],
        lambda given: back_up(".", given.file, not given.no_key)),
    "restore": maintain(
        "restore", "Bring back what a backup holds; the server must be stopped.",
        [("file", "the backup")],
        [("--replace-key", "even if the backup holds another key")],
        lambda given: locked(restore, ".", given.file, given.replace_key)),
    "import": maintain(
        "import", "Take over key, peers and lists of an official server.",
        [("source", "its data directory, or its db_v2.sqlite3")], [], take_over),
    "export-official": maintain(
        "export-official", "Write key, peers and lists as the official server keeps "
        "them.", [("target", "the directory to write them to")], [],
        lambda given: export_official(".", given.target)),
    "rotate-key": maintain(
        "rotate-key", "Put a new key in the place of a leaked one, which is kept "
        "aside.", [], [], lambda given: rotate_key(".", os.urandom)),
    "genkeypair": generate_keypair,
    "validatekeypair": validate_keypair,
}


def keep_standard_descriptors():
    """Started with standard output closed, no socket may take its number."""
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            return


#: What this server has in its directory.
OWN_FILES = (
    KEY_FILE, PUBLIC_KEY_FILE, STORE_FILE, STORE_FILE + ".new", STORE_FILE + ".bad",
    OFFICIAL_STORE_FILE, SLOWED_FILE, REFUSED_FILE, CHANGES_FILE, ".env",
    ".hbbs.lock", ".hbbr.lock", *map(door_name, ("both", "hbbs", "hbbr")))

#: What output to a full disk or file, a closed terminal and a closed pipe ends in.
OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)


def run_command(arguments):
    """Run the subcommand named first, or both roles; returns the exit
    status."""
    if arguments and arguments[0] in COMMANDS:
        if hasattr(signal, "SIGPIPE") and arguments[0] not in ROLES:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as in `config | head`
        return COMMANDS[arguments[0]](arguments[1:])
    return run_role(None, arguments)


def main(arguments):
    """Run what the arguments ask for, and see that all it prints is written;
    returns the exit status."""
    keep_standard_descriptors()
    try:
        try:
            return run_command(arguments)
        finally:
            if sys.stdout is not None:  # it was closed from the start
                sys.stdout.flush()
    except OSError as error:
        if error.filename is not None or error.errno not in OUTPUT_ERRORS:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the rest goes there at the end
        if error.errno == errno.EPIPE:  # as in `doctor | head`
            return 1
        raise SystemExit(
            f"rustdesk_server: cannot write the output: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
