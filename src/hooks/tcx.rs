//! tcx, where programs of others run (Linux 6.6): in front of the clsact qdisc and all its filters, and `tc filter show`
//! does not list them. What they pass on, drop or redirect does not get to a filter; only what they leave open does.

use std::io;

use anyhow::{Context, Result};
use libbpf_sys::{BPF_TCX_EGRESS, BPF_TCX_INGRESS, bpf_prog_query_opts};

use super::netlink::Side;

/// How many tcx programs are on one side of an interface in the network namespace of the calling thread. None on a kernel
/// without tcx.
///
/// # Errors
/// The kernel refused to say.
pub fn count(ifindex: u32, side: Side) -> Result<usize> {
    let place = match side {
        Side::Ingress => BPF_TCX_INGRESS,
        Side::Egress => BPF_TCX_EGRESS,
    };
    let mut opts = bpf_prog_query_opts {
        sz: size_of::<bpf_prog_query_opts>() as libbpf_sys::size_t,
        ..Default::default()
    };
    // SAFETY: `opts` is a whole structure whose size says so; without room for ids the kernel only counts.
    let result = unsafe { libbpf_sys::bpf_prog_query_opts(ifindex.cast_signed(), place, &mut opts) };
    match -result {
        // SAFETY: both fields of the union are the same number.
        0 => Ok(unsafe { opts.__bindgen_anon_1.count } as usize),
        // Nobody knows the place before 6.6; what has just gone has no programs.
        libc::EINVAL | libc::ENODEV => Ok(0),
        error => Err(io::Error::from_raw_os_error(error))
            .with_context(|| format!("asking for the tcx programs of interface {ifindex}")),
    }
}

/// What a person is told of them; nothing if there are none.
pub fn remark(count: usize, risk: &str) -> Option<String> {
    let run = match count {
        0 => return None,
        1 => "a tcx program runs".to_string(),
        count => format!("{count} tcx programs run"),
    };
    Some(format!("{run} {risk}; bpftool net shows what is there"))
}
