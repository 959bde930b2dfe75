//! The table of features: each is probed, and a deviation either way fails.

use std::ffi::CStr;
use std::path::Path;
use std::{fs, ptr};

use anyhow::{Context, Result, bail, ensure};
use libbpf_sys as bpf;
use libtest_mimic::Trial;
use netoken::kernel::Kernel;

use crate::support::{self, Need};
use crate::table;

/// The helpers that the table may name, by the numbers of include/uapi/linux/bpf.h.
const HELPERS: &[(&str, bpf::bpf_func_id)] = &[
    ("bpf_skb_change_tail", bpf::BPF_FUNC_skb_change_tail),
    ("bpf_l4_csum_replace", bpf::BPF_FUNC_l4_csum_replace),
    ("bpf_perf_event_output", bpf::BPF_FUNC_perf_event_output),
    ("bpf_ringbuf_output", bpf::BPF_FUNC_ringbuf_output),
    ("bpf_check_mtu", bpf::BPF_FUNC_check_mtu),
    ("bpf_ktime_get_tai_ns", bpf::BPF_FUNC_ktime_get_tai_ns),
    ("bpf_timer_init", bpf::BPF_FUNC_timer_init),
    ("bpf_loop", bpf::BPF_FUNC_loop),
];

/// Whether the kernel has what a row names: KIND:NAME.
fn has(feature: &str, symbols: &str) -> Result<bool> {
    let (kind, name) = feature.split_once(':').context("a feature is KIND:NAME")?;
    // SAFETY: no options are passed, for which libbpf documents a null pointer, and its names are constant strings
    // or null.
    let answer = unsafe {
        match kind {
            "program" => {
                let number = number_of(name, bpf::libbpf_bpf_prog_type_str)?;
                bpf::libbpf_probe_bpf_prog_type(number, ptr::null())
            }
            "map" => {
                let number = number_of(name, bpf::libbpf_bpf_map_type_str)?;
                bpf::libbpf_probe_bpf_map_type(number, ptr::null())
            }
            "helper" => {
                let known = HELPERS.iter().find(|(helper, _)| *helper == name);
                let (_, number) = known.with_context(|| format!("add {name} to HELPERS"))?;
                bpf::libbpf_probe_bpf_helper(bpf::BPF_PROG_TYPE_SCHED_CLS, *number, ptr::null())
            }
            "symbol" => symbols.lines().any(|line| line.split_whitespace().nth(2) == Some(name)).into(),
            "btf" => Path::new("/sys/kernel/btf").join(name).exists().into(),
            // What the product has found out, and decides by.
            "netoken" => match name {
                "check_mtu" => Kernel::probe().has_check_mtu.into(),
                "tai" => Kernel::probe().has_tai.into(),
                _ => bail!("the product probes no {name}"),
            },
            _ => bail!("there is no kind '{kind}'"),
        }
    };
    ensure!(answer >= 0, "probing failed: {}", std::io::Error::from_raw_os_error(-answer));
    Ok(answer == 1)
}

/// The number of what libbpf calls so.
///
/// # Safety
/// `name_of` returns a constant string, or null.
unsafe fn number_of(
    name: &str,
    name_of: unsafe extern "C" fn(u32) -> *const std::ffi::c_char,
) -> Result<u32> {
    // SAFETY: as the caller promises.
    let is = |number: &u32| unsafe {
        let found = name_of(*number);
        !found.is_null() && CStr::from_ptr(found).to_str() == Ok(name)
    };
    (0..256).find(is).with_context(|| format!("libbpf knows no {name}"))
}

fn check(kernel: &str) -> Result<()> {
    let symbols = fs::read_to_string("/proc/kallsyms").context("/proc/kallsyms")?;
    let mut wrong = Vec::new();
    for ([feature], expected) in table::rows(include_str!("expected"), kernel)? {
        let found = has(&feature, &symbols).with_context(|| feature.clone())?;
        let found = if found { "yes" } else { "no" };
        if expected != found {
            wrong.push(format!("{feature}: tests/kernels/expected says {expected}, this kernel {found}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}

pub fn case(kernel: Option<String>) -> Trial {
    let name = "expected::the_kernel_has_what_the_table_says";
    let Some(kernel) = kernel else {
        eprintln!("SKIPPED {name}: the table is of the kernels that scripts/kernels runs");
        return Trial::test(name, || Ok(())).with_ignored_flag(true);
    };
    support::case(name, &[Need::Root], move || check(&kernel))
}
