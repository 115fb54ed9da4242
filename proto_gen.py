#!/usr/bin/env python3
"""Write the Messages section of rustdesk_server.py from SCHEMA.

    proto_gen.py                     regenerate the section, if it is out of step
    proto_gen.py --check             exit 1 and show the difference if it is
    proto_gen.py --compare F.proto   exit 1 and list where F.proto differs from SCHEMA

SCHEMA is the protocol's messages in proto3, written from the specification of the
wire and from nobody's .proto file.  A parser turns it into a small model, and a
generator turns the model into classes whose encode and decode are unrolled, so that
the server needs neither protobuf nor reflection.  The generated text stands in the
hand-written file between two marker lines, the second with a checksum: text that was
edited by hand is not overwritten, because the edit belongs here.

Needs Python 3.9 and its standard library.

SPDX-License-Identifier: MIT
"""

import argparse
import collections
import contextlib
import dataclasses
import difflib
import hashlib
import keyword
import os
import re
import shutil
import sys
import tempfile
import textwrap

# == 1. Schema =================================================================
#
# Every message of the rendezvous protocol, and IdPk, which the server signs.
# A change to the protocol is made here and nowhere else.

SCHEMA = """\
syntax = "proto3";
package hbb;

// ---- Enumerations.  They are open: an unknown number is kept as it is.

enum ConnType {
  DEFAULT_CONN = 0;
  FILE_TRANSFER = 1;
  PORT_FORWARD = 2;
  RDP = 3;
  VIEW_CAMERA = 4;
  TERMINAL = 5;
}

enum NatType {
  UNKNOWN_NAT = 0;
  ASYMMETRIC = 1;
  SYMMETRIC = 2;
}

// ---- Registration: a peer says where it is, and which key is its own.

message RegisterPeer {
  string id = 1;
  int32 serial = 2;
}

message RegisterPeerResponse {
  bool request_pk = 2;  // there is no field 1
}

message RegisterPk {
  string id = 1;
  bytes uuid = 2;
  bytes pk = 3;         // Ed25519 public key, 32 bytes
  string old_id = 4;    // only when the id changes
  bool no_register_device = 5;
}

message RegisterPkResponse {
  enum Result {
    OK = 0;
    UUID_MISMATCH = 2;
    ID_EXISTS = 3;
    TOO_FREQUENT = 4;
    INVALID_ID_FORMAT = 5;
    NOT_SUPPORT = 6;
    SERVER_ERROR = 7;
    NOT_DEPLOYED = 8;
  }
  Result result = 1;
  int32 keep_alive = 2;  // seconds
}

// ---- Connecting: A asks for B, and both are told about each other.

message PunchHoleRequest {
  string id = 1;
  NatType nat_type = 2;
  string licence_key = 3;
  ConnType conn_type = 4;
  string token = 5;
  string version = 6;
  int32 udp_port = 7;
  bool force_relay = 8;
  int32 upnp_port = 9;
  bytes socket_addr_v6 = 10;
  string switch_code = 11;
  string webrtc_sdp_offer = 12;  // from client 1.5.0
}

message ControlPermissions {
  enum Permission {
    keyboard = 0;
    remote_printer = 1;
    clipboard = 2;
    file = 3;
    audio = 4;
    camera = 5;
    terminal = 6;
    tunnel = 7;
    restart = 8;
    recording = 9;
    block_input = 10;
    remote_modify = 11;
    privacy_mode = 12;
  }
  uint64 permissions = 1;  // two bits per permission
}

message ControlledContext {
  string conn_audit_ref = 1;
}

message PunchHole {
  bytes socket_addr = 1;
  string relay_server = 2;
  NatType nat_type = 3;
  int32 udp_port = 4;
  bool force_relay = 5;
  int32 upnp_port = 6;
  bytes socket_addr_v6 = 7;
  ControlPermissions control_permissions = 8;
  ControlledContext controlled_context = 9;
  string webrtc_sdp_offer = 10;  // from client 1.5.0
}

message PunchHoleSent {
  bytes socket_addr = 1;
  string id = 2;
  string relay_server = 3;
  NatType nat_type = 4;
  string version = 5;
  int32 upnp_port = 6;
  bytes socket_addr_v6 = 7;
  string webrtc_sdp_answer = 8;  // from client 1.5.0
}

message PunchHoleResponse {
  enum Failure {
    ID_NOT_EXIST = 0;
    OFFLINE = 2;
    LICENSE_MISMATCH = 3;
    LICENSE_OVERUSE = 4;
  }
  bytes socket_addr = 1;
  bytes pk = 2;
  Failure failure = 3;
  string relay_server = 4;
  oneof union {
    NatType nat_type = 5;
    bool is_local = 6;
  }
  string other_failure = 7;
  int32 feedback = 8;
  bool is_udp = 9;
  int32 upnp_port = 10;
  bytes socket_addr_v6 = 11;
  string webrtc_sdp_answer = 12;  // from client 1.5.0
}

message FetchLocalAddr {
  bytes socket_addr = 1;
  string relay_server = 2;
  bytes socket_addr_v6 = 3;
  ControlPermissions control_permissions = 4;
  ControlledContext controlled_context = 5;
}

message LocalAddr {
  bytes socket_addr = 1;
  bytes local_addr = 2;
  string relay_server = 3;
  string id = 4;
  string version = 5;
  bytes socket_addr_v6 = 6;
}

message IceCandidate {  // from client 1.5.0
  string id = 1;
  bytes socket_addr = 2;
  string session_key = 3;
  string candidate = 4;
}

// ---- Relaying.

message RequestRelay {
  string id = 1;
  string uuid = 2;
  bytes socket_addr = 3;
  string relay_server = 4;
  bool secure = 5;
  string licence_key = 6;
  ConnType conn_type = 7;
  string token = 8;
  ControlPermissions control_permissions = 9;
  ControlledContext controlled_context = 10;
  string switch_code = 11;
}

message RelayResponse {
  bytes socket_addr = 1;
  string uuid = 2;
  string relay_server = 3;
  oneof union {
    string id = 4;
    bytes pk = 5;
  }
  string refuse_reason = 6;
  string version = 7;
  reserved 8;           // request_region, which no client ever set
  int32 feedback = 9;
  bytes socket_addr_v6 = 10;
  int32 upnp_port = 11;
  string webrtc_sdp_answer = 12;  // from client 1.5.0
}

// ---- What else a client asks or is told.

message TestNatRequest {
  int32 serial = 1;
}

message TestNatResponse {
  int32 port = 1;
  ConfigUpdate cu = 2;
}

message ConfigUpdate {
  int32 serial = 1;
  repeated string rendezvous_servers = 2;
}

message SoftwareUpdate {
  string url = 1;
}

message OnlineRequest {
  string id = 1;        // who asks
  repeated string peers = 2;
}

message OnlineResponse {
  bytes states = 1;     // a bit per peer, most significant first
}

message KeyExchange {
  repeated bytes keys = 1;
}

message HealthCheck {
  string token = 1;
}

message HeaderEntry {
  string name = 1;
  string value = 2;
}

message HttpProxyRequest {
  string method = 1;
  string path = 2;
  repeated HeaderEntry headers = 3;
  bytes body = 4;
}

message HttpProxyResponse {
  int32 status = 1;
  repeated HeaderEntry headers = 2;
  bytes body = 3;
  string error = 4;
}

message PeerDiscovery {  // between peers of one network: no server sees it
  string cmd = 1;
  string mac = 2;
  string id = 3;
  string username = 4;
  string hostname = 5;
  string platform = 6;
  string misc = 7;
}

// ---- What every payload is.

message RendezvousMessage {
  oneof union {
    RegisterPeer register_peer = 6;
    RegisterPeerResponse register_peer_response = 7;
    PunchHoleRequest punch_hole_request = 8;
    PunchHole punch_hole = 9;
    PunchHoleSent punch_hole_sent = 10;
    PunchHoleResponse punch_hole_response = 11;
    FetchLocalAddr fetch_local_addr = 12;
    LocalAddr local_addr = 13;
    ConfigUpdate configure_update = 14;
    RegisterPk register_pk = 15;
    RegisterPkResponse register_pk_response = 16;
    SoftwareUpdate software_update = 17;
    RequestRelay request_relay = 18;
    RelayResponse relay_response = 19;
    TestNatRequest test_nat_request = 20;
    TestNatResponse test_nat_response = 21;
    PeerDiscovery peer_discovery = 22;
    OnlineRequest online_request = 23;
    OnlineResponse online_response = 24;
    KeyExchange key_exchange = 25;
    HealthCheck hc = 26;
    HttpProxyRequest http_proxy_request = 27;
    HttpProxyResponse http_proxy_response = 28;
    IceCandidate ice_candidate = 29;
  }
}

// ---- What the server signs: which key belongs to an id.

message IdPk {
  string id = 1;
  bytes pk = 2;
  string dtls_fingerprint = 3;  // from client 1.5.0
}
"""

# == 2. Model ==================================================================
#
# What a .proto file says, as far as the bytes on the wire depend on it.


class ProtoError(Exception):
    """A .proto text that cannot be understood, or not be generated from."""


@dataclasses.dataclass
class Field:
    """A field of a message; its type is a scalar or a full name."""

    name: str
    number: int
    type: str
    label: str = ""         # "", "repeated", "optional" or "required"
    oneof: str = ""
    line: int = 0


@dataclasses.dataclass
class Enumeration:
    """An enumeration: number by name."""

    name: str
    values: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class MessageType:
    """A message: field by name, in the order written."""

    name: str
    fields: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Model:
    """Messages and enumerations by full name: Outer.Inner, no package."""

    messages: dict = dataclasses.field(default_factory=dict)
    enumerations: dict = dataclasses.field(default_factory=dict)


# == 3. Parser =================================================================
#
# Recursive descent over a list of tokens.  It reads what SCHEMA uses with care
# and steps over the rest of the language, so that it can read other people's
# files.

Token = collections.namedtuple("Token", "text line")

TOKENS = re.compile(r"""
    (?P<space>   \s+ | //[^\n]* | /\*.*?\*/ )
  | (?P<token>   "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*'     # a string
               | [0-9][0-9A-Za-z.]*(?:(?<=[eE])[+-][0-9]+)?    # a number
               | \.?[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*
               | [-+;=<>{}()\[\],.:] | /(?!\*) )
""", re.VERBOSE | re.DOTALL)

SCALARS = frozenset(
    "double float int32 int64 uint32 uint64 sint32 sint64 fixed32 fixed64 sfixed32 "
    "sfixed64 bool string bytes".split())


def tokenise(source, file_name):
    """Split a .proto text into tokens, comments and white space left out."""
    tokens, position, line = [], 0, 1
    while position < len(source):
        match = TOKENS.match(source, position)
        if match is None:
            raise ProtoError("%s:%d: unexpected %r"
                             % (file_name, line, source[position:position + 10]))
        if match.lastgroup == "token":
            tokens.append(Token(match.group(), line))
        line += match.group().count("\n")
        position = match.end()
    tokens.append(Token("", line))
    return tokens


class Parser:
    """Reads one .proto text into a model that may already hold others."""

    def __init__(self, source, file_name, model):
        self.file_name = file_name
        self.tokens = tokenise(source, file_name)
        self.position = 0
        self.package = ""
        self.model = model

    # -- Tokens

    @property
    def next(self):
        return self.ahead(0)

    def ahead(self, count):
        """The text of a token further on; beyond the end it is empty."""
        return self.tokens[min(self.position + count, len(self.tokens) - 1)].text

    @property
    def line(self):
        return self.tokens[self.position].line

    def error(self, sentence):
        return ProtoError("%s:%d: %s" % (self.file_name, self.line, sentence))

    def take(self):
        """Return the next token and go past it."""
        if not self.next:
            raise self.error("the text ends too early")
        self.position += 1
        return self.tokens[self.position - 1].text

    def accept(self, text):
        """Go past the next token if it is this one, and say whether it was."""
        accepted = self.next == text
        self.position += accepted
        return accepted

    def expect(self, text):
        if not self.accept(text):
            raise self.error("expected %r, not %r" % (text, self.next))

    def name(self):
        if not re.fullmatch(r"[A-Za-z_]\w*", self.next):
            raise self.error("expected a name, not %r" % self.next)
        return self.take()

    def number(self):
        sign = -1 if self.accept("-") else 1
        digits = self.next
        if re.fullmatch(r"0[0-7]+", digits):
            digits = "0o" + digits
        try:
            number = sign * int(digits, 0)
        except ValueError:
            raise self.error("expected a number, not %r" % self.next) from None
        self.take()
        return number

    # -- What does not matter here

    def skip_statement(self):
        """Go past a statement that ends in `;` or in a block."""
        while not self.accept(";"):
            if self.next == "{":
                self.skip_block("{", "}")
                self.accept(";")
                return
            self.take()

    def skip_block(self, opening, closing):
        """Go past a bracketed part, others like it inside included."""
        self.expect(opening)
        depth = 1
        while depth:
            text = self.take()
            depth += (text == opening) - (text == closing)

    def end_of_field(self):
        if self.next == "[":
            self.skip_block("[", "]")
        self.expect(";")

    # -- Definitions

    def file(self):
        """Read the whole text."""
        while self.next:
            if self.accept("package"):
                self.package = self.take()
                self.expect(";")
            elif not self.definition(""):
                self.other_statement("syntax edition import option service extend")

    def other_statement(self, keywords):
        """Go past a statement that is legal here and says nothing to us."""
        if self.next not in [";", *keywords.split()]:
            raise self.error("did not expect %r here" % self.next)
        self.skip_statement()

    def definition(self, scope):
        """Read a message or an enumeration, if one is next."""
        if self.accept("message"):
            self.message(scope)
        elif self.accept("enum"):
            self.enumeration(scope)
        else:
            return False
        return True

    def define(self, table, definition):
        if definition.name in self.model.messages.keys() | self.model.enumerations:
            raise self.error("%s is defined twice" % definition.name)
        table[definition.name] = definition
        return definition

    def message(self, scope):
        message = MessageType(scope + self.name())
        self.define(self.model.messages, message)
        self.expect("{")
        while not self.accept("}"):
            self.member(message)

    def member(self, message):
        """Read one statement of a message."""
        if self.next in (";", "option", "reserved", "extensions", "extend"):
            self.skip_statement()
        elif self.accept("oneof"):
            self.oneof(message)
        elif self.accept("map"):
            self.map(message)
        elif not self.definition(message.name + "."):
            self.field(message)

    def oneof(self, message):
        name = self.name()
        self.expect("{")
        while not self.accept("}"):
            if self.next == "option":
                self.skip_statement()
            else:
                self.field(message, name)

    def field(self, message, oneof=""):
        labelled = self.next in ("repeated", "optional", "required")
        label = self.take() if labelled else ""
        kind = self.take()
        if not re.match(r"[.A-Za-z_]", kind):
            raise self.error("expected a type, not %r" % kind)
        self.add_field(message, kind, label, oneof)

    def map(self, message):
        """A map is, on the wire, a repeated message of a key and a value."""
        start = self.position
        self.skip_block("<", ">")
        kind = "".join(token.text for token in self.tokens[start:self.position])
        self.add_field(message, "map" + kind, "repeated", "")

    def add_field(self, message, kind, label, oneof):
        """Read name and number of a field and give it to its message."""
        line = self.line
        name = self.name()
        self.expect("=")
        field = Field(name, self.number(), kind, label, oneof, line)
        if not 0 < field.number < 1 << 29:
            raise self.error("field number %d is out of range" % field.number)
        if name in message.fields:
            raise self.error("%s.%s is defined twice" % (message.name, name))
        if field.number in [other.number for other in message.fields.values()]:
            raise self.error("number %d of %s is given to two fields"
                             % (field.number, message.name))
        message.fields[name] = field
        self.end_of_field()

    def enumeration(self, scope):
        enumeration = Enumeration(scope + self.name())
        self.define(self.model.enumerations, enumeration)
        self.expect("{")
        while not self.accept("}"):
            # A value may be named so, too.
            if self.next in (";", "option", "reserved") and self.ahead(1) != "=":
                self.skip_statement()
                continue
            name = self.name()
            self.expect("=")
            enumeration.values[name] = self.number()
            self.end_of_field()


def resolve(model, packages):
    """Replace the type of every field by its full name, if it is defined."""
    known = model.messages.keys() | model.enumerations.keys()
    for message in model.messages.values():
        for field in message.fields.values():
            if field.type not in SCALARS:
                field.type = full_name(field.type, message.name, packages, known)


def full_name(name, scope, packages, known):
    """The definition that a type name means in `scope`; else itself."""
    local = name.lstrip(".")
    for package in packages:
        if package and local.startswith(package + "."):
            local = local[len(package) + 1:]
    while scope and scope + "." + local not in known:
        scope = scope.rpartition(".")[0]
    found = scope + "." + local if scope else local
    return found if found in known else name


def parse(*texts):
    """Read .proto texts, (source, file name) each, into one model."""
    model, packages = Model(), set()
    for source, file_name in texts:
        parser = Parser(source, file_name, model)
        parser.file()
        packages.add(parser.package)
    resolve(model, packages)
    return model


# == 4. Generator ==============================================================
#
# A class per message: slots, an __init__ with defaults, and encode and decode
# with one short branch per field.  The section Wire format of the target does
# the rest.

#: How values of a type are written and read, and what they are by default.
#: `{}` is the value to write: as a number by varint(), or as bytes by sized().
Kind = collections.namedtuple("Kind", "wire_type default encoded decoded")

VARINT, LENGTH_DELIMITED = 0, 2

KINDS = {
    "string": Kind(LENGTH_DELIMITED, '""', "{}.encode()", "utf8(value)"),
    "bytes": Kind(LENGTH_DELIMITED, 'b""', "{}", "value"),
    "bool": Kind(VARINT, "False", "{}", "value != 0"),
    "int32": Kind(VARINT, "0", "{}", "int32(value)"),
    "uint64": Kind(VARINT, "0", "{}", "value"),
    "enum": Kind(VARINT, "0", "{}", "int32(value)"),
    "message": Kind(LENGTH_DELIMITED, "None", "{}.encode()", "%s.decode(value)"),
}

UNION_MESSAGE = "RendezvousMessage"

UNION_TEXT = '''

#: What a payload may hold: the members of RendezvousMessage by field number.
UNION = {
%s
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
'''


def generate(model):
    """The text of the Messages section."""
    check(model)
    parts = [enumeration_text(enumeration)
             for enumeration in model.enumerations.values()
             if "." not in enumeration.name]
    for message in model.messages.values():
        if message.name != UNION_MESSAGE:
            parts.append(message_text(message, model))
    return "\n\n".join(parts) + union_text(model)


def check(model):
    """Raise ProtoError for what is good proto3 but has no code here."""
    for message in model.messages.values():
        for field in message.fields.values():
            where = "line %d: %s.%s" % (field.line, message.name, field.name)
            check_field(field, where, model)
        if not message.fields or "." in message.name:
            raise ProtoError("no code for %s: empty or nested" % message.name)
        check_depth(message, model, ())
    check_union(model)


def check_union(model):
    """Every member is told by its class, so it is a message of its own."""
    if UNION_MESSAGE not in model.messages:
        raise ProtoError("there is no message %s" % UNION_MESSAGE)
    types = [field.type for field in model.messages[UNION_MESSAGE].fields.values()]
    if len(set(types)) < len(types) or not set(types) <= model.messages.keys():
        raise ProtoError("the members of %s are not messages, one of each kind"
                         % UNION_MESSAGE)


def check_field(field, where, model):
    if kind_name(field, model) not in KINDS:
        raise ProtoError("%s: no code for the type %s" % (where, field.type))
    if field.label not in ("", "repeated"):
        raise ProtoError("%s: no code for %s fields" % (where, field.label))
    if field.label and kind_of(field, model).wire_type == VARINT:
        raise ProtoError("%s: no code for repeated numbers" % where)
    if keyword.iskeyword(field.name):
        raise ProtoError("%s: Python has another use for this name" % where)


def check_depth(message, model, outer):
    """A message inside itself could be nested until Python gives up."""
    if message.name in outer:
        raise ProtoError("%s contains itself" % message.name)
    for field in message.fields.values():
        if field.type in model.messages:
            check_depth(model.messages[field.type], model, (*outer, message.name))


def kind_name(field, model):
    if field.type in model.messages:
        return "message"
    return "enum" if field.type in model.enumerations else field.type


def kind_of(field, model):
    return KINDS[kind_name(field, model)]


def wrapped(opening, words, closing):
    """Lines of `opening`, the words with commas between them, `closing`."""
    held = ", ".join(words) + closing
    return textwrap.wrap(held, 88, break_long_words=False, initial_indent=opening,
                         subsequent_indent=" " * len(opening))


def enumeration_text(enumeration, indent=""):
    """A namespace of plain numbers, since the enumeration is open."""
    lines = ["class %s:" % enumeration.name.rpartition(".")[2]]
    lines += ["    %s = %d" % item for item in enumeration.values.items()]
    return "".join(indent + line + "\n" for line in lines)


def message_text(message, model):
    """The class of a message."""
    members = list(message.fields.values())
    lines = ["class %s(Message):" % message.name]
    numbers = ", ".join("%s %d" % (field.name, field.number) for field in members)
    lines += textwrap.wrap(numbers, 79, initial_indent="    # ",
                           subsequent_indent="    # ")
    for enumeration in model.enumerations.values():
        if enumeration.name.rpartition(".")[0] == message.name:
            lines += [enumeration_text(enumeration, " " * 4)]
    names = ['"%s"' % field.name for field in members]
    lines += wrapped("    __slots__ = (", names, ",)" if len(names) == 1 else ")")
    lines += init_lines(members, model)
    lines += encode_lines(members, model)
    lines += decode_lines(message.name, members, model)
    return "\n".join(lines) + "\n"


def init_lines(members, model):
    """Every field as an argument; a oneof's member not chosen is None."""
    arguments, lines = ["self"], []
    for field in members:
        default = kind_of(field, model).default
        if field.label:
            arguments.append(field.name + "=()")
            lines.append("        self.%s = list(%s)" % (field.name, field.name))
        else:
            arguments.append("%s=%s" % (field.name, "None" if field.oneof else default))
            lines.append("        self.%s = %s" % (field.name, field.name))
    return ["", *wrapped("    def __init__(", arguments, "):"), *lines]


def tag_of(field, model):
    return field.number << 3 | kind_of(field, model).wire_type


def tag_text(tag):
    """The tag's varint, written out as bytes."""
    tag_bytes = [tag & 127 | 128, tag >> 7] if tag > 127 else [tag]
    return 'b"%s"' % "".join("\\x%02x" % byte for byte in tag_bytes)


def rivals(field, members):
    """The other members of a field's oneof: at most one of all is set."""
    return [other for other in members
            if field.oneof and other.oneof == field.oneof and other is not field]


def encode_lines(members, model):
    """Fields at their default are not written; a oneof's chosen one is."""
    lines = ["", "    def encode(self):", '        out = b""']
    for field in members:
        value = "self." + field.name
        if field.label:
            lines.append("        for item in %s:" % value)
            value = "item"
        else:
            lines.append("        if %s:" % condition(field, members, model))
        lines.append("            out += " + written(field, value, model))
    return [*lines, "        return out"]


def condition(field, members, model):
    """When a field is written.  Of a oneof, the last member that is set is."""
    value = "self." + field.name
    if field.oneof:
        later = [other for other in rivals(field, members)
                 if other.number > field.number]
        return " and ".join([value + " is not None"] + [
            "self.%s is None" % other.name for other in later])
    if kind_name(field, model) == "message":
        return value + " is not None"
    return value


def written(field, value, model):
    """The expression for a field's bytes."""
    kind = kind_of(field, model)
    tag = tag_text(tag_of(field, model))
    if kind.wire_type == LENGTH_DELIMITED:
        return "sized(%s, %s)" % (tag, kind.encoded.format(value))
    return "%s + varint(%s)" % (tag, kind.encoded.format(value))


def decode_lines(name, members, model):
    """Tags that no branch knows are unknown fields: they are passed over."""
    lines = ["", "    @staticmethod", "    def decode(data):",
             "        message = %s()" % name,
             "        for tag, value in read_fields(data):"]
    word = "if"
    for field in members:
        lines.append("            %s tag == %d:" % (word, tag_of(field, model)))
        lines.append("                " + taken(field, members, model))
        word = "elif"
    return [*lines, "        return message"]


def taken(field, members, model):
    """The statement that keeps a decoded value."""
    value = kind_of(field, model).decoded
    if "%s" in value:
        value %= field.type
    if field.label:
        return "message.%s.append(%s)" % (field.name, value)
    others = rivals(field, members)
    targets = ["message." + other.name for other in [field, *others]]
    return "%s = %s" % (", ".join(targets), ", ".join([value] + ["None"] * len(others)))


def union_text(model):
    """The union as two tables, and the functions for whole payloads."""
    members = model.messages[UNION_MESSAGE].fields.values()
    return UNION_TEXT % "\n".join(
        "    %d: %s," % (field.number, field.type) for field in members)


# == 5. Section ================================================================
#
# The generated text in its hand-written file: between two marker lines, the
# second with its checksum.

BEGIN = "# -- generated by proto_gen.py from its SCHEMA: edit that, then run it --"
END = "# -- end of generated code%s --"
END_LINE = re.compile(re.escape(END).replace("%s", r"(?:, sha256 ([0-9a-f]{16}))?"))


class SectionError(Exception):
    """The target has no section that may be written."""


#: A target in pieces: what is before, in and after its section, the checksum.
Target = collections.namedtuple("Target", "before section after checksum")


def checksum_of(section):
    return hashlib.sha256(section.encode()).hexdigest()[:16]


def split(source, file_name):
    """Take a target apart at its markers."""
    lines = source.splitlines(keepends=True)
    begins = [index for index, line in enumerate(lines) if line.rstrip() == BEGIN]
    ends = [index for index, line in enumerate(lines)
            if END_LINE.fullmatch(line.rstrip())]
    if len(begins) != 1 or len(ends) != 1 or begins > ends:
        raise SectionError("%s: it needs these two lines, once each, in this order:\n"
                           "%s\n%s" % (file_name, BEGIN, END % ""))
    begin, end = begins[0], ends[0]
    return Target("".join(lines[:begin]), "".join(lines[begin + 1:end]),
                  "".join(lines[end + 1:]),
                  END_LINE.fullmatch(lines[end].rstrip()).group(1))


def is_hand_edited(target):
    return bool(target.section.strip()) and (
        target.checksum != checksum_of(target.section))


def with_section(target, generated):
    """The text of a target with this section."""
    section = "\n\n" + generated + "\n\n"
    end = END % (", sha256 " + checksum_of(section))
    return "".join((target.before, BEGIN, "\n", section, end, "\n", target.after))


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def write(path, source):
    """Replace a file as a whole, so that nobody ever sees half of it."""
    path = os.path.realpath(path)
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path))
    try:
        with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(source)
        shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


# == 6. Comparison =============================================================
#
# Where somebody else's .proto file disagrees with SCHEMA about the bytes.


def differences(ours, theirs):
    """Yield one sentence per difference between two models."""
    yield from compared_tables(ours.messages, theirs.messages, "message",
                               compared_messages)
    yield from compared_tables(ours.enumerations, theirs.enumerations, "enum",
                               compared_enumerations)


def compared_tables(ours, theirs, what, compared):
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if name not in theirs:
            yield "%s %s: only in SCHEMA" % (what, name)
        elif name not in ours:
            yield "%s %s: not in SCHEMA" % (what, name)
        else:
            yield from compared(ours[name], theirs[name])


def compared_messages(ours, theirs):
    """Match fields by name, and what is left by number: it was renamed."""
    left = {field.number: field for name, field in theirs.fields.items()
            if name not in ours.fields}
    for name, field in ours.fields.items():
        where = "%s.%s" % (ours.name, name)
        other = theirs.fields.get(name) or left.pop(field.number, None)
        if other is None:
            yield "%s = %d: only in SCHEMA" % (where, field.number)
        else:
            yield from compared_fields(where, field, other)
    for field in left.values():
        yield "%s.%s = %d: not in SCHEMA" % (ours.name, field.name, field.number)


def compared_fields(where, ours, theirs):
    for aspect in ("name", "number", "type", "label", "oneof"):
        mine, other = getattr(ours, aspect), getattr(theirs, aspect)
        if mine != other:
            yield "%s: %s is %s in SCHEMA, %s there" % (
                where, aspect, mine or "none", other or "none")


def compared_enumerations(ours, theirs):
    for name in [*ours.values, *(name for name in theirs.values
                                 if name not in ours.values)]:
        mine, other = ours.values.get(name), theirs.values.get(name)
        if other is None:
            yield "%s.%s = %d: only in SCHEMA" % (ours.name, name, mine)
        elif mine is None:
            yield "%s.%s = %d: not in SCHEMA" % (ours.name, name, other)
        elif mine != other:
            yield "%s.%s: number is %d in SCHEMA, %d there" % (
                ours.name, name, mine, other)


# == 7. Command line ===========================================================
#
# 0: in step, or written.  1: a difference was found.  2: it could not be done.

HAND_EDITED = ("%s: the generated section was edited by hand.  Make the edit in "
               "SCHEMA or in the generator, in %s, or give it up with --force.")


def regenerate(path, model, force):
    """Write the section, if it differs and holds nobody's work."""
    source = read(path)
    target = split(source, path)
    if is_hand_edited(target) and not force:
        raise SectionError(HAND_EDITED % (path, os.path.basename(__file__)))
    wanted = with_section(target, generate(model))
    if wanted == source:
        print("%s: in step with SCHEMA" % path)
    else:
        write(path, wanted)
        print("%s: written" % path)
    return 0


def show_difference(path, model):
    """Print how the section differs from what would be written."""
    source = read(path)
    wanted = with_section(split(source, path), generate(model))
    sys.stdout.writelines(difflib.unified_diff(
        source.splitlines(keepends=True), wanted.splitlines(keepends=True),
        path, path + " from SCHEMA"))
    return 1 if wanted != source else 0


def show_comparison(paths, model):
    """Print where .proto files, taken together, differ from SCHEMA."""
    found = list(differences(model, parse(*((read(path), path) for path in paths))))
    for sentence in found:
        print(sentence)
    return 1 if found else 0


def arguments_parser():
    parser = argparse.ArgumentParser(
        description="Write the Messages section of rustdesk_server.py from SCHEMA.")
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)),
                          "rustdesk_server.py")
    parser.add_argument("--target", metavar="FILE", default=beside,
                        help="the file with the section (default: %(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true",
                      help="write nothing; exit 1 and show the difference, if any")
    what.add_argument("--force", action="store_true",
                      help="overwrite a section that was edited by hand")
    what.add_argument("--compare", metavar="FILE.proto", nargs="+",
                      help="list where these .proto files differ from SCHEMA")
    return parser


def main(arguments=None):
    options = arguments_parser().parse_args(arguments)
    try:
        model = parse((SCHEMA, "SCHEMA"))
        if options.compare:
            return show_comparison(options.compare, model)
        if options.check:
            return show_difference(options.target, model)
        return regenerate(options.target, model, options.force)
    except (ProtoError, SectionError, OSError, UnicodeDecodeError) as error:
        print("proto_gen: %s" % error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
