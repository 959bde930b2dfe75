# shellcheck shell=bash
# What the guests run: builds the test programs once, and packs them with what they need into an initramfs for all
# kernels and one of modules for each. Sourced by scripts/kernels, which sets $root, $here, $cache and $work.

# What the guests have beside the test programs. What this machine lacks is left out; the tests that need it say so.
GUEST_TOOLS=(bash dash ip tc ss nstat bridge ethtool nft tcpdump bpftool modprobe setarch setpriv unshare nsenter findmnt mount umount
	timeout curl nginx iperf3 wg awk mawk sed grep cat cut head tail sort uniq wc tr seq sleep env id stat readlink
	realpath mkdir rmdir rm cp mv ln ls touch chmod mktemp tee sysctl ps pgrep pkill ping find xargs date od cmp
	dirname basename uname sync capsh paste)
# Beside those in tests/kernels/modules, which must load, what a test may ask for. A kernel may lack some.
GUEST_MODULES=(cls_flower cls_matchall cls_u32 act_mirred act_gact act_vlan act_skbedit sch_fq sch_fq_codel sch_htb
	sch_prio ipvlan macvlan bridge ip_gre ip6_gre ipip sit vxlan nft_ct nft_nat nft_masq nft_counter nft_chain_nat
	nft_reject nft_reject_inet nft_redir nft_limit nft_log nft_numgen nft_objref nft_hash nft_quota nft_fib_inet
	nf_conntrack nf_nat xt_mark tcp_diag inet_diag mptcp_diag ifb nlmon)

# Lines KIND NAME PATH of what cargo built, and `out DIRECTORY` of this package's build script.
artifacts() {
	sed -nE -e 's/.*"reason":"compiler-artifact".*"target":\{"kind":\["([^"]*)"\].*"name":"([^"]*)","src_path".*"executable":"([^"]*)".*/\1 \2 \3/p' \
		-e 's/.*"reason":"build-script-executed".*[#/]netoken[#@][^"]*".*"out_dir":"([^"]*)".*/out \1/p'
}

# keep_objects NAME CLANG ARTIFACTS: the BPF objects of the build by one compiler, and those of tests.
keep_objects() {
	local out
	out="$(awk '$1 == "out" { print $2 }' "$3")"
	mkdir -p "$work/objects/$1"
	cp "$out"/*.bpf.o "$work/objects/$1/"
	(cd "$root" && CLANG="$2" NETOKEN_TEST_COMPILE_TO="$work/objects/$1" "$(built packets)")
	echo "$1 $("$2" --version | sed -nE '1s/.*version ([0-9.]+).*/clang \1/p')" >>"$work/compilers"
}

# The path of a test program.
built() {
	awk -v name="$1" '$1 == "test" && $2 == name { print $3 }' "$work/artifacts"
}

build() {
	local target newest tests=(--test packets) name kernels
	say "building the test programs"
	while read -r name _ _ kernels; do
		if [ "$program" = "$name" ] || [[ -z "$program" && "$kernels" != asked ]]; then
			tests+=(--test "$name")
		fi
	done < <(programs)
	(cd "$root" && cargo test --no-run --quiet --profile quick "${tests[@]}" \
		--message-format=json-render-diagnostics) | artifacts >"$work/artifacts"
	keep_objects clang "${CLANG:-clang}" "$work/artifacts"

	newest="$(newest_clang)"
	target="$(target_of_newest_clang)"
	(cd "$root" && CLANG="$newest" cargo test --no-run --quiet --profile quick --test packets --target-dir "$target" \
		--message-format=json-render-diagnostics) | artifacts >"$work/artifacts.newest"
	keep_objects newest-clang "$newest" "$work/artifacts.newest"
}

# The rows of tests/kernels/programs.
programs() {
	grep -vE '^(#|$)' "$here/programs"
}

# Lines PROGRAM PART of tests/kernels/left-out that are about a kernel.
left_out() {
	[ -z "$program$filter" ] || return 0
	awk -F ' *[|] *' -v kernel="$1" '!/^#/ && index(" " $1 " ", " " kernel " ") { print $2, $3 }' "$here/left-out"
}

# Copies a program or library and what it is linked against to where it is on this machine.
pack() {
	local path
	for path in "$1" $(ldd "$1" 2>/dev/null | grep -oE '/[^ ]+' || true); do
		[ ! -e "$guest$path" ] || continue
		mkdir -p "$guest$(dirname "$path")"
		cp -L "$path" "$guest$path"
	done
}

# The part of the initramfs that all kernels share.
make_guest() {
	local tool path kind folder
	guest="$work/guest"
	mkdir -p "$guest"/usr/{bin,sbin,lib,lib64} "$guest"/{root,etc/kernels,var/log/nginx,var/lib/nginx,tmp}
	for folder in bin sbin lib lib64; do
		ln -s "usr/$folder" "$guest/$folder"
	done
	cp "$(command -v busybox)" "$guest/bin/busybox"
	for tool in "${GUEST_TOOLS[@]}"; do
		path="$(type -P "$tool")" || continue
		pack "$path"
	done
	ln -sf dash "$guest/bin/sh"
	[ ! -d /usr/lib/tc ] || cp -a /usr/lib/tc "$guest/usr/lib/tc"
	if [ -f /etc/nginx/mime.types ]; then
		mkdir -p "$guest/etc/nginx"
		cp /etc/nginx/mime.types "$guest/etc/nginx/"
	fi
	printf 'root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/:/bin/sh\nwww-data:x:33:33::/:/bin/sh\ntcpdump:x:104:104::/:/bin/sh\n' >"$guest/etc/passwd"
	printf 'root:x:0:\nnogroup:x:65534:\nwww-data:x:33:\ntcpdump:x:104:\n' >"$guest/etc/group"
	echo guest >"$guest/etc/hostname"
	printf '127.0.0.1 localhost guest\n::1 localhost\n' >"$guest/etc/hosts"
	printf 'passwd: files\ngroup: files\nhosts: files\n' >"$guest/etc/nsswitch.conf"
	cp "$here/init" "$guest/init"
	cp "$here/modules" "$guest/etc/kernels/"
	cp -r "$work/objects" "$guest/objects"
	[ ! -d "$work/broken" ] || cp -r "$work/broken" "$guest/broken"
	# Some tests read what lies beside the sources.
	mkdir -p "$guest$root"
	cp -r "$root/examples" "$root/README.md" "$guest$root/"
	echo "$root" >"$guest/etc/kernels/root"
	printf '%s' "$filter" >"$guest/etc/kernels/filter"

	while read -r kind _ path; do
		case "$kind" in
		test | bin) pack "$path" ;;
		esac
	done <"$work/artifacts"
	pack_cpio "$guest" <<<. >"$work/guest.cpio"
	say "the initramfs has $(($(stat -c %s "$work/guest.cpio") >> 20)) MiB"
}

# An archive of what is named, with all that is below it, owned by root: pack_cpio DIRECTORY <PATHS
pack_cpio() {
	(cd "$1" && xargs -I{} find {} | cpio -o -H newc -R 0:0 --quiet)
}

# Each path, and before it the folders above it: without them the kernel unpacks nothing.
with_parents() {
	awk -F/ '{ path = $1; print path; for (i = 2; i <= NF; i++) { path = path "/" $i; print path } }' | sort -u
}

# The part that one kernel needs: its modules, what modprobe wants to know about them, and the list of what to run.
make_modules() {
	local kernel="$1" release tree own="$work/$1.own" name kernels seconds threads path
	release="$(cat "$cache/$kernel/release")"
	tree="$cache/$kernel/modules"
	{
		for name in $(grep -v '^#' "$here/modules") "${GUEST_MODULES[@]}"; do
			modprobe -d "$tree" -S "$release" --show-depends "$name" 2>/dev/null || true
		done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | sed "s|^$tree/||; s|^lib/|usr/lib/|"
		(cd "$tree" && find "usr/lib/modules/$release" -maxdepth 1 -name 'modules.*')
	} | with_parents | (cd "$tree" && cpio -o -H newc -R 0:0 --quiet)
	mkdir -p "$own/etc/kernels"
	while read -r name threads seconds kernels; do
		if [ -n "$program" ]; then
			[ "$program" = "$name" ] || continue
		else
			[ "$kernels" = all ] || [[ " $kernels " == *" $kernel "* ]] || continue
		fi
		path="$(built "$name")"
		[ -n "$path" ] || fail "cargo built no test program $name, which is in tests/kernels/programs"
		echo "$name $path $threads $seconds"
	done < <(programs) >"$own/etc/kernels/programs"
	left_out "$kernel" >"$own/etc/kernels/left-out"
	printf 'etc\netc/kernels\netc/kernels/programs\netc/kernels/left-out\n' |
		(cd "$own" && cpio -o -H newc -R 0:0 --quiet)
	rm -rf "$own"
}
