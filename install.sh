#!/bin/sh
# install.sh: installs, upgrades, moves in and removes rustdesk_server.py.
# Copyright (c) 2026 the authors of rustdesk_server.py; MIT, see the head of that file.
#
# Every line below belongs to a function, and the last line calls main: a copy that was
# cut short does nothing.  Python does what sh cannot do everywhere (python_part).  The
# state directory belongs to the service's user, so whatever is read or written in it is
# read and written as that user.
set -eu

usage() {
    cat <<'EOF'
usage: sh install.sh [options]            beside rustdesk_server.py
       curl -fsSL URL/install.sh | sh -s -- --from URL/rustdesk_server.py [options]

Installs rustdesk_server.py as a service.  Safe to run again: changes only what differs.

  --from URL|PATH       take rustdesk_server.py from there
  --sha256 SUM          refuse it unless it has this checksum
  --set NAME=VALUE      a setting for the server, such as port=21116 (repeatable)
  --dry-run             print what would be done and do nothing
  --upgrade             the same, but only where it is installed already
  --uninstall           remove service and program; key and devices stay
  --purge               remove everything, the key too (asks for a word)
  --import DIR          take over the key and the devices of an official server
  --no-import           leave an official server's data alone, begin with a new key
  --replace-official    stop and disable the official server, then take its place
  --open-firewall       run the firewall commands instead of printing them
  --without-pynacl      do not install PyNaCl (faster signatures, never needed)
  --package deb         build a Debian package in the current directory
  --service KIND        systemd, openrc, procd or cron, instead of what is found
  --python PATH         the Python to run it with
  --user NAME           the service's user (rustdesk-server)
  --prefix DIR          the program goes to DIR/bin (/usr/local)
  --state DIR           key and devices (/var/lib/rustdesk-server;
                        OpenWrt: /etc/rustdesk-server, which is flash)
  --root DIR            install into the file system at DIR, start nothing
EOF
}

# -- saying and doing -----------------------------------------------------------------

say() { printf '%s\n' "$*"; }

warn() { printf 'install.sh: %s\n' "$*" >&2; }

fail() {
    warn "$*"
    SAID_WHY=1
    exit 1
}

note() { # TEXT: say what is changed, and count it
    say "$1"
    CHANGES=$((CHANGES + 1))
}

have() { command -v "$1" >/dev/null 2>&1; }

run() { # COMMAND...: say it, then do it
    note "${DRY:+would }run: $*"
    [ "$DRY" ] || "$@"
}

put() { # FILE MODE TEXT: write a file, if it differs
    if [ -f "$1" ] && printf '%s\n' "$3" | cmp -s - "$1"; then
        return 0
    fi
    note "${DRY:+would }write: $1"
    SERVICE_CHANGED=1 UNIT_CHANGED=1
    [ ! "$DRY" ] || return 0
    mkdir -p "$(dirname "$1")"
    printf '%s\n' "$3" >"$1.new"
    chmod "$2" "$1.new"
    mv -f "$1.new" "$1"
}

link() { # TARGET LINK: a symbolic link, if it is not there
    if [ "$(readlink "$2" || true)" != "$1" ]; then
        run mkdir -p "$(dirname "$2")"
        run ln -sf "$1" "$2"
    fi
}

take_away() { # FILE...: remove what is there
    for file in "$@"; do
        if [ -e "$file" ] || [ -L "$file" ]; then
            run rm -f "$file"
        fi
    done
}

ask() { # QUESTION: the answer in ANSWER; from the terminal when stdin is the script
    ANSWER=
    printf '%s ' "$1"
    if [ "$PIPED" ]; then
        { read -r ANSWER </dev/tty; } 2>/dev/null || true
    else
        read -r ANSWER || true
    fi
}

# shellcheck disable=SC2317,SC2329  # called by a trap
on_exit() {
    status=$?
    trap - EXIT HUP INT TERM
    if [ "$status" -ne 0 ] && [ ! "$SAID_WHY" ]; then
        warn "stopped by what is said above, before it was finished: what is listed" \
            "was done, the rest was not. Mend it and run this again"
    fi
    case $CANDIDATE in *.new) rm -f "$CANDIDATE" ;; esac
    if [ "$UNPROVEN" ]; then
        warn "program, settings and service as they were before are started again"
        roll_back || true
    fi
    if [ "$status" -ne 0 ] && [ "$STOPPED_UNITS" ]; then
        warn "starting the official server again: $STOPPED_UNITS"
        # shellcheck disable=SC2086
        systemctl enable --now $STOPPED_UNITS || true
    fi
    [ ! "$TEMPORARY" ] || rm -rf "$TEMPORARY"
    exit "$status"
}

make_temporary() {
    [ "$TEMPORARY" ] || TEMPORARY=$(mktemp -d "${TMPDIR:-/tmp}/rustdesk-install.XXXXXX")
}

# -- the part in Python ---------------------------------------------------------------

python_part() {
    cat <<'EOF'
import hashlib, os, re, signal, socket, sys, time

def find_user(root, name):
    """(uid, gid) of a user of the system, or of the one in a root directory."""
    if os.path.exists(root + "/etc/passwd"):
        with open(root + "/etc/passwd") as file:
            for row in (line.split(":") for line in file):
                if row[0] == name:
                    return int(row[2]), int(row[3])

def become(name, directory):
    """Be that user from here on, in the state directory; nothing to do if not root."""
    if name and os.getuid() == 0:
        uid, gid = find_user("", name)
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    os.umask(0o077)
    os.chdir(directory)
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "TMPDIR")}
    os.environ.clear()
    os.environ.update(kept, HOME=directory)

def canonical(line):
    return re.split("[=:]", line)[0].strip().lower().replace("-", "_")

def read_settings():
    try:
        with open(".env", encoding="utf-8-sig") as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []

def changed_settings(lines, wanted):
    """The lines with the wanted `name = value` in place."""
    lines = list(lines)
    end = next((i for i, line in enumerate(lines) if line.startswith("[")), len(lines))
    for item in filter(None, wanted.split("\n")):
        name, value = item.split("=", 1)
        row = name.strip() + " = " + value.strip()
        same = [i for i in range(end) if canonical(lines[i]) == canonical(row)
                and lines[i].strip()[:1] not in ("#", ";", "")]
        if same:
            lines[same[-1]] = row
        else:
            lines.insert(end, row)
            end += 1
    return lines

def cmd_version(path):
    """The version of a file that is whole Python, without running it."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    found = re.search(r"(?m)^VERSION = [\"\x27]([\w.+~-]+)[\"\x27]", text)
    if not found or not re.search(r"(?m)^if __name__ == .__main__.:\n.*\n*\Z", text):
        sys.exit("it is not a whole rustdesk_server.py")
    try:
        compile(text, path, "exec")
    except SyntaxError as error:
        sys.exit("it is not a whole rustdesk_server.py: %s" % error)
    print(found.group(1))

def cmd_sha256(path):
    with open(path, "rb") as file:
        print(hashlib.sha256(file.read()).hexdigest())

def cmd_user(root, name):
    print(*find_user(root, name) or ())

def cmd_add_user(root, name, home):
    """Add a user where no program does it (OpenWrt): number, no password, no shell."""
    taken = set()
    for table in "passwd", "group":
        with open(root + "/etc/" + table) as file:
            taken |= {line.split(":")[2] for line in file if line.count(":") > 1}
    number = next(n for n in range(980, 300, -1) if str(n) not in taken)
    rows = {"passwd": "%s:x:%d:%d::%s:/bin/false" % (name, number, number, home),
            "group": "%s:x:%d:" % (name, number), "shadow": name + ":*:0:0:99999:7:::"}
    for table, row in rows.items():
        if os.path.exists(root + "/etc/" + table):
            with open(root + "/etc/" + table, "a") as file:
                file.write(row + "\n")

def cmd_state(root, directory, name, dry):
    """Make the directory, 0700, and give it and its files to the user."""
    owner = find_user(root, name) if os.getuid() == 0 else None
    path = root + directory
    verb = "would " if dry else ""
    if not os.path.isdir(path):
        print(verb + "make directory: " + path + " (0700, " + name + ")")
        if dry:
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.mkdir(path, 0o700)
    if os.stat(path).st_mode & 0o777 != 0o700:
        print(verb + "set mode 0700: " + path)
        dry or os.chmod(path, 0o700)
    for entry in [path] + sorted(os.path.join(path, n) for n in os.listdir(path)):
        if owner and os.lstat(entry).st_uid != owner[0]:
            print(verb + "give to " + name + ": " + entry)
            dry or os.chown(entry, *owner, follow_symlinks=False)

def cmd_set(name, directory, wanted, dry):
    """Put settings into .env; the old file stays as .env.previous."""
    there = os.path.isdir(directory)
    if there:
        os.chdir(directory) if dry else become(name, directory)
    old = read_settings() if there else []
    new = changed_settings(old, wanted)
    for row in new:
        if row not in old:
            print(("would set " if dry else "set ") + row.split(" = ")[0] + " in "
                  + directory + "/.env")
    if new == old or dry:
        return
    if old:
        os.replace(".env", ".env.previous")
    with open(".env.new", "w", encoding="utf-8") as file:
        file.write("\n".join(new) + "\n")
    os.replace(".env.new", ".env")

def cmd_unset(name, directory):
    """Take back what cmd_set did."""
    become(name, directory)
    if os.path.exists(".env.previous"):
        os.replace(".env.previous", ".env")
    else:
        os.remove(".env")

def cmd_ports(directory, wanted):
    """Port, address for health, all TCP ports, and `low` if one needs a right."""
    found, lines = {}, []
    if os.path.isdir(directory):
        os.chdir(directory)
        lines = read_settings()
    for line in changed_settings(lines, wanted):
        if line.startswith("["):
            break
        if "=" in line and line.strip()[0] not in "#;":
            found[canonical(line)] = line.split("=", 1)[1].strip().strip("\"\x27")
    port = found.get("port", "")
    port = int(port) if port.isdigit() and int(port) else 21116
    extra = [int(n) for n in re.findall(r"(?:^|[:,])\s*(\d+)\s*(?=,|$)",
                                        found.get("listen", ""))]
    api = found.get("api_port", "")
    low = min([port - 2] + extra + [int(api) for _ in api[:1] if api.isdigit()]) < 1024
    tcp = ["%d-%d" % (port - 2, port + 3)] + ["%d" % n for n in extra]
    print(port, found.get("bind") or "127.0.0.1", ",".join(tcp), "low" if low else "")

def is_healthy(host, port):
    """Whether GET /healthz is answered with 200."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as link:
            link.settimeout(2)
            link.connect((host.strip("[]").encode(), int(port)))
            link.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return b" 200 " in link.recv(64)
    except OSError:
        return False

def is_alive(pid):
    try:
        with open("/proc/%d/stat" % pid) as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

def cmd_healthy(host, port, seconds, watched):
    """Healthy twice in a row, a second apart (a crash loop is healthy now and then).

    No need to wait for a process whose number is in the watched file and that ended.
    """
    end = time.monotonic() + float(seconds)
    row = 0
    while row < 2:
        row = row + 1 if is_healthy(host, port) else 0
        if float(seconds) == 0 or time.monotonic() > end:
            break
        if os.path.exists(watched) and not is_alive(int(open(watched).read())):
            sys.exit(1)
        row == 2 or time.sleep(1 if row else 0.25)
    sys.exit(row == 0)

def cmd_taken(host, port):
    """Whether somebody listens there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as link:
        link.settimeout(2)
        sys.exit(link.connect_ex((host.strip("[]").encode(), int(port))) != 0)

def cmd_as(name, directory, *command):
    become(name, directory)
    os.execv(command[0], command)

def cmd_spawn(name, directory, *command):
    """Start a server that no service manager looks after; its number in server.pid."""
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        os.read(reading, 1)  # ends when the server has been started, or could not be
        return
    os.setsid()
    become(name, directory)
    with open("server.pid", "w") as file:
        file.write("%d\n" % os.getpid())
    null = os.open(os.devnull, os.O_RDWR)
    said = os.open("start.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for number, file in enumerate((null, null, said)):
        os.dup2(file, number)
    os.execv(command[0], command)

def cmd_stop(name, directory, program):
    """Stop the server of server.pid, if it is one."""
    become(name, directory)
    try:
        with open("server.pid") as file:
            pid = int(file.read())
        with open("/proc/%d/cmdline" % pid) as file:
            ours = program in file.read().split("\0")
        for number, tries in (signal.SIGTERM, 150), (signal.SIGKILL, 20):
            while ours and is_alive(pid) and tries:
                tries % 150 and tries != 20 or os.kill(pid, number)
                tries -= 1
                time.sleep(0.1)
        os.remove("server.pid")
    except (OSError, ValueError):
        pass  # it has ended, or there was none

globals()["cmd_" + sys.argv[1]](*sys.argv[2:])
EOF
}

helper() { # VERB ARGUMENT...: a function of the Python part
    "$PYTHON" -I -c "$PYTHON_PART" "$@"
}

as_user() { # COMMAND...: in the state directory, as the service's user
    helper as "$RUN_USER" "$STATE" "$@"
}

# -- what is here ---------------------------------------------------------------------

set_defaults() {
    NAME=rustdesk-server FILE=rustdesk_server.py
    ACTION=install FROM='' SHA256='' SETS='' DRY='' IMPORT='' IMPORTING=1 REPLACE=''
    OPEN_FIREWALL='' PYNACL=1 KIND='' GIVEN_PYTHON='' ROOT=''
    PREFIX='' STATE='' SERVICE_USER=''
    CHANGES=0 SERVICE_CHANGED='' TEMPORARY='' UNPROVEN='' STOPPED_UNITS='' PIPED=1
    CANDIDATE='' SAID_WHY=''
    SETTINGS_CHANGED='' UNIT_CHANGED='' OLD_SERVICE='' SWAPPED=''
    OFFICIAL_KILLED='' NOT_STARTED=''
    PYTHON='' PYTHON_PART=$(python_part)
    HERE=''
    if [ -f "$0" ] && grep -q '^python_part() {' "$0"; then
        PIPED='' HERE=$(cd "$(dirname "$0")" && pwd)
    fi
}

parse_options() {
    while [ $# -gt 0 ]; do
        case $1 in
        --from | --sha256 | --set | --import | --service | --python | --user | \
            --prefix | --state | --root | --package)
            [ $# -gt 1 ] || fail "$1 needs a value; nothing was done (see --help)"
            take_option "$1" "$2"
            shift
            ;;
        --dry-run) DRY=1 ;;
        --upgrade | --uninstall | --purge) ACTION=${1#--} ;;
        --no-import) IMPORTING='' ;;
        --replace-official) REPLACE=1 ;;
        --open-firewall) OPEN_FIREWALL=1 ;;
        --without-pynacl) PYNACL='' ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) fail "there is no option $1; nothing was done (--help lists them)" ;;
        esac
        shift
    done
    case $PREFIX$STATE$ROOT$SERVICE_USER$GIVEN_PYTHON in
    *[!A-Za-z0-9._/+-]*)
        fail "paths and names may hold letters, digits and ._/+- only; nothing was done"
        ;;
    esac
}

take_option() { # OPTION VALUE
    case $1 in
    --from) FROM=$2 ;;
    --sha256) SHA256=$2 ;;
    --import) IMPORT=$(cd "$(dirname "$2")" && pwd)/$(basename "$2") ||
        fail "there is no $2; nothing was done" ;;
    --service) KIND=$2 ;;
    --python) GIVEN_PYTHON=$2 ;;
    --user) SERVICE_USER=$2 ;;
    --prefix) PREFIX=$(absolute "$2") ;;
    --state) STATE=$(absolute "$2") ;;
    --root) ROOT=$(absolute "$2") ;;
    --package)
        [ "$2" = deb ] || fail "--package knows deb only; nothing was done"
        ACTION=package
        ;;
    --set)
        case ${2%%=*} in
        "$2" | '' | *[!A-Za-z0-9_-]*) fail "--set wants name=value; nothing was done" ;;
        esac
        [ "$(say "$2" | wc -l)" -eq 1 ] || fail "--set wants one line; nothing was done"
        SETS="$SETS$2
"
        ;;
    esac
}

absolute() { # PATH
    case $1 in
    /*) printf '%s\n' "${1%/}" ;;
    *) printf '%s\n' "$PWD/${1%/}" ;;
    esac
}

find_service_kind() {
    if [ ! "$KIND" ]; then
        if [ -d /run/systemd/system ] && [ ! "$ROOT" ]; then
            KIND=systemd
        elif [ -x "$ROOT/sbin/procd" ]; then
            KIND=procd
        elif [ -x "$ROOT/sbin/openrc-run" ]; then
            KIND=openrc
        elif [ "$ROOT" ] && [ -e "$ROOT/usr/lib/systemd/systemd" ]; then
            KIND=systemd
        elif [ "$ROOT" ]; then
            fail "nothing was done: name the service manager with --service"
        else
            KIND=cron
        fi
    fi
    LIVE=1
    [ ! "$ROOT$DRY" ] || LIVE=''
    case $KIND in
    systemd)
        SERVICE_FILE=$ROOT/etc/systemd/system/$NAME.service
        [ -d /run/systemd/system ] || LIVE=''
        ;;
    openrc | procd) SERVICE_FILE=$ROOT/etc/init.d/$NAME ;;
    cron) SERVICE_FILE='' ;;
    *) fail "--service knows systemd, openrc, procd and cron; nothing was done" ;;
    esac
}

find_places() { # what was given, else what an earlier run wrote down, else defaults
    : "${SERVICE_USER:=$(recorded user)}"
    : "${SERVICE_USER:=$NAME}"
    : "${PREFIX:=$(recorded prefix)}"
    : "${STATE:=$(recorded state)}"
    if [ "$KIND" = procd ]; then
        : "${PREFIX:=/usr}" "${STATE:=/etc/$NAME}"
    fi
    : "${PREFIX:=/usr/local}" "${STATE:=/var/lib/$NAME}"
    case $STATE in
    /*/*) ;;
    *) fail "$STATE is no place for a state directory; nothing was done" ;;
    esac
    WAS_INSTALLED=$(recorded user)
    PROGRAM=$PREFIX/bin/$FILE HOME_DIR=$ROOT$STATE RUN_USER=$SERVICE_USER
    [ ! "$ROOT" ] || RUN_USER=''
    [ "$KIND" != cron ] || [ ! -f "$PROGRAM" ] || WAS_INSTALLED=1
}

recorded() { # NAME: its value in the record of the service that is installed
    if [ "$KIND" = cron ]; then
        crontab_of -l 2>/dev/null || true
    elif [ -f "$SERVICE_FILE" ]; then
        cat "$SERVICE_FILE"
    fi | sed -n "s|.*# by install.sh:.* $1=\([^ ]*\).*|\1|p"
}

record() {
    printf '# by install.sh: prefix=%s state=%s user=%s\n' \
        "$PREFIX" "$STATE" "$SERVICE_USER"
}

crontab_of() { # ARGUMENT...: crontab, for the service's user
    if [ "${SERVICE_USER:=$NAME}" = "$(id -un)" ]; then
        crontab "$@"
    else
        crontab -u "$SERVICE_USER" "$@"
    fi
}

find_rights() {
    if [ "$(id -u)" -ne 0 ] && [ ! "$ROOT$DRY" ]; then
        if [ ! "$PREFIX" ] || [ ! "$STATE" ]; then
            fail "nothing was done: run it as root (sudo sh install.sh ...), or, to" \
                "install for yourself alone, give --prefix and --state (and the same" \
                "again to upgrade or remove)"
        fi
        KIND=cron SERVICE_USER=$(id -un)
    fi
    if [ ! "$ROOT" ] && have dpkg-query && [ "$ACTION" != package ] &&
        dpkg-query -W -f '${Status}' "$NAME" 2>/dev/null | grep -q ' installed$'; then
        fail "nothing was done: it is installed as a Debian package here. Upgrade it" \
            "with 'install.sh --package deb' and 'dpkg -i', remove it with" \
            "'dpkg -r $NAME'"
    fi
}

is_new_enough() { # PYTHON
    "$1" -I -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null
}

find_python() { # one that runs here (PYTHON), and its path for the service
    for PYTHON in ${GIVEN_PYTHON:-/usr/bin/python3 /usr/local/bin/python3 python3.13 \
        python3.12 python3.11 python3.10 python3.9 python3 pypy3} ''; do
        [ "$PYTHON" ] || break
        PYTHON=$(command -v "$PYTHON") || continue
        if is_new_enough "$PYTHON" && reaches "$PYTHON"; then
            SERVICE_PYTHON=$PYTHON
            [ ! "$ROOT" ] || [ "$GIVEN_PYTHON" ] || SERVICE_PYTHON=/usr/bin/python3
            return
        fi
    done
    fail "nothing was done: it needs Python 3.9 or later. $(python_command)"
}

reaches() { # PYTHON: a service's user cannot run what lies in somebody's home
    case $("$1" -I -c 'import sys; print(sys.executable)') in
    /root/* | /home/*) [ "$(id -u)" -ne 0 ] || [ "$GIVEN_PYTHON" ] || [ "$ROOT" ] ;;
    esac
}

find_packager() {
    for PACKAGER in apt-get dnf apk opkg pacman zypper ''; do
        ! have "${PACKAGER:-true}" || return 0
    done
}

python_command() {
    find_packager
    newer=''
    if have python3; then newer=.11; fi # there is one, and it is too old
    case $PACKAGER in
    apt-get) command='apt-get install -y python3' ;;
    dnf) command="dnf install -y python3$newer" ;;
    apk) command='apk add python3' ;;
    opkg) command='opkg update && opkg install python3-light' ;;
    pacman) command='pacman -S --noconfirm python' ;;
    zypper) command="zypper install -y python3${newer#.}" ;;
    *) command='(the means of your system)' ;;
    esac
    say "This installs it: $command"
}

# -- the file to install --------------------------------------------------------------

get_source() { # SOURCE: a whole rustdesk_server.py, and NEW_VERSION, what it says it is
    case $FROM in
    http://*) [ "$SHA256" ] || fail "nothing was done: http:// needs --sha256" ;;
    esac
    case $FROM in
    http://* | https://*)
        make_temporary
        SOURCE=$TEMPORARY/$FILE
        say "fetch: $FROM"
        fetch "$FROM" "$SOURCE" || fail "nothing was done: cannot fetch $FROM"
        ;;
    '')
        [ "$HERE" ] || fail "nothing was done: say where $FILE is, with --from URL|PATH"
        SOURCE=$HERE/$FILE
        ;;
    *)
        SOURCE=$FROM
        [ ! -d "$SOURCE" ] || SOURCE=$SOURCE/$FILE
        ;;
    esac
    [ -f "$SOURCE" ] || fail "nothing was done: there is no $SOURCE (see --from)"
    if [ "$SHA256" ] && [ "$(helper sha256 "$SOURCE")" != "$SHA256" ]; then
        fail "nothing was done: $SOURCE does not have the checksum of --sha256"
    fi
    NEW_VERSION=$(helper version "$SOURCE") ||
        fail "nothing was done: $SOURCE is broken"
}

fetch() { # URL FILE
    if have curl; then
        curl -fsSL --retry 2 -o "$2" "$1"
    elif have wget; then
        wget -q -O "$2" "$1"
    else
        "$PYTHON" -c 'import sys, urllib.request as r; r.urlretrieve(*sys.argv[1:])' \
            "$1" "$2"
    fi
}

# -- the official server --------------------------------------------------------------

find_official() { # its processes, units and data directories, in three lists
    OFFICIAL_PIDS='' OFFICIAL_UNITS='' OFFICIAL_DIR=''
    [ ! "$ROOT" ] || return 0
    places=''
    for entry in /proc/[0-9]*; do
        name=''
        { read -r name <"$entry/comm"; } 2>/dev/null || true
        case $name in
        hbbs | hbbr)
            OFFICIAL_PIDS="$OFFICIAL_PIDS ${entry#/proc/}"
            places="$places $(readlink "$entry/cwd" || true)"
            ;;
        esac
    done
    for entry in /etc/systemd/system/*.service /usr/lib/systemd/system/*.service; do
        if grep -q '^ExecStart=.*hbb[sr]' "$entry" 2>/dev/null &&
            ! grep -q "$FILE" "$entry"; then
            OFFICIAL_UNITS="$OFFICIAL_UNITS $(basename "$entry")"
            places="$places $(sed -n 's/^WorkingDirectory=//p' "$entry")"
        fi
    done
    for entry in $places /var/lib/* /opt/* /opt/*/* /srv/* /root /root/* /home/* \
        /home/*/*; do
        if [ ! "$OFFICIAL_DIR" ] && [ -f "$entry/id_ed25519" ] &&
            [ -f "$entry/db_v2.sqlite3" ]; then
            OFFICIAL_DIR=${entry%/}
        fi
    done
}

choose_import() { # IMPORT: the directory to take over, or nothing
    if [ "$IMPORT" ] && [ ! -e "$IMPORT" ]; then
        fail "nothing was done: there is no $IMPORT to import"
    fi
    if [ "$IMPORT" ] || [ ! "$OFFICIAL_DIR" ] || [ ! "$IMPORTING" ]; then
        return 0
    fi
    if [ -e "$HOME_DIR/peers.jsonl" ] || [ -e "$HOME_DIR/id_ed25519" ]; then
        if [ "$REPLACE" ] &&
            cmp -s "$OFFICIAL_DIR/id_ed25519" "$HOME_DIR/id_ed25519"; then
            IMPORT=$OFFICIAL_DIR # devices that came since the first import
        fi
        if [ "$OFFICIAL_DIR" = "$HOME_DIR" ]; then
            IMPORT=$OFFICIAL_DIR
            [ ! -e "$HOME_DIR/peers.jsonl" ] || IMPORT=''
        fi
    else
        say "An official server's key and devices are in $OFFICIAL_DIR."
        if [ "$PIPED$DRY" ] || [ ! -t 0 ]; then ANSWER=''; else
            ask "Take them over, so that clients need no change? [yes/no]"
        fi
        case $ANSWER in
        [Yy]*) IMPORT=$OFFICIAL_DIR ;;
        [Nn]*) ;;
        *) [ "$DRY" ] || fail "nothing was done. Run this again with one of" \
            "'--import $OFFICIAL_DIR' (clients need no change) or" \
            "'--no-import' (a new key, which every client must be given)" ;;
        esac
    fi
    if [ "$OFFICIAL_DIR" = "$HOME_DIR" ] && [ "$OFFICIAL_PIDS" ] &&
        [ ! "$REPLACE" ]; then
        fail "nothing was done: the official server runs in $STATE itself. Give" \
            "--replace-official to take its place, or another directory with --state"
    fi
}

replace_official() {
    [ "$REPLACE" ] || return 0
    for pid in $OFFICIAL_PIDS; do
        if grep -Eq 'docker|containerd|libpod|lxc' "/proc/$pid/cgroup" 2>/dev/null; then
            fail "hbbs or hbbr (pid $pid) runs in a container; stop it with the" \
                "container program (docker stop ...) and run this again"
        fi
    done
    if [ "$OFFICIAL_UNITS" ] && [ -d /run/systemd/system ]; then
        # shellcheck disable=SC2086
        run systemctl disable --now $OFFICIAL_UNITS
        [ "$DRY" ] || STOPPED_UNITS=$OFFICIAL_UNITS
    fi
    for pid in $OFFICIAL_PIDS; do
        if kill -0 "$pid" 2>/dev/null; then
            run kill "$pid"
            OFFICIAL_KILLED=1
        fi
    done
    [ ! "$OFFICIAL_KILLED" ] || [ "$DRY" ] || sleep 2
}

import_official() {
    [ "$IMPORT" ] || return 0
    if [ "$DRY" ]; then
        say "would import: $IMPORT"
        return 0
    fi
    say "import: $IMPORT"
    make_temporary
    mkdir "$TEMPORARY/official"
    if [ -d "$IMPORT" ]; then
        for file in id_ed25519 id_ed25519.pub db_v2.sqlite3 db_v2.sqlite3-wal \
            db_v2.sqlite3-shm blacklist.txt blocklist.txt; do
            [ ! -f "$IMPORT/$file" ] || cp "$IMPORT/$file" "$TEMPORARY/official/"
        done
        copy=$TEMPORARY/official
    else
        copy=$TEMPORARY/official/$(basename "$IMPORT")
        cp "$IMPORT" "$copy"
    fi
    [ "$(id -u)" -ne 0 ] || chown -R "$SERVICE_USER" "$TEMPORARY"
    stop_service # two processes must not write one store
    as_user "$SERVICE_PYTHON" -I "$CANDIDATE" import "$copy" ||
        fail "the import of $IMPORT failed (see above) and the program was not put in" \
            "place. $IMPORT was only read. Mend it and run this again"
    CHANGES=$((CHANGES + 1)) SERVICE_CHANGED=1
}

# -- user, directory, settings --------------------------------------------------------

make_user() {
    if [ "$(id -u)" -ne 0 ] || [ "$(helper user "$ROOT" "$SERVICE_USER")" ]; then
        return 0
    elif [ ! -f "$ROOT/etc/passwd" ]; then
        warn "no user $SERVICE_USER was made: there is no $ROOT/etc/passwd"
        return 0
    fi
    note "${DRY:+would }make user: $SERVICE_USER"
    if [ "$DRY" ]; then
        return 0
    elif [ ! "$ROOT" ] && have useradd; then
        useradd --system --user-group --no-create-home --home-dir "$STATE" \
            --shell /usr/sbin/nologin "$SERVICE_USER"
    elif [ ! "$ROOT" ] && have adduser && have addgroup; then
        addgroup -S "$SERVICE_USER"
        adduser -S -D -H -h "$STATE" -s /bin/false -G "$SERVICE_USER" "$SERVICE_USER"
    else
        helper add_user "$ROOT" "$SERVICE_USER" "$STATE"
    fi
}

make_state() {
    said=$(helper state "$ROOT" "$STATE" "$SERVICE_USER" "$DRY") ||
        fail "$STATE could not be made ready (see above). Nothing was started"
    [ ! "$said" ] || note "$said"
}

save_settings() {
    [ "$SETS" ] || return 0
    said=$(helper set "$RUN_USER" "$HOME_DIR" "$SETS" "$DRY") ||
        fail "the settings could not be written to $STATE/.env (see above)"
    if [ "$said" ]; then
        note "$said"
        SERVICE_CHANGED=1 SETTINGS_CHANGED=1
    fi
}

read_ports() {
    # shellcheck disable=SC2046
    set -- $(helper ports "$HOME_DIR" "$SETS")
    PORT=$1 ADDRESS=$2 TCP_PORTS=$3 LOW=${4:-}
}

install_pynacl() {
    if [ ! "$PYNACL" ] || [ "$ROOT" ] || [ "$(id -u)" -ne 0 ] ||
        "$PYTHON" -I -c 'import nacl.bindings' 2>/dev/null; then
        return 0
    fi
    find_packager
    case $PACKAGER-$SERVICE_PYTHON in
    apt-get-/usr/bin/python3)
        set -- apt-get -o Acquire::Retries=0 install -y -q --no-install-recommends \
            python3-nacl
        ;;
    dnf-/usr/bin/python3) set -- dnf install -y -q python3-pynacl ;;
    apk-/usr/bin/python3) set -- apk add -q py3-pynacl ;;
    pacman-/usr/bin/python3) set -- pacman -S --noconfirm python-pynacl ;;
    zypper-/usr/bin/python3) set -- zypper -n -q install python3-PyNaCl ;;
    *) return 0 ;;
    esac
    say "${DRY:+would }run: $*"
    [ "$DRY" ] || DEBIAN_FRONTEND=noninteractive "$@" </dev/null >/dev/null 2>&1 ||
        say "went on without PyNaCl: signatures take longer, nothing else is missing"
}

# -- the service ----------------------------------------------------------------------

unit_text() { # ARGUMENTS of the server
    capabilities='' private_users='PrivateUsers=yes' home='ProtectHome=yes'
    if [ "$LOW" ]; then
        capabilities=CAP_NET_BIND_SERVICE private_users="# (a port below 1024)"
    fi
    case $STATE in /home/* | /root/*) home='ProtectHome=read-only' ;; esac
    case $SERVICE_PYTHON in
    *pypy*) executable='# (PyPy compiles at run time: no MemoryDenyWriteExecute)' ;;
    *) executable='MemoryDenyWriteExecute=yes' ;;
    esac
    cat <<EOF
$(record)
[Unit]
Description=RustDesk ID server and relay (rustdesk_server.py)
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
Type=notify
User=$SERVICE_USER
Group=$SERVICE_USER
WorkingDirectory=$STATE
ExecStart=$SERVICE_PYTHON -I $PROGRAM$1
ExecReload=/bin/kill -HUP \$MAINPID
Restart=always
RestartSec=2
TimeoutStartSec=60
TimeoutStopSec=20
WatchdogSec=60
LimitNOFILE=65536
UMask=0077
ReadWritePaths=$STATE
ProtectSystem=strict
$home
NoNewPrivileges=yes
CapabilityBoundingSet=$capabilities
AmbientCapabilities=$capabilities
$private_users
PrivateTmp=yes
PrivateDevices=yes
DevicePolicy=closed
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RemoveIPC=yes
KeyringMode=private
LockPersonality=yes
$executable
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
EOF
}

openrc_text() {
    cat <<EOF
#!/sbin/openrc-run
$(record)
description="RustDesk ID server and relay (rustdesk_server.py)"
extra_started_commands="reload"
supervisor=supervise-daemon
command="$SERVICE_PYTHON"
command_args="-I $PROGRAM --log-file server.log"
command_user="$SERVICE_USER:$SERVICE_USER"
directory="$STATE"
umask=0077
respawn_delay=2
respawn_max=0
retry="TERM/20/KILL/5"
rc_ulimit="-n 65536"
error_logger="logger -t $NAME"
${LOW:+capabilities="^cap_net_bind_service"}

depend() {
    use net dns
    after firewall
}

reload() {
    ebegin "Reloading rustdesk-server"
    supervise-daemon "\$RC_SVCNAME" --signal HUP
    eend \$?
}
EOF
}

procd_text() {
    cat <<EOF
#!/bin/sh /etc/rc.common
$(record)
START=95
STOP=10
USE_PROCD=1

start_service() {
    procd_open_instance
    procd_set_param command /bin/sh -c \
        "umask 077; cd $STATE && exec $SERVICE_PYTHON -I $PROGRAM"
    procd_set_param user $SERVICE_USER
    procd_set_param respawn 3600 5 0
    procd_set_param limits nofile="65536 65536"
    procd_set_param term_timeout 20
    procd_set_param stdout 1
    procd_set_param stderr 1
    procd_close_instance
}

reload_service() {
    procd_send_signal $NAME '*' HUP
}
EOF
}

cron_text() {
    say "@reboot cd $STATE && umask 077 && echo \$\$ >server.pid &&" \
        "exec $SERVICE_PYTHON -I $PROGRAM --log-file server.log" \
        ">/dev/null 2>start.log" \
        "$(record)"
}

write_service() {
    if [ "$LOW" ] && { [ "$KIND" = procd ] || [ "$KIND" = cron ]; }; then
        warn "a port below 1024 is set, which $KIND cannot give to $SERVICE_USER: use" \
            "a higher one and let the firewall redirect the low one to it"
    fi
    [ ! -f "$SERVICE_FILE" ] || OLD_SERVICE=$(cat "$SERVICE_FILE")
    case $KIND in
    systemd) put "$SERVICE_FILE" 644 "$(unit_text '')" ;;
    openrc) put "$SERVICE_FILE" 755 "$(openrc_text)" ;;
    procd)
        put "$SERVICE_FILE" 755 "$(procd_text)"
        put "$ROOT/lib/upgrade/keep.d/$NAME" 644 "$STATE
$PROGRAM
/etc/init.d/$NAME
/etc/rc.d/S95$NAME"
        ;;
    cron) write_crontab "$(cron_text)" ;;
    esac
}

write_crontab() { # LINE, or nothing to take it away
    if [ "$ROOT" ] || ! have crontab; then
        [ ! "$1" ] || warn "no crontab here; have this run when the machine starts: $1"
        return 0
    fi
    old=$(crontab_of -l 2>/dev/null || true)
    new=$(printf '%s\n' "$old" | sed '/# by install.sh: /d; /^$/d' && say "$1")
    if [ "$old" = "$new" ]; then
        return 0
    elif [ "$DRY" ] || printf '%s\n' "$new" | crontab_of - 2>/dev/null; then
        note "${DRY:+would }write crontab of $SERVICE_USER: ${1:-(without our line)}"
    elif [ "$1" ]; then
        warn "crontab does not work here; have this run when the machine starts: $1"
    fi
}

enable_service() {
    case $KIND-$LIVE in
    systemd-1)
        [ ! "$UNIT_CHANGED" ] || run systemctl daemon-reload
        systemctl is-enabled -q $NAME 2>/dev/null || run systemctl enable -q $NAME
        ;;
    systemd-)
        link "/etc/systemd/system/$NAME.service" \
            "$ROOT/etc/systemd/system/multi-user.target.wants/$NAME.service"
        ;;
    openrc-*) link "/etc/init.d/$NAME" "$ROOT/etc/runlevels/default/$NAME" ;;
    procd-*)
        link "../init.d/$NAME" "$ROOT/etc/rc.d/S95$NAME"
        link "../init.d/$NAME" "$ROOT/etc/rc.d/K10$NAME"
        ;;
    esac
}

control() { # start|stop
    case $KIND-$1 in
    systemd-start) systemctl start --no-block $NAME ;;
    systemd-stop) systemctl stop $NAME ;;
    openrc-*) rc-service -q $NAME "$1" ;;
    procd-*) "/etc/init.d/$NAME" "$1" ;;
    cron-start)
        helper spawn "$SERVICE_USER" "$STATE" "$SERVICE_PYTHON" -I "$PROGRAM" \
            --log-file server.log
        ;;
    cron-stop) helper stop "$SERVICE_USER" "$STATE" "$PROGRAM" ;;
    esac
}

healthy() { # SECONDS
    watched=''
    [ "$KIND" != cron ] || watched=$STATE/server.pid
    helper healthy "$ADDRESS" "$PORT" "$1" "$watched"
}

stop_service() { # and wait until its port is free
    [ "$WAS_INSTALLED" ] && [ "$LIVE" ] || return 0
    say "stop: $NAME"
    UNPROVEN=1
    control stop || true
    for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
        helper taken "$ADDRESS" "$PORT" || return 0
        sleep 1
    done
    fail "something still listens on port $PORT 15 s after '$NAME' was stopped. The" \
        "new program was not started; end that, and run this again"
}

how_to_read_log() {
    case $KIND in
    systemd) say "journalctl -u $NAME -n 30" ;;
    procd) say "logread -e $NAME" ;;
    *) say "tail $STATE/server.log $STATE/start.log" ;;
    esac
}

# -- installing and upgrading ---------------------------------------------------------

stage_candidate() { # CANDIDATE: the program as it is to be, in its final directory
    CANDIDATE=$ROOT$PROGRAM
    if cmp -s "$SOURCE" "$ROOT$PROGRAM"; then
        return 0
    fi
    if [ "$DRY" ]; then
        note "would write: $ROOT$PROGRAM (version $NEW_VERSION)"
        return 0
    fi
    CANDIDATE=$ROOT$PROGRAM.new
    mkdir -p "$ROOT$PREFIX/bin"
    cp "$SOURCE" "$CANDIDATE"
    chmod 755 "$CANDIDATE"
}

check_candidate() { # its own `check`, with the settings, the key and the store of here
    if [ "$DRY" ] || [ "$ROOT" ]; then
        return 0
    fi
    said=$(as_user "$SERVICE_PYTHON" -I "$CANDIDATE" check 2>&1) && return 0
    say "$said"
    [ ! "$SETTINGS_CHANGED" ] || helper unset "$RUN_USER" "$HOME_DIR"
    fail "version $NEW_VERSION does not pass its own check with what is in $STATE" \
        "(see above). Program and settings were not changed; what ran still runs"
}

swap_program() {
    [ "$CANDIDATE" != "$ROOT$PROGRAM" ] || return 0
    if [ -f "$ROOT$PROGRAM" ]; then
        say "keep: $ROOT$PROGRAM.previous (version $(helper version "$ROOT$PROGRAM"))"
        cp -p "$ROOT$PROGRAM" "$ROOT$PROGRAM.previous.new"
        mv -f "$ROOT$PROGRAM.previous.new" "$ROOT$PROGRAM.previous"
        SWAPPED=1
    fi
    mv -f "$CANDIDATE" "$ROOT$PROGRAM"
    note "write: $ROOT$PROGRAM (version $NEW_VERSION)"
    SERVICE_CHANGED=1
}

roll_back() { # program, settings and service file as they were before this run
    UNPROVEN=''
    control stop || true
    if [ "$SWAPPED" ]; then
        cp -p "$PROGRAM.previous" "$PROGRAM.new"
        mv -f "$PROGRAM.new" "$PROGRAM"
    fi
    [ ! "$SETTINGS_CHANGED" ] || helper unset "$RUN_USER" "$HOME_DIR"
    if [ "$OLD_SERVICE" ]; then
        printf '%s\n' "$OLD_SERVICE" >"$SERVICE_FILE"
        [ "$KIND" != systemd ] || systemctl daemon-reload
    fi
    control start || true
    read_ports
    healthy 20
}

restart_service() {
    [ "$LIVE" ] && [ ! "$NOT_STARTED" ] || return 0
    if [ ! "$SERVICE_CHANGED" ] && healthy 0; then
        return 0
    fi
    stop_service
    note "start: $NAME"
    control start || true
    if healthy 20; then
        UNPROVEN='' STOPPED_UNITS=''
        say "healthy: http://$ADDRESS:$PORT/healthz answers"
        return 0
    fi
    say "-- the end of the log ($(how_to_read_log)):"
    sh -c "$(how_to_read_log)" 2>/dev/null | tail -n 10 || true
    if [ "$UNPROVEN" ] && [ "$SWAPPED$SETTINGS_CHANGED$UNIT_CHANGED" ]; then
        roll_back || fail "version $NEW_VERSION was not healthy within 20 s and was" \
            "rolled back, but what ran before is not healthy either:" \
            "$(how_to_read_log)"
        fail "version $NEW_VERSION was not healthy within 20 s: rolled back, and what" \
            "ran before runs again. Nothing of the upgrade is left"
    fi
    UNPROVEN=''
    fail "it is installed but not healthy: $ADDRESS port $PORT does not answer" \
        "/healthz after 20 s. See: $(how_to_read_log)"
}

look_for_conflict() { # somebody else on the port: install, but do not start
    if [ ! "$LIVE" ] || [ "$WAS_INSTALLED" ] || { [ "$REPLACE" ] &&
        [ "$OFFICIAL_PIDS" ]; } || ! helper taken "$ADDRESS" "$PORT"; then
        return 0
    fi
    NOT_STARTED="port $PORT is in use${OFFICIAL_PIDS:+ by the official server}"
}

do_install() {
    find_python
    if [ "$ACTION" = upgrade ] && [ ! -f "$ROOT$PROGRAM" ]; then
        fail "nothing was done: there is nothing to upgrade at $ROOT$PROGRAM"
    fi
    get_source
    find_official
    choose_import
    read_ports
    look_for_conflict
    make_user
    make_state
    save_settings
    stage_candidate
    check_candidate
    replace_official
    import_official
    swap_program
    install_pynacl
    write_service
    enable_service
    [ ! "$ROOT" ] || [ "$DRY" ] || make_state # the settings, too, are the user's
    restart_service
    show_firewall
    show_result
}

show_result() {
    if [ "$CHANGES" -eq 0 ]; then
        say "everything is as it should be: nothing was changed"
    elif [ "$DRY" ]; then
        say "dry run: nothing was changed"
    fi
    if [ -f "$HOME_DIR/id_ed25519.pub" ]; then
        say "In every RustDesk client: Settings, Network, ID/Relay server
  ID server: the public name or address of this machine
  Key:       $(cat "$HOME_DIR/id_ed25519.pub")
Keep a copy of $STATE/id_ed25519: clients trust the server by it."
    fi
    if [ "$NOT_STARTED" ]; then
        warn "installed, but not started: $NOT_STARTED. Free it and run this again" \
            "${OFFICIAL_PIDS:+(--replace-official stops the official server)}"
    elif [ ! "$LIVE$DRY" ]; then
        say "not started; it starts with the system"
    fi
}

# -- firewall -------------------------------------------------------------------------

find_firewall() {
    FIREWALL=''
    if have ufw && ! ufw status 2>/dev/null | grep -q inactive; then
        FIREWALL=ufw
    elif have firewall-cmd && firewall-cmd --state >/dev/null 2>&1; then
        FIREWALL=firewalld
    elif have uci && [ -f /etc/config/firewall ]; then
        FIREWALL=uci
    elif have nft && nft list chain inet filter input >/dev/null 2>&1; then
        FIREWALL=nftables
    fi
}

firewall_commands() { # PORTS PROTOCOL: what opens them, unless they are open
    ports=$1 protocol=$2
    case $FIREWALL in
    ufw)
        ports=$(say "$ports" | tr - :)
        ufw status 2>/dev/null | grep -q "^$ports/$protocol " ||
            say "ufw allow $ports/$protocol"
        ;;
    firewalld)
        firewall-cmd -q --permanent --query-port="$ports/$protocol" 2>/dev/null ||
            say "firewall-cmd -q --permanent --add-port=$ports/$protocol"
        ;;
    uci)
        rule=firewall.rustdesk_${protocol}_$(say "$ports" | tr - _)
        uci -q get "$rule" >/dev/null || cat <<EOF
uci set $rule=rule
uci set $rule.name=rustdesk-$protocol-$ports
uci set $rule.src=wan
uci set $rule.proto=$protocol
uci set $rule.dest_port=$ports
uci set $rule.target=ACCEPT
EOF
        ;;
    nftables)
        nft list chain inet filter input | grep -q "$protocol dport $ports accept" ||
            say "nft insert rule inet filter input $protocol dport $ports accept"
        ;;
    esac
}

show_firewall() {
    [ ! "$ROOT" ] || return 0
    find_firewall
    commands=$(for ports in $(say "$TCP_PORTS" | tr , ' '); do
        firewall_commands "$ports" tcp
    done
    firewall_commands "$PORT" udp)
    [ "$commands" ] || return 0
    case $FIREWALL in
    firewalld) commands="$commands
firewall-cmd -q --reload" ;;
    uci) commands="$commands
uci commit firewall
/etc/init.d/firewall reload" ;;
    esac
    if [ ! "$OPEN_FIREWALL" ]; then
        say "The firewall ($FIREWALL) is opened by these, or by --open-firewall:"
        say "$commands" | sed 's/^/  /'
        return 0
    fi
    make_temporary
    say "$commands" >"$TEMPORARY/firewall"
    while read -r command; do
        # shellcheck disable=SC2086
        run $command </dev/null
    done <"$TEMPORARY/firewall"
    [ "$FIREWALL" != nftables ] ||
        say "nftables forgets this at a restart: put it into /etc/nftables.conf too"
}

# -- removing -------------------------------------------------------------------------

do_uninstall() {
    remove_service
    if [ "$CHANGES" -eq 0 ]; then
        say "nothing was installed here"
    elif [ -d "$HOME_DIR" ]; then
        say "Key and devices stay in $HOME_DIR, with the user $SERVICE_USER (--purge" \
            "removes them)"
    fi
}

remove_service() {
    if [ "$LIVE" ] && [ "$WAS_INSTALLED" ]; then
        note "stop: $NAME"
        [ "$KIND" != cron ] || find_python
        control stop || warn "it could not be stopped; going on"
        [ "$KIND" != systemd ] || run systemctl disable -q $NAME
    fi
    case $KIND in
    systemd)
        take_away "$ROOT/etc/systemd/system/multi-user.target.wants/$NAME.service"
        ;;
    openrc) take_away "$ROOT/etc/runlevels/default/$NAME" ;;
    procd)
        take_away "$ROOT/etc/rc.d/S95$NAME" "$ROOT/etc/rc.d/K10$NAME" \
            "$ROOT/lib/upgrade/keep.d/$NAME"
        ;;
    cron) [ ! "$WAS_INSTALLED" ] || write_crontab '' ;;
    esac
    take_away "$SERVICE_FILE" "$ROOT$PROGRAM" "$ROOT$PROGRAM.previous" \
        "$ROOT$PROGRAM.new"
    [ "$KIND$LIVE" != systemd1 ] || [ "$CHANGES" -eq 0 ] || run systemctl daemon-reload
}

do_purge() {
    if [ -d "$HOME_DIR" ]; then
        [ -e "$HOME_DIR/id_ed25519" ] || [ -e "$HOME_DIR/.env" ] ||
            [ -e "$HOME_DIR/peers.jsonl" ] || [ ! "$(ls -A "$HOME_DIR")" ] ||
            fail "nothing was removed: $HOME_DIR does not look like a state directory"
        say "This deletes the key and every device in $HOME_DIR:"
        # shellcheck disable=SC2012
        ls -A "$HOME_DIR" | sed 's/^/  /'
        say "Clients that know the key will not trust another. There is no way back."
        if [ ! "$DRY" ]; then
            ask 'To delete it all, type the word purge:'
            [ "$ANSWER" = purge ] ||
                fail "the word was not typed: nothing was removed"
        fi
    fi
    remove_service
    [ ! -d "$HOME_DIR" ] || run rm -rf "$HOME_DIR"
    if [ "$SERVICE_USER" = $NAME ] && [ "$(id -u)" -eq 0 ] && [ ! "$ROOT" ] &&
        id $NAME >/dev/null 2>&1; then
        if have userdel; then
            run userdel $NAME
        elif have deluser; then
            run deluser $NAME
        else
            warn "the user $NAME stays; take its line out of /etc/passwd"
        fi
    fi
    [ "$CHANGES" -gt 0 ] || say "nothing was installed here"
}

# -- the Debian package ---------------------------------------------------------------

do_package() {
    have dpkg-deb || fail "nothing was built: there is no dpkg-deb here"
    find_python
    get_source
    PREFIX=/usr STATE=/var/lib/$NAME SERVICE_USER=$NAME PROGRAM=/usr/bin/$FILE LOW=''
    SERVICE_PYTHON=/usr/bin/python3
    package=$PWD/${NAME}_${NEW_VERSION}_all.deb
    if [ "$DRY" ]; then
        say "would write: $package"
        return 0
    fi
    make_temporary
    tree=$TEMPORARY/tree
    umask 022
    mkdir -p "$tree/DEBIAN" "$tree/usr/bin" "$tree/usr/lib/systemd/system" "$tree/etc"
    chmod 755 "$tree"
    cp "$SOURCE" "$tree$PROGRAM"
    unit_text " -c /etc/$NAME.conf" >"$tree/usr/lib/systemd/system/$NAME.service"
    cat >"$tree/etc/$NAME.conf" <<EOF
# Settings of rustdesk_server.py, one \`name = value\` a line (see --help).  They win
# over those in $STATE/.env.  For a port below 1024, 'systemctl edit $NAME':
#   [Service]
#   CapabilityBoundingSet=CAP_NET_BIND_SERVICE
#   AmbientCapabilities=CAP_NET_BIND_SERVICE
#   PrivateUsers=no
EOF
    say "/etc/$NAME.conf" >"$tree/DEBIAN/conffiles"
    cat >"$tree/DEBIAN/control" <<EOF
Package: $NAME
Version: $NEW_VERSION
Architecture: all
Maintainer: the authors of rustdesk_server.py <root@localhost>
Depends: python3 (>= 3.9), passwd
Recommends: python3-nacl
Section: net
Priority: optional
Description: RustDesk ID server and relay in one Python file
 Registration, hole punching and relay for RustDesk clients.
EOF
    deb_script preinst "if [ -e /etc/systemd/system/$NAME.service ]; then
    echo '$NAME: installed by install.sh already; run install.sh --uninstall first' >&2
    echo '(key and devices stay, and this package takes them over)' >&2
    exit 1
fi"
    deb_script postinst "[ \"\$1\" = configure ] || exit 0
id $NAME >/dev/null 2>&1 || useradd --system --user-group --no-create-home \\
    --home-dir $STATE --shell /usr/sbin/nologin $NAME
[ -d $STATE ] || mkdir -m 0700 -p $STATE
chown -R -h $NAME: $STATE
cd $STATE
runuser -u $NAME -- /usr/bin/python3 -I $PROGRAM check -c /etc/$NAME.conf || {
    echo '$NAME: see above; what runs was not restarted.  Mend it, then:' >&2
    echo 'dpkg --configure $NAME' >&2
    exit 1
}
! command -v systemctl >/dev/null || [ \"\${2:-}\" ] || systemctl -q enable $NAME
[ ! -d /run/systemd/system ] || { systemctl daemon-reload; systemctl restart $NAME; }"
    deb_script prerm "[ \"\$1\" = remove ] || exit 0
[ ! -d /run/systemd/system ] || systemctl stop $NAME
! command -v systemctl >/dev/null || systemctl -q disable $NAME"
    deb_script postrm "[ ! -d /run/systemd/system ] || systemctl daemon-reload
case \$1 in remove | purge)
    [ ! -d $STATE ] || echo 'Key and devices stay in $STATE; rm -r deletes them.' ;;
esac"
    chmod 755 "$tree$PROGRAM"
    run dpkg-deb --root-owner-group -Zgzip --build "$tree" "$package" >/dev/null
    say "write: $package"
}

deb_script() { # NAME TEXT
    printf '#!/bin/sh\nset -e\n%s\n' "$2" >"$tree/DEBIAN/$1"
    chmod 755 "$tree/DEBIAN/$1"
}

# -- the beginning --------------------------------------------------------------------

main() {
    set_defaults
    parse_options "$@"
    trap on_exit EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    if [ "$ACTION" = package ]; then
        do_package
        return 0
    fi
    find_rights
    find_service_kind
    find_places
    case $ACTION in
    uninstall) do_uninstall ;;
    purge) do_purge ;;
    *) do_install ;;
    esac
}

{ main "$@"; exit; }
