# shellcheck shell=bash
# Gets kernels of Debian and keeps them: fetch_kernel leaves one in $cache/SERIES. Nothing is installed; apt works on
# a configuration of its own. Sourced by scripts/kernels.

FRESH_DAYS=7

# The mirror that this machine uses for a Debian archive, by the end of its address: mirror debian deb.debian.org
mirror() {
	local found
	found="$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.{list,sources} 2>/dev/null | grep -v '^ *#' |
		grep -oE "https?://[^] ]+/$1/?( |$)" | head -n 1)" || true
	found="${found%% *}"
	echo "${found:-http://$2/$1}"
}

write_apt_conf() {
	local keyring=/usr/share/keyrings/debian-archive-keyring.gpg debian security suite
	mkdir -p "$cache"/apt/{lists,archives}/partial
	debian="$(mirror debian deb.debian.org)"
	security="$(mirror debian-security deb.debian.org)"
	{
		for suite in bullseye bookworm bookworm-backports trixie trixie-backports sid; do
			echo "deb [arch=amd64 signed-by=$keyring] $debian $suite main"
		done
		for suite in bullseye-security bookworm-security trixie-security; do
			echo "deb [arch=amd64 signed-by=$keyring] $security $suite main"
		done
	} >"$cache/apt/sources.list"
	: >"$cache/apt/status"
	# An archived suite's index is past its date, and is still the newest that there is.
	cat >"$cache/apt/apt.conf" <<-EOF
		Dir::Etc::sourcelist "$cache/apt/sources.list";
		Dir::Etc::sourceparts "/dev/null";
		Dir::Etc::preferencesparts "/dev/null";
		Dir::State::Lists "$cache/apt/lists";
		Dir::State::status "$cache/apt/status";
		Dir::Cache "$cache/apt";
		Acquire::Languages "none";
		Acquire::Check-Valid-Until "false";
		Acquire::Retries "3";
		APT::Sandbox::User "$(id -un)";
	EOF
}

private_apt() {
	local command="$1"
	shift
	APT_CONFIG="$cache/apt/apt.conf" "$command" "$@"
}

is_fresh() {
	[ -n "$(find "$1" -maxdepth 0 -mtime "-$FRESH_DAYS" 2>/dev/null)" ]
}

# One suite that is not to be had is no reason to do without the others, and what is cached is better than nothing.
update_lists() {
	is_fresh "$cache/apt/updated" && return
	write_apt_conf
	say "looking for newer kernels"
	if private_apt apt-get update -q >"$cache/apt/log" 2>&1; then
		touch "$cache/apt/updated"
	else
		grep -E '^[EW]:' "$cache/apt/log" >&2 || true
	fi
}

# The newest image package of a series, or of all.
newest_image() {
	local series="${1//./\\.}"
	[ "$1" != newest ] || series='[0-9]+\.[0-9]+'
	private_apt apt-cache search --names-only "^linux-image-$series\.[0-9].*-cloud-amd64\$" |
		cut -d' ' -f1 | sort -V | tail -n 1
}

# Leaves in $cache/SERIES: vmlinuz, release, package and modules/usr/lib/modules/RELEASE. Prints why not, if not.
# Two runs share the cache; one fetches at a time.
fetch_kernel() {
	(
		flock 9
		update_lists >&2
		fetch_package "$1"
	) 9>"$cache/lock"
}

fetch_package() {
	local kernel="$1" image
	if [ -e "$cache/$kernel/release" ] && is_fresh "$cache/$kernel/checked"; then
		return
	fi
	image="$(newest_image "$kernel")"
	if [ -z "$image" ]; then
		[ -e "$cache/$kernel/release" ] && return
		echo "no package linux-image-$kernel…-cloud-amd64 in the archive"
		return 1
	fi
	if [ "$(cat "$cache/$kernel/package" 2>/dev/null)" = "$image" ]; then
		touch "$cache/$kernel/checked"
		return
	fi
	unpack_package "$kernel" "$image"
}

unpack_package() {
	local kernel="$1" image="$2" parts new="$cache/$1.new" release="${2#linux-image-}" deb
	rm -rf "$new"
	mkdir -p "$new/debs" "$new/modules/usr/lib"
	# From 7 on the image is a shell around three others.
	mapfile -t parts < <(private_apt apt-cache depends "$image" |
		awk '$1 == "Depends:" && $2 ~ /^linux-(base|binary|modules)-/ { print $2 }')
	if ! (cd "$new/debs" && private_apt apt-get download -q "$image" "${parts[@]}") >"$new/log" 2>&1; then
		[ -e "$cache/$kernel/release" ] && return
		echo "$image cannot be fetched: $(grep -m 1 '^E:' "$new/log" || tail -n 1 "$new/log")"
		return 1
	fi
	for deb in "$new"/debs/*.deb; do
		dpkg -x "$deb" "$new/tree"
	done
	cp "$(find "$new/tree" -name 'vmlinuz*' -type f | head -n 1)" "$new/vmlinuz"
	mv "$(find "$new/tree" -path '*/lib/modules' -type d | head -n 1)" "$new/modules/usr/lib/modules"
	ln -s usr/lib "$new/modules/lib"
	depmod -b "$new/modules" "$release"
	rm -rf "$new/debs" "$new/tree"
	echo "$release" >"$new/release"
	echo "$image" >"$new/package"
	touch "$new/checked"
	rm -rf "${cache:?}/$kernel"
	mv "$new" "$cache/$kernel"
}
