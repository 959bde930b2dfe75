//! Looks at what is there: filters and qdiscs as `tc` lists them, programs and maps as the kernel counts them,
//! and what a state directory still holds. Changes nothing.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use libbpf_rs::query::{MapInfoIter, ProgInfoIter, ProgInfoQueryOptions};
use libbpf_rs::{MapCore, MapHandle};

use crate::lab::{Lab, wait_until};
use crate::support::sh;

/// What `tc filter show` calls our filter.
const OURS: &str = "netoken_egress";

/// The filters on one side, as `tc` prints them; a priority without a filter of its own is left out.
pub fn filters(ns: &str, iface: &str, side: &str) -> Result<Vec<String>> {
    let text = sh(&format!("tc -n {ns} filter show dev {iface} {side}"))?;
    let is_filter =
        |line: &&str| !line.starts_with("filter") || line.contains(" handle ") || line.contains(" fh ");
    Ok(text.lines().filter(is_filter).map(str::to_string).collect())
}

/// Our filters on the egress side.
pub fn ours(ns: &str, iface: &str) -> Result<Vec<String>> {
    let mut found = filters(ns, iface, "egress")?;
    found.retain(|line| line.contains(OURS));
    Ok(found)
}

/// Fails unless that many filters of ours are there.
pub fn expect_ours(ns: &str, iface: &str, count: usize) -> Result<()> {
    let found = ours(ns, iface)?;
    ensure!(found.len() == count, "{iface}: {count} filters of ours expected, there are {found:#?}");
    Ok(())
}

/// Everybody else's filters, of both sides.
pub fn foreign(ns: &str, iface: &str) -> Result<Vec<String>> {
    let mut found = filters(ns, iface, "ingress")?;
    found.push("-- egress".to_string());
    found.extend(filters(ns, iface, "egress")?);
    found.retain(|line| !line.contains(OURS));
    Ok(found)
}

/// Whether the interface has a clsact qdisc.
pub fn has_clsact(ns: &str, iface: &str) -> Result<bool> {
    Ok(sh(&format!("tc -n {ns} qdisc show dev {iface}"))?.contains("clsact"))
}

/// Fails unless neither a qdisc nor a filter is on the interface.
pub fn expect_bare(ns: &str, iface: &str) -> Result<()> {
    let qdiscs = sh(&format!("tc -n {ns} qdisc show dev {iface}"))?;
    ensure!(!qdiscs.contains("clsact"), "{iface} still has a qdisc: {qdiscs}");
    let filters = [filters(ns, iface, "egress")?, filters(ns, iface, "ingress")?].concat();
    ensure!(filters.is_empty(), "{iface} still has filters: {filters:#?}");
    Ok(())
}

/// Fails unless the state directory is gone, or empty and not a mount point.
pub fn expect_no_state(lab: &Lab) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let inside = format!("{}/", lab.run.display());
    // The fifth field is the mount point. Elsewhere somebody may have bound the whole tree once more.
    let is_inside = |line: &&str| line.split(' ').nth(4).is_some_and(|point| point.starts_with(&inside));
    let mounted: Vec<&str> = mounts.lines().filter(is_inside).collect();
    let left = tree(&lab.run);
    ensure!(mounted.is_empty(), "still mounted: {mounted:#?}; the state directory holds {left:#?}");
    ensure!(left.is_empty(), "the state directory still holds {left:?}");
    Ok(())
}

fn tree(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        found.push(entry.path().display().to_string());
        found.extend(tree(&entry.path()));
    }
    found
}

/// The id of an instance's pinned map.
pub fn map_id(lab: &Lab, instance: &str, map: &str) -> Result<u32> {
    let path = lab.run.join("bpf").join(instance).join(map);
    let map = MapHandle::from_pinned_path(&path).with_context(|| format!("opening {}", path.display()))?;
    Ok(map.info()?.info.id)
}

/// Programs that use a map.
pub fn programs_of(map_id: u32) -> Vec<u32> {
    ProgInfoIter::with_query_opts(ProgInfoQueryOptions::default().include_map_ids(true))
        .filter(|program| program.map_ids.contains(&map_id))
        .map(|program| program.id)
        .collect()
}

/// Waits until neither a map nor a program that uses it is loaded any more.
pub fn expect_unloaded(map_id: u32) -> Result<()> {
    wait_until("the kernel to free the programs and maps", || {
        let used = !programs_of(map_id).is_empty() || MapInfoIter::default().any(|map| map.id == map_id);
        Ok((!used).then_some(()))
    })
}

/// The JSON records of a query, by their type.
pub fn records(stdout: &str, kind: &str) -> Result<Vec<serde_json::Value>> {
    let mut found = Vec::new();
    for line in stdout.lines() {
        let value: serde_json::Value =
            serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))?;
        if value["type"] == kind {
            found.push(value);
        }
    }
    Ok(found)
}

/// One counter of one instance, as a query in that namespace shows it.
pub fn counter(lab: &Lab, ns: &str, instance: &str, name: &str) -> Result<u64> {
    let out = lab.ok(&format!("--netns {ns} --query --json"))?;
    let all = records(&out, "counters")?;
    match all.iter().find(|record| record["instance"] == instance) {
        Some(record) => record[name].as_u64().with_context(|| format!("no counter {name}: {record}")),
        None => bail!("no counters of instance {instance}: {out}"),
    }
}
