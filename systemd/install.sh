#!/bin/sh
# What `make install` and `make uninstall` do: `install.sh install|uninstall`. From the environment:
#   PREFIX       where the program goes (/usr/local)
#   DESTDIR      a root directory to put everything under, for packagers; nothing is run then
#   PYTHON       the interpreter that toppy will use (python3), 3.11 or later
#   PACKAGE      what to install: these sources (.), or a wheel of them (may be dist/*.whl)
#   SYSTEMD_DIR  where systemd/, sysusers.d/ and tmpfiles.d/ go
#   OLDER_SYSTEMD  1: with the drop-in for systemd before 253, 0: without; default: as this host is
# Both run as whoever may write there: root, or a packager with DESTDIR.
set -eu
umask 022

command=${1:-}
PREFIX=${PREFIX:-/usr/local}
DESTDIR=${DESTDIR:-}
PYTHON=${PYTHON:-python3}
PACKAGE=${PACKAGE:-.}
case $PREFIX in
  /usr | /usr/local) SYSTEMD_DIR=${SYSTEMD_DIR:-$PREFIX/lib} ;;
  *) SYSTEMD_DIR=${SYSTEMD_DIR:-/usr/local/lib} ;; # systemd does not look elsewhere
esac

# shellcheck disable=SC2086
set -- $PACKAGE # expands a pattern
[ $# = 1 ] || { echo "PACKAGE is one directory or one wheel, not: $*" >&2; exit 2; }
PACKAGE=$1
source=$(cd "$(dirname "$0")" && pwd)
program=$PREFIX/lib/toppy
etc=$DESTDIR/etc/toppy
units=$DESTDIR$SYSTEMD_DIR/systemd/system
sysusers=$DESTDIR$SYSTEMD_DIR/sysusers.d
tmpfiles=$DESTDIR$SYSTEMD_DIR/tmpfiles.d

fail() {
  echo "make $command: $*" >&2
  exit 1
}

# whether to act on this host, and its systemd runs
is_live() {
  [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]
}

install_program() {
  stage=$DESTDIR$program.new
  work=$(mktemp -d)
  trap 'rm -rf "$work" "$stage"' EXIT
  trap 'exit 1' INT TERM
  if [ -d "$PACKAGE" ]; then
    # a copy, so that root leaves nothing in the sources
    (cd "$PACKAGE" && tar -cf - --exclude=toppy/quic/native/target --exclude='*.so' \
      --exclude=__pycache__ pyproject.toml README.md LICENSE toppy) | tar -xf - -C "$work"
    PACKAGE=$work
  fi
  mkdir -p "$DESTDIR$PREFIX/lib" "$DESTDIR$PREFIX/bin"
  "$PYTHON" -m venv --clear "$stage"
  "$stage/bin/python" -m pip install --quiet --no-compile "$PACKAGE"
  "$stage/bin/python" -IB -c 'import importlib.util as i
if not i.find_spec("toppy.quic._native"):
    print("NOTE: without the native engine, which takes Rust; toppy will be slow (docs/systemd.md)")'
  # nothing of the sort is needed to run
  "$stage/bin/python" -m pip --quiet uninstall --yes pip setuptools 2>/dev/null
  rm -f "$stage"/bin/activate* "$stage"/bin/Activate*
  # the place where it will be, in scripts and code instead of the one where it was made
  for file in "$stage/pyvenv.cfg" "$stage"/bin/*; do
    if [ -f "$file" ] && [ ! -L "$file" ] && grep -qI . "$file"; then
      sed "s|$stage|$program|g" "$file" >"$work/file" && cat "$work/file" >"$file"
    fi
  done
  # pip's way around a DESTDIR that is long or has spaces is not needed there
  for name in toppy toppy-gw; do
    sed "1{/^#!\/bin\/sh\$/{N;N;s|.*|#!$program/bin/python|;};}" "$stage/bin/$name" >"$work/file"
    cat "$work/file" >"$stage/bin/$name"
  done
  find "$stage" -name direct_url.json -path '*toppy-*' -exec rm {} +
  "$stage/bin/python" -m compileall -q -s "$stage" -p "$program" "$stage/lib" >/dev/null
  # a gateway that runs sees one or the other
  rm -rf "$DESTDIR$program.old"
  [ ! -e "$DESTDIR$program" ] || mv "$DESTDIR$program" "$DESTDIR$program.old"
  mv "$stage" "$DESTDIR$program"
  rm -rf "$DESTDIR$program.old"
  for name in toppy toppy-gw; do
    ln -sfn "../lib/toppy/bin/$name" "$DESTDIR$PREFIX/bin/$name"
  done
}

# $1 to $2, with the paths of this PREFIX
install_text() {
  mkdir -p "$(dirname "$2")"
  sed "s|/usr/local/bin/|$PREFIX/bin/|g" "$source/$1" >"$2"
  chmod 644 "$2"
}

is_older_systemd() {
  if [ -n "${OLDER_SYSTEMD:-}" ]; then
    [ "$OLDER_SYSTEMD" = 1 ]
    return
  fi
  version=$(systemctl --version 2>/dev/null | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
  [ "${version:-999}" -lt 253 ]
}

install_service() {
  install_text toppy-gw.service "$units/toppy-gw.service"
  install_text sysusers.d/toppy-gw.conf "$sysusers/toppy-gw.conf"
  install_text tmpfiles.d/toppy-gw.conf "$tmpfiles/toppy-gw.conf"
  dropin=$units/toppy-gw.service.d/older-systemd.conf
  if is_older_systemd; then
    install_text toppy-gw.service.d/older-systemd.conf "$dropin"
  else
    remove_dropin
  fi
  [ -d "$etc" ] || install -d -m 750 "$etc"
  install -m 644 "$source/gateway.toml.example" "$etc/gateway.toml.example"
  [ -e "$etc/gateway.toml" ] || install -m 644 "$source/gateway.toml.example" "$etc/gateway.toml"
  if [ -z "$DESTDIR" ] && command -v systemd-sysusers >/dev/null; then
    systemd-sysusers "$sysusers/toppy-gw.conf"
    systemd-tmpfiles --create "$tmpfiles/toppy-gw.conf"
  fi
  ! is_live || systemctl daemon-reload
}

remove_dropin() {
  rm -f "$units/toppy-gw.service.d/older-systemd.conf"
  rmdir "$units/toppy-gw.service.d" 2>/dev/null || true
}

say_what_next() {
  if is_live && systemctl --quiet is-active toppy-gw; then
    echo "The gateway runs on as it was. To change it to this code, connections staying:"
    echo "  toppy-gw upgrade"
  elif [ -z "$DESTDIR" ]; then
    echo "Next: a certificate and a token, what clients may reach, and the start:"
    echo "  toppy-gw init /etc/toppy --listen 0.0.0.0:4433 --name gw.example.com"
    echo "  \$EDITOR /etc/toppy/gateway.toml"
    echo "  systemctl enable --now toppy-gw"
  fi
}

case $command in
  install)
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      fail "toppy needs Python 3.11 or later; name one: make install PYTHON=python3.12"
    "$PYTHON" -c 'import ensurepip, venv' ||
      fail "$PYTHON cannot make virtual environments; Debian and Ubuntu: apt install python3-venv"
    install_program
    install_service
    say_what_next
    ;;
  uninstall)
    if is_live && [ -e "$units/toppy-gw.service" ]; then
      systemctl disable --now --quiet toppy-gw
    fi
    rm -f "$DESTDIR$PREFIX/bin/toppy" "$DESTDIR$PREFIX/bin/toppy-gw"
    rm -rf "$DESTDIR$program"
    rm -f "$units/toppy-gw.service" "$sysusers/toppy-gw.conf" "$tmpfiles/toppy-gw.conf"
    remove_dropin
    ! is_live || systemctl daemon-reload
    echo "/etc/toppy, /var/lib/toppy-gw (the audit log) and the user toppy-gw stay;" \
      "remove them when nobody needs them."
    ;;
  *)
    echo "usage: $0 install|uninstall" >&2
    exit 2
    ;;
esac
