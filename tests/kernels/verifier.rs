//! The verifier: every program of every compiler loads, and takes no more of its work than is recorded.

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
/// BPF_LOG_LEVEL1: each instruction on the way to what it refuses.
const INSTRUCTIONS: u32 = 1;
/// How much of that way is shown.
const WAY_LINES: usize = 80;

/// The constants that the product sets by what the kernel has: they decide what the verifier sees.
fn settings() -> [(&'static str, bool); 2] {
    let kernel = Kernel::probe();
    [("config.has_check_mtu", kernel.has_check_mtu), ("has_tai", kernel.has_tai)]
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
    let programs = match load(path, STATS)? {
        Ok(log) => processed(&log)?,
        Err((error, log)) => {
            let way = load(path, STATS | INSTRUCTIONS)?.err().map_or(log.clone(), |(_, log)| log);
            let lines: Vec<&str> = way.lines().filter(|line| !line.starts_with("libbpf:")).collect();
            println!("{}", lines[lines.len().saturating_sub(WAY_LINES)..].join("\n"));
            bail!("the verifier of this kernel refuses it: {error}: {}", reason(&log));
        }
    };
    ensure!(!programs.is_empty(), "the kernel did not say how many instructions it processed");
    let Some(kernel) = kernel else {
        programs.iter().for_each(|(program, processed)| println!("{program}: {processed} instructions"));
        return Ok(());
    };
    let limits = table::rows::<2>(include_str!("verifier-limits"), kernel)?;
    let mut wrong = Vec::new();
    for (program, processed) in programs {
        let row = limits.iter().find(|([by, of], _)| by == compiler && *of == program);
        let limit: usize = row.map_or(Ok(0), |(_, limit)| limit.parse())?;
        // scripts/kernels makes a table of these.
        println!("@verified {compiler} {program} {processed} {limit}");
        if row.is_none() {
            wrong.push(format!("{program}: {processed} instructions processed, and no limit is recorded"));
        } else if processed > limit {
            wrong.push(format!(
                "{program}: {processed} instructions processed, the recorded limit is {limit}"
            ));
        }
    }
    ensure!(wrong.is_empty(), "{} (tests/kernels/verifier-limits)", wrong.join("; "));
    Ok(())
}

/// Loads all programs of an object. Returns what libbpf and the verifier say meanwhile, also beside the error of the
/// load.
fn load(path: &Path, log_level: u32) -> Result<Result<String, (libbpf_rs::Error, String)>> {
    static LOG: Mutex<String> = Mutex::new(String::new());
    // libbpf has one printer for the whole process.
    static TURN: Mutex<()> = Mutex::new(());
    fn keep(_: PrintLevel, message: String) {
        LOG.lock().unwrap_or_else(|e| e.into_inner()).push_str(&message);
    }
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    let mut object = ObjectBuilder::default().open_file(path).context("opening")?;
    configure(&mut object, &Btf::from_path(path)?)?;
    for mut program in object.progs_mut() {
        program.set_log_level(log_level);
    }
    LOG.lock().unwrap_or_else(|e| e.into_inner()).clear();
    let before = libbpf_rs::set_print(Some((PrintLevel::Debug, keep)));
    let loaded = object.load();
    libbpf_rs::set_print(before);
    let log = std::mem::take(&mut *LOG.lock().unwrap_or_else(|e| e.into_inner()));
    Ok(match loaded {
        Ok(_) => Ok(log),
        Err(error) => Err((error, log)),
    })
}

/// Sets those of the constants that the object has: a byte of its own, or the member of a structure.
fn configure(object: &mut OpenObject, btf: &Btf<'_>) -> Result<()> {
    let Some(section) = btf.type_by_name::<DataSec<'_>>(".rodata") else { return Ok(()) };
    let mut map = object.maps_mut().find(|map| map.name().to_string_lossy().ends_with(".rodata"));
    let bytes = map.as_mut().and_then(|map| map.initial_value_mut()).context("constants without a value")?;
    for (setting, value) in settings() {
        let (name, member) =
            setting.split_once('.').map_or((setting, None), |(name, member)| (name, Some(member)));
        for constant in section.iter() {
            let var: Var<'_> = btf.type_by_id(constant.ty).context("a constant that is no variable")?;
            if var.name().is_some_and(|found| found == name) {
                bytes[constant.offset as usize + offset_of(&var, member)?] = value.into();
            }
        }
    }
    Ok(())
}

/// Where a member stands in a variable; without one, at its beginning.
fn offset_of(var: &Var<'_>, member: Option<&str>) -> Result<usize> {
    let Some(name) = member else { return Ok(0) };
    let of: Struct<'_> =
        var.referenced_type().skip_mods_and_typedefs().try_into().ok().context("it is no structure")?;
    let member = of.iter().find(|member| member.name.is_some_and(|found| found == name));
    match member.with_context(|| format!("there is no {name} in it"))?.attr {
        MemberAttr::Normal { offset } => Ok(offset as usize / 8),
        MemberAttr::BitField { .. } => bail!("{name} is a bit field"),
    }
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

/// The last instruction's complaint, which stands in front of the statistics; or else what libbpf said.
fn reason(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    let begin = lines.iter().rposition(|line| line.contains("BEGIN PROG LOAD LOG"));
    let of_verifier = &lines[begin.map_or(0, |begin| begin + 1)..];
    let ends = |line: &&str| {
        ["verification time", "stack depth", "processed ", "-- END PROG"]
            .iter()
            .any(|with| line.starts_with(with))
    };
    let complaint: Vec<&str> = of_verifier.iter().copied().take_while(|line| !ends(line)).collect();
    complaint[complaint.len().saturating_sub(3)..].join("; ")
}
