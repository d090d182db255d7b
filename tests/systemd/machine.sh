# A Debian with a systemd of its own, to be sourced: machine_make, machine_boot, inside, machine_stop.
#
# A systemd that starts in a namespace but on this machine's files runs tmpfiles on them and empties /tmp. So it gets a
# root of its own, always, and this file boots nothing else.

SUITE=bookworm
PACKAGES=systemd,systemd-sysv,libpam-systemd,dbus,dbus-user-session,polkitd

machine_say() { echo "systemd test: $*" >&2; }

# The Debian packages $2... for the program $1, if it is missing.
machine_need() {
    command -v "$1" >/dev/null && return
    command -v apt-get >/dev/null || { machine_say "$1 is missing, and there is no apt-get to install it"; exit 1; }
    program=$1
    shift
    machine_say "$program is missing: installing the Debian packages $*"
    apt-get update >&2
    apt-get install -y --no-install-recommends "$@" >&2
}

# A fresh system in the folder $1, copied from the one that the cache folder $2 keeps.
machine_make() {
    [ "$(id -u)" = 0 ] || { machine_say "run this as root: it makes a system in a folder and boots it"; exit 1; }
    machine_need debootstrap debootstrap
    machine_need systemd-nspawn systemd-container
    pristine=$2/debian-$SUITE
    if [ ! -e "$pristine/.complete" ]; then
        machine_say "downloading Debian $SUITE into $pristine (about 250 MB, kept for the next run)"
        rm -rf "$pristine"
        mkdir -p "$2"
        debootstrap --variant=minbase --include=$PACKAGES $SUITE "$pristine" > "$2/debootstrap.log" 2>&1 ||
            { tail -5 "$2/debootstrap.log" >&2; machine_say "debootstrap failed: $2/debootstrap.log"; exit 1; }
        rm -f "$pristine"/var/cache/apt/archives/*.deb
        : > "$pristine/.complete"
    fi
    cp -a "$pristine" "$1"
}

# Boots the system in the folder $1, without a network, and waits until it runs.
machine_boot() {
    root=$(cd "$1" && pwd -P)
    if [ "$root" = / ] || [ ! -e "$root/.complete" ]; then
        machine_say "$root is not a system that this test has made"
        exit 1
    fi
    systemd-nspawn -q --register=no --keep-unit --private-network -b -D "$root" > "$root.console" 2>&1 < /dev/null &
    machine_nspawn=$!
    machine_init=
    for _ in $(seq 1200); do
        kill -0 $machine_nspawn 2>/dev/null ||
            { tail -5 "$root.console" >&2; machine_say "systemd-nspawn ended while booting"; exit 1; }
        [ -n "$machine_init" ] || machine_init=$(cat /proc/$machine_nspawn/task/*/children | cut -d' ' -f1)
        case $([ -z "$machine_init" ] || inside systemctl is-system-running 2>/dev/null || true) in
        running) return ;;
        degraded) inside systemctl --failed >&2; machine_say "a unit of the fresh system failed"; exit 1 ;;
        esac
        sleep 0.1
    done
    machine_say "the system does not boot within two minutes: $root.console"
    exit 1
}

# Runs a command in the booted system: as root, in its root folder, with its environment.
inside() {
    nsenter -t "$machine_init" -m -u -i -n -p -r -w -- \
        env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 LC_ALL=C.UTF-8 "$@"
}

# The same as the user $1, who has no session.
inside_as() {
    user=$1
    shift
    inside setpriv --reuid "$user" --regid "$user" --init-groups --reset-env "$@"
}

machine_stop() {
    [ -n "${machine_nspawn-}" ] || return 0
    kill "$machine_nspawn" 2>/dev/null || true
    wait "$machine_nspawn" 2>/dev/null || true
    machine_nspawn=
}
