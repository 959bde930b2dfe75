# shellcheck shell=bash
# Reads a guest's log: what was wrong, and how many tests passed. Sourced by scripts/kernels.

# judge KERNEL LOG STATUS: a line for each thing that is wrong. Those that begin with `test` the guest has counted already.
judge() {
	local kernel="$1" log="$2" status="$3"
	if ! grep -q '^@done ' "$log"; then
		case "$status" in
		124 | 137) echo "the guest was not done after $LEG_SECONDS s, in: $(sed -n 's/^@run //p' "$log" | tail -n 1)" ;;
		*) echo "the guest ended early: $(grep -m 1 -E 'Kernel panic|BUG:|Oops' "$log" || tail -n 1 "$log")" ;;
		esac
	elif ! grep -q '^@result ' "$log"; then
		echo "no test program was run"
	fi
	sed -n 's/^@nomodule /module not loaded: /p' "$log"
	awk -F ' *[|] *' -v kernel="$kernel" '
		NR == FNR { if (!/^(#|$)/ && ($1 == "all" || index(" " $1 " ", " " kernel " "))) allowed[++rows] = $2; next }
		/^SKIPPED / {
			found = 0
			for (i = 1; i <= rows; i++) if (index($0, allowed[i])) found = 1
			if (!found) print substr($0, 1, 300) " (not in tests/kernels/skips)"
		}' "$here/skips" "$log"
	# Each failed test with the first line of what it said, which follows its name between dashes.
	awk '/^@run / { program = $2 }
		/^---- .* ----$/ { name = $0; gsub(/^---- | ----$/, "", name); next }
		name != "" { print "test", program, name ": " substr($0, 1, 300); name = "" }
		/^@result / && $6 >= 124 { print "test program", $2, "ended with", $6, "after", $7, "s" }' "$log"
}

# count LOG REASONS SECONDS: ok or FAILED, the release, tests passed, failed and skipped, seconds.
count() {
	awk -v release="$(sed -n 's/^@kernel //p' "$1")" -v seconds="$3" -v reasons="$(grep -cv '^test ' "$2" || true)" '
		/^@result / { passed += $3; failed += $4; skipped += $5 }
		END {
			failed += reasons
			print failed ? "FAILED" : "ok", release ? release : "-", passed + 0, failed + 0, skipped + 0, seconds
		}' "$1"
}

# What the guests' verifiers processed: a row for each program and compiler.
print_verified() {
	local kernel
	say "instructions that the verifier processed, and the limit"
	for kernel in "${kernels[@]}"; do
		[ -e "$work/$kernel.log" ] || continue
		awk -v kernel="$kernel" 'NR == FNR { name = $1; sub(/^[^ ]+ /, ""); compiler[name] = $0; next }
			$1 == "@verified" { printf "%-7s %-16s %-16s %8d of %8d\n", kernel, $3, compiler[$2], $4, $5 }' \
			"$work/compilers" "$work/$kernel.log"
	done
}

# What failed in a guest, as the tests said it, and how it ended if it was not done.
print_failures() {
	say "what failed under $1, from $work/$1.log"
	awk '/^failures:$/ { show = 1 } /^test result:/ { show = 0 } show' "$work/$1.log" | cut -c 1-300 | head -n 150
	grep -q '^@done ' "$work/$1.log" 2>/dev/null || tail -n 20 "$work/$1.log" | cut -c 1-300
}

# A line for each kernel and what was wrong with it. Sets $red if the run has failed.
print_summary() {
	local kernel state release p f s seconds note reason passed=0 failed=0 skipped=0 ran=0
	say "the kernels"
	red=0
	for kernel in "${kernels[@]}"; do
		read -r state release p f s seconds <"$work/$kernel.result"
		if [ "$state" = SKIPPED ]; then
			printf '%-7s SKIPPED: %s\n' "$kernel" "$(head -n 1 "$work/$kernel.reasons")"
			continue
		fi
		ran=$((ran + 1)) passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s)) note=
		if [ "$state" != ok ]; then
			if [[ "$REQUIRED" == *" $kernel "* ]]; then
				red=1
			else
				note=" (the run does not fail for it: $kernel is not required)"
			fi
		fi
		printf '%-7s %-28s %4d passed %4d failed %4d skipped %5d s  %s%s\n' \
			"$kernel" "$release" "$p" "$f" "$s" "$seconds" "$state" "$note"
		while read -r reason; do
			printf '        %s\n' "$reason"
		done <"$work/$kernel.reasons"
	done
	echo "$passed passed, $failed failed, $skipped skipped, in $((SECONDS)) s"
	if [ "$ran" -eq 0 ]; then
		echo "no kernel was to be had"
		red=1
	fi
}
