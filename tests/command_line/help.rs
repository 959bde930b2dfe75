//! Help, and wrong usage. Nothing here needs any right.

use anyhow::{Context, Result, ensure};

use crate::said::netoken;

/// Every flag that the first users know.
const FLAGS: [&str; 24] = [
    "--iface",
    "--interface",
    "--attach",
    "--query",
    "--detach",
    "--destroy",
    "--token",
    "--policy",
    "--watch",
    "--allow-missing",
    "--quiet",
    "--sample",
    "--hook",
    "--detach-on-exit",
    "--priority",
    "--handle",
    "--option-kind",
    "--exid",
    "--slot",
    "--netns",
    "--instance",
    "--json",
    "--help",
    "--version",
];

/// The flag that a line of help describes, and what it says of it on the same line.
fn described(line: &str) -> Option<(&str, &str)> {
    let line = line.trim_start();
    let at = line.find("--").filter(|_| line.starts_with('-'))?;
    let (names, about) = line.split_once("  ").unwrap_or((line, ""));
    Some((names.get(at..)?.split([' ', ',', '=']).next()?, about.trim()))
}

pub fn every_flag_is_described() -> Result<()> {
    let help = netoken(&["--help"])?.code(0)?;
    for flag in FLAGS {
        ensure!(help.out.contains(flag), "{flag} is not in the help:\n{}", help.out);
    }
    let lines: Vec<&str> = help.out.lines().collect();
    let mut count = 0;
    for (at, line) in lines.iter().enumerate() {
        let Some((flag, about)) = described(line) else { continue };
        count += 1;
        let next = lines.get(at + 1).map_or("", |next| next.trim());
        let about = if about.is_empty() && !next.starts_with('-') { next } else { about };
        ensure!(about.len() > 8, "{flag} has no description:\n{}", help.out);
    }
    // --interface is another name of --iface and has no line of its own.
    ensure!(count == FLAGS.len() - 1, "{count} lines of flags in\n{}", help.out);
    Ok(())
}

pub fn an_example_is_shown() -> Result<()> {
    let help = netoken(&["--help"])?.code(0)?;
    let (_, examples) = help.out.split_once("Examples:").context("no examples")?;
    for example in ["netoken --iface eth0 --attach", "netoken --query", "netoken --iface eth0 --destroy"] {
        ensure!(examples.contains(example), "'{example}' is not among the examples:\n{examples}");
    }
    ensure!(help.out.contains("Exit codes: 0"), "{}", help.out);
    Ok(())
}

pub fn a_flag_in_the_wrong_place_is_named_alone() -> Result<()> {
    for mode in ["--query", "--detach", "--destroy"] {
        let said = netoken(&["-i", "none0", mode, "--sample", "5"])?.code(2)?.err(&[mode, "--sample"])?;
        ensure!(!said.err.contains("--exid"), "flags that nobody typed: {said:#?}");
    }
    Ok(())
}

pub fn help_and_version_are_no_errors() -> Result<()> {
    for flag in ["--help", "-h", "--version", "-V"] {
        let said = netoken(&[flag])?.code(0)?;
        ensure!(!said.out.is_empty() && said.err.is_empty(), "{flag}: {said:#?}");
    }
    Ok(())
}

/// Of an interface that is not there, so that nothing happens if it is taken for right.
pub fn wrong_usage_is_exit_code_2() -> Result<()> {
    for line in [
        "",
        "--iface none0",
        "--attach",
        "--detach",
        "--attach --iface",
        "--iface none0 --attach --detach",
        "--iface none0 --query --destroy",
        "--iface none0 --query --quiet",
        "--iface none0 --destroy --priority 7",
        "--iface none0 --attach --sample 0",
        "--iface none0 --attach --sample many",
        "--iface none0 --attach --quiet --detach-on-exit",
        "--iface none0 --attach --option-kind 8",
        "--iface none0 --attach --exid 0x10000",
        "--iface none0 --attach --instance a.b",
        "--iface none0 --attach --instance ../up",
        "--query --instance tc",
        "guard --query --instance xdp",
        "key list --instance ip",
        "--iface none0 --attach --priority 65536",
        "--iface none0 --attach --token 0011223344556677 --policy p.toml",
        "--iface none0 --attach extra",
        "--iface none0 --attch",
        "--iface none0 --attach --slot 0",
        "--iface none0 --attach --hook xdp",
        "--iface none0 --attach --hook tcx --priority 7",
        "guard --iface none0 --attach --hook xdp --priority 7",
        "--iface none0 --query --slot 16",
        "key",
        "key new",
        "key new Edge",
        "key new edge --id 16",
        "key rotate edge --step back",
        "--query key list",
        "key list --query",
        "policy test --dst 192.0.2.1 --port 443 --mark zz",
        "policy test --dst 192.0.2.1 --port 443 --mark 0x10/0x10",
        "policy test --dst 192.0.2.1 --port 443 --uid 1000-1999",
        "policy test --dst 192.0.2.1 --port 443 --uid=",
        "policy test --dst 192.0.2.1 --port 443 --src ::1",
        "--nonsense",
    ] {
        let args: Vec<&str> = line.split_whitespace().collect();
        let said = netoken(&args)?.code(2).context(line)?;
        ensure!(said.out.is_empty() && !said.err.is_empty(), "netoken {line}: {said:#?}");
    }
    Ok(())
}

pub fn a_bad_token_is_named_with_what_is_right() -> Result<()> {
    for token in ["00", "001122334455667g", "00112233445566778", "", "ä0112233445566"] {
        netoken(&["--iface", "none0", "--attach", "--token", token])?
            .code(2)?
            .err(&["--token", "16 hexadecimal digits", "4e45544f4b454e31"])
            .with_context(|| format!("token '{token}'"))?;
    }
    Ok(())
}

/// The command's own `--help` and those of all commands below it, each with what was typed for it.
fn helps(command: &[&str]) -> Result<Vec<(String, String)>> {
    let help = netoken(&[command, &["--help"]].concat())?.code(0)?.out;
    let mut all = Vec::new();
    let (_, rest) = help.split_once("\nCommands:\n").unwrap_or_default();
    for line in rest.lines().take_while(|line| line.starts_with("  ")) {
        // The second and later lines of what is said of a command stand further in.
        let name = line.strip_prefix("  ").filter(|name| !name.starts_with(' '));
        let Some(name) = name.and_then(|line| line.split_whitespace().next()).filter(|n| *n != "help") else {
            continue;
        };
        all.extend(helps(&[command, &[name]].concat())?);
    }
    all.push((command.join(" "), help));
    Ok(all)
}

pub fn every_command_has_an_example_that_fits() -> Result<()> {
    let helps = helps(&[])?;
    ensure!(helps.len() > 18, "only {} commands were found", helps.len());
    for (command, help) in helps {
        let (_, examples) = help.split_once("\nExample").with_context(|| format!("{command}: no example"))?;
        ensure!(examples.contains(&format!("netoken {command}")), "{command}: not shown in {examples}");
        let widest = examples.lines().max_by_key(|line| line.len()).unwrap_or_default();
        ensure!(widest.len() < 80, "{command}: {} columns: {widest}", widest.len());
    }
    Ok(())
}

/// What applies to a rule, and what to the command.
pub fn options_stand_below_their_heading() -> Result<()> {
    let help = netoken(&["policy", "add", "--help"])?.code(0)?.out;
    let (options, conditions) = help.split_once("\nConditions").context("no conditions")?;
    let (conditions, _) = conditions.split_once("\nExample").context("no example")?;
    for flag in ["--instance", "--netns", "--json", "--last"] {
        ensure!(options.contains(flag) && !conditions.contains(flag), "{flag} in\n{help}");
    }
    ensure!(conditions.contains("--dst") && !options.contains("--dst <"), "{help}");
    Ok(())
}
