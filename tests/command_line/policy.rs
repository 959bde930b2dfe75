//! Policy files: what is wrong is shown, and what is wrong changes nothing.

use anyhow::{Context, Result, ensure};

use crate::lab::Lab;
use crate::look::{expect_no_state, ours};
use crate::said::said;
use crate::support::ensure_eq;
use crate::world::World;

const GOOD: &str = r#"
default = { action = "skip" }

[[rule]]
name = "all"
dst = "10.77.0.0/24"
action = "stamp"
token = "2222222222222222"
"#;

/// Each with the line that is wrong and a word of what is wrong with it.
const BAD: [(&str, &str, &str); 7] = [
    ("nonsense = 1\n", ".toml:1:1", "nonsense"),
    ("\n\n[[rule]\n", ".toml:3:", "unclosed"),
    ("default = { action = \"stmp\" }\n", ".toml:1:22", "stmp"),
    ("[[rule]]\nname = 'a'\ndst = '10.0.0.1/8'\naction = 'skip'\n", ".toml:3:7", "did you mean 10.0.0.0/8"),
    ("[[rule]]\nname = 'a'\ndst = '10.0.0.0/8'\nport = 65536\naction = 'skip'\n", ".toml:4:8", "65536"),
    ("\n[[rule]]\nname = 'a'\ndst = '10.0.0.0/8'\naction = 'stamp'\n", ".toml:2:1", "needs a token"),
    ("default = { action = \"stamp\", token = \"001122334\" }\n", ".toml:1:39", "16 hexadecimal digits"),
];

pub fn a_missing_file_is_named() -> Result<()> {
    let lab = Lab::new()?;
    said(&mut lab.netoken("-i lo --attach --policy /no/such/policy.toml"))?.code(1)?.err(&[
        "reading the policy",
        "/no/such/policy.toml",
        "No such file",
    ])?;
    said(&mut lab.netoken("-i lo --attach --policy /"))?
        .code(1)?
        .err(&["reading the policy", "directory"])?;
    expect_no_state(&lab)
}

pub fn a_bad_file_is_named_with_the_line() -> Result<()> {
    let lab = Lab::new()?;
    for (text, line, word) in BAD {
        let path = lab.file("policy.toml", text)?;
        let said = said(&mut lab.netoken(&format!("-i lo --attach --policy {}", path.display())));
        let name = path.display().to_string();
        said?.code(1)?.err(&["checking the policy", &name, line, word]).with_context(|| text.to_string())?;
    }
    expect_no_state(&lab)
}

pub fn a_rejected_file_changes_nothing_that_runs() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet --token 1111111111111111")?;
    world.syns(3)?;
    let before = ours(&world.ns, "c0")?;
    for (text, _, _) in BAD {
        let path = world.lab.file("policy.toml", text)?;
        let result = world.fails(&format!("-i c0 --attach --quiet --priority 9 --policy {}", path.display()));
        result.with_context(|| text.to_string())?;
        ensure_eq!(ours(&world.ns, "c0")?, before, "the filter after {text:?}");
    }
    world.expect_token("1111111111111111", "the token after rejected policies")?;
    world.expect_counter("default", "stamped", 4, "SYNs stamped")?;
    Ok(())
}

pub fn a_policy_is_summed_up() -> Result<()> {
    let world = World::new()?;
    let path = world.lab.file("policy.toml", GOOD)?;
    let said = said(
        &mut world.lab.netoken(&world.args(&format!("-i c0 --attach --quiet --policy {}", path.display()))),
    );
    let said = said?.code(0)?.err(&["attached to c0 egress", "policy: 1 rule, default: skip"])?;
    ensure!(!said.err.contains("2222222222222222"), "{said:#?}");
    world.expect_token("2222222222222222", "the token of the rule")
}
