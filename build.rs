//! Compiles `src/bpf/netoken.bpf.c`, generates its skeleton into `OUT_DIR`, and writes down there the names
//! of the verdicts, so that Rust reads them out of the compiled program instead of repeating them.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use libbpf_cargo::SkeletonBuilder;
use libbpf_rs::btf::Btf;
use libbpf_rs::btf::types::Enum;

const SOURCE_DIR: &str = "src/bpf";
const SOURCE: &str = "src/bpf/netoken.bpf.c";

fn main() -> Result<()> {
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").context("cargo sets OUT_DIR")?);
    let arch = env::var("CARGO_CFG_TARGET_ARCH").context("cargo sets CARGO_CFG_TARGET_ARCH")?;
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".to_string());
    let kernel_types = Path::new("vmlinux").join(&arch);

    // A directory covers every file in it, so a new header needs no line here.
    println!("cargo::rerun-if-changed={SOURCE_DIR}");
    println!("cargo::rerun-if-changed=vmlinux");
    println!("cargo::rerun-if-env-changed=CLANG");

    if !kernel_types.join("vmlinux.h").exists() {
        bail!(
            "no kernel types for {arch}: {} does not exist; \
             run `vmlinux/generate BTF_FILE {arch}` with the BTF of a kernel for that architecture",
            kernel_types.display()
        );
    }
    if Command::new(&clang).arg("--version").output().is_err() {
        bail!("compiling {SOURCE}: `{clang}` cannot be run; install it (apt install clang) or set CLANG");
    }

    let object = out_dir.join("netoken.bpf.o");
    SkeletonBuilder::new()
        .source(SOURCE)
        .obj(&object)
        .clang(&clang)
        .clang_args([
            "-I",
            &kernel_types.to_string_lossy(),
            // 32-bit registers (kernel 5.1): without them a checked length loses its bound in a shift.
            "-mcpu=v3",
            "-Wall",
            "-Wextra",
            "-Werror",
        ])
        .build_and_generate(out_dir.join("netoken.skel.rs"))
        .with_context(|| format!("building the skeleton of {SOURCE}"))?;

    write_verdicts(&object, &out_dir.join("verdicts.rs"))
}

/// Writes the table of `enum netoken_verdict`: number and name, `VERDICT_NO_ROOM` as `no_room`.
fn write_verdicts(object: &Path, to: &Path) -> Result<()> {
    let btf = Btf::from_path(object).with_context(|| format!("reading BTF of {}", object.display()))?;
    let verdicts: Enum<'_> =
        btf.type_by_name("netoken_verdict").context("enum netoken_verdict is not in the program's BTF")?;
    let mut text = String::from("&[\n");
    for verdict in verdicts.iter() {
        let name = verdict.name.and_then(|n| n.to_str()).context("a verdict without a name")?;
        let name = name.strip_prefix("VERDICT_").context("a verdict is called VERDICT_…")?;
        if name != "NONE" && name != "COUNT" {
            writeln!(text, "    ({}, \"{}\"),", verdict.value, name.to_lowercase())?;
        }
    }
    text.push_str("]\n");
    fs::write(to, text).with_context(|| format!("writing {}", to.display()))
}
