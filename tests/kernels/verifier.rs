//! The verifier: every program of every compiler loads, and takes no more of its work than is recorded.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::{env, fs};

use anyhow::{Context, Result, bail, ensure};
use libbpf_rs::btf::Btf;
use libbpf_rs::btf::types::{DataSec, MemberAttr, Struct, Var};
use libbpf_rs::{ObjectBuilder, OpenObject, PrintLevel, ReferencesType};
use libtest_mimic::Trial;
use netoken::kernel::Kernel;

use crate::support::{self, Need};
use crate::table;

/// BPF_LOG_STATS: how much was processed, and nothing else.
const STATS: u32 = 4;

/// The settings with which each object is loaded, as members of `config`: they decide what the verifier sees.
fn settings() -> [(&'static str, Vec<(&'static str, u8)>); 2] {
    let check_mtu = ("has_check_mtu", Kernel::probe().has_check_mtu.into());
    [("Ethernet", vec![check_mtu]), ("no link header", vec![check_mtu, ("l2_len_bytes", 0)])]
}

/// Compiler and path of each object.
fn objects() -> Result<Vec<(String, PathBuf)>> {
    let Some(dir) = env::var_os("NETOKEN_TEST_OBJECTS") else {
        return Ok(bpf_objects(Path::new(env!("OUT_DIR")))?
            .into_iter()
            .map(|path| ("this build".into(), path))
            .collect());
    };
    let mut all = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("reading {}", dir.display()))? {
        let entry = entry?;
        let compiler = entry.file_name().to_string_lossy().into_owned();
        all.extend(bpf_objects(&entry.path())?.into_iter().map(|path| (compiler.clone(), path)));
    }
    all.sort();
    Ok(all)
}

fn bpf_objects(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        paths.push(entry?.path());
    }
    paths.retain(|path| path.to_string_lossy().ends_with(".bpf.o"));
    Ok(paths)
}

pub fn cases(kernel: Option<&str>) -> Vec<Trial> {
    let objects = match objects() {
        Ok(objects) if !objects.is_empty() => objects,
        other => {
            return vec![support::case("verifier::objects", &[], move || bail!("no BPF objects: {other:?}"))];
        }
    };
    let case = |(compiler, path): (String, PathBuf)| {
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let kernel = kernel.map(str::to_string);
        support::case(&format!("verifier::{file} by {compiler}"), &[Need::Root], move || {
            check(&compiler, &path, kernel.as_deref())
        })
    };
    objects.into_iter().map(case).collect()
}

fn check(compiler: &str, path: &Path, kernel: Option<&str>) -> Result<()> {
    let mut most: BTreeMap<String, usize> = BTreeMap::new();
    for (what, settings) in settings() {
        for (program, processed) in load(path, &settings).with_context(|| format!("with {what}"))? {
            let entry = most.entry(program).or_default();
            *entry = processed.max(*entry);
        }
    }
    ensure!(!most.is_empty(), "the kernel did not say how many instructions it processed");
    let limits =
        kernel.map(|kernel| table::rows::<2>(include_str!("verifier-limits"), kernel)).transpose()?;
    let mut wrong = Vec::new();
    for (program, processed) in most {
        let of = |row: &&([String; 2], String)| row.0[0] == compiler && row.0[1] == program;
        let limit = match &limits {
            None => "-".to_string(),
            Some(rows) => match rows.iter().find(of) {
                Some((_, limit)) => limit.clone(),
                None => "none".to_string(),
            },
        };
        println!("@verified {compiler} {program} {processed} {limit}");
        if limits.is_some() && limit.parse().is_ok_and(|limit: usize| processed > limit) {
            wrong.push(format!(
                "{program}: {processed} instructions processed, more than the recorded {limit}"
            ));
        } else if limits.is_some() && limit.parse::<usize>().is_err() {
            wrong.push(format!("{program}: {processed} instructions processed, and no limit is recorded"));
        }
    }
    ensure!(wrong.is_empty(), "{} (tests/kernels/verifier-limits)", wrong.join("; "));
    Ok(())
}

/// Loads all programs of an object, and returns for each how many instructions were processed.
fn load(path: &Path, settings: &[(&str, u8)]) -> Result<Vec<(String, usize)>> {
    static LOG: Mutex<String> = Mutex::new(String::new());
    // libbpf has one printer for the whole process.
    static TURN: Mutex<()> = Mutex::new(());
    fn keep(_: PrintLevel, message: String) {
        LOG.lock().unwrap_or_else(|e| e.into_inner()).push_str(&message);
    }
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    let mut object = ObjectBuilder::default().open_file(path).context("opening")?;
    configure(&mut object, &Btf::from_path(path)?, settings)?;
    for mut program in object.progs_mut() {
        program.set_log_level(STATS);
    }
    LOG.lock().unwrap_or_else(|e| e.into_inner()).clear();
    let before = libbpf_rs::set_print(Some((PrintLevel::Debug, keep)));
    let loaded = object.load();
    libbpf_rs::set_print(before);
    let log = std::mem::take(&mut *LOG.lock().unwrap_or_else(|e| e.into_inner()));
    match loaded {
        Ok(_) => processed(&log),
        Err(error) => {
            println!("{log}");
            bail!("the verifier of this kernel refuses it: {error}: {}", reason(&log))
        }
    }
}

/// Sets members of the global constant `config`, if the object has one.
fn configure(object: &mut OpenObject, btf: &Btf<'_>, settings: &[(&str, u8)]) -> Result<()> {
    let Some(mut map) = object.maps_mut().find(|map| map.name().to_string_lossy().ends_with(".rodata"))
    else {
        return Ok(());
    };
    let Some(section) = btf.type_by_name::<DataSec<'_>>(".rodata") else { return Ok(()) };
    let bytes = map.initial_value_mut().context("constants without a value")?;
    for constant in section.iter() {
        let var: Var<'_> = btf.type_by_id(constant.ty).context("a constant that is no variable")?;
        if var.name().is_none_or(|name| name != "config") {
            continue;
        }
        let config: Struct<'_> = var
            .referenced_type()
            .skip_mods_and_typedefs()
            .try_into()
            .ok()
            .context("a config that is no struct")?;
        for (name, value) in settings {
            let member = config.iter().find(|member| member.name.is_some_and(|found| found == *name));
            let member = member.with_context(|| format!("config has no {name}"))?;
            let MemberAttr::Normal { offset } = member.attr else { bail!("{name} is a bit field") };
            // The others of its bytes are zero, or it is this one alone.
            bytes[constant.offset as usize + offset as usize / 8] = *value;
        }
    }
    Ok(())
}

/// libbpf names the program in front of its log.
fn processed(log: &str) -> Result<Vec<(String, usize)>> {
    let mut found = Vec::new();
    let mut program = "";
    for line in log.lines() {
        if let Some((before, _)) = line.split_once("': -- BEGIN PROG LOAD LOG") {
            program = before.split_once('\'').context("no name in front of a log")?.1;
        }
        if let Some(rest) = line.strip_prefix("processed ") {
            let number = rest.split_whitespace().next().context("no number")?;
            found.push((program.to_string(), number.parse()?));
        }
    }
    Ok(found)
}

/// What the verifier said last before its statistics, or else libbpf.
fn reason(log: &str) -> &str {
    let lines: Vec<&str> = log.lines().collect();
    let begin = lines.iter().rposition(|line| line.contains("BEGIN PROG LOAD LOG"));
    let end = lines.iter().rposition(|line| line.contains("END PROG LOAD LOG"));
    let of_verifier = match (begin, end) {
        (Some(begin), Some(end)) if begin < end => &lines[begin + 1..end],
        _ => &lines[..],
    };
    let telling = |line: &&&str| !line.starts_with("processed ") && !line.trim().is_empty();
    of_verifier.iter().rev().find(telling).copied().unwrap_or("it does not say why")
}
