//! Compiles what `src/bpf` holds, the stamp and the guard, generates their skeletons into `OUT_DIR`, and writes down
//! there the names of the verdicts, so that Rust reads them out of the compiled programs instead of repeating them.

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

/// One object: its name, and the enum of its verdicts with what their names begin with.
struct Source {
    name: &'static str,
    verdicts: &'static str,
    prefix: &'static str,
}

const SOURCES: [Source; 2] = [
    Source { name: "netoken", verdicts: "netoken_verdict", prefix: "VERDICT_" },
    Source { name: "guard", verdicts: "netoken_guard_verdict", prefix: "GUARD_" },
];

fn main() -> Result<()> {
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").context("cargo sets OUT_DIR")?);
    let arch = env::var("CARGO_CFG_TARGET_ARCH").context("cargo sets CARGO_CFG_TARGET_ARCH")?;
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".to_string());
    let more = env::var("BPF_CFLAGS").unwrap_or_default();
    let kernel_types = Path::new("vmlinux").join(&arch);

    // A directory covers every file in it, so a new header needs no line here.
    println!("cargo::rerun-if-changed={SOURCE_DIR}");
    println!("cargo::rerun-if-changed=vmlinux");
    println!("cargo::rerun-if-env-changed=CLANG");
    println!("cargo::rerun-if-env-changed=BPF_CFLAGS");

    if !kernel_types.join("vmlinux.h").exists() {
        bail!(
            "no kernel types for {arch}: {} does not exist; \
             run `vmlinux/generate BTF_FILE {arch}` with the BTF of a kernel for that architecture",
            kernel_types.display()
        );
    }
    if Command::new(&clang).arg("--version").output().is_err() {
        bail!(
            "compiling the programs in {SOURCE_DIR}: `{clang}` cannot be run; install it (apt install clang) or set CLANG"
        );
    }
    SOURCES.iter().try_for_each(|source| source.build(&out_dir, &clang, &kernel_types, &more))
}

impl Source {
    fn build(&self, out_dir: &Path, clang: &str, kernel_types: &Path, more: &str) -> Result<()> {
        let source = format!("{SOURCE_DIR}/{}.bpf.c", self.name);
        let object = out_dir.join(format!("{}.bpf.o", self.name));
        let kernel_types = kernel_types.to_string_lossy();
        let args = [
            "-I",
            &kernel_types,
            // 32-bit registers (kernel 5.1): without them a checked length loses its bound in a shift.
            "-mcpu=v3",
            "-Wall",
            "-Wextra",
            "-Werror",
        ];
        SkeletonBuilder::new()
            .source(&source)
            .obj(&object)
            .clang(clang)
            .clang_args(args.into_iter().chain(more.split_whitespace()))
            .build_and_generate(out_dir.join(format!("{}.skel.rs", self.name)))
            .with_context(|| format!("building the skeleton of {source}"))?;
        self.write_verdicts(&object, &out_dir.join(format!("{}_verdicts.rs", self.name)))
    }

    /// Writes the table of the verdicts: number and name, `VERDICT_NO_ROOM` as `no_room`.
    fn write_verdicts(&self, object: &Path, to: &Path) -> Result<()> {
        let (name, prefix) = (self.verdicts, self.prefix);
        let btf = Btf::from_path(object).with_context(|| format!("reading BTF of {}", object.display()))?;
        let verdicts: Enum<'_> = btf
            .type_by_name(name)
            .with_context(|| format!("enum {name} is not in the BTF of {}", object.display()))?;
        let mut text = String::from("&[\n");
        for verdict in verdicts.iter() {
            let name = verdict.name.and_then(|n| n.to_str()).context("a verdict without a name")?;
            let name = name
                .strip_prefix(prefix)
                .with_context(|| format!("a verdict of {name} is called {prefix}…"))?;
            if name != "NONE" && name != "COUNT" {
                writeln!(text, "    ({}, \"{}\"),", verdict.value, name.to_lowercase())?;
            }
        }
        text.push_str("]\n");
        fs::write(to, text).with_context(|| format!("writing {}", to.display()))
    }
}
