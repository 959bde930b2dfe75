//! The tables beside this file: words in columns, of which the first line names the kernels. `#` begins a comment.

use anyhow::{Context, Result, ensure};

/// What is said of one kernel: the words in front of the kernels' columns, and the word in its own.
pub fn rows<const KEYS: usize>(text: &str, kernel: &str) -> Result<Vec<([String; KEYS], String)>> {
    let mut lines = text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty());
    let words = |line: &str| line.split_whitespace().map(str::to_string).collect::<Vec<_>>();
    let titles = words(lines.next().context("an empty table")?);
    let column = titles.iter().skip(KEYS).position(|title| title == kernel);
    let column = KEYS + column.with_context(|| format!("no column '{kernel}' among {titles:?}"))?;
    lines
        .map(|line| {
            let row = words(line);
            ensure!(row.len() == titles.len(), "{} words instead of {}: {line}", row.len(), titles.len());
            let keys = row[..KEYS].to_vec().try_into().ok().context("too few words")?;
            Ok((keys, row[column].clone()))
        })
        .collect()
}
