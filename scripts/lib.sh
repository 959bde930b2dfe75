# shellcheck shell=bash
# What the scripts share: speaking to a person, installing what is missing, becoming root.
# Sourced, never run. The caller has `set -euo pipefail`.

# A user's PATH on Debian leaves out the folders that hold tc, nginx and tcpdump.
PATH="$PATH:/usr/sbin:/sbin"

# Each is PACKAGE, PACKAGE=COMMAND or PACKAGE=HEADER.h: what is there already need not come from this package.
# The scripts that source this use them.
# shellcheck disable=SC2034
BUILD_NEEDS=(clang=clang gcc=gcc make=make pkg-config=pkg-config libelf-dev=gelf.h zlib1g-dev=zlib.h)
# shellcheck disable=SC2034
DEMO_NEEDS=(iproute2=tc ethtool=ethtool tcpdump=tcpdump nginx=nginx curl=curl)
# shellcheck disable=SC2034
TEST_NEEDS=("${DEMO_NEEDS[@]}" nftables=nft iperf3=iperf3)

say() {
	if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
		printf '\033[1m== %s\033[0m\n' "$*"
	else
		printf '== %s\n' "$*"
	fi
}

fail() {
	printf '%s: %s\n' "${0##*/}" "$*" >&2
	exit 1
}

repo_root() {
	(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
}

# Runs a command as root. Only for installing: a script that needs root for its own work calls become_root.
privileged() {
	if [ "$EUID" -eq 0 ]; then
		"$@"
	else
		sudo "$@"
	fi
}

# Runs a command as root in the caller's environment, in place of this process. sudo resets the environment, and
# many setups refuse its -E, so the variables that building and testing depend on are handed over one by one.
become_root() {
	local name keep=("PATH=$PATH" "HOME=$HOME")
	command -v sudo >/dev/null || fail "network namespaces and BPF need root: run it as root, or install sudo"
	for name in $(compgen -e); do
		case "$name" in
		CARGO* | RUST* | NETOKEN* | TERM | TMPDIR | NO_COLOR | *_proxy | *_PROXY) keep+=("$name=${!name}") ;;
		esac
	done
	exec sudo -- env "${keep[@]}" "$@"
}

# Calls a command every tenth of a second until it succeeds, for at most SECONDS: wait_for SECONDS COMMAND...
wait_for() {
	local tries=$(($1 * 10))
	shift
	until "$@"; do
		tries=$((tries - 1))
		[ "$tries" -gt 0 ] || return 1
		sleep 0.1
	done
}

is_gone() {
	! kill -0 "$1" 2>/dev/null
}

# Ends a child of this shell, politely at first. One that has ended is left alone: its number may be another's now.
stop() {
	jobs -rp | grep -qx "$1" || return 0
	kill -TERM "$1" 2>/dev/null || return 0
	wait_for 5 is_gone "$1" || kill -KILL "$1" 2>/dev/null || true
	wait "$1" 2>/dev/null || true
}

is_installed() {
	local package="${1%%=*}" sign="${1#*=}"
	case "$sign" in
	"$package") ;;
	*.h) echo "#include <$sign>" | cc -E -x c - >/dev/null 2>&1 && return 0 ;;
	*) command -v "$sign" >/dev/null && return 0 ;;
	esac
	[ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ]
}

apt_install() {
	privileged env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
		-o DPkg::Lock::Timeout=120 "$@"
}

# need_packages WHY NEED...: installs what is missing, and touches nothing when nothing is.
need_packages() {
	local why="$1" need status=0 missing=()
	shift
	for need in "$@"; do
		is_installed "$need" || missing+=("${need%%=*}")
	done
	[ "${#missing[@]}" -gt 0 ] || return 0

	command -v apt-get >/dev/null ||
		fail "$why needs what Debian calls: ${missing[*]}. There is no apt-get here; please install them another way"
	[ "$EUID" -eq 0 ] || command -v sudo >/dev/null ||
		fail "$why needs ${missing[*]}; as root: apt-get install ${missing[*]}"

	say "installing for $why: ${missing[*]}"
	install_packages "${missing[@]}" || status=$?
	[ "$status" -lt 128 ] || exit "$status"
	[ "$status" -eq 0 ] || fail "installing ${missing[*]} failed; the log is above"
}

# In a shell of its own, which leaves nothing behind, also when it is interrupted.
install_packages() (
	packages=("$@")
	log="$(mktemp)"
	trap 'release_services "${packages[@]}"; rm -f "$log"' EXIT
	trap 'exit 129' HUP
	trap 'exit 130' INT
	trap 'exit 143' TERM
	keep_services_off "$@"
	# The package lists of a fresh machine are empty, and old ones name versions that are gone. Both show here.
	apt_install "$@" >"$log" 2>&1 ||
		{ privileged apt-get update && apt_install "$@"; } >>"$log" 2>&1 ||
		{ cat "$log" >&2 && return 1; }
)

# Debian starts nginx as soon as it is installed, and at each boot. Here only its binary is wanted.
keep_services_off() {
	case " $* " in *" nginx "*) ;; *) return 0 ;; esac
	[ -d /run/systemd/system ] || return 0
	privileged systemctl mask --runtime --quiet nginx.service 2>/dev/null || true
}

release_services() {
	case " $* " in *" nginx "*) ;; *) return 0 ;; esac
	[ -d /run/systemd/system ] || return 0
	privileged systemctl unmask --runtime --quiet nginx.service 2>/dev/null || true
	privileged systemctl disable --quiet nginx.service >/dev/null 2>&1 || true
}

clang_of_apt() {
	apt-cache search --names-only '^clang-[0-9]+$' | cut -d' ' -f1 | sort -V | tail -n 1
}

# Compilers differ in what they turn a check into, and the verifier sees what they left of it. Prints the name of the
# newest clang that apt offers, installed.
newest_clang() {
	local newest
	newest="$(clang_of_apt)"
	[ -n "$newest" ] || { privileged apt-get update >/dev/null && newest="$(clang_of_apt)"; }
	[ -n "$newest" ] || fail "apt offers no clang-N"
	need_packages "the newest clang that apt offers" "$newest=$newest" >&2
	echo "$newest"
}

# Prints the folder of what the newest clang builds. It begins with the dependencies that are built already, which no
# clang has a part in.
target_of_newest_clang() {
	local target
	target="${CARGO_TARGET_DIR:-$(repo_root)/target}"
	if [ -d "$target/quick" ] && [ ! -d "$target/newest-clang/quick" ]; then
		mkdir -p "$target/newest-clang/quick"
		cp -a "$target/quick/"{.fingerprint,build,deps} "$target/newest-clang/quick/"
	fi
	echo "$target/newest-clang"
}

need_cargo() {
	local installed="${CARGO_HOME:-$HOME/.cargo}/bin"
	if ! command -v cargo >/dev/null && [ -x "$installed/cargo" ]; then
		PATH="$installed:$PATH"
	fi
	command -v cargo >/dev/null ||
		fail "cargo is not installed; https://rustup.rs says how, in one line. Then run this again"
	# The BPF skeleton is generated while building, and formatted with it.
	rustfmt --version >/dev/null 2>&1 ||
		fail "rustfmt is not installed; run: rustup component add rustfmt"
}
