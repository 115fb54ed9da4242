#!/bin/sh
# install.sh: installs, upgrades, moves in and removes rustdesk_server.py.
# Copyright (c) 2026 the authors of rustdesk_server.py; MIT, see the head of that file.
#
# Every line belongs to a function and the last one calls main: a copy that was cut
# short does nothing.  `main` and `do_install` tell the story, top to bottom.
# The state directory belongs to the service's user, so what is written in it is
# written as that user.  Files are written beside their place and then moved there: a
# run that is killed leaves each old or new, and a mark by which the next one knows.
# shellcheck disable=SC2317,SC2329  # some are called by name: on_..., within
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
  --prefix DIR          the program goes to DIR/bin (/usr/local; OpenWrt: /usr)
  --state DIR           key and devices (/var/lib/rustdesk-server; OpenWrt: in /etc)
  --root DIR            install into the file system at DIR, start nothing
EOF
}

# -- the beginning --------------------------------------------------------------------

main() {
    NAME=rustdesk-server FILE=rustdesk_server.py
    NEWLINE='
'
    ACTION=install FROM='' SHA256='' SETS='' DRY='' IMPORT='' IMPORTING=1 REPLACE=''
    OPEN_FIREWALL='' PYNACL=1 KIND='' GIVEN_PYTHON='' ROOT='' PREFIX='' STATE=''
    SERVICE_USER='' SERVICE_FILE='' LIVE='' WAS_INSTALLED='' AS_ROOT='' LOW=''
    OFFICIAL_PIDS='' OFFICIAL_UNITS='' OFFICIAL_DIR='' STOPPED_UNITS='' NOT_STARTED=''
    CHANGES=0 RESTART='' UNIT_CHANGED='' OLD_SERVICE='' SWAP='' STOPPED='' UNDO=''
    MARK='' TEMPORARY='' SAID_WHY='' HERE='' PYTHON_PART=$(python_part)
    if [ -f "$0" ] && grep -q '^python_part() {' "$0"; then
        HERE=$(cd "$(dirname "$0")" && pwd)
    fi
    parse_options "$@"
    trap on_exit EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    if [ "$ACTION" != package ]; then
        find_service_kind
        find_places
    fi
    case $ACTION in
    install | upgrade) do_install ;;
    uninstall) do_uninstall ;;
    purge) do_purge ;;
    package) do_package ;;
    esac
}

# -- saying and doing -----------------------------------------------------------------

say() { printf '%s\n' "$*"; }

warn() { printf 'install.sh: %s\n' "$*" >&2; }

fail() {
    warn "$*"
    SAID_WHY=1
    exit 1
}

refuse() { fail "nothing was done: $*"; }

have() { command -v "$1" >/dev/null 2>&1; }

note() { # TEXT: say what is changed, and count it
    say "${DRY:+would }$1"
    CHANGES=$((CHANGES + 1))
}

run() { # COMMAND...: say it, then do it
    note "run: $*"
    [ "$DRY" ] || "$@"
}

put() { # FILE MODE TEXT: write a file, if it differs
    if [ -f "$1" ] && printf '%s\n' "$3" | cmp -s - "$1"; then
        return 0
    fi
    note "write: $1"
    RESTART=1 UNIT_CHANGED=1
    [ ! "$DRY" ] || return 0
    mkdir -p "$(dirname "$1")"
    printf '%s\n' "$3" >"$1.new"
    chmod "$2" "$1.new"
    mv -f "$1.new" "$1"
}

link() { # TARGET LINK: a symbolic link, if it is not there
    [ "$(readlink "$2" || true)" != "$1" ] || return 0
    [ -d "$(dirname "$2")" ] || run mkdir -p "$(dirname "$2")"
    run ln -sf "$1" "$2"
}

take_away() { # FILE...: remove what is there
    for file in "$@"; do
        if [ -e "$file" ] || [ -L "$file" ]; then run rm -f "$file"; fi
    done
}

ask() { # QUESTION: the answer in ANSWER; from the terminal when stdin is the script
    ANSWER=
    printf '%s ' "$1"
    [ ! "$HERE" ] || { read -r ANSWER || true; }
    [ "$HERE" ] || read -r ANSWER </dev/tty || true
}

make_temporary() {
    [ "$TEMPORARY" ] || TEMPORARY=$(mktemp -d "${TMPDIR:-/tmp}/rustdesk-install.XXXXXX")
}

on_exit() {
    status=$?
    trap - EXIT HUP INT TERM
    if [ "$status" -ne 0 ]; then
        [ "$SAID_WHY" ] || warn "stopped by what is said above: mend it, run this again"
        [ ! "$UNDO" ] || [ "$ROOT" ] || roll_back
        # shellcheck disable=SC2086
        [ ! "$STOPPED_UNITS" ] || systemctl enable --now $STOPPED_UNITS ||
            warn "the official server does not start again: $STOPPED_UNITS"
    fi
    [ ! "$MARK" ] || rm -f "$MARK" "$PROGRAM.new"
    [ ! "$TEMPORARY" ] || rm -rf "$TEMPORARY"
    exit "$status"
}

# -- installing and upgrading ---------------------------------------------------------

do_install() {
    find_python
    [ "$ACTION" = install ] || [ -f "$ROOT$PROGRAM" ] ||
        refuse "there is nothing to upgrade at $ROOT$PROGRAM"
    get_source
    find_official
    choose_import
    read_ports
    find_conflict
    see_what_was_killed
    make_user
    make_state
    save_settings
    stage_program
    check_program
    replace_official
    import_official
    swap_program
    install_pynacl
    write_service
    [ ! "$ROOT" ] || [ "$DRY" ] || make_state # the settings, too, are the user's
    restart_service
    show_firewall
    show_result
}

find_conflict() { # somebody else on the port: install, but do not start
    { [ "$REPLACE" ] && [ "$OFFICIAL_PIDS" ]; } || [ "$WAS_INSTALLED" ] ||
        [ ! "$LIVE" ] || is_free ||
        NOT_STARTED="port $PORT is in use${OFFICIAL_PIDS:+ by the official server}"
}

see_what_was_killed() { # what an earlier run changed and did not prove healthy
    [ "$WAS_INSTALLED" ] && [ "$LIVE" ] || return 0
    MARK=$PROGRAM.unproven
    [ ! -f "$MARK" ] || RESTART=1 UNDO=$(cat "$MARK")
}

undoable() { # WHAT: roll_back will see to it, in this run or, if it is killed, the next
    UNDO="$UNDO $1"
    [ ! "$MARK" ] || say "$UNDO" >"$MARK"
}

stage_program() { # CANDIDATE: the program as it is to be, in its final directory
    CANDIDATE=$ROOT$PROGRAM
    ! cmp -s "$SOURCE" "$CANDIDATE" || return 0
    note "write: $CANDIDATE (version $NEW_VERSION)"
    RESTART=1 SWAP=1
    [ ! "$DRY" ] || return 0
    CANDIDATE=$CANDIDATE.new
    mkdir -p "$ROOT$PREFIX/bin"
    cp "$SOURCE" "$CANDIDATE"
    chmod 755 "$CANDIDATE"
}

check_program() { # its own `check`, with the settings, the key and the store of here
    [ ! "$DRY$ROOT" ] || return 0
    said=$(as_user "$SERVICE_PYTHON" -I "$CANDIDATE" check 2>&1) || {
        say "$said"
        fail "version $NEW_VERSION does not pass its own check with what is in $STATE" \
            "(see above). Program and settings stay as they were"
    }
    [ "$WAS_INSTALLED" ] || UNDO=''
}

swap_program() {
    [ "$SWAP" ] && [ ! "$DRY" ] || return 0
    if [ -f "$ROOT$PROGRAM" ]; then
        say "keep: $ROOT$PROGRAM.previous"
        cp -p "$ROOT$PROGRAM" "$ROOT$PROGRAM.previous.new"
        mv -f "$ROOT$PROGRAM.previous.new" "$ROOT$PROGRAM.previous"
        undoable program
    fi
    mv -f "$CANDIDATE" "$ROOT$PROGRAM"
}

write_service() {
    case $LOW$KIND in
    1procd | 1cron) warn "$KIND gives nobody a port below 1024: use a higher one and" \
        "let the firewall redirect the low one to it" ;;
    esac
    [ ! -f "$SERVICE_FILE" ] || OLD_SERVICE=$(cat "$SERVICE_FILE")
    service install
    [ ! "$UNIT_CHANGED" ] || [ ! "$WAS_INSTALLED" ] || undoable unit
}

is_healthy() { [ "$(helper probe "$ADDRESS" "$PORT")" = healthy ]; }
is_free() { [ "$(helper probe "$ADDRESS" "$PORT")" = free ]; }

is_steady() { # twice in a row, since a crash loop is healthy now and then
    if is_healthy && sleep 1 && is_healthy; then return 0; fi
    if [ "$KIND" = cron ] && [ -f "$STATE/server.pid" ]; then # dead, not just born?
        cron_pid >/dev/null || { sleep 1 && cron_pid >/dev/null; } || end=0
    fi
    return 1
}

stop_service() { # and wait until its port is free
    [ "$WAS_INSTALLED" ] && [ "$LIVE" ] || return 0
    say "stop: $NAME"
    STOPPED=1
    undoable ''
    service stop || true
    within 15 is_free || fail "something still listens on port $PORT 15 s after $NAME" \
        "was stopped. End that, and run this again"
}

restart_service() {
    [ "$LIVE" ] && [ ! "$NOT_STARTED" ] || return 0
    [ "$RESTART" ] || ! is_healthy || return 0
    stop_service
    note "start: $NAME"
    service start || true
    if within 20 is_steady; then
        UNDO='' STOPPED_UNITS=''
        say "healthy: http://$ADDRESS:$PORT/healthz answers"
        return 0
    fi
    say "-- the end of the log ($(service log)):"
    sh -c "$(service log)" 2>/dev/null | tail -n 10 || true
    fail "version $NEW_VERSION is not healthy: within 20 s $ADDRESS port $PORT did" \
        "not answer /healthz. See: $(service log)"
}

roll_back() { # program, settings and service as they were, and running
    for what in $UNDO; do
        case $what in
        program)
            cp -p "$PROGRAM.previous" "$PROGRAM.new"
            mv -f "$PROGRAM.new" "$PROGRAM"
            ;;
        settings)
            as_user /bin/sh -c 'mv .env.previous .env; [ -s .env ] || rm .env'
            ;;
        unit)
            [ ! "$OLD_SERVICE" ] || say "$OLD_SERVICE" >"$SERVICE_FILE"
            [ "$KIND" != systemd ] || systemctl daemon-reload
            ;;
        esac
    done
    [ "$WAS_INSTALLED" ] && [ "$LIVE" ] || return 0
    SETS=''
    read_ports
    if [ "$STOPPED" ] || ! is_healthy; then
        service stop || true
        service start || true
    fi
    what='what ran before this runs again'
    within 20 is_steady || what="what ran before is not healthy either: $(service log)"
    warn "rolled back: $what"
}

show_result() {
    [ "$CHANGES" -gt 0 ] || say "everything is as it should be: nothing was changed"
    [ ! "$DRY" ] || say "dry run: nothing was changed"
    [ ! -f "$HOME_DIR/id_ed25519.pub" ] || cat <<EOF
In every RustDesk client: Settings, Network, ID/Relay server
  ID server: the public name or address of this machine
  Key:       $(cat "$HOME_DIR/id_ed25519.pub")
Keep a copy of $STATE/id_ed25519: clients trust the server by it.
EOF
    if [ "$NOT_STARTED" ]; then
        warn "installed, but not started: $NOT_STARTED. Free it and run this again" \
            "${OFFICIAL_PIDS:+(--replace-official stops the official server)}"
    elif [ ! "$LIVE$DRY" ]; then
        say "not started; it starts with the system"
    fi
}

# -- what is asked and what is here ---------------------------------------------------

parse_options() {
    while [ $# -gt 0 ]; do
        case $1 in
        --dry-run) DRY=1 ;;
        --upgrade | --uninstall | --purge) ACTION=${1#--} ;;
        --no-import) IMPORTING='' ;;
        --replace-official) REPLACE=1 ;;
        --open-firewall) OPEN_FIREWALL=1 ;;
        --without-pynacl) PYNACL='' ;;
        -h | --help) usage && exit 0 ;;
        *)
            [ $# -gt 1 ] || refuse "$1 is no option, or needs a value (see --help)"
            take_option "$1" "$2"
            shift
            ;;
        esac
        shift
    done
    [ ! "$IMPORT" ] || [ -d "$IMPORT" ] || refuse "there is no directory $IMPORT"
    case $PREFIX$STATE$ROOT$SERVICE_USER$GIVEN_PYTHON in
    *[!A-Za-z0-9._/+-]*) refuse "paths and names may hold letters, digits and ._/+-" ;;
    esac
}

take_option() { # OPTION VALUE
    case $1 in
    --from) FROM=$2 ;;
    --sha256) SHA256=$2 ;;
    --set) add_setting "$2" ;;
    --import) IMPORT=$(absolute "$2") ;;
    --service) KIND=$2 ;;
    --python) GIVEN_PYTHON=$2 ;;
    --user) SERVICE_USER=$2 ;;
    --prefix) PREFIX=$(absolute "$2") ;;
    --state) STATE=$(absolute "$2") ;;
    --root) ROOT=$(absolute "$2") ;;
    --package) ACTION=package PACKAGE=$2 ;;
    *) refuse "there is no option $1 (--help lists them)" ;;
    esac
}

add_setting() { # NAME=VALUE
    case $1 in
    *"$NEWLINE"*) refuse "--set wants one line" ;;
    *=*) ;;
    *) refuse "--set wants name=value" ;;
    esac
    case ${1%%=*} in '' | *[!A-Za-z0-9_-]*) refuse "--set wants name=value" ;; esac
    SETS=$SETS$1$NEWLINE
}

is_number() { # TEXT
    case $1 in '' | *[!0-9]*) return 1 ;; esac
}

absolute() { # PATH
    case $1 in
    /) say /. ;; # not nothing, which would be the default
    /*) say "${1%/}" ;;
    *) say "$PWD/${1%/}" ;;
    esac
}

find_service_kind() { # KIND; LIVE if what is installed is to run here and now
    if [ "$(id -u)" -ne 0 ] && [ ! "$ROOT" ]; then
        if [ "$PREFIX" ] && [ "$STATE" ]; then
            KIND=cron SERVICE_USER=$(id -un)
        elif [ ! "$DRY" ]; then
            refuse "run it as root or, for you alone, with --prefix and --state"
        fi
    fi
    if [ ! "$KIND" ]; then
        if [ -d /run/systemd/system ] && [ ! "$ROOT" ]; then KIND=systemd
        elif [ -x "$ROOT/sbin/procd" ]; then KIND=procd
        elif [ -x "$ROOT/sbin/openrc-run" ]; then KIND=openrc
        elif [ ! "$ROOT" ]; then KIND=cron
        else refuse "name the service manager with --service"; fi
    fi
    [ "$ROOT$DRY" ] || LIVE=1
    case $KIND in
    systemd)
        SERVICE_FILE=$ROOT/etc/systemd/system/$NAME.service
        [ -d /run/systemd/system ] || LIVE=''
        ;;
    openrc | procd) SERVICE_FILE=$ROOT/etc/init.d/$NAME ;;
    cron) ;;
    *) refuse "--service knows systemd, openrc, procd and cron" ;;
    esac
}

find_places() { # what was given, else what an earlier run wrote down, else defaults
    : "${SERVICE_USER:=$(recorded user)}"
    : "${SERVICE_USER:=$NAME}"
    : "${PREFIX:=$(recorded prefix)}" "${STATE:=$(recorded state)}"
    [ "$KIND" != procd ] || : "${PREFIX:=/usr}" "${STATE:=/etc/$NAME}"
    : "${PREFIX:=/usr/local}" "${STATE:=/var/lib/$NAME}"
    case $STATE in /*/*) ;; *) refuse "$STATE is no place for a state directory" ;; esac
    PROGRAM=$PREFIX/bin/$FILE HOME_DIR=$ROOT$STATE
    [ ! "$(recorded user)" ] && { [ "$KIND" != cron ] || [ ! -f "$PROGRAM" ]; } ||
        WAS_INSTALLED=1
    [ "$ROOT" ] || [ "$(id -u)" -ne 0 ] || AS_ROOT=1
    if [ ! "$ROOT" ] && have dpkg-query &&
        dpkg-query -W -f '${Status}' $NAME 2>/dev/null | grep -q ' installed$'; then
        refuse "it is a Debian package here: upgrade it with 'install.sh --package" \
            "deb' and 'dpkg -i', remove it with 'dpkg -r $NAME'"
    fi
}

recorded() { # NAME: its value in the record of the service that is installed
    if [ "$KIND" = cron ]; then
        crontab_of -l 2>/dev/null || true
    elif [ -f "$SERVICE_FILE" ]; then
        cat "$SERVICE_FILE"
    fi | sed -n "s|.*# by install.sh:.* $1=\([^ ]*\).*|\1|p"
}

record() { say "# by install.sh: prefix=$PREFIX state=$STATE user=$SERVICE_USER"; }

find_python() { # PYTHON, which runs here, and SERVICE_PYTHON, its path there
    for PYTHON in ${GIVEN_PYTHON:-/usr/bin/python3 /usr/local/bin/python3 python3.13 \
        python3.12 python3.11 python3.10 python3.9 python3 pypy3}; do
        PYTHON=$(command -v "$PYTHON") || continue
        path=$("$PYTHON" -I -c 'import sys; assert sys.version_info >= (3, 9)
print(sys.executable)' 2>/dev/null) || continue
        case $path-$AS_ROOT-$GIVEN_PYTHON in # a service's user cannot run those
        /root/*-1- | /home/*-1-) continue ;;
        esac
        SERVICE_PYTHON=$PYTHON
        [ ! "$ROOT" ] || [ "$GIVEN_PYTHON" ] || SERVICE_PYTHON=/usr/bin/python3
        return 0
    done
    find_packager
    refuse "it needs Python 3.9 or later${GIVEN_PYTHON:+ ($GIVEN_PYTHON is none)}." \
        "This installs it: $ADD $PY"
}

find_packager() { # ADD and the names of two packages
    for packager in apt-get dnf apk opkg pacman zypper ''; do
        ! have "${packager:-true}" || break
    done
    old='' # there is a Python, and it is too old
    ! have python3 || old=1
    PY=python3 NACL=python3-nacl
    case $packager in
    apt-get) ADD='apt-get install -y' ;;
    dnf) ADD='dnf install -y' PY=python3${old:+.11} NACL=python3-pynacl ;;
    apk) ADD='apk add' NACL=py3-pynacl ;;
    opkg) ADD='opkg install' PY=python3-light NACL='' ;;
    pacman) ADD='pacman -S --noconfirm' PY=python NACL=python-pynacl ;;
    zypper) ADD='zypper install -y' PY=python3${old:+11} NACL=python3-PyNaCl ;;
    *) ADD='(the means of your system)' NACL='' ;;
    esac
}

settings() { # NAME: each value of it, of .env and then of --set
    {
        [ ! -f "$HOME_DIR/.env" ] || sed '/^\[/,$d' "$HOME_DIR/.env"
        printf '%s' "$SETS"
    } | tr 'A-Z-' 'a-z_' | sed -n "s/^ *$1 *[=:] *//p" | tr -d " \"'\r"
}

read_ports() { # PORT, ADDRESS for health, TCP_PORTS, and LOW if one needs a right
    PORT=$(settings port | tail -n 1) ADDRESS=$(settings bind | tail -n 1)
    is_number "$PORT" && [ "$PORT" -gt 0 ] || PORT=21116
    : "${ADDRESS:=127.0.0.1}"
    TCP_PORTS=$((PORT - 2))-$((PORT + 3)) LOW=''
    for entry in $(settings listen | tail -n 1 | tr , ' '); do
        ! is_number "${entry##*:}" || [ "${entry##*:}" -eq 0 ] ||
            TCP_PORTS="$TCP_PORTS ${entry##*:}"
    done
    for port in $TCP_PORTS $(settings api_port | tail -n 1); do
        ! is_number "${port%-*}" || [ "${port%-*}" -ge 1024 ] || LOW=1
    done
}

get_source() { # SOURCE: a whole rustdesk_server.py, and NEW_VERSION, what it says it is
    case $FROM in
    http://* | https://*)
        case $SHA256$FROM in http:*) refuse "http:// needs --sha256" ;; esac
        make_temporary
        SOURCE=$TEMPORARY/$FILE
        say "fetch: $FROM"
        fetch "$FROM" "$SOURCE" || refuse "cannot fetch $FROM"
        ;;
    '') SOURCE=${HERE:+$HERE/$FILE} ;;
    *)
        SOURCE=$FROM
        [ ! -d "$SOURCE" ] || SOURCE=$SOURCE/$FILE
        ;;
    esac
    [ -f "$SOURCE" ] || refuse "there is no ${SOURCE:-$FILE here} (see --from)"
    [ ! "$SHA256" ] || say "$SHA256  $SOURCE" | sha256sum -c >/dev/null 2>&1 ||
        refuse "$SOURCE does not have the checksum of --sha256"
    NEW_VERSION=$(helper whole "$SOURCE") || refuse "$SOURCE is broken"
}

fetch() { # URL FILE
    if have curl; then curl -fsSL --retry 2 -o "$2" "$1"; else wget -q -O "$2" "$1"; fi
}

# -- the official server --------------------------------------------------------------

find_official() { # its processes, its units, and the first of its data directories
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
        if grep '^ExecStart=.*hbb[sr]' "$entry" 2>/dev/null | grep -qv "$FILE"; then
            OFFICIAL_UNITS="$OFFICIAL_UNITS ${entry##*/}"
            places="$places $(sed -n 's/^WorkingDirectory=//p' "$entry")"
        fi
    done
    for entry in $places /var/lib/* /opt/* /opt/*/* /srv/* /root /root/* /home/* \
        /home/*/*; do
        if [ -f "$entry/id_ed25519" ] && [ -f "$entry/db_v2.sqlite3" ]; then
            OFFICIAL_DIR=${entry%/}
            return 0
        fi
    done
}

choose_import() { # IMPORT: the directory to take over, or nothing
    if [ "$IMPORT" ] || [ ! "$OFFICIAL_DIR" ] || [ ! "$IMPORTING" ]; then
        return 0
    elif [ "$OFFICIAL_DIR" = "$HOME_DIR" ]; then
        [ ! "$OFFICIAL_PIDS" ] || [ "$REPLACE" ] || refuse "the official server runs" \
            "in $STATE itself: give --replace-official, or another --state"
        [ -e "$HOME_DIR/peers.jsonl" ] || IMPORT=$OFFICIAL_DIR
    elif [ -e "$HOME_DIR/peers.jsonl" ] || [ -e "$HOME_DIR/id_ed25519" ]; then
        [ ! "$REPLACE" ] ||
            ! cmp -s "$OFFICIAL_DIR/id_ed25519" "$HOME_DIR/id_ed25519" ||
            IMPORT=$OFFICIAL_DIR # devices that came since the first import
    else
        say "An official server's key and devices are in $OFFICIAL_DIR."
        ANSWER=''
        [ "$DRY" ] || [ ! "$HERE" ] || [ ! -t 0 ] ||
            ask "Take them over, so that clients need no change? [yes/no]"
        case $ANSWER-$DRY in
        [Yy]*) IMPORT=$OFFICIAL_DIR ;;
        [Nn]* | *-1) ;;
        *) refuse "run this again with '--import $OFFICIAL_DIR' (clients need no" \
            "change) or '--no-import' (a new key, which every client must be given)" ;;
        esac
    fi
}

replace_official() {
    [ "$REPLACE" ] || return 0
    for pid in $OFFICIAL_PIDS; do
        ! grep -Eq 'docker|containerd|libpod|lxc' "/proc/$pid/cgroup" 2>/dev/null ||
            fail "hbbs or hbbr (pid $pid) runs in a container; stop that (docker stop" \
                "...) and run this again"
    done
    if [ "$OFFICIAL_UNITS" ] && [ -d /run/systemd/system ]; then
        # shellcheck disable=SC2086
        run systemctl disable --now $OFFICIAL_UNITS
        [ "$DRY" ] || STOPPED_UNITS=$OFFICIAL_UNITS
    fi
    for pid in $OFFICIAL_PIDS; do
        ! kill -0 "$pid" 2>/dev/null || run kill "$pid"
    done
    [ ! "$OFFICIAL_PIDS" ] || [ "$DRY" ] || sleep 2
}

import_official() {
    [ "$IMPORT" ] || return 0
    note "import: $IMPORT"
    RESTART=1
    [ ! "$DRY" ] || return 0
    make_temporary
    copy=$TEMPORARY/official
    mkdir "$copy"
    for file in id_ed25519 id_ed25519.pub db_v2.sqlite3 db_v2.sqlite3-wal \
        db_v2.sqlite3-shm blacklist.txt blocklist.txt; do
        [ ! -f "$IMPORT/$file" ] || cp "$IMPORT/$file" "$copy/"
    done
    [ ! "$AS_ROOT" ] || chown -R "$(ids)" "$TEMPORARY"
    stop_service # two processes must not write one store
    as_user "$SERVICE_PYTHON" -I "$CANDIDATE" import "$copy" ||
        fail "the import of $IMPORT failed (see above); it was only read. Mend it and" \
            "run this again"
}

# -- user, directory, settings, PyNaCl ------------------------------------------------

make_user() {
    if [ "$(id -u)" -ne 0 ] || [ "$(ids)" ]; then
        return 0
    fi
    note "make user: $SERVICE_USER"
    if [ "$DRY" ]; then
        return 0
    elif [ ! "$ROOT" ] && have useradd; then
        useradd --system --user-group --no-create-home --home-dir "$STATE" \
            --shell /usr/sbin/nologin "$SERVICE_USER"
        return 0
    fi
    number=980 # BusyBox and images: a free number, no password, no shell
    while cut -d: -f3 "$ROOT/etc/passwd" "$ROOT/etc/group" | grep -qx $number; do
        number=$((number - 1))
    done
    add_row group "x:$number:"
    add_row shadow "*:0:0:99999:7:::"
    add_row passwd "x:$number:$number::$STATE:/bin/false"
}

add_row() { # TABLE REST
    [ ! -f "$ROOT/etc/$1" ] || grep -q "^$SERVICE_USER:" "$ROOT/etc/$1" ||
        say "$SERVICE_USER:$2" >>"$ROOT/etc/$1"
}

make_state() { # 0700, and it and its files the user's
    if [ ! -d "$HOME_DIR" ]; then
        note "make directory: $HOME_DIR (0700, $SERVICE_USER)"
        [ ! "$DRY" ] || return 0
        mkdir -p "$(dirname "$HOME_DIR")"
        mkdir -m 700 "$HOME_DIR"
    fi
    case $(ls -ld "$HOME_DIR") in drwx------*) ;; *) run chmod 700 "$HOME_DIR" ;; esac
    ids=$(ids)
    [ "$(id -u)" -eq 0 ] && [ "$ids" ] || return 0
    # shellcheck disable=SC2012
    strange=$(ls -lan "$HOME_DIR" |
        awk -v uid="${ids%:*}" 'NF > 8 && $9 != ".." && $3 != uid')
    [ ! "$strange" ] || run chown -hR "$ids" "$HOME_DIR"
}

save_settings() {
    [ "$SETS" ] || return 0
    said=$(helper put_settings "$HOME_DIR/.env" "$SETS" dry)
    [ "$said" ] || return 0
    note "set in $STATE/.env: $said"
    RESTART=1
    [ ! "$DRY" ] || return 0
    undoable ''
    as_user "$PYTHON" -I -c "$PYTHON_PART" put_settings .env "$SETS" '' >/dev/null
    undoable settings
}

install_pynacl() {
    if [ ! "$PYNACL" ] || [ ! "$AS_ROOT" ] ||
        "$PYTHON" -I -c 'import nacl.bindings' 2>/dev/null; then
        return 0
    fi
    find_packager
    [ "$NACL" ] && [ "$SERVICE_PYTHON" = /usr/bin/python3 ] || return 0
    [ "$packager" != apt-get ] || ADD='apt-get -o Acquire::Retries=0 install -y'
    say "${DRY:+would }run: $ADD $NACL"
    # shellcheck disable=SC2086
    [ "$DRY" ] || DEBIAN_FRONTEND=noninteractive $ADD $NACL \
        </dev/null >/dev/null 2>&1 ||
        say "went on without PyNaCl: signatures take longer, nothing else is missing"
}

# -- the service: install, start, stop, log, remove, for each manager -----------------

service() { "on_$KIND" "$1"; }

on_systemd() {
    wants=$ROOT/etc/systemd/system/multi-user.target.wants/$NAME.service
    case $1 in
    install)
        put "$SERVICE_FILE" 644 "$(unit_text '')"
        link "/etc/systemd/system/$NAME.service" "$wants"
        [ ! "$UNIT_CHANGED" ] || [ ! "$LIVE" ] || systemctl daemon-reload
        ;;
    start) systemctl start --no-block "$NAME" ;;
    stop) systemctl stop "$NAME" ;;
    log) say "journalctl -u $NAME -n 30" ;;
    remove)
        take_away "$wants" "$SERVICE_FILE"
        [ ! "$LIVE" ] || systemctl daemon-reload
        ;;
    esac
}

on_openrc() {
    case $1 in
    install)
        put "$SERVICE_FILE" 755 "$(openrc_text)"
        link "/etc/init.d/$NAME" "$ROOT/etc/runlevels/default/$NAME"
        ;;
    start | stop) rc-service -q "$NAME" "$1" ;;
    log) say "tail $STATE/server.log" ;;
    remove) take_away "$ROOT/etc/runlevels/default/$NAME" "$SERVICE_FILE" ;;
    esac
}

on_procd() { # what OpenWrt keeps when its firmware is replaced is a list of files
    kept=$ROOT/lib/upgrade/keep.d/$NAME
    case $1 in
    install)
        put "$SERVICE_FILE" 755 "$(procd_text)"
        put "$kept" 644 "$STATE
$PROGRAM
/etc/init.d/$NAME
/etc/rc.d/S95$NAME"
        link "../init.d/$NAME" "$ROOT/etc/rc.d/S95$NAME"
        link "../init.d/$NAME" "$ROOT/etc/rc.d/K10$NAME"
        ;;
    start | stop) "/etc/init.d/$NAME" "$1" ;;
    log) say "logread -e $NAME" ;;
    remove)
        take_away "$ROOT/etc/rc.d/S95$NAME" "$ROOT/etc/rc.d/K10$NAME" "$kept" \
            "$SERVICE_FILE"
        ;;
    esac
}

on_cron() { # no service manager: a line of crontab, and a number in server.pid
    case $1 in
    install) write_crontab "@reboot $(cron_command) $(record)" ;;
    start)
        as_user /bin/rm -f server.pid
        "$PYTHON" -I -c "$PYTHON_PART" start_as "${AS_ROOT:+$(ids)}" "$STATE" \
            /bin/sh -c "$(cron_command)" </dev/null >/dev/null 2>&1 &
        ;;
    stop)
        pid=$(cron_pid) || return 0
        as_user /bin/sh -c "kill $pid"
        within 15 cron_ended || as_user /bin/sh -c "kill -KILL $pid"
        ;;
    log) say "tail $STATE/server.log $STATE/start.log" ;;
    remove) [ ! "$WAS_INSTALLED" ] || write_crontab '' ;;
    esac
}

cron_ended() { ! grep -q "$FILE" "/proc/$pid/cmdline" 2>/dev/null; }

cron_pid() { # the server of server.pid, if it lives
    [ -f "$STATE/server.pid" ] && read -r pid <"$STATE/server.pid" || return 1
    is_number "$pid" && ! cron_ended && say "$pid"
}

cron_command() {
    say "cd $STATE && umask 077 && echo \$\$ >server.pid && exec $SERVICE_PYTHON -I" \
        "$PROGRAM --log-file server.log >/dev/null 2>start.log"
}

crontab_of() { # ARGUMENT...: crontab, for the service's user
    [ "${SERVICE_USER:=$NAME}" = "$(id -un)" ] || set -- -u "$SERVICE_USER" "$@"
    crontab "$@"
}

write_crontab() { # LINE, or nothing to take it away
    old=$(crontab_of -l 2>/dev/null || true)
    new=$(say "$old" | sed '/# by install.sh: /d; /^$/d' && say "$1")
    [ "$old" != "$new" ] || return 0
    if [ ! "$ROOT" ] && have crontab &&
        { [ "$DRY" ] || say "$new" | crontab_of - 2>/dev/null; }; then
        note "write crontab of $SERVICE_USER: ${1:-(without our line)}"
    elif [ "$1" ]; then
        warn "no crontab works here; have this run when the machine starts: $1"
    fi
}

# -- what each manager is given -------------------------------------------------------

unit_text() { # ARGUMENTS of the server
    capability='' private=yes home=yes compiles=yes
    [ ! "$LOW" ] || capability=CAP_NET_BIND_SERVICE private=no
    case $STATE in /home/* | /root/*) home=read-only ;; esac
    case $SERVICE_PYTHON in *pypy*) compiles=no ;; esac # it does so at run time
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
ProtectHome=$home
CapabilityBoundingSet=$capability
AmbientCapabilities=$capability
PrivateUsers=$private
DevicePolicy=closed
ProtectProc=invisible
$(printf '%s=yes\n' NoNewPrivileges PrivateTmp PrivateDevices ProtectClock \
        ProtectControlGroups ProtectHostname ProtectKernelLogs ProtectKernelModules \
        ProtectKernelTunables RestrictNamespaces RestrictRealtime RestrictSUIDSGID \
        RemoveIPC LockPersonality)
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
KeyringMode=private
MemoryDenyWriteExecute=$compiles
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

depend() { use net dns; after firewall; }
reload() { supervise-daemon "\$RC_SVCNAME" --signal HUP; }
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

reload_service() { procd_send_signal $NAME '*' HUP; }
EOF
}

# -- firewall -------------------------------------------------------------------------

show_firewall() {
    [ ! "$ROOT" ] || return 0
    find_firewall
    commands=$(firewall_commands)
    if [ "$commands" ] && [ ! "$OPEN_FIREWALL" ]; then
        say "The firewall ($FIREWALL) is opened by these, or by --open-firewall:"
        say "$commands" | sed 's/^/  /'
    elif [ "$commands" ]; then
        CHANGES=$((CHANGES + 1))
        say "$commands" | while read -r command; do
            # shellcheck disable=SC2086
            run $command </dev/null
        done
        [ "$FIREWALL" != nftables ] ||
            say "nftables forgets this at a restart: put it into /etc/nftables.conf too"
    fi
}

find_firewall() {
    FIREWALL=none
    if have ufw && ufw status 2>/dev/null | grep -q '^Status: active'; then
        FIREWALL=ufw
    elif have firewall-cmd && firewall-cmd --state >/dev/null 2>&1; then
        FIREWALL=firewalld
    elif have uci && [ -f /etc/config/firewall ]; then
        FIREWALL=uci
    elif have nft && [ "$(closed_chains)" ]; then
        FIREWALL=nftables
    fi
}

firewall_commands() { # what opens the ports that are not open
    for ports in $TCP_PORTS; do
        "open_$FIREWALL" "$ports" tcp
    done
    "open_$FIREWALL" "$PORT" udp
}

open_none() { :; }

open_ufw() { # PORTS PROTOCOL
    ports=$(say "$1" | tr - :)/$2
    ufw status | grep -q "^$ports " || say "ufw allow $ports"
}

open_firewalld() {
    for how in --permanent ''; do
        # shellcheck disable=SC2086
        firewall-cmd -q $how --query-port="$1/$2" ||
            say "firewall-cmd -q${how:+ $how} --add-port=$1/$2"
    done
}

open_uci() {
    rule=firewall.rustdesk_$2_$(say "$1" | tr - _)
    ! uci -q get "$rule" >/dev/null || return 0
    printf "uci set $rule%s\n" =rule .src=wan ".name=rustdesk-$2-$1" ".proto=$2" \
        ".dest_port=$1" .target=ACCEPT
    say "uci commit firewall${NEWLINE}/etc/init.d/firewall reload"
}

open_nftables() {
    closed_chains | while read -r chain; do
        # shellcheck disable=SC2086
        nft list chain $chain | grep -q "$2 dport $1 accept" ||
            say "nft insert rule $chain $2 dport $1 accept"
    done
}

closed_chains() { # "family table chain" of each that drops what comes in
    nft list ruleset 2>/dev/null | awk '
        $1 == "table" { table = $2 " " $3 }
        $1 == "chain" { chain = $2; input = closed = 0 }
        /hook input/ { input = 1; closed = /policy drop/ }
        $1 == "drop" || $1 == "reject" { closed = 1 }
        $1 == "}" && input && closed { print table, chain; input = 0 }'
}

# -- removing -------------------------------------------------------------------------

do_uninstall() {
    if [ "$LIVE" ] && [ "$WAS_INSTALLED" ]; then
        [ "$KIND" != cron ] || find_python
        note "stop: $NAME"
        service stop || warn "it could not be stopped; going on"
    fi
    service remove
    take_away "$ROOT$PROGRAM" "$ROOT$PROGRAM.previous" "$ROOT$PROGRAM.new" \
        "$ROOT$PROGRAM.unproven"
    if [ "$ACTION" = purge ]; then
        return 0
    elif [ "$CHANGES" -eq 0 ]; then
        say "nothing was installed here"
    elif [ -d "$HOME_DIR" ]; then
        say "Key and devices stay in $HOME_DIR, with the user $SERVICE_USER (--purge" \
            "removes them)"
    fi
}

do_purge() {
    if [ -d "$HOME_DIR" ]; then
        [ -e "$HOME_DIR/id_ed25519" ] || [ -e "$HOME_DIR/.env" ] ||
            [ -e "$HOME_DIR/peers.jsonl" ] || [ ! "$(ls -A "$HOME_DIR")" ] ||
            fail "nothing was removed: $HOME_DIR does not look like a state directory"
        say "This deletes the key and every device in $HOME_DIR:"
        ls -A "$HOME_DIR"
        say "Clients that know the key will not trust another. There is no way back."
        [ "$DRY" ] || ask 'To delete it all, type the word purge:'
        [ "$DRY" ] || [ "$ANSWER" = purge ] ||
            fail "the word was not typed: nothing was removed"
    fi
    do_uninstall
    [ ! -d "$HOME_DIR" ] || run rm -rf "$HOME_DIR"
    [ "$CHANGES" -gt 0 ] || say "nothing was installed here"
    [ "$SERVICE_USER" = $NAME ] && [ "$AS_ROOT" ] && [ "$(ids)" ] || return 0
    for tool in userdel deluser; do
        if have $tool; then run $tool $NAME && return; fi
    done
    warn "the user $NAME stays; take its line out of /etc/passwd"
}

# -- the Debian package ---------------------------------------------------------------

do_package() {
    [ "$PACKAGE" = deb ] || refuse "--package knows deb only"
    have dpkg-deb || refuse "there is no dpkg-deb here"
    find_python
    get_source
    PREFIX=/usr STATE=/var/lib/$NAME SERVICE_USER=$NAME PROGRAM=/usr/bin/$FILE
    SERVICE_PYTHON=/usr/bin/python3
    package=$PWD/${NAME}_${NEW_VERSION}_all.deb
    note "write: $package"
    [ ! "$DRY" ] || return 0
    make_temporary
    tree=$TEMPORARY/tree
    umask 022
    mkdir -p "$tree/DEBIAN" "$tree/usr/bin" "$tree/usr/lib/systemd/system" "$tree/etc"
    cp "$SOURCE" "$tree$PROGRAM"
    unit_text " -c /etc/$NAME.conf" >"$tree/usr/lib/systemd/system/$NAME.service"
    cat >"$tree/etc/$NAME.conf" <<EOF
# Settings of rustdesk_server.py, one \`name = value\` a line (see --help)
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
    deb_script preinst "[ ! -e /etc/systemd/system/$NAME.service ] || {
    echo '$NAME: first run install.sh --uninstall; key and devices stay' >&2
    exit 1
}"
    deb_script postinst "[ \"\$1\" = configure ] || exit 0
id $NAME >/dev/null 2>&1 || useradd --system --user-group --no-create-home \\
    --home-dir $STATE --shell /usr/sbin/nologin $NAME
[ -d $STATE ] || mkdir -m 0700 -p $STATE
chown -R -h $NAME: $STATE
cd $STATE
runuser -u $NAME -- /usr/bin/python3 -I $PROGRAM check -c /etc/$NAME.conf || {
    echo '$NAME: not restarted; mend that, then dpkg --configure $NAME' >&2
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
    chmod 755 "$tree$PROGRAM" "$tree"
    dpkg-deb --root-owner-group -Zgzip --build "$tree" "$package" >/dev/null
}

deb_script() { # NAME TEXT
    printf '#!/bin/sh\nset -e\n%s\n' "$2" >"$tree/DEBIAN/$1"
    chmod 755 "$tree/DEBIAN/$1"
}

# -- what sh cannot do everywhere -----------------------------------------------------

python_part() {
    cat <<'EOF'
import os, re, socket, sys

def run_as(owner, directory, *command):
    """Run a command as UID:GID (or as it is), there, knowing nothing of here."""
    if owner:
        uid, gid = map(int, owner.split(":"))
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    os.umask(0o077)
    os.chdir(directory)
    os.execve(command[0], command, {"PATH": os.environ["PATH"], "HOME": directory})

def whole(path):
    """The version of a file that is all of rustdesk_server.py, without running it."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    version = re.search(r"(?m)^VERSION = \"([\w.+~-]+)\"", text)
    try:
        compile(text, path, "exec")
    except SyntaxError as error:
        sys.exit(str(error))
    if not version or "\n    sys.exit(main(sys.argv[1:]))" not in text:
        sys.exit("it is not a whole rustdesk_server.py")
    print(version.group(1))

def start_as(*arguments): # it is to outlive this terminal
    os.setsid()
    run_as(*arguments)

def name_of(line):
    return re.split("[=:]", line)[0].strip().lower().replace("-", "_")

def put_settings(path, wanted, dry):
    """Put lines `name=value` before the first [section]; print which names differ."""
    lines, differ = [], []
    if os.path.exists(path):
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().splitlines()
    end = next((i for i, line in enumerate(lines) if line.startswith("[")), len(lines))
    head = lines[:end]
    for name, value in (item.split("=", 1) for item in wanted.split("\n")[:-1]):
        row = name + " = " + value.strip()
        same = [line for line in head if name_of(line) == name_of(row)]
        if same[-1:] != [row]:
            head = [line for line in head if line not in same] + [row]
            differ.append(name)
    print(*differ)
    for name, rows in (path + ".previous", lines), (path, head + lines[end:]):
        if differ and not dry:
            with open(path + ".new", "w", encoding="utf-8") as file:
                file.write("".join(row + "\n" for row in rows))
            os.replace(path + ".new", name)

def probe(address, port):
    """Whether /healthz is answered there: `healthy`, `taken` or `free`."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as link:
        link.settimeout(2)
        if link.connect_ex((address.strip("[]").encode(), int(port))):
            return print("free")
        try:
            link.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            print("healthy" if b" 200 " in link.recv(64) else "taken")
        except OSError:
            print("taken")

globals()[sys.argv[1]](*sys.argv[2:])
EOF
}

helper() { # FUNCTION ARGUMENT...: one of the Python part
    "$PYTHON" -I -c "$PYTHON_PART" "$@"
}

ids() { # uid:gid of the service's user, if there is one
    if [ "$ROOT" ]; then
        sed -n "s/^$SERVICE_USER:[^:]*:\([0-9]*:[0-9]*\):.*/\1/p" "$ROOT/etc/passwd"
    elif id "$SERVICE_USER" >/dev/null 2>&1; then
        say "$(id -u "$SERVICE_USER"):$(id -g "$SERVICE_USER")"
    fi
}

as_user() { # COMMAND...: in the state directory, as the service's user
    helper run_as "${AS_ROOT:+$(ids)}" "$HOME_DIR" "$@"
}

within() { # SECONDS COMMAND...: whether it succeeds by then
    end=$(($(date +%s) + $1))
    shift
    until "$@"; do
        [ "$(date +%s)" -lt "$end" ] || return 1
        sleep 0.2 2>/dev/null || sleep 1
    done
}

{ main "$@"; exit; }
